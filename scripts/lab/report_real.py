"""Make tables and a plot of the lab's real model, with 95 % intervals over questions and seeds.

    python scripts/lab/report_real.py                # saves/lab/report: real.md, real.json and pictures
    python scripts/lab/report_real.py --docs         # also into docs/lab.md, between its markers, and docs/lab/
    python scripts/lab/report_real.py --docs --saves saves/gpu/real.tgz     # of what scripts/gpu/real.sh brought home

A test question is one paragraph's, and every model gets the same ones, so that two models are compared question by
question. What differs by chance is which questions were asked and the seed of the training; both are in an interval:
the half widths over questions (normal) and over seeds (Student's t) are added as squares. With one seed it is over
questions alone. The model, its warm-up and the rows are the same for all seeds.

With --docs runs of the same base, rows and recipe that stand in docs/lab/real.json count like those of the folder. Runs
on another base, that is on other weights, keep lines of their own: no mean is over two bases.
"""

import argparse
import json
import shutil
import statistics
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import real
from arms import chosen_rate, table
from report import DOCS, ROOT, Results, cell, filled, interval, markdown, plt, save, sweep, write
from run import SIZES, base_of, done, task_of

from solopo_plugin.probe import inside
from solopo_plugin.qa.files import DataError, write_json

RUNS = DOCS.with_suffix("") / "real.json"
SIDES = ("short", "long", "long - short")  # of a measure of what models look at
NORMAL = 1.96  # half widths of 95 %, in standard errors
DIFFERENCES = (  # first, second: what is asked
    ("solo_orpo_detached", "base", "what SoLo gives"),
    ("solo_dpo_detached", "base", "the same"),
    ("solo_orpo", "base", "the paper's form"),
    ("solo_orpo_detached", "sft_more", "against the warm-up continued for as many tokens"),
    ("solo_orpo_detached", "orpo_short", "against PO on the short pair"),
    ("solo_orpo_detached", "sft_long", "against SFT on the base's own right long answers"),
    ("solo_orpo_detached", "orpo_long", "against PO on pairs sampled on the long context"),
    ("solo_orpo_detached", "orpo_expand_long", "against the short pair on the long context"),
    ("solo_orpo_detached", "longpo", "against LongPO"),
    ("solo_orpo_detached", "solo_orpo", "detached against the paper's form"),
    ("solo_dpo_detached", "solo_dpo", "the same"),
    ("solo_orpo_distill", "solo_orpo_detached", "ORPO with self-distillation against detached SoLo-ORPO"),
)


class Marked(Results):
    """Hold a size's runs on one base with right and wrong of every question; the base is a run like another."""

    def __init__(self, source: Path, task: str, shipped: Path | None = None, base_name: str | None = None):
        super().__init__(source, task, shipped, base_name)
        self.base_name, self.base_marks = base_name, self.measured.get("marks", {})

    def shipped(self) -> list[dict]:
        """Return what tables are made of, for real.json."""
        runs = super().shipped()
        marks = {"marks": self.base_marks}
        return [run | {"base": self.base_name} | (marks if run["arm"] == "base" else {}) for run in runs]

    def marks(self, name: str, length: int) -> dict[int, list[int]]:
        """Return right and wrong by question, for each seed of an arm; of the base for every seed the same."""
        if name == "base":
            seeds = {seed for runs in self.all.values() for seed in runs} or {0}
            return {seed: [*map(int, self.base_marks[str(length)])] for seed in seeds} if self.base_marks else {}
        return {seed: [*map(int, run["marks"][str(length)])] for seed, run in self.runs(name).items()}


def over_both(by_seed: list[list[float]]) -> tuple[float, float]:
    """Return the mean of values by seed and question, and half the width of its 95 % interval over both."""
    by_question = [statistics.mean(values) for values in zip(*by_seed, strict=True)]
    questions = NORMAL * statistics.stdev(by_question) / len(by_question) ** 0.5
    mean, seeds = interval([statistics.mean(values) for values in by_seed])
    return mean, (questions**2 + (seeds**2 if seeds == seeds else 0)) ** 0.5


def difference(results: Marked, first: str, second: str, length: int) -> tuple[float, float] | None:
    """Return how much more an arm answers right than another, of the same questions and seeds, with its interval."""
    a, b = results.marks(first, length), results.marks(second, length)
    pairs = [[x - y for x, y in zip(a[seed], b[seed], strict=True)] for seed in sorted(a.keys() & b.keys())]
    return over_both(pairs) if pairs else None


