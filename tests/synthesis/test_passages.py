"""Passages keep every word of a document once and in order, below a budget, and never reach over a heading."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solopo_plugin.synthesis.converters import Block, Document
from solopo_plugin.synthesis.passages import split_document, split_paragraph


def count(texts: list[str]) -> list[int]:
    """A token is a character that is no blank, or an empty line between paragraphs."""
    return [sum(not c.isspace() for c in text) + text.count("\n\n") for text in texts]


def split(blocks: list[tuple[int, str]], budget: int) -> list[dict]:
    document = Document("a/b.md", "The book", [Block(*block) for block in blocks])
    return list(split_document(document, budget, count))


def test_titles_and_sections_and_places():
    blocks = [(0, "Before."), (1, "The book"), (0, "One."), (2, "Part"), (3, "Deep"), (0, "Two."), (2, "Last")]
    found = split([*blocks, (0, "Three.")], 50)
    assert [(p["title"], p["section"], p["text"], p["place"]) for p in found] == [
        ("The book", "", "Before.", 0),
        ("The book", "", "One.", 1),
        ("The book > Part > Deep", "Part > Deep", "Two.", 2),
        ("The book > Last", "Last", "Three.", 3),
    ]
    assert {p["source"] for p in found} == {"a/b.md"} and [p["tokens"] for p in found] == [7, 4, 4, 6]


def test_a_heading_with_nothing_below_is_a_paragraph_of_what_it_stands_in():
    hours, phone, part = (2, "Hours: 9 to 17"), (2, "Phone: 555-0199"), (2, "Part")
    found = split([(1, "The book"), (0, "Intro."), hours, phone, part, (0, "One."), (3, "Sub"), (2, "Last")], 50)
    assert [(p["section"], p["text"]) for p in found] == [
        ("", "Intro.\n\nHours: 9 to 17\n\nPhone: 555-0199"), ("Part", "One.\n\nSub"), ("", "Last"),
    ]  # fmt: skip


def test_short_paragraphs_share_a_passage_and_long_ones_are_split_at_sentences():
    assert [p["text"] for p in split([(0, "Aa."), (0, "Bb."), (0, "Cc.")], 20)] == ["Aa.\n\nBb.\n\nCc."]
    texts = [p["text"] for p in split([(0, "First one. Second one! Third one? Fourth one.")], 20)]
    assert texts == ["First one. Second one!", "Third one? Fourth one."]
    for end in (*"؟۔।", "。", "！”", ". "):  # of scripts with and without blanks behind a sentence
        texts = [p["text"] for p in split([(0, f"aa bb cc{end}dd ee ff{end}gg hh ii{end}".strip())], 12)]
        assert texts == [f"{words}{end.strip()}" for words in ("aa bb cc", "dd ee ff", "gg hh ii")]
    assert [p["text"] for p in split([(0, "- a b\n- c d\n- e f")], 4)] == ["- a b", "- c d", "- e f"]
    assert [p["text"] for p in split([(0, "no end of a sentence at all here")], 12)] == [
        "no end of a",
        "sentence",
        "at all here",
    ]
    assert "".join(p["text"] for p in split([(0, "x" * 100)], 7)) == "x" * 100
    parts = [p["tokens"] for p in split([(0, "word. " * 45)], 100)]
    assert max(parts) - min(parts) <= 5 and len(parts) == 3  # not 100, 100 and the rest


@pytest.mark.parametrize("text", ["no blank" * 9, "One. Two. Three.", "one\ntwo", "word " * 40, "ab"])
def test_parts_of_fewer_tokens_than_the_whole_are_split_all_the_same(text):
    """As of tokenizers that merge more in one part than in the text: here a text has tokens for each end of a part."""

    def costly(texts: list[str]) -> list[int]:
        return [len(part) + 3 * (len(part) > len(text.strip()) - 2) for part in texts]

    text = text.strip()
    for budget in range(1, costly([text])[0]):
        found = list(split_paragraph(text, costly([text])[0], budget, costly))
        assert "".join("".join(piece.split()) for piece, _ in found) == "".join(text.split()) and len(found) > 1


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.text("ab .!\n。-é", min_size=1, max_size=80)), max_size=9),
    st.integers(1, 40),
)
def test_no_word_is_lost_and_no_passage_too_long(blocks, budget):
    passages = split(blocks, budget)
    for passage, n in zip(passages, count([p["text"] for p in passages]), strict=True):
        assert n <= passage["tokens"] and passage["tokens"] <= budget
    followed = zip(blocks, [*blocks[1:], (1, "")], strict=False)
    kept = [text for (level, text), (after, _) in followed if not level or 0 < after <= level]
    paragraphs = "".join("".join(text.split()) for text in kept)
    assert "".join("".join(p["text"].split()) for p in passages) == paragraphs
    assert [p["place"] for p in passages] == list(range(len(passages)))
