"""The packed row: its layout by hand, and packed = two-stage = each sequence alone, in loss, metrics and gradients.

Models are built from tiny configurations with weights large enough for the context to matter.
"""

import math
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from by_hand import (
    BASE,
    MODELS,
    POLICY,
    REFERENCE,
    STEP_TOLERANCE,
    STEPS,
    Live,
    assert_gradients_close,
    by_hand_logps,
    by_hand_solopo,
    qwen2_float64,
    step,
    tiny,
    tiny_rows,
    watched_step,
)

from solopo_plugin import attention, packing
from solopo_plugin.forward import TwoStages
from solopo_plugin.packing import PackedCollator, Segment, pack

# ---- the layout


def feature(**changes) -> dict:
    row = dict(name="r", long_is_short=False, short_prompt_ids=[1, 2, 3], long_prompt_ids=[4, 5, 6, 7],
               chosen_ids=[8, 9], rejected_ids=[10])  # fmt: skip
    return row | changes


def read(row: dict) -> dict[str, list]:
    """Per span name and sample the (token before, token predicted) pairs, read off the row."""
    ids, spans = row["input_ids"][0], list(zip(row["positions_K"], row["targets_K"], strict=True))
    found, at = [], 0
    for count in row["counts"]:
        found.append([(ids[p].item(), t.item()) for p, t in spans[at : at + count]])
        at += count
    assert at == len(spans) and row["counts_N"].tolist() == row["counts"]
    return {name: [found[n] for n in which.tolist()] for name, which in row["spans"].items()}


