"""The trainer's warning of a collapse: the rule on logs made by hand, what keeps it silent, and two real runs."""

import random
import sys

import pytest
from conftest import ROOT

from solopo_plugin.collapse import collapse

sys.path.insert(0, str(ROOT / "scripts" / "lab"))
STARTS = {"dpo": (-4.0, 8.0), "simpo": (-0.8, 1.0), "orpo": (1.0, 2.5)}  # reward_short and gap of a first log, 0.4 NLL


def logs(*means: tuple[float, float, float]) -> list[dict]:
    """Trainer logs of (reward_short, reward_gap, nll), ten steps apart, with an evaluation after each."""
    history = []
    for i, (short, gap, nll) in enumerate(means, 1):
        entry = {"solopo/reward_short": short, "solopo/reward_gap": gap, "solopo/nll": nll}
        history += [{"loss": gap, **entry, "step": 10 * i}]
        history += [{f"eval_{name}": 9.0 for name in entry} | {"step": 10 * i}]
    return history


def course(loss: str, of_gap: float, long_share: float, nll: float, n=10, noise=0.0) -> list[dict]:
    """The gap closes evenly by `of_gap` of itself; `long_share` of that is the long reward's rise, the rest a fall."""
    short, gap = STARTS[loss]
    draw = random.Random(0)

    def at(t):
        closed = of_gap * gap * t
        hard = noise * draw.gauss(0, 1) if t else 0  # rows of a log that are harder, in both contexts
        return short - (1 - long_share) * closed - hard * gap, gap - closed, 0.4 + nll * t + hard

    return logs(*(at(i / (n - 1)) for i in range(n)))


def first(history: list[dict]) -> int | None:
    """The step at which the rule first speaks."""
    return next((history[n - 1]["step"] for n in range(1, len(history) + 1) if collapse(history[:n])), None)


@pytest.mark.parametrize("loss", STARTS)
def test_collapse_is_seen_on_the_scale_of_every_loss(loss):
    history = course(loss, of_gap=0.9, long_share=0.1, nll=5.0)
    assert first(history) == 90  # half of the gap is lost in the log of step 70, the first of three
    start, now = collapse(history)
    assert start is history[0] and now is history[-2]  # the last is an evaluation


@pytest.mark.parametrize("loss", STARTS)
@pytest.mark.parametrize(
    "healthy",
    [
        dict(of_gap=0.9, long_share=0.7, nll=0.6, noise=0.2),  # single logs of hard rows lose half of the gap
        dict(of_gap=0.9, long_share=0.1, nll=0.3),  # most of the gap, but the NLL does not double
        dict(of_gap=0.9, long_share=0.5, nll=2.0),  # the gap closes as much from below
    ],
)
def test_healthy_runs_are_silent(loss, healthy):
    assert first(course(loss, **healthy, n=200)) is None


def test_both_contexts_falling_together_is_not_the_alignments_doing():
    """A preference loss can lower both rewards; the gap closes by a fifth of what the short one lost, or grows."""
    assert first(logs(*((-4.0 - i, 8.0 - 0.2 * i, 0.4 + i) for i in range(10)))) is None
    assert first(logs(*((-4.0 - i, 8.0 + 0.2 * i, 0.4 + i) for i in range(10)))) is None
    assert first(logs(*((-4.0 - i, 8.0 - 0.9 * i, 0.4 + i) for i in range(10)))) is not None


def test_short_reward_rising_is_never_a_collapse():
    assert first(logs(*((-4.0 + i, 8.0 - i, 0.4 + i) for i in range(8)))) is None
    assert first(logs(*((-4.0 + i, 8.0 + i, 0.4 + i) for i in range(8)))) is None


def test_an_unlikely_start_has_to_double():
    """Answers of another author, 3 nats per token: 1 nat more is DPO's usual third, not a collapse."""
    assert first(logs((-3.0, 2.0, 3.0), *[(-4.8, 0.2, 4.8)] * 9)) is None
    assert first(logs((-3.0, 2.0, 3.0), *[(-6.2, 0.2, 6.2)] * 9)) == 40
    assert first(logs((-0.1, 2.0, 0.1), *[(-1.9, 0.2, 1.9)] * 9)) == 40


def test_long_answers_lose_little_per_token():
    """SoLo-ORPO on the lab's second task: 15 tokens, 0.15 to 0.9 nats each, and the answers are right half as often."""
    assert first(logs((2.3, 3.1, 0.15), *[(-0.3, 0.7, 0.9)] * 9)) == 40


def test_a_teacher_that_drifts():
    """Self-distillation alone on the lab's second task, logs of steps 10, 50, 90 and on: no answer was right."""
    assert first(logs((-0.18, 1.51, 0.13), (-0.62, 0.76, 0.44), *[(-1.71, 0.43, 1.22)] * 3, (-4.62, 0.32, 3.3))) == 50


def test_noise_is_not_persistence():
    """Two logs of unlearned answers in three are not enough; nor are fewer logs than a comparison needs."""
    good, bad = (-0.1, 6.0, 0.1), (-5.0, 1.0, 5.0)
    assert first(logs(good, *[bad, bad, good] * 20)) is None
    assert first(logs(good, bad, bad)) is None and first([]) is None
    assert first(logs(good, bad, bad, bad)) == 40


