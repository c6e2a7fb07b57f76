"""Make all data sets of a seed of the first task: those of `make_rows`, sampled pairs, other lengths, lost evidence.

Rows of `recall_long_po` and the rejected responses of `recall_longpo` are sampled from the base on the long context, 32
answers at temperature 0.85 as in the paper: a question whose answers are all right or all wrong is left out, and others
are drawn for it.

Rows of `recall_solopo_rejected_N` are those of `recall_solopo` with N rejected values of the short context, the same
one first.
"""

import json
import random
from pathlib import Path

import torch
from arms import table
from make_rows import RESPONSES, make_rows
from recall import BASE, CHOOSING, KEY, LONG, MEASURED, QUESTIONS, SHORT, VALUE, N, as_rows, profile, questions, rows
from torch import Tensor
from transformers import AutoModelForCausalLM

from solopo_plugin.qa.files import write_json, write_jsonl
from solopo_plugin.qa.provenance import file_hash

ROWS = 1600  # of each data set: 200 steps of 8
COMPRESSED = (4, 25, 50, 100)  # pairs in the short context of `recall_solopo_N`, beside 8
REJECTED = (2, 4)  # rejected values of a row of `recall_solopo_rejected_N`; LOGO has 2 (arXiv:2410.18533)
SWEEP_SEED = table("recall")["sweep"]["seed"]
SAMPLES, TEMPERATURE = 32, 0.85  # the paper's
LOST = 0.25  # share of short contexts without the evidence in `recall_lost`
ASKED, ASKED_BY_STEP = 256, 128  # questions per length, of a finished model and of a checkpoint
SAMPLING = 1_000_000  # added to the seed, so that no generator draws what another has drawn
SOLO = {"prompt": "prompt", "long_prompt": "long_prompt", **RESPONSES}
ENTRIES = {  # name -> file, columns
    "recall_sft_short": ("recall", {"prompt": "prompt", "response": "chosen"}),
    "recall_sft_long_gold": ("recall", {"prompt": "long_prompt", "response": "chosen"}),  # of the arm sft_expand_long
    "recall_sft_long": ("recall_long", {"prompt": "long_prompt", "response": "chosen"}),
    "recall_long_po": ("recall_long", {"prompt": "long_prompt", **RESPONSES}),
    "recall_longpo": ("recall_longpo", SOLO),
    "recall_solopo_lost": ("recall_lost", SOLO),
    "recall_short_po_lost": ("recall_lost", {"prompt": "prompt", **RESPONSES}),
    **{f"recall_solopo_{pairs}": (f"recall_{pairs}", SOLO) for pairs in COMPRESSED},
    **{f"recall_solopo_rejected_{n}": ("recall_several", SOLO | {"rejected": f"rejected_{n}"}) for n in REJECTED},
}


