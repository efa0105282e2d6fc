# %% [markdown]
# # Twenty edits in a row: does the first one survive the last?
# Each fact is fitted on the model that the edits before it left, with the keys of the earlier ones held in place (least
# squares with a previous-key term). Validation asks every fact twice: right after its own edit, and again at the end.
#
# **Why INCONCLUSIVE is the expected word for retention.** The gate wants at least .90, with the lower bound of an
# interval. Twenty successes of twenty have a Wilson lower bound of .839 at 95 %: they cannot prove .90, however good
# the method is (35 could, and 73 prove .95). As all gates share one error, each is held at more: at 99 %, which the
# table names, the bound is .751, and 60 edits without a failure would be needed. Only failures can decide this gate
# here. The verdict is that of all gates: side effects that are proven (the KL gates) make it FAIL.

# %%
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

import resid_surgery as rs


# %%
def facts(model: Any, many: int = 20) -> list[rs.Rewrite]:
    """Capitals that the model knows, each to be rewritten to another known one's answer."""
    table = rs.known_facts("capital").set_index("prompt")
    table = table[table["subject"] != ""]
    known = [p for p in rs.facts("capital", model=model) if p.text in table.index]
    wanted = {}
    for i, prompt in enumerate(known):
        new = known[(i + 7) % len(known)].target
        if new != prompt.target:
            wanted.setdefault(table.at[prompt.text, "subject"], rs.rewrite(prompt.text, new))
    return list(wanted.values())[:many]


def stream(model: Any, wanted: Sequence[rs.Rewrite], steps: int) -> list[rs.Edit]:
    """One edit after another, each fitted on what the ones before it left."""
    made = [rs.edit_least_squares(model, [wanted[0]], steps=steps)]
    for one in wanted[1:]:
        so_far = made[0]
        for edit in made[1:]:
            so_far = so_far + edit
        with so_far.applied(model) as edited:
            made.append(rs.edit_least_squares(edited, [one], previous=made, steps=steps))
    return made


# %%
def main(
    model: Any = None,
    many: int = 20,
    steps: int = 25,
    budget: str | rs.Budget = "smoke",
    out: str | Path = "out/twenty",
) -> dict[str, pd.DataFrame]:
    """The stream, its curve of retention, and the gates."""
    model = rs.load("smollm2-135m") if model is None else model
    made = stream(model, facts(model, many), steps)
    done = rs.validate(model, made, budget=budget)
    tables = {"gates": done.gates, "stream": done.tables["stream"], "curve": done.tables["curve"]}
    rs.save_results(out, tables, {"curve": rs.plot_retention(done.tables["curve"])})
    rs.write_report(done, Path(out) / "report.html")
    return tables


# %%
if __name__ == "__main__":
    found = main()
    print(found["gates"][["gate", "state", "value", "low", "high", "fail", "n", "why"]].round(3).to_string(index=False))
    print("\n" + found["curve"].round(3).to_string(index=False))
    print("\n" + found["stream"][["fact", "new", "at_once", "retained", "said_at_end"]].to_string(index=False))
