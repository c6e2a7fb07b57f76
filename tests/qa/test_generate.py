"""Backends: the trainer's ids reach the model, seeds decide, and servers may fail in every way but for good."""

import base64
import json
import logging
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import wraps
from types import ModuleType, SimpleNamespace

import httpx
import pytest
import torch
from conftest import demo_rows
from material import make_questions, save_tokenizer
from material import recipe as material_recipe
from scripted_server import answering, free_port, scripted, serving
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from solopo_plugin.host.template import MARKED_BY_TOKENS, encode_prompt, template_markers, thought_markers
from solopo_plugin.qa.answers import gives_answer
from solopo_plugin.qa.files import DataError
from solopo_plugin.qa.generate import addresses, servers, vllm
from solopo_plugin.qa.generate import generate as generate_with
from solopo_plugin.qa.generate import local as local_backend
from solopo_plugin.qa.generate.calls import Call, Model, Reply, call_seed, load_chat
from solopo_plugin.qa.generate.servers import read_answers
from solopo_plugin.qa.kinds import REQUEST
from solopo_plugin.qa.recipe import Sampling, pick
from solopo_plugin.synthesis.pipeline import run_pipeline
from solopo_plugin.synthesis.recipe import FIELDS, load_recipe, make_recipe

ANSWERS = {f"Where does person {i} work?": f"Town {i}" for i in range(40)}


@pytest.fixture
def answers_file(tmp_path):
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(ANSWERS))
    return path


pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Servers that failed are asked again at once."""
    monkeypatch.setattr(servers, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(servers, "LONGEST_PAUSE", 0.2)


PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """Nothing of this machine's key, proxies and certificates."""
    for name in (*PROXIES, *map(str.lower, PROXIES), "OPENAI_API_KEY", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)


def openai(urls: str, **keys):
    base = dict(model_name_or_path="none", template="qwen", input="-", dataset_name="d", work_dir="-")
    return make_recipe(base | dict(backend="openai", server_urls=urls, num_samples=4, seed=3) | keys)


def generate(recipe, calls):
    return generate_with(pick(recipe, Sampling), recipe.model, calls)


def chat_of(recipe) -> tuple:
    return load_chat(recipe.model.tokenizer, recipe)


def calls(n: int = 40, ks=(0, 1, 2, 3)) -> list[Call]:
    return [Call(f"q{i}", tuple(ks), f"Some documents.\n\n{question}") for i, question in enumerate(list(ANSWERS)[:n])]


def by_answer(replies) -> dict[tuple[str, int], str]:
    """Texts by question and number; an answer given twice is an error."""
    texts = {}
    for reply in replies:
        assert len(reply.ks) == len(reply.answers)
        for k, (text, _) in zip(reply.ks, reply.answers, strict=True):
            assert (reply.id, k) not in texts
            texts[reply.id, k] = text
    return texts


def expected(recipe, asked: list[Call]) -> dict[tuple[str, int], str]:
    """What the scripted server says when each call comes back whole."""
    return {
        (call.id, k): scripted(call.prompt, call_seed(recipe.seed, call), i, ANSWERS)[0]
        for call in asked
        for i, k in enumerate(call.ks)
    }


def one_by_one(asked: list[Call], first_together: int = 1) -> list[Call]:
    """The calls whose first choices are those of a server that gives fewer than it is asked for."""
    parts = []
    for call in asked:
        parts.append(call._replace(ks=call.ks[:first_together]))
        parts += [call._replace(ks=(k,)) for k in call.ks[first_together:]]
    return [part for part in parts if part.ks]


def test_every_call_is_answered_once_and_by_its_seed(answers_file):
    with serving(answers_file) as server:
        recipe = openai(server.url)
        got = by_answer(generate(recipe, iter(calls())))
        assert got == expected(recipe, calls()) and len(got) == 160
        assert by_answer(generate(recipe, reversed(calls()))) == got
        assert by_answer(generate(openai(server.url, seed=4), calls())) != got
        assert by_answer(generate(openai(server.url.removesuffix("/v1")), calls(2))).items() <= got.items()


@pytest.mark.parametrize(
    "options, together",
    [({"max_n": 1}, 1), ({"max_n": 3}, 3), ({"refuse_n": True}, 0)],
    ids=["n is ignored", "n is capped", "n is refused"],
)
def test_what_a_call_leaves_out_is_asked_for_one_by_one(answers_file, options, together):
    with serving(answers_file, **options) as server:
        recipe = openai(server.url)
        got = by_answer(generate(recipe, calls(10)))
    assert got == expected(recipe, one_by_one(calls(10), together)) and len(got) == 40


FAULTS = dict(busy=0.2, broken=0.2, malformed=0.2, hang=0.1)


def test_faults_leave_no_hole_and_no_double(answers_file, tmp_path):
    """The first try of most requests fails: 429, 503 with HTML, four kinds of malformed bodies, silence."""
    log = tmp_path / "log"
    with serving(answers_file, **FAULTS, log=log, hang_seconds=5) as server:
        recipe = openai(server.url, timeout=0.5, concurrency=8)
        got = by_answer(generate(recipe, calls()))
    assert got == expected(recipe, calls())
    met = {json.loads(line)["fault"] for line in log.read_text().splitlines()}
    assert met == {None, *FAULTS}


def test_retry_after_is_honoured(answers_file):
    with serving(answers_file, busy=1.0, retry_after=1.0) as server:
        began = time.monotonic()
        got = by_answer(generate(openai(server.url), calls(1)))
        assert len(got) == 4 and time.monotonic() - began >= 1.0
    server = servers._Server("url")
    server.failed(servers._Passing("busy"), time.monotonic())
    server.failed(servers._Passing("busy", 60.0), 0.0)  # while it rests already
    assert server.failures == 1 and server.free_at - time.monotonic() > 59
    response = httpx.Response(429, headers={"Retry-After": "Wed, 21 Oct 2065 07:28:00 GMT"})
    assert servers._retry_after(response) > 1e8
    assert servers._retry_after(httpx.Response(429, headers={"Retry-After": "soon"})) == 0


def test_a_server_that_is_dead_for_hours_is_left_alone_no_longer():
    """Pause as after a few failures, where others answer through the night."""
    server = servers._Server("url", failures=5000)
    server.failed(servers._Passing("refused"), 0.0)
    assert server.failures == 5001 and 0 < server.free_at - time.monotonic() <= 1.25 * servers.LONGEST_PAUSE


def sends_away(status: int, at_a_time: int, seconds: float = 0.05):
    """Return how a server answers that takes so many requests at a time, as hosted models and gateways do."""
    room = threading.Semaphore(at_a_time)

    def reply(request):
        if not room.acquire(blocking=False):
            return status, b"too many requests"
        time.sleep(seconds)
        room.release()
        return 200, said()

    return reply


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_takes_a_few_requests_at_a_time_answers_all(status):
    """Count no tries of requests that are sent away while others are answered, and send not many more than it takes."""
    with answering(sends_away(status, 3)) as server:
        recipe = openai(server.url, served_model="m", concurrency=32, retries=2)
        got = by_answer(generate(recipe, calls(ks=(0,)) + calls(ks=(1,)) + calls(ks=(2,))))
    assert len(got) == 120 and len(server.requests) < 240


@pytest.mark.parametrize("status", [500, 429])
def test_a_slow_request_holds_up_no_others_where_one_failed(status):
    """Send one at a time after a failure, whatever else is under way since before it."""
    done, failing = threading.Event(), threading.Lock()

    def reply(request):
        if "person 0 " in request.body["messages"][-1]["content"]:
            done.wait(20)
        elif failing.acquire(blocking=False):
            return status, b"no"
        return 200, said()

    got = []
    with answering(reply) as server:
        for answer in generate(openai(server.url, served_model="m", concurrency=2), calls(ks=(0,))):
            got.append(answer.id)
            if len(got) == 39:
                done.set()
    assert got[-1] == "q0" and len(got) == 40


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_sends_all_away_is_asked_by_one_at_a_time(status):
    """End after as many tries as one request has, whatever the number that waits; say which key may help."""
    with answering(lambda request: (status, b"busy")) as server:
        recipe = openai(server.url, served_model="m", concurrency=8, retries=3)
        with pytest.raises(
            DataError, match=f"gave no answer in 4 tries .*HTTP {status} 'busy'.*lower `concurrency` "
        ) as e:
            list(generate(recipe, calls()))
    assert str(e.value).endswith(".") and 4 <= len(server.requests) <= 8 + 3


def test_a_request_that_is_always_sent_away_ends_the_run_once_the_others_are_answered():
    def reply(request):
        return (429, b"too large") if "person 3 " in request.body["messages"][-1]["content"] else (200, said())

    got = []
    with answering(reply) as server, pytest.raises(DataError, match="gave no answer in 3 tries .*too large"):
        for answer in generate(openai(server.url, served_model="m", concurrency=4, retries=2), calls(ks=(0,))):
            got.append(answer.id)
    assert len(got) == 39


