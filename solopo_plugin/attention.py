"""Attention of a packed row within its segments: registered with transformers, never a mask of T x T.

The row's `Plan` travels as the keyword argument `solopo_segments` of `model(...)` down to the attention function. Hooks
on the decoder and on its layers switch the model to that function for the duration of a call that carries a plan, and
back, whatever happens. A layer that gradient checkpointing runs again in backward is called with the same arguments, so
it switches then too; any other call (generation, evaluation of another kind) never sees any of it.

Shape suffixes: H heads, T tokens, D head size.
"""

import inspect
from bisect import bisect_right
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from .packing import LONG, Layout, Plan
from .qa.window import ropes_by_length

ARGUMENT = "solopo_segments"
SEGMENTS = "solopo_segments"  # the name of `attend` among transformers' attention functions
IN_WORDS = {"sdpa": "SDPA", "flash_attention_2": "FlashAttention-2"}
HOW = {  # `kernel_for`'s names, in words
    "sdpa": "SDPA, segment by segment",
    "varlen": "torch's FlashAttention-2, all segments in one call",
    "long apart": f"torch's FlashAttention-2 in one call, segments from {LONG:,} tokens by cuDNN",
}

# Equal to each sequence alone, in loss and gradients, in tests/test_packing.py. `auto` does not guess about others.
TESTED = (
    "llama", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma", "phi", "phi3", "olmo2",
    "glm4", "granite", "smollm3", "gemma3_text", "gemma4_text", "ministral", "ministral3", "olmo3", "starcoder2",
)  # fmt: skip
# Of these, with a sliding window in all or some of their layers: what they ask of attention is what they mask.
WINDOWED = (
    "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "phi3", "smollm3", "gemma3_text", "gemma4_text",
    "ministral", "ministral3", "olmo3", "starcoder2",
)  # fmt: skip
BLOCK = 1024  # queries whose mask exists at a time where a window is kept without varlen; ours
GRAIN = 512  # tokens to whose multiple a segment of its own is padded: cuDNN prepares anew for every length; ours


def why_not_packed(model: nn.Module) -> str | None:
    """Return why a model cannot run a packed row, or None where it can, by its class, modules and configuration."""
    model = base_of(model)
    config, forward = model.config, inspect.signature(model.forward).parameters
    windowed = getattr(config, "model_type", None) in WINDOWED
    packs = {"full_attention", "sliding_attention"} if windowed else {"full_attention"}
    other_layers = set(getattr(config, "layer_types", None) or ()) - packs
    if config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if config.get_text_config() is not config:
        return "it is multimodal"
    if "logits_to_keep" not in forward or not any(p.kind == p.VAR_KEYWORD for p in forward.values()):
        return "its forward takes no `logits_to_keep` or no further keyword arguments"
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention does not go through transformers' AttentionInterface"
    if getattr(model, "_is_stateful", False) or other_layers:
        return f"it has layers other than full attention ({', '.join(sorted(other_layers)) or 'recurrent'})"
    if not windowed and getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return f"its attention has a sliding window ({config.sliding_window})"
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return "its attention is bidirectional"
    if getattr(config, "num_kv_shared_layers", 0):  # whose gradients reentrant checkpointing loses, the host's default
        return "its last layers share the keys and values of others"
    if kinds := ropes_by_length(config):
        return f"its rope scaling ({', '.join(sorted(kinds))}) depends on the longest sequence of the row"
    if config.model_type not in TESTED:
        return f"`{config.model_type}` is not among the tested architectures ({', '.join(TESTED)})"
    return None


def why_two_stages(solopo_forward: str, *models) -> str | None:
    """Return why the step has two stages, or None where it is packed: as `solopo_forward` says and the models allow."""
    if solopo_forward == "two_stage":
        return "`solopo_forward: two_stage`"
    found = [reason for model in models if model is not None and (reason := why_not_packed(model))]
    if found and solopo_forward == "packed":
        raise ValueError(f"`solopo_forward: packed` does not run on this model: {found[0]}. Set `auto` or `two_stage`.")
    return found[0] if found else None