def test_layout_of_a_sample_by_hand():
    batch = PackedCollator()([feature()])
    policy, reference = batch["policy"], batch["reference"]
    assert policy["input_ids"].tolist() == [[1, 2, 3, 8, 9, 10, 4, 5, 6, 7, 8, 9]]
    assert policy["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2, 3, 4, 5]]
    assert policy["plan"].segments == (
        Segment((0, 5), ((0, 5),)),
        Segment((5, 6), ((0, 3), (5, 6))),
        Segment((6, 12), ((6, 12),)),
    )
    assert policy["positions_K"].tolist() == [2, 3, 2, 9, 10]  # the short prompt's last position predicts twice
    assert policy["targets_K"].tolist() == [8, 9, 10, 8, 9]
    assert {k: v.tolist() for k, v in policy["spans"].items()} == {"chosen": [0], "rejected": [1], "long_chosen": [2]}
    assert reference["input_ids"].tolist() == [[1, 2, 3, 8, 9, 10]] and set(reference["spans"]) == {
        "chosen",
        "rejected",
    }
    assert batch["names"] == ["r"] and batch["long_is_short_B"].tolist() == [False]


def test_layout_of_a_batch():
    """Both responses aligned; the middle sample's prompts agree, so it has no long part and its spans coincide."""
    no_long = feature(long_is_short=True, long_prompt_ids=[1, 2, 3])
    rows = [feature(), no_long, feature(chosen_ids=[11], rejected_ids=[12, 13])]
    policy = PackedCollator(long_pair=True)(rows)["policy"]
    assert policy["input_ids"].shape == (1, (5 + 1 + 6 + 1) + (5 + 1) + (4 + 2 + 5 + 2))
    assert len(policy["plan"].segments) == 4 + 2 + 4
    assert read(policy) == {
        "chosen": [[(3, 8), (8, 9)], [(3, 8), (8, 9)], [(3, 11)]],
        "rejected": [[(3, 10)], [(3, 10)], [(3, 12), (12, 13)]],
        "long_chosen": [[(7, 8), (8, 9)], [(3, 8), (8, 9)], [(7, 11)]],
        "long_rejected": [[(7, 10)], [(3, 10)], [(7, 12), (12, 13)]],
    }
    spans = {name: which.tolist() for name, which in policy["spans"].items()}
    assert spans["long_chosen"][1] == spans["chosen"][1] and spans["long_rejected"][1] == spans["rejected"][1]


def test_layout_for_longpo():
    """The policy sees the long pair and scores all of `x_long y_w` from its second token on."""
    policy = PackedCollator(longpo=True)([feature()])["policy"]
    assert policy["input_ids"].tolist() == [[4, 5, 6, 7, 8, 9, 10]]
    assert read(policy) == {
        "sequence": [[(4, 5), (5, 6), (6, 7), (7, 8), (8, 9)]],
        "chosen": [[(7, 8), (8, 9)]],
        "rejected": [[(7, 10)]],
    }


def test_every_query_sees_its_own_sequence_and_nothing_else():
    """Rebuild each token's context from segments and positions: it is the sequence up to that token, in order."""
    groups = [([1, 2, 3], [[4, 5], [6], [7, 8, 9]]), ([10], [[11]]), ([12, 13], [[14, 15, 16], [17, 18]])]
    row = pack(groups)
    ids, places = row["input_ids"][0].tolist(), row["position_ids"][0].tolist()
    sequences = [prompt + response for prompt, responses in groups for response in responses]
    seen = []
    for segment in row["plan"].segments:
        keys = [k for part in segment.keys for k in range(*part)]
        queries = list(range(*segment.query))
        for i, q in enumerate(queries):
            visible = keys[: len(keys) - len(queries) + i + 1]  # causal, the last query sees the last key
            assert visible[-1] == q and [places[k] for k in visible] == list(range(len(visible)))
            seen.append([ids[k] for k in visible])
    assert len(seen) == len(ids)
    assert all(context in [s[: len(context)] for s in sequences] for context in seen)
    assert all(sequence in seen for sequence in sequences)


# ---- against each sequence alone, in float64 by hand: the cases, rows and tolerances of test_losses.py


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("case", STEPS)
def test_packed_step_is_the_loop_by_hand(case, batch_size):
    model, ref_model, rows = qwen2_float64(POLICY), qwen2_float64(REFERENCE), tiny_rows()
    keys = BASE | dict(pref_loss=case.split(",")[0]) | STEPS[case]
    if keys["pref_loss"] in ("simpo", "orpo"):
        keys.pop("ref_model")
    batches = [rows[i : i + batch_size] for i in range(0, 3, batch_size)]
    steps = [step(model, ref_model, batch, solopo_forward="packed", **keys) for batch in batches]
    losses_B = torch.cat([losses for losses, _ in steps])
    metrics = {name: torch.cat([m[name] for _, m in steps]) for name in steps[0][1]}
    truth = [by_hand_solopo(model, ref_model, row, keys) for row in rows]
    by_hand = torch.stack([t["loss"] for t in truth])
    assert losses_B.tolist() == pytest.approx(by_hand.tolist(), rel=0, abs=STEP_TOLERANCE)
    for name in set(truth[0]) - {"loss"}:
        assert metrics[name].tolist() == pytest.approx([t[name].item() for t in truth], rel=0, abs=STEP_TOLERANCE), name
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(losses_B.mean(), parameters)
    assert_gradients_close(gradients, torch.autograd.grad(by_hand.mean(), parameters))
    assert metrics["solopo/align_loss"][2] == 0  # exactly: the row's long prompt is its short prompt


def test_packed_longpo_step_is_the_loop_by_hand():
    model, ref_model, rows = qwen2_float64(POLICY), qwen2_float64(REFERENCE), tiny_rows()
    keys = dict(pref_loss="sigmoid", pref_beta=0.4, ref_model="a reference", solopo_objective="longpo",
                solopo_longpo_lambda=0.8, solopo_forward="packed")  # fmt: skip
    by_hand = []
    for row in rows:
        margin = [
            by_hand_logps(model, row["long_prompt_ids"], row[f"{response}_ids"]).sum()
            - by_hand_logps(ref_model, row["short_prompt_ids"], row[f"{response}_ids"]).sum().detach()
            for response in ("chosen", "rejected")
        ]
        ids = row["long_prompt_ids"] + row["chosen_ids"]
        nll = -by_hand_logps(model, ids[:1], ids[1:]).mean()
        by_hand.append(nll + 0.8 * torch.log(1 + torch.exp(-0.4 * (margin[0] - margin[1]))))
    by_hand = torch.stack(by_hand)
    losses_B, _ = step(model, ref_model, rows, **keys)
    assert losses_B.tolist() == pytest.approx(by_hand.tolist(), rel=0, abs=STEP_TOLERANCE)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(losses_B.mean(), parameters)
    assert_gradients_close(gradients, torch.autograd.grad(by_hand.mean(), parameters))


# ---- against two stages, in fp32, for every architecture


def both_ways(name: str, rows: list[dict], **keys) -> list[tuple]:
    """Losses, metrics and gradients of the step, packed and in two stages."""
    model, ref_model, results = tiny(name), tiny(name, 1), []
    for forward in ("packed", "two_stage"):
        losses_B, metrics = step(model, ref_model, rows, solopo_forward=forward, **(BASE | keys))
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(losses_B.mean(), parameters, allow_unused=True, materialize_grads=True)
        results.append((losses_B.detach(), metrics, gradients))
    return results


def assert_equal(packed, two_stage) -> None:
    """1e-5 relative: to the largest log-prob for losses and metrics, which are sums and differences
    of log-probs times slopes of order 1, and to the largest gradient of all."""
    size = max(two_stage[1][name].abs().max().item() for name in ("logps/chosen", "logps/rejected"))
    torch.testing.assert_close(packed[0], two_stage[0], rtol=1e-5, atol=1e-5 * size)
    for name, values_B in two_stage[1].items():
        torch.testing.assert_close(packed[1][name], values_B, rtol=1e-5, atol=1e-5 * size)
    largest = max(g.abs().max().item() for g in two_stage[2])
    assert largest > 0.1
    for a, b in zip(packed[2], two_stage[2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("name, align_on", [*((name, "both") for name in MODELS), ("llama", "chosen")])
def test_packed_is_two_stage_on_every_architecture(name, align_on):
    assert attention.why_not_packed(tiny(name)) is None
    assert_equal(*both_ways(name, tiny_rows(), pref_loss="sigmoid", solopo_align_on=align_on))


@pytest.mark.parametrize("align", ["reward", "logp"])
@pytest.mark.parametrize("pref_loss", ["sigmoid", "ipo", "hinge", "simpo", "orpo"])
def test_packed_is_two_stage_for_every_loss(pref_loss, align):
    assert_equal(*both_ways("qwen3", tiny_rows(), pref_loss=pref_loss, solopo_align=align, solopo_align_on="both"))


def test_packed_is_two_stage_for_longpo():
    keys = dict(pref_loss="sigmoid", solopo_objective="longpo", solopo_longpo_lambda=0.8)
    keys |= dict(solopo_alpha=1.0, pref_ftx=0.0)  # defaults: LongPO refuses what it would ignore
    assert_equal(*both_ways("qwen2", tiny_rows(), **keys))


def test_chunks_of_log_probs_change_nothing():
    rows, keys = tiny_rows(), dict(pref_loss="orpo", solopo_forward="packed")
    whole, _ = step(tiny("llama"), None, rows, **(BASE | keys))
    chunks, _ = step(tiny("llama"), None, rows, **(BASE | keys), solopo_logp_chunk=3)
    torch.testing.assert_close(chunks, whole, rtol=1e-6, atol=0)  # the order of an fp32 logsumexp


# ---- all segments in one call of the GPU's kernel, which is emulated here


def loop_varlen(query, key, value, cu_queries, cu_keys, longest_queries, longest_keys, *, scale, window_size):
    """By its documentation what `torch.nn.attention.varlen.varlen_attn` does: sequences are told by `cu_*` alone, the
    causal mask is aligned to the last query and key, heads of keys are shared. It runs on a GPU only."""
    left, right = window_size  # keys before a query's own, -1 for all of them
    assert right == 0 and cu_queries.dtype == cu_keys.dtype == torch.int32
    assert longest_queries == cu_queries.diff().max() and longest_keys == cu_keys.diff().max()
    assert query.dim() == 3 and query.shape[0] == cu_queries[-1] and key.shape[0] == value.shape[0] == cu_keys[-1]
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    outputs = []
    for a, b, c, d in zip(cu_queries, cu_queries[1:], cu_keys, cu_keys[1:], strict=False):
        scores_HQK = torch.einsum("qhd,khd->hqk", query[a:b], key[c:d]) * scale
        back_QK = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)[None]
        seen_QK = (back_QK >= 0) & ((back_QK <= left) | (left == -1))
        weights_HQK = scores_HQK.masked_fill(~seen_QK, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights_HQK, value[c:d]))
    return torch.cat(outputs)


@pytest.mark.parametrize("long", [10**9, 16, 1])
@pytest.mark.parametrize("name", ["qwen2", "llama, one head of keys", "phi", "olmo2", "gemma3_text, window"])
def test_one_call_is_two_stages(monkeypatch, name, long):
    """Losses, metrics and gradients; with both responses shared, so that keys come twice.

    Segments from `long` tokens attend by SDPA, as on an H100: none of them, some, and all that see only themselves.
    """
    calls = []
    monkeypatch.setattr(attention, "runs_varlen", lambda *_: True)
    monkeypatch.setattr(attention, "runs_cudnn", lambda *_: long < 10**9)
    monkeypatch.setattr(packing, "LONG", long)
    monkeypatch.setattr(attention, "varlen_attn", lambda *args, **kw: calls.append(1) or loop_varlen(*args, **kw))
    assert_equal(*both_ways(name, tiny_rows(), pref_loss="sigmoid", solopo_align_on="both"))
    assert len(calls) == 4  # two layers, policy and reference


# ---- windows


def test_a_window_counts_the_querys_own_key_as_transformers_does():
    from transformers.masking_utils import sliding_window_causal_mask_function

    for window in (1, 2, 5, 12, 30):
        seen = sliding_window_causal_mask_function(window)
        theirs = [[bool(seen(0, 0, torch.tensor(q), torch.tensor(k))) for k in range(12)] for q in range(12)]
        assert attention.lower_right(12, 12, torch.device("cpu"), window).tolist() == theirs


def masked_softmax(query, key, value, row: dict, scale: float, window: int):
    """By one mask of the whole row: of its segment's keys a query sees those at most `window` - 1 positions before."""
    places = row["position_ids"][0]
    back = places[:, None] - places[None]
    seen = torch.zeros_like(back, dtype=torch.bool)
    for segment in row["plan"].segments:
        for part in segment.keys:
            seen[slice(*segment.query), slice(*part)] = True
    seen &= torch.ones_like(seen).tril() & (back >= 0) & (back < window)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    weights = (query @ key.transpose(2, 3) * scale).masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize("block", [1, 4, 7, 1024])
@pytest.mark.parametrize("window", [1, 2, 5, 8, 13, 28, 1000])
def test_a_window_is_a_masked_softmax(monkeypatch, window, block):
    """In float64, output and gradients, of both ways; prompts shorter and longer than the window, responses too."""
    row = pack([(range(9), [range(5), range(4)]), (range(23), [range(6), range(11)]), ([1], [[2], range(14)])])
    layout, make = row["plan"].layout(torch.device("cpu")), torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(1, *shape, generator=make, dtype=torch.float64, requires_grad=True)  # noqa: E731
    states = [draw(heads, sum(layout.queries), 8) for heads in (4, 2, 2)]
    truth = masked_softmax(*states, row, 0.3, window)
    slope = draw(*truth.shape[1:]).detach()
    gradients = torch.autograd.grad(truth, states, slope)
    monkeypatch.setattr(attention, "BLOCK", block)
    monkeypatch.setattr(attention, "varlen_attn", loop_varlen)
    for way in (attention.sdpa_segments, attention.varlen_segments):
        output = way(*states, layout, 0.3, window=window)
        torch.testing.assert_close(output, truth, rtol=0, atol=1e-13)
        for a, b in zip(torch.autograd.grad(output, states, slope), gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", MODELS)
def test_packed_is_each_sequence_alone_on_every_architecture(name):
    """Log-probs and gradients; alone and unpadded, by transformers' eager attention with its own masks."""
    model, rows = tiny(name), tiny_rows()
    sides = [(side, response) for side in ("short", "long") for response in ("chosen", "rejected")]
    try:
        model.config._attn_implementation = "eager"
        alone = [[by_hand_logps(model, r[f"{side}_prompt_ids"], r[f"{response}_ids"]).sum() for r in rows]
                 for side, response in sides]  # fmt: skip
    finally:
        model.config._attn_implementation = "sdpa"
    alone = torch.stack([torch.stack(of) for of in alone])
    row = PackedCollator(long_pair=True)(rows)["policy"]
    attention.prepare(model)
    logits_1KV = model(input_ids=row["input_ids"], position_ids=row["position_ids"], solopo_segments=row["plan"],
                       logits_to_keep=row["positions_K"], use_cache=False).logits  # fmt: skip
    logps_K = logits_1KV[0].log_softmax(-1).gather(1, row["targets_K"][:, None]).squeeze(1)
    sums_N = torch.stack([span.sum() for span in logps_K.split(row["counts"])])
    packed = torch.stack([sums_N[row["spans"][n]] for n in ("chosen", "rejected", "long_chosen", "long_rejected")])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5 * alone.abs().max().item())
    slope = torch.linspace(-1, 1, 12).view(4, 3)
    parameters = [p for p in model.parameters() if p.requires_grad]
    one, other = (torch.autograd.grad((x * slope).sum(), parameters, allow_unused=True, materialize_grads=True)
                  for x in (packed, alone))  # fmt: skip
    largest = max(g.abs().max().item() for g in other)
    assert largest > 0.1
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-5 * largest)  # fp32, summed over twelve sequences


