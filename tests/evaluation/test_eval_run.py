"""Questions are made once, answers asked for once, over-long prompts lose their middle, and a kill loses nothing."""

import importlib.util
import json
import logging
import random
import re
import shutil
import sqlite3
import sys
from argparse import Namespace
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType

import evaluate
import pytest
import toy
import yaml
from ask_toy import N_QUESTIONS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from material import save_tokenizer
from scripted_server import serving, watched
from toy import answers, answers_for, recipe_in, weights

from solopo_plugin.evaluation import ask, prepare, run
from solopo_plugin.evaluation.ask import cut_middle
from solopo_plugin.evaluation.harness import settings_of
from solopo_plugin.evaluation.items import Item, read_items
from solopo_plugin.evaluation.models import find_models
from solopo_plugin.evaluation.prepare import prepare_items
from solopo_plugin.evaluation.report.tables import notes_of
from solopo_plugin.evaluation.results import load_scores
from solopo_plugin.evaluation.run import answer_all, check_asked_so
from solopo_plugin.evaluation.score import write_scores
from solopo_plugin.host.template import encode_prompt
from solopo_plugin.qa.files import DataError, read_jsonl, write_json
from solopo_plugin.qa.generate.calls import load_chat
from solopo_plugin.qa.provenance import file_hash
from solopo_plugin.qa.store import STORE, Store

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def model(tokenizer, tmp_path):
    """A folder that has a tokenizer and passes for a model; the answers come from a server."""
    folder = tmp_path / "model"
    shutil.copytree(tokenizer, folder)
    (folder / "model.safetensors").write_bytes(weights("first"))
    return str(folder)


@pytest.fixture
def benchmarks(monkeypatch):
    """What stands for the benchmarks: a dict to be filled."""
    module = ModuleType("solopo_plugin.evaluation.benchmarks")
    module.BENCHMARKS = {"plain": toy.benchmark()}
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.BENCHMARKS


# ---- questions


def made(recipe, **keys) -> list:
    """Keys of the questions, made if need be."""
    prepare_items(recipe, find_models(recipe)[0], **keys)
    return [item.key for item in read_items(Path(recipe.output_dir) / "items.jsonl")]


def test_questions_are_made_once_and_again_when_something_changes(benchmarks, model, tmp_path):
    plain = benchmarks["plain"]
    recipe = recipe_in(tmp_path, [model])
    first = made(recipe)
    assert first == [("plain", f"part{i % 2}", f"q{i}") for i in range(20)] and made(recipe) == first
    assert plain.made == 1
    for why, change in {
        "a key of all": dict(prompt="{documents} {question}"), "one of its own": dict(plain_data=model + "/config.json")
    }.items():  # fmt: skip
        before = plain.made
        made(recipe_in(tmp_path, [model], **change))
        made(recipe_in(tmp_path, [model], **change, concurrency=3, max_new_tokens=4, niah_questions=7))
        assert plain.made == before + 1, why
    made(recipe)
    (tmp_path / "plain.jsonl").write_text("other questions")
    before = plain.made
    assert made(recipe) == first and plain.made == before + 1
    items = tmp_path / "out" / "items.jsonl"
    items.write_bytes(items.read_bytes()[:-9])
    assert made(recipe) == first and plain.made == before + 2
    assert made(recipe, resume=False) == first and plain.made == before + 3


def test_a_stretched_window_is_not_reported_of_a_server(tmp_path, caplog):
    recipe = recipe_in(tmp_path, ["m"], rope_factor=4.0)
    assert run.public_settings(recipe)["rope_factor"] == 4.0 and not caplog.text
    recipe.backend = "openai"
    assert run.public_settings(recipe)["rope_factor"] == "the server's own"
    assert "`rope_factor: 4` is not used: a server is started with its own." in caplog.text


def test_what_changes_answers_is_reported_and_addresses_are_not(tmp_path):
    keys = dict(backend="openai", server_urls="http://a/v1", extra_body={"repetition_penalty": 1.2})
    shown = run.public_settings(recipe_in(tmp_path, ["m"], **keys))
    assert shown["extra_body"] == {"repetition_penalty": 1.2} and not shown.keys() & {"server_urls", "api_key_env"}


def test_a_further_benchmark_leaves_the_others_as_they_are(benchmarks, model, tmp_path):
    benchmarks["validation"] = toy.benchmark(5, benchmark="validation")
    one = recipe_in(tmp_path, [model])
    both = recipe_in(
        tmp_path, [model], benchmarks=["validation", "plain"], validation_data=str(tmp_path / "plain.jsonl")
    )
    made(one)
    alone = (tmp_path / "out" / "items.jsonl").read_bytes()
    assert [key[0] for key in made(both)] == ["validation"] * 5 + ["plain"] * 20
    assert (tmp_path / "out" / "items.jsonl").read_bytes().endswith(alone)
    assert (benchmarks["plain"].made, benchmarks["validation"].made) == (1, 1)
    made(one)
    assert (tmp_path / "out" / "items.jsonl").read_bytes() == alone and benchmarks["plain"].made == 1


