"""Every key of an evaluation recipe: its default, where the default comes from, what depends on it, what is refused.

Keys of the model and of the backend are those of the data recipe, too (qa/recipe.py). `stages` of a key:
`items` (the prompts of every benchmark), the name of a benchmark (its prompts), `answers`, `results`. A key that names
none changes how fast an evaluation runs, never what comes out.
"""

import logging
import os
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from ..qa import kinds
from ..qa.files import DataError, split_names
from ..qa.recipe import build, key, read_values, shared
from .items import LONGBENCH, MAIN_METRIC

log = logging.getLogger(__name__)

TITLE = "evaluation recipe"
NEARLY = 0.95  # a length of which `max_input_tokens` holds so much is built to that; ours


@dataclass(config=kinds.STRICT, kw_only=True)
class EvalRecipe:
    """Hold the keys of a recipe under examples/yaml/eval/.

    Token counts are of the templated prompt, in the model's tokens.
    """

    # models
    models: kinds.Names | dict | None = key(
        None, "results", "Hub names or folders, of whole models or LoRA adapters; {name: path} names them."
    )
    checkpoints: kinds.Names | None = key(
        None, "results", "Output folder of a training run: each checkpoint-* in it, whole or LoRA, in order of steps."
    )
    with_base: bool = key(False, "results", "`checkpoints`: evaluate the model they began from as well, first.")
    model_name_or_path: str | None = key(
        None, "answers", "Model below LoRA adapters, in place of the one they name; the tokenizer where there is none."
    )
    template: kinds.Needed = shared("template", "items answers")
    default_system: str | None = shared("default_system", "items answers")
    enable_thinking: bool = shared("enable_thinking", "items answers")
    trust_remote_code: bool = shared("trust_remote_code", "")

    # benchmarks
    benchmarks: kinds.Names = key(list, "results", f"What is asked: {', '.join(MAIN_METRIC)}.")
    prompt: str | None = shared("prompt", "items")
    prompts: Literal["ours", "official"] = key(
        "ours", "longbench_v2", "`official`: LongBench v2 in its authors' words, without chain of thought; else ours."
    )
    max_samples: kinds.Count | None = key(None, "items", "Seeded choice of so many questions of each task; null: all.")
    longbench_data: str = key(
        "THUDM/LongBench", "longbench_qa", "LongBench v1: hub name, or folder of its .jsonl files."
    )
    longbench_tasks: kinds.Names = key(
        lambda: list(LONGBENCH),
        "longbench_qa",
        "Tasks of LongBench v1; these six are the paper's.",
    )
    ruler_data: dict | None = key(
        None, "ruler_qa", "Questions of each task, {squad: FILE, hotpotqa: FILE, musique: FILE}, in official formats."
    )
    ruler_lengths: kinds.Counts = key(
        lambda: [4096, 8192, 16384, 32768], "ruler_qa", "Lengths of the contexts, in tokens. The paper's."
    )
    ruler_questions: kinds.Count = key(
        500, "ruler_qa", "Questions of each task and length. RULER's; the paper's is not known."
    )
    niah_data: str | None = key(None, "niah_plus", "NIAH-Plus in its official format: a file or folder.")
    niah_needles: kinds.Names | dict | None = key(
        None, "niah_plus", "Needles, to build contexts of our own: files of questions in SQuAD's or HotpotQA's format."
    )
    niah_depths: kinds.Percents = key(
        lambda: [float(depth) for depth in range(0, 101, 10)], "niah_plus", "Where it is hidden, percent. Ours."
    )
    niah_lengths: kinds.Counts = key(
        lambda: [4096, 8192, 16384, 32768], "niah_plus", "Lengths of those contexts, in tokens. Ours."
    )
    niah_questions: kinds.Count = key(10, "niah_plus", "Questions of each depth and length. Ours.")
    longbench_v2_data: str = key("THUDM/LongBench-v2", "longbench_v2", "LongBench v2: hub name, or its data.json.")
    plain_data: str | None = key(None, "plain", "Your own questions: a .json or .jsonl file.")
    validation_data: str | None = key(
        None, "validation", "Validation rows of scripts/build_data.py: <dataset_name>_solopo_val.jsonl or .parquet."
    )

    # answers
    max_input_tokens: kinds.Count = key(
        31500,
        "answers ruler_qa niah_plus validation",
        "Longer prompts lose their middle, counted. LongBench's value for windows of 32K.",
    )
    max_new_tokens: kinds.Count = shared(
        "max_new_tokens", "answers", help="Tokens of an answer where the benchmark has no number of its own. Ours."
    )
    temperature: kinds.NotNegative = shared(
        "temperature", "answers", 0.0, "0 is greedy, as in the paper (LongBench v2: 0.1)."
    )
    top_p: kinds.Nucleus = shared("top_p", "answers")
    rope_factor: kinds.Factor | None = key(
        None, "answers", "YaRN: a window so many times as long; 4.0 for Qwen2.5 beyond 32K. A server has its own."
    )
    backend: kinds.Backend = shared("backend", "answers")
    server_urls: str | dict | None = key(
        None,
        "",
        "`openai`: addresses such as http://localhost:8000/v1; several with commas share the load. "
        "{name of the model: addresses} for several.",
    )
    api_key_env: str = shared("api_key_env", "")
    served_model: str | dict | None = key(
        None,
        "answers",
        "`openai`: the model's name at the server; null: model_name_or_path, or the only one it has. "
        "{name of the model: its name there}.",
    )
    openai_endpoint: kinds.Endpoint = shared("openai_endpoint", "answers")
    extra_body: kinds.Written | None = shared("extra_body", "answers")
    concurrency: kinds.Count = shared("concurrency", "")
    timeout: kinds.Positive = shared("timeout", "")
    retries: kinds.Whole = shared("retries", "")
    tensor_parallel_size: kinds.Count = shared("tensor_parallel_size", "")

    # results
    select_by: str | None = key(
        None, "results", "Benchmark that names the best model; `validation` is held out, others are reported, too."
    )
    compare: kinds.Pairs | None = key(
        None, "results", "Pairs of models or `runs`, [`a, b`, ...]: b against a; null: each with the first."
    )
    runs: dict | None = key(
        None, "results", "Models that differ by training seed alone, {row of the report: [their names]}: mean and sd."
    )
    bootstrap_samples: kinds.Count = key(10000, "results", "Resamples of the questions for 95 % intervals. Ours.")
    harness_tasks: kinds.Names | None = key(
        None, "", "Tasks of lm-evaluation-harness, run on each model: leaderboard is the Open LLM Leaderboard."
    )
    harness_args: kinds.Written | None = key(None, "", "More arguments for lm-evaluation-harness.")

    # all
    output_dir: kinds.Needed = key(
        ..., "", "Folder of questions, answers, scores and report; a run continues from it. Required."
    )
    seed: kinds.Seed = shared("seed", "items answers results")


