"""SoloTrainer: the host's DPO trainer with the SoLoPO step. Read `compute_loss`, then `solopo_step`.

Shape suffixes: B samples, T tokens, K kept positions, N scored spans, V vocabulary, M metrics.
"""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from llamafactory.extras import logging
from llamafactory.train.dpo.trainer import CustomDPOTrainer
from torch import Tensor
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from . import attention, losses
from .args import LENGTH_NORMALISED
from .collapse import GAP, NLL, REWARD, collapse
from .data import data_sets, step_lengths
from .logps import predicting_positions, response_logps, token_logps

logger = logging.get_logger(f"llamafactory.{__name__}")  # under the host's logger, which has the handlers

# Always this set in this order, on every rank and step. Defined in docs/training.md.
METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "solopo/po_loss",
    "solopo/align_loss",
    "solopo/reward_short",
    "solopo/reward_long",
    "solopo/reward_gap",
    "solopo/nll",
)

SHORT_PAIR = ("input_ids", "attention_mask", "labels")


class ExampleMeans:
    """Means over examples, not over batches: sums and a count, kept on the device, added over ranks when read."""

    def __init__(self):
        self.sums_M, self.count = None, 0

    def add(self, values_BM: Tensor) -> None:
        total_M = values_BM.sum(0)
        self.sums_M = total_M if self.sums_M is None else self.sums_M + total_M
        self.count += len(values_BM)

    def read(self, reduce=lambda x: x) -> list[float]:
        """Means in order; `reduce` adds a tensor over ranks."""
        totals = reduce(torch.cat([self.sums_M, self.sums_M.new_tensor([self.count])]))
        return (totals[:-1] / totals[-1]).tolist()


class GroupedByLength(LengthGroupedSampler):
    """The Trainer's sampler, whose order here is drawn from seed and epoch: the same on every rank and after a resume.

    Its own draws from whatever state torch's generator is in.
    """

    def __init__(self, *args, seed: int, epoch: Callable[[], int], **kwargs):
        super().__init__(*args, generator=torch.Generator(), **kwargs)
        self.seed, self.epoch = seed, epoch

    def __iter__(self):
        self.generator.manual_seed(self.seed + self.epoch())
        return super().__iter__()


class LogProbs(NamedTuple):
    """What a step needs of its forwards, each (B,), fp32, nats; summed or averaged over tokens as the loss has it.

    For `solopo` the pair is given the short prompt, for `longpo` the long one; the reference's always the short one.
    `nll_B` is always a mean: of the chosen response or, for `longpo`, of all of `x_long y_w`.
    """

    chosen_B: Tensor
    rejected_B: Tensor
    ref_chosen_B: Tensor | None
    ref_rejected_B: Tensor | None
    nll_B: Tensor
    long_chosen_B: Tensor | None = None
    long_rejected_B: Tensor | None = None


