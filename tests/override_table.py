"""The runs of examples/yaml/README.md and of headers that are no file: a recipe and the overrides behind it."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

YAML = Path(__file__).resolve().parent.parent / "examples/yaml"


class Run(NamedTuple):
    recipe: str  # path below examples/yaml
    overrides: list[str]  # key=value, as on the command line
    what: str
    numbers: str  # origin of those that change


def runs() -> list[Run]:
    """All rows of the tables whose first cell is a recipe."""
    page = (YAML / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\S+\.yaml)` \| `(\S+=[^`]+)` \| (.+?) \| (.*?) ?\|$", page, re.M)
    assert len(rows) == len(re.findall(r"^\|.*=.*\|$", page, re.M)), "a row of the table is not as the others are"
    return [Run(recipe, overrides.split(), what, numbers) for recipe, overrides, what, numbers in rows]


def runs_of_header(recipe: str) -> dict[str, list[str]]:
    """The words behind a colon of a recipe's header, up to their output_dir: its name below saves/eval -> the words."""
    header = " ".join((YAML / recipe).read_text(encoding="utf-8").split("\n\n")[0].replace("\n#", " ").split())
    word = r"(?:--select \w+|'\w+=[^']+'|\w+=\S+)"
    return {name: shlex.split(run) for run, name in re.findall(rf": ((?:{word} )+output_dir=saves/eval/(\S+))", header)}