FIELDS = {f.name: f for f in fields(EvalRecipe)}
# benchmark -> keys of which one must say what to ask
SOURCES = {
    "ruler_qa": ("ruler_data",),
    "niah_plus": ("niah_data", "niah_needles"),
    "plain": ("plain_data",),
    "validation": ("validation_data",),
}


def load_recipe(
    path: str, overrides: list[str] | None = None, select: str | None = None, rescore: bool = False
) -> EvalRecipe:
    """Read a recipe from a YAML file and `key=value` words that override it.

    Args:
        path: Of the YAML file.
        overrides: Such as `seed=1`.
        select: A `select_by` that overrides the recipe's; "" is the recipe's, or else the validation rows.
        rescore: As `make_recipe` has it.

    Raises:
        DataError: No such file, no YAML, an unknown key, or a value of the wrong type or out of range.
    """
    values = read_values(path, overrides)
    if select is not None:
        values["select_by"] = select or values.get("select_by") or "validation"
    return make_recipe(values, rescore)


def make_recipe(values: dict[str, Any], rescore: bool = False) -> EvalRecipe:
    """Make a recipe from a dict, checked.

    Args:
        values: By name.
        rescore: Nothing is to be asked: lengths and idle keys, which must be those of the kept answers, are warned of.

    Raises:
        DataError: An unknown key (with the nearest one), a missing one, or a value that cannot be.
    """
    recipe = build(EvalRecipe, TITLE, values)
    if not recipe.models and not recipe.checkpoints:
        raise DataError(f"The {TITLE} lacks `models` or `checkpoints`: which models are to be asked?")
    if not recipe.benchmarks and not recipe.harness_tasks:
        raise DataError(f"The {TITLE} lacks `benchmarks`: {FIELDS['benchmarks'].metadata['help']}")
    for name in [*recipe.benchmarks, *([recipe.select_by] if recipe.select_by else [])]:
        if name not in MAIN_METRIC:
            raise DataError(f"`{name}` is no benchmark; there are {', '.join(MAIN_METRIC)}.")
    if recipe.select_by and recipe.select_by not in recipe.benchmarks:
        file = "".join(f" and give `{key}`" for key in SOURCES.get(recipe.select_by, ())[:1])
        raise DataError(
            f"`select_by: {recipe.select_by}` is not among `benchmarks: {', '.join(recipe.benchmarks)}`; name it "
            f"there{file}, or choose by one of those: `--select BENCHMARK`."
        )
    for name, keys in SOURCES.items():
        if name in recipe.benchmarks and not any(getattr(recipe, source) for source in keys):
            wanted = " or ".join(f"`{source}`" for source in keys)
            raise DataError(f"`benchmarks: {name}` needs {wanted}: {FIELDS[keys[0]].metadata['help']}")
    if recipe.prompts == "official" and "niah_plus" in recipe.benchmarks:
        raise DataError(
            "`prompts: official` cannot be had for niah_plus, whose authors publish prompts for a team of agents and "
            "none for one model; evaluate niah_plus with `prompts: ours`, in an `output_dir` of its own."
        )
    if recipe.prompts == "official" and "longbench_v2" not in recipe.benchmarks:
        raise DataError(
            "`prompts: official` is for longbench_v2, which `benchmarks` does not name; leave it out (`prompts=ours` "
            "on the command line)."
        )
    if len(set(recipe.benchmarks)) < len(recipe.benchmarks):
        raise DataError(f"`benchmarks` names one twice: {', '.join(recipe.benchmarks)}.")
    _check_files(recipe)
    for check in (_check_lengths, _check_idle):
        try:
            check(recipe)
        except DataError as error:
            if not rescore:
                raise
            log.warning(f"{error} The answers that are kept are reported as they are.")
    return recipe


