"""Neurons as key-value memories: a small corpus read by plain hooks and sorted in plain lists."""

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_heads import bs_unit, loaded
from test_patterns import Words
from tiny import VOCAB, build, shared

import resid_surgery as rs
from resid_surgery.attribution import triggers
from resid_surgery.attribution.memories import neuron_memory
from resid_surgery.models.zoo import tiny

DOWN = {"gpt2": "transformer.h.{}.mlp.c_proj", "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
        "opt": "model.decoder.layers.{}.fc2"}  # fmt: skip
texts = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9), min_size=1, max_size=7)


def coefficients(model, family, layer, ids):
    """(position, neuron) what the down-projection reads, by a plain hook in a plain forward."""
    seen = []
    down = model.module.get_submodule(DOWN.get(family, "model.layers.{}.mlp.down_proj").format(layer))
    hook = down.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().reshape(len(ids), -1)))
    with torch.no_grad():
        model.module(torch.tensor([ids]), use_cache=False)
    hook.remove()
    return seen[0]


def as_prompts(corpus):
    return [rs.Prompt(ids=ids, target=0) for ids in corpus]


@given(st.sampled_from(["llama", "gpt2", "gpt_neox", "gemma2", "opt"]), texts, st.integers(1, 5), st.integers(0, 39))
def test_triggers_and_statistics_are_those_of_all_coefficients_sorted(family, corpus, top, k):
    model = shared(family)
    memory = neuron_memory(model, [f"L1.N{k}", f"L2.N{39 - k}"], as_prompts(corpus), top=top, values=3)
    for layer, index in ((1, k), (2, 39 - k)):
        found = [(float(m[index]), n, p) for n, ids in enumerate(corpus)
                 for p, m in enumerate(coefficients(model, family, layer, ids))]  # fmt: skip
        name = f"L{layer}.N{index}"
        mine = memory.triggers[memory.triggers["site"] == name]
        for side, order in (("highest", sorted(found, reverse=True)), ("lowest", sorted(found))):
            rows = mine[mine["side"] == side]
            assert rows["coefficient"].tolist() == pytest.approx([m for m, _, _ in order[:top]], abs=1e-6)
            assert rows["rank"].tolist() == list(range(1, len(rows) + 1))
            for row in rows.itertuples():  # ties may come in any order: the place must have that coefficient
                assert (row.coefficient, row.text, row.position) == pytest.approx(
                    next(one for one in found if one[1:] == (row.text, row.position)), abs=1e-6
                )
                ids = corpus[row.text]
                assert row.token == f"#{ids[row.position]}"
                assert row.context == " ".join(f"#{i}" for i in ids[max(0, row.position - 10) : row.position])
                after = [f"#{i}" for i in ids[row.position + 1 : row.position + 2]]
                assert after == [row.next_token] or (not after and pd.isna(row.next_token))
        row = memory.summary.set_index("site").loc[name]
        numbers = torch.tensor([m for m, _, _ in found], dtype=torch.float64)
        assert row["positions"] == len(found)
        assert row["mean"] == pytest.approx(float(numbers.mean()), abs=1e-6)
        assert row["std"] == pytest.approx(float(numbers.std(unbiased=False)), abs=1e-5)
        assert row["highest"] == pytest.approx(max(found)[0], abs=1e-6)
        assert row["lowest"] == pytest.approx(min(found)[0], abs=1e-6)
        assert row["positive"] == pytest.approx(float((numbers > 0).double().mean()))
        assert row["negative"] == pytest.approx(float((numbers < 0).double().mean()))
    assert memory.texts == len(corpus)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite"])