def base_of(model) -> PreTrainedModel:
    """Return the transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def how_a_step_runs(
    model: nn.Module, not_packed: str | None, device: torch.device, dtype: torch.dtype, capability=None
) -> str:
    """Return a sentence for the log: the form of the step and the attention that runs it.

    `not_packed` says why the step has two stages, `capability` that of a GPU that is not here; without it the device is
    asked.
    """
    config = base_of(model).config
    if not_packed:
        runs = config._attn_implementation
        return f"A step runs in two stages, not packed: {not_packed}; attention: {IN_WORDS.get(runs, runs)}."
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds, wider = getattr(config, "layer_types", None), getattr(config, "global_head_dim", None)
    # of layers without a window, where there are some
    kernel = kernel_for(device, dtype, head_size, window if kinds is None else None, capability=capability)
    how = HOW[kernel]
    if kernel == "long apart" and window:
        how += ", where a layer has no window"
    if kernel == "varlen" and wider and kernel_for(device, dtype, wider, capability=capability) == "sdpa":
        how += f"; in layers without a window, with heads of {wider}, {HOW['sdpa']}"
    how += f"; windows of {window:,} tokens" if window else ""
    return f"A step runs packed; attention: {how}."


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers that gradient checkpointing may run again: every attention and every MLP is in one of them."""
    return [m for m in base_of(model).modules() if isinstance(m, GradientCheckpointingLayer)]


def prepare(model: nn.Module) -> None:
    """Let a model take `solopo_segments`. Idempotent; costs nothing in calls without it."""
    model = base_of(model)
    if getattr(model, "_solopo_prepared", False):
        return
    layers = layers_of(model)
    switch = _Switch(model.config, len(layers))
    for module in (model.base_model, *layers):
        module.register_forward_pre_hook(switch.enter, prepend=True, with_kwargs=True)
        module.register_forward_hook(switch.leave, with_kwargs=True, always_call=True)
    model._solopo_prepared = True  # type: ignore[assignment]  # a mark, which a module's types do not foresee


class _Switch:
    """Hooks of one model. The decoder's call also sees to it that every layer used the segments."""

    def __init__(self, config, layers: int):
        self.config, self.layers = config, layers
        self.before: list[str] = []  # what attended before each call that is under way

    def enter(self, module, args, kwargs):
        if kwargs.get(ARGUMENT) is None:
            return
        now = self.config._attn_implementation
        self.before.append(now)
        self.config._attn_implementation = SEGMENTS
        if not isinstance(module, GradientCheckpointingLayer):
            kwargs[ARGUMENT].calls = 0

    def leave(self, module, args, kwargs, output):
        plan: Plan | None = kwargs.get(ARGUMENT)
        if plan is None or not self.before:
            return
        self.config._attn_implementation = self.before.pop()
        whole = output is not None and not isinstance(module, GradientCheckpointingLayer)
        if whole and plan.calls != self.layers:
            raise RuntimeError(
                f"{plan.calls} of {self.layers} layers attended within the packed row's segments; this model mixes "
                "tokens in another way. Set `solopo_forward: two_stage`."
            )
        if whole and plan.part is not None:
            output.last_hidden_state = plan.part.to_scorers(output.last_hidden_state)


def _refuse(module, plan: Plan | None, kwargs: dict) -> None:
    """Refuse what a model asks of its attention beyond causal softmax, which segments do not have."""
    asked = [n for n in ("softcap", "s_aux", "position_bias") if kwargs.get(n) is not None]
    if plan is None or asked:
        raise RuntimeError(
            f"{type(module).__name__} cannot run a packed row ({', '.join(asked) or 'it drops keyword arguments'}); "
            "set `solopo_forward: two_stage`."
        )
    plan.calls += 1


