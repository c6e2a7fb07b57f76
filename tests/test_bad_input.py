"""Bad recipes and bad rows: each gives one sentence that names what, where, the value seen, and what to do.

All of them stop before a model is loaded.
"""

import json
import re

import pytest
from conftest import ROOT, SOLO_COLUMNS, demo_rows, write_dataset

from solopo_plugin.host.arguments import UNREAD

STREAM = {"streaming": True, "max_samples": None, "max_steps": 1}
RECIPES = {  # name: (changes to a valid recipe, the sentence)
    "misspelt key": ({"solopo_alfa": 1}, "Unknown key `solopo_alfa` in the recipe. Did you mean `solopo_alpha`? Allowed: "),
    "unknown key": ({"solopo_zzz": 1}, "Unknown key `solopo_zzz` in the recipe. Allowed: solopo_alpha, "),
    "negative alpha": ({"solopo_alpha": -1}, "`solopo_alpha` must be a number >= 0, got -1."),
    "alpha a word": ({"solopo_alpha": "big"}, "`solopo_alpha` must be a number >= 0, got 'big'."),
    "alpha nan": ({"solopo_alpha": float("nan")}, "`solopo_alpha` must be a number >= 0, got nan."),
    "alpha true": ({"solopo_alpha": True}, "`solopo_alpha` must be a number >= 0, got True."),
    "negative lambda": ({"solopo_longpo_lambda": -0.1}, "`solopo_longpo_lambda` must be a number >= 0, got -0.1."),
    "align": ({"solopo_align": "kl"}, "`solopo_align` must be one of reward, logp, distill; got 'kl'."),
    "align on": ({"solopo_align_on": "rejected"}, "`solopo_align_on` must be one of chosen, both; got 'rejected'."),
    "penalty": ({"solopo_penalty": "l1"}, "`solopo_penalty` must be one of auto, abs, squared, drop; got 'l1'."),
    "detach": ({"solopo_detach_short": "yes"}, "`solopo_detach_short` must be true or false, got 'yes'."),
    "objective": ({"solopo_objective": "dpo"}, "`solopo_objective` must be one of solopo, longpo, distill; got 'dpo'."),
    "overlength": ({"solopo_overlength": "cut"}, "`solopo_overlength` must be one of error, drop; got 'cut'."),
    "forward": ({"solopo_forward": "fast"}, "`solopo_forward` must be one of auto, packed, two_stage; got 'fast'."),
    "chunk zero": ({"solopo_logp_chunk": 0}, "`solopo_logp_chunk` must be a whole number >= 1, got 0."),
    "no process for a row": (
        {"solopo_sequence_parallel": 0}, "`solopo_sequence_parallel` must be a whole number >= 1, got 0."
    ),
    "mlp chunk negative": ({"solopo_mlp_chunk": -1}, "`solopo_mlp_chunk` must be a whole number >= 0, got -1."),
    "chunk fraction": ({"solopo_logp_chunk": 2.5}, "`solopo_logp_chunk` must be a whole number >= 1, got 2.5."),
    "loss": ({"pref_loss": "kto_pair"}, "`pref_loss` must be one of sigmoid, ipo, hinge, simpo, orpo for `stage: solopo`; got 'kto_pair'."),
    "longpo loss": ({"solopo_objective": "longpo", "pref_loss": "orpo"}, "`solopo_objective: longpo` is a DPO loss: set `pref_loss: sigmoid`, got 'orpo'."),
    "beta": ({"pref_beta": 0}, "`pref_beta` must be > 0, got 0."),
    "beta as text": ({"pref_beta": "1e-1"}, "`pref_beta` must be a number, got '1e-1'; write it without quotes, and with a point (`5.0e-6`)."),
    "losses": ({"pref_loss": ["sigmoid"]}, "`pref_loss` must be one of sigmoid, ipo, hinge, simpo, orpo for `stage: solopo`; got ['sigmoid']."),
    "negative ftx": ({"pref_ftx": -1}, "`pref_ftx` must be >= 0, got -1."),
    "ftx nan": ({"pref_ftx": float("nan")}, "`pref_ftx` must be a number, got nan."),
    "ftx as text": ({"pref_ftx": "0.5"}, "`pref_ftx` must be a number, got '0.5'; write it without quotes"),
    "gamma nan": ({"pref_loss": "simpo", "simpo_gamma": float("nan")}, "`simpo_gamma` must be a number, got nan."),
    "gamma is a list": ({"pref_loss": "simpo", "simpo_gamma": [1.0]}, "`simpo_gamma` must be a number, got [1.0]."),
    "smoothing as text": ({"dpo_label_smoothing": "0.1"}, "`dpo_label_smoothing` must be a number, got '0.1'; write it without quotes"),
    "no accumulation": ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` must be a whole number >= 1, got 0."),
    "a batch that is true": ({"per_device_train_batch_size": True}, "`per_device_train_batch_size` must be a whole number >= 1, got True."),
    "no batch": ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size` must be a whole number >= 1, got 0."),
    "no batch of an evaluation": ({"per_device_eval_batch_size": 0}, "`per_device_eval_batch_size` must be a whole number >= 1, got 0."),
    "smoothing": ({"dpo_label_smoothing": 0.5}, "`dpo_label_smoothing` must be in [0, 0.5), got 0.5."),
    "smoothing without dpo": ({"dpo_label_smoothing": 0.1, "pref_loss": "ipo"}, "`dpo_label_smoothing` is only valid for sigmoid loss function."),
    "packing": ({"packing": True}, "`packing: True` does not work with `stage: solopo`: rows of pairs cannot be packed by the host; remove it."),
    "quantized for export": ({"export_quantization_bit": 4, "export_quantization_dataset": "x.json"}, "`export_quantization_bit: 4` does not work with `stage: solopo`: it quantizes what is trained; remove it."),
    "drawn reference": ({"train_from_scratch": True, "ref_model": "REF"}, "`train_from_scratch: true` would draw the weights of `ref_model: REF` too, not read them; remove one of the two."),
    "our key in another stage": ({"stage": "dpo", "dataset": "demo_short_po", "solopo_alpha": 1}, "`solopo_alpha` has no effect in `stage: dpo`; set `stage: solopo` or remove the key."),
    "streaming without steps": ({"streaming": True, "max_samples": None}, "Please specify `max_steps` in streaming mode."),
    "data set of another stage": ({"dataset": "demo_short_po"}, "Dataset `demo_short_po` has no long context for `stage: solopo`: under `columns` in dataset_info.json map `long_prompt` (formatting `alpaca`) to the column that holds the long prompt, and `prompt` to one with its evidence and question alone."),
    "our data set in dpo": ({"stage": "dpo"}, "Dataset `demo_solopo` is registered for `stage: solopo` (it has a long column, `long_prompt`). For another stage, register the same file under a second name"),
    "our data set in sft": ({"stage": "sft"}, "Dataset `demo_solopo` is registered for `stage: solopo` (it has a long column, `long_prompt`)."),
    "undefined data set": ({"dataset": "nowhere"}, "`dataset: nowhere` is not registered in DATA/dataset_info.json: make rows (scripts/build_data.py), or register yours (docs/data.md)."),
    "too long": ({"cutoff_len": 64}, r"demo_solopo\[0\]: prompt \+ response have \d+ tokens and `cutoff_len` is 64; raise `cutoff_len`, shorten the row, or set `solopo_overlength: drop`."),
    "all too long": ({"cutoff_len": 64, "solopo_overlength": "drop"}, "All 12 rows are longer than `cutoff_len: 64` and were dropped; raise `cutoff_len`."),
    "held out of a stream": ({**STREAM, "val_size": 2}, "`val_size: 2` does not work with `streaming: true`: the host shuffles anew for each pass, and from the second on it trains on rows that it validates on; set `eval_dataset`, or `streaming: false`."),
    "best by nll": ({"metric_for_best_model": "solopo/nll"}, "`metric_for_best_model: solopo/nll` is better when lower, and the host would keep the checkpoint with the highest; set `greater_is_better: false`."),
    "best by a data set's gap": ({"metric_for_best_model": "eval_one_solopo/reward_gap"}, "`metric_for_best_model: eval_one_solopo/reward_gap` is better when lower"),
    "dropping from a stream": ({"streaming": True, "max_samples": None, "max_steps": 1, "solopo_overlength": "drop"}, "`solopo_overlength: drop` cannot count what it drops from a stream; set `streaming: false`."),
    "no samples": ({"max_samples": 0}, "Dataset `demo_solopo` has no rows; `num_samples: None`, `max_samples: 0` leave none."),
    "a data set twice": ({"dataset": "demo_solopo, demo_solopo"}, "Dataset `demo_solopo` is named twice and counts once; register it under a second name, too."),
    "stream without workers": ({"streaming": True, "max_samples": None, "max_steps": 1}, "Dataset `demo_solopo` has no rows; with `streaming: true` a local file also needs `dataloader_num_workers: 1` or more."),
    "alpha in longpo": ({"solopo_objective": "longpo", "solopo_alpha": 2}, "`solopo_alpha: 2.0` has no effect with `solopo_objective: longpo`; remove it, or set it to 1.0."),
    "ftx in longpo": ({"solopo_objective": "longpo", "pref_ftx": 1.0}, "`pref_ftx: 1.0` has no effect with `solopo_objective: longpo`; remove it, or set it to 0.0."),
    "distill kl": ({"solopo_align": "distill", "solopo_distill_kl": "kl"}, "`solopo_distill_kl` must be one of forward, reverse, jsd; got 'kl'."),
    "temperature 0": ({"solopo_align": "distill", "solopo_distill_temperature": 0}, "`solopo_distill_temperature` must be > 0, got 0.0."),
    "topk negative": ({"solopo_align": "distill", "solopo_distill_topk": -1}, "`solopo_distill_topk` must be a whole number >= 0, got -1."),
    "negative anchor": ({"solopo_anchor": -0.1}, "`solopo_anchor` must be a number >= 0, got -0.1."),
    "distill kl of rewards": ({"solopo_distill_kl": "reverse"}, "`solopo_distill_kl: reverse` has no effect with `solopo_align: reward`; remove it, or set it to forward."),
    "temperature of log-probs": ({"solopo_align": "logp", "solopo_distill_temperature": 2}, "`solopo_distill_temperature: 2.0` has no effect with `solopo_align: logp`; remove it, or set it to 1.0."),
    "penalty in distill": ({"solopo_align": "distill", "solopo_penalty": "drop"}, "`solopo_penalty: drop` has no effect with `solopo_align: distill`; remove it, or set it to auto."),
    "detached distill": ({"solopo_align": "distill", "solopo_detach_short": True}, "`solopo_detach_short: True` has no effect with `solopo_align: distill`; remove it, or set it to False."),
    "alpha of distill alone": ({"solopo_objective": "distill", "solopo_alpha": 2}, "`solopo_alpha: 2.0` has no effect with `solopo_objective: distill`; remove it, or set it to 1.0."),
    "log-probs of distill alone": ({"solopo_objective": "distill", "solopo_align": "logp"}, "`solopo_align: logp` has no effect with `solopo_objective: distill`; remove it, or set it to reward."),
    "loss of distill alone": ({"solopo_objective": "distill", "pref_loss": "orpo"}, "`pref_loss: orpo` has no effect with `solopo_objective: distill`; remove it, or set it to sigmoid."),
    "beta of distill alone": ({"solopo_objective": "distill", "pref_beta": 0.2}, "`pref_beta: 0.2` has no effect with `solopo_objective: distill`; remove it, or set it to 0.1."),
    "reference of distill alone": ({"solopo_objective": "distill", "ref_model": "a/model"}, "`ref_model: a/model` has no effect in `stage: solopo`: `solopo_objective: distill` has no reference; remove it."),
    "anchor in longpo": ({"solopo_objective": "longpo", "solopo_anchor": 1}, "`solopo_anchor: 1.0` has no effect with `solopo_objective: longpo`; remove it, or set it to 0.0."),
    "topk in longpo": ({"solopo_objective": "longpo", "solopo_distill_topk": 9}, "`solopo_distill_topk: 9` has no effect with `solopo_objective: longpo`; remove it, or set it to 0."),
    "anchored pissa": ({"solopo_anchor": 1, "pref_loss": "orpo", "finetuning_type": "lora", "pissa_init": True}, "`pissa_init: true` changes the reference's weights; set `ref_model` to the model before training."),
    "pissa and a reference": ({"finetuning_type": "lora", "pissa_init": True}, "`pissa_init: true` changes the reference's weights; set `ref_model` to the model before training."),
    "pissa without lora": ({"pref_loss": "orpo", "pissa_init": True}, "`pissa_init` is only valid for LoRA training."),
    "checkpointing on and off": ({"gradient_checkpointing": True, "disable_gradient_checkpointing": True}, "`gradient_checkpointing: true` undoes `disable_gradient_checkpointing: true`; remove one of the two."),
    "neftune": ({"neftune_noise_alpha": 5}, "`neftune_noise_alpha: 5` does not work with `stage: solopo`: its noise depends on the length of what runs as one row, so the short and the long context get different noise"),
    "dispatched batches": ({"accelerator_config": {"dispatch_batches": True}}, "`dispatch_batches: True` does not work with `stage: solopo`: one process cannot cut the others' part from a packed row or from rows of different lengths; remove it."),
    "sampling strategy": ({"train_sampling_strategy": "by_length"}, "`train_sampling_strategy` must be one of random, sequential, group_by_length; got 'by_length'."),
    "grouped and unshuffled": ({"train_sampling_strategy": "group_by_length", "disable_shuffling": True}, "`train_sampling_strategy: group_by_length` has no effect in `stage: solopo`: `disable_shuffling` already keeps the rows' order; remove it, or set it to random."),
    "grouped stream": ({"train_sampling_strategy": "group_by_length", **STREAM}, "`train_sampling_strategy: group_by_length` has no effect in `stage: solopo`: the host shuffles a stream by `buffer_size`; remove it, or set it to random."),
    "unshuffled stream": ({"disable_shuffling": True, **STREAM}, "`disable_shuffling: True` has no effect in `stage: solopo`: the host shuffles a stream by `buffer_size`; remove it, or set it to False."),
    "rate of a stream": ({"include_effective_tokens_per_second": True, **STREAM}, "`include_effective_tokens_per_second: True` has no effect in `stage: solopo`: a stream has no length; remove it, or set it to False."),
    "gamma without simpo": ({"simpo_gamma": 0.7}, "`simpo_gamma: 0.7` has no effect in `stage: solopo`: it is for `pref_loss: simpo`; remove it, or set it to 0.5."),
    "reference without need": ({"ref_model": "a/model", "pref_loss": "orpo"}, "`ref_model: a/model` has no effect in `stage: solopo`: `pref_loss: orpo` has no reference; remove it."),
    "online without need": ({"solopo_reference": "online", "pref_loss": "orpo"}, "`solopo_reference: online` has no effect in `stage: solopo`: `pref_loss: orpo` has no reference; remove it, or set it to cached."),
    "online distill alone": ({"solopo_reference": "online", "solopo_objective": "distill"}, "`solopo_reference: online` has no effect in `stage: solopo`: `solopo_objective: distill` has no reference; remove it, or set it to cached."),
    "adapters of no reference": ({"ref_model_adapters": "an/adapter"}, "`ref_model_adapters: an/adapter` has no effect in `stage: solopo`: there is no `ref_model`; remove it."),
    "bits of no reference": ({"ref_model_quantization_bit": 4}, "`ref_model_quantization_bit: 4` has no effect in `stage: solopo`: there is no `ref_model`; remove it."),
    "neat packing": ({"neat_packing": True}, "`neat_packing` cannot be set as True except SFT."),
    "learning rate as text": ({"learning_rate": "1e-5"}, "`learning_rate` must be a number, got '1e-5'; write it without quotes, and with a point (`5.0e-6`)."),
    "epochs as text": ({"num_train_epochs": "3"}, "`num_train_epochs` must be a number, got '3'; write it without quotes, and with a point (`5.0e-6`)."),
    "no epochs given": ({"num_train_epochs": float("nan")}, "`num_train_epochs` must be a number, got nan."),
    "steps as text": ({"max_steps": "3"}, "`max_steps` must be a number, got '3'; write it without quotes"),
    "cutoff as text": ({"cutoff_len": "1024"}, "`cutoff_len` must be a number, got '1024'; write it without quotes"),
    "share as text": ({"val_size": "0.1"}, "`val_size` must be a number, got '0.1'; write it without quotes"),
    "samples are a word": ({"max_samples": "all"}, "`max_samples` must be a number, got 'all'; write it without quotes"),
    "samples are a fraction": ({"max_samples": 12.5}, "`max_samples` must be a whole number, got 12.5."),
    "seeds": ({"seed": [7, 8]}, "`seed` must be a number, got [7, 8]."),
    "decay nan": ({"weight_decay": float("nan")}, "`weight_decay` must be a number, got nan."),
    "clipping nan": ({"max_grad_norm": float("nan")}, "`max_grad_norm` must be a number, got nan."),
    "rank as text": ({"finetuning_type": "lora", "lora_rank": "8"}, "`lora_rank` must be a number, got '8'; write it without quotes"),
    "endless beta": ({"pref_beta": float("inf")}, "`pref_beta` must be > 0, got inf."),
    "learning rate nan": ({"learning_rate": float("nan")}, "`learning_rate` must be a number, got nan."),
    "no epoch": ({"num_train_epochs": 0}, "`num_train_epochs: 0` takes no step, and the model is saved as it was; set it above 0."),
    "fewer epochs than none": ({"num_train_epochs": -1.0, "max_steps": -1}, "`num_train_epochs: -1.0` takes no step, and the model is saved as it was; set it above 0."),
    "each row once": ({"dataset": "demo_solopo,demo_history", "mix_strategy": "interleave_once"}, "`mix_strategy: interleave_once` needs a newer `datasets` than the host takes; set another strategy."),
    "half precision on a CPU": ({"fp16": True}, "`fp16: True` has no effect in `stage: solopo`: a CPU computes in fp32; remove it, or set it to False."),
    "trained prompts": ({"train_on_prompt": True}, "`train_on_prompt` or `mask_history` cannot be set as True except SFT."),
    "masked history": ({"mask_history": True}, "`train_on_prompt` or `mask_history` cannot be set as True except SFT."),
    "predictions": ({"predict_with_generate": True}, "`predict_with_generate` cannot be set as True except SFT."),
    "wider window": ({"rope_scaling": "yarn"}, "`rope_scaling: yarn` does not work with `stage: solopo`: it does nothing, or fails with transformers 5; config.json takes one (docs/training.md, \"Rows longer than one GPU\"); remove it."),
    "layerwise galore": ({"galore_layerwise": True}, "`galore_layerwise: True` does not work with `stage: solopo`: the layers' optimizers keep the full `learning_rate`"),
    "lambda in solopo": ({"solopo_longpo_lambda": 0.1}, "`solopo_longpo_lambda: 0.1` has no effect with `solopo_objective: solopo`; remove it, or set it to 0.01."),
}  # fmt: skip

