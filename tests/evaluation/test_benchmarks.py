"""Benchmarks: official formats read as published, contexts of the asked length and depth, bad files named."""

import gzip
import json
import logging
import random
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(ROOT / "tests" / "qa"))
import material  # noqa: E402
from material import HOTPOTQA, MUSIQUE, make_questions, paragraph, save_tokenizer  # noqa: E402

from solopo_plugin.evaluation.benchmarks import BENCHMARKS, niah, plain  # noqa: E402
from solopo_plugin.evaluation.items import MAIN_METRIC  # noqa: E402
from solopo_plugin.evaluation.score import source_of  # noqa: E402
from solopo_plugin.host.template import encode_prompt, load_template  # noqa: E402
from solopo_plugin.qa.answers import extract_answer, longbench_v2_choice  # noqa: E402
from solopo_plugin.qa.documents import Question  # noqa: E402
from solopo_plugin.qa.files import DataError, read_jsonl, write_jsonl  # noqa: E402
from solopo_plugin.qa.prompts import PROMPT  # noqa: E402
from solopo_plugin.synthesis import contexts, export, read  # noqa: E402

KEYS = dict(
    prompt=None, prompts="ours", seed=42, max_samples=None, max_input_tokens=31500, max_new_tokens=64,
    longbench_data="", longbench_tasks=["narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique"],
    ruler_data=None, ruler_lengths=[400, 900, 2000], ruler_questions=5, niah_data=None, niah_needles=None,
    niah_lengths=[600, 1500], niah_depths=[0.0, 10.0, 50.0, 100.0], niah_questions=3, longbench_v2_data="",
    plain_data=None, validation_data=None,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def ask(model):
    """Items of a benchmark with these keys of the recipe."""
    chat = load_template(model, "qwen")

    def ask(benchmark: str, **keys) -> list:
        return list(BENCHMARKS[benchmark](SimpleNamespace(**(KEYS | keys)), *chat))

    ask.tokens = lambda prompt: len(encode_prompt(*chat, prompt))
    ask.chat = chat
    return ask


def filled(documents: str, question: str) -> str:
    return PROMPT.replace("{documents}", documents).replace("{question}", question)


# ---- official formats, written by hand after what their authors publish

LONGBENCH_ROW = {
    "input": "Who keeps the lighthouse?", "context": "Passage 1:\nOla keeps it. {question}\n", "answers": ["Ola", "O."],
    "length": 5103, "dataset": "qasper", "language": "en", "all_classes": None, "_id": "9f1c0",
}  # fmt: skip
NIAH_ROW = {
    "id": "n1", "context": "Passage 0:\nOla keeps it.\nPassage 1:\nHay.", "context_length": 1000, "depth_percent": 33,
    "input": "Who keeps it?", "dataset": "needle_squad", "answers": ["Ola"],
}  # fmt: skip
V2_ROW = {
    "_id": "66f2", "domain": "Single-Document QA", "sub_domain": "Detective", "difficulty": "hard", "length": "medium",
    "question": "Who did it?", "choice_A": "Ola", "choice_B": "Per", "choice_C": "Kari", "choice_D": "Nobody",
    "answer": "B", "context": "A long story.\nPer did it.",
}  # fmt: skip


def squad(version: str, *articles: tuple[str, list[tuple[str, list[dict]]]]) -> dict:
    data = [
        {"title": title, "paragraphs": [{"context": c, "qas": qas} for c, qas in paragraphs]}
        for title, paragraphs in articles
    ]
    return {"data": data, "version": version} if version == "1.1" else {"version": version, "data": data}


def asked(id: str, question: str, *answers: str, impossible: bool | None = None) -> dict:
    row = {"id": id, "question": question, "answers": [{"text": a, "answer_start": 0} for a in answers]}
    return row if impossible is None else row | {"is_impossible": impossible}


def squad_of(questions: list[dict]) -> dict:
    """Invented questions as a file of SQuAD 2.0: each has its evidence in one paragraph, distractors are others'."""
    articles = []
    for q in questions:
        evidence = " ".join(p["text"] for p in q["evidence"])
        others = [
            (p["text"], [asked(f"{q['id']}d{k}", f"What is {p['text'][:9]}?", p["text"].split(", ")[1])])
            for k, p in enumerate(q["distractors"])
        ]
        articles.append((q["id"].title(), [(evidence, [asked(q["id"], q["question"], *q["answers"])]), *others]))
    return squad("v2.0", *articles)


def test_every_benchmark_has_a_reader():
    assert set(BENCHMARKS) == set(MAIN_METRIC)


def test_longbench(tmp_path, ask):
    """One file a task; the prompt is the data pipeline's with the context as it stands."""
    (tmp_path / "data").mkdir()
    for place, name, length in (("", "qasper", 5103), ("data", "hotpotqa", 3999), ("", "qasper_e", 8000)):
        write_jsonl(tmp_path / place / f"{name}.jsonl", [LONGBENCH_ROW | {"dataset": name, "length": length}])
    (tmp_path / "qasper_e.jsonl.gz").write_bytes(gzip.compress((tmp_path / "qasper_e.jsonl").read_bytes()))
    (tmp_path / "qasper_e.jsonl").unlink()
    items = ask("longbench_qa", longbench_data=str(tmp_path), longbench_tasks=["qasper", "hotpotqa", "qasper_e"])
    assert [item.key for item in items] == [("longbench_qa", t, "9f1c0") for t in ("qasper", "hotpotqa", "qasper_e")]
    for item, interval in zip(items, ("4-8k", "0-4k", "8k+"), strict=True):
        before, behind = PROMPT.split("{documents}")
        assert item.prompt == before + LONGBENCH_ROW["context"] + behind.replace("{question}", LONGBENCH_ROW["input"])
        assert (item.question, item.answers) == (LONGBENCH_ROW["input"], ["Ola", "O."]) and item.kind == "qa"
        assert item.groups == {"length": interval} and item.length is None and item.max_new_tokens is None
    (own,) = ask(
        "longbench_qa", longbench_data=str(tmp_path), longbench_tasks=["qasper"], prompt="{question}|{documents}"
    )
    assert own.prompt == f"{LONGBENCH_ROW['input']}|{LONGBENCH_ROW['context']}"
    for keys, message in (
        ({}, f"`longbench_data: {tmp_path}` has no narrativeqa.jsonl; unpack LongBench's data.zip there, or take "),
        (
            {"longbench_tasks": ["gov_report"]},
            "`longbench_tasks`: 'gov_report' is none of the question answering tasks",
        ),
        ({"longbench_data": str(tmp_path / "qasper.jsonl")}, "is a file; give the folder in which LongBench's files"),
        ({"longbench_data": "no where"}, "`longbench_data`: there is no file no where, and it is no name of the hub"),
        (
            {"longbench_data": str(tmp_path / "longbench")},
            f"`longbench_data: {tmp_path / 'longbench'}` is not there: unpack LongBench's data.zip into it",
        ),
        ({"longbench_data": "no/where"}, "`longbench_data: no/where` cannot be loaded (subset 'narrativeqa', split"),
    ):
        with pytest.raises(DataError, match=re.escape(message)):
            ask("longbench_qa", **({"longbench_data": str(tmp_path)} | keys))


def test_files_of_niah_plus(tmp_path, ask):
    pair = {k: v for k, v in NIAH_ROW.items() if k != "depth_percent"}
    pair |= {"dataset": "needle_hotpotqa", "context_length": "128000", "depth_percent1": 33, "depth_percent2": 100}
    write_jsonl(tmp_path / "needle, plus_squad.jsonl", [NIAH_ROW, NIAH_ROW | {"depth_percent": 66.5}, NIAH_ROW])
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(json.dumps(pair).encode()))
    for source in (tmp_path, f"{tmp_path}/needle, plus_squad.jsonl, {tmp_path}/pairs.jsonl.gz"):
        items = ask("niah_plus", niah_data=str(source))
        assert [(item.task, item.id, item.length, item.depth) for item in items] == [
            ("needle_squad", "n1/1000/33", 1000, 33.0), ("needle_squad", "n1/1000/66.5", 1000, 66.5),
            ("needle_squad", "n1/1000/33#2", 1000, 33.0), ("needle_hotpotqa", "n1/128000/33+100", 128000, 33.0),
        ]  # fmt: skip
        assert items[0].prompt == filled(NIAH_ROW["context"], "Who keeps it?") and items[0].answers == ["Ola"]
        assert [source_of(item) for item in items].count(source_of(items[0])) == 3
        assert [item.groups for item in items] == [{}, {}, {}, {"depths": "33+100"}]


