"""Log-probabilities of given tokens under given logits. Pure PyTorch.

Shape suffixes: B sequences, T tokens, K kept positions, V vocabulary.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .args import CHUNK

IGNORE = -100  # label of a token that is not predicted (the host's IGNORE_INDEX)


def _token_logps(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    logits_NV = logits_NV.float()
    return logits_NV.gather(-1, targets_N[:, None]).squeeze(-1) - logits_NV.logsumexp(-1)


def _hosts_token_logps(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return logits_NV.float().log_softmax(-1).gather(-1, targets_N[:, None]).squeeze(-1)


def token_logps(logits_NV: Tensor, targets_N: Tensor, chunk: int = CHUNK, of=_token_logps) -> Tensor:
    """Return log softmax(logits)[target], fp32, nats, (N,); fp32 copies are made per chunk and again in backward."""
    if len(targets_N) <= chunk:
        return of(logits_NV, targets_N)
    parts = zip(logits_NV.split(chunk), targets_N.split(chunk), strict=True)
    return torch.cat([checkpoint(of, logits, targets, use_reentrant=False) for logits, targets in parts])


class ResponseLogits:
    """Stand in the host's `concatenated_forward` for the logits (B, T, V) of a batch, of which those kept alone exist.

    The host casts them to fp32, cuts off the last position, and gathers each position's label from their log-softmax.
    Here `gather` does all that, chunk by chunk and by the same operations: log-probs are the host's bit for bit, and 0
    at a position that predicts no label, where the host multiplies by 0. Anything else that is asked of it raises.
    """

    def __init__(self, logits_BKV: Tensor, positions_K: Tensor, tokens: int, chunk: int = CHUNK):
        self.logits_BKV, self.positions_K, self.chunk = logits_BKV, positions_K, chunk
        self.shape = torch.Size([len(logits_BKV), tokens, logits_BKV.shape[-1]])

    def to(self, *_) -> "ResponseLogits":
        """Return itself, as a slice and the log-softmax are itself: all that is left to `gather`."""
        return self

    __getitem__ = log_softmax = to

    def split(self, size: int, dim: int = 0) -> tuple[Tensor, ...]:
        """Return the logits that exist, parted by row."""
        return self.logits_BKV.split(size, dim)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """Do `torch.gather(self, dim=2, index)`, index (B, T - 1, 1)."""
        if function is not torch.gather:
            return NotImplemented
        logits, index = args[0], kwargs["index"]
        targets = index[:, logits.positions_K].flatten()
        logps = token_logps(logits.logits_BKV.flatten(0, 1), targets, logits.chunk, _hosts_token_logps)
        zeros = torch.zeros(index.shape, device=logps.device)
        return zeros.index_copy(1, logits.positions_K, logps.view(len(index), -1, 1))


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
    targets_BK = labels_BT[:, positions_K + 1]
    mask_BK = targets_BK != IGNORE
    logps_BK = torch.zeros_like(targets_BK, dtype=torch.float32)
    logps_BK = logps_BK.masked_scatter(mask_BK, token_logps(logits_BKV[mask_BK], targets_BK[mask_BK], chunk))
    return logps_BK.sum(-1), mask_BK.sum(-1)