def _check_files(recipe: EvalRecipe) -> None:
    """Refuse tasks and files that are no texts; YAML reads a bare 1, yes or null as something else."""
    for name in ("ruler_data", "niah_needles"):
        value = getattr(recipe, name)
        for task, file in value.items() if isinstance(value, dict) else ():
            if not all(isinstance(text, str) and text.strip() for text in (task, file)):
                raise DataError(
                    f"`{name}` must name the file of each task, {{squad: FILE}}, got {{{task!r}: {file!r}}}; put "
                    "numbers and such into quotes, and several files of a task into one text with commas."
                )


def _check_lengths(recipe: EvalRecipe) -> None:
    """Refuse lengths of built contexts that cannot be asked: without any, or with the evidence cut out of them."""
    built = {"ruler_lengths": "ruler_qa" in recipe.benchmarks}
    built["niah_lengths"] = "niah_plus" in recipe.benchmarks and bool(recipe.niah_needles)
    for name in (name for name, used in built.items() if used):
        lengths, window = getattr(recipe, name), recipe.max_input_tokens
        if not lengths:
            raise DataError(f"`{name}` is empty; give the lengths of the contexts in tokens, such as [4096, 8192].")
        if NEARLY * max(lengths) > window:
            raise DataError(
                f"`{name}: {max(lengths)}` is longer than `max_input_tokens: {window}`, so that the prompts would lose "
                "their middle; raise that, or leave the length out."
            )
    if built["niah_lengths"] and not recipe.niah_depths:
        raise DataError("`niah_depths` is empty; give the depths of the needles in percent, such as [0, 50, 100].")


def _check_idle(recipe: EvalRecipe) -> None:
    """Refuse keys that would change nothing, since another one that they belong to is not set."""
    server = recipe.backend == "openai"
    idle = {
        "with_base": ("`checkpoints`", not recipe.checkpoints),
        "harness_args": ("`harness_tasks`", not recipe.harness_tasks),
        "extra_body": ("`benchmarks`", not recipe.benchmarks) if server else ("`backend: openai`", True),
        "served_model": ("`backend: openai`", not server),
    }
    for name, (needed, missing) in idle.items():
        if missing and getattr(recipe, name):
            none = "false" if name == "with_base" else "null"
            raise DataError(
                f"`{name}` is for {needed}, which the recipe does not have; leave it out (`{name}={none}` on the "
                "command line)."
            )


def sources(recipe: EvalRecipe, benchmark: str) -> list[Path]:
    """List the files and folders on this machine of which a benchmark's questions are made."""
    found = []
    for name, spec in FIELDS.items():
        if benchmark in spec.metadata["stages"]:
            value = getattr(recipe, name)
            parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            names = [name for part in parts if isinstance(part, str) for name in split_names(part)]
            found += [Path(name) for name in names if os.path.exists(name)]
    return found
