"""Read recipes: dataclasses of keys, from YAML and `key=value` words, each key checked by its type and range.

The keys that recipes of data and of evaluations share are declared here, in groups: what needs them gets its group.
"""

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, get_args

from pydantic import ValidationError

from . import kinds
from .files import DataError, did_you_mean


def key(default: Any, stages: str, help: str) -> Any:
    """Declare a key of a recipe.

    Args:
        default: A value, a function that makes one, such as `list`, or `...` where the recipe must have the key.
        stages: Those whose results change with it, separated by spaces; what comes after them follows by itself.
        help: A sentence that says what it is and where its default comes from.
    """
    default = {} if default is ... else {"default_factory": default} if callable(default) else {"default": default}
    return field(**default, metadata={"stages": tuple(stages.split()), "help": help})


@dataclass(kw_only=True)
class Seeded:
    """Keep the seed of all that is drawn."""

    seed: kinds.Seed = key(42, "", "Of everything drawn; 42 is the host's default.")


@dataclass(kw_only=True)
class Chat:
    """Keep what makes a message the tokens of training."""

    template: kinds.Needed = key(..., "", "The host's chat template, as in training. Required.")
    default_system: str | None = key(None, "", "The host's key; the same as in training.")
    enable_thinking: bool = key(True, "", "The host's key and default; as in training.")
    trust_remote_code: bool = key(False, "", "The host's key and default.")


@dataclass(kw_only=True)
class Sampling(Chat, Seeded):
    """Keep how answers are drawn, by what, and how fast; `Model` says which model gives them."""

    max_new_tokens: kinds.Count = key(1024, "", "Tokens of an answer at most. Ours; the paper's is not known.")
    temperature: kinds.NotNegative = key(0.85, "", "The paper's T.")
    top_p: kinds.Nucleus = key(1.0, "", "Nucleus of sampling; 1 is ours, the paper gives none.")
    backend: kinds.Backend = key(
        "vllm", "", "What generates: vLLM in this process, OpenAI-compatible servers, or transformers."
    )
    api_key_env: str = key("OPENAI_API_KEY", "", "`openai`: the environment variable that holds the key, if any.")
    openai_endpoint: kinds.Endpoint = key(
        "chat", "", "`openai`: `chat` (the server's chat template) or `completions` (the trainer's token ids)."
    )
    extra_body: kinds.Written | None = key(
        None, "", "`openai`: more keys for each request, such as vLLM's {top_k: -1, repetition_penalty: 1.0}."
    )
    concurrency: kinds.Count = key(
        64, "", "Requests under way at a time, over all servers; `transformers`: answers at a time. Ours."
    )
    timeout: kinds.Positive = key(600.0, "", "`openai`: seconds to wait for one request. Ours.")
    retries: kinds.Whole = key(
        12, "", "`openai`: repeats of a failed request, with growing pauses (12: 4 minutes). Ours."
    )
    tensor_parallel_size: kinds.Count = key(1, "", "`vllm`: GPUs that hold one model.")


@dataclass(kw_only=True)
class ContextKeys(Seeded):
    """Keep how contexts are built around the evidence of a question."""

    prompt: str | None = key(
        None, "", "Prompt with {documents} and {question}; null: ours. The paper's wording is not known."
    )
    distractors: kinds.Distractors = key(
        "random", "", "`random` (paper), or `bm25`: those most like the question, which are harder."
    )
    allow_answer_in_distractors: bool = key(
        False, "", "Keep distractors that contain an answer or alias; by default they are left out and counted."
    )


SHARED = {f.name: f for group in (Sampling, ContextKeys) for f in fields(group)}


def shared(name: str, stages: str, default: Any = None, help: str | None = None) -> Any:
    """Declare a key of a group in a recipe. `default`, `help`: where the recipe has another one."""
    spec = SHARED[name]
    if default is None:
        default = ... if spec.default is MISSING else spec.default
    return key(default, stages, help or spec.metadata["help"])


def pick(recipe: Any, group: type) -> Any:
    """Return the keys of a group, with a recipe's values."""
    return group(**{f.name: getattr(recipe, f.name) for f in fields(group)})


