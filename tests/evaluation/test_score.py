"""Scores of answers: the benchmarks' own numbers, closed forms, nasty texts, and files of answers."""

import random
import re
import time

import pytest

from solopo_plugin.evaluation import score
from solopo_plugin.evaluation.items import MAIN_METRIC, Item, read_items
from solopo_plugin.evaluation.score import score_answer, source_of, write_scores
from solopo_plugin.qa.answers import _KEPT, judged_form, longbench_v2_choice_lenient
from solopo_plugin.qa.files import DataError, read_jsonl, write_jsonl
from solopo_plugin.qa.prompts import PROMPT

QA = {"f1", "em", "sub_em", "string_match"}
CHOICE = {"accuracy", "accuracy_lenient", "parsed"}


def item(answers, prompt="Who?", kind="qa", id="q", **more) -> Item:
    fields = dict(benchmark="plain", task="t", question="Who?") | more
    return Item(id=id, prompt=prompt, answers=answers, kind=kind, **fields)


# One answer


def test_scores_of_the_official_code(golden):
    """To the last bit, without the marker and, F1, behind it, whatever the chain of thought says."""
    for case in golden["qa"]:
        plain = score_answer(item(case["answers"]), case["prediction"])
        assert not plain["marker"] and plain["prediction"] is None
        assert plain["scores"]["f1"] == 100.0 * case["longbench_qa_f1"], case
        assert plain["scores"]["string_match"] == case["ruler_string_match_part"], case
        line = " ".join(case["prediction"].split())
        marked = score_answer(item(case["answers"]), f"It may be Karvik, the a an.\n\nThe answer is: {line}")
        assert marked["marker"] and marked["scores"]["f1"] == 100.0 * case["longbench_qa_f1"], case
    for case in golden["longbench_v2_choice"]:
        found = score_answer(item(["A"], kind="choice"), case["response"])
        assert found["prediction"] == case["extracted"] and found["marker"] == (case["extracted"] is not None)
        right = {"accuracy": 100.0 * (case["extracted"] == "A"), "parsed": 100.0 * (case["extracted"] is not None)}
        assert found["scores"] == right | {
            "accuracy_lenient": 100.0 * (longbench_v2_choice_lenient(case["response"]) == "A")
        }


ASKED, PLAIN = PROMPT.format(documents="", question="Where?"), "Where?"


