"""Say what is asked of a model and what comes back, the same for every backend."""

import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...host.preflight import check_vocabulary
from ...host.template import load_template
from ..files import DataError
from ..recipe import Chat
from ..seeded import digest

log = logging.getLogger(__name__)
FEWER = 256  # tokens of a prompt, or a 20th of it, by which templates and tokenizers may differ; ours


class Call(NamedTuple):
    """Ask for the answers `ks` (their numbers, from 0) to the plain user message `prompt` of the question `id`."""

    id: str
    ks: tuple[int, ...]
    prompt: str
    max_new_tokens: int | None = None  # None: that of `Sampling`
    schema: dict[str, Any] | None = None  # JSON schema that the answers keep to, if what answers can be held to one


@dataclass(frozen=True)
class Model:
    """Name a model that answers: its weights and tokenizer, and where servers have it."""

    path: str  # weights: folder or hub name; of an adapter those of the model below it
    adapter: str | None = None  # folder of a LoRA adapter
    name: str = ""  # part of the names of its files, and perhaps what a server calls it; "": its `place`
    step: int | None = None  # of a checkpoint
    tokenizer: str = ""  # folder or hub name; "": that of the weights
    rope_factor: float | None = None  # YaRN: the window becomes so many times as long
    server_urls: str | None = None  # several with commas
    served_model: str | None = None  # what the servers call it; None: they are asked
    window: int = 0  # tokens of prompt and answer at most, which vLLM makes room for
    alone: bool = True  # if a server has a single model, that one is meant, whatever its name
    served_key: str = "served_model"  # the recipe's key that says what the servers call it, for messages
    shorten: str = "lower `max_input_tokens` or `max_new_tokens`"  # so that prompt and answer fit, for messages

    def __post_init__(self):
        """Fill in the name and the tokenizer where they are not given."""
        object.__setattr__(self, "name", self.name or self.place)
        object.__setattr__(self, "tokenizer", self.tokenizer or self.path)

    @property
    def place(self) -> str:
        """Return what the user would load: the adapter's folder, or the model's."""
        return self.adapter or self.path


class Reply(NamedTuple):
    """Hold answers `ks` of a question as (text, finish reason); a call may come back in several replies.

    `prompt_tokens`: what the server says that it was given, None where nothing is said. `served`: what the server calls
    its only model, if that was asked for want of a known name; "" for a name of ours, None where nothing tells.
    """

    id: str
    ks: tuple[int, ...]
    answers: list[tuple[str, str]]
    prompt_tokens: int | None
    served: str | None = None


def tell_counts(counted: int | None, tokens: int, question: str, template: str, told: set[bool]) -> bool:
    """Return whether a server counts other prompt tokens than training; warn once of a template, once of cut prompts.

    Args:
        counted: What the server says, None where it says nothing.
        tokens: Those of training.
        question: Its name, for the warning.
        template: The recipe's, for the warning.
        told: Holds what was warned of before: whether prompts are cut.
    """
    if counted in (None, tokens):
        return False
    if (cut := cut_by_server(counted, tokens)) in told:
        return True
    told.add(cut)
    why = "its chat template is another one; use `openai_endpoint: completions`, or serve with that template"
    if cut:
        why = "it cuts prompts, or has another tokenizer; give it a longer window, or ask shorter prompts"
    log.warning(
        f"The server counts {counted} prompt tokens for question {question} where training with `template: {template}` "
        f"has {tokens}: {why}."
    )
    return True


def cut_by_server(counted: int | None, tokens: int | None) -> bool:
    """Return whether a server counts so few prompt tokens that it cuts prompts; no template is so much shorter."""
    return counted is not None and tokens is not None and tokens - counted > max(FEWER, tokens // 20)


def load_chat(tokenizer: str, chat: Chat) -> tuple:
    """Load a tokenizer and the chat template, as in training.

    Args:
        tokenizer: Folder or hub name.
        chat: The template and its keys.

    Raises:
        DataError: There is no such template or tokenizer, or the model beside it lacks the template's tokens.
    """
    from transformers import AutoConfig

    try:
        known, template = load_template(
            tokenizer, chat.template, chat.default_system, chat.enable_thinking, chat.trust_remote_code
        )
        config = None
        with suppress(Exception):  # there may be a tokenizer alone, and of what is wrong with a model its loader tells
            config = AutoConfig.from_pretrained(tokenizer, trust_remote_code=chat.trust_remote_code)
        if config is not None:
            check_vocabulary(known, template, config, tokenizer)
    except ValueError as error:
        raise DataError(str(error)) from None
    return known, template


def call_seed(seed: int, call: Call) -> int:
    """Return the seed of a call, from the recipe's and what is asked, so that order and restarts change no answer."""
    return int.from_bytes(digest(seed, call.id, call.ks[0])[:4]) >> 1  # 31 bits: some servers want a signed int
