"""The cached reference equals the online one, is reused by who may, and by nobody else."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import ROOT, demo_rows, outcome, write_dataset, write_recipe


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
    entries = [[{k: v for k, v in e.items() if k.split("/")[0].removeprefix("eval_") in
                 ("loss", "rewards", "logps", "solopo", "grad_norm")} for e in r.log] for r in (online, cached)]  # fmt: skip
    assert entries[0] == entries[1]
    assert all(torch.equal(w, cached.weights[name]) for name, w in online.weights.items())
