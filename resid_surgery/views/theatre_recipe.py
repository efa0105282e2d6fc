"""What was done in the theatre as a recipe: a file of percent cells with ``main(model, ...)`` that does it again."""

from resid_surgery.surgery.interventions import Intervention
from resid_surgery.views.lettering import escaped
from resid_surgery.views.theatre import Stage
from resid_surgery.views.theatre_acts import Outcome

FILE = "theatre_recipe.py"

_HEAD = """\
# %% [markdown]
# # {title}
# Exported from the theatre.
{seen}

# %%
from typing import Any

import pandas as pd

import resid_surgery as rs

"""
_OPERATED = '''\
OPERATIONS = [
{operations}
]


# %%
def main(
    model: Any = None,
    text: str = {text},
    target: str = {target},
    versus: tuple[str, ...] = {versus},
    new: int = {new},
) -> dict[str, pd.DataFrame]:
    """Operate on a prediction, measure what that does, and go on generating."""
    model = {load} if model is None else model
    rec = rs.record(model, rs.Prompt(text, target=target, versus=versus), positions="all")

    # %% What the operations did to target and competitors, split; and who removed, added and compensated.
    effect = rs.intervene(rec, OPERATIONS)

    # %% How the text goes on, with the operations at every predicting position.
    with rs.under(model, OPERATIONS) as altered:
        continuation = altered.generate(text, max_new_tokens=new)
    return {{
        "effect": effect.table,
        "ledger": effect.ledger(),
        "continuation": pd.DataFrame({{"text": [text], "continuation": [continuation]}}),
    }}


'''
_PLAIN = '''\

# %%
def main(
    model: Any = None,
    text: str = {text},
    target: str = {target},
    versus: tuple[str, ...] = {versus},
    k: int = 10,
) -> dict[str, pd.DataFrame]:
    """Read the stream and locate what wrote the target."""
    model = {load} if model is None else model
    rec = rs.record(model, rs.Prompt(text, target=target, versus=versus), positions="all")
    return {{"predictions": rs.predictions(rec), "stream": rs.stream_bs(rec), "neurons": rs.locate(rec, k=k).table}}


'''
_TAIL = """\
# %%
if __name__ == "__main__":
    for name, table in main().items():
        print(f"\\n{name}\\n{table.head(12).to_string(index=False)}")
"""


def recipe(stage: Stage, operations: tuple[Intervention, ...], outcome: Outcome, new: int, load: str) -> str:
    """A recipe that records the prompt and carries the operations out.

    Args:
        stage: the prompt. operations, outcome: what was done, and what came of it, for the note at the top.
        new: how many tokens are generated. load: the expression that opens the model.

    Returns:
        Python, whatever stands in the prompt: texts are written as literals, on one line each.
    """
    p = stage.rec.prompt
    fields = {
        "text": _literal(stage.text),
        "target": _literal(p.names[p.target]),
        "versus": _tuple([_literal(p.names[i]) for i in p.versus]),
        "operations": "\n".join(f"    rs.{_ascii(repr(one))}," for one in operations),
        "new": new,
        "load": load,
    }
    title = f"{'What was done to' if operations else 'Reading'} {_literal(stage.text)}"
    head = _HEAD.format(title=title, seen=_seen(stage, outcome))
    return head + (_OPERATED if operations else _PLAIN).format(**fields) + _TAIL


def load_text(name: str, dtype: str | None, device: str | None) -> str:
    """The expression that opens a model as the command line did."""
    options = "".join(f", {key}={_literal(value)}" for key, value in (("dtype", dtype), ("device", device)) if value)
    return f"rs.load({_literal(name)}{options})"


def _seen(stage: Stage, outcome: Outcome) -> str:
    """What the theatre showed, as comments."""
    model = stage.rec.model
    lines = [f"# On {_literal(model.name)} ({str(model.dtype).removeprefix('torch.')}) it showed:"]
    for row in outcome.distribution.to_dict("records"):
        if row["role"] != "top":
            values = [f"{row[name]:.6g}" for name in ("bs_before", "bs_after", "prob_before", "prob_after")]
            lines.append(
                f"# - {_literal(row['token'])}: logit {values[0]} -> {values[1]}, p {values[2]} -> {values[3]}"
            )
    return "\n".join(lines)


def _literal(text: str) -> str:
    """A string literal of one line, with double quotes where that is plain."""
    shown = _ascii(repr(text))
    plain = shown.startswith("'") and '"' not in shown and "\\" not in shown
    return f'"{shown[1:-1]}"' if plain else shown


def _ascii(code: str) -> str:
    """Code whose strings hold no invisible or reordering character."""
    return "".join(c if c.isprintable() else escaped(c) for c in code)


def _tuple(items: list[str]) -> str:
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
