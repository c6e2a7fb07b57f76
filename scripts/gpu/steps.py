"""Measure whole optimizer steps on one GPU within a time budget: one process per library, most telling first.

    python scripts/gpu/steps.py --out OUT --until EPOCH --folder FOLDER --jobs first|trl|longest|more [--dry]

Part of `run.sh`. Models, rows, recipes and timing are those of `benchmark_run.py`, Qwen2.5-7B's shape with random
weights; what is new is that configurations share a process, whose imports would else cost a third of the time.
OUT/gpu.json is written after every configuration. One is skipped where the time left does not cover its guess. Out of
memory is a result; if its memory does not come back, the process starts itself again. `--jobs trl` needs a python with
trl >= 1.15, the others one with the host and this plugin. FOLDER is for model and rows. `--dry`: a CPU, tiny shapes.
"""

import argparse
import gc
import importlib
import os
import statistics
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(Path(__file__).parent)]
import benchmark_page  # noqa: E402
import benchmark_run  # noqa: E402
import benchmark_step  # noqa: E402
import record  # noqa: E402
from plan import shape_of, step_flops  # noqa: E402
from record import tell  # noqa: E402
from step_cost import GB  # noqa: E402

from solopo_plugin.qa.provenance import installed  # noqa: E402

RATE = 250e12  # FLOP/s that a guess assumes; below what bf16 matrices reach on an H100
SPARE = 2.5e9  # bytes of the card that a longest prompt leaves: the context, workspaces, fragments
LONGEST = {"S3": (0.94, 1.02), "T": (0.94,), "V0": (0.94, 1.02)}  # shares of the length that peaks point to
LIKE = {"T": "V*", "P2": "S2"}  # whose FLOPs stand for one that plan.py does not have, in guesses of its time only

# What plan.py calls V0, S1, S3; P2: this package's own two stages; T: TRL's DPO. Reference as each has it at its best:
# V0 and S1 run it in every step, the others have its log-probs beforehand.
SMALL, MIDDLE, LARGE = 0, 1, 2
JOBS = {
    # variant, tuning, length, timed steps, loss
    "first": [
        ("S3", "lora", SMALL, 3, "orpo"), ("V0", "lora", SMALL, 2, "orpo"), ("S1", "lora", SMALL, 2, "orpo"),
        ("S3", "lora", MIDDLE, 2, "orpo"), ("V0", "lora", MIDDLE, 1, "orpo"), ("S1", "lora", MIDDLE, 1, "orpo"),
        ("S3", "lora", LARGE, 2, "orpo"), ("S3", "lora", SMALL, 3, "sigmoid"), ("V0", "lora", SMALL, 2, "sigmoid"),
        ("S3", "lora", MIDDLE, 2, "sigmoid"), ("V0", "lora", LARGE, 1, "orpo"), ("V0", "lora", MIDDLE, 1, "sigmoid"),
    ],
    "trl": [
        ("T", "lora", SMALL, 2, "sigmoid"), ("T", "lora", MIDDLE, 1, "sigmoid"), ("T", "lora", LARGE, 1, "sigmoid"),
    ],
    "more": [
        ("S3", "full", SMALL, 2, "orpo"), ("V0", "full", SMALL, 1, "orpo"), ("S1", "full", SMALL, 1, "orpo"),
        ("S3", "lora", LARGE, 1, "sigmoid"), ("P2", "lora", SMALL, 2, "orpo"), ("P2", "lora", MIDDLE, 1, "orpo"),
        ("S3", "full", MIDDLE, 1, "orpo"), ("S3", "full", LARGE, 1, "orpo"), ("S1", "lora", LARGE, 1, "orpo"),
        ("P2", "lora", LARGE, 1, "orpo"),
    ],
}  # fmt: skip


