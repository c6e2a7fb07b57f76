"""Starts a command line quickly and often: everything is imported once, and every run is a fork of this process.

    python tests/synthesis/zygote.py MODULE     # whose `main(words)` is run

Reads lines of JSON on stdin, {"words": command line, "cwd": folder}, and answers with the run's process id, then, when
it has ended, with its exit status (negative: the signal that killed it).
"""

import importlib
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests" / "evaluation")]


def main() -> None:
    import llamafactory.model  # noqa: F401

    from solopo_plugin.synthesis import contexts, export, judge, read, sample, select  # noqa: F401

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
