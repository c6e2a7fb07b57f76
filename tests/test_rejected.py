"""Rows with several rejected responses: the mean over their pairs, the chosen response and the long context paid once.

Steps run in float64, so that a row equals the mean of the rows it stands for; `step` and the model are by_hand.py's.
"""

import json
import math
import re

import pytest
import torch
from by_hand import BASE, POLICY, REFERENCE, by_hand_logps, qwen2_float64, step, tiny_rows
from conftest import LOSS_BOUND, SGD, demo_rows, weight_bound, write_dataset

from solopo_plugin.data import BETWEEN, pairs_of, rejected_of, row_length
from solopo_plugin.packing import PackedCollator, Segment

LOSSES = ("sigmoid", "ipo", "hinge", "simpo", "orpo")
FORMS = ("packed", "two_stage")
MORE = {0: [[7, 8, 9], [12, 3]], 2: [[31, 30, 29, 28, 27, 26]]}  # by row of `tiny_rows`; row 1 keeps its one


def ragged_rows() -> list[dict]:
    """Three rows with three, one and two rejected responses; the last one's long prompt is its short prompt."""
    rows = tiny_rows()
    for i, more in MORE.items():
        for ids in more:
            rows[i]["rejected_ids"] = [*rows[i]["rejected_ids"], BETWEEN, *ids]
    return rows


@pytest.fixture
def float64(monkeypatch):
    """Nothing of a step is rounded to fp32: neither logits, which are asked for so, nor what is made for log-probs."""
    qwen2_float64(POLICY), qwen2_float64(REFERENCE)  # which draw their weights in fp32
    to, zeros_like = torch.Tensor.to, torch.zeros_like

    def precise(value):
        return torch.float64 if value is torch.float32 else value

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(
        torch.Tensor, "to",
        lambda self, *args, **kwargs: to(self, *map(precise, args), **{k: precise(v) for k, v in kwargs.items()}),
    )  # fmt: skip
    monkeypatch.setattr(
        torch, "zeros_like", lambda x, **kwargs: zeros_like(x, **{k: precise(v) for k, v in kwargs.items()})
    )
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def keys_of(loss: str, **changes) -> dict:
    keys = BASE | dict(pref_loss=loss) | changes
    if loss in ("simpo", "orpo"):
        keys.pop("ref_model")
    return keys


CASES = {
    **{loss: keys_of(loss) for loss in LOSSES},
    **{f"{loss}, both": keys_of(loss, solopo_align_on="both") for loss in LOSSES},
    "orpo, drop, ftx": keys_of("orpo", solopo_align_on="both", solopo_penalty="drop", pref_ftx=0.5),
    "sigmoid, detached": keys_of("sigmoid", solopo_detach_short=True, dpo_label_smoothing=0.1),
    "orpo, distill": keys_of("orpo", solopo_align="distill"),
    "sigmoid, distill, anchor, both": keys_of("sigmoid", solopo_align="distill", solopo_align_on="both",
                                              solopo_anchor=0.5, solopo_reference="online"),
    "hinge, anchor": keys_of("hinge", solopo_anchor=0.5, solopo_reference="online"),
    "longpo": dict(pref_loss="sigmoid", pref_beta=0.4, ref_model="a", solopo_objective="longpo",
                   solopo_longpo_lambda=0.8),
}  # fmt: skip


def gradients(losses_B):
    return torch.autograd.grad(losses_B.mean(), list(qwen2_float64(POLICY).parameters()))


