"""lm-evaluation-harness as the existing tool: it really runs, on a task of our own, and what it says is handed on."""

import ast
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import time
import traceback
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT
from scripted_server import answering
from transformers import AutoTokenizer

from solopo_plugin.evaluation.harness import (
    _environment,
    _without,
    check_harness,
    check_kept,
    check_thoughts,
    configuration,
    kept_results,
    read_results,
    run_harness,
)
from solopo_plugin.evaluation.models import complete
from solopo_plugin.evaluation.recipe import load_recipe
from solopo_plugin.evaluation.report.tables import harness_table
from solopo_plugin.qa.files import DataError
from solopo_plugin.qa.generate.calls import Model
from solopo_plugin.qa.provenance import installed

LEADERBOARD = ROOT / "examples/yaml/eval/leaderboard.yaml"
KEYS = dict(
    harness_tasks=["toy_colours"], harness_args=None, backend="transformers", trust_remote_code=False,
    default_system=None, enable_thinking=True, rope_factor=None, api_key_env="NO_KEY", server_urls=None,
    served_model=None, openai_endpoint="chat", concurrency=4, tensor_parallel_size=1, model_name_or_path=None,
    max_input_tokens=31500, max_new_tokens=1024, template="qwen", seed=42, temperature=0.0, top_p=1.0, extra_body=None,
    timeout=5.0, retries=0,
)  # fmt: skip
COLOURS = ["red", "green", "blue"]


def recipe(**changes) -> SimpleNamespace:
    return SimpleNamespace(**KEYS | changes)


def model(path="m", adapter=None, name="toy", **changes) -> Model:
    """A model with what a recipe says of it."""
    return complete(Model(str(path), adapter and str(adapter)), name, recipe(**changes))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder with a multiple-choice task of ten questions in a file beside it, and a group of it."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"Colour of thing {i}?", "choices": COLOURS, "answer": i % 3} for i in range(10)]
    (folder / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "toy_colours", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(folder / "colours.jsonl")}},
        "doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}], "metadata": {"version": 1},
    }  # fmt: skip
    (folder / "colours.yaml").write_text(yaml.safe_dump(task))
    (folder / "group.yaml").write_text(yaml.safe_dump({"group": "toy_group", "task": ["toy_colours"]}))
    return folder


def likeliest(path: str, questions: list[str]) -> list[int]:
    """What the task's accuracy must rest on: by our own code the choice with the highest log-prob behind a prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    found = []
    for question in questions:
        prompt, sums = tokenizer.encode(f"Question: {question}\nAnswer:"), []
        for choice in COLOURS:
            ids = tokenizer.encode(f"Question: {question}\nAnswer: {choice}")
            with torch.inference_mode():
                logps = network(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(logps[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))))
        found.append(sums.index(max(sums)))
    return found


@pytest.mark.slow
def test_it_runs_once_and_its_result_comes_back(tiny_model, tasks, tmp_path, request):
    """Really run; a second time what is there is read; a wrong task is one sentence and takes nothing away."""
    chosen = likeliest(tiny_model(), [f"Colour of thing {i}?" for i in range(10)])
    accuracy = sum(choice == i % 3 for i, choice in enumerate(chosen)) / 10
    args = {"include_path": str(tasks), "apply_chat_template": False, "device": "cpu", "batch_size": 2}
    known = recipe(harness_tasks=["toy_group"], harness_args=args)
    rows = run_harness(model(tiny_model()), known, tmp_path)
    (row,) = rows
    assert row["stderr"] == pytest.approx((accuracy * (1 - accuracy) / 9) ** 0.5)
    want = {"model": "toy", "task": "toy_colours", "metric": "acc", "value": pytest.approx(accuracy), "n": 10}
    assert row | want == row

    folder = tmp_path / "harness" / "toy"
    began = (folder / "log.txt").stat()
    assert run_harness(model(tiny_model()), known, tmp_path) == rows == kept_results(model(), tmp_path)
    assert (folder / "log.txt").stat() == began, "it ran again"
    assert "toy_colours" in (folder / "log.txt").read_text() and not list(folder.glob("cache*"))

    wrong = recipe(harness_tasks=["toy_coulors"], harness_args=args)
    request.getfixturevalue("forked")
    with pytest.raises(DataError) as error:
        run_harness(model(tiny_model(), name="other"), wrong, tmp_path)
    assert str(error.value) == (
        "lm-evaluation-harness ended with 1 for other: ValueError: Tasks not found: toy_coulors; "
        f"`python -m lm_eval ls tasks` lists them; see {tmp_path}/harness/other/log.txt."
    )


@pytest.fixture
def forked(zygote, monkeypatch, tmp_path):
    """Fork the harness from a process that has imported the most of it; see zygote.py."""
    monkeypatch.setattr("solopo_plugin.evaluation.harness.subprocess.Popen", partial(start_forked, zygote, tmp_path))


def start_forked(zygote, folder: Path, command: list[str], env: dict, **_):
    os.mkfifo(pipe := folder / f"pipe_{time.monotonic_ns()}")
    run = zygote.start(ROOT / "solopo_plugin/evaluation/harness_process.py", *command[3:], log=pipe, env=env)
    run.stderr = open(pipe, "rb")
    pipe.unlink()
    return run


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """In place of the harness a program that notes each start and writes a result; returns the starts so far."""
    program = tmp_path / "python"
    text = r"""#!/bin/sh
