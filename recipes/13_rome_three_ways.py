# %% [markdown]
# # "The capital of France is" -> " Rome", three ways, and what each of them broke
# 1. Edit the same fact by a rank-one change (ROME), by least squares over several layers (MEMIT), and by rewriting the
#    value vectors of the neurons that `locate` finds (Dai et al.).
# 2. Validate each: what else does the model now say differently? Gates have intervals; beside each stands what a random
#    change of the same size would have done.
# 3. Could it have been foreseen? Exposure is read off the base model alone; its rank correlation with the measured
#    KL(base, edited) says how much of the damage it finds.

# %%
from pathlib import Path
from typing import Any

import pandas as pd

import resid_surgery as rs

PROMPT = rs.Prompt("The capital of France is", target=" Paris", versus=[" Rome"])
WANTED = rs.Rewrite("The capital of {} is", subject="France", new=" Rome", old=" Paris")
GATES = {
    "efficacy: new above old": "new above old",
    "paraphrase: new above old": "rephrased",
    "kl: neighbourhood": "KL neighbours",
    "kl: edit prepended": "KL prepended",
    "kl: unrelated text": "KL unrelated",
    "perplexity drift": "perplexity",
    "capability margin": "capability",
    "efficacy / random control": "times random",
}


# %%
def edits(model: Any, steps: int = 25) -> dict[str, rs.Edit]:
    """The same fact by three methods."""
    neurons = rs.locate(rs.record(model, PROMPT), k=20).sites
    return {
        "rank-one": rs.edit_rank_one(model, WANTED, steps=steps),
        "least squares": rs.edit_least_squares(model, [WANTED], steps=steps),
        "value rows": rs.edit_value_rows(model, neurons, old=" Paris", new=" Rome", rewrites=[WANTED]),
    }


# %%
def main(
    model: Any = None,
    budget: str | rs.Budget = "smoke",
    steps: int = 25,
    tokens: int = 1500,
    out: str | Path = "out/rome",
) -> dict[str, pd.DataFrame]:
    """One row a method and gate, and what each method changed; saved with a page for each."""
    model = rs.load("smollm2-135m") if model is None else model
    Path(out).mkdir(parents=True, exist_ok=True)
    texts = [p.text for p in rs.general_probes().of("text")]
    rows, gates, said, ranks, figures = [], [], [], [], {}
    for method, edit in edits(model, steps).items():
        done = rs.validate(model, edit, budget=budget)
        rs.write_report(done, Path(out) / f"{method.replace(' ', '_')}.html")
        edit.save(Path(out) / f"{method.replace(' ', '_')}.safetensors")
        table = done.gates.set_index("gate")
        row = {"method": method, "verdict": done.verdict, "worst": done.worst}
        rows.append(row | {short: table["value"].get(gate) for gate, short in GATES.items()})
        gates.append(done.gates.assign(method=method))
        said.append(done.tables["worst"].assign(method=method))
        seen = rs.exposure_against_kl(model, edit, texts, tokens=tokens)
        ranks.append({"method": method, "positions": len(seen), **seen.attrs})
        figures[f"exposure_{method.replace(' ', '_')}"] = rs.plot_exposure(seen)
    tables = {
        "comparison": pd.DataFrame(rows),
        "gates": pd.concat(gates, ignore_index=True),
        "worst_prompts": pd.concat(said, ignore_index=True),
        "exposure": pd.DataFrame(ranks),
    }
    rs.save_results(out, tables, figures)
    return tables


# %%
if __name__ == "__main__":
    for name, table in main().items():
        print(f"\n{name}\n{table.head(12).round(4).to_string(index=False)}")
