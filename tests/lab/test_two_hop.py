"""The lab's second task: questions need two facts, the base is what its script says, rows are right."""

import json
import random
import re
import sys
from collections import Counter

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts" / "lab"))
import arms  # noqa: E402
import make_two_hop_base as make_base  # noqa: E402
import two_hop  # noqa: E402
from make_base import tokenizer  # noqa: E402
from two_hop import BASE, LONG, PROMPT, RECIPE, SHORT, WORDS, contexts, held_out, measure  # noqa: E402

from solopo_plugin.evaluation.recipe import load_recipe as load_evaluation  # noqa: E402
from solopo_plugin.evaluation.run import evaluate  # noqa: E402
from solopo_plugin.qa.files import read_jsonl, write_jsonl  # noqa: E402
from solopo_plugin.synthesis.export import ENTRIES  # noqa: E402
from solopo_plugin.synthesis.recipe import load_recipe  # noqa: E402

QUESTION = re.compile(r"(?:In what town is|To whom does) the (employer|school) of (\w+) (belong )?\?\s+Answer:$")
CHAIN = re.compile(r"(\w+) (works for|studied at) (\w+) \. (\w+) (sits in|belongs to) (\w+) \. The answer is: (\w+)")
VERBS = {"employer": "works for", "school": "studied at"}


def read(prompt: str) -> tuple[list[str], dict, tuple[str, str, str]]:
    """Documents, their facts as (subject, verb) -> values, and the question as person and two verbs; own parser."""
    documents = re.findall(r"Document \d+:\n(.*)\n", prompt)
    facts = {}
    for subject, verb, value in re.findall(r"(\w+) (\w+ \w+) (\w+) \.", " ".join(documents)):
        facts.setdefault((subject, verb), []).append(value)
    noun, person, owner = QUESTION.search(prompt).groups()
    return documents, facts, (person, VERBS[noun], "belongs to" if owner else "sits in")


@pytest.fixture(scope="module")
def words():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE)


# ---- questions


@pytest.mark.parametrize("tokens", [SHORT, LONG])
def test_questions_need_two_facts_and_have_one_answer(tokens):
    asked = two_hop.questions(96, seed=3)
    kinds = Counter()
    for one, prompt in zip(asked, contexts(asked, tokens), strict=True):
        documents, facts, (person, first, second) = read(prompt)
        assert len(documents) == (tokens - 12) // 12 and all(len(text.split()) == 10 for text in documents)
        assert all(len(values) == 1 for values in facts.values()), "said twice"
        (firm,), (answer,) = facts[person, first], facts[facts[person, first][0], second]
        assert [answer] == one["answers"]
        holding = [text for text in documents if answer in text]
        assert len(holding) == 1 and person not in holding[0], "one document would do, or two answer"
        assert firm not in prompt.split("Question:")[1]
        other = {"works for": "studied at", "studied at": "works for"}[first]
        assert facts[person, other] != [firm], "either thing said of the person leads there"
        same = [sum(verb == asked for _, verb in facts) for asked in (first, second)]
        assert tokens == SHORT or min(same) > 5, "too few other facts of the same kind"
        kinds[first, second] += 1
    assert len(kinds) == 4 and set(kinds.values()) == {24}


def test_questions_belong_to_their_seed():
    assert two_hop.questions(8, 1) == two_hop.questions(8, 1) != two_hop.questions(8, 2)
    with pytest.raises(ValueError, match="1280"):
        two_hop.questions(1281, 0)


def test_evidence_is_anywhere_in_the_long_context():
    rows = held_out(256, LONG)
    documents = [(read(row["prompt"])[0], row["answers"][0]) for row in rows]
    places = [next(i for i, text in enumerate(texts) if answer in text) / len(texts) for texts, answer in documents]
    thirds = Counter(int(3 * place) for place in places)
    assert min(thirds.values()) > 256 / 3 - 3.5 * (256 * 2 / 9) ** 0.5  # 3.5 standard deviations


