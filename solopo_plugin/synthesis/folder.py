"""List the documents of a folder, and tell such a folder from one that holds rows."""

import hashlib
import os
from collections import Counter
from pathlib import Path

from ..qa.files import dump
from ..qa.provenance import file_hash
from .converters import KINDS

ROWS = {".jsonl", ".json", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv", ".gz", ".zip"}  # of a data set in a folder


def list_files(folder: Path) -> tuple[list[Path], Counter]:
    """Return all files of a folder and of those within it, sorted by name, and what was passed over.

    Hidden files and folders, whose names begin with a dot, and symbolic links are passed over and counted: a link could
    lead anywhere, or round in circles. A single file is the only one of its folder.
    """
    if folder.is_file():
        return [folder], Counter()
    files: list[Path] = []
    passed: Counter = Counter()
    for place, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(place, name)
            reason = "hidden" if name.startswith(".") else "links" if path.is_symlink() else None
            passed[reason] += reason is not None
            if reason and name in folders:
                folders.remove(name)
            elif reason is None and name in names and path.is_file():
                files.append(path)
    return sorted(files, key=lambda path: path.relative_to(folder).parts), +passed


def is_folder_of_documents(folder: Path) -> bool:
    """Return whether a path is a folder with documents and without rows; a README may stand beside rows."""
    if not folder.is_dir():
        return False
    files, _ = list_files(folder)
    documents = any(path.suffix.lower() in KINDS and path.stem.lower() != "readme" for path in files)
    return documents and not any(path.suffix.lower() in ROWS for path in files)


def source_name(path: Path, folder: Path) -> str:
    """Return a file's path within a folder; what cannot be printed, or is no UTF-8, is written as Python escapes it."""
    name = path.relative_to(folder).as_posix() if path != folder else path.name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def folder_digest(folder: Path) -> str:
    """Return a SHA-256 over names and contents of all files of a folder."""
    digest = hashlib.sha256()
    for path in list_files(folder)[0]:
        digest.update(dump([source_name(path, folder), file_hash(path)]))
    return digest.hexdigest()
