"""The whole pipeline on real MuSiQue questions: real servers and models, known counts, rows that are trained on.

A random model answers nonsense, so the tiny model is first taught to end in `The answer is:` and one of the questions'
answers, any of them: about one answer in six is right. What the judge counts is checked with the scripted server.
"""

import json
from pathlib import Path
from random import Random

import pytest
import torch
from build_data import main as build_data
from conftest import SHARED_DATA, outcome, write_recipe
from host_api import host_api
from scripted_server import scripted, serving

from solopo_plugin.qa.answers import gives_answer
from solopo_plugin.qa.files import read_jsonl
from solopo_plugin.qa.generate import generate
from solopo_plugin.qa.generate.calls import Call, call_seed
from solopo_plugin.qa.recipe import Sampling, pick
from solopo_plugin.synthesis.look import inspect
from solopo_plugin.synthesis.recipe import make_recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (SHARED_DATA / "musique_ans_dev_150.jsonl").exists(),
        reason=f"no MuSiQue sample in {SHARED_DATA}; set SOLOPO_SHARED_DATA",
    ),
]
N_QUESTIONS = 6
N_SAMPLES = 16
LINE = "The documents tell it. The answer is: {}"


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Two-hop questions with short evidence and short answers, and a model that ends its answers with one of theirs."""
    folder = tmp_path_factory.mktemp("material")
    lines = (SHARED_DATA / "musique_ans_dev_150.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line) for line in lines]

    def size(question: dict) -> int:
        return sum(len(p["paragraph_text"]) for p in question["paragraphs"] if p["is_supporting"])

    fitting = [q for q in questions if q["id"].startswith("2hop") and size(q) < 1400 and len(q["answer"]) < 25]
    chosen = fitting[:N_QUESTIONS]
    (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in chosen), encoding="utf-8")
    (folder / "answers.json").write_text(json.dumps({q["question"]: q["answer"] for q in chosen}))
    teach(folder / "model", [p["paragraph_text"] for q in questions for p in q["paragraphs"]], chosen)
    return folder


def teach(path: Path, texts: list[str], questions: list[dict]) -> None:
    """Train a tiny model until, whatever was asked, it says `LINE` with one of the answers."""
    from make_tiny_model import build
    from transformers import AutoModelForCausalLM, AutoTokenizer

    build(str(path), texts, tokens=4096, hidden_size=48, num_hidden_layers=1)
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    torch.manual_seed(0)
    random = Random(0)
    lines = [tokenizer.encode(LINE.format(q["answer"]) + "<|im_end|>") for q in questions]
    header = tokenizer.encode("\n<|im_start|>assistant\n")
    for step in range(120):
        width = 1400 if step % 4 == 0 else 40  # mostly short ones, which are cheap
        loss = 0
        for line in random.sample(lines, 2) if width > 40 else lines:
            before = torch.randint(300, len(tokenizer), (random.randrange(width // 2, width),)).tolist() + header
            labels = torch.tensor([[-100] * len(before) + line])
            loss = loss + model(input_ids=torch.tensor([before + line]), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(path)


def recipe_in(folder: Path, material: Path, **keys) -> str:
    """A recipe file for a pipeline whose work folder and data set are in `folder`."""
    base = dict(
        model_name_or_path=str(material / "model"), template="qwen", input=str(material / "questions.jsonl"),
        work_dir=str(folder / "work"), dataset_dir=str(folder / "data"), dataset_name="toy", short_tokens=768,
        long_tokens=1400, num_samples=N_SAMPLES, max_new_tokens=40, num_rows=N_QUESTIONS, val_size=1,
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    return write_recipe(folder / "recipe.yaml", base | keys)


def manifest(folder: Path) -> dict:
    return json.loads((folder / "work" / "manifest.json").read_text())["stages"]


def check_rows(folder: Path, material: Path) -> None:
    """Rows of all files: right is chosen, wrong rejected, evidence where it is said to be, nothing leaks."""
    paragraphs = {
        q["id"]: [p["paragraph_text"] for p in q["paragraphs"] if p["is_supporting"]]
        for q in read_jsonl(material / "questions.jsonl")
    }
    files = sorted((folder / "data").glob("*.jsonl"))
    assert {"toy_solopo.jsonl", "toy_solopo_val.jsonl", "toy_long_po.jsonl", "toy_longpo.jsonl"} <= {
        f.name for f in files
    }
    for file in files:
        for row in read_jsonl(file):
            assert gives_answer(row["chosen"], row["answers"])
            assert not gives_answer(row["rejected"], row["answers"])
            for side, prompt in (("short", row["prompt"]), ("long", row["long_prompt"])):
                shown = [prompt[place["start"] : place["end"]] for place in row[f"{side}_evidence"]]
                assert sorted(shown) == sorted(paragraphs[row["id"]])
    assert not any(inspect(folder / "work", folder / "page").failed.values())


@pytest.fixture(scope="module")
def by_both(zygote, material, tmp_path_factory):
    """Two finished pipelines: `transformers`, run by the command line, and `openai` at the host's own server."""
    folder = tmp_path_factory.mktemp("both")
    with host_api(material / "model", folder / "api.log") as (url, ready):
        recipe_in(local := folder / "transformers", material, backend="transformers")
        code = zygote.run("scripts/build_data.py", local)
        progress = (local / "log.txt").read_text()
        assert code == 0, progress[-3000:]
        ready()
        assert build_data([recipe_in(folder / "openai", material, backend="openai"), f"server_urls={url}"]) == 0
        greedy = dict(temperature=0.0, num_samples=1, max_new_tokens=12, server_urls=url)
        texts = {}
        for backend in ("transformers", "openai"):
            made = make_recipe(load(folder / backend / "recipe.yaml") | greedy | {"backend": backend})
            contexts = read_jsonl(folder / backend / "work" / "contexts.jsonl")
            calls = (Call(c["id"], (0,), c[side]["prompt"]) for c in contexts for side in ("short", "long"))
            texts[backend] = sorted(
                (r.id, r.prompt_tokens, r.answers[0][0]) for r in generate(pick(made, Sampling), made.model, calls)
            )
    return folder, progress, texts


