"""Read a file as a document: its title, and headings and paragraphs in their order.

Markdown, reStructuredText and plain text are read here. HTML goes through markdownify, Word through mammoth (both to
Markdown) and PDF through pdfminer.six, which finds columns; the three are the extra `documents`.
"""

import logging
import re
import textwrap
import unicodedata
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import dropwhile, pairwise, takewhile
from pathlib import Path
from typing import NamedTuple

from ..qa.files import DataError, reading, shown

VERSION = 3  # of what this file makes of a file; a higher one converts all again
TITLE = 100  # characters of the first line of a plain text that can be its title; ours
WRAPPED = 40  # characters from which on a line may have been broken for its length; ours
# signs of Chinese and Japanese, and marks that may stand beside them
UNSPACED, MARKS = r"\u2e80-\u312f\u31a0-\u9fff\uf900-\ufaff\uff00-\uff9f\U00020000-\U0003ffff", "“”‘’…—·"
UNSPACED_END = re.compile(f"[{UNSPACED}][{UNSPACED}{MARKS}]|[{MARKS}][{UNSPACED}]")
FULL_STOPS = "。｡！？؟۔।॥။។།։።"  # signs that end a sentence, of other scripts than Latin
NO_TITLE = f".,;:!?…，、；：،؛{FULL_STOPS}"  # what no title ends in, not even before quotes that close
LONGEST_HEADING = 200  # characters; what is longer is a paragraph. Ours
UNPACKED = 1 << 29  # bytes that a Word file may unpack to; ours, far above any that people write
HIDDEN = ("script", "style", "noscript", "template", "svg", "iframe")  # of HTML: what no reader sees as text
ATX = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*")
FENCE = re.compile(r" {0,3}(`{3,}(?![^\n`]*`)|~{3,})")  # a line with more ` is code within a line
# of YAML: lines `key:`, which come first; behind one without a value items; indented lines, comments, ends of brackets
YAML_KEY = r"[\w$@/'\"](?:[\w $@/.'\"()-]|:\b)*:"
YAML_REST = r"[# \t\]}].*\n|\n"
FRONT_MATTER = re.compile(
    rf"---[ \t]*\n(?:#.*\n|[ \t]*\n)*+(?={YAML_KEY}(?:[ \t].*)?\n)"
    rf"(?:{YAML_KEY}[ \t]*(?:[&!]\S*[ \t]*)?(?:#.*)?\n(?:-(?!--).*\n|{YAML_REST})*+|{YAML_KEY}[ \t].*\n|{YAML_REST})*+"
    r"(?:---|\.\.\.)[ \t]*(?:\n|\Z)"
)
# code in a fence and within a line, which may hold the signs of a comment; a comment; and one without an end
CODE_OR_COMMENT = re.compile(
    r"^[ \t]*(`{3,}(?![^\n`]*`)|~{3,}).*?(?:^[ \t]*\1[`~]*[ \t]*$|\Z)"
    r"|(?<![`\\])(`{1,8})(?!`)(?:(?!\n[ \t]*\n).)+?(?<!`)\2(?!`)|(?P<comment><!--.*?-->)|<!--.*",
    re.M | re.S,
)
RULE = re.compile(r" {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*")
RST_LINE = re.compile(r"([^\w\s])\1+[ \t]*")
RST_MARKUP = re.compile(r"\.\.(?: .*)?")  # a directive, a footnote, a comment, a target of links
RST_SEEN = re.compile(r"\.\. +(?:(\[[^\]]+\])|([\w:.+-]+)::)(?:[ \t]+(.*))?")  # those of them that readers see
RST_OPTION = re.compile(r"\s+:[\w-]+:(?:\s|$)")
RST_SETTINGS = set(  # directives behind whose name no words of the text stand
    "autoattribute autoclass autodata autodecorator autoexception autofunction automethod automodule autoproperty "
    "class code code-block container contents currentmodule default-role figure highlight ifconfig image include "
    "literalinclude module only role rst-class sourcecode tabularcolumns".split()
)
RST_HIDDEN = {"autosummary", "index", "meta", "raw", "toctree"}  # directives below which none stand either


