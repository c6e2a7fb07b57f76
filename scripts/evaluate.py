"""Ask models the questions of long-context benchmarks, score their answers, and write a report.

    python scripts/evaluate.py examples/yaml/eval/tiny.yaml [key=value ...]
    python scripts/evaluate.py RECIPE checkpoints=saves/x --select      # name the best checkpoint, by validation rows
    python scripts/evaluate.py RECIPE --select longbench_qa             # by another benchmark
    python scripts/evaluate.py RECIPE --rescore                         # scores and report again; loads no model
    python scripts/evaluate.py RECIPE --no-resume                       # begin anew

A run that was stopped, however, continues where it was. Keys: solopo_plugin/evaluation/recipe.py, docs/evaluation.md.
"""

import argparse
import logging
import sys
from pathlib import Path

from solopo_plugin.evaluation.models import find_models
from solopo_plugin.evaluation.recipe import load_recipe
from solopo_plugin.evaluation.report.tables import TITLES, Table, benchmark_tables
from solopo_plugin.evaluation.run import evaluate
from solopo_plugin.qa.files import DataError
from solopo_plugin.qa.ready import check_ready
from solopo_plugin.qa.store import STORE


def main(words: list[str] | None = None) -> int:
    """Run the evaluation; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys that override the recipe's")
    parser.add_argument(
        "--select", nargs="?", const="", metavar="BENCHMARK",
        help="name the best model by this benchmark; without one by `select_by`, or else by the validation rows",
    )  # fmt: skip
    parser.add_argument("--rescore", action="store_true", help="score and report what is answered; load no model")
    parser.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True, help="keep what is finished (default)"
    )
    args = parser.parse_intermixed_args(words)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("solopo_plugin").setLevel(logging.INFO)
    overrides = list(args.overrides)
    if args.select and "=" in args.select:  # `--select key=value`: argparse takes the word for the benchmark
        overrides, args.select = [*overrides, args.select], ""
    try:
        recipe = load_recipe(args.recipe, overrides, args.select)
        if recipe.benchmarks and not args.rescore and not Path(recipe.output_dir, STORE).exists():
            named = [] if recipe.backend == "openai" else find_models(recipe)
            models = {f"models: {model.name}": model.path for model in named}
            check_ready(recipe.backend, recipe.server_urls, models)
        results = evaluate(recipe, args.rescore, args.resume)
    except DataError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped; the same command continues.", file=sys.stderr)
        return 130
    for benchmark in recipe.benchmarks:
        print("\n".join(table_lines(TITLES[benchmark], benchmark_tables(results, benchmark)[0])))
    if results.get("selection"):
        print(f"Best by {recipe.select_by}: {results['selection']['best']}")
    print(f"Report: {recipe.output_dir}/report/index.html; every number: {recipe.output_dir}/results.json")
    return 0


def table_lines(title: str, table: Table) -> list[str]:
    """Return the models' means in a benchmark's main table as lines of aligned columns."""
    band = next((f" by {band}" for band, _ in table.columns if band), "")
    lines = [f"\n{title}, {table.title}{band}"]
    for heading, rows in table.blocks:
        cells = [[heading, *(name for _, name in table.columns)]]
        cells += [[f"  {name}", *(text for text, _ in values)] for name, values in rows]
        first, *others = ([*map(len, column)] for column in zip(*cells, strict=True))
        form = f"{{:{max(first)}}}" + "".join(f"  {{:>{max(widths)}}}" for widths in others)
        lines += [form.format(*line) for line in cells]
    return [*lines, ""]


if __name__ == "__main__":
    sys.exit(main())
