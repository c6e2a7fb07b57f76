"""Every kind of file becomes a title, headings and paragraphs; what is broken says so."""

import random
import time

import pytest
from made_files import page, write_docx, write_pdf
from PIL import Image

from solopo_plugin.qa.files import DataError
from solopo_plugin.synthesis.converters import (
    KINDS,
    Block,
    NoText,
    markdown_blocks,
    read_document,
    rst_blocks,
    unwrap,
    without_unseen,
)  # fmt: skip

BOOK = [
    Block(1, "The harbour"), Block(0, "Ships come in."), Block(2, "Moorings"), Block(0, "A berth costs six florins."),
]  # fmt: skip
HTML = """<html><head><title>The harbour</title><style>p {color: red}</style><script>var a = "a script";</script></head>
<body><h1>The <em>harbour</em></h1><p>Ships come in.</p><script>document.write("written by a script")</script>
<noscript>switch it on</noscript><!-- a comment --><h2>Moorings</h2>
<p onclick="steal()">A berth costs <a href="javascript:x()">six</a> florins.</p></body></html>"""
TEXTS = {
    "a.md": "---\ntitle: x\n---\n# The harbour\n\nShips come in.\n\n## Moorings ##\n\nA berth costs six florins.\n",
    "b.markdown": "The *harbour*\n===========\nShips come in.\n\n[Moorings](x.md)\n---\n\nA berth costs six florins.\n",
    "c.rst": "===========\nThe harbour\n===========\n\n.. note to self\n\nShips come in.\n\nMoorings\n--------\n"
    "A berth costs six florins.\n\n----\n",
    "d.html": HTML,
    "i.htm": HTML.replace("<h1>", "<hr><h1>").replace("<p onclick", "<hr><p onclick"),
    "e.htm": HTML.replace("<html>", '<html><meta charset="utf-16">'),
}


@pytest.mark.parametrize("name", [*TEXTS, "f.docx"])
def test_kinds_with_headings(name, tmp_path):
    path = tmp_path / name
    if name == "f.docx":
        write_docx(path, BOOK)
    else:
        path.write_text(TEXTS[name], encoding="utf-16" if name == "e.htm" else "utf-8")
    document = read_document(path, f"deep/{name}")
    assert (document.source, document.title, document.blocks) == (f"deep/{name}", "The harbour", BOOK)


def test_every_kind_is_tested():
    assert {f".{name.rpartition('.')[2]}" for name in [*TEXTS, "f.docx", "g.pdf", "h.txt"]} == set(KINDS)


def test_plain_text_has_a_title_where_its_first_line_is_one(tmp_path):
    path = tmp_path / "old_town.txt"
    path.write_bytes("\ufeffThe town\r\n\r\nIt has walls.\r\n  A gate.\r\n\r\n\r\nIt is old.".encode())
    town = read_document(path, "old_town.txt")
    assert town.title == "The town" and town.blocks[1:] == [
        Block(0, "It has walls.\n  A gate."),
        Block(0, "It is old."),
    ]
    for first in ("It has walls.", '"It has walls!"', "磨坊建于河边。", "他说：“好。”", "أليس كذلك؟", "मिल पुरानी है।"):
        path.write_text(f"{first}\n\nIt is old.")
        assert read_document(path, "old_town.txt").title == "old town"
    for first in ("The “old” town", "《北京大学》", "C#", "الطاحونة"):
        path.write_text(f"{first}\n\nIt is old.")
        assert read_document(path, "old_town.txt").title == first
    path.write_text("A lonely line")
    assert [block.level for block in read_document(path, "x").blocks] == [0]


def test_a_fence_hides_headings():
    code, open_end = "```sh\n# no heading\n\n## nor this\n```", "~~~\n```\n# open to the end"
    blocks = [Block(1, "A"), Block(0, code), Block(1, "B"), Block(0, open_end)]
    assert list(markdown_blocks(f"# A\n{code}\n# B\n{open_end}")) == blocks


