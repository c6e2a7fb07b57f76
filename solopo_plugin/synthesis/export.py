"""Export the rows, stage 6: files that `stage: solopo` and its baselines train on, and entries in dataset_info.json.

A row has the stage's four columns (`prompt`, `long_prompt`, `chosen`, `rejected`) and says where it comes from. One
file holds the rows of several entries; `_val` files and entries are there with `val_size`. What rows have no column
for, where their evidence comes from and how a model graded their answers, stands in <dataset_name>_origins.jsonl, if
anything is known: {"id", "origins": of each paragraph of the evidence, "grades": {set: [chosen, rejected]}}.

With `num_rejected` above 1 a row has one column more, `all_rejected`, the list that `stage: solopo` trains on;
`rejected` is its first, for the host's stages, which take no list.
"""

import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..qa.files import DataError, as_data_error, dump, lock_folder, read_jsonl, replacing, write_jsonl
from ..qa.provenance import file_hash
from ..qa.rows import SCHEMA, SEVERAL, SOLO, write_parquet
from .pairs import SETS
from .recipe import DataRecipe

log = logging.getLogger(__name__)
BLANKS = " \t\r\n"  # of JSON
ORIGINS = "_origins.jsonl"  # end of the name of the file beside the rows
TYPED_BY = 10 << 20  # bytes of a file of JSON lines from which `datasets` takes the types of all columns
TIME = re.compile(r"\d{4}-\d\d-\d\d([ T]\d\d(:\d\d){0,2}Z?)?")  # what it then takes for one
SHORT_PO = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
LONG_PO = {"prompt": "long_prompt", "chosen": "chosen", "rejected": "rejected"}
SHORT_SFT = {"prompt": "prompt", "response": "chosen"}
LONG_SFT = {"prompt": "long_prompt", "response": "chosen"}
# last part of an entry's name -> set of rows and columns; `long`: answers sampled on the long context that they stand
# behind, `expand_long`: answers sampled on the short context
ENTRIES = {
    "solopo": ("solopo", SOLO),
    "short_po": ("solopo", SHORT_PO),
    "expand_long_po": ("solopo", LONG_PO),
    "long_po": ("long_po", LONG_PO),
    "longpo": ("longpo", SOLO),
    "sft_short": ("solopo", SHORT_SFT),
    "sft_long": ("long_po", LONG_SFT),
    "sft_expand_long": ("solopo", LONG_SFT),
}


def run(recipe: DataRecipe, work: Path, own: dict[str, str] | None = None) -> tuple[dict, dict[str, str]]:
    """Write the data files and register them; returns the number of rows and the hash of each file.

    Args:
        recipe: Of data.
        work: Its work folder.
        own: The hashes after the last export of the same work folder; of other rows there is a warning. None: of none.

    Raises:
        DataError: A file or an entry of that name is there and not ours.
    """
    folder, name = Path(recipe.dataset_dir), recipe.dataset_name
    ours = file_names(name)
    with lock_folder(folder):  # no second export changes the same files meanwhile
        before = row_files(recipe)
        info, text = read_info(folder)
        check_ours(folder, text, name, ours)
        counts = write_files(recipe, work)
        n_origins = write_origins(recipe, work)
        for suffix, (rows, columns) in ENTRIES.items():
            for val in ("", "_val"):
                file_name = f"{name}_{rows}{val}.{recipe.export_format}"
                ranking = {"ranking": True} if "chosen" in columns else {}
                if columns == SOLO and recipe.num_rejected > 1:
                    columns = SOLO | {"rejected": "all_rejected"}
                entry = {"file_name": file_name, **ranking, "columns": columns}
                text = set_member(text, f"{name}_{suffix}{val}", entry if file_name in counts else None)
        with replacing(info) as file:
            file.write(text.encode("utf-8"))
        written = {*counts, *([f"{name}{ORIGINS}"] if n_origins else [])}
        for file_name in ours - written:
            (folder / file_name).unlink(missing_ok=True)  # of an earlier run with other settings
        after = row_files(recipe)
    warn_of_others(recipe, before, before if own is None else own, after)
    return counts, after


def file_names(name: str) -> set[str]:
    """Return the names of all files that an export of the data set `name` may write, with whatever settings."""
    files = {f"{name}_{rows}{val}.{end}" for rows in SETS for val in ("", "_val") for end in ("jsonl", "parquet")}
    return files | {f"{name}{ORIGINS}"}


