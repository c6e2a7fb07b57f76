"""Seam 1: the recipe's keys. `llamafactory.hparams.parser` learns the `solopo_*` keys and `stage: solopo`.

What: its lists of dataclasses get our subclass of `FinetuningArguments`; three functions are wrapped.
Why: there is no registry of stages or arguments, and unknown keys raise. Host: 0.9.5.
"""

import json
import sys
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from omegaconf import OmegaConf

from .. import args as solo
from .versions import expect_signature


def with_solo(host: type) -> type:
    """The host's `FinetuningArguments` with ours; what the host asks of `stage: dpo` is asked of `solopo` too."""
    spec, stages = host.__dataclass_fields__["stage"], get_args(get_type_hints(host)["stage"])

    @dataclass
    class SoloFinetuningArguments(solo.SoloArguments, host):
        stage: Literal[(*stages, "solopo")] = field(default=spec.default, metadata=dict(spec.metadata))

        def __post_init__(self):
            if self.stage != "solopo":
                return super().__post_init__()
            solo.check_values(self)
            solo.check_loss(self)
            self.stage = "dpo"  # the host tests stages by name: its rules for DPO (reference, PiSSA, smoothing) hold
            try:
                super().__post_init__()
            finally:
                self.stage = "solopo"

        def to_dict(self) -> dict[str, Any]:
            """As the host's, for experiment trackers; other stages report what they report without the plugin."""
            own = super().to_dict()
            return own if self.stage == "solopo" else {k: v for k, v in own.items() if k not in solo.FIELDS}

    return SoloFinetuningArguments


def apply(parser) -> None:
    """Patch `llamafactory.hparams.parser` right after its import."""
    expect_signature(parser, "_parse_train_args", ("args",))
    expect_signature(parser, "read_args", ("args",))
    expect_signature(parser, "get_train_args", ("args",))
    host, ours = parser.FinetuningArguments, with_solo(parser.FinetuningArguments)
    for arguments in (parser._TRAIN_ARGS, parser._INFER_ARGS, parser._EVAL_ARGS, parser._TRAIN_MCA_ARGS):
        arguments[:] = [ours if a is host else a for a in arguments]
    parser.read_args = _reading_json(parser.read_args)
    parser._parse_train_args = _checking_keys(parser._parse_train_args, parser)
    parser.get_train_args = _checking_recipe(parser.get_train_args)


def _reading_json(read_args):
    """A JSON recipe: the host passes the path, not the file, to `json.load` and dies with an AttributeError."""

    @wraps(read_args)
    def wrapper(args=None):
        if args is None and len(sys.argv) > 1 and sys.argv[1].endswith(".json"):
            recipe = OmegaConf.create(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
            return OmegaConf.to_container(OmegaConf.merge(recipe, OmegaConf.from_cli(sys.argv[2:])))
        return read_args(args)

    return wrapper


def _checking_keys(parse_train_args, parser):
    """Refuse misspelt `solopo_*` keys with the allowed ones, and ours in a stage that would ignore them."""

    @wraps(parse_train_args)
    def wrapper(args=None):
        args = parser.read_args(args)
        if isinstance(args, dict):
            keys, stage = list(args), args.get("stage")
        else:
            keys = [a[2:].split("=")[0].replace("-", "_") for a in args if a.startswith("--")]
            stage = dict(zip(args, args[1:], strict=False)).get("--stage") or next(
                (a[8:] for a in args if a.startswith("--stage=")), None
            )
        ours = [k for k in keys if k.startswith("solopo")]
        solo.check_keys(ours)
        if ours and stage != "solopo":
            raise ValueError(f"`{ours[0]}` has no effect in `stage: {stage}`; set `stage: solopo` or remove the key.")
        return parse_train_args(args)

    return wrapper


def check_recipe(model_args, data_args, finetuning_args) -> None:
    """Refuse host features that would change or bypass the step, before anything is loaded."""
    refused = {
        "use_mca": (finetuning_args.use_mca, "it has its own trainer (unset USE_MCA)"),
        "use_unsloth": (model_args.use_unsloth, "it replaces the model's forward"),
        "use_kt": (model_args.use_kt, "it replaces the model's forward"),
        "shift_attn": (model_args.shift_attn, "short and long sequences would attend differently"),
        "mixture_of_depths": (model_args.mixture_of_depths, "tokens of the response could skip layers"),
        "packing": (data_args.packing, "rows of pairs cannot be packed by the host"),
    }
    if data_args.streaming and finetuning_args.solopo_overlength == "drop":
        raise ValueError("`solopo_overlength: drop` cannot count what it drops from a stream; set `streaming: false`.")
    for key, (value, reason) in refused.items():
        if value:
            raise ValueError(f"`{key}: {value}` does not work with `stage: solopo`: {reason}; remove it.")


def _checking_recipe(get_train_args):
    @wraps(get_train_args)
    def wrapper(args=None):
        parsed = model_args, data_args, _, finetuning_args, _ = get_train_args(args)
        if finetuning_args.stage == "solopo":
            check_recipe(model_args, data_args, finetuning_args)
        return parsed

    return wrapper
