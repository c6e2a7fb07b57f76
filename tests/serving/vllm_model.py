"""A tiny model that vLLM's CPU kernels take, an adapter over it, and what they said."""

from pathlib import Path

import torch
from make_tiny_model import build
from material import make_questions
from transformers import AutoModelForCausalLM

from solopo_plugin.qa.files import read_jsonl
from solopo_plugin.qa.generate.calls import load_chat
from solopo_plugin.qa.prompts import PROMPT
from solopo_plugin.qa.recipe import Chat

# One thread wherever there is room, and nothing compiled, which would take longer than all that is asked
ON_CPU = dict(
    VLLM_CPU_KVCACHE_SPACE="1", OMP_NUM_THREADS="1", VLLM_CPU_OMP_THREADS_BIND="nobind", TORCH_COMPILE_DISABLE="1",
    HF_HUB_OFFLINE="1",
)  # fmt: skip


def make_model(folder: Path) -> str:
    """Heads of 64 (vLLM has no kernel for 16), sharp logits, answers of which some end; the host's chat template.

    Of `llama`: for `qwen2` transformers 5.19, a server's, splits texts as Qwen's own tokenizer does, whatever the files
    say, and digits become other tokens than in training.
    """
    texts = [p["text"] for row in make_questions(200, seed=-1) for p in row["evidence"] + row["distractors"]]
    shape = dict(hidden_size=128, num_attention_heads=2, num_key_value_heads=1)
    build(str(folder), texts + [PROMPT] * 50, "llama", tokens=1200, **shape)
    tokenizer, _ = load_chat(str(folder), Chat(template="qwen"))  # has written the template into it
    tokenizer.save_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        weight = network.get_output_embeddings().weight
        weight.mul_(8)
        weight[tokenizer.convert_tokens_to_ids("<|im_end|>")] = weight[400] * 1.05
    network.save_pretrained(folder)
    return str(folder)


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