@pytest.mark.parametrize(
    "prompt, text, golds, prediction, f1, em, sub_em, string_match",
    [
        (ASKED, "Long thoughts. The answer is: Rosvik", ["Rosvik"], "Rosvik", 100, 100, 100, 100),
        (ASKED, "The answer is: in the Rosvik", ["x", "Rosvik"], "in the Rosvik", 200 / 3, 0, 100, 100),
        (ASKED, "Rosvik or Karvik? The answer is: Karvik", ["Rosvik"], "Karvik", 0, 0, 0, 100),
        (ASKED, "Rosvik.", ["Rosvik"], None, 100, 100, 100, 100),  # no marker: the whole response
        (ASKED, "It is Rosvik", ["Rosvik"], None, 50, 0, 0, 100),  # a mention is no answer where one was asked for
        (PLAIN, "It is Rosvik", ["Rosvik"], None, 50, 0, 100, 100),
        (ASKED, "The answer is: No answer.", ["no"], "No answer.", 200 / 3, 0, 0, 100),
        (ASKED, "The answer is: No answer.", ["no answer"], "No answer.", 100, 100, 100, 100),
        (ASKED, "The answer is:", ["Rosvik"], "", 0, 0, 0, 0),
        # as the judge of the data pipeline reads them: whole words, one sign in several spellings, no thoughts
        (ASKED, "The answer is: Russia", ["US"], "Russia", 0, 0, 0, 100),
        (ASKED, "The answer is: Xi\u2019an", ["Xi'an"], "Xi\u2019an", 0, 0, 100, 0),
        (ASKED, "<think>The answer is: Rosvik</think>Karvik", ["Rosvik"], None, 0, 0, 0, 100),
        (ASKED, "<think>Karvik?</think>Rosvik.", ["Rosvik"], None, 100, 100, 100, 100),
        (PLAIN, "<think>Karvik?</think>It is Rosvik.", ["Karvik"], None, 0, 0, 0, 100),
        (PLAIN, "<think>It is Rosvik", ["Rosvik"], None, 0, 0, 0, 100),
        (ASKED, "The answer is: \\boxed{Rosvik}", ["Rosvik"], "Rosvik", 100, 100, 100, 100),
        (ASKED, "So $\\boxed{\\text{Rosvik}}$.", ["Rosvik"], "Rosvik", 100, 100, 100, 100),
        (ASKED, "The answer is: $10{,}000$", ["10,000"], "$10{,}000$", 100, 100, 100, 0),
        (ASKED, "The answer is: 1\\,000,\\!000", ["1,000,000"], "1\\,000,\\!000", 100, 100, 100, 0),
        (PLAIN, " \n ", ["Rosvik"], None, 0, 0, 0, 0),
        (PLAIN, "", ["Rosvik"], None, 0, 0, 0, 0),
        (PLAIN, "", ["", "Rosvik"], None, 0, 0, 0, 0),  # an empty alias is no answer
        (ASKED, "The answer is: Karvik", ["Rosvik", " "], "Karvik", 0, 0, 0, 0),
    ],
)
def test_closed_forms(prompt, text, golds, prediction, f1, em, sub_em, string_match):
    found = score_answer(item(golds, prompt), text)
    assert found["prediction"] == prediction and found["marker"] == (prediction is not None)
    assert found["scores"] == pytest.approx(dict(f1=f1, em=em, sub_em=sub_em, string_match=string_match), abs=1e-12)


@pytest.mark.parametrize(
    "prompt, message, sub_em",
    [
        ("{documents}\n\n{question}", "He said: the answer is: Karvik.\n\nWho?", 100),  # the context says it
        (None, PROMPT.format(documents="He said no.", question="Who?"), 0),  # ours asks for it
        ("Say `The answer is:`.\n{documents}\n{question}", "Say `The answer is:`.\nHe said no.\nWho?", 0),
        ("{documents}\n\n{question}", "The answer is: what? Tell.", 0),  # a whole message of a file: all are its words
    ],
)
def test_who_asks_for_the_marker(prompt, message, sub_em):
    """A context that holds the marker does not ask for it."""
    assert score_answer(item(["Rosvik"], message), "It is Rosvik", prompt)["scores"]["sub_em"] == sub_em


def test_main_metrics_are_scored():
    assert set(score_answer(item(["x"]), "x")["scores"]) == QA
    assert set(score_answer(item(["A"], kind="choice"), "x")["scores"]) == CHOICE
    assert set(MAIN_METRIC.values()) <= QA | CHOICE


# Nasty texts

PIECES = [
    "The answer is: ", "the answer is", "**The answer is:**", "The correct answer is (B)", "The correct answer is A",
    "The correct answer is", "No answer.", "Rosvik", "the", "a an the", "*" * 50, "(" * 50, "\\",
    "[a-z]+(a|a)*$", "\x00", "\x1f\x7f", "\r\n", "\u2028", "\u202e", "\ufeff",
    "\ud800", "\udfff", "İ", "ß", "ﬁ", "e\u0301", "中文答案", "🙂‍↔️",
    "\u00a0", "%s {} ${x}", "' OR 1=1", "<script>", "NaN", "-0", "1e999", "A", "D)", " ", "\t", "\n\n", "।", "١٢٣",
    " 10,000 ",
]  # fmt: skip


THOUSANDS = re.compile(r"(?<![\d.,:/⁄])\d{1,3}(?:(?:,(?:\\!)?|\{,\}|\\[,;:!])\d{3})+(?![.,:/⁄]?\d)")  # EM has them, too


def nasty(rng: random.Random) -> str:
    """A few pieces, or code points from anywhere, or one piece many times."""
    way = rng.random()
    if way < 0.05:
        return rng.choice(["", " ", "\n"])
    if way < 0.35:
        return "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(1, 60)))
    if way < 0.45:
        return rng.choice(PIECES) * rng.randrange(1, 300)
    return "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 30)))


