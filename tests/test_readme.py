"""README and docs/: every link leads somewhere, every page is reachable, files and commands that they name exist."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from solopo_plugin import __version__
from solopo_plugin.host import arguments, board, data, preflight, stage
from solopo_plugin.losses import ANCHOR, METRICS

README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
TREE = re.search(r"## Where things are\n\n```\n(.*?)```", README.read_text(encoding="utf-8"), re.S).group(1)


def without_code(page: Path) -> str:
    """The text of a page without its code blocks and code spans."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)


def links(page: Path) -> list[str]:
    """Targets of a page's links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", without_code(page))


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_link_is_dead(page):
    for link in links(page):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.is_relative_to(ROOT) and file.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {link}"


def test_every_page_is_reachable_from_the_readme():
    seen, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        if page in seen:
            continue
        seen.add(page)
        targets = [(page.parent / link.partition("#")[0]).resolve() for link in links(page) if "://" not in link]
        waiting += [target for target in targets if target.suffix == ".md" and target.exists()]
    assert set((ROOT / "docs").rglob("*.md")) <= seen


def test_the_index_lists_every_page():
    listed = {(ROOT / "docs" / link).resolve() for link in links(ROOT / "docs" / "index.md")}
    assert {page for page in (ROOT / "docs").rglob("*.md") if page.name != "index.md"} <= listed


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_every_page_says_first_whom_it_is_for(page):
    paragraph = page.read_text(encoding="utf-8").split("\n\n")[1]
    assert paragraph.startswith("For whoever "), paragraph


def test_the_readme_is_at_most_10_kb():
    assert README.stat().st_size <= 10_000


def test_the_readme_gives_the_setting_to_start_with_beside_the_papers():
    recipe = re.search(r"```yaml\n(.*?)```", README.read_text("utf-8"), re.S).group(1)
    keys = yaml.safe_load(recipe)
    assert keys["stage"] == "solopo" and keys["solopo_detach_short"] is True
    (line,) = [line for line in recipe.splitlines() if line.startswith("solopo_detach_short")]
    assert "default" in line and "paper" in line
    assert (ROOT / keys["deepspeed"]).exists()


def test_the_recipe_of_the_readme_is_taken_by_the_host():
    from llamafactory.hparams.parser import _parse_train_args

    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", README.read_text("utf-8"), re.S).group(1))
    del recipe["deepspeed"], recipe["bf16"]  # need DeepSpeed and a GPU
    finetuning_args = _parse_train_args(recipe | {"use_cpu": True})[3]
    assert finetuning_args.stage == "solopo" and finetuning_args.solopo_detach_short


def test_the_page_of_training_defines_every_metric_and_no_other():
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    table = page[page.index("| metric | definition |") :].partition("\n\n")[0]
    defined = {name for row in table.splitlines()[2:] for name in named(row.split(" | ")[0], r"`([^`]+)`")}
    assert defined == {*METRICS, ANCHOR}


def named(text: str, pattern: str) -> set[str]:
    return set(re.findall(pattern, text))


def targets() -> set[str]:
    """Everything that the Makefile can make."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return {name for line in re.findall(r"^([\w .-]+):(?!=)", makefile, re.M) for name in line.split()}


def test_the_workflow_makes_what_ci_makes():
    file = ROOT / ".github" / "workflows" / "ci.yml"
    if not file.exists():
        pytest.skip("an sdist has no files of CI")
    workflow = yaml.safe_load(file.read_text(encoding="utf-8"))
    quick, full = (set(workflow["jobs"][job]["strategy"]["matrix"]["target"]) for job in ("quick", "full"))
    every_time = set(re.findall(r"^make (\S+)", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.M))
    assert full == every_time | {"test-vllm"}
    assert quick | full <= targets()


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__ and citation["license"] == "Apache-2.0"


def test_commands_name_what_exists():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.name != "CHANGELOG.md")
    assert named(text, r"(?m)(?:^|`)make ([a-z][\w-]*)") <= targets()
    text = re.sub(r"`git log -- [^`]+`", "", text)  # what only the history has
    files = named(text, r"(?<![\w/])((?:scripts|tests|solopo_plugin|examples/yaml)/[\w./-]+\.(?:py|sh|ya?ml|json))\b")
    assert {file for file in files if not (ROOT / file).exists()} == set()


def test_commands_that_train_on_other_rows_name_their_own_folder():
    """In a recipe's `output_dir` the host goes on from the last checkpoint, whatever its rows were."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.name != "CHANGELOG.md")
    commands = re.findall(r"llamafactory-cli train .*", text.replace("\\\n", ""))
    others = [command for command in commands if re.search(r" dataset(_dir)?=", command)]
    assert len(others) >= 3 and all(" output_dir=saves/" in command for command in others)


def test_the_tree_is_the_real_one():
    """Every folder and file of the tree exists, and no folder of code and no module of the core is missing from it."""
    entries, top = set(), ""
    for line in TREE.splitlines():
        indent, name = re.match(r"( *)([\w./]+)", line).groups()
        top = top if indent else name
        entries.add(top + name if indent else name)
    assert {path for path in entries if not (ROOT / path).exists()} == set()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True).stdout.splitlines()
    if not tracked:
        pytest.skip("not a git checkout, so what belongs to it is not known")
    folders = {path.split("/")[0] + "/" for path in tracked if "/" in path and not path.startswith(".")}
    rooms = {"/".join(path.split("/")[:2]) + "/" for path in tracked if re.match(r"solopo_plugin/\w+/", path)}
    core = {path for path in tracked if re.fullmatch(r"solopo_plugin/(?!__init__)\w+\.py", path)}
    assert (folders - {"examples/"} | {"examples/yaml/"} | rooms | core) - entries == set()


def test_folders_named_within_a_line_of_the_tree_exist():
    for line in TREE.splitlines():
        name, _, words = line.strip().partition(" ")
        for inner in re.findall(r"\b([\w-]+)/", words):
            assert (ROOT / name / inner).is_dir(), f"{name}{inner}/"


def test_seams_names_every_function_that_is_checked_before_it_is_wrapped():
    page = (ROOT / "docs" / "seams.md").read_text(encoding="utf-8")
    for module in (arguments, board, data, preflight, stage):
        source = Path(module.__file__).read_text(encoding="utf-8")
        wrapped = named(source, r'(?:expect_signature)?\(\s*\w+(?:\.\w+)*, "(\w+)", \(')
        assert wrapped and {name for name in wrapped if not re.search(rf"\b{name}\b", page)} == set()


def test_the_long_description_has_links_that_work_on_an_index(monkeypatch):
    import runpy

    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    given = {}
    module = runpy.run_path(str(ROOT / "setup.py"))
    text = re.sub(r"```.*?```", "", given["long_description"], flags=re.S)
    assert all("://" in link for link in re.findall(r"\]\(([^)]+)\)", text))
    assert "docs/training.md" in text

    describe, home = module["long_description"], "https://github.com/OWNER/solopo"
    monkeypatch.setitem(describe.__globals__, "HOME", home)
    text = re.sub(r"```.*?```", "", describe(), flags=re.S)
    links = {link for link in re.findall(r"\]\(([^)]+)\)", text) if link.startswith(home)}
    paths = [link.removeprefix(home).split("#")[0] for link in links]
    assert f"{home}/blob/main/docs/training.md" in {link.split("#")[0] for link in links}
    assert all((ROOT / path.split("/", 3)[3]).exists() for path in paths)
    pictures = set(re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text))
    assert pictures and all(link.startswith(f"{home}/raw/main/") for link in pictures)
