"""Attention of a packed row, segment by segment: registered with transformers, never a mask of T x T.

The row's `Plan` travels as the keyword argument `solopo_segments` of `model(...)` down to the attention function. Hooks
on the decoder and on its layers switch the model to that function for the duration of a call that carries a plan, and
back, whatever happens. A layer that gradient checkpointing runs again in backward is called with the same arguments, so
it switches then too; any other call (generation, evaluation of another kind) never sees any of it.

Shape suffixes: H heads, T tokens, D head size.
"""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from .packing import Plan, Segment

ARGUMENT = "solopo_segments"
SDPA, FLASH = "solopo_sdpa", "solopo_fa2"
IN_WORDS = {SDPA: "SDPA, segment by segment", FLASH: "FlashAttention-2, all segments in one call",
            "sdpa": "SDPA", "flash_attention_2": "FlashAttention-2"}  # fmt: skip

# Equal to each sequence alone, in loss and gradients, in tests/test_packing.py. `auto` does not guess about others.
TESTED = ("llama", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma", "phi", "phi3", "olmo2",
          "glm4", "granite", "smollm3")  # fmt: skip
ROPES = ("default", "linear", "yarn", "llama3")  # `dynamic` and `longrope` choose frequencies by the row's longest part


def why_not_packed(model: nn.Module) -> str | None:
    """Why a model cannot run a packed row, or None where it can. Looks at the class, the modules and the config."""
    model = base_of(model)
    config, forward = model.config, inspect.signature(model.forward).parameters
    ropes = getattr(config, "rope_parameters", None) or {}
    ropes = [r for r in ropes.values() if isinstance(r, dict)] or [ropes]
    kinds = {r.get("rope_type", "default") for r in ropes} - set(ROPES)
    other_layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
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
    if getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
        return f"its attention has a sliding window ({config.sliding_window})"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its attention has softcapping"
    if kinds:
        return f"its rope scaling ({', '.join(sorted(kinds))}) depends on the longest sequence of the row"
    if config.model_type not in TESTED:
        return f"`{config.model_type}` is not among the tested architectures ({', '.join(TESTED)})"
    return None


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def packed_attention(implementation: str) -> str:
    """The function that takes a packed row's segments where the model has this one for plain sequences."""
    return FLASH if implementation == "flash_attention_2" else SDPA


def how_a_step_runs(model: nn.Module, not_packed: str | None) -> str:
    """A sentence for the log: the form of the step and the attention that runs it.

    Args:
        not_packed: Why the step has two stages; None where it is packed.
    """
    implementation = base_of(model).config._attn_implementation
    form = f"in two stages, not packed: {not_packed}" if not_packed else "packed"
    runs = implementation if not_packed else packed_attention(implementation)
    return f"A step runs {form}; attention: {IN_WORDS.get(runs, runs)}."


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers that gradient checkpointing may run again: every attention and every MLP is in one of them."""
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
    model._solopo_prepared = True


class _Switch:
    """Hooks of one model. The decoder's call also sees to it that every layer used the segments."""

    def __init__(self, config, layers: int):
        self.config, self.layers, self.before = config, layers, []

    def enter(self, module, args, kwargs):
        if kwargs.get(ARGUMENT) is None:
            return
        now = self.config._attn_implementation
        self.before.append(now)
        if now not in (SDPA, FLASH):
            self.config._attn_implementation = packed_attention(now)
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


def _refuse(module, plan: Plan | None, kwargs: dict) -> None:
    """What a model asks of its attention beyond causal softmax is not there in segments."""
    asked = [n for n in ("softcap", "s_aux", "sliding_window", "position_bias") if kwargs.get(n) is not None]
    if plan is None or asked:
        raise RuntimeError(
            f"{type(module).__name__} cannot run a packed row ({', '.join(asked) or 'it drops keyword arguments'}); "
            "set `solopo_forward: two_stage`."
        )
    plan.calls += 1


def sdpa_segments(
    module, query_1HTD, key_1HTD, value_1HTD, attention_mask, scaling=None, dropout=0.0, solopo_segments=None, **kwargs
):
    """`F.scaled_dot_product_attention` per segment; its causal kernels need no mask, wherever a kernel can do without.

    Args:
        query_1HTD: Shape (1, H, T, D); keys and values with as many or, for grouped queries, fewer heads.

    Returns:
        Shape (1, T, H, D), and None for the weights.
    """
    _refuse(module, solopo_segments, kwargs)
    device = query_1HTD.device.type
    if torch.is_autocast_enabled(device):  # it casts for plain attention, but not for `causal_lower_right`
        dtype = torch.get_autocast_dtype(device)
        query_1HTD, key_1HTD, value_1HTD = (x.to(dtype) for x in (query_1HTD, key_1HTD, value_1HTD))
    grouped = query_1HTD.shape[1] != key_1HTD.shape[1]
    outputs = []
    for segment in solopo_segments.segments:
        query, (key, value) = query_1HTD[:, :, slice(*segment.query)], _keys(segment, key_1HTD, value_1HTD)
        whole = len(segment.keys) == 1
        outputs.append(F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, scale=scaling, enable_gqa=grouped, is_causal=whole,
            attn_mask=None if whole else causal_lower_right(query.shape[2], key.shape[2]),
        ))  # fmt: skip
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _keys(segment: Segment, *tensors_1HTD: Tensor) -> list[Tensor]:
    """Keys and values that a segment sees; copied only where they are not consecutive."""
    parts = [[tensor[:, :, slice(*part)] for part in segment.keys] for tensor in tensors_1HTD]
    return [part[0] if len(part) == 1 else torch.cat(part, dim=2) for part in parts]


def flash_segments(
    module, query_1HTD, key_1HTD, value_1HTD, attention_mask, scaling=None, dropout=0.0, solopo_segments=None, **kwargs
):
    """All segments in one call of FlashAttention-2 varlen; its causal mask is bottom-right since 2.1. Never run yet."""
    from flash_attn import flash_attn_varlen_func
    from transformers.integrations.flash_attention import get_target_dtype

    _refuse(module, solopo_segments, kwargs)
    segments = solopo_segments.segments
    dtype = get_target_dtype(query_1HTD, module) or query_1HTD.dtype  # the kernel takes 16 bits only
    query, key, value = (x[0].transpose(0, 1).to(dtype) for x in (query_1HTD, key_1HTD, value_1HTD))
    key, value = (torch.cat([x[slice(*part)] for s in segments for part in s.keys]) for x in (key, value))
    widths = ([s.query[1] - s.query[0] for s in segments], [sum(b - a for a, b in s.keys) for s in segments])
    cu_q, cu_k = (F.pad(torch.tensor(w).cumsum(0), (1, 0)).to(query.device, torch.int32) for w in widths)
    output_THD = flash_attn_varlen_func(
        query, key, value, cu_q, cu_k, max(widths[0]), max(widths[1]),
        dropout_p=dropout, softmax_scale=scaling, causal=True,
    )  # fmt: skip
    return output_THD[None], None


for _name, _function in ((SDPA, sdpa_segments), (FLASH, flash_segments)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, lambda *args, **kwargs: None)