@pytest.mark.slow
def test_ten_thousand_nasty_predictions():
    rng, seen = random.Random("nasty"), {"marker": 0, "right": 0, "choice": 0}
    for number in range(10_000):
        kind = "choice" if number % 5 == 4 else "qa"
        golds = ["B"] if kind == "choice" else [nasty(rng) or "x" for _ in range(rng.randrange(1, 4))]
        text = nasty(rng) + (rng.choice(golds) if rng.random() < 0.3 else "")
        text = text.replace("10,000", rng.choice(["10,000", "10{,}000", "10\\,000"]))
        found = score_answer(item(golds, rng.choice([ASKED, PLAIN]), kind), text)
        scores = found["scores"]
        assert set(scores) == (CHOICE if kind == "choice" else QA)
        assert all(type(value) is float and 0 <= value <= 100 for value in scores.values()), (text, golds)
        assert found["prediction"] is None or found["prediction"] in ("ABCD" if kind == "choice" else text)
        plain = [THOUSANDS.sub(lambda match: re.sub(r"\D", "", match[0]), each) for each in (text, *golds)]
        odd = any(_KEPT.search(each) or re.search(r"\d(?:_|[^\w\s])+\d", each) for each in plain)
        odd = odd or not all(map(judged_form, golds))
        assert kind == "choice" or scores["em"] <= scores["sub_em"] or odd  # EM has no signs that count
        seen["marker"] += found["marker"]
        seen["right"] += max(scores.values()) == 100
        seen["choice"] += kind == "choice" and found["marker"]
    assert min(seen.values()) > 100, seen  # the texts reach all branches


@pytest.mark.parametrize("text", [*(piece * 20_000 for piece in PIECES), "the answer is" + " " * 10**6 + "x"])
def test_very_long_predictions(text):
    """Linear work: the worst takes about 0.2 s."""
    start = time.process_time()
    score_answer(item(["Rosvik", text[:200]], ASKED), text)
    score_answer(item(["B"], ASKED, "choice"), text)
    assert time.process_time() - start < 3


# Files


def make_items(n: int = 5) -> list[Item]:
    prompts = [f"{'x' * 10}Rosvik{'y' * 84} {k}?" for k in range(n)]
    return [
        item(["Rosvik"], prompt, id=f"q{k}", length=4096, depth=50.0, groups={"hops": str(k % 2)},
             evidence=[{"paragraph": 1, "start": 10, "end": 16}])
        for k, prompt in enumerate(prompts)
    ]  # fmt: skip


def answer(question: Item, text: str = "The answer is: Rosvik", **more) -> dict:
    row = {"benchmark": question.benchmark, "task": question.task, "id": question.id, "text": text}
    row |= {"prompt_hash": question.prompt_hash, "prompt_tokens": 30, "cut_tokens": 0, "finish_reason": "stop"}
    return row | more


def save(folder, items, answers, name="m"):
    write_jsonl(folder / "items.jsonl", [question.as_dict() for question in items])
    write_jsonl(folder / f"answers/{name}.jsonl", [{"fingerprint": {"model": name}}, *answers])


def test_files_of_scores_of_an_own_prompt(tmp_path):
    """The recipe's `prompt` says whether the marker was asked for."""
    asked = item(["Rosvik"], "The answer is: Karvik, he said. Who?")
    save(tmp_path, [asked], [answer(asked, "It is Rosvik")])
    for prompt, sub_em in ((None, 0), ("{documents} {question}", 100)):
        write_scores(tmp_path, ["m"], prompt)
        assert next(read_jsonl(tmp_path / "scores/m.jsonl"))["scores"]["sub_em"] == sub_em


