"""A row of the data set on its way to the model: checked, tokenised, batched. Nothing of LLaMA-Factory is imported.

A tokenised row holds `short_prompt_ids`, `long_prompt_ids`, `chosen_ids`, `rejected_ids` (the response's tokens, the
same behind either prompt), `long_is_short` (its two prompts are equal) and `name`, by which messages call it:
`<dataset>[<index>]`. Several rejected responses stand one behind another in `rejected_ids`, `BETWEEN` between them, so
that rows with one have the columns, and the caches and files, that they always had.

A pair is the chosen and one rejected response. Shape suffixes: B rows, P pairs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, combinations, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from pyarrow.compute import list_value_length

from .distill import load_top
from .logps import IGNORE
from .qa.files import excerpt

REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")  # columns that reference.py adds, as the loss has them
ANCHOR_FILES = "anchor_files"  # column that reference.py adds for `solopo_anchor`: each pair's `distill.Top`
RESPONSES = ("chosen", "rejected")
PARTS = ("short_prompt", "long_prompt", *RESPONSES)
BETWEEN = -1  # no token's id
COLUMNS = ("name", "long_is_short", "short_prompt_ids", "long_prompt_ids", "chosen_ids", "rejected_ids")


class RowError(ValueError):
    """Say of a row that it cannot be trained on; the message names data set, row, column and what to do."""


def data_sets(train, evaluated) -> dict[tuple[str, str], Any]:
    """Return training and evaluation sets by ("train" or "eval", name), whatever their nesting, without those None.

    A set is what the host gives: a `datasets.Dataset` or, of a stream, an `IterableDataset`.
    """
    evaluated = evaluated if isinstance(evaluated, dict) else {"": evaluated}
    sets = {("train", ""): train} | {("eval", name): split for name, split in evaluated.items()}
    return {key: split for key, split in sets.items() if split is not None}


def expect(good: bool, what: str, needed: str, value: object) -> None:
    """Refuse a value of a row that is not what is needed; `what` says row, column and turn."""
    if not good:
        hint = "; dates in JSON lines load as times: save the file as a .json array" * hasattr(value, "isoformat")
        raise RowError(f"{what} must be {needed}, got {type(value).__name__} {str(value)[:60]!r}{hint}.")


def check_text(name: str, column: str, value: Any, turn: str = "", blank: bool = False) -> None:
    """Refuse a text that is missing, not a string, or blank where `blank` does not accept that.

    `turn` begins the message where the column is a conversation: "turn 2 (`human`) of ".
    """
    expect(isinstance(value, str), f"{name}: {turn}column `{column}`", "a string", value)
    if not blank and not value.strip():
        raise RowError(f"{name}: {turn}column `{column}` is empty; give it a text or remove the row.")


class Aligned(NamedTuple):
    """Hold one row as the host's converters align it: messages, with the text of each under `content`."""

    name: str  # of the row, for messages
    prompt: list[dict]  # up to the last question, with the short context
    long_prompt: list[dict]  # the same with the long one
    response: list[dict]  # the chosen message and the rejected ones
    system: str | None  # before the short context
    long_system: str | None  # before the long one
    tools: str | None  # descriptions of functions as JSON text


# messages, system, tools -> ids of the templated prompt and of the last message (the response)
Encode = Callable[[list[dict], str | None, str | None], tuple[list[int], list[int]]]


def build_row(aligned: Aligned, encode: Encode, markers: list[str]) -> dict:
    """Tokenise one row; the chat template is applied here and nowhere else.

    `markers`: texts that only the template may write, the BOS token (which so comes at most once), the EOS token and
    the stop words that end its turns.

    Raises:
        RowError: Equal or empty responses, a template inside the text, responses that tokenise differently behind the
            long prompt, prompts that tokenise differently before the two responses, or what a template cannot write.
    """
    name = aligned.name
    _refuse_markers(aligned, markers)
    prompts: dict[str, list[int]] = {}
    responses: dict[str, list[int]] = {}
    for side, which, prompt_ids, response_ids in _encoded(aligned, encode):
        if None in prompt_ids or None in response_ids:
            raise RowError(f"{name}: the template writes a token that the tokenizer lacks; check `template`.")
        if responses.setdefault(which, response_ids) != response_ids:
            raise RowError(
                f"{name}: `{which}` tokenises differently behind the short and the long prompt; check `template`."
            )
        if prompts.setdefault(f"{side}_prompt_ids", prompt_ids) != prompt_ids:
            raise RowError(
                f"{name}: the template writes one {side} prompt before `chosen` and another before `rejected`, as "
                "where only one of them has a thought; set `enable_thinking: true`, or give both a thought or none."
            )
    refuse_equal(name, responses, "`{}` and `{}` are the same tokens")
    _, empty_ids = encode([{"role": "user", "content": "-"}, {"role": "assistant", "content": ""}], "", "")
    for which, response_ids in responses.items():
        if response_ids == empty_ids:
            raise RowError(
                f"{name}: nothing is left of `{which}` in the template (`enable_thinking: false` removes thoughts); "
                "give it a text or remove the row."
            )
    chosen, *rejected = responses.values()
    ids = prompts | {"chosen_ids": chosen, "rejected_ids": [i for part in rejected for i in (BETWEEN, *part)][1:]}
    return {"name": name, "long_is_short": ids["short_prompt_ids"] == ids["long_prompt_ids"], **ids}


