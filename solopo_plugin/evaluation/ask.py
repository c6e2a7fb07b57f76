"""The answers of a model, which are in answers.db as soon as they come (qa/store.py), and in answers/<model>.jsonl.

The file is written when the model has answered. Its first line says what settings and model the answers come from: with
others they are asked anew, and those that were there come back with their settings; likewise with a question's prompt.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..host.template import encode_prompt
from ..qa.files import DataError, read_jsonl, write_jsonl
from ..qa.generate import generate
from ..qa.generate.calls import Call, Model, load_chat, tell_counts
from ..qa.generate.stored import Found, of_one_model
from ..qa.provenance import ADAPTER, TOKENIZER, WEIGHTS, differences, model_hash
from ..qa.recipe import Chat, Sampling, pick, settings
from ..qa.store import STORE, Store
from .items import Item, read_items
from .prepare import ITEMS
from .recipe import EvalRecipe
from .score import answer_field, stored_answers

log = logging.getLogger(__name__)


def ask(recipe: EvalRecipe, model: Model, store: Store, hashes: dict[str, str], window: int, busy: set[str]) -> None:
    """Have one model answer what it has not yet, and write its file.

    Args:
        recipe: How it is asked.
        model: One of `find_models`.
        store: Of the answers.
        hashes: Prompt hash of every question, by its `key_of`.
        window: Tokens that the longest prompt and answer may have together.
        busy: Names of all models of this evaluation, each of which is asked for itself.
    """
    path = answers_file(recipe.output_dir, model)
    chosen = fingerprint(recipe, model)
    set_id = _open(store, model, chosen, path, busy)
    found, others = store.find(set_id, hashes)
    have = {key for key, _ in found}
    if others:
        log.warning(
            f"{path}: {len(others)} answers to questions that have changed since are dropped and asked for again."
        )
    if missing := len(hashes.keys() - have):
        log.info(f"{model.name}: {missing} of {len(hashes)} questions to be asked.")
        model = replace(model, window=window)
        pending: dict[str, dict] = {}
        told: set[bool] = set()
        asked = closing(generate(pick(recipe, Sampling), model, _calls(recipe, model, have, pending)))
        shown = tqdm(total=len(hashes), initial=len(hashes) - missing, unit=" answers", desc=model.name)
        with shown as bar, asked as replies:
            for reply in of_one_model(replies, store, set_id, model):
                answer = pending.pop(reply.id)
                name = f"{answer['task']}/{answer['id']}"
                if tell_counts(reply.prompt_tokens, answer["prompt_tokens"], name, recipe.template, told):
                    answer["server_tokens"] = reply.prompt_tokens
                text, finish_reason = reply.answers[0]
                answer |= {"text": text, "finish_reason": finish_reason}
                store.add(set_id, [(reply.id, 0, answer["prompt_hash"], answer)])
                bar.update()
        if pending:
            raise DataError(f"{path}: {len(pending)} questions got no answer, {min(pending)} is one; start again.")
    found = write_answers(store, path, set_id, chosen, hashes)
    places = [place for (name, _), place in found.items() if name in hashes]
    _tell_cuts(map(store.get, places), model, recipe)


def _open(store: Store, model: Model, chosen: dict, path: Path, busy: set[str]) -> int:
    """Return the model's set of answers with these settings; says why it is another one than before.

    A new set takes over what the same model has answered under another name; one that was made empty is to stay so.
    """
    earlier, set_id = store.sets(model.name), store.set_of(model.name, chosen)
    if set_id not in dict(earlier) and (former := store.take_over(set_id, busy)):
        log.info(f"{model.name}: the same model was asked as {former}; its answers are taken over.")
    if earlier and (words := ", ".join(differences(earlier[0][1], chosen))):
        how = "taken up again" if store.find(set_id, {})[0] else "asked anew"
        log.warning(f"{path}: {how}, because {words}; the answers so far are kept in {STORE}.")
    return set_id


def answers_file(output_dir: Path | str, model: Model) -> Path:
    """Return the place of a model's answers."""
    return Path(output_dir, "answers", f"{model.name}.jsonl")


def key_of(item: Item) -> str:
    """Return the key of a question in the store."""
    return json.dumps(item.key)


def write_answers(store: Store, path: Path, set_id: int, chosen: Any, hashes: dict[str, str]) -> Found:
    """Write a file of answers: how they were asked for, then one a line, in the order in which they came.

    Returns:
        Their places in the store, those to questions that are not asked now included.
    """
    found, _ = store.find(set_id, hashes)
    write_jsonl(path, chain([{"fingerprint": chosen}], map(store.get, sorted(found.values()))))
    return found


