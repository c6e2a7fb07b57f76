"""results.json from hand-made scores: every number in closed form; who is compared; which checkpoint is chosen."""

import json
import logging
import statistics

import pytest

from solopo_plugin.evaluation.items import EACH_OWN, GROUPS, MAIN_METRIC, Item
from solopo_plugin.evaluation.report.tables import harness_table
from solopo_plugin.evaluation.results import harness_of, make_results
from solopo_plugin.evaluation.score import write_scores
from solopo_plugin.qa.files import DataError, write_jsonl

MODELS = [
    {"name": "base", "path": "models/base", "adapter": None, "step": None},
    {"name": "step-10", "path": "models/base", "adapter": "saves/run/checkpoint-10", "step": 10},
    {"name": "step-20", "path": "saves/full/checkpoint-20", "adapter": None, "step": 20},
]
TEXTS = {"r": "The answer is: Rosvik", "w": "The answer is: Karvik", "p": "The answer is: Rosvik town", "-": ""}
TEXTS |= {letter: f"The correct answer is ({letter})" for letter in "AB"}  # of choices, of which A is right
F1 = {"r": 100.0, "w": 0.0, "p": 200 / 3, "-": 0.0}


def make_folder(folder, tasks, models=MODELS):
    """Questions and answers on disk, scored.

    Args:
        tasks: (benchmark, task) -> ({fields of each question}, {model: a letter per question: right, wrong, partly
            right, - for an empty answer, a blank for none}).
    """
    items, answers = [], {model["name"]: [{"fingerprint": {}}] for model in models}
    for (benchmark, task), (fields, letters) in tasks.items():
        ids = "q{}" if benchmark == "validation" else task + "{}"  # of validation rows, both tasks ask the same
        own = [
            Item(benchmark, task, ids.format(k), f"{task} {k}? The answer is: ...", "?", golds, **more)
            for k, more in enumerate(fields)
            for golds in [["A"] if "kind" in more else ["Rosvik"]]
        ]
        items += own
        for name, word in letters.items():
            assert len(word) == len(own)
            answers[name] += [
                {"benchmark": benchmark, "task": task, "id": question.id, "prompt_hash": question.prompt_hash,
                 "text": TEXTS[letter], "prompt_tokens": 9, "cut_tokens": 3 * (letter == "p"),
                 "finish_reason": "length" if letter == "w" else "stop"}
                for question, letter in zip(own, word, strict=True) if letter != " "
            ]  # fmt: skip
    write_jsonl(folder / "items.jsonl", (item.as_dict() for item in items))
    for name, rows in answers.items():
        write_jsonl(folder / f"answers/{name}.jsonl", rows)
    write_scores(folder, list(answers))


ALL = dict.fromkeys(GROUPS)  # columns of a row of all questions


def make(folder, models=MODELS, select_by=None, compare=None, harness=(), samples=1000, seed=42, runs=None) -> dict:
    given = {"select_by": select_by, "compare": compare, "runs": runs}
    settings = {"seed": seed, "bootstrap_samples": samples} | {k: v for k, v in given.items() if v is not None}
    found = make_results(folder, models, settings, list(harness))
    assert json.loads((folder / "results.json").read_text(encoding="utf-8")) == found
    return found


def rows(found: list[dict], **where) -> list[dict]:
    return [row for row in found if all(row[key] == value for key, value in where.items())]


def group_of(row: dict) -> str:
    """The properties that a row's questions share, as a text; "" is all questions."""
    return ",".join(f"{name}={row[name]}".removesuffix(".0") for name in GROUPS if row[name] is not None)


def row(found: list[dict], **where) -> dict:
    (one,) = rows(found, **where)
    return one


NO_FIELDS = [{}] * 4
QA_TASKS = {
    ("longbench_qa", "musique"): (NO_FIELDS, {"base": "rwww", "step-10": "rrwp", "step-20": "rrrr"}),
    ("longbench_qa", "qasper"): (NO_FIELDS[:2], {"base": "rr", "step-10": "rw", "step-20": "rp"}),
}


