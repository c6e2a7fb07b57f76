"""scripts/plan.py: published and hand-counted numbers, and counts of what torch really does."""

import json
import re
import sys
from dataclasses import replace

import plan
import pytest
import torch
import yaml
from benchmark_step import PRESETS
from by_hand import watched_step
from conftest import ROOT
from kept import bytes_kept
from plan import Setup, Shape, count, longest, peak, read_config, read_recipe, shape_of, step_flops, step_memory
from step_cost import (
    COUNTED,
    MODELS,
    counts,
    divergence_bytes,
    forward_flops,
    host_memory,
    layer_bytes,
    logits_bytes,
    on_meta,
    parts_of,
    setup_of,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from solopo_plugin.attention import why_not_packed
from solopo_plugin.data import BETWEEN, SoloCollator
from solopo_plugin.packing import PackedCollator
from solopo_plugin.qa.window import window_of

TINY = dict(
    model_type="qwen2", hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=300, max_position_embeddings=1024, tie_word_embeddings=True,
)  # fmt: skip
VARIANTS, SHIPPED = list(plan.VARIANTS), plan.GPU_JSON


@pytest.fixture(autouse=True)
def no_measurements(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "GPU_JSON", tmp_path / "gpu.json")


@pytest.fixture(scope="module")
def qwen() -> Shape:
    return shape_of(read_config("qwen2.5-7b"))


# ---- shapes


def test_shapes_are_the_published_ones(qwen):
    assert (qwen.layers, qwen.width, qwen.vocabulary) == (28, 3584, 152064)
    assert qwen.linear == pytest.approx(6.525e9, rel=1e-4) and qwen.parameters == 7_615_616_512  # as on the hub
    llama = shape_of(read_config("meta-llama/Llama-3.1-8B-Instruct"))  # its hub name is known without the hub
    assert (llama.layers, llama.width, llama.vocabulary) == (32, 4096, 128256)
    assert llama.linear == pytest.approx(6.979e9, rel=1e-4) and llama.parameters == 8_030_261_248
    published = {  # as on the hub; of Gemma 3 4B the language model
        "Qwen/Qwen3-4B": 4_022_468_096, "Qwen/Qwen3-8B": 8_190_735_360, "llama3.2-3b": 3_212_749_824,
        "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552, "google/gemma-3-1b-it": 999_885_952,
        "google/gemma-3-4b-it": 3_880_263_168,
    }  # fmt: skip
    assert {name: shape_of(read_config(name)).parameters for name in published} == published
    assert (qwen.key, qwen.query, llama.key, llama.query) == (4 * 128, 28 * 128, 8 * 128, 32 * 128)


@pytest.mark.parametrize("tied", [True, False])
def test_shape_from_a_folder_and_a_file(tmp_path, tied):
    config = AutoConfig.for_model(**TINY | {"tie_word_embeddings": tied})
    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config)
    for path in (tmp_path, tmp_path / "config.json"):
        shape = shape_of(read_config(str(path)))
        assert shape.parameters == model.num_parameters()
        # per layer: q and o 64 x 64, k and v 64 x 32, three of 64 x 160
        assert shape.linear == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)
        assert shape.fans == 2 * (2 * 128 + 2 * 96 + 3 * 224)


def test_an_unknown_model_and_one_with_experts_are_refused():
    with pytest.raises(ValueError, match="No model config at nothing: give a folder, a config.json or one of"):
        read_config("nothing")
    experts = AutoConfig.for_model("mixtral", **{k: v for k, v in TINY.items() if k != "model_type"})
    with pytest.raises(ValueError, match="`mixtral` has experts"):
        shape_of(experts)


def test_multimodal_models_and_other_shapes_are_refused():
    """Within a multimodal configuration the sizes are those of its parts; a convolution is no expert."""
    for kind in ("gemma3", "qwen3_5", "gemma4"):
        sentence = rf"`{kind}` is multimodal: save its language model \(python scripts/text_part.py MODEL FOLDER\)"
        with pytest.raises(ValueError, match=sentence):
            shape_of(AutoConfig.for_model(kind))
    for kind in ("gpt2", "opt"):
        with pytest.raises(ValueError, match=f"shape of `{kind}` cannot be read: .* no number `intermediate_size`; "):
            shape_of(AutoConfig.for_model(kind))
    keys = {k: v for k, v in TINY.items() if k not in ("model_type", "num_key_value_heads")}
    shape = shape_of(AutoConfig.for_model("gpt_neox", **keys))  # each head has its own keys
    assert (shape.query, shape.key, shape.heads, shape.key_heads) == (64, 64, 4, 4)


def test_the_window_counts_yarn(tmp_path):
    assert window_of(read_config("qwen2.5-7b")) == 32768 and window_of(read_config("llama3.1-8b")) == 131072
    assert window_of(read_config("meta-llama/Llama-3.2-3B-Instruct")) == 131072  # not its factor 32 times 8192
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}  # as Qwen's model card has it
    config = AutoConfig.for_model(**TINY | {"max_position_embeddings": 32768}).to_dict()
    config.pop("rope_parameters")
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_scaling": yarn}))
    assert window_of(read_config(str(tmp_path))) == 131072


# ---- FLOPs


@pytest.mark.parametrize(
    "L, expected",
    [
        (8192, (1066, 1473, 678, 645, 590, 524)),
        (16384, (2346, 3022, 1318, 1258, 1203, 1141)),
        (32768, (5634, 6484, 2962, 2848, 2794, 2739)),
    ],
)
def test_tflop_per_sample_of_qwen(qwen, L, expected):
    """Worked out independently of this code, to the TFLOP, for S 1024 and R 256; the last is the vanilla pair."""
    steps = [sum(step_flops(qwen, variant, 1024, 256, L).values()) / 1e12 for variant in VARIANTS]
    assert tuple(round(step) for step in steps) == expected


def test_a_reference_costs_a_quarter_online_and_nothing_cached(qwen):
    for L in (8192, 16384, 32768):
        plain, online, cached = (step_flops(qwen, "V0", 1024, 256, L, r) for r in (None, "online", "cached"))
        assert sum(online.values()) / sum(plain.values()) == pytest.approx(1.25, abs=0.01)
        assert cached == plain
    # of the packed row only the short pair: (S + 2R) tokens, 2R logits, once
    S, R = 1024, 256
    parts = 2 * qwen.linear * (S + 2 * R) + 2 * qwen.width * qwen.vocabulary * 2 * R
    parts += 2 * qwen.layers * qwen.query * ((S + R) ** 2 + R * (2 * S + R))
    assert step_flops(qwen, "S3", S, R, 8192, "online")["reference"] == parts


