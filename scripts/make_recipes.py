"""Write the recipes under examples/yaml/: every training run of the SoLoPO paper, from one set of tables.

    python scripts/make_recipes.py            # write all
    python scripts/make_recipes.py --check    # exit 1 and name the files that differ, are missing or should not exist

A recipe is a header and `{section: {key: (value, origin)}}`. Every number says where it comes from, because the paper
leaves many out: PAPER is stated by SoLoPO (arXiv:2505.11166), README by LongPO's, OURS was chosen here.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = "examples/yaml"
FOLDERS = ("qwen2.5-7b", "llama3.1-8b", "lora")  # wholly generated: any other .yaml in them is stale

PAPER, HOST, OURS, README = "paper", "host default", "ours", "LongPO README"

MODELS = {
    "qwen2.5-7b": {"name": "Qwen2.5-7B-Instruct", "hub": "Qwen/Qwen2.5-7B-Instruct", "template": "qwen"},
    "llama3.1-8b": {"name": "Llama3.1-8B-Instruct", "hub": "meta-llama/Llama-3.1-8B-Instruct", "template": "llama3"},
}
ALPHA = {  # the paper's; a method without a value here is not in the paper for that model
    "qwen2.5-7b": {"dpo": 3.0, "simpo": 1.0, "orpo": 1.0},
    "llama3.1-8b": {"orpo": 4.0},
}
ALPHA_SWEEP = (0.5, 1.0, 2.0, 3.0, 4.0)
PREF_LOSS = {"dpo": "sigmoid", "simpo": "simpo", "orpo": "orpo"}
LABEL = {"dpo": "DPO", "simpo": "SimPO", "orpo": "ORPO", "sft": "SFT"}
# The paper gives none. SoLo-X uses the rate of X, so that the two differ by the objective alone.
LEARNING_RATE = {"sft": "1.0e-5", "dpo": "5.0e-7", "simpo": "1.0e-6", "orpo": "5.0e-6"}
CUTOFF = {
    "short": (4096, f"{OURS}; a 1K prompt and its answer fit"),
    "long": (10240, f"{OURS}; an 8K prompt and its answer fit"),
}
PUBLISHED = {  # LongBenchV1 QA avg, RULER QA avg
    "qwen2.5-7b": {
        "sft_short": (38.6, 48.7), "sft_long": (45.3, 59.5),
        "dpo_short": (43.2, 56.6), "dpo_long": (46.9, 62.2), "solo_dpo": (47.8, 62.8),
        "simpo_short": (44.1, 56.0), "simpo_long": (44.6, 57.5), "solo_simpo": (48.4, 63.9),
        "orpo_short": (38.6, 57.1), "orpo_long": (45.3, 55.1), "solo_orpo": (49.5, 65.1),
        "longpo": (43.7, 52.2),
    },
    "llama3.1-8b": {"orpo_short": (44.1, 58.4), "orpo_long": (45.4, 58.9), "solo_orpo": (46.3, 61.3)},
}  # fmt: skip
DOUBTFUL = {("qwen2.5-7b", "orpo_short"), ("qwen2.5-7b", "orpo_long")}

ROWS = {  # data set of a recipe -> what a row of it holds
    "solopo": "rows (x_short, x_long, chosen, rejected), both answers sampled on x_short",
    "longpo": "rows as for SoLoPO, with chosen sampled on x_short and rejected on x_long",
    "short_po": "pairs (x_short, chosen, rejected), sampled on x_short",
    "long_po": "pairs (x_long, chosen, rejected), sampled on x_long",
    "expand_long_po": "pairs (x_long, chosen, rejected), sampled on x_short",
    "sft_short": "(x_short, chosen)",
    "sft_long": "(x_long, chosen)",
}
NUMBERS = f'# Origin of the numbers: "{PAPER}" = SoLoPO; "{HOST}" = LLaMA-Factory 0.9.5; "{OURS}" = chosen here, '
NUMBERS += "the paper's is not known."
SIMPO_BETA = "# SimPO's authors use a far larger beta (2 to 2.5); the host's default stands as the paper's is not known."
CUTS = "# The host cuts the end of an over-long prompt, and with it the question, without a word: keep cutoff_len above it."


def base(model: str, method: str, data: str, length: str) -> dict:
    """Sections that all recipes share; full fine-tuning of `model` on 4 GPUs."""
    return {
        "model": {"model_name_or_path": (MODELS[model]["hub"], PAPER), "flash_attn": ("fa2", PAPER)},
        "method": {
            "stage": ("sft" if method == "sft" else "dpo", None),
            "do_train": (True, None),
            "finetuning_type": ("full", PAPER),
            "deepspeed": (f"{OUT}/deepspeed/ds_z3_offload.json", PAPER),
        },
        "dataset": {
            "dataset": (f"musique_{model.replace('-', '_')}_{data}", None),
            "dataset_dir": ("data", None),
            "template": (MODELS[model]["template"], None),
            "cutoff_len": CUTOFF[length],
        },
        "output": {
            "output_dir": (None, None),  # filled in by `add`
            "logging_steps": (1, OURS),
            "save_strategy": ("steps", OURS),
            "save_steps": (20, f"{OURS}; 4 checkpoints of 79 steps. The paper picks by LongBenchV1 QA, a test benchmark"),
            "save_only_model": (True, f"{OURS}; 4 full checkpoints of one run would take about 0.4 TB"),
            "overwrite_output_dir": (True, f"{OURS}; weights alone cannot be resumed, so a second run starts anew"),
            "plot_loss": (True, None),
            "report_to": ("none", None),
        },
        "train": {
            "per_device_train_batch_size": (1, f"{PAPER}; total 64 = 4 GPUs x 1 x 16, the split is ours"),
            "gradient_accumulation_steps": (16, PAPER),
            "learning_rate": (LEARNING_RATE[method], OURS),
            "optim": ("adamw_torch", PAPER),
            "num_train_epochs": (1.0, PAPER),
            "lr_scheduler_type": ("cosine", PAPER),
            "warmup_steps": (0.1, f"{PAPER}; below 1 it is the share of steps that `warmup_ratio` was"),
            "bf16": (True, PAPER),
            "ddp_timeout": (180000000, f"{OURS}; seconds: the other ranks wait while one tokenises"),
        },
    }


def preference(keys: dict, method: str) -> dict:
    """Add the knobs of a preference loss of the host."""
    keys["method"] |= {"pref_loss": (PREF_LOSS[method], PAPER), "pref_beta": (0.1, HOST)}
    if method == "simpo":
        keys["method"]["simpo_gamma"] = (0.5, HOST)
    return keys


def solo(model: str, method: str) -> dict:
    """The paper's own recipe: preference loss on the short pair, chosen reward aligned to the long context."""
    keys = preference(base(model, method, "solopo", "long"), method)
    keys["method"] |= {
        "stage": ("solopo", None),
        "solopo_alpha": (ALPHA[model][method], PAPER),
        "solopo_align": ("reward", PAPER),
        "solopo_align_on": ("chosen", PAPER),
    }
    return keys