def test_means_of_tasks_and_their_mean(tmp_path):
    make_folder(tmp_path, QA_TASKS)
    found = make(tmp_path, samples=10_000)
    f1 = rows(found["summary"], model="step-10", metric="f1", **ALL)
    assert [(r["benchmark"], r["task"], r["n"]) for r in f1] == [
        ("longbench_qa", "musique", 4), ("longbench_qa", "qasper", 2), ("longbench_qa", "", 6),
    ]  # fmt: skip
    assert [r["value"] for r in f1] == pytest.approx([(200 + 200 / 3) / 4, 50, ((200 + 200 / 3) / 4 + 50) / 2])
    assert row(found["summary"], model="step-10", task="", metric="em")["value"] == (50 + 50) / 2
    assert row(found["summary"], model="step-10", task="musique", metric="sub_em")["value"] == 75
    assert row(found["summary"], model="base", task="", metric="string_match")["value"] == (25 + 100) / 2
    assert {r["metric"] for r in found["summary"]} == {"f1", "em", "sub_em", "string_match"}
    assert len(found["summary"]) == 3 * 3 * 4  # models, tasks with their mean, metrics
    for r in found["summary"]:
        assert 0 <= r["low"] <= r["value"] <= r["high"] <= 100
    # n = 4 right or wrong with probability 1/4: P(no right) = 0.316, P(4) = 0.0039; outside the interval is 0.00012
    one = row(found["summary"], model="base", task="musique", metric="em")
    assert (one["low"], one["value"], one["high"]) == (0, 25, 100)


def test_groups(tmp_path):
    """Every length, depth, both, and further groups; a task without a group is not in its mean."""
    fields = [{"length": n, "depth": d, "groups": {"hops": "2"}} for n in (4096, 131072) for d in (0.0, 33.3)]
    tasks = {
        ("niah_plus", "single"): (fields, {"base": "rwrp"}),
        ("niah_plus", "multi"): ([{"length": 4096}] * 2, {"base": "ww"}),
    }
    make_folder(tmp_path, tasks, MODELS[:1])
    summary = make(tmp_path, MODELS[:1])["summary"]
    assert {group_of(r): r["value"] for r in rows(summary, task="single", metric="f1")} == pytest.approx({
        "": (200 + 200 / 3) / 4, "length=4096": 50, "length=131072": (100 + 200 / 3) / 2, "depth=0": 100,
        "depth=33.3": 100 / 3, "length=4096,depth=0": 100, "length=4096,depth=33.3": 0, "length=131072,depth=0": 100,
        "length=131072,depth=33.3": 200 / 3, "hops=2": (200 + 200 / 3) / 4,
    })  # fmt: skip
    assert {group_of(r): (r["value"], r["n"]) for r in rows(summary, task="", metric="em")} == {
        "": (25, 6), "length=4096": (25, 4), "length=131072": (50, 2), "depth=0": (100, 2), "depth=33.3": (0, 2),
        "length=4096,depth=0": (100, 1), "length=4096,depth=33.3": (0, 1), "length=131072,depth=0": (100, 1),
        "length=131072,depth=33.3": (0, 1), "hops=2": (50, 4),
    }  # fmt: skip
    for r in summary:
        assert r["n"] > 1 or r["low"] == r["value"] == r["high"]


def test_counts(tmp_path, caplog):
    make_folder(tmp_path, {("plain", "t"): ([{}] * 8, {"base": "rwwpp-r "})}, MODELS[:1])
    found = make(tmp_path, MODELS[:1])
    assert found["models"] == [
        MODELS[0] | {"counts": {
            "asked": 8, "missing": 1, "cut": 2, "no_marker": 1, "empty": 1, "stopped_by_length": 2,
        }}
    ]  # fmt: skip
    assert row(found["summary"], task="t", metric="em") | {"low": 0, "high": 0} == {
        "model": "base", "benchmark": "plain", "task": "t", **ALL, "metric": "em", "n": 7, "questions": 7,
        "value": 200 / 7, "low": 0, "high": 0,
    }  # fmt: skip
    assert "1 of 8 questions are missing; means are over the others." in caplog.text
    assert found["comparisons"] == [] and found["selection"] is None and not (tmp_path / "selection.json").exists()