def test_requests_of_a_dead_server_wait_for_one_another():
    """Ask it as often as one request would, not as often for each; where it failed before it answered, none is lost."""
    seen, failing = [], set(range(5, 12))

    def reply(request):
        seen.append(request)
        return (500, b"no") if len(seen) - 1 in failing else (200, said())

    with answering(reply) as server:
        recipe = openai(server.url, served_model="m", concurrency=4, retries=7)
        assert len(by_answer(generate(recipe, calls(ks=(0,))))) == 40
        assert len(seen) == 40 + len(failing)
        failing.update(range(50, 200))
        with pytest.raises(DataError, match="gave no answer in 8 tries .*HTTP 500 'no'"):
            list(generate(recipe, calls(ks=(0,))))
    assert len(seen) <= 50 + 2 * 4 + 7  # twice those under way: one may be answered behind the first failure


@pytest.mark.parametrize("ks, several", [((0,), ""), ((0, 1), " or `answers_per_call`")])
def test_a_request_that_is_slower_than_timeout_is_told_of_and_no_other_waits(ks, several, caplog, monkeypatch):
    """Tell of it once, and in the end; the server is not left alone for it while it answers others."""
    servers._warn_once.cache_clear()
    monkeypatch.setattr(servers, "FIRST_PAUSE", 30.0)
    monkeypatch.setattr(servers, "LONGEST_PAUSE", 30.0)
    got, done = [], threading.Event()

    def reply(request):
        if "person 3 " in request.body["messages"][-1]["content"]:
            done.wait(10)
        time.sleep(0.1)
        return 200, {"choices": [{"index": i, "message": {"content": "a"}} for i in range(request.body["n"])]}

    advice = f"raise it, or lower `concurrency`{several}"
    with answering(reply) as server:
        recipe = openai(server.url, served_model="m", concurrency=4, retries=1, timeout=0.5)
        with pytest.raises(DataError, match=f"over [1-5] s .last: ReadTimeout, `timeout: 0.5`.; {advice}, see"):
            for answer in generate(recipe, calls(ks=ks)):
                got.append(answer.id)
        done.set()
    assert len(got) > 3 and caplog.text.count(f"`timeout: 0.5` s, which is asked for again: {advice}.") == 1


DIES = [dict(die_after=10), dict(die_after=1, slow=5, last_words=True)]


@pytest.mark.parametrize("dies", DIES, ids=["later", "at once"])
def test_a_server_that_comes_back_is_waited_for(answers_file, caplog, dies):
    """It dies in the middle of a request; a new one takes its place after a second, and nothing is lost.

    Its last words, HTTP 500, are not taken for a refusal of n > 1, even where no answer had come before.
    """
    port = free_port()
    recipe = openai(f"http://127.0.0.1:{port}/v1", concurrency=4, retries=40)
    with serving(answers_file, port, **dies) as dying, ThreadPoolExecutor() as thread:
        replies = thread.submit(lambda: list(generate(recipe, calls())))
        assert dying.process.wait(20) == 1
        time.sleep(1)
        with serving(answers_file, port):
            assert by_answer(replies.result()) == expected(recipe, calls())
    assert "ConnectError" in caplog.text and "next try in" in caplog.text


def test_several_servers_share_the_load_and_a_dead_one_is_avoided(answers_file, tmp_path):
    logs = [tmp_path / "a", tmp_path / "b"]
    with (
        serving(answers_file, log=logs[0], slow=0.05) as a,
        serving(answers_file, log=logs[1], slow=0.05) as b,
    ):
        dead = f"http://127.0.0.1:{free_port()}/v1"
        recipe = openai(f"{a.url}, {dead}, {b.url}", concurrency=6)
        began = time.monotonic()
        got = by_answer(generate(recipe, calls()))
        assert time.monotonic() - began < 5
    assert got == expected(recipe, calls())
    seen = [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]
    assert min(map(len, seen)) >= 12 and sum(map(len, seen)) == 40
    assert max(event["running"] for events in seen for event in events) <= 6


def test_concurrency_is_bounded(answers_file, tmp_path):
    log = tmp_path / "log"
    with serving(answers_file, log=log, slow=0.05) as server:
        list(generate(openai(server.url, concurrency=3), calls(20)))
    assert max(json.loads(line)["running"] for line in log.read_text().splitlines()) == 3


def test_calls_are_taken_only_when_they_can_be_sent(answers_file):
    """A prompt of 8K tokens is not made before its turn: memory stays with what is under way."""
    taken = []

    def lazily():
        for call in calls():
            taken.append(call.id)
            yield call

    with serving(answers_file) as server:
        replies = generate(openai(server.url, concurrency=2), lazily())
        for n in range(1, 11):
            next(replies)
            assert len(taken) <= n + 3
        replies.close()


def test_empty_answers_are_answers(answers_file):
    with serving(answers_file, empty=0.5) as server:
        texts = list(by_answer(generate(openai(server.url), calls())).values())
    assert len(texts) == 160 and 50 < texts.count("") < 110


REFUSALS = [
    (dict(api_key="secret"), {}, "HTTP 401: .*Invalid API key.*environment variable OPENAI_API_KEY"),
    (dict(max_prompt=20), {}, "HTTP 400: .*maximum context length is 20 tokens.*; lower `long_tokens` or"),
    (dict(malformed=1.0, always=True), {}, r"gave no answer in 3 tries over .*last: a malformed answer \("),
    (dict(broken=1.0, always=True), {}, "last: HTTP 503 .*upstream"),
    (dict(model="one,two"), {}, r"has several models \(one, two\); name one as `served_model`"),
]


@pytest.mark.parametrize("options, keys, sentence", REFUSALS)
def test_what_no_repetition_mends_is_one_sentence(answers_file, options, keys, sentence, monkeypatch, caplog):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(answers_file, **options) as server:
        with pytest.raises(DataError, match=sentence) as error:
            list(generate(openai(server.url, retries=2, **keys), calls(3)))
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    assert "one by one" not in caplog.text


def test_the_key_comes_from_the_environment(answers_file, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    with serving(answers_file, api_key="secret") as server:
        assert len(by_answer(generate(openai(server.url, api_key_env="MY_KEY"), calls(2)))) == 8


def test_a_server_that_is_not_there_is_tried_again():
    with pytest.raises(DataError, match="gave no answer in 2 tries .*ConnectError"):
        list(generate(openai(f"http://127.0.0.1:{free_port()}", retries=1), calls(1)))


def said(text="Red.", **message) -> dict:
    """A body of a chat with one answer."""
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text} | message}]}


def asked(urls: str, **keys) -> dict[tuple[str, int], str]:
    """One question asked of servers, by default once, with at most three tries."""
    keys = dict(served_model="m", num_samples=1, retries=2) | keys
    return by_answer(generate(openai(urls, **keys), calls(1, tuple(range(keys["num_samples"])))))


def refusal(urls: str, **keys) -> str:
    """The sentence in which that ends."""
    with pytest.raises(DataError) as error:
        asked(urls, **keys)
    assert "\n" not in str(error.value) and str(error.value).endswith(".") and error.value.__cause__ is None
    return str(error.value)


KEYS = [("sk", "Bearer sk"), (" sk\n", "Bearer sk"), ("\tsk x\r\n", "Bearer sk x"), (" ", None)]


