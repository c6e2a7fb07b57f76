"""Bad recipes and bad rows: each gives one sentence that names what, where, the value seen, and what to do.

All of them stop before a model is loaded.
"""

import json
import re

import pytest
from conftest import ROOT, SOLO_COLUMNS, demo_rows, write_dataset

RECIPES = {  # name: (changes to a valid recipe, the sentence)
    "misspelt key": ({"solopo_alfa": 1}, "Unknown key `solopo_alfa` in the recipe. Did you mean `solopo_alpha`? Allowed: "),
    "unknown key": ({"solopo_zzz": 1}, "Unknown key `solopo_zzz` in the recipe. Allowed: solopo_alpha, "),
    "negative alpha": ({"solopo_alpha": -1}, "`solopo_alpha` must be a number >= 0, got -1."),
    "alpha a word": ({"solopo_alpha": "big"}, "`solopo_alpha` must be a number >= 0, got 'big'."),
    "alpha nan": ({"solopo_alpha": float("nan")}, "`solopo_alpha` must be a number >= 0, got nan."),
    "alpha true": ({"solopo_alpha": True}, "`solopo_alpha` must be a number >= 0, got True."),
    "negative lambda": ({"solopo_longpo_lambda": -0.1}, "`solopo_longpo_lambda` must be a number >= 0, got -0.1."),
    "align": ({"solopo_align": "kl"}, "`solopo_align` must be one of reward, logp; got 'kl'."),
    "align on": ({"solopo_align_on": "rejected"}, "`solopo_align_on` must be one of chosen, both; got 'rejected'."),
    "penalty": ({"solopo_penalty": "l1"}, "`solopo_penalty` must be one of auto, abs, squared, drop; got 'l1'."),
    "detach": ({"solopo_detach_short": "yes"}, "`solopo_detach_short` must be true or false, got 'yes'."),
    "objective": ({"solopo_objective": "dpo"}, "`solopo_objective` must be one of solopo, longpo; got 'dpo'."),
    "overlength": ({"solopo_overlength": "cut"}, "`solopo_overlength` must be one of error, drop; got 'cut'."),
    "forward": ({"solopo_forward": "fast"}, "`solopo_forward` must be one of auto, packed, two_stage; got 'fast'."),
    "chunk zero": ({"solopo_logp_chunk": 0}, "`solopo_logp_chunk` must be a whole number >= 1, got 0."),
    "mlp chunk negative": ({"solopo_mlp_chunk": -1}, "`solopo_mlp_chunk` must be a whole number >= 0, got -1."),
    "chunk fraction": ({"solopo_logp_chunk": 2.5}, "`solopo_logp_chunk` must be a whole number >= 1, got 2.5."),
    "loss": ({"pref_loss": "kto_pair"}, "`pref_loss` must be one of sigmoid, ipo, hinge, simpo, orpo for `stage: solopo`; got 'kto_pair'."),
    "longpo loss": ({"solopo_objective": "longpo", "pref_loss": "orpo"}, "`solopo_objective: longpo` is a DPO loss: set `pref_loss: sigmoid`, got 'orpo'."),
    "beta": ({"pref_beta": 0}, "`pref_beta` must be > 0, got 0."),
    "smoothing": ({"dpo_label_smoothing": 0.5}, "`dpo_label_smoothing` must be in [0, 0.5), got 0.5."),
    "smoothing without dpo": ({"dpo_label_smoothing": 0.1, "pref_loss": "ipo"}, "`dpo_label_smoothing` is only valid for sigmoid loss function."),
    "bco": ({"pref_bco_weight": 0.5}, "`pref_bco_weight: 0.5` is not defined for `stage: solopo`; remove it."),
    "ld_alpha": ({"ld_alpha": 0.5}, "`ld_alpha: 0.5` would weigh the short log-probs and not the long ones; remove it for `stage: solopo`."),
    "packing": ({"packing": True}, "`packing: True` does not work with `stage: solopo`: rows of pairs cannot be packed by the host; remove it."),
    "our key in another stage": ({"stage": "dpo", "dataset": "demo_short_po", "solopo_alpha": 1}, "`solopo_alpha` has no effect in `stage: dpo`; set `stage: solopo` or remove the key."),
    "streaming without steps": ({"streaming": True, "max_samples": None}, "Please specify `max_steps` in streaming mode."),
    "data set of another stage": ({"dataset": "demo_short_po"}, "Dataset `demo_short_po` has no long context for `stage: solopo`: under `columns` in dataset_info.json map `long_prompt` (formatting `alpaca`)"),
    "our data set in dpo": ({"stage": "dpo"}, "Dataset `demo_solopo` is registered for `stage: solopo` (it has a long column, `long_prompt`). For another stage, register the same file under a second name"),
    "our data set in sft": ({"stage": "sft"}, "Dataset `demo_solopo` is registered for `stage: solopo` (it has a long column, `long_prompt`)."),
    "undefined data set": ({"dataset": "nowhere"}, "Undefined dataset nowhere in dataset_info.json."),
    "too long": ({"cutoff_len": 64}, r"demo_solopo\[0\]: prompt \+ response have \d+ tokens and `cutoff_len` is 64; raise `cutoff_len`, shorten the row, or set `solopo_overlength: drop`."),
    "all too long": ({"cutoff_len": 64, "solopo_overlength": "drop"}, "All 12 rows are longer than `cutoff_len: 64` and were dropped; raise `cutoff_len`."),
    "dropping from a stream": ({"streaming": True, "max_samples": None, "max_steps": 1, "solopo_overlength": "drop"}, "`solopo_overlength: drop` cannot count what it drops from a stream; set `streaming: false`."),
    "stream without workers": ({"streaming": True, "max_samples": None, "max_steps": 1}, "Dataset `demo_solopo` has no rows; with `streaming: true` a local file also needs `dataloader_num_workers: 1` or more."),
    "alpha in longpo": ({"solopo_objective": "longpo", "solopo_alpha": 2}, "`solopo_alpha: 2.0` has no effect with `solopo_objective: longpo`; remove it."),
    "ftx in longpo": ({"solopo_objective": "longpo", "pref_ftx": 1.0}, "`pref_ftx: 1.0` has no effect with `solopo_objective: longpo`; remove it."),
    "lambda in solopo": ({"solopo_longpo_lambda": 0.1}, "`solopo_longpo_lambda: 0.1` has no effect with `solopo_objective: solopo`; remove it."),
}  # fmt: skip

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
    "unknown formatting": ({}, {"formatting": "csv"}, "Dataset converter csv not found."),
    "ranking missing": ({}, {"ranking": False}, 'Dataset `rows` needs `"ranking": true` in dataset_info.json for `stage: solopo`.'),
    "wrong long column": ({}, {"columns": SOLO_COLUMNS | {"long_prompt": None, "long_messages": "long_prompt"}}, "map `long_prompt` (formatting `alpaca`)"),
    "history of single turns": ({"history": [["a"]]}, {"columns": SOLO_COLUMNS | {"history": "history"}}, "rows[2]: column `history` must be a list of [question, answer], got"),
    "no such system column": ({}, {"columns": SOLO_COLUMNS | {"system": "sys"}}, "Dataset `rows` has no column `sys`; it has: "),
    "system a number": ({"system": {"a": 1}}, {"columns": SOLO_COLUMNS | {"system": "system"}}, "rows[2]: column `system` must be a string or null, got"),
    "images": ({}, {"columns": SOLO_COLUMNS | {"images": "prompt"}}, "Dataset `rows` maps images, videos or audios; `stage: solopo` is for text only."),
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
TALKS = {  # name: (changes to row 1 of 2, the sentence)
    "ends with the assistant": ({"long": [{"from": USER, "value": "a"}, {"from": BOT, "value": "b"}]}, "talk[1]: column `long` must be turns that begin and end with the user's"),
    "begins with the assistant": ({"conversations": [{"from": BOT, "value": "a"}]}, "talk[1]: column `conversations` must be turns that begin and end with the user's"),
    "no messages": ({"long": []}, "talk[1]: column `long` must be a list of messages, got '[]'."),
    "empty message": ({"long": [{"from": USER, "value": ""}]}, "talk[1]: column `long` is empty"),
    "response by the user": ({"chosen": {"from": USER, "value": "a"}}, "talk[1]: column `chosen` must be one message with `from` 'gpt', got"),
    "response by nobody": ({"rejected": {"value": "a"}}, "talk[1]: column `rejected` must be one message with `from` 'gpt', got"),
    "system in the long one only": ({"long": [{"from": "system", "value": "Be brief."}, *TALK["long"]]}, "talk[1]: only one of `conversations` and `long` has a system prompt."),
    "unknown role": ({"long": [{"from": "developer", "value": "a"}]}, "talk[1]: column `long` has a message whose `from` is 'developer'; known are human, gpt, "),
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


def refused(run, args: dict, sentence: str) -> None:
    pattern = sentence if "\\d" in sentence else re.escape(sentence)
    with pytest.raises((ValueError, RuntimeError), match=pattern) as caught:
        run(args)
    assert "\n" not in str(caught.value).strip()


def test_the_table_is_long_enough():
    assert len(RECIPES) + len(ROWS) + len(TALKS) >= 25


@pytest.mark.parametrize("name", RECIPES)
def test_bad_recipe(run, recipe, name):
    changes, sentence = RECIPES[name]
    refused(run, recipe(**changes), sentence)


ONE_OF_CONVERTER_AND_ONE_OF_PROCESSOR = ("empty long prompt", "templated text")


@pytest.mark.parametrize(
    "name, workers", [(name, None) for name in ROWS] + [(name, 2) for name in ONE_OF_CONVERTER_AND_ONE_OF_PROCESSOR]
)
def test_bad_row(run, recipe, tmp_path, name, workers):
    changes, entry, sentence = ROWS[name]
    rows = [GOOD[0], GOOD[1], GOOD[2] | changes, GOOD[3]]
    folder = write_dataset(tmp_path / "data", rows, **entry)
    refused(
        run, recipe(dataset="rows", dataset_dir=folder, max_samples=None, preprocessing_num_workers=workers), sentence
    )


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


def test_a_hub_name_without_registration(run, recipe):
    """`dataset_dir: ONLINE` cannot map a long column, so it must be registered."""
    refused(run, recipe(dataset_dir="ONLINE"), "Dataset `demo_solopo` has no long context for `stage: solopo`")


def test_rows_tokenised_by_another_stage(run, recipe, tmp_path, monkeypatch):
    from datasets import Dataset, DatasetDict

    path = str(tmp_path / "tokens")
    DatasetDict({"train": Dataset.from_dict({"input_ids": [[1]], "labels": [[1]]})}).save_to_disk(path)
    sentence = f"`tokenized_path: {path}` holds rows of another stage (columns input_ids, labels); choose another path"
    refused(run, recipe(tokenized_path=path), sentence)


def test_rows_tokenised_for_a_longer_cutoff(run, recipe, tmp_path, monkeypatch):
    from datasets import Dataset, DatasetDict

    path = str(tmp_path / "tokens")
    ids = {
        f"{part}_ids": [[1] * n]
        for part, n in (("short_prompt", 5), ("long_prompt", 90), ("chosen", 8), ("rejected", 12))
    }
    DatasetDict({"train": Dataset.from_dict({"row": ["rows[0]"], "same": [False], **ids})}).save_to_disk(path)
    sentence = f"`tokenized_path: {path}` holds rows of up to 102 tokens and `cutoff_len` is 101; raise `cutoff_len`"
    refused(run, recipe(tokenized_path=path, cutoff_len=101), sentence)


def test_the_shipped_sample_is_registered_once_per_use():
    info = json.loads((ROOT / "data" / "dataset_info.json").read_text())
    assert {entry["file_name"] for entry in info.values()} == {"demo_solopo.jsonl"}
    assert [name for name, entry in info.items() if "long_prompt" in entry["columns"]] == ["demo_solopo"]
