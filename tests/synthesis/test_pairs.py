"""Selection: who is drawn, what is dropped and counted, how many rows there are, and which split they are in."""

import random
import unicodedata
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from small_work import TOKENIZER, Template, answer, recipe_for, verdicts, write_work

from solopo_plugin.host.template import encode_turn, load_template
from solopo_plugin.qa.files import DataError, read_jsonl, write_jsonl
from solopo_plugin.synthesis import pairs as pairs_stage
from solopo_plugin.synthesis.export import ENTRIES
from solopo_plugin.synthesis.pairs import Graded, draw_pair


@pytest.fixture(autouse=True)
def toy_template(monkeypatch):
    monkeypatch.setattr(pairs_stage, "load_chat", lambda *_: (TOKENIZER, Template()))


def refused(text: str) -> str | None:
    return "template_marker" if "<|end|>" in text else None


def draw(answers: list[dict], room=10_000, seed=0, balance_length=False, num_rejected=1):
    dropped = Counter()
    encode = lambda text: list(map(ord, text))  # noqa: E731
    rng = random.Random(seed)
    drawn = draw_pair(answers, room, encode, refused, rng, balance_length, dropped, num_rejected=num_rejected)
    return drawn, {name: n for name, n in dropped.items() if n}


RIGHT, WRONG = answer("q1", 0, True), answer("q1", 1, False)
CASES = [
    ([RIGHT, WRONG], None, {}),
    ([RIGHT, RIGHT], "all_correct", {}),
    ([WRONG, WRONG], "all_wrong", {}),
    ([RIGHT, WRONG | {"text": " \n", "answer": None}], "no_usable_rejected", {"empty": 1}),
    ([RIGHT | {"finish_reason": "length"}, WRONG], "no_usable_chosen", {"cut": 1}),
    ([RIGHT, WRONG | {"answer": None, "text": "I think so."}], "no_usable_rejected", {"no_marker": 1}),
    ([RIGHT, WRONG | {"text": "<|end|> The answer is: 3"}], "no_usable_rejected", {"template_marker": 1}),
    ([RIGHT, WRONG | {"text": "long " * 60 + WRONG["text"]}], "no_usable_rejected", {"over_length": 1}),
    ([RIGHT, WRONG | {"text": RIGHT["text"]}], "no_usable_rejected", {"equal": 1}),
    ([RIGHT, WRONG, WRONG | {"text": "", "answer": None}], None, {"empty": 1}),
]


@pytest.mark.parametrize("answers, reason, dropped", CASES, ids=[f"{c[1]} {list(c[2])}" for c in CASES])
def test_what_is_dropped_and_why(answers, reason, dropped):
    drawn, counted = draw(answers, room=200)
    assert (drawn.reason, counted) == (reason, dropped)
    if reason is None:
        assert (drawn.chosen["k"], drawn.rejected["k"]) == (0, 1)


NEARLY = [answer("q1", 2, False, text=f"{k}. The answer is: {said}", answer=said) for k, said in enumerate("12")]


def test_a_part_of_the_gold_answer_is_not_rejected():
    """Nor are its numbers in digits, and draws without one are as ever; a model's grades decide by themselves."""
    golds, encode = ["on one of 2"], lambda text: [*map(ord, text)]
    dropped, others = Counter(), [answer("q1", 3 + k, False) for k in range(4)]
    for seed in range(40):
        rng = random.Random(seed)
        drawn = draw_pair([RIGHT, WRONG, *NEARLY, *others], 999, encode, refused, rng, False, dropped, golds=golds)
        before, _ = draw([RIGHT, WRONG, *NEARLY, *others], seed=seed)
        assert drawn.rejected == before.rejected or before.rejected["k"] == 2 != drawn.rejected["k"]
    assert dropped == {"nearly_right": 80}
    several = draw_pair([RIGHT, *NEARLY, WRONG], 999, encode, refused, rng, True, dropped, None, 3, golds)
    assert (several.rejected["k"], several.more) == (1, [])
    for answers, reason in (([RIGHT, *NEARLY], "no_usable_rejected"), (NEARLY, "all_wrong")):
        assert draw_pair(answers, 999, encode, refused, rng, False, dropped, golds=golds).reason == reason
    graded = [answer | {"grade": 9.0 - 8 * (answer["k"] == 2)} for answer in (RIGHT, *NEARLY)]
    assert draw_pair(graded, 999, encode, refused, rng, False, dropped, Graded(4, 3), golds=golds).rejected["k"] == 2