def refuse_equal(name: str, responses: dict[str, Any], said: str) -> None:
    """Refuse a row two of whose responses are equal; what is `said` has room for what both are called."""
    for (one, first), (other, second) in combinations(responses.items(), 2):
        if first == second:
            remove = "the row" if len(responses) == 2 else "one"
            raise RowError(f"{name}: {said.format(one, other)}; remove {remove}.")


def rejected_of(row: dict) -> list[list[int]]:
    """Return the tokens of each rejected response of a tokenised row."""
    ids = row["rejected_ids"]
    ends = [-1, *(i for i, token in enumerate(ids) if token == BETWEEN), len(ids)]
    return [ids[a + 1 : b] for a, b in pairwise(ends)]


def pairs_of(row: dict) -> list[dict]:
    """Return the pairs of a tokenised row, each as a row with one rejected response."""
    return [row | {"rejected_ids": ids} for ids in rejected_of(row)]


def _refuse_markers(aligned: Aligned, markers: list[str]) -> None:
    """Refuse a text of the row that holds what only the template may write."""
    messages = [*aligned.prompt, *aligned.long_prompt, *aligned.response]
    for text in [aligned.system, aligned.long_system, aligned.tools, *(message["content"] for message in messages)]:
        for marker in markers:
            if text and marker in text:
                raise RowError(
                    f"{aligned.name}: the text contains {marker!r}, a BOS or stop token that only the template may "
                    "write; give plain text."
                )


def _encoded(aligned: Aligned, encode: Encode) -> Iterator[tuple[str, str, list[int], list[int]]]:
    """Yield `short` or `long`, `chosen` or `rejected`, and the ids of that prompt and that response, of all."""
    n = len(aligned.response)
    names = RESPONSES if n == 2 else ("chosen", *(f"rejected[{m}]" for m in range(n - 1)))
    sides = (("short", aligned.prompt, aligned.system), ("long", aligned.long_prompt, aligned.long_system))
    for side, prompt, system in sides:
        for which, response in zip(names, aligned.response, strict=True):
            try:
                prompt_ids, response_ids = encode([*prompt, response], system, aligned.tools)
            except Exception as error:  # whatever the template's code raises at a function call that it cannot read
                what = f"{type(error).__name__} {excerpt(error, 200)}"
                place = _unwritable(encode, side, prompt, which, response)
                raise RowError(
                    f"{aligned.name}: the template cannot write {place}: {what}; "
                    "a call is a JSON object with `name` and `arguments`, `tools` a JSON list of functions."
                ) from error
            yield side, which, prompt_ids, response_ids


def _unwritable(encode: Encode, side: str, prompt: list[dict], which: str, response: dict) -> str:
    """Find where in a row the template fails, one turn after the other; the tools are what is left."""
    places = [f"turn {n} ({turn['role']}) of the {side} prompt" for n, turn in enumerate(prompt, 1)]
    for turn, place in zip([*prompt, response], [*places, f"`{which}`"], strict=True):
        try:
            encode([turn], "", "")
        except Exception:
            return place
    return "`tools`"


def row_length(row: dict) -> int:
    """Return the tokens of the row's longest sequence, whatever the objective, so that all train on the same rows."""
    prompt = max(len(row["short_prompt_ids"]), len(row["long_prompt_ids"]))
    return prompt + max(map(len, (row["chosen_ids"], *rejected_of(row))))


def fits(row: dict, cutoff_len: int, overlength: str) -> bool:
    """Return whether a row is within `cutoff_len` tokens; where it is not, `overlength: error` raises."""
    length = row_length(row)
    if length > cutoff_len and overlength == "error":
        raise RowError(
            f"{row['name']}: prompt + response have {length} tokens and `cutoff_len` is {cutoff_len}; "
            "raise `cutoff_len`, shorten the row, or set `solopo_overlength: drop`. Rows are never truncated."
        )
    return length <= cutoff_len


def part_lengths(dataset) -> dict[str, np.ndarray]:
    """Return the tokens of each of the `PARTS`, and how many `pairs`: (N rows,) each, in the order of the data set."""
    # a data set may be a share of its table
    rows = slice(None) if dataset._indices is None else dataset._indices.column(0).to_numpy()
    n = {part: list_value_length(dataset.data.column(f"{part}_ids")).to_numpy() for part in PARTS}
    ids = np.concatenate([chunk.flatten().to_numpy() for chunk in dataset.data.column("rejected_ids").chunks])
    more = np.add.reduceat(ids == BETWEEN, np.cumsum(n["rejected"]) - n["rejected"], dtype=int)
    n |= {"rejected": n["rejected"] - more, "pairs": 1 + more}
    return {name: of_rows[rows] for name, of_rows in n.items()}


