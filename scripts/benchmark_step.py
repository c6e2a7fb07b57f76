"""Measure whole optimizer steps: the host's DPO on the long pair, the paper's two stages, and the packed row.

    python scripts/benchmark_step.py                                             # preset cpu, about ten minutes
    python scripts/benchmark_step.py --preset qwen2.5-7b --out docs/benchmarks   # one GPU
    python scripts/benchmark_step.py --preset qwen2.5-7b --longest               # the longest long prompt that fits

Configurations are those of plan.py, and T, TRL's DPO on the long pair: the python that TRL_PYTHON names runs it, in an
environment with trl >= 1.15 (`make benchmark-trl` makes one); without it T is left out. Each runs in a process of its
own, the others through the host's `run_exp`, on the same model (random weights, one seed) and the same tokenised rows
(random ids, exact lengths), one row a step. OUT/NAME.json is written after every configuration, and a run that was
killed continues from it; NAME.md and NAME.png come at the end.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from benchmark_page import as_markdown, longest_of, name_of, summarise, write
from benchmark_run import hardware, run_here, write_model, write_rows
from step_cost import MODELS

from solopo_plugin.qa.provenance import installed

PACKAGES = ("solopo", "llamafactory", "torch", "transformers", "trl", "accelerate", "peft", "flash-attn")
# `slow`: timed steps of V0, `steps`: of the others. On a GPU sgd without momentum stands for "no optimizer": it has no
# states, so that full fine-tuning of 7B fits beside its gradients.
GPU = dict(
    short=1024, response=256, lengths=[8192, 16384, 32768, 65536], tunings=["lora", "full"], dtype="bfloat16",
    checkpointing=True, optim="sgd", device="cuda", threads=None, slow=3, steps=5,
)  # fmt: skip
PRESETS = {
    "cpu": dict(
        model=dict(
            model_type="qwen2", hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=32000, max_position_embeddings=65536, tie_word_embeddings=True,
        ),
        short=512, response=64, lengths=[4096], tunings=["full"], dtype="float32",
        checkpointing=False, optim="adamw_torch", device="cpu", threads=1, slow=3, steps=7,
    ),
    **{name: GPU | {"model": model} for name, model in MODELS.items()},
}  # fmt: skip


def work(job: Path) -> None:
    """Be a configuration's process: read the job, run it, write the result beside it."""
    given = json.loads(job.read_text())
    if given["run"]["variant"] == "T":
        from gpu.trl_dpo import run_here as run_trl

        result = run_trl(**given, folder=job.parent) | {"trl": installed("trl")}
    else:
        result = run_here(**given, folder=job.parent)
    job.with_name("result.json").write_text(json.dumps(result))
    os._exit(0)  # threads of the host may outlive the interpreter


def configurations(variants: list[str], losses: list[str], tunings: list[str]) -> list[dict]:
    """List the configurations to run.

    The host and the paper run a reference in the step. `stage: solopo` also has a cached one. Of TRL the faster form is
    measured, which has it computed beforehand.
    """
    fixed = {"V0": ["online"], "S1": ["online"], "T": ["cached"]}
    found = []
    for tuning in tunings:
        for loss in losses:
            for variant in variants:
                if variant == "T" and loss != "sigmoid":
                    continue  # what TRL has of the others is experimental
                with_reference = fixed.get(variant, ["cached", "online"])
                for reference in [None] if loss in ("orpo", "simpo") else with_reference:
                    found.append(dict(variant=variant, loss=loss, reference=reference, tuning=tuning))
    return found


