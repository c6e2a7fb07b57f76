"""One packed row: the sequences of a micro-batch without padding, a shared prompt once. Pure layout, no model.

    per sample  [x_s y_w | y_l | x_l y_w]      `| y_l` once more, behind x_l, for `solopo_align_on: both`

Of several rejected responses each is a `| y_l`: prompts and chosen response stand once for all of them.

A segment's tokens attend to the segment itself and, for a `y_l`, to its prompt; positions restart with every prompt and
continue from it. The prompt's last position predicts the first token of each response behind it.

Shape suffixes: B samples, P pairs (data.py), T tokens of the row, K scored tokens, N scored spans (responses; for
LongPO also sequences).
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch

from .data import known_of, rejected_of

Group = tuple[Sequence[int], Sequence[Sequence[int]]]  # a prompt and the responses behind it, token ids
LONG = 6144  # tokens from which a segment may be attended to apart; ours: on an H200 4,352 were slower so, 8,448 faster


@dataclass(frozen=True)
class Segment:
    """Name consecutive queries and all the keys that they may see; causal, the last query sees the last key."""

    query: tuple[int, int]  # first position in the row, and the one after the last
    keys: tuple[tuple[int, int], ...]  # such pairs in reading order; the last is `query` itself


class Plan:
    """Carry a row's segments through the model's keyword arguments, and count in `calls` the layers that used them.

    The decoder's call begins the count and refuses a model in which a layer attended otherwise (attention.py). It is no
    dataclass: FSDP2 copies those for each layer when it casts inputs, and a layer would count on its own copy.
    """

    def __init__(self, segments: tuple[Segment, ...], part=None):
        self.segments, self.calls = segments, 0
        self.part = part  # of this rank, where several share the row: sequence_parallel.py's `Part`
        self._layouts: dict[torch.device, Layout] = {}

    def layout(self, device: torch.device) -> "Layout":
        """Return the segments as kernels take them; made once per row and device, not once per layer."""
        if device not in self._layouts:
            self._layouts[device] = Layout.of(self.segments, device)
        return self._layouts[device]


@dataclass(frozen=True)
class Layout:
    """Give segments as attention kernels take them: lengths, and keys as pieces of the row."""

    queries: tuple[int, ...]  # tokens of each segment; together they are the row, in order
    pieces: tuple[int, ...]  # lengths of consecutive pieces of the row, between which keys are parted
    keys: tuple[tuple[int, ...], ...]  # which pieces each segment's are; a shared prompt's come once per response
    cu_queries: torch.Tensor  # lengths of queries added up, from 0: (segments + 1,), int32, on the device
    cu_keys: torch.Tensor  # those of keys
    longest_queries: int  # of one segment
    longest_keys: int

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device) -> "Layout":
        """Cut the row where any segment's keys begin or end."""
        cuts = sorted({place for segment in segments for part in segment.keys for place in part})
        pieces = list(pairwise(cuts))
        keys = tuple(
            tuple(i for a, b in segment.keys for i, (c, d) in enumerate(pieces) if a <= c and d <= b)
            for segment in segments
        )
        queries = tuple(b - a for a, b in (segment.query for segment in segments))
        return cls._counted(queries, tuple(d - c for c, d in pieces), keys, device)

    @classmethod
    def _counted(cls, queries, pieces, keys, device) -> "Layout":
        seen = tuple(sum(pieces[i] for i in own) for own in keys)
        cu_queries, cu_keys = (torch.tensor([0, *accumulate(n)], dtype=torch.int32).to(device) for n in (queries, seen))
        return cls(queries, pieces, keys, cu_queries, cu_keys, max(queries, default=0), max(seen, default=0))

    @cached_property
    def parted(self) -> tuple[tuple[int, ...], "Layout"]:
        """Return which segments are `LONG` and see themselves alone, by their number, and the layout of all others.

        The others' keys are pieces of the whole row, their queries those of their own alone.
        """
        alone = (sum(self.pieces[i] for i in own) == n for n, own in zip(self.queries, self.keys, strict=True))
        long = tuple(i for i, (n, own) in enumerate(zip(self.queries, alone, strict=True)) if own and n >= LONG)
        queries, keys = (tuple(x for i, x in enumerate(of) if i not in long) for of in (self.queries, self.keys))
        return long, self._counted(queries, self.pieces, keys, self.cu_queries.device)