def load(path: Path) -> dict:
    import yaml

    return yaml.safe_load(path.read_text())


def test_a_local_model_and_the_hosts_server_make_rows(by_both, material):
    folder, progress, _ = by_both
    assert "sample short:" in progress and "answers/s" in progress
    for backend in ("transformers", "openai"):
        counts = {name: stage["counts"] for name, stage in manifest(folder / backend).items()}
        n = counts["contexts"]["contexts"]
        assert n == N_QUESTIONS
        for side in ("short", "long"):
            sampled, judged = counts["sample"][side], counts["judge"][side]
            assert (sampled["prompts"], sampled["answers"], sampled["prompt_tokens_differ"]) == (n, n * N_SAMPLES, 0)
            assert judged["answers"] == n * N_SAMPLES and judged["no_marker"] < 0.2 * judged["answers"]
            assert 0 < judged["correct"] < 0.5 * judged["answers"]
        assert counts["select"]["rows"]["solopo"]["val"] == 1 and counts["select"]["rows"]["solopo"]["train"] >= 2
        check_rows(folder / backend, material)


def test_the_hosts_server_and_the_local_model_see_the_same_prompt(by_both):
    """Greedy answers and prompt tokens are the same: the template of the pipeline is the server's."""
    _, _, texts = by_both
    assert texts["transformers"] == texts["openai"] and len(texts["openai"]) == 2 * N_QUESTIONS


def test_the_rows_train(by_both, material, cli, recipe, tmp_path):
    """`stage: solopo` through the command line: loss is finite, lengths are those that the pipeline has counted."""
    from datasets import load_from_disk

    folder = by_both[0] / "openai" / "data"
    args = recipe(
        model_name_or_path=str(material / "model"), dataset="toy_solopo", eval_dataset="toy_solopo_val", do_eval=True,
        dataset_dir=str(folder), cutoff_len=2048, max_samples=None, max_steps=4, num_train_epochs=None,
        pref_loss="orpo", gradient_accumulation_steps=1, tokenized_path=str(tmp_path / "tokens"),
    )  # fmt: skip
    cli("train", write_recipe(tmp_path / "train.yaml", args))
    result = outcome(args["output_dir"])
    assert len(result.losses) == 4 and all(0 < loss < 100 for loss in result.losses)
    assert 0 < json.loads((result.dir / "all_results.json").read_text())["eval_loss"] < 100
    for split, end in (("train", ""), ("validation", "_val")):
        rows = list(read_jsonl(folder / f"toy_solopo{end}.jsonl"))
        tokens = load_from_disk(str(tmp_path / "tokens"))[split]
        for part, column in (("short", "short_prompt_ids"), ("long", "long_prompt_ids"), *RESPONSES):
            assert [row[f"{part}_tokens"] for row in rows] == [len(ids) for ids in tokens[column]]


RESPONSES = (("chosen", "chosen_ids"), ("rejected", "rejected_ids"))
BASELINES = {
    "short_po": dict(stage="dpo", pref_loss="orpo"),
    "expand_long_po": dict(stage="dpo", pref_loss="orpo"),
    "long_po": dict(stage="dpo", pref_loss="orpo"),
    "longpo": dict(stage="solopo", solopo_objective="longpo", pref_loss="sigmoid"),
    "sft_short": dict(stage="sft", pref_loss=None),
    "sft_long": dict(stage="sft", pref_loss=None),
    "sft_expand_long": dict(stage="sft", pref_loss=None),
}


