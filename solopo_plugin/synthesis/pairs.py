"""Stage 5: pairs of a right and a wrong answer, and which questions make the finished set.

Reads contexts.jsonl and judged.<side>.jsonl; writes pairs.jsonl with up to three sets of rows. `solopo`: both answers
sampled on the short context (the rows of the stage, and of PO and SFT on short and on expand-long). With `sample_long`
also `long_po`: both sampled on the long context (D_long), and `longpo`: the chosen one on the short, the rejected one
on the long context (LongPO's rows). Questions that give a pair on both sides come first in each, so that the sets
differ by strategy and not by question. Every draw depends on the seed and the question alone.
"""

import logging
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from ..host.template import encode_turn, template_markers, thought_markers
from ..qa.answers import is_nearly_right, judged_form, normalize_answer
from ..qa.files import DataError, read_jsonl, write_jsonl
from ..qa.generate.calls import load_chat
from ..qa.recipe import Chat, pick
from ..qa.seeded import generator
from .judge import advice
from .recipe import DataRecipe, from_documents

log = logging.getLogger(__name__)
TURN_END = 16  # tokens that a template puts behind a response, at most
SETS = {"solopo": ("short", "short"), "long_po": ("long", "long"), "longpo": ("short", "long")}  # sides sampled on
Refused = Callable[[str], str | None]  # text -> the reason why training refuses it as a response, if it does
BESIDE = {"long_po": ("long_po", "sft_long"), "longpo": ("longpo",)}  # sets beside `solopo` -> entries made of them


@dataclass
class DrawnPair:
    """Hold what one side of a question gave: an answer to choose and one to reject, None where there is none."""

    chosen: dict | None
    rejected: dict | None
    pass_rate: float  # share of all its answers that are right
    reason: str | None = None  # why there is no pair
    more: list[dict] = field(default_factory=list)  # to reject as well
    beside_short: list[dict] = field(default_factory=list)  # to reject in longpo, if lengths decide; of the long side


@dataclass
class DrawnQuestion:
    """Hold a question and what was drawn for it on each side."""

    id: str
    key: str  # see `question_key`
    draw: str  # what the draw of validation questions depends on; as it was, so that these stay the same
    sides: dict[str, DrawnPair]
    margin: float = 0.0  # grades that must lie between a pair's answers
    evidence: frozenset[int] = frozenset()  # hashes of its passages, of this process alone

    def pair(self, name: str) -> tuple[dict, list[dict]] | None:
        """Return the answer to choose and those to reject for a set, if there are any."""
        side, other = SETS[name]
        if other not in self.sides:
            return None
        chosen, drawn = self.sides[side].chosen, self.sides[other]
        if not (chosen and drawn.rejected):
            return None
        fitting = [
            answer
            for answer in (side != other and drawn.beside_short) or (drawn.rejected, *drawn.more)
            if answer["ids"] != chosen["ids"] and (not self.margin or far_apart(chosen, answer, self.margin))
        ]
        return (chosen, fitting) if fitting else None


class Graded(NamedTuple):
    """Say which graded answers make a pair, beside that the chosen one is right."""

    rejected_max: float  # grade of the rejected one at most
    margin: float  # grades between the two at least


def far_apart(chosen: dict, rejected: dict, margin: float) -> bool:
    """Return whether the grades of two answers differ by a margin or more."""
    return chosen["grade"] - rejected["grade"] >= margin


