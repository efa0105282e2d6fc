"""Edits made elsewhere: what was added is found again, bit for bit, and kept in the leanest form."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import build, shared

import resid_surgery as rs
from resid_surgery.editing.adapters import adapter_parts
from resid_surgery.editing.changes import Dense, LowRank, Rows
from resid_surgery.editing.differing import change_between, difference, numerical_rank
from resid_surgery.editing.edits import Edit
from resid_surgery.editing.outside import called, ranks
from resid_surgery.errors import ArgumentError, LoadError
from resid_surgery.models.replacing import tensors_of

IDS = torch.tensor([[5, 4, 3, 2]])
DOWN = "model.layers.1.mlp.down_proj.weight"
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def fresh(family="llama", dtype=torch.float32, **changes):
    return build(family, dtype, **changes)


def tuned(module, steps=3, rate=1e-3):
    """A copy of a module after some steps of plain gradient descent."""
    model = copy.deepcopy(module).train()
    for p in model.parameters():
        p.requires_grad_(True)
    descent = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(steps):
        descent.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        descent.step()
    return model.eval()


def same(edit, base, module):
    """The edited base holds another module's tensors, bit for bit, and gives its logits."""
    wanted = tensors_of(module)
    with edit.applied(base) as edited, torch.no_grad():
        found = tensors_of(edited.module)
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor), name
        assert torch.equal(edited.shadow(IDS).logits, base_logits(module))


def base_logits(module):
    with torch.no_grad():
        return copy.deepcopy(module).eval()(IDS).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_fine_tuned_model_is_given_back_bit_for_bit(family, dtype):
    module = fresh(family, dtype)
    base, after = rs.load(module), tuned(module.float()).to(dtype)
    module.to(dtype)
    base = rs.load(module)
    edit = Edit.from_models(base, after)
    same(edit, base, after)
    assert edit.method == "from_models"
    if dtype is not torch.float32:  # which may take a float64 difference
        assert all(part.dtype == torch.float32 for c in edit.changes for n, part in c.parts().items() if n == "delta")


def test_float64_models_are_given_back_up_to_a_rounding():
    module = fresh(dtype=torch.float64)
    after = tuned(module)
    with pytest.warns(UserWarning, match="only up to a rounding"):
        edit = Edit.from_models(rs.load(module), after)
    with edit.applied(rs.load(module)) as edited:
        for name, tensor in tensors_of(after).items():
            assert torch.allclose(tensors_of(edited.module)[name], tensor, atol=1e-15, rtol=1e-15)


def test_each_tensor_is_kept_in_the_leanest_form():
    module = fresh(intermediate_size=64)
    after = copy.deepcopy(module)
    layers = after.model.layers
    with torch.no_grad():
        layers[0].mlp.down_proj.weight[:, [3, 9]] *= 0.5
        layers[0].self_attn.q_proj.weight[4] += 1.0
        layers[1].mlp.up_proj.weight[2, 7] = 0.25
        layers[1].self_attn.k_proj.bias[1] = 9.0
        layers[2].mlp.down_proj.weight.copy_(torch.randn(24, 64))
        whole = torch.ones(24, 1) @ torch.full((1, 64), 0.5)
        layers[1].mlp.down_proj.weight.copy_((layers[1].mlp.down_proj.weight * 8).round() / 8)
        module.model.layers[1].mlp.down_proj.weight.copy_(layers[1].mlp.down_proj.weight)
        layers[1].mlp.down_proj.weight += whole
    base = rs.load(module)
    edit = Edit.from_models(base, after)
    same(edit, base, after)
    found = {c.name.removeprefix("model.layers."): c for c in edit.changes}
    assert found["0.mlp.down_proj.weight"].axes == (1,)
    assert found["0.mlp.down_proj.weight"].index.tolist() == [[3], [9]]
    assert found["0.self_attn.q_proj.weight"].axes == (0,)
    assert found["1.mlp.up_proj.weight"].delta.numel() in (24, 64)
    assert found["1.self_attn.k_proj.bias"].index.tolist() == [[1]]
    assert isinstance(found["2.mlp.down_proj.weight"], Dense)
    assert isinstance(found["1.mlp.down_proj.weight"], LowRank)
    assert found["1.mlp.down_proj.weight"].left.shape == (24, 1)
    assert len(found) == 6


