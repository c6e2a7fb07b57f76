"""Read and write the rows of a data set, as build_data.py exports them and training, evaluation and probe read them."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

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


def rows_of_file(path: Path) -> Iterator[dict]:
    """Yield the rows of an exported file, .jsonl or .parquet, with all columns of `SCHEMA`."""
    rows = (load() for _, load in parquet_rows(path)) if path.suffix == ".parquet" else read_jsonl(path)
    for row in rows:
        if lacking := [name for name in SCHEMA.names if name not in row]:
            raise DataError(f"{path} lacks the column `{lacking[0]}`; only exports of build_data.py have all of them.")
        yield row


def write_parquet(path: Path, rows: Iterable[dict], schema: pa.Schema = SCHEMA) -> None:
    """Write rows as a parquet file, atomically."""
    rows = iter(rows)
    with replacing(path) as file, pq.ParquetWriter(file, schema) as writer:
        while part := list(islice(rows, 256)):
            writer.write_table(pa.Table.from_pylist(part, schema=schema))
