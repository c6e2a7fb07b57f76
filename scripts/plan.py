"""Plan a run before it is started: does it fit, how long may the prompt be, how fast is it against the host's DPO.

    python scripts/plan.py --model qwen2.5-7b --long 16384 --gpus 4 --gpu-memory 80
    python scripts/plan.py --recipe examples/yaml/qwen2.5-7b/solo_dpo.yaml --gpus 4 --gpu-memory 80 cutoff_len=18432

The first line answers for the recipe as it will run; tokens, FLOPs and memory of a step by part stand below. Where
docs/benchmarks/gpu.json is there, the answer is calibrated by it. All else are predictions of step_cost.py, not
measurements: a "longest" is an upper bound, and ratios between configurations are surer than either side. GB are 1e9
bytes. S, L, R: tokens of the short prompt, the long prompt, a response.
"""

import argparse
import json
import sys
from dataclasses import fields, replace
from math import ceil
from pathlib import Path
from typing import NamedTuple

from step_cost import (
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

from solopo_plugin.args import FIELDS, SoloArguments, SoloDataArguments, check_keys, check_values, distills
from solopo_plugin.host.arguments import PURE_BF16_LR
from solopo_plugin.qa.recipe import read_values
from solopo_plugin.qa.window import window_of

ROOT = Path(__file__).parent.parent
CUTOFF = 2048  # tokens, the host's default of `cutoff_len`
GPU_JSON = ROOT / "docs/benchmarks/gpu.json"
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
    for declared in (SoloArguments, SoloDataArguments):
        check_values(declared(**{f.name: recipe[f.name] for f in fields(declared) if f.name in recipe}))
    tuning, optim = recipe.get("finetuning_type", "lora"), recipe.get("optim", "adamw_torch_fused")
    if tuning not in ("full", "lora") or optim not in OPTIMIZERS:
        raise ValueError(f"{path}: only full and lora, with {', '.join(OPTIMIZERS)}; got {tuning}, {optim}.")
    deepspeed = recipe.get("deepspeed") or {}
    if isinstance(deepspeed, str):
        here = Path(deepspeed)  # below the current folder, as in training; else below this repository
        deepspeed = json.loads((here if here.is_file() else ROOT / here).read_text(encoding="utf-8"))
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
        model, longpo = on_meta(config), recipe.get("solopo_objective") == "longpo"
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
    memory: float  # measured peak over the predicted one


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
        return Measured(run["length"], flops / run["median_s"], run["peak"] / peak(step_memory(*step, setup)))

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
        f"{variant} at {m.length:,} tokens {m.flops / 1e12:.0f} TFLOP/s and {m.memory:.2f} times the predicted peak"
        for variant, m in sorted(seen.items())
    ]
    return seen, f"Basis: arithmetic, calibrated by {name} ({card}) where that has the same: {'; '.join(each)}."


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


