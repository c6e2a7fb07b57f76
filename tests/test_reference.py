"""The cached reference equals the online one, is reused by who may, and by nobody else."""

import errno
import gc
import json
import math
import os
import re
import shutil
import time
import weakref
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BIN, demo_rows, write_dataset, write_recipe
from safetensors.torch import load_file, save_file

from solopo_plugin.distill import Top, save_top
from solopo_plugin.host.preflight import Refused
from solopo_plugin.qa.files import DataError
from solopo_plugin.reference import Store, _ready_to_score


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache; its folder of scores."""
    monkeypatch.setenv("SOLOPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


KINDS = {
    "full": dict(),
    "ipo": dict(pref_loss="ipo"),
    "lora": dict(finetuning_type="lora", pref_loss="hinge"),
    "freeze": dict(finetuning_type="freeze", freeze_trainable_layers=1),
    "longpo": dict(solopo_objective="longpo"),
    "anchor": dict(solopo_anchor=0.5, pref_loss="orpo", solopo_align="distill"),
    "anchor, both, lora": dict(solopo_anchor=0.5, solopo_align_on="both", finetuning_type="lora"),
    "anchor, alone": dict(solopo_anchor=0.5, solopo_objective="distill"),
}


BOTH_FORMS = ("full", "longpo", "anchor, both, lora")


@pytest.mark.parametrize(
    "kind, forward", [*((kind, "packed") for kind in KINDS), *((kind, "two_stage") for kind in BOTH_FORMS)]
)
def test_cached_is_online(run, recipe, tmp_path, kind, forward):
    """One row at a time both score the same forward of the same weights: bit for bit, in training and evaluation."""
    common = KINDS[kind] | dict(
        solopo_forward=forward, max_samples=8, val_size=3, eval_strategy="epoch", per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
    )  # fmt: skip
    online, cached = (
        run(recipe(solopo_reference=how, output_dir=str(tmp_path / how), **common)) for how in ("online", "cached")
    )
    assert len(cached.losses) == 6
    assert_same(cached, online)


def assert_same(one, other) -> None:
    """The same run, bit for bit: losses, metrics and weights."""
    ours = ("loss", "grad_norm", "rewards", "logps", "solopo")
    entries = [
        [{k: v for k, v in entry.items() if k.removeprefix("eval_").split("/")[0] in ours} for entry in result.log]
        for result in (one, other)
    ]
    assert entries[0] == entries[1] and one.losses
    assert all(torch.equal(w, other.weights[name]) for name, w in one.weights.items())


def writers(cache: Path) -> dict[str, list[dict]]:
    """Lines of every writer's file, by file."""
    return {str(f): [json.loads(line) for line in f.read_text().splitlines()] for f in cache.glob("*/*.jsonl")}


def scored(messages: list[str]) -> list[tuple[int, int]]:
    """(found, scored) of every run, from what it logged."""
    said = [re.fullmatch(r"Reference log-probs: (\d+) rows are in \S+, (\d+) to score\.", m) for m in messages]
    return [(int(m[1]), int(m[2])) for m in said if m]


def test_who_may_reuse_scores_does(run, recipe, tmp_path, cache, host_log, monkeypatch):
    """A repeated run, another alpha, LoRA on the same base, a sub-set with an evaluation split: no more than the one
    batch of every run that checks what is on disk is scored."""
    from solopo_plugin.trainer import SoloTrainer

    first = run(recipe(per_device_eval_batch_size=3))
    before, batches, score_pair = writers(cache), [], SoloTrainer.score_pair
    monkeypatch.setattr(SoloTrainer, "score_pair", lambda *args: (batches.append(len(args[2])), score_pair(*args))[1])
    again = run(recipe(output_dir=str(tmp_path / "again")))
    assert again.losses == first.losses
    run(recipe(solopo_alpha=0.5, solopo_align_on="both", pref_beta=0.5, max_steps=1))
    run(recipe(finetuning_type="lora", max_steps=1, output_dir=str(tmp_path / "lora")))
    run(recipe(max_samples=10, val_size=4, eval_strategy="epoch", num_train_epochs=1.0))
    run(recipe(solopo_objective="longpo", max_steps=1))
    assert scored(host_log) == [(0, 12), (12, 0), (12, 0), (12, 0), (10, 0), (12, 0)]
    assert batches == [6, 6, 6, 5, 6] and writers(cache) == before


@pytest.mark.slow
def test_who_may_not_reuse_scores_does_not(run, recipe, tiny_model, tmp_path, cache, host_log):
    """Changed weights under the same path, another dtype, form, length normalisation or template."""
    model = shutil.copytree(tiny_model(), tmp_path / "model")
    base = dict(model_name_or_path=str(model), max_steps=1, max_samples=4)
    run(recipe(**base))
    for change in (dict(bf16=True), dict(solopo_forward="two_stage"), dict(pref_loss="ipo"), dict(template="llama3")):
        run(recipe(**base | change))
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-6
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    run(recipe(**base))
    assert scored(host_log) == [(0, 4)] * 6
    assert len(list(cache.iterdir())) == 5  # the other template's rows are other rows of the same model


