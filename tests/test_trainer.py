"""The step and what surrounds it, in real runs on one process: against hand-written loops and against invariants."""

import errno
import json
import math
import re
import shutil
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from conftest import LOSS_BOUND, ROOT, SGD, demo_rows, weight_bound, write_dataset

from solopo_plugin.host.preflight import Refused
from solopo_plugin.losses import LENGTH_NORMALISED
from solopo_plugin.qa.files import lock_folder
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


# in two stages too: every loss, and what no step of by_hand.py has, where the rest is compared in both forms
FORMS = [(*case, "packed") for case in CASES]
FORMS += [(*case, "two_stage") for case in CASES if len(case[1]) == 1 or case[1].get("solopo_penalty") == "abs"]


def name_case(x) -> str:
    return x if isinstance(x, str) else "-".join(map(str, x.values()))


@pytest.mark.parametrize("pref_loss, options, forward", FORMS, ids=name_case)
def test_a_step_is_what_the_paper_writes(run, recipe, tiny_model, pref_loss, options, forward):
    """Loss and weights after one SGD step over two rows equal a loop over single sequences in float64.

    The policy differs from the reference (another seed), so that DPO's margin is not 0. The step is fp32: losses agree
    to 1e-5 relative (sums of some fifty log-probs), weight changes to 1e-4 of the largest change.
    """
    from transformers import AutoModelForCausalLM

    policy_path, reference_path = tiny_model(seed=1), tiny_model()
    args = recipe(
        pref_loss=pref_loss, model_name_or_path=policy_path, max_samples=2, optim="sgd",
        ref_model=None if pref_loss in ("simpo", "orpo") else reference_path,
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
    """Identities that docs/training.md states, on a logged step of SoLo-DPO with two micro-batches."""
    entry = run(recipe(solopo_alpha=2.0, max_steps=2)).log[1]
    assert entry["loss"] == pytest.approx(entry["solopo/po_loss"] + 2.0 * entry["solopo/align_loss"], rel=1e-5)
    assert entry["rewards/margins"] == pytest.approx(entry["rewards/chosen"] - entry["rewards/rejected"], abs=1e-6)
    assert entry["solopo/reward_short"] == pytest.approx(0.1 * entry["logps/chosen"], rel=1e-5)
    assert entry["solopo/align_loss"] == pytest.approx(entry["solopo/reward_gap"], rel=1e-6)
    assert entry["solopo/reward_gap"] >= abs(entry["solopo/reward_short"] - entry["solopo/reward_long"]) - 1e-6
    assert math.isfinite(entry["solopo/nll"]) and entry["solopo/nll"] > 0


def test_equal_contexts_cost_nothing_and_align_to_zero(run, recipe, tmp_path, monkeypatch):
    from solopo_plugin.forward import TwoStages

    calls = []
    score = TwoStages._score
    monkeypatch.setattr(TwoStages, "_score", lambda self, *a: calls.extend([1] * ("long_" in a)) or score(self, *a))
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


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_non_finite_gradient_of_a_finite_loss_stops_before_it_is_saved(run, recipe, tmp_path, monkeypatch, clip):
    """Emulate attention's backward that gives NaN, as cuDNN's can; the weights of the step before stay good."""
    from safetensors.torch import load_file

    from solopo_plugin.trainer import SoloTrainer

    step = SoloTrainer.training_step

    def spoiled(self, model, *args):
        loss = step(self, model, *args)
        if self.state.global_step == 1:
            model.model.layers[0].self_attn.q_proj.weight.grad[0, 0] = float("nan")
        return loss

    monkeypatch.setattr(SoloTrainer, "training_step", spoiled)
    keys = dict(save_strategy="steps", save_steps=1, save_only_model=True, max_grad_norm=clip)
    with pytest.raises(FloatingPointError, match="The gradient is not finite in training step 2, though the loss is"):
        run(recipe(**keys))
    (kept,) = (tmp_path / "out").glob("checkpoint-*")
    assert kept.name == "checkpoint-1"
    assert all(weight.isfinite().all() for weight in load_file(kept / "model.safetensors").values())


@pytest.mark.parametrize("left_out", [None, "fp16", "scaler", "optimizer_step_was_skipped"])
def test_a_step_that_is_left_out_ends_no_run(left_out):
    """Leave it to a scaler, the recipe's or of accelerate's own configuration, or to DeepSpeed: they skip the step."""
    from solopo_plugin.trainer import SoloTrainer

    trainer = object.__new__(SoloTrainer)
    trainer.args, trainer.state = SimpleNamespace(fp16=left_out == "fp16"), SimpleNamespace(global_step=4)
    of_accelerate = {name: left_out == name for name in ("scaler", "optimizer_step_was_skipped")}
    trainer.accelerator = SimpleNamespace(distributed_type="NO", **of_accelerate)
    assert trainer._get_grad_norm(None, grad_norm=torch.tensor(2.0)) == 2
    if left_out:
        assert math.isnan(trainer._get_grad_norm(None, grad_norm=torch.tensor(float("nan"))))
        return
    for bad in ("nan", "inf"):
        with pytest.raises(FloatingPointError, match="The gradient is not finite in training step 5"):
            trainer._get_grad_norm(None, grad_norm=torch.tensor(float(bad)))


@pytest.mark.parametrize("forward", ["packed", "two_stage"])
def test_cudnn_does_not_attend_in_padded_batches(run, recipe, monkeypatch, forward):
    """Keep its backward, which a mask can make NaN, from training in two stages, and from nothing else."""
    from solopo_plugin.trainer import SoloTrainer

    kernels, step = [], SoloTrainer.solopo_step

    def seen(self, model, inputs):
        cuda = torch.backends.cuda
        kernels.append((cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()))
        return step(self, model, inputs)

    monkeypatch.setattr(SoloTrainer, "solopo_step", seen)
    run(recipe(pref_loss="orpo", solopo_forward=forward, max_steps=1))
    assert set(kernels) == {(forward == "packed", True, True)}
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_a_checkpoint_just_in_time(run, recipe, tmp_path, monkeypatch):
    """Save a whole checkpoint where the Trainer asks for one at SIGTERM, with keywords of its own."""
    from solopo_plugin.qa.checkpoints import whole
    from solopo_plugin.trainer import SoloTrainer

    step = SoloTrainer.training_step

    def told_to_end(self, *args):
        (manager,) = (m for c in self.callback_handler.callbacks if (m := getattr(c, "jit_manager", None)))
        manager.is_checkpoint_requested = self.state.global_step == 2
        return step(self, *args)

    monkeypatch.setattr(SoloTrainer, "training_step", told_to_end)
    run(recipe(enable_jit_checkpoint=True, pref_loss="orpo"))
    assert [path.name for path in whole(tmp_path / "out")] == ["checkpoint-2"]
    assert not [*(tmp_path / "out").glob("*/checkpoint-is-incomplete.txt")]


def test_bf16_is_near_fp32(run, recipe, tmp_path):
    """Mixed precision on the CPU: the first loss, a mean over tokens, is the same to bf16's 8 bits (relative 2^-8)."""
    args = dict(pref_loss="orpo", max_steps=1)
    full = run(recipe(output_dir=str(tmp_path / "a"), **args))
    mixed = run(recipe(output_dir=str(tmp_path / "b"), bf16=True, **args))
    assert mixed.losses == pytest.approx(full.losses, rel=2**-8)
    assert mixed.losses != full.losses


@pytest.mark.parametrize("kind, forward", [("full", "packed"), ("full", "two_stage"), ("lora", "packed")])
def test_logits_stay_in_16_bits(run, recipe, tmp_path, monkeypatch, kind, forward):
    """Keep losses and, with one use of the logits, weights to the same bits where accelerate makes all fp32 at once."""
    from transformers import Trainer

    from solopo_plugin.trainer import SoloTrainer

    results, step, dtypes = [], SoloTrainer.solopo_step, []

    def seen(self, model, inputs):
        hook = model.register_forward_hook(lambda module, given, output: dtypes.append(output.logits.dtype))
        losses = step(self, model, inputs)
        hook.remove()
        return losses

    monkeypatch.setattr(SoloTrainer, "solopo_step", seen)
    args = recipe(bf16=True, pref_loss="orpo", finetuning_type=kind, solopo_forward=forward, max_steps=3,
                  solopo_logp_chunk=8, eval_dataset="demo_solopo", eval_strategy="epoch", **SGD)  # fmt: skip
    for name, dtype in (("ours", torch.bfloat16), ("accelerate's", torch.float32)):
        results.append(run(args | dict(output_dir=str(tmp_path / name))))
        assert set(dtypes) == {dtype}
        dtypes.clear()
        post = Trainer.create_accelerator_and_postprocess
        monkeypatch.setattr(SoloTrainer, "create_accelerator_and_postprocess", post)
    ours, theirs = results
    assert ours.losses == theirs.losses and ours.log[-2]["eval_loss"] == theirs.log[-2]["eval_loss"]
    assert all(torch.equal(weight, theirs.weights[name]) for name, weight in ours.weights.items())


DROPS = dict.fromkeys(("attention_dropout", "residual_dropout", "embedding_dropout"), 0.1)


@pytest.mark.parametrize(
    "forward, architecture, drawing",
    [
        ("packed", "starcoder2", DROPS),
        ("two_stage", "starcoder2", DROPS),
        ("two_stage", "phimoe", {"num_local_experts": 8, "initializer_range": 0.2}),
    ],
)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_dropout_is_off(run, recipe, tiny_model, forward, kind, architecture, drawing):
    """Give one loss, that of evaluation, in steps that move nothing, also where a model drops by a function.

    Phi-3.5-MoE draws its experts while it trains.
    """
    log = run(recipe(
        model_name_or_path=tiny_model(architecture, **drawing), finetuning_type=kind, pref_loss="orpo", max_samples=4,
        eval_dataset="demo_solopo", eval_strategy="epoch", per_device_eval_batch_size=2, num_train_epochs=2.0,
        learning_rate=1e-12, optim="sgd", solopo_forward=forward,
    )).log  # fmt: skip
    losses = [entry[name] for entry in log for name in ("loss", "eval_loss") if name in entry]
    assert len(losses) == 4 and losses == pytest.approx([losses[0]] * 4, rel=1e-5)


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


@pytest.mark.parametrize("forward, objective", [("packed", "solopo"), ("two_stage", "solopo"), ("two_stage", "longpo")])
def test_counters_see_what_is_run(run, recipe, tiny_model, forward, objective):
    """Count in two stages the short prompt twice, packed once, and LongPO's long pair alone.

    The effective rate is of packed rows.
    """
    result = run(recipe(
        max_samples=2, num_train_epochs=1.0, include_num_input_tokens_seen="non_padding",
        include_effective_tokens_per_second=True, solopo_forward=forward, solopo_objective=objective,
    ))  # fmt: skip
    tokens = shared = pairs = 0
    for sequences in encode_rows(tiny_model(), 2):
        pairs += sum(len(ids) for response in ("chosen", "rejected") for ids in sequences["long", response])
        for key in (("short", "chosen"), ("short", "rejected"), ("long", "chosen")):
            prompt, response = sequences[key]
            tokens += len(prompt) + len(response)
        shared += len(sequences["short", "rejected"][0])
    seen = [e for e in result.log if "num_input_tokens_seen" in e][-1]["num_input_tokens_seen"]
    assert seen == (pairs if objective == "longpo" else tokens - shared * (forward == "packed"))
    if objective == "longpo":
        return
    metrics = json.loads((result.dir / "train_results.json").read_text())
    rate = (tokens - shared) / metrics["train_runtime"]
    assert metrics["effective_tokens_per_sec"] == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_packed_runs_are_two_stage_runs(run, recipe, tmp_path, host_log, kind):
    """Six steps with a reference: a second model, or the adapter off. `auto` is packed on this model."""
    extra = dict(finetuning_type=kind, pref_loss="sigmoid", solopo_alpha=2.0, **SGD)
    auto, two_stage = (
        run(recipe(solopo_forward=forward, output_dir=str(tmp_path / forward), **extra))
        for forward in ("auto", "two_stage")
    )
    forms = [message for message in host_log if message.startswith("A step runs")]
    assert forms == [
        "A step runs packed; attention: SDPA, segment by segment.",
        "A step runs in two stages, not packed: `solopo_forward: two_stage`; attention: SDPA.",
    ]
    assert len(auto.losses) == 6 and auto.losses != two_stage.losses  # rounding tells them apart: both forms ran
    assert auto.losses == pytest.approx(two_stage.losses, **LOSS_BOUND)
    for name, weight in two_stage.weights.items():
        torch.testing.assert_close(auto.weights[name], weight, **weight_bound(6))


def test_rows_beyond_the_window_are_told(run, recipe, tiny_model, host_log):
    """Take the widened window with YaRN, and `cutoff_len` for a stream's rows."""
    stream = dict(streaming=True, max_samples=None, dataloader_num_workers=1)
    yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=256, rope_theta=1e4)
    for window, changes, keys in (
        (128, {}, {}),
        (256, dict(rope_parameters=yarn), {}),
        (1024, {}, stream),
        (128, {}, stream),
    ):
        model = tiny_model(max_position_embeddings=window, **changes)
        run(recipe(model_name_or_path=model, pref_loss="orpo", **(dict(max_samples=4, max_steps=1) | keys)))
    told = [message for message in host_log if "the model was made for" in message]
    assert len(told) == 2
    assert re.match(r"4 of 4 rows have up to \d+ tokens, and the model was made for 128: widen its window", told[0])
    assert told[0].endswith("or set `cutoff_len: 128`, with `solopo_overlength: drop` to leave longer rows out.")
    assert told[1].startswith("Rows of a stream have up to 1,024 tokens, and the model was made for 128: ")
    ends = "or set `cutoff_len: 128`, beyond which a row ends the run: leave longer ones out of the data set."
    assert told[1].endswith(ends)  # `solopo_overlength: drop` is refused of a stream


