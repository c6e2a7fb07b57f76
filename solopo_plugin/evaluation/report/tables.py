"""The tables of a report, in the paper's layout where it has one: described once, written as HTML, Markdown and CSV."""

import csv
import html
import io
import re
from dataclasses import dataclass, field

from ..items import MAIN_METRIC
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
    "f1": "F1",
    "em": "exact match",
    "sub_em": "sub-EM",
    "string_match": "RULER's string match",
    "accuracy": "accuracy",
    "parsed": "share of answers with a letter",
}
BESIDE = {"ruler_qa": ("string_match",)}  # shown open, like the main metric
LABELS = {
    "": "mean of tasks",
    "narrativeqa": "NarrativeQA",
    "qasper": "Qasper",
    "multifieldqa_en": "MultiFieldQA-en",
    "squad": "SQuAD",
    "hotpotqa": "HotpotQA",
    "2wikimqa": "2WikiMQA",
    "musique": "MuSiQue",
}  # in the order of the paper; other tasks follow under their own names
BANDS = {
    "longbench_qa": {
        "S-Doc": ("narrativeqa", "qasper", "multifieldqa_en"),
        "M-Doc": ("hotpotqa", "2wikimqa", "musique"),
    },
}
ORDER = ("easy", "hard", "short", "medium", "long")
MEASURED = "Measured here"
Cell = tuple[str, str]  # what is read first, and what stands small below it


@dataclass
class Table:
    """Rows in blocks, each with a heading; columns perhaps in bands."""

    title: str
    columns: list[str]
    blocks: list[tuple[str, list[tuple[str, list[Cell]]]]]
    bands: list[tuple[str, int]] = field(default_factory=list)  # heading and number of columns
    notes: list[str] = field(default_factory=list)
    open: bool = True  # otherwise folded away on the page, and left to the CSV in Markdown


class Summary:
    """`summary` of results.json by its keys."""

    def __init__(self, results: dict):
        self.models = [model["name"] for model in results["models"]]
        names = ("model", "benchmark", "task", "group", "metric")
        self.rows = {tuple(row[name] for name in names): row for row in results["summary"]}
        self.benchmarks = in_order({key[1] for key in self.rows}, tuple(MAIN_METRIC))

    def names(self, place: int, *start) -> set[str]:
        """What stands at a place of the keys that have `start` behind the model."""
        return {key[place] for key in self.rows if key[1 : 1 + len(start)] == start}

    def tasks(self, benchmark: str) -> list[str]:
        """With "", the mean of tasks, at the end if there are several."""
        tasks = in_order(self.names(2, benchmark) - {""}, tuple(LABELS))
        return [*tasks, ""] if len(tasks) != 1 else tasks

    def compared(self, results: dict, benchmark: str, metrics: tuple[str, ...]) -> list[dict]:
        """Comparisons by these metrics; the mean of tasks only where there are several."""
        tasks = self.tasks(benchmark)
        rows = [row for row in results["comparisons"] if row["benchmark"] == benchmark and row["metric"] in metrics]
        return [row for row in rows if row["task"] in tasks]

    def metrics(self, benchmark: str) -> list[str]:
        return in_order(self.names(4, benchmark), (MAIN_METRIC.get(benchmark, ""), *METRICS))

    def groups(self, benchmark: str, task: str, *names: str) -> list[str]:
        """Groups by exactly these properties, in order of their values."""
        groups = self.names(3, benchmark, task)
        return sorted((g for g in groups if g and tuple(values_of(g)) == names), key=_group_order)

    def lengths(self, benchmark: str, task: str) -> list[str]:
        """Groups by a length in tokens; LongBench v2's classes, which are words, are not."""
        return [g for g in self.groups(benchmark, task, "length") if _is_number(values_of(g)["length"])]

    def get(self, *key: str) -> dict | None:
        return self.rows.get(key)


def values_of(group: str) -> dict[str, str]:
    """`length=16384,depth=50` as a dict."""
    return dict(part.split("=", 1) for part in group.split(",")) if group else {}


