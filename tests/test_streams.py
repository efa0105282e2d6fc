"""Streams of edits: success at once, what is left of earlier ones, and what twenty successes prove."""

from typing import Any

import pytest
import torch
import validation_cases
from validation_cases import DOWN, ID, SMALL, a_row, opened, plain_logits, probes, quick, some

import resid_surgery as rs
from resid_surgery.editing.changes import Rows
from resid_surgery.editing.edits import Edit, new_edit
from resid_surgery.editing.intervals import wilson
from resid_surgery.editing.probes import Probe
from resid_surgery.editing.streams import checkpoints
from resid_surgery.errors import ArgumentError
from resid_surgery.models.replacing import tensors_of

own_cache = validation_cases.own_cache


def fact(token: int, new: str = " Rome", old: str = " Paris", name: str = "") -> rs.Rewrite:
    return rs.Rewrite(f"The w{token} {{}} is", subject="w12", new=new, old=old, name=name or f"fact {token}")


def embedding_row(model: Any, rewrite: rs.Rewrite, token: int, delta: torch.Tensor) -> Edit:
    """The embedding of one word moved: an edit that acts in prompts with that word only."""
    name = "gpt_neox.embed_in.weight"
    shape = tuple(tensors_of(model.module)[name].shape)
    change = Rows(name, (), shape, (0,), torch.tensor([[token]]), delta[None])
    return new_edit(model, [change], method="by hand", rewrites=[rewrite])


def last_bias(model: Any, rewrite: rs.Rewrite, delta: torch.Tensor) -> Edit:
    """What the last block adds everywhere: an edit that acts in every prompt."""
    name = "gpt_neox.final_layer_norm.bias"
    shape = tuple(tensors_of(model.module)[name].shape)
    change = Rows(name, (), shape, (0,), torch.arange(shape[0])[:, None], delta)
    return new_edit(model, [change], method="by hand", rewrites=[rewrite])


def pushes(model: Any, new: int, size: float = 200.0) -> torch.Tensor:
    w = model.module.get_output_embeddings().weight.detach().double()
    direction = w[new] - w.mean(0)
    return size * direction / direction.norm()


def efficacy(rewrites: Any) -> list[Probe]:
    return [Probe("efficacy", r.text, r.label, target=r.new, old=r.old) for r in rewrites]


@pytest.mark.parametrize(
    ("n", "marks"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (10, [1, 2, 5, 10]), (23, [1, 2, 5, 10, 20, 23]),
                     (100, [1, 2, 5, 10, 20, 50, 100])],
)  # fmt: skip
def test_checkpoints(n: int, marks: list[int]) -> None:
    assert checkpoints(n) == marks


def test_success_at_once_and_retention_are_columns_of_their_own() -> None:
    model = opened()
    first, second = fact(20, " Rome"), fact(21, " Lyon", " Paris")
    # the second edit overwrites what every prompt says, the first one's included
    edits = [last_bias(model, first, pushes(model, ID[" Rome"])),
             last_bias(model, second, pushes(model, ID[" Lyon"], 900.0))]  # fmt: skip
    done = quick(model, edits, [*efficacy([first, second]), *probes()[2:]])
    stream, curve = done.tables["stream"], done.tables["curve"]
    assert stream["edit"].tolist() == [1, 2]
    assert stream["at_once"].astype(bool).tolist() == [True, True]
    assert stream["retained"].astype(bool).tolist() == [False, True]
    assert stream["said_at_end"][0].startswith(" Lyon")
    assert stream["said_at_once"][0].startswith(" Rome")
    assert curve["edits"].tolist() == [1, 2]
    assert curve["at_once"].tolist() == [1.0, 1.0]
    assert curve["retained"].tolist() == [1.0, 0.5]
    both = edits[0] + edits[1]
    with both.applied(model) as edited:
        text = probes()[5].text
        p, q = (torch.log_softmax(plain_logits(m.module, model.tokenizer.encode(text)), -1) for m in (model, edited))
        kl = (p.exp() * (p - q)).sum(-1)
        assert curve["kl_unrelated"].iloc[-1] == pytest.approx(float(kl.mean()), rel=0.5), "against the original model"
    w = tensors_of(model.module)["gpt_neox.final_layer_norm.bias"].detach()
    total = pushes(model, ID[" Rome"]) + pushes(model, ID[" Lyon"], 900.0)
    assert curve["norm_growth"].tolist() == pytest.approx([200 / float(w.norm()), float(total.norm() / w.norm())])
    assert curve["perplexity_ratio"].iloc[-1] > 1
    gates = done.gates.set_index("gate")
    assert gates.loc["efficacy: free decoding", "value"] == 1.0
    assert gates.loc["retention", "value"] == 0.5
    assert gates.loc["retention", "n_unit"] == "edits"
    assert gates.loc["retention", "n"] == 2


