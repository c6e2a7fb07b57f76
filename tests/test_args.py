"""The `solopo_*` keys: one definition, checked types and ranges, host rules kept, nothing leaks into other stages."""

import dataclasses
import pickle
import re
from contextlib import nullcontext

import pytest
import torch
from conftest import ROOT

from solopo_plugin.args import FIELDS, SoloArguments, check_keys, check_values


def test_defaults_are_the_papers_form():
    assert dataclasses.asdict(SoloArguments()) == {
        "solopo_alpha": 1.0,
        "solopo_align": "reward",
        "solopo_align_on": "chosen",
        "solopo_penalty": "auto",
        "solopo_detach_short": False,
        "solopo_objective": "solopo",
        "solopo_longpo_lambda": 0.01,
        "solopo_distill_kl": "forward",
        "solopo_distill_temperature": 1.0,
        "solopo_distill_topk": 0,
        "solopo_anchor": 0.0,
        "solopo_overlength": "error",
        "solopo_forward": "auto",
        "solopo_reference": "cached",
        "solopo_logp_chunk": 1024,
        "solopo_mlp_chunk": 0,
        "solopo_sequence_parallel": 1,
    }
    check_values(SoloArguments())


def test_whole_numbers_become_floats():
    args = SoloArguments(solopo_alpha=2)
    check_values(args)
    assert isinstance(args.solopo_alpha, float)


def test_misspelt_key_names_the_nearest_and_all():
    with pytest.raises(ValueError, match=r"`solopo_alfa`.*Did you mean `solopo_alpha`\?.*solopo_forward"):
        check_keys(["learning_rate", "solopo_alfa"])
    check_keys(FIELDS)


def test_the_page_of_keys_documents_every_key_with_its_default():
    table = (ROOT / "docs" / "keys.md").read_text(encoding="utf-8")
    for name, field in FIELDS.items():
        default = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
        assert re.search(rf"^\| `{name}` \| `?{re.escape(default)}`? \|", table, re.M), name


def parse(index: int = 3, **recipe):
    """Arguments of one kind, by its place among the host's; 3 are the finetuning arguments, 1 the data arguments."""
    from llamafactory.hparams.parser import _parse_train_args

    return _parse_train_args({"model_name_or_path": "unused", "output_dir": "unused", "use_cpu": True, **recipe})[index]


@pytest.mark.parametrize(
    "pref_loss, objective, reference",
    [("sigmoid", "solopo", True), ("ipo", "solopo", True), ("hinge", "solopo", True), ("simpo", "solopo", False),
     ("orpo", "solopo", False), ("sigmoid", "longpo", True), ("sigmoid", "distill", False)],
)  # fmt: skip
def test_reference_model_where_the_loss_has_one(pref_loss, objective, reference):
    args = parse(stage="solopo", pref_loss=pref_loss, solopo_objective=objective)
    assert args.use_ref_model is reference and args.stage == "solopo"
    if objective != "longpo":
        assert parse(stage="solopo", pref_loss=pref_loss, solopo_objective=objective, solopo_anchor=0.1).use_ref_model


@pytest.mark.parametrize("keys", [
    dict(solopo_objective="distill"), dict(pref_loss="sigmoid", ref_model="a"), dict(pref_loss="orpo"),
    dict(pref_loss="orpo", solopo_anchor=1.0, ref_model="a"),
])  # fmt: skip
def test_pissa_beside_no_reference_or_one_of_its_own(keys):
    args = parse(stage="solopo", finetuning_type="lora", pissa_init=True, **keys)
    assert args.pissa_init and args.use_ref_model == ("ref_model" in keys)


@pytest.mark.parametrize("keys", [
    dict(metric_for_best_model="solopo/nll", greater_is_better=False),
    dict(metric_for_best_model="solopo/nll", greater_is_better=True),
    dict(metric_for_best_model="rewards/accuracies"), dict(metric_for_best_model="solopo/align_loss"),
])  # fmt: skip
def test_a_metric_that_names_the_best_checkpoint_as_it_should(keys):
    parse(stage="solopo", **keys)


@pytest.mark.parametrize("keys, told", [
    (dict(pure_bf16=True, learning_rate=9e-5), True), (dict(pure_bf16=True, learning_rate=1e-4), False),
    (dict(bf16=True, learning_rate=9e-5), False),
    (dict(pure_bf16=True, learning_rate=9e-5, finetuning_type="lora"), False),
    (dict(pure_bf16=True, learning_rate=9e-5, do_train=False, do_eval=True, eval_dataset="demo_solopo"), False),
])  # fmt: skip
def test_bf16_weights_at_small_rates_are_told(host_log, keys, told, monkeypatch):
    from llamafactory.hparams import parser

    monkeypatch.setattr(parser, "is_torch_bf16_gpu_available", lambda: True)
    keys = dict(stage="solopo", do_train=True, finetuning_type="full", dataset="demo_solopo", template="qwen") | keys
    parser.get_train_args(keys | dict(model_name_or_path="unused", output_dir="unused", use_cpu=True))
    assert told == any(
        message.startswith("`pure_bf16: true` rounds most of AdamW's updates away at `learning_rate: 9e-05`")
        for message in host_log
    )


