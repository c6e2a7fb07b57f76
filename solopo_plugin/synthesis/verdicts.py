"""Ask a model how good answers are by the evidence, for `judge: model`: a grade from 1 to 10 for each answer.

Every trial is asked twice, with its two parts in either order, and the two verdicts are averaged: what a judge gives to
a part for where it stands cancels. `judge_form: score` has one trial for each answer, whose parts are evidence and
answer. `judge_form: pairwise` compares answer k with k + 1, ..., k + `judge_rivals` in a circle, so that each answer is
in as many trials as any other; won is 10, lost 1, a tie 5.5, and an answer's grade is the mean over its trials.

Replies are in verdicts.db as soon as they arrive (qa/store.py), by who judges and by the prompt: whatever is asked
again is not asked anew. A trial counts if both of its orders can be read; half of one would bring the position back in.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from ..qa.answers import behind_thought
from ..qa.files import DataError, read_jsonl, shown
from ..qa.generate.calls import Call
from ..qa.generate.stored import Found, StopUnreadable, answer_missing
from ..qa.prompts import read_prompt_file
from ..qa.store import Store
from .recipe import DataRecipe, outside_inputs, rubric_file

STORE = "verdicts.db"  # its name in a work folder
LOWEST, HIGHEST = 1.0, 10.0  # grades
PLACES = {"score": ("question", "first", "second"), "pairwise": ("question", "evidence", "first", "second")}
LAST_LINE = {"score": "Score:", "pairwise": "Verdict:"}  # what the reply ends with
_SCORE = re.compile(r"\bscore[\s*_`]*:[\s*_`\[(]*(\d+(?:\.\d+)?)(?![\d.]*\d)", re.I)
_VERDICT = re.compile(r"\bverdict[\s*_`]*:[\s*_`\"'\[(]*(first|second|tie)\b", re.I)
_WORTH = {"first": HIGHEST, "second": LOWEST, "tie": (HIGHEST + LOWEST) / 2}
ANSWER_TAGS = ("first_answer", "second_answer")
# of what the judge is asked with, all that changes its replies
ASKED_WITH = "template enable_thinking backend openai_endpoint extra_body temperature max_new_tokens seed".split()


class Trial(NamedTuple):
    """Hold what is judged at once: an answer, perhaps its rival, and the prompts with the two parts in either order."""

    question: str
    k: int
    rival: int | None
    prompts: tuple[str, str]

    def ids(self) -> tuple[str, str]:
        """Return the names under which the prompts are asked and kept."""
        first, second = (json.dumps([self.question, self.k, self.rival, order]) for order in (0, 1))
        return first, second


@dataclass
class Grades:
    """Keep the grades of one side's answers by question and number, and what became of the verdicts."""

    by_answer: dict[tuple[str, int], float] = field(default_factory=dict)
    counts: Counter = field(default_factory=lambda: Counter(verdicts=0, malformed=0))
    position: float = 0.0  # sum over trials of the points that the first place is worth
    trials: int = 0  # that count

    def report(self) -> dict:
        """Return counts, and the points by which the position moved a verdict before they were averaged."""
        bias = round(self.position / self.trials, 4) if self.trials else None
        return {**self.counts, "position_bias": bias}


def grade_side(recipe: DataRecipe, work: Path, side: str, store: Store) -> Grades:
    """Have the judge grade the answers of one side, as far as it has not; returns their grades.

    Raises:
        DataError: The rubric lacks a place or the last line, or not one verdict can be read.
    """
    rubric = read_rubric(recipe)

    def trials() -> Iterator[Trial]:
        return _trials(recipe, rubric, work, side)

    def calls() -> Iterator[Call]:
        numbers = tuple(range(recipe.judge_samples))
        for trial in trials():
            yield from (Call(id, numbers, prompt) for id, prompt in zip(trial.ids(), trial.prompts, strict=True))

    see = StopUnreadable(
        lambda _, text: read_verdict(recipe.judge_form, text) is not None, partial(none_readable, recipe)
    ).see
    found = answer_missing(store, side, depends_on(recipe), calls, *recipe.judging, desc=f"judge {side}", see=see)
    return _average(recipe, trials(), store, found)


def depends_on(recipe: DataRecipe) -> dict[str, Any]:
    """Return all that a verdict depends on, but for its prompt; a model that is a folder goes by what is in it."""
    sampling, model = recipe.judging
    files = outside_inputs(recipe, "judge").get(str(Path(model.path)))
    chosen = {name: getattr(sampling, name) for name in ASKED_WITH}
    return chosen | {"served_model": model.served_model, "model": files or model.path}


def read_rubric(recipe: DataRecipe) -> str:
    """Return what the judge is told.

    Raises:
        DataError: There is no such file, a place is not in it exactly once, or it does not ask for the last line.
    """
    path, form = rubric_file(recipe), recipe.judge_form
    text = read_prompt_file(path, f"`judge_rubric: {path}`", [f"{{{place}}}" for place in PLACES[form]])
    if LAST_LINE[form].lower() not in text.lower():
        raise DataError(
            f"`judge_rubric: {path}` must ask for a last line that begins with `{LAST_LINE[form]}`, by which a "
            f"verdict of `judge_form: {form}` is read."
        )
    return text


