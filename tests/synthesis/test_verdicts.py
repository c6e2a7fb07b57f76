"""A model as judge: what it is told, what is read of it, that position cancels, that nothing is asked twice.

The judge is a scripted server whose true grades, noise, bias for a position and faults are known.
"""

import json
import random
import re
import signal
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import yaml
from build_data import PHRASES
from material import make_questions
from scripted_judge import judging, verdict
from scripted_server import share
from small_work import answer, context, recipe_for

from solopo_plugin.qa.files import DataError, read_jsonl, write_jsonl
from solopo_plugin.qa.store import Store
from solopo_plugin.synthesis import judge, verdicts
from solopo_plugin.synthesis.look import inspect
from solopo_plugin.synthesis.pipeline import run_pipeline
from solopo_plugin.synthesis.recipe import make_recipe, outside_inputs, stage_settings
from solopo_plugin.synthesis.verdicts import pairs_of, read_rubric, read_verdict

FORMS = ("score", "pairwise")
N, K = 6, 5  # questions, answers to each


def graded(name: str, k: int, grade: int, **changes) -> dict:
    """An answer of samples.<side>.jsonl that says its true grade."""
    return {"id": name, "k": k, "text": f"Sample {k}, of grade {grade}.", "finish_reason": "stop"} | changes


def write_samples(work: Path, grades: list[list[int]], **changes) -> list[dict]:
    """contexts.jsonl, and samples on the short side whose true grades are these; none on the long side."""
    rows = [graded(f"q{i}", k, grade, **changes) for i, row in enumerate(grades) for k, grade in enumerate(row)]
    write_jsonl(work / "contexts.jsonl", map(context, range(len(grades))))
    write_jsonl(work / "samples.short.jsonl", rows)
    write_jsonl(work / "samples.long.jsonl", [])
    return rows


def some_grades(n: int = N, k: int = K, highest: int = 8) -> list[list[int]]:
    rng = random.Random("grades")
    return [[rng.randint(4, highest) for _ in range(k)] for _ in range(n)]


def recipe(work: Path, url: str, **keys):
    base = dict(judge="model", judge_backend="openai", judge_server_urls=url, concurrency=8)
    return recipe_for(work, **base | keys)


def judged(work: Path) -> dict[tuple[str, int], dict]:
    return {(row["id"], row["k"]): row for row in read_jsonl(work / "judged.short.jsonl")}


# ---- position and noise


@pytest.mark.parametrize("bias", [-2, 0, 2])
def test_scores_averaged_over_both_orders_are_the_true_grades(tmp_path, bias):
    """Each verdict is off by the bias; the counts say by how much."""
    write_samples(tmp_path, some_grades())
    with judging(bias=bias) as server:
        counts = judge.run(recipe(tmp_path, server.url), tmp_path)["short"]
    for row in judged(tmp_path).values():
        assert row["grade"] == int(re.search(r"grade (\d+)", row["text"])[1])
        assert row["correct"] == (row["grade"] >= 7)
    assert counts["position_bias"] == bias and counts["verdicts"] == len(server.seen) == 2 * N * K
    off = [float(re.findall(r"Score: (\d+)", verdict(prompt, bias=bias))[-1]) for prompt in server.seen]
    true = [int(re.search(r"of grade (\d+)", prompt)[1]) for prompt in server.seen]
    assert {abs(a - b) for a, b in zip(off, true, strict=True)} == {abs(bias)}