def row_files(recipe: DataRecipe) -> dict[str, str]:
    """Return the hashes of the data set's files that are there, by name."""
    folder = Path(recipe.dataset_dir)
    return {file: file_hash(folder / file) for file in sorted(file_names(recipe.dataset_name))
            if os.path.isfile(folder / file)}  # fmt: skip


def warn_of_others(recipe: DataRecipe, before: dict[str, str], own: dict[str, str], after: dict[str, str]) -> None:
    """Warn of files that an export has replaced, or removed, and that this work folder had not written.

    Args:
        recipe: Of data.
        before: What `row_files` returned before the export.
        own: What it had returned after the last export of the same work folder.
        after: What it returns after this export.
    """
    others = [file for file, digest in before.items() if digest not in (own.get(file), after.get(file))]
    if others:
        log.warning(
            "%s: %s held rows that another work folder had exported, or that were edited; they have been replaced. "
            "Another `dataset_name` keeps both.", recipe.dataset_dir, ", ".join(others),
        )  # fmt: skip


def write_files(recipe: DataRecipe, work: Path) -> dict[str, int]:
    """Write one file per set and split that has rows; returns the number of rows by file name."""
    parts: dict[str, list[dict]] = {}
    for pair in read_jsonl(work / "pairs.jsonl"):
        val = "_val" * (pair["split"] == "val")
        parts.setdefault(f"{recipe.dataset_name}_{pair['set']}{val}.{recipe.export_format}", []).append(pair)
    folder, contexts = Path(recipe.dataset_dir), Contexts(work / "contexts.jsonl")
    for file_name, pairs in parts.items():
        if recipe.export_format == "parquet":
            rows = (make_row(pair, contexts.get(pair["id"])) for pair in pairs)
            write_parquet(folder / file_name, rows, SEVERAL if recipe.num_rejected > 1 else SCHEMA)
        else:
            write_jsonl(folder / file_name, loadable(pairs, contexts))
    return {file_name: len(pairs) for file_name, pairs in parts.items()}


def loadable(pairs: list[dict], contexts: "Contexts") -> Iterator[dict]:
    """Yield the rows of a file of JSON lines in an order in which `datasets` can load them, in theirs if it can.

    A column without a value in the first `TYPED_BY` bytes may have none behind them: the first row with one goes there.
    """
    size, late = 0, False
    typed: dict[str, int] = {}  # column -> first pair whose row shows its type
    for n, pair in enumerate(pairs):
        row = make_row(pair, contexts.get(pair["id"]))
        shown = [name for name, value in row.items() if name not in typed and shows_type(value)]
        late |= bool(shown) and size > TYPED_BY // 2  # half: the rows that come first take from it
        typed |= dict.fromkeys(shown, n)
        size += len(dump(row)) + 1
    first = sorted({*typed.values()}) if late else []
    for n in (*first, *(n for n in range(len(pairs)) if n not in first)):
        yield make_row(pairs[n], contexts.get(pairs[n]["id"]))


def shows_type(value: object) -> bool:
    """Return whether a value of JSON has a type, and one that other texts have: not null, an empty list or a date."""
    if isinstance(value, list):
        return any(map(shows_type, value))
    return value is not None and not (isinstance(value, str) and TIME.fullmatch(value))


def write_origins(recipe: DataRecipe, work: Path) -> int:
    """Write what is known of the rows' evidence and grades, a line for each question; returns how many lines."""
    known: dict[str, dict] = {}
    for pair in read_jsonl(work / "pairs.jsonl"):
        grades = known.setdefault(pair["id"], {})
        if "chosen_grade" in pair:
            grades[pair["set"]] = [pair["chosen_grade"], pair["rejected_grade"]]
    contexts = read_jsonl(work / "contexts.jsonl")
    rows = [
        {"id": row["id"], "origins": row.get("origins") or [], "grades": known[row["id"]]}
        for row in contexts
        if row["id"] in known and (row.get("origins") or known[row["id"]])
    ]
    return write_jsonl(Path(recipe.dataset_dir, f"{recipe.dataset_name}{ORIGINS}"), rows) if rows else 0


def read_origins(path: Path) -> dict[str, dict]:
    """Return the lines of a file that `write_origins` wrote, by question; empty where there is none."""
    return {row["id"]: row for row in read_jsonl(path)} if path.exists() else {}


class Contexts:
    """Read contexts.jsonl by question; only the places of the lines are kept in memory."""

    def __init__(self, path: Path):
        """Note where each question's line begins."""
        self.path, self.places, place = path, {}, 0
        with as_data_error(path, "read"), open(path, "rb") as file:
            for line in file:
                self.places[json.loads(line)["id"]] = place
                place += len(line)

    def get(self, name: str) -> dict:
        """Read the contexts of the question `name`."""
        with open(self.path, "rb") as file:
            file.seek(self.places[name])
            return json.loads(file.readline())


