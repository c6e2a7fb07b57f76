"""The report as a user reads it, in headless Chromium: nothing fails, nothing is loaded, all is reached by keyboard.

`SOLOPO_SCREENSHOT=docs/evaluation_report.png` keeps a picture of a demonstration with made-up answers.
"""

import json
import os
import sys

import pytest
from browser import SIZES, browser, expect
from conftest import ROOT, Page
from PIL import Image

sys.path.insert(0, str(ROOT / "tests" / "evaluation"))
from made_up import item, items, write_folder  # noqa: E402

from solopo_plugin.evaluation.report import write_report  # noqa: E402
from solopo_plugin.qa.files import read_jsonl, write_jsonl  # noqa: E402

EVIL = "</script><script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\"> <!--"
LOOKS = [(size, scheme) for size in SIZES for scheme in ("light", "dark")]


@pytest.fixture(scope="module")
def chromium():
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page of an evaluation of three models on every benchmark."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_folder(folder, items(3))
    return write_report(folder)


@pytest.fixture
def opened(chromium):
    """Open a file; at the end the console has been silent and nothing but that file was asked for."""
    pages = []

    def start(path, size: str = "laptop", scheme: str = "light"):
        page = chromium.new_page(viewport=SIZES[size], color_scheme=scheme)
        page.said, page.asked = [], []
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("console", lambda message: page.said.append(message.text))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(path.as_uri())
        pages.append((page, path))
        return page

    yield start
    for page, path in pages:
        assert page.said == []
        assert {url for url in page.asked if not url.startswith("data:image/png")} == {path.as_uri()}
        page.close()


def rows_of(report) -> list[dict]:
    return json.loads(Page(report).scripts[0])["rows"]


WIDE = """() => {
  const scrolls = (e) => { for (; e; e = e.parentElement) if (getComputedStyle(e).overflowX === 'auto') return true; };
  const outside = (e) => e.getBoundingClientRect().width && e.getBoundingClientRect().right > innerWidth + 1;
  const found = [...document.querySelectorAll('body *')].filter((e) => outside(e) && !scrolls(e.parentElement));
  return found.map((e) => e.outerHTML.slice(0, 80));
}"""


@pytest.mark.parametrize("size, scheme", LOOKS)
def test_it_opens_at_every_size_without_overflow(report, opened, size, scheme):
    page = opened(report, size, scheme)
    page.evaluate("document.querySelectorAll('details').forEach((part) => part.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth") and page.evaluate(WIDE) == []
    pictures = page.locator("figure img")
    assert pictures.count() == len(list(report.parent.glob("*.png"))) == 9
    for picture in pictures.all():
        natural, drawn, alt = picture.evaluate("i => [i.naturalWidth, i.getBoundingClientRect().width, i.alt]")
        assert natural > 300 and drawn > 300 and alt
    ground, text = page.evaluate("['backgroundColor', 'color'].map((n) => getComputedStyle(document.body)[n])")
    assert (text == "rgb(255, 255, 255)") == (scheme == "dark"), (ground, text)


def test_filters_and_the_list_of_wins_and_losses(report, opened):
    page, rows = opened(report), rows_of(report)
    choose = lambda name, value: page.locator(f"#{name}").select_option(value)  # noqa: E731
    listed = page.locator("#list option")
    expect(listed).to_have_count(len(rows))
    choose("benchmark", "ruler_qa")
    expect(listed).to_have_count(sum(row["benchmark"] == "ruler_qa" for row in rows))
    assert page.locator("#task option").all_inner_texts() == ["all", "squad", "hotpotqa", "musique"]
    choose("task", "squad")
    expect(listed).to_have_count(sum((row["benchmark"], row["task"]) == ("ruler_qa", "squad") for row in rows))
    choose("task", "")
    choose("other", "made-up-c")
    asked = [row for row in rows if row["benchmark"] == "ruler_qa"]
    gain = {row["id"]: row["by"]["made-up-c"]["score"] - row["by"]["made-up-a"]["score"] for row in asked}
    counts = {"won": sum(g > 0 for g in gain.values()), "lost": sum(g < 0 for g in gain.values())}
    counts["tied"] = len(gain) - sum(counts.values())
    said = f"made-up-c wins: {counts['won']}, made-up-c loses: {counts['lost']}, tied: {counts['tied']}"
    assert page.locator("#tally").inner_text() == said and min(counts.values()) > 0
    for kind, n in counts.items():
        choose("result", kind)
        expect(listed).to_have_count(n)
        sign = {"won": "+", "lost": "\u2212", "tied": "="}[kind]
        assert all(text.startswith(sign) for text in listed.all_inner_texts())
    choose("other", "")
    choose("result", "right")
    expect(listed).to_have_count(sum(row["by"]["made-up-a"]["score"] == 100 for row in asked))
    choose("task", "squad")
    choose("benchmark", "plain")  # which has no such task: all
    choose("result", "all")
    expect(listed).to_have_count(sum(row["benchmark"] == "plain" for row in rows))
    page.locator("#search").fill("person 7 work")
    expect(listed).to_have_count(1)
    assert page.locator("#question").inner_text() == "In which town does Person 7 work?"
    page.locator("#search").fill("no such words")
    expect(page.locator("#place")).to_have_text("no such question.")
    assert not page.locator("#where").is_visible() and page.locator("#answers section").count() == 0


