"""Plan a run before it is started: tokens, FLOPs and memory of a step, and the longest prompt that should fit.

    python scripts/plan.py --model qwen2.5-7b --long 16384 --gpus 4 --gpu-memory 80
    python scripts/plan.py --recipe examples/yaml/qwen2.5-7b/solo_dpo.yaml --gpus 4 --gpu-memory 80

Predictions, not measurements: they count the multiplications that must be done and the tensors that must exist at the
peak. Fragmentation, workspaces and communication are left out, so a "longest" is an upper bound, and ratios between
configurations are surer than either side. The accounting is ours; that of FLOPs is the usual one of 2 per
multiplication and of causal attention at half cost. GB are 1e9 bytes. S, L, R: tokens of the short prompt, the long
prompt, a response.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

from solopo_plugin.args import FIELDS

ROOT = Path(__file__).parent.parent
VARIANTS = {
    "V0": "the host's `stage: dpo` on the long pair",
    "S0": "three sequences padded into one batch",
    "S1": "two stages, logits everywhere (the paper's way)",
    "S2": "two stages, logits at the responses only",
    "S3": "one packed row (`solopo_forward: packed`)",
    "V*": "for comparison, nobody's code: a long pair that shares its prompt, logits at the responses only",
}
RESPONSE_LOGITS = ("S2", "S3", "V*")
# Shapes as published with the models; any other is read from its config.json.
MODELS = {
    "qwen2.5-7b": dict(
        model_type="qwen2", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064, max_position_embeddings=32768, tie_word_embeddings=False,
        rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "llama3.1-8b": dict(
        model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072, tie_word_embeddings=False,
        rms_norm_eps=1e-5, rope_parameters={
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}),
}  # fmt: skip
# Bytes of optimizer state per trained parameter, of the host's `optim` values; in fp32 or, by name, 8 bits.
OPTIMIZERS = {"adamw_torch": 8, "adamw_torch_fused": 8, "adamw_8bit": 2, "adamw_bnb_8bit": 2, "rmsprop": 4, "sgd": 0}


class Shape(NamedTuple):
    """What the formulas need of a model; widths in elements."""

    layers: int
    width: int
    query: int  # heads times head size
    key: int  # the same of keys and of values; narrower under grouped queries
    inner: int  # of the MLP
    vocabulary: int
    linear: int  # parameters of the layers' matrices
    parameters: int  # all, a tied head once
    fans: int  # inputs plus outputs of all those matrices: LoRA parameters per rank for `lora_target: all`


def read_config(model: str):
    """The transformers config of a folder, a config.json, a hub name, or a name in `MODELS`."""
    from transformers import AutoConfig

    name = str(model).split("/")[-1].lower().replace("llama-3", "llama3").removesuffix("-instruct")
    if name in MODELS and not Path(model).exists():
        return AutoConfig.for_model(**MODELS[name])
    try:
        if "/" not in model and not Path(model).exists():
            raise OSError("neither here nor a hub name")
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"No model config at {model}: give a folder, a config.json or one of {[*MODELS]}.") from error


def shape_of(config) -> Shape:
    """Count a model's matrices on torch's meta device: exact for every dense architecture, and no weight exists."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if any(p.dim() > 2 for p in model.parameters()):
        raise ValueError(f"`{config.model_type}` has experts, of which a token uses some; plan a dense model.")
    matrices = [m.weight.shape for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)]
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        config.num_hidden_layers, config.hidden_size, head * config.num_attention_heads,
        head * config.num_key_value_heads, config.intermediate_size, config.vocab_size,
        sum(a * b for a, b in matrices), sum(p.numel() for p in model.parameters()), sum(a + b for a, b in matrices),
    )  # fmt: skip


# ---- one step, per sample


def parts_of(variant: str, S: int, R: int, L: int, both: bool = False) -> list[tuple[int, int]]:
    """The sequences that a variant's forwards run: (new tokens, tokens of another's prompt that they share)."""
    short, long = (S + R, 0), (L + R, 0)
    if variant in ("V0", "V*"):
        return [long, long if variant == "V0" else (R, L)]
    packed = variant == "S3"
    return [short, (R, S) if packed else short, long, *([(R, L) if packed else long] if both else [])]


