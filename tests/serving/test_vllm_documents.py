"""From the shipped handbook to rows with a real vLLM server: `make test-vllm`.

A tiny model has learnt by heart what to ask about some passages and what to answer, so that what becomes of every
question is planned. What it says to all other prompts is noise.
"""

import json
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from make_tiny_model import build
from planned_asking import question_about
from real_vllm import SERVER, TWO_HEADS, save_with_template, serving
from scripted_server import answering
from transformers import AutoModelForCausalLM

from solopo_plugin.qa.files import read_jsonl
from solopo_plugin.qa.prompts import document_text, lay_out
from solopo_plugin.qa.store import Store
from solopo_plugin.synthesis.ask import choose, read_prompt
from solopo_plugin.synthesis.filter import FILTERS
from solopo_plugin.synthesis.pipeline import run_pipeline, stages_of
from solopo_plugin.synthesis.recipe import make_recipe

pytestmark = [pytest.mark.skipif(not SERVER, reason="`make test-vllm` runs these"), pytest.mark.timeout(400)]
FATES = ["right", "quote_not_in_passage", "right", "known_without_evidence", "no_agreement", "right"]  # two of pairs
PROMPTS = {  # shorter than the shipped ones, so that they are learnt in seconds
    "ask_one.txt": "{documents}\n\nAsk.",
    "ask_two.txt": "{documents}\n\nAsk about both.",
    "unaided.txt": "{question} Guess.",
}
CHECKS, SAMPLES, WRONG = 4, 8, "The answer is: No answer."


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """Make a model that has learnt its replies; `recipe` makes one of its recipes."""
    folder = tmp_path_factory.mktemp("learnt")
    handbook = ROOT / "data" / "handbook"
    texts = [path.read_text() for path in sorted(handbook.rglob("*.*")) if path.suffix in (".md", ".rst", ".txt")]
    build(str(folder / "model"), texts + ["entry of the ledger"] * 9, "llama", tokens=1200, **TWO_HEADS)
    tokenizer = save_with_template(folder / "model")
    (folder / "prompts").mkdir()
    for name, text in PROMPTS.items():
        (folder / "prompts" / name).write_text(text)

    def recipe(url: str, name: str, **more):
        return make_recipe(dict(
            model_name_or_path=str(folder / "model"), template="qwen", input=str(handbook), dataset_name="town",
            passage_tokens=60, max_passages=4, pairs_per_passage=0.5, candidates=1, check_samples=CHECKS,
            ask_prompts=str(folder / "prompts"), prompt="{documents}\n\nQuestion: {question} Answer.", short_tokens=300,
            long_tokens=700, cutoff_len=1200, num_samples=SAMPLES, max_new_tokens=300, temperature=0.4,
            max_alone=None,
            backend="openai", served_model="base", openai_endpoint="completions", num_rows=10, server_urls=url,
            work_dir=str(folder / name / "work"), dataset_dir=str(folder / name / "data"), **more,
        ))  # fmt: skip

    planned = recipe("http://nobody", "planned", sample_long=False)
    run_pipeline(planned, "documents")
    said, heard = plan(planned), {}

    def reply(request):
        """What is planned; of a question's samples half are wrong."""
        ids, n = request.body["prompt"], request.body["n"]
        text = tokenizer.decode(ids)
        texts = said[max((part for part in said if part in text), key=len)]
        heard[tuple(ids)] = texts = [*texts, WRONG] if n == SAMPLES else texts
        choices = [{"index": i, "text": texts[i % len(texts)], "finish_reason": "stop"} for i in range(n)]
        return 200, {"choices": choices}

    with answering(reply) as server:
        run_pipeline(recipe(server.url, "planned", sample_long=False))
    examples = [(list(ids), tokenizer.encode(text)) for ids, texts in heard.items() for text in texts]
    learn(str(folder / "model"), examples, tokenizer.convert_tokens_to_ids("<|im_end|>"))
    return SimpleNamespace(folder=folder, recipe=recipe)


