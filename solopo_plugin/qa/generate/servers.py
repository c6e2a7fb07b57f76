"""Answer by OpenAI-compatible servers, several at a time, through restarts and refusals."""

import asyncio
import logging
import math
import random
import re
import socket
import ssl
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cache

import httpx  # rather than the openai package: it shares load and waits out restarts itself, and is here with the host

from ...host.template import MARKED_BY_TOKENS, encode_prompt, thought_markers
from ..files import DataError, excerpt
from ..recipe import Sampling
from .addresses import Address, addresses, api_key, transports
from .calls import Call, Model, Reply, call_seed, load_chat

log = logging.getLogger(__name__)
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds a server is left alone after one failure, and after many in a row
PASSING = (408, 409, 425, 429)  # HTTP statuses below 500 that another try may cure
BUSY = (429, 503)  # those of a server, or of what stands before it, that has enough to do
LASTING = (501, 505, 511)  # those from 500 on that none will
REFUSED = (400, 422, 500, 501)  # HTTP statuses of a server that does not know `n` or `response_format`
DIED = "EngineCore encountered an issue"  # vLLM's last words, with status 500, before its server ends
TOO_LONG = "context length"  # in vLLM's refusal of a prompt that its window does not hold
SAME = 8  # answers, each like the first one to its question, after which that is said


def openai_answers(sampling: Sampling, model: Model, calls: Iterable[Call]) -> Generator[Reply, None, None]:
    """Answer by OpenAI-compatible servers, `concurrency` requests at a time over all of them."""
    replies = _replies(sampling, model, calls)

    async def following() -> Reply | None:
        return await anext(replies, None)

    with asyncio.Runner() as runner:
        try:
            while (reply := runner.run(following())) is not None:
                yield reply
        finally:
            runner.run(replies.aclose())


async def _replies(sampling: Sampling, model: Model, calls: Iterable[Call]) -> AsyncGenerator[Reply, None]:
    """Keep `concurrency` requests under way; what a server leaves unanswered of a call is asked for one by one."""
    calls, rest, running = iter(calls), deque[Call](), set[asyncio.Task]()
    sameness = _Sameness(sampling.temperature)
    async with _connected(sampling, model) as servers:
        asker = _Asker(sampling, model, servers)
        await asker.find_model()
        try:
            while True:
                while len(running) < sampling.concurrency and (call := rest.popleft() if rest else next(calls, None)):
                    running.add(asyncio.create_task(asker.ask(call)))
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


@asynccontextmanager
async def _connected(sampling: Sampling, model: Model) -> AsyncIterator["_Servers"]:
    timeout = httpx.Timeout(sampling.timeout, connect=10.0, pool=None)
    key, places = api_key(sampling.api_key_env), addresses(model.server_urls)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    direct, by_proxy = transports(places, sampling.concurrency)
    async with httpx.AsyncClient(headers=headers, timeout=timeout, transport=direct, mounts=by_proxy) as client:
        yield _Servers(sampling, client, places, key, model.shorten)


def served_name(sampling: Sampling, model: Model) -> str:
    """Return what the servers of a model call it, by the rule of `openai_answers`.

    Raises:
        DataError: They do not answer, or have several models and none of its name.
    """

    async def name() -> str:
        async with _connected(sampling, model) as servers:
            return (await _model_name(model, servers))[0]

    return asyncio.run(name())


class _Sameness:
    """Say once if answers are drawn and still all answers to a question are one text."""

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


