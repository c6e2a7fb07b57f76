"""Contexts of given lengths around the evidence of a file's questions, by the data pipeline's own builder."""

import logging
from collections import Counter
from collections.abc import Iterator

from ...host.template import template_markers
from ...qa.contexts import Builder, BuiltContext, PreparedQuestion
from ...qa.documents import Question, count_tokens, make_pool
from ...qa.files import DataError
from ...qa.questions import PARSERS, read_questions, with_place
from ...qa.recipe import ContextKeys
from ...qa.seeded import digest
from .rows import rows_of

log = logging.getLogger(__name__)
NAME = "short"  # of the random numbers: at `short_tokens` a context is the data pipeline's short one
TRIES = 4  # questions that are tried for one that is asked for, so that an impossible length ends; ours
NUMBER = 8  # tokens that the number of a document can have at most
HUB_SUBSETS = {"hotpotqa": "distractor"}


class Haystack:
    """Hold the paragraphs of a file as a pool, and its questions in the order of a seeded draw."""

    def __init__(self, name: str, task: str, key: str, lengths: list[int], recipe, tokenizer, template):
        """Read the questions and tokenise their paragraphs.

        Args:
            name: File, folder or hub name of the questions; several with commas.
            task: Its name; also that of its format, if there is one of that name.
            key: What the recipe calls the file, for messages.
            lengths: Those that contexts will be asked for.
            recipe: Of the evaluation.
            tokenizer: Of the model whose tokens count.
            template: Its chat template.
        """
        self.what, self.lengths = f"`{key}`, {task} ({name})", {n: min(n, recipe.max_input_tokens) for n in lengths}
        self.read = Counter(lines=0, unanswerable=0, same_id=0)
        rows = rows_of(name, key, HUB_SUBSETS.get(task), "validation")
        questions = read_questions(rows, task if task in PARSERS else "auto", {}, self.read, _refuse)
        self.pool, self.questions = make_pool(questions, (), template_markers(tokenizer, template))
        if not self.questions:
            raise DataError(f"{self.what} has no question that can be asked ({dict(self.read)}).")
        self.questions.sort(key=lambda question: digest(recipe.seed, question.id))
        count_tokens(self.pool, tokenizer)
        self.whole = sum(self.pool.tokens[i] + NUMBER for i in self.pool.drawable)
        self.builder = Builder(ContextKeys(seed=recipe.seed, prompt=recipe.prompt), self.pool, tokenizer, template)
        checked = {"long": max((n for n in lengths if n <= 8192), default=min(lengths)), "short": min(lengths)}
        self.builder.check_sums(self.questions, checked)

    def fitting(self, wanted: int) -> Iterator[tuple[PreparedQuestion, dict[int, BuiltContext]]]:
        """Yield so many questions with a context of every length, the same questions at each; the others are counted.

        Raises:
            DataError: There is none.
        """
        built, dropped = 0, Counter[str]()
        for question in self.questions[: TRIES * wanted]:
            if built == wanted:
                break
            prepared = self.builder.prepare(question)
            if isinstance(prepared, str):
                dropped[prepared] += 1
                continue
            contexts = self._contexts(prepared)
            if isinstance(contexts, str):
                dropped[contexts] += 1
                continue
            built += 1
            yield prepared, contexts
        lengths = ", ".join(map(str, self.lengths))
        if not built:
            raise DataError(
                f"{self.what}: none of {sum(dropped.values())} questions gives contexts of {lengths} tokens "
                f"({dict(dropped)}); ask for other lengths, or give a file with more, or shorter, paragraphs."
            )
        log.log(
            logging.WARNING if built < wanted else logging.INFO,
            "%s: of %d questions asked for, %d built at each length of %s; dropped %s; read %s.",
            self.what, wanted, built, lengths, dict(dropped), dict(self.read),
        )  # fmt: skip

    def _contexts(self, prepared: PreparedQuestion) -> dict[int, BuiltContext] | str:
        contexts = {}
        for length, target in self.lengths.items():
            needed = self.whole + sum(self.pool.tokens[i] for i in prepared.question.evidence)
            if target - prepared.overhead > needed:
                return f"too_few_distractors_for_{length}"  # known without drawing them all
            built = self.builder.context(prepared, target, NAME)
            if isinstance(built, str):
                return f"{built}_{length}"
            if not built.fills(target):
                return f"paragraphs_too_long_for_{length}"
            contexts[length] = built
        return contexts


def item_fields(question: Question, context: BuiltContext) -> dict:
    """Return what an item takes over from a question and one of its contexts."""
    return {
        "prompt": context.row["prompt"], "question": question.question, "answers": question.answers,
        "evidence": context.row["evidence"], "groups": {} if question.hops is None else {"hops": str(question.hops)},
    }  # fmt: skip


def wanted_questions(questions: int, max_samples: int | None) -> int:
    """Return the number of questions of a task: as many as its key says, and no more than `max_samples`."""
    return questions if max_samples is None else min(questions, max_samples)


def _refuse(where: str, error: DataError) -> None:
    raise DataError(with_place(where, error)) from None
