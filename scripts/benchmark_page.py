"""Write down what the step benchmark found: a summary beside plan.py's predictions, as JSON, page and plot."""

import json
import math
import statistics
from pathlib import Path

from step_cost import GB, VARIANTS, count, peak, setup_of, shape_of, step_flops, step_memory

from solopo_plugin.qa.files import replacing


def name_of(run: dict) -> str:
    """Return the name under which a configuration is recorded."""
    return " ".join(run[key] for key in ("variant", "loss", "reference", "tuning") if run[key])


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
