"""The page of a data set: every planted fault is found by its check, nothing in the data runs, the reader reads."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ROOT, Page
from small_work import TOKENIZER, Template, context, recipe_for, verdicts, write_work

from solopo_plugin.qa.files import DataError, read_jsonl, write_json, write_jsonl
from solopo_plugin.qa.prompts import split_documents
from solopo_plugin.synthesis import export, pairs
from solopo_plugin.synthesis.look import CHECKS, checks_of, drop_reasons, gather, inspect, open_source
from solopo_plugin.synthesis.pipeline import ENTRY

UNKNOWN = dict.fromkeys(ENTRY, {})  # of a stage, what it was made from
BITS = ["10", "10", "10", "11", "10", "10", "00", "10"]


PICTURED = {"test_a_sound_set_fails_no_check_and_shows_its_numbers", "test_a_data_file_shows_the_same_rows"}


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Draw, but keep of a PNG its first bytes alone where no test looks at one: they take most of a page's time."""
    if request.function.__name__ not in PICTURED:
        monkeypatch.setattr("solopo_plugin.synthesis.look.png", lambda figure: b"\x89PNG\r\n\x1a\n")


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A finished work folder of eight questions, six of them with rows, one for validation; and its data set."""
    monkeypatch.setattr(pairs, "load_chat", lambda *_: (TOKENIZER, Template()))
    folder = tmp_path / "work"
    write_work(folder, *[[verdicts(i, bits) for i, bits in enumerate(BITS)]] * 2)
    recipe = recipe_for(folder, val_size=1)
    counts = {"contexts": {"dropped": {"evidence_longer_than_short": 4}}, "select": pairs.run(recipe, folder)}
    export.run(recipe, folder)
    stages = {name: UNKNOWN | {"counts": value, "settings": {"seed": 5}} for name, value in counts.items()}
    write_json(folder / "manifest.json", {"stages": stages})
    return folder


def test_a_sound_set_fails_no_check_and_shows_its_numbers(work, tmp_path):
    output = tmp_path / "out"
    found = inspect(work, output)
    assert found.splits == {"train": 5, "val": 1} and found.unparsed == 0
    assert not any(found.failed.values())
    names = {"prompt_lengths", "evidence_depth", "pass_rates", "response_lengths", "drop_reasons"}
    assert {path.name for path in output.iterdir()} == {"index.html", *(f"{name}.png" for name in names)}
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in output.glob("*.png"))
    page = Page(output / "index.html")
    assert "6 of 6 rows" in page.text and "5 train, 1 val" in page.text and "6 rows of `num_rows: 10`" in page.text
    shown = json.loads(page.scripts[0])
    rows = {row["id"]: row for row in read_jsonl(tmp_path / "data" / "toy_solopo.jsonl")}
    for row in shown:
        if row["facts"]["split"] == "train":
            source = rows[row["id"]]
            assert "".join(text for text, _ in row["short"]) == source["prompt"]
            assert "".join(text for text, _ in row["long"]) == source["long_prompt"]
            i = row["id"][1:]
            for side in ("short", "long"):
                marked = {text for text, evidence in row[side] if evidence}
                assert marked == {f"Person {i} works for firm {i}.", f"Firm {i} sits in Town{i}ville."}


def test_the_page_says_how_often_judge_and_gold_answers_agree(work, tmp_path):
    manifest = json.loads((work / "manifest.json").read_text())
    agreed = {"answers": 15, "share": 0.6, "both_right": 3, "only_model": 2, "only_rule": 4, "both_wrong": 6}
    manifest["stages"]["judge"] = UNKNOWN | {"counts": {"short": {"agreement_with_rule": agreed}, "long": {}}}
    write_json(work / "manifest.json", manifest)
    inspect(work, tmp_path / "out")
    text = Page(tmp_path / "out" / "index.html").text
    assert "judge and gold answers, short" in text and "judge and gold answers, long" not in text
    assert (
        "agree on 60.0% of 15 answers: 3 right for both, 6 wrong for both, 2 right for the judge alone, 4 for the gold "
        "answers alone"
    ) in text


def test_every_reason_from_the_folder_of_documents_on_is_shown(work, tmp_path):
    """Files, questions that a model asked, contexts and answers; a reason that held for none is not."""
    stages = {
        "documents": {"counts": {"skipped": {"broken": 2, "links": 1}, "duplicates": 3}},
        "filter": {"counts": {"dropped": {"malformed": 5, "long_answer": 0}}},
        "contexts": {"counts": {"dropped": {"evidence_longer_than_short": 4}}},
        "select": {"counts": {"short": {"dropped_questions": {"all_correct": 6}, "dropped_answers": {"cut": 7}}}},
    }
    assert drop_reasons(stages) == {
        "documents: broken": 2, "documents: links": 1, "documents: repeated passages": 3,
        "asked: malformed": 5, "question: evidence_longer_than_short": 4, "question, short: all_correct": 6,
        "answer, short: cut": 7,
    }  # fmt: skip
    manifest = json.loads((work / "manifest.json").read_text())
    stages = {name: UNKNOWN | entry for name, entry in stages.items()}
    write_json(work / "manifest.json", {"stages": stages | manifest["stages"]})
    inspect(work, tmp_path / "out")
    assert "What was left out on the way, and why." in Page(tmp_path / "out" / "index.html").text


BLANK = dict.fromkeys(range(128), " ")


def test_rows_that_say_nothing_of_their_source_show_the_titles_of_the_evidence(work, tmp_path):
    """Show titles for questions that were read, a retrieval log's among them; without a title the document's number."""
    data = tmp_path / "data" / "toy_solopo.jsonl"
    rows = list(read_jsonl(data))
    rows[1]["long_prompt"] = rows[1]["long_prompt"].replace("Document ", "Text ")
    title = f"Person {rows[2]['id'][1:]}\n"  # in the place of which nothing stands, of the same length
    rows[2]["long_prompt"] = rows[2]["long_prompt"].replace(f": {title}", f": {title.strip().translate(BLANK)}\n")
    write_jsonl(data, rows)
    inspect(data, tmp_path / "out")
    shown = {row["id"]: row["facts"] for row in json.loads(Page(tmp_path / "out" / "index.html").scripts[0])}
    for k, row in enumerate(rows):
        i, (first, second) = row["id"][1:], (place["paragraph"] for place in row["long_evidence"])
        of_number = [f"document {n} of the long prompt" for n in (first, second)]
        expected = {1: of_number, 2: [of_number[0], f"Firm {i}"]}.get(k, [f"Person {i}", f"Firm {i}"])
        assert [shown[row["id"]][f"evidence {n}"] for n in (1, 2)] == expected


def test_a_data_file_shows_the_same_rows(work, tmp_path):
    inspect(work, tmp_path / "a")
    inspect(tmp_path / "data" / "toy_solopo.jsonl", tmp_path / "b")
    export.run(recipe_for(work, val_size=1, export_format="parquet"), work)
    inspect(tmp_path / "data" / "toy_solopo.parquet", tmp_path / "c")
    a, b, c = (json.loads(Page(tmp_path / name / "index.html").scripts[0]) for name in "abc")
    assert a == b == c and len(a) == 6
    before = (tmp_path / "b" / "index.html").read_bytes()
    export.run(recipe_for(work, val_size=1), work)
    inspect(tmp_path / "data" / "toy_solopo.jsonl", tmp_path / "b")
    assert (tmp_path / "b" / "index.html").read_bytes() == before


def test_all_rejected_answers_are_shown_and_checked(work, tmp_path):
    """Of a work folder and of its file; a further one that is right, or stands in a prompt, is found."""
    write_work(work, [verdicts(i, "1000") for i in range(6)], [verdicts(i, "01") for i in range(6)])
    recipe = recipe_for(work, val_size=1, num_rejected=3)
    for stage in (pairs, export):
        stage.run(recipe, work)
    data = tmp_path / "data" / "toy_solopo.jsonl"
    for path in (work, data):
        inspect(path, tmp_path / "out")
        rows = json.loads(Page(tmp_path / "out" / "index.html").scripts[0])
        assert rows and all(row["rejected"].count("The answer is: No answer.") == 3 for row in rows)
        assert all(row["rejected"].count("-- rejected as well:") == 2 for row in rows)
    rows = list(read_jsonl(data))
    rows[0]["all_rejected"][2] = rows[0]["chosen"] + " indeed"
    rows[1]["prompt"] += rows[1]["all_rejected"][1]
    write_jsonl(data, rows)
    found = inspect(data, tmp_path / "out").failed
    assert found["rejected_is_right"] == [rows[0]["id"]] and found["rejected_in_prompt"] == [rows[1]["id"]]


def put(row: dict, side: str, old: str, new: str) -> None:
    """Change a prompt behind its evidence, so that the recorded places stay true."""
    column = {"short": "prompt", "long": "long_prompt"}[side]
    assert old in row[column]
    head, _, tail = row[column].rpartition(old)
    row[column] = head + new + tail


def last_distractor(row: dict, side: str) -> str:
    """Text of a distractor behind all evidence, for a fault to be planted in."""
    prompt = row[{"short": "prompt", "long": "long_prompt"}[side]]
    n, places = row[f"{side}_paragraphs"], row[f"{side}_evidence"]
    documents = split_documents(prompt, n)
    assert max(place["paragraph"] for place in places) < n
    return documents[n - 1].partition("\n")[2]


def planted(rows: list[dict]) -> dict[str, list[dict]]:
    """For each check the rows with the fault that it is to find."""
    with_end = {}
    for side in ("short", "long"):
        with_end[side] = next(
            r for r in rows if max(p["paragraph"] for p in r[f"{side}_evidence"]) < r[f"{side}_paragraphs"]
        )

    def changed(i: int = 0, **changes) -> list[dict]:
        return [{**row, **(changes if j == i else {})} for j, row in enumerate(rows)]

    def in_distractor(side: str, text: str) -> list[dict]:
        copies = [dict(row) for row in rows]
        row = next(row for row in copies if row["id"] == with_end[side]["id"])
        old = last_distractor(row, side)
        put(row, side, old, f"{old} {text.format(n=row['id'][1:])}")
        return copies

    first = rows[0]
    return {
        "answer_in_short_distractors": in_distractor("short", "Rumour has it: TOWN{n}VILLE!"),
        "answer_in_long_distractors": in_distractor("long", "See town{n}ville."),
        "evidence_repeated": in_distractor("long", "Person {n} works for firm {n}."),
        "evidence_differs": changed(short_evidence=first["short_evidence"][1:]),
        "validation_question_in_train": [*rows[:-1], {**rows[1], "id": "other", "prompt": "x", "long_prompt": "x"}],
        "prompt_in_both_splits": [*rows[:-1], {**rows[-1], "prompt": rows[1]["prompt"]}],
        "id_repeated": changed(1, id=first["id"]),
        "chosen_in_prompt": changed(long_prompt=first["long_prompt"] + first["chosen"]),
        "rejected_in_prompt": changed(prompt=first["prompt"] + first["rejected"]),
        "chosen_is_wrong": changed(chosen="Town0ville it may be. The answer is: Elsewhere."),
        "rejected_is_right": changed(rejected=first["chosen"] + " indeed"),
        "long_not_longer": changed(long_tokens=first["short_tokens"]),
    }


@pytest.mark.parametrize("check", CHECKS)
def test_every_planted_fault_is_found(work, tmp_path, check):
    """The fault is found, by its check (a planted text may also trip one that is bound to come with it)."""
    data = tmp_path / "data"
    train, val = (list(read_jsonl(data / f"toy_solopo{end}.jsonl")) for end in ("", "_val"))
    rows = planted([*train, *val])[check]
    write_jsonl(data / "toy_solopo.jsonl", rows[:-1])
    write_jsonl(data / "toy_solopo_val.jsonl", rows[-1:])
    found = inspect(data / "toy_solopo.jsonl", tmp_path / "out").failed
    bound = {"validation_question_in_train": {"evidence_repeated", "evidence_differs"}}.get(check, set())
    bound |= {"prompt_in_both_splits": {"evidence_repeated", "evidence_differs"}}.get(check, set())
    assert len(found[check]) == 1
    assert {name for name, ids in found.items() if ids} - bound == {check}
    page = Page(tmp_path / "out" / "index.html")
    assert CHECKS[check] in page.text and ("a", {"href": f"#row={found[check][0]}"}) in page.tags


@pytest.mark.parametrize("check", ["validation_question_in_train", "prompt_in_both_splits"])
@pytest.mark.parametrize("first", ["train", "val"])
def test_a_leak_is_found_in_either_order(work, tmp_path, check, first):
    """A work folder has the rows of both splits in one order, in which validation may come first."""
    source = open_source(tmp_path / "data" / "toy_solopo.jsonl")
    rows = [row for _, row in source.rows()]
    pair = [("train", rows[1]), ("val", planted(rows)[check][-1])]
    leaky = replace(source, rows=lambda: iter(pair if first == "train" else pair[::-1]))
    assert len(gather(leaky).failed[check]) == 1


@pytest.mark.parametrize(
    "gold, said, right",
    [
        ("no", "The answer is: No answer.", False),
        ("no", "The answer is: No.", True),
        ("US", "The answer is: Russia", False),
        ("Rosvik", "<think>The answer is: Rosvik</think> Karvik", False),
        ("Rosvik", "The answer is: Rosvik. Note that the answer is stated in document 3.", True),
    ],
)
def test_right_and_wrong_are_the_judges(work, tmp_path, gold, said, right):
    row = next(iter(read_jsonl(tmp_path / "data" / "toy_solopo.jsonl")))
    row |= {"answers": [gold], "chosen": said, "rejected": said}
    wanted = {"rejected_is_right"} if right else {"chosen_is_wrong"}
    assert checks_of(row) & {"rejected_is_right", "chosen_is_wrong"} == wanted


def test_paragraphs_left_out_on_purpose_are_no_fault(work, tmp_path):
    data = tmp_path / "data" / "toy_solopo.jsonl"
    rows = list(read_jsonl(data))
    rows[0] |= {"short_dropped": [0], "short_evidence": rows[0]["short_evidence"][1:]}
    write_jsonl(data, rows)
    assert not inspect(data, tmp_path / "out").failed["evidence_differs"]


def test_documents_that_cannot_be_told_apart_are_said_so(work, tmp_path):
    data = tmp_path / "data" / "toy_solopo.jsonl"
    write_jsonl(data, [row | {"short_paragraphs": 9} for row in read_jsonl(data)])
    assert inspect(data, tmp_path / "out").unparsed == 5
    assert "distractors were not checked" in Page(tmp_path / "out" / "index.html").text


def test_documents():
    prompt = context(3)["long"]["prompt"]
    documents = split_documents(prompt, 12)
    assert len(documents) == 12 and all("\n" in text for text in documents)
    assert split_documents(prompt, 13) is None and split_documents("nothing", 1) is None


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> &amp; {{rows}} \u2028 \U0001f600 <!--"


def test_nothing_in_the_data_runs_or_loads(work, tmp_path):
    data = tmp_path / "data" / "toy_solopo.jsonl"
    rows = list(read_jsonl(data))
    for name in ("id", "question", "chosen", "rejected"):
        rows[0][name] += EVIL
    rows[0]["prompt"] = EVIL + rows[0]["prompt"]
    rows[0]["answers"] = [EVIL]
    write_jsonl(data, rows)
    named = data.with_name("<b>x.jsonl")
    shutil.copy(data, named)
    inspect(named, tmp_path / "out")
    page = Page(tmp_path / "out" / "index.html")
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 2 and "b" not in tags
    assert all(attrs["src"].startswith("data:image/png;base64,") for tag, attrs in page.tags if tag == "img")
    assert all(attrs["href"].startswith("#row=") for tag, attrs in page.tags if "href" in attrs)
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    shown = json.loads(page.scripts[0])[0]
    assert "".join(text for text, _ in shown["short"]) == rows[0]["prompt"] and shown["chosen"] == rows[0]["chosen"]
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert sink not in page.scripts[1]


READER = """
const fs = require("fs"), vm = require("vm");
const html = fs.readFileSync(process.argv[2], "utf8");
const scripts = [...html.matchAll(/<script[^>]*>([^]*?)<\\/script>/g)].map((found) => found[1]);
class Element {
  constructor(tag) { Object.assign(this, {tagName: tag.toUpperCase(), children: [], own: "", on: {}, value: ""});
    const classes = new Set();
    this.classList = {add: (c) => classes.add(c), remove: (c) => classes.delete(c), contains: (c) => classes.has(c)}; }
  get textContent() { return this.own + this.children.map((child) => child.textContent).join(""); }
  set textContent(text) { this.own = text; this.children = []; }
  append(...parts) { this.children.push(...parts); }
  replaceChildren(...parts) { this.own = ""; this.children = parts; }
  querySelectorAll(tag) { return this.children.filter((child) => child.tagName === tag.toUpperCase()); }
  addEventListener(name, act) { this.on[name] = act; }
  scrollIntoView() { Element.seen = this.textContent; }
  focus() { Element.focused = this; }
}
const made = {}, page = {}, location = {hash: ""};
const document = {
  getElementById: (id) => made[id] ??= new Element(id === "search" ? "input" : "div"),
  createElement: (tag) => new Element(tag), addEventListener: (name, act) => page[name] = act,
};
made.rows = new Element("script"); made.rows.textContent = scripts[0];
vm.runInNewContext(scripts[1], {document, location, addEventListener: (name, act) => page[name] = act});
const key = (name, more) => page.keydown({key: name, target: new Element("body"), preventDefault() {}, ...more});
const texts = () => Object.fromEntries(["place", "question", "short", "long", "chosen", "rejected", "facts"]
  .map((id) => [id, made[id].textContent]));
