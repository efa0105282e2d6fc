"""`check`: every line of the mathematics, measured on one model.

Each row is one identity with its error relative to the largest term and the tolerance that the
dtype allows. `resid_surgery.load` has already refused a model whose sums (lines 1-4, and the
pre-activations of line 8) do not close; here the scores, bounds, sources and interventions that
stand on them are measured as well.
"""

import itertools
from collections.abc import Iterator

import pandas as pd
import torch
from torch import Tensor

from resid_surgery.attribution.locating import locate
from resid_surgery.attribution.mlp_readers import NeuronSite
from resid_surgery.attribution.scores import scores
from resid_surgery.attribution.searching import rank
from resid_surgery.attribution.sources import sources
from resid_surgery.attribution.states import States, logsumexp_
from resid_surgery.errors import UnsupportedModelError
from resid_surgery.models.envoys import Values
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.taps import Tap
from resid_surgery.models.tracing import forward
from resid_surgery.sites import ExpertNeuron, Neuron, SharedNeuron
from resid_surgery.stream.blocks import PostMap
from resid_surgery.stream.closing import Closure, closures, probe, relative
from resid_surgery.stream.kinds import neuron_block, neuron_site
from resid_surgery.stream.recording import Recording, closure_tolerance, need_model, record_bound
from resid_surgery.stream.subvalues import addends, candidates, need_group, read_by
from resid_surgery.stream.vocabulary import Readout
from resid_surgery.surgery.effects import PARTS, Effect, intervene_each
from resid_surgery.surgery.interventions import Scale, Zero
from resid_surgery.surgery.sweeping import sweep


def check(model: OpenedModel) -> pd.DataFrame:
    """Measure every line of the mathematics on a model, with one short fixed prompt.

    Args:
        model: from `resid_surgery.load`.

    Returns:
        Columns: line, identity, layer (the worst, or <NA>), error (relative to the largest term),
        tolerance (what the dtype allows), ok, dtype.

    Raises:
        ArgumentError: not an opened model.
    """
    need_model(model)
    rows = list(_all(model))
    table = pd.DataFrame(
        {
            "line": [r.line for r in rows],
            "identity": [r.identity for r in rows],
            "layer": pd.array([r.layer for r in rows], dtype="Int64"),
            "error": [r.error for r in rows],
            "tolerance": [r.tolerance for r in rows],
            "ok": [r.holds for r in rows],
        }
    )
    table["dtype"] = str(model.dtype).removeprefix("torch.")
    return table.sort_values(
        "line", key=lambda c: c.str.split("-").str[0].astype(int), kind="stable", ignore_index=True
    )


def _all(model: OpenedModel) -> Iterator[Closure]:
    rec, values = probe(model)
    yield from closures(rec, values)
    yield from _scores(rec)
    yield from _certificates(rec)
    yield from _sources(rec)
    yield from _effects(rec)


def _scores(rec: Recording) -> Iterator[Closure]:
    readout, tol = Readout.of(rec), closure_tolerance(rec.model)
    parts = torch.cat([block.all_vectors() for block in addends(rec)])
    a, b = parts[1], parts[2]
    both = readout.bs(torch.stack([a + b, a, b]))
    yield Closure("4", "bs(a + b) = bs(a) + bs(b)", None, relative(both[1] + both[2], both[0], both), tol)
    yield Closure("5", "worked numbers: .665, .665, .665, .879, .946", None, _worked(), 5e-4)
    states = States.of(rec, [(0, "attn" if rec.model.block(0).attn_kind != "none" else "mlp")], own=False)
    one = torch.tensor([0])
    yield Closure("6", "C(0) = 0", None, abs(float(states.evaluate(one, torch.zeros_like(parts[:1])))), tol)
    if not rec.model.anatomy.carries:  # a block that multiplies its stream moves log p by itself
        telescoped = _telescoping(rec)
        yield Closure("6", "layer scores telescope to log p(final) - log p(embedding)", None, telescoped, 10 * tol)


def _worked() -> float:
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    added = torch.tensor([[0, 0, 0], [5, 5, 5], [1, 1, 1], [1, 4, 5], [4, 1, 5]], dtype=torch.float64)
    z = x + added
    p3 = (z[:, 2] - logsumexp_(z.clone())).exp()
    return float((p3 - torch.tensor([0.665, 0.665, 0.665, 0.879, 0.946], dtype=torch.float64)).abs().max())


