"""Whole runs of the stage: every way the host loads data, evaluation, resuming, what a finished run is good for."""

import json
import math
import signal
import time

import pytest
import torch
from conftest import (
    BIN,
    ROOT,
    SHARED_DATA,
    SOLO_COLUMNS,
    demo_rows,
    outcome,
    shell_environment,
    write_dataset,
    write_recipe,
)


def first_losses(run, recipe, tmp_path, name: str, **changes) -> list[float]:
    return run(recipe(max_samples=None, max_steps=2, output_dir=str(tmp_path / name), **changes)).losses


def as_messages(row: dict, role: str, text: str, user: str, assistant: str, system: str | None = None) -> dict:
    """The row as conversations of the sharegpt or openai formatting, with one earlier turn."""
    before = [{role: user, text: "Hello."}, {role: assistant, text: "Hello, ask me."}]
    head = [{role: "system", text: system}] if system else []
    return {
        "messages": [*head, *before, {role: user, text: row["prompt"]}],
        "long": [*head, *before, {role: user, text: row["long_prompt"]}],
        "chosen": {role: assistant, text: row["chosen"]},
        "rejected": {role: assistant, text: row["rejected"]},
    }


TALK_COLUMNS = {"messages": "messages", "long_messages": "long", "chosen": "chosen", "rejected": "rejected"}
OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}


def test_the_same_content_in_every_formatting_trains_the_same(run, recipe, tmp_path, host_log):
    """alpaca with system and history columns = sharegpt = openai, loss for loss.

    The host's openai converter appends a line to the system prompt, so the others are given that line too; it is told.
    """
    rows = demo_rows(6)
    system = "Be brief.\ndetailed thinking off"
    alpaca = [{**r, "system": system, "history": [["Hello.", "Hello, ask me."]]} for r in rows]
    folder = write_dataset(
        tmp_path, alpaca, "alpaca", columns=SOLO_COLUMNS | {"system": "system", "history": "history"}
    )
    share = [as_messages(r, "from", "value", "human", "gpt", system) for r in rows]
    write_dataset(tmp_path, share, "share", formatting="sharegpt", columns=TALK_COLUMNS)
    openai = [as_messages(r, "role", "content", "user", "assistant", "Be brief.") for r in rows]
    write_dataset(tmp_path, openai, "openai", formatting="openai", columns=TALK_COLUMNS, tags=OPENAI_TAGS)
    expected = first_losses(run, recipe, tmp_path, "a", dataset="alpaca", dataset_dir=folder)
    assert len(expected) == 2
    for name in ("share", "openai"):
        assert first_losses(run, recipe, tmp_path, name[0], dataset=name, dataset_dir=folder) == expected
        told = [message for message in host_log if "`detailed thinking off`" in message]
        assert [message.partition(":")[0] for message in told] == ["Dataset `openai`"] * (name == "openai")
    plain = write_dataset(tmp_path, rows, "plain")
    assert first_losses(run, recipe, tmp_path, "p", dataset="plain", dataset_dir=plain) != expected


