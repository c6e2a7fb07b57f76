"""Make tables and plots of the lab's results, with 95 % intervals over seeds (Student's t).

    python scripts/lab/report.py                # saves/lab/report: tables.md, runs.json and the pictures
    python scripts/lab/report.py --docs         # also into docs/lab.md, between its markers, and docs/lab/

With --docs the runs of docs/lab/runs.json stay that were not made again and whose recipe, base, rows and questions are
those of today. A method stands with the learning rate that was chosen from the sweep, everything else with the rate of
all.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

import matplotlib
from arms import arms, chosen_rate, recipe, table
from lab_rows import COMPRESSED, SWEEP_SEED
from recall import LONG, MEASURED, ROOT, SHORT
from run import base_of, done, key_of, task_of
from scipy import stats
from two_hop import LENGTHS

from solopo_plugin.collapse import collapse
from solopo_plugin.qa.files import replacing, write_json

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

DOCS = ROOT / "docs/lab.md"
RUNS = DOCS.with_suffix("") / "runs.json"
RATE = table("recall")["base"]["learning_rate"]  # of all arms but those for which the sweep chose another
DRAWN = ("dpo_short", "dpo_long", "dpo_expand_long", "solo_dpo", "solo_dpo_detached", "orpo_short", "orpo_long",
         "orpo_expand_long", "solo_orpo", "solo_orpo_alpha_0.3", "solo_orpo_detached", "longpo")  # fmt: skip
DIFFERENCES = (  # first, second: what the paper or the question behind it says of first against second
    ("solo_dpo", "dpo_short", "SoLo against PO on the short pair"),
    ("solo_orpo", "orpo_short", "the same"),
    ("solo_orpo_alpha_0.3", "orpo_short", "the same, alpha 0.3"),
    ("solo_dpo", "dpo_long", "SoLo against PO on pairs sampled from the base on the long context"),
    ("solo_orpo", "orpo_long", "the same"),
    ("solo_orpo_alpha_0.3", "orpo_long", "the same, alpha 0.3"),
    ("solo_dpo", "dpo_expand_long", "decoupled against the short pair on the long context"),
    ("solo_orpo", "orpo_expand_long", "the same"),
    ("solo_orpo_alpha_0.3", "orpo_expand_long", "the same, alpha 0.3"),
    ("solo_orpo_detached", "orpo_expand_long", "the same, detached"),
    ("solo_orpo_detached", "orpo_long", "detached against pairs sampled from the base on the long context"),
    ("solo_dpo", "longpo", "SoLo against LongPO"),
    ("solo_orpo_detached", "longpo", "the same, detached"),
    ("solo_dpo", "solo_dpo_both", "chosen-only against both, alpha 3"),
    ("solo_dpo_alpha_1", "solo_dpo_alpha_1_both", "the same, alpha 1"),
    ("solo_orpo_alpha_0.3", "solo_orpo_alpha_0.3_both", "the same, alpha 0.3"),
    ("solo_orpo", "solo_orpo_kl", "RA against KL, alpha 1"),
    ("solo_orpo_alpha_0.3", "solo_orpo_alpha_0.3_kl", "the same, alpha 0.3"),
    ("solo_orpo_detached", "solo_orpo_kl_detached", "the same, alpha 1, both detached"),
    ("solo_dpo_detached", "solo_dpo", "detached against the paper's form"),
    ("solo_orpo_detached", "solo_orpo", "the same"),
    ("solo_simpo_detached", "solo_simpo", "the same"),
    ("solo_orpo_detached", "solo_orpo_alpha_0.3", "the same, against alpha 0.3"),
    ("solo_dpo_drop", "solo_dpo", "one-sided against absolute"),
    ("solo_orpo_drop", "solo_orpo", "the same, alpha 1"),
    ("solo_orpo_alpha_0.3_drop", "solo_orpo_alpha_0.3", "the same, alpha 0.3"),
    ("solo_dpo_drop_detached", "solo_dpo_detached", "the same, detached"),
    ("solo_orpo_drop_detached", "solo_orpo_detached", "the same, detached"),
    ("solo_orpo_lost", "solo_orpo_alpha_0.3", "a quarter of the short contexts without the evidence"),
    ("solo_orpo_lost_drop", "solo_orpo_alpha_0.3_drop", "the same, one-sided"),
    ("solo_orpo_lost_detached", "solo_orpo_detached", "the same, detached"),
    ("solo_orpo_lost_drop_detached", "solo_orpo_drop_detached", "the same, one-sided and detached"),
    ("orpo_short_lost", "orpo_short", "the same, ORPO on the short pair"),
    ("solo_orpo_rejected_2_detached", "solo_orpo_detached", "two rejected answers against one, both detached"),
    ("solo_orpo_rejected_4_detached", "solo_orpo_detached", "four, the same"),
    ("distill_forward", "solo_orpo", "self-distillation alone against SoLo-ORPO, the paper's form"),
    ("distill_forward", "solo_orpo_detached", "the same, detached"),
    ("distill_reverse", "distill_forward", "reverse against forward KL"),
    ("distill_jsd", "distill_forward", "Jensen-Shannon against forward KL"),
    ("distill_forward_anchor_1", "distill_forward", "with an anchor of 1 against without"),
    ("solo_orpo_distill", "solo_orpo_detached", "ORPO with distillation against detached SoLo-ORPO"),
    ("solo_orpo_distill_reverse", "solo_orpo_distill", "reverse against forward KL, with ORPO"),
    ("solo_orpo_distill", "distill_forward", "ORPO with distillation against distillation alone"),
    ("solo_orpo_detached_anchor_0.1", "solo_orpo_detached", "with an anchor of 0.1 against without, both detached"),
    ("solo_orpo_detached_anchor_1", "solo_orpo_detached", "the same, an anchor of 1"),
    ("solo_dpo_ftx", "solo_dpo", "with NLL of the short chosen response against without"),
)
# of a result, in runs.json, where it has them
SHIPPED = ("arm", "rate", "seed", "key", "accuracy", "marks", "look", "cpu_seconds")
WITHIN = 0.03  # ours; near the top, about what 256 questions cannot tell apart. Seeds differ by more


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % interval; nan for a single value, which has none."""
    n = len(values)
    half = stats.t.ppf(0.975, n - 1) * statistics.stdev(values) / n**0.5 if n > 1 else float("nan")
    return statistics.mean(values), float(half)


