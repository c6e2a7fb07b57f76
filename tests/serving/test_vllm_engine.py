"""vLLM's offline engine on a CPU, beside the host: `make test-vllm` (VLLM_ENGINE is that interpreter)."""

import json
import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT
from material import make_questions
from real_vllm import ON_CPU, SCHEMA, assert_keep_to_schema, make_adapter, make_model, whole

from solopo_plugin.qa.files import read_jsonl, write_jsonl
from solopo_plugin.qa.generate import generate
from solopo_plugin.qa.generate.calls import Call, Model
from solopo_plugin.qa.recipe import Sampling

PYTHON = os.environ.get("VLLM_ENGINE", "")
pytestmark = [pytest.mark.skipif(not PYTHON, reason="`make test-vllm` runs these"), pytest.mark.timeout(580)]
QUESTIONS, N = 6, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All that the engine is asked, in one process: four engines, one after another."""
    folder = tmp_path_factory.mktemp("engine")
    model = make_model(folder / "model")
    write_jsonl(folder / "questions.jsonl", make_questions(QUESTIONS))
    recipe = dict(
        model_name_or_path=model, template="qwen", input=str(folder / "questions.jsonl"), work_dir=str(folder / "work"),
        short_tokens=600, long_tokens=1200, dataset_name="made", num_samples=N, max_new_tokens=24, temperature=1.0,
        backend="vllm", concurrency=4, seed=3,
    )  # fmt: skip
    (folder / "recipe.json").write_text(json.dumps(recipe))
    prompts = {f"p{i}": f"Where is the {row['question']}" * (i + 1) for i, row in enumerate(make_questions(8, seed=7))}
    sampling = dict(template="qwen", temperature=0.0, max_new_tokens=24, concurrency=3)
    greedy = dict(sampling=sampling, adapter=None, prompts=prompts, schema=None, n=2)
    adapter = make_adapter(model, folder / "adapter", 1)
    held = greedy | dict(schema=SCHEMA, n=4, sampling=sampling | dict(temperature=1.0, max_new_tokens=300))
    (folder / "asked.json").write_text(json.dumps(dict(base=greedy, tuned=greedy | dict(adapter=adapter), held=held)))
    environment = os.environ | ON_CPU | dict(PYTHONPATH=str(ROOT))
    script = str(Path(__file__).with_name("ask_engine.py"))
    done = subprocess.run([PYTHON, script, str(folder)], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def asked_and_said(folder):
    return [json.loads((folder / name).read_text()) for name in ("asked.json", "said.json")]


def test_the_engine_draws_n_answers_to_every_prompt(folder):
    for side in ("short", "long"):
        rows = list(read_jsonl(folder / "work" / f"samples.{side}.jsonl"))
        assert Counter(row["id"] for row in rows) == {f"q{i}": N for i in range(QUESTIONS)}
        assert {row["finish_reason"] for row in rows} == {"stop", "length"}
        assert len({row["text"] for row in rows}) > len(rows) // 2


def test_the_engine_answers_greedily_as_transformers_does(folder, asked_and_said):
    """The same ids, the same tokens, of the model and of the adapter over it; more than one answer where asked for."""
    asked, said = asked_and_said
    for name in ("base", "tuned"):
        sampling = Sampling(**asked[name]["sampling"], backend="transformers")
        calls = [Call(place, (0,), prompt) for place, prompt in asked[name]["prompts"].items()]
        for reply in generate(sampling, Model(str(folder / "model"), asked[name]["adapter"]), calls):
            (text, ended), (own, tokens) = reply.answers[0], said[name][reply.id]
            assert [[whole(answer), reason] for answer, reason in own] == [[whole(text), ended]] * 2
            assert tokens == reply.prompt_tokens
    assert said["base"] != said["tuned"]


def test_the_engine_holds_answers_to_a_schema(asked_and_said):
    """Even those of a model that knows no JSON."""
    answers = [answer for own, _ in asked_and_said[1]["held"].values() for answer in own]
    assert len(answers) == 32
    assert_keep_to_schema(answers)
