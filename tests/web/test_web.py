"""LlamaBoard as a user sees it: a real `llamafactory-cli webui` on loopback, driven in headless Chromium.

`make test-web` installs what is needed (Playwright's Python package, Debian's `chromium`) and runs this file.
`SOLOPO_SCREENSHOT=docs/board.png` keeps the picture of the filled section.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import time

import pytest
import yaml
from browser import SIZES, browser, expect
from conftest import BIN, ROOT

from solopo_plugin.args import FIELDS
from solopo_plugin.host.board_texts import TAB, TEXTS

FAST = '{"use_cpu": true, "preprocessing_num_workers": 1, "disable_tqdm": true, "optim": "adamw_torch"}'
LEAF = ".block:not(:has(.block))"  # one widget with its label


@pytest.fixture(scope="module")
def board(tmp_path_factory, tiny_model):
    """A running board: `url`, its working `folder`, its `log`. The model is the one that was used last."""
    from types import SimpleNamespace

    folder = tmp_path_factory.mktemp("board")
    shutil.copytree(ROOT / "data", folder / "data")
    (folder / "llamaboard_cache").mkdir()
    shutil.copytree(tiny_model(), folder / "tiny-qwen2")
    model = {"lang": "en", "hub_name": None, "last_model": "Custom", "path_dict": {"Custom": "tiny-qwen2"},
             "cache_dir": None}  # fmt: skip
    (folder / "llamaboard_cache" / "user_config.yaml").write_text(yaml.safe_dump(model))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "GRADIO_SERVER_NAME": "127.0.0.1", "CUDA_VISIBLE_DEVICES": "",
        "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False", "BROWSER": "true",
    }  # fmt: skip
    log = folder / "board.log"
    with log.open("w") as stream:
        server = subprocess.Popen(
            [BIN / "llamafactory-cli", "webui"], cwd=folder, env=env, stdout=stream, stderr=stream
        )
    try:
        for _ in range(240):
            assert server.poll() is None, log.read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", folder=folder, log=log)
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def chromium():
    with browser() as started:
        yield started


@pytest.fixture
def page(board, chromium, request):
    """The freshly loaded page; at the end the browser's console holds no error of ours."""
    size = getattr(request, "param", "laptop")
    page = chromium.new_page(viewport=SIZES[size])
    page.set_default_timeout(120000)
    expect.set_options(timeout=120000)
    errors = page.errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if is_error(message, board.url) else None)
    load(page, board)
    yield page
    page.close()
    assert errors == []


def is_error(message, url: str) -> bool:
    """Whether a console message is an error of this server's; fonts and a script from elsewhere need the internet."""
    elsewhere = message.location.get("url", "").startswith("https://") or "https://fonts" in message.text
    return message.type == "error" and not elsewhere


def load(page, board) -> None:
    page.goto(board.url)
    expect(field(page, "Model path").locator("textarea")).not_to_have_value("")


# ---- widgets, by their label


def field(page, label: str, within=None):
    """The visible widget with exactly this label."""
    text = page.locator("span", has_text=re.compile(rf"^\s*{re.escape(label)}\s*$"))
    return (within or page).locator(LEAF).filter(has=text).filter(visible=True).first


def choose(page, label: str, value: str) -> None:
    field(page, label).locator("input").click()
    page.get_by_role("option", name=value, exact=True).click()


def choose_stage(page, stage: str) -> None:
    """Choose it, and wait until the page has heard what the change means for the other widgets."""
    with page.expect_response(lambda response: "/run/predict" in response.url):
        choose(page, "Stage", stage)


def expect_offered(page, label: str, names: list[str]) -> None:
    """The list of a widget ends with exactly these; read whole and again until then, for lists change on the way."""
    seen, deadline = [], time.monotonic() + 60
    while seen[-len(names) :] != names and time.monotonic() < deadline:
        field(page, label).locator("input").click()
        options = page.get_by_role("option")
        options.first.wait_for()
        seen = options.evaluate_all("all => all.map(option => option.getAttribute('aria-label'))")
        page.keyboard.press("Tab")
    assert seen[-len(names) :] == names


