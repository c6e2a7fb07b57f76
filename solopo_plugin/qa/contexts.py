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
from .recipe import ContextKeys
from .seeded import generator

log = logging.getLogger(__name__)
PASSED_OVER = 20  # paragraphs that do not fit any more before a context counts as full; ours
CHECKED = 32  # questions of which the sum of tokens is compared with the tokenised prompt; ours
FILLED = 0.5  # of a target's tokens that a context has at least, or paragraphs are too long to fill one; ours
ROUNDS = 6  # attempts at a length where tokens do not add up; ours


class TokenBudget:
    """Count the tokens of a prompt from those of its parts, which are tokenised once.

    The prompt of a question with the documents d_1 to d_n has

        overhead + tokens(d_1) + ... + tokens(d_n) + extra_label_tokens(n)

    tokens. tokens(d) is that of the document behind the label `Document 1:` with the blank line before it, from
    `count_tokens`. A later label can be longer, `Document 10:` by a digit: extra_label_tokens(n) is how many tokens the
    labels 1 to n have more than n times the first. The overhead is what remains of a prompt without its documents; it
    is measured on a prompt with a single small document, whose own tokens are known, so that the text before and
    behind meets a document as it always does. The sum holds where no token reaches over the end of a document: where
    blank lines part the documents from the text around them, and `Pool.ends_apart` of all of them.
    """

    def __init__(self, pool: Pool, tokenizer, template, before: str, behind: str):
        """Take a pool with its tokens counted, and the prompt's text before and behind its documents."""
        self.pool, self.tokenizer, self.template, self.before, self.behind = pool, tokenizer, template, before, behind
        self.smallest = min((pool.tokens[i] for i in pool.drawable), default=0)  # of a distractor
        self.adds_up = before.endswith(BETWEEN) and behind.startswith(BETWEEN)
        self.small_document = self._count(f"{SEAM} 1: A\nB.{SEAM}") - self._count(SEAM)
        self.extra = [0]

    def of_prompt(self, prompt: str) -> int:
        """Tokenise a whole prompt and return its number of tokens."""
        return len(encode_prompt(self.tokenizer, self.template, prompt))

    def overhead(self, question: str) -> int:
        """Return the tokens of a question's prompt without documents."""
        before, behind = (part.replace("{question}", question) for part in (self.before, self.behind))
        return self.of_prompt(f"{before}{LABEL} 1: A\nB.{behind}") - self.small_document

    def of_documents(self, documents: Sequence[int]) -> int:
        """Return the tokens of documents with their labels, which are numbered from 1."""
        return sum(self.pool.tokens[i] for i in documents) + self.extra_label_tokens(len(documents))

    def of_next(self, i: int, n: int) -> int:
        """Return the tokens that document `i` adds as the `n`-th of a prompt, from 1."""
        return self.pool.tokens[i] + self.extra_label_tokens(n) - self.extra_label_tokens(n - 1)

    def extra_label_tokens(self, n: int) -> int:
        """Return how many tokens the labels of documents 1 to `n` have more than `n` times that of the first."""
        while len(self.extra) <= n:
            more = self._count(f"{SEAM} {len(self.extra)}: A") - self._count(f"{SEAM} 1: A")
            self.extra.append(self.extra[-1] + more)
        return self.extra[n]

    def _count(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))


@dataclass
class BuiltContext:
    """Keep one context: its distractors in the order drawn, whether it is full, and what is written of it."""

    distractors: list[int]
    full: bool
    row: dict

    def fills(self, tokens: int) -> bool:
        """Return whether it has at least `FILLED` of a length; if not, its paragraphs are too long to fill one."""
        return self.row["tokens"] >= FILLED * tokens


@dataclass
class PreparedQuestion:
    """Keep what all contexts of a question share."""

    question: Question
    overhead: int  # tokens of its prompt without documents
    leaks: "Leaks"