def test_an_anchor_scores_what_has_no_file_and_nothing_twice(run, recipe, tmp_path, cache, host_log):
    """A cache of log-probs alone is scored anew for it; then it is reused, also by a run that went on after a kill."""
    keys = dict(pref_loss="ipo", max_steps=1, max_samples=6)
    plain = run(recipe(**keys))
    first = run(recipe(solopo_anchor=0.5, **keys))
    again = run(recipe(solopo_anchor=0.5, **keys))
    assert_same(first, again)
    assert first.losses == plain.losses  # at the start the anchor is 0
    files = sorted(cache.glob("*/top64_chosen/*.npz"))
    assert len(files) == 6 and not list(cache.glob("*/*/*.tmp"))
    files[0].unlink()  # a killed writer leaves a line only for a row whose file is there
    files[1].write_bytes(files[1].read_bytes()[:-30])  # and a power cut perhaps a torn file
    assert_same(run(recipe(solopo_anchor=0.5, **keys)), first)
    run(recipe(solopo_anchor=0.5, solopo_align_on="both", **keys))
    assert scored(host_log) == [(0, 6), (0, 6), (6, 0), (4, 2), (0, 6)]
    for file, other in zip(files, [*files[1:], files[0]], strict=True):
        file.with_suffix(".old").write_bytes(other.read_bytes())
    for file in files:
        file.with_suffix(".old").replace(file)
    with pytest.raises(ValueError, match=r"top64_chosen has other words, .* Remove the folder to score anew, or set"):
        run(recipe(solopo_anchor=0.5, **keys))


def test_damaged_lines_are_no_scores(cache):
    """Score a row again whose line cannot be used; count a whole line of it, wherever it stands."""
    store = Store({})
    store.open()
    good, line = {"row": "a", "chosen": -1.5, "rejected": -2}, lambda **keys: json.dumps(good | keys) + "\n"
    bad = (None, "x", math.nan, -math.inf, 1e300, 10**400, [], {})
    lines = [line(row="b", chosen=value) for value in bad]
    lines += [line(row=[]), "[]\n", "1\n", '{"row": "c"}\n', line()[:-9]]
    (store.folder / "1.jsonl").write_bytes(b"\xff\xfe\x80\n" + "".join(lines).encode())
    assert store.read() == {}
    (store.folder / "2.jsonl").write_text(line() + line(chosen=-3) + line(row="b"))
    assert store.read() == {"a": (-1.5, -2), "b": (-1.5, -2)}


def test_a_full_disk_is_said(cache, monkeypatch):
    """Leave no draft behind of what fails."""
    store = Store({}, "chosen")
    store.open()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    store.stream = SimpleNamespace(write=full)
    with pytest.raises(DataError, match=f"^Cannot write {store.folder}: the disk is full .* what is finished is kept"):
        store.write(["a"], torch.zeros(1, 2))
    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(DataError, match=f"^Cannot write {store.top('a')}: the disk is full"):
        save_top(store.top("a"), Top(torch.zeros(1, 2), torch.zeros(1, 3)))
    assert [*store.tops.iterdir()] == []


def test_a_file_for_the_anchor_is_synchronised_without_its_folder(cache, monkeypatch):
    """Spare the folder: of the many files a lost name costs but its row's score."""
    synchronised = []
    monkeypatch.setattr(os, "fsync", synchronised.append)
    store = Store({}, "chosen")
    save_top(store.top("a"), Top(torch.zeros(1, 2), torch.zeros(1, 3)))
    assert len(synchronised) == 1 and store.top("a").exists()


@pytest.mark.parametrize("known", [False, True])
def test_files_that_another_machine_has_are_asked_for(run, recipe, cache, monkeypatch, known):
    """Ask for them; `known`: they and their scores are in the other one's cache; the ranks agree on the scores."""
    from solopo_plugin import reference

    if known:
        agreed = []
        monkeypatch.setattr(reference, "_agree", lambda logps_N2: agreed.append(logps_N2) or logps_N2)
        run(recipe(solopo_anchor=1, max_samples=4))
        shutil.rmtree(cache)
        others = iter(agreed[-1:])
        monkeypatch.setattr(reference, "_agree", lambda logps_N2: next(others, logps_N2))
    monkeypatch.setattr(reference, "save_top", lambda path, top: None)
    with pytest.raises(
        ValueError, match=r"4 of 4 files that the anchor needs are not in \S+top64_chosen of this machine"
    ):
        run(recipe(solopo_anchor=1, max_samples=4))


