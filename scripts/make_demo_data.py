"""Write data/demo_solopo.jsonl: invented people, places and trades; short and long contexts with the same evidence.

    python scripts/make_demo_data.py [path]

Beside it, demo_questions.jsonl: questions over two passages each, from which `build_data.py` makes rows; and
demo_history.jsonl: traces of an agent that looks people up, whole and without the calls that lead nowhere.

All text is made up here from the lists below, seeded per row, so the file is reproducible byte for byte. The rows are
for trying the stage out: they teach nothing about long contexts (see docs/evidence.md).
"""

import argparse
import json
import random
from pathlib import Path

NAMES = "Arlo Bettina Corin Dalia Edvin Fenna Goran Hedda Ilmar Jorun Kasimir Liora Maren Nestor Odile Pavel".split()
SURNAMES = "Ashdown Brekke Calloway Drozd Ellering Fairweather Grunwald Holm".split()
PLACES = "Karvik Lindhaven Mossburg Norrby Ostrava Pellworm Quillan Rosvik Sandvar Tarnow Ulmen Vestby".split()
TRADES = "baker,glazier,cartographer,beekeeper,printer,ferryman,clockmaker,weaver,surveyor,gardener".split(",")
HABITS = (
    "keeps a diary of the weather and reads it aloud every winter",
    "walks to the harbour before sunrise and counts the boats",
    "has repaired the same bicycle eleven times",
    "sings in a choir that has never performed in public",
    "collects spoons from railway stations that no longer exist",
)
QUESTION = (
    "Answer from the passages. Think first, then end with `The answer is: ...`.\n"
    "Question: In which town does the {} work?"
)


def passage(person: str, trade: str, place: str, rng: random.Random) -> str:
    """Return the passage that says where a person works, with a sentence that says nothing about it."""
    return f"{person} is a {trade} and works in {place}. {person} {rng.choice(HABITS)}."


def make_row(index: int, n_short: int = 2, n_long: int = 10) -> dict:
    """Make a row: one question with its passage and `n_short` - 1 or `n_long` - 1 others, in random order."""
    rng = random.Random(f"demo {index}")
    people = [f"{a} {b}" for a in NAMES for b in SURNAMES]
    chosen = rng.sample(people, n_long)
    trades = [rng.choice(TRADES[1:]) for _ in chosen]
    asked = rng.choice(TRADES)
    trades = [asked] + [t if t != asked else TRADES[0] if asked != TRADES[0] else TRADES[1] for t in trades[1:]]
    places = rng.sample(PLACES, len(PLACES))
    texts = [passage(p, t, places[i % len(places)], rng) for i, (p, t) in enumerate(zip(chosen, trades, strict=True))]

    def prompt(n: int) -> str:
        shown = rng.sample(texts[:n], n)
        return "\n\n".join(f"Passage {i + 1}: {t}" for i, t in enumerate(shown)) + "\n\n" + QUESTION.format(asked)

    return {
        "prompt": prompt(n_short),
        "long_prompt": prompt(n_long),
        "chosen": f"The passage about {chosen[0]} says that the {asked} works in {places[0]}. "
        f"The answer is: {places[0]}",
        "rejected": f"No passage says where the {asked} works. The answer is: No answer.",
    }


def make_question(index: int, n_distractors: int = 4) -> dict:
    """Make a question that needs two passages, in the plain format of `build_data.py`; no person is in two of them."""
    rng = random.Random(f"question {index}")
    people = random.Random("people").sample([f"{a} {b}" for a in NAMES for b in SURNAMES], len(NAMES) * len(SURNAMES))
    first, second, *others = people[3 * index : 3 * index + 3]
    place, elsewhere = rng.sample(PLACES, 2)
    trades = rng.sample(TRADES, 2)
    evidence = [
        f"{first} is a {trades[0]} and shares a workshop with {second}. {first} {rng.choice(HABITS)}.",
        passage(second, trades[1], place, rng),
    ]
    distractors = [passage(others[0], rng.choice(TRADES), elsewhere, rng)]
    distractors += [
        f"{town} is known for its {rng.choice(TRADES)}s, {rng.randint(3, 40)} of them. Of {others[0]} they say there "
        f"that this {rng.choice(TRADES)} {rng.choice(HABITS)}."
        for town in rng.sample([p for p in PLACES if p != place], n_distractors - 1)
    ]
    return {
        "id": f"demo-{index}",
        "question": f"In which town does the person work with whom {first} shares a workshop?",
        "answers": [place],
        "hops": 2,
        "evidence": [{"title": name, "text": text} for name, text in zip((first, second), evidence, strict=True)],
        "distractors": [{"title": text.split(" is ")[0], "text": text} for text in distractors],
    }


TOOLS = [
    {
        "name": "look_up",
        "description": "Tell what is known of a person.",
        "parameters": {
            "type": "object",
            "properties": {"person": {"type": "string", "description": "First name and surname."}},
            "required": ["person"],
        },
    }
]


def make_history(index: int, n_people: int = 8) -> dict:
    """Make a row of two conversations with the same final turn: an agent's trace, and the same without needless calls.

    In rows of even index the trace ends with the result that answers, in the others the user asks again behind it.
    """
    rng = random.Random(f"history {index}")
    first, second, *others = rng.sample([f"{a} {b}" for a in NAMES for b in SURNAMES], n_people)
    town, *elsewhere = rng.sample(PLACES, n_people - 1)
    known = {who: passage(who, rng.choice(TRADES), place, rng) for who, place in zip(others, elsewhere, strict=True)}
    known[first] = f"{first} shares a workshop with {second}. {first} {rng.choice(HABITS)}."
    known[second] = passage(second, rng.choice(TRADES), town, rng)
    start = [
        {"from": "system", "value": "You look people up before you answer."},
        {"from": "human", "value": f"In which town does the person work with whom {first} shares a workshop?"},
    ]
    end = [] if index % 2 == 0 else [
        {"from": "gpt", "value": "I have looked them up."},
        {"from": "human", "value": "Which town is it? End with `The answer is: ...`."},
    ]  # fmt: skip

    def trace(people: list[str]) -> list[dict]:
        turns = []
        for person in people:
            call = json.dumps({"name": "look_up", "arguments": {"person": person}})
            turns += [{"from": "function_call", "value": call}, {"from": "observation", "value": known[person]}]
        return [*start, *turns, *end]

    tried = rng.sample([first, *others], len(others) + 1)
    said = "{} shares a workshop with {}, who works in {}. The answer is: {}"
    return {
        "messages": trace([first, second]),
        "long_messages": trace([*tried, second]),
        "tools": json.dumps(TOOLS),
        "chosen": {"from": "gpt", "value": said.format(first, second, town, town)},
        "rejected": {"from": "gpt", "value": said.format(first, others[0], elsewhere[0], elsewhere[0])},
    }


def write(target: Path, rows: list[dict]) -> None:
    """Write rows atomically."""
    partial = target.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(target)
    print(f"{len(rows)} rows written to {target}")


def main(path: str = "data/demo_solopo.jsonl", n: int = 96, n_questions: int = 40, n_histories: int = 24) -> None:
    """Write `n` rows, and beside them the questions and the traces."""
    write(Path(path), [make_row(i) for i in range(n)])
    write(Path(path).with_name("demo_questions.jsonl"), [make_question(i) for i in range(n_questions)])
    write(Path(path).with_name("demo_history.jsonl"), [make_history(i) for i in range(n_histories)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", default="data/demo_solopo.jsonl")
    main(parser.parse_args().path)