@pytest.mark.parametrize("key, sent", KEYS)
def test_white_space_around_the_key_is_not_sent(key, sent, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with answering(lambda request: (200, said())) as server:
        asked(server.url)
    assert [request.headers["Authorization"] for request in server.requests] == [sent]


@pytest.mark.parametrize("character", ["\n", "\t", "\x01", "\u0141", "\udcff", "\x7f"])
def test_a_key_that_no_header_can_carry_is_refused_unseen(character, monkeypatch):
    monkeypatch.setenv("MY_KEY", f"sk{character}SECRET")
    sentence = refusal("http://127.0.0.1:1", api_key_env="MY_KEY")
    assert sentence.startswith("The environment variable MY_KEY holds no key: ") and "SECRET" not in sentence


ADDRESSES = {  # `server_urls`: what becomes of it
    "http://h": "http://h/v1",
    " HTTPS://H:8000/ ,": "https://h:8000/v1",
    "http://h/openai/v1/": "http://h/openai/v1",
    "http://[::1]:8000": "http://[::1]:8000/v1",
    "http://ho_st-1.x": "http://ho_st-1.x/v1",
    "http://a/v1,http://b, https://c:1/d": "http://a/v1 http://b/v1 https://c:1/d",
    "http://user:a,b%40c@h": "http://h/v1 user a,b@c",
    "http://t0ken@h:1": "http://h:1/v1 t0ken ",
}
NO_ADDRESSES = {  # `server_urls`: what is shown of it
    "localhost:8000/v1": "must begin with http:// or https://, got 'localhost:8000/v1'.",
    "ftp://user:SECRET@h": "must begin with http:// or https://, got 'ftp://h'.",
    "user:SECRET@h:8000": "must begin with http:// or https://, got 'h:8000'.",
    "http://": "has 'http://'",
    "http:///v1": "has 'http:///v1'",
    "http:h:8000": "must begin with http:// or https://, got 'http:h:8000'.",
    "http://:8000/v1": "has 'http://:8000/v1'",
    "http://h:port/v1": "has 'http://h:port/v1'",
    "http://h:99999": "has 'http://h:99999'",
    "http://h:0": "has 'http://h:0'",
    "http://h:-1": "has 'http://h:-1'",
    "http://::1:8000": "has 'http://::1:8000'",
    "http://[::1:8000": "has 'http://[::1:8000'",
    "http://300.1.1.1": "has 'http://300.1.1.1'",
    "http://my host": "has 'http://my host'",
    "http://<host>:8000": "has 'http://<host>:8000'",
    "http://{host}": "has 'http://{host}'",
    "http://a, b": "has 'http://a, b'",
    "http://h/v1?key=SECRET": "has 'http://h/v1'",
    "http://h/v1#SECRET": "has 'http://h/v1'",
    "http://user:x/SECRET@h": "has 'http://h'",
    "http://user:x?SECRET@h": "has 'http://h'",
    "http://user:x@SECRET@h:y": "has 'http://h:y'",
    "http://a,http://user:x\nSECRET@h:y": "has 'http://h:y'",
}


@pytest.mark.parametrize("given", ADDRESSES)
def test_addresses_of_servers(given):
    assert " ".join(" ".join((url, *(auth or ()))) for url, auth in addresses.addresses(given)) == ADDRESSES[given]


@pytest.mark.parametrize("given", NO_ADDRESSES)
def test_addresses_that_cannot_be(given):
    sentence = refusal(given)
    assert sentence.startswith(f"`server_urls` {NO_ADDRESSES[given]}") and "SECRET" not in sentence


@pytest.mark.parametrize("given", [None, "", " , "])
def test_no_address(given):
    assert refusal(given).startswith("`backend: openai` needs `server_urls`")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A file with a key and its self-signed certificate for 127.0.0.1."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate")
    folder = tmp_path_factory.mktemp("certificate")
    made = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=x -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*made.split(), "-keyout", "key", "-out", "cert"], cwd=folder, check=True, capture_output=True)
    (folder / "both").write_text((folder / "key").read_text() + (folder / "cert").read_text())
    return folder / "both"


TOOL = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
LASTING = {  # answer of the server, keys of the recipe, the sentence behind its address
    "parts": ((200, said([{"type": "text", "text": "Red."}])), {}, "gives an answer that is a list and no text: "),
    "number": ((200, said(3)), {}, "gives an answer that is a int and no text: "),
    "tool": ((200, said(None, tool_calls=TOOL)), {}, "gives a call of a tool instead of a text: "),
    "tool, no content": ((200, {"choices": [{"message": {"function_call": {}, "tool_calls": TOOL}}]}), {}, "gives a "),
    "function": ((200, said(None, function_call=TOOL[0]["function"])), {}, "gives a call of a tool instead of a text"),
    "moved": ((308, b""), {}, "refuses with HTTP 308: ''; check `server_urls`"),
    "forbidden": ((403, b"no"), {}, "refuses with HTTP 403: 'no'; put a valid key into the environment"),
    "path": ((404, b"no"), {}, "refuses with HTTP 404: 'no'; check `server_urls` (they mostly end in /v1) and"),
    "unprocessable": ((422, b"no"), {}, "refuses with HTTP 422: 'no'; correct the recipe."),
    "not implemented": ((501, b"no"), {}, "refuses with HTTP 501: 'no'; correct the recipe."),
    "no JSON": ((200, said()), {"extra_body": {"top_k": float("nan")}}, "cannot be asked (ValueError Out of range"),
}  # fmt: skip


@pytest.mark.parametrize("case", LASTING)
def test_what_no_retry_can_mend_is_asked_once(case):
    reply, keys, sentence = LASTING[case]
    with answering(lambda request: reply) as server:
        assert refusal(server.url, **keys).startswith(f"{server.url}/chat/completions {sentence}")
    assert len(server.requests) == ("extra_body" not in keys)


def test_certificates_that_are_not_trusted_are_refused_at_once(certificate, monkeypatch):
    """And trusted by SSL_CERT_FILE; a server without TLS and a file without certificates are sentences, too."""

    def reply(request):
        return 200, said()

    with answering(reply) as plain, answering(reply, certificate) as server:
        sentence = refusal(server.url)
        assert "cannot be asked (ConnectError [SSL: CERTIFICATE_VERIFY_FAILED]" in sentence
        assert "SSL_CERT_FILE" in sentence
        sentence = refusal(plain.url.replace("http", "https"))
        assert "cannot be asked (ConnectError [SSL: " in sentence and "http:// instead of https://" in sentence
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert asked(server.url) == {("q0", 0): "Red."} and len(server.requests) == 1
    for bad in ("/no/such/file", __file__):
        monkeypatch.setenv("SSL_CERT_FILE", bad)
        assert refusal(server.url).startswith("The certificates that the environment variable SSL_CERT_FILE or ")


@pytest.mark.parametrize("code, tries", [(socket.EAI_NONAME, 3), (socket.EAI_AGAIN, 6)])
def test_an_unknown_name_is_not_waited_for(code, tries, monkeypatch):
    """A few tries, since a name may come with its server; where the name service itself fails, all of them."""
    seen = []

    def getaddrinfo(host, *args, **kwargs):
        seen.append(host)
        raise socket.gaierror(code, "said no")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    sentence = refusal("http://far", retries=5)
    assert len(seen) == tries and "said no" in sentence
    assert ("cannot be asked" if tries == 3 else "gave no answer in 6 tries") in sentence


