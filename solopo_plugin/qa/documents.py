"""Keep all paragraphs that a context may show in flat arrays: 400,000 of them, texts included, take about 0.6 GB."""

import hashlib
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from .answers import judged_form
from .files import DataError, read_jsonl
from .prompts import LABEL, SEAM, document_text

ORIGIN = ("source", "section", "quote")  # keys of a paragraph: its document, where in it, the words that answer


@dataclass
class Question:
    """Hold a question of questions.jsonl; its evidence are indices of the pool."""

    id: str
    question: str
    answers: list[str]
    hops: int | None
    evidence: list[int]
    has_marker: bool  # the question holds a text that only the chat template may write
    origins: list[dict] | None = None  # of each paragraph of the evidence, where it is known: what `ORIGIN` names
    order: list[int] | None = None  # all paragraphs that a retrieval system gave, best first; None: it was no such


class Origin(NamedTuple):
    """Say where a passage stands: in which document, under which heading, as its how many-th passage."""

    source: str
    section: str
    place: int


@dataclass
class Pool:
    """Hold the paragraphs of all questions, each once.

    Paragraph i is `documents[documents_at[i]:documents_at[i + 1]]`, in UTF-8; in the same way `normal` holds its title
    and text in `judged_form`.
    """

    documents: bytearray = field(default_factory=bytearray)
    documents_at: array = field(default_factory=lambda: array("q", [0]))
    normal: bytearray = field(default_factory=bytearray)
    normal_at: array = field(default_factory=lambda: array("q", [0]))
    first_like: array = field(default_factory=lambda: array("i"))  # the first paragraph with this text in normal form
    has_marker: bytearray = field(default_factory=bytearray)  # 1: holds a text that only the chat template may write
    drawable: array = field(default_factory=lambda: array("i"))  # distractors: one of each normal form, not marked
    tokens: array = field(default_factory=lambda: array("i"))  # of the document, its label and the blank line behind
    ends_apart: bytearray = field(default_factory=bytearray)  # 1: no token reaches over the document's ends
    origins: dict[int, Origin] = field(default_factory=dict)  # of those that are passages of a document

    def __len__(self) -> int:
        """Return the number of paragraphs."""
        return len(self.first_like)

    def document(self, i: int) -> str:
        """Return paragraph i as it stands behind `Document n:`, a space and the title, a new line, the text."""
        return self.documents[self.documents_at[i] : self.documents_at[i + 1]].decode()

    def text(self, i: int) -> str:
        """Return the paragraph's own text, verbatim."""
        return self.document(i).split("\n", 1)[1]

    def form(self, i: int) -> str:
        """Return title and text in normal form."""
        return self.normal[self.normal_at[i] : self.normal_at[i + 1]].decode()

    def holds(self, i: int, form: bytes) -> bool:
        """Return whether paragraph i holds a text, both in normal form."""
        return self.normal.find(form, self.normal_at[i], self.normal_at[i + 1]) >= 0


def build_pool(work: Path, markers: set[str]) -> tuple[Pool, list[Question]]:
    """Return the questions of a work folder, and the paragraphs of questions.jsonl and corpus.jsonl.

    Args:
        work: The folder.
        markers: Texts that only the chat template may write.
    """
    return make_pool(read_jsonl(work / "questions.jsonl"), read_jsonl(work / "corpus.jsonl"), markers)


def make_pool(rows: Iterable[dict], corpus: Iterable[dict], markers: set[str]) -> tuple[Pool, list[Question]]:
    """Return questions and pool of rows as in questions.jsonl and paragraphs as in corpus.jsonl."""
    pool = Pool()
    questions: list[Question] = []
    seen: dict[bytes, int] = {}
    marker = marker_pattern(markers)
    for row in tqdm(rows, desc="paragraphs", unit=" questions", disable=None):
        evidence = [_add(pool, paragraph, marker, seen) for paragraph in row["evidence"]]
        distractors = [_add(pool, paragraph, marker, seen) for paragraph in row["distractors"]]
        has_marker = bool(marker.search(row["question"]))
        origins = [{name: paragraph[name] for name in ORIGIN if name in paragraph} for paragraph in row["evidence"]]
        known = origins if any(origins) else None
        given = [*evidence, *distractors]
        order = [given[k] for k in row["order"]] if "order" in row else None
        fields = row["id"], row["question"], row["answers"], row["hops"], evidence, has_marker, known, order
        questions.append(Question(*fields))
    for paragraph in corpus:
        _add(pool, paragraph, marker, seen)
    pool.drawable.extend(i for i in range(len(pool)) if pool.first_like[i] == i and not pool.has_marker[i])
    return pool, questions


