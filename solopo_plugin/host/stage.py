"""Seam 3 (docs/seams.md): `llamafactory.train.tuner` learns to run `stage: solopo`.

The stage passes as `dpo` between parsing and dispatch; `run_dpo` gives its name back and hands it to `run_solopo`.
"""

import os
from contextlib import ExitStack, nullcontext
from pathlib import Path

from ..qa.checkpoints import is_last
from ..qa.files import lock_folder
from .preflight import check, recipe_of, refusing
from .versions import wrap

# environment variables by which the user has chosen what transformers logs, or the board, which reads its log
ASKED = ("LLAMAFACTORY_VERBOSITY", "TRANSFORMERS_VERBOSITY", "LLAMABOARD_ENABLED")
IN_LOG = {"solopo/align_loss": "align_loss", "solopo/reward_gap": "reward_gap"}  # metric -> trainer_log.jsonl


def apply(tuner) -> None:
    """Patch `llamafactory.train.tuner` right after its import."""
    arguments = ("model_args", "data_args", "training_args", "finetuning_args", "callbacks")
    wrap((tuner, "get_train_args", ("args",), _disguising), (tuner, "run_dpo", arguments, _dispatching))


def _disguising(get_train_args, args=None):
    recipe = recipe_of(args)
    ours = recipe.get("stage") == "solopo"
    with refusing() if ours else nullcontext():
        if ours:
            check(recipe)
        parsed = get_train_args(args)
    if parsed[3].stage == "solopo":
        if not recipe.get("resume_from_checkpoint") and is_last(parsed[2].resume_from_checkpoint, parsed[2].output_dir):
            parsed[2].resume_from_checkpoint = True  # the host's choice, whole or not: run_solopo makes it anew
        parsed[3].stage, parsed[3].disguised = "dpo", True
    return parsed


def _dispatching(run_dpo, model_args, data_args, training_args, finetuning_args, callbacks=None):
    if not vars(finetuning_args).pop("disguised", False):
        return run_dpo(model_args, data_args, training_args, finetuning_args, callbacks)
    from transformers.utils import logging

    from ..workflow import run_solopo

    finetuning_args.stage = "solopo"
    for callback in callbacks or []:
        if type(callback).__name__ == "LogCallback":
            log_alignment(callback)
    with ExitStack() as stack:
        if training_args.do_train and training_args.process_index == 0:
            with refusing():  # no other run writes there meanwhile; what begins with _ is not pushed to the hub
                stack.enter_context(lock_folder(Path(training_args.output_dir), "output_dir", "_lock"))
        stack.callback(logging.set_verbosity, logging.get_verbosity())
        if not any(os.environ.get(name) for name in ASKED):
            logging.set_verbosity_warning()  # the host's INFO prints each configuration whole, each time it is read
        return run_solopo(model_args, data_args, training_args, finetuning_args, callbacks)


def log_alignment(callback) -> None:
    """Let the host's `LogCallback` write alignment loss and reward gap into `trainer_log.jsonl`, beside its own."""
    on_log, write = callback.on_log, callback._write_log

    def wrapper(args, state, control, **kwargs):
        last = state.log_history[-1]
        ours = {name: last[metric] for metric, name in IN_LOG.items() if metric in last}
        callback._write_log = lambda output_dir, logs: write(output_dir, logs | ours)  # `on_log` hands it to a thread
        return on_log(args, state, control, **kwargs)

    callback.on_log = wrapper
