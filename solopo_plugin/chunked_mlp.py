"""Memory at length, where a measurement says that it pays: the MLPs in chunks of tokens (`solopo_mlp_chunk`).

Gradient checkpointing leaves one hidden state per layer and, while a layer runs again in backward, that layer's own
intermediates. The largest of those are the MLP's: for Qwen2.5-7B 4 x 18,944 numbers per token, 152 KB in 16 bits, and
their gradients, against 7 KB for the hidden state and 201 KB for those of all layers together.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.integrations import is_deepspeed_zero3_enabled

from .attention import layers_of


def chunk_mlps(model: nn.Module, tokens: int) -> None:
    """Let every layer's MLP take at most so many tokens at a time, each chunk recomputed in backward. In place.

    The MLP works token by token, so the forward's numbers stay; a weight's gradient is summed chunk by chunk. It costs
    one more forward of the MLPs per step.

    Raises:
        ValueError: A model whose layers have no such MLP (mixtures of experts balance over all tokens).
    """
    for layer in layers_of(model):
        if (mlp := getattr(layer, "mlp", None)) is None or hasattr(mlp, "experts"):
            raise ValueError(
                f"`solopo_mlp_chunk: {tokens}` needs a dense `mlp` in every layer, and {type(layer).__name__} has "
                f"{'a mixture of experts' if mlp else 'none'}; remove the key."
            )
        mlp.forward = partial(_in_chunks, mlp.forward, tokens)
        if is_deepspeed_zero3_enabled():  # gather its weights once: ranks differ in length, and so in chunks
            from deepspeed.utils import set_z3_leaf_module

            set_z3_leaf_module(mlp, True)


def _in_chunks(forward, tokens: int, hidden_BTD: Tensor) -> Tensor:
    if hidden_BTD.shape[1] <= tokens:
        return forward(hidden_BTD)
    run = partial(checkpoint, forward, use_reentrant=False) if torch.is_grad_enabled() else forward
    return torch.cat([run(chunk_BTD) for chunk_BTD in hidden_BTD.split(tokens, dim=1)], dim=1)
