# %% [markdown]
# # Who wrote " Paris"?
# Locate the neurons and (head, source) pairs that write a prediction, see what switched the best
# neuron on, remove everything that was found, and see which layers compensate.

# %%
from typing import Any

import pandas as pd

import resid_surgery as rs


# %%
def main(
    model: Any = None,
    text: str = "The capital of France is",
    target: str = " Paris",
    versus: tuple[str, ...] = (" London", " Lyon"),
    k: int = 10,
) -> dict[str, pd.DataFrame]:
    """Locate, trace, ablate, and return the tables by name."""
    model = rs.load("smollm2-135m") if model is None else model
    rec = rs.record(model, rs.Prompt(text, target=target, versus=versus))

    # %% The ledger: every row is an addend of the stream, and the rows sum to the logits.
    ledger = rs.decompose(rec)

    # %% The best neurons and attention subvalues, exact and proven.
    neurons = rs.locate(rec, k=k)
    pairs = rs.locate(rec, k=k, kind="head_source")

    # %% What switched the best neuron on: shares of its pre-activations that sum exactly.
    sources = rs.sources(rec, neurons.sites[0], grain="subvalue")

    # %% Remove them all; the ledger of the change shows who compensated.
    effect = rs.intervene(rec, rs.Zero([*neurons.sites, *pairs.sites]))
    return {
        "ledger": ledger,
        "neurons": neurons.table,
        "pairs": pairs.table,
        "sources": sources,
        "effect": effect.table,
        "change": effect.ledger(),
    }


# %%
if __name__ == "__main__":
    for name, table in main().items():
        print(f"\n{name}\n{table.head(12).to_string(index=False)}")
