"""Metrics against the scores that the benchmarks' own code gave, and what a response answers against hand-made ones.

`tests/synthesis/test_judge.py` has 2,000 answers to real questions and an implementation of its own.
"""

import re
import time

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from solopo_plugin.qa.answers import (
    _KEPT,
    _judged_words,
    _unwrapped,
    behind_thought,
    exact_match,
    extract_answer,
    f1_score,
    gives_answer,
    holds_answer,
    is_nearly_right,
    judged_form,
    longbench_v2_choice,
    longbench_v2_choice_lenient,
    normalize_answer,
    string_match_part,
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


# ---- what of a response is its answer

THOUGHT = "<think>Maybe the answer is: Karvik? No.</think>"


@pytest.mark.parametrize(
    "text, answer",
    [
        ("Rosvik is a town. The answer is: Rosvik", "Rosvik"),
        ("The answer is: Rosvik.\n\nThis follows from document 3.", "Rosvik."),
        # the last marker: a chain of thought weighs answers, and may quote the prompt
        ("First I thought the answer is: Karvik. No. The answer is: Rosvik", "Rosvik"),
        ("I must end with `The answer is: ...`.\nThe answer is: Rosvik", "Rosvik"),
        # one without a colon only where there is none with a colon
        ("The answer is: Rosvik.\nNote that the answer is stated in document 3.", "Rosvik."),
        ("The answer is in document 3. The answer is: Rosvik. The answer is right.", "Rosvik. The answer is right."),
        ("I thought the answer is Karvik. So the answer is Rosvik", "Rosvik"),
        ("THE ANSWER IS Rosvik", "Rosvik"),
        ("**The answer is:** Rosvik", "Rosvik"),
        ("**The answer is**: Rosvik", "Rosvik"),
        ("**The answer is: Rosvik**", "Rosvik"),
        ("_The answer is:_ Rosvik", "_ Rosvik"),
        ("The **answer** is : Rosvik", "Rosvik"),
        ("The answer is\uff1aRosvik", "Rosvik"),
        ("the answer is:\nRosvik\nand so on", "Rosvik"),
        ("The\nanswer is: Rosvik", "Rosvik"),
        ("The answer is:\n\\[\n\\boxed{42}\n\\]", "42"),
        ("The answer is: $$\n\\boxed{\n 42\n}\n$$", "42"),
        ("The answer is: \\boxed{Rosvik}", "Rosvik"),
        ("The answer is: $\\boxed{\\text{New {York}}}$.", "$New {York}$."),
        ("The answer is: \\boxed{Rosvik}, or \\emph{Karvik}!", "Rosvik, or Karvik!"),
        ("The answer is: \\text{US}A, x\\text{y}, \\boxed{1}.5", "\\text{US}A, x\\text{y}, \\boxed{1}.5"),
        ("The answer is: No answer.", "No answer."),
        ("The answer is:", ""),
        # a box where there is no marker with a colon
        ("The answer is clear.\n$\\boxed{\\text{Karvik}}$? No, $\\boxed{\\text{Rosvik}}$ it is.", "Rosvik"),
        ("So $\\boxed{\\text{in \\emph{Rosvik}}}$.", "in Rosvik"),
        ("\\boxed{Karvik}\nThe answer is: Rosvik", "Rosvik"),
        ("The answer isn't Rosvik", None),
        ("Breathe answer is: Rosvik", None),
        ("It is Rosvik", None),
        ("", None),
        # thoughts are not read
        (f"{THOUGHT} Rosvik", None),
        (f"{THOUGHT}\n\nThe answer is: Rosvik", "Rosvik"),
        (f"{THOUGHT} Well. {THOUGHT} The answer is: Rosvik", "Rosvik"),
        ("The answer is: Karvik? No.</think>The answer is: Rosvik", "Rosvik"),  # the prompt opened the thought
        ("<think>So the answer is: Rosvik", None),
        (f"{THOUGHT} The answer is: Rosvik <think>or is it?", None),
        ("<THINK>The answer is: Karvik</THINK> The answer is: Rosvik", "Rosvik"),
    ],
)
def test_answer_behind_the_marker(text, answer):
    assert extract_answer(text) == answer


@given(st.text(), st.text())
def test_what_was_put_behind_the_marker_is_found(thought, answer):
    """Whatever the chain of thought says, the judged text is the answer's first line."""
    found = extract_answer(f"{thought} The answer is: {answer}")
    assert found is not None and found in answer
    if exact_match(answer, [answer]) and "\n" not in answer and "answer is" not in answer.lower():
        assert normalize_answer(found) == normalize_answer(answer)


LATEX = [*"{}$ -1,_*+#", "\\boxed{", "\\text {", "\\)", ".5", "1,000", "/2", "the", "US"]


@given(st.lists(st.sampled_from(LATEX), max_size=12).map("".join))
def test_latex_taken_off_changes_no_verdict(text):
    """Judge by the same form, and the same ends of words, as where the LaTeX still stands."""
    assert _judged_words(_unwrapped(text)) == _judged_words(text)


def test_thoughts_of_all_the_hosts_templates_are_told():
    from llamafactory.data.template import TEMPLATES

    words = {template.thought_words for template in TEMPLATES.values()}
    assert len(words) > 4
    for opened, closed in words:
        assert behind_thought(f"{opened}Karvik{closed}Rosvik").endswith("Rosvik")
        assert "Karvik" not in behind_thought(f"{opened}Karvik{closed}Rosvik")
        assert behind_thought(f"{opened}Karvik") == ""


# ---- what an answer holds


@pytest.mark.parametrize(
    "said, gold, right",
    [
        ("It is in Rosvik, I think", "rosvik.", True),
        ("Ros vik", "Rosvik", False),
        # whole words, however short or long
        ("Russia", "US", False),
        ("Northern Ireland", "no", False),
        ("Tirana", "Iran", False),
        ("female", "male", False),
        ("New Yorkshire", "New York", False),
        ("11 million", "1 million", False),
        ("in New York, I think", "New York", True),
        ("No.", "no", True),
        # a word ends at punctuation, too
        ("the U.S.", "US", True),
        ("U.S.-based", "US", True),
        ("USA", "US", False),
        ("Rosvik's mayor", "Rosvik", True),
        ("Karvik/Rosvik", "Rosvik", True),
        ("Rosvik\u2014a town", "Rosvik", True),
        ("1946\u20131950", "1950", True),
        ("<b>Rosvik</b>", "Rosvik", True),
        ("Jean-Luc", "JeanLuc", True),  # as SQuAD's form has it
        ("Jean Luc", "Jean-Luc", False),
        # a number is one word
        ("1,000", "1000", True),
        ("1,000", "1", False),
        ("2.5", "5", False),
        ("$1,234.50", "1,234.50", True),
        ("12.05.1990", "1990", True),
        ("May 12,1990", "1990", True),
        # signs that tell numbers apart
        ("2.5", "25", False),
        ("25", "2.5", False),
        ("2.5%", "2.5", True),
        ("about 2.5.", "2.5", True),
        ("$2.50", "2.50", True),
        ("$2.50", "250", False),
        ("5.", "5", True),
        ("-5", "5", False),
        ("5", "-5", False),
        ("(-5)", "-5", True),
        ("\u20135", "-5", True),
        ("pages 3-5", "5", True),
        ("COVID-19", "19", True),
        ("-1,500", "-1500", True),
        ("-1,500", "1500", False),
        ("3:30", "330", False),
        ("at 3:30 pm", "3:30", True),
        ("3:30", "3", False),
        ("1/2", "12", False),
        ("1/2", "½", True),
        ("3/4/1990", "1990", True),
        ("1989/90", "1989", True),
        ("1,500.25", "1500.25", True),
        ("1,2,3", "2", True),
        # numbers of several parts: where the digits are parted counts, and not by which sign
        ("1.11.0", "1.1.10", False),
        ("version 1.1.10-rc1", "1.1.10", True),
        ("1/21/2020", "12/1/2020", False),
        ("11.2.1990", "1.12.1990", False),
        ("2020-11-2", "2020-1-12", False),
        ("2020/01/12", "2020-01-12", True),
        ("May 12, 1990", "May 12,1990", True),
        ("192.168.1.10", "192.168.11.0", False),
        ("1:23:45", "12:3:45", False),
        ("\u00a7 12(3)", "\u00a7 1(23)", False),
        ("555-1234", "5551234", False),
        ("2,5", "25", False),
        # thousands in the way of other countries and of code
        ("1,00,000", "100,000", True),
        ("1.000.000", "1,000,000", True),
        ("1'000", "1\u2019000", True),
        ("1_000_000", "1000000", True),
        ("CHF 1'234.50", "1234.50", True),
        ("1_000.5", "1000.5", True),
        ("1.234,56 Euro", "1234,56", True),
        ("1234,56", "1.234.567,56", False),
        ("1.234,567", "1234,567", False),
        ("1_000.5", "10005", False),
        ("2.000.000.000", "2,000,000,000", True),
        ("142.250.190.142", "142250190142", False),
        ("142.250.190.142:443", "142.250.190.142", True),
        ("101,15,100", "15", True),
        ("1,000:1", "1,000", True),
        ("2,500/3,000", "3,000", True),
        ("2,500/3,000", "2500", True),
        # and of LaTeX
        ("$10{,}000$", "10,000", True),
        ("10\\,000", "10,000", True),
        ("1\\;000", "1,000", True),
        ("$1,\\!000,\\!000.5$", "1000000.5", True),
        ("2\\,5", "25", False),
        # powers and mixed fractions
        ("$10^6$", "10⁶", True),
        ("10^{-3}", "10⁻³", True),
        ("2⁵", "25", False),
        ("1990¹", "1990", True),
        ("1½", "1 1/2", True),
        ("1½", "11/2", False),
        # signs at the end of names
        ("C", "C++", False),
        ("C#", "C++", False),
        ("C++.", "c++", True),
        ("in C++11", "C++", True),
        ("C11", "C++11", False),
        ("Notepad", "Notepad++", False),
        ("`C#`", "C#", True),
        ("A+", "A", False),
        ("AB+", "AB-", False),
        ("LGBTQ", "LGBTQ+", True),
        ("x+y", "x", True),
        ("page#part", "part", True),
        ("10+", "10", True),
        ("C\\#", "C#", True),
        ("C\\+\\+", "C++", True),
        ("$\\text{C\\#}$", "C#", True),
        ("F\u266f minor", "F#", True),
        ("in C#9", "C#", True),
        ("C#7.0", "7.0", True),
        ("C9", "C#9", False),
        ("x+1", "x", True),
        # digits of other scripts
        ("1889", "\u0661\u0668\u0668\u0669", True),
        ("\u06f1\u06f8\u06f8\u06f9", "1889", True),
        ("\u0967\u096e\u096e\u096f", "1889", True),
        ("\u0662\u066b\u0665", "2.5", True),
        ("\u0661\u066c\u0660\u0660\u0660", "1,000", True),
        ("1890", "\u0661\u0668\u0668\u0669", False),
        # the same sign, written in another way
        ("Xi\u2019an", "Xi'an", True),
        ("Xi'an", "Xi\u00b4an", True),
        ("Hawai\u02bbi", "Hawai'i", True),
        ("\u201cRosvik\u201d", "Rosvik", True),
        ("Ze\u0301lande", "Zélande", True),
        ("Zelande", "Zélande", False),
        ("1946\u20131950", "1946-1950", True),
        ("\uff35\uff33", "US", True),
        ("Ros\u00advik\u200b", "Rosvik", True),
        ("Rosvik\u00a0town", "Rosvik town", True),
        ("STRASSE", "Straße", True),
        ("m²", "m2", True),
        ("\u221240\u00a0°C", "-40 °C", True),
        ("1⁄2", "½", True),
        ("5\u00a0€", "5€", True),
        ("€55", "5", False),
        ("\\boxed{Rosvik}", "Rosvik", True),
        ("$\\boxed{\\textbf{New York}}$", "New York", True),
        # scripts without spaces between words, and those whose words hold marks
        ("答案是北京市。", "北京", True),
        ("13年", "3年", False),
        ("NHKは", "NHK", True),
        ("東京タワーです", "東京タワー", True),
        ("서울입니다", "서울", True),
        ("กินข้าว", "กิน", True),
        ("हिन्दी", "हिन", False),
        ("हिन्दी में", "हिन्दी", True),
        ("Россия", "рос", False),
        ("Россия!", "россия", True),
        # containment, as in the paper: nothing is said of denials and alternatives
        ("not Rosvik", "Rosvik", True),
        ("Karvik or Rosvik", "Rosvik", True),
        # what the prompt asks for where the documents do not tell is no `no`
        ("No answer.", "no", False),
        ("No answer.", "answer", False),
        ("There is no answer in the documents", "no", False),
        ("No, there is no answer in it", "no", True),
        ("No answer.", "No answer", True),
        ("No answer is sure, but Rosvik", "Rosvik", True),
        ("none", "no", False),
        ("No mention of their nationality.", "no", False),
        ("No relevant information is given.", "no", False),
        ("No **mention** of it.", "no", False),
        ("No clear answer.", "no", False),
        ("No, data show another thing.", "no", True),
        ("No - documents 2 and 3 show that they differ.", "no", True),
        ("**No** The documents state otherwise.", "no", True),
        ("No because documents 1 and 2 differ.", "no", True),
        ("There is no mention of this", "No", False),
        ("No such film.", "no", False),
        ("NO  INFORMATION", "no", False),
        ("No document says so.", "no", False),
        ("No, there is no mention of it", "no", True),
        ("No. Evidence shows the contrary.", "no", True),
        ("No details of Rosvik", "Rosvik", True),
        ("No details", "no details", True),
        ("No database has both", "no", True),
        # of these gold answers nothing is left
        ("the", "the", False),
        ("!!!", "!!!", False),
        ("\u2026", "\u2026", False),
        ("", "", False),
        ("", "Rosvik", False),
    ],
)
def test_what_an_answer_holds(said, gold, right):
    assert holds_answer(said, [gold]) == holds_answer(said, ["Karvi", gold, "!"]) == right
    assert gives_answer(f"A thought. The answer is: {said}", [gold]) == right


@pytest.mark.parametrize(
    "said, golds, nearly",
    [
        ("Koch", ["Friedrich Loeffler", "Robert Koch"], True),
        ("bone marrow.", ["in the bone marrow"], True),
        ("5", ["five"], True),
        ("About 6 months", ["Six months"], True),
        ("5 May 2010", ["May five, 2010"], True),
        ("Koch, Robert", ["Robert Koch"], True),
        ("5 June 2010", ["May 5, 2010"], False),
        ("Twelve", ["on May 12"], True),
        ("US", ["U.S.-based firms"], True),
        ("2", ["October 2, 2017"], True),
        ("och", ["Robert Koch"], False),
        ("Heinrich Koch", ["Robert Koch"], False),
        ("6 months", ["sixteen months", "26 months"], False),
        ("1", ["1,000"], False),
        ("No such law exists.", ["no"], True),
        # digits in other groups
        ("9783161484100", ["978-3-16-148410-0"], True),
        ("555-1234", ["5551234"], True),
        ("20200112", ["x", "2020-01-12"], True),
        ("1 000", ["1000"], True),
        ("1.11.0", ["1.1.10"], False),
        ("5551235", ["555-1234"], False),
        ("Ros vik", ["Rosvik"], False),
        # these say nothing
        ("", ["Robert Koch"], False),
        ("the", ["the bone marrow"], False),
        ("No answer.", ["no answer was given"], False),
        ("No answer", ["no"], False),
        ("No", ["yes"], False),
        ("Yes", ["no"], False),
    ],
)
def test_what_is_wrong_and_nearly_right(said, golds, nearly):
    assert not holds_answer(said, golds) and is_nearly_right(said, golds) == nearly


@pytest.mark.parametrize("text", ["no" + "_" * 4000, "no " + "*" * 8000, "no relevant " * 2000, "no" + " " * 8000])
def test_an_answer_that_repeats_itself_is_soon_judged(text):
    start = time.perf_counter()
    assert holds_answer(text, ["no"])
    assert time.perf_counter() - start < 1


def test_no_answer_among_the_gold_ones_is_none():
    assert not holds_answer("Rosvik", [])


@pytest.mark.parametrize("response", ["It is Rosvik", "<think>The answer is: Rosvik", "", "The answer is:"])
def test_a_response_without_an_answer_gives_none(response):
    assert not gives_answer(response, ["Rosvik"])


ASCII = st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="\\"))
PARTS = [*"a.,-'1U+#_ ", "the", "an ", " the ", "1,000", "1{,}000", "2.5", "1/2", ":3"]
ARTICLES = st.lists(st.sampled_from(PARTS)).map("".join)
PARTED = re.compile(r"\d(?:_|[^\w\s])+\d")


