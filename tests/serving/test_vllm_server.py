"""A real vLLM server on a CPU: `make test-vllm` (VLLM_SERVER is the interpreter that has it).

Its answers are held against transformers' greedy ones in fp32, which is what the server computes in, too.
"""

import json
import threading
import time
from pathlib import Path

import httpx
import pytest
from evaluate import main as evaluate
from material import make_questions
from material import recipe as data_recipe
from real_vllm import SCHEMA, SERVER, Server, assert_keep_to_schema, make_adapter, make_model, serving, texts_of

from solopo_plugin.host.template import encode_prompt
from solopo_plugin.qa.files import DataError, read_jsonl, write_jsonl
from solopo_plugin.qa.generate import generate, servers
from solopo_plugin.qa.generate.calls import Call, load_chat
from solopo_plugin.qa.recipe import Sampling, pick
from solopo_plugin.qa.store import Store
from solopo_plugin.synthesis.pipeline import run_pipeline

pytestmark = [pytest.mark.skipif(not SERVER, reason="`make test-vllm` runs these"), pytest.mark.timeout(400)]
QUESTIONS, N = 6, 32


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    make_model(folder / "model")
    make_adapter(str(folder / "model"), folder / "adapter", 1)
    lora = f"--enable-lora --max-lora-rank 16 --lora-modules tuned={folder / 'adapter'}"
    with serving(folder, lora) as current:
        yield current


def recipe_at(folder: Path, server: Server, **keys):
    folder.mkdir(exist_ok=True)
    base = dict(
        backend="openai", server_urls=server.url, served_model="base", openai_endpoint="completions", num_samples=N,
        max_new_tokens=24, temperature=1.0, short_tokens=600, long_tokens=1200, concurrency=8, seed=3,
    )  # fmt: skip
    return data_recipe(folder, str(server.folder / "model"), make_questions(QUESTIONS), **base | keys)


def sampled(recipe) -> dict[tuple, tuple]:
    """Runs the pipeline up to the answers; returns them by side, question and number."""
    for stage in ("read", "contexts", "sample"):
        manifest = run_pipeline(recipe, stage)
    counts = manifest["stages"]["sample"]["counts"]
    for side in ("short", "long"):
        counted = {name: counts[side][name] for name in ("prompts", "answers", "prompt_tokens_differ")}
        assert counted == dict(prompts=QUESTIONS, answers=QUESTIONS * N, prompt_tokens_differ=0)
    return {
        (side, row["id"], row["k"]): (row["text"], row["finish_reason"])
        for side in ("short", "long")
        for row in read_jsonl(Path(recipe.work_dir) / f"samples.{side}.jsonl")
    }


@pytest.fixture(scope="module")
def by_completions(server, tmp_path_factory):
    return sampled(recipe_at(tmp_path_factory.mktemp("completions"), server))


def test_build_data_draws_n_answers_at_both_endpoints(server, by_completions, tmp_path):
    """The prompts are the same ids at both, and a seed stands for the same draws."""
    assert {reason for _, reason in by_completions.values()} == {"stop", "length"}
    firsts = [text for (*_, k), (text, _) in by_completions.items() if k == 0]
    assert len(set(firsts)) == len(firsts) and len(set(by_completions.values())) > len(by_completions) // 2
    by_chat = sampled(recipe_at(tmp_path / "chat", server, openai_endpoint="chat"))
    assert by_chat == by_completions == sampled(recipe_at(tmp_path / "again", server))
    assert sampled(recipe_at(tmp_path / "other", server, seed=4)) != by_completions


def test_ids_of_the_prompt_are_the_trainers(server):
    recipe = recipe_at(server.folder / "ids", server)
    tokenizer, template = load_chat(recipe.model_name_or_path, recipe)
    prompt = "Where is the lantern?\n\n  Two lines, café."
    ids = encode_prompt(tokenizer, template, prompt)
    common = dict(model="base", max_tokens=1, return_token_ids=True)
    chat = httpx.post(
        f"{server.url}/chat/completions", json=common | {"messages": [{"role": "user", "content": prompt}]}
    )
    plain = httpx.post(f"{server.url}/completions", json=common | {"prompt": ids})
    assert chat.json()["prompt_token_ids"] == plain.json()["choices"][0]["prompt_token_ids"] == ids


