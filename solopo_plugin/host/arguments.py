"""Seam 1 (docs/seams.md): `llamafactory.hparams.parser` learns the `solopo_*` keys and `stage: solopo`."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from .. import args as solo
from .versions import wrap

LAYERWISE = (
    "the layers' optimizers keep the full `learning_rate`, without warm-up or decay, and a resume loses their state "
    "(`use_galore` or `use_apollo` with `optim: adamw_torch` keeps both)"
)
REFUSED = {  # keys of the host that would change or bypass the step, unless they are off
    "use_mca": "it has its own trainer (unset USE_MCA)",
    "use_unsloth": "it replaces the model's forward",
    "use_kt": "it replaces the model's forward",
    "use_liger_kernel": "it undoes `solopo_mlp_chunk` and comes after the reference, as `enable_liger_kernel` does not",
    "shift_attn": "short and long sequences would attend differently",
    "mixture_of_depths": "tokens of the response could skip layers",
    "export_quantization_bit": "it quantizes what is trained",
    "rope_scaling": "it does nothing, or fails with transformers 5; config.json takes one (docs/training.md, "
    '"Rows longer than one GPU")',
    "packing": "rows of pairs cannot be packed by the host",
    "neftune_noise_alpha": "its noise depends on the length of what runs as one row, so the short and the long context "
    "get different noise and the alignment is trained on the difference",
    "galore_layerwise": LAYERWISE,
    "apollo_layerwise": LAYERWISE,
    "dispatch_batches": "one process cannot cut the others' part from a packed row or from rows of different lengths",
}
# Keys that the host's preference trainer, or ours, never reads: they would be taken and change nothing. Why -> which;
# their defaults may stand in a recipe.
UNREAD = {
    "dropout is off in preference training, as in the host's DPO": "lora_dropout module_dropout",
    "the stage has `dpo_label_smoothing`": "label_smoothing_factor",
    "padding never counts": "ignore_pad_token_for_loss",
    "the router's auxiliary loss is no part of a step": "moe_aux_loss_coef",
    "the short and the long context count alike": "ld_alpha",
    "BCO's term is not defined for the stage": "pref_bco_weight",
    "the host's preference trainer has no FP8": "fp8_enable_fsdp_float8_all_gather fp8 fp8_backend",
    "`train_sampling_strategy: group_by_length` measures the rows": "length_column_name sortish_sampler",
    "the stage generates nothing": "do_predict eval_num_beams generation_num_beams generation_config do_sample "
    "temperature top_p top_k num_beams max_length max_new_tokens repetition_penalty length_penalty skip_special_tokens",
    "it is for `stage: sft`": "compute_accuracy use_dft_loss use_asft_loss asft_alpha use_eaft_loss eaft_alpha "
    "use_hyper_parallel hyper_parallel_args",
    "it is for `stage: kto`": "kto_chosen_weight kto_rejected_weight",
    "it is for `stage: ppo`": "ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards reward_model "
    "reward_model_adapters reward_model_quantization_bit reward_model_type",
}
LOWER = ("solopo/nll", "solopo/reward_gap", "solopo/anchor_kl", "logps/rejected", "rewards/rejected")  # is better
PURE_BF16_LR = 1e-4  # about the step of a bf16 weight of 0.02, below which updates are lost; ours
NUMBERS = (int, float, int | None, float | None)  # types of keys
TEXTS = ("adapter_name_or_path", "add_tokens", "add_special_tokens", "ref_model_adapters")  # which the host splits
ORDERS = ("random", "sequential", "group_by_length")  # the Trainer takes any other `train_sampling_strategy` for random


def with_solo(host: type[Any]) -> type:
    """Return the host's `FinetuningArguments` with ours; `solopo` is asked what the host asks of `stage: dpo`."""
    stages, spec = get_args(get_type_hints(host)["stage"]), host.__dataclass_fields__["stage"]
    as_the_hosts = field(default=spec.default, metadata=dict(spec.metadata))

    @dataclass
    class SoloFinetuningArguments(solo.SoloArguments, host):
        # the ignore: a checker does not know what a list of the host holds
        stage: Literal[(*stages, "solopo")] = as_the_hosts  # type: ignore[valid-type]

        def __post_init__(self):
            if self.stage != "solopo":
                return super().__post_init__()
            solo.check_values(self)
            solo.check_loss(self)
            pissa = self.pissa_init  # the host's rule for it goes by `pref_loss` alone: below are ours
            # DPO's rules (reference, smoothing) hold; the host knows stages by name
            self.__dict__.update(stage="dpo", pissa_init=False)
            super().__post_init__()
            self.__dict__.update(stage="solopo", pissa_init=pissa)
            self.use_ref_model = solo.loss_refers(self.pref_loss, self.solopo_objective) or self.solopo_anchor > 0
            if pissa and self.finetuning_type != "lora":
                raise ValueError("`pissa_init` is only valid for LoRA training.")
            if pissa and self.use_ref_model and self.ref_model is None:
                raise ValueError(
                    "`pissa_init: true` changes the reference's weights; set `ref_model` to the model before training."
                )

        def to_dict(self) -> dict[str, Any]:
            """Return the host's, for experiment trackers; other stages report what they report without the plugin."""
            own = super().to_dict()
            return own if self.stage == "solopo" else {k: v for k, v in own.items() if k not in solo.FIELDS}

    return SoloFinetuningArguments


