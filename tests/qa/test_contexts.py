"""Contexts: the trainer's own token ids, lengths within bounds, evidence verbatim and anywhere, nothing leaked.

Tokens that a context claims are always compared with those of its whole prompt, whichever way they were counted.
"""

import json
import random
import subprocess
import sys
from collections import Counter
from copy import copy
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT, SOLO_COLUMNS, write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from material import MUSIQUE, make_questions, recipe, save_tokenizer
from scipy.stats import chisquare
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from solopo_plugin.host.template import encode_prompt, load_template, template_markers
from solopo_plugin.qa.answers import holds_answer, normalize_answer
from solopo_plugin.qa.contexts import Builder, permutation
from solopo_plugin.qa.documents import build_pool, count_tokens, rank_by_bm25
from solopo_plugin.qa.files import DataError, read_jsonl, write_jsonl
from solopo_plugin.qa.prompts import split_prompt
from solopo_plugin.qa.recipe import ContextKeys, pick
from solopo_plugin.synthesis import contexts, read

SIDES = ("short", "long")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def build(folder: Path, model: str, rows, **keys) -> tuple[list[dict], dict]:
    """Questions read and contexts built in `folder`; returns the rows of contexts.jsonl and the counts."""
    made = recipe(folder, model, rows, **keys)
    work = folder / "work"
    read.run(made, work)
    counts = contexts.run(made, work)
    return list(read_jsonl(work / "contexts.jsonl")), counts


def check(rows: list[dict], questions: list[dict], made, pool_texts: dict[str, str] | None = None) -> None:
    """What must hold for every context, worked out from its prompt alone."""
    tokenizer, template = load_template(made.model_name_or_path, made.template, made.default_system)
    by_id = {question["id"]: question for question in questions}
    for row in rows:
        question = by_id[row["id"]]
        for side, target in (("short", made.short_tokens), ("long", made.long_tokens)):
            context = row[side]
            prompt = context["prompt"]
            assert len(encode_prompt(tokenizer, template, prompt)) == context["tokens"] <= target
            documents = prompt.split("Document ")[1:]
            assert len(documents) == context["paragraphs"]
            evidence = [p for k, p in enumerate(question["evidence"]) if k not in context["dropped"]]
            assert len(evidence) == len(context["evidence"])
            for paragraph, place in zip(evidence, context["evidence"], strict=True):
                assert prompt[place["start"] : place["end"]] == paragraph["text"]
                assert prompt.count(paragraph["text"]) == 1
                assert documents[place["paragraph"] - 1].startswith(f"{place['paragraph']}: {paragraph['title']}\n")
            shown = [text.split("\n", 1)[1].split("\n\n")[0] for text in documents]
            assert len({normalize_answer(text) for text in shown}) == len(shown)  # none twice
            places = {place["paragraph"] - 1 for place in context["evidence"]}
            for k, text in enumerate(documents):
                if k not in places and not made.allow_answer_in_distractors:
                    assert not holds_answer(text.split("\n\n")[0], question["answers"])


# ---- the trainer's ids


