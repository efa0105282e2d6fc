# %% [markdown]
# # Paris and Lyon: neurons tell the capital from another city
# " Paris" and " Lyon" are both French, so the heads that read " France" raise both. What makes it the capital?
# 1. bs-values of the cities along the stream (Figure 9 of the source's case study); which layers separate them (10).
# 2. The separating neurons, with the tokens that they promote and suppress (Table 2).
# 3. Which attention subvalues, and which lower neurons, switched those neurons on: the paper's two ways.
# 4. The proof: the neurons zeroed, and their best queries zeroed, measured on both cities.
# The summary is written from the numbers. (The source has " Bordeaux", three tokens here.)

# %%
from typing import Any

import pandas as pd

import resid_surgery as rs


# %%
def main(
    model: Any = None,
    text: str = "The capital of France is",
    target: str = " Paris",
    versus: str = " Lyon",
    k: int = 8,
    out: str = "out/paris_and_lyon",
) -> dict[str, pd.DataFrame]:
    """The tables behind the figures, saved with the figures and a summary."""
    model = rs.load("smollm2-135m") if model is None else model
    rec = rs.record(model, rs.Prompt(text, target=target, versus=[versus]), positions="all")
    neurons = rs.locate(rec, k=k, score="bs_difference")
    queries = pd.concat(
        rs.query_subvalues(rec, neurons, k=k, way=way, readout="difference", grain=grain).assign(of=grain)
        for grain in ("head_source", "neuron")
        for way in ("direct", "iterative")
    )
    direct = queries[(queries["way"] == "direct") & (queries["score"] > 0)]
    asked = {
        "the neurons": list(map(str, neurons.sites)),
        "the attention subvalues": direct.loc[direct["of"] == "head_source", "site"].tolist(),
        "the query neurons": direct.loc[direct["of"] == "neuron", "site"].tolist(),
    }
    rows = [({"zeroed": name, "n": len(sites)}, rs.Zero(sites)) for name, sites in asked.items() if sites]
    proof = rs.sweep(rec, rows)
    tokens = rs.spectrum(rec, neurons.sites, top=6)
    wide = tokens.groupby(["site", "side"], sort=False)["token"].agg(lambda some: " ".join(map(repr, some)))
    tables = {
        "stream": rs.stream_bs(rec),
        "layers": rs.separation(rec),
        "neurons": neurons.table.merge(wide.unstack("side").reset_index(), on="site", how="left"),
        "queries": queries.reset_index(drop=True),
        "sources": rs.sources(rec, neurons.sites[:3], grain="head_source", top=5),
        "proof": proof.assign(difference_change=proof["bs_change_target"] - proof["bs_change_versus_1"]),
    }
    figures = {
        "figure_9": rs.plot_stream(tables["stream"], marked=neurons.sites),
        "figure_10": rs.plot_separation(tables["layers"]),
    }
    rs.save_results(out, tables, figures, {"summary.md": summary(rec, tables, target, versus)})
    return tables


def summary(rec: rs.Recording, tables: dict[str, pd.DataFrame], target: str, versus: str) -> str:
    """What was found, from the numbers."""
    by_kind = tables["layers"].groupby("kind")["difference"].sum()
    ordered = tables["layers"].sort_values("difference", ascending=False)
    best = tables["neurons"].head(3)
    pairs = tables["queries"].query("way == 'direct' and of == 'head_source'").head(4)
    lines = [
        f"# {target!r} against {versus!r} in {rec.model.name}\n",
        f"- The model puts {target!r} {by_kind.sum():+.2f} logits above {versus!r} by its layers: attention "
        f"{by_kind['attn']:+.2f}, MLPs {by_kind['mlp']:+.2f}; {by_kind.idxmax()} separates them more.",
        "- Most of it: " + ", ".join(f"{row.site} {row.difference:+.2f}" for row in ordered.head(4).itertuples()) + ".",
        *(f"- {row.site} ({row.bs_difference:+.2f}) promotes {row.promotes}." for row in best.itertuples()),
        "- Switched on or off by: " + ", ".join(f"{row.site} {row.score:+.2f}" for row in pairs.itertuples()),
        *(f"- Zeroing {row.zeroed} ({row.n}) changes the difference by {row.difference_change:+.2f}."
          for row in tables["proof"].itertuples()),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


# %%
if __name__ == "__main__":
    for name, table in main().items():
        print(f"\n{name}\n{table.head(8).to_string(index=False)}")