def test_kept_benchmarks_are_read_once_in_any_order(benchmarks, model, tmp_path, monkeypatch):
    """Three are kept and one is added: each line of items.jsonl is parsed once, and stays as it is."""
    sizes = {"plain": 20, "validation": 5, "longbench_v2": 3, "longbench_qa": 4}
    for name, n in sizes.items():
        benchmarks[name] = toy.benchmark(n, benchmark=name)
    keys = dict(validation_data=str(tmp_path / "plain.jsonl"), longbench_data=str(tmp_path), max_input_tokens=100)
    order = ["validation", "longbench_v2", "plain"]
    made(recipe_in(tmp_path, [model], benchmarks=order, **keys))
    path, lines = tmp_path / "out" / "items.jsonl", {}
    for line in path.read_bytes().splitlines(keepends=True):
        lines.setdefault(json.loads(line)["benchmark"], []).append(line)
    parsed = []
    monkeypatch.setattr(prepare, "Item", lambda **row: parsed.append(row["id"]) or Item(**row))
    order = ["plain", "longbench_qa", "validation", "longbench_v2"]
    found = made(recipe_in(tmp_path, [model], benchmarks=order, **keys))
    assert [name for name, *_ in found] == [name for name in order for _ in range(sizes[name])]
    assert len(parsed) == 20 + 5 + 3
    new = path.read_bytes().splitlines(keepends=True)[20:24]
    assert path.read_bytes() == b"".join([*lines["plain"], *new, *lines["validation"], *lines["longbench_v2"]])


def test_questions_that_cannot_be(benchmarks, model, tmp_path):
    recipe = recipe_in(tmp_path, [model])
    benchmarks["plain"] = lambda *_: iter([toy.item(1), toy.item(2), toy.item(1, words=3)])
    with pytest.raises(DataError, match="`plain` has the question 'q1' of part1 twice; ids must differ."):
        made(recipe)
    benchmarks["plain"] = lambda *_: iter(())
    with pytest.raises(DataError, match="`plain` has no question; check its files and the keys"):
        made(recipe)
    assert not (tmp_path / "out" / "items.jsonl").exists()


# ---- cutting


@pytest.fixture(scope="module")
def chat(tokenizer, tmp_path_factory):
    """Tokenizer and the ids of a message's templated prompt."""
    recipe = recipe_in(tmp_path_factory.mktemp("chat"), [tokenizer], model_name_or_path=tokenizer)
    loaded, template = load_chat(tokenizer, recipe)
    return loaded, lambda text: encode_prompt(loaded, template, text)


def split(whole: str, text: str) -> tuple[int, int]:
    """How many characters of `text` begin `whole`, and how many of the rest end it."""
    head = next((i for i, (a, b) in enumerate(zip(whole, text, strict=False)) if a != b), len(text))
    rest = text[head:]
    return head, len(rest) if whole.endswith(rest) else -1


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("ab é漢🙂\n ")), max_size=400),
    room=st.integers(2, 300),
)
def test_the_middle_is_cut_and_both_ends_are_kept(chat, text, room):
    tokenizer, encode = chat
    if tokenizer.decode(tokenizer.encode(text)) != text or "\ufffd" in text:  # special tokens are not kept as text
        return
    limit = len(encode("")) + room
    whole = len(encode(text))
    try:
        cut, tokens, gone = cut_middle(text, limit, tokenizer, encode)
    except DataError:
        assert room < 30  # a single character of some scripts needs a few tokens
        return
    assert tokens == len(encode(cut)) <= limit and gone == whole - tokens
    if whole <= limit:
        assert (cut, gone) == (text, 0)
        return
    head, tail = split(text, cut)
    assert gone > 0 and tail >= 0 and head + tail == len(cut)
    assert limit - tokens <= 12  # half a character at either side of the cut, and what a round takes away too much


def test_the_halves_are_equal_in_tokens(chat):
    tokenizer, encode = chat
    words = [f"w{i}" for i in range(3000)]
    text = " ".join(words)
    cut, tokens, gone = cut_middle(text, 1000, tokenizer, encode)
    head, tail = split(text, cut)
    count = lambda part: len(tokenizer.encode(part, add_special_tokens=False))  # noqa: E731
    assert abs(count(cut[:head]) - count(cut[head:])) <= 2 and 998 <= tokens <= 1000
    assert cut.startswith("w0 w1 w2 ") and cut.endswith(" w2998 w2999") and gone == len(encode(text)) - tokens
    with pytest.raises(DataError, match="`max_input_tokens: 5` leaves no room for a question beside the template"):
        cut_middle(text, 5, tokenizer, encode)