def test_a_question_of_niah_plus_is_one_whatever_the_ids_of_its_rows(tmp_path, ask):
    rows = [NIAH_ROW | {"id": f"row{i}", "depth_percent": depth} for i, depth in enumerate((0, 50, 100))]
    rows += [NIAH_ROW | {"id": "row3", "answers": ["Per"]}, NIAH_ROW | {"id": "row4", "dataset": "needle_hotpotqa"}]
    write_jsonl(tmp_path / "needle.jsonl", rows)
    first, *others = map(source_of, ask("niah_plus", niah_data=str(tmp_path / "needle.jsonl")))
    assert [other == first for other in others] == [True, True, False, False]


def test_of_gold_answers_those_that_can_be_found_count(tmp_path, ask):
    write_jsonl(tmp_path / "p.jsonl", [{"id": 1, "prompt": "Who?", "answers": ["A", "Ola", "!"]}])
    (item,) = ask("plain", plain_data=str(tmp_path / "p.jsonl"))
    assert item.answers == ["Ola"]
    given = {"answers": ["", "The", "Ola", "!"]}
    write_jsonl(tmp_path / "qasper.jsonl", [LONGBENCH_ROW | given])
    write_jsonl(tmp_path / "n.jsonl", [NIAH_ROW | given])
    write_jsonl(tmp_path / "v.jsonl", [VALIDATION_ROW | given | {"long_prompt": "b", "long_evidence": []}])
    items = ask("longbench_qa", longbench_data=str(tmp_path), longbench_tasks=["qasper"])
    items += ask("niah_plus", niah_data=str(tmp_path / "n.jsonl"))
    items += ask("validation", validation_data=str(tmp_path / "v.jsonl"))
    assert [item.answers for item in items] == [["Ola"]] * 4


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.parquet"])
def test_longbench_v2(tmp_path, ask, name):
    path, data = (
        tmp_path / name,
        [V2_ROW, V2_ROW | {"_id": "2", "difficulty": "easy", "length": "short", "answer": "D"}],
    )
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(data), path)
    else:
        path.write_text(json.dumps(data, indent=2) if path.suffix == ".json" else "\n".join(map(json.dumps, data)))
    first, second = ask("longbench_v2", longbench_v2_data=str(path))
    assert first.key == ("longbench_v2", "all", "66f2") and first.kind == "choice" and first.answers == ["B"]
    assert first.groups == {"difficulty": "hard", "length": "medium"} and second.answers == ["D"]
    assert second.groups == {"difficulty": "easy", "length": "short"} and first.question == "Who did it?"
    assert (
        "\n\nA long story.\nPer did it.\n\nQuestion: Who did it?\n\n(A) Ola\n(B) Per\n(C) Kari\n(D) No" in first.prompt
    )
    wanted = re.search(r"`(The correct answer is \(X\))`", first.prompt).group(1)
    assert [longbench_v2_choice(f"Per. {wanted.replace('X', x)}") for x in "ABCDX"] == [*"ABCD", None]