def test_a_foreign_folder_is_refused(run, recipe, tiny_model, cache):
    """Scores that were copied under the name of another model."""
    run(recipe(max_steps=1, max_samples=4))
    run(recipe(max_steps=1, max_samples=4, model_name_or_path=tiny_model(seed=1)))
    one, other = sorted(cache.iterdir())
    shutil.rmtree(one)
    shutil.copytree(other, one)
    with pytest.raises(ValueError, match="the scores there are another model's. Remove the folder"):
        for seed in (0, 1):
            run(recipe(max_steps=1, max_samples=4, model_name_or_path=tiny_model(seed=seed)))


def test_a_ref_model_from_elsewhere_is_loaded_once_and_freed(run, recipe, tiny_model, tmp_path, monkeypatch):
    from solopo_plugin import workflow

    loaded = []
    create = workflow.create_ref_model

    def remember(*args):
        model = create(*args)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(workflow, "create_ref_model", remember)
    common = dict(ref_model=tiny_model(seed=1), per_device_train_batch_size=1, per_device_eval_batch_size=1)
    online = run(recipe(solopo_reference="online", output_dir=str(tmp_path / "online"), **common))
    loaded.clear()
    cached = run(recipe(output_dir=str(tmp_path / "cached"), **common))
    assert cached.losses == online.losses
    gc.collect()
    assert len(loaded) == 1 and loaded[0]() is None
    run(recipe(output_dir=str(tmp_path / "again"), **common))  # loaded once more, to check what is on disk
    gc.collect()
    assert len(loaded) == 2 and loaded[1]() is None
    own = run(recipe(output_dir=str(tmp_path / "own"), **common | dict(ref_model=None)))
    assert own.losses != cached.losses and len(loaded) == 2  # the policy is its own reference: no second model


# ---- what the reference is: combined and drawn in another way it is another one


@pytest.fixture(scope="module")
def sft(tiny_model, tmp_path_factory):
    """Factory of LoRA adapters on the tiny model that change its log-probs, as one after SFT does."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def factory(seed: int, folder: Path | None = None) -> str:
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
        folder = folder or tmp_path_factory.mktemp("sft")
        get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model()), config).save_pretrained(folder)
        return str(folder)

    return factory


ONE_BY_ONE = dict(per_device_train_batch_size=1, per_device_eval_batch_size=1, max_samples=6, num_train_epochs=1.0)


@pytest.fixture(scope="module")
def adapters(sft, tiny_model):
    """Recipes that share all files: the reference is the base, or the base merged with SFT (the third trains on it)."""
    a, b = sft(1), sft(2)
    lora = dict(finetuning_type="lora", **ONE_BY_ONE)
    return {
        "switched off": lora | dict(adapter_name_or_path=a),
        "merged": lora | dict(adapter_name_or_path=a, create_new_adapter=True),
        "elsewhere": lora | dict(adapter_name_or_path=a, ref_model=tiny_model(), ref_model_adapters=a),
        "one merged, one off": lora | dict(adapter_name_or_path=f"{a},{b}"),
        "both merged": lora | dict(adapter_name_or_path=f"{a},{b}", create_new_adapter=True),
        "both elsewhere": lora | dict(adapter_name_or_path=a, ref_model=tiny_model(), ref_model_adapters=f"{a}, {b}"),
    }


@pytest.fixture(scope="module")
def online(adapters, tiny_model):
    """Outcomes without a cache, by recipe, each run once."""
    return {}


def check_on_one_cache(run, recipe, tmp_path, adapters, online, names) -> None:
    """Run recipes one after another on one cache: each is its online run, bit for bit."""
    for name in names:
        if name not in online:
            args = recipe(solopo_reference="online", output_dir=str(tmp_path / "online"), **adapters[name])
            online[name] = run(args)
        cached = run(recipe(output_dir=str(tmp_path / "cached"), **adapters[name]))
        assert_same(cached, online[name])
        starts_at = abs(cached.log[0]["rewards/margins"])
        apart = name in ("switched off", "one merged, one off", "both elsewhere")
        assert starts_at > 1e-3 if apart else starts_at < 1e-6, name


ADAPTER_IS = ("switched off", "merged", "elsewhere")


@pytest.mark.parametrize("order", [ADAPTER_IS, ADAPTER_IS[::-1]], ids=", ".join)
@pytest.mark.slow(keep=["switched off, merged, elsewhere"])
def test_an_adapter_that_is_off_merged_or_elsewhere(run, recipe, tmp_path, adapters, online, order, host_log):
    """A run that goes on with an adapter says that the reference is the model without it; no other run does."""
    runs = 1 + ("switched off" not in online)
    check_on_one_cache(run, recipe, tmp_path, adapters, online, order)
    path = adapters["switched off"]["adapter_name_or_path"]
    told = f"Training goes on with the adapter {path}, and the reference is the model without it, as in the host's DPO"
    assert sum(message.startswith(told) for message in host_log) == runs
    assert sum(message.startswith("Training goes on") for message in host_log) == runs


@pytest.mark.slow
def test_two_adapters(run, recipe, tmp_path, adapters, online):
    check_on_one_cache(run, recipe, tmp_path, adapters, online, adapters)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Recipes whose reference has drawn weights; every two differ in how."""
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "a.yaml").write_text('"<a>": "Where is the library?"\n"<b>": "the red house"\n')
    (folder / "b.yaml").write_text('"<a>": "no"\n"<b>": "the red house"\n')
    (folder / "c.yaml").write_text('"<b>": "the red house"\n"<a>": "Where is the library?"\n')
    a, b, c = (dict(new_special_tokens_config=str(folder / f"{name}.yaml")) for name in "abc")
    return {
        "noise": a,
        "noise, seed 8": a | dict(seed=8),
        "described": a | dict(init_special_tokens="desc_init"),
        "described, noise": a | dict(init_special_tokens="desc_init_w_noise"),
        "described otherwise": b | dict(init_special_tokens="desc_init"),
        "described in another order": c | dict(init_special_tokens="desc_init"),
        "special tokens": dict(add_special_tokens="<a>,<b>"),
        "tokens": dict(add_tokens="<a>,<b>,<c>"),
        "scratch": dict(train_from_scratch=True),
        "scratch, seed 8": dict(train_from_scratch=True, seed=8),
    }


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.slow
def test_drawn_weights(run, recipe, tmp_path, cache, host_log, drawn, kind):
    """Whatever was scored before, and whoever draws, policy or reference: both start as the same model."""
    if kind == "lora":
        drawn = {name: drawn[name] for name in ("noise", "described", "described otherwise", "scratch")}
    seen = set()
    for name, changes in drawn.items():
        common = ONE_BY_ONE | changes | dict(finetuning_type=kind, max_steps=2)
        online, cached = (
            run(recipe(solopo_reference=how, output_dir=str(tmp_path / how), **common)) for how in ("online", "cached")
        )
        assert_same(cached, online)
        assert cached.log[0]["rewards/margins"] == 0, name
        seen.add(cached.log[0]["logps/chosen"])
    same = {"special tokens", "tokens", "described in another order"} & set(drawn)  # rows do not use the new tokens
    assert len(seen) == len(drawn) - len(same)
    assert len(list(cache.iterdir())) == len(drawn)
    for changes in (drawn["described"], drawn["scratch"]):  # a file of the same content, the same seed
        if path := changes.get("new_special_tokens_config"):
            changes = changes | dict(new_special_tokens_config=shutil.copy(path, tmp_path / "copy.yaml"))
        run(recipe(**ONE_BY_ONE | changes | dict(finetuning_type=kind, max_steps=1)))
    assert scored(host_log) == [(0, 6)] * len(drawn) + [(6, 0)] * 2


