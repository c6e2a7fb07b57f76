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
import ctypes
import gc
import json
import math
import os
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date
from pathlib import Path

from plan import MODELS, OPTIMIZERS, VARIANTS, Setup, count, peak, shape_of, step_flops, step_memory

from solopo_plugin.losses import LENGTH_NORMALISED
from solopo_plugin.qa.files import replacing
from solopo_plugin.qa.provenance import installed

GB = 1e9  # bytes
WARM_UP = 1  # steps before the timed ones: allocators and optimizer states
ROWS = 4  # of every data set; more steps go over them again
NO_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")  # in messages of a plain RuntimeError
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


# ---- in the configuration's own process


class Finished(Exception):
    """End the training behind its last step: nothing is to be saved."""


def status(name: str) -> int:
    """Read a field of Linux's /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def idle_memory(cuda: bool, limit_gb: float | None) -> int:
    """Return what the process holds with model and trainer built, in bytes; from here on the peak is counted.

    CPU: resident memory (VmRSS), after glibc has given back what it keeps of freed memory; the peak (VmHWM) is reset.
    With a limit, the process gets no more than that on top. GPU: torch's allocated memory.
    """
    import torch

    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    if limit_gb:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + int(limit_gb * GB), resource.RLIM_INFINITY))
    return status("VmRSS")


def cap_card(cuda: bool, limit_gb: float | None) -> None:
    """Let this process have no more than so much of the GPU, so that a large card stands for a small one."""
    if cuda and limit_gb:
        import torch

        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_gb * GB / total))


def meter(cuda: bool, limit_gb: float | None):
    """Make a callback of the Trainer that times each step, from before the forward to behind the optimizer."""
    import torch
    from transformers import TrainerCallback

    class Meter(TrainerCallback):
        def __init__(self):
            self.step_s, self.cpu_s, self.losses, self.memory = [], [], [], {}

        def clock(self) -> tuple[float, float]:
            if cuda:
                torch.cuda.synchronize()
            return time.perf_counter(), time.process_time()

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.memory |= {"idle": idle_memory(cuda, limit_gb), "logits": 0}
            if head := model and model.get_output_embeddings():
                head.register_forward_hook(self.see_logits)

        def see_logits(self, head, given, logits):
            """Record the head's largest output in bytes, with the copy in fp32 that log-probs are taken from."""
            size = logits.nbytes + (4 * logits.numel() if logits.element_size() < 4 else 0)
            self.memory["logits"] = max(self.memory["logits"], size)

        def on_step_begin(self, args, state, control, **kwargs):
            self.began = self.clock()

        def on_step_end(self, args, state, control, **kwargs):
            wall, cpu = (now - then for now, then in zip(self.clock(), self.began, strict=True))
            self.step_s.append(round(wall, 4))
            self.cpu_s.append(round(cpu, 4))
            self.memory["peak"] = torch.cuda.max_memory_allocated() if cuda else status("VmHWM")
            if cuda:
                self.memory["reserved"] = torch.cuda.max_memory_reserved()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                self.losses.append(logs["loss"])

        def on_train_end(self, args, state, control, **kwargs):
            raise Finished

    return Meter()


def use_variant(variant: str) -> None:
    """Let the trainer's two stages keep all logits (S1, the paper's way) or those of the responses only (S2)."""
    from llamafactory.train.trainer_utils import get_batch_logps

    from solopo_plugin.forward import TwoStages
    from solopo_plugin.logps import predicting_positions, response_logps
    from solopo_plugin.trainer import SoloTrainer

    def long_logps(self, model, batch, chosen_B, rejected_B):
        logits_BTV = self.forward_long(model, batch, None).float()
        logps_B, counts_B = get_batch_logps(logits_BTV, batch["long_labels"])
        return [logps_B / counts_B if self.args.pref_loss in LENGTH_NORMALISED else logps_B]

    def concatenated_forward(self, model, batch, is_ref_model=False):
        labels_BT = batch.pop("labels")
        positions_K = predicting_positions(labels_BT)
        logits_BKV = model(**batch, logits_to_keep=positions_K, use_cache=False, return_dict=True).logits
        sums_B, counts_B = response_logps(logits_BKV, labels_BT, positions_K)
        means = (sums_B / counts_B).chunk(2)
        pair = means if self.finetuning_args.pref_loss in LENGTH_NORMALISED else sums_B.chunk(2)
        return {"chosen_logps": pair[0], "rejected_logps": pair[1], "chosen_logps_avg": means[0]}

    if variant == "S1":
        TwoStages.long_logps = long_logps
    elif variant == "S2":
        SoloTrainer.concatenated_forward = concatenated_forward


