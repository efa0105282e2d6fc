"""Edits of coefficients and of value rows: baked into weights they do what operations in every forward do."""

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import prompts
from test_prompts import word_tokenizer
from tiny import FAMILIES, build, shared

import resid_surgery as rs
from resid_surgery.editing.coefficients import edit_coefficients
from resid_surgery.editing.edits import Edit
from resid_surgery.editing.value_rows import basis, edit_value_rows, token_directions
from resid_surgery.errors import ArgumentError, PromptError, SiteError
from resid_surgery.models.replacing import tensors_of
from resid_surgery.models.zoo import tiny
from resid_surgery.stream.kinds import neuron_block
from resid_surgery.stream.vocabulary import Readout

IDS = [5, 4, 3, 2]
MIXTURES = ("mixtral", "gpt_oss", "qwen2_moe", "granitemoeshared")
DOWN = {"llama": "model.layers.{}.mlp.down_proj", "gpt2": "transformer.h.{}.mlp.c_proj",
        "opt": "model.decoder.layers.{}.fc2", "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
        "gemma2": "model.layers.{}.mlp.down_proj"}  # fmt: skip
_loaded: dict[str, rs.OpenedModel] = {}


def loaded(family):
    if family in FAMILIES:
        return shared(family)
    if family not in _loaded:
        _loaded[family] = rs.load(tiny(family, dtype=torch.float64))
    return _loaded[family]


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.shadow(torch.tensor([ids])).logits


def both(model, sites, factor, ids=IDS):
    """Logits of the two forms of one edit."""
    with edit_coefficients(model, sites, factor).applied(model) as edited:
        baked = logits(edited, ids)
    with edit_coefficients(model, sites, factor, baked=False).applied(model) as altered:
        return baked, altered.forward(ids).logits


def off(a, b):
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sites", ["L1.N7", "L0:2.N3:9", "L2.H1", "L*.H0.D*", "L1.H2.D4", "L1.attn", "L*.mlp",
                                   ["L0.mlp", "L2.attn", "L0.N3", "L2.H1"]], ids=str)  # fmt: skip
@pytest.mark.parametrize("factor", [0, -1.7])
def test_the_two_forms_agree(family, sites, factor):
    model = shared(family)
    baked, altered = both(model, sites, factor)
    # transformers computes what an RMSNorm makes of its weights in float32 even in float64 models
    behind_a_norm = family == "gemma2" and any("attn" in one or "mlp" in one for one in [*sites, sites])
    assert off(baked, altered) <= (1e-6 if behind_a_norm else 1e-10)
    assert off(baked, logits(model)) > 1e-3


@settings(max_examples=12)
@given(st.sampled_from(FAMILIES), prompts(), st.data())
def test_the_two_forms_agree_on_any_prompt_with_a_factor_for_each_site(family, prompt, data):
    model = shared(family)
    names = ["L0.N1", "L1.N*", "L2.H1", "L1.H*", "L1.H0.D2", "L2.mlp", "L0.attn", "L2.N5"]
    sites = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True))
    factor = data.draw(st.lists(st.sampled_from([0.0, 0.5, -2.0]), min_size=len(sites), max_size=len(sites)))
    baked, altered = both(model, sites, factor, list(prompt.ids))
    # an RMSNorm's float32 can round two inputs that differ by 1e-16 to neighbouring numbers
    assert off(baked, altered) <= {"gemma2": 1e-5, "llama": 1e-6}.get(family, 1e-10)


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("factor", [0.0, -1.7])
def test_the_two_forms_agree_in_mixtures(family, factor):
    model = loaded(family)
    rec = rs.record(model, rs.Prompt(ids=[9], target=1))
    layers = [i for i, size in enumerate(model.anatomy.sizes) if size.n_experts]
    for group in rec.layers[layers[-1]].groups:
        name = "shared" if group.expert == "shared" else f"E{group.expert}"
        baked, altered = both(model, f"L{layers[-1]}.{name}.N*", factor, [9])
        assert off(baked, altered) <= 1e-10
        assert off(baked, logits(model, [9])) > 1e-4
    baked, altered = both(model, [f"L{layers[0]}.mlp", f"L{layers[-1]}.mlp"], factor)
    assert off(baked, altered) <= 1e-10


