"""The catalogue of scores: what each is, in which unit, and how the best by it are found.

v = coefficient * direction is a subvalue, x the state that it is added to, r the final stream, w the target and
u its competitors; bs(v) = W_U N_s(v), frozen at s(r), and C(v, x) = log p(w, x + v) - log p(w, x).
"""

from dataclasses import dataclass
from typing import Any, Literal, final

import pandas as pd

from resid_surgery import _check
from resid_surgery.errors import ArgumentError

NORMS = ("frozen", "own")


@final
@dataclass(frozen=True)
class Score:
    """One score.

    Attributes:
        name: what `scores` and `locate` call it. formula, unit. norms: those that it is defined for.
        best: whether the "highest" or the "lowest" is best.
        search: how `locate` proves its answer: "certificate" (bounds of every candidate, a few exact
            evaluations), "linear" (all at once by matrix-vector products) or "exhaustive" (a pass over the
            vocabulary for every candidate, streamed).
        note: what to know when using it. source.
    """

    name: str
    formula: str
    unit: str
    norms: tuple[str, ...]
    best: Literal["highest", "lowest"]
    search: Literal["certificate", "linear", "exhaustive"]
    note: str
    source: str

    def sign(self, *, worst: bool = False) -> int:
        """1 where larger scores come first, -1 where smaller ones do."""
        return 1 if (self.best == "highest") != worst else -1


_PAPER = "Yu & Ananiadou, arXiv 2312.12141"
_LIST = (
    Score("log_prob_increase", "C(v, x) = log p(w, x + v) - log p(w, x)", "nats", NORMS, "highest", "certificate",
          "the paper's contribution score; not additive", _PAPER),
    Score("prob_increase", "p(w, x + v) - p(w, x)", "probability", NORMS, "highest", "certificate",
          "small wherever the target is still improbable, so it prefers late layers", _PAPER),
    Score("bs_target", "bs(v)[w]", "logits", ("frozen",), "highest", "linear",
          "direct logit attribution; additive, but blind to tokens that rise with the target",
          f"{_PAPER} (bs-value); Elhage et al. 2021"),
    Score("bs_difference", "bs(v)[w] - mean over u of bs(v)[u]", "logits", ("frozen",), "highest", "linear",
          "direct attribution of the logit difference; additive; needs competitors", "Wang et al. 2022 (IOI)"),
    Score("contrast", "mean over u of the increase of log p(w) - log p(u) when v is added to x", "nats", NORMS,
          "highest", "linear", "log-odds of the target against its competitors, C for w minus C for u; equals "
          "bs_difference under the frozen norm without a soft-cap", "Yin & Neubig 2022 (contrastive)"),
    Score("log_prob_alone", "log p(w, v) = log softmax(cap(bs(v)))[w]", "nats", NORMS, "highest", "certificate",
          "the subvalue read by itself, constants left out; cannot be added up", f"{_PAPER} (rival score)"),
    Score("coefficient", "m of v = m * direction", "activation", ("frozen", "own"), "highest", "linear",
          "input of the down-projection, z[h, d], or the attention weight; 1 for whole vectors; no token in it",
          f"{_PAPER} (rival score)"),
    Score("direction_norm", "|direction|", "length in the stream", ("frozen", "own"), "highest", "linear",
          "of the value vector, without the coefficient; no token in it", f"{_PAPER} (rival score)"),
    Score("coefficient_times_norm", "|m| |direction| = |v|", "length in the stream", ("frozen", "own"), "highest",
          "linear", "no token in it", "Geva et al. 2022"),
    Score("target_rank", "1 + tokens whose bs(v) is higher than the target's; ties share their mean rank", "rank",
          ("frozen", "own"), "lowest", "exhaustive",
          "blind to the size of v; a negative coefficient reverses the order; does not depend on the norm's scale",
          f"{_PAPER} (rival score)"),
    Score("coefficient_over_rank", "m / target_rank", "activation", ("frozen", "own"), "highest", "exhaustive",
          "signed as the coefficient is", f"{_PAPER} (rival score)"),
    Score("leave_one_out", "log p(w, r) - log p(w, r - v)", "nats", NORMS, "highest", "certificate",
          "what the final stream loses without v, later layers unmoved", "ablation at the readout"),
    Score("grad_times_activation", "v . d log p(w) / dv at t, through all later layers", "nats",
          ("frozen", "own"), "highest", "linear",
          "first-order estimate of zeroing v; one backward pass; the model's own live norms",
          "Shrikumar et al. 2017; attribution patching, Nanda 2023"),
)  # fmt: skip
SCORES: dict[str, Score] = {one.name: one for one in _LIST}


def describe_scores() -> pd.DataFrame:
    """Every score that `scores` and `locate` know, one row each.

    Returns:
        Columns: score, formula, unit, best ("highest" or "lowest"), norms, search ("certificate", "linear" or
        "exhaustive"), note, source.

    Example:
        >>> describe_scores().set_index("score").loc["target_rank", "best"]
        'lowest'
    """
    return pd.DataFrame(
        [(s.name, s.formula, s.unit, s.best, " | ".join(s.norms), s.search, s.note, s.source) for s in SCORES.values()],
        columns=["score", "formula", "unit", "best", "norms", "search", "note", "source"],
    )


def check_scores(given: Any, norm: str) -> list[Score]:
    """One score's name, several, or "all" (that the norm allows), as `Score`s.

    Raises:
        ArgumentError: unknown or repeated, or not defined for the norm.
    """
    _check.choice("norm", norm, NORMS)
    if isinstance(given, str) and given == "all":
        return [one for one in SCORES.values() if norm in one.norms]
    names = [given] if isinstance(given, str) or not isinstance(given, (list, tuple)) else list(given)
    found = [SCORES[_check.choice("score", name, tuple(SCORES))] for name in names]
    if not found or len(set(names)) != len(names):
        raise ArgumentError(_check.message("score", "distinct names of scores, or 'all'", given))
    for one in found:
        if norm not in one.norms:
            raise ArgumentError(
                f"`norm` must be {one.norms[0]!r} for score {one.name!r}; got {norm!r}. "
                + ("Its counterpart for both norms is 'contrast'." if one.name == "bs_difference" else
                   "bs-values add up under the frozen norm only.")
            )  # fmt: skip
    return found
