"""Exposing: how strongly an edited part acts on each token, computed from one forward of the base.

At an output projection, with k its input and h the stream behind the sublayer (in the base):

    exposure = |dW k + db| / |h|
    for value rows |sum_i m_i dv_i| / |h|; for a scaling dv = (s - 1) v; for a rank-one change u v^T |v . k| |u| / |h|

d = dW k + db is what the sublayer's output changes by, before a post-norm and the layer's multiplier: exact at the
lowest edited layer, where the edited model reads what the base reads. At a projection of what is read (keys, queries,
values) it is |dW x + db| / |W x + b|, relative to the pre-activation itself. At embedding rows it is 1 where a changed
token is read, at unembedding rows 1 where one follows.
"""

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resid_surgery.addresses import At, expand
from resid_surgery.editing.acting import as_stored, touched
from resid_surgery.editing.auditing import need_weights_edit
from resid_surgery.editing.changes import Change, Rows, summed
from resid_surgery.editing.edits import Edit
from resid_surgery.editing.roles import role_of
from resid_surgery.editing.spots import Part, Reads, ReadsIn, RoutedKeys, Spot, Tokens, Writes
from resid_surgery.errors import ArgumentError
from resid_surgery.models.calls import close, watch
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.replacing import tensors_of
from resid_surgery.models.taps import Tap, mlp_reads
from resid_surgery.models.tracing import forward
from resid_surgery.sites import AttnNeuron, ExpertNeuron, Head, Neuron, SharedNeuron
from resid_surgery.surgery.engine import device_of
from resid_surgery.surgery.interventions import Intervention, Scale, Zero


@final
class Exposer:
    """How exposed tokens are to an edit, batch by batch, from the base alone.

    Attributes:
        model, edit: as given. taps: what a forward of the base must read. columns: the places at which the edit acts,
            and what each is relative to ("stream", "pre-activation", "token"). unexposable: tensors (or interventions)
            for which an exposure is not defined, such as norms.

    Raises:
        ArgumentError: exposure is defined for no tensor of the edit.
        StaleRecordingError: the edit was made for other weights.
    """

    def __init__(self, model: OpenedModel, edit: Edit) -> None:
        need_weights_edit(model, edit)
        self.model, self.edit = model, edit
        parts, unknown = _parts(model, edit)
        self._spots, left = _spots(model, parts)
        self.unexposable: tuple[str, ...] = (*unknown, *left)
        if not self._spots:
            raise ArgumentError(
                f"`edit` must change something whose input can be tapped in {model.name} (output projections, keys, "
                f"queries, values, embeddings); got {', '.join(self.unexposable)}."
            )

    @property
    def taps(self) -> tuple[Tap, ...]:
        return tuple(dict.fromkeys(tap for spot in self._spots for tap in spot.taps))

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(spot.name for spot in self._spots)

    def of(self, reads: Reads, ids: Int[Tensor, "row position"]) -> Float[Tensor, "place row position"]:
        """Exposures at each place, from what a forward of the base read at `taps` (all positions)."""
        return torch.stack([spot.measure(self.model, reads, ids).to("cpu", torch.float64) for spot in self._spots])

    def by_place(self, ids: Int[Tensor, "row position"]) -> Float[Tensor, "place row position"]:
        """Exposures at each place, from one forward of the base."""
        ids = ids.to(device_of(self.model))
        return self.of(forward(self.model, ids, self.taps, logits_at=[0]) if self.taps else {}, ids)

    def __call__(self, ids: Int[Tensor, "row position"]) -> Float[Tensor, "row position"]:
        """The exposure of each token: the root of the sum of squares over places."""
        return combined(self.by_place(ids))


def exposable(model: OpenedModel, edit: Edit) -> bool:
    """Whether exposure is defined for any tensor of an edit."""
    need_weights_edit(model, edit)
    return bool(_spots(model, _parts(model, edit)[0])[0])


def combined(places: Float[Tensor, "place *n"]) -> Float[Tensor, "*n"]:
    """Exposures of several places as one: the root of the sum of their squares."""
    return places.square().sum(0).sqrt()


def _parts(model: OpenedModel, edit: Edit) -> tuple[list[Part], list[str]]:
    """Every change of the edit, as the weights take it, with the role at each of its paths; and what has none."""
    edit.new_tensors(model)  # refuses what is for another model
    held, parts = tensors_of(model.module), []
    for change in edit.changes:
        stored = as_stored(change, held[change.name])
        parts += [(role_of(model, path), stored) for path in change.paths]
    scaled, unknown = scalings(model, edit.interventions)
    return parts + [(role_of(model, c.name), c) for c in scaled], unknown


