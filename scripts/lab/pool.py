"""Calls in processes of their own: one that is killed takes no other with it. Every one imports this file."""

import multiprocessing
import os
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path


def begin() -> None:
    """Begin a worker, which makes one run after another with one thread."""
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=end_with_the_parent, daemon=True).start()


def end_with_the_parent() -> None:
    """End this worker when its runner is killed: it would go on, beside the next runner's."""
    multiprocessing.parent_process().join()
    os._exit(1)


def run_quietly(work, log: Path, *args):
    """Call `work(*args)` in a worker; what it and its libraries print goes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):  # by descriptor: loggers keep the streams that they saw first
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    return work(*args)


def in_parallel(workers: int, calls: dict, what: str) -> list[str]:
    """Run `calls` (name -> (function, log, *arguments)) with a progress bar; returns what failed, one line each.

    A process that is killed, as one is where memory runs out, breaks its pool: the rest then runs one at a time.
    """
    from tqdm import tqdm

    left, failed, context = dict(calls), [], multiprocessing.get_context("spawn")
    bar = tqdm(total=len(calls), desc=what)
    while left:
        with ProcessPoolExecutor(workers, context, begin) as pool:
            waiting = {pool.submit(run_quietly, *call): name for name, call in left.items()}
            for future in as_completed(waiting):
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    continue
                name = waiting[future]
                bar.update()
                del left[name]
                if error:
                    failed.append(f"{name}: {type(error).__name__}: {error}; see {calls[name][1]}")
        if left and workers == 1:  # the first one was running
            name = next(iter(left))
            failed.append(f"{name}: its process was killed, mostly for lack of memory; see {left.pop(name)[1]}")
            bar.update()
        elif left:
            bar.write("A process was killed, mostly for lack of memory; the rest runs one at a time.", file=sys.stderr)
            workers = 1
    bar.close()
    return failed