folder=$(dirname "$5"); echo "$@" >> HERE/starts
echo '{"results": {"t": {"acc,none": 0.5}}, "n-samples": {"t": {"effective": 4}}}' > $folder/results_2.json
if [ -e HERE/stop ]; then echo 'HttpError: 503' >&2; echo 'terminate called' >&2; exit 3; fi
"""
    program.write_text(text.replace("HERE", str(tmp_path)))
    program.chmod(0o755)
    monkeypatch.setattr("solopo_plugin.evaluation.harness.sys.executable", str(program))
    return lambda: (tmp_path / "starts").read_text().count("harness_process run")


def test_run_again_when_something_changed_and_only_then(scripted, tmp_path, monkeypatch, caplog):
    weights, out = tmp_path / "model", tmp_path / "out"
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(b"1")
    keys = dict(harness_tasks=["t"])
    rows = run_harness(model(weights), recipe(**keys), out)
    ran = {"version": installed("lm_eval")}  # which the rows keep, whatever is installed when they are shown again
    assert rows == [{"model": "toy", "task": "t", "metric": "acc", "value": 0.5, "stderr": None, "n": 4} | ran]
    monkeypatch.setattr("solopo_plugin.evaluation.harness.installed", lambda package: "0.0.1")
    assert run_harness(model(weights), recipe(**keys), out) == rows == kept_results(model(), out) and scripted() == 1
    run_harness(model(weights), recipe(**keys, harness_args={"limit": 4}), out)
    assert scripted() == 2
    (weights / "model.safetensors").write_bytes(b"2")  # trained on, in the same place
    run_harness(model(weights), recipe(**keys, harness_args={"limit": 4}), out)
    assert scripted() == 3
    (weights / "chat_template.jinja").write_text("another")
    run_harness(model(weights), recipe(**keys, harness_args={"limit": 4}), out)
    assert scripted() == 4
    caplog.set_level(logging.INFO)
    run_harness(model(weights), recipe(**keys, harness_args={"limit": 4}), out)
    for limit, resume, to_run in ((4, True, False), (5, True, True), (4, False, True)):
        given = recipe(**keys, harness_args={"limit": limit})
        assert check_harness(model(weights), given, out, resume) == to_run
    assert "toy: results of lm-evaluation-harness: made before, kept." in caplog.text and scripted() == 4


OTHERS = {  # changes of settings under which results were made, and what is said of them
    "same": ({}, None),
    "machine": (dict(tensor_parallel_size=2, model_name_or_path="gone", trust_remote_code=True), None),
    "tasks": (dict(harness_tasks=["u"]), "`tasks` was ['t'] and is ['u']"),
    "limit": (dict(harness_args={"limit": 500}), "`limit` was None and is 500"),
    "thought": (dict(enable_thinking=False), "`model_args` was {'dtype': 'auto'} and is {'dtype': 'auto', 'enable_"),
    "own": (dict(harness_args={"model_args": {"dtype": "float32"}}), "`model_args` was {'dtype': 'auto'} and is {'"),
    "backend": (dict(backend="vllm"), "`model` was 'hf' and is 'vllm'"),
    "system": (dict(default_system="Be brief."), "`system_instruction` was None and is 'Be brief.'"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_results_are_not_reported_again_under_other_settings(case, scripted, tmp_path):
    changes, said = OTHERS[case]
    check_kept(model(), recipe(), tmp_path)  # nothing is there
    run_harness(model(adapter=tmp_path / "gone"), recipe(harness_tasks=["t"]), tmp_path)
    with pytest.raises(DataError) if said else nullcontext() as error:
        check_kept(model(), recipe(**dict(harness_tasks=["t"]) | changes), tmp_path)
    if said:
        folder = tmp_path / "harness" / "toy"
        assert str(error.value).startswith(f"`--rescore` keeps what {folder} was made with, but {said}")


def test_model_args_of_the_user_are_told_from_those_that_are_made(scripted, tmp_path):
    """Also where both may have the name. Results of before the user's were noted are kept, and compared without."""
    own = dict(harness_tasks=["t"], harness_args={"model_args": {"max_length": 2048}})
    run_harness(model(), recipe(**own), tmp_path)
    check_kept(model(), recipe(**own), tmp_path)
    with pytest.raises(DataError, match="`model_args` was {'dtype': 'auto', 'max_length': 2048} and is {'dtype': 'a"):
        check_kept(model(), recipe(harness_tasks=["t"]), tmp_path)
    kept = json.loads((path := tmp_path / "harness" / "toy" / "rows.json").read_text())
    del kept["made_from"]["settings"]
    path.write_text(json.dumps(kept))
    check_kept(model(), recipe(harness_tasks=["t"]), tmp_path)
    assert run_harness(model(), recipe(**own), tmp_path) == kept["rows"] and scripted() == 1


