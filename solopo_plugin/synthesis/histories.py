"""Show rows of two conversations, a short and a long history with the same final turn, as rows of contexts are shown.

A turn is {"from", "value"} as in sharegpt's form, or {"role", "content"} and perhaps "tool_calls" as in openai's. The
evidence is what tools gave in the short history, or without tools what the user said before the last turn. Its source
is the call that it answers, unless the row says more: "origins", a list of {"source", "section", "quote"}, which
training does not read.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..qa.files import DataError, read_jsonl, shown
from ..qa.prompts import BETWEEN
from ..qa.rows import SCHEMA

COLUMNS = ("messages", "long_messages")
RESULTS, USERS = ("observation", "tool"), ("human", "user")


class Turn(NamedTuple):
    """Hold who speaks, and what is said or called."""

    role: str
    text: str


def is_history(path: Path) -> bool:
    """Return whether a file is one of JSON lines whose first one has two conversations."""
    return path.suffix == ".jsonl" and set(COLUMNS) <= next(read_jsonl(path), {}).keys()


def history_rows(path: Path) -> Iterator[dict]:
    """Yield the rows of a file in the form of an exported one, with the lengths in characters: no tokenizer is known.

    Raises:
        DataError: A row lacks a conversation or a response; the message says which row.
    """
    for number, row in enumerate(read_jsonl(path), 1):
        try:
            yield make_row(row, f"{path.stem}:{number}")
        except DataError as error:
            raise DataError(f"{path}, row {number}: {error}") from None


def make_row(row: dict, name: str) -> dict:
    """Return a row in the form of an exported one.

    Args:
        row: As in the file.
        name: What it is called if it has no `id`.
    """
    made: dict = dict.fromkeys(SCHEMA.names) | {"id": str(row.get("id", name)), "answers": [], "grades": None}
    turns = {side: _turns(row, column) for side, column in zip(("short", "long"), COLUMNS, strict=True)}
    said = [k for k, turn in enumerate(turns["short"]) if turn.role in RESULTS]
    said = said or [k for k, turn in enumerate(turns["short"][:-1]) if turn.role in USERS]
    wanted = [turns["short"][k] for k in said]
    for side, prompt in (("short", "prompt"), ("long", "long_prompt")):
        made[prompt], made[f"{side}_evidence"] = _lay_out(turns[side], wanted)
        made |= {f"{side}_tokens": len(made[prompt]), f"{side}_paragraphs": len(turns[side])}
    several = row["rejected"] if isinstance(row.get("rejected"), list) and row["rejected"] else None
    rejected = [_turn(turn, "rejected").text for turn in several or [row.get("rejected")]]
    made |= {"chosen": _turn(row.get("chosen"), "chosen").text, "rejected": rejected[0]}
    made |= {"chosen_tokens": len(made["chosen"]), "rejected_tokens": len(rejected[0])}
    made |= {"all_rejected": rejected} if several else {}
    made["question"] = next((turn.text for turn in reversed(turns["short"]) if turn.role in USERS), "")
    derived = [{"source": _source(turns["short"], k), "quote": turns["short"][k].text} for k in said]
    origins = row.get("origins") or derived
    if not isinstance(origins, list) or not all(isinstance(origin, dict) for origin in origins):
        raise DataError(f"`origins` must be a list of objects, got {shown(origins)}.")
    return made | {"origins": origins}


def _turns(row: dict, column: str) -> list[Turn]:
    if not isinstance(row.get(column), list) or not row[column]:
        raise DataError(f"`{column}` must be a list of turns, got {shown(row.get(column))}.")
    return [_turn(turn, column) for turn in row[column]]


def _turn(turn: object, column: str) -> Turn:
    """Return a turn of either form; a call in words, such as `look_up(person: Ada)`."""
    if isinstance(turn, dict):
        role, text, calls = turn.get("from", turn.get("role")), turn.get("value", turn.get("content")), None
        if role == "function_call":
            calls = text
        elif turn.get("tool_calls"):
            calls = [call.get("function", call) for call in turn["tool_calls"] if isinstance(call, dict)]
        if isinstance(role, str) and (calls or isinstance(text, str)):
            return Turn(role, _called(calls) if calls else str(text))
    raise DataError(f'`{column}` must hold {{"from", "value"}} or {{"role", "content"}}, got {shown(turn)}.')


def _called(calls: Any) -> str:
    """Return calls in words; as they are where they cannot be read."""
    try:
        found = json.loads(calls) if isinstance(calls, str) else calls
        words = []
        for call in found if isinstance(found, list) else [found]:
            given = call["arguments"]
            given = json.loads(given) if isinstance(given, str) else given
            words.append(f"{call['name']}({', '.join(f'{name}: {value}' for name, value in given.items())})")
        return ", ".join(words)
    except (ValueError, KeyError, TypeError, AttributeError):
        return str(calls)


def _lay_out(turns: list[Turn], wanted: list[Turn]) -> tuple[str, list[dict]]:
    """Return a conversation as text, and where in it those of the wanted turns are that it has, in their order."""
    parts: list[str] = []
    places: list[dict] = []
    at = 0
    for number, turn in enumerate(turns, 1):
        parts.append(f"{turn.role}: {turn.text}")
        end = at + len(parts[-1])
        if len(places) < len(wanted) and turn == wanted[len(places)]:
            places.append({"paragraph": number, "start": end - len(turn.text), "end": end})
        at = end + len(BETWEEN)
    return BETWEEN.join(parts), places


def _source(turns: list[Turn], k: int) -> str:
    """Return the call behind which a result stands, or which turn it is."""
    called = turns[k].role in RESULTS and k and turns[k - 1].role not in (*RESULTS, *USERS)
    return turns[k - 1].text if called else f"turn {k + 1}, {turns[k].role}"