@pytest.mark.parametrize("host", ["localhost", "a.localhost", "127.0.0.1", "127.3.2.1", "[::1]", "0.0.0.0"])
def test_this_machine_is_behind_no_proxy(host, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://proxy:1")
    assert addresses.proxy_of(httpx.URL(f"http://{host}:8000/v1")) is None


@pytest.mark.parametrize("host", ["local", "localhost.x", "128.0.0.1", "[::2]", "127.x"])
def test_others_are_behind_the_proxy_of_their_scheme(host, monkeypatch):
    url = httpx.URL(f"http://{host}:8000/v1")
    assert addresses.proxy_of(url) is None
    monkeypatch.setenv("ALL_PROXY", "all:1")
    monkeypatch.setenv("HTTPS_PROXY", "https://secure:1")
    assert addresses.proxy_of(url) == "http://all:1"
    assert addresses.proxy_of(url.copy_with(scheme="https")) == "https://secure:1"
    monkeypatch.setenv("HTTP_PROXY", "http://plain:1")
    assert addresses.proxy_of(url) == "http://plain:1"
    monkeypatch.setenv("NO_PROXY", f"x.y,{host}")
    assert addresses.proxy_of(url) is None


def test_a_server_here_is_asked_straight_and_a_far_one_through_the_proxy(monkeypatch):
    with answering(lambda request: (200, said())) as server:
        monkeypatch.setenv("ALL_PROXY", "socks5://proxy:1")
        monkeypatch.setenv("HTTP_PROXY", f"http://user:pass@127.0.0.1:{server.server_port}")
        assert asked(server.url) == asked("http://far.invalid/v1") == {("q0", 0): "Red."}
    here, far = server.requests
    assert here.path == "/v1/chat/completions" and far.path == "http://far.invalid/v1/chat/completions"
    assert "Proxy-Authorization" not in here.headers
    assert far.headers["Proxy-Authorization"] == f"Basic {base64.b64encode(b'user:pass').decode()}"


def no_socks(monkeypatch):
    monkeypatch.setitem(sys.modules, "socksio", None)


FAR = "http://far.invalid/v1"
BAD_PROXIES = {  # the environment's, and how the sentence begins
    "socks5://user:SECRET@127.0.0.1:1": (
        f"{FAR} is to be asked through the proxy socks5://127.0.0.1:1 of the environment, which needs the package socks"
    ),
    "socks://user:SECRET@h:1": f"The environment names 'socks://h:1' as the proxy for {FAR}, which is no address of",
    "http://user:x/SECRET@h:1": f"The environment names 'http://h:1' as the proxy for {FAR}, which is no address of",
    "http://user:SECRET@127.0.0.1:1": (
        f"{FAR}/chat/completions (through the proxy http://127.0.0.1:1 of the environment) gave no answer in 3 tries "
    ),
}


@pytest.mark.parametrize("proxy", BAD_PROXIES)
def test_a_proxy_that_cannot_be_used_is_named(proxy, monkeypatch):
    no_socks(monkeypatch)
    monkeypatch.setenv("HTTP_PROXY", proxy)
    sentence = refusal(FAR)
    assert sentence.startswith(BAD_PROXIES[proxy]) and "SECRET" not in sentence


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("status", [407, 501, 502])
def test_a_proxy_that_refuses_is_named(scheme, status, monkeypatch):
    """Of an https server it is asked for a tunnel. 502: the server behind it may come back."""
    with answering(lambda request: (status, b"no")) as proxy:
        address = f"http://127.0.0.1:{proxy.server_port}"
        monkeypatch.setenv(f"{scheme.upper()}_PROXY", address.replace("//", "//user:SECRET@"))
        sentence = refusal(f"{scheme}://far.invalid")
    assert f"far.invalid/v1/chat/completions (through the proxy {address} of the environment)" in sentence
    assert "SECRET" not in sentence and len(proxy.requests) == (3 if status == 502 else 1)
    assert ("gave no answer in 3 tries" in sentence) == (status == 502)


@pytest.mark.parametrize("status", [400, 422, 500, 501])
def test_a_server_that_cannot_give_several_answers_is_asked_one_by_one(status, caplog):
    def reply(request):
        return (status, b"n") if request.body["n"] > 1 else (200, said(f"Answer by {request.body['seed']}."))

    with answering(reply) as server:
        recipe = openai(server.url, served_model="m", concurrency=2, retries=0)
        got = by_answer(generate(recipe, calls(3)))
    singles = one_by_one(calls(3), 0)
    assert got == {(call.id, call.ks[0]): f"Answer by {call_seed(recipe.seed, call)}." for call in singles}
    assert sum(request.body["n"] > 1 for request in server.requests) <= (4 if status == 500 else 2)  # once more each
    assert caplog.text.count("asked for one by one") == 1 and f"HTTP {status} where n = 4" in caplog.text


@pytest.mark.parametrize("slow", [False, True], ids=["at once", "after others were answered"])
@pytest.mark.parametrize("schema", [None, {"type": "object"}])
def test_one_error_at_first_is_taken_for_no_refusal(schema, slow, caplog):
    """Ask the same once more before n or the schema is given up; answers are those of a run without the error."""
    first = threading.Lock()

    def reply(request):
        if first.acquire(blocking=False):
            time.sleep(0.5 * slow)
            return 500, b"Internal server error"
        texts = [f"{i} by {request.body['seed']}" for i in range(request.body["n"])]
        return 200, {"choices": [{"index": i, "message": {"content": text}} for i, text in enumerate(texts)]}

    asked = [call._replace(schema=schema) for call in calls(20)]
    with answering(reply) as server:
        recipe = openai(server.url, served_model="m", concurrency=1 + slow)
        got = by_answer(generate(recipe, asked))
    assert {("response_format" in request.body, request.body["n"]) for request in server.requests} == {
        (bool(schema), 4)
    }
    assert len(server.requests) == 21 and "HTTP 500" not in caplog.text
    assert got == {(call.id, k): f"{k} by {call_seed(recipe.seed, call)}" for call in asked for k in call.ks}


def test_an_error_of_a_server_that_gave_several_answers_passes():
    """The same call is repeated, so that its answers are those of a run without the error."""
    met = []

    def reply(request):
        if len(server.requests) == 2:
            met.append(request.body["seed"])
            return 500, b"out of memory"
        texts = [f"{i} by {request.body['seed']}" for i in range(request.body["n"])]
        return 200, {"choices": [{"index": i, "message": {"content": text}} for i, text in enumerate(texts)]}

    with answering(reply) as server:
        recipe = openai(server.url, served_model="m", concurrency=1)
        got = by_answer(generate(recipe, calls(3)))
    assert len(met) == 1 and len(server.requests) == 4
    assert got == {(call.id, k): f"{k} by {call_seed(recipe.seed, call)}" for call in calls(3) for k in call.ks}


def alike(request) -> tuple[int, dict]:
    return 200, {"choices": [{"index": i, "message": {"content": "Red."}} for i in range(request.body["n"])]}


def alike_one_by_one(request) -> tuple[int, dict]:
    return 200, said("Red.")


def one_differs(request) -> tuple[int, dict]:
    texts = ["Red."] * 3 + ["Blue."]
    return 200, {"choices": [{"index": i, "message": {"content": text}} for i, text in enumerate(texts)]}


SAMENESS = [  # server, keys, questions, number of answers that are told of
    (alike, {}, 1, 3), (alike, {}, 9, 9), (alike_one_by_one, {}, 1, 3), (alike, {"num_samples": 32}, 1, 31),
    (alike, {"temperature": 0.0}, 9, None), (alike, {"num_samples": 1}, 9, None), (one_differs, {}, 9, None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("device", "dtype", "told"),
    [("cuda", torch.float32, True), ("cuda", torch.bfloat16, False), ("cpu", torch.float32, False)],
)
def test_a_gpu_that_answers_in_fp32_is_told_of(device, dtype, told, caplog):
    local_backend._warn_of_fp32(SimpleNamespace(dtype=dtype), device, Model("trained"))
    assert caplog.text.count("trained: its weights are in fp32, in which a GPU answers several times as slowly") == told


@pytest.mark.parametrize("reply, keys, questions, told", SAMENESS)
def test_answers_that_are_all_the_same_are_told_of_once(reply, keys, questions, told, caplog):
    with answering(reply) as server:
        recipe = openai(server.url, served_model="m", concurrency=1, **keys)
        list(generate(recipe, calls(questions, tuple(range(recipe.num_samples)))))
    assert caplog.text.count("Every answer so far is the same text") == (told is not None)
    assert told is None or f"({told} of them), at `temperature: 0.85`" in caplog.text


SENTINEL = "SENTINEL0123456789"
ECHOES = {  # what a server may do, which repeats all that it was sent to prove who asks
    "unauthorised": 401, "forbidden": 403, "not found": 404, "unprocessable": 422, "broken": 500, "busy": 429,
    "malformed": 200,
}  # fmt: skip


def everything_said(error: BaseException | None, caplog, capfd) -> str:
    """Messages, log records with their arguments, output, and the tracebacks of an error and of all before it."""
    parts = [caplog.text, *(repr(vars(record)) for record in caplog.records), *capfd.readouterr()]
    while error:
        parts += [*traceback.format_exception(error), repr(error), repr(error.args)]
        error = error.__cause__ or error.__context__
    return "\n".join(parts)


def hidden_in(text: str) -> bool:
    """Whether a text tells the sentinel, plain or as basic authentication has it."""
    return SENTINEL in text or base64.b64encode(f"user:{SENTINEL}".encode()).decode() in text


@pytest.mark.parametrize("case", ECHOES)
@pytest.mark.parametrize("where", ["key", "address"])
def test_no_secret_is_told_whatever_a_server_answers(case, where, monkeypatch, caplog, capfd):
    """Every logger at its most talkative; the server repeats the credentials, which it must have got."""
    caplog.set_level(logging.DEBUG)
    if where == "key":
        monkeypatch.setenv("OPENAI_API_KEY", f"\t{SENTINEL}\n")

    def reply(request):
        given = request.headers["Authorization"]
        plain = base64.b64decode(given.split()[1]).decode() if given.startswith("Basic") else given
        return ECHOES[case], {"error": {"message": f"Got {given}, that is {plain}"}}

    with answering(reply) as server:
        url = server.url if where == "key" else server.url.replace("//", f"//user:{SENTINEL}@")
        with pytest.raises(DataError, match=r"Got B\w+ \*\*\*, that is") as error:
            asked(url)
    assert hidden_in(server.requests[0].headers["Authorization"])
    assert not hidden_in(everything_said(error.value, caplog, capfd))


SECRET_PLACES = {  # environment, keys of the recipe; none of them gets an answer
    "two lines": ({"OPENAI_API_KEY": f"sk\n{SENTINEL}"}, {}),
    "tab": ({"OPENAI_API_KEY": f"sk\t{SENTINEL}"}, {}),
    "not latin": ({"OPENAI_API_KEY": f"{SENTINEL}\u0416"}, {}),
    "no bytes of UTF-8": ({"OPENAI_API_KEY": f"{SENTINEL}\udcff"}, {}),
    "key as name": ({}, {"api_key_env": f"sk-{SENTINEL}"}),
    "key as name, one word": ({}, {"api_key_env": f"sk{SENTINEL}"}),
    "nobody there": ({"OPENAI_API_KEY": SENTINEL}, {}),
    "nobody at the address": ({}, {"server_urls": f"http://user:{SENTINEL}@127.0.0.1:1"}),
    "port": ({}, {"server_urls": f"http://user:{SENTINEL}@127.0.0.1:x"}),
    "slash": ({}, {"server_urls": f"http://user:x/{SENTINEL}@127.0.0.1:1"}),
    "new line": ({}, {"server_urls": f"http://user:{SENTINEL}\n@127.0.0.1:1"}),
    "no scheme": ({}, {"server_urls": f"user:{SENTINEL}@127.0.0.1:1"}),
    "query": ({}, {"server_urls": f"http://127.0.0.1:1/v1?key={SENTINEL}"}),
    "no TLS": ({"OPENAI_API_KEY": SENTINEL}, {"server_urls": "https://HERE"}),
    "dead proxy": ({"HTTP_PROXY": f"http://user:{SENTINEL}@127.0.0.1:1"}, {"server_urls": FAR}),
    "proxy in vain": ({"HTTP_PROXY": f"http://user:{SENTINEL}@HERE"}, {"server_urls": FAR}),
    "tunnel in vain": ({"HTTPS_PROXY": f"http://user:{SENTINEL}@HERE"}, {"server_urls": "https://far.invalid"}),
    "proxy malformed": ({"HTTP_PROXY": f"http://user:x/{SENTINEL}@127.0.0.1:1"}, {"server_urls": FAR}),
    "proxy unknown": ({"HTTP_PROXY": f"gopher://user:{SENTINEL}@127.0.0.1:1"}, {"server_urls": FAR}),
    "socks": ({"ALL_PROXY": f"socks5://user:{SENTINEL}@127.0.0.1:1"}, {"server_urls": FAR}),
    "several, as a list": ({}, {"server_urls": [f"http://user:{SENTINEL}@h", f"http://user:x/{SENTINEL}@h"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", SECRET_PLACES)
def test_no_secret_is_told_where_no_server_answers(case, monkeypatch, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    no_socks(monkeypatch)
    environment, keys = SECRET_PLACES[case]
    with answering(lambda request: (407, b"no")) as server:
        here = f"127.0.0.1:{server.server_port}"
        for name, value in environment.items():
            monkeypatch.setenv(name, value.replace("HERE", here))
        keys = {name: value.replace("HERE", here) if isinstance(value, str) else value for name, value in keys.items()}
        with pytest.raises(DataError) as error:
            asked(**{"urls": keys.pop("server_urls", "http://127.0.0.1:1")} | keys)
    told = everything_said(error.value, caplog, capfd)
    assert not hidden_in(told) and "\n" not in str(error.value)


@pytest.mark.parametrize("where", ["key", "address"])
def test_no_file_of_a_pipeline_holds_a_secret(where, tmp_path, monkeypatch, caplog, capfd):
    """Refused at first, with the credentials repeated; then to the end, with other addresses in between."""
    caplog.set_level(logging.DEBUG)
    questions, refusing = make_questions(6), [True]

    def reply(request):
        if refusing:
            return 401, {"error": request.headers["Authorization"]}
        prompt = request.body["messages"][-1]["content"]
        gold = next(row["answers"][0] for row in questions if row["question"] in prompt)
        texts = [f"Thought {i}. The answer is: {gold if i % 2 else 'No answer.'}" for i in range(request.body["n"])]
        return 200, {"choices": [{"index": i, "message": {"content": text}} for i, text in enumerate(texts)]}

    if where == "key":
        monkeypatch.setenv("OPENAI_API_KEY", f"{SENTINEL}\n")
    with answering(reply) as server:
        url = server.url if where == "key" else server.url.replace("//", f"//user:{SENTINEL}@")
        keys = dict(backend="openai", server_urls=url, served_model="m", num_rows=4)
        recipe = material_recipe(tmp_path, save_tokenizer(tmp_path / "tokenizer"), questions, **keys)
        with pytest.raises(DataError, match="refuses with HTTP 401") as error:
            run_pipeline(recipe)
        refusing.clear()
        run_pipeline(recipe)
    files = [path for part in ("work", "data") for path in (tmp_path / part).rglob("*") if path.is_file()]
    assert {"manifest.json", "samples.long.jsonl", "dataset_info.json"} <= {path.name for path in files}
    told = everything_said(error.value, caplog, capfd) + "".join(
        path.read_bytes().decode(errors="replace") for path in files
    )
    assert not hidden_in(told)


@pytest.mark.parametrize(
    "words", ["http://user:SECRET@h", "server_urls={a: http://user:SECRET@h", "server_urls=[http://user:x/SECRET@h]"]
)
def test_overrides_that_cannot_be_read_are_shown_without_passwords(words, tmp_path):
    (tmp_path / "recipe.yaml").write_text("seed: 1")
    with pytest.raises(DataError) as error:
        load_recipe(str(tmp_path / "recipe.yaml"), [words])
    assert "SECRET" not in str(error.value)


BODIES = [  # more keys of a body, and the one that is told of
    ({"api_key": SENTINEL}, "api_key"),
    ({"Authorization": SENTINEL}, "Authorization"),
    ({"extra_headers": {"X": SENTINEL}}, "extra_headers"),
    ({"a": [{"client-secret": SENTINEL}]}, "client-secret"),
    ({"a": {"b": [f"http://user:{SENTINEL}@h"]}}, "b"),
]


@pytest.mark.parametrize("body, name", BODIES)
def test_a_secret_in_a_body_is_refused_since_the_manifest_holds_it(body, name):
    with pytest.raises(DataError, match=f"^`extra_body` cannot hold `{name}`: what stands there is written") as error:
        openai("http://h", extra_body=body)
    assert SENTINEL not in str(error.value)


SET = {  # what a body cannot hold, and the keys that set it: of the model that is trained, that asks, that judges
    "temperature": ("temperature", "temperature", "judge_temperature"),
    "top_p": ("top_p", "top_p", None),
    "seed": ("seed", "seed", "seed"),
    "model": ("served_model", "ask_served_model", "judge_served_model"),
    "max_tokens": ("max_new_tokens", "max_new_tokens", "judge_max_new_tokens"),
    "max_completion_tokens": ("max_new_tokens", "max_new_tokens", "judge_max_new_tokens"),
    "n": (None, None, None),
    "messages": (None, None, None),
    "prompt": (None, None, None),
}


@pytest.mark.parametrize("name", REQUEST)
def test_keys_of_a_body_that_the_recipe_sets_and_reports_are_refused(name):
    for body, key in zip(("extra_body", "ask_extra_body", "judge_extra_body"), SET[name], strict=True):
        advice = f"set `{key}` of the recipe" if key else "leave it out"
        with pytest.raises(DataError, match=f"^`{body}` cannot hold `{name}`, which every request has: {advice}.$"):
            openai("http://h", **{body: {"top_k": 1, name: 1}})
        assert key is None or key in FIELDS


@pytest.mark.parametrize("name", ["min_tokens", "stop_token_ids", "eos_token", "top_k", "secretary", "guided_json"])
def test_keys_of_a_body_that_are_no_secrets_stay(name):
    assert openai("http://h", extra_body={name: 1}).extra_body == {name: 1}


def test_more_keys_of_the_body(answers_file, tmp_path):
    log = tmp_path / "log"
    with serving(answers_file, log=log) as server:
        list(generate(openai(server.url, extra_body={"top_k": -1}, served_model="m"), calls(1)))
    sent = json.loads(log.read_text())["keys"]
    assert sent == sorted(["max_tokens", "messages", "model", "n", "seed", "temperature", "top_k", "top_p"])


@pytest.mark.parametrize(
    "beside", [{}, {"reasoning_content": None}, {"reasoning_content": "So."}, {"reasoning": "So."}]
)
def test_thoughts_that_a_server_takes_out_are_told_of_once(beside, caplog):
    """As vLLM's reasoning parsers do, under the older and the newer name."""
    body = {"choices": [{"index": 0, "message": {"content": "Here."} | beside}]}
    with answering(lambda request: (200, body)) as server:
        replies = list(generate(openai(server.url, served_model="m", num_samples=1), calls(3, (0,))))
    assert [reply.answers for reply in replies] == [[("Here.", "")]] * 3
    assert caplog.text.count("takes thoughts out of its answers") == ("So." in beside.values())


def test_the_key_that_names_a_servers_model_is_that_of_its_role(answers_file, caplog):
    servers._warn_once.cache_clear()
    roles = {
        "served_model": openai("-", judge="model").judging[1],
        "judge_served_model": openai("-", judge="model", judge_server_urls="http://b").judging[1],
        "ask_served_model": openai("-", ask_server_urls="http://b").asker.model,
    }
    assert [model.served_key for model in roles.values()] == list(roles)
    assert openai("-", ask_server_urls="http://b").model.served_key == "served_model"
    with serving(answers_file) as one, serving(answers_file, model="x,y") as two:
        for key, model in roles.items():
            for _ in range(2):
                list(generate_with(pick(openai("-"), Sampling), replace(model, server_urls=one.url), calls(1)))
            with pytest.raises(DataError, match=rf"has several models \(x, y\); name one as `{key}`\."):
                list(generate_with(pick(openai("-"), Sampling), replace(model, server_urls=two.url), calls(1)))
    assert caplog.text.count("The server's only model is scripted, not none: it is asked") == 3  # once for each role
    assert all(caplog.text.count(f"name it as `{key}`.") == 1 for key in roles)


def test_malformed_bodies_are_recognised():
    good = {"choices": [{"index": 1, "message": {"content": "b"}}, {"index": 0, "message": {"content": None}}]}
    assert read_answers(good, chat=True) == ([("", ""), ("b", "")], None)
    plain = {"choices": [{"text": "a", "finish_reason": "length"}], "usage": {"prompt_tokens": 7}}
    assert read_answers(plain, chat=False) == ([("a", "length")], 7)
    for bad in ({}, {"choices": []}, {"choices": [{}]}, {"choices": [{"message": {"content": 3}}]}, []):
        with pytest.raises((KeyError, TypeError, ValueError)):
            read_answers(bad, chat=True)
    for reason in ("abort", "error"):  # of an engine that breaks off: another try may end
        with pytest.raises(ValueError, match=f"it ended with `finish_reason: {reason}`"):
            read_answers({"choices": [{"text": "The answer is", "finish_reason": reason}]}, chat=False)
    filtered = {"choices": [{"text": "The", "finish_reason": "content_filter"}]}
    assert read_answers(filtered, chat=False) == ([("", "content_filter")], None)


def local(model: str, **keys):
    base = dict(model_name_or_path=model, template="qwen", input="-", dataset_name="d", work_dir="-")
    return make_recipe(base | dict(num_samples=4, max_new_tokens=8, seed=3) | keys)


PROMPTS = [Call(f"q{i}", (0, 1, 2, 3), row["prompt"]) for i, row in enumerate(demo_rows(3))]


def trained_on(recipe, tmp_path, run, train_recipe) -> list[list[int]]:
    """Ids of the short prompts as a run of `stage: solopo` prepares them."""
    from datasets import load_from_disk

    tokens = str(tmp_path / "tokens")
    rows = train_recipe(model_name_or_path=recipe.model_name_or_path, max_samples=3, max_steps=1, tokenized_path=tokens)
    run(rows)
    return load_from_disk(tokens)["train"]["short_prompt_ids"]


def by_generate(network, tokenizer, settings, call: Call) -> list[tuple[str, str]]:
    """Return what transformers' `generate` gives for the call alone, as answers were made one by one."""
    stop = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    draw = dict(do_sample=True, temperature=settings.temperature, top_p=settings.top_p, top_k=0)
    draw = draw if settings.temperature else dict(do_sample=False)
    n = len(call.ks) if settings.temperature else 1
    prompt = torch.tensor([encode_prompt(tokenizer, chat_of(settings)[1], call.prompt)])
    torch.manual_seed(call_seed(settings.seed, call))
    network.generation_config = GenerationConfig()
    output = network.generate(
        prompt, attention_mask=torch.ones_like(prompt), eos_token_id=sorted(stop), num_return_sequences=n, **draw,
        max_new_tokens=call.max_new_tokens or settings.max_new_tokens, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    answers = []
    for ids in output[:, prompt.shape[1] :].tolist():
        end = next((i for i, token in enumerate(ids) if token in stop), None)
        answers.append((tokenizer.decode(ids[:end], skip_special_tokens=True), "length" if end is None else "stop"))
    return answers * (len(call.ks) // n)


# More than one length of prompt and of answer, so that batches are padded and their rows end at different times; the
# last one's answers do not fit a batch together.
SHAPES = [(1, 4, None), (90, 2, None), (30, 3, 3), (30, 1, 60), (7, 4, 30), (60, 9, 5)]  # words, answers, tokens
UNEQUAL = [Call(f"q{i}", tuple(range(n)), "word " * words + "?", limit) for i, (words, n, limit) in enumerate(SHAPES)]


@pytest.mark.parametrize("drawing", [dict(temperature=0.85), dict(temperature=1.0, top_p=0.7), dict(temperature=0.0)])
@pytest.mark.parametrize("architecture, shape", [("qwen2", {}), ("mistral", dict(sliding_window=16)), ("gpt2", {})])
def test_transformers_answers_in_batches_as_one_by_one(tiny_model, tmp_path, architecture, shape, drawing):
    """The prompt's ids too: they are the trainer's, and `generate` is given those."""
    path = str(tmp_path / "model")
    network = AutoModelForCausalLM.from_pretrained(tiny_model(architecture, **shape))
    tokenizer = chat_of(local(tiny_model()))[0]
    with torch.no_grad():  # so that some answers end by themselves
        weight = network.get_output_embeddings().weight
        weight.mul_(8)
        weight[tokenizer.convert_tokens_to_ids("<|im_end|>")] = weight[400] * 1.02
    network.save_pretrained(path)
    tokenizer.save_pretrained(path)
    # what is beside the weights must not matter
    GenerationConfig(repetition_penalty=5.0, top_k=1, do_sample=True, max_length=4).save_pretrained(path)
    settings = local(path, backend="transformers", max_new_tokens=40, concurrency=8, **drawing)
    got = list(generate(settings, UNEQUAL))
    assert {(reply.id, reply.ks) for reply in got} == {(call.id, call.ks) for call in UNEQUAL}
    replies = {reply.id: reply for reply in got}
    for call in UNEQUAL:
        assert replies[call.id].answers == by_generate(network, tokenizer, settings, call)
        ids = encode_prompt(tokenizer, chat_of(settings)[1], call.prompt)
        assert replies[call.id].prompt_tokens == len(ids)
    if architecture == "qwen2" and settings.temperature:
        assert {reason for reply in got for _, reason in reply.answers} == {"stop", "length"}
    others = list(generate(replace(settings, concurrency=3), reversed(UNEQUAL)))
    assert {reply.id: reply for reply in others} == replies


def watch_forward(monkeypatch, kind: type, watch):
    """Have `watch` called with the arguments of every forward of a kind of model, before it; returns that forward."""
    original = kind.forward

    @wraps(original)
    def forward(self, **kwargs):
        watch(**kwargs)
        return original(self, **kwargs)

    monkeypatch.setattr(kind, "forward", forward)
    return original


def sampled_by_hand(
    model, tokenizer, prompt: list[int], n: int, steps: int, temperature: float, seed: int
) -> list[str]:
    """Draws from softmax(logits / temperature), token by token, without a cache."""
    torch.manual_seed(seed)
    ids = torch.tensor([prompt] * n)
    for _ in range(steps):
        probabilities = (model(ids).logits[:, -1] / temperature).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1)], 1)
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in ids[:, len(prompt) :].tolist()]


def test_transformers_sees_the_trainers_ids(tiny_model, run, recipe, tmp_path, monkeypatch):
    """Also: an answer is drawn from its call alone, and the model's own generation_config is not used."""
    model = str(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(tiny_model()).save_pretrained(model)
    chat_of(local(tiny_model()))[0].save_pretrained(model)
    GenerationConfig(repetition_penalty=5.0, top_k=1, do_sample=True, max_length=4).save_pretrained(model)
    seen = []
    kind = AutoModelForCausalLM.from_pretrained(model).__class__

    def watch(input_ids, attention_mask, **others):
        if input_ids.shape[1] > 1:  # the prompts: each once, whatever the number of its answers
            seen.extend(ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True))

    original = watch_forward(monkeypatch, kind, watch)
    settings = local(model, backend="transformers")
    got = list(generate(settings, PROMPTS))
    monkeypatch.setattr(kind, "forward", original)
    trained = trained_on(settings, tmp_path, run, recipe)
    assert sorted(seen) == sorted(trained)
    got.sort(key=lambda reply: reply.id)
    assert [reply.prompt_tokens for reply in got] == list(map(len, trained))
    texts = by_answer(got)
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), chat_of(settings)[0]
    with torch.no_grad():
        for call, prompt, reply in zip(PROMPTS, trained, got, strict=True):
            by_hand = sampled_by_hand(loaded, tokenizer, prompt, 4, 8, 0.85, call_seed(settings.seed, call))
            assert [(text, "length") for text in by_hand] == reply.answers
    again = by_answer(generate(settings, reversed(PROMPTS)))
    assert again == texts
    greedy = local(model, backend="transformers", temperature=0.0)
    alone = [call._replace(ks=(0,)) for call in PROMPTS]
    assert by_answer(generate(greedy, alone)) == by_answer(generate(greedy, reversed(alone)))


def test_a_cpu_reads_long_prompts_without_others(tiny_model, monkeypatch):
    """Read long prompts without padding, whose mask would cost attention its causal half; answers stay as they were."""
    model = tiny_model()
    kind = AutoModelForCausalLM.from_pretrained(model).__class__
    settings, read = local(model, backend="transformers", concurrency=16), []
    usual = {reply.id: reply for reply in generate(settings, UNEQUAL)}

    def watch(input_ids, **others):
        if input_ids.shape[1] > 1:
            read.append(tuple(input_ids.shape))

    watch_forward(monkeypatch, kind, watch)
    lengths = sorted(reply.prompt_tokens for reply in usual.values())
    for alone in (lengths[-2], lengths[-1], lengths[-1] + 1):
        monkeypatch.setattr(local_backend, "CPU_ALONE", alone)
        read.clear()
        assert {reply.id: reply for reply in generate(settings, UNEQUAL)} == usual
        assert [(1, n) for n in lengths if n >= alone] == sorted(shape for shape in read if shape[1] >= alone)
        assert any(prompts > 1 for prompts, _ in read)


ROPES = {  # with the window that such a model was first made for, as its configuration names it
    "phi3": (
        dict(rope_type="longrope", short_factor=[1.0] * 8, long_factor=[4.0] * 8),
        "original_max_position_embeddings",
    ),
    "qwen2": (dict(rope_type="dynamic", factor=4.0), "max_position_embeddings"),
}


@pytest.mark.parametrize("architecture", ROPES)
def test_ropes_that_look_at_the_longest_sequence_see_no_other_call(tiny_model, tmp_path, architecture):
    """Answer within the window and beyond it, and across its end, as each call alone, whatever is asked before it."""
    rope, window = ROPES[architecture]
    shape = dict(rope_parameters=rope | {"rope_theta": 1e4, window: 160}) | {window: 160}
    network = AutoModelForCausalLM.from_pretrained(tiny_model(architecture, **shape))
    with torch.no_grad():  # so that positions matter
        network.get_output_embeddings().weight.mul_(8)
        for name, weight in network.named_parameters():
            if any(part in name for part in ("q_proj.w", "k_proj.w", "qkv_proj.w")):
                weight.mul_(15)
    network.save_pretrained(tmp_path / "model")
    chat_of(local(tiny_model()))[0].save_pretrained(tmp_path / "model")
    words = [" ".join(f"{chr(97 + j % 26)}{j * 7 % 13}x" for j in range(n)) for n in (2, 15, 22, 40, 50)]
    asked = [Call(f"q{i}", (0, 1), text) for i, text in enumerate(words)]
    settings = local(str(tmp_path / "model"), backend="transformers", max_new_tokens=24, concurrency=16)
    together = {reply.id: reply for reply in generate(settings, asked)}
    lengths = [together[call.id].prompt_tokens for call in asked]
    assert lengths[1] + 24 < 160 and lengths[2] < 160 < lengths[2] + 24 and 160 < lengths[3], lengths
    for call in asked:
        assert list(generate(settings, [call])) == [together[call.id]]
    assert {reply.id: reply for reply in generate(replace(settings, concurrency=1), reversed(asked))} == together


def test_memory_that_is_out_halves_the_batch(tiny_model, monkeypatch, caplog):
    """Begun answers too: batches of more than three are refused once their prompts are read."""
    model = tiny_model()
    kind = AutoModelForCausalLM.from_pretrained(model).__class__
    settings, sizes = local(model, backend="transformers", concurrency=16), []
    usual = {reply.id: reply for reply in generate(settings, UNEQUAL)}

    def watch(input_ids, **others):
        if input_ids.shape[1] == 1:
            sizes.append(len(input_ids))
            if len(input_ids) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    original = watch_forward(monkeypatch, kind, watch)
    with caplog.at_level(logging.WARNING):
        assert {reply.id: reply for reply in generate(settings, UNEQUAL)} == usual
    said = [record.getMessage() for record in caplog.records if "Memory" in record.getMessage()]
    assert said[:2] == [f"Memory is out with {n} answers at a time; going on with {n // 2}." for n in (16, 8)]
    assert len([size for size in sizes if size > 3]) == len(said) and {2, 3} & set(sizes)

    @wraps(original)
    def too_large(self, **kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:128] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(kind, "forward", too_large)
    with pytest.raises(DataError, match=r"memory is out with a single answer of up to \d+ tokens.*lower `long_tokens`"):
        list(generate(settings, UNEQUAL))
    with pytest.raises(DataError, match="included; lower `max_input_tokens` or `max_new_tokens`, or ask a server"):
        list(generate_with(pick(settings, Sampling), Model(model), UNEQUAL))
    with pytest.raises(DataError, match="lower `short_tokens`, `max_new_tokens` or `judge_max_new_tokens`, or ask"):
        list(generate_with(pick(settings, Sampling), replace(settings, judge="model").judging[1], UNEQUAL))
    monkeypatch.setattr(kind, "forward", wraps(original)(lambda self, **kwargs: torch.ones(2).view(3)))
    with pytest.raises(RuntimeError, match="shape"):
        list(generate(settings, UNEQUAL))


@pytest.mark.parametrize("temperature", [0.0, 0.85])
def test_a_model_that_computes_nan_is_refused(tiny_model, tmp_path, temperature):
    """Do not answer with the first token of the vocabulary, up to the end."""
    network = AutoModelForCausalLM.from_pretrained(tiny_model())
    with torch.no_grad():
        network.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    network.save_pretrained(tmp_path / "nan")
    chat_of(local(tiny_model()))[0].save_pretrained(tmp_path / "nan")
    settings = local(str(tmp_path / "nan"), backend="transformers", temperature=temperature)
    with pytest.raises(DataError, match=f"^{tmp_path / 'nan'} computes NaN: .*take another checkpoint.$"):
        list(generate(settings, PROMPTS))


def test_completions_send_the_trainers_ids(tiny_model, answers_file, tmp_path, monkeypatch):
    sent = []
    original = httpx.AsyncClient.request

    async def spy(self, method, url, json=None, **kwargs):
        sent.append((url, json))
        return await original(self, method, url, json=json, **kwargs)

    monkeypatch.setattr(httpx.AsyncClient, "request", spy)
    with serving(answers_file) as server:
        recipe = openai(
            server.url, model_name_or_path=tiny_model(), openai_endpoint="completions", concurrency=1, served_model="m"
        )
        assert len(by_answer(generate(recipe, PROMPTS))) == 12
    tokenizer, template = chat_of(recipe)
    for (url, body), call in zip(sent, PROMPTS, strict=True):
        assert url.endswith("/v1/completions")
        assert body["prompt"] == vllm.encode_prompt(tokenizer, template, call.prompt)
        assert tokenizer.eos_token_id in body["stop_token_ids"]


SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize("status", [0, 400, 422, 500])
@pytest.mark.parametrize("refuse_n", [False, True], ids=["n is taken", "n is refused"])
def test_a_schema_is_sent_and_left_out_where_a_server_refuses_it(answers_file, tmp_path, caplog, status, refuse_n):
    """Both refusals are told apart: without the schema the answers are those of a server that takes it."""
    log, options = tmp_path / "log", {"refuse_n": True} if refuse_n else {}
    calls = [Call(f"q{i}", (0, 1, 2), question, schema=SCHEMA) for i, question in enumerate(ANSWERS)][:6]
    with serving(answers_file, log=log, refuse_schema=status, **options) as server:
        recipe = openai(server.url, concurrency=2, retries=0)
        got = by_answer(generate(recipe, calls))
        plain = by_answer(generate(recipe, [call._replace(schema=None) for call in calls]))
    assert got == plain and len(got) == 18
    sent = [json.loads(line) for line in log.read_text().splitlines()]
    with_schema = [event["response_format"] for event in sent if event["response_format"]]
    assert {json.dumps(shape["json_schema"]["schema"]) for shape in with_schema} == {json.dumps(SCHEMA)}
    assert ("where answers are to keep to a JSON schema: asked without." in caplog.text) == bool(status)
    least, most = {(0, 0): (6, 6), (1, 0): (1, 2), (0, 1): (18, 22), (1, 1): (1, 6)}[bool(status), refuse_n]
    most *= 1 + (status == 500)  # which may pass: it is asked once more
    assert least <= len(with_schema) <= most  # of refusals there are those under way at a time, two


def fake_vllm(seen: list) -> dict[str, ModuleType]:
    """The parts of vLLM's offline interface that are used: the newest request ends first, answers tell seed, schema."""

    class LLM:
        def __init__(self, **kwargs):
            seen.append(kwargs)
            self.llm_engine, self.waiting = self, []

        def add_request(self, request_id, prompt, params):
            assert params.n == 1 or params.temperature, "vLLM refuses this"
            self.waiting.append((request_id, prompt["prompt_token_ids"], params))

        def step(self):
            seen.append([ids for _, ids, _ in self.waiting])
            unfinished = SimpleNamespace(finished=False, request_id=self.waiting[0][0], outputs=[])
            request_id, _, params = self.waiting.pop()
            schema = params.structured_outputs and params.structured_outputs.json
            texts = [f"{params.seed + i} {schema}" for i in range(params.n)]
            outputs = [SimpleNamespace(text=text, finish_reason="stop") for text in texts]
            return [unfinished, SimpleNamespace(finished=True, request_id=request_id, outputs=outputs)]

    modules = {name: ModuleType(name) for name in ("vllm", "vllm.sampling_params")}
    modules["vllm"].LLM, modules["vllm"].SamplingParams = LLM, SimpleNamespace
    modules["vllm.sampling_params"].RequestOutputKind = SimpleNamespace(FINAL_ONLY="final only")
    modules["vllm.sampling_params"].StructuredOutputsParams = SimpleNamespace
    return modules


def test_vllm_gets_ids_seeds_and_schemas_and_is_never_idle(tiny_model, monkeypatch):
    """An answer makes room for the next call at once; calls are read no earlier."""
    seen, asked = [], [PROMPTS[0]._replace(schema={"type": "object"}), *PROMPTS[1:]]
    recipe = local(tiny_model(), long_tokens=2048, tensor_parallel_size=2, concurrency=2)
    tokenizer, template = chat_of(recipe)  # before the host can find the module that stands in for vLLM
    for name, module in fake_vllm(seen).items():
        monkeypatch.setitem(sys.modules, name, module)
    got = list(generate(recipe, iter(asked)))
    ids = [vllm.encode_prompt(tokenizer, template, call.prompt) for call in PROMPTS]
    engine, *steps = seen
    assert steps == [ids[:2], [ids[0], ids[2]], [ids[0]]]
    assert engine["max_model_len"] == 2056 and engine["tensor_parallel_size"] == 2
    for reply, i in zip(got, (1, 2, 0), strict=True):
        call, prompt = asked[i], ids[i]
        seed = call_seed(recipe.seed, call)
        texts = [(f"{seed + i} {call.schema}", "stop") for i in range(4)]
        assert reply == Reply(call.id, call.ks, texts, len(prompt))
    (reply,) = generate(replace(recipe, temperature=0.0), PROMPTS[:1])
    assert len(set(reply.answers)) == 1 and len(reply.answers) == 4


VLLM_SAYS = {  # where vLLM raises: what it says
    "LLM": "Free memory on device cuda:0 (12.3/79.1 GiB) on startup is less than desired GPU memory utilization (0.9).",
    "add_request": "The decoder prompt (length 9000) is longer than the maximum model length of 8192.",
    "step": "EngineCore encountered an issue. See stack trace (above) for the root cause.",
}


@pytest.mark.parametrize("where", VLLM_SAYS)
def test_what_vllm_refuses_is_a_sentence(where, tiny_model, monkeypatch):
    """Name the model, vLLM's reason and what to do, wherever it is refused."""
    recipe = local(tiny_model())
    chat_of(recipe)
    modules = fake_vllm([])

    def refuse(*args, **kwargs):
        raise ValueError(VLLM_SAYS[where])

    monkeypatch.setattr(*(modules["vllm"], "LLM") if where == "LLM" else (modules["vllm"].LLM, where), refuse)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(DataError, match=r"lower `long_tokens`.*, free the GPU .*use `backend: openai`\.$") as error:
        list(generate(recipe, PROMPTS))
    assert str(error.value).startswith(f"`backend: vllm` fails with {tiny_model()} (ValueError: {VLLM_SAYS[where]}); ")


MARKS = ("<|channel>", "<channel|>")
THOUGHT = "<|channel>thought\nAn island. The answer is: Karvik<channel|>The documents do not tell."


@pytest.fixture
def marked_model(tiny_model, tmp_path) -> str:
    """A tiny model whose tokenizer has the marks of Gemma 4's thoughts, and of its turns' ends, as special tokens."""
    path = str(shutil.copytree(tiny_model(vocab_size=1024), tmp_path / "marked"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in (*MARKS, "<turn|>")])
    tokenizer.save_pretrained(path)
    return path


def test_special_tokens_that_mark_a_thought_stay(marked_model, tiny_model, answers_file, tmp_path, monkeypatch):
    """Check every backend, for templates whose thoughts they mark; no other answer or request changes."""
    from llamafactory.data.template import TEMPLATES

    from solopo_plugin.qa.generate import decode

    words = {name: "".join(template.thought_words) for name, template in TEMPLATES.items()}
    assert {name for name, text in words.items() if "<|" in text or "|>" in text} == MARKED_BY_TOKENS
    think, plain = local(marked_model, template="gemma4"), local(marked_model, template="qwen3")
    assert thought_markers(*chat_of(think)) == {*MARKS} < template_markers(*chat_of(think))
    assert thought_markers(*chat_of(plain)) == thought_markers(*chat_of(local(tiny_model()))) == set()
    ids = chat_of(think)[0].encode(THOUGHT, add_special_tokens=False)
    monkeypatch.setattr(decode, "decode", lambda network, rows, *_: ((row, ids, True) for row in rows))
    texts = [set(by_answer(generate(replace(recipe, backend="transformers"), PROMPTS)).values())
             for recipe in (think, plain)]  # fmt: skip
    assert texts == [{THOUGHT}, {THOUGHT.replace(MARKS[0], "").replace(MARKS[1], "")}]
    assert not gives_answer(THOUGHT, ["Karvik"])

    said, log = [], tmp_path / "log"
    with serving(answers_file, log=log) as server:
        for template in ("gemma4", "qwen3"):
            for endpoint in ("chat", "completions"):
                keys = dict(backend="openai", server_urls=server.url, openai_endpoint=endpoint)
                list(generate(local(marked_model, template=template, served_model="m", **keys), calls(1)))
                said.append("skip_special_tokens" in json.loads(log.read_text())["keys"])
                log.unlink()
    assert said == [True, True, False, False]

    for name, module in fake_vllm([]).items():
        monkeypatch.setitem(sys.modules, name, module)
    params = []
    made = lambda **given: params.append(given) or SimpleNamespace(**given)  # noqa: E731
    monkeypatch.setattr(sys.modules["vllm"], "SamplingParams", made)
    for recipe in (think, plain):
        list(generate(recipe, PROMPTS[:1]))
    assert [given.get("skip_special_tokens", "as it is") for given in params] == [False, "as it is"]


def test_answers_are_what_the_model_wrote_whatever_the_tokenizer_tidies(tiny_model, tmp_path, monkeypatch):
    """Keep the blanks that a tokenizer with `clean_up_tokenization_spaces`, as Llama 3's, takes out of a text."""
    from solopo_plugin.qa.generate import decode

    path = shutil.copytree(tiny_model(), tmp_path / "tidy")
    settings = path / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"clean_up_tokenization_spaces": True}))
    recipe = local(str(path), backend="transformers")
    text = "Where x != y , it is n't 'social' . The answer is: The Children 's Museum"
    tokenizer = chat_of(recipe)[0]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) != text
    monkeypatch.setattr(decode, "decode", lambda network, rows, *_: ((row, ids, True) for row in rows))
    assert set(by_answer(generate(recipe, PROMPTS)).values()) == {text}