def scalings(model: OpenedModel, interventions: Sequence[Intervention]) -> tuple[tuple[Change, ...], list[str]]:
    """(rows of output projections that say the same, interventions that are no scaling of such rows).

    A scaling of a coefficient by s is dv = (s - 1) v of its value vector; where it acts is left to the caller.
    """
    found: list[Change] = []
    unknown: list[str] = []
    for one in interventions:
        factor = one.factor if isinstance(one, Scale) else 0.0
        sites = expand([s.site if isinstance(s, At) else s for s in one.sites], model.anatomy, 0)
        rows = [_row_of(model, site.resolve(model.anatomy), factor) for site in sites]
        if isinstance(one, (Zero, Scale)) and all(row is not None for row in rows):
            found += [row for row in rows if row is not None]
        else:
            unknown.append(one.brief)
    return summed(found), unknown


def _row_of(model: OpenedModel, site: Any, factor: float) -> Rows | None:
    """The change of an output projection that scales a site's value vector, or those of a whole head."""
    lead: tuple[int, ...]
    if isinstance(site, Neuron):
        path, lead, index = f"{model.path(site.layer, 'mlp_out')}.weight", (), [site.index]
    elif isinstance(site, SharedNeuron):
        path, lead, index = f"{model.path(site.layer, 'shared_out')}.weight", (), [site.index]
    elif isinstance(site, ExpertNeuron):
        path, lead, index = f"{model.path(site.layer, 'experts')}.down_proj", (site.expert,), [site.index]
    elif isinstance(site, (Head, AttnNeuron)) and getattr(site, "source", None) is None:
        d = model.anatomy.sizes[site.layer].d_head
        inside = range(d) if isinstance(site, Head) else [site.index]
        path, lead, index = f"{model.path(site.layer, 'attn_out')}.weight", (), [site.head * d + i for i in inside]
    else:
        return None
    old, axis = tensors_of(model.module)[path].detach(), role_of(model, path).input_axis
    assert axis is not None
    where = torch.tensor([[*lead, i] for i in index])
    axes = (0, axis) if lead else (axis,)
    values = old.movedim(axes, tuple(range(len(axes))))[tuple(where.T.to(old.device))].double().cpu()
    return Rows(path, (), tuple(old.shape), axes, where, (factor - 1.0) * values)


def _spots(model: OpenedModel, parts: Sequence[Part]) -> tuple[list[Spot], list[str]]:
    """The places at which changes act, in forward order of layers; and tensors for which none is known."""
    writes: dict[tuple[int, str], list[Part]] = {}
    keys: dict[int, list[Part]] = {}
    reads: dict[str, list[Part]] = {}
    spots: list[Spot] = []
    left: list[str] = []
    for role, change in parts:
        if role.kind == "writes" and role.layer is not None:
            writes.setdefault((role.layer, role.sublayer), []).append((role, change))
        elif role.kind == "reads" and role.group == "experts" and role.layer is not None:
            keys.setdefault(role.layer, []).append((role, change))
        elif role.kind in ("reads", "other") and role.layer is not None:
            reads.setdefault(role.module, []).append((role, change))
        elif role.kind in ("embed", "unembed") and role.input_axis is not None:
            spots.append(Tokens(role.kind, touched(change)[0]))
        else:
            left.append(change.name)
    spots += [_writing(model, *at, tuple(some)) for at, some in sorted(writes.items())]
    spots += [RoutedKeys(layer, tuple(some)) for layer, some in sorted(keys.items())]
    found = _read_at(model, reads)
    spots += [ReadsIn(module, found[module], tuple(some)) for module, some in reads.items() if module in found]
    left += [change.name for module, some in reads.items() if module not in found for _, change in some]
    return spots, [*dict.fromkeys(left)]


def _writing(model: OpenedModel, layer: int, sublayer: str, parts: tuple[Part, ...]) -> Writes:
    mixture = sublayer == "mlp" and model.block(layer).mlp_kind == "experts"
    split = sublayer == "attn" and model.anatomy.between(layer)
    return Writes(layer, sublayer, parts, mixture, split)


def _read_at(model: OpenedModel, reads: Mapping[str, Sequence[Part]]) -> dict[str, Tap]:
    """Module -> the tap that holds what it reads, found by comparing the two on a few tokens."""
    if not reads:
        return {}
    layers = {module: role.layer for module, some in reads.items() for role, _ in some if role.layer is not None}
    candidates = {layer: _candidates(model, layer) for layer in set(layers.values())}
    ids = model.probe_ids()
    seen = forward(model, ids, [tap for taps in candidates.values() for tap in taps])
    with model.lock:
        calls = {call.path: call for call in watch(model.shadow, ids)}
    found: dict[str, Tap] = {}
    for module, layer in layers.items():
        call = calls.get(module)
        if call is None or not call.linear or call.x is None:
            continue
        same = [tap for tap in candidates[layer] if close(call.x, seen[tap].flatten(0, 1), 1e-5)]
        if same:
            found[module] = same[0]
    return found


def _candidates(model: OpenedModel, layer: int) -> list[Tap]:
    row = model.block(layer)
    attn = [] if row.attn_kind == "none" else [Tap("attn_read", layer)]
    return attn + ([] if row.mlp_kind == "none" else mlp_reads(model, layer))
