"""RULER's question answering (Hsieh et al. 2024, arXiv:2404.06654): SQuAD, HotpotQA, and MuSiQue as the paper adds.

`ruler_data` names the questions of each task: SQuAD's official file (1.1 or 2.0, whose unanswerable questions are left
out), HotpotQA's, MuSiQue's, or any other that the data pipeline reads. A context is the evidence of the question and
distractors from the whole file, shuffled, by the data pipeline's own builder: at `short_tokens` it is, byte for byte,
its short context. All lengths of a task have the same questions; one that does not fit into each is dropped, counted,
and replaced by the next of the draw. `max_samples` caps the questions of a task.

A length is that of the whole templated prompt, never more, and less by at most one paragraph. Where `max_input_tokens`
holds at least 95 % of a length but not all of it (31500 of 32768), the context is built to `max_input_tokens`, as
RULER's lengths also leave room for the answer. What else differs from RULER: its distractors of SQuAD come from the
same article first and may hold the answer, its evidence of HotpotQA comes with the eight distractors of its row.
"""

from collections.abc import Iterator

from ..items import Item
from ..recipe import EvalRecipe
from .haystack import Haystack, item_fields, wanted_questions


def items(recipe: EvalRecipe, tokenizer, template) -> Iterator[Item]:
    """Yield its questions, task by task, each at all lengths in turn.

    Raises:
        DataError: A row that is not of its format, or a task of which nothing can be built.
    """
    wanted = wanted_questions(recipe.ruler_questions, recipe.max_samples)
    assert recipe.ruler_data is not None  # the recipe sees to it
    for task, name in recipe.ruler_data.items():
        hay = Haystack(name, task, "ruler_data", recipe.ruler_lengths, recipe, tokenizer, template)
        for prepared, contexts in hay.fitting(wanted):
            for length, context in contexts.items():
                fields = item_fields(prepared.question, context)
                yield Item("ruler_qa", task, f"{prepared.question.id}/{length}", length=length, **fields)
