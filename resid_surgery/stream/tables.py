"""The stream as tables: `decompose`, `lens`, `spectrum`.

Tables are tidy DataFrames. Every row says its convention: the norm ("frozen" or "own"), the
position, and the soft-cap, which bs-values stand before.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from resid_surgery._check import choice, whole
from resid_surgery.addresses import as_sites, expand
from resid_surgery.sites import Site, part_of
from resid_surgery.stream.blocks import Block
from resid_surgery.stream.recording import Recording, need_recording
from resid_surgery.stream.subvalues import GRAINS, addends, resolve_in, vector_of
from resid_surgery.stream.vocabulary import Readout, token_names


def decompose(rec: Recording, *, grain: str = "layer") -> pd.DataFrame:
    """The ledger: one row per addend of the stream at t, with its bs-values (paper: bs-values).

    bs(v)[w] = W_U[w] . gamma * centre(v) / s with s frozen at the final stream, so that all rows,
    constants included, sum to the model's own logits before a soft-cap.

    Args:
        rec: a recording.
        grain: "layer" (embedding, one attention and one MLP output a layer: 33 addends for 16
            layers), "head", "head_source", "neuron", or "subvalue" (head_source and neuron).

    Returns:
        Columns: site, kind, layer, bs_target and ``bs_versus_1..`` (logits; one per competitor,
        in the prompt's order), bs_target_centred (the same minus its mean over the vocabulary: a
        shift common to all tokens changes no probability), norm, position, before_cap,
        closure (|sum of the column bs_target - the model's value|, logits; the same in all rows).
        `.attrs["tokens"]` names the token of each bs column.

    Raises:
        ArgumentError: unknown grain, or not a recording. StaleRecordingError: weights changed.

    Source: Yu & Ananiadou, arXiv 2312.12141, section 3.
    """
    choice("grain", grain, GRAINS)
    need_recording(rec)
    readout, readouts = Readout.of(rec), rec.prompt.readouts
    mean = readout.norm.pull(readout.mix(torch.ones(1, rec.model.vocab_size).to(readout.s)), readout.s)
    directions = torch.cat([readout.directions(readouts), mean / rec.model.vocab_size])
    frames = [_ledger_rows(block, block.project(directions)) for block in addends(rec, grain)]
    for name, values in readout.named_constants().items():
        frames.append(
            _frame([name], "constant", None, torch.cat([values[list(readouts)], values.mean()[None]])[:, None])
        )
    table = pd.concat(frames, ignore_index=True)
    table.columns = pd.Index(["site", "kind", "layer", *bs_columns(rec), "bs_target_centred"])
    table["bs_target_centred"] = table["bs_target"] - table["bs_target_centred"]
    table["layer"] = table["layer"].astype("Int64")
    table["norm"], table["position"], table["before_cap"] = "frozen", rec.prompt.position, True
    table["closure"] = abs(float(table["bs_target"].sum()) - float(rec.bs_values[rec.prompt.target]))
    table.attrs["tokens"] = dict(zip(bs_columns(rec), (rec.prompt.names[i] for i in readouts), strict=True))
    return table


def bs_columns(rec: Recording) -> list[str]:
    """Names of the bs-value columns: the target, then the competitors in the prompt's order."""
    return ["bs_target", *(f"bs_versus_{i + 1}" for i in range(len(rec.prompt.versus)))]


def lens(rec: Recording, *, top: int = 5) -> pd.DataFrame:
    """Logit lens: what each state of the stream would predict, read with its *own* norm.

    Args:
        rec: a recording. top: how many tokens a state, >= 1.

    Returns:
        Columns: step (forward order), site, layer, rank (1 is the most probable; the target's row is always there),
        token, token_id, role ("top", "target" or "versus"), prob, log_prob (nats), norm ("own"),
        position.

    Raises:
        ArgumentError: `top` out of range. StaleRecordingError: weights changed.

    Source: nostalgebraist 2020 (logit lens); compare bs-values in `decompose`.
    """
    need_recording(rec)
    top = whole("top", top, 1, rec.model.vocab_size, model=rec.model.name)
    names, states = stream_states(rec)
    readout, rows = Readout.of(rec), []
    log_ps = readout.lens(torch.stack(states))
    for step, (name, layer, log_p) in enumerate(zip(names, _layers_of(names), log_ps, strict=True)):
        wanted = {int(i): "top" for i in log_p.topk(top).indices}
        wanted |= {token: role for token, _, role in rec.prompt.roles()}
        for token, role in wanted.items():
            rank = 1 + int((log_p > log_p[token]).sum())
            value = float(log_p[token])
            rows.append((step, name, layer, rank, token, role, float(log_p[token].exp()), value))
    table = pd.DataFrame(rows, columns=["step", "site", "layer", "rank", "token_id", "role", "prob", "log_prob"])
    table.insert(4, "token", token_names(rec.model, table["token_id"].tolist()))
    table["norm"], table["position"] = "own", rec.prompt.position
    return table.sort_values(["step", "rank"], kind="stable", ignore_index=True)


def stream_states(rec: Recording) -> tuple[list[str], list[Tensor]]:
    """Names and vectors of the stream's states in forward order."""
    names, states = [], []
    for layer in range(rec.model.anatomy.n_layers):
        names.append(f"L{layer}.resid_pre")
        states.append(rec.work(rec.layers[layer].resid_pre))
        if rec.model.anatomy.between(layer):
            names.append(f"L{layer}.resid_mid")
            states.append(rec.resid_mid(layer))
    last = rec.model.anatomy.n_layers - 1
    return [*names, f"L{last}.resid_post"], [*states, rec.work(rec.resid_final)]


def state_height(state: str) -> float:
    """Where a state stands along the layers: L3.resid_pre at 3, L3.resid_mid at 3.5, L3.resid_post at 4."""
    layer, _, stage = state.removeprefix("L").partition(".resid_")
    return int(layer) + {"pre": 0.0, "mid": 0.5, "post": 1.0}[stage]


def state_after(site: Site, states: Sequence[str]) -> str:
    """The first of a stream's states, in forward order, that holds what a site writes; the last where none later does.

    What attention writes stands in the state between a layer's sublayers, where the block has one.
    """
    layer = getattr(site, "layer", 0)
    later = [f"L{layer + 1}.resid_pre"]
    if part_of(site) == "attn":
        later.insert(0, f"L{layer}.resid_mid")
    return next((name for name in later if name in states), states[-1])


def stream_bs(rec: Recording) -> pd.DataFrame:
    """bs-values of target and competitors along the stream (the paper's Figure 9).

    Args:
        rec: a recording.

    Returns:
        Columns: step (forward order), site (the state), layer, token, token_id, role, bs_value
        (logits of the state under the frozen norm, constants included), norm, position. At the
        last state they are the model's own logits before a soft-cap.
    """
    need_recording(rec)
    names, states = stream_states(rec)
    readout, rows = Readout.of(rec), []
    directions = readout.directions(rec.prompt.readouts)
    values = torch.stack(states) @ directions.T
    if readout.constants is not None:
        values = values + readout.constants[list(rec.prompt.readouts)]
    for step, (name, layer) in enumerate(zip(names, _layers_of(names), strict=True)):
        for i, (token, text, role) in enumerate(rec.prompt.roles()):
            rows.append((step, name, layer, text, token, role, float(values[step, i])))
    table = pd.DataFrame(rows, columns=["step", "site", "layer", "token", "token_id", "role", "bs_value"])
    table["norm"], table["position"] = "frozen", rec.prompt.position
    return table


def predictions(rec: Recording, *, top: int = 10) -> pd.DataFrame:
    """What the model predicts: its most probable tokens, and where target and competitors stand.

    Args:
        rec: a recording. top: how many tokens.

    Returns:
        Columns: rank, token, token_id, role, logit (after a soft-cap), log_prob (nats), prob.
    """
    need_recording(rec)
    top = whole("top", top, 1, rec.model.vocab_size, model=rec.model.name)
    logits = rec.work(rec.logits)
    log_p = torch.log_softmax(logits, -1)
    wanted = {int(i): "top" for i in log_p.topk(top).indices} | {i: role for i, _, role in rec.prompt.roles()}
    rows = [
        (1 + int((logits > logits[i]).sum()), i, role, float(logits[i]), float(log_p[i]), float(log_p[i].exp()))
        for i, role in wanted.items()
    ]
    table = pd.DataFrame(rows, columns=["rank", "token_id", "role", "logit", "log_prob", "prob"])
    table.insert(1, "token", token_names(rec.model, table["token_id"].tolist()))
    return table.sort_values("rank", kind="stable", ignore_index=True)


def spectrum(rec: Recording, site: Any, *, top: int = 10) -> pd.DataFrame:
    """The tokens that an addend promotes and suppresses (its bs-values, sign included).

    Args:
        rec: a recording. site: an addend's site or its text, or a sequence of them.
        top: how many tokens a side.

    Returns:
        Columns: site, side ("promotes" / "suppresses"), rank, token, token_id, bs_value (logits),
        bs_centred (minus its vocabulary mean), norm, position.

    Raises:
        SiteError: a site does not exist, or is a state rather than an addend.

    Source: Geva et al. 2022 (sub-updates promote concepts); Yu & Ananiadou, section 3.
    """
    need_recording(rec)
    top = whole("top", top, 1, rec.model.vocab_size // 2, model=rec.model.name)
    sites = [resolve_in(rec, one) for one in expand(as_sites(site), rec.model.anatomy, rec.prompt.position)]
    bs = Readout.of(rec).bs(torch.stack([vector_of(rec, one) for one in sites]))
    frames = []
    for one, values in zip(sites, bs, strict=True):
        mean = float(values.mean())
        for side, found in (("promotes", values.topk(top)), ("suppresses", (-values).topk(top))):
            ids = [int(i) for i in found.indices]
            shown = values[ids].tolist()
            rows = {"site": str(one), "side": side, "rank": range(1, top + 1), "token": token_names(rec.model, ids)}
            rows |= {"token_id": ids, "bs_value": shown, "bs_centred": [v - mean for v in shown]}
            frames.append(pd.DataFrame(rows))
    table = pd.concat(frames, ignore_index=True)
    table["norm"], table["position"] = "frozen", rec.prompt.position
    return table


def _ledger_rows(block: Block, bs: Tensor) -> pd.DataFrame:
    return _frame([str(block.site(i)) for i in range(block.count)], block.kind, block.layer, bs)


def _frame(sites: list[str], kind: str, layer: int | None, bs: Tensor) -> pd.DataFrame:
    columns: dict[str, Any] = {"site": sites, "kind": kind, "layer": pd.array([layer] * len(sites), dtype="Int64")}
    return pd.DataFrame(columns | {f"bs{i}": row.double().cpu().numpy() for i, row in enumerate(bs)})


def _layers_of(names: list[str]) -> list[int]:
    return [int(name[1:].split(".")[0]) for name in names]
