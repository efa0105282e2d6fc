# %% [markdown]
# # Clean and corrupt: activation patching
# Two prompts that differ in one word and in what follows. Values of one run are put into the other:
# 1. *denoise*: the corrupt prompt with clean values: what suffices to bring the answer back?
# 2. *noise*: the clean prompt with corrupt values: what is needed for it?
# The score is 0 where nothing changes and 1 where the patch makes up the whole difference between the prompts. States
# of the stream are patched at every layer and position, attention and MLPs likewise, heads at the last position.

# %%
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
    out: str = "out/clean_and_corrupt",
) -> dict[str, pd.DataFrame]:
    """Scores by layer and position, by sublayer and by head, in both directions; saved as maps."""
    model = rs.load("smollm2-135m") if model is None else model
    recs = [rs.record(model, rs.Prompt(text, target=target, versus=[other])) for text in (clean, corrupt)]
    asked = {
        "states": ("L*.resid_pre", "each"),
        "attention": ("L*.attn", "each"),
        "mlps": ("L*.mlp", "each"),
        "heads": ("L*.H*", "target"),
    }
    tables, figures = {}, {}
    for direction in ("denoise", "noise"):
        for name, (sites, positions) in asked.items():
            table = rs.patching(*recs, sites, positions=positions, direction=direction)
            tables[f"{name}_{direction}"] = table
            columns = "head" if name == "heads" else "position"
            figures[f"{name}_{direction}"] = rs.plot_grid(table, "score", columns=columns)

    # %% What suffices is not always needed: heads by both, side by side.
    two = [tables[f"heads_{one}"].set_index("site")["score"].rename(one) for one in ("denoise", "noise")]
    both = pd.concat(two, axis=1).reset_index()
    tables["heads_both"] = both.loc[both[["denoise", "noise"]].abs().max(axis=1).nlargest(12).index]
    rs.save_results(out, tables, figures)
    return tables


# %%
if __name__ == "__main__":
    for name, table in main().items():
        print(f"\n{name}\n{table.sort_values(table.columns[-1]).tail(8).to_string(index=False)}")