def settings(recipe: Any, stage: str) -> dict[str, Any]:
    """Return the keys on which a stage's results depend, with the recipe's values."""
    return {f.name: getattr(recipe, f.name) for f in fields(recipe) if stage in f.metadata["stages"]}


def read_values(path: str, overrides: list[str] | None) -> dict[str, Any]:
    """Read the keys of a YAML file and of `key=value` words that override them; they are not yet checked.

    `key={a: 1}` and `key=[1]` replace the file's value as a whole, `key.a=1` one part of it.

    Raises:
        DataError: No such file, no YAML, or a word without `=`.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    for word in overrides or []:
        if "=" not in word:
            raise DataError(f"`{word}` is no `key=value`; write for example `seed=1`.")
    what = recipe_itself = "the recipe is no YAML of `key: value`"
    try:
        recipe = OmegaConf.load(path)
        if overrides:
            what = f"`{'`, `'.join(overrides)}` cannot be put into the recipe"
        given = OmegaConf.from_cli(overrides or [])
        for name in (word.partition("=")[0] for word in overrides or []):
            if OmegaConf.is_config(OmegaConf.select(given, name, throw_on_resolution_failure=False)):
                OmegaConf.update(recipe, name, None)  # or the recipe's parts would stay beside those that are given
        merged, what = OmegaConf.merge(recipe, given), recipe_itself
        values = OmegaConf.to_container(merged, resolve=True)
    except OSError as error:
        raise DataError(f"Cannot read the recipe {path}: {error.strerror or error}.") from None
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: {what}: {reason}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: a recipe is a list of `key: value`, got {type(values).__name__}.")
    return {str(name): value for name, value in values.items()}


def build(cls: type, title: str, values: dict[str, Any]) -> Any:
    """Make a recipe of the dataclass `cls`, each key checked by its type and range.

    Args:
        cls: With the configuration `kinds.STRICT`, its fields from `key` and `shared`.
        title: What sentences call this kind of recipe.
        values: By name, as `read_values` returns them.

    Raises:
        DataError: An unknown key, with the nearest one; a value of the wrong type or out of range; a missing key.
    """
    try:
        return cls(**values)
    except ValidationError as error:
        sentence = _sentence(cls, title, error.errors(include_url=False))
    raise DataError(sentence)  # not within: pydantic's error shows the value, which may be a password


def _sentence(cls: type, title: str, errors: list) -> str:
    """Say what is wrong with the first key that is unknown, else has a wrong value, else lacks one."""
    rank = {"unexpected_keyword_argument": 0, "missing": 2, "string_pattern_mismatch": 2}
    error = min(errors, key=lambda error: rank.get(error["type"], 1))
    name, kind, known = str(error["loc"][0]), error["type"], {f.name: f for f in fields(cls)}
    value = repr(error["input"])
    if kind == "unexpected_keyword_argument":
        return f"Unknown key `{name}` in the {title}. {did_you_mean(name, known)}Allowed: {', '.join(known)}."
    if rank.get(kind):
        return f"The {title} lacks `{name}`: {known[name].metadata['help']}"
    if kind == "value_error":
        return str(error["ctx"]["error"])
    if kind == "literal_error":
        return f"`{name}` must be one of {', '.join(get_args(known[name].type))}; got {value}."
    if kind == "string_type":
        in_shell = f" In a shell, which takes quotes away: '{name}=\"{value}\"'."
        number = isinstance(error["input"], float | int)
        return f"`{name}` must be a text, got {value}; put it in quotes.{in_shell * number}"
    if kind == "dict_type":
        return f"`{name}` must be keys with values, {{a: 1, b: 2}}; got {value}."
    words = "true or false" if kind == "bool_type" else _range(known[name].type)
    return f"`{name}` must be {words}, got {value}."


def _range(kind: Any) -> str | None:
    """Return what the type of a number, or of some, says of its range."""
    said = [words for words in getattr(kind, "__metadata__", ()) if isinstance(words, str)]
    return said[0] if said else next(filter(None, map(_range, get_args(kind))), None)