def test_what_is_kept_of_a_cut_message_is_its_own_words(chat, monkeypatch):
    """Also where the tokenizer, as Llama 3's, takes blanks out of what it decodes."""
    tokenizer, encode = chat
    monkeypatch.setattr(tokenizer, "clean_up_tokenization_spaces", True)
    text = "\n".join(f"{i} . The Children 's Museum , in St . Louis , is n't open ; see 3 . 5 ." for i in range(60))
    cut, tokens, _ = cut_middle(text, 400, tokenizer, encode)
    head, tail = split(text, cut)
    assert head + tail == len(cut) and 398 <= tokens <= 400


# ---- answers


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with serving(answers_for(folder / "answers.json", N_QUESTIONS), log=folder / "log") as running:
        running.log = folder / "log"
        yield running


def asked(server) -> list[dict]:
    """Requests since the last look."""
    lines = server.log.read_text().splitlines() if server.log.exists() else []
    server.log.unlink(missing_ok=True)
    return [json.loads(line) for line in lines]


def served(folder, model, server, **keys):
    return recipe_in(folder, model, backend="openai", server_urls=server.url, **keys)


def test_what_a_server_did_with_a_prompt_is_kept_counted_and_told(benchmarks, model, tmp_path, caplog):
    """Tell another template's count from one so small that the prompt was cut; say nothing of other answers."""
    benchmarks["plain"] = lambda *_: (toy.item(i, words=40 if i < 3 else 900) for i in range(5))
    with serving(answers_for(tmp_path / "answers.json", 5), prompt_tokens=7) as server:
        recipe = served(tmp_path, [model], server, openai_endpoint="chat", served_model="scripted")
        answer_all(recipe, find_models(recipe))
    said = caplog.text
    assert said.count("its chat template is another one; use `openai_endpoint: completions`") == 1
    assert said.count("it cuts prompts, or has another tokenizer; give it a longer window, or ask shorter") == 1
    folder = tmp_path / "out"
    assert {row["server_tokens"] for row in answers(folder, "model")} == {7}
    write_scores(folder, ["model"])
    counts = load_scores(folder / "scores" / "model.jsonl", 5)[1]
    assert (counts["prompt_tokens_differ"], counts["cut_by_server"]) == (5, 2)
    assert "of 5 answered prompts a server counted other tokens than training has, of 2 far fewer" in caplog.text
    notes = notes_of("plain", {"model": list(read_jsonl(folder / "scores" / "model.jsonl"))})
    assert "Prompts of which the server counted other tokens than training has: model 5 of 5." in notes
    assert "Prompts of which it counted far fewer, as where it cuts them: model 2 of 5." in notes


def test_long_prompts_are_cut_counted_and_told(benchmarks, model, server, tmp_path, caplog):
    benchmarks["plain"] = lambda *_: (toy.item(i, words=40 if i < 5 else 400) for i in range(12))
    recipe = served(tmp_path, [model], server, max_input_tokens=250)
    answer_all(recipe, find_models(recipe))
    rows = {row["id"]: row for row in answers(tmp_path / "out", "model")}
    items = {item.id: item for item in read_items(Path(recipe.output_dir) / "items.jsonl")}
    assert len(rows) == 12 and "model: plain: 12 answers; 7 prompts were longer than 250 tokens" in caplog.text
    tokenizer, template = load_chat(model, recipe_in(tmp_path, [model]))
    for i in range(12):
        row, item = rows[f"q{i}"], items[f"q{i}"]
        whole = len(encode_prompt(tokenizer, template, item.prompt))
        assert row["prompt_tokens"] + row["cut_tokens"] == whole and row["prompt_hash"] == item.prompt_hash
        assert (row["cut_tokens"] > 0) == (i >= 5) and row["prompt_tokens"] <= 250
        assert set(row) == {
            "benchmark", "task", "id", "prompt_hash", "prompt_tokens", "cut_tokens", "text", "finish_reason",
            "server_tokens",
        }  # fmt: skip
    benchmarks["plain"] = lambda *_: (toy.item(i, words=40 if i < 5 else 400) for i in range(7))
    (tmp_path / "plain.jsonl").write_text("five fewer")
    answer_all(recipe, find_models(recipe))
    assert "model: plain: 7 answers; 2 prompts were longer than 250 tokens" in caplog.text


