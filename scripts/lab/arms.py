"""Read the lab's arms from one table per task, examples/yaml/lab/TASK.yaml; print one as a recipe of its own.

python scripts/lab/arms.py NAME [--task two_hop] > arm.yaml && llamafactory-cli train arm.yaml

All arms of a task share base, steps, batch, schedule and optimizer; arms on one data set share also a seed's rows.
"""

import argparse
import functools
from pathlib import Path

import yaml

FOLDER = Path(__file__).resolve().parents[2] / "examples/yaml/lab"


@functools.cache
def table(task: str) -> dict:
    """Return a task's table: `seeds`, `base`, `arms`, `beyond`, `sweep` (seed, rates), and parts that arms repeat.

    A task may have sizes: of `real:small` it is real.yaml with what stands there under `small`, key by key.
    """
    name, _, size = task.partition(":")
    found = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    for key, value in (found[size] if size else {}).items():
        found[key] = found[key] | value if isinstance(value, dict) else value
    return found


def arms(task: str = "recall") -> dict[str, dict]:
    """Map each arm's name to its keys beside `base`: the paper's comparison, then the arms beyond it."""
    return table(task)["arms"] | table(task)["beyond"]


def chosen_rate(name: str, task: str = "recall") -> float:
    """Return the learning rate at which an arm stands in the tables."""
    return (table(task)["base"] | arms(task).get(name, {}))["learning_rate"]


def recipe(task: str, name: str) -> dict:
    """Return an arm as a recipe for `llamafactory-cli train`, with the first seed's places."""
    folder = "saves/lab/" + ("" if task == "recall" else f"{task.replace(':', '_')}/")
    return table(task)["base"] | arms(task)[name] | {"output_dir": f"{folder}runs/{name}_0"}


def main(words: list[str] | None = None) -> None:
    """Print one arm's recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--task", default="recall", choices=sorted(path.stem for path in FOLDER.glob("*.yaml")))
    args = parser.parse_args(words)
    if args.name not in arms(args.task):
        parser.error(f"{args.name} is none of {', '.join(arms(args.task))}.")
    print(yaml.safe_dump(recipe(args.task, args.name), sort_keys=False), end="")


if __name__ == "__main__":
    main()
