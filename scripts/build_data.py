"""Make training rows from questions: read, contexts, sample, judge, select, export.

    python scripts/build_data.py examples/yaml/data/tiny.yaml [key=value ...]
    python scripts/build_data.py RECIPE --stage judge          # one stage; those before it must be finished
    python scripts/build_data.py RECIPE --no-resume            # begin anew

A run that was stopped, however, continues where it was. Keys: solopo_plugin/synthesis/recipe.py, docs/data.md.
"""

import argparse
import logging
import sys

from solopo_plugin.qa.files import DataError
from solopo_plugin.synthesis.pipeline import TABLE, run_pipeline
from solopo_plugin.synthesis.recipe import load_recipe


def main(words: list[str] | None = None) -> int:
    """Run the pipeline; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys that override the recipe's")
    parser.add_argument("--stage", choices=list(TABLE), help="run only this stage")
    parser.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True, help="keep what is finished (default)"
    )
    args = parser.parse_intermixed_args(words)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("solopo_plugin").setLevel(logging.INFO)
    try:
        run_pipeline(load_recipe(args.recipe, args.overrides), args.stage, args.resume)
    except DataError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped; the same command continues.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
