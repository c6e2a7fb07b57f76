"""Sum up scores in results.json: means with intervals, comparisons of models, and the choice of a checkpoint.

Every value is from 0 to 100, with its 95 % bootstrap interval. Task "" is the mean over the benchmark's tasks, each
with the same weight, as in the paper's tables. A row is of the questions that share the properties in its columns of
`GROUPS` (`"length": 16384, "depth": null`); null is no restriction, and where all are null the row is of all questions.

A row of the report is a model, or a run: several that differ by training seed alone (`runs` of the recipe). A run is
treated as one model, whose score of a question is the mean over the seeds, so that its intervals and p-values are over
questions; `sd` is the sample standard deviation (n - 1) of the seeds' own means. `n` counts answers and `questions` the
different questions behind them, fewer where one is asked at several lengths or depths.

Scores are data frames here, a line per question and metric: `KEY`, `source`, `GROUPS`, `value` and of a run `seed 1`,
`seed 2` and so on, its models' own.
"""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pandas as pd
from tqdm import tqdm

from ..qa.files import DataError, as_data_error, read_jsonl, write_json
from ..qa.generate.calls import cut_by_server
from ..qa.provenance import installed_versions
from .intervals import compare_paired, mean_interval, mean_of_means
from .items import EACH_OWN, GROUPS, MAIN_METRIC, main_metric

log = logging.getLogger(__name__)
FORMAT = 3  # of results.json; 2 had no `questions`, 1 the columns of `GROUPS` as one text, `length=16384,depth=50`
PACKAGES = ("llamafactory", "transformers", "tokenizers", "torch", "vllm", "numpy")  # the harness' rows name their own
SIGNIFICANT = 0.05  # p-value below which two models are said to differ; the field's habit
HELD_OUT = "validation"  # the benchmark that is there to choose by; all others are there to be reported
KEY = ["benchmark", "task", "id", "metric"]  # of a score
BY_ONE = [[], *([name] for name in GROUPS)]  # properties that questions are grouped by: none, or one at a time
BY_CELL = [*BY_ONE, ["length", "depth"]]

ReportRows = dict[str, list[str]]  # row of the report -> the models behind it


def make_results(output_dir: Path | str, models: list[dict], settings: dict, harness: Sequence[dict] = ()) -> dict:
    """Sum up scores/<model>.jsonl into results.json, and selection.json if a checkpoint is to be chosen.

    Args:
        output_dir: Folder of the evaluation.
        models: {"name", "path", "adapter", "step"} each; the first is the one that others are compared with.
        settings: The recipe's keys, kept in the file as they are. Used are `bootstrap_samples` and `seed`, and where
            they are given `runs` (name -> models that differ by training seed alone), `compare` (pairs of names of
            models or runs, (a, b) or "a, b"; otherwise each row of the report is compared with the first) and
            `select_by` (the benchmark whose main metric, averaged over tasks, chooses the best model).
        harness: Results of lm-evaluation-harness, as `run_harness` returns them.

    Returns:
        What results.json says. Its "versions" are those that score now: kept answers may be of others.

    Raises:
        DataError: Scores are missing or damaged, or a name is not one of the models' or benchmarks'.
    """
    folder, names, select_by = Path(output_dir), [model["name"] for model in models], settings.get("select_by")
    rows, asked = report_rows(settings.get("runs"), names), _count_lines(folder / "items.jsonl")
    pairs, harness = pairs_of(settings.get("compare"), rows), [*map(_with_numbers, harness)]
    runs = {name: members for name, members in rows.items() if len(members) > 1}
    if select_by is not None and select_by not in MAIN_METRIC:
        raise DataError(f"`select_by` must be one of {', '.join(MAIN_METRIC)}; got {select_by!r}.")
    scores, counted = _load_all(folder / "scores", models, runs, asked)
    draws = settings["bootstrap_samples"], settings["seed"]
    selection = select(select_by, counted, scores, *draws) if select_by is not None else None
    results = {
        "format": FORMAT,
        "title": folder.resolve().name,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "settings": settings,
        "versions": installed_versions(PACKAGES),
        "models": counted,
        "runs": runs,
        "summary": [row for name in scores for row in summarise(name, scores[name], *draws)],
        "comparisons": [row for a, b in pairs for row in compare_models(a, b, scores[a], scores[b], *draws)],
        "selection": selection,
        "harness": [*harness, *(row for run, members in runs.items() for row in harness_of(run, members, harness))],
    }
    write_json(folder / "results.json", results)
    if selection is not None:
        _write_selection(folder, selection, settings)
    return results


