"""Reading questions: every format, every bad line named, and files that survive what befalls them."""

import gzip
import json
import os
import random
import re
from collections import Counter
from dataclasses import MISSING
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from material import HOTPOTQA, MUSIQUE, make_questions, recipe
from override_table import runs

from solopo_plugin.qa.answers import normalize_answer
from solopo_plugin.qa.files import DataError, read_jsonl, write_json, write_jsonl
from solopo_plugin.qa.questions import parse_row
from solopo_plugin.synthesis import read
from solopo_plugin.synthesis.pipeline import TABLE
from solopo_plugin.synthesis.recipe import FIELDS, load_recipe, make_recipe, outside_inputs

FUZZ = settings(deadline=None, max_examples=100, derandomize=True, database=None)

PARAGRAPHS = [("Rosvik", ["Rosvik is a town.", " It has a harbour."]), ("Karvik", ["Karvik is not."])]
MUSIQUE_ROW = {
    "id": "2hop__1_2", "question": " Where? ", "answer": "Rosvik", "answer_aliases": ["The Rosvik", "!"],
    "question_decomposition": [{}, {}], "answerable": True,
    "paragraphs": [
        {"idx": i, "title": title, "paragraph_text": "".join(sentences), "is_supporting": i == 0}
        for i, (title, sentences) in enumerate(PARAGRAPHS)
    ],
}  # fmt: skip
HOTPOT_ROW = {
    "_id": "h1", "question": "Where?", "answer": "Rosvik", "type": "bridge",
    "supporting_facts": [["Rosvik", 0]], "context": [list(pair) for pair in PARAGRAPHS],
}  # fmt: skip
HUB_ROW = {
    "id": "h2", "question": "Where?", "answer": "Rosvik", "supporting_facts": {"title": ["Rosvik"], "sent_id": [0]},
    "context": {"title": [t for t, _ in PARAGRAPHS], "sentences": [s for _, s in PARAGRAPHS]},
}  # fmt: skip
WIKI_ROW = {
    **HOTPOT_ROW, "_id": "w1", "evidences": [["a", "b", "c"]],
    "context": json.dumps([["Rosvik", ["Rosvik is a town.", "It has a harbour."]], ["Karvik", ["Karvik is not."]]]),
}  # fmt: skip
SQUAD_HUB_ROW = {
    "id": "s1", "title": "Rosvik", "context": "Rosvik is a town. It has a harbour.", "question": "Where?",
    "answers": {"text": ["Rosvik", "Rosvik", "The Rosvik"], "answer_start": [0, 0, 0]},
}  # fmt: skip
PLAIN_ROW = {"id": 7, "question": "Where?", "answers": "Rosvik", "evidence": ["Rosvik is a town. It has a harbour."]}


def run(tmp_path: Path, rows, **keys) -> tuple[list[dict], dict]:
    made = recipe(tmp_path, "none", rows, **keys)
    counts = read.run(made, tmp_path)
    return list(read_jsonl(tmp_path / "questions.jsonl")), counts


# ---- formats


@pytest.mark.parametrize("row", [MUSIQUE_ROW, HOTPOT_ROW, HUB_ROW, WIKI_ROW], ids=["musique", "hotpot", "hub", "2wiki"])
def test_formats_of_benchmarks(tmp_path, row):
    (question,), counts = run(tmp_path, [row])
    assert question == {
        "id": row.get("id") or row["_id"], "question": "Where?",
        "answers": ["Rosvik", "The Rosvik"] if row is MUSIQUE_ROW else ["Rosvik"],
        "hops": 2 if row is MUSIQUE_ROW else 1,
        "evidence": [{"title": "Rosvik", "text": "Rosvik is a town. It has a harbour."}],
        "distractors": [{"title": "Karvik", "text": "Karvik is not."}],
    }  # fmt: skip
    assert counts == {"lines": 1, "bad": 0, "unanswerable": 0, "same_id": 0, "questions": 1, "corpus": 0}


@pytest.mark.parametrize("form", ["auto", "squad"])
def test_squad(tmp_path, form):
    """The official file (versions 1.1 and 2.0, in any layout) and the hub's rows; unanswerable ones are counted."""
    answers = [{"text": "Rosvik", "answer_start": 0}, {"text": "The Rosvik", "answer_start": 0}]
    asked = {"id": "s1", "question": "Where?", "answers": answers}
    none = {"id": "s2", "question": "Why?", "answers": [], "plausible_answers": answers, "is_impossible": True}
    context = SQUAD_HUB_ROW["context"]
    for version, qas, indent in (("1.1", [asked], None), ("v2.0", [asked | {"is_impossible": False}, none], 1)):
        data = [{"title": "Rosvik", "paragraphs": [{"context": context, "qas": qas}]}]
        file = {"data": data, "version": version} if version == "1.1" else {"version": version, "data": data}
        (tmp_path / f"{version}.json").write_text(json.dumps(file, indent=indent))
    write_jsonl(tmp_path / "hub.jsonl", [SQUAD_HUB_ROW, SQUAD_HUB_ROW | {"id": "s3", "answers": {"text": []}}])
    for name, unanswerable in (("1.1.json", 0), ("v2.0.json", 1), ("hub.jsonl", 1)):
        (question,), counts = run(tmp_path / "out", Path("-"), input=str(tmp_path / name), input_format=form)
        assert question == {
            "id": "s1", "question": "Where?", "answers": ["Rosvik", "The Rosvik"], "hops": None,
            "evidence": [{"title": "Rosvik", "text": context}], "distractors": [],
        }  # fmt: skip
        assert counts["unanswerable"] == unanswerable and counts["lines"] == 1 + unanswerable


