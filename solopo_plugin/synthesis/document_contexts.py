"""Build long contexts that are the documents of the evidence themselves, cut around it where they are too long.

A document is its passages in their order, with a line for each new section. Where something is left out stands `CUT`.
How much of a document stands before its evidence is drawn, so that the evidence is as likely anywhere.
"""

from collections.abc import Sequence

from ..qa.contexts import ROUNDS, Builder, PreparedQuestion
from ..qa.documents import Pool, Question
from ..qa.prompts import BETWEEN, lay_out
from .passages import STEP

CUT = "[...]"
CLOSE = 0.98  # share of the target that is near enough, and of the room when a context came out too long; ours


def by_source(pool: Pool) -> dict[str, list[int]]:
    """Return the passages of each document, in their order; those with special tokens are left out."""
    passages: dict[str, list[int]] = {}
    for i in sorted(pool.origins, key=lambda i: pool.origins[i].place):
        if not pool.has_marker[i]:
            passages.setdefault(pool.origins[i].source, []).append(i)
    return passages


def build_document_context(
    builder: Builder, prepared: PreparedQuestion, target: int, passages: dict[str, list[int]]
) -> dict | str:
    """Return the context, as `BuiltContext.row` is, or why there is none.

    Args:
        builder: Of the other contexts.
        prepared: The question, from `Builder.prepare`.
        target: Tokens of the templated prompt at most.
        passages: Of each document, from `by_source`.
    """
    pool, question = builder.pool, prepared.question
    if any(i not in pool.origins for i in question.evidence):
        return "evidence_of_no_document"
    rng = builder.rng(question, "document")
    sources = list(dict.fromkeys(pool.origins[i].source for i in question.evidence))
    rng.shuffle(sources)
    shares = [rng.random() for _ in sources]
    room, all_evidence = target - prepared.overhead, True
    best: dict | None = None
    counted: dict[str, int] = {}  # tokens of what was laid out already, by its passages
    for _ in range(ROUNDS):
        chosen, free = [], room - sum(pool.tokens[i] for i in question.evidence)
        for n, (source, share) in enumerate(zip(sources, shares, strict=True)):
            window, used = widen(passages[source], question.evidence, free // (len(sources) - n), share, pool.tokens)
            chosen.append(window)
            free -= used
        if (key := str(chosen)) not in counted:
            prompt, found = _lay_out(builder, question, sources, chosen, passages)
            tokens = counted[key] = builder.budget.of_prompt(prompt)
            if tokens <= target and (best is None or tokens > best["tokens"]):
                best = dict(prompt=prompt, tokens=tokens, paragraphs=len(sources), evidence=found, dropped=[])
                all_evidence = not any(set(window) - set(question.evidence) for window in chosen)
        tokens = counted[key]
        left = target - tokens
        is_whole = all(len(window) == len(passages[source]) for source, window in zip(sources, chosen, strict=True))
        if left >= 0 and (is_whole or tokens >= target * CLOSE):
            break
        # passages were counted with their titles, of which a document shows the new ones alone
        room = room + left if left >= 0 else int(room * CLOSE) + left
    if best is None:
        return "evidence_longer_than_long"
    return "document_is_evidence" if all_evidence else best


def widen(
    passages: list[int], evidence: Sequence[int], free: int, share: float, tokens: Sequence[int]
) -> tuple[list[int], int]:
    """Return a document's evidence with passages around it, in their order, and the tokens of what was added.

    Args:
        passages: Of the document.
        evidence: Passages that are taken whatever they take, of this document and others.
        free: Tokens for the others.
        share: Of `free`, from 0 to 1, that goes to what stands before the evidence, if there is as much.
        tokens: By passage.
    """
    places = [k for k, i in enumerate(passages) if i in evidence]
    first, last = places[0], places[-1]
    taken, used = set(places), 0

    def take(numbers: range, limit: float) -> None:
        nonlocal used
        for k in numbers:
            if k in taken:
                continue
            if used + tokens[passages[k]] > limit:
                return
            taken.add(k)
            used += tokens[passages[k]]

    take(range(first, last), free)
    take(range(first - 1, -1, -1), used + (free - used) * share)
    take(range(last + 1, len(passages)), free)
    take(range(first - 1, -1, -1), free)
    return [passages[k] for k in sorted(taken)], used


def _lay_out(
    builder: Builder, question: Question, sources: list[str], chosen: list[list[int]], passages: dict[str, list[int]]
) -> tuple[str, list[dict]]:
    """Return the prompt, and where in it each of the evidence stands."""
    documents: list[str] = []
    within: dict[int, tuple[int, int]] = {}
    for number, (source, window) in enumerate(zip(sources, chosen, strict=True)):
        document, starts = write_document(builder.pool, window, passages[source])
        documents.append(document)
        within |= {i: (number, start) for i, start in starts.items()}
    prompt, places = lay_out(builder.before, builder.behind, question.question, documents)
    found = []
    for i in question.evidence:
        number, start = within[i]
        begin = places[number]["start"] + start
        found.append({"paragraph": number + 1, "start": begin, "end": begin + len(builder.pool.text(i))})
    return prompt, found


def write_document(pool: Pool, window: list[int], passages: list[int]) -> tuple[str, dict[int, int]]:
    """Return passages of a document as `qa.prompts.document_text` writes one, and where in its text each begins."""
    title, section = pool.document(window[0]).split("\n", 1)[0], pool.origins[window[0]].section
    title = title.removesuffix(STEP + section) if section else title
    number = {i: k for k, i in enumerate(passages)}
    parts: list[str] = []
    starts: dict[int, int] = {}
    at, shown, before = 0, "", -1

    def add(text: str) -> None:
        nonlocal at
        at += len(BETWEEN) if parts else 0
        parts.append(text)
        at += len(text)

    for i in window:
        if number[i] != before + 1:
            add(CUT)
        if pool.origins[i].section != shown and pool.origins[i].section:
            add(pool.origins[i].section)
        shown, before = pool.origins[i].section, number[i]
        text = pool.text(i)
        add(text)
        starts[i] = at - len(text)
    if before != len(passages) - 1:
        add(CUT)
    return f"{title}\n{BETWEEN.join(parts)}", starts