def type_text(page, label: str, value: str) -> None:
    field(page, label).locator("textarea, input").first.fill(value)


def type_number(page, label: str, value) -> None:
    box = field(page, label).locator("input[type=number]")
    box.fill(str(value))
    box.press("Tab")


def shown(page, name: str):
    """What a widget of the section shows."""
    widget = field(page, TEXTS[name]["en"][0])
    if name in FIELDS and FIELDS[name].type is bool:
        return widget.locator("input").is_checked()
    return widget.locator("input[type=number], textarea, input").first.input_value()


def press(page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).filter(visible=True).click()


def open_section(page, label: str) -> None:
    page.get_by_role("button", name=re.compile(f"^{re.escape(label)}")).click()


def prepare(page, output_dir: str, **changes) -> None:
    """Everything that a small run on a CPU needs, chosen and typed in the page."""
    choose_stage(page, "SoLoPO")
    choose(page, "Chat template", "qwen")
    choose(page, "Compute type", "fp32")
    type_text(page, "Max samples", changes.get("max_samples", "16"))
    type_text(page, "Epochs", changes.get("epochs", "4"))
    type_number(page, "Batch size", 2)
    type_number(page, "Gradient accumulation", 1)
    open_section(page, "Extra configurations")
    type_number(page, "Logging steps", 1)
    type_text(page, "Extra arguments", FAST)
    type_text(page, "Output dir", output_dir)
    page.keyboard.press("Enter")
    choose(page, "Dataset", "demo_solopo")  # not right after the stage, whose change empties it
    page.keyboard.press("Tab")
    open_section(page, "SoLoPO configurations")


def previewed(page) -> list[str]:
    """The command that "Preview command" shows, split as a shell splits it."""
    press(page, "Preview command")
    code = page.locator(".prose code").filter(has_text="llamafactory-cli").filter(visible=True)
    code.wait_for()
    return shlex.split(code.inner_text().replace("\\\n", " "))


# ---- choosing


def test_stage_data_sets_and_preview_of_rows(page):
    expect_offered(page, "Stage", ["Pre-Training", "SoLoPO"])
    choose_stage(page, "DPO")
    expect_offered(page, "Dataset", ["demo_short_po", "demo_expand_long_po"])
    choose_stage(page, "SoLoPO")
    expect_offered(page, "Dataset", ["demo_solopo", "demo_history"])
    choose(page, "Dataset", "demo_solopo")
    page.keyboard.press("Escape")
    press(page, "Preview dataset")
    rows = page.locator(".modal-box").filter(visible=True)
    expect(rows).to_contain_text("long_prompt")
    keys = re.findall(r'"(prompt|long_prompt|chosen|rejected)"', rows.inner_text())
    assert keys == ["prompt", "long_prompt", "chosen", "rejected"] * 2, rows.inner_text()
    rows.get_by_role("button", name="Close", exact=True).click()
    expect(rows).to_have_count(0)


FILLED = {
    "solopo_alpha": "2.5", "solopo_align": "logp", "solopo_align_on": "both", "solopo_penalty": "drop",
    "solopo_detach_short": True, "solopo_objective": "solopo", "solopo_longpo_lambda": "0.01",
    "solopo_distill_kl": "forward", "solopo_distill_temperature": "1.0", "solopo_distill_topk": "0",
    "solopo_anchor": "0.1", "solopo_overlength": "drop", "solopo_forward": "two_stage", "solopo_reference": "online",
    "solopo_logp_chunk": "256", "solopo_mlp_chunk": "64", "solopo_sequence_parallel": "1", "simpo_gamma": "0.7",
}  # fmt: skip


def fill_section(page) -> None:
    for name, value in FILLED.items():
        widget, label = field(page, TEXTS[name]["en"][0]), TEXTS[name]["en"][0]
        if value is True:
            widget.locator("input").check()
        elif widget.locator("input[role=listbox]").count():
            choose(page, label, value)
        elif widget.locator("input[type=number]").count():
            type_number(page, label, value)
        else:
            type_text(page, label, value)


