"""Say what is asked of a model and what comes back, the same for every backend."""

import hashlib
from typing import Any, NamedTuple

from ...host.template import load_template
from ..files import DataError


class Call(NamedTuple):
    """Ask for the answers `ks` (their numbers, from 0) to the plain user message `prompt` of the question `id`."""

    id: str
    ks: tuple[int, ...]
    prompt: str
    max_new_tokens: int | None = None  # None: the recipe's


class Model(NamedTuple):
    """Which model answers, where the recipe alone does not say it."""

    path: str  # weights: folder or hub name; the tokenizer is always that of the recipe's model_name_or_path
    adapter: str | None = None  # folder of a LoRA adapter on top of it
    rope_factor: float | None = None  # YaRN: the window becomes so many times as long
    window: int = 0  # tokens of prompt and answer at most, which vLLM makes room for
    names: tuple[str, ...] = ()  # by which a server may know it
    alone: bool = True  # if a server has a single model, that one is meant, whatever its name


class Reply(NamedTuple):
    """Answers `ks` of a question as (text, finish reason); a call may come back in several replies.

    `prompt_tokens`: what the server says that it was given, None where nothing is said.
    """

    id: str
    ks: tuple[int, ...]
    answers: list[tuple[str, str]]
    prompt_tokens: int | None


def load_chat(recipe: Any) -> tuple:
    """Tokenizer and chat template of the recipe's model, as in training."""
    try:
        return load_template(
            recipe.model_name_or_path, recipe.template, recipe.default_system, recipe.enable_thinking,
            recipe.trust_remote_code,
        )  # fmt: skip
    except ValueError as error:
        raise DataError(str(error)) from None


def call_seed(recipe: Any, call: Call) -> int:
    """Seed of a call, from the recipe's seed and what is asked, so that order and restarts change no answer."""
    text = f"{recipe.seed} {call.id} {call.ks[0]}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1  # 31 bits: some servers want a signed int
