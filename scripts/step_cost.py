"""Compute what a training step costs: tokens, FLOPs, and memory on a GPU and beside it. plan.py prints it.

They count the multiplications that must be done and the tensors that must exist at the peak; fragmentation, workspaces
and communication are left out. The accounting is ours; that of FLOPs is the usual one of 2 per multiplication and of
causal attention at half cost. S, L, R: tokens of the short prompt, the long prompt, a response; `rejected`: how many a
row has. The host's forms have a padded pair for each.
"""

from bisect import bisect_right
from dataclasses import dataclass
from math import ceil, lcm
from pathlib import Path
from typing import NamedTuple

VARIANTS = {
    "V0": "the host's `stage: dpo` on the long pair",
    "S0": "three sequences padded into one batch",
    "S1": "two stages, logits everywhere (the paper's way)",
    "S2": "two stages, logits at the responses only (`solopo_forward: two_stage`)",
    "S3": "one packed row (`solopo_forward: packed`)",
    "V*": "for comparison, nobody's code: a long pair that shares its prompt, logits at the responses only",
}
# What else a recipe may run; shown for such a recipe only.
OTHERS = {
    "L3": "LongPO, one packed row: the long pair shares its prompt; logits of the chosen sequence and both responses",
    "L2": "LongPO, two stages: chosen, then rejected, padded; logits of the chosen sequence and the rejected response",
    "SFT": "the host's `stage: sft`: prompt and response, all logits",
}
RESPONSE_LOGITS = ("S2", "S3", "V*")
TWO_FORWARDS = ("S1", "S2")
PACKED = ("S3", "L3")
GB = 1e9  # bytes
# Bytes of optimizer state per trained parameter, of the host's `optim` values; in fp32 or, by name, 8 bits.
OPTIMIZERS = {"adamw_torch": 8, "adamw_torch_fused": 8, "adamw_8bit": 2, "adamw_bnb_8bit": 2, "rmsprop": 4, "sgd": 0}
# Architectures whose layers keep what `layer_bytes` counts, by the tests; of IN_FP32 norms multiply before they round.
IN_FP32 = ("gemma3_text", "olmo3")
COUNTED = ("llama", "qwen2", "qwen3", "mistral", "ministral", "smollm3", *IN_FP32)
HOST_GRADIENT = 4  # bytes per trained parameter beside an offloaded optimizer: DeepSpeed's CPU Adam takes fp32
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
    "llama3.2-3b": dict(
        model_type="llama", hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072, tie_word_embeddings=True,
        rms_norm_eps=1e-5, rope_parameters={
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}),
    "qwen3-4b": dict(
        model_type="qwen3", hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=40960, tie_word_embeddings=True,
        rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen3-8b": dict(
        model_type="qwen3", hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=40960,
        tie_word_embeddings=False, rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "mistral-7b-instruct-v0.3": dict(
        model_type="mistral", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32768, max_position_embeddings=32768, sliding_window=None,
        tie_word_embeddings=False, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    # of these the language model; window and kinds of layers are the classes' own but for what is given
    "gemma-3-1b-it": dict(
        model_type="gemma3_text", hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, vocab_size=262144, sliding_window=512, max_position_embeddings=32768,
        tie_word_embeddings=True),
    "gemma-3-4b-it": dict(
        model_type="gemma3_text", hidden_size=2560, intermediate_size=10240, num_hidden_layers=34,
        num_attention_heads=8, num_key_value_heads=4, head_dim=256, vocab_size=262208, sliding_window=1024,
        max_position_embeddings=131072, tie_word_embeddings=True),
    "qwen3.5-9b": dict(  # the defaults of transformers' class, which calls them "Qwen3.5-9B style"
        model_type="qwen3_5_text", hidden_size=4096, intermediate_size=12288, num_hidden_layers=32,
        num_attention_heads=16, num_key_value_heads=4, head_dim=256, vocab_size=248320, max_position_embeddings=32768,
        tie_word_embeddings=False),
}  # fmt: skip


class Shape(NamedTuple):
    """Hold what the formulas need of a model; widths in elements."""

    layers: int
    width: int
    query: int  # heads times head size
    key: int  # the same of keys and of values; narrower under grouped queries
    inner: int  # of the MLP
    vocabulary: int
    linear: int  # parameters of the layers' matrices
    parameters: int  # all, a tied head once
    fans: int  # inputs plus outputs of those matrices that `lora_target` names: LoRA parameters per rank
    heads: int = 1  # of queries
    key_heads: int = 1
    windowed: int = 0  # layers in which a query sees `window` keys at most
    window: int = 0
    normed: int = 0  # numbers that the norms of a layer take, per token
    norms_in_fp32: bool = False


def read_config(model: str):
    """Read the transformers config of a folder, a config.json, a hub name, or a name in `MODELS`."""
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


def on_meta(config):
    """Build the model on torch's meta device, where no weight exists."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def fans_of(matrices: dict[str, tuple[int, int]], lora_target: str | list[str]) -> int:
    """Sum inputs and outputs of the matrices that the host's `lora_target` names, which begin with a dot here.

    A name that no matrix has is passed over, as peft does where another one is found.

    Raises:
        ValueError: None is named, or one that does not stand in the layers.
    """
    names = [name.strip() for name in (lora_target.split(",") if isinstance(lora_target, str) else lora_target)]
    ends = tuple("" if names == ["all"] else "." + name.removeprefix("model.") for name in names if name)
    found = [sum(shape) for name, shape in matrices.items() if name.endswith(ends)]
    for name in names:
        if name in ("lm_head", "embed_tokens"):
            raise ValueError(f"`lora_target` names `{name}`, which is not planned; plan without it.")
    if not found:
        known = sorted({name.split(".")[-1] for name in matrices})
        raise ValueError(f"`lora_target` names no matrix of the layers; write all, or some of {', '.join(known)}.")
    return sum(found)


def shape_of(config, lora_target: str | list[str] = "all") -> Shape:
    """Count a model's matrices: exact for every dense architecture.

    Linear attention is counted as full, an upper bound of FLOPs; norms are those of the first layer.

    Raises:
        ValueError: A model with images or sound, with experts, or whose configuration has other names for its sizes; or
            a `lora_target` that is none of its matrices.
    """
    import torch

    if config.get_text_config() is not config:
        raise ValueError(
            f"`{config.model_type}` is multimodal: save its language model (python scripts/text_part.py MODEL FOLDER) "
            "and plan that folder."
        )
    model = on_meta(config)
    convolutions = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Conv1d)}  # of linear attention
    if any(p.dim() > 2 and id(p) not in convolutions for p in model.parameters()):
        raise ValueError(f"`{config.model_type}` has experts, of which a token uses some; plan a dense model.")
    matrices = {
        "." + name: m.weight.shape for name, m in model.base_model.named_modules() if isinstance(m, torch.nn.Linear)
    }
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    if missing := [name for name in sizes if not isinstance(getattr(config, name, None), int)]:
        raise ValueError(
            f"The shape of `{config.model_type}` cannot be read: its configuration has no number `{missing[0]}`; plan "
            "a model of its size, such as `--model qwen2.5-7b`."
        )
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query, key = head * config.num_attention_heads, head * heads
    first = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))[0]
    norms = [name.split(".")[-1] for name, m in first.named_modules() if type(m).__name__.endswith("Norm")]
    normed = sum({"q_norm": query, "k_norm": key}.get(name, config.hidden_size) for name in norms)
    window = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    windowed = kinds.count("sliding_attention") if window else 0
    return Shape(
        config.num_hidden_layers, config.hidden_size, query, key, config.intermediate_size, config.vocab_size,
        sum(a * b for a, b in matrices.values()), sum(p.numel() for p in model.parameters()),
        fans_of(matrices, lora_target), config.num_attention_heads, heads, windowed, window, normed,
        config.model_type in IN_FP32,
    )  # fmt: skip


# ---- one step, per sample


def parts_of(
    variant: str, S: int, R: int, L: int, both: bool = False, rejected: int = 1
) -> list[tuple[int, int]]:  # fmt: skip
    """List the sequences that a variant's forwards run: (new tokens, tokens of another's prompt that they share)."""
    short, long = (S + R, 0), (L + R, 0)
    if variant == "SFT":
        return [long]
    if variant in ("V0", "V*", "L2", "L3"):
        behind = [(R, L) if variant in ("V*", "L3") else long] * rejected
        return [long, *behind] if variant != "V0" else [*behind, *behind]
    more = [(R, L) if variant == "S3" else long] * rejected * both
    return [short, *[(R, S)] * rejected, long, *more] if variant == "S3" else [short] * 2 * rejected + [long, *more]


def counts(variant: str, S: int, R: int, L: int, both: bool = False, rejected: int = 1) -> tuple[int, int, int]:
    """Count tokens through the layers, padding included, and positions with logits, all in fp32 and by chunks."""
    parts = parts_of(variant, S, R, L, both, rejected)
    tokens = len(parts) * (L + R) if variant == "S0" else sum(new for new, _ in parts)
    kinds = {
        "L2": (0, L + (1 + rejected) * R),
        "L3": (0, L + R - 1 + (1 + rejected) * R),  # the NLL is of every token but the first
        **dict.fromkeys(RESPONSE_LOGITS, (0, len(parts) * R)),
    }
    return tokens, *kinds.get(variant, (tokens, 0))


def count(variant: str, S: int, R: int, L: int, both: bool = False, rejected: int = 1) -> tuple[int, int]:
    """Count tokens that run through the layers, padding included, and positions that get logits."""
    tokens, wide, narrow = counts(variant, S, R, L, both, rejected)
    return tokens, wide + narrow


def seen(q: int, p: int, window: int = 0) -> int:
    """Return twice the keys that q causal queries behind p shared tokens see, with a window of keys at most each."""
    free = min(q, max(0, window - p)) if window else q  # queries that see all there is
    return free * (2 * p + free) + 2 * (q - free) * window


def forward_flops(shape: Shape, parts: list[tuple[int, int]], tokens: int, logits: int) -> list[float]:
    """Return [linear, attention, head] of a forward: 2 N t, the sum of 4 n d q p + 2 n d q^2, and 2 d V h.

    n layers of width d and N parameters, t tokens, h logits; q new tokens see p shared ones and, causally, themselves,
    in layers with a window no more than that. Attention among padding is not counted.
    """
    full = shape.layers - shape.windowed
    pairs = sum(full * seen(q, p) + shape.windowed * seen(q, p, shape.window) for q, p in parts)
    attention = 2 * shape.query * pairs
    return [2 * shape.linear * tokens, attention, 2 * shape.width * shape.vocabulary * logits]


def step_flops(shape: Shape, variant: str, S: int, R: int, L: int, reference: str | None = None,
               checkpointing: bool = True, lora: bool = False, both: bool = False,
               rejected: int = 1) -> dict[str, float]:  # fmt: skip
    """Return the FLOPs of a training step per sample, by part; their sum is the step.

    Forward, backward and, under checkpointing, forward again: (4, 4.5, 3) times (linear, attention, head), (3, 3.5, 3)
    without; attention's backward computes its scores anew. Under LoRA frozen matrices need no weight gradient: one less
    for linear and head. `reference`: `online` adds a forward of the pair, `cached` and None add nothing.
    """
    row = (variant, S, R, L, both, rejected)
    forward = forward_flops(shape, parts_of(*row), *count(*row))
    times = (3 + checkpointing - lora, 3.5 + checkpointing, 3 - lora)
    pairs = parts_of({"L3": "S3", "L2": "S2"}.get(variant, variant), S, R, L, False, rejected)  # LongPO's: short prompt
    pairs = pairs if variant in ("V0", "V*", "SFT") else pairs[:-1]
    tokens = sum(new for new, _ in pairs)
    again = forward_flops(shape, pairs, tokens, len(pairs) * R if variant in (*RESPONSE_LOGITS, "L3") else tokens)
    flops = {name: f * k for name, f, k in zip(("linear", "attention", "head"), forward, times, strict=True)}
    return flops | {"reference": sum(again) if reference == "online" else 0.0}


@dataclass(frozen=True)
class Setup:
    """Say how a run stores things, in bytes per parameter; the defaults are a bf16 model under DeepSpeed."""

    gpus: int = 1
    zero: int = 0
    offload_optimizer: bool = False  # gradients leave the GPU with it, as they are made
    offload_param: bool = False
    live: float = 1e9  # parameters that ZeRO-3 gathers at a time, `stage3_max_live_parameters`
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
    rejected: int = 1  # responses of a row
    divergences: int = 0  # of a step: self-distillation's and the anchor's
    sequence_parallel: int = 1  # GPUs that share a packed row, each an equal part of its tokens


def setup_of(settings: dict, tuning: str) -> Setup:
    """Say how the step benchmark stores things: adapters in fp32, full fine-tuning in the model's precision."""
    element = 2 if settings["dtype"] == "bfloat16" else 4
    trained = element if tuning == "full" else 4
    return Setup(
        frozen=element, weights=trained, gradients=trained, optimizer=OPTIMIZERS[settings["optim"]] * trained / 4,
        element=element, lora_rank=8 * (tuning == "lora"), checkpointing=settings["checkpointing"],
    )  # fmt: skip


