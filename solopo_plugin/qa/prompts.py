"""Lay documents and a question out as one prompt, and find the documents in a prompt again."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from .files import DataError, as_data_error

BETWEEN = "\n\n"  # documents
LABEL = "Document"
SEAM = BETWEEN + LABEL


def prompt_hash(prompt: str) -> str:
    """Return by what the store and files of answers know a prompt."""
    return hashlib.sha256(prompt.encode("utf-8", "replace")).hexdigest()[:32]


def document_text(paragraph: dict) -> str:
    """Return a paragraph, {"title", "text"}, as it stands behind `Document n:`."""
    return f" {paragraph['title']}\n{paragraph['text']}" if paragraph["title"] else f"\n{paragraph['text']}"


# Ours: the paper's wording (its figures 6 and 7) is not known to us. How an answer ends is the paper's.
PROMPT = """\
Here are some documents and a question about them. Only a few of the documents bear on the question.

{documents}

Question: {question}

Answer from the documents alone. Think step by step: say which documents matter and what follows from them. Then end \
with one line, `The answer is: ...`, that gives the answer in as few words as possible. If the documents do not tell, \
end with `The answer is: No answer.`"""


def lay_out(before: str, behind: str, question: str, documents: Iterable[str]) -> tuple[str, list[dict]]:
    """Return the message, and where in it the text of each document is.

    Args:
        before: What stands before the documents, from `split_prompt`.
        behind: What stands behind them.
        question: What is asked.
        documents: As `document_text` writes them.
    """
    parts = [before.replace("{question}", question)]
    places: list[dict] = []
    at = len(parts[0])
    for number, document in enumerate(documents, 1):
        label = (BETWEEN if places else "") + f"{LABEL} {number}:"
        start, end = at + len(label) + document.index("\n") + 1, at + len(label) + len(document)
        places.append({"paragraph": number, "start": start, "end": end})
        parts += [label, document]
        at = end
    return "".join([*parts, behind.replace("{question}", question)]), places


def split_prompt(prompt: str | None) -> tuple[str, str]:
    """Return what stands before and behind the documents; None: of `PROMPT`.

    Raises:
        DataError: `{documents}` or `{question}` is not there exactly once.
    """
    prompt = PROMPT if prompt is None else prompt
    for place in ("{documents}", "{question}"):
        if prompt.count(place) != 1:
            raise DataError(
                f"`prompt` must hold {place} once, it does so {prompt.count(place)} times: {prompt[:80]!r}."
            )
    before, behind = prompt.split("{documents}")
    return before, behind


def read_prompt_file(path: Path, named: str, places: Iterable[str]) -> str:
    """Return the text of a file that is a prompt, without blanks around it.

    Args:
        path: Of the file.
        named: How messages name it, with the recipe's key.
        places: What has to be in it once each, such as `{question}`.

    Raises:
        DataError: The file cannot be read, or a place is not in it exactly once.
    """
    with as_data_error(path, "read"):
        content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise DataError(f"{named} is no text in UTF-8; save it as such.") from None
    for place in places:
        if (times := text.count(place)) != 1:
            raise DataError(f"{named} must hold {place} once, it does so {times} times.")
    return text


def document_spans(prompt: str, n: int) -> list[tuple[int, int]] | None:
    """Return where in a prompt its `n` documents begin and end, with their labels; None if they are not there.

    The last one ends where our prompt asks the question; with another prompt it runs to the end, which asks the
    question and names no answer.
    """
    spans, at = [], prompt.find(f"{LABEL} 1:")
    for number in range(1, n + 1):
        end = prompt.find(f"{BETWEEN}{LABEL} {number + 1}:" if number < n else f"{BETWEEN}Question:", at)
        if number == n and end < 0:
            end = len(prompt)
        if at < 0 or end < 0:
            return None
        spans.append((at, end))
        at = end + len(BETWEEN)
    return spans


def split_documents(prompt: str, n: int) -> list[str] | None:
    """Return title and text of the `n` documents of a prompt, None if they are not there."""
    spans = document_spans(prompt, n)
    return None if spans is None else [prompt[start:end].partition(":")[2] for start, end in spans]