def test_a_zeroed_layer_writes_nothing():
    for family in (*FAMILIES, *MIXTURES):
        model = loaded(family)
        with edit_coefficients(model, ["L1.mlp", "L2.attn"], 0).applied(model) as edited:
            rec = rs.record(edited, rs.Prompt(ids=IDS, target=1))
            # a norm gain of 1 + w is 0 up to the float32 in which it is added
            assert float(rec.layers[1].mlp_add.abs().max() if hasattr(rec.layers[1], "mlp_add")
                         else rec.layers[1].mlp_out.abs().max()) < 1e-6  # fmt: skip
            assert float(rec.layers[2].attn_out.abs().max()) < 1e-6
            assert float(rec.layers[0].mlp_out.abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
def test_rows_are_the_ones_that_the_module_holds(family):
    """By the module's own weight: columns of a Linear, rows of a Conv1D."""
    model = shared(family)
    name = DOWN[family].format(1) + ".weight"
    old = tensors_of(model.module)[name].detach()
    with edit_coefficients(model, ["L1.N7", "L1.N9"], [2.0, 0.0]).applied(model) as edited:
        new = tensors_of(edited.module)[name].detach()
    moved = new - old
    if family != "gpt2":
        moved, old = moved.T, old.T
    assert torch.allclose(moved[7], old[7])
    assert torch.allclose(moved[9], -old[9])
    moved[[7, 9]] = 0
    assert not bool(moved.any())


def test_a_head_is_its_rows_of_w_o_and_leaves_the_bias():
    model = shared("llama")
    edit = edit_coefficients(model, "L1.H2", 0.0)
    assert edit.tensors == ("model.layers.1.self_attn.o_proj.weight",)
    (change,) = edit.changes
    assert change.index[:, 0].tolist() == list(range(12, 18))
    whole = edit_coefficients(model, "L1.attn", 0.0)
    assert set(whole.tensors) == {f"model.layers.1.self_attn.o_proj.{what}" for what in ("weight", "bias")}
    assert edit_coefficients(model, "L1.attn.bias", 0.0).tensors == ("model.layers.1.self_attn.o_proj.bias",)


def test_sites_come_as_texts_values_located_ones_and_tables():
    model = shared("llama")
    rec = rs.record(model, rs.Prompt(ids=IDS, target=1, versus=[2]))
    found = rs.locate(rec, k=5)
    edit = edit_coefficients(model, found, 0.0)
    assert edit.hash == edit_coefficients(model, found.sites, 0.0).hash
    assert edit.hash == edit_coefficients(model, [str(s) for s in reversed(found.sites)], 0.0).hash
    assert edit.hash == edit_coefficients(model, found.table, 0.0).hash
    queries = rs.query_subvalues(rec, found, k=4, grain="neuron")
    assert edit_coefficients(model, queries, 0.5).about["settings"]["sites"] == queries["site"].tolist()
    table = rs.sources(rec, "L2.N3", grain="neuron", top=30)
    assert {"remainder", "constant"} <= set(table["kind"])
    layered = table[table["kind"].isin(["neuron", "remainder", "constant"])]
    writers = [w for w, kind in zip(table["writer"], table["kind"], strict=True) if kind == "neuron"]
    assert edit_coefficients(model, layered, 0.5).about["settings"]["sites"] == list(dict.fromkeys(writers))
    with pytest.raises(ArgumentError, match="a table with a 'site' or 'writer' column"):
        edit_coefficients(model, pd.DataFrame({"name": ["L0.N1"]}), 0.0)


def test_pairs_and_positions_need_operations():
    model = shared("llama")
    edit = edit_coefficients(model, ["L1.H1<0", "L0.N3"], 0.0, baked=False, positions="target")
    assert not edit.changes
    assert edit.interventions == (rs.Scale(["L1.H1<0", "L0.N3"], 0.0),)
    rec = rs.record(model, rs.Prompt(ids=IDS, target=1))
    with edit.applied(model) as altered:
        found = altered.forward(IDS).logits[0, -1]
    assert torch.allclose(found, rs.intervene(rec, edit.interventions).after.logits, atol=1e-10)
    two = edit_coefficients(model, ["L0.N3", "L0.N4", "L0.N5"], [0.0, 2.0, 0.0], baked=False)
    assert two.interventions == (rs.Scale(["L0.N3", "L0.N5"], 0.0, positions="all"),
                                 rs.Scale("L0.N4", 2.0, positions="all"))  # fmt: skip


def test_both_forms_come_back_from_files(tmp_path):
    model = shared("gpt2")
    for baked in (True, False):
        edit = edit_coefficients(model, ["L1.N3", "L2.H1"], [0.5, 0.0], baked=baked)
        assert Edit.load(edit.save(tmp_path / "e.safetensors")).hash == edit.hash


REFUSED = [
    ("L1.H1<0", "one source position is no row of a weight"),
    ("L1.H1.D2<0", "one source position is no row of a weight"),
    ("L*.H*<2", "one source position is no row of a weight"),
    ("L1.mlp@2", "weights act at every position"),
    ("L0.mlp->L1.mlp", "an edge between two sites"),
    ("L1.resid_post", "a state or constant of the stream"),
    ("L*.resid_pre", "a state or constant of the stream"),
    ("embed", "a state or constant of the stream"),
    ("L1.Q1", "queries, keys and values"),
    ("L9.N1", "`layer` must be in 0..2"),
    ("L1.N99", "`index` must be in 0..39"),
    ("L1.E0.N1", "has no experts"),
]  # fmt: skip


@pytest.mark.parametrize(("site", "why"), REFUSED)
def test_what_is_no_row_of_a_weight_is_refused_with_the_reason(site, why):
    for call in (lambda m: edit_coefficients(m, ["L0.N1", site], 0.0), lambda m: edit_value_rows(m, site, old=3)):
        with pytest.raises(SiteError, match=why):
            call(shared("llama"))


def test_opaque_writers_are_refused():
    model = loaded("qwen3_next")
    layer = next(i for i in range(model.anatomy.n_layers) if model.block(i).attn_kind == "opaque")
    with pytest.raises(SiteError, match=f"L{layer}.attn as rows of a weight` does not exist"):
        edit_coefficients(model, f"L{layer}.attn", 0.0)


def test_shared_weights_are_refused_rather_than_changed_twice():
    module = build("llama")
    module.model.layers[2].mlp.down_proj.weight = module.model.layers[0].mlp.down_proj.weight
    model = rs.load(module)
    with pytest.raises(
        SiteError, match=r"is also model\.layers\.2\.mlp\.down_proj\.weight, which would change as well"
    ):
        edit_coefficients(model, "L0.N1", 0.0)
    assert edit_coefficients(model, "L0.N1", 0.0, baked=False).interventions
    assert edit_coefficients(model, "L1.N1", 0.0).changes


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda m: edit_coefficients(m, "L0.N1", "much"), "`factor` must be a finite number"),
        (lambda m: edit_coefficients(m, "L0.N1", float("nan")), "`factor` must be a finite number"),
        (lambda m: edit_coefficients(m, ["L0.N1", "L0.N2"], [1.0]), "one for each of 2 sites"),
        (lambda m: edit_coefficients(m, ["L0.N*", "L0.N2"], [2.0, 3.0]), r"must be one for L0\.N2"),
        (lambda m: edit_coefficients(m, "L0.N1", 1.0), "must change something"),
        (lambda m: edit_coefficients(m, "L0.N1", 0.0, positions="target"), "`positions` must be 'all'"),
        (lambda m: edit_coefficients(m, "L0.N1", 0.0, baked=1), "`baked` must be True or False"),
        (lambda m: edit_coefficients(m.module, "L0.N1", 0.0), "`model` must be a model from"),
        (lambda m: edit_value_rows(m, "L0.N1"), "exactly one of add, replace, project_out, old / new"),
        (lambda m: edit_value_rows(m, "L0.N1", old=3, add=[0.0] * 24), "exactly one of"),
        (lambda m: edit_value_rows(m, "L0.N1", add=[0.0] * 5), "`add` must be a vector of 24 numbers"),
        (lambda m: edit_value_rows(m, "L0.N1:3", replace=torch.zeros(3, 24)), "one for each of 2 sites"),
        (lambda m: edit_value_rows(m, "L0.N1", add=[0.0] * 24), "must change something"),
        (lambda m: edit_value_rows(m, "L0.N1", add=[float("inf")] * 24), "finite numbers"),
        (lambda m: edit_value_rows(m, "L0.N1", project_out=[0.5] * 5), "tokens, or directions of 24 numbers"),
        (lambda m: edit_value_rows(m, "L0.N1", project_out=[0.0] * 24), "directions other than zero"),
        (lambda m: edit_value_rows(m, "L0.N1", old=3, direction="sideways"), "`direction` must be one of"),
        (lambda m: edit_value_rows(m, "L0.N1", old=3, l1="a"), "`l1` must be a finite number"),
        (lambda m: edit_value_rows(m, "L0.N1", new=3, signs="old"), "where no `old` token is given"),
        (lambda m: edit_value_rows(m, "L0.N1", new=3, signs=[2]), "1 or -1 for each of 1 sites"),
    ],
)
def test_bad_arguments_are_refused(call, why):
    with pytest.raises(ArgumentError, match=why):
        call(shared("llama"))