def test_files_of_scores(tmp_path):
    """A line per answer, in the order of the questions, with what groups and counts need."""
    items = make_items()
    answers = [answer(items[k], f"The answer is: {k}", cut_tokens=k) for k in (4, 0, 2)] + [answer(items[1], " ")]
    save(tmp_path, items, answers)
    assert write_scores(tmp_path, ["m"]) == {"m": {"asked": 5, "scored": 4, "unknown": 0}}
    rows = list(read_jsonl(tmp_path / "scores/m.jsonl"))
    assert [row["id"] for row in rows] == ["q0", "q1", "q2", "q4"]
    assert [row["prediction"] for row in rows] == ["0", None, "2", "4"]
    assert [row["empty"] for row in rows] == [False, True, False, False]
    where = 100 * 13 / len(items[0].prompt)
    assert rows[0] == {
        "benchmark": "plain", "task": "t", "id": "q0", "empty": False, "prediction": "0", "marker": True,
        "scores": {"f1": 0.0, "em": 0.0, "sub_em": 0.0, "string_match": 0.0}, "prompt_tokens": 30, "cut_tokens": 0,
        "finish_reason": "stop", "length": 4096, "depth": 50.0, "groups": {"hops": "0"}, "evidence_depth": where,
        "source": source_of(items[0]),
    }  # fmt: skip


def test_source_of_questions_that_are_asked_often():
    """Ids of built contexts name length and depth behind the question's own id, which may hold slashes itself."""
    ids = {"a/1/4096": 4096, "a/1/8192": 8192, "a/1/8192/50": 8192, "a/1/8192/33.3": 8192, "a/1": None}
    assert len({source_of(item(["x"], id=id, length=length)) for id, length in ids.items()}) == 1
    others = [item(["x"], id="a/2"), item(["x"], id="a/1", question="Where?"), item(["x"], id="a/1/4096")]
    others += [item(["x"], id=id, length=4096) for id in ("b", "c")]  # ids without a length
    assert len({source_of(other) for other in [*others, item(["x"], id="a/1")]}) == 6


def test_a_question_that_stands_in_a_task_twice_has_one_source(tmp_path):
    """Take `#2` behind an id for ours if there is a first; an id of the user's own may end so, too."""
    items = [item(["x"], id=id, task=task) for task in "ab" for id in ("q", "q#2", "q#10", "own#2", "own#3")]
    items.append(item(["x"], id="q#3", task="a", question="Where?"))
    # rows with a prompt only: of another file, the same again, and the first file's in another task
    bare = {("t", "1"): "x", ("t", "1#2"): "y", ("t", "1#3"): "x", ("long", "1"): "x", ("long", "1#2"): "y"}
    items += [item([gold], id=id, task=task, question="") for (task, id), gold in bare.items()]
    save(tmp_path, items, [answer(question) for question in items])
    write_scores(tmp_path, ["m"])
    rows = list(read_jsonl(tmp_path / "scores/m.jsonl"))
    found = {(row["source"], bare[row["task"], row["id"]]) for row in rows[-5:]}
    assert len(found) == 2 == len({source for source, _ in found})
    sources = {row["id"]: row["source"] for row in rows[:-5]}
    assert sources["q"] == sources["q#2"] == sources["q#10"] and len({*sources.values()}) == 4


def test_the_order_of_answers_changes_no_byte(tmp_path):
    items = make_items(40)
    answers = [answer(question, f"The answer is: {'Rosvik ' * (k % 7)}") for k, question in enumerate(items)]
    save(tmp_path, items, answers, "a")
    save(tmp_path, items, random.Random(1).sample(answers, 40), "b")
    write_scores(tmp_path, ["a", "b"])
    assert (tmp_path / "scores/a.jsonl").read_bytes() == (tmp_path / "scores/b.jsonl").read_bytes()


