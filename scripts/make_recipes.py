"""Write the recipes under examples/yaml/: every training run of the SoLoPO paper, from one set of tables.

    python scripts/make_recipes.py            # write all
    python scripts/make_recipes.py --check    # exit 1 and name the files that differ, are missing or should not exist

The keys of a recipe are `{section: {key: (value, origin)}}`. Every number says where it comes from, because the paper
leaves many out: PAPER is stated by SoLoPO (arXiv:2505.11166), README by LongPO's, OURS was chosen here.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = "examples/yaml"
FOLDERS = ("qwen2.5-7b", "llama3.1-8b", "lora")  # wholly generated: any other .yaml in them is stale

PAPER, HOST, OURS, README = "paper", "host default", "ours", "LongPO README"
Keys = dict[str, dict[str, tuple]]

MODELS = {  # name, hub id, the host's template
    "qwen2.5-7b": ("Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct", "qwen"),
    "llama3.1-8b": ("Llama3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct", "llama3"),
}
ALPHA = {  # the paper's, of SoLo-RA on the chosen response; for another method on that model none is known to us
    "qwen2.5-7b": {"dpo": 3.0, "simpo": 1.0, "orpo": 1.0},
    "llama3.1-8b": {"orpo": 4.0},
}
ALPHA_SWEEP = (0.5, 1.0, 2.0, 3.0, 4.0)
PREF_LOSS = {"dpo": "sigmoid", "simpo": "simpo", "orpo": "orpo"}
LABEL = {"dpo": "DPO", "simpo": "SimPO", "orpo": "ORPO"}
# SoLo-X takes the rate of X, so that the two differ by the objective alone.
LEARNING_RATE = {"sft": "1.0e-5", "dpo": "5.0e-7", "simpo": "1.0e-6", "orpo": "5.0e-6"}
CUTOFF = {
    "short": (4096, f"{OURS}; a 1K prompt and its response fit"),
    "long": (10240, f"{OURS}; an 8K prompt and its response fit"),
}
PUBLISHED = {  # rows of the paper's Table 3: LongBenchV1 QA avg, RULER QA avg; of the other recipes none is known to us
    "qwen2.5-7b/sft_short": (38.6, 48.7),
    "qwen2.5-7b/sft_long": (45.3, 59.5),
    "qwen2.5-7b/dpo_short": (43.2, 56.6),
    "qwen2.5-7b/dpo_long": (46.9, 62.2),
    "qwen2.5-7b/solo_dpo": (47.8, 62.8),
    "qwen2.5-7b/simpo_short": (44.1, 56.0),
    "qwen2.5-7b/simpo_long": (44.6, 57.5),
    "qwen2.5-7b/solo_simpo": (48.4, 63.9),
    "qwen2.5-7b/orpo_short": (38.6, 57.1),
    "qwen2.5-7b/orpo_long": (45.3, 55.1),
    "qwen2.5-7b/solo_orpo": (49.5, 65.1),
    "qwen2.5-7b/longpo": (43.7, 52.2),
    "llama3.1-8b/sft_short": (44.6, 59.2),
    "llama3.1-8b/sft_long": (46.1, 58.4),
    "llama3.1-8b/orpo_short": (44.1, 58.4),
    "llama3.1-8b/orpo_long": (45.4, 58.9),
    "llama3.1-8b/solo_orpo": (46.3, 61.3),
}
SOLOPO = "SoLoPO (arXiv:2505.11166)"
DOUBTFUL = ("qwen2.5-7b/orpo_short", "qwen2.5-7b/orpo_long")

ROWS = {  # last part of a dataset's name -> what one row of it holds
    "solopo": "rows (x_short, x_long, chosen, rejected), both responses sampled on x_short",
    "longpo": "rows as for SoLoPO, but the rejected response sampled on x_long",
    "short_po": "pairs (x_short, chosen, rejected), sampled on x_short",
    "long_po": "pairs (x_long, chosen, rejected), sampled on x_long",
    "expand_long_po": "pairs (x_long, chosen, rejected), sampled on x_short",
    "sft_short": "(x_short, chosen), sampled on x_short",
    "sft_long": "(x_long, chosen), sampled on x_long",
    "sft_expand_long": "(x_long, chosen), sampled on x_short",
}
FOOT = (
    'Not shipped: make the rows or register your own (README, "Data format").',
    "Not run at 7B by this project.",
    f'Numbers: "{PAPER}" = SoLoPO; "{HOST}" = of LLaMA-Factory 0.9.5; "{README}" = its command line;',
    f'"{OURS}" = chosen here, because the paper does not give it or for practical reasons.',
)
CUTS = (
    "The host silently cuts the end of an over-long prompt, which is the question: keep cutoff_len above every prompt."
)
SIMPO_BETA = "SimPO's authors use a far larger beta (2 to 2.5). The host's default stands: SoLoPO's value is not known."
LONGPO = (
    "LongPO (arXiv:2502.13922): its README says rmsprop and beta 0.01, taken here as in SoLoPO's baseline; its paper",
    "says Adam and beta 0.1. They agree on lr 5e-7 and lambda 0.01. The batch of 64 is SoLoPO's.",
    "No optimizer offload: with it, accelerate would silently put DeepSpeed's CPU Adam in the place of rmsprop.",
    "The plain SoLoPO rows (..._solopo) run too; then the rejected response comes from x_short.",
)
LORA = (
    "Not in the paper, which fine-tunes in full: a way to run the method on one GPU of 24 to 80 GB.",
    "Estimated, not measured: about 6 GB of 4-bit weights and 5 to 10 GB for the rest. Needs bitsandbytes, which",
    "`pip install '.[qlora]'` brings. On 40 GB and more remove `quantization_bit` (then 15 GB of bf16 weights).",
)


@dataclass
class Recipe:
    name: str  # path below examples/yaml/, without its suffix
    title: str
    about: tuple[str, ...]  # further lines of the header
    data: str  # a key of ROWS
    keys: Keys
    gpus: int = 4


def base(name: str, method: str, data: str, length: str) -> Keys:
    """What all recipes share: full fine-tuning on 4 GPUs. `name` is <model>/<recipe>, or below it."""
    model, recipe = name.split("/")[0], name.split("/")[-1]
    _, hub, template = MODELS[model]
    return {
        "model": {"model_name_or_path": (hub, PAPER), "flash_attn": ("fa2", PAPER)},
        "method": {
            "stage": ("sft" if method == "sft" else "dpo", None),
            "do_train": (True, None),
            "finetuning_type": ("full", PAPER),
            "deepspeed": (f"{OUT}/deepspeed/ds_z3_offload.json", PAPER),
        },
        "dataset": {
            "dataset": (f"musique_{model.replace('-', '_')}_{data}", None),
            "dataset_dir": ("data", None),
            "template": (template, None),
            "cutoff_len": CUTOFF[length],
        },
        "output": {
            "output_dir": (f"saves/{model}/{recipe}", None),
            "logging_steps": (1, OURS),
            "save_strategy": ("steps", OURS),
            "save_steps": (20, f"{OURS}; of 79. The paper picks the checkpoint by LongBenchV1 QA, a test set"),
            "save_total_limit": (2, f"{OURS}; of over 100 GB each: a killed run resumes. All four: save_only_model"),
            "plot_loss": (True, None),
            "report_to": ("none", None),
        },
        "train": {
            "per_device_train_batch_size": (1, OURS),
            "gradient_accumulation_steps": (16, f"{OURS}; x 4 GPUs = 64 rows a step, which is the paper's"),
            "learning_rate": (LEARNING_RATE[method], OURS),
            "optim": ("adamw_torch", PAPER),
            "num_train_epochs": (1.0, PAPER),
            "lr_scheduler_type": ("cosine", PAPER),
            "warmup_steps": (0.1, f"{PAPER}; warmup_ratio, which transformers 5 spells as a warmup_steps below 1"),
            "bf16": (True, PAPER),
            "ddp_timeout": (180000000, f"{OURS}; seconds, the other ranks wait while one tokenises"),
        },
    }


def preference(name: str, method: str, data: str, length: str) -> Keys:
    """The host's own `stage: dpo` with one of its losses."""
    keys = base(name, method, data, length)
    keys["method"] |= {"pref_loss": (PREF_LOSS[method], PAPER), "pref_beta": (0.1, HOST)}
    if method == "simpo":
        keys["method"]["simpo_gamma"] = (0.5, HOST)
    return keys


