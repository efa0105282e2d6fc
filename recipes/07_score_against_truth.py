# %% [markdown]
# # Score against truth: zero every neuron, and see which score knew
# A score is a guess at what a neuron does; zeroing it is the truth (what log p(target) loses). Here the truth of
# *every* neuron is measured on three prompts, and on thirty that of each score's best 500 and of 1,000 at random.
# - spearman: rank correlation over all that were measured; spearman_drawn: over the random ones alone, which stand for
#   the whole model;
# - recall@k: the share of the k most effective neurons that are among a score's first k.

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
    whole: int = 3,
    best: int = 500,
    random: int = 1000,
    ks: Sequence[int] = (10, 100),
    out: str = "out/score_against_truth",
) -> dict[str, pd.DataFrame]:
    """Rank correlation and recall of every score, with bootstrap intervals over prompts, saved with pictures."""
    model = rs.load("smollm2-135m") if model is None else model
    known = {kind: rs.facts(kind, model=model)[:each] for kind in kinds}
    prompts = [prompts[i] for i in range(each) for prompts in known.values() if i < len(prompts)]
    targets = [rs.record(model, one).prompt.target for one in prompts]
    found: dict[str, list[pd.DataFrame]] = {"every_neuron": [], "sampled": []}
    effects = []
    with rs.progress("prompts", whole + len(prompts)) as step:
        for name, some in (("every_neuron", prompts[:whole]), ("sampled", prompts)):
            for number, prompt in enumerate(some):
                rec = rs.record(model, prompt)
                size = {} if name == "every_neuron" else {"best": best, "random": random, "seed": number}
                table = rs.score_against_effect(rec, also=targets, progress=False, **size)
                agreed = rs.agreement(table, ks=ks).assign(prompt=number, text=prompt.text, target=prompt.target)
                found[name].append(agreed)
                if name == "every_neuron":
                    effects.append(table.assign(prompt=number))
                step(str(prompt.target))
    tables = {name: pd.concat(parts, ignore_index=True) for name, parts in found.items() if parts}
    figures = {}
    for name in list(tables):
        for value in ("spearman_drawn", *(f"recall@{k}" for k in ks)):
            summary = rs.bootstrap(tables[name], "score", value, against={"score": "log_prob_increase"})
            key = f"{name}_{value}".replace("@", "_at_")
            tables[key] = summary
            figures[key] = rs.plot_intervals(summary, xlabel=f"{value} ({name.replace('_', ' ')})", mark=0.0)
    measured = {"effects": pd.concat(effects, ignore_index=True)} if effects else {}
    rs.save_results(out, tables | measured, figures)
    return tables


# %%
if __name__ == "__main__":
    for name, table in main().items():
        if "_at_" in name or "spearman" in name:
            print(f"\n{name}\n{table.sort_values('mean', ascending=False).round(3).to_string(index=False)}")
