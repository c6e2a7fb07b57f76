"""Benchmarks by name: functions (recipe, tokenizer, template) -> the questions as `Item`s, made as they are asked for.

Contexts that are built here leave out questions and paragraphs with special tokens of the model, as the data pipeline
does. Prompts that come as they are (LongBench, files of NIAH-Plus, the user's own, validation rows) stay as they are;
those that hold a special token are counted in the log.
"""

from collections.abc import Callable, Iterator

from ..items import Item
from . import longbench, longbench_v2, niah, plain, ruler, validation

BENCHMARKS: dict[str, Callable[..., Iterator[Item]]] = {
    "longbench_qa": longbench.items,
    "ruler_qa": ruler.items,
    "niah_plus": niah.items,
    "longbench_v2": longbench_v2.items,
    "plain": plain.items,
    "validation": validation.items,
}
