"""Show a finished data set at a glance: figures, leak checks and a reader for single rows, as one HTML page and PNGs.

The page needs nothing but itself and loads nothing; whatever stands in the data is shown as text, never run.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path

from matplotlib.figure import Figure

from ..qa.answers import gives_answer, holds_answer
from ..qa.files import DataError, read_jsonl, replacing
from ..qa.pages import png, render
from ..qa.prompts import split_documents
from ..qa.rows import SCHEMA, checked_rows
from .export import ORIGINS, Contexts, make_row, read_origins
from .histories import history_rows, is_history
from .pairs import SETS, question_key
from .pipeline import finished_stages

AND_ALSO = "\n\n-- rejected as well:\n\n"  # in the reader, between rejected answers
EXAMPLES = 5  # rows that a failed check names
CHECKS = {
    "answer_in_short_distractors": "An answer or alias stands in a distractor of the short context.",
    "answer_in_long_distractors": "An answer or alias stands in a distractor of the long context.",
    "evidence_differs": "Short and long context do not show the same evidence (paragraphs left out on purpose apart).",
    "evidence_repeated": "A paragraph of the evidence stands in a context more than once.",
    "validation_question_in_train": "A validation question, with the same answers, is also a training question.",
    "prompt_in_both_splits": "A short or long prompt is in training and in validation.",
    "id_repeated": "The same question id comes twice in a split.",
    "chosen_in_prompt": "The chosen answer stands in a prompt, word for word.",
    "rejected_in_prompt": "The rejected answer stands in a prompt, word for word.",
    "chosen_is_wrong": "The chosen answer does not hold a gold answer after its marker.",
    "rejected_is_right": "The rejected answer holds a gold answer after its marker.",
    "long_not_longer": "The long prompt is not longer than the short one.",
}
OF_HISTORIES = (  # checks of rows whose gold answers and documents are not known
    "evidence_differs", "evidence_repeated", "prompt_in_both_splits", "id_repeated", "chosen_in_prompt",
    "rejected_in_prompt", "long_not_longer",
)  # fmt: skip


@dataclass
class Source:
    """Give rows; `rows()` yields (split, row) anew each time, `pass_rates()` (hops, side, share right).

    A row also has "origins", where its evidence comes from as far as known, and "grades": those of its chosen and its
    rejected answer, or None where no model has judged them.
    """

    title: str
    rows: Callable[[], Iterator[tuple[str, dict]]]
    pass_rates: Callable[[], Iterator[tuple[int | None, str, float]]]
    stages: dict  # of the manifest; empty for a data file
    checks: tuple[str, ...] = tuple(CHECKS)
    unit: str = "tokens"  # of lengths


PARTS = ("short", "long", "chosen", "rejected")
SPREAD = 20  # points by which a paragraph's depth is drawn: it reaches from where it begins to where the next one does


@dataclass
class Statistics:
    """Facts of all rows: lengths by row, depths by paragraph of the evidence, ids by failed check."""

    splits: Counter = field(default_factory=Counter)
    tokens: dict[str, list[int]] = field(default_factory=lambda: {part: [] for part in PARTS})
    depths: dict[str, list[float]] = field(default_factory=lambda: {"short": [], "long": []})
    failed: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in CHECKS})
    unit: str = "tokens"  # of what `tokens` counts
    unparsed: int = 0  # rows whose documents could not be told apart


def inspect(path: Path, output: Path, n_rows: int = 100, names: tuple[str, ...] = ()) -> Statistics:
    """Write index.html and the PNGs, and return what they show.

    Args:
        path: A work folder of build_data.py, a data file that it exported, or one of histories.
        output: Folder to write to.
        n_rows: Rows for the reader, spread evenly; those that a check names come on top.
        names: Question ids that the reader must have.

    Raises:
        DataError: No finished data set there, or not one of ours.
    """
    source = open_source(path)
    statistics = gather(source)
    total = statistics.splits.total()
    if not total:
        raise DataError(f"{path} holds no rows.")
    wanted = {*names, *(name for failed in statistics.failed.values() for name in failed[:EXAMPLES])}
    spread = {i * total // n_rows for i in range(n_rows)}
    shown = [
        reader_row(split, row, source.unit)
        for i, (split, row) in enumerate(source.rows())
        if row["id"] in wanted or i in spread
    ]
    if missing := set(names) - {row["id"] for row in shown}:
        raise DataError(f"{path} has no row of question {min(missing)!r}.")
    pictures = []
    for name, (figure, caption) in draw_figures(statistics, source).items():
        pictures.append((png(figure), caption))
        with replacing(output / f"{name}.png") as file:
            file.write(pictures[-1][0])
    page = render(
        "synthesis/templates/look", title=source.title, summary=summary(source, statistics), pictures=pictures,
        checks=[(CHECKS[name], failed) for name, failed in statistics.failed.items()], examples=EXAMPLES,
        unparsed=statistics.unparsed, rows=shown, total=total,
    )  # fmt: skip
    with replacing(output / "index.html") as file:
        file.write(page.encode("utf-8", "replace"))
    return statistics


def open_source(path: Path) -> Source:
    """Open a work folder, or a data file and its validation rows beside it."""
    if os.path.isdir(path):
        for name in ("manifest.json", "contexts.jsonl", "pairs.jsonl"):
            if not (path / name).exists():
                raise DataError(f"{path} is no finished work folder: {name} is missing; run scripts/build_data.py.")
        given = partial(_rows_of_work, path), partial(_pass_rates_of_work, path), finished_stages(path)
        return Source(path.resolve().name, *given)
    if path.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"{path} is neither a work folder nor a .jsonl or .parquet file.")
    validation = path.with_name(f"{path.stem}_val{path.suffix}")
    if is_history(path):
        files = {"train": path, "val": validation}

        def histories() -> Iterator[tuple[str, dict]]:
            for split, file in files.items():
                yield from ((split, row) for row in (history_rows(file) if split == "train" or file.exists() else ()))

        return Source(path.name, histories, lambda: iter(()), {}, OF_HISTORIES, "characters")
    found = re.fullmatch(rf"(.*)_({'|'.join(SETS)})(_val)?", path.stem)
    about = read_origins(path.with_name(f"{found[1]}{ORIGINS}")) if found else {}

    def rows() -> Iterator[tuple[str, dict]]:
        for split, file in (("train", path), ("val", validation)):
            for row in checked_rows(file) if split == "train" or file.exists() else ():
                known = about.get(row["id"], {"origins": [], "grades": {}})
                yield (
                    split,
                    row | {"origins": known["origins"], "grades": known["grades"].get(found[2] if found else "")},
                )

    def pass_rates() -> Iterator[tuple[int | None, str, float]]:
        for _, row in rows():
            sides = [side for side in ("short", "long") if row[f"pass_rate_{side}"] is not None]
            yield from ((row["hops"], side, row[f"pass_rate_{side}"]) for side in sides)

    return Source(path.name, rows, pass_rates, {})


def _rows_of_work(work: Path) -> Iterator[tuple[str, dict]]:
    contexts = Contexts(work / "contexts.jsonl")
    for pair in read_jsonl(work / "pairs.jsonl"):
        if pair["set"] == "solopo":
            context = contexts.get(pair["id"])
            grades = [pair["chosen_grade"], pair["rejected_grade"]] if "chosen_grade" in pair else None
            yield pair["split"], make_row(pair, context) | {"origins": context.get("origins", []), "grades": grades}


def _pass_rates_of_work(work: Path) -> Iterator[tuple[int | None, str, float]]:
    """Pass rates of all questions that were sampled, also those without a pair."""
    hops = {context["id"]: context["hops"] for context in read_jsonl(work / "contexts.jsonl")}
    for side in ("short", "long"):
        for name, answers in groupby(read_jsonl(work / f"judged.{side}.jsonl"), key=lambda answer: answer["id"]):
            right = [answer["correct"] for answer in answers]
            yield hops[name], side, sum(right) / len(right)


def gather(source: Source) -> Statistics:
    """Gather the facts of all rows in one pass."""
    found = Statistics(failed={name: [] for name in source.checks}, unit=source.unit)
    ids: dict[str, set[str]] = {}
    questions: dict[str, set[str]] = {}
    prompts: dict[str, set[int]] = {}
    for split, row in source.rows():
        found.splits[split] += 1
        for part, values in found.tokens.items():
            values.append(row[f"{part}_tokens"])
        for side, depths in found.depths.items():
            for place in row[f"{side}_evidence"]:
                points = (place["paragraph"] - 1 + (i + 0.5) / SPREAD for i in range(SPREAD))
                depths += [point / row[f"{side}_paragraphs"] for point in points]
        failed = checks_of(row)
        found.unparsed += None in failed and "answer_in_long_distractors" in source.checks
        key = question_key(row)
        if row["id"] in ids.setdefault(split, set()):
            failed.add("id_repeated")
        other = "train" if split == "val" else "val"  # a work folder has the rows of both in one order
        if key in questions.get(other, ()):
            failed.add("validation_question_in_train")
        texts = {hash(row["prompt"]), hash(row["long_prompt"])}
        if texts & prompts.get(other, set()):
            failed.add("prompt_in_both_splits")
        ids[split].add(row["id"])
        questions.setdefault(split, set()).add(key)
        prompts.setdefault(split, set()).update(texts)
        for name in failed:
            if name in found.failed:
                found.failed[name].append(row["id"])
    return found


def checks_of(row: dict) -> set[str | None]:
    """Return the checks that a row fails by itself; None among them if its documents cannot be told apart."""
    failed: set[str | None] = set()
    shown = {}
    for side, prompt in (("short", row["prompt"]), ("long", row["long_prompt"])):
        places = row[f"{side}_evidence"]
        shown[side] = [prompt[place["start"] : place["end"]] for place in places]
        if any(prompt.count(text) != 1 for text in shown[side]):
            failed.add("evidence_repeated")
        documents = split_documents(prompt, row[f"{side}_paragraphs"])
        if documents is None:  # of histories always
            failed.add(None)
            continue
        evidence = {place["paragraph"] for place in places}
        distractors = (text for number, text in enumerate(documents, 1) if number not in evidence)
        if any(holds_answer(text, row["answers"]) for text in distractors):
            failed.add(f"answer_in_{side}_distractors")
    rejected = row.get("all_rejected") or [row["rejected"]]
    kept = [text for i, text in enumerate(shown["long"]) if i not in (row["short_dropped"] or [])]
    checks = {
        "evidence_differs": kept != shown["short"] or not shown["long"],
        "chosen_in_prompt": row["chosen"] in row["prompt"] or row["chosen"] in row["long_prompt"],
        "rejected_in_prompt": any(text in row["prompt"] or text in row["long_prompt"] for text in rejected),
        # by the rule, which is not that of a model's grades
        "chosen_is_wrong": not row.get("grades") and not gives_answer(row["chosen"], row["answers"]),
        "rejected_is_right": not row.get("grades") and any(gives_answer(text, row["answers"]) for text in rejected),
        "long_not_longer": row["long_tokens"] <= row["short_tokens"],
    }
    return failed | {name for name, holds in checks.items() if holds}


def reader_row(split: str, row: dict, unit: str = "tokens") -> dict:
    """Return a row as the reader shows it: prompts in pieces of (text, whether it is evidence); `unit`: of lengths."""

    def pieces(prompt: str, places: list[dict]) -> list[tuple[str, bool]]:
        parts, at = [], 0
        for place in sorted(places, key=lambda place: place["start"]):
            parts += [(prompt[at : place["start"]], False), (prompt[place["start"] : place["end"]], True)]
            at = place["end"]
        return [*parts, (prompt[at:], False)]

    lengths = {name.replace("tokens", unit): row[name] for name in SCHEMA.names if name.endswith("_tokens")}
    facts = lengths | {name: row[name] for name in SCHEMA.names if name.startswith("pass_rate")}
    facts |= dict(zip(("grade of chosen", "grade of rejected"), row["grades"] or (), strict=False))
    for number, origin in enumerate(row["origins"] or titles_of(row), 1):
        quote = [f"\u201c{origin['quote']}\u201d"] if origin.get("quote") else []
        places = [str(origin[name]) for name in ("source", "section") if origin.get(name)]
        facts[f"evidence {number}"] = ": ".join(filter(None, [" \u203a ".join(places), *quote]))
    return {
        "id": row["id"],
        "question": row["question"],
        "facts": {"split": split, "answers": " | ".join(row["answers"]), "hops": row["hops"]} | facts,
        "short": pieces(row["prompt"], row["short_evidence"]),
        "long": pieces(row["long_prompt"], row["long_evidence"]),
        "chosen": row["chosen"],
        "rejected": AND_ALSO.join(row.get("all_rejected") or [row["rejected"]]),
    }


def titles_of(row: dict) -> list[dict]:
    """Return the titles of a row's evidence as its sources, or the documents' numbers where there is none."""
    documents = split_documents(row["long_prompt"], row["long_paragraphs"]) or []
    titles = {number: text.split("\n", 1)[0].strip() for number, text in enumerate(documents, 1)}
    numbers = [place["paragraph"] for place in row["long_evidence"]]
    return [{"source": titles.get(number) or f"document {number} of the long prompt"} for number in numbers]


def draw_figures(statistics: Statistics, source: Source) -> dict[str, tuple[Figure, str]]:
    """Draw all figures; each has its name and the sentence that says what it shows."""
    tokens, depths, unit = statistics.tokens, statistics.depths, statistics.unit
    how = "templated" if unit == "tokens" else "as texts"
    whose = "all questions that were sampled" if source.stages else "the rows' questions"
    prompts = {f"{unit} of the {side} prompt": tokens[side] for side in ("short", "long")}
    responses = {f"{unit} of the {part} answer": tokens[part] for part in ("chosen", "rejected")}
    documents = {f"depth in the {side} context": depths[side] for side in ("short", "long")}
    pictures = {
        "prompt_lengths": (
            _histograms(prompts, "rows"),
            f"Lengths of the prompts, {how}.",
        ),
        "evidence_depth": (
            _histograms(documents, "paragraphs of the evidence", (0, 1), 1 / SPREAD),
            "Where the evidence stands among documents or turns: first (0) to last (1); level if placed uniformly.",
        ),
        "response_lengths": (
            _histograms(responses, "rows", (0, max(max(values) for values in responses.values()) + 1)),
            "Lengths of the chosen and the rejected answers; far apart, they are a shortcut to learn.",
        ),
    }
    if next(source.pass_rates(), None):
        pictures["pass_rates"] = (_pass_rates(source), f"Mean share of right answers by hops, of {whose}.")
    if reasons := drop_reasons(source.stages):
        pictures["drop_reasons"] = (_bars(reasons), "What was left out on the way, and why.")
    return pictures


def drop_reasons(stages: dict) -> dict[str, int]:
    """Count what was dropped where, by the manifest; nothing for a data file, which does not say."""
    counts = {name: stage.get("counts", {}) for name, stage in stages.items()}
    documents, asked, contexts = (counts.get(name, {}) for name in ("documents", "filter", "contexts"))
    skipped = documents.get("skipped", {}) | {"repeated passages": documents.get("duplicates")}
    reasons = {f"documents: {name}": n for name, n in skipped.items() if n}
    reasons |= {f"asked: {name}": n for name, n in asked.get("dropped", {}).items() if n}
    reasons |= {f"question: {name}": n for name, n in contexts.get("dropped", {}).items()}
    select = stages.get("select", {}).get("counts", {})
    for side in ("short", "long"):
        for kind in ("questions", "answers"):
            dropped = select.get(side, {}).get(f"dropped_{kind}", {})
            reasons |= {f"{kind[:-1]}, {side}: {name}": n for name, n in dropped.items() if n}
    return reasons


def _histograms(series: dict[str, list], y: str, limits: tuple | None = None, weight: float = 1) -> Figure:
    """One panel per series, side by side, with the name below."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(1, len(series)), series.items(), strict=True):
        axes.hist(values, bins=20, range=limits, weights=[weight] * len(values))
        axes.set(xlabel=name, ylabel=y)
    return figure


