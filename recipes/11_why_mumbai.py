# %% [markdown]
# # Why Mumbai? A wrong answer, who tipped it, and what it takes to restore the right one
# Asked for India's capital, the embedded model says " Mumbai". This recipe
# 1. splits bs(wrong) - bs(right) over the stream, exactly, and locates the subvalues that tipped it;
# 2. searches for operations that make the right answer the most probable token, by measurement, and prunes them until
#    none can be dropped; random sets of the same size, kinds and layers stand beside them;
# 3. does it again for a neuron-only set, which shows that such a set is not unique.
# Zeroing is a blunt tool: look at what happens to both logits, not at the rank alone.

# %%
from typing import Any

import pandas as pd

import resid_surgery as rs


# %%
def main(
    model: Any = None,
    text: str = "The capital of India is",
    wrong: str = " Mumbai",
    right: str = " Delhi",
    until: str = "top",
    out: str = "out/why_mumbai",
) -> dict[str, pd.DataFrame]:
    """Every table of the search over neurons and (head, source) pairs, and the neuron-only sets."""
    model = rs.load("smollm2-135m") if model is None else model
    rec = rs.record(model, rs.Prompt(text, target=right, versus=[wrong]), positions="all")
    found = rs.blame(rec, wrong, right, until=until)
    alone = rs.blame(rec, wrong, right, until=until, kinds=["neuron"])
    graph = rs.source_graph(rec, readout="difference", nodes=120)
    tables = found.tables() | {"neurons_only": alone.minimal, "graph_edges": graph.edges}
    parts = found.ledger[found.ledger["kind"].isin(["attn", "mlp"])]
    figures = {
        "difference": rs.plot_layers(parts, "difference", hue="kind", ylabel=f"bs {wrong!r} - {right!r} (logits)"),
        "graph": rs.plot_graph(graph),
    }
    words = [f"# {wrong!r} and not {right!r}", "", *(f"- {line}" for line in found.summary())]
    words += ["", "With neurons alone:", "", *(f"- {line}" for line in alone.summary()[-2 - len(alone.sites) :])]
    rs.save_results(out, tables, figures, {"summary.md": "\n".join(words) + "\n"})
    return tables


# %%
if __name__ == "__main__":
    for name, table in main().items():
        print(f"\n{name}\n{table.head(8).to_string(index=False)}")
