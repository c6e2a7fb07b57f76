"""The lab's comparison: one recipe per arm under examples/yaml/lab/TASK, from one table per task.

    python scripts/lab/arms.py            # write all
    python scripts/lab/arms.py --check    # exit 1 and name the files that differ, are missing or should not exist

All arms of a task share base, steps, batch, schedule and optimizer, those on one data set also a seed's rows; they
differ in the table's keys.
"""

import sys

import yaml
from recall import ROOT

from solopo_plugin.qa.files import replacing

FOLDER = ROOT / "examples/yaml/lab"
RATE = 3e-4  # of every arm whose rate is not chosen
RATES = (1.5e-4, RATE, 6e-4)  # of the learning-rate sweep
SWEEP_SEED = 100  # its rows are of no other seed, its questions not those that are reported
FURTHER = {  # more of it where the best of these is at an end, or nothing works
    "sft_long": (1.2e-3,),
    "orpo_long": (1.2e-3,),
    "simpo_short": (7.5e-5,),
    "solo_simpo": (3.75e-5, 7.5e-5),
    "solo_orpo": (3.75e-5, 7.5e-5),
    "longpo": (5e-6, 1.5e-5, 5e-5),
}
CHOSEN = {  # task -> method -> the rate that the sweep chose, where it is not RATE
    "recall": {
        "sft_long": 6e-4,
        "orpo_long": 6e-4,
        "simpo_short": 7.5e-5,
        "solo_simpo": 7.5e-5,
        "solo_orpo": 3.75e-5,
        "longpo": 5e-6,
    },
    "two_hop": {"dpo_short": 1e-5, "solo_dpo": 1e-5, "longpo": 5e-6},
}
LOWER, HIGHER = (3e-5, 1e-4, RATE), (RATE, 6e-4)
TWO_HOP_RATES = {  # tried on the second task, with its first seed
    "dpo_short": (1e-5, *LOWER),
    "solo_dpo": (1e-5, *LOWER),
    "solo_dpo_detached": LOWER,
    "longpo": (5e-6, *LOWER),
    "solo_orpo": LOWER[1:],
    "sft_long": HIGHER,
    "orpo_long": HIGHER,
}
BOTH = {  # of both tasks
    "do_train": True,
    "finetuning_type": "full",
    "template": "empty",
    "overwrite_output_dir": True,
    "logging_steps": 10,
    "save_only_model": True,
    "report_to": "none",
    "per_device_train_batch_size": 8,  # half of the demo's, for half of its time
    "gradient_accumulation_steps": 1,
    "learning_rate": RATE,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 10,
    "disable_gradient_checkpointing": True,
    "use_cpu": True,
    "seed": 0,
}
COMMON = {
    "recall": BOTH
    | {
        "model_name_or_path": "data/lab/base",
        "dataset_dir": "saves/lab/rows_0",  # as scripts/lab/run.py writes them
        "cutoff_len": 256,
        "save_steps": 40,  # whose accuracy is the curve over training
        "num_train_epochs": 1.0,  # 200 steps
    },
    "two_hop": BOTH
    | {
        "model_name_or_path": "data/lab/two_hop_base",
        "dataset_dir": "saves/lab/two_hop/rows_0",
        "cutoff_len": 704,
        "save_steps": 50,
        "max_steps": 200,  # the sets differ in rows, so epochs are not what arms share
    },
}
LOSSES = {
    "dpo": {"pref_loss": "sigmoid", "pref_beta": 0.1},
    "ipo": {"pref_loss": "ipo", "pref_beta": 0.1},
    "slic": {"pref_loss": "hinge", "pref_beta": 0.1},
    "simpo": {"pref_loss": "simpo", "pref_beta": 2.0, "simpo_gamma": 0.5},
    "orpo": {"pref_loss": "orpo", "pref_beta": 0.1},
}
PAPER_ALPHA = {"dpo": 3.0, "ipo": 1.0, "slic": 1.0, "simpo": 1.0, "orpo": 1.0}  # ipo and slic: ours
CONTEXTS = {
    "short": "the short pair",
    "long": "pairs sampled from the base on the long context",
    "expand_long": "the short pair on the long context",
}
ALPHAS = {"orpo": (0.03, 0.1, 0.3, 1.0, 3.0), "dpo": (1.0, 3.0, 10.0), "simpo": (0.15, 1.0)}
DETACHED_ALPHAS = (("orpo", 0.3), ("orpo", 3.0), ("orpo", 10.0), ("dpo", 10.0))  # beside the paper's
WITHOUT_EVIDENCE = "a quarter of the short contexts without the evidence"
COMPRESSED = (4, 25, 50, 100)  # pairs in the short context, beside 8