def _group_order(group: str) -> list:
    values = values_of(group).values()
    return [(0, float(v), "") if _is_number(v) else (1, ORDER.index(v) if v in ORDER else 9, v) for v in values]


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"\d+(\.\d+)?", text))


def in_order(names: set[str], order: tuple[str, ...]) -> list[str]:
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))


def label_task(task: str) -> str:
    return LABELS.get(task, task)


def label_length(tokens: str | float) -> str:
    """16384 -> 16k, the field's way."""
    tokens = float(tokens)
    return f"{tokens / 1024:g}k" if tokens % 1024 == 0 else f"{tokens:g}"


def label_group(group: str) -> str:
    return ", ".join(label_length(v) if k == "length" and _is_number(v) else v for k, v in values_of(group).items())


def cell(row: dict | None) -> Cell:
    if row is None:
        return "-", ""
    return f"{row['value']:.1f}", f"{row['low']:.1f} to {row['high']:.1f}, n={row['n']}"


# ---- from results to tables


def benchmark_tables(results: dict, benchmark: str) -> list[Table]:
    """Tables of one benchmark: its metric, the comparisons, and folded away the other metrics."""
    found = Summary(results)
    main = MAIN_METRIC.get(benchmark)
    made = []
    for metric in found.metrics(benchmark):
        by_length = any(found.lengths(benchmark, task) for task in found.tasks(benchmark))
        table = (_by_length if by_length else _by_task)(found, benchmark, metric)
        table.open = metric == main or metric in BESIDE.get(benchmark, ())
        if metric == main and benchmark in PUBLISHED[0].averages:
            _put_beside(table, found, benchmark)
        made.append(table)
        if metric == main and benchmark != "longbench_v2" and (groups := _by_group(found, benchmark, metric)).columns:
            groups.title, groups.open = f"{groups.title}, by property of the question", False
            made.append(groups)
    return sorted(made + _comparisons(results, benchmark), key=lambda table: not table.open)


def _by_task(found: Summary, benchmark: str, metric: str) -> Table:
    """A row per model, a column per task and for their mean; of LongBench v2 also by difficulty and length."""
    tasks = found.tasks(benchmark)
    keys, bands = [(task, "") for task in tasks], []
    for band, names in BANDS.get(benchmark, {}).items():
        bands += [(band, n)] if (n := sum(task in names for task in tasks)) else []
    bands += [("", n)] if (n := len(tasks) - sum(n for _, n in bands)) else []
    labels = [label_task(task) if len(tasks) > 1 else "all questions" for task in tasks]
    table = _rows(found, benchmark, metric, keys, labels, bands)
    if benchmark == "longbench_v2":
        more = _by_group(found, benchmark, metric)
        table.columns, table.bands = table.columns + more.columns, table.bands + more.bands
        for (_, cells), (_, added) in zip(table.blocks[0][1], more.blocks[0][1], strict=True):
            cells += added
    return table


def _by_group(found: Summary, benchmark: str, metric: str) -> Table:
    """A row per model, a column per value of each property of the questions; tokens and depths apart."""
    task, keys, labels, bands = found.tasks(benchmark)[-1], [], [], []
    single = {group for group in found.names(3, benchmark, task) if group and "," not in group}
    for name in sorted({next(iter(values_of(group))) for group in single} - {"depth"}):
        groups = [g for g in found.groups(benchmark, task, name) if g not in found.lengths(benchmark, task)]
        keys += [(task, group) for group in groups]
        labels += map(label_group, groups)
        bands += [(name, len(groups))] if groups else []
    return _rows(found, benchmark, metric, keys, labels, bands)


def _rows(found: Summary, benchmark: str, metric: str, keys: list, labels: list[str], bands: list) -> Table:
    rows = [(m, [cell(found.get(m, benchmark, task, g, metric)) for task, g in keys]) for m in found.models]
    return Table(METRICS.get(metric, metric), labels, [(MEASURED, rows)], bands)