def test_every_baseline_trains_on_its_entry(by_both, material, run, recipe, tmp_path):
    losses = {}
    for name, keys in BASELINES.items():
        args = recipe(
            model_name_or_path=str(material / "model"), dataset=f"toy_{name}", cutoff_len=2048, max_samples=2,
            dataset_dir=str(by_both[0] / "transformers" / "data"), max_steps=1, output_dir=str(tmp_path / name), **keys,
        )  # fmt: skip
        (losses[name],) = run(args).losses
    assert all(0 < loss < 100 for loss in losses.values())
    twin = losses.pop("sft_expand_long")  # may be sft_long: this model has one sentence for a right answer
    assert twin != losses["sft_short"] and len(set(losses.values())) == len(BASELINES) - 1


FAULTS = dict(busy=0.15, broken=0.15, malformed=0.15, retry_after=0.05)


def test_what_is_missing_is_said_at_once(material, tmp_path, capsys, monkeypatch):
    """Backend and model in one message, before anything is read; not where only what needs neither is run."""
    monkeypatch.setattr("solopo_plugin.qa.generate.find_spec", lambda name: None)
    path = recipe_in(tmp_path, material, backend="vllm", model_name_or_path="someone/some-model")
    assert build_data([path]) == 1
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        "Error: 2 things keep this recipe from starting here:",
        "  1. `backend: vllm` is not installed: pip install '.[vllm]', or use `backend: openai`.",
        "  2. `model_name_or_path: someone/some-model` is not on this machine, and HF_HUB_OFFLINE keeps it from the "
        "hub: HF_HUB_OFFLINE=0 hf download someone/some-model",
    ]
    assert said.out == "" and not (tmp_path / "work").exists()
    assert build_data([path, "--stage", "read"]) == 0
    assert "read      " in capsys.readouterr().out


def test_the_judge_counts_what_the_server_said(material, tmp_path, capsys):
    """Answers of known rightness, some empty, some without the marker, some requests failing at first."""
    script = dict(right=0.4, empty=0.1, unmarked=0.1)
    answers = json.loads((material / "answers.json").read_text())
    path, written = recipe_in(tmp_path, material, backend="openai", served_model="x"), []
    with serving(material / "answers.json", **script, **FAULTS) as server:
        for _ in range(2):  # the second time nothing is left to do
            assert build_data([path, f"server_urls={server.url}"]) == 0
            files = [*(tmp_path / "data").iterdir(), *(tmp_path / "work").glob("*.jsonl")]
            written.append({file.name: file.read_bytes() for file in files})
    assert written[0] == written[1] and len(written[0]) == 15
    first, printed = capsys.readouterr().out.split("counts    ")[:2]
    assert "{" not in first and "train     CUDA_VISIBLE_DEVICES=0 llamafactory-cli train RECIPE dataset_dir=" in printed
    printed = first
    settings = make_recipe(load(Path(path)))
    counts = {name: stage["counts"] for name, stage in manifest(tmp_path).items()}
    for side in ("short", "long"):
        said = {}
        for context in read_jsonl(tmp_path / "work" / "contexts.jsonl"):
            call = Call(context["id"], tuple(range(N_SAMPLES)), context[side]["prompt"])
            for k in call.ks:
                said[call.id, k] = scripted(call.prompt, call_seed(settings.seed, call), k, answers, **script)
        judged = list(read_jsonl(tmp_path / "work" / f"judged.{side}.jsonl"))
        assert {(row["id"], row["k"]): (row["text"], row["correct"]) for row in judged} == said and len(judged) == len(
            said
        )
        report = counts["judge"][side]
        assert report["answers"] == len(said) and report["correct"] == sum(right for _, right in said.values())
        assert report["no_marker"] == sum("The answer is" not in text for text, _ in said.values())
        assert counts["sample"][side]["empty"] == sum(text == "" for text, _ in said.values()) > 0
        share = f"{report['correct']} of {len(said)} answers are right ({report['correct'] / len(said):.0%})"
        assert f"judge     {side}: {share}; {report['no_marker']} lack `The answer is:`" in printed
        dropped = counts["select"][side]["dropped_answers"]
        assert dropped["empty"] == counts["sample"][side]["empty"]
        assert dropped["empty"] + dropped["no_marker"] == report["no_marker"]
    assert counts["select"]["rows"]["solopo"] == {"train": 5, "val": 1}
    check_rows(tmp_path, material)
