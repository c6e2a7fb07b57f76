"""The judge against an implementation of this test's own, on answers to real questions that a server gives.

The implementation looks at one character after the other and tries every run of words; nothing of it is the project's.
"""

import json
import logging
import random
import unicodedata
from itertools import pairwise

import pytest
from material import HOTPOTQA, MUSIQUE, make_questions, recipe, save_tokenizer
from scripted_server import serving

from solopo_plugin.qa.files import read_jsonl, write_jsonl
from solopo_plugin.synthesis.judge import judge, judge_side
from solopo_plugin.synthesis.look import inspect
from solopo_plugin.synthesis.pipeline import run_pipeline

# ---- slow and obvious


def slow_said(text: str) -> str:
    """What stands behind the last thought; nothing if one is open."""
    end = max((i + len("</think>") for i in range(len(text)) if text[i : i + 8].lower() == "</think>"), default=0)
    return "" if "<think>" in text[end:].lower() else text[end:]


def slow_marker(text: str, at: int, colon: bool) -> int | None:
    """Where `the answer is` that begins here ends, with a colon or without one."""
    if at and text[at - 1].isalnum():
        return None
    for word in ("the", "answer", "is"):
        if word != "the":
            start = at
            while at < len(text) and (text[at].isspace() or colon and text[at] in "*_`"):
                at += 1
            if at == start:
                return None
        if text[at : at + len(word)].lower() != word:
            return None
        at += len(word)
    if not colon:
        return at if at < len(text) and (text[at].isspace() or text[at] == "*") else None
    while at < len(text) and (text[at].isspace() or text[at] in "*_`"):
        at += 1
    return at + 1 if at < len(text) and text[at] in ":\uff1a" else None


def slow_answer(text: str) -> str | None:
    """The line behind the last marker; else what is in the last box; else the line behind the last loose marker."""
    text = slow_said(text)
    for colon in (True, False):
        ends = [end for at in range(len(text)) if (end := slow_marker(text, at, colon)) is not None]
        if ends:
            return next((line for line in text[ends[-1] :].split("\n") if line.strip(" \r*:$[\\")), "")
        if colon and "\\boxed{" in text:
            at, depth, inner = text.rindex("\\boxed{") + 7, 1, ""
            while depth and at < len(text):
                depth += {"{": 1, "}": -1}.get(text[at], 0)
                inner += text[at]
                at += 1
            return inner
    return None


SYMBOLS = ("Sm", "Sc", "Sk", "So")


def slow_words(text: str) -> list[tuple[str, bool]]:
    """The words of a text, each with whether it is glued to the one before by punctuation alone."""
    for command in ("\\boxed", "\\text"):
        text = text.replace(command, "")
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text.replace("\u00b4", "'")).casefold())
    text = "".join(f" {sign} " if sign > "\x7f" and unicodedata.category(sign) in SYMBOLS else sign for sign in text)
    spaced = []
    for group in text.split():
        pieces, word, at = [], "", 0
        while at < len(group):
            sign = group[at]
            minus = sign in "-–−" and (not at or not (group[at - 1].isalnum() or group[at - 1] in "_)]%-–—−"))
            begin = at + minus
            before, digit = group[begin - 1 : begin], group[begin : begin + 1].isdigit()
            if digit and not before.isdigit() and before not in (*",.:/",):
                end = begin  # of a number
                while end < len(group) and (group[end].isdigit() or group[end] in ",.:/"):
                    end += 1
                run = group[begin:end].rstrip(",.:/")
                whole, *rest = run.split(".")
                thousands = whole.split(",")
                signs = [c for c in run if not c.isdigit()]
                parted = signs in (["."], [":"]) or signs == ["/"] and max(map(len, run.split("/"))) <= 3
                grouped = len(thousands) > 1 and len(thousands[0]) <= 3 and {*map(len, thousands[1:])} == {3}
                if parted or grouped and len(rest) <= 1 or minus and not signs:
                    word += "-" * minus + run.replace(",", "")
                    at = begin + len(run)
                    continue
            kind = unicodedata.category(sign)
            if kind == "Cf":
                pass
            elif kind[0] in "LMN" or kind in SYMBOLS and sign > "\x7f":
                word += sign
            else:
                pieces, word = [*pieces, word], ""
            at += 1
        pieces = [piece for piece in [*pieces, word] if piece]
        if pieces and "".join(pieces) not in ("a", "an", "the"):
            glued = [False, *(not (a[-1].isdigit() and b[0].isdigit()) for a, b in pairwise(pieces))]
            spaced += zip(pieces, glued, strict=True)
    return spaced


