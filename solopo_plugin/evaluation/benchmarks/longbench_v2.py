"""LongBench v2 (Bai et al. 2024, arXiv:2412.15204): four choices, answered with one chain of thought.

The format is that of its data.json and of its copy on the hub: `_id`, `domain`, `sub_domain`, `difficulty` (easy,
hard), `length` (short, medium, long), `question`, `choice_A` to `choice_D`, `answer` (the letter) and `context`.
`longbench_v2_data` is that file (one list of 465 MB, read row by row), a .jsonl or
.parquet file of the same rows, or a name on the hub, from which loading is not tested.

The prompt is ours, as for all benchmarks: a chain of thought in one answer, as the paper has it; the sentence that ends
an answer is the one that the authors' parser reads. The paper samples at temperature 0.1.

`prompts: official` is the authors' own first protocol: their words, no chain of thought, at most 128 tokens of answer
(they too sample at 0.1, which is the recipe's key). Their chain of thought is not offered: its second request shows the
model its own thoughts without the text and asks for the letter, and without that request it asks for no letter at all.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from ...qa.files import DataError
from ...qa.questions import row_id, shown
from ..items import OFFICIAL_TOKENS, Item
from ..recipe import EvalRecipe
from .rows import items_of, prompt_with_context, rows_of, text_at

PROMPT = """\
Here is a text, and a question about it with several answers to choose from. One of them is right.

{documents}

Question: {question}

Think step by step: say what in the text bears on the question, and what follows from it for each of the answers. Then \
end with one line, `The correct answer is (X)`, where X is the letter of the right answer."""
LETTERS = "ABCD"
# word for word prompts/0shot.txt of github.com/THUDM/LongBench at 072a5a7; MIT License, (c) 2023 THU-KEG & Zhipu AI
OFFICIAL = """\
Please read the following text and answer the question below.

<text>
$DOC$
</text>

What is the correct answer to this question: $Q$
Choices:
(A) $C_A$
(B) $C_B$
(C) $C_C$
(D) $C_D$

Format your response as follows: "The correct answer is (insert answer here)"."""
CLASSES = {"difficulty": ("easy", "hard"), "length": ("short", "medium", "long")}


def items(recipe: EvalRecipe, tokenizer, template) -> Iterator[Item]:
    """Yield its questions; groups: difficulty and class of length; the task is `all`.

    Raises:
        DataError: A row that is not of the format.
    """
    rows = partial(rows_of, recipe.longbench_v2_data, "longbench_v2_data", None, "train")
    what = f"`longbench_v2_data: {recipe.longbench_v2_data}`"
    yield from items_of(rows, partial(_item, recipe.prompts == "official"), what, recipe, tokenizer, template)


def with_choices(question: str, choices: list[str]) -> str:
    """Return a question and its choices, as the prompt shows them."""
    return "\n\n".join([question, "\n".join(f"({x}) {text}" for x, text in zip(LETTERS, choices, strict=False))])


def official_prompt(row: dict) -> str:
    """Return the authors' message for a row: texts stripped and put in one after the other, as their pred.py does."""
    prompt = OFFICIAL
    for name, key in {"DOC": "context", "Q": "question", **{f"C_{x}": f"choice_{x}" for x in LETTERS}}.items():
        prompt = prompt.replace(f"${name}$", row[key].strip())
    return prompt


def _item(official: bool, row: dict) -> Iterator[Item]:
    choices = [text_at(row, f"choice_{letter}") for letter in LETTERS]
    question, letter = text_at(row, "question"), row.get("answer")
    if letter not in tuple(LETTERS):
        raise DataError(f"`answer` must be one of the letters A to D, got {shown(letter)}.")
    groups: dict[str, Any] = {key: row.get(key) for key in CLASSES}
    for key, value in groups.items():
        if value not in CLASSES[key]:
            raise DataError(f"`{key}` must be one of {', '.join(CLASSES[key])}; got {shown(value)}.")
    context = text_at(row, "context")
    prompt = official_prompt(row) if official else prompt_with_context(PROMPT, context, with_choices(question, choices))
    yield Item(
        "longbench_v2", "all", row_id(row.get("_id")), prompt, question, [letter], "choice",
        max_new_tokens=OFFICIAL_TOKENS["longbench_v2"] if official else None, groups=groups,
    )  # fmt: skip
