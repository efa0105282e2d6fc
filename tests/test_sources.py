"""Query sources: shares against loops and against measurement, for every key and grain."""

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import dtypes, families, prompts
from tiny import FAMILIES, shared

import resid_surgery as rs
from resid_surgery.stream.closing import coefficient_from
from resid_surgery.stream.subvalues import GRAINS, vector_of


@given(families, dtypes, prompts(), st.sampled_from(GRAINS), st.integers(0, 2), st.integers(0, 39), st.integers(1, 12))
def test_shares_and_constant_sum_to_each_measured_pre_activation(family, dtype, prompt, grain, layer, k, top):
    rec = rs.record(shared(family, dtype), prompt)
    table = rs.sources(rec, rs.Neuron(layer, k), grain=grain, top=top)
    assert set(table["key"]) == set(rec.layers[layer].groups[0].key_names)
    (neurons,) = rec.layers[layer].groups
    for i, (_, rows) in enumerate(table.groupby("key", sort=False)):
        measured = float(neurons.pre_activations[i][k])
        size = 1 + rows["share"].abs().max()
        assert rows["share"].sum() == pytest.approx(measured, abs=(1e-6 if dtype == torch.float64 else 1e-4) * size)
        assert rows["reading"].iloc[0] == pytest.approx(measured)
        assert rows["writer"].iloc[-1] == "constant"
    assert table["coefficient"].iloc[0] == pytest.approx(float(neurons.coefficient[k]))


@given(families, prompts(), st.integers(0, 2), st.integers(0, 39))
def test_shares_equal_nested_loops(family, prompt, layer, k):
    model = shared(family)
    rec = rs.record(model, prompt)
    seen = oracle.capture(model.module, family, list(prompt.ids), rec.prompt.position)
    table = rs.sources(rec, rs.Neuron(layer, k), grain="subvalue", top=10**6)
    keys = {name: i for i, name in enumerate(rec.layers[layer].groups[0].key_names)}
    written = table[~table["kind"].isin(["constant", "remainder", "bias"])]
    for _, row in written.sample(min(6, len(written)), random_state=0).iterrows():
        u = vector_of(rec, rs.parse_site(row["writer"])).tolist()
        assert row["share"] == pytest.approx(oracle.share(seen, layer, keys[row["key"]], k, u), abs=1e-6)


@given(families, prompts(), st.integers(0, 2), st.integers(0, 39), st.sampled_from(["frozen", "live"]))
def test_the_coefficient_without_a_writer_is_the_modules_own_recomputation(family, prompt, layer, k, norm):
    """Run the MLP's own modules on the stream without the writer."""
    model = shared(family)
    rec = rs.record(model, prompt)
    where = oracle.WHERE[family]
    block = model.module.get_submodule(f"{where.blocks}.{layer}")
    table = rs.sources(rec, rs.Neuron(layer, k), norm=norm, top=3)
    state = rec.resid_mid(layer)
    module = block.get_submodule(where.mlp_norm)
    for _, row in table[~table["kind"].isin(["constant", "remainder"])].iterrows():
        rest = state - vector_of(rec, rs.parse_site(row["writer"]))
        with torch.no_grad():
            if norm == "live":
                read = module(rest)
            else:  # undo the own scale, apply the frozen one
                form = model.norm(layer, "mlp_norm")
                read = (module(rest) - form.bias) * form.scale(rest) / form.scale(state) + form.bias
            pre = [block.get_submodule(path)(read[None])[0, k] for path in where.keys]
            act = model.activation(layer)(pre[0])
        expected = float(act * pre[1] if len(pre) == 2 else act)
        scale_tolerance = 1e-4 if norm == "live" else 1e-5  # a nearly empty stream is ill-conditioned
        assert row["coefficient_without"] == pytest.approx(expected, abs=scale_tolerance, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_parallel_block_has_no_attention_of_its_own_layer_as_a_source(family):
    rec = rs.record(shared(family), rs.Prompt(ids=[5, 4, 3], target=1))
    writers = set(rs.sources(rec, "L1.N0", top=100)["writer"])
    assert ("L1.attn" in writers) is (not rec.model.anatomy.parallel)
    assert {"embed", "L0.attn", "L0.mlp"} <= writers
    assert "L1.mlp" not in writers


def test_zeroing_a_source_moves_the_coefficient_as_the_live_norm_says():
    """Measured: zero the last writer before the reader, so that nothing in between recomputes."""
    rec = rs.record(shared("llama"), rs.Prompt(ids=[5, 4, 3, 2], target=1))
    table = rs.sources(rec, "L2.N4", norm="live", top=100).set_index(["key", "writer"])
    effect = rs.intervene(rec, rs.Zero("L2.attn"))
    predicted = table.loc[("gate", "L2.attn"), "coefficient_without"]
    rows = rec.model.rows(2, "mlp_out")
    read = rec.model.norm(2, "mlp_norm")(rec.resid_mid(2) - rec.layers[2].attn_out)
    pre = tuple(read @ rec.model.rows(2, f"key{i}").rows + rec.model.rows(2, f"key{i}").bias for i in (0, 1))
    coefficients = coefficient_from(rec.model, 2, rec.layers[2].groups[0], pre)
    assert torch.allclose(coefficients @ rows.rows + rows.bias, effect.after.mlp[2], atol=1e-6)
    assert predicted == pytest.approx(float(coefficients[4]), abs=1e-6)
