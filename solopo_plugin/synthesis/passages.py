"""Split a document into passages along its headings, paragraphs and sentences, none longer than a number of tokens."""

import re
from collections.abc import Callable, Iterator
from itertools import groupby, pairwise

from .converters import FULL_STOPS, Block, Document

Count = Callable[[list[str]], list[int]]  # texts -> tokens of each
CLOSED = r"['\"’”»」』）)\]]*"  # behind a sentence
SENTENCE_END = re.compile(  # or the next item of a list
    rf"[.!?]{CLOSED}\s+|[{FULL_STOPS}]{CLOSED}\s*|\n(?=\s*(?:[-*+•|]|\d+[.)])\s)"
)
LINE_END = re.compile(r"\n")
STEP = " > "  # between headings
BETWEEN = "\n\n"  # paragraphs
SEAM_TOKENS = 2  # that `BETWEEN` can add; one in most tokenizers


def split_document(document: Document, budget: int, count: Count) -> Iterator[dict]:
    """Yield the passages of a document in their order: {"title", "text", "source", "section", "place", "tokens"}.

    A passage never reaches over a heading. Of a section that needs several, all are about equally long. The text is as
    it stands in the document; the title is the document's and, behind it, the section.

    Args:
        document: As a converter returns it.
        budget: Tokens of a text at most.
        count: Counts them.
    """
    place = 0
    for headings, paragraphs in sections(document):
        section = STEP.join(headings)
        title = STEP.join([document.title, *headings])
        for text, tokens in split_section(paragraphs, budget, count):
            yield {
                "title": title, "text": text, "source": document.source, "section": section, "place": place,
                "tokens": tokens,
            }  # fmt: skip
            place += 1


def sections(document: Document) -> Iterator[tuple[list[str], list[str]]]:
    """Yield headings from the outermost to the innermost, and the paragraphs below; the title is none of them.

    A heading with nothing below it, not even another heading, is a paragraph of what it stands in.
    """
    above: list[Block] = []
    paragraphs: list[str] = []
    for block, after in pairwise([*document.blocks, Block(1, ""), Block(1, "")]):
        is_text = not block.level or (0 < after.level <= block.level and block.text not in ("", document.title))
        if block.level:
            outer = [heading for heading in above if heading.level < block.level]
            if paragraphs and not (is_text and outer == above):
                yield [heading.text for heading in above if heading.text != document.title], paragraphs
                paragraphs = []
            above = outer if is_text else [*outer, block]
        if is_text:
            paragraphs.append(block.text)


def split_section(paragraphs: list[str], budget: int, count: Count) -> Iterator[tuple[str, int]]:
    """Yield the texts of a section with their tokens: paragraphs together as far as they fit, long ones in pieces."""
    counted = zip(paragraphs, count(paragraphs), strict=True)
    for is_long, run in groupby(counted, key=lambda item: item[1] > budget):
        if not is_long:
            yield from pack(list(run), budget, BETWEEN)
            continue
        for text, tokens in run:
            yield from split_paragraph(text, tokens, budget, count)


def split_paragraph(text: str, tokens: int, budget: int, count: Count) -> Iterator[tuple[str, int]]:
    """Yield a paragraph in pieces of at most `budget` tokens: at sentences, else at ends of lines, else at blanks."""
    if tokens <= budget or len(text) == 1:
        yield text, tokens
        return
    parts = split_behind(SENTENCE_END, text)
    parts = parts if len(parts) > 1 else split_behind(LINE_END, text)
    parts = parts if len(parts) > 1 else list(cut(text, len(text) * budget // (tokens + budget) or 1))
    pieces = [joined for joined, _ in pack(list(zip(parts, count(parts), strict=True)), budget, "")]
    if len(pieces) == 1:  # parts may have fewer tokens than the text that they make up
        pieces = ["".join(half) for half in (parts[: len(parts) // 2], parts[len(parts) // 2 :])]
    pieces = [stripped for piece in pieces if (stripped := piece.strip())]
    for piece, n in zip(pieces, count(pieces), strict=True):
        yield from split_paragraph(piece, n, budget, count)


def split_behind(end: re.Pattern, text: str) -> list[str]:
    """Return the parts of a text that end with what a pattern finds; together they are the text."""
    places = [0, *(match.end() for match in end.finditer(text)), len(text)]
    return [text[start:stop] for start, stop in pairwise(places) if start < stop]


def cut(text: str, size: int) -> Iterator[str]:
    """Yield a text in pieces of at most `size` characters, which end at a blank where there is one."""
    start = 0
    while start < len(text):
        end = start + size
        blank = text.rfind(" ", start, end) + 1 if end < len(text) else 0
        yield text[start : blank or end]
        start = blank or end


def pack(parts: list[tuple[str, int]], budget: int, between: str) -> Iterator[tuple[str, int]]:
    """Yield parts joined to texts of at most `budget` tokens, about equally long; a part that is longer stays alone.

    Tokens are the sums of the parts', with `SEAM_TOKENS` for what stands between.
    """
    seam = SEAM_TOKENS if between else 0
    total = sum(tokens + seam for _, tokens in parts)
    wanted = total / max(1, -(-total // budget))
    texts: list[str] = []
    used = 0
    for text, tokens in parts:
        cost = tokens + (seam if texts else 0)
        if texts and (used + cost > budget or used + cost / 2 > wanted):
            yield between.join(texts), used
            texts, used, cost = [], 0, tokens
        texts.append(text)
        used += cost
    if texts:
        yield between.join(texts), used