def test_a_drawn_ref_model_draws_nothing_from_the_training(run, recipe, tiny_model, tmp_path):
    """Its new tokens are drawn before the order of the rows is: that stays the online run's."""
    common = ONE_BY_ONE | dict(ref_model=tiny_model(seed=1), add_tokens="<a>,<b>", max_steps=4)
    online, cached = (
        run(recipe(solopo_reference=how, output_dir=str(tmp_path / how), **common)) for how in ("online", "cached")
    )
    assert_same(cached, online)


# ---- which files it is made of


def model_args(**changes):
    from llamafactory.hparams import ModelArguments

    return ModelArguments(**dict(model_name_or_path="unused") | changes)


def hub(root: Path, name: str, files: dict[str, Path]) -> str:
    """A hub cache as `huggingface_hub` lays it out, with one repository of one commit."""
    repository, commit = root / f"models--{name.replace('/', '--')}", "0" * 39 + "1"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    for number, (inside, file) in enumerate(files.items()):
        shutil.copy(file, blob := repository / "blobs" / f"{number:064x}")
        link = repository / "snapshots" / commit / inside
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return str(root)


@pytest.mark.slow
def test_an_adapter_in_a_sub_folder(run, recipe, sft, tmp_path, host_log):
    """Of a hub repository or of a folder, found where the host finds it; another sub-folder is another reference."""
    from solopo_plugin.qa.provenance import weight_hashes

    one, two = (Path(sft(seed, tmp_path / "adapters" / name)) for seed, name in ((1, "one"), (2, "two")))
    names = ("adapter_config.json", "adapter_model.safetensors")
    files = {f"{folder.name}/{name}": folder / name for folder in (one, two) for name in names}
    files |= {f"{f.name}/{f.name}/{names[1]}": f / names[1] for f in (one, two)}  # where peft 0.18 looks when offline
    cache_dir = hub(tmp_path / "hub", "solo/adapters", files)
    for path, where in (("solo/adapters", dict(cache_dir=cache_dir)), (str(tmp_path / "adapters"), {})):
        found = [weight_hashes(path, model_args(adapter_folder=n, **where), adapter=True) for n in ("one", "two")]
        assert all(set(names) <= set(f) for f in found) and found[0][names[1]] != found[1][names[1]]
        lora = (
            ONE_BY_ONE
            | where
            | dict(finetuning_type="lora", adapter_name_or_path=path, create_new_adapter=True, max_steps=1)
        )
        for folder in ("one", "two"):
            online, cached = (
                run(recipe(solopo_reference=how, adapter_folder=folder, output_dir=str(tmp_path / how), **lora))
                for how in ("online", "cached")
            )
            assert_same(cached, online)
    assert [found for found, _ in scored(host_log)] == [0, 0, 0, 0]


