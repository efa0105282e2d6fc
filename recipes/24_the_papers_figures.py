# %% [markdown]
# # Every figure of the paper, on your own prompt and model
# Yu & Ananiadou (arXiv 2312.12141), as this project reads its text: 3 how scores add up, 5 and 6 which layers and how
# many subvalues help, 7 how few are enough, 8 which layers feed which, 9 the stream, 10 where two tokens part, 11 and
# 12 what attention does, 19 where queries sit, F(l) the curve of one subvalue.
# `resid-surgery recipe recipes/24_the_papers_figures.py --text "..." --target " ..." --figures 9 --figures 10`

# %%
from collections.abc import Sequence
from typing import Any

import pandas as pd

import resid_surgery as rs


# %%
def main(
    model: Any = None,
    text: str = "The capital of France is",
    target: str = " Paris",
    versus: Sequence[str] = (" London",),
    figures: Sequence[str] = ("3", "5", "8", "9", "10", "11", "19", "F(l)"),
    layer: int | None = None,
    kind: str = "neuron",
    out: str = "out/paper",
) -> dict[str, pd.DataFrame]:
    """The figures as pictures, and the stream that they are about as a table."""
    model = rs.load("smollm2-135m") if model is None else model
    rec = rs.record(model, rs.Prompt(text, target=target, versus=versus), positions="all")
    drawn = {f"figure_{one}": rs.plot_paper(rec, one, layer=layer, kind=kind) for one in figures}
    tables = {"stream": rs.stream_bs(rec), "located": rs.locate(rec).table}
    rs.save_results(out, tables, drawn)
    return tables


# %%
if __name__ == "__main__":
    for name, table in main().items():
        print(f"\n{name}\n{table.round(3).to_string(index=False)}")