@given(ASCII | ARTICLES)
def test_of_ascii_the_form_is_squads(text):
    """Hold it but for signs that count."""
    form, official = judged_form(text), normalize_answer(text)
    assert form == _judged_words(text).replace("_", "")
    assert normalize_answer(form) == official or PARTED.search(text)
    assert normalize_answer(form).replace(" ", "") == official.replace(" ", "")
    assert form == official or _KEPT.search(text) or PARTED.search(text)


@given(st.text() | ARTICLES, st.text() | ARTICLES)
def test_what_is_equal_in_squads_form_is_held(text, other):
    """EM is never above sub-EM; and a text in its own words holds each of its runs of words."""
    for gold in (text, other):
        assume("\u0338" not in gold)  # joins with `=`, which SQuAD takes out, into another sign
        if judged_form(gold) and "no answer" not in judged_form(text):
            signs = any(sign.search(each) for sign in (_KEPT, PARTED) for each in (text, gold))  # EM has none of them
            assert signs or not exact_match(text, [gold]) or holds_answer(text, [gold])
            assert holds_answer(f"{text} {gold} {text}", [gold])


# ---- the letter of a choice


@pytest.mark.parametrize(
    "response, official, lenient",
    [
        ("The correct answer is (C)", "C", "C"),
        ("The correct answer is (A)? No. The correct answer is (C).", "A", "C"),
        ("If the correct answer is (A), then no. \\boxed{C}", None, "C"),
        ("\\boxed{C}", None, "C"),
        ("$\\boxed{\\text{(c)}}$", None, "C"),
        ("\\boxed{C. Rosvik}", None, "C"),
        ("The correct answer is \\boxed{\\textbf{C}}.", None, "C"),
        ("the correct answer is (c)", None, "C"),
        ("The correct answer is c.", None, "C"),
        ("The correct answer is:\n\n**C**", None, "C"),
        ("The correct answer is\uff08\uff23\uff09", None, "C"),
        ("**Answer:** option C", None, "C"),
        ("Thoughts.\n(C)", None, "C"),
        ("Thoughts.\n**c**.", None, "C"),
        ("The correct answer is (C). Option (D) is wrong.", "C", "C"),
        ("The correct answer is (C), the correct answer is not (D).", "C", "C"),
        # nothing is said, or an article, or a word
        ("The correct answer is a different one", None, None),
        ("The correct answer is Athens", "A", None),
        ("The correct answer is (E)", None, None),
        ("(A) fails.\n(B) fails.\n(D) is wrong.", None, None),
        ("It may be (C) or (D)", None, None),
        ("", None, None),
        # thoughts
        ("<think>The correct answer is (A).</think>\nThe correct answer is (C)", "A", "C"),
        ("<think>The correct answer is (A).", "A", None),
    ],
)
def test_the_letter_that_a_chain_of_thought_ends_with(response, official, lenient):
    assert (longbench_v2_choice(response), longbench_v2_choice_lenient(response)) == (official, lenient)


def test_lenient_letters_of_the_golden_responses(golden):
    """Where the official parser found a letter, and it was said once, it is the same."""
    for case in golden["longbench_v2_choice"]:
        found = longbench_v2_choice_lenient(case["response"])
        if case["response"].count("correct answer is") == 1 and case["extracted"]:
            assert found == case["extracted"], case
    assert sum(longbench_v2_choice_lenient(c["response"]) is None for c in golden["longbench_v2_choice"]) == 4


PIECES = [
    "\\boxed{", "\\boxed{{a{b}", "{", "answer is ", "the answer is: ", "<think>", "1.", "1,111", "\u0301", "(", "$\n",
    "_", " ",
]  # fmt: skip


@pytest.mark.parametrize("piece", PIECES)
def test_work_is_linear(piece):
    text, start = piece * (200_000 // len(piece)), time.process_time()
    gives_answer(f"The answer is: {text}", [text[:100], "x"])
    extract_answer(text)
    longbench_v2_choice_lenient(text)
    assert time.process_time() - start < 3