def test_a_model_that_cannot_be_packed(run, recipe, tiny_model, host_log):
    """`auto` says so once and trains in two stages; `packed` is refused with the reason."""
    args = recipe(model_name_or_path=tiny_model("gemma2"), max_steps=1)
    assert len(run(args).losses) == 1
    said = [message for message in host_log if "in two stages" in message]
    reason = "it has layers other than full attention (sliding_attention)"  # Gemma 2's, which is not tested packed
    assert said == [f"A step runs in two stages, not packed: {reason}; attention: eager."]
    with pytest.raises(Refused, match=re.escape(f"packed` does not run on this model: {reason}")):
        run(args | dict(solopo_forward="packed"))


def test_a_reference_that_cannot_be_packed(run, recipe, tiny_model):
    reason = "it has layers other than full attention (sliding_attention)"
    sentence = f"`ref_model` cannot run packed rows: {reason}; set `solopo_forward: two_stage`."
    with pytest.raises(Refused, match=re.escape(sentence)):
        run(recipe(ref_model=tiny_model("gemma2"), max_steps=1))


def test_evaluation_alone(run, recipe, tmp_path):
    """`do_train: false`: metrics are written, rewards relative to the model itself are left out as in the host."""
    from llamafactory.train.tuner import run_exp

    args = recipe(do_train=False, do_eval=True, dataset=None, eval_dataset="demo_solopo", max_samples=5)
    run_exp(args)
    metrics = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert metrics["eval_solopo/align_loss"] > 0 and not any("rewards/" in name for name in metrics)
    assert str(ROOT) not in json.dumps(metrics)


