"""scripts/plan.py: published and hand-counted numbers, and counts of what torch really does."""

import sys
from collections import Counter

import plan
import pytest
import torch
import yaml
from conftest import ROOT
from plan import Setup, Shape, count, longest, peak, read_config, read_recipe, shape_of, step_flops, step_memory
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from solopo_plugin.packing import PackedCollator

TINY = dict(
    model_type="qwen2", hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=300, max_position_embeddings=1024, tie_word_embeddings=True,
)  # fmt: skip
VARIANTS = list(plan.VARIANTS)


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
    row = dict(row="r", same=False, short_prompt_ids=[1] * S, long_prompt_ids=[2] * L, chosen_ids=[3] * R,
               rejected_ids=[4] * R)  # fmt: skip
    pairs = 0
    for segment in PackedCollator()([row])["policy"]["plan"].segments:
        queries, keys = segment.query[1] - segment.query[0], sum(b - a for a, b in segment.keys)
        pairs += queries * (keys - queries) + queries**2 / 2
    flops = step_flops(shape, "S3", S, R, L, None, checkpointing=False)
    assert flops["attention"] == 3.5 * 4 * shape.layers * shape.query * pairs


def test_tokens_and_logits_of_every_variant():
    counts = {variant: count(variant, 1000, 100, 8000) for variant in VARIANTS}
    assert counts == {"V0": (16200, 16200), "S0": (24300, 24300), "S1": (10300, 10300), "S2": (10300, 300),
                      "S3": (9300, 300), "V*": (8200, 200)}  # fmt: skip
    row = dict(row="r", same=False, short_prompt_ids=[1] * 1000, long_prompt_ids=[2] * 8000, chosen_ids=[3] * 100,
               rejected_ids=[4] * 100)  # fmt: skip
    for both in (False, True):
        packed = PackedCollator(both=both)([row])["policy"]
        assert count("S3", 1000, 100, 8000, both) == (packed["input_ids"].shape[1], len(packed["positions_K"]))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_keeps_what_is_counted(dtype):
    """Bytes that autograd saves per token and layer: a model of three layers less one of two, parameters apart.

    Beside what is counted: 1 / rms of both norms and attention's log-sum-exp per head, in fp32.
    """
    tokens, saved = 64, []
    for layers in (2, 3):
        config = AutoConfig.for_model(**TINY | {"num_hidden_layers": layers, "dtype": dtype})
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        own, kept, alive = {p.untyped_storage().data_ptr() for p in model.parameters()}, Counter(), []

        def keep(tensor, own=own, kept=kept, alive=alive):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                alive.append(tensor)  # or its address could be another's later
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
        saved.append(sum(kept.values()))
    expected = plan.layer_bytes(shape_of(config), dtype.itemsize) + 4 * (2 + config.num_attention_heads)
    assert (saved[1] - saved[0]) / tokens == expected


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
    _, setup = read_recipe(ROOT / "examples/yaml/lora/qwen2.5-7b_solo_orpo_lora.yaml", gpus=1)
    assert setup == Setup(lora_rank=16, frozen=0.5, weights=6, gradients=4, optimizer=8)


def test_every_shipped_recipe_is_planned_or_refused():
    planned, refused = 0, 0
    for path in sorted(ROOT.glob("examples/yaml/**/*.yaml")):
        recipe = yaml.safe_load(path.read_text())
        if "stage" not in recipe:  # of making rows, or of evaluation
            continue
        try:
            read_recipe(path, gpus=4)
            planned += 1
        except ValueError as error:
            assert "can be planned" in str(error)
            assert recipe["stage"] == "sft" or recipe["solopo_objective"] == "longpo"
            refused += 1
    assert (planned, refused) == (101, 15)


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
    ],
)  # fmt: skip
def test_precision_and_zero_of_a_recipe(tmp_path, keys, expected):
    assert read_recipe(write(tmp_path, **keys), gpus=1)[1] == expected


@pytest.mark.parametrize(
    "keys, sentence",
    [
        (dict(stage="sft"), "only `stage: solopo` with its `solopo` objective and `stage: dpo` can be planned"),
        (dict(solopo_objective="longpo"), "only `stage: solopo` with its `solopo` objective"),
        (dict(finetuning_type="freeze"), "only full and lora, with .*; got freeze"),
        (dict(optim="lion_32bit"), "got full, lion_32bit"),
    ],
)
def test_what_cannot_be_planned_is_refused(tmp_path, keys, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_recipe(write(tmp_path, **keys), gpus=1)


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
    ],
)
def test_the_command_says_what_is_wrong(monkeypatch, argv, sentence):
    monkeypatch.setattr(sys, "argv", ["plan.py", *argv])
    with pytest.raises(SystemExit, match=sentence):
        plan.main()