def test_a_server_that_does_not_know_of_special_tokens_is_asked_as_before(caplog):
    def reply(request):
        if "skip_special_tokens" in request.body:
            return 400, {"error": "Unrecognized request argument supplied: skip_special_tokens"}
        return 200, said("Here.")

    with answering(reply) as server:
        recipe = openai(server.url, template="gemma4", served_model="m", num_samples=1, concurrency=2)
        assert set(by_answer(generate(recipe, calls(4, (0,)))).values()) == {"Here."}
    assert caplog.text.count("cannot be told to keep what marks a thought") == 1


@pytest.mark.parametrize("lasting", [False, True])
def test_a_server_that_wants_the_length_under_its_newer_name_gets_it(lasting):
    """As hosted models that think; where it is refused under that, too, the refusal is told."""
    refused = (
        b"Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    )

    def reply(request):
        return (400, refused) if lasting or "max_tokens" in request.body else (200, said("Here."))

    with answering(reply) as server:
        recipe = openai(server.url, served_model="m", num_samples=1, concurrency=1, max_new_tokens=77)
        if lasting:
            with pytest.raises(DataError, match="refuses with HTTP 400.*Unsupported parameter.*; correct the recipe.$"):
                list(generate(recipe, calls(1, (0,))))
        else:
            assert len(by_answer(generate(recipe, calls(4, (0,))))) == 4
    sent = [{name: request.body.get(name) for name in SET if "tokens" in name} for request in server.requests]
    newer = {"max_tokens": None, "max_completion_tokens": 77}
    assert sent == [{"max_tokens": 77, "max_completion_tokens": None}] + [newer] * (1 if lasting else 4)


def test_vllm_that_is_not_there_is_a_sentence(tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(DataError, match=r"`backend: vllm` cannot be loaded .*pip install '.\[vllm\]'"):
        list(generate(local(tiny_model()), PROMPTS))
