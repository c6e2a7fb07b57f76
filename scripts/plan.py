"""Plan a run before it is started: does it fit, how long may the prompt be, how fast is it against the host's DPO.

    python scripts/plan.py --model qwen2.5-7b --long 16384 --gpus 4 --gpu-memory 80
    python scripts/plan.py --recipe examples/yaml/qwen2.5-7b/solo_dpo.yaml --gpus 4 --gpu-memory 80 cutoff_len=18432

The first line answers for the recipe as it will run; tokens, FLOPs and memory of a step by part stand below. Where
docs/benchmarks/gpu.json is there, the answer is calibrated by it. All else are predictions of step_cost.py, not
measurements: a "longest" is an upper bound, or it is said to be none, and ratios between configurations are surer than
either side. GB are 1e9 bytes. S, L, R: tokens of the short prompt, the long prompt, a response.
"""

import argparse
import json
import os
import sys
from copy import deepcopy
from dataclasses import dataclass, replace
from math import ceil, inf
from pathlib import Path
from typing import Any, NamedTuple

from step_cost import (
    COUNTED,
    MODELS,
    OPTIMIZERS,
    OTHERS,
    PACKED,
    VARIANTS,
    Setup,
    Shape,
    count,
    exchanged,
    host_memory,
    longest,
    on_meta,
    peak,
    read_config,
    setup_of,
    shape_of,
    step_flops,
    step_memory,
)  # fmt: skip

from solopo_plugin.args import FIELDS, SoloArguments, check_keys, check_values, distills, number_fault
from solopo_plugin.host.arguments import PURE_BF16_LR
from solopo_plugin.qa.recipe import read_values
from solopo_plugin.qa.window import window_of

ROOT = Path(__file__).parent.parent
CUTOFF, LEARNING_RATE = 2048, 5e-5  # the host's defaults of `cutoff_len` and `learning_rate`
GPU_JSON = ROOT / "docs/benchmarks/gpu.json"
WHOLLY = ("additional_target", "resize_vocab", "add_tokens", "add_special_tokens", "new_special_tokens_config")
OTHER_STATES = ("use_dora", "use_galore", "use_apollo", "use_badam")  # other weights or optimizer states than planned
WHOLE = ("per_device_train_batch_size", "gradient_accumulation_steps", "cutoff_len", "lora_rank")  # numbers of the host
HOSTS_REFERENCE = ("V0", "S0", "S1")  # run it in every step
TOGETHER = (1, 2, 4, 8)  # GPUs that are proposed to share a row, as machines have them; ours
LINKS = {"an A100's NVLink": 300e9, "PCIe 4": 25e9}  # bytes a second each way, about
ATTENTION = {"fa2": "flash_attention_2", "disabled": "eager"}  # the host's `flash_attn`, else SDPA


# ---- a recipe


