"""Two processes on the CPU, through the real command line, equal one process with twice the batch.

DDP over gloo, DeepSpeed ZeRO-2 and ZeRO-3, with and without offload, full and LoRA, gradient checkpointing on as in the
host's default. All fp32, by SGD within the bounds of conftest.py: a wrong gradient shows in proportion, the order of a
sum does not. DeepSpeed's offload has no SGD; there it is Adam with an epsilon of 1, far above any gradient, whose step
is proportional too. It is torch's: DeepSpeed's own for the CPU is compiled first, which takes minutes, and runs with
DEEPSPEED_ADAM=1.
"""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import LOSS_BOUND, ROOT, SGD, demo_rows, outcome, weight_bound, write_dataset, write_recipe

from solopo_plugin.trainer import METRICS

pytestmark = pytest.mark.slow
DEEPSPEED = ROOT / "examples" / "yaml" / "deepspeed"
DDP = dict(use_cpu=True, ddp_backend="gloo")


def zero(name: str) -> dict:
    """DeepSpeed on the CPU wants no `use_cpu`, which would hide the world size from zero.Init."""
    return dict(use_cpu=None, deepspeed=str(DEEPSPEED / f"ds_{name}.json"))


ADAM = dict(optim="adamw_torch", adam_epsilon=1.0, learning_rate=0.1)


def with_adam(two: dict, folder: Path, **more) -> dict:
    """The shipped configuration with its optimizer named, as the one that accelerate puts in takes no epsilon."""
    config = json.loads(Path(two["deepspeed"]).read_text())
    params = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    params["torch_adam"] = "DEEPSPEED_ADAM" not in os.environ
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(config | {"optimizer": {"type": "AdamW", "params": params}} | more))
    return two | dict(deepspeed=str(path))


@pytest.fixture
def one_and_two(run, recipe, cli, tmp_path, monkeypatch):
    """Train on one process in this one and on two through the command line; returns both outcomes and the output.

    Each scores its reference for itself.
    """
    monkeypatch.setenv("SOLOPO_CACHE", str(tmp_path / "one_cache"))

    def train(two: dict, **common):
        defaults = dict(max_samples=16, num_train_epochs=1.0, gradient_accumulation_steps=1, disable_shuffling=True)
        common = defaults | SGD | common
        size = common.pop("per_device_train_batch_size", 2)
        one = run(recipe(per_device_train_batch_size=2 * size, output_dir=str(tmp_path / "one"), **common))
        args = recipe(per_device_train_batch_size=size, output_dir=str(tmp_path / "two"), **(common | two))
        env = dict(
            FORCE_TORCHRUN="1", NPROC_PER_NODE="2", OMP_NUM_THREADS="1", SOLOPO_CACHE=str(tmp_path / "two_cache")
        )
        if "deepspeed" in args:
            env["DS_ACCELERATOR"] = "cpu"
        process = cli("train", write_recipe(tmp_path / "two.yaml", args), **env)
        return one, outcome(tmp_path / "two"), process.out

    return train


def scores(cache) -> dict[str, tuple[float, float]]:
    """The reference scores under a cache, by row, whatever their writer."""
    lines = [json.loads(line) for file in cache.glob("reference/*/*.jsonl") for line in file.read_text().splitlines()]
    return {line["row"]: (line["chosen"], line["rejected"]) for line in lines}


def assert_equal(one, two) -> None:
    entries = [[e for e in r.log if "loss" in e] for r in (one, two)]
    assert len(entries[0]) == len(entries[1]) >= 3
    for a, b in zip(*entries, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], **LOSS_BOUND)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        for key in METRICS:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=2e-5), key
    assert one.weights.keys() == two.weights.keys()
    for name, weight in one.weights.items():
        torch.testing.assert_close(two.weights[name].float(), weight.float(), **weight_bound(len(entries[0])))
    kept = [scores(r.dir.parent / f"{r.dir.name}_cache") for r in (one, two)]
    assert kept[0].keys() == kept[1].keys()
    for row, pair in kept[0].items():
        assert kept[1][row] == pytest.approx(pair, rel=1e-6)