def run(recipe: DataRecipe, work: Path) -> dict:
    """Draw pairs, choose questions, split; returns counts and, as `statement`, one sentence on how many rows and why.

    Raises:
        DataError: Not a single row, or no training row beside `val_size`.
    """
    dropped_answers: dict[str, Counter] = {"short": Counter(), "long": Counter()}
    n_answers: Counter = Counter()
    questions = list(_questions(recipe, work, dropped_answers, n_answers))
    names = list(SETS) if recipe.sample_long else ["solopo"]
    chosen = {name: choose(questions, name, recipe) for name in names}
    counts: dict[str, Any] = {"questions": len(questions)}
    for side in ("short", "long")[: 1 + recipe.sample_long]:
        reasons = Counter(q.sides[side].reason for q in questions)
        usable = reasons.pop(None, 0)
        counts[side] = {
            "with_a_pair": usable,
            "answers": n_answers[side],
            "dropped_questions": dict(sorted(reasons.items())),
            "dropped_answers": dict(sorted(dropped_answers[side].items())),
        }
    counts["with_a_pair_on_both"] = sum(_on_both(q) for q in questions)
    counts["statement"] = statement(counts, recipe)
    if not chosen["solopo"]:
        raise DataError(counts["statement"])
    if len(chosen["solopo"]) < recipe.num_rows:
        log.warning(counts["statement"])
    validation = split(chosen["solopo"], recipe)
    if validation:
        counts["val_with_training_evidence"] = shared = _shares_evidence(chosen["solopo"], validation)
        if shared:
            log.warning(
                "%d of %d validation rows share a passage of their evidence with a training row: their questions are "
                "held out, their passages are not.",
                shared, sum(q.key in validation for q in chosen["solopo"]),
            )  # fmt: skip
    counts["rows"] = {}
    for name in names:
        n_val = sum(q.key in validation for q in chosen[name])
        counts["rows"][name] = {"train": len(chosen[name]) - n_val, "val": n_val}
    if few := {name: said for name in BESIDE if name in chosen and (said := shortfall(name, counts, recipe))}:
        counts["too_few"] = few
        for said in few.values():
            log.warning(said)
    several = recipe.num_rejected > 1
    rows = (
        _row(name, q, pair, q.key in validation, several)
        for name in names
        for q in chosen[name]
        if (pair := q.pair(name))
    )
    write_jsonl(work / "pairs.jsonl", rows)
    return counts


def choose(questions: list[DrawnQuestion], name: str, recipe: DataRecipe) -> list[DrawnQuestion]:
    """Return `num_rows` questions with a pair for the set, in seeded order, those with a pair on both sides first."""

    def rank(question: DrawnQuestion) -> tuple:
        return not _on_both(question), generator(recipe.seed, "order", question.id).random(), question.id

    return sorted((q for q in questions if q.pair(name)), key=rank)[: recipe.num_rows]


def split(questions: list[DrawnQuestion], recipe: DataRecipe) -> set[str]:
    """Return keys of the validation questions: `val_size` of the rows, in a seeded order.

    The same question asked twice with the same answers is on one side only, which may add a row.
    """
    n_val = round(recipe.val_size * len(questions)) if recipe.val_size < 1 else int(recipe.val_size)

    def rank(question: DrawnQuestion) -> tuple:
        return generator(recipe.seed, "val", question.draw).random(), question.draw

    rows_of, n_drawn, drawn = Counter(q.key for q in questions), 0, set()
    for question in sorted(questions, key=rank):
        if n_drawn < n_val and question.key not in drawn:
            drawn.add(question.key)
            n_drawn += rows_of[question.key]
    if len(drawn) == (n_keys := len(rows_of)):
        raise DataError(
            f"`val_size: {recipe.val_size:g}` leaves no training row of {len(questions)}"
            f"{f' (different questions: {n_keys})' * (n_keys < len(questions))}; lower it, or make more rows."
        )
    if recipe.val_size and not drawn:
        log.warning(
            f"`val_size: {recipe.val_size:g}` of {len(questions)} rows is less than one, so there is no validation "
            "row; raise it, `val_size: 1` is one row."
        )
    return drawn


def _shares_evidence(questions: list[DrawnQuestion], validation: set[str]) -> int:
    """Return how many validation questions have a passage of their evidence that a training question has, too."""
    trained = {passage for q in questions if q.key not in validation for passage in q.evidence}
    return sum(q.key in validation and not trained.isdisjoint(q.evidence) for q in questions)


def statement(counts: dict, recipe: DataRecipe) -> str:
    """Return one sentence: how many rows there are and, if they are too few, why and what to do."""
    n_rows, num_rows = counts["short"]["with_a_pair"], recipe.num_rows
    if n_rows >= num_rows:
        return f"{num_rows} rows, as asked for, of {n_rows} questions that give a pair."
    return (
        f"{n_rows} rows of `num_rows: {num_rows}`: {counts['questions']} questions had a context, of which dropped on "
        f"the short one: {_reasons(counts['short'])}; {_remedy(counts['short'], recipe)}."
    )