def read_recipe(path: str | Path, gpus: int, overrides: list[str] | None = None) -> tuple[dict, Setup]:
    """Read a recipe's keys, and what they mean for memory by the host's rules for precision.

    Under DeepSpeed and with `pure_bf16` the weights are bf16; otherwise the host keeps what is trained in fp32, and
    autocast adds a bf16 copy. ZeRO stage and offload are read from the file that `deepspeed` names; several GPUs
    without one are DDP's, whose buckets hold the gradients once more.
    """
    recipe = read_values(str(path), overrides)
    if recipe.get("stage") not in ("sft", "dpo", "solopo") or recipe.get("fsdp"):
        raise ValueError(f"{path}: only recipes of `stage: solopo`, `dpo` and `sft`, without FSDP, can be planned.")
    if recipe.get("rope_scaling"):
        raise ValueError(f"{path}: `rope_scaling` is not planned; put it into the model's config.json, which is.")
    check_keys(recipe)
    check_values(SoloArguments(**{name: recipe[name] for name in FIELDS if name in recipe}))
    tuning, optim = recipe.get("finetuning_type", "lora"), recipe.get("optim", "adamw_torch_fused")
    if tuning not in ("full", "lora") or optim not in OPTIMIZERS:
        raise ValueError(f"{path}: only full and lora, with {', '.join(OPTIMIZERS)}; got {tuning}, {optim}.")
    whole = {key: recipe[key] for key in WHOLE if key in recipe}
    for key, value in (whole | {"quantization_bit": recipe.get("quantization_bit") or 1}).items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{path}: `{key}` must be a whole number >= 1, got {value!r}.")
    if fault := number_fault("learning_rate", recipe.get("learning_rate", LEARNING_RATE)):
        raise ValueError(f"{path}: {fault}")
    for key in OTHER_STATES:
        if recipe.get(key):
            raise ValueError(f"{path}: `{key}` changes what is kept in memory, which is not planned; plan without it.")
    for key in WHOLLY:
        if tuning == "lora" and recipe.get(key):
            raise ValueError(
                f"{path}: `{key}` trains whole modules, which is not planned; plan without it, and add their weights, "
                "gradients and optimizer."
            )
    deepspeed = recipe.get("deepspeed") or {}
    if isinstance(deepspeed, str):
        here = Path(deepspeed)  # below the current folder, as in training; else below this repository
        here = here if here.is_file() else ROOT / here
        try:
            deepspeed = json.loads(here.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{path}: `deepspeed: {deepspeed}` is no JSON ({error}); name a file of examples."
            ) from None
    zero = deepspeed.get("zero_optimization", {})
    offload = [zero.get(f"offload_{part}", {}).get("device", "none") != "none" for part in ("optimizer", "param")]
    pure, half = recipe.get("pure_bf16", False), recipe.get("bf16", False) or recipe.get("fp16", False)
    low, element = bool(deepspeed and half) or pure, 2 if half or pure else 4
    states = OPTIMIZERS[optim] / (2 if pure and not optim.endswith("8bit") else 1)
    shared = recipe.get("solopo_sequence_parallel", FIELDS["solopo_sequence_parallel"].default)
    taught = distills(recipe.get("solopo_objective"), recipe.get("solopo_align"))
    return recipe, Setup(
        gpus, zero.get("stage", 0), *offload, float(zero.get("stage3_max_live_parameters", 1e9)),
        recipe.get("lora_rank", 8) if tuning == "lora" else 0,
        frozen=(recipe.get("quantization_bit") or 8 * element) / 8, weights=2 if low else 4 + 2 * half,
        gradients=(2 if low else 4) * (2 if gpus > 1 and not deepspeed else 1),
        optimizer=states + (4 if low and not pure else 0), element=element,
        checkpointing=not recipe.get("disable_gradient_checkpointing", False),
        chunk=recipe.get("solopo_logp_chunk", FIELDS["solopo_logp_chunk"].default),
        mlp_chunk=recipe.get("solopo_mlp_chunk", FIELDS["solopo_mlp_chunk"].default),
        batch=recipe.get("per_device_train_batch_size", 8), both=recipe.get("solopo_align_on") == "both",
        divergences=taught + bool(recipe.get("solopo_anchor")), sequence_parallel=shared,
    )  # fmt: skip


def references_of(recipe: dict) -> dict[str, str | None]:
    """Return each variant's reference: `online`, `cached`, or None where stage or loss has none."""
    alone = recipe.get("pref_loss", "sigmoid") in ("orpo", "simpo") or recipe.get("solopo_objective") == "distill"
    plain = recipe.get("stage") == "sft" or (alone and not recipe.get("solopo_anchor"))
    ours = recipe.get("solopo_reference", FIELDS["solopo_reference"].default)
    return {
        v: None if plain or v == "SFT" else "online" if v in HOSTS_REFERENCE else ours for v in (*VARIANTS, *OTHERS)
    }


def how_it_runs(config, recipe: dict, setup: Setup) -> tuple[str, str]:
    """Return the variant that a recipe runs, and a sentence: its form, why, and the kernel of its attention."""
    import torch

    from solopo_plugin.attention import IN_WORDS, how_a_step_runs, why_two_stages

    stage, attention = recipe.get("stage", "solopo"), ATTENTION.get(recipe.get("flash_attn"), "sdpa")
    forward = recipe.get("solopo_forward", FIELDS["solopo_forward"].default)
    if stage != "solopo":
        form = "the padded pair" if stage == "dpo" else "one padded sequence a row"
        variant, sentence = "V0" if stage == "dpo" else "SFT", f"A step is the host's `stage: {stage}`: {form}, "
        sentence += f"fp32 logits of every position; attention: {IN_WORDS.get(attention, attention)}."
    else:
        model, longpo = on_meta(deepcopy(config)), recipe.get("solopo_objective") == "longpo"
        model.config._attn_implementation = attention
        why = why_two_stages(forward, model)
        dtype = torch.bfloat16 if setup.element == 2 else torch.float32
        sentence = how_a_step_runs(model, why, torch.device("cuda"), dtype, (8, 0))  # a GPU since Ampere
        variant = ("L2" if longpo else "S2") if why else ("L3" if longpo else "S3")
    if variant in ("S3", "L3"):
        sentence += f" Packed, since `solopo_forward` is {forward} and {config.model_type} is among the tested models."
    elif attention == ATTENTION["fa2"]:
        sentence += " Without the flash-attn package it is SDPA."
    return variant, sentence