def apply(parser) -> None:
    """Patch `llamafactory.hparams.parser` right after its import."""
    host, ours = parser.FinetuningArguments, with_solo(parser.FinetuningArguments)
    wrap(
        (parser, "read_args", ("args",), _reading_json),
        (parser, "_parse_train_args", ("args",), partial(_checking_keys, parser)),
        (parser, "get_train_args", ("args",), _checking_recipe),
    )
    for arguments in (parser._TRAIN_ARGS, parser._INFER_ARGS, parser._EVAL_ARGS, parser._TRAIN_MCA_ARGS):
        arguments[:] = [ours if part is host else part for part in arguments]


def _reading_json(read_args, args=None):
    """Read a JSON recipe: the host passes the path, not the file, to `json.load` and dies with an AttributeError."""
    if args is None and len(sys.argv) > 1 and sys.argv[1].endswith(".json"):
        from omegaconf import OmegaConf  # here: scripts/plan.py takes from this file, and has no such package

        recipe = OmegaConf.create(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
        return OmegaConf.to_container(OmegaConf.merge(recipe, OmegaConf.from_cli(sys.argv[2:])))
    return read_args(args)


def _checking_keys(parser, parse_train_args, args=None):
    """Refuse misspelt `solopo_*` keys with the allowed ones, and ours in a stage that would ignore them."""
    args = parser.read_args(args)
    recipe = args if isinstance(args, dict) else solo.flags(args)
    stage, ours = recipe.get("stage"), [key for key in recipe if key.startswith("solopo")]
    solo.check_keys(ours)
    check_best_direction(recipe)
    if stage == "solopo" and recipe is args:  # of flags the host reads texts
        check_kinds(recipe)
    if ours and stage != "solopo":
        raise ValueError(f"`{ours[0]}` has no effect in `stage: {stage}`; set `stage: solopo` or remove the key.")
    parsed = parse_train_args(args)
    if stage == "solopo":  # what is mapped over rows is given the host's data arguments alone
        parsed[1].solopo_overlength = parsed[3].solopo_overlength
    return parsed


def check_best_direction(recipe: dict) -> None:
    """Refuse a metric that is better when lower where the recipe does not say so.

    Whether an evaluation gives it is `check_best_exists`'s, in workflow.py, which knows the data sets.
    """
    best = str(recipe.get("metric_for_best_model"))
    if recipe.get("stage") == "solopo" and best.endswith(LOWER) and recipe.get("greater_is_better") is None:
        raise ValueError(
            f"`metric_for_best_model: {best}` is better when lower, and the host would keep the checkpoint with "
            "the highest; set `greater_is_better: false`."
        )


def check_kinds(recipe: dict) -> None:
    """Refuse what is no number, or a list, where a key of the host takes none: it ends in a traceback, maybe late."""
    from llamafactory.hparams.parser import _TRAIN_ARGS

    # the last part is of generation, and of two keys a fraction works
    kinds = {key: kind for part in _TRAIN_ARGS[:-1] for key, kind in get_type_hints(part).items() if kind in NUMBERS}
    for key in [key for key in recipe if key in kinds and key not in (*solo.FIELDS, "lora_alpha", "ddp_timeout")]:
        if not isinstance(value := recipe[key], kinds[key] | int) or value != value:
            raise ValueError(solo.number_fault(key, value) or f"`{key}` must be a whole number, got {value!r}.")
    if key := next((key for key in TEXTS if isinstance(recipe.get(key), list)), None):
        raise ValueError(f"`{key}` must be one text, with commas between several, got {recipe[key]}.")


def refusals_of_keys(given: Callable[[str], Any]) -> Iterator[str]:
    """Yield a sentence for each key of the host that the stage refuses; `given` looks a key up."""
    for key, reason in REFUSED.items():
        if value := given(key):
            yield f"`{key}: {value}` does not work with `stage: solopo`: {reason}; remove it."


def check_recipe(given: Callable[[str], Any], finetuning_args) -> None:
    """Refuse what would change or bypass the step, and what would have no effect on it, before anything is loaded.

    `given` returns the value of a key of the host or of ours, None where there is none.
    """
    if sentence := next(_faults(given, finetuning_args), None):
        raise ValueError(sentence)
    warn_of_rounding(given, finetuning_args)


def _faults(given: Callable[[str], Any], args) -> Iterator[str]:
    from llamafactory.hparams.parser import _TRAIN_ARGS

    yield from refusals_of_keys(given)
    if given("do_train") is given("do_eval") is False and not given("do_predict"):
        yield "There is nothing to do: set `do_train: true` or `do_eval: true`."
    if sentence := solo.number_fault("learning_rate", given("learning_rate")):
        yield sentence
    for key in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if (size := given(key)) is not None and (type(size) is not int or size < 1):  # the board may leave it out
            yield f"`{key}` must be a whole number >= 1, got {size!r}."
    if given("even_batches") is False and (given("world_size") or 1) > 1:
        yield "`even_batches: False` gives processes unequal shares, and one waits for another in vain; remove it."
    if given("mix_strategy") == "interleave_once":
        yield "`mix_strategy: interleave_once` needs a newer `datasets` than the host takes; set another strategy."
    if given("streaming"):
        yield from _of_a_stream(given)
    if given("train_from_scratch") and args.use_ref_model and args.ref_model is not None:
        yield (
            f"`train_from_scratch: true` would draw the weights of `ref_model: {args.ref_model}` too, not read them; "
            "remove one of the two."
        )
    if given("do_train"):
        yield from _of_training(given, args)
    if args.solopo_sequence_parallel > 1:
        yield from _of_shared_rows(given, args.solopo_sequence_parallel)
    strategy = given("train_sampling_strategy")  # None in older transformers, which have `group_by_length: true`
    if strategy not in (None, *ORDERS):
        yield f"`train_sampling_strategy` must be one of {', '.join(ORDERS)}; got {strategy!r}."
    known = {name: spec.default for part in _TRAIN_ARGS for name, spec in part.__dataclass_fields__.items()}
    for reason, keys in _unread(given, args).items():
        for key, default in ((key, known.get(key)) for key in keys.split()):
            if given(key) not in (None, default):
                off = "" if default is None else f", or set it to {default}"
                yield f"`{key}: {given(key)}` has no effect in `stage: solopo`: {reason}; remove it{off}."


def _of_a_stream(given: Callable[[str], Any]) -> Iterator[str]:
    if given("solopo_overlength") == "drop":
        yield "`solopo_overlength: drop` cannot count what it drops from a stream; set `streaming: false`."
    if given("val_size"):
        yield (
            f"`val_size: {given('val_size'):g}` does not work with `streaming: true`: the host shuffles anew for each "
            "pass, and from the second on it trains on rows that it validates on; set `eval_dataset`, or "
            "`streaming: false`."
        )


def _of_training(given: Callable[[str], Any], args) -> Iterator[str]:
    optim, schedule = (str(getattr(of := given(key), "value", of)) for key in ("optim", "lr_scheduler_type"))
    if "layerwise" in optim:
        yield f"`optim: {optim}` does not work with `stage: solopo`: {LAYERWISE}; remove it."
    ratio = "badam_mode: ratio" if args.use_badam and args.badam_mode == "ratio" else None
    unfused = next((key for key in ("use_galore", "use_apollo") if given(key)), ratio)
    if unfused and optim == "adamw_torch_fused":
        yield f"`{unfused}` does not run with the host's default `optim: adamw_torch_fused`; set `optim: adamw_torch`."
    if given("disable_gradient_checkpointing") and given("gradient_checkpointing"):
        yield "`gradient_checkpointing: true` undoes `disable_gradient_checkpointing: true`; remove one of the two."
    # on the board there is no mode: transformers fills `greater_is_better` in
    mode, metric = {True: "max", False: "min"}.get(given("greater_is_better")), given("metric_for_best_model")
    by_metric = mode and schedule in ("reduce_lr_on_plateau", "greedy")
    if by_metric and (given("lr_scheduler_kwargs") or {}).get("mode", "min") != mode:
        yield f"`{schedule}` takes a better `{metric}` for a worse one; set `lr_scheduler_kwargs: {{mode: {mode}}}`."
    if (given("max_steps") or -1) <= 0 and (epochs := given("num_train_epochs")) is not None and epochs <= 0:
        yield f"`num_train_epochs: {epochs}` takes no step, and the model is saved as it was; set it above 0."
    if (steps := args.early_stopping_steps) is not None:
        loss = "`NAME_loss`, with the name of a data set" if given("eval_on_each_dataset") else "`loss`"
        needs = {
            f"`metric_for_best_model` (such as {loss})": metric or given("load_best_model_at_end"),
            "`eval_strategy`": given("eval_strategy") not in (None, "no"),
            "`eval_dataset` or `val_size`": given("eval_dataset") or given("val_size") or given("tokenized_path"),
        }
        if missing := [key for key, there in needs.items() if not there]:
            yield f"`early_stopping_steps: {steps}` needs a metric to watch: set {' and '.join(missing)}."
    if given("quantization_bit") == 4 and given("quantization_method") == "bnb" and _on_cpu(given):
        yield (
            "`quantization_bit: 4` does not train on a CPU: bitsandbytes packs the weights anew when it first "
            "evaluates, and part of the gradient is lost; set `quantization_bit: 8`, or train on a GPU."
        )


def _on_cpu(given: Callable[[str], Any]) -> bool:
    from llamafactory.extras.misc import get_device_count

    if (device := given("device")) is None:  # on the board, where transformers has not chosen one
        return bool(given("use_cpu")) or not get_device_count()
    return str(device) == "cpu"


def _of_shared_rows(given: Callable[[str], Any], size: int) -> Iterator[str]:
    from llamafactory.extras.misc import is_env_enabled

    alone = {
        "solopo_forward: two_stage": (given("solopo_forward") == "two_stage", "only a packed row can be shared"),
        "streaming: true": (given("streaming"), "streams are dealt out to single processes"),
        "fsdp": (given("fsdp") or is_env_enabled("ACCELERATE_USE_FSDP"), "use DeepSpeed ZeRO-3"),
    }
    for key, (asked, reason) in alone.items():
        if asked:
            yield f"`solopo_sequence_parallel: {size}` does not run with `{key}`: {reason}; remove one of the two."


def _unread(given: Callable[[str], Any], args) -> dict[str, str]:
    """Add to `UNREAD` what this recipe does not read."""
    unread = dict(UNREAD)
    if given("streaming"):
        unread["the host shuffles a stream by `buffer_size`"] = "disable_shuffling train_sampling_strategy"
        unread["a stream has no length"] = "include_effective_tokens_per_second"
    if given("fp16") and _on_cpu(given) and not given("deepspeed"):
        unread["a CPU computes in fp32"] = "fp16"
    if args.disable_shuffling and given("train_sampling_strategy") == "group_by_length":
        unread["`disable_shuffling` already keeps the rows' order"] = "train_sampling_strategy"
    if args.pref_loss != "simpo":
        unread["it is for `pref_loss: simpo`"] = "simpo_gamma"
    if not args.use_ref_model:
        loss = "solopo_objective" if args.solopo_objective == "distill" else "pref_loss"
        unread[f"`{loss}: {getattr(args, loss)}` has no reference"] = "ref_model solopo_reference"
    if args.ref_model is None:
        unread["there is no `ref_model`"] = "ref_model_adapters ref_model_quantization_bit"
    return unread


def warn_of_rounding(given: Callable[[str], Any], finetuning_args) -> None:
    """Warn of weights in 16 bits at a learning rate whose updates are mostly rounded away."""
    from llamafactory.extras import logging

    rate, trains_weights = given("learning_rate"), finetuning_args.finetuning_type in ("full", "freeze")
    if given("do_train") and finetuning_args.pure_bf16 and trains_weights and rate < PURE_BF16_LR:
        logging.get_logger(f"llamafactory.{__name__}").warning_rank0(
            f"`pure_bf16: true` rounds most of AdamW's updates away at `learning_rate: {rate}` (docs/training.md); "
            "set `bf16: true`, with `deepspeed` where memory is short, or train LoRA."
        )


def _checking_recipe(get_train_args, args=None):
    parsed = get_train_args(args)
    if parsed[3].stage == "solopo":
        groups = (*parsed, parsed[2].accelerator_config)
        check_recipe(lambda key: next((getattr(g, key) for g in groups if hasattr(g, key)), None), parsed[3])
    return parsed
