"""From scores to results.json: means with intervals, comparisons of models, and the choice of a checkpoint.

Every value is from 0 to 100, with its 95 % bootstrap interval. Task "" is the mean over the benchmark's tasks, each
with the same weight, as in the paper's tables. Groups are `length=16384`, `depth=50`, `length=16384,depth=50`, and what
a question carries beside these, such as `difficulty=hard`; "" is all questions.

A row of the report is a model, or a run: several that differ by training seed alone (`runs` of the recipe). A run is
treated as one model, whose score of a question is the mean over the seeds, so that its intervals and p-values are over
questions; `sd` is the sample standard deviation (n - 1) of the seeds' own means.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from tqdm import tqdm

from ..qa.files import DataError, explained, read_jsonl, write_json
from ..qa.provenance import installed_versions
from .intervals import compare_paired, mean_interval, mean_of_means
from .items import MAIN_METRIC

log = logging.getLogger(__name__)
PACKAGES = ("llamafactory", "transformers", "tokenizers", "torch", "vllm", "numpy", "lm_eval")
SIGNIFICANT = 0.05  # p-value below which two models are said to differ; the field's habit
HELD_OUT = "validation"  # the benchmark that is there to choose by; all others are there to be reported

# (benchmark, task) -> id -> {"source", "groups", "scores", and of several seeds "seeds": metric -> each one's score}
Scores = dict[tuple[str, str], dict[str, dict]]
Rows = dict[str, list[str]]  # row of the report -> the models behind it


def make_results(
    output_dir: Path | str,
    models: list[dict],
    settings: dict,
    select_by: str | None,
    compare: list | None,
    bootstrap_samples: int,
    seed: int,
    harness: list[dict],
    runs: dict | None = None,
) -> dict:
    """Sum up scores/<model>.jsonl into results.json, and selection.json if a checkpoint is to be chosen.

    Args:
        models: {"name", "path", "adapter", "step"} each; the first is the one that others are compared with.
        settings: The recipe's, kept in the file as they are.
        select_by: Benchmark whose main metric, averaged over tasks, chooses the best model; None: no choice.
        compare: Pairs of names, (a, b) or "a, b", of models or runs; None: each row of the report with the first.
        bootstrap_samples: Resamples of each interval and of each p-value.
        harness: Rows of lm-evaluation-harness, {"model", "task", "metric", "value", "stderr", "n"}.
        runs: Name -> models that differ by training seed alone; None: every model is a row of its own.

    Returns:
        What results.json says.

    Raises:
        DataError: Scores are missing or damaged, or a name is not one of the models' or benchmarks'.
    """
    folder, names = Path(output_dir), [model["name"] for model in models]
    rows, asked = rows_of(runs, names), _count_lines(folder / "items.jsonl")
    pairs, several = pairs_of(compare, rows), {name: models for name, models in rows.items() if len(models) > 1}
    if select_by is not None and select_by not in MAIN_METRIC:
        raise DataError(f"`select_by` must be one of {', '.join(MAIN_METRIC)}; got {select_by!r}.")
    scores, counted = {}, []
    for model in models:
        scores[model["name"]], counts = load_scores(folder / "scores" / f"{model['name']}.jsonl", asked)
        counted.append({key: model.get(key) for key in ("name", "path", "adapter", "step")} | {"counts": counts})
    scores |= {run: of_seeds(run, {name: scores[name] for name in members}) for run, members in several.items()}
    draws = bootstrap_samples, seed
    results = {
        "title": folder.resolve().name,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "settings": settings,
        "versions": installed_versions(PACKAGES),
        "models": counted,
        "runs": several,
        "summary": [row for name in scores for row in summarise(name, scores[name], *draws)],
        "comparisons": [row for a, b in pairs for row in compare_models(a, b, scores[a], scores[b], *draws)],
        "selection": select(select_by, counted, scores, *draws) if select_by is not None else None,
        "harness": [*harness, *(row for run, members in several.items() for row in harness_of(run, members, harness))],
    }
    write_json(folder / "results.json", results)
    if select_by is not None:
        chosen = results["selection"]
        write_json(folder / "selection.json", chosen | {"settings": settings})
        log.info("Best by %s: %s (%s). %s", select_by, chosen["best"], chosen["folder"], chosen["note"])
        if chosen["warning"]:
            log.warning("%s", chosen["warning"])
    return results


def rows_of(runs: dict | None, names: list[str]) -> Rows:
    """Rows of the report in the order of the models: each model for itself, those of a run together.

    Args:
        runs: Name of a row -> the names of its models; None: none.

    Raises:
        DataError: A run that is no list of two models or more, of one that is not there or stands in another run, or
            with a model's name.
    """
    row_of: dict[str, str] = {}
    for run, members in (runs or {}).items():
        what = f"`runs: {run}`"
        if not isinstance(members, list) or len(members) < 2:
            raise DataError(f"{what} must list at least two models that differ by training seed; got {members!r}.")
        if run in names or not isinstance(run, str):
            raise DataError(f"{what} must have a name of its own, other than those of the models {', '.join(names)}.")
        for member in members:
            if member not in names:
                raise DataError(f"{what} names {member!r}, which is none of the models {', '.join(names)}.")
            if member in row_of:
                raise DataError(f"{what} names {member!r}, which is in {row_of[member]} already; once is enough.")
            row_of[member] = run
    rows: Rows = defaultdict(list)
    for name in names:
        rows[row_of.get(name, name)].append(name)
    return dict(rows)


def pairs_of(pairs: list | None, rows: Rows) -> list[tuple[str, str]]:
    """Who is compared with whom: (a, b) for b - a.

    Raises:
        DataError: What is no pair of two of the rows or of their models.
    """
    first, *others = rows
    if pairs is None:
        return [(first, name) for name in others]
    names = list(dict.fromkeys([*rows, *(name for models in rows.values() for name in models)]))
    found = []
    for pair in pairs:
        parts = [part.strip() for part in pair.split(",")] if isinstance(pair, str) else pair
        is_pair = isinstance(parts, list | tuple) and len(parts) == 2 and parts[0] != parts[1]
        if not is_pair or not all(part in names for part in parts):
            raise DataError(f"`compare` must hold pairs of two models, of {', '.join(names)}; got {pair!r}.")
        found.append(tuple(parts))
    return found


def load_scores(path: Path, asked: int) -> tuple[Scores, dict]:
    """What of a model's scores the statistics need, and counts of how it answered.

    Args:
        asked: Questions of items.jsonl; without any, no file of scores is needed.
    """
    scores, counts = defaultdict(dict), Counter(asked=asked, missing=asked)
    for row in read_jsonl(path) if asked else ():
        counts.update(
            missing=-1, cut=bool(row["cut_tokens"]), no_marker=not row["marker"], empty=row["empty"],
            stopped_by_length=row["finish_reason"] == "length",
        )  # fmt: skip
        kept = {"source": row["source"], "groups": group_labels(row), "scores": row["scores"]}
        scores[row["benchmark"], row["task"]][row["id"]] = kept
    if counts["missing"]:
        log.warning("%s: %d of %d questions are missing; means are over the others.", path, counts["missing"], asked)
    names = ("asked", "missing", "cut", "no_marker", "empty", "stopped_by_length")
    return scores, {name: counts[name] for name in names}


def of_seeds(run: str, seeds: dict[str, Scores]) -> Scores:
    """Scores of models that differ by training seed as of one: each question's mean, and beside it each seed's score.

    Args:
        run: Name of their row, for messages.
        seeds: Name of a model -> its scores; questions that only some of them answered are left out and counted.

    Raises:
        DataError: Questions were answered, but none by all.
    """
    found, left_out = {}, 0
    for key in dict.fromkeys(key for scores in seeds.values() for key in scores):
        sides = [scores.get(key, {}) for scores in seeds.values()]
        common = set.intersection(*map(set, sides))
        left_out += len(set.union(*map(set, sides))) - len(common)
        found[key] = {}
        for id in filter(common.__contains__, sides[0]):
            each = {metric: [side[id]["scores"][metric] for side in sides] for metric in sides[0][id]["scores"]}
            means = {metric: fmean(values) for metric, values in each.items()}  # rounded once, whatever the order
            found[key][id] = sides[0][id] | {"scores": means, "seeds": each}
    if left_out:
        log.warning("%s: %d questions that not all of %s answered are left out.", run, left_out, ", ".join(seeds))
    if left_out and not any(found.values()):
        raise DataError(f"`runs: {run}`: no question was answered by all of {', '.join(seeds)}; ask again.")
    return found


def harness_of(run: str, members: list[str], harness: list[dict]) -> Iterator[dict]:
    """Rows of lm-evaluation-harness of a run: mean of the seeds that have the number, and their sample deviation."""
    cells = defaultdict(list)
    for row in harness:
        if row["model"] in members:
            cells[row["task"], row["metric"]].append(row)
    for (task, metric), rows in cells.items():
        values = [row["value"] for row in rows]
        sd = stdev(values) if len(values) > 1 else None
        numbers = {"value": fmean(values), "stderr": None, "n": rows[0]["n"]}
        cut = {"cut": n} if (n := sum(row.get("cut", 0) for row in rows)) else {}
        yield {"model": run, "task": task, "metric": metric} | numbers | cut | {"seeds": len(values), "sd": sd}


def group_labels(row: dict) -> tuple[str, ...]:
    """The groups that a question belongs to; "" is all."""
    where = [f"{name}={row[name]:.12g}" for name in ("length", "depth") if row[name] is not None]
    both = [",".join(where)] if len(where) > 1 else []
    return ("", *where, *both, *(f"{name}={value}" for name, value in row["groups"].items()))


def summarise(model: str, scores: Scores, samples: int, seed: int) -> Iterator[dict]:
    """Rows of a model or run: each benchmark, group and metric, for every task and for their mean (task "").

    A run's rows also have "seeds", how many there are, and "sd", the sample standard deviation of their means.
    """
    cells = defaultdict(lambda: defaultdict(list))  # (benchmark, group, metric) -> task -> (value, source, each seed's)
    for (benchmark, task), questions in scores.items():
        for question in questions.values():
            for group in question["groups"]:
                for metric, value in question["scores"].items():
                    each = question.get("seeds", {}).get(metric, ())
                    cells[benchmark, group, metric][task].append((value, question["source"], *each))
    for (benchmark, group, metric), tasks in tqdm(cells.items(), desc=f"intervals {model}", disable=None):
        for task, columns in _and_mean({task: list(zip(*pairs, strict=True)) for task, pairs in tasks.items()}):
            values, sources, *seeds = ([np.array(column) for column in side] for side in zip(*columns, strict=True))
            value, low, high = mean_interval(values, samples, np.random.default_rng(seed), sources)
            n = sum(map(len, values))
            where = {"model": model, "benchmark": benchmark, "task": task, "group": group, "metric": metric}
            spread = {"seeds": len(seeds), "sd": stdev(map(mean_of_means, seeds))} if seeds else {}
            yield where | {"n": n, "value": value, "low": low, "high": high} | spread


def compare_models(a: str, b: str, of_a: Scores, of_b: Scores, samples: int, seed: int) -> Iterator[dict]:
    """Rows of b against a, on the questions that both answered; `left_out` counts those that only one did.

    Compared are each task and their mean (task ""), each on all questions and by one property of theirs, such as the
    length; not by length and depth at once, since the few questions of such a cell tell nothing.
    """
    cells, left_out = defaultdict(dict), Counter()
    for benchmark, task in of_a | of_b:
        sides = [scores.get((benchmark, task), {}) for scores in (of_a, of_b)]
        groups = dict.fromkeys(group for side in sides for question in side.values() for group in question["groups"])
        for group in (group for group in groups if ",depth=" not in group):
            own = [{id: q for id, q in side.items() if group in q["groups"]} for side in sides]
            left_out[benchmark, task, group] = len(own[0].keys() ^ own[1].keys())
            left_out[benchmark, "", group] += left_out[benchmark, task, group]
            for metric, columns in _aligned(own).items():
                cells[benchmark, group, metric][task] = columns
    for (benchmark, group, metric), tasks in tqdm(cells.items(), desc=f"{b} against {a}", disable=None):
        for task, columns in _and_mean(tasks):
            sources, *values = zip(*columns, strict=True)
            found = compare_paired(*values, samples, np.random.default_rng(seed), sources)
            where = {"a": a, "b": b, "benchmark": benchmark, "task": task, "group": group, "metric": metric}
            yield where | found | {"left_out": left_out[benchmark, task, group]}
    if total := sum(count for (_, task, group), count in left_out.items() if task and not group):
        log.warning("%s against %s: %d questions that only one of them answered are left out.", b, a, total)


def select(benchmark: str, models: list[dict], scores: dict[str, Scores], samples: int, seed: int) -> dict:
    """The best model by a benchmark's main metric, averaged over tasks, on the questions that all models answered.

    Of equal models the first of the list is taken. Every other one is compared with the best, question by question.

    Returns:
        {"benchmark", "metric", "best", "path", "adapter", "step", "folder": the checkpoint's, "n", "left_out",
        "ranking": a row per model, best first, "tied": names that do not differ from the best at the 5 % level,
        "note": one or two sentences, "warning": a sentence where the benchmark is also one to report}.

    Raises:
        DataError: A model has no answers to the benchmark.
    """
    metric, names = MAIN_METRIC[benchmark], [model["name"] for model in models]
    tasks = {key for name in names for key in scores[name] if key[0] == benchmark}
    for name in names:
        if not any(key[0] == benchmark for key in scores[name]):
            raise DataError(
                f"`select_by: {benchmark}` has nothing to choose `{name}` by: it has no scores there; add it to "
                "`benchmarks`, or leave the model out."
            )
    aligned = [_aligned([scores[name].get(key, {}) for name in names]).get(metric) for key in sorted(tasks)]
    aligned = [columns for columns in aligned if columns]
    if not aligned:
        raise DataError(f"`select_by: {benchmark}`: no question was answered by all of {', '.join(names)}; ask again.")
    sources, *sides = zip(*aligned, strict=True)
    columns = dict(zip(names, sides, strict=True))
    by_name = {model["name"]: model for model in models}
    order = sorted(names, key=lambda name: -mean_of_means(columns[name]))
    ranking = []
    for name in order:
        value, low, high = mean_interval(columns[name], samples, np.random.default_rng(seed), sources)
        against = compare_paired(columns[order[0]], columns[name], samples, np.random.default_rng(seed), sources)
        place = {key: by_name[name][key] for key in ("path", "adapter", "step")}
        keys = ("difference", "p_value", "wins", "losses", "ties")
        ranking.append(
            {"model": name, **place, "value": value, "low": low, "high": high, "difference_low": against["low"],
             "difference_high": against["high"], **{key: against[key] for key in keys}}
        )  # fmt: skip
    tied = [row["model"] for row in ranking[1:] if row["p_value"] >= SIGNIFICANT]
    best = by_name[order[0]]
    answered = {(key, id) for name in names for key in tasks for id in scores[name].get(key, {})}
    n = sum(map(len, sources))
    left_out = len(answered) - n
    return {
        "benchmark": benchmark, "metric": metric, "best": order[0], "path": best["path"], "adapter": best["adapter"],
        "step": best["step"], "folder": best["adapter"] or best["path"], "n": n, "left_out": left_out,
        "ranking": ranking, "tied": tied, "note": _note(ranking, tied, left_out), "warning": _warning(benchmark),
    }  # fmt: skip


def _note(ranking: list[dict], tied: list[str], left_out: int) -> str:
    """How far the choice can be trusted, in words."""
    if len(ranking) == 1:
        return "There was nothing to choose from."
    best, second = ranking[:2]
    text = (
        f"{best['model']} has {best['value']:.1f} ({best['low']:.1f} to {best['high']:.1f}), {second['model']} "
        f"{second['value']:.1f}: {0 - second['difference']:.1f} less ({0 - second['difference_high']:.1f} to "
        f"{0 - second['difference_low']:.1f}, p = {second['p_value']:.2g})."
    )
    if tied:
        text += (
            f" These questions do not tell it from {', '.join(tied)} (p >= {SIGNIFICANT}): the choice may be chance."
        )
    if left_out:
        text += f" {left_out} questions that not all models answered are left out."
    return text


def _warning(benchmark: str) -> str | None:
    if benchmark == HELD_OUT:
        return None
    paper = "; the paper selects on LongBench v1, which it also reports" if benchmark == "longbench_qa" else ""
    return (
        f"The checkpoint is chosen by {benchmark}, which is also among the reported benchmarks: the chosen one's score "
        f"there is too high on average (selection on the test set{paper}). {HELD_OUT} is held out for this."
    )


def _aligned(sides: list[dict[str, dict]]) -> dict[str, list[np.ndarray]]:
    """Per metric, of the questions of one task that all sides answered: their sources, then the values of each side."""
    found = defaultdict(list)
    for id in sorted(set.intersection(*map(set, sides))):
        for metric in sides[0][id]["scores"]:
            found[metric].append((sides[0][id]["source"], *(side[id]["scores"][metric] for side in sides)))
    return {metric: list(map(np.array, zip(*rows, strict=True))) for metric, rows in found.items()}


def _and_mean(tasks: dict[str, object]) -> Iterable[tuple[str, list]]:
    """Each task alone, then all of them under the name "", whose values are averaged over tasks."""
    return [*((task, [values]) for task, values in tasks.items()), ("", list(tasks.values()))]


def _count_lines(path: Path) -> int:
    """Questions of items.jsonl; none where only lm-evaluation-harness was asked and there is no such file."""
    if not path.exists():
        return 0
    with explained(path, "read"), open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
