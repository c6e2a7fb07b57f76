"""LongBench v1, question answering (Bai et al. 2024, arXiv:2308.14508), with the data pipeline's prompt.

The format is that of the authors' README: JSON lines with `input` (the question), `context`, `answers` (a list),
`length` (words), `dataset`, `language`, `all_classes` and `_id`; one file a task, named after it. The files of
LongBench-E (`qasper_e.jsonl` ...) have the same form: write `qasper_e` into `longbench_tasks`.

`longbench_data` is a folder with these files (the authors' data.zip, unpacked) or a name on the hub, whose
configurations are the tasks. Loading from the hub is not tested. Where the hub's copy is a script, `datasets` 4 refuses
it: use the folder.

What differs from the authors' own run: their prompts ask for the bare answer, ours is the training prompt. It says `No
answer` where Qasper's gold answer is `unanswerable`; such a question is answered wrongly by a model that obeys.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ...qa.files import DataError
from ...qa.questions import id_at
from ..items import LONGBENCH, Item
from ..recipe import EvalRecipe
from .rows import answers_at, items_of, number_at, prompt_with_context, rows_of, text_at

INTERVALS = ((4000, "0-4k"), (8000, "4-8k"), (float("inf"), "8k+"))  # of `length`, in words: LongBench-E's


def items(recipe: EvalRecipe, tokenizer, template) -> Iterator[Item]:
    """Yield its questions, task by task; groups: LongBench-E's intervals of length.

    Raises:
        DataError: An unknown task, a missing file, or a row that is not of the format.
    """
    tasks = recipe.longbench_tasks or LONGBENCH
    sources = {task: _source(recipe.longbench_data, task) for task in tasks}
    for task, source in sources.items():
        what, make = f"`longbench_data: {recipe.longbench_data}` ({task})", partial(_item, recipe, task)
        yield from items_of(partial(rows_of, source, "longbench_data", task), make, what, recipe, tokenizer, template)


def _source(data: str, task: str) -> str:
    """Return the file of a task, or the name on the hub."""
    if task.removesuffix("_e") not in LONGBENCH:
        raise DataError(f"`longbench_tasks`: {task!r} is none of the question answering tasks {', '.join(LONGBENCH)}.")
    if Path(data).is_file():
        raise DataError(f"`longbench_data: {data}` is a file; give the folder in which LongBench's files are.")
    if not Path(data).is_dir():
        if Path(data).parent.is_dir() and "/" in data:  # that of a hub's name, the owner, is no folder
            raise DataError(
                f"`longbench_data: {data}` is not there: unpack LongBench's data.zip into it (docs/evaluation.md, "
                "Where the files are)."
            )
        return data
    names = [name for end in (".jsonl", ".jsonl.gz") for name in (f"{task}{end}", f"data/{task}{end}")]
    found = [path for name in names if (path := Path(data, name)).exists()]
    if not found:
        raise DataError(
            f"`longbench_data: {data}` has no {task}.jsonl; unpack LongBench's data.zip there, or take {task} out of "
            "`longbench_tasks`."
        )
    return str(found[0])


def _item(recipe, task: str, row: dict) -> Iterator[Item]:
    question, context, answers = text_at(row, "input"), text_at(row, "context"), answers_at(row)
    words = number_at(row, "length", -1)
    interval = next(name for limit, name in INTERVALS if words < limit)
    yield Item(
        "longbench_qa", task, id_at(row, "_id"), prompt_with_context(recipe.prompt, context, question), question,
        answers, groups={"length": interval} if words >= 0 else {},
    )  # fmt: skip