def shortfall(name: str, counts: dict, recipe: DataRecipe) -> str | None:
    """Return one sentence on a set beside `solopo` that lacks rows: how many, why, and which entries are missing."""
    rows, (right, wrong) = counts["rows"][name], SETS[name]
    n_rows = sum(rows.values())
    ends = [end for part, end in (("train", ""), ("val", "_val")) if counts["rows"]["solopo"][part] and not rows[part]]
    if n_rows >= recipe.num_rows and not ends:
        return None
    missing = ", ".join(f"`{recipe.dataset_name}_{entry}{end}`" for end in ends for entry in BESIDE[name])
    return (
        f"`{name}` has {n_rows} rows of `num_rows: {recipe.num_rows}`{f', and there is no {missing}' * bool(ends)}: it "
        f"takes a right answer to the {right} context and a wrong one to the {wrong} context; of {counts['questions']} "
        f"questions dropped on the long one: {_reasons(counts['long'])}; {_remedy(counts['long'], recipe)}."
    )


def _reasons(counts: dict) -> str:
    """List how many questions of a side were dropped, and why."""
    dropped = counts["dropped_questions"].items()
    return ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in dropped) or "none was dropped"


def _remedy(counts: dict, recipe: DataRecipe) -> str:
    """Say how to get more rows: of answers that most cannot be used, more questions are no help."""
    n = counts["answers"]
    reasons = {
        "nearly_right": "are part of a gold answer, have its words in another order or its numbers in another form: "
        "give such forms as `answers`; or hold a `no` where that is the gold answer",
        "no_marker": f"lack `The answer is:` and count as wrong: {advice(recipe.prompt)}",
        "cut": f"were cut: raise `max_new_tokens: {recipe.max_new_tokens}`",
        "no_grade": "have no grade: see the counts of the stage `judge`, and the replies in verdicts.db",
        "between": f"are graded between `judge_rejected_max: {recipe.judge_rejected_max:g}` and `judge_chosen_min: "
        f"{recipe.judge_chosen_min:g}`: move these",
        "over_length": f"are longer than `cutoff_len: {recipe.cutoff_len}` leaves: raise it, or lower `long_tokens: "
        f"{recipe.long_tokens}`",
        "template_marker": "hold a special token of the template: check that `template` is the model's own",
        "thought": "hold a thought that `enable_thinking: false` does not take out: ask the model not to think, or set "
        "`enable_thinking: true`, in training as well",
        "empty": "are empty: see what the backend gives; a thought may have taken all of `max_new_tokens`",
    }
    found = {name: dropped for name in reasons if (dropped := counts["dropped_answers"].get(name))}
    if 2 * sum(found.values()) <= n:
        more = f"raise `candidates: {recipe.candidates}`, or give more documents"
        return f"for more rows {more if from_documents(recipe) else 'give more questions'}"
    return "; ".join(f"{k} of {n} answers ({100 * k / n:.1f} %) {reasons[name]}" for name, k in found.items())


