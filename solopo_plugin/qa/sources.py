"""Read rows of a file, a folder or a data set of the hub.

A file is known by its content, not by its name. It is read row by row and may be

    JSON lines              one object a line; blank lines, CRLF and a byte order mark are no matter
    a JSON list             of objects, as HotpotQA's files are
    a JSON object           that holds one list of objects under any name, as SQuAD's files do under `data`
    JSON objects            one behind the other, on several lines each
    parquet

All but parquet may be packed by gzip.
"""

import logging
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import ijson

from .files import Bytes, DataError, as_data_error, excerpt, parse_line, reading, shown

log = logging.getLogger(__name__)
Rows = Iterator[tuple[str, Callable[[], dict]]]  # where a row stands, and a function that parses it or raises DataError
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
ROW_FILE = re.compile(r"(?!dataset_info|config\.|state\.)[^.].*\.(jsonl?|ndjson|parquet|arrow|csv|tsv|gz|zip)", re.I)
FILE_NAME = re.compile(r".*\.(jsonl?|ndjson|parquet|csv|tsv|txt|gz|zip)", re.IGNORECASE)  # no data set of the hub
BOM = b"\xef\xbb\xbf"
PACKED = (b"PK", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # zip, bzip2, xz, zstd
PIECE = 1 << 16  # bytes that are parsed at a time where a line is longer; ours
DEEPEST = 100  # containers within each other; ours, so that whatever is read can be shown and written again
# of an object that is a row itself, or an article of SQuAD, and holds no rows
ROW_KEYS = {"id", "_id", "question", "input", "prompt", "answer", "context", "text", "paragraphs", "qas"}
START, END = ("start_map", "start_array"), ("end_map", "end_array")


def source_rows(name: str, key: str, subset: str | None, split: str) -> Rows:
    """Yield every row of a file, a folder or a data set of the hub; what exists here is never asked of the hub.

    Args:
        name: A path or a name of the hub.
        key: What the recipe calls it, for messages.
        subset: Configuration of a hub data set.
        split: Split of a hub data set.

    Raises:
        DataError: There is nothing of that name, or it cannot be read.
    """
    if os.path.isfile(name):
        yield from file_rows(Path(name))
    elif os.path.isdir(name):
        yield from _library_rows(name, os.path.abspath(name), key, subset, split)
    elif os.path.exists(name):
        raise DataError(f"`{key}: {name}` is neither a file nor a folder; a pipe cannot be read, write it to a file.")
    elif FILE_NAME.fullmatch(name) or not HUB_NAME.fullmatch(name):
        raise DataError(f"`{key}`: there is no file {name}, and it is no name of the hub; check the path.")
    else:
        yield from _library_rows(name, name, key, subset, split)


def file_rows(path: Path) -> Rows:
    """Yield every row of a file, told by its content.

    Raises:
        DataError: No such file, or it holds no rows; a bad row among others raises when it is parsed.
    """
    with reading(path) as file:
        head = file.read(1024)
    if head.startswith(b"PAR1"):
        yield from parquet_rows(path)
        return
    if b"\0" in head or head.startswith(PACKED):
        raise DataError(f"{path} begins with {head[:8]!r}, which is no text; unpack it, or make JSON or parquet of it.")
    place = find_rows(path)
    yield from _lines(path) if place is None else _streamed(path, place)


def _lines(path: Path) -> Rows:
    with reading(path) as file:
        for number, line in enumerate(file, 1):
            if line.removeprefix(BOM).strip():
                yield f"{path}:{number}", partial(parse_line, line, path, number)


class Place(NamedTuple):
    """Say where in a file's JSON its rows are."""

    level: int  # containers around a row: 0 one behind the other, 1 in a list, 2 in a list of an object
    key: str | None = None  # of that list


def find_rows(path: Path) -> Place | None:
    """Find out from a file's first JSON value where its rows are; None: one a line.

    A list holds rows. An object holds them in a list of objects, unless it is a row itself: it has a key that rows
    have, or the next one follows.

    Raises:
        DataError: It is an object with several lists, so that it does not say which of them is meant.
    """
    key, line, first, last, keys = "", 0, 0, 0, set()
    lists: dict[str, bool] = {}  # key -> whether of objects
    follows = broken = False
    with reading(path) as file:
        try:
            for line, level, event, value in _events(path, file, several=True):
                if last:
                    follows = True
                    break
                if not first and event != "start_map":
                    return Place(1) if event == "start_array" else None
                first = first or line
                if level == 0 and event == "end_map":
                    last = line
                elif level == 1 and event == "map_key":
                    key = value
                    keys.add(key)
                elif level == 1 and event == "start_array":
                    lists.setdefault(key, False)
                elif level == 2 and event == "start_map" and key in lists:
                    lists[key] = True
        except DataError:
            follows, broken = bool(last), not last
    if follows and last == first:
        return None
    names = [name for name, of_objects in lists.items() if of_objects] or list(lists)
    if not names or keys & ROW_KEYS:
        return None if line == first else Place(0)
    if len(names) > 1 and not broken:
        raise DataError(
            f"{path} is one JSON object with the lists {', '.join(map(repr, names[:9]))}; write the one that is meant "
            "into a file of its own."
        )
    return Place(2, names[0])


def _streamed(path: Path, place: Place) -> Rows:
    """Yield the rows of a file that is no JSON lines, built one by one: HotpotQA's training file is one of 566 MB."""
    builder = key = None
    with reading(path) as file:
        for line, level, event, value in _events(path, file, several=place.level == 0):
            if builder is None:
                if event == "map_key":
                    key = value if level == 1 else key
                    continue
                if level != place.level or event in END or (place.level == 2 and key != place.key):
                    continue
                builder, where = ijson.ObjectBuilder(), f"{path}:{line}"
            builder.event(event, float(value) if event == "number" and not isinstance(value, int) else value)
            if level == place.level and event not in START and event != "map_key":
                yield where, partial(_object, builder.value)
                builder = None


def _events(path: Path, file: Bytes, several: bool) -> Iterator[tuple[int, int, str, Any]]:
    """Yield (line from 1, containers around it, event, value) of a file's JSON; events are those of ijson.

    Args:
        path: Of the file, for messages.
        file: The file, open for reading.
        several: Values may stand one behind the other.

    Raises:
        DataError: It is no JSON, or it ends too early.
    """
    events, level, line = ijson.sendable_list(), 0, 1
    parser = ijson.basic_parse_coro(events, multiple_values=several)
    if file.peek(len(BOM)).startswith(BOM):
        file.read(len(BOM))
    for piece in chain(iter(partial(file.readline, PIECE), b""), [b""]):
        try:
            parser.send(piece) if piece else parser.close()
            error = None
        except ijson.JSONError as caught:
            error = caught
        for event, value in events:
            level -= event in END
            yield line, level, event, value
            level += event in START
            if level > DEEPEST:
                raise DataError(f"{path}:{line}: JSON of more than {DEEPEST} levels, which no row has: {piece[:60]!r}.")
        events.clear()
        if error and not piece:
            raise DataError(f"{path}:{line}: the JSON does not end; is the file complete?")
        if error:  # "reason\n   text around it\n   (right here) ---^\n", or that as `b'...'` where it is not UTF-8
            reason, seen, *_ = [*str(error).removeprefix("b'").replace("\\n", "\n").split("\n"), ""]
            seen = seen.strip() or piece[:60].decode("utf-8", "replace")
            raise DataError(f"{path}:{line}: not JSON ({reason.strip('. ')}): {seen!r}.")
        line += piece.endswith(b"\n")


def _object(item: Any) -> dict:
    if not isinstance(item, dict):
        raise DataError(f"a row must be a JSON object, got {shown(item)}.")
    return item


def parquet_rows(path: Path) -> Rows:
    """Yield every row of a parquet file.

    Raises:
        DataError: No such file, or it cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with as_data_error(path, "read"):
        try:
            parts = (part.to_pylist() for part in pq.ParquetFile(path).iter_batches(256))
            for index, row in enumerate(row for part in parts for row in part):
                yield f"{path}[{index}]", partial(dict, row)
        except pa.ArrowException as error:
            raise DataError(f"{path} is no parquet file that can be read ({error}).") from None


def _library_rows(name: str, place: str, key: str, subset: str | None, split: str) -> Rows:
    """Yield the rows that the `datasets` library finds in a folder or on the hub.

    Args:
        name: As the recipe has it, for messages.
        key: What the recipe calls it, for messages.
        subset: Configuration of a hub data set.
        split: Split of a hub data set.
        place: For the library; of a folder the absolute path, which it cannot take for a name.
    """
    from datasets import load_dataset_builder

    if os.path.isfile(os.path.join(place, "state.json")):  # `load_dataset` alone looks for it
        raise DataError(f"`{key}: {name}` was written by `save_to_disk`; write its rows as parquet or JSON lines.")
    try:
        builder = load_dataset_builder(place, subset)
        builder.download_and_prepare()
        rows, files = builder.as_dataset(split), builder.config.data_files if os.path.isdir(place) else None
    except Exception as error:  # of the hub, the network, the reader: whatever it is, the user must know the name
        reason = excerpt(str(error).strip().removesuffix("."))
        raise DataError(
            f"`{key}: {name}` cannot be loaded (subset {subset!r}, split {split!r}): {type(error).__name__} {reason}"
            + ("." if os.path.isdir(place) else "; without a network give the path of its files, copied here.")
        ) from None
    if files:
        read = {os.path.realpath(file) for file in files.get(split.split("[")[0], [])}
        others = (path for path in sorted(Path(place).rglob("*")) if ROW_FILE.fullmatch(path.name) and path.is_file())
        if unread := [str(path.relative_to(place)) for path in others if os.path.realpath(path) not in read]:
            log.warning(
                f"`{key}: {name}`: {', '.join(unread[:9])}{', ...' * (len(unread) > 9)} not read: by their names other "
                f"files are the split {split!r}; if they are meant, give the names of files, with commas between them."
            )
    for index, row in enumerate(rows):
        yield f"{name}[{index}]", partial(dict, row)