def test_a_hub_name(run, recipe, tmp_path):
    """`hf_hub_url` instead of `file_name`; a local folder stands in for the hub, which `load_dataset` treats alike."""
    (tmp_path / "repository").mkdir()
    folder = write_dataset(tmp_path / "repository", demo_rows(6))
    (tmp_path / "repository" / "dataset_info.json").unlink()
    info = {"hub": {"hf_hub_url": folder, "ranking": True, "columns": SOLO_COLUMNS}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    assert len(first_losses(run, recipe, tmp_path, "h", dataset="hub", dataset_dir=str(tmp_path))) == 2


def test_file_types_workers_and_tokenized_path(run, recipe, tmp_path):
    from datasets import Dataset

    rows = demo_rows(6)
    folder = write_dataset(tmp_path, rows, "lines")
    (tmp_path / "list.json").write_text(json.dumps(rows))
    Dataset.from_list(rows).to_parquet(str(tmp_path / "table.parquet"))
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    for name in ("list.json", "table.parquet"):
        info[name.split(".")[0]] = info["lines"] | {"file_name": name}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    expected = first_losses(run, recipe, tmp_path, "a", dataset="lines", dataset_dir=folder)
    for name in ("list", "table"):
        assert first_losses(run, recipe, tmp_path, name, dataset=name, dataset_dir=folder) == expected
    workers = dict(dataset="lines", dataset_dir=folder, preprocessing_num_workers=2)
    assert first_losses(run, recipe, tmp_path, "w", **workers) == expected
    tokens = str(tmp_path / "tokens")
    for name in ("save", "load"):
        losses = first_losses(run, recipe, tmp_path, name, dataset="lines", dataset_dir=folder, tokenized_path=tokens)
        assert losses == expected


def test_mixed_data_sets_sizes_and_splits(run, recipe, tmp_path):
    folder = write_dataset(tmp_path, demo_rows(6), "one")
    write_dataset(tmp_path, demo_rows(12)[6:], "two")
    write_dataset(tmp_path, demo_rows(6), "few", num_samples=3)
    common = dict(dataset_dir=folder, num_train_epochs=1.0, gradient_accumulation_steps=1, report_to="none")
    both = run(recipe(dataset="one,two", max_samples=None, **common))
    assert len(both.losses) == 6
    interleaved = run(recipe(dataset="one,two", max_samples=4, mix_strategy="interleave_under", **common))
    assert len(interleaved.losses) == 4
    assert len(run(recipe(dataset="few", max_samples=None, **common)).losses) == 2
    each = run(recipe(
        dataset="one", eval_dataset="one,two", eval_on_each_dataset=True, eval_strategy="epoch", max_samples=None,
        per_device_eval_batch_size=4, **common,
    ))  # fmt: skip
    evaluated = {key for entry in each.log for key in entry if key.startswith("eval_")}
    assert {"eval_one_loss", "eval_two_loss", "eval_two_solopo/reward_gap"} <= evaluated


def test_streaming(run, recipe, tmp_path):
    folder = write_dataset(tmp_path, demo_rows(8))
    args = recipe(
        dataset="rows", dataset_dir=folder, max_samples=None, streaming=True, max_steps=3, buffer_size=4,
        eval_dataset="rows", eval_strategy="steps", eval_steps=3, num_train_epochs=None, dataloader_num_workers=1,
    )  # fmt: skip
    result = run(args)
    assert len(result.losses) == 3 and all(map(math.isfinite, result.losses))
    assert any("eval_loss" in entry for entry in result.log)


def test_overlong_rows_are_dropped_and_counted(run, recipe, tmp_path, host_log):
    rows = demo_rows(6)
    rows[2]["long_prompt"] *= 6
    rows[4]["prompt"] *= 20
    folder = write_dataset(tmp_path, rows)
    args = recipe(dataset="rows", dataset_dir=folder, max_samples=None, cutoff_len=700, solopo_overlength="drop")
    run(args | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "num_train_epochs": 1.0})
    said = "SoLoPO training rows: 4; dropped by `solopo_overlength: drop` at `cutoff_len: 700`: 2; mean prompt"
    assert any(said in message for message in host_log)
    assert len(outcome(args["output_dir"]).losses) == 4


def test_swapped_columns_are_noticed(run, recipe, tmp_path, host_log):
    swapped = SOLO_COLUMNS | {"prompt": "long_prompt", "long_prompt": "prompt"}
    folder = write_dataset(tmp_path, demo_rows(4), columns=swapped)
    run(recipe(dataset="rows", dataset_dir=folder, max_samples=None, max_steps=1))
    assert any("are the columns swapped?" in message for message in host_log)


BASELINES = {
    "demo_solopo": dict(stage="solopo", pref_loss="orpo"),
    "demo_short_po": dict(stage="dpo", pref_loss="orpo"),
    "demo_expand_long_po": dict(stage="dpo", pref_loss="orpo"),
    "demo_sft_short": dict(stage="sft", pref_loss=None),
    "demo_sft_expand_long": dict(stage="sft", pref_loss=None),
    "demo_history": dict(stage="solopo", pref_loss="orpo", cutoff_len=4096),
}


def test_the_shipped_file_serves_what_needs_no_answers_on_the_long_context(run, recipe, tmp_path):
    """One file, five entries in dataset_info.json, each trained by its stage; and traces of an agent with its tools."""
    info = json.loads((ROOT / "data" / "dataset_info.json").read_text())
    assert list(info) == list(BASELINES)
    losses = {}
    for name, args in BASELINES.items():
        losses[name] = run(recipe(dataset=name, max_steps=2, output_dir=str(tmp_path / name), **args)).losses
        assert len(losses[name]) == 2 and all(map(math.isfinite, losses[name]))
    assert losses["demo_short_po"] != losses["demo_expand_long_po"]
    assert losses["demo_sft_short"] != losses["demo_sft_expand_long"]


def test_best_model_early_stopping_curves_and_model_card(run, recipe, tmp_path):
    """The learning rate is made to ruin the model, so the first checkpoint is best and training stops early."""
    args = recipe(
        max_samples=16, val_size=4, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_solopo/po_loss", greater_is_better=False,
        early_stopping_steps=2, num_train_epochs=10.0, learning_rate=0.3, lr_scheduler_type="constant", plot_loss=True,
        save_only_model=True, pref_loss="orpo",
    )  # fmt: skip
    result = run(args)
    state = json.loads((result.dir / "trainer_state.json").read_text())
    evals = {e["step"]: e["eval_solopo/po_loss"] for e in result.log if "eval_solopo/po_loss" in e}
    best = min(evals, key=evals.get)
    assert state["best_model_checkpoint"].endswith(f"checkpoint-{best}") and max(evals) < 60
    best_weights = outcome_weights(result.dir / f"checkpoint-{best}")
    assert all(torch.equal(w, best_weights[name]) for name, w in result.weights.items())
    names = {p.name for p in result.dir.iterdir()}
    drawn = ("loss", "rewards_accuracies", "rewards_margins", "solopo_align_loss", "eval_loss")
    curves = {f"training_{key}.png" for key in drawn}
    assert curves | {"README.md", "train_results.json", "all_results.json", "trainer_log.jsonl"} <= names
    assert not list(result.dir.glob("checkpoint-*/optimizer.pt"))