def solo(name: str, method: str) -> Keys:
    """The paper's method: preference loss on the short pair, reward of the chosen aligned to the long context."""
    keys = preference(name, method, "solopo", "long")
    keys["method"] |= {
        "stage": ("solopo", None),
        "solopo_alpha": (ALPHA[name.split("/")[0]][method], PAPER),
        "solopo_align": ("reward", PAPER),
        "solopo_align_on": ("chosen", PAPER),
    }
    return keys


def longpo(name: str) -> Keys:
    """LongPO with the values of its README, as in SoLoPO's baseline."""
    keys = preference(name, "dpo", "longpo", "long")
    keys["method"] |= {
        "stage": ("solopo", None),
        "deepspeed": (f"{OUT}/deepspeed/ds_z3.json", OURS),
        "pref_beta": (0.01, README),
        "solopo_objective": ("longpo", None),
        "solopo_longpo_lambda": (0.01, README),
    }
    keys["train"] |= {
        "learning_rate": ("5.0e-7", README),
        "optim": ("rmsprop", README),
        "lr_scheduler_type": ("cosine", README),
        "warmup_steps": (0.1, f"{README}; as a share of the steps"),
    }
    return keys


def lora(name: str) -> Keys:
    """SoLo-ORPO by LoRA on one GPU; the batch of 64 comes from accumulation alone."""
    keys = solo(name, "orpo")
    del keys["method"]["deepspeed"], keys["train"]["ddp_timeout"]
    del keys["output"]["save_total_limit"]  # adapters are small
    keys["model"] |= {"quantization_bit": (4, f"{OURS}; for 24 GB. Remove it on 40 GB and more")}
    keys["method"] |= {"finetuning_type": ("lora", OURS), "lora_rank": (16, OURS), "lora_target": ("all", OURS)}
    keys["train"] |= {
        "per_device_train_batch_size": (1, OURS),
        "gradient_accumulation_steps": (64, f"{OURS}; 64 rows a step are the paper's"),
        "learning_rate": ("5.0e-5", OURS),
    }
    return keys


