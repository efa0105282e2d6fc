"""Edges, paths, queries, keys, values and attention weights, against plain hooks and attention written out here.

`Plain` runs a model with ordinary PyTorch hooks; what readers make of a changed stream is worked out with the model's
own submodules, norms by hand. Nothing of the library is used for what is expected.
"""

import re
from functools import cache

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import VOCAB, shared
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import apply_rotary_pos_emb as gemma2_rotary
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as gpt_neox_rotary
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary

import resid_surgery as rs

IDS = (5, 4, 3, 2, 9, 11)
OTHER = (8, 4, 17, 3, 2, 30)
LONGER = (40, 8, 4, 17, 3, 2, 30, 61)

# blocks, attn, w_o, mlp, down, attn norm, mlp norm, final norm, post-norms
PATHS = {
    "llama": ("model.layers", "self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj", "input_layernorm",
              "post_attention_layernorm", "model.norm", None, None),
    "gpt2": ("transformer.h", "attn", "attn.c_proj", "mlp", "mlp.c_proj", "ln_1", "ln_2", "transformer.ln_f", None,
             None),
    "gpt_neox": ("gpt_neox.layers", "attention", "attention.dense", "mlp", "mlp.dense_4h_to_h", "input_layernorm",
                 "post_attention_layernorm", "gpt_neox.final_layer_norm", None, None),
    "gemma2": ("model.layers", "self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj", "input_layernorm",
               "pre_feedforward_layernorm", "model.norm", "post_attention_layernorm", "post_feedforward_layernorm"),
}  # fmt: skip
KEYS = {
    "llama": ("mlp.gate_proj", "mlp.up_proj"),
    "gemma2": ("mlp.gate_proj", "mlp.up_proj"),
    "gpt2": ("mlp.c_fc",),
    "gpt_neox": ("mlp.dense_h_to_4h",),
}
FAMILIES = tuple(PATHS)
NAMES = "blocks attn w_o mlp down attn_norm mlp_norm final_norm attn_post mlp_post".split()  # noqa: SIM905


class Plain:
    """One forward of a module with hooks of the test's own, and what it computed, everywhere.

    An edit is (layer, what, function of the (position, n) tensor in place): at "coef" (into the down-projection),
    "z" (into W_O), "attn" or "mlp" (what the sublayer returns, before a post-norm), "pre", "added_attn",
    "added_mlp" (what reaches the stream).
    """

    def __init__(self, family, ids, edits=()):
        self.family, self.ids, self.module = family, ids, shared(family).module
        self.where = dict(zip(NAMES, PATHS[family], strict=True))
        self.got, handles = {}, []
        self.n_layers = self.module.config.num_hidden_layers
        try:
            for layer, what, change in edits:
                handles.append(self.hook(layer, what, change))
            for layer in range(self.n_layers):
                kept = ("pre", "coef", "z", "attn", "mlp", "added_attn", "added_mlp")
                handles += [self.hook(layer, what, None) for what in kept]
                handles.append(self.part(layer, "attn").register_forward_hook(self.keep_call(layer), with_kwargs=True))
            final = self.module.get_submodule(self.where["final_norm"])
            handles.append(final.register_forward_pre_hook(lambda m, a: self.got.update(final=a[0][0])))
            handles.append(self.module.lm_head.register_forward_hook(lambda m, a, out: self.got.update(bs=out[0])))
            with torch.no_grad():
                self.module(torch.tensor([ids]), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    def __getitem__(self, key):
        return self.got[key]

    def part(self, layer, name):
        path = f"{self.where['blocks']}.{layer}"
        return self.module.get_submodule(path if name is None else f"{path}.{self.where[name]}")

    def hook(self, layer, what, change):
        name = what.removeprefix("added_")
        place = {"pre": None, "coef": "down", "z": "w_o", "attn": "attn", "mlp": "mlp"}[name]
        if what.startswith("added_") and self.where[f"{name}_post"]:
            place = f"{name}_post"

        def on(value):
            flat = value.clone()
            if change is None:
                self.got[what, layer] = flat.reshape(len(self.ids), -1)
                return None
            change(flat.view(len(self.ids), -1))
            return flat

        def before(module, args, kwargs):
            held = args[0] if args else kwargs["hidden_states"]
            if (new := on(held)) is not None:
                return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})
            return None

        def after(module, args, out):
            new = on(out[0] if isinstance(out, tuple) else out)
            return None if new is None else (new, *out[1:]) if isinstance(out, tuple) else new

        if what in ("pre", "coef", "z"):
            return self.part(layer, place).register_forward_pre_hook(before, with_kwargs=True)
        return self.part(layer, place).register_forward_hook(after)

    def keep_call(self, layer):
        def hook(module, args, kwargs, out):
            self.got["call", layer] = (args, kwargs)

        return hook

    def stream(self, layer, part):
        """What a sublayer's norm reads, at all positions."""
        if part == "unembed":
            return self["final"]
        parallel = self.family == "gpt_neox"
        return self["pre", layer] if part == "attn" or parallel else self["pre", layer] + self["added_attn", layer]

    def norm_of(self, layer, part):
        if part == "unembed":
            return self.module.get_submodule(self.where["final_norm"])
        return self.part(layer, f"{part}_norm")

    def normed(self, layer, part, change, frozen):
        """N(r + change) at all positions, the scale that of r where it is frozen."""
        module, r = self.norm_of(layer, part), self.stream(layer, part)
        with torch.no_grad():
            return module(r + change) if not frozen else by_hand(module, r + change, r)

    def sublayer(self, layer, part, x):
        """The model's own sublayer on other inputs: what it returns and, for attention, what W_O reads."""
        module, seen = self.part(layer, part), []
        if part == "mlp":
            with torch.no_grad():
                return module(x[None])[0], None
        args, kwargs = self["call", layer]
        kwargs = {**kwargs, "hidden_states": x[None]} if not args else kwargs
        handle = self.part(layer, "w_o").register_forward_pre_hook(lambda m, a: seen.append(a[0][0]))
        with torch.no_grad():
            out = module(*((x[None], *args[1:]) if args else ()), **kwargs)
        handle.remove()
        return out[0][0], seen[0]

    def coefficients(self, layer, x):
        with torch.no_grad():
            return self.activated(layer, [self.part_at(layer, path)(x) for path in KEYS[self.family]])

    def part_at(self, layer, path):
        return self.part(layer, None).get_submodule(path)

    def activated(self, layer, pres):
        mlp = self.part(layer, "mlp")
        act = mlp.act if hasattr(mlp, "act") else mlp.act_fn if hasattr(mlp, "act_fn") else None
        return act(pres[0]) * (pres[1] if len(pres) > 1 else 1.0)

    # Attention, written out.

    def projected(self, layer, x):
        """(head or kv head, position, d_head) rotated queries, keys, and values of inputs x."""
        module, family = self.part(layer, "attn"), self.family
        with torch.no_grad():
            if family == "gpt2":
                q, k, v = (t.view(len(x), 3, -1).transpose(0, 1) for t in module.c_attn(x).split(x.shape[1], dim=1))
                return q, k, v
            if family == "gpt_neox":
                q, k, v = module.query_key_value(x).view(len(x), 3, -1).transpose(0, 1).chunk(3, dim=-1)
            else:
                d = module.head_dim
                q, k, v = (
                    getattr(module, f"{one}_proj")(x).view(len(x), -1, d).transpose(0, 1) for one in ("q", "k", "v")
                )
            turn = {"llama": llama_rotary, "gemma2": gemma2_rotary, "gpt_neox": gpt_neox_rotary}[family]
            cos, sin = self["call", layer][1]["position_embeddings"]
            q, k = turn(q[None], k[None], cos, sin)
            return q[0], k[0], v

    def weights(self, layer, head, q, k):
        """(position, position) weights of one head, q and k its own."""
        config = self.module.config
        scores = q @ k.T * (6**-0.5 if self.family == "gemma2" else k.shape[-1] ** -0.5)
        if self.family == "gemma2":
            scores = config.attn_logit_softcapping * torch.tanh(scores / config.attn_logit_softcapping)
        t, j = torch.arange(len(q))[:, None], torch.arange(len(k))[None]
        seen = j <= t
        if self.family == "gemma2" and config.layer_types[layer] == "sliding_attention":
            seen = seen & (t - j < config.sliding_window)
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        kind = torch.float64 if self.family == "gpt2" else torch.float32  # what each model works in
        return torch.softmax(scores, -1, dtype=kind).double()

    def kv(self, head):
        """Which KV head a head reads."""
        return head // 2 if self.family in ("llama", "gemma2") else head

    def mixed(self, layer, head, q, k, v):
        return self.weights(layer, head, q, k) @ v

    def inputs(self, layer):
        return self.projected(layer, self.normed(layer, "attn", 0.0, False))

    # Addends.

    def through(self, layer, part, v):
        """Vectors in a sublayer's output as they reach the stream: the post-norm frozen at what it reads."""
        if self.where[f"{part}_post"] is None:
            return v
        return by_hand(self.part(layer, f"{part}_post"), v, self[part, layer], bias=False)

    def addend(self, site):
        """(position, d_model) of a writer."""
        if site == "embed":
            return self["pre", 0]
        layer, part = int(site[1]), site.split(".")[1]
        if part in ("attn", "mlp") and not site.endswith("bias"):
            return self[f"added_{part}", layer]
        if site.endswith("bias"):
            bias = self.part(layer, "w_o" if part == "attn" else "down").bias.detach()
            return self.through(layer, part, bias.expand(len(self.ids), -1))
        if part[0] == "N":
            index = int(part[1:])
            rows = rows_of(self.part(layer, "down"))[index]
            return self.through(layer, "mlp", self["coef", layer][:, index : index + 1] * rows)
        head = int(re.match(r"H(\d+)", part)[1])
        z = self["z", layer].view(len(self.ids), -1, self.d_head)[:, head].clone()
        if "<" in site:
            j = int(site.split("<")[1])
            q, k, v = self.inputs(layer)
            z = self.weights(layer, head, q[head], k[self.kv(head)])[:, j, None] * v[self.kv(head)][j]
            z[:j] = 0
        if found := re.search(r"\.D(\d+)", site):
            z = z * torch.nn.functional.one_hot(torch.tensor(int(found[1])), self.d_head)
        return self.through(layer, "attn", z @ rows_of(self.part(layer, "w_o"))[self.heads(head)])

    @property
    def d_head(self):
        return 8 if self.family in ("gpt2", "gpt_neox") else 6

    def heads(self, head):
        return slice(head * self.d_head, (head + 1) * self.d_head)

    # What a reader makes of a changed stream, as edits of another forward.

    def edit(self, reader, side, frozen, change, positions):
        """Edits that put what `reader` makes of N(r + change) in its place at some positions."""
        if reader == "unembed":
            return []
        layer, name = int(reader[1]), reader.split(".")[1]
        part = "mlp" if name == "mlp" or name[0] == "N" else "attn"
        x = self.normed(layer, part, change, frozen)
        if name[0] == "N":
            index = int(name[1:])
            made = self.coefficients(layer, x)[:, index]
            return [(layer, "coef", put(made, positions, slice(index, index + 1)))]
        if name in ("mlp", "attn"):
            return [(layer, part, put(self.sublayer(layer, part, x)[0], positions))]
        head = int(re.match(r"H(\d+)", name)[1])
        if side == "all":
            return [(layer, "z", put(self.sublayer(layer, "attn", x)[1][:, self.heads(head)], positions,
                                     self.heads(head)))]  # fmt: skip
        old, new = self.inputs(layer), self.projected(layer, x)
        pick = [new[i] if side == one else old[i] for i, one in enumerate(("query", "key", "value"))]
        q, k, v = pick[0][head], pick[1][self.kv(head)].clone(), pick[2][self.kv(head)].clone()
        if "<" in name:
            j, rest = int(name.split("<")[1]), torch.arange(len(self.ids)) != int(name.split("<")[1])
            assert side in ("key", "value")
            assert rest.sum() == len(self.ids) - 1
            k[rest], v[rest] = old[1][self.kv(head)][rest], old[2][self.kv(head)][rest]
            positions = [p for p in positions if p >= j]
        made = self.mixed(layer, head, q, k, v)
        return [(layer, "z", put(made, positions, self.heads(head)))]

    def unembedded(self, frozen, change):
        with torch.no_grad():
            return self.module.lm_head(self.normed(0, "unembed", change, frozen))