# ---- in the trainer


COLLAPSE = "short answer is being unlearned"


def said(host_log) -> list[str]:
    return [message for message in host_log if COLLAPSE in message]


@pytest.fixture
def seen(monkeypatch):
    """The rule speaks from the third log on; the logs that it was shown, as steps."""
    from solopo_plugin import trainer

    shown = []

    def rule(history):
        log = [entry for entry in history if "solopo/nll" in entry]
        shown.append([entry["step"] for entry in log])
        return (log[0], log[-1]) if len(log) > 2 else None

    monkeypatch.setattr(trainer, "collapse", rule)
    return shown


def test_said_once_with_values_and_what_to_do(run, recipe, host_log, seen):
    log = [entry for entry in run(recipe()).log if "loss" in entry]
    assert len(log) == 6
    (message,) = said(host_log)
    assert "(steps 1 to 3: " in message and "`solopo_detach_short: true` or" in message
    for name in ("solopo/reward_short", "solopo/reward_gap", "solopo/nll"):
        assert f"`{name}` {log[0][name]:.3g} -> {log[2][name]:.3g}" in message


@pytest.mark.parametrize(
    "keys",
    [
        dict(solopo_objective="distill"),
        dict(solopo_align="distill", pref_loss="orpo"),
        dict(solopo_objective="distill", solopo_anchor=1.0),
    ],
)
def test_said_of_self_distillation(run, recipe, host_log, seen, keys):
    """Its teacher gets no gradient and shares the weights, so that it can drift."""
    run(recipe(max_steps=4, **keys))
    (message,) = said(host_log)
    assert "keep a `pref_loss` beside it" in message and "detach" not in message
    assert ("add `solopo_anchor: 1.0`" in message) == ("solopo_anchor" not in keys)


@pytest.mark.parametrize(
    "silent", [dict(solopo_alpha=0.0), dict(solopo_detach_short=True), dict(solopo_objective="longpo")]
)
def test_silent_where_alignment_cannot_cause_it(run, recipe, host_log, seen, silent):
    log = run(recipe(max_steps=4, **silent)).log
    assert len([entry for entry in log if "loss" in entry]) == 4 and not said(host_log)


def test_streams_and_evaluations(run, recipe, host_log, seen):
    """Logs of evaluations lie between those of steps; a stream has no length and here no evaluation."""
    run(recipe(max_samples=15, val_size=3, eval_strategy="steps", eval_steps=1, max_steps=3))
    run(recipe(streaming=True, max_samples=None, max_steps=3, num_train_epochs=None, dataloader_num_workers=1))
    assert len(said(host_log)) == 2


def test_a_resumed_run_compares_with_the_first_log(run, recipe, tmp_path, host_log, seen):
    whole = run(recipe(save_strategy="steps", save_steps=2, max_steps=4))
    del seen[:], host_log[:]
    run(recipe(resume_from_checkpoint=str(whole.dir / "checkpoint-2"), output_dir=str(tmp_path / "b"), max_steps=4))
    assert seen[0] == [1, 2, 3]
    (message,) = said(host_log)
    assert "(steps 1 to 3: " in message


# ---- real runs: the lab's base knows the short answers and not the long ones


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> dict:
    """A recipe of SoLo-SimPO on the lab's task."""
    from make_rows import make_rows
    from recall import BASE

    folder = tmp_path_factory.mktemp("recall")
    make_rows(folder, 320, seed=0)
    return dict(
        model_name_or_path=str(BASE), template="empty", cutoff_len=256, dataset="recall_solopo",
        dataset_dir=str(folder), max_samples=None, num_train_epochs=1.0, per_device_train_batch_size=8,
        gradient_accumulation_steps=1, learning_rate=1e-3, lr_scheduler_type="constant", logging_steps=4,
        pref_loss="simpo", pref_beta=2.0, simpo_gamma=0.5, solopo_alpha=1.0,
    )  # fmt: skip


def nlls(result) -> list[float]:
    return [entry["solopo/nll"] for entry in result.log if "loss" in entry]


def test_a_run_that_collapses_says_so_once(run, recipe, lab, host_log):
    """SimPO has no reference and no NLL term: nothing holds the short answer. The rate is three times the lab's."""
    result = run(recipe(**lab))
    values = nlls(result)
    assert values[0] < 0.5 and min(values[-3:]) > 3  # it has collapsed
    assert len(said(host_log)) == 1


@pytest.mark.slow
def test_a_run_that_does_not_collapse_is_silent(run, recipe, lab, host_log):
    """The same rows and steps at the lab's rate with DPO, whose reference holds the short answer, and its alpha."""
    result = run(recipe(**lab | dict(pref_loss="sigmoid", pref_beta=0.1, solopo_alpha=3.0, learning_rate=3e-4)))
    values = nlls(result)
    assert len(values) == 10 and max(values) < 0.5
    assert not said(host_log)
