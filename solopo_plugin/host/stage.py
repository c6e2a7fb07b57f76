"""Seam 3: the stage. `llamafactory.train.tuner` learns to run `stage: solopo`.

What: two names of the module are wrapped. Why: `_training_function` dispatches by an if/elif over stage names and ends
in "Unknown task"; rather than copy it, the stage passes as `dpo` between parsing and dispatch and is itself again when
`run_dpo` is reached, which hands it to `run_solopo`. Host: 0.9.5.
"""

import sys
from contextlib import ExitStack, nullcontext

from .arguments import passing_as_dpo
from .preflight import check, is_ours, recipe_of, refusing
from .verbosity import quiet
from .versions import expect_signature, wrap

IN_LOG = {"solopo/align_loss": "align_loss", "solopo/reward_gap": "reward_gap"}  # metric -> trainer_log.jsonl


def apply(tuner) -> None:
    """Patch `llamafactory.train.tuner` right after its import."""
    arguments = ("model_args", "data_args", "training_args", "finetuning_args", "callbacks")
    wrap((tuner, "get_train_args", ("args",), _disguising), (tuner, "run_dpo", arguments, _dispatching))


def _disguising(get_train_args, args=None):
    ours = is_ours(recipe := recipe_of(args))
    with refusing() if ours else nullcontext():
        if ours:
            check(recipe)
        parsed = get_train_args(args)
    if parsed[3].stage == "solopo":
        parsed[3].disguise = ExitStack()
        parsed[3].disguise.enter_context(passing_as_dpo(parsed[3]))
    return parsed


def _dispatching(run_dpo, model_args, data_args, training_args, finetuning_args, callbacks=None):
    disguise = vars(finetuning_args).pop("disguise", None)
    if disguise is None:
        return run_dpo(model_args, data_args, training_args, finetuning_args, callbacks)
    from ..workflow import run_solopo

    disguise.close()
    for callback in callbacks or []:
        if type(callback).__name__ == "LogCallback":
            log_alignment(callback)
    with quiet():
        return run_solopo(model_args, data_args, training_args, finetuning_args, callbacks)


def log_alignment(callback) -> None:
    """Let the host's `LogCallback` write alignment loss and reward gap into `trainer_log.jsonl`, beside its own."""
    try:
        expect_signature(type(callback), "on_log", ("self", "args", "state", "control", "kwargs"))
        expect_signature(type(callback), "_write_log", ("self", "output_dir", "logs"))
    except RuntimeError as error:
        print(f"[WARNING] solopo_plugin: no alignment loss in trainer_log.jsonl: {error}", file=sys.stderr)
        return
    on_log, write = callback.on_log, callback._write_log

    def wrapper(args, state, control, **kwargs):
        last = state.log_history[-1]
        ours = {name: last[metric] for metric, name in IN_LOG.items() if metric in last}
        callback._write_log = lambda output_dir, logs: write(output_dir, logs | ours)  # `on_log` hands it to a thread
        return on_log(args, state, control, **kwargs)

    callback.on_log = wrapper