def by_hand(module, v, r, bias=True):
    """A norm of v with the scale of r."""
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    gain, beta = module.weight.detach(), getattr(module, "bias", None)
    if isinstance(module, nn.LayerNorm):
        v, r = v - v.mean(-1, keepdim=True), r - r.mean(-1, keepdim=True)
    if "Gemma" in type(module).__name__:
        gain = 1 + gain
    out = gain * v / (r.square().mean(-1, keepdim=True) + eps).sqrt()
    return out if beta is None or not bias else out + beta.detach()


def rows_of(linear):
    """(input, d_model) rows that a projection writes."""
    weight = linear.weight.detach()
    return weight if type(linear).__name__ == "Conv1D" else weight.T


def put(made, positions, region=slice(None)):
    """An edit: these values at these positions."""

    def change(x):
        for p in positions:
            x[p, region] = made[p]

    return change


@cache
def plain(family, ids=IDS):
    return Plain(family, ids)


@cache
def recorded(family, t=-1, ids=IDS):
    return rs.record(shared(family), rs.Prompt(ids=list(ids), target=1, versus=[7], position=t))


def worst_of(rec, cases, *, tolerance=1e-6):
    """{name: (interventions, expected logits)}, run as rows of one batch; what is off, by name."""
    effects = rs.intervene_each(rec, [ops for ops, _ in cases.values()])
    off = {}
    for (name, (_, expected)), effect in zip(cases.items(), effects, strict=True):
        size = 1 + float(expected.abs().max())
        error = float((effect.after.bs - expected).abs().max())
        if not error <= tolerance * size:
            off[name] = f"logits off by {error:.2g}, moved by {float((expected - effect.before.bs).abs().max()):.2g}"
        table, ledger = effect.table["closure"].max(), effect.ledger()["closure"].iloc[0]
        if not max(table, ledger) <= tolerance * size:
            off[f"{name} closure"] = f"table {table:.2g}, ledger {ledger:.2g}"
    return off


def writers_before(family, reader):
    """Every kind of writer that comes before a reader."""
    layer = 2 if reader == "unembed" else int(reader[1]) - 1
    found = ["embed", *(f"L{layer}.{w}" for w in ("attn", "mlp", "N3", "H1", "H1<1", "H1.D2", "H2.D1<1"))]
    found += [f"L{layer}.mlp.bias", f"L{layer}.attn.bias"] if family != "gemma2" else []
    if reader.split(".")[-1][0] in "Nm" and reader != "unembed" and family != "gpt_neox":
        found += [f"L{layer + 1}.{w}" for w in ("attn", "H1", "H0<2", "H1.D2")]
    return found


