"""Answer calls through a store: what it has is kept, and only what it lacks is asked for."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing

from tqdm import tqdm

from ..files import DataError
from ..prompts import prompt_hash
from ..recipe import Sampling
from ..store import Store
from . import generate
from .calls import Call, Model, Reply

log = logging.getLogger(__name__)
Found = dict[tuple[str, int], int]  # question and number of the answer -> its place in the store
Value = dict[str, str | int | None]
STOP_AFTER = 64  # replies of which not one can be read, after which no more are asked for; ours


def answer_missing(
    store: Store, name: str, settings: dict, calls: Callable[[], Iterable[Call]], sampling: Sampling, model: Model,
    size: int | None = None, desc: str | None = None, see: Callable[[Reply], None] = lambda reply: None,
) -> Found:  # fmt: skip
    """Ask for the answers that a store lacks; returns the places of all, each of which is in the store on arrival.

    Args:
        store: Where the answers are and go.
        name: Of the set of answers in the store.
        settings: All on which the answers depend but their prompts.
        calls: Yields all calls, each with all of its answers; it is called twice, and streams what is large.
        sampling: How the answers are drawn.
        model: What answers.
        size: Answers asked for in one call; None: all of a prompt, and 8 with `transformers`.
        desc: What the progress bar is called; None: `name`.
        see: Is shown every reply.

    Raises:
        DataError: An answer is still missing at the end, or what `generate` raises.
    """
    before, set_id = store.last_used(name), store.set_of(name, settings)
    hashes, numbers = {}, {}
    for call in calls():
        hashes[call.id], numbers[call.id] = prompt_hash(call.prompt), call.ks
    found, others = store.find(set_id, hashes)
    if not found and (others or (before and before[1] != settings and store.find(before[0], {})[0])):
        log.warning(f"{store.path} holds answers to other prompts or settings; sampling begins anew, they are kept.")
    total = sum(map(len, numbers.values()))
    have = sum((id, k) in found for id, ks in numbers.items() for k in ks)
    if have == total:
        return found
    size = size or (8 if sampling.backend == "transformers" else max(map(len, numbers.values())))
    asked = closing(generate(sampling, model, _missing(calls(), size, found)))  # a failure here ends what is under way
    with tqdm(total=total, initial=have, unit=" answers", desc=desc or name) as bar, asked as replies:
        for reply in of_one_model(replies, store, set_id, model):
            store.add(set_id, reply_rows(reply, hashes))
            bar.update(len(reply.ks))
            see(reply)
    found = store.find(set_id, hashes)[0]
    for id, ks in numbers.items():
        if lacking := sum((id, k) not in found for k in ks):
            raise DataError(f"{store.path}: question {id} lacks {lacking} answers; start the stage again.")
    return found


def of_one_model(replies: Iterable[Reply], store: Store, set_id: int, model: Model) -> Iterator[Reply]:
    """Yield replies; refuse them where another model of the server has given the answers that are there.

    Raises:
        DataError: The server had another model under its address before, and no key says which one is meant.
    """
    known = None
    for reply in replies:
        if reply.served not in (None, known):  # a server is asked for its name once: this is looked at once
            known, kept = reply.served, store.keep_served(set_id, reply.served)
            if kept != known:
                before, now = kept or model.name, known or model.name
                raise DataError(
                    f"{store.path}: the answers so far are those of the server's model {before}, and it now has {now}; "
                    f"serve {before} again, or set `{model.served_key}: {now}`, with which all answers are asked for "
                    "anew."
                )
        yield reply


def reply_rows(reply: Reply, hashes: dict[str, str]) -> Iterator[tuple[str, int, str, Value]]:
    """Yield the answers of a reply as the store has them, with the hash of their prompt by question."""
    for k, (text, finish_reason) in zip(reply.ks, reply.answers, strict=True):
        value: Value = {"text": text, "finish_reason": finish_reason, "prompt_tokens": reply.prompt_tokens}
        yield reply.id, k, hashes[reply.id], value


def _missing(calls: Iterable[Call], size: int, found: Found) -> Iterator[Call]:
    """Yield what is still to be asked: whole groups of `size` answers, single ones where some are there."""
    for call in calls:
        for first in range(0, len(call.ks), size):
            group = call.ks[first : first + size]
            missing = tuple(k for k in group if (call.id, k) not in found)
            if missing == group:
                yield call._replace(ks=group)
            else:
                yield from (call._replace(ks=(k,)) for k in missing)


class StopUnreadable:
    """Stop asking a model of whose first `STOP_AFTER` replies not one can be read; its `see` is shown each of them."""

    def __init__(self, readable: Callable[[str, str], bool], sentence: Callable[[int, str], str]):
        """Keep how it is told, by question and text, and what is said, of how many replies and with the last one."""
        self.readable, self.sentence, self.seen, self.good = readable, sentence, 0, False

    def see(self, reply: Reply) -> None:
        """Look at a reply.

        Raises:
            DataError: The sentence.
        """
        for text, _ in () if self.good else reply.answers:
            self.seen += 1
            self.good = self.good or self.readable(reply.id, text)
        if self.seen >= STOP_AFTER and not self.good:
            raise DataError(self.sentence(self.seen, text))