def test_a_folder_without_weights_is_no_identity(tiny_model, tmp_path):
    """Nor is what the trainer leaves beside a model one."""
    from solopo_plugin.qa.provenance import weight_hashes

    shutil.copy(Path(tiny_model()) / "config.json", tmp_path)
    (tmp_path / "training_args.bin").write_text("")
    sentence = re.escape(f"{tmp_path} holds no weights (.safetensors, .bin) by which its reference scores could be")
    for adapter in (False, True):
        with pytest.raises(ValueError, match=sentence):
            weight_hashes(str(tmp_path), model_args(), adapter=adapter)
    assert list(weight_hashes(str(tmp_path), model_args(train_from_scratch=True))) == ["config.json"]


def test_only_the_hubs_names_stand_for_content(tmp_path):
    """A user's own `blobs` folder may hold other content under the same name tomorrow."""
    from solopo_plugin.qa.provenance import weight_hashes

    (tmp_path / "blobs").mkdir()
    (tmp_path / "m").mkdir()
    found = []
    for text in ("one", "two"):
        (tmp_path / "blobs" / "w.bin").write_text(text)
        (tmp_path / "m" / "model.bin").unlink(missing_ok=True)
        (tmp_path / "m" / "model.bin").symlink_to(tmp_path / "blobs" / "w.bin")
        found.append(weight_hashes(str(tmp_path / "m"), model_args()))
    assert found[0] != found[1]


# ---- every argument is declared: it changes the reference, or it does not

DECLARED = {  # `reference.BY_VALUE` besides
    "by value": "compute_dtype create_new_adapter pref_loss ref_model_quantization_bit",
    "by content": "model_name_or_path adapter_name_or_path adapter_folder new_special_tokens_config ref_model "
    "ref_model_adapters",
    "where content is found": "cache_dir model_revision hf_hub_token ms_hub_token om_hub_token",
    "seen in the loaded model": "flash_attn moe_aux_loss_coef model_max_length infer_dtype pure_bf16 use_badam "
    "finetuning_type freeze_trainable_layers freeze_trainable_modules freeze_extra_modules solopo_forward",
    "refused": "shift_attn mixture_of_depths use_unsloth use_kt export_quantization_bit block_diag_attn use_mca "
    "ld_alpha",
    "needs what is refused": "kt_weight_path kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num "
    "kt_lora_expert_intermediate_size export_quantization_dataset export_quantization_nsamples "
    "export_quantization_maxlen",
    "backward, placement, logging": "use_unsloth_gc disable_gradient_checkpointing use_reentrant_gc offload_folder "
    "use_kv_cache print_param_status quantization_device_map device_map",
    "inference and export": "infer_backend vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config "
    "sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend export_dir export_size "
    "export_device export_legacy_format export_hub_model_id",
    "images and sound": "image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels "
    "video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate freeze_vision_tower "
    "freeze_multi_modal_projector freeze_language_model",
    "the adapter that is off": "additional_target module_dropout oft_rank oft_block_size oft_target lora_alpha "
    "lora_dropout lora_rank lora_target use_rslora use_dora use_llama_pro pissa_init pissa_iter pissa_convert",
    "optimizer": "loraplus_lr_ratio loraplus_lr_embedding use_galore galore_target galore_rank galore_update_interval "
    "galore_scale galore_proj_type galore_layerwise use_apollo apollo_target apollo_rank apollo_update_interval "
    "apollo_scale apollo_proj apollo_proj_type apollo_scale_type apollo_layerwise apollo_scale_front badam_mode "
    "badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose "
    "use_adam_mini use_muon",
    "the loss, after the reference": "pref_beta pref_ftx pref_bco_weight dpo_label_smoothing simpo_gamma solopo_alpha "
    "solopo_align solopo_align_on solopo_penalty solopo_detach_short solopo_objective solopo_longpo_lambda "
    "solopo_distill_kl solopo_distill_temperature solopo_distill_topk solopo_anchor solopo_reference "
    "solopo_logp_chunk solopo_mlp_chunk solopo_sequence_parallel solopo_overlength",
    "other stages": "stage kto_chosen_weight kto_rejected_weight ppo_buffer_size ppo_epochs ppo_score_norm ppo_target "
    "ppo_whiten_rewards reward_model reward_model_adapters reward_model_quantization_bit reward_model_type "
    "use_hyper_parallel hyper_parallel_args use_dft_loss use_asft_loss asft_alpha use_eaft_loss eaft_alpha",
    "the run": "use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key "
    "swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret compute_accuracy disable_shuffling "
    "early_stopping_steps plot_loss include_effective_tokens_per_second",
}


