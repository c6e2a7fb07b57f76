"""Write data/demo_solopo.jsonl: invented people, places and trades; short and long contexts with the same evidence.

    python scripts/make_demo_data.py [path]

All text is made up here from the lists below, seeded per row, so the file is reproducible byte for byte. The rows are
for trying the stage out: they teach nothing about long contexts (see README, "What was reproduced").
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
    return f"{person} is a {trade} and works in {place}. {person} {rng.choice(HABITS)}."


def make_row(index: int, n_short: int = 2, n_long: int = 10) -> dict:
    """One question with its passage and `n_short` - 1 or `n_long` - 1 others, in random order."""
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


def main(path: str = "data/demo_solopo.jsonl", n: int = 96) -> None:
    """Write `n` rows atomically."""
    target = Path(path)
    partial = target.with_suffix(".partial")
    partial.write_text("".join(json.dumps(make_row(i)) + "\n" for i in range(n)), encoding="utf-8")
    partial.replace(target)
    print(f"{n} rows written to {target}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