def _telescoping(rec: Recording) -> float:
    """Sum of the layers' scores against the whole; a parallel block scores its two outputs jointly."""
    a = rec.model.anatomy
    places = [(layer, part) for layer in range(a.n_layers) for part in ("attn", "mlp")]
    total, largest = 0.0, 0.0
    states = States.of(rec, places, own=False)
    for layer in range(a.n_layers):
        record = rec.layers[layer]
        outs = [rec.work(record.attn_out), rec.work(record.mlp_out)]
        steps = [("attn", outs[0]), ("mlp", outs[1])] if a.between(layer) else [("attn", outs[0] + outs[1])]
        for part, v in steps:
            c = float(states.evaluate(torch.tensor([states.index[layer, part]]), v[None]))
            total, largest = total + c, max(largest, abs(c))
    readout, w = Readout.of(rec), rec.prompt.target
    ends = torch.stack([rec.work(rec.embed), rec.work(rec.resid_final)])
    log_p = torch.log_softmax(readout.cap(readout.state(ends)), -1)[:, w]
    rest = float(log_p[1] - log_p[0])
    rounding = sum(float(block.all_vectors().abs().max()) for block in addends(rec) if block.kind == "rounding")
    return max(0.0, abs(total - rest) - 10 * rounding) / max(1.0, largest)


def _certificates(rec: Recording) -> Iterator[Closure]:
    for norm, kind in itertools.product(("frozen", "own"), ("neuron", "head_source")):
        having = [i for i in range(rec.model.anatomy.n_layers) if candidates(rec, kind, i)]
        for layer in having[-1:]:
            exact = scores(rec, kind=kind, norm=norm, layers=[layer], progress=False)
            values = torch.tensor(exact["log_prob_increase"].to_numpy()).to(rec.model.work_dtype)
            bounds = scores(rec, kind=kind, norm=norm, layers=[layer], bounds=True)
            low, high = (torch.tensor(bounds[f"log_prob_increase_{side}"].to_numpy()) for side in ("lower", "upper"))
            for name, above in (("C <= upper bound", values - high), ("lower bound <= C", low - values)):
                yield Closure("7", f"{name}, {kind}, {norm} norm", layer, max(0.0, float(above.max())), 0.0)
            k = min(5, len(values))
            for name, worst in (("top", False), ("worst", True)):
                found = locate(rec, k=k, kind=kind, norm=norm, layers=[layer], worst=worst)
                wanted = exact["site"].iloc[rank(values, descending=not worst)[:k]].tolist()
                same = [str(site) for site in found.sites] == wanted
                yield Closure("7", f"certified {name} 5 = exhaustive {name} 5, {kind}, {norm} norm", layer,
                              0.0 if same else 1.0, 0.0)  # fmt: skip