def _by_length(found: Summary, benchmark: str, metric: str) -> Table:
    """A block per task, a row per model; columns: lengths and their mean."""
    tasks = found.tasks(benchmark)
    lengths = sorted({g for task in tasks for g in found.lengths(benchmark, task)}, key=_group_order)
    blocks = []
    for task in tasks:
        rows = [(m, [cell(found.get(m, benchmark, task, g, metric)) for g in (*lengths, "")]) for m in found.models]
        blocks.append((f"{MEASURED}: {label_task(task)}", rows))
    labels = [*map(label_group, lengths), "all lengths"]
    bands = [("length of the prompt in tokens", len(lengths)), ("", 1)]
    return Table(METRICS.get(metric, metric), labels, blocks, bands)


def _put_beside(table: Table, found: Summary, benchmark: str) -> None:
    """The paper's averages, in a block of their own, where they run over the same tasks and lengths."""
    tasks = set(found.tasks(benchmark)) - {""}
    lengths = {int(float(values_of(g)["length"])) for g in found.lengths(benchmark, "")}
    if not matches(benchmark, tasks, lengths):
        table.notes.append("The paper's averages run over other tasks or lengths and are not put beside these numbers.")
        return
    place = table.columns.index("all lengths" if "all lengths" in table.columns else LABELS[""])
    rows = []
    for row in PUBLISHED:
        cells = [("", "")] * len(table.columns)
        cells[place] = (f"{row.averages[benchmark]:.1f}{' ?' * (benchmark in row.doubtful)}", "")
        rows.append((row.name, cells))
    table.blocks.append((f"Published in {SOURCE} (not measured here)", rows))
    table.notes.append(CAVEATS)
    if any(benchmark in row.doubtful for row in PUBLISHED):
        table.notes.append(DOUBTFUL)


def _comparisons(results: dict, benchmark: str) -> list[Table]:
    """Paired comparisons by the metrics that are shown open; those of single tasks are folded away."""
    metrics = (MAIN_METRIC.get(benchmark), *BESIDE.get(benchmark, ()))
    rows = Summary(results).compared(results, benchmark, metrics)
    several = any(row["task"] == "" for row in rows) and benchmark != "validation"
    made = []
    for title, chosen in (
        ("Paired comparison on the same questions", [r for r in rows if not several or r["task"] == ""]),
        ("Paired comparison by task", [r for r in rows if several and r["task"]]),
    ):
        blocks: dict[str, list] = {}
        for row in chosen:
            name = f"{label_task(row['task'])}, {METRICS.get(row['metric'], row['metric'])}"
            interval = f"{row['low']:+.1f} to {row['high']:+.1f}"
            cells = [f"{row['difference']:+.1f}", interval, f"{row['p_value']:.2g}", *map(str, _tally(row))]
            blocks.setdefault(f"{row['b']} against {row['a']}", []).append((name, [(text, "") for text in cells]))
        columns = ["difference", "95 % interval", "p-value", "wins", "losses", "ties", "n"]
        if blocks:
            made.append(Table(title, columns, list(blocks.items())))
    if made:
        made[0].notes.append(
            "Difference: first named less second, on questions that both answered; wins are its wins. An interval that "
            "holds 0 is no difference shown. p-values are not corrected for the number of comparisons."
        )
        if left_out := sum(row.get("left_out", 0) for row in rows if row["metric"] == metrics[0] and row["task"]):
            made[0].notes.append(f"Left out, as only one of the two answered: {left_out} questions, over all pairs.")
    for table in made[1:]:
        table.open = False
    return made


def _tally(row: dict) -> list[int]:
    return [row["wins"], row["losses"], row["ties"], row["n"]]


def notes_of(benchmark: str, scores: dict[str, list[dict]]) -> list[str]:
    """What has to be known of the answers of a benchmark, per model; empty if there is nothing.

    Args:
        scores: Model -> lines of its scores file.
    """
    counts = {
        "Over-long prompts, cut in the middle": lambda row: row["cut_tokens"],
        "Answers without the marker (or letter)": lambda row: not row["marker"],
        "Answers stopped by max_new_tokens": lambda row: row["finish_reason"] == "length",
    }
    own = {model: [row for row in rows if row["benchmark"] == benchmark] for model, rows in scores.items()}
    notes = []
    for what, holds in counts.items():
        said = [f"{m} {n} of {len(rows)}" for m, rows in own.items() if (n := sum(map(bool, map(holds, rows))))]
        notes += [f"{what}: {', '.join(said)}."] * bool(said)
    return notes


