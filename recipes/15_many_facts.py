# %% [markdown]
# # Many facts, one plan: how many neurons hold a prediction up?
# A plan is plain data: for every prompt, locate the best k neurons, zero them together, and zero as many others drawn
# at random (the control); k and the draw are axes. `rs.run` writes rows to a folder as it goes: stop it with Ctrl-C,
# kill it, or let the machine crash, and the same call goes on where it was. The same plan as a file runs from the
# command line: `resid-surgery run plan.json --facts capital --out runs/many`.

# %%
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

import resid_surgery as rs


# %%
def plan(ks: Sequence[int], draws: int) -> rs.Plan:
    """The best k neurons of each prompt, and as many others drawn at random, zeroed together."""
    return rs.Plan(
        axes={"k": list(ks), "draw": list(range(draws))},
        locate={"best": {"kind": "neuron", "k": "$k"}, "others": {"like": "best", "draw": "$draw"}},
        intervene={"located": {"kind": "Zero", "sites": "$best"}, "random": {"kind": "Zero", "sites": "$others"}},
        measure="all",
        known=True,
    )


def cases(model: Any, kinds: Sequence[str], each: int) -> list[rs.Case]:
    """Facts that the model knows, labelled by what they are about; the label becomes a column."""
    return [rs.Case(prompt, {"fact": kind}) for kind in kinds for prompt in rs.facts(kind, model=model)[:each]]


# %%
def main(
    model: Any = None,
    kinds: Sequence[str] = ("capital", "language", "country", "colour", "number", "month"),
    each: int = 10,
    ks: Sequence[int] = (1, 3, 10, 30),
    draws: int = 3,
    out: str | Path = "out/many_facts",
) -> dict[str, pd.DataFrame]:
    """How much log-probability k neurons carry, located against random, over prompts and by kind of fact."""
    model = rs.load("smollm2-135m") if model is None else model
    run = rs.run(model, cases(model, kinds, each), plan(ks, draws), out=Path(out) / "run")
    print(run)
    by_k = run.summary(["arm", "k"])
    by_fact = run.summary(["arm", "fact", "k"], against={"arm": "random"})
    located = run.read("located", columns=["prompt", "site", "layer", "rank"], where={"set": "best"})
    shared = located.groupby("site", as_index=False).agg(prompts=("prompt", "nunique"), mean_rank=("rank", "mean"))
    tables = {
        "by_k": by_k,
        "by_fact": by_fact[by_fact["arm"] == "located"].reset_index(drop=True),
        "shared": shared.sort_values(["prompts", "mean_rank"], ascending=[False, True]).head(20).reset_index(drop=True),
    }
    shown = by_k.assign(score=[f"{arm} {k}" for arm, k in zip(by_k["arm"], by_k["k"], strict=True)])
    rs.save_results(out, tables, {"by_k": rs.plot_intervals(shown, xlabel="change of log p(target), nats", mark=0.0)})
    return tables


# %%
if __name__ == "__main__":
    for name, table in main().items():
        print(f"\n{name}\n{table.round(3).to_string(index=False)}")