def count(variant: str, S: int, R: int, L: int, both: bool = False) -> tuple[int, int]:
    """Tokens that run through the layers, padding included, and positions that get logits."""
    parts = parts_of(variant, S, R, L, both)
    tokens = len(parts) * (L + R) if variant == "S0" else sum(new for new, _ in parts)
    return tokens, len(parts) * R if variant in RESPONSE_LOGITS else tokens


def forward_flops(shape: Shape, parts: list[tuple[int, int]], tokens: int, logits: int) -> list[float]:
    """[linear, attention, head] of a forward: 2 N t, the sum of 4 n d q p + 2 n d q^2, and 2 d V h.

    n layers of width d and N parameters, t tokens, h logits; q new tokens see p shared ones and, causally, themselves.
    Attention among padding is not counted.
    """
    attention = sum(2 * shape.layers * shape.query * q * (2 * p + q) for q, p in parts)
    return [2 * shape.linear * tokens, attention, 2 * shape.width * shape.vocabulary * logits]


def step_flops(shape: Shape, variant: str, S: int, R: int, L: int, reference: str | None = None,
               checkpointing: bool = True, lora: bool = False, both: bool = False) -> dict[str, float]:  # fmt: skip
    """FLOPs of a training step per sample, by part; their sum is the step.

    Forward, backward and, under checkpointing, forward again: (4, 4.5, 3) times (linear, attention, head), (3, 3.5, 3)
    without; attention's backward computes its scores anew. Under LoRA frozen matrices need no weight gradient: one less
    for linear and head. `reference`: `online` adds a forward of the pair, `cached` and None add nothing.
    """
    forward = forward_flops(shape, parts_of(variant, S, R, L, both), *count(variant, S, R, L, both))
    times = (3 + checkpointing - lora, 3.5 + checkpointing, 3 - lora)
    pair = parts_of(variant, S, R, L)[:2]
    tokens = sum(new for new, _ in pair)
    again = forward_flops(shape, pair, tokens, 2 * R if variant in RESPONSE_LOGITS else tokens)
    flops = {name: f * k for name, f, k in zip(("linear", "attention", "head"), forward, times, strict=True)}
    return flops | {"reference": sum(again) if reference == "online" else 0.0}


@dataclass(frozen=True)
class Setup:
    """How a run stores things, in bytes per parameter; the defaults are a bf16 model under DeepSpeed."""

    gpus: int = 1
    zero: int = 0
    offload_optimizer: bool = False  # gradients leave the GPU with it, as they are made
    offload_param: bool = False
    lora_rank: int = 0  # 0: full fine-tuning
    frozen: float = 2  # the layers' matrices, where they are not trained; less if quantised
    weights: float = 2  # what is trained
    gradients: float = 2
    optimizer: float = 12  # states, and an fp32 copy of the weights where those are bf16
    element: int = 2  # of activations
    checkpointing: bool = True
    chunk: int = 1024  # solopo_logp_chunk
    mlp_chunk: int = 0  # solopo_mlp_chunk; 0: all tokens at once
    batch: int = 1
    both: bool = False


def layer_bytes(shape: Shape, element: int) -> int:
    """What one layer keeps for its backward, per token, read from transformers' Llama and Qwen2 with SDPA.

    Two norms: input (in fp32), normalised, scaled. Queries, keys, values, attention's output. Four MLP tensors.
    """
    return 8 * shape.width + element * (4 * shape.width + 2 * shape.query + 2 * shape.key + 4 * shape.inner)


def logits_bytes(shape: Shape, variant: str, positions: int, chunk: int, element: int, online: bool) -> int:
    """All positions: the log-softmax and two gradients of it in fp32; V0's online reference adds the policy's logits.

    Response positions only: logits and their gradient in the model's precision, and three of fp32 for one chunk.
    """
    if variant in RESPONSE_LOGITS:
        return shape.vocabulary * (2 * element * positions + 12 * min(positions, chunk))
    return shape.vocabulary * positions * (16 if online and variant == "V0" else 12)


