"""Read a folder of documents and split them into passages; writes passages.jsonl.

A passage is {"id": "<source>#<place>", "title": the document's title and the headings above the text, "text", "source":
path within the folder (of a .jsonl file with the line, which is a document), "section": "Heading > Sub", "place": its
number in the document, from 0, "tokens": of the text, in the model's tokens}. Files are taken in the order of their
names. What a document says is data: names, paths and settings come from the recipe and the folder alone.
"""

import hashlib
import json
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from ..qa.files import DataError, dump, excerpt, parse_line, reading, write_json, write_jsonl
from ..qa.generate.calls import load_chat
from ..qa.provenance import file_hash, installed
from ..qa.recipe import Chat, pick
from ..qa.seeded import digest
from .converters import KINDS, NEEDS, VERSION, Block, Document, NoText, read_document, row_document
from .folder import list_files, source_name
from .passages import split_document
from .recipe import DataRecipe

log = logging.getLogger(__name__)
SHOWN = 5  # files that are named before they are only counted
ONE_SIGN = str.maketrans("‐‑‒–—―−‘’“”„", "-" * 7 + "'" * 2 + '"' * 3)  # of repeated passages
CONVERTED = "converted"  # folder of what converters made of files, so that a run that was killed goes on


def run(recipe: DataRecipe, work: Path) -> dict:
    """Read and split the documents; returns what was read, left out and passed over.

    Raises:
        DataError: No such folder, a package is missing, or nothing that could be read.
    """
    folder = Path(recipe.input)
    if not os.path.exists(folder):
        raise DataError(f"`input: {recipe.input}` does not exist; give a folder of documents.")
    files, passed = list_files(folder)
    counts = Counter({name: 0 for name in ("files", "documents", "passages", "duplicates")})
    skipped: Counter = Counter(passed)
    documents = read_folder(recipe, folder, files, work / CONVERTED, counts, skipped)
    write_jsonl(work / "passages.jsonl", passages(recipe, documents, counts))
    others = dict(sorted(skipped.items()))
    if not counts["passages"]:
        what = f"nothing that can be read ({others})" if files or passed else "no file"
        raise DataError(f"`input: {recipe.input}` holds {what}; documents end in {', '.join(KINDS)} or .jsonl.")
    return {**counts, "skipped": others}


Skip = Callable[[str, Exception], None]  # where something cannot be read, and why


def read_folder(
    recipe: DataRecipe, folder: Path, files: list[Path], converted: Path, counts: Counter, skipped: Counter
) -> Iterator[Document]:
    """Yield the documents of all files that can be read; the others are named and counted in `skipped`.

    Args:
        recipe: Of data, for messages.
        folder: What the names of documents are relative to.
        files: Of that folder.
        converted: Folder for what converters make of files.
        counts: Counts `files` and `documents`.
        skipped: Counts files, and lines of .jsonl files, by reason.
    """
    known = [path for path in files if path.suffix.lower() in (*KINDS, ".jsonl")]
    skipped.update({"other_kinds": len(files) - len(known)} if len(files) > len(known) else {})
    check_packages(recipe, known)

    def skip(where: str, error: Exception) -> None:
        reason = "no_text" if isinstance(error, NoText) else "broken"
        skipped[reason] += 1
        if skipped[reason] <= SHOWN:
            said = str(error) if isinstance(error, DataError) else f"{type(error).__name__} {error}"
            log.warning("%s cannot be read: %s. Skipped.", where, excerpt(said.rstrip().rstrip(".: "), 200))

    sizes = [path.stat().st_size for path in known]
    with tqdm(total=sum(sizes), desc="documents", unit="B", unit_scale=True, disable=None) as bar:
        for path, size in zip(known, sizes, strict=True):
            name = source_name(path, folder)
            bar.set_postfix_str(name[-40:])
            counts["files"] += 1
            for document in read_file(path, name, converted, skip):
                counts["documents"] += 1
                yield document
            bar.update(size)


def read_file(path: Path, name: str, converted: Path, skip: Skip) -> Iterator[Document]:
    """Yield the documents of a file: each line of a .jsonl file is one. Whatever cannot be read is said to `skip`.

    What a converter makes is kept in `converted`, and taken from there if it is the same file.
    """
    if path.suffix.lower() == ".jsonl":
        yield from read_lines(path, name, skip)
        return
    kept = None
    try:
        if path.suffix.lower() in NEEDS:
            kept = converted / f"{conversion(path, name)}.json"
        known = from_json(kept.read_bytes(), name) if kept and kept.exists() else None
        document = known or read_document(path, name)
    except Exception as error:  # converters raise whatever they like at a broken file
        skip(name, error)
        return
    if kept and not known:
        write_json(kept, {"title": document.title, "blocks": document.blocks})
    yield document


def read_lines(path: Path, name: str, skip: Skip) -> Iterator[Document]:
    """Yield each line of a .jsonl file as a document."""
    try:
        with reading(path) as file:
            for number, line in enumerate(file, 1):
                try:
                    if line.strip():
                        yield row_document(parse_line(line, name, number), name, number)
                except DataError as error:
                    skip(f"{name}:{number}", error)
    except DataError as error:
        skip(name, error)


def from_json(text: bytes, name: str) -> Document:
    """Return a document that was kept."""
    found = json.loads(text)
    return Document(name, found["title"], [Block(*block) for block in found["blocks"]])


def conversion(path: Path, name: str) -> str:
    """Return a name for what a converter makes of a file: another one if file, name or packages are."""
    versions = [installed(package) for package in ("beautifulsoup4", "mammoth", "markdownify", "pdfminer.six")]
    return hashlib.sha256(dump([VERSION, name, file_hash(path), *versions])).hexdigest()


def check_packages(recipe: DataRecipe, files: list[Path]) -> None:
    """Refuse files of a kind that needs packages which are not installed."""
    for end, packages in NEEDS.items():
        missing = [package for package in packages if find_spec(package) is None]
        found = [path for path in files if path.suffix.lower() == end]
        if missing and found:
            raise DataError(
                f"`input: {recipe.input}` has {len(found)} {end} files ({found[0].name} is the first), which need "
                f'{" and ".join(missing)}: pip install ".[documents]"; or take them out of the folder.'
            )


def passages(recipe: DataRecipe, documents: Iterator[Document], counts: Counter) -> Iterator[dict]:
    """Yield the passages of documents; of those that differ in case, quotes, dashes or blanks alone the first stays."""
    tokenizer, _ = load_chat(recipe.model.tokenizer, pick(recipe, Chat))

    def count(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]

    seen = set()
    for document in documents:
        for passage in split_document(document, recipe.passage_tokens, count):
            text = unicodedata.normalize("NFKC", passage["text"]).translate(ONE_SIGN).casefold()
            form = digest(" ".join(text.split()))
            if form in seen:
                counts["duplicates"] += 1
                continue
            seen.add(form)
            counts["passages"] += 1
            yield {"id": f"{passage['source']}#{passage['place']}", **passage}
