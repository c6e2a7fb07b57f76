"""Draw many answers at once with one key-value cache, each as if its call were alone."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from ..files import DataError
from ..recipe import Sampling
from .calls import Call, call_seed


@dataclass(eq=False)
class Job:
    """Hold a call under way: its prompt's ids, the tokens of an answer at most, and (text, finish reason) so far."""

    call: Call
    ids: list[int]
    limit: int
    answers: dict[int, tuple[str, str]] = field(default_factory=dict)  # by place in `call.ks`

    @property
    def tokens(self) -> int:
        """Return the tokens of prompt and answer at most."""
        return len(self.ids) + self.limit


Row = tuple[Job, int]  # an answer of a call: the call, and the answer's place in `ks`


class Noise:
    """Draw tokens from logits, with a generator for each call: what runs beside a call changes no draw.

    A step draws for all answers of a call, finished and left out ones too, exactly what `torch.multinomial` draws for
    the call alone after `torch.manual_seed`: it divides the probabilities by exponential noise and takes the largest.
    So answers are those of `generate(num_return_sequences=len(ks))`.
    """

    def __init__(self, sampling: Sampling, device: torch.device):
        """Begin anew, with the first draw of every call."""
        self.sampling, self.device, self.generators = sampling, device, dict[Job, torch.Generator]()
        self.warpers = LogitsProcessorList(
            [TemperatureLogitsWarper(sampling.temperature)] if sampling.temperature else []
        )
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))

    def choose(self, rows: list[Row], logits: torch.Tensor) -> torch.Tensor:
        """Return a token for each row, (rows,), from logits in fp32, (rows, vocabulary)."""
        if not self.sampling.temperature:
            return logits.argmax(-1)
        chances = self.warpers(None, logits).softmax(-1)  # type: ignore[arg-type]  # these look at no ids
        noise, places = torch.empty_like(chances), dict[Job, list[tuple[int, int]]]()
        for place, (job, i) in enumerate(rows):
            places.setdefault(job, []).append((place, i))
        for job, pairs in places.items():
            if job not in self.generators:
                seed = call_seed(self.sampling.seed, job.call)
                self.generators[job] = torch.Generator(self.device).manual_seed(seed)
            drawn = chances.new_empty(len(job.call.ks), chances.shape[1]).exponential_(generator=self.generators[job])
            here, there = torch.tensor(pairs, device=self.device).T
            noise[here] = drawn[there]
        return chances.div_(noise).argmax(-1)


@torch.inference_mode()
def decode(
    network: torch.nn.Module, rows: list[Row], noise: Noise, stop: set[int], pad: int
) -> Iterator[tuple[Row, list[int], bool]]:
    """Answer `rows` together, prompts padded on the left; each prompt is read once, whatever the number of its answers.

    Args:
        network: A causal language model of transformers, or an adapter over one.
        rows: Answers to be written; those that end leave the cache.
        noise: Draws the tokens.
        stop: Ids that end an answer.
        pad: Any id.

    Yields:
        A row, the ids of its answer without what ended it, and whether something did; as they end.

    Raises:
        FloatingPointError: The model computes NaN.
        DataError: It has no cache of keys and values.
    """
    takes = inspect.signature(getattr(network, "get_base_model", lambda: network)().forward).parameters
    jobs, device = list(dict.fromkeys(job for job, _ in rows)), noise.device
    ids, mask, lengths = _pad([job.ids for job in jobs], pad, device)

    def step(ids: torch.Tensor, positions: torch.Tensor, cache=None) -> tuple:
        options = {"position_ids": positions, "logits_to_keep": 1}
        options = {name: value for name, value in options.items() if name in takes}
        output = network(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **options)
        logits = output.logits[:, -1].float()
        if logits.isnan().any():  # of which the largest is token 0
            raise FloatingPointError
        if "past_key_values" not in output:
            raise DataError(
                f"{type(network).__name__} keeps no keys and values, without which `backend: transformers` does not "
                "answer; serve it and use `backend: openai`."
            )
        return output.past_key_values, logits

    cache, logits = step(ids, (mask.cumsum(1) - 1).clamp(min=0))
    keep = torch.tensor([jobs.index(job) for job, _ in rows], device=device)  # from prompts to answers
    cache.reorder_cache(keep)
    logits, mask, at = logits[keep], mask[keep], lengths[keep]
    written: dict[Row, list[int]] = {row: [] for row in rows}
    while True:
        tokens, going = noise.choose(rows, logits), []
        for place, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            if token not in stop:
                written[row].append(token)
            if token in stop or len(written[row]) == row[0].limit:
                yield row, written.pop(row), token in stop
            else:
                going.append(place)
        if not going:
            return
        if len(going) < len(rows):
            keep = torch.tensor(going, device=device)
            rows = [rows[place] for place in going]
            cache.reorder_cache(keep)
            tokens, mask, at = tokens[keep], mask[keep], at[keep]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        cache, logits = step(tokens[:, None], at[:, None], cache)
        at = at + 1


def _pad(prompts: list[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return prompts padded on the left, (prompts, longest), the mask of what is no padding, and their lengths."""
    lengths = torch.tensor([len(ids) for ids in prompts], device=device)
    width = int(lengths.max())
    ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=device)
    return ids, (torch.arange(width, device=device) >= width - lengths[:, None]).long(), lengths