@given(st.integers(0, 10**6), st.sampled_from(FLOATS), st.integers(1, 3), st.sampled_from(["rows", "rank", "dense"]))
def test_any_two_tensors_differ_by_what_takes_one_to_the_other(seed, dtype, n, how):
    rng = torch.Generator().manual_seed(seed)
    old = torch.randn(20, 30, generator=rng).to(dtype)
    step = {"rows": torch.zeros(20, 30), "rank": torch.randn(20, n, generator=rng) @ torch.randn(n, 30, generator=rng),
            "dense": torch.randn(20, 30, generator=rng) * 10.0 ** -n}[how]  # fmt: skip
    if how == "rows":
        step[:, :n] = torch.randn(20, n, generator=rng) * 1e3
    new = (old.double() + step.double()).to(dtype)
    change = change_between("w", (), old, new)
    assert torch.equal(change.added_to(old), new)
    assert isinstance(change, Rows) == (how == "rows")
    rank = numerical_rank(old, change)
    assert rank == n or how == "dense"


@pytest.mark.parametrize("seed", [0, 14, 19, 28, 271])
def test_a_rank_shows_through_the_rounding_of_weights(seed):
    """Also where rows and columns are of very different sizes, and so their rounding."""
    rng = torch.Generator().manual_seed(seed)
    old = torch.randn(200, 150, generator=rng)
    for size in (1.0, 1e-3):
        new = old + size * torch.randn(200, 2, generator=rng) @ torch.randn(2, 150, generator=rng)
        change = change_between("w", (), old, new)
        assert isinstance(change, Dense), "the rounding has full rank"
        assert numerical_rank(old, change) == 2
    assert numerical_rank(old, change_between("w", (), old, torch.randn(200, 150, generator=rng))) is None
    assert numerical_rank(old[0], change_between("w", (), old[0], old[1])) is None


def test_ranks_of_a_models_changes():
    module = fresh()
    after = copy.deepcopy(module)
    with torch.no_grad():
        after.model.layers[1].mlp.down_proj.weight += torch.randn(24, 1) @ torch.randn(1, 40)
    base = rs.load(module)
    assert ranks(base, Edit.from_models(base, after).changes) == {DOWN: 1}


def test_a_number_that_shrinks_too_far_is_warned_of():
    old, new = torch.tensor([1.0, 2.0]), torch.tensor([1e-30, 2.0])
    with pytest.warns(UserWarning, match="1 numbers of w are given back by old . change only up to a rounding"):
        difference("w", old, new)


def test_experts_differ_in_few_slices_too():
    old = torch.randn(4, 6, 8)
    for at, axes in (((2,), (0,)), ((1, slice(None), 3), (0, 2)), ((3, 5), (0, 1))):
        new = old.clone()
        new[at] += 1
        change = change_between("w", (), old, new)
        assert change.axes == axes
        assert torch.equal(change.added_to(old), new)


def test_folders_and_opened_models_are_read(tmp_path, monkeypatch):
    module = fresh()
    base, after = rs.load(module), tuned(module)
    after.save_pretrained(tmp_path / "after")
    wanted = Edit.from_models(base, after).hash
    assert Edit.from_models(base, rs.load(after)).hash == wanted
    loads = []
    monkeypatch.setattr("resid_surgery.editing.outside.read_checkpoint", lambda *a: loads.append(a))
    edit = Edit.from_models(base, tmp_path / "after")
    assert edit.hash == wanted
    assert not loads, "read one tensor at a time"
    assert edit.about["settings"]["after"] == "after"
    assert str(tmp_path) not in str(edit.about)