@pytest.mark.parametrize("forward, model", [("packed", None), ("two_stage", None), ("two_stage", "gemma3_text")])
def test_ddp(one_and_two, tiny_model, forward, model):
    """A packed step has one forward before its backward and keeps the host's reentrant checkpointing.

    Gemma's buffers are saved for backward: DDP must not write them again before the second forward.
    """
    of_model = dict(model_name_or_path=tiny_model(model)) if model else {}
    one, two, out = one_and_two(DDP, pref_loss="sigmoid", solopo_alpha=2.0, solopo_forward=forward, **of_model)
    assert_equal(one, two)
    assert "Gradient checkpointing enabled" in out
    assert ("Set `use_reentrant_gc` to False" in out) == (forward == "two_stage")
    assert len(re.findall(r"solopo_plugin \S+ is active in LLaMA-Factory \S+\.", out)) == 1  # rank 0 only


def test_ddp_with_accumulation_a_partial_window_and_eval(one_and_two):
    """12 training rows, 2 ranks x batch 2 x 2 micro-batches: windows of 8 and of 4. (Where the rows do not divide by
    ranks x batch, accelerate fills up with rows from the beginning, in this stage as in every stage of the host.)

    5 evaluation rows on 2 ranks with batch 2: there the rows that fill up must not count.
    """
    common = dict(
        max_samples=17, val_size=5, eval_strategy="epoch", per_device_eval_batch_size=2, gradient_accumulation_steps=2,
        num_train_epochs=2.0, pref_loss="orpo", solopo_align_on="both",
    )  # fmt: skip
    one, two, _ = one_and_two(DDP, **common)
    assert_equal(one, two)
    evals = [[e for e in r.log if "eval_loss" in e][-1] for r in (one, two)]
    for key in ("eval_loss", *(f"eval_{key}" for key in METRICS)):
        assert evals[1][key] == pytest.approx(evals[0][key], rel=1e-4, abs=2e-5), key


def test_ddp_with_rows_grouped_by_length(one_and_two):
    """Ranks agree on the order, in every epoch, and a step has the rows that one process would give it."""
    common = dict(train_sampling_strategy="group_by_length", disable_shuffling=None, num_train_epochs=2.0)
    assert_equal(*one_and_two(DDP, pref_loss="orpo", gradient_accumulation_steps=2, **common)[:2])


def test_deepspeed_does_not_resume_without_the_optimizer(cli, recipe, tmp_path):
    """What `save_only_model` left is refused with a sentence, before anything is loaded."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    args = recipe(
        **zero("z2"), save_only_model=True, save_strategy="steps", save_steps=2, max_steps=3, pref_loss="orpo",
        overwrite_output_dir=None,
    )  # fmt: skip
    path, env = (
        write_recipe(tmp_path / "r.yaml", args),
        dict(FORCE_TORCHRUN="1", NPROC_PER_NODE="2", OMP_NUM_THREADS="1"),
    )
    cli("train", path, DS_ACCELERATOR="cpu", **env)
    again = cli("train", path, DS_ACCELERATOR="cpu", check=False, **env)
    sentence = "checkpoint-3 has no optimizer state (`save_only_model`?), and DeepSpeed cannot resume without; to start"
    assert again.returncode and sentence in again.out and "Loading dataset" not in again.out


def test_ddp_lora_with_the_adapter_off_as_reference(one_and_two):
    assert_equal(*one_and_two(DDP, finetuning_type="lora", pref_loss="ipo")[:2])


def test_zero3_with_mlps_in_chunks(one_and_two):
    """Chunks on two ranks equal none on one: weights are gathered for, and their gradients summed over, every chunk."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    one, two, _ = one_and_two(zero("z3") | dict(solopo_mlp_chunk=100), pref_loss="orpo", max_samples=12)
    assert_equal(one, two)


ANCHORED = dict(solopo_anchor=0.5, solopo_reference="online")


