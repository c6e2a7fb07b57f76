"""From rows of files to items: the place of what is wrong, the seeded choice, prompts around a context."""

import heapq
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from ...host.template import template_markers
from ...qa.answers import judged_form
from ...qa.documents import marker_pattern
from ...qa.files import DataError, shown, split_names
from ...qa.prompts import document_text, lay_out, split_prompt
from ...qa.questions import got, texts, with_place
from ...qa.seeded import digest
from ...qa.sources import Rows, source_rows
from ..items import Item
from ..recipe import EvalRecipe

log = logging.getLogger(__name__)


def rows_of(names: str, key: str, subset: str | None = None, split: str = "test") -> Rows:
    """Yield the rows of one or, with commas, several files, folders or data sets of the hub, see `source_rows`."""
    for name in split_names(names):
        yield from source_rows(name, key, subset, split)


def items_of(
    rows: Callable[[], Rows],
    make: Callable[[dict], Iterable[Item]],
    what: str,
    recipe: EvalRecipe,
    tokenizer,
    template,
) -> Iterator[Item]:
    """Yield the items of rows; with `max_samples`, so many of each task, chosen by seed and id whatever their order.

    A second item with the same id gets `#2` behind it, and so on.

    Args:
        rows: Begins to read anew with each call; with `max_samples` everything is read twice and never held.
        make: The items of one row.
        what: Key and value of the recipe, for messages.
        recipe: Of the evaluation.
        tokenizer: Of the model, whose special tokens are told of.
        template: Its chat template.

    Raises:
        DataError: A row cannot be used, with its place; or there is none.
    """
    chosen = None
    if recipe.max_samples is not None:
        ids = defaultdict(list)
        for item in _made(rows(), make):
            ids[item.task].append(item.id)
        chosen = {
            (task, id)
            for task, all_ids in ids.items()
            for id in heapq.nsmallest(recipe.max_samples, all_ids, key=lambda id: digest(recipe.seed, id))
        }
    marker, asked, marked = marker_pattern(template_markers(tokenizer, template)), 0, 0
    for item in _made(rows(), make):
        if chosen is None or (item.task, item.id) in chosen:
            asked += 1
            marked += bool(marker.search(item.prompt))
            yield item
    if not asked:
        raise DataError(f"{what} has no question.")
    if marked:
        log.warning("%s: %d of %d prompts hold a special token of the model, left as they are.", what, marked, asked)


def _made(rows: Rows, make: Callable[[dict], Iterable[Item]]) -> Iterator[Item]:
    seen: Counter = Counter()
    for where, load in rows:
        try:
            found = list(make(load()))
        except DataError as error:
            raise DataError(with_place(where, error)) from None
        for item in found:
            seen[item.task, item.id] += 1
            number = seen[item.task, item.id]
            yield item if number == 1 else replace(item, id=f"{item.id}#{number}")


def prompt_with_context(prompt: str | None, context: str, question: str) -> str:
    """Return a prompt with a context as it stands; None: the data pipeline's prompt."""
    before, behind = (part.replace("{question}", question) for part in split_prompt(prompt))
    return before + context + behind


def prompt_with_documents(prompt: str | None, paragraphs: list[dict], question: str) -> tuple[str, list[dict]]:
    """Lay paragraphs out in a prompt as the data pipeline does; return it, and where in it each one's text is."""
    return lay_out(*split_prompt(prompt), question, map(document_text, paragraphs))


def text_at(row: dict, key: str) -> str:
    """Return the text that a row has at `key`, as it stands.

    Raises:
        DataError: It is none, or empty.
    """
    if not isinstance(row.get(key), str) or not row[key].strip():
        raise DataError(f"`{key}` must be a text that is not empty, {got(row, key)}.")
    return row[key]


def answers_at(row: dict) -> list[str]:
    """Return the gold answers of a row, without those of which nothing is left to be found.

    Raises:
        DataError: There are none.
    """
    answers = texts(row, "answers")
    if not (usable := [answer for answer in answers if judged_form(answer)]):
        raise DataError(f"there is no usable answer in {shown(answers)}: articles and punctuation do not count.")
    return usable


def number_at(row: dict, key: str, default: Any = None) -> float:
    """Return the finite number that a row has at `key`, also as a text.

    Raises:
        DataError: It is none, and there is no default.
    """
    try:
        value = float(row[key] if row.get(key) is not None else default)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"`{key}` must be a number, {got(row, key)}.")
    return value