@pytest.mark.parametrize(
    "template, keys, trainer",
    [
        ("qwen", {}, {}),
        ("llama3", {}, {}),
        ("qwen", {"default_system": "Be brief."}, {"default_system": "Be brief."}),
        ("qwen3", {"enable_thinking": False}, {"enable_thinking": False}),
        ("qwen3", {}, {}),
    ],
)
def test_prompts_are_the_trainers_ids(model, tmp_path, monkeypatch, template, keys, trainer):
    """Rows go through the host's whole loader, as in training; its prompt ids are those that were counted."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.data.template import TEMPLATES
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    monkeypatch.setitem(TEMPLATES, template, copy(TEMPLATES[template]))  # the host changes it for all that follows
    if template == "llama3":
        model = save_tokenizer(tmp_path, bos="<|begin_of_text|>")
    rows, _ = build(tmp_path, model, make_questions(6), template=template, short_tokens=500, **keys)
    data = [
        {"prompt": r["short"]["prompt"], "long_prompt": r["long"]["prompt"], "chosen": "x y", "rejected": "z"}
        for r in rows
    ]
    folder = write_dataset(tmp_path / "data", data, columns=SOLO_COLUMNS)
    arguments = dict(
        model_name_or_path=model, stage="solopo", do_train=True, dataset="rows", dataset_dir=folder, template=template,
        cutoff_len=4096, output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none", overwrite_cache=True,
    )  # fmt: skip
    model_args, data_args, training_args, _, _ = get_train_args(arguments | trainer)
    tokenizer = load_tokenizer(model_args)["tokenizer"]
    trained = get_dataset(
        get_template_and_fix_tokenizer(tokenizer, data_args), model_args, data_args, training_args, "solopo",
        tokenizer=tokenizer,
    )["train_dataset"]  # fmt: skip
    ours, ours_template = load_template(model, template, **keys)
    load_template(model, template, default_system="Of another recipe in this process.")
    assert len(trained) == len(rows) == 6
    for row, tokenised in zip(rows, trained, strict=True):
        for side in SIDES:
            ids = tokenised[f"{side}_prompt_ids"]
            assert ids == encode_prompt(ours, ours_template, row[side]["prompt"]) and len(ids) == row[side]["tokens"]


# ---- lengths


@pytest.mark.slow
def test_a_thousand_random_questions(model, tmp_path):
    """Never above the target; below it by less than a paragraph, in ten pairs of targets."""
    rng, built = random.Random(11), 0
    for part in range(10):
        questions = make_questions(100, seed=part, longest=rng.randint(20, 120))
        keys = {"short_tokens": rng.randint(380, 700), "long_tokens": rng.randint(800, 3000)}
        rows, counts = build(tmp_path / str(part), model, questions, **keys)
        made = recipe(tmp_path / str(part), model, questions, **keys)
        check(rows, questions, made)
        tokenizer, _ = load_template(made.model_name_or_path, made.template)
        texts = [f"\n\nDocument 99: {p['title']}\n{p['text']}" for q in questions for p in q["distractors"]]
        longest = max(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
        for row in rows:
            assert all(0 <= keys[f"{side}_tokens"] - row[side]["tokens"] < longest for side in SIDES)
        assert counts["tokenised_whole"] == 0 and len(rows) + sum(counts["dropped"].values()) == 100
        assert set(counts["dropped"]) <= {"evidence_longer_than_short"}
        built += len(rows)
    assert built > 900


@pytest.mark.skipif(not MUSIQUE.exists(), reason=f"no MuSiQue sample at {MUSIQUE}; set SOLOPO_SHARED_DATA")
def test_real_questions(model, tmp_path):
    keys = {"short_tokens": 1800, "long_tokens": 6000}
    rows, counts = build(tmp_path, model, MUSIQUE, **keys)
    assert len(rows) > 120 and counts["left_out"]["with_answer"] > 5
    questions = list(read_jsonl(tmp_path / "work" / "questions.jsonl"))
    tokenizer, template = load_template(model, "qwen")
    for row in rows:
        (question,) = (q for q in questions if q["id"] == row["id"])
        for side in SIDES:
            prompt, context = row[side]["prompt"], row[side]
            assert len(encode_prompt(tokenizer, template, prompt)) == context["tokens"]
            assert keys[f"{side}_tokens"] - 200 < context["tokens"] <= keys[f"{side}_tokens"]
            for paragraph, place in zip(question["evidence"], context["evidence"], strict=True):
                assert prompt[place["start"] : place["end"]] == paragraph["text"]
                assert prompt.count(paragraph["text"]) == 1


def save_other_tokenizer(folder: Path, pre_tokenizer, decoder, texts: list[str]) -> str:
    """A tokenizer of another make, in a folder that can be a `model_name_or_path`."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizer, decoder
    special = ["<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    alphabet = sorted({c for text in texts for c in text} | set(map(chr, range(32, 127))) | {"\n"})
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=2000, special_tokens=special, show_progress=False, initial_alphabet=alphabet),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return str(folder)


