"""Log-probabilities of given tokens under given logits. Pure PyTorch.

Shape suffixes: B sequences, T tokens, K kept positions, V vocabulary.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .args import CHUNK

IGNORE = -100  # label of a token that is not predicted (the host's IGNORE_INDEX)


def _token_logps(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return logits_NV.float().log_softmax(-1).gather(-1, targets_N[:, None]).squeeze(-1)


def token_logps(logits_NV: Tensor, targets_N: Tensor, chunk: int = CHUNK) -> Tensor:
    """Return log softmax(logits)[target], fp32, nats, (N,); fp32 copies are made per chunk and again in backward."""
    if len(targets_N) <= chunk:
        return _token_logps(logits_NV, targets_N)
    parts = zip(logits_NV.split(chunk), targets_N.split(chunk), strict=True)
    return torch.cat([checkpoint(_token_logps, logits, targets, use_reentrant=False) for logits, targets in parts])


def predicting_positions(labels_BT: Tensor) -> Tensor:
    """Return the positions whose *next* token is labelled in some row: all that need logits. Shape (K,)."""
    return (labels_BT[:, 1:] != IGNORE).any(0).nonzero().squeeze(-1)


def response_logps(
    logits_BKV: Tensor, labels_BT: Tensor, positions_K: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Return the summed log-prob of each row's labelled tokens.

    Args:
        logits_BKV: Logits at `positions_K`, any float dtype.
        labels_BT: Token ids of the response, `IGNORE` elsewhere, aligned with the input (not shifted).
        positions_K: From `predicting_positions(labels_BT)`: the logits at position t predict the label at t + 1.
        chunk: Tokens whose fp32 logits exist at a time.

    Returns:
        Sum per row in nats, fp32, shape (B,), and the number of labelled tokens per row, shape (B,).
    """
    targets_BT = labels_BT[:, 1:]
    mask_BT = targets_BT != IGNORE
    logps_N = token_logps(logits_BKV[mask_BT[:, positions_K]], targets_BT[mask_BT], chunk)
    # added up over all positions, as the host does: the same bits
    logps_BT = torch.zeros_like(targets_BT, dtype=torch.float32).masked_scatter(mask_BT, logps_N)
    return logps_BT.sum(-1), mask_BT.sum(-1)