def _pass_rates(source: Source) -> Figure:
    rates: dict[str, dict[str, list[float]]] = {}
    for hops, side, rate in source.pass_rates():
        rates.setdefault(side, {}).setdefault("unknown" if hops is None else str(hops), []).append(rate)
    names = sorted({name for by_hops in rates.values() for name in by_hops})
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for i, (side, by_hops) in enumerate(rates.items()):
        means = [sum(by_hops.get(name, ())) / max(1, len(by_hops.get(name, ()))) for name in names]
        bars = axes.bar([x + 0.4 * i for x in range(len(names))], means, 0.38, label=side)
        axes.bar_label(bars, [f"n={len(by_hops.get(name, ()))}" for name in names], fontsize=8)
    axes.set(xlabel="hops", ylabel="share of right answers", ylim=(0, 1), xticks=[x + 0.2 for x in range(len(names))])
    axes.set_xticklabels(names)
    axes.legend()
    return figure


def _bars(counts: dict[str, int]) -> Figure:
    figure = Figure(figsize=(6.4, 1.2 + 0.28 * len(counts)), layout="constrained")
    axes = figure.add_subplot()
    axes.bar_label(axes.barh(list(counts), list(counts.values())), fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    return figure


def agreement(counts: dict) -> str:
    """Say how often the judge and the rule of gold answers agree, by the counts of the stage `judge`."""
    return (
        f"agree on {counts['share']:.1%} of {counts['answers']} answers: {counts['both_right']} right for both, "
        f"{counts['both_wrong']} wrong for both, {counts['only_model']} right for the judge alone, "
        f"{counts['only_rule']} for the gold answers alone"
    )


def summary(source: Source, statistics: Statistics) -> dict[str, str]:
    """Return the most important numbers, by name."""

    def mean(part: str) -> float:
        return sum(statistics.tokens[part]) / len(statistics.tokens[part])

    facts = {"rows": ", ".join(f"{n} {split}" for split, n in sorted(statistics.splits.items()))}
    facts |= {f"{part} {statistics.unit}, mean": f"{mean(part):.1f}" for part in statistics.tokens}
    facts["compression rate short / long"] = f"{mean('short') / mean('long'):.3f}"
    for stage in ("contexts", "sample"):
        facts |= {f"`{key}`": str(value) for key, value in source.stages.get(stage, {}).get("settings", {}).items()}
    for side, counts in source.stages.get("judge", {}).get("counts", {}).items():
        if agreed := counts.get("agreement_with_rule"):
            facts[f"judge and gold answers, {side}"] = agreement(agreed)
    if select := source.stages.get("select"):
        facts["selection"] = select["counts"]["statement"]
    return facts