const out = {first: texts()};
key("ArrowRight"); out.second = texts();
key("ArrowLeft"); key("ArrowLeft"); out.last = texts();
key("ArrowRight", {ctrlKey: true}); out.ctrl = texts();
key("ArrowRight", {target: made.search}); out.typing = texts();
made.before.on.click(); made.after.on.click(); made.after.on.click(); out.clicked = texts();
key("l"); out.evidence = [Element.seen]; key("l"); out.evidence.push(Element.seen);
key("l"); out.evidence.push(Element.seen); key("s"); out.evidence.push(Element.seen);
key("/"); out.focused = Element.focused === made.search;
made.search.value = process.argv[3]; made.search.on.input(); out.search = texts();
made.search.value = "no such thing"; made.search.on.input(); out.none = texts();
location.hash = "#row=" + encodeURIComponent(process.argv[4]); page.hashchange(); out.hash = texts();
console.log(JSON.stringify(out));
"""


@pytest.mark.skipif(not shutil.which("node"), reason="the reader's script is tried with node")
def test_the_reader_is_used_by_keyboard_search_and_link(work, tmp_path):
    inspect(work, tmp_path / "out")
    (tmp_path / "reader.js").write_text(READER)
    rows = json.loads(Page(tmp_path / "out" / "index.html").scripts[0])
    command = [
        "node",
        tmp_path / "reader.js",
        tmp_path / "out" / "index.html",
        rows[3]["question"][6:].upper(),
        rows[4]["id"],
    ]
    seen = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    def is_row(state: dict, row: dict) -> bool:
        assert state["short"] == "".join(text for text, _ in row["short"])
        assert state["long"] == "".join(text for text, _ in row["long"])
        assert (state["chosen"], state["rejected"]) == (row["chosen"], row["rejected"])
        return (
            row["id"] in state["place"] and state["question"] == row["question"] and "pass rate short" in state["facts"]
        )

    assert is_row(seen["first"], rows[0]) and seen["first"]["place"].startswith("1 of 6: ")
    assert is_row(seen["second"], rows[1]) and is_row(seen["last"], rows[5])
    assert seen["ctrl"] == seen["typing"] == seen["last"] and is_row(seen["clicked"], rows[0])
    marked = {side: [text for text, evidence in rows[0][side] if evidence] for side in ("short", "long")}
    assert seen["evidence"] == [*marked["long"], marked["long"][0], marked["short"][0]]
    assert seen["focused"] and is_row(seen["search"], rows[3]) and seen["search"]["place"].startswith("1 of 1: ")
    assert seen["none"]["place"] == "no such row" and seen["none"]["short"] == ""
    assert is_row(seen["hash"], rows[4])


def test_rows_of_the_reader(work, tmp_path):
    """So many, spread evenly; those asked for by id on top; an id that is not there is a sentence."""
    inspect(work, tmp_path / "out", 2)
    spread = [row["id"] for row in json.loads(Page(tmp_path / "out" / "index.html").scripts[0])]
    order = [row["id"] for row in read_jsonl(work / "pairs.jsonl") if row["set"] == "solopo"]
    assert spread == [order[0], order[3]]
    inspect(work, tmp_path / "out", 4)
    four = [row["id"] for row in json.loads(Page(tmp_path / "out" / "index.html").scripts[0])]
    assert len(order) == 6 and four == [order[0], order[1], order[3], order[4]]
    inspect(work, tmp_path / "out", 2, (order[4],))
    assert [row["id"] for row in json.loads(Page(tmp_path / "out" / "index.html").scripts[0])] == [*spread, order[4]]
    with pytest.raises(DataError, match="has no row of question 'q99'"):
        inspect(work, tmp_path / "out", 2, ("q99",))


EVIDENCE = "a list of {paragraph, start, end}, whole numbers, got "
WRONG = {  # the column's value, and what the sentence says of it
    "long_tokens": (None, "a whole number, got None"),
    "chosen_tokens": (7.0, "a whole number, got 7.0"),
    "long_evidence": (None, EVIDENCE + "None"),
    "short_evidence": ([{"paragraph": 1, "start": "0", "end": 2}], EVIDENCE + "[{'paragraph': 1, 'start': '0'"),
    "answers": ("Town", "a list of texts, got 'Town'"),
    "id": (5, "a text, got 5"),
    "hops": (True, "a whole number, got True"),
    "pass_rate_short": (float("nan"), "a finite number, got nan"),
    "all_rejected": (["No.", None], "a list of texts, got ['No.', None]"),
}


@pytest.mark.parametrize("column", WRONG)
def test_an_exported_value_of_another_type_is_told_with_file_row_and_column(work, tmp_path, column):
    value, sentence = WRONG[column]
    path = tmp_path / "data" / "toy_solopo.jsonl"
    rows = list(read_jsonl(path))
    write_jsonl(path, [*rows[:2], rows[2] | {column: value}, *rows[3:]])
    with pytest.raises(DataError) as error:
        inspect(path, tmp_path / "out")
    assert str(error.value).startswith(f"{path}, row 3: column `{column}` must be {sentence}"), error.value


@pytest.mark.slow
def test_the_command(work, tmp_path):
    def call(*words) -> subprocess.CompletedProcess:
        command = [sys.executable, ROOT / "scripts" / "inspect_data.py", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=None)

    done = call(work)
    assert done.returncode == 0 and f"6 rows; the page is {tmp_path / 'work_inspection' / 'index.html'}" in done.stdout
    tokens = inspect(work, tmp_path / "again").tokens
    for part, values in tokens.items():
        line = f"{part} {sum(values) / len(values):.0f} {min(values)} {max(values)}"
        assert line in [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert f"of {len(CHECKS)} checks for leaks and faults found nothing." in done.stdout
    (work / "pairs.jsonl").unlink()
    done = call(work)
    assert done.returncode == 1 and "is no finished work folder: pairs.jsonl is missing" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    (tmp_path / "x.jsonl").write_text('{"prompt": "a"}\n')
    assert "lacks the column `long_prompt`; only exports" in call(tmp_path / "x.jsonl").stderr
    assert "is neither a work folder nor a .jsonl or .parquet file" in call(ROOT / "README.md").stderr
    assert "there is no such file" in call(tmp_path / "y.jsonl").stderr