def test_parts_of_gold_answers_on_both_sides_are_counted(tmp_path):
    """Judge one of each side's answers right, one wrong and one a part of the gold answer, which is left to no set."""
    near = [answer(f"q{i}", 2, False, text="The answer is: 3", answer="3") for i in range(6)]
    write_work(tmp_path, *[[[*verdicts(i, bits), near[i]] for i in range(6)] for bits in ("10", "01")])
    rows = [row | {"answers": [*row["answers"], "all three"]} for row in read_jsonl(tmp_path / "contexts.jsonl")]
    write_jsonl(tmp_path / "contexts.jsonl", rows)
    counts = pairs_stage.run(recipe_for(tmp_path, num_rejected=4), tmp_path)
    assert counts["short"]["dropped_answers"] == counts["long"]["dropped_answers"] == {"nearly_right": 6}
    assert len(pairs(tmp_path)) == 18 and all(len(row["all_rejected"]) == 1 for row in pairs(tmp_path))
    write_work(tmp_path, [[answer(f"q{i}", 0, True), near[i], near[i]] for i in range(6)])
    write_jsonl(tmp_path / "contexts.jsonl", rows)
    with pytest.raises(DataError, match=r"6 no usable rejected; 12 of 18 answers \(66.7 %\) are part of a gold answer"):
        pairs_stage.run(recipe_for(tmp_path, sample_long=False), tmp_path)


def test_what_marks_a_thought_is_no_marker_of_the_template_in_an_answer(tmp_path, monkeypatch):
    """As of Gemma 4, whose marks are special tokens; in a prompt, and a stop word anywhere, they still are."""
    token, template = SimpleNamespace(content="<|channel>", special=True), Template()
    template.thought_words = ("<|channel>", "<|end|>")
    tokenizer = SimpleNamespace(
        **vars(TOKENIZER) | dict(added_tokens_decoder={7: token}, all_special_ids=[0]),
        encode=lambda text, **_: [7 if text == "<|channel>" else 0],
        convert_ids_to_tokens={7: "<|channel>", 0: "<|end|>"}.get,
    )  # fmt: skip
    monkeypatch.setattr(pairs_stage, "load_chat", lambda *_: (tokenizer, template))
    rows = [verdicts(i, "10") for i in range(3)]
    rows[0][0]["text"] = "<|channel>" + rows[0][0]["text"]
    rows[1][0]["text"] = "<|end|>" + rows[1][0]["text"]
    write_work(tmp_path, rows)
    contexts = list(read_jsonl(tmp_path / "contexts.jsonl"))
    contexts[2]["short"]["prompt"] += "<|channel>"
    write_jsonl(tmp_path / "contexts.jsonl", contexts)
    counts = pairs_stage.run(recipe_for(tmp_path, sample_long=False), tmp_path)
    assert [row["id"] for row in pairs(tmp_path)] == ["q0"]
    assert counts["short"]["dropped_answers"] == {"template_marker": 1}
    assert counts["short"]["dropped_questions"] == {"no_usable_chosen": 1, "template_marker_in_prompt": 1}