def make_row(pair: dict, context: dict) -> dict:
    """Return a row of the data set, with the names and in the order of `SCHEMA`, or of `SEVERAL`."""
    row = {"prompt": context["short"]["prompt"], "long_prompt": context["long"]["prompt"]}
    row |= pair | {name: context[name] for name in ("id", "question", "answers", "hops")}
    for side in ("short", "long"):
        row |= {f"{side}_{what}": context[side][what] for what in ("tokens", "paragraphs", "evidence", "dropped")}
    return {name: row[name] for name in (SEVERAL if "all_rejected" in row else SCHEMA).names}


def read_info(folder: Path) -> tuple[Path, str]:
    """Return path and text of dataset_info.json; an empty object if there is none."""
    info = folder / "dataset_info.json"
    if not info.exists():
        return info, "{}\n"
    with as_data_error(info, "read"):
        content = info.read_bytes()
    try:
        text = content.decode("utf-8")
        entries = json.loads(text)
    except ValueError:
        entries = None
    if not isinstance(entries, dict):
        raise DataError(f"{info} is no JSON object in UTF-8; mend it or choose another `dataset_dir`.")
    return info, text


def check_ours(folder: Path, text: str, dataset_name: str, ours: set[str]) -> None:
    """Refuse to overwrite an entry or a file that no earlier export has made."""
    entries = json.loads(text)
    for name in (f"{dataset_name}_{suffix}{val}" for suffix in ENTRIES for val in ("", "_val")):
        if name in entries and not (isinstance(entries[name], dict) and entries[name].get("file_name") in ours):
            raise DataError(
                f"{folder / 'dataset_info.json'} has another data set called `{name}`; choose another `dataset_name`."
            )
    for file_name in sorted(ours):
        if (folder / file_name).exists() and not _has_our_columns(folder / file_name):
            raise DataError(f"{folder / file_name} is there and no export of ours; choose another `dataset_name`.")


def _has_our_columns(path: Path) -> bool:
    try:
        if path.suffix == ".parquet":
            return pq.read_schema(path).names in (SCHEMA.names, SEVERAL.names)
        if path.name.endswith(ORIGINS):
            return list(next(iter(read_jsonl(path)), {})) == ["id", "origins", "grades"]
        return list(next(iter(read_jsonl(path)), {})) in (SCHEMA.names, SEVERAL.names)
    except (DataError, pa.ArrowException):
        return False


def set_member(text: str, name: str, value: dict | None) -> str:
    """Add, replace or (None) remove one member of a JSON object's text, and change not a byte beside it."""
    spans, end = _members(text)
    names = [member for member, *_ in spans]
    opening = text.index("{") + 1
    inner = text[opening : _behind(BLANKS, text, opening)]
    newline = "\r\n" if "\r\n" in text else "\n"
    lead = inner if spans and "\n" in inner else newline + "  "  # what stands before a member
    indent = lead.rpartition("\n")[2]
    written = json.dumps(value, indent=indent, ensure_ascii=False).replace("\n", newline + indent)
    if name in names:
        place = names.index(name)
        _, start, value_start, value_end = spans[place]
        if value is None and place:
            return text[: spans[place - 1][3]] + text[value_end:]
        if value is None:
            return text[:start] + text[spans[1][1] if len(spans) > 1 else value_end :]
        if json.loads(text[value_start:value_end]) == value:
            return text
        return text[:value_start] + written + text[value_end:]
    if value is None:
        return text
    member = lead + json.dumps(name, ensure_ascii=False) + ": " + written
    if spans:
        return text[: spans[-1][3]] + "," + member + text[spans[-1][3] :]
    return text[:opening] + member + newline + text[end:]


def _members(text: str) -> tuple[list[tuple[str, int, int, int]], int]:
    """Return the members of a JSON object as (name, start, start of the value, its end), and where its `}` stands."""
    decoder = json.JSONDecoder()
    place = _behind(BLANKS, text, text.index("{") + 1)
    spans = []
    while text[place] != "}":
        name, after = decoder.raw_decode(text, place)
        start = _behind(BLANKS + ":", text, after)
        _, end = decoder.raw_decode(text, start)
        spans.append((name, place, start, end))
        place = _behind(BLANKS + ",", text, end)
    return spans, place


def _behind(signs: str, text: str, at: int) -> int:
    """Return the first place of a text from `at` on where none of these signs stands."""
    while text[at] in signs:
        at += 1
    return at