@pytest.mark.parametrize("id_key", ["qid", "key"])
def test_squad_as_mrqa_has_it(tmp_path, id_key):
    """Take Natural Questions and others from the hub's copies of MRQA: answers are texts, and marks are in the text."""
    text = '<P> Rosvik is a town , x < Y .\n\nOdd . </P> [PAR] <Table> <Tr> <Th_colspan="2"> Harbour </Th> </Tr>'
    text += " </Table> [DOC] [TLE] It <b>"
    row = SQUAD_HUB_ROW | {"context": text, "answers": ["Rosvik"], "labels": [{"start": [4], "end": [9]}]}
    row = {key: value for key, value in row.items() if key not in ("id", "title")} | {id_key: "8a2f"}
    (question,), _ = run(tmp_path, [row])
    assert question == {
        "id": "8a2f", "question": "Where?", "answers": ["Rosvik"], "hops": None, "distractors": [],
        "evidence": [{"title": "", "text": "Rosvik is a town , x < Y .\n\nOdd . Harbour It <b>"}],
    }  # fmt: skip
    (question,), _ = run(tmp_path / "squad", [SQUAD_HUB_ROW | {"context": text}])
    assert question["evidence"][0]["text"] == text  # SQuAD has no such marks


def test_bad_squad_files(tmp_path):
    """A bad article or question is skipped with its place; a file that is cut off is an error."""
    good = {"id": "s1", "question": "Where?", "answers": [{"text": "x"}]}
    parts = [{"context": "x y", "qas": [good, good | {"id": None}]}, {"context": " ", "qas": [good | {"id": "b"}]}]
    text = json.dumps(
        {"version": "v2.0", "data": ["no", {"title": "A"}, {"title": "B", "paragraphs": parts}]}, indent=0
    )
    path = tmp_path / "s.json"
    path.write_text(text)
    questions, counts = run(tmp_path / "out", Path("-"), input=str(path), skip_bad=True)
    assert [q["id"] for q in questions] == ["s1"] and counts["bad"] == 4 and counts["lines"] == 5
    for cut, message in ((1, "does not end"), (3, "does not end"), (len(text) // 2, "does not end")):
        path.write_text(text[:-cut])
        with pytest.raises(DataError, match=rf"^{path}:\d+: .*{message}"):
            run(tmp_path / "out", Path("-"), input=str(path), skip_bad=True)


def squad_file(**keys) -> dict:
    """Two articles; a question each, and one without an answer."""
    said = [{"text": "Rosvik", "answer_start": 0}, {"text": "The Rosvik", "answer_start": 0}]
    asked = [{"id": "s1", "question": "Where?", "answers": said, "is_impossible": False}]
    none = [{"id": "s2", "question": "Why?", "answers": [], "plausible_answers": said, "is_impossible": True}]
    context = SQUAD_HUB_ROW["context"]
    return keys | {"data": [
        {"title": "Rosvik_town", "paragraphs": [{"context": context, "qas": asked + none}]},
        {"title": "Karvik", "paragraphs": [
            {"context": "Karvik is not.", "qas": [asked[0] | {"id": 3, "answers": said[:1]}]}
        ]},
    ]}  # fmt: skip


FLAT = [
    SQUAD_HUB_ROW | {"title": "Rosvik_town"}, SQUAD_HUB_ROW | {"id": "s2", "answers": {"text": []}},
    {"context": "Karvik is not.", "title": "Karvik", "id": 3, "question": "Where?", "answers": [{"text": "Rosvik"}]},
]  # fmt: skip
SQUADS = {
    "v2.0": squad_file(version="v2.0"), "1.1": squad_file() | {"version": "1.1"}, "a number": squad_file(version=2.0),
    "a whole number": squad_file() | {"version": 1}, "null": squad_file(version=None), "no version": squad_file(),
    "other keys": squad_file(version="x", creator={"name": "y"}, tags=["a", "b"], size=3),
    "articles": squad_file()["data"], "flat rows": FLAT, "flat rows in data": {"version": "1", "data": FLAT},
    "another key": {"examples": squad_file()["data"]},
}  # fmt: skip


@pytest.mark.parametrize("form", ["auto", "squad"])
@pytest.mark.parametrize("case", SQUADS)
def test_squad_as_it_is_found(tmp_path, case, form):
    """Whatever the version is and wherever it stands, on one line or on many, also packed and by line."""
    value = SQUADS[case]
    texts = [json.dumps(value), json.dumps(value, indent=2), "\ufeff" + json.dumps(value, indent=1)]
    texts[2] = texts[2].replace("\n", "\r\n")
    texts += ["\n".join(map(json.dumps, value))] if isinstance(value, list) else []
    for k, text in enumerate(texts * 2):
        path = tmp_path / ("dev-v2.0.json" if k % 2 else "dev, v2.0.JSONL.gz")
        path.write_bytes(text.encode() if k < len(texts) else gzip.compress(text.encode()))
        questions, counts = run(tmp_path / "out", Path("-"), input=str(path), input_format=form)
        assert [(q["id"], q["answers"]) for q in questions] == [("s1", ["Rosvik", "The Rosvik"]), ("3", ["Rosvik"])]
        assert questions[0]["evidence"] == [{"title": "Rosvik town", "text": SQUAD_HUB_ROW["context"]}]
        assert (counts["lines"], counts["unanswerable"], counts["bad"]) == (3, 1, 0)


def test_paragraphs_like_musiques_with_a_plain_text(tmp_path):
    """`text` in place of `paragraph_text`, in all of them or in some; before, distractors of that kind were lost."""
    renamed = [{"text" if k == "paragraph_text" else k: v for k, v in p.items()} for p in MUSIQUE_ROW["paragraphs"]]
    for paragraphs in (renamed, [MUSIQUE_ROW["paragraphs"][0], renamed[1]]):
        (question,), _ = run(tmp_path, [MUSIQUE_ROW | {"paragraphs": paragraphs}])
        assert [p["text"] for p in question["evidence"] + question["distractors"]] == [
            "Rosvik is a town. It has a harbour.", "Karvik is not."
        ]  # fmt: skip


def test_pairs_as_objects(tmp_path):
    """HotpotQA's and 2WikiMultihopQA's pairs as some copies have them."""
    row = HOTPOT_ROW | {
        "context": [{"title": t, "sentences": s} for t, s in PARAGRAPHS],
        "supporting_facts": [{"sent_id": 0, "title": "Rosvik"}],
    }
    assert run(tmp_path, [row])[0] == run(tmp_path, [HOTPOT_ROW])[0]


def test_plain_rows_and_documents(tmp_path):
    """Paragraphs as texts, as objects, and as ids of documents; texts stay as they are to the last space."""
    documents = [{"id": "d1", "title": "A\n title", "text": " Document one. \n"}, {"text": "Document two."}]
    write_jsonl(tmp_path / "corpus.in", documents)
    row = PLAIN_ROW | {
        "answers": ["Rosvik", "rosvik town"], "hops": 3, "evidence": [{"id": "d1"}, " A text.", {"text": "a TEXT"}],
        "distractors": [{"title": "T", "text": "Other."}, "A text!", "Other"],
    }  # fmt: skip
    (question,), counts = run(tmp_path, [row], corpus=str(tmp_path / "corpus.in"))
    assert question == {
        "id": "7", "question": "Where?", "answers": ["Rosvik", "rosvik town"], "hops": 3,
        "evidence": [{"title": "A title", "text": " Document one. \n"}, {"title": "", "text": " A text."}],
        "distractors": [{"title": "T", "text": "Other."}],
    }  # fmt: skip
    assert counts["corpus"] == 2 and len(list(read_jsonl(tmp_path / "corpus.jsonl"))) == 2


def test_lists_folders_and_several_inputs(tmp_path):
    """HotpotQA's file is one JSON list; folders and parquet go through the library that also reads the hub."""
    from datasets import Dataset

    (tmp_path / "list.json").write_text("\ufeff[" + ",\n ".join(json.dumps(r) for r in (HOTPOT_ROW, PLAIN_ROW)) + "]\n")
    (tmp_path / "hub").mkdir()
    Dataset.from_list([HUB_ROW]).to_parquet(str(tmp_path / "hub" / "train-0.parquet"))
    write_jsonl(tmp_path / "rows.jsonl", [MUSIQUE_ROW, MUSIQUE_ROW, MUSIQUE_ROW | {"id": "u", "answerable": False}])
    names = ["list.json", "hub", "rows.jsonl", "hub/train-0.parquet"]
    questions, counts = run(tmp_path, tmp_path / "none", input=", ".join(str(tmp_path / name) for name in names))
    assert [q["id"] for q in questions] == ["h1", "7", "h2", "2hop__1_2"]
    assert (counts["lines"], counts["same_id"], counts["unanswerable"]) == (7, 2, 1)


def test_files_of_a_folder_that_are_not_read_are_named_and_a_changed_folder_is_another(tmp_path, caplog):
    """The library takes files for a split by their names; none is left out without a word."""
    folder = tmp_path / "folder"
    write_jsonl(folder / "musique_train.jsonl", [MUSIQUE_ROW])
    assert len(run(tmp_path, folder)[0]) == 1 and "not read" not in caplog.text
    before = outside_inputs(recipe(tmp_path, "none", folder), "read")
    write_jsonl(folder / "own.jsonl", [PLAIN_ROW])
    assert len(run(tmp_path, folder)[0]) == 1
    assert f"`input: {folder}`: own.jsonl not read: by their names other files are the split 'train'" in caplog.text
    added = outside_inputs(recipe(tmp_path, "none", folder), "read")
    write_jsonl(folder / "own.jsonl", [PLAIN_ROW | {"question": "Another?"}])
    changed = outside_inputs(recipe(tmp_path, "none", folder), "read")
    assert list(before) == list(changed) == [str(folder)]
    assert len({str(found) for found in (before, added, changed)}) == 3


@pytest.mark.skipif(not MUSIQUE.exists(), reason=f"no MuSiQue sample at {MUSIQUE}; set SOLOPO_SHARED_DATA")
def test_real_questions(tmp_path):
    questions, counts = run(tmp_path, MUSIQUE, input=f"{MUSIQUE},{HOTPOTQA}")
    assert counts["questions"] == 190 and counts["bad"] == 0
    for line, question in zip(MUSIQUE.read_text().splitlines(), questions, strict=False):
        row = json.loads(line)
        texts = [p["paragraph_text"] for p in row["paragraphs"] if p["is_supporting"]]
        assert [p["text"] for p in question["evidence"]] == texts
        assert question["answers"][0] == row["answer"] and question["hops"] == int(row["id"][0]) == len(texts)


def test_a_choice_of_questions(tmp_path):
    """`max_questions` takes the same ones whatever their order, and the others' paragraphs stay distractors."""
    rows = make_questions(30)
    other, again, few = ({q["id"] for q in run(tmp_path, order, max_questions=5, seed=seed)[0]}
                         for order, seed in ((rows, 1), (rows[::-1], 2), (rows, 2)))  # fmt: skip
    assert len(few) == 5 and few == again != other
    pool = {p["text"] for p in read_jsonl(tmp_path / "corpus.jsonl")}
    assert len(pool) == sum(len(r["evidence"] + r["distractors"]) for r in rows if r["id"] not in few)


# ---- what is wrong is said


BAD = {
    "not json": ('{"id": 1,', "questions.jsonl:2: not a line of JSON (Expecting property name"),
    "not an object": ("[1]", "questions.jsonl:2: a line must be a JSON object, got list [1]."),
    "not unicode": ('{"id": "\\ud800"}', "not a line of JSON (the text holds half a surrogate pair)"),
    "no known keys": ('{"a": 1}', "questions.jsonl:2: the format of the row cannot be told from its keys (a);"),
    "no question": (PLAIN_ROW | {"question": " "}, "questions.jsonl:2: `question` must be a text, got str ' '."),
    "no id": (PLAIN_ROW | {"id": None}, "`id` must be a text or a whole number, got NoneType None."),
    "no answer": (PLAIN_ROW | {"answers": []}, "`answers` must be a text or a list of texts, got list []."),
    "nothing of an answer": (PLAIN_ROW | {"answers": ["the", "!"]}, "there is no usable answer in list ['the', '!']."),
    "no evidence": (PLAIN_ROW | {"evidence": []}, "the question has no evidence."),
    "empty evidence": (PLAIN_ROW | {"evidence": [""]}, "`text` of a paragraph must be a text that is not empty, got"),
    "unknown document": (PLAIN_ROW | {"evidence": [{"id": "d9"}]}, "`corpus` has no document with the id str 'd9'."),
    "hops": (PLAIN_ROW | {"hops": "2"}, "`hops` must be a whole number or null, got str '2'."),
    "musique": (MUSIQUE_ROW | {"paragraphs": [{}]}, "must hold objects with `is_supporting`, got dict {}."),
    "hotpot": (HOTPOT_ROW | {"supporting_facts": [["Ulmen", 0]]}, "names str 'Ulmen', which is not in `context`."),
    "context": (HOTPOT_ROW | {"context": "{"}, "`context` is a text that is no JSON: str '{'."),
    "answerable": (MUSIQUE_ROW | {"answerable": "false"}, "`answerable` must be true or false, got str 'false'."),
    "impossible": (SQUAD_HUB_ROW | {"is_impossible": 1}, "`is_impossible` must be true or false, got int 1."),
    "another text": (
        MUSIQUE_ROW | {"paragraphs": [{"body": "b", "is_supporting": False}]},
        "`paragraph_text` of each of `paragraphs` must be a text, and is missing (there is body, is_supporting).",
    ),
    "retrieved": (
        {"id": 1, "question": "?", "golden_answers": ["x"], "ctxs": [{"text": "y"}]},
        "from its keys (id, question, golden_answers, ctxs); musique has `paragraphs`, hotpotqa and 2wikimultihopqa "
        "`supporting_facts`, squad `context` and `answers`, plain `evidence`, retrieval `passages`; nearest: "
        "`ctxs` to `context`, `golden_answers` to `answers`.",
    ),
    "golden answers": (
        {"id": 1, "question": "?", "golden_answers": ["x"], "evidence": ["y"]},
        "`answers` must be a text or a list of texts, and is missing (there is id, question, golden_answers, evidence; "
        "nearest is `golden_answers`).",
    ),
    "one answer": (
        {"id": 1, "question": "?", "answer": "x", "evidence": ["y"]},
        "(there is id, question, answer, evidence; nearest is `answer`).",
    ),
    "query": (
        {"id": 1, "query": "?", "answers": "x", "evidence": ["y"]},
        "`question` must be a text, and is missing (there is id, query, answers, evidence",
    ),
    "qid": (
        {"qid": 1, "question": "?", "answers": "x", "evidence": ["y"]},
        "`id` must be a text or a whole number, and is missing (there is qid, question, answers, evidence; nearest",
    ),
    "contents": (
        PLAIN_ROW | {"evidence": [{"id": "d9", "contents": "x"}]},
        "a paragraph must be a text that is not empty, and is missing (there is id, contents; nearest is `contents`).",
    ),
    "spoken": (
        SQUAD_HUB_ROW | {"answers": [{"answer": "x"}]},
        "`text` must be a text or a list of texts, and is missing (there is answer).",
    ),
    "passage": (
        {"id": 1, "question": "?", "passage": "x", "answers": ["y"]}, "from its keys (id, question, passage, answers);"
    ),
    "no context": (
        {"_id": 1, "question": "?", "answer": "x", "supporting_facts": [["a", 0]], "contexts": []},
        "`context` must be a list of pairs that begin with a title, and is missing (there is _id, question, answer, "
        "supporting_facts, contexts; nearest is `contexts`).",
    ),
    "many keys": (dict.fromkeys("abcdefghijklmno"), "from its keys (a, b, c, d, e, f, g, h, i, j, ...);"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_lines(tmp_path, case):
    """One sentence that names file, line and value; or, with `skip_bad`, a count and the good lines."""
    bad, message = BAD[case]
    bad = bad if isinstance(bad, str) else json.dumps(bad)
    source = tmp_path / "questions.jsonl"
    good = [json.dumps(PLAIN_ROW | {"id": i}) for i in (1, 2)]
    source.write_text("\n".join([good[0], bad, good[1]]))
    with pytest.raises(DataError) as error:
        run(tmp_path / "out", source)
    assert message in str(error.value) and f"{source}:2" in str(error.value)
    assert str(error.value).endswith("Correct the line, or set `skip_bad: true`.") and "\n" not in str(error.value)
    questions, counts = run(tmp_path / "out", source, skip_bad=True)
    assert [q["id"] for q in questions] == ["1", "2"] and counts["bad"] == 1


def test_bad_files(tmp_path):
    (tmp_path / "a.json").write_text('[{"id": 1},\n {"id" 1}]')
    (tmp_path / "b.json").write_text('[{"id": 1}')
    (tmp_path / "c.jsonl").write_text("")
    (tmp_path / "d.json").write_bytes(b'["\xff"]')
    for name, message in {
        "a.json": "a.json:2: not JSON (parse error: object key and value must be separated by a colon (':')):",
        "b.json": "b.json:1: the JSON does not end; is the file complete?", "c.jsonl": "has no usable question",
        "d.json": "d.json:1: not JSON (lexical error: invalid bytes in UTF8 string)", "e.jsonl": "there is no file",
        "no/such/thing": "there is no file", "http://me:hunter2@h/x.jsonl": "`input`: there is no file http://h/x.jsonl",
        "no/hub": "cannot be loaded (subset None, split 'train')",
    }.items():  # fmt: skip
        source = name if name.startswith(("no/", "http")) else str(tmp_path / name)
        with pytest.raises(DataError, match=r"^[^\n]+$") as error:
            run(tmp_path, tmp_path / "none", input=source, skip_bad=True)
        assert message in str(error.value)


@pytest.mark.parametrize("place, advice", [
    ("org/questions", "; without a network give the path of its files, copied here."), (".", "."),
])  # fmt: skip
def test_a_long_reason_of_the_library_is_cut_at_a_word(place, advice, monkeypatch):
    from solopo_plugin.qa.sources import _library_rows

    def fail(*_):
        raise ConnectionError("word \n" * 100)

    monkeypatch.setattr("datasets.load_dataset_builder", fail)
    with pytest.raises(DataError) as error:
        [*_library_rows(place, place, "input", None, "train")]
    reason = "ConnectionError " + "word " * 59 + "..."
    assert str(error.value) == f"`input: {place}` cannot be loaded (subset None, split 'train'): {reason}{advice}"


def test_a_column_of_documents_is_checked(tmp_path):
    (tmp_path / "corpus.in").write_text('{"id": 1, "text": "x"}\n{"id": 1, "text": "y"}\n{"text": 5}\n')
    with pytest.raises(DataError, match=r"corpus.in:2: two documents have the id '1'\. Correct the line"):
        run(tmp_path, [PLAIN_ROW], corpus=str(tmp_path / "corpus.in"))
    _, counts = run(tmp_path, [PLAIN_ROW], corpus=str(tmp_path / "corpus.in"), skip_bad=True)
    assert counts["corpus"] == 1 and counts["bad_documents"] == 2


def test_what_one_row_has_and_another_has_not_is_null_in_parquet(tmp_path):
    """Paragraphs by id beside such with a text, and rows of several formats, in one file."""
    from datasets import Dataset

    documents = [{"id": "d1", "title": "T", "text": "Rosvik is far."}, {"text": "No id."}]
    write_jsonl(tmp_path / "corpus.in", documents)
    evidence = [{"id": "d1"}, {"title": "B", "text": "Rosvik is a town."}]
    musique = {key: value for key, value in MUSIQUE_ROW.items() if key != "question_decomposition"}
    plain = {"question": "Where?", "answers": ["Rosvik"], "evidence": evidence}
    retrieved = {"question": "Who?", "answer": "x", "passages": ["x y", "z"]}
    rows = [plain | {"id": "p"}, plain | {"_id": "b"}, musique, retrieved]
    columns = dict.fromkeys(key for row in rows for key in row)
    Dataset.from_list([columns | row for row in rows]).to_parquet(str(tmp_path / "rows.parquet"))
    keys = dict(corpus=str(tmp_path / "corpus.in"))
    questions, counts = run(tmp_path, tmp_path, input=str(tmp_path / "rows.parquet"), **keys)
    Dataset.from_list(documents).to_parquet(str(tmp_path / "corpus.parquet"))
    packed = dict(input=str(tmp_path / "rows.parquet"), corpus=str(tmp_path / "corpus.parquet"))
    assert run(tmp_path, tmp_path, **packed) == (questions, counts)
    assert questions == run(tmp_path, rows, **keys)[0] and len(questions) == 4


def test_documents_in_another_file_than_json_lines(tmp_path):
    """Packed, as a list, in an object; BEIR's `_id` names a document as `id` does."""
    documents = [{"_id": id, "title": id, "text": f"Document {id}."} for id in ("d1", "d2")]
    row = PLAIN_ROW | {"evidence": [{"id": "d1"}], "distractors": [{"id": "d2"}]}
    for content in (
        gzip.compress("\n".join(map(json.dumps, documents)).encode()), json.dumps(documents, indent=1).encode(),
        json.dumps({"docs": documents}).encode(),
    ):  # fmt: skip
        (tmp_path / "docs, all.json").write_bytes(content)
        (question,), counts = run(tmp_path, [row], corpus=str(tmp_path / "docs, all.json"))
        assert question["evidence"] == [{"title": "d1", "text": "Document d1."}] and counts["corpus"] == 2
        assert question["distractors"] == [{"title": "d2", "text": "Document d2."}]
    with pytest.raises(DataError, match=r"^Cannot read none\.jsonl: there is no such file"):
        run(tmp_path, [row], corpus="none.jsonl")


def test_files_with_commas_in_their_names(tmp_path):
    """Each is read, and known by its hash, alone and beside others."""
    for name, id in (("a,b.jsonl", 1), ("c.jsonl", 2), ("c.jsonl,d", 3)):
        write_jsonl(tmp_path / name, [PLAIN_ROW | {"id": id}])
    for ids in (["1"], ["2", "1"], ["1", "3"]):
        names = [{"1": "a,b.jsonl", "2": "c.jsonl", "3": "c.jsonl,d"}[id] for id in ids]
        paths = [str(tmp_path / name) for name in names]
        made = recipe(tmp_path, "none", Path("-"), input=", ".join(paths))
        assert read.run(made, tmp_path)["questions"] == len(ids) and list(outside_inputs(made, "read")) == paths
        assert [q["id"] for q in read_jsonl(tmp_path / "questions.jsonl")] == ids


def mangle(row: object, rng: random.Random) -> object:
    """A row with a value somewhere in it replaced by another thing."""
    things = [None, True, 0, -1.5, "", " ", "the", [], {}, [[]], [None], ["x"], {"title": 3}, "\u2028", "x" * 500]
    if isinstance(row, dict) and row and rng.random() < 0.9:
        key = rng.choice(list(row))
        return {**row, key: mangle(row[key], rng)}
    if isinstance(row, list) and row and rng.random() < 0.8:
        index = rng.randrange(len(row))
        return row[:index] + [mangle(row[index], rng)] + row[index + 1 :]
    return rng.choice(things)


@pytest.mark.slow
def test_ten_thousand_random_lines(tmp_path):
    """Whatever a line holds, it is a question or it is counted, and what is counted has a message of one line."""
    rng = random.Random(4)
    rows = [
        MUSIQUE_ROW,
        HOTPOT_ROW,
        HUB_ROW,
        WIKI_ROW,
        SQUAD_HUB_ROW,
        PLAIN_ROW | {"distractors": ["a", {"text": "b"}]},
    ]
    lines = []
    for index in range(10_000):
        row = dict(rng.choice(rows))
        row["_id" if "_id" in row else "id"] = f"n{index}"
        for _ in range(rng.randint(0, 2)):
            row = mangle(row, rng)
        line = json.dumps(row, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        if rng.random() < 0.2:
            at = rng.randrange(len(line))
            line = line[:at] + rng.randbytes(rng.randint(0, 3)).replace(b"\n", b"") + line[at + rng.randint(0, 4) :]
        lines.append(line)
    source = tmp_path / "random.jsonl"
    source.write_bytes(b"\n".join(lines))
    questions, counts = run(tmp_path, source, skip_bad=True)
    assert counts["lines"] == sum(bool(line.strip()) for line in lines) > 9_900
    assert counts["bad"] + counts["unanswerable"] + counts["same_id"] + len(questions) == counts["lines"]
    assert 2_000 < len(questions) < 8_000
    messages = Counter()
    for index, line in enumerate(lines[:2_000]):
        single = tmp_path / "single.jsonl"
        single.write_bytes(line)
        try:
            run(tmp_path, single)
        except DataError as error:
            assert "\n" not in str(error) and len(str(error)) < 700, index
            messages[str(error).split("jsonl:1")[-1][:24]] += 1
    assert len(messages) > 20


# ---- what holds for every question


texts = st.text(max_size=20)
paragraphs = st.lists(st.one_of(texts, st.fixed_dictionaries({"title": texts, "text": texts})), max_size=4)


@FUZZ
@given(texts, st.lists(texts, max_size=3), paragraphs, paragraphs)
def test_whatever_is_read_is_usable(question, answers, evidence, distractors):
    """A row is refused, or it has a question, answers of which something is left, and no paragraph twice."""
    row = {"id": 1, "question": question, "answers": answers, "evidence": evidence, "distractors": distractors}
    try:
        made = parse_row(row, "auto", {})
    except DataError:
        return
    assert made["question"] and made["answers"] and all(map(normalize_answer, made["answers"])) and made["evidence"]
    shown = [p["text"] for p in made["evidence"]]
    given_texts = [p if isinstance(p, str) else p["text"] for p in evidence]
    assert set(shown) <= set(given_texts)
    forms = [normalize_answer(p["text"]) for p in made["evidence"] + made["distractors"]]
    assert len(forms) == len(set(forms)) and {normalize_answer(t) for t in given_texts} == {*forms[: len(shown)]}
    assert all(p["text"].strip() and "\n" not in p["title"] for p in made["evidence"] + made["distractors"])


# ---- files


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full, the device that is always full")
def test_a_full_disk(tmp_path):
    """One sentence; what stood there stays, and nothing is left behind."""
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"a": 1}])
    (tmp_path / "rows.jsonl.tmp").symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"^Cannot write \S+rows.jsonl: the disk is full .* free some space"):
        write_jsonl(path, ({"a": i} for i in range(10_000)))
    assert list(read_jsonl(path)) == [{"a": 1}] and os.listdir(tmp_path) == ["rows.jsonl"]


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    def rows():
        yield {"a": 2}
        raise KeyError("b")

    write_json(tmp_path / "x.json", [1])
    with pytest.raises(KeyError):
        write_jsonl(tmp_path / "x.json", rows())
    assert json.loads((tmp_path / "x.json").read_text()) == [1] and os.listdir(tmp_path) == ["x.json"]


# ---- recipes


def test_recipes_are_checked(tmp_path, caplog):
    base = dict(model_name_or_path="m", template="qwen", input="i", dataset_name="d", work_dir="w")
    for keys, message in {
        (
            "num_row",
            3,
        ): "Unknown key `num_row` in the data recipe. Did you mean `num_rows`? Allowed: model_name_or_path",
        ("num_rows", 0): "`num_rows` must be a whole number > 0, got 0.",
        ("num_rows", 2.5): "`num_rows` must be a whole number > 0, got 2.5.",
        ("num_rows", 5.0): "`num_rows` must be a whole number > 0, got 5.0.",  # nothing is taken for what it is not
        ("num_rows", "1"): "`num_rows` must be a whole number > 0, got '1'.",
        ("num_rows", True): "`num_rows` must be a whole number > 0, got True.",
        ("temperature", "1"): "`temperature` must be a number >= 0, got '1'.",
        ("seed", 2**63): "`seed` must be a whole number from 0 to 9223372036854775807, got 9223372036854775808.",
        ("temperature", -1): "`temperature` must be a number >= 0, got -1.",
        ("temperature", float("nan")): "`temperature` must be a number >= 0, got nan.",
        ("top_p", 2): "`top_p` must be a number from 1e-06 to 1, got 2.",
        ("lossy_short", 1.1): "`lossy_short` must be a number from 0 to 1, got 1.1.",
        ("skip_bad", 1): "`skip_bad` must be true or false, got 1.",
        ("distractors", "near"): "`distractors` must be one of random, bm25; got 'near'.",
        ("input", 3): "`input` must be a text, got 3; put it in quotes.",
        ("dataset_name", 2024): "`dataset_name` must be a text, got 2024; put it in quotes. In a shell, which takes "
        """quotes away: 'dataset_name="2024"'.""",
        (
            "backend",
            "http://me:hunter2@h/v1",
        ): "`backend` must be one of vllm, openai, transformers; got 'http://h/v1'.",
        ("dataset_name", "http://me:hunter2@h"): "`dataset_name` begins names of files",
        ("ask_prompts", "http://me:hunter2@h"): "`ask_prompts: http://h` is no folder",
        ("seed", "http://me:hunter2@h"): "`seed` must be a whole number from 0 to 9223372036854775807, got 'http://h'.",
        ("work_dir", " "): "The data recipe lacks `work_dir`: Folder of intermediate files",
        ("short_tokens", 9000): "`short_tokens: 9000` must be below `long_tokens: 8192`;",
        ("val_size", 1.5): "`val_size` must be a share below 1 or a whole number of rows, got 1.5.",
        ("dataset_name", "../x"): "`dataset_name` begins names of files in `dataset_dir`, and of entries that `data",
    }.items():
        with pytest.raises(DataError) as error:
            make_recipe(base | dict([keys]))
        assert str(error.value).startswith(message) and "hunter2" not in str(error.value)
    for cutoff_len, warned in ((9216, False), (9215, True), (4096, True)):
        make_recipe(base | {"cutoff_len": cutoff_len})
        said = f"`cutoff_len: {cutoff_len}` is below `long_tokens: 8192` + `max_new_tokens: 1024`: answers that do not"
        assert (said in caplog.text) == warned
    path = tmp_path / "recipe.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in base.items()))
    made = load_recipe(str(path), ["num_rows=7", "temperature=1", "corpus=null", "api_key_env=KEY"])
    assert (made.num_rows, made.temperature, made.corpus, made.api_key_env) == (7, 1.0, None, "KEY")
    assert isinstance(made.temperature, float)
    assert load_recipe(str(path), ['dataset_name="2024"']).dataset_name == "2024"
    for words, message in {
        ("x",): "`x` is no `key=value`", ("num_rows=a",): "`num_rows` must be a whole number > 0, got 'a'.",
        ("seed=2", "input={a"): "`seed=2`, `input={a` cannot be put into the recipe: ",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=message):
            load_recipe(str(path), list(words))
    for text, message in {
        "a: b: c": "the recipe is no YAML",
        "- 1": "the recipe is no YAML|a recipe is a list",
    }.items():
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            load_recipe(str(path))
    with pytest.raises(DataError, match="Cannot read the recipe"):
        load_recipe(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("name", ["../x", "a/b", "/x", "/", "..\\x", "a,b", "a\nb", "a\0b", " a", "a ", "\t"])
def test_a_data_sets_name_stays_in_its_folder(name):
    """Nor does it part where a training recipe lists names with commas."""
    base = dict(model_name_or_path="m", template="qwen", input="i", work_dir="w")
    with pytest.raises(DataError, match="dataset_name") as error:
        make_recipe(base | {"dataset_name": name})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["..", ".x", "a b", "a.b-c_d=e+f", "\u00c5se", "x:y"])
def test_other_names_of_data_sets_are_taken(name):
    base = dict(model_name_or_path="m", template="qwen", input="i", work_dir="w")
    assert make_recipe(base | {"dataset_name": name}).dataset_name == name


DATA_RECIPES = sorted((ROOT / "examples/yaml/data").glob("*.yaml"))


def test_shipped_recipes():
    """Each loads, says where its numbers come from, and fits the training recipes that use its rows."""
    paper = {"num_samples": 32, "temperature": 0.85, "short_tokens": 1024}
    assert len(DATA_RECIPES) == 2 + 3
    for path in DATA_RECIPES:
        text, made = path.read_text(encoding="utf-8"), load_recipe(str(path))
        assert f"build_data.py {path.relative_to(ROOT)}\n" in text and "Hardware:" in text
        assert made.cutoff_len >= made.long_tokens + made.max_new_tokens
        if path.stem in ("tiny", "documents", "lab_two_hop"):  # of the latter also tests/lab
            continue
        values = yaml.safe_load(text)
        assert values["num_rows"] - values["val_size"] == 5000  # the paper's, to train on
        for key, value in paper.items():
            assert values[key] == value and f"{key}: {value}  # paper" in text
        numbers = [line for line in text.splitlines() if re.match(r"\w+: -?[\d.]+\b", line)]
        assert len(numbers) == 11 and all(re.search(r"  # (paper|ours)", line) for line in numbers)
        training = yaml.safe_load((ROOT / f"examples/yaml/{path.stem}/solo_orpo.yaml").read_text())
        for key in ("model_name_or_path", "template", "dataset_dir"):
            assert values[key] == training[key]
        assert values["dataset_name"] == training["dataset"].removesuffix("_solopo")
        assert values["cutoff_len"] == training["cutoff_len"]
        assert values["long_tokens"] == 8192


def test_longer_contexts_are_overrides_of_the_shipped_recipes():
    """The rows of examples/yaml/README.md, read as the command line reads them."""
    longer = [run for run in runs() if run.recipe.startswith("data/")]
    for run, size in zip(longer, (16, 32, 64, 16, 32, 128), strict=True):
        path = ROOT / "examples/yaml" / run.recipe
        before, made = load_recipe(str(path)), load_recipe(str(path), run.overrides)
        changed = {key for key in FIELDS if getattr(made, key) != getattr(before, key)}
        shared = {"long_tokens", "cutoff_len", "dataset_name", "work_dir"}
        assert changed - shared == {64: {"model_name_or_path", "sample_long"}, 128: {"sample_long"}}.get(size, set())
        assert changed >= shared
        if size >= 64:  # the rows of long/; the window is full: the longest prompt and the longest answer
            training = yaml.safe_load((ROOT / f"examples/yaml/long/{path.stem}_{size}k.yaml").read_text())
            for key in ("model_name_or_path", "template", "dataset_dir", "cutoff_len"):
                assert getattr(made, key) == training[key]
            assert made.dataset_name == training["dataset"].removesuffix("_solopo") and not made.sample_long
            assert made.long_tokens + made.max_new_tokens == made.cutoff_len == 1024 * size
        assert 1024 * (size - 1) <= made.long_tokens <= 1024 * size and f" {size}K tokens" in run.what
        assert made.cutoff_len >= made.long_tokens + made.max_new_tokens
        assert made.dataset_name == f"{before.dataset_name}_{size}k"
        assert made.work_dir == f"saves/data/{made.dataset_name}" and run.numbers.startswith("ours")
    assert [run.recipe for run in longer] == 3 * ["data/qwen2.5-7b.yaml"] + 3 * ["data/llama3.1-8b.yaml"]


def test_the_shipped_questions_are_as_generated(tmp_path):
    """And each can be answered from its two passages alone."""
    from make_demo_data import make_question

    shipped = list(read_jsonl(ROOT / "data" / "demo_questions.jsonl"))
    assert shipped == [make_question(i) for i in range(40)]
    questions, counts = run(tmp_path, ROOT / "data" / "demo_questions.jsonl")
    assert len(questions) == 40 and counts["bad"] == 0
    for question in questions:
        asked, partner = (p["title"] for p in question["evidence"])
        assert asked in question["question"] and partner in question["evidence"][0]["text"]
        assert question["answers"][0] in question["evidence"][1]["text"]
        assert not any(question["answers"][0] in p["text"] for p in question["distractors"])


def test_the_documented_keys_are_those_of_the_recipe():
    """docs/data.md lists each key with its default, its stages and its help, in the order of the definition."""
    lines = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").splitlines()
    start = lines.index("| key | default | stages | meaning |") + 2
    for line, (name, spec) in zip(lines[start:], FIELDS.items(), strict=False):
        default = "" if spec.default is MISSING else f"`{json.dumps(spec.default).strip(chr(34))}`"
        stages = " ".join(spec.metadata["stages"])
        assert line == f"| `{name}` | {default} | {stages} | {spec.metadata['help']} |"
    assert lines[start + len(FIELDS)] == ""


def test_every_key_names_known_stages():
    for name, field in FIELDS.items():
        assert set(field.metadata["stages"]) <= set(TABLE) and len(field.metadata["help"]) > 10, name
