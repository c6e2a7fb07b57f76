"""The mathematics of SoLoPO (arXiv:2505.11166) and LongPO (arXiv:2502.13922), as pure functions of log-probs.

Suffix `_B`: one value per sample, fp32, nats. "logps" below are what the loss in use works on: the *sum* over the
response's tokens for `sigmoid` (DPO) and `hinge` (SLiC), the *mean* per token for `ipo`, `simpo` and `orpo`, exactly as
the host computes them. Nothing is reduced over the batch here and nothing of LLaMA-Factory is imported.

    L_SoLoPO = L_PO(x_short; y_w, y_l) + alpha * s(r(x_short, y_w) - r(x_long, y_w))                      (eq. 9)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_LOGP = -1e-7  # fp32: the nearest a mean log-prob may come to 0 before odds p/(1-p) lose all precision


def log_odds(avg_logps_B: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean token log-prob): the reward of ORPO (arXiv:2403.07691, eq. 4).

    log(1 - exp(x)) is taken as log(-expm1(x)) near 0 and log1p(-exp(x)) far from it; both branches see inputs on
    which value *and* gradient are finite, since `where` multiplies the other branch's gradient by 0, and 0 * inf = NaN.
    Values above `MAX_LOGP` count as `MAX_LOGP` and get no gradient through the odds.
    """
    x_B = avg_logps_B.clamp(max=MAX_LOGP)
    near_B = x_B > -math.log(2)
    log1mexp_near_B = torch.log(-torch.expm1(x_B.where(near_B, -math.log(2))))
    log1mexp_far_B = torch.log1p(-torch.exp(x_B.where(~near_B, -math.log(2))))
    return x_B - log1mexp_near_B.where(near_B, log1mexp_far_B)


# ---- L_PO: the preference loss on the short pair. chosen, rejected, and the reference's for the losses that have one


def dpo(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, beta, smoothing=0.0, **_):
    """DPO (arXiv:2305.18290, eq. 7): -log sigma(beta * margin), with cDPO's label smoothing as in the host."""
    margin_B = (chosen_B - rejected_B) - (ref_chosen_B - ref_rejected_B)
    return -F.logsigmoid(beta * margin_B) * (1 - smoothing) - F.logsigmoid(-beta * margin_B) * smoothing


def ipo(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, beta, **_):
    """IPO (arXiv:2310.12036, eq. 17): (margin - 1 / (2 beta))^2 on mean log-probs per token."""
    return (((chosen_B - rejected_B) - (ref_chosen_B - ref_rejected_B)) - 1 / (2 * beta)) ** 2


def slic(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, beta, **_):
    """SLiC hinge (arXiv:2305.10425) in the host's form, relative to the reference: max(0, 1 - beta * margin)."""
    return torch.relu(1 - beta * ((chosen_B - rejected_B) - (ref_chosen_B - ref_rejected_B)))


def simpo(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, beta, gamma=0.0, **_):
    """SimPO (arXiv:2405.14734, eq. 6): -log sigma(beta * margin - gamma) on mean log-probs, no reference."""
    return -F.logsigmoid(beta * ((chosen_B - rejected_B) - gamma / beta))


def orpo(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, beta, **_):
    """ORPO (arXiv:2403.07691, eq. 6 and 7): NLL of the chosen response plus beta times the odds-ratio loss."""
    return -chosen_B - beta * F.logsigmoid(log_odds(chosen_B) - log_odds(rejected_B))


PO_LOSSES = {"sigmoid": dpo, "ipo": ipo, "hinge": slic, "simpo": simpo, "orpo": orpo}


# ---- the alignment term: the same response, the same policy, with and without irrelevant context


def reward(pref_loss: str, logps_B: Tensor, beta: float) -> Tensor:
    """The reward r(x, y) that SoLo-RA aligns, in the scale in which it enters the preference loss.

    beta * logps for `sigmoid`, `hinge` and `simpo`; logps for `ipo`; log-odds for `orpo`. The reference's part of the
    reward never sees the long context and is constant, so it cancels in the difference and is left out (paper, 2.3).
    """
    if pref_loss == "orpo":
        return log_odds(logps_B)
    return logps_B if pref_loss == "ipo" else beta * logps_B


def penalty(lost_B: Tensor, kind: str, pref_loss: str) -> Tensor:
    """s(t) for a reward lost on the way from the short to the long context, per sample, >= 0, 0 at 0.

    Args:
        lost_B: r(x_short, y) - r(x_long, y). Shape (B,).
        kind: `auto` is the s that bounds the preference loss in use (docs/theory.md): 2 t^2 for `ipo`, |t| otherwise;
            `abs` is |t|, `squared` t^2, `drop` max(0, t).
    """
    if kind == "drop":
        return torch.relu(lost_B)
    if kind == "squared":
        return lost_B**2
    return 2 * lost_B**2 if kind == "auto" and pref_loss == "ipo" else lost_B.abs()


def alignment(
    short_B: Tensor,
    long_B: Tensor,
    pref_loss: str,
    beta: float,
    align="reward",
    kind="auto",
    detach_short=False,
    rise=False,
) -> Tensor:
    """SoLo-RA (eq. 9) or SoLo-KL (eq. 10) for one response, per sample, not reduced and not yet times alpha.

    Args:
        short_B: logps of the response given the short context, as `L_PO` uses them (see the top of the file).
        long_B: logps of the same tokens given the long context.
        align: `reward` penalises a changed reward, `logp` a changed log-prob. Where the reward is beta times that,
            |t| of the one is beta |t| of the other: alpha on rewards is alpha * beta on log-probs.
        detach_short: The short side is a constant target.
        rise: For `drop` on a *rejected* response, where a reward gained in the long context is what costs
            (the one-sided bound: f(long margin) <= f(short margin) + chosen's loss + rejected's gain).

    Returns:
        Shape (B,); exactly 0, with zero gradient, where both contexts give the same log-probs.
    """
    short_B = short_B.detach() if detach_short else short_B
    if align == "reward":
        short_B, long_B = reward(pref_loss, short_B, beta), reward(pref_loss, long_B, beta)
    lost_B = long_B - short_B if rise else short_B - long_B
    return penalty(lost_B, kind, pref_loss)


# ---- the rival


def longpo(long_chosen_B, long_rejected_B, ref_short_chosen_B, ref_short_rejected_B, beta) -> Tensor:
    """LongPO's preference term (arXiv:2502.13922): DPO whose reference saw the *short* prompt.

    r(y) = beta * log(pi(y | x_long) / pi_ref(y | x_short)); sums over tokens. The whole objective is
    NLL + lambda * this, the NLL being the mean over all tokens of `x_long y_w`, context included.
    """
    return dpo(long_chosen_B, long_rejected_B, ref_short_chosen_B, ref_short_rejected_B, beta)
