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
from collections.abc import Callable, Iterator
from pathlib import Path

from ..qa.files import DataError, dump, parse_line, read_jsonl, write_jsonl
from ..qa.generate.calls import Call, Reply, tell_counts
from ..qa.generate.stored import Found, answer_missing, reply_rows
from ..qa.prompts import prompt_hash
from ..qa.provenance import file_hash, is_of_model
from ..qa.recipe import Sampling, pick, settings
from ..qa.store import STORE, Store
from .recipe import DataRecipe, model_files, outside_inputs

log = logging.getLogger(__name__)
OF_EARLIER = ("partial.jsonl", "done.json")  # ends of the files of a version without a store


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
    """Sample what one side lacks and write its file; returns its counts.

    Raises:
        DataError: No answer fits behind any long prompt.
    """
    chosen, tokens, longer = depends_on(recipe), {}, []
    told: set[bool] = set()
    for context in read_jsonl(work / "contexts.jsonl"):
        tokens[context["id"]] = context[side]["tokens"]
        longer.append(max(context["short"]["tokens"], context["long"]["tokens"]))
    if longer and recipe.cutoff_len <= min(longer):
        raise DataError(
            f"`cutoff_len: {recipe.cutoff_len}` leaves no answer room behind any long prompt of {work}/contexts.jsonl, "
            f"which have {min(longer)} to {max(longer)} tokens; raise it to {max(longer) + recipe.max_new_tokens}, or "
            f"lower `long_tokens: {recipe.long_tokens}`."
        )

    def calls() -> Iterator[Call]:
        for context in read_jsonl(work / "contexts.jsonl"):
            yield Call(context["id"], tuple(range(recipe.num_samples)), context[side]["prompt"])

    def compare_tokens(reply: Reply) -> None:
        tell_counts(reply.prompt_tokens, tokens[reply.id], reply.id, recipe.template, told)

    _take_in(work, side, chosen, calls, store)
    _take_over(recipe, side, chosen, store)
    found = answer_missing(
        store, side, chosen, calls, pick(recipe, Sampling), recipe.model, recipe.answers_per_call, f"sample {side}",
        compare_tokens,
    )  # fmt: skip
    return _write(recipe, work / f"samples.{side}.jsonl", store, found, tokens)


def depends_on(recipe: DataRecipe) -> dict:
    """Return all that an answer depends on, but for its prompt.

    A model that is a folder goes by what is in it, so that its answers are kept where it is moved.
    """
    chosen = {name: value for name, value in settings(recipe, "sample").items() if name != "sample_long"}
    files = model_files(chosen, outside_inputs(recipe, "sample"))
    return chosen | ({"model_name_or_path": None, "outside": {"model": files}} if files else {"outside": {}})


def _take_in(work: Path, side: str, chosen: dict, calls: Callable[[], Iterator[Call]], store: Store) -> None:
    """Take in what a version without a store has sampled, if it is of these prompts and settings, and clean up."""
    final, partial, done = (work / f"samples.{side}.{end}" for end in ("jsonl", *OF_EARLIER))
    if not (partial.exists() or done.exists()):
        return
    digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode())
    hashes = {}
    for call in calls():
        digest.update(dump([call.id, call.prompt]))
        hashes[call.id] = prompt_hash(call.prompt)
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
        rows = (row for reply in replies for row in reply_rows(Reply(**reply), hashes))
        store.add(store.set_of(side, chosen), rows)
    elif replies:
        log.warning(f"{work} holds answers to other prompts or settings; sampling begins anew.")
    for path in (partial, done):
        path.unlink(missing_ok=True)


def _take_over(recipe: DataRecipe, side: str, chosen: dict, store: Store) -> None:
    """Copy what the same calls gave with another number of answers to each prompt, if there are none yet.

    Or what they gave before the model's hash read places within large files.
    """
    others, model, now = [], Path(recipe.model_name_or_path), chosen["outside"].get("model")
    for other, before in store.sets(side):
        same = now is not None and is_of_model((before.get("outside") or {}).get("model"), now, model)
        if before != chosen and (n := alike(before | {"outside": chosen["outside"]} if same else before, chosen)):
            others.append((other, n))
    if others and not store.find(set_id := store.set_of(side, chosen), {})[0]:
        kept = sum(store.copy(other, set_id, n) for other, n in others)
        log.info(f"sample {side}: {kept} answers of calls that are the same with the earlier settings are kept.")


def alike(before: dict, chosen: dict) -> int:
    """Return how many answers to a prompt, from the first on, come from the same calls with both settings.

    Answers of a call share its seed and are drawn together: a call for more of them gives others.
    """
    (n, size), (n_before, size_before) = map(in_calls, (chosen, before))
    if before | {name: chosen[name] for name in ("num_samples", "answers_per_call")} != chosen or size != size_before:
        return 0
    return n if n == n_before else min(n, n_before) // size * size


def in_calls(chosen: dict) -> tuple[int, int]:
    """Return how many answers a prompt gets with these settings, and how many of them in one call at most."""
    n = chosen["num_samples"]
    return n, min(n, chosen["answers_per_call"] or (8 if chosen["backend"] == "transformers" else n))


def _write(recipe: DataRecipe, path: Path, store: Store, found: Found, tokens: dict[str, int]) -> dict:
    """Write a side's answers in the order of its prompts, whose lengths are `tokens`; returns its counts."""
    counts = Counter(prompts=0, answers=0, empty=0, cut_at_max_new_tokens=0, prompt_tokens_differ=0)

    def rows() -> Iterator[dict]:
        for name, length in tokens.items():
            answers = [store.get(found[name, k]) for k in range(recipe.num_samples)]
            counts["prompts"] += 1
            counts["prompt_tokens_differ"] += any(answer["prompt_tokens"] not in (None, length) for answer in answers)
            for k, answer in enumerate(answers):
                counts["answers"] += 1
                counts["empty"] += not answer["text"].strip()
                counts["cut_at_max_new_tokens"] += answer["finish_reason"] == "length"
                yield {"id": name, "k": k, "text": answer["text"], "finish_reason": answer["finish_reason"]}

    write_jsonl(path, rows())
    return dict(counts)
