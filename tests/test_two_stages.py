"""Two stages on models that cannot be packed: linear-attention hybrids, and multimodal checkpoints as text models.

Tiny models of the installed transformers' own classes, as the host would load them.
"""

import json

import pytest
import torch
from by_hand import BASE, by_hand_solopo, step, tiny, tiny_rows
from conftest import SGD, demo_rows
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, LlamaForCausalLM

from solopo_plugin import attention

TEXT = dict(vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, initializer_range=0.25, use_cache=False, pad_token_id=0, eos_token_id=0,
            bos_token_id=0, max_position_embeddings=256)  # fmt: skip
LINEAR = TEXT | dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
                     layer_types=["linear_attention", "full_attention"])  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
WINDOW = dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"])
ROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1]))
# Tokens from 40 on stand for images; no row has them.
QWENS = dict(image_token_id=40, video_token_id=41, vision_start_token_id=42, vision_end_token_id=43)
EYES = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, deepstack_visual_indexes=[])
SIGLIP = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
GEMMA4 = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=48, global_head_dim=16)
MODELS = {
    "qwen3_next": LINEAR | EXPERTS,
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": LINEAR | EXPERTS,
    "qwen3_5": dict(text_config=LINEAR, vision_config=EYES, **QWENS),
    "qwen3_5_moe": dict(text_config=LINEAR | EXPERTS, vision_config=EYES, **QWENS),
    "qwen3_vl": dict(text_config=TEXT | ROPE, vision_config=EYES, **QWENS),
    "gemma3": dict(text_config=TEXT | WINDOW, vision_config=SIGLIP, mm_tokens_per_image=4, image_token_index=40,
                   boi_token_index=41, eoi_token_index=42),
    "gemma4": dict(text_config=TEXT | WINDOW | GEMMA4, audio_config=None, image_token_id=40, boi_token_id=41,
                   eoi_token_id=42, audio_token_id=43, video_token_id=44,
                   vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                      num_key_value_heads=2, head_dim=8)),
    "mistral3": dict(text_config=TEXT | dict(model_type="mistral", sliding_window=None), image_token_index=40,
                     vision_config=SIGLIP | dict(model_type="pixtral", head_dim=8), spatial_merge_size=1),
}  # fmt: skip


def built(name: str):
    """As the host's loader chooses the class (model/loader.py)."""
    config = AutoConfig.for_model(name, **MODELS[name])
    seeing = type(config) in AutoModelForImageTextToText._model_mapping
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model_class = AutoModelForImageTextToText if seeing else AutoModelForCausalLM
        return model_class.from_config(config, dtype=torch.float32).train()


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if "5_moe" in n else n for n in MODELS])
@pytest.mark.parametrize("align", ["reward", "distill"])
def test_two_stages_are_each_sequence_alone(name, align):
    """Losses, metrics and gradients, in fp32, and logits at responses only."""
    model, rows, heads = built(name), tiny_rows(), []
    assert attention.why_not_packed(model) is not None
    handle = model.lm_head.register_forward_hook(lambda m, a, output: heads.append(output.shape[1]))
    keys = BASE | dict(pref_loss="simpo", solopo_align_on="both", solopo_align=align)
    losses_B, metrics = step(model, None, rows, solopo_forward="two_stage", **(keys | dict(ref_model=None)))
    handle.remove()
    responses = {side: {t for r in rows for n in ("chosen", "rejected")
                        for t in range(len(r[f"{side}_prompt_ids"]), len(r[f"{side}_prompt_ids"]) + len(r[f"{n}_ids"]))}
                 for side in ("short", "long")}  # fmt: skip
    assert heads == [len(responses["short"]), len(responses["long"])]
    truth = [by_hand_solopo(model, model, row, keys) for row in rows]
    by_hand = torch.stack([t["loss"] for t in truth]).float()  # a divergence by hand is in float64
    torch.testing.assert_close(losses_B, by_hand, rtol=1e-4, atol=1e-4)
    for metric in ("logps/chosen", "logps/rejected", "solopo/reward_long", "solopo/align_loss"):
        want = torch.stack([t[metric] for t in truth]).detach().float()
        torch.testing.assert_close(metrics[metric], want, rtol=1e-4, atol=1e-4)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(x.mean(), parameters, allow_unused=True, materialize_grads=True)
                    for x in (losses_B, by_hand))  # fmt: skip
    largest = max(g.abs().max().item() for g in theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * largest)


class KeepsAll(LlamaForCausalLM):
    """A model whose forward cannot leave logits out."""

    def forward(self, input_ids, attention_mask=None, use_cache=None, return_dict=None):
        return super().forward(input_ids, attention_mask, use_cache=use_cache, return_dict=return_dict)