def read(
    source: Path, task: str, shipped: Path | None = None, base: str | None = None
) -> dict[tuple[str, float], dict[int, dict]]:
    """Read results, (arm, rate) -> seed -> result, from a folder of them or from runs.json, which has no logs.

    A result of another recipe, base, rows or questions than those of today is left out and named.

    Args:
        source: The folder or file.
        task: Whose results.
        shipped: A runs.json whose runs stand where the folder has none.
        base: Its name in the file, of a task that has several.
    """
    settings = {} if source.suffix == ".json" else task_of(task).settings()  # which need the task's files
    found, stale = {}, []

    def of_today(run: dict) -> bool:
        return run["arm"] in arms(task) and run["key"] == key_now(run, task, settings)

    if source.suffix == ".json":
        runs = from_file(source, task, base)
    else:
        runs = [run for run in from_file(shipped, task, base) if of_today(run)] if shipped else []
        for run in from_folder(source):
            if of_today(run):
                runs.append(short_form(run, task))
            else:
                stale.append(run["arm"])
    if stale:
        names = ", ".join(sorted(set(stale)))
        print(f"{len(stale)} results are of other settings and left out: {names}", file=sys.stderr)
    for run in runs:
        found.setdefault((run["arm"], run["rate"]), {})[run["seed"]] = run
    return found


def from_folder(folder: Path) -> list[dict]:
    """Return the results of a folder, in the order of their names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def from_file(path: Path, task: str, base: str | None = None) -> list[dict]:
    """Return a task's runs of a runs.json, without the run that measured the base."""
    runs = json.loads(path.read_text(encoding="utf-8"))
    return [run for run in runs if (run["task"], run.get("base")) == (task, base) and run["arm"] != "base"]