def test_what_is_answered_is_not_asked_again(benchmarks, model, server, tmp_path, caplog):
    recipe = served(tmp_path, [model], server)
    file, store = tmp_path / "out" / "answers" / "model.jsonl", tmp_path / "out" / STORE
    asked(server)

    def again(expected: int, recipe=recipe, **keys) -> str:
        caplog.clear()
        answer_all(recipe, find_models(recipe), **keys)
        assert len(asked(server)) == expected
        assert len({row["id"] for row in answers(tmp_path / "out", "model")}) >= 20
        return caplog.text

    again(20)
    whole = file.read_bytes()
    again(0)
    file.unlink()
    again(0)
    assert file.read_bytes() == whole
    store.unlink()  # as a version without a store left it
    file.write_bytes(b"".join(whole.splitlines(True)[:8]) + b'{"benchmark": "plain", "ta')  # killed while writing
    again(13)
    assert sorted(file.read_bytes().splitlines()) == sorted(whole.splitlines())
    store.unlink()
    file.write_bytes(whole + whole.splitlines(True)[3])  # a line twice
    again(0)
    assert file.read_bytes() == whole

    benchmarks["plain"] = toy.benchmark(22, words=12)
    (tmp_path / "plain.jsonl").write_text("two more")
    again(2)
    benchmarks["plain"] = lambda *_: (toy.item(i, words=13 if i == 4 else 12) for i in range(20))
    (tmp_path / "plain.jsonl").write_text("one other prompt, two fewer")
    assert "1 answers to questions that have changed since are dropped" in again(1)
    assert len(answers(tmp_path / "out", "model")) == 22  # the two are kept for when they are asked again

    before = file.read_bytes()
    other = served(tmp_path, [model], server, max_new_tokens=9, served_model="scripted")
    said = again(20, other)
    assert "asked anew, because `max_new_tokens` was 8 and is 9, `served_model` was None and is 'scripted'" in said
    after = file.read_bytes()
    assert len(before.splitlines()) == 23
    assert "are taken up again" not in said and "taken up again" in again(0)  # back as it was: nothing is lost
    assert file.read_bytes() == before
    assert "taken up again" in again(0, other) and file.read_bytes() == after
    store.unlink()  # as a version without a store left it
    (aside := file.with_name("model.0123456789abcdef.old")).write_bytes(before)
    assert "taken up again" in again(0) and file.read_bytes() == before and not aside.exists()
    assert "taken up again" in again(0, other) and file.read_bytes() == after
    again(0, served(tmp_path, [model], server, max_new_tokens=9, served_model="scripted", seed=1, concurrency=2))
    (tmp_path / "model" / "model.safetensors").write_bytes(weights("trained on"))
    assert "asked anew, because the files of the model have changed;" in again(20, other)
    again(20, other, resume=False)


def test_a_model_that_was_moved_is_not_asked_again(benchmarks, model, server, tmp_path, caplog):
    """Answers go by what is in the folder; a model beside it, or one with other weights, is asked for itself."""
    caplog.set_level(logging.INFO)
    folder = tmp_path / "out" / "answers"

    def asked_for(*names: str) -> int:
        asked(server)
        recipe = served(tmp_path, [str(tmp_path / name) for name in names], server, served_model="scripted")
        answer_all(recipe, find_models(recipe))
        return len(asked(server))

    assert asked_for("model") == 20
    Path(model).rename(tmp_path / "moved")
    assert asked_for("moved") == 0
    assert "moved: the same model was asked as model; its answers are taken over." in caplog.text
    assert (folder / "moved.jsonl").read_bytes() == (folder / "model.jsonl").read_bytes()
    shutil.copytree(tmp_path / "moved", tmp_path / "beside")
    (folder / "model.jsonl").write_bytes(b"damaged")
    with Store(tmp_path / "out" / STORE) as store:
        store.forget([("model", store.last_used("model")[1])])
    assert asked_for("moved", "beside") == 20
    shutil.copytree(tmp_path / "moved", tmp_path / "trained")
    (tmp_path / "trained" / "model.safetensors").write_bytes(weights("trained on"))
    assert asked_for("trained") == 20 and not list(folder.glob("*.old"))


def test_a_backend_that_is_missing_is_found_before_the_questions_are_made(benchmarks, model, server, tmp_path):
    """And not missed where everything is there already."""
    recipe = recipe_in(tmp_path, [model], backend="vllm")
    with pytest.raises(DataError, match=r"^`backend: vllm` is not installed: pip install '\.\[vllm\]', or use"):
        answer_all(recipe, find_models(recipe))
    with pytest.raises(DataError, match=r"^`backend: openai` needs `server_urls`, for example"):
        answer_all(replace(recipe, backend="openai"), find_models(recipe))
    assert benchmarks["plain"].made == 0 and not (tmp_path / "out" / "items.jsonl").exists()
    recipe = served(tmp_path, [model], server)
    answer_all(recipe, find_models(recipe))
    answer_all(replace(recipe, server_urls=None), find_models(recipe))