def test_comparisons(tmp_path):
    make_folder(tmp_path, QA_TASKS)
    found = make(tmp_path)
    assert {(r["a"], r["b"]) for r in found["comparisons"]} == {("base", "step-10"), ("base", "step-20")}
    one = row(found["comparisons"], b="step-20", task="musique", metric="em")
    assert one | {"low": 0, "high": 0} == {
        "a": "base", "b": "step-20", "benchmark": "longbench_qa", "task": "musique", **ALL, "metric": "em",
        "n": 4, "difference": 75, "low": 0, "high": 0, "p_value": 0.25, "wins": 3, "losses": 0, "ties": 1,
        "questions": 4, "left_out": 0,
    }  # fmt: skip
    mean = row(found["comparisons"], b="step-20", task="", metric="f1")
    assert mean["difference"] == pytest.approx((75 - 100 / 6) / 2) and (mean["wins"], mean["losses"]) == (3, 1)
    for r in found["comparisons"]:
        a, b = (row(found["summary"], model=r[s], task=r["task"], metric=r["metric"])["value"] for s in "ab")
        assert r["difference"] == pytest.approx(b - a, abs=1e-9) and r["low"] <= r["difference"] <= r["high"]
        assert r["wins"] + r["losses"] + r["ties"] == r["n"]

    chosen = make(tmp_path, compare=[["step-20", "step-10"], "step-10, base"])["comparisons"]
    assert {(r["a"], r["b"]) for r in chosen} == {("step-20", "step-10"), ("step-10", "base")}
    back = row(chosen, a="step-20", task="", metric="f1")
    assert back["difference"] == pytest.approx((-100 / 3 - 100 / 3) / 2)


def test_only_common_questions_are_compared(tmp_path, caplog):
    tasks = {("plain", "t"): ([{}] * 5, {"base": "rrw w", "step-10": " rrr-", "step-20": "rrrrr"})}
    make_folder(tmp_path, tasks)
    one = row(make(tmp_path)["comparisons"], b="step-10", task="t", metric="em")
    # q1, q2 and q4 have both answers: r/r, w/r, w/-
    assert (one["n"], one["left_out"], one["difference"]) == (3, 2, pytest.approx(100 / 3))
    assert "step-10 against base: 2 questions that only one of them answered are left out." in caplog.text


def test_questions_and_choices_in_one_task(tmp_path):
    """Each metric is over the questions that have it, and one is over all, each by its kind."""
    items = [
        Item("plain", "t", f"q{k}", f"{k}?", "?", ["B"], kind) for k, kind in enumerate(["qa", "choice", "choice"])
    ]
    write_jsonl(tmp_path / "items.jsonl", (item.as_dict() for item in items))
    for model, texts in {"base": ["B", "The correct answer is (B)", "?"], "step-10": ["B", "A", "B"]}.items():
        answers = [
            {"benchmark": "plain", "task": "t", "id": item.id, "prompt_hash": item.prompt_hash, "text": text}
            for item, text in zip(items, texts, strict=True)
        ]
        write_jsonl(tmp_path / f"answers/{model}.jsonl", answers)
        write_scores(tmp_path, [model])
    found = make(tmp_path, MODELS[:2])
    values = {r["metric"]: (r["n"], r["value"]) for r in rows(found["summary"], model="base", task="t")}
    assert values == {m: (1, 100) for m in ("f1", "em", "sub_em", "string_match")} | {
        "accuracy": (2, 50), "accuracy_lenient": (2, 50), "parsed": (2, 50), EACH_OWN: (3, pytest.approx(200 / 3)),
    }  # fmt: skip
    assert row(found["comparisons"], task="", metric="accuracy")["n"] == 2


