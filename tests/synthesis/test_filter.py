"""Which questions are kept: every filter by itself, and all of them on replies of which each fault is planned."""

import json
import random
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import SHARED_DATA
from planned_asking import KINDS, Plan, make_passages, obviously_right, plan
from scripted_server import serving

from solopo_plugin.qa.documents import build_pool
from solopo_plugin.qa.files import DataError, read_jsonl, write_jsonl
from solopo_plugin.synthesis import ask, filter
from solopo_plugin.synthesis.filter import FILTERS, Candidate, mark_repeats, take_turns, verbatim
from solopo_plugin.synthesis.pairs import question_key
from solopo_plugin.synthesis.recipe import make_recipe, stage_settings

REAL = SHARED_DATA / "real" / "train" / "squad_train_44_articles.jsonl"


def recipe_for(tokenizer: str, url: str = "http://127.0.0.1:1/v1", **keys):
    base = dict(model_name_or_path=tokenizer, template="qwen", input="-", dataset_name="d", work_dir="-")
    base |= dict(backend="openai", server_urls=url, served_model="scripted", answer_words=4, seed=3, retries=0)
    return make_recipe(base | keys)


def write_plan(folder: Path, passages: list[dict], made: Plan) -> Path:
    """A work folder with passages, and beside it what the server says."""
    write_jsonl(folder / "work" / "passages.jsonl", passages)
    (folder / "said.json").write_text(json.dumps(made.said), encoding="utf-8")
    return folder / "said.json"


def run_both(recipe, work: Path) -> tuple[dict, dict]:
    return ask.run(recipe, work), filter.run(recipe, work)


# ---- one by one

TEXT = "Ada Holm opened the Rosvik bridge in 1904.\nHer brother\nbuilt it."
GOOD = dict(question="In which year did Ada Holm open the Rosvik bridge?", answer="1904", quotes=[TEXT.split("\n")[0]])


def candidate(**changes) -> Candidate:
    passage = {"id": "a.md#0", "title": "Bridges", "text": TEXT, "source": "a.md", "section": "", "place": 0}
    base = dict(id="a.md#0//0", hops=1, passages=[passage], readable=True, marked=False, agree=5)
    return Candidate(**base | GOOD | changes)


BAD = [
    ("malformed", dict(readable=False)),
    ("special_tokens", dict(marked=True)),
    ("quote_not_in_passage", dict(quotes=["Ada Holm opened the Rosvik bridge in 1905."])),
    ("quote_not_in_passage", dict(quotes=["ada holm opened the Rosvik bridge in 1904."])),
    ("long_answer", dict(answer="Ada Holm opened the Rosvik")),
    ("long_answer", dict(answer="橋" * 49)),
    ("answer_not_in_quote", dict(answer="brother")),
    ("answer_not_in_quote", dict(answer="190")),
    ("answer_in_question", dict(answer="Rosvik bridge")),
    ("answer_in_question", dict(question="What did ada holm open, and was it in 1904?")),
    ("speaks_of_the_text", dict(question="In which year, according to the passage, was the Rosvik bridge opened?")),
    ("speaks_of_the_text", dict(question="Which year does this document give for the Rosvik bridge?")),
    ("speaks_of_the_text", dict(question="Which year is given for the Rosvik bridge mentioned above?")),
    ("does_not_stand_alone", dict(question="When did she open it?")),
    ("does_not_stand_alone", dict(question="When was this bridge opened by Ada Holm?")),
    ("does_not_stand_alone", dict(question="Name the year in which Ada Holm opened the bridge.")),
    ("does_not_stand_alone", dict(question="Really when?")),
    ("does_not_stand_alone", dict(question="What year can I see there?")),
    ("does_not_stand_alone", dict(question="It opened in which year?")),
    ("does_not_stand_alone", dict(question="When did Ada Holm open the Rosvik bridge;")),
    ("does_not_stand_alone", dict(question="ローズヴィーク橋は千九百四年に開通しました。")),
    ("no_agreement", dict(agree=2)),
    ("known_without_evidence", dict(known=2)),
    ("one_passage_is_enough", dict(alone=2)),
    ("asked_before", dict(repeats=True)),
    ("document_full", dict(nth=7)),
    ("beyond_max_questions", dict(turn=9)),
]


