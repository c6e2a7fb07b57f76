"""Share the command line of scripts that run a recipe: its file, keys that override it, `--no-resume`, exit codes."""

import argparse
import logging
import sys
from collections.abc import Callable

from solopo_plugin.qa.files import DataError


def recipe_parser(text: str | None) -> argparse.ArgumentParser:
    """Make a parser of a recipe and its overrides, to which a script adds options of its own; `text`: its help."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys that override the recipe's")
    return parser


def run_command(
    parser: argparse.ArgumentParser, words: list[str] | None, work: Callable[[argparse.Namespace], None]
) -> int:
    """Parse the command line and do the work, which can be killed and continues; returns the exit code.

    Args:
        parser: From `recipe_parser`; `--resume` is added to it.
        words: Of the command line; None: this process's own.
        work: Is given the arguments, and prints what came of them.
    """
    parser.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True, help="keep what is finished (default)"
    )
    args = parser.parse_intermixed_args(words)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("solopo_plugin").setLevel(logging.INFO)
    try:
        work(args)
    except DataError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"Stopped; the same command {'' if args.resume else 'without --no-resume '}continues.", file=sys.stderr)
        return 130
    return 0