def reproduces(name: str, row: str) -> tuple[str, ...]:
    """Header lines: the row of the paper that a recipe is, with its two averages."""
    longbench, ruler = PUBLISHED[name]
    lines = [
        f"Reproduces: {SOLOPO}, Table 3, row {row}.",
        f"LongBenchV1 QA avg {longbench}, RULER QA avg {ruler}: published, not reproduced here.",
    ]
    if name in DOUBTFUL:
        lines.append("That LongBenchV1 row repeats the paper's SFT row in every column: doubtful.")
    return tuple(lines)


def follows(what: str) -> tuple[str, ...]:
    """Header lines of what the paper has, without a number that we know."""
    return (f"Follows {SOLOPO}, {what}.", "What the paper's run scored is not known to us.")


def baselines(model: str) -> Iterator[Recipe]:
    """SFT and plain preference optimization on each data set of the comparison, and LongPO."""
    on = f"on {MODELS[model][0]}"
    for kind, length, of_paper in (
        ("short", "short", ()),
        ("long", "long", ()),
        ("expand_long", "long", ("section 2.2, Expand-Long-SFT", 'the non-decoupled comparison "expand-long PO"')),
    ):
        name, data = f"{model}/sft_{kind}", f"sft_{kind}"
        about = (*(follows(of_paper[0]) if of_paper else reproduces(name, f"SFT, {kind}")), CUTS)
        keys = base(name, "sft", data, length)
        yield Recipe(name, f"SFT {on}, chosen responses, data D_{kind}.", about, data, keys)
        for method in ALPHA[model]:
            name, data, label = f"{model}/{method}_{kind}", f"{kind}_po", LABEL[method]
            about = follows(of_paper[1]) if of_paper else reproduces(name, f"{label}, {kind}")
            about += (SIMPO_BETA, CUTS) if method == "simpo" else (CUTS,)
            keys = preference(name, method, data, length)
            yield Recipe(name, f"{label} {on}, the host's own stage, data D_{kind}.", about, data, keys)
    name = f"{model}/longpo"
    about = reproduces(name, "LongPO") if name in PUBLISHED else (f"Not in {SOLOPO}, whose LongPO is on Qwen2.5-7B.",)
    yield Recipe(name, f"LongPO {on}.", about + LONGPO, "longpo", longpo(name))


