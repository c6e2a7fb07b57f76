"""SoloTrainer: the host's DPO trainer with the SoLoPO step. Read `compute_loss`, then `solopo_step`.

Shape suffixes: B samples, P pairs (data.py), M metrics.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property, partialmethod
from itertools import chain
from types import MethodType

import torch
from accelerate.utils.operations import ConvertOutputsToFp32
from llamafactory.extras import logging
from llamafactory.train.dpo.trainer import CustomDPOTrainer
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from .args import loss_refers
from .collapse import GAP, NLL, REWARD, collapse
from .data import data_sets, step_lengths
from .distill import Top
from .forward import Packed, Pair, TwoStages, all_tokens
from .host.preflight import refusing
from .losses import ANCHOR, METRICS, OBJECTIVES, mean_of_pairs, solopo
from .qa.checkpoints import set_back_from_the_future
from .sequence_parallel import Ranks

logger = logging.get_logger(f"llamafactory.{__name__}")  # under the host's logger, which has the handlers
# what a Trainer that is resumed gets wrong: it divides losses since then by all steps, and all steps by the time since
OF_ALL_STARTS = ("train_loss", "train_samples_per_second", "train_steps_per_second")
ROWS = "solopo_rows"  # of a checkpoint's state: the data sets that it was trained on


class ExampleMeans:
    """Keep means over examples, not over batches: sums and a count, on the device, added over ranks when read."""

    def __init__(self):
        self.sums_M, self.count = torch.zeros(()), 0

    def add(self, values_BM: Tensor) -> None:
        """Count a batch's values."""
        self.sums_M = self.sums_M + values_BM.sum(0)  # the first zero is a scalar, which any device takes
        self.count += len(values_BM)

    def read(self, reduce=lambda x: x) -> list[float]:
        """Return the means in order; `reduce` adds a tensor over ranks."""
        totals = reduce(torch.cat([self.sums_M, self.sums_M.new_tensor([self.count])]))
        return (totals[:-1] / totals[-1]).tolist()


class GroupedByLength(LengthGroupedSampler):
    """Draw the order of the Trainer's sampler from seed and epoch: the same on every rank and after a resume.

    Its own draws from whatever state torch's generator is in.
    """

    generator: torch.Generator

    def __init__(self, batch_size: int, lengths: list[int], seed: int, epoch: Callable[[], int]):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed, self.epoch = seed, epoch

    def __iter__(self):
        self.generator.manual_seed(self.seed + self.epoch())
        return super().__iter__()


def disable_dropout(*models: nn.Module) -> None:
    """Turn off dropout that a module does by a function, at a rate that it holds; TRL turns off modules of dropout.

    Falcon, Persimmon and BLT read a rate, by default 0, from the configuration, which is saved and stays as it is.

    Turn off, too, what a router draws in training: noise, and in Phi-3.5-MoE the experts. It is kept in evaluation.
    """
    for module in chain.from_iterable(model.modules() for model in models):
        if any("jitter" in name for name in vars(module)):
            vars(module)["train"] = MethodType(lambda self, mode=True: self, module.eval())
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


