"""Measure time and peak memory of building contexts, on one core.

    python scripts/benchmark_data.py QUESTIONS                         # a file that `input` takes, such as MuSiQue
    python scripts/benchmark_data.py QUESTIONS --paragraphs 400000     # the size of MuSiQue's training file
    python scripts/benchmark_data.py QUESTIONS --model Qwen/Qwen2.5-7B-Instruct --template qwen

A small file stands for a large one: its questions are taken in turn, each time with another seed, and paragraphs are
added whose words are those of its own, shuffled. Without `--model` a tokenizer of 32,000 tokens is trained on the file.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from benchmark_documents import peak_kib


def simulate(work: Path, questions: list[dict], pairs: int, paragraphs: int) -> None:
    """Write questions.jsonl and corpus.jsonl with `pairs` questions and about `paragraphs` paragraphs."""
    rng = random.Random(0)
    pool = [p for question in questions for p in question["evidence"] + question["distractors"]]
    each = max(0, paragraphs - len(pool)) // pairs
    with open(work / "questions.jsonl", "w", encoding="utf-8") as file:
        for index in range(pairs):
            question = questions[index % len(questions)]
            more = []
            for source in rng.choices(pool, k=each):
                words = source["text"].split()
                more.append({"title": source["title"], "text": " ".join(rng.sample(words, len(words)))})
            own = question["distractors"] if index < len(questions) else []
            row = question | {"id": f"{question['id']}#{index}", "distractors": own + more}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    (work / "corpus.jsonl").write_text("")


def main() -> int:
    """Build the contexts and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions")
    parser.add_argument("--pairs", type=int, default=5000, help="short and long contexts to build (default 5000)")
    parser.add_argument("--paragraphs", type=int, default=0, help="add paragraphs up to this number")
    parser.add_argument("--model", help="whose tokenizer counts")
    parser.add_argument("--template", default="qwen")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the data recipe")
    args = parser.parse_intermixed_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    from make_tiny_model import train_tokenizer

    from solopo_plugin.qa.files import read_jsonl
    from solopo_plugin.qa.generate.calls import load_chat
    from solopo_plugin.qa.recipe import Chat, pick
    from solopo_plugin.synthesis import contexts, read
    from solopo_plugin.synthesis.recipe import load_recipe

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "recipe.yaml").write_text("{}")
        keys = {"input": args.questions, "template": args.template, "dataset_name": "benchmark", "work_dir": folder}
        keys["model_name_or_path"] = args.model or folder
        recipe = load_recipe(str(work / "recipe.yaml"), [f"{k}={v}" for k, v in keys.items()] + args.overrides)
        read.run(recipe, work)
        questions = list(read_jsonl(work / "questions.jsonl"))
        if not args.model:
            texts = [p["text"] for question in questions for p in question["evidence"] + question["distractors"]]
            train_tokenizer(texts, vocab_size=32000).save_pretrained(folder)
            (work / "config.json").write_text('{"model_type": "qwen2"}')
        simulate(work, questions, args.pairs, args.paragraphs)
        del questions
        load_chat(recipe.model_name_or_path, pick(recipe, Chat))  # imports are not what is measured
        started, peak = time.perf_counter(), peak_kib()
        counts = contexts.run(recipe, work)
        seconds = time.perf_counter() - started
        size = (work / "contexts.jsonl").stat().st_size
    after = peak_kib()
    print(json.dumps(counts))
    print(
        f"{counts['contexts']} short and long contexts from {counts['paragraphs']} paragraphs in {seconds:.1f} s on "
        f"one core, {size / 1e6:.0f} MB written; peak memory {after / 1024:.0f} MiB, "
        f"{peak / 1024:.0f} MiB of it before."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
