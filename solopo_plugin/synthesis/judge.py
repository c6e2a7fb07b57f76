"""Stage 4: which answers are right, by `answers.gives_answer`: what follows `The answer is:` holds a gold answer.

Reads contexts.jsonl and samples.<side>.jsonl; writes judged.<side>.jsonl, a line per answer in the same order: the
sample's {"id", "k", "text", "finish_reason"} and {"answer": what follows the marker, or null, "correct", "em", "f1"}.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from ..qa.answers import NO_ANSWER, exact_match, extract_answer, f1_score, gives_answer, judged_form
from ..qa.files import read_jsonl, write_jsonl
from .recipe import DataRecipe

log = logging.getLogger(__name__)
SHOWN = 5  # answers without the marker that the manifest names


def run(recipe: DataRecipe, work: Path) -> dict:
    """Judge the answers of both sides; returns the counts of each."""
    golds = {row["id"]: row["answers"] for row in read_jsonl(work / "contexts.jsonl")}
    judged = {side: judge_side(work, side, golds, recipe.prompt) for side in ("short", "long")}
    return {side: counts for side, counts in judged.items() if counts["answers"]}


def judge(text: str, golds: list[str]) -> dict:
    """Judge one answer by the text after its marker; without the marker it is wrong, and so is `No answer`.

    EM and F1 are SQuAD's, of texts in `judged_form`.
    """
    answer, correct = extract_answer(text), gives_answer(text, golds)
    form, gold_forms = judged_form(answer or ""), list(map(judged_form, golds))
    if answer is None or (form == NO_ANSWER and not correct):
        return {"answer": answer, "correct": False, "em": False, "f1": 0.0}
    em, f1 = exact_match(form, gold_forms), round(f1_score(form, gold_forms), 4)
    return {"answer": answer, "correct": correct, "em": em, "f1": f1}


def advice(prompt: str | None) -> str:
    """Return what to do where most answers lack the marker; `prompt` is the recipe's."""
    if prompt is not None and extract_answer(prompt) is None:
        return "`prompt` does not ask for that line: let it say that an answer ends with `The answer is: ...`"
    return (
        "the model ignores the format: check that `template` is its own, take an instruct model, or ask for that line "
        "more plainly in `prompt`"
    )


def judge_side(work: Path, side: str, golds: dict[str, list[str]], prompt: str | None = None) -> dict:
    """Judge the answers to one side's prompts; returns counts, mean scores and who forgot the marker."""
    counts: Counter = Counter(answers=0, correct=0, no_marker=0, no_answer=0, cut=0, em=0, ignored=0)
    f1, right, without = 0.0, Counter(), []

    def rows() -> Iterator[dict]:
        nonlocal f1
        samples = read_jsonl(work / f"samples.{side}.jsonl")
        for sample in tqdm(samples, desc=f"judge {side}", unit=" answers", disable=None):
            verdict = judge(sample["text"], golds[sample["id"]])
            unmarked = verdict["answer"] is None
            counts.update(
                answers=1, correct=verdict["correct"], em=verdict["em"], no_marker=unmarked,
                no_answer=not unmarked and judged_form(verdict["answer"]) == NO_ANSWER,
                cut=sample["finish_reason"] == "length",
                ignored=unmarked and bool(sample["text"].strip()) and sample["finish_reason"] != "length",
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
            "cut at `max_new_tokens`. The first: %s.%s",
            counts["no_marker"], n, side, 100 * counts["no_marker"] / n, counts["cut"],
            ", ".join(f"{where['id']} k={where['k']}" for where in without),
            f" Most do: {advice(prompt)}." if 2 * counts["ignored"] > n else "",
        )  # fmt: skip
    em, _ = counts.pop("em"), counts.pop("ignored")
    scores = {"em": round(em / n, 4), "f1": round(f1 / n, 4)} if n else {}
    solved = {"questions": len(right), "never_right": sum(v == 0 for v in right.values())}
    return {**counts, **scores, **solved, "first_without_marker": without}
