"""Lay out the tables of a report, as the paper does where it has one, for the page, Markdown and CSV."""

import re
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

import pandas as pd

from ...qa.generate.calls import cut_by_server
from ..items import EACH_OWN, GROUPS, LONGBENCH, MAIN_METRIC, OFFICIAL_TOKENS, main_metric
from ..published import CAVEATS, DOUBTFUL, PUBLISHED, SOURCE, matches

TITLES = {
    "longbench_qa": "LongBench v1 QA",
    "ruler_qa": "RULER QA",
    "niah_plus": "NIAH-Plus",
    "longbench_v2": "LongBench v2",
    "plain": "Own questions",
    "validation": "Validation split, short and long prompt",
}
METRICS = {
    EACH_OWN: "F1, of choices accuracy",
    "f1": "F1",
    "em": "exact match",
    "sub_em": "sub-EM",
    "string_match": "RULER's string match",
    "accuracy": "accuracy",
    "accuracy_lenient": "accuracy, lenient: the last letter, not the official parser's first",
    "parsed": "share of answers with a letter",
}
LENIENT = ("accuracy_lenient",)
BESIDE = {"ruler_qa": ("string_match",), "longbench_v2": LENIENT, "plain": LENIENT}  # shown open, like the main metric
# in the order of the paper, RULER's SQuAD before HotpotQA; other tasks follow under their own names
LABELS = {"": "mean of tasks", "squad": "SQuAD"} | {task: name for task, (name, _) in LONGBENCH.items()}
ORDER = ("easy", "hard", "short", "medium", "long")
MEASURED = "Measured here"
NONE = "-: no such answers. A mean of tasks is over those that have some, so that rows may be means over other tasks."
COMPARISONS = 30  # lines that are shown together; more are folded away, and of more the figure draws means of tasks
OURS = {  # what the prompts ask for; "": the benchmarks that are not named
    "": "the data pipeline's: a chain of thought that ends in 'The answer is: ...'",
    "longbench_v2": "a chain of thought that ends in 'The correct answer is (X)', in one answer as in the paper",
    "plain": "the data pipeline's, or that of the file; of choices LongBench v2's",
    "validation": "as the rows of the data pipeline have it",
}
OFFICIAL = {"longbench_v2": "the authors' 0shot.txt, word for word: the letter at once, no chain of thought"}
Cell = tuple[str, str]  # what is read first, and what stands small below it


@dataclass
class Table:
    """Hold a table: rows in blocks, each with a heading."""

    title: str
    columns: list[tuple[str, str]]  # heading over neighbours that share it, and the column's own
    blocks: list[tuple[str, list[tuple[str, list[Cell]]]]]
    notes: list[str] = field(default_factory=list)
    open: bool = True  # otherwise folded away on the page, and left to the CSV in Markdown

    @property
    def heading(self) -> str:
        """Return the title with a capital letter."""
        return self.title[:1].upper() + self.title[1:]

    @property
    def bands(self) -> list[tuple[str, int]]:
        """Headings over neighbouring columns and how many those are; empty where no column has one."""
        bands = [(band, len(list(own))) for band, own in groupby(band for band, _ in self.columns)]
        return bands if any(band for band, _ in bands) else []


PLACE = ["task", *GROUPS]  # what a number is of, beside its benchmark and metric; "" where it is of all
CLASSES = {"difficulty": "difficulty", "length_class": "length"}  # with a column for each, and what stands over these


