"""A work folder of invented questions with known verdicts, made without a model: contexts and judged answers."""

import random
from pathlib import Path
from types import SimpleNamespace

from solopo_plugin.qa.files import write_jsonl
from solopo_plugin.synthesis.export import SCHEMA
from solopo_plugin.synthesis.recipe import make_recipe

TOKENIZER = SimpleNamespace(all_special_tokens=["<|end|>"], all_special_ids=[], added_tokens_decoder={}, eos_token_id=0)


class Template:
    """A chat template of one token per character, and a stop token behind the response."""

    stop_words, efficient_eos, thought_words = ["<|end|>"], True, ()

    def encode_oneturn(self, tokenizer, messages):
        return [1], list(map(ord, messages[-1]["content"]))


def recipe_for(work: Path, **keys):
    base = dict(model_name_or_path="m", template="t", input="-", dataset_name="toy", work_dir=str(work))
    return make_recipe(base | dict(dataset_dir=str(work.parent / "data"), num_rows=10, seed=5) | keys)


def side(evidence: list[tuple[str, str]], n: int, rng: random.Random, question: str, stem: str) -> dict:
    """A context of `n` documents in our prompt's form."""
    documents = [(*part, True) for part in evidence]
    documents += [(f"{stem} {i}", f"{stem} paragraph {i} says little.", False) for i in range(n - len(evidence))]
    rng.shuffle(documents)
    prompt, places = "Read.\n\n", []
    for number, (title, text, is_evidence) in enumerate(documents, 1):
        prompt += f"Document {number}: {title}\n"
        if is_evidence:
            places.append((text, {"paragraph": number, "start": len(prompt), "end": len(prompt) + len(text)}))
        prompt += f"{text}\n\n"
    prompt += f"Question: {question}\n\nEnd with `The answer is: ...`."
    order = [text for _, text in evidence]
    found = [place for _, place in sorted(places, key=lambda pair: order.index(pair[0]))]
    return {"prompt": prompt, "tokens": len(prompt) // 4, "paragraphs": n, "evidence": found, "dropped": []}


def context(i: int) -> dict:
    rng = random.Random(i)
    question = f"Where does person {i} work?"
    evidence = [(f"Person {i}", f"Person {i} works for firm {i}."), (f"Firm {i}", f"Firm {i} sits in Town{i}ville.")]
    sides = {name: side(evidence, n, rng, question, f"Other {i}") for name, n in (("short", 4), ("long", 12))}
    return {"id": f"q{i}", "question": question, "answers": [f"Town{i}ville"], "hops": 2 + i % 3, **sides}


def answer(name: str, k: int, right: bool, **changes) -> dict:
    """A judged answer; unless changed, with the marker and stopped by the model."""
    said = f"Town{name[1:]}ville" if right else "No answer."
    text = f"Thought {k} of {name}{' and on' * (k % 4)}. The answer is: {said}"
    row = {
        "id": name,
        "k": k,
        "text": text,
        "finish_reason": "stop",
        "answer": said,
        "correct": right,
        "f1": float(right),
    }
    return row | changes


def write_work(work: Path, short: list[list[dict]], long: list[list[dict]] | None = None) -> None:
    """contexts.jsonl and judged.*.jsonl for `len(short)` questions with these answers."""
    write_jsonl(work / "contexts.jsonl", map(context, range(len(short))))
    for name, answers in (("short", short), ("long", long or [])):
        write_jsonl(work / f"judged.{name}.jsonl", (row for question in answers for row in question))


def verdicts(i: int, bits: str) -> list[dict]:
    """Answers of question i: `1` is right, `0` wrong."""
    return [answer(f"q{i}", k, bit == "1") for k, bit in enumerate(bits)]


def make_row(i: int, **changes) -> dict:
    """An exported row of a question with four documents in the short context and twelve in the long one."""
    made = context(i)
    row = dict.fromkeys(SCHEMA.names) | {name: made[name] for name in ("id", "question", "answers", "hops")}
    row |= {"prompt": made["short"]["prompt"], "long_prompt": made["long"]["prompt"], "rejected": "No."}
    row |= {"chosen": f"Person {i} works for firm {i}, and so on.\n\nThe answer is: Town{i}ville", "short_dropped": []}
    for side in ("short", "long"):
        row |= {f"{side}_{what}": made[side][what] for what in ("tokens", "paragraphs", "evidence")}
    return row | changes