def arguments():
    """The classes of the host's arguments, the second with ours."""
    from llamafactory.hparams import parser

    return parser._TRAIN_ARGS[0], parser._TRAIN_ARGS[3]


def identity_of(reference, model_args, finetuning_args, policy=None) -> dict:
    """The identity of a loaded reference; `policy`: the model that is trained, where it is another."""
    from solopo_plugin.forward import Packed
    from solopo_plugin.reference import identity

    settings = SimpleNamespace(bf16=False, fp16=False, tf32=None, seed=7, device=torch.device("cpu"))
    trainer = SimpleNamespace(model=policy or reference, args=settings, is_deepspeed_enabled=False, form=Packed)
    return identity(trainer, reference, model_args, finetuning_args)


def test_every_argument_is_declared():
    """A field that the host, or we, add fails here until it is said whether it changes the reference."""
    from solopo_plugin.reference import BY_VALUE

    declared = [*BY_VALUE, *(name for names in DECLARED.values() for name in names.split())]
    exist = [spec.name for arguments in arguments() for spec in fields(arguments)]
    assert sorted(declared) == sorted(exist)


def test_the_identity_holds_what_is_declared_and_nothing_else(tiny_model, sft):
    from transformers import AutoModelForCausalLM

    from solopo_plugin.reference import BY_VALUE

    changing = {*BY_VALUE, *DECLARED["by value"].split()}
    of_model, of_finetuning = arguments()
    args = (
        of_model(model_name_or_path=tiny_model(), adapter_name_or_path=sft(1)),
        of_finetuning(stage="solopo", ref_model=tiny_model(), ref_model_adapters=sft(1)),
    )
    policy, other = (AutoModelForCausalLM.from_pretrained(tiny_model()) for _ in range(2))
    before = [identity_of(policy, *args), identity_of(other, *args, policy)]
    for place, owner in enumerate(args):
        for spec in fields(owner):
            if spec.name in DECLARED["by content"]:
                continue
            changed = [*args]
            changed[place] = deepcopy(owner)
            setattr(changed[place], spec.name, "ipo" if spec.name == "pref_loss" else "changed")
            after = [identity_of(policy, *changed), identity_of(other, *changed, policy)]
            assert (after != before) == (spec.name in changing), spec.name


LOADS = {  # what the host makes of arguments, as the loaded model shows it: (common, one, other)
    "attention": ({}, {}, dict(flash_attn="disabled")),
    "dtype by layer": (dict(dtype="bfloat16"), dict(freeze_trainable_layers=1), dict(freeze_trainable_layers=2)),
    "experts": (dict(architecture="qwen2_moe"), {}, dict(moe_aux_loss_coef=0.5)),
}


@pytest.mark.parametrize("name", LOADS)
def test_what_is_seen_in_the_loaded_model(tiny_model, name):
    from llamafactory.model import load_model, load_tokenizer

    common, *two = LOADS[name]
    of_model, of_finetuning = arguments()
    found = []
    for changes in two:
        asked = common | changes
        shape = {key: asked.pop(key) for key in ("architecture", "dtype") if key in asked}
        freeze = {key: asked.pop(key) for key in ("freeze_trainable_layers",) if key in asked}
        model_args = of_model(model_name_or_path=tiny_model(**shape), **asked)
        finetuning_args = of_finetuning(stage="solopo", finetuning_type="freeze", **freeze)
        model = load_model(load_tokenizer(model_args)["tokenizer"], model_args, finetuning_args, is_trainable=True)
        found.append(identity_of(model, model_args, finetuning_args))
    assert found[0] != found[1]
    assert found[0]["weights"] == found[1]["weights"] and found[0]["arguments"] == found[1]["arguments"]


# ---- the tripwire