def measure(settings: dict, run: dict, folder: Path) -> dict:
    """Run one configuration in its own process; `status` is ok, oom, or failed with the end of its log."""
    if run["variant"] != "T" and not (folder / f"{run['length']}-dpo").exists():
        write_rows(folder, settings, run["length"])
    job, result = folder / "job.json", folder / "result.json"
    job.write_text(json.dumps({"settings": settings, "run": run}))
    result.unlink(missing_ok=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "SOLOPO_CACHE": str(folder / "cache")}
    cards = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")  # the Trainer would spread a step over several
    environment["CUDA_VISIBLE_DEVICES"] = cards[0] if settings["device"] == "cuda" else ""
    if settings["threads"]:
        environment["OMP_NUM_THREADS"] = str(settings["threads"])
    with (folder / "log").open("w+") as log:
        python = os.environ["TRL_PYTHON"] if run["variant"] == "T" else sys.executable
        command = [python, __file__, "--worker", str(job)]
        code = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
        log.seek(0)
        tail = log.read()[-3000:]
    if result.exists():
        seen = json.loads(result.read_text())
        return seen | ({"median_s": statistics.median(seen["step_s"])} if seen["status"] == "ok" else {})
    if code == -9:  # the system's out-of-memory killer
        return {"status": "oom"}
    return {"status": "failed", "log": f"exit status {code}\n{tail}"}