def test_a_server_is_asked_for_the_model_of_the_recipe(scripted, tmp_path):
    """Behind a server an adapter is no name of its base; a stopped run of another model of the server begins anew."""
    names = ["m", "toy"]
    with answering(lambda request: (200, {"data": [{"id": name} for name in names]})) as server:
        keys = SERVER | dict(server_urls=server.url, harness_tasks=["t"])

        def asked(keys=keys, **which) -> str:
            run_harness(model(**which, **keys), recipe(**keys), tmp_path)
            return json.loads((tmp_path / "harness" / "toy" / "config.json").read_text())["model_args"]["model"]

        assert asked(adapter="a") == "toy" and asked() == "toy"
        assert asked(keys | dict(served_model="s")) == "s" and scripted() == 3
        (tmp_path / "stop").touch()
        names[:] = ["only"]
        cache = tmp_path / "harness" / "toy" / "cache_rank0.db"
        for name in (["only"], ["only"], ["other"]):
            names[:] = name
            with pytest.raises(DataError, match="ended with 3"):
                asked()
            assert cache.exists() == (scripted() == 5)
            cache.touch()
        names[:] = ["one", "two"]
        with pytest.raises(DataError, match="The server has several models .one, two.; name one as `served_model`"):
            asked(adapter="b")


def test_a_stopped_run_keeps_its_answers_and_its_reason_is_told(scripted, tmp_path):
    """Its cache stays for the same settings, and goes with others: it does not say whose answers it holds."""
    (tmp_path / "stop").touch()
    cache = tmp_path / "harness" / "toy" / "cache_rank0.db"
    for _ in range(2):
        with pytest.raises(DataError, match="ended with 3 for toy: HttpError: 503; see .*log.txt"):
            run_harness(model(), recipe(harness_tasks=["t"]), tmp_path)
        cache.touch()
    assert json.loads((cache.parent / "config.json").read_text())["use_cache"] == str(cache.parent / "cache")
    with pytest.raises(DataError):
        run_harness(model(), recipe(harness_tasks=["t", "u"]), tmp_path)
    assert not cache.exists()


def test_no_result_of_a_task_is_an_error(scripted, tmp_path):
    with pytest.raises(DataError, match="has no result of the task `u`"):
        run_harness(model(), recipe(harness_tasks=["t", "u"]), tmp_path)


