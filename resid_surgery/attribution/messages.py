"""Messages: what a head brings from each source position, as vectors of the stream, and what they were made of.

A head's output is a sum of messages alpha[t, j] v[j] W_O. A value v[j] is affine in the stream at j, whose addends
u are known: with the head's norm frozen there and every norm inside attention too,

    message = sum over addends u at j of  alpha gate (N_s(u) W_V) W_O  +  constant

exactly: one more step of path expansion. The map of v[j] is read off the attention's own modules (see `readings`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery import _check
from resid_surgery.addresses import as_sites, expand
from resid_surgery.attribution.aims import Aim, aim_of, need_readout
from resid_surgery.attribution.ov_qk import both_ends
from resid_surgery.attribution.readings import Reading, Wanted, attention_readings
from resid_surgery.attribution.shares import Writers
from resid_surgery.errors import ClosureError, SiteError
from resid_surgery.models.attention import AttentionCall
from resid_surgery.sites import Head, HeadSource
from resid_surgery.stream.elsewhere import Elsewhere, need_stream
from resid_surgery.stream.kinds import attention_of, head_source_block, post_map, source_values
from resid_surgery.stream.recording import Recording, be_recording, closure_tolerance, need_recording
from resid_surgery.stream.records import repeat_kv
from resid_surgery.stream.subvalues import GRAINS, resolve_in, vector_of
from resid_surgery.stream.vocabulary import Readout, token_names

ROWS = 32


def messages(rec: Recording, heads: Any, *, readout: str = "target", versus: Any = None, top: int = 5) -> pd.DataFrame:
    """Pattern and messages of heads on a prompt: what each source position makes them write.

    Args:
        rec: a recording. heads: heads ("L12.H4"), (head, source) pairs ("L12.H4<3"), slices, or several.
        readout: "target", "difference" (target minus the mean of the competitors) or "log_prob" (first order).
            versus: other competitors. top: how many tokens a side.

    Returns:
        One row a message: site, source, token (at the source), attention (alpha), value_norm (length of v, a gate
        included), message_norm (length of what reaches the final stream), bs (of the readout; logits), promotes,
        suppresses (tokens, quoted); readout, norm ("frozen"), position, closure (largest |sum of all messages of the
        head - what it writes|, relative).

    Raises:
        SiteError: no head, or a source after the predicting position. ArgumentError: an unknown option.

    Source: Yu & Ananiadou, arXiv 2312.12141 (attention subvalues); Elhage et al. 2021 (what heads move).
    """
    be_recording(rec)
    top = _check.whole("top", top, 1, rec.model.vocab_size // 2, model=rec.model.name)
    competitors, sites = need_readout(rec, readout, versus), _sites(rec, heads)
    need_recording(rec)
    aim, frames = aim_of(rec, readout, competitors), []
    for head in dict.fromkeys(Head(site.layer, site.head) for site in sites):
        mine = [site.source for site in sites if (site.layer, site.head) == (head.layer, head.head)]
        frames.append(_messages(rec, head, mine, aim, top))
    return pd.concat(frames, ignore_index=True)


def expand_message(
    rec: Recording,
    message: Any,
    *,
    grain: str = "layer",
    readout: str = "target",
    versus: Any = None,
    top: int = 10,
    tokens: int = 5,
) -> pd.DataFrame:
    """Path expansion of one message: the addends at its source that it was made from, each as a message of its own.

    part(u) = alpha gate (N_s(u) W_V) W_O, with the scale s that the source's state has, and every norm inside
    attention, frozen. Parts, the remainder and the constant sum to the message as a vector.

    Args:
        rec: a recording, with ``positions="all"`` unless the source is the predicting position. message: "L12.H4<3".
        grain: of the addends: "layer", "head", "head_source", "neuron" or "subvalue".
        readout, versus: as for `messages`. top: how many addends are listed, by |bs|. tokens: promoted, a part.

    Returns:
        Columns: site (the message), writer, kind, position (the source), grain; bs (share of the readout; the column
        sums to the message's own), part_norm (length in the final stream), promotes (quoted); readout, norm, closure
        (largest |sum of parts - message|, relative to the message's largest coordinate). Rows: addends by |bs|,
        ``remainder (n)``, ``constant``.

    Raises:
        SiteError: not one (head, source). ArgumentError: an unknown option; another position, recorded with
        ``positions="target"``. UnsupportedModelError: its values are not affine. ClosureError: the parts do not sum.

    Source: Elhage et al. 2021 (path expansion).
    """
    be_recording(rec)
    _check.choice("grain", grain, GRAINS)
    top = _check.whole("top", top, 1)
    tokens = _check.whole("tokens", tokens, 1, rec.model.vocab_size // 2, model=rec.model.name)
    competitors, site = need_readout(rec, readout, versus), _one(rec, message)
    if site.source != rec.prompt.position:
        need_stream(rec)
    need_recording(rec)
    path = Path.of(rec, site)
    writers = Writers(Elsewhere(rec), grain)
    return _expanded(path, writers, aim_of(rec, readout, competitors), top, tokens)


@final
@dataclass(frozen=True, eq=False)
class Path:
    """From an addend at a source position, through one head, to the final stream at t: linear, with norms frozen.

    Attributes:
        rec, site: which. read: (d_head, d_model) u -> what it adds to the value. constant: (d_head,) of the value.
        amount: (d_head,) alpha times gate. rows: (d_head, d_model) W_O.
    """

    rec: Recording
    site: HeadSource
    read: Float[Tensor, "d_head d_model"]
    constant: Float[Tensor, " d_head"]
    amount: Float[Tensor, " d_head"]
    rows: Float[Tensor, "d_head d_model"]

    @classmethod
    def of(cls, rec: Recording, site: HeadSource) -> "Path":
        """The path of a message, its value's map read off the attention's own modules."""
        one, size = attention_of(rec, site.layer, str(site)), rec.model.anatomy.sizes[site.layer]
        readings = attention_readings(rec, site.layer, [_coordinate(rec, site, i) for i in range(size.d_head)])
        read = torch.stack([reading.directions[site.source] for reading in readings])
        constant = read.new_tensor([reading.constants["constant"] for reading in readings])
        gate = torch.ones_like(constant) if one.gate is None else rec.work(one.gate)[site.head]
        rows = rec.work(rec.model.rows(site.layer, "attn_out").rows).view(size.n_heads, size.d_head, -1)[site.head]
        return cls(rec, site, read, constant, gate * rec.work(one.alpha)[site.head, site.source], rows)

    def push(self, values: Float[Tensor, "n d_head"]) -> Float[Tensor, "n d_model"]:
        """Parts of the value as they reach the final stream."""
        return post_map(self.rec, self.site.layer, "attn", "final").push((values * self.amount) @ self.rows)

    def reading(self, aim: Aim) -> Reading:
        """The message's worth for an aim, as a sum over the addends at the source."""
        worth = self.amount * (self.rows @ aim.at_output(self.rec, self.site.layer, "attn"))
        at = {self.site.source: worth @ self.read}
        constants = {"constant": float(worth @ self.constant)}
        measured = float(aim.direction @ vector_of(self.rec, self.site))
        return Reading("value", aim.unit, (self.site.layer, "attn"), at, at, constants, measured, self.site.source)


def _coordinate(rec: Recording, site: HeadSource, i: int) -> Wanted:
    """One coordinate of the value at the source."""
    one = attention_of(rec, site.layer, str(site))
    n_heads = len(one.alpha)

    def phi(call: AttentionCall, row: int, only: int | None) -> Tensor:
        return repeat_kv(call.value[row], n_heads)[site.head, site.source, i].to(rec.model.work_dtype)

    measured = float(repeat_kv(one.value, n_heads)[site.head, site.source, i])
    return Wanted("value", "coefficient", phi, (site.source,), measured, {}, site.source)


def _expanded(path: Path, writers: Writers, aim: Aim, top: int, tokens: int) -> pd.DataFrame:
    rec, site, reading = path.rec, path.site, path.reading(aim)
    (listed,) = writers.split([reading], top)
    vectors, left = writers.vectors(listed.segments, listed.members, reading.stop), listed.count - len(listed.shares)
    rest = (writers.state(site.source, reading.stop) - vectors.sum(0))[None]
    read = torch.cat([vectors, rest if left else rest[:0]])
    parts = torch.cat([path.push(read @ path.read.T), path.push(path.constant[None])])
    pairs = list(zip(listed.segments.tolist(), listed.members.tolist(), strict=True))
    others = listed.total - float(listed.shares.double().sum())
    table = {
        "site": str(site),
        "writer": [*(str(writers.site(*one)) for one in pairs), *[f"remainder ({left})"] * bool(left), "constant"],
        "kind": [*(writers.kind(one) for one, _ in pairs), *["remainder"] * bool(left), "constant"],
        "position": site.source,
        "grain": writers.grain,
        "bs": [*listed.shares.tolist(), *[others] * bool(left), reading.constants["constant"]],
        "part_norm": parts.norm(dim=1).tolist(),
        "promotes": [promoted for promoted, _ in spoken(rec, parts, tokens)],
        "readout": aim.name,
        "norm": "frozen",
        "closure": _closure(path, parts),
    }
    return pd.DataFrame(table)


def _closure(path: Path, parts: Float[Tensor, "n d_model"]) -> float:
    """Largest |sum of parts - message| over the message's largest coordinate.

    Raises:
        ClosureError: it is more than rounding of the parts.
    """
    rec, message = path.rec, vector_of(path.rec, path.site)
    off, size = float((parts.sum(0) - message).abs().max()), float(message.abs().max())
    if not off <= 100 * closure_tolerance(rec.model) * max(float(parts.abs().max()), size, 1e-30):
        raise ClosureError(
            f"the parts of {path.site} of {rec.model.name} do not sum to it (off by {off:.2g} of {size:.2g}). Does a "
            "hook change what its head reads?"
        )
    return off / max(size, 1e-30)


def spoken(rec: Recording, vectors: Float[Tensor, "n d_model"], top: int) -> Iterator[tuple[str, str]]:
    """(promoted, suppressed) tokens of vectors, quoted; nothing of a vector that is zero."""
    readout = Readout.of(rec)
    for some in torch.split(vectors, ROWS):
        for values in readout.bs(some):
            if not bool(values.any()):
                yield "", ""
                continue
            up, down = (" ".join(map(repr, token_names(rec.model, ids))) for _, ids in both_ends(values, top))
            yield up, down


def _messages(rec: Recording, head: Head, sources: list[int], aim: Aim, top: int) -> pd.DataFrame:
    """Rows of one head."""
    values, alpha = source_values(rec, head.layer)
    seen = alpha.shape[1]
    everything = head_source_block(rec, head.layer, "final").vectors(head.head * seen + torch.arange(seen))
    written, vectors = vector_of(rec, head), everything[sources]
    tokens = list(spoken(rec, vectors, top))
    off = float((everything.sum(0) - written).abs().max()) / max(float(written.abs().max()), 1e-30)
    table = {
        "site": [str(HeadSource(head.layer, head.head, j)) for j in sources],
        "source": sources,
        "token": [rec.prompt.tokens[j] for j in sources],
        "attention": alpha[head.head, sources].tolist(),
        "value_norm": values[head.head, sources].norm(dim=-1).tolist(),
        "message_norm": vectors.norm(dim=1).tolist(),
        "bs": (vectors @ aim.direction).tolist(),
        "promotes": [up for up, _ in tokens],
        "suppresses": [down for _, down in tokens],
        "readout": aim.name,
        "norm": "frozen",
        "position": rec.prompt.position,
        "closure": off,
    }
    return pd.DataFrame(table)


def _sites(rec: Recording, given: Any) -> list[HeadSource]:
    """(head, source) pairs from heads or pairs; a head is all of its sources."""
    found: list[HeadSource] = []
    for site in expand(as_sites(given), rec.model.anatomy, rec.prompt.position):
        if not isinstance(site, (Head, HeadSource)):
            raise SiteError(_check.message("heads", "heads or (head, source) pairs: L12.H4 or L12.H4<3", str(site)))
        one = resolve_in(rec, site)
        if isinstance(one, HeadSource):
            found.append(one)
        elif isinstance(one, Head):
            found += [HeadSource(one.layer, one.head, j) for j in range(rec.prompt.position + 1)]
    return list(dict.fromkeys(found))


def _one(rec: Recording, given: Any) -> HeadSource:
    sites = [resolve_in(rec, site) for site in expand(as_sites(given), rec.model.anatomy, rec.prompt.position)]
    if len(sites) != 1 or not isinstance(sites[0], HeadSource):
        raise SiteError(_check.message("message", "one (head, source) pair such as L12.H4<3", given))
    return sites[0]
