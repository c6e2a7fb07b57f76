"""Write the report of an evaluation from its folder: a page that needs nothing but itself, Markdown, CSV and PNGs.

Everything is read from results.json, scores/, answers/ and items.jsonl (as a stream: prompts may be gigabytes), so that
a report can be written again at any time without a model.
"""

import json
from collections import defaultdict
from pathlib import Path

from ...qa.files import DataError, as_data_error, read_jsonl, replacing
from ...qa.pages import png, render
from ..results import FORMAT
from . import explorer
from .figures import draw_figures
from .tables import (
    METRICS,
    TITLES,
    Summary,
    Table,
    as_csv,
    as_markdown,
    benchmark_tables,
    harness_table,
    models_table,
    notes_of,
    plain,
    prompts_table,
)


def write_report(output_dir: Path | str) -> Path:
    """Write `output_dir`/report/: index.html, report.md, tables.csv and the figures as PNGs.

    Args:
        output_dir: Folder of the evaluation.

    Returns:
        The path of index.html.

    Raises:
        DataError: A file of the evaluation is missing or damaged.
    """
    folder = Path(output_dir)
    results = _read(folder / "results.json")
    asked = {row["model"] for row in results["summary"]}
    models = [model["name"] for model in results["models"] if model["name"] in asked]
    scores = {model: list(read_jsonl(folder / "scores" / f"{model}.jsonl")) for model in models}
    shown, total = explorer.read_questions(folder, scores, results["settings"].get("seed", 0)) if models else ([], 0)
    pictures = {name: (png(figure), *facts) for name, (figure, *facts) in draw_figures(results).items()}
    sections = _sections(results, scores)
    texts = {
        "index.html": _as_html(results, sections, pictures, {"models": list(scores), "rows": shown}, total),
        "report.md": _as_markdown(results, sections, pictures),
        "tables.csv": as_csv(results),
    }
    report = folder / "report"
    for old in report.glob("*.png"):
        old.unlink()
    for name, (picture, *_) in pictures.items():
        with replacing(report / f"{name}.png") as file:
            file.write(picture)
    for name, text in texts.items():
        with replacing(report / name) as file:
            file.write(text.encode("utf-8", "replace"))
    return report / "index.html"


def _read(path: Path) -> dict:
    with as_data_error(path, "read"):
        text = path.read_bytes()
    try:
        results = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); run scripts/evaluate.py again, answers are kept.") from None
    if results.get("format") != FORMAT:
        raise DataError(
            f"{path} is of format {results.get('format', 1)} and not {FORMAT}, an older or newer release's; "
            "`scripts/evaluate.py RECIPE --rescore` writes it again from the stored answers."
        )
    return results


def _sections(results: dict, scores: dict[str, list[dict]]) -> list[tuple[str, str, list[Table], list[str]]]:
    """Anchor, heading, tables and notes of each part of the report."""
    asked = Summary(results).benchmarks
    made: list[tuple[str, str, list[Table], list[str]]]
    made = [("models", "Models", [models_table(results), *([prompts_table(results)] if asked else [])], [])]
    for benchmark in asked:
        tables = benchmark_tables(results, benchmark)
        made.append((benchmark, TITLES.get(benchmark, benchmark), tables, notes_of(benchmark, scores)))
    if table := harness_table(results):
        made.append(("harness", "lm-evaluation-harness", [table], []))
    return made


def _selection(results: dict) -> list[str]:
    """Return the lines on the choice of a checkpoint, and what is to be feared of it."""
    chosen = results.get("selection")
    if not chosen:
        return []
    metric = METRICS.get(chosen["metric"], chosen["metric"])
    benchmark = TITLES.get(chosen["benchmark"], chosen["benchmark"])
    warning = [f"Warning: {chosen['warning']}"] if chosen.get("warning") else []
    said = [f"Selected: {chosen['best']}, the best by {metric} on {benchmark}. {chosen.get('note') or ''}".strip()]
    return said + warning


def _about(results: dict) -> list[str]:
    about = [
        "Scores run from 0 to 100, with 95 % bootstrap intervals and the number n of answers (a question counts once "
        "for each length or depth), and of questions where those are fewer. No value is set in bold: whether two "
        "models differ, the paired comparison says.",
        "Of few questions, however often they are asked, an interval is too narrow: it holds the true mean in 91 of "
        "100 cases for 5 questions and in 76 for 3, and of one question it has no width. So it is near 0 or 100: of 10 "
        "questions at a true mean of 90 in 65 of 100 cases; where all are right it has no width.",
    ]
    if limit := results["settings"].get("max_samples"):
        about.append(f"Of each task at most {limit} questions were asked (max_samples), a seeded choice.")
    if Summary(results).runs:
        about.append(
            "Models that differ by training seed alone are one row: mean ± sample standard deviation (n - 1) over n "
            "seeds. Its intervals and p-values are over questions, each with its mean score over these seeds, and say "
            "nothing of other seeds. The single seeds are folded away on the page and stand in tables.csv."
        )
    if len(results["models"]) == 1:
        about.append("There is one model, so that there is nothing to compare.")
    return about


def _as_html(results: dict, sections: list[tuple], pictures: dict, reader: dict, n_questions: int) -> str:
    figures = defaultdict(list)
    for picture, caption, anchor in pictures.values():
        figures[anchor].append((picture, caption))
    settings = {f"`{k}`": json.dumps(v, ensure_ascii=False) for k, v in results["settings"].items()}
    links = [*([("overview", "Overview")] if figures[""] else []), *(section[:2] for section in sections)]
    return render(
        "evaluation/report/templates/report", title=results["title"], about=[str(results["date"]), *_about(results)],
        selection=_selection(results), links=[*links, ("questions", "Questions")], sections=sections, figures=figures,
        settings=settings | {f"version of {name}, scoring": value for name, value in results["versions"].items()},
        rows=reader, n_questions=n_questions,
    )  # fmt: skip


def _as_markdown(results: dict, sections: list[tuple], pictures: dict) -> str:
    parts = [f"# {plain(results['title'])}", plain(str(results["date"])), *map(plain, _about(results))]
    parts += [f"> {plain(text)}" for text in _selection(results)]
    for _, heading, tables, notes in sections:
        parts += [f"## {plain(heading)}", *map(plain, notes), *(as_markdown(table) for table in tables if table.open)]
    parts += ["Further metrics and groups are in `tables.csv`.", "## Figures"]
    parts += [f"![{plain(caption)}]({name}.png)\n\n{plain(caption)}" for name, (_, caption, _) in pictures.items()]
    return "\n\n".join(parts) + "\n"