@pytest.mark.filterwarnings("ignore:.*no readable tokenizer")
def test_a_sharded_folder_and_one_that_is_untied(tmp_path):
    module = fresh()
    base, after = rs.load(module), tuned(module)
    after.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    same(Edit.from_models(base, str(tmp_path / "shards")), base, after)
    loose = untied(after)
    loose.save_pretrained(tmp_path / "loose")
    same(Edit.from_models(base, tmp_path / "loose"), base, loose)


def untied(module):
    """A copy whose unembedding is its own and differs from the embedding."""
    loose = copy.deepcopy(module)
    loose.config.tie_word_embeddings = False
    loose.lm_head.weight = torch.nn.Parameter(loose.lm_head.weight.detach() * 2)
    return loose


def test_what_was_untied_is_untied_by_the_edit():
    module = fresh()
    base = rs.load(module)
    edit = Edit.from_models(base, untied(module))
    assert edit.tensors == ("lm_head.weight",)
    same(edit, base, untied(module))
    tied = copy.deepcopy(module)
    with torch.no_grad():
        tied.lm_head.weight[3] += 1
    edit = Edit.from_models(base, tied)
    assert [c.paths for c in edit.changes] == [("model.embed_tokens.weight", "lm_head.weight")]


def test_narrower_weights_are_widened_and_wider_ones_refused():
    module = fresh(dtype=torch.bfloat16)
    after = tuned(module.float(), rate=1e-2).bfloat16()
    wide = rs.load(module)
    edit = Edit.from_models(wide, after)
    with edit.applied(wide) as edited:
        assert torch.equal(tensors_of(edited.module)[DOWN], tensors_of(after)[DOWN].float())
    with pytest.raises(ArgumentError, match=r"of a dtype that torch\.bfloat16 holds.* Open the base with the dtype"):
        Edit.from_models(rs.load(after), module)


def test_equal_models_are_no_edit(tmp_path):
    module = fresh()
    base = rs.load(module)
    module.save_pretrained(tmp_path / "same")
    for after in (module, copy.deepcopy(module), base, tmp_path / "same"):
        with pytest.raises(ArgumentError, match=r"no weight differs: .* is unedited"):
            Edit.from_models(base, after)


@pytest.mark.parametrize(
    ("after", "why"),
    [
        (lambda: fresh("gpt2"), "must be of the architecture of LlamaForCausalLM; their configs differ"),
        (lambda: fresh(intermediate_size=48), r"differ in intermediate_size \(40 and 48\)"),
        (lambda: fresh(rms_norm_eps=0.1), r"differ in rms_norm_eps \(1e-06 and 0\.1\)"),
        (lambda: with_more(fresh()), r"has also model\.layers\.0\.extra\.weight"),
        (lambda: with_less(fresh()), r"lacks model\.layers\.1\.mlp\.down_proj\.weight"),
        (lambda: with_shape(fresh()), r"must be of shape \(24, 40\) in both models"),
        (lambda: with_nan(fresh()), "must hold finite numbers"),
        (lambda: 3, "`after` must be an opened model"),
        (lambda: "", "`after` must be an opened model"),
    ],
)
def test_models_that_have_no_difference_are_refused(after, why):
    with pytest.raises(ArgumentError, match=why):
        Edit.from_models(rs.load(fresh()), after())


def with_more(module):
    module.model.layers[0].extra = torch.nn.Linear(2, 2)
    return module


def with_less(module):
    del module.model.layers[1].mlp.down_proj
    return module


def with_shape(module):
    module.model.layers[1].mlp.down_proj = torch.nn.Linear(41, 24)
    return module


def with_nan(module):
    with torch.no_grad():
        module.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    return module


