"""The cached reference equals the online one, is reused by who may, and by nobody else."""

import gc
import json
import re
import shutil
import subprocess
import time
import weakref
from pathlib import Path
from subprocess import DEVNULL

import pytest
import torch
from conftest import BIN, ROOT, demo_rows, write_dataset, write_recipe
from safetensors.torch import load_file, save_file


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache; its folder of scores."""
    monkeypatch.setenv("SOLOPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


KINDS = {
    "full": dict(),
    "ipo": dict(pref_loss="ipo"),
    "lora": dict(finetuning_type="lora", pref_loss="hinge"),
    "freeze": dict(finetuning_type="freeze", freeze_trainable_layers=1),
    "longpo": dict(solopo_objective="longpo"),
}


@pytest.mark.parametrize("forward", ["packed", "two_stage"])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_is_online(run, recipe, tmp_path, kind, forward):
    """One row at a time both score the same forward of the same weights: bit for bit, in training and evaluation."""
    common = KINDS[kind] | dict(
        solopo_forward=forward, max_samples=8, val_size=3, eval_strategy="epoch", per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
    )  # fmt: skip
    online, cached = (
        run(recipe(solopo_reference=how, output_dir=str(tmp_path / how), **common)) for how in ("online", "cached")
    )
    assert cached.losses == online.losses and len(cached.losses) == 6
    ours = ("loss", "grad_norm", "rewards", "logps", "solopo")
    entries = [
        [{k: v for k, v in entry.items() if k.removeprefix("eval_").split("/")[0] in ours} for entry in result.log]
        for result in (online, cached)
    ]
    assert entries[0] == entries[1]
    assert all(torch.equal(w, cached.weights[name]) for name, w in online.weights.items())


def writers(cache: Path) -> dict[str, list[dict]]:
    """Lines of every writer's file, by file."""
    return {str(f): [json.loads(line) for line in f.read_text().splitlines()] for f in cache.glob("*/*.jsonl")}


def scored(messages: list[str]) -> list[tuple[int, int]]:
    """(found, scored) of every run, from what it logged."""
    said = [re.fullmatch(r"Reference log-probs: (\d+) rows are in \S+, (\d+) to score\.", m) for m in messages]
    return [(int(m[1]), int(m[2])) for m in said if m]


def test_who_may_reuse_scores_does(run, recipe, tmp_path, cache, host_log, monkeypatch):
    """A repeated run, another alpha, LoRA on the same base, a sub-set with an evaluation split: nothing is scored."""
    from solopo_plugin.trainer import SoloTrainer

    first = run(recipe())
    monkeypatch.setattr(SoloTrainer, "score_pair", lambda *args: pytest.fail("scored again"))
    again = run(recipe(output_dir=str(tmp_path / "again")))
    assert again.losses == first.losses
    run(recipe(solopo_alpha=0.5, solopo_align_on="both", pref_beta=0.5, max_steps=1))
    run(recipe(finetuning_type="lora", max_steps=1, output_dir=str(tmp_path / "lora")))
    run(recipe(max_samples=10, val_size=4, eval_strategy="epoch", num_train_epochs=1.0))
    run(recipe(solopo_objective="longpo", max_steps=1))
    assert scored(host_log) == [(0, 12), (12, 0), (12, 0), (12, 0), (10, 0), (12, 0)]


def test_who_may_not_reuse_scores_does_not(run, recipe, tiny_model, tmp_path, cache, host_log):
    """Changed weights under the same path, another dtype, form, length normalisation or template."""
    model = shutil.copytree(tiny_model(), tmp_path / "model")
    base = dict(model_name_or_path=str(model), max_steps=1, max_samples=4)
    run(recipe(**base))
    for change in (dict(bf16=True), dict(solopo_forward="two_stage"), dict(pref_loss="ipo"), dict(template="llama3")):
        run(recipe(**base | change))
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-6
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    run(recipe(**base))
    assert scored(host_log) == [(0, 4)] * 6
    assert len(list(cache.iterdir())) == 5  # the other template's rows are other rows of the same model


def test_a_foreign_folder_is_refused(run, recipe, tiny_model, cache):
    """Scores that were copied under the name of another model."""
    run(recipe(max_steps=1, max_samples=4))
    run(recipe(max_steps=1, max_samples=4, model_name_or_path=tiny_model(seed=1)))
    one, other = sorted(cache.iterdir())
    shutil.rmtree(one)
    shutil.copytree(other, one)
    with pytest.raises(ValueError, match=r"reference scores of another model or setting \(weights differ\); remove"):
        for seed in (0, 1):
            run(recipe(max_steps=1, max_samples=4, model_name_or_path=tiny_model(seed=seed)))


