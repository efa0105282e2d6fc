# %% [markdown]
# # Paris and London: attention tells one capital from another
# "The capital of France is" could go on with any capital. What makes it " Paris" and not " London"?
# 1. bs-values of both along the stream (Figure 9 of the source's case study); which layers separate them (Figure 10).
# 2. The heads that separate them most, and what feeds those heads: each lower vector taken out of what their attention
#    reads, with everything recomputed (Figure 11) and with the attention weights fixed (Figure 12).
# 3. The separating subvalues of those heads with the tokens that they promote and suppress (Table 2).
# 4. What those messages were made from at their source position: exact shares. The summary is from the numbers.

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
    heads: int = 3,
    k: int = 8,
    out: str = "out/paris_and_london",
) -> dict[str, pd.DataFrame]:
    """The tables behind the figures, saved with the figures and a summary."""
    model = rs.load("smollm2-135m") if model is None else model
    rec = rs.record(model, rs.Prompt(text, target=target, versus=[versus]), positions="all")
    best = rs.locate(rec, k=heads, kind="head", score="bs_difference")
    fed = rs.attention_sources(rec, best.sites, readout="difference")
    pairs = rs.locate(rec, k=k, kind="head_source", score="bs_difference")
    made = rs.sources(rec, pairs.sites[0], readout="difference", grain="subvalue", top=k)
    tables = {
        "stream": rs.stream_bs(rec),
        "layers": rs.separation(rec),
        "heads": best.table,
        "fed": fed,
        "pairs": with_tokens(rec, pairs),
        "made_from": made,
    }
    figures = {
        "figure_9": rs.plot_stream(tables["stream"], marked=pairs.sites),
        "figure_10": rs.plot_separation(tables["layers"]),
        "figures_11_12": rs.plot_removed(fed),
        "made_from": rs.plot_sources(made),
    }
    rs.save_results(out, tables, figures, {"summary.md": summary(rec, tables, target, versus)})
    return tables


def with_tokens(rec: rs.Recording, found: rs.Located, most: int = 6) -> pd.DataFrame:
    """Located subvalues with their top and bottom tokens."""
    tokens = rs.spectrum(rec, found.sites, top=most)
    wide = tokens.groupby(["site", "side"], sort=False)["token"].agg(lambda some: " ".join(map(repr, some)))
    return found.table.merge(wide.unstack("side").reset_index(), on="site", how="left")


def summary(rec: rs.Recording, tables: dict[str, pd.DataFrame], target: str, versus: str) -> str:
    """What was found, from the numbers."""
    by_kind = tables["layers"].groupby("kind")["difference"].sum()
    ordered = tables["layers"].sort_values("difference", ascending=False)
    head, pair = tables["heads"].iloc[0], tables["pairs"].iloc[0]
    fed = tables["fed"][tables["fed"]["reader"] == head["site"]].sort_values("change")
    made = tables["made_from"][~tables["made_from"]["kind"].isin(["remainder", "constant"])].iloc[0]
    most = ", ".join(f"{s} {v:+.2f}" for s, v in ordered[["site", "difference"]].head(4).values)
    source = rec.prompt.tokens[rs.parse_site(pair["site"]).source]
    return f"""# {target!r} against {versus!r} in {rec.model.name}

- The model puts {target!r} {by_kind.sum():+.2f} logits above {versus!r} by its layers: attention
  {by_kind["attn"]:+.2f}, MLPs {by_kind["mlp"]:+.2f}; {by_kind.idxmax()} separates them more. Most of it: {most}.
- The head that separates most is {head["site"]} ({head["bs_difference"]:+.2f}); the best message comes from {source!r}
  ({pair["site"]} {pair["bs_difference"]:+.2f}) and promotes {pair["promotes"]}.
- The head is fed most by {fed["writer"].iloc[0]}: without it what it writes changes by {fed["change"].iloc[0]:+.2f}, of
  which {fed["by_weights"].iloc[0]:+.2f} through its attention weights.
- Most of that message is {made["writer"]} at position {made["position"]} ({made["share"]:+.3f}).
"""


# %%
if __name__ == "__main__":
    for name, table in main().items():
        print(f"\n{name}\n{table.head(8).to_string(index=False)}")