def measured_base(source: Path, task: str, base: str | None = None) -> dict:
    """Read how the base does on the arms' questions, from beside a folder of results or from runs.json; else {}."""
    if source.suffix == ".json":
        runs = json.loads(source.read_text(encoding="utf-8"))
        wanted = (task, base, "base")
        return next((run for run in runs if (run["task"], run.get("base"), run["arm"]) == wanted), {})
    job = base_of(task, source.parent)
    return json.loads(Path(job["result"]).read_text(encoding="utf-8")) if done(job) else {}


def key_now(run: dict, task: str, settings: dict) -> str:
    """Return the key that a run would have today."""
    return key_of(settings, recipe(task, run["arm"]) | {"learning_rate": run["rate"], "seed": run["seed"]})


def short_form(run: dict, task: str) -> dict:
    """Keep what tables need, and the log for the plots."""
    keys = run["recipe"]
    aligned = keys.get("solopo_objective") != "longpo" and keys["stage"] == "solopo"
    watched = aligned and not keys.get("solopo_detach_short", False)
    kept = {key: run[key] for key in (*SHIPPED, "by_step", "log") if key in run}
    return {"task": task, **kept, "warned": watched and warned(run["log"])}


def warned(log: list[dict]) -> bool:
    """Tell whether the trainer, which looks after every log, has warned at any."""
    return any(collapse(log[: i + 1]) is not None for i in range(len(log)))


class Results:
    """Hold a task's runs by arm and rate; what the tables show is at an arm's own rate and not of the sweep's seed."""

    def __init__(self, source: Path, task: str = "recall", shipped: Path | None = None, base_name: str | None = None):
        self.all, self.task = read(source, task, shipped, base_name), task
        self.measured = measured_base(source, task, base_name) or (
            measured_base(shipped, task, base_name) if shipped else {}
        )
        self.base = {int(length): share for length, share in self.measured.get("accuracy", {}).items()}
        self.unit = "pairs" if task == "recall" else "tokens"
        self.lengths = MEASURED if task == "recall" else table(task).get("lengths", LENGTHS)
        self.ends = (SHORT, LONG) if task == "recall" else (self.lengths[0], self.lengths[-1])
        self.names = [name for name in arms(task) if self.runs(name)]

    def runs(self, name: str, rate: float | None = None) -> dict[int, dict]:
        """Return an arm's runs by seed, at this rate or at the arm's own."""
        runs = self.all.get((name, rate or chosen_rate(name, self.task)), {})
        return {seed: run for seed, run in runs.items() if seed != SWEEP_SEED}

    def shipped(self) -> list[dict]:
        """Return what tables are made of, for runs.json."""
        base = [{"task": self.task, "arm": "base", "accuracy": self.base}] if self.base else []
        runs = [run for runs in self.all.values() for run in runs.values()]
        return base + [{key: run[key] for key in ("task", *SHIPPED, "warned") if key in run} for run in runs]

    def accuracy(self, name: str, length: int, rate: float | None = None) -> tuple[float, float]:
        """Return an arm's mean accuracy at a length, and its interval."""
        return interval([run["accuracy"][str(length)] for run in self.runs(name, rate).values()])


