"""Log-probabilities of given tokens under given logits. Pure PyTorch.

Shape suffixes: B sequences, T tokens, K kept positions, V vocabulary.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .args import CHUNK

IGNORE = -100  # label of a token that is not predicted (the host's IGNORE_INDEX)


def _by_logsumexp(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    logits_NV = logits_NV.float()
    return logits_NV.gather(-1, targets_N[:, None]).squeeze(-1) - logits_NV.logsumexp(-1)


def _by_log_softmax(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return logits_NV.float().log_softmax(-1).gather(-1, targets_N[:, None]).squeeze(-1)


def token_logps(logits_NV: Tensor, targets_N: Tensor, chunk: int = CHUNK, of=_by_logsumexp) -> Tensor:
    """Return log softmax(logits)[target], fp32, nats, (N,); fp32 copies are made per chunk and again in backward."""
    if len(targets_N) <= chunk:
        return of(logits_NV, targets_N)
    parts = zip(logits_NV.split(chunk), targets_N.split(chunk), strict=True)
    return torch.cat([checkpoint(of, logits, targets, use_reentrant=False) for logits, targets in parts])


def predicting_positions(labels_BT: Tensor) -> Tensor:
    """Return the positions whose *next* token is labelled in some row: all that need logits. Shape (K,)."""
    return (labels_BT[:, 1:] != IGNORE).any(0).nonzero().squeeze(-1)


def response_logps(
    logits_BKV: Tensor, labels_BT: Tensor, positions_K: Tensor, chunk: int = CHUNK, as_host: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the summed log-prob of each row's labelled tokens.

    Args:
        logits_BKV: Logits at `positions_K`, any float dtype.
        labels_BT: Token ids of the response, `IGNORE` elsewhere, aligned with the input (not shifted).
        positions_K: From `predicting_positions(labels_BT)`: the logits at position t predict the label at t + 1.
        chunk: Tokens whose fp32 logits exist at a time.
        as_host: By the operations of the host's `get_batch_logps`, in their order: the same bits.

    Returns:
        Sum per row in nats, fp32, shape (B,), and the number of labelled tokens per row, shape (B,).
    """
    targets_BK = labels_BT[:, positions_K + 1]
    mask_BK, of = targets_BK != IGNORE, _by_log_softmax if as_host else _by_logsumexp
    logps_BK = torch.zeros_like(targets_BK, dtype=torch.float32)
    logps_BK = logps_BK.masked_scatter(mask_BK, token_logps(logits_BKV[mask_BK], targets_BK[mask_BK], chunk, of))
    counts_B = mask_BK.sum(-1)
    if as_host:  # which adds up all positions
        logps_BK = logps_BK.new_zeros(labels_BT[:, 1:].shape).index_copy(1, positions_K, logps_BK)
    return logps_BK.sum(-1), counts_B
