"""Which parts of the package know which, read from their source."""

import ast
import tokenize
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "solopo_plugin"
WINGS = {"synthesis", "evaluation", "probe"}
FORBIDDEN = {  # part of the package ("": the files at its root) -> parts that it must not know
    "": WINGS,
    "host": WINGS,
    "startup": WINGS | {"qa"},
    "qa": WINGS,
    "synthesis": {"evaluation", "probe"},
    "evaluation": {"synthesis"},
    "probe": {"synthesis"},
}


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    found, here = set(), ["solopo_plugin", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


FILES = {str(path.relative_to(PACKAGE)): imported(path) for path in sorted(PACKAGE.rglob("*.py"))}


def part_of(file: str) -> str:
    return file.partition("/")[0] if "/" in file else ""


def test_every_part_is_looked_at():
    assert {part_of(file) for file in FILES} == set(FORBIDDEN)
    assert {"solopo_plugin.qa.files", "solopo_plugin.qa.files.DataError"} <= FILES["synthesis/read.py"]
    assert "solopo_plugin.host.template" in FILES["qa/generate/local.py"]


@pytest.mark.parametrize("part", FORBIDDEN)
def test_parts_that_must_not_know_each_other(part):
    known = {
        (file, name)
        for file, names in FILES.items()
        for name in names
        if part_of(file) == part and set(name.split(".")[1:2]) & FORBIDDEN[part] and name.startswith("solopo_plugin.")
    }
    assert not known


NO_CODE = {getattr(tokenize, name) for name in "COMMENT NL NEWLINE INDENT DEDENT ENCODING ENDMARKER".split()}


def code_lines(path: Path) -> int:
    """Count the lines that hold more than a docstring or a comment."""
    nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    texts = [n for n in nodes if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    lines: set[int] = set()
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type not in NO_CODE:
                lines |= {*range(token.start[0], token.end[0] + 1)}
    return len(lines.difference(*(range(n.lineno, n.end_lineno + 1) for n in texts)))


def test_the_core_stays_small(tmp_path):
    """The figure of CONTRIBUTING.md."""
    (tmp_path / "x.py").write_text('"""One\n\ntwo."""\n\n# three\nx = """\nfour\n"""  # five\n\n\nprint(\n    x,\n)\n')
    assert code_lines(tmp_path / "x.py") == 6
    board = {PACKAGE / "host/board.py", PACKAGE / "host/board_texts.py"}
    size = sum(code_lines(path) for path in {*PACKAGE.glob("*.py"), *PACKAGE.glob("host/*.py")} - board)
    assert 2_000 < size <= 3_100, f"{size} lines: make it smaller, or say why not in CONTRIBUTING.md"


def test_scripts_import_each_other_one_way():
    """Also where an import stands within a function."""
    files = {path.stem: path for path in sorted((ROOT / "scripts").rglob("*.py"))}
    known = {}
    for name, path in files.items():
        nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        known[name] = {name.rpartition(".")[2] for name in names} & files.keys()
    assert {"plan", "step_cost"} <= known["steps"] and "trl_dpo" in known["benchmark_step"]
    [*TopologicalSorter(known).static_order()]  # raises CycleError, which names the circle
