"""Score stored answers without a model: items.jsonl and answers/<model>.jsonl give scores/<model>.jsonl.

The scores, 0 to 100 each, by the functions of `solopo_plugin.qa.answers`:

- qa: `f1` (LongBench v1's), `em` (SQuAD's) and `sub_em` (the data pipeline's judge of samples, after the paper) of the
  prediction, which is what `extract_answer` finds behind `The answer is:`; `string_match` (RULER's) of the whole
  response. Without the marker the whole response less its thoughts is the prediction: a model that was not told of the
  marker answers plainly. But if the prompt asks for it, `sub_em` without it counts only a response that is nothing but
  the answer, because in a whole chain of thought a mere mention would count as the answer.
- choice: `accuracy` of the letter that LongBench v2's parser finds first; `accuracy_lenient`, ours, of the letter that
  the response ends with (`longbench_v2_choice_lenient`); and `parsed`, whether the parser finds one.
"""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from ..qa.answers import (
    behind_thought,
    exact_match,
    extract_answer,
    f1_score,
    holds_answer,
    judged_form,
    longbench_v2_choice,
    longbench_v2_choice_lenient,
    string_match_part,
)
from ..qa.files import DataError, as_data_error, dump, parse_line, replacing
from ..qa.prompts import split_prompt
from .items import Item, read_items

log = logging.getLogger(__name__)
_ASKS_MARKER = re.compile("the answer is:", re.IGNORECASE)


def score_answer(item: Item, text: str, prompt: str | None = None) -> dict:
    """Return the scores of one response.

    Args:
        item: The question.
        text: The whole response, as the model gave it.
        prompt: The recipe's `prompt`; None: ours.

    Returns:
        {"prediction": what follows the marker (of a choice the letter), None without, "marker": whether it is there,
        "scores": {metric: 0 to 100}}.
    """
    if item.kind == "choice":
        letter = longbench_v2_choice(text)
        scores = {
            "accuracy": 100.0 * (letter in item.answers),
            "accuracy_lenient": 100.0 * (longbench_v2_choice_lenient(text) in item.answers),
            "parsed": 100.0 * (letter is not None),
        }
        return {"prediction": letter, "marker": letter is not None, "scores": scores}
    golds, found = [answer for answer in item.answers if answer.strip()], extract_answer(text)
    said = behind_thought(text).strip() if found is None else found
    whole = found is None and _ASKS_MARKER.search(own_words(item, prompt))  # nothing but the answer counts
    sub_em = holds_answer(said, golds) and (not whole or judged_form(said) in map(judged_form, golds))
    scores = {
        "f1": 100.0 * f1_score(said, golds),
        "em": 100.0 * exact_match(said, golds),
        "sub_em": 100.0 * sub_em,
        "string_match": string_match_part(text, golds),
    }
    return {"prediction": found, "marker": found is not None, "scores": scores}


def own_words(item: Item, prompt: str | None) -> str:
    """Return what a prompt says beside documents and question; all of it where it was not made from `prompt`."""
    parts = split_prompt(prompt)
    before, behind = (part.replace("{question}", item.question) for part in parts)
    return "\n".join(parts) if item.prompt.startswith(before) and item.prompt.endswith(behind) else item.prompt


def write_scores(output_dir: Path | str, model_names: list[str], prompt: str | None = None) -> dict[str, dict]:
    """Score what models have answered; one line per answer, in the order of items.jsonl, whatever the answers' order.

    A line is {"benchmark", "task", "id", "prediction", "marker", "empty", "scores", "prompt_tokens", "cut_tokens",
    "finish_reason", "length", "depth", "groups", "evidence_depth", "source"}, and "server_tokens" where a server
    counted other prompt tokens than "prompt_tokens". `evidence_depth` is where the evidence is in the uncut prompt,
    in percent of its characters, on average; null where that is not known. `source` is the same for a question that is
    asked at several lengths or depths, or in several tasks (`source_of`).

    Args:
        output_dir: Folder of the evaluation; its items.jsonl, which may have gigabytes, is read once for all models.
        model_names: Whose answers are scored.
        prompt: The recipe's `prompt`; None: ours.

    Returns:
        By model {"asked": questions, "scored": answers, "unknown": answers to questions that items.jsonl does not
        have}.

    Raises:
        DataError: A file is missing or damaged, or an answer was given to another prompt; no file of scores is written.
    """
    folder, asked, scored = Path(output_dir), 0, Counter[str]()
    files = {name: folder / "answers" / f"{name}.jsonl" for name in model_names}
    answers = {name: read_answers(path) for name, path in files.items()}
    with ExitStack() as stack:
        scores = {name: stack.enter_context(replacing(folder / "scores" / f"{name}.jsonl")) for name in files}
        known: set[tuple] = set()
        for item in tqdm(read_items(folder / "items.jsonl"), desc="score", unit=" questions", disable=None):
            asked += 1
            known.add(item.key)
            source = source_of(item, known)
            for name, path in files.items():
                if answer := answers[name].pop(item.key, None):
                    scored[name] += 1
                    scores[name].write(dump(_scored(item, *answer, path, prompt) | {"source": source}) + b"\n")
    for name, path in files.items():
        if unknown := answers[name]:
            log.warning(
                "%s: %d answers belong to no question of items.jsonl and are left out; the first: %s.",
                path, len(unknown), "/".join(next(iter(unknown))),
            )  # fmt: skip
        if lacking := asked - scored[name]:
            log.warning("%s: %d of %d questions are not answered; no score counts them.", name, lacking, asked)
    return {name: {"asked": asked, "scored": scored[name], "unknown": len(answers[name])} for name in files}


