"""Keep the questions that can be used; reads asked.jsonl and passages.jsonl, writes questions.jsonl and corpus.jsonl.

FILTERS are all reasons for which a question is left out, in the order in which they are looked at; the first that holds
is counted. What a model has to be asked for, `check_samples` answers with the evidence, without it, and with either of
two passages alone, is asked of the questions that are left by then, and is in checked.db as soon as it arrives. What
the passages say is for the model to tell that asked, what is known without them for the one that is to be trained.

The two files are as the stage `read` writes them. Paragraphs of the evidence have the title and the text of their
passage, and its source, section and place; and the quote, as it stands in the text. corpus.jsonl has every passage, by
whose `source` and `place` the stage `contexts` knows its document.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..qa.answers import gives_answer, holds_answer, judged_form
from ..qa.files import DataError, read_jsonl, write_jsonl
from ..qa.generate.calls import Call
from ..qa.generate.stored import answer_missing
from ..qa.prompts import document_text, lay_out, split_prompt
from ..qa.recipe import Sampling, pick
from ..qa.seeded import digest
from ..qa.store import Store
from .ask import BETWEEN_IDS, UPPER, asking_settings, read_prompt
from .recipe import DataRecipe

STORE = "checked.db"  # its name in a work folder
LETTERS = 12  # of a word of an answer at most, for scripts that put no spaces between words; ours
_TEXT = r"(?:text|passage|document|paragraph|excerpt|extract|section|article|context|quote|snippet)s?"
_SPEAKS = re.compile(
    rf"\b(?:this|these|above|following|given|provided)\s+{_TEXT}\b|\b(?:in|from|by|to|per)\s+the\s+{_TEXT}\b"
    r"|\b(?:both|two|first|second)\s+(?:text|passage|excerpt|snippet)s?\b|\b(?:document|passage|text)\s+[12]\b"
    r"|\b(?:mentioned|described|stated|given|quoted|listed)\s+(?:above|below|here)\b|\b(?:does|did|by)\s+the\s+author\b",
    re.I,
)
_PRONOUNS = "he she it they him her them his hers its their theirs we us our my you your this these those".split()
# not in capitals (US, IT), nor the `i` and the first `I` of other languages
_LEANS = re.compile(
    rf"\b(?:{'|'.join(f'[{word[0].upper()}{word[0]}]{word[1:]}' for word in _PRONOUNS)})\b|(?<=\s)I(?=[\s'’])"
)
_ASKS = re.compile(r"[?？؟]\Z|か。?\Z|[\u0370-\u03ff].*[;\u037e]\Z", re.S)  # a question of Greek ends in a semicolon
_NAMED = re.compile(
    rf"(?<=\s)[\"'“‘(]*[{UPPER}]\w|\d|\b(?:[Tt]he|[Aa]n?|[Ee]ach|[Ee]very|[Aa]ll|[Aa]ny|[Nn]o)\s+\w{{3}}"
)


@dataclass
class Candidate:
    """Hold a question that was asked about passages, and what is found out about it from filter to filter."""

    id: str
    hops: int
    question: str
    answer: str
    quotes: list[str]
    passages: list[dict]
    readable: bool
    marked: bool  # holds a text that only the chat template may write
    agree: int = 0  # answers with the evidence that give the answer
    known: int = 0  # answers without it that do
    alone: int = 0  # answers with one of two passages that do, of the passage with which more do
    repeats: bool = False  # one before it asks the same
    nth: int = 0  # of its document, in turn, from 0; of two documents the higher number
    turn: int = 0  # of all, from 0

    @property
    def sources(self) -> set[str]:
        """Return the documents of the passages."""
        return {passage["source"] for passage in self.passages}


FILTERS: dict[str, Callable[[Candidate, DataRecipe], bool]] = {  # reason -> whether a question is left out for it
    "malformed": lambda c, recipe: not c.readable,
    "special_tokens": lambda c, recipe: c.marked,
    "quote_not_in_passage": lambda c, recipe: None in map(verbatim, c.quotes, c.passages),
    "long_answer": lambda c, recipe: is_long(c.answer, recipe.answer_words),
    "answer_not_in_quote": lambda c, recipe: not any(holds_answer(quote, [c.answer]) for quote in c.quotes),
    "answer_in_question": lambda c, recipe: holds_answer(c.question, [c.answer]),
    "speaks_of_the_text": lambda c, recipe: bool(_SPEAKS.search(c.question)),
    "does_not_stand_alone": lambda c, recipe: not stands_alone(c.question),
    "no_agreement": lambda c, recipe: c.agree < recipe.min_agreement,
    "known_without_evidence": lambda c, recipe: recipe.max_known is not None and c.known > recipe.max_known,
    "one_passage_is_enough": lambda c, recipe: recipe.max_alone is not None and c.alone > recipe.max_alone,
    "asked_before": lambda c, recipe: c.repeats,
    "document_full": lambda c, recipe: recipe.max_per_document is not None and c.nth >= recipe.max_per_document,
    "beyond_max_questions": lambda c, recipe: recipe.max_questions is not None and c.turn >= recipe.max_questions,
}


def run(recipe: DataRecipe, work: Path) -> dict:
    """Filter the questions; returns what was kept, and left out for which reason.

    Raises:
        DataError: No question is left, or a prompt lacks its place.
    """
    passages = {passage["id"]: passage for passage in read_jsonl(work / "passages.jsonl")}
    left = [read_candidate(row, passages) for row in read_jsonl(work / "asked.jsonl")]
    candidates, dropped = len(left), dict.fromkeys(FILTERS, 0)
    unaided = read_prompt(recipe, "unaided.txt", "{question}")  # before anything is asked
    with Store(work / STORE) as store:
        finds_out: dict[str, Callable[[list[Candidate]], None]] = {  # before a filter that needs it
            "no_agreement": lambda left: ask_with_evidence(recipe, store, left),
            "known_without_evidence": lambda left: ask_without(recipe, store, left, *unaided),
            "one_passage_is_enough": lambda left: ask_with_one(recipe, store, left),
            "asked_before": mark_repeats,
            "document_full": lambda left: take_turns(left, recipe.seed, recipe.max_per_document),
            "beyond_max_questions": lambda left: take_turns(left, recipe.seed),
        }
        for reason, leaves_out in FILTERS.items():
            finds_out.get(reason, lambda left: None)(left)
            kept = [candidate for candidate in left if not leaves_out(candidate, recipe)]
            dropped[reason], left = len(left) - len(kept), kept
    if not left:
        reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.items() if n)
        raise DataError(f"None of {candidates} questions can be used ({reasons}); read {work / 'asked.jsonl'}.")
    write_jsonl(work / "questions.jsonl", map(make_question, left))
    corpus = ({name: passage[name] for name in PARAGRAPH} for passage in passages.values())
    documents, hops = Counter(s for c in left for s in c.sources), Counter(str(c.hops) for c in left)
    return {
        "candidates": candidates, "questions": len(left), "dropped": dropped, "hops": dict(sorted(hops.items())),
        "documents": len(documents), "most_of_a_document": max(documents.values()),
        "corpus": write_jsonl(work / "corpus.jsonl", corpus),
    }  # fmt: skip


PARAGRAPH = ("title", "text", "source", "section", "place")


def read_candidate(row: dict, passages: dict[str, dict]) -> Candidate:
    """Return a line of asked.jsonl with its passages."""
    texts = row["question"] or "", row["answer"] or "", row["quotes"] or []
    asked_about = [passages[name] for name in row["passages"]]
    return Candidate(row["id"], row["hops"], *texts, asked_about, row["question"] is not None, row["marked"])


def make_question(candidate: Candidate) -> dict:
    """Return a question as questions.jsonl has it."""
    evidence = [
        {**{name: passage[name] for name in PARAGRAPH}, "quote": verbatim(quote, passage)}
        for quote, passage in zip(candidate.quotes, candidate.passages, strict=True)
    ]
    return {
        "id": candidate.id, "question": candidate.question, "answers": [candidate.answer], "hops": candidate.hops,
        "evidence": evidence, "distractors": [],
    }  # fmt: skip


def verbatim(quote: str, passage: dict) -> str | None:
    """Return the quote as it stands in the passage, to the letter but for where lines break; None if it does not."""
    found = re.search(r"\s+".join(map(re.escape, quote.split())), passage["text"])
    return found[0] if found else None


def is_long(answer: str, words: int) -> bool:
    """Return whether an answer has more than so many words, or than so many times `LETTERS` letters."""
    return len(answer.split()) > words or len(answer) > words * LETTERS


def stands_alone(question: str) -> bool:
    """Return whether a question is one, of three words or more, and says what each pronoun stands for before it.

    The pronouns are English. In a script without spaces only the end is looked at: a question mark, or Japanese `か`.
    """
    if not _ASKS.search(question) or (question.isascii() and len(question.split()) < 3):
        return False
    leans, named = _LEANS.search(question), _NAMED.search(question)
    return leans is None or (named is not None and named.start() < leans.start())


def ask_with_evidence(recipe: DataRecipe, store: Store, left: list[Candidate]) -> None:
    """Count the answers with the evidence that give the answer, asked of the model that asks as `sample` does."""
    asked = {c.id: (c, c.passages) for c in left}
    rights = count_right(recipe.asker, store, "with", asked, with_passages(recipe))
    for candidate, right in zip(left, rights, strict=True):
        candidate.agree = right


def ask_without(recipe: DataRecipe, store: Store, left: list[Candidate], before: str, behind: str) -> None:
    """Count the answers without any context that give the answer, asked of the model that is trained.

    Of their prompt `before` and `behind` are what stands around the question.
    """
    if recipe.max_known is None:
        return
    asked: Asked = {c.id: (c, []) for c in left}
    rights = count_right(recipe, store, "without", asked, lambda c, _: before + c.question + behind)
    for candidate, right in zip(left, rights, strict=True):
        candidate.known = right


def ask_with_one(recipe: DataRecipe, store: Store, left: list[Candidate]) -> None:
    """Count the answers with either of two passages alone that give the answer, of the model that asks."""
    if recipe.max_alone is None:
        return
    asked = {BETWEEN_IDS.join([c.id, p["id"]]): (c, [p]) for c in left if c.hops > 1 for p in c.passages}
    rights = count_right(recipe.asker, store, "with part of", asked, with_passages(recipe))
    for (candidate, _), right in zip(asked.values(), rights, strict=True):
        candidate.alone = max(candidate.alone, right)


def with_passages(recipe: DataRecipe) -> Callable[[Candidate, list[dict]], str]:
    """Return a function that writes the prompt of the rows with a question and these passages."""
    before, behind = split_prompt(recipe.prompt)
    return lambda candidate, shown: lay_out(before, behind, candidate.question, map(document_text, shown))[0]


Asked = dict[str, tuple[Candidate, list[dict]]]  # name of what is asked -> the question, and the passages beside it


def count_right(
    recipe: DataRecipe, store: Store, name: str, asked: Asked, prompt: Callable[[Candidate, list[dict]], str]
) -> list[int]:
    """Return of all that is asked how many of `check_samples` answers give the question's, by the judge's rule.

    Args:
        recipe: Of the model that answers.
        store: Where the answers are and go.
        name: Of the answers there, which in front of `evidence` says what is checked.
        asked: All questions.
        prompt: Writes the prompt.
    """
    n = recipe.check_samples
    found = answer_missing(
        store, name, asking_settings(recipe, n),
        lambda: (Call(id, tuple(range(n)), prompt(*shown)) for id, shown in asked.items()),
        pick(recipe, Sampling), recipe.model, desc=f"check {name} evidence",
    )  # fmt: skip
    return [
        sum(gives_answer(store.get(found[id, k])["text"], [candidate.answer]) for k in range(n))
        for id, (candidate, _) in asked.items()
    ]


def mark_repeats(left: list[Candidate]) -> None:
    """Mark what asks the same as one before it: in normal form, or the same answer from the same passages."""
    seen: set[object] = set()
    for candidate in left:
        names = tuple(passage["id"] for passage in candidate.passages)
        asked = {judged_form(candidate.question), (names, judged_form(candidate.answer))}
        candidate.repeats = not seen.isdisjoint(asked)
        if not candidate.repeats:
            seen |= asked


def take_turns(left: list[Candidate], seed: int, limit: int | None = None) -> None:
    """Give the questions numbers in which hops take turns, and among those of the same hops documents, by the seed.

    A pair takes the turn of its first passage's document and counts for both; from number `limit` on it does for none.
    """
    rows: dict[int, list[tuple]] = defaultdict(list)
    of_one: Counter = Counter()
    for candidate in sorted(left, key=lambda c: digest(seed, "turn", c.id)):
        source = candidate.passages[0]["source"]
        rows[candidate.hops].append((of_one[candidate.hops, source], digest(seed, "turn", source), candidate))
        of_one[candidate.hops, source] += 1
    turns = [(i, hops, row[2]) for hops in rows for i, row in enumerate(sorted(rows[hops], key=lambda row: row[:2]))]
    of_document: Counter = Counter()
    for turn, (_, _, candidate) in enumerate(sorted(turns, key=lambda row: row[:2])):
        candidate.turn, candidate.nth = turn, max(of_document[source] for source in candidate.sources)
        if limit is None or candidate.nth < limit:
            of_document.update(candidate.sources)
