"""Every key of a data recipe: its default, where the default comes from, which stages it concerns, what is refused.

This is the one definition: recipes, the manifest's settings and the documentation derive from it or are tested against
it. A key that names no stage changes how fast rows are made, never which.
"""

import math
import os
import re
import types
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from ..metrics import RULE
from .files import DataError, file_hash, folder_hash, split_names

STAGES = ("read", "contexts", "sample", "judge", "select", "export")


def key(default: Any, stages: str, help: str):
    """A key of the recipe.

    Args:
        default: A value, or a function that makes one, such as a list.
        stages: Those whose results change with it, separated by spaces; what comes after them follows by itself.
    """
    default = {"default_factory": default} if callable(default) else {"default": default}
    return field(**default, metadata={"stages": tuple(stages.split()), "help": help})


@dataclass
class DataRecipe:
    """Keys of a recipe under examples/yaml/data/. Token counts are of the templated prompt, in the model's tokens."""

    # model
    model_name_or_path: str = key(
        "", "contexts sample select", "The instruct model that is to be trained; it samples its own pairs. Required."
    )
    template: str = key("", "contexts sample select", "The host's chat template, as in training. Required.")
    default_system: str | None = key(None, "contexts sample select", "The host's key; the same as in training.")
    enable_thinking: bool = key(True, "contexts sample select", "The host's key and default; as in training.")
    trust_remote_code: bool = key(False, "", "The host's key and default.")

    # read
    input: str = key(
        "", "read", "Questions: a file of JSON or parquet, a folder, or a hub name; several with commas. Required."
    )
    input_format: Literal["auto", "musique", "hotpotqa", "2wikimultihopqa", "squad", "plain"] = key(
        "auto", "read", "What the rows of `input` look like; `auto` tells by their keys."
    )
    input_subset: str | None = key(None, "read", "Configuration of a hub data set, such as `distractor` of HotpotQA.")
    input_split: str = key("train", "read", "Split of a hub data set.")
    corpus: str | None = key(
        None, "read", "A file of documents (id, title, text): further distractors, and what evidence may name."
    )
    skip_bad: bool = key(False, "read", "Count and skip bad lines instead of stopping at the first.")
    max_questions: int | None = key(
        None, "read", "Use a seeded random choice of so many questions; null: all. Each costs 2 x num_samples answers."
    )

    # contexts
    prompt: str | None = key(
        None, "contexts", "Prompt with {documents} and {question}; null: ours. The paper's wording is not known."
    )
    short_tokens: int = key(1024, "contexts", "Short context, tokens at most. The paper's target (1K).")
    long_tokens: int = key(8192, "contexts", "Long context, tokens at most. The paper's target (8K).")
    distractors: Literal["random", "bm25"] = key(
        "random", "contexts", "`random` (paper), or `bm25`: those most like the question, which are harder."
    )
    allow_answer_in_distractors: bool = key(
        False, "contexts", "Keep distractors that contain an answer or alias; by default they are left out and counted."
    )
    short_subset_of_long: bool = key(
        False, "contexts", "Short distractors are some of the long ones. False is our reading of the paper."
    )
    lossy_short: float = key(
        0.0, "contexts", "Probability that the short context lacks one paragraph of the evidence. 0 in the paper."
    )
    num_workers: int = key(1, "", "Processes that build contexts.")

    # sample
    num_samples: int = key(32, "sample", "Answers per prompt. The paper's N.")
    temperature: float = key(0.85, "sample", "The paper's T.")
    top_p: float = key(1.0, "sample", "Nucleus of sampling; 1 is ours, the paper gives none.")
    max_new_tokens: int = key(1024, "sample select", "Tokens of an answer at most. Ours; the paper's is not known.")
    sample_long: bool = key(True, "sample", "Also sample on the long contexts: for D_long, and to prefer questions.")
    backend: Literal["vllm", "openai", "transformers"] = key(
        "vllm", "sample", "What generates: vLLM in this process, OpenAI-compatible servers, or transformers."
    )
    server_urls: str | None = key(
        None, "", "`openai`: addresses such as http://localhost:8000/v1; several with commas share the load."
    )
    api_key_env: str = key("OPENAI_API_KEY", "", "`openai`: the environment variable that holds the key, if any.")
    served_model: str | None = key(
        None, "sample", "`openai`: the model's name at the server; null: model_name_or_path, or the only one it has."
    )
    openai_endpoint: Literal["chat", "completions"] = key(
        "chat", "sample", "`openai`: `chat` (the server's chat template) or `completions` (the trainer's token ids)."
    )
    extra_body: dict | None = key(
        None, "sample", "`openai`: more keys for each request, such as vLLM's {top_k: -1, repetition_penalty: 1.0}."
    )
    answers_per_call: int | None = key(
        None, "sample", "Answers asked for in one call; null: num_samples, and 8 with `transformers`."
    )
    concurrency: int = key(64, "", "`openai`: requests under way at a time, over all servers. Ours.")
    timeout: float = key(600.0, "", "`openai`: seconds to wait for one request. Ours.")
    retries: int = key(12, "", "`openai`: repeats of a failed request, with growing pauses (12: 4 minutes). Ours.")
    tensor_parallel_size: int = key(1, "", "`vllm`: GPUs that hold one model.")

    # select
    num_rows: int = key(5000, "select", "Rows of the finished set, validation included. The paper's 5,000.")
    val_size: float = key(
        0.0, "select", "Validation rows: a share below 1, or a number of rows; by question. 0 is the host's default."
    )
    balance_length: bool = key(False, "select", "Choose pairs so that chosen and rejected are alike in length.")
    cutoff_len: int = key(
        10240, "select", "Prompt + response at most, as in training; longer ones are dropped. That of our recipes."
    )

    # export
    dataset_dir: str = key("data", "export", "Folder of dataset_info.json. The host's key and default.")
    dataset_name: str = key("", "export", "Entries are called <dataset_name>_solopo, _short_po and so on. Required.")
    export_format: Literal["jsonl", "parquet"] = key("jsonl", "export", "File format of the rows.")

    # all
    work_dir: str = key("", "", "Folder of intermediate files and the manifest; a run continues from it. Required.")
    seed: int = key(42, "read contexts sample select", "Of everything drawn; 42 is the host's default.")


