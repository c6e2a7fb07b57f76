"""The whole way from questions to rows: the same bytes however often it is killed, and nothing lost on a full disk.

The answers come from a scripted server, so that what the judge and the selection must find is known beforehand.
"""

import fcntl
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import build_data as build_data_script
import pytest
import yaml
from build_data import summary
from conftest import ROOT
from material import make_questions
from scripted_server import scripted, serving

from solopo_plugin.qa.files import DataError, read_jsonl, write_jsonl
from solopo_plugin.qa.provenance import TOKENIZER, WEIGHTS, file_hash, folder_hash
from solopo_plugin.qa.recipe import settings
from solopo_plugin.qa.store import STORE, Store, has_answers
from solopo_plugin.synthesis import pipeline, sample
from solopo_plugin.synthesis.look import open_source
from solopo_plugin.synthesis.pipeline import FROM_DOCUMENTS, TABLE, read_manifest, run_pipeline, stages_of
from solopo_plugin.synthesis.recipe import load_recipe, outside_inputs, stage_settings

N_QUESTIONS, N_SAMPLES, RIGHT, UNMARKED = 60, 6, 0.5, 0.1
KILLS = 4  # of every stage
STAGES = [name for name in TABLE if name not in FROM_DOCUMENTS]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    answers = {q["question"]: q["answers"][0] for q in make_questions(N_QUESTIONS)}
    (folder / "answers.json").write_text(json.dumps(answers))
    with serving(folder / "answers.json", right=RIGHT, unmarked=UNMARKED) as running:
        yield SimpleNamespace(url=running.url, answers=answers)


@pytest.fixture(scope="module")
def prepare(tmp_path_factory, server, tokenizer):
    """Folders, each with the same questions and recipe; paths in the recipe are relative to the folder."""

    def make(**keys) -> Path:
        folder = tmp_path_factory.mktemp("run")
        write_jsonl(folder / "in.jsonl", make_questions(N_QUESTIONS))
        write_jsonl(folder / "corpus.jsonl", [p for q in make_questions(5, seed=1) for p in q["distractors"]])
        recipe = dict(
            model_name_or_path=tokenizer, template="qwen", input="in.jsonl", corpus="corpus.jsonl", work_dir="work",
            dataset_dir="data", dataset_name="made", short_tokens=500, long_tokens=1500, num_rows=30,
            num_samples=N_SAMPLES, val_size=5, max_new_tokens=200, cutoff_len=2000, backend="openai",
            server_urls=server.url, served_model="scripted", concurrency=8,
        )  # fmt: skip
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | keys))
        return folder

    return make


@pytest.fixture(scope="module")
def finished(prepare, build_data) -> Path:
    """A folder with an uninterrupted run."""
    folder = prepare()
    assert build_data(folder) == 0, (folder / "log.txt").read_text()
    return folder


def results(folder: Path) -> dict[str, bytes]:
    """All files that a run leaves behind, by name; of the store its answers, whose order is that of their arrival."""
    files = [p for part in ("work", "data") for p in (folder / part).rglob("*") if p.is_file()]
    found = {str(p.relative_to(folder)): p for p in files if p.name != ".lock"}
    return {name: answers(path) if path.name == STORE else path.read_bytes() for name, path in found.items()}


def answers(path: Path) -> bytes:
    with closing(sqlite3.connect(path)) as store:
        columns = "name, settings, question, k, prompt, value"
        rows = store.execute(f"SELECT {columns} FROM answers JOIN sets ON set_id = sets.id")
        return json.dumps(sorted(rows)).encode()


# ---- the whole way


def test_what_the_server_said_is_what_was_counted(finished, server):
    """Right, wrong and unmarked answers, one by one and in the manifest."""
    manifest = json.loads((finished / "work" / "manifest.json").read_text())
    assert list(manifest["stages"]) == STAGES
    contexts = {row["id"]: row for row in read_jsonl(finished / "work" / "contexts.jsonl")}
    assert len(contexts) == N_QUESTIONS
    for side in ("short", "long"):
        judged = list(read_jsonl(finished / "work" / f"judged.{side}.jsonl"))
        assert [(j["id"], j["k"]) for j in judged] == [(i, k) for i in contexts for k in range(N_SAMPLES)]
        for answer in judged:
            gold = contexts[answer["id"]]["answers"][0]
            assert answer["correct"] == (f"The answer is: {gold}" in answer["text"])
            assert (answer["answer"] is None) == ("The answer is:" not in answer["text"])
            assert answer["em"] == answer["correct"] == (answer["f1"] == 1.0)
        counts = manifest["stages"]["judge"]["counts"][side]
        right, unmarked = sum(j["correct"] for j in judged), sum(j["answer"] is None for j in judged)
        assert (counts["answers"], counts["correct"], counts["no_marker"]) == (len(judged), right, unmarked)
        assert counts["no_answer"] == len(judged) - right - unmarked and counts["cut"] == 0
        n = N_QUESTIONS * N_SAMPLES  # four standard deviations of what the server was told to do
        assert abs(unmarked - n * UNMARKED) < 4 * (n * UNMARKED * (1 - UNMARKED)) ** 0.5
        assert abs(right - n * (1 - UNMARKED) * RIGHT) < 4 * (n * 0.25) ** 0.5
    assert all(row["prompt"] == contexts[row["id"]]["short"]["prompt"] for row in rows(finished))
    assert len(rows(finished)) + len(rows(finished, "_val")) == 30 and len(rows(finished, "_val")) == 5


