"""Exposure against what the edit really does: the sublayer's output in the edited model minus that in the base."""

import itertools
import json

import pandas as pd
import pytest
import tiny
import torch

import resid_surgery as rs
from resid_surgery.editing.changes import Dense, LowRank, Rows
from resid_surgery.editing.edits import Edit, new_edit
from resid_surgery.editing.exposing import Exposer
from resid_surgery.editing.exposure import exposure, exposure_probes
from resid_surgery.editing.probes import Probe
from resid_surgery.errors import ArgumentError, LoadError, PromptError, StaleRecordingError
from resid_surgery.models import zoo
from resid_surgery.models.replacing import tensors_of
from resid_surgery.models.taps import Tap
from resid_surgery.models.tracing import forward

IDS = torch.tensor([[3, 17, 5, 60, 2, 9, 44, 31], [8, 8, 90, 1, 33, 70, 12, 5]])
MODELS = ("llama", "gpt2", "gemma2", "gpt_neox", "mixtral", "gpt_oss", "qwen2_moe")
held = {}


def opened(kind):
    if kind in tiny.SPECS:
        return tiny.shared(kind)
    if kind not in held:
        held[kind] = rs.load(zoo.tiny(kind, dtype=torch.float64))
    return held[kind]


def path_of(model, layer, part):
    return f"{model.path(layer, part)}.weight"


def shape_of(model, path):
    return tuple(tensors_of(model.module)[path].shape)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.3


def rows_on(model, path, axis, index, seed=0):
    shape = shape_of(model, path)
    delta = noise(len(index), shape[1 - axis], seed=seed)
    return Rows(path, (), shape, (axis,), torch.tensor([[i] for i in index]), delta)


def change_of(model, form, path, axis):
    """A change of a projection in one form."""
    shape = shape_of(model, path)
    if form == "rows":
        return rows_on(model, path, axis, [1, 7])
    if form == "other axis":
        return rows_on(model, path, 1 - axis, [0, 5, 6])
    if form == "rank-one":
        return LowRank(path, (), shape, (), noise(shape[0], 1), noise(1, shape[1], seed=1))
    return Dense(path, (), shape, noise(*shape))


def measured(model, edit, tap, state):
    """|edited - base| / |state| at a tap, from one forward of each."""
    with edit.applied(model) as edited:
        after = forward(edited, IDS, [tap])[tap]
    before = forward(model, IDS, [tap, *state])
    return (after - before[tap]).norm(dim=-1) / state_of(model, before, tap.layer, tap.name).norm(dim=-1)


def state_of(model, reads, layer, name):
    if name == "attn_raw" and Tap("attn_add", layer) in reads:
        row = model.block(layer)
        return row.attn_carry * reads[Tap("block_in", layer)] + row.attn_scale * reads[Tap("attn_add", layer)]
    return reads[Tap("block_out", layer)]


def taps_of_state(model, layer, part):
    if part == "attn" and not model.block(layer).parallel:
        return [Tap("block_in", layer), Tap("attn_add", layer)]
    return [Tap("block_out", layer)]