FIELDS = {f.name: f for f in fields(DataRecipe)}
REQUIRED = ("model_name_or_path", "template", "input", "dataset_name", "work_dir")
ENTRY_NAME = re.compile(r"(?!\s)[^/\\,\x00-\x1f\x7f]+(?<!\s)")
# (smallest, largest); the rest of the numbers must be above 0
RANGES = {
    "lossy_short": (0, 1),
    "temperature": (0, math.inf),
    "top_p": (1e-6, 1),
    "retries": (0, math.inf),
    "val_size": (0, math.inf),
    "seed": (0, 2**63 - 1),
}


def settings(recipe: Any, stage: str) -> dict[str, Any]:
    """The keys of a recipe on which a stage's results depend, with their values."""
    return {f.name: getattr(recipe, f.name) for f in fields(recipe) if stage in f.metadata["stages"]}


TOKENIZER = ("*token*.json", "vocab*", "merges.txt", "*.model", "*.tiktoken")
BINARIES = ("*.safetensors", "*.bin")
WEIGHTS = ("config.json", "generation_config.json", *BINARIES)
ADAPTER = ("adapter_config.json", *BINARIES)


def outside_inputs(recipe: DataRecipe, stage: str) -> dict[str, str]:
    """Hashes of what a stage reads from outside the work folder: files of questions, and a model that is a folder.

    The judge's rule is one, too: verdicts that another version of this project gave are given again.
    What lies on a hub is known by its name alone; so is what is behind a server, unless nothing is said of its name
    there and the folder holds weights, which then are taken to be the server's.
    """
    if stage == "read":
        names = [*split_names(recipe.input), *([recipe.corpus] if recipe.corpus else [])]
        return {name: file_hash(name) for name in names if os.path.isfile(name)}
    if stage == "judge":
        return {"the rule of `gives_answer`": str(RULE)}
    model = Path(recipe.model_name_or_path)
    if "model_name_or_path" not in settings(recipe, stage) or not model.is_dir():
        return {}
    if stage != "sample" or (recipe.backend == "openai" and recipe.served_model):
        return {str(model): folder_hash(model, TOKENIZER)}
    if recipe.backend == "openai" and not any(any(model.glob(kind)) for kind in BINARIES):
        return {}
    return {str(model): folder_hash(model, TOKENIZER + WEIGHTS)}


