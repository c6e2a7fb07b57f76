"""Read recipes: dataclasses of keys, from YAML and `key=value` words, each key checked by its type and range.

The keys that recipes of data and of evaluations share are declared here, in groups: what needs them gets its group.
"""

import math
import re
import types
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

from .files import DataError, split_names


def key(default: Any, stages: str, help: str):
    """A key of the recipe.

    Args:
        default: A value, or a function that makes one, such as a list.
        stages: Those whose results change with it, separated by spaces; what comes after them follows by itself.
    """
    default = {"default_factory": default} if callable(default) else {"default": default}
    return field(**default, metadata={"stages": tuple(stages.split()), "help": help})


Backend = Literal["vllm", "openai", "transformers"]
Endpoint = Literal["chat", "completions"]
Distractors = Literal["random", "bm25"]


@dataclass
class Seeded:
    """The seed of all that is drawn."""

    seed: int = key(42, "", "Of everything drawn; 42 is the host's default.")


@dataclass
class Chat:
    """What makes a message the tokens of training."""

    template: str = key("", "", "The host's chat template, as in training. Required.")
    default_system: str | None = key(None, "", "The host's key; the same as in training.")
    enable_thinking: bool = key(True, "", "The host's key and default; as in training.")
    trust_remote_code: bool = key(False, "", "The host's key and default.")


@dataclass
class Sampling(Chat, Seeded):
    """How answers are drawn, by what, and how fast; which model gives them says `generate.Model`."""

    max_new_tokens: int = key(1024, "", "Tokens of an answer at most. Ours; the paper's is not known.")
    temperature: float = key(0.85, "", "The paper's T.")
    top_p: float = key(1.0, "", "Nucleus of sampling; 1 is ours, the paper gives none.")
    backend: Backend = key(
        "vllm", "", "What generates: vLLM in this process, OpenAI-compatible servers, or transformers."
    )
    api_key_env: str = key("OPENAI_API_KEY", "", "`openai`: the environment variable that holds the key, if any.")
    openai_endpoint: Endpoint = key(
        "chat", "", "`openai`: `chat` (the server's chat template) or `completions` (the trainer's token ids)."
    )
    extra_body: dict | None = key(
        None, "", "`openai`: more keys for each request, such as vLLM's {top_k: -1, repetition_penalty: 1.0}."
    )
    concurrency: int = key(64, "", "`openai`: requests under way at a time, over all servers. Ours.")
    timeout: float = key(600.0, "", "`openai`: seconds to wait for one request. Ours.")
    retries: int = key(12, "", "`openai`: repeats of a failed request, with growing pauses (12: 4 minutes). Ours.")
    tensor_parallel_size: int = key(1, "", "`vllm`: GPUs that hold one model.")


@dataclass
class Contexts(Seeded):
    """How contexts are built around the evidence of a question."""

    prompt: str | None = key(
        None, "", "Prompt with {documents} and {question}; null: ours. The paper's wording is not known."
    )
    distractors: Distractors = key(
        "random", "", "`random` (paper), or `bm25`: those most like the question, which are harder."
    )
    allow_answer_in_distractors: bool = key(
        False, "", "Keep distractors that contain an answer or alias; by default they are left out and counted."
    )


SHARED = {f.name: f for group in (Sampling, Contexts) for f in fields(group)}


def shared(name: str, stages: str, default: Any = None, help: str | None = None) -> Any:
    """A key of a group, in a recipe. `default`, `help`: where the recipe has another one."""
    spec = SHARED[name]
    return key(spec.default if default is None else default, stages, help or spec.metadata["help"])


def pick(recipe: Any, group: type) -> Any:
    """Return the keys of a group, with a recipe's values."""
    return group(**{f.name: getattr(recipe, f.name) for f in fields(group)})


def settings(recipe: Any, stage: str) -> dict[str, Any]:
    """The keys of a recipe on which a stage's results depend, with their values."""
    return {f.name: getattr(recipe, f.name) for f in fields(recipe) if stage in f.metadata["stages"]}


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