def _sources(rec: Recording) -> Iterator[Closure]:
    tol, layer = closure_tolerance(rec.model), _last_with_keys(rec)
    if layer is None:
        yield from _sides(rec)
        return
    block = neuron_block(rec, layer)
    readers = [block.site(i) for i in range(0, block.count, max(1, block.count // 8))]
    for grain in ("layer", "subvalue"):
        table = sources(rec, readers, grain=grain)
        largest = float(table["share"].abs().max())
        yield Closure("8", f"shares + constant = pre-activation, {grain} grain", layer,
                      float(table["closure"].max()) / largest, tol)  # fmt: skip
    yield from _sides(rec)
    dense = [i for i in range(rec.model.anatomy.n_layers) if rec.model.has(i, "key0")]
    if dense:
        yield Closure("10", "reading N(r - u) mid-forward changes a pre-activation by minus u's share", dense[-1],
                      _cut(rec, dense[-1]), tol)  # fmt: skip


def _sides(rec: Recording) -> Iterator[Closure]:
    """Value sides of all heads of the last attention layer, and a query and a key side where scores are to be had."""
    layers = [i for i, one in enumerate(rec.layers) if one.attention is not None]
    if not layers:
        return
    layer, tol = layers[-1], closure_tolerance(rec.model)
    whole = record_bound(rec.model, rec.prompt, every=True)
    asked = {"value": (f"L{layer}.H*", "what heads write")}
    one = rec.layers[layer].attention
    if one is not None and one.query is not None and one.from_scores:
        asked |= {side: (f"L{layer}.H0<0", f"score, {side} side") for side in ("query", "key")}
    for side, (reader, name) in asked.items():
        try:
            table = sources(whole, reader, side=side)
        except UnsupportedModelError:  # taken in apart, or shared with another layer: `sources` says so
            continue
        largest = max(1e-30, float(table["share"].abs().max()))
        yield Closure("8", f"shares + constant = {name}", layer, float(table["closure"].max()) / largest, 10 * tol)


def _last_with_keys(rec: Recording) -> int | None:
    known = [i for i, one in enumerate(rec.layers) if one.groups and all(g.pre_activations for g in one.groups)]
    return known[-1] if known else None


def _cut(rec: Recording, layer: int) -> float:
    """Make the MLP of a layer read the stream without its largest addend, scale frozen; measure."""
    model, t = rec.model, rec.prompt.position
    norm, state = model.norm(layer, "mlp_norm"), read_by(rec, layer, "mlp")
    vectors = torch.cat([block.all_vectors() for block in addends(rec, before=(layer, "mlp"))])
    u = vectors[int(vectors.norm(dim=-1).argmax())]
    missing = norm.linear(u, norm.scale(state))

    def without(found: Tensor, seen: Values) -> Tensor:
        left = found.clone()
        left[0, t] = (rec.work(left[0, t]) - missing).to(left)
        return left

    ids = torch.tensor([rec.prompt.ids], device=rec.layers[0].resid_pre.device)
    key = Tap("key0", layer)
    measured = rec.work(forward(model, ids, [key], {Tap("mlp_read", layer): without}, at=t)[key][0, 0])
    rows = rec.work(model.rows(layer, "key0").rows)
    clean = rec.work(rec.layers[layer].groups[0].pre_activations[0])
    largest = (rows.abs().max() * rec.work(norm(state)).abs().max())[None]
    return relative(measured - clean, -(missing @ rows), clean, largest)


def _effects(rec: Recording) -> Iterator[Closure]:
    """Line 9 for a no-op, a neuron of every kind, a (head, source) pair, a head and a sublayer; line 11."""
    tol, size = closure_tolerance(rec.model), float(rec.bs_values.abs().max())
    neurons, rows = _tried(rec)
    noop, *tried = intervene_each(rec, [Scale(neurons[0] if neurons else "embed", 1.0), *rows.values()], movers=3)
    effects = dict(zip(rows, tried, strict=True))
    yield Closure("9", "a no-op changes no column", None,
                  float(noop.table[["bs_change", *PARTS]].abs().max().max()) / size, tol)  # fmt: skip
    for name, effect in effects.items():
        moved = max(size, float(effect.after.bs.abs().max()))
        yield Closure("9", f"direct + post_norm + norm_scale + indirect = measured change, {name}", None,
                      float(effect.table["closure"].max()) / moved, tol)  # fmt: skip
        yield Closure("9", f"ledger sums to the measured change, {name}", None,
                      float(effect.ledger()["closure"].max()) / moved, tol)  # fmt: skip
        again = intervene_each(rec, [rows[name]], movers=3)[0]
        yield Closure("9", f"a row of a batch = the same row alone, {name}", None,
                      relative(effect.after.bs, again.after.bs), 10 * tol)  # fmt: skip
    sublayer = next(iter(rows["sublayer"].sites))
    earlier = Zero(sublayer, positions=max(0, rec.prompt.position - 1))
    table = sweep(rec, [*rows.values(), earlier], measure="bs", progress=False)
    found = torch.tensor(table["bs_target"].to_numpy())
    alone = [*effects.values(), intervene_each(rec, [earlier], movers=0)[0]]
    wanted = torch.stack([effect.after.bs[rec.prompt.target] for effect in alone]).cpu()
    yield Closure("9", "rows of a sweep = the same rows alone", None,
                  relative(found, wanted, rec.bs_values.cpu()), 10 * tol)  # fmt: skip
    for site in neurons:
        name = _names(site)
        yield Closure("11", f"zeroing a coefficient changes mlp_out as predicted, {name}", site.layer,
                      _predicted(rec, effects[name], site), tol)  # fmt: skip


def _tried(rec: Recording) -> tuple[list[NeuronSite], dict[str, Zero]]:
    """The strongest neuron of every kind, and interventions by name."""
    rows: dict[str, Zero] = {}
    neurons: list[NeuronSite] = []
    for layer, one in enumerate(rec.layers):
        for group in one.groups:
            site = neuron_site(layer, group.expert, int(group.coefficient.abs().argmax()))
            assert isinstance(site, (Neuron, ExpertNeuron, SharedNeuron))
            if _names(site) not in rows and float(group.coefficient.abs().max()) > 0:
                neurons.append(site)
                rows[_names(site)] = Zero(site)
    attention = [i for i, one in enumerate(rec.layers) if one.attention is not None]
    if attention:
        last = rec.model.anatomy.sizes[attention[0]].n_heads - 1
        rows |= {"(head, source)": Zero(f"L{attention[-1]}.H0<0"), "head": Zero(f"L{attention[0]}.H{last}")}
    writer = next(p for p in ("attn", "mlp") if getattr(rec.model.block(0), f"{p}_kind") != "none")
    return neurons, rows | {"sublayer": Zero(f"L0.{writer}")}


def _names(site: NeuronSite) -> str:
    return {Neuron: "neuron", ExpertNeuron: "expert's neuron", SharedNeuron: "shared neuron"}[type(site)]


def _predicted(rec: Recording, effect: Effect, site: NeuronSite) -> float:
    """Predicted mlp_out without a neuron, through the live post-norm, against the measured one."""
    record, group = rec.layers[site.layer], need_group(rec, site)
    row = rec.work(rec.model.group_rows(site.layer, group.expert).rows[site.index])
    raw = rec.work(record.mlp_raw) - group.factor * rec.work(group.coefficient[site.index]) * row
    post = PostMap.of(rec.model, site.layer, "mlp", raw)
    predicted = post.push(raw) + (0 if post.constant is None else post.constant)
    return relative(predicted, effect.after.mlp[site.layer], rec.work(record.mlp_out))