class Block(NamedTuple):
    """Hold a heading of `level` 1 to 6, or a paragraph, whose level is 0."""

    level: int
    text: str


@dataclass
class Document:
    """Hold a document's name within the folder, its title and its blocks."""

    source: str
    title: str
    blocks: list[Block]


class NoText(DataError):
    """Say that a file holds no text."""


def read_document(path: Path, source: str) -> Document:
    """Return a file as a document, by the ending of its name, one of `KINDS`.

    Args:
        path: Of the file.
        source: What the document is called.

    Raises:
        NoText: There is nothing but headings.
        DataError: The file cannot be read. A converter may raise whatever it likes at a broken file.
    """
    title, blocks = KINDS[path.suffix.lower()](path)
    check_text(blocks, "; a scan must go through OCR first" * (path.suffix.lower() == ".pdf"))
    return Document(source, title or title_of(blocks) or Path(source).stem.replace("_", " "), blocks)


def check_text(blocks: list[Block], advice: str = "") -> None:
    """Raise NoText where there is nothing but headings."""
    if not any(block.level == 0 and block.text for block in blocks):
        raise NoText("it holds no text" + advice)


def title_of(blocks: list[Block]) -> str:
    """Return the first heading, if nothing but paragraphs of a banner can stand before it; else nothing."""
    first = next((block for block in blocks[:3] if block.level), None)
    return first.text if first else ""


def row_document(row: dict, source: str, number: int) -> Document:
    """Return line `number` of a .jsonl file, {"text"} and perhaps {"title"}, as a document of its own.

    Raises:
        NoText: There is nothing but headings.
        DataError: It is no such line.
    """
    text, title = row.get("text"), row.get("title")
    if not isinstance(text, str) or not isinstance(title, str | None):
        raise DataError(f"a line must have a `text` and perhaps a `title`, got {shown(row)}")
    blocks = list(markdown_blocks(without_unseen(clean(text))))
    check_text(blocks)
    title = " ".join((title or "").split()) or title_of(blocks) or f"{Path(source).stem} {number}"
    return Document(f"{source}:{number}", title, blocks)


def clean(text: str) -> str:
    """Return a text with one kind of line end, NFC, and no control characters."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f\u200b\ufeff\u00ad]", "", text.replace("\x0c", "\n\n"))


def decode(path: Path) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 with its mark.

    Raises:
        DataError: It is in neither.
    """
    with reading(path) as file:
        data = file.read()
    try:
        return clean(data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"it is no text in UTF-8 (byte {error.start}); save it as UTF-8") from None


def markdown_blocks(text: str) -> Iterator[Block]:
    """Yield headings and paragraphs of Markdown; a fenced block of code is one paragraph, whatever it holds."""
    lines: list[str] = []
    fence = ""

    def paragraph() -> Iterator[Block]:
        if joined := "\n".join(lines).strip("\n").rstrip():
            yield Block(0, joined if FENCE.match(joined) else unwrap(joined))
        lines.clear()

    for line in text.split("\n"):
        mark = FENCE.match(line)
        if fence:
            lines.append(line)
            if mark and mark[1].startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
                yield from paragraph()
        elif mark:
            fence = mark[1]
            lines.append(line)
        elif len(line) <= LONGEST_HEADING and (heading := ATX.fullmatch(line)):
            yield from paragraph()
            if words := plain(heading[2] or ""):
                yield Block(len(heading[1]), words)
        elif len(lines) == 1 and lines[0].strip() and re.fullmatch(r" {0,3}(=+|-{2,})[ \t]*", line):
            words = plain(lines.pop())
            yield Block(1 if "=" in line else 2, words) if len(words) <= LONGEST_HEADING else Block(0, words)
        elif not lines and RULE.fullmatch(line):
            continue
        elif line.strip():
            lines.append(line.rstrip())
        else:
            yield from paragraph()
    yield from paragraph()