def test_models_are_compared_by_length_and_task_as_they_are_pooled(tmp_path):
    """Each length alone has the numbers of an evaluation of its questions alone; a single cell is not compared."""
    fields = [{"length": n, "depth": d} for n in (4096, 131072) for d in (0.0, 50.0)]
    tasks = {
        ("niah_plus", "single"): (fields * 2, {"base": "rwrpwwrr", "step-10": "rrwwrprr", "step-20": "rrrrrr w"}),
        ("niah_plus", "multi"): (fields[:2], {"base": "ww", "step-10": "rw", "step-20": "rp"}),
    }
    make_folder(tmp_path / "all", tasks)
    found = make(tmp_path / "all")["comparisons"]
    groups = {"", "length=4096", "length=131072", "depth=0", "depth=50"}
    assert {group_of(r) for r in found} == groups and {r["task"] for r in found} == {"single", "multi", ""}
    assert not rows(found, task="multi", length=131072), "it has no such question"

    def blank(letter: str, keep: bool) -> str:
        return letter if keep else " "

    for group in groups - {""}:
        name, value = group.split("=")
        part = {}
        for key, (asked, letters) in tasks.items():  # the others are not answered
            own = [field[name] == float(value) for field in asked]
            part[key] = asked, {m: "".join(map(blank, word, own)) for m, word in letters.items()}
        make_folder(tmp_path / group, part)
        alone = [r for r in make(tmp_path / group)["comparisons"] if group_of(r) == ""]
        assert [r | ALL for r in found if group_of(r) == group] == alone and alone
    one = row(found, b="step-20", task="single", metric="em", **ALL | {"length": 131072})
    assert (one["n"], one["left_out"], one["wins"], one["losses"], one["ties"]) == (3, 1, 1, 1, 1)


# Runs that differ by training seed

SEEDS = [{"name": name, "path": name, "adapter": None, "step": None} for name in ("base", "s1", "s2", "other", "s3")]
SEED_TASKS = {
    ("ruler_qa", "squad"): (
        [{"length": 4096}, {"length": 4096}, {"length": 8192}, {"length": 8192}],
        {"base": "rwww", "s1": "rrrw", "s2": "rwrw", "other": "rrww", "s3": "rrrr"},
    ),
    ("ruler_qa", "musique"): (
        [{"length": 4096}] * 2,
        {"base": "ww", "s1": "rw", "s2": "ww", "other": "rr", "s3": "wr"},
    ),
}


def test_seeds_of_one_run_are_a_row_with_mean_and_sample_deviation(tmp_path):
    make_folder(tmp_path, SEED_TASKS, SEEDS)
    harness = [
        {"model": m, "task": "ifeval", "metric": "acc", "value": v, "stderr": 0.01, "n": 10}
        for m, v in {"base": 0.5, "s1": 0.25, "s2": 0.5, "s3": 0.75}.items()
    ]
    single, found = (
        make(tmp_path, SEEDS, harness=harness),
        make(tmp_path, SEEDS, harness=harness, runs={"Solo": ["s3", "s1", "s2"]}),
    )
    assert single["runs"] == {} and found["runs"] == {"Solo": ["s1", "s2", "s3"]}
    assert rows(found["summary"], model="s2") == rows(single["summary"], model="s2"), "single runs stay as they are"
    assert found["models"] == single["models"]
    means = {"squad": (75, 50, 100), "musique": (50, 0, 50), "": (62.5, 25, 75)}
    for task, values in means.items():
        one = row(found["summary"], model="Solo", task=task, metric="em", **ALL)
        assert one["value"] == pytest.approx(sum(values) / 3) and one["seeds"] == 3
        assert one["sd"] == pytest.approx((sum((v - sum(values) / 3) ** 2 for v in values) / 2) ** 0.5)
        assert one["low"] <= one["value"] <= one["high"] and one["n"] == {"squad": 4, "musique": 2, "": 6}[task]
    for r in rows(found["summary"], model="Solo"):
        own = [
            row(found["summary"], model=m, **{k: r[k] for k in ("task", *GROUPS, "metric")})["value"]
            for m in ("s1", "s2", "s3")
        ]
        assert (r["value"], r["sd"]) == pytest.approx((statistics.mean(own), statistics.stdev(own)), abs=1e-9)
    # compared are the rows, each with the first; and what is asked for, single seeds as well
    assert list(dict.fromkeys((r["a"], r["b"]) for r in found["comparisons"])) == [("base", "Solo"), ("base", "other")]
    one = row(found["comparisons"], b="Solo", task="squad", metric="em", **ALL)
    # by question 100, 66.7, 100, 33.3 against 100, 0, 0, 0: of the 8 sign patterns two are as far from 0
    assert one["difference"] == pytest.approx(50) and (one["wins"], one["ties"], one["p_value"]) == (3, 1, 2 / 8)
    asked = make(tmp_path, SEEDS, compare=["Solo, other", "s1, s2"], runs={"Solo": ["s1", "s2", "s3"]})["comparisons"]
    assert list(dict.fromkeys((r["a"], r["b"]) for r in asked)) == [("Solo", "other"), ("s1", "s2")]
    assert found["harness"][:4] == harness
    assert found["harness"][4:] == [
        {
            "model": "Solo",
            "task": "ifeval",
            "metric": "acc",
            "value": 0.5,
            "stderr": None,
            "n": 10,
            "seeds": 3,
            "sd": 0.25,
        }
    ]