@pytest.mark.parametrize(
    "text, words",
    [
        ("---\n\n# Rules\n\nNo dogs.\n\n---\n\nNo cats.\n", ["Rules", "No dogs.", "No cats."]),
        ("---\nNote: no dogs.\n\nNo cats.\n\n---\n", ["Note: no dogs.", "No cats."]),
        ("---\n'a': x\ntags:\n- one\n\nlist: [\n  2,\n]\n# three\n...\nNo cats.\n", ["No cats."]),
        ("---\nDay: One\n\n# Rules\n\n- No dogs.\n\n---\n\nNo cats.", ["Day: One", "Rules", "- No dogs.", "No cats."]),
        ("---\nkinds: &k\n- one\ntags: # three\n# of\n\n- one\na: >\n  - b\n---\nNo cats.\n", ["No cats."]),
        ("---\ntags:\n", ["tags:"]),
        ("---\n\n# Rules\n- one\n\n---\n\nNo cats.\n", ["Rules", "- one", "No cats."]),
        ("---\ndate created: 2021\ntags: x\n---\nNo cats.\n", ["No cats."]),
        ("---\n\n# of Obsidian\n$schema: x\n@id: y\n/a: z\nog:title: v\n---\nNo cats.\n", ["No cats."]),
        ("`<!--` begins, ``a ` -->`` ends.\n", ["`<!--` begins, ``a ` -->`` ends."]),
        ("~~~\n<!-- a -->\n~~~\n\nb\n    <!-- c -->\n", ["~~~\n<!-- a -->\n~~~", "b"]),
        (
            "- a\n\n    <!-- b -->\n    ```\n    <!-- c\n\n    -->\n    ```",
            ["- a", "    ```\n    <!-- c", "    -->\n    ```"],
        ),
        ("```a``` <!-- b -->\n# C\n\n```` `a` <!-- b --> c\n", ["```a```", "C", "```` `a`  c"]),
        ("a ` <!-- b\n\n``` c --> d\n\ne\n", ["a `  d", "e"]),
        ("a <!-- b\n", ["a <!-- b"]),
    ],
)
def test_markdown_loses_front_matter_and_comments_and_nothing_else(text, words):
    assert [block.text for block in markdown_blocks(without_unseen(text))] == words


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"{'`' * n} a " for n in range(1, 900)),
        "<!-- " * 50_000,
        "`" * 100_000 + " a",
        "---\n" + "a: b a:b " * 20_000,
        "---\n" + "a:\n\n" * 50_000 + "b",
    ],
)
def test_marks_without_an_end_are_text_and_cost_no_time(text):
    start = time.perf_counter()
    assert without_unseen(text) == text
    assert time.perf_counter() - start < 1


def test_html_loses_no_words_that_look_like_marks_of_markdown(tmp_path):
    (tmp_path / "a.html").write_text(
        "<hr><p>a: b</p><hr><p>Write &lt;!-- so.</p><p>It costs 12.</p><p>End by --&gt;.</p>"
    )
    texts = [block.text for block in read_document(tmp_path / "a.html", "a.html").blocks]
    assert texts == ["a: b", "Write <!-- so.", "It costs 12.", "End by -->."]


def test_words_behind_a_directive_of_rst_are_kept_and_comments_are_not():
    text = """.. note:: Closed at five.
   On Fridays at three.

.. py:function:: open(path)
   :noindex:

   Opens it.

.. [1] Who did
   it.

.. image:: a.png
   :alt: no

.. code-block:: python

.. |a| replace:: b

.. a comment
   of two lines

..
   another

.. of one

   more

.. raw:: html

   <div>x</div>
.. toctree::
   intro

   usage

.. automodule:: a.b
   :members:

.. _install:
Install
-------
.. warning:: Hot.
Below."""
    assert list(rst_blocks(text)) == [
        Block(0, "Note: Closed at five.\nOn Fridays at three."), Block(0, "Function: open(path)"),
        Block(0, "   Opens it."), Block(0, "[1] Who did\nit."), Block(1, "Install"), Block(0, "Warning: Hot."),
        Block(0, "Below."),
    ]  # fmt: skip


def test_levels_of_rst_come_in_the_order_of_their_underlines():
    text = "A\n==\nx\n\nB\n~~\n\ny\n\nC\n--\nz\n\nD\n~~\n\nv"
    assert [b for b in rst_blocks(text) if b.level] == [Block(1, "A"), Block(2, "B"), Block(3, "C"), Block(2, "D")]