def marker_pattern(markers: set[str]) -> re.Pattern:
    """Return a pattern that finds one of these texts, and nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(markers))) or "(?!)")


def _add(pool: Pool, paragraph: dict, marker: re.Pattern, seen: dict[bytes, int]) -> int:
    """Return the index of a paragraph, which is added unless the same bytes are there."""
    document = document_text(paragraph)
    whole = _digest(document)
    if whole in seen:
        return seen[whole]
    form = judged_form(paragraph["text"]) or paragraph["text"]
    index = seen[whole] = len(pool)
    if "place" in paragraph:
        pool.origins[index] = Origin(paragraph["source"], paragraph["section"], paragraph["place"])
    pool.first_like.append(seen.setdefault(_digest(form), index))
    pool.has_marker.append(bool(marker.search(document)))
    pool.documents += document.encode()
    pool.documents_at.append(len(pool.documents))
    pool.normal += f"{judged_form(paragraph['title'])} {form}".encode()
    pool.normal_at.append(len(pool.normal))
    return index


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=12).digest()


def count_tokens(pool: Pool, tokenizer, batch: int = 512) -> None:
    """Tokenise each paragraph once, between the label of its own document and that of the next.

    Where the tokens of both labels come out as they do alone, no token reaches over the document's ends, and the tokens
    of a prompt are the sum of its parts', see `contexts.TokenBudget`.
    """
    edge = tokenizer.encode(SEAM, add_special_tokens=False)
    label = next((edge[k:] for k in reversed(range(len(edge))) if tokenizer.decode(edge[k:]).strip() == LABEL), None)
    texts = (f"{SEAM} 1:{pool.document(i)}{SEAM}" for i in range(len(pool)))
    with tqdm(total=len(pool), desc="tokenise", unit=" paragraphs", disable=None) as bar:
        while chunk := list(islice(texts, batch)):
            for ids in tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]:
                pool.tokens.append(len(ids) - len(edge))
                pool.ends_apart.append(label is not None and ids[: len(edge)] == edge and ids[-len(label) :] == label)
            bar.update(len(chunk))


def rank_by_bm25(pool: Pool) -> Callable[[str], Iterator[int]]:
    """Return a function from a question to the drawable paragraphs, those most like it first (BM25, Lucene's)."""
    try:
        import bm25s
        import numpy as np
    except ImportError:
        raise DataError("`distractors: bm25` needs a package: pip install bm25s.") from None

    index = bm25s.BM25(csc_backend="scipy")  # 0.4 GB less than numpy's at 400,000 paragraphs
    words = bm25s.tokenize((pool.form(i) for i in pool.drawable), stopwords="en", show_progress=False)
    index.index(words, show_progress=False)

    def ranked(question: str) -> Iterator[int]:
        query = bm25s.tokenize([judged_form(question)], stopwords="en", return_ids=False, show_progress=False)[0]
        scores = -index.get_scores(query) if query else np.zeros(len(pool.drawable))
        given, wanted = 0, min(256, len(scores))
        while given < len(scores):
            best = np.flatnonzero(scores <= np.partition(scores, wanted - 1)[wanted - 1])  # ties included
            order = best[np.argsort(scores[best], kind="stable")]
            yield from (pool.drawable[k] for k in order[given:])
            given, wanted = len(order), min(max(4 * wanted, len(order)), len(scores))

    return ranked