def bases_in(path: Path, task: str) -> list[Marked]:
    """Return a size's runs of a real.json, base by base."""
    runs = [run for run in json.loads(path.read_text(encoding="utf-8")) if run["task"] == task]
    return [Marked(path, task, base_name=name) for name in dict.fromkeys(run["base"] for run in runs)]


def table_of(head: list[str], by_base: list[list[list[str]]]) -> str:
    """Return the lines of all bases as a table, with the number of the base before each where there are several."""
    if len(by_base) == 1:
        return markdown(head, by_base[0])
    return markdown(["base no.", *head], [[str(i), *line] for i, lines in enumerate(by_base, 1) for line in lines])


def accuracies(results: Marked) -> list[list[str]]:
    """Return the lines of the table of accuracies, the base's and every arm's."""
    lines = []
    for name in ("base", *results.names):
        if not (marks := {length: results.marks(name, length) for length in results.lengths})[results.lengths[0]]:
            continue
        seeds = {length: [by_seed[seed] for seed in by_seed] for length, by_seed in marks.items()}
        if name == "base":  # one run, whatever the number of seeds
            seeds = {length: values[:1] for length, values in seeds.items()}
        runs = list(results.runs(name).values()) if name != "base" else []
        known = [run["cpu_seconds"] for run in runs if run["cpu_seconds"] is not None]
        cost = f"{statistics.mean(known):.0f}" if known else ""
        rate = f"{chosen_rate(name, results.task):g}" if runs else ""
        cells = [cell(*over_both(values)) for values in seeds.values()]
        lines.append([name, *cells, rate, str(len(runs) or ""), cost])
    return lines


def differences(results: Marked) -> list[list[str]]:
    """Return the lines of the differences that the questions are about, of arms that have been run."""
    lines = []
    for first, second, what in DIFFERENCES:
        found = [difference(results, first, second, length) for length in results.lengths]
        if None not in found:
            lines.append([f"{first} - {second}", what, *(cell(*pair) for pair in found)])
    return lines


def looked(results: Marked) -> list[dict]:
    """Return `inside.summarise` of what models look at that read gold answers: arms, the base, the first arm's lead.

    An arm's value of a question is the mean over its seeds; intervals are over questions.
    """
    looks = {name: [run["look"] for run in results.runs(name).values() if "look" in run] for name in results.names}
    found = {name: seen for name, seen in looks.items() if seen}
    first, *others = [name for name in table(results.task)["look"]["arms"] if name in found] or [None]
    base = next((look for look in found.get(first, ()) if "base" in next(iter(look.values()))), None)
    if base is None:  # of the first seed's run
        return []
    values = {
        measure: {"base": models["base"]}
        | {name: mean_of([look[measure][name] for look in seen]) for name, seen in found.items()}
        for measure, models in base.items()
    }
    return inside.summarise(values, [(n, "base") for n in (first, *others)] + [(first, n) for n in others])


def mean_of(looks: list[dict[str, list]]) -> dict[str, list]:
    """Return the mean over runs of what they see of every question, by side; None stays None, it is the question's."""
    by_side = {side: zip(*(look[side] for look in looks), strict=True) for side in looks[0]}
    return {side: [None if None in seen else statistics.mean(seen) for seen in rows] for side, rows in by_side.items()}


def insides(results: Marked) -> list[list[str]]:
    """Return the lines of the table of what models look at in both contexts."""
    found = looked(results)
    by_line = {(line["measure"], line["model"], line["side"]): line for line in found}
    measures, models = (list(dict.fromkeys(line[n] for line in found)) for n in ("measure", "model"))
    rows = max((line["n"] for line in found), default=0)  # log-probs are of all

    def shown(line: dict | None) -> str:
        fewer = f", n={line['n']}" if line and line["n"] != rows else ""
        return f"{line['mean']:.4f} ({line['low']:.4f} to {line['high']:.4f}){fewer}" if line else ""

    return [
        [measure, model, *(shown(by_line.get((measure, model, side))) for side in SIDES)]
        for measure in measures
        for model in models
    ]


def tables(bases: list[Marked]) -> dict[str, str]:
    """Return a size's tables: name of the marker in docs/lab.md -> Markdown."""
    name = bases[0].task.replace(":", "_")
    lengths = [f"{n} tokens" for n in bases[0].lengths]
    parts = {
        name: table_of(["arm", *lengths, "rate", "runs", "seconds"], [*map(accuracies, bases)]),
        f"{name}_differences": table_of(["difference", "what", *lengths], [*map(differences, bases)]),
    }
    seen = [*map(insides, bases)]
    parts[f"{name}_inside"] = table_of(["measure", "model", *SIDES], seen) if any(seen) else ""
    return parts | ({f"{name}_sweep": sweep(bases[-1])} if bases[0].task == "real" else {})