def trained_on(train, held_out) -> list[str]:
    """Name the rows held out that are rows of training too, by all their tokens; of others no more than lengths."""
    lengths = [[*zip(*part_lengths(rows).values(), strict=True)] for rows in (train, held_out)]
    both, names = {*lengths[0]}.intersection(lengths[1]), []
    for rows, of_rows in zip((train, held_out), lengths, strict=True):
        alike = rows.select([i for i, n in enumerate(of_rows) if n in both])
        names.append({hash(str(row | {"name": ""})): row["name"] for row in alike})
    return [names[1][key] for key in names[0].keys() & names[1].keys()]


def step_lengths(dataset, longpo: bool, long_pair: bool) -> list[int]:
    """Return the tokens that a packed step runs of each row, by which `group_by_length` groups in either form."""
    n = part_lengths(dataset)
    short = n["short_prompt"] + n["chosen"] + n["rejected"]
    long = n["long_prompt"] + n["chosen"] + (n["rejected"] if long_pair else 0)
    return (long if longpo else short + np.where(dataset["long_is_short"], 0, long)).tolist()


def known_of(features: list[dict]) -> dict:
    """Return what a batch says of its rows in either form.

    `long_is_short_B`, `names`; where some row has several, `pairs`: how many each has; where the rows have the columns
    `REFERENCE`, `reference_P2`: the reference's log-probs of chosen and rejected; where they have `ANCHOR_FILES`,
    `anchor`: what makes a `distill.Top` of the anchored responses.
    """
    known: dict = {"long_is_short_B": torch.tensor([f["long_is_short"] for f in features])}
    if REFERENCE[0] in features[0]:
        sides = [[*chain.from_iterable(f[column] for f in features)] for column in REFERENCE]
        known["reference_P2"] = torch.tensor(sides).T
    if ANCHOR_FILES in features[0]:  # the chosen responses, each once, then the rejected ones, where these are anchored
        tops = [(len(f["chosen_ids"]), [load_top(path) for path in f[ANCHOR_FILES]]) for f in features]
        parts = [[x[:n] for x in of_row[0]] for n, of_row in tops]
        parts += [[x[n:] for x in top] for n, of_row in tops for top in of_row]
        known["anchor"] = [torch.cat(x) for x in zip(*parts, strict=True)]
    if any(BETWEEN in f["rejected_ids"] for f in features):
        known["pairs"] = [len(rejected_of(f)) for f in features]
    return known | {"names": [f["name"] for f in features]}


@dataclass
class SoloCollator:
    """Make one batch of right-padded tensors from rows.

    `input_ids`, `attention_mask`, `labels`: the short pairs, all chosen, then all rejected (2P, T), padded to a
    multiple of 8, as the host's pairwise collator gives it. `long_*`: the long prompt with the chosen responses
    (B, T'), or with chosen, then rejected (B + P, T') where `long_pair`. `longpo` is there where the policy is
    shown these alone. The rest: see `known_of`.
    """

    pad_token_id: int
    long_pair: bool = False
    longpo: bool = False

    def __call__(self, features: list[dict]) -> dict:
        """Return the batch."""
        pairs = [pair for row in features for pair in pairs_of(row)]
        long = _sequences(features, "long", "chosen") + _sequences(pairs, "long", "rejected") * self.long_pair
        padded = {f"long_{name}": tensor for name, tensor in self._pad(long, multiple=1).items()}
        return self.short_pair(pairs) | padded | known_of(features) | ({"longpo": True} if self.longpo else {})

    def short_pair(self, pairs: list[dict]) -> dict:
        """Return all that a reference is shown of rows with one rejected response each."""
        sequences = (_sequences(pairs, "short", response) for response in RESPONSES)
        return self._pad([*chain(*sequences)], multiple=8)

    def _pad(self, sequences: list[tuple[list[int], list[int]]], multiple: int) -> dict[str, torch.Tensor]:
        width = max(len(prompt) + len(response) for prompt, response in sequences)
        width = -(-width // multiple) * multiple

        def padded(ids: list[int], with_id: int) -> list[int]:
            return ids + [with_id] * (width - len(ids))

        batch = {
            "input_ids": [padded(prompt + response, self.pad_token_id) for prompt, response in sequences],
            "attention_mask": [padded([1] * len(prompt + response), 0) for prompt, response in sequences],
            "labels": [padded([IGNORE] * len(prompt) + response, IGNORE) for prompt, response in sequences],
        }
        return {name: torch.tensor(ids) for name, ids in batch.items()}


def _sequences(features: list[dict], side: str, response: str) -> list[tuple[list[int], list[int]]]:
    return [(f[f"{side}_prompt_ids"], f[f"{response}_ids"]) for f in features]