def test_questions_are_read_once_for_all_models(tmp_path, monkeypatch, caplog):
    """Each model's file is as it would be alone, also where it lacks answers or has others; a bad one spoils all."""
    items, read = make_items(9), []
    save(tmp_path, items, [answer(question) for question in items[2:]], "a")
    save(tmp_path, items[1:], [answer(question) for question in items], "b")
    alone = {}
    for name in "ab":
        write_scores(tmp_path, [name])
        alone[name] = (tmp_path / f"scores/{name}.jsonl").read_bytes()
    said, caplog.records[:] = [record.getMessage() for record in caplog.records], []
    monkeypatch.setattr(score, "read_items", lambda path: read.append(path) or read_items(path))
    assert write_scores(tmp_path, ["a", "b"]) == {
        "a": {"asked": 8, "scored": 7, "unknown": 0}, "b": {"asked": 8, "scored": 8, "unknown": 1}
    }  # fmt: skip
    assert len(read) == 1 and {name: (tmp_path / f"scores/{name}.jsonl").read_bytes() for name in "ab"} == alone
    assert [record.getMessage() for record in caplog.records] == said and len(said) == 2
    save(tmp_path, items[1:], [answer(items[3], prompt_hash="0")], "b")
    with pytest.raises(DataError, match="answers/b.jsonl:2: plain/t/q3 was answered with another prompt"):
        write_scores(tmp_path, ["a", "b"])
    assert {name: (tmp_path / f"scores/{name}.jsonl").read_bytes() for name in "ab"} == alone
    assert len(list(tmp_path.glob("scores/*"))) == 2


def test_a_torn_last_line_is_no_answer(tmp_path, caplog):
    items = make_items()
    save(tmp_path, items, [answer(question) for question in items])
    path = tmp_path / "answers/m.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    assert write_scores(tmp_path, ["m"])["m"]["scored"] == 4
    assert "1 of 5 questions are not answered" in caplog.text


def test_answers_to_unknown_questions_are_said(tmp_path, caplog):
    items = make_items()
    save(tmp_path, items[1:], [answer(question) for question in items])
    assert write_scores(tmp_path, ["m"]) == {"m": {"asked": 4, "scored": 4, "unknown": 1}}
    assert "1 answers belong to no question of items.jsonl and are left out; the first: plain/t/q0." in caplog.text


BAD = {  # name: (answers made of three questions, the sentence behind the file's name)
    "another prompt": (
        lambda q: [answer(q[0]), answer(q[1], prompt_hash="0" * 32)],
        ":3: plain/t/q1 was answered with another prompt (hash 00000000000000000000000000000000, now ",
    ),
    "answered twice": (
        lambda q: [answer(q[0]), answer(q[1]), answer(q[0])],
        ":4: plain/t/q0 is answered a second time (first in line 2); delete one of the lines.",
    ),
    "no id": (lambda q: [answer(q[0], id=None)], ":2: `id` must be a text, got None; delete the line and start "),
    "a number": (lambda q: [answer(q[0], text=7)], ":2: `text` must be a text, got 7; delete the line and start "),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_answers(tmp_path, name):
    make, sentence = BAD[name]
    items = make_items(3)
    save(tmp_path, items, make(items))
    with pytest.raises(DataError) as error:
        write_scores(tmp_path, ["m"])
    assert str(error.value).startswith(f"{tmp_path}/answers/m.jsonl{sentence}")
    assert not list(tmp_path.glob("scores/*"))  # written whole or not at all


def test_bad_files(tmp_path):
    items = make_items(2)
    save(tmp_path, items, [answer(question) for question in items])
    with pytest.raises(DataError, match=r"Cannot read .*answers/x\.jsonl: there is no such file"):
        write_scores(tmp_path, ["x"])
    path = tmp_path / "answers/m.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"text"', b'"text', 1))
    with pytest.raises(DataError, match=r"answers/m\.jsonl:2: not a line of JSON"):
        write_scores(tmp_path, ["m"])
    save(tmp_path, items, [answer(question) for question in items])
    write_jsonl(tmp_path / "items.jsonl", [{"id": "q0"}])
    with pytest.raises(DataError, match=r"items\.jsonl: a line is no question of ours \(.*missing.*'benchmark'"):
        write_scores(tmp_path, ["m"])
    (tmp_path / "items.jsonl").unlink()
    with pytest.raises(DataError, match=r"Cannot read .*items\.jsonl: there is no such file"):
        write_scores(tmp_path, ["m"])