def without_unseen(text: str) -> str:
    """Return Markdown without front matter and comments, which no reader sees."""
    front = FRONT_MATTER.match(text)
    text = text[front.end() if front else 0 :]
    return CODE_OR_COMMENT.sub(lambda found: "" if found["comment"] else found[0], text)


def unwrap(paragraph: str) -> str:
    """Return a paragraph with the line ends taken out that only break a long line.

    A line goes behind the one before it if that has `WRAPPED` characters, unless it is indented or begins as an item of
    a list, a row of a table or a quotation does.
    """
    lines = paragraph.split("\n")
    parts = lines[:1]
    for before, line in pairwise(lines):
        wrapped = len(before) >= WRAPPED and not re.match(r"\s|[-*+•|>#:=~]|\d+[.)] ", line)
        parts.append((seam(before, line) if wrapped and not before.startswith(("    ", "|")) else "\n") + line)
    return "".join(parts)


def seam(before: str, line: str) -> str:
    """Return what joins two lines: a blank, but nothing within Chinese and Japanese, whose words have none between."""
    return "" if UNSPACED_END.fullmatch(before[-1:] + line[:1]) else " "


def plain(heading: str) -> str:
    """Return a heading without the marks of emphasis, code and links."""
    words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return " ".join(re.sub(r"[*`]|\{#[^}]*\}|(?<!\w)_+|_+(?!\w)", "", words).split())


def rst_blocks(text: str) -> Iterator[Block]:
    """Yield headings and paragraphs of reStructuredText; levels are in the order in which underlines are first used."""
    styles: list[str] = []
    blocks = [[line.rstrip() for line in part.split("\n")] for part in re.split(r"\n[ \t]*(?=\n)", text)]
    hidden = False  # whether no reader sees what is indented
    for part in blocks:
        lines = [line for line in part if line]
        if hidden:
            lines = list(dropwhile(lambda line: line[0].isspace(), lines))
            hidden = not lines
        while lines:
            over = len(lines) > 2 and bool(RST_LINE.fullmatch(lines[0])) and lines[0] == lines[2]
            if over or (len(lines) > 1 and RST_LINE.fullmatch(lines[1]) and len(lines[1]) >= len(lines[0])):
                words = " ".join(lines[over].split())
                style = lines[1 + over][0] * (1 + over)
                if style not in styles:
                    styles.append(style)
                yield Block(min(6, 1 + styles.index(style)), words)
                lines = lines[2 + over :]
            elif RST_MARKUP.fullmatch(lines[0]):
                own = [lines[0], *takewhile(lambda line: line[0].isspace(), lines[1:])]
                if words := markup_words(own):
                    yield Block(0, unwrap(words))
                lines = lines[len(own) :]
                hidden = not lines and hides_body(own[0])
            else:
                if len(lines) > 1 or not RST_LINE.fullmatch(lines[0]):
                    yield Block(0, unwrap("\n".join(lines)))
                break


def hides_body(line: str) -> bool:
    """Return whether no reader sees what is indented below a line of markup: a comment, or one of `RST_HIDDEN`."""
    if seen := RST_SEEN.fullmatch(line):
        return (seen[2] or "").rpartition(":")[2] in RST_HIDDEN
    return line != ".." and not line.startswith(".. _")


def markup_words(lines: list[str]) -> str:
    """Return the words of a directive or a footnote of reStructuredText; of comments and targets of links none."""
    if not (seen := RST_SEEN.fullmatch(lines[0])) or hides_body(lines[0]):
        return ""
    number, name, words = seen.groups()
    name = (name or "").rpartition(":")[2]
    first = f"{number or name.capitalize() + ':'} {words}" if words and name not in RST_SETTINGS else ""
    body = textwrap.dedent("\n".join(dropwhile(RST_OPTION.match, lines[1:])))
    return "\n".join(filter(None, (first, body)))


