"""Ask models the questions of long-context benchmarks, score their answers, and write a report.

    python scripts/evaluate.py examples/yaml/eval/tiny.yaml [key=value ...]
    python scripts/evaluate.py RECIPE checkpoints=saves/x --select      # name the best checkpoint, by validation rows
    python scripts/evaluate.py RECIPE --select longbench_qa             # by another benchmark
    python scripts/evaluate.py RECIPE --rescore                         # scores and report again; loads no model
    python scripts/evaluate.py RECIPE --no-resume                       # begin anew

A run that was stopped, however, continues where it was. Keys: solopo_plugin/evaluation/recipe.py, docs/evaluation.md.
"""

import argparse
import sys

from recipe_command import recipe_parser, run_command

from solopo_plugin.evaluation.recipe import load_recipe
from solopo_plugin.evaluation.report.tables import TITLES, Table, benchmark_tables
from solopo_plugin.evaluation.run import evaluate


def main(words: list[str] | None = None) -> int:
    """Run the evaluation; returns the exit code."""
    parser = recipe_parser(__doc__)
    parser.add_argument(
        "--select", nargs="?", const="", metavar="BENCHMARK",
        help="name the best model by this benchmark; without one by `select_by`, or else by the validation rows",
    )  # fmt: skip
    parser.add_argument("--rescore", action="store_true", help="score and report what is answered; load no model")
    return run_command(parser, words, ask_and_show)


def ask_and_show(args: argparse.Namespace) -> None:
    """Evaluate, and print the main table of each benchmark."""
    overrides, select = list(args.overrides), args.select
    if select and "=" in select:  # `--select key=value`: argparse takes the word for the benchmark
        overrides, select = [*overrides, select], ""
    recipe = load_recipe(args.recipe, overrides, select, args.rescore)
    results = evaluate(recipe, args.rescore, args.resume)
    answered = {row["benchmark"] for row in results["summary"]}  # perhaps not all, where a run was stopped
    for benchmark in filter(answered.__contains__, recipe.benchmarks):
        print("\n".join(table_lines(TITLES[benchmark], benchmark_tables(results, benchmark)[0])))
    if results.get("selection"):
        print(f"Best by {recipe.select_by}: {results['selection']['best']}")
    print(f"Report: {recipe.output_dir}/report/index.html; every number: {recipe.output_dir}/results.json")


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