@pytest.mark.parametrize("site", ["L1.H1", "L1.mlp", "L1.attn.bias"])
def test_value_rows_are_of_one_vector_each(site):
    with pytest.raises(SiteError, match=r"one value vector each; got .* The rows of a head are L3\.H4\.D\*"):
        edit_value_rows(shared("llama"), site, project_out=3)


def row(model, name, i):
    t = tensors_of(model.module)[name].detach()
    return (t[i] if "c_proj" in name else t[:, i]).clone()


@pytest.mark.parametrize("family", FAMILIES)
def test_add_and_replace_are_what_they_say(family):
    model, name = shared(family), DOWN[family].format(1) + ".weight"
    vectors = torch.randn(2, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with edit_value_rows(model, ["L1.N9", "L1.N4"], add=vectors).applied(model) as edited:
        assert torch.allclose(row(edited, name, 9), row(model, name, 9) + vectors[0])
        assert torch.allclose(row(edited, name, 4), row(model, name, 4) + vectors[1])
        assert torch.equal(row(edited, name, 5), row(model, name, 5))
    edit = edit_value_rows(model, ["L1.N9", "L1.N4"], replace=vectors[0].tolist())
    with edit.applied(model) as edited:
        assert torch.allclose(row(edited, name, 9), vectors[0])
        assert torch.allclose(row(edited, name, 4), vectors[0])
    assert edit.fitting["norm_after"].tolist() == pytest.approx([float(vectors[0].norm())] * 2)
    cosine = torch.nn.functional.cosine_similarity(row(model, name, 9), vectors[0], dim=0)
    assert edit.fitting["cosine"][0] == pytest.approx(float(cosine))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_projected_row_says_nothing_of_a_token(family):
    """Against the stream itself: bs-values of the neuron's addend, post-norm and final norm as the run has them."""
    model = shared(family)
    rec = rs.record(model, rs.Prompt(ids=IDS, target=7, versus=[8]))
    coefficient = rec.layers[1].groups[0].coefficient
    best = int(coefficient.abs().argmax())
    for tokens in (7, [7, 8]):
        with edit_value_rows(model, f"L1.N{best}", project_out=tokens).applied(model) as edited:
            again = rs.record(edited, rs.Prompt(ids=IDS, target=7, versus=[8]))
            addend = neuron_block(again, 1).direction(torch.tensor([best]))
            sizes = Readout.of(again).bs(addend)[0].abs()
            assert sizes[7] < 1e-6 * sizes.max()
            assert (sizes[8] < 1e-6 * sizes.max()) == (tokens != 7)


def test_projecting_removes_the_span_and_no_more():
    model, name = shared("llama"), DOWN["llama"].format(1) + ".weight"
    directions = torch.randn(3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    directions = torch.cat([directions, directions[:1] * 2])  # one of them twice
    edit = edit_value_rows(model, "L1.N9", project_out=directions)
    with edit.applied(model) as edited:
        new, old = row(edited, name, 9), row(model, name, 9)
    assert float((directions @ new).abs().max()) < 1e-10
    solved = torch.linalg.lstsq(directions[:3].T, old).solution
    assert torch.allclose(old - new, directions[:3].T @ solved)
    assert edit.fitting["removed"][0] == pytest.approx(float((old - new).norm()))
    assert basis(directions).shape == (3, 24)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("signs", ["plain", "old", [1, -1, 1]], ids=str)
def test_the_rule_of_dai_is_its_formula(family, signs):
    model, name = shared(family), DOWN[family].format(1) + ".weight"
    edit = edit_value_rows(model, "L1.N3:6", old=7, new=8, l1=0.5, l2=2.0, signs=signs)
    gain, head = final_gain(family, model), model.module.get_output_embeddings().weight.detach()
    e_old, e_new = (head[t] * gain for t in (7, 8))
    if family in ("gpt2", "opt", "gpt_neox"):
        e_old, e_new = (e - e.mean() for e in (e_old, e_new))
    if family == "gemma2":
        post = 1 + model.module.model.layers[1].post_feedforward_layernorm.weight.detach()
        e_old, e_new = e_old * post, e_new * post
    with edit.applied(model) as edited:
        for k, i in enumerate(range(3, 6)):
            w = row(model, name, i)
            sign = {"plain": 1.0, "old": -1.0 if float(w @ e_old) < 0 else 1.0}.get(str(signs)) or signs[k]
            wanted = w + sign * w.norm() * (-0.5 * e_old / e_old.norm() + 2.0 * e_new / e_new.norm())
            assert torch.allclose(row(edited, name, i), wanted, atol=1e-9)
            assert edit.fitting["bs_old_before"][k] == pytest.approx(float(w @ e_old), abs=1e-9)
            assert edit.fitting["bs_new_after"][k] == pytest.approx(float(wanted @ e_new), abs=1e-9)


def final_gain(family, model):
    path = {"llama": "model.norm", "gemma2": "model.norm", "gpt2": "transformer.ln_f",
            "gpt_neox": "gpt_neox.final_layer_norm", "opt": "model.decoder.final_layer_norm"}[family]  # fmt: skip
    weight = model.module.get_submodule(path).weight.detach()
    return 1 + weight if family == "gemma2" else weight


def test_signs_turn_the_rule_round_where_coefficients_have_either_sign():
    gated, plain = shared("llama"), shared("gpt2")
    auto = edit_value_rows(gated, "L1.N*", old=7, new=8).fitting
    assert set(auto["sign"]) == {1.0, -1.0}
    assert ((auto["bs_old_before"] < 0) == (auto["sign"] < 0)).all()
    assert set(edit_value_rows(plain, "L1.N*", old=7, new=8).fitting["sign"]) == {1.0}
    assert set(edit_value_rows(gated, "L1.N*", new=8).fitting["sign"]) == {1.0}
    assert set(edit_value_rows(plain, "L1.H*.D*", old=7).fitting["sign"]) == {1.0, -1.0}


def test_the_embedding_is_the_published_direction():
    model = shared("opt")
    embed = model.module.get_input_embeddings().weight.detach()
    assert torch.equal(token_directions(model, 1, "mlp", [7, 8], "embedding"), embed[[7, 8]])
    a, b = (edit_value_rows(model, "L1.N3", old=7, direction=d) for d in ("embedding", "unembedding"))
    assert a.hash != b.hash


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen2_moe"])
def test_rows_of_experts_are_read_and_written_where_they_lie(family):
    model = loaded(family)
    layer = max(i for i, size in enumerate(model.anatomy.sizes) if size.n_experts)
    sites = [f"L{layer}.E1.N2", f"L{layer}.E0.N3"] + [f"L{layer}.shared.N1"] * (family == "qwen2_moe")
    with edit_value_rows(model, sites, replace=[float(i) for i in range(24)]).applied(model) as edited:
        for expert, i in ((1, 2), (0, 3)):
            assert edited.experts(layer).out(expert).rows[i].tolist() == pytest.approx(list(range(24)))
            assert torch.equal(
                edited.experts(layer).out(expert).rows[i + 1], model.experts(layer).out(expert).rows[i + 1]
            )
        if family == "qwen2_moe":
            assert edited.rows(layer, "shared_out").rows[1].tolist() == pytest.approx(list(range(24)))


def test_words_are_tokens_and_answers_of_several_are_refused():
    model = rs.load(build("llama"), tokenizer=word_tokenizer())
    ids = [model.tokenizer.encode(t, add_special_tokens=False)[0] for t in (" Paris", " London")]
    edit = edit_value_rows(model, "L1.N3", old=" Paris", new=" London")
    assert edit.hash == edit_value_rows(model, "L1.N3", old=ids[0], new=ids[1]).hash
    assert (edit.about["settings"]["old"], edit.about["settings"]["new"]) == tuple(ids)
    assert (edit_value_rows(model, "L1.N3", project_out=[" Paris", " London"]).hash
            == edit_value_rows(model, "L1.N3", project_out=ids).hash)  # fmt: skip
    with pytest.raises(PromptError, match="`new` must be one token"):
        edit_value_rows(model, "L1.N3", new=" Paris London")


def test_bfloat16_weights_are_rounded_once():
    model = shared("llama", torch.bfloat16)
    name = DOWN["llama"].format(1) + ".weight"
    with edit_coefficients(model, "L1.N9", 0.3).applied(model) as edited:
        wanted = (row(model, name, 9).double() + (0.3 - 1) * row(model, name, 9).double()).bfloat16()
        assert torch.equal(row(edited, name, 9), wanted)
    with edit_coefficients(model, "L1.N9", 0).applied(model) as edited:
        assert not bool(row(edited, name, 9).any())


def probabilities(model, text, *tokens):
    rec = rs.record(model, rs.Prompt(text, target=tokens[0], versus=tokens[1:]))
    p = torch.softmax(rec.logits.double(), -1)
    return [float(p[i]) for i in rec.prompt.readouts]


@pytest.mark.real
def test_located_neurons_carry_a_fact_and_can_be_made_to_say_another(smollm2, paris):
    found = rs.locate(paris, k=20)
    text = "The capital of France is"
    before = probabilities(smollm2, text, " Paris", " Rome")
    assert before[0] > 0.7
    with edit_value_rows(smollm2, found, old=" Paris", new=" Rome").applied(smollm2) as edited:
        after = probabilities(edited, text, " Paris", " Rome")
        again = probabilities(edited, "The capital city of France is", " Paris", " Rome")
    assert after[0] < 1e-4
    assert after[1] > 0.99
    assert again[1] > 0.99
    with edit_value_rows(smollm2, found, old=" Paris", new=" Rome", signs="plain").applied(smollm2) as edited:
        assert probabilities(edited, text, " Rome")[0] < 0.01, "half of the coefficients are negative"
    with edit_coefficients(smollm2, found, 0.0).applied(smollm2) as edited:
        assert probabilities(edited, text, " Paris")[0] < 0.05
    queries = rs.query_subvalues(paris, found, k=20, grain="neuron")
    with edit_coefficients(smollm2, queries, 0.0).applied(smollm2) as edited:
        assert probabilities(edited, text, " Paris")[0] < 0.1
    assert probabilities(smollm2, text, " Paris", " Rome") == before
