"""Show accuracy against context length, before and after training: a table, and a picture.

python scripts/lab/show_accuracy.py MODEL_FOLDER [--before data/lab/base] [--output MODEL_FOLDER/../accuracy.png]
"""

import argparse
import sys
from pathlib import Path

import torch
from recall import BASE, LONG, SHORT, profile
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from solopo_plugin.qa.files import write_json


def table(before: dict[int, float], after: dict[int, float]) -> str:
    """Return a line per length, with a bar for what came of it."""
    lines = ["pairs in the context     before      after"]
    for pairs, share in after.items():
        note = {SHORT: "  <- trained on", LONG: "  <- aligned to it"}.get(pairs, "")
        lines.append(f"{pairs:20d} {before[pairs]:10.3f} {share:10.3f}  {'#' * round(20 * share):20s}{note}".rstrip())
    return "\n".join(lines)


def draw(before: dict[int, float], after: dict[int, float], path: Path) -> None:
    """Draw the two curves, with the lengths of the rows marked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(before.keys(), before.values(), "o--", color="tab:gray", label="base")
    axes.plot(after.keys(), after.values(), "o-", color="tab:blue", label="after training")
    for pairs, name in ((SHORT, "short context"), (LONG, "long context")):
        axes.axvline(pairs, color="tab:orange", linewidth=1, linestyle=":")
        axes.annotate(name, (pairs, 0.5), rotation=90, ha="right", va="center", color="tab:orange")
    axes.set(xlabel="key-value pairs in the context", ylabel="accuracy", ylim=(-0.02, 1.02))
    axes.legend(loc="center left", bbox_to_anchor=(0.1, 0.3))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(words: list[str] | None = None) -> None:
    """Print and draw a run's accuracy by length, before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="output_dir of a run")
    parser.add_argument("--before", type=Path, default=BASE, help="the model it began from (default: the shipped base)")
    parser.add_argument("--output", type=Path, help="the picture; default: accuracy.png beside the model's folder")
    args = parser.parse_args(words)
    for folder in (args.before, args.model):
        if not (folder / "config.json").is_file():
            sys.exit(f"{folder} holds no model: config.json is missing; run `llamafactory-cli train` first.")
    disable_progress_bar()
    load = {"local_files_only": True, "dtype": torch.float32}
    before, after = (profile(AutoModelForCausalLM.from_pretrained(f, **load)) for f in (args.before, args.model))
    output = args.output or args.model.parent / "accuracy.png"
    draw(before, after, output)
    write_json(output.with_suffix(".json"), {"before": before, "after": after})
    print(f"\n{table(before, after)}\n\npicture  {output}\nfigures  {output.with_suffix('.json')}")


if __name__ == "__main__":
    main()