def longpo(model: str) -> dict:
    """LongPO with the values of its README, as SoLoPO's baseline has it."""
    keys = preference(base(model, "dpo", "longpo", "long"), "dpo")
    keys["method"] |= {
        "stage": ("solopo", None),
        "deepspeed": (f"{OUT}/deepspeed/ds_z3.json", OURS),
        "pref_loss": ("sigmoid", README),
        "pref_beta": (0.01, README),
        "solopo_objective": ("longpo", None),
        "solopo_longpo_lambda": (0.01, README),
    }
    keys["train"] |= {
        "learning_rate": ("5.0e-7", README),
        "optim": ("rmsprop", README),
        "lr_scheduler_type": ("cosine", README),
        "warmup_steps": (0.1, README),
    }
    return keys


LONGPO_NOTES = (
    "# LongPO (arXiv:2502.13922) contradicts itself: its README says rmsprop, beta 0.01 (used here, as in SoLoPO's baseline);",
    "# its paper says Adam, beta 0.1. Both: lr 5e-7, lambda 0.01. Batch 64 is SoLoPO's.",
    "# No optimizer offload: with it, accelerate would silently put DeepSpeed's CPU Adam in the place of rmsprop.",
    "# The plain SoLoPO rows (..._solopo) are accepted too; then the rejected answer comes from x_short.",
)


def lora() -> dict:
    """SoLo-ORPO by LoRA on one GPU; the total batch of 64 comes from accumulation alone."""
    keys = solo("qwen2.5-7b", "orpo")
    keys["method"] |= {"finetuning_type": ("lora", OURS), "lora_rank": (16, OURS), "lora_target": ("all", OURS)}
    del keys["method"]["deepspeed"], keys["train"]["ddp_timeout"]
    keys["output"]["save_only_model"] = (False, HOST)  # adapters are small: keep what a resumed run needs
    del keys["output"]["overwrite_output_dir"]
    keys["train"] |= {
        "per_device_train_batch_size": (1, f"{PAPER}; total 64 = 1 GPU x 1 x 64, the split is ours"),
        "gradient_accumulation_steps": (64, PAPER),
        "learning_rate": ("5.0e-5", OURS),
    }
    return keys