FULL = dict(stage="solopo", do_train=True, finetuning_type="full", dataset="demo_solopo", template="qwen")
WATCHED = dict(eval_dataset="demo_solopo", eval_strategy="epoch")
NO_LAYERS = (
    "does not work with `stage: solopo`: the layers' optimizers keep the full `learning_rate`, without warm-up or "
    "decay, and a resume loses their state (`use_galore` or `use_apollo` with `optim: adamw_torch` keeps both); "
    "remove it."
)
NOT_FUSED = "does not run with the host's default `optim: adamw_torch_fused`; set `optim: adamw_torch`."
WATCHES, LOSS = "`early_stopping_steps: 2` needs a metric to watch: set", "`metric_for_best_model` (such as `loss`)"


@pytest.mark.parametrize("keys, sentence", [
    (dict(use_galore=True), f"`use_galore` {NOT_FUSED}"), (dict(use_apollo=True), f"`use_apollo` {NOT_FUSED}"),
    (dict(use_badam=True, badam_mode="ratio"), f"`badam_mode: ratio` {NOT_FUSED}"),
    (dict(use_galore=True, optim="adamw_torch"), None), (dict(use_galore=True, optim="adafactor"), None),
    (dict(use_badam=True), None), (dict(badam_mode="ratio"), None),
    (dict(use_galore=True, galore_layerwise=True), f"`galore_layerwise: True` {NO_LAYERS}"),
    (dict(use_apollo=True, apollo_layerwise=True), f"`apollo_layerwise: True` {NO_LAYERS}"),
    (dict(optim="galore_adamw_layerwise"), f"`optim: galore_adamw_layerwise` {NO_LAYERS}"),
    (dict(early_stopping_steps=2), f"{WATCHES} {LOSS} and `eval_strategy` and `eval_dataset` or `val_size`."),
    (dict(early_stopping_steps=2, metric_for_best_model="loss"),
     f"{WATCHES} `eval_strategy` and `eval_dataset` or `val_size`."),
    (dict(early_stopping_steps=2, metric_for_best_model="loss", val_size=0.5), f"{WATCHES} `eval_strategy`."),
    (dict(early_stopping_steps=2, **WATCHED), f"{WATCHES} {LOSS}."),
    (dict(early_stopping_steps=0, **WATCHED), f"{WATCHES} {LOSS}.".replace("2", "0")),
    (dict(early_stopping_steps=2, eval_on_each_dataset=True, **WATCHED),
     f"{WATCHES} `metric_for_best_model` (such as `NAME_loss`, with the name of a data set)."),
    (dict(early_stopping_steps=2, metric_for_best_model="loss", **WATCHED), None),
    (dict(lr_scheduler_type="reduce_lr_on_plateau", metric_for_best_model="rewards/margins", **WATCHED),
     "`reduce_lr_on_plateau` takes a better `rewards/margins` for a worse one; set "
     "`lr_scheduler_kwargs: {mode: max}`."),
    (dict(lr_scheduler_type="greedy", metric_for_best_model="rewards/accuracies", **WATCHED),
     "`greedy` takes a better `rewards/accuracies` for a worse one; set `lr_scheduler_kwargs: {mode: max}`."),
    (dict(lr_scheduler_type="greedy", lr_scheduler_kwargs={"mode": "max"}, **WATCHED),
     "`greedy` takes a better `loss` for a worse one; set `lr_scheduler_kwargs: {mode: min}`."),
    (dict(lr_scheduler_type="greedy", lr_scheduler_kwargs={"mode": "max"}, metric_for_best_model="rewards/margins",
          **WATCHED), None),
    (dict(lr_scheduler_type="reduce_lr_on_plateau", lr_scheduler_kwargs={"patience": 0}, **WATCHED), None),
    (dict(lr_scheduler_type="reduce_lr_on_plateau", metric_for_best_model="solopo/nll", greater_is_better=False,
          **WATCHED), None),
    (dict(finetuning_type="lora", quantization_bit=4), "`quantization_bit: 4` does not train on a CPU: bitsandbytes "
     "packs the weights anew when it first evaluates, and part of the gradient is lost; set `quantization_bit: 8`, "),
    (dict(finetuning_type="lora", quantization_bit=4, do_train=False, do_eval=True, **WATCHED), None),
    (dict(num_train_epochs=0, max_steps=1), None), (dict(max_grad_norm=float("inf")), None),
    (dict(save_total_limit=None, warmup_steps=0, mix_strategy="interleave_over"), None),
    (dict(do_train=False), "There is nothing to do: set `do_train: true` or `do_eval: true`."),
    (dict(do_train=False, do_predict=True, eval_dataset="demo_solopo"),
     "`do_predict: True` has no effect in `stage: solopo`: the stage generates nothing; "
     "remove it, or set it to False."),
    (dict(learning_rate=None), "`learning_rate` must be a number, got None."),
    (dict(num_train_epochs=None), "`num_train_epochs` must be a number, got None."),
    (dict(finetuning_type="lora", adapter_name_or_path=["a", "b"]),
     "`adapter_name_or_path` must be one text, with commas between several, got ['a', 'b']."),
    (dict(add_tokens=["<a>"]), "`add_tokens` must be one text, with commas between several, got ['<a>']."),
    (dict(add_special_tokens=["<a>"]), "`add_special_tokens` must be one text, with commas between several, got"),
    (dict(ref_model="a", ref_model_adapters=["a"]), "`ref_model_adapters` must be one text, with commas between"),
    (dict(dataset=["demo_solopo", "demo_history"], mix_strategy="interleave_over", interleave_probs=[0.5, 0.5]), None),
])  # fmt: skip
def test_settings_that_the_host_takes_and_fails_with(monkeypatch, keys, sentence):
    from llamafactory.hparams import parser

    monkeypatch.setattr(parser, "check_version", lambda *_, **__: None)  # the optimizers' packages
    keys = FULL | dict(model_name_or_path="unused", output_dir="unused", use_cpu=True) | keys
    with nullcontext() if sentence is None else pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        parser.get_train_args(keys)


