"""Say what a finished run left behind: where the model, the curves and the metrics lie, and how the numbers moved.

python scripts/show_run.py OUTPUT_DIR
"""

import argparse
import json
import sys
from pathlib import Path

SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "solopo/po_loss", "solopo/align_loss", "solopo/reward_gap")


def main(folder: str) -> None:
    """Print a table of first and last logged values and the files of the run."""
    out = Path(folder)
    if not (out / "trainer_state.json").is_file():
        sys.exit(f"{out} holds no finished run: trainer_state.json is missing; run `llamafactory-cli train` first.")
    try:
        state = json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))
        log = [entry for entry in state["log_history"] if "loss" in entry]
    except (ValueError, KeyError, TypeError) as error:
        sys.exit(
            f"{out / 'trainer_state.json'} is no state of a run ({error!r}); give a checkpoint of it, or train again."
        )
    if not log:
        sys.exit(
            f"{out} logged no loss, so that there is nothing to show: set `logging_steps` to at most the run's steps."
        )
    print(f"\n{'metric':22s} {'step ' + str(log[0]['step']):>12s} {'step ' + str(log[-1]['step']):>12s}")
    for name in SHOWN:
        if name in log[0]:
            last = f"{log[-1][name]:12.4f}" if name in log[-1] else f"{'-':>12s}"
            print(f"{name:22s} {log[0][name]:12.4f} {last}")
    print(f"\nmodel    {out}/")
    print(f"curves   {', '.join(str(p) for p in sorted(out.glob('training_*.png')))}")
    results = ", ".join(str(p) for p in sorted(out.glob("*_results.json")))
    print(f"metrics  {results}; every step: {out}/trainer_state.json")
    print("next     docs/after_training.md: compare with the model before, merge, chat, serve")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="OUTPUT_DIR")
    main(parser.parse_args().folder)
