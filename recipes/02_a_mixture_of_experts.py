# %% [markdown]
# # Neurons of routed experts
# In a mixture of experts a neuron writes router weight x coefficient x value vector, and only where
# its expert was routed to. It is located, zeroed and traced like any other; its sources also say what
# the router would do without a writer. The model here is a tiny random one, since no trained mixture
# is small enough to ship; open one and pass it to `main`, or name it with --model, to use it.

# %%
from typing import Any

import pandas as pd

import resid_surgery as rs


# %%
def main(model: Any = None, model_type: str = "qwen2_moe", k: int = 8) -> dict[str, pd.DataFrame]:
    """Locate, trace and remove experts' neurons; return the tables by name."""
    model = rs.load(rs.tiny(model_type)) if model is None else model
    prompt = rs.Prompt(ids=[5, 9, 20, 31, 7, 44], target=3, versus=[8])
    rec = rs.record(model, prompt)

    # %% The ledger at the grain of neurons: experts, shared expert and experts' biases are rows.
    ledger = rs.decompose(rec, grain="neuron")

    # %% The best neurons, whatever they belong to, exact and proven.
    found = rs.locate(rec, k=k)
    print(found)

    # %% What switched an expert's neuron on, with the router kept and with the router recomputed.
    routed = [site for site in found.sites if isinstance(site, rs.ExpertNeuron)]
    if not routed:
        raise rs.ArgumentError(f"`model` must be a mixture of experts, one of them among the best {k}; got {model}.")
    kept = rs.sources(rec, routed[0], top=5, router="fixed")
    moved = rs.sources(rec, routed[0], top=5, router="recomputed")

    # %% Remove them one by one and together: rows of one batch, none leaks into another.
    effects = rs.intervene_each(rec, [*(rs.Zero(site) for site in routed), rs.Zero(routed)])
    changes = pd.DataFrame(
        {
            "zeroed": [*map(str, routed), "all of them"],
            "bs_change": [effect.table["bs_change"].iloc[0] for effect in effects],
            "direct": [effect.table["direct"].iloc[0] for effect in effects],
            "closure": [effect.table["closure"].iloc[0] for effect in effects],
        }
    )
    return {"ledger": ledger, "neurons": found.table, "router kept": kept, "router recomputed": moved,
            "changes": changes}  # fmt: skip


# %%
if __name__ == "__main__":
    for title, table in main().items():
        print(f"\n== {title}\n{table.head(10).to_string(index=False)}")
