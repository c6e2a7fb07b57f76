"""Run one configuration of the step benchmark in this process: its model, rows and recipe, and the meter of its steps.

`benchmark_step.py` starts a process for each, `gpu/steps.py` runs several in one. Lack of memory is a result, `oom`.
"""

import ctypes
import gc
import os
import platform
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path

from step_cost import GB

from solopo_plugin.losses import LENGTH_NORMALISED

WARM_UP = 1  # steps before the timed ones: allocators and optimizer states
ROWS = 4  # of every data set; more steps go over them again
NO_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")  # in messages of a plain RuntimeError


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


@contextmanager
def put_back():
    """Put back what a configuration replaces for its variant, so that the next one finds the package's own."""
    from transformers import AutoModelForCausalLM

    import solopo_plugin.workflow as workflow
    from solopo_plugin.forward import TwoStages

    places = [(TwoStages, "_score"), (AutoModelForCausalLM, "from_config"), (workflow, "recorded")]
    before = [(owner, name, owner.__dict__.get(name)) for owner, name in places]
    try:
        yield
    finally:
        for owner, name, value in before:
            if value is not None:
                setattr(owner, name, value)
            elif name in owner.__dict__:
                delattr(owner, name)


def use_variant(variant: str) -> None:
    """Let the trainer's two stages keep all logits (S1, the paper's way)."""
    from llamafactory.train.trainer_utils import get_batch_logps

    from solopo_plugin.forward import Scored, TwoStages

    def score(self, model, batch, side=""):
        names, given = ("input_ids", "attention_mask"), dict(use_cache=False, return_dict=True)
        logits_BTV = model(**{name: batch[side + name] for name in names}, **given).logits.float()
        sums_B, counts_B = get_batch_logps(logits_BTV, batch[f"{side}labels"])
        means_B = sums_B / counts_B
        return Scored(means_B if self.args.pref_loss in LENGTH_NORMALISED else sums_B, means_B, logits_BTV, None)

    if variant == "S1":
        TwoStages._score = score


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


def hardware(device: str) -> dict:
    """Return what the numbers depend on."""
    names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    name, memory = (names or [platform.machine()])[0], os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device == "cuda":  # asked elsewhere, so that this process takes nothing of the card
        ask = "import torch; card = torch.cuda.get_device_properties(0); print(card.total_memory, card.name)"
        memory, name = subprocess.check_output([sys.executable, "-c", ask], text=True).strip().split(maxsplit=1)
    return {"device": name, "memory_gb": round(int(memory) / GB), "cores": os.cpu_count()}
