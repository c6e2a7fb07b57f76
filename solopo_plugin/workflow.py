"""`run_solopo`: load, build, train, evaluate, save, in the shape of the host's own `train/dpo/workflow.py`."""

import os
import signal
import sys
from contextlib import contextmanager, nullcontext
from copy import copy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.extras import logging
from llamafactory.extras.ploting import plot_loss
from llamafactory.model import load_config, load_model, load_tokenizer
from llamafactory.train.callbacks import PissaConvertCallback
from llamafactory.train.trainer_utils import create_modelcard_and_push, create_ref_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.training_args import ParallelMode

from . import __version__
from .args import loss_refers
from .attention import base_of, how_a_step_runs, prepare, why_two_stages
from .chunked_mlp import chunk_mlps
from .data import data_sets, part_lengths, step_lengths, trained_on
from .host.preflight import check_vocabulary, refusing
from .host.saved import recorded
from .losses import ANCHOR
from .qa.checkpoints import by_step, set_earlier_aside, state_of, whole
from .qa.files import did_you_mean
from .qa.provenance import installed
from .qa.window import ropes_by_length, window_of
from .reference import goes_on, with_reference_logps
from .sequence_parallel import why_not_shared
from .trainer import ROWS, SoloTrainer

logger = logging.get_logger(f"llamafactory.{__name__}")  # under the host's logger, which has the handlers
# what attends in padded batches: cuDNN's gradients under a mask can be NaN since torch 2.11 (pytorch's issue 196678)
MASKED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH, SDPBackend.OVERRIDEABLE]


def run_solopo(model_args, data_args, training_args, finetuning_args, callbacks=None) -> None:
    """Train and/or evaluate with SoLoPO; the arguments are the host's, `finetuning_args` with the `solopo_*` keys."""
    logger.info_rank0(f"solopo_plugin {__version__} is active in LLaMA-Factory {installed('llamafactory')}.")
    rows = {"dataset": data_args.dataset, "dataset_dir": data_args.dataset_dir}
    with refusing():
        if training_args.do_train:
            check_resume(training_args, finetuning_args.use_badam, data_args.streaming, rows)
        if (size := finetuning_args.solopo_sequence_parallel) > 1:
            check_sharing(size, model_args)
        tokenizer_module, dataset_module = load_data(model_args, data_args, training_args)
        with drawn_from(training_args.seed):
            model = load_model(tokenizer_module["tokenizer"], model_args, finetuning_args, training_args.do_train)
        if finetuning_args.solopo_mlp_chunk:
            chunk_mlps(model, finetuning_args.solopo_mlp_chunk)
        elsewhere, ref_model = finetuning_args.ref_model is not None, None
        cached = reference_is_cached(data_args, training_args, finetuning_args)
        check_window(model, data_args, dataset_module, cached)

        load_ref = partial(load_ref_model, model_args, finetuning_args, training_args.seed)
        if finetuning_args.use_ref_model and not cached:  # evaluation of a model against itself needs no second one
            ref_model = load_ref() if elsewhere or training_args.do_train else model
        if finetuning_args.use_ref_model and not elsewhere:
            warn_of_reference(model, model_args, finetuning_args, training_args.do_train)

        packed = choose_form(model, ref_model, model_args, training_args, finetuning_args)
        given = dict(args=training_args, finetuning_args=finetuning_args, callbacks=callbacks)
        trainer = SoloTrainer(model, packed, rows, ref_model=ref_model, **given, **dataset_module, **tokenizer_module)
        check_best_exists(trainer)
        if training_args.do_train:
            check_start(trainer)
        if any(getattr(callback, "aborted", False) for callback in trainer.callback_handler.callbacks):
            sys.exit(0)  # LlamaBoard's "Abort" until here: the host's callback notes it, and only steps look there
        if cached:
            load = partial(load_ref, packed) if elsewhere else None
            with abort_ends_the_process():
                sets = with_reference_logps(trainer, model_args, finetuning_args, load)
            trainer.train_dataset, trainer.eval_dataset = sets
        if training_args.do_train:
            begin(trainer)
    if training_args.do_train:
        with nullcontext() if packed else sdpa_kernel(MASKED):
            train(trainer)
    if training_args.do_eval:
        evaluate(trainer, against_itself=ref_model is model)
    create_modelcard_and_push(trainer, model_args, data_args, training_args, finetuning_args)