READERS = [("L1.N7", "all"), ("L2.N11", "all"), ("L1.mlp", "all"), ("L1.attn", "all"), ("L2.attn", "all"),
           ("L1.H1", "all"), ("L1.H1", "query"), ("L1.H1", "key"), ("L1.H1", "value"), ("L2.H2", "key"),
           ("L2.H2", "query"), ("L1.H1<2", "key"), ("L1.H1<2", "value"), ("L2.H0<4", "key")]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("reader", "side"), READERS, ids=lambda x: x)
def test_a_cut_is_the_reader_reading_the_stream_without_the_writer(family, reader, side):
    p, rec = plain(family), recorded(family)
    cases, t = {}, len(IDS) - 1
    for writer in writers_before(family, reader):
        for norm in ("live", "frozen"):
            edits = p.edit(reader, side, norm == "frozen", -p.addend(writer), [t])
            cut = rs.Cut(writer, reader, side=side, norm=norm)
            cases[f"{writer} {norm}"] = (cut, Plain(family, IDS, edits)["bs"][t])
    assert worst_of(rec, cases) == {}
    assert any((expected - p["bs"][t]).abs().max() > 3e-5 for _, expected in cases.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("reader", "side"), [("L1.N7", "all"), ("L1.mlp", "all"), ("L1.attn", "all"), ("L1.H1", "all"),
                                              ("L1.H1", "query"), ("L1.H1", "key"), ("L1.H2", "value"),
                                              ("L1.H1<2", "key"), ("L1.H1<2", "value")], ids=lambda x: x)  # fmt: skip
def test_a_cut_at_earlier_positions_and_at_all_is_the_same_cut_there(family, reader, side):
    p, cases = plain(family), {}
    for t in (-1, 3):
        rec = recorded(family, t)
        for at in ([2], [2, 4], "all"):
            positions = list(range(len(IDS))) if at == "all" else at
            for writer in ("embed", "L0.mlp", "L0.H1", "L0.H1<1"):
                edits = p.edit(reader, side, False, -p.addend(writer), positions)
                cut = rs.Cut(writer, reader, side=side, positions=at)
                cases[f"{writer} {at}"] = (cut, Plain(family, IDS, edits)["bs"][rec.prompt.position])
        assert worst_of(rec, cases) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_from_the_unembedding_is_the_logits_of_the_stream_without_the_writer(family):
    p, rec, cases = plain(family), recorded(family), {}
    for writer in writers_before(family, "unembed"):
        for norm in ("live", "frozen"):
            expected = p.unembedded(norm == "frozen", -p.addend(writer))[-1]
            cases[f"{writer} {norm}"] = (rs.Cut(writer, "unembed", norm=norm), expected)
    assert worst_of(rec, cases) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_takes_out_what_the_writer_is_in_this_run(family):
    """After an operation upstream, u and r are the operated run's; two cuts in a row see each other."""
    rec, t, cases = recorded(family), len(IDS) - 1, {}
    for writer, reader, side in (("L0.mlp", "L2.N3", "all"), ("L1.mlp", "L2.H1", "key"), ("L1.attn", "L2.mlp", "all"),
                                 ("L1.H1", "L2.H1", "value"), ("L1.N4", "L2.attn", "all")):  # fmt: skip
        zero = (0, "coef", lambda x: x[:, 5].mul_(-3))
        run = Plain(family, IDS, [zero])
        edits = [zero, *run.edit(reader, side, False, -run.addend(writer), [t])]
        ops = [rs.Scale("L0.N5", -3.0, positions="all"), rs.Cut(writer, reader, side=side)]
        cases[f"scaled {writer} {reader} {side}"] = (ops, Plain(family, IDS, edits)["bs"][t])
        first = plain(family).edit("L1.mlp", "all", False, -plain(family).addend("embed"), range(t + 1))
        run = Plain(family, IDS, first)
        edits = [*first, *run.edit(reader, side, False, -run.addend(writer), [t])]
        ops = [rs.Cut("embed", "L1.mlp", positions="all"), rs.Cut(writer, reader, side=side)]
        cases[f"two cuts {writer} {reader} {side}"] = (ops, Plain(family, IDS, edits)["bs"][t])
    assert worst_of(rec, cases) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_on_the_reader_come_after_what_it_reads(family):
    p, rec, t = plain(family), recorded(family), len(IDS) - 1
    edits = p.edit("L1.N7", "all", False, -p.addend("L0.mlp"), [t])

    def half(x):
        x[t, 7] *= 0.5

    cut = rs.Cut("L0.mlp", "L1.N7")
    cases = {
        "scale": ([cut, rs.Scale("L1.N7", 0.5)], Plain(family, IDS, [*edits, (1, "coef", half)])["bs"][t]),
        "other": (
            [cut, rs.Zero("L1.N8")],
            Plain(family, IDS, [*edits, (1, "coef", put(torch.zeros(t + 1, 1), [t], slice(8, 9)))])["bs"][t],
        ),
    }
    assert worst_of(rec, cases) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_several_cuts_into_one_reader_take_out_the_sum(family):
    p, rec, t, cases = plain(family), recorded(family), len(IDS) - 1, {}
    pairs = [("embed", "L0.mlp"), ("L0.H0", "L0.H1"), ("L0.attn", "L0.N3")]
    for reader, side in (("L1.N7", "all"), ("L1.H1", "key"), ("L1.H1", "query"), ("L1.attn", "all")):
        for a, b in pairs:
            change = -p.addend(a) - p.addend(b)
            cases[f"{a} {b} {reader} {side}"] = (
                rs.Cut([a, b], reader, side=side),
                Plain(family, IDS, p.edit(reader, side, False, change, [t]))["bs"][t],
            )
    for a, b in (("L1.N7", "L1.N8"), ("L1.H0", "L1.H1"), ("L1.H1", "L1.N7"), ("L1.attn", "L1.N7")):
        if b == "L1.N7" and family != "gpt_neox":  # the neuron reads what the attention writes
            continue
        edits = [e for r in (a, b) for e in p.edit(r, "all", False, -p.addend("L0.mlp"), [t])]
        cases[f"into {a} {b}"] = (rs.Cut("L0.mlp", [a, b]), Plain(family, IDS, edits)["bs"][t])
    assert worst_of(rec, cases) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_at_frozen_norm_a_cut_changes_the_pre_activation_by_minus_the_share(family):
    p, rec, t, cases = plain(family), recorded(family), len(IDS) - 1, {}
    reader, index = "L2.N7", 7
    for grain in ("layer", "head", "head_source", "neuron"):
        table = rs.sources(rec, reader, grain=grain, top=6)
        named = table[~table["kind"].isin(["constant", "remainder"])]
        for writer in named["writer"].unique()[:6]:
            keys = list(dict.fromkeys(table["key"]))
            here = named[named["writer"] == writer].set_index("key")
            if set(here.index) != set(keys):  # among the top of one key alone
                continue
            pres = [torch.tensor(here["reading"][key] - here["share"][key]) for key in keys]
            made = p.activated(2, pres).double().expand(t + 1)
            edits = [(2, "coef", put(made, [t], slice(index, index + 1)))]
            cases[f"{grain} {writer}"] = (rs.Cut(writer, reader, norm="frozen"), Plain(family, IDS, edits)["bs"][t])
    assert len(cases) >= 6
    assert worst_of(rec, cases) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_cutting_every_source_at_frozen_norm_leaves_the_norms_constant(family):
    p, rec, t = plain(family), recorded(family), len(IDS) - 1
    writers = ["embed", "L0.attn", "L0.mlp", "L1.attn", "L1.mlp", *(["L2.attn"] if family != "gpt_neox" else [])]
    cases = {}
    beta = getattr(p.norm_of(2, "mlp"), "bias", None)
    constant = torch.zeros(24, dtype=torch.float64) if beta is None else beta.detach()
    made = p.coefficients(2, constant[None].expand(t + 1, -1))
    cases["neuron"] = (
        rs.Cut(writers, "L2.N7", norm="frozen"),
        Plain(family, IDS, [(2, "coef", put(made[:, 7], [t], slice(7, 8)))])["bs"][t],
    )
    whole, _ = p.sublayer(2, "mlp", constant[None].expand(t + 1, -1))
    cases["mlp"] = (
        rs.Cut(writers, "L2.mlp", norm="frozen"),
        Plain(family, IDS, [(2, "mlp", put(whole, [t]))])["bs"][t],
    )
    assert worst_of(rec, cases) == {}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("side", ["key", "value"])
