"""Run the lab: every arm, every seed, through its recipe. Can be killed and continues; scripts/lab/report.py reads it.

    python scripts/lab/run.py                               # what is missing under saves/lab/results
    python scripts/lab/run.py --arms solo_orpo dpo_long     # of these arms
    python scripts/lab/run.py --sweep                       # the learning rates among which arms.py chose

A result is one JSON file per arm, rate and seed: accuracy by number of pairs of the finished model and of its
checkpoints, the trainer's log and the recipe. A changed recipe, base or --rows is run again; nothing else is.
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

import yaml
from arms import FOLDER, RATE, RATES, arms, methods
from forms import arms_of_forms, form_of
from recall import BASE, CHOOSING, LONG, QUESTIONS, ROOT, SHORT, profile

from solopo_plugin.synthesis.files import write_json

ASKED, ASKED_BY_STEP = 256, 128  # questions per number of pairs, of a finished model and of a checkpoint
MEASURED = (SHORT, 32, 64, LONG, 120)  # pairs
SWEEP_SEED = 100  # its rows are of no other seed, its questions not those that are reported
PLACES = ("model_name_or_path", "dataset_dir", "output_dir")


def jobs(names: list[str], seeds: list[int], rates: list[float], rows: int, out: Path) -> list[dict]:
    """The recipes to run, with the paths of their rows, run and result; seeds outermost, so that arms grow evenly."""
    base = hashlib.sha256((BASE / "model.safetensors").read_bytes()).hexdigest()
    found = []
    for seed in seeds:
        for name in names:
            form, arm = form_of(name)
            recipe = yaml.safe_load((FOLDER / f"{arm}.yaml").read_text(encoding="utf-8"))
            own = [recipe["learning_rate"]]  # and where forms of SoLo are compared, they share one rate
            own += [RATE] if arm.startswith("solo_") and own != [RATE] else []
            for rate in rates or own:
                tag = f"{name}_{rate:g}_{seed}"
                recipe = recipe | {"learning_rate": rate, "seed": seed}
                what = [base, rows, {k: v for k, v in recipe.items() if k not in PLACES}]
                what += [form] if form else []
                key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
                places = str(BASE), str(out / f"rows_{rows}_{seed}"), str(out / "runs" / tag)
                job = dict(
                    arm=name, form=form, rate=rate, seed=seed, key=key, result=str(out / "results" / f"{tag}.json")
                )
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
    from transformers import AutoModelForCausalLM

    recipe, folder, start = job["recipe"], Path(job["recipe"]["output_dir"]), time.process_time()
    with applied(job["form"]):
        run_exp(recipe | {"disable_tqdm": True})
    seconds = time.process_time() - start
    questions = CHOOSING if job["seed"] == SWEEP_SEED else QUESTIONS
    last, *earlier = sorted((int(path.name.split("-")[1]), path) for path in folder.glob("checkpoint-*"))[::-1]
    result = {
        **{name: job[name] for name in ("arm", "rate", "seed", "key", "recipe")},
        "accuracy": profile(AutoModelForCausalLM.from_pretrained(folder), MEASURED, ASKED, questions),
        "by_step": {
            step: profile(AutoModelForCausalLM.from_pretrained(path), (SHORT, LONG), ASKED_BY_STEP, questions)
            for step, path in earlier[::-1]
        },
        "log": json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"],
        "cpu_seconds": round(seconds, 1),
    }
    result["by_step"][last[0]] = {pairs: result["accuracy"][pairs] for pairs in (SHORT, LONG)}
    write_json(Path(job["result"]), result)
    shutil.rmtree(folder)


def prepare(folder: Path, rows: int, seed: int) -> None:
    from lab_rows import ENTRIES, lab_rows

    info = folder / "dataset_info.json"
    if not info.is_file() or not ENTRIES.keys() <= json.loads(info.read_text(encoding="utf-8")).keys():
        lab_rows(folder, rows, seed)


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
    known = [*arms(), *arms_of_forms()]
    parser.add_argument("--arms", nargs="+", default=list(arms()), choices=known, metavar="ARM")
    parser.add_argument("--forms", action="store_true", help="the arms of forms.py")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--rates", nargs="+", type=float, default=[], help="instead of each recipe's learning rate")
    parser.add_argument("--sweep", action="store_true", help=f"of all methods, {RATES}, a seed of its own")
    parser.add_argument("--rows", type=int, default=1600, help="of each data set; 8 are a step (default 1600)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--output", type=Path, default=ROOT / "saves/lab")
    args = parser.parse_args(words)
    out = args.output.resolve()
    if args.sweep:
        args.arms, args.seeds, args.rates = methods(), [SWEEP_SEED], list(RATES)
    if args.forms:
        args.arms = arms_of_forms()
    wanted = jobs(args.arms, args.seeds, args.rates, args.rows, out)
    missing = [job for job in wanted if not done(job)]
    print(f"{len(wanted)} runs, {len(wanted) - len(missing)} of them there already")
    if missing:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.jobs, context, one_thread, (str(out / "cache"),)) as pool:
            rows = {seed: out / f"rows_{args.rows}_{seed}" for seed in {job["seed"] for job in missing}}
            failed = in_parallel(
                pool,
                {f"rows {s}": (prepare, out / f"log/rows_{s}.txt", p, args.rows, s) for s, p in rows.items()},
                "rows",
            )
            if not failed:
                calls = {Path(j["result"]).stem: (train, out / f"log/{Path(j['result']).stem}.txt", j) for j in missing}
                failed = in_parallel(pool, calls, "runs")
        if failed:
            print("\n".join(failed), file=sys.stderr)
            return 1
    print(f"results  {out / 'results'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
