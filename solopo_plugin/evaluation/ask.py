"""The answers of a model: answers/<model>.jsonl, whose first line says what settings and model they come from.

With others they are asked anew; answers to a question whose prompt has changed are dropped one by one.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..host.template import encode_prompt
from ..qa.files import Appender, DataError, dump, read_jsonl, replacing, write_jsonl
from ..qa.generate import generate
from ..qa.generate.calls import Call, Model, load_chat
from ..qa.provenance import ADAPTER, TOKENIZER, WEIGHTS, folder_hash
from ..qa.recipe import Chat, Sampling, pick, settings
from .items import read_items
from .prepare import ITEMS, Key, _copy
from .recipe import EvalRecipe
from .score import answer_field, stored_answers

log = logging.getLogger(__name__)


def ask(recipe: EvalRecipe, model: Model, hashes: dict[Key, str], window: int, resume: bool = True) -> None:
    """Have one model answer what it has not yet.

    Args:
        hashes: Prompt hash of every question.
        window: Tokens that the longest prompt and answer may have together.
    """
    path = Path(recipe.output_dir) / "answers" / f"{model.name}.jsonl"
    have = _tidy(path, fingerprint(recipe, model), hashes, resume)
    if missing := len(hashes) - len(have):
        log.info(f"{model.name}: {missing} of {len(hashes)} questions to be asked.")
        model = replace(model, window=window)
        pending: dict[str, dict] = {}
        bar = tqdm(total=len(hashes), initial=len(have), unit=" answers", desc=model.name)
        with Appender(path) as file, bar:
            for reply in generate(pick(recipe, Sampling), model, _calls(recipe, model, have, pending)):
                row = pending.pop(reply.id)
                _compare_tokens(recipe, row, reply.prompt_tokens)
                text, finish_reason = reply.answers[0]
                file.append(row | {"text": text, "finish_reason": finish_reason})
                bar.update()
        if pending:
            raise DataError(f"{path}: {len(pending)} questions got no answer, {min(pending)} is one; start again.")
    _report_cuts(path, model, recipe)


def fingerprint(recipe: EvalRecipe, model: Model) -> dict[str, Any]:
    """All on which a model's answers depend but the prompts: keys that matter, and its files or its name."""
    chosen = asked_with(recipe, model)
    patterns = {"model": TOKENIZER + WEIGHTS, "adapter": ADAPTER, "tokenizer": TOKENIZER}
    apart = model.tokenizer if model.tokenizer != model.path else None  # where it is not the model's own
    for what, place in (("model", model.path), ("adapter", model.adapter), ("tokenizer", apart)):
        if place and Path(place).is_dir():
            chosen[f"files of the {what}"] = folder_hash(Path(place), patterns[what])
        else:
            chosen[what] = place
    return chosen


def asked_with(recipe: EvalRecipe, model: Model) -> dict[str, Any]:
    """The keys on which a model's answers depend."""
    chosen = settings(recipe, "answers")
    for name in ("model_name_or_path", *(("top_p", "seed") if recipe.temperature == 0 else ())):
        del chosen[name]
    return chosen | {"served_model": model.served_model}


def _tidy(path: Path, chosen: dict, hashes: dict[Key, str], resume: bool) -> set[Key]:
    """Bring a file of answers in order; returns the questions it answers.

    Answers of other settings are put aside, and come back with their settings; those to other prompts are removed.
    Those to questions that are not asked now stay: they may be asked again.
    """
    known = _aside(path, chosen)
    if not resume:
        path.unlink(missing_ok=True)
        known.unlink(missing_ok=True)
    with Appender(path):  # cuts off half a line that a killed run left
        first = next(read_jsonl(path), None)
    if first is not None and (changed := _changes(first.get("fingerprint"), chosen)):
        aside = _aside(path, first.get("fingerprint"))
        how = f"taken up again from {known.name}" if known.exists() else "asked anew"
        log.warning(f"{path}: {how}, because {changed}; the answers so far are in {aside.name}.")
        os.replace(path, aside)
        first = None
    if first is None:
        if known.exists():
            os.replace(known, path)
            return _tidy(path, chosen, hashes, resume)
        write_jsonl(path, [{"fingerprint": chosen}])
        return set()
    have, outdated, double = set(), 0, 0
    for number, _, row in stored_answers(path):
        *names, prompt = (answer_field(row, name, path, number) for name in ("benchmark", "task", "id", "prompt_hash"))
        key = tuple(names)
        outdated += (stale := hashes.get(key, prompt) != prompt)
        double += key in have
        if not stale:
            have.add(key)
    if outdated or double:
        log.warning(f"{path}: {outdated} answers to questions that have changed since are dropped and asked for again.")
        _drop(path, hashes)
    return have & hashes.keys()


def _take_over(folder: Path, name: str, chosen: dict, models: list[Model]) -> None:
    """Copy the answers of a model that is there under another name than it was, known by the same fingerprint.

    Args:
        folder: Of the files of answers.
        models: Those of this evaluation, each of which is asked for itself.
    """
    path, others = folder / f"{name}.jsonl", {f"{model.name}.jsonl" for model in models}
    if path.exists():
        return
    for former in sorted(folder.glob("*.jsonl")):
        if former.name not in others and _asked_so(former) == chosen:
            log.info(f"{name}: the same model was asked as {former.stem}; its answers are taken over.")
            with replacing(path) as out:
                _copy(former, 0, former.stat().st_size, out)
            return


