"""Draw the lab's first task: pairs `key value key value ...`, then `? key`; the answer is that key's value.

A short context holds the asked pair among a few others, a long one the same pairs scattered among many more. A word is
a token: keys are syllables, values numbers, each of 126. Text and token ids say the same, and with the host's template
`empty`, which writes nothing around prompt and response, so do a row of a recipe and a row of tensors here.

Suffixes: `_B` questions, `_BT` token ids of their prompts.
"""

from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "data/lab/base"
N = 126  # keys, and values
ONSETS = "b c d f g h j k l m n p r s t v w x z br cr dr fr gr kr pl pr sl sp st tr vr".split()
SPECIAL = ["<|endoftext|>", "<pad>", "<unk>", "?"]
WORDS = SPECIAL + [onset + vowel for onset in ONSETS for vowel in "aeio"][:N] + [str(i) for i in range(N)]
ASK, KEY, VALUE = SPECIAL.index("?"), len(SPECIAL), len(SPECIAL) + N  # ids: the mark, first key, first value
SHORT, LONG = 8, 100  # pairs in a context of the experiments
LENGTHS = (4, 8, 16, 32, 48, 64, 80, 100, 120)  # pairs at which accuracy is measured
MEASURED = (SHORT, 32, 64, LONG, 120)  # the same, of the many runs of the comparison


def questions(n: int, short: int, long: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw `n` questions with `short` pairs in the short and `long` pairs, those among them, in the long context.

    Returns:
        Short prompts (B, 2 * short + 2), long prompts (B, 2 * long + 2) with the pairs in an order of their own, the
        right values (B,) and wrong ones (B,): another value of the short context.
    """
    keys = torch.rand(n, N, generator=generator).argsort(1)[:, :long]
    values = torch.rand(n, N, generator=generator).argsort(1)[:, :long]
    asked = torch.randint(0, short, (n, 1), generator=generator)
    other = (asked + torch.randint(1, short, (n, 1), generator=generator)) % short
    order = torch.rand(n, long, generator=generator).argsort(1)
    question = torch.cat([torch.full((n, 1), ASK), KEY + keys.gather(1, asked)], 1)

    def prompt(keys, values):
        return torch.cat([torch.stack([KEY + keys, VALUE + values], -1).flatten(1), question], 1)

    short_BT = prompt(keys[:, :short], values[:, :short])
    long_BT = prompt(keys.gather(1, order), values.gather(1, order))
    right_B, wrong_B = (VALUE + values.gather(1, i)[:, 0] for i in (asked, other))
    return short_BT, long_BT, right_B, wrong_B


def text(ids: Tensor) -> str:
    """Return the words of token ids, with spaces between."""
    return " ".join(WORDS[i] for i in ids.reshape(-1).tolist())


COLUMNS = ("prompt", "long_prompt", "chosen", "rejected")


def as_rows(*drawn: Tensor) -> list[dict]:
    """Write short prompts, long prompts, chosen and rejected values out as rows of text."""
    return [dict(zip(COLUMNS, map(text, row), strict=True)) for row in zip(*drawn, strict=True)]


def rows(n: int, seed: int, short: int = SHORT, long: int = LONG) -> list[dict]:
    """Draw `n` preference rows of the experiments, in the columns of `stage: solopo`."""
    return as_rows(*questions(n, short, long, torch.Generator().manual_seed(seed)))


QUESTIONS = 2**20  # seed of the questions that are reported, which no training rows have
CHOOSING = 2**21  # of those by which settings are chosen


@torch.inference_mode()
def accuracy(model, pairs: int, n: int = 512, seed: int = QUESTIONS) -> float:
    """Measure the share of `n` questions over `pairs` pairs whose right value is the model's first choice of all words.

    The questions of a length and seed are the same for every model.
    """
    _, long_BT, right_B, _ = questions(n, min(SHORT, pairs), pairs, torch.Generator().manual_seed(seed + pairs))
    model.eval()
    found = [model(ids, logits_to_keep=1).logits[:, -1].argmax(-1) for ids in long_BT.split(64)]
    return (torch.cat(found) == right_B).float().mean().item()


def profile(model, lengths=LENGTHS, n: int = 512, seed: int = QUESTIONS) -> dict[int, float]:
    """Measure accuracy by number of pairs."""
    return {pairs: round(accuracy(model, pairs, n, seed), 4) for pairs in lengths}
