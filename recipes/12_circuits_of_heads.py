# %% [markdown]
# # Circuits of heads: what weights and patterns say
# 1. Previous-token, induction, duplicate-token and first-token heads, on random repeats of random lengths.
# 2. Copying heads: eigenvalues of what a source token makes a head write.
# 3. Which heads compose: does one read what the other writes, through its query, key or value?
# 4. One head on one prompt: its messages, what the best was made from, and what its weights say of the same token.
# 5. A neuron as a key-value memory: what its key matches in a small corpus, what its value promotes.

# %%
from collections.abc import Sequence
from typing import Any

import pandas as pd

import resid_surgery as rs

CORPUS = tuple(
    f"{start} {country} is a country. The capital of {country} is well known, and people there speak their language."
    for start in ("Today", "In Europe,")
    for country in ("France", "Italy", "Spain", "Germany", "Japan", "Russia", "Egypt", "Poland", "Greece", "Canada")
)


# %%
def main(
    model: Any = None,
    text: str = "The capital of France is",
    target: str = " Paris",
    repeats: int = 8,
    corpus: Sequence[str] = CORPUS,
    out: str = "out/circuits_of_heads",
) -> dict[str, pd.DataFrame]:
    """The tables behind the figures, saved with the figures."""
    model = rs.load("smollm2-135m") if model is None else model
    patterns = rs.head_patterns(model, n=repeats)
    copying = rs.copying(model)
    induction = patterns.nlargest(3, "induction")["site"].tolist()
    before = patterns.nlargest(3, "previous_token")["site"].tolist()
    rec = rs.record(model, rs.Prompt(text, target=target), positions="all")
    head = rs.locate(rec, k=1, kind="head").sites[0]
    pair = rs.locate(rec, k=1, kind="head_source", layers=[head.layer]).sites[0]
    neuron = rs.locate(rec, k=1).sites[0]
    memory = rs.neuron_memory(model, neuron, corpus)
    tables = {
        "patterns": patterns,
        "copying": copying,
        "composition": rs.composition(model, writers=before, readers=induction),
        "messages": rs.messages(rec, head),
        "message_made_from": rs.expand_message(rec, pair, grain="layer"),
        "weights_say": rs.ov_tokens(model, head, rec.prompt.tokens[pair.source], after="mlp0"),
        "token_alone": rs.token_constants(rec),
        "matches": memory.triggers,
        "promotes": memory.values,
    }
    figures = {
        "induction": rs.plot_heads(patterns, "induction", label="induction score"),
        "previous_token": rs.plot_heads(patterns, "previous_token", label="previous-token score"),
        "copying": rs.plot_heads(copying, "copying", label="copying score"),
    }
    rs.save_results(out, tables, figures)
    return tables


# %%
if __name__ == "__main__":
    for name, table in main().items():
        print(f"\n{name}\n{table.head(8).to_string(index=False)}")