class _Asker:
    """Turn calls into requests to servers of one model, and remember what they turn out not to know."""

    def __init__(self, sampling: Sampling, model: Model, servers: "_Servers"):
        self.sampling, self.model, self.servers = sampling, model, servers
        self.chat = sampling.openai_endpoint == "chat"
        self.path = "/chat/completions" if self.chat else "/completions"
        self.common: dict[str, object] = dict(temperature=sampling.temperature, top_p=sampling.top_p)
        self.keeps_marks = sampling.template in MARKED_BY_TOKENS
        if not self.chat:
            self.tokenizer, self.template = load_chat(model.tokenizer, sampling)
            self.common["stop_token_ids"] = sorted(self.template.get_stop_token_ids(self.tokenizer))
            self.keeps_marks = bool(thought_markers(self.tokenizer, self.template))
        self.takes_n, self.takes_schema, self.keeps_thoughts = True, True, True
        self.gave_n, self.kept_schema = False, False
        self.length = "max_tokens"  # what the servers call the tokens of an answer at most

    async def find_model(self) -> None:
        """Ask the servers what they call the model, before the first call."""
        self.common["model"], self.served = await _model_name(self.model, self.servers)

    async def ask(self, call: Call, again: bool = False) -> tuple[Call, Reply]:
        """Return the call and its reply, with as many answers as the server gave.

        `again`: after HTTP 500. That may pass, and is taken for a refusal of `n` or a schema only the second time.
        """
        if len(call.ks) > 1 and not self.takes_n:
            return call, Reply(call.id, (), [], None)
        own = self._own(call)
        schema = "response_format" in own
        body = self.common | self._prompt(call) | own | (self.sampling.extra_body or {})
        final = (500,) if self._doubtful(call, schema) else ()
        try:
            answers, prompt_tokens = await self.servers.request("POST", self.path, body, self._read, final)
        except _Refused as refusal:
            if refusal.status != 500 or (again and self._doubtful(call, schema)):
                return await self._without(call, own, refusal)
            await asyncio.sleep(FIRST_PAUSE)
            return await self.ask(call, again=True)
        answers = answers[: len(call.ks)]
        self.gave_n, self.kept_schema = self.gave_n or len(answers) > 1, self.kept_schema or schema
        return call, Reply(call.id, call.ks[: len(answers)], answers, prompt_tokens, self.served)

    def _doubtful(self, call: Call, schema: bool) -> bool:
        """Return whether a request has what no answer has shown so far that the servers know."""
        return (len(call.ks) > 1 and not self.gave_n) or (schema and not self.kept_schema)

    def _prompt(self, call: Call) -> dict[str, object]:
        """Return the prompt as messages, or as ids of the template."""
        if not self.chat:
            return {"prompt": encode_prompt(self.tokenizer, self.template, call.prompt)}
        system = self.sampling.default_system
        said = [{"role": "system", "content": system}] if system else []
        return {"messages": [*said, {"role": "user", "content": call.prompt}]}

    def _own(self, call: Call) -> dict[str, object]:
        """Return what belongs to one request alone, as far as the servers know it."""
        own: dict[str, object] = {"n": len(call.ks), "seed": call_seed(self.sampling.seed, call)}
        own[self.length] = call.max_new_tokens or self.sampling.max_new_tokens
        own |= {"skip_special_tokens": False} if self.keeps_marks else {}
        if call.schema and self.takes_schema:
            shape = {"name": "answer", "strict": True, "schema": call.schema}
            own["response_format"] = {"type": "json_schema", "json_schema": shape}
        return own

    async def _without(self, call: Call, own: dict[str, object], refusal: "_Refused") -> tuple[Call, Reply]:
        """Ask once more without what the server may not know of a request; raise what is refused for another reason."""
        if TOO_LONG in str(refusal):
            raise refusal
        if "max_tokens" in own and "max_completion_tokens" in str(refusal):
            self.length = "max_completion_tokens"
            return await self.ask(call)
        if "skip_special_tokens" in own and "skip_special_tokens" in str(refusal):
            if self.keeps_marks:
                log.warning("The server cannot be told to keep what marks a thought, which may count as an answer.")
            self.keeps_marks = False
            return await self.ask(call)
        if "response_format" in own and refusal.status in REFUSED and not (refusal.status == 500 and self.kept_schema):
            _, reply = await self.ask(call._replace(schema=None))  # refused too, where that is not the reason
            if reply.ks and self.takes_schema:
                log.warning(f"HTTP {refusal.status} where answers are to keep to a JSON schema: asked without.")
                self.takes_schema = False
            return call, reply
        if len(call.ks) == 1 or refusal.status not in REFUSED:
            raise refusal
        if self.takes_n:
            log.warning(f"HTTP {refusal.status} where n = {len(call.ks)}: answers are now asked for one by one.")
        self.takes_n = False  # some servers refuse n > 1; if something else is wrong, the single call will say so
        return call, Reply(call.id, (), [], None)

    def _read(self, data: dict) -> tuple[list[tuple[str, str]], int | None]:
        """Return what `read_answers` does, and say once that thoughts are taken out."""
        found = read_answers(data, self.chat)
        if self.chat and self.keeps_thoughts and without_thoughts(data):
            self.keeps_thoughts = False
            log.warning(
                "The server takes thoughts out of its answers (`reasoning_content`): rows made of them would train "
                "answers without a thought. For rows use `openai_endpoint: completions`, or serve without a reasoning "
                "parser."
            )
        return found