def check_sharing(size: int, model_args) -> None:
    """Refuse a model or a number of processes with which ranks cannot share rows."""
    heads = load_config(model_args).get_text_config().num_attention_heads
    if reason := why_not_shared(size, heads, int(os.environ.get("LOCAL_WORLD_SIZE", 1))):
        raise ValueError(reason)


def check_best_exists(trainer: SoloTrainer) -> None:
    """Refuse a `metric_for_best_model` that no evaluation gives, which the host would say after the first.

    Whether it is better when lower is `check_best_direction`'s, in host/arguments.py.
    """
    args, sets, best = trainer.args, trainer.eval_dataset, trainer.args.metric_for_best_model
    of_sets = [f"{name}_" for name in sets] if isinstance(sets, dict) else [""]
    names = [f"{of_set}{name}" for of_set in of_sets for name in ("loss", *trainer.metrics)]
    if best is not None and best.removeprefix("eval_") not in names and args.eval_strategy != "no":
        filled_in = args.load_best_model_at_end and best == "loss"  # by transformers, where the recipe names none
        watched = "`load_best_model_at_end` watches `loss`, which" if filled_in else f"`metric_for_best_model: {best}`"
        raise ValueError(
            f"{watched} is no metric of the evaluation. {did_you_mean(best, names)}There are: {', '.join(names)}."
        )


def check_start(trainer: SoloTrainer) -> None:
    """Refuse rows, an optimizer or a schedule with which the Trainer cannot start: it says so after scoring."""
    rows, batch = getattr(trainer.train_dataset, "num_rows", np.inf), trainer.args.train_batch_size
    if trainer.args.dataloader_drop_last and rows < (batch := batch * trainer.ranks.groups):
        raise ValueError(f"`dataloader_drop_last: true` drops all {rows} rows: a batch has {batch}; remove the key.")
    trial, key = copy(trainer), "optim"
    trial.args = copy(trainer.args)
    trial.args.lr_scheduler_kwargs = dict(trainer.args.lr_scheduler_kwargs or {})  # which the host fills in
    try:
        trial.get_optimizer_cls_and_kwargs(trial.args, trial.model)
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=trial.args.learning_rate)
        key = "lr_scheduler_type"
        trial.create_scheduler(1, optimizer)
    except (ImportError, TypeError, ValueError) as error:
        value = getattr(trial.args, key)
        raise ValueError(f"`{key}: {getattr(value, 'value', value)}` cannot be set up: {error}") from error


def load_data(model_args, data_args, training_args) -> tuple[dict, dict]:
    """Return what the host gives of the tokenizer and of the data sets, by the trainer's names."""
    tokenizer_module = load_tokenizer(model_args)
    if tokenizer_module["processor"] is not None:
        logger.info_rank0(f"{model_args.model_name_or_path} is multimodal: it is trained as a text model.")
    tokenizer = tokenizer_module["tokenizer"]
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    with recorded(data_args, training_args, tokenizer, template):
        if not model_args.resize_vocab:
            check_vocabulary(tokenizer, template, load_config(model_args), model_args.model_name_or_path)
        dataset_module = get_dataset(template, model_args, data_args, training_args, stage="solopo", **tokenizer_module)
    if data_args.streaming:
        configure_streaming(dataset_module, training_args)
    elif training_args.do_train and data_args.val_size > 1e-6 and (twice := trained_on(*dataset_module.values())):
        raise ValueError(
            f"`val_size: {data_args.val_size:g}` holds out {len(twice)} rows that are trained on, too, as "
            f"{min(twice)}: `interleave_over`, `num_samples` or a file repeats them; repeat none or set `eval_dataset`."
        )
    return tokenizer_module, dataset_module


def choose_form(model, ref_model, model_args, training_args, finetuning_args) -> bool:
    """Return whether a step runs packed, log how it runs, and set what two stages need."""
    reason = why_two_stages(finetuning_args.solopo_forward, model, ref_model)
    dtype = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else base_of(model).dtype
    logger.info_rank0(how_a_step_runs(model, reason, training_args.device, dtype))
    if reason and (size := finetuning_args.solopo_sequence_parallel) > 1:
        raise ValueError(f"`solopo_sequence_parallel: {size}` needs packed rows: {reason}; set it to 1.")
    if reason:
        configure_checkpointing(model, model_args, training_args, finetuning_args)
    return reason is None


