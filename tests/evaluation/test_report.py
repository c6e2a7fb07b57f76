"""The report says what results.json says, no more; nothing in it runs or loads; it stays small whatever was asked."""

import csv
import json
import re
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
from conftest import Page
from made_up import CHANCES, HARNESS, LENGTHS, LONGBENCH, TITLE, item, items, write_folder

from solopo_plugin.evaluation.items import EACH_OWN, GROUPS, MAIN_METRIC
from solopo_plugin.evaluation.published import PUBLISHED, matches
from solopo_plugin.evaluation.report import explorer, figures, write_report
from solopo_plugin.evaluation.report.figures import COLORS, differences, draw_figures
from solopo_plugin.evaluation.report.tables import NONE, Summary, benchmark_tables, harness_table
from solopo_plugin.evaluation.results import make_results
from solopo_plugin.qa.files import DataError, read_jsonl, write_json, write_jsonl
from solopo_plugin.qa.pages import png

PICTURED = {  # bytes that must be the same, and what shows where text and axes are laid out
    "test_written_again_it_is_the_same_and_old_figures_go", "test_a_torn_last_line_of_answers_is_left_out",
    "test_a_task_without_lengths_and_a_model_without_a_task", "test_a_cell_without_questions_and_names_with_dollars",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Draw, but keep of a PNG its first bytes alone where no test looks at one: they take most of a report's time."""
    if request.function.__name__ not in PICTURED:
        monkeypatch.setattr("solopo_plugin.evaluation.report.png", lambda figure: b"\x89PNG\r\n\x1a\n")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of an evaluation of every benchmark with its report; (folder, results)."""
    folder = tmp_path_factory.mktemp("evaluation")
    results = write_folder(folder, items(2))
    assert write_report(folder) == folder / "report" / "index.html"
    return folder, results


def few(*benchmarks: str):
    """One question of each cell of these benchmarks."""
    return [it for it in items(1) if it.benchmark in benchmarks]


def markdown_table(folder, section: str, title: str) -> list[list[str]]:
    """Cells of the lines of a table in report.md, head first."""
    text = (folder / "report" / "report.md").read_text(encoding="utf-8")
    part = re.search(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)[1]
    table = re.search(rf"^### {re.escape(title)}\n\n(.*?)\n\n", part, re.M | re.S)[1].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table if not line.startswith("|---")]


def row_of(rows: list[dict], **where) -> dict:
    """The only row with these values that is grouped by nothing else."""
    (one,) = [row for row in rows if all(row[k] == v for k, v in (dict.fromkeys(GROUPS) | where).items())]
    return one


def shown(results: dict, model: str, benchmark: str, task: str, metric: str | None = None, **group) -> str:
    """A value as a table must show it."""
    metric = metric or MAIN_METRIC[benchmark]
    row = row_of(results["summary"], model=model, benchmark=benchmark, task=task, metric=metric, **group)
    return f"{row['value']:.1f} ({row['low']:.1f} to {row['high']:.1f}, n={row['n']})"


# ---- tables


@pytest.mark.slow
def test_longbench_in_the_papers_layout_with_its_numbers_apart(made):
    folder, results = made
    head, first, *lines = markdown_table(folder, "LongBench v1 QA", "F1")
    names = ["NarrativeQA", "Qasper", "MultiFieldQA-en", "HotpotQA", "2WikiMQA", "MuSiQue"]
    bands = [f"{'S' if i < 3 else 'M'}-Doc: {name}" for i, name in enumerate(names)]
    assert head == ["", *bands, "mean of tasks"] and first[0] == "**Measured here**"
    for model, line in zip(CHANCES, lines, strict=False):
        assert line == [model, *(shown(results, model, "longbench_qa", task) for task in (*LONGBENCH, ""))]
    apart, *published = lines[len(CHANCES) :]
    assert apart[0] == "**Published in arXiv:2505.11166 (not measured here)**"
    assert [line[0] for line in published] == [row.name for row in PUBLISHED]
    assert all(not any(line[1:-1]) and re.fullmatch(r"\d\d\.\d( \?)?", line[-1]) for line in published)
    assert [line[0] for line in published if line[-1].endswith("?")] == [
        "Qwen2.5-7B, ORPO short",
        "Qwen2.5-7B, ORPO long",
    ]
    page = Page(folder / "report" / "index.html")
    assert page.tags.count(("tbody", {"class": "published"})) == 2, "LongBench v1 QA and RULER QA"
    assert "worded otherwise" in page.text and "repeat its rows of SFT" in page.text


def test_ruler_by_task_and_length_with_its_own_metric_beside(made):
    folder, results = made
    for metric, title in (("f1", "F1"), ("string_match", "RULER's string match")):
        head, *lines = markdown_table(folder, "RULER QA", title)
        assert [name.split(": ")[-1] for name in head] == ["", "4k", "8k", "16k", "32k", "all lengths"]
        blocks = [line[0] for line in lines if line[0].startswith("**Measured")]
        tasks = {"SQuAD": "squad", "HotpotQA": "hotpotqa", "MuSiQue": "musique", "mean of tasks": ""}
        assert blocks == [f"**Measured here: {name}**" for name in tasks]
        for i, task in enumerate(tasks.values()):
            for j, model in enumerate(CHANCES):
                groups = [*({"length": length} for length in LENGTHS), {}]
                cells = [shown(results, model, "ruler_qa", task, metric, **group) for group in groups]
                assert lines[i * (1 + len(CHANCES)) + 1 + j] == [model, *cells]
        assert any("Published" in line[0] for line in lines) == (metric == "f1"), "the paper's numbers are F1"


EASY_TO_LONG = [{"difficulty": name} for name in ("easy", "hard")]
EASY_TO_LONG += [{"length_class": name} for name in ("short", "medium", "long")]


def test_longbench_v2_and_validation(made):
    folder, results = made
    lenient = "Accuracy, lenient: the last letter, not the official parser's first"
    for title, metric in (("Accuracy", "accuracy"), (lenient, "accuracy_lenient")):  # both open, the official one first
        head, _, *lines = markdown_table(folder, "LongBench v2", title)
        classes = [f"length: {name}" for name in ("short", "medium", "long")]
        assert head == ["", "all questions", "difficulty: easy", "difficulty: hard", *classes]
        for model, line in zip(CHANCES, lines, strict=True):
            wanted = [shown(results, model, "longbench_v2", "all", metric, **group) for group in ({}, *EASY_TO_LONG)]
            assert line == [model, *wanted]
    head, _, *lines = markdown_table(folder, "Validation split, short and long prompt", "Sub-EM")
    assert head[1:3] == ["short", "long"] and lines[0][2] == shown(results, "made-up-a", "validation", "long")


def test_comparisons_counts_selection_and_harness_stand_with_the_tables(made):
    folder, results = made
    _, block, *lines = markdown_table(folder, "LongBench v1 QA", "Paired comparison on the same questions")
    (line,) = lines[:1]
    row = next(
        r for r in results["comparisons"] if (r["benchmark"], r["task"], r["metric"]) == ("longbench_qa", "", "f1")
    )
    assert block[0] == "**made-up-b against made-up-a**" and line[0] == "mean of tasks, F1"
    assert line[1:3] == [f"{row['difference']:+.1f}", f"{row['low']:+.1f} to {row['high']:+.1f}"]
    assert line[4:] == [str(row[name]) for name in ("wins", "losses", "ties", "n", "left_out")]
    _, *others = markdown_table(folder, "LongBench v1 QA", "Paired comparison by task and length, F1")
    assert {text[0] for cells in others for text in cells[1:]} == {"+", "-"}, "gains and losses"
    text = (folder / "report" / "report.md").read_text()
    page = Page(folder / "report" / "index.html").text
    for said in (text.replace("\\", ""), page):
        scores = list(read_jsonl(folder / "scores" / "made-up-a.jsonl"))
        asked = [line for line in scores if line["benchmark"] == "longbench_qa"]
        assert f"cut in the middle: made-up-a {sum(r['cut_tokens'] > 0 for r in asked)} of {len(asked)}" in said
        assert "Selected: made-up-c, the best by sub-EM on Validation split" in said
        assert "not corrected for the number of comparisons" in said
        assert "lm-evaluation-harness: made-up-a 0.4.9, made-up-c a version that was not noted." in said
        assert "version of solopo, scoring" in page and "± 2.1, n=541" in said and "60.2" in said and TITLE in said
        assert "95 % bootstrap intervals" in said
        assert "the number n of answers (a question counts once for each length or depth)" in said
        assert "true mean in 91 of 100 cases for 5 questions and in 76 for 3, and of one question it has no" in said
        assert "of 10 questions at a true mean of 90 in 65 of 100 cases" in said
        assert "on the n answers that both gave (a question counts once for each length or depth)" in said
    for model in results["models"]:
        line = " | ".join(str(model["counts"].get(k, "-")) for k in ("asked", "missing", "cut", "no_marker", "empty"))
        assert line in text


def difference(results: dict, benchmark: str, task: str, metric: str, **group) -> str:
    """The comparison of made-up-b with made-up-a as a cell must show it."""
    row = row_of(results["comparisons"], b="made-up-b", benchmark=benchmark, task=task, metric=metric, **group)
    interval = f"{row['low']:+.1f} to {row['high']:+.1f}, n={row['n']}"
    return f"{row['difference']:+.1f}, p={row['p_value']:.2g} ({interval})"


def test_short_contexts_have_a_comparison_of_their_own(made):
    """By length and task in the layout of the means, each cell with interval, p-value and n."""
    folder, results = made
    for metric, title in (("f1", "F1"), ("string_match", "RULER's string match")):
        head, *lines = markdown_table(folder, "RULER QA", f"Paired comparison by task and length, {title}")
        assert [name.split(": ")[-1] for name in head] == ["", "4k", "8k", "16k", "32k", "all lengths"]
        assert [line[0] for line in lines[::3]] == ["**SQuAD**", "**HotpotQA**", "**MuSiQue**", "**mean of tasks**"]
        for line, task in zip(lines[1::3], ("squad", "hotpotqa", "musique", ""), strict=True):
            groups = [*({"length": length} for length in LENGTHS), {}]
            wanted = [difference(results, "ruler_qa", task, metric, **group) for group in groups]
            assert line == ["made-up-b against made-up-a", *wanted]
    head, first, *_ = markdown_table(folder, "LongBench v2", "Paired comparison by task and length, accuracy")
    groups = ({}, *EASY_TO_LONG)
    assert first[1:] == [difference(results, "longbench_v2", "all", "accuracy", **group) for group in groups]
    title = "Paired comparison by task and length, sub-EM"
    _, first, *_ = markdown_table(folder, "Validation split, short and long prompt", title)
    assert first[1:] == [difference(results, "validation", task, "sub_em") for task in ("short", "long", "")]
    assert all("by task" not in table.title for table in benchmark_tables(results, "plain")), "one task, no lengths"


def test_longbench_by_its_classes_of_length_and_the_papers_averages_in_their_column(tmp_path):
    classes = ("0-4k", "4-8k", "8k+")
    questions = [
        item("longbench_qa", task, i, groups={"length": classes[i % 3]}) for task in LONGBENCH for i in range(3)
    ]
    results = write_folder(tmp_path, questions)
    write_report(tmp_path)
    head, _, first, *lines = markdown_table(tmp_path, "LongBench v1 QA", "F1")
    assert head[7:] == ["mean of tasks", *(f"length: {name}" for name in classes)]
    assert first[8] == shown(results, "made-up-a", "longbench_qa", "", length_class="0-4k")
    published = lines[[line[0].startswith("**Published") for line in lines].index(True) + 1 :]
    assert all(not any(line[1:7] + line[8:]) and re.match(r"\d\d\.\d", line[7]) for line in published)
    _, first, *_ = markdown_table(tmp_path, "LongBench v1 QA", "Paired comparison by task and length, F1")
    assert first[8] == difference(results, "longbench_qa", "", "f1", length_class="0-4k")


def test_of_many_pairs_the_comparison_by_length_is_folded_away(tmp_path):
    results = write_folder(tmp_path, few("ruler_qa"), tuple(f"checkpoint-{i}" for i in range(9)))
    tables = [
        table for table in benchmark_tables(results, "ruler_qa") if table.title.startswith("Paired comparison by")
    ]
    assert [(table.title[-2:], table.open) for table in tables] == [("F1", False), ("ch", False)]
    assert all(len(lines) == 8 for table in tables for _, lines in table.blocks)


@pytest.mark.parametrize("mixed", [False, True])
def test_own_questions_of_multiple_choice(tmp_path, mixed):
    """A table, a comparison and the page's score of each question by its kind; the mean of tasks is over both."""
    questions = [item("plain", "letters", i, kind="choice", answers=["ABCD"[i % 4]]) for i in range(6)]
    questions += [item("plain", "words", i) for i in range(4 * mixed)]
    results = write_folder(tmp_path, questions, harness=[])
    write_report(tmp_path)
    title = "F1, of choices accuracy" if mixed else "Accuracy"
    for model, line in zip(CHANCES, markdown_table(tmp_path, "Own questions", title)[2:], strict=True):
        tasks = {"letters": "accuracy"} | ({"words": "f1", "": EACH_OWN} if mixed else {})
        assert line == [model, *(shown(results, model, "plain", *of) for of in tasks.items())]
    compared = markdown_table(tmp_path, "Own questions", "Paired comparison on the same questions")
    assert compared[2][0] == ("mean of tasks, F1, of choices accuracy" if mixed else "letters, accuracy")
    names = {name for name, (_, _, benchmark) in draw_figures(results).items() if not benchmark}
    assert names == {"overview", "differences"}
    by_kind = {"letters": "accuracy", "words": "f1"}
    _, shown_rows = rows_of(tmp_path)
    assert all(round(by["score"], 1) == by["scores"][by_kind[r["task"]]] for r in shown_rows for by in r["by"].values())
    lenient = benchmark_tables(results, "plain")[1]
    assert lenient.open and (lenient.notes == [NONE]) == mixed, "words have no letters"


SEEDS = ("base", "seed-0", "seed-1", "other", "seed-2")


@pytest.mark.slow
def test_runs_of_several_seeds_are_one_row_and_single_seeds_stay_available(tmp_path):
    values = zip(SEEDS, (60, 61, 62, 60, 66), strict=True)
    harness = [HARNESS[0] | {"model": model, "value": value} for model, value in values]
    questions = few("ruler_qa", "plain", "validation") + [it for it in few("niah_plus") if it.length == 4096]
    results = write_folder(tmp_path, questions, SEEDS, runs={"SoLo": ["seed-0", "seed-1", "seed-2"]}, rows=harness)
    write_report(tmp_path)
    found = Summary(results)
    assert (found.models, found.single) == (["base", "SoLo", "other"], ["seed-0", "seed-1", "seed-2"])
    _, block, *lines = markdown_table(tmp_path, "RULER QA", "F1")
    assert block[0] == "**Measured here: SQuAD**"
    assert [line[0] for line in lines[:3]] == ["base", "SoLo (n=3 seeds)", "other"]
    where = dict(benchmark="ruler_qa", task="squad", metric="f1", length=4096)
    row = row_of(results["summary"], model="SoLo", **where)
    assert lines[1][1] == f"{row['value']:.1f} ± {row['sd']:.1f} ({row['low']:.1f} to {row['high']:.1f}, n={row['n']})"
    single = next(t for t in benchmark_tables(results, "ruler_qa") if t.title == "F1, single seeds")
    assert not single.open and [name for name, _ in single.blocks[0][1]] == found.single
    assert single.blocks[0][1][0][1][0][0] == f"{row_of(results['summary'], model='seed-0', **where)['value']:.1f}"
    pairs = ["SoLo against base", "other against base"]
    _, *lines = markdown_table(
        tmp_path, "Validation split, short and long prompt", "Paired comparison on the same questions"
    )
    assert [line[0].strip("*") for line in lines if line[0].startswith("**")] == pairs
    text = (tmp_path / "report" / "report.md").read_text().replace("\\", "")
    assert "sample standard deviation (n - 1) over n seeds" in text
    assert "SoLo is one row of the tables below: seed-0, seed-1, seed-2, which differ by training seed." in text
    assert "| SoLo (n=3 seeds) | 63 (sd 2.6 over 3 seeds, n=541) |" in text and "| seed-0 | 61" not in text
    with open(tmp_path / "report" / "tables.csv", newline="", encoding="utf-8") as file:
        csv_rows = [line for line in csv.DictReader(file) if line["model"] in ("SoLo", "seed-1")]
    own = [r for r in csv_rows if r["kind"] == "measured" and (r["benchmark"], r["task"]) == ("plain", "own")]
    assert {(r["model"], r["seeds"], bool(r["sd"])) for r in own} == {("SoLo", "3", True), ("seed-1", "", False)}
    drawn = draw_figures(results)
    assert [t.get_text() for t in drawn["overview"][0].axes[0].get_yticklabels()] == found.models
    names = {"niah_1", "niah_2", "niah_3", "niah_2_less_1", "niah_3_less_1"}
    assert names == {name for name in drawn if name.startswith("niah")}
    assert "Drawn are" not in drawn["differences"][1] and results["selection"]["best"] in SEEDS


@pytest.mark.slow
def test_a_selected_seed_is_drawn_within_its_run(tmp_path):
    """Nine rows and the selected model's one: comparisons of single seeds are in the tables, not in the figures."""
    models = tuple(f"m{i}" for i in range(12))
    questions = [it for it in few("niah_plus", "validation") if it.length in (None, 4096, 8192) and not it.depth]
    results = write_folder(tmp_path, questions, models, runs={"A": ["m9", "m10", "m11"]})
    results["selection"]["best"] = "m10"
    assert "Drawn are 8 of 10 models" in draw_figures(results)["length_niah_plus"][1]
    results["comparisons"] += [row | {"a": "m9", "b": "m10"} for row in results["comparisons"] if row["b"] == "A"]
    assert draw_figures(results)
    names = [name for name, _ in benchmark_tables(results, "validation")[1].blocks]
    assert "m10 against m9" in names and "A against m0" in names


@pytest.mark.parametrize("used, wanted", [
    ({}, {"RULER QA": "ours", "LongBench v2": "ours", "Own questions": "ours"}),
    ({"prompt": "x"}, {"RULER QA": "the recipe's", "LongBench v2": "ours", "Own questions": "the recipe's"}),
    ({"prompts": "official"}, {"RULER QA": "ours", "LongBench v2": "official", "Own questions": "ours"}),
])  # fmt: skip
def test_the_report_says_which_number_used_which_prompt(tmp_path, used, wanted):
    used |= {"max_new_tokens": 1024, "temperature": 0.1}
    write_folder(tmp_path, few("ruler_qa", "longbench_v2", "plain"), settings=used)
    write_report(tmp_path)
    head, *lines = markdown_table(tmp_path, "Models", "Prompts")
    assert head == ["", "prompt", "which", "max\\_new\\_tokens", "temperature"]
    assert {line[0]: line[1] for line in lines} == wanted
    tokens = {line[0]: line[3:] for line in lines}
    assert tokens["LongBench v2"] == ["128" if wanted["LongBench v2"] == "official" else "1024", "0.1"]
    assert tokens["RULER QA"] == ["1024", "0.1"]
    text = {line[0]: line[2] for line in lines}["LongBench v2"]
    assert ("no chain of thought" in text) == (wanted["LongBench v2"] == "official")


def test_a_choice_by_a_benchmark_that_is_reported_is_labelled(tmp_path):
    write_folder(tmp_path, few("longbench_qa"))
    refs = [{"name": model, "path": model, "adapter": None, "step": None} for model in CHANCES]
    settings = {"select_by": "longbench_qa", "bootstrap_samples": 100, "seed": 3}
    chosen = make_results(tmp_path, refs, settings)["selection"]
    write_report(tmp_path)
    for said in (
        (tmp_path / "report" / "report.md").read_text().replace("\\", ""),
        Page(tmp_path / "report" / "index.html").text,
    ):
        assert f"Selected: {chosen['best']}, the best by F1 on LongBench v1 QA. {chosen['note']}" in said
        assert f"Warning: {chosen['warning']}" in said and "selection on the test set" in said


@pytest.mark.parametrize("left_out", ["a task", "a length", "another task"])
def test_published_numbers_only_where_the_benchmark_is_the_papers(tmp_path, left_out):
    questions = few("longbench_qa", "ruler_qa")
    if left_out == "a length":
        questions = [it for it in questions if it.length != 4096]
    else:
        questions = [it for it in questions if it.task not in ("qasper", "squad")]
    if left_out == "another task":
        questions += [item("longbench_qa", "triviaqa", 1), item("ruler_qa", "cwe", 1, length=4096)]
    write_folder(tmp_path, questions)
    write_report(tmp_path)
    page = Page(tmp_path / "report" / "index.html")
    assert page.tags.count(("tbody", {"class": "published"})) == (left_out == "a length"), "LongBench has no lengths"
    assert "run over other tasks or lengths and are not put beside" in page.text


def test_what_is_known_of_the_paper():
    """Its Table 3: 23 rows, of five models, two of them doubtful on one benchmark; no LongPO on Llama."""
    values = {row.name: tuple(row.averages.values()) for row in PUBLISHED}
    assert len(values) == len(PUBLISHED) == 23
    assert values["Qwen2.5-7B, SoLo-ORPO"] == (49.5, 65.1) and values["Llama3.1-8B, SoLo-ORPO"] == (46.3, 61.3)
    assert values["Llama3.1-8B, SFT short"] == (44.6, 59.2) and values["Llama3.1-8B, SFT long"] == (46.1, 58.4)
    larger = [values[f"{model}, instruct model"] for model in ("Qwen2.5-32B", "Qwen2.5-72B", "Llama3.1-70B")]
    assert larger == [(41.9, 50.1), (49.4, 61.6), (46.3, 54.1)]
    assert {name: value for name, value in values.items() if "LongPO" in name} == {
        "Qwen2.5-7B, LongPO, trained again by the paper": (43.7, 52.2),
        "Qwen2.5-7B, LongPO-Qwen2.5-7B-128K, its authors' checkpoint": (32.9, 45.9),
    }
    small = [values[f"{model}, instruct model"] for model in ("Qwen2.5-7B", "Llama3.1-8B")]
    assert small == [(34.4, 44.0), (39.8, 46.5)]
    sft = [values[f"Qwen2.5-7B, SFT {side}"][0] for side in ("short", "long")]
    assert sft == [values[row.name][0] for row in PUBLISHED if row.doubtful]
    assert matches("longbench_qa", set(LONGBENCH), set()) and not matches("longbench_qa", {*LONGBENCH, "x"}, set())
    assert not matches("plain", set(), set()) and not matches("niah_plus", {"squad"}, set(LENGTHS))


def test_of_many_comparisons_those_of_single_tasks_stand_apart(tmp_path):
    """First all tasks together; the figure has no more than these, and short and long prompt of validation."""
    models = tuple(f"checkpoint-{i}" for i in range(16))
    results = write_folder(tmp_path, few("longbench_qa", "validation", "plain"), models)
    pairs = [f"{model} against checkpoint-0" for model in models[1:]]
    for benchmark, name, columns in (
        ("longbench_qa", "mean of tasks, F1", 7),
        ("validation", "mean of tasks, sub-EM", 3),
        ("plain", "own, F1", 0),
    ):
        table, apart = benchmark_tables(results, benchmark)[1:3]
        assert [(pair, [name for name, _ in lines]) for pair, lines in table.blocks] == [(p, [name]) for p in pairs]
        assert columns == 0 or (len(apart.columns), [pair for pair, _ in apart.blocks[0][1]]) == (columns, pairs)
    drawn = draw_figures(results)
    names = [label.get_text() for label in drawn["differences"][0].axes[0].get_yticklabels()]
    assert names == [
        "LongBench v1 QA: mean of tasks", "Own questions: own", "Validation split, short and long prompt: short",
        "Validation split, short and long prompt: long",
    ]  # fmt: skip
    assert len(drawn["overview"][0].axes[0].get_yticks()) == 16 and "Drawn are" not in drawn["overview"][1]
    few_drawn = len(drawn["differences"][0].axes) + 1
    assert few_drawn in (8, 9) and f"Drawn are {few_drawn} of 16 models" in drawn["differences"][1]
    titles = [axes.get_title(loc="right") for axes in drawn["differences"][0].axes]
    assert f"{results['selection']['best']} less checkpoint-0" in titles or results["selection"]["best"] == models[0]
    assert "checkpoint-15 less checkpoint-0" in titles


def test_csv_holds_every_number_with_all_digits(made):
    folder, results = made
    with open(folder / "report" / "tables.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    kinds = {kind: [line for line in lines if line["kind"] == kind] for kind in {line["kind"] for line in lines}}
    assert set(kinds) == {"measured", "comparison", "harness", "count", "published"}
    for line, row in zip(kinds["measured"], results["summary"], strict=True):
        names = ("model", "benchmark", "task", "metric", *GROUPS)
        assert all(line[name] == ("" if row[name] is None else str(row[name])) for name in names)
        assert all(float(line[name]) == row[name] for name in ("n", "value", "low", "high")) and not line["source"]
    for line, row in zip(kinds["comparison"], results["comparisons"], strict=True):
        assert (line["model"], line["against"], float(line["value"])) == (row["b"], row["a"], row["difference"])
        assert all(float(line[name]) == row[name] for name in ("low", "high", "p_value", "wins", "losses", "ties", "n"))
    assert [float(line["value"]) for line in kinds["harness"]] == [row["value"] for row in HARNESS]
    assert len(kinds["published"]) == 2 * len(PUBLISHED) and len(kinds["count"]) == 6 * len(CHANCES)
    assert all(line["source"].startswith("arXiv:2505.11166") for line in kinds["published"])
    assert sum("doubtful" in line["source"] for line in kinds["published"]) == 2


# ---- figures


def test_figures_draw_the_numbers_of_the_summary(made):
    folder, results = made
    drawn = draw_figures(results)
    names = {"overview", "differences", "length_ruler_qa", "length_niah_plus", "niah_1", "niah_2", "niah_3"}
    assert set(drawn) == names | {"niah_2_less_1", "niah_3_less_1"}
    assert {path.stem for path in (folder / "report").glob("*.png")} == set(drawn)
    maps = {name: drawn[name][0].axes[0].images[0].get_array().data for name in drawn if name.startswith("niah")}
    depths = range(0, 101, 10)
    for i, model in enumerate(CHANCES, 1):
        where = dict(model=model, benchmark="niah_plus", task="multi", metric="sub_em")
        cells = [[row_of(results["summary"], **where, length=n, depth=d)["value"] for n in LENGTHS] for d in depths]
        assert np.array_equal(maps[f"niah_{i}"], cells)
    assert np.array_equal(maps["niah_3_less_1"], maps["niah_3"] - maps["niah_1"])
    last = drawn["length_ruler_qa"][0].axes[-1]
    for line, model in zip([c.lines[0] for c in last.containers], CHANCES, strict=True):
        assert list(line.get_ydata()) == [
            row_of(results["summary"], model=model, benchmark="ruler_qa", task="", metric="f1", length=n)["value"]
            for n in LENGTHS
        ]
        assert np.allclose(np.log2(line.get_xdata().astype(float) / LENGTHS), 0, atol=0.1)
    for figure, caption, benchmark in drawn.values():
        assert caption.endswith(".") and benchmark in ("", *MAIN_METRIC)
        assert all(axes.get_title() or axes.get_title(loc="right") or axes.get_ylabel() for axes in figure.axes)


def test_a_task_without_lengths_and_a_model_without_a_task(tmp_path):
    """The former has no panel, the latter stands in the legend all the same."""
    questions = [item("ruler_qa", task, i, length=n) for task in ("first", "second") for n in (64, 128) for i in (0, 1)]
    results = write_folder(tmp_path, [*questions, item("ruler_qa", "whole", 0)], ("a", "b"), rows=[])
    results["summary"] = [row for row in results["summary"] if (row["model"], row["task"]) != ("b", "first")]
    figure = draw_figures(results)["length_ruler_qa"][0]
    assert [axes.get_title() for axes in figure.axes] == ["first", "second", "mean of tasks"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_a_cell_without_questions_and_names_with_dollars(tmp_path):
    questions = [it for it in few("niah_plus") if it.length < 9000 and (it.length, it.depth) != (8192, 50.0)]
    results = write_folder(tmp_path, questions, ("$a_b$", "x" * 60))
    values = draw_figures(results)["niah_1"][0].axes[0].images[0].get_array()
    assert np.isnan(values.data[5][1]) and np.isnan(values.data).sum() == 1
    write_report(tmp_path)


def test_a_question_asked_often_counts_once_and_a_mark_is_filled_by_the_p_value(tmp_path):
    """One question at two lengths and all depths: every answer drawn along, an interval without width, p = 1."""
    asked = [item("niah_plus", "squad", 1, length=n, depth=float(d)) for n in LENGTHS[:2] for d in range(0, 101, 10)]
    asked = [replace(it, id=f"q/{it.length}/{it.depth:g}") for i, it in enumerate(asked)]
    results = write_folder(tmp_path, asked, ("made-up-a", "made-up-c"), rows=[])
    write_report(tmp_path)
    where = dict(benchmark="niah_plus", task="squad", metric="sub_em")
    assert {(r["n"], r["questions"]) for r in results["summary"] if r["depth"] is None} == {(22, 1), (11, 1)}
    pair = row_of(results["comparisons"], b="made-up-c", **where)
    assert pair["low"] == pair["difference"] == pair["high"] > 0 and (pair["p_value"], pair["questions"]) == (1, 1)
    lines = markdown_table(tmp_path, "NIAH-Plus", "Sub-EM")
    assert [cell.split("n=")[1] for cell in lines[2][1:]] == ["11 of 1 question)"] * 2 + ["22 of 1 question)"]
    _, _, line = markdown_table(tmp_path, "NIAH-Plus", "Paired comparison on the same questions")
    assert line[-2:] == ["22 of 1 question", "0"]
    with open(tmp_path / "report" / "tables.csv", encoding="utf-8") as file:
        kept = [row for row in csv.DictReader(file) if row["kind"] in ("measured", "comparison")]
    assert {row["questions"] for row in kept} == {"1"}
    rows = [pair, pair | {"p_value": 0.04}]
    marks = [drawn.lines[0].get_markerfacecolor() for drawn in differences(rows).axes[0].containers]
    assert marks == ["white", COLORS[0]]


def test_names_that_no_font_draws_are_numbers_that_the_caption_explains(tmp_path, monkeypatch):
    """Without a box or a warning; and with those of the fonts that this machine has."""
    monkeypatch.setattr(figures, "FALLBACKS", ("STIXGeneral", "No Such Font"))
    assert figures._fonts()[1:] == ["STIXGeneral"]
    monkeypatch.setattr(figures, "FALLBACKS", ())
    models, tasks = ("模型-基线", "plain"), ("任务一", "second")
    questions = [item("ruler_qa", task, i, length=n) for task in tasks for n in (64, 128) for i in (0, 1)]
    results = write_folder(tmp_path, questions, models, rows=[], runs=None)
    before = json.dumps(results)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = draw_figures(results)
        assert all(png(figure) for figure, *_ in drawn.values())
    figure, caption, _ = drawn["length_ruler_qa"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["model 1", "plain"]
    assert {axes.get_title() for axes in figure.axes} == {"task 1", "second", "mean of tasks"}
    said = "In the picture model 1 is 模型-基线; task 1 is 任务一."
    assert all(text.endswith(said) for _, text, _ in drawn.values()) and json.dumps(results) == before


# ---- the reader of questions


def rows_of(folder) -> tuple[list[str], list[dict]]:
    page = Page(folder / "report" / "index.html")
    data = json.loads(page.scripts[0])
    return data["models"], data["rows"]


def test_the_reader_has_answers_scores_and_places_of_evidence(made):
    folder, _ = made
    models, rows = rows_of(folder)
    asked = {(it["benchmark"], it["task"], it["id"]): it for it in read_jsonl(folder / "items.jsonl")}
    assert models == list(CHANCES) and len(rows) == min(explorer.QUESTIONS, len(asked))
    answers = {m: list(read_jsonl(folder / "answers" / f"{m}.jsonl"))[1:] for m in models}
    texts = {(m, a["benchmark"], a["task"], a["id"]): a["text"] for m in models for a in answers[m]}
    scores = {
        (m, s["benchmark"], s["task"], s["id"]): s for m in models for s in read_jsonl(folder / "scores" / f"{m}.jsonl")
    }
    for row in rows:
        key = (row["benchmark"], row["task"], row["id"])
        it, length = asked[key], len(asked[key]["prompt"])
        assert (row["question"], row["answers"]) == (it["question"], it["answers"])
        for mark, passage, place in zip(row["marks"], row["evidence"], it["evidence"], strict=True):
            assert mark == [place["start"] / length, place["end"] / length]
            around = passage["before"] + passage["text"] + passage["after"]
            assert passage["text"] == it["prompt"][place["start"] : place["end"]] and around in it["prompt"]
        for model in models:
            by, score = row["by"][model], scores[model, *key]
            assert by["text"] == texts[model, *key] and by["prediction"] == score["prediction"]
            assert by["score"] == score["scores"][MAIN_METRIC[row["benchmark"]]]
            assert by["facts"] == {name: score[name] for name in ("prompt_tokens", "cut_tokens", "finish_reason")}
    assert explorer._answer(score | {"server_tokens": 7}, "x", 9)["facts"]["server_tokens"] == 7, "where there is one"


def test_thousands_of_long_questions_stay_small_and_the_choice_is_seeded(tmp_path):
    padding = "filler " * 3000
    questions = [item("plain", f"t{i % 3}", i) for i in range(3000)]
    long = (it.as_dict() | {"prompt": it.prompt + padding} for it in questions)
    write_folder(tmp_path, questions, ("a", "b"))
    write_jsonl(tmp_path / "items.jsonl", long)
    for model in ("a", "b"):
        path = tmp_path / "answers" / f"{model}.jsonl"
        write_jsonl(path, [row | {"text": row["text"] + padding} if "id" in row else row for row in read_jsonl(path)])
    page = write_report(tmp_path)
    assert page.stat().st_size < 3e6 < (tmp_path / "items.jsonl").stat().st_size / 10
    assert "400 of 3000 questions are here" in page.read_text()
    _, rows = rows_of(tmp_path)
    assert len(rows) == 400 and {sum(row["task"] == f"t{i}" for row in rows) for i in range(3)} <= {133, 134}
    assert "characters not shown" in rows[0]["by"]["a"]["text"] and len(rows[0]["by"]["a"]["text"]) < 2100
    scores = {m: list(read_jsonl(tmp_path / "scores" / f"{m}.jsonl")) for m in ("a", "b")}
    chosen = {(row["benchmark"], row["task"], row["id"]) for row in rows}
    assert chosen == explorer.choose(scores, 3) == explorer.choose({"b": scores["b"][::-1]}, 3)
    assert len(chosen & explorer.choose(scores, 4)) < 100


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> &amp; {{rows}} | \u2028 \U0001f600 <!-- `x` *b*"


def test_nothing_that_a_model_or_a_file_says_runs_or_loads(tmp_path):
    task, model = "<b>t</b>", "<i onclick=alert(3)>m"
    questions = [item("plain", task, i, question=f"{i} {EVIL}", answers=[EVIL]) for i in range(3)]
    write_folder(tmp_path, questions, (model, "other"), title=EVIL, selection=None)
    path = tmp_path / "answers" / f"{model}.jsonl"
    write_jsonl(path, [row | {"text": EVIL} if "id" in row else row for row in read_jsonl(path)])
    write_report(tmp_path)
    page = Page(tmp_path / "report" / "index.html")
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 2 and not {"b"} & set(tags)
    assert tags.count("i") == 0 and not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert all(attrs["src"].startswith("data:image/png;base64,") for tag, attrs in page.tags if tag == "img")
    assert all(attrs["href"].startswith("#") for tag, attrs in page.tags if "href" in attrs)
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none'") and "http" not in policy
    models, rows = rows_of(tmp_path)
    assert models == [model, "other"] and all(row["by"][model]["text"] == EVIL for row in rows)
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert sink not in page.scripts[1]
    assert "<script" not in (tmp_path / "report" / "report.md").read_text().replace("\\<", "")


# ---- what is not there


def test_one_model_has_no_comparisons_and_says_so(tmp_path):
    write_folder(tmp_path, few("plain", "niah_plus"), ("made-up-a",), selection=None)
    page = Page(write_report(tmp_path))
    assert "nothing to compare" in page.text and "Paired comparison" not in page.text
    assert not any("less" in path.stem or path.stem == "differences" for path in (tmp_path / "report").glob("*.png"))


def test_no_comparisons_of_several_models(tmp_path):
    write_folder(tmp_path, few("plain", "ruler_qa"), comparisons=[])
    assert "Paired comparison" not in Page(write_report(tmp_path)).text


@pytest.mark.parametrize("benchmark", MAIN_METRIC)
def test_each_benchmark_alone(tmp_path, benchmark):
    write_folder(tmp_path, few(benchmark), ("made-up-a", "made-up-b"), harness=[])
    text = Page(write_report(tmp_path)).text
    assert "leaderboard" not in text and ("Published" in text) == (benchmark in ("longbench_qa", "ruler_qa"))
    tables = benchmark_tables(json.loads((tmp_path / "results.json").read_text()), benchmark)
    assert tables[0].open
    for table in tables:
        assert all(len(cells) == len(table.columns) for _, lines in table.blocks for _, cells in lines)


def test_lm_evaluation_harness_alone_needs_no_questions(tmp_path):
    """And settings that do not reach it, which stand over its numbers, are named."""
    results = write_folder(tmp_path, [])
    used, said = {"extra_body": {"top_k": 1}, "rope_factor": 4.0}, "Settings that it did not have: {}."
    for settings, names in ((used, "extra_body, rope_factor"), ({"rope_factor": "the server's own"}, None)):
        notes = harness_table(results | {"settings": settings}).notes
        assert [note for note in notes if note.startswith(said[:8])] == ([said.format(names)] if names else [])
    for name in ("items.jsonl", "answers", "scores"):
        path = tmp_path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = Page(write_report(tmp_path))
    assert "leaderboard_ifeval" in page.text and "0 of 0 questions" in page.text


def test_a_model_that_was_not_asked_everything(tmp_path):
    """Asked of one benchmark alone, or of no question: a dash where there is no number."""
    results = write_folder(tmp_path, few("plain", "longbench_qa"))
    results["summary"] = [r for r in results["summary"] if r["model"] != "made-up-b" or r["benchmark"] == "plain"]
    write_json(tmp_path / "results.json", results)
    write_jsonl(
        tmp_path / "scores" / "made-up-b.jsonl",
        [row for row in read_jsonl(tmp_path / "scores" / "made-up-b.jsonl") if row["benchmark"] == "plain"],
    )
    write_report(tmp_path)
    lines = markdown_table(tmp_path, "LongBench v1 QA", "F1")
    assert next(line for line in lines if line[0] == "made-up-b")[1:] == ["-"] * 7
    assert {len(row["by"]) for row in rows_of(tmp_path)[1]} == {2, 3}


def test_written_again_it_is_the_same_and_old_figures_go(tmp_path):
    write_folder(tmp_path, few("plain", "ruler_qa"))
    write_report(tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    (tmp_path / "report" / "niah_9.png").write_bytes(b"old")
    write_report(tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()} == before


def test_a_torn_last_line_of_answers_is_left_out(tmp_path):
    """What a killed run may leave; scores leave it out, too."""
    write_folder(tmp_path, few("plain"), ("made-up-a",))
    write_report(tmp_path)
    before = (tmp_path / "report" / "index.html").read_bytes()
    with open(tmp_path / "answers" / "made-up-a.jsonl", "ab") as file:
        file.write(b'{"benchmark": "pl')
    write_report(tmp_path)
    assert (tmp_path / "report" / "index.html").read_bytes() == before


def test_what_is_missing_or_damaged_is_a_sentence(tmp_path):
    with pytest.raises(DataError, match="results.json: there is no such file"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text('{"title": ')
    with pytest.raises(
        DataError, match=r"results.json is not JSON .*; run scripts/evaluate.py again, answers are kept."
    ):
        write_report(tmp_path)
    results = write_folder(tmp_path, few("plain"), ("made-up-a",))
    del results["format"]
    write_json(tmp_path / "results.json", results)
    with pytest.raises(DataError, match=r"results.json is of format 1 and not 3, .* RECIPE --rescore` writes it again"):
        write_report(tmp_path)
    write_folder(tmp_path, few("plain"), ("made-up-a",))
    (tmp_path / "answers" / "made-up-a.jsonl").unlink()
    with pytest.raises(DataError, match=r"made-up-a.jsonl: there is no such file"):
        write_report(tmp_path)