def plan(recipe) -> dict[str, list[str]]:
    """What is said to a prompt, by a part of it."""
    said, rng, used = {}, random.Random(0), set()
    for fate, chosen in zip(FATES, choose(recipe, list(read_jsonl(f"{recipe.work_dir}/passages.jsonl"))), strict=True):
        name, places = ("one", ["quote"]) if len(chosen) == 1 else ("two", ["quote_1", "quote_2"])
        asked = question_about(chosen, rng, used)
        quotes = [*asked["quotes"][:-1], "Not " * (fate == "quote_not_in_passage") + asked["quotes"][-1]]
        shown = {"question": asked["question"], "answer": asked["answer"], **dict(zip(places, quotes, strict=True))}
        before, behind = read_prompt(recipe, f"ask_{name}.txt", "{documents}")
        said[lay_out(before, behind, "", map(document_text, chosen))[0]] = [json.dumps(shown)]
        right = f"The answer is: {asked['answer']}"
        said[f"Question: {asked['question']} Answer."] = [WRONG if fate == "no_agreement" else right]
        said[f"{asked['question']} Guess."] = [right if fate == "known_without_evidence" else WRONG]
    return said


def learn(folder: str, examples: list[tuple[list[int], list[int]]], end: int) -> None:
    """Train the model in a folder on (prompt, reply) until it knows them by heart: mean NLL near 0.01."""
    network, longest = AutoModelForCausalLM.from_pretrained(folder), 1 + max(len(a) + len(b) for a, b in examples)
    ids, labels = torch.full((len(examples), longest), end), torch.full((len(examples), longest), -100)
    for row, (prompt, reply) in enumerate(examples):
        both = torch.tensor([*prompt, *reply, end])
        ids[row, : len(both)], labels[row, len(prompt) : len(both)] = both, both[len(prompt) :]
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(100):
        network(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    network.save_pretrained(folder)


def test_from_documents_to_rows_by_a_real_server(learnt, monkeypatch):
    """Stopped in `ask` and continued; each question is left out for its reason, and rows are made of the others."""
    added, add = [], Store.add

    def stop(*args):
        add(*args)
        added.append(1)
        if len(added) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Store, "add", stop)
    with serving(learnt.folder) as server:
        recipe = learnt.recipe(server.url, "real")
        with pytest.raises(KeyboardInterrupt):
            run_pipeline(recipe)
        stages = run_pipeline(recipe)["stages"]
    assert tuple(stages) == stages_of(recipe)
    counts = {name: stage["counts"] for name, stage in stages.items()}
    questions = FATES.count("right")
    calls = 6 + 5 + 4 + 2 * questions  # asked; with the passages and without; sampled on both sides
    assert len(added) == calls, "something was asked for twice"
    assert counts["ask"] | dict(replies=6, unreadable=0, cut_at_max_new_tokens=0) == counts["ask"]
    dropped = Counter(fate for fate in FATES if fate != "right")
    assert counts["filter"]["dropped"] == dict.fromkeys(FILTERS, 0) | dropped
    places = [learnt.folder / name for name in ("planned", "real")]
    for name in ("asked", "questions", "contexts"):
        made, planned = ([*read_jsonl(place / "work" / f"{name}.jsonl")] for place in places)
        assert made == planned
    for side in ("short", "long"):
        answers, judged = counts["sample"][side], counts["judge"][side]
        assert answers["answers"] == judged["answers"] == questions * SAMPLES and not answers["prompt_tokens_differ"]
        assert judged["correct"] + judged["no_answer"] <= judged["answers"]
    short = counts["judge"]["short"]
    assert short["correct"] + short["no_answer"] == short["answers"]
    rows = list(read_jsonl(places[1] / "data" / "town_solopo.jsonl"))
    assert len(rows) == counts["select"]["short"]["with_a_pair"] > 0
    assert all(WRONG == row["rejected"] != row["chosen"] for row in rows)
