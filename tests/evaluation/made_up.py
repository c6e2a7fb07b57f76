"""A folder as an evaluation leaves it, of made-up questions and answers: models that are right with known chances."""

import random
from pathlib import Path

from solopo_plugin.evaluation.items import MAIN_METRIC, Item
from solopo_plugin.evaluation.results import make_results
from solopo_plugin.evaluation.score import write_scores
from solopo_plugin.qa.files import write_json, write_jsonl

TITLE = "Demonstration: made-up questions and answers, no model was run"
LENGTHS = (4096, 8192, 16384, 32768)
LONGBENCH = ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique")
CHANCES = {"made-up-a": (0.55, 0.10), "made-up-b": (0.62, 0.07), "made-up-c": (0.70, 0.02)}  # at 4k, less per doubling


def item(benchmark: str, task: str, number: int, **changes) -> Item:
    """A question with two passages of evidence between paragraphs that say nothing."""
    rng = random.Random(f"{benchmark}/{task}/{number}/{changes}")
    town, person, firm = f"Town{number}ville", f"Person {number}", f"Firm {number}"
    documents = [f"Document about nothing in particular, number {i}." for i in range(30)]
    facts = [f"{person} works for {firm}.", f"{firm} sits in {town}."]
    for fact, place in zip(facts, sorted(rng.sample(range(30), 2)), strict=True):
        documents[place] = fact
    question = f"In which town does {person} work?"
    prompt = "\n\n".join([*documents, f"Question: {question} End with `The answer is: ...`."])
    evidence = []
    for fact in facts:
        start = prompt.index(fact)
        evidence.append({"paragraph": documents.index(fact) + 1, "start": start, "end": start + len(fact)})
    name = "-".join(map(str, (number, *changes.values()))).replace(" ", "")
    place = dict(id=f"{task}-{name}", prompt=prompt, question=question, answers=[town], evidence=evidence)
    return Item(benchmark, task, **place | changes)


def items(per_cell: int = 6) -> list[Item]:
    """Questions of every benchmark."""
    made = [item("longbench_qa", task, i) for task in LONGBENCH for i in range(4 * per_cell)]
    for task in ("squad", "hotpotqa", "musique"):
        made += [item("ruler_qa", task, i, length=length) for length in LENGTHS for i in range(2 * per_cell)]
    for task in ("single", "multi"):
        cells = [(length, depth) for length in LENGTHS for depth in range(0, 101, 10)]
        made += [item("niah_plus", task, i, length=n, depth=float(d)) for n, d in cells for i in range(per_cell)]
    for i in range(8 * per_cell):
        groups = {"difficulty": ("easy", "hard")[i % 2], "length": ("short", "medium", "long")[i % 3]}
        made.append(item("longbench_v2", "all", i, kind="choice", answers=["ABCD"[i % 4]], groups=groups))
    made += [item("validation", task, i) for task in ("short", "long") for i in range(6 * per_cell)]
    return made + [item("plain", "own", i) for i in range(4 * per_cell)]


def answer(it: Item, model: str) -> dict:
    """Right with the model's chance, which falls with length; otherwise half right, wrong, unmarked or empty."""
    rng = random.Random(f"{model}/{it.key}")
    start, loss = CHANCES.get(model, (0.5, 0.05))
    doublings = (it.length or {"short": 1024}.get(it.task, 8192)).bit_length() - 13
    right = rng.random() < start - loss * doublings
    if it.kind == "choice":
        letter = it.answers[0] if right else rng.choice([x for x in "ABCD" if x not in it.answers])
        text = f"Thinking it over. The correct answer is ({letter})."
    elif right:
        text = f"The documents say so, in two places. The answer is: {it.answers[0]}"
    else:
        town = it.answers[0]
        wrong = (f"The answer is: {town} or so it seems", "The answer is: No answer.", "I do not know.", "")
        text = rng.choices(wrong, (2, 6, 1, 0.3))[0]
    cut = 900 if it.benchmark == "longbench_qa" and rng.random() < 0.1 else 0
    finish = "length" if rng.random() < 0.01 else "stop"
    place = {"benchmark": it.benchmark, "task": it.task, "id": it.id, "prompt_hash": it.prompt_hash}
    tokens = {"prompt_tokens": it.length or 2048, "cut_tokens": cut}
    return place | tokens | {"text": text, "finish_reason": finish}


HARNESS = [
    {"model": "made-up-a", "task": "leaderboard_ifeval", "metric": "prompt_level_strict_acc", "value": 61.0,
     "stderr": 2.1, "n": 541, "version": "0.4.9"},
    {"model": "made-up-c", "task": "leaderboard_ifeval", "metric": "prompt_level_strict_acc", "value": 60.2,
     "stderr": None, "n": 541},
]  # fmt: skip


def write_folder(
    folder: Path, questions: list[Item], models: tuple[str, ...] = tuple(CHANCES), runs=None, rows=HARNESS, **changes
) -> dict:
    """items.jsonl, answers, scores and results.json; returns the results.

    Args:
        runs: The recipe's key.
        rows: Of lm-evaluation-harness; those of other models are left out.
        changes: Keys of results.json.
    """
    write_jsonl(folder / "items.jsonl", (it.as_dict() for it in questions))
    for model in models:
        answers = [answer(it, model) for it in questions]
        write_jsonl(folder / "answers" / f"{model}.jsonl", [{"fingerprint": "x"}, *answers])
    write_scores(folder, list(models))
    chosen_by = "validation" if any(it.benchmark == "validation" for it in questions) else None
    refs = [{"name": model, "path": f"saves/{model}", "adapter": None, "step": None} for model in models]
    harness = [row for row in rows if row["model"] in models]
    settings = {"seed": 3, "bootstrap_samples": 300, "select_by": chosen_by, "runs": runs}
    results = make_results(folder, refs, settings, harness)
    results |= {"title": TITLE, "date": "2026-01-01", "versions": {"solopo": "0"}} | changes
    write_json(folder / "results.json", results)
    return results


assert set(MAIN_METRIC) == {it.benchmark for it in items(1)}
