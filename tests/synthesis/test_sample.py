"""The sample stage: complete and without doubles however often it is stopped, and equal to an uninterrupted run."""

import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import ROOT
from scripted_server import free_port, scripted, serving, watched

from solopo_plugin.qa.files import DataError, read_jsonl, write_jsonl
from solopo_plugin.qa.generate import BACKENDS, servers
from solopo_plugin.qa.generate.calls import Call, call_seed
from solopo_plugin.qa.provenance import file_hash, folder_hash
from solopo_plugin.qa.store import STORE
from solopo_plugin.synthesis import recipe as data_recipe
from solopo_plugin.synthesis import sample
from solopo_plugin.synthesis.recipe import make_recipe

pytestmark = pytest.mark.timeout(120)
ANSWERS = {f"Where does person {i} work?": f"Town {i}" for i in range(30)}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(servers, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(servers, "LONGEST_PAUSE", 0.2)


@pytest.fixture
def work(tmp_path):
    """A work folder with contexts and, beside it, the server's answers."""
    folder = tmp_path / "work"
    write_jsonl(folder / "contexts.jsonl", (context(i) for i in range(len(ANSWERS))))
    (tmp_path / "answers.json").write_text(json.dumps(ANSWERS))
    return folder


def context(i: int) -> dict:
    question = list(ANSWERS)[i]

    def side(text):
        prompt = f"{text} documents.\n\n{question}"
        return {"prompt": prompt, "tokens": len(prompt.split()), "paragraphs": 1, "evidence": [], "dropped": []}

    fields = {"id": f"q{i}", "question": question, "answers": [ANSWERS[question]], "hops": 2}
    return fields | {"short": side("Few"), "long": side("Very many more")}


def recipe_for(urls: str, **keys):
    base = dict(model_name_or_path="none", template="qwen", input="-", dataset_name="d", work_dir="-")
    return make_recipe(base | dict(backend="openai", server_urls=urls, num_samples=6, seed=3) | keys)


def expected(recipe, side: str, **script) -> list[dict]:
    rows = []
    for i in range(len(ANSWERS)):
        call = Call(f"q{i}", tuple(range(6)), context(i)[side]["prompt"])
        texts = [scripted(call.prompt, call_seed(recipe.seed, call), k, ANSWERS, **script)[0] for k in range(6)]
        rows += [{"id": call.id, "k": k, "text": text, "finish_reason": "stop"} for k, text in enumerate(texts)]
    return rows


def final(work: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in work.glob("samples.*.jsonl")}


def test_both_sides_in_order_with_counts(work):
    with serving(work.parent / "answers.json", empty=0.2) as server:
        recipe = recipe_for(server.url)
        counts = sample.run(recipe, work)
    for side in ("short", "long"):
        rows = list(read_jsonl(work / f"samples.{side}.jsonl"))
        assert rows == expected(recipe, side, empty=0.2)
        empty = sum(row["text"] == "" for row in rows)
        assert 10 < empty < 60
        assert counts[side] == {
            "prompts": 30, "answers": 180, "empty": empty, "cut_at_max_new_tokens": 0, "prompt_tokens_differ": 0
        }  # fmt: skip
    assert not list(work.glob(f"{STORE}-*"))  # all is in the one file


def test_a_cutoff_behind_which_no_answer_fits_is_refused_before_a_call(work):
    """The long prompts have 9 tokens; no server is there."""
    with pytest.raises(DataError, match="`cutoff_len: 9` leaves no answer room .* 9 to 9 tokens; raise it to 1033,"):
        sample.run(recipe_for("http://127.0.0.1:1/v1", cutoff_len=9, retries=0), work)
    with serving(work.parent / "answers.json") as server:
        assert sample.run(recipe_for(server.url, cutoff_len=10), work)["short"]["prompts"] == 30


def test_without_the_long_side_its_file_is_empty(work):
    with serving(work.parent / "answers.json") as server:
        assert list(sample.run(recipe_for(server.url, sample_long=False), work)) == ["short"]
    assert (work / "samples.long.jsonl").read_bytes() == b""


def test_a_finished_side_is_not_sampled_again_and_a_changed_one_is(work, tmp_path):
    log = tmp_path / "log"
    with serving(work.parent / "answers.json", log=log) as server:
        recipe = recipe_for(server.url, sample_long=False)
        counts = sample.run(recipe, work)
        before = final(work)
        n = len(log.read_text().splitlines())
        assert sample.run(recipe, work) == counts and final(work) == before
        assert len(log.read_text().splitlines()) == n == 30
        both = sample.run(recipe_for(server.url, concurrency=3, retries=1), work)  # no setting that answers depend on
        assert both["short"] == counts["short"] and len(log.read_text().splitlines()) == 60
        rows = [context(i) for i in range(len(ANSWERS))]
        rows[3]["long"]["prompt"] = "Other " + rows[3]["long"]["prompt"]
        write_jsonl(work / "contexts.jsonl", rows)
        sample.run(recipe_for(server.url), work)
        assert len(log.read_text().splitlines()) == 61  # the one prompt that is another
        assert final(work)["samples.short.jsonl"] == before["samples.short.jsonl"]
        sample.run(recipe_for(server.url, temperature=0.5), work)
        assert len(log.read_text().splitlines()) == 121
        warm = final(work)
        (work / "samples.short.jsonl").write_text("damaged")
        sample.run(recipe_for(server.url, temperature=0.5), work)
        assert final(work) == warm
        sample.run(recipe_for(server.url), work)  # back as it was
        assert final(work)["samples.short.jsonl"] == before["samples.short.jsonl"]
        assert len(log.read_text().splitlines()) == 121


@pytest.mark.slow
def test_server_killed_and_restarted_mid_run_twice(work):
    """Slow, malformed, empty, 429 and 5xx on top: the run ends complete, no doubles, no holes."""
    faults = dict(busy=0.2, broken=0.2, malformed=0.2, slow=0.01, retry_after=0.05, empty=0.1)
    port = free_port()
    command = [sys.executable, __file__, f"http://127.0.0.1:{port}/v1", str(work)]
    with serving(work.parent / "answers.json", port, die_after=25, **faults) as server:
        process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
        server.process.wait(60)
    with serving(work.parent / "answers.json", port, die_after=30, **faults) as server:
        server.process.wait(60)
    with serving(work.parent / "answers.json", port, **faults):
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    for side in ("short", "long"):
        assert list(read_jsonl(work / f"samples.{side}.jsonl")) == expected(recipe_for("-"), side, empty=0.1)


def environment() -> dict:
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}