def slow_join(words: list[tuple[str, bool]]) -> str:
    return "".join(word if glued or not k else f" {word}" for k, (word, glued) in enumerate(words))


def slow_holds(text: str, gold: str) -> bool:
    words, wanted = slow_words(text), slow_join(slow_words(gold))
    for start in range(len(words)):
        for end in range(start + 1, len(words) + 1):
            if wanted and slow_join(words[start:end]) == wanted:
                around = slow_join(words[max(0, start - 1) : end + 1])
                if wanted not in ("no", "answer") or "no answer" not in around:
                    return True
    return False


def slow_judge(text: str, golds: list[str]) -> bool:
    answer = slow_answer(text)
    return answer is not None and any(slow_holds(answer, gold) for gold in golds)


def old_rule(text: str, golds: list[str]) -> bool:
    """A substring of what follows the last `the answer is`, with a colon or not: what the material must tell apart."""
    answer = text.lower().rpartition("the answer is")[2].strip(" :*").split("\n")[0]
    return "the answer is" in text.lower() and any(gold.lower() in answer for gold in golds)


# ---- 2,000 answers

N = 12  # to each of 190 questions


def scripted_answers(questions: list[dict], n: int, rng: random.Random) -> dict[str, list[tuple[str, bool | None]]]:
    """`n` texts for each question, and whether it is right where that is sure by how it was made."""
    every = [answer for question in questions for answer in question["answers"]]
    made = {}
    for question in questions:
        golds, evidence = question["answers"], [p["text"] for p in question["evidence"]]
        texts = []
        for _ in range(n):
            gold, other, way = rng.choice(golds), rng.choice(every), rng.random()
            said, right = rng.choice([
                (gold, True), (gold, True), (gold.upper(), True), (f"the {gold}.", True), (f"{gold}'s", True),
                (f"either {gold} or {other}", True), (f"probably {gold}/{other}", True), (f"\u201c{gold}\u201d", True),
                (f"*{gold}*", True), (f"in {gold}, as document 3 says", True), (other, None), (other, None),
                (f"Pre{gold}ism", None), (f"{gold[0]}{gold}", None), (f"7{gold}5", None), (rng.choice(evidence), None),
                (other[:-2], None), (rng.choice(["Russia", "Northern Ireland", "nobody", "1,922", "48.5 %"]), None),
                ("No answer.", False), ("No answer can be given", False), ("", False),
            ])  # fmt: skip
            for old, new in (("'", "\u2019"), ("-", "\u2013"), (" ", "\u00a0"), (",", "\uff0c")):
                said = said.replace(old, new) if rng.random() < 0.15 else said
            said = unicodedata.normalize(rng.choice(["NFC", "NFC", "NFD"]), said)
            thought = " ".join(rng.sample(rng.choice(evidence).split(), 5)) + f" Perhaps {rng.choice(every)}."
            inner = f"<think>{thought} The answer is: {rng.choice([gold, other])}</think>"
            text, read = rng.choice([
                (f"{thought} The answer is: {said}", True), (f"{thought}\n\n**The answer is:** {said}", True),
                (f"{thought}\nThe answer is\uff1a{said}", True), (f"{thought}\nThe answer is {said}", True),
                (f"The answer is: {other}? {thought}\nThe answer is: {said}", True),
                (f"{thought}\nThe answer is: {said}\n\nNote that the answer is stated in document 3.", True),
                (f"{thought}\nThe answer is: {said}. Note that the answer is stated in document 3.", True),
                (f"{inner}\n{thought} The answer is: {said}", True), (f"{thought}\nThe answer is:\n\n{said}", True),
                (f"{thought} $\\boxed{{\\text{{{said}}}}}$", True), (f"The answer is: $\\boxed{{{said}}}$", True),
                (f"{thought} It is {said}", False), (f"{inner} {said}", False),
                (f"<think>{thought} The answer is: {said}", False),
                (f"{thought} The answer isn't {said}", False), (f"{inner} The answer is: {said} <think>or", False),
            ] if way < 0.9 else [(said, False), ("", False)])  # fmt: skip
            texts.append((text, False if not read else right))
        made[question["question"]] = texts
    return made


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """The pipeline's run over real questions with `N` answers each: its folder, and what was made how."""
    if not (MUSIQUE.exists() and HOTPOTQA.exists()):
        pytest.skip(f"no questions at {MUSIQUE} and {HOTPOTQA}; set SOLOPO_SHARED_DATA")
    folder = tmp_path_factory.mktemp("judge")
    made = recipe(
        folder, save_tokenizer(tmp_path_factory.mktemp("tokenizer")), MUSIQUE, input=f"{MUSIQUE},{HOTPOTQA}",
        short_tokens=6000, long_tokens=8000, num_samples=N, num_rows=1000, cutoff_len=20000, backend="openai",
        served_model="scripted", sample_long=False, server_urls="http://127.0.0.1:9/v1",
    )  # fmt: skip
    run_pipeline(made, "read")
    answers = scripted_answers(list(read_jsonl(folder / "work/questions.jsonl")), N, random.Random("judge"))
    (folder / "said.json").write_text(json.dumps({q: [text for text, _ in texts] for q, texts in answers.items()}))
    with serving(folder / "said.json", verbatim=True) as server:
        made.server_urls = server.url
        run_pipeline(made)
    return folder, answers


