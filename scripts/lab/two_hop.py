"""Make the lab's second task: two hops in templated English over invented names, answered by a chain of thought.

A paragraph says two things of a person or of a firm: `Gabda works for Rudco . Gabda studied at Milmond .` A question
needs a paragraph of each kind, and one of the two things in each: `In what town is the employer of Gabda ?`. Its answer
repeats them: `Gabda works for Rudco . Rudco sits in Tarville . The answer is: Tarville`. A word is a token, names too.
The rest is the project's own pipeline: questions in its plain format, contexts, answers sampled from the base, pairs.

    python scripts/lab/two_hop.py FOLDER [--seed 0]     # rows, about 6 minutes on one core; can be killed and continues
"""

import argparse
import functools
import hashlib
import json
import logging
import random
from itertools import product
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from solopo_plugin.host.template import template_markers
from solopo_plugin.qa.contexts import Builder
from solopo_plugin.qa.documents import count_tokens, make_pool
from solopo_plugin.qa.files import write_jsonl
from solopo_plugin.qa.generate.calls import load_chat
from solopo_plugin.qa.provenance import file_hash
from solopo_plugin.qa.recipe import Chat, ContextKeys, read_values
from solopo_plugin.synthesis.judge import judge
from solopo_plugin.synthesis.pipeline import run_pipeline
from solopo_plugin.synthesis.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "data/lab/two_hop_base"
RECIPE = ROOT / "examples/yaml/data/lab_two_hop.yaml"
GIVEN = ("model_name_or_path", "input", "dataset_dir", "work_dir", "seed")  # keys of it that `prepare` sets itself
# Hash of the recipe's values -> of the file's bytes, by which results of earlier versions know the recipe
BEFORE = {
    "22933606e2c215628b6aaa31cdf6830894a01d2da4469895fde7e09d5f41fdf6": (
        "a0af1528e60c6e2c5ed76598f5b8ad85085595e5f4efbfbf0b12c371b411f168"
    )
}
PROMPT = "Documents:\n\n{documents}\n\nQuestion: {question}\n\nAnswer:"  # that of the recipe, a test compares them
FIRST = {"employer": "works for", "school": "studied at"}  # of a person, whose value is a firm
SECOND = {"town": "sits in", "owner": "belongs to"}  # of a firm
QUESTIONS = {"town": "In what town is the {} of {} ?", "owner": "To whom does the {} of {} belong ?"}
FACT = "{} {} {} ."
MARKER = "The answer is:"

SPECIAL = ["<|endoftext|>", "<pad>", "<unk>"]
ONSETS = "B C D F G H J K L M N P R S T V".split()
MIDDLES = "ab an ar el en er im in ir od on or ud un ur ym".split()
ENDS = {"person": ("da", "o"), "firm": ("co", "tek", "mond"), "town": ("ville",), "owner": ("sson",)}
N_NAMES = {"person": 320, "firm": 640, "town": 64, "owner": 64}
NAMES = {
    kind: [onset + middle + end for end, middle, onset in product(ends, MIDDLES, ONSETS)][: N_NAMES[kind]]
    for kind, ends in ENDS.items()
}
N_DOCUMENTS = 80  # numbers of documents that the vocabulary has
_GRAMMAR = [PROMPT.format(documents="Document", question=""), *QUESTIONS.values(), *FIRST, *FIRST.values()]
_GRAMMAR = " ".join([*_GRAMMAR, *SECOND.values(), FACT, MARKER]).replace("{}", "").split()
WORDS = [*SPECIAL, *dict.fromkeys(_GRAMMAR), *(f"{i + 1}:" for i in range(N_DOCUMENTS)), *sum(NAMES.values(), [])]

SHORT, LONG = 128, 640  # tokens of a prompt at most
LENGTHS = (SHORT, 256, 384, 512, LONG)  # at which accuracy is measured
NEW_TOKENS = 24  # an answer has 14 and the stop token
QUESTIONS_ASKED = 4 * N_NAMES["person"]  # of a set of rows: four of each person
HELD_OUT = 2**20  # seed of the questions on which accuracy is measured; no training rows have it
MEASURED = 256  # of them
REJECTED = (2, 4)  # rejected answers of a row of `two_hop_rejected_N_solopo` at most
ASKED, ASKED_BY_STEP = 128, 64  # of those, of a run's finished model and of a checkpoint


# ---- questions


class World:
    """Draw people with an employer and a school of their own, firms with a town and an owner; a paragraph of each."""

    def __init__(self, n_people: int, rng: random.Random):
        people, firms = rng.sample(NAMES["person"], n_people), rng.sample(NAMES["firm"], 2 * n_people)
        pairs = zip(firms[::2], firms[1::2], strict=True)
        self.people = {who: dict(zip(FIRST, pair, strict=True)) for who, pair in zip(people, pairs, strict=True)}
        self.firms = {firm: {kind: rng.choice(NAMES[kind]) for kind in SECOND} for firm in firms}
        self.paragraphs = {}
        for table, verbs in ((self.people, FIRST), (self.firms, SECOND)):
            for name, values in table.items():
                facts = [FACT.format(name, verbs[key], value) for key, value in values.items()]
                self.paragraphs[name] = " ".join(rng.sample(facts, 2))

    def ask(self, person: str, noun: str, kind: str) -> dict:
        """Ask over two hops: the question, its answer's last word, the names of its evidence, the answer in full."""
        firm = self.people[person][noun]
        value = self.firms[firm][kind]
        chain = f"{FACT.format(person, FIRST[noun], firm)} {FACT.format(firm, SECOND[kind], value)} {MARKER} {value}"
        return {"text": QUESTIONS[kind].format(noun, person), "value": value, "names": (person, firm), "chain": chain}


