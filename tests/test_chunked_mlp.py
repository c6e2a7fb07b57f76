"""MLPs in chunks: the same step in less memory. On several ranks: distributed/."""

from copy import deepcopy

import pytest
import torch
from by_hand import BASE, POLICY, qwen2_float64, step, tiny, tiny_rows, watched_step
from conftest import LOSS_BOUND, SGD, weight_bound

from solopo_plugin.chunked_mlp import chunk_mlps


def checkpointing(model, kind: str) -> None:
    """As the host enables it."""
    from types import MethodType

    from llamafactory.model.model_utils.checkpointing import _gradient_checkpointing_enable

    model.gradient_checkpointing_enable = MethodType(_gradient_checkpointing_enable, model)
    model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})


@pytest.mark.parametrize("kind", [None, "reentrant", "non_reentrant"])
@pytest.mark.parametrize("forward", ["packed", "two_stage"])
@pytest.mark.parametrize("tokens", [1, 7, 1000])
def test_chunks_change_nothing(tokens, forward, kind):
    """The model runs in float64; the step's fp32 log-probs may then round differently, once (2^-23 = 1.2e-7)."""
    results = []
    for chunk in (0, tokens):
        model = deepcopy(qwen2_float64(POLICY)).train()
        if kind:
            checkpointing(model, kind)
        if chunk:
            chunk_mlps(model, chunk)
        keys = BASE | dict(pref_loss="orpo", solopo_align_on="both", solopo_forward=forward)
        losses_B, _ = step(model, None, tiny_rows(), **(keys | dict(ref_model=None)))
        losses_B.mean().backward()
        results.append((losses_B.detach(), [p.grad for p in model.parameters()]))
    (losses, gradients), (chunked_losses, chunked_gradients) = results
    torch.testing.assert_close(chunked_losses, losses, rtol=5e-7, atol=0)
    for ours, truth in zip(chunked_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-6 * truth.abs().max().item())


def test_the_mlps_intermediates_are_gone_from_the_peak(monkeypatch):
    """With checkpointing, on a model whose MLPs are wide (1,024 for a hidden size of 32): 500 of 522 tokens at a time
    as against 50 need several times the memory, all of it the MLPs'."""
    peaks = {}
    for tokens in (0, 50):

        def change(model, tokens=tokens):
            checkpointing(model, "non_reentrant")
            if tokens:
                chunk_mlps(model, tokens)

        peaks[tokens] = watched_step(monkeypatch, 50, 500, change=change, intermediate_size=1024).peak
    mlp = 500 * 1024 * 4  # one of its intermediates, bytes
    assert peaks[0] > 4 * mlp and peaks[0] - peaks[50] > 3 * mlp


def test_a_mixture_of_experts_is_refused():
    with pytest.raises(ValueError, match=r"solopo_mlp_chunk: 8` needs a dense `mlp` .* has a mixture of experts"):
        chunk_mlps(deepcopy(tiny("qwen3_moe")), 8)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_in_chunks_is_the_run(run, recipe, tmp_path, kind):
    """Through the recipe's key; SGD, so that a wrong gradient would show in proportion."""
    common = dict(finetuning_type=kind, pref_loss="orpo", max_steps=3, **SGD)
    whole, chunks = (
        run(recipe(solopo_mlp_chunk=tokens, output_dir=str(tmp_path / str(tokens)), **common)) for tokens in (0, 64)
    )
    assert chunks.losses == pytest.approx(whole.losses, **LOSS_BOUND)
    for name, weight in whole.weights.items():
        torch.testing.assert_close(chunks.weights[name], weight, **weight_bound(3))
