"""Every `solopo_*` key of a recipe: its default, where the default comes from, and what is refused.

This is the one definition. The command line's help, the recipes and docs/keys.md derive from it or are tested
against it. Nothing of LLaMA-Factory is imported here.
"""

import inspect
import math
import re
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from .qa.files import did_you_mean

CHUNK = 1024  # tokens whose fp32 logits exist at a time; ours


@dataclass
class SoloArguments:
    """Declare what the step, its objective and its rows are set to; they join the host's `FinetuningArguments`.

    Attributes:
        solopo_alpha: Weight of the short-to-long alignment term, >= 0 (0 is the plain preference loss on the short
            pair). The paper uses 1 to 4. DPO sums log-probs and SimPO/ORPO average them, so the same alpha pulls very
            differently per token.
        solopo_align: What is kept equal between short and long context: the reward of the loss in use (SoLo-RA, the
            paper's form), the log-probability (SoLo-KL; mean per token for ipo, simpo and orpo, sum otherwise), or the
            whole distribution over the next token (`distill`), which given the short context is a constant teacher.
        solopo_align_on: Which responses are aligned: `chosen` (the paper's form), or `both` (also the rejected; a
            fourth sequence).
        solopo_penalty: The function s(t) of the gap t: `auto` is the one that belongs to the loss (2t^2 for ipo, |t|
            otherwise), `abs` |t|, `squared` t^2, `drop` only what the long context makes worse.
        solopo_detach_short: No gradient through the short side of the alignment term.
        solopo_objective: The objective: `solopo`, or on rows of the same columns `longpo` (arXiv:2502.13922) or
            `distill`, the alignment of that name alone, with `pref_ftx` times the NLL of the short chosen response.
        solopo_longpo_lambda: LongPO only: weight of the preference term; the NLL has weight 1. 0.01 is LongPO's.
        solopo_distill_kl: Self-distillation's divergence per token, averaged over the response: `forward`, KL from the
            distribution given the short context to that given the long one; `reverse`, the other way (OPSDL's,
            arXiv:2604.17535); `jsd`, Jensen-Shannon's.
        solopo_distill_temperature: Self-distillation: by which the logits of both sides are divided, > 0.
        solopo_distill_topk: Self-distillation: the teacher's likeliest words that are compared one by one, all others
            together as one; 0 compares all.
        solopo_anchor: Weight of the KL from the reference to the policy, >= 0: the mean over the chosen response's
            tokens given the short prompt (`both` adds the rejected one's), against losing what short contexts could do.
            Needs a reference in every loss: `ref_model`, or the model as it starts, without an adapter that is trained.
        solopo_forward: How a step runs: `packed`, all sequences of a micro-batch as one row without padding in one
            forward; `two_stage`, the short pair in one forward, then the long sequence in another; `auto`, packed where
            the model supports it.
        solopo_reference: The reference's log-probs (sigmoid, ipo, hinge, longpo): `cached`, scored once before training
            by the model as it starts, without an adapter that is trained, and kept on disk; no second model stays;
            `online`, a forward of the reference in every step.
        solopo_logp_chunk: Response tokens whose fp32 logits exist at a time, >= 1; smaller saves memory, and no result
            changes.
        solopo_mlp_chunk: Tokens that a layer's MLP takes at a time, each chunk recomputed in backward; 0 takes all. For
            lengths that do not fit otherwise: with checkpointing the MLP's intermediates are the largest part. Costs
            about one more forward of the MLPs per step. Dense models only.
        solopo_sequence_parallel: Processes, so GPUs of one machine, that share every packed row, each a part of its
            tokens: for rows longer than one GPU holds. Divides the number of processes and the model's attention heads;
            1 is off.
        solopo_overlength: A row longer than `cutoff_len`: stop with an `error`, or `drop` it (counted and reported).
            Never truncated.
    """

    solopo_alpha: float = 1.0
    solopo_align: Literal["reward", "logp", "distill"] = "reward"
    solopo_align_on: Literal["chosen", "both"] = "chosen"
    solopo_penalty: Literal["auto", "abs", "squared", "drop"] = "auto"
    solopo_detach_short: bool = False
    solopo_objective: Literal["solopo", "longpo", "distill"] = "solopo"
    solopo_longpo_lambda: float = 0.01
    solopo_distill_kl: Literal["forward", "reverse", "jsd"] = "forward"
    solopo_distill_temperature: float = 1.0
    solopo_distill_topk: int = 0
    solopo_anchor: float = 0.0
    solopo_forward: Literal["auto", "packed", "two_stage"] = "auto"
    solopo_reference: Literal["cached", "online"] = "cached"
    solopo_logp_chunk: int = CHUNK
    solopo_mlp_chunk: int = 0
    solopo_sequence_parallel: int = 1
    solopo_overlength: Literal["error", "drop"] = "error"

    @property
    def longpo(self) -> bool:
        """Return whether the objective is LongPO."""
        return self.solopo_objective == "longpo"

    @property
    def long_pair(self) -> bool:
        """Return whether the rejected response is scored behind the long prompt too."""
        return self.longpo or self.solopo_align_on == "both"

    @property
    def distills(self) -> bool:
        """Return whether the distribution given the short context teaches that given the long one."""
        return distills(self.solopo_objective, self.solopo_align)