def test_the_official_prompt_of_longbench_v2(tmp_path, ask):
    """The authors' words, texts stripped; up to the last line it is what lm-evaluation-harness has for them."""
    row = V2_ROW | {"context": " \n A <b>story</b> of $5.\n", "question": " Who? ", "choice_C": "Kari\n"}
    write_jsonl(tmp_path / "d.jsonl", [row])
    (ours,) = ask("longbench_v2", longbench_v2_data=str(tmp_path / "d.jsonl"))
    (made,) = ask("longbench_v2", longbench_v2_data=str(tmp_path / "d.jsonl"), prompts="official")
    assert made.prompt == (
        "Please read the following text and answer the question below.\n\n<text>\nA <b>story</b> of $5.\n</text>\n\n"
        "What is the correct answer to this question: Who?\nChoices:\n(A) Ola\n(B) Per\n(C) Kari\n(D) Nobody\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )
    assert made.max_new_tokens == 128 and ours.max_new_tokens is None  # their pred.py; ours is the recipe's
    same = ("key", "question", "answers", "kind", "groups")
    assert [getattr(made, name) for name in same] == [getattr(ours, name) for name in same]
    harness = Path(find_spec("lm_eval").origin).parent / "tasks/longbench2"
    (template,) = {
        yaml.safe_load(text)["doc_to_text"]
        for path in harness.glob("*common_yaml")
        if "doc_to_text" in (text := path.read_text(encoding="utf-8"))
    }
    stripped = {key: value.strip() for key, value in row.items()}
    choices = [stripped[f"choice_{letter}"] for letter in "ABCD"]
    theirs, answer = jinja2.Template(template).render(**stripped, choices=choices).rsplit("\n\n", 1)
    assert made.prompt.rsplit("\n\n", 1)[0] == theirs and answer == "Answer:"


def test_plain_questions(tmp_path, ask):
    """Each form; documents stand as in the data, in order; evidence is where it is said to be."""
    base = {"question": "Where?", "answers": "Rosvik"}
    documents = ["First {question}.", {"title": "Rosvik", "text": "A town.\nOn a hill."}]
    laid = "Document 1:\nFirst {question}.\n\nDocument 2: Rosvik\nA town.\nOn a hill."
    forms = [
        base | {"id": 1, "context": "Rosvik is a town."}, base | {"id": "2", "documents": documents, "task": "mine"},
        base | {"id": 3, "evidence": documents, "distractors": ["Third."]}, 
        {"id": 4, "prompt": "Q?", "answers": ["c", "b"]},
        base | {"id": 5, "context": "C.", "choices": ["Oslo", "Rosvik"], "answers": "Rosvik"},
        base | {"id": 6, "documents": documents, "choices": ["x", "y", "z"], "answers": ["C"]},
        base | {"id": 6, "prompt": "Which? (A) or (B)?", "choices": ["A", "B"], "answers": "A", "context": None},
    ]  # fmt: skip
    (tmp_path / "own.json").write_text(json.dumps(forms))
    items = ask("plain", plain_data=str(tmp_path / "own.json"))
    assert [(i.task, i.id, i.kind, i.answers) for i in items] == [
        ("questions", "1", "qa", ["Rosvik"]), ("mine", "2", "qa", ["Rosvik"]), ("questions", "3", "qa", ["Rosvik"]),
        ("questions", "4", "qa", ["c", "b"]), ("questions", "5", "choice", ["B"]), ("questions", "6", "choice", ["C"]),
        ("questions", "6#2", "choice", ["A"]),
    ]  # fmt: skip
    before, behind = PROMPT.replace("{question}", "Where?").split("{documents}")
    assert [i.prompt for i in items[:4]] == [
        f"{before}Rosvik is a town.{behind}", before + laid + behind, f"{before}{laid}\n\nDocument 3:\nThird.{behind}",
        "Q?",
    ]  # fmt: skip
    assert [items[2].prompt[p["start"] : p["end"]] for p in items[2].evidence] == [documents[0], documents[1]["text"]]
    assert [p["paragraph"] for p in items[2].evidence] == [1, 2] and items[1].evidence == items[0].evidence == []
    assert items[3].question == "" and items[6].prompt == "Which? (A) or (B)?"
    assert "\n\nC.\n\nQuestion: Where?\n\n(A) Oslo\n(B) Rosvik\n\nThink" in items[4].prompt and laid in items[5].prompt
    shipped = ask("plain", plain_data=str(ROOT / "data" / "demo_questions.jsonl"))
    assert len(shipped) == 40 and all(i.prompt[p["start"] : p["end"]] for i in shipped for p in i.evidence)


def test_both_prompts_of_a_row_are_one_question(tmp_path, ask):
    """Read a pair as docs/after_training.md writes it by hand."""
    text = (ROOT / "docs" / "after_training.md").read_text(encoding="utf-8")
    (tmp_path / "own.jsonl").write_text("\n".join(re.findall(r'^\{"id": .*"task": .*\}$', text, re.MULTILINE)))
    items = ask("plain", plain_data=str(tmp_path / "own.jsonl"))
    assert [item.task for item in items] == ["short", "long"] and len({*map(source_of, items)}) == 1


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory) -> tuple[Path, list[dict]]:
    """Contexts of the data pipeline, and the same as the validation rows of an export."""
    folder = tmp_path_factory.mktemp("exported")
    made = material.recipe(folder, model, make_questions(12), short_tokens=600, long_tokens=1500)
    read.run(made, folder / "work")
    contexts.run(made, folder / "work")
    found = list(read_jsonl(folder / "work" / "contexts.jsonl"))
    pair = {"chosen": "x", "rejected": "y", "chosen_tokens": 2, "rejected_tokens": 2}
    pair |= {"pass_rate_short": 0.5, "pass_rate_long": None}
    made_rows = [export.make_row(pair, context) for context in found]
    write_jsonl(folder / "made_solopo_val.jsonl", made_rows)
    export.write_parquet(folder / "made_solopo_val.parquet", made_rows)
    return folder, found


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_validation_rows(exported, ask, kind):
    """Both prompts of a row, as they were made; a choice of rows is the same for both."""
    folder, found = exported
    items = ask("validation", validation_data=str(folder / f"made_solopo_val.{kind}"))
    assert [(i.id, i.task) for i in items] == [(c["id"], task) for c in found for task in ("short", "long")]
    by_id = {c["id"]: c for c in found}
    for item in items:
        context = by_id[item.id]
        assert item.prompt == context[item.task]["prompt"] and item.answers == context["answers"]
        assert item.evidence == context[item.task]["evidence"] and item.groups == {"hops": str(context["hops"])}
    few = ask("validation", validation_data=str(folder / f"made_solopo_val.{kind}"), max_samples=4)
    short, long = ([i.id for i in few if i.task == task] for task in ("short", "long"))
    assert short == long and len(short) == 4
    message = (
        r"made_solopo_val.*: the long prompt of q\w+ has 1[2-5]\d\d tokens, more than `max_input_tokens: 1200`, and "
    )
    with pytest.raises(DataError, match=message):
        ask("validation", validation_data=str(folder / f"made_solopo_val.{kind}"), max_input_tokens=1200)
    message = r"there is no such file; the data pipeline writes one where its recipe has `val_size` above 0: python "
    with pytest.raises(DataError, match=message):
        ask("validation", validation_data=str(folder / f"none.{kind}"))