def _load_all(
    folder: Path, models: list[dict], runs: ReportRows, asked: int
) -> tuple[dict[str, pd.DataFrame], list[dict]]:
    """Return the scores of every model and run by name, and the models with the counts of how they answered."""
    scores, counted = {}, []
    for model in models:
        scores[model["name"]], counts = load_scores(folder / f"{model['name']}.jsonl", asked)
        counted.append({key: model.get(key) for key in ("name", "path", "adapter", "step")} | {"counts": counts})
    scores = with_each_own(scores)
    scores |= {run: of_seeds(run, {name: scores[name] for name in members}) for run, members in runs.items()}
    return scores, counted


def _write_selection(folder: Path, chosen: dict, settings: dict) -> None:
    """Write selection.json, and say which checkpoint is the best."""
    write_json(folder / "selection.json", chosen | {"settings": settings})
    log.info("Best by %s: %s (%s). %s", settings["select_by"], chosen["best"], chosen["folder"], chosen["note"])
    if chosen["warning"]:
        log.warning("%s", chosen["warning"])


def report_rows(runs: dict | None, names: list[str]) -> ReportRows:
    """Return the rows of the report in the order of the models: each model for itself, those of a run together.

    Args:
        runs: Name of a row -> the names of its models; None: none.
        names: Of all models.

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
    rows: ReportRows = defaultdict(list)
    for name in names:
        rows[row_of.get(name, name)].append(name)
    return dict(rows)


def pairs_of(pairs: list | None, rows: ReportRows) -> list[tuple[str, str]]:
    """Return who is compared with whom: (a, b) for b - a.

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


def load_scores(path: Path, asked: int) -> tuple[pd.DataFrame, dict]:
    """Read a model's scores, and count how it answered.

    Args:
        path: Of scores/<model>.jsonl.
        asked: Questions of items.jsonl; without any, no file of scores is needed.

    Returns:
        Scores, task by task as the tasks first come, and counts by name.
    """
    lines: defaultdict[tuple[str, str], list[dict]] = defaultdict(list)
    counts = Counter(asked=asked, missing=asked)
    for row in read_jsonl(path) if asked else ():
        counts.update(
            missing=-1, cut=bool(row["cut_tokens"]), no_marker=not row["marker"], empty=row["empty"],
            stopped_by_length=row["finish_reason"] == "length", prompt_tokens_differ="server_tokens" in row,
            cut_by_server=cut_by_server(row.get("server_tokens"), row["prompt_tokens"]),
        )  # fmt: skip
        question = {name: row[name] for name in ("benchmark", "task", "id", "source")} | groups_of(row)
        own = [question | {"metric": metric, "value": value} for metric, value in row["scores"].items()]
        lines[row["benchmark"], row["task"]] += own
    if counts["missing"]:
        log.warning("%s: %d of %d questions are missing; means are over the others.", path, counts["missing"], asked)
    if counts["prompt_tokens_differ"]:
        log.warning(
            "%s: of %d answered prompts a server counted other tokens than training has, of %d far fewer, as where it "
            "cuts them.", path, counts["prompt_tokens_differ"], counts["cut_by_server"],
        )  # fmt: skip
    names = ["asked", "missing", "cut", "no_marker", "empty", "stopped_by_length"]
    names += [name for name in ("prompt_tokens_differ", "cut_by_server") if counts[name]]
    # of objects, so that whole numbers stay whole beside None
    scores = pd.DataFrame([*chain(*lines.values())], columns=[*KEY, "source", *GROUPS, "value"], dtype=object)
    return scores.astype({"value": float}), {name: counts[name] for name in names}


