"""Ask a model for questions about passages, single ones and pairs; reads passages.jsonl, writes asked.jsonl.

A pair, for a question of two hops, are neighbours in a document or passages that share a name. Which passages and pairs
are asked about depends on the seed and on passages.jsonl alone. Every reply is in asked.db as soon as it arrives.

asked.jsonl has a line for each reply, in the order of the passages: {"id", "hops", "passages": their ids, "text": the
reply, "finish_reason", "question", "answer", "quotes": one of each passage, "marked": the question or the answer holds
a special token of a chat template}. What cannot be read of a reply is null.
"""

import json
import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..host.template import template_markers, written_markers
from ..qa.answers import behind_thought
from ..qa.documents import marker_pattern
from ..qa.files import DataError, read_jsonl, write_jsonl
from ..qa.generate.calls import Call, load_chat
from ..qa.generate.stored import StopUnreadable, answer_missing
from ..qa.prompts import document_text, lay_out, read_prompt_file
from ..qa.recipe import Chat, Sampling, pick
from ..qa.seeded import digest, generator
from ..qa.store import Store
from .recipe import DataRecipe, prompt_file
from .sample import depends_on

log = logging.getLogger(__name__)
STORE = "asked.db"  # its name in a work folder
BETWEEN_IDS = "//"  # of passages and the reply's number: no relative path has two slashes in a row
COMMON = 20  # passages with the same name from which on it says nothing of them; ours
UPPER = "".join(sign for sign in map(chr, range(0x530)) if sign.isupper())  # Latin, Greek, Cyrillic
_NAME = re.compile(rf"(?<!\w)[{UPPER}](?:[\w'’-]*\w)?(?: [{UPPER}](?:[\w'’-]*\w)?)*")
_ARTICLE = re.compile(r"(?:The|An?) ")
_SENTENCE_ENDS = tuple(".!?:;\n")
Passages = list[dict]


def run(recipe: DataRecipe, work: Path) -> dict:
    """Ask for questions; returns what was asked and answered.

    Raises:
        DataError: There is no passage to ask about, or a prompt lacks its place.
    """
    passages = list(read_jsonl(work / "passages.jsonl"))
    marker = marker_pattern(markers_of(recipe))
    usable = [passage for passage in passages if not marker.search(document_text(passage))]
    if not usable:
        raise DataError(f"There is no passage to ask about: {len(passages)} in {work / 'passages.jsonl'}.")
    asked_about = choose(recipe, usable)
    prompts = {hops: read_prompt(recipe, f"ask_{word}.txt", "{documents}") for hops, word in ((1, "one"), (2, "two"))}
    counts: Counter = Counter(passages=len(passages), special_tokens=len(passages) - len(usable))
    counts.update(single=0, pairs=0, replies=0, unreadable=0, cut_at_max_new_tokens=0)

    def calls() -> Iterator[Call]:
        for chosen in asked_about:
            before, behind = prompts[len(chosen)]
            prompt, _ = lay_out(before, behind, "", map(document_text, chosen))
            yield Call(unit_id(chosen), tuple(range(recipe.candidates)), prompt, schema=schema_of(len(chosen)))

    def readable(unit: str, text: str) -> bool:
        return read_reply(text, len(unit.split(BETWEEN_IDS))) is not None

    last, stop = "", partial(none_readable, recipe)  # what cannot be read, and the sentence on it

    def rows(store: Store) -> Iterator[dict]:
        nonlocal last
        asker = recipe.asker
        settings, see = asking_settings(asker, recipe.candidates), StopUnreadable(readable, stop).see
        found = answer_missing(store, "ask", settings, calls, pick(asker, Sampling), asker.model, see=see)
        for chosen in asked_about:
            counts["single" if len(chosen) == 1 else "pairs"] += 1
            for k in range(recipe.candidates):
                reply = store.get(found[unit_id(chosen), k])
                row = make_row(chosen, k, reply, marker)
                counts["replies"] += 1
                counts["unreadable"] += row["question"] is None
                last = reply["text"] if row["question"] is None else last
                counts["cut_at_max_new_tokens"] += reply["finish_reason"] == "length"
                yield row

    with Store(work / STORE) as store:
        write_jsonl(work / "asked.jsonl", rows(store))
    if counts["unreadable"] == counts["replies"]:  # of a few; the filter stops then
        log.warning(stop(counts["replies"], last))
    return dict(counts)


