"""Log-probabilities of a step, in two forms: all in one forward of a packed row, or in two stages of padded batches.

A form takes a model and a batch of its collator. `policy` gives all that the objective needs of the policy, `pair` the
log-probs of the short pair, as a reference is asked for them. "As the loss has them": summed over the response's
tokens, or their mean for the losses that are length-normalised.

Shape suffixes: B samples (of log-probs pairs, as `data.py` has them), T tokens, K kept positions, N scored spans,
V vocabulary.
"""

import inspect
from collections.abc import Callable
from types import SimpleNamespace

import torch
from llamafactory.extras import logging
from torch import Tensor, nn

from . import attention
from .data import SoloCollator
from .logps import ResponseLogits, predicting_positions, response_logps, token_logps
from .losses import LENGTH_NORMALISED, LogProbs
from .packing import PackedCollator

SHORT_PAIR = ("input_ids", "attention_mask", "labels")
LONG_PAIR = tuple(f"long_{name}" for name in SHORT_PAIR)
logger = logging.get_logger(f"llamafactory.{__name__}")  # under the host's logger, which has the handlers


class Packed:
    """Run one forward of one row, in which a shared prompt stands once; see packing.py."""

    name = "packed"

    def __init__(self, args, *models: nn.Module | None):
        """Let the models, policy and reference, take packed rows; `args`: the recipe's finetuning arguments."""
        self.args = args
        self.collator = PackedCollator(args.longpo, args.long_pair, args.use_ref_model)
        for model in filter(None, models):
            attention.prepare(model)

    def policy(self, model, batch: dict) -> LogProbs:
        """Return all log-probs of the policy; `nll_B` is of the whole sequence where the row has one scored."""
        logps, means = self._score(model, batch["policy"])
        nll_B = -means.get("sequence", means["chosen"])
        return LogProbs(logps["chosen"], logps["rejected"], nll_B, logps.get("long_chosen"), logps.get("long_rejected"))

    def pair(self, model, batch: dict) -> tuple[Tensor, Tensor]:
        """Return a model's log-probs of the short pair, each (B,), as the loss has them."""
        logps, _ = self._score(model, batch["reference"])
        return logps["chosen"], logps["rejected"]

    def _score(self, model, packed: dict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Log-probs (B,) of a packed row's spans by name: as the loss has them, and as means per token."""
        logits_1KV = model(
            input_ids=packed["input_ids"],
            position_ids=packed["position_ids"],
            logits_to_keep=packed["positions_K"],
            use_cache=False,
            return_dict=True,
            solopo_segments=packed["plan"],
        ).logits
        logps_K = token_logps(logits_1KV[0], packed["targets_K"], self.args.solopo_logp_chunk)
        sums_N = torch.stack([span.sum() for span in logps_K.split(packed["counts"])])
        means_N = sums_N / packed["counts_N"]
        sums, means = ({name: x_N[at_B] for name, at_B in packed["spans"].items()} for x_N in (sums_N, means_N))
        return (means if self.args.pref_loss in LENGTH_NORMALISED else sums), means


class TwoStages:
    """Run the short pair as in the host's DPO, then the long sequences; for LongPO the long pair alone."""

    name = "two_stage"

    def __init__(self, args, model: nn.Module, short_forward: Callable, may_skip: Callable, pad_id: int):
        """Take what a step is made of.

        Args:
            args: The recipe's finetuning arguments.
            model: The policy, whose forward tells whether it can leave logits out.
            short_forward: The host's `concatenated_forward` of a padded short pair.
            may_skip: Says of `long_is_short_B` whether no rank needs a long forward; under ZeRO-3 all must do the same.
            pad_id: The tokenizer's padding token.
        """
        self.args, self.short_forward, self.may_skip = args, short_forward, may_skip
        self.collator = SoloCollator(pad_id, args.long_pair)
        base = attention.base_of(model)
        self.keeps_logits = "logits_to_keep" in inspect.signature(base.forward).parameters
        if not self.keeps_logits:
            logger.warning_rank0(f"{type(base).__name__} has no `logits_to_keep`: both forwards keep all logits.")

    def policy(self, model, batch: dict) -> LogProbs:
        """Return all log-probs of the policy."""
        if self.args.longpo:
            return self._long_pair(model, batch)
        short = self._short_pair(model, batch)
        chosen_B, rejected_B, nll_B = short["chosen_logps"], short["rejected_logps"], -short["chosen_logps_avg"]
        del short  # its logits
        return LogProbs(chosen_B, rejected_B, nll_B, *self.long_logps(model, batch, chosen_B, rejected_B))

    def pair(self, model, batch: dict) -> tuple[Tensor, Tensor]:
        """Return a model's log-probs of the short pair, each (B,), as the loss has them."""
        short = self._short_pair(model, batch)
        return short["chosen_logps"], short["rejected_logps"]

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

    def long_logps(self, model, batch: dict, chosen_B: Tensor, rejected_B: Tensor) -> list[Tensor]:
        """Return log-probs of the chosen (and, for `both`, rejected) responses given the long prompts, each (B,).

        As the loss has them. Where a sample's long prompt is its short prompt, the short log-prob itself; where that is
        so for the whole micro-batch on every rank, nothing is run. With alpha 0 the gap is only measured.
        """
        shorts = [chosen_B, rejected_B] if self.args.long_pair else [chosen_B]
        if self.may_skip(batch["long_is_short_B"]):
            return shorts
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.args.solopo_alpha > 0):
            positions_K = predicting_positions(batch["long_labels"])
            logits_BKV = self.forward_long(model, batch, positions_K)
            chunk = self.args.solopo_logp_chunk
            logps, counts = response_logps(logits_BKV, batch["long_labels"], positions_K, chunk)
            if self.args.pref_loss in LENGTH_NORMALISED:
                logps = logps / counts
        size = len(batch["names"])
        longs = [of_pairs(logps[:size], batch), logps[size:]][: len(shorts)]
        is_long_B = of_pairs(~batch["long_is_short_B"], batch)
        return [long_B.where(is_long_B, short_B) for long_B, short_B in zip(longs, shorts, strict=True)]

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
        nll_B = -torch.zeros_like(real, dtype=tokens.dtype).masked_scatter(real, tokens).sum(-1) / real.sum(-1)
        positions_K = predicting_positions(rejected["long_labels"])
        logits_BKV = self.forward_long(model, rejected, positions_K)
        rejected_B, _ = response_logps(logits_BKV, rejected["long_labels"], positions_K, chunk)
        return LogProbs(of_pairs(chosen_B, batch), rejected_B, of_pairs(nll_B, batch))


def of_pairs(x_B: Tensor, batch: dict) -> Tensor:
    """Return what the samples have, once for each of their pairs."""
    return x_B.repeat_interleave(torch.tensor(batch["pairs"], device=x_B.device)) if "pairs" in batch else x_B


def all_tokens(batch: dict) -> dict[str, Tensor]:
    """Return all that the policy's forwards run as one flat row, which the Trainer's counters of tokens should see."""
    if "policy" in batch:
        ids = batch["policy"]["input_ids"]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    names = ("input_ids", "attention_mask")
    return {name: torch.cat([batch[name].flatten(), batch[f"long_{name}"].flatten()])[None] for name in names}