def text_parts(text: str) -> Iterator[str]:
    """Yield what blank lines part, without blanks at the ends of lines."""
    for part in re.split(r"\n[ \t]*\n", text):
        if part.strip():
            yield "\n".join(line.rstrip() for line in part.strip("\n").split("\n")).rstrip()


def text_blocks(text: str) -> Iterator[Block]:
    """Yield the paragraphs of plain text, which are parted by blank lines."""
    return (Block(0, unwrap(part)) for part in text_parts(text))


def _markdown(path: Path) -> tuple[str, list[Block]]:
    return "", list(markdown_blocks(without_unseen(decode(path))))


def _rst(path: Path) -> tuple[str, list[Block]]:
    return "", list(rst_blocks(decode(path)))


def _text(path: Path) -> tuple[str, list[Block]]:
    """Read plain text; a short first line that stands alone and does not end as a sentence does is the title."""
    first, *others = list(text_blocks(decode(path))) or [Block(0, "")]
    ends = first.text.rstrip("\"'”’»」』")[-1:] in NO_TITLE
    is_title = others and "\n" not in first.text and len(first.text) <= TITLE and not ends
    return "", [Block(1, " ".join(first.text.split())), *others] if is_title else [first, *others]


def _html(path: Path) -> tuple[str, list[Block]]:
    with reading(path) as file:
        return _of_html(file.read())


def _of_html(page: bytes | str) -> tuple[str, list[Block]]:
    """Return title and blocks of HTML. What a reader does not see is left out: scripts, styles, comments."""
    from bs4 import BeautifulSoup
    from markdownify import MarkdownConverter

    soup = BeautifulSoup(page, "html.parser")
    for tag in soup.find_all(HIDDEN):
        tag.decompose()
    title = " ".join(soup.title.get_text().split()) if soup.title else ""
    converter = MarkdownConverter(
        heading_style="atx", strip=["a", "img"], escape_asterisks=False, escape_underscores=False
    )
    text = converter.convert_soup(soup.body or soup)
    return title, list(markdown_blocks(clean(text)))


def _docx(path: Path) -> tuple[str, list[Block]]:
    import mammoth

    with zipfile.ZipFile(path) as archive:
        size = sum(part.file_size for part in archive.infolist())
    if size > UNPACKED:
        raise DataError(f"it unpacks to {size} bytes")
    with open(path, "rb") as file:
        page = mammoth.convert_to_html(file, convert_image=mammoth.images.img_element(lambda image: {})).value
    return _of_html(f"<body>{page}</body>")


def _pdf(path: Path) -> tuple[str, list[Block]]:
    """Return the paragraphs of a PDF, which has no headings; words that a line's end parted are joined."""
    from pdfminer.high_level import extract_text

    logging.getLogger("pdfminer").setLevel(logging.ERROR)  # it warns of every odd font
    blocks = []
    for part in text_parts(clean(extract_text(path))):
        part = re.sub(r"(?<=[^\W\d_])-\n(?=[^\W\d_A-Z])|\(cid:\d+\)", "", part)
        lines = [line for each in part.split("\n") if (line := each.strip())]
        text = "".join(seam(before, line) + line for before, line in pairwise(["", *lines])).strip()
        if text and not text.isdecimal():  # the number of a page
            blocks.append(Block(0, text))
    return "", blocks


KINDS = {
    ".md": _markdown, ".markdown": _markdown, ".txt": _text, ".rst": _rst, ".html": _html, ".htm": _html, ".pdf": _pdf,
    ".docx": _docx,
}  # fmt: skip
# how a name ends -> the packages without which such a file cannot be read, by the names that they are imported under
NEEDS = {".html": ("bs4", "markdownify"), ".pdf": ("pdfminer",), ".docx": ("mammoth", "bs4", "markdownify")}
NEEDS[".htm"] = NEEDS[".html"]
