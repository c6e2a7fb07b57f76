"""Stage 3: `num_samples` answers of the model to every short context and, with `sample_long`, to every long one.

Reads contexts.jsonl; writes samples.short.jsonl and samples.long.jsonl, in the order of the contexts, one answer a
line: {"id", "k", "text", "finish_reason"}. While a side runs, samples.<side>.partial.jsonl grows by one line per reply,
on disk as soon as it arrives; a killed run asks only for what is missing there. An answer depends on the recipe's seed,
its question and its number alone, as far as the backend honours seeds.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from ..qa.files import Appender, DataError, dump, parse_line, read_jsonl, write_json, write_jsonl
from ..qa.generate import generate
from ..qa.generate.calls import Call
from ..qa.provenance import file_hash
from ..qa.recipe import Sampling, pick, settings
from .recipe import DataRecipe, model_files, outside_inputs

log = logging.getLogger(__name__)
Found = dict[str, dict[int, int]]  # question -> number of the answer -> where its line begins in the partial file


def run(recipe: DataRecipe, work: Path) -> dict:
    """Sample what is missing; returns the counts of each side."""
    counts = {"short": sample_side(recipe, work, "short")}
    if recipe.sample_long:
        counts["long"] = sample_side(recipe, work, "long")
    else:
        write_jsonl(work / "samples.long.jsonl", [])
    return counts


def sample_side(recipe: DataRecipe, work: Path, side: str) -> dict:
    """Sample one side, unless it is finished; returns its counts.

    samples.<side>.done.json says of what prompts and settings the finished file is made, so that a change of one side
    leaves the other alone.
    """
    final, partial, done = (work / f"samples.{side}.{end}" for end in ("jsonl", "partial.jsonl", "done.json"))
    key, n_prompts = fingerprint(recipe, work, side)
    if done.exists() and final.exists():
        finished = json.loads(done.read_bytes())
        if finished["fingerprint"] == key and finished["hash"] == file_hash(final):
            partial.unlink(missing_ok=True)
            return finished["counts"]
    with Appender(partial) as file:
        stands_for, found = read_partial(partial)
        if stands_for not in (None, key):
            log.warning(f"{partial} holds answers to other prompts or settings; sampling begins anew.")
            partial.unlink()
    with Appender(partial) as file:
        if stands_for != key:
            file.append({"fingerprint": key})
            found = {}
        _collect(recipe, work, side, file, found, n_prompts)
    _, found = read_partial(partial)
    counts = _finish(recipe, work, side, final, partial, found)
    write_json(done, {"fingerprint": key, "hash": file_hash(final), "counts": counts})
    partial.unlink()
    return counts


def fingerprint(recipe: DataRecipe, work: Path, side: str) -> tuple[str, int]:
    """Hash all that a side's answers depend on, prompts in their order and settings; and count the prompts.

    A model that is a folder goes by what is in it, so that its answers are kept where it is moved.
    """
    chosen = {name: value for name, value in settings(recipe, "sample").items() if name != "sample_long"}
    files = model_files(chosen, outside_inputs(recipe, "sample"))
    chosen |= {"model_name_or_path": None, "outside": {"model": files}} if files else {"outside": {}}
    digest, n_prompts = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()), 0
    for context in read_jsonl(work / "contexts.jsonl"):
        digest.update(dump([context["id"], context[side]["prompt"]]))
        n_prompts += 1
    return digest.hexdigest(), n_prompts


def read_partial(path: Path) -> tuple[str | None, Found]:
    """The fingerprint in the first line of a partial file, None if it is empty, and where which answer stands."""
    stands_for, found, start = None, {}, 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            row = parse_line(line, path, number)
            if number == 1:
                stands_for = row.get("fingerprint", "")
            else:
                places = found.setdefault(row["id"], {})
                for k in row["ks"]:
                    places.setdefault(k, start)
            start += len(line)
    return stands_for, found


def missing_calls(recipe: DataRecipe, work: Path, side: str, found: Found) -> Iterator[Call]:
    """What is still to be asked: whole groups of `answers_per_call` answers, single ones where a group has some."""
    size = recipe.answers_per_call or (8 if recipe.backend == "transformers" else recipe.num_samples)
    for context in read_jsonl(work / "contexts.jsonl"):
        name, prompt, have = context["id"], context[side]["prompt"], found.get(context["id"], {})
        for first in range(0, recipe.num_samples, size):
            group = tuple(range(first, min(first + size, recipe.num_samples)))
            missing = tuple(k for k in group if k not in have)
            if missing == group:
                yield Call(name, group, prompt)
            else:
                yield from (Call(name, (k,), prompt) for k in missing)


def _collect(recipe: DataRecipe, work: Path, side: str, file: Appender, found: Found, n_prompts: int) -> None:
    """Ask for what is missing and write every reply down as it comes."""
    have = sum(map(len, found.values()))
    total = n_prompts * recipe.num_samples
    if have == total:
        return
    tokens = {context["id"]: context[side]["tokens"] for context in read_jsonl(work / "contexts.jsonl")}
    warned = False
    with tqdm(total=total, initial=have, unit=" answers", desc=f"sample {side}") as bar:
        for reply in generate(pick(recipe, Sampling), recipe.model, missing_calls(recipe, work, side, found)):
            file.append(reply._asdict())
            bar.update(len(reply.ks))
            if not warned and reply.prompt_tokens not in (None, tokens[reply.id]):
                warned = True
                log.warning(
                    f"The server counts {reply.prompt_tokens} prompt tokens for question {reply.id} where training "
                    f"with `template: {recipe.template}` has {tokens[reply.id]}: its chat template is another one; "
                    "use `openai_endpoint: completions`, or serve with that template."
                )


def _finish(recipe: DataRecipe, work: Path, side: str, final: Path, partial: Path, found: Found) -> dict:
    """Write a side's answers in order; returns its counts."""
    counts = Counter(prompts=0, answers=0, empty=0, cut_at_max_new_tokens=0, prompt_tokens_differ=0)

    def rows(file) -> Iterator[dict]:
        for context in read_jsonl(work / "contexts.jsonl"):
            places = found.get(context["id"], {})
            if lacking := recipe.num_samples - len(places):
                raise DataError(f"{partial}: question {context['id']} lacks {lacking} answers; start the stage again.")
            replies = {}
            for place in places.values():
                file.seek(place)
                replies[place] = json.loads(file.readline())
            counts["prompts"] += 1
            counts["prompt_tokens_differ"] += any(
                reply["prompt_tokens"] not in (None, context[side]["tokens"]) for reply in replies.values()
            )
            for k in range(recipe.num_samples):
                reply = replies[places[k]]
                text, finish_reason = reply["answers"][reply["ks"].index(k)]
                counts["answers"] += 1
                counts["empty"] += not text.strip()
                counts["cut_at_max_new_tokens"] += finish_reason == "length"
                yield {"id": context["id"], "k": k, "text": text, "finish_reason": finish_reason}

    with open(partial, "rb") as file:
        write_jsonl(final, rows(file))
    return dict(counts)