@pytest.mark.parametrize("thinks", [False, True])
def test_a_thought_that_training_would_leave_in_its_prompt(tmp_path, tokenizer, monkeypatch, thinks):
    """Only what the host takes out where `enable_thinking: false` leaves the prompt that other responses have."""
    tools = load_template(tokenizer, "qwen3", enable_thinking=thinks)
    monkeypatch.setattr(pairs_stage, "load_chat", lambda *_: tools)
    rows = [verdicts(i, "10") for i in range(5)]
    thoughts = ["<think>\nSo.\n</think>\n\n", "<think>\nSo.\n</think>\n", "<think>So.</think>", "</think>", ""]
    for row, thought in zip(rows, thoughts, strict=True):
        row[1]["text"] = thought + row[1]["text"]
    write_work(tmp_path, rows)
    counts = pairs_stage.run(recipe_for(tmp_path, sample_long=False, enable_thinking=thinks), tmp_path)["short"]
    kept = {row["id"]: [row["chosen"], row["rejected"]] for row in pairs(tmp_path)}
    assert set(kept) == ({"q0", "q1", "q2", "q3", "q4"} if thinks else {"q0", "q4"})
    assert counts["dropped_answers"] == ({} if thinks else {"thought": 3})
    for texts in kept.values():
        turns = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": text}] for text in texts]
        prompts = [encode_turn(*tools, turn)[0] for turn in turns]
        assert prompts[0] == prompts[1]


def test_a_response_may_fill_the_room_exactly():
    """`cutoff_len` counts the response's stop token, which `encode` adds."""
    n = max(len(RIGHT["text"]), len(WRONG["text"]))
    assert draw([RIGHT, WRONG], room=n)[0].reason is None
    assert draw([RIGHT, WRONG], room=n - 1)[1] == {"over_length": 1}


def test_draws_are_uniform():
    """Chosen among 5 right and rejected among 7 wrong, 6,000 seeds: chi-square at p > 0.001, fixed seeds."""
    answers = verdicts(1, "101001110000")
    chosen, rejected = Counter(), Counter()
    for seed in range(6000):
        drawn, _ = draw(answers, seed=seed)
        chosen[drawn.chosen["k"]] += 1
        rejected[drawn.rejected["k"]] += 1
    assert set(chosen) == {0, 2, 5, 6, 7} and set(rejected) == {1, 3, 4, 8, 9, 10, 11}
    assert chisquare(list(chosen.values())).pvalue > 1e-3 and chisquare(list(rejected.values())).pvalue > 1e-3


def test_length_balance_brings_lengths_together():
    def gap(balance: bool) -> float:
        gaps = []
        for seed in range(200):
            rng = random.Random(seed)
            answers = [answer("q1", k, k % 2 == 0) for k in range(16)]
            answers = [a | {"text": "so " * rng.randrange(80) + a["text"]} for a in answers]
            drawn, _ = draw(answers, seed=seed, balance_length=balance)
            gaps.append(abs(len(drawn.chosen["ids"]) - len(drawn.rejected["ids"])))
        return sum(gaps) / len(gaps)

    assert gap(True) < gap(False) / 4


def pairs(work: Path) -> list[dict]:
    return list(read_jsonl(work / "pairs.jsonl"))


def test_questions_with_a_pair_on_both_sides_come_first(tmp_path):
    """Four questions give a pair on both sides, three on the short side alone, three on the long side alone."""
    short = ["10", "10", "10", "10", "10", "10", "10", "11", "11", "00", "00"]
    long = ["01", "01", "01", "01", "00", "11", "11", "01", "01", "01", "11"]
    write_work(tmp_path, *[[verdicts(i, bits) for i, bits in enumerate(side)] for side in (short, long)])
    for num_rows, n_solo in ((4, 4), (6, 6), (20, 7)):
        counts = pairs_stage.run(recipe_for(tmp_path, num_rows=num_rows), tmp_path)
        by_set = {name: [r["id"] for r in pairs(tmp_path) if r["set"] == name] for name in pairs_stage.SETS}
        assert len(by_set["solopo"]) == n_solo and set(by_set["solopo"][:4]) == {"q0", "q1", "q2", "q3"}
        assert by_set["solopo"][:4] == by_set["long_po"][:4] == by_set["longpo"][:4]
        assert counts["with_a_pair_on_both"] == 4
        if num_rows < 7:
            assert counts["statement"] == f"{num_rows} rows, as asked for, of 7 questions that give a pair."
    assert set(by_set["solopo"]) == {f"q{i}" for i in range(7)}
    assert set(by_set["long_po"]) == {"q0", "q1", "q2", "q3", "q7", "q8", "q9"}
    assert set(by_set["longpo"]) == {"q0", "q1", "q2", "q3", "q4", "q7", "q8"}  # q5, q6: never wrong on the long side
    assert counts["short"]["dropped_questions"] == {"all_correct": 2, "all_wrong": 2}
    assert counts["statement"] == (
        "7 rows of `num_rows: 20`: 11 questions had a context, of which dropped on the short one: 2 all correct, "
        "2 all wrong; for more rows give more questions."
    )


