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
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from llamafactory.extras import logging
from torch import Tensor, nn

from . import attention
from .data import SoloCollator
from .distill import Form, Rows, Top, token_kl, top_of_rows
from .logps import IGNORE, ResponseLogits, predicting_positions, response_logps, token_logps
from .losses import LENGTH_NORMALISED, LogProbs
from .packing import PackedCollator
from .sequence_parallel import Part, Ranks

SHORT_PAIR = ("input_ids", "attention_mask", "labels")
LONG_PAIR = tuple(f"long_{name}" for name in SHORT_PAIR)
ANCHOR_TOP = 64  # likeliest words of the reference, beside which the anchor takes all others as one; ours
logger = logging.get_logger(f"llamafactory.{__name__}")  # under the host's logger, which has the handlers


class Pair(NamedTuple):
    """Hold log-probs of the short pair, each (B,), as the loss has them, and what the anchor needs of the reference."""

    chosen_B: Tensor
    rejected_B: Tensor
    top: Top | None = None


def distill_form(args) -> Form:
    """Return the divergence that a recipe asks for."""
    return Form(
        args.solopo_distill_kl, args.solopo_distill_temperature, args.solopo_distill_topk, args.solopo_logp_chunk
    )


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
        self.collator = PackedCollator(
            longpo=args.longpo,
            long_pair=args.long_pair,
            reference=args.use_ref_model,
            distill=args.distills,
            anchor=args.solopo_anchor > 0,
        )
        for model in filter(None, models):
            attention.prepare(model)

    def policy(self, model, batch: dict, anchor: Top | None = None) -> LogProbs:
        """Return all log-probs of the policy; `nll_B` is of the whole sequence where the row has one scored."""
        packed = batch["policy"]
        row = self._score(model, packed)
        logps, nll_B = row.logps, -row.means.get("sequence", row.means["chosen"])
        of_policy = LogProbs(
            logps["chosen"], logps["rejected"], nll_B, logps.get("long_chosen"), logps.get("long_rejected")
        )
        if self.args.distills:
            distill_P = self._kl(row, packed["distilled"], None, distill_form(self.args))
            of_policy = of_policy._replace(distill_B=distill_P)
        if anchor is not None:
            anchor_P = self._kl(row, packed["anchored"], anchor, Form(chunk=self.args.solopo_logp_chunk))
            of_policy = of_policy._replace(anchor_B=anchor_P)
        return of_policy

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
            input_ids=row["input_ids"],
            position_ids=row["position_ids"],
            logits_to_keep=row["positions_K"],
            use_cache=False,
            return_dict=True,
            solopo_segments=row["plan"],
        ).logits
        logps_K = token_logps(logits_1KV[0], row["targets_K"], self.args.solopo_logp_chunk)
        sums_N = torch.stack([span.sum() for span in logps_K.split(row["counts"])])
        if self.ranks:
            sums_N = self.ranks.total(sums_N)
        means_N = sums_N / packed["counts_N"]
        sums, means = ({name: x_N[at_B] for name, at_B in packed["spans"].items()} for x_N in (sums_N, means_N))
        logps = means if self.args.pref_loss in LENGTH_NORMALISED else sums
        return ScoredRow(logps, means, logits_1KV[0], row["plan"].part)


