"""Questions of your own: one JSON object a line (or a JSON list of them), in one of these forms.

    {"id": 1, "question": "...", "answers": "..." or ["gold", "alias"], "context": "..."}
    {"id": 1, "question": "...", "answers": [...], "documents": ["a text", {"title": "...", "text": "..."}]}
    {"id": 1, "question": "...", "answers": [...], "evidence": [...], "distractors": [...]}   the data pipeline's format
    {"id": 1, "prompt": "the whole message", "answers": [...]}                                `question` may be missing

A context stands in the data pipeline's prompt (or the recipe's `prompt`) as it is; documents are laid out and numbered
as in the data, in the order given, evidence before distractors. Nothing is shuffled, cut to a length or left out. A
paragraph cannot be the `id` of a corpus document.

With `choices`, a list of two to four texts, the question is one of multiple choice, with LongBench v2's prompt, parser
and accuracy; `answers` is then the letter of the right one, or its text. `task` names the line of the tables that the
question belongs to; `questions`, where it is missing.
"""

from collections.abc import Iterator
from functools import partial
from typing import Literal

from ...qa.answers import judged_form
from ...qa.files import DataError, shown
from ...qa.questions import id_at, list_at, make_paragraph, texts
from ..items import Item
from ..recipe import EvalRecipe
from .longbench_v2 import LETTERS, PROMPT, with_choices
from .rows import items_of, prompt_with_context, prompt_with_documents, rows_of, text_at

FORMS = ("prompt", "context", "documents", "evidence")


def items(recipe: EvalRecipe, tokenizer, template) -> Iterator[Item]:
    """Yield the questions of the user's files.

    Raises:
        DataError: A row that is of none of the forms.
    """
    assert recipe.plain_data is not None  # the recipe sees to it
    rows, what = partial(rows_of, recipe.plain_data, "plain_data"), f"`plain_data: {recipe.plain_data}`"
    yield from items_of(rows, partial(_item, recipe.prompt), what, recipe, tokenizer, template)


def _item(prompt: str | None, row: dict) -> Iterator[Item]:
    forms = [form for form in FORMS if row.get(form) is not None]
    if len(forms) != 1:
        raise DataError(f"a question needs one of {', '.join(FORMS)}; it has {', '.join(forms) or 'none'}.")
    question = text_at(row, "question") if row.get("question") is not None or forms != ["prompt"] else ""
    answers, choices, asked = texts(row, "answers"), row.get("choices"), question
    usable = [answer for answer in answers if judged_form(answer)]
    if choices is None and not usable:
        raise DataError(
            f"there is no usable answer in {shown(answers)}: articles and punctuation do not count; for a question of "
            "multiple choice give its `choices`."
        )
    if choices is not None:
        usable, prompt, asked = [_letter(texts(row, "choices"), answers)], PROMPT, with_choices(question, choices)
    made, places = _prompt(forms[0], prompt, asked, row)
    task = text_at(row, "task") if row.get("task") is not None else "questions"
    kind: Literal["qa", "choice"] = "qa" if choices is None else "choice"
    yield Item("plain", task, id_at(row), made, question, usable, kind, evidence=places)


def _prompt(form: str, prompt: str | None, asked: str, row: dict) -> tuple[str, list[dict]]:
    """Return the message, and the places of the evidence, where the row says what is evidence."""
    if form == "prompt":
        return text_at(row, "prompt"), []
    if form == "context":
        return prompt_with_context(prompt, text_at(row, "context"), asked), []
    paragraphs = [make_paragraph(item, {}) for item in list_at(row, form)]
    if not paragraphs:
        raise DataError(f"`{form}` is empty.")
    if form == "documents":
        return prompt_with_documents(prompt, paragraphs, asked)[0], []
    distractors = list_at(row, "distractors") if row.get("distractors") is not None else []
    made, places = prompt_with_documents(prompt, [*paragraphs, *(make_paragraph(d, {}) for d in distractors)], asked)
    return made, places[: len(paragraphs)]


def _letter(choices: list[str], answers: list[str]) -> str:
    """Return the letter of the right choice, from the letter or from its text."""
    letters = LETTERS[: len(choices)]
    if not 2 <= len(choices) <= len(LETTERS):
        raise DataError(f"`choices` must be two to four texts, got {len(choices)}.")
    if len(set(choices)) < len(choices):
        raise DataError(f"`choices` must differ, got {shown(choices)}.")
    by_text, letter = dict(zip(choices, letters, strict=True)), answers[0] if answers[0] in tuple(letters) else None
    found = by_text.get(answers[0], letter)
    if len(answers) != 1 or found is None:
        raise DataError(f"`answers` must be one of the letters {', '.join(letters)} or choices, got {shown(answers)}.")
    if letter not in (None, found):
        raise DataError(
            f"`answers: {letter}` is the letter of one choice and the text of another, ({found}); put that choice in "
            f"place {letter}, or word the choices otherwise."
        )
    return found