# ---- what is wrong is said

SQUAD_FILE = squad("v2.0", ("Town", [("Rosvik is a town.", [asked("s1", "Where?", "Rosvik", impossible=False)])]))


def changed(**keys) -> dict:
    file = json.loads(json.dumps(SQUAD_FILE))
    file["data"][0]["paragraphs"][0]["qas"][0] |= keys
    return file


PLAIN_ROW = {"id": 1, "question": "Q?", "answers": "x"}
VALIDATION_ROW = {"id": 1, "question": "Q?", "answers": ["x"], "prompt": "a", "short_evidence": []}
TEXT, NONE, TOWN = "must be a text that is not empty, got", "NoneType None.", ":1 (str 'Town': paragraphs[0].qas[0]): "
FORMS = ":1: a question needs one of prompt, context, documents, evidence; it has"
TORN = ":1: the JSON does not end; is the file complete?"

# benchmark, key, name of the file; then what the file holds, or what changes in a good row, and the sentence
BAD = [
    ("longbench_qa", "longbench_data", "qasper.jsonl", LONGBENCH_ROW, [
        ("{", ":1: not a line of JSON (Expecting property name"),
        ('"a"', ":1: a line must be a JSON object, got str a."),
        ({"input": 5}, f":1: `input` {TEXT} int 5."),
        ({"context": ""}, f":1: `context` {TEXT} str ''."),
        ({"answers": []}, ":1: `answers` must be a text or a list of texts, got list []."),
        ({"answers": ["", "The"]}, ":1: there is no usable answer in list ['', 'The']: articles and punctuation"),
        ({"length": "long"}, ":1: `length` must be a number, got str 'long'."),
        ({"length": float("nan")}, ":1: `length` must be a number, got float nan."),
        ({"length": "inf"}, ":1: `length` must be a number, got str 'inf'."),
        ({"_id": None}, f":1: `_id` must be a text or a whole number, got {NONE}"),
        ("", "(qasper) has no question."),
    ]),
    ("niah_plus", "niah_data", "n.jsonl", NIAH_ROW, [
        ({"depth_percent": None}, f":1: `depth_percent` must be a number, got {NONE}"),
        ({"context_length": "1k"}, ":1: `context_length` must be a number, got str '1k'."),
        ({"context_length": float("inf")}, ":1: `context_length` must be a number, got float inf."),
        ({"depth_percent": float("nan")}, ":1: `depth_percent` must be a number, got float nan."),
        ({"dataset": None}, f":1: `dataset` {TEXT} {NONE}"),
        ({"depth_percent2": 5}, ":1: `depth_percent1` must be a number, and is missing (there is "),
    ]),
    ("niah_plus", "niah_needles", "n.jsonl", {"id": 1, "question": "?", "answers": ["x"]}, [
        ({}, ":1: the format of the row cannot be told from its keys (id, question, answers); musique has `par"),
    ]),
    ("longbench_v2", "longbench_v2_data", "d.json", V2_ROW, [
        ([V2_ROW, V2_ROW | {"answer": "E"}], ":3: `answer` must be one of the letters A to D, got str 'E'."),
        ([V2_ROW | {"choice_C": None}], f":2: `choice_C` {TEXT} {NONE}"),
        ([V2_ROW | {"difficulty": ["easy"]}], ":2: `difficulty` must be one of easy, hard; got list ['easy']."),
        ([V2_ROW | {"length": 5}], ":2: `length` must be one of short, medium, long; got int 5."),
        ([V2_ROW, 7], ":3: a row must be a JSON object, got int 7."),
        ("[" + json.dumps(V2_ROW) + ",", TORN),
        ("[]", "d.json` has no question."),
    ]),
    ("ruler_qa", "ruler_data", "s.json", SQUAD_FILE, [
        (json.dumps(SQUAD_FILE)[:-2], TORN),
        (json.dumps(SQUAD_FILE).replace('"qas"', "qas"), ":1: not JSON (lexical error: invalid char in json text): 'n"),
        ({"data": [{"paragraphs": [{"context": "x"}]}]}, ":1: `qas` must be a list, and is missing (there is context"),
        ({"data": [{"title": "T", "paragraphs": ["x"]}]}, ":1: `paragraphs` must hold objects, got str 'x'."),
        ({"data": ["x"]}, ":1: a row must be a JSON object, got str 'x'."),
        (changed(question=""), f"{TOWN}`question` must be a text, got str ''."),
        (changed(answers=[5]), f"{TOWN}`answers` must hold objects, got int 5."),
        (changed(answers=[]), f"{TOWN}`text` must be a text or a list of texts, got list []."),
        (changed(is_impossible=True), "no question that can be asked ({'lines': 1, 'unanswerable': 1, 'same_id': 0})."),
    ]),
    ("plain", "plain_data", "p.jsonl", PLAIN_ROW, [
        ({}, f"{FORMS} none."),
        ({"prompt": "Q?", "context": "x"}, f"{FORMS} prompt, context."),
        ({"context": "x", "question": None}, f":1: `question` {TEXT} {NONE}"),
        ({"documents": []}, ":1: `documents` is empty."),
        ({"documents": [4]}, ":1: a paragraph must be a text or an object, got int 4."),
        ({"prompt": "?", "choices": ["x"]}, ":1: `choices` must be two to four texts, got 1."),
        ({"prompt": "?", "choices": ["y", "z"]}, ":1: `answers` must be one of the letters A, B or choices, got"),
        ({"prompt": "?", "choices": ["y", "y"], "answers": "y"}, ":1: `choices` must differ, got"),
        ({"prompt": "?", "choices": ["O", "A", "B", "AB"], "answers": "A"},
         ":1: `answers: A` is the letter of one choice and the text of another, (B); put that choice in place A, or"),
        ({"prompt": "?", "task": 1}, f":1: `task` {TEXT} int 1."),
        ({"prompt": "?", "answers": "A"}, ":1: there is no usable answer in list ['A']: articles and punctuation do"),
        ({"prompt": "?", "answers": ["", "The", "!"]}, "for a question of multiple choice give its `choices`."),
    ]),
    ("validation", "validation_data", "v.jsonl", VALIDATION_ROW, [
        ({}, ":1: `long_prompt` must be a text that is not empty, and is missing (there is id, "),
        ({"short_evidence": None}, f":1: `short_evidence` must be a list, got {NONE}"),
        ({"short_evidence": [5]}, ":1: `short_evidence` must hold objects, got int 5."),
    ]),
]  # fmt: skip