def test_cudnn_has_no_windows(monkeypatch):
    """A layer with a window runs in varlen whole, one without has its long segments apart."""
    seen = []

    def watched(*args, **keys):
        seen.append((keys["window_size"], len(args[3]) - 1))
        return loop_varlen(*args, **keys)

    monkeypatch.setattr(attention, "runs_varlen", lambda *_: True)
    monkeypatch.setattr(attention, "runs_cudnn", lambda *_: True)
    monkeypatch.setattr(packing, "LONG", 8)
    monkeypatch.setattr(attention, "varlen_attn", watched)
    step(tiny("gemma3_text, window"), None, tiny_rows(), solopo_forward="packed", **(BASE | dict(pref_loss="simpo")))
    segments = 2 + 1 + 2 + 1 + 2
    assert seen == [((4, 0), segments), ((-1, 0), 3)]  # the rejected ones: all others are long and see themselves alone


def test_no_mask_is_wider_than_a_block_and_its_window(monkeypatch):
    sizes = []
    lower_right = attention.lower_right
    monkeypatch.setattr(attention, "lower_right", lambda *size: sizes.append(size[:2]) or lower_right(*size))
    row = pack([(range(7000), [range(300), range(1500)])])
    layout = row["plan"].layout(torch.device("cpu"))
    states = [torch.randn(1, 1, sum(layout.queries), 4) for _ in range(3)]
    attention.sdpa_segments(*states, layout, 0.5, window=600)
    assert len(sizes) == 8 + 2 and max(queries for queries, _ in sizes) == attention.BLOCK
    assert max(keys for _, keys in sizes) <= 2 * attention.BLOCK