@pytest.mark.slow
def test_two_thousand_answers_to_real_questions(judged):
    """Every verdict is that of the slow implementation, and the one that is sure by how the answer was made."""
    folder, answers = judged
    contexts = {row["id"]: row for row in read_jsonl(folder / "work/contexts.jsonl")}
    n, right, sure, turned = 0, 0, 0, 0
    for row in read_jsonl(folder / "work/judged.short.jsonl"):
        context = contexts[row["id"]]
        text, known = answers[context["question"]][row["k"]]
        assert row["text"] == text
        assert row["correct"] == slow_judge(text, context["answers"]), (text, context["answers"])
        assert known in (None, row["correct"]), (text, context["answers"])
        assert row["correct"] or not row["em"]
        assert judge(text, context["answers"]) == {key: row[key] for key in ("answer", "correct", "em", "f1")}
        n, right, sure = n + 1, right + row["correct"], sure + (known is not None)
        turned += row["correct"] != old_rule(text, context["answers"])
    assert n >= 2000 and 0.25 < right / n < 0.75 and sure > 1000 and turned > 200, (n, right, sure, turned)


def test_what_the_judge_said_is_what_the_inspection_finds(judged):
    """One rule: no chosen answer is wrong, no rejected one right, and no distractor holds an answer."""
    folder, _ = judged
    rows = list(read_jsonl(folder / "work/pairs.jsonl"))
    golds = {row["id"]: row["answers"] for row in read_jsonl(folder / "work/contexts.jsonl")}
    assert len(rows) > 100
    for row in rows:
        assert slow_judge(row["chosen"], golds[row["id"]]) and not slow_judge(row["rejected"], golds[row["id"]])
    failed = inspect(folder / "work", folder / "page").failed
    assert not any(ids for name, ids in failed.items() if "is_" in name or name.startswith("answer_in"))