def draw_pair(
    answers: list[dict], room: int, encode: Callable[[str], list[int]], refused: Refused, rng: random.Random,
    balance_length: bool, dropped: Counter, graded: Graded | None = None, num_rejected: int = 1,
    golds: Sequence[str] = (), beside: dict | None = None,
) -> DrawnPair:  # fmt: skip
    """Draw a random right answer and random wrong ones among the usable ones.

    Args:
        answers: All judged answers of one side of a question.
        room: Tokens that `cutoff_len` leaves for a response behind the longer prompt.
        encode: Text -> ids of the response as in training, its stop token included.
        refused: See `Refused`.
        rng: The random numbers of this question and side.
        balance_length: Take the wrong answer whose length is nearest to the chosen one's, instead of any.
        dropped: Counts the answers that are not usable by reason (`why_unusable`), and as `equal` those that have the
            tokens of the chosen one; those that are neither right nor to be rejected as `nearly_right`
            (`is_nearly_right`), with `graded` as `between`.
        graded: Which answers a model's grades make a pair of; None: any wrong one is rejected but the nearly right.
        num_rejected: Wrong answers to draw, no two of the same tokens; fewer where there are not so many.
        golds: The question's answers.
        beside: An answer chosen on the short side, beside which wrong ones of this side are drawn as well.
    """
    right, wrong = [], []
    for answer in answers:
        if reason := why_unusable(answer, room, encode, refused, graded is not None):
            dropped[reason] += 1
            continue
        bad = answer["grade"] <= graded.rejected_max if graded else not answer["correct"]
        right += [answer] * answer["correct"]
        wrong += [answer] * bad
        if not (answer["correct"] or bad):
            dropped["between"] += 1
    both = bool(right and wrong)
    if graded and both:
        right = [answer for answer in right if any(far_apart(answer, other, graded.margin) for other in wrong)]
    chosen = _with_ids(rng.choice(right), encode) if right else None
    rng.shuffle(wrong)
    if not graded and (near := [answer for answer in wrong if is_nearly_right(answer["answer"], golds)]):
        dropped["nearly_right"] += len(near)
        wrong = [answer for answer in wrong if answer not in near]  # what else is drawn stays the same
    reject = partial(_first_rejected, wrong, encode, balance_length, graded, num_rejected)
    rejected, beside_short = reject(chosen, dropped), reject(beside, Counter()) if beside else []
    n_right, reason = sum(answer["correct"] for answer in answers), None
    if not (chosen and rejected):
        reason = "within_margin" if both and not chosen else "no_usable_rejected" if chosen else "no_usable_chosen"
        if n_right in (0, len(answers)) and not both:
            reason = "all_correct" if n_right else "all_wrong"
    return DrawnPair(
        chosen, rejected[0] if rejected else None, n_right / len(answers), reason, rejected[1:], beside_short
    )


def _first_rejected(
    wrong: list[dict], encode: Callable[[str], list[int]], balance_length: bool, graded: Graded | None, n: int,
    chosen: dict | None, dropped: Counter,
) -> list[dict]:  # fmt: skip
    """Return the first `n` of shuffled wrong answers that a chosen one, if there is one, can stand beside."""
    if graded and chosen:
        wrong = [answer for answer in wrong if far_apart(chosen, answer, graded.margin)]
    if balance_length and chosen:
        wrong = sorted(wrong, key=lambda answer: abs(len(encode(answer["text"])) - len(chosen["ids"])))
    rejected: list[dict] = []
    for candidate in (_with_ids(answer, encode) for answer in wrong):
        if chosen and candidate["ids"] == chosen["ids"]:
            dropped["equal"] += 1
        elif all(candidate["ids"] != other["ids"] for other in rejected):
            rejected.append(candidate)
        if len(rejected) == n:
            break
    return rejected


def why_unusable(
    answer: dict, room: int, encode: Callable[[str], list[int]], refused: Refused, graded: bool = False
) -> str | None:
    """Return the first reason why an answer cannot be in a pair, None if it can.

    `empty`; `cut`, at max_new_tokens, since training ends every response with the stop token; `no_marker`, no `The
    answer is:`, or for graded answers `no_grade`; what `refused` says; `over_length`.
    """
    text = answer["text"]
    if not text.strip():
        return "empty"
    if answer["finish_reason"] == "length":
        return "cut"
    if answer["grade" if graded else "answer"] is None:
        return "no_grade" if graded else "no_marker"
    if reason := refused(text):
        return reason
    # most answers need not be tokenised: no tokenizer makes more than two tokens of a byte
    surely_fits = 2 * len(text.encode()) + TURN_END <= room
    return None if surely_fits or len(encode(text)) <= room else "over_length"


def _with_ids(answer: dict, encode: Callable[[str], list[int]]) -> dict:
    own = {name: answer[name] for name in ("k", "text", "grade") if name in answer}
    return own | {"ids": array("I", encode(answer["text"]))}


