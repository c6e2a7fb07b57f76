"""Rows that ranks share equal one process's: loss and gradient in float64, then whole runs through the host.

The bounds are test_distributed.py's: fp32, by SGD, so that a wrong gradient shows in proportion.
"""

import json
import re

import pytest
from conftest import ROOT, SGD, demo_rows, outcome, write_dataset, write_recipe
from test_distributed import ADAM, DDP, METRICS, assert_equal, scores, with_adam, zero

pytestmark = pytest.mark.slow
SHARED = dict(solopo_sequence_parallel=2)
HERE = ROOT / "tests" / "distributed"


@pytest.fixture
def train(cli, recipe, tmp_path):
    """Train several recipes, one after the other, in one start of so many processes; returns outcomes and output."""

    def start(processes: int, check: bool = True, env: dict | None = None, **runs: dict):
        paths = []
        for name, changes in runs.items():
            folder = tmp_path / name
            paths.append(write_recipe(tmp_path / f"{name}.yaml", recipe(**(changes | dict(output_dir=str(folder))))))
        env = dict(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", SOLOPO_CACHE=str(tmp_path / "cache")) | (env or {})
        words = ("--standalone", f"--nproc-per-node={processes}", str(HERE / "train_and_hash.py"), *paths)
        done = cli(*words, program="torchrun", check=check, **env)
        hashes = re.findall(r"rank \d holds (\w{64})", done.out)
        assert len(hashes) == processes * len(runs) or not check
        for i in range(len(hashes) // processes):
            assert len(set(hashes[i * processes : (i + 1) * processes])) == 1, "ranks hold different weights"
        return {name: outcome(tmp_path / name) for name in runs} if check else {}, done.out

    return start


def test_loss_and_gradients_in_float64(cli):
    """Four ranks that share a row, and two groups of two with rows of their own, in one start."""
    script = str(HERE / "shared_rows.py")
    out = cli("--standalone", "--nproc-per-node=4", script, "4", "2", program="torchrun", OMP_NUM_THREADS="1").out
    found = [json.loads(line) for line in re.findall(r"\{.*\}", out)]
    assert len(found) == 2 * 4 * 22
    for case in found:
        assert max(case[name] for name in ("loss", "metrics", "gradient")) < 1e-14, case
        assert case["sent"] == case["formula"] and case["scored"] <= case["most"], case
    assert all(case["scored"] for case in found if case["case"] == "orpo")


BASE = dict(max_samples=6, num_train_epochs=1.0, gradient_accumulation_steps=1, disable_shuffling=True) | SGD
RUNS = {
    "sigmoid": dict(pref_loss="sigmoid", solopo_alpha=2.0),
    "ipo": dict(pref_loss="ipo", finetuning_type="lora"),
    "hinge": dict(pref_loss="hinge", solopo_reference="online", solopo_mlp_chunk=50),
    "simpo": dict(pref_loss="simpo", solopo_align_on="both", disable_gradient_checkpointing=True),
    "distill": dict(pref_loss="orpo", solopo_align="distill", solopo_align_on="both", solopo_anchor=0.5),
    "longpo": dict(solopo_objective="longpo", solopo_longpo_lambda=0.5, include_num_input_tokens_seen="non_padding"),
    # 7 training rows, windows of 4 and 3, the last micro-batch of one row; 4 evaluation rows in batches of 3
    "orpo": dict(
        pref_loss="orpo", max_samples=11, val_size=4, eval_strategy="epoch", per_device_eval_batch_size=3,
        gradient_accumulation_steps=2, num_train_epochs=2.0,
    ),
}  # fmt: skip


def same_numbers(one, two, operations: bool = True) -> None:
    """All that is logged and saved is equal but for rounding, and counts and lengths of time but for time."""
    for a, b in zip(one.log, two.log, strict=True):
        if abs(a.get("rewards/margins", 1)) < 1e-5:  # before the first step, where the policy is its reference,
            b["rewards/accuracies"] = a["rewards/accuracies"]  # rounding says who is ahead
    assert_equal(one, two)
    states = [json.loads((r.dir / "trainer_state.json").read_text()) for r in (one, two)]
    for name in ("global_step", "max_steps", "num_train_epochs", "num_input_tokens_seen", *["total_flos"] * operations):
        assert states[0][name] == pytest.approx(states[1][name], rel=1e-12), name
    for a, b in zip(one.log, two.log, strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"] and a["epoch"] == b["epoch"]
        for key in [key for key in a if key == "eval_loss" or key.removeprefix("eval_") in METRICS]:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=2e-5), key


def test_two_that_share_equal_one(train, run, recipe, tmp_path, monkeypatch):
    """Every loss, LongPO, LoRA, an anchor, with and without checkpointing, MLPs in chunks, references of both kinds.

    Compiled, a run gives the numbers that it gives uncompiled.
    """
    monkeypatch.setenv("SOLOPO_CACHE", str(tmp_path / "one_cache"))
    compiled = dict(compiled=RUNS["simpo"] | dict(torch_compile=True, torch_compile_backend="eager"))
    two, _ = train(2, **{name: BASE | DDP | SHARED | changes for name, changes in (RUNS | compiled).items()})
    same_numbers(two["simpo"], two["compiled"])
    for name, changes in RUNS.items():
        one = run(recipe(**(BASE | changes | dict(output_dir=str(tmp_path / f"{name}_one")))))
        same_numbers(one, two[name])
    kept = [scores(tmp_path / cache) for cache in ("one_cache", "cache")]
    assert len(kept[0]) == 6 and kept[0].keys() == kept[1].keys()
    assert all(kept[1][row] == pytest.approx(pair, rel=1e-6) for row, pair in kept[0].items())


CPU_CHECKPOINTS = dict(activation_checkpointing=dict(partition_activations=True, cpu_checkpointing=True))
STAGES = {
    "z2": dict(pref_loss="ipo", finetuning_type="lora"),
    "z3": dict(pref_loss="sigmoid", solopo_reference="online", gradient_accumulation_steps=2, max_samples=12),
    "z3_offload": dict(solopo_objective="longpo", solopo_mlp_chunk=50, solopo_longpo_lambda=0.5) | ADAM,
    "z2_offload": dict(pref_loss="hinge", max_samples=7) | ADAM,
}


@pytest.mark.parametrize("stage", STAGES)
def test_zero(train, run, recipe, tmp_path, monkeypatch, stage):
    """ZeRO shards over all processes, those that share a row among them, as over any others.

    DeepSpeed's own checkpoints on the CPU, asked for beside offload, change nothing: transformers does not use them.
    """
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    monkeypatch.setenv("SOLOPO_CACHE", str(tmp_path / "one_cache"))
    common = BASE | STAGES[stage]
    config = with_adam(zero(stage), tmp_path, **CPU_CHECKPOINTS) if "offload" in stage else zero(stage)
    two, _ = train(2, env=dict(SOLOPO_CACHE=str(tmp_path / "two_cache")), two=common | config | SHARED)
    one = run(recipe(**(common | dict(output_dir=str(tmp_path / "one")))))
    same_numbers(one, two["two"], operations="z3" not in stage)  # there the Trainer counts a rank's parameters alone


def test_evaluation_without_training(train, tuner, recipe, tmp_path):
    """7 rows in batches of 3, of which the last has one."""
    keys = BASE | dict(pref_loss="simpo", do_train=None, do_eval=True, dataset=None, eval_dataset="demo_solopo")
    keys |= dict(max_samples=7, per_device_eval_batch_size=3)
    tuner.run_exp(recipe(**keys, output_dir=str(tmp_path / "one")))
    train(2, check=False, two=keys | DDP | SHARED)
    one, two = (json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("one", "two"))
    for key in ("eval_loss", *(f"eval_{key}" for key in METRICS)):
        assert two[key] == pytest.approx(one[key], rel=1e-4, abs=2e-5), key


def rates(found, processes: int) -> list[float]:
    """Return what was counted for the rates that a run reports: rates times seconds."""
    results = json.loads((found.dir / "train_results.json").read_text())
    counts = [results[f"train_{name}_per_second"] for name in ("samples", "steps")]
    counts = [count * results["train_runtime"] for count in (*counts, processes * results["effective_tokens_per_sec"])]
    return counts + [e["eval_samples_per_second"] * e["eval_runtime"] for e in found.log if "eval_runtime" in e]


def test_two_groups_of_two_equal_two_and_four(train):
    """14 training rows, windows of 8 and of 6; 5 evaluation rows; rows grouped by length; tokens and rates counted.

    Two ranks with whole rows, and four with batches of half as many.
    """
    common = BASE | DDP | dict(
        max_samples=19, val_size=5, eval_strategy="epoch", per_device_eval_batch_size=2, gradient_accumulation_steps=2,
        num_train_epochs=2.0, pref_loss="sigmoid", include_num_input_tokens_seen="all", disable_shuffling=None,
        include_effective_tokens_per_second=True,
    )  # fmt: skip
    grouped = common | dict(train_sampling_strategy="group_by_length", max_steps=3, num_train_epochs=None)
    two, _ = train(2, shuffled=common, grouped=grouped)
    half = dict(per_device_train_batch_size=1, per_device_eval_batch_size=1)
    four, _ = train(4, shuffled_4=common | SHARED, grouped_4=grouped | SHARED, halves=common | half)
    for name, found in two.items():
        same_numbers(found, four[f"{name}_4"])
        assert rates(four[f"{name}_4"], 4) == pytest.approx(rates(found, 2), rel=0.01)
    same_numbers(four["halves"], four["shuffled_4"])


def test_killed_and_resumed(train, tmp_path):
    """Two groups of two, killed between checkpoints, end with the weights of ones that were not, to the last bit."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    common = BASE | SHARED | zero("z2") | dict(
        pref_loss="ipo", per_device_train_batch_size=1, save_strategy="steps", save_steps=2, max_samples=10,
        num_train_epochs=2.0, optim="adamw_torch", learning_rate=1e-3, disable_shuffling=None,
        overwrite_output_dir=None,
    )  # fmt: skip
    whole, _ = train(4, whole=common)
    train(4, check=False, env=dict(DIE_AT_STEP="7"), parts=common)
    assert [p.name for p in (tmp_path / "parts").glob("checkpoint-*")] and not (
        tmp_path / "parts" / "all_results.json"
    ).exists()
    (tmp_path / "parts/checkpoint-6/trainer_state.json").unlink()  # as if it had died while it wrote that one
    parts, out = train(4, parts=common)
    assert "10 rows are in" in out  # the reference was scored before
    assert out.count(f"cut off: the run goes on from {tmp_path / 'parts/checkpoint-4'}.") == 1
    assert (tmp_path / "parts/_earlier_checkpoint-6").is_dir()
    assert [e["step"] for e in parts["parts"].log if "loss" in e] == [*range(1, 11)]
    for name, weight in whole["whole"].weights.items():
        assert weight.equal(parts["parts"].weights[name]), name


def test_refused_in_a_sentence(cli, recipe, tmp_path, tiny_model):
    """Processes or heads that do not fit, and what does not go together, before data are; then a model's layers."""
    for n, (processes, changes, sentence, *more) in enumerate(REFUSED):
        path = write_recipe(tmp_path / f"{n}.yaml", recipe(**(DDP | changes)))
        env = dict(FORCE_TORCHRUN="1", NPROC_PER_NODE=str(processes)) if processes > 1 else {}
        done = cli("train", path, check=False, OMP_NUM_THREADS="1", **env, **dict(more))
        assert done.returncode and sentence in done.out, done.out[-3000:]
        assert "Loading dataset" not in done.out and "Traceback" not in done.out
    path = write_recipe(tmp_path / "capped.yaml", recipe(model_name_or_path=tiny_model("gemma2"), **DDP, **SHARED))
    done = cli("train", path, check=False, FORCE_TORCHRUN="1", NPROC_PER_NODE="2")
    sentence = "Error: `solopo_sequence_parallel: 2` needs packed rows: it has layers other than full attention ("
    assert done.returncode and sentence in done.out and "Traceback" not in done.out, done.out[-3000:]


STREAM = SHARED | dict(streaming=True, max_steps=1, max_samples=None)
REFUSED = (
    (1, SHARED, "Error: `solopo_sequence_parallel: 2` needs 2 processes, there would be 1: FORCE_TORCHRUN=1 NPROC_PER"),
    (3, SHARED, "Error: `solopo_sequence_parallel: 2` must divide"),
    (8, dict(solopo_sequence_parallel=8), "the model's 4 attention heads and the 8 processes of a machine; 2, 4 would"),
    (2, SHARED | dict(solopo_forward="two_stage"), "does not run with `solopo_forward: two_stage`: only a packed row"),
    (2, STREAM, "does not run with `streaming: true`: streams are dealt out to single processes"),
    (2, SHARED | dict(fsdp="full_shard"), "does not run with `fsdp`: use DeepSpeed ZeRO-3; remove one of the two."),
    (2, SHARED, "does not run with `fsdp`: use DeepSpeed", ("ACCELERATE_USE_FSDP", "true")),
)  # fmt: skip


def test_two_share_rows_with_lists_of_rejected_responses(train, run, recipe, tmp_path, monkeypatch):
    """Share rows of one, two and three, with a reference of each pair."""
    monkeypatch.setenv("SOLOPO_CACHE", str(tmp_path / "one_cache"))
    rows = demo_rows(6)
    for i, row in enumerate(rows):
        row["rejected"] = [row["rejected"], "Nobody knows.", "It is not said."][: i % 3 + 1]
    folder = write_dataset(tmp_path / "data", rows)
    keys = BASE | dict(dataset="rows", dataset_dir=folder, max_samples=None, solopo_align_on="both")
    two, _ = train(2, lists=keys | DDP | SHARED)
    same_numbers(run(recipe(**keys, output_dir=str(tmp_path / "lists_one"))), two["lists"])
