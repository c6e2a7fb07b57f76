"""Get answers from a model: vLLM's offline engine, OpenAI-compatible servers, or transformers in batches.

One function per backend, all of the same form: calls go in lazily, replies come out as they finish, in any order.
Which prompt token ids the model sees: `vllm`, `transformers` and `openai` with `openai_endpoint: completions` (vLLM and
SGLang take ids) get exactly the trainer's. With `chat` the server applies its own template to the plain user message:
the same ids from `llamafactory-cli api` with the recipe's template; from another server compare `Reply.prompt_tokens`.
"""

import sys
from collections.abc import Generator, Iterable
from importlib.util import find_spec

from ..files import DataError
from ..recipe import Sampling
from .calls import Call, Model, Reply
from .local import transformers_answers
from .servers import openai_answers
from .vllm import vllm_answers


def generate(sampling: Sampling, model: Model, calls: Iterable[Call]) -> Generator[Reply, None, None]:
    """Answer all calls; temperature 0 is greedy.

    Raises:
        DataError: The backend is not installed, refuses a call, or does not answer for longer than `retries` allow.
    """
    return BACKENDS[sampling.backend](sampling, model, calls)


def check_backend(backend: str, server_urls: str | dict | None) -> None:
    """Refuse a backend that cannot answer, before anything is made that it is to be asked.

    Raises:
        DataError: vLLM is not installed, or no server is named.
    """
    if backend == "vllm" and "vllm" not in sys.modules and find_spec("vllm") is None:
        raise DataError("`backend: vllm` is not installed: pip install '.[vllm]', or use `backend: openai`.")
    if backend == "openai" and not server_urls:
        raise DataError("`backend: openai` needs `server_urls`, for example http://localhost:8000/v1.")


BACKENDS = {"vllm": vllm_answers, "openai": openai_answers, "transformers": transformers_answers}