def test_noise_is_halved_and_bias_is_not_in_it(tmp_path):
    """A fifth of the verdicts too high, a fifth too low, by a point: the mean error is within 4 standard deviations."""
    write_samples(tmp_path, some_grades(40, highest=7))
    with judging(bias=2, noise=0.2) as server:
        counts = judge.run(recipe(tmp_path, server.url), tmp_path)["short"]
    errors = [row["grade"] - int(re.search(r"grade (\d+)", row["text"])[1]) for row in judged(tmp_path).values()]
    assert len(errors) == 40 * K and set(errors) <= {-1, -0.5, 0, 0.5, 1}
    spread = (0.4 / 2) ** 0.5  # of the mean of two errors
    assert abs(sum(errors) / len(errors)) < 4 * spread / len(errors) ** 0.5
    assert 0.8 * spread < (sum(e * e for e in errors) / len(errors)) ** 0.5 < 1.2 * spread
    assert abs(counts["position_bias"] - 2) < 4 * spread / len(errors) ** 0.5


@pytest.mark.parametrize("bias, moved", [(0, 0.0), (10, 4.5), (-10, -4.5)])
def test_comparisons_in_both_orders_know_no_position(tmp_path, bias, moved):
    """A judge that always takes the first answer says nothing; one without bias ranks by the true grade."""
    grades = [random.Random(i).sample(range(1, 11), 7) for i in range(N)]
    write_samples(tmp_path, grades)
    with judging(bias=bias) as server:
        made = recipe(tmp_path, server.url, judge_form="pairwise", judge_rivals=3)
        counts = judge.run(made, tmp_path)["short"]
    rows = judged(tmp_path)
    assert counts["position_bias"] == moved
    for i, row in enumerate(grades):
        found = [rows[f"q{i}", k]["grade"] for k in range(7)]
        if bias:
            assert set(found) == {5.5}
        else:  # 7 answers, 3 rivals: everyone meets everyone
            assert sorted(range(7), key=found.__getitem__) == sorted(range(7), key=row.__getitem__)
            assert max(found) == 10 and min(found) == 1


# ---- the plan