def test_equal_runs_tie_whatever_the_order_of_their_seeds(tmp_path):
    """Means of three scores of F1, which no float holds exactly."""
    words = ["rpw", "pwr", "wrp", "prw", "wpr", "rwp"]
    models = [{"name": f"m{i}", "path": "p", "adapter": None, "step": None} for i in range(6)]
    letters = {f"m{i}": "".join(word[i % 3] for word in words) for i in range(3)}
    letters |= {f"m{i + 3}": letters[f"m{(i + 1) % 3}"] for i in range(3)}
    make_folder(tmp_path, {("plain", "t"): ([{}] * 6, letters)}, models)
    found = make(tmp_path, models, runs={"A": ["m0", "m1", "m2"], "B": ["m3", "m4", "m5"]})
    for one in found["comparisons"]:
        assert (one["difference"], one["wins"], one["losses"], one["ties"], one["p_value"]) == (0, 0, 0, 6, 1)


def test_a_run_is_over_the_questions_that_all_its_seeds_answered(tmp_path, caplog):
    tasks = {("plain", "t"): ([{}] * 4, {"base": "wwww", "s1": "rr r", "s2": " rww", "other": "rrrr", "s3": "rrrr"})}
    make_folder(tmp_path, tasks, SEEDS)
    found = make(tmp_path, SEEDS, runs={"Solo": ["s1", "s2"]})
    one = row(found["summary"], model="Solo", task="t", metric="em")
    assert (one["n"], one["value"], one["sd"]) == (2, 75, pytest.approx(50 / 2**0.5))
    assert "Solo: 2 questions that not all of s1, s2 answered are left out." in caplog.text
    make_folder(tmp_path, {("plain", "t"): ([{}] * 2, {"base": "ww", "s1": "r ", "s2": " r"})}, SEEDS)
    with pytest.raises(DataError, match="`runs: Solo`: no question was answered by all of s1, s2; ask again."):
        make(tmp_path, SEEDS, runs={"Solo": ["s1", "s2"]})


# Choice of a checkpoint


def validation(short: dict, long: dict) -> dict:
    n = len(next(iter(short.values())))
    return {("validation", "short"): ([{}] * n, short), ("validation", "long"): ([{}] * n, long)}


def test_select(tmp_path, caplog):
    """The mean over tasks of the benchmark's main metric (sub_em: a partly right answer counts)."""
    good, bad = {"base": "w" * 20, "step-10": "r" * 19 + "p", "step-20": "r" * 20}, {
        "base": "w" * 20, "step-10": "p" * 20, "step-20": "r" * 12 + "w" * 8,
    }  # fmt: skip
    make_folder(tmp_path, validation(good, bad))
    with caplog.at_level(logging.INFO):
        found = make(tmp_path, select_by="validation")["selection"]
    assert {key: found[key] for key in ("benchmark", "metric", "best", "path", "adapter", "step", "folder")} == {
        "benchmark": "validation", "metric": "sub_em", "best": "step-10", "path": "models/base",
        "adapter": "saves/run/checkpoint-10", "step": 10, "folder": "saves/run/checkpoint-10",
    }  # fmt: skip
    assert [(r["model"], r["value"], r["difference"]) for r in found["ranking"]] == [
        ("step-10", 100, 0), ("step-20", 80, -20), ("base", 0, -100),
    ]  # fmt: skip
    assert found["n"] == 40 and found["left_out"] == 0 and found["tied"] == [] and found["warning"] is None
    second = found["ranking"][1]
    assert (second["wins"], second["losses"], second["ties"]) == (0, 8, 32)
    assert second["p_value"] == 2 / 2**8  # of the sign patterns of 8 differences, all down or all up
    assert found["note"] == (
        f"step-10 has 100.0 (100.0 to 100.0), step-20 80.0: 20.0 less ({-second['difference_high']:.1f} to "
        f"{-second['difference_low']:.1f}, p = 0.0078)."
    )
    stored = json.loads((tmp_path / "selection.json").read_text(encoding="utf-8"))
    assert stored == found | {"settings": {"seed": 42, "bootstrap_samples": 1000, "select_by": "validation"}}
    assert "Best by validation: step-10 (saves/run/checkpoint-10). " in caplog.text


