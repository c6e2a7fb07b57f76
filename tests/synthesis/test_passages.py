"""Passages keep every word of a document once and in order, below a budget, and never reach over a heading."""

from hypothesis import given, settings
from hypothesis import strategies as st

from solopo_plugin.synthesis.converters import Block, Document
from solopo_plugin.synthesis.passages import split_document


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


def test_short_paragraphs_share_a_passage_and_long_ones_are_split_at_sentences():
    assert [p["text"] for p in split([(0, "Aa."), (0, "Bb."), (0, "Cc.")], 20)] == ["Aa.\n\nBb.\n\nCc."]
    texts = [p["text"] for p in split([(0, "First one. Second one! Third one? Fourth one.")], 20)]
    assert texts == ["First one. Second one!", "Third one? Fourth one."]
    assert [p["text"] for p in split([(0, "- a b\n- c d\n- e f")], 4)] == ["- a b", "- c d", "- e f"]
    assert [p["text"] for p in split([(0, "no end of a sentence at all here")], 12)] == [
        "no end of a",
        "sentence",
        "at all here",
    ]
    assert "".join(p["text"] for p in split([(0, "x" * 100)], 7)) == "x" * 100
    parts = [p["tokens"] for p in split([(0, "word. " * 45)], 100)]
    assert max(parts) - min(parts) <= 5 and len(parts) == 3  # not 100, 100 and the rest


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.text("ab .!\n。-é", min_size=1, max_size=80)), max_size=9),
    st.integers(1, 40),
)
def test_no_word_is_lost_and_no_passage_too_long(blocks, budget):
    passages = split(blocks, budget)
    for passage, n in zip(passages, count([p["text"] for p in passages]), strict=True):
        assert n <= passage["tokens"] and passage["tokens"] <= budget
    paragraphs = "".join("".join(text.split()) for level, text in blocks if not level)
    assert "".join("".join(p["text"].split()) for p in passages) == paragraphs
    assert [p["place"] for p in passages] == list(range(len(passages)))
