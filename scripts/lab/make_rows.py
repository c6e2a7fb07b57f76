"""Write preference rows of the lab's task as a data set of LLaMA-Factory.

    python scripts/lab/make_rows.py FOLDER [--rows 3200] [--seed 0]

FOLDER/dataset_info.json registers them three times: `recall_solopo` for `stage: solopo`, `recall_short_po` and
`recall_expand_long_po` for the host's `stage: dpo` on the short or the long context, with the same pair.
"""

import argparse
from pathlib import Path

from recall import LONG, SHORT, rows

from solopo_plugin.qa.files import write_json, write_jsonl

RESPONSES = {"chosen": "chosen", "rejected": "rejected"}
ENTRIES = {
    "recall_solopo": {"prompt": "prompt", "long_prompt": "long_prompt", **RESPONSES},
    "recall_short_po": {"prompt": "prompt", **RESPONSES},
    "recall_expand_long_po": {"prompt": "long_prompt", **RESPONSES},
}


def make_rows(folder: Path, n: int, seed: int) -> None:
    """Write `n` rows and their registration."""
    write_jsonl(folder / "recall.jsonl", rows(n, seed))
    info = {"file_name": "recall.jsonl", "ranking": True}
    write_json(folder / "dataset_info.json", {name: info | {"columns": c} for name, c in ENTRIES.items()})


def main(words: list[str] | None = None) -> None:
    """Write the rows of the first task and their dataset_info.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=3200, help="how many (default 3200: 200 steps of 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the questions (default 0)")
    args = parser.parse_args(words)
    make_rows(args.folder, args.rows, args.seed)
    print(f"{args.rows} rows of {SHORT} and {LONG} pairs written to {args.folder}")


if __name__ == "__main__":
    main()