def test_filled_section_through_preview_save_load_and_five_languages(page, board):
    from llamafactory.hparams.parser import _parse_train_args

    prepare(page, "filled")
    open_section(page, "RLHF configurations")
    choose(page, "Loss type", "simpo")
    type_number(page, "Beta value", 0.3)
    type_number(page, "Ftx gamma", 0.5)
    fill_section(page)
    if os.environ.get("SOLOPO_SCREENSHOT"):
        take_picture(page, os.environ["SOLOPO_SCREENSHOT"])

    command = previewed(page)
    assert command[:2] == ["llamafactory-cli", "train"]
    _, data_args, _, finetuning_args, _ = _parse_train_args(command[2:])
    parsed = vars(data_args) | vars(finetuning_args)
    expected = {n: type(FIELDS[n].default)(v) for n, v in FILLED.items() if n in FIELDS}
    expected |= {"stage": "solopo", "simpo_gamma": 0.7, "pref_loss": "simpo", "pref_beta": 0.3, "pref_ftx": 0.5}
    assert {name: parsed[name] for name in expected} == expected
    given = {a[2:] for a in command if a.startswith("--")}
    assert {n for n in given if n.startswith(("solopo", "simpo", "pref"))} == set(expected) - {"stage"} - {
        n for n, v in expected.items() if v is False
    }

    type_text(page, "Config path", "round.yaml")
    page.keyboard.press("Enter")
    press(page, "Save arguments")
    expect(page.get_by_text("Arguments have been saved at").filter(visible=True).first).to_be_visible()
    load(page, board)
    open_section(page, "SoLoPO configurations")
    assert shown(page, "solopo_alpha") == "1.0"
    type_text(page, "Config path", "round.yaml")
    page.keyboard.press("Enter")
    press(page, "Load arguments")
    expect(page.get_by_text("Arguments have been restored").filter(visible=True).first).to_be_visible()
    expect(field(page, "Alpha").locator("textarea")).to_have_value("2.5")
    assert {name: shown(page, name) for name in FILLED} == FILLED
    assert field(page, "Stage").locator("input").input_value() == "SoLoPO"

    for lang in ("ru", "zh", "ko", "ja", "en"):
        page.get_by_role("listbox").first.click()
        page.get_by_role("option", name=lang, exact=True).click()
        section = section_of(page, lang)
        expect(section).to_be_visible()
        for by_lang in TEXTS.values():
            label, info = by_lang[lang]
            expect(field(page, label, section)).to_contain_text(info)
        check_layout(page, section)
    assert {name: shown(page, name) for name in FILLED} == FILLED
    again = previewed(page)
    assert again[again.index("--dataset") + 1] == "demo_solopo"
    where = command.index("--output_dir") + 1  # not part of a saved configuration
    assert [a for i, a in enumerate(again) if i != where] == [a for i, a in enumerate(command) if i != where]


def take_picture(page, path: str) -> None:
    """The Train tab from its head to the end of the section."""
    open_section(page, "Extra configurations")
    page.mouse.move(0, 0)
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(500)  # accordions slide
    head, section = page.get_by_role("tablist").first.bounding_box(), section_of(page).bounding_box()
    height = section["y"] + section["height"] + 12 - head["y"]
    clip = {"x": 0, "y": head["y"], "width": SIZES["laptop"]["width"], "height": height}
    page.screenshot(path=path, full_page=True, animations="disabled", clip=clip)
    open_section(page, "Extra configurations")


def section_of(page, lang: str = "en"):
    return page.locator(".block", has=page.locator(":scope > button", has_text=TAB[lang])).first


def test_a_bad_alpha_gets_its_sentence_and_the_page_goes_on(page):
    prepare(page, "bad")
    sentence = "`solopo_alpha` must be a number >= 0, got 'two'."
    type_text(page, "Alpha", "two")
    for button in ("Preview command", "Start", "Save arguments"):
        press(page, button)
        toast = page.get_by_test_id("toast-body").filter(has_text=re.compile("solopo_alpha.* must be a number >= 0"))
        expect(toast.first).to_be_visible()
        assert sentence.replace("`", "") in toast.first.inner_text().replace("`", "")
        page.evaluate("document.querySelectorAll('[data-testid=toast-close]').forEach(button => button.click())")
        expect(page.get_by_test_id("toast-body")).to_have_count(0)
    type_text(page, "Alpha", "2")
    command = previewed(page)
    assert command[command.index("--solopo_alpha") + 1] == "2"