def test_questions_behind_the_answers_count(tmp_path):
    """Five rows, each asked with both prompts, and two questions at three lengths: as sure as five and two are."""
    tasks = validation({"base": "wwwww", "step-10": "rrrrr"}, {"base": "wwwww", "step-10": "rrrrr"})
    make_folder(tmp_path, tasks, MODELS[:2])
    found = make(tmp_path, MODELS[:2], select_by="validation")
    assert row(found["comparisons"], task="", metric="em")["p_value"] == 2 / 2**5
    assert found["selection"]["ranking"][1]["p_value"] == 2 / 2**5

    items = [
        Item("ruler_qa", "squad", f"{k}/{n}", f"{k} {n}?", str(k), ["Rosvik"], length=n)
        for k in range(2) for n in (10, 20, 30)
    ]  # fmt: skip
    write_jsonl(tmp_path / "items.jsonl", (item.as_dict() for item in items))
    for name, right in (("base", "0"), ("step-10", "01")):
        answers = [
            {"benchmark": "ruler_qa", "task": "squad", "id": item.id, "prompt_hash": item.prompt_hash,
             "text": "Rosvik" if item.question in right else "Karvik"}
            for item in items
        ]  # fmt: skip
        write_jsonl(tmp_path / f"answers/{name}.jsonl", answers)
        write_scores(tmp_path, [name])
    found = make(tmp_path, MODELS[:2])
    one = row(found["summary"], model="base", task="squad", metric="em", **ALL)
    assert (one["n"], one["low"], one["value"], one["high"]) == (6, 0, 50, 100)  # P(0 of 2) = P(2 of 2) = 1 / 4
    one = row(found["comparisons"], task="squad", metric="em", **ALL)
    assert one["p_value"] == 1  # one question tells nothing


def test_ties_are_said(tmp_path):
    short = {"base": "w" * 20, "step-10": "r" * 19 + "w", "step-20": "w" + "r" * 19}
    make_folder(tmp_path, validation(short, short))
    found = make(tmp_path, select_by="validation")["selection"]
    assert found["best"] == "step-10"  # of equal ones the first of the list
    assert found["tied"] == ["step-20"] and [r["model"] for r in found["ranking"]] == ["step-10", "step-20", "base"]
    assert found["note"].endswith(
        "p = 1). These questions do not tell it from step-20 (p >= 0.05): the choice may be chance."
    )


def test_selection_on_what_is_reported_is_labelled(tmp_path, caplog):
    make_folder(tmp_path, QA_TASKS)
    found = make(tmp_path, select_by="longbench_qa")["selection"]
    assert found["best"] == "step-20" and found["folder"] == "saves/full/checkpoint-20"
    assert found["warning"] == (
        "The checkpoint is chosen by longbench_qa, which is also among the reported benchmarks: the chosen one's score "
        "there is too high on average (selection on the test set; the paper selects on LongBench v1, which it also "
        "reports). validation is held out for this."
    )
    assert found["warning"] in caplog.text


def test_select_on_common_questions_and_among_one(tmp_path):
    letters = {"base": "rr w", "step-10": "wrrr", "step-20": " wrr"}
    make_folder(tmp_path, {("plain", "t"): (NO_FIELDS, letters)})
    found = make(tmp_path, select_by="plain")["selection"]
    # q1 and q3 have all three answers: base r w, step-10 r r, step-20 w r
    assert {r["model"]: r["value"] for r in found["ranking"]} == {"step-10": 100, "base": 50, "step-20": 50}
    assert found["n"] == 2 and found["left_out"] == 2
    assert found["note"].endswith(" 2 questions that not all models answered are left out.")
    alone = make(tmp_path, MODELS[:1], select_by="plain")["selection"]
    assert alone["best"] == "base" and alone["note"] == "There was nothing to choose from."


