"""The lab's second task: two hops in templated English over invented names, answered by a chain of thought.

A paragraph says two things of a person or of a firm: `Gabda works for Rudco . Gabda studied at Milmond .` A question
needs a paragraph of each kind, and one of the two things in each: `In what town is the employer of Gabda ?`. Its answer
repeats them: `Gabda works for Rudco . Rudco sits in Tarville . The answer is: Tarville`. A word is a token, names too.
The rest is the project's own pipeline: questions in its plain format, contexts, answers sampled from the base, pairs.
"""

import random
from itertools import product
from pathlib import Path

import torch

from solopo_plugin.host.template import encode_prompt, template_markers
from solopo_plugin.synthesis import run_pipeline
from solopo_plugin.synthesis.backends import load_chat
from solopo_plugin.synthesis.contexts import Builder
from solopo_plugin.synthesis.files import write_jsonl
from solopo_plugin.synthesis.judge import judge
from solopo_plugin.synthesis.pool import count_tokens, make_pool
from solopo_plugin.synthesis.recipe import DataRecipe, load_recipe

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "data/lab/two_hop_base"
RECIPE = ROOT / "examples/yaml/data/lab_two_hop.yaml"
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
LENGTHS = (SHORT, 192, 256, 384, LONG)  # at which accuracy is measured
NEW_TOKENS = 24  # an answer has 14 and the stop token
HELD_OUT = 2**20  # seed of the questions on which accuracy is measured; no training rows have it


# ---- questions


class World:
    """People with an employer and a school, both of no one else; firms with a town and an owner; a paragraph of each."""

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
        """A question over two hops: its text, its answer's last word, the names of its evidence, the answer in full."""
        firm = self.people[person][noun]
        value = self.firms[firm][kind]
        chain = f"{FACT.format(person, FIRST[noun], firm)} {FACT.format(firm, SECOND[kind], value)} {MARKER} {value}"
        return {"text": QUESTIONS[kind].format(noun, person), "value": value, "names": (person, firm), "chain": chain}


def questions(n: int, seed: int) -> list[dict]:
    """`n` questions of one world in the plain format of docs/data.md; each person is asked of four times."""
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


def contexts(asked: list[dict], tokens: int, model_folder: Path = BASE) -> list[str]:
    """The prompt of each question with a context of at most `tokens` tokens, from the pipeline's own builder."""
    recipe = DataRecipe(model_name_or_path=str(model_folder), template="empty", prompt=PROMPT, long_tokens=tokens)
    tokenizer, template = load_chat(recipe)
    rows = [
        one | {"evidence": [{"title": "", "text": text} for text in one["evidence"]], "distractors": []}
        for one in asked
    ]
    pool, found = make_pool(rows, [], template_markers(tokenizer, template))
    count_tokens(pool, tokenizer)
    builder = Builder(recipe, pool, tokenizer, template)
    return [builder.context(builder.asked(question), tokens, "long").row["prompt"] for question in found]


@torch.inference_mode()
def answers(model, tokenizer, prompts: list[str], batch: int = 64) -> list[str]:
    """Greedy answers; prompts are padded on the left, which RoPE does not see."""
    found = []
    for start in range(0, len(prompts), batch):
        given = tokenizer(prompts[start : start + batch], padding=True, padding_side="left", return_tensors="pt")
        ids = model.generate(
            given.input_ids, attention_mask=given.attention_mask, do_sample=False, max_new_tokens=NEW_TOKENS
        )
        found += tokenizer.batch_decode(ids[:, given.input_ids.shape[1] :], skip_special_tokens=True)
    return found


def measure(model_folder: Path, n: int = 256, lengths: tuple[int, ...] = LENGTHS) -> dict[int, float]:
    """Share of `n` held-out questions answered right by sub-EM behind the marker, by tokens of the prompt at most."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    tokenizer, asked, shares = AutoTokenizer.from_pretrained(BASE), questions(n, HELD_OUT), {}
    for tokens in lengths:
        texts = answers(model, tokenizer, contexts(asked, tokens))
        right = [judge(text, one["answers"])["correct"] for text, one in zip(texts, asked, strict=True)]
        shares[tokens] = round(sum(right) / n, 4)
    return shares
