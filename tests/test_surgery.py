"""Interventions and effects: no-ops, equalities, prediction = measurement, restored state."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import dtypes, families, prompts, sites
from tiny import FAMILIES, build, shared

import resid_surgery as rs
from resid_surgery.stream.subvalues import vector_of
from resid_surgery.surgery import engine, reading, writing
from resid_surgery.surgery.effects import PARTS

positions = st.sampled_from(["target", "all", "list"])


def columns(effect: rs.Effect) -> torch.Tensor:
    return torch.tensor(effect.table[["bs_change", *PARTS]].to_numpy())


def where(rec: rs.Recording, kind: str) -> object:
    return [0, rec.prompt.position] if kind == "list" else kind


def close(dtype: torch.dtype) -> float:
    return 1e-6 if dtype == torch.float64 else 1e-5


@given(families, dtypes, prompts(), positions, st.data())
def test_scale_by_one_and_patch_from_itself_change_no_column(family, dtype, prompt, at, data):
    rec = rs.record(shared(family, dtype), prompt, positions="all")
    site = data.draw(sites(rec, last=0))
    noops = [rs.Scale(site, 1.0, positions=where(rec, at)), rs.Patch(site, rec)]
    if isinstance(site, (rs.Sublayer, rs.Resid)):
        noops.append(rs.Patch(site, rec, positions=where(rec, at)))
    for effect in rs.intervene_each(rec, noops):
        assert columns(effect).abs().max() <= close(dtype)
        assert effect.table["log_prob_change"].abs().max() <= close(dtype)


@given(families, prompts(), positions, st.data())
def test_zero_is_scale_by_zero(family, prompt, at, data):
    rec = rs.record(shared(family), prompt)
    site = data.draw(sites(rec, last=0))
    zero, scaled = rs.intervene_each(rec, [cls_(rec, site, at) for cls_ in (zeroed, scaled_by_zero)])
    assert torch.allclose(columns(zero), columns(scaled), atol=1e-12)


def zeroed(rec: rs.Recording, site: rs.Site, at: str) -> rs.Zero:
    return rs.Zero(site, positions=where(rec, at))


def scaled_by_zero(rec: rs.Recording, site: rs.Site, at: str) -> rs.Scale:
    return rs.Scale(site, 0.0, positions=where(rec, at))


@st.composite
def operations(draw, rec, donor):
    """Up to four operations that do not contradict each other."""
    out = []
    for site in draw(st.lists(sites(rec, last=0), min_size=1, max_size=4, unique=True)):
        kind = draw(st.sampled_from(["zero", "scale", "patch", "steer"]))
        at = where(rec, draw(positions))
        d = rec.model.anatomy.d_model
        if kind == "zero":
            out.append(rs.Zero(site, positions=at))
        elif kind == "scale":
            out.append(rs.Scale(site, draw(st.floats(-2, 2)), positions=at))
        elif kind == "patch":
            out.append(rs.Patch(site, donor))
        else:
            seed = draw(st.integers(0, 99))
            vector = torch.randn(d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            out.append(rs.Steer(site, vector, positions=at))
    return out


@given(families, dtypes, prompts(length=5), prompts(length=5), st.data())
def test_the_four_parts_and_the_ledger_sum_to_the_measured_change(family, dtype, prompt, other, data):
    model = shared(family, dtype)
    rec = rs.record(model, prompt)
    donor = rs.record(model, rs.Prompt(ids=other.ids, target=other.target, position=prompt.position))
    ops = data.draw(operations(rec, donor))
    try:
        effect = rs.intervene(rec, ops)
    except rs.InterventionError:  # contradictions are refused; a test of its own reads the message
        assume(False)
    size = 1 + float(rec.bs_values.abs().max()) + effect.table[list(PARTS)].abs().max().max()
    assert effect.table["closure"].max() <= close(dtype) * size
    assert effect.ledger()["closure"].iloc[0] <= close(dtype) * size
    if not model.anatomy.post_norm:
        assert (effect.table["post_norm"] == 0).all()


@given(families, prompts(length=5), prompts(length=5), st.data())
def test_the_order_of_a_list_does_not_matter(family, prompt, other, data):
    model = shared(family)
    rec = rs.record(model, prompt)
    donor = rs.record(model, rs.Prompt(ids=other.ids, target=other.target, position=prompt.position))
    ops = data.draw(operations(rec, donor))
    shuffled = data.draw(st.permutations(ops))
    try:
        one, two = rs.intervene_each(rec, [ops, shuffled])
    except rs.InterventionError:
        assume(False)
    assert torch.allclose(one.after.bs, two.after.bs, atol=1e-9)
    assert torch.allclose(columns(one), columns(two), atol=1e-9)


@given(families, prompts(), st.data())
def test_removing_an_addend_changes_the_stream_by_minus_it(family, prompt, data):
    """Predicted = measured: through the live post-norm where there is one."""
    rec = rs.record(shared(family), prompt)
    site = data.draw(sites(rec).filter(lambda s: not isinstance(s, (rs.Resid, rs.Constant))))
    effect = rs.intervene(rec, rs.Zero(site))
    part = "mlp" if isinstance(site, rs.Neuron) else getattr(site, "part", "attn")
    before, after = (getattr(run, part)[site.layer] for run in (effect.before, effect.after))
    model, layer = rec.model, rec.layers[site.layer]
    if isinstance(site, rs.Sublayer) or not model.has(site.layer, f"{part}_post_norm"):
        assert torch.allclose(after - before, -vector_of(rec, site), atol=1e-6)
    else:
        raw = layer.attn_raw if part == "attn" else layer.mlp_raw
        norm = model.norm(site.layer, f"{part}_post_norm")
        # vector_of is the frozen image of the raw vector; solve back for the raw one by linearity
        frozen = norm.gain / norm.scale(raw)
        assert torch.allclose(after, norm(raw - vector_of(rec, site) / frozen), atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_direct_effect_of_the_last_layer_is_the_whole_of_it(family):
    """Nothing comes after the last MLP: no indirect part there."""
    rec = rs.record(shared(family), rs.Prompt(ids=[5, 4, 3, 2], target=1, versus=[7]))
    site = rs.Neuron(-1, int(rec.layers[-1].groups[0].coefficient.abs().argmax()))
    table = rs.intervene(rec, rs.Zero(site)).table
    assert table["indirect"].abs().max() <= 1e-6
    frozen = -rs.locate(rec, k=120).table.set_index("site").loc[f"L2.N{site.index}", "bs_target"]
    assert table["direct"][0] == pytest.approx(frozen, abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_operation_at_an_earlier_position_has_no_direct_part(family):
    rec = rs.record(shared(family), rs.Prompt(ids=[5, 4, 3, 2], target=1))
    table = rs.intervene(rec, rs.Zero("L0.mlp", positions=[1])).table
    assert (table["direct"] == 0).all()
    assert table["bs_change"].abs().max() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_an_operation_on_a_state_is_a_ledger_row_of_its_own(family):
    rec = rs.record(shared(family), rs.Prompt(ids=[5, 4, 3, 2], target=1))
    ledger = rs.intervene(rec, rs.Steer("L1.resid_pre", torch.ones(24, dtype=torch.float64))).ledger()
    row = ledger[ledger["site"] == "L1.resid_pre"].iloc[0]
    assert row["operated"]
    assert row["bs_change"] == pytest.approx(row["direct"])
    assert ledger["bs_change"].sum() == pytest.approx(
        rs.intervene(rec, rs.Steer("L1.resid_pre", torch.ones(24, dtype=torch.float64))).table["bs_change"][0], abs=1e-6
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", ["L1.N7", "L1.H1", "L1.H1<2", "L1.attn", "L1.mlp", "L1.resid_pre"])
def test_the_measured_change_equals_a_plain_hooks(family, site):
    """The engine against PyTorch hooks written here, without the library."""
    model = shared(family)
    prompt = rs.Prompt(ids=[5, 4, 3, 2], target=1)
    rec = rs.record(model, prompt)
    effect = rs.intervene(rec, rs.Zero(site))
    assert effect.after.bs.tolist() == pytest.approx(hooked(model.module, family, site, rec), abs=1e-6)


def hooked(module, family, site, rec):
    import oracle

    where, t = oracle.WHERE[family], rec.prompt.position
    block = module.get_submodule(f"{where.blocks}.1")
    down, w_o = block.get_submodule(where.down), block.get_submodule(where.w_o)
    d_head = rec.model.anatomy.d_head
    sources = rec.layers[1].attention.alpha[1, 2] * torch.tensor(
        oracle.capture(module, family, list(rec.prompt.ids), t).values[1][
            1 // (4 // 2) if family in ("llama", "gemma2") else 1
        ][2]
    )

    def before(index, share=None):
        def hook(_, args):
            x = args[0].clone()
            flat = x.view(-1, x.shape[-1])
            flat[t, index] = 0 if share is None else flat[t, index] - share
            return (x, *args[1:])

        return hook

    def after(_, args, output):
        out = output.clone()
        out.view(-1, out.shape[-1])[t] = 0
        return out

    heads = slice(d_head, 2 * d_head)
    post = {"attn": where.attn_post or where.w_o, "mlp": where.mlp_post or where.down}
    handle = {
        "L1.N7": lambda: down.register_forward_pre_hook(before(7)),
        "L1.H1": lambda: w_o.register_forward_pre_hook(before(heads)),
        "L1.H1<2": lambda: w_o.register_forward_pre_hook(before(heads, sources)),
        "L1.attn": lambda: block.get_submodule(post["attn"]).register_forward_hook(after),
        "L1.mlp": lambda: block.get_submodule(post["mlp"]).register_forward_hook(after),
        "L1.resid_pre": lambda: block.register_forward_pre_hook(before(slice(None))),
    }[site]()
    kept = module.lm_head.register_forward_hook(lambda m, a, out: seen.append(out[0, t].tolist()))
    seen = []
    try:
        with torch.no_grad():
            module(torch.tensor([rec.prompt.ids]), use_cache=False)
    finally:
        handle.remove()
        kept.remove()
    return seen[0]


def test_rows_of_a_batch_do_not_leak_into_each_other():
    rec = rs.record(shared("gpt2"), rs.Prompt(ids=[5, 4, 3, 2], target=1))
    rows = [rs.Zero("L0.N3"), rs.Scale("L1.H1", -2.0), rs.Zero("L0.attn", positions="all"), rs.Scale("L0.N3", 1.0)]
    together = rs.intervene_each(rec, rows)
    for row, effect in zip(rows, together, strict=True):
        assert torch.allclose(effect.after.bs, rs.intervene(rec, row).after.bs, atol=1e-10)


def test_many_rows_are_run_in_bounded_chunks(monkeypatch):
    rec = rs.record(shared("llama"), rs.Prompt(ids=[5, 4, 3, 2], target=1))
    sizes = []
    plain = engine.forward
    monkeypatch.setattr(engine, "forward", lambda m, ids, *a, **k: sizes.append(len(ids)) or plain(m, ids, *a, **k))
    effects = rs.intervene_each(rec, [rs.Zero(f"L{i % 3}.N{i % 40}") for i in range(300)])
    assert len(effects) == 300
    assert max(sizes) * 4 <= engine.TOKENS_A_CHUNK
    assert len(sizes) == 3


def test_contradictions_and_nested_writes_name_both():
    rec = rs.record(shared("llama"), rs.Prompt(ids=[5, 4, 3, 2], target=1))
    pairs = [("L0.mlp", "L0.N3"), ("L1.attn", "L1.H0"), ("L1.H0", "L1.H0<1"), ("L1.H0", "L1.H0.D2"),
             ("L1.H0.D2", "L1.H0<1"), ("L2.N1", "L2.N1"), ("L0.resid_post", "L1.resid_pre")]  # fmt: skip
    for a, b in pairs:
        with pytest.raises(rs.InterventionError) as caught:
            rs.intervene(rec, [rs.Zero(a), rs.Scale(b, 0.5)])
        assert "Zero" in str(caught.value)
        assert "Scale" in str(caught.value)
        both = rs.intervene(rec, [rs.Scale(a, 0.5), rs.Steer(b, torch.ones(24, dtype=torch.float64))])
        assert both.table["closure"].max() <= 1e-6
    for a, b in itertools.combinations(["L1.H0", "L1.H1", "L1.N0", "L0.attn", "L1.H0.D2"], 2):
        if {a, b} != {"L1.H0", "L1.H0.D2"}:
            assert rs.intervene(rec, [rs.Zero(a), rs.Zero(b)]).table["closure"].max() <= 1e-6


def test_an_error_mid_forward_reaches_the_caller_and_the_next_call_works(monkeypatch):
    model = rs.load(build("llama"))
    rec = rs.record(model, rs.Prompt(ids=[5, 4, 3, 2], target=1))
    fingerprint = model.fingerprint()
    clean = rs.intervene(rec, rs.Zero("L1.N3")).after.bs

    def explode(*_):
        raise MemoryError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(writing.Writing, "_apply", explode)
        with pytest.raises(MemoryError, match="injected"):
            rs.intervene(rec, rs.Zero("L1.N3"))
    assert model.fingerprint() == fingerprint
    assert not any("forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
    assert torch.equal(rs.intervene(rec, rs.Zero("L1.N3")).after.bs, clean)


def test_a_control_row_that_differs_from_the_recording_is_refused(monkeypatch):
    rec = rs.record(shared("llama"), rs.Prompt(ids=[5, 4, 3, 2], target=1))
    monkeypatch.setattr(rec.model, "fingerprint", lambda: rec.fingerprint)
    rec.bs_values.add_(torch.randn(97, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    with pytest.raises(rs.InterventionError, match="control row"):
        rs.intervene(rec, rs.Zero("L1.N3"))


def test_a_planted_wrong_alpha_is_seen(monkeypatch):
    """Forgetting the attention soft-cap gives weights that do not give what attention mixed: refused in the run."""
    rec = rs.record(shared("gemma2"), rs.Prompt(ids=[5, 4, 3, 2], target=1))
    plain = reading.attention_rows

    def forgetful(call, row, at):
        return plain(replace(call, softcap=None), row, at)

    monkeypatch.setattr(reading, "attention_rows", forgetful)
    for op in (rs.Zero("L1.H1<2"), rs.Attend("L1.H1<2", 0.5)):
        with pytest.raises(rs.ClosureError, match=r"attention weights of layer 1 .* do not give what it mixed"):
            rs.intervene(rec, op)


def test_interventions_are_values():
    assert rs.Zero(["L1.N3"]) == rs.Zero("L1.N3")
    assert hash(rs.Scale("L1.N3", 2)) == hash(rs.Scale(["L1.N3"], 2.0))
    assert rs.Scale("L1.N3", 2) != rs.Scale("L1.N3", 3)
    assert rs.Steer("L1.attn", torch.ones(3)) == rs.Steer("L1.attn", torch.ones(3))
    from resid_surgery import Scale, Zero

    for one in (Zero(["L1.N3", "L0.H1<2"], positions="all"), Scale("L1.N3", 0.5)):
        assert eval(repr(one), {"Zero": Zero, "Scale": Scale}) == one


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "site", ["embed", "L0.resid_mid", "L1.resid_pre", "L1.resid_mid", "L1.resid_post", "L2.resid_post"]
)
def test_operations_on_every_state_close_in_table_and_ledger(family, site):
    rec = rs.record(shared(family), rs.Prompt(ids=[5, 4, 3, 2], target=1, versus=[7]))
    steer = rs.Steer(site, torch.ones(24, dtype=torch.float64))
    if rec.model.anatomy.parallel and "mid" in site:
        with pytest.raises(rs.SiteError, match="parallel"):
            rs.intervene(rec, steer)
        return
    for op in (steer, rs.Scale(site, 0.5), [steer, rs.Scale("L0.H1", 2.0), rs.Zero("L2.N3")]):
        effect = rs.intervene(rec, op)
        ledger = effect.ledger()
        assert effect.table["closure"].max() <= 1e-6
        assert ledger["closure"].iloc[0] <= 1e-6
        assert ledger.set_index("site").loc[site, "operated"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "ops",
    [
        [rs.Scale("L1.H1", 0.3), rs.Scale("L1.H1<2", -1.0)],
        [rs.Scale("L1.H1", 0.3), rs.Scale("L1.H1.D2", 3.0), rs.Scale("L1.H1.D2<0", -2.0)],
        [
            rs.Scale("L1.attn", 2.0),
            rs.Steer("L1.H0", torch.ones(24)),
            rs.Scale("L1.H0<1", 0.0),
            rs.Steer("L1.attn", torch.ones(24)),
        ],
        [rs.Scale("L1.N3", 0.5), rs.Scale("L1.N3", 3.0), rs.Steer("L1.N3", torch.ones(24)), rs.Scale("L1.mlp", -1.0)],
    ],
)
def test_nested_scales_and_steers_combine_in_one_way_whatever_their_order(family, ops):
    rec = rs.record(shared(family), rs.Prompt(ids=[5, 4, 3, 2], target=1))
    effects = rs.intervene_each(rec, [list(order) for order in itertools.permutations(ops)])
    for effect in effects:
        assert torch.allclose(effect.after.bs, effects[0].after.bs, atol=1e-9)
        assert effect.table["closure"].max() <= 1e-6


def test_a_scaled_share_is_taken_before_the_head_is_scaled():
    """Finer first: z' = 0.3 (z - 2 alpha v) for a share times -1 inside a head times 0.3."""
    rec = rs.record(shared("llama"), rs.Prompt(ids=[5, 4, 3, 2], target=1))
    effect = rs.intervene(rec, [rs.Scale("L1.H1", 0.3), rs.Scale("L1.H1<2", -1.0)])
    head, share = vector_of(rec, rs.Head(1, 1)), vector_of(rec, rs.HeadSource(1, 1, 2))
    expected = rec.layers[1].attn_out - head + 0.3 * (head - 2 * share)
    assert torch.allclose(effect.after.attn[1], expected, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_products_of_scales_are_products_at_every_grain(family):
    """Scale 2 then 3 of one site is 6; all coordinates, all heads or all sources by 2 is the whole by 2."""
    rec = rs.record(shared(family), rs.Prompt(ids=[5, 4, 3, 2], target=1))
    d_head, n_heads = rec.model.anatomy.d_head, rec.model.anatomy.n_heads
    for site in ("L1.N3", "L1.H1", "L1.H1<2", "L1.H1.D2", "L1.H1.D2<1", "L1.attn", "L1.resid_pre"):
        twice, once = rs.intervene_each(rec, [[rs.Scale(site, 2.0), rs.Scale(site, 3.0)], rs.Scale(site, 6.0)])
        assert torch.allclose(twice.after.bs, once.after.bs, atol=1e-9)
    share = rs.Scale("L1.H0<1", 3.0)
    whole = rs.intervene(rec, [rs.Scale("L1.H0", 2.0), share]).after.bs
    for parts in ([f"L1.H0.D{i}" for i in range(d_head)], [f"L1.H0<{j}" for j in range(4)]):
        assert torch.allclose(rs.intervene(rec, [rs.Scale(parts, 2.0), share]).after.bs, whole, atol=1e-6)
    heads = rs.intervene(rec, rs.Zero([f"L1.H{h}" for h in range(n_heads)]))
    assert heads.table["closure"].max() <= 1e-6


def test_states_are_operated_on_after_what_is_written_into_them():
    rec = rs.record(shared("llama"), rs.Prompt(ids=[5, 4, 3, 2], target=1))
    v = torch.ones(24, dtype=torch.float64)
    effect = rs.intervene(rec, [rs.Scale("L1.resid_mid", 2.0), rs.Steer("L1.attn", v)])
    mid = rec.layers[1].resid_pre + effect.after.attn[1]
    assert torch.allclose(mid, 2 * (rec.resid_mid(1) + v), atol=1e-9)
    assert effect.table["closure"].max() <= 1e-6


def test_thousands_of_neurons_are_checked_for_overlap_at_once():
    rec = rs.record(shared("llama"), rs.Prompt(ids=[5, 4], target=1))
    everything = [f"L{i}.N{k}" for i in range(3) for k in range(40)]
    effect = rs.intervene(rec, rs.Zero(everything, positions="all"))
    assert torch.allclose(effect.after.mlp[0], rec.model.rows(0, "mlp_out").bias, atol=1e-9)
    with pytest.raises(rs.InterventionError, match=r"L0\.mlp"):
        rs.intervene(rec, [rs.Zero(everything), rs.Zero("L0.mlp")])


def test_a_hook_that_changes_the_model_is_seen_and_a_swapped_one_too():
    module = build("llama")
    model = rs.load(module)
    prompt = rs.Prompt(ids=[5, 4, 3], target=1)
    rs.record(model, prompt)
    for size in (1.5, -3.0):
        handle = module.model.layers[1].register_forward_hook(lambda m, i, o, size=size: o + size)
        with pytest.raises(rs.ClosureError, match="hook"):
            rs.record(model, prompt)
        handle.remove()
    for size in (2.0, 0.5):  # inside a sublayer it is part of the model, and the newest one runs
        handle = module.model.layers[1].mlp.act_fn.register_forward_hook(lambda m, i, o, size=size: o * size)
        rec = rs.record(model, prompt)
        with torch.no_grad():
            plain = module(torch.tensor([prompt.ids])).logits[0, -1]
        assert torch.allclose(rec.logits, plain, atol=1e-9)
        handle.remove()


def test_out_of_memory_is_not_called_an_unknown_architecture():
    module = build("llama")
    model = rs.load(module)

    def starve(*_):
        raise torch.OutOfMemoryError("injected")

    handle = module.model.layers[1].mlp.down_proj.register_forward_pre_hook(starve)
    with pytest.raises(torch.OutOfMemoryError):
        rs.record(model, rs.Prompt(ids=[5, 4, 3], target=1))
    handle.remove()
    assert rs.record(model, rs.Prompt(ids=[5, 4, 3], target=1)).resid_final.isfinite().all()
    for error in (torch.OutOfMemoryError("injected"), MemoryError("injected")):
        handle = module.model.layers[1].mlp.down_proj.register_forward_pre_hook(raising(error))
        with pytest.raises(type(error), match="injected"):
            rs.load(module)  # no less while its layout is read
        handle.remove()


def raising(error):
    def hook(*_):
        raise error

    return hook


def test_layers_of_different_widths_have_sizes_of_their_own():
    module = build("llama")
    mlp = module.model.layers[1].mlp
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name in ("gate_proj", "up_proj"):
            setattr(mlp, name, torch.nn.Linear(24, 32, dtype=torch.float64))
        mlp.down_proj = torch.nn.Linear(32, 24, dtype=torch.float64)
    model = rs.load(module)
    assert [size.d_mlp for size in model.anatomy.sizes] == [40, 32, 40]
    table = rs.check(model)
    assert table["ok"].all(), table[~table["ok"]].to_string()
    rec = rs.record(model, rs.Prompt(ids=[5, 4, 3, 2], target=1))
    assert len(rs.scores(rec, kind="neuron")) == rs.locate(rec, k=112).candidates == 112
    for site in ("L0.N39", "L1.N31"):
        effect = rs.intervene(rec, rs.Zero(site))
        part = effect.after.mlp[rs.parse_site(site).layer] - effect.before.mlp[rs.parse_site(site).layer]
        assert torch.allclose(part, -vector_of(rec, rs.parse_site(site)), atol=1e-6)
    for use in (lambda: rs.intervene(rec, rs.Zero("L1.N32")), lambda: rs.sources(rec, "L1.N32")):
        with pytest.raises(rs.SiteError, match=r"`index` must be in 0\.\.31 .*\(32 neurons in layer 1\); got 32"):
            use()


def test_projections_of_one_mlp_that_differ_in_width_are_refused():
    module = build("llama")
    with torch.random.fork_rng(devices=[]):
        module.model.layers[1].mlp.down_proj = torch.nn.Linear(32, 24, dtype=torch.float64)
    with pytest.raises(
        rs.UnsupportedModelError, match=r"LlamaForCausalLM .*failed \(RuntimeError: mat1 and mat2 shapes"
    ):
        rs.load(module)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_no_op_changes_no_column_in_half_precision_either(family):
    rec = rs.record(shared(family, torch.bfloat16), rs.Prompt(ids=[5, 4, 3, 2], target=1))
    sites = ["L1.N3", "L1.H1", "L1.H1<2", "L1.H1.D2", "L1.attn", "L1.mlp", "L1.resid_pre", "embed"]
    sites += [] if rec.model.anatomy.parallel else ["L1.resid_mid"]
    for effect in rs.intervene_each(rec, [rs.Scale(site, 1.0) for site in sites]):
        assert columns(effect).abs().max() == 0
