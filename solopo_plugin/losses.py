"""The mathematics of SoLoPO (arXiv:2505.11166) and LongPO (arXiv:2502.13922), as pure functions of log-probs.

Read `solopo` first: it is the whole objective, and all else here are its terms.

Suffix `_B`: one value per sample, fp32, nats. "logps" below are what the loss in use works on: the *sum* over the
response's tokens for `sigmoid` (DPO) and `hinge` (SLiC), the *mean* per token for `ipo`, `simpo` and `orpo`, exactly as
the host computes them. Nothing is reduced over the batch here and nothing of LLaMA-Factory is imported. Of
several rejected responses each makes a pair that is a sample of its own here; `mean_of_pairs` brings them together.

    L_SoLoPO = L_PO(x_short; y_w, y_l) + alpha * s(r(x_short, y_w) - r(x_long, y_w))                      (eq. 9)
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LENGTH_NORMALISED = ("ipo", "simpo", "orpo")  # losses on the mean log-prob per token; the others use the sum
MAX_LOGP = -1e-7  # fp32: the nearest a mean log-prob may come to 0 before odds p/(1-p) lose all precision


class LogProbs(NamedTuple):
    """Hold what an objective needs of a step's forwards, each (B,), fp32, nats, as the loss in use has them.

    For `solopo` the pair is given the short prompt, for `longpo` the long one; the reference's always the short one.
    `nll_B` is always a mean: of the chosen response or, for `longpo`, of all of `x_long y_w`. So are `distill_B`, the
    divergence of the policy given the long prompt from itself given the short one, and `anchor_B`, that of the policy
    given the short prompt from the reference (distill.py): over a response's tokens, added over the aligned responses.
    """

    chosen_B: Tensor
    rejected_B: Tensor
    nll_B: Tensor
    long_chosen_B: Tensor | None = None
    long_rejected_B: Tensor | None = None
    ref_chosen_B: Tensor | None = None
    ref_rejected_B: Tensor | None = None
    distill_B: Tensor | None = None
    anchor_B: Tensor | None = None


ANCHOR = "solopo/anchor_kl"
Parts = dict[str, Tensor]  # what is logged of a step, by its name in the log: (B,), fp32, without gradient


def solopo(logps: LogProbs, spec) -> tuple[Tensor, Parts]:
    """Return SoLoPO's loss: the preference loss on the short pair plus alpha times the alignment with the long context.

    Args:
        logps: Of the policy and, where `pref_loss` has one, of the reference.
        spec: The recipe's keys as attributes: those of `SoloArguments`, and the host's `pref_loss`, `pref_beta`,
            `pref_ftx`, `simpo_gamma` and `dpo_label_smoothing`.

    Returns:
        The loss, shape (B,), with gradient, and its parts.
    """
    pair = (logps.chosen_B, logps.rejected_B, logps.ref_chosen_B, logps.ref_rejected_B)
    known = dict(beta=spec.pref_beta, gamma=spec.simpo_gamma, smoothing=spec.dpo_label_smoothing)
    po_B = PO_LOSSES[spec.pref_loss](*pair, **known)
    if spec.pref_ftx > 1e-6:  # the host's threshold
        po_B = po_B + spec.pref_ftx * logps.nll_B

    assert logps.long_chosen_B is not None  # for the type checker: only LongPO has none
    form = (spec.pref_loss, spec.pref_beta, spec.solopo_align, spec.solopo_penalty, spec.solopo_detach_short)
    if logps.distill_B is not None:  # `solopo_align: distill`
        align_B = logps.distill_B
    else:
        align_B = alignment(logps.chosen_B, logps.long_chosen_B, *form)
        if logps.long_rejected_B is not None:
            align_B = align_B + alignment(logps.rejected_B, logps.long_rejected_B, *form, rise=True)
    loss_B = po_B + spec.solopo_alpha * align_B if spec.solopo_alpha else po_B
    return _anchored(loss_B, logps, spec), _parts(logps, spec.pref_beta, po_B, align_B, *_rewards(logps, spec))


def distill(logps: LogProbs, spec) -> tuple[Tensor, Parts]:
    """Return self-distillation alone: the divergence from the policy given the short context, plus `pref_ftx` NLLs.

    As OPSDL (arXiv:2604.17535) has it, but on the rows' responses, not on sampled ones; in its direction with
    `solopo_distill_kl: reverse`.

    Args:
        logps: Of the policy.
        spec: The recipe's keys as attributes: `pref_ftx`, `solopo_anchor`, and `pref_loss` and `pref_beta` for the log.

    Returns:
        The loss, shape (B,), with gradient, and its parts.
    """
    assert logps.distill_B is not None  # for the type checker
    sft_B = spec.pref_ftx * logps.nll_B if spec.pref_ftx > 1e-6 else torch.zeros_like(logps.nll_B)
    loss_B = _anchored(logps.distill_B + sft_B, logps, spec)
    return loss_B, _parts(logps, spec.pref_beta, sft_B, logps.distill_B, *_rewards(logps, spec))


def _anchored(loss_B: Tensor, logps: LogProbs, spec) -> Tensor:
    return loss_B if logps.anchor_B is None else loss_B + spec.solopo_anchor * logps.anchor_B


@torch.no_grad()
def _rewards(logps: LogProbs, spec) -> list[Tensor]:
    assert logps.long_chosen_B is not None  # for the type checker: only LongPO has none
    return [reward(spec.pref_loss, side_B, spec.pref_beta) for side_B in (logps.chosen_B, logps.long_chosen_B)]


def longpo(logps: LogProbs, spec) -> tuple[Tensor, Parts]:
    """Return LongPO's loss (arXiv:2502.13922): NLL of `x_long y_w` plus lambda times DPO, its reference on `x_short`.

    r(y) = beta * log(pi(y | x_long) / pi_ref(y | x_short)); sums over tokens. The NLL is the mean over all tokens,
    context included.

    Args:
        logps: Of the policy given the long prompt, and of the reference given the short one.
        spec: The recipe's keys as attributes: `pref_beta` and `solopo_longpo_lambda`.

    Returns:
        The loss, shape (B,), with gradient, and its parts; nothing is aligned.
    """
    po_B = dpo(logps.chosen_B, logps.rejected_B, logps.ref_chosen_B, logps.ref_rejected_B, spec.pref_beta)
    with torch.no_grad():
        rewards = (spec.pref_beta * logps.ref_chosen_B, spec.pref_beta * logps.chosen_B)
    parts = _parts(logps, spec.pref_beta, po_B, torch.zeros_like(po_B), *rewards)
    return logps.nll_B + spec.solopo_longpo_lambda * po_B, parts


def mean_of_pairs(x_P: Tensor, pairs: list[int]) -> Tensor:
    """Return the mean over each sample's pairs, in order `pairs` many; shape (B, ...) of (P, ...).

    Of losses it is the preference loss averaged over the rejected responses (LOGO, arXiv:2410.18533, eq. 4), and what
    belongs to the chosen one alone, the same in each pair, once.
    """
    return torch.stack([of_sample.mean(0) for of_sample in x_P.split(pairs)])


@torch.no_grad()
def _parts(logps: LogProbs, beta: float, po_B, align_B, reward_short_B, reward_long_B) -> Parts:
    """Return what is logged, as docs/training.md defines it, the same set in the same order; `ANCHOR` where it is."""
    chosen_B, rejected_B, nll_B, *_, ref_chosen_B, ref_rejected_B, _, anchor_B = logps
    reward_chosen_B = beta * (chosen_B if ref_chosen_B is None else chosen_B - ref_chosen_B)
    reward_rejected_B = beta * (rejected_B if ref_rejected_B is None else rejected_B - ref_rejected_B)
    parts = {
        "rewards/chosen": reward_chosen_B,
        "rewards/rejected": reward_rejected_B,
        "rewards/accuracies": reward_chosen_B > reward_rejected_B,
        "rewards/margins": reward_chosen_B - reward_rejected_B,
        "logps/chosen": chosen_B,
        "logps/rejected": rejected_B,
        "solopo/po_loss": po_B,
        "solopo/align_loss": align_B,
        "solopo/reward_short": reward_short_B,
        "solopo/reward_long": reward_long_B,
        "solopo/reward_gap": (reward_short_B - reward_long_B).abs(),
        "solopo/nll": nll_B,
    } | ({} if anchor_B is None else {ANCHOR: anchor_B})
    return {name: part_B.detach().float() for name, part_B in parts.items()}


OBJECTIVES = {"solopo": solopo, "longpo": longpo, "distill": distill}
METRICS = tuple(_parts(LogProbs(*[torch.zeros(1)] * 3), 1.0, *[torch.zeros(1)] * 4))  # the names of all parts


# ---- L_PO: the preference loss on the short pair. chosen, rejected, and the reference's for the losses that have one


def log_odds(avg_logps_B: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of p = exp(mean token log-prob): the reward of ORPO (arXiv:2403.07691, eq. 4).

    log(1 - exp(x)) is taken as log(-expm1(x)) near 0 and log1p(-exp(x)) far from it; both branches see inputs on
    which value *and* gradient are finite, since `where` multiplies the other branch's gradient by 0, and 0 * inf = NaN.
    Values above `MAX_LOGP` count as `MAX_LOGP` and get no gradient through the odds.
    """
    x_B = avg_logps_B.clamp(max=MAX_LOGP)
    near_B = x_B > -math.log(2)
    log1mexp_near_B = torch.log(-torch.expm1(x_B.where(near_B, -math.log(2))))
    log1mexp_far_B = torch.log1p(-torch.exp(x_B.where(~near_B, -math.log(2))))
    return x_B - log1mexp_near_B.where(near_B, log1mexp_far_B)


