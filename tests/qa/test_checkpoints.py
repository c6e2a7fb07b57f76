"""Check which checkpoints of a run are there and whole, and what is moved aside."""

import os
import shutil
import time

import pytest

from solopo_plugin.qa.checkpoints import by_step, set_back_from_the_future, set_earlier_aside, whole
from solopo_plugin.qa.files import DataError


@pytest.fixture
def run(tmp_path):
    """Make a run with whole checkpoints of steps 2, 9 and 10, a cut off one, and what is no checkpoint."""
    for step in (10, 2, 9, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text(f'{{"global_step": {step}}}')
    (tmp_path / "checkpoint-12/trainer_state.json").write_text('{"global_st')
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7").touch()
    return tmp_path


def test_checkpoints_are_in_the_order_of_steps(run):
    assert [*by_step(run)] == [2, 9, 10, 12] and [path.name for path in whole(run)] == [
        f"checkpoint-{n}" for n in (2, 9, 10)
    ]
    assert by_step(run / "nowhere") == {} and whole(run / "nowhere") == []


@pytest.mark.parametrize("start, left", [
    (None, []), ("checkpoint-9", [2, 9]), ("checkpoint-10", [2, 9, 10]), ("checkpoint-12", [2, 9, 10, 12])
])  # fmt: skip
def test_an_earlier_runs_checkpoints_are_moved_aside(run, start, left):
    """Move nothing for a state that cannot be read."""
    (run / "_earlier_checkpoint-10").mkdir()
    (run / "_earlier_checkpoint-10/old").touch()
    moved = set_earlier_aside(run, start and str(run / start))
    assert [*by_step(run)] == left
    assert [path.name for path in moved] == [f"_earlier_checkpoint-{n}" for n in (2, 9, 10, 12) if n not in left]
    assert (run / "_earlier_checkpoint-10/old").exists() == (10 in left), "the older one of that name is replaced"
    assert (run / "checkpoint-best").is_dir() and all(path.is_dir() for path in moved)
    assert set_earlier_aside(run, start and str(run / start)) == []


@pytest.mark.parametrize("start, left", [("other/checkpoint-9", []), ("run/checkpoint-9", [2, 9]), ("to", [2, 9])])
def test_a_start_in_another_folder_leaves_no_checkpoint(run, tmp_path_factory, start, left):
    """Take it for no past of theirs; one in this folder is, whatever it is called."""
    folder = tmp_path_factory.mktemp("links")
    shutil.copytree(run, folder / "other")
    (folder / "run").symlink_to(run)
    (folder / "to").symlink_to(run / "checkpoint-9")
    set_earlier_aside(run, str(folder / start))
    assert [*by_step(run)] == left and [*by_step(folder / "other")] == [2, 9, 10, 12]


def test_a_checkpoint_that_cannot_be_moved_is_said(run):
    (run / "_earlier_checkpoint-2").touch()
    with pytest.raises(DataError, match=f"^Cannot write {run}: Not a directory"):
        set_earlier_aside(run, None)


def test_a_checkpoint_of_a_clock_ahead_is_dated_now(run):
    """Set it back, since the Trainer keeps the latest by the clock."""
    now = time.time()
    os.utime(run / "checkpoint-2", (now + 3600, now + 3600))
    os.utime(run / "checkpoint-9", (now - 3600, now - 3600))
    set_back_from_the_future(run)
    dated = {step: path.stat().st_mtime for step, path in by_step(run).items()}
    assert dated[9] == pytest.approx(now - 3600) and now - 1 < dated[2] <= time.time() + 0.1
