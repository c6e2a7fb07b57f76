"""Hand-made rows of two conversations are shown as those of an export: source and quote of every row, and checks."""

import copy
import json
import re

import pytest
from conftest import ROOT, Page

from solopo_plugin.qa.files import DataError, read_jsonl, write_jsonl
from solopo_plugin.synthesis.histories import make_row
from solopo_plugin.synthesis.look import OF_HISTORIES, gather, inspect, open_source

DEMO = ROOT / "data" / "demo_history.jsonl"
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "system": "system"}


def shown(path, folder) -> list[dict]:
    inspect(path, folder)
    return json.loads(Page(folder / "index.html").scripts[0])


def test_source_and_quote_of_every_row_of_the_shipped_example(tmp_path):
    """Both facts that are needed, each behind its call; in the long history they are marked, too."""
    rows = list(read_jsonl(DEMO))
    seen = shown(DEMO, tmp_path)
    assert len(seen) == len(rows) == 24
    for row, made in zip(seen, rows, strict=True):
        said = [turn["value"] for turn in made["messages"] if turn["from"] == "observation"]
        evidence = [text for name, text in row["facts"].items() if name.startswith("evidence ")]
        people = [re.match(r"\w+ \w+", text)[0] for text in said]
        assert evidence == [f"look_up(person: {who}): “{text}”" for who, text in zip(people, said, strict=True)]
        for side in ("short", "long"):
            assert [text for text, marked in row[side] if marked] == said
        assert len(said) == 2 and all(row[part] == made[part]["value"] for part in ("chosen", "rejected"))
        assert row["question"] == [turn["value"] for turn in made["messages"] if turn["from"] == "human"][-1]
    page = Page(tmp_path / "index.html")
    assert "24 train" in page.text and "characters" in page.text and "tokens" not in page.text
    assert len({row["id"] for row in seen}) == 24 and seen[2]["id"] == "demo_history:3"


def as_openai(turn: dict) -> dict:
    if turn["from"] == "function_call":
        call = json.loads(turn["value"])
        function = {"name": call["name"], "arguments": json.dumps(call["arguments"])}
        return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
    return {"role": ROLES[turn["from"]], "content": turn["value"]}


def test_either_form_of_turns_says_the_same():
    for row in read_jsonl(DEMO):
        other = {column: [as_openai(turn) for turn in row[column]] for column in ("messages", "long_messages")}
        other |= {part: as_openai(row[part]) for part in ("chosen", "rejected")}
        one, two = make_row(row, "r"), make_row(other, "r")
        assert [one[name] for name in ("origins", "question", "chosen", "rejected")] == [
            two[name] for name in ("origins", "question", "chosen", "rejected")
        ]
        for side, prompt in (("short", "prompt"), ("long", "long_prompt")):
            texts = [[r[prompt][p["start"] : p["end"]] for p in r[f"{side}_evidence"]] for r in (one, two)]
            assert texts[0] == texts[1] and len(texts[0]) == 2


def test_a_row_may_say_where_its_evidence_comes_from(tmp_path):
    rows = list(read_jsonl(DEMO))[:2]
    rows[0] |= {"id": "mine", "origins": [{"source": "log.txt", "section": "Day 2", "quote": "Fenna shares"}]}
    write_jsonl(tmp_path / "a.jsonl", rows[:1])
    write_jsonl(tmp_path / "a_val.jsonl", rows[1:])
    seen = shown(tmp_path / "a.jsonl", tmp_path / "page")
    assert [(row["id"], row["facts"]["split"]) for row in seen] == [("mine", "train"), ("a_val:1", "val")]
    assert seen[0]["facts"]["evidence 1"] == "log.txt › Day 2: “Fenna shares”" and "evidence 2" not in seen[0]["facts"]


def test_several_rejected_answers_are_all_shown(tmp_path):
    row = next(iter(read_jsonl(DEMO)))
    write_jsonl(tmp_path / "a.jsonl", [row | {"rejected": [row["rejected"], {"from": "gpt", "value": "Who knows?"}]}])
    (seen,) = shown(tmp_path / "a.jsonl", tmp_path / "page")
    assert seen["rejected"].startswith(row["rejected"]["value"]) and seen["rejected"].endswith("\n\nWho knows?")


