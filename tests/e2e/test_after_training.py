"""docs/after_training.md: its commands, run on a tiny model in the order of the page."""

import json
import os
import re
import shlex
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from conftest import BIN, ROOT, shell_environment
from zygote import Run

PAGE = (ROOT / "docs/after_training.md").read_text(encoding="utf-8").replace(" \\\n    ", " ")  # commands on one line


def commands(program: str) -> list[str]:
    """Return the page's commands that start a program, without the remarks behind them."""
    found = re.findall(rf"^((?:\w+=\S+ )*{re.escape(program)} .*?)(?: +#.*)?$", PAGE, re.MULTILINE)
    assert found, program
    return found


def typed(command: str, places: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """Words and environment of a command of the page, with folders for its capital words."""
    for name, place in places.items():
        command = re.sub(rf"\b{name}\b", place, command)
    words = shlex.split(command)
    at = words.index("llamafactory-cli")
    variables = dict(variable.split("=", 1) for variable in words[:at])
    return [str(BIN / words[at]), *words[at + 1 :]], shell_environment(PYTHONUNBUFFERED="1", **variables)


@pytest.fixture(scope="module")
def places(tiny_model, tmp_path_factory) -> dict[str, str]:
    """The model before training, a LoRA adapter trained on it, and where the merged one is to be."""
    from llamafactory.train.tuner import run_exp

    out = tmp_path_factory.mktemp("run")
    run_exp(dict(
        model_name_or_path=tiny_model(), stage="solopo", do_train=True, finetuning_type="lora", pref_loss="orpo",
        dataset="demo_solopo", dataset_dir=str(ROOT / "data"), max_samples=4, template="qwen", cutoff_len=1024,
        output_dir=str(out / "adapter"), max_steps=2, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True, per_device_train_batch_size=2,
    ))  # fmt: skip
    return {"MODEL": tiny_model(), "OUT": str(out / "adapter"), "MERGED": str(out / "merged")}


@pytest.mark.slow
def test_export_then_chat(zygote, places, tmp_path):
    """A LoRA adapter is merged by `llamafactory-cli export` and the merged model answers in `chat`."""
    (export,) = commands("llamafactory-cli export")
    words, env = typed(export, places)
    code, log = zygote.start(*words, log=tmp_path / "log.txt", env=env).wait(), tmp_path / "log.txt"
    assert code == 0 and os.path.exists(f"{places['MERGED']}/model.safetensors"), log.read_text()[-3000:]
    whole, adapter = commands("llamafactory-cli chat")
    assert "--adapter_name_or_path OUT" in adapter
    words, env = typed(whole, places | {"OUT": places["MERGED"]})
    done = subprocess.run(
        [*words, "--max_new_tokens", "4"], cwd=ROOT, env=env, text=True, input="Where?\nexit\n", capture_output=True,
        timeout=300,
    )  # fmt: skip
    # not the exit code: the host's engine leaves a thread that now and then aborts the interpreter on its way out
    assert len(done.stdout.split("Assistant:")) == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]


@pytest.mark.slow
def test_the_server_answers_the_request_of_the_page(zygote, places, tmp_path):
    """The adapter, not merged; asked twice at temperature 0 it says the same."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (api,) = commands("API_PORT=8000 API_MODEL_NAME=solo llamafactory-cli api")
    command = api.replace("--model_name_or_path OUT", "--model_name_or_path MODEL --adapter_name_or_path OUT")
    url, body = re.search(r"curl (\S+) .*?\n +-d '(\{.*\})'", PAGE).groups()
    words, env = typed(command.replace("8000", str(port)), places)
    process, log = zygote.start(*words, log=tmp_path / "log.txt", env=env), tmp_path / "log.txt"
    try:
        answers = [_post(url.replace("8000", str(port)), body, process, log) for _ in range(2)]
    finally:
        process.kill()
    assert answers[0]["model"] == "solo" and answers[0]["usage"]["prompt_tokens"] > 10
    assert answers[0]["choices"][0]["message"] == answers[1]["choices"][0]["message"]


def _post(url: str, body: str, process: Run, log: Path) -> dict:
    """Return what the server says, once it is up."""
    for _ in range(120):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            answer = httpx.post(url, content=body, headers={"Content-Type": "application/json"}, timeout=120)
            assert answer.status_code == 200, answer.text
            return answer.json()
        except httpx.ConnectError:
            time.sleep(1)
    raise AssertionError("the server did not come up within two minutes")


def test_evaluations_of_the_page_are_recipes():
    from solopo_plugin.evaluation.recipe import load_recipe

    for command in commands("python scripts/evaluate.py"):
        path, *overrides = shlex.split(command)[2:]
        recipe = load_recipe(str(ROOT / path), overrides)
        assert recipe.models and set(recipe.models) <= {"MODEL", "OUT"}


def test_yarn_of_a_saved_model_keeps_its_base(tmp_path):
    """As the page writes it into `rope_parameters`; as `rope_scaling` beside them it would not."""
    from transformers import AutoConfig, Qwen2Config

    from solopo_plugin.qa.window import window_of

    (yarn,) = map(json.loads, re.findall(r'`(\{"rope_type": .*?\})`', PAGE))
    Qwen2Config(rope_parameters={"rope_type": "default", "rope_theta": 1e6}).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for changed, base in (
        ({"rope_parameters": saved["rope_parameters"] | yarn}, 1e6),
        ({"rope_scaling": yarn}, 1e4),
    ):
        (tmp_path / "config.json").write_text(json.dumps(saved | changed))
        config = AutoConfig.from_pretrained(tmp_path)
        assert window_of(config) == 131072 and config.rope_parameters == yarn | {"rope_theta": base}
