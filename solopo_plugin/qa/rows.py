"""Read and write the rows of a data set, as build_data.py exports them and training, evaluation and probe read them."""

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .files import DataError, read_jsonl, replacing
from .sources import parquet_rows

SOLO = {"prompt": "prompt", "long_prompt": "long_prompt", "chosen": "chosen", "rejected": "rejected"}
_EVIDENCE = pa.list_(pa.struct([("paragraph", pa.int64()), ("start", pa.int64()), ("end", pa.int64())]))
SCHEMA = pa.schema(
    [(name, pa.string()) for name in SOLO]
    + [("id", pa.string()), ("question", pa.string()), ("answers", pa.list_(pa.string())), ("hops", pa.int64())]
    + [(f"{part}_tokens", pa.int64()) for part in ("short", "long", "chosen", "rejected")]
    + [(f"{side}_paragraphs", pa.int64()) for side in ("short", "long")]
    + [(f"{side}_evidence", _EVIDENCE) for side in ("short", "long")]  # offsets are characters of the prompt
    + [("short_dropped", pa.list_(pa.int64()))]  # evidence that a lossy short context lacks, from 0
    + [(f"pass_rate_{side}", pa.float64()) for side in ("short", "long")]
)
SEVERAL = SCHEMA.append(pa.field("all_rejected", pa.list_(pa.string())))  # `rejected` is its first

OPTIONAL = {"hops", "short_dropped", "pass_rate_short", "pass_rate_long", "all_rejected"}  # null where it is not known
WORDS = {
    pa.string(): "a text",
    pa.int64(): "a whole number",
    pa.float64(): "a finite number",
    pa.list_(pa.string()): "a list of texts",
    pa.list_(pa.int64()): "a list of whole numbers",
    _EVIDENCE: "a list of {paragraph, start, end}, whole numbers",
}


def rows_of_file(path: Path) -> Iterator[dict]:
    """Yield the rows of an exported file, .jsonl or .parquet, with all columns of `SCHEMA`."""
    rows = (load() for _, load in parquet_rows(path)) if path.suffix == ".parquet" else read_jsonl(path)
    for row in rows:
        if lacking := [name for name in SCHEMA.names if name not in row]:
            raise DataError(f"{path} lacks the column `{lacking[0]}`; only exports of build_data.py have all of them.")
        yield row


def checked_rows(path: Path) -> Iterator[dict]:
    """Yield the rows of an exported file; a value that is not of its column's type is refused."""
    for number, row in enumerate(rows_of_file(path), 1):
        for column in SEVERAL:
            value = row.get(column.name)
            if not (value is None and column.name in OPTIONAL or _is_of(value, column.type)):
                raise DataError(
                    f"{path}, row {number}: column `{column.name}` must be {WORDS[column.type]}, got {value!r:.60}; "
                    "export the rows again, or mend this one."
                )
        yield row


def _is_of(value: Any, kind: pa.DataType) -> bool:
    if pa.types.is_list(kind):
        return isinstance(value, list) and all(_is_of(part, kind.value_type) for part in value)
    if pa.types.is_struct(kind):
        return isinstance(value, dict) and all(_is_of(value.get(part.name), part.type) for part in kind)
    if pa.types.is_floating(kind):
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is (str if pa.types.is_string(kind) else int)


def write_parquet(path: Path, rows: Iterable[dict], schema: pa.Schema = SCHEMA) -> None:
    """Write rows as a parquet file, atomically."""
    rows = iter(rows)
    with replacing(path) as file, pq.ParquetWriter(file, schema) as writer:
        while part := list(islice(rows, 256)):
            writer.write_table(pa.Table.from_pylist(part, schema=schema))
