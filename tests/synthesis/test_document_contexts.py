"""Contexts of documents: distractors of other documents first, the document itself, and what was retrieved."""

import json
from dataclasses import replace

import pytest
from conftest import ROOT
from material import make_questions, recipe, save_tokenizer

from solopo_plugin.qa.answers import holds_answer
from solopo_plugin.qa.contexts import others_first
from solopo_plugin.qa.files import DataError, read_jsonl, write_jsonl
from solopo_plugin.qa.prompts import split_documents
from solopo_plugin.synthesis import contexts, document_contexts, documents, read
from solopo_plugin.synthesis.document_contexts import CUT, widen
from solopo_plugin.synthesis.recipe import stage_settings


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def handbook(tmp_path, model):
    """Runs the stage `contexts` on questions about the handbook: recipe, passages by id, rows by id, counts."""

    def run(asked: dict[str, tuple[str, list[str]]], **keys):
        made = recipe(tmp_path, model, ROOT / "data" / "handbook", passage_tokens=120, **keys)
        work = tmp_path / "work"
        work.mkdir(exist_ok=True)
        documents.run(made, work)
        passages = {p["text"]: p for p in read_jsonl(work / "passages.jsonl")}
        rows = []
        for name, (answer, starts) in asked.items():
            found = [next(p for text, p in passages.items() if text.startswith(start)) for start in starts]
            evidence = [{**p, "quote": p["text"][:20]} for p in found]
            fields = {"id": name, "question": f"What of {name}?", "answers": [answer], "hops": len(found)}
            rows.append(fields | {"evidence": evidence, "distractors": []})
        write_jsonl(work / "questions.jsonl", rows)
        write_jsonl(work / "corpus.jsonl", passages.values())
        counts = contexts.run(made, work)
        return passages, {row["id"]: row for row in read_jsonl(work / "contexts.jsonl")}, counts

    return run


ONE = {"pilot": ("Signe Halloran", ["Ships longer than thirty"])}
TWO = {"inn": ("Basil Greville", ["Its keeper is Paula Greville", "The Grey Heron is kept"])}


def sources_in(prompt: str, n: int, passages: dict) -> list[str]:
    return [passages[text.split("\n", 1)[1]]["source"] for text in split_documents(prompt, n)]


def test_distractors_of_other_documents_come_first(handbook):
    passages, rows, _ = handbook(ONE | TWO, short_tokens=500, long_tokens=1500)
    for name, row in rows.items():
        for side in ("short", "long"):
            evidence = {place["paragraph"] for place in row[side]["evidence"]}
            shown = sources_in(row[side]["prompt"], row[side]["paragraphs"], passages)
            own = {source for number, source in enumerate(shown, 1) if number in evidence}
            others = [source for number, source in enumerate(shown, 1) if number not in evidence]
            assert own and not own & set(others), (name, side)
            assert len(set(others)) > 1 or side == "short"
            for place, origin in zip(row[side]["evidence"], row["origins"], strict=True):
                text = row[side]["prompt"][place["start"] : place["end"]]
                assert (origin["source"], origin["quote"]) == (passages[text]["source"], text[:20])
    assert list(others_first(range(6), {1, 4}.__contains__)) == [0, 2, 3, 5, 1, 4]


def test_a_document_is_its_own_long_context(handbook):
    """Whole if there is room, cut around the evidence if not; the short one shows the evidence alone."""
    passages, rows, counts = handbook(ONE | TWO, contexts="document", short_tokens=700, long_tokens=4000)
    assert counts["contexts"] == 2 and counts["dropped"] == {}
    row = rows["pilot"]
    whole = [p for p in passages.values() if p["source"] == "harbour/harbour.rst"]
    long = row["long"]["prompt"]
    places = [long.index(p["text"]) for p in whole]
    assert places == sorted(places) and CUT not in long and row["long"]["paragraphs"] == 1
    assert "Document 1: Handbook of Tarnvik: the harbour\nThe harbour master\n\nThe harbour master is" in long
    assert "\n\nMoorings > Winter\n\nFrom December" in long and long.count("Winterbourne") == 1
    assert row["short"]["paragraphs"] == 1 and "Winterbourne" not in row["short"]["prompt"]
    two = rows["inn"]
    assert two["long"]["paragraphs"] == two["short"]["paragraphs"] == 2 and "Sunniva Drake" in two["long"]["prompt"]
    for made in (row, two):
        texts = {
            side: [made[side]["prompt"][place["start"] : place["end"]] for place in made[side]["evidence"]]
            for side in ("short", "long")
        }
        assert texts["short"] == texts["long"] and all(text in passages for text in texts["long"])