@torch.inference_mode()
def sampled(model, long_BT: Tensor, right_B: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Sample the model's answers on the long context and judge them.

    Returns:
        Whether any of `SAMPLES` answers is right (B,), whether any is wrong (B,), and a wrong one (B,).
    """
    logits_BV = torch.cat([model(ids, logits_to_keep=1).logits[:, -1] for ids in long_BT.split(64)])
    answers_BS = torch.multinomial(
        torch.softmax(logits_BV / TEMPERATURE, -1), SAMPLES, replacement=True, generator=generator
    )
    wrong_BS = answers_BS != right_B[:, None]
    first_wrong_B = answers_BS.gather(1, wrong_BS.int().argmax(1, keepdim=True))[:, 0]
    return (~wrong_BS).any(1), wrong_BS.any(1), first_wrong_B


def sampled_rows(model, n: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Draw `n` rows of vanilla long PO, both responses sampled on long contexts, and `n` of LongPO, the rejected."""
    generator = torch.Generator().manual_seed(seed)
    both, rejected = [], []
    while len(both) < n:
        short_BT, long_BT, right_B, _ = questions(512, SHORT, LONG, generator)
        some_right_B, some_wrong_B, wrong_B = sampled(model, long_BT, right_B, generator)
        drawn = short_BT, long_BT, right_B, wrong_B
        both += as_rows(*(part[some_right_B & some_wrong_B] for part in drawn))
        rejected += as_rows(*(part[some_wrong_B] for part in drawn)) if len(rejected) < n else []
    return both[:n], rejected[:n]


def spare(long_BT: Tensor, first: int, generator: torch.Generator) -> Tensor:
    """Draw a word for each row, a key or value (ids from `first` on), that its long prompt does not have: (B,)."""
    free_BN = ~(long_BT[:, :, None] == first + torch.arange(N)).any(1)
    return first + torch.multinomial(free_BN.float(), 1, generator=generator)[:, 0]


def without_evidence(drawn: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
    """Take the asked pair out of a share `LOST` of the short prompts; one that is not in the long takes its place."""
    short_BT, long_BT, right_B, wrong_B = drawn
    pair_BT = torch.roll(short_BT == long_BT[:, -1:], 1, 1) | (short_BT == long_BT[:, -1:])
    pair_BT[:, -1] = False  # the question itself
    pair_BT[:, 0] = short_BT[:, 0] == long_BT[:, -1]  # roll brought the question's place here
    lost_B = torch.rand(len(short_BT), generator=generator) < LOST
    spare_B2 = torch.stack([spare(long_BT, first, generator) for first in (KEY, VALUE)], 1)
    is_value_BT = short_BT >= VALUE
    spare_BT = spare_B2.gather(1, is_value_BT.long())
    return torch.where(pair_BT & lost_B[:, None], spare_BT, short_BT), long_BT, right_B, wrong_B


def several_rejected(n: int, seed: int) -> list[dict]:
    """Draw the `n` rows of `recall_solopo`, with a column of rejected values of the short context for each number."""
    drawn, generator = rows(n, seed), random.Random(seed)
    for row in drawn:
        values = row["prompt"].split()[1 : 2 * SHORT : 2]
        others = [value for value in values if value not in (row["chosen"], row["rejected"])]
        several = [row["rejected"], *generator.sample(others, max(REJECTED) - 1)]
        row |= {f"rejected_{m}": several[:m] for m in REJECTED}
    return drawn


def prepare(folder: Path, seed: int) -> None:
    """Write everything that the arms train on, `ROWS` rows of each; dataset_info.json comes last."""
    files = {}
    for pairs in COMPRESSED:
        short_BT, long_BT, right_B, wrong_B = questions(ROWS, pairs, LONG, torch.Generator().manual_seed(seed))
        files[f"recall_{pairs}"] = as_rows(short_BT, short_BT if pairs == LONG else long_BT, right_B, wrong_B)
    generator = torch.Generator().manual_seed(seed)
    files["recall_lost"] = as_rows(*without_evidence(questions(ROWS, SHORT, LONG, generator), generator))
    base = AutoModelForCausalLM.from_pretrained(BASE).eval()
    files["recall_long"], files["recall_longpo"] = sampled_rows(base, ROWS, SAMPLING + seed)
    files["recall_several"] = several_rejected(ROWS, seed)
    for name, of_file in files.items():
        write_jsonl(folder / f"{name}.jsonl", of_file)
    make_rows(folder, ROWS, seed)
    info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    for name, (file, columns) in ENTRIES.items():
        info[name] = {"file_name": f"{file}.jsonl", "columns": columns}
        if "rejected" in columns:
            info[name]["ranking"] = True
    write_json(folder / "dataset_info.json", info)


# ---- the task, for run.py


def settings() -> dict:
    """Return what rows and measured accuracies depend on, beside the seed."""
    weights = file_hash(BASE / "model.safetensors")
    return dict(base=weights, rows=ROWS, pairs=[SHORT, LONG, *COMPRESSED], samples=SAMPLES, temperature=TEMPERATURE,
                lost=LOST, measured=MEASURED, asked=[ASKED, ASKED_BY_STEP])  # fmt: skip


def measured(model: Path, seed: int, ends: bool = False) -> dict[int, float]:
    """Measure accuracy by number of pairs; `ends`: of the short and the long context alone, over fewer questions."""
    lengths, n = ((SHORT, LONG), ASKED_BY_STEP) if ends else (MEASURED, ASKED)
    chosen_by = CHOOSING if seed == SWEEP_SEED else QUESTIONS
    return profile(AutoModelForCausalLM.from_pretrained(model), lengths, n, chosen_by)