async def _model_name(model: Model, servers: "_Servers") -> tuple[str, str | None]:
    """Return `served_model`, else the model's name or place if the server has it, else the only one that it has.

    The second value is `Reply.served`.
    """
    if model.served_model:
        return model.served_model, None

    def names(data: dict) -> list[str]:
        return [str(served["id"]) for served in data["data"]]

    served, own = await servers.request("GET", "/models", None, names), list(dict.fromkeys((model.name, model.place)))
    if found := [name for name in own if name in served]:
        return found[0], ""
    if not served:
        return model.name, None
    if len(served) == 1 and model.alone:
        _warn_once(
            f"The server's only model is {served[0]}, not {' or '.join(own)}: it is asked; if another one is meant, "
            f"stop and serve that, or name it as `{model.served_key}`."
        )
        return served[0], served[0]
    raise DataError(
        f"The server has several models ({', '.join(served)}); name one as `{model.served_key}`."
        if model.alone
        else f"The server has {', '.join(served)}, none of which is called {' or '.join(own)}; say which it is "
        f"with `served_model: {{{model.name}: ...}}`."
    )


@cache
def _warn_once(sentence: str) -> None:
    log.warning(sentence)


def read_answers(data: dict, chat: bool) -> tuple[list[tuple[str, str]], int | None]:
    """Return answers and the server's count of prompt tokens from the body of a completion.

    Raises:
        DataError: An answer is no text, which another try will not change.
        KeyError, TypeError, ValueError: The body is not of that form, or an answer was broken off. `null` and what a
            filter took out count as empty answers.
    """
    answers = []
    for choice in sorted(data["choices"], key=lambda choice: choice.get("index") or 0):
        said = choice["message"] if chat else choice
        if not said.get("content") and (said.get("tool_calls") or said.get("function_call")):
            raise DataError("a call of a tool instead of a text")
        text = said["content" if chat else "text"]
        if not isinstance(text, str | None):
            raise DataError(f"an answer that is a {type(text).__name__} and no text")
        reason = choice.get("finish_reason") or ""
        if reason in ("abort", "error"):
            raise ValueError(f"it ended with `finish_reason: {reason}`")
        answers.append(("" if reason == "content_filter" else text or "", reason))
    if not answers:
        raise ValueError("no answer in it")
    tokens = (data.get("usage") or {}).get("prompt_tokens")
    return answers, tokens if isinstance(tokens, int) else None


def without_thoughts(data: dict) -> bool:
    """Return whether a chat completion has a thought beside the text of an answer, under either name in use."""
    return any(said["message"].get(name) for said in data["choices"] for name in ("reasoning_content", "reasoning"))


