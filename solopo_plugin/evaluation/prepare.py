"""Make the questions of an evaluation once: items.jsonl, and items.json, which says what each benchmark was made from.

A benchmark that would be made from the same again is kept.
"""

import json
import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..qa.files import DataError, as_data_error, dump, replacing, write_json
from ..qa.generate import check_backend
from ..qa.generate.calls import Model, load_chat
from ..qa.provenance import TOKENIZER, file_hash, folder_hash
from ..qa.recipe import Chat, pick, settings
from .items import Item
from .recipe import EvalRecipe, sources

log = logging.getLogger(__name__)
ITEMS, ITEMS_MANIFEST = "items.jsonl", "items.json"
Key = tuple[str, str, str]


def prepare_items(recipe: EvalRecipe, model: Model, resume: bool = True) -> dict[str, int]:
    """Write items.jsonl, keeping the benchmarks that are as they would be made; returns questions by benchmark."""
    from .benchmarks import BENCHMARKS

    folder = Path(recipe.output_dir)
    path = folder / ITEMS
    wanted = {name: _made_from(recipe, name, model.tokenizer) for name in recipe.benchmarks}
    before = items_manifest(folder) if resume else {}
    kept = [name for name in wanted if name in before and before[name]["made_from"] == wanted[name]]
    if set(kept) == set(wanted) == set(before):
        log.info("questions: made before, kept.")
        return {name: entry["questions"] for name, entry in before.items()}
    tokens: tuple = ()
    if set(kept) != set(wanted):
        check_backend(recipe.backend, recipe.server_urls)
        tokens = load_chat(model.tokenizer, pick(recipe, Chat))
    entries: dict[str, dict[str, Any]] = {}
    seen: set[Key] = set()
    starts = _starts(path, before) if kept else {}
    with replacing(path) as out:
        for name in wanted:
            if name in kept:
                items = _kept_items(path, starts[name], before[name]["questions"])
            else:
                items = BENCHMARKS[name](recipe, *tokens)
            questions = _write_items(name, items, seen, out)
            log.info(f"{name}: {questions} questions{', made before' if name in kept else ''}.")
            entries[name] = {"made_from": wanted[name], "questions": questions}
    write_json(folder / ITEMS_MANIFEST, {"hash": file_hash(path), "benchmarks": entries})
    return {name: entry["questions"] for name, entry in entries.items()}


def _made_from(recipe: EvalRecipe, benchmark: str, tokenizer: str) -> dict:
    """Return all on which a benchmark's questions depend: keys, files, the tokenizer that measures lengths."""
    files = {}
    for path in sources(recipe, benchmark):
        files[str(path)] = folder_hash(path, ("**/*",), None) if path.is_dir() else file_hash(path)
    is_folder = Path(tokenizer).is_dir()
    return {
        "settings": settings(recipe, "items") | settings(recipe, benchmark),
        "files": files,
        "tokenizer": folder_hash(Path(tokenizer), TOKENIZER) if is_folder else tokenizer,
    }


def items_manifest(folder: Path) -> dict:
    """Return the benchmarks of items.jsonl, none where it is not as it was written."""
    try:
        manifest = json.loads((folder / ITEMS_MANIFEST).read_bytes())
        return manifest["benchmarks"] if manifest["hash"] == file_hash(folder / ITEMS) else {}
    except (OSError, DataError, ValueError, KeyError, TypeError):
        return {}


def _starts(path: Path, before: dict) -> dict[str, int]:
    """Return the byte of items.jsonl where each benchmark's questions begin: they stand in the manifest's order."""
    starts = {}
    with as_data_error(path, "read"), open(path, "rb") as file:
        for name, entry in before.items():
            starts[name] = file.tell()
            for _ in range(entry["questions"]):
                file.readline()
    return starts


def _kept_items(path: Path, start: int, questions: int) -> Iterator[Item]:
    """Yield the questions of one benchmark from items.jsonl, without reading the others'."""
    with as_data_error(path, "read"), open(path, "rb") as file:
        file.seek(start)
        for line in islice(file, questions):
            yield Item(**json.loads(line))


def _write_items(benchmark: str, items: Iterator[Item], seen: set[Key], out) -> int:
    count = 0
    for item in tqdm(items, desc=benchmark, unit=" questions", disable=None):
        if item.key in seen:
            raise DataError(f"`{benchmark}` has the question {item.id!r} of {item.task} twice; ids must differ.")
        seen.add(item.key)
        out.write(dump(item.as_dict()) + b"\n")
        count += 1
    if not count:
        raise DataError(f"`{benchmark}` has no question; check its files and the keys that begin like it.")
    return count
