"""The validation rows of scripts/build_data.py, whose questions are held out of training.

`validation_data` is <dataset_name>_solopo_val.jsonl or .parquet. Each row is asked twice: as task `short` with `prompt`
and as task `long` with `long_prompt`, both as they were made, so that the difference is what the context costs: a
prompt that `max_input_tokens` would cut is refused.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ...host.template import encode_prompt
from ...qa.files import DataError
from ...qa.questions import id_at, objects
from ..items import Item
from ..recipe import EvalRecipe
from .rows import answers_at, items_of, rows_of, text_at


def items(recipe: EvalRecipe, tokenizer, template) -> Iterator[Item]:
    """Yield both questions of each row; `max_samples` chooses the same rows for both.

    Raises:
        DataError: There is no such file, a row lacks what an export has, or a prompt is too long.
    """
    assert recipe.validation_data is not None  # the recipe sees to it
    path = Path(recipe.validation_data)
    if not path.is_file():
        raise DataError(
            f"`validation_data: {path}`: there is no such file; the data pipeline writes one where its recipe has "
            "`val_size` above 0: python scripts/build_data.py RECIPE val_size=200."
        )
    rows = partial(rows_of, str(path), "validation_data", None, "train")
    for item in items_of(rows, _items, f"`validation_data: {path}`", recipe, tokenizer, template):
        if (tokens := len(encode_prompt(tokenizer, template, item.prompt))) > recipe.max_input_tokens:
            raise DataError(
                f"`validation_data: {path}`: the {item.task} prompt of {item.id} has {tokens} tokens, more than "
                f"`max_input_tokens: {recipe.max_input_tokens}`, and would lose its middle; raise that to the rows' "
                "`long_tokens`."
            )
        yield item


def _items(row: dict) -> Iterator[Item]:
    groups = {} if row.get("hops") is None else {"hops": str(row["hops"])}
    for task, key in (("short", "prompt"), ("long", "long_prompt")):
        yield Item(
            "validation", task, id_at(row), text_at(row, key), text_at(row, "question"),
            answers_at(row), evidence=objects(row, f"{task}_evidence"), groups=groups,
        )  # fmt: skip