OF_PAIRS = {"loss", "solopo/po_loss", *(name for name in METRICS if name.startswith("rewards/"))}


@pytest.mark.parametrize("changes, empty", [
    ({}, OF_PAIRS),
    (dict(solopo_anchor=1.0, eval_on_each_dataset=True), OF_PAIRS | {"solopo/anchor_kl"}),
    (dict(solopo_anchor=1.0, pref_loss="orpo"), {"solopo/anchor_kl"}),
    (dict(pref_loss="orpo"), set()),
])  # fmt: skip
def test_evaluation_against_itself_says_so(run, recipe, tmp_path, host_log, changes, empty):
    """Save only what needs no other model."""
    from llamafactory.train.tuner import run_exp

    run_exp(recipe(do_train=False, do_eval=True, dataset=None, eval_dataset="demo_solopo", max_samples=5, **changes))
    metrics = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    asked = (*METRICS, "loss", *(["solopo/anchor_kl"] if "solopo_anchor" in changes else []))
    prefix = "eval_demo_solopo_" if "eval_on_each_dataset" in changes else "eval_"
    assert {name for name in asked if prefix + name not in metrics} == empty
    assert sum("no reference but the model itself" in message for message in host_log) == bool(empty)


# ---- the order of the rows


@pytest.fixture
def rows_seen(monkeypatch):
    """Names of the rows of every training step's micro-batches, in order."""
    from solopo_plugin.trainer import SoloTrainer

    seen, compute_loss = [], SoloTrainer.compute_loss
    monkeypatch.setattr(
        SoloTrainer, "compute_loss", lambda self, model, inputs, *a, **k: seen.append(inputs["names"])
        or compute_loss(self, model, inputs, *a, **k),
    )  # fmt: skip
    return seen


def grouped(lengths: list[int], size: int, seed: int) -> list[list[str]]:
    """The order of transformers' own function, drawn from a seed, in batches of one."""
    from transformers.trainer_pt_utils import get_length_grouped_indices

    order = get_length_grouped_indices(lengths, size, generator=torch.Generator().manual_seed(seed))
    return [[f"demo_solopo[{i}]"] for i in order]


def test_rows_grouped_by_length_and_resumed_in_their_order(run, recipe, tmp_path, tiny_model, rows_seen):
    """Each epoch in an order of its own; a run that resumes in the middle of the second is the uninterrupted one."""
    lengths = []
    for sequences in encode_rows(tiny_model(), 24):
        prompts = len(sequences["short", "chosen"][0]) + len(sequences["long", "chosen"][0])
        chosen, rejected = (len(sequences["short", name][1]) for name in ("chosen", "rejected"))
        lengths.append(prompts + 2 * chosen + rejected)  # a packed row
    args = recipe(
        max_samples=24, train_sampling_strategy="group_by_length", per_device_train_batch_size=1, pref_loss="orpo",
        gradient_accumulation_steps=2, num_train_epochs=2.0, save_strategy="steps", save_steps=17,
        val_size=None, eval_dataset="demo_solopo", eval_strategy="epoch",
    )  # fmt: skip
    whole = run(args)
    expected = [grouped(lengths, 2, seed) for seed in (7, 8)]
    assert rows_seen == expected[0] + expected[1] and expected[0] != expected[1]
    rows_seen.clear()
    torch.rand(3)  # whatever the state of torch's generator
    again = run(args | dict(resume_from_checkpoint=str(whole.dir / "checkpoint-17"), output_dir=str(tmp_path / "b")))
    assert rows_seen == expected[1][10:]
    assert again.losses == whole.losses
    assert all(torch.equal(w, again.weights[name]) for name, w in whole.weights.items())


