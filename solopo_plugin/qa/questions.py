"""Parse questions with their evidence from the formats of MuSiQue, HotpotQA, 2WikiMultihopQA, SQuAD and our plain one.

The plain format is one JSON object a line: `id` (text or number), `question`, `answers` (a text or a list: the gold
answer, then its aliases), `evidence` and optionally `distractors` (lists of paragraphs), and optionally `hops` (a
number). A paragraph is a text, {"title", "text"}, or {"id"} of a document of the recipe's `corpus`.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from functools import partial
from typing import Any

from .answers import holds_answer, judged_form, normalize_answer
from .files import DataError, shown
from .prompts import document_text
from .seeded import digest
from .sources import Rows

Documents = dict[str, dict]  # id -> {"title", "text"}
# Of MRQA's paragraphs: where a document, its title and a paragraph begin, and the HTML of Natural Questions
MARKS = re.compile(
    r'(?<!\s)\s*(?:(?:\[(?:DOC|TLE|PAR|SEP)\]|</?(?:P|Table|T[rhd]|[UOD]l|Li|D[dt]|H[1-6])(?:_\w+="?\d+"?)*>)\s*)+'
)


def read_questions(
    rows: Rows,
    form: str,
    documents: Documents,
    counts: Counter,
    bad: Callable[[str, DataError], None],
    open_ended: bool = False,
) -> Iterator[dict]:
    """Yield the questions of `rows` that can be asked; unanswerable ones and repeated ids are left out and counted.

    Args:
        rows: Where a row stands, and a function that parses it, as from `source_rows`.
        form: A value of `input_format`.
        documents: The recipe's `corpus`, by id.
        counts: Counts `lines`, `unanswerable` and `same_id`, and what `NotRetrieved` names of a retrieval log.
        bad: What to do with a row that cannot be used, given where it stands and why.
        open_ended: Take questions without `answers` in the plain format: a model judges what is said to them.
    """
    seen = set()
    for where, load in split_articles(rows):
        counts["lines"] += 1
        try:
            row = load()
            if unanswerable(row):
                counts["unanswerable"] += 1
                continue
            question = parse_row(row, form, documents, open_ended)
        except NotRetrieved as error:
            counts[str(error)] += 1
            continue
        except DataError as error:
            bad(where, error)
            continue
        if question["id"] in seen:
            counts["same_id"] += 1
            continue
        seen.add(question["id"])
        yield question


class NotRetrieved(DataError):
    """Name the reason why nothing tells which passages of a retrieval log are evidence."""


def unanswerable(row: dict) -> bool:
    """Tell whether a row says so of itself: in the full MuSiQue, and in SQuAD 2.0 (on the hub: there is no answer)."""
    for key in ("answerable", "is_impossible"):
        if not isinstance(row.get(key), bool | None):
            raise DataError(f"`{key}` must be true or false, got {shown(row[key])}.")
    hub_squad = "context" in row and isinstance(row.get("answers"), dict) and row["answers"].get("text") == []
    return row.get("answerable") is False or row.get("is_impossible") is True or hub_squad


def split_articles(rows: Rows) -> Rows:
    """Yield rows as they are, and each question of an article of SQuAD as a row of its own, as the hub has it."""
    for where, load in rows:
        try:
            row = load()
            parts = [(part, objects(part, "qas")) for part in objects(row, "paragraphs")] if is_article(row) else None
        except DataError as error:
            yield where, partial(_refuse, error)
            continue
        if parts is None:
            yield where, partial(dict, row)
            continue
        for i, (paragraph, asked) in enumerate(parts):
            above = {"title": row.get("title"), "context": paragraph.get("context")}
            for k, question in enumerate(asked):
                place = f"{where} ({shown(row.get('title'))}: paragraphs[{i}].qas[{k}])"
                yield place, partial(dict, above | question)


def is_article(row: dict) -> bool:
    """Tell an article of SQuAD from a row of MuSiQue, which has paragraphs, too."""
    return "paragraphs" in row and not {"question", "answer"} & row.keys()


def _refuse(error: DataError) -> dict:
    raise error


def with_place(where: str, error: DataError) -> str:
    """Return what is wrong, with the place, unless it says so itself."""
    return str(error) if str(error).startswith(where) else f"{where}: {error}"


def parse_row(row: dict, form: str, documents: Documents, open_ended: bool = False) -> dict:
    """Return one row of a known format as a question of questions.jsonl.

    Repeated evidence (same text in normal form) is taken once; answers of which the normal form leaves nothing, empty
    distractors and distractors that are evidence are left out.

    Args:
        row: As it stands in its file.
        form: A value of `input_format`.
        documents: The recipe's `corpus`, by id.
        open_ended: Take a question without `answers` in the plain format, with an empty list.

    Raises:
        DataError: A key is missing, of the wrong type or empty.
    """
    form = _format(row) if form == "auto" else form
    unanswered = open_ended and form == "plain" and not row.get("answers")
    row = row | {"answers": ""} if unanswered else row
    id, answers, hops, evidence, distractors = PARSERS[form](row, documents)
    if not isinstance(row.get("question"), str) or not row["question"].strip():
        raise DataError(f"`question` must be a text, {got(row, 'question')}.")
    usable = [a.strip() for a in dict.fromkeys(answers) if judged_form(a)]
    if not usable and not unanswered:
        raise DataError(f"there is no usable answer in {shown(answers)}.")
    evidence = _distinct(evidence, set())
    if not evidence:
        raise DataError("the question has no evidence.")
    known = {normalize_answer(p["text"]) for p in evidence}
    order = {"order": _order(row, evidence, distractors, documents)} if form == "retrieval" else {}
    return {
        "id": id,
        "question": row["question"].strip(),
        "answers": usable,
        "hops": len(evidence) if hops is None and form in ("hotpotqa", "2wikimultihopqa") else hops,
        "evidence": evidence,
        "distractors": _distinct(distractors, known),
        **order,
    }


def _format(row: dict) -> str:
    known = given(row)
    if "paragraphs" in known:
        return "musique"
    if "supporting_facts" in known:
        return "2wikimultihopqa" if "evidences" in known else "hotpotqa"
    if "evidence" in known:
        return "plain"
    if "context" in known and "answers" in known:
        return "squad"
    if "passages" in known:
        return "retrieval"
    found = {key: name for key in KEYS if key not in row for name in nearest(row, key)[:1]}
    near = "; nearest: " + ", ".join(f"`{name}` to `{key}`" for key, name in found.items()) if found else ""
    if "text" in row and "question" not in row:
        near = "; if each row is a document about which questions are to be asked, set `input_format: documents`"
    raise DataError(
        f"the format of the row cannot be told from its keys ({keys_of(row)}); musique has `paragraphs`, hotpotqa and "
        "2wikimultihopqa `supporting_facts`, squad `context` and `answers`, plain `evidence`, retrieval "
        f"`passages`{near}."
    )


def _musique(row: dict, documents: Documents) -> tuple:
    evidence: list[dict] = []
    distractors: list[dict] = []
    for item in list_at(row, "paragraphs"):
        if not isinstance(item, dict) or not isinstance(item.get("is_supporting"), bool):
            raise DataError(f"`paragraphs` must hold objects with `is_supporting`, got {shown(item)}.")
        # `text` in copies and in what imitates the format
        text = given(item).get("paragraph_text", item.get("text"))
        if not isinstance(text, str):
            raise DataError(f"`paragraph_text` of each of `paragraphs` must be a text, {got(item, 'paragraph_text')}.")
        if item["is_supporting"] or text:
            (evidence if item["is_supporting"] else distractors).append(make_paragraph(item | {"text": text}, {}))
    hops = row.get("question_decomposition")
    aliases = texts(row, "answer_aliases") if row.get("answer_aliases") else []
    answers = [*texts(row, "answer"), *aliases]
    return id_at(row), answers, len(hops) if isinstance(hops, list) and hops else None, evidence, distractors


def _hotpotqa(row: dict, documents: Documents) -> tuple:
    """Read HotpotQA and 2WikiMultihopQA as their authors give them, and as hub copies do (columns, or JSON texts)."""
    context, facts = (_pairs(row, key) for key in ("context", "supporting_facts"))
    titles = {title for title, _ in facts}
    evidence, distractors = [], []
    for title, sentences in context:
        if not isinstance(sentences, list) or not all(isinstance(s, str) for s in sentences):
            raise DataError(f"`context` must pair titles with lists of sentences, got {shown(sentences)}.")
        spaced = any(s[:1].isspace() for s in sentences[1:])  # HotpotQA's sentences bring their spaces along
        paragraph = {"title": title, "text": ("" if spaced else " ").join(sentences)}
        if title in titles:
            evidence.append(make_paragraph(paragraph, {}))
        elif paragraph["text"].strip():
            distractors.append(make_paragraph(paragraph, {}))
    missing = titles - {title for title, _ in context}
    if missing:
        raise DataError(f"`supporting_facts` names {shown(min(missing))}, which is not in `context`.")
    return id_at(row, "_id"), texts(row, "answer"), None, evidence, distractors


def _plain(row: dict, documents: Documents) -> tuple:
    hops = row.get("hops")
    if hops is not None and (not isinstance(hops, int) or isinstance(hops, bool)):
        raise DataError(f"`hops` must be a whole number or null, got {shown(hops)}.")
    evidence = [make_paragraph(item, documents) for item in list_at(row, "evidence")]
    distractors = (
        [make_paragraph(item, documents) for item in list_at(row, "distractors")] if row.get("distractors") else []
    )
    return id_at(row), texts(row, "answers"), hops, evidence, distractors


def _squad(row: dict, documents: Documents) -> tuple:
    """Read SQuAD: a question of an official file with its paragraph, or a row of the hub, whose answers are columns.

    The hub's copies of MRQA (Natural Questions and others) have texts as answers, and marks in the paragraph, which go.
    """
    title, answers, context, id_key = row.get("title"), row.get("answers"), row.get("context"), "id"
    title = title.replace("_", " ") if isinstance(title, str) else title
    if not isinstance(context, str) or not context.strip():
        raise DataError(f"`context` must be a text that is not empty, {got(row, 'context')}.")
    if isinstance(answers, list) and all(isinstance(answer, str) for answer in answers):
        answers, context = {"text": answers}, MARKS.sub(" ", context).strip()
        id_key = next((key for key in ("qid", "key") if row.get(key)), "id")
    elif not isinstance(answers, dict):
        answers = {"text": [text for answer in objects(row, "answers") for text in texts(answer, "text")]}
    evidence = make_paragraph({"title": title, "text": context}, {})
    return id_at(row, id_key), texts(answers, "text"), None, [evidence], []


def _retrieval(row: dict, documents: Documents) -> tuple:
    """Read a row of a retrieval log, {"question", "passages", "answer"}: evidence are the passages with the answer."""
    key = next((name for name in ("answer", "answers") if row.get(name)), None)
    if key is None:
        raise DataError(
            "there is no `answer`, without which nothing tells the passages that hold it from the others; add it, or "
            "give the passages as documents (`input_format: documents`), about which questions are asked."
        )
    answers, passages = texts(row, key), _passages(row, documents)
    telling = [answer for answer in answers if judged_form(answer) not in ("yes", "no")]
    if not telling:
        raise NotRetrieved("yes_or_no")  # a passage with that word is no evidence for it
    evidence = [p for p in passages if holds_answer(document_text(p), telling)]
    if not evidence:
        raise NotRetrieved("answer_not_retrieved")
    question = str(row.get("question"))
    id = id_at(row) if {"id", "_id"} & given(row).keys() else digest(question).hex()[:16]
    return id, answers, None, evidence, [p for p in passages if p not in evidence]


def _passages(row: dict, documents: Documents) -> list[dict]:
    return _distinct([make_paragraph(item, documents) for item in list_at(row, "passages")], set())


def _order(row: dict, evidence: list[dict], distractors: list[dict], documents: Documents) -> list[int]:
    """Return the retrieved passages, best first, by their place in evidence and distractors."""
    given = [*evidence, *distractors]
    return [given.index(passage) for passage in _passages(row, documents)]


KEYS = ("evidence", "context", "answers", "paragraphs", "supporting_facts")  # by which a format is told
PARSERS = {
    "musique": _musique, "hotpotqa": _hotpotqa, "2wikimultihopqa": _hotpotqa, "squad": _squad, "plain": _plain,
    "retrieval": _retrieval,
}  # fmt: skip


def make_paragraph(item: Any, documents: Documents) -> dict:
    """Return a paragraph as {"title", "text"}, its text verbatim; it may be a text, an object, or a document's id."""
    if isinstance(item, str):
        item = {"text": item}
    if not isinstance(item, dict):
        raise DataError(f"a paragraph must be a text or an object, got {shown(item)}.")
    known = given(item).keys()
    if "text" not in known and "id" in known and (row_id(item["id"]) in documents or not known - {"id", "title"}):
        if row_id(item["id"]) not in documents:
            raise DataError(f"the recipe's `corpus` has no document with the id {shown(item['id'])}.")
        return documents[row_id(item["id"])]
    text, title = item.get("text"), item.get("title")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"the `text` of a paragraph must be a text that is not empty, {got(item, 'text')}.")
    if not isinstance(title, str | None):
        raise DataError(f"the title of a paragraph must be a text, got {shown(title)}.")
    return {"title": " ".join((title or "").split()), "text": text}


