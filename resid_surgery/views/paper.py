"""The source paper's figures, each on the user's own prompt and model by one call.

What each shows is this project's reading of the text of Yu & Ananiadou, arXiv 2312.12141 v1, and of the author's
explanation of it ("Exploring the Residual Stream of Transformers for Mechanistic Interpretability - Explained", 2023):

    3      sum of scores against score of the sum, subvalues of a layer added worst first   `cumulated`
    5      log-prob increase of every attention and MLP output                              `scores`
    6      helpful and harmful subvalues of each layer                                      `counts`
    7      the ten best in all that helps, by layer                                         `best_share`
    8      what lower vectors lend an MLP's helpful and unhelpful neurons                   `cross_layer`
    9      bs-values of target and competitors along the stream                             `stream_bs`
    10     which layers tell the target from a competitor                                   `separation`
    11, 12 what feeds a head: everything recomputed, or with its weights fixed              `attention_sources`
    19     layers of value and query subvalues                                              `locations`
    F(l)   p(w, x + l v) as a subvalue grows; "log F(l)" its logarithm                      `probability_curve`
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from resid_surgery import _check
from resid_surgery.attribution.by_layer import best_share, separation
from resid_surgery.attribution.crossing import cross_layer
from resid_surgery.attribution.curves import cumulated, probability_curve
from resid_surgery.attribution.locating import locate
from resid_surgery.attribution.removing import attention_sources
from resid_surgery.attribution.scores import counts, scores
from resid_surgery.attribution.switching import locations
from resid_surgery.stream.recording import Recording, be_recording, need_recording
from resid_surgery.stream.tables import stream_bs
from resid_surgery.views.circuits import plot_cross_layer, plot_locations, plot_removed
from resid_surgery.views.figures import plot_cumulated, plot_probability
from resid_surgery.views.plots import need_axes, plot_stream
from resid_surgery.views.profiles import plot_counts, plot_layer_scores, plot_separation, plot_shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = ("neuron", "head_source")


@final
@dataclass(frozen=True, eq=False)
class Asked:
    """What a figure is asked for.

    Attributes:
        rec: a recording. layer: that a figure is about; None for the best subvalue's, or all. kind: of the subvalues of
            6, 7 and 19. ax: where to draw.
    """

    rec: Recording
    layer: int | None
    kind: str
    ax: Any

    def best(self, kind: str, k: int = 1, score: str = "log_prob_increase") -> list[Any]:
        """The best subvalues of a kind, of the layer asked for."""
        return list(locate(self.rec, k=k, kind=kind, score=score, layers=self.layer).sites)


def _growth(one: Asked, log: bool) -> "Axes":
    sites = one.best("neuron", 2) + one.best("head_source", 2)
    return plot_probability(probability_curve(one.rec, sites), log=log, ax=one.ax)


def _removed(one: Asked) -> "Axes":
    score, readout = ("bs_difference", "difference") if one.rec.prompt.versus else ("bs_target", "target")
    table = attention_sources(one.rec, one.best("head", 1, score), readout=readout)
    return plot_removed(table, ax=one.ax)


DRAWN: dict[str, Callable[[Asked], "Axes"]] = {
    "3": lambda one: plot_cumulated(cumulated(one.rec, layer=one.best("neuron")[0].layer), ax=one.ax),
    "5": lambda one: plot_layer_scores(scores(one.rec, kind="layer"), ax=one.ax),
    "6": lambda one: plot_counts(counts(one.rec, kind=one.kind, layers=one.layer), ax=one.ax),
    "7": lambda one: plot_shares(best_share(one.rec, kind=one.kind, layers=one.layer), ax=one.ax),
    "8": lambda one: plot_cross_layer(cross_layer(one.rec, [one.best("neuron")[0].layer]), ax=one.ax),
    "9": lambda one: plot_stream(
        stream_bs(one.rec), marked=one.best("neuron", 5) + one.best("head_source", 5), ax=one.ax
    ),
    "10": lambda one: plot_separation(separation(one.rec), ax=one.ax),
    "11": _removed,
    "12": _removed,
    "19": lambda one: plot_locations(
        locations(one.rec.model, [one.rec.prompt.source], progress=False), kind=one.kind, ax=one.ax
    ),
    "F(l)": lambda one: _growth(one, log=False),
    "log F(l)": lambda one: _growth(one, log=True),
}


def plot_paper(
    rec: Recording, figure: int | str, *, layer: int | None = None, kind: str = "neuron", ax: "Axes | None" = None
) -> "Axes":
    """One of the source paper's figures, of a recording (see the module for what each shows).

    Args:
        rec: a recording; made with ``positions="all"`` for Figures 11 and 12, of a prompt with competitors for 10.
        figure: 3, 5, 6, 7, 8, 9, 10, 11, 12, 19, "F(l)" or "log F(l)".
        layer: instead of the best subvalue's where a figure is about one (3, 8, 11, 12, F(l)); 6, 7 and 9 keep to it;
            5, 10 and 19 are about all. kind: "neuron" or "head_source", for 6, 7 and 19. ax: where to draw.

    Returns:
        The Axes. Figure 7 of neurons evaluates all of them (half a minute for a 135M-parameter model).

    Raises:
        ArgumentError: matplotlib is not installed, no such figure, or it needs another recording.
        StaleRecordingError: the model's weights, modules, hooks or settings changed since.

    Source: Yu & Ananiadou, arXiv 2312.12141 v1.
    """
    need_axes(ax)
    be_recording(rec)
    number = _check.index_of(figure)
    name = _check.choice("figure", figure if number is None else str(number), tuple(DRAWN))
    _check.choice("kind", kind, KINDS)
    if layer is not None:
        n, do = rec.model.anatomy.n_layers, "Count from the end with -1."
        layer = _check.whole("layer", layer, -n, n - 1, model=rec.model.name, do=do) % n
    need_recording(rec)
    return DRAWN[name](Asked(rec, layer, kind, ax))