def markers_of(recipe: DataRecipe) -> set[str]:
    """Return the texts that only a chat template may write: that of the model that is trained, or of one that asks.

    A server's chat endpoint needs no tokenizer here: what `ask_template` writes is all that is known of its model then.

    Raises:
        DataError: There is no such template or tokenizer.
    """
    asker, found = recipe.asker, template_markers(*load_chat(recipe.model.tokenizer, pick(recipe, Chat)))
    if not recipe.another_asks:
        return found
    if asker.backend != "openai" or asker.openai_endpoint != "chat":
        return found | template_markers(*load_chat(asker.model.tokenizer, pick(asker, Chat)))
    try:
        return found | written_markers(asker.template)
    except ValueError as error:
        raise DataError(str(error)) from None


def none_readable(recipe: DataRecipe, n: int, text: str) -> str:
    """Return the sentence on a model that keeps to no form; `text` is one of its `n` replies."""
    held = recipe.asker.backend != "transformers"
    other = "say it more plainly in `ask_prompts`" if held else "ask one that keeps to a JSON schema, behind a server"
    return (
        f"None of {n} replies of the model that asks can be read: each must be JSON with `question`, `answer` and "
        f"`quote`, and one begins with {text[:60]!r}; let a stronger model ask (`ask_model_name_or_path`), raise "
        f"`max_new_tokens: {recipe.max_new_tokens}`, or {other}."
    )


def asking_settings(recipe: DataRecipe, n: int) -> dict[str, Any]:
    """Return all that `n` answers to a prompt depend on, but for the prompt: what samples depend on, and `n`.

    How many samples there are, and how many in a call, is nothing to these answers; the latter stands as null in the
    settings of work folders. The recipe is that of the model that answers, `DataRecipe.asker` perhaps.
    """
    chosen = {name: value for name, value in depends_on(recipe).items() if name != "num_samples"}
    return chosen | {"answers_per_call": None, "answers": n}


def unit_id(chosen: Iterable[dict], *more: object) -> str:
    """Return the name of passages that are asked about together, and of one of the replies."""
    return BETWEEN_IDS.join([*(passage["id"] for passage in chosen), *map(str, more)])


def choose(recipe: DataRecipe, passages: Passages) -> list[Passages]:
    """Return what is asked about: a seeded choice of passages, each alone, then pairs that begin with one of them."""
    order = sorted(range(len(passages)), key=lambda i: digest(recipe.seed, "ask", passages[i]["id"]))
    order = order[: recipe.max_passages]
    wanted = round(recipe.pairs_per_passage * len(order))
    partners = partners_in(passages) if wanted else None
    pairs: dict[tuple[int, int], None] = {}
    for turn in range(math.ceil(recipe.pairs_per_passage)):
        for i in order:
            if partners and len(pairs) < wanted and (others := partners(i)):
                other = generator(recipe.seed, "pair", turn, passages[i]["id"]).choice(others)
                pairs[min(i, other), max(i, other)] = None
    return [[passages[i]] for i in sorted(order)] + [[passages[i], passages[j]] for i, j in sorted(pairs)]


def partners_in(passages: Passages) -> Callable[[int], list[int]]:
    """Return a function from a passage to its neighbours in its document and to those that share a name with it."""
    places = {(passage["source"], passage["place"]): i for i, passage in enumerate(passages)}
    names, holders = [names_in(passage["text"]) for passage in passages], defaultdict(list)
    for i, found in enumerate(names):
        for name in found:
            holders[name].append(i)

    def partners(i: int) -> list[int]:
        source, place = passages[i]["source"], passages[i]["place"]
        near = {places[beside] for step in (-1, 1) if (beside := (source, place + step)) in places}
        return sorted(near.union(*(holders[name] for name in names[i] if len(holders[name]) < COMMON)) - {i})

    return partners