def cell(mean: float, half: float) -> str:
    """Write a mean with its interval, where it has one."""
    return f"{mean:.3f}" + (f" ± {half:.3f}" if half == half else "")


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """Return a table as Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def accuracies(results: Results, names: list[str], rate: float | None = None) -> str:
    """Table accuracy by length, its mean over seeds with an interval, and in how many runs the trainer warned."""
    base = ["base", *(f"{share:.3f}" for share in results.base.values()), "", "", "", ""]
    lines = [base] if results.base else []
    for name in names:
        if runs := list(results.runs(name, rate).values()):
            cost = statistics.mean(run["cpu_seconds"] for run in runs)
            cells = [cell(*results.accuracy(name, length, rate)) for length in results.lengths]
            told = sum(run["warned"] for run in runs)
            lines.append([name, *cells, f"{runs[0]['rate']:g}", str(len(runs)), f"{cost:.0f}", str(told or "")])
    columns = [f"{n} {results.unit}" for n in results.lengths]
    return markdown(["arm", *columns, "rate", "runs", "CPU s", "warned"], lines)


def best_rate(by_rate: dict[float, dict], ends: tuple[int, int] = (SHORT, LONG)) -> float:
    """Return the rate with the best mean accuracy at both ends; RATE where it is within WITHIN of the best."""
    means = {rate: sum(run["accuracy"][str(n)] for n in ends) / 2 for rate, run in by_rate.items()}
    best = max(means, key=means.get)
    return RATE if means[best] - means.get(RATE, -1) <= WITHIN else best


def sweep(results: Results) -> str:
    """Table accuracy at both ends by learning rate, the chosen rate in bold."""
    task, ends, of_sweep = results.task, results.ends, table(results.task)["sweep"]
    columns, lines = sorted({rate for rates in of_sweep["rates"].values() for rate in rates}), []
    for name, rates in of_sweep["rates"].items():
        found = {rate: results.all.get((name, rate), {}).get(of_sweep["seed"]) for rate in rates}
        by_rate = {rate: run for rate, run in found.items() if run}
        chosen = chosen_rate(name, task)
        if len(by_rate) == len(found) and (best := best_rate(by_rate, ends)) != chosen:
            print(f"{task}, {name}: the sweep gives {best:g}, the table of arms has {chosen:g}", file=sys.stderr)
        cells = {rate: " / ".join(f"{run['accuracy'][str(n)]:.3f}" for n in ends) for rate, run in by_rate.items()}
        marked = {rate: f"**{text}**" if rate == chosen else text for rate, text in cells.items()}
        lines.append([name, *(marked.get(rate, "") for rate in columns)])
    return markdown(["method", *(f"{rate:g}" for rate in columns)], lines)


def differences(results: Results) -> str:
    """Table differences by seed, since arms share its rows; forms of SoLo at one rate, methods each at its own."""
    lines = []
    for first, second, what in DIFFERENCES:
        rate = RATE if results.task == "recall" and all(name.startswith("solo_") for name in (first, second)) else None
        pair = [results.runs(first, rate), results.runs(second, rate)]
        seeds = sorted(pair[0].keys() & pair[1].keys())
        if seeds:
            gains = [
                cell(*interval([pair[0][s]["accuracy"][str(n)] - pair[1][s]["accuracy"][str(n)] for s in seeds]))
                for n in results.ends
            ]
            lines.append([f"{first} - {second}", what, *gains])
    return markdown(["difference", "what", *(f"{n} {results.unit}" for n in results.ends)], lines)


def tables(recall: Results, two_hop: Results) -> dict[str, str]:
    """Return all tables: name of the marker in docs/lab.md -> Markdown."""
    of_recall = table("recall")
    solos = [name for name in of_recall["arms"] if name.startswith("solo_")]
    return {
        "sweep": sweep(recall),
        "methods": accuracies(recall, [name for name in of_recall["sweep"]["rates"] if name in of_recall["arms"]]),
        "ablations": accuracies(recall, solos, RATE),
        "beyond": accuracies(recall, ["orpo_short_lost", *of_recall["beyond"]]),
        "differences": differences(recall),
        "two_hop_sweep": sweep(two_hop),
        "two_hop": accuracies(two_hop, list(arms("two_hop"))),
        "two_hop_differences": differences(two_hop),
    }


# ---- plots


def save(figure, path: Path) -> None:
    """Write a figure as PNG and close it."""
    figure.savefig(path, dpi=110)
    plt.close(figure)


def by_length(results: Results, path: Path) -> None:
    """Draw accuracy by length, a panel for DPO's and one for ORPO's arms."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained", sharey=True)
    for place, loss in zip(axes, ("dpo", "orpo"), strict=True):
        place.plot(results.base.keys(), results.base.values(), "k--", label="base")
        for name in (n for n in DRAWN if n in results.names and (loss in n.split("_") or n == "longpo")):
            points = [results.accuracy(name, n) for n in results.lengths]
            place.errorbar(results.lengths, [p[0] for p in points], [p[1] for p in points], capsize=2, label=name)
        place.set(xlabel=f"{results.unit} in the context", ylabel="accuracy", ylim=(-0.02, 1.02))
        place.legend(fontsize="small")
    save(figure, path)