def test_cutting_one_heads_side_leaves_the_other_head_of_its_group_alone(family, side, monkeypatch):
    """Heads 2 and 3 share a KV head: only head 2's mixed value changes."""
    rec = recorded(family)
    seen = multiplied(monkeypatch, {"z": plain(family).part(1, "w_o")})
    effect = rs.intervene(rec, rs.Cut("L0.mlp", "L1.H2", side=side))
    z = seen["z"].view(len(seen["z"]), len(IDS), 4, 6)
    changed = (z[0] - z[-1]).abs().amax(-1)
    assert changed[-1, 2] > 1e-4
    changed[-1, 2] = 0
    assert changed.max() <= 1e-14
    assert effect.table["closure"].max() <= 1e-6


def multiplied(monkeypatch, modules):
    """What nn.Linear modules multiply, last seen, by name: after all that anybody hooked in before them."""
    seen, plainly = {}, torch.nn.functional.linear

    def linear(x, weight, bias=None):
        for name, module in modules.items():
            if weight.data_ptr() == module.weight.data_ptr():
                seen[name] = x.clone()
        return plainly(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_an_edge_changes_nobody_but_its_reader(family, monkeypatch):
    rec, p = recorded(family), plain(family)
    seen = multiplied(monkeypatch, {(i, name): p.part(i, name) for i in range(3) for name in ("down", "w_o")})
    twin = [rs.Cut("L0.mlp", "L1.N3"), rs.Scale("L0.mlp->L1.N3", 1.0)]
    cut, same = rs.intervene_each(rec, twin)
    for key in ((0, "down"), (0, "w_o"), (1, "w_o")):
        torch.testing.assert_close(seen[key][0], seen[key][-1], atol=1e-14, rtol=0)
    moved = (seen[1, "down"][0] - seen[1, "down"][-1]).view(len(IDS), -1).abs() > 1e-14
    assert moved.nonzero().tolist() == [[len(IDS) - 1, 3]]
    assert (seen[2, "down"][0] - seen[2, "down"][-1]).abs().max() > 1e-4
    for one, other in ((cut.after.attn[:2], same.after.attn[:2]), (cut.after.mlp[0], same.after.mlp[0])):
        torch.testing.assert_close(one, other, atol=1e-14, rtol=0)


# Other operations along edges.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("reader", "side"), [("L1.N7", "all"), ("L1.mlp", "all"), ("L1.attn", "all"), ("L1.H1", "all"),
                                              ("L2.H1", "query"), ("L1.H2", "key"), ("L1.H1<2", "value")],
                         ids=lambda x: x)  # fmt: skip
