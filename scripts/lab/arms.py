"""The lab's comparison: one recipe per arm under examples/yaml/lab/, from one table.

    python scripts/lab/arms.py            # write all
    python scripts/lab/arms.py --check    # exit 1 and name the files that differ, are missing or should not exist

All arms share base, rows of a seed, steps, batch, schedule and optimizer; they differ in the keys of the table.
"""

import sys

import yaml
from recall import ROOT

from solopo_plugin.synthesis.files import replacing

FOLDER = ROOT / "examples/yaml/lab"
ALPHAS = (0.1, 0.3, 1.0, 3.0)
RATES = (1e-4, 3e-4, 1e-3)  # of the learning-rate sweep
COMMON = {
    "model_name_or_path": "data/lab/base",
    "do_train": True,
    "finetuning_type": "full",
    "dataset_dir": "saves/lab/rows_1600_0",  # as scripts/lab/run.py writes them
    "template": "empty",
    "cutoff_len": 256,
    "overwrite_output_dir": True,
    "logging_steps": 10,
    "save_steps": 40,  # whose accuracy is the curve over training
    "save_only_model": True,
    "report_to": "none",
    "per_device_train_batch_size": 8,  # half of the demo's, for half of its time
    "gradient_accumulation_steps": 1,
    "learning_rate": 3.0e-4,
    "num_train_epochs": 1.0,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 10,
    "use_cpu": True,
    "seed": 0,
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
    "expand_long": "the short pair on the long context, which here is also the pair with the gold answer",
}


def arms() -> dict[str, tuple[str, dict]]:
    """Name -> what it is, its keys beside `COMMON`."""
    table = {}
    for context in ("short", "long", "long_gold"):
        what = "the answer" if context != "long" else "the base's right answers"
        table[f"sft_{context}"] = (f"SFT on {what}", {"stage": "sft", "dataset": f"recall_sft_{context}"})
    for loss in ("dpo", "simpo", "orpo"):
        for context, what in CONTEXTS.items():
            keys = {"stage": "dpo", **LOSSES[loss], "dataset": f"recall_{context}_po"}
            table[f"{loss}_{context}"] = (f"{loss.upper()} on {what}", keys)

    def solo(name: str, loss: str, what: str, dataset="recall_solopo", **keys):
        fixed = {"stage": "solopo", **LOSSES[loss], "solopo_alpha": PAPER_ALPHA[loss], "dataset": dataset}
        table[name] = (f"SoLo-{loss.upper()}{what}", fixed | {f"solopo_{k}": v for k, v in keys.items()})

    for loss in LOSSES:
        solo(f"solo_{loss}", loss, ", the paper's form")
        solo(f"solo_{loss}_detached", loss, ", no gradient through the short side", detach_short=True)
    for loss in ("dpo", "orpo"):
        solo(f"solo_{loss}_both", loss, ", both responses aligned", align_on="both")
        solo(f"solo_{loss}_drop", loss, ", one-sided penalty", penalty="drop")
        solo(f"solo_{loss}_drop_detached", loss, ", one-sided, detached", penalty="drop", detach_short=True)
    solo("solo_orpo_kl", "orpo", ", SoLo-KL", align="logp")
    solo("solo_dpo_ftx", "dpo", " with NLL of the short chosen response")
    table["solo_dpo_ftx"][1]["pref_ftx"] = 1.0
    for alpha in ALPHAS:
        if alpha != PAPER_ALPHA["orpo"]:
            solo(f"solo_orpo_alpha_{alpha:g}", "orpo", f", alpha {alpha:g}", alpha=alpha)
    for pairs in (4, 25, 50, 100):
        solo(f"solo_orpo_short_{pairs}", "orpo", f", {pairs} pairs in the short context", f"recall_solopo_{pairs}",
             alpha=0.3)  # fmt: skip
    solo("solo_orpo_lost", "orpo", ", a quarter of the short contexts without the evidence", "recall_solopo_lost",
         alpha=0.3)  # fmt: skip
    longpo = {"solopo_objective": "longpo", "solopo_longpo_lambda": 0.01, "dataset": "recall_longpo"}
    table["longpo"] = ("LongPO", {"stage": "solopo", **LOSSES["dpo"], **longpo})
    return table


def recipe(name: str) -> str:
    """The arm's YAML file."""
    what, keys = arms()[name]
    body = yaml.safe_dump(COMMON | keys | {"output_dir": f"saves/lab/runs/{name}_0"}, sort_keys=False)
    return (
        f"# The lab: {what}. Written by scripts/lab/arms.py; all values are ours unless docs/lab.md says otherwise.\n"
        f'# Launch: make lab ARGS="--arms {name}"   (every seed; rows and tables too)\n\n{body}'
    )


def main(words: list[str]) -> int:
    wanted = {f"{name}.yaml": recipe(name) for name in arms()}
    there = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.yaml")}
    wrong = sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))
    if "--check" in words:
        print("".join(f"not as written by scripts/lab/arms.py: {FOLDER.name}/{name}\n" for name in wrong), end="")
        return bool(wrong)
    for name in wrong:
        if name in wanted:
            with replacing(FOLDER / name) as file:
                file.write(wanted[name].encode())
        else:
            (FOLDER / name).unlink()
    print(f"{len(wanted)} recipes under {FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
