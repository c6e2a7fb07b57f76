"""Choose questions for the page's reader: few, by a seed, with each model's answer and where evidence was."""

import hashlib
from pathlib import Path

from ...qa.files import read_jsonl
from ..items import main_metric
from ..score import stored_answers

QUESTIONS = 400  # at most, evenly over benchmarks and tasks
CHARACTERS = 4_000_000  # of answers in the page; with many models each answer gets less
ANSWER, PASSAGE, AROUND = (300, 2000), 500, 80  # characters: of an answer (least, most), of evidence, on its sides
PASSAGES = 8  # shown with their text; the bar shows all

Key = tuple[str, str, str]


def key_of(row: dict) -> Key:
    """Return the name of a question, as in all files of an evaluation."""
    return row["benchmark"], row["task"], row["id"]


def choose(scores: dict[str, list[dict]], seed: int, n: int = QUESTIONS) -> set[Key]:
    """Return at most `n` questions, as many of each task where there are enough; the same for the same seed."""
    strata: dict[tuple, dict[Key, str]] = {}
    for key in {key_of(row) for rows in scores.values() for row in rows}:
        rank = hashlib.sha256(repr((seed, key)).encode("utf-8", "replace")).hexdigest()
        strata.setdefault(key[:2], {})[key] = rank
    ordered = [sorted(ranks, key=ranks.__getitem__) for _, ranks in sorted(strata.items())]
    turns = [(i, j) for j, keys in enumerate(ordered) for i in range(len(keys))]
    return {ordered[j][i] for i, j in sorted(turns)[:n]}


def read_questions(output_dir: Path, scores: dict[str, list[dict]], seed: int) -> tuple[list[dict], int]:
    """Return what the page shows of the chosen questions, and how many questions there are.

    Args:
        output_dir: Folder of the evaluation.
        scores: Model -> lines of its scores file.
        seed: Of the choice.
    """
    chosen = choose(scores, seed)
    shown, total = {}, 0
    for item in read_jsonl(output_dir / "items.jsonl"):
        total += 1
        if key_of(item) in chosen:
            shown[key_of(item)] = _question(item)
    most = min(ANSWER[1], max(ANSWER[0], CHARACTERS // max(1, len(shown) * len(scores))))
    for model, lines in scores.items():
        by_key = {key_of(row): row for row in lines if key_of(row) in shown}
        for _, answer in stored_answers(output_dir / "answers" / f"{model}.jsonl"):
            if row := by_key.get(key_of(answer)):
                shown[key_of(answer)]["by"][model] = _answer(row, answer["text"], most)
    return [row for row in shown.values() if row["by"]], total


def shorten(text: str, most: int) -> str:
    """Return both ends of a text that is too long, and how much of it is not shown."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}\n[... {len(text) - 2 * (most // 2)} characters not shown ...]\n{text[-(most // 2) :]}"


def _question(item: dict) -> dict:
    prompt = item["prompt"]
    facts = {"length asked for": item["length"], "depth asked for, %": item["depth"], **item["groups"]}
    facts = {name: value for name, value in facts.items() if value is not None}
    places = sorted(item["evidence"], key=lambda place: place["start"])
    return {
        "benchmark": item["benchmark"],
        "task": item["task"],
        "id": item["id"],
        "question": shorten(item["question"], ANSWER[1]),
        "answers": [shorten(answer, PASSAGE) for answer in item["answers"][:10]],
        "facts": facts | {"characters of the prompt": len(prompt)},
        "marks": [[place["start"] / len(prompt), place["end"] / len(prompt)] for place in places],
        "evidence": [
            {
                "paragraph": place.get("paragraph"),
                "before": prompt[max(0, place["start"] - AROUND) : place["start"]],
                "text": shorten(prompt[place["start"] : place["end"]], PASSAGE),
                "after": prompt[place["end"] : place["end"] + AROUND],
            }
            for place in places[:PASSAGES]
        ],
        "by": {},
    }


def _answer(row: dict, text: str, most: int) -> dict:
    names = ("prompt_tokens", "cut_tokens", "server_tokens", "finish_reason")
    return {
        "text": shorten(text, most),
        "prediction": None if row["prediction"] is None else shorten(row["prediction"], PASSAGE),
        "scores": {name: round(value, 1) for name, value in row["scores"].items()},
        "score": row["scores"].get(main_metric(row["benchmark"], row["scores"])),
        "facts": {name: row[name] for name in names if name in row},
    }
