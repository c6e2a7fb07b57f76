"""Needle-in-a-Haystack PLUS (Zhao et al. 2024, LongAgent, arXiv:2402.11550): its files, and contexts of its kind.

`niah_data`: the authors' files. Their README (github.com/zuucan/NeedleInAHaystack-PLUS) documents the keys `id`,
`context`, `context_length` (tokens), `depth_percent`, `input` (the question), `dataset` (needle_squad, needle_hotpotqa)
and `answers` (a list), one JSON object a line. Questions with two needles carry `depth_percent1` and `depth_percent2`
instead, as the README's earlier versions and code of others that reads the published file have it. The file itself was
not seen.

The prompt is ours. The authors publish none for one model: their program (github.com/zuucan/LongAgent) and the paper's
appendix B ask a leader and members that each see a part, in JSON; so `prompts: official` is refused for this benchmark.

`niah_needles`: questions in SQuAD's, HotpotQA's or another format of the data pipeline, as {task: file} or a list of
files, for contexts at `niah_lengths` x `niah_depths`. The haystack is distractors from the same file up to the length,
as in ruler.py, and the same at every depth. Depth is the part of the haystack's tokens that stands before the needle: 0
% is the beginning, 100 % the end; the needle is put between the two paragraphs where that is nearest. Of several
paragraphs of evidence one, by seed, is at the depth and the others are anywhere behind it: at shares of what is left
that are drawn once a question, so that from cell to cell only length and depth change. (The authors' pairs are at two
of 0, 33, 66 and 100 %; and they replace entities of the answer by invented ones, which is not done here.)
`max_samples` caps the questions of a task, each of which is asked in every cell.
"""

from bisect import bisect_left
from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from pathlib import Path

from ...qa.documents import Question
from ...qa.files import DataError
from ...qa.questions import id_at
from ...qa.seeded import generator
from ..items import Item
from ..recipe import EvalRecipe
from .haystack import NAME, Haystack, item_fields, wanted_questions
from .rows import answers_at, items_of, number_at, prompt_with_context, rows_of, text_at

ENDS = (".jsonl", ".jsonl.gz")  # of its files' names in a folder


def items(recipe: EvalRecipe, tokenizer, template) -> Iterator[Item]:
    """Yield the questions of the files, then those of the contexts that are built.

    Raises:
        DataError: A row that is not of its format, or a task of which nothing can be built.
    """
    if recipe.niah_data:
        names = recipe.niah_data
        if Path(names).is_dir():
            names = ",".join(str(path) for path in sorted(Path(names).iterdir()) if path.name.endswith(ENDS))
        rows, what = partial(rows_of, names, "niah_data"), f"`niah_data: {recipe.niah_data}`"
        yield from items_of(rows, partial(_item, recipe), what, recipe, tokenizer, template)
    for task, name in _named(recipe.niah_needles or {}).items():
        hay = Haystack(name, task, "niah_needles", recipe.niah_lengths, recipe, tokenizer, template)
        yield from _grid(hay, task, recipe)


def _item(recipe, row: dict) -> Iterator[Item]:
    question, context, answers = text_at(row, "input"), text_at(row, "context"), answers_at(row)
    length, pair = int(number_at(row, "context_length")), row.get("depth_percent2") is not None
    depth = number_at(row, "depth_percent1" if pair else "depth_percent")
    name = f"{depth:g}+{number_at(row, 'depth_percent2'):g}" if pair else f"{depth:g}"
    yield Item(
        "niah_plus", text_at(row, "dataset"), f"{id_at(row)}/{length}/{name}",
        prompt_with_context(recipe.prompt, context, question), question, answers, length=length, depth=depth,
        groups={"depths": name} if pair else {},
    )  # fmt: skip


def _named(needles: dict[str, str] | list[str]) -> dict[str, str]:
    named = needles if isinstance(needles, dict) else {Path(name).stem: name for name in needles}
    if len(named) < len(needles):
        raise DataError(f"`niah_needles`: two files have the same name, write {{name: file}}; got {needles}.")
    return named


def _grid(hay: Haystack, task: str, recipe) -> Iterator[Item]:
    """Yield each question that fits, at all lengths and depths."""
    for prepared, contexts in hay.fitting(wanted_questions(recipe.niah_questions, recipe.max_samples)):
        question = prepared.question
        shares = needle_shares(recipe.seed, question)
        for length in contexts:
            for depth in dict.fromkeys(recipe.niah_depths):
                at = [depth / 100 + (1 - depth / 100) * share for share in shares]
                arrange = partial(placed, hay.pool.tokens, at)
                context = hay.builder.context(prepared, hay.lengths[length], NAME, arrange=arrange)
                if isinstance(context, str):  # only where tokens do not add up, so that an order can be too long
                    hay.read[f"{context}_{length}"] += 1
                    continue
                yield Item(
                    "niah_plus", task, f"{question.id}/{length}/{depth:g}", length=length, depth=float(depth),
                    **item_fields(question, context),
                )  # fmt: skip


def needle_shares(seed: int, question: Question) -> list[float]:
    """Draw how far behind the depth each paragraph of evidence stands: 0 for one of them, else up to 1, the end."""
    rng = generator(f"{seed}/{question.id}/needles")
    shares = [0.0, *(rng.random() for _ in question.evidence[1:])]
    rng.shuffle(shares)
    return shares


def placed(tokens, at: list[float], evidence: list[int], distractors: list[int]) -> list[int]:
    """Put each paragraph of evidence between distractors, where the tokens before it come nearest to its share.

    Args:
        tokens: Of each paragraph of the pool.
        at: For each of `evidence` the share of the distractors' tokens that stands before it, 0 to 1.
        evidence: Indices of the pool.
        distractors: Indices of the pool, in the order that they keep.
    """
    before = [0, *accumulate(tokens[i] for i in distractors)]  # [k]: tokens before the k-th distractor
    spots = []
    for share, i in sorted(zip(at, evidence, strict=True)):
        k = bisect_left(before, share * before[-1])
        if k and share * before[-1] - before[k - 1] < before[min(k, len(before) - 1)] - share * before[-1]:
            k -= 1
        spots.append((min(k, len(distractors)), i))
    documents = list(distractors)
    for k, i in reversed(spots):
        documents.insert(k, i)
    return documents
