# %% [markdown]
# # How scores behave: the figures of the paper, on your prompts
# 1. F(l) = p(w, x + l v) and log F(l): log F is nearly straight until the target, or another token, takes over.
# 2. Additivity (Figure 3): the sum of scores against the score of the sum, worst first, with the fitted line.
# 3. Scores of whole layers, attention and MLP (Figure 5).
# 4. Helpful and harmful subvalues of each layer (Figure 6), and the share of its ten best in all that helps (Figure 7).
# 5. Frozen against own norm: read with its own scale, the small early stream is moved far by every vector, so the
#    own-norm top is crowded with layer 0. That says that the early stream is small, not that layer 0 wrote the answer:
#    under the frozen norm, which adds up to the prediction, the same neurons hardly count.

# %%
from collections.abc import Sequence
from typing import Any

import pandas as pd

import resid_surgery as rs

KINDS = ("neuron", "head_source")


# %%
def main(
    model: Any = None,
    kinds: Sequence[str] = ("capital", "language", "month"),
    each: int = 1,
    layer: int | None = None,
    top: int = 100,
    layers: Sequence[int] | None = None,
    out: str = "out/how_scores_behave",
) -> dict[str, pd.DataFrame]:
    """The tables behind the figures, saved with the figures."""
    model = rs.load("smollm2-135m") if model is None else model
    prompts = [prompt for kind in kinds for prompt in rs.facts(kind, model=model)[:each]]
    parts: dict[str, list[pd.DataFrame]] = {"layers": [], "counts": [], "shares": [], "norms": []}
    with rs.progress("prompts", len(prompts)) as step:
        for number, prompt in enumerate(prompts):
            rec = rs.record(model, prompt)
            found = {
                "layers": rs.scores(rec, kind="layer"),
                "counts": pd.concat([rs.counts(rec, kind=kind, layers=layers) for kind in KINDS]),
                "shares": pd.concat([rs.best_share(rec, kind=kind, layers=layers) for kind in KINDS]),
                "norms": pd.concat([rs.locate(rec, k=top, norm=norm).table for norm in ("frozen", "own")]),
            }
            for name, table in found.items():
                parts[name].append(table.assign(prompt=number, text=prompt.text, target=prompt.target))
            step(str(prompt.target))
    tables = {name: pd.concat(some, ignore_index=True) for name, some in parts.items()}
    first = rs.record(model, prompts[0])
    best = rs.locate(first, k=2).sites + rs.locate(first, k=2, kind="head_source").sites
    tables["growth"] = rs.probability_curve(first, best)
    tables["sums"] = rs.cumulated(first, layer=best[0].layer if layer is None else layer)
    among = tables["norms"].groupby(["prompt", "norm", "layer"]).size().unstack("layer")
    every = among.reindex(columns=pd.RangeIndex(model.anatomy.n_layers, name="layer")).fillna(0)
    tables["norms_by_layer"] = every.stack().rename("among_top").reset_index()
    figures = {
        "growth": rs.plot_probability(tables["growth"]),
        "log_growth": rs.plot_probability(tables["growth"], log=True),
        "sums": rs.plot_cumulated(tables["sums"]),
        "layers": rs.plot_layer_scores(tables["layers"]),
        "counts": rs.plot_counts(tables["counts"], share=True),
        "shares": rs.plot_shares(tables["shares"]),
        "norms": rs.plot_layers(
            tables["norms_by_layer"], "among_top", hue="norm", ylabel=f"neurons among the top {top}"
        ),
    }
    rs.save_results(out, tables, figures)
    return tables


# %%
if __name__ == "__main__":
    for name, table in main().items():
        print(f"\n{name}\n{table.head(8).to_string(index=False)}")
