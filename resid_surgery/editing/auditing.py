"""Auditing: what an edit is, before anything is asked of the edited model.

Which tensors and slices change, by how much and in what form; whether the base stays as it is byte for byte; whether
the edit survives saving and a cast to half precision; and which tokens the changed vectors promote and suppress. No
forward runs but those of the reload check, on a few tokens.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

import pandas as pd
import torch
from torch import Tensor

from resid_surgery._check import choice, message, whole
from resid_surgery.editing.acting import pieces
from resid_surgery.editing.changes import Change
from resid_surgery.editing.edits import Edit, held_by, tensor_hash
from resid_surgery.editing.factoring import Factored, factored, form_of, slices_of
from resid_surgery.editing.roles import Role, role_of
from resid_surgery.editing.spectra import moved, spectra
from resid_surgery.errors import ArgumentError, ResidSurgeryError, StaleRecordingError
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.replacing import tensors_of
from resid_surgery.models.taps import Tap
from resid_surgery.models.tracing import forward
from resid_surgery.stream.recording import need_model

CASTS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
VALUES = 16
TENSORS = ("tensor", "tied", "role", "form", "kind", "slices", "slice_axis", "slices_of", "rank", "singular_values",
           "change_norm", "weight_norm", "relative_norm", "hash_before", "hash_after", "cast_cosine",
           "cast_kept")  # fmt: skip
SILENT = {
    "reads": "reads the stream: keys, queries, values and routers write nothing to it",
    "norm": "a norm: it scales what is read",
    "embed": "an embedding: its rows are read at their own tokens only",
    "unembed": "the unembedding: its rows are the tokens themselves",
    "other": "no output projection of a known kind",
}


@final
class _InterruptedError(ResidSurgeryError):
    """Raised inside the edit's block, to see that the base is the same after an exception."""