class _Refused(DataError):
    """Tell of a request that no repetition will make right; `status`: of HTTP, 0 where the server was not reached."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class _Passing(Exception):
    """Tell of a request that failed and may succeed later, not before `retry_after` seconds, and what may help."""

    def __init__(self, problem: str, retry_after: float = 0.0, advice: str = ""):
        super().__init__(problem)
        self.retry_after, self.advice = retry_after, advice


class _Busy(_Passing):
    """Tell of a request that was sent away by a server with enough to do, which says nothing about the request."""


class _Slow(_Passing):
    """Tell of a request without an answer within `timeout`, which says nothing about a server that answers others."""


@dataclass
class _Server:
    url: str
    auth: tuple[str, str] | None = None
    via: str = ""  # which proxy, for messages
    busy: int = 0  # requests under way
    probes: int = 0  # those of them that were sent after a failure
    room: float = math.inf  # requests that it may have under way
    failures: int = 0  # in a row
    failing_since: float = 0.0  # time.monotonic() of the first of them
    failed_at: float = 0.0  # and of the last
    answered_at: float = 0.0  # and of its last answer; 0: none so far
    free_at: float = 0.0  # time.monotonic() before which it is left alone

    def is_free(self, now: float) -> bool:
        """Return whether it may be asked; after a failure by one request at a time, until it answers any."""
        return self.free_at <= now and (not self.probes if self.failures else self.busy < self.room)

    def gave_answer(self) -> None:
        """Take the server for one that answers, and has room for one more request than it was thought to have."""
        self.failures, self.answered_at, self.room = 0, time.monotonic(), self.room + 1

    def failed(self, trouble: _Passing, sent: float) -> None:
        """Leave the server alone, the longer the more failures there were in a row, with up to a quarter of jitter.

        Requests that were under way together are one failure: of one `sent` before the last nothing is counted.
        """
        now = time.monotonic()
        if sent < self.failed_at:
            self.free_at = max(self.free_at, now + trouble.retry_after)
            return
        self.failed_at, self.failing_since = now, self.failing_since if self.failures else now
        self.room = 1 if isinstance(trouble, _Busy) else self.room
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(self.failures, 30)) * random.uniform(1, 1.25)
        self.failures += 1
        wait = max(pause, trouble.retry_after)
        self.free_at = now + wait
        if self.failures >= 3 or wait > 10:
            log.warning(f"{self.url}{self.via}: {trouble}; next try in {wait:.0f} s.")


class _Servers:
    """Use several servers as one: the least busy one that did not just fail, tried again and again."""

    def __init__(
        self, sampling: Sampling, client: httpx.AsyncClient, places: list[Address], key: str, shorten: str
    ):  # fmt: skip
        self.client, self.retries, self.timeout = client, sampling.retries, sampling.timeout
        self.api_key_env, self.shorten = sampling.api_key_env, shorten
        self.servers = [_Server(place.url, place.auth, place.via) for place in places]
        self.changed = asyncio.Event()  # set, and replaced, where a request ends
        self.secrets = {key, *(secret for place in places for secret in place.secrets)}

    async def request(self, method: str, path: str, body: dict | None, read, final: tuple[int, ...] = ()):
        """Send until an answer comes that `read` can read.

        Two counts end it. A try is the request's own unless the server was too busy for it with others. While no server
        answers anything, a failure of each (`_Server.failed`) is a try of all that wait: they are let in one at a time.

        Args:
            method: Of HTTP.
            path: Behind the server's address.
            body: JSON to send, if any.
            read: Function of the answer's JSON; what it raises makes the answer malformed.
            final: More statuses that count as a refusal.

        Raises:
            DataError: Refused, or failed `retries` + 1 times.
        """
        since, own = time.monotonic(), 0
        while True:
            server = await self._free()
            probe, sent = bool(server.failures), time.monotonic()
            server.busy, server.probes = server.busy + 1, server.probes + probe
            try:
                result = await self._once(server, method, path, body, read, final)
                server.gave_answer()
                return result
            except _Passing as passing:
                trouble = passing
                if not (isinstance(trouble, _Slow) and server.answered_at > sent):
                    server.failed(trouble, sent)
                own += not isinstance(trouble, _Busy) or server.busy == 1
            finally:
                server.busy, server.probes = server.busy - 1, server.probes - probe
                self.changed.set()
                self.changed = asyncio.Event()
            if own > self.retries or min(server.failures for server in self.servers) > self.retries:
                break
        since = since if own > self.retries else server.failing_since
        raise DataError(
            f"{server.url}{path}{server.via} gave no answer in {self.retries + 1} tries over "
            f"{time.monotonic() - since:.0f} s (last: {trouble}); {trouble.advice}see what the server logs and start "
            "again, what is finished is kept."
        )

    async def _once(self, server: _Server, method: str, path: str, body: dict | None, read, final: tuple[int, ...]):
        """Try once; whatever goes wrong leaves as `_Passing` or, where no other try helps, as `_Refused`."""
        place = f"{server.url}{path}{server.via}"
        try:
            response = await self.client.request(method, server.url + path, json=body, auth=server.auth)
        except httpx.HTTPError as error:
            problem = self._excerpt(f"{type(error).__name__} {error}")
            if advice := _lasting(error, not server.answered_at and server.failures >= 2):
                raise _Refused(0, f"{place} cannot be asked ({problem}); {advice}.") from None
            if not isinstance(error, httpx.ReadTimeout):
                raise _Passing(problem) from None
            several = " or `answers_per_call`" * (body is not None and body.get("n", 1) > 1)
            advice = f"raise it, or lower `concurrency`{several}"
            _warn_once(f"No answer within `timeout: {self.timeout:g}` s, which is asked for again: {advice}.")
            raise _Slow(f"{problem}, `timeout: {self.timeout:g}`", advice=f"{advice}, ") from None
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
        if _is_final(status) or (status in final and DIED not in said):
            raise _Refused(status, f"{place} refuses with HTTP {status}: {said}; {self._advice(status, said)}.")
        problem, retry_after = f"HTTP {status} {said}", _retry_after(response)
        if status in BUSY:
            raise _Busy(problem, retry_after, "lower `concurrency` if it takes fewer requests at a time, ")
        raise _Passing(problem, retry_after)

    async def _free(self) -> _Server:
        """Return the least busy server, once one may be asked."""
        while True:
            now = time.monotonic()
            if free := [server for server in self.servers if server.is_free(now)]:
                return min(free, key=lambda server: server.busy)
            rests = [server.free_at - now for server in self.servers if server.free_at > now]
            with suppress(TimeoutError):  # `wait_for` would outlive being cancelled as `changed` is set
                async with asyncio.timeout(min(rests, default=None)):
                    await self.changed.wait()

    def _advice(self, status: int, said: str) -> str:
        if TOO_LONG in said:
            return self.shorten
        if status in (401, 403):
            return f"put a valid key into the environment variable {self.api_key_env}"
        if status == 407:
            return "the proxy wants credentials: write user:password@ before the host in HTTP_PROXY"
        if status < 400 or status in (404, 405):
            return "check `server_urls` (they mostly end in /v1) and `served_model`"
        return "correct the recipe"

    def _excerpt(self, text: str) -> str:
        """Return the beginning of what a server or library says, without keys and passwords that it may repeat."""
        for secret in self.secrets:
            if len(secret) > 3:  # a shorter one keeps nobody out, and would tear words apart
                text = text.replace(secret, "***")
        return excerpt(text, 200)

    def _said(self, response: httpx.Response) -> str:
        return repr(self._excerpt(response.content.decode("utf-8", "replace")))


def _is_final(status: int) -> bool:
    """Return whether a request that ends with this HTTP status would end so again."""
    return 300 <= status < 500 and status not in PASSING or status in LASTING


def _lasting(error: httpx.HTTPError, again: bool) -> str | None:
    """Return what to do about an error that no other try mends; None for one that may pass.

    Args:
        error: What httpx raised.
        again: A few tries failed and none succeeded: before that a name may be new and not yet known.
    """
    if isinstance(error, httpx.LocalProtocolError | httpx.UnsupportedProtocol):
        return "correct the recipe"
    if isinstance(error, httpx.ProxyError) and (status := re.match(r"\d{3}\b", str(error))):
        if _is_final(int(status[0])):
            return "correct HTTP_PROXY, HTTPS_PROXY or ALL_PROXY, or name the server in NO_PROXY"
    cause: BaseException = error
    while isinstance(error, httpx.ConnectError) and (below := cause.__cause__ or cause.__context__):
        cause = below
        if isinstance(cause, ssl.SSLCertVerificationError):
            return "if it is to be trusted, name the file of its certificate in the environment variable SSL_CERT_FILE"
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError):
            return "check whether its address begins with http:// instead of https://"
        if isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN and again:
            return "check the names in the address"
    return None


def _retry_after(response: httpx.Response) -> float:
    """Return the seconds to wait, given by the server as a number or a date; 0 if it gives none."""
    value = response.headers.get("retry-after", "")
    try:
        return float(value) if value[:1].isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return 0.0
