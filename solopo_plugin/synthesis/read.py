"""Stage 1: questions with their evidence, from MuSiQue, HotpotQA, 2WikiMultihopQA, SQuAD or a user's own material.

Writes questions.jsonl, {"id", "question", "answers", "hops", "evidence", "distractors"} with paragraphs as {"title",
"text"}, and corpus.jsonl, further paragraphs that may serve as distractors.

The formats are those of qa/questions.py.
"""

import heapq
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from ..qa.files import DataError, split_names, write_jsonl
from ..qa.questions import Documents, given, id_at, make_paragraph, read_questions, with_place
from ..qa.seeded import digest
from ..qa.sources import Rows, file_rows, source_rows
from .converters import KINDS
from .folder import ROWS, documents_and_rows
from .recipe import DataRecipe

log = logging.getLogger(__name__)
SHOWN = 5  # bad lines that are printed before they are only counted


def run(recipe: DataRecipe, work: Path) -> dict:
    """Read the recipe's `input` and `corpus`; returns what was read, skipped and dropped.

    Raises:
        DataError: A bad line (unless `skip_bad`), a format that cannot be told, or no question at all.
    """
    try:
        return _run(recipe, work)
    except DataError as error:
        documents, rows = documents_and_rows(Path(recipe.input))
        if os.path.isdir(recipe.input) and not documents and not rows:
            raise DataError(
                f"`input: {recipe.input}` holds neither rows ({', '.join(sorted(ROWS))}) nor documents "
                f"({', '.join(KINDS)}), a README aside."
            ) from None
        if recipe.input_format != "auto" or not documents:
            raise
        name = documents[0].name
        hint = f"`input` holds documents, too, such as {name}; if they are meant, set `input_format: documents`."
        raise DataError(f"{error} {hint}") from None


def _run(recipe: DataRecipe, work: Path) -> dict:
    counts: Counter = Counter(lines=0, bad=0, unanswerable=0, same_id=0, questions=0)
    documents = read_documents(recipe, counts)
    chosen = None
    if recipe.max_questions is not None:
        ids = (question["id"] for question in questions(recipe, documents, Counter()))
        chosen = set(heapq.nsmallest(recipe.max_questions, ids, key=lambda id: digest(recipe.seed, id)))
    corpus = list(documents.values())

    def kept() -> Iterator[dict]:
        for question in questions(recipe, documents, counts):
            if chosen is None or question["id"] in chosen:
                counts["questions"] += 1
                yield question
            else:
                corpus.extend(question["evidence"] + question["distractors"])

    write_jsonl(work / "questions.jsonl", kept())
    if not counts["questions"]:
        raise DataError(f"`input: {recipe.input}` has no usable question ({dict(counts)}).")
    counts["corpus"] = write_jsonl(work / "corpus.jsonl", corpus)
    return dict(counts)


def questions(recipe: DataRecipe, documents: Documents, counts: Counter) -> Iterator[dict]:
    """Yield the usable questions of `input`, in its order; what is left out is counted in `counts`."""

    def bad(where: str, error: DataError) -> None:
        _skip(where, error, recipe, counts, "bad")

    rows = iter(tqdm(lines(recipe), desc="read", unit=" lines", disable=None))
    yield from read_questions(rows, recipe.input_format, documents, counts, bad, recipe.judge == "model")


def lines(recipe: DataRecipe) -> Rows:
    """Yield every row of `input`: its name for messages, and a function that parses it or raises `DataError`."""
    for name in split_names(recipe.input):
        yield from source_rows(name, "input", recipe.input_subset, recipe.input_split)


def read_documents(recipe: DataRecipe, counts: Counter) -> Documents:
    """Read the documents of `corpus`, by id (those without one by their line)."""
    documents: Documents = {}
    if recipe.corpus is None:
        return documents
    for where, load in file_rows(Path(recipe.corpus)):
        try:
            row = load()
            id = id_at(row) if {"id", "_id"} & given(row).keys() else where
            if id in documents:
                raise DataError(f"two documents have the id {id!r}.")
            documents[id] = make_paragraph(row, {})
        except DataError as error:
            _skip(where, error, recipe, counts, "bad_documents")
    return documents


def _skip(where: str, error: DataError, recipe: DataRecipe, counts: Counter, name: str) -> None:
    """Count a bad line, and show the first ones; or, without `skip_bad`, stop at it."""
    message = with_place(where, error)
    if not recipe.skip_bad:
        raise DataError(f"{message} Correct the line, or set `skip_bad: true`.") from None
    counts[name] += 1
    if counts[name] <= SHOWN:
        log.warning("%s Skipped.", message)