def use_random_weights(device: str) -> None:
    """Make models of the host's `train_from_scratch` on the device itself, policy and reference alike."""
    import torch
    from transformers import AutoModelForCausalLM

    from_config = AutoModelForCausalLM.from_config

    def seeded(config, **kwargs):
        torch.manual_seed(0)
        with torch.device(device):
            return from_config(config, **kwargs)

    AutoModelForCausalLM.from_config = seeded


def use_rows_as_given() -> None:
    """Take made-up rows: no data set and no template made them, and no record says so."""
    import solopo_plugin.workflow as workflow

    workflow.recorded = lambda *made_of: nullcontext()


def recipe_of(settings: dict, run: dict, folder: Path) -> dict:
    """Write the recipe that a user would, on the benchmark's model and rows."""
    stage = "dpo" if run["variant"] == "V0" else "solopo"
    half = settings["dtype"] == "bfloat16"
    recipe = dict(
        model_name_or_path=str(folder / "model"), train_from_scratch=True, flash_attn=settings["attention"],
        stage=stage, do_train=True, finetuning_type=run["tuning"], pref_loss=run["loss"], dataset="rows",
        tokenized_path=str(folder / f"{run['length']}-{stage}"), template="empty",
        cutoff_len=run["length"] + settings["response"], output_dir=str(folder / "out"), save_strategy="no",
        report_to="none", logging_steps=1, disable_tqdm=True, disable_shuffling=True, max_steps=WARM_UP + run["steps"],
        per_device_train_batch_size=1, gradient_accumulation_steps=1, learning_rate=1e-6, lr_scheduler_type="constant",
        optim=settings["optim"], disable_gradient_checkpointing=not settings["checkpointing"],
        use_cpu=settings["device"] == "cpu", bf16=half and run["tuning"] == "lora",
        pure_bf16=half and run["tuning"] == "full",
    )  # fmt: skip
    if stage == "solopo":
        recipe["solopo_forward"] = "packed" if run["variant"] == "S3" else "two_stage"
        recipe["solopo_reference"] = run["reference"] or "cached"
    return recipe


def run_here(settings: dict, run: dict, folder: Path) -> dict:
    """Run one configuration in this process; memory that does not suffice is a result, `oom`."""
    cuda, limit_gb = settings["device"] == "cuda", settings["memory"]
    cap_card(cuda, limit_gb)
    from llamafactory.train.tuner import run_exp

    use_random_weights(settings["device"])
    use_variant(run["variant"])
    use_rows_as_given()
    watch = meter(cuda, limit_gb)
    return watched(watch, lambda: run_exp(recipe_of(settings, run, folder), callbacks=[watch]))


def watched(watch, train: Callable[[], None]) -> dict:
    """Train until the meter ends it, and return what it saw."""
    import torch

    outcome = "ok"
    try:
        train()
    except Finished:
        pass
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and not any(sign in str(error) for sign in NO_MEMORY):
            raise
        outcome = "oom"
    return {"status": outcome, "warm_up_s": watch.step_s[:WARM_UP], "step_s": watch.step_s[WARM_UP:],
            "cpu_s": watch.cpu_s[WARM_UP:], "losses": watch.losses, **watch.memory}  # fmt: skip


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


# ---- in the process that starts them


def write_model(folder: Path, settings: dict) -> None:
    """Write a configuration and some tokenizer; the weights are made where the model is loaded."""
    from make_tiny_model import train_tokenizer
    from transformers import AutoConfig

    config = AutoConfig.for_model(**settings["model"])
    config.dtype = settings["dtype"]
    config.save_pretrained(folder / "model")
    train_tokenizer(["text"], 512).save_pretrained(folder / "model")