def answer(shape: Shape, config, recipe: dict, setup: Setup, lengths: tuple[int, int, int], references: dict,
           memory: float, nodes: int) -> tuple[str, list[str], str]:  # fmt: skip
    """Return the variant that runs, sentences, and a table of shared rows, or an empty one.

    The sentences: the answer, host memory, how many GPUs, how they share a row, the basis, the setup.
    """
    S, R, L = lengths
    stage, lora = recipe.get("stage", "solopo"), setup.lora_rank > 0
    tuning = "lora" if lora else "full"
    variant, runs = how_it_runs(config, recipe, setup)
    check_sharing(shape, variant, setup, nodes)
    seen, basis = calibration(tuning, L, references)
    factor = {v: seen[v].memory if v in seen else 1.0 for v in references}
    window = window_of(config)

    def need(v: str, at: int = L, setup: Setup = setup) -> float:
        return peak(step_memory(shape, v, S, R, at, references[v], setup)) * factor[v]

    def longest_of(v: str, setup: Setup = setup) -> int:
        return longest(shape, v, S, R, references[v], setup, memory / factor[v])

    def in_memory(setup: Setup) -> tuple[float, int]:
        return need(variant, setup=setup), longest_of(variant, setup)

    def times(v: str, other: str) -> float:
        """Return a step's time of `v` over that of `other`: at measured rates if both have one, else by FLOPs."""
        keys = dict(checkpointing=setup.checkpointing, lora=lora, both=setup.both, rejected=setup.rejected)
        a, b = (sum(step_flops(shape, x, S, R, L, references[x], **keys).values()) for x in (v, other))
        return a / b * (seen[other].flops / seen[v].flops if v in seen and other in seen else 1)

    def takes(v: str) -> str:
        most = min(longest_of(v), room)
        return f"takes {gb(need(v))} and {f'reaches {most:,} tokens' if most else 'fits at no length'}"

    room, fits = window - R, longest_of(variant)
    if room < 1:
        raise ValueError(f"A response of {R:,} tokens leaves no room in the model's window of {window:,}.")
    if not fits:
        limit = f"No prompt fits: one of a single token would take {gb(need(variant, 1))}."
    elif room <= fits:
        limit = f"The longest prompt is {room:,} tokens, by the model's window of {window:,}; memory allows {fits:,}."
    else:
        limit = f"The longest prompt is {fits:,} tokens, by memory; the model's window is {window:,}."
    where = f"{'the GPU' if setup.gpus == 1 else f'each of {setup.gpus} GPUs'} of {memory / 1e9:g} GB"
    if stage == "solopo":
        speed = f"It is {times('V0', variant):.2f} times as fast as the host's `stage: dpo` on the same long prompts"
        speed += f", which {takes('V0')}."
    else:
        ours = how_it_runs(config, recipe | {"stage": "solopo"}, setup)[0]
        speed = f"On the same prompts and short ones of {S:,} tokens, `stage: solopo` would run "
        speed += f"{'packed' if ours == 'S3' else 'in two stages'} and "
        dpo = stage == "dpo"
        speed += f"be {times('V0', ours):.2f} times as fast" if dpo else f"take {times(ours, 'SFT'):.2f} times as long"
        speed += f"; it {takes(ours)}."
    verdict = "Fits" if min(fits, room) >= L else "Does not fit"
    needs = f"It takes {gb(need(variant))} on {where} at a prompt of {L:,} tokens."
    lines, shared, table = [f"{verdict}. {runs} {needs} {limit} {speed}"], setup.sequence_parallel, ""
    if variant in PACKED and fits < L:
        lines[0] += proposal(shape, setup, in_memory, memory)
    if variant in PACKED and (fits < L or shared > 1):
        table = sharing_table(shape, variant, lengths, setup, in_memory)

    offloaded = host_memory(shape, references[variant], setup)
    if total := sum(offloaded.values()):
        parts = ", ".join(f"{gb(size)} {part}" for part, size in offloaded.items() if size)
        each = gb(total / nodes) + (" on the one node" if nodes == 1 else f" on each of {nodes} nodes")
        lines.append(
            f"Host memory: {gb(total)} in all ({parts}), {each}, however many GPUs; DeepSpeed advises 1.5 times as "
            f"much, {gb(1.5 * total)} in all, for buffers."
        )
    else:
        lines.append("Host memory: nothing is offloaded.")
    rows = setup.batch * recipe.get("gradient_accumulation_steps", 1)
    alone = need(variant, setup=replace(setup, gpus=1, sequence_parallel=1))
    each = f"each {shared} that share a row" if shared > 1 else "each GPU"
    share = f"GPUs: an optimizer step has {rows * setup.gpus // shared} rows, {rows} on {each}. "
    if setup.zero == 0:
        share += "Each GPU holds the whole model with its optimizer, however many there are."
    elif setup.zero == 3 and setup.offload_optimizer and setup.offload_param:
        share += "A GPU holds the same on 1 as on many: the model's state is in host memory, only rows are shared."
    else:
        share += f"ZeRO-{setup.zero} divides the model's state among them; one GPU alone would take {gb(alone)}."
    lines.append(share)
    if shared > 1:
        rate = seen[variant].flops if variant in seen else None
        flops = step_flops(shape, variant, S, R, L, references[variant], setup.checkpointing, lora, setup.both,
                           setup.rejected)  # fmt: skip
        seconds = setup.batch * sum(flops.values()) / shared / rate if rate else None
        lines.append(sharing(shape, variant, lengths, setup, seconds))
    if recipe.get("pure_bf16") and not lora and float(recipe.get("learning_rate", 5e-5)) < PURE_BF16_LR:
        lines.append("Precision: `pure_bf16` rounds most of AdamW's updates away at this rate (docs/training.md).")
    lines.append(basis)
    kept = f"{setup.weights:g} of weights, {setup.gradients:g} of gradients, {setup.optimizer:g} of optimizer"
    lines.append(
        f"Setup: {shape.parameters / 1e9:.2f} billion parameters, {shape.layers} layers of width {shape.width:,}, "
        f"{f'{shape.windowed} of them with a window of {shape.window:,} tokens, ' if shape.windowed else ''}"
        f"vocabulary {shape.vocabulary:,}; "
        + (f"LoRA of rank {setup.lora_rank} on weights of {8 * setup.frozen:g} bits" if lora else "full fine-tuning")
        + f"; bytes per trained parameter: {kept}; activations in {8 * setup.element} bits, gradient checkpointing "
        f"{'on' if setup.checkpointing else 'off'}; tokens: short prompt {S:,}, long {L:,}, response {R:,}; reference: "
        f"{references[variant] or 'none'}."
    )
    return variant, lines, table