def test_a_missing_or_damaged_checkpoint_is_refused(tmp_path):
    base, after = rs.load(fresh()), tuned(fresh())
    with pytest.raises(LoadError, match="does not exist"):
        Edit.from_models(base, "./nowhere")
    after.save_pretrained(tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(LoadError, match="cannot be read"):
        Edit.from_models(base, tmp_path / "broken")


def test_differences_from_a_file(tmp_path):
    base = rs.load(fresh())
    rows = torch.zeros(24, 40)
    rows[:, 5] = 1.5
    left, right = torch.randn(24, 2), torch.randn(2, 40)
    embed = torch.randn(97, 24)
    file = tmp_path / "delta.safetensors"
    save_file({DOWN: rows, "model.layers.0.mlp.down_proj.weight.left": left,
               "model.layers.0.mlp.down_proj.weight.right": right, "lm_head.weight": embed,
               "model.layers.2.mlp.down_proj.weight": torch.zeros(24, 40)}, file)  # fmt: skip
    edit = Edit.from_delta(base, file)
    assert {c.name: c.kind for c in edit.changes} == {
        DOWN: "rows", "model.layers.0.mlp.down_proj.weight": "low_rank", "lm_head.weight": "dense"}  # fmt: skip
    with edit.applied(base) as edited:
        old, new = tensors_of(base.module), tensors_of(edited.module)
        assert torch.equal(new[DOWN], old[DOWN] + rows)
        zero = "model.layers.0.mlp.down_proj.weight"
        assert torch.allclose(new[zero], old[zero] + left @ right, atol=1e-5)
        assert new["lm_head.weight"] is new["model.embed_tokens.weight"]
    save_file({"lm_head.weight": embed, "model.embed_tokens.weight": 2 * embed}, file)
    with Edit.from_delta(base, file).applied(base) as edited:
        old, new = tensors_of(base.module), tensors_of(edited.module)
        assert torch.equal(new["lm_head.weight"], old["lm_head.weight"] + embed)
        assert torch.equal(new["model.embed_tokens.weight"], old["lm_head.weight"] + 2 * embed)
    save_file({"lm_head.weight": embed, "model.embed_tokens.weight": embed.clone()}, file)
    (change,) = Edit.from_delta(base, file).changes
    assert set(change.paths) == {"lm_head.weight", "model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({"model.other.weight": torch.ones(2)}, "named as in LlamaForCausalLM"),
        ({DOWN: torch.ones(40, 24)}, r"must be of shape \(24, 40\)"),
        ({DOWN: torch.ones(24, 40, dtype=torch.int64)}, "finite floating-point numbers"),
        ({DOWN: torch.full((24, 40), float("nan"))}, "finite floating-point numbers"),
        ({DOWN: torch.zeros(24, 40)}, "must hold a difference"),
        ({}, "must hold a difference"),
        ({DOWN + ".left": torch.ones(24, 1)}, "must hold both factors"),
        ({DOWN + ".left": torch.ones(24, 1), DOWN + ".right": torch.ones(2, 40)}, "`left, right` must be factors"),
        ({DOWN + ".left": torch.ones(24, 1), DOWN: torch.ones(24, 40)}, "or its factors, not both"),
    ],
)
def test_files_of_other_things_are_refused(tensors, why, tmp_path):
    save_file(tensors, tmp_path / "delta.safetensors")
    with pytest.raises(ArgumentError, match=why):
        Edit.from_delta(rs.load(fresh()), tmp_path / "delta.safetensors")


def test_a_saved_edit_and_a_missing_file_are_refused(tmp_path):
    base = rs.load(fresh())
    edit = Edit.from_models(base, tuned(base.module))
    with pytest.raises(ArgumentError, match=r"is a saved edit: use Edit\.load"):
        Edit.from_delta(base, edit.save(tmp_path / "edit.safetensors"))
    with pytest.raises(LoadError, match="cannot be read as differences"):
        Edit.from_delta(base, tmp_path / "missing.safetensors")
    with pytest.raises(ArgumentError, match="`path` must be"):
        Edit.from_delta(base, 3)


def test_names_in_provenance_hold_no_paths(tmp_path):
    assert called(tmp_path) == tmp_path.name
    assert called("some/hub-id") == "some/hub-id"
    assert called(shared("llama")) == shared("llama").name
    assert called(shared("llama").module) == "LlamaForCausalLM"