def attend(
    module, query_1HTD, key_1HTD, value_1HTD, attention_mask, scaling=None, dropout=0.0, sliding_window=None,
    solopo_segments=None, **kwargs,
):  # fmt: skip
    """Attend within a packed row's segments, as `kernel_for` chooses.

    The parameters are transformers' for its attention functions. Queries: shape (1, H, T, D); keys and values with as
    many or, for grouped queries, fewer heads. `sliding_window`: keys that a query sees at most, its own among them; a
    segment's keys lie in a row as they do in its sequence, so the window is the sequence's.

    Returns:
        Shape (1, T, H, D), and None for the weights.
    """
    _refuse(module, solopo_segments, kwargs)
    device, dtype = query_1HTD.device, query_1HTD.dtype
    if torch.is_autocast_enabled(device.type):  # it casts for plain attention, but not for custom operators
        dtype = torch.get_autocast_dtype(device.type)
    query, key, value = (x.to(dtype) for x in (query_1HTD, key_1HTD, value_1HTD))
    if (part := solopo_segments.part) is not None:
        query, key, value = part.to_heads(query, key, value)
    head_size = query_1HTD.shape[-1]
    layout = solopo_segments.layout(device)
    window = sliding_window if sliding_window and sliding_window < layout.longest_keys else None
    kernel = kernel_for(device, dtype, head_size, window, dropout)
    if kernel == "sdpa":
        output = sdpa_segments(query, key, value, layout, scaling, dropout, window)
    elif kernel == "varlen":
        output = varlen_segments(query, key, value, layout, scaling, window)
    else:
        output = long_apart_segments(query, key, value, layout, scaling)
    return (output if part is None else part.to_tokens(output)), None


def kernel_for(
    device: torch.device, dtype: torch.dtype, head_size: int, window: int | None = None, dropout=0.0, capability=None
) -> Literal["sdpa", "varlen", "long apart"]:
    """Return what attends within segments: by the fastest of torch's kernels that run there."""
    if dropout or not runs_varlen(device, dtype, head_size, capability):
        return "sdpa"
    if not window and runs_cudnn(device, head_size, capability):  # cuDNN's SDPA has no windows
        return "long apart"
    return "varlen"


def runs_varlen(device: torch.device, dtype: torch.dtype, head_size: int, capability=None) -> bool:
    """Return whether torch's own FlashAttention-2 for variable lengths runs: on a GPU since Ampere, in 16 bits."""
    fits = dtype in (torch.float16, torch.bfloat16) and head_size % 8 == 0 and head_size <= 256
    return device.type == "cuda" and fits and (capability or torch.cuda.get_device_capability(device)) >= (8, 0)


def runs_cudnn(device: torch.device, head_size: int, capability=None) -> bool:
    """Return whether SDPA attends by cuDNN, in 16 bits: where torch prefers it, on an H100, H200, B100 or B200.

    On an H200 it is 1.4 to 1.8 times as fast as FlashAttention-2, which is not written for that card (docs/benchmarks).
    """
    capability = capability or torch.cuda.get_device_capability(device)
    return capability in ((9, 0), (10, 0)) and head_size <= 128 and torch.backends.cuda.cudnn_sdp_enabled()


@torch.compiler.disable  # lengths are constants to the compiler: it would compile every row anew
def varlen_segments(
    query_1HTD: Tensor, key_1HTD: Tensor, value_1HTD: Tensor, layout: Layout, scale: float, window: int | None = None
) -> Tensor:
    """Attend within all segments in one call; the causal mask is aligned to a segment's last query and last key.

    `varlen_attn` counts the keys before a query's own, a window with it.
    """
    query, key, value = (x[0].transpose(0, 1) for x in (query_1HTD, key_1HTD, value_1HTD))
    order = [i for keys in layout.keys for i in keys]
    if order != [*range(len(layout.pieces))]:  # a shared prompt's keys come once per response; or some are left out
        key, value = (torch.cat([x[i] for i in order]) for x in (key.split(layout.pieces), value.split(layout.pieces)))
    lengths = (layout.cu_queries, layout.cu_keys, layout.longest_queries, layout.longest_keys)
    output = varlen_attn(query, key, value, *lengths, scale=scale, window_size=(window - 1 if window else -1, 0))
    assert isinstance(output, Tensor)  # for the type checker: asked for more, it returns a tuple
    return output[None]