def step_memory(shape: Shape, variant: str, S: int, R: int, L: int, reference: str | None = None,
                setup: Setup = Setup()) -> dict[str, float]:  # fmt: skip
    """Bytes per GPU by part; `peak` says what they come to.

    weights, gradients, optimizer: ZeRO's accounting (arXiv:1910.02054); ZeRO-3 gathers up to 1e9 parameters at a time
    (`stage3_max_live_parameters`). reference: a second copy of the model, the host's way in full fine-tuning.
    checkpoints: the input of every layer, or without checkpointing all that the layers keep. layer: what one layer in
    backward adds, for the longest forward: what it keeps, if that is recomputed, and three gradients of its MLP; with
    `solopo_mlp_chunk` the MLP counts for one chunk only (its further forward is not among `step_flops`).
    """
    tokens, positions = (setup.batch * x for x in count(variant, S, R, L, setup.both))
    forward = setup.batch * max(2 * (S + R), (1 + setup.both) * (L + R)) if variant in ("S1", "S2") else tokens
    base = shape.linear * setup.frozen + (shape.parameters - shape.linear) * setup.element
    trained, frozen = (setup.lora_rank * shape.fans, base) if setup.lora_rank else (shape.parameters, 0)
    gathered = min(shape.parameters, 1e9) * setup.element if setup.zero == 3 else 0
    of_weights, of_gradients, of_optimizer = (setup.gpus if setup.zero >= stage else 1 for stage in (3, 2, 1))
    here, computed = not setup.offload_param, not setup.offload_optimizer
    mlp = shape.inner * setup.element
    kept = layer_bytes(shape, setup.element) - 4 * mlp * (setup.mlp_chunk > 0)  # chunks are computed again
    chunk = min(forward, setup.mlp_chunk or forward)
    return {
        "weights": (frozen + trained * setup.weights) / of_weights * here + gathered,
        "gradients": trained * setup.gradients / of_gradients * computed,
        "optimizer": trained * setup.optimizer / of_optimizer * computed,
        "reference": base / of_weights * here * (reference == "online" and not setup.lora_rank),
        "checkpoints": tokens * shape.layers * (shape.width * setup.element if setup.checkpointing else kept),
        "layer": forward * kept * setup.checkpointing + chunk * mlp * (3 + 4 * (setup.mlp_chunk > 0)),
        "logits": logits_bytes(shape, variant, positions, setup.chunk, setup.element, reference == "online"),
    }


def peak(memory: dict[str, float]) -> float:
    """Bytes at the peak: the logits are gone before the layers run backward, so the larger of those two counts."""
    return sum(memory.values()) - min(memory["layer"], memory["logits"])


def longest(shape: Shape, variant: str, S: int, R: int, reference: str | None, setup: Setup, memory: float) -> int:
    """Tokens of the longest long prompt whose step needs at most `memory` bytes per GPU; 0 where none does."""
    low, high = 0, 1 << 24
    while high - low > 1:
        middle = (low + high) // 2
        fits = peak(step_memory(shape, variant, S, R, middle, reference, setup)) <= memory
        low, high = (middle, high) if fits else (low, middle)
    return low


# ---- a recipe


def read_recipe(path: str | Path, gpus: int) -> tuple[dict, Setup]:
    """A recipe's keys, and what they mean for memory by the host's rules for precision.

    Under DeepSpeed and with `pure_bf16` the weights are bf16; otherwise the host keeps what is trained in fp32, and
    autocast adds a bf16 copy. ZeRO stage and offload are read from the file that `deepspeed` names.
    """
    recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    tuning, optim = recipe.get("finetuning_type", "lora"), recipe.get("optim", "adamw_torch_fused")
    if recipe.get("stage") not in ("dpo", "solopo") or recipe.get("solopo_objective", "solopo") != "solopo":
        raise ValueError(f"{path}: only `stage: solopo` with its `solopo` objective and `stage: dpo` can be planned.")
    if tuning not in ("full", "lora") or optim not in OPTIMIZERS:
        raise ValueError(f"{path}: only full and lora, with {', '.join(OPTIMIZERS)}; got {tuning}, {optim}.")
    deepspeed = recipe.get("deepspeed") or {}
    if isinstance(deepspeed, str):
        deepspeed = json.loads((ROOT / deepspeed).read_text(encoding="utf-8"))  # absolute paths stay
    zero = deepspeed.get("zero_optimization", {})
    offload = [zero.get(f"offload_{part}", {}).get("device", "none") != "none" for part in ("optimizer", "param")]
    pure, half = recipe.get("pure_bf16", False), recipe.get("bf16", False) or recipe.get("fp16", False)
    low, element = bool(deepspeed and half) or pure, 2 if half or pure else 4
    states = OPTIMIZERS[optim] / (2 if pure and not optim.endswith("8bit") else 1)
    return recipe, Setup(
        gpus, zero.get("stage", 0), *offload, recipe.get("lora_rank", 8) if tuning == "lora" else 0,
        frozen=recipe.get("quantization_bit", 8 * element) / 8, weights=2 if low else 4 + 2 * half,
        gradients=2 if low else 4, optimizer=states + (4 if low and not pure else 0), element=element,
        checkpointing=not recipe.get("disable_gradient_checkpointing", False),
        chunk=recipe.get("solopo_logp_chunk", FIELDS["solopo_logp_chunk"].default),
        mlp_chunk=recipe.get("solopo_mlp_chunk", FIELDS["solopo_mlp_chunk"].default),
        batch=recipe.get("per_device_train_batch_size", 8), both=recipe.get("solopo_align_on") == "both",
    )  # fmt: skip