USER, BOT = "human", "gpt"
TALK = {
    "conversations": [{"from": USER, "value": "Short. Where?"}],
    "long": [{"from": USER, "value": "Long and more. Where?"}],
    "chosen": {"from": BOT, "value": "Here."},
    "rejected": {"from": BOT, "value": "There."},
}
TALK_ENTRY = {
    "formatting": "sharegpt",
    "columns": {"messages": "conversations", "long_messages": "long", "chosen": "chosen", "rejected": "rejected"},
}
GOOD = demo_rows(4)
ROWS = {  # name: (changes to row 2 of 4, changes to the dataset_info entry, the sentence)
    "empty long prompt": ({"long_prompt": " "}, {}, "rows[2]: column `long_prompt` is empty; give it a text or remove the row."),
    "missing long prompt": ({"long_prompt": None}, {}, "rows[2]: column `long_prompt` must be a string, got NoneType 'None'."),
    "empty short prompt": ({"prompt": ""}, {}, "rows[2]: column `prompt` is empty"),
    "empty chosen": ({"chosen": ""}, {}, "rows[2]: column `chosen` is empty"),
    "rejected is null": ({"rejected": None}, {}, "rows[2]: column `rejected` must be a string, got NoneType 'None'."),
    "equal responses": ({"chosen": "Same.", "rejected": "Same."}, {}, "rows[2]: columns `chosen` and `rejected` hold the same text; remove the row."),
    "templated text": ({"long_prompt": "<|im_start|>user\nhello<|im_end|>"}, {}, "rows[2]: the text contains '<|im_end|>', a BOS or stop token that only the template may write; give plain text."),
    "no such column": ({}, {"columns": SOLO_COLUMNS | {"long_prompt": "document"}}, "Dataset `rows` has no column `document`; it has: "),
    "no chosen mapped": ({}, {"columns": {"prompt": "prompt", "long_prompt": "long_prompt"}}, "Dataset `rows` must map `chosen` under `columns` in dataset_info.json."),
    "no prompt mapped": ({}, {"columns": SOLO_COLUMNS | {"prompt": None}}, "Dataset `rows` must map `prompt` under `columns` in dataset_info.json."),
    "unknown formatting": ({}, {"formatting": "csv"}, "Dataset `rows`: `formatting` must be one of alpaca, sharegpt, openai; got 'csv'."),
    "unknown formatting of messages": ({}, TALK_ENTRY | {"formatting": "sharegp"}, "Dataset `rows`: `formatting` must be one of alpaca, sharegpt, openai; got 'sharegp'."),
    "text and list": ({"rejected": ["a", "b"]}, {}, "Dataset `rows` cannot be read: JSON parse error: Column(/rejected) changed from string to array in row 2."),
    "number in a text column": ({"chosen": 5}, {}, "Dataset `rows` cannot be read: JSON parse error: Column(/chosen) changed from string to number in row 2."),
    "on a hub that is not reached": ({}, {"hf_hub_url": "someone/none"}, "Dataset `rows` cannot be read: Couldn't reach 'someone/none' on the Hub ("),
    "ranking missing": ({}, {"ranking": False}, 'Dataset `rows` needs `"ranking": true` in dataset_info.json for `stage: solopo`.'),
    "wrong long column": ({}, {"columns": SOLO_COLUMNS | {"long_prompt": None, "long_messages": "long_prompt"}}, "map `long_prompt` (formatting `alpaca`)"),
    "no long messages": ({}, {"formatting": "sharegpt", "columns": {"messages": "long_prompt"}}, "map `long_messages` (formatting `sharegpt`) to the column that holds the long prompt, and `messages` to one with its evidence and question alone."),
    "history of single turns": ({"history": [["a"]]}, {"columns": SOLO_COLUMNS | {"history": "history"}}, "rows[2]: column `history` must be a list of [question, answer], got"),
    "no such system column": ({}, {"columns": SOLO_COLUMNS | {"system": "sys"}}, "Dataset `rows` has no column `sys`; it has: "),
    "system a number": ({"system": {"a": 1}}, {"columns": SOLO_COLUMNS | {"system": "system"}}, "rows[2]: column `system` must be a string or null, got"),
    "kto_tag": ({"good": True}, {"columns": SOLO_COLUMNS | {"kto_tag": "good", "response": "chosen"}}, "rows[2]: column `good`, mapped as `kto_tag`, is True, for which the host leaves out `chosen` and `rejected`; remove `kto_tag` from `columns` in dataset_info.json."),
    "no such kto_tag column": ({}, {"columns": SOLO_COLUMNS | {"kto_tag": "good"}}, "Dataset `rows` has no column `good`; it has: "),
    "rejected is the chosen column": ({}, {"columns": SOLO_COLUMNS | {"rejected": "chosen"}}, "Dataset `rows` maps `chosen` and `rejected` to one column, `chosen`; correct `columns` in dataset_info.json."),
    "tools of several rows": ({"tools": [{"name": "a"}, {"name": "b", "description": "c"}]}, {"columns": SOLO_COLUMNS | {"tools": "tools"}}, "rows[2]: column `tools` holds null, which loading fills in for keys of other rows; give the tools as JSON text."),
    "tools are no JSON": ({"tools": "where(who)"}, {"columns": SOLO_COLUMNS | {"tools": "tools"}}, "rows[2]: the template cannot write `tools`: RuntimeError Invalid JSON format in tool description: ['where(who)'].; a call is a JSON object with `name` and `arguments`, `tools` a JSON list of functions."),
    "no role tag": ({}, TALK_ENTRY | {"tags": {"content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}}, "Dataset `rows` must map `role_tag` under `tags` in dataset_info.json."),
    "images": ({}, {"columns": SOLO_COLUMNS | {"images": "prompt"}}, "Dataset `rows` maps images, videos or audios; `stage: solopo` is for text only."),
}  # fmt: skip

LISTS = {  # name: (the rejected responses of row 2 of 4, where all have a list, the sentence)
    "none": ([], "rows[2]: column `rejected` must be a response or a list of at least one, got list '[]'."),
    "null in the column": (None, "rows[2]: column `rejected` must be a string, got NoneType 'None'."),
    "null": (["There.", None], "rows[2]: column `rejected[1]` must be a string, got NoneType 'None'."),
    "blank": ([" ", "There."], "rows[2]: column `rejected[0]` is empty; give it a text or remove the row."),
    "the chosen": (["There.", GOOD[2]["chosen"]], "rows[2]: columns `chosen` and `rejected[1]` hold the same text; remove one."),
    "the chosen alone": ([GOOD[2]["chosen"]], "rows[2]: columns `chosen` and `rejected[0]` hold the same text; remove the row."),
    "one twice": (["There.", "Nowhere.", "There."], "rows[2]: columns `rejected[0]` and `rejected[2]` hold the same text; remove one."),
    "a marker": (["There.", "a<|im_end|>"], "rows[2]: the text contains '<|im_end|>', a BOS or stop token that only the template may write; give plain text."),
}  # fmt: skip

TALKS = {  # name: (changes to row 1 of 2, the sentence)
    "ends with the assistant": ({"long": [{"from": USER, "value": "a"}, {"from": BOT, "value": "b"}]}, "talk[1]: column `long` must be turns that begin and end with the user's"),
    "begins with the assistant": ({"conversations": [{"from": BOT, "value": "a"}]}, "talk[1]: column `conversations` must be turns that begin and end with the user's"),
    "no messages": ({"long": []}, "talk[1]: column `long` must be a list of messages, got list '[]'."),
    "empty message": ({"long": [{"from": USER, "value": ""}]}, "talk[1]: turn 1 (`human`) of column `long` is empty; give it a text or remove the row."),
    "response by the user": ({"chosen": {"from": USER, "value": "a"}}, "talk[1]: column `chosen` must be one message with `from` 'gpt' and `value`, got"),
    "response by nobody": ({"rejected": {"value": "a"}}, "talk[1]: column `rejected` must be one message with `from` 'gpt' and `value`, got"),
    "system in the long one only": ({"long": [{"from": "system", "value": "Be brief."}, *TALK["long"]]}, "talk[1]: only one of `conversations` and `long` has a system prompt."),
    "unknown role": ({"long": [{"from": "developer", "value": "a"}]}, "talk[1]: turn 1 of column `long` has `from` 'developer'; known are human, gpt, "),
    "calls no function": ({"long": [*TALK["long"], {"from": "function_call", "value": "where()"}, {"from": "observation", "value": "a"}]}, "talk[1]: the template cannot write turn 2 (function) of the long prompt: RuntimeError Invalid JSON format in function message: ['where()']"),
    "empty response": ({"chosen": {"from": BOT, "value": "  "}}, "talk[1]: column `chosen` is empty"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_model_is_loaded(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded before the input was refused")

    import llamafactory.train.dpo.workflow
    import llamafactory.train.sft.workflow

    import solopo_plugin.workflow

    for workflow in (solopo_plugin.workflow, llamafactory.train.dpo.workflow, llamafactory.train.sft.workflow):
        monkeypatch.setattr(workflow, "load_model", load)


def refused(run, args: dict, sentence: str) -> str:
    pattern = sentence if "\\d" in sentence else re.escape(sentence)
    with pytest.raises((ValueError, RuntimeError), match=pattern) as caught:
        run(args)
    assert "\n" not in str(caught.value).strip()
    return str(caught.value)


def test_the_table_is_long_enough():
    assert len(RECIPES) + len(ROWS) + len(TALKS) >= 25


@pytest.mark.parametrize("name", RECIPES)
def test_bad_recipe(run, recipe, name):
    changes, sentence = RECIPES[name]
    refused(run, recipe(**changes), sentence.replace("DATA", str(ROOT / "data")))


UNREAD_KEYS = {key: reason for reason, keys in UNREAD.items() for key in keys.split()}
OTHER = dict(
    fp8_backend="te", length_column_name="n", reward_model_type="full", generation_config="a/path", reward_model="a/path",
    hyper_parallel_args="a/path", reward_model_adapters="a/path", eval_num_beams=2, generation_num_beams=2,
    reward_model_quantization_bit=4, top_p=0.5, lora_dropout=0.1, module_dropout=0.1, label_smoothing_factor=0.1,
    moe_aux_loss_coef=0.1, ld_alpha=0.0,
)  # fmt: skip


@pytest.mark.parametrize("key", UNREAD_KEYS)
def test_a_key_that_would_change_nothing(run, recipe, key):
    """Refused with the reason; the host's default, which saved recipes spell out, is not."""
    from llamafactory.hparams import parser

    fields = {name: field for part in parser._TRAIN_ARGS for name, field in part.__dataclass_fields__.items()}
    default, reason = fields[key].default, UNREAD_KEYS[key]
    needs = {"val_size": 4} if key == "do_predict" else {}
    value = OTHER[key] if key in OTHER else not default if isinstance(default, bool) else default + 1
    off = "" if default is None else f", or set it to {default}"
    sentence = f"`{key}: {value}` has no effect in `stage: solopo`: {reason}; remove it{off}."
    refused(run, recipe(**{key: value}, **needs), sentence)
    parser.get_train_args(recipe(**{key: default}, **needs))


def test_every_key_of_generation_is_among_them():
    """A key that the host adds is found here."""
    from llamafactory.hparams import GeneratingArguments

    assert set(GeneratingArguments.__dataclass_fields__) <= set(UNREAD_KEYS)


ONE_OF_CONVERTER_AND_ONE_OF_PROCESSOR = ("empty long prompt", "templated text")


@pytest.mark.parametrize(
    "name, workers", [(name, None) for name in ROWS] + [(name, 2) for name in ONE_OF_CONVERTER_AND_ONE_OF_PROCESSOR]
)
def test_bad_row(run, recipe, tmp_path, name, workers):
    changes, entry, sentence = ROWS[name]
    rows = [GOOD[0], GOOD[1], GOOD[2] | changes, GOOD[3]]
    folder = write_dataset(tmp_path / "data", rows, **entry)
    args = recipe(dataset="rows", dataset_dir=folder, max_samples=None, preprocessing_num_workers=workers)
    assert "shows where" not in refused(run, args, sentence)  # it says all that there is to say


def test_a_line_that_is_no_json(run, recipe, tmp_path):
    folder = write_dataset(tmp_path / "data", GOOD)
    file = tmp_path / "data" / "rows.jsonl"
    file.write_text(file.read_text() + '{"prompt": "x", \n')
    write_dataset(tmp_path / "data", GOOD, "others")
    for names in ("rows", "others,rows"):
        args = recipe(dataset=names, dataset_dir=folder, max_samples=None)
        sentence = "Dataset `rows` cannot be read: JSON parse error: Missing a name for object member. in row 4."
        refused(run, args, sentence)
    (tmp_path / "data" / "both").mkdir()
    for name in ("rows", "others"):
        (tmp_path / "data" / f"{name}.jsonl").rename(tmp_path / "data" / "both" / f"{name}.jsonl")
    write_dataset(tmp_path / "data", [], file_name="both")
    args = recipe(dataset="rows", dataset_dir=folder, max_samples=None, preprocessing_num_workers=2)
    sentence = (
        "Dataset `rows` cannot be read: pyarrow.lib.ArrowInvalid: JSON parse error: Missing a name for object member"
    )
    refused(run, args, sentence)  # a worker's error comes as text


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("as_array", [False, True])
def test_a_file_that_is_not_in_utf8(run, recipe, tmp_path, encoding, as_array):
    rows = [row | {"chosen": "Im Café."} for row in GOOD]
    lines = [json.dumps(row, ensure_ascii=False) for row in ([rows] if as_array else rows)]
    folder = write_dataset(tmp_path / "data", GOOD)
    (tmp_path / "data" / "rows.jsonl").write_text("\n".join(lines), encoding=encoding)
    sentence = "Dataset `rows` cannot be read: the file is no text in UTF-8; save it so, or give it the ending of its format (.parquet, ...)."
    refused(run, recipe(dataset="rows", dataset_dir=folder, max_samples=None), sentence)


def test_answers_that_are_all_dates(run, recipe, tmp_path):
    """Refuse them from JSON lines, where they load as times; train from the array that the message advises."""
    rows = [row | {"chosen": f"2024-01-0{n}"} for n, row in enumerate(GOOD, 1)]
    args = recipe(dataset="rows", dataset_dir=write_dataset(tmp_path / "data", rows), max_samples=None)
    sentence = (
        "rows[0]: column `chosen` must be a string, got datetime '2024-01-01 00:00:00'; dates in JSON lines load as times: "
        "save the file as a .json array."
    )
    refused(run, args, sentence)
    (tmp_path / "data" / "rows.json").write_text(json.dumps(rows))
    write_dataset(tmp_path / "data", [], file_name="rows.json")
    reaches_the_model(run, args)


TYPED = "; the first 10 MB of JSON lines name columns and types: save it as parquet or one .json array."


@pytest.mark.parametrize("early, late, reason", [
    ({"system": None}, {"system": "Be brief."}, "Couldn't cast array of type string to null"),
    ({}, {"system": "Be brief."}, "there are 1 new columns ({'system'})"),
    ({"answers": ["2024-01-01"]}, {"answers": ["May"]}, "Failed to parse string: 'May' as a scalar of type timestamp[s]"),
])  # fmt: skip
def test_a_column_that_is_filled_behind_the_first_10_mb(run, recipe, tmp_path, early, late, reason):
    """Refuse it with what to do; the array that the message advises trains."""
    rows = [GOOD[n % 4] | {"note": "word " * 40_000} | (late if n == 60 else early) for n in range(61)]
    columns = SOLO_COLUMNS | ({"system": "system"} if "system" in late else {})
    folder = write_dataset(tmp_path / "data", rows, columns=columns)
    args = recipe(dataset="rows", dataset_dir=folder, max_samples=None)
    said = refused(run, args, reason)
    assert said.startswith("Dataset `rows` cannot be read: ") and said.endswith(TYPED)
    if "system" in early:
        (tmp_path / "data" / "rows.json").write_text(json.dumps(rows))
        write_dataset(tmp_path / "data", [], columns=columns, file_name="rows.json")
        reaches_the_model(run, args)


UNLOADABLE = {  # name: (entry, files, the reason)
    "packed": ({"file_name": "rows.jsonl.gz"}, ["rows.jsonl.gz"], "Allowed file types: arrow,csv,json,jsonl,parquet,txt."),
    "another ending": ({"file_name": "rows.ndjson"}, ["rows.ndjson"], "Allowed file types: arrow,csv,json,jsonl,parquet,txt."),
    "beside others": ({"file_name": "rows"}, ["rows/a.jsonl", "rows/README.md"], "File types should be identical."),
    "no such split": ({"hf_hub_url": "DATA/rows", "split": "dev"}, ["rows/train.jsonl"], "Unknown split \"dev\". Should be one of ['train']."),
    "no such subset": ({"hf_hub_url": "DATA/rows", "subset": "b"}, ["rows/train.jsonl"], "BuilderConfig 'b' not found. Available: ['default']."),
}  # fmt: skip


@pytest.mark.parametrize("name", UNLOADABLE)
def test_what_the_host_says_of_a_file_names_the_data_set(run, recipe, tmp_path, name):
    entry, files, reason = UNLOADABLE[name]
    data = tmp_path / "data"
    write_dataset(data, GOOD, "good")
    for file in files:
        (data / file).parent.mkdir(exist_ok=True)
        (data / file).write_text("" if file.endswith(".md") else json.dumps(GOOD[0]) + "\n")
    entry = {key: value.replace("DATA", str(data)) for key, value in entry.items()}
    info = json.loads((data / "dataset_info.json").read_text())
    info["rows"] = {"ranking": True, "columns": SOLO_COLUMNS} | entry
    (data / "dataset_info.json").write_text(json.dumps(info))
    args = recipe(dataset="good,rows", dataset_dir=str(data), max_samples=None)
    said = refused(run, args, "Dataset `rows` cannot be read: ")
    if name == "beside others":  # the host takes the files as the folder lists them, and looks at the first one first
        assert said.removeprefix("Dataset `rows` cannot be read: ") in (reason, UNLOADABLE["packed"][2])
    else:
        assert said == f"Dataset `rows` cannot be read: {reason}"


def test_samples_of_a_stream(run, recipe, tmp_path):
    """Refuse what the host ignores."""
    folder = write_dataset(tmp_path / "data", GOOD, num_samples=2)
    args = recipe(dataset="rows", dataset_dir=folder, max_samples=None, streaming=True, max_steps=1)
    said = "Dataset `rows`: `num_samples: 2` does nothing in a stream; remove it."
    refused(run, args | {"dataloader_num_workers": 1}, said)


@pytest.mark.parametrize("name", LISTS)
def test_bad_list(run, recipe, tmp_path, name):
    rejected, sentence = LISTS[name]
    rows = [row | {"rejected": [row["rejected"], "Nowhere."]} for row in GOOD]
    folder = write_dataset(tmp_path / "data", [*rows[:2], rows[2] | {"rejected": rejected}, rows[3]])
    refused(run, recipe(dataset="rows", dataset_dir=folder, max_samples=None), sentence)


def test_a_list_that_is_not_of_texts(run, recipe, tmp_path):
    rows = [row | {"chosen": [row["chosen"]], "rejected": [3, 4]} for row in GOOD]
    folder = write_dataset(tmp_path / "data", rows)
    refused(
        run,
        recipe(dataset="rows", dataset_dir=folder, max_samples=None),
        "rows[0]: column `chosen` must be a string, got list",
    )
    folder = write_dataset(tmp_path / "data", [row | {"chosen": "Here."} for row in rows])
    refused(
        run,
        recipe(dataset="rows", dataset_dir=folder, max_samples=None),
        "rows[0]: column `rejected[0]` must be a string, got int '3'.",
    )


@pytest.mark.parametrize("stage", ["dpo", "rm"])
@pytest.mark.parametrize("streaming", [{}, STREAM | {"dataloader_num_workers": 1}])
def test_lists_in_a_stage_of_the_host(run, recipe, tmp_path, stage, streaming):
    """Refuse what the host would leave out row by row, saying so of each."""
    columns = {name: SOLO_COLUMNS[name] for name in ("prompt", "chosen", "rejected")}
    folder = write_dataset(tmp_path / "data", [row | {"rejected": ["a", "b"]} for row in GOOD], columns=columns)
    sentence = (
        "rows.jsonl: column `rejected`, mapped as `rejected`, holds lists, of which only `stage: solopo` trains on all; "
        "for another stage map a column with one response."
    )
    refused(
        run, recipe(**dict(dataset="rows", dataset_dir=folder, max_samples=None, stage=stage) | streaming), sentence
    )


TALK_LISTS = {  # name: (the rejected responses of row 1 of 2, the sentence)
    "none": ([], "talk[1]: column `rejected` must be a response or a list of at least one, got list '[]'."),
    "by the user": ([TALK["rejected"], {"from": USER, "value": "a"}], "talk[1]: column `rejected[1]` must be one message with `from` 'gpt' and `value`, got"),
    "empty": ([{"from": BOT, "value": " "}, TALK["rejected"]], "talk[1]: column `rejected[0]` is empty; give it a text or remove the row."),
    "the chosen": ([TALK["chosen"], TALK["rejected"]], "talk[1]: columns `chosen` and `rejected[0]` hold the same text; remove one."),
}  # fmt: skip


@pytest.mark.parametrize("name", TALK_LISTS)
def test_bad_list_of_messages(run, recipe, tmp_path, name):
    rejected, sentence = TALK_LISTS[name]
    rows = [TALK | {"rejected": [TALK["rejected"]]}, TALK | {"rejected": rejected}]
    folder = write_dataset(tmp_path / "data", rows, "talk", **TALK_ENTRY)
    refused(run, recipe(dataset="talk", dataset_dir=folder, max_samples=None), sentence)


@pytest.mark.parametrize("name", TALKS)
def test_bad_conversation(run, recipe, tmp_path, name):
    changes, sentence = TALKS[name]
    folder = write_dataset(tmp_path / "data", [TALK, TALK | changes], "talk", **TALK_ENTRY)
    refused(run, recipe(dataset="talk", dataset_dir=folder, max_samples=None), sentence)


def test_responses_equal_as_tokens(run, recipe, tmp_path, monkeypatch):
    """Two texts that the tokenizer cannot tell apart; ours can, so it is given one that ignores a character."""
    from llamafactory.data.template import Template

    encode = Template._convert_elements_to_ids
    strip = lambda elements: [e.replace("~", "") if isinstance(e, str) else e for e in elements]  # noqa: E731
    monkeypatch.setattr(
        Template, "_convert_elements_to_ids", lambda self, t, elements: encode(self, t, strip(elements))
    )
    folder = write_dataset(tmp_path / "data", [GOOD[0], GOOD[1] | {"rejected": GOOD[1]["chosen"] + "~"}])
    args = recipe(dataset="rows", dataset_dir=folder, max_samples=None)
    refused(run, args, "rows[1]: `chosen` and `rejected` are the same tokens; remove the row.")


def test_two_bos(run, recipe, tmp_path, tiny_model):
    bos = "<|begin_of_text|>"
    folder = write_dataset(tmp_path / "data", [GOOD[0], GOOD[1] | {"long_prompt": bos + GOOD[1]["long_prompt"]}])
    args = recipe(
        dataset="rows", dataset_dir=folder, max_samples=None, template="llama3",
        model_name_or_path=tiny_model("llama", bos=bos),
    )  # fmt: skip
    refused(
        run,
        args,
        "rows[1]: the text contains '<|begin_of_text|>', a BOS or stop token that only the template may write; give plain text.",
    )


def test_a_librarys_sentence_says_how_to_see_where(run, recipe, monkeypatch):
    """Add it to none of ours; both are without a traceback on the command line."""
    monkeypatch.setattr("solopo_plugin.workflow.load_model", lambda *_: json.loads("{"))
    refused(run, recipe(), "double quotes: line 1 column 2 (char 1) (`LLAMAFACTORY_VERBOSITY=DEBUG` shows where)")
    with pytest.raises(ValueError) as caught:
        run(recipe(solopo_alpha=-1))
    assert str(caught.value) == "`solopo_alpha` must be a number >= 0, got -1."


def test_a_hub_name_without_registration(run, recipe):
    """`dataset_dir: ONLINE` cannot map a long column, so it must be registered."""
    refused(run, recipe(dataset_dir="ONLINE"), "Dataset `demo_solopo` has no long context for `stage: solopo`")


def test_a_thought_in_one_response_only(run, recipe, tmp_path):
    """`enable_thinking: null` ends the prompt of an answer without a thought in an empty one."""
    folder = write_dataset(tmp_path / "data", [GOOD[0], GOOD[1] | {"chosen": "<think>\nSo.\n</think>\n\nHere."}])
    args = recipe(dataset="rows", dataset_dir=folder, max_samples=None, template="qwen3") | {"enable_thinking": None}
    sentence = (
        "rows[1]: the template writes one short prompt before `chosen` and another before `rejected`, as where only one "
        "of them has a thought; set `enable_thinking: true`, or give both a thought or none."
    )
    refused(run, args, sentence)


# ---- rows under `tokenized_path`


def reaches_the_model(run, args: dict) -> None:
    """The rows are accepted: the next thing that a run does is to load a model, which here it may not."""
    with pytest.raises(AssertionError, match="a model was loaded"):
        run(args)


@pytest.fixture
def tokenised(run, recipe, tmp_path, monkeypatch):
    """A recipe whose rows have been saved by a run of it; keyword arguments change it."""
    from llamafactory.data.template import TEMPLATES

    own = TEMPLATES["qwen"].default_system
    monkeypatch.setattr(TEMPLATES["qwen"], "default_system", own)  # put back what a run of these tests leaves there
    folder = write_dataset(tmp_path / "data", GOOD)
    write_dataset(tmp_path / "data", GOOD, "others")

    def make(**changes) -> dict:
        base = dict(dataset="rows", dataset_dir=folder, max_samples=None, tokenized_path=str(tmp_path / "tokens"))
        return recipe(**base | changes)

    reaches_the_model(run, make())
    return make


def test_saved_rows_are_used_by_what_made_them(run, tokenised, tmp_path, monkeypatch):
    """Wherever the data set has gone, and whatever else a run changes."""
    import llamafactory.data.loader as loader

    (tmp_path / "data").rename(tmp_path / "moved")
    monkeypatch.setattr(loader, "_get_merged_dataset", None)  # the saved ones, not made once more
    reaches_the_model(run, tokenised(dataset_dir=str(tmp_path / "moved")))
    again = dict(solopo_alpha=2, seed=8, learning_rate=1e-5, preprocessing_num_workers=2, streaming=True, max_steps=1)
    reaches_the_model(run, tokenised(dataset_dir=str(tmp_path / "moved"), **again))


OTHERWISE = {  # name: (changes, what the sentence says)
    "template": ({"template": "default"}, "template (there 'qwen', here 'default')"),
    "system prompt": ({"default_system": "Be brief."}, "default_system (there None, here 'Be brief.')"),
    "thinking": ({"enable_thinking": False}, "enable_thinking (there True, here False)"),
    "cutoff": ({"cutoff_len": 2048}, "cutoff_len (there 1024, here 2048)"),
    "overlength": ({"solopo_overlength": "drop"}, "solopo_overlength (there 'error', here 'drop')"),
    "fewer rows": ({"max_samples": 2}, "max_samples (there None, here 2)"),
    "data set": ({"dataset": "others"}, "dataset (there ['rows'], here ['others'])"),
    "one more": ({"dataset": "rows,others"}, "dataset (there ['rows'], here ['rows', 'others'])"),
    "evaluation": ({"eval_dataset": "others"}, "eval_dataset (there None, here ['others'])"),
    "a part held out": ({"val_size": 0.5}, "val_size (there 0.0, here 0.5)"),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_saved_rows_of_something_else(run, tokenised, tmp_path, name):
    changes, said = OTHERWISE[name]
    refused(run, tokenised(**changes), f"{said}; choose another path, or remove the folder to tokenise anew.")
    refused(run, tokenised(**changes), f"`tokenized_path: {tmp_path / 'tokens'}` holds rows that were made otherwise: ")


def test_saved_rows_of_another_text_column_or_tokenizer(run, tokenised, tmp_path, tiny_model):
    args = tokenised()
    refused(run, tokenised(model_name_or_path=tiny_model("llama", bos="<s>")), "content of the tokenizer (there '")
    file, info = tmp_path / "data" / "rows.jsonl", tmp_path / "data" / "dataset_info.json"
    text, entries = file.read_text(), info.read_text()
    file.write_text(text.replace("town", "city"))
    refused(run, args, "content of rows (there '")
    file.unlink()
    refused(run, args, "content of rows (there '")
    file.write_text(text)
    info.write_text(entries.replace('"long_prompt": "long_prompt"', '"long_prompt": "prompt"'))
    refused(run, args, "long_prompt of rows (there 'long_prompt', here 'prompt')")
    info.write_text(entries)
    reaches_the_model(run, args)


def test_saved_rows_that_were_drawn_belong_to_their_seed(run, tokenised, tmp_path):
    path = str(tmp_path / "drawn")
    reaches_the_model(run, tokenised(val_size=0.5, tokenized_path=path))
    reaches_the_model(run, tokenised(val_size=0.5, tokenized_path=path))
    refused(run, tokenised(val_size=0.5, tokenized_path=path, seed=8), "seed (there 7, here 8)")


def test_rows_held_out_are_not_trained_on(run, recipe, tmp_path):
    """The host repeats rows, in two ways, before it splits them; a file may have one twice, as well."""
    folder = write_dataset(tmp_path / "data", GOOD, num_samples=12)
    write_dataset(tmp_path / "data", GOOD, "once")
    write_dataset(tmp_path / "data", demo_rows(8)[4:], "others")
    write_dataset(
        tmp_path / "data", [*GOOD, *(row | {"long_prompt": row["long_prompt"] + " So."} for row in GOOD)], "longer"
    )
    write_dataset(tmp_path / "data", [*GOOD, *GOOD], "twice")
    common = dict(dataset_dir=folder, max_samples=None, val_size=0.5, eval_strategy="epoch")
    mixed = dict(dataset="once,others", mix_strategy="interleave_over", interleave_probs="0.1,0.9")
    for changes in ({"dataset": "rows"}, {"dataset": "twice"}, mixed):
        sentence = (
            r"`val_size: 0\.5` holds out \d+ rows that are trained on, too, as \w+\[\d+\]: `interleave_over`, `num_"
        )
        refused(run, recipe(**common | changes), sentence)
        reaches_the_model(run, recipe(**common | changes | {"do_train": False, "do_eval": True}))
    for changes in ({"dataset": "once"}, {"dataset": "longer"}, {"dataset": "once,others"}):
        reaches_the_model(run, recipe(**common | changes))


@pytest.mark.parametrize("left", ["rows of another stage", "no record", "half a record"])
def test_saved_rows_of_which_nothing_is_known(run, tokenised, tmp_path, left):
    from datasets import Dataset, DatasetDict

    path = tmp_path / "tokens"
    if left == "rows of another stage":
        path = tmp_path / "dpo"
        DatasetDict({"train": Dataset.from_dict({"input_ids": [[1]], "labels": [[1]]})}).save_to_disk(str(path))
    elif left == "no record":
        (path / "solopo_made_of.json").unlink()
    else:
        (path / "solopo_made_of.json").write_text('{"cutoff_len": 10')
    sentence = f"`tokenized_path: {path}` does not say what its rows were made of: they are another stage's"
    refused(run, tokenised(tokenized_path=str(path)), sentence)


def test_saved_rows_whose_columns_have_other_names(run, tokenised, tmp_path):
    """As earlier code wrote them: its record does not speak of columns."""
    record = tmp_path / "tokens" / "solopo_made_of.json"
    facts = json.loads(record.read_text())
    assert facts.pop("columns")[:2] == ["name", "long_is_short"]
    record.write_text(json.dumps(facts))
    refused(run, tokenised(), "columns (there None, here ['name', 'long_is_short'")


def test_every_data_argument_of_the_host_changes_the_rows_or_is_said_not_to():
    """A field that the host adds makes this fail; until then it counts as one that changes the rows."""
    from llamafactory.hparams import DataArguments

    from solopo_plugin.host.saved import NO_MATTER

    matter = {
        "template", "dataset", "eval_dataset", "cutoff_len", "mix_strategy", "interleave_probs", "max_samples",
        "val_size", "eval_on_each_dataset", "tool_format", "default_system", "enable_thinking", "preserve_thinking",
    }  # fmt: skip
    assert matter.isdisjoint(NO_MATTER) and matter | NO_MATTER == set(vars(DataArguments()))


def test_the_shipped_sample_is_registered_once_per_use():
    info = json.loads((ROOT / "data" / "dataset_info.json").read_text())
    history = info.pop("demo_history")
    assert history["file_name"] == "demo_history.jsonl" and "long_messages" in history["columns"]
    assert {entry["file_name"] for entry in info.values()} == {"demo_solopo.jsonl"}
    assert [name for name, entry in info.items() if "long_prompt" in entry["columns"]] == ["demo_solopo"]