def source_of(item: Item, known: Collection[tuple] = ()) -> str:
    """Return what items of one question share: its text, and its id up to the length that built contexts name.

    Of rows with a `prompt` only, whose question is not known apart from it, the gold answers are in place of the text.

    Rows of NIAH-Plus' files may each have an id of their own: there it is task and answers. An id that stands in a task
    again has `#2` behind it, and so on (benchmarks/rows.py): it is the first one's, if `known` has the first one's key.
    """
    if item.benchmark == "niah_plus" and not item.evidence:  # contexts that are built here say where it is
        return hashlib.sha256(dump([item.task, item.question, item.answers])).hexdigest()[:16]
    name = item.id if item.length is None else item.id.rpartition(f"/{item.length}")[0] or item.id
    if (*item.key[:2], first := re.sub(r"#\d+$", "", name)) in known:
        name = first
    return hashlib.sha256(f"{name}\n{item.question or item.answers}".encode("utf-8", "replace")).hexdigest()[:16]


def read_answers(path: Path) -> dict[tuple[str, str, str], tuple[int, dict]]:
    """Return the answers of a file: (benchmark, task, id) -> line, from 1, and answer.

    Raises:
        DataError: No such file, a damaged line, or a question answered twice.
    """
    answers: dict[tuple, tuple[int, dict]] = {}
    for number, answer in stored_answers(path):
        key = tuple(answer_field(answer, name, path, number) for name in ("benchmark", "task", "id"))
        if key in answers:
            raise DataError(
                f"{path}:{number}: {'/'.join(key)} is answered a second time (first in line "
                f"{answers[key][0]}); delete one of the lines."
            )
        answers[key] = number, answer
    return answers


def stored_answers(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield the answers of a file, each with its line, from 1.

    A torn last line, which versions without a store (qa/store.py) may have left, is not an answer.

    Raises:
        DataError: No such file, or a damaged line.
    """
    with as_data_error(path, "read"), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip() and line.endswith(b"\n"):
                answer = parse_line(line, path, number)
                if "fingerprint" not in answer:
                    yield number, answer


def answer_field(answer: dict, name: str, path: Path, number: int) -> str:
    """Return a text that a line of answers must have.

    Raises:
        DataError: It has none.
    """
    value = answer.get(name)
    if not isinstance(value, str):
        raise DataError(
            f"{path}:{number}: `{name}` must be a text, got {value!r}; delete the line and start again, and should it "
            "come back, which it does from answers.db, with `--no-resume`, which asks all questions again."
        )
    return value


def _scored(item: Item, number: int, answer: dict, path: Path, prompt: str | None) -> dict:
    text, answered = (answer_field(answer, name, path, number) for name in ("text", "prompt_hash"))
    if answered != item.prompt_hash:
        raise DataError(
            f"{path}:{number}: {'/'.join(item.key)} was answered with another prompt (hash {answered}, now "
            f"{item.prompt_hash}); delete the file and ask again."
        )
    places = [(part["start"] + part["end"]) / 2 for part in item.evidence]
    return {
        "benchmark": item.benchmark, "task": item.task, "id": item.id, "empty": not text.strip(),
        **score_answer(item, text, prompt),
        **{name: answer.get(name) for name in ("prompt_tokens", "cut_tokens", "finish_reason")},
        **{name: answer[name] for name in ("server_tokens",) if name in answer},
        "length": item.length, "depth": item.depth, "groups": item.groups,
        "evidence_depth": 100 * sum(places) / len(places) / len(item.prompt) if places and item.prompt else None,
    }  # fmt: skip
