"""The tables of a report, in the paper's layout where it has one: described once, written as HTML, Markdown and CSV."""

import csv
import io
import re
from dataclasses import dataclass, field
from itertools import groupby

from ..items import MAIN_METRIC, OFFICIAL_TOKENS
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
    "accuracy_lenient": "accuracy, lenient: the last letter, not the official parser's first",
    "parsed": "share of answers with a letter",
}
BESIDE = {"ruler_qa": ("string_match",), "longbench_v2": ("accuracy_lenient",)}  # shown open, like the main metric
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
BANDS = dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en"), "S-Doc")  # of LongBench v1
BANDS |= dict.fromkeys(("hotpotqa", "2wikimqa", "musique"), "M-Doc")
ORDER = ("easy", "hard", "short", "medium", "long")
MEASURED = "Measured here"
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
    """Rows in blocks, each with a heading."""

    title: str
    columns: list[tuple[str, str]]  # heading over neighbours that share it, and the column's own
    blocks: list[tuple[str, list[tuple[str, list[Cell]]]]]
    notes: list[str] = field(default_factory=list)
    open: bool = True  # otherwise folded away on the page, and left to the CSV in Markdown

    @property
    def heading(self) -> str:
        return self.title[:1].upper() + self.title[1:]

    @property
    def bands(self) -> list[tuple[str, int]]:
        """Headings over neighbouring columns and how many those are; empty where no column has one."""
        bands = [(band, len(list(own))) for band, own in groupby(band for band, _ in self.columns)]
        return bands if any(band for band, _ in bands) else []


class Summary:
    """`summary` of results.json by its keys; `models` are the rows of tables, of which a run is one."""

    def __init__(self, results: dict):
        names, self.runs = [model["name"] for model in results["models"]], results.get("runs") or {}
        self.row_of = {name: name for name in names} | {m: run for run, own in self.runs.items() for m in own}
        self.models = list(dict.fromkeys(self.row_of[name] for name in names))
        self.single = [name for name in names if name not in self.models]
        names = ("model", "benchmark", "task", "group", "metric")
        self.rows = {tuple(row[name] for name in names): row for row in results["summary"]}
        self.benchmarks = in_order({key[1] for key in self.rows}, tuple(MAIN_METRIC))

    def names(self, place: int, *start) -> set[str]:
        """What stands at a place of the keys that have `start` behind the model."""
        return {key[place] for key in self.rows if key[1 : 1 + len(start)] == start}

    def tasks(self, benchmark: str) -> list[str]:
        """With "", the mean of tasks, at the end if there are several."""
        tasks = in_order(self.names(2, benchmark) - {""}, (*LABELS, *ORDER))
        return [*tasks, ""] if len(tasks) != 1 else tasks

    def metrics(self, benchmark: str) -> list[str]:
        return in_order(self.names(4, benchmark), (MAIN_METRIC.get(benchmark, ""), *METRICS))

    def groups(self, benchmark: str, task: str, *names: str) -> list[str]:
        """Groups by exactly these properties, in order of their values."""
        groups = self.names(3, benchmark, task)
        return sorted((g for g in groups if g and tuple(values_of(g)) == names), key=_group_order)

    def lengths(self, benchmark: str, task: str) -> list[str]:
        """Groups by a length in tokens; LongBench v2's classes, which are words, are not."""
        return [g for g in self.groups(benchmark, task, "length") if _is_number(values_of(g)["length"])]

    def label(self, model: str) -> str:
        return f"{model} (n={len(self.runs[model])} seeds)" if model in self.runs else model

    def get(self, *key: str) -> dict | None:
        return self.rows.get(key)


def values_of(group: str) -> dict[str, str]:
    """`length=16384,depth=50` as a dict."""
    parts = group.split(",") if group.startswith("length=") else [group] if group else []
    return dict(part.split("=", 1) for part in parts)


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
    spread = f" ± {row['sd']:.1f}" if "sd" in row else ""
    return f"{row['value']:.1f}{spread}", f"{row['low']:.1f} to {row['high']:.1f}, n={row['n']}"


# ---- from results to tables


