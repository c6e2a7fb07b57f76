"""Stage 2: for every question a short and a long context of a target length, with the same evidence.

Reads questions.jsonl and corpus.jsonl; writes contexts.jsonl, {"id", "question", "answers", "hops", "short", "long"}.
Either side is {"prompt", "tokens", "paragraphs", "evidence", "dropped"}: the user's whole message, its tokens in the
chat template, how many paragraphs it shows, where the evidence is ({"paragraph": its number in the prompt, from 1,
"start", "end": its text is prompt[start:end]}), and which evidence a lossy short context lacks (indices, from 0).
Where questions.jsonl says where evidence comes from, "origins" has that: of each paragraph {"source", "section",
"quote"} as far as known.

A context is the evidence and, in RULER's way, distractors drawn without replacement from the paragraphs of all
questions, until no more fit; then all are shuffled. What is drawn depends on the seed and the question alone. Those of
other documents than the evidence's come first, where the paragraphs are passages of documents. Two other ways: what a
retrieval system gave, in its order; and with `contexts: document` the documents of the evidence themselves.
"""

import ctypes
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ..host.template import template_markers
from ..qa.contexts import Builder, PreparedQuestion
from ..qa.documents import Question, build_pool, count_tokens
from ..qa.files import DataError, write_jsonl
from ..qa.generate.calls import load_chat
from ..qa.recipe import Chat, ContextKeys, pick
from .document_contexts import build_document_context, by_source
from .recipe import DataRecipe, from_documents

TOO_LONG = "paragraphs_too_long_for_long"  # why a question is dropped


def run(recipe: DataRecipe, work: Path) -> dict:
    """Build the contexts of all questions; returns what was built, dropped and left out.

    Raises:
        DataError: No template or tokenizer, a prompt without its places, or no question of which both contexts exist.
    """
    tokenizer, template = load_chat(recipe.model.tokenizer, pick(recipe, Chat))
    pool, questions = build_pool(work, template_markers(tokenizer, template))
    count_tokens(pool, tokenizer)
    builder = Builder(pick(recipe, ContextKeys), pool, tokenizer, template)
    builder.check_sums(questions, {"long": recipe.long_tokens, "short": recipe.short_tokens})
    passages = by_source(pool) if recipe.contexts == "document" else {}
    if recipe.contexts == "document" and not passages:
        raise DataError(
            "`contexts: document` is for questions about a folder of documents, `input_format: documents`; leave "
            "`contexts` out."
        )
    dropped, left_out = Counter[str](), Counter[str]()
    lengths: dict[str, list[int]] = {"short": [], "long": []}

    def rows() -> Iterator[dict]:
        results = _map(partial(make_row, builder, recipe, passages=passages), questions, recipe.num_workers)
        for row, looked_at in tqdm(results, total=len(questions), desc="contexts", unit=" questions", disable=None):
            left_out.update(looked_at)
            if isinstance(row, str):
                dropped[row] += 1
                continue
            for side, values in lengths.items():
                values.append(row[side]["tokens"])
            yield row

    count = write_jsonl(work / "contexts.jsonl", rows())
    if not count:
        raise DataError(
            f"None of {len(questions)} questions gives a short and a long context ({dict(dropped)}); raise "
            f"`short_tokens`, {_remedy(recipe)}{', or split long paragraphs' * (TOO_LONG in dropped)}."
        )
    whole = left_out.pop("tokenised_whole", 0)  # prompts whose tokens do not add up
    return {
        "questions": len(questions),
        "contexts": count,
        "dropped": dict(sorted(dropped.items())),
        "paragraphs": len(pool),
        "distractors": len(pool.drawable),
        "left_out": dict(sorted(left_out.items())),
        "tokenised_whole": whole,
        "tokens": {
            side: {"min": min(v), "mean": round(sum(v) / len(v), 1), "max": max(v)} for side, v in lengths.items()
        },
    }


def _remedy(recipe: DataRecipe) -> str:
    """Say what, beside a higher `short_tokens`, helps where no question has both contexts."""
    if recipe.contexts == "document":
        return "give longer documents, or take `contexts: mixed`"
    more = "give more documents" if from_documents(recipe) else "add documents with `corpus`"
    return f"lower `long_tokens`, or {more}"