class Summary:
    """results.json as data frames; `models` are the rows of tables, of which a run is one."""

    def __init__(self, results: dict):
        """Take what results.json says."""
        names, self.runs = [model["name"] for model in results["models"]], results.get("runs") or {}
        self.row_of = {name: name for name in names} | {m: run for run, own in self.runs.items() for m in own}
        self.models = list(dict.fromkeys(self.row_of[name] for name in names))
        self.single = [name for name in names if name not in self.models]
        self.benchmarks = in_order({row["benchmark"] for row in results["summary"]}, tuple(MAIN_METRIC))
        self._results = results

    @cached_property
    def rows(self) -> pd.DataFrame:
        """Means, `summary` of results.json."""
        return _frame(self._results["summary"], "model")

    @cached_property
    def comparisons(self) -> pd.DataFrame:
        """Differences of two models."""
        return _frame(self._results["comparisons"], "a", "b")

    def values(self, benchmark: str, name: str, **where) -> list:
        """Return what stands in a column for a benchmark but "", in order."""
        rows = self.rows[self.rows["benchmark"] == benchmark]
        for column, value in where.items():
            rows = rows[rows[column] == value]
        return in_order(set(rows[name]) - {""}, (self.main_metric(benchmark), *METRICS, *LABELS, *ORDER))

    def main_metric(self, benchmark: str) -> str:
        """Return the metric of a benchmark's table."""
        return main_metric(benchmark, set(self.rows["metric"][self.rows["benchmark"] == benchmark]))

    def open_metrics(self, benchmark: str) -> tuple[str, ...]:
        """Return the main metric and those that are shown open beside it."""
        return self.main_metric(benchmark), *BESIDE.get(benchmark, ())

    def tasks(self, benchmark: str) -> list[str]:
        """Return tasks with "", the mean of tasks, at the end if there are several."""
        tasks = self.values(benchmark, "task")
        return [*tasks, ""] if len(tasks) != 1 else tasks

    def label(self, model: str) -> str:
        """Return what a table calls a model or run."""
        return f"{model} (n={len(self.runs[model])} seeds)" if model in self.runs else model


def _frame(rows: list[dict], *names: str) -> pd.DataFrame:
    frame = pd.DataFrame(rows, dtype=object) if rows else pd.DataFrame(columns=[*names, "benchmark", *PLACE, "metric"])
    return frame.fillna(dict.fromkeys(GROUPS, ""))


def only(rows: pd.DataFrame, **where) -> pd.DataFrame:
    """Return rows with these values, and grouped by no property that is not named."""
    for name, value in (dict.fromkeys(GROUPS, "") | where).items():
        rows = rows[rows[name] == value]
    return rows


def in_order(names: set, order: tuple[str, ...]) -> list:
    """Sort names, or numbers, as `order` has them, and what it does not have behind."""
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))


def label_task(task: str) -> str:
    """Return the paper's name of a task."""
    return LABELS.get(task, task)


def label_length(tokens: float) -> str:
    """Return 16k for 16384, the field's way."""
    return f"{tokens / 1024:g}k" if tokens % 1024 == 0 else f"{tokens:g}"


def _value(row: dict) -> Cell:
    spread = f" ± {row['sd']:.1f}" if _is_float(row.get("sd")) else ""
    return f"{row['value']:.1f}{spread}", f"{row['low']:.1f} to {row['high']:.1f}, n={_counted(row)}"


def _difference(row: dict) -> Cell:
    interval = f"{row['low']:+.1f} to {row['high']:+.1f}"
    return f"{row['difference']:+.1f}, p={row['p_value']:.2g}", f"{interval}, n={_counted(row)}"


def _counted(row: dict) -> str:
    """Return the number of answers, with that of the questions behind them where it is another."""
    n, questions = row["n"], row["questions"]
    return str(n) if n == questions else f"{n} of {questions} question{'s' * (questions != 1)}"


def _is_float(value: object) -> bool:
    return isinstance(value, int | float) and value == value


# ---- from results to tables


def benchmark_tables(results: dict, benchmark: str) -> list[Table]:
    """Return the tables of one benchmark: its metric, the comparisons, and folded away other metrics, single seeds."""
    found = Summary(results)
    metrics = found.values(benchmark, "metric")
    made = [_metric_table(found, benchmark, metric, found.models) for metric in metrics]
    if benchmark in PUBLISHED[0].averages:
        _put_beside(made[0], found, benchmark)
    made += [_metric_table(found, benchmark, metric, found.single, True) for metric in metrics if found.single]
    return sorted([*made, *_comparisons(found, benchmark)], key=lambda table: not table.open)


def _layout(found: Summary, benchmark: str) -> pd.DataFrame:
    """Return the cells of a line: the heading of their `block`, the `band` over columns, the `column`, their `PLACE`.

    Columns are tasks and classes of difficulty and length; or lengths in tokens, with a block per task.
    """
    tasks, lengths = found.tasks(benchmark), found.values(benchmark, "length")
    if lengths:
        columns = [{"band": "length of the prompt in tokens", "column": label_length(n), "length": n} for n in lengths]
        columns.append({"column": "all lengths"})
        cells = [{"block": label_task(task), "task": task} | column for task in tasks for column in columns]
    else:
        bands = {task: band for task, (_, band) in LONGBENCH.items()} if benchmark == "longbench_qa" else {}
        labels = {task: label_task(task) if len(tasks) > 1 else "all questions" for task in tasks}
        cells = [{"band": bands.get(task, ""), "column": label, "task": task} for task, label in labels.items()]
        for name, band in CLASSES.items():
            classes = found.values(benchmark, name, task=tasks[-1])
            cells += [{"band": band, "column": value, "task": tasks[-1], name: value} for value in classes]
    return pd.DataFrame(cells, columns=["block", "band", "column", *PLACE], dtype=object).fillna("")