@pytest.mark.parametrize("case", [
    pytest.param((*file, content, message), id=f"{file[1]}-{k}")
    for *file, cases in BAD for k, (content, message) in enumerate(cases)
])  # fmt: skip
def test_bad_files(tmp_path, ask, case):
    """One sentence that names the file, the line and the reason."""
    benchmark, key, name, row, content, message = case
    path = tmp_path / name
    if isinstance(content, list):
        content = "[\n" + ",\n".join(map(json.dumps, content)) + "\n]"
    path.write_text(content if isinstance(content, str) else json.dumps(row | content))
    value = {"longbench_data": str(tmp_path), "ruler_data": {"squad": str(path)}, "niah_needles": [str(path)]}
    with pytest.raises(DataError) as error:
        ask(benchmark, longbench_tasks=["qasper"], **{key: value.get(key, str(path))})
    assert message in str(error.value) and "\n" not in str(error.value)
    if message.startswith(":"):
        assert str(error.value).startswith(f"{path}{message}")


# ---- contexts


def shown(item) -> list[str]:
    """The documents of a prompt."""
    return item.prompt.split("Document ")[1:]


def check_item(item, ask, target: int, longest: int, texts: dict[str, list[str]]) -> None:
    """What holds for a context, worked out from its prompt alone."""
    tokens = ask.tokens(item.prompt)
    assert target - longest < tokens <= target
    assert [item.prompt[p["start"] : p["end"]] for p in item.evidence] == texts[item.id.split("/")[0]]
    for place in item.evidence:
        text = item.prompt[place["start"] : place["end"]]
        assert item.prompt.count(text) == 1 and text in shown(item)[place["paragraph"] - 1]
    assert len(set(shown(item))) == len(shown(item)) and item.length is not None


def longest_document(ask, texts: list[str]) -> int:
    """Tokens of the longest paragraph with its label, generously."""
    tokenizer = ask.chat[0]
    return max(len(tokenizer.encode(f"\n\nDocument 999: {'Word ' * 4}\n{text}")) for text in texts)


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> SimpleNamespace:
    """Invented questions in the data pipeline's format and as a file of SQuAD."""
    folder, made = tmp_path_factory.mktemp("questions"), make_questions(30, seed=5, longest=40)
    write_jsonl(folder / "plain.jsonl", made)
    (folder / "squad.json").write_text(json.dumps(squad_of(made)))
    texts = {q["id"]: [p["text"] for p in q["evidence"]] for q in made}
    single = {q["id"]: [" ".join(texts[q["id"]])] for q in made}
    single |= {f"{q['id']}d{k}": [p["text"]] for q in made for k, p in enumerate(q["distractors"])}
    every = [p["text"] for q in made for p in q["evidence"] + q["distractors"]] + sum(single.values(), [])
    return SimpleNamespace(
        folder=folder, rows=made, plain=str(folder / "plain.jsonl"), squad=str(folder / "squad.json"), texts=texts,
        single=single, all=every,
    )  # fmt: skip