def settings_of(dry: bool) -> tuple[dict, tuple[int, int, int]]:
    """Return benchmark_step's settings and the three lengths of the long prompt."""
    lengths = (64, 96, 128) if dry else (8192, 16384, 32768)
    settings = dict(benchmark_step.PRESETS["qwen2.5-7b"]) | {"attention": "sdpa", "memory": None}
    if dry:
        tiny = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        settings |= {"model": settings["model"] | tiny | {"num_key_value_heads": 2, "vocab_size": 600}}
        settings |= {"short": 24, "response": 8, "device": "cpu", "dtype": "float32", "threads": 1}
    for key in ("lengths", "tunings", "slow", "steps"):
        del settings[key]
    return settings, lengths


def reference_of(variant: str, loss: str) -> str | None:
    """Return when a configuration's reference runs: in every step, beforehand, or never (None)."""
    return None if loss in ("orpo", "simpo") else "online" if variant in ("V0", "S1") else "cached"


def to_try(variant: str, there: int, dry: bool) -> list[int]:
    """Return the lengths at which a longest prompt is tried, up to one that does not fit; peaks point to `there`."""
    grain = 1 if dry else 1024
    return [int(there * share) // grain * grain for share in LONGEST[variant]]


def run_one(settings: dict, run: dict, folder: Path) -> dict:
    """Run one configuration here with whichever library it is of."""
    if run["variant"] == "T":
        return importlib.import_module("trl_dpo").run_here(settings, run, folder)
    if not (folder / f"{run['length']}-dpo").exists():
        benchmark_run.write_rows(folder, settings, run["length"])
    with benchmark_run.put_back():
        return benchmark_run.run_here(settings, run, folder)


class Session:
    """Run the jobs of one process."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.folder = args, args.folder
        os.environ |= {"SOLOPO_CACHE": str(args.folder / "cache"), "HF_HUB_OFFLINE": "1"}
        self.settings, self.lengths = settings_of(args.dry)
        self.settings["memory"] = None if args.dry else args.memory
        self.cuda = self.settings["device"] == "cuda"
        packages = ("torch", "transformers", "trl", "accelerate", "peft", "datasets")
        packages += () if args.jobs == "trl" else ("solopo", "llamafactory")
        mine = "versions of TRL's environment" if args.jobs == "trl" else "versions"
        same = {"settings": self.settings, "hardware": benchmark_run.hardware(self.settings["device"])}
        same[mine] = {name: installed(name) for name in packages}
        self.document = record.dated(record.load(args.out, **same)) | {"dry": args.dry}
        if not (self.folder / "model").exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            benchmark_run.write_model(self.folder, self.settings)
        from transformers import AutoConfig

        self.shape = shape_of(AutoConfig.for_model(**self.settings["model"]))
        record.save(self.document, args.out)

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.args.until - time.time()

    def guess(self, run: dict) -> float:
        """Return seconds that a configuration may take, by its FLOPs and those that TRL runs beforehand."""
        if self.args.dry:
            return 1.0
        S, R, like = self.settings["short"], self.settings["response"], LIKE.get(run["variant"], run["variant"])
        rest = (self.settings["checkpointing"], run["tuning"] == "lora")
        times = 1.9 if run["variant"] == "T" else 1  # V* shares a prompt that TRL runs twice
        flops = times * sum(step_flops(self.shape, like, S, R, run["length"], run["reference"], *rest).values())
        build = 60 if run["variant"] == "T" else 8  # seconds before the first step, seen on an H200
        return build + (run["steps"] + benchmark_run.WARM_UP + 0.5 * (run["variant"] == "T")) * flops / RATE

    def once(self, variant: str, tuning: str, length: int, steps: int, loss: str, trial: bool = False) -> dict | None:
        """Measure a configuration unless that was done before or there is no time; returns what is known of it."""
        run = dict(variant=variant, loss=loss, reference=reference_of(variant, loss), tuning=tuning)
        run |= dict(length=length, steps=steps, trial=trial)
        key = f"{benchmark_page.name_of(run)} L{length}"
        done = ("ok", "oom", "failed") if self.args.resumed else ("ok", "oom")
        if self.document["runs"].get(key, {}).get("status") in done:
            return self.document["runs"][key]
        if self.guess(run) > self.left():
            tell(f"{key}: skipped, {self.left():.0f} s left")
            return None
        began = time.time()
        try:
            seen = run_one(self.settings, run, self.folder)
        except Exception as error:  # one configuration must not take the others with it
            seen = {"status": "failed", "log": "".join(traceback.format_exception(error))[-3000:]}
        times = seen.get("step_s") or seen.get("warm_up_s")
        if seen["status"] == "ok":
            seen["median_s"] = statistics.median(times)
        seen = self.document["runs"][key] = run | seen | {"whole_s": round(time.time() - began, 1)}
        record.save(self.document, self.args.out)
        told = f"{seen['median_s']:.3f} s a step, peak {seen['peak'] / 1e9:.2f} GB" if times else seen["status"]
        why = f": {seen['log'].strip().splitlines()[-1]}" if "log" in seen else ""
        tell(f"{key}: {told} ({seen['whole_s']} s in all, {self.left():.0f} s left){why}")
        self.clean()
        return seen

    def clean(self) -> None:
        """Give back the card's memory; where a failed step holds it still, go on in a fresh process."""
        gc.collect()
        if self.cuda:
            import torch

            torch.cuda.empty_cache()
            if torch.cuda.memory_allocated() > 1e9:
                tell(f"{torch.cuda.memory_allocated() / 1e9:.1f} GB are still held; a fresh process goes on")
                os.execv(sys.executable, [sys.executable, *sys.argv, "--resumed"])

    def jobs(self, name: str) -> None:
        """Measure every configuration of a named list."""
        for variant, tuning, length, steps, loss in JOBS[name]:
            self.once(variant, tuning, self.lengths[length], steps, loss)

    def longest(self, variant: str, loss: str) -> None:
        """Try the longest long prompt of a LoRA step: peaks grow with its length, so two tell where the card ends."""
        runs = self.document["runs"].values()
        known = {"variant": variant, "loss": loss, "tuning": "lora", "status": "ok", "trial": False}
        peaks = sorted((r["length"], r["peak"], r["idle"]) for r in runs if known.items() <= r.items())
        if not peaks:
            return tell(f"{variant}: no step has fitted, so that nothing tells where the longest may be")
        (x, a), (y, b) = ((0, peaks[0][2]), peaks[-1][:2]) if len(peaks) < 2 else (p[:2] for p in peaks[-2:])
        there = 2 * y  # on a CPU, to see that it runs
        if self.cuda:
            import torch

            whole = torch.cuda.get_device_properties(0).total_memory
            whole = min(whole, (self.settings["memory"] or whole) * GB)
            there = y + (whole - SPARE - b) * (y - x) / (b - a)
        self.document.setdefault("longest by peaks", {})[variant] = round(there)
        for length in to_try(variant, round(there), self.args.dry):
            seen = self.once(variant, "lora", length, 0, loss, trial=True)
            if not seen or seen["status"] != "ok":
                break


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds since 1970 at which to end")
    parser.add_argument("--folder", type=Path, required=True, help="for model and rows")
    parser.add_argument("--jobs", choices=[*JOBS, "longest"], required=True)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--memory", type=float, help="GB of the card that may be used: a large card stands for a small")
    parser.add_argument("--resumed", action="store_true", help="what failed is not tried again")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> bool:
    """Do the jobs; returns whether none failed."""
    args = arguments(argv)
    session = Session(args)
    if args.jobs in JOBS:
        session.jobs(args.jobs)
    if args.jobs == "trl":
        session.longest("T", "sigmoid")
    if args.jobs == "longest":
        session.longest("V0", "orpo")  # the shorter, so that both have their turn
        session.longest("S3", "orpo")
    record.save(session.document, args.out)
    return all(run["status"] != "failed" for run in session.document["runs"].values())


if __name__ == "__main__":
    code = 0 if main() else 1
    sys.stdout.flush()
    os._exit(code)  # threads of the host may outlive the interpreter