def model_files(made_from: dict[str, Any], inputs: dict[str, str]) -> str | None:
    """Return the hash of the model's folder if a stage knows the model by that, and None if by its name.

    Args:
        made_from: What `settings` returns, or returned.
        inputs: Hashes by name, those of `outside_inputs` among them.
    """
    return inputs.get(str(Path(made_from.get("model_name_or_path") or "")))


def load_recipe(path: str, overrides: list[str] | None = None) -> DataRecipe:
    """A recipe from a YAML file and `key=value` words that override it, as `llamafactory-cli` reads both.

    Raises:
        DataError: No such file, no YAML, an unknown key, or a value of the wrong type or out of range.
    """
    return make_recipe(read_values(path, overrides))


def make_recipe(values: dict[str, Any]) -> DataRecipe:
    """A recipe from a dict, checked.

    Raises:
        DataError: An unknown key (with the nearest one), a missing one, or a value of the wrong type or out of range.
    """
    recipe = build(DataRecipe, "data recipe", values, REQUIRED, RANGES)
    if recipe.short_tokens >= recipe.long_tokens:
        raise DataError(
            f"`short_tokens: {recipe.short_tokens}` must be below `long_tokens: {recipe.long_tokens}`; "
            "the contexts are to differ in length."
        )
    if recipe.val_size >= 1 and recipe.val_size != int(recipe.val_size):
        raise DataError(f"`val_size` must be a share below 1 or a whole number of rows, got {recipe.val_size}.")
    if not ENTRY_NAME.fullmatch(recipe.dataset_name):
        raise DataError(
            f"`dataset_name` begins names of files in `dataset_dir`, and of entries that `dataset` lists with commas: "
            f"it has no slash, comma or control character, and no blank at its ends; got {recipe.dataset_name!r}."
        )
    return recipe


# What follows serves every kind of recipe, which is a dataclass of keys.