def benchmark_tables(results: dict, benchmark: str) -> list[Table]:
    """Tables of one benchmark: its metric, the comparisons, and folded away the other metrics and single seeds."""
    found = Summary(results)
    metrics = found.metrics(benchmark)
    made = [_metric_table(found, benchmark, metric, found.models) for metric in metrics]
    if benchmark in PUBLISHED[0].averages:
        _put_beside(made[0], found, benchmark)
    made += [_metric_table(found, benchmark, metric, found.single, True) for metric in metrics if found.single]
    return sorted([*made, *_comparisons(results, benchmark)], key=lambda table: not table.open)


def _layout(found: Summary, benchmark: str) -> tuple[list[tuple[str, str]], dict[str, list[tuple[str, str]]]]:
    """Columns, and for the heading of each block the task and group of every cell.

    Columns are tasks and classes of difficulty and length; or lengths in tokens, with a block per task.
    """
    tasks = found.tasks(benchmark)
    lengths = sorted({g for task in tasks for g in found.lengths(benchmark, task)}, key=_group_order)
    if lengths:
        columns = [*(("length of the prompt in tokens", label_group(g)) for g in lengths), ("", "all lengths")]
        return columns, {label_task(task): [(task, group) for group in (*lengths, "")] for task in tasks}
    bands = BANDS if benchmark == "longbench_qa" else {}
    columns = [(bands.get(task, ""), label_task(task) if len(tasks) > 1 else "all questions") for task in tasks]
    keys = [(task, "") for task in tasks]
    for name in ("difficulty", "length"):
        groups = found.groups(benchmark, tasks[-1], name)
        keys += [(tasks[-1], group) for group in groups]
        columns += [(name, label_group(group)) for group in groups]
    return columns, {"": keys}


def _metric_table(found: Summary, benchmark: str, metric: str, models: list[str], single: bool = False) -> Table:
    """A row per model; `single`: seeds of which the tables have but the mean, folded away."""
    columns, blocks = _layout(found, benchmark)
    rows = [
        (
            f"{MEASURED}: {task}" if task else MEASURED,
            [(found.label(m), [cell(found.get(m, benchmark, *key, metric)) for key in keys]) for m in models],
        )
        for task, keys in blocks.items()
    ]
    shown = metric in (MAIN_METRIC.get(benchmark), *BESIDE.get(benchmark, ())) and not single
    return Table(METRICS.get(metric, metric) + ", single seeds" * single, columns, rows, open=shown)


def _put_beside(table: Table, found: Summary, benchmark: str) -> None:
    """The paper's averages, in a block of their own, where they run over the same tasks and lengths."""
    tasks = set(found.tasks(benchmark)) - {""}
    lengths = {int(float(values_of(g)["length"])) for g in found.lengths(benchmark, "")}
    if not matches(benchmark, tasks, lengths):
        table.notes.append("The paper's averages run over other tasks or lengths and are not put beside these numbers.")
        return
    rows, keys = [], list(_layout(found, benchmark)[1].values())[-1]
    for row in PUBLISHED:
        cells = [("", "")] * len(keys)
        cells[keys.index(("", ""))] = (f"{row.averages[benchmark]:.1f}{' ?' * (benchmark in row.doubtful)}", "")
        rows.append((row.name, cells))
    table.blocks.append((f"Published in {SOURCE} (not measured here)", rows))
    table.notes += [CAVEATS, *([DOUBTFUL] if any(benchmark in row.doubtful for row in PUBLISHED) else [])]


def _comparisons(results: dict, benchmark: str) -> list[Table]:
    """All tasks and lengths together, with wins and losses, then each of them, in a table per metric."""
    metrics, pooled = (MAIN_METRIC.get(benchmark), *BESIDE.get(benchmark, ())), Summary(results).tasks(benchmark)[-1]
    blocks: dict[str, list] = {}
    for row in results["comparisons"]:
        if (row["benchmark"], row["task"], row["group"]) != (benchmark, pooled, "") or row["metric"] not in metrics:
            continue
        name = f"{label_task(row['task'])}, {METRICS.get(row['metric'], row['metric'])}"
        cells = [f"{row['difference']:+.1f}", f"{row['low']:+.1f} to {row['high']:+.1f}", f"{row['p_value']:.2g}"]
        cells += [str(row.get(key, "-")) for key in ("wins", "losses", "ties", "n", "left_out")]
        blocks.setdefault(f"{row['b']} against {row['a']}", []).append((name, [(text, "") for text in cells]))
    if not blocks:
        return []
    names = ("difference", "95 % interval", "p-value", "wins", "losses", "ties", "n", "answered by one")
    note = (
        "Difference: first named less second, on the n questions that both answered; wins are its wins. An interval "
        "that holds 0 shows no difference. p-values are not corrected for the number of comparisons."
    )
    together = Table("Paired comparison on the same questions", [("", n) for n in names], list(blocks.items()), [note])
    return [together, *(table for metric in metrics for table in _by_task_and_length(results, benchmark, metric))]


