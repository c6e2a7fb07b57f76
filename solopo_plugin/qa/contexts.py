"""Build contexts of a given length around the evidence of a question.

A context is the evidence and, in RULER's way, distractors drawn without replacement from the paragraphs of all
questions, until no more fit; then all are shuffled. What is drawn depends on the seed and the question alone.
"""

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..host.template import encode_prompt
from .answers import holds_answer, judged_form
from .documents import Pool, Question, rank_by_bm25
from .prompts import BETWEEN, LABEL, SEAM, lay_out, split_prompt
from .recipe import Contexts
from .seeded import generator

log = logging.getLogger(__name__)
PASSED_OVER = 20  # paragraphs that do not fit any more before a context counts as full; ours
CHECKED = 32  # questions of which the sum of tokens is compared with the tokenised prompt; ours
ROUNDS = 6  # attempts at a length where tokens do not add up; ours


@dataclass
class Side:
    """One context: its distractors in the order drawn, whether it is full, and what is written of it."""

    distractors: list[int]
    full: bool
    row: dict


@dataclass
class Asked:
    """A question, the tokens of its prompt without documents, and which paragraphs it must not meet."""

    question: Question
    rest: int
    leaks: "Leaks"


class Builder:
    """What the contexts of all questions share, and how one question's are built."""

    def __init__(self, keys: Contexts, pool: Pool, tokenizer, template):
        self.keys, self.pool, self.tokenizer, self.template = keys, pool, tokenizer, template
        self.before, self.behind = split_prompt(keys.prompt)
        self.smallest = min((pool.tokens[i] for i in pool.drawable), default=0)
        self.ranked = rank_by_bm25(pool) if keys.distractors == "bm25" else None
        self.numbers = [0]  # [n]: tokens that the labels of documents 1 to n have more than n times that of the first
        self.one = self._alone(f"{SEAM} 1: A\nB.{SEAM}") - self._alone(SEAM)  # tokens of a document `A\nB.`
        self.sums = self.before.endswith(BETWEEN) and self.behind.startswith(BETWEEN)

    def asked(self, question: Question) -> Asked | str:
        """What all contexts of a question share, or why it can have none."""
        pool = self.pool
        if question.marked or any(pool.marked[i] for i in question.evidence):
            return "special_tokens"
        forms = [judged_form(pool.text(i)) for i in question.evidence]
        if any(a in b for k, a in enumerate(forms) for j, b in enumerate(forms) if j != k):
            return "evidence_within_evidence"
        answers = [] if self.keys.allow_answer_in_distractors else question.answers
        return Asked(question, self._rest(question), Leaks(answers, forms, pool, Counter()))

    def rng(self, question: Question, what: str) -> random.Random:
        """Return the random numbers of a question for one purpose."""
        return generator(f"{self.keys.seed}/{question.id}/{what}")

    def context(
        self,
        asked: Asked,
        target: int,
        name: str,
        dropped: Sequence[int] = (),
        drawn: list[int] | None = None,
        arranged: Callable[[list[int], list[int]], list[int]] | None = None,
    ) -> Side | str:
        """A context of at most `target` tokens, or why not: `evidence_longer_than` or `too_few_distractors_for` it.

        Args:
            name: Of the random numbers: two contexts of a question that share it draw distractors in the same order.
            dropped: Evidence to leave out, by its place in the question.
            drawn: The only distractors to draw from, in this order; None: the pool.
            arranged: The order of documents, from evidence and distractors as drawn; None: shuffled.
        """
        question, rest, leaks = asked.question, asked.rest, asked.leaks
        evidence = [i for k, i in enumerate(question.evidence) if k not in dropped]
        room, best = target - rest, None
        for _ in range(ROUNDS):
            rng = self.rng(question, name)
            order = drawn if drawn is not None else leaks.without(question.evidence, self._draw(question, rng))
            distractors, full = self._fill(evidence, room, order)
            documents = arranged(evidence, distractors) if arranged else [*evidence, *distractors]
            if arranged is None:
                rng.shuffle(documents)
            shown = map(self.pool.document, documents)
            prompt, places = lay_out(self.before, self.behind, question.question, shown)
            adds_up = self.sums and all(self.pool.sums[i] for i in documents)
            tokens = rest + self._tokens(documents) if adds_up else len(self._encode(prompt))
            leaks.looked_at["tokenised_whole"] += not adds_up
            if tokens <= target and (best is None or tokens > best.row["tokens"]):
                found = [places[documents.index(i)] for i in evidence]
                best = Side(distractors, full, {
                    "prompt": prompt, "tokens": tokens, "paragraphs": len(documents), "evidence": found,
                    "dropped": list(dropped),
                })  # fmt: skip
            if adds_up or 0 <= target - tokens < self.smallest:
                break
            room += target - tokens - (tokens > target) * self.smallest
        if best is None:
            return "evidence_longer_than"
        return best if best.full else "too_few_distractors_for"

    def _draw(self, question: Question, rng: random.Random) -> Iterable[int]:
        if self.ranked:
            return self.ranked(question.question)
        drawable = self.pool.drawable
        return (drawable[k] for k in permutation(len(drawable), rng))

    def _fill(self, evidence: list[int], room: int, order: Iterable[int]) -> tuple[list[int], bool]:
        """Distractors that fit into `room` tokens beside the evidence, and whether it is full.

        A paragraph that does not fit is passed over, so what stays free is less than any of those that were.
        """
        chosen, passed = [], 0
        free = room - self._tokens(evidence)
        for i in order:
            n = len(evidence) + len(chosen) + 1
            cost = self.pool.tokens[i] + self._number(n) - self._number(n - 1)
            if cost <= free:
                chosen.append(i)
                free -= cost
            else:
                passed += 1
            if passed == PASSED_OVER or free < self.smallest:
                break
        return chosen, passed > 0 or free < self.smallest

    def _encode(self, prompt: str) -> list[int]:
        return encode_prompt(self.tokenizer, self.template, prompt)

    def _rest(self, question: Question) -> int:
        """Tokens of the prompt without documents, as the rest of one with a document of known length."""
        before, behind = (part.replace("{question}", question.question) for part in (self.before, self.behind))
        return len(self._encode(f"{before}{LABEL} 1: A\nB.{behind}")) - self.one

    def _alone(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def _tokens(self, documents: list[int]) -> int:
        """Tokens of documents: the sum of theirs, and what the labels of later ones have more than the first's."""
        return sum(self.pool.tokens[i] for i in documents) + self._number(len(documents))

    def _number(self, n: int) -> int:
        while len(self.numbers) <= n:
            more = self._alone(f"{SEAM} {len(self.numbers)}: A") - self._alone(f"{SEAM} 1: A")
            self.numbers.append(self.numbers[-1] + more)
        return self.numbers[n]

    def check_sums(self, questions: list[Question], targets: dict[str, int]) -> None:
        """Compare the sums of some prompts with their tokens; from a difference on, every prompt is tokenised.

        Args:
            targets: By name, as `context` takes both.
        """
        for asked in map(self.asked, questions[:: -(-len(questions) // CHECKED)]):
            for name, target in () if isinstance(asked, str) else targets.items():
                side = self.context(asked, target, name)
                if not isinstance(side, str) and len(self._encode(side.row["prompt"])) != side.row["tokens"]:
                    log.warning("Tokens do not add up with this tokenizer: every prompt is tokenised, which is slower.")
                    self.sums = False
                    return


class Leaks:
    """Which paragraphs must not be distractors of a question: those with an answer, and those with its evidence."""

    def __init__(self, answers: list[str], evidence_forms: list[str], pool: Pool, looked_at: Counter):
        self.answers = [(answer, judged_form(answer).encode()) for answer in answers]
        self.evidence = [form.encode() for form in evidence_forms]
        self.pool, self.looked_at = pool, looked_at

    def without(self, evidence: list[int], order: Iterable[int]) -> Iterator[int]:
        """The paragraphs of `order` that may be shown; those that may not are counted."""
        pool, same = self.pool, {self.pool.same[i] for i in evidence}
        for i in order:
            if i in same:
                continue
            near = [answer for answer, form in self.answers if pool.holds(i, form)]  # few paragraphs need a closer look
            if near and holds_answer(pool.document(i), near):
                self.looked_at["with_answer"] += 1
            elif any(pool.holds(i, form) for form in self.evidence):
                self.looked_at["with_evidence"] += 1
            else:
                yield i


def permutation(n: int, rng: random.Random) -> Iterator[int]:
    """The numbers 0 to n - 1 in random order, each drawn when it is asked for (Fisher and Yates)."""
    moved: dict[int, int] = {}
    for k in range(n):
        j = rng.randrange(k, n)
        yield moved.get(j, j)
        moved[j] = moved.pop(k, k)