def test_answers_are_not_scored_again_under_other_settings(benchmarks, model, server, tmp_path):
    recipe = served(tmp_path, [model], server)
    models = find_models(recipe)
    answer_all(recipe, models)
    for keys in ({}, {"concurrency": 2, "bootstrap_samples": 7, "compare": [], "top_p": 0.5}):
        check_asked_so(served(tmp_path, [model], server, **keys), models)
    for keys, said in (
        ({"temperature": 0.7}, "`temperature` was 0.0 and is 0.7"),
        ({"max_samples": 5}, "`max_samples` was None and is 5"),
        ({"benchmarks": ["longbench_v2"]}, "`benchmarks` was ['plain'] and is ['longbench_v2']"),
    ):
        with pytest.raises(DataError) as error:
            check_asked_so(served(tmp_path, [model], server, **keys), models)
        out = tmp_path / "out"
        assert str(error.value) == f"`--rescore` keeps what {out} was asked with, but {said}; leave `--rescore` out."
    made = json.loads((out / "items.json").read_text())
    del made["benchmarks"]["plain"]["made_from"]["settings"]["max_samples"]  # as of a version that did not know the key
    write_json(out / "items.json", made)
    check_asked_so(served(tmp_path, [model], server, max_samples=5), models)


def stored(out: Path) -> tuple[list, list]:
    """Return what an evaluation has in its store and of the harness, as far as `--no-resume` forgets it."""
    with closing(sqlite3.connect(out / STORE)) as store:
        return store.execute("SELECT * FROM answers").fetchall(), sorted((out / "harness").rglob("*"))


def test_a_run_that_begins_anew_and_is_stopped_goes_on_without_earlier_answers(
    benchmarks, model, server, tmp_path, monkeypatch
):
    """Keep answers of no model, also where it was not reached or is known by another name, nor of the harness."""
    keys = dict(served_model="scripted", concurrency=1)  # so that none is under way where it is stopped
    recipe = served(tmp_path, {"first": model}, server, **keys)
    answer_all(recipe, find_models(recipe))
    (Path(shutil.copytree(model, tmp_path / "second")) / "model.safetensors").write_bytes(weights("another"))
    for name in ("former", "second"):
        recipe.models = {name: str(tmp_path / "second")}
        answer_all(recipe, find_models(recipe))
    recipe.models = {"first": model, "second": str(tmp_path / "second")}
    file = tmp_path / "out" / "answers" / "second.jsonl"
    file.with_name("second.0123456789abcdef.old").write_bytes(file.read_bytes())  # as an earlier version put it aside
    for name in ("first", "second"):
        (tmp_path / "out" / "harness" / name / "results").mkdir(parents=True)
    recipe.harness_tasks = ["t"]
    asked(server)
    original = ask.generate
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ask, "generate", lambda *given: stop_after(original(*given), 3))
        answer_all(recipe, find_models(recipe), resume=False)
    assert len(stored(tmp_path / "out")[0]) == 20 + 3 and not stored(tmp_path / "out")[1]
    asked(server)
    answer_all(recipe, find_models(recipe))
    assert len(asked(server)) == 17 + 20


@pytest.mark.parametrize(("words", "how"), [([], ""), (["--no-resume"], "without --no-resume ")])
def test_how_a_stopped_run_goes_on(words, how, monkeypatch, capsys):
    """With `--no-resume` again it would begin anew."""

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "load_recipe", stop)
    assert evaluate.main(["recipe.yaml", *words]) == 130
    assert capsys.readouterr().err == f"Stopped; the same command {how}continues.\n"


def stop_after(replies, n: int, how: type[BaseException] = KeyboardInterrupt):
    with closing(replies):
        yield from islice(replies, n)
        raise how


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"backend": "vllm"}, "`backend: vllm` is not installed"),
        ({}, "`plain` has no question; check its files"),
        ({"server_urls": "http://127.0.0.1:9", "retries": 0}, "127.0.0.1:9"),
        ({"served_model": None}, "is called first"),
        ({"model_name_or_path": "./gone"}, "No tokenizer can be loaded from `model_name_or_path: ./gone`"),
        ({"harness_args": {"tasks": "t"}}, "`harness_args` cannot set `tasks`"),
    ],
)  # fmt: skip
def test_what_cannot_begin_anew_forgets_nothing(keys, said, benchmarks, model, server, tmp_path):
    bare = shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("*token*", "vocab*", "merges*"))
    places = {"first": model, "bare": str(bare)}
    base = dict(model_name_or_path=model, served_model="scripted")
    recipe = served(tmp_path, places, server, **base)
    answer_all(recipe, find_models(recipe))
    (tmp_path / "out" / "harness" / "first" / "results").mkdir(parents=True)
    recipe.harness_tasks = ["t"]
    before = stored(tmp_path / "out")
    benchmarks["plain"] = toy.benchmark(20 if keys else 0)
    with pytest.raises(DataError, match=re.escape(said)):
        run.evaluate(replace(recipe, **keys), resume=False)
    assert stored(tmp_path / "out") == before and len(before[0]) == 40
    assert len(answers(tmp_path / "out", "first")) == len(answers(tmp_path / "out", "bare")) == 20