def test_long_segments_apart(monkeypatch):
    """Which they are, and that each is padded to a multiple, so that few lengths are prepared for."""
    row = pack([(range(9), [range(5), range(4)]), (range(40), [range(5), range(4)]), (range(50), [range(5)])])
    layout = row["plan"].layout(torch.device("cpu"))
    monkeypatch.setattr(packing, "LONG", 45)
    long, others = layout.parted
    assert [layout.queries[i] for i in long] == [45, 55]
    assert others.queries == (14, 4, 4) and others.cu_keys.tolist() == [0, 14, 27, 71]
    seen = []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention",
                        lambda q, *a, **k: seen.append(q.shape[2]) or sdpa(q, *a, **k))  # fmt: skip
    monkeypatch.setattr(attention, "varlen_attn", loop_varlen)
    x = [torch.randn(1, heads, sum(layout.queries), 8, requires_grad=True) for heads in (4, 2, 2)]
    apart = attention.long_apart_segments(*x, layout, 0.3)
    assert seen == [512, 512]
    torch.testing.assert_close(apart, attention.sdpa_segments(*x, layout, 0.3))


def test_lengths_are_added_up_once_per_row(monkeypatch):
    """Not once per layer: on a GPU that would wait for the device."""
    from solopo_plugin.packing import Layout

    made, of = [], Layout.of
    monkeypatch.setattr(Layout, "of", lambda *args: made.append(1) or of(*args))
    step(tiny("llama"), None, tiny_rows(), solopo_forward="packed", **(BASE | dict(pref_loss="simpo")))
    assert len(made) == 1