def questions(n: int, seed: int) -> list[dict]:
    """Draw `n` questions of one world in the plain format of docs/data.md; each person is asked of four times."""
    if n > QUESTIONS_ASKED:
        raise ValueError(f"{n} questions: the names are enough for {QUESTIONS_ASKED}.")
    rng = random.Random(f"two hops {seed}")
    world = World(-(-n // 4), rng)
    asked = [world.ask(*words) for words in product(world.people, FIRST, SECOND)]
    return [
        {
            "id": f"two-hop-{seed}-{i}",
            "question": one["text"],
            "answers": [one["value"]],
            "evidence": [world.paragraphs[name] for name in one["names"]],
            "hops": 2,
        }
        for i, one in enumerate(asked[:n])
    ]


# ---- accuracy


def contexts(asked: list[dict], tokens: int) -> list[str]:
    """Build each question's prompt of at most `tokens` tokens with the pipeline's own builder.

    Distractors are paragraphs of the other questions: some 80 questions are needed for 640 tokens.
    """
    tokenizer, template = load_chat(str(BASE), Chat(template="empty"))
    rows = [
        one | {"evidence": [{"title": "", "text": text} for text in one["evidence"]], "distractors": []}
        for one in asked
    ]
    pool, found = make_pool(rows, [], template_markers(tokenizer, template))
    count_tokens(pool, tokenizer)
    builder = Builder(ContextKeys(prompt=PROMPT), pool, tokenizer, template)
    return [builder.context(builder.prepare(question), tokens, "long").row["prompt"] for question in found]


@torch.inference_mode()
def answers(model, tokenizer, prompts: list[str], batch: int = 64) -> list[str]:
    """Answer prompts greedily; they are padded on the left, which RoPE does not see."""
    found = []
    for start in range(0, len(prompts), batch):
        given = tokenizer(prompts[start : start + batch], padding=True, padding_side="left", return_tensors="pt")
        ids = model.generate(
            given.input_ids, attention_mask=given.attention_mask, do_sample=False, max_new_tokens=NEW_TOKENS
        )
        found += tokenizer.batch_decode(ids[:, given.input_ids.shape[1] :], skip_special_tokens=True)
    return found


@functools.cache
def held_out(n: int, tokens: int) -> list[dict]:
    """Return the first `n` of `MEASURED` questions, always the same ones, as {"prompt", "answers"}."""
    asked = questions(MEASURED, HELD_OUT)
    rows = [
        {"prompt": prompt, "answers": one["answers"]}
        for prompt, one in zip(contexts(asked, tokens), asked, strict=True)
    ]
    random.Random(HELD_OUT).shuffle(rows)
    return rows[:n]


def measure(model_folder: Path, n: int = MEASURED, lengths: tuple[int, ...] = LENGTHS) -> dict[int, float]:
    """Measure the share of `n` held-out questions answered right, by sub-EM behind the marker, for each length."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    tokenizer, shares = AutoTokenizer.from_pretrained(BASE), {}
    for tokens in lengths:
        rows = held_out(n, tokens)
        texts = answers(model, tokenizer, [row["prompt"] for row in rows])
        right = [judge(text, row["answers"])["correct"] for text, row in zip(texts, rows, strict=True)]
        shares[tokens] = round(sum(right) / n, 4)
    return shares


# ---- rows


def prepare(folder: Path, seed: int = 0, n: int = QUESTIONS_ASKED, **keys) -> None:
    """Make the rows of a seed by the pipeline, registered in `folder/dataset_info.json`. Can be killed and continues.

    Args:
        folder: Where questions, rows and the pipeline's work go.
        seed: Of the questions and all that is drawn.
        n: Questions; the larger part gives a pair on the short context.
        keys: Of the recipe, instead of its own.
    """
    write_jsonl(folder / "questions.jsonl", questions(n, seed))
    places = dict(input=folder / "questions.jsonl", dataset_dir=folder, work_dir=folder / "work")
    keys = places | {"model_name_or_path": BASE, "seed": seed} | keys
    words = [f"{key}={value}" for key, value in keys.items()]
    for several in REJECTED:  # of the same answers; the pairs that stay in the work folder are the paper's
        more = [f"num_rejected={several}", f"dataset_name=two_hop_rejected_{several}"]
        run_pipeline(load_recipe(str(RECIPE), words + more))
    run_pipeline(load_recipe(str(RECIPE), words))


def settings() -> dict:
    """Return what rows and measured accuracies depend on, beside the seed."""
    values = {key: value for key, value in read_values(str(RECIPE), None).items() if key not in GIVEN}
    recipe = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    made_from = dict(base=file_hash(BASE / "model.safetensors"), recipe=BEFORE.get(recipe, recipe))
    return made_from | dict(questions=QUESTIONS_ASKED, measured=LENGTHS, asked=[ASKED, ASKED_BY_STEP])


def measured(model: Path, seed: int, ends: bool = False) -> dict[int, float]:
    """Measure accuracy by tokens of the prompt; `ends`: of the short and long context alone, over fewer questions."""
    return measure(model, ASKED_BY_STEP, (SHORT, LONG)) if ends else measure(model, ASKED)


def main(words: list[str] | None = None) -> None:
    """Write the rows of one seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where dataset_info.json and the rows are to be")
    parser.add_argument("--seed", type=int, default=0, help="of the questions and all that is drawn (default 0)")
    parser.add_argument("--questions", type=int, default=QUESTIONS_ASKED, help=f"default {QUESTIONS_ASKED}")
    args = parser.parse_args(words)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("solopo_plugin").setLevel(logging.INFO)
    prepare(args.folder, args.seed, args.questions)


if __name__ == "__main__":
    main()