@pytest.mark.parametrize("form", ["rows", "other axis", "rank-one", "dense"])
@pytest.mark.parametrize("part", ["attn", "mlp"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_it_is_the_measured_difference_of_the_sublayers_output(kind, part, form):
    model, layer = opened(kind), 1
    axis = 0 if kind == "gpt2" else 1
    path = path_of(model, layer, f"{part}_out")
    edit = new_edit(model, [change_of(model, form, path, axis)], method="test")
    expected = measured(model, edit, Tap(f"{part}_raw", layer), taps_of_state(model, layer, part))
    exposer = Exposer(model, edit)
    assert exposer.columns == (f"L{layer}.{part} / stream",)
    assert float(expected.min()) > 1e-4
    assert torch.allclose(exposer(IDS), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_weight_and_bias_of_one_projection_are_summed_before_the_norm(kind):
    model = opened(kind)
    path = path_of(model, 1, "mlp_out")
    bias = path.replace("weight", "bias")
    shape = shape_of(model, bias)
    axis = 0 if kind == "gpt2" else 1
    edit = new_edit(model, [rows_on(model, path, axis, [3]), Dense(bias, (), shape, noise(*shape))], method="test")
    expected = measured(model, edit, Tap("mlp_raw", 1), [Tap("block_out", 1)])
    assert torch.allclose(Exposer(model, edit)(IDS), expected, rtol=1e-9)


def experts_change(model, form, leaf, layer=0):
    path = f"{model.path(layer, 'experts')}.{leaf}"
    shape = shape_of(model, path)
    if form == "rows":
        axis = 1 if model.experts(layer).transposed else 2
        left = [n for a, n in enumerate(shape) if a not in (0, axis)]
        index = torch.tensor([[1, 4], [1, 5], [2, 0]])
        return Rows(path, (), shape, (0, axis), index, noise(3, *left))
    if form == "rank-one":
        return LowRank(path, (), shape, (2,), noise(shape[1], 1), noise(1, shape[2], seed=1))
    if form == "one expert":
        return Rows(path, (), shape, (0,), torch.tensor([[3]]), noise(1, *shape[1:]))
    return Dense(path, (), shape, noise(*shape))


@pytest.mark.parametrize("form", ["rows", "rank-one", "one expert", "dense"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "qwen2_moe"])
def test_only_tokens_routed_to_a_changed_expert_are_exposed(kind, form):
    model = opened(kind)
    layer = next(i for i in range(model.anatomy.n_layers) if model.block(i).mlp_kind == "experts")
    edit = new_edit(model, [experts_change(model, form, "down_proj", layer)], method="test")
    expected = measured(model, edit, Tap("mlp_raw", layer), [Tap("block_out", layer)])
    found = Exposer(model, edit)(IDS)
    assert torch.allclose(found, expected, rtol=1e-7, atol=1e-9)
    call = forward(model, IDS, [Tap("experts_call", layer)])[Tap("experts_call", layer)]
    changed = {"rows": [1, 2], "rank-one": [2], "one expert": [3]}.get(form, range(model.experts(layer).count))
    routed = torch.isin(call.index, torch.tensor(list(changed))).any(-1)
    assert torch.equal(found > 0, routed)
    assert kind != "mixtral" or form == "dense" or not bool(routed.all())


def test_a_shared_expert_is_exposed_through_its_own_factor():
    model = opened("qwen2_moe")
    layer = next(i for i in range(model.anatomy.n_layers) if model.has(i, "shared_out"))
    edit = new_edit(model, [rows_on(model, path_of(model, layer, "shared_out"), 1, [0, 2])], method="test")
    expected = measured(model, edit, Tap("mlp_raw", layer), [Tap("block_out", layer)])
    assert torch.allclose(Exposer(model, edit)(IDS), expected, rtol=1e-7)


@pytest.mark.parametrize(("kind", "inside", "tap"), [
    ("llama", "mlp.gate_proj.weight", "mlp_read"), ("llama", "self_attn.q_proj.weight", "attn_read"),
    ("llama", "self_attn.k_proj.bias", "attn_read"), ("gpt2", "attn.c_attn.weight", "attn_read"),
    ("gpt2", "mlp.c_fc.weight", "mlp_read"), ("gemma2", "self_attn.v_proj.weight", "attn_read"),
])  # fmt: skip
def test_what_reads_is_exposed_relative_to_its_own_pre_activation(kind, inside, tap):
    model = opened(kind)
    path = f"{model.path(1, 'block')}.{inside}"
    shape = shape_of(model, path)
    edit = new_edit(model, [Dense(path, (), shape, noise(*shape))], method="test")
    module = model.module.get_submodule(path.rpartition(".")[0])
    x = forward(model, IDS, [Tap(tap, 1)])[Tap(tap, 1)]
    with edit.applied(model) as edited, torch.no_grad():
        before, after = module(x), edited.module.get_submodule(path.rpartition(".")[0])(x)
    expected = (after - before).norm(dim=-1) / before.norm(dim=-1)
    exposer = Exposer(model, edit)
    assert exposer.columns[0].endswith(f"{path.rpartition('.')[0]} / pre-activation")
    assert torch.allclose(exposer(IDS), expected, rtol=1e-9)


def test_keys_of_experts_are_exposed_where_they_are_routed_to():
    model = opened("mixtral")
    edit = new_edit(model, [experts_change(model, "rank-one", "gate_up_proj")], method="test")
    call = forward(model, IDS, [Tap("experts_call", 0)])[Tap("experts_call", 0)]
    gate_up = tensors_of(model.module)[f"{model.path(0, 'experts')}.gate_up_proj"].detach()
    change = edit.changes[0].dense()
    expected = torch.zeros(IDS.shape, dtype=torch.float64)
    for row, at in itertools.product(range(2), range(8)):
        x, experts = call.states[row, at], call.index[row, at].tolist()
        moved = sum(float((change[e] @ x).square().sum()) for e in experts)
        made = sum(float((gate_up[e] @ x).square().sum()) for e in experts)
        expected[row, at] = (moved / made) ** 0.5
    assert torch.allclose(Exposer(model, edit)(IDS), expected, rtol=1e-9)
    assert 0 < int((expected == 0).sum()) < expected.numel()


def test_embedding_rows_are_exposed_at_their_tokens_and_unembedding_rows_before_them():
    model = opened("gpt_neox")
    path = "gpt_neox.embed_in.weight"
    one = new_edit(model, [rows_on(model, path, 0, [8, 31])], method="test")
    assert torch.equal(Exposer(model, one)(IDS) > 0, torch.isin(IDS, torch.tensor([8, 31])))
    out = f"{model.path(None, 'unembed')}.weight"
    two = new_edit(model, [rows_on(model, out, 0, [8, 31])], method="test")
    shown = Exposer(model, two)
    assert shown.columns == ("unembed / token",)
    assert shown(IDS).tolist() == [[0, 0, 0, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0, 0, 0]]


def test_several_places_stand_beside_the_root_of_their_squares():
    model = opened("llama")
    changes = [rows_on(model, path_of(model, i, "mlp_out"), 1, [i], seed=i) for i in range(3)]
    edit = new_edit(model, changes, method="test")
    exposer = Exposer(model, edit)
    parts = torch.stack([Exposer(model, new_edit(model, [c], method="one"))(IDS) for c in changes])
    assert torch.allclose(exposer.by_place(IDS), parts, rtol=1e-12)
    assert torch.allclose(exposer(IDS), parts.square().sum(0).sqrt(), rtol=1e-12)
    table = exposure(model, edit, IDS)
    assert list(table.columns[6:9]) == ["L0.mlp / stream", "L1.mlp / stream", "L2.mlp / stream"]
    assert table["exposure"].to_list() == pytest.approx(parts.square().sum(0).sqrt().flatten().tolist())


def test_reads_of_another_forward_can_be_shared():
    model = opened("llama")
    exposer = Exposer(model, new_edit(model, [rows_on(model, path_of(model, 1, "mlp_out"), 1, [4])], method="test"))
    reads = forward(model, IDS, [*exposer.taps, Tap("logits")])
    assert torch.equal(exposer.of(reads, IDS)[0], exposer(IDS))


@pytest.mark.parametrize("site", ["L1.N4", "L1.H2", "L1.H2.D3"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_scaling_in_the_forward_is_as_exposed_as_it_acts(kind, site):
    model = opened(kind)
    one = rs.Scale(site, 0.25, positions="all")
    part = "mlp" if ".N" in site else "attn"
    tap, state = Tap(f"{part}_raw", 1), taps_of_state(model, 1, part)
    before = forward(model, IDS, [tap, *state])
    z = Tap("coef" if part == "mlp" else "attn_z", 1)
    d = model.anatomy.sizes[1].d_head
    chosen = {"L1.N4": slice(4, 5), "L1.H2": slice(2 * d, 3 * d), "L1.H2.D3": slice(2 * d + 3, 2 * d + 4)}[site]

    def scaled(value, _):
        value = value.clone()
        value[..., chosen] *= 0.25
        return value

    after = forward(model, IDS, [tap], {z: scaled})[tap]
    expected = (after - before[tap]).norm(dim=-1) / state_of(model, before, 1, tap.name).norm(dim=-1)
    assert torch.allclose(Exposer(model, Edit((), (one,)))(IDS), expected, rtol=1e-9, atol=1e-14)


def test_what_cannot_be_exposed_is_named():
    model = opened("llama")
    norm = "model.layers.1.input_layernorm.weight"
    gain = Dense(norm, (), shape_of(model, norm), noise(24))
    with pytest.raises(ArgumentError, match=r"input can be tapped in .*input_layernorm\.weight"):
        Exposer(model, new_edit(model, [gain], method="test"))
    both = new_edit(model, [gain, rows_on(model, path_of(model, 1, "mlp_out"), 1, [4])], method="test")
    assert Exposer(model, both).unexposable == (norm,)
    assert set(exposure(model, both, IDS)["unexposable"]) == {norm}
    with pytest.raises(ArgumentError, match="Steer"):
        Exposer(model, Edit((), (rs.Steer("L1.resid_post", torch.ones(24), positions="all"),)))
    with pytest.raises(StaleRecordingError, match="made for other weights"):
        Exposer(rs.load(tiny.build("llama", seed=5)), both)


def words(model):
    """The real model's corpus of a few lines."""
    return ["The capital of France is Paris.", "Water boils at a hundred degrees.", "Two and two make four."]


def test_windows_batches_and_the_heap_change_nothing():
    model = opened("llama")
    edit = new_edit(model, [rows_on(model, path_of(model, 0, "mlp_out"), 1, [4, 9])], method="test")
    generator = torch.Generator().manual_seed(1)
    texts = [
        torch.randint(0, 97, (int(n),), generator=generator).tolist()
        for n in torch.randint(1, 40, (90,), generator=generator)
    ]
    whole = exposure(model, edit, iter(texts), window=16)
    assert [tuple(r) for r in whole[["text", "position"]].to_numpy()] == [
        (i, p) for i, one in enumerate(texts) for p in range(len(one))
    ]
    assert whole["token_id"].tolist() == [i for one in texts for i in one]
    for i in (0, 41, 89):
        alone = torch.cat([Exposer(model, edit)(torch.tensor([texts[i][low : low + 16]]))[0]
                           for low in range(0, len(texts[i]), 16)])  # fmt: skip
        assert whole[whole["text"] == i]["exposure"].to_list() == pytest.approx(alone.tolist(), rel=1e-9)
    best = exposure(model, edit, texts, window=16, top=25)
    expected = whole.sort_values("exposure", ascending=False, kind="stable").head(25)
    assert best["exposure"].to_list() == pytest.approx(expected["exposure"].to_list(), rel=1e-12)
    assert best[["text", "position"]].to_numpy().tolist() == expected[["text", "position"]].to_numpy().tolist()
    capped = exposure(model, edit, itertools.cycle(texts), window=16, tokens=100)
    assert len(capped) == 100
    assert capped["exposure"].to_list() == pytest.approx(whole["exposure"].head(100).to_list(), rel=1e-5)


def test_files_and_probes_are_read_as_texts(smollm2, tmp_path):
    edit = zeroed(smollm2)
    texts = words(smollm2)
    table = exposure(smollm2, edit, texts)
    (tmp_path / "a.txt").write_text("\n\n".join(texts) + "\n")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": one}) for one in texts))
    for given in (tmp_path / "a.txt", str(tmp_path / "a.jsonl"), [Probe("text", one) for one in texts]):
        pd.testing.assert_frame_equal(exposure(smollm2, edit, given), table)
    last = table[table["text"] == 0].iloc[-2]
    assert (last["token"], last["context"]) == (" Paris", "The capital of France is Paris")
    assert exposure(smollm2, edit, texts[:1], context=2)["context"].iloc[-2] == " is Paris"
    (tmp_path / "b.jsonl").write_text('{"words": 1}')
    with pytest.raises(LoadError, match=r'line 1 .* "text"'):
        exposure(smollm2, edit, tmp_path / "b.jsonl")
    with pytest.raises(LoadError, match="readable file"):
        exposure(smollm2, edit, tmp_path / "none.txt")
    with pytest.raises(ArgumentError, match="`texts`"):
        exposure(smollm2, edit, 3)
    with pytest.raises(ArgumentError, match="`top`"):
        exposure(smollm2, edit, texts, top=0)


def test_probes_come_from_the_top_the_middle_and_the_bottom():
    n = 60
    table = pd.DataFrame({"text": [i // 3 for i in range(n)], "position": range(n),
                          "token": [f"w{i}" for i in range(n)], "token_id": range(n),
                          "context": [f"words {i}" for i in range(n)],
                          "exposure": [float(i) for i in range(n)]})  # fmt: skip
    found = exposure_probes(table, high=3, middle=2, zero=2)
    assert [p.text for p in found] == ["words 59", "words 56", "words 53", "words 29", "words 30", "words 0", "words 3"]
    assert [p.stratum for p in found] == ["high exposure"] * 3 + [""] * 4
    assert [p.criterion for p in found][3:] == ["middle exposure"] * 2 + ["zero exposure"] * 2
    assert {p.axis for p in found} == {"locality"}
    assert len(exposure_probes(table, high=20, middle=20, zero=20)) == 60
    with pytest.raises(ArgumentError, match="at least 61"):
        exposure_probes(table, high=21, middle=20, zero=20)
    with pytest.raises(ArgumentError, match="`table`"):
        exposure_probes(table.drop(columns="context"))
    with pytest.raises(PromptError, match="without a tokenizer"):
        exposure_probes(table.assign(token=[f"#{i}" for i in range(n)]))


def zeroed(model, layer=27, index=846):
    path = path_of(model, layer, "mlp_out")
    w = tensors_of(model.module)[path].detach()
    return new_edit(model, [Rows(path, (), tuple(w.shape), (1,), torch.tensor([[index]]), -w[:, index].double()[None])],
                    method="zero")  # fmt: skip


def test_exposure_finds_where_the_real_model_says_something_else(smollm2):
    texts = [
        "The capital of France is Paris, and that of Italy is Rome. The Eiffel Tower is located in the city of Paris.",
        "Water boils at a hundred degrees and freezes at zero. The moon goes around the earth once a month.",
    ]
    edit = zeroed(smollm2)
    ids = [smollm2.tokenizer.encode(one) for one in texts]
    table = exposure(smollm2, edit, ids)
    kl: list[float] = []
    with edit.applied(smollm2) as edited:
        for one in ids:
            p, q = (torch.log_softmax(forward(m, torch.tensor([one]), [Tap("logits")])[Tap("logits")][0].double(), -1)
                    for m in (smollm2, edited))  # fmt: skip
            kl += (p.exp() * (p - q)).sum(-1).tolist()
    assert table["exposure"].rank().corr(pd.Series(kl).rank()) > 0.5