def test_more_rows_of_documents_come_of_more_questions_about_them(tmp_path):
    """Nobody gives questions there."""
    write_work(tmp_path, [verdicts(i, "10") for i in range(3)], [verdicts(i, "10") for i in range(3)])
    counts = pairs_stage.run(recipe_for(tmp_path, input_format="documents", candidates=3), tmp_path)
    assert counts["statement"].endswith("; for more rows raise `candidates: 3`, or give more documents.")


def test_chosen_and_rejected_come_from_the_sides_of_the_set(tmp_path):
    """Numbers of the answers tell the side: the short side's right answer is k = 0, the long side's k = 1."""
    write_work(tmp_path, [verdicts(i, "10") for i in range(6)], [verdicts(i, "01") for i in range(6)])
    pairs_stage.run(recipe_for(tmp_path), tmp_path)
    ks = {row["set"]: (row["chosen_k"], row["rejected_k"]) for row in pairs(tmp_path)}
    assert ks == {"solopo": (0, 1), "long_po": (1, 0), "longpo": (0, 0)}
    for row in pairs(tmp_path):
        assert row["pass_rate_short"] == row["pass_rate_long"] == 0.5 and row["pair_on_both"]
        assert row["chosen_tokens"] == len(row["chosen"]) + 1  # the stop token


def test_without_long_samples(tmp_path):
    write_work(tmp_path, [verdicts(i, "10") for i in range(6)])
    counts = pairs_stage.run(recipe_for(tmp_path, sample_long=False), tmp_path)
    assert {row["set"] for row in pairs(tmp_path)} == {"solopo"} and "long" not in counts
    assert all(row["pass_rate_long"] is None and not row["pair_on_both"] for row in pairs(tmp_path))


def test_not_a_row_and_no_training_row_are_sentences(tmp_path):
    write_work(tmp_path, [verdicts(i, "11") for i in range(3)], [verdicts(i, "11") for i in range(3)])
    with pytest.raises(DataError, match="^0 rows of `num_rows: 10`: 3 questions had a context.*: 3 all correct; for"):
        pairs_stage.run(recipe_for(tmp_path), tmp_path)
    write_work(tmp_path, [verdicts(i, "10") for i in range(3)], [verdicts(i, "11") for i in range(3)])
    with pytest.raises(DataError, match="`val_size: 3` leaves no training row of 3"):
        pairs_stage.run(recipe_for(tmp_path, val_size=3), tmp_path)
    rows = list(read_jsonl(tmp_path / "contexts.jsonl"))
    write_jsonl(tmp_path / "contexts.jsonl", [row | {"question": "Who?", "answers": ["x"]} for row in rows])
    with pytest.raises(DataError, match="`val_size: 1` leaves no training row of 3 .different questions: 1.; lower it"):
        pairs_stage.run(recipe_for(tmp_path, val_size=1), tmp_path)