@pytest.mark.parametrize("kind", ["no words", "metaspace"])
def test_tokens_that_do_not_add_up(tmp_path, kind):
    """Tokenizers that merge across the ends of documents: every prompt is tokenised, and lengths hold as ever."""
    questions = make_questions(20)
    glued = [
        f"{p['text']}\n\nDocument {k}: {p['title']}\n"
        for q in questions
        for k, p in enumerate(q["distractors"] + q["evidence"])
    ]
    pre_tokenizer, decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    if kind == "no words":
        pre_tokenizer, decoder = pre_tokenizers.Split("\0", "removed"), decoders.Fuse()
    model = save_other_tokenizer(tmp_path, pre_tokenizer, decoder, glued)
    assert any("\n\nDoc" in token for token in load_template(model, "qwen")[0].get_vocab())
    keys = {"short_tokens": 600, "long_tokens": 1500}
    rows, counts = build(tmp_path / "made", model, questions, **keys)
    assert counts["tokenised_whole"] >= 2 * len(rows) > 30
    pool, _ = build_pool(tmp_path / "made" / "work", set())
    count_tokens(pool, load_template(model, "qwen")[0])
    assert len(pool.ends_apart) == len(pool) and not any(pool.ends_apart)
    check(rows, questions, recipe(tmp_path / "made", model, questions, **keys))
    assert all(600 - 60 < r["short"]["tokens"] and 1500 - 60 < r["long"]["tokens"] for r in rows)


def test_a_prompt_of_the_users_own(model, tmp_path):
    """Also one whose documents are glued to its text, so that tokens do not add up."""
    questions = make_questions(20)
    for folder, prompt in {"apart": "Q: {question}\n\n{documents}\n\nA:", "glued": "{question}({documents})"}.items():
        rows, counts = build(tmp_path / folder, model, questions, prompt=prompt)
        assert (counts["tokenised_whole"] > 0) == (folder == "glued") and len(rows) == 20
        check(rows, questions, recipe(tmp_path / folder, model, questions, prompt=prompt))
        assert all(450 - 60 < r["short"]["tokens"] and 1200 - 60 < r["long"]["tokens"] for r in rows)
    for prompt in ("{documents}", "{question}", "{documents} {question} {question}"):
        with pytest.raises(DataError, match=r"`prompt` must hold \{\w+\} once, it does so [02] times"):
            split_prompt(prompt)


odd = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from("\n\r\t  .0123456789Document:é\u0301\u2028")), max_size=60
)
plain = st.fixed_dictionaries({"title": odd.map(lambda t: " ".join(t.split())), "text": odd.filter(str.strip)})


@given(st.lists(plain, min_size=1, max_size=3), st.lists(plain, max_size=12), odd, st.integers(200, 500), st.data())
@settings(deadline=None, max_examples=80, derandomize=True, database=None)
def test_whatever_the_texts_are(model, tmp_path_factory, evidence, distractors, question, target, data):
    """Control characters, line ends, digits, accents that combine: tokens are exact, evidence is verbatim."""
    work = tmp_path_factory.mktemp("odd")
    row = {"id": "x", "question": f"Where {question}", "answers": ["Zq7"], "hops": None, "evidence": evidence}
    write_jsonl(work / "questions.jsonl", [row | {"distractors": distractors}])
    write_jsonl(work / "corpus.jsonl", [p for q in FILLING for p in q["distractors"]])
    tokenizer, template = loaded(model)
    pool, questions = build_pool(work, template_markers(tokenizer, template))
    count_tokens(pool, tokenizer)
    keys = {
        "short_tokens": target,
        "long_tokens": 2 * target,
        "distractors": data.draw(st.sampled_from(["random", "bm25"])),
    }
    asked = recipe(work, model, Path("-"), **keys)
    builder = Builder(pick(asked, ContextKeys), pool, tokenizer, template)
    builder.check_sums(questions, {"long": 2 * target, "short": target})
    made, _ = contexts.make_row(builder, asked, questions[0])
    if isinstance(made, str):
        shortest = min(len(normalize_answer(p["text"])) for p in evidence)
        known = ["evidence_longer_than_short", "evidence_longer_than_long", "evidence_within_evidence"]
        known += ["too_few_distractors_for_long"] * (shortest < 6)  # `:` is in every paragraph
        assert made in known
        return
    for side, limit in (("short", target), ("long", 2 * target)):
        prompt = made[side]["prompt"]
        assert len(encode_prompt(tokenizer, template, prompt)) == made[side]["tokens"] <= limit
        assert limit - made[side]["tokens"] < max(pool.tokens) + 2
        found = [prompt[place["start"] : place["end"]] for place in made[side]["evidence"]]
        assert found == [paragraph["text"] for paragraph in evidence]