def dpo(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, beta, smoothing=0.0, **_):
    """Return DPO's loss (arXiv:2305.18290, eq. 7), -log sigma(beta * margin), label-smoothed (cDPO) as in the host."""
    margin_B = (chosen_B - rejected_B) - (ref_chosen_B - ref_rejected_B)
    return -F.logsigmoid(beta * margin_B) * (1 - smoothing) - F.logsigmoid(-beta * margin_B) * smoothing


def ipo(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, beta, **_):
    """Return IPO's loss (arXiv:2310.12036, eq. 17), (margin - 1 / (2 beta))^2, on mean log-probs per token."""
    return (((chosen_B - rejected_B) - (ref_chosen_B - ref_rejected_B)) - 1 / (2 * beta)) ** 2


def slic(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, beta, **_):
    """Return SLiC's hinge (arXiv:2305.10425) in the host's form: max(0, 1 - beta * margin), the margin as in DPO."""
    return torch.relu(1 - beta * ((chosen_B - rejected_B) - (ref_chosen_B - ref_rejected_B)))


def simpo(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, beta, gamma=0.0, **_):
    """Return SimPO's loss (arXiv:2405.14734, eq. 6), -log sigma(beta * margin - gamma), on means, no reference."""
    return -F.logsigmoid(beta * ((chosen_B - rejected_B) - gamma / beta))