def test_no_validation_row_and_sets_that_lack_rows_are_told_of(tmp_path, caplog):
    """Six questions with a pair on the short side; on the long side all to three are wrong, the others right."""
    long = [verdicts(i, "00" if i < 3 else "11") for i in range(6)]
    write_work(tmp_path, [verdicts(i, "10") for i in range(6)], long)
    counts = pairs_stage.run(recipe_for(tmp_path, num_rows=6, val_size=0.05), tmp_path)
    assert counts["statement"] == "6 rows, as asked for, of 6 questions that give a pair."
    dropped = "of 6 questions dropped on the long one: 3 all correct, 3 all wrong; for more rows give more questions."
    assert counts["too_few"] == {
        "long_po": "`long_po` has 0 rows of `num_rows: 6`, and there is no `toy_long_po`, `toy_sft_long`: it takes a "
        f"right answer to the long context and a wrong one to the long context; {dropped}",
        "longpo": "`longpo` has 3 rows of `num_rows: 6`: it takes a right answer to the short context and a wrong one "
        f"to the long context; {dropped}",
    }
    no_row = "`val_size: 0.05` of 6 rows is less than one, so there is no validation row; raise it"
    assert all(caplog.text.count(said) == 1 for said in (no_row, *counts["too_few"].values()))
    caplog.clear()
    counts = pairs_stage.run(recipe_for(tmp_path, num_rows=3, val_size=2), tmp_path)
    assert list(counts["too_few"]) == ["long_po"] and "`toy_sft_long`, `toy_long_po_val`" in caplog.text
    write_work(tmp_path, *2 * [[verdicts(i, "10") for i in range(6)]])
    assert "too_few" not in pairs_stage.run(recipe_for(tmp_path, num_rows=6, val_size=2), tmp_path)
    made_of = {name: tuple(e for e, (rows, _) in ENTRIES.items() if rows == name) for name in pairs_stage.SETS}
    assert pairs_stage.BESIDE == {name: made_of[name] for name in ("long_po", "longpo")}


@pytest.mark.parametrize(
    "grades, reason",
    [((8.0, 8.5, 9.0), "within_margin"), ((1.0, 2.0), "within_margin"), ((4.0, 8.0), None)],
)
def test_where_the_margin_alone_decides_questions_too_close_are_within_it(grades, reason):
    """`judge_chosen_min: 1` and `judge_rejected_max: 10`: every answer may be chosen, and rejected."""
    answers = [answer("q1", k, True, text=f"{k}", grade=grade) for k, grade in enumerate(grades)]
    drawn = draw_pair(answers, 99, lambda t: [*map(ord, t)], refused, random.Random(0), False, Counter(), Graded(10, 3))
    assert drawn.reason == reason


UNMARKED = {"answer": None, "text": "I think so.", "correct": False}
MARKER = "lack `The answer is:` and count as wrong"


@pytest.mark.parametrize(
    "changes, prompt, remedy",
    [
        ([UNMARKED] * 3, None, (
            f"; 12 of 16 answers (75.0 %) {MARKER}: the model ignores the format: check that `template` is its own, "
            "take an instruct model, or ask for that line more plainly in `prompt`."
        )),
        ([UNMARKED] * 4, "{documents} {question}", (
            f"; 16 of 16 answers (100.0 %) {MARKER}: `prompt` does not ask for that line: let it say that an answer "
            "ends with `The answer is: ...`."
        )),
        ([{"finish_reason": "length"}] * 2 + [UNMARKED | {"text": " "}], None, (
            "; 8 of 16 answers (50.0 %) were cut: raise `max_new_tokens: 1024`; 4 of 16 answers (25.0 %) are empty: "
            "see what the backend gives; a thought may have taken all of `max_new_tokens`."
        )),
        ([UNMARKED] * 2, None, "; for more rows give more questions."),
        ([{}], None, "; for more rows give more questions."),
    ],
)  # fmt: skip
def test_more_questions_are_no_help_where_most_answers_cannot_be_used(tmp_path, changes, prompt, remedy):
    """Four questions, four wrong answers to each, of which some are changed."""
    changes = changes + [{}] * (4 - len(changes))
    write_work(tmp_path, [[answer(f"q{i}", k, False, **changes[k]) for k in range(4)] for i in range(4)])
    with pytest.raises(DataError) as error:
        pairs_stage.run(recipe_for(tmp_path, sample_long=False, prompt=prompt), tmp_path)
    start = "0 rows of `num_rows: 10`: 4 questions had a context, of which dropped on the short one: 4 all wrong"
    assert str(error.value) == start + remedy


def test_other_judgements_than_contexts_are_noticed(tmp_path):
    write_work(tmp_path, [verdicts(i, "10") for i in (0, 2, 1)], [verdicts(i, "10") for i in range(3)])
    with pytest.raises(DataError, match="has question 'q2' where contexts.jsonl has 'q1'; run the stage `judge` again"):
        pairs_stage.run(recipe_for(tmp_path), tmp_path)


