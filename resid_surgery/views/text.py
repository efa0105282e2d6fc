"""Text for people: DataFrames as terminal tables, and the sections of `operate`."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from resid_surgery.evidence.operating import Operated
from resid_surgery.sites import Site
from resid_surgery.stream.recording import Recording
from resid_surgery.stream.tables import bs_columns

WIDE = 1000


def console(file: Any = None) -> Console:
    """A console whose tables are never truncated: a narrow terminal wraps lines, a pipe gets them whole."""
    return Console(file=file, highlight=False, soft_wrap=True, width=WIDE)


def show(out: Console, table: pd.DataFrame, *, columns: Sequence[str] | None = None, rows: int | None = None) -> None:
    """Print a DataFrame as a plain table; tokens are quoted, long ones cut."""
    frame = table if columns is None else table[list(columns)]
    shown = frame if rows is None else frame.head(rows)
    grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in shown.columns:
        numeric = pd.api.types.is_numeric_dtype(shown[name]) and not pd.api.types.is_bool_dtype(shown[name])
        grid.add_column(Text(str(name)), justify="right" if numeric else "left", no_wrap=True)
    for values in shown.itertuples(index=False):
        grid.add_row(*(Text(_cell(v, n)) for v, n in zip(values, shown.columns, strict=True)))
    out.print(grid)
    if len(frame) > len(shown):
        out.print(f"... {len(frame) - len(shown)} more rows (--rows 0 or --json for all)")


def show_operated(out: Console, done: Operated, files: Iterable[Path] = ()) -> None:
    """The sections of `resid-surgery operate`, in their fixed order."""
    _section(out, "Tokens used")
    prompt, model = done.rec.prompt, done.rec.model
    out.print(Text(f"{model.name}: {model.note}" if model.note else repr(model)))
    marks = [
        f"{i}:{token!r}" + (" <- predicts" if i == prompt.position else "") for i, token in enumerate(prompt.tokens)
    ]
    out.print(Text("  ".join(marks)))
    _section(out, "What the model predicts")
    show(out, done.predictions)
    _section(out, "Ledger: who wrote the target (bs-values, frozen norm, logits)")
    _brief_ledger(out, done)
    for title, found in (("neurons", done.neurons), ("attention subvalues (head < source position)", done.attention)):
        _section(out, f"Located {title}: {found.evaluations} exact evaluations prove the best "
                      f"{len(found.sites)} of {found.candidates}")  # fmt: skip
        show(out, _with_tokens(done.rec, found.table, found.sites, done.spectra))
    _section(out, "Sources: what switched the best neurons on (shares of each key's pre-activation)")
    _brief_sources(out, done.sources)
    _section(out, "Effect of zeroing them, one by one and together")
    _brief_effects(out, done)
    _section(out, "Closure and timing")
    residuals = ", ".join(f"{name} {value:.1e}" for name, value in done.closure().items())
    times = ", ".join(f"{name} {value:.2f}" for name, value in done.seconds.items())
    out.print(Text(f"largest closure residuals (logits): {residuals} | seconds: {times}"))
    _section(out, "Files")
    listed = [str(f) for f in files]
    out.print(Text("\n".join(listed) if listed else "none written; give --out DIR for CSV tables and a picture"))


def _brief_ledger(out: Console, done: Operated, most: int = 12) -> None:
    table = done.ledger
    tokens = table.attrs["tokens"]
    values = [*tokens, "bs_target_centred"]
    order = table["bs_target"].abs().sort_values(ascending=False).index[:most]
    brief = table.loc[sorted(order), ["site", *values]]
    rest = table.drop(index=order)[values].sum()
    total = table[values].sum()
    ends = pd.DataFrame([["all other addends", *rest], ["sum = the model's bs-values", *total]], columns=brief.columns)
    names = {column: repr(token) for column, token in tokens.items()} | {"bs_target_centred": "target, centred"}
    show(out, pd.concat([brief, ends], ignore_index=True).rename(columns=names))


def token_columns(rec: Recording) -> dict[str, str]:
    """bs-value column -> heading with the token's text."""
    tokens = [rec.prompt.names[i] for i in rec.prompt.readouts]
    return {name: f"bs {_quote(token)}" for name, token in zip(bs_columns(rec), tokens, strict=True)}