def _questions(
    recipe: DataRecipe, work: Path, dropped: dict[str, Counter], n_answers: Counter
) -> Iterator[DrawnQuestion]:  # fmt: skip
    """Yield all questions with what was drawn for them, in the contexts' order; `n_answers` counts by side."""
    tokenizer, template = load_chat(recipe.model.tokenizer, pick(recipe, Chat))
    markers = template_markers(tokenizer, template)
    unwanted = markers - (thought_markers(tokenizer, template) - {*template.stop_words})
    of_thoughts = [] if recipe.enable_thinking else [word.strip() for word in template.thought_words]

    def turn(text: str) -> tuple[list[int], list[int]]:
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
        return encode_turn(tokenizer, template, messages)

    def encode(text: str) -> list[int]:
        return turn(text)[1]

    def refused(text: str) -> str | None:
        if any(marker in text for marker in unwanted):
            return "template_marker"
        torn = any(word in text for word in of_thoughts) and turn(text)[0] != turn("")[0]
        return "thought" if torn else None  # the prompt would be another one than before other responses

    graded = Graded(recipe.judge_rejected_max, recipe.judge_margin) if recipe.judge == "model" else None
    sides = ("short", "long")[: 1 + recipe.sample_long]
    judged = {side: groupby(read_jsonl(work / f"judged.{side}.jsonl"), key=lambda row: row["id"]) for side in sides}
    for context in tqdm(read_jsonl(work / "contexts.jsonl"), desc="select", unit=" questions", disable=None):
        room = recipe.cutoff_len - max(context[side]["tokens"] for side in ("short", "long"))
        marked = any(marker in context[side]["prompt"] for side in ("short", "long") for marker in markers)
        drawn: dict[str, DrawnPair] = {}
        for side in sides:
            name, found = next(judged[side], (None, ()))
            if name != context["id"]:
                raise DataError(
                    f"{work}/judged.{side}.jsonl has question {name!r} where contexts.jsonl has {context['id']!r}; "
                    "run the stage `judge` again."
                )
            rng = generator(recipe.seed, "pair", side, name)
            answers = list(found)
            n_answers[side] += len(answers)
            drawn[side] = draw_pair(
                answers, room, encode, refused, rng, recipe.balance_length, dropped[side], graded, recipe.num_rejected,
                context["answers"], drawn["short"].chosen if side == "long" and recipe.balance_length else None,
            )  # fmt: skip
            if marked:
                drawn[side] = DrawnPair(None, None, drawn[side].pass_rate, "template_marker_in_prompt")
        long = context["long"]
        evidence = frozenset(hash(long["prompt"][place["start"] : place["end"]]) for place in long["evidence"])
        key = question_key(context)
        draw = " | ".join(map(normalize_answer, [context["question"], *sorted(context["answers"])]))
        yield DrawnQuestion(context["id"], key, draw, drawn, graded.margin if graded else 0.0, evidence)


def question_key(row: dict) -> str:
    """Return what must not be in both splits: question and answers in the judge's normal form, each answer once."""
    return " | ".join([judged_form(row["question"]), *sorted(set(map(judged_form, row["answers"])))])


def _on_both(question: DrawnQuestion) -> bool:
    return all(question.pair(name) for name in ("solopo", "long_po"))


def _row(name: str, question: DrawnQuestion, pair: tuple[dict, list[dict]], validation: bool, several: bool) -> dict:
    chosen, (rejected, *more) = pair
    rates = {f"pass_rate_{side}": question.sides[side].pass_rate for side in question.sides}
    return {
        "set": name,
        "split": "val" if validation else "train",
        "id": question.id,
        "chosen": chosen["text"],
        "rejected": rejected["text"],
        "chosen_k": chosen["k"],
        "rejected_k": rejected["k"],
        "chosen_tokens": len(chosen["ids"]),
        "rejected_tokens": len(rejected["ids"]),
        **({"chosen_grade": chosen["grade"], "rejected_grade": rejected["grade"]} if "grade" in chosen else {}),
        **{"pass_rate_long": None, **rates},
        "pair_on_both": _on_both(question),
        **({"all_rejected": [answer["text"] for answer in (rejected, *more)]} if several else {}),
    }