def orpo(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, beta, **_):
    """Return ORPO's loss (arXiv:2403.07691, eq. 6 and 7): NLL of the chosen answer plus beta times the odds' loss."""
    return -chosen_B - beta * F.logsigmoid(log_odds(chosen_B) - log_odds(rejected_B))


PO_LOSSES: dict[str, Callable[..., Tensor]] = {"sigmoid": dpo, "ipo": ipo, "hinge": slic, "simpo": simpo, "orpo": orpo}


# ---- the alignment term: the same response, the same policy, with and without irrelevant context


def reward(pref_loss: str, logps_B: Tensor, beta: float) -> Tensor:
    """Return the reward r(x, y) that SoLo-RA aligns, in the scale in which it enters the preference loss.

    beta * logps for `sigmoid`, `hinge` and `simpo`; logps for `ipo`; log-odds for `orpo`. The reference's part of the
    reward never sees the long context and is constant, so it cancels in the difference and is left out (paper, 2.3).
    """
    if pref_loss == "orpo":
        return log_odds(logps_B)
    return logps_B if pref_loss == "ipo" else beta * logps_B


def penalty(lost_B: Tensor, kind: str, pref_loss: str) -> Tensor:
    """Return s(t) for a reward lost on the way from the short to the long context, per sample, >= 0, 0 at 0.

    Args:
        lost_B: t = r(x_short, y) - r(x_long, y). Shape (B,).
        kind: `auto` is the s that bounds the preference loss in use (docs/theory.md): 2 t^2 for `ipo`, |t| otherwise;
            `abs` is |t|, `squared` t^2, `drop` max(0, t).
        pref_loss: The preference loss in use.
    """
    if kind == "drop":
        return torch.relu(lost_B)
    if kind == "squared":
        return lost_B**2
    return 2 * lost_B**2 if kind == "auto" and pref_loss == "ipo" else lost_B.abs()


def alignment(
    short_B: Tensor, long_B: Tensor, pref_loss, beta: float, align="reward", kind="auto", detach_short=False, rise=False
) -> Tensor:
    """Return SoLo-RA (eq. 9) or SoLo-KL (eq. 10) for one response, per sample, not reduced and not yet times alpha.

    Args:
        short_B: logps of the response given the short context, as `L_PO` uses them (see the top of the file).
        long_B: logps of the same tokens given the long context.
        pref_loss: The preference loss in use, whose reward is aligned.
        beta: Its beta.
        align: `reward` penalises a changed reward, `logp` a changed log-prob. Where the reward is beta times that,
            |t| of the one is beta |t| of the other: alpha on rewards is alpha * beta on log-probs.
        kind: The s(t) of `penalty`.
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