class Measured(NamedTuple):
    """Hold what a GPU did in one configuration, beside the arithmetic for it."""

    length: int  # tokens of the long prompt
    flops: float  # counted FLOPs per second
    memory: float | None  # measured activations over the predicted ones, None of full fine-tuning


def measurements(document: dict, tuning: str, L: int, references: dict) -> dict[str, Measured]:
    """Pick for each variant the configuration measured nearest to L tokens; of equals, the one with a reference.

    Args:
        document: As scripts/gpu and benchmark_step.py write it: `settings`, and `runs` with `variant`, `tuning`,
            `reference`, `length`, `trial`, `status`, `median_s` (seconds a step) and `peak` (bytes allocated at most).
        tuning: `lora` or `full`; the other's measurements say nothing about it.
        L: Tokens of the long prompt.
        references: Of every variant, as `references_of` gives them.
    """
    from transformers import AutoConfig

    settings = document["settings"]
    shape, setup = shape_of(AutoConfig.for_model(**settings["model"])), setup_of(settings, tuning)

    def measured(run: dict) -> Measured:
        step = shape, run["variant"], settings["short"], settings["response"], run["length"], run["reference"]
        flops = sum(step_flops(*step, setup.checkpointing, tuning == "lora").values())
        parts = step_memory(*step, setup)
        state, whole = peak(parts, 0), peak(parts)
        # in full fine-tuning gradients as large as this take turns with the activations of the only micro-batch
        memory = (run["peak"] - state) / (whole - state) if tuning == "lora" else None
        return Measured(run["length"], flops / run["median_s"], memory)

    wanted = {"tuning": tuning, "status": "ok", "trial": False}  # a trial's only step is a warm-up
    runs = [r for r in document["runs"].values() if wanted.items() <= r.items() and r["variant"] in references]
    nearest = {}
    for run in sorted(runs, key=lambda r: (abs(r["length"] - L), r["reference"] != references[r["variant"]])):
        nearest.setdefault(run["variant"], run)
    return {variant: measured(run) for variant, run in nearest.items()}


def calibration(tuning: str, L: int, references: dict) -> tuple[dict[str, Measured], str]:
    """Read the measurements of `GPU_JSON`, and say in a sentence what the answer rests on."""
    name = GPU_JSON.relative_to(ROOT) if GPU_JSON.is_relative_to(ROOT) else GPU_JSON
    if not GPU_JSON.exists():
        return {}, "Basis: arithmetic; nothing was measured on a GPU. Real peaks lie above it."
    try:
        document = json.loads(GPU_JSON.read_text(encoding="utf-8"))
        seen = {} if document.get("dry") else measurements(document, tuning, L, references)
        card = f"{document['hardware']['device']}, {document['date']}"
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return {}, f"Basis: arithmetic; {name} cannot be used ({type(error).__name__}: {error})."
    if not seen:
        return {}, f"Basis: arithmetic; {name} has no measurement of {tuning} fine-tuning on a GPU."
    each = [
        f"{variant} at {m.length:,} tokens {m.flops / 1e12:.0f} TFLOP/s"
        + (f" and {m.memory:.2f} times the predicted activations" if m.memory else "")
        for variant, m in sorted(seen.items())
    ]
    said = f"Basis: arithmetic, calibrated by {name} ({card}) where that has the same: {'; '.join(each)}."
    return seen, said + " Memory of full fine-tuning is not calibrated." * (tuning == "full")


def gb(size: float) -> str:
    """Write bytes in words."""
    return f"{size / 1e9:.1f} GB"


# ---- a row that several GPUs share


def sharings(shape: Shape, setup: Setup) -> dict[int, Setup]:
    """Return how many GPUs of one machine can share a row, and the setup for each, on as many GPUs as it needs."""
    counts = {n for n in TOGETHER if shape.heads % n == 0} | {setup.sequence_parallel}
    return {n: replace(setup, sequence_parallel=n, gpus=ceil(setup.gpus / n) * n) for n in sorted(counts)}