def read_verdict(form: str, reply: str) -> float | None:
    """Return the grade that a reply ends with, from 1 to 10, of the part that stands first; None if there is none."""
    said = behind_thought(reply)
    if form == "pairwise":
        words = _VERDICT.findall(said)
        return _WORTH[words[-1].lower()] if words else None
    numbers = _SCORE.findall(said)
    grade = float(numbers[-1]) if numbers else 0.0
    return grade if LOWEST <= grade <= HIGHEST else None


def to_be_judged(answer: dict) -> str | None:
    """Return what a judge reads of an answer, the text behind its thoughts; None for one that cannot be used."""
    said = behind_thought(answer["text"]).strip()
    return said if said and answer["finish_reason"] != "length" else None


def pairs_of(n: int, rivals: int) -> list[tuple[int, int]]:
    """Return which of `n` answers are compared: each with the next ones of a circle, no two of them twice."""
    pairs = ((i, (i + step) % n) for step in range(1, min(rivals, n // 2) + 1) for i in range(n))
    return list({frozenset(pair): pair for pair in pairs}.values())


def _trials(recipe: DataRecipe, rubric: str, work: Path, side: str) -> Iterator[Trial]:
    """Yield all trials of one side, in the order of its answers."""
    answers = groupby(read_jsonl(work / f"samples.{side}.jsonl"), key=lambda row: row["id"])
    contexts = read_jsonl(work / "contexts.jsonl")  # in the same order
    for name, samples in answers:
        context = next(row for row in contexts if row["id"] == name)
        said = {sample["k"]: text for sample in samples if (text := to_be_judged(sample)) is not None}
        ks, question, evidence = list(said), context["question"], _tagged("evidence", evidence_of(context))
        if recipe.judge_form == "score":
            for k in ks:
                parts = evidence, _tagged("answer", said[k])
                yield Trial(name, k, None, _both_orders(rubric, parts, question=question))
            continue
        for i, j in pairs_of(len(ks), recipe.judge_rivals):
            parts = said[ks[i]], said[ks[j]]
            prompts = _both_orders(rubric, parts, ANSWER_TAGS, question=question, evidence=evidence)
            yield Trial(name, ks[i], ks[j], prompts)


def evidence_of(context: dict) -> str:
    """Return the text of a question's evidence; the long context has all of it, also with `lossy_short`."""
    long = context["long"]
    return "\n\n".join(long["prompt"][place["start"] : place["end"]] for place in long["evidence"])


def _tagged(tag: str, text: str) -> str:
    return f"<{tag}>\n{text}\n</{tag}>"


def _both_orders(
    rubric: str, parts: tuple[str, str], tags: tuple[str, str] | None = None, **texts: str
) -> tuple[str, str]:
    """Return the rubric with its places filled, once with the parts as they are and once with them exchanged."""

    def fill(first: str, second: str) -> str:
        if tags:
            first, second = _tagged(tags[0], first), _tagged(tags[1], second)
        values = {**texts, "first": first, "second": second}
        # in one pass: what stands in a text is no place
        return re.sub(r"\{(question|evidence|first|second)\}", lambda found: values.get(found[1], found[0]), rubric)

    return fill(*parts), fill(*parts[::-1])


def none_readable(recipe: DataRecipe, n: int, text: str) -> str:
    """Return the sentence on a judge that keeps to no form; `text` is one of its `n` replies."""
    return (
        f"None of {n} verdicts of the judge can be read: each must end with `{LAST_LINE[recipe.judge_form]} ...`, and "
        f"one ends with {shown(text[-60:])}; take a stronger judge, raise `judge_max_new_tokens: "
        f"{recipe.judge_max_new_tokens}`, or ask for that line more plainly in `judge_rubric`."
    )


def _average(recipe: DataRecipe, trials: Iterator[Trial], store: Store, found: Found) -> Grades:
    """Return the mean of the verdicts on each answer, over both orders of the parts."""
    grades, last = Grades(), ""
    values: dict[tuple[str, int], list[float]] = {}
    for trial in trials:
        for sample in range(recipe.judge_samples):
            verdicts = []
            for id in trial.ids():
                text = store.get(found[id, sample])["text"]
                verdicts.append(verdict := read_verdict(recipe.judge_form, text))
                grades.counts.update(verdicts=1, malformed=verdict is None)
                last = text if verdict is None else last
            first, second = verdicts
            if first is None or second is None:
                continue
            grades.trials += 1
            if trial.rival is None:  # the same answer, behind the evidence and before it
                grades.position += (second - first) / 2
                values.setdefault((trial.question, trial.k), []).append((first + second) / 2)
            else:
                middle = (HIGHEST + LOWEST) / 2
                grades.position += (first + second) / 2 - middle
                mean = (first + 2 * middle - second) / 2  # the answer was first, then second
                values.setdefault((trial.question, trial.k), []).append(mean)
                values.setdefault((trial.question, trial.rival), []).append(2 * middle - mean)
    if grades.counts["verdicts"] and grades.counts["verdicts"] == grades.counts["malformed"]:
        raise DataError(none_readable(recipe, grades.counts["verdicts"], last))
    grades.by_answer = {answer: round(sum(v) / len(v), 4) for answer, v in values.items()}
    return grades