@pytest.mark.parametrize("forward", ["packed", "two_stage"])
def test_zero3_with_distillation_and_anchor(one_and_two, forward):
    """The equal prompts of some rows leave ranks with different numbers of tokens to compare."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    keys = dict(pref_loss="orpo", solopo_align="distill", solopo_align_on="both", solopo_forward=forward, **ANCHORED)
    assert_equal(*one_and_two(zero("z3"), max_samples=12, **keys)[:2])


def test_ddp_lora_with_distillation_alone_and_anchor(one_and_two):
    keys = dict(solopo_objective="distill", solopo_distill_kl="jsd", finetuning_type="lora", **ANCHORED)
    assert_equal(*one_and_two(DDP, **keys)[:2])


FORMS = [("z2", "packed"), ("z2_offload", "two_stage"), ("z3", "packed"), ("z3_offload", "packed"), ("z3", "two_stage")]


@pytest.mark.parametrize("stage, forward", FORMS)
def test_deepspeed(one_and_two, tmp_path, stage, forward):
    """With a reference model, sharded too, and reentrant checkpointing asked for.

    Packed, one forward a step, that is right. In two stages ZeRO-3 would silently get it wrong, and it is switched off,
    also where `gradient_checkpointing: true` makes the Trainer enable it a second time with the host's default.
    """
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    asked = dict(gradient_checkpointing=True, use_reentrant_gc=True, solopo_forward=forward)
    config, optimizer = zero(stage), {}
    if "offload" in stage:
        config, optimizer = with_adam(config, tmp_path), ADAM
    common = dict(pref_loss="sigmoid", solopo_alpha=2.0, **optimizer)
    one, two, out = one_and_two(config | asked, **common)
    assert_equal(one, two)
    assert ("Set `use_reentrant_gc` to False" in out) == (forward == "two_stage")


def test_zero3_lora(one_and_two):
    """Uneven shares of the scoring too: 16 rows in three batches, on two ranks."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    common = dict(finetuning_type="lora", pref_loss="hinge", per_device_eval_batch_size=6)
    assert_equal(*one_and_two(zero("z3"), **common)[:2])


def test_zero3_checks_what_is_on_disk(run, recipe, cli, tmp_path, monkeypatch):
    """5 known rows and 7 to score, one known per rank to check: as many forwards on both ranks. Then wrong ones."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    two = tmp_path / "two"
    env = dict(FORCE_TORCHRUN="1", NPROC_PER_NODE="2", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", SOLOPO_CACHE=str(two))
    common = dict(per_device_train_batch_size=1, per_device_eval_batch_size=1, max_steps=1)
    args = recipe(max_samples=12, **common)
    monkeypatch.setenv("SOLOPO_CACHE", str(tmp_path / "one"))
    run(args)
    path = write_recipe(tmp_path / "r.yaml", args | zero("z3") | dict(output_dir=str(two / "out"), use_cpu=False))
    whole = scores(tmp_path / "one")
    cli("train", path, **env)
    kept = scores(two)
    assert kept.keys() == whole.keys()
    assert all(kept[row] == pytest.approx(pair, rel=1e-6) for row, pair in whole.items())

    (folder,) = (two / "reference").iterdir()
    known, wrong = dict(list(kept.items())[:5]), {row: (a + 0.1, b) for row, (a, b) in kept.items()}
    for those, code in ((known, 0), (wrong, 1)):
        for file in folder.glob("*.jsonl"):  # also what the run before has scored: any row may be checked
            file.unlink()
        text = "".join(json.dumps({"row": row, "chosen": a, "rejected": b}) + "\n" for row, (a, b) in those.items())
        (folder / "given.jsonl").write_text(text)
        process = cli("train", path, check=False, **env)
        assert (process.returncode != 0) == code, process.out[-4000:]
        assert f"{len(those)} rows are in {folder}, {12 - len(those)} to score." in process.out
    assert f"Error: {folder} has -" in process.out and "the scores there are another model's." in process.out


def test_zero3_with_the_reference_in_every_step(one_and_two):
    """The reference as a second model, sharded too."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    one, two, _ = one_and_two(zero("z3"), solopo_reference="online", max_samples=12)
    assert_equal(one, two)
    assert not scores(one.dir.parent / "one_cache") and not scores(two.dir.parent / "two_cache")