def test_a_prompt_that_training_would_refuse(tmp_path):
    write_work(tmp_path, [verdicts(i, "10") for i in range(3)])
    rows = list(read_jsonl(tmp_path / "contexts.jsonl"))
    rows[1]["long"]["prompt"] += "<|end|>"
    pairs_stage.write_jsonl(tmp_path / "contexts.jsonl", rows)
    counts = pairs_stage.run(recipe_for(tmp_path, sample_long=False), tmp_path)
    assert counts["short"]["dropped_questions"] == {"template_marker_in_prompt": 1}
    assert {row["id"] for row in pairs(tmp_path)} == {"q0", "q2"}


def test_the_longer_prompt_decides_whether_a_pair_fits(tmp_path):
    write_work(tmp_path, [verdicts(i, "10") for i in range(3)])
    longest = max(row["long"]["tokens"] for row in read_jsonl(tmp_path / "contexts.jsonl"))
    recipe = recipe_for(tmp_path, sample_long=False, cutoff_len=longest + 10)
    over = rf"6 of 6 answers \(100.0 %\) are longer than `cutoff_len: {longest + 10}` leaves: raise it, or lower"
    with pytest.raises(DataError, match=f"^0 rows .*3 no usable chosen; {over} `long_tokens: 8192`.$"):
        pairs_stage.run(recipe, tmp_path)
    assert pairs_stage.run(recipe_for(tmp_path, sample_long=False, cutoff_len=longest + 100), tmp_path)["rows"]


def test_which_questions_validate_is_drawn_by_the_seed(tmp_path):
    """Three of twelve, forty seeds: every question comes up; one seed gives one choice."""
    write_work(tmp_path, [verdicts(i, "10") for i in range(12)])
    seen = Counter()
    for seed in range(40):
        pairs_stage.run(recipe_for(tmp_path, num_rows=12, val_size=3, sample_long=False, seed=seed), tmp_path)
        chosen = [row["id"] for row in pairs(tmp_path) if row["split"] == "val"]
        assert len(chosen) == 3
        seen.update(chosen)
    assert len(seen) == 12 and max(seen.values()) < 25


def test_which_questions_validate_stays_where_the_normal_form_of_questions_changes(tmp_path):
    """The literals are of a version that compared questions by SQuAD's normal form."""
    write_work(tmp_path, [verdicts(i, "10") for i in range(12)])
    rows = list(read_jsonl(tmp_path / "contexts.jsonl"))
    asked = [row | {"question": f"What is {i}.5 × “Cafe\u0301”?", "answers": ["B", "a"]} for i, row in enumerate(rows)]
    write_jsonl(tmp_path / "contexts.jsonl", asked)
    pairs_stage.run(recipe_for(tmp_path, num_rows=12, val_size=3, sample_long=False, seed=1), tmp_path)
    assert [row["id"] for row in pairs(tmp_path) if row["split"] == "val"] == ["q8", "q7", "q10"]


@pytest.mark.parametrize("change", [str.upper, "the {}.".format, partial(unicodedata.normalize, "NFD")])
def test_the_same_question_twice_is_on_one_side(tmp_path, change):
    """Ten questions, each under two ids and written in another way, sorted as well: no split has only one of them."""
    write_work(tmp_path, [verdicts(i, "10") for i in range(20)])
    rows = list(read_jsonl(tmp_path / "contexts.jsonl"))
    for row, other in zip(rows[10:], rows[:10], strict=True):
        other["answers"] = [*other["answers"], "le caf\u00e9"]
        row["question"] = other["question"].upper().replace(" ", "  ").replace("?", "\uff1f")
        row["answers"] = [change(a) for a in other["answers"]]
    pairs_stage.write_jsonl(tmp_path / "contexts.jsonl", rows)
    for seed in range(5):
        counts = pairs_stage.run(recipe_for(tmp_path, num_rows=20, val_size=5, sample_long=False, seed=seed), tmp_path)
        validation = {int(row["id"][1:]) % 10 for row in pairs(tmp_path) if row["split"] == "val"}
        training = {int(row["id"][1:]) % 10 for row in pairs(tmp_path) if row["split"] == "train"}
        assert not validation & training and counts["rows"]["solopo"]["val"] in (6, 5)