def reasons(given: Candidate, **keys) -> list[str]:
    recipe = recipe_for("m", max_per_document=7, max_questions=9, **keys)
    return [reason for reason, leaves_out in FILTERS.items() if leaves_out(given, recipe)]


@pytest.mark.parametrize("reason, changes", BAD, ids=[f"{reason}-{i}" for i, (reason, _) in enumerate(BAD)])
def test_each_filter_leaves_out_what_it_is_for(reason, changes):
    assert reasons(candidate(**changes))[:1] == [reason]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(agree=3, known=1, alone=1, nth=6, turn=8),
        dict(quotes=["Her brother built it."], answer="brother", question="Who built the Rosvik bridge?"),
        dict(question="In which year did Ada Holm open the bridge that her brother built?"),
        dict(question="When did the ferry office lose its documents?"),
        dict(question="Wann eröffnete Ada Holm die Brücke von Rosvik?"),
        dict(question="ローズヴィーク橋はいつ開通しましたか？"),
        dict(question="Which two documents did Ada Holm sign?"),
        dict(question="Which US state did Ada Holm move to?"),
        dict(question="Which IT system does Ada Holm use?"),
        dict(question="What does I/O scheduling cost?"),
        dict(question="I hvilken by ligger broen?"),
        dict(question="Hvem bor i Rosvik?"),
        dict(question="Chi sono i fondatori del ponte?"),
        dict(question="Kto i kiedy otworzył most?"),
        dict(question="Ποιος άνοιξε τη γέφυρα;"),
        dict(question="ローズヴィーク橋はいつ開通しましたか。"),
    ],
)
def test_a_good_question_passes_every_filter(changes):
    assert reasons(candidate(**changes)) == []


def test_a_quote_is_kept_as_it_stands_in_the_passage():
    passage = candidate().passages[0]
    assert verbatim("Her brother  built it.", passage) == "Her brother\nbuilt it."
    assert verbatim("in 1904. Her", passage) == "in 1904.\nHer" and verbatim("in 1904.Her", passage) is None
    assert verbatim(".*", passage) is None


def test_every_filter_has_a_bad_question():
    assert {reason for reason, _ in BAD} == set(FILTERS)


def test_what_a_model_knows_is_no_matter_where_the_recipe_says_so():
    assert reasons(candidate(known=5), max_known=None) == []


def test_one_passage_may_be_enough_where_the_recipe_says_so():
    assert reasons(candidate(alone=5), max_alone=None) == []


def test_questions_about_two_versions_are_two():
    versions = "1.11.0", "1.1.10", "C++", "C#", "1.1.10"
    made = [candidate(question=f"What came with {version}?", answer=version) for version in versions]
    mark_repeats(made)
    assert [c.repeats for c in made] == [False] * 4 + [True]
    assert len({question_key({"question": c.question, "answers": ["x"]}) for c in made}) == 4


def test_hops_and_documents_take_turns():
    """Of 30 questions, most of one hop and one document, the first ones are balanced."""
    made = []
    for i in range(30):
        source = "big.md" if i < 20 else f"small {i % 3}.md"
        passage = {"id": f"{source}#{i}", "source": source}
        made.append(candidate(id=f"q{i}", hops=1 + (i % 5 == 0), passages=[passage]))
    take_turns(made, 1)
    assert sorted(c.turn for c in made) == list(range(30))
    first = sorted(made, key=lambda c: c.turn)[:8]
    assert Counter(c.hops for c in first) == {1: 4, 2: 4}
    assert max(Counter(c.passages[0]["source"] for c in first if c.hops == 1).values()) == 1
    for source in {c.passages[0]["source"] for c in made}:
        of_one = [c for c in made if c.passages[0]["source"] == source]
        assert [c.nth for c in sorted(of_one, key=lambda c: c.turn)] == list(range(len(of_one)))
    again = random.Random(0).sample(made, 30)
    turns = {c.id: c.turn for c in made}
    take_turns(again, 1)
    assert {c.id: c.turn for c in again} == turns
    take_turns(again, 2)
    assert {c.id: c.turn for c in again} != turns