def test_a_step_of_grouped_rows_is_the_same_however_it_is_dealt_out(run, recipe, tmp_path, rows_seen):
    steps = []
    for size in (1, 2, 4):
        run(recipe(
            train_sampling_strategy="group_by_length", per_device_train_batch_size=size, num_train_epochs=1.0,
            gradient_accumulation_steps=4 // size, pref_loss="orpo", output_dir=str(tmp_path / str(size)),
        ))  # fmt: skip
        rows = [row for batch in rows_seen for row in batch]
        steps.append([rows[i : i + 4] for i in range(0, len(rows), 4)])
        rows_seen.clear()
    assert steps[0] == steps[1] == steps[2]
    assert sorted(sum(steps[0], [])) == sorted(f"demo_solopo[{i}]" for i in range(12))


# ---- what surrounds the step


def test_a_smaller_batch_after_running_out_of_memory_begins_its_metrics_anew(run, recipe, monkeypatch):
    from solopo_plugin.trainer import SoloTrainer

    sizes, step = [], SoloTrainer.solopo_step

    def third_fails(self, model, inputs):
        sizes.append(len(inputs["names"]))
        if len(sizes) == 3:
            raise RuntimeError("CUDA out of memory.")
        return step(self, model, inputs)

    monkeypatch.setattr(SoloTrainer, "solopo_step", third_fails)
    result = run(recipe(
        auto_find_batch_size=True, per_device_train_batch_size=4, gradient_accumulation_steps=1, num_train_epochs=1.0,
        logging_steps=4, pref_loss="orpo", solopo_alpha=1.0,
    ))  # fmt: skip
    assert sizes == [4, 4, 4, 3, 3, 3, 3]
    entry = result.log[0]
    assert entry["step"] == 4
    assert entry["loss"] == pytest.approx(entry["solopo/po_loss"] + entry["solopo/align_loss"], rel=1e-5)