FILLING = make_questions(6, seed=3, longest=30)


@cache
def loaded(model: str) -> tuple:
    return load_template(model, "qwen")


# ---- chance


def test_order_and_workers_change_nothing(model, tmp_path):
    questions = make_questions(40)
    rows, counts = build(tmp_path / "a", model, questions)
    again, _ = build(tmp_path / "b", model, questions, num_workers=3)
    content = [(tmp_path / name / "work" / "contexts.jsonl").read_bytes() for name in "ab"]
    assert content[0] == content[1] and len(rows) == 40 and counts["left_out"] == {}
    few, _ = build(tmp_path / "c", model, questions, long_tokens=900)
    assert [r["short"] for r in few] == [r["short"] for r in rows]
    other, _ = build(tmp_path / "d", model, questions, seed=1)
    assert all(a["long"]["prompt"] != b["long"]["prompt"] for a, b in zip(rows, other, strict=True))


def test_order_of_questions_changes_no_question(model, tmp_path):
    """The pool in its order is what is drawn from; with it unchanged, a question's contexts are its own affair."""
    questions = make_questions(30)
    documents = [p for q in questions for p in q["evidence"] + q["distractors"]]
    write_jsonl(tmp_path / "documents", documents)
    bare = [q | {"distractors": []} for q in questions]
    first = bare[0] | {"id": "first", "evidence": documents}  # brings the whole pool, in one order
    both = []
    for order in (bare, bare[::-1]):
        rows, counts = build(tmp_path / "x", model, [first, *order])
        assert counts["dropped"] == {"evidence_longer_than_long": 1}
        both.append({r["id"]: r for r in rows})
    assert both[0] == both[1] and len(both[0]) == 30


def test_evidence_is_anywhere(model, tmp_path):
    """Chi-square of the depth of evidence in tenths of the context; p is that of one seeded draw, not a search."""
    questions = make_questions(300, longest=40)
    rows, _ = build(tmp_path, model, questions, long_tokens=2400)
    for side, bins in (("short", 4), ("long", 10)):
        depth = Counter()
        for row in rows:
            n = row[side]["paragraphs"]
            for place in row[side]["evidence"]:
                for b in range(bins):  # a paragraph covers its share of the bins
                    depth[b] += (
                        max(
                            0, min(place["paragraph"] / n, (b + 1) / bins) - max((place["paragraph"] - 1) / n, b / bins)
                        )
                        * n
                    )
        observed = [depth[b] for b in range(bins)]
        assert sum(observed) == pytest.approx(sum(len(r[side]["evidence"]) for r in rows))
        assert chisquare(observed).pvalue > 0.001, observed
        middle = sum(observed[1:-1]) / (bins - 2)  # the test sees what it is for: evidence that avoids the ends
        assert chisquare([0.5 * observed[0], *observed[1:-1], observed[-1] + 0.5 * observed[0]]).pvalue < 0.001, middle


@given(st.integers(0, 60), st.integers(0, 2**32))
@settings(deadline=None, max_examples=100, derandomize=True, database=None)
def test_permutation(n, seed):
    assert sorted(permutation(n, random.Random(seed))) == list(range(n))


def test_permutations_are_equally_likely():
    seen = Counter(tuple(permutation(4, random.Random(i))) for i in range(24_000))
    assert len(seen) == 24 and chisquare(list(seen.values())).pvalue > 0.001


# ---- distractors


