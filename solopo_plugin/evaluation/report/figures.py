"""Draw the figures of a report, in colours that colour-blind readers tell apart: Okabe and Ito's, cividis and PuOr."""

import math
from functools import cache

import numpy as np
import pandas as pd
from matplotlib import rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager, get_font

from ..results import SIGNIFICANT
from .tables import COMPARISONS, METRICS, TITLES, Summary, label_length, label_task, only

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, DASHES = "osD^vP*X", ("-", "--", "-.", ":")
DRAWN = 8  # models that one figure can tell apart; of more, so many evenly along the list, and the selected one
# fonts of the usual systems for signs that matplotlib's own does not have, such as Chinese, Japanese and Korean
FALLBACKS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR",
    "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback", "Microsoft YaHei",
    "SimHei", "Yu Gothic", "Malgun Gothic", "PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Arial Unicode MS",
)  # fmt: skip
Figures = dict[str, tuple[Figure, str, str]]  # file name -> figure, what it shows, its benchmark or ""


def draw_figures(results: dict) -> Figures:
    """Draw all figures for which there are numbers."""
    results, names = _with_names_drawn(results)
    with rc_context({"text.parse_math": False, "font.family": _fonts()}):  # a name may hold dollar signs
        found, made = Summary(results), {}
        if found.benchmarks:
            made["overview"] = (
                overview(found),
                "Mean score of each model by benchmark, with 95 % bootstrap intervals. Intervals of two models may "
                "overlap although the models differ on the same questions; that is what the paired comparison is for.",
                "",
            )
        drawn = Summary(few_models(results))
        made |= _of_few(drawn)
    made = {k: (figure, text + names, name) for k, (figure, text, name) in made.items()}
    if len(drawn.models) == len(found.models):
        return made
    note = f" Drawn are {len(drawn.models)} of {len(found.models)} models; all numbers are in tables.csv."
    return {k: (figure, text + note * (k != "overview"), name) for k, (figure, text, name) in made.items()}


def _fonts() -> list[str]:
    """Return the families to draw with: matplotlib's, then those of `FALLBACKS` that this machine has."""
    there = {font.name for font in fontManager.ttflist}
    return [*rcParams["font.family"], *(name for name in FALLBACKS if name in there)]


@cache
def _signs(family: str) -> frozenset[int]:
    return frozenset(get_font(fontManager.findfont(FontProperties(family=[family]))).get_charmap())


def _with_names_drawn(results: dict) -> tuple[dict, str]:
    """Return the results with numbers for those models and tasks whose names no font here draws, and who they are."""
    fonts = _fonts()

    def numbered(kind: str, names: list[str]) -> dict[str, str]:
        own = enumerate(dict.fromkeys(names), 1)
        return {
            name: f"{kind} {i}" for i, name in own if not all(any(ord(c) in _signs(f) for f in fonts) for c in name)
        }

    runs = results.get("runs") or {}
    models = numbered("model", [*(model["name"] for model in results["models"]), *runs])
    tasks = numbered("task", [row["task"] for row in results["summary"]])
    if not models and not tasks:
        return results, ""

    def drawn(row: dict) -> dict:
        own = {key: models.get(row[key], row[key]) for key in ("name", "model", "a", "b", "best") if key in row}
        return row | own | ({"task": tasks.get(row["task"], row["task"])} if "task" in row else {})

    lists = {key: [*map(drawn, results[key])] for key in ("models", "summary", "comparisons")}
    runs = {models.get(run, run): [models.get(name, name) for name in own] for run, own in runs.items()}
    said = "; ".join(f"{number} is {name}" for name, number in (models | tasks).items())
    best = drawn(results["selection"]) if results.get("selection") else None
    return results | lists | {"runs": runs, "selection": best}, f" In the picture {said}."


def few_models(results: dict) -> dict:
    """Return the results of at most `DRAWN` models (runs count as one) and the selected one."""
    found = Summary(results)
    last, best = len(found.models) - 1, found.row_of.get((results.get("selection") or {}).get("best"))
    places = {round(i * last / (DRAWN - 1)) for i in range(DRAWN)} if last >= DRAWN else range(last + 1)
    names = {name for i, name in enumerate(found.models) if i in places or name == best}
    models = [model for model in results["models"] if found.row_of[model["name"]] in names]
    pairs = [row for row in results["comparisons"] if {row["a"], row["b"]} <= names]
    return results | {"models": models, "comparisons": pairs}


