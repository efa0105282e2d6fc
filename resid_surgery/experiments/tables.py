"""Tables: the columns of a run's Parquet files, known before it starts, and tables made to fit them.

| table | a row | files |
|---|---|---|
| prompts | a prompt that was dealt with: done, failed, or unknown to the model | the ledger of what is finished |
| rows | an operation, or several together, on a prompt | |
| located | a site of a set found for a prompt | |
| effects | a token of a row, with its split change (``measure="effect"``) | |
| failures | a prompt that failed | |
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from resid_surgery._files import open_regular, parse_json, utf8
from resid_surgery.errors import ArgumentError, LoadError
from resid_surgery.experiments.cases import Case
from resid_surgery.experiments.columns import (
    ABOUT,
    CLEAN,
    EFFECTS,
    FAILURES,
    LOCATED,
    MEASURED,
    REAL,
    SPOT,
    TEXT,
    WHOLE,
)
from resid_surgery.experiments.plans import Plan

LEDGER = "prompts"
TABLES = ("prompts", "rows", "located", "effects", "failures")
MARK, MARK_HASH = b"resid_surgery", b"resid_surgery xxh3_128"
LARGEST_FOOTER = 1 << 28
AGAIN = "Remove the shard's files from every table's folder, and resume the run."
TYPES = {"string": pa.string(), "int64": pa.int64(), "double": pa.float64(), "bool": pa.bool_()}


def schemas(plan: Plan, cases: Sequence[Case], versus: int) -> dict[str, pa.Schema]:
    """The columns of every table of a run, in order.

    Args:
        plan, cases: of the run. versus: the most competitors that a prompt has.
    """
    labels = label_types(cases)
    axes = {name: type_of(name, values) for name, values in plan.axes.items()}
    about = ABOUT | labels
    found = {"prompts": about | CLEAN, "failures": about | FAILURES}
    if plan.intervene:
        bs = {f"bs_{name}": REAL for at in _readouts(versus) for name in (at, f"change_{at}")}
        found["rows"] = (
            {"prompt": WHOLE, "row": WHOLE} | about | {"arm": TEXT} | axes | SPOT | bs | MEASURED[plan.measure]
        )
    if any("sites" not in one for one in plan.locate.values()):
        versus_bs = {f"bs_{at}": REAL for at in _readouts(versus)}
        found["located"] = about | {"set": TEXT} | axes | LOCATED | versus_bs
    if plan.intervene and plan.measure == "effect":
        found["effects"] = about | {"row": WHOLE, "arm": TEXT} | axes | EFFECTS
    return {name: pa.schema(list(found[name].items())) for name in TABLES if name in found}


def schema_of(manifest: Mapping[str, Any], table: str) -> pa.Schema:
    """The columns of a table, as the manifest names them."""
    return pa.schema([(name, TYPES[kind]) for name, kind in manifest["tables"][table].items()])


@contextmanager
def reading(what: Any) -> Iterator[None]:
    """Errors of reading Parquet as a `LoadError` that names the file or folder."""
    try:
        yield
    except LoadError:
        raise
    except (OSError, ValueError, LookupError, OverflowError, pa.ArrowException) as error:
        raise LoadError(f"{what} is damaged or cannot be read: {' '.join(str(error).split())[:300]}.") from error


def mark_of(file: Path, shard: str, run: str, schema: pa.Schema) -> dict[str, str]:
    """Table -> hash of its footer, as the file tells that finished a shard, if that is of this run and whole.

    Raises:
        LoadError: it is damaged, missing or another one.
    """
    with reading(file):
        open_regular(file).close()
        held = pq.read_metadata(file)
        columns = held.schema.to_arrow_schema()
    content, its_hash = ((held.metadata or {}).get(name, b"") for name in (MARK, MARK_HASH))
    try:
        said = parse_json(content) if xxhash.xxh3_128_hexdigest(content).encode() == its_hash else None
    except ValueError:
        said = None
    if not isinstance(said, dict) or (said.get("run"), said.get("shard")) != (run, shard):
        raise LoadError(f"{file} is not shard {shard} of this run. {AGAIN}")
    if columns != schema or held.num_rows != said.get("rows") or not isinstance(said.get("footers"), dict):
        raise LoadError(f"{file} is damaged: it has other columns or rows than it was written with. {AGAIN}")
    return dict(said["footers"])


def footer_hash(file: Path) -> str:
    """Hash of a Parquet file's footer: what it holds, where, and the statistics that filters go by. The pages
    themselves have checksums.

    Raises:
        OSError: it cannot be read, or is no Parquet file.
    """
    with open_regular(file) as held:
        size = held.seek(0, os.SEEK_END)
        held.seek(max(0, size - 8))
        length = int.from_bytes(held.read(4), "little") + 8
        if length > min(size, LARGEST_FOOTER):
            raise OSError("its footer does not fit into it")
        held.seek(size - length)
        return xxhash.xxh3_128_hexdigest(held.read())


def marked(table: pa.Table, mark: Mapping[str, Any]) -> pa.Table:
    """A table with a mark, as `mark_of` reads it."""
    content = json.dumps(mark).encode()
    return table.replace_schema_metadata({MARK: content, MARK_HASH: xxhash.xxh3_128_hexdigest(content).encode()})


def label_types(cases: Sequence[Case]) -> dict[str, pa.DataType]:
    """The type of every label: whole, real or truth where all values are, else text.

    Raises:
        ArgumentError: texts and numbers are mixed.
    """
    values: dict[str, list[Any]] = {}
    for case in cases:
        for name, value in case.labels.items():
            values.setdefault(name, []).append(value)
    return {name: type_of(name, some) for name, some in values.items()}


def type_of(name: str, values: Sequence[Any]) -> pa.DataType:
    """The type of a column of plain values.

    Raises:
        ArgumentError: texts and numbers are mixed.
    """
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {bool} and kinds:
        return pa.bool_()
    if kinds <= {str}:
        return TEXT
    if kinds == {int}:
        return WHOLE
    if kinds <= {int, float} and all(abs(value) <= 2**53 for value in values if isinstance(value, int)):
        return REAL
    raise ArgumentError(f"`{name}` must have values of one kind (texts, numbers or truths), and whole numbers beside "
                        f"others must be at most 2**53; got {values[:5]}.")  # fmt: skip


def fit(table: pd.DataFrame, schema: pa.Schema) -> pa.Table:
    """A table with exactly a schema's columns; those that are missing are empty.

    Raises:
        KeyError: the table has a column that the schema has not.
    """
    odd = [name for name in table.columns if name not in schema.names]
    if odd:
        raise KeyError(f"columns {odd} are in no schema of this run: {schema.names}")
    columns = [_array(table[name], kind) if name in table else pa.nulls(len(table), kind)
               for name, kind in zip(schema.names, schema.types, strict=True)]  # fmt: skip
    return pa.Table.from_arrays(columns, schema=schema)


def frame(table: pa.Table) -> pd.DataFrame:
    """An Arrow table as pandas; whole numbers stay whole where some are missing."""
    whole = {field.name: pd.Int64Dtype() for field in table.schema if pa.types.is_integer(field.type)
             and table[field.name].null_count}  # fmt: skip
    plain = table.drop_columns(list(whole)).to_pandas()
    for name in whole:
        plain[name] = table[name].to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
    return pd.DataFrame(plain[table.column_names])


def said(number: int, case: Case, text: Mapping[str, str]) -> dict[str, Any]:
    """What every row of a prompt says of it."""
    return {"prompt": number} | {name: escaped(value) for name, value in {**text, **case.labels}.items()}


def escaped(value: Any) -> Any:
    """A text without the lone surrogates that no file takes; anything else as it is."""
    return utf8(value).decode() if isinstance(value, str) else value


def _readouts(versus: int) -> list[str]:
    return ["target", *(f"versus_{i}" for i in range(1, versus + 1))]


def _array(values: "pd.Series[Any]", kind: pa.DataType) -> pa.Array:
    if kind == TEXT:
        plain = [None if value is None or value is pd.NA or value != value else escaped(value) for value in values]
        return pa.array(plain, TEXT)
    return pa.Array.from_pandas(values, type=kind)
