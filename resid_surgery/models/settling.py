"""Settling: what only a traced forward can say about attention: how many heads, and what is between.

Where something stands between attention and W_O it must act elementwise, up to one factor a head (a
gate, a norm with its scale frozen). That is tried: the mixed values of every such layer are
perturbed, each in a row of its own, and the ratio of W_O's input to them must stay as it was.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from resid_surgery.errors import UnsupportedModelError
from resid_surgery.models.attention import AttentionCall
from resid_surgery.models.envoys import Values
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.taps import Tap
from resid_surgery.models.tracing import forward


def settle(model: OpenedModel) -> None:
    """Measure heads and gates of a freshly opened model and put them into its anatomy.

    Raises:
        UnsupportedModelError: heads do not lie side by side in W_O's input, or what stands between
            attention and W_O mixes coordinates.
    """
    layers = [i for i in range(model.anatomy.n_layers) if model.block(i).attn_kind == "attention"]
    ids = model.probe_ids()
    t = ids.shape[1] - 1
    taps = [Tap(name, i) for i in layers for name in ("attn_call", "attn_z")]
    taps += [Tap("attn_mix", i) for i in layers if not model.block(i).mix.startswith("named")]
    values = forward(model, ids, taps, at=t)
    heads, gated = {}, set()
    for layer in layers:
        call: AttentionCall = values[Tap("attn_call", layer)]
        scores = call.weights if call.query is None else call.query
        assert scores is not None
        n, kv, d = scores.shape[1], call.value.shape[1], call.value.shape[-1]
        wide = model.rows(layer, "attn_out").rows.shape[0]
        if n * d != wide or n % kv:
            raise UnsupportedModelError(
                f"{model.name} is refused: in layer {layer}, {n} heads of {d} (over {kv} KV) come out of attention, "
                f"but {model.path(layer, 'attn_out')} reads {wide} coordinates: heads do not lie side by side in it."
            )
        heads[layer] = (n, kv, d)
        mix = values.get(Tap("attn_mix", layer))
        if mix is not None and not torch.equal(values[Tap("attn_z", layer)][0, 0], mix[0, 0].reshape(-1)):
            gated.add(layer)
    if gated:
        _require_elementwise(model, ids, t, sorted(gated), heads)
    model.anatomy = model.anatomy.with_heads(heads, gated)
    model.cache.clear()


def _require_elementwise(
    model: OpenedModel, ids: Tensor, t: int, gated: list[int], heads: dict[int, tuple[int, int, int]]
) -> None:
    """Perturb the mixed values of each gated layer in its own row; W_O's input must follow elementwise."""
    generator = torch.Generator().manual_seed(0)

    def perturb(row: int, layer: int) -> Callable[[Tensor, Values], Tensor]:
        n, _, d = heads[layer]
        factors = 0.5 + torch.rand(n, d, generator=generator, dtype=torch.float64)

        def write(found: Tensor, seen: Values) -> Tensor:
            left = found.clone()
            left[row, t] = (left[row, t].double() * factors.to(left.device)).to(left)
            return left

        return write

    writes = {Tap("attn_mix", layer): perturb(row, layer) for row, layer in enumerate(gated, start=1)}
    taps = [Tap(name, layer) for layer in gated for name in ("attn_mix", "attn_z")]
    values = forward(model, ids.repeat(len(gated) + 1, 1), taps, writes, at=t)
    for row, layer in enumerate(gated, start=1):
        n, _, d = heads[layer]
        z, mix = (values[Tap(name, layer)].double().reshape(len(gated) + 1, n, d) for name in ("attn_z", "attn_mix"))
        clean, moved = z[0] * mix[row], z[row] * mix[0]  # equal where the ratio z / mix is what it was
        scale = (moved * clean).sum(-1, keepdim=True) / clean.square().sum(-1, keepdim=True).clamp_min(1e-300)
        error = float((moved - scale * clean).abs().max() / moved.abs().max().clamp_min(1e-300))
        allowed = 100 * max(torch.finfo(values[Tap("attn_z", layer)].dtype).eps, 1.2e-7)
        if not error <= allowed:
            raise UnsupportedModelError(
                f"{model.name} is refused: in layer {layer}, what stands between attention and "
                f"{model.path(layer, 'attn_out')} is no elementwise gate or norm (error {error:.2g}, allowed "
                f"{allowed:.2g}), so heads and sources cannot be told apart there."
            )