def tables(shape: Shape, S: int, R: int, L: int, references: dict, setup: Setup, memory: float) -> tuple[str, str]:
    """TFLOP per sample and GB per GPU, by part; a line per configuration."""
    keys = dict(checkpointing=setup.checkpointing, lora=setup.lora_rank > 0, both=setup.both)
    flops = {v: step_flops(shape, v, S, R, L, references[v], **keys) for v in VARIANTS}
    parts = {v: step_memory(shape, v, S, R, L, references[v], setup) for v in VARIANTS}
    work = [f"TFLOP  tokens{''.join(f'{n:>11}' for n in (*flops['V0'], 'step'))}   times as fast as V0"]
    room = [f"GB   {''.join(f'{n:>12}' for n in (*parts['V0'], 'peak'))}   longest prompt"]
    for v in VARIANTS:
        total = sum(flops[v].values())
        cells = "".join(f"{n / 1e12:11.1f}" for n in (*flops[v].values(), total))
        work.append(f"{v:5}{count(v, S, R, L, setup.both)[0]:8}{cells}{sum(flops['V0'].values()) / total:9.2f}")
        cells = "".join(f"{n / 1e9:12.2f}" for n in (*parts[v].values(), peak(parts[v])))
        room.append(f"{v:5}{cells}{longest(shape, v, S, R, references[v], setup, memory):9}")
    return "\n".join(work), "\n".join(room)


def main() -> None:
    """Print the plan."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help=f"{', '.join(MODELS)}, a folder or a config.json; default: the recipe's")
    parser.add_argument("--short", type=int, default=1024, help="tokens of the short prompt (%(default)s)")
    parser.add_argument("--long", type=int, help="of the long prompt; default: the recipe's cutoff_len less a response")
    parser.add_argument("--response", type=int, default=256, help="tokens of a response (%(default)s)")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--gpu-memory", type=float, default=80, help="GB of 1e9 bytes each (%(default)s)")
    parser.add_argument("--recipe", help="default: full fine-tuning in bf16, ZeRO-3 with offload, orpo, one row each")
    args = parser.parse_args()
    recipe, setup = {"pref_loss": "orpo"}, Setup(args.gpus, 3, True, True)
    try:
        if not (args.recipe or args.model):
            raise ValueError("Give `--recipe` or `--model`.")
        if args.recipe:
            recipe, setup = read_recipe(args.recipe, args.gpus)
        model = args.model or recipe["model_name_or_path"]
        shape = shape_of(read_config(model))
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    S, R, L = args.short, args.response, args.long or recipe.get("cutoff_len", 16384) - args.response
    loss, ours = recipe.get("pref_loss", "sigmoid"), recipe.get("solopo_reference", "cached")
    references = {
        v: None if loss in ("orpo", "simpo") else ours if v in RESPONSE_LOGITS else "online" for v in VARIANTS
    }
    print(f"{model}: {shape}\n{setup}\nS {S}, R {R}, L {L}; {loss}, reference {references}", end="\n\n")
    print(*tables(shape, S, R, L, references, setup, args.gpu_memory * 1e9), sep="\n\n", end="\n\n")
    print(*(f"{name}  {meaning}" for name, meaning in VARIANTS.items()), sep="\n")


if __name__ == "__main__":
    main()