def test_validation_rows_whose_passages_are_trained_on_are_counted_and_told_of_once(tmp_path, caplog):
    """Twelve questions, of each pair both have a passage; which rows are drawn is as without."""
    write_work(tmp_path, [verdicts(i, "10") for i in range(12)])
    recipe = recipe_for(tmp_path, num_rows=12, val_size=4, sample_long=False)
    counts = pairs_stage.run(recipe, tmp_path)
    before = [(row["id"], row["split"]) for row in pairs(tmp_path)]
    assert counts["val_with_training_evidence"] == 0 and "share a passage" not in caplog.text
    rows = list(read_jsonl(tmp_path / "contexts.jsonl"))
    for row, other in zip(rows[::2], rows[1::2], strict=True):
        row["long"] = other["long"]
    write_jsonl(tmp_path / "contexts.jsonl", rows)
    counts = pairs_stage.run(recipe, tmp_path)
    assert [(row["id"], row["split"]) for row in pairs(tmp_path)] == before
    split = {int(name[1:]): split for name, split in before}
    shared = sum(split[i] == "val" and split[i ^ 1] == "train" for i in split)
    assert counts["val_with_training_evidence"] == shared > 0
    assert caplog.text.count(f"{shared} of 4 validation rows share a passage of their evidence") == 1
    assert "val_with_training_evidence" not in pairs_stage.run(recipe_for(tmp_path, sample_long=False), tmp_path)


