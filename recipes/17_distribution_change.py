# %% [markdown]
# # The arithmetic of a distribution's change
# 1. On three numbers: softmax of [1, 2, 3] gives the third token .665. Adding [5, 5, 5] or [1, 1, 1] changes nothing;
#    adding [1, 4, 5] raises it to .879, and [4, 1, 5], whose second number is smaller, to .946. What a vector does to
#    a token depends on what it does to the others, and on what the stream says already.
# 2. On the model: the best subvalues, each added to the state that it is written into: the same arithmetic.
# 3. So a large bs-value is not a large effect: the neurons of a layer by bs(v) of the target, and by the log-prob
#    increase C(v, x). One whose bs-value is negative can help, if it lowers what stands above the target more.

# %%
from typing import Any

import pandas as pd

import resid_surgery as rs

ADDED = ([5, 5, 5], [1, 1, 1], [1, 4, 5], [4, 1, 5])


# %%
def main(
    model: Any = None,
    text: str = "The capital of France is",
    target: str = " Paris",
    versus: tuple[str, ...] = (" London", " Lyon"),
    k: int = 3,
    layer: int = -1,
    out: str = "out/distribution_change",
) -> dict[str, pd.DataFrame]:
    """Before, added and after, on numbers and on the model's own subvalues, saved with pictures."""
    model = rs.load("smollm2-135m") if model is None else model
    rec = rs.record(model, rs.Prompt(text, target=target, versus=versus))

    # %% Three numbers.
    numbers = rs.add_bs_values([1, 2, 3], ADDED)

    # %% The model's best neurons and (head, source) pairs, added where they are written.
    neurons, pairs = (rs.locate(rec, k=k, kind=kind) for kind in ("neuron", "head_source"))
    added = rs.add_subvalues(rec, [*neurons.sites, *pairs.sites], top=2)

    # %% One layer by both scores, and helpers that lower the target's own logit.
    both = rs.scores(rec, layers=layer, score=["log_prob_increase", "bs_target"], progress=False)
    ranks = both[["log_prob_increase", "bs_target"]].rank(ascending=False, method="first").astype(int)
    ranked = both.assign(rank_by_increase=ranks["log_prob_increase"], rank_by_bs=ranks["bs_target"])
    best = ranked[(ranked["rank_by_increase"] <= k) | (ranked["rank_by_bs"] <= k)].sort_values("rank_by_increase")
    odd = ranked[ranked["bs_target"] < 0].nlargest(k, "log_prob_increase")
    tables = {"numbers": numbers, "added": added, "two_rankings": best, "helpful_below_zero": odd}
    figures = {"numbers": rs.plot_addition(numbers)}
    for name, found in (("neuron", neurons), ("pair", pairs)):
        figures[name] = rs.plot_addition(added[added["case"] == str(found.sites[0])])
    rs.save_results(out, tables, figures)
    return tables


# %%
if __name__ == "__main__":
    for name, table in main().items():
        print(f"\n{name}\n{table.head(24).to_string(index=False)}")