@pytest.mark.parametrize("processes", [1, 2])
def test_unequal_shares_of_several_processes(monkeypatch, processes):
    from llamafactory.hparams import parser

    monkeypatch.setattr(parser.TrainingArguments, "world_size", property(lambda self: processes))
    keys = dict(model_name_or_path="unused", output_dir="unused", use_cpu=True)
    refused = pytest.raises(ValueError, match="^`even_batches: False` gives processes unequal shares")
    with refused if processes > 1 else nullcontext():
        parser.get_train_args(FULL | keys | dict(accelerator_config={"even_batches": False}))


def test_four_bits_train_on_a_gpu(monkeypatch):
    from llamafactory.hparams import parser

    cpu = parser.TrainingArguments.device.fget
    monkeypatch.setattr(parser.TrainingArguments, "device", property(lambda self: cpu(self) and torch.device("cuda")))
    keys = dict(model_name_or_path="unused", output_dir="unused", use_cpu=True)
    parser.get_train_args(FULL | keys | dict(finetuning_type="lora", quantization_bit=4))


def test_qlora_arguments_are_accepted():
    from llamafactory.hparams.parser import get_train_args

    model_args, *_, args, _ = get_train_args(dict(
        stage="solopo", do_train=True, dataset="demo_solopo", finetuning_type="lora", quantization_bit=8,
        quantization_method="bnb", model_name_or_path="unused", template="qwen", output_dir="unused", use_cpu=True,
    ))  # fmt: skip
    assert model_args.quantization_bit == 8 and args.use_ref_model


def test_other_stages_report_only_the_hosts_keys():
    from llamafactory.hparams import FinetuningArguments

    assert parse(stage="dpo").to_dict() == FinetuningArguments(stage="dpo").to_dict()
    assert parse(stage="solopo").to_dict()["solopo_alpha"] == 1.0


def test_data_arguments_are_the_hosts_in_other_stages_and_keep_ours_in_this_one():
    """What is mapped over rows holds them, so that their pickle is in the fingerprints of the host's cache."""
    from llamafactory.hparams import DataArguments

    theirs, host = parse(1, stage="sft", dataset="demo"), DataArguments(dataset="demo")
    assert pickle.dumps(theirs) == pickle.dumps(host) and theirs.to_dict() == host.to_dict()
    ours = parse(1, stage="solopo", solopo_overlength="drop")
    assert ours.solopo_overlength == "drop" == pickle.loads(pickle.dumps(ours)).solopo_overlength


def test_chat_and_export_accept_a_training_recipe():
    from llamafactory.hparams.parser import _parse_infer_args

    recipe = dict(stage="solopo", solopo_alpha=3.0, model_name_or_path="unused", template="qwen")
    assert _parse_infer_args(recipe)[2].solopo_alpha == 3.0
