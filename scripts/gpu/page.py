"""Write the page of a GPU's measurements, gpu.md, beside its gpu.json. Nothing in it is filled in by hand.

    python scripts/gpu/page.py --out OUT

Runs anywhere with this plugin installed. Predictions are those of `plan.py`; what was not measured is said.
"""

import argparse
import json
import sys
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(Path(__file__).parent)]
import benchmark_page  # noqa: E402
import record  # noqa: E402
from check import PARTS  # noqa: E402
from steps import JOBS, LONGEST, reference_of, settings_of, to_try  # noqa: E402

GB = 1e9
MEANS = {
    "V0": "the host's `stage: dpo` on the long pair",
    "S1": "the paper's two stages, all logits",
    "P2": "`solopo_forward: two_stage`",
    "S3": "`solopo_forward: packed`",
    "T": "TRL's `DPOTrainer` on the long pair, its fused head, reference computed beforehand",
}


def heading(document: dict) -> list[str]:
    """Return the page's head: card, date, versions."""
    lines = ["# One GPU: correctness, step time, memory", ""]
    if document.get("dry", True):
        lines += ["**A dry run on a CPU at tiny shapes: it shows that the command works, no more.**", ""]
    machine = document.get("hardware")
    if machine:
        days = " and ".join(dict.fromkeys([document.get("began", document["date"]), document["date"]]))
        lines += [
            f"{days}: {machine['device']}, {machine['memory_gb']} GB, {machine['cores']} cores. "
            "`bash scripts/gpu/run.sh` wrote this page and `gpu.json`.", "",
        ]  # fmt: skip
    if "settings" not in document:
        return [*lines, "No step was measured.", ""]
    settings, model = document["settings"], document["settings"]["model"]
    lines += [
        f"{model['model_type']}, {model['num_hidden_layers']} layers, width {model['hidden_size']}, vocabulary "
        f"{model['vocab_size']}, random weights; short prompt {settings['short']}, responses {settings['response']} "
        f"tokens, L the long prompt; {settings['dtype']}, gradient checkpointing, {settings['optim']} (no states), "
        "SDPA where it is not the packed row's own attention, one row a step."
        + (f" **At most {settings['memory']:g} GB of the card could be used.**" if settings["memory"] else ""), "",
    ]  # fmt: skip
    for name in ("versions", "versions of TRL's environment"):
        if name in document:
            lines += [f"V{name[1:]}: {', '.join(' '.join(v) for v in document[name].items())}.", ""]
    return lines


def correctness(check: dict) -> list[str]:
    """Return the table of correctness checks."""
    lines = [
        "## Is it right", "",
        "Distances to fp32 of the same in 16 bits; right is at most twice the yardstick's, and 1e-3. The yardstick is "
        "what else runs in 16 bits: SDPA, each sequence alone, the two stages.", "",
        "| check | right | seen |", "|---|---|---|",
    ]  # fmt: skip

    def verdict(part: dict) -> str:
        return part["status"] if part["status"] != "ok" else "yes" if part.get("right") else "**no**"

    if part := check.get("cli"):
        seen = f"losses {part['losses']}; {' '.join(part['log'])}" if part["status"] == "ok" else "-"
        lines.append(f"| four steps by `llamafactory-cli` | {verdict(part)} | {seen} |")
    if part := check.get("op"):
        seen = ", ".join(f"{name} {error}" for name, error in part.get("worst", {}).items())
        lines.append(f"| attention alone, worst of output and gradients | {verdict(part)} | {seen} |")
    if part := check.get("model"):
        forms = {name: x["gradients"] for name, x in part.items() if isinstance(x, dict)}
        seen = ", ".join(f"{name} {distance:.4f}" for name, distance in forms.items())
        lines.append(f"| gradients of log-probs (yardstick: alone) | {verdict(part)} | {seen} |")
    for label in ("trainer", "options"):
        part = check.get(label, {})
        for name, seen in part.items():
            if isinstance(seen, dict):
                more = f", gradients {seen['gradients']:.4f}" if "gradients" in seen else ""
                lines.append(f"| {label}: {name} | {verdict(part)} | loss {seen['loss']:.5f}{more} |")
        if part.get("status", "ok") != "ok":
            lines.append(f"| {label} | {verdict(part)} | - |")
    return [*lines, ""]