def rows(folder: Path, part: str = "") -> list[dict]:
    return list(read_jsonl(folder / "data" / f"made_solopo{part}.jsonl"))


def test_two_runs_are_byte_equal(finished, prepare, build_data):
    """Also with other workers, another concurrency and answers one by one; the manifest too, but for those."""
    other = prepare(concurrency=3, num_workers=2)
    assert build_data(other) == 0
    assert results(other) == results(finished)
    before = {name: (other / name).stat().st_mtime_ns for name in results(other) if name.startswith("work/")}
    (other / "work" / "contexts.jsonl.tmp").write_text("half")  # of a run that was killed
    assert build_data(other) == 0 and results(other) == results(finished)
    assert before == {name: (other / name).stat().st_mtime_ns for name in before if name != "work/manifest.json"} | {
        "work/manifest.json": before["work/manifest.json"]
    }
    log = (other / "log.txt").read_text()
    assert log.count("finished before, kept.") == len(STAGES) - 1


@pytest.mark.slow
def test_killed_at_random_in_every_stage(finished, prepare, build_data):
    """`kill -9` again and again: a stage continues, and in the end every file is that of an uninterrupted run."""
    rng, folder, kills = random.Random(5), prepare(concurrency=2), 0
    for stage in STAGES:
        seconds = duration(stage, finished, prepare, build_data)
        done, words = 0, ["--stage", stage]
        for _ in range(10 * KILLS):
            status = build_data(folder, *words, kill_after=rng.uniform(0, 0.9) * seconds)
            done += status == -signal.SIGKILL
            if done == KILLS:
                break
            words = ["--stage", stage] + ["--no-resume"] * (status == 0)  # it was too quick: once more
        assert done == KILLS, f"{stage} ended before it could be killed ({seconds:.2f} s)"
        assert build_data(folder, "--stage", stage) == 0, (folder / "log.txt").read_text()
        kills += done
    assert kills >= 20
    assert build_data(folder) == 0, (folder / "log.txt").read_text()
    assert results(folder) == results(finished)


def duration(stage: str, finished: Path, prepare, build_data) -> float:
    """Seconds that a stage takes behind the finished ones before it."""
    folder = prepare(concurrency=2)
    shutil.copytree(finished / "work", folder / "work")
    shutil.copytree(finished / "data", folder / "data")
    started = time.monotonic()
    assert build_data(folder, "--stage", stage, "--no-resume") == 0, (folder / "log.txt").read_text()
    return time.monotonic() - started


@pytest.mark.slow
def test_killed_anywhere_on_the_whole_way(finished, prepare, build_data):
    """One command, started again after each kill, as a user or a scheduler does it."""
    rng, folder = random.Random(6), prepare(concurrency=2)
    for _ in range(8):
        if build_data(folder, kill_after=rng.uniform(0, 2.5)) == 0:
            break
    assert build_data(folder) == 0
    assert results(folder) == results(finished)


# ---- settings and inputs that change


@pytest.mark.slow
def test_what_depends_on_a_change_is_made_again(finished, prepare, build_data):
    """And only that; the log says why."""
    folder = prepare()
    for part in ("work", "data"):
        shutil.copytree(finished / part, folder / part)

    def again(*words: str) -> tuple[str, set[str]]:
        (folder / "log.txt").unlink(missing_ok=True)
        assert build_data(folder, *words) == 0, (folder / "log.txt").read_text()
        log = (folder / "log.txt").read_text()
        return log, {name for name in STAGES if f"{name}: made again, because" in log}

    log, made = again("num_rows=20")
    assert made == {"select", "export"} and "select: made again, because `num_rows` was 30 and is 20." in log
    assert "export: made again, because pairs.jsonl has changed." in log
    log, made = again("num_rows=20", "short_tokens=480")
    assert made == {"contexts", "sample", "judge", "select", "export"} and "`short_tokens` was 500 and is 480" in log
    _, made = again("num_rows=20", "short_tokens=480", "concurrency=5", "timeout=30", "num_workers=2")
    assert made == set()
    with open(folder / "work" / "judged.long.jsonl", "a") as file:
        file.write("\n")
    log, made = again("num_rows=20", "short_tokens=480")
    assert made == {"judge"} and "judge: made again, because judged.long.jsonl is not as it was written." in log
    (folder / "in.jsonl").write_bytes((folder / "in.jsonl").read_bytes() + b"\n")
    _, made = again("num_rows=20", "short_tokens=480")  # reads the same questions, so nothing else is made
    assert made == {"read"}
    again()
    _, made = again("--no-resume", "--stage", "select")
    assert made == set() and results(folder).keys() == results(finished).keys()
    other, first = ({k: v for k, v in results(path).items() if "manifest" not in k} for path in (folder, finished))
    kept, had = (json.loads(files.pop(f"work/{STORE}")) for files in (other, first))
    assert other == first and len(kept) > len(had) and all(row in kept for row in had)


