# %% [markdown]
# # The forensic timeline of a prediction
# Reading only: nothing is changed here, and one forward is all it takes.
# 1. What would the model say if it stopped after each half-layer (logit lens), and at each position of the prompt?
# 2. Who added what to the target's logit there (the ledger: its rows sum to the logit), and which single neuron or
#    (head, source) pair added most of it?
# 3. The events: when the target enters the ten most probable tokens, when it comes first, what it displaced.

# %%
from typing import Any

import pandas as pd

import resid_surgery as rs


# %%
def main(
    model: Any = None,
    text: str = "The capital of France is",
    target: str = " Paris",
    versus: tuple[str, ...] = (" London", " Lyon"),
    out: str = "out/timeline",
) -> dict[str, pd.DataFrame]:
    """One row a half-layer: what it says, who wrote to it; and the events, saved with the pictures."""
    model = rs.load("smollm2-135m") if model is None else model
    rec = rs.record(model, rs.Prompt(text, target=target, versus=versus), positions="all")

    # %% What each state says, and where the target stands in it.
    said = rs.lens(rec, top=1)
    first = said[said["rank"] == 1].drop_duplicates("step").set_index("site")
    own = said[said["token_id"] == rec.prompt.target].set_index("site")
    states = first[["step", "token"]].rename(columns={"token": "says"})
    states = states.assign(target_rank=own["rank"], target_prob=own["prob"]).iloc[1:]  # from the embedding on

    # %% Who wrote: the addend that leads to each state (two in a parallel block), and the largest subvalue in it.
    ledger, parts = rs.decompose(rec), rs.decompose(rec, grain="subvalue")
    written = ledger[ledger["kind"].isin(["attn", "mlp"])].reset_index(drop=True)
    timeline = states.reset_index(names="state").loc[written.index // (len(written) // len(states))]
    timeline = timeline.assign(**{name: written[name].to_numpy() for name in ("site", "layer", "kind", "bs_target")})
    part = parts["kind"].map(lambda kind: "attn" if kind == "head_source" else "mlp")
    most = parts.loc[
        parts.groupby(["layer", part.rename("part")])["bs_target"].idxmax(), ["layer", "site", "bs_target"]
    ]
    most = most.assign(kind=part).rename(columns={"site": "most_by", "bs_target": "of_it"})
    timeline = timeline.rename(columns={"bs_target": "added"}).merge(most, on=["layer", "kind"], how="left")

    # %% The events: every change of what would be said, and the target's way up.
    turns = timeline[timeline["says"] != timeline["says"].shift()].assign(event="the first choice changes")
    for rank, name in ((10, "the target is among the ten"), (1, "the target is first")):
        up = timeline[(timeline["target_rank"] <= rank) & (timeline["target_rank"].shift(fill_value=10**6) > rank)]
        turns = pd.concat([turns, up.assign(event=name)])
    events = turns.sort_values("step", kind="stable")[["state", "event", "says", "target_rank", "site", "most_by"]]
    tables = {"timeline": timeline, "events": events, "positions": rs.lens_positions(rec), "stream": rs.stream_bs(rec)}
    figures = {"stream": rs.plot_stream(tables["stream"]), "lens": rs.plot_lens(tables["positions"])}
    rs.save_results(out, tables, figures)
    return tables


# %%
if __name__ == "__main__":
    for name, table in main().items():
        print(f"\n{name}\n{table.head(60).to_string(index=False)}")