class SoloTrainer(CustomDPOTrainer):
    """Adds to the host's trainer: the step, example-weighted accumulation, and metrics that are means over examples."""

    def __init__(self, model, packed: bool = False, **kwargs):
        super().__init__(model=model, **kwargs)
        self.packed = packed
        self.train_means, self.eval_means = ExampleMeans(), ExampleMeans()
        self.window_weight = 1.0  # examples a full micro-batch stands for, see get_batch_samples
        args = self.finetuning_args  # only through the short side can the alignment lower it
        self.may_collapse = args.solopo_objective == "solopo" and args.solopo_alpha > 0 and not args.solopo_detach_short
        base = attention.base_of(model)
        self.keeps_logits = "logits_to_keep" in inspect.signature(base.forward).parameters
        if packed:
            attention.prepare(model)
            if kwargs["ref_model"] is not None:
                attention.prepare(kwargs["ref_model"])
        elif not self.keeps_logits:
            logger.warning_rank0(f"{type(base).__name__} has no `logits_to_keep`: the long forward keeps all logits.")

    # ---- one step

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss of a micro-batch, weighted so that every example of an accumulation window counts the same."""
        losses_B, metrics_BM = self.solopo_step(model, inputs)
        self.check_finite(losses_B, inputs["rows"], f"training step {self.state.global_step + 1}")
        self.train_means.add(metrics_BM)
        loss = losses_B.mean() * (self.window_weight * len(losses_B))
        return (loss, metrics_BM) if return_outputs else loss

    def solopo_step(self, model, inputs) -> tuple[Tensor, Tensor]:
        """Losses (B,) with gradient and metrics (B, M) without, of one micro-batch of the collator."""
        longpo = self.finetuning_args.solopo_objective == "longpo"
        if self.packed:
            logps = self.packed_logps(model, inputs)
        else:
            logps = self.longpo_logps(model, inputs) if longpo else self.two_stage_logps(model, inputs)
        return self.longpo_losses(logps) if longpo else self.solopo_losses(logps)

    def solopo_losses(self, logps: LogProbs) -> tuple[Tensor, Tensor]:
        """SoLoPO: the preference loss on the short pair plus alpha times the alignment with the long context."""
        args = self.finetuning_args
        chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, nll_B, long_chosen_B, long_rejected_B = logps
        po_loss = losses.PO_LOSSES[args.pref_loss]
        po_B = po_loss(
            chosen_B, rejected_B, ref_chosen_B, ref_rejected_B,
            beta=args.pref_beta, gamma=args.simpo_gamma, smoothing=args.dpo_label_smoothing,
        )  # fmt: skip
        if args.pref_ftx > 1e-6:  # the host's threshold
            po_B = po_B + args.pref_ftx * nll_B

        align = dict(pref_loss=args.pref_loss, beta=args.pref_beta, align=args.solopo_align,
                     kind=args.solopo_penalty, detach_short=args.solopo_detach_short)  # fmt: skip
        align_B = losses.alignment(chosen_B, long_chosen_B, **align)
        if long_rejected_B is not None:
            align_B = align_B + losses.alignment(rejected_B, long_rejected_B, **align, rise=True)
        losses_B = po_B + args.solopo_alpha * align_B if args.solopo_alpha else po_B

        with torch.no_grad():
            reward_short_B = losses.reward(args.pref_loss, chosen_B, args.pref_beta)
            reward_long_B = losses.reward(args.pref_loss, long_chosen_B, args.pref_beta)
            metrics_BM = self.metrics(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, po_B, align_B,
                                      reward_short_B, reward_long_B, nll_B)  # fmt: skip
        return losses_B, metrics_BM

    def longpo_losses(self, logps: LogProbs) -> tuple[Tensor, Tensor]:
        """LongPO (arXiv:2502.13922): NLL of `x_long y_w`, plus lambda * DPO with the reference on the short prompt."""
        args = self.finetuning_args
        chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, nll_B, *_ = logps
        po_B = losses.longpo(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, args.pref_beta)
        metrics_BM = self.metrics(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, po_B, torch.zeros_like(po_B),
                                  args.pref_beta * ref_chosen_B, args.pref_beta * chosen_B, nll_B)  # fmt: skip
        return nll_B + args.solopo_longpo_lambda * po_B, metrics_BM

    # ---- the reference's log-probs: known from before training (reference.py), or from a forward of the short pair

    def reference_logps(self, model, inputs) -> tuple[Tensor | None, Tensor | None]:
        """Of chosen and rejected given the short prompt, each (B,); None where the loss has no reference."""
        if "reference_B2" in inputs:
            return inputs["reference_B2"].unbind(1)
        if not self.finetuning_args.use_ref_model:
            return None, None
        if self.ref_model is None:
            ref_model, as_reference = model, self.accelerator.unwrap_model(model).disable_adapter()
        else:
            ref_model, as_reference = self.ref_model, nullcontext()
        with torch.no_grad(), as_reference:
            return self.pair_logps(ref_model, inputs)

    def pair_logps(self, model, inputs) -> tuple[Tensor, Tensor]:
        """A model's log-probs of the short pair, each (B,), as the loss has them."""
        if self.packed:
            pair, _ = self.score(model, inputs["reference"])
            return pair["chosen"], pair["rejected"]
        pair = self.concatenated_forward(model, {name: inputs[name] for name in SHORT_PAIR})
        return pair["chosen_logps"], pair["rejected_logps"]

    def score_pair(self, model, features: list[dict]) -> Tensor:
        """`pair_logps` of rows as the data set has them, shape (B, 2)."""
        inputs = self._prepare_inputs(self.data_collator.short_pair(features))
        return torch.stack(self.pair_logps(model, inputs), dim=1)

    # ---- its log-probs, packed: one forward of one row, see packing.py

    def packed_logps(self, model, inputs) -> LogProbs:
        """Everything from one forward of the policy and the reference's, first, so that no activations wait for it."""
        reference = self.reference_logps(model, inputs)
        policy, means = self.score(model, inputs["policy"])
        nll_B = -means.get("sequence", means["chosen"])
        return LogProbs(policy["chosen"], policy["rejected"], *reference, nll_B,
                        policy.get("long_chosen"), policy.get("long_rejected"))  # fmt: skip

    def score(self, model, row) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Log-probs (B,) of a packed row's spans by name: as the loss has them, and as means per token."""
        logits_1KV = model(
            input_ids=row["input_ids"], position_ids=row["position_ids"], logits_to_keep=row["positions_K"],
            use_cache=False, return_dict=True, solopo_segments=row["plan"],
        ).logits  # fmt: skip
        logps_K = token_logps(logits_1KV[0], row["targets_K"], self.finetuning_args.solopo_logp_chunk)
        sums_N = torch.stack([span.sum() for span in logps_K.split(row["counts"])])
        means_N = sums_N / row["counts_N"]
        sums, means = ({name: x_N[span_B] for name, span_B in row["spans"].items()} for x_N in (sums_N, means_N))
        return (means if self.finetuning_args.pref_loss in LENGTH_NORMALISED else sums), means

    # ---- its log-probs in two stages: the short pair as in the host's DPO, then the long sequences

    def two_stage_logps(self, model, inputs) -> LogProbs:
        """The host's forward of the padded short pair, the reference's, and one of the long sequences."""
        policy = self.concatenated_forward(model, {name: inputs[name] for name in SHORT_PAIR})
        chosen_B, rejected_B, nll_B = policy["chosen_logps"], policy["rejected_logps"], -policy["chosen_logps_avg"]
        del policy  # its fp32 logits of every position
        ref_chosen_B, ref_rejected_B = self.reference_logps(model, inputs)
        long_chosen_B, *long_rejected_B = self.long_logps(model, inputs, chosen_B, rejected_B)
        return LogProbs(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, nll_B, long_chosen_B, *long_rejected_B)

    def long_logps(self, model, inputs, chosen_B: Tensor, rejected_B: Tensor) -> list[Tensor]:
        """Log-probs of the chosen (and, for `both`, rejected) responses given the long prompts, each shape (B,).

        Summed or averaged as `L_PO` has them. Where a row's long prompt is its short prompt, the short log-prob itself;
        where that is so for the whole micro-batch on every rank, nothing is run. With alpha 0 the gap is only measured.
        """
        shorts = [chosen_B, rejected_B] if self.data_collator.long_pair else [chosen_B]
        if self.every_rank_may_skip(inputs["same_B"]):
            return shorts
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.finetuning_args.solopo_alpha > 0):
            positions_K = predicting_positions(inputs["long_labels"])
            logits_BKV = self.forward_long(model, inputs, positions_K)
            logps, counts = response_logps(
                logits_BKV, inputs["long_labels"], positions_K, self.finetuning_args.solopo_logp_chunk
            )
            if self.finetuning_args.pref_loss in LENGTH_NORMALISED:
                logps = logps / counts
        return [
            long_B.where(~inputs["same_B"], short_B)
            for long_B, short_B in zip(logps.split(len(chosen_B)), shorts, strict=True)
        ]

    def forward_long(self, model, inputs, positions_K: Tensor | None) -> Tensor:
        """Logits of the long sequences at the given positions (all where None), through the wrapped model."""
        keep = {} if positions_K is None or not self.keeps_logits else {"logits_to_keep": positions_K}
        ids, mask = inputs["long_input_ids"], inputs["long_attention_mask"]
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, return_dict=True, **keep).logits
        return logits if keep or positions_K is None else logits[:, positions_K]

    def every_rank_may_skip(self, same_B: Tensor) -> bool:
        """Whether this micro-batch needs no long forward on any rank; under ZeRO-3 all ranks must do the same."""
        if not self.some_row_is_short:
            return False
        return bool(self.accelerator.gather(same_B.all()[None]).all())

    @property
    def some_row_is_short(self) -> bool:
        """Whether any row's two prompts are equal; the same on every rank. Unknown, so True, for streams."""
        if not hasattr(self, "_some_row_is_short"):
            sets = data_sets(self.train_dataset, self.eval_dataset).values()
            known = [hasattr(d, "num_rows") and not any(d["same"]) for d in sets]
            self._some_row_is_short = not all(known)
        return self._some_row_is_short

    def longpo_logps(self, model, inputs) -> LogProbs:
        """LongPO's: the policy on the long pair, all logits; the reference on the short pair as the host has it."""
        labels_BT, ids_BT = inputs["long_labels"], inputs["long_input_ids"]
        size, chunk = len(ids_BT) // 2, self.finetuning_args.solopo_logp_chunk
        logits_BTV = self.forward_long(model, inputs, None)
        positions_K = predicting_positions(labels_BT)
        logps, _ = response_logps(logits_BTV[:, positions_K], labels_BT, positions_K, chunk)
        chosen_B, rejected_B = logps.split(size)
        real = inputs["long_attention_mask"][:size, 1:].bool()
        tokens = token_logps(logits_BTV[:size, :-1][real], ids_BT[:size, 1:][real], chunk)
        nll_B = -torch.zeros_like(real, dtype=tokens.dtype).masked_scatter(real, tokens).sum(-1) / real.sum(-1)
        del logits_BTV
        return LogProbs(chosen_B, rejected_B, *self.reference_logps(model, inputs), nll_B)

    # ---- its metrics and its guard

    @torch.no_grad()
    def metrics(
        self, chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, po_B, align_B, reward_short_B, reward_long_B, nll_B
    ):
        """The columns of `METRICS`, shape (B, M), fp32; no synchronisation with the host."""
        reward_chosen_B = self.beta * (chosen_B if ref_chosen_B is None else chosen_B - ref_chosen_B)
        reward_rejected_B = self.beta * (rejected_B if ref_rejected_B is None else rejected_B - ref_rejected_B)
        columns = (
            reward_chosen_B, reward_rejected_B, (reward_chosen_B > reward_rejected_B).float(),
            reward_chosen_B - reward_rejected_B, chosen_B, rejected_B, po_B, align_B,
            reward_short_B, reward_long_B, (reward_short_B - reward_long_B).abs(), nll_B,
        )  # fmt: skip
        return torch.stack([column.detach().float() for column in columns], dim=1)

    def check_finite(self, losses_B: Tensor, rows: list[str], when: str) -> None:
        """Stop at a loss that is NaN or infinite, before it reaches the weights."""
        finite = losses_B.isfinite()
        if not finite.all():
            bad = ", ".join(
                f"{row} ({loss})"
                for row, loss, ok in zip(rows, losses_B.tolist(), finite.tolist(), strict=True)
                if not ok
            )
            raise FloatingPointError(
                f"Loss is not finite in {when}, rows {bad}. Lower `learning_rate` or "
                "`solopo_alpha`, or look at the rows; the last checkpoint is unharmed."
            )

    # ---- around the step

    def get_train_dataloader(self):
        """As the Trainer's, which asks for it at every start, also when `auto_find_batch_size` begins again."""
        self.train_means = ExampleMeans()
        return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset=None):
        """As the host's; `group_by_length` groups by what a step runs, where the Trainer looks for `input_ids`.

        The rows of one optimizer step, over all ranks, are of about one length, however they are dealt out.
        """
        strategy = getattr(self.args, "train_sampling_strategy", None)
        if strategy != "group_by_length" and not getattr(self.args, "group_by_length", False):  # in older transformers
            return super()._get_train_sampler(train_dataset)
        args, dataset = self.finetuning_args, self.train_dataset if train_dataset is None else train_dataset
        return GroupedByLength(
            self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
            lengths=step_lengths(dataset, args.solopo_objective == "longpo", args.solopo_align_on == "both"),
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            epoch=lambda: int(self.state.epoch or 0),  # accelerate's `set_epoch` does not reach it on several ranks
        )

    def _get_eval_sampler(self, eval_dataset):
        """None, so the rows in order, whatever orders training: with `group_by_length` the Trainer would group here."""
        return None

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As the host's, and remember how much one example of this accumulation window weighs.

        The Trainer divides each micro-batch's loss by the number of micro-batches; with an uneven last one that is not
        the mean over examples, and 1 x 4, 2 x 2 and 4 x 1 would differ.
        """
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        examples = sum(len(batch["rows"]) for batch in batches)
        self.window_weight = len(batches) / examples if examples else 1.0
        return batches, num_items

    def log(self, logs, *args, **kwargs):
        """As the Trainer's, with the means since the last log; the host's `log` reduces by position and by batch."""
        if "loss" in logs and self.train_means.count:
            means = self.train_means.read(lambda t: self.accelerator.reduce(t, "sum"))
            logs.update(zip(METRICS, means, strict=True))
            self.train_means = ExampleMeans()
        Trainer.log(self, logs, *args, **kwargs)
        self.warn_of_collapse()

    def warn_of_collapse(self) -> None:
        """Once per start: a resumed run, which has the log from its beginning, says it again if it is still so."""
        if not self.may_collapse or (seen := collapse(self.state.log_history)) is None:
            return
        self.may_collapse = False
        start, now = seen
        reward, gap, nll = (f"`{name}` {start[name]:.3g} -> {now[name]:.3g}" for name in (REWARD, GAP, NLL))
        logger.warning_rank0(
            f"The alignment loss falls because the short answer is being unlearned (steps {start['step']} to "
            f"{now['step']}: {reward}, {gap}, {nll} nats per token): stop and set `solopo_detach_short: true` "
            "or a smaller `solopo_alpha`; see Diagnostics in docs/training.md."
        )

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss of an evaluation batch; per-example values are gathered so that padding duplicates do not count."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            losses_B, metrics_BM = self.solopo_step(model, inputs)
        self.check_finite(losses_B, inputs["rows"], f"evaluation after step {self.state.global_step}")
        self.eval_means.add(
            self.accelerator.gather_for_metrics(torch.cat([losses_B.float()[:, None], metrics_BM], dim=1))
        )
        return losses_B.mean(), None, None

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """As the Trainer's, with `METRICS` and the loss as means over the examples of the set."""
        self.eval_means = ExampleMeans()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = zip(("loss", *METRICS), self.eval_means.read(), strict=True)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means})
        return output

    def _track_num_input_tokens(self, inputs):
        super()._track_num_input_tokens(all_tokens(inputs))

    def floating_point_ops(self, inputs):
        return super().floating_point_ops(all_tokens(inputs))


def all_tokens(inputs: dict) -> dict[str, Tensor]:
    """All that the policy's forwards run, as one flat row: what the Trainer's token and FLOP counters should see."""
    if "policy" in inputs:
        ids = inputs["policy"]["input_ids"]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    names = ("input_ids", "attention_mask")
    return {name: torch.cat([inputs[name].flatten(), inputs[f"long_{name}"].flatten()])[None] for name in names}
