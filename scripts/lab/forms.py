"""Forms of the alignment that the plugin does not offer, tried here against those that it does.

Each is a change to `SoloTrainer` for the time of one run of the lab; scripts/lab/run.py applies it to the recipe of
another arm. docs/lab.md says what each was worth.
"""

from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch

from solopo_plugin import losses, trainer
from solopo_plugin.trainer import METRICS, SoloTrainer

WARMUP = 0.5  # share of the steps over which alpha rises to its value
MEMORY = 0.9  # of the running reward gap, per step
LEAST_GAP = 0.1  # below it alpha no longer grows
SMALL, KEPT = 0.25, 0.25  # a running gap below SMALL of the first one is small: of such rows, a share KEPT is aligned
GAP = METRICS.index("solopo/reward_gap")
TRIED = {  # form -> the arms that it is applied to
    "warmup": ("solo_dpo", "solo_simpo", "solo_orpo"),
    "auto": ("solo_dpo_alpha_1", "solo_simpo", "solo_orpo", "solo_orpo_detached"),
    "skip": ("solo_dpo_detached", "solo_orpo_detached"),
}
TRIED_TWO_HOP = {"tokens": ("solo_orpo", "solo_orpo_detached")}  # the others gained nothing on the first
FORMS = (*TRIED, "tokens")


def arms_of_forms(task: str = "recall") -> list[str]:
    tried = TRIED if task == "recall" else TRIED_TWO_HOP  # an answer of the first is one token
    return [f"{form}_{arm}" for form, arms in tried.items() for arm in arms]


def settings(form: str | None) -> list:
    return [form, WARMUP, MEMORY, LEAST_GAP, SMALL, KEPT] if form else []


def form_of(name: str) -> tuple[str | None, str]:
    """Form, if any, and arm."""
    form, _, arm = name.partition("_")
    return (form, arm) if form in FORMS else (None, name)


def running_gap(self, gap: float) -> None:
    """Exponential mean over micro-batches of the reward gap, beside the first one's."""
    self.first_gap = getattr(self, "first_gap", gap)
    self.gap = MEMORY * getattr(self, "gap", gap) + (1 - MEMORY) * gap


def with_alpha(factor):
    """`solopo_losses` with alpha times `factor(self)`, which is known from the steps before."""
    original = SoloTrainer.solopo_losses

    def solopo_losses(self, logps):
        alpha = self.finetuning_args.solopo_alpha
        self.finetuning_args.solopo_alpha = alpha * factor(self)
        try:
            losses_B, metrics_BM = original(self, logps)
        finally:
            self.finetuning_args.solopo_alpha = alpha
        running_gap(self, metrics_BM[:, GAP].mean().item())
        return losses_B, metrics_BM

    return patch.object(SoloTrainer, "solopo_losses", solopo_losses)


def warmup(self) -> float:
    """Linear from 0."""
    return min(1.0, (self.state.global_step + 1) / (WARMUP * self.state.max_steps))


def auto(self) -> float:
    """Such that the alignment term is near alpha throughout, whatever the scale of the loss's reward.

    The first step, before which no gap is known, takes alpha itself; where the gap is small alpha is up to 10 times as
    large, 1 / `LEAST_GAP`.
    """
    return 1 / max(getattr(self, "gap", 1.0), LEAST_GAP)


@contextmanager
def skip():
    """Where the running gap is small, a row's long side is left out at random, as if its long pass were not made.

    A row's own gap is known only after its long pass, and a row is seen once: the running gap of the rows whose pass
    was made stands for it. The pass is made all the same; `skipped` in the log is the share that would have been saved.
    """
    alignment, losses_of, log = losses.alignment, SoloTrainer.solopo_losses, SoloTrainer.log
    kept = {}

    def of_kept(short_B, *args, **kwargs):
        return alignment(short_B, *args, **kwargs) * kept["B"]

    def solopo_losses(self, logps):
        small = getattr(self, "gap", 1.0) < SMALL * getattr(self, "first_gap", 1.0)
        kept["B"] = (torch.rand(len(logps.chosen_B)) < (KEPT if small else 1.0)).float()
        losses_B, metrics_BM = losses_of(self, logps)
        self.made = getattr(self, "made", 0) + kept["B"].sum().item()
        self.seen = getattr(self, "seen", 0) + len(kept["B"])
        if kept["B"].any():
            running_gap(self, (metrics_BM[:, GAP] * kept["B"]).sum().item() / kept["B"].sum().item())
        return losses_B, metrics_BM

    def log_with_share(self, logs, *args, **kwargs):
        logs["skipped"] = 1 - getattr(self, "made", 0) / max(getattr(self, "seen", 0), 1)
        return log(self, logs, *args, **kwargs)

    with (
        patch.object(losses, "alignment", of_kept),
        patch.object(SoloTrainer, "solopo_losses", solopo_losses),
        patch.object(SoloTrainer, "log", log_with_share),
    ):
        yield


@contextmanager
def tokens():
    """The penalty of each token's reward, then summed or averaged as the loss does, instead of the other way round."""
    packed_logps, token_logps, last = SoloTrainer.packed_logps, trainer.token_logps, {}

    def kept_token_logps(*args):
        last["logps_K"] = token_logps(*args)
        return last["logps_K"]

    def remember(self, model, inputs):
        logps = packed_logps(self, model, inputs)  # the policy's forward is its last
        row = inputs["policy"]
        spans = last["logps_K"].split(row["counts"])
        last["pairs"] = [
            (spans[short], spans[long])
            for short, long in zip(*(row["spans"][name].tolist() for name in ("chosen", "long_chosen")), strict=True)
        ]
        return logps

    original = losses.alignment

    def alignment(short_B, long_B, pref_loss, *args, **kwargs):
        gaps = [original(short_T, long_T, pref_loss, *args, **kwargs) for short_T, long_T in last["pairs"]]
        mean = pref_loss in trainer.LENGTH_NORMALISED
        return torch.stack([gap_T.mean() if mean else gap_T.sum() for gap_T in gaps])

    with (
        patch.object(trainer, "token_logps", kept_token_logps),
        patch.object(SoloTrainer, "packed_logps", remember),
        patch.object(losses, "alignment", alignment),
    ):
        yield


def applied(form: str | None):
    """Context in which a run has the form, or none."""
    if form is None:
        return nullcontext()
    return {"warmup": with_alpha(warmup), "auto": with_alpha(auto), "skip": skip(), "tokens": tokens()}[form]