def find_longest(start: int, grain: int, fits) -> None:
    """Double a long prompt until it does not fit, then halve the gap down to `grain` tokens; `fits` keeps results."""
    low, high = 0, max(1, start // grain) * grain
    while fits(high):
        low, high = high, 2 * high
    while high - low > grain:
        middle = (low + high) // 2 // grain * grain
        low, high = (middle, high) if fits(middle) else (low, middle)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--out", type=Path, default=Path("saves/benchmarks"), help="folder (%(default)s)")
    parser.add_argument("--name", help="of the files in it; default: the preset's")
    parser.add_argument("--again", action="store_true", help="forget what the files hold of the chosen configurations")
    ours = ["V0", "S1", "S2", "S3"]
    rival = ["T"] if os.environ.get("TRL_PYTHON") else []
    parser.add_argument("--variants", nargs="+", choices=ours + rival, default=ours + rival)
    parser.add_argument("--losses", nargs="+", choices=["orpo", "simpo", "sigmoid"], default=["orpo", "sigmoid"])
    parser.add_argument("--tunings", nargs="+", choices=["lora", "full"])
    parser.add_argument("--lengths", nargs="+", type=int, help="tokens of the long prompt")
    parser.add_argument("--longest", action="store_true", help="search for the longest long prompt that fits instead")
    parser.add_argument("--grain", type=int, default=1024, help="tokens to which it is found (%(default)s)")
    parser.add_argument("--memory", type=float, help="GB that may be used: of the GPU, or above the idle process (CPU)")
    parser.add_argument("--attention", choices=["auto", "sdpa", "fa2"], default="sdpa", help="the host's flash_attn")
    parser.add_argument("--steps", type=int, help="timed steps, of all variants")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    for name in ("short", "response", "threads"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("layers", "width", "vocabulary"):
        parser.add_argument(f"--{name}", type=int, help="of the model: a preset at a small shape")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def chosen(args: argparse.Namespace) -> dict:
    """Return the preset with what the command line changes."""
    preset = PRESETS[args.preset] | {"attention": args.attention, "memory": args.memory}
    for name in ("lengths", "tunings", "short", "response", "threads", "device", "dtype"):
        preset[name] = getattr(args, name) or preset[name]
    if args.steps:
        preset["steps"] = preset["slow"] = args.steps
    small = {"num_hidden_layers": args.layers, "vocab_size": args.vocabulary, "hidden_size": args.width}
    if args.width:
        small |= {"intermediate_size": 3 * args.width, "num_attention_heads": 4, "num_key_value_heads": 2}
    return preset | {"model": preset["model"] | {key: value for key, value in small.items() if value}}


def open_document(args: argparse.Namespace, settings: dict) -> dict:
    """Read what earlier runs left under this name, if they measured the same on the same machine; else begin."""
    name = args.name or args.preset
    file = args.out / f"{name}.json"
    document = {
        "name": name, "date": date.today().isoformat(), "settings": settings,
        "command": shlex.join(["python", "scripts/benchmark_step.py", *sys.argv[1:]]),
        "hardware": hardware(settings["device"]), "versions": {name: installed(name) for name in PACKAGES}, "runs": {},
    }  # fmt: skip
    if file.exists():
        earlier = json.loads(file.read_text())
        for key in ("settings", "hardware", "versions"):
            if earlier[key] != document[key]:
                sys.exit(f"{file} was measured with other {key}; choose another `--name`, or remove the file.")
        document["runs"] = earlier["runs"]
    return document


def check_device(args: argparse.Namespace, device: str) -> None:
    """End where the device is not there, or nothing says how much memory a search may take."""
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            sys.exit(f"`--preset {args.preset}` needs a GPU and torch sees none; try `--device cpu --dtype float32`.")
    elif args.longest and not args.memory:
        sys.exit("`--longest` on a CPU needs `--memory`: the GB that a step may take.")


def once(document: dict, run: dict, folder: Path, out: Path) -> bool:
    """Tell whether a configuration fits; it is measured and recorded unless that was done before."""
    key, began = f"{name_of(run)} L{run['length']}", time.perf_counter()
    seen, how = document["runs"].get(key, {"status": "none"}), "before"
    if not (seen["status"] == "oom" or seen["status"] == "ok" and seen["steps"] >= run["steps"]):
        seen = run | measure(document["settings"], run, folder) | {"date": date.today().isoformat()}
        how = f"in {time.perf_counter() - began:.0f} s"
    document["runs"][key] = seen | {"trial": run["trial"] and seen["trial"]}
    write(document | {"summary": [], "longest": {}}, out, page=False)
    told = f"{seen['median_s']:.2f} s a step" if seen["status"] == "ok" else seen["status"]
    why = f": {seen['log'].strip().splitlines()[-1]}" if "log" in seen else ""
    print(f"{key}: {told} ({how}){why}", flush=True)
    if run["trial"] and seen["status"] not in ("ok", "oom"):
        sys.exit("The search ends here: the trial neither fitted nor ran out of memory.")
    return seen["status"] == "ok"


def main() -> None:
    """Measure what is not yet measured, and write it down."""
    args = arguments()
    if args.worker:
        return work(args.worker)
    settings = chosen(args)
    lengths, tunings, slow, steps = (settings.pop(key) for key in ("lengths", "tunings", "slow", "steps"))
    check_device(args, settings["device"])
    document = open_document(args, settings)
    args.out.mkdir(parents=True, exist_ok=True)
    todo = configurations(args.variants, args.losses, tunings)
    if args.again:
        names = {name_of(run) for run in todo}
        document["runs"] = {key: run for key, run in document["runs"].items() if name_of(run) not in names}

    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), settings)

        def fits(configuration: dict, length: int, trial: bool = False) -> bool:
            timed = 1 if trial else slow if configuration["variant"] == "V0" else steps
            run = configuration | {"length": length, "steps": timed, "trial": trial}
            return once(document, run, Path(folder), args.out)

        jobs = [(c, length) for length in (lengths[:1] if args.longest else lengths) for c in todo]
        for number, (configuration, length) in enumerate(jobs, 1):
            print(f"[{number}/{len(jobs)}] ", end="", flush=True)
            if args.longest:
                find_longest(length, args.grain, lambda n, c=configuration: fits(c, n, trial=True))
            else:
                fits(configuration, length)
    runs = document["runs"]
    document |= {"summary": summarise(settings, runs), "longest": longest_of(runs)}
    write(document, args.out, page=True)
    print("", as_markdown(document), f"Written: {args.out / document['name']}.json, .md, .png", sep="\n")
    if any(run["status"] == "failed" for run in runs.values()):
        sys.exit("Some configurations failed; the JSON holds the end of their logs.")


if __name__ == "__main__":
    main()