@pytest.mark.parametrize("max_n", [1 << 30, 1], ids=["n is honoured", "n is ignored"])
@pytest.mark.slow
def test_killed_at_random_points_is_uninterrupted_byte_for_byte(work, tmp_path, max_n):
    """Each of five servers answers 11 of the 60 requests, so that no run has ended before it is killed."""
    rng, lengths, port = random.Random(max_n), [], free_port()
    answers = work.parent / "answers.json"
    command = [sys.executable, __file__, f"http://127.0.0.1:{port}/v1", str(work)]
    for _ in range(5):
        with serving(answers, port, slow=0.02, max_n=max_n, hold_after=11):
            process = subprocess.Popen(command, env=environment(), stderr=-3)
            deadline, wanted = time.time() + 60, sum(lengths[-1:]) + rng.randrange(1, 12)
            while lines(work) < wanted and process.poll() is None and time.time() < deadline:
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            lengths.append(lines(work))
            assert lengths[-1] >= wanted
    with serving(answers, port, max_n=max_n) as server:
        sample.run(recipe_for(server.url), work)
        sample.run(recipe_for(server.url), tmp_path_with_contexts(work, tmp_path / "whole"))
    assert len(lengths) == 5 and lengths == sorted(lengths)
    assert final(work) == final(tmp_path / "whole")


