"""A real vLLM server, a tiny model that its CPU kernels take, an adapter over it, and what they said."""

import json
import os
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import torch
from make_tiny_model import build
from material import make_questions
from scripted_server import free_port
from transformers import AutoModelForCausalLM

from solopo_plugin.qa.files import read_jsonl
from solopo_plugin.qa.generate.calls import load_chat
from solopo_plugin.qa.prompts import PROMPT
from solopo_plugin.qa.recipe import Chat

SERVER = os.environ.get("VLLM_SERVER", "")  # the interpreter that has it
# One thread wherever there is room, and nothing compiled, which would take longer than all that is asked
ON_CPU = dict(
    VLLM_CPU_KVCACHE_SPACE="1", OMP_NUM_THREADS="1", VLLM_CPU_OMP_THREADS_BIND="nobind", TORCH_COMPILE_DISABLE="1",
    HF_HUB_OFFLINE="1",
)  # fmt: skip
TWO_HEADS = dict(hidden_size=128, num_attention_heads=2, num_key_value_heads=1)  # of 64: vLLM has no kernel for 16

SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["place", "count"],
    "properties": {"place": {"enum": ["harbour", "orchard"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
}  # fmt: skip


class Server:
    """vLLM with the model in `folder`/model, called `base`."""

    def __init__(self, folder: Path, port: int, options: str = ""):
        self.folder, self.port, self.options, self.url = folder, port, options, f"http://127.0.0.1:{port}/v1"
        self.start()

    def start(self) -> None:
        # With chunked prefill a request with a seed kills the engine of 0.32 on a CPU
        words = f"""-m vllm.entrypoints.openai.api_server --model {self.folder / "model"} --served-model-name base
            --max-model-len 2048 --enforce-eager --dtype float32 --host 127.0.0.1 --port {self.port}
            --no-enable-chunked-prefill --generation-config vllm {self.options}"""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ON_CPU
        with open(self.folder / "server.log", "a") as log:
            self.process = subprocess.Popen(
                [SERVER, *words.split()], env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                httpx.get(f"{self.url}/models").raise_for_status()
                return
            except httpx.HTTPError:
                time.sleep(0.5)
        pytest.fail((self.folder / "server.log").read_text()[-3000:])

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def serving(folder: Path, options: str = ""):
    """The server that has `folder`/model, ready; it ends with the block."""
    server = Server(folder, free_port(), options)
    try:
        server.wait()
        yield server
    finally:
        server.kill()


def make_model(folder: Path) -> str:
    """Sharp logits, answers of which some end, the host's chat template.

    Of `llama`: for `qwen2` transformers 5.19, a server's, splits texts as Qwen's own tokenizer does, whatever the files
    say, and digits become other tokens than in training.
    """
    texts = [p["text"] for row in make_questions(200, seed=-1) for p in row["evidence"] + row["distractors"]]
    build(str(folder), texts + [PROMPT] * 50, "llama", tokens=1200, **TWO_HEADS)
    tokenizer = save_with_template(folder)
    network = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        weight = network.get_output_embeddings().weight
        weight.mul_(8)
        weight[tokenizer.convert_tokens_to_ids("<|im_end|>")] = weight[400] * 1.05
    network.save_pretrained(folder)
    return str(folder)


def save_with_template(folder: Path):
    """Write the host's chat template into the tokenizer of a folder; returns it."""
    tokenizer, _ = load_chat(str(folder), Chat(template="qwen"))
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_adapter(base: str, folder: Path, seed: int) -> str:
    """A LoRA adapter with random weights."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return str(folder)


def whole(text: str) -> str:
    """The text without a torn character at its end, of which vLLM shows nothing."""
    return text.rstrip("\ufffd")


def texts_of(folder: Path, model: str) -> dict[str, tuple]:
    """Prompt tokens, text and end of each answer of a model, by question."""
    rows = [row for row in read_jsonl(folder / "answers" / f"{model}.jsonl") if "fingerprint" not in row]
    return {row["id"]: (row["prompt_tokens"], whole(row["text"]), row["finish_reason"]) for row in rows}


def assert_keep_to_schema(answers: list[tuple[str, str]]) -> None:
    """Most answers end by themselves and are what SCHEMA says; one that was cut is no JSON."""
    found = [json.loads(text) for text, reason in answers if reason == "stop"]
    assert len(found) > len(answers) // 2
    for value in found:
        assert value.keys() == {"place", "count"} and value["place"] in ("harbour", "orchard")
        assert value["count"] in range(10)