def text(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def render(title: str, notes: tuple[str, ...], launch: str, data: str, keys: dict) -> str:
    """One recipe as YAML, in the host's order of sections, an origin behind every key that has one."""
    name = keys["dataset"]["dataset"][0]
    lines = [f"# {title}", *notes, f"# Launch: {launch}"]
    lines += [f"# Data: {name}: {ROWS[data]}.", '# Not shipped: make the rows or register yours (README, "Data format").']
    lines += ["# Not run at 7B by this project.", NUMBERS]
    for section, pairs in keys.items():
        lines += ["", f"### {section}"]
        lines += [f"{key}: {text(value)}" + (f"  # {origin}" if origin else "") for key, (value, origin) in pairs.items()]
    return "\n".join(lines) + "\n"


def recipes() -> dict[str, str]:
    """All recipes: path relative to the repository -> text."""
    files = {}

    def add(folder: str, name: str, title: str, data: str, keys: dict, notes=(), gpus: int = 4, model: str = "") -> None:
        model, path = model or folder.split("/")[0], f"{OUT}/{folder}/{name}.yaml"
        keys["output"]["output_dir"] = (f"saves/{model}/{name}", None)
        env = f"FORCE_TORCHRUN=1 NPROC_PER_NODE={gpus}" if gpus > 1 else "CUDA_VISIBLE_DEVICES=0"
        if gpus > 1:
            notes = (*notes, "# Hardware: the paper's is 4 x A100 80GB.")
        files[path] = render(title, notes, f"{env} llamafactory-cli train {path}", data, keys)

    def reproduces(model: str, name: str, row: str) -> tuple[str, ...]:
        table = "Table 2" if model == "qwen2.5-7b" else "results on Llama3.1-8B"
        lines = [f"# Reproduces: SoLoPO (arXiv:2505.11166), {table}, row {row}."]
        if name in PUBLISHED[model]:
            longbench, ruler = PUBLISHED[model][name]
            lines.append(f"# LongBenchV1 QA avg {longbench}, RULER QA avg {ruler} (published, not reproduced here).")
        if (model, name) in DOUBTFUL:
            lines.append("# That LongBenchV1 row repeats the paper's SFT row in every column: doubtful.")
        return tuple(lines)

    for model, alphas in ALPHA.items():
        on = f"on {MODELS[model]['name']}"
        for data in ("sft_short", "sft_long"):
            length = data.split("_")[1]
            add(model, data, f"SFT on the chosen answers, {length} context, {on}.", data, base(model, "sft", data, length),
                (*reproduces(model, data, f"SFT, {length}"), CUTS))  # fmt: skip
        add(model, "longpo", f"LongPO {on}.", "longpo", longpo(model), reproduces(model, "longpo", "LongPO") + LONGPO_NOTES)
        for method, alpha in alphas.items():
            beta = (SIMPO_BETA,) if method == "simpo" else ()
            label, main = LABEL[method], f"solo_{method}"
            for data in ("short_po", "long_po", "expand_long_po"):
                kind = data.removesuffix("_po")
                name, length = f"{method}_{kind}", kind.split("_")[-1]
                title = f"Plain {label} on D_{kind.replace('_', '-')} {on}: the host's own stage."
                if kind == "expand_long":
                    title = title.replace(": the", ", the non-decoupled ablation: the")
                add(model, name, title, data, preference(base(model, method, data, length), method),
                    (*reproduces(model, name, f"{label}, {kind.replace('_', '-')}"), *beta, CUTS))  # fmt: skip
            about = reproduces(model, main, f"SoLo-{label}")
            add(model, main, f"SoLo-{label} {on}.", "solopo", solo(model, method), about + beta)
            changes = {f"{main}_both": ("solopo_align_on", "both", PAPER), f"{main}_kl": ("solopo_align", "logp", PAPER)}
            changes |= {f"{main}_alpha_{v:g}": ("solopo_alpha", v, OURS) for v in ALPHA_SWEEP if v != alpha}
            why = {
                "solopo_align_on": "# Reproduces: the paper's ablation that aligns the rejected answer as well.",
                "solopo_align": "# Reproduces: SoLo-KL (eq. 10), the paper's ablation that aligns log-probs, not rewards.",
                "solopo_alpha": "# One of a sweep of our choosing: the paper's grid is not known to us.",
            }
            for name, (key, value, origin) in changes.items():
                keys = solo(model, method)
                keys["method"][key] = (value, origin)
                add(f"{model}/ablations", name, f"SoLo-{label} {on}, {key}: {text(value)}.", "solopo", keys,
                    (why[key], f"# Differs from ../{main}.yaml in {key} and output_dir only."))  # fmt: skip

    add("lora", "qwen2.5-7b_solo_orpo_lora", "SoLo-ORPO by LoRA on Qwen2.5-7B-Instruct, on one GPU.", "solopo", lora(), (
        "# Not in the paper, which fine-tunes in full; a way to run the method on one card of 24 to 80 GB.",
        "# Estimated, not measured: bf16 weights 15 GB, adapter, activations and logits some 5 to 10 GB: 40 GB should hold it.",
        "# On 24 GB add `quantization_bit: 4` to the model section (needs bitsandbytes; weights then about 6 GB).",
    ), gpus=1, model="qwen2.5-7b")  # fmt: skip
    return files


def main() -> int:
    wanted = recipes()
    if "--check" not in sys.argv[1:]:
        for path, content in wanted.items():
            (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
            (ROOT / path).write_text(content, encoding="utf-8")
    found = {str(p.relative_to(ROOT)) for folder in FOLDERS for p in (ROOT / OUT / folder).rglob("*.yaml")}
    wrong = [f"missing: {path}" for path in sorted(wanted.keys() - found)]
    wrong += [f"should not exist: {path}" for path in sorted(found - wanted.keys())]
    same = wanted.keys() & found
    wrong += [f"differs: {p}" for p in sorted(same) if (ROOT / p).read_text(encoding="utf-8") != wanted[p]]
    print("\n".join(wrong) or f"{len(wanted)} recipes are as generated.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
