"""The divergence of two distributions over the next word, token by token, with exact gradients.

A teacher's logits are constants, a student's get gradients. What is large, both in fp32 over the vocabulary, exists for
some positions at a time and is made again in backward; in between nothing is kept but the logits that there are anyway.

Shape suffixes: N tokens, M rows of logits among which they are, V vocabulary, K likeliest words, C classes (all V
words, or K and one for the rest).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .args import CHUNK
from .qa.files import replacing


class Rows(NamedTuple):
    """Hold a teacher as logits (M, V), any float dtype, and which of their rows each token has, (N,)."""

    logits_MV: Tensor
    at_N: Tensor


class Top(NamedTuple):
    """Hold a teacher as its likeliest words, ids (N, K), and log-probs (N, K + 1), nats; the last is of all others."""

    ids_NK: Tensor
    logps_NC: Tensor


class Form(NamedTuple):
    """Say which divergence it is.

    Attributes:
        kind: `forward`, KL(teacher || student); `reverse`, KL(student || teacher); `jsd`, the mean of both sides' KL to
            their mixture: the generalized JSD of GKD (arXiv:2306.13649, eq. 1) at beta 1/2.
        temperature: By which both sides' logits are divided; the divergence is not multiplied by its square.
        top: The teacher's likeliest words, beside which all others are one class; 0 takes each for itself. It is a
            lower bound of the divergence over all words.
        chunk: Rows of fp32 logits at a time, the teacher's and the student's together.
    """

    kind: str = "forward"
    temperature: float = 1.0
    top: int = 0
    chunk: int = CHUNK


def divergence(teacher_NC: Tensor, student_NC: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return the divergence of two sets of log-probs, (N,), nats, and its gradient in the student's logits, (N, C).

    Both are exactly 0 where the two are equal.
    """
    apart_NC, q_NC = teacher_NC - student_NC, student_NC.exp()
    if kind == "forward":
        p_NC = teacher_NC.exp()
        return (p_NC * apart_NC).sum(-1), q_NC - p_NC
    if kind == "reverse":
        value_N = -(q_NC * apart_NC).sum(-1)
        return value_N, -q_NC * (apart_NC + value_N[:, None])
    # log(mixture / q) = log((1 + e^apart) / 2), which neither overflows so nor cancels near 0
    over_NC = apart_NC.relu() + torch.log1p(torch.expm1(-apart_NC.abs()) / 2)
    of_q_N = -(q_NC * over_NC).sum(-1)
    value_N = (teacher_NC.exp() * (apart_NC - over_NC)).sum(-1) / 2 + of_q_N / 2
    return value_N, -q_NC * (over_NC + of_q_N[:, None]) / 2


def top_of(logits_NV: Tensor, k: int) -> Top:
    """Return the `k` likeliest words of logits, which are fp32 or float64."""
    ids_NK = logits_NV.topk(min(k, logits_NV.shape[-1])).indices
    return Top(ids_NK, _classes(logits_NV, ids_NK)[0].log_softmax(-1))


def top_of_rows(logits_MV: Tensor, at_N: Tensor, k: int, chunk: int) -> Top:
    """Return the `k` likeliest words of some rows, of which `chunk` are fp32 at a time."""
    parts = [top_of(_raised(logits_MV[at_n]), k) for at_n in at_N.split(chunk)]
    return Top(*(torch.cat(part) for part in zip(*parts, strict=True)))


def save_top(path: Path, top: Top) -> None:
    """Write a teacher to a file, at once: 4 bytes for each word and 4 for each log-prob. A lost one is made anew."""
    with replacing(path, shared=True, lasts=False) as file:
        np.savez(file, ids=top.ids_NK.int().cpu().numpy(), logps=top.logps_NC.float().cpu().numpy())


def load_top(path: str | Path) -> Top:
    """Read what `save_top` wrote."""
    with np.load(path) as file:
        return Top(torch.from_numpy(file["ids"]).long(), torch.from_numpy(file["logps"]))


def token_kl(student_MV: Tensor, at_N: Tensor, teacher: Rows | Top, form: Form) -> Tensor:
    """Return the divergence of the student from the teacher at each token, fp32 (of float64: float64), nats, (N,).

    Args:
        student_MV: Logits, any float dtype, with gradient.
        at_N: Which row each token has, none twice.
        teacher: Of the same tokens in the same order; it gets no gradient.
        form: The divergence; `top` does not touch a teacher that is a `Top` already.
    """
    return _TokenKL.apply(student_MV, at_N, teacher, form)


class _TokenKL(torch.autograd.Function):
    """Autograd's own would keep fp32 copies of all rows, or, by checkpoints, give rounding for a gradient of 0."""

    @staticmethod
    def forward(ctx, student_MV, at_N, teacher, form):
        ctx.save_for_backward(student_MV, at_N, *(x.detach() for x in teacher))
        ctx.form, ctx.kind_of_teacher = form, type(teacher)
        values = [x[2] for x in _by_chunk(student_MV, at_N, teacher, form)]
        return torch.cat(values) if values else _raised(student_MV[:0, 0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N):
        student_MV, at_N, *teacher = ctx.saved_tensors
        grad_MV, done = torch.zeros_like(student_MV), 0
        for at_n, ids_nK, _, slope_nC, share_nV in _by_chunk(student_MV, at_N, ctx.kind_of_teacher(*teacher), ctx.form):
            slope_nC = slope_nC * grad_N[done : done + len(at_n), None] / ctx.form.temperature
            done += len(at_n)
            if ids_nK is not None:  # the rest's part is dealt out among its words
                slope_nC = (share_nV * slope_nC[:, -1:]).scatter(-1, ids_nK, slope_nC[:, :-1])
            grad_MV[at_n] = slope_nC.to(grad_MV.dtype)
        return grad_MV, None, None, None


def _by_chunk(student_MV: Tensor, at_N: Tensor, teacher: Rows | Top, form: Form) -> Iterator[tuple]:
    """Yield of some tokens at a time: their rows, the classes' words (or None), value, slope and shares of the rest."""
    size = max(1, form.chunk // 2)
    of_teacher = [teacher.at_N] if isinstance(teacher, Rows) else teacher
    for at_n, *part in zip(*(x.split(size) for x in (at_N, *of_teacher)), strict=True):
        if not len(at_n):
            continue
        student_nV = _raised(student_MV[at_n]) / form.temperature
        if isinstance(teacher, Top):
            ids_nK, teacher_nC = part
        else:
            teacher_nV = _raised(teacher.logits_MV[part[0]]) / form.temperature
            some = 0 < form.top < teacher_nV.shape[-1]
            ids_nK, teacher_nC = top_of(teacher_nV, form.top) if some else (None, teacher_nV.log_softmax(-1))
        classes_nC, share_nV = (student_nV, None) if ids_nK is None else _classes(student_nV, ids_nK)
        yield at_n, ids_nK, *divergence(teacher_nC, classes_nC.log_softmax(-1), form.kind), share_nV


def _classes(logits_NV: Tensor, ids_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits of the given words and one of all others, (N, K + 1), and each other's share of the latter."""
    never = torch.finfo(logits_NV.dtype).min / 2  # a number, so that no others at all are no NaN
    others_NV = logits_NV.scatter(-1, ids_NK, never)
    rest_N1 = others_NV.logsumexp(-1, keepdim=True)
    return torch.cat([logits_NV.gather(-1, ids_NK), rest_N1], dim=-1), (others_NV - rest_N1).exp()


def _raised(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
