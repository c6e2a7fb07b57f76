"""Log-probs of the response are those of a full log_softmax in float64 of the shifted logits.

For any batch, ragged rows, rows without a label, chunk sizes of 1, odd ones and ones larger than the input, values and
gradients; bf16 logits are raised to fp32 first; the logits at t predict the label at t + 1. On a tiny Qwen2 neither
padding nor the other rows of a batch, nor leaving out the logits that nobody reads, changes a row's log-prob.
"""

import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solopo_plugin.logps import CHUNK, IGNORE, predicting_positions, response_logps, token_logps

# derandomize: a failure is the same for everybody; nothing is stored between runs
FUZZ = settings(deadline=None, max_examples=60, derandomize=True, database=None)
EPS32 = 2.0**-23


def tolerance(logits: torch.Tensor, tokens: int = 1) -> float:
    """Bound of the fp32 error of a sum of `tokens` log-probs.

    logit - logsumexp: exp, its argument, the sum, log and the difference each round to 2^-23 of numbers no larger than
    max|logit| + log V. Adding up `tokens` of them rounds each of the partial sums, at most `tokens` times as large.
    """
    size = logits.abs().max().item() + math.log(logits.shape[-1])
    return EPS32 * size * tokens * (6 + tokens)


def naive(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Token by token, all positions, float64."""
    logps = logits_BTV.double().log_softmax(-1)
    sums, counts = [], []
    for b, labels in enumerate(labels_BT.tolist()):
        terms = [logps[b, t - 1, label] for t, label in enumerate(labels) if t > 0 and label != IGNORE]
        sums.append(sum(terms, start=0 * logps[b].sum()))
        counts.append(len(terms))
    return torch.stack(sums), counts


@st.composite
def batches(draw, dtype=torch.float32):
    """Logits (B, T, V) and labels (B, T) with any pattern of IGNORE, also none at all and at position 0."""
    b, t, v = draw(st.integers(1, 4)), draw(st.integers(1, 12)), draw(st.integers(2, 30))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(b, t, v, generator=generator) * draw(st.sampled_from([0.1, 3.0, 40.0]))
    labels = torch.randint(v, (b, t), generator=generator)
    shape = draw(st.sampled_from(["prompt, response, padding", "anything"]))
    for row in labels:
        if shape == "anything":
            kept = torch.tensor(draw(st.lists(st.booleans(), min_size=t, max_size=t)))
        else:
            start, end = sorted(draw(st.tuples(st.integers(0, t), st.integers(0, t))))
            kept = (torch.arange(t) >= start) & (torch.arange(t) < end)
        row[~kept] = IGNORE
    return logits.to(dtype), labels


# ---- pure tensors


@FUZZ
@given(batches())
def test_response_logps_are_the_naive_ones(batch):
    """Value, count and gradient. The gradient is (one-hot - softmax), numbers of at most 1: a few times 2^-23."""
    logits, labels = batch
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    positions = predicting_positions(labels)
    sums, counts = response_logps(ours[:, positions], labels, positions)
    truth, truth_counts = naive(theirs, labels)
    assert sums.shape == counts.shape == (len(labels),) and sums.dtype == torch.float32
    assert counts.tolist() == truth_counts
    torch.testing.assert_close(sums.double(), truth, rtol=0, atol=tolerance(logits, logits.shape[1]))
    weights = torch.arange(1.0, len(labels) + 1)  # so that rows mixed up would show
    (sums * weights).sum().backward()
    (truth * weights.double()).sum().backward()
    scale = logits.abs().max().item() + math.log(
        logits.shape[-1]
    )  # softmax = exp(x - lse), whose argument has its error
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=0, atol=8 * EPS32 * (scale + 1) * len(labels))


@FUZZ
@given(batches())
def test_predicting_positions_are_those_before_a_label(batch):
    _, labels = batch
    want = [t for t in range(labels.shape[1] - 1) if any(row[t + 1] != IGNORE for row in labels.tolist())]
    assert predicting_positions(labels).tolist() == want


@pytest.mark.parametrize("n", [1, 2, 7, 64, 65])
@pytest.mark.parametrize("chunk", [1, 3, 7, 64, 1000])
def test_chunks_change_nothing(n, chunk):
    generator = torch.Generator().manual_seed(n)
    logits, targets = torch.randn(n, 11, generator=generator) * 3, torch.randint(11, (n,), generator=generator)
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    logps = token_logps(ours, targets, chunk)
    truth = theirs.log_softmax(-1)[torch.arange(n), targets]
    assert logps.shape == (n,) and logps.dtype == torch.float32
    torch.testing.assert_close(logps.double(), truth, rtol=0, atol=tolerance(logits))
    weights = torch.linspace(-1, 2, n, dtype=torch.float64)
    (logps * weights.float()).sum().backward()
    (truth * weights).sum().backward()
    torch.testing.assert_close(
        ours.grad.double(), theirs.grad, rtol=0, atol=8 * EPS32 * (logits.abs().max().item() + 3) * 2
    )


def test_a_response_longer_than_a_chunk():
    """Through `response_logps`, whose chunk is the default: more labelled tokens than CHUNK, rows across its border."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, CHUNK // 2 + 9, 5, generator=generator)
    labels = torch.randint(5, logits.shape[:2], generator=generator)
    labels[:, :4] = IGNORE
    positions = predicting_positions(labels)
    sums, counts = response_logps(logits[:, positions], labels, positions)
    truth, truth_counts = naive(logits, labels)
    assert counts.tolist() == truth_counts and counts.sum() > CHUNK
    # a sum of 500 terms near -2, pairwise: one rounding of 2^-23 * 1000 per level, ten levels, and each term's own
    torch.testing.assert_close(sums.double(), truth, rtol=0, atol=10 * EPS32 * 1000 + 520 * tolerance(logits))


def test_chunks_keep_no_fp32_copy_for_backward():
    """What the chunks are for: with bf16 logits autograd holds no fp32 tensor of the vocabulary's width."""
    n, v = 20, 50

    def kept(chunk) -> int:
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel() if tensor.dtype == torch.float32 else 0)
            return tensor

        logits = torch.randn(n, v, dtype=torch.bfloat16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            token_logps(logits, torch.zeros(n, dtype=torch.long), chunk).sum()
        return sum(sizes)

    assert kept(chunk=n) >= n * v > kept(chunk=5)


@FUZZ
@given(batches(dtype=torch.bfloat16))
def test_bf16_logits_are_computed_in_fp32(batch):
    """Against float64 of the same bf16 numbers with the bound of fp32, which bf16 arithmetic, at 2^-8, misses."""
    logits, labels = batch
    positions = predicting_positions(labels)
    sums, _ = response_logps(logits[:, positions], labels, positions)
    truth, _ = naive(logits, labels)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), truth, rtol=0, atol=tolerance(logits.float(), logits.shape[1]))


