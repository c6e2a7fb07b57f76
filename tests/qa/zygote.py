"""Starts a command line quickly and often: everything is imported once, and every run is a fork of this process.

    python tests/qa/zygote.py MODULE     # whose `main(words)` is run

Reads lines of JSON on stdin, {"words": command line, "cwd": folder}, and answers with the run's process id, then, when
it has ended, with its exit status (negative: the signal that killed it).
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def started(module: str):
    """A running zygote as a function: `run(folder, *words, kill_after=None)` -> exit status of `module`'s command line
    with recipe.yaml and `words` in `folder`, killed after so many seconds if they are given.
    """
    process = subprocess.Popen(
        [sys.executable, __file__, module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    def run(folder: Path, *words: str, kill_after: float | None = None) -> int:
        process.stdin.write(json.dumps({"words": ["recipe.yaml", *words], "cwd": str(folder)}) + "\n")
        process.stdin.flush()
        child = int(process.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        return int(process.stdout.readline())

    try:
        yield run
    finally:
        process.kill()
        process.wait()


def main() -> None:
    sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests" / "evaluation")]
    import llamafactory.model  # noqa: F401

    command = importlib.import_module(sys.argv[1])
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            os.chdir(order["cwd"])
            log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            status = 70
            try:
                status = command.main(order["words"])
            finally:
                sys.stderr.flush()
                os._exit(status)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
