"""Measure TRL's DPO on the long pair: whole optimizer steps of `trl.DPOTrainer`, for `steps.py`. Needs trl >= 1.15.

As TRL has it by default: a fused head that gives log-probs at the response only, gradient checkpointing, an adapter in
fp32 over a model in bf16; SDPA. The reference is computed beforehand (`precompute_ref_log_probs`), its fastest form.
There is one row, which every step takes: computing the reference of more would cost minutes that no step has in it.
"""

import random
from pathlib import Path

import torch
from benchmark_run import WARM_UP, cap_card, meter, watched


def run_here(settings: dict, run: dict, folder: Path) -> dict:
    """Run one configuration in this process, with the result of `benchmark_run.run_here`."""
    import trl.trainer.utils
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    # TRL 1.16 scores labelled positions alone where Triton runs, and every position elsewhere; here as on a GPU
    trl.trainer.utils._use_triton = lambda device: True

    class Tokenized(DPOTrainer):
        """Rows are token ids already, as this trainer's own preparation leaves them."""

        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    cuda, lora = settings["device"] == "cuda", run["tuning"] == "lora"
    draw, vocabulary = random.Random(0), range(settings["model"]["vocab_size"])
    lengths = {"prompt_ids": run["length"], "chosen_ids": settings["response"], "rejected_ids": settings["response"]}
    rows = Dataset.from_list([{name: draw.choices(vocabulary, k=n) for name, n in lengths.items()}])
    dtype = getattr(torch, settings["dtype"])
    cap_card(cuda, settings["memory"])
    watch = meter(cuda, settings["memory"])

    def train():
        torch.manual_seed(0)
        with torch.device(settings["device"]):
            config = AutoConfig.from_pretrained(folder / "model")
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        recipe = DPOConfig(
            output_dir=str(folder / "out"), save_strategy="no", report_to="none", logging_steps=1, disable_tqdm=True,
            max_steps=WARM_UP + run["steps"], per_device_train_batch_size=1, gradient_accumulation_steps=1,
            learning_rate=1e-6, lr_scheduler_type="constant", optim=settings["optim"], max_length=None,
            gradient_checkpointing=settings["checkpointing"], use_cpu=not cuda, precompute_ref_log_probs=True,
            bf16=settings["dtype"] == "bfloat16" and lora,
        )  # fmt: skip
        adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
        Tokenized(
            model, args=recipe, train_dataset=rows, peft_config=adapter, callbacks=[watch],
            processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        ).train()  # fmt: skip

    return watched(watch, train)
