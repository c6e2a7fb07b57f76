"""Sample answers, stage 3: `num_samples` to every short context and, with `sample_long`, to every long one.

Reads contexts.jsonl; writes samples.short.jsonl and samples.long.jsonl, in the order of the contexts, one answer a
line: {"id", "k", "text", "finish_reason"}. Every reply is in answers.db as soon as it arrives (qa/store.py); a run asks
only for what is missing there. An answer depends on the settings, the recipe's seed, its prompt and its number alone,
as far as the backend honours seeds.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from ..qa.files import DataError, dump, parse_line, read_jsonl, write_jsonl
from ..qa.generate import generate
from ..qa.generate.calls import Call, counts_differently
from ..qa.provenance import file_hash
from ..qa.recipe import Sampling, pick, settings
from ..qa.store import STORE, Store
from .recipe import DataRecipe, model_files, outside_inputs

log = logging.getLogger(__name__)
Found = dict[tuple[str, int], int]  # question and number of the answer -> its place in the store


def run(recipe: DataRecipe, work: Path) -> dict:
    """Sample what is missing; returns the counts of each side."""
    with Store(work / STORE) as store:
        counts = {"short": sample_side(recipe, work, "short", store)}
        if recipe.sample_long:
            counts["long"] = sample_side(recipe, work, "long", store)
        else:
            write_jsonl(work / "samples.long.jsonl", [])
    return counts


def sample_side(recipe: DataRecipe, work: Path, side: str, store: Store) -> dict:
    """Sample what one side lacks and write its file; returns its counts."""
    chosen, prompts, tokens = depends_on(recipe), {}, {}
    for context in read_jsonl(work / "contexts.jsonl"):
        name, prompt = context["id"], context[side]["prompt"]
        prompts[name] = hashlib.sha256(prompt.encode("utf-8", "replace")).hexdigest()[:32]
        tokens[name] = context[side]["tokens"]
    before, set_id = store.last_used(side), store.set_of(side, chosen)
    _take_in(work, side, chosen, prompts, store, set_id)
    found, others = store.find(set_id, prompts)
    if not found and (others or (before and before[1] != chosen)):
        log.warning(f"{store.path} holds answers to other prompts or settings; sampling begins anew, they are kept.")
    total = len(prompts) * recipe.num_samples
    have = sum((name, k) in found for name in prompts for k in range(recipe.num_samples))
    if have < total:
        warned = False
        with tqdm(total=total, initial=have, unit=" answers", desc=f"sample {side}") as bar:
            for reply in generate(pick(recipe, Sampling), recipe.model, missing_calls(recipe, work, side, found)):
                store.add(set_id, _rows(reply._asdict(), prompts))
                bar.update(len(reply.ks))
                counted = reply.prompt_tokens, tokens[reply.id], reply.id, recipe.template
                warned = warned or counts_differently(*counted)
    return _write(recipe, work / f"samples.{side}.jsonl", store, store.find(set_id, prompts)[0], tokens)


def depends_on(recipe: DataRecipe) -> dict:
    """Return all that an answer depends on, but for its prompt.

    A model that is a folder goes by what is in it, so that its answers are kept where it is moved.
    """
    chosen = {name: value for name, value in settings(recipe, "sample").items() if name != "sample_long"}
    files = model_files(chosen, outside_inputs(recipe, "sample"))
    return chosen | ({"model_name_or_path": None, "outside": {"model": files}} if files else {"outside": {}})


def _rows(reply: dict, prompts: dict[str, str]) -> Iterator[tuple[str, int, str, dict]]:
    """Yield the answers of a reply as the store has them."""
    for k, (text, finish_reason) in zip(reply["ks"], reply["answers"], strict=True):
        value = {"text": text, "finish_reason": finish_reason, "prompt_tokens": reply["prompt_tokens"]}
        yield reply["id"], k, prompts[reply["id"]], value


def _take_in(work: Path, side: str, chosen: dict, prompts: dict[str, str], store: Store, set_id: int) -> None:
    """Take in what a version without a store has sampled, if it is of these prompts and settings, and clean up."""
    final, partial, done = (work / f"samples.{side}.{end}" for end in ("jsonl", "partial.jsonl", "done.json"))
    if not (partial.exists() or done.exists()):
        return
    digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode())
    for context in read_jsonl(work / "contexts.jsonl"):
        digest.update(dump([context["id"], context[side]["prompt"]]))
    replies: list[dict] = []
    stands_for = None
    if done.exists() and final.exists() and (finished := json.loads(done.read_bytes()))["hash"] == file_hash(final):
        stands_for = finished["fingerprint"]
        for row in read_jsonl(final):
            answer = row["text"], row["finish_reason"]
            replies.append({"id": row["id"], "ks": [row["k"]], "answers": [answer], "prompt_tokens": None})
    elif partial.exists():
        lines = partial.read_bytes().split(b"\n")[:-1]  # a torn last line has no end
        first, *replies = [parse_line(line, partial, number) for number, line in enumerate(lines, 1)] or [{}]
        stands_for = first.get("fingerprint")
    if stands_for == digest.hexdigest():
        store.add(set_id, (row for reply in replies for row in _rows(reply, prompts)))
    elif replies:
        log.warning(f"{work} holds answers to other prompts or settings; sampling begins anew.")
    for path in (partial, done):
        path.unlink(missing_ok=True)


def missing_calls(recipe: DataRecipe, work: Path, side: str, found: Found) -> Iterator[Call]:
    """Yield what is still to be asked: whole groups of `answers_per_call` answers, single ones where some are there."""
    size = recipe.answers_per_call or (8 if recipe.backend == "transformers" else recipe.num_samples)
    for context in read_jsonl(work / "contexts.jsonl"):
        name, prompt = context["id"], context[side]["prompt"]
        for first in range(0, recipe.num_samples, size):
            group = tuple(range(first, min(first + size, recipe.num_samples)))
            missing = tuple(k for k in group if (name, k) not in found)
            if missing == group:
                yield Call(name, group, prompt)
            else:
                yield from (Call(name, (k,), prompt) for k in missing)


def _write(recipe: DataRecipe, path: Path, store: Store, found: Found, tokens: dict[str, int]) -> dict:
    """Write a side's answers in the order of its prompts, whose lengths are `tokens`; returns its counts."""
    counts = Counter(prompts=0, answers=0, empty=0, cut_at_max_new_tokens=0, prompt_tokens_differ=0)

    def rows() -> Iterator[dict]:
        for name, length in tokens.items():
            places = [found[name, k] for k in range(recipe.num_samples) if (name, k) in found]
            if lacking := recipe.num_samples - len(places):
                raise DataError(f"{store.path}: question {name} lacks {lacking} answers; start the stage again.")
            answers = list(map(store.get, places))
            counts["prompts"] += 1
            counts["prompt_tokens_differ"] += any(answer["prompt_tokens"] not in (None, length) for answer in answers)
            for k, answer in enumerate(answers):
                counts["answers"] += 1
                counts["empty"] += not answer["text"].strip()
                counts["cut_at_max_new_tokens"] += answer["finish_reason"] == "length"
                yield {"id": name, "k": k, "text": answer["text"], "finish_reason": answer["finish_reason"]}

    write_jsonl(path, rows())
    return dict(counts)
