"""The step and what surrounds it, in real runs on one process: against hand-written loops and against invariants."""

import json
import math

import pytest
import torch
from conftest import LOSS_BOUND, ROOT, SGD, demo_rows, weight_bound, write_dataset

from solopo_plugin.args import LENGTH_NORMALISED
from solopo_plugin.trainer import METRICS


def encode_rows(model_path: str, n: int) -> list[dict]:
    """Token ids of the sample's first rows through the host's template, without our code."""
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    template = get_template_and_fix_tokenizer(tokenizer, DataArguments(template="qwen"))
    encoded = []
    for row in demo_rows(n):
        sequences = {}
        for side, prompt in (("short", row["prompt"]), ("long", row["long_prompt"])):
            for name in ("chosen", "rejected"):
                turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": row[name]}]
                sequences[side, name] = template.encode_oneturn(tokenizer, turns)
        encoded.append(sequences)
    return encoded


def logp(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Per-token log-probs of a response, one sequence alone, in float64."""
    logits = model(torch.tensor([prompt + response])).logits[0].double()
    logps = logits.log_softmax(-1)
    return torch.stack([logps[len(prompt) + i - 1, token] for i, token in enumerate(response)])


def expected_loss(sequences: dict, model, reference, pref_loss: str, options: dict) -> torch.Tensor:
    """SoLoPO of one row as the paper writes it, one sequence at a time."""
    beta, gamma = 0.1, 0.5
    lp = {key: logp(model, *ids) for key, ids in sequences.items()}
    with torch.no_grad():
        ref = {name: logp(reference, *sequences["short", name]) for name in ("chosen", "rejected")}
    mean_of = pref_loss in LENGTH_NORMALISED
    value = {key: x.mean() if mean_of else x.sum() for key, x in lp.items()}
    ref = {key: x.mean() if mean_of else x.sum() for key, x in ref.items()}
    won, lost = value["short", "chosen"], value["short", "rejected"]
    odds = lambda x: torch.log(x.exp() / (1 - x.exp()))  # noqa: E731
    if pref_loss in ("sigmoid", "hinge", "ipo"):
        margin = (won - ref["chosen"]) - (lost - ref["rejected"])
    po = {
        "sigmoid": lambda: torch.log(1 + torch.exp(-beta * margin)),
        "hinge": lambda: torch.clamp(1 - beta * margin, min=0),
        "ipo": lambda: (margin - 1 / (2 * beta)) ** 2,
        "simpo": lambda: torch.log(1 + torch.exp(-(beta * (won - lost) - gamma))),
        "orpo": lambda: -won + beta * torch.log(1 + torch.exp(-(odds(won) - odds(lost)))),
    }[pref_loss]()
    times_beta = lambda x: beta * x  # noqa: E731
    rewards = dict(sigmoid=times_beta, hinge=times_beta, simpo=times_beta, ipo=lambda x: x, orpo=odds)
    reward = rewards[pref_loss] if options.get("solopo_align", "reward") == "reward" else lambda x: x
    align = 0
    for name in ("chosen", "rejected") if options.get("solopo_align_on") == "both" else ("chosen",):
        short = value["short", name].detach() if options.get("solopo_detach_short") else value["short", name]
        t = reward(short) - reward(value["long", name])
        kind = options.get("solopo_penalty", "auto")
        worse = t if name == "chosen" else -t
        s = {"drop": worse.clamp(min=0), "squared": t**2, "abs": t.abs()}
        align = align + (s[kind] if kind != "auto" else 2 * t**2 if pref_loss == "ipo" else t.abs())
    return po + options["solopo_alpha"] * align


CASES = [(loss, {"solopo_alpha": 2.0}) for loss in ("sigmoid", "ipo", "hinge", "simpo", "orpo")]
CASES += [(loss, {"solopo_alpha": 1.0, "solopo_align": "logp"}) for loss in ("sigmoid", "orpo")]
CASES += [(loss, {"solopo_alpha": 1.5, "solopo_align_on": "both"}) for loss in ("sigmoid", "ipo", "orpo")]
CASES += [("orpo", {"solopo_alpha": 1.0, "solopo_penalty": kind}) for kind in ("abs", "squared", "drop")]
CASES += [("sigmoid", {"solopo_alpha": 1.0, "solopo_penalty": "drop", "solopo_align_on": "both"})]
CASES += [("orpo", {"solopo_alpha": 1.0, "solopo_detach_short": True})]


def name_case(x) -> str:
    return x if isinstance(x, str) else "-".join(map(str, x.values()))


@pytest.mark.parametrize("forward", ["packed", "two_stage"])
@pytest.mark.parametrize("pref_loss, options", CASES, ids=name_case)
def test_a_step_is_what_the_paper_writes(run, recipe, tiny_model, pref_loss, options, forward):
    """Loss and weights after one SGD step over two rows equal a loop over single sequences in float64.

    The policy differs from the reference (another seed), so that DPO's margin is not 0. The step is fp32: losses agree
    to 1e-5 relative (sums of some fifty log-probs), weight changes to 1e-4 of the largest change.
    """
    from transformers import AutoModelForCausalLM

    policy_path, reference_path = tiny_model(seed=1), tiny_model()
    args = recipe(
        pref_loss=pref_loss, model_name_or_path=policy_path, ref_model=reference_path, max_samples=2, optim="sgd",
        per_device_train_batch_size=2, gradient_accumulation_steps=1, max_steps=1, learning_rate=0.1,
        lr_scheduler_type="constant", max_grad_norm=0.0, disable_shuffling=True, solopo_forward=forward, **options,
    )  # fmt: skip
    result = run(args)
    policy = AutoModelForCausalLM.from_pretrained(policy_path, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(reference_path, dtype=torch.float32)
    loss = sum(expected_loss(s, policy, reference, pref_loss, options) for s in encode_rows(policy_path, 2)) / 2
    loss.backward()
    assert result.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in policy.named_parameters():
        expected = -0.1 * parameter.grad
        change = result.weights[name] - parameter.detach()
        assert (change - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-7, name


@pytest.mark.parametrize("forward", ["packed", "two_stage"])
def test_longpo_is_what_its_paper_writes(run, recipe, tiny_model, forward):
    """NLL of every token of `x_long y_w` plus lambda * DPO, policy on the long and reference on the short prompt."""
    from transformers import AutoModelForCausalLM

    policy_path, reference_path = tiny_model(seed=1), tiny_model()
    result = run(recipe(
        solopo_objective="longpo", solopo_longpo_lambda=0.3, model_name_or_path=policy_path, ref_model=reference_path,
        max_samples=3, optim="sgd", per_device_train_batch_size=3, gradient_accumulation_steps=1, max_steps=1,
        learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0, disable_shuffling=True,
        solopo_forward=forward,
    ))  # fmt: skip
    policy = AutoModelForCausalLM.from_pretrained(policy_path, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(reference_path, dtype=torch.float32)
    total = 0
    for sequences in encode_rows(policy_path, 3):
        prompt, response = sequences["long", "chosen"]
        nll = -logp(policy, prompt[:1], prompt[1:] + response).mean()
        with torch.no_grad():
            ref_w, ref_l = (logp(reference, *sequences["short", name]).sum() for name in ("chosen", "rejected"))
        won, lost = (logp(policy, *sequences["long", name]).sum() for name in ("chosen", "rejected"))
        total = total + nll + 0.3 * torch.log(1 + torch.exp(-0.1 * ((won - ref_w) - (lost - ref_l))))
    (total / 3).backward()
    assert result.losses[0] == pytest.approx(total.item() / 3, rel=1e-5)
    for name, parameter in policy.named_parameters():
        expected = -0.1 * parameter.grad
        change = result.weights[name] - parameter.detach()
        assert (change - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-7, name


def test_accumulation_weighs_every_example_the_same(run, recipe, tmp_path):
    """7 rows: one window of 4 and one of 3, so that 2 x 2 ends with a micro-batch of 1. SGD, to see gradients only."""
    results = {}
    for batch, steps in ((1, 4), (2, 2), (4, 1)):
        results[batch, steps] = run(recipe(
            max_samples=7, per_device_train_batch_size=batch, gradient_accumulation_steps=steps, num_train_epochs=1.0,
            optim="sgd", learning_rate=0.1, max_grad_norm=0.0, pref_loss="orpo", output_dir=str(tmp_path / f"{batch}"),
        ))  # fmt: skip
    first = results[1, 4]
    assert len(first.losses) == 2
    for other in (results[2, 2], results[4, 1]):
        assert other.losses == pytest.approx(first.losses, rel=2e-6)
        for name, weight in first.weights.items():
            torch.testing.assert_close(other.weights[name], weight, rtol=0, atol=2e-6)
        for a, b in zip(first.log, other.log, strict=True):
            for key in METRICS:
                if key in a:
                    assert b[key] == pytest.approx(a[key], rel=1e-5, abs=1e-5), key


def test_eval_metrics_are_means_over_examples(run, recipe, tmp_path):
    """Whatever the batch size, and with an uneven last batch; every metric is there, in train and eval."""
    results = []
    for size in (1, 3, 7):
        args = recipe(
            max_samples=15, val_size=7, per_device_eval_batch_size=size, eval_strategy="epoch", num_train_epochs=1.0,
            per_device_train_batch_size=1, output_dir=str(tmp_path / f"{size}"),
        )  # fmt: skip
        results.append(run(args))
        logged = [e for e in results[-1].log if "loss" in e][0]
        assert sorted(key for key in logged if "/" in key) == sorted(METRICS)
    evals = [[e for e in r.log if "eval_loss" in e][0] for r in results]
    assert sorted(key for key in evals[0] if "/" in key) == sorted(f"eval_{key}" for key in METRICS)
    for other in evals[1:]:
        for key in ("eval_loss", *(f"eval_{key}" for key in METRICS)):
            assert other[key] == pytest.approx(evals[0][key], rel=1e-5, abs=1e-5), key
    assert 0 < evals[0]["eval_solopo/reward_gap"]


def test_metrics_fit_together(run, recipe):
    """Identities that the README states, on a logged step of SoLo-DPO with two micro-batches."""
    entry = run(recipe(solopo_alpha=2.0, max_steps=2)).log[1]
    assert entry["loss"] == pytest.approx(entry["solopo/po_loss"] + 2.0 * entry["solopo/align_loss"], rel=1e-5)
    assert entry["rewards/margins"] == pytest.approx(entry["rewards/chosen"] - entry["rewards/rejected"], abs=1e-6)
    assert entry["solopo/reward_short"] == pytest.approx(0.1 * entry["logps/chosen"], rel=1e-5)
    assert entry["solopo/align_loss"] == pytest.approx(entry["solopo/reward_gap"], rel=1e-6)
    assert entry["solopo/reward_gap"] >= abs(entry["solopo/reward_short"] - entry["solopo/reward_long"]) - 1e-6
    assert math.isfinite(entry["solopo/nll"]) and entry["solopo/nll"] > 0


def test_equal_contexts_cost_nothing_and_align_to_zero(run, recipe, tmp_path, monkeypatch):
    from solopo_plugin.trainer import SoloTrainer

    calls = []
    forward_long = SoloTrainer.forward_long
    monkeypatch.setattr(SoloTrainer, "forward_long", lambda self, *a: calls.append(1) or forward_long(self, *a))
    rows = [row | {"long_prompt": row["prompt"]} for row in demo_rows(8)]
    folder = write_dataset(tmp_path / "same", rows)
    common = dict(dataset="rows", dataset_dir=folder, max_samples=None, num_train_epochs=1.0)
    common["solopo_forward"] = "two_stage"
    ours = run(recipe(solopo_alpha=3.0, output_dir=str(tmp_path / "a"), **common))
    assert not calls
    assert all(e["solopo/align_loss"] == 0 == e["solopo/reward_gap"] for e in ours.log if "loss" in e)
    plain = run(recipe(solopo_alpha=0.0, output_dir=str(tmp_path / "b"), **common))
    assert ours.losses == plain.losses and all(torch.equal(w, plain.weights[n]) for n, w in ours.weights.items())

    mixed = [row | ({"long_prompt": row["prompt"]} if i % 2 else {}) for i, row in enumerate(demo_rows(4))]
    folder = write_dataset(tmp_path / "mixed", mixed)
    common |= dict(dataset_dir=folder, disable_shuffling=True, gradient_accumulation_steps=1, learning_rate=0.0)
    one_by_one = run(recipe(per_device_train_batch_size=1, output_dir=str(tmp_path / "c"), **common))
    assert len(calls) == 2  # rows 0 and 2
    gaps = [e["solopo/reward_gap"] for e in one_by_one.log if "loss" in e]
    assert gaps[1] == gaps[3] == 0 and gaps[0] > 0 < gaps[2]
    in_pairs = run(recipe(per_device_train_batch_size=2, output_dir=str(tmp_path / "d"), **common))
    pair_gaps = [e["solopo/reward_gap"] for e in in_pairs.log if "loss" in e]
    assert pair_gaps == pytest.approx([gaps[0] / 2, gaps[2] / 2], rel=1e-4)  # gaps are 1e-2 of the rewards: fp32


def test_alpha_zero_measures_the_gap_without_training_on_it(run, recipe):
    log = run(recipe(solopo_alpha=0.0, max_steps=2)).log
    assert log[0]["solopo/reward_gap"] > 0 and log[0]["loss"] == pytest.approx(log[0]["solopo/po_loss"], rel=1e-6)


def test_alignment_is_learned(run, recipe):
    """With the alignment as nearly the whole loss the gap falls to a third."""
    result = run(recipe(solopo_alpha=50.0, max_samples=16, num_train_epochs=6.0, learning_rate=3e-3))
    gaps = [e["solopo/reward_gap"] for e in result.log if "loss" in e]
    assert sum(gaps[-4:]) < sum(gaps[:4]) / 3


def test_a_non_finite_loss_stops_with_step_and_rows(run, recipe):
    sentence = r"not finite in training step 2, rows demo_solopo\[\d+\] \(nan\).*learning_rate"
    with pytest.raises(FloatingPointError, match=sentence):
        run(recipe(learning_rate=1e30, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant"))


def test_bf16_is_near_fp32(run, recipe, tmp_path):
    """Mixed precision on the CPU: the first loss, a mean over tokens, is the same to bf16's 8 bits (relative 2^-8)."""
    args = dict(pref_loss="orpo", max_steps=1)
    full = run(recipe(output_dir=str(tmp_path / "a"), **args))
    mixed = run(recipe(output_dir=str(tmp_path / "b"), bf16=True, **args))
    assert mixed.losses == pytest.approx(full.losses, rel=2**-8)
    assert mixed.losses != full.losses


@pytest.mark.parametrize("kind", ["freeze", "lora"])
def test_partial_fine_tuning(run, recipe, tmp_path, kind):
    extra = dict(freeze_trainable_layers=1) if kind == "freeze" else dict(lora_rank=4)
    result = run(recipe(finetuning_type=kind, num_train_epochs=4.0, **extra))
    assert result.losses[-1] < result.losses[0]
    if kind == "lora":
        assert all("lora_" in name for name in result.weights)


def test_gradient_checkpointing_changes_nothing(run, recipe, tmp_path):
    """Bit for bit: a layer that runs again does the same operations on the same numbers."""
    results = [
        run(recipe(max_steps=3, output_dir=str(tmp_path / name), **extra))
        for name, extra in (
            ("reentrant", {}),
            ("non_reentrant", {"use_reentrant_gc": False}),
            ("off", {"disable_gradient_checkpointing": True}),
        )
    ]
    for other in results[1:]:
        assert other.losses == results[0].losses
        assert all(torch.equal(weight, results[0].weights[name]) for name, weight in other.weights.items())


@pytest.mark.parametrize("forward", ["packed", "two_stage"])
def test_counters_see_both_contexts(run, recipe, tiny_model, forward):
    """What was run: in two stages the short prompt twice, packed once. The effective rate counts all sequences."""
    result = run(recipe(
        max_samples=2, num_train_epochs=1.0, include_num_input_tokens_seen="non_padding",
        include_effective_tokens_per_second=True, solopo_forward=forward,
    ))  # fmt: skip
    tokens = shared = 0
    for sequences in encode_rows(tiny_model(), 2):
        for key in (("short", "chosen"), ("short", "rejected"), ("long", "chosen")):
            prompt, response = sequences[key]
            tokens += len(prompt) + len(response)
        shared += len(sequences["short", "rejected"][0]) if forward == "packed" else 0
    seen = [e for e in result.log if "num_input_tokens_seen" in e][-1]["num_input_tokens_seen"]
    assert seen == tokens - shared
    metrics = json.loads((result.dir / "train_results.json").read_text())
    rate = tokens / metrics["train_runtime"]
    assert metrics["effective_tokens_per_sec"] == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_packed_runs_are_two_stage_runs(run, recipe, tmp_path, host_log, kind):
    """Six steps with a reference: a second model, or the adapter off. `auto` is packed on this model."""
    extra = dict(finetuning_type=kind, pref_loss="sigmoid", solopo_alpha=2.0, **SGD)
    auto, two_stage = (
        run(recipe(solopo_forward=forward, output_dir=str(tmp_path / forward), **extra))
        for forward in ("auto", "two_stage")
    )
    assert not any("in two stages" in message for message in host_log)
    assert len(auto.losses) == 6 and auto.losses != two_stage.losses  # rounding tells them apart: both forms ran
    assert auto.losses == pytest.approx(two_stage.losses, **LOSS_BOUND)
    for name, weight in two_stage.weights.items():
        torch.testing.assert_close(auto.weights[name], weight, **weight_bound(6))


def test_a_model_that_cannot_be_packed(run, recipe, tiny_model, host_log):
    """`auto` says so once and trains in two stages; `packed` is refused with the reason."""
    args = recipe(model_name_or_path=tiny_model("mistral", sliding_window=64), max_steps=1)
    assert len(run(args).losses) == 1
    said = [message for message in host_log if "in two stages" in message]
    assert said == ["`solopo_forward: auto` runs in two stages, not packed, on this model: its attention has a sliding "
                    "window (64)."]  # fmt: skip
    with pytest.raises(
        ValueError, match=r"packed` does not run on this model: its attention has a sliding window \(64\)"
    ):
        run(args | dict(solopo_forward="packed"))


def test_evaluation_alone(run, recipe, tmp_path):
    """`do_train: false`: metrics are written, rewards relative to the model itself are left out as in the host."""
    from llamafactory.train.tuner import run_exp

    args = recipe(do_train=False, do_eval=True, dataset=None, eval_dataset="demo_solopo", max_samples=5)
    run_exp(args)
    metrics = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert metrics["eval_loss"] > 0 and not any("rewards/" in name for name in metrics)
    assert str(ROOT) not in json.dumps(metrics)
