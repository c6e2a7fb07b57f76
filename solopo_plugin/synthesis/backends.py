"""Answers from a model: vLLM's offline engine, OpenAI-compatible servers, or transformers' `generate`.

Serves the data pipeline and the evaluation, whose recipes have the same keys for it. One function per backend, all of
the same form: calls go in lazily, replies come out as they finish, in any order.
Which prompt token ids the model sees: `vllm`, `transformers` and `openai` with `openai_endpoint: completions` (vLLM and
SGLang take ids) get exactly the trainer's. With `chat` the server applies its own template to the plain user message:
the same ids from `llamafactory-cli api` with the recipe's template; from another server compare `Reply.prompt_tokens`.
"""

import asyncio
import gc
import hashlib
import json
import logging
import math
import os
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import httpx  # rather than the openai package: it shares load and waits out restarts itself, and is here with the host

from ..host.template import encode_prompt, load_template
from .files import DataError

log = logging.getLogger(__name__)
VLLM_CHUNK = 64  # prompts per call of the engine, whose answers reach the disk together
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds a server is left alone after one failure, and after many in a row
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes as `max_lora_rank`
PASSING = (408, 409, 425, 429)  # HTTP statuses below 500 that another try may cure


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


def transformers_answers(recipe: Any, calls: Iterable[Call], model: Model) -> Iterator[Reply]:
    """`generate` of transformers, one call at a time, for small models. Nothing of generation_config.json is used."""
    import torch
    from transformers import GenerationConfig

    tokenizer, template = load_chat(recipe)
    stop = sorted(template.get_stop_token_ids(tokenizer))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = load_network(model, recipe.trust_remote_code).to(device).eval()
    network.generation_config = GenerationConfig()
    window, warned = window_of(network.config.get_text_config()), False
    sampling = dict(do_sample=False)
    if recipe.temperature > 0:
        sampling = dict(do_sample=True, temperature=recipe.temperature, top_p=recipe.top_p, top_k=0)
    try:
        for call in calls:
            prompt = torch.tensor([encode_prompt(tokenizer, template, call.prompt)], device=device)
            if not warned and (longest := prompt.shape[1] + (call.max_new_tokens or recipe.max_new_tokens)) > window:
                warned = True
                log.warning(
                    "%s: prompt and answer may have %d tokens, and its window is %d: answers beyond it are not to be "
                    "relied on; lower `max_input_tokens`, or widen the window by YaRN.",
                    model.adapter or model.path, longest, window,
                )  # fmt: skip
            torch.manual_seed(call_seed(recipe, call))
            config = GenerationConfig(
                **sampling, max_new_tokens=call.max_new_tokens or recipe.max_new_tokens, eos_token_id=stop,
                num_return_sequences=len(call.ks), pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            with torch.inference_mode():
                output = network.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
            answers = []
            for ids in output[:, prompt.shape[1] :].tolist():
                end = next((i for i, token in enumerate(ids) if token in stop), None)
                text = tokenizer.decode(ids[:end], skip_special_tokens=True)
                answers.append((text, "length" if end is None else "stop"))
            yield Reply(call.id, call.ks, answers, prompt.shape[1])
    finally:  # the next model needs the memory
        del network
        gc.collect()
        torch.cuda.empty_cache()


def load_network(model: Model, trust_remote_code: bool = False):
    """Weights in the dtype they were saved in, with YaRN and adapter where asked for; the adapter is not merged."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model.path, trust_remote_code=trust_remote_code)
    for name, value in yarn(config, model).items():
        setattr(config, name, value)
    network = AutoModelForCausalLM.from_pretrained(
        model.path, config=config, dtype="auto", trust_remote_code=trust_remote_code
    )
    if model.adapter:
        from peft import PeftModel  # the host brings it along

        network = PeftModel.from_pretrained(network, model.adapter)
    return network


def yarn(config, model: Model) -> dict[str, Any]:
    """Entries of config.json that make the window `rope_factor` times as long by YaRN (arXiv:2309.00071).

    They are those of Qwen2.5's model card; the window that is stretched is config.json's. Empty without a factor.

    Raises:
        DataError: The model's rotary embedding is a scaled one already, as Llama 3.1's is.
    """
    if not model.rope_factor:
        return {}
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type", "none") != "default":
        raise DataError(
            f"`rope_factor: {model.rope_factor:g}` stretches a plain rotary embedding by YaRN, but that of "
            f"{model.path} is `{rope.get('rope_type', 'none')}`; leave the key out."
        )
    window = config.max_position_embeddings
    rope |= {"rope_type": "yarn", "factor": model.rope_factor, "original_max_position_embeddings": window}
    return {"rope_parameters": rope, "max_position_embeddings": int(window * model.rope_factor)}


def window_of(config) -> float:
    """Tokens that a model was made for.

    With YaRN some configurations name the window before it is widened (Qwen2.5's card), others the one after it; of
    other scalings, such as Llama 3.1's, `max_position_embeddings` is the widened one.
    """
    window = getattr(config, "max_position_embeddings", None) or math.inf
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "yarn":
        return window
    return max(window, (rope.get("original_max_position_embeddings") or window) * (rope.get("factor") or 1))


def vllm_answers(recipe: Any, calls: Iterable[Call], model: Model) -> Iterator[Reply]:
    """vLLM's offline engine, `VLLM_CHUNK` prompts at a time. Written for its public interface; has not been run.

    vLLM seeds answer i of a call with the call's seed + i. Its results depend on what runs beside them and are
    reproducible only as far as vLLM's own documentation says.
    """
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise DataError(
            f"`backend: vllm` cannot be loaded ({error}): pip install '.[vllm]', or use `backend: openai`."
        ) from None
    tokenizer, template = load_chat(recipe)
    engine = LLM(
        model=model.path, tokenizer=recipe.model_name_or_path, trust_remote_code=recipe.trust_remote_code,
        seed=recipe.seed % 2**31, tensor_parallel_size=recipe.tensor_parallel_size, max_model_len=model.window,
        **_vllm_options(recipe, model),
    )  # fmt: skip
    lora = {}
    if model.adapter:
        from vllm.lora.request import LoRARequest

        lora = {"lora_request": LoRARequest("adapter", 1, model.adapter)}
    calls = iter(calls)
    try:
        while chunk := list(islice(calls, VLLM_CHUNK)):
            prompts = [{"prompt_token_ids": encode_prompt(tokenizer, template, call.prompt)} for call in chunk]
            params = [
                SamplingParams(
                    n=len(call.ks), temperature=recipe.temperature, top_p=recipe.top_p, seed=call_seed(recipe, call),
                    max_tokens=call.max_new_tokens or recipe.max_new_tokens,
                    stop_token_ids=sorted(template.get_stop_token_ids(tokenizer)),
                )
                for call in chunk
            ]  # fmt: skip
            outputs = engine.generate(prompts, params, use_tqdm=False, **lora)
            for call, prompt, output in zip(chunk, prompts, outputs, strict=True):
                answers = [(answer.text, answer.finish_reason or "") for answer in output.outputs]
                yield Reply(call.id, call.ks, answers, len(prompt["prompt_token_ids"]))
    finally:  # the next model needs the memory
        del engine
        gc.collect()
        with suppress(ImportError):  # what vLLM's maintainers name for it
            from vllm.distributed import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()


def _vllm_options(recipe: Any, model: Model) -> dict[str, Any]:
    """Arguments of the engine for YaRN and an adapter."""
    options = {}
    if model.rope_factor:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(model.path, trust_remote_code=recipe.trust_remote_code)
        options["hf_overrides"] = yarn(config, model)
    if model.adapter:
        rank = json.loads((Path(model.adapter) / "adapter_config.json").read_bytes()).get("r", 8)
        options |= {"enable_lora": True, "max_lora_rank": next((r for r in LORA_RANKS if r >= rank), rank)}
    return options


def openai_answers(recipe: Any, calls: Iterable[Call], model: Model) -> Iterator[Reply]:
    """OpenAI-compatible servers, `concurrency` requests at a time over all of them."""
    replies = _replies(recipe, calls, model)

    async def following() -> Reply | None:
        return await anext(replies, None)

    with asyncio.Runner() as runner:
        try:
            while (reply := runner.run(following())) is not None:
                yield reply
        finally:
            runner.run(replies.aclose())


BACKENDS = {"vllm": vllm_answers, "openai": openai_answers, "transformers": transformers_answers}


async def _replies(recipe: Any, calls: Iterable[Call], model: Model) -> AsyncIterator[Reply]:
    """Keep `concurrency` requests under way; what a server leaves unanswered of a call is asked for one by one."""
    calls, rest, running = iter(calls), deque(), set()
    limits = httpx.Limits(max_connections=recipe.concurrency, max_keepalive_connections=recipe.concurrency)
    timeout = httpx.Timeout(recipe.timeout, connect=10.0, pool=None)
    async with httpx.AsyncClient(headers=_headers(recipe), limits=limits, timeout=timeout) as client:
        servers = _Servers(recipe, client)
        ask = await _asker(recipe, servers, model)
        try:
            while True:
                while len(running) < recipe.concurrency and (call := rest.popleft() if rest else next(calls, None)):
                    running.add(asyncio.create_task(ask(call)))
                if not running:
                    return
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=lambda task: task.exception() is not None):  # answers first, then raise
                    call, reply = task.result()
                    rest.extend(call._replace(ks=(k,)) for k in call.ks[len(reply.ks) :])
                    if reply.ks:
                        yield reply
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


def _headers(recipe: Any) -> dict[str, str]:
    key = os.environ.get(recipe.api_key_env, "")
    return {"Authorization": f"Bearer {key}"} if key else {}


async def _asker(recipe: Any, servers: "_Servers", model: Model):
    """The function that answers one call: (call, reply), the reply with as many answers as the server gave."""
    chat = recipe.openai_endpoint == "chat"
    common = dict(model=await _model_name(recipe, servers, model), temperature=recipe.temperature, top_p=recipe.top_p)
    if not chat:
        tokenizer, template = load_chat(recipe)
        common["stop_token_ids"] = sorted(template.get_stop_token_ids(tokenizer))
    system = [{"role": "system", "content": recipe.default_system}] if recipe.default_system else []
    takes_n = True

    async def ask(call: Call) -> tuple[Call, Reply]:
        nonlocal takes_n
        if len(call.ks) > 1 and not takes_n:
            return call, Reply(call.id, (), [], None)
        if chat:
            prompt = {"messages": [*system, {"role": "user", "content": call.prompt}]}
        else:
            prompt = {"prompt": encode_prompt(tokenizer, template, call.prompt)}
        own = {"n": len(call.ks), "seed": call_seed(recipe, call)}
        own["max_tokens"] = call.max_new_tokens or recipe.max_new_tokens
        body = common | prompt | own | (recipe.extra_body or {})
        path = "/chat/completions" if chat else "/completions"
        try:
            answers, prompt_tokens = await servers.request("POST", path, body, lambda data: read_answers(data, chat))
        except _Refused as refusal:
            if len(call.ks) == 1 or refusal.status not in (400, 422):
                raise
            takes_n = False  # some servers refuse n > 1; if something else is wrong, the single call will say so
            return call, Reply(call.id, (), [], None)
        answers = answers[: len(call.ks)]
        return call, Reply(call.id, call.ks[: len(answers)], answers, prompt_tokens)

    return ask


async def _model_name(recipe: Any, servers: "_Servers", model: Model) -> str:
    """`served_model`, else the first of the model's names that the server has, else the only one that it has."""
    if recipe.served_model:
        return recipe.served_model

    def names(data: dict) -> list[str]:
        return [served["id"] for served in data["data"]]

    served = await servers.request("GET", "/models", None, names)
    if found := [name for name in model.names if name in served]:
        return found[0]
    if not served:
        return model.names[0]
    if len(served) == 1 and model.alone:
        return served[0]
    raise DataError(
        f"The server has several models ({', '.join(served)}); name one as `served_model`."
        if model.alone
        else f"The server has {', '.join(served)}, none of which is called {' or '.join(model.names)}; say which it is "
        f"with `served_model: {{{model.names[0]}: ...}}`."
    )


def read_answers(data: dict, chat: bool) -> tuple[list[tuple[str, str]], int | None]:
    """Answers and the server's count of prompt tokens from the body of a completion.

    Raises:
        KeyError, TypeError, ValueError: The body is not of that form; no text at all counts as an empty answer.
    """
    answers = []
    for choice in sorted(data["choices"], key=lambda choice: choice.get("index") or 0):
        text = choice["message"]["content"] if chat else choice["text"]
        if not isinstance(text, str | None):
            raise TypeError(f"an answer is {type(text).__name__}, not text")
        answers.append((text or "", choice.get("finish_reason") or ""))
    if not answers:
        raise ValueError("no answer in it")
    tokens = (data.get("usage") or {}).get("prompt_tokens")
    return answers, tokens if isinstance(tokens, int) else None


class _Refused(DataError):
    """A request that no repetition will make right."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass
class _Server:
    url: str
    busy: int = 0  # requests under way
    failures: int = 0  # in a row
    free_at: float = 0.0  # time.monotonic() before which it is left alone

    def failed(self, problem: str, retry_after: float) -> None:
        """Leave the server alone, the longer the more failures there were in a row, with up to a quarter of jitter.

        Requests that fail together are one failure.
        """
        now = time.monotonic()
        if now < self.free_at:
            self.free_at = max(self.free_at, now + retry_after)
            return
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**self.failures) * random.uniform(1, 1.25)
        self.failures += 1
        self.free_at = now + max(pause, retry_after)
        wait = self.free_at - now
        if self.failures >= 3 or wait > 10:
            log.warning(f"{self.url}: {problem}; next try in {wait:.0f} s.")


class _Servers:
    """Several servers as one: the least busy one that did not just fail, tried again and again."""

    def __init__(self, recipe: Any, client: httpx.AsyncClient):
        urls = [url.strip().rstrip("/") for url in (recipe.server_urls or "").split(",") if url.strip()]
        if not urls:
            raise DataError("`backend: openai` needs `server_urls`, for example http://localhost:8000/v1.")
        for url in urls:
            if httpx.URL(url).scheme not in ("http", "https"):
                raise DataError(f"`server_urls` must begin with http:// or https://, got {url!r}.")
        self.servers = [_Server(url if httpx.URL(url).path.strip("/") else f"{url}/v1") for url in urls]
        self.client, self.retries, self.api_key_env = client, recipe.retries, recipe.api_key_env

    async def request(self, method: str, path: str, body: dict | None, read):
        """Send until an answer comes that `read` can read.

        Raises:
            DataError: Refused, or failed `retries` + 1 times.
        """
        began = time.monotonic()
        for _ in range(self.retries + 1):
            server = await self._free()
            server.busy += 1
            response, retry_after = None, 0.0
            try:
                response = await self.client.request(method, server.url + path, json=body)
                if response.is_success:
                    result = read(response.json())
                    server.failures = 0
                    return result
                problem, retry_after = f"HTTP {response.status_code} {_excerpt(response)}", _retry_after(response)
            except httpx.HTTPError as error:
                problem = f"{type(error).__name__} {error}".strip()
            except (ValueError, KeyError, TypeError, AttributeError) as error:  # of `read`, or no JSON
                problem = f"a malformed answer ({type(error).__name__}: {error}) {_excerpt(response)}"
            finally:
                server.busy -= 1
            if response is not None and 300 <= response.status_code < 500 and response.status_code not in PASSING:
                raise _Refused(response.status_code, self._refusal(server.url + path, response))
            server.failed(problem, retry_after)
        raise DataError(
            f"{server.url + path} gave no answer in {self.retries + 1} tries over {time.monotonic() - began:.0f} s "
            f"(last: {problem}); see what the server logs and start again, what is finished is kept."
        )

    async def _free(self) -> _Server:
        """The least busy server, once one may be asked; one that failed is tried with a single request at first."""
        while True:
            now = time.monotonic()
            free = [server for server in self.servers if server.free_at <= now]
            if free:
                return min(free, key=lambda server: (bool(server.failures and server.busy), server.busy))
            await asyncio.sleep(min(server.free_at for server in self.servers) - now)

    def _refusal(self, url: str, response: httpx.Response) -> str:
        advice = {
            401: f"put a valid key into the environment variable {self.api_key_env}",
            403: f"put a valid key into the environment variable {self.api_key_env}",
            404: "check `server_urls` (they mostly end in /v1) and `served_model`",
        }.get(response.status_code, "correct the recipe")
        return f"{url} refuses with HTTP {response.status_code}: {_excerpt(response)}; {advice}."


def _excerpt(response: httpx.Response) -> str:
    return repr(" ".join(response.text.split())[:200])


def _retry_after(response: httpx.Response) -> float:
    """Seconds to wait, given by the server as a number or a date; 0 if it gives none."""
    value = response.headers.get("retry-after", "")
    try:
        return float(value) if value[:1].isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return 0.0