def test_own_questions_of_both_kinds_count_each_by_its_metric(tmp_path):
    """Choices by accuracy, alone or beside questions that count by F1; also where a model answered one kind alone."""
    choices = {("plain", "letters"): ([{"kind": "choice"}] * 4, {"base": "ABBB", "step-10": "AAAB", "step-20": "    "})}
    make_folder(tmp_path, choices)
    found = make(tmp_path, MODELS[:2], select_by="plain")
    assert (found["selection"]["best"], found["selection"]["metric"]) == ("step-10", "accuracy")
    assert {r["metric"] for r in found["summary"]} == {"accuracy", "accuracy_lenient", "parsed"}
    words = {("plain", "words"): ([{}] * 2, {"base": "rp", "step-10": "rw", "step-20": "rr"})}
    make_folder(tmp_path, choices | words)
    found = make(tmp_path, MODELS[:2], select_by="plain")
    assert (found["selection"]["best"], found["selection"]["n"]) == ("step-10", 6)
    for name, letters, of_words in (("base", 25, (100 + 200 / 3) / 2), ("step-10", 75, 50)):
        own = rows(found["summary"], model=name, metric=EACH_OWN)
        assert [(r["task"], r["n"]) for r in own] == [("letters", 4), ("words", 2), ("", 6)]
        assert [r["value"] for r in own] == pytest.approx([letters, of_words, (letters + of_words) / 2])
    assert row(found["comparisons"], metric=EACH_OWN, task="", b="step-10", **ALL)["n"] == 6
    found = make(tmp_path, select_by="plain")["selection"]
    assert (found["best"], found["n"], found["left_out"]) == ("step-20", 2, 4)


# What does not matter, and what is refused


def test_one_interval_does_not_depend_on_the_others(tmp_path):
    """More models, another order of them, and more tasks change no number of a model."""
    make_folder(tmp_path / "a", QA_TASKS)
    make_folder(tmp_path / "b", dict(list(QA_TASKS.items())[:1]))
    every, some, fewer = make(tmp_path / "a"), make(tmp_path / "a", MODELS[2:0:-1]), make(tmp_path / "b")
    assert rows(every["summary"], model="step-10") == rows(some["summary"], model="step-10")
    assert rows(every["summary"], task="musique") == rows(fewer["summary"], task="musique")
    assert rows(every["comparisons"], task="musique") == rows(fewer["comparisons"], task="musique")
    assert make(tmp_path / "a", samples=50, seed=1)["summary"] != make(tmp_path / "a", samples=50)["summary"]
    assert make(tmp_path / "a") | {"date": ""} == every | {"date": ""}


@pytest.mark.parametrize("versions, wanted", [(["2", "1"], "1, 2"), (["1", "1"], "1"), (["1", None], None)])
def test_a_run_of_several_seeds_names_the_harness_that_ran(versions, wanted):
    rows = [{"model": str(i), "task": "t", "metric": "acc", "value": 0.5, "n": 4} for i in range(2)]
    rows = [row | ({"version": v} if v else {}) for row, v in zip(rows, versions, strict=True)]
    assert next(harness_of("Solo", ["0", "1"], rows)).get("version") == wanted


HARNESS_ROW = {"model": "base", "task": "ifeval", "metric": "acc", "value": 50.0, "stderr": 1.0, "n": 10}


def test_a_number_that_the_harness_lacks_is_null_and_not_in_a_runs_mean(tmp_path):
    """NaN and infinity are no JSON, and a deviation of them ended the evaluation."""
    values = {"s1": float("nan"), "s2": 1.0, "s3": 4.0}
    harness = [{"model": m, "task": "t", "metric": "mcc", "value": v, "stderr": float("inf"), "n": 9}
               for m, v in values.items()]  # fmt: skip
    harness += [row | {"metric": "none", "value": float("nan")} for row in harness]
    results = make(tmp_path, SEEDS, harness=harness, runs={"Solo": ["s1", "s2", "s3"]})
    found = results["harness"]
    assert [(r["value"], r["stderr"]) for r in found[:3]] == [(None, None), (1, None), (4, None)]
    spread = pytest.approx(4.5**0.5)
    assert [(r["value"], r["seeds"], r["sd"]) for r in found[6:]] == [(2.5, 2, spread), (None, 0, None)]
    assert not {"NaN", "Infinity"} & set((tmp_path / "results.json").read_text().replace(",", " ").split())
    assert harness_table(results).blocks[0][1] == [
        ("Solo (n=3 seeds)", [("2.5", "sd 2.1 over 2 seeds, n=9"), ("no number", "")])
    ]
    uncounted = results | {"harness": [HARNESS_ROW | {"n": None}]}
    assert harness_table(uncounted).blocks[0][1] == [("base", [("50", "± 1")])]