def test_a_ref_model_from_elsewhere_is_loaded_once_and_freed(run, recipe, tiny_model, tmp_path, monkeypatch):
    from solopo_plugin import workflow

    loaded = []
    create = workflow.create_ref_model

    def remember(*args):
        model = create(*args)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(workflow, "create_ref_model", remember)
    common = dict(ref_model=tiny_model(seed=1), per_device_train_batch_size=1, per_device_eval_batch_size=1)
    online = run(recipe(solopo_reference="online", output_dir=str(tmp_path / "online"), **common))
    loaded.clear()
    cached = run(recipe(output_dir=str(tmp_path / "cached"), **common))
    assert cached.losses == online.losses
    gc.collect()
    assert len(loaded) == 1 and loaded[0]() is None
    run(recipe(output_dir=str(tmp_path / "again"), **common))
    assert len(loaded) == 1
    own = run(recipe(output_dir=str(tmp_path / "own"), **common | dict(ref_model=None)))
    assert own.losses != cached.losses and len(loaded) == 1  # the policy is its own reference: no second model


def test_scoring_killed_and_continued(run, recipe, tmp_path, cache, host_log, monkeypatch):
    """kill -9 while it scores, through the command line; then only the rest is scored and the run is the whole one."""
    rows = [row | {"prompt": f"{i}. {row['prompt']}"} for i, row in enumerate(demo_rows() * 10)]
    args = recipe(
        dataset="rows", dataset_dir=write_dataset(tmp_path / "data", rows), max_samples=None, max_steps=2,
        per_device_train_batch_size=1, per_device_eval_batch_size=1, num_train_epochs=None,
    )  # fmt: skip
    path = write_recipe(tmp_path / "r.yaml", args)
    process = subprocess.Popen([BIN / "llamafactory-cli", "train", path], cwd=ROOT, stdout=DEVNULL, stderr=DEVNULL)
    while process.poll() is None and sum(f.stat().st_size for f in cache.glob("*/*.jsonl")) < 2000:
        time.sleep(0.001)
    process.kill()
    process.wait()
    (torn,) = cache.glob("*/*.jsonl")
    text = torn.read_text()
    torn.write_text(text[: text.rindex("}") - 9])  # a writer that dies within a line
    before = len(text.splitlines()) - 1
    assert 5 <= before < len(rows) - 5
    continued = run(args)
    assert scored(host_log) == [(before, len(rows) - before)]
    monkeypatch.setenv("SOLOPO_CACHE", str(tmp_path / "other"))
    whole = run(args | dict(output_dir=str(tmp_path / "whole")))
    assert continued.losses == whole.losses
    assert all(torch.equal(w, continued.weights[name]) for name, w in whole.weights.items())


def test_a_resumed_run_keeps_its_reference(run, recipe, tmp_path, cache, host_log):
    """Resumed from a checkpoint, the reference is still the model as it started: from disk, or scored anew from it."""
    args = recipe(save_strategy="steps", save_steps=2, per_device_train_batch_size=1, per_device_eval_batch_size=1)
    whole = run(args)
    for again in ("from disk", "scored anew"):
        resumed = run(args | dict(resume_from_checkpoint=str(whole.dir / "checkpoint-2"),
                                  output_dir=str(tmp_path / again.replace(" ", "_"))))  # fmt: skip
        assert resumed.losses == whole.losses, again
        assert all(torch.equal(w, resumed.weights[name]) for name, w in whole.weights.items())
        shutil.rmtree(cache)
    assert scored(host_log) == [(0, 12), (12, 0), (0, 12)]


def test_what_cannot_be_cached(run, recipe, tmp_path, host_log, monkeypatch):
    run(recipe(streaming=True, max_samples=None, max_steps=2, num_train_epochs=None, dataloader_num_workers=1))
    assert any("A stream is read once: the reference runs in every step" in message for message in host_log)
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("SOLOPO_CACHE", str(blocked))
    with pytest.raises(OSError, match=r"cannot be kept in .*\(Not a directory\); set SOLOPO_CACHE to a folder"):
        run(recipe())


def test_a_reference_that_is_not_finite(run, recipe, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model(), tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    sentence = r"The reference's log-prob of demo_solopo\[\d+\], demo_.* is not finite; look at the model and its dtype"
    with pytest.raises(FloatingPointError, match=sentence):
        run(recipe(model_name_or_path=str(model)))


def test_evaluation_against_a_ref_model(recipe, tiny_model, tmp_path):
    """`do_train: false` with a `ref_model`: cached equals online."""
    from llamafactory.train.tuner import run_exp

    found = []
    for how in ("online", "cached"):
        args = recipe(
            do_train=False, do_eval=True, dataset=None, eval_dataset="demo_solopo", max_samples=5, solopo_reference=how,
            ref_model=tiny_model(seed=1), output_dir=str(tmp_path / how), per_device_eval_batch_size=1,
        )  # fmt: skip
        run_exp(args)
        metrics = json.loads((tmp_path / how / "eval_results.json").read_text())
        found.append({name: value for name, value in metrics.items() if "/" in name or name == "eval_loss"})
    assert found[0] == found[1] and found[0]["eval_rewards/margins"] != 0