def _by_task_and_length(results: dict, benchmark: str, metric: str) -> list[Table]:
    """The comparisons by one metric in the layout of its means; none where there is but one task and length."""
    columns, blocks = _layout(Summary(results), benchmark)
    rows = {
        (row["a"], row["b"], row["task"], row["group"]): row
        for row in results["comparisons"]
        if (row["benchmark"], row["metric"]) == (benchmark, metric)
    }
    pairs = dict.fromkeys(key[:2] for key in rows)
    if len(columns) < 2 or not rows:
        return []
    lines = [
        (task, [(f"{b} against {a}", [_difference(rows.get((a, b, *key))) for key in keys]) for a, b in pairs])
        for task, keys in blocks.items()
    ]
    note = (
        "As above: difference, p-value, 95 % interval, n. A mean of tasks is over those that have such questions. Of "
        "20 cells without any difference, one has p < 0.05 by chance."
    )
    title = f"Paired comparison by task and length, {METRICS.get(metric, metric)}"
    return [Table(title, columns, lines, [note], open=len(pairs) * len(blocks) <= COMPARISONS)]


def _difference(row: dict | None) -> Cell:
    if row is None:
        return "-", ""
    interval = f"{row['low']:+.1f} to {row['high']:+.1f}"
    return f"{row['difference']:+.1f}, p={row['p_value']:.2g}", f"{interval}, n={row['n']}"


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
    notes = [
        f"{run} is one row of the tables below: {', '.join(own)}, which differ by training seed."
        for run, own in Summary(results).runs.items()
    ]
    return Table("", [("", name) for name in ("path", "adapter", "step", *counts.values())], [("", rows)], notes)


def prompts_table(results: dict) -> Table:
    """Whose prompt each benchmark's numbers come from, and the limits under which it was answered."""
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
        if "seeds" in row:
            error = f"sd {row['sd']:.2g} over {row['seeds']} seeds, " if _is_float(row["sd"]) else "one seed, "
        return f"{row['value']:.4g}", f"{error}n={row.get('n')}"

    found, asked = Summary(results), {row["model"] for row in rows}
    models = [model for model in found.models if model in asked]
    lines = [(found.label(model), [show(by_key.get((model, *key))) for key in keys]) for model in models]
    notes = ["With the harness' own prompts and in its units (accuracies from 0 to 1); ± is its standard error."]
    for model, times in {row["model"]: row["cut"] for row in rows if row.get("cut")}.items():
        notes.append(f"{model}: prompts beyond its window lost their beginning, {times} times by the harness' log.")
    return Table("", keys, [("", lines)], notes)


def _is_float(value: object) -> bool:
    return isinstance(value, int | float) and value == value


# ---- from tables to text


def as_markdown(table: Table) -> str:
    columns = [f"{band}: {name}" if band else name for band, name in table.columns]
    lines = [_line(["", *columns]), "|" + "---|" * (len(columns) + 1)]
    for title, rows in table.blocks:
        lines += [_line([f"**{plain(title)}**"] + [""] * len(columns), False)] * bool(title)
        for name, cells in rows:
            lines.append(_line([name, *(f"{text} ({small})" if small else text for text, small in cells)]))
    title = [f"### {plain(table.heading)}"] * bool(table.title)
    return "\n\n".join([*title, "\n".join(lines), *map(plain, table.notes)])


def plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _line(texts: list[str], escaped: bool = True) -> str:
    return "| " + " | ".join(map(plain, texts) if escaped else texts) + " |"


CSV_COLUMNS = (
    "kind model against benchmark task group metric n value low high stderr seeds sd p_value wins losses ties source"
).split()


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
