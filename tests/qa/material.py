"""Invented questions with evidence and distractors, and recipes that use them; everything is made here."""

import random
from pathlib import Path

from conftest import SHARED_DATA

from solopo_plugin.qa.files import write_jsonl
from solopo_plugin.synthesis.recipe import DataRecipe, make_recipe

WORDS = (
    "harbour lantern orchard ferry glazier winter ledger copper bridge meadow violin anchor chapel barley quarry "
    "signal museum tailor garden canal market poet clock river tower bakery forest island printer ribbon"
).split()


def paragraph(rng: random.Random, words: int) -> str:
    """So many words, with a number that makes it the only one of its kind."""
    text = " ".join(rng.choice(WORDS) for _ in range(words))
    return f"{text.capitalize()}, no. {rng.randrange(10**9)}."


def make_questions(n: int, seed: int = 0, distractors: int = 8, longest: int = 60) -> list[dict]:
    """Plain rows: two to four hops, answers of one invented word that only the evidence holds."""
    rng = random.Random(f"material {seed}")
    rows = []
    for index in range(n):
        hops, answer = rng.randint(2, 4), f"Zq{index}x{rng.randrange(10**6)}"
        texts = [f"Step {k} of {index}. {paragraph(rng, rng.randint(5, 30))}" for k in range(hops)]
        texts[-1] += f" Its name is {answer}."
        others = [paragraph(rng, rng.randint(3, longest)) for _ in range(distractors)]
        rows.append({
            "id": f"q{index}", "question": f"Which name belongs to item {index} of the list?", "hops": hops,
            "answers": [answer, f"the {answer} item"],
            "evidence": [{"title": f"Item {index} part {k}", "text": text} for k, text in enumerate(texts)],
            "distractors": [{"title": rng.choice(WORDS), "text": text} for text in others],
        })  # fmt: skip
    return rows


def save_tokenizer(folder: Path, bos: str | None = None) -> str:
    """A tokenizer that knows the invented words, in a folder that can be `model_name_or_path`; there is no model."""
    from make_tiny_model import train_tokenizer

    from solopo_plugin.qa.prompts import PROMPT

    texts = [p["text"] for row in make_questions(200, seed=-1) for p in row["evidence"] + row["distractors"]]
    train_tokenizer(texts + [PROMPT] * 50, 1200, bos).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    return str(folder)


def recipe(folder: Path, model: str, questions: list[dict] | Path, **keys) -> DataRecipe:
    """A small recipe whose work folder is `folder`/work."""
    source = questions
    if not isinstance(questions, Path):
        source = folder / "questions.jsonl"
        write_jsonl(source, questions)
    base = dict(
        model_name_or_path=model, template="qwen", input=str(source), work_dir=str(folder / "work"), short_tokens=450,
        long_tokens=1200, dataset_name="made", dataset_dir=str(folder / "data"), num_samples=4, num_rows=20,
    )  # fmt: skip
    return make_recipe(base | keys)


MUSIQUE = SHARED_DATA / "musique_ans_dev_150.jsonl"
HOTPOTQA = SHARED_DATA / "hotpotqa_dev_40.jsonl"