def steps(document: dict) -> list[str]:
    """Return the table of step times and peaks, with the predictions in brackets."""
    runs = {key: run for key, run in document["runs"].items() if not run["trial"]}
    rows = {row["name"]: row for row in benchmark_page.summarise(document["settings"], runs)}
    lines = [
        "## Steps", "",
        "Measured, in brackets what `scripts/plan.py` predicts. Speed: how many times as fast. Peak: above what "
        "the idle process holds. Logits: the head's largest output and its fp32 copy; TRL's fused head makes none.", "",
        "| configuration | step, s: median (least to most) | timed steps | speed to V0 | to S1 | to T | peak, GB "
        "| all, GB | logits, GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip

    def beside(row: dict, name: str) -> str:
        measured = f"{row[name]:.2f}" if name in row else "-"
        return f"{measured} ({row[f'predicted_{name}']:.2f})" if f"predicted_{name}" in row else measured

    def to_trl(run: dict) -> str:
        like = {"variant": "T", "status": "ok"} | {key: run[key] for key in ("loss", "tuning", "length")}
        other = next((r for r in runs.values() if like.items() <= r.items()), None)
        return f"{other['median_s'] / run['median_s']:.2f}" if other and run["status"] == "ok" else "-"

    def order(item):
        return [item[1]["tuning"] == "full", item[1]["loss"], item[1]["length"], list(MEANS).index(item[1]["variant"])]

    for key, run in sorted(runs.items(), key=order):
        row = rows[key]
        step = {"oom": "out of memory"}.get(run["status"], run["status"])
        held, whole = f"({row['predicted_peak'] / GB:.1f})" if "predicted_peak" in row else "", "-"
        if run["status"] == "ok":
            step = f"{run['median_s']:.3f} ({min(run['step_s']):.3f} to {max(run['step_s']):.3f})"
            held, whole = f"{(run['peak'] - run['idle']) / GB:.1f} {held}", f"{run['peak'] / GB:.1f}"
        logits = f"{run['logits'] / GB:.2f}" if run.get("logits") else "-"
        speeds = [beside(row, name) for name in ("speed_V0", "speed_S1")]
        timed = str(len(run.get("step_s", [])) or "-")
        lines.append(f"| {' | '.join([key, step, timed, *speeds, to_trl(run), held.strip() or '-', whole, logits])} |")
    return [*lines, "", *(f"- {name}: {meaning}" for name, meaning in MEANS.items()), ""]


def loss_of(variant: str) -> str:
    """Return the loss with which a variant's longest prompt is looked for."""
    return "sigmoid" if variant == "T" else "orpo"


def by_length(document: dict, variant: str) -> dict[int, str]:
    """Return how a variant's LoRA steps and trials of the longest prompt ended."""
    like = {"variant": variant, "loss": loss_of(variant), "tuning": "lora"}
    return {run["length"]: run["status"] for run in document["runs"].values() if like.items() <= run.items()}


def untried(document: dict, variant: str) -> list[int]:
    """Return the lengths of a longest prompt that peaks point to and that are still to be tried."""
    seen = by_length(document, variant)
    lengths = to_try(variant, document["longest by peaks"][variant], document.get("dry", True))
    shorter = takewhile(lambda length: seen.get(length) != "oom", lengths)
    return [length for length in shorter if seen.get(length) != "ok"]


def longest(document: dict) -> list[str]:
    """Return the table of the longest prompts that fit."""
    lines = [
        "## The longest long prompt", "",
        "LoRA. Peaks grow with its length; shares of the length that they point to were tried.", "",
        "| configuration | peaks point to | fits | does not fit |", "|---|---|---|---|",
    ]  # fmt: skip
    for variant, there in document.get("longest by peaks", {}).items():
        seen = by_length(document, variant)
        fits = max((length for length, status in seen.items() if status == "ok"), default="-")
        not_fit = min((length for length, status in seen.items() if status == "oom"), default="-")
        least = "at least " if untried(document, variant) else ""
        lines.append(f"| {variant} {loss_of(variant)} | {there} | {least}{fits} | {not_fit} |")
    return [*lines, ""]


def attention(check: dict) -> list[str]:
    """Return the table of attention times."""
    part = check.get("speed", {})
    seen = {name: value for name, value in part.items() if isinstance(value, dict)}
    if not seen:
        return []
    lines = [
        "## Attention of a packed row, forward and backward", "",
        "One layer's: 28 heads over 4 of keys, size 128. Visible pairs alone are counted.",
        f"`long apart`: segments from {part['apart_from']:,} tokens by SDPA, the others in one varlen call. New: the "
        "first call at a length, for which cuDNN prepares.", "",
        "| L, kernel | ms | at a new length, ms | TFLOP/s |", "|---|---|---|---|",
    ]  # fmt: skip
    columns = ("ms", "new_ms", "TFLOP/s")
    return [*lines, *(f"| {' | '.join(map(str, [name, *(v[c] for c in columns)]))} |" for name, v in seen.items()), ""]


def missing(document: dict) -> list[str]:
    """Return what the command would measure, and this document does not hold."""
    lengths = settings_of(document.get("dry", True))[1]
    todo = [f"check `{name}`" for name in ("cli", *PARTS) if document["check"].get(name, {}).get("status") != "ok"]
    for variant, tuning, length, _, loss in (job for jobs in JOBS.values() for job in jobs):
        run = dict(variant=variant, loss=loss, reference=reference_of(variant, loss), tuning=tuning)
        key = f"{benchmark_page.name_of(run)} L{lengths[length]}"
        if document["runs"].get(key, {}).get("status") not in ("ok", "oom"):
            todo.append(key + (" (failed)" if key in document["runs"] else ""))
    for variant in LONGEST:
        if variant not in document.get("longest by peaks", {}):
            todo.append(f"longest prompt of {variant}")
        elif lengths := untried(document, variant):
            todo.append(f"longest prompt of {variant}: {' and '.join(map(str, lengths))} tokens")
    return ["## Not measured", "", *([f"- {name}" for name in todo] or ["Nothing: all of the command was done."]), ""]


def as_markdown(document: dict) -> str:
    """Return the whole page."""
    parts = [heading(document), correctness(document["check"])]
    if "settings" in document:
        parts += [steps(document), longest(document)]
    parts += [attention(document["check"]), missing(document)]
    return "\n".join(line for part in parts for line in part)


def main(argv: list[str] | None = None) -> None:
    """Write gpu.md beside the gpu.json of a folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu.json")
    out = parser.parse_known_args(argv)[0].out
    file = out / record.NAME
    if not file.exists():
        sys.exit(f"> There is no {file}: nothing was measured.")
    file.with_suffix(".md").write_text(as_markdown(json.loads(file.read_text())))


if __name__ == "__main__":
    main()