def tables(shape: Shape, S: int, R: int, L: int, references: dict, setup: Setup, memory: float,
           window: int, shown: dict) -> tuple[str, str]:  # fmt: skip
    """Table TFLOP per sample and GB per GPU, by part, by arithmetic alone; a line per configuration."""
    row = (setup.both, setup.rejected)
    keys = dict(checkpointing=setup.checkpointing, lora=setup.lora_rank > 0, both=setup.both, rejected=setup.rejected)
    flops = {v: step_flops(shape, v, S, R, L, references[v], **keys) for v in shown}
    parts = {v: step_memory(shape, v, S, R, L, references[v], setup) for v in shown}
    work = [f"TFLOP  tokens{''.join(f'{n:>11}' for n in (*flops['V0'], 'step'))}   times as fast as V0"]
    room = [f"GB   {''.join(f'{n:>12}' for n in (*parts['V0'], 'peak'))}   longest prompt"]
    for v in shown:
        total = sum(flops[v].values())
        cells = "".join(f"{n / 1e12:11.1f}" for n in (*flops[v].values(), total))
        work.append(f"{v:5}{count(v, S, R, L, *row)[0]:8}{cells}{sum(flops['V0'].values()) / total:9.2f}")
        cells = "".join(f"{n / 1e9:12.2f}" for n in (*parts[v].values(), peak(parts[v])))
        room.append(f"{v:5}{cells}{min(window - R, longest(shape, v, S, R, references[v], setup, memory)):9}")
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
        if args.nodes > args.gpus:
            raise ValueError(f"`--gpus` are those of all nodes: {args.gpus} GPUs cannot be in {args.nodes} nodes.")
        if not (model := args.model or recipe.get("model_name_or_path")):
            raise ValueError(f"{args.recipe} has no `model_name_or_path`; add it, or give `--model`.")
        config = read_config(model)
        shape, references = shape_of(config), references_of(recipe)
        memory = args.gpu_memory * 1e9
        variant, lines, table = answer(shape, config, recipe, setup, (S, R, L), references, memory, args.nodes)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    shown = VARIANTS | {v: OTHERS[v] for v in (variant,) if v in OTHERS}
    window = window_of(config)
    print(*lines, sep="\n", end="\n\n")
    print(*tables(shape, S, R, L, references, setup, memory, window, shown), sep="\n\n", end="\n\n")
    if table:
        print(table, end="\n\n")
    print(*(f"{name:4}{meaning}" for name, meaning in shown.items()), sep="\n")


if __name__ == "__main__":
    main()