def test_values_promote_what_their_row_says(family):
    model = loaded(family)
    block = model.module.get_submodule(model.path(1, "block"))
    with torch.no_grad():
        row = block.mlp.c_proj.weight[7] if family == "gpt2" else block.mlp.down_proj.weight[:, 7]
        row = row * (1 + block.post_feedforward_layernorm.weight) if family == "gemma2" else row
        row = row * model.module.config.residual_multiplier if family == "granite" else row
    bs = bs_unit(model, family, row)
    memory = neuron_memory(model, "L1.N7", as_prompts([[5, 4, 33, 2]]), values=4)
    for side, order in (("promotes", bs.argsort(descending=True)), ("suppresses", bs.argsort())):
        rows = memory.values[memory.values["side"] == side]
        assert rows["token_id"].tolist() == order[:4].tolist()
        assert rows["bs_value"].tolist() == pytest.approx(bs[order[:4]].tolist())
        assert rows["bs_centred"].tolist() == pytest.approx((bs[order[:4]] - bs.mean()).tolist())
    assert memory.summary["value_norm"].iloc[0] == pytest.approx(float(row.detach().norm()))
    for one in memory.triggers.dropna(subset="next_rank").itertuples():
        following = [5, 4, 33, 2][one.position + 1]
        written = bs if one.coefficient > 0 else -bs
        assert one.next_rank == 1 + int((written > written[following]).sum())


def test_many_neurons_at_once_are_the_same_as_one_at_a_time():
    model, corpus = shared("llama"), as_prompts([[5, 4, 33, 2], [1, 2], [60, 61, 62, 63, 64], [7, 8]])
    whole = neuron_memory(model, ["L0.N*", "L2.N3"], corpus, top=3)
    assert len(whole.sites) == 41
    for name in ("L0.N0", "L0.N39", "L2.N3"):
        alone = neuron_memory(model, name, corpus, top=3)
        for table in ("triggers", "values", "summary"):
            mine = getattr(whole, table)
            mine = mine[mine["site"] == name].reset_index(drop=True)
            pd.testing.assert_frame_equal(mine, getattr(alone, table))
    assert repr(whole) == "NeuronMemory(41 neurons over 4 texts, 13 positions)"


def test_a_generator_is_read_a_few_texts_at_a_time(monkeypatch):
    monkeypatch.setattr(triggers, "WAITING", 8)
    monkeypatch.setattr(triggers, "TOKENS", 4)
    monkeypatch.setattr(triggers, "TAP_BYTES", 1)
    corpus = [[i, i + 1, i + 2] for i in range(20)]
    ahead = []
    real = triggers.forward

    def watched(model, ids, *args, **kwargs):
        assert ids.numel() <= 4
        ahead.append(drawn[0])
        return real(model, ids, *args, **kwargs)

    drawn = [0]

    def some():
        for one in as_prompts(corpus):
            drawn[0] += 1
            yield one

    monkeypatch.setattr(triggers, "forward", watched)
    model = shared("gpt2")
    found = neuron_memory(model, "L0:2.N*", some(), top=4)
    assert ahead[0] <= 3
    monkeypatch.undo()
    expected = neuron_memory(model, "L0:2.N*", as_prompts(corpus), top=4)
    assert found.summary["mean"].tolist() == pytest.approx(expected.summary["mean"].tolist())
    assert found.triggers["coefficient"].tolist() == pytest.approx(expected.triggers["coefficient"].tolist())
    assert found.texts == expected.texts == 20


def test_long_texts_are_cut_into_windows_with_their_beginning():
    """Each piece is a text of its own behind the BOS, which is not counted; positions and context are the text's."""
    model = rs.load(build("llama"), tokenizer=Words(bos=True))
    text = "abcdefghijk"
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    memory = neuron_memory(model, "L1.N5", [text], top=20, window=5, context=3)
    found = []
    for low in range(0, len(ids), 4):
        piece = [1, *ids[low : low + 4]]
        found += [(float(m[5]), low + i) for i, m in enumerate(coefficients(model, "llama", 1, piece)[1:])]
    rows = memory.triggers[memory.triggers["side"] == "highest"]
    assert sorted(rows["position"]) == list(range(11))
    assert rows["coefficient"].tolist() == pytest.approx(sorted((m for m, _ in found), reverse=True), abs=1e-6)
    place = rows.set_index("position")
    assert place.loc[4, "context"] == "".join(f"<{i}>" for i in ids[1:4])
    assert place.loc[4, "next_token"] == f"<{ids[5]}>"
    assert place.loc[0, "context"] == ""
    assert memory.summary["positions"].iloc[0] == 11