def check_window(model, data_args, dataset_module: dict, cached: bool) -> None:
    """Warn of rows with more tokens than the model was made for; a stream's, which are unknown, have `cutoff_len`.

    Refuse those that change what is beside or behind them. Of several rejected responses the mean counts.
    """
    config, short = base_of(model).config.get_text_config(), np.array([data_args.cutoff_len])
    window, ropes, long = window_of(config), ropes_by_length(config), short
    if not data_args.streaming:
        sets = data_sets(dataset_module.get("train_dataset"), dataset_module.get("eval_dataset")).values()
        parts = [(n, np.maximum(n["chosen"], n["rejected"] // n["pairs"])) for n in map(part_lengths, sets)]
        short, long = (np.concatenate([n[f"{side}_prompt"] + m for n, m in parts]) for side in ("short", "long"))
    tokens = np.maximum(short, long)
    if beyond := (tokens > window).sum():
        rows, out = f"{beyond:,} of {len(tokens):,} rows", "with `solopo_overlength: drop` to leave longer rows out"
        if data_args.streaming:
            rows, out = "Rows of a stream", "beyond which a row ends the run: leave longer ones out of the data set"
        sentence = (
            f"{rows} have up to {tokens.max():,} tokens, and the model was made for {window:,}: widen its window by "
            f'YaRN (docs/training.md, "Rows longer than one GPU"), or set `cutoff_len: {window}`, {out}.'
        )
        if "dynamic" in ropes:
            raise ValueError(f"With `dynamic` rope scaling a longer row changes all that follow. {sentence}")
        logger.warning_rank0(sentence)
    for kind, limit in ropes.items() if cached else ():
        if short.max() > limit:
            raise ValueError(
                f"`solopo_reference: cached` does not go with `{kind}` rope scaling and short sequences of up to "
                f"{short.max():,} tokens: more than {limit:,} change others in a batch; set `solopo_reference: online`."
            )


def warn_of_reference(model, model_args, finetuning_args, trains: bool) -> None:
    """Warn where the reference, without a `ref_model`, is not the model before training."""
    if not trains:
        logger.warning_rank0(
            "An evaluation alone has no reference but the model itself: metrics that compare the two say nothing and "
            "are not saved; to have them set `ref_model` to the model before training."
        )
    elif goes_on(model, model_args, finetuning_args):
        logger.warning_rank0(
            f"Training goes on with the adapter {model_args.adapter_name_or_path[-1]}, and the reference is the model "
            "without it, as in the host's DPO; for the model as it starts set `create_new_adapter: true`, which merges "
            "the adapter (not under ZeRO-3, nor on quantized weights), or `ref_model` and `ref_model_adapters`."
        )


def begin(trainer: SoloTrainer) -> None:
    """Move an earlier run's checkpoints aside, which a resume or an evaluation would take for this one's."""
    args = trainer.args
    if args.should_save and (moved := set_earlier_aside(args.output_dir, args.resume_from_checkpoint)):
        logger.warning(
            f"{args.output_dir} holds checkpoints of an earlier run that this one does not go on from; they are "
            f"called {', '.join(path.name for path in moved)} now, and may be deleted."
        )
    trainer.accelerator.wait_for_everyone()


def train(trainer: SoloTrainer) -> None:
    """Train, and save the model, its metrics and curves as the host's stages do."""
    args, finetuning_args = trainer.args, trainer.finetuning_args
    save_pissa_init(trainer)
    begun = (state_of(args.resume_from_checkpoint) or {}).get("global_step") or 0  # before it may be deleted
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    if finetuning_args.include_effective_tokens_per_second:
        tokens = sum(step_lengths(trainer.train_dataset, finetuning_args.longpo, finetuning_args.long_pair))
        epochs = result.metrics["epoch"] * (1 - begun / max(result.global_step, 1))  # of these rows, since the resume
        result.metrics["effective_tokens_per_sec"] = tokens * epochs / result.metrics["train_runtime"] / args.world_size
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    if trainer.is_world_process_zero() and finetuning_args.plot_loss:
        sets = data_sets(None, trainer.eval_dataset)
        evaluated = [f"eval_{name}_loss" if name else "eval_loss" for _, name in sets]
        keys = ["loss", "rewards/accuracies", "rewards/margins", "solopo/align_loss", *evaluated]
        plot_loss(args.output_dir, keys=keys)


def save_pissa_init(trainer: SoloTrainer) -> None:
    """Save the adapter that `pissa_convert` takes off in the end, on the main process, as the host's callback does.

    On a resume the file of the first start stays: a singular value decomposition need not give the same bits elsewhere.
    The Trainer calls the callback once it has loaded a checkpoint, whose adapter it would save: so not again.
    """
    there = any(Path(trainer.args.output_dir, "pissa_init").glob("adapter_model.*"))
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, PissaConvertCallback):
            if not (trainer.args.resume_from_checkpoint and there):
                callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
            callback.on_train_begin = lambda *_, **__: None


def evaluate(trainer: SoloTrainer, against_itself: bool) -> None:
    """Evaluate, and save the metrics as the host's stages do, without those that compare the model with itself."""
    metrics, args = trainer.evaluate(metric_key_prefix="eval"), trainer.finetuning_args
    if against_itself:
        refers = loss_refers(args.pref_loss, args.solopo_objective)
        losses = [name for name in metrics if name.endswith("_loss") and not name.endswith("align_loss")]
        empty = (ANCHOR, *(("rewards/", *losses) if refers else ()))
        metrics = {name: value for name, value in metrics.items() if not any(part in name for part in empty)}
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


@contextmanager
def abort_ends_the_process():
    """Obey LlamaBoard's "Abort" while the reference is scored: the host's handler sets a flag that only steps look at.

    What has been scored is on disk and is found by the next run.
    """
    handler = signal.getsignal(signal.SIGABRT)
    if not callable(handler):  # not started from the board
        yield
        return
    signal.signal(signal.SIGABRT, lambda *_: sys.exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGABRT, handler)


def check_resume(training_args, badam: bool = False, streaming: bool = False, rows: dict | None = None) -> None:
    """Refuse what is no checkpoint, and warn of what a resume does not go on with, of which the Trainer says nothing.

    Without the optimizer's state, which `save_only_model` leaves out, DeepSpeed cannot resume; without DeepSpeed Adam's
    moments are 0 and the learning rate is the first step's, warm-up included, so that it is not decayed in the end.
    """
    given, folder = training_args.resume_from_checkpoint, training_args.output_dir
    if not given:
        return
    checkpoint = given if given is not True else str(next(reversed(whole(folder)), ""))
    if (state := state_of(checkpoint)) is None:
        raise ValueError(
            f"`resume_from_checkpoint: {given}`: no whole checkpoint is in {checkpoint or folder}; name another, or "
            "remove the key, or the folder if its writing was cut off; without the key `overwrite_output_dir: true` "
            "begins anew."
        )
    if given is True:
        training_args.resume_from_checkpoint = checkpoint
        if (last := str([*by_step(folder).values()][-1])) != checkpoint:
            logger.warning_rank0(f"The writing of {last} was cut off: the run goes on from {checkpoint}.")
    if rows and (before := (state.get("stateful_callbacks") or {}).get(ROWS, rows)) != rows:
        logger.warning_rank0(
            f"{checkpoint} was trained on other rows ({before}) than this run's ({rows}), and the run goes on from it; "
            "to start from the beginning name another `output_dir`, or set `overwrite_output_dir: true`."
        )
    if streaming and (state.get("epoch") or 0) > 1:
        logger.warning_rank0(
            f"{checkpoint} is past the stream's first pass, and the second begins anew: with other rows than without "
            'the interruption (docs/training.md, "Resume").'
        )
    if badam:
        logger.warning_rank0(f"{checkpoint} does not hold BAdam's states and order of blocks: they start anew.")
    needed = ("global_step*",) if training_args.deepspeed_plugin else ("optimizer*", "scheduler.pt")
    if all(any(Path(checkpoint).glob(pattern)) for pattern in needed):
        return
    found = f"{checkpoint} has no optimizer state (`save_only_model`?)"
    anew = "to start from the beginning set `overwrite_output_dir: true`."
    if training_args.deepspeed_plugin:
        raise ValueError(f"{found}, and DeepSpeed cannot resume without; {anew}")
    logger.warning_rank0(
        f"{found}: weights and step go on from there, the optimizer and the learning rate's schedule start anew; {anew}"
    )


def configure_streaming(dataset_module: dict, training_args) -> None:
    """Give each rank its share of every stream, and refuse streams whose shares would differ in size.

    The default, one rank that reads for all, concatenates batches, which here differ in length. With more shards than
    ranks accelerate deals out shards instead of rows, and ranks that run out early leave the others waiting.
    """
    training_args.accelerator_config.dispatch_batches = False
    streams = data_sets(dataset_module.get("train_dataset"), dataset_module.get("eval_dataset")).values()
    if 1 < training_args.world_size < (shards := max(getattr(stream, "n_shards", 1) for stream in streams)):
        raise ValueError(
            f"A stream has {shards} shards for {training_args.world_size} processes, which would get unequal shares; "
            "set `dataloader_num_workers` to at most the number of processes, or `streaming: false`."
        )


def reference_is_cached(data_args, training_args, finetuning_args) -> bool:
    """Return whether the reference is scored before training; not that of streams, nor what is its own reference."""
    if not finetuning_args.use_ref_model or finetuning_args.solopo_reference == "online":
        return False
    if data_args.streaming:
        logger.warning_rank0("A stream is read once: the reference runs in every step, as `solopo_reference: online`.")
        return False
    return training_args.do_train or finetuning_args.ref_model is not None


@contextmanager
def drawn_from(seed: int):
    """Make weights that are drawn while a model loads depend on the seed alone, and draw nothing from what follows.

    The host draws those of a reference anew, for `train_from_scratch` and for new tokens: without this the reference
    would not be the policy as it starts, and what is drawn would depend on what was drawn before.
    """
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(seed)
        yield


def load_ref_model(model_args, finetuning_args, seed: int, packed: bool = False):
    """Return the host's reference model; `packed`: able to run a packed row. None where the policy is it (LoRA)."""
    given = copy(model_args)
    for name in ("add_tokens", "add_special_tokens"):  # the host splits them anew
        if isinstance(value := getattr(given, name), list):
            setattr(given, name, ",".join(value))
    with drawn_from(seed):
        ref_model = create_ref_model(given, finetuning_args)
    if packed:
        if reason := why_two_stages("auto", ref_model):
            raise ValueError(f"`ref_model` cannot run packed rows: {reason}; set `solopo_forward: two_stage`.")
        prepare(ref_model)
    return ref_model


def configure_checkpointing(model, model_args, training_args, finetuning_args) -> None:
    """Set what two forwards before one backward need where reentrant checkpointing, the host's default, is wrong.

    A parameter's gradient is then ready twice. On several ranks DDP and ZeRO-1/2 raise, ZeRO-3 *silently* loses part of
    the gradient (measured: gradient norm 3.38 for 2.85). An optimizer that steps within backward steps twice, from half
    a gradient each (layer-wise GaLore on a tiny model: 24 of 27 parameters). Non-reentrant checkpointing is right on
    all of them. A packed step has one forward before its backward, and either kind is right.

    Where layers share the keys of others (small Gemma 4), the reentrant kind loses gradients that come through them.

    DDP writes all buffers again before each forward, also those that the first has saved for backward (Gemma's scales).
    """
    training_args.ddp_broadcast_buffers = bool(training_args.ddp_broadcast_buffers)
    distributed = training_args.parallel_mode == ParallelMode.DISTRIBUTED
    within_backward = "lomo" in training_args.optim
    shares = getattr(base_of(model).config.get_text_config(), "num_kv_shared_layers", 0)
    if not (distributed or within_backward or shares) or model_args.disable_gradient_checkpointing:
        return
    needed = "by an optimizer that steps within backward" if within_backward else "where layers share keys"
    needed = "on several ranks" if distributed else needed
    if model_args.use_unsloth_gc:
        raise ValueError(
            f"`use_unsloth_gc: True` is reentrant: two forwards a step need the other kind {needed}; remove it."
        )
    if model_args.use_reentrant_gc and base_of(model).is_gradient_checkpointing:
        model_args.use_reentrant_gc = False
        base_of(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        logger.info_rank0(f"Set `use_reentrant_gc` to False: with two forwards a step it is needed {needed}.")
    # `gradient_checkpointing: true` makes the Trainer enable it once more, and there the host's default is reentrant
    own = training_args.gradient_checkpointing_kwargs or {}
    training_args.gradient_checkpointing_kwargs = {**own, "use_reentrant": False}