def test_a_server_that_is_killed_and_started_again_changes_no_answer(server, by_completions, tmp_path, monkeypatch):
    monkeypatch.setattr(servers, "LONGEST_PAUSE", 2.0)
    recipe, found = recipe_at(tmp_path / "killed", server, concurrency=1, retries=100), {}
    thread = threading.Thread(target=lambda: found.update(sampled(recipe)))
    added, original = [], Store.add
    monkeypatch.setattr(Store, "add", lambda *args: (added.append(1), original(*args))[1])
    thread.start()
    while len(added) < 3:
        assert thread.is_alive()
        time.sleep(0.005)
    server.kill()
    answered = len(added)
    assert answered < 2 * QUESTIONS
    server.start()
    server.wait()
    thread.join(120)
    assert found == by_completions


def test_a_context_that_is_too_long_is_a_sentence(server, tmp_path, caplog):
    recipe = recipe_at(tmp_path / "long", server)
    for n in (1, 4):
        with pytest.raises(DataError, match="refuses with HTTP 400: .*maximum context length is 2048 tokens"):
            list(generate(pick(recipe, Sampling), recipe.model, [Call("q", tuple(range(n)), "word " * 3000)]))
    assert "one by one" not in caplog.text


def test_many_greedy_answers_are_asked_for_one_by_one(server, tmp_path):
    """vLLM refuses n > 1 there."""
    recipe = recipe_at(tmp_path / "greedy", server, temperature=0.0)
    calls = [Call("q", (0, 1, 2), "Where is the lantern?")]
    replies = list(generate(pick(recipe, Sampling), recipe.model, calls))
    assert sorted(reply.ks for reply in replies) == [(0,), (1,), (2,)]
    assert len({text for reply in replies for text, _ in reply.answers}) == 1


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_answers_keep_to_a_schema(server, tmp_path, endpoint, caplog):
    """Even those of a model that knows no JSON."""
    recipe = recipe_at(tmp_path / "held", server, openai_endpoint=endpoint, max_new_tokens=300)
    calls = [Call(f"q{i}", tuple(range(4)), f"Where is lantern {i}?", schema=SCHEMA) for i in range(4)]
    replies = list(generate(pick(recipe, Sampling), recipe.model, calls))
    assert_keep_to_schema([answer for reply in replies for answer in reply.answers])
    assert "asked without" not in caplog.text


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_evaluate_gives_transformers_answers(server, tmp_path, endpoint):
    """Greedy, of the model and of the adapter, each under its name; the adapter's are others."""
    rows = [
        {"id": i, "question": row["question"], "answers": row["answers"], "documents": row["evidence"]}
        for i, row in enumerate(make_questions(12, seed=5))
    ]
    write_jsonl(tmp_path / "questions.jsonl", rows)
    said = {}
    for backend in ("transformers", "openai"):
        keys = dict(
            models={"base": str(server.folder / "model"), "tuned": str(server.folder / "adapter")}, template="qwen",
            benchmarks=["plain"], plain_data=str(tmp_path / "questions.jsonl"), max_new_tokens=24, backend=backend,
            output_dir=str(tmp_path / backend), temperature=0.0,
        )  # fmt: skip
        if backend == "openai":
            keys |= dict(server_urls=server.url, openai_endpoint=endpoint)
        (tmp_path / "recipe.yaml").write_text(json.dumps(keys))
        assert evaluate([str(tmp_path / "recipe.yaml")]) == 0
        said[backend] = {name: texts_of(tmp_path / backend, name) for name in ("base", "tuned")}
    assert said["openai"] == said["transformers"]
    assert said["openai"]["base"] != said["openai"]["tuned"] and len(said["openai"]["base"]) == 12