def _of_few(found: Summary) -> Figures:
    made = {}
    if rows := compared(found):
        made["differences"] = (
            differences(rows),
            "Paired comparison on the same questions: score of the first named model less that of the second, with "
            "95 % bootstrap intervals; an open mark (p >= 0.05) shows no difference.",
            "",
        )
    for benchmark in found.benchmarks:
        metric = found.main_metric(benchmark)
        if any(len(found.values(benchmark, "length", task=task)) > 1 for task in found.tasks(benchmark)):
            made[f"length_{benchmark}"] = (
                by_length(found, benchmark, metric),
                f"{TITLES.get(benchmark, benchmark)}: score against the length of the prompt, with 95 % intervals. "
                "Points of several models at one length stand side by side.",
                benchmark,
            )
    return made | heat_maps(found)


def compared(found: Summary) -> list[dict]:
    """Return comparisons on all lengths by each benchmark's main metric.

    Where they are many, only those of the mean of tasks, and of the short and the long prompt of validation.
    """
    rows = []
    for benchmark in found.benchmarks:
        own = only(found.comparisons, benchmark=benchmark, metric=found.main_metric(benchmark))
        rows += [row for task in found.tasks(benchmark) for row in own[own["task"] == task].to_dict("records")]
    if len(rows) <= COMPARISONS:
        return rows
    means = {name for name in found.benchmarks if "" in found.tasks(name) and name != "validation"}
    return [row for row in rows if (row["task"] == "") == (row["benchmark"] in means)]


