"""A folder as an evaluation leaves it, of made-up questions and answers: models that are right with known chances."""

import random
from pathlib import Path

from solopo_plugin.evaluation.items import MAIN_METRIC, Item
from solopo_plugin.metrics import exact_match, extract_answer, f1_score, string_match_part, sub_exact_match
from solopo_plugin.synthesis.files import write_json, write_jsonl

TITLE = "Demonstration: made-up questions and answers, no model was run"
LENGTHS = (4096, 8192, 16384, 32768)
LONGBENCH = ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique")
CHANCES = {"instruct": (0.55, 0.10), "orpo-long": (0.62, 0.07), "solo-orpo": (0.70, 0.02)}  # at 4k, less per doubling


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


def score(it: Item, row: dict) -> dict:
    text, found = row["text"], extract_answer(row["text"])
    said = text if found is None else found
    if it.kind == "choice":
        right = f"({it.answers[0]})" in text
        found, scores = text[-3], {"accuracy": 100.0 * right, "parsed": 100.0}
    else:
        scores = {
            "f1": 100 * f1_score(said, it.answers), "em": 100.0 * exact_match(said, it.answers),
            "sub_em": 100.0 * sub_exact_match(said, it.answers), "string_match": string_match_part(text, it.answers),
        }  # fmt: skip
    names = ("benchmark", "task", "id", "prompt_tokens", "cut_tokens", "finish_reason")
    more = {"length": it.length, "depth": it.depth, "groups": it.groups, "evidence_depth": None}
    facts = {"prediction": found, "marker": found is not None, "empty": not text, "scores": scores}
    return {name: row[name] for name in names} | facts | more


def groups_of(row: dict) -> list[str]:
    made = ["", *(f"{name}={value}" for name, value in row["groups"].items())]
    if row["length"]:
        made.append(f"length={row['length']}")
    if row["depth"] is not None:
        made += [f"depth={row['depth']:g}", f"length={row['length']},depth={row['depth']:g}"]
    return made


def mean(values: list[float]) -> dict:
    """With an interval of the normal approximation, which is enough here."""
    m, n = sum(values) / len(values), len(values)
    half = 1.96 * (sum((v - m) ** 2 for v in values) / max(1, n - 1) / n) ** 0.5
    return {"n": n, "value": m, "low": m - half, "high": m + half}


def summary(model: str, rows: list[dict]) -> list[dict]:
    values: dict[tuple, list[float]] = {}
    for row in rows:
        for group in groups_of(row):
            for metric, value in row["scores"].items():
                for task in (row["task"], ""):
                    values.setdefault((row["benchmark"], task, group, metric), []).append(value)
    names = ("benchmark", "task", "group", "metric")
    return [{"model": model} | dict(zip(names, key, strict=True)) | mean(v) for key, v in values.items()]


def compare(a: str, b: str, rows_a: list[dict], rows_b: list[dict]) -> list[dict]:
    values: dict[tuple, list[float]] = {}
    for row_a, row_b in zip(rows_a, rows_b, strict=True):
        for metric, value in row_a["scores"].items():
            for task in (row_a["task"], ""):
                pair = values.setdefault((row_a["benchmark"], task, metric), [])
                pair.append(row_b["scores"][metric] - value)
    made = []
    for (benchmark, task, metric), gains in values.items():
        facts = mean(gains)
        facts["difference"] = facts.pop("value")
        wins, losses = sum(g > 0 for g in gains), sum(g < 0 for g in gains)
        tally = {"p_value": 0.04, "wins": wins, "losses": losses, "ties": len(gains) - wins - losses}
        made.append({"a": a, "b": b, "benchmark": benchmark, "task": task, "metric": metric} | facts | tally)
    return made


HARNESS = [
    {"model": "instruct", "task": "leaderboard_ifeval", "metric": "prompt_level_strict_acc", "value": 61.0,
     "stderr": 2.1, "n": 541},
    {"model": "solo-orpo", "task": "leaderboard_ifeval", "metric": "prompt_level_strict_acc", "value": 60.2,
     "stderr": None, "n": 541},
]  # fmt: skip


def write_folder(folder: Path, questions: list[Item], models: tuple[str, ...] = tuple(CHANCES), **changes) -> dict:
    """items.jsonl, answers, scores and results.json; returns the results. `changes` are keys of results.json."""
    write_jsonl(folder / "items.jsonl", (it.as_dict() for it in questions))
    scores = {}
    for model in models:
        answers = [answer(it, model) for it in questions]
        write_jsonl(folder / "answers" / f"{model}.jsonl", [{"fingerprint": "x"}, *answers])
        scores[model] = [score(it, row) for it, row in zip(questions, answers, strict=True)]
        write_jsonl(folder / "scores" / f"{model}.jsonl", scores[model])
    results = {
        "title": TITLE,
        "date": "2026-01-01",
        "settings": {"seed": 3, "models": list(models), "temperature": 0.0, "max_samples": None},
        "versions": {"solopo": "0"},
        "models": [
            {
                "name": model, "path": f"saves/{model}", "adapter": None, "step": None,
                "counts": {
                    "asked": len(rows), "cut": sum(row["cut_tokens"] > 0 for row in rows),
                    "no_marker": sum(not row["marker"] for row in rows), "empty": sum(row["empty"] for row in rows),
                    "stopped_by_length": sum(row["finish_reason"] == "length" for row in rows),
                },
            }
            for model, rows in scores.items()
        ],
        "summary": [line for model, rows in scores.items() for line in summary(model, rows)],
        "comparisons": [
            line for model in models[1:] for line in compare(models[0], model, scores[models[0]], scores[model])
        ],
        "selection": {
            "benchmark": "validation", "metric": "sub_em", "best": models[-1], "ranking": list(models),
            "warning": "The selection set is also reported: its numbers flatter the checkpoint that it chose.",
        },
        "harness": [row for row in HARNESS if row["model"] in models],
    }  # fmt: skip
    write_json(folder / "results.json", results | changes)
    return results | changes


assert set(MAIN_METRIC) == {it.benchmark for it in items(1)}