def write_rows(folder: Path, settings: dict, L: int) -> None:
    """Write the same rows for both stages, as each finds them under `tokenized_path`."""
    from datasets import Dataset, DatasetDict, disable_progress_bars

    disable_progress_bars()
    S, R, V = settings["short"], settings["response"], settings["model"]["vocab_size"]
    solopo, dpo = [], []
    for i in range(ROWS):
        draw = random.Random(i)
        short, long, chosen, rejected = (draw.choices(range(V), k=k) for k in (S, L, R, R))
        solopo.append({"name": f"rows[{i}]", "long_is_short": False, "short_prompt_ids": short, "long_prompt_ids": long,
                       "chosen_ids": chosen, "rejected_ids": rejected})  # fmt: skip
        dpo.append({"images": None, "videos": None, "audios": None})
        for name, ids in (("chosen", chosen), ("rejected", rejected)):
            dpo[-1] |= {f"{name}_input_ids": long + ids, f"{name}_attention_mask": [1] * (L + R),
                        f"{name}_labels": [-100] * L + ids}  # fmt: skip
    for stage, rows in (("solopo", solopo), ("dpo", dpo)):
        DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(folder / f"{L}-{stage}")


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


def name_of(run: dict) -> str:
    """Return the name under which a configuration is recorded."""
    return " ".join(run[key] for key in ("variant", "loss", "reference", "tuning") if run[key])


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


# ---- what comes out


def setup_of(settings: dict, tuning: str) -> Setup:
    """Say how the run stores things, for plan.py: adapters in fp32, full fine-tuning in the model's precision."""
    element = 2 if settings["dtype"] == "bfloat16" else 4
    trained = element if tuning == "full" else 4
    return Setup(
        frozen=element, weights=trained, gradients=trained, optimizer=OPTIMIZERS[settings["optim"]] * trained / 4,
        element=element, lora_rank=8 * (tuning == "lora"), checkpointing=settings["checkpointing"],
    )  # fmt: skip


def summarise(settings: dict, runs: dict[str, dict]) -> list[dict]:
    """Return a row per configuration: its median, ratios to V0 and S1 of the same loss, and plan.py's predictions."""
    from transformers import AutoConfig

    S, R, shape = settings["short"], settings["response"], shape_of(AutoConfig.for_model(**settings["model"]))

    def flops(run: dict) -> float:
        lora, checkpointing = run["tuning"] == "lora", settings["checkpointing"]
        parts = step_flops(shape, run["variant"], S, R, run["length"], run["reference"], checkpointing, lora)
        return sum(parts.values())

    def above_idle(run: dict) -> int:
        return run["peak"] - run["idle"]

    rows, shown = [], {name: run for name, run in runs.items() if not run["trial"]}
    for name, run in shown.items():
        setup, planned = setup_of(settings, run["tuning"]), run["variant"] in VARIANTS
        like_v0 = "V0" if run["variant"] == "T" else run["variant"]
        row = {"name": name, "status": run["status"], "tokens": count(like_v0, S, R, run["length"])[0]}
        if planned:
            parts = step_memory(shape, run["variant"], S, R, run["length"], run["reference"], setup)
            row["predicted_peak"] = peak(parts) - parts["weights"] - parts["reference"]
        if run["status"] == "ok":
            row |= {"median_s": run["median_s"], "peak": above_idle(run), "reserved": run.get("reserved")}
        for base in ("V0", "S1"):
            like = {"variant": base} | {key: run[key] for key in ("loss", "tuning", "length")}
            for other in (r for r in shown.values() if like.items() <= r.items()):
                if planned:
                    row[f"predicted_speed_{base}"] = flops(other) / flops(run)
                if other["status"] == run["status"] == "ok":
                    row[f"speed_{base}"] = other["median_s"] / run["median_s"]
                    row[f"cpu_speed_{base}"] = statistics.median(other["cpu_s"]) / statistics.median(run["cpu_s"])
                    row[f"memory_{base}"] = above_idle(run) / above_idle(other)
        rows.append(row)
    return rows


def longest_of(runs: dict[str, dict]) -> dict[str, dict]:
    """Return of each searched configuration the longest long prompt that fitted and the shortest that did not."""
    found = {}
    for run in runs.values():
        if any(r["trial"] and name_of(r) == name_of(run) for r in runs.values()):
            entry = found.setdefault(name_of(run), {"fits": 0, "too_long": None})
            if run["status"] == "ok":
                entry["fits"] = max(entry["fits"], run["length"])
            elif run["status"] == "oom":
                entry["too_long"] = min(entry["too_long"] or run["length"], run["length"])
    return found