def _pivot(rows: pd.DataFrame, layout: pd.DataFrame, names: list[str]) -> tuple[list, list]:
    """Columns and blocks of a table with a line per name, of rows that have a `name` and a `cell`."""
    cells, blocks = rows.set_index(["name", *PLACE])["cell"].to_dict(), []
    for heading, own in layout.groupby("block", sort=False):
        places = [*own[PLACE].itertuples(index=False, name=None)]
        blocks.append((heading, [(name, [cells.get((name, *place), ("-", "")) for place in places]) for name in names]))
    return [*own[["band", "column"]].itertuples(index=False, name=None)], blocks


def _metric_table(found: Summary, benchmark: str, metric: str, models: list[str], single: bool = False) -> Table:
    """Make a table of a row per model; `single`: seeds of which the tables have but the mean, folded away."""
    rows = found.rows[(found.rows["benchmark"] == benchmark) & (found.rows["metric"] == metric)]
    rows = rows.assign(name=rows["model"].map(found.label), cell=[*map(_value, rows.to_dict("records"))])
    columns, blocks = _pivot(rows, _layout(found, benchmark), [*map(found.label, models)])
    blocks = [(f"{MEASURED}: {task}" if task else MEASURED, lines) for task, lines in blocks]
    shown = metric in found.open_metrics(benchmark) and not single
    notes = [NONE] * any(("-", "") in cells for _, lines in blocks for _, cells in lines)
    return Table(METRICS.get(metric, metric) + ", single seeds" * single, columns, blocks, notes, shown)


def _put_beside(table: Table, found: Summary, benchmark: str) -> None:
    """Add the paper's averages, in a block of their own, where they run over the same tasks and lengths."""
    if not matches(benchmark, set(found.values(benchmark, "task")), set(found.values(benchmark, "length"))):
        table.notes.append("The paper's averages run over other tasks or lengths and are not put beside these numbers.")
        return
    rows, last = [], _layout(found, benchmark)[PLACE].tail(len(table.columns))
    pooled = (last == "").all(axis=1).to_list().index(True)
    for row in PUBLISHED:
        cells = [("", "")] * len(table.columns)
        cells[pooled] = (f"{row.averages[benchmark]:.1f}{' ?' * (benchmark in row.doubtful)}", "")
        rows.append((row.name, cells))
    table.blocks.append((f"Published in {SOURCE} (not measured here)", rows))
    table.notes += [CAVEATS, *([DOUBTFUL] if any(benchmark in row.doubtful for row in PUBLISHED) else [])]


def _comparisons(found: Summary, benchmark: str) -> list[Table]:
    """All tasks and lengths together, with wins and losses, then each of them, in a table per metric."""
    metrics = found.open_metrics(benchmark)
    rows = only(found.comparisons, benchmark=benchmark, task=found.tasks(benchmark)[-1])
    blocks: dict[str, list[tuple[str, list[Cell]]]] = {}
    for row in rows[rows["metric"].isin(metrics)].to_dict("records"):
        name = f"{label_task(row['task'])}, {METRICS.get(row['metric'], row['metric'])}"
        cells = [f"{row['difference']:+.1f}", f"{row['low']:+.1f} to {row['high']:+.1f}", f"{row['p_value']:.2g}"]
        cells += [str(row[key]) for key in ("wins", "losses", "ties")] + [_counted(row), str(row["left_out"])]
        blocks.setdefault(f"{row['b']} against {row['a']}", []).append((name, [(text, "") for text in cells]))
    if not blocks:
        return []
    names = ("difference", "95 % interval", "p-value", "wins", "losses", "ties", "n", "answered by one")
    note = (
        "Difference: first named less second, on the n answers that both gave (a question counts once for each length "
        "or depth); wins are its wins. p >= 0.05 shows no difference, also where an interval of few questions leaves 0 "
        "out. p-values are not corrected for the number of comparisons. A mean of tasks is over those that have such "
        "questions."
    )
    together = Table("Paired comparison on the same questions", [("", n) for n in names], list(blocks.items()), [note])
    apart = [_by_task_and_length(found, benchmark, metric) for metric in metrics]
    return [together, *(table for table in apart if table)]


