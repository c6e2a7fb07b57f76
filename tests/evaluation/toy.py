"""A benchmark of invented questions, and recipes that ask them, so that a run needs no file of a benchmark."""

import json
from pathlib import Path

from solopo_plugin.evaluation.items import Item
from solopo_plugin.evaluation.recipe import make_recipe

WORDS = "harbour lantern orchard ferry glazier winter ledger copper bridge meadow violin anchor".split()


def item(i: int, words: int = 12, **keys) -> Item:
    """Question i, with a context of so many words."""
    context = " ".join(WORDS[(i + k) % len(WORDS)] for k in range(words))
    question = f"Where does person {i} work?"
    base = dict(benchmark="plain", task=f"part{i % 2}", id=f"q{i}", question=question, answers=[f"Town {i}"])
    return Item(**base | dict(prompt=f"Begin {i}. {context}.\n\n{question}\nEnd with `The answer is: ...`.") | keys)


def benchmark(n: int = 20, **keys):
    """What BENCHMARKS holds: n questions; `made` counts how often they were made."""

    def items(recipe, tokenizer, template):
        items.made += 1
        yield from (item(i, **keys) for i in range(n))

    items.made = 0
    return items


def recipe_in(folder: Path, model: str | dict | list, **keys):
    (folder / "plain.jsonl").touch()
    base = dict(models=model, template="qwen", benchmarks=["plain"], plain_data=str(folder / "plain.jsonl"))
    return make_recipe(base | dict(output_dir=str(folder / "out"), backend="transformers", max_new_tokens=8) | keys)


def answers_for(path: Path, n: int = 20) -> Path:
    """The file of right answers for the scripted server."""
    path.write_text(json.dumps({item(i).question: f"Town {i}" for i in range(n)}))
    return path


def answers(folder: Path, name: str) -> list[dict]:
    """Lines of answers/<name>.jsonl but the first."""
    lines = (folder / "answers" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[1:]]


def weights(text: str = "weights") -> bytes:
    """Return a file of safetensors with one tensor of these letters."""
    data = text.encode()
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    return len(header).to_bytes(8, "little") + header + data


def make_adapter(base: str, folder, seed: int) -> str:
    """A LoRA adapter with random weights, as peft writes it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(r=12, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return str(folder)