def read_values(path: str, overrides: list[str] | None) -> dict[str, Any]:
    """The keys of a YAML file and of `key=value` words, not yet checked."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    for word in overrides or []:
        if "=" not in word:
            raise DataError(f"`{_masked(word)}` is no `key=value`; write for example `seed=1`.")
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_cli(overrides or []))
        values = OmegaConf.to_container(merged, resolve=True)
    except OSError as error:
        raise DataError(f"Cannot read the recipe {path}: {error.strerror or error}.") from None
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        reason = _masked(" ".join(str(error).split()))
        raise DataError(f"{path}: the recipe is no YAML of `key: value`: {reason}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: a recipe is a list of `key: value`, got {type(values).__name__}.")
    return values


def build(cls: type, title: str, values: dict[str, Any], required: tuple[str, ...], ranges: dict[str, tuple]) -> Any:
    """A recipe of the dataclass `cls`, each key checked by its type and range.

    Args:
        title: What sentences call this kind of recipe.
        required: Keys that must not be empty.
        ranges: (smallest, largest) by key, also for the parts of a list; other numbers must be above 0.
    """
    known = {f.name: f for f in fields(cls)}
    for key in values:
        if key not in known:
            near = get_close_matches(str(key), known, n=1, cutoff=0.6)
            hint = f"Did you mean `{near[0]}`? " if near else ""
            raise DataError(f"Unknown key `{key}` in the {title}. {hint}Allowed: {', '.join(known)}.")
    recipe = cls(**{name: _checked(name, known[name].type, value, ranges) for name, value in values.items()})
    for name in required:
        value = getattr(recipe, name)
        if not (value.strip() if isinstance(value, str) else value):
            raise DataError(f"The {title} lacks `{name}`: {known[name].metadata['help']}")
    return recipe


def _checked(name: str, kind: Any, value: Any, ranges: dict[str, tuple]) -> Any:
    """The value in the key's type; `a,b` and a single value become a list where a list is wanted."""
    kinds = get_args(kind) if get_origin(kind) is types.UnionType else (kind,)  # `x | None`, `list[str] | dict`
    if value is None and types.NoneType in kinds:
        return None
    if dict in kinds and (isinstance(value, dict) or kinds[0] is dict):
        kind = dict
    else:
        kind = kinds[0]
    if kind is list:
        return value if isinstance(value, list) else [value]
    if get_origin(kind) is list:
        parts = split_names(value) if isinstance(value, str) else value if isinstance(value, list) else [value]
        parts = [part.strip() if isinstance(part, str) else part for part in parts]
        return [_scalar(name, get_args(kind)[0], part, ranges) for part in parts if part != ""]
    return _scalar(name, kind, value, ranges)


def _scalar(name: str, kind: Any, value: Any, ranges: dict[str, tuple]) -> Any:
    """The value in the key's type; whole numbers become floats where a float is wanted."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise DataError(f"`{name}` must be one of {', '.join(get_args(kind))}; got {value!r}.")
    elif kind is bool:
        if not isinstance(value, bool):
            raise DataError(f"`{name}` must be true or false, got {value!r}.")
    elif kind in (int, float):
        number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        low, high = ranges.get(name, (1, math.inf) if kind is int else (math.ulp(0), math.inf))
        if not number or not low <= value <= high or value == math.inf:
            what = "a whole number" if kind is int else "a number"
            limits = f"from {low} to {high}" if name in ranges and high != math.inf else f">= {low}"
            raise DataError(f"`{name}` must be {what} {limits if name in ranges else '> 0'}, got {value!r}.")
        value = kind(value)
    elif kind is dict:
        if not isinstance(value, dict):
            raise DataError(f"`{name}` must be keys with values, {{a: 1, b: 2}}; got {value!r}.")
        if name in WRITTEN and (secret := _secret_in(value)):
            raise DataError(
                f"`{name}` cannot hold `{secret}`: what stands there is written to files; put a key into the "
                "environment variable that `api_key_env` names, a token of the hub into HF_TOKEN."
            )
    elif not isinstance(value, str):
        raise DataError(f"`{name}` must be a text, got {_masked(repr(value))}; put it in quotes.")
    return value


WRITTEN = ("extra_body", "harness_args")  # keys whose parts are the user's own, and stand in files of a run
SECRET = re.compile(
    r"(.*[_-])?(api[_-]?key|authorization|password|secret|(auth|access|bearer|hf)[_-]?token)|(.*[_-])?headers?|token",
    re.IGNORECASE,
)


def _masked(text: str) -> str:
    """A text without the user and password of the addresses in it."""
    return re.sub(r"(?<=//)[^\s'\"]*@", "", text)


def _secret_in(value: Any, name: str = "") -> str | None:
    """Name of a part that by its name is a secret, or whose value is an address with a password; None: no part is."""
    if SECRET.fullmatch(name) or (isinstance(value, str) and re.search(r"://\S*@", value)):
        return name
    parts = value.items() if isinstance(value, dict) else [("", v) for v in value] if isinstance(value, list) else ()
    return next((found for key, part in parts if (found := _secret_in(part, str(key) or name))), None)