def test_distractors_with_an_answer(model, tmp_path):
    """Left out and counted, in any spelling, as the judge would find them: as whole words; or kept when asked for."""
    questions = make_questions(6, distractors=12)
    for question in questions:
        question["answers"] = ["Blue Anchor", "US", "Xi'an"]
    leaks = ["the BLUE, anchor of no. 1", "in the U.S. no. 3", "near Xi\u2019an\u2019s wall no. 5"]
    shown = [*leaks, "a blue anchorage of no. 2", "because usual no. 4", "as xians of no. 6"]
    for question, text in zip(questions, shown, strict=False):
        question["distractors"].append({"title": "Planted", "text": text})
    for question in questions:
        question["evidence"][0]["text"] += " Blue Anchor, US, Xi'an."
    rows, counts = build(tmp_path / "a", model, questions, long_tokens=2500)
    text = "".join(row["long"]["prompt"] for row in rows)
    assert [planted in text for planted in shown] == [planted not in leaks for planted in shown]
    assert counts["left_out"]["with_answer"] >= 3
    rows, counts = build(tmp_path / "b", model, questions, long_tokens=2500, allow_answer_in_distractors=True)
    text = "".join(row["long"]["prompt"] for row in rows)
    assert all(planted in text for planted in shown) and "with_answer" not in counts["left_out"]


def test_repeated_paragraphs(model, tmp_path):
    """Paragraphs that are the same in normal form are one; evidence comes once and as its own question spells it."""
    questions = make_questions(8, distractors=10)
    rng = random.Random(0)
    spelled = questions[0]["evidence"][0]["text"].upper()
    for question in questions[1:]:
        question["distractors"] += [
            {"title": "x", "text": spelled}, {"title": "y", "text": f"Longer. {spelled} And more."},
            {"title": "z", "text": rng.choice(["The same paragraph.", "same   paragraph"])},
        ]  # fmt: skip
    rows, counts = build(tmp_path, model, questions, long_tokens=2800, allow_answer_in_distractors=True)
    check(rows, questions, recipe(tmp_path, model, questions, long_tokens=2800, allow_answer_in_distractors=True))
    assert spelled not in rows[0]["long"]["prompt"] and counts["left_out"]["with_evidence"] >= 1
    assert any(spelled in row["long"]["prompt"] for row in rows[1:])
    assert counts["paragraphs"] - counts["distractors"] == 2


def test_short_distractors_from_the_long_ones(model, tmp_path):
    questions = make_questions(30)
    rows, _ = build(tmp_path / "a", model, questions, short_subset_of_long=True)
    check(rows, questions, recipe(tmp_path / "a", model, questions))
    plain, _ = build(tmp_path / "b", model, questions)

    def bodies(context: dict) -> set[str]:
        return {text.split("\n", 1)[1].split("\n\n")[0] for text in context["prompt"].split("Document ")[1:]}

    assert all(bodies(row["short"]) < bodies(row["long"]) for row in rows)
    assert not all(bodies(row["short"]) < bodies(row["long"]) for row in plain)
    assert [r["long"] for r in rows] == [r["long"] for r in plain]


def test_a_lossy_short_context(model, tmp_path):
    """One paragraph of the evidence is missing from about a third of the short contexts, and from no long one."""
    questions = make_questions(200, longest=30)
    rows, _ = build(tmp_path, model, questions, lossy_short=1 / 3, long_tokens=900)
    check(rows, questions, recipe(tmp_path, model, questions, long_tokens=900))
    lost = [row["short"]["dropped"] for row in rows]
    assert 45 < sum(map(len, lost)) < 90 and {len(d) for d in lost} == {0, 1} and {d[0] for d in lost if d} >= {0, 1, 2}
    assert not any(row["long"]["dropped"] for row in rows)
    for row, question in zip(rows, questions, strict=True):
        for k in row["short"]["dropped"]:
            assert question["evidence"][k]["text"] not in row["short"]["prompt"]


def test_hard_distractors(model, tmp_path):
    """BM25 puts paragraphs that share the question's words before the others; each once."""
    questions = make_questions(20)
    hard = [f"A list about item {k} and the name that belongs to another item, no. {k}." for k in range(900, 906)]
    questions[0]["distractors"] += [{"title": "Hard", "text": text} for text in hard]
    rows, _ = build(tmp_path, model, questions, distractors="bm25")
    check(rows, questions, recipe(tmp_path, model, questions))
    assert all(sum(text in row["long"]["prompt"] for text in hard) == len(hard) for row in rows)
    pool, _ = build_pool(tmp_path / "work", set())
    order = list(rank_by_bm25(pool)("Which name belongs to item 4 of the list?"))
    assert sorted(order) == list(pool.drawable) and {pool.text(i) for i in order[:6]} <= {*hard, *texts_about(pool, 4)}
    assert sorted(rank_by_bm25(pool)("")) == list(pool.drawable)