def test_a_model_that_has_changed_in_place(prepare, monkeypatch, tmp_path):
    """Another tokenizer in the same folder makes other contexts, other weights make other samples only."""
    shutil.copytree(yaml.safe_load((prepare() / "recipe.yaml").read_text())["model_name_or_path"], tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(bytes(50 << 20))
    monkeypatch.chdir(prepare(model_name_or_path=str(tmp_path / "model")))
    made = replace(load_recipe("recipe.yaml"), backend="transformers")
    stages = ("read", "contexts", "sample")
    before = [outside_inputs(made, stage) for stage in stages]
    assert list(before[0]) == ["in.jsonl", "corpus.jsonl"] and [len(b) for b in before] == [2, 1, 1]
    stands_for = sample.depends_on(made)
    with open(weights, "r+b") as file:
        file.seek(45 << 20)
        file.write(b"trained")
    after = [outside_inputs(made, stage) for stage in stages]
    assert after[:2] == before[:2] and after[2] != before[2]
    assert sample.depends_on(made) != stands_for
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    assert outside_inputs(made, "contexts") != before[1]


def test_a_model_that_was_moved_is_the_same_model(finished, prepare, build_data, tokenizer):
    """Nothing is made again, one stage alone runs, and the rows are the same; what is in the folder decides."""
    folder = prepare(model_name_or_path="model")
    shutil.copytree(tokenizer, folder / "model")
    assert build_data(folder) == 0, (folder / "log.txt").read_text()
    (folder / "model").rename(folder / "moved")
    (folder / "log.txt").unlink()
    assert build_data(folder, "model_name_or_path=moved/") == 0
    assert build_data(folder, "model_name_or_path=moved", "--stage", "select") == 0
    log = (folder / "log.txt").read_text()
    assert log.count("finished before, kept.") == len(STAGES) and "made again" not in log and "anew" not in log
    assert {k: v for k, v in results(folder).items() if "manifest" not in k} == {
        k: v for k, v in results(finished).items() if "manifest" not in k
    }
    (folder / "moved" / "vocab.txt").write_text("another")
    assert build_data(folder, "model_name_or_path=moved", "--stage", "select") == 1
    log = (folder / "log.txt").read_text()
    assert "stage `contexts`, which ran with other settings (the files of `model_name_or_path` have changed);" in log


def test_a_model_whose_hash_an_earlier_version_took_is_unchanged(prepare, monkeypatch):
    """Read both ends of large files, as it did; where those are others, or the tokenizer, the model is another one."""
    monkeypatch.chdir(prepare())
    shutil.copytree(load_recipe("recipe.yaml").model_name_or_path, "a")
    Path("a/model.safetensors").write_bytes(bytes(17 << 20))
    keys = dict(backend="transformers", model_name_or_path="a", ask_model_name_or_path="b", ask_backend="transformers")
    shutil.copytree("a", "b")
    made = replace(load_recipe("recipe.yaml"), **keys)
    for stage, model in (("sample", "a"), ("ask", "b")):
        inputs, chosen = outside_inputs(made, stage), stage_settings(made, stage)
        earlier = folder_hash(Path(model), TOKENIZER + WEIGHTS)
        assert inputs[model] != earlier
        finished = {"settings": chosen, "inputs": inputs | {model: earlier}, "outputs": {}}
        assert pipeline._changes(finished, inputs, chosen, Path("work")) == []
        for name in TABLE[stage].inputs:
            Path("work").mkdir(exist_ok=True)
            Path("work", name).touch()
            finished["inputs"][name] = file_hash(Path("work", name))
        manifest = {"stages": {stage: finished}, "forget": []}
        pipeline._run_stage(stage, made, Path("work"), manifest, resume=True, then_sample=True)
        assert finished["inputs"][model] == inputs[model]  # from now on
        Path(model, "config.json").write_text("{}")
        now = finished["inputs"] | outside_inputs(made, stage)
        for known in (inputs[model], earlier):
            finished["inputs"][model] = known
            assert len(pipeline._changes(finished, now, chosen, Path("work"))) == 1


def test_what_a_moved_model_is_known_by(prepare, monkeypatch, tmp_path):
    """Weights where they answer; behind a server its name there, and where that is not given the folder's weights."""
    monkeypatch.chdir(prepare())
    for name, weights in (("a", b"1"), ("b", b"1"), ("c", b"2"), ("d", None), ("e", None)):
        shutil.copytree(load_recipe("recipe.yaml").model_name_or_path, name)
        if weights:
            Path(name, "model.safetensors").write_bytes(weights)

    def same(first: str, second: str, **keys) -> bool:
        recipes = [replace(load_recipe("recipe.yaml"), model_name_or_path=name, **keys) for name in (first, second)]
        one, other = map(sample.depends_on, recipes)
        finished = {"settings": settings(recipes[0], "sample"), "inputs": outside_inputs(recipes[0], "sample")}
        changed = pipeline._changed_settings(
            finished, settings(recipes[1], "sample"), outside_inputs(recipes[1], "sample")
        )
        assert bool(changed) == (one != other)
        return not changed

    own, served = dict(backend="transformers"), dict(backend="openai", served_model=None)
    assert same("a", "b", **own) and same("d", "e", **own) and not same("a", "c", **own) and not same("a", "d", **own)
    assert same("a", "b", **served) and not same("a", "c", **served) and not same("d", "e", **served)
    assert same("a", "c", backend="openai") and same("d", "e", backend="openai")
    assert not same("a", "org/b", **own) and not same("org/a", "org/b", **own)


def test_a_work_folder_from_before_the_models_content_was_known(prepare, monkeypatch):
    """A stage that went by the model's name alone is kept where that name is the same."""
    monkeypatch.chdir(prepare())
    made = load_recipe("recipe.yaml")
    chosen, inputs = settings(made, "select"), outside_inputs(made, "select")
    finished = {"settings": chosen, "inputs": {}, "outputs": {}}
    assert inputs and pipeline._changes(finished, inputs, chosen, Path("work")) == []
    other = pipeline._changes(finished, inputs, chosen | {"model_name_or_path": "b"}, Path("work"))
    assert other == [f"`model_name_or_path` was {made.model_name_or_path!r} and is 'b'"]


def test_a_backend_that_is_missing_is_found_before_the_contexts_are_built(prepare, monkeypatch):
    """Not where only the contexts are wanted, nor where nothing is to be sampled."""
    monkeypatch.chdir(prepare())
    recipe = load_recipe("recipe.yaml")
    with pytest.raises(DataError, match=r"^`backend: vllm` is not installed: pip install '\.\[vllm\]', or use"):
        run_pipeline(replace(recipe, backend="vllm"))
    with pytest.raises(DataError, match=r"^`backend: openai` needs `server_urls`, for example http"):
        run_pipeline(replace(recipe, server_urls=None))
    assert Path("work/questions.jsonl").exists() and not Path("work/contexts.jsonl").exists()
    run_pipeline(replace(recipe, backend="vllm"), "contexts")
    assert Path("work/contexts.jsonl").exists()
    run_pipeline(recipe)
    run_pipeline(replace(recipe, server_urls=None))  # all is there


def test_orders_that_cannot_be_followed(prepare, monkeypatch):
    """A missing stage, a folder in use, a manifest of somebody else's: one sentence each."""
    folder = prepare()
    monkeypatch.chdir(folder)
    recipe = load_recipe("recipe.yaml")
    with pytest.raises(DataError, match=r"Stage `judge` builds on stage `read`, which is not finished in work\."):
        run_pipeline(recipe, "judge")
    run_pipeline(recipe, "read")
    with pytest.raises(DataError, match=r"stage `read`, which ran with other settings \(`seed` was 42 and is 1\); run"):
        run_pipeline(replace(recipe, seed=1), "contexts")
    with pytest.raises(DataError, match=r"`--stage` must be one of read, .*; got 'jugde'\."):
        run_pipeline(recipe, "jugde")
    for text in ("[]", '{"stages": {"read": 5}}', '{"stages": {"read": {"counts": {}}}}', "\xff"):
        (folder / "work" / "manifest.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(DataError, match=r"manifest.json is no manifest of ours; give another `work_dir`"):
            run_pipeline(recipe)
    (folder / "work" / "manifest.json").unlink()
    with open("work/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"Another run is at work in work; wait for it"):
            run_pipeline(recipe)


def test_one_stage_builds_on_none_that_is_out_of_date(finished, prepare, monkeypatch):
    """Whatever is changed before it: the file that is read, or what a stage between was not run again for."""
    folder = prepare()
    shutil.copytree(finished / "work", folder / "work")
    monkeypatch.chdir(folder)
    recipe = load_recipe("recipe.yaml")
    rows = "samples.long.jsonl has changed; samples.short.jsonl has changed"

    def refused(made, stage: str, earlier: str, why: str) -> None:
        said = (
            f"Stage `{stage}` builds on stage `{earlier}`, which is out of date ({why}); run `--stage {earlier}` first"
        )
        with pytest.raises(DataError, match=re.escape(said)):
            run_pipeline(made, stage)

    fewer = replace(recipe, max_questions=3)
    for done, earlier, why in (("contexts", "sample", "contexts.jsonl has changed"), ("sample", "judge", rows)):
        run_pipeline(fewer, "read")
        run_pipeline(fewer, done)
        for stage in ("select", "export"):
            refused(fewer, stage, earlier, why if earlier == "sample" else f"contexts.jsonl has changed; {why}")
    (folder / "in.jsonl").write_bytes((folder / "in.jsonl").read_bytes() + b"\n")
    refused(fewer, "contexts", "read", "in.jsonl has changed")
    refused(fewer, "export", "read", "in.jsonl has changed")
    run_pipeline(fewer, "read")
    Path("work/corpus.jsonl").unlink()
    refused(fewer, "contexts", "read", "corpus.jsonl is missing")
    assert not Path("data").exists()
    with pytest.raises(DataError, match=r"date: contexts\.jsonl has changed since stage `judge` ran; run"):
        open_source(Path("work"))
    shutil.copytree(finished / "work", "work", dirs_exist_ok=True)
    for name in ("corpus.jsonl", "questions.jsonl", "samples.long.jsonl"):  # which the page does not read
        Path("work", name).unlink()
    open_source(Path("work"))
    Path("work/judged.long.jsonl").unlink()
    with pytest.raises(DataError, match=r"^work is out of date: judged\.long\.jsonl is missing; run"):
        open_source(Path("work"))
    Path("work/judged.long.jsonl").write_text("")
    with pytest.raises(DataError, match=r"date: judged\.long\.jsonl has changed since stage `judge` ran; run"):
        open_source(Path("work"))
    shutil.copytree(finished / "work", "work", dirs_exist_ok=True)
    shutil.copy(finished / "in.jsonl", "in.jsonl")
    assert open_source(Path("work")).stages.keys() == set(STAGES)
    run_pipeline(replace(recipe, num_rows=20), "select")
    open_source(Path("work"))  # before its export, which stays as it was


def test_what_earlier_stages_read_elsewhere_may_be_gone(finished, prepare, monkeypatch):
    """Where one stage alone runs, as on another machine: questions, corpus, and a model that asked, but no prompt."""
    monkeypatch.chdir(prepare())
    shutil.copytree(finished / "work", "work")
    made = load_recipe("recipe.yaml")
    for name in ("in.jsonl", "corpus.jsonl"):
        Path(name).unlink()
    run_pipeline(made, "contexts")
    run_pipeline(made, "export")
    shutil.copytree(made.model_name_or_path, "asker")
    weights, prompt = ("asker", "model.safetensors"), ("own", "ask_one.txt")
    for folder, name in (weights, prompt, ("in", "a.txt"), ("work", "passages.jsonl")):
        Path(folder).mkdir(exist_ok=True)
        Path(folder, name).write_text("text")
    made = replace(made, input="in", corpus=None, ask_model_name_or_path="./asker", ask_prompts="own")
    stages = {}
    for name in ("documents", "ask"):
        inputs, chosen = pipeline._made_from(name, made, Path("work"))
        stages[name] = {"settings": chosen, "inputs": inputs, "outputs": {}}
    assert {"in", "asker", "own/ask_one.txt"} < stages["documents"]["inputs"].keys() | stages["ask"]["inputs"].keys()
    for folder in ("in", "asker"):
        shutil.rmtree(folder)
    pipeline._check_before("filter", stages_of(replace(made, input_format="documents")), made, {"stages": stages})
    Path("own/ask_one.txt").unlink()
    with pytest.raises(DataError, match=r"stage `ask`, which is out of date \(own/ask_one.txt has changed\); run"):
        pipeline._check_before("filter", stages_of(replace(made, input_format="documents")), made, {"stages": stages})


@pytest.mark.parametrize(
    ("stage", "keys"),
    [
        ("sample", {"short_tokens": 440}),  # without `--stage` it can begin
        ("sample", {"cutoff_len": 9}),
        ("judge", {"judge": "model", "judge_rubric": "gone.txt"}),
        *((s, {key: gone}) for s in (None, "sample") for key, gone in (
            ("input", "gone.jsonl"), ("model_name_or_path", "./gone"), ("template", "gone")
        )),
    ],
)  # fmt: skip
def test_what_cannot_begin_forgets_nothing(stage, keys, finished, prepare, monkeypatch, capsys):
    """With `--no-resume`: answers are removed by the stage that asks for new ones, and by no other."""
    monkeypatch.chdir(prepare())
    shutil.copytree(finished / "work", "work")
    before = results(Path())
    words = [f"{key}={value}" for key, value in keys.items()] + (["--stage", stage] if stage else [])
    assert build_data_script.main(["recipe.yaml", "--no-resume", *words]) == 1
    assert "Error: " in capsys.readouterr().err
    after = results(Path())
    assert all(after[name] == before[name] for name in before if name != "work/manifest.json")


@pytest.mark.parametrize("answered", [False, True])
def test_a_stage_that_fails_has_forgotten_once_it_is_answered(answered, finished, prepare, monkeypatch):
    """As one whose model is too large for the GPU, or whose server goes away."""
    monkeypatch.chdir(prepare())
    shutil.copytree(finished / "work", "work")
    made, before = load_recipe("recipe.yaml"), results(Path())

    def fail(_, work):
        with Store(work / STORE) as store:
            if answered:
                store.add(store.set_of("short", {}), [("q", 0, "hash", {"text": "new"})])
            raise DataError("no room")

    with monkeypatch.context() as patch, pytest.raises(DataError, match="^no room$"):
        patch.setitem(TABLE, "sample", replace(TABLE["sample"], run=fail))
        run_pipeline(made, "sample", resume=False)
    after = results(Path())
    assert after.keys() == before.keys()
    assert {name for name in before if after[name] != before[name]} == (
        {f"work/{STORE}", "work/manifest.json"} if answered else set()
    )
    kept = [json.loads(row[-1]) for row in json.loads(after[f"work/{STORE}"])]
    assert kept == [{"text": "new"}] if answered else len(kept) > 1


def test_a_store_that_cannot_be_read_is_not_taken_for_an_empty_one(tmp_path):
    path = tmp_path / STORE
    assert not has_answers(path)
    with Store(path) as store:
        pass
    assert not has_answers(path)
    with closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA locking_mode=EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        assert has_answers(path)
    with Store(path) as store:
        store.add(store.set_of("a", {}), [("q", 0, "hash", {})])
    assert has_answers(path)
    path.write_bytes(b"no store" * 2000)
    assert has_answers(path)


def test_converted_documents_are_there_again_where_none_was_converted(tmp_path):
    """As where a package is missing; not where one was converted anew, or the run was stopped."""
    (tmp_path / "converted").mkdir()
    old, new = (tmp_path / f"converted/{digit * 64}.json" for digit in "ab")
    for error, made, there in ((DataError, None, [old]), (DataError, new, [new]), (KeyboardInterrupt, None, [])):
        old.touch()
        new.unlink(missing_ok=True)
        with pytest.raises(error), pipeline._anew("documents", tmp_path):
            assert not old.exists()
            if made:
                made.touch()
            raise error("no")
        assert list((tmp_path / "converted").iterdir()) == there and not (tmp_path / pipeline.FORGOTTEN).exists()


def test_a_stopped_run_that_was_to_begin_anew_does_so_where_it_goes_on(finished, prepare, monkeypatch, caplog):
    """Also in the stages that it had not reached; what it had asked anew itself is kept."""
    monkeypatch.chdir(prepare())
    shutil.copytree(finished / "work", "work")
    made, stores = load_recipe("recipe.yaml"), {"sample": "a.db", "judge": "b.db"}
    monkeypatch.setattr(pipeline, "STORES", stores)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(TABLE, "sample", replace(TABLE["sample"], run=stop))
        for name in stores.values():
            Path("work", name).touch()
        run_pipeline(made, resume=False)
    assert not Path("work/a.db").exists() and Path("work/b.db").exists()
    Path("work/a.db").touch()  # of its own answers
    manifest = run_pipeline(made)
    assert Path("work/a.db").exists() and not Path("work/b.db").exists()
    said = "judge: begins anew, as the run with `--no-resume` that did not reach it was told to."
    assert [r.getMessage() for r in caplog.records if "begins anew" in r.getMessage()] == [said]
    assert results(Path())["work/manifest.json"] == results(finished)["work/manifest.json"] and not manifest["forget"]
    with pytest.raises(DataError, match=r"^Stage `select` builds on stage `judge`, which is not finished in work"):
        pipeline._check_before("select", stages_of(made), made, manifest | {"forget": ["judge"]})


def test_files_of_others_in_the_work_folder_stay(finished, prepare, monkeypatch):
    """Remove what a killed run left half written, and with `resume=False` what was asked for, by their whole names."""
    monkeypatch.chdir(prepare())
    shutil.copytree(finished / "work", "work")
    work, recipe = Path("work"), load_recipe("recipe.yaml")
    mine = ["answers.db.bak", "samples.short.jsonl.bak", "thesis/notes.tmp", "notes.tmp", "converted/notes.json"]
    ours = ["contexts.jsonl.tmp", "manifest.json.tmp", f"converted/{'0a' * 32}.json.tmp", "answers.db-wal"]
    ours += ["samples.long.partial.jsonl", "samples.long.done.json", f"converted/{'0a' * 32}.json", STORE]
    for name in mine + ours[:-1]:
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).write_text("text")
    (work / "cache.tmp").mkdir()
    run_pipeline(recipe, "read")
    assert [name for name in ours if not (work / name).exists()] == ours[:3]
    for stage in ("documents", "sample"):
        pipeline._forget(stage, work)
    assert not any((work / name).exists() for name in ours)
    assert all((work / name).exists() for name in [*mine, "cache.tmp"])


def test_what_a_link_leads_to_is_read_and_known(prepare, monkeypatch, tmp_path):
    """As in a snapshot of the hub's cache, which `datasets` reads; folders that are links are passed over."""
    monkeypatch.chdir(prepare())
    (tmp_path / "snapshot").mkdir()
    for n in (6, 12):
        write_jsonl(tmp_path / f"blob{n}", make_questions(n))
    (tmp_path / "bad").write_text('{"id": "q1", "question": 5, "answers": ["x"], "evidence": ["y"]}\n')
    (tmp_path / "snapshot" / "round").symlink_to(tmp_path / "snapshot")
    (tmp_path / "snapshot" / "LICENSE.md").symlink_to(tmp_path / "bad")
    link = tmp_path / "snapshot" / "train.jsonl"
    made = replace(load_recipe("recipe.yaml"), input=str(tmp_path / "snapshot"), corpus=None)
    for name, n in (("blob6", 6), ("blob12", 12)):
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / name)
        assert run_pipeline(made, "read")["stages"]["read"]["counts"]["questions"] == n
    link.unlink()
    link.symlink_to(tmp_path / "bad")
    with pytest.raises(DataError, match=r"snapshot\[0\]: `question` must be"):
        run_pipeline(made, "read")


@pytest.mark.parametrize("key", ["work_dir", "dataset_dir"])
def test_folders_that_would_be_read_or_are_no_folders_are_refused_at_once(key, prepare, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    made = load_recipe(str(prepare() / "recipe.yaml"))
    Path("rows").mkdir()
    write_jsonl("rows/train.jsonl", make_questions(3))
    said = rf"^`{key}: rows/own/x` lies in `input: rows` and would be read as rows; move it\.$"
    with pytest.raises(DataError, match=said):
        run_pipeline(replace(made, input="rows/train.jsonl, rows", **{key: "rows/own/x"}), "read")
    with pytest.raises(DataError, match=rf"^`{key}: ~/x` begins with `~`, which only a shell replaces"):
        run_pipeline(replace(made, **{key: "~/x"}), "read")
    assert sorted(map(str, Path().rglob("*"))) == ["rows", "rows/train.jsonl"]
    with pytest.raises(DataError, match="File name too long"):
        run_pipeline(replace(made, work_dir="x" * 5000), "read")
    with pytest.raises(DataError, match=r"^Cannot read x+/manifest.json: File name too long\.$"):
        read_manifest(Path("x" * 5000))
    for kind, stage in (("auto", "read"), ("documents", "documents")):
        with pytest.raises(DataError, match=r"^`input: x+` (cannot be loaded|does not exist)"):
            run_pipeline(replace(made, input="x" * 5000, input_format=kind, corpus=None), stage)


def test_rows_of_another_work_folder_are_not_replaced_without_a_word(finished, prepare, monkeypatch, caplog):
    """Nor edited ones; a work folder's own are, whatever its settings, and those that are equal."""
    monkeypatch.chdir(prepare())
    for part in ("work", "data"):
        shutil.copytree(finished / part, part)
    shutil.copytree("work", "other")
    recipe = load_recipe("recipe.yaml")

    def export(made) -> list[str]:
        caplog.clear()
        for stage in ("select", "export"):
            run_pipeline(made, stage)
        return [r.getMessage() for r in caplog.records if "had exported" in r.getMessage()]

    assert export(recipe) == [] == export(replace(recipe, num_rows=20))
    said = (
        "data: made_solopo.jsonl held rows that another work folder had exported, or that were edited; they have been "
        "replaced. Another `dataset_name` keeps both."
    )
    [message] = export(replace(recipe, work_dir="other"))
    assert message.startswith("data: made_") and message.endswith(said.partition(" held ")[2])
    manifest = read_manifest(Path("work"))
    del manifest["stages"]["export"]
    Path("work/manifest.json").write_text(json.dumps(manifest))
    assert export(recipe) == []  # the same rows
    with open("data/made_solopo.jsonl", "a") as file:
        file.write("\n")
    assert export(recipe) == [said]
    del manifest["stages"]["select"]
    Path("work/manifest.json").write_text(json.dumps(manifest))
    assert len(export(replace(recipe, num_rows=10))) == 1  # of a work folder that had exported none
    del (manifest := read_manifest(Path("work")))["stages"]["export"]["rows"]  # of a version that did not know them
    Path("work/manifest.json").write_text(json.dumps(manifest))
    assert export(recipe) == []


def test_the_command_line_says_one_sentence(prepare):
    """In its own process, as a user starts it: an unknown key, and a stage that runs."""
    folder = prepare()
    command = [sys.executable, str(ROOT / "scripts" / "build_data.py"), "recipe.yaml", "--stage", "read"]
    process = subprocess.run([*command, "num_row=3"], cwd=folder, capture_output=True, text=True)
    assert process.returncode == 1 and process.stdout == ""
    assert process.stderr.startswith("Error: Unknown key `num_row` in the data recipe. Did you mean `num_rows`?")
    assert len(process.stderr.strip().splitlines()) == 1
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0 and f" {N_QUESTIONS} questions and " in process.stdout


def test_the_summary_of_one_stage_leaves_out_what_an_earlier_run_made_of_others(finished, prepare, monkeypatch):
    """Later stages may be out of date, and are named; the stages come in their order, whichever ran last."""
    monkeypatch.chdir(prepare())
    made, whole = load_recipe("recipe.yaml"), read_manifest(finished / "work")["stages"]
    shutil.copytree(finished / "work", "work")
    names = [line.split(" ")[0] for line in summary(made, whole).splitlines() if line]
    assert summary(made, whole).endswith(
        f" dataset={made.dataset_name}_solopo output_dir=saves/{made.dataset_name}/RUN"
    )
    assert list(dict.fromkeys(names)) == [*STAGES, "counts", "look", "train"]
    fewer = replace(made, max_questions=20)
    stages = run_pipeline(fewer, "read")["stages"]
    assert list(stages)[-1] == "read" and len(stages) == len(STAGES)
    said = summary(fewer, stages, "read")
    assert " 20 questions and " in said and "select" not in said.partition("not shown")[0]
    assert said.splitlines()[-1] == (
        "not shown contexts, sample, judge, select, export: of an earlier run; without `--stage` they are "
        "brought up to date"
    )
    assert "train " not in said and "not shown" not in summary(made, whole, "export")
    assert summary(fewer, stages).index("read ") < summary(fewer, stages).index("contexts ")


def test_a_key_that_an_earlier_version_did_not_name_had_the_value_that_changes_nothing(prepare, monkeypatch):
    """And that is what a sentence on another value says."""
    monkeypatch.chdir(prepare())
    made = load_recipe("recipe.yaml")
    for stage, key, value, said in [
        ("contexts", "contexts", "document", "`contexts` was 'mixed' and is 'document'"),
        ("select", "num_rejected", 2, "`num_rejected` was 1 and is 2"),
        ("filter", "ask_template", "llama3", "`ask_template` was None and is 'llama3'"),
    ]:
        before, now = (stage_settings(recipe, stage) for recipe in (made, replace(made, **{key: value})))
        assert key not in before
        assert pipeline._changed_settings({"settings": before, "inputs": {}}, now, {}) == [said]
        assert pipeline._changed_settings({"settings": now, "inputs": {}}, now, {}) == []
    now = stage_settings(replace(made, judge="model"), "select")
    said = pipeline._changed_settings({"settings": stage_settings(made, "select"), "inputs": {}}, now, {})
    assert "`judge` was 'rule' and is 'model'" in said


# ---- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 KiB, that can be made larger."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk")

    def grow(size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)

    yield disk, grow
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_a_disk_that_is_full_in_every_stage(small_disk, finished, prepare, build_data):
    """The disk grows bit by bit: every try ends with one sentence, and the one that has room with the right files."""
    disk, grow = small_disk
    folder = prepare()
    os.symlink(disk / "work", folder / "work")
    os.symlink(disk / "data", folder / "data")
    for name in ("work", "data"):
        (disk / name).mkdir()
    reached = set()
    for size in [f"{k}k" for k in (64, 160, 320, 480, 600, 680, 760, 840, 1000, 1200, 1500, 2000, 3000, 5000)]:
        grow(size)
        (folder / "log.txt").unlink(missing_ok=True)
        status = build_data(folder)
        log = (folder / "log.txt").read_text()
        if status == 0:
            break
        assert status == 1 and "Traceback" not in log, log
        assert log.splitlines()[-1].startswith("Error: Cannot write ") and "the disk is full" in log.splitlines()[-1]
        assert not list(disk.rglob("*.tmp"))
        reached.add([line.split(" ")[0] for line in log.splitlines() if line.endswith(" ...")][-1])
    assert status == 0 and len(reached) >= 3, reached
    assert {k: v for k, v in results(folder).items()} == results(finished)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full, the device that is always full")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.slow(keep=["read"])
def test_no_room_for_a_stage(stage, finished, prepare, build_data):
    """Each file that a stage writes meets a full disk once; the others stay, and the next try succeeds."""
    folder = prepare()
    for part in ("work", "data"):
        shutil.copytree(finished / part, folder / part)
    before = results(folder)
    names = [f"work/{name}" for name in (*TABLE[stage].outputs, "manifest.json")]
    if stage == "export":
        names = [name for name in before if name.startswith("data/")]
    for name in names:
        target = folder / (name + ".tmp")
        target.symlink_to("/dev/full")
        for output in TABLE[stage].outputs:
            (folder / "work" / output).unlink()
        assert build_data(folder, "--stage", stage) == 1
        assert "the disk is full" in (folder / "log.txt").read_text().splitlines()[-1]
        assert not target.is_symlink()
        assert build_data(folder) == 0
        assert results(folder) == before


def test_documents_take_stages_of_their_own(prepare, monkeypatch, tmp_path):
    """By `input_format`, or by what the folder holds; a README beside rows makes no documents of them."""
    monkeypatch.chdir(prepare())
    made = load_recipe("recipe.yaml")
    assert list(stages_of(made)) == STAGES == ["read", "contexts", "sample", "judge", "select", "export"]
    documents = (*FROM_DOCUMENTS, *STAGES[1:])
    assert stages_of(replace(made, input_format="documents")) == documents
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "README.md").write_text("about the rows")
    by_itself = replace(made, input=str(folder))
    assert list(stages_of(by_itself)) == STAGES
    (folder / "deep" / "a.txt").write_text("a document")
    assert stages_of(by_itself) == documents and list(stages_of(replace(by_itself, input_format="plain"))) == STAGES
    with pytest.raises(DataError, match="`--stage` must be one of documents, ask, filter, contexts, .*; got 'read'"):
        run_pipeline(by_itself, "read")
    before = outside_inputs(by_itself, "documents")
    (folder / "deep" / "a.txt").write_text("another one")
    assert outside_inputs(by_itself, "documents") != before
    (folder / "deep" / "more.jsonl").write_text('{"text": "a third", "title": "Third", "id": 3}')
    assert stages_of(by_itself) == documents
    (tmp_path / "table.csv").write_text("a,b")
    (folder / "table.csv").symlink_to(tmp_path / "table.csv")
    assert stages_of(by_itself) == documents
    (folder / "deep" / "rows.jsonl").write_text("{}")
    assert list(stages_of(by_itself)) == STAGES


@pytest.mark.parametrize("row", ['{"question": "Who?", "text": "x"}', '{"name": "Ada"}'])
def test_a_folder_of_documents_and_rows_says_how_to_take_it(row, prepare, monkeypatch, tmp_path):
    monkeypatch.chdir(prepare())
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.md").write_text("a document")
    (tmp_path / "in" / "rows.jsonl").write_text(row)
    made = replace(load_recipe("recipe.yaml"), input=str(tmp_path / "in"), corpus=None)
    said = r"cannot be told .* `input` holds documents, too, such as a.md; .* `input_format: documents`\.$"
    with pytest.raises(DataError, match=said):
        run_pipeline(made, "read")
    with pytest.raises(DataError, match="Correct the line, or set `skip_bad: true`.$"):
        run_pipeline(replace(made, input_format="plain"), "read")


@pytest.mark.parametrize("names", [[], ["a.png", "b.jpg"], ["README.md"]])
def test_a_folder_of_neither_documents_nor_rows_says_so(names, prepare, monkeypatch, tmp_path):
    monkeypatch.chdir(prepare())
    (tmp_path / "in").mkdir()
    for name in names:
        (tmp_path / "in" / name).write_bytes(b"\x89PNG")
    made = replace(load_recipe("recipe.yaml"), input=str(tmp_path / "in"), corpus=None)
    with pytest.raises(DataError, match=r"^`input: .*in` holds neither rows \(.*\) nor documents \(\.md.*\), a"):
        run_pipeline(made, "read")


def test_a_file_of_documents_says_how_to_take_it(prepare, monkeypatch, tmp_path):
    monkeypatch.chdir(prepare())
    (tmp_path / "a.jsonl").write_text('{"text": "A document."}')
    with pytest.raises(DataError, match="if each row is a document .*, set `input_format: documents`"):
        run_pipeline(replace(load_recipe("recipe.yaml"), input=str(tmp_path / "a.jsonl"), corpus=None), "read")


def test_the_scripted_server_is_what_it_says(server):
    """Its share of right answers, over many draws: the tests above stand on it."""
    question = next(iter(server.answers))
    draws = [scripted(question, seed, 0, server.answers, RIGHT, 0.0, UNMARKED) for seed in range(4000)]
    assert abs(sum(right for _, right in draws) / 4000 - RIGHT * (1 - UNMARKED)) < 0.04
