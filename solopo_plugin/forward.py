"""Log-probabilities of a step, in two forms: all in one forward of a packed row, or in two stages of padded batches.

A form takes a model and a batch of its collator. `policy` gives all that the objective needs of the policy, `pair` the
log-probs of the short pair, as a reference is asked for them. "As the loss has them": summed over the response's
tokens, or their mean for the losses that are length-normalised.

Shape suffixes: B samples (of log-probs pairs, as `data.py` has them), T tokens, K kept positions, N scored spans,
V vocabulary.
"""

import inspect
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import torch
from llamafactory.extras import logging
from torch import Tensor, nn

from . import attention
from .data import SoloCollator
from .distill import Form, Rows, Top, token_kl, top_of_rows
from .logps import IGNORE, predicting_positions, response_logps, token_logps
from .losses import LENGTH_NORMALISED, LogProbs
from .packing import PackedCollator
from .sequence_parallel import Part, Ranks

ANCHOR_TOP = 64  # likeliest words of the reference, beside which the anchor takes all others as one; ours
logger = logging.get_logger(f"llamafactory.{__name__}")  # under the host's logger, which has the handlers


class Pair(NamedTuple):
    """Hold log-probs of the short pair, each (B,), as the loss has them, and what the anchor needs of the reference."""

    chosen_B: Tensor
    rejected_B: Tensor
    top: Top | None = None


def distill_form(args) -> Form:
    """Return the divergence that a recipe asks for."""
    of_recipe = args.solopo_distill_kl, args.solopo_distill_temperature, args.solopo_distill_topk
    return Form(*of_recipe, args.solopo_logp_chunk)


class ScoredRow(NamedTuple):
    """Hold what one forward of a packed row gives."""

    logps: dict[str, Tensor]  # (B,) of the row's spans by name, as the loss has them
    means: dict[str, Tensor]  # the same per token
    logits_KV: Tensor
    part: Part | None  # which of the row this rank has scored, where ranks share it


class Packed:
    """Run one forward of one row, in which a shared prompt stands once; see packing.py."""

    name = "packed"

    def __init__(self, args, *models: nn.Module | None, ranks: Ranks | None = None):
        """Let the models, policy and reference, take packed rows; `ranks` is None where none share a row."""
        self.args, self.ranks = args, ranks
        needs = dict(reference=args.use_ref_model, distill=args.distills, anchor=args.solopo_anchor > 0)
        self.collator = PackedCollator(longpo=args.longpo, long_pair=args.long_pair, **needs)
        for model in filter(None, models):
            attention.prepare(model)

    def policy(self, model, batch: dict, anchor: Top | None = None) -> LogProbs:
        """Return all log-probs of the policy; `nll_B` is of the whole sequence where the row has one scored."""
        packed, args = batch["policy"], self.args
        row = self._score(model, packed)
        logps, nll_B = row.logps, -row.means.get("sequence", row.means["chosen"])
        longs = logps.get("long_chosen"), logps.get("long_rejected")
        distill_P = self._kl(row, packed["distilled"], None, distill_form(args)) if args.distills else None
        anchor_P = self._kl(row, packed["anchored"], anchor, Form(chunk=args.solopo_logp_chunk)) if anchor else None
        of_policy = LogProbs(logps["chosen"], logps["rejected"], nll_B, *longs)
        return of_policy._replace(distill_B=distill_P, anchor_B=anchor_P)

    def pair(self, model, batch: dict) -> Pair:
        """Return a model's log-probs of the short pair."""
        packed = batch["reference"]
        row, top = self._score(model, packed), None
        if self.args.solopo_anchor:
            (at_N,), part = packed["anchored"]["rows"], row.part
            own_n = at_N if part is None else part.own(at_N)[1]
            top = top_of_rows(row.logits_KV, own_n, ANCHOR_TOP, self.args.solopo_logp_chunk)
            top = top if part is None else Top(*(part.whole(x, at_N) for x in top))
        return Pair(row.logps["chosen"], row.logps["rejected"], top)

    def _kl(self, row: ScoredRow, found: dict, teacher: Top | None, form: Form) -> Tensor:
        """Average a divergence over each response's tokens, 0 of none, added over a pair's responses: (P,)."""
        rows, counts, logits_KV, part = found["rows"], found["counts"], row.logits_KV, row.part
        totals = torch.tensor(counts, device=logits_KV.device).clamp(min=1)
        if part is not None:  # the same tokens of both sides: responses of one length are dealt out alike
            mine_N, _ = part.own(rows[-1])
            rows = [part.own(at_N)[1] for at_N in rows]
            counts = [int(mine.sum()) for mine in mine_N.split(counts)]
            teacher = teacher and Top(*(x[mine_N] for x in teacher))
        kl_N = token_kl(logits_KV, rows[-1], teacher or Rows(logits_KV, rows[0]), form)
        sums = torch.stack([tokens.sum() for tokens in kl_N.split(counts)])
        sums = sums if part is None else part.ranks.total(sums)
        return (sums / totals)[found["responses_SP"]].sum(0)

    def _score(self, model, packed: dict) -> ScoredRow:
        """Run a packed row, or this rank's part of one that is shared."""
        row = self.ranks.part_of(packed) if self.ranks else packed
        logits_1KV = model(
            input_ids=row["input_ids"], position_ids=row["position_ids"], logits_to_keep=row["positions_K"],
            use_cache=False, return_dict=True, solopo_segments=row["plan"],
        ).logits  # fmt: skip
        logps_K = token_logps(logits_1KV[0], row["targets_K"], self.args.solopo_logp_chunk)
        sums_N = torch.stack([span.sum() for span in logps_K.split(row["counts"])])
        if self.ranks:
            sums_N = self.ranks.total(sums_N)
        means_N = sums_N / packed["counts_N"]
        sums, means = ({name: x_N[at_B] for name, at_B in packed["spans"].items()} for x_N in (sums_N, means_N))
        logps = means if self.args.pref_loss in LENGTH_NORMALISED else sums
        return ScoredRow(logps, means, logits_1KV[0], row["plan"].part)


