# %% [markdown]
# # Locating: every kind of part, the best and the worst, exactly
# 1. The best of each kind (neurons, heads, heads by source, attention neurons, layers) by log-prob increase, and how
#    many of how many candidates had to be evaluated to prove it.
# 2. The worst: what speaks against the target.
# 3. The same neurons by other scores, and with each state's own norm: how many of the best do they share?
# 4. Over several prompts: which neurons are among the best again and again?

# %%
from collections.abc import Sequence
from typing import Any

import pandas as pd

import resid_surgery as rs

KINDS = ("neuron", "head", "head_source", "attn_neuron", "layer")
SCORES = ("log_prob_increase", "prob_increase", "bs_target", "contrast", "leave_one_out", "grad_times_activation")


# %%
def main(
    model: Any = None,
    text: str = "The capital of France is",
    target: str = " Paris",
    versus: tuple[str, ...] = (" London", " Lyon"),
    k: int = 10,
    kinds: Sequence[str] = KINDS,
    scores: Sequence[str] = SCORES,
    fact: str = "capital",
    prompts: int = 5,
) -> dict[str, pd.DataFrame]:
    """The best and the worst of each kind, what it took to prove them, and how scores agree on them."""
    model = rs.load("smollm2-135m") if model is None else model
    rec = rs.record(model, rs.Prompt(text, target=target, versus=versus))

    # %% The best and the worst of each kind.
    sides = [(kind, worst) for kind in kinds for worst in (False, True)]
    most = {"layer": min(k, 2 * model.anatomy.n_layers), "head": min(k, len(rs.scores(rec, kind="head")))}
    found = {(kind, worst): rs.locate(rec, k=most.get(kind, k), kind=kind, worst=worst) for kind, worst in sides}
    took = pd.DataFrame(
        [
            (kind, "worst" if worst else "best", str(one.sites[0]), one.evaluations, one.candidates, one.proof)
            for (kind, worst), one in found.items()
        ],
        columns=["kind", "side", "first", "evaluations", "candidates", "proof"],
    )
    tables = {"took": took}
    tables |= {f"{'worst' if worst else 'best'}_{kind}": one.table for (kind, worst), one in found.items()}

    # %% How many of the best neurons two scores share.
    sets = {score: set(rs.locate(rec, k=k, score=score).sites) for score in scores}
    sets["log_prob_increase, own norm"] = set(rs.locate(rec, k=k, norm="own").sites)
    shared = {a: {b: len(sets[a] & sets[b]) for b in sets} for a in sets}
    tables["shared"] = pd.DataFrame(shared).rename_axis("score").reset_index()

    # %% The same for several prompts.
    tables["many"] = rs.locate_many(model, rs.facts(fact, model=model)[:prompts], k=k)
    return tables


# %%
if __name__ == "__main__":
    for name, table in main().items():
        print(f"\n{name}\n{table.head(10).to_string(index=False)}")