def layerwise_sgd(model, training_args, finetuning_args):
    """Return an optimizer of LOMO's kind in the host's own form: a parameter steps as soon as its gradient is there."""
    from llamafactory.train.trainer_utils import DummyOptimizer

    optimizers = {p: torch.optim.SGD([p], lr=training_args.learning_rate) for p in model.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(step)
    return DummyOptimizer(lr=training_args.learning_rate, optimizer_dict=optimizers)


@pytest.mark.parametrize("forward", ["packed", "two_stage"])
def test_an_optimizer_that_steps_within_backward_steps_once(run, recipe, tmp_path, host_log, monkeypatch, forward):
    """Give bit for bit the weights of a run without checkpointing.

    Two forwards under reentrant checkpointing would be two half steps, with LOMO and the like.
    """
    import llamafactory.train.dpo.trainer as host

    monkeypatch.setattr(host, "create_custom_optimizer", layerwise_sgd)
    monkeypatch.setattr("solopo_plugin.workflow.check_start", lambda *_: None)  # LOMO's package is not there
    monkeypatch.setattr("solopo_plugin.host.preflight.PACKAGES", {})  # LOMO's, whose backward takes a learning rate
    monkeypatch.setattr("accelerate.Accelerator.backward", lambda self, loss, **_: loss.backward())
    args = dict(optim="lomo", gradient_accumulation_steps=1, max_steps=3, learning_rate=0.1, pref_loss="orpo",
                solopo_forward=forward, lr_scheduler_type="constant")  # fmt: skip
    off = run(recipe(disable_gradient_checkpointing=True, output_dir=str(tmp_path / "off"), **args))
    assert not any("use_reentrant_gc" in message for message in host_log)
    on = run(recipe(output_dir=str(tmp_path / "on"), **args))
    said = "with two forwards a step it is needed by an optimizer that steps within backward."
    assert any(message.endswith(said) for message in host_log) == (forward == "two_stage")
    assert on.losses == off.losses and len(set(on.losses)) == 3
    assert all(torch.equal(w, on.weights[name]) for name, w in off.weights.items())


def test_an_evaluation_drops_no_rows(run, recipe):
    """Keep them also where training drops what does not fill a batch, and where no batch would be full."""
    keys = dict(dataset="demo_solopo", max_samples=11, eval_dataset="demo_solopo", eval_strategy="epoch", max_steps=5,
                pref_loss="orpo", per_device_train_batch_size=2, gradient_accumulation_steps=1)  # fmt: skip
    kept, small = (
        run(recipe(dataloader_drop_last=drop, per_device_eval_batch_size=size, **keys)).log
        for drop, size in ((False, 8), (True, 16))
    )
    losses = [next(entry["eval_loss"] for entry in log if "eval_loss" in entry) for log in (kept, small)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_stream_leaves_out_what_fills_no_step(run, recipe, tmp_path, rows_seen):
    """Make 3 micro-batches a pass and 2 a step: the third is in none, and its gradient in no other."""
    keys = dict(streaming=True, max_samples=None, dataloader_num_workers=1, buffer_size=1, num_train_epochs=None,
                optim="sgd", learning_rate=1e-9, solopo_alpha=0, max_steps=3)  # fmt: skip
    rows = demo_rows(5)
    folder = write_dataset(tmp_path / "data", rows)
    log = run(recipe(dataset="rows", dataset_dir=folder, **keys))
    assert log.losses == pytest.approx([math.log(2)] * 3, rel=1e-4)
    norms = [entry["grad_norm"] for entry in log.log if "grad_norm" in entry]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-3) and len(rows_seen) == 6
    sentence = "The stream ends before a step is full, after 3 of 4 batches of this process: lower `gradient_acc"
    with pytest.raises(Refused, match=sentence):  # no traceback on the command line
        run(recipe(dataset="rows", dataset_dir=folder, **keys | dict(gradient_accumulation_steps=4)))


@pytest.mark.parametrize("streams", [False, True])
def test_a_window_that_is_not_full_is_left_out_of_streams_alone(monkeypatch, streams):
    """Keep rows that are at hand: older Trainers ask for a full last window of an epoch that is resumed."""
    from datasets import Dataset
    from llamafactory.train.dpo.trainer import CustomDPOTrainer

    from solopo_plugin.trainer import SoloTrainer

    window = [{"names": ["a", "b"]}, {"names": ["c"]}]
    monkeypatch.setattr(CustomDPOTrainer, "get_batch_samples", lambda *_: (window, None))
    trainer, rows = object.__new__(SoloTrainer), Dataset.from_dict({"x": [1, 2, 3]})
    trainer.train_dataset = rows.to_iterable_dataset() if streams else rows
    trainer.state, trainer.control = SimpleNamespace(global_step=1, max_steps=2), SimpleNamespace()
    batches, _ = trainer.get_batch_samples(iter(window), 4, None)
    assert batches == ([] if streams else window) and trainer.window_weight == (1.0 if streams else 2 / 3)
    trainer.state.global_step = 2  # of a run that is resumed behind its last step: the Trainer would make one more
    assert trainer.get_batch_samples(iter(window), 4, None)[0] == [] and trainer.control.should_training_stop


def test_a_model_is_pushed_with_its_card(run, recipe, monkeypatch):
    """Ask nothing of the hub for it, neither then nor at a checkpoint; write a licence that is given."""
    import transformers.trainer as host

    from solopo_plugin.trainer import SoloTrainer

    def asked(name):
        raise AssertionError(f"the hub was asked for the licence of {name}")

    monkeypatch.setattr("transformers.modelcard.model_info", asked)
    monkeypatch.setattr("transformers.modelcard.is_offline_mode", lambda: False)
    pushed = []
    monkeypatch.setattr(host, "create_repo", lambda *_, **__: SimpleNamespace(repo_id="me/x"))
    monkeypatch.setattr(host, "upload_folder", lambda **keys: pushed.append(keys["commit_message"]))
    result = run(recipe(push_to_hub=True, hub_model_id="me/x", hub_token="t", max_steps=1))
    assert pushed and "\nlicense: other\n" in (result.dir / "README.md").read_text()
    given = []
    monkeypatch.setattr(host.TrainingSummary, "from_trainer", lambda *_, license, **__: given.append(license) or 1 / 0)
    fake = SimpleNamespace(is_world_process_zero=lambda: True, args=SimpleNamespace(output_dir=str(result.dir / "no")))
    for keys in ({}, {"license": "mit"}):
        with pytest.raises(ZeroDivisionError):
            SoloTrainer.create_model_card(fake, model_name="x", **keys)
    assert given == ["other", "mit"]


@pytest.mark.parametrize("best, sets, said", [
    ("align_loss", None, "`metric_for_best_model: align_loss` is no metric of the evaluation. "
     "Did you mean `solopo/align_loss`? There are: loss, rewards/chosen, "),
    ("loss", {"one": 1, "two": 2}, "`metric_for_best_model: loss` is no metric of the evaluation. "
     "Did you mean `two_loss`? There are: one_loss, one_rewards/chosen, "),
    ("solopo/align_loss", 1, None), ("eval_loss", 1, None), ("eval_two_solopo/nll", {"one": 1, "two": 2}, None),
    (None, 1, None),
])  # fmt: skip
@pytest.mark.parametrize("load_best", [False, True])
def test_a_best_checkpoint_by_no_metric(best, sets, said, load_best):
    """Name `load_best_model_at_end` where it watches `loss`, which transformers fills in without a metric."""
    from solopo_plugin.workflow import check_best_exists

    def check(when):
        args = SimpleNamespace(metric_for_best_model=best, eval_strategy=when, load_best_model_at_end=load_best)
        check_best_exists(SimpleNamespace(args=args, eval_dataset=sets, metrics=METRICS))

    check("no")
    if load_best and best == "loss" and said:
        said = said.replace("`metric_for_best_model: loss` is", "`load_best_model_at_end` watches `loss`, which is")
    with nullcontext() if said is None else pytest.raises(ValueError, match="^" + re.escape(said)):
        check("steps")


def test_a_best_checkpoint_by_no_metric_is_refused_before_training(run, recipe):
    args = dict(metric_for_best_model="align_loss", eval_dataset="demo_solopo", eval_strategy="epoch")
    with pytest.raises(Refused, match="`metric_for_best_model: align_loss` is no metric of the evaluation"):
        run(recipe(load_best_model_at_end=True, save_strategy="epoch", **args))


def test_rows_that_fill_no_batch_are_refused_before_scoring(run, recipe):
    """The Trainer, which drops them all, blames `max_steps`."""
    keys = dict(dataloader_drop_last=True, max_samples=3, gradient_accumulation_steps=1, max_steps=1)
    with pytest.raises(Refused, match="^`dataloader_drop_last: true` drops all 3 rows: a batch has 4; remove the key"):
        run(recipe(per_device_train_batch_size=4, **keys))
    assert len(run(recipe(per_device_train_batch_size=3, **keys)).losses) == 1


# ---- a checkpoint without the optimizer


def killed_after_step_4(folder):
    """Take away what a run of 6 steps wrote after its checkpoint of step 4."""
    (folder / "model.safetensors").unlink()
    shutil.rmtree(folder / "checkpoint-6")


def test_a_resume_without_the_optimizer_says_that_it_starts_anew(run, recipe, host_log, tmp_path):
    """The same command again on what `save_only_model` left, and on a whole checkpoint, where nothing is to be said.

    Said, too, is that the checkpoint's rows are another folder's.

    What is said of the learning rate is what happens: it begins again at the first step's.
    """
    args = recipe(
        num_train_epochs=2.0, save_strategy="steps", save_steps=4, overwrite_output_dir=None, pref_loss="orpo",
        learning_rate=1e-3, warmup_steps=2, save_only_model=True,
    )  # fmt: skip
    rates = lambda log: [e["learning_rate"] for e in log if "loss" in e]  # noqa: E731
    whole = run(args)
    assert not any("no optimizer state" in message for message in host_log)
    killed_after_step_4(whole.dir)
    again = run(args)
    said = [message for message in host_log if "no optimizer state" in message]
    checkpoint = whole.dir / "checkpoint-4"
    assert said == [
        f"{checkpoint} has no optimizer state (`save_only_model`?): weights and step go on from there, the optimizer "
        "and the learning rate's schedule start anew; to start from the beginning set `overwrite_output_dir: true`."
    ]
    assert rates(again.log)[4:] == rates(whole.log)[:2] != rates(whole.log)[4:]

    shutil.rmtree(whole.dir)
    host_log.clear()
    run(args | dict(save_only_model=False))
    killed_after_step_4(whole.dir)
    again = run(args | dict(save_only_model=False))
    assert rates(again.log) == rates(whole.log)
    assert any("Resuming training from" in m for m in host_log) and not any("no optimizer state" in m for m in host_log)

    assert not any("on other rows" in m for m in host_log)
    killed_after_step_4(whole.dir)
    other = dict(save_only_model=False, dataset_dir=str(shutil.copytree(args["dataset_dir"], tmp_path / "other")))
    run(args | other)
    run(args | other)  # from the last checkpoint, whose rows are these
    (said,) = [message for message in host_log if "on other rows" in message]
    assert said.startswith(
        f"{checkpoint} was trained on other rows ({{'dataset': [{args['dataset']!r}], 'dataset_dir': "
    )


def test_a_resumed_run_converts_all_that_pissa_learned(run, recipe, tmp_path):
    """Give the adapter of the uninterrupted run; without the steps before the checkpoint it would be far from it."""
    from safetensors.torch import load_file

    args = recipe(
        finetuning_type="lora", pissa_init=True, pissa_convert=True, pref_loss="orpo", learning_rate=1e-2,
        num_train_epochs=1.0, save_strategy="steps", save_steps=2,
    )  # fmt: skip
    whole = run(args).dir
    run(args | dict(resume_from_checkpoint=str(whole / "checkpoint-2"), output_dir=str(tmp_path / "b")))
    expected, found = (load_file(at / "pissa_converted/adapter_model.safetensors") for at in (whole, tmp_path / "b"))
    assert all(torch.equal(weight, found[name]) for name, weight in expected.items())


@pytest.mark.parametrize("resumes", [False, True])
@pytest.mark.parametrize("there", [None, "README.md", "adapter_model.safetensors"])
def test_the_adapter_that_pissa_began_with_is_kept_on_a_resume(tmp_path, resumes, there):
    from llamafactory.train.callbacks import PissaConvertCallback

    from solopo_plugin.workflow import save_pissa_init

    (tmp_path / "pissa_init").mkdir()
    if there:
        (tmp_path / "pissa_init" / there).touch()
    callback, saved, wrote = PissaConvertCallback(), [], not (resumes and there == "adapter_model.safetensors")
    callback.on_train_begin = lambda *_, model: saved.append(model)
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint="checkpoint-4" if resumes else None)
    handler = SimpleNamespace(callbacks=[callback])
    save_pissa_init(SimpleNamespace(args=args, callback_handler=handler, state=None, control=None, model="begun"))
    assert saved == ["begun"] * wrote
    callback.on_train_begin(args, None, None, model="loaded")  # as the Trainer does
    assert saved == ["begun"] * wrote


