"""Tell which checkpoints of a training run are on disk and which are whole, and move those of an earlier run aside.

The host's Trainer writes a checkpoint's state last: one without it was cut off.
"""

import json
import math
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

from .files import as_data_error

STATE = "trainer_state.json"
EARLIER = "_earlier_"  # before the name of one that is no longer its run's: neither resumed, rotated nor pushed


def by_step(folder: Path | str) -> dict[int, Path]:
    """Return the checkpoint folders of a training run by step, in the order of steps; none where no folder is."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.is_dir()]
    steps = {int(match[1]): path for path in found if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))}
    return dict(sorted(steps.items()))


def is_last(checkpoint: str | None, folder: Path | str) -> bool:
    """Return whether a checkpoint is the last of a training run, whole or not, which the host chooses itself."""
    return bool(checkpoint) and [Path(str(checkpoint))] == [*by_step(folder).values()][-1:]


def state_of(checkpoint: Path | str | None) -> dict | None:
    """Return what the state of a checkpoint says; None where there is none, or it is not whole."""
    state = None
    if checkpoint:
        with suppress(OSError, ValueError):
            state = json.loads(Path(checkpoint, STATE).read_text(encoding="utf-8"))
    return state if isinstance(state, dict) else None


def whole(folder: Path | str) -> list[Path]:
    """Return the whole checkpoints of a training run, in the order of steps."""
    return [path for path in by_step(folder).values() if state_of(path) is not None]


def set_earlier_aside(folder: Path | str, start: str | None) -> list[Path]:
    """Rename the checkpoints that a run finds behind the step at which it begins; returns their new places.

    Args:
        folder: The run's own. What an earlier run left there would be taken for this one's.
        start: The checkpoint that the run goes on from; None: it begins anew. In another folder it is no past of this
            one's, and all are renamed.
    """
    own = start and Path(folder).resolve() in (Path(start).parent.resolve(), Path(start).resolve().parent)
    step, moved = (state_of(start) or {}).get("global_step", math.inf) if own else -1, []
    with as_data_error(folder, "write"):
        for path in (path for number, path in by_step(folder).items() if number > step):
            aside = path.with_name(EARLIER + path.name)
            shutil.rmtree(aside, ignore_errors=True)
            moved.append(path.rename(aside))
    return moved


def set_back_from_the_future(folder: Path | str) -> None:
    """Date checkpoints of a clock that was ahead to now: the Trainer takes the latest for the one to keep."""
    for path in by_step(folder).values():
        with suppress(OSError):
            if path.stat().st_mtime > time.time():
                os.utime(path)
