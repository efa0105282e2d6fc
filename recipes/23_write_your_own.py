# %% [markdown]
# # Write your own recipe
# A recipe is a Python file with `main(model, ...)` that returns tables by name. Its parameters become options:
# `resid-surgery recipe FILE.py --help` shows them, with this text. Cells begin with `# %%`, so that editors run them
# one by one. Options are made of str, int, float, bool, Path and sequences of them, with or without a default.

# %%
from collections.abc import Sequence
from typing import Any

import pandas as pd

import resid_surgery as rs


# %%
def main(
    model: Any = None,
    text: str = "The capital of France is",
    target: str = " Paris",
    versus: Sequence[str] = (" London", " Lyon"),
    k: int = 5,
    factor: float = 0.0,
) -> dict[str, pd.DataFrame]:
    """Locate the neurons that write the target, scale them, and measure what that does."""
    model = rs.load("smollm2-135m") if model is None else model
    rec = rs.record(model, rs.Prompt(text, target=target, versus=versus))

    # %% Find: the best k of all neurons, with proof.
    found = rs.locate(rec, k=k)

    # %% Operate: one row a neuron, then all of them at once, split into direct and indirect.
    one_by_one = rs.sweep(
        rec, rs.grid(rec, lambda site, positions: rs.Scale(site, factor, positions=positions), found.sites)
    )
    together = rs.intervene(rec, rs.Scale(found.sites, factor))
    return {"neurons": found.table, "one_by_one": one_by_one, "together": together.table}


# %%
if __name__ == "__main__":
    for name, table in main().items():
        print(f"\n{name}\n{table.head(12).to_string(index=False)}")