def models_table(results: dict) -> Table:
    """Which models, and what was counted of their answers."""
    counts = {
        "asked": "questions",
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
    return Table("", ["path", "adapter", "step", *counts.values()], [("", rows)])


def harness_table(results: dict) -> Table | None:
    """Results of lm-evaluation-harness, as it gives them; `±` is its standard error."""
    rows = results.get("harness") or []
    keys = sorted({(row["task"], row["metric"]) for row in rows})
    if not keys:
        return None
    by_key = {(row["model"], row["task"], row["metric"]): row for row in rows}

    def show(row: dict | None) -> Cell:
        if row is None:
            return "-", ""
        error = f"± {row['stderr']:.2g}, " if _is_float(row.get("stderr")) else ""
        return f"{row['value']:.4g}", f"{error}n={row.get('n')}"

    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = [(model, [show(by_key.get((model, *key))) for key in keys]) for model in models]
    notes = ["With the harness' own prompts and in its units (accuracies from 0 to 1); ± is its standard error."]
    columns = [f"{task}, {metric}" for task, metric in keys]
    return Table("", columns, [("", lines)], notes=notes)


def _is_float(value: object) -> bool:
    return isinstance(value, int | float) and value == value


# ---- from tables to text


def as_html(table: Table) -> str:
    """With headings of columns, bands and blocks marked as such; it scrolls by itself where it is too wide."""
    e = html.escape
    width = len(table.columns) + 1
    bands = "".join(f'<th scope=colgroup colspan="{n}">{e(name)}</th>' for name, n in table.bands)
    head = f"<tr><td></td>{bands}</tr>" if any(name for name, _ in table.bands) else ""
    head += f"<tr><td></td>{''.join(f'<th scope=col>{e(name)}</th>' for name in table.columns)}</tr>"
    head = f"<thead>{head}</thead>"
    body = ""
    for title, rows in table.blocks:
        kind = " class=published" if title.startswith("Published") else ""
        heading = f'<tr><th scope=rowgroup colspan="{width}">{e(title)}</th></tr>' if title else ""
        lines = (
            f"<tr><th scope=row>{e(name)}</th>"
            + "".join(f"<td>{e(text)}{f'<small>{e(small)}</small>' if small else ''}</td>" for text, small in cells)
            + "</tr>"
            for name, cells in rows
        )
        body += f"<tbody{kind}>{heading}{''.join(lines)}</tbody>"
    title = e(table.title[:1].upper() + table.title[1:])
    inner = f'<div class=wide tabindex=0 role=region aria-label="{title}"><table>{head}{body}</table></div>'
    notes = "".join(f"<p class=note>{e(note)}</p>" for note in table.notes)
    if table.open:
        return f"<h3>{title}</h3>{inner}{notes}" if title else inner + notes
    return f"<details><summary>{title}</summary>{inner}{notes}</details>"


def as_markdown(table: Table) -> str:
    bands = [name for name, n in table.bands for _ in range(n)] or [""] * len(table.columns)
    columns = [f"{band}: {name}" if band else name for band, name in zip(bands, table.columns, strict=True)]
    lines = [_line(["", *columns]), "|" + "---|" * (len(columns) + 1)]
    for title, rows in table.blocks:
        lines += [_line([f"**{plain(title)}**"] + [""] * len(columns), False)] * bool(title)
        for name, cells in rows:
            lines.append(_line([name, *(f"{text} ({small})" if small else text for text, small in cells)]))
    title = [f"### {plain(table.title[:1].upper() + table.title[1:])}"] * bool(table.title)
    return "\n\n".join([*title, "\n".join(lines), *map(plain, table.notes)])


def plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _line(texts: list[str], escaped: bool = True) -> str:
    return "| " + " | ".join(map(plain, texts) if escaped else texts) + " |"


CSV_COLUMNS = (
    "kind model against benchmark task group metric n value low high stderr p_value wins losses ties source".split()
)


def as_csv(results: dict) -> str:
    """Every number of the report, one a line, with all digits; `kind` says what it is and `source` whose."""
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
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