def bars(results: Results, path: Path) -> None:
    """Draw every arm's accuracy at both ends."""
    names = results.names
    figure, axes = plt.subplots(figsize=(9, 0.27 * len(names) + 1.2), layout="constrained")
    for offset, (length, color) in enumerate(zip(results.ends, ("tab:gray", "tab:blue"), strict=True)):
        points, label = [results.accuracy(name, length) for name in names], f"{length} {results.unit}"
        places = [i + 0.4 * offset for i in range(len(points))]
        axes.barh(places, [p[0] for p in points], 0.4, xerr=[p[1] for p in points], color=color, label=label)
    rates = {name: chosen_rate(name, results.task) for name in names}
    labels = [name + ("" if rate == RATE else f" ({rate:g})") for name, rate in rates.items()]
    axes.set(yticks=[i + 0.2 for i in range(len(names))], yticklabels=labels, xlabel="accuracy", xlim=(0, 1.05))
    axes.invert_yaxis()
    figure.legend(loc="outside upper right", ncols=2)
    save(figure, path)


def against(place, results: Results, arms_by_x: dict[float, str], label: str, **style) -> None:
    """Draw accuracy at both ends of the arms that have been run, against what they differ in."""
    there = {x: name for x, name in arms_by_x.items() if results.runs(name, RATE)}
    for pairs, line in ((SHORT, ":"), (LONG, "-")):
        points = [results.accuracy(name, pairs, RATE) for name in there.values()]
        place.errorbar(list(there), [p[0] for p in points], [p[1] for p in points], fmt=f"o{line}", capsize=2,
                       label=f"{label}, {pairs} pairs", **style)  # fmt: skip


def alphas(loss: str, ending: str = "") -> dict[float, str]:
    """Map alpha to the arm of SoLo with this loss that has it; `ending`: of another form than the paper's."""
    named = re.compile(rf"solo_{loss}(_alpha_[\d.]+)?{ending}")
    return dict(sorted((keys["solopo_alpha"], name) for name, keys in arms().items() if named.fullmatch(name)))


def alpha_curve(results: Results, path: Path) -> None:
    """Draw accuracy by alpha, of the paper's form and detached."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for loss, color in (("orpo", "tab:orange"), ("dpo", "tab:blue"), ("simpo", "tab:green")):
        against(axes, results, alphas(loss), f"SoLo-{loss.upper()}", color=color)
        if loss in ("dpo", "orpo"):
            against(axes, results, alphas(loss, "_detached"), f"SoLo-{loss.upper()} detached", color=color, alpha=0.4)
    axes.set(xscale="log", xlabel="alpha", ylabel="accuracy", ylim=(-0.02, 1.02))
    axes.legend(fontsize="small")
    save(figure, path)


def compression(results: Results, path: Path) -> None:
    """Draw accuracy by the short context's share of the long one."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    by_pairs = {n: f"solo_orpo_short_{n}" for n in COMPRESSED} | {SHORT: "solo_orpo_alpha_0.3"}
    against(axes, results, {100 * n / LONG: by_pairs[n] for n in sorted(by_pairs)}, "SoLo-ORPO, alpha 0.3")
    axes.set(xlabel=f"compression rate: pairs of the short context / {LONG}, %", ylabel="accuracy", ylim=(-0.02, 1.02))
    axes.legend(fontsize="small")
    save(figure, path)


