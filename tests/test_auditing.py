"""The audit: what changed, in what form, whether the base stays clean, what a cast leaves, which tokens are touched."""

import itertools

import pytest
import tiny
import torch

import resid_surgery as rs
from resid_surgery.editing import auditing
from resid_surgery.editing.acting import acted, as_stored, matrices, pieces, touched
from resid_surgery.editing.auditing import audit, cast_survival, overall_cosine
from resid_surgery.editing.changes import Dense, LowRank, Rows
from resid_surgery.editing.edits import Edit, new_edit, tensor_hash, tied_paths
from resid_surgery.editing.factoring import factored, form_of
from resid_surgery.editing.roles import role_of
from resid_surgery.errors import ArgumentError, StaleRecordingError
from resid_surgery.models import zoo
from resid_surgery.models.replacing import tensors_of

DOWN = "model.layers.1.mlp.down_proj.weight"


def noise(*shape, seed=0, size=0.3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size


def weight(model, path):
    return tensors_of(model.module)[path].detach()


def rows(path, shape, axis, index, seed=0):
    return Rows(
        path, (), shape, (axis,), torch.tensor([[i] for i in index]), noise(len(index), shape[1 - axis], seed=seed)
    )


def edit_of(model, *changes):
    return new_edit(model, changes, method="test")


def llama():
    return tiny.shared("llama")


FORMS = {
    "one row": (lambda: rows(DOWN, (24, 40), 1, [7]), "row", 1, 1),
    "three rows": (lambda: rows(DOWN, (24, 40), 1, [7, 8, 30]), "row", 3, 3),
    "rank-one": (lambda: LowRank(DOWN, (), (24, 40), (), noise(24, 1), noise(1, 40)), "rank-one", 1, 24),
    "rank 4": (lambda: LowRank(DOWN, (), (24, 40), (), noise(24, 4), noise(4, 40)), "low-rank", 4, 24),
    "rank 1 as 2 factors": (
        lambda: LowRank(DOWN, (), (24, 40), (), noise(24, 1).repeat(1, 2), noise(1, 40).repeat(2, 1)),
        "rank-one", 1, 24),
    "rank-one in full": (lambda: Dense(DOWN, (), (24, 40), noise(24, 1) @ noise(1, 40)), "rank-one", 1, 24),
    "row in full": (lambda: Dense(DOWN, (), (24, 40), rows(DOWN, (24, 40), 1, [3]).dense()), "row", 1, 1),
    "dense": (lambda: Dense(DOWN, (), (24, 40), noise(24, 40)), "dense", 24, 24),
    "factor of one row": (lambda: LowRank(DOWN, (), (24, 40), (), noise(24, 1), torch.eye(40).double()[[5]]),
                          "row", 1, 1),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_change_is_named_by_what_it_is_not_by_how_it_is_held(form):
    make, kind, rank, slices = FORMS[form]
    change = make()
    found = audit(llama(), edit_of(llama(), change))
    row = found["tensors"].iloc[0]
    assert (row["kind"], row["rank"], row["slices"], row["form"]) == (kind, rank, slices, change.kind)
    exact = torch.linalg.svdvals(change.dense())
    values = found["singular_values"]
    assert values["value"].tolist() == pytest.approx(exact[: min(rank, 16)].tolist(), rel=1e-9)
    assert values["share"].sum() == pytest.approx(float(exact[:16].square().sum() / exact.square().sum()))
    old = weight(llama(), DOWN)
    assert row["change_norm"] == pytest.approx(float(change.dense().norm()))
    assert row["relative_norm"] == pytest.approx(float(change.dense().norm() / old.norm()))
    assert row["hash_before"] == tensor_hash(old) != row["hash_after"] == tensor_hash(change.added_to(old))
    assert row["role"] == "L1.mlp.out"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_of_a_difference_taken_from_weights_is_not_counted_as_rank(dtype):
    old = noise(96, 64, size=1.0).to(dtype)
    step = noise(96, 1, seed=1) @ noise(1, 64, seed=2) * (1.0 if dtype == torch.bfloat16 else 0.05)
    change = Dense("w", (), (96, 64), (old.double() + step).to(dtype).double() - old.double())
    assert form_of(factored(change, old, 0)) == "rank-one"
    assert int(torch.linalg.matrix_rank(change.dense())) > 30  # what a threshold at machine precision says


def test_vectors_and_experts_are_described_too():
    model = llama()
    bias = "model.layers.0.self_attn.o_proj.bias"
    found = audit(model, edit_of(model, Rows(bias, (), (24,), (0,), torch.tensor([[3]]), noise(1))))
    assert found["tensors"].loc[0, ["kind", "rank", "slices", "role"]].tolist() == ["row", 1, 1, "L0.attn.out bias"]
    assert set(found["tokens"]["slice"]) == {"L0.attn.bias"}
    mixture = rs.load(zoo.tiny("mixtral", dtype=torch.float64))
    path = "model.layers.0.mlp.experts.down_proj"
    change = Rows(path, (), (4, 24, 40), (0, 2), torch.tensor([[1, 4], [3, 5]]), noise(2, 24))
    found = audit(mixture, edit_of(mixture, change))
    assert found["tensors"].loc[0, ["kind", "rank", "slices"]].tolist() == ["row", 2, 2]
    assert set(found["tokens"]["slice"]) == {"L0.E1.N4", "L0.E3.N5"}
    assert set(found["singular_values"]["slice"]) == {"E1", "E3"}
    factors = LowRank(path, (), (4, 24, 40), (2,), noise(24, 1), noise(1, 40))
    found = audit(mixture, edit_of(mixture, factors))
    assert found["tensors"].loc[0, "kind"] == "rank-one"
    assert set(found["tokens"]["slice"]) == {"L0.mlp direction 1 of E2"}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_clean_edit_passes_every_check(family):
    model = tiny.shared(family)
    path = f"{model.path(1, 'mlp_out')}.weight"
    shape = tuple(weight(model, path).shape)
    table = audit(model, edit_of(model, Dense(path, (), shape, noise(*shape))))["hygiene"]
    assert table["ok"].tolist() == [True] * 8, table
    assert table["check"].tolist() == [
        "differs from base", "untouched tensors identical", "refuses other weights", "base unchanged while applied",
        "rolls back bit-exactly", "rolls back after an exception", "same after save and load",
        "same logits after save and load"]  # fmt: skip


def test_tied_tensors_are_named_and_count_once():
    model = llama()
    name = "model.embed_tokens.weight"
    tied = tied_paths(model, name)
    change = Rows(name, tied, (97, 24), (0,), torch.tensor([[5]]), noise(1, 24))
    found = audit(model, edit_of(model, change))
    assert found["tensors"].loc[0, "tied"] == "lm_head.weight"
    assert found["hygiene"]["detail"][0] == "2 of 2 tensors have other bytes"
    assert found["tokens"]["note"].str.contains("embedding").all()


def test_what_rounding_swallows_does_not_differ_from_the_base():
    model = rs.load(tiny.build("llama", torch.float32))
    tiny_one = Rows(DOWN, (), (24, 40), (1,), torch.tensor([[7]]), torch.full((1, 24), 1e-12, dtype=torch.float64))
    table = audit(model, edit_of(model, tiny_one))["hygiene"].set_index("check")["ok"]
    assert table["differs from base"] is False
    assert table["refuses other weights"] is False


@pytest.mark.parametrize("fault", ["leak", "write", "keep"])
def test_a_leaking_edit_is_seen(monkeypatch, fault):
    """The same checks on an `applied` that also changes another tensor, or the base, or leaves the base changed."""
    from contextlib import contextmanager

    model = rs.load(tiny.build("llama"))
    real, base = Edit.applied, weight(model, DOWN)
    other = "model.layers.0.mlp.up_proj.weight"

    @contextmanager
    def leaking(self, given, **options):
        with real(self, given, **options) as edited:
            if fault == "leak":
                edited.module.get_submodule("model.layers.0.mlp.up_proj").weight = torch.nn.Parameter(
                    weight(given, other) + 1, requires_grad=False
                )
            elif fault == "write":
                base[0, 0] += 1
            try:
                yield edited
            finally:
                if fault == "write":
                    base[0, 0] -= 1
                elif fault == "keep":
                    base[0, 1] += 1

    edit = edit_of(model, rows(DOWN, (24, 40), 1, [7]))
    monkeypatch.setattr(Edit, "applied", leaking)
    monkeypatch.setattr(auditing, "_reloaded", lambda *_: [])
    table = audit(model, edit)["hygiene"]
    failed = set(table[table["ok"] == False]["check"])  # noqa: E712
    assert failed == {
        "leak": {"untouched tensors identical"},
        "write": {"base unchanged while applied"},
        "keep": {"rolls back bit-exactly", "rolls back after an exception"},
    }[fault] | (failed & {"rolls back after an exception"} if fault == "write" else set())


def test_an_edit_for_other_weights_is_refused_and_bad_input_is_named():
    model, edit = llama(), edit_of(llama(), rows(DOWN, (24, 40), 1, [7]))
    with pytest.raises(StaleRecordingError, match="made for other weights"):
        audit(rs.load(tiny.build("llama", seed=3)), edit)
    with pytest.raises(ArgumentError, match=r"`edit` must be an rs\.Edit"):
        audit(model, None)
    with pytest.raises(ArgumentError, match="must change something"):
        audit(model, Edit(()))
    with pytest.raises(ArgumentError, match="`top`"):
        audit(model, edit, top=0)
    with pytest.raises(ArgumentError, match="`dtype`"):
        cast_survival(model, edit, "float8")


def test_an_edit_by_interventions_is_audited_without_weights():
    edit = Edit((), (rs.Scale("L1.N3", 0.0, positions="all"),))
    found = audit(llama(), edit)
    assert found["tensors"].empty
    ok = found["hygiene"].set_index("check")["ok"]
    assert ok["differs from base"] is None
    assert ok["refuses other weights"] is None
    assert all(ok.drop(["differs from base", "refuses other weights"]))
    with pytest.raises(ArgumentError, match="works by interventions"):
        cast_survival(llama(), edit)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_spectra_are_read_through_the_norms_gains(family):
    model = tiny.shared(family)
    axis = 0 if family == "gpt2" else 1
    path = f"{model.path(1, 'mlp_out')}.weight"
    old = weight(model, path)
    change = rows(path, tuple(old.shape), axis, [7])
    table = audit(model, edit_of(model, change), top=4)["tokens"]
    before = old.movedim(axis, 0)[7]
    gamma, final = model.module.get_submodule(model.path(1, "mlp_post_norm")) if family == "gemma2" else None, None
    final = model.part(None, "final_norm")
    w_u = model.unembedding

    def by_hand(v):
        if gamma is not None:
            v = v * (1 + gamma.weight.detach())
        v = v - v.mean() if family == "gpt2" else v
        return w_u @ (v * ((1 if family == "gemma2" else 0) + final.weight.detach()))

    vectors = {"old": before, "new": before + change.delta[0], "difference": change.delta[0]}
    for which, v in vectors.items():
        expected = by_hand(v)
        for side, sign in (("promotes", 1), ("suppresses", -1)):
            got = table[(table["which"] == which) & (table["side"] == side)]
            best = (sign * expected).topk(4).indices.tolist()
            assert got["token_id"].tolist() == best
            assert got["value"].tolist() == pytest.approx(expected[best].tolist(), rel=1e-7)
            assert got["rank"].tolist() == [1, 2, 3, 4]
    assert set(table["slice"]) == {"L1.N7"}


def test_directions_keep_the_sign_of_their_factors():
    model = llama()
    left, right = noise(24, 1), noise(1, 40)
    for sign, other in itertools.product((1, -1), repeat=2):
        change = LowRank(DOWN, (), (24, 40), (), sign * left, other * right)
        table = audit(model, edit_of(model, change), top=2)["tokens"]
        expected = model.unembedding @ (
            left[:, 0] * sign * right.norm() * model.part(None, "final_norm").weight.detach()
        )
        assert table[table["side"] == "promotes"]["token_id"].tolist() == expected.topk(2).indices.tolist()
        assert table["value"].iloc[0] == pytest.approx(float(expected.max()))
        assert set(table["which"]) == {"difference"}


def test_many_vectors_are_bounded_and_silent_tensors_say_why():
    model = llama()
    attn = "model.layers.0.self_attn.o_proj.weight"
    keys, norm = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    out = Rows(DOWN, (), (24, 40), (1,), torch.arange(36)[:, None], noise(36, 24) * torch.arange(1, 37)[:, None])
    changes = [out, rows(attn, (24, 24), 1, [13], seed=1), rows(keys, (40, 24), 0, [2]),
               Dense(norm, (), (24,), noise(24))]  # fmt: skip
    table = audit(model, edit_of(model, *changes), top=1)["tokens"]
    shown = [name for name in dict.fromkeys(table["slice"]) if name]
    assert len(shown) == 32
    assert shown[0] == "L1.N35" or "L1.N3" in shown[0]
    assert "L0.H2.D1" not in shown
    notes = table[table["which"] == ""].set_index("tensor")["note"]
    assert "keys" in notes[keys]
    assert "norm" in notes[norm]
    assert "left out" in notes[""]
    alone = audit(model, edit_of(model, changes[1]), top=1)["tokens"]
    assert set(alone["slice"]) == {"L0.H2.D1"}


def test_a_vector_of_zeros_promotes_nothing():
    old = weight(llama(), DOWN)
    change = Rows(DOWN, (), (24, 40), (1,), torch.tensor([[7]]), -old[:, 7][None])
    table = audit(llama(), edit_of(llama(), change), top=3)["tokens"]
    assert table[table["which"] == "new"]["note"].str.contains("zeros").all()
    assert len(table[table["which"] == "new"]) == 1


def by_hand_survival(old, delta, dtype):
    left = ((old.double() + delta).to(old.dtype).to(dtype).double() - old.to(dtype).double()).flatten()
    d = delta.flatten()
    return float(left @ d / (left.norm() * d.norm())), float(left @ d / (d @ d))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("form", ["one row", "rank 4", "dense"])
def test_cast_survival_is_the_cosine_of_what_is_left(form, dtype, monkeypatch):
    from resid_surgery.editing import acting

    monkeypatch.setattr(acting, "PIECE", 100)
    change = FORMS[form][0]().scaled(1e-2)
    row = cast_survival(llama(), edit_of(llama(), change), dtype).iloc[0]
    cosine, kept = by_hand_survival(weight(llama(), DOWN), change.dense(), getattr(torch, dtype))
    assert (row["cosine"], row["kept"]) == (pytest.approx(cosine), pytest.approx(kept))
    assert row["change_norm"] == pytest.approx(float(change.dense().norm()))


@pytest.mark.parametrize(("on_the_grid", "cosine", "kept"), [(True, 0.63, 0.51), (False, 0.52, 1.0)])
def test_the_known_numbers_of_a_cast(on_the_grid, cosine, kept):
    """A row change of relative norm 1e-3: weights that are bfloat16 numbers lose half of it, others turn it."""
    model = rs.load(tiny.build("llama", torch.float32, hidden_size=48, intermediate_size=1000))
    w = model.module.get_parameter(DOWN)
    with torch.no_grad():
        w.copy_(noise(48, 1000, seed=5))
        w.copy_(w.bfloat16() if on_the_grid else w)
    found = {}
    for relative in (1e-3, 1e-2, 1e-1):
        delta = noise(1000, 48, seed=6)
        delta *= relative * w.detach().T.double().norm(dim=1, keepdim=True) / delta.norm(dim=1, keepdim=True)
        change = Rows(DOWN, (), (48, 1000), (1,), torch.arange(1000)[:, None], delta)
        found[relative] = cast_survival(model, edit_of(model, change)).iloc[0]
    assert found[1e-3]["cosine"] == pytest.approx(cosine, abs=0.03)
    assert found[1e-3]["kept"] == pytest.approx(kept, abs=0.05)
    assert found[1e-2]["cosine"] > 0.96
    assert found[1e-1]["cosine"] > 0.999


def test_the_overall_cosine_is_that_of_all_tensors_end_to_end():
    model = llama()
    other = "model.layers.0.mlp.down_proj.weight"
    changes = [rows(DOWN, (24, 40), 1, [7]).scaled(1e-3), rows(other, (24, 40), 1, [2, 3]).scaled(0.5)]
    ends = []
    for change in changes:
        old = weight(model, change.name)
        left = (old + change.dense()).bfloat16().double() - old.bfloat16().double()
        ends.append((left.flatten(), change.dense().flatten()))
    left, wanted = (torch.cat(parts) for parts in zip(*ends, strict=True))
    table = cast_survival(model, edit_of(model, *changes))
    assert overall_cosine(table) == pytest.approx(float(torch.cosine_similarity(left, wanted, dim=0)))
    assert table["cosine"].min() < 0.9 < overall_cosine(table)


def test_an_overflow_is_no_survival():
    model = rs.load(tiny.build("llama", torch.float32))
    change = Rows(DOWN, (), (24, 40), (1,), torch.tensor([[7]]), torch.full((1, 24), 1e6, dtype=torch.float64))
    table = cast_survival(model, edit_of(model, change), "float16")
    assert table.loc[0, ["overflowed", "cosine", "kept"]].tolist() == [24, 0, 0]
    assert overall_cosine(table) == 0


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("form", FORMS)
def test_acting_never_writes_the_change_out_but_does_the_same(form, axis):
    change = FORMS[form][0]()
    full, x = change.dense(), noise(5, change.shape[axis], seed=3)
    assert torch.allclose(acted(change, axis, x), x @ (full.T if axis == 1 else full), rtol=1e-12, atol=1e-14)
    rows_, columns = touched(change)
    assert torch.equal(rows_, full.any(1))
    assert torch.equal(columns, full.any(0))
    old = noise(24, 40, seed=4)
    before, added = (torch.cat(parts) for parts in zip(*pieces(change, old), strict=True))
    assert float((before + added).sum()) == pytest.approx(
        float((old + full)[torch.ones_like(old, dtype=torch.bool) if change.kind != "rows" else full != 0].sum())
    )


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 2), (0, 1), (1, 2), (0, 1, 2)])
def test_a_change_of_experts_is_one_of_each_experts_matrix(axes):
    shape = (3, 5, 7)
    index = torch.tensor(list(itertools.product(*([1, 2] for _ in axes))))
    delta = noise(len(index), *(n for i, n in enumerate(shape) if i not in axes))
    change = Rows("w", (), shape, axes, index, delta)
    rebuilt = torch.zeros(shape, dtype=torch.float64)
    for (e,), one in matrices(change, 1):
        rebuilt[e] = one.dense()
    assert torch.equal(rebuilt, change.dense())


@pytest.mark.parametrize("form", ["one row", "rank 4", "dense"])
def test_a_change_as_half_precision_takes_it(form):
    change, old = FORMS[form][0](), noise(24, 40, seed=4).bfloat16()
    assert torch.equal(as_stored(change, old).dense(), change.added_to(old).double() - old.double())


def test_roles_know_writers_from_readers():
    said = {
        "llama": {"model.layers.0.self_attn.o_proj.weight": "L0.attn.out", DOWN: "L1.mlp.out",
                  "model.norm.weight": "norm", "model.layers.2.self_attn.k_proj.bias": "L2.attn.in bias",
                  "lm_head.weight": "unembed",
                  "model.embed_tokens.weight": "embed", "model.layers.0.input_layernorm.weight": "L0.norm"},
        "gpt2": {"transformer.wpe.weight": "other", "transformer.h.1.mlp.c_fc.weight": "L1.mlp.in"},
    }  # fmt: skip
    for family, listed in said.items():
        for path, text in listed.items():
            assert str(role_of(tiny.shared(family), path)) == text
    assert role_of(tiny.shared("gpt2"), "transformer.h.1.mlp.c_proj.weight").input_axis == 0
    assert role_of(llama(), DOWN).input_axis == 1