def test_what_is_answered_anew_forgets_the_rest(benchmarks, model, server, tmp_path, monkeypatch):
    """Also where it then fails; before its first answer it has all again."""
    places = {"first": model, "second": str(shutil.copytree(model, tmp_path / "second"))}
    recipe = served(tmp_path, places, server, served_model="scripted")
    answer_all(recipe, find_models(recipe))
    before, original = stored(tmp_path / "out"), ask.generate
    for n, left in ((0, 40), (1, 1)):
        monkeypatch.setattr(ask, "generate", lambda *given, n=n: stop_after(original(*given), n, RuntimeError))
        with pytest.raises(RuntimeError):
            answer_all(recipe, find_models(recipe), resume=False)
        assert len(stored(tmp_path / "out")[0]) == left and (n or stored(tmp_path / "out") == before)


def test_a_damaged_answer_is_a_sentence(benchmarks, model, server, tmp_path):
    recipe = served(tmp_path, [model], server)
    answer_all(recipe, find_models(recipe))
    file = tmp_path / "out" / "answers" / "model.jsonl"
    lines = file.read_bytes().splitlines(True)
    cases = (({"benchmark": "plain"}, "task", "None"), ({"benchmark": ["plain"]}, "benchmark", "['plain']"))
    for row, name, seen in cases:
        file.write_bytes(b"".join([*lines[:2], json.dumps(row).encode() + b"\n", *lines[3:]]))
        with pytest.raises(DataError) as error:
            answer_all(recipe, find_models(recipe))
        assert str(error.value).startswith(f"{file}:3: `{name}` must be a text, got {seen}; delete the line and start ")
    file.write_bytes(b"".join([*lines[:2], *lines[3:]]))  # as told
    answer_all(recipe, find_models(recipe))
    assert file.read_bytes() == b"".join(lines)
    with closing(sqlite3.connect(tmp_path / "out" / STORE)) as store, store:
        store.execute("UPDATE answers SET value = json_set(value, '$.text', 7) WHERE id = 1")
    for resume in (True, True, False):  # of the store it comes back, however often it is deleted
        answer_all(recipe, find_models(recipe), resume)
        with nullcontext() if not resume else pytest.raises(DataError, match="got 7; delete .* with `--no-resume`"):
            write_scores(tmp_path / "out", ["model"])
        file.write_bytes(b"".join(line for line in file.read_bytes().splitlines(True) if b'"text": 7' not in line))


def test_an_answer_that_never_comes_is_said(benchmarks, model, server, tmp_path, monkeypatch):
    recipe = served(tmp_path, [model], server)
    original = ask.generate
    monkeypatch.setattr(ask, "generate", lambda *given: (r for r in original(*given) if '"q7"' not in r.id))
    with pytest.raises(DataError, match="1 questions got no answer, .*q7.* start again"):
        answer_all(recipe, find_models(recipe))
    assert not (tmp_path / "out" / "answers" / "model.jsonl").exists()
    run.write_stored(tmp_path / "out", find_models(recipe))  # as `--rescore` does: what is there can be scored
    assert len(answers(tmp_path / "out", "model")) == 19
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "solopo_plugin.evaluation.benchmarks", ModuleType("x"))
    sys.modules["solopo_plugin.evaluation.benchmarks"].BENCHMARKS = benchmarks
    asked(server)
    answer_all(recipe, find_models(recipe))
    assert len(asked(server)) == 1