def curve(runs: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Return steps and means over seeds of a logged value; empty where the arm does not log it."""
    logged = [{entry["step"]: entry[key] for entry in run["log"] if key in entry} for run in runs]
    return list(logged[0]), [statistics.mean(log[step] for log in logged) for step in logged[0]]


def has_logs(results: Results) -> bool:
    """Tell whether all runs that `dynamics` draws have their log, which runs.json does not."""
    return all("log" in run for name in DRAWN for run in results.runs(name).values())


def dynamics(results: Results, path: Path) -> None:
    """Draw training, one row a loss: margin, rejected log-prob, reward gap, short reward, accuracy at both ends."""
    logged = ("rewards/margins", "logps/rejected", "solopo/reward_gap", "solopo/reward_short")
    titles = (*logged, *(f"accuracy, {length} {results.unit}" for length in results.ends))
    figure, axes = plt.subplots(2, 6, figsize=(24, 7.5), layout="constrained")
    for line, loss in zip(axes, ("dpo", "orpo"), strict=True):
        for name in (n for n in DRAWN if n in results.names and loss in n.split("_")):
            runs = list(results.runs(name).values())
            for place, key in zip(line, logged, strict=False):
                place.plot(*curve(runs, key), label=name)
            for place, length in zip(line[4:], results.ends, strict=True):
                steps = list(runs[0]["by_step"])
                means = [statistics.mean(run["by_step"][s][str(length)] for run in runs) for s in steps]
                place.plot([0, *map(int, steps)], [results.base.get(length, float("nan")), *means], label=name)
        for place, title in zip(line, titles, strict=True):
            place.set(title=title, xlabel="step")
        if line[-1].lines:
            line[-1].legend(fontsize="x-small")
    save(figure, path)


PLOTS = {"accuracy_by_length": by_length, "methods": bars, "alpha": alpha_curve, "compression": compression,
         "dynamics": dynamics}  # fmt: skip
OF_BOTH = ("accuracy_by_length", "methods", "dynamics")  # drawn of the second task too


# ---- where they go


def filled(page: str, parts: dict[str, str]) -> str:
    """Return the page with each part between `<!-- NAME -->` and `<!-- /NAME -->`."""
    for name, text in parts.items():
        mark = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not mark.search(page):
            raise ValueError(f"the page has no place for `{name}`: <!-- {name} --> and <!-- /{name} --> are missing.")
        page = mark.sub(lambda found, text=text: found[1] + "\n" + text + "\n" + found[2], page)
    return page


def retired() -> list[dict]:
    """Return the shipped runs of what the lab no longer has, which nobody can run again."""
    return [run for run in json.loads(RUNS.read_text("utf-8")) if run["arm"] not in {"base", *arms(run["task"])}]


def place(run: dict) -> tuple:
    """Return by what runs.json is sorted: the base of a task first, then its arms by name."""
    return run["task"], run["arm"] != "base", run["arm"], run.get("rate"), run.get("seed")


def write(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as file:
        file.write(text.encode())


def main(words: list[str] | None = None) -> int:
    """Write tables, runs.json and plots; with --docs also into docs/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "saves/lab/results")
    parser.add_argument("--output", type=Path, default=ROOT / "saves/lab/report")
    parser.add_argument("--docs", action="store_true", help="fill docs/lab.md and draw into docs/lab")
    args = parser.parse_args(words)
    shipped = RUNS if args.docs else None
    recall = Results(args.results, "recall", shipped)
    two_hop = Results(args.results.parent / "two_hop/results", "two_hop", shipped)
    if not recall.all and not two_hop.all:
        sys.exit(f"{args.results} holds no results; run scripts/lab/run.py first.")
    parts = tables(recall, two_hop)
    runs = recall.shipped() + two_hop.shipped()
    for folder, more in ((args.output, []), *([(RUNS.parent, retired())] if args.docs else [])):
        folder.mkdir(parents=True, exist_ok=True)
        for name, draw in PLOTS.items():
            for results, beginning in ((recall, ""), (two_hop, "two_hop_")):
                if results.names and (not beginning or name in OF_BOTH) and (draw != dynamics or has_logs(results)):
                    draw(results, folder / f"{beginning}{name}.png")
        write_json(folder / "runs.json", sorted(runs + more, key=place))
    write(args.output / "tables.md", "\n".join(f"## {name}\n\n{text}" for name, text in parts.items()))
    if args.docs:
        write(DOCS, filled(DOCS.read_text(encoding="utf-8"), parts))
    shown = {"methods": recall.names, "two_hop": two_hop.names, "sweep": recall.all}
    print(f"{parts[next(name for name, there in shown.items() if there)]}\ntables and plots  {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