def test_host_sees_the_words(words):
    """A word is a token; the host's template `empty` writes nothing around them, nor a stop token behind an answer."""
    from solopo_plugin.host.template import encode_turn, load_template

    host_tokenizer, template = load_template(str(BASE), "empty")
    world = two_hop.World(4, random.Random(0))
    one = world.ask(next(iter(world.people)), "school", "town")
    prompt = held_out(1, SHORT)[0]["prompt"]
    talk = [{"role": "user", "content": prompt}, {"role": "assistant", "content": one["chain"]}]
    prompt_ids, ids = encode_turn(host_tokenizer, template, talk)
    known = {word: i for i, word in enumerate(WORDS)}
    assert prompt_ids == [known[word] for word in prompt.split()]
    assert ids == [known[word] for word in one["chain"].split()]
    assert words.decode(ids) == one["chain"]
    assert words.apply_chat_template(talk[:1], return_dict=False) == prompt_ids
    assert len(ids) < two_hop.NEW_TOKENS and CHAIN.fullmatch(one["chain"])


# ---- the base


def test_lessons_are_the_prompts_of_the_builder(words):
    """The base learns the layout that the pipeline writes; only words of answers are learnt."""
    ids, learnt = make_base.lesson(9, random.Random(4))
    first = learnt.index(True)
    text = words.decode(ids[:first])
    built = " ".join(held_out(1, SHORT)[0]["prompt"].split())
    names = re.compile(r"\b(?:{})\b".format("|".join(sum(two_hop.NAMES.values(), []))))
    fact = re.compile("name (?:sits in|belongs to|works for|studied at) name")
    shapes = [fact.sub("fact", names.sub("name", part)) for part in (text, built)]
    assert shapes[0].split("Question:")[0] == shapes[1].split("Question:")[0]
    assert QUESTION.search(text) and QUESTION.search(built)
    answers = [words.decode(torch.tensor(ids)[torch.tensor(learnt)])]
    chains = answers[0].split(" <|endoftext|>")
    assert len(chains) == make_base.ASKED + 1 and chains[-1] == ""
    for chain in chains[:-1]:
        person, verb, firm, again, second, value, last = CHAIN.fullmatch(chain.strip()).groups()
        assert firm == again and value == last
        assert f"{person} {verb} {firm} ." in text and f"{firm} {second} {value} ." in text


def test_heads_begin_by_looking_back():
    torch.manual_seed(0)
    model = make_base.untrained()
    model.set_attn_implementation("eager")
    looks = model(torch.randint(3, len(WORDS), (64, 24)), output_attentions=True).attentions[0].mean(0)
    for head, weights in enumerate(looks):
        assert weights.diagonal(-head - 1).mean() > 0.5, head


def test_shipped_base_is_small_and_made_by_the_script(words):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(BASE)
    assert sum(file.stat().st_size for file in BASE.iterdir()) < 2e6 and base.dtype == torch.float32
    shapes = {name: tensor.shape for name, tensor in make_base.untrained().state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in base.state_dict().items()}
    assert json.loads(tokenizer(WORDS).backend_tokenizer.to_str()) == json.loads((BASE / "tokenizer.json").read_text())


def test_shipped_base_has_its_profile():
    """Good over short contexts, lost in long ones.

    Exactly, on any processor: of all words of these answers the closest is chosen by 0.06 in its logit (measured in
    float64), some thousand times the rounding of fp32. So is the share below.
    """
    written = json.loads((BASE / "profile.json").read_text())["accuracy"]
    assert written[str(SHORT)] >= 0.9 and written[str(LONG)] <= 0.2
    assert measure(BASE, lengths=(SHORT,))[SHORT] == pytest.approx(written[str(SHORT)], abs=1e-4)
    assert measure(BASE, 48, (LONG,))[LONG] < 0.3