def tmp_path_with_contexts(work: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder / "contexts.jsonl").write_bytes((work / "contexts.jsonl").read_bytes())
    return folder


def lines(work: Path) -> int:
    """Answers on disk: in a copy of the store's files as they lie, since the run has the store for itself."""
    with tempfile.TemporaryDirectory() as folder, suppress(FileNotFoundError, sqlite3.Error):
        for path in work.glob(f"{STORE}*"):
            shutil.copy(path, folder)
        with closing(sqlite3.connect(f"file:{folder}/{STORE}?mode=rw", uri=True)) as copy:
            return copy.execute("SELECT count(*) FROM answers").fetchone()[0]
    return 0


def test_answers_are_on_disk_when_they_arrive(work):
    """A server that answers four requests and no more: while the run waits for the others, those are in the file."""
    with serving(work.parent / "answers.json", hold_after=4) as server:
        process = subprocess.Popen(
            [sys.executable, __file__, server.url, str(work), "concurrency=2"], env=environment(), stderr=-3
        )
        deadline = time.time() + 60
        while lines(work) < 4 * 6 and process.poll() is None and time.time() < deadline:
            time.sleep(0.005)
        assert lines(work) == 4 * 6 and process.poll() is None
        process.kill()
        process.wait()


def key_before(recipe, work: Path, side: str) -> str:
    """By what a version without a store knew the answers to all prompts of a side."""
    digest = hashlib.sha256(json.dumps(sample.depends_on(recipe), sort_keys=True).encode())
    for row in read_jsonl(work / "contexts.jsonl"):
        digest.update(json.dumps([row["id"], row[side]["prompt"]], ensure_ascii=False).encode())
    return digest.hexdigest()


def test_what_a_version_without_a_store_has_finished_is_kept(work, tmp_path):
    log = tmp_path / "log"
    with serving(work.parent / "answers.json", log=log) as server:
        recipe = recipe_for(server.url)
        counts = sample.run(recipe, work)
        before, key = final(work), key_before(recipe, work, "short")
        (work / STORE).unlink()
        done = work / "samples.short.done.json"
        done.write_text(json.dumps({"fingerprint": key, "hash": file_hash(work / "samples.short.jsonl")}))
        log.unlink()
        assert sample.run(recipe, work) == counts and final(work) == before and not done.exists()
        assert len(log.read_text().splitlines()) == 30  # the long side


def test_a_torn_line_and_answers_to_other_prompts(work, tmp_path, caplog):
    with serving(work.parent / "answers.json") as server:
        recipe = recipe_for(server.url)
        sample.run(recipe, tmp_path_with_contexts(work, tmp_path / "whole"))
        key = key_before(recipe, work, "short")
        partial = work / "samples.short.partial.jsonl"
        first = {"id": "q4", "ks": [0, 1, 2, 3, 4, 5], "answers": [["kept", "stop"]] * 6, "prompt_tokens": None}
        written = json.dumps({"fingerprint": key}) + "\n" + json.dumps(first) + "\n"
        partial.write_text(written + '{"id": "q5", "ks": [0, 1, 2')
        sample.run(recipe, work)
        rows = list(read_jsonl(work / "samples.short.jsonl"))
        assert [row["text"] for row in rows if row["id"] == "q4"] == ["kept"] * 6
        whole = list(read_jsonl(tmp_path / "whole" / "samples.short.jsonl"))
        assert [r for r in rows if r["id"] != "q4"] == [r for r in whole if r["id"] != "q4"]
        (work / STORE).unlink()
        partial.write_text(written.replace(key, "0" * 64))
        sample.run(recipe, work)
        assert "answers to other prompts or settings; sampling begins anew" in caplog.text
        assert final(work) == final(tmp_path / "whole") and not partial.exists()