def as_markdown(document: dict) -> str:
    """Write the document as a page."""
    settings, machine = document["settings"], document["hardware"]
    model, runs = settings["model"], document["runs"]

    def ratio(row: dict, key: str) -> str:
        measured = f"{row[key]:.2f}" if key in row else "-"
        return f"{measured} ({row['predicted_' + key]:.2f})" if f"predicted_{key}" in row else measured

    lines = [
        f"# {document['name']}: step time and memory", "",
        f"{model['model_type']}, {model['num_hidden_layers']} layers, width {model['hidden_size']}, vocabulary "
        f"{model['vocab_size']}, random weights; short prompt {settings['short']}, responses {settings['response']} "
        f"tokens, L the long prompt; {settings['dtype']}, gradient checkpointing "
        f"{'on' if settings['checkpointing'] else 'off'}, {settings['optim']}, attention {settings['attention']}, "
        "one row a step.", "",
        f"{document['date']}: {machine['device']}, {machine['memory_gb']} GB, {machine['cores']} cores, threads "
        f"{settings['threads'] or 'by default'}. {', '.join(' '.join(v) for v in document['versions'].items())}."
        + "".join(sorted({f" T: trl {run['trl']}." for run in runs.values() if "trl" in run})), "",
        f"    {document['command']}", "",
        "Measured, in brackets what `scripts/plan.py` predicts. Speed: times as fast. Peak: above the idle process.",
        "", "| configuration | tokens | step, s: median (least to most) | speed to V0 | speed to S1 "
        "| CPU, s: median (V0's over it) | peak, GB | of V0's |", "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in document["summary"]:
        run, memory = runs[row["name"]], f"({row['predicted_peak'] / GB:.2f})" if "predicted_peak" in row else ""
        step, cpu = {"oom": "out of memory"}.get(row["status"], row["status"]), "-"
        if row["status"] == "ok":
            step = f"{row['median_s']:.2f} ({min(run['step_s']):.2f} to {max(run['step_s']):.2f})"
            cpu, memory = f"{statistics.median(run['cpu_s']):.2f}", f"{row['peak'] / GB:.2f} {memory}"
            cpu += f" ({row['cpu_speed_V0']:.2f})" if "cpu_speed_V0" in row else ""
            memory += f", reserved {row['reserved'] / GB:.2f}" if row["reserved"] else ""
        share = f"{100 * row['memory_V0']:.0f} %" if "memory_V0" in row else "-"
        cells = (row["name"], row["tokens"], step, ratio(row, "speed_V0"), ratio(row, "speed_S1"), cpu, memory, share)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if document["longest"]:
        lines += ["", "| configuration | longest long prompt that fits | does not fit |", "|---|---|---|"]
        lines += [f"| {name} | {e['fits']} | {e['too_long'] or '-'} |" for name, e in document["longest"].items()]
    return "\n".join([*lines, "", f"![step time and peak memory]({document['name']}.png)", ""])


def draw(document: dict, file) -> None:
    """Draw step times and peaks; a tick is what plan.py predicts (of a time: V0's over the predicted ratio)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in document["summary"] if row["status"] == "ok"]
    names = [row["name"] for row in rows]
    compared = [row for row in rows if "speed_V0" in row and "predicted_speed_V0" in row]
    times = [row["median_s"] * row["speed_V0"] / row["predicted_speed_V0"] for row in compared]
    figure, axes = plt.subplots(1, 2, figsize=(12, 1.5 + 0.3 * len(rows)), sharey=True, layout="constrained")
    peaks, expected = ([row.get(key, math.nan) / GB for row in rows] for key in ("peak", "predicted_peak"))
    panels = (
        ("step, s", [row["median_s"] for row in rows], times, [row["name"] for row in compared]),
        ("peak above idle, GB", peaks, expected, names),
    )
    for axis, (label, values, ticks, at) in zip(axes, panels, strict=True):
        axis.barh(names, values)
        axis.scatter(ticks, at, marker="|", s=200, color="black", label="predicted")
        axis.set_xlabel(label)
    axes[0].invert_yaxis()
    axes[1].legend()
    figure.suptitle(f"{document['name']}, {document['hardware']['device']}, {document['date']}")
    figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


def write(document: dict, folder: Path, page: bool) -> None:
    """Write the JSON and, for `page`, Markdown and plot; each file is replaced whole."""
    made = {"json": lambda file: file.write(json.dumps(document, indent=1).encode())}
    if page:
        made["md"] = lambda file: file.write(as_markdown(document).encode())
        made["png"] = lambda file: draw(document, file)
    for suffix, make in made.items():
        with replacing(folder / f"{document['name']}.{suffix}") as file:
            make(file)


def hardware(device: str) -> dict:
    """Return what the numbers depend on."""
    names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    name, memory = (names or [platform.machine()])[0], os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device == "cuda":  # asked elsewhere, so that this process takes nothing of the card
        ask = "import torch; card = torch.cuda.get_device_properties(0); print(card.total_memory, card.name)"
        memory, name = subprocess.check_output([sys.executable, "-c", ask], text=True).strip().split(maxsplit=1)
    return {"device": name, "memory_gb": round(int(memory) / GB), "cores": os.cpu_count()}


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


def main() -> None:
    """Measure what is not yet measured, and write it down."""
    args = arguments()
    if args.worker:
        return work(args.worker)
    settings = chosen(args)
    lengths, tunings, slow, steps = (settings.pop(key) for key in ("lengths", "tunings", "slow", "steps"))
    if settings["device"] == "cuda":
        import torch

        if not torch.cuda.is_available():
            sys.exit(f"`--preset {args.preset}` needs a GPU and torch sees none; try `--device cpu --dtype float32`.")
    elif args.longest and not args.memory:
        sys.exit("`--longest` on a CPU needs `--memory`: the GB that a step may take.")
    document = open_document(args, settings)
    args.out.mkdir(parents=True, exist_ok=True)
    todo = configurations(args.variants, args.losses, tunings)
    if args.again:
        names = {name_of(run) for run in todo}
        document["runs"] = {key: run for key, run in document["runs"].items() if name_of(run) not in names}

    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), settings)

        def once(configuration: dict, length: int, trial: bool = False) -> bool:
            """Tell whether it fits; measured and recorded unless that was done before."""
            timed = 1 if trial else slow if configuration["variant"] == "V0" else steps
            run = configuration | {"length": length, "steps": timed, "trial": trial}
            key, began = f"{name_of(run)} L{length}", time.perf_counter()
            seen, how = document["runs"].get(key, {"status": "none"}), "before"
            if not (seen["status"] == "oom" or seen["status"] == "ok" and seen["steps"] >= timed):
                seen = run | measure(settings, run, Path(folder)) | {"date": date.today().isoformat()}
                how = f"in {time.perf_counter() - began:.0f} s"
            document["runs"][key] = seen | {"trial": trial and seen["trial"]}
            write(document | {"summary": [], "longest": {}}, args.out, page=False)
            told = f"{seen['median_s']:.2f} s a step" if seen["status"] == "ok" else seen["status"]
            why = f": {seen['log'].strip().splitlines()[-1]}" if "log" in seen else ""
            print(f"{key}: {told} ({how}){why}", flush=True)
            if trial and seen["status"] not in ("ok", "oom"):
                sys.exit("The search ends here: the trial neither fitted nor ran out of memory.")
            return seen["status"] == "ok"

        jobs = [(c, length) for length in (lengths[:1] if args.longest else lengths) for c in todo]
        for number, (configuration, length) in enumerate(jobs, 1):
            print(f"[{number}/{len(jobs)}] ", end="", flush=True)
            if args.longest:
                find_longest(length, args.grain, lambda n, c=configuration: once(c, n, trial=True))
            else:
                once(configuration, length)
    runs = document["runs"]
    document |= {"summary": summarise(settings, runs), "longest": longest_of(runs)}
    write(document, args.out, page=True)
    print("", as_markdown(document), f"Written: {args.out / document['name']}.json, .md, .png", sep="\n")
    if any(run["status"] == "failed" for run in runs.values()):
        sys.exit("Some configurations failed; the JSON holds the end of their logs.")


if __name__ == "__main__":
    main()
