"""Stage 4: which answers are right: those whose text after `The answer is:` contains the gold answer or an alias.

Reads contexts.jsonl and samples.<side>.jsonl; writes judged.<side>.jsonl, a line per answer in the same order: the
sample's {"id", "k", "text", "finish_reason"} and {"answer": what follows the marker, or null, "correct", "em", "f1"}.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from ..metrics import NO_ANSWER, exact_match, extract_answer, f1_score, normalize_answer, sub_exact_match
from .files import read_jsonl, write_jsonl
from .recipe import DataRecipe

log = logging.getLogger(__name__)
SHOWN = 5  # answers without the marker that the report names


def run(recipe: DataRecipe, work: Path) -> dict:
    """Judge the answers of both sides; returns the report of each."""
    golds = {row["id"]: row["answers"] for row in read_jsonl(work / "contexts.jsonl")}
    report = {side: judge_side(work, side, golds) for side in ("short", "long")}
    return {side: counts for side, counts in report.items() if counts["answers"]}


def judge(text: str, golds: list[str]) -> dict:
    """Judge one answer by the text after its marker; without the marker it is wrong, and so is `No answer`."""
    answer = extract_answer(text)
    if answer is None or normalize_answer(answer) == NO_ANSWER:
        return {"answer": answer, "correct": False, "em": False, "f1": 0.0}
    return {
        "answer": answer,
        "correct": sub_exact_match(answer, golds),
        "em": exact_match(answer, golds),
        "f1": round(f1_score(answer, golds), 4),
    }


def judge_side(work: Path, side: str, golds: dict[str, list[str]]) -> dict:
    """Judge the answers to one side's prompts; returns counts, mean scores and who forgot the marker."""
    counts: Counter = Counter(answers=0, correct=0, no_marker=0, no_answer=0, cut=0, em=0)
    f1, right, without = 0.0, Counter(), []

    def rows() -> Iterator[dict]:
        nonlocal f1
        samples = read_jsonl(work / f"samples.{side}.jsonl")
        for sample in tqdm(samples, desc=f"judge {side}", unit=" answers", disable=None):
            verdict = judge(sample["text"], golds[sample["id"]])
            unmarked = verdict["answer"] is None
            counts.update(
                answers=1, correct=verdict["correct"], em=verdict["em"], no_marker=unmarked,
                no_answer=not unmarked and normalize_answer(verdict["answer"]) == NO_ANSWER,
                cut=sample["finish_reason"] == "length",
            )  # fmt: skip
            f1 += verdict["f1"]
            right[sample["id"]] += verdict["correct"]
            if unmarked and len(without) < SHOWN:
                without.append({"id": sample["id"], "k": sample["k"]})
            yield {**{key: sample[key] for key in ("id", "k", "text", "finish_reason")}, **verdict}

    write_jsonl(work / f"judged.{side}.jsonl", rows())
    n = counts["answers"]
    if counts["no_marker"]:
        log.warning(
            "%d of %d answers on the %s contexts (%.1f %%) lack `The answer is:` and count as wrong; %d answers were "
            "cut at `max_new_tokens`. The first: %s.",
            counts["no_marker"], n, side, 100 * counts["no_marker"] / n, counts["cut"],
            ", ".join(f"{where['id']} k={where['k']}" for where in without),
        )  # fmt: skip
    em = counts.pop("em")
    scores = {"em": round(em / n, 4), "f1": round(f1 / n, 4)} if n else {}
    solved = {"questions": len(right), "never_right": sum(v == 0 for v in right.values())}
    return {**counts, **scores, **solved, "first_without_marker": without}
