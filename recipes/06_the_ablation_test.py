# %% [markdown]
# # The ablation test: which score finds the neurons that the prediction needs?
# 1. Zero the ten best neurons (and, apart from them, the ten best attention neurons) of the whole model by each score:
#    what happens to the target's reciprocal rank (its mean is MRR), probability and log-probability? (EMNLP, Table 2.)
# 2. The published large set: 100 neurons and 200 attention neurons by log-prob increase, against as many at random.
#
# Intervals are bootstrapped over prompts, differences are paired. "target" zeroes where the scores were taken, "all" at
# every position, as the published code does by zeroing parameters.

# %%
from collections.abc import Sequence
from typing import Any

import pandas as pd

import resid_surgery as rs

MEASURES = {"reciprocal_rank": "MRR", "prob": "p(target)", "log_prob": "log p(target), nats"}


# %%
def main(
    model: Any = None,
    kinds: Sequence[str] = ("capital", "language", "country", "colour", "number", "month"),
    each: int = 5,
    draws: int = 5,
    large: bool = True,
    scores: str | Sequence[str] = "all",
    out: str = "out/ablation_test",
) -> dict[str, pd.DataFrame]:
    """MRR, probability and log-probability with intervals, saved with pictures."""
    model = rs.load("smollm2-135m") if model is None else model
    prompts = [prompt for kind in kinds for prompt in rs.facts(kind, model=model)[:each]]
    rows = rs.ablation_test(model, prompts, draws=draws, scores=scores)
    tables, figures = {"rows": rows}, {}
    cells = ["set", "positions", "score"]
    for value, unit in MEASURES.items():
        clean = float(rows.loc[rows["score"] == "nothing", value].mean())
        table = rs.bootstrap(rows, cells, value, against={"score": "log_prob_increase"})
        tables[value] = table
        for (label, at), part in table[table["set"] != "nothing"].groupby(["set", "positions"]):
            name = f"{value}_{label}_{at}".replace(" ", "_")
            figures[name] = rs.plot_intervals(part, xlabel=f"{unit} without {label}, at {at}", mark=clean)
    if large:
        sets = {"100 neurons + 200 attention neurons": {"neuron": 100, "attn_neuron": 200}}
        big = rs.ablation_test(model, prompts, sets=sets, scores="log_prob_increase", draws=draws)
        tables["large_rows"] = big
        for value in MEASURES:
            tables[f"large_{value}"] = rs.bootstrap(big, cells, value)
    rs.save_results(out, tables, figures)
    return tables


# %%
if __name__ == "__main__":
    for name, table in main().items():
        if "rows" not in name:
            print(f"\n{name}\n{table.sort_values('mean').round(4).to_string(index=False)}")