def _distinct(paragraphs: list[dict], known: set[str]) -> list[dict]:
    """Return the paragraphs whose text, in normal form, is neither in `known` nor that of an earlier one."""
    kept = []
    for paragraph in paragraphs:
        form = normalize_answer(paragraph["text"])
        if form not in known:
            known.add(form)
            kept.append(paragraph)
    return kept


def _pairs(row: dict, key: str) -> list[tuple[str, Any]]:
    """Return a list of [title, value], also from {"title": [...], ...: [...]} or from JSON in a text."""
    value = row.get(key)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError(f"`{key}` is a text that is no JSON: {shown(value)}.") from None
    if isinstance(value, dict) and isinstance(value.get("title"), list):
        others = [v for k, v in value.items() if k != "title"]
        if len(others) == 1 and isinstance(others[0], list) and len(others[0]) == len(value["title"]):
            value = [list(pair) for pair in zip(value["title"], others[0], strict=True)]
    pairs = value if isinstance(value, list) else []
    if all(isinstance(pair, dict) and len(pair) == 2 and "title" in pair for pair in pairs):
        pairs = [[pair["title"], *(v for k, v in pair.items() if k != "title")] for pair in pairs]
    if not pairs or not all(isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) for p in pairs):
        raise DataError(f"`{key}` must be a list of pairs that begin with a title, {got(row, key)}.")
    return [(title, other) for title, other in pairs]


