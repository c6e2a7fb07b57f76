"""Tables and plots of the lab's results, with 95 % intervals over seeds.

    python scripts/lab/report.py [--results saves/lab/results] [--output saves/lab]

Writes report.md, report.json and accuracy_by_length.png, methods.png, alpha.png, dynamics.png. Where an arm was run
with several learning rates, the one with the best mean accuracy at the long context counts, and the table says which.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import matplotlib
from arms import ALPHAS, PAPER_ALPHA, arms
from recall import BASE, LONG, ROOT, SHORT

from solopo_plugin.synthesis.files import replacing, write_json

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

SHOWN = (SHORT, 32, 64, LONG, 120)
COMPARED = ("dpo_short", "dpo_long", "dpo_expand_long", "solo_dpo", "orpo_short", "orpo_long", "orpo_expand_long",
            "solo_orpo", "solo_orpo_alpha_0.3", "longpo")  # fmt: skip
# 97.5 % quantiles of Student's t by degrees of freedom
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval (Student's t); 0 for a single value, which has none."""
    n = len(values)
    half = T.get(n - 1, 1.96) * statistics.stdev(values) / n**0.5 if n > 1 else 0.0
    return statistics.mean(values), half


def read(folder: Path) -> dict[str, list[dict]]:
    """Results by arm, of each arm's best learning rate."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(result["arm"], {}).setdefault(result["rate"], []).append(result)

    def at_long(runs):
        return statistics.mean(run["accuracy"][str(LONG)] for run in runs)

    return {name: max(found[name].values(), key=at_long) for name in arms() if name in found}


def accuracy(runs: list[dict], pairs: int) -> tuple[float, float]:
    return interval([run["accuracy"][str(pairs)] for run in runs])


def table(results: dict[str, list[dict]]) -> str:
    """Markdown: accuracy by number of pairs, mean and half width of the interval."""
    head = ["arm", *(f"{pairs} pairs" for pairs in SHOWN), "rate", "seeds", "CPU s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    base = json.loads((BASE / "profile.json").read_text())["accuracy"]
    lines.append("| base | " + " | ".join(f"{base[str(p)]:.3f}" for p in SHOWN) + " | | | |")
    for name, runs in results.items():
        form = "{:.3f} ± {:.3f}" if len(runs) > 1 else "{:.3f}"
        cells = [form.format(*accuracy(runs, pairs)) for pairs in SHOWN]
        cost = statistics.mean(run["cpu_seconds"] for run in runs)
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {runs[0]['rate']:g} | {len(runs)} | {cost:.0f} |")
    return "\n".join(lines) + "\n"


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
    plt.close(figure)


def by_length(results, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    base = json.loads((BASE / "profile.json").read_text())["accuracy"]
    axes.plot([int(n) for n in base], base.values(), "k--", label="base")
    for name in (n for n in COMPARED if n in results):
        lengths = [int(n) for n in results[name][0]["accuracy"]]
        points = [accuracy(results[name], n) for n in lengths]
        axes.errorbar(lengths, [p[0] for p in points], [p[1] for p in points], capsize=2, label=name)
    axes.set(xlabel="pairs in the context", ylabel="accuracy", ylim=(-0.02, 1.02))
    axes.legend(fontsize="small")
    save(figure, path)


def bars(results, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(10, 0.3 * len(results) + 1.5), layout="constrained")
    for offset, (pairs, color) in enumerate(((SHORT, "tab:gray"), (LONG, "tab:blue"))):
        points = [accuracy(runs, pairs) for runs in results.values()]
        places = [i + 0.4 * offset for i in range(len(points))]
        axes.barh(places, [p[0] for p in points], 0.4, xerr=[p[1] for p in points], color=color, label=f"{pairs} pairs")
    axes.set(yticks=[i + 0.2 for i in range(len(results))], yticklabels=list(results), xlabel="accuracy")
    axes.invert_yaxis()
    axes.legend()
    save(figure, path)


def alpha_curve(results, path: Path) -> None:
    arm = {a: "solo_orpo" if a == PAPER_ALPHA["orpo"] else f"solo_orpo_alpha_{a:g}" for a in ALPHAS}
    there = {a: results[name] for a, name in arm.items() if name in results}
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for pairs in (SHORT, LONG):
        points = [accuracy(runs, pairs) for runs in there.values()]
        axes.errorbar(list(there), [p[0] for p in points], [p[1] for p in points], fmt="o-", label=f"{pairs} pairs")
    axes.set(xscale="log", xlabel="alpha (SoLo-ORPO)", ylabel="accuracy", ylim=(-0.02, 1.02))
    axes.legend()
    save(figure, path)


def curve(runs: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Steps and means over seeds of a logged value; empty where the arm does not log it."""
    logged = [{entry["step"]: entry[key] for entry in run["log"] if key in entry} for run in runs]
    return list(logged[0]), [statistics.mean(log[step] for log in logged) for step in logged[0]]


def dynamics(results, path: Path) -> None:
    """Margin, log-prob of the rejected response, reward gap, and accuracy at SHORT and LONG, by step."""
    logged = ("rewards/margins", "logps/rejected", "solopo/reward_gap")
    figure, axes = plt.subplots(1, 5, figsize=(20, 4), layout="constrained")
    for name in (n for n in COMPARED if n in results):
        runs = results[name]
        for place, key in zip(axes, logged, strict=False):
            place.plot(*curve(runs, key), label=name)
        for place, pairs in zip(axes[3:], (SHORT, LONG), strict=True):
            steps = list(runs[0]["by_step"])
            means = [statistics.mean(run["by_step"][s][str(pairs)] for run in runs) for s in steps]
            place.plot([int(s) for s in steps], means, label=name)
    for place, title in zip(axes, (*logged, f"accuracy, {SHORT} pairs", f"accuracy, {LONG} pairs"), strict=True):
        place.set(title=title, xlabel="step")
    axes[-1].legend(fontsize="small")
    save(figure, path)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "saves/lab/results")
    parser.add_argument("--output", type=Path, default=ROOT / "saves/lab")
    args = parser.parse_args(words)
    results = read(args.results)
    if not results:
        sys.exit(f"{args.results} holds no results; run scripts/lab/run.py first.")
    args.output.mkdir(parents=True, exist_ok=True)
    with replacing(args.output / "report.md") as file:
        file.write(table(results).encode())
    write_json(args.output / "report.json", {
        name: {pairs: dict(zip(("mean", "half_width"), accuracy(runs, pairs), strict=True)) for pairs in SHOWN}
        for name, runs in results.items()
    })  # fmt: skip
    by_length(results, args.output / "accuracy_by_length.png")
    bars(results, args.output / "methods.png")
    alpha_curve(results, args.output / "alpha.png")
    dynamics(results, args.output / "dynamics.png")
    print(f"{table(results)}\ntables and plots  {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
