"""Look inside a model: where the attention of a response goes, and what the long context does to its log-probs.

    python scripts/look_inside.py MODEL --template qwen --rows data/NAME_solopo.jsonl --out FOLDER
        [--n 20 | --row ID ...] [--compare MODEL2]

MODEL is a folder or a hub name, or the folder of a LoRA adapter; ROWS a file that build_data.py exported. FOLDER gets
index.html, shares_by_layer.png and look.json. The terms are explained in docs/evaluation.md.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

from solopo_plugin.probe.inside import read_rows, run
from solopo_plugin.qa.files import DataError, is_path


def name_models(*given: str | None) -> dict[str, str]:
    """Return the models by their names on the page: the last part of each place, or all of it where those are equal.

    Raises:
        DataError: A name is empty, there is no such folder, or one model is given twice.
    """
    places = [place for place in given if place is not None]
    for place in places:
        if not place.strip():
            raise DataError(f"A model's name is empty, got {place!r}; give a folder or a hub name.")
        if is_path(place) and not Path(place).is_dir():
            raise DataError(f"No model can be loaded from {place}: there is no such folder; check the path.")
    whole = [*map(os.path.abspath, places)]
    if len(set(whole)) < len(whole):
        raise DataError(f"`--compare {places[1]}` is the first model itself; give another one, or leave it out.")
    short = [Path(place).name for place in whole]
    return dict(zip(short if len(set(short)) == len(short) else places, places, strict=True))


def main(words: list[str] | None = None) -> int:
    """Write the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub name, folder, or folder of a LoRA adapter")
    parser.add_argument("--template", required=True, help="the host's chat template, as in training")
    parser.add_argument("--rows", type=Path, required=True, help="a .jsonl or .parquet file of build_data.py")
    parser.add_argument("--row", action="append", default=[], metavar="ID", help="a row by its id; may be repeated")
    parser.add_argument("--n", type=int, default=20, help="without --row: rows, spread evenly (default 20)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--compare", metavar="MODEL2", help="a second model on the same rows, such as the trained one")
    parser.add_argument("--model_name_or_path", help="model below an adapter, in place of the one that it names")
    parser.add_argument("--default_system", help="the host's key, as in training")
    parser.add_argument("--no_thinking", action="store_true", help="the host's `enable_thinking: false`")
    parser.add_argument("--trust_remote_code", action="store_true", help="the host's key")
    args = parser.parse_args(words)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    chat = dict(
        default_system=args.default_system, enable_thinking=not args.no_thinking,
        trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    try:
        found = run(
            name_models(args.model, args.compare), read_rows(args.rows, args.row, args.n), args.out, args.template,
            args.model_name_or_path, **chat,
        )  # fmt: skip
    except DataError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    shown = [
        line
        for line in found["summary"]
        if line["measure"].startswith(("evidence's share", "attention per token, evidence", "log-prob"))
    ]
    cells = [("model", "measure", "prompt", "mean", "95 % interval", "rows")]
    for line in shown:
        interval = f"{line['low']:.4f} to {line['high']:.4f}"
        cells.append((line["model"], line["measure"], line["side"], f"{line['mean']:.4f}", interval, str(line["n"])))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    print(f"The page is {args.out / 'index.html'}; every number: {args.out / 'look.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
