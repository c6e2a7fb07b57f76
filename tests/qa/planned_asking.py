"""Replies of a model that is asked for questions and then to answer them, planned so that every count is known."""

import json
import random
import re
from collections import Counter
from dataclasses import dataclass, field

from solopo_plugin.qa.prompts import document_text
from solopo_plugin.synthesis.ask import choose
from solopo_plugin.synthesis.recipe import DataRecipe

KINDS = {  # what becomes of a question -> its probability
    "right": 0.39, "malformed": 0.07, "special_tokens": 0.03, "quote_not_in_passage": 0.07, "long_answer": 0.05,
    "answer_not_in_quote": 0.05, "answer_in_question": 0.05, "speaks_of_the_text": 0.05, "does_not_stand_alone": 0.03,
    "no_agreement": 0.06, "known_without_evidence": 0.05, "one_passage_is_enough": 0.06, "asked_before": 0.04,
}  # fmt: skip
WORDS = {"which", "word", "entry", "clerk", "number", "harbour", "ledger", "write", "down", "text", "does", "keeps"}


@dataclass
class Plan:
    """Hold what the server says, by a part of the prompt; how many questions go for which reason; what is kept."""

    said: dict[str, list[str]] = field(default_factory=dict)
    counts: Counter = field(default_factory=Counter)
    of_pairs: Counter = field(default_factory=Counter)  # of `counts`, those of two hops
    kept: list[dict] = field(default_factory=list)


def plan(recipe: DataRecipe, passages: list[dict], seed: int = 0) -> Plan:
    made = Plan()
    for chosen in choose(recipe, passages):
        rng, replies, right = random.Random(f"{seed} {[p['id'] for p in chosen]}"), [], None
        used: set[str] = set()  # the same answer from the same passages counts as asked before
        for k in range(recipe.candidates):
            kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
            kind = "right" if kind == "asked_before" and right is None else kind
            kind = "right" if kind == "one_passage_is_enough" and len(chosen) == 1 else kind
            made.counts[kind] += 1
            made.of_pairs[kind] += len(chosen) > 1
            reply = right if kind == "asked_before" else question_about(chosen, rng, used)
            if kind == "right":
                right = right or reply
                names = [passage["id"] for passage in chosen]
                made.kept.append(reply | {"passages": names, "id": "//".join([*names, str(k)])})
            replies.append(spoil(kind, reply, chosen, recipe, made, rng))
        made.said[asked_with(chosen)] = replies
    return made


def asked_with(chosen: list[dict]) -> str:
    """A part that only the prompt that asks for questions about these passages has."""
    *before, last = chosen
    label = f"{before[0]['text'][-80:]}\n\nDocument 2:" if before else "Document 1:"
    return f"{label}{document_text(last)}\n\nWrite one question"


def question_about(chosen: list[dict], rng: random.Random, used: set[str]) -> dict:
    """A question whose answer is a word of a sentence of the last passage."""
    quotes = []
    for passage in chosen:
        sentences = re.split(r"(?<=[.!?])\s+|\n", passage["text"])
        quotes.append(rng.choice([s for s in sentences if words_in(s, used) and len(s.split()) > 5]))
    answer = rng.choice(words_in(quotes[-1], used))
    used.add(answer.lower())
    code = f"{rng.randrange(10**9)}"
    question = f"Which word is entry {code} of the ledger that the harbour clerk keeps?"
    return {"question": question, "answer": answer, "quotes": [" ".join(quote.split()) for quote in quotes]}


def words_in(sentence: str, used: set[str]) -> list[str]:
    found = re.findall(r"(?<!\S)[A-Za-z]{5,}(?!\S)", sentence)
    return [word for word in found if word.lower() not in WORDS | used]


def spoil(kind: str, reply: dict, chosen: list[dict], recipe: DataRecipe, made: Plan, rng: random.Random) -> str:
    """The reply as the model writes it, with the fault; and what it answers when asked again."""
    question, answer, quotes = reply["question"], reply["answer"], list(reply["quotes"])
    n, shown = recipe.check_samples, form(question, answer, quotes, rng)
    if kind == "malformed":
        return rng.choice(["I cannot ask.", shown.replace('"answer"', '"reply"').replace("Answer:", ""), "{" * 50, ""])
    if kind == "special_tokens":
        return form(f"<|im_start|>{question}", answer, quotes, rng)
    if kind == "quote_not_in_passage":
        return form(question, answer, [*quotes[:-1], quotes[-1].replace(" ", " not ", 1)], rng)
    if kind == "long_answer":
        return form(question, " ".join(quotes[-1].split()[: recipe.answer_words + 1]), quotes, rng)
    if kind == "answer_not_in_quote":
        return form(question, "Zzyzx", quotes, rng)
    if kind == "answer_in_question":
        return form(f"{question[:-1]}, as {answer.upper()} is?", answer, quotes, rng)
    if kind == "speaks_of_the_text":
        return form(
            rng.choice(["According to the passage, which", "In this text, which"]) + question[5:], answer, quotes, rng
        )
    if kind == "does_not_stand_alone":
        return form(f"When did she write entry {question.split()[4]}?", answer, quotes, rng)
    if kind == "asked_before":
        question = rng.choice([question, question.replace("Which", "What")])
        shown = form(question, answer, quotes, rng)
    agree = rng.randrange(recipe.min_agreement) if kind == "no_agreement" else rng.randint(recipe.min_agreement, n)
    known = (
        rng.randint(recipe.max_known + 1, n) if kind == "known_without_evidence" else rng.randint(0, recipe.max_known)
    )
    made.said[f"Question: {question}\n\nAnswer from the documents"] = answers(answer, agree, n, rng)
    made.said[f"Question: {question}\n\nThink step by step"] = answers(answer, known, n, rng)
    one = [rng.randint(0, recipe.max_alone) for _ in chosen]
    if kind == "one_passage_is_enough":
        one[rng.randrange(len(one))] = rng.randint(recipe.max_alone + 1, n)
    for passage, alone in zip(chosen, one, strict=True) if len(chosen) > 1 else ():
        made.said[with_one(passage, question)] = answers(answer, alone, n, rng)
    return shown