def of_recall() -> dict[str, tuple[str, dict]]:
    """Name -> what it is, its keys beside `COMMON`: the paper's comparison, then what goes beyond it."""
    table = {}
    for context, what, data in (
        ("short", "the short pair's chosen response", "short"),
        ("long", "the base's right answers on the long context", "long"),
        ("expand_long", "the short pair's chosen response on the long context", "long_gold"),
    ):
        table[f"sft_{context}"] = (f"SFT on {what}", {"stage": "sft", "dataset": f"recall_sft_{data}"})
    for loss in ("dpo", "simpo", "orpo"):
        for context, what in CONTEXTS.items():
            if (loss, context) != ("simpo", "expand_long"):  # at every rate worse than the base, and costly
                keys = {"stage": "dpo", **LOSSES[loss], "dataset": f"recall_{context}_po"}
                table[f"{loss}_{context}"] = (f"{loss.upper()} on {what}", keys)
    lost = {"stage": "dpo", **LOSSES["orpo"], "dataset": "recall_short_po_lost"}
    table["orpo_short_lost"] = (f"ORPO on the short pair, {WITHOUT_EVIDENCE}", lost)
    longpo = {"solopo_objective": "longpo", "solopo_longpo_lambda": 0.01, "dataset": "recall_longpo"}
    table["longpo"] = ("LongPO", {"stage": "solopo", **LOSSES["dpo"], **longpo})

    def solo(loss: str, suffix: str, what: str, **keys):
        fixed = {"stage": "solopo", **LOSSES[loss], "solopo_alpha": PAPER_ALPHA[loss], "dataset": "recall_solopo"}
        table[f"solo_{loss}{suffix}"] = (f"SoLo-{loss.upper()}, {what}", fixed | keys)

    detached, drop, both, kl = ({f"solopo_{key}": value} for key, value in (
        ("detach_short", True), ("penalty", "drop"), ("align_on", "both"), ("align", "logp"),
    ))  # fmt: skip
    for loss in LOSSES:
        solo(loss, "", "the paper's form")
    for loss, alphas in ALPHAS.items():
        for alpha in alphas:
            if alpha != PAPER_ALPHA[loss]:
                solo(loss, f"_alpha_{alpha:g}", f"alpha {alpha:g}", solopo_alpha=alpha)
    for loss in ("dpo", "simpo", "orpo"):
        solo(loss, "_detached", "no gradient through the short side", **detached)
    for loss in ("dpo", "orpo"):
        solo(loss, "_drop", "one-sided penalty", **drop)
        solo(loss, "_drop_detached", "one-sided, detached", **drop, **detached)
    solo("orpo", "_kl", "SoLo-KL", **kl)
    for suffix, what, keys in (("drop", "one-sided", drop), ("both", "both aligned", both), ("kl", "SoLo-KL", kl)):
        solo("orpo", f"_alpha_0.3_{suffix}", f"alpha 0.3, {what}", solopo_alpha=0.3, **keys)
    solo("dpo", "_both", "both aligned", **both)
    solo("dpo", "_alpha_1_both", "alpha 1, both aligned", solopo_alpha=1.0, **both)
    for pairs in COMPRESSED:
        what = f"alpha 0.3, {pairs} pairs in the short context"
        solo("orpo", f"_short_{pairs}", what, dataset=f"recall_solopo_{pairs}", solopo_alpha=0.3)
    solo("orpo", "_lost", f"alpha 0.3, {WITHOUT_EVIDENCE}", dataset="recall_solopo_lost", solopo_alpha=0.3)

    for suffix, what, keys in (
        ("_drop", "alpha 0.3, one-sided", {"solopo_alpha": 0.3} | drop), ("_detached", "detached", detached),
        ("_drop_detached", "one-sided, detached", drop | detached),
    ):  # fmt: skip
        solo("orpo", f"_lost{suffix}", f"{what}, {WITHOUT_EVIDENCE}", dataset="recall_solopo_lost", **keys)
    for loss in ("dpo", "simpo"):
        solo(loss, "_ftx", "with NLL of the short chosen response", pref_ftx=1.0)
    solo("orpo", "_kl_detached", "SoLo-KL, detached", **kl, **detached)
    for loss, alpha in DETACHED_ALPHAS:
        solo(loss, f"_alpha_{alpha:g}_detached", f"alpha {alpha:g}, detached", solopo_alpha=alpha, **detached)
    return table


