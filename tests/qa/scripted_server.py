"""An OpenAI-compatible server whose answers are known beforehand: right with a given probability, faulty on demand.

    python tests/qa/scripted_server.py --port 8000 --answers answers.json --right 0.5 [--busy 0.3 ...]

`answers.json` is {question: right answer}; the server looks which question stands in the prompt. Whether choice i of a
request is right, and its text, is a function of (prompt, seed, i) alone: `scripted(...)`, which tests call themselves.
Faults of a request (busy, broken, malformed, hang) meet its first try and not the next, unless `--always`.
"""

import argparse
import hashlib
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

SHARES = ("busy", "broken", "malformed", "hang")  # of requests


def share(*parts) -> float:
    """A number in [0, 1) that depends on `parts` alone."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:6]) / 2**48


def scripted(
    prompt: str, seed: int, choice: int, answers: dict[str, str], right=0.5, empty=0.0, unmarked=0.0, verbatim=False
) -> tuple[str, bool]:
    """Text of one choice, and whether it is right.

    Args:
        empty: Share of empty answers. `unmarked`: share of the others that lack `The answer is:`.
        verbatim: `answers` has the whole texts: one, or one for each choice.
    """
    question = max((q for q in answers if q in prompt), key=len)
    if verbatim:
        texts = answers[question]
        return texts if isinstance(texts, str) else texts[choice], True
    draw = share(prompt, seed, choice)
    thought = f"Thought {int(draw * 1e6)}" + " and so on" * int(draw * 97 % 12)
    if share("empty", prompt, seed, choice) < empty:
        return "", False
    if share("unmarked", prompt, seed, choice) < unmarked:
        return f"{thought}, it may be {answers[question]}", False
    is_right = draw < right
    return f"{thought}. The answer is: {answers[question] if is_right else 'No answer.'}", is_right


def error(message: str) -> bytes:
    """Return what vLLM's server says of a request that it refuses or that its engine died of."""
    return json.dumps({"error": {"message": message, "type": "Error", "param": None, "code": 0}}).encode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    options: argparse.Namespace
    answers: dict[str, str]
    seen: Counter = Counter()  # tries of the same request
    lock = threading.Lock()
    running = 0

    def log_message(self, *args):
        pass

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def note(self, **event) -> None:
        if self.options.log:
            with self.lock, open(self.options.log, "a") as file:
                file.write(json.dumps(event) + "\n")

    def do_GET(self):
        names = self.options.model.split(",")
        self.reply(200, json.dumps({"data": [{"id": name} for name in names]}).encode())

    def do_POST(self):
        options = self.options
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(raw)
        with self.lock:
            tries = self.seen[raw] = self.seen[raw] + 1
            total = self.seen.total()
            Handler.running += 1
            running = Handler.running
        try:
            if options.die_after and total > options.die_after:
                if options.last_words:
                    self.reply(500, error("EngineCore encountered an issue. See stack trace (above) for the cause."))
                os._exit(1)
            if options.hold_after and total > options.hold_after:
                threading.Event().wait()
            fault = self.fault(raw, tries)
            about = {name: body.get(name) for name in ("model", "seed", "max_tokens", "temperature", "response_format")}
            self.note(n=body.get("n", 1), fault=fault, running=running, keys=sorted(body), **about)
            if options.api_key and self.headers.get("Authorization") != f"Bearer {options.api_key}":
                return self.reply(401, b'{"error": "Invalid API key."}')
            if options.max_prompt and len(raw) > options.max_prompt:
                return self.reply(400, error("This model's maximum context length is 20 tokens, which it exceeds."))
            if options.refuse_n and body.get("n", 1) > 1:
                return self.reply(400, error("n must be 1 when using greedy sampling, got 2."))
            if options.refuse_schema and "response_format" in body:
                return self.reply(options.refuse_schema, b'{"error": "response_format is not supported"}')
            time.sleep(options.slow)
            if fault == "busy":
                return self.reply(429, b'{"error": "slow down"}', Retry_After=str(options.retry_after))
            if fault == "broken":
                return self.reply(503, b"<html>upstream</html>")
            if fault == "malformed":
                whole = self.completion(body)
                cut = [whole[: len(whole) // 2], b'{"choices": []}', b'{"choices": [{"index": 0}]}', b"[]"]
                return self.reply(200, cut[int(share("cut", raw.decode()) * len(cut))])
            if fault == "hang":
                time.sleep(options.hang_seconds)
            self.reply(200, self.completion(body))
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with self.lock:
                Handler.running -= 1

    def fault(self, raw: bytes, tries: int) -> str | None:
        if tries > 1 and not self.options.always:
            return None
        draw = share("fault", raw.decode())
        for name in SHARES:
            draw -= getattr(self.options, name)
            if draw < 0:
                return name
        return None

    def completion(self, body: dict) -> bytes:
        chat = "messages" in body
        prompt = body["messages"][-1]["content"] if chat else json.dumps(body["prompt"])
        n = min(body.get("n", 1), self.options.max_n)
        known = self.answers if chat else {"": "by ids"}
        choices = []
        for i in range(n):
            o = self.options
            text, _ = scripted(prompt, body.get("seed"), i, known, o.right, o.empty, o.unmarked, o.verbatim)
            content = {"message": {"role": "assistant", "content": text or None}} if chat else {"text": text}
            choices.append({"index": i, "finish_reason": "stop", **content})
        usage = {"prompt_tokens": self.options.prompt_tokens or len(prompt.split())}
        choices.reverse()  # a client has to look at `index`
        return json.dumps({"choices": choices, "usage": usage}).encode()


def parser() -> argparse.ArgumentParser:
    """Options; a share of 0 or a number of 0 means never."""
    p = argparse.ArgumentParser()
    p.add_argument("--port", type=int, required=True)
    p.add_argument("--answers", required=True, help="JSON file {question: answer}")
    p.add_argument("--right", type=float, default=0.5, help="probability of a right answer")
    p.add_argument("--empty", type=float, default=0.0, help="share of empty answers (content: null)")
    p.add_argument("--unmarked", type=float, default=0.0, help="share of answers without the marker")
    p.add_argument("--verbatim", action="store_true", help="the file of answers has whole texts, or lists of them")
    for name in SHARES:
        p.add_argument(f"--{name}", type=float, default=0.0, help="share of requests")
    p.add_argument("--always", action="store_true", help="faults meet every try, not only the first")
    p.add_argument("--retry-after", type=float, default=0.1)
    p.add_argument("--hang-seconds", type=float, default=5.0)
    p.add_argument("--slow", type=float, default=0.0, help="seconds that every request takes")
    p.add_argument("--die-after", type=int, default=0, help="exit in the middle of the request after so many")
    p.add_argument("--hold-after", type=int, default=0, help="let every request wait for ever after so many")
    p.add_argument("--last-words", action="store_true", help="HTTP 500 for the request that it dies of, as vLLM's")
    p.add_argument("--max-n", type=int, default=1 << 30, help="choices at most, whatever `n` says (1: n is ignored)")
    p.add_argument("--refuse-n", action="store_true", help="HTTP 400 for n > 1")
    p.add_argument("--refuse-schema", type=int, default=0, help="this HTTP status for a `response_format`")
    p.add_argument("--max-prompt", type=int, default=0, help="HTTP 400 for longer bodies, bytes")
    p.add_argument("--prompt-tokens", type=int, default=0, help="what usage.prompt_tokens says")
    p.add_argument("--model", default="scripted", help="names at /v1/models, with commas")
    p.add_argument("--api-key", default="")
    p.add_argument("--log", default="", help="a file that gets one line per request")
    return p


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(port: int, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def watched(answers, ended: list):
    """Return a backend that answers as `answers` and notes in `ended` when its generator ends or is closed."""

    def watching(*given):
        try:
            yield from answers(*given)
        finally:
            ended.append(True)

    return watching


@contextmanager
def serving(answers: Path | str, port: int | None = None, **options):
    """A server in its own process; yields an object with `url`, `port` and `process`, and ends it afterwards."""
    port = port or free_port()
    command = [sys.executable, __file__, "--port", str(port), "--answers", str(answers)]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    process = subprocess.Popen(command)
    try:
        wait_for(port)
        yield argparse.Namespace(url=f"http://127.0.0.1:{port}/v1", port=port, process=process)
    finally:
        process.kill()
        process.wait()


@contextmanager
def answering(reply, certificate=None):
    """A server in this process whose answer is `reply(request)` -> (status, value or bytes); has `url` and `requests`.

    A request has `command`, `path`, `headers` and `body`. `certificate`: file of key and certificate, for https.
    """

    class Answering(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
            request = SimpleNamespace(command=self.command, path=self.path, headers=self.headers, body=body)
            server.requests.append(request)
            status, value = reply(request)
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_CONNECT = do_GET = do_POST

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    server.requests, server.handle_error, scheme = [], lambda *_: None, "http"
    if certificate:
        context, scheme = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), "https"
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    server.url = f"{scheme}://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def main() -> None:
    options = parser().parse_args()
    Handler.options = options
    Handler.answers = json.loads(Path(options.answers).read_text(encoding="utf-8"))
    ThreadingHTTPServer.request_queue_size = 256
    ThreadingHTTPServer.handle_error = lambda *_: None  # a client that goes away is no news
    ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