def with_one(passage: dict, question: str) -> str:
    """A part that only the prompt with this passage alone has."""
    return f"Document 1:{document_text(passage)}\n\nQuestion: {question}\n\nAnswer from the documents"


def answers(answer: str, right: int, n: int, rng: random.Random) -> list[str]:
    texts = [f"So it is. The answer is: {answer}."] * right + ["Who knows? The answer is: No answer."] * (n - right)
    return rng.sample(texts, n)


def form(question: str, answer: str, quotes: list[str], rng: random.Random) -> str:
    """The ways in which a model writes what it was asked for."""
    names = ["quote"] if len(quotes) == 1 else [f"quote_{n}" for n in range(1, len(quotes) + 1)]
    fields = {"question": question, "answer": answer, **dict(zip(names, quotes, strict=True))}
    lines = "\n".join(f"**{name.replace('_', ' ').capitalize()}:** {value}" for name, value in fields.items())
    text = json.dumps(fields)
    thought = f"<think>\n{{}} {text[:20]}\n</think>"
    fenced, within = f"```json\n{text}\n```", json.dumps({"result": [fields]})
    spaced = json.dumps(fields, ensure_ascii=False, indent=2)
    return rng.choice([text, spaced, fenced, f"Here it is: {text} Well?", thought + text, lines, within])


def obviously_right(question: dict, passages: dict[str, dict], recipe: DataRecipe, said: dict[str, list[str]]) -> None:
    """Check a kept question against every filter, each in the plainest words."""
    (answer,), text = question["answers"], question["question"]
    ids = question["id"].split("//")[:-1]
    assert len(question["evidence"]) == question["hops"] == len(ids)
    for id, shown in zip(ids, question["evidence"], strict=True):
        for name in ("title", "text", "source", "section", "place"):
            assert shown[name] == passages[id][name]
        assert shown["quote"] in passages[id]["text"] and shown["quote"].strip()
    assert any(answer.lower() in shown["quote"].lower() for shown in question["evidence"])
    assert 1 <= len(answer.split(" ")) <= recipe.answer_words
    assert answer.lower() not in text.lower()
    assert "<|" not in text + answer and text[-1] == "?"
    for words in ("this text", "the passage", "the document", "the text", "above", " she ", " it ", " they "):
        assert words not in text.lower()
    (again,) = [texts for part, texts in said.items() if part == f"Question: {text}\n\nAnswer from the documents"]
    (alone,) = [texts for part, texts in said.items() if part == f"Question: {text}\n\nThink step by step"]
    assert sum(reply.endswith(f"The answer is: {answer}.") for reply in again) >= recipe.min_agreement
    assert sum(reply.endswith(f"The answer is: {answer}.") for reply in alone) <= recipe.max_known
    for id in ids if len(ids) > 1 else ():
        one = said[with_one(passages[id], text)]
        assert sum(reply.endswith(f"The answer is: {answer}.") for reply in one) <= recipe.max_alone


def make_passages(n: int = 40, per_document: int = 5, seed: int = 0) -> list[dict]:
    """Invented passages; the names in them are shared by two passages each."""
    from material import WORDS as PLAIN

    rng, rows = random.Random(f"passages {seed}"), []
    for i in range(n):
        sentences = [f"{rng.choice(PLAIN).capitalize()} " + " ".join(rng.choices(PLAIN, k=9)) + "." for _ in range(4)]
        source, place = f"part {i // per_document % 3}/örtlich {i // per_document}.md", i % per_document
        keeper = f"\nThe keeper is Ada Holm{i % max(1, n // 2)}. "
        text = f"{' '.join(sentences[:2])}{keeper}{' '.join(sentences[2:])} No. {i}."
        rows.append({
            "id": f"{source}#{place}", "title": f"Örtlich {i // per_document} > Part {place}", "text": text,
            "source": source, "section": f"Part {place}", "place": place, "tokens": len(text.split()),
        })  # fmt: skip
    return rows