def test_neurons_of_experts_are_read_where_they_are_routed_to():
    model = rs.load(tiny("mixtral", dtype=torch.float64))
    corpus = [[5, 4, 33, 2, 60], [7, 8, 9]]
    memory = neuron_memory(model, "L1.E*.N3", as_prompts(corpus), top=3)
    summary = memory.summary.set_index("site")
    assert summary["positions"].sum() == 2 * 8  # two experts a token
    seen = {expert: [] for expert in range(4)}
    for ids in corpus:
        for position in range(len(ids)):
            rec = rs.record(model, rs.Prompt(ids=ids, target=0, position=position))
            for group in rec.layers[1].groups:
                seen[group.expert].append(float(group.coefficient[3]))
    for expert, numbers in seen.items():
        name = f"L1.E{expert}.N3"
        assert summary.loc[name, "positions"] == len(numbers)
        mine = memory.triggers[(memory.triggers["site"] == name) & (memory.triggers["side"] == "highest")]
        assert mine["coefficient"].tolist() == pytest.approx(sorted(numbers, reverse=True)[:3], abs=1e-6)
        if numbers:
            assert summary.loc[name, "mean"] == pytest.approx(sum(numbers) / len(numbers), abs=1e-6)


def test_neurons_of_a_shared_expert():
    model = rs.load(tiny("deepseek_v3", dtype=torch.float64))
    layer = next(i for i in range(4) if model.block(i).shared_out)
    memory = neuron_memory(model, f"L{layer}.shared.N2", as_prompts([[5, 4, 33]]), top=3)
    runs = [rs.record(model, rs.Prompt(ids=[5, 4, 33], target=0, position=p)) for p in range(3)]
    expected = [float(run.layers[layer].group("shared").coefficient[2]) for run in runs]
    rows = memory.triggers[memory.triggers["side"] == "highest"]
    assert rows["coefficient"].tolist() == pytest.approx(sorted(expected, reverse=True), abs=1e-6)


def fails(*_, **__):
    pytest.fail("a forward ran")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (dict(sites="L1.H0"), rs.SiteError, "`sites` must be neurons"),
        (dict(sites="L1.N40"), rs.SiteError, "`index` must be in 0..39"),
        (dict(top=0), rs.ArgumentError, "`top`"),
        (dict(values=49), rs.ArgumentError, "`values`"),
        (dict(context=-1), rs.ArgumentError, "`context`"),
        (dict(window=65), rs.ArgumentError, "`window` must be a whole number in 2..64"),
        (dict(corpus="abc"), rs.ArgumentError, "`corpus` must be an iterable of texts .* Wrap it in a list"),
        (dict(corpus=[]), rs.ArgumentError, "at least one text"),
        (dict(corpus=[rs.Prompt(ids=[1], target=0), ""]), rs.PromptError, r"`corpus\[1\]` must be a non-empty string"),
        (dict(corpus=["text"]), rs.PromptError, r"corpus\[0\] is text, but .* without a tokenizer"),
    ],
)
def test_bad_calls_run_nothing(options, error, said, monkeypatch):
    monkeypatch.setattr(triggers, "forward", fails)
    given_all = dict(sites="L1.N0", corpus=as_prompts([[1, 2]])) | options
    with pytest.raises(error, match=said):
        neuron_memory(shared("llama"), given_all.pop("sites"), given_all.pop("corpus"), **given_all)


def test_bad_texts_of_a_generator_are_named_when_they_come():
    with pytest.raises(rs.PromptError, match=r"`corpus\[1\]` must be a non-empty string"):
        neuron_memory(shared("llama"), "L1.N0", (one for one in [rs.Prompt(ids=[1], target=0), None]))
    with pytest.raises(rs.PromptError, match="text 0 of `corpus` has token 200"):
        neuron_memory(shared("llama"), "L1.N0", iter([rs.Prompt(ids=[200], target=0)]))
    with pytest.raises(rs.ArgumentError, match="at least one text"):
        neuron_memory(shared("llama"), "L1.N0", iter([]))