@pytest.mark.parametrize("samples", [1, 2, 4])
def test_backward_of_segments_writes_each_gradient_once(samples):
    """What SDPA's segments allocate in backward, in sizes of the query: as much for four samples as for one."""
    row = pack([(range(9), [range(5), range(4)]), (range(40), [range(5)])] * samples)
    shape = row["input_ids"].shape[1]
    query, key, value = (torch.randn(1, heads, shape, 8, requires_grad=True) for heads in (4, 2, 2))
    output = attention.sdpa_segments(query, key, value, row["plan"].layout(query.device), 0.3)
    with Live() as live:
        output.sum().backward()
    # dq, dk, dv and their parts, 5.3; slices, which write a whole row of zeros each, made it 15, 29 and 57
    assert live.made < 8 * query.nbytes


# ---- gradient checkpointing runs layers again, after the step


def gradients_of(model, rows, kind: str | None) -> list[torch.Tensor]:
    """With the host's own checkpointing function; the backward runs when the step is long over."""
    from types import MethodType

    from llamafactory.model.model_utils.checkpointing import _gradient_checkpointing_enable

    if kind is not None:
        model.gradient_checkpointing_enable = MethodType(_gradient_checkpointing_enable, model)
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"}, use_unsloth_gc=kind == "unsloth")
    try:
        losses_B, _ = step(model, None, rows, solopo_forward="packed", **(BASE | dict(pref_loss="orpo")))
        assert model.config._attn_implementation == "sdpa"
        model.zero_grad()
        losses_B.mean().backward()
        assert model.config._attn_implementation == "sdpa"
    finally:
        model.gradient_checkpointing_disable()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant", "unsloth"])
@pytest.mark.parametrize("name", ["llama", "phi", "phi3", "qwen3_moe"])
def test_checkpointing_recomputes_in_segments(name, kind, monkeypatch):
    """Bit for bit: the same operations on the same numbers. Each layer attends once more, in its segments.

    The host's `use_unsloth_gc` keeps hidden states on the CPU and brings them back to "cuda", which here is the CPU.
    """
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *a, **k: to(x, *["cpu" if d == "cuda" else d for d in a], **k))
    model, rows, calls = tiny(name), tiny_rows(), []
    kept = gradients_of(model, rows, None)
    refuse = attention._refuse
    monkeypatch.setattr(attention, "_refuse", lambda *args: calls.append(1) or refuse(*args))
    recomputed = gradients_of(model, rows, kind)
    assert len(calls) == 4
    for a, b in zip(recomputed, kept, strict=True):
        assert torch.equal(a, b)


# ---- nothing else sees it


def test_generation_and_attention_are_as_before():
    model = tiny("qwen2").eval()
    prompt = torch.tensor([[5, 7, 9, 11]])
    generate = dict(max_new_tokens=8, do_sample=False, use_cache=True, return_dict_in_generate=True, output_logits=True)
    before = model.generate(prompt, **generate)
    saved = model.config.to_dict()
    step(model, None, tiny_rows(), solopo_forward="packed", **(BASE | dict(pref_loss="simpo")))[0].mean().backward()
    after = model.generate(prompt, **generate)
    assert model.config._attn_implementation == "sdpa" and model.config.to_dict() == saved
    assert torch.equal(before.sequences, after.sequences)
    assert all(torch.equal(a, b) for a, b in zip(before.logits, after.logits, strict=True))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("where", ["model.layers.1.mlp", "model.norm", "lm_head"])