def test_only_the_harness(tmp_path):
    """Without questions of ours nothing but its rows is there."""
    harness = [HARNESS_ROW]
    found = make(tmp_path, harness=harness)
    assert found["harness"] == harness and found["summary"] == found["comparisons"] == []
    assert found["title"] == tmp_path.name and found["settings"] == {"seed": 42, "bootstrap_samples": 1000}
    assert {"python", "solopo", "numpy", "torch"} <= set(found["versions"])
    assert "lm_eval" not in found["versions"], "its rows say which one ran"


PAIRS = "`compare` must hold pairs of two models, of base, step-10, step-20; got "
BAD = {  # name: (arguments, the sentence)
    "unknown benchmark": (
        {"select_by": "longbench"},
        f"`select_by` must be one of {', '.join(MAIN_METRIC)}; got 'longbench'.",
    ),
    "not asked": (
        {"select_by": "validation"},
        "`select_by: validation` has nothing to choose `base` by: it has no scores there; add it to `benchmarks`, or ",
    ),
    "not a model": ({"compare": [["base", "step-30"]]}, PAIRS + "['base', 'step-30']."),
    "itself": ({"compare": ["base, base"]}, PAIRS + "'base, base'."),
    "not a pair": ({"compare": ["base"]}, PAIRS + "'base'."),
    "three": ({"compare": ["base, step-10, step-20"]}, PAIRS + "'base, step-10, step-20'."),
    "a number": ({"compare": [3]}, PAIRS + "3."),
    "lists": ({"compare": [[["base"], "step-10"]]}, PAIRS + "[['base'], 'step-10']."),
    "one seed": (
        {"runs": {"Solo": ["base"]}},
        "`runs: Solo` must list at least two models that differ by training seed; got ['base'].",
    ),
    "no list of seeds": ({"runs": {"Solo": "base, step-10"}}, "`runs: Solo` must list at least two models that "),
    "a seed that is no model": (
        {"runs": {"Solo": ["base", "step-30"]}},
        "`runs: Solo` names 'step-30', which is none of the models base, step-10, step-20.",
    ),
    "a seed that is a list": ({"runs": {"Solo": ["base", ["step-10"]]}}, "`runs: Solo` names ['step-10'], which is "),
    "a seed twice": ({"runs": {"Solo": ["base", "base"]}}, "`runs: Solo` names 'base', which is in Solo already; once"),
    "a seed in two runs": (
        {"runs": {"A": ["base", "step-10"], "B": ["step-20", "step-10"]}},
        "`runs: B` names 'step-10', which is in A already; once is enough.",
    ),
    "a run called as a model": (
        {"runs": {"base": ["base", "step-10"]}},
        "`runs: base` must have a name of its own, other than those of the models base, step-10, step-20.",
    ),
    "a run without a name": ({"runs": {1: ["base", "step-10"]}}, "`runs: 1` must have a name of its own, other than "),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(tmp_path, name):
    arguments, sentence = BAD[name]
    make_folder(tmp_path, QA_TASKS)
    with pytest.raises(DataError) as error:
        make(tmp_path, **arguments)
    assert str(error.value).startswith(sentence)
    assert not (tmp_path / "results.json").exists()


def test_missing_scores_and_no_common_question(tmp_path):
    make_folder(tmp_path, {("plain", "t"): (NO_FIELDS[:2], {"base": "r ", "step-10": " r", "step-20": "rr"})})
    with pytest.raises(
        DataError, match="`select_by: plain`: no question was answered by all of base, step-10, step-20"
    ):
        make(tmp_path, select_by="plain")
    (tmp_path / "scores/base.jsonl").unlink()
    with pytest.raises(DataError, match=r"Cannot read .*scores/base\.jsonl: there is no such file or folder"):
        make(tmp_path)