def make_row(
    builder: Builder, recipe: DataRecipe, question: Question, passages: dict[str, list[int]] | None = None
) -> tuple[dict | str, Counter]:
    """Return the row of a question, or why it is dropped; and how many distractors were left out for what reason.

    Args:
        builder: Of contexts.
        recipe: Of data.
        question: From the pool.
        passages: Of each document, with `contexts: document`.
    """
    prepared = builder.prepare(question)
    if isinstance(prepared, str):
        return prepared, Counter()
    rng = builder.rng(question, "lossy")
    lost = [rng.randrange(len(question.evidence))] if rng.random() < recipe.lossy_short else []
    if recipe.contexts == "document":
        sides = _of_documents(builder, recipe, passages or {}, prepared, lost)
    elif question.order is not None:
        sides = _of_retrieval(builder, recipe, prepared, lost)
    else:
        sides = _mixed(builder, recipe, prepared, lost)
    if isinstance(sides, str):
        return sides, prepared.leaks.counts
    fields = {"id": question.id, "question": question.question, "answers": question.answers, "hops": question.hops}
    origins = {"origins": question.origins} if question.origins else {}
    return {**fields, **origins, "short": sides["short"], "long": sides["long"]}, prepared.leaks.counts


Sides = dict[str, dict] | str  # short and long context, or why there are none


def _mixed(builder: Builder, recipe: DataRecipe, prepared: PreparedQuestion, lost: list[int]) -> Sides:
    """Build both contexts of the evidence and distractors drawn from the pool."""
    sides, only = {}, None
    for name, target, dropped in (("long", recipe.long_tokens, []), ("short", recipe.short_tokens, lost)):
        built = builder.context(prepared, target, name, dropped, only)
        if isinstance(built, str):
            return f"{built}_{name}"
        if name == "long" and not built.fills(target):
            return TOO_LONG
        sides[name] = built.row
        only = built.distractors if recipe.short_subset_of_long else None
    return sides


def _of_retrieval(builder: Builder, recipe: DataRecipe, prepared: PreparedQuestion, lost: list[int]) -> Sides:
    """Build both contexts of what was retrieved, in its order: the passages with the answer, and as many as fit."""
    question, order = prepared.question, prepared.question.order or []
    rank = {i: n for n, i in enumerate(order)}
    others = [i for i in order if i not in question.evidence]
    usable = [i for i in others if not builder.pool.has_marker[i]]

    def ranked(evidence: list[int], distractors: list[int]) -> list[int]:
        return sorted([*evidence, *distractors], key=rank.__getitem__)

    sides = {}
    for name, target, dropped, only in (
        ("long", recipe.long_tokens, [], usable), ("short", recipe.short_tokens, lost, [])
    ):  # fmt: skip
        built = builder.context(prepared, target, name, dropped, only, arrange=ranked, fill=False)
        if isinstance(built, str):
            return f"{built}_{name}"
        if name == "long" and not built.distractors:
            return "retrieved_evidence_alone"
        prepared.leaks.counts["retrieved_and_cut"] += len(others) - len(built.distractors) if name == "long" else 0
        sides[name] = built.row
    return sides


def _of_documents(
    builder: Builder, recipe: DataRecipe, passages: dict[str, list[int]], prepared: PreparedQuestion, lost: list[int]
) -> Sides:
    """Build a long context of the evidence's documents, and a short one of the evidence alone."""
    long = build_document_context(builder, prepared, recipe.long_tokens, passages)
    if isinstance(long, str):
        return long
    short = builder.context(prepared, recipe.short_tokens, "short", lost, only=[], fill=False)
    if isinstance(short, str):
        return f"{short}_short"
    return {"short": short.row, "long": long} if long["tokens"] > short.row["tokens"] else "document_is_evidence"


Make = Callable[[Question], tuple[dict | str, Counter]]
_make: Make  # of the worker processes, which inherit it


def _map(make: Make, questions: list[Question], num_workers: int) -> Iterator[tuple[dict | str, Counter]]:
    """Build in order, in this process or in others; the results are the same."""
    global _make
    if num_workers == 1:
        yield from map(make, questions)
        return
    _make = make
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork
    with multiprocessing.get_context("fork").Pool(num_workers, _die_with_parent) as processes:
        yield from processes.imap(_build, questions, chunksize=16)


def _build(question: Question) -> tuple[dict | str, Counter]:
    return _make(question)


def _die_with_parent() -> None:
    """End with the parent, also where that was killed; on Linux alone."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