def check_sharing(shape: Shape, variant: str, setup: Setup, nodes: int) -> None:
    """Refuse a `solopo_sequence_parallel` that the model, the GPUs of a machine or the form of the step cannot have."""
    from solopo_plugin.sequence_parallel import why_not_shared  # torch, which --help does without

    shared = setup.sequence_parallel
    if shared > 1 and variant not in PACKED:
        raise ValueError(f"`solopo_sequence_parallel: {shared}` shares a packed row, and this recipe runs none; set 1.")
    if reason := why_not_shared(shared, shape.heads, setup.gpus // nodes):
        raise ValueError(reason)


def shared_row(variant: str, lengths: tuple[int, int, int], setup: Setup) -> tuple[int, int]:
    """Return the tokens of a micro-batch's row, and how often a step passes over a layer."""
    return setup.batch * count(variant, *lengths, setup.both, setup.rejected)[0], 2 + setup.checkpointing


def sent(shape: Shape, variant: str, lengths: tuple[int, int, int], setup: Setup) -> int:
    """Return the bytes that a GPU sends in a step to attend over rows that it shares."""
    tokens, passes = shared_row(variant, lengths, setup)
    return exchanged(shape, tokens, setup.sequence_parallel, setup.element, passes)


def sharing(shape: Shape, variant: str, lengths: tuple[int, int, int], setup: Setup, seconds: float | None) -> str:
    """Say what of a row a GPU has, and what the exchange costs; `seconds` of arithmetic beside it, if known."""
    (tokens, passes), size = shared_row(variant, lengths, setup), sent(shape, variant, lengths, setup)
    takes = " and ".join(f"{size / rate:.2g} s by {link} ({rate / 1e9:g} GB/s)" for link, rate in LINKS.items())
    beside = f", beside {seconds:.3g} s of arithmetic at the measured rate" if seconds else ""
    return (
        f"Sharing: {setup.sequence_parallel} GPUs share a row of {tokens:,} tokens, "
        f"{ceil(tokens / setup.sequence_parallel):,} each; a GPU sends {size / passes / shape.layers / 1e6:.1f} MB a "
        f"layer and pass, {gb(size)} a step, {takes}{beside}."
    )


def proposal(shape: Shape, setup: Setup, in_memory, memory: float) -> str:
    """Say how few GPUs to a row would make it fit; `in_memory` gives a setup's peak in bytes and longest prompt."""
    form = f"ZeRO-{setup.zero}{' with offload' * setup.offload_optimizer}" if setup.zero else "the whole model on each"
    for n, other in sharings(shape, setup).items():
        need, most = in_memory(other)
        if n > setup.sequence_parallel and need <= memory:
            return (
                f" It needs {other.gpus} x {memory / 1e9:g} GB with `solopo_sequence_parallel: {n}`, {form}: "
                f"{gb(need)} on each; memory then allows {most:,} tokens."
            )
    return f" No `solopo_sequence_parallel` up to {max(sharings(shape, setup))} makes it fit."


def sharing_table(shape: Shape, variant: str, lengths: tuple[int, int, int], setup: Setup, in_memory) -> str:
    """Table what each `solopo_sequence_parallel` takes; `in_memory` as in `proposal`."""
    lines = ["sequence_parallel    GPUs   peak, GB   longest, memory   sent a step, GB"]
    for n, other in sharings(shape, setup).items():
        need, most = in_memory(other)
        lines.append(
            f"{n:17}{other.gpus:8}{need / 1e9:11.2f}{most:17}{sent(shape, variant, lengths, other) / 1e9:18.2f}"
        )
    return "\n".join(lines)


@dataclass
class Plan:
    """Hold what a recipe is planned from, and say what it takes."""

    shape: Shape
    config: Any  # of the model
    recipe: dict
    setup: Setup
    lengths: tuple[int, int, int]  # tokens of short prompt, response, long prompt
    references: dict  # of each variant
    memory: float  # bytes of a GPU
    nodes: int

    def __post_init__(self):
        """Find out how it runs.

        Raises:
            ValueError: Ranks cannot share rows so, or a response fills the model's window.
        """
        _, R, L = self.lengths
        self.lora, self.shared = self.setup.lora_rank > 0, self.setup.sequence_parallel
        self.variant, self.runs = how_it_runs(self.config, self.recipe, self.setup)
        check_sharing(self.shape, self.variant, self.setup, self.nodes)
        self.seen, self.basis = calibration("lora" if self.lora else "full", L, self.references)
        self.window = window_of(self.config)
        self.room, self.fits = self.window - R, self.longest_of(self.variant)
        if self.room < 1:
            raise ValueError(f"A response of {R:,} tokens leaves no room in the model's window of {self.window:,}.")

    def factor(self, variant: str) -> float:
        """Return measured over computed memory of activations, 1 where nothing was measured."""
        return (self.seen[variant].memory if variant in self.seen else None) or 1.0

    def need(self, variant: str, at: int | None = None, setup: Setup | None = None) -> float:
        """Return a GPU's bytes, at another long prompt or in another setup perhaps."""
        S, R, L = self.lengths
        parts = step_memory(self.shape, variant, S, R, at or L, self.references[variant], setup or self.setup)
        return peak(parts, self.factor(variant))

    def longest_of(self, variant: str, setup: Setup | None = None) -> int:
        """Return the tokens of the longest prompt that memory allows, 0 if none."""
        step = self.shape, variant, *self.lengths[:2], self.references[variant], setup or self.setup
        return longest(*step, self.memory, self.factor(variant))

    def in_memory(self, setup: Setup) -> tuple[float, int]:
        """Return a setup's bytes and longest prompt."""
        return self.need(self.variant, setup=setup), self.longest_of(self.variant, setup)

    def flops_of(self, variant: str) -> dict[str, float]:
        """Return a sample's arithmetic by part."""
        S, R, L = self.lengths
        keys = dict(checkpointing=self.setup.checkpointing, lora=self.lora, both=self.setup.both)
        keys["rejected"] = self.setup.rejected
        return step_flops(self.shape, variant, S, R, L, self.references[variant], **keys)

    def flops(self, variant: str) -> float:
        """Return a sample's arithmetic."""
        return sum(self.flops_of(variant).values())

    def times(self, variant: str, other: str) -> float:
        """Return a step's time over that of another variant: at measured rates if both have one, else by FLOPs."""
        seen = self.seen
        measured = seen[other].flops / seen[variant].flops if variant in seen and other in seen else 1
        return self.flops(variant) / self.flops(other) * measured

    def takes(self, variant: str) -> str:
        """Say a variant's memory and longest prompt."""
        most = min(self.longest_of(variant), self.room)
        return f"takes {gb(self.need(variant))} and {f'reaches {most:,} tokens' if most else 'fits at no length'}"

    def sentences(self) -> list[str]:
        """Return the answer, host memory, how many GPUs, how they share a row, warnings, the basis, the setup."""
        lines = [self.verdict(), self.in_host_memory(), self.divided()]
        if self.shared > 1:
            rate = self.seen[self.variant].flops if self.variant in self.seen else None
            seconds = self.setup.batch * self.flops(self.variant) / self.shared / rate if rate else None
            lines.append(sharing(self.shape, self.variant, self.lengths, self.setup, seconds))
        if self.recipe.get("pure_bf16") and not self.lora:
            if self.recipe.get("learning_rate", LEARNING_RATE) < PURE_BF16_LR:
                lines.append(
                    "Precision: `pure_bf16` rounds most of AdamW's updates away at this rate (docs/training.md)."
                )
        if (kind := self.config.model_type) not in COUNTED:
            lines.append(
                f"Memory: what a layer of `{kind}` keeps is not counted, so that the longest prompt is no upper bound; "
                f"counted are {', '.join(COUNTED)}."
            )
        return [*lines, self.basis, self.planned()]

    def table(self) -> str:
        """Return the table of shared rows where it helps, else an empty one."""
        if self.variant in PACKED and (self.fits < self.lengths[2] or self.shared > 1):
            return sharing_table(self.shape, self.variant, self.lengths, self.setup, self.in_memory)
        return ""

    def verdict(self) -> str:
        """Say whether it fits, what it takes, how long prompts may be, how fast it is, and what would make it fit."""
        L, fits, room, gpus = self.lengths[2], self.fits, self.room, self.setup.gpus
        if not fits:
            limit = f"No prompt fits: one of a single token would take {gb(self.need(self.variant, 1))}."
        elif room <= fits:
            limit = f"The longest prompt is {room:,} tokens, by the model's window of {self.window:,}; memory allows "
            limit += f"{fits:,}."
        else:
            limit = f"The longest prompt is {fits:,} tokens, by memory; the model's window is {self.window:,}."
        where = f"{'the GPU' if gpus == 1 else f'each of {gpus} GPUs'} of {self.memory / 1e9:g} GB"
        needs = f"It takes {gb(self.need(self.variant))} on {where} at a prompt of {L:,} tokens."
        said = f"{'Fits' if min(fits, room) >= L else 'Does not fit'}. {self.runs} {needs} {limit} {self.speed()}"
        if self.variant in PACKED and fits < L:
            said += proposal(self.shape, self.setup, self.in_memory, self.memory)
        return said

    def speed(self) -> str:
        """Compare a step with the host's `stage: dpo`; of another stage, with `stage: solopo`."""
        stage = self.recipe.get("stage", "solopo")
        if stage == "solopo":
            faster = f"It is {self.times('V0', self.variant):.2f} times as fast as the host's `stage: dpo`"
            return f"{faster} on the same long prompts, which {self.takes('V0')}."
        ours = how_it_runs(self.config, self.recipe | {"stage": "solopo"}, self.setup)[0]
        if stage == "dpo":
            compared = f"be {self.times('V0', ours):.2f} times as fast"
        else:
            compared = f"take {self.times(ours, 'SFT'):.2f} times as long"
        form = "packed" if ours == "S3" else "in two stages"
        prompts = f"On the same prompts and short ones of {self.lengths[0]:,} tokens"
        return f"{prompts}, `stage: solopo` would run {form} and {compared}; it {self.takes(ours)}."

    def in_host_memory(self) -> str:
        """Say what is offloaded."""
        offloaded = host_memory(self.shape, self.references[self.variant], self.setup)
        if not (total := sum(offloaded.values())):
            return "Host memory: nothing is offloaded."
        parts = ", ".join(f"{gb(size)} {part}" for part, size in offloaded.items() if size)
        nodes = self.nodes
        each = gb(total / nodes) + (" on the one node" if nodes == 1 else f" on each of {nodes} nodes")
        return (
            f"Host memory: {gb(total)} in all ({parts}), {each}, however many GPUs; DeepSpeed advises 1.5 times as "
            f"much, {gb(1.5 * total)} in all, for buffers."
        )

    def divided(self) -> str:
        """Say what GPUs divide among them."""
        setup, shared = self.setup, self.shared
        rows = setup.batch * self.recipe.get("gradient_accumulation_steps", 1)
        each = f"each {shared} that share a row" if shared > 1 else "each GPU"
        said = f"GPUs: an optimizer step has {rows * setup.gpus // shared} rows, {rows} on {each}. "
        if setup.zero == 0:
            return said + "Each GPU holds the whole model with its optimizer, however many there are."
        if setup.zero == 3 and setup.offload_optimizer and setup.offload_param:
            return said + (
                "A GPU holds the same on 1 as on many: the model's state is in host memory, only rows are shared."
            )
        alone = self.need(self.variant, setup=replace(setup, gpus=1, sequence_parallel=1))
        return f"{said}ZeRO-{setup.zero} divides the model's state among them; one GPU alone would take {gb(alone)}."

    def planned(self) -> str:
        """Say what was planned: model, training, tokens, reference."""
        (S, R, L), shape, setup = self.lengths, self.shape, self.setup
        kept = f"{setup.weights:g} of weights, {setup.gradients:g} of gradients, {setup.optimizer:g} of optimizer"
        windows = f"{shape.windowed} of them with a window of {shape.window:,} tokens, " if shape.windowed else ""
        trained = f"LoRA of rank {setup.lora_rank} on weights of {8 * setup.frozen:g} bits"
        return (
            f"Setup: {shape.parameters / 1e9:.2f} billion parameters, {shape.layers} layers of width {shape.width:,}, "
            f"{windows}vocabulary {shape.vocabulary:,}; {trained if self.lora else 'full fine-tuning'}; bytes per "
            f"trained parameter: {kept}; activations in {8 * setup.element} bits, gradient checkpointing "
            f"{'on' if setup.checkpointing else 'off'}; tokens: short prompt {S:,}, long {L:,}, response {R:,}; "
            f"reference: {self.references[self.variant] or 'none'}."
        )

    def parts(self, shown: dict) -> tuple[str, str]:
        """Table TFLOP per sample and GB per GPU, by part, by arithmetic alone; a line per configuration."""
        (S, R, L), shape, setup = self.lengths, self.shape, self.setup
        flops = {v: self.flops_of(v) for v in shown}
        parts = {v: step_memory(shape, v, S, R, L, self.references[v], setup) for v in shown}
        work = [f"TFLOP  tokens{''.join(f'{n:>11}' for n in (*flops['V0'], 'step'))}   times as fast as V0"]
        room = [f"GB   {''.join(f'{n:>12}' for n in (*parts['V0'], 'peak'))}   longest prompt"]
        for v in shown:
            total = sum(flops[v].values())
            cells = "".join(f"{n / 1e12:11.1f}" for n in (*flops[v].values(), total))
            tokens = count(v, S, R, L, setup.both, setup.rejected)[0]
            work.append(f"{v:5}{tokens:8}{cells}{sum(flops['V0'].values()) / total:9.2f}")
            cells = "".join(f"{n / 1e9:12.2f}" for n in (*parts[v].values(), peak(parts[v])))
            most = longest(shape, v, S, R, self.references[v], setup, self.memory)
            room.append(f"{v:5}{cells}{min(self.room, most):9}")
        return "\n".join(work), "\n".join(room)


def main() -> None:
    """Print the plan."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help=f"{', '.join(MODELS)}, a folder or a config.json; default: the recipe's")
    parser.add_argument("--short", type=int, default=1024, help="tokens of the short prompt (%(default)s)")
    parser.add_argument("--long", type=int, help="of the long prompt; default: the recipe's cutoff_len less a response")
    parser.add_argument("--response", type=int, default=256, help="tokens of a response (%(default)s)")
    parser.add_argument("--rejected", type=int, default=1, help="rejected responses of a row (%(default)s)")
    parser.add_argument("--gpus", type=int, default=1, help="in all (%(default)s)")
    parser.add_argument("--gpu-memory", type=float, default=80, help="GB of 1e9 bytes each (%(default)s)")
    parser.add_argument("--nodes", type=int, default=1, help="machines that the GPUs are in (%(default)s)")
    parser.add_argument("--recipe", help="default: full fine-tuning in bf16, ZeRO-3 with offload, orpo, one row each")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys that override the recipe's")
    args = parser.parse_intermixed_args()
    recipe, setup = {"pref_loss": "orpo", "cutoff_len": 16384}, Setup(args.gpus, 3, True, True)
    try:
        if not (args.recipe or args.model):
            raise ValueError("Give `--recipe` or `--model`.")
        if args.overrides and not args.recipe:
            raise ValueError("`key=value` overrides a recipe's key: give `--recipe`.")
        if args.recipe:
            recipe, setup = read_recipe(args.recipe, args.gpus, args.overrides)
        S, R, L = args.short, args.response, args.long or recipe.get("cutoff_len", CUTOFF) - args.response
        setup = replace(setup, rejected=args.rejected)
        given = dict(short=S, long=L, response=R, rejected=args.rejected, gpus=args.gpus, nodes=args.nodes)
        for name, value in given.items():
            if value < 1:
                raise ValueError(f"`--{name}` must be at least 1, got {value}.")
        if not 0 < args.gpu_memory < inf:
            raise ValueError(f"`--gpu-memory` must be a number of GB above 0, got {args.gpu_memory}.")
        if args.nodes > args.gpus:
            raise ValueError(f"`--gpus` are those of all nodes: {args.gpus} GPUs cannot be in {args.nodes} nodes.")
        if not (model := args.model or recipe.get("model_name_or_path")):
            raise ValueError(f"{args.recipe} has no `model_name_or_path`; add it, or give `--model`.")
        config = read_config(model)
        memory = args.gpu_memory * 1e9
        shape = shape_of(config, recipe.get("lora_target", "all") if setup.lora_rank else "all")
        plan = Plan(shape, config, recipe, setup, (S, R, L), references_of(recipe), memory, args.nodes)
        lines, table = plan.sentences(), plan.table()
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    shown = VARIANTS | {v: OTHERS[v] for v in (plan.variant,) if v in OTHERS}
    print(*lines, sep="\n", end="\n\n")
    print(*plan.parts(shown), sep="\n\n", end="\n\n")
    if table:
        print(table, end="\n\n")
    print(*(f"{name:4}{meaning}" for name, meaning in shown.items()), sep="\n")


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # of a `| head` that has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