@pytest.mark.parametrize(
    "files, deepspeed, outcome",
    [
        (["model.safetensors"], "z3.json", "raises"),
        (["model.safetensors", "optimizer.pt", "scheduler.pt"], "z3.json", "raises"),
        (["global_step4/states.pt"], "z3.json", "silent"),
        (["model.safetensors"], None, "warns"),
        (["global_step4/states.pt", "scheduler.pt"], None, "warns"),  # DeepSpeed's, resumed without
        (["optimizer.pt"], None, "warns"),  # the Trainer loads both or neither
        (["optimizer.pt", "scheduler.pt"], None, "silent"),
        (["optimizer_0/shard", "scheduler.pt"], None, "silent"),  # FSDP's
    ],
)
@pytest.mark.parametrize("given", ["path", "true"])
def test_which_checkpoints_lack_the_optimizer(tmp_path, host_log, files, deepspeed, outcome, given):
    from solopo_plugin.workflow import check_resume

    checkpoint = tmp_path / "checkpoint-4"
    for file in files:
        (checkpoint / file).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / file).touch()
    (checkpoint / "trainer_state.json").write_text('{"epoch": 0.5}')
    resume = True if given == "true" else str(checkpoint)
    args = SimpleNamespace(resume_from_checkpoint=resume, deepspeed_plugin=deepspeed, output_dir=str(tmp_path))
    if outcome == "raises":
        with pytest.raises(ValueError, match="checkpoint-4 has no optimizer state .*DeepSpeed cannot resume without"):
            check_resume(args)
    else:
        check_resume(args)
    assert len(host_log) == (outcome == "warns")


def test_a_resume_of_badam_is_said_not_to_be_the_same(tmp_path, host_log):
    from solopo_plugin.workflow import check_resume

    (tmp_path / "checkpoint-4").mkdir()
    for file in ("optimizer.pt", "scheduler.pt"):
        (tmp_path / "checkpoint-4" / file).touch()
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"epoch": 0.5}')
    args = SimpleNamespace(
        resume_from_checkpoint=str(tmp_path / "checkpoint-4"), deepspeed_plugin=None, output_dir=str(tmp_path)
    )
    check_resume(args)
    assert not host_log
    check_resume(args, badam=True)
    said = f"{tmp_path / 'checkpoint-4'} does not hold BAdam's states and order of blocks: they start anew."
    assert host_log == [said]


@pytest.mark.parametrize("epoch, told", [(0.9, False), (1.0, False), (1.1, True), (None, False)])
def test_a_resume_of_a_stream_past_its_first_pass_is_said_to_see_other_rows(tmp_path, host_log, epoch, told):
    """At the last step of a single pass the Trainer writes 1, and each later pass begins above a whole number."""
    from solopo_plugin.workflow import check_resume

    for file in ("optimizer.pt", "scheduler.pt"):
        (tmp_path / file).touch()
    (tmp_path / "trainer_state.json").write_text(json.dumps({"epoch": epoch}))
    args = SimpleNamespace(resume_from_checkpoint=str(tmp_path), deepspeed_plugin=None, output_dir="unused")
    check_resume(args)
    assert not host_log
    check_resume(args, streaming=True)
    assert [f"{tmp_path} is past the stream's first pass" in message for message in host_log] == [True] * told