def test_scale_steer_and_set_along_an_edge(family, reader, side):
    p, rec, t, cases = plain(family), recorded(family), len(IDS) - 1, {}
    vector = torch.randn(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for writer in ("embed", "L0.mlp", "L0.H1", "L0.N3"):
        u = p.addend(writer)
        for norm in ("live", "frozen"):
            edge = rs.Edge(writer, reader, side=side, norm=norm)
            for name, op, change in (
                ("scale", rs.Scale(edge, -1.5), -2.5 * u),
                ("steer", rs.Steer(edge, vector), vector.expand(t + 1, -1)),
                ("set", rs.Set([edge], [vector]), vector - u),
                ("scale and steer", [rs.Scale(edge, 0.5), rs.Steer(edge, vector)], vector - 0.5 * u),
            ):
                edits = p.edit(reader, side, norm == "frozen", change, [t])
                cases[f"{name} {writer} {norm}"] = (op, Plain(family, IDS, edits)["bs"][t])
    assert worst_of(rec, cases) == {}


ALIGNS = [
    (OTHER, None, [0, 1, 2, 3, 4, 5]),
    (LONGER, None, [0, 1, 2, 3, 4, 7]),
    (LONGER, "index", [0, 1, 2, 3, 4, 5]),
    (LONGER, {0: 4, 1: 1, 2: 0, 3: 6, 4: 3, 5: -1}, [4, 1, 0, 6, 3, 7]),
    ((3, 4, 11, 2, 9, 5, 30), "token", [5, 1, 0, 3, 4, 2]),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("other", "align", "counterpart"), ALIGNS, ids=["equal", "None", "index", "map", "token"])
def test_a_patch_along_an_edge_is_path_patching(family, other, align, counterpart):
    """The reader reads N(r - u + u of the donor)."""
    p, donor, rec, t, cases = plain(family), plain(family, other), recorded(family), len(IDS) - 1, {}
    given_as = rs.Prompt(ids=list(other), target=1)
    readers = (("L1.N7", "all"), ("L1.mlp", "all"), ("L1.attn", "all"), ("L1.H1", "query"), ("L1.H1", "key"),
               ("L2.H2", "value"), ("L1.H1<2", "key"))  # fmt: skip
    for reader, side in readers:
        for writer in ("embed", "L0.mlp", "L0.attn", "L0.H1", "L0.N3"):
            change = donor.addend(writer)[counterpart] - p.addend(writer)
            edits = p.edit(reader, side, False, change, [t])
            patch = rs.Patch(rs.Edge(writer, reader, side=side), given_as, align=align)
            cases[f"{writer} {reader} {side}"] = (patch, Plain(family, IDS, edits)["bs"][t])
    assert worst_of(rec, cases) == {}
    edge = rs.Edge("L0.mlp", "L1.N7", norm="frozen")
    held, run = (
        rs.intervene(rec, rs.Patch(edge, one, align=align)).after.bs
        for one in (rs.record(rec.model, given_as), given_as)
    )
    torch.testing.assert_close(held, run, atol=1e-9, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patch_into_the_unembedding_and_a_mean_along_an_edge(family):
    p, rec, t = plain(family), recorded(family), len(IDS) - 1
    prompts = [rs.Prompt(ids=list(ids), target=1) for ids in (OTHER, LONGER)]
    donors = [plain(family, ids) for ids in (OTHER, LONGER)]
    change = donors[1].addend("L1.mlp")[[0, 1, 2, 3, 4, 7]] - p.addend("L1.mlp")
    patch = rs.Patch("L1.mlp->unembed", prompts[1])
    assert worst_of(rec, {"unembed": (patch, p.unembedded(False, change)[t])}) == {}
    mean = (donors[0].addend("L0.attn")[t] + donors[1].addend("L0.attn")[-1]) / 2
    change = torch.zeros(t + 1, 24, dtype=torch.float64)
    change[t] = mean - p.addend("L0.attn")[t]
    edits = p.edit("L1.N7", "all", False, change, [t])
    cases = {"mean": (rs.Mean("L0.attn->L1.N7", prompts), Plain(family, IDS, edits)["bs"][t])}
    assert worst_of(rec, cases) == {}


# Queries, keys and values.


def attention_edited(p, layer, change):
    """Edits that put the mixed values of changed queries, keys and values in the place of all heads'."""
    q, k, v = (one.clone() for one in p.inputs(layer))
    change({"Q": q, "K": k, "V": v})
    z = torch.cat([p.mixed(layer, h, q[h], k[p.kv(h)], v[p.kv(h)]) for h in range(len(q))], dim=1)
    return [(layer, "z", put(z, range(len(p.ids))))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", ["L1.Q0", "L1.Q2", "L1.K1", "L1.V1", "L0.K0", "L2.V0", "L2.Q1"])
def test_operations_on_a_query_key_or_value_equal_attention_written_out(family, site):
    p, donor, t, cases = plain(family), plain(family, LONGER), len(IDS) - 1, {}
    layer, side, head = int(site[1]), site[3], int(site[4])
    d = p.d_head
    vector = torch.randn(d, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    theirs = donor.inputs(layer)["QKV".index(side)][head]
    for at in (t, 2, "all", [1, 4]):
        places = [t] if at == t else [2] if at == 2 else list(range(t + 1)) if at == "all" else at
        where = at if at == "all" else places
        there = [len(LONGER) - 1 if one == t else one for one in places]
        ops = {
            "zero": (rs.Zero(site, positions=where), lambda x: 0.0 * x),
            "scale": (rs.Scale(site, -1.7, positions=where), lambda x: -1.7 * x),
            "steer": (rs.Steer(site, vector, positions=where), lambda x: x + vector),
            "patch": (rs.Patch(site, rs.Prompt(ids=list(LONGER), target=1), positions=where),
                      lambda x, there=there: theirs[there]),
        }  # fmt: skip
        if at != "all":
            values = [[vector] * len(places)]
            ops["set"] = (rs.Set([site], values, positions=where), lambda x: vector.expand(len(x), -1))
        for name, (op, change) in ops.items():

            def changed(held, change=change, places=places):
                held[side][head, places] = change(held[side][head, places])

            edits = attention_edited(p, layer, changed)
            cases[f"{name} {at}"] = (op, Plain(family, IDS, edits)["bs"][t])
    assert worst_of(recorded(family), cases) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_keys_and_values_together_and_seen_from_an_earlier_position(family):
    p = plain(family)

    def changed(held):
        held["Q"][1] *= 2.0
        held["K"][1] *= -0.5
        held["V"][0, 2] *= 3.0
        held["K"][0, 1] = 0.0

    ops = [rs.Scale("L1.Q1", 2.0, positions="all"), rs.Scale("L1.K1", -0.5, positions="all"),
           rs.Scale("L1.V0@2", 3.0), rs.Zero("L1.K0@1")]  # fmt: skip
    after = Plain(family, IDS, attention_edited(p, 1, changed))["bs"]
    for t in (-1, 3):
        assert worst_of(recorded(family, t), {"all": (ops, after[t])}) == {}


# Attention weights.


def reweighted(p, layer, t, weights, renormalise):
    """Edits for {(head, source): weight} at position t."""
    q, k, v = p.inputs(layer)
    edits = []
    for head in sorted({h for h, _ in weights}):
        row = p.weights(layer, head, q[head], k[p.kv(head)])[t].clone()
        named = {j: w for (h, j), w in weights.items() if h == head}
        if renormalise:
            others = [j for j in range(len(row)) if j not in named]
            row[others] *= (row.sum() - sum(named.values())) / row[others].sum()
        for j, weight in named.items():
            row[j] = weight
        z = torch.zeros(len(p.ids), p.d_head, dtype=torch.float64)
        z[t] = row @ v[p.kv(head)]
        edits.append((layer, "z", put(z, [t], p.heads(head))))
    return edits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("renormalise", [False, True])
def test_attend_equals_attention_with_that_row_of_weights(family, renormalise):
    p, t, cases = plain(family), len(IDS) - 1, {}
    for weights in ({(2, 3): 0.0}, {(2, 3): 0.4}, {(2, 3): 1.0}, {(2, 3): -0.5}, {(2, 3): 0.1, (2, 4): 0.25},
                    {(2, 3): 0.0, (2, 5): 0.0, (1, 4): 0.7}, {(0, 4): 0.3, (1, 4): 0.3, (2, 4): 0.3}):  # fmt: skip
        for layer in (1, 2):
            for at in (t, 4):
                if any(j > at for _, j in weights):
                    continue
                ops = [rs.Attend(f"L{layer}.H{h}<{j}", w, renormalise=renormalise, positions=at)
                       for (h, j), w in weights.items()]  # fmt: skip
                edits = reweighted(p, layer, at, weights, renormalise)
                cases[f"{weights} {layer} {at}"] = (ops, Plain(family, IDS, edits)["bs"][t])
    assert worst_of(recorded(family), cases) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_attend_works_with_the_queries_and_keys_of_this_run(family):
    """Weights are renormalised from what they are after a change of the query."""
    t = len(IDS) - 1
    zero = (0, "coef", lambda x: x[:, 5].mul_(-3))
    run = Plain(family, IDS, [zero])
    edits = [zero, *reweighted(run, 1, t, {(2, 3): 0.5}, True)]
    ops = [rs.Scale("L0.N5", -3.0, positions="all"), rs.Attend("L1.H2<3", 0.5, renormalise=True)]
    cases = {"upstream": (ops, Plain(family, IDS, edits)["bs"][t])}
    assert worst_of(recorded(family), cases) == {}


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss", "afmoe", "qwen3_next", "laguna"])
def test_a_weight_of_zero_is_the_pair_removed_and_its_own_weight_changes_nothing(model_type):
    rec = opened(model_type)
    layer = max(i for i in range(rec.model.anatomy.n_layers) if rec.model.block(i).attn_kind == "attention")
    site, alpha = f"L{layer}.H1<2", float(rec.layers[layer].attention.alpha[1, 2])
    knocked, removed, same, kept, moved = rs.intervene_each(
        rec,
        [rs.Attend(site, 0.0), rs.Zero(site), rs.Attend(site, alpha), rs.Attend(site, alpha, renormalise=True),
         rs.Attend([site, f"L{layer}.H0<1"], 0.3, renormalise=True)],
    )  # fmt: skip
    same_logits(knocked.after.bs, removed.after.bs)
    for one in (same, kept):
        same_logits(one.after.bs, one.before.bs)
    assert (moved.after.bs - moved.before.bs).abs().max() > 1e-5
    for one in (knocked, removed, same, kept, moved):
        closes(one, 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_inside_an_attention_act_in_what_its_edges_make_it_read(family):
    """Weights, queries, keys and pairs are operated on in the reading without the writer."""
    p, t = plain(family), len(IDS) - 1
    u = p.addend("L0.mlp")

    def whole(change):
        """The attention on N(r - u) at t, with q, k, v and a head's weights as they are made."""
        q, k, v = p.projected(1, p.normed(1, "attn", -u, False))
        rows = [p.weights(1, h, q[h], k[p.kv(h)])[t] for h in range(len(q))]
        change(q, k, v, rows)
        z = torch.cat([row @ v[p.kv(h)] for h, row in enumerate(rows)])
        with torch.no_grad():
            made = p.part(1, "w_o")(z.expand(1, t + 1, -1))[0]
        return Plain(family, IDS, [(1, "attn", put(made, [t]))])["bs"][t]

    def weight(value):
        def change(q, k, v, rows):
            rows[1][2] = value

        return change

    def query(q, k, v, rows):
        rows[1][:] = p.weights(1, 1, 2 * q[1], k[p.kv(1)])[t]

    cut = rs.Cut("L0.mlp", "L1.attn")
    cases = {
        "attend": ([cut, rs.Attend("L1.H1<2", 0.3)], whole(weight(0.3))),
        "pair": ([cut, rs.Zero("L1.H1<2")], whole(weight(0.0))),
        "query": ([cut, rs.Scale("L1.Q1", 2.0)], whole(query)),
    }
    assert worst_of(recorded(family), cases) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_and_keys_are_operated_on_before_weights_pairs_and_edges_see_them(family):
    p, t, cases = plain(family), len(IDS) - 1, {}
    q, k, v = p.inputs(1)
    q, k, v = 2 * q[1], k[p.kv(1)], v[p.kv(1)]
    for name, op in (("pair", rs.Zero("L1.H1<2")), ("attend", rs.Attend("L1.H1<2", 0.4))):
        row = p.weights(1, 1, q, k)[t].clone()
        row[2] = 0.4 if name == "attend" else 0.0
        edits = [(1, "z", put((row @ v).expand(t + 1, -1), [t], p.heads(1)))]
        cases[name] = ([rs.Scale("L1.Q1", 2.0), op], Plain(family, IDS, edits)["bs"][t])
    theirs = p.projected(1, p.normed(1, "attn", -p.addend("L0.mlp"), False))
    for side, made in (("key", (q, theirs[1][p.kv(1)], v)), ("value", (q, k, theirs[2][p.kv(1)])),
                       ("query", (2 * theirs[0][1], k, v))):  # fmt: skip
        edits = [(1, "z", put(p.mixed(1, 1, *made), [t], p.heads(1)))]
        ops = [rs.Scale("L1.Q1", 2.0), rs.Cut("L0.mlp", "L1.H1", side=side)]
        cases[side] = (ops, Plain(family, IDS, edits)["bs"][t])
    assert worst_of(recorded(family), cases) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reader_that_is_removed_has_read_nothing(family):
    """Whole readers are operated on after what their edges make of them."""
    pairs = [("L1.H1", "all"), ("L1.H1", "key"), ("L1.N7", "all"), ("L1.mlp", "all"), ("L1.attn", "all")]
    for reader, side in pairs:
        alone, both = rs.intervene_each(
            recorded(family), [rs.Zero(reader), [rs.Cut("L0.mlp", reader, side=side), rs.Zero(reader)]]
        )
        torch.testing.assert_close(both.after.bs, alone.after.bs, atol=1e-9, rtol=0)
        closes(both, 1e-6)


# Laws.

families = st.sampled_from(FAMILIES)
ENDS = st.sampled_from([(w, *r) for r in READERS for w in ("embed", "L0.mlp", "L0.attn", "L0.N3", "L0.H1", "L0.H1<1")])
norms = st.sampled_from(["live", "frozen"])
ats = st.sampled_from(["target", "all", 3, [2, 5]])


@given(families, st.lists(ENDS, min_size=6, max_size=6), norms, ats)
def test_scale_by_one_along_an_edge_changes_nothing(family, ends, norm, at):
    edges = [rs.Edge(writer, reader, side, norm) for writer, reader, side in ends if exists(family, reader, at)]
    assume(edges)
    for effect in rs.intervene_each(recorded(family), [rs.Scale(edge, 1.0, positions=at) for edge in edges]):
        assert (effect.after.bs - effect.before.bs).abs().max() <= 1e-12
        assert effect.table[["bs_change", "direct", "post_norm", "norm_scale", "indirect"]].abs().max().max() <= 1e-12


def exists(family, reader, at):
    """Whether a (head, source) has its source at these positions."""
    least = {"target": len(IDS) - 1, "all": len(IDS) - 1, 3: 3}.get(at if isinstance(at, (str, int)) else None, 2)
    return int(reader.partition("<")[2] or 0) <= least


@given(families, ENDS, norms, ats, st.floats(-2, 2))
def test_cut_is_zero_is_scale_by_zero_and_shares_of_an_edge_combine(family, ends, norm, at, factor):
    writer, reader, side = ends
    assume(exists(family, reader, at))
    edge = rs.Edge(writer, reader, side, norm)
    ops = [rs.Cut(writer, reader, side=side, norm=norm, positions=at), rs.Zero(edge, positions=at),
           rs.Cut(str(edge), positions=at), rs.Scale(edge, 0.0, positions=at)]  # fmt: skip
    assert ops[0] == ops[2]
    effects = rs.intervene_each(recorded(family), ops)
    for one in effects[1:]:
        assert torch.allclose(one.after.bs, effects[0].after.bs, atol=1e-12)
    twice, once = rs.intervene_each(
        recorded(family),
        [[rs.Scale(edge, factor, positions=at), rs.Scale(edge, 3.0, positions=at)],
         rs.Scale(edge, 3 * factor, positions=at)],
    )  # fmt: skip
    assert torch.allclose(twice.after.bs, once.after.bs, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("at", "norm"), [("target", "live"), (3, "frozen"), ("all", "live")])
def test_into_all_parts_is_into_the_whole(family, at, norm):
    """All heads are the attention, all neurons the MLP."""
    rec = recorded(family)
    for writer in ("embed", "L0.H1"):
        for parts, whole in (([f"L1.H{h}" for h in range(rec.model.anatomy.n_heads)], "L1.attn"),
                             ([f"L1.N{i}" for i in range(40)], "L1.mlp")):  # fmt: skip
            many, one = rs.intervene_each(
                rec, [rs.Cut(writer, readers, norm=norm, positions=at) for readers in (parts, whole)]
            )
            torch.testing.assert_close(many.after.bs, one.after.bs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("at", ["target", "all"])
def test_every_source_of_a_side_is_that_side(family, side, at):
    """All keys of a head read otherwise in one softmax, not each in one of its own."""
    rec = recorded(family)
    sources = [f"L1.H1<{j}" for j in range(len(IDS))]
    many, one = rs.intervene_each(
        rec, [rs.Cut("L0.mlp", readers, side=side, positions=at) for readers in (sources, "L1.H1")]
    )
    torch.testing.assert_close(many.after.bs, one.after.bs, atol=1e-6, rtol=1e-6)


def head_read(p, layer, head, t, query=0.0, key=0.0, value=0.0, keys=slice(None), values=slice(None)):
    """An edit: one head at t with all of these changes of what its query, keys and values read."""
    q, k, v = ([*sides] for sides in (p.inputs(layer),) * 3)
    changed = [p.projected(layer, p.normed(layer, "attn", one, False)) for one in (query, key, value)]
    q, k, v = changed[0][0][head], k[1][p.kv(head)].clone(), v[2][p.kv(head)].clone()
    k[keys], v[values] = changed[1][1][p.kv(head)][keys], changed[2][2][p.kv(head)][values]
    return [(layer, "z", put(p.mixed(layer, head, q, k, v), [t], p.heads(head)))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", ["two keys", "key and value", "query and key", "query, key and value", "all and key"])
def test_sides_of_one_head_are_read_together_or_refused(family, case):
    p, rec, t = plain(family), recorded(family), len(IDS) - 1
    u = p.addend("L0.mlp")
    half = {side: rs.Scale(rs.Edge("L0.mlp", "L1.H1", side), 0.5) for side in ("all", "query", "key", "value")}
    ops, edits = {
        "two keys": ([rs.Cut("L0.mlp", ["L1.H1<1", "L1.H1<3"], side="key")],
                     head_read(p, 1, 1, t, key=-u, keys=[1, 3])),
        "key and value": ([rs.Cut("L0.mlp", "L1.H1<1", side="key"), rs.Cut("L0.mlp", "L1.H1<3", side="value")],
                          head_read(p, 1, 1, t, key=-u, value=-u, keys=[1], values=[3])),
        "query and key": ([half["query"], half["key"]], head_read(p, 1, 1, t, query=-u / 2, key=-u / 2)),
        "query, key and value": ([half["query"], half["key"], half["value"]],
                                 head_read(p, 1, 1, t, query=-u / 2, key=-u / 2, value=-u / 2)),
        "all and key": ([half["all"], half["key"]], head_read(p, 1, 1, t, query=-u / 2, key=-u * 0.75, value=-u / 2)),
    }[case]  # fmt: skip
    together_or_refused(rec, case, ops, Plain(family, IDS, edits)["bs"][t])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("whole", "part"), [("L1.mlp", "L1.N7"), ("L1.attn", "L1.H1")])
def test_a_reader_inside_another_reads_both_changes_or_is_refused(family, whole, part):
    p, rec, t = plain(family), recorded(family), len(IDS) - 1
    u, name = p.addend("L0.mlp"), whole[3:]
    once, twice = (p.edit(part, "all", False, change, [t]) for change in (-u / 2, -u * 0.75))
    made = Plain(family, IDS, p.edit(whole, "all", False, -u / 2, [t]))[name, 1]
    made = made + Plain(family, IDS, twice)[name, 1] - Plain(family, IDS, once)[name, 1]
    ops = [rs.Scale(f"L0.mlp->{whole}", 0.5), rs.Scale(f"L0.mlp->{part}", 0.5)]
    together_or_refused(rec, part, ops, Plain(family, IDS, [(1, name, put(made, [t]))])["bs"][t])


def together_or_refused(rec, name, ops, expected):
    try:
        off = worst_of(rec, {name: (ops, expected)})
    except rs.InterventionError:
        return
    assert off == {}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("at", "norm"), [("target", "live"), (3, "frozen")])
def test_all_parts_of_a_writer_are_the_writer(family, at, norm):
    rec = recorded(family)
    bias = [] if family == "gemma2" else ["L0.attn.bias"]
    heads = [f"L0.H{h}" for h in range(rec.model.anatomy.n_heads)]
    neurons = [f"L0.N{i}" for i in range(40)] + ([] if family == "gemma2" else ["L0.mlp.bias"])
    for parts, whole in (([*heads, *bias], "L0.attn"), (neurons, "L0.mlp")):
        for reader, side in (("L1.N7", "all"), ("L1.H1", "key"), ("L1.attn", "all")):
            many, one = rs.intervene_each(
                rec, [rs.Cut(writers, reader, side=side, norm=norm, positions=at) for writers in (parts, whole)]
            )
            torch.testing.assert_close(many.after.bs, one.after.bs, atol=1e-6, rtol=1e-6)


# What cannot be.


@pytest.mark.parametrize(
    ("family", "make", "said"),
    [
        ("llama", lambda: rs.Cut("L2.mlp", "L1.N3"), r"L2\.mlp->L1\.N3.*must come before its reader"),
        ("llama", lambda: rs.Cut("L1.mlp", "L1.N3"), r"L1\.mlp is not in what L1\.N3 reads"),
        ("llama", lambda: rs.Cut("L1.attn", "L1.H0"), "must come before"),
        ("llama", lambda: rs.Cut("L1.mlp", "L1.H0", side="key"), "must come before"),
        ("gpt_neox", lambda: rs.Cut("L1.attn", "L1.N3"), r"L1\.attn is not in what L1\.N3 reads"),
        ("gpt_neox", lambda: rs.Cut("L1.H1", "L1.mlp"), r"L1\.H1 is not in what L1\.mlp reads"),
        ("llama", lambda: rs.Cut("L0.mlp", "L1.N3", side="key"), r"`side` must be 'all' for `L1\.N3`"),
        ("llama", lambda: rs.Cut("L0.mlp", "L1.H1<2"), "the query has no source"),
        ("llama", lambda: rs.Cut("L0.mlp", "L1.H1<2", side="query"), "the query has no source"),
        ("llama", lambda: rs.Cut("L0.mlp", "embed"), "`reader` must be"),
        ("llama", lambda: rs.Cut("unembed", "L1.N3"), "`writer` must be"),
        ("llama", lambda: rs.Cut("L0.resid_post", "L1.N3"), "`writer` must be"),
        ("llama", lambda: rs.Cut("L0.mlp"), "edge"),
        ("llama", lambda: rs.Cut("L0.mlp", "L1.N40"), r"`index` must be in 0\.\.39"),
        ("llama", lambda: rs.Cut("L0.mlp", "L1.H1<5", side="key", positions=3), "causal"),
        ("llama", lambda: rs.Cut("L0.H1<5", "L1.N3", positions=3), "causal"),
        ("llama", lambda: rs.Cut("L0.mlp", "L1.H1<9", side="key"), "9|causal"),
        ("llama", lambda: rs.Attend("L1.H1", 0.3), r"\(head, source\)"),
        ("llama", lambda: rs.Zero("L1.K2"), r"`head` must be in 0\.\.1"),
        ("llama", lambda: rs.Cut("L0.mlp", "L1.N3", norm="cold"), "`norm` must be"),
    ],
    ids=lambda one: None if callable(one) else str(one),
)
def test_impossible_edges_say_why(family, make, said):
    with pytest.raises(rs.SiteError, match=said):
        rs.intervene(recorded(family), make())


CONFLICTS = [
    (rs.Cut("L0.mlp", "L2.N3"), rs.Scale("L0.mlp->L2.N3", 2.0)),
    (rs.Cut("L0.mlp", "L2.N3"), rs.Cut("L0.N1", "L2.N3")),
    (rs.Cut("L0.attn", "L2.H1"), rs.Cut("L0.H2", "L2.H1")),
    (rs.Cut("L0.H1", "L2.N3"), rs.Cut("L0.H1<2", "L2.N3")),
    (rs.Cut("L0.mlp", "L2.N3"), rs.Cut("L0.attn", "L2.N3", norm="frozen")),
    (rs.Cut("L0.mlp", "L2.mlp"), rs.Cut("L0.attn", "L2.N3")),
    (rs.Cut("L0.mlp", "L2.attn"), rs.Cut("L0.attn", "L2.H1")),
    (rs.Cut("L0.mlp", "L2.H1"), rs.Cut("L0.mlp", "L2.H1", side="key")),
    (rs.Cut("L0.mlp", "L2.H1", side="key"), rs.Attend("L2.H1<2", 0.3)),
    (rs.Cut("L0.mlp", "L2.H1"), rs.Attend("L2.H1<2", 0.3)),
    (rs.Cut("L0.mlp", "L2.H1"), rs.Zero("L2.H1<2")),
    (rs.Cut("L0.mlp", "L2.H1", side="value"), rs.Zero("L2.H1<2")),
    (rs.Attend("L2.H1<2", 0.3), rs.Attend("L2.H1<2", 0.4)),
    (rs.Attend("L2.H1<2", 0.3, renormalise=True), rs.Attend("L2.H1<3", 0.4)),
    (rs.Zero("L1.K1"), rs.Scale("L1.K1", 2.0)),
]


@pytest.mark.parametrize(("one", "other"), CONFLICTS, ids=str)
def test_edges_that_contradict_are_refused_and_both_named(one, other):
    for pair in ([one, other], [other, one]):
        with pytest.raises(rs.InterventionError) as caught:
            rs.intervene(recorded("llama"), pair)
        for op in pair:
            assert op.brief in str(caught.value)


@pytest.mark.parametrize("model_type", ["bloom", "gptj", "mpt", "codegen"])
def test_queries_and_keys_of_models_that_give_their_weights_are_refused_or_exact(model_type):
    """Where only weights are to be had, sides and sites of the score are refused, and the rest works."""
    rec = opened(model_type)
    if rec.layers[1].attention.from_scores:
        pytest.skip("its attention goes by queries and keys")
    for op in (rs.Zero("L1.Q0"), rs.Zero("L1.K0"), rs.Cut("L0.mlp", "L1.H1", side="query"),
               rs.Cut("L0.mlp", "L1.H1", side="key"), rs.Cut("L0.mlp", "L1.H1<2", side="key")):  # fmt: skip
        with pytest.raises(rs.SiteError, match=r"cannot be operated on.*attention weights"):
            rs.intervene(rec, op)
    for effect in rs.intervene_each(rec, [rs.Cut("L0.mlp", "L1.H1", side="value"), rs.Cut("L0.mlp", "L1.H1"),
                                          rs.Attend("L1.H1<2", 0.4)]):  # fmt: skip
        assert (effect.after.bs - effect.before.bs).abs().max() > 1e-6
        closes(effect, 1e-5)


# Other families, end to end.

TYPES = ("afmoe", "bloom", "cohere", "deepseek_v3", "falcon", "gemma3_text", "gpt_oss", "gptj", "granite", "mixtral",
         "nemotron_h", "olmo2", "opt", "phi", "qwen3", "qwen3_moe", "qwen3_next", "stablelm")  # fmt: skip


@cache
def opened(model_type):
    from resid_surgery.models.zoo import tiny

    model = rs.load(tiny(model_type, dtype=torch.float64))
    ids = [one % VOCAB for one in IDS] if model.vocab_size >= VOCAB else [one % model.vocab_size for one in IDS]
    return rs.record(model, rs.Prompt(ids=ids, target=1, versus=[7]))


def same_logits(a, b, tolerance=1e-6):
    size = float(b.abs().max())
    torch.testing.assert_close(a, b, atol=tolerance * size, rtol=0)


def closes(effect, tolerance):
    size = 1 + float(effect.after.bs.abs().max())
    assert effect.table["closure"].max() <= tolerance * size
    assert effect.ledger()["closure"].iloc[0] <= tolerance * size


def sublayers(model):
    """(layer, part) of all sublayers that are there."""
    return [(i, part) for i in range(model.anatomy.n_layers) for part in ("attn", "mlp")
            if getattr(model.block(i), f"{part}_kind") != "none"]  # fmt: skip


@pytest.mark.parametrize("model_type", TYPES)
def test_cutting_a_writer_from_every_reader_is_the_model_without_it(model_type):
    """Everybody reads N(r - u): exactly what they read when u was never written."""
    rec = opened(model_type)
    model = rec.model
    places = sublayers(model)
    cases = []
    for writer in ("embed", *(f"L{i}.{part}" for i, part in places[:3])):
        layer, part = (-1, "mlp") if writer == "embed" else (int(writer[1]), writer.split(".")[1])
        readers = [
            f"L{i}.{p}"
            for i, p in places
            if i > layer or (i == layer and part == "attn" and p == "mlp" and model.anatomy.between(i))
        ]
        ops = [rs.Cut(writer, "unembed")] + ([rs.Cut(writer, readers, positions="all")] if readers else [])
        cases.append((writer, ops))
    for writer, ops in cases:
        cut, zeroed = rs.intervene_each(rec, [ops, rs.Zero(writer, positions="all")])
        if not zeroed.after.bs.any():  # no biases anywhere: a norm of nothing is all rounding
            continue
        same_logits(cut.after.bs, zeroed.after.bs)
        assert (zeroed.after.bs - zeroed.before.bs).abs().max() > 1e-3, writer


@pytest.mark.parametrize("model_type", TYPES)
def test_edges_into_every_kind_of_reader_close(model_type):
    rec = opened(model_type)
    model = rec.model
    places = sublayers(model)
    first = next(i for i, part in places if part == "mlp")
    writer = f"L{first}.mlp"
    attention = next(i for i in range(model.anatomy.n_layers) if i > first and model.block(i).attn_kind == "attention")
    scored = rec.layers[attention].attention.from_scores
    ops = [rs.Cut(writer, f"L{attention}.{reader}", side=side, norm=norm, positions=at)
           for reader, side in (("attn", "all"), ("H1", "all"), ("H1", "query"), ("H1", "key"), ("H1", "value"),
                                ("H1<2", "key"), ("H1<2", "value")) if scored or side in ("all", "value")
           for norm in ("live", "frozen") for at in ("target", "all")]  # fmt: skip
    for i in range(first + 1, model.anatomy.n_layers):
        if model.block(i).mlp_kind == "none":
            continue
        ops.append(rs.Cut(writer, f"L{i}.mlp"))
        for group in rec.layers[i].groups[:3]:
            name = {None: "N3", "shared": "shared.N3"}.get(group.expert, f"E{group.expert}.N3")
            if not (group.expert is None and model.has(i, "coef_norm")):
                ops += [rs.Cut(writer, f"L{i}.{name}", norm=norm) for norm in ("live", "frozen")]
                ops.append(rs.Steer(f"{writer}->L{i}.{name}", torch.ones(model.anatomy.d_model)))
    effects = rs.intervene_each(rec, ops)
    for effect in effects:
        assert effect.after.bs.isfinite().all()
        closes(effect, 1e-5)
    assert sum(bool((e.after.bs - e.before.bs).abs().max() > 1e-6) for e in effects) > len(ops) // 2
    for one in rs.intervene_each(rec, [rs.Scale(op.sites, 1.0) for op in ops]):
        assert (one.after.bs - one.before.bs).abs().max() <= 1e-7


@pytest.mark.parametrize("model_type", TYPES)
def test_all_heads_are_the_attention_in_every_family(model_type):
    rec = opened(model_type)
    model = rec.model
    first = next(i for i, part in sublayers(model) if part == "mlp")
    layer = next(i for i in range(model.anatomy.n_layers) if i > first and model.block(i).attn_kind == "attention")
    heads = [f"L{layer}.H{h}" for h in range(model.anatomy.sizes[layer].n_heads)]
    parts, whole = rs.intervene_each(
        rec, [rs.Cut(f"L{first}.mlp", readers, positions="all") for readers in (heads, f"L{layer}.attn")]
    )
    same_logits(parts.after.bs, whole.after.bs)


@pytest.mark.parametrize("model_type", TYPES)
def test_a_query_scaled_is_the_keys_scaled_in_every_family(model_type):
    """Scores are products: every key of the group times c is every query of it times c."""
    rec = opened(model_type)
    model = rec.model
    layer = next(i for i in range(model.anatomy.n_layers) if model.block(i).attn_kind == "attention")
    if not rec.layers[layer].attention.from_scores:
        return
    size = model.anatomy.sizes[layer]
    group = size.n_heads // size.n_kv_heads
    queries, keys = rs.intervene_each(
        rec,
        [rs.Scale([f"L{layer}.Q{h}" for h in range(group)], 1.7, positions="all"),
         rs.Scale(f"L{layer}.K0", 1.7, positions="all")],
    )  # fmt: skip
    same_logits(queries.after.bs, keys.after.bs)
    closes(queries, 1e-5)
    closes(keys, 1e-5)
    assert (keys.after.bs - keys.before.bs).abs().max() > 1e-5