def test_lines_that_were_broken_for_their_length_are_joined():
    line = "The clerk keeps the register of houses and signs"
    assert unwrap(f"{line}\nevery deed.\nShort\nlines stay.") == f"{line} every deed.\nShort\nlines stay."
    for kept in (f"{line}\n- an item of a list", f"{line}\n    code", f"| {line} |\n| a row |", f"{line}\n2. second"):
        assert unwrap(kept) == kept


CHINESE = "北京大学创办于一八九八年，是中国近代第一所国立大学，也是中国最早以大学之名创办的学校，首任校长“孙家鼐”先生。"


JAPANESE = "東京タワーは、日本の東京都港区にある、高さ三百三十三メートルの電波塔である。" * 2


@pytest.mark.parametrize("text", [CHINESE, JAPANESE])
def test_lines_of_scripts_without_spaces_are_joined_without_one(text, tmp_path, monkeypatch):
    """Join them wherever a line ends; beside words of other scripts, and in Korean, stands a blank."""
    monkeypatch.setattr("pdfminer.high_level.extract_text", lambda path: path.read_text())
    for end in range(40, len(text) - 1):
        for name in ("a.txt", "a.md", "a.pdf"):
            (tmp_path / name).write_text(f"{text[:end]}\n{text[end:]}")
            assert [block.text for block in read_document(tmp_path / name, name).blocks] == [text]
    korean = "로스빅의 방앗간은 강가에 있다 " * 3 + "로스빅"
    for line, after in ((text, "Rosvik"), ("Rosvik " * 9 + "town", "东京"), (korean, "의")):
        assert unwrap(f"{line}\n{after}") == f"{line} {after}"


def test_two_columns_are_read_one_after_the_other(tmp_path):
    """Even where the file draws them line by line, across."""
    rng = random.Random(0)
    texts = [" ".join([side, *(f"{side}{rng.randrange(999)}" for _ in range(150))]) for side in ("left", "right")]
    columns = [page(text, x, 38) for text, x in zip(texts, (50, 330), strict=True)]
    lines = [line for pair in zip(*columns, strict=False) for line in pair]
    lines += max(columns, key=len)[min(map(len, columns)) :]
    write_pdf(tmp_path / "two.pdf", [lines])
    words = " ".join(block.text for block in read_document(tmp_path / "two.pdf", "two.pdf").blocks).split()
    assert words == " ".join(texts).split()


def test_a_pdf_has_its_words_whole_and_no_page_numbers(tmp_path):
    for master in ("The harbour master", "The harbour master of the town of Rosvik"):  # of a short line, and a long one
        lines = [(50, 740, f"{master} signs for the moor-"), (50, 726, "ing of ships."), (300, 40, "17")]
        write_pdf(tmp_path / "a b.pdf", [lines])
        document = read_document(tmp_path / "a b.pdf", "a b.pdf")
        assert document.title == "a b"
        assert document.blocks == [Block(0, f"{master} signs for the mooring of ships.")]


def test_what_holds_no_text_says_so(tmp_path):
    write_pdf(tmp_path / "scan.pdf", [[], []])
    pages = [Image.effect_noise((300, 400), 50) for _ in range(2)]  # as a scanner leaves them: a picture of each page
    pages[0].save(tmp_path / "pictures.pdf", save_all=True, append_images=pages[1:])
    for name in ("scan.pdf", "pictures.pdf"):
        with pytest.raises(NoText, match="it holds no text; a scan must go through OCR first"):
            read_document(tmp_path / name, name)
    for name, content in {"a.md": "# only a heading\n", "b.txt": " \n", "c.html": "<script>alert(1)</script>"}.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(NoText, match="it holds no text$"):
            read_document(tmp_path / name, name)


@pytest.mark.parametrize("name", ["a.pdf", "b.docx", "c.md", "d.txt"])
def test_what_is_broken_raises(name, tmp_path):
    (tmp_path / name).write_bytes(b"caf\xe9 \x00\x01")
    with pytest.raises(Exception) as caught:
        read_document(tmp_path / name, name)
    if name in ("c.md", "d.txt"):
        assert isinstance(caught.value, DataError) and "no text in UTF-8 (byte 3); save it as UTF-8" in str(
            caught.value
        )
    assert not isinstance(caught.value, NoText)
