"""An OpenAI-compatible server that judges: true grades, and noise, a bias for a position and faults that are known.

An answer says its true grade: `... grade 7 ...`. What is replied is a function of the prompt alone, `verdict(...)`,
which tests call themselves. Replies are by the rubrics of `judge: model`, whose two parts stand in tags. Other prompts
are questions, and get answers of all grades.
"""

import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

from scripted_server import share

TRUE = re.compile(r"grade (\d+)")


def verdict(prompt: str, bias: int = 0, noise: float = 0.0, malformed: float = 0.0) -> str:
    """The reply to a prompt.

    Args:
        bias: Points more for an answer that stands first (scored: before the evidence), and fewer for the other.
        noise: Share of verdicts that are a point too high, and as many a point too low.
        malformed: Share of replies that keep to no form.
    """
    if share("malformed", prompt) < malformed:
        return ["", "It is good.", "Score: 11", "Score: 0\nVerdict: both", "<think>Score: 7"][
            int(5 * share("how", prompt))
        ]
    draw = share("noise", prompt)
    error = (draw < noise) - (draw > 1 - noise)
    if "<first_answer>" in prompt:
        first, second = (int(TRUE.search(part)[1]) for part in re.findall(r"<\w+_answer>(.*?)</", prompt, re.S))
        lead = first - second + bias + error
        return f"Verdict: second? No.\n**Verdict: {'first' if lead > 0 else 'second' if lead < 0 else 'tie'}**"
    said = re.search(r"<answer>(.*?)</answer>", prompt, re.S)[1]
    early = prompt.index("<answer>") < prompt.index("<evidence>")
    return f"Score: 5 at first sight.\nScore: {int(TRUE.search(said)[1]) + (bias if early else -bias) + error}/10"


def answer(prompt: str, seed: int, choice: int) -> str:
    """An answer to a question, of grade 2 to 9."""
    draw = share(prompt, seed, choice)
    return f"Thought {int(draw * 1e6)}: a summary of grade {2 + int(8 * draw)} in all."


@contextmanager
def judging(slow: float = 0.0, **how):
    """A server in this process; yields its address, and the prompts that it was asked, in the order of arrival."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def reply(self, value: dict) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.reply({"data": [{"id": "judge"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][-1]["content"]
            seen.append(prompt)
            threading.Event().wait(slow)
            n, judged = body.get("n", 1), "<evidence>" in prompt
            texts = [verdict(prompt, **how)] * n if judged else [answer(prompt, body["seed"], i) for i in range(n)]
            choices = [
                {"index": i, "finish_reason": "stop", "message": {"content": text}} for i, text in enumerate(texts)
            ]
            self.reply({"choices": choices})

    ThreadingHTTPServer.request_queue_size = 256
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # a client that goes away is no news
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}/v1", seen=seen)
    finally:
        server.shutdown()
        server.server_close()
