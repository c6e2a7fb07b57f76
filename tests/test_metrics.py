"""Metrics against the scores that the benchmarks' own code gave, and the marker against hand-made answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solopo_plugin.metrics import (
    exact_match,
    extract_answer,
    f1_score,
    longbench_v2_choice,
    normalize_answer,
    string_match_part,
    sub_exact_match,
)


def test_scores_of_the_official_code(golden):
    """Every score to the last bit."""
    assert len(golden["qa"]) == 240 and len(golden["longbench_v2_choice"]) == 30
    for case in golden["qa"]:
        assert f1_score(case["prediction"], case["answers"]) == case["longbench_qa_f1"], case
        assert string_match_part(case["prediction"], case["answers"]) == case["ruler_string_match_part"], case
    for case in golden["longbench_v2_choice"]:
        assert longbench_v2_choice(case["response"]) == case["extracted"], case


def test_closed_forms():
    assert normalize_answer("The  U.S.\tArmy, an ANT!") == "us army ant"
    assert f1_score("the quick brown fox", ["brown fox jumps"]) == pytest.approx(2 * (2 / 3) * (2 / 3) / (4 / 3))
    assert f1_score("", ["x"]) == f1_score("x", []) == 0
    assert exact_match("The Rosvik.", ["Karvik", "rosvik"]) and not exact_match("in Rosvik", ["Rosvik"])
    assert sub_exact_match("It is in Rosvik, I think", ["rosvik."]) and not sub_exact_match("Ros vik", ["Rosvik"])
    assert not sub_exact_match("anything", ["the", "!"])  # nothing is left of these answers


@pytest.mark.parametrize(
    "text, answer",
    [
        ("Rosvik is a town. The answer is: Rosvik", "Rosvik"),
        ("The answer is: Rosvik.\n\nThis follows from document 3.", "Rosvik."),
        ("First I thought the answer is: Karvik. No. The answer is: Rosvik", "Rosvik"),
        ("**The answer is:** Rosvik", "Rosvik"),
        ("**The answer is: Rosvik**", "Rosvik"),
        ("the answer is:\nRosvik\nand so on", "Rosvik"),
        ("THE ANSWER IS Rosvik", "Rosvik"),
        ("The answer is: No answer.", "No answer."),
        ("The answer is:", ""),
        ("The answer isn't Rosvik", None),
        ("It is Rosvik", None),
        ("", None),
    ],
)
def test_answer_after_the_marker(text, answer):
    assert extract_answer(text) == answer


@given(st.text(), st.text())
def test_what_was_put_behind_the_marker_is_found(thought, answer):
    """Whatever the chain of thought says, the judged text is the answer's first line."""
    found = extract_answer(f"{thought} The answer is: {answer}")
    assert found is not None and found in answer
    if exact_match(answer, [answer]) and "\n" not in answer and "answer is" not in answer.lower():
        assert normalize_answer(found) == normalize_answer(answer)
