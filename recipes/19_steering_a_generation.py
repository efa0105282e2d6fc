# %% [markdown]
# # Steering a generation by one neuron
# The neuron that writes the target most is turned down, off, up and far up, in every forward of a generation:
# 1. what the neuron promotes and suppresses, and how the target's probability moves with its coefficient;
# 2. what the model says then, greedily, beside the same with a neuron of the same layer drawn at random;
# 3. the price: how far the whole distribution moved (KL, in nats). What is steered hard no longer speaks well.

# %%
import random
from collections.abc import Sequence
from typing import Any

import pandas as pd

import resid_surgery as rs


# %%
def main(
    model: Any = None,
    text: str = "The capital of France is",
    target: str = " Paris",
    site: str | None = None,
    factors: Sequence[float] = (-20.0, -5.0, 0.0, 1.0, 5.0, 20.0),
    new: int = 12,
    seed: int = 0,
    out: str = "out/steering",
) -> dict[str, pd.DataFrame]:
    """What is said at each setting of one neuron (the best for the target, or `site`) and of a random one."""
    model = rs.load("smollm2-135m") if model is None else model
    rec = rs.record(model, rs.Prompt(text, target=target))
    chosen = rs.locate(rec, k=1).sites[0] if site is None else rs.parse_site(site)
    if not isinstance(chosen, rs.Neuron):
        raise rs.SiteError(f"`site` must be a neuron such as L27.N846; got {site}.")
    draw = random.Random(seed).choice([i for i in range(model.anatomy.d_mlp) if i != chosen.index])
    neurons = {"chosen": chosen, "random": rs.Neuron(chosen.layer, draw)}

    # %% One row a setting: the next token's distribution.
    rows = [
        ({"neuron": name, "site": str(one), "factor": factor}, rs.Scale(one, factor))
        for name, one in neurons.items()
        for factor in factors
    ]
    table = rs.sweep(rec, rows, measure="all")

    # %% What is said: the neuron is held at every predicting position, the generated ones too.
    said = []
    for _, intervention in rows:
        with rs.under(model, intervention) as altered:
            said.append(altered.generate(text, max_new_tokens=new))
    table["continuation"] = said
    tables = {
        "said": table[["neuron", "site", "factor", "continuation"]],
        "measured": table.drop(columns="continuation"),
        "promotes": rs.spectrum(rec, list(neurons.values()), top=8),
        "growth": rs.probability_curve(rec, list(neurons.values())),
    }
    rs.save_results(out, tables, {"growth": rs.plot_probability(tables["growth"])})
    return tables


# %%
if __name__ == "__main__":
    for name, table in main().items():
        print(f"\n{name}\n{table.head(20).to_string(index=False)}")