def test_a_pair_counts_for_both_of_its_documents():
    """Count one that is left out for neither: another document's questions stay."""
    made = []
    for i in range(30):
        passages = [{"id": f"{source}#{i}", "source": source} for source in (f"a{i % 4}.md", "z.md")]
        made += [candidate(id=f"two{i}", hops=2, passages=passages), candidate(id=f"one{i}", passages=passages[:1])]
    take_turns(made, 1, 3)
    kept = Counter(source for c in made if c.nth < 3 for source in c.sources)
    assert kept == {f"{name}.md": 3 for name in ("a0", "a1", "a2", "a3", "z")}


# ---- all of them, with a server


def check_run(recipe, work: Path, passages: list[dict], made: Plan, counts: dict) -> None:
    """Counts are those of the plan, and each kept question is right by the plainest rules."""
    assert counts["dropped"] == dict.fromkeys(FILTERS, 0) | {k: n for k, n in made.counts.items() if k != "right"}
    kept = list(read_jsonl(work / "questions.jsonl"))
    assert [row["id"] for row in kept] == [row["id"] for row in made.kept]
    assert counts["candidates"] == made.counts.total() and counts["questions"] == made.counts["right"] == len(kept)
    by_id = {passage["id"]: passage for passage in passages}
    for row, planned in zip(kept, made.kept, strict=True):
        assert row["question"] == planned["question"] and row["answers"] == [planned["answer"]]
        obviously_right(row, by_id, recipe, made.said)
    assert len({row["question"].lower() for row in kept}) == len(kept)
    assert Counter(str(row["hops"]) for row in kept) == counts["hops"]
    corpus = list(read_jsonl(work / "corpus.jsonl"))
    assert [row["text"] for row in corpus] == [passage["text"] for passage in passages]
    pool, questions = build_pool(work, {"<|im_end|>"})
    assert len(pool) == len(passages) and all(len(q.evidence) == q.hops for q in questions)


def test_every_count_is_the_planned_one_and_nothing_is_asked_twice(tokenizer, tmp_path):
    passages, log = make_passages(), tmp_path / "log"
    recipe = recipe_for(tokenizer, candidates=3)
    made = plan(recipe, passages)
    assert set(made.counts) == set(KINDS)
    said, work = write_plan(tmp_path, passages, made), tmp_path / "work"
    with serving(said, verbatim=True, log=log) as server:
        recipe = recipe_for(tokenizer, server.url, candidates=3)
        asked, counts = run_both(recipe, work)
        assert asked["single"] == 40 and asked["pairs"] == 20 and asked["replies"] == 180
        assert asked["unreadable"] == made.counts["malformed"]
        check_run(recipe, work, passages, made, counts)
        sent = [json.loads(line) for line in log.read_text().splitlines()]
        last = ("right", "one_passage_is_enough", "asked_before")  # reach the checks with one passage
        checked = sum(made.counts[kind] for kind in (*last, "no_agreement", "known_without_evidence"))
        both = sum(made.of_pairs[kind] for kind in last)
        assert sum(event["response_format"] is not None for event in sent) == 60
        assert len(sent) == 60 + 2 * checked - made.counts["no_agreement"] + 2 * both and both > 20
        files = {path.name: path.read_bytes() for path in work.glob("*.jsonl")}
        assert run_both(recipe, work) == (asked, counts)
        stricter = recipe_for(tokenizer, server.url, candidates=3, min_agreement=5, max_known=0, max_questions=7)
        assert filter.run(stricter, work)["questions"] == 7 == len(list(read_jsonl(work / "questions.jsonl")))
        filter.run(recipe, work)
        assert {path.name: path.read_bytes() for path in work.glob("*.jsonl")} == files
        assert len(log.read_text().splitlines()) == len(sent)


def test_a_model_is_not_asked_without_evidence_where_the_recipe_says_so(tokenizer, tmp_path):
    passages, log = make_passages(20), tmp_path / "log"
    made = plan(recipe_for(tokenizer), passages)
    with serving(write_plan(tmp_path, passages, made), verbatim=True, log=log) as server:
        counts = run_both(recipe_for(tokenizer, server.url, max_known=None), tmp_path / "work")[1]
    assert counts["dropped"]["known_without_evidence"] == 0
    assert counts["questions"] == made.counts["right"] + made.counts["known_without_evidence"]
    checked = sum(made.counts.values()) - sum(made.counts[kind] for kind in list(FILTERS)[:8])
    both = sum(made.of_pairs.values()) - sum(made.of_pairs[kind] for kind in list(FILTERS)[:9])
    assert len(log.read_text().splitlines()) == 30 + checked + 2 * both and both > 3


