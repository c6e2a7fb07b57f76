"""Measure time and peak memory of reading, splitting and deduplicating documents, on one core.

    python scripts/benchmark_documents.py                          # 10,000 passages of Markdown that it makes
    python scripts/benchmark_documents.py --input FOLDER           # those of a folder
    python scripts/benchmark_documents.py --model Qwen/Qwen2.5-7B-Instruct --template qwen

Without `--model` a tokenizer of 32,000 tokens is trained on the documents. Of the passages that it makes, one in ten is
there twice.
"""

import argparse
import os
import random
import re
import resource
import sys
import tempfile
import time
from pathlib import Path

EACH = 50  # passages of a document
WORDS = 110  # of a passage, about 150 tokens


def make_documents(folder: Path, passages: int) -> None:
    """Write documents of sections with one passage each; every tenth passage is that of another document again."""
    rng = random.Random(0)
    known = ["".join(rng.choices("abcdefghijklmnoprstuvwz", k=rng.randint(2, 9))) for _ in range(20000)]
    before = []
    for number in range(passages // EACH):
        sections = []
        for k in range(EACH):
            text = " ".join(rng.choices(known, k=WORDS)).capitalize() + "."
            if before and k % 10 == 0:
                text = rng.choice(before)
            else:
                before.append(text)
            sections.append(f"## Section {k}\n\n{text}\n")
        (folder / f"{number:05}.md").write_text(f"# Document {number}\n\n" + "\n".join(sections), encoding="utf-8")


def peak_kib() -> int:
    """Return the most memory that this process has had; `getrusage` counts its parent's before it, too."""
    status = Path("/proc/self/status")
    if not status.is_file():  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))[1])


def main() -> int:
    """Read the documents and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", help="a folder of documents")
    parser.add_argument("--passages", type=int, default=10000, help="to make (default 10000)")
    parser.add_argument("--model", help="whose tokenizer counts")
    parser.add_argument("--template", default="qwen")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    from make_tiny_model import train_tokenizer

    from solopo_plugin.qa.generate.calls import load_chat
    from solopo_plugin.qa.recipe import Chat, pick
    from solopo_plugin.synthesis import documents
    from solopo_plugin.synthesis.converters import KINDS
    from solopo_plugin.synthesis.folder import list_files
    from solopo_plugin.synthesis.recipe import make_recipe

    with tempfile.TemporaryDirectory() as place:
        work, made = Path(place, "work"), Path(place, "in")
        made.mkdir()
        if not args.input:
            make_documents(made, args.passages)
        folder = Path(args.input or made)
        if not args.model:
            files = [path for path in list_files(folder)[0] if KINDS.get(path.suffix) in (KINDS[".md"], KINDS[".txt"])]
            texts = [path.read_text(encoding="utf-8", errors="replace") for path in files[:200]]
            train_tokenizer(texts, vocab_size=32000).save_pretrained(place)
            Path(place, "config.json").write_text('{"model_type": "qwen2"}')
        keys = {"input": str(folder), "input_format": "documents", "work_dir": str(work), "dataset_name": "benchmark"}
        recipe = make_recipe(keys | {"model_name_or_path": args.model or place, "template": args.template})
        load_chat(recipe.model_name_or_path, pick(recipe, Chat))  # imports are not what is measured
        started, used = time.perf_counter(), time.process_time()
        peak = peak_kib()
        counts = documents.run(recipe, work)
        seconds, busy = time.perf_counter() - started, time.process_time() - used
    after = peak_kib()
    print(
        f"{counts['passages']} passages and {counts['duplicates']} that were there before, of {counts['documents']} "
        f"documents, in {seconds:.1f} s on one core ({busy:.1f} s of it busy); peak memory {after / 1024:.0f} MiB, "
        f"{peak / 1024:.0f} MiB of it before."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
