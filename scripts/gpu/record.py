"""Keep OUT/gpu.json, what the one-GPU command has found so far: every part reads it, adds to it, replaces it whole."""

import json
import os
import sys
from datetime import date
from pathlib import Path

NAME = "gpu.json"


def load(out: Path, **same) -> dict:
    """Return the document in the folder; stop where it was measured with another value of one of `same`.

    Args:
        out: Folder of gpu.json.
        same: What must not mix in one file, as JSON gives it back: settings, hardware, versions of a library.
    """
    file = out / NAME
    document = json.loads(file.read_text()) if file.exists() else {"check": {}, "runs": {}}
    for key, value in same.items():
        if document.setdefault(key, value) != value:
            sys.exit(f"> {file} was measured with other {key}: {document[key]}, now {value}. Choose another OUT.")
    return document


def dated(document: dict) -> dict:
    """Return the document with today as its date and, in "began", the day of the first run that it holds."""
    today = date.today().isoformat()
    return document | {"began": document.get("began", document.get("date", today)), "date": today}


def save(document: dict, out: Path) -> None:
    """Replace the folder's document as a whole."""
    out.mkdir(parents=True, exist_ok=True)
    new = out / f"{NAME}.new"
    new.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(new, out / NAME)


def tell(*what) -> None:
    """Print a line that `run.sh` shows; what else is printed stays in the log."""
    print(">", *what, flush=True)