def _asked_so(path: Path) -> Any:
    """Return the fingerprint in the first line of a file of answers, None if it has none or is damaged."""
    with suppress(DataError):
        return next(read_jsonl(path), {}).get("fingerprint")


def _aside(path: Path, chosen: Any) -> Path:
    """Where answers asked for in this way are while others are in use."""
    return path.with_suffix(f".{hashlib.sha256(dump(chosen)).hexdigest()[:16]}.old")


def _drop(path: Path, hashes: dict[Key, str]) -> None:
    """Remove answers to other prompts than those of `hashes`, and second ones."""
    seen = set()

    def rows() -> Iterator[dict]:
        for row in read_jsonl(path):
            key = (row.get("benchmark"), row.get("task"), row.get("id"))
            if "fingerprint" not in row and (key in seen or hashes.get(key, row["prompt_hash"]) != row["prompt_hash"]):
                continue
            seen.add(key)
            yield row

    write_jsonl(path, rows())


def _changes(old: dict | None, new: dict) -> str:
    """What differs between two fingerprints, in words."""
    if not isinstance(old, dict):
        return "it does not say how they were asked for"
    phrases = []
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            known = name in old and name in new
            words = f"the {name} have changed" if name.startswith("files of") and known else None
            phrases.append(words or f"`{name}` was {old.get(name)!r} and is {new.get(name)!r}")
    return ", ".join(phrases)


def _calls(recipe: EvalRecipe, model: Model, have: set[Key], pending: dict[str, dict]) -> Iterator[Call]:
    """The questions that are not answered, cut to `max_input_tokens`; `pending` gets the first half of their rows."""
    tokenizer, template = load_chat(model.tokenizer, pick(recipe, Chat))
    for item in read_items(Path(recipe.output_dir) / ITEMS):
        if item.key in have:
            continue

        def encode(text: str) -> list[int]:
            return encode_prompt(tokenizer, template, text)

        prompt, tokens, cut = cut_middle(item.prompt, recipe.max_input_tokens, tokenizer, encode)
        name = json.dumps(item.key)
        pending[name] = {
            "benchmark": item.benchmark, "task": item.task, "id": item.id, "prompt_hash": item.prompt_hash,
            "prompt_tokens": tokens, "cut_tokens": cut,
        }  # fmt: skip
        yield Call(name, (0,), prompt, item.max_new_tokens)


def cut_middle(text: str, limit: int, tokenizer, encode: Callable[[str], list[int]]) -> tuple[str, int, int]:
    """A message whose templated prompt has at most `limit` tokens: its first and its last half, as in LongBench.

    LongBench cuts the message and leaves room for the template by a lower limit; here the template is counted.

    Args:
        encode: Message -> ids of the templated prompt.

    Returns:
        The message, tokens of its prompt, and how many tokens fewer these are than those of the whole.

    Raises:
        DataError: The template alone is longer.
    """
    whole = tokens = len(encode(text))
    if whole <= limit:
        return text, whole, 0
    ids = tokenizer.encode(text, add_special_tokens=False)
    keep = len(ids) - (whole - limit)
    while tokens > limit:
        if keep < 2:
            raise DataError(f"`max_input_tokens: {limit}` leaves no room for a question beside the template; raise it.")
        half = keep // 2
        # half a character at the cut is left out, so that both parts are the message's own words
        head = tokenizer.decode(ids[: keep - half], skip_special_tokens=True).rstrip("\ufffd")
        tail = tokenizer.decode(ids[len(ids) - half :], skip_special_tokens=True).lstrip("\ufffd")
        text = head + tail
        tokens = len(encode(text))
        keep -= max(1, tokens - limit)
    return text, tokens, whole - tokens


_warned = False


def _compare_tokens(recipe: EvalRecipe, row: dict, counted: int | None) -> None:
    """Say once if a server sees other tokens than training does."""
    global _warned
    if not _warned and counted not in (None, row["prompt_tokens"]):
        _warned = True
        log.warning(
            f"The server counts {counted} prompt tokens for {row['task']}/{row['id']} where `template: "
            f"{recipe.template}` has {row['prompt_tokens']}: its chat template is another one; use "
            "`openai_endpoint: completions`, or serve with that template."
        )


def _report_cuts(path: Path, model: Model, recipe: EvalRecipe) -> None:
    asked, cut = Counter(), Counter()
    for row in read_jsonl(path):
        if row.get("benchmark") in recipe.benchmarks:
            asked[row["benchmark"]] += 1
            cut[row["benchmark"]] += bool(row.get("cut_tokens"))
    for name, n in asked.items():
        tell = log.warning if cut[name] else log.info
        tell(
            f"{model.name}: {name}: {n} answers; {cut[name]} prompts were longer than {recipe.max_input_tokens} tokens "
            "and lost their middle."
        )
