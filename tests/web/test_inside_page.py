"""The page of looking inside, in headless Chromium: texts whole, models and rows changed, no error, nothing run."""

import pytest
from browser import SIZES, browser
from small_work import make_row

from solopo_plugin.probe import inside

PLANTED = "</script><b id=planted>why?"


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    made = tmp_path_factory.mktemp("look")
    rows = [make_row(0), make_row(1, question=PLANTED)]
    inside.run({"before": tiny_model(), "after": tiny_model(seed=1)}, rows, made, "qwen")
    return made


@pytest.mark.parametrize("size", SIZES)
def test_the_page(folder, size):
    rows = [make_row(0), make_row(1)]
    with browser() as chromium:
        page, errors = chromium.new_page(viewport=SIZES[size]), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto((folder / "index.html").as_uri())
        for side, column in inside.SIDES.items():
            assert page.locator(f"#{side}").text_content() == rows[0][column]
        assert page.locator("#response").text_content() == rows[0]["chosen"] + "<|im_end|>\n"
        first = page.locator("#response span").first
        before = first.get_attribute("title")
        page.locator("#model").select_option("after")
        assert first.get_attribute("title") != before and "log-prob" in before
        page.locator("body").press("ArrowRight")
        assert page.locator("#place").text_content() == "2 of 2: q1"
        assert page.locator("#question").text_content() == PLANTED and page.locator("#planted").count() == 0
        assert page.locator("#long").text_content() == rows[1]["long_prompt"]
        marked = "".join(page.locator("#long .evidence").all_text_contents())
        assert all(rows[1]["long_prompt"][p["start"] : p["end"]] in marked for p in rows[1]["long_evidence"])
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth") and errors == []
        page.close()