def shift(cache: Path, by: float, side: str = "rejected") -> None:
    """Change every score of one side on disk."""
    for file in cache.glob("*/*.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(line | {side: line[side] + by}) + "\n" for line in lines))


def test_weights_that_a_file_lacks(run, recipe, tiny_model, tmp_path):
    """They are drawn from the seed, which no argument says and no file: the live reference tells two seeds apart."""
    model = shutil.copytree(tiny_model(), tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    args = recipe(model_name_or_path=str(model), **ONE_BY_ONE)
    cached, online = (
        run(args | dict(output_dir=str(tmp_path / how), solopo_reference=how)) for how in ("cached", "online")
    )
    assert_same(cached, online)
    with pytest.raises(ValueError, match="the scores there are another model's"):
        run(args | dict(seed=8))


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("kind", ["own", "elsewhere", "sub-set"])
def test_scores_of_another_model_under_this_ones_name(run, recipe, tiny_model, cache, kind, side):
    """What no key can know, say a library that computes otherwise: the live reference is asked before any training."""
    args = recipe(max_steps=1, ref_model=tiny_model(seed=1) if kind == "elsewhere" else None)
    run(args | dict(max_samples=5) if kind == "sub-set" else args)
    shift(cache, 1e-5, side)  # what rounding explains
    run(args | dict(max_samples=5) if kind == "sub-set" else args)
    shift(cache, -0.01, side)
    before = writers(cache)
    sentence = (
        rf"{cache}/\w+ has -\d+\.\d+ as the reference's log-prob of demo_solopo\[\d+\] \({side}\), but the reference "
        r"gives -\d+\.\d+, and rounding explains 0\.00\d+ at most: the scores there are another model's\. Remove the "
        "folder to score anew, or set `solopo_reference: online`."
    )
    with pytest.raises(ValueError, match=sentence) as refused:
        run(args)
    assert "\n" not in str(refused.value) and writers(cache) == before  # nor was the rest scored
    (folder,) = cache.iterdir()
    shutil.rmtree(folder)
    run(args)


SHAPES = [("qwen2", 2, 64, 10), ("qwen2", 8, 128, 8), ("llama", 16, 128, 8), ("qwen2_moe", 4, 64, 8)]
ROUNDED = [(*shape, dtype) for shape in SHAPES for dtype in ("bfloat16", "float16", "float32")]
ROUNDED.remove(("qwen2_moe", 4, 64, 8, "float16"))  # a router that chooses another expert: a jump, whatever eps is


@pytest.mark.parametrize("architecture, layers, width, sharp, dtype", ROUNDED)
@pytest.mark.slow(keep=["qwen2-2-64-10-*"])
def test_the_bound_is_between_rounding_and_another_model(architecture, layers, width, sharp, dtype):
    """Rounding: off from float64 by half of the bound at most, as two scores may be off in opposite directions.

    Weights and output are scaled so that logits are as far apart as a trained model's (a standard deviation of 1.5 and
    more). Another model: one matrix of every layer is off by a fifth of its size.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from solopo_plugin.reference import rounding

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture, vocab_size=512, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=width, shared_expert_intermediate_size=width,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.data *= sharp if "lm_head" in name else 4
    model.to(getattr(torch, dtype))
    ids_BT, start = torch.randint(0, 512, (8, 120)), 40

    @torch.no_grad()
    def logps(model) -> list[float]:
        targets = ids_BT[:, start:, None]
        return model(ids_BT).logits[:, start - 1 : -1].double().log_softmax(-1).gather(-1, targets).sum((1, 2)).tolist()

    exact, rounded, other = deepcopy(model).double(), logps(model), deepcopy(model)
    exact.config._experts_implementation = "eager"  # the grouped product does not take float64
    truth = logps(exact)
    for layer in other.model.layers:
        weight = layer.self_attn.v_proj.weight
        weight.data += 0.2 * weight.std() * torch.randn_like(weight)
    args = SimpleNamespace(bf16=False, fp16=False, tf32=None)
    for loss, share in (("sigmoid", 1), ("ipo", 120 - start)):
        trainer = SimpleNamespace(args=args, finetuning_args=SimpleNamespace(pref_loss=loss))
        bounds = [rounding(trainer, model, logp / share, 120 - start) * share for logp in truth]
        assert all(abs(a - b) < bound / 2 for a, b, bound in zip(rounded, truth, bounds, strict=True))
        assert any(abs(a - b) > bound for a, b, bound in zip(logps(other), truth, bounds, strict=True))


@pytest.mark.slow
def test_scoring_killed_and_continued(zygote, run, recipe, tmp_path, cache, host_log, monkeypatch):
    """kill -9 while it scores, through the command line; then only the rest is scored and the run is the whole one."""
    rows = [row | {"prompt": f"{i}. {row['prompt']}"} for i, row in enumerate(demo_rows() * 5)]
    args = recipe(
        dataset="rows", dataset_dir=write_dataset(tmp_path / "data", rows), max_samples=None, max_steps=2,
        per_device_train_batch_size=1, per_device_eval_batch_size=1, num_train_epochs=None,
    )  # fmt: skip
    path = write_recipe(tmp_path / "r.yaml", args)
    process = zygote.start(BIN / "llamafactory-cli", "train", path, log=tmp_path / "log.txt")
    while process.poll() is None and sum(f.stat().st_size for f in cache.glob("*/*.jsonl")) < 2000:
        time.sleep(0.001)
    process.kill()
    (torn,) = cache.glob("*/*.jsonl")
    text = torn.read_text()
    torn.write_text(text[: text.rindex("}") - 9])  # a writer that dies within a line
    before = len(text.splitlines()) - 1
    assert 5 <= before < len(rows) - 5
    continued = run(args)
    assert scored(host_log) == [(before, len(rows) - before)]
    monkeypatch.setenv("SOLOPO_CACHE", str(tmp_path / "other"))
    whole = run(args | dict(output_dir=str(tmp_path / "whole")))
    assert continued.losses == whole.losses
    assert all(torch.equal(w, continued.weights[name]) for name, w in whole.weights.items())


def test_a_resumed_run_keeps_its_reference(run, recipe, tmp_path, cache, host_log):
    """Resumed from a checkpoint, the reference is still the model as it started: from disk, or scored anew from it."""
    args = recipe(save_strategy="steps", save_steps=2, per_device_train_batch_size=1, per_device_eval_batch_size=1)
    whole = run(args)
    for again in ("from disk", "scored anew"):
        resumed = run(args | dict(resume_from_checkpoint=str(whole.dir / "checkpoint-2"),
                                  output_dir=str(tmp_path / again.replace(" ", "_"))))  # fmt: skip
        assert resumed.losses == whole.losses, again
        assert all(torch.equal(w, resumed.weights[name]) for name, w in whole.weights.items())
        shutil.rmtree(cache)
    assert scored(host_log) == [(0, 12), (12, 0), (0, 12)]


def test_what_cannot_be_cached(run, recipe, tmp_path, host_log, monkeypatch):
    run(recipe(streaming=True, max_samples=None, max_steps=2, num_train_epochs=None, dataloader_num_workers=1))
    assert any("A stream is read once: the reference runs in every step" in message for message in host_log)
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("SOLOPO_CACHE", str(blocked))
    with pytest.raises(Refused, match=r"cannot be kept in .*\(Not a directory\); set SOLOPO_CACHE to a folder"):
        run(recipe())


def test_a_rope_whose_frequencies_the_batch_chooses(run, recipe, tiny_model, monkeypatch):
    """Refuse to score rows that change others; where none does, or the reference runs in the step, all is equal."""

    def rewards(limit: int, **changes) -> list[float]:
        rope = dict(rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=limit)
        rope |= dict(short_factor=[1.0] * 8, long_factor=[1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 8.0, 9.0])
        model = tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=limit, initializer_range=0.1)
        alone = dict(per_device_train_batch_size=1, gradient_accumulation_steps=4, num_train_epochs=1.0)
        log = run(recipe(model_name_or_path=model, optim="sgd", learning_rate=1e-12, **alone, **changes)).log
        return [entry["rewards/chosen"] for entry in log if "rewards/chosen" in entry]

    sentence = r"`solopo_reference: cached` does not go with `longrope` .* 182 tokens: more than 176 .* `.*: online`"
    with pytest.raises(Refused, match=sentence):
        rewards(176)
    assert rewards(176, solopo_reference="online") == [0.0] * 3
    assert rewards(184) == pytest.approx([0.0] * 3, abs=1e-4)
    monkeypatch.setattr("solopo_plugin.workflow.ropes_by_length", lambda config: {})
    assert max(map(abs, rewards(176))) > 1e-3, "what is refused"


def test_a_rope_that_remembers_longer_rows(run, recipe, tiny_model):
    rope = dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)
    model = tiny_model(rope_parameters=rope, max_position_embeddings=128)
    with pytest.raises(
        Refused, match="With `dynamic` rope scaling a longer row changes all that follow. 12 of 12 rows"
    ):
        run(recipe(model_name_or_path=model, pref_loss="orpo"))


def test_a_reference_that_is_not_finite(run, recipe, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model(), tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    sentence = r"The reference's log-prob of demo_solopo\[\d+\], demo_.* is not finite; look at the model and its dtype"
    with pytest.raises(FloatingPointError, match=sentence):
        run(recipe(model_name_or_path=str(model)))


def test_evaluation_against_a_ref_model(recipe, tiny_model, tmp_path):
    """`do_train: false` with a `ref_model`: cached equals online."""
    from llamafactory.train.tuner import run_exp

    found = []
    for how in ("online", "cached"):
        args = recipe(
            do_train=False, do_eval=True, dataset=None, eval_dataset="demo_solopo", max_samples=5, solopo_reference=how,
            ref_model=tiny_model(seed=1), output_dir=str(tmp_path / how), per_device_eval_batch_size=1,
        )  # fmt: skip
        run_exp(args)
        metrics = json.loads((tmp_path / how / "eval_results.json").read_text())
        found.append({name: value for name, value in metrics.items() if "/" in name or name == "eval_loss"})
    assert found[0] == found[1] and found[0]["eval_rewards/margins"] != 0


def test_scoring_under_deepspeed_leaves_out_the_optimizer(monkeypatch):
    """Give the scoring engine neither optimizer (memory) nor scheduler (its `auto` values are not filled in yet)."""
    named = dict(optimizer={"type": "AdamW"}, scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}})
    config, given = named | dict(zero_optimization={"stage": 3}), []
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config))
    trainer = SimpleNamespace(
        is_deepspeed_enabled=True, model=None, accelerator=SimpleNamespace(state=state, autocast=nullcontext)
    )
    monkeypatch.setattr("trl.models.utils.prepare_deepspeed", lambda model, accelerator: given.append(dict(config)))
    with _ready_to_score(trainer, torch.nn.Linear(1, 1)):
        assert given == [dict(zero_optimization={"stage": 3})]
    assert config == named | given[0]
