"""Make training rows from questions, or from documents about which a model first asks questions.

    python scripts/build_data.py examples/yaml/data/tiny.yaml [key=value ...]
    python scripts/build_data.py RECIPE --stage judge          # one stage; those before it must be finished
    python scripts/build_data.py RECIPE --no-resume            # begin anew

A run that was stopped, however, continues where it was. Keys: solopo_plugin/synthesis/recipe.py, docs/data.md.
"""

import argparse
import sys
from pathlib import Path

from recipe_command import recipe_parser, run_command

from solopo_plugin.qa.ready import check_ready
from solopo_plugin.synthesis.pipeline import TABLE, read_manifest, run_pipeline, stages_of
from solopo_plugin.synthesis.recipe import DataRecipe, load_recipe


def main(words: list[str] | None = None) -> int:
    """Run the pipeline; returns the exit code."""
    parser = recipe_parser(__doc__)
    parser.add_argument("--stage", choices=list(TABLE), help="run only this stage")
    return run_command(parser, words, build)


def build(args: argparse.Namespace) -> None:
    """Make the rows and say what came of them."""
    recipe = load_recipe(args.recipe, args.overrides)
    kept = read_manifest(Path(recipe.work_dir))["stages"] if args.resume else {}
    due = {name for name in (stages_of(recipe) if args.stage is None else [args.stage]) if name not in kept}
    if "sample" in due:
        check_ready(recipe.backend, recipe.server_urls, {"model_name_or_path": recipe.model_name_or_path})
    if "judge" in due and recipe.judge == "model" and recipe.judge_model_name_or_path:
        sampling, model = recipe.judging
        check_other(sampling.backend, model.server_urls, "judge_model_name_or_path", model.path)
    if "ask" in due and recipe.another_asks:
        asker = recipe.asker
        check_other(asker.backend, asker.server_urls, "ask_model_name_or_path", asker.model_name_or_path)
    manifest = run_pipeline(recipe, args.stage, args.resume)
    print(summary(recipe, manifest["stages"], args.stage))


def check_other(backend: str, server_urls, key: str, path: str) -> None:
    """Refuse a model beside the trained one that cannot be asked; behind a server its path is the server's matter."""
    check_ready(backend, server_urls, {} if backend == "openai" else {key: path})


def summary(recipe: DataRecipe, stages: dict, last: str | None = None) -> str:
    """Return a table of what each finished stage has made, where it is, and the commands that come next.

    Args:
        recipe: Of data.
        stages: Of the manifest.
        last: The only stage that was run, if it was one; what later ones had made before may be out of date.
    """
    names = [name for name in stages_of(recipe) if name in stages]
    shown = names[: names.index(last) + 1] if last else names
    lines = [f"{name:10s}{part}" for name in shown for part in PHRASES[name](stages[name]["counts"])]
    lines = ["", *lines, "", f"counts    {recipe.work_dir}/manifest.json"]
    if later := names[len(shown) :]:
        lines.append(f"not shown {', '.join(later)}: of an earlier run; without `--stage` they are brought up to date")
    if "export" in shown:
        name = recipe.dataset_name
        keys = f"dataset_dir={recipe.dataset_dir} dataset={name}_solopo output_dir=saves/{name}/RUN"
        lines.append(f"look      python scripts/inspect_data.py {recipe.work_dir}")
        lines.append(f"train     CUDA_VISIBLE_DEVICES=0 llamafactory-cli train RECIPE {keys}")
    return "\n".join(lines)


def _less(counts: dict[str, int]) -> str:
    """Say how many were left out for what reason."""
    reasons = ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in counts.items() if n)
    return f"; left out: {reasons}" if reasons else ""


def _read(counts: dict) -> list[str]:
    others = {name: n for name, n in counts.items() if name not in ("lines", "questions", "corpus")}
    corpus = f" and {counts['corpus']} documents" if counts["corpus"] else ""
    return [f"{counts['questions']} questions{corpus} from {counts['lines']} lines{_less(others)}"]


def _documents(counts: dict) -> list[str]:
    others = counts["skipped"] | {"repeated passages": counts["duplicates"]}
    return [f"{counts['passages']} passages of {counts['documents']} documents{_less(others)}"]


def _ask(counts: dict) -> list[str]:
    about = f"{counts['single']} passages and {counts['pairs']} pairs"
    less = {name: counts[name] for name in ("special_tokens",)}
    lines = [f"{counts['replies']} questions asked about {about} of {counts['passages']} passages{_less(less)}"]
    if counts["unreadable"]:
        lines.append(f"{counts['unreadable']} replies cannot be read, {counts['cut_at_max_new_tokens']} were cut")
    return lines


def _filter(counts: dict) -> list[str]:
    hops = ", ".join(f"{n} of {number} hop{'s' * (number != '1')}" for number, n in counts["hops"].items())
    about = f"{counts['questions']} of {counts['candidates']} questions ({hops}) about {counts['documents']} documents"
    return [about + _less(counts["dropped"])]


def _contexts(counts: dict) -> list[str]:
    short, long = (f"{counts['tokens'][side]['mean']:.0f}" for side in ("short", "long"))
    made = f"{counts['contexts']} short and long contexts, of {short} and {long} tokens on average"
    return [made + _less(counts["dropped"])]


def _judged(counts: dict) -> list[str]:
    return [
        f"{side}: {part['correct']} of {part['answers']} answers are right ({part['correct'] / part['answers']:.0%})"
        + (f"; {part['no_marker']} lack `The answer is:`" if part["no_marker"] else "")
        + (
            f"; the rule says the same of {part['agreement_with_rule']['share']:.0%}"
            if "agreement_with_rule" in part
            else ""
        )
        for side, part in counts.items()
    ]


PHRASES = {  # stage -> its counts in the manifest, in words
    "documents": _documents,
    "ask": _ask,
    "filter": _filter,
    "read": _read,
    "contexts": _contexts,
    "sample": lambda counts: [f"{side}: {part['answers']} answers" for side, part in counts.items()],
    "judge": _judged,
    "select": lambda counts: [counts["statement"]],
    "export": lambda counts: [f"{file}: {n} rows" for file, n in counts.items()],
}


if __name__ == "__main__":
    sys.exit(main())