@pytest.mark.parametrize("kind", ["plain", "checkpointing", "frozen"])
def test_matrix_products_are_what_torch_counts(kind):
    """A long pair's forward and backward in a real model. Not attention: its kernel on the CPU is not counted."""
    R, L = 8, 64
    config = AutoConfig.for_model(**TINY | {"tie_word_embeddings": False})
    model = AutoModelForCausalLM.from_config(config).train()
    model.enable_input_require_grads()  # as the host does for both
    if kind == "checkpointing":  # reentrant, the host's default: the whole layer runs again
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    if kind == "frozen":
        model.requires_grad_(False)
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=torch.zeros(2, L + R, dtype=torch.long), use_cache=False).logits.sum().backward()
    products = sum(counter.get_flop_counts()["Global"][op] for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    flops = step_flops(shape_of(config), "V0", 0, R, L, None, kind == "checkpointing", kind == "frozen")
    assert products == flops["linear"] + flops["head"]


def test_attention_is_the_number_of_visible_pairs():
    """Two products of 2 FLOPs per (query, visible key) pair and channel; half a query more per diagonal is left out."""
    shape, S, R, L = Shape(3, 64, 48, 16, 0, 0, 0, 0, 0), 400, 300, 2000
    row = dict(name="r", long_is_short=False, short_prompt_ids=[1] * S, long_prompt_ids=[2] * L, chosen_ids=[3] * R,
               rejected_ids=[4] * R)  # fmt: skip
    pairs = 0
    for segment in PackedCollator()([row])["policy"]["plan"].segments:
        queries, keys = segment.query[1] - segment.query[0], sum(b - a for a, b in segment.keys)
        pairs += queries * (keys - queries) + queries**2 / 2
    flops = step_flops(shape, "S3", S, R, L, None, checkpointing=False)
    assert flops["attention"] == 3.5 * 4 * shape.layers * shape.query * pairs


@pytest.mark.parametrize("window", [1, 350, 900, 2301])
def test_a_window_is_what_its_queries_see(window):
    """Key by key of a packed row, in two layers of three; the half query that the diagonal leaves out is left out."""
    shape, S, R, L = Shape(3, 64, 48, 16, 0, 0, 0, 0, 0, windowed=2, window=window), 400, 300, 2000
    row = dict(name="r", long_is_short=False, short_prompt_ids=[1] * S, long_prompt_ids=[2] * L, chosen_ids=[3] * R,
               rejected_ids=[4] * R)  # fmt: skip
    full, cut = 0.0, 0.0
    for segment in PackedCollator()([row])["policy"]["plan"].segments:
        queries, keys = segment.query[1] - segment.query[0], sum(b - a for a, b in segment.keys)
        before = range(keys - queries, keys)  # keys before a query's own
        full += sum(n + 1 / 2 for n in before)
        cut += sum(n + 1 / 2 if n < window else window for n in before)
    attention = step_flops(shape, "S3", S, R, L, None, checkpointing=False)["attention"]
    assert attention == 3.5 * 4 * shape.query * (full + 2 * cut) and (cut == full) == (window == 2301)


def test_layers_with_a_window_are_read_from_the_configuration(monkeypatch, capsys):
    gemma, qwen = (shape_of(read_config(name)) for name in ("gemma-3-1b-it", "qwen2.5-7b"))
    assert (gemma.windowed, gemma.window, qwen.windowed) == (22, 512, 0)  # every sixth of 26 layers is full
    config = AutoConfig.for_model(**TINY | {"model_type": "mistral", "sliding_window": 64})
    assert (shape_of(config).windowed, shape_of(config).window) == (2, 64)
    said = lines_of(monkeypatch, capsys, "--model", "gemma-3-1b-it", "--long", "8192")[4]
    assert "26 layers of width 1,152, 22 of them with a window of 512 tokens, vocabulary 262,144;" in said


def test_tokens_and_logits_of_every_variant():
    counts = {variant: count(variant, 1000, 100, 8000) for variant in VARIANTS}
    assert counts == {"V0": (16200, 16200), "S0": (24300, 24300), "S1": (10300, 10300), "S2": (10300, 300),
                      "S3": (9300, 300), "V*": (8200, 200)}  # fmt: skip
    row = dict(name="r", long_is_short=False, short_prompt_ids=[1] * 1000, long_prompt_ids=[2] * 8000,
               chosen_ids=[3] * 100, rejected_ids=[4] * 100)  # fmt: skip
    for both in (False, True):
        packed = PackedCollator(long_pair=both)([row])["policy"]
        assert count("S3", 1000, 100, 8000, both) == (packed["input_ids"].shape[1], len(packed["positions_K"]))


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("rejected", [2, 4])
def test_tokens_and_logits_of_several_rejected_responses(qwen, both, rejected):
    """As the collators lay a row out; its reference is shown the short pairs."""
    lists = [i for _ in range(rejected) for i in (BETWEEN, *[4] * 100)][1:]
    row = dict(name="r", long_is_short=False, short_prompt_ids=[1] * 1004, long_prompt_ids=[2] * 8000,
               chosen_ids=[3] * 100, rejected_ids=lists)  # fmt: skip
    lengths = (1004, 100, 8000)
    packed, longpo = (PackedCollator(longpo=lp, long_pair=both)([row]) for lp in (False, True))
    for variant, batch in (("S3", packed), ("L3", longpo)):
        want = (batch["policy"]["input_ids"].shape[1], len(batch["policy"]["positions_K"]))
        assert count(variant, *lengths, both, rejected) == want
        reference = step_flops(qwen, variant, *lengths, "online", both=both, rejected=rejected)["reference"]
        again = batch["reference"]
        alone = forward_flops(qwen, parts_of("S3", *lengths, False, rejected)[:-1], again["input_ids"].shape[1],
                              len(again["positions_K"]))  # fmt: skip
        assert reference == sum(alone)
    padded = SoloCollator(0, both)([row])
    short, long = padded["input_ids"].numel(), padded["long_input_ids"].numel()
    assert counts("S2", *lengths, both, rejected) == (short + long, 0, (2 * rejected + 1 + both * rejected) * 100)
    assert counts("L2", *lengths, rejected=rejected) == ((1 + rejected) * 8100, 0, 8100 + rejected * 100)
    assert count("V0", *lengths, rejected=rejected)[0] == 2 * rejected * 8100
    one, several = (step_memory(qwen, "S3", *lengths, None, Setup(both=both, rejected=n)) for n in (1, rejected))
    tokens = [count("S3", *lengths, both, n)[0] for n in (1, rejected)]
    assert several["checkpoints"] / one["checkpoints"] == tokens[1] / tokens[0]
    assert tokens[1] - tokens[0] == (rejected - 1) * (1 + both) * 100


@pytest.mark.parametrize("both", [False, True])
def test_tokens_and_logits_of_the_packages_own_forms(both):
    row = dict(name="r", long_is_short=False, short_prompt_ids=[1] * 1004, long_prompt_ids=[2] * 8000,
               chosen_ids=[3] * 100, rejected_ids=[4] * 100)  # fmt: skip
    packed = PackedCollator(longpo=True)([row])["policy"]
    assert count("L3", 1004, 100, 8000) == (packed["input_ids"].shape[1], len(packed["positions_K"]))
    padded = SoloCollator(0, both)([row])
    short, long = padded["input_ids"].numel(), padded["long_input_ids"].numel()
    assert counts("S2", 1004, 100, 8000, both) == (short + long, 0, (3 + both) * 100)
    assert counts("L2", 1004, 100, 8000) == (2 * 8100, 0, 8100 + 100)
    assert counts("SFT", 1004, 100, 8000) == (8100, 8100, 0)


def test_longpos_reference_is_of_the_short_pair(qwen):
    packed, two, host = (step_flops(qwen, v, 1000, 100, 8000, "online")["reference"] for v in ("L3", "L2", "V0"))
    assert packed == step_flops(qwen, "S3", 1000, 100, 8000, "online")["reference"]
    assert packed < two < host / 7


# ---- memory


def test_memory_of_a_16k_pair_of_qwen(qwen):
    """200.7 KB of checkpoints per token; 61 GB of logits, 81 with a reference; about 2 at the responses, under 1."""
    memory = {key: step_memory(qwen, v, 1024, 256, 16384, r) for key, v, r in (
        ("V0", "V0", None), ("reference", "V0", "online"), ("S3", "S3", None))}  # fmt: skip
    assert memory["V0"]["checkpoints"] / count("V0", 1024, 256, 16384)[0] == 200_704
    assert round(memory["V0"]["logits"] / 1e9) == 61 and round(memory["reference"]["logits"] / 1e9) == 81
    assert round(memory["S3"]["logits"] / 1e9, 1) == 1.9
    small = step_memory(qwen, "S3", 1024, 256, 16384, None, Setup(chunk=256))
    assert small["logits"] < 1e9


@pytest.mark.parametrize("zero, expected", [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_zero_is_as_published(zero, expected):
    """arXiv:1910.02054, figure 1: 7.5e9 parameters on 64 GPUs, in GB; ours adds what ZeRO-3 gathers."""
    shape = Shape(1, 1, 1, 1, 1, 1, int(7.5e9), int(7.5e9), 0)
    memory = step_memory(shape, "S3", 1, 1, 1, None, Setup(gpus=64, zero=zero))
    model = sum(memory[part] for part in ("weights", "gradients", "optimizer")) - (2e9 if zero == 3 else 0)
    assert model / 1e9 == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("nodes, gpus, param", [(1, 4, True), (2, 8, True), (1, 4, False)])
def test_host_memory_is_what_deepspeed_estimates(qwen, nodes, gpus, param):
    """Its own estimator, without the half that it adds for buffers; 8 GPUs take as much in all as one."""
    stage3 = pytest.importorskip("deepspeed.runtime.zero.stage3")
    theirs, *_ = stage3.estimate_zero3_model_states_mem_needs(
        qwen.parameters, 0, gpus // nodes, nodes, cpu_offload_params=param, additional_buffer_factor=1
    )
    ours = host_memory(qwen, None, Setup(gpus=gpus, zero=3, offload_optimizer=True, offload_param=param))
    assert sum(ours.values()) / nodes == pytest.approx(theirs, abs=1)


def test_host_memory_follows_the_setup(qwen):
    assert set(host_memory(qwen, "online", Setup(zero=3)).values()) == {0}
    both = Setup(zero=3, offload_optimizer=True, offload_param=True)
    assert host_memory(qwen, "online", both)["parameters"] == 2 * host_memory(qwen, "cached", both)["parameters"]
    lora = host_memory(qwen, "online", replace(both, lora_rank=16))
    assert lora == {"optimizer": 16 * 16 * qwen.fans, "parameters": 2 * qwen.parameters + 2 * 16 * qwen.fans}


def test_all_logits_of_longpo_and_sft(qwen):
    """LongPO in two stages keeps a copy of the chosen sequence; sft keeps all in fp32, as the host's DPO."""
    S, R, L = 1024, 256, 16384
    sft, two, packed = (step_memory(qwen, v, S, R, L)["logits"] for v in ("SFT", "L2", "L3"))
    assert sft == qwen.vocabulary * 12 * (L + R) == step_memory(qwen, "V0", S, R, L)["logits"] / 2
    assert two == qwen.vocabulary * (4 * (2 * (L + R) + R) + 12 * 1024)
    assert packed == qwen.vocabulary * (4 * (L + R - 1 + 2 * R) + 12 * 1024)


def test_parts_of_memory_follow_the_setup(qwen):
    def parts(variant="V0", reference="online", **keys):
        return step_memory(qwen, variant, 1024, 256, 8192, reference, Setup(**keys))

    full = parts()
    assert full["reference"] == 2 * qwen.parameters and parts(reference="cached")["reference"] == 0
    lora = parts(lora_rank=16, weights=4, gradients=4, optimizer=8)
    assert lora["reference"] == 0  # the adapter is switched off instead
    assert lora["weights"] == 2 * qwen.parameters + 4 * 16 * qwen.fans and lora["optimizer"] == 8 * 16 * qwen.fans
    offloaded = parts(gpus=4, zero=3, offload_optimizer=True, offload_param=True)
    assert (offloaded["gradients"], offloaded["optimizer"], offloaded["weights"]) == (0, 0, 2e9)
    assert parts(batch=2)["checkpoints"] == 2 * full["checkpoints"] == 2 * 200_704 * 2 * 8448
    assert parts("S2")["layer"] < parts("S3")["layer"] < full["layer"]  # per forward: long, all of a row, long pair
    mlp, tokens = 2 * qwen.inner, count("S3", 1024, 256, 8192)[0]
    whole, chunked = (parts("S3", mlp_chunk=chunk)["layer"] for chunk in (0, 1024))
    assert whole - chunked == (tokens - 1024) * 7 * mlp  # four that a layer keeps, three gradients
    quantised = parts(lora_rank=16, frozen=0.5)
    assert quantised["weights"] == 0.5 * qwen.linear + 2 * (qwen.parameters - qwen.linear) + 2 * 16 * qwen.fans
    assert peak(full) == sum(full.values()) - full["layer"] and full["layer"] < full["logits"]


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("dtype, chunk", [(torch.float32, 2), (torch.bfloat16, 2), (torch.bfloat16, 1024)])
def test_self_distillation_takes_what_is_counted(monkeypatch, dtype, chunk, both):
    """Rows of the vocabulary's width at a step's peak: what two vocabularies differ by, less embedding and head."""
    size = dtype.itemsize
    keys = dict(solopo_logp_chunk=chunk, solopo_align_on="both" if both else "chosen", solopo_align="distill",
                hidden_size=4, num_attention_heads=2, num_key_value_heads=1, intermediate_size=8)  # fmt: skip
    small, large = (
        watched_step(monkeypatch, v, 40, change=lambda model: model.to(dtype), **keys).peak for v in (20000, 40000)
    )
    rows = (large - small) / 20000 / size - (4 + 4)
    shape = Shape(2, 4, 4, 2, 8, 1, 0, 0, 0)
    setup = Setup(element=size, chunk=chunk, both=both, divergences=1)
    narrow, aligned = (28, 14) if both else (22, 8)  # responses of 8 and 6 tokens
    counted = logits_bytes(shape, 0, narrow, chunk, size, False) + divergence_bytes(shape, narrow, aligned, setup)
    assert 0.85 * counted <= rows * size <= 1.02 * counted
    plain = logits_bytes(shape, 0, narrow, chunk, size, False)
    assert counted - plain >= narrow * size
    for variant, more in (("S3", True), ("S2", True), ("V0", False), ("L3", False)):
        of = [step_memory(shape, variant, 1, 1, 1, None, replace(setup, divergences=n))["logits"] for n in (0, 1)]
        assert (of[0] < of[1]) == more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", COUNTED)
def test_a_layer_keeps_what_is_counted(architecture, dtype):
    """Bytes that autograd saves per token and layer: a model of three layers less one of two, parameters apart.

    Beside what is counted, in fp32: 1 / rms of each norm (of each head, where heads are normed), attention's
    log-sum-exp per head, and Gemma's 1 + weight, once for all tokens.
    """
    tokens, saved, own = 64, [], {} if architecture == "qwen2" else {"head_dim": 32}
    beside = {"qwen3": 2 + 6, "gemma3_text": 4 + 6 + (4 * 64 + 2 * 32) / tokens, "olmo3": 4}.get(architecture, 2)
    for layers in (2, 3):
        kinds = {"layer_types": ["sliding_attention"] * layers} if architecture == "gemma3_text" else {}
        changed = {"model_type": architecture, "num_hidden_layers": layers, "dtype": dtype, "pad_token_id": 0}
        config = AutoConfig.for_model(**TINY | own | kinds | changed)
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        with bytes_kept(model) as kept:
            model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
        saved.append(sum(kept.values()))
    expected = layer_bytes(shape_of(config), dtype.itemsize) + 4 * (beside + config.num_attention_heads)
    assert (saved[1] - saved[0]) / tokens == expected


def test_what_a_layer_keeps_is_said_where_it_is_not_counted(monkeypatch, capsys):
    said = {name: lines_of(monkeypatch, capsys, "--model", name, "--long", "8192") for name in MODELS}
    told = {
        name for name, lines in said.items() if any("the longest prompt is no upper bound;" in line for line in lines)
    }
    assert told == {"qwen3.5-9b"}
    assert {AutoConfig.for_model(**MODELS[name]).model_type for name in told}.isdisjoint(COUNTED)


TARGETS = ["all", " all", "q_proj,v_proj", " mlp.down_proj", ["k_proj"], "model.layers.0.mlp.up_proj", "q_proj,W_pack"]


@pytest.mark.parametrize("target", TARGETS)
def test_lora_trains_what_is_counted(target):
    from peft import LoraConfig, get_peft_model

    config = AutoConfig.for_model(**TINY)
    names = [name.strip() for name in target.split(",")] if isinstance(target, str) else target
    lora = LoraConfig(r=8, target_modules="all-linear" if names == ["all"] else names, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_config(config), lora)
    assert 8 * shape_of(config, target).fans == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_adapters_on_what_is_no_matrix_are_refused(monkeypatch, tmp_path):
    recipe = str(write(tmp_path, model_name_or_path="qwen2.5-7b", finetuning_type="lora"))
    for target, sentence in (
        ("q_proj,lm_head", "`lora_target` names `lm_head`, which is not planned; plan without it."),
        ("c_attn", "`lora_target` names no matrix of the layers; write all, or some of down_proj, gate_proj, "),
    ):
        monkeypatch.setattr(sys, "argv", ["plan.py", "--recipe", recipe, f"lora_target={target}"])
        with pytest.raises(SystemExit, match=sentence):
            plan.main()


def test_longest_is_the_last_that_fits(qwen):
    setup = Setup(gpus=4, zero=3, offload_optimizer=True, offload_param=True)
    for variant in VARIANTS:
        fits = longest(qwen, variant, 1024, 256, None, setup, 80e9)
        need = [peak(step_memory(qwen, variant, 1024, 256, L, None, setup)) for L in (fits, fits + 1)]
        assert need[0] <= 80e9 < need[1]
    assert longest(qwen, "V0", 1024, 256, None, setup, 1e9) == 0


# ---- recipes


def test_recipes_of_the_paper_and_for_one_gpu():
    recipe, setup = read_recipe(ROOT / "examples/yaml/qwen2.5-7b/solo_dpo.yaml", gpus=4)
    assert recipe["cutoff_len"] == 10240
    assert setup == Setup(gpus=4, zero=3, offload_optimizer=True, offload_param=True)
    _, setup = read_recipe(ROOT / "examples/yaml/models/lora.yaml", gpus=1)
    assert setup == Setup(lora_rank=16, frozen=0.5, weights=6, gradients=4, optimizer=8)


def test_every_shipped_recipe_is_planned():
    planned = 0
    for path in sorted(ROOT.glob("examples/yaml/**/*.yaml")):
        recipe = yaml.safe_load(path.read_text())
        if "stage" not in recipe:  # of making rows, or of evaluation
            continue
        assert read_recipe(path, gpus=4)[1].zero == 3 * ("deepspeed" in recipe)
        planned += 1
    assert planned == 21


@pytest.mark.parametrize(
    "keys, shared",
    [
        (dict(deepspeed={"zero_optimization": {"stage": 1}}), {"optimizer"}),
        (dict(deepspeed={"zero_optimization": {"stage": 2}}), {"optimizer", "gradients"}),
        (dict(deepspeed={"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 0}}),
         {"optimizer", "gradients", "weights", "reference"}),
        (dict(), set()),
        (dict(finetuning_type="lora"), set()),
    ],
)  # fmt: skip
def test_what_several_gpus_share(qwen, tmp_path, keys, shared):
    """ZeRO's stages share what they should, a quarter for each of four; DDP's buckets double the gradients."""
    path = write(tmp_path, bf16=True, per_device_train_batch_size=1, **keys)
    one, four = (step_memory(qwen, "V0", 1024, 256, 8192, "online", read_recipe(path, n)[1]) for n in (1, 4))
    for part in one:
        times = 0.25 if part in shared else 2 if part == "gradients" and "deepspeed" not in keys else 1
        assert four[part] == pytest.approx(one[part] * times)


def write(tmp_path, **keys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"stage": "solopo", "finetuning_type": "full", **keys}))
    return path


@pytest.mark.parametrize(
    "keys, expected",
    [
        (dict(), Setup(weights=4, gradients=4, optimizer=8, frozen=4, element=4, batch=8)),
        (dict(bf16=True), Setup(weights=6, gradients=4, optimizer=8, batch=8)),
        (dict(pure_bf16=True, optim="adamw_torch"), Setup(optimizer=4, batch=8)),
        (dict(bf16=True, deepspeed="examples/yaml/deepspeed/ds_z2.json"), Setup(zero=2, batch=8)),
        (dict(bf16=True, deepspeed={"zero_optimization": {"stage": 1}}, optim="adamw_8bit"),
         Setup(zero=1, optimizer=6, batch=8)),
        (dict(pure_bf16=True, optim="sgd", disable_gradient_checkpointing=True, solopo_logp_chunk=64,
              solopo_mlp_chunk=32, solopo_align_on="both", per_device_train_batch_size=1),
         Setup(optimizer=0, checkpointing=False, chunk=64, mlp_chunk=32, both=True)),
        (dict(solopo_align="distill", solopo_anchor=0.1, pure_bf16=True, optim="sgd"),
         Setup(optimizer=0, batch=8, divergences=2)),
        (dict(solopo_objective="distill", pure_bf16=True, optim="sgd"), Setup(optimizer=0, batch=8, divergences=1)),
    ],
)  # fmt: skip
def test_precision_and_zero_of_a_recipe(tmp_path, keys, expected):
    assert read_recipe(write(tmp_path, **keys), gpus=1)[1] == expected


@pytest.mark.parametrize(
    "keys, sentence",
    [
        (dict(stage="kto"), "only recipes of `stage: solopo`, `dpo` and `sft`, without FSDP, can be planned"),
        (dict(fsdp="full_shard"), "without FSDP, can be planned"),
        (dict(rope_scaling="yarn"), "`rope_scaling` is not planned; put it into the model's config.json"),
        (
            dict(finetuning_type="lora", additional_target="lm_head"),
            "`additional_target` trains whole modules, which is",
        ),
        (dict(finetuning_type="lora", resize_vocab=True), "`resize_vocab` trains whole modules, which is not planned"),
        (dict(use_galore=True), "`use_galore` changes what is kept in memory, which is not planned; plan without it."),
        (dict(finetuning_type="lora", use_dora=True), "`use_dora` changes what is kept in memory"),
        (dict(solopo_forwards="packed"), "Unknown key `solopo_forwards` in the recipe. Did you mean `solopo_forward`?"),
        (dict(finetuning_type="freeze"), "only full and lora, with .*; got freeze"),
        (dict(optim="lion_32bit"), "got full, lion_32bit"),
        (dict(solopo_mlp_chunk="big"), "`solopo_mlp_chunk` must be a whole number >= 0, got 'big'."),
        (dict(solopo_overlength="cut"), "`solopo_overlength` must be one of error, drop; got 'cut'."),
        (
            dict(per_device_train_batch_size="abc"),
            "`per_device_train_batch_size` must be a whole number >= 1, got 'abc'.",
        ),
        (
            dict(per_device_train_batch_size=0),
            "recipe.yaml: `per_device_train_batch_size` must be a whole number >= 1, got 0.",
        ),
        (dict(gradient_accumulation_steps="x"), "`gradient_accumulation_steps` must be a whole number >= 1, got 'x'."),
        (dict(cutoff_len="abc"), "`cutoff_len` must be a whole number >= 1, got 'abc'."),
        (dict(cutoff_len=2e3), "`cutoff_len` must be a whole number >= 1, got 2000.0."),
        (dict(finetuning_type="lora", lora_rank="abc"), "`lora_rank` must be a whole number >= 1, got 'abc'."),
        (dict(quantization_bit="abc"), "`quantization_bit` must be a whole number >= 1, got 'abc'."),
        (
            dict(learning_rate="abc"),
            "recipe.yaml: `learning_rate` must be a number, got 'abc'; write it without quotes",
        ),
        (dict(deepspeed="README.md"), "`deepspeed: README.md` is no JSON .Expecting value"),
    ],
)
def test_what_cannot_be_planned_is_refused(tmp_path, keys, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_recipe(write(tmp_path, **keys), gpus=1)


def test_deepspeed_is_read_where_training_reads_it(tmp_path, monkeypatch):
    """Below the current folder; this repository's files from anywhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    assert read_recipe(write(tmp_path, deepspeed="own.json"), gpus=1)[1].zero == 1
    shipped = "examples/yaml/deepspeed/ds_z3.json"
    assert read_recipe(write(tmp_path, deepspeed=shipped), gpus=1)[1].zero == 3
    (tmp_path / shipped).parent.mkdir(parents=True)
    (tmp_path / "own.json").rename(tmp_path / shipped)
    assert read_recipe(write(tmp_path, deepspeed=shipped), gpus=1)[1].zero == 1


# ---- the command


def test_the_command_prints_every_configuration(monkeypatch, capsys):
    recipe = str(ROOT / "examples/yaml/qwen2.5-7b/solo_orpo.yaml")
    monkeypatch.setattr(sys, "argv", ["plan.py", "--recipe", recipe, "--gpus", "4", "--long", "8192"])
    plan.main()
    out = capsys.readouterr().out.splitlines()
    work = {line.split()[0]: line.split() for line in out if line[:2] in VARIANTS and len(line.split()) == 8}
    assert list(work) == VARIANTS
    assert work["S3"][1] == "9984" and work["S3"][6] == "590.2" and work["S3"][7] == "1.81"
    room = [line for line in out if line[:2] in VARIANTS and len(line.split()) == 10 and line.split()[-1].isdigit()]
    assert len(room) == len(VARIANTS)


@pytest.mark.parametrize(
    "argv, sentence",
    [
        ([], "Give `--recipe` or `--model`."),
        (["--model", "nothing"], "No model config at nothing"),
        (["--recipe", "nothing.yaml"], "No such file"),
        (["--recipe", "README.md"], "README.md: (only recipes|the recipe is no YAML)"),
        (["--recipe", "examples/yaml/models/lora.yaml", "seed"], "`seed` is no `key=value`"),
        (["--model", "qwen2.5-7b", "seed=1"], "`key=value` overrides a recipe's key: give `--recipe`."),
        (["--model", "qwen2.5-7b", "--gpus", "0"], "`--gpus` must be at least 1, got 0."),
        (["--model", "qwen2.5-7b", "--gpu-memory", "nan"], "`--gpu-memory` must be a number of GB above 0, got nan."),
        (["--model", "qwen2.5-7b", "--gpu-memory", "-5"], "`--gpu-memory` must be a number of GB above 0, got -5.0."),
        (["--model", "qwen2.5-7b", "--nodes", "2"], "1 GPUs cannot be in 2 nodes"),
        (
            ["--model", "qwen2.5-7b", "--response", "32768", "--long", "9"],
            "leaves no room in the model's window of 32,768",
        ),
    ],
)
def test_the_command_says_what_is_wrong(monkeypatch, argv, sentence):
    monkeypatch.setattr(sys, "argv", ["plan.py", *argv])
    with pytest.raises(SystemExit, match=sentence):
        plan.main()


# ---- the answer


def lines_of(monkeypatch, capsys, *argv: str) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["plan.py", *argv])
    plan.main()
    return capsys.readouterr().out.splitlines()


PACKED = (
    "A step runs packed; attention: torch's FlashAttention-2, all segments in one call. Packed, since `solopo_forward` "
    "is auto and qwen2 is among the tested models. "
)
OFFLOADED = "A GPU holds the same on 1 as on many: the model's state is in host memory, only rows are shared."
WHOLE = "Each GPU holds the whole model with its optimizer, however many there are."
LORA = "examples/yaml/models/lora.yaml"
QWEN = "model_name_or_path=Qwen/Qwen2.5-7B-Instruct template=qwen"
ANSWERS = {
    "examples/yaml/qwen2.5-7b/solo_orpo.yaml --gpus 4": (
        "Fits. "
        + PACKED
        + "It takes 8.4 GB on each of 4 GPUs of 80 GB at a prompt of 9,984 tokens. The longest prompt is 32,512"
        " tokens, by the model's window of 32,768; memory allows 142,746. It is 1.86 times as fast as the "
        "host's `stage: dpo` on the same long prompts, which takes 43.5 GB and reaches 18,998 tokens.",
        "Host memory: 137.1 GB in all (121.8 GB optimizer, 15.2 GB parameters), 137.1 GB on the one node, "
        "however many GPUs; DeepSpeed advises 1.5 times as much, 205.6 GB in all, for buffers.",
        "GPUs: an optimizer step has 64 rows, 16 on each GPU. " + OFFLOADED,
    ),
    "examples/yaml/qwen2.5-7b/solo_orpo.yaml --gpus 1": (
        "Fits. "
        + PACKED
        + "It takes 8.4 GB on the GPU of 80 GB at a prompt of 9,984 tokens. The longest prompt is 32,512 "
        "tokens, by the model's window of 32,768; memory allows 142,746. It is 1.86 times as fast as the "
        "host's `stage: dpo` on the same long prompts, which takes 43.5 GB and reaches 18,998 tokens.",
        "Host memory: 137.1 GB in all (121.8 GB optimizer, 15.2 GB parameters), 137.1 GB on the one node, "
        "however many GPUs; DeepSpeed advises 1.5 times as much, 205.6 GB in all, for buffers.",
        "GPUs: an optimizer step has 16 rows, 16 on each GPU. " + OFFLOADED,
    ),
    f"{LORA} {QWEN} --gpu-memory 24": (
        "Fits. "
        + PACKED
        + "It takes 12.5 GB on the GPU of 24 GB at a prompt of 9,984 tokens. The longest prompt is 31,248 "
        "tokens, by memory; the model's window is 32,768. It is 1.85 times as fast as the host's `stage: dpo`"
        " on the same long prompts, which takes 47.7 GB and reaches 4,145 tokens.",
        "Host memory: nothing is offloaded.",
        "GPUs: an optimizer step has 64 rows, 64 on each GPU. " + WHOLE,
    ),
    f"{LORA} {QWEN} --gpu-memory 80": (
        "Fits. "
        + PACKED
        + "It takes 12.5 GB on the GPU of 80 GB at a prompt of 9,984 tokens. The longest prompt is 32,512 "
        "tokens, by the model's window of 32,768; memory allows 135,019. It is 1.85 times as fast as the "
        "host's `stage: dpo` on the same long prompts, which takes 47.7 GB and reaches 17,969 tokens.",
        "Host memory: nothing is offloaded.",
        "GPUs: an optimizer step has 64 rows, 64 on each GPU. " + WHOLE,
    ),
    "examples/yaml/qwen2.5-7b/dpo_long.yaml --gpus 4": (
        "Fits. A step is the host's `stage: dpo`: the padded pair, fp32 logits of every position; attention: "
        "FlashAttention-2. Without the flash-attn package it is SDPA. "
        "It takes 55.9 GB on each of 4 GPUs of 80 GB at a prompt of 9,984 tokens. The "
        "longest prompt is 14,551 tokens, by memory; the model's window is 32,768. On the same prompts and "
        "short ones of 1,024 tokens, `stage: solopo` would run packed and be 2.32 times as fast; it takes 8.4"
        " GB and reaches 32,512 tokens.",
        "Host memory: 152.3 GB in all (121.8 GB optimizer, 30.5 GB parameters), 152.3 GB on the one node, "
        "however many GPUs; DeepSpeed advises 1.5 times as much, 228.5 GB in all, for buffers.",
        "GPUs: an optimizer step has 64 rows, 16 on each GPU. " + OFFLOADED,
    ),
    "examples/yaml/qwen2.5-7b/sft_long.yaml --gpus 4": (
        "Fits. A step is the host's `stage: sft`: one padded sequence a row, fp32 logits of every position; "
        "attention: FlashAttention-2. Without the flash-attn package it is SDPA. "
        "It takes 22.7 GB on each of 4 GPUs of 80 GB at a prompt of 9,984 "
        "tokens. The longest prompt is 32,512 tokens, by the model's window of 32,768; memory allows 38,253. "
        "On the same prompts and short ones of 1,024 tokens, `stage: solopo` would run packed and take 1.08 "
        "times as long; it takes 8.4 GB and reaches 32,512 tokens.",
        "Host memory: 137.1 GB in all (121.8 GB optimizer, 15.2 GB parameters), 137.1 GB on the one node, "
        "however many GPUs; DeepSpeed advises 1.5 times as much, 205.6 GB in all, for buffers.",
        "GPUs: an optimizer step has 64 rows, 16 on each GPU. " + OFFLOADED,
    ),
    "examples/yaml/qwen2.5-7b/longpo.yaml --gpus 4": (
        "Fits. "
        + PACKED
        + "It takes 35.4 GB on each of 4 GPUs of 80 GB at a prompt of 9,984 tokens. The longest prompt is "
        "32,512 tokens, by the model's window of 32,768; memory allows 65,164. It is 2.43 times as fast as "
        "the host's `stage: dpo` on the same long prompts, which takes 82.6 GB and reaches 9,491 tokens.",
        "Host memory: nothing is offloaded.",
        "GPUs: an optimizer step has 64 rows, 16 on each GPU. ZeRO-3 divides the model's state among them; "
        "one GPU alone would take 103.9 GB.",
    ),
    "examples/yaml/llama3.1-8b/solo_orpo.yaml --gpus 16 --nodes 2 --long 131072": (
        "Does not fit. A step runs packed; attention: torch's FlashAttention-2, all segments in one call. "
        "Packed, since `solopo_forward` is auto and llama is among the tested models. It takes 74.9 GB on "
        "each of 16 GPUs of 80 GB at a prompt of 131,072 tokens. The longest prompt is 130,816 tokens, by the"
        " model's window of 131,072; memory allows 140,319. It is 2.02 times as fast as the host's `stage: "
        "dpo` on the same long prompts, which takes 475.1 GB and reaches 21,396 tokens.",
        "Host memory: 144.5 GB in all (128.5 GB optimizer, 16.1 GB parameters), 72.3 GB on each of 2 nodes, "
        "however many GPUs; DeepSpeed advises 1.5 times as much, 216.8 GB in all, for buffers.",
        "GPUs: an optimizer step has 256 rows, 16 on each GPU. " + OFFLOADED,
    ),
}


@pytest.mark.parametrize("argv, expected", ANSWERS.items())
def test_the_answer_of_a_recipe(monkeypatch, capsys, argv, expected):
    recipe, *others = argv.split()
    lines = lines_of(monkeypatch, capsys, "--recipe", str(ROOT / recipe), *others)
    assert tuple(lines[:3]) == expected
    assert lines[3] == "Basis: arithmetic; nothing was measured on a GPU. Real peaks lie above it."
    assert not any(sign in "\n".join(lines) for sign in ("Shape(", "Setup(", "{", "None", "True"))


def test_overrides_are_those_of_training(monkeypatch, tmp_path, capsys):
    """Before and behind options; without `cutoff_len` the prompt is of the host's default less a response."""
    from llamafactory.hparams import DataArguments

    recipe = str(write(tmp_path, model_name_or_path="qwen2.5-7b", per_device_train_batch_size=1, pref_loss="orpo"))
    said = lines_of(monkeypatch, capsys, "--recipe", recipe)[0]
    assert f"at a prompt of {DataArguments().cutoff_len - 256:,} tokens." in said and plan.CUTOFF == 2048
    lora = ("finetuning_type=lora", "--gpus", "2", "cutoff_len=8192", "pref_loss=simpo", "quantization_bit=null")
    changed = lines_of(monkeypatch, capsys, "--recipe", recipe, *lora)
    assert "on each of 2 GPUs of 80 GB at a prompt of 7,936 tokens." in changed[0]
    assert any("LoRA of rank 8" in line for line in changed)
    said = lines_of(monkeypatch, capsys, "--model", "qwen2.5-7b")[0]
    assert "at a prompt of 16,128 tokens." in said  # no recipe, ours


def test_the_answer_of_two_stages(monkeypatch, tmp_path, capsys):
    keys = dict(model_name_or_path="qwen2.5-7b", bf16=True, flash_attn="fa2", cutoff_len=8448, pref_loss="sigmoid")
    recipe = str(write(tmp_path, **keys, solopo_forward="two_stage", per_device_train_batch_size=1))
    answer = lines_of(monkeypatch, capsys, "--recipe", recipe)[0]
    assert answer.startswith(
        "Does not fit. A step runs in two stages, not packed: `solopo_forward: two_stage`; attention: "
        "FlashAttention-2. Without the flash-attn package it is SDPA. It takes 142.2 GB on the GPU of 80 GB"
    )
    assert answer.endswith("`stage: dpo` on the same long prompts, which takes 196.8 GB and fits at no length.")
    assert "No prompt fits: one of a single token would take 1" in answer
    recipe = str(write(tmp_path, **keys, solopo_objective="longpo", solopo_forward="two_stage"))
    assert any(line.startswith("L2 ") for line in lines_of(monkeypatch, capsys, "--recipe", recipe))


@pytest.mark.parametrize("keys, told", [
    (dict(pure_bf16=True, learning_rate="5e-6"), True), (dict(pure_bf16=True), True),
    (dict(pure_bf16=True, learning_rate=1e-4), False), (dict(bf16=True, learning_rate=5e-6), False),
    (dict(pure_bf16=True, finetuning_type="lora"), False),
])  # fmt: skip
def test_bf16_weights_at_small_rates_are_told(monkeypatch, tmp_path, capsys, keys, told):
    """YAML reads `5e-6` as a text; without the key the rate is the host's 5e-5."""
    recipe = str(write(tmp_path, model_name_or_path="qwen2.5-7b", pref_loss="orpo", **keys))
    line = "Precision: `pure_bf16` rounds most of AdamW's updates away at this rate (docs/training.md)."
    assert (line in lines_of(monkeypatch, capsys, "--recipe", recipe)) == told


def test_an_answer_beyond_the_window(monkeypatch, capsys):
    answer = lines_of(monkeypatch, capsys, "--model", "qwen2.5-7b", "--long", "32768", "--gpus", "4")[0]
    assert answer.startswith("Does not fit. ")
    assert "The longest prompt is 32,512 tokens, by the model's window of 32,768; memory allows 142,746." in answer


# ---- a row that several GPUs share


def test_a_shared_row_divides_activations_and_logits_and_nothing_else(qwen):
    """By hand for Qwen2.5-7B: 28 heads over 4 of keys; ZeRO divides by all GPUs, whoever shares a row."""
    one, four = (
        step_memory(qwen, "S3", 1024, 256, 16000, None, Setup(gpus=8, zero=3, sequence_parallel=n)) for n in (1, 4)
    )
    row = 1024 + 2 * 256 + 16000 + 256
    assert one["checkpoints"] == 4 * four["checkpoints"] == 28 * 3584 * 2 * row
    assert all(four[part] == one[part] for part in ("weights", "gradients", "optimizer", "reference"))
    assert four["logits"] == qwen.vocabulary * (4 + 12) * 3 * 64  # a quarter of each of three responses
    assert four["layer"] == row // 4 * (layer_bytes(qwen, 2) + 2 * 3584 + 3 * 2 * 18944)  # attention's output twice
    for variant in ("V0", "S2", "L2", "SFT"):  # not packed
        alone, other = (step_memory(qwen, variant, 1024, 256, 16000, None, Setup(sequence_parallel=n)) for n in (1, 4))
        assert alone == other


def test_repeated_keys_and_buffers_of_a_shared_row(qwen):
    """7 GPUs: 4 heads of keys become 28. With the MLP in small chunks the exchange's buffers are larger than it."""
    keys, width, tokens = 28 * 128, 28 * 128, 17_794 // 7
    whole, chunked = (
        step_memory(qwen, "S3", 1024, 256, 16002, None, Setup(sequence_parallel=7, mlp_chunk=n))["layer"]
        for n in (0, 16)
    )
    kept = layer_bytes(qwen, 2) + 2 * (width + 2 * (keys - 4 * 128))
    assert whole == tokens * (kept + 3 * 2 * 18944)
    assert chunked == tokens * (kept - 4 * 2 * 18944 + 3 * 2 * (width + 2 * keys))


def yarn_by_the_page(folder, monkeypatch):
    """Qwen2.5-7B's published configuration, changed by the command of docs/training.md."""
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"config\.json <<'END'\n(.*?)END\n", page, re.S)
    published = MODELS["qwen2.5-7b"] | {"rope_theta": 1e6, "architectures": ["Qwen2ForCausalLM"]}
    del published["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(published))
    monkeypatch.setattr(sys, "argv", ["-", str(folder / "config.json")])
    exec(code, {})
    return folder


def test_the_window_that_the_page_makes(tmp_path, monkeypatch):
    """64K, by frequencies that do not depend on the row, and with the model's own base."""
    config = read_config(str(yarn_by_the_page(tmp_path, monkeypatch)))
    assert window_of(config) == 65536 == config.max_position_embeddings
    assert config.rope_parameters == {
        "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6,
    }  # fmt: skip
    assert why_not_packed(on_meta(config)) is None


LONG = {  # recipe -> GB on each of 4 GPUs with its own `solopo_sequence_parallel`, and with 1
    "qwen2.5-7b_64k": ("50.8", "68.7"),
    "llama3.1-8b_128k": ("52.6", "106.9"),
}


@pytest.mark.parametrize("name", LONG)
def test_the_answers_of_the_long_recipes_are_those_of_their_header_and_of_the_page(name, monkeypatch, capsys, tmp_path):
    path = ROOT / f"examples/yaml/long/{name}.yaml"
    model = ["--model", str(yarn_by_the_page(tmp_path, monkeypatch))] if name.startswith("qwen") else []
    lines = lines_of(monkeypatch, capsys, "--recipe", str(path), "--gpus", "4", *model)
    shared = yaml.safe_load(path.read_text())["solopo_sequence_parallel"]
    alone = tmp_path / "alone.yaml"
    alone.write_text(path.read_text().replace(f"solopo_sequence_parallel: {shared}", "solopo_sequence_parallel: 1"))
    before = lines_of(monkeypatch, capsys, "--recipe", str(alone), "--gpus", "4", *model)[0]
    takes = [re.search(r"It takes ([\d.]+) GB on each of 4 GPUs of 80 GB", line)[1] for line in (lines[0], before)]
    assert tuple(takes) == LONG[name] and lines[0].startswith("Fits. A step runs packed")
    assert f"# {takes[0]} GB on each; with solopo_sequence_parallel=1 {takes[1]} GB." in path.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(plan, "GPU_JSON", SHIPPED)
        calibrated = lines_of(monkeypatch, capsys, "--recipe", str(path), "--gpus", "4", *model)[0]
    assert f"It takes {takes[0]} GB on each of 4 GPUs of 80 GB" in calibrated
    assert lines[2].startswith(f"GPUs: an optimizer step has 64 rows, {16 * shared} on each {shared} that share a row.")
    pattern = (
        r"Sharing: (\d) GPUs share a row of ([\d,]+) tokens, ([\d,]+) each; a GPU sends ([\d.]+ MB) a layer and pass, "
    )
    n, tokens, each, layer, step, nvlink, pcie = re.match(
        pattern + r"([\d.]+ GB) a step, (\S+) s by an A100's NVLink \(300 GB/s\) and (\S+) s by PCIe 4 \(25 GB/s\)\.$",
        lines[3],
    ).groups()
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    assert f"\n| `{name}.yaml` | {tokens} | {n} | {each} | {layer} | {step} |\n" in page
    if "128k" in name:
        (work,) = [float(line.split()[6]) for line in lines if line.startswith("S3 ") and len(line.split()) == 8]
        assert f"take {nvlink} s over an A100's NVLink (300 GB/s each way) and {pcie} s over PCIe 4 (25 GB/s)" in page
        assert f"beside {work / shared:,.0f} TFLOP of\narithmetic on each GPU" in page
    table = lines[lines.index(next(line for line in lines if line.startswith("sequence_parallel "))) :][1:5]
    assert [int(row.split()[0]) for row in table if row] == ([1, 2, 4] if "qwen" in name else [1, 2, 4, 8])


def test_bytes_sent_are_counted_by_hand(qwen):
    """T = 1001 in 4: 251 tokens each, three quarters of 28 heads of q and out and 4 of k and v, 128 wide, 2 bytes."""
    lengths = (100, 50, 751)
    assert count("S3", *lengths)[0] == 1001
    size = plan.sent(qwen, "S3", lengths, Setup(sequence_parallel=4))
    assert size == 3 * 28 * 251 * (2 * 28 + 2 * 4) * 128 * 2 * 3 // 4
    assert plan.sent(qwen, "S3", lengths, Setup(sequence_parallel=4, checkpointing=False)) == size * 2 // 3
    assert plan.sent(qwen, "S3", lengths, Setup()) == 0


def test_what_does_not_fit_is_proposed_to_be_shared(monkeypatch, capsys, tmp_path):
    """The fewest GPUs to a row; one more GPU where there are too few; nothing where one of them is enough."""
    keys = dict(model_name_or_path="llama3.1-8b", bf16=True, pref_loss="orpo", per_device_train_batch_size=1)
    keys |= dict(cutoff_len=131072, deepspeed="examples/yaml/deepspeed/ds_z3.json")
    recipe = str(write(tmp_path, **keys))
    four, one = (lines_of(monkeypatch, capsys, "--recipe", recipe, "--gpus", n) for n in ("4", "1"))
    assert four[0].startswith("Does not fit. ") and four[0].endswith(
        " It needs 4 x 80 GB with `solopo_sequence_parallel: 2`, ZeRO-3: 71.1 GB on each; memory then allows 162,926 "
        "tokens."
    )
    assert " It needs 4 x 80 GB with `solopo_sequence_parallel: 4`, ZeRO-3: 52.6 GB on each;" in one[0]
    qwen = lines_of(monkeypatch, capsys, "--recipe", recipe, "--model", "qwen2.5-7b", "--long", "131072", "--gpus", "2")
    assert " It needs 4 x 80 GB with `solopo_sequence_parallel: 4`, ZeRO-3: 50.6 GB on each;" in qwen[0]
    assert any(line.startswith("sequence_parallel ") for line in one)
    small = lines_of(monkeypatch, capsys, "--recipe", recipe, "--gpus", "4", "--gpu-memory", "24")
    assert small[0].endswith(" No `solopo_sequence_parallel` up to 8 makes it fit.")
    enough = lines_of(monkeypatch, capsys, "--recipe", recipe, "--gpus", "4", "--long", "8192")
    assert "sequence_parallel" not in "\n".join(enough)


@pytest.mark.parametrize(
    "keys, argv, sentence",
    [
        (
            {},
            ["--gpus", "8"],
            "must divide the model's 28 attention heads and the 8 processes of a machine; 2, 4 would do",
        ),
        ({}, ["--gpus", "16", "--nodes", "2"], "the model's 28 attention heads and the 8 processes"),
        ({}, ["--gpus", "12"], "must divide the model's 28 attention heads and the 12 processes"),
        ({"solopo_forward": "two_stage"}, ["--gpus", "8"], "shares a packed row, and this recipe runs none; set 1."),
    ],
)
def test_a_row_that_cannot_be_shared_so_is_refused(monkeypatch, tmp_path, keys, argv, sentence):
    keys |= dict(model_name_or_path="qwen2.5-7b", bf16=True, solopo_sequence_parallel=8)
    monkeypatch.setattr(sys, "argv", ["plan.py", "--recipe", str(write(tmp_path, **keys)), *argv])
    with pytest.raises(SystemExit, match=f"`solopo_sequence_parallel: 8` .*{sentence}"):
        plan.main()


# ---- calibration


def measured(settings: dict, runs: list[tuple]) -> dict:
    """A document as benchmark_step.py writes it, with steps of given FLOP/s and times the predicted activations."""
    shape = shape_of(AutoConfig.for_model(**settings["model"]))
    document = {"settings": settings, "hardware": {"device": "A card"}, "date": "2026-01-02", "runs": {}}
    for variant, tuning, length, rate, factor in runs:
        setup = setup_of(settings, tuning)
        step = shape, variant, settings["short"], settings["response"], length, None
        flops = sum(step_flops(*step, settings["checkpointing"], tuning == "lora").values())
        document["runs"][f"{variant} {tuning} {length}"] = dict(
            variant=variant, tuning=tuning, reference=None, length=length, trial=False, status="ok",
            median_s=flops / rate, peak=peak(step_memory(*step, setup), factor),
        )  # fmt: skip
    like = dict(tuning="lora", reference=None, length=9984, trial=False, status="ok", median_s=1.0, peak=1)
    others = [dict(variant="V0", status="oom"), dict(variant="T"), dict(variant="V0", trial=True),
              dict(variant="V0", length=8192, reference="online")]  # fmt: skip
    document["runs"] |= {str(i): like | other for i, other in enumerate(others)}  # none of which counts
    return document


def test_a_measurement_calibrates_the_answer(monkeypatch, capsys):
    """A slower packed step and larger peaks: the nearest length counts, full fine-tuning says nothing of LoRA."""
    settings = PRESETS["qwen2.5-7b"]
    runs = [("V0", "lora", 8192, 400e12, 1.25), ("S3", "lora", 8192, 200e12, 1.5), ("S3", "lora", 32768, 1e12, 9),
            ("S3", "full", 8192, 1e12, 9)]  # fmt: skip
    plan.GPU_JSON.write_text(json.dumps(measured(settings, runs)))
    answer, _, _, basis, *_ = lines_of(monkeypatch, capsys, "--recipe", str(ROOT / LORA), *QWEN.split())
    assert basis.endswith(
        "gpu.json (A card, 2026-01-02) where that has the same: S3 at 8,192 tokens 200 TFLOP/s and 1.50 times the "
        "predicted activations; V0 at 8,192 tokens 400 TFLOP/s and 1.25 times the predicted activations."
    )
    assert "It takes 15.7 GB on the GPU of 80 GB" in answer  # 6.17 of weights; 1.5 times the other 6.35
    assert "It is 0.93 times as fast" in answer and "which takes 58.0 GB" in answer  # half of 1.85; 1.25 times 41.5
    _, setup = read_recipe(ROOT / LORA, 1)
    shape = shape_of(read_config("qwen2.5-7b"))
    assert f"memory allows {longest(shape, 'S3', 1024, 256, None, setup, 80e9, 1.5):,}." in answer


@pytest.mark.parametrize("gpus, memory", [("1", "125"), ("2", "64")])
def test_the_state_of_full_fine_tuning_does_not_fit_because_of_a_measurement(gpus, memory, monkeypatch, capsys):
    """Weights, gradients and Adam's state under ZeRO-3 are 123.85 and 62.94 GB; the shipped step was taken with SGD."""
    monkeypatch.setattr(plan, "GPU_JSON", SHIPPED)
    argv = [str(ROOT / "examples/yaml/qwen2.5-7b/solo_orpo.yaml"), "deepspeed=examples/yaml/deepspeed/ds_z3.json"]
    answer, *rest = lines_of(monkeypatch, capsys, "--recipe", *argv, "--gpus", gpus, "--gpu-memory", memory)
    assert answer.startswith("Does not fit.") and "No prompt fits" in answer
    assert any(line.endswith(" TFLOP/s. Memory of full fine-tuning is not calibrated.") for line in rest)


def test_measured_activations_of_lora_are_as_many_times_the_predicted_at_every_length():
    """So the longest prompt that a short run promises is nearly what the longest run of the shipped ones took."""
    document, references = json.loads(SHIPPED.read_text(encoding="utf-8")), dict.fromkeys(VARIANTS)
    for run in document["runs"].values():
        run["trial"] = False  # whose memory is that of any other step
    for length, factor in {8192: "1.107", 16384: "1.107", 32768: "1.107", 103424: "1.108"}.items():
        seen = plan.measurements(document, "lora", length, references)
        assert seen["S3"].length == length and f"{seen['S3'].memory:.3f}" == factor


@pytest.mark.parametrize("text, said", [("{}", "KeyError: 'settings'"), ("not json", "JSONDecodeError")])
def test_measurements_that_cannot_be_used_are_said(monkeypatch, capsys, text, said):
    plan.GPU_JSON.write_text(text)
    basis = lines_of(monkeypatch, capsys, "--recipe", str(ROOT / LORA), *QWEN.split())[3]
    assert basis.startswith("Basis: arithmetic; ") and f"gpu.json cannot be used ({said}" in basis


@pytest.mark.parametrize("tuning, dry", [("full", False), ("lora", True)])
def test_other_fine_tuning_and_a_dry_run_are_not_used(monkeypatch, capsys, tuning, dry):
    document = measured(PRESETS["qwen2.5-7b"], [("S3", tuning, 8192, 1e12, 9)])
    document["runs"] = {name: run for name, run in document["runs"].items() if name.startswith("S3")}
    plan.GPU_JSON.write_text(json.dumps(document | {"dry": dry}))
    basis = lines_of(monkeypatch, capsys, "--recipe", str(ROOT / LORA), *QWEN.split())[3]
    assert basis.endswith("gpu.json has no measurement of lora fine-tuning on a GPU.")


def test_a_model_that_cannot_be_packed_runs_in_two_stages(monkeypatch, capsys, tmp_path):
    full = ["full_attention"] * TINY["num_hidden_layers"]
    config = AutoConfig.for_model(**TINY | {"model_type": "gemma2", "sliding_window": 64, "layer_types": full})
    config.save_pretrained(tmp_path)
    answer = lines_of(monkeypatch, capsys, "--model", str(tmp_path), "--long", "128")[0]
    assert answer.startswith("Fits. A step runs in two stages, not packed: its attention has a sliding window (64);")