def audit(model: OpenedModel, edit: Edit, *, top: int = 10) -> dict[str, pd.DataFrame]:
    """What an edit changes in a model's weights, and whether it does so cleanly (no forward but the reload check).

    Args:
        model: the base, from `resid_surgery.load`. edit: made for it. top: tokens a side in the token spectrum.

    Returns:
        "tensors": one row a changed tensor: tensor, tied, role (what it is in the model), form (as the edit holds it),
        kind (as found: "row", "rank-one", "low-rank" or "dense"), slices, slice_axis, slices_of (changed slices along
        the axis with the smallest share), rank (numerical: singular values above 1e-6 of the largest, and above
        rounding), singular_values (the largest five), change_norm and weight_norm (Frobenius), relative_norm,
        hash_before, hash_after, cast_cosine and cast_kept (in bfloat16, see `cast_survival`).
        "hygiene": check, ok (None where it does not apply), detail.
        "singular_values": tensor, slice (an expert, or ""), rank, value, share (of the squared norm); the first 16.
        "tokens": tensor, slice (a site), which ("old" / "new" / "difference"), side, rank, token, token_id, value (a
        bs-value with every norm's scale at 1), note. At most 32 vectors; a tensor without a spectrum has a row that
        says why.

    Raises:
        ArgumentError: it is no edit, changes nothing, or tensors that the model does not have.
        StaleRecordingError: it was made for other weights.

    Source: Geva et al. 2022 (promoted tokens); Yu & Ananiadou (one subvalue, many abilities).
    """
    need_weights_edit(model, edit)
    top = whole("top", top, 1, model.vocab_size // 2, model=model.name)
    new, held = edit.new_tensors(model), tensors_of(model.module)
    cast = cast_survival(model, edit) if edit.changes else pd.DataFrame()
    tensors, values, vectors, silent = [], [], [], dict[str, str]()
    for i, change in enumerate(edit.changes):
        old, role = held[change.name].detach(), role_of(model, change.name)
        found = factored(change, old, role.lead)
        row = _described(change, role, found, old, new[change.name])
        tensors.append(row | {"cast_cosine": cast["cosine"][i], "cast_kept": cast["kept"][i]})
        values += list(_values(change.name, found))
        if role.kind == "writes":
            vectors += list(moved(model, change, role, found, old))
        else:
            silent[change.name] = SILENT[role.kind]
    return {
        "tensors": pd.DataFrame(tensors, columns=list(TENSORS)),
        "hygiene": _hygiene(model, edit),
        "singular_values": pd.DataFrame(values, columns=["tensor", "slice", "rank", "value", "share"]),
        "tokens": spectra(model, vectors, silent, top),
    }


def need_weights_edit(model: Any, edit: Any) -> None:
    """Refuse what is no opened model or no edit, or an edit that changes nothing.

    Raises:
        ArgumentError: as said.
    """
    need_model(model)
    if not isinstance(edit, Edit):
        raise ArgumentError(message("edit", "an rs.Edit", edit, do="Other models become one with Edit.from_models."))
    if edit.empty:
        raise ArgumentError(f"`edit` must change something; {edit!r} adds nothing to {model.name}.")


def cast_survival(model: OpenedModel, edit: Edit, dtype: str = "bfloat16") -> pd.DataFrame:
    """How much of a change of weights is left once they are cast to half precision.

    E = cast(W + D) - cast(W);  cosine = E.D / (|E| |D|);  kept = E.D / |D|^2, the part of D that is still there.

    Args:
        model, edit: as for `audit`. dtype: "bfloat16" or "float16".

    Returns:
        One row a tensor: tensor, dtype, cosine, kept, change_norm |D|, cast_norm |E|, overflowed (numbers beyond the
        dtype's range; there cosine and kept are 0). See `overall_cosine` for one number.

    Raises:
        ArgumentError: an unknown dtype, an edit without weights, or tensors that the model does not have.
        StaleRecordingError: it was made for other weights.
    """
    need_weights_edit(model, edit)
    cast = CASTS[choice("dtype", dtype, tuple(CASTS))]
    if not edit.changes:
        raise ArgumentError(f"`edit` must change weights to be cast; {edit!r} works by interventions.")
    held = held_by(edit, model)
    rows = [{"tensor": c.name, "dtype": dtype, **_survival(c, held[c.name].detach(), cast)} for c in edit.changes]
    return pd.DataFrame(rows)


def _survival(change: Change, old: Tensor, cast: torch.dtype) -> dict[str, float | int]:
    """Sums over a tensor in float64, a piece at a time; W + D is rounded to the tensor's own dtype first."""
    dot = wanted = left = 0.0
    overflowed = 0
    for before, added in pieces(change, old):
        after = (before.double() + added).to(old.dtype)
        moved = after.to(cast).double() - before.to(cast).double()
        overflowed += int((~moved.isfinite()).sum())
        dot, wanted, left = dot + float(moved @ added), wanted + float(added @ added), left + float(moved @ moved)
    alive = not overflowed and left > 0 and wanted > 0
    return {"cosine": dot / (wanted * left) ** 0.5 if alive else 0.0, "kept": dot / wanted if alive else 0.0,
            "change_norm": wanted**0.5, "cast_norm": left**0.5, "overflowed": overflowed}  # fmt: skip


def overall_cosine(table: pd.DataFrame) -> float:
    """The cosine between the whole change and what a cast leaves of it, all tensors laid end to end.

    Args:
        table: from `cast_survival`.
    """
    left = table["cast_norm"].where(table["overflowed"] == 0, 0.0)
    dot = (table["cosine"] * table["change_norm"] * left).sum()
    size = ((table["change_norm"] ** 2).sum() * (left**2).sum()) ** 0.5
    return float(dot / size) if size > 0 else 0.0


def _described(change: Change, role: Role, found: list[Factored], old: Tensor, new: Tensor) -> dict[str, Any]:
    sigma = torch.cat([one.values for one in found]).sort(descending=True).values
    changed, axis, total = slices_of(found)
    size, weight = change.norm(), float(old.double().norm())
    return {
        "tensor": change.name,
        "tied": ", ".join(change.tied),
        "role": str(role),
        "form": change.kind,
        "kind": form_of(found),
        "slices": changed,
        "slice_axis": axis + role.lead,
        "slices_of": total,
        "rank": len(sigma),
        "singular_values": ", ".join(f"{value:.3g}" for value in sigma[:5].tolist()),
        "change_norm": size,
        "weight_norm": weight,
        "relative_norm": size / weight if weight else float("inf"),
        "hash_before": tensor_hash(old),
        "hash_after": tensor_hash(new),
    }


def _values(name: str, found: list[Factored]) -> Iterator[dict[str, Any]]:
    energy = sum(float(one.values.square().sum()) for one in found)
    listed = [(float(v), f"E{one.lead[0]}" if one.lead else "") for one in found for v in one.values]
    for rank, (value, at) in enumerate(sorted(listed, key=lambda pair: -pair[0])[:VALUES], 1):
        yield {"tensor": name, "slice": at, "rank": rank, "value": value, "share": value**2 / energy}


def _hygiene(model: OpenedModel, edit: Edit) -> pd.DataFrame:
    """Checks in order; each says what was seen."""
    before, held = model.fingerprint(), _hashes(model)
    with edit.applied(model) as edited:
        made = edited.model if edit.interventions else edited
        rows = [*_contents(edit, held, _hashes(made)), ("refuses other weights", *_refusal(edit, made))]
        during = model.fingerprint()
    rows.append(("base unchanged while applied", during == before, f"fingerprint {before[:8]}, {during[:8]}"))
    after = model.fingerprint()
    rows.append(("rolls back bit-exactly", after == before, f"fingerprint {before[:8]}, {after[:8]}"))
    if after == before:
        rows += [("rolls back after an exception", *_interrupted(model, edit, before)), *_reloaded(model, edit)]
    else:
        rows.append(("rolls back after an exception", False, "not tried: the base is not what it was"))
    table = pd.DataFrame(rows, columns=["check", "ok", "detail"])
    return table.astype({"ok": object})


def _contents(edit: Edit, held: dict[str, str], now: dict[str, str]) -> Iterator[tuple[str, bool | None, str]]:
    """Whether changed tensors differ and all others do not."""
    listed, other = set(edit.tensors), sorted(set(held) - set(edit.tensors))
    differing = sorted(path for path in listed if held[path] != now[path])
    if edit.changes:
        yield "differs from base", bool(differing), f"{len(differing)} of {len(listed)} tensors have other bytes"
    else:
        yield "differs from base", None, "no weights are changed: it works by interventions"
    moved = [path for path in other if held[path] != now.get(path)]
    detail = f"{len(other) - len(moved)} of {len(other)} are byte-identical"
    yield "untouched tensors identical", not moved, detail + (f"; not {', '.join(moved[:4])}" if moved else "")


def _refusal(edit: Edit, other: OpenedModel) -> tuple[bool | None, str]:
    """Whether the edit is refused by weights that it was not made for: those that it has changed already."""
    if not edit.expects:
        return None, "it carries no hashes of the weights that it was made for"
    try:
        edit.new_tensors(other)
    except StaleRecordingError:
        return True, "refused by weights that it has already changed"
    return False, "it was added a second time"


def _interrupted(model: OpenedModel, edit: Edit, before: str) -> tuple[bool, str]:
    try:
        with edit.applied(model):
            raise _InterruptedError("on purpose")
    except _InterruptedError:
        after = model.fingerprint()
    return after == before, f"fingerprint {before[:8]}, {after[:8]}"


def _reloaded(model: OpenedModel, edit: Edit) -> Iterator[tuple[str, bool, str]]:
    """Saved and loaded again: the same edit, and the same logits bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        again = Edit.load(edit.save(Path(folder) / "edit.safetensors"))
    yield "same after save and load", again.hash == edit.hash, f"hash {edit.hash[:8]}, {again.hash[:8]}"
    one, two = _logits(model, edit), _logits(model, again)
    apart = float((one.double() - two.double()).abs().max())
    yield (
        "same logits after save and load",
        torch.equal(one, two),
        f"largest difference {apart:.3g} on {one.shape[0]} tokens",
    )


def _logits(model: OpenedModel, edit: Edit) -> Tensor:
    """(position, vocabulary) of a fixed short prompt."""
    ids = model.probe_ids()
    with edit.applied(model) as edited:
        made = (
            edited.forward(ids).logits if edit.interventions else forward(edited, ids, [Tap("logits")])[Tap("logits")]
        )
        return made[0].detach().cpu().clone()  # type: ignore[no-any-return]


def _hashes(model: OpenedModel) -> dict[str, str]:
    """Path -> hash of every tensor; tied ones are hashed once."""
    held = tensors_of(model.module)
    by_id = {id(t): tensor_hash(t) for t in {id(t): t for t in held.values()}.values()}
    return {path: by_id[id(t)] for path, t in held.items()}