def draw(bases: list[Marked], path: Path) -> None:
    """Draw accuracy by length: an arm's colour is the same on all bases, the bases' own are black and dashed."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(n for results in bases for n in results.names))}
    for number, results in enumerate(bases):
        for name in ("base", *results.names):
            by_length = [list(results.marks(name, n).values()) for n in results.lengths]
            if not all(by_length):
                continue
            points = [over_both(values[:1] if name == "base" else values) for values in by_length]
            style = {"color": colours.get(name, "black"), "linestyle": "-" if name in colours else "--"}
            style |= {"marker": "os^Dv"[number % 5], "label": name}
            if len(bases) > 1:
                style["label"] += f", base {number + 1}"
            means, halves = zip(*points, strict=True)
            axes.errorbar(results.lengths, means, halves, capsize=2, **style)
    axes.set(xlabel="tokens in the prompt", ylabel="questions answered right", ylim=(0, None))
    axes.legend(fontsize="small")
    save(figure, path)


@contextmanager
def opened(saves: Path) -> Iterator[Path]:
    """Yield a folder of runs; an archive of scripts/gpu/real.sh, which has neither splits nor weights, is unpacked."""
    if not saves.is_file():
        yield saves
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with tarfile.open(saves) as archive:
                archive.extractall(folder, filter="data")
        except (tarfile.TarError, EOFError, zlib.error) as error:
            sys.exit(f"{saves} is no whole archive: {error}; give --saves a folder, or scripts/gpu/real.sh's real.tgz.")
        yield Path(folder, "saves/lab")


def why_not(task: str, folder: Path) -> str | None:
    """Return in a few words why a size's folder cannot be reported; None: its base was measured by today's settings."""
    try:
        return None if done(base_of(task, folder)) else "its base.json is of another base, other questions or settings"
    except DataError as error:
        return str(error)


def main(words: list[str] | None = None) -> int:
    """Write tables, runs and plots of the sizes that have been run; with --docs also into docs/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=Path, default=ROOT / "saves/lab", help="or the archive of scripts/gpu/real.sh")
    parser.add_argument("--output", type=Path, default=ROOT / "saves/lab/report")
    parser.add_argument("--docs", action="store_true", help="fill docs/lab.md and draw into docs/lab")
    args = parser.parse_args(words)
    with opened(args.saves) as real.SAVES:  # where a size's settings are read, too
        return report(args, real.SAVES)


def report(args: argparse.Namespace, saves: Path) -> int:
    """Report what a folder of runs holds."""
    folders = {task: saves / task.replace(":", "_") for task in SIZES}
    refused = {task: why_not(task, at) for task, at in folders.items() if (at / "base.json").is_file()}
    for task, why in refused.items():
        if why:
            print(f"{task} of {args.saves} is left out: {why}", file=sys.stderr)
    if not (there := [task for task, why in refused.items() if why is None]):
        sys.exit(f"{args.saves} holds no base of the real model; run scripts/lab/run.py --task real first.")
    shipped = RUNS if args.docs and RUNS.is_file() else None
    sizes, kept = [], json.loads(RUNS.read_text(encoding="utf-8")) if shipped else []
    for task in there:
        own = Marked(folders[task] / "results", task, shipped, task_of(task).settings()["base"][:8])
        others = bases_in(RUNS, task) if shipped else []
        sizes.append([*(results for results in others if results.base_name != own.base_name), own])
        kept = [run for run in kept if (run["task"], run["base"]) != (task, own.base_name)]
    parts = {name: text for bases in sizes for name, text in tables(bases).items()}
    for folder in (args.output, *([RUNS.parent] if args.docs else [])):
        folder.mkdir(parents=True, exist_ok=True)
        for bases in sizes:
            task = bases[-1].task
            name, look = task.replace(":", "_"), table(task)["look"]["arms"][0]
            draw(bases, folder / f"{name}.png")
            if (picture := saves / name / f"look/{look}/shares_by_layer.png").is_file():
                shutil.copyfile(picture, folder / f"{name}_inside.png")
    runs = [run for bases in sizes for run in bases[-1].shipped()]
    write_json(args.output / "real.json", runs)
    write(args.output / "real.md", "\n".join(f"## {name}\n\n{text}" for name, text in parts.items()))
    if args.docs:
        write_json(RUNS, kept + runs)
        write(DOCS, filled(DOCS.read_text(encoding="utf-8"), parts))
    print("\n".join([*(parts[name] for name in parts if not name.endswith("_sweep")), f"tables  {args.output}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
