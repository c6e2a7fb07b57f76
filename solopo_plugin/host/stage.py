"""Seam 3: the stage. `llamafactory.train.tuner` learns to run `stage: solopo`.

What: two names of the module are wrapped. Why: `_training_function` dispatches by an if/elif over stage names and ends
in "Unknown task"; rather than copy it, the stage passes as `dpo` between parsing and dispatch and is itself again when
`run_dpo` is reached, which hands it to `run_solopo`. Host: 0.9.5.
"""

from functools import wraps

from .versions import expect_signature


def apply(tuner) -> None:
    """Patch `llamafactory.train.tuner` right after its import."""
    expect_signature(tuner, "get_train_args", ("args",))
    expect_signature(tuner, "run_dpo", ("model_args", "data_args", "training_args", "finetuning_args", "callbacks"))
    tuner.get_train_args = _passing_as_dpo(tuner.get_train_args)
    tuner.run_dpo = _dispatching(tuner.run_dpo)


def _passing_as_dpo(get_train_args):
    @wraps(get_train_args)
    def wrapper(args=None):
        parsed = get_train_args(args)
        finetuning_args = parsed[3]
        if finetuning_args.stage == "solopo":
            finetuning_args.stage, finetuning_args.runs_solopo = "dpo", True
        return parsed

    return wrapper


def _dispatching(run_dpo):
    @wraps(run_dpo)
    def wrapper(model_args, data_args, training_args, finetuning_args, callbacks=None):
        if not finetuning_args.__dict__.pop("runs_solopo", False):
            return run_dpo(model_args, data_args, training_args, finetuning_args, callbacks)
        from ..workflow import run_solopo
        from .board import log_alignment

        for callback in callbacks or []:
            if type(callback).__name__ == "LogCallback":
                log_alignment(callback)
        finetuning_args.stage = "solopo"
        return run_solopo(model_args, data_args, training_args, finetuning_args, callbacks)

    return wrapper