def test_bf16_arithmetic_would_miss_the_bound():
    logits = torch.randn(1, 9, 30, generator=torch.Generator().manual_seed(1)).bfloat16()
    labels = torch.arange(9)[None]
    truth, _ = naive(logits, labels)
    wrong = logits[0, :-1].log_softmax(-1)[torch.arange(8), labels[0, 1:]].sum()
    assert abs(wrong.double() - truth[0]) > 10 * tolerance(logits.float(), 9)


def test_the_logits_before_a_label_predict_it():
    """Two tokens, the second is the response. The logits at position 0 say 1/2, 1/4, 1/4; those at 1 say 1/8, 1/8, 3/4.

    The label is token 2: log 1/4 is right; a missing shift reads log 3/4.
    """
    logits = torch.tensor([[[1 / 2, 1 / 4, 1 / 4], [1 / 8, 1 / 8, 3 / 4]]]).log()
    labels = torch.tensor([[IGNORE, 2]])
    positions = predicting_positions(labels)
    assert positions.tolist() == [0]
    sums, counts = response_logps(logits[:, positions], labels, positions)
    assert counts.tolist() == [1]
    assert sums.item() == pytest.approx(math.log(1 / 4), rel=4 * EPS32)


def test_rows_without_a_label():
    """Sum 0, count 0, no gradient and no NaN; a label at position 0 has nothing before it and does not count."""
    logits = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(2), requires_grad=True)
    labels = torch.full((3, 4), IGNORE)
    labels[0, 2], labels[2, 0] = 5, 5
    positions = predicting_positions(labels)
    sums, counts = response_logps(logits[:, positions], labels, positions)
    sums.sum().backward()
    assert counts.tolist() == [1, 0, 0] and sums[1:].tolist() == [0, 0] and sums[0] < 0
    assert logits.grad.isfinite().all() and (logits.grad[1:] == 0).all() and (logits.grad[0] != 0).any()

    nothing = torch.full((2, 4), IGNORE)
    positions = predicting_positions(nothing)
    sums, counts = response_logps(logits[:2, positions], nothing, positions)
    assert positions.tolist() == [] and sums.tolist() == [0, 0] and counts.tolist() == [0, 0]