def _lines(models: list[str]) -> dict[str, dict]:
    """Colour, marker and line of each model."""
    return {
        model: {
            "color": COLORS[i % len(COLORS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": DASHES[i // len(COLORS) % len(DASHES)],
        }
        for i, model in enumerate(models)
    }


def _panels(n: int, width: float, height: float, columns: int, **options) -> tuple[Figure, list[Axes]]:
    columns = min(n, columns)
    rows = math.ceil(n / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for spare in axes[n:]:
        spare.remove()
    return figure, axes[:n]


def _short(name: str, limit: int = 28) -> str:
    """Shorten a model's name; the end of a path tells checkpoints apart."""
    return name if len(name) <= limit else f"...{name[3 - limit :]}"


def _errors(rows: pd.DataFrame, value: str = "value") -> np.ndarray:
    """Lengths of the error bars below and above, shape (2, n)."""
    return np.maximum(0, np.array([rows[value] - rows["low"], rows["high"] - rows[value]], dtype=float))


def overview(found: Summary) -> Figure:
    """Draw a panel per benchmark, a line per model."""
    height = 1.1 + 0.32 * len(found.models)
    figure, panels = _panels(len(found.benchmarks), 4.2, height, 2, sharey=True)
    styles = _lines(found.models)
    for axes, benchmark in zip(panels, found.benchmarks, strict=True):
        metric = found.main_metric(benchmark)
        rows = only(found.rows, benchmark=benchmark, task=found.tasks(benchmark)[-1], metric=metric)
        for y, model in enumerate(found.models):
            own = rows[rows["model"] == model]
            if len(own):
                axes.errorbar(own["value"], [y], xerr=_errors(own), capsize=3, **styles[model])
        axes.set(title=TITLES.get(benchmark, benchmark), xlabel=f"{METRICS.get(metric, metric)} (0 to 100)")
        axes.set(xlim=(-2, 102), yticks=range(len(found.models)), yticklabels=map(_short, found.models))
        axes.set_ylim(len(found.models) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.4)
    return figure


def by_length(found: Summary, benchmark: str, metric: str) -> Figure:
    """Draw a panel per task that has lengths, the mean of tasks last; a line per model."""
    tasks = [task for task in found.tasks(benchmark) if found.values(benchmark, "length", task=task)]
    figure, panels = _panels(len(tasks), 4.2, 3.1, 2, sharey=True)
    styles, n = _lines(found.models), len(found.models)
    for axes, task in zip(panels, tasks, strict=True):
        ticks = found.values(benchmark, "length", task=task)
        rows = pd.concat([only(found.rows, benchmark=benchmark, task=task, metric=metric, length=x) for x in ticks])
        for i, model in enumerate(found.models):
            own = rows[rows["model"] == model]
            if len(own):
                x = own["length"].astype(float) * 2 ** (0.16 * (i - (n - 1) / 2) / n)
                axes.errorbar(x, own["value"], _errors(own), capsize=3, label=_short(model), **styles[model])
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, map(label_length, ticks))
        axes.set(title=label_task(task), xlabel="length of the prompt, tokens", ylim=(0, 103))
        if (place := axes.get_subplotspec()) and place.is_first_col():
            axes.set_ylabel(f"{METRICS.get(metric, metric)} (0 to 100)")
        axes.grid(alpha=0.4)
    lines = {name: line for axes in panels for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3)
    return figure


def differences(rows: list[dict]) -> Figure:
    """Draw a line per comparison, a panel per pair of models; filled where p < 0.05."""
    pairs = list(dict.fromkeys((row["a"], row["b"]) for row in rows))
    by_pair = [[row for row in rows if (row["a"], row["b"]) == pair] for pair in pairs]
    heights = [len(own) + 2 for own in by_pair]
    figure = Figure(figsize=(8, 0.3 * sum(heights) + 0.6), layout="constrained")
    panels = figure.subplots(len(pairs), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axes, (a, b), own in zip(panels, pairs, by_pair, strict=True):
        for y, row in enumerate(own):
            color = COLORS[0] if row["difference"] >= 0 else COLORS[1]
            shown = row["p_value"] < SIGNIFICANT
            style = {"fmt": "o" if row["difference"] >= 0 else "s", "mfc": color if shown else "white"}
            errors = _errors(pd.DataFrame([row]), "difference")
            axes.errorbar(row["difference"], y, xerr=errors, color=color, capsize=3, **style)
        names = [(TITLES.get(r["benchmark"], r["benchmark"]), label_task(r["task"])) for r in own]
        axes.set_yticks(range(len(own)), map(": ".join, names))
        axes.set_title(f"{_short(b)} less {_short(a)}", loc="right")
        axes.set_ylim(len(own) - 0.5, -0.5)
        axes.axvline(0, color="black", linewidth=1)
        axes.grid(axis="x", alpha=0.4)
    panels[-1].set_xlabel("difference of the main metric, points of 100")
    return figure


def heat_maps(found: Summary, benchmark: str = "niah_plus") -> Figures:
    """Draw depth by length: one figure per model and one per pair that is compared; panels are tasks."""
    metric, rows = found.main_metric(benchmark), found.rows
    cells = rows[(rows["benchmark"] == benchmark) & (rows["length"] != "") & (rows["depth"] != "")]
    tasks = [task for task in found.tasks(benchmark) if task in set(cells["task"])]
    if not tasks:
        return {}
    grids = {model: [_grid(cells[cells["task"] == task], model, metric) for task in tasks] for model in found.models}
    made = {}
    for i, (model, maps) in enumerate(grids.items(), 1):
        caption = f"NIAH-Plus, {model}: {METRICS[metric]} by depth of the needle and length of the prompt."
        made[f"niah_{i}"] = (_maps(maps, tasks, _short(model), "cividis", 0, 100), caption, benchmark)
    pairs = found.comparisons[found.comparisons["benchmark"] == benchmark][["a", "b"]].drop_duplicates()
    for a, b in pairs.itertuples(index=False):
        maps = [of_b - of_a for of_a, of_b in zip(grids[a], grids[b], strict=True)]
        limit = max(10, *(np.nanmax(np.abs(values), initial=0) for values in maps))
        name = f"niah_{found.models.index(b) + 1}_less_{found.models.index(a) + 1}"
        caption = f"NIAH-Plus, {b} less {a}, in points; the few questions of one cell show no difference by themselves."
        made[name] = (_maps(maps, tasks, f"{_short(b)} less {_short(a)}", "PuOr", -limit, limit), caption, benchmark)
    return made


def _grid(cells: pd.DataFrame, model: str, metric: str) -> pd.DataFrame:
    """Values by depth (rows) and length (columns) of all models; NaN where this one has none."""
    own = cells[(cells["model"] == model) & (cells["metric"] == metric)]
    grid = own.pivot(index="depth", columns="length", values="value").astype(float)
    return grid.reindex(index=sorted(set(cells["depth"])), columns=sorted(set(cells["length"])))


def _maps(maps: list[pd.DataFrame], tasks: list[str], title: str, colors: str, low: float, high: float) -> Figure:
    high_enough, wide = (max(values.shape[axis] for values in maps) for axis in (0, 1))
    width, height = min(8, max(2.4, 0.55 * wide)) + 1, min(8, max(2.2, 0.32 * high_enough)) + 1.1
    figure, panels = _panels(len(maps), width, height, 3, sharey=True)
    for axes, values, task in zip(panels, maps, tasks, strict=True):
        drawn = axes.imshow(values, cmap=colors, vmin=low, vmax=high, aspect="auto")
        axes.set_facecolor("#cccccc")
        for (y, x), value in np.ndenumerate(values.to_numpy()):
            red, green, blue, _ = drawn.cmap(drawn.norm(value))
            dark = not math.isnan(value) and 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            text = "-" if math.isnan(value) else f"{value:+.0f}" if low < 0 else f"{value:.0f}"
            if wide <= 16:
                axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        axes.set_xticks(range(len(values.columns)), map(label_length, values.columns))
        axes.set_yticks(range(len(values)), [f"{depth:g}" for depth in values.index])
        axes.set(title=label_task(task), xlabel="length, tokens")
    panels[0].set_ylabel("depth of the needle, %")
    figure.suptitle(title)
    figure.colorbar(drawn, ax=panels, label="points" if low < 0 else "score (0 to 100)")
    return figure
