"""Answers from a model: vLLM's offline engine, OpenAI-compatible servers, or transformers' `generate`.

Serves the data pipeline and the evaluation, whose recipes have the same keys for it. One function per backend, all of
the same form: calls go in lazily, replies come out as they finish, in any order.
Which prompt token ids the model sees: `vllm`, `transformers` and `openai` with `openai_endpoint: completions` (vLLM and
SGLang take ids) get exactly the trainer's. With `chat` the server applies its own template to the plain user message:
the same ids from `llamafactory-cli api` with the recipe's template; from another server compare `Reply.prompt_tokens`.
"""

import asyncio
import base64
import gc
import hashlib
import ipaddress
import json
import logging
import math
import os
import random
import re
import socket
import ssl
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import getproxies, proxy_bypass

import httpx  # rather than the openai package: it shares load and waits out restarts itself, and is here with the host

from ..host.template import encode_prompt, load_template
from .files import DataError

log = logging.getLogger(__name__)
VLLM_CHUNK = 64  # prompts per call of the engine, whose answers reach the disk together
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds a server is left alone after one failure, and after many in a row
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes as `max_lora_rank`
PASSING = (408, 409, 425, 429)  # HTTP statuses below 500 that another try may cure
LASTING = (501, 505, 511)  # those from 500 on that none will
SAME = 8  # answers, each like the first one to its question, after which that is said


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


def check_backend(recipe: Any) -> None:
    """Refuse a backend that cannot answer, before anything is made that it is to be asked.

    Raises:
        DataError: vLLM is not installed, or no server is named.
    """
    if recipe.backend == "vllm" and "vllm" not in sys.modules and find_spec("vllm") is None:
        raise DataError("`backend: vllm` is not installed: pip install '.[vllm]', or use `backend: openai`.")
    if recipe.backend == "openai" and not recipe.server_urls:
        raise DataError("`backend: openai` needs `server_urls`, for example http://localhost:8000/v1.")


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
        options |= {"enable_lora": True, "max_lora_rank": max_lora_rank(model.adapter)}
    return options


def max_lora_rank(adapter: str) -> int:
    """The least rank that vLLM takes as `max_lora_rank` and that is enough for the LoRA adapter in a folder."""
    rank = json.loads((Path(adapter) / "adapter_config.json").read_bytes()).get("r", 8)  # peft's default
    return next((r for r in LORA_RANKS if r >= rank), rank)


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
    timeout = httpx.Timeout(recipe.timeout, connect=10.0, pool=None)
    key, places = api_key(recipe), addresses(recipe.server_urls)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    direct, by_proxy = _transports(places, recipe.concurrency)
    sameness = _Sameness(recipe.temperature)
    async with httpx.AsyncClient(headers=headers, timeout=timeout, transport=direct, mounts=by_proxy) as client:
        servers = _Servers(recipe, client, places, key)
        ask = await _asker(recipe, servers, model)
        try:
            while True:
                while len(running) < recipe.concurrency and (call := rest.popleft() if rest else next(calls, None)):
                    running.add(asyncio.create_task(ask(call)))
                if not running:
                    sameness.tell()
                    return
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=lambda task: task.exception() is not None):  # answers first, then raise
                    call, reply = task.result()
                    rest.extend(call._replace(ks=(k,)) for k in call.ks[len(reply.ks) :])
                    if reply.ks:
                        sameness.see(reply)
                        yield reply
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


class _Sameness:
    """Says once if answers are drawn and still all answers to a question are one text."""

    def __init__(self, temperature: float):
        self.temperature, self.count = temperature, 0
        self.first: dict[str, str] = {}  # answer to each question
        self.over = temperature == 0  # nothing more to see

    def see(self, reply: Reply) -> None:
        for text, _ in () if self.over else reply.answers:
            self.count += reply.id in self.first
            self.over = self.over or self.first.setdefault(reply.id, text) != text
        if self.count + 1 >= SAME:
            self.tell()

    def tell(self) -> None:
        if self.count and not self.over:
            log.warning(
                f"Every answer so far is the same text as the first one to its question ({self.count} of them), at "
                f"`temperature: {self.temperature:g}`: the server may ignore `temperature` or `seed`, or answer from a "
                "cache."
            )
        self.over = True