# ---- a real model


@cache
def tiny_qwen2():
    """Two layers of Qwen2, fp32, with weights large enough for the context to matter."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = dict(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, initializer_range=0.2, use_cache=False)  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Qwen2ForCausalLM(Qwen2Config(**shape)).eval()


# Logits of size <= 10 go through two layers of dot products of at most 64 terms: 2^-23 * 10 * sqrt(64) * some ten
# matrix products in a row = 1e-4 for the worst token if all errors add up. What the other rows or padding would do, if
# they leaked, is of size 0.1 and more (asserted below by leaking them).
MODEL_TOLERANCE = 1e-4


def sequences() -> list[tuple[list[int], list[int]]]:
    """Ragged (prompt, response) pairs of ids; 0 pads and occurs nowhere else."""
    ids = torch.randint(1, 50, (60,), generator=torch.Generator().manual_seed(4)).tolist()
    lengths = [(3, 5), (9, 2), (1, 1), (12, 7)]
    return [([ids.pop() for _ in range(p)], [ids.pop() for _ in range(r)]) for p, r in lengths]


def padded(pairs, side: str, extra: int = 0) -> dict[str, torch.Tensor]:
    width = max(len(p) + len(r) for p, r in pairs) + extra
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, response in pairs:
        rest = width - len(prompt) - len(response)
        for name, row, filler in (
            ("input_ids", prompt + response, 0),
            ("attention_mask", [1] * (len(prompt) + len(response)), 0),
            ("labels", [IGNORE] * len(prompt) + response, IGNORE),
        ):
            batch[name].append(row + [filler] * rest if side == "right" else [filler] * rest + row)
    return {name: torch.tensor(rows) for name, rows in batch.items()}


def model_logps(batch, keep: bool = True, mask: bool = True) -> list[float]:
    """Per row, through the model; with `keep` only the logits that are read are computed."""
    labels = batch["labels"]
    positions = predicting_positions(labels)
    attention = batch["attention_mask"] if mask else torch.ones_like(batch["attention_mask"])
    position_ids = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    kwargs = dict(input_ids=batch["input_ids"], attention_mask=attention, position_ids=position_ids)
    with torch.no_grad():
        if keep:
            logits = tiny_qwen2()(**kwargs, logits_to_keep=positions).logits
        else:
            logits = tiny_qwen2()(**kwargs).logits[:, positions]
    assert logits.shape[:2] == (len(labels), len(positions)) and logits.abs().max() < 10
    return response_logps(logits, labels, positions)[0].tolist()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("side, extra", [("right", 0), ("right", 5), ("left", 0), ("left", 5)])
def test_a_row_alone_is_a_row_in_a_batch(side, extra, keep):
    pairs = sequences()
    alone = [model_logps(padded([pair], "right"))[0] for pair in pairs]
    assert model_logps(padded(pairs, side, extra), keep) == pytest.approx(alone, rel=0, abs=MODEL_TOLERANCE)
    mixed = [pairs[i] for i in (3, 0, 0, 2)]
    want = [alone[i] for i in (3, 0, 0, 2)]
    assert model_logps(padded(mixed, side, extra), keep) == pytest.approx(want, rel=0, abs=MODEL_TOLERANCE)


def test_leaking_padding_would_show():
    """The same comparison with padding on the left attended to: the change is far above the tolerance."""
    pairs = sequences()
    alone = [model_logps(padded([pair], "right"))[0] for pair in pairs]
    leaked = model_logps(padded(pairs, "left"), mask=False)
    assert max(abs(a - b) for a, b in zip(alone, leaked, strict=True)) > 100 * MODEL_TOLERANCE


def test_model_logps_are_the_naive_ones():
    """Each response after its own prompt, token by token, from all logits in float64."""
    for prompt, response in sequences():
        with torch.no_grad():
            logps = tiny_qwen2()(input_ids=torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
        truth = sum(logps[len(prompt) - 1 + i, token].item() for i, token in enumerate(response))
        got = model_logps(padded([(prompt, response)], "right"))[0]
        assert got == pytest.approx(truth, rel=0, abs=MODEL_TOLERANCE)
