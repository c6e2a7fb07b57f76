"""Seam 3: the stage. `llamafactory.train.tuner` learns to run `stage: solopo`.

What: two names of the module are wrapped. Why: `_training_function` dispatches by an if/elif over stage names and ends
in "Unknown task"; rather than copy it, the stage passes as `dpo` between parsing and dispatch and is itself again when
`run_dpo` is reached, which hands it to `run_solopo`. Host: 0.9.5.
"""

from contextlib import ExitStack, nullcontext

from .arguments import passing_as_dpo
from .preflight import check, is_ours, recipe_of, refusing
from .verbosity import quiet
from .versions import wrap


def apply(tuner) -> None:
    """Patch `llamafactory.train.tuner` right after its import."""
    arguments = ("model_args", "data_args", "training_args", "finetuning_args", "callbacks")
    wrap((tuner, "get_train_args", ("args",), _disguising), (tuner, "run_dpo", arguments, _dispatching))


def _disguising(get_train_args):
    def wrapper(args=None):
        ours = is_ours(recipe := recipe_of(args))
        with refusing() if ours else nullcontext():
            if ours:
                check(recipe)
            parsed = get_train_args(args)
        if parsed[3].stage == "solopo":
            parsed[3].disguise = ExitStack()
            parsed[3].disguise.enter_context(passing_as_dpo(parsed[3]))
        return parsed

    return wrapper


def _dispatching(run_dpo):
    def wrapper(model_args, data_args, training_args, finetuning_args, callbacks=None):
        disguise = vars(finetuning_args).pop("disguise", None)
        if disguise is None:
            return run_dpo(model_args, data_args, training_args, finetuning_args, callbacks)
        from ..workflow import run_solopo
        from .board import log_alignment

        disguise.close()
        for callback in callbacks or []:
            if type(callback).__name__ == "LogCallback":
                log_alignment(callback)
        with quiet():
            return run_solopo(model_args, data_args, training_args, finetuning_args, callbacks)

    return wrapper