def test_of_a_call_that_came_back_in_part_only_the_rest_is_asked_for(work, tmp_path):
    log = tmp_path / "log"
    with serving(work.parent / "answers.json", log=log) as server:
        recipe = recipe_for(server.url, sample_long=False)
        key = key_before(recipe, work, "short")
        part = {"id": "q4", "ks": [0, 2], "answers": [["kept", "stop"]] * 2, "prompt_tokens": None}
        partial = work / "samples.short.partial.jsonl"
        partial.write_text(json.dumps({"fingerprint": key}) + "\n" + json.dumps(part) + "\n")
        sample.run(recipe, work)
    sent = [json.loads(line)["n"] for line in log.read_text().splitlines()]
    assert sorted(sent) == [1] * 4 + [6] * 29
    texts = [row["text"] for row in read_jsonl(work / "samples.short.jsonl") if row["id"] == "q4"]
    prompt = context(4)["short"]["prompt"]
    alone = {k: scripted(prompt, call_seed(recipe.seed, Call("q4", (k,), prompt)), 0, ANSWERS)[0] for k in (1, 3, 4, 5)}
    assert texts == [alone.get(k, "kept") for k in range(6)]


def test_a_hole_is_never_silent(work, monkeypatch):
    """A backend that loses an answer: the stage says so, and the next run asks for it."""
    original = BACKENDS["openai"]
    lossy = lambda *given: (r for r in original(*given) if r.id != "q7")  # noqa: E731
    with serving(work.parent / "answers.json") as server:
        recipe = recipe_for(server.url)
        monkeypatch.setitem(BACKENDS, "openai", lossy)
        with pytest.raises(DataError, match="question q7 lacks 6 answers; start the stage again"):
            sample.run(recipe, work)
        assert not (work / "samples.short.jsonl").exists()
        monkeypatch.setitem(BACKENDS, "openai", original)
        sample.run(recipe, work)
    assert list(read_jsonl(work / "samples.short.jsonl")) == expected(recipe, "short")


def test_a_failure_here_ends_what_is_under_way_there(work, monkeypatch):
    """Stop the asking at once where an answer cannot be stored, not when the backend's generator is collected."""
    ended = []
    monkeypatch.setitem(BACKENDS, "openai", watched(BACKENDS["openai"], ended))
    with serving(work.parent / "answers.json") as server, monkeypatch.context() as patched:
        patched.setattr(sample.Store, "add", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError) as kept:  # its traceback keeps the generator
            sample.run(recipe_for(server.url), work)
        assert ended == [True] and kept


def test_another_chat_template_at_the_server_is_noticed(work, caplog):
    with serving(work.parent / "answers.json", prompt_tokens=99) as server:
        counts = sample.run(recipe_for(server.url, sample_long=False), work)
    said = caplog.text
    assert said.count("its chat template is another one; use `openai_endpoint: completions`") == 1
    assert "counts 99 prompt tokens" in said and counts["short"]["prompt_tokens_differ"] == 30


def test_a_recipe_asks_in_parts(work, tmp_path):
    """`answers_per_call: 4` of 6: two calls for a prompt, each with its own seed."""
    log = tmp_path / "log"
    with serving(work.parent / "answers.json", log=log) as server:
        recipe = recipe_for(server.url, answers_per_call=4, sample_long=False)
        sample.run(recipe, work)
    sent = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(event["n"] for event in sent) == [2] * 30 + [4] * 30 and len({e["seed"] for e in sent}) == 60