def _by_task_and_length(found: Summary, benchmark: str, metric: str) -> Table | None:
    """Lay the comparisons by one metric out as its means are; none where there is but one task and length."""
    rows, layout = found.comparisons, _layout(found, benchmark)
    rows = rows[(rows["benchmark"] == benchmark) & (rows["metric"] == metric)]
    if layout["column"].nunique() < 2 or rows.empty:
        return None
    rows = rows.assign(name=rows["b"] + " against " + rows["a"], cell=[*map(_difference, rows.to_dict("records"))])
    columns, blocks = _pivot(rows, layout, [*rows["name"].unique()])
    note = (
        "As above: difference, p-value, 95 % interval, n. Of 20 cells without any difference, one has p < 0.05 by "
        "chance."
    )
    title = f"Paired comparison by task and length, {METRICS.get(metric, metric)}"
    lines = rows["name"].nunique() * len(blocks)
    return Table(title, columns, blocks, [note], open=lines <= COMPARISONS)


def notes_of(benchmark: str, scores: dict[str, list[dict]]) -> list[str]:
    """Say what has to be known of the answers of a benchmark, per model; nothing if there is nothing.

    Args:
        benchmark: Its name.
        scores: Model -> lines of its scores file.
    """
    counts = {
        "Over-long prompts, cut in the middle": lambda row: row["cut_tokens"],
        "Answers without the marker (or letter)": lambda row: not row["marker"],
        "Answers stopped by max_new_tokens": lambda row: row["finish_reason"] == "length",
        "Prompts of which the server counted other tokens than training has": lambda row: "server_tokens" in row,
        "Prompts of which it counted far fewer, as where it cuts them": lambda row: cut_by_server(
            row.get("server_tokens"), row["prompt_tokens"]
        ),
    }
    own = {model: [row for row in rows if row["benchmark"] == benchmark] for model, rows in scores.items()}
    notes = []
    for what, holds in counts.items():
        said = [f"{m} {n} of {len(rows)}" for m, rows in own.items() if (n := sum(map(bool, map(holds, rows))))]
        notes += [f"{what}: {', '.join(said)}."] * bool(said)
    return notes


def models_table(results: dict) -> Table:
    """Tell which models there are, and what was counted of their answers."""
    counts = {
        "asked": "asked",
        "missing": "not answered",
        "cut": "cut in the middle",
        "no_marker": "without a marked answer",
        "empty": "empty answers",
        "stopped_by_length": "stopped by max_new_tokens",
    }
    rows = []
    for model in results["models"]:
        facts = [model["path"], model.get("adapter") or "-", "-" if model.get("step") is None else str(model["step"])]
        numbers = [str(model["counts"].get(name, "-")) for name in counts]
        rows.append((model["name"], [(text, "") for text in facts + numbers]))
    notes = [
        f"{run} is one row of the tables below: {', '.join(own)}, which differ by training seed."
        for run, own in Summary(results).runs.items()
    ]
    return Table("", [("", name) for name in ("path", "adapter", "step", *counts.values())], [("", rows)], notes)


def prompts_table(results: dict) -> Table:
    """Tell whose prompt each benchmark was asked with, and the limits under which it was answered."""
    used, rows = results["settings"], []
    for benchmark in Summary(results).benchmarks:
        whose, words, tokens = "ours", OURS.get(benchmark, OURS[""]), used.get("max_new_tokens", "-")
        if used.get("prompts") == "official" and benchmark in OFFICIAL:
            whose, words, tokens = "official", OFFICIAL[benchmark], OFFICIAL_TOKENS[benchmark]
        elif used.get("prompt") and benchmark not in ("longbench_v2", "validation"):
            whose, words = "the recipe's", "its key prompt; what a file asks in its own words stays so"
        cells = whose, words, str(tokens), str(used.get("temperature", "-"))
        rows.append((TITLES.get(benchmark, benchmark), [(text, "") for text in cells]))
    columns = [("", name) for name in ("prompt", "which", "max_new_tokens", "temperature")]
    return Table("Prompts", columns, [("", rows)])


