"""Get answers from a model: vLLM's offline engine, OpenAI-compatible servers, or transformers' `generate`.

Serves the data pipeline and the evaluation, whose recipes have the same keys for it. One function per backend, all of
the same form: calls go in lazily, replies come out as they finish, in any order.
Which prompt token ids the model sees: `vllm`, `transformers` and `openai` with `openai_endpoint: completions` (vLLM and
SGLang take ids) get exactly the trainer's. With `chat` the server applies its own template to the plain user message:
the same ids from `llamafactory-cli api` with the recipe's template; from another server compare `Reply.prompt_tokens`.
"""

import sys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any

from ..files import DataError
from .calls import Call, Model, Reply
from .local import transformers_answers
from .servers import openai_answers
from .vllm import vllm_answers


def generate(recipe: Any, calls: Iterable[Call], model: Model | None = None) -> Iterator[Reply]:
    """Answer all calls with the recipe's backend and sampling settings; temperature 0 is greedy.

    Args:
        recipe: Of data or of an evaluation.
        model: None: the recipe's model_name_or_path, with room for its long contexts.

    Raises:
        DataError: The backend is not installed, refuses a call, or does not answer for longer than `retries` allow.
    """
    if model is None:
        name = recipe.model_name_or_path
        model = Model(name, window=recipe.long_tokens + recipe.max_new_tokens, names=(name,))
    return BACKENDS[recipe.backend](recipe, calls, model)


def check_backend(recipe: Any) -> None:
    """Refuse a backend that cannot answer, before anything is made that it is to be asked.

    Raises:
        DataError: vLLM is not installed, or no server is named.
    """
    if recipe.backend == "vllm" and "vllm" not in sys.modules and find_spec("vllm") is None:
        raise DataError("`backend: vllm` is not installed: pip install '.[vllm]', or use `backend: openai`.")
    if recipe.backend == "openai" and not recipe.server_urls:
        raise DataError("`backend: openai` needs `server_urls`, for example http://localhost:8000/v1.")


BACKENDS = {"vllm": vllm_answers, "openai": openai_answers, "transformers": transformers_answers}