def test_a_question_shows_answers_and_where_its_evidence_is(report, opened):
    page, row = opened(report), rows_of(report)[0]
    assert page.locator("#question").inner_text() == row["question"]
    assert row["answers"][0] in page.locator("#facts").inner_text()
    bar = page.locator("#bar").bounding_box()
    for mark, (start, end) in zip(page.locator("#bar i").all(), row["marks"], strict=True):
        box = mark.bounding_box()
        assert box["x"] - bar["x"] == pytest.approx(start * bar["width"], abs=2)
        assert box["width"] == pytest.approx((end - start) * bar["width"], abs=3)
    assert page.locator("#passages mark").all_inner_texts() == [passage["text"] for passage in row["evidence"]]
    for part, (model, by) in zip(page.locator("#answers section").all(), row["by"].items(), strict=True):
        assert part.locator("h4").inner_text() == model and part.locator("pre").text_content() == by["text"]
        assert "prompt tokens" in part.inner_text() and f"{by['scores']['f1']:g}" in part.inner_text()


@pytest.mark.parametrize("size", SIZES)
def test_by_keyboard_alone(report, opened, size):
    page, rows = opened(report, size), rows_of(report)
    place = page.locator("#place")
    page.keyboard.press("ArrowRight")
    expect(place).to_contain_text(f"2 of {len(rows)}: ")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    expect(place).to_contain_text(f"{len(rows)} of {len(rows)}: ")
    for key, kind in (("w", "won"), ("l", "lost"), ("a", "all")):
        page.keyboard.press(key)
        expect(page.locator("#result")).to_have_value(kind)
    page.keyboard.press("/")
    page.keyboard.type("wl/a")  # letters of a search, not commands
    expect(page.locator("#search")).to_have_value("wl/a")
    expect(page.locator("#result")).to_have_value("all")
    page.locator("#search").fill("")
    reached = []
    for _ in range(8):
        page.keyboard.press("Tab")
        seen = "e => [e.id || e.tagName, getComputedStyle(e).outlineStyle, e.getBoundingClientRect().top < innerHeight]"
        name, outline, inside = page.evaluate(f"({seen})(document.activeElement)")
        assert outline != "none" and inside, name
        reached.append(name)
        if name == "list":
            page.keyboard.press("ArrowDown")
            expect(place).to_contain_text(f"2 of {len(rows)}: ")
    assert reached == ["before", "after", "list", *["PRE"] * 5], "two passages, three answers"
    page.evaluate("scrollTo(0, 0); document.activeElement.blur()")
    page.locator("nav a").first.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("scrollY") > 0


def test_what_a_model_says_is_shown_and_not_run(tmp_path, opened):
    write_folder(
        tmp_path, [item("plain", "<img src=x>", i, question=EVIL, answers=[EVIL]) for i in range(2)], ("<b>", "b")
    )
    path = tmp_path / "answers" / "<b>.jsonl"
    write_jsonl(path, [row | {"text": EVIL} if "id" in row else row for row in read_jsonl(path)])
    page = opened(write_report(tmp_path))
    assert page.title() != "run" and page.locator("#question").inner_text().startswith("</script>")
    assert page.locator("#answers section pre").first.text_content() == EVIL
    assert page.locator("img:not(figure img)").count() == 0


def test_one_model(tmp_path, opened):
    write_folder(tmp_path, [item("plain", "own", i) for i in range(4)], ("alone",), selection=None)
    page = opened(write_report(tmp_path))
    assert page.locator("#result option").all_inner_texts() == ["all", "full score", "in between", "score 0"]
    assert page.locator("#list option").count() == 4


def test_the_picture_for_the_docs(tmp_path, opened):
    """Head, a table, figures of RULER QA and NIAH-Plus, and the reader; the rest of the page is taken out."""
    write_folder(tmp_path, items())
    page = opened(write_report(tmp_path))
    page.evaluate(PICTURE)
    box = page.locator("#explorer").bounding_box()
    assert page.locator("figure").count() == 2 and 1000 < box["y"] < 3000
    if path := os.environ.get("SOLOPO_SCREENSHOT"):
        page.screenshot(path=path, full_page=True, animations="disabled")
        Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # a third of its bytes


PICTURE = """() => {
  let section = '';
  for (const part of [...document.body.children]) {
    if (part.tagName === 'H2') section = part.id;
    const chosen = {ruler_qa: 'h2, figure', niah_plus: 'h2, figure:last-of-type', longbench_qa: 'h2, .wide'}[section];
    const first = part.className !== 'wide' || !document.querySelector('.kept');
    const stays = ['', 'questions'].includes(section) || (chosen && part.matches(chosen) && first);
    if (!stays) part.remove();
    else if (part.className === 'wide') part.classList.add('kept');
  }
  document.querySelector('#list').size = 30;
}"""
