"""Write data/demo_solopo.jsonl: invented people, places and trades; short and long contexts with the same evidence.

    python scripts/make_demo_data.py [path]

Beside it, demo_questions.jsonl: questions over two passages each, from which `build_data.py` makes rows.

All text is made up here from the lists below, seeded per row, so the file is reproducible byte for byte. The rows are
for trying the stage out: they teach nothing about long contexts (see docs/evidence.md).
"""

import json
import random
import sys
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


def write(target: Path, rows: list[dict]) -> None:
    """Write rows atomically."""
    partial = target.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(target)
    print(f"{len(rows)} rows written to {target}")


def main(path: str = "data/demo_solopo.jsonl", n: int = 96, n_questions: int = 40) -> None:
    """Write `n` rows, and beside them the questions."""
    write(Path(path), [make_row(i) for i in range(n)])
    write(Path(path).with_name("demo_questions.jsonl"), [make_question(i) for i in range(n_questions)])


if __name__ == "__main__":
    main(*sys.argv[1:2])