def test_the_curve_is_against_the_original_model_by_a_loop() -> None:
    model = opened()
    rewrites = [fact(20 + i) for i in range(3)]
    edits = [embedding_row(model, r, 20 + i, torch.randn(24).double()) for i, r in enumerate(rewrites)]
    edits = [e + a_row(model, 20.0, neuron=5 + i, rewrite=None) for i, e in enumerate(edits)]
    texts = [some(*range(30 + i, 40 + i)) for i in range(3)]
    asked = [*efficacy(rewrites), *(Probe("locality", t, stratum="unrelated") for t in texts),
             *(Probe("text", t) for t in texts)]  # fmt: skip
    curve = quick(model, edits, asked).tables["curve"]
    assert curve["edits"].tolist() == [1, 2, 3]
    for n, row in zip((1, 2, 3), curve.to_dict("records"), strict=True):
        so_far = edits[0]
        for one in edits[1:n]:
            so_far = so_far + one
        kls, before, after = [], [], []
        with so_far.applied(model) as edited:
            for text in texts:
                ids = model.tokenizer.encode(text)
                p, q = (torch.log_softmax(plain_logits(m.module, ids), -1) for m in (model, edited))
                kls += (p.exp() * (p - q)).sum(-1).tolist()
                before += [-float(p[i, ids[i + 1]]) for i in range(len(ids) - 1)]
                after += [-float(q[i, ids[i + 1]]) for i in range(len(ids) - 1)]
        assert row["kl_unrelated"] == pytest.approx(sum(kls) / len(kls), rel=1e-6)
        ratio = torch.tensor(sum(after) / len(after) - sum(before) / len(before)).exp()
        assert row["perplexity_ratio"] == pytest.approx(float(ratio), rel=1e-5)
        growth = max(c.norm() / float(tensors_of(model.module)[c.name].detach().double().norm())
                     for c in so_far.changes)  # fmt: skip
        assert row["norm_growth"] == pytest.approx(growth)


def test_trap_10_twenty_of_twenty_is_inconclusive_in_a_stream() -> None:
    model = opened()
    rewrites = [fact(20 + i) for i in range(20)]
    # every embedding is turned into one push towards the new answer that no other prompt feels
    edits = [last_bias(model, r, pushes(model, ID[" Rome"], 60.0)) for r in rewrites]
    done = quick(model, edits, efficacy(rewrites))
    stream = done.tables["stream"]
    assert len(stream) == 20
    assert stream["retained"].astype(bool).all()
    assert stream["at_once"].astype(bool).all()
    assert done.tables["curve"]["edits"].tolist() == [1, 2, 5, 10, 20]
    gate = done.gates.set_index("gate").loc["retention"]
    assert (gate["value"], gate["n"], gate["n_unit"]) == (1.0, 20, "edits")
    assert gate["low"] <= wilson(20, 20).low == pytest.approx(0.839, abs=5e-4)
    assert gate["state"] == "INCONCLUSIVE"
    assert done.verdict != "PASS"
    assert "more edits" in gate["why"]


def test_trap_10_the_unit_is_the_edit_not_the_prompt() -> None:
    model = opened()
    rewrites = [fact(20 + i) for i in range(4)]
    edits = [embedding_row(model, r, 20 + i, 0.1 * torch.randn(24).double()) for i, r in enumerate(rewrites)]
    near = [Probe("locality", some(30 + i, 40 + j), r.label, "same relation", target=" Lyon", old=" Rome")
            for i, r in enumerate(rewrites) for j in range(6)]  # fmt: skip
    again = [Probe("paraphrase", some(50 + j, 20 + i), r.label, target=" Rome", old=" Paris")
             for i, r in enumerate(rewrites) for j in range(5)]  # fmt: skip
    gates = quick(model, edits, [*efficacy(rewrites), *near, *again]).gates.set_index("gate")
    for name in ("efficacy: free decoding", "paraphrase: new above old", "retention", "kl: neighbourhood"):
        assert (gates.loc[name, "n"], gates.loc[name, "n_unit"]) == (4, "edits"), name
    single = quick(model, edits[0], [*efficacy(rewrites[:1]), *(p for p in (*near, *again) if p.fact == "fact 20")])
    one = single.gates.set_index("gate")
    assert (one.loc["kl: neighbourhood", "n"], one.loc["kl: neighbourhood", "n_unit"]) == (6, "prompts of one edit")


def test_a_stream_is_judged_as_one_and_an_edit_of_one_fact_is_not() -> None:
    model = opened()
    for given, limit in ((a_row(model, 30.0), 0.10), ([a_row(model, 30.0)], 0.20)):
        one = quick(model, given, probes())
        assert one.gates.set_index("gate").loc["kl: neighbourhood", "policy_fail"] == limit
    rewrites = [fact(20), fact(21)]
    edits = [embedding_row(model, r, 20 + i, torch.randn(24).double()) for i, r in enumerate(rewrites)]
    two = quick(model, edits, [*efficacy(rewrites), *probes()[2:]])
    assert two.gates.set_index("gate").loc["kl: neighbourhood", "policy_fail"] == 0.20


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda m: [], "a list of at least one"),
        (lambda m: [a_row(m, 9.0), "edit"], "a list of at least one"),
        (lambda m: [a_row(m, 9.0, rewrite=None)], "one rewrite each"),
        (lambda m: [rs.edit_coefficients(m, "L1.N3", 0.0, baked=False, rewrites=[fact(20)])], "works by interventions"),
        (lambda m: [a_row(m, 9.0), a_row(m, 9.0).inverse], "must change some weight"),
        (lambda m: [a_row(m, 9.0, rewrite=fact(95))], "an efficacy probe of every edit"),
    ],
)
def test_lists_that_are_no_streams_are_refused(make: Any, said: str) -> None:
    model = opened("llama")
    with pytest.raises(ArgumentError, match=said):
        quick(model, make(model), probes())


def test_the_stream_reads_the_small_budget() -> None:
    assert SMALL.text_tokens == 24
    assert DOWN.format(1) in tensors_of(opened("llama").module)