@pytest.mark.parametrize(
    "text, golds, correct, em, f1",
    [
        ("It is in Karvik. The answer is: Rosvik town.", ["Karvik", "Rosvik"], True, False, 0.6667),
        ("The answer is: the Rosvik!", ["Rosvik"], True, True, 1.0),
        ("The answer is: \\boxed{Xi\u2019an}", ["Xi'an"], True, True, 1.0),
        ("Rosvik. The answer is: Karvik", ["Rosvik"], False, False, 0.0),  # a mere mention
        ("The answer is: Russia", ["US", "Russ"], False, False, 0.0),
        ("The answer is: No answer.", ["no"], False, False, 0.0),
        ("The answer is: No answer.", ["no answer"], True, True, 1.0),
        ("<think>The answer is: Rosvik</think> Karvik", ["Rosvik"], False, False, 0.0),
        ("The answer is: 1.11.0", ["1.1.10"], False, False, 0.3333),
        ("The answer is: C", ["C++", "2.5"], False, False, 0.0),
        ("It is Rosvik", ["Rosvik"], False, False, 0.0),
        ("", ["Rosvik"], False, False, 0.0),
    ],
)
def test_verdicts(text, golds, correct, em, f1):
    verdict = judge(text, golds)
    assert (verdict["correct"], verdict["em"], verdict["f1"]) == (correct, em, f1)
    assert (verdict["answer"] is None) == ("answer is" not in text.rpartition("</think>")[2])


# ---- a model that ignores the format


@pytest.mark.parametrize(
    "unmarked, finish, prompt, said",
    [
        (1, "stop", None, None),
        (3, "stop", None, "3 of 4 answers on the short contexts (75.0 %) lack `The answer is:` and count as wrong; 0 "
         "answers were cut at `max_new_tokens`. The first: q k=0, q k=1, q k=2. Most do: the model ignores the format: "
         "check that `template` is its own, take an instruct model, or ask for that line more plainly in `prompt`."),
        (3, "stop", "{documents} {question}", "Most do: `prompt` does not ask for that line: let it say that an answer "
         "ends with `The answer is: ...`."),
        (3, "length", None, None),
    ],
)  # fmt: skip
def test_a_model_that_ignores_the_format_is_told_of(tmp_path, caplog, unmarked, finish, prompt, said):
    texts = ["It is Rosvik"] * unmarked + ["The answer is: Rosvik"] * (4 - unmarked)
    rows = [{"id": "q", "k": k, "text": text, "finish_reason": finish} for k, text in enumerate(texts)]
    write_jsonl(tmp_path / "samples.short.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        counts = judge_side(tmp_path, "short", {"q": ["Rosvik"]}, prompt)
    assert counts["no_marker"] == unmarked and "ignored" not in counts
    assert said in caplog.text if said else "Most do" not in caplog.text


def test_another_rule_judges_a_finished_folder_again(tmp_path, monkeypatch, caplog):
    """Verdicts of another version are not kept in silence; what was sampled is."""
    questions = make_questions(6, distractors=12)
    (tmp_path / "said.json").write_text(json.dumps({q["question"]: q["answers"][0] for q in questions}))
    with serving(tmp_path / "said.json") as server:
        made = recipe(
            tmp_path, save_tokenizer(tmp_path / "tokenizer"), questions, backend="openai", served_model="scripted",
            server_urls=server.url,
        )  # fmt: skip
        monkeypatch.setattr("solopo_plugin.synthesis.recipe.RULE", 1)
        run_pipeline(made)
    monkeypatch.undo()
    with caplog.at_level(logging.INFO):
        run_pipeline(made)
    assert "sample: finished before, kept." in caplog.text
    assert "judge: made again, because the rule of `gives_answer` has changed." in caplog.text
