"""Splits: the change of every logit at one position, part by part, with nothing left over.

For token w, with r -> r' the final stream, s its clean scale and s' the new one, the change of the
logit before a soft-cap is the sum of four parts. The first three are computed from what the operations
did and from the norms; the fourth from the addends of both rows; their sum is compared with the
logits that the model computed:

    direct     = W_U[w] . N_s(what each operation at t left minus what it found in this run, through
                 the post-norm frozen at what it found)
    post_norm  = W_U[w] . N_s(the rest of what the operated sublayers add with the operation minus
                 without it, in this run): zero where there is no post-norm
    norm_scale = W_U[w] . (N_s'(r') - N_s(r'))
    indirect   = W_U[w] . N_s(everything else that changed): what later and operated sublayers
                 computed differently because their inputs changed

`Effect.ledger` gives the same for every addend of the stream.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery.models.prompts import token_text
from resid_surgery.sites import Constant, Resid, Sublayer
from resid_surgery.stream.blocks import PostMap
from resid_surgery.stream.recording import Recording
from resid_surgery.stream.tables import bs_columns
from resid_surgery.stream.vocabulary import Readout
from resid_surgery.surgery.engine import Run
from resid_surgery.surgery.noting import Change

PARTS = ("direct", "post_norm", "norm_scale", "indirect")


@final
@dataclass(frozen=True, eq=False)
class Addend:
    """One addend of the stream: its clean value, its change and how that change came about."""

    site: str
    kind: str
    layer: int | None
    before: Float[Tensor, " d_model"]
    change: Float[Tensor, " d_model"]
    direct: Float[Tensor, " d_model"]
    post_norm: Float[Tensor, " d_model"]

    def times(self, factor: Tensor | float) -> "Addend":
        """The row as it reaches the final stream, past blocks that multiply it."""
        if isinstance(factor, float) and factor == 1.0:
            return self
        vectors = {name: getattr(self, name) * factor for name in ("before", "change", "direct", "post_norm")}
        return replace(self, **vectors)


@final
@dataclass(frozen=True, eq=False)
class Split:
    """What operations did at one position: the control row and the operated row of one batch.

    Attributes:
        rec: the recording operated on. before, after: both rows. movers: how many other tokens are listed.
    """

    rec: Recording
    before: Run
    after: Run
    movers: int

    @cached_property
    def table(self) -> pd.DataFrame:
        """See `Effect.table`."""
        tokens = self.tokens()
        ids = [i for i, _ in tokens]
        split, mean = self._split(ids)
        work = self.rec.work
        bs0, bs1 = work(self.before.bs), work(self.after.bs)
        lp0, lp1 = (torch.log_softmax(run.logits, -1) for run in (self.before, self.after))
        table = pd.DataFrame({"token": [token_text(i, self.rec.model.tokenizer) for i in ids], "token_id": ids})
        table["role"] = [role for _, role in tokens]
        table["bs_before"], table["bs_after"] = _list(bs0[ids]), _list(bs1[ids])
        table["bs_change"] = _list((bs1 - bs0)[ids])
        for name in PARTS:
            table[name] = _list(split[name])
        table["closure"] = (table[list(PARTS)].sum(axis=1) - table["bs_change"]).abs()
        table["bs_change_centred"] = table["bs_change"] - float((bs1 - bs0).mean())
        for name in PARTS:
            table[f"{name}_centred"] = table[name] - mean[name]
        for name, run, lp in (("before", self.before, lp0), ("after", self.after, lp1)):
            table[f"logit_{name}"] = _list(run.logits[ids])
            table[f"log_prob_{name}"] = _list(lp[ids])
            table[f"prob_{name}"] = _list(lp[ids].exp())
            table[f"rank_{name}"] = [1 + int((run.logits > run.logits[i]).sum()) for i in ids]
        table["log_prob_change"] = table["log_prob_after"] - table["log_prob_before"]
        table["position"], table["norm"] = self.after.position, "frozen"
        return table

    def ledger(self) -> pd.DataFrame:
        """See `Effect.ledger`."""
        rows = self._rows()
        readouts = self.rec.prompt.readouts
        directions = self._readout.directions(readouts)
        before, change, direct, post = (
            torch.stack([getattr(row, name) for row in rows]) @ directions.T
            for name in ("before", "change", "direct", "post_norm")
        )
        table = pd.DataFrame(
            {
                "site": [row.site for row in rows],
                "kind": [row.kind for row in rows],
                "layer": pd.array([row.layer for row in rows], dtype="Int64"),
                "operated": [bool(row.direct.any()) for row in rows],
                "bs_before": _list(before[:, 0]),
                "bs_after": _list((before + change)[:, 0]),
                "bs_change": _list(change[:, 0]),
                "direct": _list(direct[:, 0]),
                "post_norm": _list(post[:, 0]),
                "indirect": _list((change - direct - post)[:, 0]),
            }
        )
        for i, name in enumerate(bs_columns(self.rec)[1:], start=1):
            table[name.replace("bs_", "bs_change_")] = _list(change[:, i])
        table.loc[len(table)] = self._norm_scale_row(table.columns)
        measured = float(self.after.bs[readouts[0]] - self.before.bs[readouts[0]])
        table["norm"], table["position"] = "frozen", self.after.position
        table["closure"] = abs(float(table["bs_change"].sum()) - measured)
        return table

    def _norm_scale_row(self, columns: Any) -> list[Any]:
        scale = _list(self._readout.rows(self.rec.prompt.readouts) @ self._norm_scale())
        row: dict[str, Any] = {"site": "norm_scale", "kind": "norm_scale", "layer": pd.NA, "operated": False}
        row |= {"bs_before": 0.0, "bs_after": scale[0], "bs_change": scale[0], "direct": 0.0, "post_norm": 0.0}
        row |= {"indirect": 0.0} | {f"bs_change_versus_{i}": v for i, v in enumerate(scale[1:], start=1)}
        return [row[name] for name in columns]

    @cached_property
    def _readout(self) -> Readout:
        """The readout frozen at the control row's final stream."""
        self.rec.require_fresh()
        base = Readout.of(self.rec)
        return Readout(base.model, base.norm, base.norm.scale(self.before.final), base.constants)

    def _norm_scale(self) -> Tensor:
        """N_s'(r') - N_s(r'): what the norm's new scale makes of what the unembedding reads."""
        norm, final = self._readout.norm, self.after.final
        read = final if self.after.unread is None else final + self.after.unread
        scale = norm.scale(final if self.after.frozen else read)
        return norm.linear(read, scale) - norm.linear(read, self._readout.s)

    def _split(self, ids: list[int]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Each part's logits of some tokens, and its mean over the vocabulary."""
        rows, readout = self._rows(), self._readout
        direct = torch.stack([row.direct for row in rows]).sum(0)
        post = torch.stack([row.post_norm for row in rows]).sum(0)
        rest = torch.stack([row.change - row.direct - row.post_norm for row in rows]).sum(0)
        norm = readout.norm
        read = {
            name: norm.linear(v, readout.s) for name, v in (("direct", direct), ("post_norm", post), ("indirect", rest))
        }
        read["norm_scale"] = self._norm_scale()
        w = readout.rows(ids)
        uniform = direct.new_full((1, self.rec.model.vocab_size), 1 / self.rec.model.vocab_size)
        average = readout.mix(uniform)[0]
        return {k: w @ v for k, v in read.items()}, {k: float(average @ v) for k, v in read.items()}

    def tokens(self) -> list[tuple[int, str]]:
        named = [(i, role) for i, _, role in self.rec.prompt.roles()]
        p0, p1 = (torch.softmax(run.logits, -1) for run in (self.before, self.after))
        order = (p1 - p0).abs().topk(min(self.movers + len(named), len(p0))).indices.tolist()
        known = {i for i, _ in named}
        return named + [(i, "mover") for i in order if i not in known][: self.movers]

    def _rows(self) -> list[Addend]:
        """Every addend with its change, and a row for each operation on a state."""
        changes, zero, reach = self.after.changes, torch.zeros_like(self.before.embed), self.rec.reach
        embed = changes.get((0, "pre"), Change()).added
        rows = [Addend(str(Constant("embed")), "embed", None, self.before.embed, self.after.embed - self.before.embed,
                     zero if embed is None else embed, zero).times(reach(0, "pre"))]  # fmt: skip
        states = {key: c.added for key, c in changes.items() if key[1] in ("pre", "mid", "post") and key != (0, "pre")}
        for layer in range(self.rec.model.anatomy.n_layers):
            for part, before, after in (
                ("attn", self.before.attn, self.after.attn),
                ("mlp", self.before.mlp, self.after.mlp),
            ):
                if getattr(self.rec.model.block(layer), f"{part}_kind") == "none":
                    continue
                change = after[layer] - before[layer]
                if part == "attn" and (mid := states.get((layer, "mid"))) is not None:
                    change = change - mid  # the write was carried by this sublayer's output
                direct, post = self._operated(layer, part)
                name = str(Sublayer(layer, part))  # type: ignore[arg-type]
                rows.append(Addend(name, part, layer, before[layer], change, direct, post).times(reach(layer, part)))
        for (layer, stage), delta in states.items():
            assert delta is not None
            site = Resid(layer, stage)  # type: ignore[arg-type]
            after_what = {"pre": "pre", "mid": "mid", "post": "mlp"}[stage]
            rows.append(Addend(str(site), "state", layer, zero, delta, delta, zero).times(reach(layer, after_what)))
        if (e := self.after.unread) is not None:  # edges into the unembedding: the stream itself stays
            rows.append(Addend("unembed", "edge", None, zero, e, e, zero))
        return rows

    def _operated(self, layer: int, part: str) -> tuple[Tensor, Tensor]:
        """(direct, post_norm) vectors of the operations on one sublayer."""
        change = self.after.changes.get((layer, part), Change())
        direct = torch.zeros_like(self.before.embed) if change.added is None else change.added
        if change.raw is None:
            return direct, torch.zeros_like(direct)
        left = self.after.raw[layer, part]
        found = left - change.raw
        frozen = PostMap.of(self.rec.model, layer, part, found)
        through = frozen.push(change.raw)
        if frozen.norm is None:
            return direct + through, torch.zeros_like(direct)
        whole_change = PostMap.of(self.rec.model, layer, part, left).push(left) - frozen.push(found)
        return direct + through, whole_change - through


def _list(values: Tensor) -> list[float]:
    return [float(v) for v in values.double()]
