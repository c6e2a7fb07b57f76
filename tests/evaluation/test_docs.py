"""docs/evaluation.md says of keys, benchmarks, metrics and recipes what the code says."""

import json
import re
from dataclasses import MISSING, fields

import pytest
from conftest import ROOT

from solopo_plugin.evaluation import recipe
from solopo_plugin.evaluation.items import MAIN_METRIC, Item
from solopo_plugin.evaluation.score import score_answer

TEXT = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
LABELS = {"f1": "F1", "sub_em": "sub-EM", "accuracy": "accuracy"}


def rows(head: str) -> list[list[str]]:
    """Cells of the table below a line."""
    lines = TEXT.splitlines()
    start = lines.index(head) + 2
    end = lines.index("", start)
    return [line.strip("|").split(" | ") for line in lines[start:end]]


def key_line(spec) -> str:
    """A key as a line of the table."""
    default = spec.default if spec.default_factory is MISSING else spec.default_factory()
    shown = "" if spec.default is MISSING is spec.default_factory else f"`{json.dumps(default).strip(chr(34))}`"
    return f"| `{spec.name}` | {shown} | {' '.join(spec.metadata['stages'])} | {spec.metadata['help']} |"


def test_every_key_with_its_default_what_it_changes_and_its_help():
    lines = TEXT.splitlines()
    start = lines.index("| key | default | changes | meaning |") + 2
    wanted = [key_line(spec) for spec in fields(recipe.EvalRecipe)]
    assert lines[start : start + len(wanted) + 1] == [*wanted, ""]


def test_benchmarks_and_their_metrics():
    table = rows("| `benchmarks` | what | key for its files | main metric |")
    assert {row[0].strip(" `"): row[3].strip() for row in table} == {n: LABELS[m] for n, m in MAIN_METRIC.items()}
    keys = {spec.name for spec in fields(recipe.EvalRecipe)}
    assert {key for row in table for key in re.findall(r"`(\w+)`", row[2])} <= keys


def test_metrics():
    kinds = [Item("plain", "t", "q", "?", "?", ["A"], kind) for kind in ("qa", "choice")]
    scored = [metric for item in kinds for metric in score_answer(item, "A")["scores"]]
    assert [row[0].strip(" `") for row in rows("| metric | of | definition | source |")] == scored


def test_recipes_that_it_names():
    """All of examples/yaml/eval/, and no other."""
    named = [
        name for row in rows("| recipe in `examples/yaml/eval/` | what |") for name in re.findall(r"`(.+?)`", row[0])
    ]
    assert sorted(named) == sorted(path.name for path in (ROOT / "examples/yaml/eval").glob("*.yaml"))
    assert all((ROOT / name).exists() for name in re.findall(r"examples/yaml/[\w./-]+\.yaml", TEXT))


@pytest.mark.parametrize("path", re.findall(r"`((?:scripts|solopo_plugin|tests)/[\w./]+\.py)`", TEXT))
def test_files_that_it_names(path):
    assert (ROOT / path).exists()