def _with_tokens(
    rec: Recording, table: pd.DataFrame, sites: Sequence[Site], spectra: pd.DataFrame, most: int = 4
) -> pd.DataFrame:
    out = table.drop(columns=["kind", "layer", "position", "norm"]).rename(columns=token_columns(rec))
    for side in ("promotes", "suppresses"):
        picked = spectra[(spectra["side"] == side) & (spectra["rank"] <= most)]
        listed = picked.groupby("site")["token"].agg(lambda tokens: " ".join(_quote(t) for t in tokens))
        out[side] = [listed[str(site)] for site in sites]
    return out


def _brief_sources(out: Console, table: pd.DataFrame) -> None:
    """One line per reader, key and grain: the writers by share, then the rest and the constant."""
    lines = []
    for (reader, key, grain), rows in table.groupby(["reader", "key", "grain"], sort=False):
        first = rows.iloc[0]
        writers = ", ".join(
            f"{w} {s:+.2f}" + (f" ({c:.1f})" if c == c and kind != "remainder" else "")
            for w, kind, s, c in zip(
                rows["writer"], rows["kind"], rows["share"], rows["coefficient_without"], strict=True
            )
            if kind != "constant" or s
        )
        lines.append((reader, key, grain, first["reading"], first["coefficient"], writers))
    columns = ["reader", "key", "grain", "pre-activation", "coefficient", "= shares (coefficient without that writer)"]
    show(out, pd.DataFrame(lines, columns=columns).sort_values(["reader", "grain"], kind="stable"))


def _brief_effects(out: Console, done: Operated) -> None:
    rows = []
    for name, group in done.effects().groupby("zeroed", sort=False):
        row: dict[str, Any] = {"zeroed": name}
        for _, one in group[group["role"] != "mover"].iterrows():
            row[f"{one['token']!r} logit"] = one["bs_change"]
            row["p"] = f"{one['prob_before']:.3f} -> {one['prob_after']:.3f}" if one["role"] == "target" else row["p"]
        target = group[group["role"] == "target"].iloc[0]
        row["centred"] = target["bs_change_centred"]
        for part in ("direct", "post_norm", "norm_scale", "indirect"):
            row[part] = target[f"{part}_centred"]
        row["rank"] = f"{target['rank_before']} -> {target['rank_after']}"
        rows.append(row)
    table = pd.DataFrame(rows)
    show(out, table.loc[:, (table != 0).any()])
    name = done.rec.prompt.names[done.rec.prompt.target]
    out.print(Text(f"centred: the change of {name!r} minus the vocabulary's mean, a common shift that changes no "
                   "probability; it is the sum of the columns right of it"))  # fmt: skip
    whole = done.together["all of them"]
    movers = whole.table[whole.table["role"] == "mover"]
    shown = ", ".join(f"{t!r} {a:.3f} -> {b:.3f}" for t, a, b in
                      zip(movers["token"], movers["prob_before"], movers["prob_after"], strict=True))  # fmt: skip
    out.print(Text(f"biggest other movers when all of them are zeroed: {shown}"))
    change = whole.ledger()
    others = change[~change["operated"] & (change["kind"] != "norm_scale")]
    order = others["bs_change"].abs().sort_values(ascending=False).index[:5]
    who = ", ".join(
        f"{s} {v:+.3f}" for s, v in zip(others.loc[order, "site"], others.loc[order, "bs_change"], strict=True)
    )
    out.print(Text(f"layers that compensated or followed (target's logits): {who}"))


def _section(out: Console, title: str) -> None:
    out.print()
    out.print(Text(f"== {title}", style="bold"))


def _cell(value: Any, column: str) -> str:
    if column == "token":
        return _quote(str(value))
    if value is pd.NA or value is None:
        return ""
    if isinstance(value, float):
        if value != value:
            return ""
        small = column in ("closure", "error", "tolerance")
        return f"{value:.1e}" if small else f"{round(value, 4) + 0.0:.4f}"
    return str(value)


def _quote(token: str, most: int = 16) -> str:
    text = repr(token)
    return text if len(text) <= most else text[: most - 1] + "…"