def test_another_model_asks_and_says_what_the_passages_tell(tokenizer, tmp_path):
    """The one that is trained is asked what it knows, and nothing else; counts are those of the plan for both."""
    passages, logs = make_passages(20), [tmp_path / "trained", tmp_path / "asks"]
    made = plan(recipe_for(tokenizer), passages)
    said = write_plan(tmp_path, passages, made)
    with serving(said, verbatim=True, log=logs[0]) as trained, serving(said, verbatim=True, log=logs[1]) as asks:
        keys = dict(ask_server_urls=asks.url, ask_served_model="big", ask_openai_endpoint="chat")
        counts = run_both(recipe_for(tokenizer, trained.url, **keys), tmp_path / "work")[1]
    check_run(recipe_for(tokenizer), tmp_path / "work", passages, made, counts)
    sent = [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]
    assert [{event["model"] for event in events} for events in sent] == [{"scripted"}, {"big"}]
    known = sum(made.counts.values()) - sum(made.counts[kind] for kind in list(FILTERS)[:9])
    assert len(sent[0]) == known
    both = sum(made.of_pairs.values()) - sum(made.of_pairs[kind] for kind in list(FILTERS)[:10])
    assert len(sent[1]) == 30 + known + made.counts["no_agreement"] + 2 * both


def test_what_one_passage_gives_is_not_asked_where_the_recipe_says_so(tokenizer, tmp_path):
    passages = make_passages(20)
    made = plan(recipe_for(tokenizer, candidates=3), passages)
    assert made.counts["one_passage_is_enough"] == made.of_pairs["one_passage_is_enough"] > 0
    with serving(write_plan(tmp_path, passages, made), verbatim=True) as server:
        counts = run_both(recipe_for(tokenizer, server.url, candidates=3, max_alone=None), tmp_path / "work")[1]
    assert counts["dropped"]["one_passage_is_enough"] == 0
    assert counts["questions"] == made.counts["right"] + made.counts["one_passage_is_enough"]


def test_a_work_folder_from_before_one_passage_was_asked_about():
    """It is finished as it was where the check is left out, and says why it is made again where it is not."""
    assert "max_alone" not in stage_settings(recipe_for("m", max_alone=None), "filter")
    assert stage_settings(recipe_for("m"), "filter")["max_alone"] == 1


def test_no_question_left_is_a_sentence(tokenizer, tmp_path):
    passages = make_passages(10)
    made = plan(recipe_for(tokenizer), passages)
    said = {part: ["No."] * 2 for part in made.said}
    with serving(write_plan(tmp_path, passages, Plan(said)), verbatim=True) as server:
        with pytest.raises(DataError, match=r"None of 30 questions can be used \(30 malformed\); read .*asked.jsonl"):
            run_both(recipe_for(tokenizer, server.url), tmp_path / "work")
    assert not (tmp_path / "work" / "questions.jsonl").exists()


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason=f"no passages at {REAL}")
def test_real_passages(tokenizer, tmp_path):
    """60 paragraphs of Wikipedia, five of an article as its document."""
    texts: dict[str, dict] = {}
    for row in read_jsonl(REAL):
        texts.setdefault(row["evidence"][0]["text"], row["evidence"][0])
    places, passages = Counter(), []
    for paragraph in texts.values():
        title = paragraph["title"]
        if places[title] < 5 and len(passages) < 60:
            row = {"id": f"{title}.txt#{places[title]}", "source": f"{title}.txt", "section": "", **paragraph}
            passages.append(row | {"place": places[title], "tokens": 1})
            places[title] += 1
    assert len(passages) == 60
    recipe = recipe_for(tokenizer)
    made = plan(recipe, passages)
    with serving(write_plan(tmp_path, passages, made), verbatim=True) as server:
        asked, counts = run_both(recipe_for(tokenizer, server.url), tmp_path / "work")
    assert asked["single"] == 60 and asked["pairs"] == 30 and asked["special_tokens"] == 0
    check_run(recipe, tmp_path / "work", passages, made, counts)


def test_the_settings_of_a_recipe_are_checked():
    with pytest.raises(DataError, match="`min_agreement: 6` must be at most `check_samples: 5`"):
        recipe_for("m", min_agreement=6)
    assert asdict(recipe_for("m", max_known=None))["max_known"] is None