class Builder:
    """Build the contexts of questions, one by one, from one pool of paragraphs."""

    def __init__(self, keys: ContextKeys, pool: Pool, tokenizer, template):
        """Take a pool with its tokens counted by this tokenizer, and the chat template as `load_chat` has it."""
        self.keys, self.pool = keys, pool
        self.before, self.behind = split_prompt(keys.prompt)
        self.budget = TokenBudget(pool, tokenizer, template, self.before, self.behind)
        self.ranked = rank_by_bm25(pool) if keys.distractors == "bm25" else None

    def prepare(self, question: Question) -> PreparedQuestion | str:
        """Return what all contexts of a question share, or why it can have none."""
        pool = self.pool
        if question.has_marker or any(pool.has_marker[i] for i in question.evidence):
            return "special_tokens"
        forms = [judged_form(pool.text(i)) for i in question.evidence]
        if any(a in b for k, a in enumerate(forms) for j, b in enumerate(forms) if j != k):
            return "evidence_within_evidence"
        answers = [] if self.keys.allow_answer_in_distractors else question.answers
        leaks = Leaks(answers, forms, pool, Counter())
        return PreparedQuestion(question, self.budget.overhead(question.question), leaks)

    def rng(self, question: Question, what: str) -> random.Random:
        """Return the random numbers of a question for one purpose."""
        return generator(f"{self.keys.seed}/{question.id}/{what}")

    def context(
        self,
        prepared: PreparedQuestion,
        target: int,
        name: str,
        dropped: Sequence[int] = (),
        only: list[int] | None = None,
        arrange: Callable[[list[int], list[int]], list[int]] | None = None,
        fill: bool = True,
    ) -> BuiltContext | str:
        """Build a context, or say why not: `evidence_longer_than` or `too_few_distractors_for` the target.

        Args:
            prepared: The question, from `prepare`.
            target: Tokens of the templated prompt at most.
            name: Of the random numbers: two contexts of a question that share it draw distractors in the same order.
            dropped: Evidence to leave out, by its place in the question.
            only: The only distractors to take, in this order; None: those of the pool, as drawn.
            arrange: The order of documents, from evidence and distractors as drawn; None: shuffled.
            fill: A context must be full; False: it may end where there is nothing more to take.
        """
        question, budget = prepared.question, self.budget
        evidence = [i for k, i in enumerate(question.evidence) if k not in dropped]
        room, best = target - prepared.overhead, None
        for _ in range(ROUNDS):
            rng = self.rng(question, name)
            order = only if only is not None else prepared.leaks.without(question.evidence, self._draw(question, rng))
            distractors, full = self._fill(evidence, room, order)
            documents = arrange(evidence, distractors) if arrange else [*evidence, *distractors]
            if arrange is None:
                rng.shuffle(documents)
            texts = map(self.pool.document, documents)
            prompt, places = lay_out(self.before, self.behind, question.question, texts)
            adds_up = budget.adds_up and all(self.pool.ends_apart[i] for i in documents)
            tokens = prepared.overhead + budget.of_documents(documents) if adds_up else budget.of_prompt(prompt)
            prepared.leaks.counts["tokenised_whole"] += not adds_up
            if tokens <= target and (best is None or tokens > best.row["tokens"]):
                found = [places[documents.index(i)] for i in evidence]
                best = BuiltContext(distractors, full, {
                    "prompt": prompt, "tokens": tokens, "paragraphs": len(documents), "evidence": found,
                    "dropped": list(dropped),
                })  # fmt: skip
            if adds_up or 0 <= target - tokens < budget.smallest:
                break
            room += target - tokens - (budget.smallest if tokens > target else 0)
        if best is None:
            return "evidence_longer_than"
        return best if best.full or not fill else "too_few_distractors_for"

    def _draw(self, question: Question, rng: random.Random) -> Iterable[int]:
        drawable = self.pool.drawable
        drawn = (drawable[k] for k in permutation(len(drawable), rng))
        order = self.ranked(question.question) if self.ranked else drawn
        origins = self.pool.origins
        own = {origins[i].source for i in question.evidence if i in origins}
        return others_first(order, lambda i: i in origins and origins[i].source in own) if own else order

    def _fill(self, evidence: list[int], room: int, order: Iterable[int]) -> tuple[list[int], bool]:
        """Return distractors that fit into `room` tokens beside the evidence, and whether it is full.

        A paragraph that does not fit is passed over, so what stays free is less than any of those that were.
        """
        chosen: list[int] = []
        passed = 0
        free = room - self.budget.of_documents(evidence)
        for i in order:
            cost = self.budget.of_next(i, len(evidence) + len(chosen) + 1)
            if cost <= free:
                chosen.append(i)
                free -= cost
            else:
                passed += 1
            if passed == PASSED_OVER or free < self.budget.smallest:
                break
        return chosen, passed > 0 or free < self.budget.smallest

    def check_sums(self, questions: list[Question], targets: dict[str, int]) -> None:
        """Compare the sums of some prompts with their tokens; from a difference on, every prompt is tokenised.

        Args:
            questions: Those that contexts will be built for.
            targets: Tokens by the name of the random numbers, as `context` takes both.
        """
        for prepared in map(self.prepare, questions[:: -(-len(questions) // CHECKED)]):
            if isinstance(prepared, str):
                continue
            for name, target in targets.items():
                built = self.context(prepared, target, name)
                if not isinstance(built, str) and self.budget.of_prompt(built.row["prompt"]) != built.row["tokens"]:
                    log.warning("Tokens do not add up with this tokenizer: every prompt is tokenised, which is slower.")
                    self.budget.adds_up = False
                    return


class Leaks:
    """Tell which paragraphs must not be distractors of a question: those with an answer, and those with its evidence.

    `counts` says how many were left out for what reason.
    """

    def __init__(self, answers: list[str], evidence_forms: list[str], pool: Pool, counts: Counter):
        """Take answers that no distractor may hold, the evidence in normal form, and where to count."""
        self.answers = [(answer, judged_form(answer).encode()) for answer in answers]
        self.evidence = [form.encode() for form in evidence_forms]
        self.pool, self.counts = pool, counts

    def without(self, evidence: list[int], order: Iterable[int]) -> Iterator[int]:
        """Yield the paragraphs of `order` that may be shown; those that may not are counted."""
        pool, evidence_texts = self.pool, {self.pool.first_like[i] for i in evidence}
        for i in order:
            if i in evidence_texts:
                continue
            near = [answer for answer, form in self.answers if pool.holds(i, form)]  # few paragraphs need a closer look
            if near and holds_answer(pool.document(i), near):
                self.counts["with_answer"] += 1
            elif any(pool.holds(i, form) for form in self.evidence):
                self.counts["with_evidence"] += 1
            else:
                yield i


def others_first(order: Iterable[int], is_own: Callable[[int], bool]) -> Iterator[int]:
    """Yield paragraphs in their order, but those of the evidence's own documents behind all others."""
    own = []
    for i in order:
        if is_own(i):
            own.append(i)
        else:
            yield i
    yield from own


def permutation(n: int, rng: random.Random) -> Iterator[int]:
    """Yield the numbers 0 to n - 1 in random order, each drawn when it is asked for (Fisher and Yates)."""
    moved: dict[int, int] = {}
    for k in range(n):
        j = rng.randrange(k, n)
        yield moved.get(j, j)
        moved[j] = moved.pop(k, k)