def outcome_weights(folder) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(zygote, recipe, tmp_path):
    """kill -9 after the second checkpoint, the same command again: same losses, same weights."""
    args = recipe(
        max_samples=24, num_train_epochs=4.0, save_strategy="steps", save_steps=4, overwrite_output_dir=None,
        dataset_dir=str(ROOT / "data"), pref_loss="sigmoid", solopo_alpha=1.0,
    )  # fmt: skip

    def start(folder: str, log: str):
        path = write_recipe(tmp_path / f"{folder}.yaml", args | {"output_dir": str(tmp_path / folder)})
        return zygote.start(BIN / "llamafactory-cli", "train", path, log=tmp_path / log, env=shell_environment())

    assert start("whole", "whole.txt").wait() == 0
    process = start("killed", "killed.txt")
    complete = tmp_path / "killed" / "checkpoint-8" / "trainer_state.json"  # written last
    deadline = time.time() + 200
    while not complete.exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert complete.exists() and not (tmp_path / "killed" / "model.safetensors").exists()
    status, said = start("killed", "resumed.txt").wait(), (tmp_path / "resumed.txt").read_text()
    assert status == 0 and "Resuming training from" in said, said[-6000:]
    whole, again = outcome(tmp_path / "whole"), outcome(tmp_path / "killed")
    drop = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")
    strip = lambda log: [{k: v for k, v in e.items() if k not in drop} for e in log]  # noqa: E731
    assert len(whole.losses) == 24
    assert strip(again.log) == strip(whole.log)
    assert all(torch.equal(w, again.weights[name]) for name, w in whole.weights.items())


@pytest.mark.slow
def test_real_questions_train_for_an_epoch(cli, tmp_path, recipe):
    """Rows from MuSiQue (CC BY 4.0), through the command line; the alignment loss falls.

    Short: the supporting paragraphs and two others; long: all twenty. Real text brings odd characters, near-duplicate
    titles and very long paragraphs. The model is tiny and random, so only the mechanics are tried.
    """
    source = SHARED_DATA / "musique_ans_dev_150.jsonl"
    if not source.exists():
        pytest.skip(f"no MuSiQue sample at {source}; set SOLOPO_SHARED_DATA")
    from make_tiny_model import build

    rows = []
    for line in source.read_text(encoding="utf-8").splitlines():
        question = json.loads(line)
        passages = question["paragraphs"]
        others = [p for p in passages if not p["is_supporting"]][:2]
        short = [p for p in passages if p["is_supporting"] or p in others]
        text = lambda ps: "\n\n".join(f"{p['title']}\n{p['paragraph_text']}" for p in ps)  # noqa: E731
        ask = f"\n\nQuestion: {question['question']}\nEnd with `The answer is: ...`."
        rows.append({
            "prompt": text(short) + ask,
            "long_prompt": text(passages) + ask,
            "chosen": f"The passages say so. The answer is: {question['answer']}",
            "rejected": "The passages do not say. The answer is: No answer.",
        })  # fmt: skip
    assert len(rows) == 150
    shape = dict(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, num_key_value_heads=1)
    # large random weights: a model that attends to its context, so that there is a gap to close
    build(str(tmp_path / "model"), [r["long_prompt"] for r in rows], tokens=4096, initializer_range=0.3, **shape)
    args = recipe(
        model_name_or_path=str(tmp_path / "model"), dataset="rows", dataset_dir=write_dataset(tmp_path / "data", rows),
        max_samples=None, cutoff_len=8192, num_train_epochs=1.0, pref_loss="orpo", solopo_alpha=4.0,
        per_device_train_batch_size=1, gradient_accumulation_steps=6, learning_rate=1e-2, disable_tqdm=None,
        disable_gradient_checkpointing=True,
    )  # fmt: skip
    process = cli("train", write_recipe(tmp_path / "recipe.yaml", args))
    assert "SoLoPO training rows: 150; dropped by" in process.out
    entries = [e for e in outcome(tmp_path / "out").log if "loss" in e]
    assert len(entries) == 25
    mean = lambda part: sum(e["solopo/align_loss"] for e in part) / len(part)  # noqa: E731
    assert mean(entries[-5:]) < mean(entries[:5])
    assert all(math.isfinite(e["loss"]) for e in entries)