class SoloTrainer(CustomDPOTrainer):
    """Add to the host's trainer the step, example-weighted accumulation, and metrics that are means over examples."""

    def __init__(self, model, packed: bool = False, rows: dict | None = None, **kwargs):
        super().__init__(model=model, **kwargs)
        self.rows = rows
        disable_dropout(*filter(None, (model, kwargs["ref_model"])))
        args, pad_id = self.finetuning_args, self.processing_class.pad_token_id
        self.form: Packed | TwoStages
        self.ranks = Ranks.of(args.solopo_sequence_parallel, self.accelerator)
        if packed:
            shared = self.ranks if self.ranks.size > 1 else None
            self.form = Packed(args, model, kwargs["ref_model"], ranks=shared)
        else:
            self.form = TwoStages(args, model, self.every_rank_may_skip, pad_id)
        self.data_collator = self.form.collator
        self.objective = OBJECTIVES[args.solopo_objective]
        self.train_means, self.eval_means = ExampleMeans(), ExampleMeans()
        self.window_weight = 1.0  # examples a full micro-batch stands for, see get_batch_samples
        # the alignment can lower the short side through its gradient, self-distillation through the weights it shares
        aligned = self.objective is solopo and args.solopo_alpha > 0 and (args.distills or not args.solopo_detach_short)
        self.may_collapse = aligned or args.solopo_objective == "distill"

    def _save_checkpoint(self, *args, **kwargs):
        """Do the Trainer's, and let trainer_state.json say what the run is trained on, which a resume looks at."""
        self.state.stateful_callbacks[ROWS] = self.rows
        if self.args.should_save:
            set_back_from_the_future(self.args.output_dir)
        super()._save_checkpoint(*args, **kwargs)

    def create_accelerator_and_postprocess(self):
        """Do the Trainer's, but leave logits in 16 bits where accelerate, with autocast, makes all fp32 at once.

        Log-probs and divergences raise them chunk by chunk. DeepSpeed does not raise them either.
        """
        super().create_accelerator_and_postprocess()
        prepare = self.accelerator.prepare_model

        def prepare_model(model, *args, **kwargs):
            prepared = prepare(model, *args, **kwargs)  # changes `forward` of the model, which it may wrap
            raising = getattr(getattr(model.forward, "__func__", None), "__wrapped__", None)
            if isinstance(raising, ConvertOutputsToFp32):
                model.forward = MethodType(raising.model_forward, model)
            return prepared

        self.accelerator.prepare_model = prepare_model

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the names of what is logged of a step, in its order."""
        return (*METRICS, ANCHOR) if self.finetuning_args.solopo_anchor else METRICS

    # TRL's, which is the host's, does not take what the Trainer calls it with when it pushes a model. It runs at each
    # checkpoint too, where the Trainer's would ask the hub for the base model's licence, without a time limit, if it
    # were given none: "other" is what the host gives
    create_model_card = partialmethod(Trainer.create_model_card, license="other")

    # ---- one step

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return a micro-batch's mean loss, weighted so that each example of an accumulation window counts the same."""
        losses_B, metrics_BM = self.solopo_step(model, inputs)
        self.check_finite(losses_B, inputs["names"], f"training step {self.state.global_step + 1}")
        self.train_means.add(metrics_BM)
        loss = losses_B.mean() * (self.window_weight * len(losses_B))
        return (loss, metrics_BM) if return_outputs else loss

    def solopo_step(self, model, inputs) -> tuple[Tensor, Tensor]:
        """Return losses (B,) with gradient and metrics (B, M) without, of one micro-batch of the collator.

        The reference comes first, so that no activations of the policy wait for it.
        """
        reference = self.reference_logps(model, inputs)
        logps = self.form.policy(model, inputs, reference.top if reference else None)
        if reference and loss_refers(self.finetuning_args.pref_loss, self.finetuning_args.solopo_objective):
            logps = logps._replace(ref_chosen_B=reference.chosen_B, ref_rejected_B=reference.rejected_B)
        losses_P, parts = self.objective(logps, self.finetuning_args)
        metrics_PM = torch.stack([*parts.values()], dim=1)
        if "pairs" not in inputs:  # one rejected response each
            return losses_P, metrics_PM
        return mean_of_pairs(losses_P, inputs["pairs"]), mean_of_pairs(metrics_PM, inputs["pairs"])

    def reference_logps(self, model, inputs) -> Pair | None:
        """Return the reference's log-probs of the short pair; None where the step has no reference.

        They are known from before training (reference.py), or come from a forward.
        """
        if "reference_P2" in inputs:
            chosen_P, rejected_P = inputs["reference_P2"].unbind(1)
            return Pair(chosen_P, rejected_P, Top(*inputs["anchor"]) if "anchor" in inputs else None)
        if not self.finetuning_args.use_ref_model:
            return None
        ref_model, as_reference = self.ref_model, nullcontext()
        if ref_model is None:
            ref_model, as_reference = model, self.accelerator.unwrap_model(model).disable_adapter()
        with torch.no_grad(), as_reference:
            return self.form.pair(ref_model, inputs)

    def score_pair(self, model, pairs: list[dict]) -> Pair:
        """Return a model's log-probs of the short pair of rows with one rejected response each."""
        return self.form.pair(model, self._prepare_inputs(self.data_collator.short_pair(pairs)))

    def every_rank_may_skip(self, long_is_short_B: Tensor) -> bool:
        """Return whether this micro-batch needs no long forward on any rank; under ZeRO-3 all must do the same."""
        return self.some_long_is_short and bool(self.accelerator.gather(long_is_short_B.all()[None]).all())

    @cached_property
    def some_long_is_short(self) -> bool:
        """Return whether any row's two prompts are equal; the same on every rank. Unknown, so True, for streams."""
        sets = data_sets(self.train_dataset, self.eval_dataset).values()
        return not all(hasattr(rows, "num_rows") and not any(rows["long_is_short"]) for rows in sets)

    def check_finite(self, losses_B: Tensor, names: list[str], when: str) -> None:
        """Stop at a loss that is NaN or infinite, before it reaches the weights."""
        losses = zip(names, losses_B.tolist(), strict=True)
        if bad := ", ".join(f"{name} ({loss})" for name, loss in losses if not math.isfinite(loss)):
            raise FloatingPointError(
                f"Loss is not finite in {when}, rows {bad}. Lower `learning_rate` or `solopo_alpha`, or look at the "
                "rows; the last checkpoint is unharmed."
            )

    def _get_grad_norm(self, model, grad_norm=None):
        """Return the Trainer's; stop at a gradient that is not finite, as a loss that is can have, before it is saved.

        Not where the step is left out: by a scaler of fp16, or by DeepSpeed.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        left_out = self.args.fp16 or self.accelerator.scaler or self.accelerator.optimizer_step_was_skipped
        if not (norm is None or left_out or math.isfinite(norm)):
            raise FloatingPointError(
                f"The gradient is not finite in training step {self.state.global_step + 1}, though the loss is: see "
                "docs/troubleshooting.md, and go on from the last checkpoint, which is unharmed."
            )
        return norm

    # ---- around the step

    def get_train_dataloader(self):
        """Return the Trainer's, which asks for it at every start, also when `auto_find_batch_size` begins again."""
        self.train_means = ExampleMeans()
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset=None):
        """Return the Trainer's with every row: `dataloader_drop_last` would evaluate a part, and of few rows none."""
        dropping, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = dropping

    def _get_train_sampler(self, train_dataset=None):
        """As the host's; `group_by_length` groups by what a step runs, where the Trainer looks for `input_ids`.

        The rows of one optimizer step, over all ranks, are of about one length, however they are dealt out.
        """
        strategy = getattr(self.args, "train_sampling_strategy", None)
        if strategy != "group_by_length" and not getattr(self.args, "group_by_length", False):  # in older transformers
            return super()._get_train_sampler(train_dataset)
        args, dataset = self.finetuning_args, self.train_dataset if train_dataset is None else train_dataset
        return GroupedByLength(
            self.args.train_batch_size * self.args.gradient_accumulation_steps * self.ranks.groups,
            lengths=step_lengths(dataset, args.longpo, args.long_pair),
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            epoch=lambda: int(self.state.epoch or 0),  # accelerate's `set_epoch` does not reach it on several ranks
        )

    def _get_eval_sampler(self, eval_dataset):
        """None, so the rows in order, whatever orders training: with `group_by_length` the Trainer would group here."""
        return None

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the host's, and remember how much one example of this accumulation window weighs.

        The Trainer divides each micro-batch's loss by the number of micro-batches; with an uneven last one that is not
        the mean over examples, and 1 x 4, 2 x 2 and 4 x 1 would differ.

        What fills no step at the end of a stream's pass is left out: the Trainer would add its gradient to the next.
        """
        if self.state.global_step >= self.state.max_steps:  # a resumed run's, of which the Trainer would make one more
            self.control.should_training_stop = True
            return [], None
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if len(batches) < num_batches and not hasattr(self.train_dataset, "num_rows"):
            if not self.state.global_step:
                with refusing():
                    raise ValueError(
                        f"The stream ends before a step is full, after {len(batches)} of {num_batches} batches of this "
                        "process: lower `gradient_accumulation_steps` or `per_device_train_batch_size`, or set "
                        "`streaming: false`."
                    )
            batches = []
        examples = sum(len(batch["names"]) for batch in batches)
        self.window_weight = len(batches) / examples if examples else 1.0
        return batches, num_items

    def log(self, logs, *args, **kwargs):
        """Log as the Trainer does, with the means since the last log; the host's reduces by position and by batch."""
        if "loss" in logs and self.train_means.count:
            means = self.train_means.read(lambda t: self.accelerator.reduce(t, "sum"))
            logs.update(zip(self.metrics, means, strict=True))
            self.train_means = ExampleMeans()
        for name in OF_ALL_STARTS if self.args.resume_from_checkpoint else ():
            logs.pop(name, None)
        Trainer.log(self, logs, *args, **kwargs)
        self.warn_of_collapse()

    def warn_of_collapse(self) -> None:
        """Warn once per start; a resumed run, which has the log from its beginning, says it again if it is still so."""
        if not self.may_collapse or (seen := collapse(self.state.log_history)) is None:
            return
        self.may_collapse = False
        start, now = seen
        reward, gap, nll = (f"`{name}` {start[name]:.3g} -> {now[name]:.3g}" for name in (REWARD, GAP, NLL))
        cure = "set `solopo_detach_short: true` or a smaller `solopo_alpha`"
        if self.finetuning_args.distills:
            anchor = "" if self.finetuning_args.solopo_anchor else "add `solopo_anchor: 1.0`, "
            cure = f"{anchor}keep a `pref_loss` beside it (`solopo_align: distill`), or lower the `learning_rate`"
        logger.warning_rank0(
            f"The alignment loss falls because the short answer is being unlearned (steps {start['step']} to "
            f"{now['step']}: {reward}, {gap}, {nll} nats per token): stop and {cure}; see Diagnostics in "
            "docs/training.md."
        )

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return an evaluation batch's loss; values are gathered by example, so that duplicates do not count."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            losses_B, metrics_BM = self.solopo_step(model, inputs)
        self.check_finite(losses_B, inputs["names"], f"evaluation after step {self.state.global_step}")
        self.eval_means.add(
            self.accelerator.gather_for_metrics(torch.cat([losses_B.float()[:, None], metrics_BM], dim=1))
        )
        return losses_B.mean(), None, None

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """Return the Trainer's output, with the metrics and the loss as means over the examples of the set."""
        self.eval_means = ExampleMeans()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = zip(("loss", *self.metrics), self.eval_means.read(), strict=True)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means})
        return output

    def _track_num_input_tokens(self, inputs):
        super()._track_num_input_tokens(all_tokens(inputs))

    def floating_point_ops(self, inputs):
        """Return the Trainer's estimate for all that is run; ranks that share a row run a part each."""
        return super().floating_point_ops(all_tokens(inputs)) / self.ranks.size

    def get_total_train_batch_size(self, args):
        """Return the Trainer's, for groups of ranks."""
        return super().get_total_train_batch_size(args) // self.ranks.size
