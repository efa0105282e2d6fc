# %% [markdown]
# # A causal map: where a fact travels, what carries it, along which edge, and what the model says without it
# 1. Patch the stream of one prompt into another, layer by layer and position by position: where is the difference?
# 2. Zero every head and every (head, source) pair, one row each: which of them carries it over?
# 3. Cut single edges into that head: which lower writers does it read the fact from?
# 4. Generate with the fact exchanged, and save the intervention for another machine.

# %%
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

import resid_surgery as rs


# %%
def main(
    model: Any = None,
    clean: str = "The capital of France is",
    corrupt: str = "The capital of Italy is",
    target: str = " Paris",
    other: str = " Rome",
    subject: str = " France",
    other_subject: str = " Italy",
) -> dict[str, pd.DataFrame]:
    """The tables of the map, by name."""
    model = rs.load("smollm2-135m") if model is None else model
    rec = rs.record(model, rs.Prompt(clean, target=target, versus=[other]))
    base = rs.record(model, rs.Prompt(corrupt, target=target, versus=[other]))

    # %% 1. The score is the share of the difference between the prompts that a patched state makes up.
    states = rs.patching(rec, base, "L*.resid_pre")
    # rs.plot_grid(states, "score") draws it

    # %% 2. Every head at the predicting position, and the best head's sources.
    heads = rs.sweep(rec, rs.grid(rec, rs.Zero, "L*.H*")).sort_values("log_prob_change")
    best = rs.parse_site(heads["site"].iloc[0])
    pairs = rs.sweep(rec, rs.grid(rec, rs.Zero, f"{best}<*")).sort_values("log_prob_change")
    source = rec.prompt.positions(subject)[0]

    # %% 3. The head reads values at the subject: leave out one lower writer there, for this head alone.
    reader = rs.HeadSource(best.layer, best.head, source)
    writers = [f"L{layer}.{part}" for layer in range(best.layer) for part in ("attn", "mlp")]
    cuts = [({"writer": one, "reader": str(reader)}, rs.Cut(one, reader, side="value")) for one in ["embed", *writers]]
    edges = rs.sweep(rec, cuts).sort_values("log_prob_change")
    along = rs.Edge(edges["writer"].iloc[0], reader, side="value")
    path = rs.sweep(rec, [({"path": str(along)}, rs.Patch(along, base))])  # path patching

    # %% How far from additive are the best three edges?
    together = rs.additivity(rec, [rs.Cut(one, reader, side="value") for one in edges["writer"].iloc[:3]])

    # %% 4. The other subject's early state, in every forward of a generation.
    early = f"L{model.anatomy.n_layers // 6}.resid_post"
    swap = rs.Patch(early, base, positions=subject, align={subject: other_subject})
    with rs.under(model, swap) as altered:
        said = altered.generate(clean, max_new_tokens=6)
    effect = rs.intervene(rec, swap)
    with tempfile.TemporaryDirectory() as folder:
        file = rs.save_interventions(Path(folder) / "swap.json", swap, rec=rec)
        again = rs.intervene(rec, rs.load_interventions(file))
    return {
        "states": states,
        "heads": heads,
        "pairs": pairs,
        "edges": edges,
        "path": path,
        "together": together,
        "generated": pd.DataFrame({"prompt": [clean], "continuation": [said]}),
        "effect": effect.table,
        "from the file": again.table,
    }


# %%
if __name__ == "__main__":
    for name, table in main().items():
        print(f"\n{name}\n{table.head(8).to_string(index=False)}")
