"""Models under interventions: forwards and generation equal what they should, and the base stays as it was."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import families, positions_of, prompts, sites
from tiny import FAMILIES, build, shared

import resid_surgery as rs

PROMPT = rs.Prompt(ids=[5, 4, 3, 2], target=1, versus=[7])


@given(families, prompts(length=4), st.data())
def test_a_forward_under_interventions_is_the_intervened_one(family, prompt, data):
    model = shared(family)
    rec = rs.record(model, rs.Prompt(ids=prompt.ids, target=prompt.target))
    site = data.draw(sites(rec, last=0))
    at = data.draw(st.sampled_from(["target", "all", "list"]))
    ops = [rs.Scale(site, -1.5, positions=positions_of(rec, at))]
    try:
        effect = rs.intervene(rec, ops)
    except rs.InterventionError:
        assume(False)
    with rs.under(model, ops) as altered:
        logits = altered.forward(rec.prompt.ids).logits[0, -1]
    assert torch.allclose(logits, effect.after.logits, atol=1e-9)


def steps(model, ops_at, prompt, n):
    """Greedy continuation by whole forwards, each under the operations that `ops_at` gives for its length."""
    ids = list(prompt)
    for _ in range(n):
        rec = rs.record(model, rs.Prompt(ids=ids, target=0))
        ids.append(int(rs.intervene(rec, ops_at(len(prompt), len(ids))).after.logits.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("ops", "ops_at"),
    [
        (rs.Zero("L1.attn", positions="all"), lambda n, m: rs.Zero("L1.attn", positions="all")),
        (rs.Scale("L0.mlp", 3.0, positions=[1, 3]), lambda n, m: rs.Scale("L0.mlp", 3.0, positions=[1, 3])),
        (rs.Zero("L1.H1"), lambda n, m: rs.Zero("L1.H1", positions=list(range(n - 1, m)))),
        (rs.Zero("L1.mlp", positions="generated"),
         lambda n, m: rs.Zero("L1.mlp", positions=list(range(n, m))) if m > n else rs.Scale("L1.mlp", 1.0)),
        (rs.Zero("L1.H1<2", positions="all"), lambda n, m: rs.Zero("L1.H1<2", positions=list(range(2, m)))),
        (rs.Cut("L0.mlp", "L2.mlp", positions="all"), lambda n, m: rs.Cut("L0.mlp", "L2.mlp", positions="all")),
        (rs.Cut("L0.attn", "L1.H1", positions="all"), lambda n, m: rs.Cut("L0.attn", "L1.H1", positions="all")),
        (rs.Cut("L0.mlp", "L1.H1", side="value"),
         lambda n, m: rs.Cut("L0.mlp", "L1.H1", side="value", positions=list(range(n - 1, m)))),
        (rs.Cut("L1.mlp", "unembed", positions="all"), lambda n, m: rs.Cut("L1.mlp", "unembed", positions="all")),
    ],
    ids=lambda one: None if callable(one) else str(one),
)  # fmt: skip
def test_generation_is_step_by_step_the_same_as_whole_forwards(family, ops, ops_at):
    model = shared(family)
    with rs.under(model, ops) as altered:
        tokens = altered.generate(list(PROMPT.ids), max_new_tokens=6, eos_token_id=[-1])
    assert tokens[0].tolist() == steps(model, ops_at, PROMPT.ids, 6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", ["L1.V0", "L1.K1", "L1.Q0"])
@pytest.mark.parametrize("at", [1, "all", "target"])
def test_operated_keys_and_values_go_on_in_the_cache(family, site, at):
    model = shared(family)
    op = rs.Scale(site, 3.0, positions=at)
    with rs.under(model, op) as altered:
        out = altered.generate(list(PROMPT.ids[:3]), max_new_tokens=4, eos_token_id=[-1], output_logits=True,
                               return_dict_in_generate=True)  # fmt: skip
    ids = list(PROMPT.ids[:3])
    for logits in out.logits:
        n = len(ids)
        where = list(range(2, n)) if at == "target" else at
        rec = rs.record(model, rs.Prompt(ids=ids, target=0))
        effect = rs.intervene(rec, rs.Scale(site, 3.0, positions=where))
        assert torch.allclose(logits[0].double(), effect.after.logits, atol=1e-5)
        ids.append(int(logits[0].argmax()))


def test_donors_are_read_again_when_weights_changed():
    model = rs.load(build("llama"))
    donor = rs.record(model, rs.Prompt(ids=[9, 8, 7], target=1))
    with rs.under(model, rs.Patch("L1.mlp", donor)) as altered:
        altered.forward([5, 4, 3])
        with torch.no_grad():
            model.module.model.layers[0].mlp.down_proj.weight.mul_(3)
        with pytest.raises(rs.StaleRecordingError):
            altered.forward([5, 4, 3])


def test_rows_of_a_batch_are_altered_alike():
    model = shared("llama")
    with rs.under(model, [rs.Scale("L1.N3", 4.0, positions="all"), rs.Cut("L0.mlp", "L2.H1")]) as altered:
        both = altered.generate(torch.tensor([[5, 4, 3], [9, 8, 7]]), max_new_tokens=4, eos_token_id=[-1])
        one = [altered.generate(ids, max_new_tokens=4, eos_token_id=[-1]) for ids in ([5, 4, 3], [9, 8, 7])]
    assert both.tolist() == [one[0][0].tolist(), one[1][0].tolist()]


def test_the_base_is_untouched_and_usable_inside_and_after():
    module = build("llama")
    model = rs.load(module)
    ids = torch.tensor([[5, 4, 3, 2]])
    before, fingerprint = module(ids).logits, model.fingerprint()
    with rs.under(model, rs.Zero("L1.attn", positions="all")) as altered:
        altered.generate([5, 4, 3, 2], max_new_tokens=3)
        assert torch.equal(module(ids).logits, before)
        assert not torch.allclose(altered.forward(ids).logits, before)
        rs.record(model, PROMPT)
    assert torch.equal(module(ids).logits, before)
    assert model.fingerprint() == fingerprint
    assert not any("forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    with pytest.raises(rs.InterventionError, match="was left"):
        altered.generate([5, 4])


def test_values_of_donors_are_read_once(monkeypatch):
    from resid_surgery.surgery import reading

    model = shared("llama")
    donor = rs.Prompt(ids=[9, 8, 7, 6], target=1)
    seen, plain = [], reading.forward
    monkeypatch.setattr(reading, "forward", lambda *a, **k: seen.append(1) or plain(*a, **k))
    with rs.under(model, rs.Patch("L1.mlp", donor)) as altered:
        altered.generate([5, 4, 3], max_new_tokens=5, eos_token_id=[-1])
    assert len(seen) == 1


def test_an_error_mid_generation_leaves_everything_as_it_was(monkeypatch):
    from resid_surgery.surgery import writing

    model = shared("llama")
    fingerprint = model.fingerprint()

    def explode(*_):
        raise MemoryError("injected")

    with rs.under(model, rs.Zero("L1.N3")) as altered:
        good = altered.generate([5, 4, 3], max_new_tokens=3)
        with monkeypatch.context() as patch:
            patch.setattr(writing.Writing, "_apply", explode)
            with pytest.raises(MemoryError, match="injected"):
                altered.generate([5, 4, 3], max_new_tokens=3)
        assert torch.equal(altered.generate([5, 4, 3], max_new_tokens=3), good)
    assert model.fingerprint() == fingerprint


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda m: rs.under(m, rs.Zero("L9.mlp")).__enter__(), rs.SiteError, r"0\.\.2 .*got 9"),
        (lambda m: rs.under(m, []).__enter__(), rs.InterventionError, "at least one"),
        (lambda m: rs.under(m, "L1.N3").__enter__(), rs.InterventionError, "a list of Zero"),
        (lambda m: rs.under(5, rs.Zero("L1.N3")).__enter__(), rs.ArgumentError, "rs.load"),
        (lambda m: generate(m, rs.Zero("L1.N3", positions=[9]), [1, 2]), rs.PromptError, r"-2\.\.1; got 9"),
        (lambda m: generate(m, rs.Zero("L1.N3"), "text"), rs.PromptError, "without a tokenizer"),
        (lambda m: generate(m, rs.Zero("L1.N3"), []), rs.PromptError, "at least one token id"),
        (lambda m: generate(m, rs.Cut("L0.mlp", "L1.H1"), [1, 2], num_beams=2), rs.ArgumentError, "num_beams"),
        (lambda m: generate(m, rs.Zero("L1.N3"), torch.tensor([[999]])), rs.PromptError, "999"),
        (lambda m: generate(m, rs.Zero("L1.N3"), [1, 2], use_cache=False), rs.ArgumentError, "`use_cache` must be"),
        (lambda m: generate(m, rs.Zero("L1.N3"), [1, 2], prefill_chunk_size=1), rs.ArgumentError, "prefill_chunk_size"),
        (lambda m: forward(m, rs.Cut("L0.mlp", "L1.H1"), [1, 2], labels=torch.tensor([[1, 2]])), rs.ArgumentError,
         "`labels` does not go with edges"),
        (lambda m: generate(shared_bloom(), rs.Scale("L1.K0", 2.0), [1, 2]), rs.SiteError, "cannot be operated on in"),
        (lambda m: generate(m, [rs.Zero("L1.mlp"), rs.Zero("L1.N3")], [1]), rs.InterventionError, "both write"),
        (lambda m: rs.under(m, rs.Cut("L0.mlp", "L1.H1", positions="generated")).__enter__(), rs.InterventionError,
         "before anything is generated"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_with_the_reason(use, error, message):
    with pytest.raises(error, match=message):
        use(shared("llama"))


def shared_bloom():
    return rs.load(rs.tiny("bloom"))


def forward(model, ops, prompt, **keywords):
    with rs.under(model, ops) as altered:
        return altered.forward(prompt, **keywords)


def generate(model, ops, prompt, **options):
    with rs.under(model, ops) as altered:
        return altered.generate(prompt, max_new_tokens=2, **options)


@pytest.mark.real
def test_generation_on_a_cache_without_a_mask_sees_what_came_before(smollm2, paris):
    ops = [rs.Scale("L23.H4<3", -9.0)]
    ids = list(paris.prompt.ids)
    with rs.under(smollm2, ops) as altered:
        got = altered.generate(ids, max_new_tokens=4)[0].tolist()
    acted = steps(smollm2, lambda n, m: rs.Scale("L23.H4<3", -9.0, positions=list(range(n - 1, m))), ids, 4)
    assert got == acted
    assert acted != steps(smollm2, lambda n, m: rs.Scale("L23.H4<3", 1.0), ids, 4)