# adapters

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'resid-surgery[peft]'")
TARGETS = {"llama": ["q_proj", "down_proj", "up_proj"], "gpt2": ["c_attn", "c_proj"]}
LORAS = [
    dict(r=2, lora_alpha=6),
    dict(r=4, lora_alpha=6, use_rslora=True),
    dict(r=2, rank_pattern={"c_proj|down_proj": 3}, alpha_pattern={"c_attn|q_proj": 17}),
    dict(r=2, layers_to_transform=[1]),
]


def adapted(module, **options):
    """A PEFT model over a copy of a module, its adapter far from zero, and the merged module."""
    options = {"target_modules": TARGETS[module.config.model_type]} | options
    model = peft.get_peft_model(copy.deepcopy(module), peft.LoraConfig(**options)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or ".modules_to_save." in name:
                p.copy_(torch.randn_like(p) * 0.3)
    return model, copy.deepcopy(model).merge_and_unload()


def near(edit, base, logits, module=None, tol=1e-5):
    with edit.applied(base) as edited, torch.no_grad():
        assert torch.allclose(edited.shadow(IDS).logits, logits, rtol=tol, atol=tol * float(logits.abs().max()))
        for name, tensor in tensors_of(module).items() if module is not None else ():
            assert torch.allclose(tensors_of(edited.module)[name], tensor, rtol=1e-5, atol=1e-6), name
    assert not torch.allclose(base_logits(base.module), logits, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("options", LORAS, ids=lambda one: ", ".join(one))
def test_an_adapter_is_what_peft_merges(family, options, tmp_path):
    module = fresh(family)
    base = rs.load(module)
    before = base.fingerprint()
    model, merged = adapted(module, **options)
    model.save_pretrained(tmp_path / "adapter")
    for edit in (Edit.from_peft(base, tmp_path / "adapter"), Edit.from_peft(base, model)):
        assert all(isinstance(c, LowRank) for c in edit.changes)
        near(edit, base, base_logits(merged), merged)
    assert len(edit.changes) == (3 if "layers_to_transform" in options else 9)
    assert base.fingerprint() == before
    assert edit.method == "from_peft"


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")  # peft, of models that the test makes on purpose
def test_whole_modules_and_biases_are_compared_with_the_bases(tmp_path):
    module = fresh()
    base = rs.load(module)
    model, merged = adapted(module, r=2, modules_to_save=["lm_head"], bias="lora_only", target_modules=["q_proj"])
    with torch.no_grad():
        model.base_model.model.model.layers[1].self_attn.q_proj.base_layer.bias += 1.0
        merged.model.layers[1].self_attn.q_proj.bias += 1.0
    model.save_pretrained(tmp_path / "adapter")
    for edit in (Edit.from_peft(base, tmp_path / "adapter"), Edit.from_peft(base, model)):
        kinds = {c.name: c.kind for c in edit.changes}
        assert kinds["lm_head.weight"] == "dense"
        assert kinds["model.layers.1.self_attn.q_proj.bias"] == "dense"
        assert "model.embed_tokens.weight" not in edit.tensors, "the adapter unties the two"
        near(edit, base, base_logits(merged), merged)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")  # peft, of models that the test makes on purpose
def test_an_adapter_on_one_of_two_tied_tensors_acts_there_only(tmp_path):
    """PEFT's merging writes into the shared tensor; the adapter itself acts on the embedding alone."""
    module = fresh()
    base = rs.load(module)
    model, _ = adapted(module, r=2, target_modules=["embed_tokens"])
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with torch.no_grad():
        logits = model(IDS).logits
    for edit in (Edit.from_peft(base, tmp_path / "adapter"), Edit.from_peft(base, model)):
        assert edit.tensors == ("model.embed_tokens.weight",)
        near(edit, base, logits)


@pytest.mark.filterwarnings("ignore:Adapter .* have invalid shape")  # peft, reading what it wrote
@pytest.mark.parametrize(
    ("options", "why"),
    [
        (dict(use_dora=True), "its config has use_dora"),
        (dict(lora_bias=True, target_modules=["q_proj"]), "its config has lora_bias"),
        (dict(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (dict(trainable_token_indices=[3]), "its config has trainable_token_indices"),
    ],
)
def test_adapters_that_do_more_are_refused(options, why, tmp_path):
    module = fresh()
    model, _ = adapted(module, r=2, **options)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ArgumentError, match=why):
        Edit.from_peft(rs.load(module), tmp_path / "adapter")


def test_an_adapter_that_transformers_holds_is_read_as_well():
    module = fresh()
    base = rs.load(module)
    holder = copy.deepcopy(module)
    holder.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, p in holder.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn_like(p) * 0.3)
    edit = Edit.from_peft(base, holder)
    near(edit, base, base_logits(holder))
    assert {c.name for c in edit.changes} == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)}
    holder.delete_adapter("default")
    with pytest.raises(ArgumentError, match="a folder that PEFT saved, or a PEFT model"):
        Edit.from_peft(base, holder)


