"""Patterns of heads on random tokens: a model of known heads, plain attention weights, what is drawn."""

import pytest
import torch
from induction import induction_model
from tiny import FAMILIES, build, shared

import resid_surgery as rs
from resid_surgery.attribution.patterns import KINDS, beginning, drawn_from, head_patterns, repeated_sequences


def test_hand_set_heads_are_found_for_what_they_are():
    table = head_patterns(induction_model(), n=8, lengths=(4, 12)).set_index("site")
    assert table.loc["L0.H0", "previous_token"] > 0.99
    assert table.loc["L0.H1", "duplicate_token"] == pytest.approx(0.5, abs=0.01)  # half on the token itself
    assert table.loc["L1.H0", "induction"] > 0.9  # position 0 holds itself as its previous token
    assert table.loc["L1.H1", "first_token"] > 0.99
    for site, kind in (("L0.H0", "previous_token"), ("L1.H0", "induction"), ("L1.H1", "first_token")):
        others = table.loc[site, [one for one in KINDS if one != kind]].astype(float)
        assert (others < 0.2).all(), site


def test_a_head_that_looks_a_fixed_distance_back_is_no_induction_head():
    """On one length, that distance is induction; on random lengths it is not."""
    model = induction_model(offset=7)
    fooled = head_patterns(model, n=4, lengths=(8, 8)).set_index("site")
    assert fooled.loc["L1.H0", "induction"] > 0.99
    found = head_patterns(model, n=8, lengths=(4, 12)).set_index("site")
    assert found.loc["L1.H0", "induction"] < 0.2


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_means_of_the_models_own_attention_weights(family):
    model = shared(family)
    table = head_patterns(model, n=3, lengths=(3, 6), seed=5).set_index("site")
    sums = {}
    chance = 0.0
    for text in repeated_sequences(model, 3, (3, 6), 5):
        start, n = text.start, text.length
        with torch.no_grad():
            out = model.module(torch.tensor([text.ids]), use_cache=False, output_attentions=True).attentions
        for layer, alpha in enumerate(out):
            for h in range(alpha.shape[1]):
                for i in range(n):
                    t = start + n + i
                    looked = {"previous_token": t - 1, "duplicate_token": start + i, "induction": start + i + 1}
                    looked["first_token"] = 0
                    for kind, j in looked.items():
                        key = (f"L{layer}.H{h}", kind)
                        sums[key] = sums.get(key, 0.0) + float(alpha[0, h, t, j]) / n / 3
        chance += sum(1 / (start + n + i + 1) for i in range(n)) / n / 3
    for (site, kind), value in sums.items():
        assert table.loc[site, kind] == pytest.approx(value, abs=1e-6)
    assert table["chance"].tolist() == pytest.approx([chance] * len(table))


def test_a_random_model_has_no_such_heads():
    table = head_patterns(rs.load(build("llama", seed=3)), n=8, lengths=(10, 20))
    assert table["induction"].max() < 0.3
    assert abs(table["induction"].mean() - table["chance"].iloc[0]) < 0.05


def test_sequences_are_distinct_tokens_twice_of_different_lengths():
    texts = repeated_sequences(shared("gpt2"), 9, (2, 10), 0)
    assert sorted(text.length for text in texts) == list(range(2, 11))
    for text in texts:
        first, second = text.ids[: text.length], text.ids[text.length :]
        assert first == second
        assert len(set(first)) == text.length
        assert text.second == list(range(text.length, 2 * text.length))
    again = repeated_sequences(shared("gpt2"), 9, (2, 10), 0)
    assert [text.ids for text in again] == [text.ids for text in texts]
    assert [text.ids for text in repeated_sequences(shared("gpt2"), 9, (2, 10), 1)] != [text.ids for text in texts]


def test_more_sequences_than_lengths_repeat_lengths():
    texts = repeated_sequences(shared("gpt2"), 5, (3, 4), 0)
    assert sorted(text.length for text in texts)[:2] == [3, 3]
    assert len(texts) == 5


class Words:
    """A tokenizer of 30 one-letter words, with a BOS in front if asked for, and special tokens 0, 1 and 29."""

    bos_token_id, all_special_ids, unk_token_id = 1, [0, 1], None
    added_tokens_decoder = {29: type("Added", (), {"special": True})()}  # noqa: RUF012

    def __init__(self, *, bos):
        self.bos = bos

    def __len__(self):
        return 30

    def encode(self, text, add_special_tokens=True):
        return [1] * (self.bos and add_special_tokens) + [2 + ord(c) % 27 for c in text]

    def decode(self, ids, clean_up_tokenization_spaces=False):
        return "".join(f"<{i}>" for i in ids)


@pytest.mark.parametrize("bos", [True, False])
def test_special_tokens_are_never_drawn_and_a_bos_stands_only_where_the_tokenizer_puts_it(bos):
    model = rs.load(build("llama"), tokenizer=Words(bos=bos))
    assert beginning(model) == ((1,) if bos else ())
    assert drawn_from(model) == list(range(2, 29)) or drawn_from(model) == list(range(3, 29))  # config's eos may be 2
    for text in repeated_sequences(model, 20, (20, 26), 0):
        assert text.start == int(bos)
        assert not set(text.ids[text.start :]) & {0, 1, 29}
        assert max(text.ids) < 30
    table = head_patterns(model, n=2, lengths=(5, 9))
    assert set(table["sequences"]) == {2}


def test_some_heads_only():
    whole = head_patterns(shared("llama"), n=2, lengths=(3, 6)).set_index("site")
    some = head_patterns(shared("llama"), n=2, lengths=(3, 6), heads=["L2.H1", "L0.H3"]).set_index("site")
    assert list(some.index) == ["L2.H1", "L0.H3"]
    assert whole.loc[some.index, list(KINDS)].equals(some[list(KINDS)])


def test_sinks_and_windows_count_as_the_model_counts_them():
    """GPT-OSS's sinks take weight: rows of its weights sum to less than 1."""
    model = rs.load(rs.tiny("gpt_oss"))
    table = head_patterns(model, n=2, lengths=(4, 8))
    assert (table[list(KINDS)].sum(axis=1) < 1).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(n=0), "`n` must be a whole number in 1..100000"),
        (dict(seed=-1), "`seed`"),
        (dict(lengths=(5, 4)), r"`lengths` must be \(least, greatest\)"),
        (dict(lengths=5), r"`lengths` must be \(least, greatest\)"),
        (dict(lengths=(1, 4)), "`lengths` must be a whole number >= 2"),
        (dict(lengths=(4, 33)), "`lengths` must be at most 32 tokens for Llama"),
        (dict(heads="L0.N3"), "`heads` must be heads"),
    ],
)
def test_bad_calls(options, said):
    with pytest.raises(rs.ResidSurgeryError, match=said):
        head_patterns(shared("llama"), **options)


def test_sequences_must_not_be_longer_than_there_are_tokens():
    with pytest.raises(rs.ArgumentError, match="`lengths` must be at most 16 tokens"):
        head_patterns(induction_model(), lengths=(4, 17))
    model = rs.load(build("llama", max_position_embeddings=4096))
    with pytest.raises(rs.ArgumentError, match=r"`lengths` must be at most 9\d tokens"):
        head_patterns(model, lengths=(4, 97))
