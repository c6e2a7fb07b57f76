"""Look at a finished data set: an HTML page with figures, leak checks and a reader for single rows, and PNGs.

    python scripts/inspect_data.py WORK_FOLDER_OR_DATA_FILE [--output FOLDER] [--rows 100] [--id QUESTION_ID ...]

Of a work folder the rows of `stage: solopo` are shown, and what was dropped on the way; of a data file its rows, and
those of the `_val` file beside it. A data file is an export of build_data.py, or JSON lines of two conversations,
`messages` and `long_messages`.
"""

import argparse
import os
import sys
from pathlib import Path
from statistics import mean

from solopo_plugin.qa.files import DataError
from solopo_plugin.synthesis.look import CHECKS, inspect


def main(words: list[str] | None = None) -> int:
    """Write the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="a work folder of build_data.py, or a .jsonl or .parquet file")
    parser.add_argument("--output", type=Path, help="folder to write to; default: `NAME_inspection` beside the data")
    parser.add_argument("--rows", type=int, default=100, help="rows for the reader, spread evenly (default 100)")
    parser.add_argument("--id", action="append", default=[], help="a question that the reader must have")
    args = parser.parse_args(words)
    folder = args.path if os.path.isdir(args.path) else args.path.with_suffix("")
    output = args.output or folder.with_name(f"{folder.name}_inspection")
    try:
        found = inspect(args.path, output, args.rows, tuple(args.id))
    except DataError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    for name, ids in found.failed.items():
        if ids:
            print(f"{len(ids)} rows: {CHECKS[name]} First: {', '.join(ids[:3])}")
    print(f"{'':14s}{'mean':>8s}{'shortest':>10s}{'longest':>9s}  {found.unit}")
    for part, lengths in found.tokens.items():
        print(f"{part:14s}{mean(lengths):8.0f}{min(lengths):10d}{max(lengths):9d}")
    passed = sum(not ids for ids in found.failed.values())
    print(f"{passed} of {len(found.failed)} checks for leaks and faults found nothing.")
    print(f"{found.splits.total()} rows; the page is {output / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