def test_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"which is not installed: pip install '\.\[eval\]'"):
        run_harness(model(), recipe(), tmp_path)
    with pytest.raises(DataError, match="is not installed"):
        check_harness(model(), recipe(), tmp_path)


SERVER = dict(backend="openai", server_urls="http://one:8000, http://two:8000/v1")
IDS = dict(openai_endpoint="completions", server_urls={"toy": "http://x/v1/"}, served_model={"toy": "s"})
CONFIGURATIONS = {  # changes of the recipe, adapter, the harness' model type and some of its arguments
    "hf": ({}, None, "hf", {"pretrained": "m", "dtype": "auto"}),
    "adapter": ({}, "a", "hf", {"pretrained": "m", "peft": "a"}),
    "own": (dict(harness_args={"model_args": {"dtype": "float32"}}), None, "hf", {"dtype": "float32"}),
    "thought": (dict(enable_thinking=False), None, "hf", {"enable_thinking": False}),
    "vllm": (dict(backend="vllm", tensor_parallel_size=2), None, "vllm", {"tensor_parallel_size": 2}),
    "chat": (SERVER, None, "local-chat-completions", {"model": "m", "base_url": "http://one:8000/v1/chat/completions"}),
    "ids": (
        SERVER | IDS, None, "local-completions",
        {"model": "s", "base_url": "http://x/v1/completions", "tokenizer": "m", "max_length": 32524},
    ),
    "ids, other tokenizer": (
        SERVER | IDS | dict(model_name_or_path="base"), None, "local-completions", {"model": "s", "tokenizer": "base"},
    ),
}  # fmt: skip


CLASSES = {"hf": "huggingface.HFLM", "vllm": "vllm_causallms.VLLM"}


