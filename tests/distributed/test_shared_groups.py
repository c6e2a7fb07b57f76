"""Rows that ranks share, beyond test_sequence_parallel.py: what a rank keeps, ZeRO-3 groups, four to a row, bf16."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from step_cost import Setup, of_one
from test_distributed import DDP, METRICS, zero
from test_sequence_parallel import BASE, SHARED, same_numbers, train  # noqa: F401

from solopo_plugin.packing import PackedCollator
from solopo_plugin.sequence_parallel import Part, Ranks

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("variant, both, batch", [("S3", False, 1), ("S3", True, 2), ("L3", False, 3)])
def test_a_gpus_share_of_a_row_is_what_the_step_takes(variant, both, batch):
    """The real part of every rank of 4: its tokens, and at most so many logits."""
    S, R, L = 33, 10, 101
    row = dict(name="r", long_is_short=False, short_prompt_ids=[1] * S, long_prompt_ids=[2] * L, chosen_ids=[3] * R,
               rejected_ids=[4] * R)  # fmt: skip
    packed = PackedCollator(longpo=variant == "L3", long_pair=both)([row] * batch)["policy"]
    parts = [Ranks(4, rank, 1, 0).part_of(packed) for rank in range(4)]
    tokens, logits = of_one(variant, S, R, L, Setup(batch=batch, both=both, sequence_parallel=4))
    assert {part["input_ids"].shape[1] for part in parts} == {tokens}
    assert max(sum(part["counts"]) for part in parts) == logits == max(len(part["targets_K"]) for part in parts)


def test_a_rank_keeps_of_a_layer_what_is_counted(cli):
    """By autograd's own count, byte for byte, with fewer key heads than ranks and with a number P does not divide."""
    script = str(ROOT / "tests" / "distributed" / "shared_memory.py")
    out = cli("--standalone", "--nproc-per-node=4", script, "4", "2", program="torchrun", OMP_NUM_THREADS="1").out
    found = [json.loads(line) for line in re.findall(r"\{.*\}", out)]
    assert len(found) == 2 * 4 * 4 and {case["kv_heads"] for case in found} == {1, 3, 4}
    for case in found:
        assert case["kept"] == case["counted"], case


def no_ties(found):
    """The outcome without accuracies where the policy still is the reference, whose rewards differ by rounding."""
    for entry in found.log:
        if abs(entry.get("rewards/margins", 1)) < 1e-6:
            entry["rewards/accuracies"] = 0.5
    return found


def test_groups_under_zero3(train):  # noqa: F811
    """Two groups of two and two ranks with whole rows: LongPO, LoRA with its adapter off as reference; rows shuffled.

    13 rows, batches of 2: a group fills up its last batch as a rank does.
    """
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    common = BASE | zero("z3") | dict(max_samples=13, per_device_train_batch_size=2, disable_shuffling=None)
    common |= dict(solopo_objective="longpo", solopo_longpo_lambda=0.5, finetuning_type="lora")
    two, _ = train(2, two=common)
    four, _ = train(4, four=common | SHARED)
    same_numbers(no_ties(two["two"]), no_ties(four["four"]))


def test_four_to_a_row_equal_two_and_one(train):  # noqa: F811
    """The tiny model has 4 heads over 2 of keys: each of four ranks has one, of repeated keys."""
    common = BASE | DDP | dict(pref_loss="simpo", pref_ftx=0.5, solopo_align="logp", max_samples=5)
    (one, _), (two, _), (four, _) = (
        train(n, **{f"by_{n}": common | dict(solopo_sequence_parallel=n)}) for n in (1, 2, 4)
    )
    same_numbers(one["by_1"], two["by_2"])
    same_numbers(one["by_1"], four["by_4"])


def test_bf16(train):  # noqa: F811
    """Autocast to bf16 exchanges bf16: losses, metrics and weights within a few of its roundings (2^-8) of one's."""
    common = BASE | DDP | dict(pref_loss="orpo", bf16=True, learning_rate=1e-3)
    (one, _), (two, _) = (train(n, **{f"by_{n}": common | dict(solopo_sequence_parallel=n)}) for n in (1, 2))
    logs = [[e for e in found.log if "loss" in e] for found in (one["by_1"], two["by_2"])]
    assert len(logs[0]) == len(logs[1]) >= 3
    for a, b in zip(*logs, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=4 * 2**-8)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=8 * 2**-8)
        for key in METRICS:
            assert b[key] == pytest.approx(a[key], rel=4 * 2**-8, abs=0.01), key
    assert one["by_1"].weights.keys() == two["by_2"].weights.keys()
    a, b = (torch.cat([w.float().flatten() for _, w in sorted(r.weights.items())]) for r in (one["by_1"], two["by_2"]))
    assert (b - a).norm() < 8 * 2**-8 * 1e-3 * len(logs[0])  # of a step of norm 1 times the learning rate, each
    assert not a.equal(b)  # the two round apart, so that equal numbers would mean that nothing was shared


def test_one_to_a_row_runs_what_ran_before(run, recipe, monkeypatch):
    """With 1, the default, nothing of sequence_parallel.py is called in training or evaluation, nor is accelerate's own
    changed: rows are dealt out and gathered by it as ever."""  # fmt: skip
    assert Ranks.of(1, SimpleNamespace(num_processes=6, process_index=4)) == Ranks(1, 0, 6, 4)  # all that it looks at
    for kind, name in ((Ranks, "total"), (Ranks, "part_of"), (Part, "__init__"), (Part, "_exchange")):
        monkeypatch.setattr(kind, name, None)
    found = run(recipe(**BASE, pref_loss="sigmoid", val_size=2, eval_strategy="epoch"))
    assert len(found.losses) == 2 and "eval_loss" in found.log[-2]