def test_attention_is_restored_after_an_exception(where, implementation):
    model = tiny("llama").train()
    model.config._attn_implementation = implementation
    seen = []

    def fail(module, args):
        seen.append(model.config._attn_implementation)
        raise MemoryError("no more")

    handle = model.get_submodule(where).register_forward_pre_hook(fail)
    try:
        with pytest.raises(MemoryError):
            step(model, None, tiny_rows(), solopo_forward="packed", **(BASE | dict(pref_loss="simpo")))
        assert model.config._attn_implementation == implementation
        assert seen == [implementation if where == "lm_head" else attention.SEGMENTS]
    finally:
        handle.remove()
        model.config._attn_implementation = "sdpa"


def test_a_second_preparation_and_a_copy_change_nothing():
    model = tiny("llama")
    attention.prepare(model)
    hooks = len(model.model._forward_hooks)
    attention.prepare(model)
    assert len(model.model._forward_hooks) == hooks == 1
    twin = deepcopy(model)
    keys = BASE | dict(pref_loss="orpo", solopo_forward="packed")
    assert torch.equal(step(twin, None, tiny_rows(), **keys)[0], step(model, None, tiny_rows(), **keys)[0])


# ---- memory


def test_logits_and_masks_exist_only_where_responses_are(monkeypatch):
    """The head's output is responses x vocabulary, and what is not causal as a whole is as narrow as a response: there
    is no mask of row x row."""
    model, rows, heads, narrow = tiny("llama"), tiny_rows(), [], []
    lower_right = attention.lower_right
    monkeypatch.setattr(attention, "lower_right", lambda *size: narrow.append(size[:2]) or lower_right(*size))
    handle = model.lm_head.register_forward_hook(lambda m, a, output: heads.append(tuple(output.shape)))
    try:
        step(model, None, rows, solopo_forward="packed", **(BASE | dict(pref_loss="orpo", solopo_align_on="both")))
    finally:
        handle.remove()
    responses = sum((len(r["chosen_ids"]) + len(r["rejected_ids"])) * (1 if r["long_is_short"] else 2) for r in rows)
    assert heads == [(1, responses, 40)]
    sizes = [(len(r["rejected_ids"]), len(r[f"{side}_prompt_ids"]) + len(r["rejected_ids"]))
             for r in rows for side in ("short", "long") if side == "short" or not r["long_is_short"]]  # fmt: skip
    assert narrow == sizes * 2  # two layers
    assert attention.AttentionMaskInterface()[attention.SEGMENTS]() is None


DISTILL = dict(solopo_align="distill", solopo_logp_chunk=4)


@pytest.mark.parametrize(
    "keys, most",
    [
        ({}, 22),
        (dict(solopo_align_on="both"), 28),
        (dict(solopo_logp_chunk=4), 22),
        (DISTILL, 22),
        (DISTILL | dict(solopo_align_on="both", solopo_distill_topk=5), 28),
    ],
)
@pytest.mark.parametrize("forward", ["packed", "two_stage"])
def test_no_tensor_is_positions_by_vocabulary(monkeypatch, forward, keys, most):
    """Of every tensor that forward and backward make: a vocabulary's width comes with responses' positions at most, or
    is a weight's gradient. Where the model cannot leave logits out, the watch sees them."""
    vocabulary, allowed = 4999, {(4999, 32), (32, 4999)}
    wide = lambda: {  # noqa: E731
        shape for shape in watched_step(monkeypatch, vocabulary, 500, forward, **keys).shapes
        if vocabulary in shape and shape not in allowed and math.prod(shape) > most * vocabulary
    }  # fmt: skip
    assert not wide()
    if forward == "two_stage":
        monkeypatch.setattr(TwoStages, "keeps_logits", property(lambda *_: False, lambda *_: None), raising=False)
        assert wide()


