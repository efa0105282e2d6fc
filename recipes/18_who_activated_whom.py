# %% [markdown]
# # Who activated whom: the queries behind the values
# The neurons that write a token (values) fire because something below wrote what their keys match (queries).
# 1. The value neurons, and what each key read: shares of its pre-activation, which sum exactly.
# 2. The query subvalues of all of them together, the paper's two ways: directly, and hop by hop.
# 3. The proof: the values, then the best queries, zeroed at their place; what happens to the target? Beside them, as
#    many others at random.
# 4. The graph back to the embeddings, its edges cut one at a time: predicted against measured.

# %%
from typing import Any

import pandas as pd

import resid_surgery as rs


# %%
def main(
    model: Any = None,
    text: str = "The capital of France is",
    target: str = " Paris",
    versus: str = " London",
    k: int = 5,
    nodes: int = 60,
    seed: int = 0,
    out: str = "out/who_activated_whom",
) -> dict[str, pd.DataFrame]:
    """Values, what switched them on, the proof, and the graph; saved with pictures."""
    model = rs.load("smollm2-135m") if model is None else model
    rec = rs.record(model, rs.Prompt(text, target=target, versus=[versus]), positions="all")

    # %% Values, and the exact shares of what their keys read.
    values = rs.locate(rec, k=k)
    sources = rs.sources(rec, values.sites, grain="subvalue", top=k)

    # %% Queries of all values together, in the target's logits; the best by the direct way are put to the proof.
    ways = [rs.query_subvalues(rec, values, k=2 * k, way=way) for way in ("direct", "iterative")]
    queries = pd.concat(ways, ignore_index=True)
    below_all = ways[0][~ways[0]["site"].isin(map(str, values.sites))]  # a value can be a query of another
    best = below_all.loc[below_all["score"] > 0, "site"].tolist() or below_all["site"].tolist()
    every = rs.decompose(rec, grain="subvalue")
    below = every[(every["layer"] < max(site.layer for site in values.sites)) & ~every["site"].isin(best)]
    asked = {
        "the values": list(map(str, values.sites)),
        "their queries": best,
        "others at random": below["site"].sample(min(len(best), len(below)), random_state=seed).tolist(),
    }
    effects = rs.intervene_each(rec, [rs.Zero(sites) for sites in asked.values()])
    columns = ["bs_change", "direct", "indirect", "log_prob_change", "rank_after"]
    rows = [effect.table.loc[effect.table["role"] == "target", columns].iloc[0] for effect in effects]
    proof = pd.DataFrame(rows, columns=columns).reset_index(drop=True)
    proof.insert(0, "zeroed", list(asked))
    proof.insert(1, "sites", [" ".join(sites) for sites in asked.values()])

    # %% The graph, verified by cutting edges.
    graph = rs.source_graph(rec, nodes=nodes)
    tables = {"values": values.table, "sources": sources, "queries": queries, "proof": proof,
              "edges": graph.edges, "verified": rs.verify(graph).table}  # fmt: skip
    figures = {"sources": rs.plot_sources(sources, reader=str(values.sites[0])), "graph": rs.plot_graph(graph)}
    rs.save_results(out, tables, figures)
    return tables


# %%
if __name__ == "__main__":
    for name, table in main().items():
        print(f"\n{name}\n{table.head(12).to_string(index=False)}")