def test_other_adapters_bases_and_states_are_refused(tmp_path):
    module = fresh()
    base = rs.load(module)
    model, merged = adapted(module, r=2)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ArgumentError, match="PEFT cannot put adapter on it"):
        Edit.from_peft(rs.load(fresh("gpt2")), tmp_path / "adapter")
    with pytest.raises(ArgumentError, match="must be factors of a"):
        Edit.from_peft(rs.load(fresh(intermediate_size=48)), tmp_path / "adapter")
    with pytest.raises(ArgumentError, match=r"its .*weight is another one"):
        Edit.from_peft(rs.load(tuned(module, rate=1e-1)), model)
    ia3 = peft.get_peft_model(copy.deepcopy(module), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ArgumentError, match="`adapter` must be a LoRA adapter; got 'IA3'"):
        Edit.from_peft(base, ia3)
    again = copy.deepcopy(model)
    again.merge_adapter()
    with pytest.raises(ArgumentError, match="must be active and not merged"):
        Edit.from_peft(base, again)
    with pytest.raises(ArgumentError, match="`adapter` must be a folder that PEFT saved, or a PEFT model"):
        Edit.from_peft(base, merged)
    untouched = peft.get_peft_model(copy.deepcopy(module), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ArgumentError, match="must change something"):
        Edit.from_peft(base, untouched)


def test_damaged_adapters_and_pickles_are_refused(tmp_path):
    module = fresh()
    base = rs.load(module)
    model, _ = adapted(module, r=2)
    folder = tmp_path / "adapter"
    with pytest.raises(LoadError, match=r"with an adapter_config\.json"):
        Edit.from_peft(base, folder)
    model.save_pretrained(folder)
    good = (folder / "adapter_model.safetensors").read_bytes()
    held = {name: t.clone() for name, t in model.state_dict().items() if "lora_" in name}
    (folder / "adapter_model.safetensors").write_bytes(good[:100])
    with pytest.raises(LoadError, match=r"damaged adapter_model\.safetensors"):
        Edit.from_peft(base, folder)
    some = {name.replace(".default", ""): t for name, t in held.items() if "layers.0" in name}
    save_file(some, folder / "adapter_model.safetensors")
    with pytest.raises(LoadError, match=r"must hold the factors of model\.layers\.1"):
        Edit.from_peft(base, folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(held, folder / "adapter_model.bin")
    with pytest.raises(LoadError, match="only pickled weights, which can run code"):
        Edit.from_peft(base, folder)
    (folder / "adapter_model.safetensors").write_bytes(good)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(LoadError, match=r"no readable adapter_config\.json"):
        Edit.from_peft(base, folder)


def test_factors_keep_the_scaling_of_the_layer():
    module = fresh()
    model, _ = adapted(module, r=2, lora_alpha=6)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.set_scale("default", 0.5)
    parts = {name: (a, b) for name, a, b in adapter_parts(rs.load(module), model).factors}
    a, b = parts["model.layers.0.self_attn.q_proj.weight"]
    assert torch.allclose(a @ b.double(), layer.get_delta_weight("default").double(), atol=1e-6)