@pytest.mark.parametrize("forward", ["packed", "two_stage"])
def test_fp32_logits_exist_by_chunks(monkeypatch, forward):
    """In bf16 the logits of responses are that wide; what is made of them in fp32 has `solopo_logp_chunk` rows."""
    widths = {}
    for chunk in (4, 1024):
        live = watched_step(monkeypatch, 4999, 100, forward, change=lambda m: m.bfloat16(), solopo_logp_chunk=chunk)
        widths[chunk] = max(math.prod(shape) // 4999 for shape in live.fp32 if shape[-1:] == (4999,))
    assert widths[4] == 4 and widths[1024] >= 14


def test_longpo_in_two_stages_has_all_logits_of_the_chosen_alone(monkeypatch):
    """And those of the rejected, as those of the reference's pair, at responses: every row's are in the batch."""
    model, ref_model, rows, heads = tiny("qwen2"), tiny("qwen2", 1), tiny_rows(), []
    handles = [
        m.lm_head.register_forward_hook(lambda _, a, y: heads.append(tuple(y.shape))) for m in (ref_model, model)
    ]
    keys = dict(pref_loss="sigmoid", solopo_objective="longpo", solopo_longpo_lambda=0.8, ref_model="a reference")
    try:
        step(model, ref_model, rows, solopo_forward="two_stage", **keys)
    finally:
        [handle.remove() for handle in handles]
    spans = [(len(r[f"{side}_prompt_ids"]), len(r[f"{name}_ids"]), (side, name)) for r in rows
             for side, name in (("short", "chosen"), ("short", "rejected"), ("long", "rejected"))]  # fmt: skip
    union = [len({t for a, n, (of, _) in spans if of == side for t in range(a, a + n)}) for side in ("short", "long")]
    width = max(len(r["long_prompt_ids"]) + len(r[f"{n}_ids"]) for r in rows for n in ("chosen", "rejected"))
    assert heads == [(6, union[0], 40), (3, width - 1, 40), (3, union[1], 40)]


def test_memory_grows_with_the_prompt_by_activations_alone(monkeypatch):
    """What 1,000 tokens more of long prompt add to the peak is no more with a large vocabulary than with a small one,
    where logits of those positions alone would add 80 MB."""
    peak = {(v, n): watched_step(monkeypatch, v, n).peak for v in (50, 20000) for n in (500, 1500)}
    grown = {v: peak[v, 1500] - peak[v, 500] for v in (50, 20000)}
    assert grown[50] >= grown[20000] > 1000 * 32 * 4 * 2  # at least one hidden state per layer, fp32


def test_bf16_rounds_no_worse_than_two_stages():
    """Distance of rewards from fp32's, in bf16: rounding in either form, small beside the gap that is trained on."""
    from solopo_plugin.attention import prepare

    rows, keys = tiny_rows(), BASE | dict(pref_loss="sigmoid")
    truth, errors = None, {}
    for dtype, forward in ((torch.float32, "packed"), (torch.bfloat16, "packed"), (torch.bfloat16, "two_stage")):
        distances = []
        for seed in range(20, 30):
            model, ref_model = (deepcopy(qwen2_float64(s)).to(dtype) for s in (seed, REFERENCE))
            prepare(model)
            _, metrics = step(model, ref_model, rows, solopo_forward=forward, **keys)
            distances.append(torch.stack([metrics["solopo/reward_short"], metrics["solopo/reward_long"]]))
        rewards = torch.stack(distances).double()
        if truth is None:
            truth = rewards
        else:
            errors[forward] = (rewards - truth).abs().mean().item()
    gap = (truth[:, 0, :2] - truth[:, 1, :2]).abs().mean().item()
    print(f"bf16: rewards are off by {errors} of a mean gap of {gap}")
    assert errors["packed"] < 1.5 * errors["two_stage"]  # means over 60 rewards; equal but for chance
    assert errors["packed"] < 0.1 * gap


# ---- what cannot be packed


@pytest.mark.parametrize(
    "architecture, changes, reason",
    [
        ("phimoe", dict(sliding_window=8), r"sliding window \(8\)"),
        ("qwen2_moe", dict(use_sliding_window=True, sliding_window=8), "sliding_attention"),
        ("gemma3_text", dict(use_bidirectional_attention=True), "bidirectional"),
        (
            "gemma4_text",
            dict(num_kv_shared_layers=1, layer_types=["full_attention"] * 2, hidden_size_per_layer_input=0),
            "share the keys",
        ),
        ("gemma2", {}, "sliding_attention"),
        ("gemma2", dict(layer_types=["full_attention"] * 2), "sliding window|softcapping"),
        ("gpt_oss", {}, "sliding_attention"),
        ("llama", dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)), "dynamic"),
        ("minimax", {}, "linear_attention"),
        ("mamba2", dict(num_heads=8, head_dim=8), "AttentionInterface|recurrent"),
        ("nemotron", {}, "AttentionInterface"),
        ("helium", {}, "`helium` is not among the tested"),
        ("bart", dict(d_model=32, is_encoder_decoder=True), "encoder-decoder"),
    ],
)
def test_why_not_packed(architecture, changes, reason):
    import re

    from transformers import AutoConfig, AutoModelForCausalLM

    shape = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, max_position_embeddings=64)  # fmt: skip
    config = AutoConfig.for_model(architecture, **(shape | changes))
    model = AutoModelForCausalLM.from_config(config)
    if architecture == "bart":
        model.config.is_encoder_decoder = True
    assert re.search(reason, attention.why_not_packed(model))