@pytest.mark.parametrize("n, rivals", [(0, 2), (1, 2), (2, 2), (3, 1), (4, 2), (5, 2), (6, 3), (8, 3), (32, 2)])
def test_every_answer_is_compared_as_often_as_any_other(n, rivals):
    pairs = pairs_of(n, rivals)
    assert len({frozenset(pair) for pair in pairs}) == len(pairs) == min(n * rivals, n * (n - 1) // 2)
    assert len(set(Counter(i for pair in pairs for i in pair).values())) <= 1 and all(i != j for i, j in pairs)


@pytest.mark.parametrize("form", FORMS)
def test_counts_are_those_of_the_plan(tmp_path, form):
    """What cannot be used is not asked about; what cannot be read is counted, and half a trial gives no grade."""
    rows = write_samples(tmp_path, some_grades())
    rows[0] |= {"finish_reason": "length"}
    rows[1] |= {"text": " \n"}
    rows[2] |= {"text": "<think>Of grade 5."}
    write_jsonl(tmp_path / "samples.short.jsonl", rows)
    with judging(malformed=0.15) as server:
        counts = judge.run(recipe(tmp_path, server.url, judge_form=form, judge_samples=2), tmp_path)["short"]
    assert len(server.seen) == len(set(server.seen))  # both verdicts of a prompt in one request
    trials = N * K - 3 if form == "score" else (N - 1) * 2 * K + 1
    assert counts["verdicts"] == 2 * len(server.seen) == 4 * trials
    lost = [prompt for prompt in server.seen if share("malformed", prompt) < 0.15]
    assert counts["malformed"] == 2 * len(lost) > 0
    assert (counts["answers"], counts["cut"], counts["not_judged"]) == (N * K, 1, 3)
    assert counts["graded"] + counts["no_grade"] + counts["not_judged"] == N * K
    found = judged(tmp_path)
    assert [found["q0", k]["grade"] for k in range(3)] == [None] * 3 and found["q0", 2]["answer"] is None
    if form == "score":
        halves = {(re.search(r"Question: .*", prompt)[0], re.search(r"<answer>\n(.*)", prompt)[1]) for prompt in lost}
        assert counts["no_grade"] == len(halves)
    assert counts["questions"] == N and counts["correct"] == sum(row["correct"] for row in found.values())


def test_what_the_judge_is_told(tmp_path):
    """The question, the whole evidence and the answer, each once, in both orders; braces in texts are no places."""
    write_samples(tmp_path, [[5]], text="Of grade 5, {evidence} and {first}.")
    contexts = [context(0)]
    contexts[0]["question"] = "What is {second}?"
    write_jsonl(tmp_path / "contexts.jsonl", contexts)
    with judging() as server:
        judge.run(recipe(tmp_path, server.url), tmp_path)
    for prompt in server.seen:
        for text in ("What is {second}?", "Person 0 works for firm 0.\n\nFirm 0 sits in Town0ville.", "{first}."):
            assert prompt.count(text) == 1
        assert "Other 0" not in prompt  # no distractor
    assert {prompt.index("<answer>") < prompt.index("<evidence>") for prompt in server.seen} == {True, False}


# ---- kept and used again


def test_nothing_is_asked_twice(tmp_path):
    """Not with other thresholds; with another rubric all is, and what was said to the former one comes back."""
    rows = write_samples(tmp_path, some_grades())
    (tmp_path / "mine.txt").write_text("Mine. {question} {first} {second} Score: n")
    with judging() as server:
        made = partial(recipe, tmp_path, server.url)
        judge.run(made(), tmp_path)
        first = (tmp_path / "judged.short.jsonl").read_bytes()
        for keys, asked in [
            ({}, 0), ({"judge_chosen_min": 8.0}, 0), ({"judge_rubric": str(tmp_path / "mine.txt")}, 2 * N * K), ({}, 0),
            ({"judge_samples": 2}, 2 * N * K), ({"judge_temperature": 1.0}, 2 * N * K), ({"concurrency": 1}, 0),
        ]:  # fmt: skip
            before = len(server.seen)
            judge.run(made(**keys), tmp_path)
            assert len(server.seen) - before == asked, keys
        assert (tmp_path / "judged.short.jsonl").read_bytes() == first
        write_jsonl(tmp_path / "samples.short.jsonl", [*rows[:-1], rows[-1] | {"text": "Anew, of grade 4."}])
        before = len(server.seen)
        judge.run(made(), tmp_path)
        assert len(server.seen) - before == 2 and judged(tmp_path)[f"q{N - 1}", K - 1]["grade"] == 4


@pytest.mark.slow
def test_what_was_said_before_a_stop_is_kept(tmp_path, monkeypatch):
    write_samples(tmp_path, some_grades())
    add, times = Store.add, []

    def stop(store, *args):
        times.append(1)
        if len(times) > 30:
            raise KeyboardInterrupt
        add(store, *args)

    with judging() as server:
        made = recipe(tmp_path, server.url, concurrency=1)
        monkeypatch.setattr(Store, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            judge.run(made, tmp_path)
        monkeypatch.undo()
        assert 30 <= len(server.seen) <= 32
        judge.run(made, tmp_path)
        assert 2 * N * K <= len(server.seen) <= 2 * N * K + 2


# ---- what is read of a reply

READ = [
    ("score", "Good.\nScore: 7", 7), ("score", "Score: 3? No.\n**Score: 8/10**", 8), ("score", "score : 6.5", 6.5),
    ("score", "Score: [9]", 9), ("score", "Score: 10.", 10), ("score", "Score: 0", None), ("score", "Score: 11", None),
    ("score", "Score: 100", None), ("score", "Seven", None), ("score", "", None), ("score", "Score: n", None),
    ("score", "<think>Score: 3</think>Score: 4", 4), ("score", "<think>Score: 3", None), ("score", "Score:\n\n5", 5),
    ("pairwise", "Verdict: first", 10), ("pairwise", "**Verdict:** second.", 1), ("pairwise", "verdict: `tie`", 5.5),
    ("pairwise", "Verdict: first\nVerdict: second", 1), ("pairwise", "The first", None), ("pairwise", "Score: 7", None),
    ("pairwise", "Verdict: both", None), ("pairwise", "Verdict: firstly", None),
]  # fmt: skip


@pytest.mark.parametrize("form, reply, grade", READ)
def test_what_is_read_of_a_reply(form, reply, grade):
    assert read_verdict(form, reply) == grade


@pytest.mark.parametrize("form", FORMS)
def test_a_judge_that_keeps_to_no_form_is_one_sentence(tmp_path, form):
    """And is not asked ten thousand times first."""
    write_samples(tmp_path, some_grades(60))
    sentence = (
        r"^None of 64 verdicts of the judge can be read: each must end with `(Score|Verdict): ...`, and one ends with "
        r"str '.*'; take a stronger judge, raise `judge_max_new_tokens: 512`, or ask for that line more plainly"
    )
    with judging(malformed=1.0) as server, pytest.raises(DataError, match=sentence) as error:
        judge.run(recipe(tmp_path, server.url, judge_form=form), tmp_path)
    assert 64 <= len(server.seen) < 100 and "\n" not in str(error.value)
    write_samples(tmp_path, some_grades(1, 2))
    with judging(malformed=1.0) as server, pytest.raises(DataError, match=r"^None of [24] verdicts of the judge can"):
        judge.run(recipe(tmp_path, server.url, judge_form=form), tmp_path)


GOOD = "{question} {first} {second} Score: n"
RUBRICS = {
    "no place": (GOOD.replace("{first}", ""), "must hold {first} once, it does so 0 times"),
    "a place twice": (GOOD + "{question}", "must hold {question} once, it does so 2 times"),
    "no last line": (GOOD.replace("Score", "Grade"), "must ask for a last line that begins with `Score:`, by which"),
    "no text": (b"\xff\xfe", "is no text in UTF-8"),
    "no file": (None, "there is no such file"),
}


@pytest.mark.parametrize("name", RUBRICS)
def test_a_bad_rubric_is_a_sentence(tmp_path, name):
    content, sentence = RUBRICS[name]
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=re.escape(sentence)) as error:
        read_rubric(recipe(tmp_path, "http://127.0.0.1:9/v1", judge_rubric=str(path)))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("form", FORMS)
def test_the_shipped_rubrics_are_good(tmp_path, form):
    assert "{first}" in read_rubric(recipe(tmp_path, "http://127.0.0.1:9/v1", judge_form=form))


# ---- keys


def test_keys_of_the_judge_without_one_are_refused(tmp_path):
    with pytest.raises(DataError, match="^`judge_margin` is for `judge: model`; set that, or leave it out"):
        recipe_for(tmp_path, judge_margin=2.0)
    with pytest.raises(DataError, match="^`judge_chosen_min` must be a number from 1 to 10, got 0.5"):
        recipe_for(tmp_path, judge="model", judge_chosen_min=0.5)


def test_a_folder_that_the_rule_judges_is_as_before_there_was_another_judge(tmp_path):
    """No setting and no input is new, so that nothing that was finished is made again."""
    made = recipe_for(tmp_path)
    for stage in ("read", "contexts", "sample", "judge", "select", "export"):
        assert not [name for name in stage_settings(made, stage) if name.startswith("judge")]
    assert stage_settings(made, "judge") == {} and list(outside_inputs(made, "judge")) == ["the rule of `gives_answer`"]
    other = recipe_for(tmp_path, judge="model")
    assert {"judge_form", "judge_rejected_max", "judge_margin"} <= stage_settings(other, "select").keys()
    assert "judge_score.txt" in outside_inputs(other, "judge")


def test_which_model_judges(tmp_path):
    """The one that answers, unless keys say otherwise; the key of one server is not what changes verdicts."""
    sampling, model = recipe_for(tmp_path, judge="model", backend="openai", server_urls="http://a/v1").judging
    assert (model.path, model.server_urls, sampling.backend, sampling.template) == ("m", "http://a/v1", "openai", "t")
    assert (sampling.temperature, sampling.extra_body, sampling.default_system) == (0.0, None, None)
    made = recipe_for(
        tmp_path, judge="model", served_model="s", extra_body={"top_k": 1}, judge_model_name_or_path="org/big",
        judge_backend="openai", judge_server_urls="http://b/v1", judge_template="llama3", judge_api_key_env="OTHER",
    )  # fmt: skip
    sampling, model = made.judging
    assert (model.path, model.server_urls, model.served_model) == ("org/big", "http://b/v1", None)
    assert (sampling.backend, sampling.template, sampling.api_key_env) == ("openai", "llama3", "OTHER")
    before = verdicts.depends_on(made)
    for name, value, same in [("judge_server_urls", "http://c/v1", True), ("judge_api_key_env", "X", True),
                              ("template", "u", True), ("judge_margin", 1.0, True), ("judge_template", "u", False),
                              ("judge_model_name_or_path", "org/small", False), ("judge_extra_body", {"a": 1}, False),
                              ("seed", 9, False)]:  # fmt: skip
        setattr(made, name, value)
        assert (verdicts.depends_on(made) == before) == same, name
        before = verdicts.depends_on(made)


# ---- agreement with gold answers


def test_agreement_with_the_rule_is_counted_where_there_are_both(tmp_path):
    """Four answers of each kind to questions with a gold answer; a question without one counts nowhere."""
    kinds = [(True, 9), (True, 3), (False, 9), (False, 3), (False, 3)]
    rows = []
    for i in range(4):
        for k, (right, grade) in enumerate(kinds):
            text = f"Of grade {grade}. {answer(f'q{i}', k, right)['text']}"
            rows.append(graded(f"q{i}", k, grade, text=text))
    contexts = [context(i) for i in range(4)]
    contexts[3]["answers"] = []
    write_jsonl(tmp_path / "contexts.jsonl", contexts)
    write_jsonl(tmp_path / "samples.short.jsonl", rows)
    write_jsonl(tmp_path / "samples.long.jsonl", [])
    with judging() as server:
        counts = judge.run(recipe(tmp_path, server.url), tmp_path)["short"]
    agreed = {"answers": 15, "share": 0.6, "both_right": 3, "only_model": 3, "only_rule": 3, "both_wrong": 6}
    assert counts["agreement_with_rule"] == agreed
    assert [row["rule"] for row in judged(tmp_path).values()] == [*[right for right, _ in kinds] * 3, *[None] * 5]
    assert PHRASES["judge"]({"short": counts}) == [
        "short: 8 of 20 answers are right (40%); the rule says the same of 60%"
    ]
    del counts["agreement_with_rule"]
    assert PHRASES["judge"]({"short": counts}) == ["short: 8 of 20 answers are right (40%)"]


# ---- the whole way, with questions that have no short answer


def open_ended(n: int) -> list[dict]:
    """Questions without answers, whose evidence says where it comes from."""
    rows = []
    for row in make_questions(n):
        rows.append({**row, "question": f"Sum up {row['id']}."})
        del rows[-1]["answers"]
    return rows


def whole_recipe(folder: Path, tokenizer: str, url: str, **keys) -> dict:
    write_jsonl(folder / "in.jsonl", open_ended(12))
    return dict(
        model_name_or_path=tokenizer, template="qwen", input="in.jsonl", work_dir="work", dataset_dir="data",
        dataset_name="made", short_tokens=500, long_tokens=1500, num_rows=8, num_samples=6, val_size=2,
        max_new_tokens=200, cutoff_len=2000, backend="openai", server_urls=url, served_model="judge", concurrency=8,
        prompt="{documents}\n\n{question}", judge="model",
    ) | keys  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.slow
def test_questions_without_answers_become_rows(tmp_path, tokenizer, monkeypatch, form):
    """Chosen and rejected are as far apart as the recipe says; grades stand beside the rows and in the reader."""
    monkeypatch.chdir(tmp_path)
    with judging(bias=1, malformed=0.02) as server:
        manifest = run_pipeline(make_recipe(whole_recipe(tmp_path, tokenizer, server.url, judge_form=form)))
        asked = len(server.seen)
        run_pipeline(make_recipe(whole_recipe(tmp_path, tokenizer, server.url, judge_form=form)))
        assert len(server.seen) == asked
    counts = manifest["stages"]["judge"]["counts"]
    trials = {"score": 6, "pairwise": 12}[form] * 12
    assert [counts[side]["verdicts"] for side in ("short", "long")] == [2 * trials] * 2
    assert asked == 2 * 12 + 2 * 2 * trials and "agreement_with_rule" not in counts["short"]
    rows = [row for end in ("", "_val") for row in read_jsonl(tmp_path / "data" / f"made_solopo{end}.jsonl")]
    beside = {row["id"]: row["grades"] for row in read_jsonl(tmp_path / "data" / "made_origins.jsonl")}
    assert len(rows) == 8
    for row in rows:
        chosen, rejected = beside[row["id"]]["solopo"]
        assert chosen >= 7 and rejected <= 4 and row["answers"] == []
        true = [int(re.search(r"grade (\d+)", row[part])[1]) for part in ("chosen", "rejected")]
        assert true[0] - true[1] >= 1 and (form == "pairwise" or true == [chosen, rejected])
    for part in ("work", "data/made_solopo.jsonl", "data/made_longpo.jsonl"):
        failed = inspect(tmp_path / part, tmp_path / "page").failed
        assert not any(ids for name, ids in failed.items()), (part, failed)
        assert "grade of chosen" in (tmp_path / "page" / "index.html").read_text()


def test_without_a_judge_such_questions_are_refused_as_before(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = whole_recipe(tmp_path, tokenizer, "http://127.0.0.1:9/v1", judge="rule")
    with pytest.raises(DataError, match=r"in.jsonl:1: `answers` must be a text or a list of texts, and is missing"):
        run_pipeline(make_recipe(keys), "read")


@pytest.mark.slow
def test_killed_at_random_while_it_judges(tmp_path_factory, tokenizer, build_data):
    """`kill -9` again and again: in the end the files are those of an uninterrupted run, and little is asked twice."""
    made = {}
    for name in ("whole", "killed"):
        folder = tmp_path_factory.mktemp(name)
        with judging(slow=0.01, malformed=0.02) as server:
            keys = whole_recipe(folder, tokenizer, server.url, concurrency=4)
            (folder / "recipe.yaml").write_text(yaml.safe_dump(keys))
            start = partial(build_data, folder)
            for stage in ("read", "contexts", "sample"):
                assert start("--stage", stage) == 0, (folder / "log.txt").read_text()
            before, kills, rng = len(server.seen), 0, random.Random(3)
            while name == "killed" and kills < 8:
                kills += start("--stage", "judge", kill_after=rng.uniform(0.2, 1.0)) == -signal.SIGKILL
            assert start() == 0, (folder / "log.txt").read_text()
            asked = len(server.seen) - before
        planned = 2 * 2 * 12 * 6
        assert planned <= asked <= planned + 8 * 2 * 4 if name == "killed" else asked == planned
        files = sorted([*(folder / "work").glob("*.jsonl"), *(folder / "data").iterdir()])
        made[name] = {path.name: path.read_bytes() for path in files}
        manifest = json.loads((folder / "work" / "manifest.json").read_text())["stages"]
        made[name]["counts"] = {stage: entry["counts"] for stage, entry in manifest.items()}
    assert made["whole"] == made["killed"] and len(made["whole"]) > 8