DISTILL = dict(solopo_align="distill", solopo_align_on="both", solopo_anchor=0.5, solopo_reference="online")


@pytest.mark.parametrize("changes", [{}, DISTILL])
def test_a_model_that_keeps_all_logits_is_told_so(host_log, changes):
    """And computes the same; in every other model nothing is said."""
    model, reference = tiny("llama"), tiny("llama", 1)
    other = KeepsAll(model.config).train()
    other.load_state_dict(model.state_dict())
    keys = BASE | dict(pref_loss="orpo", solopo_forward="two_stage") | changes
    ours = step(model, reference, tiny_rows(), **keys)[0]
    assert not any("logits" in message for message in host_log)
    kept = step(other, reference, tiny_rows(), **keys)[0]
    torch.testing.assert_close(kept, ours, rtol=1e-5, atol=0)
    assert host_log[-1] == "KeepsAll has no `logits_to_keep`: both forwards keep all logits."


def save_multimodal(path, texts: list[str]) -> None:
    """A tiny Qwen3.5 as its checkpoints are: the class that sees, and a processor beside the tokenizer."""
    from make_tiny_model import train_tokenizer
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    tokenizer = train_tokenizer(texts, 1024, None)
    names = dict(vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>",
                 image_token_id="<|image_pad|>", video_token_id="<|video_pad|>")  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": [*names.values()]})
    text = LINEAR | dict(vocab_size=len(tokenizer), max_position_embeddings=4096)
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}
    config = AutoConfig.for_model("qwen3_5", **(MODELS["qwen3_5"] | dict(text_config=text) | ids))
    AutoModelForImageTextToText.from_config(config).save_pretrained(path)
    Qwen3VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen3VLVideoProcessor()).save_pretrained(path)


def test_a_multimodal_checkpoint_trains_as_a_text_model(run, recipe, tmp_path, host_log):
    """Through the host: what sees stays as it was, the text model learns, the processor is saved with it."""
    from safetensors.torch import load_file

    save_multimodal(tmp_path / "model", [json.dumps(row) for row in demo_rows()])
    result = run(recipe(model_name_or_path=str(tmp_path / "model"), max_samples=4, num_train_epochs=1.0))
    before = load_file(tmp_path / "model" / "model.safetensors")
    changed = {name for name, weight in result.weights.items() if not torch.equal(weight, before[name])}
    assert changed and not any("visual" in name for name in changed)
    assert any("visual" in name for name in before) and "model.language_model.layers.0.mlp.up_proj.weight" in changed
    assert all(0 < loss < 20 for loss in result.losses) and (result.dir / "processor_config.json").exists()
    said = "\n".join(host_log)
    assert "is multimodal: it is trained as a text model." in said
    assert "A step runs in two stages, not packed: it is multimodal; attention: SDPA." in said


SHARE = dict(num_kv_shared_layers=1, vocab_size_per_layer_input=1024, hidden_size_per_layer_input=8)
SHARING = {  # the last layer has the keys and values of the one before
    "gemma4_text": SHARE | dict(layer_types=["full_attention"] * 2, global_head_dim=8),
    "gemma3n_text": SHARE | dict(layer_types=["full_attention"] * 2, laurel_rank=4, altup_num_inputs=2),
}


@pytest.mark.parametrize("name", SHARING)
def test_layers_that_share_keys_are_checkpointed_as_their_gradients_need(
    run, recipe, tiny_model, tmp_path, host_log, monkeypatch, name
):
    """Bit for bit the run without checkpointing; the host's reentrant kind loses what reaches the shared keys later."""
    from solopo_plugin import workflow

    keys = dict(
        model_name_or_path=tiny_model(name, **SHARING[name]),
        max_samples=4,
        max_steps=1,
        pref_loss="orpo",
        max_grad_norm=0.0,
        **SGD,
    )
    off = run(recipe(disable_gradient_checkpointing=True, output_dir=str(tmp_path / "off"), **keys))
    assert not any("use_reentrant_gc" in message for message in host_log)
    on = run(recipe(output_dir=str(tmp_path / "on"), **keys))
    assert any(message.endswith("it is needed where layers share keys.") for message in host_log)
    assert on.losses == off.losses
    assert all(torch.equal(weight, on.weights[name]) for name, weight in off.weights.items())
    monkeypatch.setattr(workflow, "configure_checkpointing", lambda *_: None)
    lost = run(recipe(output_dir=str(tmp_path / "lost"), **keys))
    assert lost.losses == off.losses
    others = {name for name, weight in off.weights.items() if not torch.equal(weight, lost.weights[name])}
    assert "model.layers.0.self_attn.k_proj.weight" in others and "lm_head.weight" not in others