BITS = st.lists(st.tuples(*[st.text("01", min_size=3, max_size=3)] * 2), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(BITS, st.integers(1, 12), st.sampled_from([0, 0.25, 0.5]), st.integers(0, 3))
def test_properties(tmp_path_factory, bits, num_rows, val_size, seed):
    """Right is chosen and wrong rejected; counts add up; splits are disjoint; order and repetition change nothing."""
    work = tmp_path_factory.mktemp("work")
    n = len(bits)
    sides = [[verdicts(i, pair[side]) for i, pair in enumerate(bits)] for side in (0, 1)]
    write_work(work, *sides)
    recipe = recipe_for(work, num_rows=num_rows, val_size=val_size, seed=seed)
    mixed = [[set(pair[side]) == {"0", "1"} for pair in bits] for side in (0, 1)]
    n_rows = min(num_rows, sum(mixed[0]))
    if n_rows == 0:
        with pytest.raises(DataError, match="^0 rows"):
            pairs_stage.run(recipe, work)
        return
    counts = pairs_stage.run(recipe, work)
    rows = pairs(work)
    solo = [row for row in rows if row["set"] == "solopo"]
    assert len(solo) == n_rows and len({row["id"] for row in solo}) == n_rows
    for side, name in enumerate(("short", "long")):
        assert counts[name]["with_a_pair"] == sum(mixed[side])
        assert counts[name]["with_a_pair"] + sum(counts[name]["dropped_questions"].values()) == n
    for row in rows:
        i = int(row["id"][1:])
        for part, bit in (("chosen", "1"), ("rejected", "0")):
            side = pairs_stage.SETS[row["set"]][part == "rejected"] == "long"
            assert bits[i][side][row[f"{part}_k"]] == bit
            assert row[part] == sides[side][i][row[f"{part}_k"]]["text"]
    on_both = sum(a and b for a, b in zip(*mixed, strict=True))
    assert sum(row["pair_on_both"] for row in solo) == min(num_rows, on_both)
    split = {row["id"]: row["split"] for row in solo}
    assert list(split.values()).count("val") == round(val_size * n_rows)
    assert all(split.get(row["id"], "train") == row["split"] for row in rows)
    before = (work / "pairs.jsonl").read_bytes()
    pairs_stage.run(recipe, work)
    assert (work / "pairs.jsonl").read_bytes() == before
    contexts = list(read_jsonl(work / "contexts.jsonl"))
    pairs_stage.write_jsonl(work / "contexts.jsonl", contexts[::-1])
    for name, answers in (("short", sides[0]), ("long", sides[1])):
        pairs_stage.write_jsonl(work / f"judged.{name}.jsonl", (row for question in answers[::-1] for row in question))
    pairs_stage.run(recipe, work)
    assert (work / "pairs.jsonl").read_bytes() == before


def test_several_rejected_are_distinct_and_the_first_is_the_one_of_before():
    """Up to so many; the chosen one is as ever, and every draw is the same for a seed."""
    answers = verdicts(1, "10010010") + [answer("q1", 8, False, text=answer("q1", 1, False)["text"])]
    firsts, sets = Counter(), Counter()
    for seed in range(200):
        one, _ = draw(answers, seed=seed)
        drawn = [draw(answers, seed=seed, num_rejected=n)[0] for n in (3, 3, 20)]
        assert drawn[0] == drawn[1] and one.more == []
        for several, n in zip(drawn, (3, 3, 5), strict=True):
            rejected = [several.rejected, *several.more]
            assert (several.chosen, several.rejected) == (one.chosen, one.rejected) and len(rejected) == n
            texts = {a["text"] for a in rejected}
            assert len(texts) == n and all("No answer." in text for text in texts)
        firsts[drawn[0].rejected["text"]] += 1
        sets[frozenset(a["text"] for a in (drawn[0].rejected, *drawn[0].more))] += 1
    assert len(firsts) == 5 and len(sets) == 10  # each of five texts, and each three of them


def test_several_rejected_are_the_nearest_in_length():
    answers = [answer("q1", k, k == 0, text=f"{'so ' * 3 * k}The answer is: {k}") for k in range(6)]
    drawn, _ = draw(answers, balance_length=True, num_rejected=3)
    assert [a["k"] for a in (drawn.rejected, *drawn.more)] == [1, 2, 3]


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("judge", ["rule", "model"])
def test_of_each_set_the_rejected_are_the_nearest_in_length(tmp_path, balance, judge):
    """To the chosen one of the same row, which in `longpo` is of the other side; grades are another reason."""
    rng = random.Random(0)

    def made(i: int, k: int) -> dict:
        right = k < 4
        grade = rng.choice([7.0, 9.0] if right else [2.0, 4.0])
        text = "so " * rng.randrange(80) + f"{k}. The answer is: {f'Town{i}ville' if right else 'No answer.'}"
        return answer(f"q{i}", k, right, text=text, grade=grade)

    sides = {side: [[made(i, k) for k in range(12)] for i in range(20)] for side in ("short", "long")}
    write_work(tmp_path, *sides.values())
    keys = {"judge": judge, "judge_margin": 4.0} if judge == "model" else {}
    recipe = recipe_for(tmp_path, num_rows=20, num_rejected=2, balance_length=balance, **keys)
    pairs_stage.run(recipe, tmp_path)
    nearest = Counter()
    for row in pairs(tmp_path):
        side, i = pairs_stage.SETS[row["set"]][1], int(row["id"][1:])
        wrong = [a for a in sides[side][i][4:] if judge == "rule" or row["chosen_grade"] - a["grade"] >= 4]
        gaps, chosen = sorted(abs(len(a["text"]) - len(row["chosen"])) for a in wrong), len(row["chosen"])
        nearest[row["set"]] += [abs(len(text) - chosen) for text in row["all_rejected"]] == gaps[:2]
    assert nearest == dict.fromkeys(pairs_stage.SETS, 20) if balance else max(nearest.values(), default=0) < 5


def test_rows_of_longpo_reject_none_that_is_the_chosen(tmp_path):
    """The wrong answers of the long side, of which one has the tokens of the chosen one of the short side."""
    right = answer("q0", 0, True)
    long = [answer("q0", 0, False, text=right["text"]), answer("q0", 1, False), answer("q0", 2, True)]
    write_work(tmp_path, [[right, answer("q0", 1, False)]], [long])
    pairs_stage.run(recipe_for(tmp_path, num_rejected=4), tmp_path)
    rows = {row["set"]: row for row in pairs(tmp_path)}
    assert rows["longpo"]["all_rejected"] == [long[1]["text"]] == [rows["longpo"]["rejected"]]
    assert set(rows["long_po"]["all_rejected"]) == {long[0]["text"], long[1]["text"]}