def test_a_work_folder_from_before_is_finished_as_it_was(tmp_path, model):
    """The manifest names `contexts` where it is not `mixed` alone."""
    made = recipe(tmp_path, model, tmp_path / "q.jsonl")
    assert "contexts" not in stage_settings(made, "contexts")
    assert stage_settings(replace(made, contexts="document"), "contexts")["contexts"] == "document"


def test_a_long_document_is_cut_around_its_evidence(handbook, model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    passages, rows, _ = handbook(ONE | TWO, contexts="document", short_tokens=600, long_tokens=800)
    for row in rows.values():
        long = row["long"]
        assert CUT in long["prompt"] and 600 < long["tokens"] <= 800
        assert len(tokenizer.encode(long["prompt"])) < long["tokens"]
        for place in long["evidence"]:
            assert long["prompt"][place["start"] : place["end"]] in passages


@pytest.mark.parametrize("sentences", [1, 6])
def test_a_long_document_fills_the_context(tmp_path, model, sentences, monkeypatch):
    """Fill it however long its headings are, which the context shows once; lay no context of a question out twice."""
    laid_out: list[str] = []

    def note(builder, question, sources, chosen, passages, lay_out=document_contexts._lay_out):
        laid_out.append(f"{question.id} {chosen}")
        return lay_out(builder, question, sources, chosen, passages)

    monkeypatch.setattr(document_contexts, "_lay_out", note)
    parts = ["# Handbook of the administration of the town of Rosvik"]
    for n in range(60):
        told = " ".join(f"The council of Rosvik lent the boat numbered {n}{k} to the miller." for k in range(sentences))
        parts += [f"## Part {n // 10} on the regulations of the council"] * (n % 10 == 0)
        parts += [f"### Rule {n} on the boats, bridges and markets in winter", told]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.md").write_text("\n\n".join(parts))
    keys = dict(contexts="document", passage_tokens=200, short_tokens=400, long_tokens=1500)
    made, work = recipe(tmp_path, model, tmp_path / "in", input_format="documents", **keys), tmp_path / "work"
    work.mkdir()
    documents.run(made, work)
    passages = list(read_jsonl(work / "passages.jsonl"))
    question = {"question": "Of what number?", "answers": ["x"], "hops": 1, "distractors": []}
    write_jsonl(work / "questions.jsonl", [{"id": p["id"], "evidence": [p]} | question for p in passages])
    write_jsonl(work / "corpus.jsonl", passages)
    counts = contexts.run(made, work)
    assert len(set(laid_out)) == len(laid_out) > counts["contexts"]
    longest = max(p["tokens"] for p in passages)
    assert counts["contexts"] >= 60 and counts["tokens"]["long"]["max"] <= 1500
    assert counts["tokens"]["long"]["min"] > 1500 - longest - 60  # of a passage, and its heading


def test_the_evidence_stands_anywhere_in_what_is_cut():
    """The share before it is drawn; what one side does not need goes to the other."""
    passages, tokens = list(range(100, 200)), dict.fromkeys(range(100, 200), 10)
    at = [widen(passages, [150], 200, share / 10, tokens)[0].index(150) for share in range(11)]
    assert at == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    assert widen(passages, [101], 200, 0.9, tokens) == (list(range(100, 121)), 200)
    assert widen(passages, [199], 200, 0.1, tokens) == (list(range(179, 200)), 200)
    assert widen(passages, [110, 112, 300], 10, 0.5, tokens) == ([110, 111, 112], 10)
    assert widen(passages, [110, 190], 20, 0.5, tokens) == ([110, 111, 112, 190], 20)


def test_a_document_that_is_its_evidence_is_dropped(handbook, tmp_path, model):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.md").write_text("The only passage names Zorvik.")
    made = recipe(tmp_path, model, tmp_path / "in", contexts="document", input_format="documents")
    work = tmp_path / "work"
    work.mkdir()
    documents.run(made, work)
    passage = next(read_jsonl(work / "passages.jsonl"))
    row = {"id": "q", "question": "Who?", "answers": ["Zorvik"], "hops": 1, "evidence": [passage], "distractors": []}
    write_jsonl(work / "questions.jsonl", [row])
    write_jsonl(work / "corpus.jsonl", [passage])
    with pytest.raises(DataError, match="'document_is_evidence': 1"):
        contexts.run(made, work)


def test_documents_as_contexts_of_questions_about_none_are_refused(tmp_path, model):
    made = recipe(tmp_path, model, make_questions(2), contexts="document")
    read.run(made, tmp_path / "work")
    with pytest.raises(DataError, match="`contexts: document` is for .* `input_format: documents`; .* `contexts` out"):
        contexts.run(made, tmp_path / "work")


@pytest.mark.parametrize(
    "keys, advice",
    [
        (dict(), "raise `short_tokens`, lower `long_tokens`, or add documents with `corpus`"),
        (dict(input_format="documents"), "raise `short_tokens`, lower `long_tokens`, or give more documents"),
        (dict(contexts="document"), "raise `short_tokens`, give longer documents, or take `contexts: mixed`"),
    ],
)
def test_what_helps_where_no_question_has_contexts(tmp_path, model, keys, advice):
    """By where the paragraphs come from."""
    passage = {"title": "A", "text": "It names Zorvik.", "source": "a.md", "section": "", "place": 0}
    row = {"id": "q", "question": "Who?", "answers": ["Zorvik"], "hops": 1, "evidence": [passage], "distractors": []}
    write_jsonl(tmp_path / "work" / "questions.jsonl", [row])
    write_jsonl(tmp_path / "work" / "corpus.jsonl", [passage])
    with pytest.raises(DataError, match=f"None of 1 questions gives .*; {advice}.$"):
        contexts.run(recipe(tmp_path, model, [], **keys), tmp_path / "work")


# ---- a retrieval log


def log_of(n: int) -> list[dict]:
    """Rows of a retrieval system: the answer in the third and the sixth passage."""
    rows = []
    for row in make_questions(n, distractors=6):
        answer, passages = row["answers"][0], [p["text"] for p in row["distractors"]]
        passages[2:2] = [{"title": "Third", "text": f"Here stands {answer}, third."}]
        passages[5:5] = [{"text": f"And the {answer}, sixth.", "score": 0.5}]
        rows.append({"question": f"{row['question']} {row['id']}", "answer": answer, "passages": passages})
    return rows


@pytest.mark.parametrize("form", ["auto", "retrieval"])
def test_what_was_retrieved_is_the_long_context_in_its_order(tmp_path, model, form):
    given = log_of(14)
    given[12]["answer"], given[13]["answer"] = "No.", ["yes", "Yes!"]
    for row in given[12:]:
        row["passages"].append("Yes, they said, and no.")
    given[11]["answer"] = ["Yes", given[11]["answer"]]
    given[11]["passages"].append("Yes, they said.")
    given[1]["passages"] = [p for p in given[1]["passages"] if given[1]["answer"] not in json.dumps(p)]
    given[2]["passages"] = given[2]["passages"][2:3]
    made = recipe(tmp_path, model, tmp_path / "log.jsonl", input_format=form, short_tokens=400, long_tokens=4000)
    write_jsonl(tmp_path / "log.jsonl", given)
    work = tmp_path / "work"
    counts = read.run(made, work)
    left_out = counts["answer_not_retrieved"], counts["yes_or_no"], counts["bad"]
    assert counts["questions"] == 11 and left_out == (1, 2, 0)
    counts = contexts.run(made, work)
    assert counts["dropped"] == {"retrieved_evidence_alone": 1} and counts["contexts"] == 10
    by_question = {row["question"]: row for row in given}
    for row in read_jsonl(work / "contexts.jsonl"):
        source = by_question[row["question"]]
        texts = [p if isinstance(p, str) else p["text"] for p in source["passages"]]
        for side, expected in (
            ("long", texts), ("short", [text for text in texts if holds_answer(text, row["answers"][-1:])])
        ):  # fmt: skip
            shown = split_documents(row[side]["prompt"], row[side]["paragraphs"])
            assert [text.split("\n", 1)[1] for text in shown] == expected
        assert [place["paragraph"] for place in row["long"]["evidence"]] == [3, 6]
        assert [place["paragraph"] for place in row["short"]["evidence"]] == [1, 2]


def test_what_was_retrieved_is_cut_where_it_does_not_fit(tmp_path, model):
    made = recipe(tmp_path, model, tmp_path / "log.jsonl", short_tokens=400, long_tokens=480)
    write_jsonl(tmp_path / "log.jsonl", log_of(8))
    read.run(made, tmp_path / "work")
    counts = contexts.run(made, tmp_path / "work")
    assert counts["left_out"]["retrieved_and_cut"] > 0
    for row in read_jsonl(tmp_path / "work" / "contexts.jsonl"):
        assert row["long"]["tokens"] <= 480 and row["long"]["paragraphs"] <= 8 and len(row["long"]["evidence"]) == 2


def test_a_log_without_answers_is_refused(tmp_path, model):
    given = log_of(2)
    del given[1]["answer"]
    write_jsonl(tmp_path / "log.jsonl", given)
    with pytest.raises(DataError, match=r"log\.jsonl:2: there is no `answer`, .*give the passages as documents \("):
        read.run(recipe(tmp_path, model, tmp_path / "log.jsonl"), tmp_path / "work")
    skipped = read.run(recipe(tmp_path, model, tmp_path / "log.jsonl", skip_bad=True), tmp_path / "work")
    assert skipped["bad"] == 1 and skipped["questions"] == 1