def test_ruler(questions, ask, caplog):
    """Right lengths, the same questions at each, evidence where it is said to be."""
    caplog.set_level(logging.INFO)
    longest = longest_document(ask, questions.all)
    items = ask("ruler_qa", ruler_data={"mine": questions.plain, "squad": questions.squad}, ruler_questions=10)
    assert len(items) == 2 * 10 * 3 and len({item.key for item in items}) == 60
    for item in items:
        check_item(item, ask, item.length, longest, questions.texts if item.task == "mine" else questions.single)
        assert item.id.endswith(f"/{item.length}") and item.depth is None
        assert item.groups == ({"hops": str(len(item.evidence))} if item.task == "mine" else {})
    for task in ("mine", "squad"):
        sets = [{i.id.split("/")[0] for i in items if i.task == task and i.length == n} for n in KEYS["ruler_lengths"]]
        assert sets[0] == sets[1] == sets[2] and len(sets[0]) == 10
    logged = [record.getMessage() for record in caplog.records if "of 10 questions asked for" in record.getMessage()]
    assert len(logged) == 2 and "10 built at each length of 400, 900, 2000; dropped {" in logged[0]


def test_the_pipelines_short_context(exported, ask):
    """At `short_tokens` a context is the data pipeline's for the same question, byte for byte."""
    folder, found = exported
    items = ask("ruler_qa", ruler_data={"x": str(folder / "questions.jsonl")}, ruler_lengths=[600], ruler_questions=50)
    assert {i.id: i.prompt for i in items} == {f"{c['id']}/600": c["short"]["prompt"] for c in found}
    assert {i.id: i.evidence for i in items} == {f"{c['id']}/600": c["short"]["evidence"] for c in found}


def test_a_window_a_little_shorter_than_the_length(questions, ask):
    """Such a context is built to the window, so that nothing is cut; so is one far too long, which a recipe refuses."""
    for window, target in ((960, 960), (949, 949), (1000, 1000), (5000, 1000)):
        items = ask("ruler_qa", ruler_data={"mine": questions.plain}, ruler_lengths=[1000], max_input_tokens=window)
        assert len(items) == 5 and {item.length for item in items} == {1000}
        assert all(target - 50 < ask.tokens(item.prompt) <= target for item in items), window


def depth_of(item, place: dict, ask) -> tuple[float, float]:
    """Share of the haystack's tokens before a needle, and the longest share of a paragraph; from the prompt alone."""
    tokenizer, documents = ask.chat[0], [re.sub(r"^\d+:", "", d).split("\n\nQuestion: ")[0] for d in shown(item)]
    needles = {p["paragraph"] - 1 for p in item.evidence}
    sizes = [0 if k in needles else len(tokenizer.encode(d)) for k, d in enumerate(documents)]
    return sum(sizes[: place["paragraph"] - 1]) / sum(sizes), max(sizes) / sum(sizes)


def test_niah(questions, ask):
    """Needles at the asked depth within a paragraph; the same haystack at every depth; several needles go on behind."""
    longest = longest_document(ask, questions.all)
    depths = [0.0, 12.5, 50.0, 90.0, 100.0]
    items = ask("niah_plus", niah_needles={"single": questions.squad, "multi": questions.plain}, niah_depths=depths)
    assert len(items) == 2 * 3 * 2 * 5 and len({item.key for item in items}) == 60
    first_of = {}
    for item in items:
        check_item(item, ask, item.length, longest, questions.single if item.task == "single" else questions.texts)
        found = [depth_of(item, place, ask) for place in item.evidence]
        first = min(range(len(found)), key=lambda k: item.evidence[k]["paragraph"])
        assert abs(found[first][0] - item.depth / 100) <= found[first][1]
        assert item.id.endswith(f"/{item.length}/{item.depth:g}")
        if item.depth == 0:
            assert min(p["paragraph"] for p in item.evidence) == 1
        if item.depth == 100:
            n = len(shown(item))
            assert sorted(p["paragraph"] for p in item.evidence) == list(range(n - len(item.evidence) + 1, n + 1))
        first_of.setdefault((item.task, item.id.split("/")[0]), set()).add(first if item.depth < 100 else None)
    assert all(len(which - {None}) == 1 for which in first_of.values())  # the same needle leads in every cell
    for item in items:  # only the place of needles differs from depth to depth
        other = next(
            i for i in items if i.key[:2] == item.key[:2] and i.id == item.id.replace(f"/{item.depth:g}", "/50")
        )
        hay = [[re.sub(r"^\d+:|\n\nQuestion: .*|\s+$", "", d, flags=re.S) for d in shown(i)] for i in (item, other)]
        needles = [{p["paragraph"] - 1 for p in i.evidence} for i in (item, other)]
        left = [[d for k, d in enumerate(h) if k not in n] for h, n in zip(hay, needles, strict=True)]
        assert left[0] == left[1]


@pytest.mark.parametrize("benchmark", ["ruler_qa", "niah_plus"])
def test_tokens_that_do_not_add_up(questions, ask, benchmark):
    """A prompt that is glued to its documents: tokenised whole, and lengths and depths hold as ever."""
    keys = {"ruler_data": {"mine": questions.plain}, "niah_needles": {"mine": questions.plain}, "ruler_questions": 3}
    items = ask(benchmark, prompt="Q: {question} D: {documents}|A:", **keys)
    assert len(items) == (3 * 3 if benchmark == "ruler_qa" else 3 * 2 * 4)
    for item in items:
        check_item(item, ask, item.length, longest_document(ask, questions.all), questions.texts)
        if item.depth is not None:
            found = [depth_of(item, place, ask) for place in item.evidence]
            assert abs(min(found)[0] - item.depth / 100) <= min(found)[1]