def take_in(store: Store, folder: Path, names: set[str]) -> None:
    """Take answers into the store that are in files alone: of a version without a store, or copied from elsewhere.

    Args:
        store: Where they go.
        folder: Of the files of answers.
        names: Of models whose files must not be damaged; others that are damaged are left alone.
    """
    aside = "." + 16 * "[0-9a-f]" + ".old"  # how settings of then had put answers aside
    for path in [*sorted(folder.glob(f"*{aside}")), *sorted(folder.glob("*.jsonl"))]:
        name = re.sub(rf"({aside}|\.jsonl)$", "", path.name)
        try:
            store.add(store.set_of(name, asked_so(path)), _answers_in_file(path))
        except DataError:
            if name in names and path.suffix == ".jsonl":
                raise
        else:
            if path.suffix == ".old":
                path.unlink()


def _answers_in_file(path: Path) -> Iterator[tuple[str, int, str, dict]]:
    for number, answer in stored_answers(path):
        *key, prompt = (answer_field(answer, name, path, number) for name in ("benchmark", "task", "id", "prompt_hash"))
        yield json.dumps(key), 0, prompt, answer


def asked_so(path: Path) -> Any:
    """Return the fingerprint in the first line of a file of answers, None if it has none or there is no such file."""
    return next(read_jsonl(path), {}).get("fingerprint") if path.exists() else None


def fingerprint(recipe: EvalRecipe, model: Model) -> dict[str, Any]:
    """Return all on which a model's answers depend but the prompts: keys that matter, and its files or its name."""
    chosen = asked_with(recipe, model)
    patterns = {"model": TOKENIZER + WEIGHTS, "adapter": ADAPTER, "tokenizer": TOKENIZER}
    apart = model.tokenizer if model.tokenizer != model.path else None  # where it is not the model's own
    for what, place in (("model", model.path), ("adapter", model.adapter), ("tokenizer", apart)):
        if place and Path(place).is_dir():
            chosen[f"files of the {what}"] = model_hash(Path(place), patterns[what])
        else:
            chosen[what] = place
    return chosen


def asked_with(recipe: EvalRecipe, model: Model) -> dict[str, Any]:
    """Return the keys on which a model's answers depend."""
    chosen = settings(recipe, "answers")
    for name in ("model_name_or_path", *(("top_p", "seed") if recipe.temperature == 0 else ())):
        del chosen[name]
    return chosen | {"served_model": model.served_model}


def _calls(recipe: EvalRecipe, model: Model, have: set[str], pending: dict[str, dict]) -> Iterator[Call]:
    """Yield what is not answered, cut to `max_input_tokens`; `pending` gets the first half of each answer's line."""
    tokenizer, template = load_chat(model.tokenizer, pick(recipe, Chat))
    for item in read_items(Path(recipe.output_dir) / ITEMS):
        if (name := key_of(item)) in have:
            continue

        def encode(text: str) -> list[int]:
            return encode_prompt(tokenizer, template, text)

        prompt, tokens, cut = cut_middle(item.prompt, recipe.max_input_tokens, tokenizer, encode)
        pending[name] = {
            "benchmark": item.benchmark, "task": item.task, "id": item.id, "prompt_hash": item.prompt_hash,
            "prompt_tokens": tokens, "cut_tokens": cut,
        }  # fmt: skip
        yield Call(name, (0,), prompt, item.max_new_tokens)


def cut_middle(text: str, limit: int, tokenizer, encode: Callable[[str], list[int]]) -> tuple[str, int, int]:
    """Cut a message so that its templated prompt has at most `limit` tokens: both halves' ends stay, as in LongBench.

    LongBench cuts the message and leaves room for the template by a lower limit; here the template is counted.

    Args:
        text: The message.
        limit: Tokens of the prompt at most.
        tokenizer: The model's.
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
    decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    while tokens > limit:
        if keep < 2:
            raise DataError(f"`max_input_tokens: {limit}` leaves no room for a question beside the template; raise it.")
        half = keep // 2
        # half a character at the cut is left out, so that both parts are the message's own words
        head = decode(ids[: keep - half]).rstrip("\ufffd")
        tail = decode(ids[len(ids) - half :]).lstrip("\ufffd")
        text = head + tail
        tokens = len(encode(text))
        keep -= max(1, tokens - limit)
    return text, tokens, whole - tokens


def _tell_cuts(answers: Iterable[dict], model: Model, recipe: EvalRecipe) -> None:
    asked, cut = Counter[str](), Counter[str]()
    for answer in answers:
        asked[answer["benchmark"]] += 1
        cut[answer["benchmark"]] += bool(answer.get("cut_tokens"))
    for name, n in asked.items():
        tell = log.warning if cut[name] else log.info
        tell(
            f"{model.name}: {name}: {n} answers; {cut[name]} prompts were longer than {recipe.max_input_tokens} tokens "
            "and lost their middle."
        )