@torch.compiler.disable
def long_apart_segments(query_1HTD: Tensor, key_1HTD: Tensor, value_1HTD: Tensor, layout: Layout, scale: float):
    """Attend within long segments by SDPA, each padded to a multiple of `GRAIN`, and within all others in one call."""
    long, others = layout.parted
    if not long:
        return varlen_segments(query_1HTD, key_1HTD, value_1HTD, layout, scale)
    queries = query_1HTD.split(layout.queries, dim=2)
    keys, values = (x.split(layout.pieces, dim=2) for x in (key_1HTD, value_1HTD))
    grouped, outputs = query_1HTD.shape[1] != key_1HTD.shape[1], {}
    for i in long:
        length = layout.queries[i]
        parts = ([queries[i]], *([x[j] for j in layout.keys[i]] for x in (keys, values)))
        pad = (0, 0, 0, -length % GRAIN)  # behind the segment: seen by the padding alone
        query, key, value = (F.pad(torch.cat(part, dim=2), pad) for part in parts)
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
        outputs[i] = output[:, :, :length].transpose(1, 2)
    if rest := [i for i in range(len(queries)) if i not in outputs]:
        together = varlen_segments(torch.cat([queries[i] for i in rest], dim=2), key_1HTD, value_1HTD, others, scale)
        outputs |= zip(rest, together.split(others.queries, dim=1), strict=True)
    return torch.cat([outputs[i] for i in range(len(queries))], dim=1)


def sdpa_segments(
    query_1HTD: Tensor, key_1HTD: Tensor, value_1HTD: Tensor, layout: Layout, scale: float, dropout: float = 0.0,
    window: int | None = None,
) -> Tensor:  # fmt: skip
    """Attend by `F.scaled_dot_product_attention`, segment by segment; what shares a prompt alone has a mask.

    Queries and keys are split once: a split's backward writes each gradient once, every slice's a whole row of zeros.
    """
    grouped, outputs = query_1HTD.shape[1] != key_1HTD.shape[1], []
    key_pieces, value_pieces = (x.split(layout.pieces, dim=2) for x in (key_1HTD, value_1HTD))
    for query, keys in zip(query_1HTD.split(layout.queries, dim=2), layout.keys, strict=True):
        key, value = (
            pieces[keys[0]] if len(keys) == 1 else torch.cat([pieces[i] for i in keys], dim=2)
            for pieces in (key_pieces, value_pieces)
        )
        options: dict = dict(dropout_p=dropout, scale=scale, enable_gqa=grouped)
        if window and window < key.shape[2]:
            outputs.append(sdpa_window(query, key, value, window, **options))
            continue
        shared = query.shape[2] < key.shape[2]
        options |= dict(attn_mask=lower_right(query.shape[2], key.shape[2], query.device)) if shared else {}
        outputs.append(F.scaled_dot_product_attention(query, key, value, is_causal=not shared, **options))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def sdpa_window(query_1HTD: Tensor, key_1HTD: Tensor, value_1HTD: Tensor, window: int, **options) -> Tensor:
    """Attend within one segment and a window, by blocks of queries: a mask is as wide as a block and its window.

    The keys are cut where a block of queries begins, and a block sees whole parts of them.
    """
    keys = key_1HTD.shape[2]
    ahead, outputs = keys - query_1HTD.shape[2], []
    cuts = [0, *range(ahead % BLOCK or BLOCK, keys, BLOCK), keys]
    key_parts, value_parts = (x.split([b - a for a, b in pairwise(cuts)], dim=2) for x in (key_1HTD, value_1HTD))
    for at, query in enumerate(query_1HTD.split(BLOCK, dim=2), cuts.index(ahead)):
        first = bisect_right(cuts, max(0, cuts[at] - window + 1)) - 1
        key, value = (torch.cat(parts[first : at + 1], dim=2) for parts in (key_parts, value_parts))
        mask = lower_right(query.shape[2], key.shape[2], query.device, window)
        outputs.append(F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options))
    return torch.cat(outputs, dim=2)


def lower_right(queries: int, keys: int, device: torch.device, window: int | None = None) -> Tensor:
    """Return the causal mask in which the last query sees the last key, True where a key is seen.

    With a window, a query sees so many keys at most, its own and those before.
    """
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask.triu_(keys - queries - window + 1) if window else mask


AttentionInterface.register(SEGMENTS, attend)
AttentionMaskInterface.register(SEGMENTS, lambda *args, **kwargs: None)