def ablations(method: str, alpha: float, beta: float) -> Iterator[tuple[str, dict[str, tuple], tuple[str, ...]]]:
    """Suffix of the name, keys that are not those of the main recipe, and lines of the header."""
    alpha_of_both = (alpha, f"{PAPER}; of the chosen response alone. That of this ablation is not known to us")
    both = follows("the ablation that aligns the rejected response as well")
    yield "both", {"solopo_align_on": ("both", PAPER), "solopo_alpha": alpha_of_both}, both

    weight = (alpha, f"{OURS}; the paper's of SoLo-RA. That of SoLo-KL is not known to us")
    why = follows("the ablation SoLo-KL (eq. 10): log-probs, not rewards, are aligned")
    if method != "orpo":  # whose reward is not a multiple of the log-prob
        weight = (float(f"{alpha * beta:g}"), f"{OURS}; alpha x beta of the run that it is compared with")
        why += (
            f"{LABEL[method]}'s reward is beta times the log-prob: with alpha x beta this is that run, to rounding,",
            f"and with its alpha of {alpha:g} it would be SoLo-RA with {alpha / beta:g}.",
        )
    yield "kl", {"solopo_align": ("logp", PAPER), "solopo_alpha": weight}, why

    sweep = "One of a sweep of our choosing: the paper's grid is not known to us."
    for value in ALPHA_SWEEP:
        if value != alpha:
            yield f"alpha_{value:g}", {"solopo_alpha": (value, OURS)}, (sweep,)


def solos(model: str, method: str) -> Iterator[Recipe]:
    """The paper's recipe for one loss, then its ablations."""
    main, title = f"solo_{method}", f"SoLo-{LABEL[method]} on {MODELS[model][0]}"
    about = reproduces(f"{model}/{main}", f"SoLo-{LABEL[method]}") + ((SIMPO_BETA,) if method == "simpo" else ())
    first = Recipe(f"{model}/{main}", f"{title}.", about, "solopo", solo(f"{model}/{main}", method))
    yield first

    before = first.keys["method"]
    for suffix, changes, why in ablations(method, ALPHA[model][method], before["pref_beta"][0]):
        name = f"{model}/ablations/{main}_{suffix}"
        keys = solo(name, method)
        keys["method"] |= changes
        changed = [key for key, (value, _) in keys["method"].items() if value != before[key][0]]
        about = (*why, f"Differs from ../{main}.yaml in {', '.join(changed)} and output_dir only.")
        study = ", ".join(f"{key}: {changes[key][0]}" for key in changed)
        yield Recipe(name, f"{title}, {study}.", about, "solopo", keys)


def render(recipe: Recipe) -> str:
    """One recipe as YAML: the header, then the host's sections with an origin behind every key that has one."""
    many = recipe.gpus > 1
    env = f"FORCE_TORCHRUN=1 NPROC_PER_NODE={recipe.gpus}" if many else "CUDA_VISIBLE_DEVICES=0"
    header = [recipe.title, *recipe.about, "Launch:"]
    header += [f"{env} llamafactory-cli train {OUT}/{recipe.name}.yaml"]
    header += ["Hardware: " + ("4 x A100 80GB in the paper." if many else "one GPU of 24 to 80 GB (see above).")]
    header += [f"Data: {recipe.keys['dataset']['dataset'][0]}: {ROWS[recipe.data]}."]
    lines = [f"# {line}" for line in (*header, *FOOT)]
    for section, pairs in recipe.keys.items():
        lines += ["", f"### {section}"]
        for key, (value, origin) in pairs.items():
            shown = str(value).lower() if isinstance(value, bool) else value
            lines.append(f"{key}: {shown}" + (f"  # {origin}" if origin else ""))
    return "\n".join(lines) + "\n"


def recipes() -> dict[str, str]:
    """All recipes: path relative to the repository -> text."""
    every = [r for model in ALPHA for r in baselines(model)]
    every += [r for model, methods in ALPHA.items() for method in methods for r in solos(model, method)]
    title, keys = "SoLo-ORPO on Qwen2.5-7B-Instruct by LoRA, on one GPU.", lora("qwen2.5-7b/solo_orpo_lora")
    every.append(Recipe("lora/qwen2.5-7b_solo_orpo_lora", title, LORA, "solopo", keys, gpus=1))
    return {f"{OUT}/{recipe.name}.yaml": render(recipe) for recipe in every}


def main() -> int:
    wanted = recipes()
    if "--check" not in sys.argv[1:]:
        for path, text in wanted.items():
            (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
            (ROOT / path).write_text(text, encoding="utf-8")
    found = {p.relative_to(ROOT).as_posix() for folder in FOLDERS for p in (ROOT / OUT / folder).rglob("*.yaml")}
    wrong = [f"missing: {path}" for path in sorted(wanted.keys() - found)]
    wrong += [f"should not exist: {path}" for path in sorted(found - wanted.keys())]
    both = sorted(wanted.keys() & found)
    wrong += [f"differs: {path}" for path in both if (ROOT / path).read_text(encoding="utf-8") != wanted[path]]
    print("\n".join(wrong) or f"{len(wanted)} recipes are as generated.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