FIELDS: dict[str, Any] = {f.name: f for f in fields(SoloArguments)}
for key, text in re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(SoloArguments) or "", re.MULTILINE):
    FIELDS[key].metadata = {"help": " ".join(text.split())}  # on the command line
OF_SIDES = ("solopo_penalty", "solopo_detach_short")  # of an alignment of two numbers
OF_DISTILL = ("solopo_distill_kl", "solopo_distill_temperature", "solopo_distill_topk")
OF_LONGPO = ("solopo_longpo_lambda",)
WITH_REFERENCE = ("sigmoid", "ipo", "hinge")  # values of `pref_loss`


def flags(words: list[str]) -> dict[str, str]:
    """Return the keys of a command line without a recipe, by name, with their values as text; `true` where none is."""
    found = {}
    for word, after in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name.replace("-", "_")] = value if equals else "true" if after.startswith("--") else after
    return found


def check_keys(keys) -> None:
    """Refuse a `solopo_*` key that does not exist and name the nearest one and all that do."""
    for key in keys:
        if key.startswith("solopo") and key not in FIELDS:
            near = did_you_mean(key, FIELDS, cutoff=0.8)
            raise ValueError(f"Unknown key `{key}` in the recipe. {near}Allowed: {', '.join(FIELDS)}.")


def number_fault(name: str, value: Any) -> str | None:
    """Say what is wrong with the value of a key that takes a finite number; None if nothing is."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return None
    how = "; write it without quotes, and with a point (`5.0e-6`)" * isinstance(value, str)  # YAML reads 5e-6 as text
    return f"`{name}` must be a number, got {value!r}{how}."


def check_values(args: SoloArguments) -> None:
    """Refuse a value of the wrong type or out of range; the message names key, value seen and what is allowed.

    Whole numbers are accepted for weights and become floats, as YAML writes `2` and `2.0` alike.
    """
    for name, spec in FIELDS.items():
        value, kind = getattr(args, name), spec.type
        if kind is float:
            good, needed = number_fault(name, value) is None and value >= 0, "a number >= 0,"
        elif kind is int:
            least = min(1, spec.default)  # 0 switches off what is off by default
            good, needed = type(value) is int and value >= least, f"a whole number >= {least},"  # true is an int
        elif kind is bool:
            good, needed = isinstance(value, bool), "true or false,"
        else:
            good, needed = value in get_args(kind), f"one of {', '.join(get_args(kind))};"
        if not good:
            raise ValueError(f"`{name}` must be {needed} got {value!r}.")
        setattr(args, name, float(value) if kind is float else value)


def distills(objective: str | None, align: str | None) -> bool:
    """Return whether a step teaches itself: `distill` is the objective, or the alignment of one that aligns."""
    return objective == "distill" or (objective != "longpo" and align == "distill")


def loss_refers(pref_loss: str, objective: str) -> bool:
    """Return whether the loss compares with a reference; the anchor asks for one besides."""
    return objective != "distill" and pref_loss in WITH_REFERENCE


def without_effect(args) -> dict[str, tuple[str, ...]]:
    """Return which keys a step does not read, by the key whose value is the reason."""
    if args.longpo:
        own = ("solopo_alpha", "solopo_align", "solopo_align_on", "solopo_anchor", *OF_SIDES, *OF_DISTILL)
        return {"solopo_objective": (*own, "pref_ftx", "dpo_label_smoothing")}
    if args.solopo_objective == "distill":
        own = ("solopo_alpha", *OF_SIDES, *OF_LONGPO, *(() if args.solopo_align == "distill" else ("solopo_align",)))
        return {"solopo_objective": (*own, "pref_loss", "pref_beta", "dpo_label_smoothing")}
    return {"solopo_objective": OF_LONGPO, "solopo_align": OF_SIDES if args.distills else OF_DISTILL}


def check_loss(args) -> None:
    """Refuse losses and host knobs that SoLoPO has no definition for.

    Args:
        args: The host's finetuning arguments with those of `SoloArguments`.
    """
    from .losses import PO_LOSSES  # torch, which the start hook must do without

    if args.pref_loss not in tuple(PO_LOSSES):  # a recipe's list has no hash
        raise ValueError(
            f"`pref_loss` must be one of {', '.join(PO_LOSSES)} for `stage: solopo`; got {args.pref_loss!r}."
        )
    if args.longpo and args.pref_loss != "sigmoid":
        raise ValueError(f"`solopo_objective: longpo` is a DPO loss: set `pref_loss: sigmoid`, got {args.pref_loss!r}.")
    for reason, names in without_effect(args).items():
        why = f"with `{reason}: {getattr(args, reason)}`"
        for name in names:
            value, default = getattr(args, name), args.__dataclass_fields__[name].default
            if value != default:
                raise ValueError(f"`{name}: {value}` has no effect {why}; remove it, or set it to {default}.")
    for name in ("solopo_distill_temperature", "pref_beta"):
        if not 0 < getattr(args, name) < math.inf:
            raise ValueError(f"`{name}` must be > 0, got {getattr(args, name)!r}.")
    if not 0 <= args.pref_ftx < math.inf:
        raise ValueError(f"`pref_ftx` must be >= 0, got {args.pref_ftx!r}.")
    if not 0 <= args.dpo_label_smoothing < 0.5:
        raise ValueError(f"`dpo_label_smoothing` must be in [0, 0.5), got {args.dpo_label_smoothing!r}.")