@given(st.lists(st.integers(1, 50), max_size=12), st.lists(st.floats(0, 1), min_size=1, max_size=4))
@settings(deadline=None, max_examples=300, derandomize=True, database=None)
def test_needles_come_as_near_as_they_can(sizes, at):
    """Against trying every place between two paragraphs."""
    tokens, needles = [*sizes, *[7] * len(at)], list(range(len(sizes), len(sizes) + len(at)))
    hay = list(range(len(sizes)))
    documents = niah.placed(tokens, at, needles, hay)
    assert sorted(documents) == hay + needles and [i for i in documents if i < len(sizes)] == hay
    for share, needle in zip(at, needles, strict=True):
        before = sum(tokens[i] for i in documents[: documents.index(needle)] if i < len(sizes))
        best = min(abs(sum(sizes[:k]) - share * sum(sizes)) for k in range(len(sizes) + 1))
        assert abs(before - share * sum(sizes)) <= best + 1e-9
    order = [documents.index(needle) for _, needle in sorted(zip(at, needles, strict=True))]
    assert order == sorted(order)


def test_one_needle_leads():
    """The same one and at the same distances however often it is asked, another for other questions and seeds."""
    made = [Question(f"q{k}", "?", ["x"], None, list(range(4)), False) for k in range(50)]
    shares = [niah.needle_shares(7, question) for question in made]
    assert shares == [niah.needle_shares(7, question) for question in made]
    assert all(sorted(s)[0] == 0 < sorted(s)[1] and max(s) < 1 for s in shares)
    assert {s.index(0) for s in shares} == {0, 1, 2, 3} and len(set(map(tuple, shares))) == 50
    assert niah.needle_shares(8, made[0]) != shares[0]


@pytest.mark.parametrize("length", [1, 10, 150, 300, 1_000, 3_000, 8_000, 40_000, 10_000_000, 10**12])
@pytest.mark.parametrize("benchmark", ["ruler_qa", "niah_plus"])
def test_it_ends_for_every_length(questions, ask, benchmark, length):
    """With contexts that are right, or with the reason why there is none."""
    keys = {"ruler_data": {"mine": questions.plain}, "niah_needles": {"mine": questions.plain}}
    try:
        items = ask(benchmark, ruler_lengths=[length], niah_lengths=[length], **keys, max_input_tokens=10**13)
    except DataError as error:
        reason = "evidence_longer_than" if length < 1_000 else "too_few_distractors_for"
        assert f"mine ({questions.plain}): none of " in str(error)
        assert re.search(
            rf"questions gives contexts of {length} tokens \({{'{reason}_{length}': \d+}}\); ask", str(error)
        )
        assert length < 400 or length >= 8_000
    else:
        assert 150 < length < 40_000 and items
        assert all(length - 120 < ask.tokens(item.prompt) <= length for item in items)


def test_one_length_that_cannot_be_is_named(questions, ask):
    with pytest.raises(DataError, match=r"contexts of 600, 90000 tokens \({'too_few_distractors_for_90000': 20}\)"):
        ask("ruler_qa", ruler_data={"mine": questions.plain}, ruler_lengths=[600, 90_000])


def test_paragraphs_too_long_to_fill_a_length(ask, tmp_path):
    made = make_questions(4, distractors=5)
    for q in made:
        for distractor in q["distractors"]:
            distractor["text"] += " harbour" * 5000
    write_jsonl(tmp_path / "q.jsonl", made)
    with pytest.raises(DataError, match=r"of 4000 tokens \({'paragraphs_too_long_for_4000': 4}\).*more, or shorter"):
        ask("ruler_qa", ruler_data={"x": str(tmp_path / "q.jsonl")}, ruler_lengths=[4000])


def test_questions_that_do_not_fit_are_replaced_and_counted(questions, ask, tmp_path, caplog):
    """By the next of the draw, for all lengths; special tokens of the model are no question of ours."""
    caplog.set_level(logging.INFO)
    made = make_questions(20, seed=9)
    for q in made[:6]:
        q["evidence"][0]["text"] += " long" * 400
    for q in made[6:8]:
        q["question"] += " <|im_end|>"
    write_jsonl(tmp_path / "q.jsonl", made)
    items = ask("ruler_qa", ruler_data={"x": str(tmp_path / "q.jsonl")}, ruler_questions=14, ruler_lengths=[500, 1500])
    names = [{i.id.split("/")[0] for i in items if i.length == n} for n in (500, 1500)]
    assert names[0] == names[1] == {f"q{k}" for k in range(8, 20)}
    (record,) = [r for r in caplog.records if "questions asked for" in r.getMessage()]
    assert record.levelno == logging.WARNING and "of 14 questions asked for, 12 built" in record.getMessage()
    assert "'evidence_longer_than_500': 6" in record.getMessage() and "'special_tokens': 2" in record.getMessage()