def names_in(text: str) -> set[str]:
    """Return the names in a text: words with a capital, in a row; not a single one that begins a sentence."""
    found = set()
    for match in _NAME.finditer(text):
        before, name = text[: match.start()].rstrip(" \"'“‘(*_#>-"), _ARTICLE.sub("", match[0], count=1)
        begins = not before or before.endswith(_SENTENCE_ENDS)
        if len(name) > 2 and (not begins or " " in match[0]):
            found.add(name)
    return found


def read_prompt(recipe: DataRecipe, name: str, place: str) -> tuple[str, str]:
    """Return what stands before and behind a place of one of the prompts: ours, or that of the recipe's folder.

    Raises:
        DataError: The file cannot be read, or the place is not in it exactly once.
    """
    path = prompt_file(recipe, name)
    before, _, behind = read_prompt_file(path, f"`ask_prompts`: {path}", [place]).partition(place)
    return before, behind


def fields_of(hops: int) -> list[str]:
    """Return the names of what a reply has to give."""
    return ["question", "answer", *(["quote"] if hops == 1 else [f"quote_{n}" for n in range(1, hops + 1)])]


def schema_of(hops: int) -> dict:
    """Return the JSON schema of a reply, for servers that keep to one."""
    names = fields_of(hops)
    properties = {name: {"type": "string"} for name in names}
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def make_row(chosen: Passages, k: int, reply: dict, marker: re.Pattern) -> dict:
    """Return a reply as a line of asked.jsonl."""
    read = read_reply(reply["text"], len(chosen)) or {"question": None, "answer": None, "quotes": None}
    marked = any(marker.search(read[name] or "") for name in ("question", "answer"))
    return {
        "id": unit_id(chosen, k), "hops": len(chosen), "passages": [passage["id"] for passage in chosen],
        "text": reply["text"], "finish_reason": reply["finish_reason"], **read, "marked": bool(marked),
    }  # fmt: skip


def read_reply(text: str, hops: int) -> dict | None:
    """Return question, answer and quotes of a reply, None where one is missing.

    A thought is not read. Of JSON objects the last that has everything counts, wherever it stands: in a fence, behind
    words, within another. Names may be in capitals; quotes may be in one list `quotes`. Where there is no such object
    lines that begin with `Question:`, `Answer:` and so on are read.
    """
    said, read = behind_thought(text), None
    decoder, at = json.JSONDecoder(strict=False), said.find("{")
    while at >= 0:
        end = at + 1
        try:
            found, after = decoder.raw_decode(said, at)
            if whole := _complete({_key(name): value for name, value in found.items()}, hops):
                read, end = whole, after
        except (ValueError, RecursionError):
            pass
        at = said.find("{", end)
    label = "|".join(name.replace("_", "[_ ]?") for name in fields_of(hops))
    lines = re.findall(rf"^[\s*_#>-]*({label})[\s*_]*:[\s*_]*(\S.*?)[\s*_]*$", said, re.I | re.M)
    return read or _complete({_key(name): value for name, value in lines}, hops)


def _key(name: str) -> str:
    """Return the name of a field as `fields_of` writes it: of `Quote 1` and `quote1` it is `quote_1`."""
    return re.sub(r"[_ ]?(\d)$", r"_\1", name.strip().lower())


def _complete(named: dict, hops: int) -> dict | None:
    """Return question, answer and quotes as texts, None if one is missing or is no text; a number is one."""
    values = [named.get(name) for name in fields_of(hops)]
    if not any(values[2:]) and isinstance(named.get("quotes"), list):
        values[2:] = named["quotes"]
    if len(values) != 2 + hops or not all(isinstance(v, str | int | float) and str(v).strip() for v in values):
        return None
    question, answer, *quotes = (str(value).strip() for value in values)
    return {"question": " ".join(question.split()), "answer": " ".join(answer.split()), "quotes": quotes}