def test_zero3_longpo(one_and_two):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    assert_equal(*one_and_two(zero("z3"), solopo_objective="longpo", solopo_longpo_lambda=0.5)[:2])


def test_ranks_hold_the_same_weights_and_skip_the_long_pass_together(cli, recipe, tmp_path):
    """Ranks see different rows, and at some steps only one of them could do without its long forward."""
    from conftest import demo_rows, write_dataset

    rows = [row | ({"long_prompt": row["prompt"]} if i % 3 else {}) for i, row in enumerate(demo_rows(12))]
    args = recipe(
        dataset="rows", dataset_dir=write_dataset(tmp_path / "data", rows), max_samples=None, num_train_epochs=1.0,
        per_device_train_batch_size=1, gradient_accumulation_steps=1, disable_shuffling=True,
        solopo_forward="two_stage", **DDP,
    )  # fmt: skip
    path = write_recipe(tmp_path / "recipe.yaml", args)
    script = str(ROOT / "tests" / "distributed" / "train_and_hash.py")
    out = cli("--standalone", "--nproc-per-node=2", script, path, program="torchrun", OMP_NUM_THREADS="1").out
    hashes = dict(re.findall(r"rank (\d) holds (\w{64})", out))
    assert set(hashes) == {"0", "1"} and hashes["0"] == hashes["1"]
    gaps = [e["solopo/reward_gap"] for e in outcome(args["output_dir"]).log if "loss" in e]
    assert len(gaps) == 6 and [gap > 0 for gap in gaps] == [True, True, False, True, True, False]


def test_streaming_on_two_ranks(cli, recipe, tmp_path):
    """Batches of the ranks differ in length; each rank reads its own share of the stream."""
    args = recipe(streaming=True, max_samples=None, max_steps=3, num_train_epochs=None, dataloader_num_workers=1, **DDP)
    cli("train", write_recipe(tmp_path / "r.yaml", args), FORCE_TORCHRUN="1", NPROC_PER_NODE="2", OMP_NUM_THREADS="1")
    assert len(outcome(args["output_dir"]).losses) == 3


@pytest.mark.parametrize("version", ["1", "2"])
def test_a_packed_row_under_fsdp_with_mixed_precision(cli, version):
    """All layers count on one plan, and log-probs are bf16's: logits near 1, three roundings of 2^-8 each, two ways.

    With the row's segments lost they are off by more than 0.1.
    """
    script = str(ROOT / "tests" / "distributed" / "fsdp_packed.py")
    out = cli("--standalone", "--nproc-per-node=2", script, version, program="torchrun", OMP_NUM_THREADS="1").out
    distances = [float(found) for found in re.findall(r"log-probs differ by (\S+) nats", out)]
    assert len(distances) == 2 and max(distances) < 6 * 2**-8


@pytest.mark.parametrize("forward", ["packed", "two_stage"])
def test_ddp_with_lists_of_rejected_responses(one_and_two, tmp_path, forward):
    """Train on rows of one, two and three: a rank's rows have other numbers of pairs than the other's."""
    rows = demo_rows(16)
    for i, row in enumerate(rows):
        row["rejected"] = [row["rejected"], "Nobody knows.", "It is not said."][: i % 3 + 1]
    folder = write_dataset(tmp_path / "data", rows)
    common = dict(dataset="rows", dataset_dir=folder, max_samples=None, solopo_forward=forward, solopo_align_on="both")
    one, two, _ = one_and_two(DDP, val_size=4, eval_strategy="epoch", pref_loss="sigmoid", **common)
    assert_equal(one, two)
    evals = [[e for e in r.log if "eval_loss" in e][-1] for r in (one, two)]
    for key in ("eval_loss", *(f"eval_{key}" for key in METRICS)):
        assert evals[1][key] == pytest.approx(evals[0][key], rel=1e-4, abs=2e-5), key