def pack(groups: Sequence[Group], score_sequences: bool = False) -> dict:
    """Lay groups out as one row.

    Args:
        groups: At least one token per prompt and response.
        score_sequences: Before a group's responses, score the whole of its prompt and first response, from the second
            token on, as a span of its own (LongPO's NLL).

    Returns:
        `input_ids`, `position_ids`: shape (1, T). `positions_K`: where logits are needed, `targets_K`: the token that
        each predicts; both span after span. `counts_N`: tokens per span, `counts`: the same as a list. `plan`: the
        segments.
    """
    ids: list[int] = []
    places: list[int] = []
    positions, targets, counts, segments = [], [], [], []

    def score(predictors, tokens):
        positions.extend(predictors)
        targets.extend(tokens)
        counts.append(len(tokens))

    for prompt, responses in groups:
        start, behind = len(ids), len(ids) + len(prompt)
        ids.extend(prompt)
        places.extend(range(len(prompt)))
        if score_sequences:
            sequence = [*prompt, *responses[0]]
            score(range(start, start + len(sequence) - 1), sequence[1:])
        for i, response in enumerate(responses):
            first, end = len(ids), len(ids) + len(response)
            ids.extend(response)
            places.extend(range(len(prompt), len(prompt) + len(response)))
            alone = Segment((first, end), ((start, behind), (first, end)))
            segments.append(alone if i else Segment((start, end), ((start, end),)))
            score([behind - 1, *range(first, end - 1)], response)
    row = {"input_ids": [ids], "position_ids": [places], "positions_K": positions, "targets_K": targets}
    tensors = {name: torch.tensor(numbers) for name, numbers in (row | {"counts_N": counts}).items()}
    return tensors | {"counts": counts, "plan": Plan(tuple(segments))}


def logits_of(row: dict, sides: Sequence[Sequence[tuple[int, ...]]]) -> dict:
    """Return which of the row's logits some responses have, each once, though several pairs have a chosen one.

    Args:
        row: From `pack`.
        sides: Per kind of response and pair: its span or, to be compared, those behind the short and the long prompt.
            Where these are one, nothing is taken.

    Returns:
        `rows`: per place in those tuples the rows of logits, response after response, `counts`: their number in each.
        `responses_SP`: which of these responses a pair has, shape (kinds, P).
    """
    ends, responses = [*accumulate(row["counts"])], [*dict.fromkeys(spans for side in sides for spans in side)]
    counts = [row["counts"][spans[0]] if len({*spans}) == len(spans) else 0 for spans in responses]
    taken = [spans for spans, count in zip(responses, counts, strict=True) if count]
    rows: list[list[int]] = [[] for _ in responses[0]]
    for spans in taken:
        for of_place, n in zip(rows, spans, strict=True):
            of_place.extend(range(ends[n] - row["counts"][n], ends[n]))
    which = [[responses.index(spans) for spans in side] for side in sides]
    places = [torch.tensor(of_place, dtype=torch.long) for of_place in rows]
    return {"rows": places, "counts": counts, "responses_SP": torch.tensor(which)}


@dataclass(kw_only=True)
class PackedCollator:
    """Make one batch from rows: `policy`, a packed row with `spans`; the rest: see `known_of`.

    Where a reference has to be run, `reference`: its packed row.

    `spans`: name of a log-prob -> which of the row's spans it is, shape (P,): the chosen response's span is that of all
    of a sample's pairs. A sample whose long prompt is its short one has no long part; its long spans are its short
    ones, so that the gap is exactly 0 and nothing is paid for it. `distilled`, `anchored`: see `logits_of`.
    """

    longpo: bool = False
    long_pair: bool = False  # score the rejected response behind the long prompt too
    reference: bool = True  # the loss has one
    distill: bool = False  # the aligned responses' distributions are compared
    anchor: bool = False  # those given the short prompt are compared with the reference's

    def __call__(self, features: list[dict]) -> dict:
        """Return the batch."""
        known = known_of(features)
        if self.reference and "reference_P2" not in known:
            known |= self.short_pair(features)
        policy = self._pack(features, "long", sequences=True) if self.longpo else self._pack(features, "short", "long")
        return known | {"policy": policy}

    def short_pair(self, features: list[dict]) -> dict:
        """Return all that a reference is shown."""
        return {"reference": self._pack(features, "short")}

    def _pack(self, features: list[dict], *sides: str, sequences: bool = False) -> dict:
        """Pack pairs behind prompts of a side and, where there is another, what is aligned behind those of that one."""
        groups: list[Group] = []
        spans: dict[str, list[int]] = defaultdict(list)
        n = first = 0
        for f in features:
            responses = [f["chosen_ids"], *rejected_of(f)]
            for prefix, side in zip(("", "long_"), sides, strict=False):
                shown = responses if self.long_pair or not prefix else responses[:1]
                if not prefix or not f["long_is_short"]:
                    groups.append((f[f"{side}_prompt_ids"], shown))
                    first, n = n + sequences, n + sequences + len(shown)
                for m in range(1, len(responses)):  # the pairs
                    spans[f"{prefix}chosen"].append(first)
                    if len(shown) > 1:
                        spans[f"{prefix}rejected"].append(first + m)
                    if sequences:
                        spans["sequence"].append(first - 1)
        row = pack(groups, sequences) | {"spans": {name: torch.tensor(numbers) for name, numbers in spans.items()}}
        aligned = ("chosen", "rejected") if self.long_pair else ("chosen",)
        if self.distill and len(sides) > 1:
            row["distilled"] = logits_of(row, [[*zip(spans[s], spans[f"long_{s}"], strict=True)] for s in aligned])
        if self.anchor:
            row["anchored"] = logits_of(row, [[(span,) for span in spans[side]] for side in aligned])
        return row