@pytest.mark.parametrize("forward", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_a_row_is_the_mean_of_its_pairs(float64, case, forward):
    """Loss, metrics and gradients of ragged rows in one batch, against each pair as a row in a step of its own."""
    models, keys = (qwen2_float64(POLICY), qwen2_float64(REFERENCE)), CASES[case] | dict(solopo_forward=forward)
    losses_B, metrics = step(*models, ragged_rows(), **keys)
    steps = [[step(*models, [pair], **keys) for pair in pairs_of(row)] for row in ragged_rows()]
    truth = torch.stack([torch.cat([losses for losses, _ in of_row]).mean() for of_row in steps])
    assert [len(of_row) for of_row in steps] == [3, 1, 2] and losses_B.dtype == truth.dtype == torch.float64
    exact = dict(rtol=0, atol=1e-12)
    torch.testing.assert_close(losses_B, truth, **exact)
    for name, values_B in metrics.items():
        want = torch.stack([torch.cat([parts[name] for _, parts in of_row]).mean() for of_row in steps])
        torch.testing.assert_close(values_B, want, **exact)
    for got, want in zip(gradients(losses_B), gradients(truth), strict=True):
        torch.testing.assert_close(got, want, **exact)


def test_the_preference_loss_by_hand(float64):
    """SimPO over two rejected responses with its NLL, as LOGO has it, from single sequences."""
    model, row = qwen2_float64(POLICY), ragged_rows()[2]
    prompt = row["short_prompt_ids"]
    chosen, *rejected = (
        by_hand_logps(model, prompt, ids).mean().item() for ids in (row["chosen_ids"], *rejected_of(row))
    )
    terms = [-math.log(1 / (1 + math.exp(-(0.4 * (chosen - r) - 0.3)))) for r in rejected]
    losses_B, metrics = step(model, None, [row], **keys_of("simpo", solopo_alpha=0.0, pref_ftx=0.1))
    assert losses_B.item() == pytest.approx(sum(terms) / 2 - 0.1 * chosen, rel=0, abs=1e-12)
    assert metrics["logps/rejected"].item() == pytest.approx(sum(rejected) / 2, rel=0, abs=1e-12)
    assert metrics["rewards/accuracies"].item() == sum(chosen > r for r in rejected) / 2


@pytest.mark.parametrize("forward", FORMS)
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_a_known_reference_of_each_pair(float64, forward, loss):
    """Rows that bring a list of scores, one a pair, give the step that runs the reference."""
    model, ref_model, rows = qwen2_float64(POLICY), qwen2_float64(REFERENCE), ragged_rows()
    size = torch.mean if loss == "ipo" else torch.sum
    for row in rows:
        ref = {name: [size(by_hand_logps(ref_model, row["short_prompt_ids"], pair[f"{name}_ids"])).item()
                      for pair in pairs_of(row)] for name in ("chosen", "rejected")}  # fmt: skip
        row |= {f"ref_{name}_logps": scores for name, scores in ref.items()}
    keys = keys_of(loss, solopo_forward=forward)
    known, online = (step(model, reference, given, **keys)[0]
                     for reference, given in ((None, rows), (ref_model, ragged_rows())))  # fmt: skip
    assert known.tolist() == pytest.approx(online.tolist(), rel=0, abs=1e-5)  # scores are kept in fp32


def test_a_packed_row_has_prompts_and_chosen_once():
    """By hand: three responses share a prompt, and only the chosen one stands behind the long prompt."""
    row = dict(name="r", long_is_short=False, short_prompt_ids=[1, 2, 3], long_prompt_ids=[4, 5, 6, 7],
               chosen_ids=[8, 9], rejected_ids=[10, BETWEEN, 11, 12])  # fmt: skip
    batch = PackedCollator()([row, row | {"rejected_ids": [13]}])
    policy = batch["policy"]
    first, second = [1, 2, 3, 8, 9, 10, 11, 12, 4, 5, 6, 7, 8, 9], [1, 2, 3, 8, 9, 13, 4, 5, 6, 7, 8, 9]
    assert policy["input_ids"].tolist() == [first + second]
    assert policy["position_ids"].tolist()[0][:14] == [0, 1, 2, 3, 4, 3, 3, 4, 0, 1, 2, 3, 4, 5]
    assert policy["plan"].segments[:4] == (
        Segment((0, 5), ((0, 5),)),
        Segment((5, 6), ((0, 3), (5, 6))),
        Segment((6, 8), ((0, 3), (6, 8))),
        Segment((8, 14), ((8, 14),)),
    )
    assert {k: v.tolist() for k, v in policy["spans"].items()} == {
        "chosen": [0, 0, 4], "rejected": [1, 2, 5], "long_chosen": [3, 3, 6]
    }  # fmt: skip
    assert batch["pairs"] == [2, 1] and batch["names"] == ["r", "r"]
    assert {k: v.tolist() for k, v in batch["reference"]["spans"].items()} == {
        "chosen": [0, 0, 3], "rejected": [1, 2, 4]
    }  # fmt: skip
    both = PackedCollator(long_pair=True)([row])["policy"]
    assert both["input_ids"].tolist() == [[1, 2, 3, 8, 9, 10, 11, 12, 4, 5, 6, 7, 8, 9, 10, 11, 12]]
    assert both["spans"]["long_rejected"].tolist() == [4, 5] and both["spans"]["long_chosen"].tolist() == [3, 3]
    longpo = PackedCollator(longpo=True)([row])["policy"]
    assert longpo["input_ids"].tolist() == [[4, 5, 6, 7, 8, 9, 10, 11, 12]]
    assert {k: v.tolist() for k, v in longpo["spans"].items()} == {
        "sequence": [0, 0], "chosen": [1, 1], "rejected": [2, 3]
    }  # fmt: skip


def test_parts_of_a_row():
    row = ragged_rows()[0]
    assert rejected_of(row) == [tiny_rows()[0]["rejected_ids"], *MORE[0]]
    assert rejected_of(tiny_rows()[0]) == [tiny_rows()[0]["rejected_ids"]]
    assert row_length(row) == 11 + 6 and row_length(row | {"rejected_ids": [1, BETWEEN, *range(1, 10)]}) == 11 + 9


# ---- runs


def listed(rows: list[dict], counts=(2, 1, 3)) -> list[dict]:
    """Rows of text whose rejected responses are lists of so many, over and over."""
    return [
        row | {"rejected": [row["rejected"], "Nobody knows.", "It is not said."][: counts[i % len(counts)]]}
        for i, row in enumerate(rows)
    ]


@pytest.fixture
def folders(tmp_path):
    """Data sets of one kind of list each, by name."""
    rows = demo_rows(12)
    sets = {"single": rows, "lists_of_one": listed(rows, (1,)), "lists": listed(rows)}
    return {name: write_dataset(tmp_path / name, of_name) for name, of_name in sets.items()}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SOLOPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


def numbers(result) -> list[dict]:
    """What a run logged, but for times."""
    names = ("loss", "grad_norm", "rewards", "logps", "solopo")
    return [{k: v for k, v in entry.items() if k.removeprefix("eval_").split("/")[0] in names} for entry in result.log]


def lines(cache) -> list[dict]:
    return [json.loads(line) for file in cache.glob("*/*.jsonl") for line in file.read_text().splitlines()]


@pytest.mark.parametrize("forward", FORMS)
def test_a_list_of_one_trains_bit_for_bit_as_its_text(run, recipe, folders, tmp_path, cache, forward):
    """In loss, metrics and weights; and it finds the scores of the reference that the text has left."""
    common = dict(dataset="rows", max_samples=None, val_size=3, eval_strategy="epoch", num_train_epochs=1.0)
    common |= dict(solopo_forward=forward, solopo_align_on="both")
    text, one = (
        run(recipe(dataset_dir=folders[name], output_dir=str(tmp_path / f"out_{name}"), **common))
        for name in ("single", "lists_of_one")
    )
    assert numbers(text) == numbers(one) and len(numbers(text)) >= 4
    assert all(torch.equal(weight, one.weights[name]) for name, weight in text.weights.items())
    assert len(lines(cache)) == 12


@pytest.mark.slow
@pytest.mark.parametrize("forward", FORMS)
def test_ragged_lists_train_with_a_known_reference_as_with_one_in_every_step(
    run, recipe, folders, tmp_path, cache, host_log, forward
):
    """With accumulation, evaluation and lists of one, two and three; a second run finds every score, and so does a run
    on the rows of one rejected response each."""
    common = dict(dataset="rows", max_samples=None, val_size=3, eval_strategy="epoch", solopo_forward=forward, **SGD)
    online, cached, again = (
        run(recipe(dataset_dir=folders["lists"], solopo_reference=how, output_dir=str(tmp_path / name), **common))
        for name, how in (("online", "online"), ("cached", "cached"), ("again", "cached"))
    )
    assert len(cached.losses) == 6 and len(lines(cache)) == 24 and {len(line) for line in lines(cache)} == {3}
    assert numbers(again) == numbers(cached)
    run(recipe(dataset_dir=folders["single"], max_steps=1, **common | {"num_train_epochs": 1.0}))
    found = [re.search(r"log-probs: (\d+) rows are in .*, (\d+) to score", said) for said in host_log]
    assert [m.groups() for m in found if m] == [("0", "24"), ("24", "0"), ("12", "0")]
    for a, b in zip(cached.losses, online.losses, strict=True):
        assert a == pytest.approx(b, **LOSS_BOUND)
    for entry, other in zip(numbers(cached), numbers(online), strict=True):
        assert entry == pytest.approx(other, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("forward", FORMS)
def test_an_anchor_on_disk_is_the_one_of_every_step(run, recipe, folders, tmp_path, cache, forward):
    """Files are of pairs; a sample's chosen response is taken from the first."""
    common = dict(dataset="rows", dataset_dir=folders["lists"], max_samples=None, num_train_epochs=1.0, **SGD)
    common |= dict(solopo_align_on="both", pref_loss="orpo", solopo_anchor=5.0, solopo_forward=forward)
    cached, online = (
        run(recipe(solopo_reference=how, output_dir=str(tmp_path / how), **common)) for how in ("cached", "online")
    )
    for entry, other in zip(numbers(cached), numbers(online), strict=True):
        assert entry == pytest.approx(other, rel=1e-4, abs=2e-5)
    assert numbers(cached)[-2]["solopo/anchor_kl"] > 5e-4


@pytest.mark.slow
def test_lists_in_packed_rows_are_lists_in_two_stages(run, recipe, folders, tmp_path):
    common = dict(dataset="rows", dataset_dir=folders["lists"], max_samples=None, num_train_epochs=1.0, **SGD)
    common |= dict(solopo_align_on="both", pref_loss="orpo")
    packed, two = (run(recipe(solopo_forward=f, output_dir=str(tmp_path / f), **common)) for f in FORMS)
    for a, b in zip(packed.losses, two.losses, strict=True):
        assert a == pytest.approx(b, **LOSS_BOUND)
    for name, weight in packed.weights.items():
        torch.testing.assert_close(two.weights[name], weight, **weight_bound(3))


@pytest.mark.slow
def test_tokenised_lists_are_saved_and_used_again(run, recipe, folders, tmp_path, host_log):
    common = dict(dataset="rows", dataset_dir=folders["lists"], max_samples=None, max_steps=2, pref_loss="orpo",
                  tokenized_path=str(tmp_path / "tokens"))  # fmt: skip
    first = run(recipe(**common))
    again = run(recipe(output_dir=str(tmp_path / "again"), **common))
    assert numbers(again) == numbers(first)
    streamed = dict(streaming=True, dataloader_num_workers=1, tokenized_path=None, output_dir=str(tmp_path / "stream"))
    streamed |= dict(buffer_size=1, pref_loss="orpo")
    plain = dict(disable_shuffling=True, output_dir=str(tmp_path / "plain"))
    a, b = (run(recipe(**common | changes)) for changes in (streamed, plain))
    assert [e["loss"] for e in a.log if "loss" in e] == [e["loss"] for e in b.log if "loss" in e]