def test_without_tools_the_evidence_is_what_the_user_said_before():
    said = ("human", "I am Ada."), ("gpt", "Hi."), ("human", "Who?")
    turns = [{"from": role, "value": text} for role, text in said]
    long = [*turns[:2], {"from": "human", "value": "It rains."}, turns[1], turns[2]]
    row = make_row({"messages": turns, "long_messages": long, "chosen": turns[1], "rejected": turns[1]}, "r")
    assert row["origins"] == [{"source": "turn 1, human", "quote": "I am Ada."}] and row["question"] == "Who?"
    assert row["long_prompt"] == "human: I am Ada.\n\ngpt: Hi.\n\nhuman: It rains.\n\ngpt: Hi.\n\nhuman: Who?"


def changed(rows: list[dict], check: str) -> list[dict]:
    """The rows with the fault that a check is to find, in the first one."""
    rows = copy.deepcopy(rows)
    first, results = rows[0], [t for t in rows[0]["messages"] if t["from"] == "observation"]
    if check == "evidence_differs":
        first["long_messages"] = [turn for turn in first["long_messages"] if turn != results[0]]
    elif check == "evidence_repeated":
        first["long_messages"][3]["value"] += " " + results[0]["value"]
    elif check == "prompt_in_both_splits":
        rows[-1]["messages"] = first["messages"]
    elif check == "id_repeated":
        first["id"] = rows[1]["id"] = "same"
    elif check in ("chosen_in_prompt", "rejected_in_prompt"):
        first["long_messages"][3]["value"] += " " + first[check.split("_")[0]]["value"]
    else:
        first["long_messages"] = first["messages"]
    return rows


@pytest.mark.parametrize("check", OF_HISTORIES)
def test_every_planted_fault_is_found(tmp_path, check):
    rows = list(read_jsonl(DEMO))[:4]
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert not any(gather(open_source(tmp_path / "a.jsonl")).failed.values())
    rows = changed(rows, check)
    write_jsonl(tmp_path / "a.jsonl", rows[:3])
    write_jsonl(tmp_path / "a_val.jsonl", rows[3:])
    found = gather(open_source(tmp_path / "a.jsonl"))
    assert len(found.failed[check]) == 1 and set(found.failed) == set(OF_HISTORIES)
    bound = {"prompt_in_both_splits": {"evidence_differs"}}.get(check, set())  # the long history has other facts
    assert {name for name, ids in found.failed.items() if ids} - bound == {check}
    assert found.unparsed == 0  # no distractors are looked for


@pytest.mark.parametrize(
    "change, said",
    [
        ({"messages": "no list"}, "`messages` must be a list of turns, got str 'no list'"),
        ({"long_messages": []}, r"`long_messages` must be a list of turns, got list \[\]"),
        ({"messages": [{"from": "human"}]}, "`messages` must hold .*, got dict {'from': 'human'}"),
        ({"messages": ["x"]}, "`messages` must hold .*, got str 'x'"),
        ({"chosen": None}, "`chosen` must hold .*, got NoneType None"),
        ({"origins": "log.txt"}, "`origins` must be a list of objects, got str 'log.txt'"),
        ({"origins": ["a"]}, r"`origins` must be a list of objects, got list \['a'\]"),
        ({"origins": {"source": "x"}}, "`origins` must be a list of objects, got dict {'source': 'x'}"),
    ],
)
def test_a_row_that_cannot_be_shown_is_named(tmp_path, change, said):
    rows = list(read_jsonl(DEMO))[:2]
    write_jsonl(tmp_path / "a.jsonl", [rows[0], rows[1] | change])
    with pytest.raises(DataError, match=f"a.jsonl, row 2: {said}"):
        inspect(tmp_path / "a.jsonl", tmp_path / "page")


@pytest.mark.parametrize("call", ["no JSON", '{"name": "f"}', "[1]", '{"name": "f", "arguments": [1]}'])
def test_a_call_that_cannot_be_read_is_shown_as_it_is(call):
    turns = [{"from": "human", "value": "Who?"}, {"from": "function_call", "value": call},
             {"from": "observation", "value": "Ada."}]  # fmt: skip
    row = make_row({"messages": turns, "long_messages": turns, "chosen": turns[0], "rejected": turns[0]}, "r")
    assert row["origins"] == [{"source": call, "quote": "Ada."}]