# ---- running


def test_a_run_to_its_end_reloaded_on_the_way_then_chat_and_export(page, board):
    name = f"whole_{time.monotonic_ns()}"  # a second attempt must not find the first one's
    prepare(page, name, epochs="20")
    type_text(page, "Alpha", "2")
    press(page, "Start")
    out = board.folder / "saves" / "Custom" / "lora" / name
    progress = page.get_by_text(re.compile(r"Running \d+/\d+")).filter(visible=True)
    progress.first.wait_for(timeout=240000)
    page.reload()
    page.errors.clear()  # the streams of the page that was left break off
    expect(field(page, "Model path").locator("textarea")).not_to_have_value("")
    expect(field(page, "Stage").locator("input")).to_have_value("SoLoPO")  # the running job's values are back
    chart = page.locator("[data-testid=matplotlib] img, .plot-container img, img[src*='data:image'], .matplotlib img")
    chart.filter(visible=True).first.wait_for(timeout=240000)
    finished = page.get_by_text("Finished.").filter(visible=True)
    finished.first.wait_for(timeout=400000)
    assert shown_after_opening(page) == "2"

    log = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
    assert all(entry["align_loss"] >= 0 and "reward_gap" in entry for entry in log if "loss" in entry)
    assert (out / "adapter_model.safetensors").exists()
    assert yaml.safe_load((out / "training_args.yaml").read_text())["solopo_alpha"] == 2
    assert yaml.safe_load((out / "llamaboard_config.yaml").read_text())["train.solopo_alpha"] == "2"
    picture = chart.filter(visible=True).first.evaluate("i => [i.naturalWidth, i.naturalHeight]")
    assert picture[1] > picture[0], "two charts, one above the other"

    load(page, board)
    choose(page, "Checkpoint path", name)
    page.keyboard.press("Escape")
    choose(page, "Chat template", "qwen")
    page.get_by_role("tab", name="Chat").click()
    press(page, "Load model")
    expect(page.locator("textarea:visible", has_text="").filter(visible=True).first).to_be_visible()
    page.wait_for_function(
        "[...document.querySelectorAll('textarea')].some(t => t.value.startsWith('Model loaded'))", timeout=240000
    )
    press(page, "Unload model")
    page.get_by_role("tab", name="Export").click()
    type_text(page, "Export dir", "exported")
    press(page, "Export")
    page.wait_for_function(
        "[...document.querySelectorAll('textarea')].some(t => t.value.startsWith('Model exported'))", timeout=240000
    )
    assert (board.folder / "exported" / "model.safetensors").exists()


def shown_after_opening(page) -> str:
    open_section(page, "SoLoPO configurations")
    return shown(page, "solopo_alpha")


def test_another_run_is_aborted(page, board):
    name = f"aborted_{time.monotonic_ns()}"
    prepare(page, name, epochs="2000")
    press(page, "Start")
    page.get_by_text(re.compile(r"Running \d+/\d+")).filter(visible=True).first.wait_for(timeout=240000)
    press(page, "Abort")
    page.get_by_text("Ready.").filter(visible=True).first.wait_for(timeout=240000)
    press(page, "Preview command")
    page.locator(".prose code").filter(has_text="llamafactory-cli").filter(visible=True).wait_for()
    log = (board.folder / f"saves/Custom/lora/{name}/trainer_log.jsonl").read_text().splitlines()
    assert 0 < len(log) < json.loads(log[-1])["total_steps"]


# ---- by keyboard

