"""Run the lab: every arm, every seed, through its recipe. Can be killed and continues; scripts/lab/report.py reads it.

    python scripts/lab/run.py                               # what is missing under saves/lab/results
    python scripts/lab/run.py --arms solo_orpo dpo_long     # of these arms
    python scripts/lab/run.py --sweep                       # the learning rates among which arms.py chose
    python scripts/lab/run.py --forms                       # the arms of forms.py
    python scripts/lab/run.py --task two_hop                # the second task, under saves/lab/two_hop

A result is one JSON file per arm, rate and seed: accuracy by length of the finished model and of its checkpoints, the
trainer's log and the recipe. A changed recipe or base is run again; nothing else is.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import recall
import two_hop
import yaml
from arms import RATE, RATES, SWEEP_SEED, arms, folder_of, methods, rates
from forms import arms_of_forms, form_of
from lab_rows import ENTRIES, lab_rows
from recall import LONG, MEASURED, ROOT, SHORT

from solopo_plugin.synthesis.files import write_json

ROWS = 1600  # of each data set of a seed: 200 steps of 8
ASKED, ASKED_BY_STEP = 256, 128  # questions per length, of a finished model and of a checkpoint
PLACES = ("model_name_or_path", "dataset_dir", "output_dir")


class Recall:
    """The first task, for the runner."""

    base = recall.BASE

    def prepare(self, folder: Path, seed: int) -> None:
        info = folder / "dataset_info.json"
        if not info.is_file() or not ENTRIES.keys() <= json.loads(info.read_text(encoding="utf-8")).keys():
            lab_rows(folder, ROWS, seed)

    def measure(self, model: Path, seed: int, ends: bool = False) -> dict[int, float]:
        """Accuracy by number of pairs; `ends`: of the short and the long context alone, over fewer questions."""
        from transformers import AutoModelForCausalLM

        lengths, n = ((SHORT, LONG), ASKED_BY_STEP) if ends else (MEASURED, ASKED)
        questions = recall.CHOOSING if seed == SWEEP_SEED else recall.QUESTIONS
        return recall.profile(AutoModelForCausalLM.from_pretrained(model), lengths, n, questions)


class TwoHop:
    """The second. An answer of some 14 words costs more than one of a word: half of the questions."""

    base = two_hop.BASE

    def prepare(self, folder: Path, seed: int) -> None:
        if not (folder / "dataset_info.json").is_file():
            two_hop.prepare(folder, seed)

    def measure(self, model: Path, seed: int, ends: bool = False) -> dict[int, float]:
        lengths = (two_hop.SHORT, two_hop.LONG) if ends else two_hop.LENGTHS
        return two_hop.measure(model, (ASKED_BY_STEP if ends else ASKED) // 2, lengths)


TASKS = {"recall": Recall(), "two_hop": TwoHop()}


def jobs(
    names: list[str], seeds: list[int], rates: list[float] | tuple[float, ...], out: Path, task: str = "recall"
) -> list[dict]:
    """The recipes to run, with the paths of their rows, run and result; seeds outermost, so that arms grow evenly."""
    base = TASKS[task].base
    weights = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
    found = []
    for seed in seeds:
        for name in names:
            form, arm = form_of(name)
            recipe = yaml.safe_load((folder_of(task) / f"{arm}.yaml").read_text(encoding="utf-8"))
            own = [recipe["learning_rate"]]  # and where forms of SoLo are compared, they share one rate
            own += [RATE] if arm.startswith("solo_") and own != [RATE] else []
            for rate in rates or own:
                tag = f"{name}_{rate:g}_{seed}"
                recipe = recipe | {"learning_rate": rate, "seed": seed}
                what = [weights, ROWS, {k: v for k, v in recipe.items() if k not in PLACES}]
                what += [form] if form else []
                key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
                job = dict(task=task, arm=name, form=form, rate=rate, seed=seed, key=key)
                job["result"] = str(out / "results" / f"{tag}.json")
                places = str(base), str(out / f"rows_{seed}"), str(out / "runs" / tag)
                found.append(job | {"recipe": recipe | dict(zip(PLACES, places, strict=True))})
    return found


def done(job: dict) -> bool:
    path = Path(job["result"])
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["key"] == job["key"]


def one_thread(cache: str) -> None:
    """A worker: one run after another, one thread each; the reference's scores stay in the lab's folder."""
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", SOLOPO_CACHE=cache)
    os.environ["HF_DATASETS_CACHE"] = f"{cache}/datasets/{os.getpid()}"
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=end_with_the_parent, daemon=True).start()


def end_with_the_parent() -> None:
    """A worker whose runner was killed would go on with its run, beside that of the next runner."""
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


def train(job: dict) -> None:
    """One run: train by the recipe, measure, write the result, remove the run."""
    from forms import applied
    from llamafactory.train.tuner import run_exp

    recipe, folder, start = job["recipe"], Path(job["recipe"]["output_dir"]), time.process_time()
    with applied(job["form"]):
        run_exp(recipe | {"disable_tqdm": True})
    seconds, measure = time.process_time() - start, TASKS[job["task"]].measure
    *earlier, last = sorted((int(path.name.split("-")[1]), path) for path in folder.glob("checkpoint-*"))
    result = {
        **{name: job[name] for name in ("arm", "rate", "seed", "key", "recipe")},
        "accuracy": measure(folder, job["seed"]),
        "by_step": {step: measure(path, job["seed"], ends=True) for step, path in earlier},
        "log": json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"],
        "cpu_seconds": round(seconds, 1),
    }
    lengths = list(result["by_step"][earlier[0][0]]) if earlier else []
    result["by_step"][last[0]] = {length: result["accuracy"][length] for length in lengths}
    write_json(Path(job["result"]), result)
    shutil.rmtree(folder)


def in_parallel(pool, calls: dict, what: str) -> list[str]:
    """Run `calls` (name -> (function, log, *arguments)) with a progress bar; returns what failed, one line each."""
    from tqdm import tqdm

    waiting = {pool.submit(run_quietly, *call): name for name, call in calls.items()}
    failed = []
    for future in tqdm(as_completed(waiting), total=len(waiting), desc=what):
        if error := future.exception():
            failed.append(f"{waiting[future]}: {type(error).__name__}: {error}; see {calls[waiting[future]][1]}")
    return failed


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="recall", choices=list(TASKS))
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="default: all of the task's")
    parser.add_argument("--forms", action="store_true", help="the arms of forms.py")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--rates", nargs="+", type=float, default=[], help="instead of each recipe's learning rate")
    parser.add_argument("--sweep", action="store_true", help=f"of the first task's methods, {RATES}, a seed of its own")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--output", type=Path, help="default: saves/lab, of another task its folder there")
    args = parser.parse_args(words)
    out = (args.output or ROOT / "saves/lab" / ("" if args.task == "recall" else args.task)).resolve()
    known = [*arms(args.task), *arms_of_forms(args.task)]
    names = args.arms or (arms_of_forms(args.task) if args.forms else list(arms(args.task)))
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--arms: {unknown[0]} is none of {', '.join(known)}.")
    if args.sweep:
        names = args.arms or methods()
        wanted = [job for name in names for job in jobs([name], [SWEEP_SEED], args.rates or rates(name), out)]
    else:
        wanted = jobs(names, args.seeds, args.rates, out, args.task)
    missing = [job for job in wanted if not done(job)]
    print(f"{len(wanted)} runs, {len(wanted) - len(missing)} of them there already")
    failed = []
    if missing:
        context, task = multiprocessing.get_context("spawn"), TASKS[args.task]
        with ProcessPoolExecutor(args.jobs, context, one_thread, (str(out / "cache"),)) as pool:
            seeds = sorted({job["seed"] for job in missing})
            rows = {f"rows {s}": (task.prepare, out / f"log/rows_{s}.txt", out / f"rows_{s}", s) for s in seeds}
            failed = in_parallel(pool, rows, "rows")
            if not failed:
                tags = {Path(job["result"]).stem: job for job in missing}
                runs = {tag: (train, out / f"log/{tag}.txt", job) for tag, job in tags.items()}
                failed = in_parallel(pool, runs, "runs")
    print("\n".join([*failed, f"results  {out / 'results'}"]), file=sys.stderr if failed else sys.stdout)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