class Scored(NamedTuple):
    """Hold what one forward of padded sequences gives."""

    logps_B: Tensor  # of the responses, as the loss has them
    means_B: Tensor  # the same per token
    logits_BKV: Tensor
    mask_BK: Tensor  # which of these predict a token of a response


class TwoStages:
    """Run the short pair as in the host's DPO, then the long sequences; for LongPO the long pair alone."""

    name = "two_stage"

    def __init__(self, args, model: nn.Module, may_skip: Callable, pad_id: int):
        """Take who says of `long_is_short_B` that no long forward is needed: for all ranks, as ZeRO-3 needs it."""
        self.args, self.may_skip = args, may_skip
        self.collator = SoloCollator(pad_id, args.long_pair, args.longpo)
        base = attention.base_of(model)
        self.keeps_logits = "logits_to_keep" in inspect.signature(base.forward).parameters
        if not self.keeps_logits:
            logger.warning_rank0(f"{type(base).__name__} has no `logits_to_keep`: both forwards keep all logits.")

    def policy(self, model, batch: dict, anchor: Top | None = None) -> LogProbs:
        """Return all log-probs of the policy.

        Where a sample's long prompt is its short prompt, its long log-prob is the short one itself; where that is so
        for the whole micro-batch on every rank, nothing long is run. With alpha 0 the gap is only measured.
        """
        if self.args.longpo:
            return self._long_pair(model, batch)
        short, chunk, is_long_B = self._score(model, batch), self.args.solopo_logp_chunk, ~batch["long_is_short_B"]
        chosen_B, rejected_B = short.logps_B.chunk(2)
        nll_B, is_long_P, aligned_B = -short.means_B.chunk(2)[0], of_pairs(is_long_B, batch), self._aligned(batch)
        anchor_P = distill_P = teacher = None
        if anchor is not None:
            anchor_P = self._added(self._kl(short, aligned_B, anchor, Form(chunk=chunk))[aligned_B], batch)
        if self.args.distills:
            logits_NV = short.logits_BKV.detach()[short.mask_BK & (aligned_B & is_long_P.repeat(2))[:, None]]
            teacher = Rows(logits_NV, torch.arange(len(logits_NV), device=logits_NV.device))
            distill_P = 0 * chosen_B  # with its graph: where no long forward runs, backward still does
        del short  # its logits
        longs = [chosen_B, rejected_B] if self.args.long_pair else [chosen_B]
        if not self.may_skip(batch["long_is_short_B"]):
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.args.solopo_alpha > 0):
                long = self._score(model, batch, "long_")
                if teacher:
                    is_long = torch.cat([is_long_B, is_long_P])[: len(long.mask_BK)]  # of chosen, then of rejected
                    distill_P = self._added(self._kl(long, is_long, teacher, distill_form(self.args)), batch)
            size = len(is_long_B)
            scored = (of_pairs(long.logps_B[:size], batch), long.logps_B[size:])
            longs = [new_P.where(is_long_P, short_P) for new_P, short_P in zip(scored, longs, strict=False)]
        return LogProbs(chosen_B, rejected_B, nll_B, *longs)._replace(distill_B=distill_P, anchor_B=anchor_P)

    def pair(self, model, batch: dict) -> Pair:
        """Return a model's log-probs of the short pair."""
        short, top = self._score(model, batch), None
        if self.args.solopo_anchor:
            at_N = (short.mask_BK & self._aligned(batch)[:, None]).flatten().nonzero().squeeze(1)
            top = top_of_rows(short.logits_BKV.flatten(0, 1), at_N, ANCHOR_TOP, self.args.solopo_logp_chunk)
        chosen_B, rejected_B = short.logps_B.chunk(2)
        return Pair(chosen_B, rejected_B, top)

    def _score(self, model, batch: dict, side: str = "") -> Scored:
        """Run the short sequences or, as `side`, the `long_` ones, and score their responses."""
        labels_BT = batch[f"{side}labels"]
        positions_K = predicting_positions(labels_BT)
        logits_BKV = self.logits(model, batch, positions_K, side)
        sums_B, counts_B = response_logps(logits_BKV, labels_BT, positions_K, self.args.solopo_logp_chunk, not side)
        means_B = sums_B / counts_B
        logps_B = means_B if self.args.pref_loss in LENGTH_NORMALISED else sums_B
        return Scored(logps_B, means_B, logits_BKV, labels_BT[:, positions_K + 1] != IGNORE)

    def logits(self, model, batch: dict, positions_K: Tensor, side: str = "") -> Tensor:
        """Return logits at the given positions, through the wrapped model, which may be able to make these alone."""
        keep = {"logits_to_keep": positions_K} if self.keeps_logits else {}
        ids, mask = batch[f"{side}input_ids"], batch[f"{side}attention_mask"]
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, return_dict=True, **keep).logits
        return logits if keep else logits[:, positions_K]

    def _aligned(self, batch: dict) -> Tensor:
        """Mark the aligned ones of the short sequences, (2P,): the chosen one, that of a sample's first pair, once."""
        pairs = len(batch["labels"]) // 2
        firsts = {0, *accumulate(batch.get("pairs", [1] * pairs)[:-1])}
        marks = [n in firsts for n in range(pairs)] + [self.args.long_pair] * pairs
        return torch.tensor(marks, device=batch["labels"].device)

    def _kl(self, scored: Scored, rows_B: Tensor, teacher: Top | Rows, form: Form) -> Tensor:
        """Average a divergence over the responses of some rows, 0 in all others, (B,)."""
        mask_BK = scored.mask_BK & rows_B[:, None]
        at_N = mask_BK.flatten().nonzero().squeeze(1)
        kl_N = token_kl(scored.logits_BKV.flatten(0, 1), at_N, teacher, form)
        kl_BK = torch.zeros_like(mask_BK, dtype=kl_N.dtype).masked_scatter(mask_BK, kl_N)
        return kl_BK.sum(-1) / mask_BK.sum(-1).clamp(min=1)

    def _added(self, means_B: Tensor, batch: dict) -> Tensor:
        """Add what aligned responses have, chosen ones of samples, then rejected ones, over each pair: (P,)."""
        size = len(batch["names"])
        return of_pairs(means_B[:size], batch) + (means_B[size:] if self.args.long_pair else 0)

    def _long_pair(self, model, batch: dict) -> LogProbs:
        """Score the pair given the long prompt, and the NLL of all of `x_long y_w`, whose logits are all kept.

        The rejected sequences run by themselves, so that they have logits at their responses only.
        """
        size, chunk, names = len(batch["names"]), self.args.solopo_logp_chunk, ("input_ids", "attention_mask", "labels")
        chosen, rejected = (
            {f"long_{name}": batch[f"long_{name}"][rows] for name in names} for rows in (slice(size), slice(size, None))
        )
        labels_BT, real_BT = chosen["long_labels"], chosen["long_attention_mask"].bool()
        positions_K = torch.arange(labels_BT.shape[1] - 1, device=labels_BT.device)
        logits_BTV = self.logits(model, chosen, positions_K, "long_")
        chosen_B, _ = response_logps(logits_BTV, labels_BT, positions_K, chunk)
        whole_BT = chosen["long_input_ids"].where(real_BT, IGNORE)
        sums_B, counts_B = response_logps(logits_BTV, whole_BT, positions_K, chunk)
        rejected_B = self._score(model, rejected, "long_").logps_B
        return LogProbs(of_pairs(chosen_B, batch), rejected_B, of_pairs(-sums_B / counts_B, batch))


def of_pairs(x_B: Tensor, batch: dict) -> Tensor:
    """Return what the samples have, once for each of their pairs."""
    return x_B.repeat_interleave(torch.tensor(batch["pairs"], device=x_B.device)) if "pairs" in batch else x_B


def all_tokens(batch: dict) -> dict[str, Tensor]:
    """Return all that the policy's forwards run as one flat row, which the Trainer's counters of tokens should see."""
    if "policy" in batch:
        ids = batch["policy"]["input_ids"]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    # LongPO's short pair is for a reference alone
    names, sides = ("input_ids", "attention_mask"), ("", "long_")["longpo" in batch :]
    return {name: torch.cat([batch[side + name].flatten() for side in sides])[None] for name in names}