def test_a_multimodal_model_is_not_packed():
    from types import SimpleNamespace

    model = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=False, get_text_config=lambda: None),
                            forward=lambda **kwargs: None)  # fmt: skip
    assert attention.why_not_packed(model) == "it is multimodal"


@pytest.mark.parametrize(
    "architecture, sentence",
    [("gemma2", "cannot run a packed row .softcap"), ("minimax", "1 of 2 layers"), ("nemotron", "0 of 2 layers")],
)
def test_a_model_that_slipped_through_is_stopped(architecture, sentence):
    """The second net: an attention that asks for more, and a layer that mixes tokens elsewhere, raise at once."""
    model = tiny(architecture)
    attention.prepare(model)
    row = PackedCollator()(tiny_rows())["policy"]
    with pytest.raises(RuntimeError, match=sentence):
        model(input_ids=row["input_ids"], position_ids=row["position_ids"], solopo_segments=row["plan"])
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2", "eager"])
def test_auto_packs_under_every_flash_attn(tiny_model, implementation):
    """The packed row has an attention of its own, whatever the recipe's `flash_attn` gives plain sequences."""
    from transformers import AutoModelForCausalLM

    from solopo_plugin.workflow import why_two_stages

    model = AutoModelForCausalLM.from_pretrained(tiny_model())
    model.config._attn_implementation = implementation
    assert why_two_stages("auto", model, None) is None and why_two_stages("packed", model) is None
    assert why_two_stages("two_stage", model) == "`solopo_forward: two_stage`"


GPU = torch.device("cuda", 0)


BY_SDPA, ONE_CALL = "SDPA, segment by segment", "torch's FlashAttention-2, all segments in one call"
APART = "torch's FlashAttention-2 in one call, segments from 6,144 tokens by cuDNN"


@pytest.mark.parametrize(
    "device, dtype, head_size, capability, how",
    [
        (GPU, torch.bfloat16, 128, (8, 0), ONE_CALL),
        (GPU, torch.bfloat16, 128, (8, 9), ONE_CALL),
        (GPU, torch.float16, 80, (9, 0), APART),
        (GPU, torch.bfloat16, 128, (10, 0), APART),
        (GPU, torch.bfloat16, 256, (9, 0), ONE_CALL),
        (GPU, torch.bfloat16, 128, (12, 0), ONE_CALL),
        (GPU, torch.float32, 128, (9, 0), BY_SDPA),
        (GPU, torch.bfloat16, 100, (9, 0), BY_SDPA),
        (GPU, torch.bfloat16, 512, (9, 0), BY_SDPA),
        (GPU, torch.bfloat16, 128, (7, 5), BY_SDPA),
        (torch.device("cpu"), torch.bfloat16, 128, (8, 0), BY_SDPA),
    ],
)
def test_which_attention_a_packed_row_has(tiny_model, monkeypatch, device, dtype, head_size, capability, how):
    """And that the log names it."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert attention.runs_varlen(device, dtype, head_size) == (how != BY_SDPA)
    model = AutoModelForCausalLM.from_pretrained(tiny_model())
    model.config.head_dim = head_size
    assert attention.how_a_step_runs(model, None, device, dtype) == f"A step runs packed; attention: {how}."


@pytest.mark.parametrize(
    "name, head_size, capability, how",
    [
        ("mistral, window", 128, (9, 0), f"{ONE_CALL}; windows of 5 tokens"),
        ("gemma3_text, window", 128, (9, 0), f"{APART}, where a layer has no window; windows of 5 tokens"),
        ("gemma3_text, window", 256, (9, 0), f"{ONE_CALL}; windows of 5 tokens"),
        ("gemma4_text, window", 256, (8, 0), f"{ONE_CALL}; in layers without a window, with heads of 512, {BY_SDPA}; "
                                             "windows of 5 tokens"),
        ("qwen3, window", 128, (7, 5), f"{BY_SDPA}; windows of 5 tokens"),
        ("qwen3", 128, (8, 0), ONE_CALL),
    ],
)  # fmt: skip
def test_the_log_names_windows(name, head_size, capability, how):
    model = SimpleNamespace(config=deepcopy(tiny(name).config))
    model.config.head_dim, model.config.global_head_dim = head_size, 512 if name.startswith("gemma4") else None
    said = attention.how_a_step_runs(model, None, GPU, torch.bfloat16, capability)
    assert said == f"A step runs packed; attention: {how}."


@pytest.mark.parametrize("implementation, said", [("sdpa", "SDPA"), ("eager", "eager"),
                                                  ("flash_attention_2", "FlashAttention-2")])  # fmt: skip
def test_the_log_names_the_attention_of_two_stages(tiny_model, implementation, said):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model())
    model.config._attn_implementation = implementation
    sentence = attention.how_a_step_runs(model, "a reason", torch.device("cpu"), torch.float32)
    assert sentence == f"A step runs in two stages, not packed: a reason; attention: {said}."