def test_a_failure_here_ends_what_is_under_way_there(benchmarks, model, server, tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(ask, "generate", watched(ask.generate, ended))
    monkeypatch.setattr(Store, "add", lambda *given: 1 / 0)
    recipe = served(tmp_path, [model], server)
    with pytest.raises(ZeroDivisionError) as kept:  # its traceback keeps the generator
        answer_all(recipe, find_models(recipe))
    assert ended == [True] and kept


def test_each_model_is_asked_under_its_own_name(benchmarks, model, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    models = {"before": model, "after": str(other)}
    log, right = tmp_path / "log", answers_for(tmp_path / "answers.json")

    def names() -> dict[str, int]:
        seen = [json.loads(line)["model"] for line in log.read_text().splitlines()]
        log.unlink()
        return {name: seen.count(name) for name in seen}

    with serving(right, model="before,after", log=log) as server:
        recipe = served(tmp_path, models, server)
        answer_all(recipe, find_models(recipe))
        assert names() == {"before": 20, "after": 20}
        recipe = served(tmp_path, models, server, served_model={"before": "x", "after": "y"})
        answer_all(recipe, find_models(recipe))
        assert names() == {"x": 20, "y": 20}
        recipe = served(tmp_path, models, server, served_model={"before": "x"})
        with pytest.raises(DataError, match="`served_model` says nothing of the model after, only of before."):
            answer_all(recipe, find_models(recipe))
    with serving(right, log=log) as server, serving(right, model="one", log=log) as second:
        recipe = served(tmp_path, models, server)  # the only model of a server is not both of ours
        sentence = (
            "has scripted, none of which is called before or .*model; say which it is with `served_model: {before: "
        )
        with pytest.raises(DataError, match=sentence):
            answer_all(recipe, find_models(recipe), resume=False)
        urls = {"before": server.url, "after": second.url}
        recipe = recipe_in(
            tmp_path, models, backend="openai", server_urls=urls, served_model={"before": "scripted", "after": "one"}
        )
        answer_all(recipe, find_models(recipe))
        assert names() == {"scripted": 20, "one": 20}


def test_another_model_behind_the_same_address_is_refused(benchmarks, model, tmp_path, monkeypatch):
    right, original = answers_for(tmp_path / "answers.json"), ask.generate
    with serving(right, model="a") as server:
        recipe = served(tmp_path, [model], server)
        monkeypatch.setattr(ask, "generate", lambda *given: (r for r in original(*given) if '"q7"' not in r.id))
        with pytest.raises(DataError, match="1 questions got no answer"):
            answer_all(recipe, find_models(recipe))
        monkeypatch.setattr(ask, "generate", original)
    with serving(right, model="b") as server:
        recipe = served(tmp_path, [model], server)
        with pytest.raises(DataError, match="the server's model a, and it now has b; serve a again, or set `serv"):
            answer_all(recipe, find_models(recipe))
        answer_all(recipe, find_models(recipe), resume=False)


def test_a_question_has_its_own_limit_and_greedy_is_temperature_0(benchmarks, model, server, tmp_path):
    benchmarks["plain"] = lambda *_: (toy.item(i, max_new_tokens=None if i else 77) for i in range(3))
    recipe = served(tmp_path, [model], server, max_new_tokens=33, concurrency=1)
    asked(server)
    answer_all(recipe, find_models(recipe))
    assert [(seen["max_tokens"], seen["temperature"], seen["n"]) for seen in asked(server)] == [
        (77, 0.0, 1), (33, 0.0, 1), (33, 0.0, 1)
    ]  # fmt: skip


# ---- killed


@pytest.fixture(scope="module")
def zygote(zygote):
    """Starts runs of ask_toy.py; see zygote.py."""
    return partial(zygote.run, "tests/evaluation/ask_toy.py")


@pytest.mark.slow
def test_killed_and_resumed_is_uninterrupted(zygote, tokenizer, tmp_path_factory):
    """kill -9 at six moments; the answers are the same lines, each once, and none is asked for twice over."""
    right = answers_for(tmp_path_factory.mktemp("answers") / "answers.json", N_QUESTIONS)
    log, ends, folders = right.with_name("log"), [], []
    with serving(right, slow=0.02, log=log) as server:
        for kills in (0, 6):
            folder = tmp_path_factory.mktemp("run")
            keys = vars(recipe_in(folder, ["served"], backend="openai", server_urls=server.url, concurrency=2,
                                  model_name_or_path=tokenizer, max_input_tokens=250))  # fmt: skip
            keys = {name: value for name, value in keys.items() if value is not None}
            (folder / "recipe.yaml").write_text(yaml.safe_dump(keys | {"output_dir": "out"}))
            random.seed(3)
            ends.append([zygote(folder, kill_after=0.25 + random.random() / 2) for _ in range(kills)])
            assert zygote(folder) == 0, (folder / "log.txt").read_text()
            folders.append(folder)
            if not kills:
                assert len(log.read_text().splitlines()) == N_QUESTIONS
                log.unlink()
    calm, killed = ((folder / "out") for folder in folders)
    assert ends[1].count(-9) >= 3, ends
    assert N_QUESTIONS <= len(log.read_text().splitlines()) <= N_QUESTIONS + 2 * 6  # those under way at a kill
    lines = [(folder / "answers" / "served.jsonl").read_bytes().splitlines() for folder in (calm, killed)]
    assert lines[0][0] == lines[1][0] and sorted(lines[0]) == sorted(lines[1]) and len(lines[0]) == N_QUESTIONS + 1
    assert file_hash(calm / "items.jsonl") == file_hash(killed / "items.jsonl")
    assert any(json.loads(line).get("cut_tokens") for line in lines[0])


def test_what_a_stopped_run_has_answered_is_reported(benchmarks, model, server, tmp_path, monkeypatch, caplog, capsys):
    """Under `--rescore` a model that was not reached is left out, and before the first answer there is a sentence."""
    recipe = served(tmp_path, [model, str(shutil.copytree(model, tmp_path / "second"))], server)
    recipe.served_model = {"model": "scripted", "second": "scripted"}

    def stopped(recipe, model, store, *others):
        if model.name == behind:
            store.set_of(model.name, ask.fingerprint(recipe, model))  # as it does before it loads the model
            raise KeyboardInterrupt
        ask.ask(recipe, model, store, *others)

    monkeypatch.setattr(run, "ask", stopped)
    for behind in ("model", "second"):
        with pytest.raises(KeyboardInterrupt):
            run.evaluate(recipe)
        if behind == "model":
            with pytest.raises(
                DataError, match=r"out holds no answers yet, which `--rescore` could score; leave it out"
            ):
                run.evaluate(recipe, rescore=True)
    results = run.evaluate(recipe, rescore=True)
    assert "second: nothing is answered yet; it is left out." in caplog.text
    assert {row["model"] for row in results["summary"]} == {"model"}
    with pytest.raises(DataError, match="Only model answered, and `compare` or `runs` names others; leave `--rescore`"):
        run.evaluate(replace(recipe, compare=[["model", "second"]]), rescore=True)
    recipe.benchmarks = ["plain", "longbench_qa"]  # of which the other has no answer yet, nor a table
    monkeypatch.setattr(evaluate, "load_recipe", lambda *_: recipe)
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: results)
    evaluate.ask_and_show(Namespace(recipe="x", overrides=[], select=None, rescore=True, resume=True))
    assert capsys.readouterr().out.count("Report: ") == 1


def test_two_runs_do_not_share_a_folder(benchmarks, model, server, tmp_path):
    recipe = served(tmp_path, [model], server)
    with run.lock_folder(Path(recipe.output_dir), "output_dir"):
        with pytest.raises(
            DataError, match="Another run is at work in .*out; wait for it, or give another `output_dir`"
        ):
            run.evaluate(recipe)


def test_what_cannot_be_asked_is_told_in_one_message_before_anything_is_made(tmp_path, monkeypatch):
    """All at once, and the models' files are looked at once."""
    looked = []
    monkeypatch.setattr(run, "find_models", lambda recipe: looked.append(recipe) or find_models(recipe))
    recipe = recipe_in(tmp_path, {"mine": "nobody/no-model"}, backend="vllm")
    with pytest.raises(
        DataError, match=r"2 things keep this recipe(.|\n)*`backend: vllm`(.|\n)*`models: mine: nobody/no-model`"
    ):
        run.evaluate(recipe)
    assert len(looked) == 1 and not (tmp_path / "out").exists()


def test_what_the_harness_refuses_is_told_before_a_model_is_asked(benchmarks, model, server, tmp_path, monkeypatch):
    """And under `--rescore` before scores are written; `--no-resume` reaches the harness."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for args, said in (({"tasks": "y"}, "`harness_args` cannot set `tasks`; "), ({}, "is not installed: pip install")):
        recipe = served(tmp_path, [model], server, harness_tasks=["t"], harness_args=args)
        with pytest.raises(DataError, match=said):
            run.evaluate(recipe)
        assert not (tmp_path / "out" / "items.jsonl").exists()
    monkeypatch.undo()
    (ran := tmp_path / "out" / "harness" / "model").mkdir(parents=True)
    write_json(ran / "rows.json", {"made_from": {"config": settings_of(recipe)}, "rows": []})
    write_json(tmp_path / "out" / "models.json", [{"name": "model", "path": model}])
    with pytest.raises(DataError, match="`--rescore` keeps what .*model was made with, but `limit` was None and is 5"):
        run.evaluate(replace(recipe, harness_args={"limit": 5}), rescore=True)
    there: list = []
    told: list = []  # of thoughts, where the harness is to run
    for name, stand_in in {
        "run_harness": lambda *_: there.append(ran.exists()) or [],
        "check_harness": lambda *given: not given[-1],
        "check_thoughts": lambda models, _: told.extend(model.name for model in models),
    }.items():
        monkeypatch.setattr(f"solopo_plugin.evaluation.harness.{name}", stand_in)
    for resume in (True, False):
        run.evaluate(replace(recipe, benchmarks=[]), resume=resume)
    assert there == [True, False] and told == ["model"]


def test_no_file_of_a_run_holds_the_servers_key_or_password(benchmarks, model, server, tmp_path, monkeypatch):
    secret = "SENTINEL-0123456789"
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    recipe = served(tmp_path, [model], server)
    recipe.server_urls = server.url.replace("//", f"//user:{secret}@")
    run.evaluate(recipe)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"model.jsonl", "items.json", "models.json", "results.json", "index.html"} <= {path.name for path in files}
    assert not [path for path in files if secret.encode() in path.read_bytes()]