TWO_HOP = ("sft_short", "sft_long", "dpo_short", "orpo_short", "orpo_long", "orpo_expand_long", "longpo", "solo_dpo",
           "solo_dpo_detached", "solo_orpo", "solo_orpo_alpha_0.3", "solo_orpo_detached",
           "solo_orpo_drop_detached")  # fmt: skip


def beyond(task: str = "recall") -> list[str]:
    """Arms that the paper's comparison does not need."""
    names = list(of_recall())
    return names[names.index("solo_orpo_lost") + 1 :] if task == "recall" else []


def arms(task: str = "recall") -> dict[str, tuple[str, dict]]:
    """Name -> what it is, its keys beside `COMMON`. The second task has some of the first's, on its own data sets."""
    table = of_recall()
    if task == "recall":
        return table
    return {
        n: (table[n][0], table[n][1] | {"dataset": table[n][1]["dataset"].replace("recall", task)}) for n in TWO_HOP
    }


def methods(task: str = "recall") -> list[str]:
    """The arms whose learning rate is swept: what the paper compares, and two more forms of SoLo-ORPO."""
    if task == "two_hop":
        return list(TWO_HOP_RATES)
    solo = [f"solo_{form}" for form in (*LOSSES, "orpo_alpha_0.3", "orpo_detached")]
    others = [name for name in arms() if not name.startswith("solo_") and not name.endswith("_lost")]
    return [*others, *solo]


def rates(name: str, task: str = "recall") -> tuple[float, ...]:
    """Of a method's sweep."""
    return TWO_HOP_RATES[name] if task == "two_hop" else tuple(sorted((*FURTHER.get(name, ()), *RATES)))


def sweep_seed(task: str) -> int:
    """The second task's rows are too dear for a seed of its sweep's own."""
    return SWEEP_SEED if task == "recall" else 0


def chosen_rate(name: str, task: str = "recall") -> float:
    """The learning rate at which an arm stands in the tables."""
    return CHOSEN[task].get(name, RATE)


def recipe(task: str, name: str) -> str:
    """The arm's YAML file."""
    what, keys = arms(task)[name]
    changed = {"learning_rate": chosen_rate(name, task)}
    changed["output_dir"] = f"saves/lab/{'' if task == 'recall' else task + '/'}runs/{name}_0"
    first = {
        "model_name_or_path": COMMON[task]["model_name_or_path"],
        **keys,
        "dataset_dir": COMMON[task]["dataset_dir"],
    }
    body = yaml.safe_dump(first | COMMON[task] | keys | changed, sort_keys=False)
    choice = "" if task == "recall" else f"--task {task} "
    return (
        f"# The lab: {what}.\n"
        f'# Launch: make lab ARGS="{choice}--arms {name}"   (every seed; rows and tables too)\n'
        f"# Written by scripts/lab/arms.py; all values are ours unless docs/lab.md says otherwise.\n\n{body}"
    )


def main(words: list[str]) -> int:
    wanted = {FOLDER / task / f"{name}.yaml": recipe(task, name) for task in COMMON for name in arms(task)}
    there = {path: path.read_text(encoding="utf-8") for path in FOLDER.rglob("*.yaml")}
    wrong = sorted(path for path in wanted.keys() | there.keys() if wanted.get(path) != there.get(path))
    if "--check" in words:
        for path in wrong:
            print(f"not as written by scripts/lab/arms.py: {path.relative_to(FOLDER)}")
        return bool(wrong)
    for path in wrong:
        if path in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                file.write(wanted[path].encode())
        else:
            path.unlink()
    print(f"{len(wanted)} recipes under {FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
