"""Packing: tables and plain data as strict JSON and back, to the last bit.

JSON has no NaN: what is missing is null. Infinite numbers are the texts "Infinity" and "-Infinity" in columns of
numbers, and {"$float": ...} elsewhere.
"""

import json
from collections.abc import Mapping
from math import inf, isfinite
from typing import Any

import numpy as np
import pandas as pd

from resid_surgery._check import message
from resid_surgery._files import parse_json
from resid_surgery.errors import ArgumentError, LoadError

_NAMED = {"Infinity": inf, "-Infinity": -inf}
_TAG = "$float"


def plain(value: Any, where: str) -> Any:
    """Data as JSON has it: dicts, lists, text, numbers, yes/no and None; NaN becomes None.

    Raises:
        ArgumentError: something else, named by where it stands.
    """
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ArgumentError(message(where, "of named entries", list(value)))
        return {key: plain(one, f"{where}.{key}") for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one, where) for one in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist(), where)
    if isinstance(value, np.generic) or getattr(value, "ndim", None) == 0:  # a torch scalar too
        value = value.item()
    if value is None or value is pd.NA or (isinstance(value, float) and value != value):
        return None
    if isinstance(value, (str, bool, int, float)):
        return value
    raise ArgumentError(message(where, "text, numbers, lists and dicts of them", value, do="Convert it first."))


def plain_frame(frame: Any, name: str) -> pd.DataFrame:
    """A table that `pack` gives back exactly: columns named by texts, rows numbered, cells plain.

    Raises:
        ArgumentError: no table, columns with a name twice, or a cell that JSON cannot hold.
    """
    if not isinstance(frame, pd.DataFrame):
        raise ArgumentError(message(name, "a DataFrame", type(frame).__name__))
    columns = [str(one) for one in frame.columns]
    if len(set(columns)) < len(columns):
        raise ArgumentError(message(name, "a table whose columns have different names", columns))
    found = {column: _plain_column(frame.iloc[:, i], f"{name}.{column}") for i, column in enumerate(columns)}
    return pd.DataFrame(found, columns=pd.Index(columns, dtype=object), index=pd.RangeIndex(len(frame)))


def pack(frame: pd.DataFrame) -> dict[str, Any]:
    """A table as {"columns": [{"name", "dtype"}], "rows": [[...]]}."""
    columns = [{"name": str(name), "dtype": _dtype(frame[name])} for name in frame]
    cells = [[_packed(one, c["dtype"]) for one in frame[c["name"]].tolist()] for c in columns]
    return {"columns": columns, "rows": [list(row) for row in zip(*cells, strict=True)] if columns else []}


def unpack(data: Mapping[str, Any]) -> pd.DataFrame:
    """The table that `pack` was given.

    Raises:
        LoadError: a row is too short, or a column of an unknown kind.
    """
    names = [one["name"] for one in data["columns"]]
    if not all(isinstance(one, str) for one in names) or len(set(names)) < len(names):
        raise LoadError("a table of the report must have columns of different names; it does not.")
    if any(len(row) != len(names) for row in data["rows"]):
        raise LoadError(f"a table of the report has a row with other than its {len(names)} columns.")
    found = {}
    for i, one in enumerate(data["columns"]):
        found[one["name"]] = _unpacked([row[i] for row in data["rows"]], one["dtype"], one["name"])
    return pd.DataFrame(found, columns=pd.Index(names, dtype=object), index=pd.RangeIndex(len(data["rows"])))


def pack_data(value: Any) -> Any:
    """Plain data with infinite numbers as texts."""
    if isinstance(value, dict):
        return {key: pack_data(one) for key, one in value.items()}
    if isinstance(value, list):
        return [pack_data(one) for one in value]
    return {_TAG: _infinite(value)} if isinstance(value, float) and not isfinite(value) else value


def unpack_data(value: Any) -> Any:
    """What `pack_data` was given."""
    if isinstance(value, dict):
        if set(value) == {_TAG} and value[_TAG] in _NAMED:
            return _NAMED[value[_TAG]]
        return {key: unpack_data(one) for key, one in value.items()}
    return [unpack_data(one) for one in value] if isinstance(value, list) else value


def strict_json(data: Any) -> str:
    """As text that every JSON reader takes."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, indent=1)


def read_json(text: str) -> Any:
    """The data of a strict JSON text.

    Raises:
        LoadError: it is none, or holds NaN.
    """
    try:
        return parse_json(text)
    except ValueError as error:
        raise LoadError(f"the report is no JSON text: {error}.") from None


def _plain_column(column: "pd.Series[Any]", where: str) -> "pd.Series[Any]":
    fresh = column.reset_index(drop=True)
    if _dtype(fresh) != "object":
        return fresh
    return pd.Series([plain(one, where) for one in fresh.tolist()], dtype=object)


def _dtype(column: "pd.Series[Any]") -> str:
    kind = column.dtype
    numbers = pd.api.types.is_bool_dtype(kind) or pd.api.types.is_numeric_dtype(kind)
    if numbers and not pd.api.types.is_complex_dtype(kind) and not isinstance(kind, pd.CategoricalDtype):
        return str(kind)
    return "str" if isinstance(kind, pd.StringDtype) and str(kind) == "str" else "object"


def _packed(value: Any, dtype: str) -> Any:
    if value is None or value is pd.NA or (isinstance(value, float) and value != value):
        return None
    if dtype == "object":
        return pack_data(value)
    return _infinite(value) if isinstance(value, float) and not isfinite(value) else value


def _unpacked(cells: list[Any], dtype: str, name: str) -> "pd.Series[Any]":
    if dtype == "object":
        return pd.Series([unpack_data(one) for one in cells], dtype=object)
    if any(isinstance(one, (list, dict)) for one in cells):
        raise LoadError(f"column {name!r} of the report is not {dtype}: it holds lists.")
    numbers = "float" in dtype.lower()
    filled = [_NAMED.get(one, one) if numbers and isinstance(one, str) else one for one in cells]
    try:
        return pd.Series(filled, dtype=dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise LoadError(f"column {name!r} of the report is not {dtype}: {error}.") from None


def _infinite(value: float) -> str:
    return "Infinity" if value > 0 else "-Infinity"