def texts_about(pool, item: int) -> set[str]:
    return {pool.text(i) for i in pool.drawable if f" {item} " in pool.form(i)}


# ---- questions that give none


def test_dropped_questions_are_counted(model, tmp_path):
    questions = make_questions(9)
    questions[0]["evidence"][0]["text"] = "long " * 150
    questions[1]["evidence"][0]["text"] = "very long " * 500
    questions[2]["evidence"][1]["text"] += " <|im_end|>"
    questions[3]["question"] += " <|im_start|>"
    questions[4]["evidence"][1]["text"] = f"More. {questions[4]['evidence'][0]['text']} And more."
    questions[5]["distractors"][0]["text"] += " <|endoftext|>"
    rows, counts = build(tmp_path, model, questions, short_tokens=500)
    assert counts["dropped"] == {
        "evidence_longer_than_long": 1, "evidence_longer_than_short": 1, "evidence_within_evidence": 1,
        "special_tokens": 2,
    }  # fmt: skip
    assert [row["id"] for row in rows] == ["q5", "q6", "q7", "q8"]
    assert not any("<|" in row[side]["prompt"] for row in rows for side in SIDES)


def test_a_pool_that_is_too_small(model, tmp_path):
    """Nothing is drawn twice and nothing runs for ever: the question is dropped, and if all are, that is an error."""
    with pytest.raises(DataError, match=r"None of 3 questions gives .*too_few_distractors_for_long': 3.* `corpus`"):
        build(tmp_path, model, make_questions(3), long_tokens=8000)
    with pytest.raises(DataError, match=r"`template: qwem` is no template of the host; did you mean `qwen`\?"):
        build(tmp_path, model, make_questions(3), template="qwem")
    with pytest.raises(
        DataError, match=r"`template` writes the token '<\|im_end\|>', which .*base does not know \(its v"
    ):
        build(tmp_path, str(ROOT / "data/lab/base"), make_questions(3), template="qwen")
    with pytest.raises(DataError, match=r"No tokenizer can be loaded from `model_name_or_path: \S+none`"):
        build(tmp_path, str(tmp_path / "none"), make_questions(3))


def test_paragraphs_too_long_to_fill_a_context(model, tmp_path):
    """A long context of little but the evidence is none; half of the target is enough."""
    questions = make_questions(4, distractors=0)
    for name, words, long_tokens, n in (("long", 5000, 4000, 0), ("half", 2500, 4000, 4)):
        write_jsonl(tmp_path / "corpus.jsonl", [{"id": i, "text": f"no. {i}" + " harbour" * words} for i in range(50)])
        keys = dict(corpus=str(tmp_path / "corpus.jsonl"), long_tokens=long_tokens)
        if n:
            rows, counts = build(tmp_path / name, model, questions, **keys)
            assert len(rows) == n and counts["dropped"] == {}
            assert all(2500 < row["long"]["tokens"] < 3600 for row in rows)
            continue
        with pytest.raises(DataError, match="paragraphs_too_long_for_long': 4.*, or split long paragraphs"):
            build(tmp_path / name, model, questions, **keys)


@pytest.mark.slow
def test_benchmark_prints_time_and_memory(tmp_path):
    write_jsonl(tmp_path / "q.jsonl", make_questions(20))
    command = [sys.executable, str(ROOT / "scripts" / "benchmark_data.py"), str(tmp_path / "q.jsonl"), "--pairs", "30"]
    command += ["--paragraphs", "500", "short_tokens=700", "long_tokens=2000"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    assert "30 short and long contexts from " in process.stdout and "peak memory" in process.stdout
    counts = json.loads(process.stdout.splitlines()[-2])
    assert counts["paragraphs"] >= 480
