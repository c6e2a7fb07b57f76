"""`make story`: every step leaves what the next one needs, and the numbers that it prints are those of the files."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import BIN, ROOT

from solopo_plugin.qa.files import read_jsonl


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """The script in a folder of its own, as after a clone; returns the folder and what was printed."""
    folder = tmp_path_factory.mktemp("story")
    for name in ("data", "docs", "examples", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "scripts/story.sh"], cwd=folder, env=env, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "saves/story", done.stdout


@pytest.mark.slow
def test_rows_are_made_by_the_model_and_said_to_be(story):
    saves, out = story
    counts = {
        k: v["counts"] for k, v in json.loads((saves / "data" / "work" / "manifest.json").read_text())["stages"].items()
    }
    rows = list(read_jsonl(saves / "data/story_solopo.jsonl"))
    right, asked = counts["judge"]["short"]["correct"], counts["judge"]["short"]["answers"]
    assert asked == 240 * 6 and len(rows) == counts["export"]["story_solopo.jsonl"] >= 50
    for line in (
        f"read      {counts['read']['questions']} questions from 240 lines",
        "contexts  240 short and long contexts, of 120 and ",
        f"sample    short: {asked} answers",
        f"judge     short: {right} of {asked} answers are right ({right / asked:.0%})",
        f"export    story_solopo.jsonl: {len(rows)} rows",
        "look      python scripts/inspect_data.py saves/story/data/work",
        f"{len(rows)} rows; the page is saves/story/data/work_inspection/index.html",
    ):
        assert line in out, line
    lengths = [row["long_tokens"] for row in rows]
    assert re.search(rf"^long +{sum(lengths) / len(lengths):.0f} +{min(lengths)} +{max(lengths)}$", out, re.MULTILINE)
    assert (saves / "data/work_inspection/index.html").exists()


@pytest.mark.slow
def test_the_model_and_its_curves(story):
    saves, out = story
    log = [e for e in json.loads((saves / "model/trainer_state.json").read_text())["log_history"] if "loss" in e]
    assert [entry["step"] for entry in log] == list(range(10, 101, 10))
    for name in ("loss", "solopo/align_loss", "rewards/accuracies"):
        assert re.search(rf"^{name} +{log[0][name]:.4f} +{log[-1][name]:.4f}$", out, re.MULTILINE), name
    assert log[-1]["solopo/align_loss"] < log[0]["solopo/align_loss"]
    assert (saves / "model/model.safetensors").exists() and (saves / "model/training_loss.png").exists()


@pytest.mark.slow
def test_before_and_after_on_the_same_questions(story):
    saves, out = story
    results = json.loads((saves / "eval/results.json").read_text())
    assert [model["name"] for model in results["models"]] == ["base", "trained"]
    asked = {name: [(row["task"], row["id"]) for row in read_jsonl(saves / f"eval/scores/{name}.jsonl")]
             for name in ("base", "trained")}  # fmt: skip
    assert asked["base"] == asked["trained"] and len(asked["base"]) == 2 * 64
    means = {}
    for name in ("base", "trained"):
        rows = list(read_jsonl(saves / f"eval/scores/{name}.jsonl"))
        of_length = [[row["scores"]["f1"] for row in rows if row["length"] == length] for length in (128, 512)]
        means[name] = [sum(values) / len(values) * (1 if max(values) > 1 else 100) for values in of_length]
        shown = " +".join(f"{value:.1f}" for value in means[name])
        assert re.search(rf"^  {name} +{shown} +\d", out, re.MULTILINE), (name, means)
    assert means["trained"][1] > means["base"][1] + 10 and means["trained"][0] > 80
    assert (saves / "eval/report/index.html").exists()
    assert "Report: saves/story/eval/report/index.html; every number: saves/story/eval/results.json" in out


def test_the_questions_are_those_of_the_lab():
    """Two worlds: no person and no firm is in both."""
    sys.path.insert(0, str(ROOT / "scripts/lab"))
    from two_hop import HELD_OUT, questions

    for name, rows in {"questions": questions(240, 0), "held_out": questions(96, HELD_OUT)}.items():
        assert list(read_jsonl(ROOT / f"data/story/{name}.jsonl")) == rows


def test_every_step_of_the_script_is_a_command_of_its_recipe():
    text = (ROOT / "scripts/story.sh").read_text()
    for name in ("data", "train", "eval"):
        recipe = f"examples/yaml/story/{name}.yaml"
        (command,) = re.findall(rf"^(?:python|llamafactory-cli) .*{re.escape(recipe)}$", text, re.MULTILINE)
        assert f"# Launch:   {command}" in (ROOT / recipe).read_text()