def harness_table(results: dict) -> Table | None:
    """Show the results of lm-evaluation-harness as it gives them; `±` is its standard error."""
    rows = results.get("harness") or []
    keys = sorted({(row["task"], row["metric"]) for row in rows})
    if not keys:
        return None
    by_key = {(row["model"], row["task"], row["metric"]): row for row in rows}

    def show(row: dict | None) -> Cell:
        if row is None:
            return "-", ""
        if row["value"] is None:
            return "no number", ""
        small = [f"± {row['stderr']:.2g}"] if _is_float(row.get("stderr")) else []
        if "seeds" in row:
            small = [f"sd {row['sd']:.2g} over {row['seeds']} seeds" if _is_float(row["sd"]) else "one seed"]
        small += [f"n={row['n']}"] if row.get("n") is not None else []
        return f"{row['value']:.4g}", ", ".join(small)

    found, asked = Summary(results), {row["model"] for row in rows}
    models = [model for model in found.models if model in asked]
    lines = [(found.label(model), [show(by_key.get((model, *key))) for key in keys]) for model in models]
    notes = ["With the harness' own prompts and in its units (accuracies from 0 to 1); ± is its standard error."]
    ran = {row["model"]: row.get("version", "a version that was not noted") for row in rows}
    notes.append(f"lm-evaluation-harness: {', '.join(f'{model} {version}' for model, version in ran.items())}.")
    used = results.get("settings", {})  # a `rope_factor` that is a text is the server's own
    if idle := [name for name in ("extra_body", "rope_factor") if isinstance(used.get(name), dict | float | int)]:
        notes.append(f"Settings that it did not have: {', '.join(idle)}.")
    for model, times in {row["model"]: row["cut"] for row in rows if row.get("cut")}.items():
        notes.append(f"{model}: prompts beyond its window lost their beginning, {times} times by the harness' log.")
    return Table("", keys, [("", lines)], notes)


# ---- from tables to text


def as_markdown(table: Table) -> str:
    """Write a table as Markdown, with its heading and notes."""
    columns = [f"{band}: {name}" if band else name for band, name in table.columns]
    lines = [_line(["", *columns]), "|" + "---|" * (len(columns) + 1)]
    for title, rows in table.blocks:
        lines += [_line([f"**{plain(title)}**"] + [""] * len(columns), False)] * bool(title)
        for name, cells in rows:
            lines.append(_line([name, *(f"{text} ({small})" if small else text for text, small in cells)]))
    heading = [f"### {plain(table.heading)}"] * bool(table.title)
    return "\n\n".join([*heading, "\n".join(lines), *map(plain, table.notes)])


def plain(text: str) -> str:
    """Escape a text, so that Markdown shows it as it is."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _line(texts: list[str], escaped: bool = True) -> str:
    return "| " + " | ".join(map(plain, texts) if escaped else texts) + " |"


CSV_COLUMNS = (
    *("kind", "model", "against", "benchmark", *PLACE, "metric", "n", "questions", "value", "low", "high", "stderr"),
    *("seeds", "sd", "p_value", "wins", "losses", "ties", "source"),
)


def as_csv(results: dict) -> str:
    """Return every number of the report, one a line, with all digits; `kind` says what it is and `source` whose."""
    lines = [row | {"kind": "measured"} for row in results["summary"]]
    for row in results["comparisons"]:
        lines.append(row | {"kind": "comparison", "model": row["b"], "against": row["a"], "value": row["difference"]})
    lines += [row | {"kind": "harness", "benchmark": "lm-evaluation-harness"} for row in results.get("harness") or []]
    for model in results["models"]:
        counts = model["counts"].items()
        lines += [{"kind": "count", "model": model["name"], "metric": name, "value": n} for name, n in counts]
    for row in PUBLISHED:
        for benchmark, value in row.averages.items():
            doubt = ", doubtful" * (benchmark in row.doubtful)
            facts = {"kind": "published", "model": row.name, "benchmark": benchmark, "metric": "f1", "value": value}
            lines.append(facts | {"source": SOURCE + doubt})
    return pd.DataFrame(lines, columns=CSV_COLUMNS, dtype=object).to_csv(index=False, lineterminator="\n")
