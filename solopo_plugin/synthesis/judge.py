"""Stage 4: which answers are right, by `answers.gives_answer`: what follows `The answer is:` holds a gold answer.

Reads contexts.jsonl and samples.<side>.jsonl; writes judged.<side>.jsonl, a line per answer in the same order: the
sample's {"id", "k", "text", "finish_reason"} and {"answer": what follows the marker, or null, "correct", "em", "f1"}.

With `judge: model` an answer is right whose grade (verdicts.py) is `judge_chosen_min` or more. A line then has, beside
the sample's, {"answer": what was judged, or null, "correct", "grade": from 1 to 10, or null, "rule": whether it holds a
gold answer, or null for a question that has none}.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from ..qa.answers import NO_ANSWER, extract_answer, f1_of_words, gives_answer, judged_form
from ..qa.files import read_jsonl, write_jsonl
from ..qa.store import Store
from . import verdicts
from .recipe import DataRecipe

log = logging.getLogger(__name__)
SHOWN = 5  # answers without the marker that the manifest names


def run(recipe: DataRecipe, work: Path) -> dict:
    """Judge the answers of both sides; returns the counts of each."""
    golds = {row["id"]: row["answers"] for row in read_jsonl(work / "contexts.jsonl")}
    if recipe.judge == "model":
        with Store(work / verdicts.STORE) as store:
            judged = {side: grade_side(recipe, work, side, golds, store) for side in ("short", "long")}
    else:
        judged = {side: judge_side(work, side, golds, recipe.prompt) for side in ("short", "long")}
    return {side: counts for side, counts in judged.items() if counts["answers"]}


def judge(text: str, golds: list[str]) -> dict:
    """Judge one answer by the text after its marker; without the marker it is wrong, and so is `No answer`.

    EM and F1 are SQuAD's, but of texts in `judged_form`.
    """
    answer, correct = extract_answer(text), gives_answer(text, golds)
    form, gold_forms = judged_form(answer or ""), list(map(judged_form, golds))
    if answer is None or (form == NO_ANSWER and not correct):
        return {"answer": answer, "correct": False, "em": False, "f1": 0.0}
    f1 = max((f1_of_words(form.split(), gold.split()) for gold in gold_forms), default=0.0)
    return {"answer": answer, "correct": correct, "em": form in gold_forms, "f1": round(f1, 4)}


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
    f1, right = 0.0, Counter[str]()
    without: list[dict] = []

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


def grade_side(recipe: DataRecipe, work: Path, side: str, golds: dict[str, list[str]], store: Store) -> dict:
    """Have a model judge the answers to one side's prompts; returns counts, mean grade and agreement with the rule."""
    grades = verdicts.grade_side(recipe, work, side, store)
    counts: Counter = Counter(answers=0, correct=0, no_marker=0, not_judged=0, no_grade=0, cut=0)
    agreement, right = Counter(both_right=0, only_model=0, only_rule=0, both_wrong=0), Counter[str]()

    def rows() -> Iterator[dict]:
        for sample in read_jsonl(work / f"samples.{side}.jsonl"):
            name, said = sample["id"], verdicts.to_be_judged(sample)
            grade = grades.by_answer.get((name, sample["k"]))
            correct = grade is not None and grade >= recipe.judge_chosen_min
            rule = gives_answer(sample["text"], golds[name]) if golds[name] else None
            counts.update(answers=1, correct=correct, not_judged=said is None, cut=sample["finish_reason"] == "length")
            counts["no_grade"] += said is not None and grade is None
            right[name] += correct
            if rule is not None and grade is not None:
                both = {(True, True): "both_right", (True, False): "only_model", (False, True): "only_rule"}
                agreement[both.get((correct, rule), "both_wrong")] += 1
            row = {key: sample[key] for key in ("id", "k", "text", "finish_reason")}
            yield row | {"answer": said, "correct": correct, "grade": grade, "rule": rule}

    write_jsonl(work / f"judged.{side}.jsonl", rows())
    known = grades.by_answer.values()
    mean = round(sum(known) / len(known), 4) if known else None
    solved = {"questions": len(right), "never_right": sum(v == 0 for v in right.values())}
    report = {**counts, "graded": len(known), "mean_grade": mean, **grades.report(), **solved}
    if lost := report["malformed"]:
        log.warning(
            "%d of %d verdicts on the answers to the %s contexts cannot be read (%.1f %%); %d answers have no grade.",
            lost, report["verdicts"], side, 100 * lost / report["verdicts"], counts["no_grade"],
        )  # fmt: skip
    if n := agreement.total():
        share = round((agreement["both_right"] + agreement["both_wrong"]) / n, 4)
        report["agreement_with_rule"] = {"answers": n, "share": share, **agreement}
    return report