def objects(row: dict, key: str) -> list[dict]:
    """Return the JSON objects that a row has at `key`.

    Raises:
        DataError: There is no list of objects.
    """
    if odd := [item for item in list_at(row, key) if not isinstance(item, dict)]:
        raise DataError(f"`{key}` must hold objects, got {shown(odd[0])}.")
    return row[key]


def list_at(row: dict, key: str) -> list:
    """Return the list that a row has at `key`."""
    if not isinstance(row.get(key), list):
        raise DataError(f"`{key}` must be a list, {got(row, key)}.")
    return row[key]


def texts(row: dict, key: str) -> list[str]:
    """Return the text or texts, at least one, that a row has at `key`."""
    value = row.get(key)
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
        raise DataError(f"`{key}` must be a text or a list of texts, {got(row, key)}.")
    return found


def id_at(row: dict, key: str = "id") -> str:
    """Return the id that a row has at `key`, or else at `id` or `_id`."""
    key = next((name for name in (key, "id", "_id") if row.get(name) is not None), key)
    if key not in row:
        raise DataError(f"`{key}` must be a text or a whole number, {got(row, key)}.")
    return row_id(row[key], key)


def row_id(value: Any, key: str = "id") -> str:
    """Return an id, which may be a text or a whole number, as a text."""
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise DataError(f"`{key}` must be a text or a whole number, got {shown(value)}.")
    return str(value)


def given(row: dict) -> dict:
    """Return a row without nulls: in parquet a key that one row has, or one paragraph, is null in all others."""
    return {key: value for key, value in row.items() if value is not None}


def got(row: dict, key: str) -> str:
    """Say what a row has at `key`; where it has nothing, what it has instead, for a message."""
    if key in row:
        return f"got {shown(row[key])}"
    near = "".join(f"; nearest is `{name}`" for name in nearest(row, key)[:1])
    return f"and is missing (there is {keys_of(row) or 'nothing'}{near})"


def keys_of(row: dict) -> str:
    """List a row's keys, the first of them where there are many."""
    return ", ".join([repr(key)[1:-1][:24] for key in row][:10]) + ", ..." * (len(row) > 10)


def nearest(row: dict, key: str) -> list[str]:
    """Return the keys of a row that may mean the same as `key`: one is part of the other, or they are spelled alike."""
    stem = key.rstrip("s")
    parts = [name for name in row if (stem in name if len(stem) > 3 else name.endswith(stem))]
    parts += [name for name in row if len(name) > 3 and name.rstrip("s") in key]
    return parts + get_close_matches(key, row, n=1, cutoff=0.5)
