"""The whole way, from questions to the report: real questions and models, and known answers with known scores."""

import json
import shutil
from fractions import Fraction

import pytest
import torch
from conftest import SHARED_DATA, write_recipe
from evaluate import main as evaluate
from host_api import host_api
from material import HOTPOTQA, MUSIQUE, make_questions, save_tokenizer
from scripted_server import serving
from toy import make_adapter

from solopo_plugin.evaluation.items import GROUPS, MAIN_METRIC
from solopo_plugin.qa.files import read_jsonl, write_json, write_jsonl

pytestmark = pytest.mark.timeout(400)


def results(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


def texts(folder, model: str) -> dict[tuple, tuple]:
    """What a model was shown and said, by question."""
    rows = [row for row in read_jsonl(folder / "answers" / f"{model}.jsonl") if "fingerprint" not in row]
    return {(r["benchmark"], r["task"], r["id"]): (r["prompt_tokens"], r["text"]) for r in rows}


# ---- real questions, real models

needs_data = pytest.mark.skipif(
    not (MUSIQUE.exists() and HOTPOTQA.exists()),
    reason=f"no questions in {SHARED_DATA}; set SOLOPO_SHARED_DATA",
)
N_ASKED = 2 * 2 * 2 + 3  # tasks, questions of each, lengths; and given contexts
N_CUT = 2  # of those


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """A tiny model, and the output folders of a whole and of a LoRA training run with two checkpoints each."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(tiny_model(), folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    for step in (10, 2):
        make_adapter(str(folder / "base"), folder / "lora" / f"checkpoint-{step}", seed=step)
        with torch.no_grad():
            model.lm_head.weight += 0.02 * torch.randn(model.lm_head.weight.shape, generator=torch.manual_seed(step))
        shutil.copytree(folder / "base", folder / "whole" / f"checkpoint-{step}")
        model.save_pretrained(folder / "whole" / f"checkpoint-{step}")
    rows = list(read_jsonl(MUSIQUE))
    text = "\n".join(paragraph["paragraph_text"] for row in rows[:12] for paragraph in row["paragraphs"])
    write_jsonl(folder / "plain.jsonl", (
        {"id": row["id"], "question": row["question"], "answers": [row["answer"]], "context": text[:characters]}
        for row, characters in zip(rows, (1_500, 20_000, 40_000), strict=False)
    ))  # fmt: skip
    return folder


def real_recipe(folder, trained, **keys) -> str:
    base = dict(
        checkpoints=[str(trained / "lora"), str(trained / "whole")], with_base=False, template="qwen", max_new_tokens=6,
        models={"base": str(trained / "base")}, benchmarks=["ruler_qa", "plain"], ruler_lengths=[1800, 2700],
        ruler_questions=2, ruler_data={"musique": str(MUSIQUE), "hotpotqa": str(HOTPOTQA)}, max_input_tokens=2600,
        plain_data=str(trained / "plain.jsonl"), output_dir=str(folder / "out"), backend="transformers",
        bootstrap_samples=50,
    )  # fmt: skip
    return write_recipe(folder / "recipe.yaml", base | keys)


@pytest.fixture(scope="module")
def by_transformers(zygote, trained, tmp_path_factory):
    """The command line over all checkpoints; returns its folder and what it said."""
    folder = tmp_path_factory.mktemp("transformers")
    real_recipe(folder, trained)
    code = zygote.run("scripts/evaluate.py", folder, "--select", "ruler_qa")
    said = (folder / "log.txt").read_text()
    assert code == 0, said[-3000:]
    return folder, said


NAMES = ["base", "lora-checkpoint-2", "lora-checkpoint-10", "whole-checkpoint-2", "whole-checkpoint-10"]


@needs_data
@pytest.mark.slow
def test_every_checkpoint_is_asked_and_the_best_is_named(by_transformers, trained):
    folder, log = by_transformers
    found = results(folder / "out")
    assert [model["name"] for model in found["models"]] == NAMES
    assert [model["step"] for model in found["models"]] == [None, 2, 10, 2, 10]
    said = {name: texts(folder / "out", name) for name in NAMES}
    assert all(len(answers) == N_ASKED for answers in said.values())
    assert len({json.dumps(sorted(answers.items())) for answers in said.values()}) == 5  # each answers in its own way
    for name in NAMES:
        assert f"{name}: {N_ASKED} of {N_ASKED} questions to be asked." in log
        assert f"{name}: 100%" in log
        assert f"{name}: ruler_qa: 8 answers; 0 prompts were longer than 2600 tokens" in log
        assert f"{name}: plain: 3 answers; {N_CUT} prompts were longer than 2600 tokens" in log
        lengths = sorted(tokens for (benchmark, *_), (tokens, _) in said[name].items() if benchmark == "plain")
        assert lengths[0] < 2000 and 2590 < lengths[1] <= lengths[2] <= 2600
        assert all(model["counts"]["cut"] == N_CUT for model in found["models"])
    choice = json.loads((folder / "out" / "selection.json").read_text())
    assert choice["benchmark"] == "ruler_qa" and choice["best"] in NAMES
    assert choice["folder"] in {str(trained / name.replace("-", "/", 1)) for name in NAMES}
    assert "test set" in choice["warning"] and f"Best by ruler_qa: {choice['best']}" in log
    assert f"Report: {folder}/out/report/index.html" in log and (folder / "out/report/index.html").exists()
    means = {
        row["model"]: f"{row['value']:.1f}"
        for row in found["summary"]
        if (row["task"], row["metric"]) == ("", "f1") and not row.get("length")
    }
    table = log.split("RULER QA, F1 by length of the prompt in tokens")[1].splitlines()
    shown = {line.split()[0]: line.split()[-1] for line in table if line.startswith("  ")}  # the last block: the mean
    assert len(means) == 5 and shown == means


@needs_data
@pytest.mark.slow
def test_stored_answers_are_scored_again_without_a_model(by_transformers, trained, tmp_path, monkeypatch, capsys):
    """Also: another run asks nothing, and the numbers are the same."""
    folder = shutil.copytree(by_transformers[0], tmp_path / "copy")
    before = results(folder / "out")
    recipe = real_recipe(folder, trained, select_by="ruler_qa")
    monkeypatch.setattr("solopo_plugin.evaluation.ask.generate", lambda *_: pytest.fail("asked again"))
    assert evaluate([recipe]) == 0
    away = dict(models=["nowhere"], plain_data=str(trained / "plain.jsonl"))
    gone = real_recipe(folder, folder / "nowhere", select_by="ruler_qa", **away)
    assert evaluate([gone]) == 1 and "is no folder; give the `output_dir` of a training run" in capsys.readouterr().err
    assert evaluate([gone, "--rescore"]) == 0
    after = results(folder / "out")
    for part in ("models", "summary", "comparisons", "selection"):
        assert after[part] == before[part]
    seeds = ["lora-checkpoint-2", "lora-checkpoint-10"]
    together = real_recipe(folder, folder / "nowhere", runs={"lora": seeds}, **away)
    assert evaluate([together, "--rescore"]) == 0
    after = results(folder / "out")
    pairs = {(row["a"], row["b"]) for row in after["comparisons"]}
    assert pairs == {("base", name) for name in ("lora", *NAMES[3:])} and after["runs"] == {"lora": seeds}
    assert "lora (n=2 seeds)" in (folder / "out" / "report" / "index.html").read_text()
    wrong = real_recipe(folder, folder / "nowhere", runs={"lora": ["base", "seed3"]}, **away)
    assert evaluate([wrong, "--rescore"]) == 1
    assert f"`runs: lora` names 'seed3', which is none of the models {', '.join(NAMES)}." in capsys.readouterr().err


@needs_data
@pytest.mark.slow
def test_the_hosts_server_answers_as_the_local_model(by_transformers, trained, tmp_path):
    """Greedy, the same prompts of the same length, cut ones, too: same tokens, same answers."""
    with host_api(trained / "base", tmp_path / "api.log") as (url, ready):
        ready()
        keys = dict(checkpoints=None, backend="openai", server_urls=url)
        assert evaluate([real_recipe(tmp_path, trained, **keys)]) == 0
    assert texts(tmp_path / "out", "base") == texts(by_transformers[0] / "out", "base")
    assert results(tmp_path / "out")["models"][0]["counts"]["cut"] == N_CUT


# ---- known answers, known scores

# what is said of a gold answer of one word -> f1, em, sub_em, string_match, by hand
SAID = [
    ("It is so. The answer is: {}", 100, 100, 100, 100),
    ("It is so. The answer is: {} town", Fraction(200, 3), 0, 100, 100),  # precision 1/2, recall 1
    ("It may be. The answer is: No answer.", 0, 0, 0, 0),
    ("{} comes to mind. The answer is: nowhere", 0, 0, 0, 100),  # a mention does not count, but for RULER's
    ("{}", 100, 100, 100, 100),  # no marker: the whole text is the prediction
    ("I think of {} or another", Fraction(200, 7), 0, 0, 100),  # the same: precision 1/6; no sub-EM without marker
    ("", 0, 0, 0, 0),
]
CHOSEN = [  # what is said of a letter -> accuracy, accuracy_lenient, parsed
    ("The correct answer is ({})", 100, 100, 100), ("**The correct answer is {}**", 100, 100, 100),
    ("So $\\boxed{{{}}}$", 0, 100, 0), ("It is {}, I think.", 0, 0, 0), ("The correct answer is (Z)", 0, 0, 0),
]  # fmt: skip
METRICS = ("f1", "em", "sub_em", "string_match")


def kind(question: str, shift: int) -> int:
    """Which of the answers above a question gets."""
    return int(question.split("no. ")[1].split(" ")[0]) + shift


def respond(question: str, gold: str, choice: bool, shift: int) -> str:
    said = CHOSEN if choice else SAID
    return said[kind(question, shift) % len(said)][0].format(gold)


def expected(question: str, choice: bool, shift: int) -> dict[str, Fraction]:
    said, names = (CHOSEN, ("accuracy", "accuracy_lenient", "parsed")) if choice else (SAID, METRICS)
    return dict(zip(names, map(Fraction, said[kind(question, shift) % len(said)][1:]), strict=True))


def write_benchmarks(folder) -> tuple[dict, dict]:
    """Files of all six benchmarks; returns the keys for them and, by question, its gold answer."""
    golds = {}

    def ask(where: str, i: int, gold: str) -> str:
        question = f"In {where}, what belongs to no. {i} of the list?"
        golds[question] = gold
        return question

    def rows(where: str, n: int) -> list[dict]:
        made = make_questions(n, seed=sum(map(ord, where)))
        return [row | {"question": ask(where, i, row["answers"][0])} for i, row in enumerate(made)]

    sizes = {"narrativeqa": 9, "qasper": 8, "multifieldqa_en": 7, "hotpotqa": 5, "2wikimqa": 3, "musique": 11}
    for task, n in sizes.items():
        write_jsonl(folder / "longbench" / f"{task}.jsonl", ({
            "input": ask(task, i, f"Gold{i}"), "context": f"Passage 1:\nIt is Gold{i}.", "answers": [f"Gold{i}"],
            "length": 5000, "dataset": task, "language": "en", "all_classes": None, "_id": f"{task}{i}",
        } for i in range(n)))  # fmt: skip
    write_json(folder / "v2.json", [{
        "_id": f"v{i}", "domain": "d", "sub_domain": "s", "difficulty": ("easy", "hard")[i % 2], "context": "A story.",
        "length": ("short", "medium", "long")[i % 3], "question": ask("v2", i, "ABCD"[i % 4]), "answer": "ABCD"[i % 4],
        **{f"choice_{letter}": f"choice {letter}" for letter in "ABCD"},
    } for i in range(13)])  # fmt: skip
    for name in ("ruler", "needles", "plain"):
        write_jsonl(folder / f"{name}.jsonl", rows(name, 17))
    write_jsonl(folder / "val.jsonl", (
        {"id": row["id"], "question": row["question"], "answers": row["answers"], "hops": row["hops"],
         "short_evidence": [], "long_evidence": [],
         **{side: f"{side}: {row['question']} End with `The answer is: ...`." for side in ("prompt", "long_prompt")}}
        for row in rows("val", 10)
    ))  # fmt: skip
    keys = dict(
        longbench_data=str(folder / "longbench"), longbench_v2_data=str(folder / "v2.json"),
        ruler_data={"made": str(folder / "ruler.jsonl")}, ruler_lengths=[500, 900], ruler_questions=12,
        niah_needles={"made": str(folder / "needles.jsonl")}, niah_lengths=[500], niah_depths=[0, 100],
        niah_questions=5, plain_data=str(folder / "plain.jsonl"), validation_data=str(folder / "val.jsonl"),
    )  # fmt: skip
    return keys, golds


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """An evaluation of two models whose every answer is known, over all benchmarks; the second says other things."""
    folder = tmp_path_factory.mktemp("known")
    keys, golds = write_benchmarks(folder)
    (folder / "tokenizer").mkdir()
    tokenizer = save_tokenizer(folder / "tokenizer")
    for name, shift in SHIFTS.items():
        choice = {question: question.startswith("In v2,") for question in golds}
        said = {q: respond(q, gold, choice[q], shift) for q, gold in golds.items()}
        (folder / f"{name}.json").write_text(json.dumps(said))
    with serving(folder / "a.json", verbatim=True) as a, serving(folder / "b.json", verbatim=True) as b:
        recipe = dict(
            models={"a": "served-a", "b": "served-b"}, model_name_or_path=tokenizer, template="qwen", backend="openai",
            server_urls={"a": a.url, "b": b.url}, served_model="scripted", benchmarks=list(MAIN_METRIC), **keys,
            output_dir=str(folder / "out"), select_by="validation", bootstrap_samples=200, max_new_tokens=50,
        )  # fmt: skip
        assert evaluate([write_recipe(folder / "recipe.yaml", recipe)]) == 0
    items = list(read_jsonl(folder / "out" / "items.jsonl"))
    return folder / "out", items


SHIFTS = {"a": 0, "b": 3}


def of_all(row: dict) -> bool:
    """Tell whether a row of results.json is of all questions."""
    return not any(row[name] is not None for name in GROUPS)


def mean(values: list[Fraction]) -> Fraction:
    return sum(values, Fraction(0)) / len(values)


def by_task(items: list[dict], shift: int) -> dict[tuple, dict[tuple, dict]]:
    """(benchmark, task) -> question's key -> scores by hand."""
    found = {}
    for row in items:
        scores = expected(row["question"], row["kind"] == "choice", shift)
        found.setdefault((row["benchmark"], row["task"]), {})[row["id"]] = scores
    return found


@pytest.mark.parametrize("model", SHIFTS)
@pytest.mark.slow
def test_known_answers_give_the_known_scores(known, model):
    """Every benchmark, task and metric, and the means over tasks, to the last digit."""
    folder, items = known
    hand = by_task(items, SHIFTS[model])
    assert {benchmark for benchmark, _ in hand} == set(MAIN_METRIC) and len(items) > 100
    wanted = {}
    for benchmark in MAIN_METRIC:
        tasks = {task: questions for (b, task), questions in hand.items() if b == benchmark}
        for metric in next(iter(next(iter(tasks.values())).values())):
            means = {task: mean([s[metric] for s in questions.values()]) for task, questions in tasks.items()}
            wanted |= {(benchmark, task, metric): value for task, value in means.items()}
            wanted[benchmark, "", metric] = mean(list(means.values()))
    rows = [row for row in results(folder)["summary"] if row["model"] == model and of_all(row)]
    got = {(row["benchmark"], row["task"], row["metric"]): row["value"] for row in rows}
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert got[key] == pytest.approx(float(value), rel=1e-13, abs=1e-13), key
    assert 0 < wanted["longbench_qa", "", "f1"] < 100 and wanted["longbench_v2", "all", "accuracy"] > 0


def test_known_answers_give_the_known_comparison_and_choice(known):
    folder, items = known
    a, b = (by_task(items, shift) for shift in SHIFTS.values())
    found = results(folder)
    rows = {(r["benchmark"], r["task"], r["metric"]): r for r in found["comparisons"] if of_all(r)}
    for (benchmark, task), questions in a.items():
        for metric in next(iter(questions.values())):
            differences = [b[benchmark, task][id][metric] - scores[metric] for id, scores in questions.items()]
            row = rows[benchmark, task, metric]
            assert (row["a"], row["b"], row["n"]) == ("a", "b", len(questions))
            assert row["difference"] == pytest.approx(float(mean(differences)), rel=1e-12, abs=1e-12)
            signs = [(d > 0) - (d < 0) for d in differences]
            assert (row["wins"], row["losses"], row["ties"]) == tuple(map(signs.count, (1, -1, 0)))
    sub_em = {  # a mean over both tasks
        name: mean([mean([s["sub_em"] for s in of["validation", side].values()]) for side in ("short", "long")])
        for name, of in (("a", a), ("b", b))
    }
    assert found["selection"]["best"] == max(sub_em, key=sub_em.get) and sub_em["a"] != sub_em["b"]
    assert found["selection"]["warning"] is None


def test_known_answers_are_counted(known):
    """Answers without the marker and empty ones, by hand."""
    folder, items = known
    for model in results(folder)["models"]:
        said = [respond(row["question"], "x", row["kind"] == "choice", SHIFTS[model["name"]]) for row in items]
        unmarked = sum(
            not ("The answer is:" in text or "answer is (x" in text or "answer is x" in text) for text in said
        )
        assert model["counts"]["asked"] == len(items) and model["counts"]["no_marker"] == unmarked
        assert model["counts"]["empty"] == said.count("") > 0 and model["counts"]["cut"] == 0