def test_squad_files(tmp_path, ask, caplog):
    """Versions 1.1 and 2.0 and the hub's rows give the same; what cannot be answered is left out and counted."""
    caplog.set_level(logging.INFO)
    filling = [(paragraph(random.Random(k), 30), [asked(f"f{k}", "Which?", f"no. {k}")]) for k in range(60)]
    place, where = "Rosvik is a town. Ola lives there.", asked("s1", "Where?", "Rosvik", "Rosvik", "a town")
    files = {
        "1.1": squad("1.1", ("Old_towns", [(place, [where])]), ("Fill", filling)),
        "2.0": squad("v2.0", ("Old_towns", [(place, [where | {"is_impossible": False}])]), ("Fill", filling)),
        "all": squad(
            "v2.0", ("Old_towns", [(place, [where, asked("s2", "Why?", impossible=True)])]), ("Fill", filling)
        ),
    }
    hub = []
    for article in files["all"]["data"]:
        for part in article["paragraphs"]:
            for q in part["qas"]:
                answers = {"text": [a["text"] for a in q["answers"]], "answer_start": [0 for _ in q["answers"]]}
                above = {"title": article["title"], "context": part["context"], "question": q["question"]}
                hub.append({"id": q["id"], **above, "answers": answers})
    write_jsonl(tmp_path / "hub.jsonl", hub)
    for name, file in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(file, indent=2 if name == "2.0" else None))
    found = [
        ask("ruler_qa", ruler_data={"squad": str(tmp_path / name)}, ruler_questions=61)
        for name in ("1.1.json", "2.0.json", "all.json", "hub.jsonl")
    ]
    assert found[0] == found[1] == found[2] == found[3] and len(found[0]) == 61 * 3
    town = next(i for i in found[0] if i.id == "s1/400")
    assert town.answers == ["Rosvik", "a town"] and town.question == "Where?"
    assert ": Old towns\nRosvik is a town. Ola lives there.\n" in town.prompt
    counted = [r.getMessage().rpartition("read ")[2] for r in caplog.records if "asked for" in r.getMessage()]
    assert [("'unanswerable': 1" in c) for c in counted] == [False, False, True, True]


@pytest.mark.skipif(not MUSIQUE.exists(), reason=f"no MuSiQue sample at {MUSIQUE}; set SOLOPO_SHARED_DATA")
def test_real_questions(ask):
    data = {"musique": str(MUSIQUE), "hotpotqa": str(HOTPOTQA)}
    items = ask("ruler_qa", ruler_data=data, ruler_lengths=[2500, 6000], ruler_questions=6)
    items += ask("niah_plus", niah_needles=data, niah_lengths=[4000], niah_questions=2)
    assert len(items) == 2 * 6 * 2 + 2 * 2 * 4
    for item in items:
        assert item.length - 600 < ask.tokens(item.prompt) <= item.length and item.evidence
        if item.depth is not None:
            found = [depth_of(item, place, ask) for place in item.evidence]
            assert abs(min(found)[0] - item.depth / 100) <= min(found)[1]


# ---- chance, and what is left as it is


def test_order_changes_no_choice(questions, tmp_path, ask):
    """The same questions are chosen whatever the order of rows, tasks and lengths; another seed chooses others."""
    rng = random.Random(3)
    many = [LONGBENCH_ROW | {"_id": f"id{k}", "context": f"Text {k}."} for k in range(30)]
    chosen = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "qasper.jsonl", many)
        write_jsonl(tmp_path / folder / "q.jsonl", questions.rows)
        keys = {"longbench_data": str(tmp_path / folder), "longbench_tasks": ["qasper"], "max_samples": 7}
        chosen.append({item.prompt_hash for item in ask("longbench_qa", **keys)})
        keys = {"ruler_data": {"mine": str(tmp_path / folder / "q.jsonl")}, "ruler_questions": 4}
        chosen.append({item.id for item in ask("ruler_qa", **keys)})
        rng.shuffle(many)
        questions.rows.sort(key=lambda q: q["id"], reverse=True)
    assert chosen[0] == chosen[2] and len(chosen[0]) == 7 and chosen[1] == chosen[3] and len(chosen[1]) == 12
    other = ask("longbench_qa", longbench_data=str(tmp_path / "a"), longbench_tasks=["qasper"], max_samples=7, seed=1)
    assert {item.prompt_hash for item in other} != chosen[0]
    data = {"mine": questions.plain, "squad": questions.squad}
    one = ask("ruler_qa", ruler_data=data, ruler_lengths=[500, 1200])
    two = ask("ruler_qa", ruler_data=dict(reversed(data.items())), ruler_lengths=[1200, 500])
    assert one == ask("ruler_qa", ruler_data=data, ruler_lengths=[500, 1200])
    assert sorted(one, key=lambda i: i.key) == sorted(two, key=lambda i: i.key)
    assert len(ask("ruler_qa", ruler_data=data, max_samples=2)) == 2 * 2 * 3
    capped = ask("niah_plus", niah_needles=[questions.plain], max_samples=1)
    assert capped == ask("niah_plus", niah_needles=[questions.plain], max_samples=1)
    twice = ask("niah_plus", niah_needles=[questions.plain], niah_depths=[50, 50.0], niah_lengths=[600, 600])
    assert len(twice) == 3 and len(capped) == 1 * 2 * 4 and {item.task for item in capped} == {"plain"}


def test_special_tokens_stay_and_are_counted(tmp_path, ask, caplog):
    prompts = [f"Q{'<|im_end|>' * (k % 3 == 0)}" for k in range(9)]
    write_jsonl(tmp_path / "p.jsonl", [{"id": k, "prompt": p, "answers": "x"} for k, p in enumerate(prompts)])
    items = ask("plain", plain_data=str(tmp_path / "p.jsonl"))
    assert sum("<|im_end|>" in item.prompt for item in items) == 3
    assert "3 of 9 prompts hold a special token of the model, left as they are." in caplog.text


def test_items_come_one_by_one(tmp_path, ask, monkeypatch):
    """The second row is not made before the first item is taken."""
    made = []
    monkeypatch.setattr(plain, "prompt_with_context", lambda *args: made.append(args) or "prompt")
    write_jsonl(tmp_path / "p.jsonl", [{"id": k, "question": "?", "context": "c", "answers": "x"} for k in range(9)])
    items = BENCHMARKS["plain"](SimpleNamespace(**(KEYS | {"plain_data": str(tmp_path / "p.jsonl")})), *ask.chat)
    next(items)
    assert len(made) == 1


def test_the_prompts_marker_is_read():
    wanted = re.search(r"`(The answer is: )\.\.\.`", PROMPT).group(1)
    assert extract_answer(f"So. {wanted}Rosvik") == "Rosvik"
