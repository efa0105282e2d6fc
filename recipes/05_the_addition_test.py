# %% [markdown]
# # The addition test: which score finds the subvalues that raise the target's probability?
# In every layer, the ten subvalues that a score likes best are added to the layer's state: by how much does p(target)
# rise? (Table 1 of the paper's first version.) Two controls: ten at random, and all of the layer's.
# By log-prob increase and by probability increase the same ten win in every layer: they share its state.

# %%
from collections.abc import Sequence
from typing import Any

import pandas as pd

import resid_surgery as rs


# %%
def main(
    model: Any = None,
    kinds: Sequence[str] = ("capital", "language", "country", "colour", "number", "month"),
    each: int = 5,
    subvalues: Sequence[str] = ("neuron", "head_source"),
    k: int = 10,
    scores: str | Sequence[str] = "all",
    out: str = "out/addition_test",
) -> dict[str, pd.DataFrame]:
    """Means over layers and prompts with bootstrap intervals over prompts, saved with a picture."""
    model = rs.load("smollm2-135m") if model is None else model
    prompts = [prompt for kind in kinds for prompt in rs.facts(kind, model=model)[:each]]
    tables, figures = {}, {}
    for kind in subvalues:
        rows = rs.addition_test(model, prompts, kind=kind, k=k, scores=scores)
        summary = rs.bootstrap(rows, "score", "prob_increase", against={"score": "log_prob_increase"})
        tables |= {f"rows_{kind}": rows, f"summary_{kind}": summary}
        figures[kind] = rs.plot_intervals(
            summary, xlabel=f"mean increase of p(target) when {k} of a layer ({kind}) are added", mark=0.0
        )
    rs.save_results(out, tables, figures)
    return tables


# %%
if __name__ == "__main__":
    for name, table in main().items():
        if name.startswith("summary"):
            print(f"\n{name}\n{table.sort_values('mean', ascending=False).round(4).to_string(index=False)}")