def test_evaluation_agrees(tmp_path):
    """`scripts/evaluate.py` on the same prompts, one at a time: the same share by its sub-EM."""
    rows = [row | {"id": i} for i, row in enumerate(held_out(96, SHORT))]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    words = [f"{key}={value}" for key, value in dict(
        models=BASE, template="empty", plain_data=tmp_path / "rows.jsonl", output_dir=tmp_path / "out",
        max_new_tokens=two_hop.NEW_TOKENS, bootstrap_samples=10,
    ).items()]  # fmt: skip
    results = evaluate(load_evaluation(str(ROOT / "examples/yaml/eval/plain.yaml"), words, None), False, True)
    share = next(row["value"] for row in results["summary"] if row["metric"] == "sub_em") / 100
    assert share == pytest.approx(measure(BASE, 96, (SHORT,))[SHORT], abs=1e-4)


# ---- rows and comparison


@pytest.mark.slow
def test_prepared_rows(tmp_path):
    """Pairs are sampled from the base, chosen right and rejected wrong by a parser of this test's own."""
    two_hop.prepare(tmp_path, seed=7, n=40, long_tokens=256, num_samples=8)
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    assert {f"two_hop_{suffix}" for suffix in ENTRIES} <= info.keys()
    one = [row["rejected"] for row in read_jsonl(tmp_path / "two_hop_solopo.jsonl")]
    for most in two_hop.REJECTED:
        entry = info[f"two_hop_rejected_{most}_solopo"]
        lists = [row[entry["columns"]["rejected"]] for row in read_jsonl(tmp_path / entry["file_name"])]
        assert [texts[0] for texts in lists] == one and 1 < max(map(len, lists)) <= most
    rows = list(read_jsonl(tmp_path / "two_hop_solopo.jsonl"))
    assert len(rows) >= 10
    for row in rows:
        _, facts, (person, first, second) = read(row["prompt"])
        _, long_facts, asked = read(row["long_prompt"])
        assert asked == (person, first, second)
        (firm,) = facts[person, first]
        assert facts[firm, second] == long_facts[firm, second] and long_facts[person, first] == [firm]
        (answer,) = facts[firm, second]
        assert row["chosen"].split()[-1] == answer != row["rejected"].split()[-1]
        assert "The answer is:" in row["rejected"]
        assert row["short_tokens"] == len(row["prompt"].split()) <= SHORT < row["long_tokens"] <= 256
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("samples.*.jsonl")}
    two_hop.prepare(tmp_path, seed=7, n=40, long_tokens=256, num_samples=8)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_results_depend_on_values_and_not_on_the_files_bytes(tmp_path, monkeypatch):
    """A comment leaves results as they are, a value does not; those of when the bytes counted are still known."""
    text = RECIPE.read_text()

    def with_recipe(text: str) -> dict:
        monkeypatch.setattr(two_hop, "RECIPE", tmp_path / "recipe.yaml")
        two_hop.RECIPE.write_text(text)
        return two_hop.settings()

    shipped = two_hop.settings()
    assert with_recipe(text) == shipped and shipped["recipe"] in two_hop.BEFORE.values()
    assert with_recipe(text.replace("# paper", "# a word") + "# a comment\n") == shipped
    assert with_recipe(text.replace("seed: 42", "seed: 1").replace("saves/lab/two_hop", "x")) == shipped
    changed = [text.replace("num_samples: 8", "num_samples: 16"), text + "lossy_short: 0.25\n"]
    assert len({with_recipe(one)["recipe"] for one in [text, *changed]}) == 3
    assert two_hop.settings().keys() == shipped.keys()


@pytest.mark.slow
def test_recipe_and_arms_fit():
    recipe = load_recipe(str(RECIPE))
    assert recipe.prompt == PROMPT and (recipe.short_tokens, recipe.long_tokens) == (SHORT, LONG)
    assert recipe.max_new_tokens == two_hop.NEW_TOKENS and ROOT / recipe.model_name_or_path == BASE
    common = arms.table("two_hop")["base"]
    assert common["cutoff_len"] == recipe.cutoff_len >= LONG + two_hop.NEW_TOKENS
    assert common["template"] == recipe.template and ROOT / common["model_name_or_path"] == BASE
    for name, keys in arms.arms("two_hop").items():
        several = re.sub("^rejected_[24]_", "", keys["dataset"].removeprefix(f"{recipe.dataset_name}_"))
        assert several in ENTRIES, name