def test_answers_of_two_models_behind_one_address_do_not_mix(work, tmp_path, caplog):
    """Neither in a side, nor in both, nor through answers that are kept; an old folder knows no name and goes on."""

    def run(model, folder=work, **keys):
        with serving(work.parent / "answers.json", model=model, right=0.0 if model == "b" else 0.5) as server:
            return sample.run(recipe_for(server.url, **keys), folder)

    run("a", sample_long=False)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    told = "The server's only model is a, not none: it is asked; if another one is meant, stop and serve that, or name"
    assert [text.startswith(told) for text in warnings] == [True]
    before, old = final(work), shutil.copytree(work, tmp_path / "old")
    for keys in ({}, {"num_samples": 8, "answers_per_call": 6}):
        with pytest.raises(DataError) as error:
            run("b", **keys)
        assert str(error.value) == (
            f"{work / STORE}: the answers so far are those of the server's model a, and it now has b; serve a again, "
            "or set `served_model: b`, with which all answers are asked for anew."
        )
    with pytest.raises(DataError, match="are those of the server's model a, and it now has none; serve a again"):
        run("none")
    run("a")
    assert final(work)["samples.short.jsonl"] == before["samples.short.jsonl"]
    run("b", served_model="b")
    assert final(work)["samples.short.jsonl"] != before["samples.short.jsonl"]
    with closing(sqlite3.connect(old / STORE)) as store, store:
        store.execute("DROP TABLE served")
    run("b", old)


MORE = {  # (num_samples, answers_per_call) before and after -> answers of each further call for a prompt
    ((4, 2), (8, 2)): [2, 2],
    ((4, None), (8, 4)): [4],
    ((5, 2), (8, 2)): [2, 2],  # the fifth came from a call of its own
    ((8, 2), (6, 2)): [],
    ((6, 8), (6, 6)): [],
    ((4, None), (8, None)): [8],  # a call for eight answers is not one for four and one for four more
    ((4, 2), (8, 4)): [4, 4],
    ((4, 8), (8, 8)): [8],
}


@pytest.mark.parametrize("before, after", MORE)
def test_another_number_of_answers_keeps_those_of_the_same_calls(work, tmp_path, before, after):
    """Each answer is what it would have been if so many had been asked for at once."""
    log, fresh = tmp_path / "log", tmp_path / "fresh"
    shutil.copytree(work, fresh)

    def run(folder, numbers, **keys):
        n, size = numbers
        recipe = recipe_for(server.url, num_samples=n, answers_per_call=size, sample_long=False, **keys)
        asked = len(log.read_text().splitlines()) if log.exists() else 0
        sample.run(recipe, folder)
        return [json.loads(line)["n"] for line in log.read_text().splitlines()[asked:]]

    with serving(work.parent / "answers.json", log=log) as server:
        run(work, before)
        assert sorted(run(work, after)) == sorted(MORE[before, after] * len(ANSWERS))
        run(fresh, after)
        assert final(work) == final(fresh)
        assert run(work, after) == run(work, before) == []
        assert sum(run(work, after, temperature=0.5)) == after[0] * len(ANSWERS)  # other answers


def test_answers_of_a_model_whose_hash_an_earlier_version_took_are_kept(work, tmp_path, monkeypatch):
    """Keep answers where its files are as they were; other weights are asked."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(17 << 20))
    log = tmp_path / "log"

    def run() -> int:
        asked = len(log.read_text().splitlines()) if log.exists() else 0
        sample.run(recipe_for(server.url, model_name_or_path=str(tmp_path / "model"), sample_long=False), work)
        return len(log.read_text().splitlines()) - asked

    with serving(work.parent / "answers.json", log=log) as server:
        with monkeypatch.context() as patch:
            patch.setattr(data_recipe, "model_hash", folder_hash)
            assert run() == len(ANSWERS)
            kept = final(work)
        assert run() == 0 and final(work) == kept
        (tmp_path / "model" / "config.json").write_text("{}")
        assert run() == len(ANSWERS)


if __name__ == "__main__":  # one run of the stage in a process of its own: url, work folder, key=value
    keys = {key: int(value) for key, value in (word.split("=") for word in sys.argv[3:])}
    given = {key: value for key, value in asdict(recipe_for(sys.argv[1])).items() if value is not None}
    servers.FIRST_PAUSE, servers.LONGEST_PAUSE = 0.02, 0.2
    sample.run(make_recipe(given | {"retries": 60} | keys), Path(sys.argv[2]))
