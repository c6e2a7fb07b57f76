"""List the documents of a folder, and tell such a folder from one that holds rows."""

import hashlib
import os
from collections import Counter
from pathlib import Path

from ..qa.files import DataError, dump, read_jsonl
from ..qa.provenance import file_hash
from ..qa.sources import ROW_KEYS
from .converters import KINDS

ROWS = {".jsonl", ".json", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv", ".gz", ".zip"}  # of a data set in a folder


def list_files(folder: Path, links: bool = False) -> tuple[list[Path], Counter]:
    """Return all files of a folder and of those within it, sorted by name, and what was passed over.

    Hidden files and folders, whose names begin with a dot, and symbolic links are passed over and counted: a link could
    lead anywhere, or round in circles. A single file is the only one of its folder.

    Args:
        folder: Or a file.
        links: Also take links that lead to files, as the `datasets` library does; the hub's cache consists of them.
    """
    if os.path.isfile(folder):
        return [folder], Counter()
    files: list[Path] = []
    passed: Counter = Counter()
    for place, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(place, name)
            link = path.is_symlink() and not (links and path.is_file())
            reason = "hidden" if name.startswith(".") else "links" if link else None
            passed[reason] += reason is not None
            if reason and name in folders:
                folders.remove(name)
            elif reason is None and name in names and path.is_file():
                files.append(path)
    return sorted(files, key=lambda path: path.relative_to(folder).parts), +passed


def is_folder_of_documents(folder: Path) -> bool:
    """Return whether a path is a folder with documents and without rows; a README may stand beside rows.

    The lines of a .jsonl file are documents, not rows, if its first one is.
    """
    documents, rows = documents_and_rows(folder)
    return bool(documents) and not rows


def documents_and_rows(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the files of a folder that are documents, without a README, and those that hold rows.

    Links lead to rows where there are no documents, as in the hub's cache; beside documents they are passed over.
    """
    files = list_files(folder, links=True)[0] if os.path.isdir(folder) else []
    rows = {path: None for path in files if _holds_rows(path)}
    others = (path for path in files if not (path in rows or path.is_symlink() or path.stem.lower() == "readme"))
    documents = [path for path in others if path.suffix.lower() in (*KINDS, ".jsonl")]
    return documents, [path for path in rows if not (documents and path.is_symlink())]


def _holds_rows(path: Path) -> bool:
    """Return whether a file is of a kind that holds rows, and a .jsonl file one that begins with no document."""
    if path.suffix.lower() != ".jsonl":
        return path.suffix.lower() in ROWS
    try:
        first = next(read_jsonl(path), {})
    except DataError:
        return True
    return not isinstance(first.get("text"), str) or not first.keys().isdisjoint(ROW_KEYS - {"text", "id", "_id"})


def source_name(path: Path, folder: Path) -> str:
    """Return a file's path within a folder; what cannot be printed, or is no UTF-8, is written as Python escapes it."""
    name = path.relative_to(folder).as_posix() if path != folder else path.name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def folder_digest(folder: Path, links: bool = False) -> str:
    """Return a SHA-256 over names and contents of all files of a folder that `list_files` finds."""
    digest = hashlib.sha256()
    for path in list_files(folder, links)[0]:
        digest.update(dump([source_name(path, folder), file_hash(path)]))
    return digest.hexdigest()