@pytest.mark.parametrize("callbacks, told", [
    (None, False), ({}, False), ({"solopo_rows": {"dataset": ["a"], "dataset_dir": "data"}}, False),
    ({"solopo_rows": {"dataset": ["b"], "dataset_dir": "data"}}, True),
    ({"solopo_rows": {"dataset": ["a"], "dataset_dir": "mine"}}, True),
])  # fmt: skip
def test_a_resume_on_other_rows_is_said(tmp_path, host_log, callbacks, told):
    """A checkpoint of an earlier release does not say what it was trained on."""
    from solopo_plugin.workflow import check_resume

    for file in ("optimizer.pt", "scheduler.pt"):
        (tmp_path / file).touch()
    (tmp_path / "trainer_state.json").write_text(json.dumps({"stateful_callbacks": callbacks}))
    args = SimpleNamespace(resume_from_checkpoint=str(tmp_path), deepspeed_plugin=None, output_dir="unused")
    check_resume(args, rows={"dataset": ["a"], "dataset_dir": "data"})
    assert ["was trained on other rows" in message for message in host_log] == [True] * told


@pytest.mark.parametrize("state", [None, "", '{"epoch": 0.5, "glo', "null"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_checkpoint_whose_state_is_torn_is_no_whole_one(tmp_path, streaming, state):
    from solopo_plugin.workflow import check_resume

    if state is not None:
        (tmp_path / "trainer_state.json").write_text(state)
    args = SimpleNamespace(resume_from_checkpoint=str(tmp_path), deepspeed_plugin=None, output_dir="unused")
    with pytest.raises(ValueError, match="no whole checkpoint is in .*; name another, or remove the key, or the fold"):
        check_resume(args, streaming=streaming)


@pytest.mark.parametrize("start, epoch, rate", [(None, None, 75.0), ("checkpoint-6", 1.5, 30.0), ("others", 3.0, 30.0)])
def test_tokens_per_second_are_those_of_this_start(tmp_path, monkeypatch, start, epoch, rate):
    """Count them also where the checkpoint was trained on other rows, of which an epoch had another number of steps."""
    from solopo_plugin import workflow

    (tmp_path / "trainer_state.json").write_text(json.dumps({"epoch": epoch, "global_step": 6}))
    monkeypatch.setattr(workflow, "step_lengths", lambda *_: [100, 200])
    args = SimpleNamespace(resume_from_checkpoint=start and str(tmp_path), world_size=2, output_dir=str(tmp_path))
    trainer = MagicMock(args=args)
    trainer.callback_handler.callbacks, trainer.finetuning_args.plot_loss = [], False
    trainer.train.return_value = SimpleNamespace(metrics={"epoch": 2.5, "train_runtime": 5.0}, global_step=10)
    workflow.train(trainer)
    (_, metrics), _ = trainer.save_metrics.call_args
    assert metrics["effective_tokens_per_sec"] == rate


@pytest.mark.parametrize("locks", [True, False])
def test_a_second_run_in_an_output_dir_is_refused(tuner, recipe, tmp_path, monkeypatch, locks):
    """Refuse it before it loads anything; where a file system has no locks both go on, an evaluation everywhere."""
    import fcntl

    from solopo_plugin import workflow

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    def ran(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(workflow, "run_solopo", ran)
    out, said = tmp_path / "out", "Another run is at work in .*out; wait for it, or give another `output_dir`"
    with lock_folder(out, "output_dir", "_lock"):
        if not locks:
            monkeypatch.setattr(fcntl, "flock", no_locks)
        with pytest.raises(Refused, match=said) if locks else pytest.raises(ZeroDivisionError):
            tuner.run_exp(recipe())
        with pytest.raises(ZeroDivisionError):
            tuner.run_exp(recipe(do_train=False, do_eval=True, eval_dataset="demo_solopo"))
    for _ in range(2):  # the lock of a run that has ended, or was killed, keeps nobody out
        with pytest.raises(ZeroDivisionError):
            tuner.run_exp(recipe())


@pytest.mark.parametrize("states, outcome", [
    ({2: "{}", 4: "{}", 10: "{}"}, "10"), ({2: "{}", 4: "{}", 10: None}, "4, warned"),
    ({2: "{}", 10: '{"ep'}, "2, warned"), ({2: None, 10: None}, "refused"), ({}, "refused"),
])  # fmt: skip
def test_the_newest_whole_checkpoint_is_taken(tmp_path, host_log, states, outcome):
    """Name none: the host takes the last, however far its writing came."""
    from solopo_plugin.workflow import check_resume

    for step, state in states.items():
        (tmp_path / f"checkpoint-{step}").mkdir()
        for file in ("optimizer.pt", "scheduler.pt", "trainer_state.json")[: 2 if state is None else 3]:
            (tmp_path / f"checkpoint-{step}" / file).write_text(state or "")
    args = SimpleNamespace(resume_from_checkpoint=True, deepspeed_plugin=None, output_dir=str(tmp_path))
    if outcome == "refused":
        with pytest.raises(ValueError, match=f"no whole checkpoint is in {tmp_path}; .*_output_dir: true` begins"):
            check_resume(args)
        return
    check_resume(args)
    chosen = tmp_path / f"checkpoint-{outcome.split(',')[0]}"
    assert args.resume_from_checkpoint == str(chosen)
    said = f"The writing of {tmp_path / 'checkpoint-10'} was cut off: the run goes on from {chosen}."
    assert host_log == [said] * ("warned" in outcome)


@pytest.mark.parametrize("words, step, taken", [
    ([], 10, True), ([], None, None), (["--resume_from_checkpoint", "OUT/checkpoint-10"], 10, 10),
    (["--resume_from", "OUT/checkpoint-4"], 4, 4),
    (["--resume_from_checkpoint", "OUT/checkpoint-4", "--run_name", "[a"], 4, 4),
])  # fmt: skip
def test_a_checkpoint_that_is_named_is_the_one(tmp_path, monkeypatch, words, step, taken):
    """Take it also where a flag is abbreviated, or its command line is no YAML; let the host choose without it."""
    from solopo_plugin.host import stage

    for n in (4, 10):
        (tmp_path / f"checkpoint-{n}").mkdir()
    at = {n: f"{tmp_path}/checkpoint-{n}" for n in (4, 10)}
    training = SimpleNamespace(resume_from_checkpoint=at.get(step), output_dir=f"{tmp_path}/")
    monkeypatch.setattr(stage, "check", lambda recipe: None)
    given = ["--stage", "solopo", *(word.replace("OUT", str(tmp_path)) for word in words)]
    stage._disguising(lambda args: [None, None, training, SimpleNamespace(stage="solopo")], given)
    assert training.resume_from_checkpoint == at.get(taken, taken)


def stopped_in_step(step: int):
    """Return a callback that kills a run in a step."""
    from transformers import TrainerCallback

    class Killer(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == step - 1:
                raise KeyboardInterrupt

    return Killer()


@pytest.mark.slow
def test_what_a_kill_leaves_is_gone_on_with(run, tuner, recipe, tmp_path, host_log):
    """Make no step behind the last one, and pass over a checkpoint whose writing was cut off.

    What an earlier run left in `output_dir` is neither resumed nor deleted.
    """
    args = recipe(max_steps=6, lr_scheduler_type="constant", pref_loss="orpo", save_strategy="steps", save_steps=2,
                  overwrite_output_dir=None)  # fmt: skip
    whole = run(args)
    assert "train_loss" in json.loads((whole.dir / "train_results.json").read_text())
    names = lambda: sorted(path.name for path in whole.dir.glob("*checkpoint-*"))  # noqa: E731
    same = lambda found: all(torch.equal(w, found.weights[name]) for name, w in whole.weights.items())  # noqa: E731
    (whole.dir / "model.safetensors").unlink()
    again = run(args)
    assert len(again.losses) == 6 and same(again) and names() == [f"checkpoint-{n}" for n in (2, 4, 6)]

    (whole.dir / "model.safetensors").unlink()
    for file in ("trainer_state.json", "rng_state.pth"):
        (whole.dir / "checkpoint-6" / file).unlink()
    again = run(args)
    assert again.losses == whole.losses and same(again)
    for entry in (*again.log, json.loads((whole.dir / "train_results.json").read_text())):
        assert not entry.keys() & {"train_loss", "train_samples_per_second", "train_steps_per_second"}, (
            "two steps' of six"
        )
    assert any(m.endswith(f"was cut off: the run goes on from {whole.dir / 'checkpoint-4'}.") for m in host_log)
    assert names() == ["_earlier_checkpoint-6", "checkpoint-2", "checkpoint-4", "checkpoint-6"]

    shutil.rmtree(whole.dir / "_earlier_checkpoint-6")
    other, kept = dict(learning_rate=1e-2), (whole.dir / "checkpoint-6/trainer_state.json").read_text()
    run(args | dict(do_train=False, do_eval=True, eval_dataset="demo_solopo", overwrite_output_dir=True))
    assert names() == [f"checkpoint-{n}" for n in (2, 4, 6)], "an evaluation moves nothing"
    host_log.clear()
    with pytest.raises(KeyboardInterrupt):
        tuner.run_exp(args | other | dict(overwrite_output_dir=True), callbacks=[stopped_in_step(4)])
    assert names() == [*(f"_earlier_checkpoint-{n}" for n in (2, 4, 6)), "checkpoint-2"]
    assert (whole.dir / "_earlier_checkpoint-6/trainer_state.json").read_text() == kept
    (said,) = [m for m in host_log if "earlier run" in m]
    assert said.endswith("_earlier_checkpoint-2, _earlier_checkpoint-4, _earlier_checkpoint-6 now, and may be deleted.")
    resumed = run(args | other)
    new = run(args | other | dict(output_dir=str(tmp_path / "new")))
    assert resumed.losses == new.losses and all(torch.equal(w, resumed.weights[n]) for n, w in new.weights.items())


NO_KWARGS = "`lr_scheduler_type: cosine_with_min_lr` cannot be set up: "


@pytest.mark.parametrize("keys, said", [
    (dict(resume_from_checkpoint="/no/where"), "`resume_from_checkpoint: /no/where`: no whole checkpoint is in /no/"),
    (dict(resume_from_checkpoint="tests"), "`resume_from_checkpoint: tests`: no whole checkpoint is in tests; name"),
    (dict(resume_from_checkpoint=True), "`resume_from_checkpoint: True`: no whole checkpoint is in OUT; name"),
    (dict(lr_scheduler_type="cosine_with_min_lr"), f"{NO_KWARGS}One of min_lr or min_lr_rate should be set"),
    (dict(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rat": 0.1}),
     f"{NO_KWARGS}get_cosine_with_min_lr_schedule_with_warmup() got an unexpected keyword argument 'min_lr_rat'"),
    (dict(lr_scheduler_type="polynomial", learning_rate=5e-8),
     "`lr_scheduler_type: polynomial` cannot be set up: lr_end (1e-07) must be smaller than initial lr (5e-08)"),
    (dict(learning_rate=-1.0), "`optim: adamw_torch_fused` cannot be set up: Invalid learning rate: -1.0"),
    (dict(optim="grokadamw"), "`optim: grokadamw` cannot be set up: Please install grokadamw"),
    (dict(optim="adamw_torch_8bit"), "`optim: adamw_torch_8bit` cannot be set up: You need to have `torchao"),
])  # fmt: skip
def test_what_the_trainer_refuses_is_said_before_anything_is_scored(run, recipe, tmp_path, monkeypatch, keys, said):
    """Also where a library says it by another error than ours."""
    monkeypatch.setattr("solopo_plugin.workflow.with_reference_logps", lambda *_: pytest.fail("scored"))
    with pytest.raises(Refused, match="^" + re.escape(said.replace("OUT", str(tmp_path / "out")))):
        run(recipe(max_samples=2, **keys))


def test_a_schedule_is_tried_without_traces(run, recipe, tmp_path):
    """The host fills in the lengths of `warmup_stable_decay`, which are those of the run."""
    keys = dict(pref_loss="orpo", lr_scheduler_type="warmup_stable_decay", num_train_epochs=3.0)
    keys["lr_scheduler_kwargs"] = {"min_lr_ratio": 0.1}
    rates = [entry["learning_rate"] for entry in run(recipe(**keys)).log if "loss" in entry]
    assert rates[:4] == [1e-3] * 4 and rates[4] > rates[5] > rates[8]


def test_a_schedule_is_tried_at_the_rate_of_the_run(run, recipe):
    """Its last rate lies below the first, and above the one that PyTorch's optimizers have where none is given."""
    keys = dict(lr_scheduler_type="polynomial", learning_rate=5e-3, lr_scheduler_kwargs={"lr_end": 2e-3})
    assert run(recipe(pref_loss="orpo", max_samples=2, max_steps=1, **keys)).log[0]["learning_rate"] == 5e-3