LAYOUT = """section => {
  const wide = document.documentElement, cut = [];
  if (wide.scrollWidth > wide.clientWidth) cut.push(`page is ${wide.scrollWidth} wide`);
  const leaves = [...section.querySelectorAll('.block')].filter(b => !b.querySelector('.block'));
  const boxes = leaves.map(b => [b.innerText.split('\\n')[0], b.getBoundingClientRect()]);
  for (const [name, a] of boxes) {
    if (a.width < 40 || a.height < 20 || a.left < 0 || a.right > innerWidth) cut.push(`${name} is outside or small`);
    for (const [other, b] of boxes)
      if (a !== b && a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)
        cut.push(`${name} overlaps ${other}`);
  }
  for (const leaf of leaves) {
    const box = leaf.getBoundingClientRect();
    for (const part of leaf.querySelectorAll('span, p, textarea, input:not([type=range])')) {
      const r = part.getBoundingClientRect();
      if (r.width && (r.left < box.left - 1 || r.right > box.right + 1 || r.bottom > box.bottom + 1))
        cut.push(`${part.tagName} leaves ${leaf.innerText.split('\\n')[0]}`);
      if (r.width && part.scrollWidth > part.clientWidth + 1 && getComputedStyle(part).overflow !== 'visible')
        cut.push(`${part.tagName} of ${leaf.innerText.split('\\n')[0]} is cut`);
    }
  }
  return [boxes.length, cut];
}"""


def check_layout(page, section) -> None:
    """Nothing of the section overlaps, is cut, or makes the page wider than the window."""
    n_boxes, cut = section.evaluate(LAYOUT)
    assert n_boxes == len(TEXTS) and cut == []


FOCUSED = """() => {
  const e = document.activeElement, r = e.getBoundingClientRect();
  const leaf = e.closest('.block');
  const at = document.elementFromPoint(r.left + r.width / 2, r.top + r.height / 2);
  const name = (leaf && leaf.querySelector('[data-testid=block-info]')) || leaf || e;
  return {label: name.innerText.trim().split('\\n')[0].trim(), kind: e.type || e.tagName, text: e.innerText,
          inside: r.left >= 0 && r.right <= innerWidth + 1 && r.top >= 0 && r.bottom <= innerHeight + 1,
          free: !!at && (at === e || e.contains(at) || at.contains(e) || (!!leaf && leaf.contains(at)))};
}"""


def tab_until(page, wanted, seen: list, limit: int = 150) -> dict:
    """Press Tab until the focused element is `wanted`; on the way each is inside the window and not covered."""
    for _ in range(limit):
        page.keyboard.press("Tab")
        focused = page.evaluate(FOCUSED)
        seen.append(focused)
        if wanted(focused):
            return focused
    raise AssertionError(f"not reached; passed {[s['label'] for s in seen]}")


@pytest.mark.parametrize("page", SIZES, indirect=True)
def test_by_keyboard_alone(page):
    """Stage, data set, section, every widget in it, preview: without a mouse."""
    seen = []
    tab_until(page, lambda f: f["label"] == "Stage", seen)
    page.keyboard.type("SoLoPO")
    page.keyboard.press("Enter")
    tab_until(page, lambda f: f["label"] == "Dataset", seen)
    expect(page.get_by_role("option", name="demo_solopo", exact=True)).to_be_visible()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    tab_until(page, lambda f: f["text"].startswith("SoLoPO configurations"), seen)
    page.keyboard.press("Enter")
    section = section_of(page)
    expect(field(page, "Alpha", section)).to_be_visible()
    check_layout(page, section)
    inside = []
    for name, by_lang in TEXTS.items():
        label = by_lang["en"][0]
        focused = tab_until(page, lambda f, label=label: f["label"] == label, inside, limit=5)
        if name == "solopo_alpha":
            page.keyboard.press("Control+A")
            page.keyboard.type("3.5")
        elif name == "solopo_align":
            page.keyboard.type("logp")
            page.keyboard.press("Enter")
        elif focused["kind"] == "checkbox":
            page.keyboard.press("Space")
    tab_until(page, lambda f: f["text"] == "Preview command", seen)
    page.keyboard.press("Enter")
    code = page.locator(".prose code").filter(has_text="llamafactory-cli").filter(visible=True)
    code.wait_for()
    command = shlex.split(code.inner_text().replace("\\\n", " "))
    for key, value in (("alpha", "3.5"), ("align", "logp"), ("detach_short", "True")):
        assert command[command.index(f"--solopo_{key}") + 1] == value
    assert command[command.index("--dataset") + 1] == "demo_solopo"
    assert [f for f in inside if not (f["inside"] and f["free"])] == []