class TwoStages:
    """Run the short pair as in the host's DPO, then the long sequences; for LongPO the long pair alone."""

    name = "two_stage"

    def __init__(self, args, model: nn.Module, short_forward: Callable, may_skip: Callable, pad_id: int):
        """Take the host's `concatenated_forward` of a padded short pair, and who says that no long one is needed.

        `may_skip` says so of `long_is_short_B`, for all ranks: under ZeRO-3 all must do the same.
        """
        self.args, self.short_forward, self.may_skip = args, short_forward, may_skip
        self.collator = SoloCollator(pad_id, args.long_pair)
        base = attention.base_of(model)
        self.keeps_logits = "logits_to_keep" in inspect.signature(base.forward).parameters
        if not self.keeps_logits:
            logger.warning_rank0(f"{type(base).__name__} has no `logits_to_keep`: both forwards keep all logits.")

    def policy(self, model, batch: dict, anchor: Top | None = None) -> LogProbs:
        """Return all log-probs of the policy."""
        if self.args.longpo:
            return self._long_pair(model, batch)
        short = self._short_pair(model, batch)
        chosen_B, rejected_B, nll_B = short["chosen_logps"], short["rejected_logps"], -short["chosen_logps_avg"]
        anchor_P = None if anchor is None else self._from_anchor(short, batch, anchor)
        is_long_P = of_pairs(~batch["long_is_short_B"], batch)
        teachers = self._short_rows(short, batch, is_long_P[:, None]) if self.args.distills else None
        del short  # its logits
        longs, distill_P = self.long_logps(model, batch, chosen_B, rejected_B, teachers)
        of_policy = LogProbs(chosen_B, rejected_B, nll_B, *longs)
        return of_policy._replace(distill_B=distill_P, anchor_B=anchor_P)

    def pair(self, model, batch: dict) -> Pair:
        """Return a model's log-probs of the short pair."""
        short, top = self._short_pair(model, batch), None
        if self.args.solopo_anchor:
            logits_NV = self._short_rows(short, batch)
            rows_N = torch.arange(len(logits_NV), device=logits_NV.device)
            top = top_of_rows(logits_NV, rows_N, ANCHOR_TOP, self.args.solopo_logp_chunk)
        return Pair(short["chosen_logps"], short["rejected_logps"], top)

    def _short_pair(self, model, batch: dict) -> dict[str, Tensor]:
        """Run the host's function, with a model that makes logits at responses only, where it can leave others out."""
        short = {name: batch[name] for name in SHORT_PAIR}
        if not self.keeps_logits:
            return self.short_forward(model, short)
        positions_K, tokens = predicting_positions(short["labels"]), short["labels"].shape[1]

        def at_responses(**inputs):
            logits_BKV = model(**inputs, logits_to_keep=positions_K).logits
            return SimpleNamespace(logits=ResponseLogits(logits_BKV, positions_K, tokens, self.args.solopo_logp_chunk))

        return self.short_forward(at_responses, short)

    def _sides(self, batch: dict) -> list[tuple[str, Tensor]]:
        """List the aligned responses: the name of the short logits, and which of them predict a token of the response.

        The chosen response is that of a sample's first pair.
        """
        labels_BT, pairs = batch["labels"], len(batch["labels"]) // 2
        next_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE) != IGNORE
        mask_BK = next_BT[:, predicting_positions(labels_BT)] if self.keeps_logits else next_BT
        chosen_PK = mask_BK[:pairs] & _first_of(batch, pairs, labels_BT.device)[:, None]
        sides = [("chosen_logits", chosen_PK), ("rejected_logits", mask_BK[pairs:])]
        return sides if self.args.long_pair else sides[:1]

    def _short_rows(self, short: dict, batch: dict, pairs_P1: Tensor | bool = True) -> Tensor:
        """Gather logits of the aligned responses, of some pairs, without gradient: (N, V)."""
        return torch.cat([short[name].detach()[mask_PK & pairs_P1] for name, mask_PK in self._sides(batch)])

    def _from_anchor(self, short: dict, batch: dict, anchor: Top) -> Tensor:
        """Average the divergence from the reference over each response, added over the aligned ones: (P,)."""
        form, means, done = Form(chunk=self.args.solopo_logp_chunk), [], 0
        for name, mask_PK in self._sides(batch):
            at_N = mask_PK.flatten().nonzero().squeeze(1)
            own = Top(*(x[done : done + len(at_N)] for x in anchor))
            means.append(_masked_means(token_kl(short[name].flatten(0, 1), at_N, own, form), mask_PK))
            done += len(at_N)
        means[0] = of_pairs(means[0][_first_of(batch, len(means[0]), means[0].device)], batch)
        return torch.stack(means).sum(0)

    def long_logps(
        self, model, batch: dict, chosen_B: Tensor, rejected_B: Tensor, teachers_NV: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return log-probs of the chosen (and, for `both`, rejected) responses given the long prompts, each (B,).

        As the loss has them. Where a sample's long prompt is its short prompt, the short log-prob itself; where that is
        so for the whole micro-batch on every rank, nothing is run. With alpha 0 the gap is only measured.

        With the short context's logits, of the samples whose long prompt is another, also the mean divergence from them
        over each response, added over the aligned ones, (B,).
        """
        shorts = [chosen_B, rejected_B] if self.args.long_pair else [chosen_B]
        distill_P = None if teachers_NV is None else torch.zeros_like(chosen_B)
        if self.may_skip(batch["long_is_short_B"]):
            return shorts, distill_P
        labels_BT, size = batch["long_labels"], len(batch["names"])
        positions_K, is_long_P = predicting_positions(labels_BT), of_pairs(~batch["long_is_short_B"], batch)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.args.solopo_alpha > 0):
            logits_BKV = self.forward_long(model, batch, positions_K)
            logps, counts = response_logps(logits_BKV, labels_BT, positions_K, self.args.solopo_logp_chunk)
            if self.args.pref_loss in LENGTH_NORMALISED:
                logps = logps / counts
            if teachers_NV is not None:
                distill_P = self._long_divergence(batch, logits_BKV, positions_K, teachers_NV)
        longs = [of_pairs(logps[:size], batch), logps[size:]][: len(shorts)]
        longs = [long_P.where(is_long_P, short_P) for long_P, short_P in zip(longs, shorts, strict=True)]
        return longs, distill_P

    def _long_divergence(self, batch: dict, logits_BKV: Tensor, positions_K: Tensor, teachers_NV: Tensor) -> Tensor:
        """Average the divergence from the short context's logits over each response, added over the aligned ones: (P,).

        0 where a sample's long prompt is its short one, which has no teachers.
        """
        labels_BT, is_long_B, size = batch["long_labels"], ~batch["long_is_short_B"], len(batch["names"])
        is_long = torch.cat([is_long_B, of_pairs(is_long_B, batch)])[: len(labels_BT)]  # of chosen, then of rejected
        mask_BK = (labels_BT[:, positions_K + 1] != IGNORE) & is_long[:, None]
        at_N = mask_BK.flatten().nonzero().squeeze(1)
        teacher = Rows(teachers_NV, torch.arange(len(teachers_NV), device=at_N.device))
        means = _masked_means(token_kl(logits_BKV.flatten(0, 1), at_N, teacher, distill_form(self.args)), mask_BK)
        return of_pairs(means[:size], batch) + (means[size:] if self.args.long_pair else 0)

    def forward_long(self, model, batch: dict, positions_K: Tensor | None) -> Tensor:
        """Return logits of the long sequences at the given positions (all where None), through the wrapped model."""
        keep = {} if positions_K is None or not self.keeps_logits else {"logits_to_keep": positions_K}
        ids, mask = batch["long_input_ids"], batch["long_attention_mask"]
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, return_dict=True, **keep).logits
        return logits if keep or positions_K is None else logits[:, positions_K]

    def _long_pair(self, model, batch: dict) -> LogProbs:
        """Score the pair given the long prompt, and the NLL of all of `x_long y_w`, whose logits are all kept.

        The rejected sequences run by themselves, so that they have logits at their responses only.
        """
        size, chunk = len(batch["names"]), self.args.solopo_logp_chunk
        chosen, rejected = (
            {name: batch[name][rows] for name in LONG_PAIR} for rows in (slice(size), slice(size, None))
        )
        labels_BT, ids_BT = chosen["long_labels"], chosen["long_input_ids"]
        logits_BTV = self.forward_long(model, chosen, None)
        positions_K = predicting_positions(labels_BT)
        chosen_B, _ = response_logps(logits_BTV[:, positions_K], labels_BT, positions_K, chunk)
        real = chosen["long_attention_mask"][:, 1:].bool()
        tokens = token_logps(logits_BTV[:, :-1][real], ids_BT[:, 1:][real], chunk)
        nll_B = -_masked_means(tokens, real)
        positions_K = predicting_positions(rejected["long_labels"])
        logits_BKV = self.forward_long(model, rejected, positions_K)
        rejected_B, _ = response_logps(logits_BKV, rejected["long_labels"], positions_K, chunk)
        return LogProbs(of_pairs(chosen_B, batch), rejected_B, of_pairs(nll_B, batch))


def of_pairs(x_B: Tensor, batch: dict) -> Tensor:
    """Return what the samples have, once for each of their pairs."""
    return x_B.repeat_interleave(torch.tensor(batch["pairs"], device=x_B.device)) if "pairs" in batch else x_B


def _first_of(batch: dict, pairs: int, device: torch.device) -> Tensor:
    """Mark the pairs that are the first of their sample, (P,)."""
    firsts = {0, *accumulate(batch.get("pairs", [1] * pairs)[:-1])}
    return torch.tensor([n in firsts for n in range(pairs)], device=device)


def _masked_means(x_N: Tensor, mask_BT: Tensor) -> Tensor:
    """Average what the marked tokens have over each row, 0 of none, (B,)."""
    x_BT = torch.zeros_like(mask_BT, dtype=x_N.dtype).masked_scatter(mask_BT, x_N)
    return x_BT.sum(-1) / mask_BT.sum(-1).clamp(min=1)


def all_tokens(batch: dict) -> dict[str, Tensor]:
    """Return all that the policy's forwards run as one flat row, which the Trainer's counters of tokens should see."""
    if "policy" in batch:
        ids = batch["policy"]["input_ids"]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    names = ("input_ids", "attention_mask")
    return {name: torch.cat([batch[name].flatten(), batch[f"long_{name}"].flatten()])[None] for name in names}