def api_key(recipe: Any) -> str:
    """The key of the environment variable `api_key_env` without white space around it, empty where there is none.

    Raises:
        DataError: It has characters that no HTTP header can carry, or stands in place of the variable's name.
    """
    if recipe.api_key_env not in os.environ and not re.fullmatch("[A-Z_][A-Z0-9_]*", recipe.api_key_env):
        raise DataError(
            "`api_key_env` must be the name of an environment variable, such as OPENAI_API_KEY, and not the key "
            "itself; there is none of the name that is given."
        )
    key = os.environ.get(recipe.api_key_env, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise DataError(
            f"The environment variable {recipe.api_key_env} holds no key: it has characters (such as a new line, or a "
            "letter beyond ASCII) that no header can carry; set it to the key alone."
        )
    return key


class Address(NamedTuple):
    """A server: `url` without credentials and up to its /v1, and (user, password) where the address has them."""

    url: str
    auth: tuple[str, str] | None


def addresses(server_urls: str | None) -> list[Address]:
    """The servers that `server_urls` names, checked.

    Raises:
        DataError: None, or one that can be no server's; what may be a password is not shown.
    """
    found = []
    for text in re.split(r",(?=\s*\w+://)", server_urls or ""):  # a password may hold commas
        if not (text := text.strip(" \t\r\n,")):
            continue
        shown = _without_credentials(text)
        if not re.match("https?://", text, re.IGNORECASE):
            raise DataError(f"`server_urls` must begin with http:// or https://, got {shown!r}.")
        with suppress(httpx.InvalidURL):
            url = httpx.URL(text)
            named = ":" in url.host or re.fullmatch(r"[\w.-]+", url.host)
            port = 80 if url.port is None else url.port
            if named and 0 < port < 2**16 and not url.query and not url.fragment:
                plain = str(url.copy_with(userinfo=b"")).rstrip("/")
                auth = (url.username, url.password) if url.userinfo else None
                found.append(Address(plain if url.path.strip("/") else f"{plain}/v1", auth))
                continue
        raise DataError(
            f"`server_urls` has {shown!r}, which is no address of a server; write it like http://localhost:8000/v1 or "
            "http://[::1]:8000/v1, with nothing behind the path."
        )
    if not found:
        raise DataError("`backend: openai` needs `server_urls`, for example http://localhost:8000/v1.")
    return found


def _without_credentials(address: str) -> str:
    """An address as a message may show it, well formed or not: no user, no password, no query."""
    return re.sub(r"^(\w+://)?.*@", r"\1", address, flags=re.DOTALL).split("?")[0].split("#")[0]


def is_local(host: str) -> bool:
    """Return whether a host name or IP address means this machine."""
    with suppress(ValueError):
        address = ipaddress.ip_address(host)
        return address.is_loopback or address.is_unspecified
    return host == "localhost" or host.endswith(".localhost")


def _proxy(url: httpx.URL) -> str | None:
    """The proxy that the environment names for a server, with its credentials; none for one on this machine."""
    if is_local(url.host) or proxy_bypass(url.netloc.decode("ascii")):
        return None
    proxies = getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


def _transports(places: list[Address], concurrency: int) -> tuple[httpx.AsyncHTTPTransport, dict]:
    """What carries requests straight to servers, and by address those that go through a proxy.

    Raises:
        DataError: The environment names certificates that cannot be loaded, or a proxy that cannot be used.
    """
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    try:
        context = httpx.create_ssl_context()
    except OSError as error:
        raise DataError(
            "The certificates that the environment variable SSL_CERT_FILE or SSL_CERT_DIR names cannot be loaded "
            f"({error.strerror or error}); correct or unset it."
        ) from None
    by_proxy = {}
    for place in places:
        if proxy := _proxy(httpx.URL(place.url)):
            shown = _without_credentials(proxy)
            try:
                by_proxy[place.url] = httpx.AsyncHTTPTransport(proxy=proxy, verify=context, limits=limits)
            except ImportError:
                raise DataError(
                    f"{place.url} is to be asked through the proxy {shown} of the environment, which needs the package "
                    "socksio: pip install 'httpx[socks]', or name the server in NO_PROXY."
                ) from None
            except (ValueError, httpx.InvalidURL):
                raise DataError(
                    f"The environment names {shown!r} as the proxy for {place.url}, which is no address of one; "
                    "correct HTTP_PROXY, HTTPS_PROXY or ALL_PROXY, or name the server in NO_PROXY."
                ) from None
    return httpx.AsyncHTTPTransport(verify=context, limits=limits), by_proxy


async def _asker(recipe: Any, servers: "_Servers", model: Model):
    """The function that answers one call: (call, reply), the reply with as many answers as the server gave."""
    chat = recipe.openai_endpoint == "chat"
    common = dict(model=await _model_name(recipe, servers, model), temperature=recipe.temperature, top_p=recipe.top_p)
    if not chat:
        tokenizer, template = load_chat(recipe)
        common["stop_token_ids"] = sorted(template.get_stop_token_ids(tokenizer))
    system = [{"role": "system", "content": recipe.default_system}] if recipe.default_system else []
    takes_n, gave_n = True, False

    async def ask(call: Call) -> tuple[Call, Reply]:
        nonlocal takes_n, gave_n
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
        final = () if gave_n or len(call.ks) == 1 else (500,)
        try:
            answers, prompt_tokens = await servers.request(
                "POST", path, body, lambda data: read_answers(data, chat), final
            )
        except _Refused as refusal:
            if len(call.ks) == 1 or refusal.status not in (400, 422, 500, 501):
                raise
            if takes_n:
                log.warning(f"HTTP {refusal.status} where n = {len(call.ks)}: answers are now asked for one by one.")
            takes_n = False  # some servers refuse n > 1; if something else is wrong, the single call will say so
            return call, Reply(call.id, (), [], None)
        answers = answers[: len(call.ks)]
        gave_n = gave_n or len(answers) > 1
        return call, Reply(call.id, call.ks[: len(answers)], answers, prompt_tokens)

    return ask


async def _model_name(recipe: Any, servers: "_Servers", model: Model) -> str:
    """`served_model`, else the first of the model's names that the server has, else the only one that it has."""
    if recipe.served_model:
        return recipe.served_model

    def names(data: dict) -> list[str]:
        return [str(served["id"]) for served in data["data"]]

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
        DataError: An answer is no text, which another try will not change.
        KeyError, TypeError, ValueError: The body is not of that form. `null` counts as an empty answer.
    """
    answers = []
    for choice in sorted(data["choices"], key=lambda choice: choice.get("index") or 0):
        said = choice["message"] if chat else choice
        if not said.get("content") and (said.get("tool_calls") or said.get("function_call")):
            raise DataError("a call of a tool instead of a text")
        text = said["content" if chat else "text"]
        if not isinstance(text, str | None):
            raise DataError(f"an answer that is a {type(text).__name__} and no text")
        answers.append((text or "", choice.get("finish_reason") or ""))
    if not answers:
        raise ValueError("no answer in it")
    tokens = (data.get("usage") or {}).get("prompt_tokens")
    return answers, tokens if isinstance(tokens, int) else None


class _Refused(DataError):
    """A request that no repetition will make right; `status`: of HTTP, 0 where the server was not reached."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class _Passing(Exception):
    """A request that failed and may succeed later, not before `retry_after` seconds."""

    def __init__(self, problem: str, retry_after: float = 0.0):
        super().__init__(problem)
        self.retry_after = retry_after


@dataclass
class _Server:
    url: str
    auth: tuple[str, str] | None = None
    via: str = ""  # which proxy, for messages
    busy: int = 0  # requests under way
    failures: int = 0  # in a row
    answered: bool = False  # at least once
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
            log.warning(f"{self.url}{self.via}: {problem}; next try in {wait:.0f} s.")


class _Servers:
    """Several servers as one: the least busy one that did not just fail, tried again and again."""

    def __init__(self, recipe: Any, client: httpx.AsyncClient, places: list[Address], key: str):
        self.client, self.retries, self.api_key_env = client, recipe.retries, recipe.api_key_env
        self.servers, self.secrets = [], {key}
        for url, auth in places:
            proxy = _proxy(httpx.URL(url))
            via = f" (through the proxy {_without_credentials(proxy)} of the environment)" if proxy else ""
            self.servers.append(_Server(url, auth, via))
            if auth:
                self.secrets |= {auth[1] or auth[0], base64.b64encode(":".join(auth).encode()).decode()}

    async def request(self, method: str, path: str, body: dict | None, read, final: tuple[int, ...] = ()):
        """Send until an answer comes that `read` can read.

        Args:
            final: More statuses that count as a refusal.

        Raises:
            DataError: Refused, or failed `retries` + 1 times.
        """
        began = time.monotonic()
        for _ in range(self.retries + 1):
            server = await self._free()
            server.busy += 1
            try:
                result = await self._once(server, method, path, body, read, final)
                server.failures, server.answered = 0, True
                return result
            except _Passing as trouble:
                problem = str(trouble)
                server.failed(problem, trouble.retry_after)
            finally:
                server.busy -= 1
        raise DataError(
            f"{server.url}{path}{server.via} gave no answer in {self.retries + 1} tries over "
            f"{time.monotonic() - began:.0f} s (last: {problem}); see what the server logs and start again, what is "
            "finished is kept."
        )

    async def _once(self, server: _Server, method: str, path: str, body: dict | None, read, final: tuple[int, ...]):
        """One try; whatever goes wrong leaves as `_Passing` or, where no other try helps, as `_Refused`."""
        place = f"{server.url}{path}{server.via}"
        try:
            response = await self.client.request(method, server.url + path, json=body, auth=server.auth)
        except httpx.HTTPError as error:
            problem = self._excerpt(f"{type(error).__name__} {error}")
            if advice := _lasting(error, not server.answered and server.failures >= 2):
                raise _Refused(0, f"{place} cannot be asked ({problem}); {advice}.") from None
            raise _Passing(problem) from None
        except (ValueError, TypeError, OverflowError) as error:  # it could not even be written
            problem = self._excerpt(f"{type(error).__name__} {error}")
            raise _Refused(0, f"{place} cannot be asked ({problem}); correct `extra_body` or the prompt.") from None
        if response.is_success:
            try:
                return read(response.json())
            except DataError as error:
                advice = "have it answer in plain text, without a parser of tools"
                raise _Refused(200, f"{place} gives {error}: {self._said(response)}; {advice}.") from None
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                problem = f"a malformed answer ({type(error).__name__}: {error}) {self._said(response)}"
                raise _Passing(problem) from None
        status, said = response.status_code, self._said(response)
        if _is_final(status) or status in final:
            raise _Refused(status, f"{place} refuses with HTTP {status}: {said}; {self._advice(status)}.")
        raise _Passing(f"HTTP {status} {said}", _retry_after(response))

    async def _free(self) -> _Server:
        """The least busy server, once one may be asked; one that failed is tried with a single request at first."""
        while True:
            now = time.monotonic()
            free = [server for server in self.servers if server.free_at <= now]
            if free:
                return min(free, key=lambda server: (bool(server.failures and server.busy), server.busy))
            await asyncio.sleep(min(server.free_at for server in self.servers) - now)

    def _advice(self, status: int) -> str:
        if status in (401, 403):
            return f"put a valid key into the environment variable {self.api_key_env}"
        if status == 407:
            return "the proxy wants credentials: HTTP_PROXY=http://user:password@host:port"
        if status < 400 or status in (404, 405):
            return "check `server_urls` (they mostly end in /v1) and `served_model`"
        return "correct the recipe"

    def _excerpt(self, text: str) -> str:
        """The beginning of what a server or library says, without keys and passwords that it may repeat."""
        for secret in self.secrets:
            if len(secret) > 3:  # a shorter one keeps nobody out, and would tear words apart
                text = text.replace(secret, "***")
        return " ".join(text.split())[:200]

    def _said(self, response: httpx.Response) -> str:
        return repr(self._excerpt(response.content.decode("utf-8", "replace")))


def _is_final(status: int) -> bool:
    """Return whether a request that ends with this HTTP status would end so again."""
    return 300 <= status < 500 and status not in PASSING or status in LASTING


def _lasting(error: httpx.HTTPError, again: bool) -> str | None:
    """Return what to do about an error that no other try mends; None for one that may pass.

    Args:
        again: A few tries failed and none succeeded: before that a name may be new and not yet known.
    """
    if isinstance(error, httpx.LocalProtocolError | httpx.UnsupportedProtocol):
        return "correct the recipe"
    if isinstance(error, httpx.ProxyError) and (status := re.match(r"\d{3}\b", str(error))):
        if _is_final(int(status[0])):
            return "correct HTTP_PROXY, HTTPS_PROXY or ALL_PROXY, or name the server in NO_PROXY"
    cause: BaseException | None = error
    while isinstance(error, httpx.ConnectError) and (cause := cause.__cause__ or cause.__context__):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return "if it is to be trusted, name the file of its certificate in the environment variable SSL_CERT_FILE"
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError):
            return "check whether its address begins with http:// instead of https://"
        if isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN and again:
            return "check the names in the address"
    return None


def _retry_after(response: httpx.Response) -> float:
    """Seconds to wait, given by the server as a number or a date; 0 if it gives none."""
    value = response.headers.get("retry-after", "")
    try:
        return float(value) if value[:1].isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return 0.0