def with_each_own(scores: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Add the metric `EACH_OWN` to every model's scores of benchmarks that have questions of both kinds."""
    kinds = pd.concat([own[["benchmark", "metric"]] for own in scores.values()])
    of_kind = kinds[kinds["metric"].isin(["f1", "accuracy"])].drop_duplicates()
    mixed = of_kind["benchmark"][of_kind["benchmark"].duplicated()]
    for name, own in scores.items():
        main = own[own["benchmark"].isin(mixed) & own["metric"].isin(["f1", "accuracy"])]
        if len(main):
            scores[name] = pd.concat([main.assign(metric=EACH_OWN), own], ignore_index=True)
    return scores


def groups_of(row: dict) -> dict:
    """Return the properties of a question by column of `GROUPS`.

    Among an item's own groups a class of length is called `length`, as in LongBench's files; here that is in tokens.
    """
    own = {"length_class" if name == "length" else name: value for name, value in row["groups"].items()}
    return {"length": row["length"], "depth": row["depth"]} | own


def of_seeds(run: str, seeds: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Join the scores of models that differ by training seed: each question's mean, and beside it each seed's score.

    Args:
        run: Name of their row, for messages.
        seeds: Name of a model -> its scores; questions that only some of them answered are left out and counted.

    Raises:
        DataError: Questions were answered, but none by all.
    """
    frames = [scores.set_index(KEY) for scores in seeds.values()]
    each = pd.DataFrame({f"seed {i}": scores["value"] for i, scores in enumerate(frames, 1)})
    found = frames[0].join(each.dropna(), how="inner")
    left_out = _questions(each[each.isna().any(axis=1)].index)
    if left_out:
        log.warning("%s: %d questions that not all of %s answered are left out.", run, left_out, ", ".join(seeds))
    if left_out and found.empty:
        raise DataError(f"`runs: {run}`: no question was answered by all of {', '.join(seeds)}; ask again.")
    found["value"] = [fmean(values) for values in found[each.columns].to_numpy()]  # rounded once, whatever the order
    return found.reset_index()


def _with_numbers(row: dict) -> dict:
    """Return a row of lm-evaluation-harness with None in place of NaN and infinity, which JSON does not have."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def harness_of(run: str, members: list[str], harness: Sequence[dict]) -> Iterator[dict]:
    """Yield rows of lm-evaluation-harness of a run: mean over the seeds that have the number, and their deviation."""
    cells = defaultdict(list)
    for row in harness:
        if row["model"] in members:
            cells[row["task"], row["metric"]].append(row)
    for (task, metric), rows in cells.items():
        values = [row["value"] for row in rows if row["value"] is not None]
        sd = stdev(values) if len(values) > 1 else None
        numbers = {"value": fmean(values) if values else None, "stderr": None, "n": rows[0]["n"]}
        cut = {"cut": n} if (n := sum(row.get("cut", 0) for row in rows)) else {}
        versions = [row.get("version", "") for row in rows]
        ran = {"version": ", ".join(sorted(set(versions)))} if all(versions) else {}
        yield {"model": run, "task": task, "metric": metric} | numbers | ran | cut | {"seeds": len(values), "sd": sd}


def cells_of(scores: pd.DataFrame, groupings: list[list[str]]) -> Iterator[tuple[dict, list[np.ndarray]]]:
    """Yield what each number is of, and the rows of its tasks: one task, or with task "" all, for their mean.

    A task that has no question of a group is not in that group's mean.
    """
    for names in groupings:
        keys, found = ["benchmark", *names, "metric"], scores.assign(row=np.arange(len(scores))).dropna(subset=names)
        cells: dict[tuple, defaultdict[str, list[int]]] = {}
        for task, row, *cell in zip(*(found[name] for name in ("task", "row", *keys)), strict=True):
            cells.setdefault(tuple(cell), defaultdict(list))[task].append(row)
        for values, of_task in cells.items():
            where = dict.fromkeys(("benchmark", "task", *GROUPS, "metric")) | dict(zip(keys, values, strict=True))
            tasks = {task: np.array(rows) for task, rows in of_task.items()}
            for task, parts in [*((task, [part]) for task, part in tasks.items()), ("", [*tasks.values()])]:
                yield where | {"task": task}, parts


def _columns(scores: pd.DataFrame, *names: str) -> dict[str, np.ndarray]:
    """Return columns of numbers by name, and "source" as numbers in the order of the sources' names."""
    sources = np.unique(scores["source"].to_numpy(str), return_inverse=True)[1]
    return {name: scores[name].to_numpy(float) for name in names} | {"source": sources}


def _questions(index: pd.MultiIndex) -> int:
    """Count the questions behind scores."""
    return len(index.droplevel("metric").unique())


def _different(sources: list[np.ndarray]) -> int:
    """Count the different questions of tasks: what intervals and p-values draw."""
    return len(np.unique(np.concatenate(sources)))


def summarise(model: str, scores: pd.DataFrame, samples: int, seed: int) -> Iterator[dict]:
    """Yield rows of a model or run: each benchmark, group and metric, for every task and for their mean (task "").

    A run's rows also have "seeds", how many there are, and "sd", the sample standard deviation of their means.
    """
    seeds = [name for name in scores if name.startswith("seed ")]
    columns = _columns(scores, "value", *seeds)
    for where, parts in tqdm(cells_of(scores, BY_CELL), f"intervals {model}", unit="", disable=None):
        of = {name: [column[rows] for rows in parts] for name, column in columns.items()}
        value, low, high = mean_interval(of["value"], samples, np.random.default_rng(seed), of["source"])
        means = [mean_of_means(of[name]) for name in seeds]
        spread = {"seeds": len(means), "sd": stdev(means)} if means else {}
        counts = {"n": sum(map(len, parts)), "questions": _different(of["source"])}
        numbers = counts | {"value": value, "low": low, "high": high}
        yield {"model": model} | where | numbers | spread


def compare_models(a: str, b: str, of_a: pd.DataFrame, of_b: pd.DataFrame, samples: int, seed: int) -> Iterator[dict]:
    """Yield rows of b against a, on the questions that both answered; `left_out` counts those that only one did.

    Compared are each task and their mean (task ""), each on all questions and by one property of theirs, such as the
    length; not by length and depth at once, since the few questions of such a cell tell nothing.
    """
    both = _side_by_side(of_a, of_b)
    columns = _columns(both, "a", "b")
    answered = ~np.isnan(columns["a"] + columns["b"])
    for where, parts in tqdm(cells_of(both, BY_ONE), f"{b} against {a}", unit="", disable=None):
        common = [found for rows in parts if len(found := rows[answered[rows]])]
        if common:
            of = {name: [column[rows] for rows in common] for name, column in columns.items()}
            found = compare_paired(of["a"], of["b"], samples, np.random.default_rng(seed), of["source"])
            counts = {"questions": _different(of["source"]), "left_out": sum(map(len, parts)) - found["n"]}
            yield {"a": a, "b": b} | where | found | counts
    if total := _questions(both[both[["a", "b"]].isna().any(axis=1)].set_index(KEY).index):
        log.warning("%s against %s: %d questions that only one of them answered are left out.", b, a, total)


def _side_by_side(of_a: pd.DataFrame, of_b: pd.DataFrame) -> pd.DataFrame:
    """All scores that either has, with columns `a` and `b`, task by task and by id."""
    of_a, of_b = of_a.set_index(KEY), of_b.set_index(KEY)
    both = pd.concat([of_a, of_b[~of_b.index.isin(of_a.index)]]).assign(a=of_a["value"], b=of_b["value"]).reset_index()
    order = both.groupby(["benchmark", "task"], sort=False).ngroup()
    return both.assign(order=order).sort_values(["order", "id"])


def select(benchmark: str, models: list[dict], scores: dict[str, pd.DataFrame], samples: int, seed: int) -> dict:
    """Return the best model by a benchmark's main metric, averaged over tasks, on the questions that all answered.

    Of equal models the first of the list is taken. Every other one is compared with the best, question by question.

    Returns:
        {"benchmark", "metric", "best", "path", "adapter", "step", "folder": the checkpoint's, "n", "left_out",
        "ranking": a row per model, best first, "tied": names that do not differ from the best at the 5 % level,
        "note": one or two sentences, "warning": a sentence where the benchmark is also one to report}.

    Raises:
        DataError: A model has no answers to the benchmark.
    """
    by_name, own = {model["name"]: model for model in models}, {}
    metrics = {metric for name in by_name for metric in scores[name]["metric"][scores[name]["benchmark"] == benchmark]}
    metric = main_metric(benchmark, metrics)
    for name in by_name:
        asked = scores[name][(scores[name]["benchmark"] == benchmark) & (scores[name]["metric"] == metric)]
        if asked.empty:
            raise DataError(
                f"`select_by: {benchmark}` has nothing to choose `{name}` by: it has no scores there; add it to "
                "`benchmarks`, or leave the model out."
            )
        own[name] = asked.set_index(["task", "id"])
    answered = pd.DataFrame({name: asked["value"] for name, asked in own.items()}).sort_index()
    common = answered.dropna()
    if common.empty:
        raise DataError(f"`select_by: {benchmark}`: no question was answered by all of {', '.join(own)}; ask again.")
    tasks = [part for _, part in common.groupby("task")]
    sources = [own[models[0]["name"]]["source"].loc[part.index].to_numpy(str) for part in tasks]
    columns = {name: [part[name].to_numpy() for part in tasks] for name in own}
    order = sorted(own, key=lambda name: -mean_of_means(columns[name]))
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
    best, n, left_out = by_name[order[0]], len(common), len(answered) - len(common)
    return {
        "benchmark": benchmark, "metric": metric, "best": order[0], "path": best["path"], "adapter": best["adapter"],
        "step": best["step"], "folder": best["adapter"] or best["path"], "n": n, "left_out": left_out,
        "ranking": ranking, "tied": tied, "note": _note(ranking, tied, left_out), "warning": _warning(benchmark),
    }  # fmt: skip


def _note(ranking: list[dict], tied: list[str], left_out: int) -> str:
    """Say how far the choice can be trusted."""
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


def _count_lines(path: Path) -> int:
    """Questions of items.jsonl; none where only lm-evaluation-harness was asked and there is no such file."""
    if not path.exists():
        return 0
    with as_data_error(path, "read"), open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