def taken(kind: str) -> set[str]:
    """Arguments of a model type of the harness, from its source: importing it takes long, and vLLM's needs vLLM."""
    module, name = CLASSES.get(kind, "api_models.TemplateAPI").split(".")
    path = Path(importlib.util.find_spec("lm_eval").origin).parent / "models" / f"{module}.py"
    (made,) = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name == name]
    (init,) = [n for n in made.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    return {argument.arg for argument in [*init.args.args, *init.args.kwonlyargs]}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_what_the_harness_is_told(case):
    """And the harness' own class of that type takes each argument by its name."""
    changes, adapter, kind, args = CONFIGURATIONS[case]
    found = configuration(model(adapter=adapter, **changes), recipe(**changes))
    assert found["model"] == kind and found["tasks"] == ["toy_colours"] and found["apply_chat_template"] is True
    assert args.items() <= found["model_args"].items()
    assert found["model_args"].keys() <= taken(kind)


STRIP, OFF = "harness_args: {model_args: {think_end_token: </think>}}", "gen_kwargs: {chat_template_kwargs: {enable_th"
STRIPPED = dict(harness_args={"model_args": {"think_end_token": "</t>"}})
NOT_ASKED = dict(harness_args={"gen_kwargs": {"chat_template_kwargs": {"enable_thinking": False}}})
CHAT, UNWANTED = SERVER | dict(model_name_or_path="m"), dict(enable_thinking=False)
READS, ALWAYS = "{% if enable_thinking %}</think>{% endif %}", "{{ text.split('</think>') }}"
LOCAL = "; use `backend: vllm` or `transformers`\\.$"
THOUGHTS = {  # changes of the recipe, the own chat template, and what is said
    "scored": ({}, READS, f"toy: the chat template knows thoughts, .* with the answer; use `{STRIP}`, or `en"),
    "of a server": (CHAT, READS, f"scores them with the answer; use `{STRIP}`, or `harness_args: {{{OFF}"),
    "by ids": (SERVER | IDS, READS, f"scores them with the answer{LOCAL}"),
    "by ids, stripped": (SERVER | IDS | STRIPPED, READS, f"scores them with the answer{LOCAL}"),
    "by ids, always": (SERVER | IDS | UNWANTED, ALWAYS, f"scores them with the answer{LOCAL}"),
    "unwanted": (CHAT | UNWANTED, READS, f"does not reach a server .*{OFF}.*, or `backend: vllm` or"),
    "unwanted, stripped": (CHAT | UNWANTED | STRIPPED, READS, "does not reach a server"),
    "unwanted, unknown": (SERVER | UNWANTED, "plain", "does not reach a server"),
    "in vain": (CHAT | dict(harness_args={"model_args": UNWANTED}), READS, "scores them with the answer"),
    "not asked": (CHAT | UNWANTED | NOT_ASKED, READS, None),
    "off": (UNWANTED, READS, None),
    "always": (UNWANTED, ALWAYS, f"with the answer; use `{STRIP}`\\.$"),
    "none": (SERVER | IDS | UNWANTED, "plain", None),
    "stripped": (STRIPPED, READS, None),
    "no chat": (dict(harness_args={"apply_chat_template": False}), READS, None),
    "unknown": (SERVER, READS, None),
}


@pytest.mark.parametrize("case", THOUGHTS)
def test_thoughts_are_told_of(case, monkeypatch, caplog):
    """Warn, since the harness scores them and tells no server to leave them out; ask no hub for a server's names."""
    changes, text, said = THOUGHTS[case]
    asked, tokenizer = [], SimpleNamespace(chat_template=text)
    find = "transformers.AutoTokenizer.from_pretrained"
    monkeypatch.setattr(find, lambda name, **more: (asked.append(name), tokenizer)[1])
    check_thoughts([model(**changes)], recipe(**changes))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (said is not None) and all(re.search(said, text) for text in told)
    assert not ("unknown" in case and asked)
    if case.startswith("by ids") and text == READS:
        with pytest.raises(DataError, match=r"`enable_thinking: false` does not reach lm-evaluation-harness with `op"):
            check_thoughts([model(**changes)], recipe(**changes, enable_thinking=False))


@pytest.mark.parametrize("rank, taken", [(None, 8), (1, 8), (8, 8), (12, 16), (64, 64), (65, 128), (300, 320)])
def test_vllm_gets_a_rank_that_it_takes_and_that_is_enough(tmp_path, rank, taken):
    (tmp_path / "adapter_config.json").write_text(json.dumps({} if rank is None else {"r": rank}))
    found = configuration(model(adapter=tmp_path), recipe(backend="vllm"))["model_args"]
    assert found["lora_local_path"] == str(tmp_path) and found["max_lora_rank"] == taken


WINDOWS = {  # of config.json, and what a server's prompts and answers may have together
    "plain": ({"max_position_embeddings": 4096}, 4096),
    "widened": (
        {
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
        },
        16384,
    ),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_a_server_with_completions_gets_the_models_window(case, tmp_path):
    """And not lm_eval's 2,048; what `model_args` says goes before."""
    config, window = WINDOWS[case]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"} | config))
    keys = SERVER | dict(openai_endpoint="completions")
    assert configuration(model(tmp_path, **keys), recipe(**keys))["model_args"]["max_length"] == window
    own = recipe(**keys, harness_args={"model_args": {"max_length": 99}})
    assert configuration(model(tmp_path, **keys), own)["model_args"]["max_length"] == 99
    assert "max_length" not in configuration(model(tmp_path, **SERVER), recipe(**SERVER))["model_args"]


BAD = {
    "ours": (dict(harness_args={"tasks": ["x"]}), "`harness_args` cannot set `tasks`; use `harness_tasks` and"),
    "words": (
        dict(harness_args={"model_args": "a=b,token=SECRET"}),
        "`model_args` of `harness_args` must be keys with values, {dtype: bfloat16}; got a str.",
    ),
    "no server": (dict(backend="openai"), "`backend: openai` needs `server_urls` for toy, such as"),
    "no address": (dict(backend="openai", server_urls="http://[::1/v1"), "`server_urls` has 'http://[::1/v1',"),
    "password": (dict(backend="openai", server_urls="http://u:SECRET@x"), "`server_urls` has a password for http://x"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_one_sentence(case):
    with pytest.raises(DataError) as error:
        configuration(model(**BAD[case][0]), recipe(**BAD[case][0]))
    assert str(error.value).startswith(BAD[case][1]) and "SECRET" not in str(error.value)


SECRETS = [{"header": {"api-key": "SECRET"}}, {"auth_token": "SECRET"}, {"base_url": "http://u:SECRET@h/v1"}]


@pytest.mark.parametrize("args", SECRETS)
def test_secrets_that_would_stand_in_its_files_are_refused(args):
    with pytest.raises(DataError, match="^`harness_args` cannot hold `(header|auth_token|base_url)`: what") as error:
        load_recipe(str(LEADERBOARD), [f"harness_args.model_args={json.dumps(args)}"])
    assert "SECRET" not in str(error.value)


def write_on(request) -> tuple[int, dict]:
    """Complete prompts by ids; every log-prob is -1."""
    if request.command != "POST":
        return 404, {}
    choices = []
    for i, ids in enumerate(request.body["prompt"]):
        n = len(ids) + 1
        logprobs = {"token_logprobs": [-1.0] * n, "top_logprobs": [{"x": -1.0}] * n}
        choices.append({"index": i, "text": "red", "logprobs": logprobs})
    return 200, {"choices": choices}


def refuse(request) -> tuple[int, dict]:
    """Refuse a key, and repeat it."""
    return (401, {"error": f"Invalid: {request.headers['Authorization']}"}) if request.command == "POST" else (404, {})


@pytest.mark.slow
def test_prompts_beyond_a_servers_window_are_counted(tiny_model, forked, tmp_path, monkeypatch, caplog):
    """Really run, past a proxy that is dead: 3,000 tokens arrive whole in a window of 4,096, 5,000 do not.

    Scored are three choices behind each prompt, and one answer is generated behind each.
    """
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    place = tmp_path / "model"
    shutil.copytree(tiny_model(), place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    tokenizer = AutoTokenizer.from_pretrained(place)
    unit = next(word for word in (" a", " the", " e", "a") if len(tokenizer.encode(word * 100)) == 100)
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": unit * n, "choices": COLOURS, "answer": 0} for n in (10, 3000, 5000)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}", "metadata": {"version": 1},
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
    }  # fmt: skip
    scored = {
        "task": "scored", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    written = {
        "task": "written", "output_type": "generate_until", "doc_to_target": "red",
        "metric_list": [{"metric": "exact_match"}], "generation_kwargs": {"max_gen_toks": 50, "until": ["."]},
    }  # fmt: skip
    for task in (scored, written):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(common | task))
    with answering(write_on) as server:
        keys = dict(SERVER | IDS, server_urls=server.url, harness_tasks=["scored", "written"])
        args = {"include_path": str(folder), "apply_chat_template": False}
        found = run_harness(model(place, **keys), recipe(**keys, harness_args=args), tmp_path / "out")
    lengths = [len(ids) for request in server.requests for ids in request.body.get("prompt", [])]
    assert sorted(n for n in lengths if n > 3500) == [4095 - 50, 4095, 4095, 4095]
    assert sum(3000 <= n < 3100 for n in lengths) == 4
    assert {row["task"]: row["value"] for row in found} == {"scored": 1.0, "written": 1.0}
    assert [row["cut"] for row in found] == [4, 4]
    assert "toy: lm-evaluation-harness cut prompts" in caplog.text and "says so 4 times" in caplog.text
    results = {"models": [{"name": "toy"}], "summary": [], "harness": found}
    assert harness_table(results).notes[1:] == [
        f"lm-evaluation-harness: toy {version('lm_eval')}.",
        "toy: prompts beyond its window lost their beginning, 4 times by the harness' log.",
    ]


KEY = "sk-SENTINEL-0123456789"


@pytest.mark.slow
def test_a_servers_key_is_in_no_file_of_a_run(tiny_model, tasks, forked, tmp_path, monkeypatch, capfd, caplog):
    """Really run against a server that refuses and repeats the key; command line, files, log and sentence lack it."""
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **kw: (started.append(command), popen(command, **kw))[1])
    monkeypatch.setenv("MY_KEY", f"\t{KEY}\n")
    with answering(refuse) as server:
        keys = dict(SERVER | IDS, server_urls=server.url, api_key_env="MY_KEY")
        args = {"include_path": str(tasks), "apply_chat_template": False, "model_args": {"max_retries": 1}, "limit": 1}
        # of requests that run together one is refused (401) and others may find the connection closed
        with pytest.raises(DataError, match="ended with 1 for toy: .*(401|ServerDisconnected)") as error:
            run_harness(model(tiny_model(), **keys), recipe(**keys, harness_args=args), tmp_path)
    assert any(request.body for request in server.requests)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.json", "rows.json", "log.txt"} <= {path.name for path in files}
    shown = "".join(traceback.format_exception(error.value)) + caplog.text + "".join(capfd.readouterr()) + str(started)
    assert KEY not in shown and not [path for path in files if KEY.encode() in path.read_bytes()]
    assert "Invalid: Bearer ***" in (tmp_path / "harness/toy/log.txt").read_text(), "the server got another key"


def test_a_key_in_parts_is_not_to_be_read():
    text = b"ab KEYS KEYKEYS\n KEK"
    for size in range(1, len(text)):
        parts = [text[i : i + size] for i in range(0, len(text), size)]
        assert b"".join(_without(b"KEYS", iter(parts))) == b"ab *** KEY***\n KEK"
        assert list(_without(b"", iter(parts))) == [*parts, b""]


def test_the_process_has_the_servers_key_and_no_proxy_to_this_machine(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "another server's")
    monkeypatch.setenv("NO_PROXY", "a.b")
    assert _environment(None, "")["OPENAI_API_KEY"] == "another server's"
    found = _environment("http://localhost:8000/v1/completions", "k")
    assert found["OPENAI_API_KEY"] == "k" and found["no_proxy"] == found["NO_PROXY"] == "a.b,localhost"
    far = _environment("http://far:8000/v1/completions", "")
    assert far["OPENAI_API_KEY"] == "" and far["NO_PROXY"] == "a.b" and "no_proxy" not in far


def test_groups_patterns_and_metrics(tmp_path):
    """A group with a number of its own is one row, one without is its tasks; a filter stands behind the metric."""
    found = {
        "results": {
            "bbh": {"alias": "bbh", "acc_norm,none": 0.4, "acc_norm_stderr,none": 0.1},
            "bbh_a": {"acc_norm,none": 0.3, "acc_norm_stderr,none": "N/A"},
            "bbh_b": {"acc_norm,none": 0.5, "acc_norm_stderr,none": 0.2},
            "follow": {"alias": "follow"},
            "ifeval": {"strict,none": 0.6, "strict_stderr,none": "N/A", "sample_len": 5, "exact,flexible": 1},
        },
        "group_subtasks": {"bbh": ["bbh_a", "bbh_b"], "follow": ["ifeval"]},
        "n-samples": {name: {"original": 9, "effective": n} for name, n in (("bbh_a", 2), ("bbh_b", 3), ("ifeval", 5))},
    }
    (tmp_path / "r.json").write_text(json.dumps(found))

    def rows(*tasks):
        found = read_results(tmp_path / "r.json", "m", list(tasks))
        return [tuple(row[name] for name in ("task", "metric", "value", "stderr", "n")) for row in found]

    assert rows("bbh") == [("bbh", "acc_norm", 0.4, 0.1, 5)]
    follow = [("ifeval", "strict", 0.6, None, 5), ("ifeval", "exact (flexible)", 1, None, 5)]
    assert rows("follow") == follow == rows("follow", "ifeval")
    assert [row[0] for row in rows("bbh_*")] == ["bbh_a", "bbh_b"]


def test_the_leaderboard_recipe_names_tasks_of_the_harness():
    """Each is a file or a group of the installed package, and MMLU-Pro to GPQA are the paper's five."""
    keys = yaml.safe_load(LEADERBOARD.read_text())
    folder = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks" / "leaderboard"
    text = "\n".join(path.read_text() for path in folder.rglob("*.yaml"))
    assert len(keys["harness_tasks"]) == 5
    for name in keys["harness_tasks"]:
        assert f"\ntask: {name}\n" in f"\n{text}" or f"\ngroup: {name}\n" in f"\n{text}", name


def test_the_leaderboard_recipe_through_the_parser():
    found = configuration(model(), load_recipe(str(LEADERBOARD), ["harness_args.limit=20"]))
    assert found.pop("tasks") == yaml.safe_load(LEADERBOARD.read_text())["harness_tasks"]
    assert found.pop("model_args") == {"pretrained": "m", "dtype": "auto", "trust_remote_code": False}
    assert found == {"model": "hf", "apply_chat_template": True, "batch_size": "auto", "limit": 20}
