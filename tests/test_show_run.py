"""Read what scripts/show_run.py says of a run, and the help of a script beside it."""

import json
import runpy
import sys

import pytest
import show_run
from conftest import ROOT


def test_first_and_last_step_are_shown(tmp_path, capsys):
    log = [{"step": step, "loss": loss} for step, loss in ((5, 0.5), (10, 0.25))] + [{"step": 10, "train_runtime": 1.0}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    show_run.main(str(tmp_path))
    shown = capsys.readouterr().out
    assert [line.split() for line in shown.splitlines()[1:3]] == [
        ["metric", "step", "5", "step", "10"], ["loss", "0.5000", "0.2500"]
    ]  # fmt: skip


def test_a_metric_that_the_last_line_lacks_is_a_dash(tmp_path, capsys):
    log = [{"step": 5, "loss": 0.5, "rewards/accuracies": 1.0}, {"step": 9, "loss": 0.25}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    show_run.main(str(tmp_path))
    assert "rewards/accuracies 1.0000 -" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("text", ['{"log_history": [{"st', "{}", "[]", '{"log_history": null}'])
def test_a_damaged_state_is_a_sentence(tmp_path, text):
    (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(SystemExit, match=r"trainer_state.json is no state of a run \(.*; give a checkpoint of it"):
        show_run.main(str(tmp_path))


@pytest.mark.parametrize(
    "state, sentence",
    [
        (None, "{out} holds no finished run: trainer_state.json is missing; run"),
        (
            {"log_history": [{"step": 3, "train_runtime": 1.0}]},
            "{out} logged no loss, so that there is nothing to show: ",
        ),
    ],
)
def test_a_run_without_numbers_is_a_sentence(tmp_path, state, sentence):
    if state:
        (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(SystemExit) as stopped:
        show_run.main(str(tmp_path))
    assert str(stopped.value).startswith(sentence.format(out=tmp_path))


SCRIPTS = [path for path in sorted((ROOT / "scripts").rglob("*.py")) if "__main__" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_is_shown_and_nothing_made(tmp_path, monkeypatch, capsys, script):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.startswith(f"usage: {script.name}") and not [*tmp_path.iterdir()]


def test_without_a_folder_it_says_how_it_is_called(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["show_run.py"])
    with pytest.raises(SystemExit, match="^2$"):
        runpy.run_path(show_run.__file__, run_name="__main__")
    assert "show_run.py [-h] OUTPUT_DIR" in capsys.readouterr().err