def layer_bytes(shape: Shape, element: int) -> int:
    """Return what one layer keeps for its backward, per token, read from transformers' `COUNTED` models with SDPA.

    Each norm: input (in fp32), normalised. What attention and MLP take. Queries, keys, values, attention's output. Four
    MLP tensors.
    """
    norms = shape.normed * (4 + (4 if shape.norms_in_fp32 else element))
    return norms + element * (2 * shape.width + 2 * shape.query + 2 * shape.key + 4 * shape.inner)


def of_one(variant: str, S: int, R: int, L: int, setup: Setup) -> tuple[int, int]:
    """Return a GPU's share of the tokens of a packed row and of its logits, of which it has a part of every span."""
    ranks, whole = setup.sequence_parallel, counts(variant, S, R, L, setup.both, setup.rejected)
    spans = [R] * (whole[2] // R) if variant == "S3" else [L + R - 1, *[R] * (1 + setup.rejected)]
    return ceil(setup.batch * whole[0] / ranks), setup.batch * sum(ceil(span / ranks) for span in spans)


def exchanged(shape: Shape, tokens: int, ranks: int, element: int, passes: int) -> int:
    """Return the bytes that one of `ranks` GPUs sends to the others in a step, to attend over a row that they share.

    In a layer and pass over it queries, keys and values go from tokens to heads, and attention's output back: of its
    tokens' numbers a GPU keeps one part in `ranks`. Keys and values are repeated where `ranks` does not divide them.
    """
    numbers = 2 * (shape.heads + lcm(shape.key_heads, ranks)) * shape.query // shape.heads
    return passes * shape.layers * ceil(tokens / ranks) * numbers * (ranks - 1) // ranks * element


def logits_bytes(shape: Shape, wide: int, narrow: int, chunk: int, element: int, online: bool) -> int:
    """Return the logits' bytes, all in fp32; `wide`: log-softmax and two gradients; V0's online reference adds its own.

    By chunks, `narrow`: logits and their gradient in the model's precision, and three of fp32 for one chunk.
    """
    return shape.vocabulary * (wide * (16 if online else 12) + 2 * element * narrow + 12 * min(narrow, chunk))


def divergence_bytes(shape: Shape, narrow: int, aligned: int, setup: Setup) -> int:
    """Return what divergences of aligned responses add to the logits' bytes: each another gradient of all logits.

    And nine in fp32 for half a chunk (distill.py) where log-probs have three for a whole one; by kept tensors, ours.
    """
    fp32 = 36 * min(aligned, max(1, setup.chunk // 2)) - 12 * min(narrow, setup.chunk)
    return shape.vocabulary * (setup.divergences * setup.element * narrow + max(0, fp32)) if setup.divergences else 0


def parameters_of(shape: Shape, setup: Setup) -> tuple[float, float, float]:
    """Return trained parameters, and bytes of those frozen and of a model that is not trained, a reference."""
    base = shape.linear * setup.frozen + (shape.parameters - shape.linear) * setup.element
    return (setup.lora_rank * shape.fans, base, base) if setup.lora_rank else (shape.parameters, 0, base)


def host_memory(shape: Shape, reference: str | None, setup: Setup) -> dict[str, float]:
    """Return bytes in the nodes' memory of what is offloaded, for all GPUs; 16 and 18 a parameter as DeepSpeed counts.

    Its estimators (`estimate_zero3_model_states_mem_needs`) advise 1.5 times as much, for buffers.
    """
    trained, frozen, base = parameters_of(shape, setup)
    second = base * (reference == "online" and not setup.lora_rank)
    return {
        "optimizer": trained * (setup.optimizer + HOST_GRADIENT) * setup.offload_optimizer,
        "parameters": (frozen + trained * setup.weights + second) * setup.offload_param,
    }


STATE = ("weights", "gradients", "optimizer", "reference")  # parts of `step_memory` that are not activations


def step_memory(shape: Shape, variant: str, S: int, R: int, L: int, reference: str | None = None,
                setup: Setup = Setup()) -> dict[str, float]:  # fmt: skip
    """Return bytes per GPU by part; `peak` says what they come to.

    weights, gradients, optimizer: ZeRO's accounting (arXiv:1910.02054); ZeRO-3 gathers `live` parameters at a time, on
    one GPU as on many. What is offloaded is in `host_memory` instead. Of a shared packed row a GPU has an equal part of
    tokens and logits. reference: a second copy of the model, the host's way in full fine-tuning. checkpoints: the input
    of every layer, or without checkpointing all that the layers keep.
    layer: what one layer in backward adds, for the longest forward: what it keeps, if that is recomputed, and three
    gradients of its MLP; with `solopo_mlp_chunk` the MLP counts for one chunk only (its further forward is not among
    `step_flops`). Where a row is shared, a layer keeps attention's output twice, by heads and by tokens, and keys and
    values as repeated; its exchanges, after the MLP's gradients, hold queries, keys and values three times.
    """
    tokens, wide, narrow = (setup.batch * x for x in counts(variant, S, R, L, setup.both, setup.rejected))
    narrow += setup.batch * (L + R) * (variant == "L2")  # the NLL's tokens are picked out of the sequence's: a copy
    n_short, n_long = 2 * setup.rejected, 1 + setup.both * setup.rejected
    forward = setup.batch * max(n_short * (S + R), n_long * (L + R)) if variant in TWO_FORWARDS else tokens
    forward = setup.batch * setup.rejected * (L + R) if variant == "L2" else forward
    ranks = setup.sequence_parallel if variant in PACKED else 1
    if ranks > 1:
        tokens, narrow = of_one(variant, S, R, L, setup)
        forward = tokens
    trained, frozen, base = parameters_of(shape, setup)
    gathered = min(shape.parameters, setup.live) * setup.element if setup.zero == 3 else 0
    of_weights, of_gradients, of_optimizer = (setup.gpus if setup.zero >= stage else 1 for stage in (3, 2, 1))
    here, computed = not setup.offload_param, not setup.offload_optimizer
    mlp, online = shape.inner * setup.element, reference == "online"
    kept = layer_bytes(shape, setup.element) - 4 * mlp * (setup.mlp_chunk > 0)  # chunks are computed again
    buffers = 0
    if ranks > 1:
        key = shape.key // shape.key_heads * lcm(shape.key_heads, ranks)
        kept += setup.element * (shape.query + 2 * (key - shape.key))
        buffers = 3 * tokens * setup.element * (shape.query + 2 * key)
    aligned = ceil(setup.batch * R * (1 + setup.both * setup.rejected) / ranks)
    of_kl = divergence_bytes(shape, narrow, aligned, setup) if variant in ("S2", "S3") else 0
    chunk = min(forward, setup.mlp_chunk or forward)
    of_mlp = chunk * mlp * (3 + 4 * (setup.mlp_chunk > 0))
    return {
        "weights": (frozen + trained * setup.weights) / of_weights * here + gathered,
        "gradients": trained * setup.gradients / of_gradients * computed,
        "optimizer": trained * setup.optimizer / of_optimizer * computed,
        "reference": base / of_weights * here * (online and not setup.lora_rank),
        "checkpoints": tokens * shape.layers * (shape.width * setup.element if setup.checkpointing else kept),
        "layer": forward * kept * setup.checkpointing + max(of_mlp, buffers),
        "logits": logits_bytes(shape, wide, narrow, setup.chunk, setup.element, online and variant == "V0") + of_kl,
    }


def peak(memory: dict[str, float], factor: float = 1.0) -> float:
    """Return bytes at the peak: logits are gone before the layers run backward, so the larger of those two counts.

    Args:
        memory: From `step_memory`.
        factor: By which activations are larger than computed; weights, gradients and optimizer are known exactly.
    """
    state = sum(memory[part] for part in STATE)
    return state + factor * (memory["checkpoints"] + max(memory["layer"], memory["logits"]))


def longest(shape: Shape, variant: str, S: int, R: int, reference: str | None, setup: Setup, memory: float,
            factor: float = 1.0) -> int:  # fmt: skip
    """Return tokens of the longest long prompt whose step needs at most `memory` bytes per GPU; 0 where none does.

    `factor`: as `peak` has it.
    """

    def needed(L: int) -> float:
        return peak(step_memory(shape, variant, S, R, L, reference, setup), factor)

    return bisect_right(range(1, 1 << 24), memory, key=needed)
