"""Starts command lines quickly: the host is imported once, and every run is a fork of this process.

    python tests/zygote.py [MODULE ...]     # to be imported too; orders on stdin, answers on stdout, see `Zygote`

A run is a process of its own, with its own arguments, folder, environment, output and exit status, and can be killed.
It executes the script as Python does, under the name `__main__`, and the plugin's hook was active when the host was
imported. What a fork cannot show is the interpreter's start itself: tests/test_launch.py starts the real one.

A `torchrun` that a run calls, as the host's command line does for several processes, forks the ranks too.
"""

import argparse
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Zygote:
    """A running zygote, which has one run at a time.

    Args:
        modules: To be imported beside the host.
        env: Environment variables for its start.
    """

    def __init__(self, *modules: str, **env: str):
        self.process = subprocess.Popen(
            [sys.executable, __file__, *modules], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", **env},
        )  # fmt: skip
        self.last = None

    def start(self, *command, log: Path, cwd: Path = ROOT, env: dict | None = None) -> "Run":
        """Begin a run of a script, or of `torchrun`, which appends what it says to a file."""
        if self.last:
            self.last.kill()
        order = dict(command=list(map(str, command)), log=str(log), cwd=str(cwd), env=dict(env or os.environ))
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        self.last = Run(self.process.stdout)
        return self.last

    def run(self, script: str, folder: Path, *words: str, kill_after: float | None = None) -> int:
        """Run a script with recipe.yaml and `words` in a folder, where its log.txt is written; returns its exit status.

        It is killed after so many seconds, if they are given.
        """
        run = self.start(ROOT / script, "recipe.yaml", *words, log=folder / "log.txt", cwd=folder)
        if kill_after is not None:
            time.sleep(kill_after)
            run.kill()
        return run.wait()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class Run:
    """One run; like `subprocess.Popen` as far as it goes."""

    def __init__(self, answers):
        self.answers, self.returncode = answers, None
        self.pid = int(answers.readline())

    def poll(self) -> int | None:
        return self.wait() if self.returncode is not None or select.select([self.answers], [], [], 0)[0] else None

    def wait(self) -> int:
        """Its exit status; negative: the signal that killed it."""
        if self.returncode is None:
            self.returncode = int(self.answers.readline())
        return self.returncode

    def kill(self) -> None:
        """Kill it, its ranks and its workers, and wait for the end."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.wait()


# ---- within the zygote and its forks


def execute(command: list[str]) -> int:
    """Run a script as `python SCRIPT ...` does; returns its exit status."""
    sys.argv, sys.path[0] = command, str(Path(command[0]).parent)
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def fork(work, *args) -> int:
    """Do the work in a fork, which ends with the exit status that it returns; gives the fork's process id."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 70
        try:
            status = work(*args)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return child


def free_port() -> int:
    """Find a port below those that the system gives away by itself: it could give one to another test meanwhile."""
    for port in random.sample(range(20000, 32768), 100):
        with socket.socket() as free, suppress(OSError):
            free.bind(("", port))
            return port
    raise OSError("None of 100 ports from 20000 to 32767 is free.")


def torchrun(words: list[str]) -> int:
    """Fork the ranks of one machine with the environment that torchrun gives; if one fails, all are ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--standalone", action="store_true")
    parser.add_argument("--nnodes", choices=["1"])
    parser.add_argument("--node_rank", choices=["0"])
    parser.add_argument("--nproc_per_node", "--nproc-per-node", type=int)
    parser.add_argument("--master_addr", default="127.0.0.1")
    parser.add_argument("--master_port")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args(words)
    if given.master_port is None:
        given.master_port = str(free_port())
    n = str(given.nproc_per_node)
    world = dict(MASTER_ADDR=given.master_addr, MASTER_PORT=given.master_port, WORLD_SIZE=n, LOCAL_WORLD_SIZE=n)

    def rank(number: int) -> int:
        os.environ.update(world, RANK=str(number), LOCAL_RANK=str(number), GROUP_RANK="0", ROLE_RANK=str(number))
        return execute(given.command)

    ranks = {fork(rank, number) for number in range(given.nproc_per_node)}
    while ranks:
        ended, status = os.wait()
        ranks.discard(ended)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGTERM)
            for other in ranks:
                os.waitpid(other, 0)
            return 1
    return 0


def called(command, *args, check: bool = False, **kwargs) -> subprocess.CompletedProcess:
    """`subprocess.run`, but for torchrun's ranks."""
    if command[0] != "torchrun":
        return start_process(command, *args, check=check, **kwargs)
    os.environ.update(kwargs["env"])
    done = subprocess.CompletedProcess(command, torchrun(command[1:]))
    if check:
        done.check_returncode()
    return done


start_process = subprocess.run


def work(order: dict) -> int:
    os.setsid()
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    subprocess.run = called
    program, *words = order["command"]
    return torchrun(words) if program == "torchrun" else execute(order["command"])


def main() -> None:
    import llamafactory.launcher
    import llamafactory.train.tuner  # noqa: F401
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    with suppress(ImportError):  # once for all ranks; its extension, of `inference_all_reduce` alone, would be compiled
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    for name in sys.argv[1:]:
        importlib.import_module(name)

    gc.collect()
    gc.freeze()  # a run need not look at what the imports have made
    for line in sys.stdin:
        child = fork(work, json.loads(line))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
