"""From a row of the file to a batch, for any text: nothing is lost, moved, doubled or cut.

Properties of `build_row`, `fits` and `SoloCollator` on made-up token ids; of `LongConverter` and
`SoloDatasetProcessor` with a real tokenizer and the host's real templates. The short pair equals, tensor for tensor,
what the host's own pairwise processor and collator make of the same rows, and so does the long pair when the host's
`prompt` is mapped to the long column.
"""

import copy
import json
import re
from datetime import datetime
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, demo_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from solopo_plugin.data import (
    BETWEEN,
    COLUMNS,
    Aligned,
    RowError,
    SoloCollator,
    build_row,
    check_text,
    fits,
    pairs_of,
    rejected_of,
    row_length,
)
from solopo_plugin.logps import IGNORE

# derandomize: a failure is the same for everybody; nothing is stored between runs
FUZZ = settings(deadline=None, max_examples=50, derandomize=True, database=None)

ids = st.lists(st.integers(0, 99), min_size=1, max_size=20)
# any text but blanks and what templates are made of, which hypothesis finds in the sources and tries
text = st.text(min_size=1, max_size=30).filter(lambda words: words.strip() and "<|" not in words and "{{" not in words)
turns = st.lists(st.tuples(text, text), max_size=2)


@st.composite
def tokenised_rows(draw, min_size=1):
    """Rows of made-up ids in the form that the processor gives; id 0 is the padding *and* occurs in the text."""
    rows = []
    for i in range(draw(st.integers(min_size, 4))):
        short, chosen, rejected = draw(ids), draw(ids), draw(ids)
        same = draw(st.booleans())
        long = short if same else draw(ids) + short
        rows.append(dict(name=f"rows[{i}]", long_is_short=same, short_prompt_ids=short, long_prompt_ids=long, chosen_ids=chosen,
                         rejected_ids=rejected))  # fmt: skip
    return rows


# ---- the collator


def assert_sequences(batch: dict, prefix: str, pairs: list, multiple: int) -> None:
    """Every sequence whole, in order, padded on the right to the longest and no further than the multiple asks."""
    longest = max(len(prompt) + len(response) for prompt, response in pairs)
    names = ("input_ids", "attention_mask", "labels")
    input_ids, mask, labels = (batch[prefix + name] for name in names)
    width = input_ids.shape[1]
    assert all(batch[prefix + name].shape == (len(pairs), width) for name in names)
    assert all(batch[prefix + name].dtype == torch.int64 for name in names)
    assert longest <= width < longest + multiple and width % multiple == 0
    for row, (prompt, response) in enumerate(pairs):
        length = len(prompt) + len(response)
        assert input_ids[row].tolist() == prompt + response + [0] * (width - length)
        assert mask[row].tolist() == [1] * length + [0] * (width - length)
        assert labels[row].tolist() == [IGNORE] * len(prompt) + response + [IGNORE] * (width - length)


@FUZZ
@given(tokenised_rows(), st.booleans())
def test_collator_batches_whole_sequences_in_order(rows, long_pair):
    """All chosen, then all rejected; the long ones chosen only, or as the short ones; the rows themselves unchanged."""
    before = copy.deepcopy(rows)
    batch = SoloCollator(pad_token_id=0, long_pair=long_pair)(rows)
    assert rows == before
    short = [(r["short_prompt_ids"], r[f"{name}_ids"]) for name in ("chosen", "rejected") for r in rows]
    long = [(r["long_prompt_ids"], r[f"{name}_ids"]) for name in ("chosen", "rejected") for r in rows]
    assert_sequences(batch, "", short, multiple=8)
    assert_sequences(batch, "long_", long if long_pair else long[: len(rows)], multiple=1)
    is_short_B = batch["long_is_short_B"]
    assert is_short_B.tolist() == [r["long_is_short"] for r in rows] and is_short_B.dtype == torch.bool
    assert batch["names"] == [r["name"] for r in rows]
    assert set(batch) == {"long_is_short_B", "names"} | {p + n for p in ("", "long_") for n in ("input_ids", "attention_mask", "labels")}  # fmt: skip # noqa: E501


def test_collator_by_hand():
    """One row, written out: chosen before rejected, the prompt masked, 8 wide short and as wide as needed long."""
    row = dict(name="rows[0]", long_is_short=False, short_prompt_ids=[11, 12], long_prompt_ids=[21, 22, 23], chosen_ids=[31],
               rejected_ids=[41, 42])  # fmt: skip
    batch = SoloCollator(pad_token_id=9, long_pair=True)([row])
    i = IGNORE
    assert batch["input_ids"].tolist() == [[11, 12, 31, 9, 9, 9, 9, 9], [11, 12, 41, 42, 9, 9, 9, 9]]
    assert batch["labels"].tolist() == [[i, i, 31, i, i, i, i, i], [i, i, 41, 42, i, i, i, i]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]
    assert batch["long_input_ids"].tolist() == [[21, 22, 23, 31, 9], [21, 22, 23, 41, 42]]
    assert batch["long_labels"].tolist() == [[i, i, i, 31, i], [i, i, i, 41, 42]]
    assert batch["long_attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


# ---- length


@FUZZ
@given(tokenised_rows(), st.integers(-3, 3))
def test_fits_is_exact_at_the_boundary(rows, offset):
    for row in rows:
        prompts = [row["short_prompt_ids"], row["long_prompt_ids"]]
        length = max(len(p + r) for p in prompts for r in (row["chosen_ids"], row["rejected_ids"]))
        assert row_length(row) == length
        before = copy.deepcopy(row)
        cutoff = length + offset
        assert fits(row, cutoff, "drop") is (offset >= 0)
        if offset >= 0:
            assert fits(row, cutoff, "error") is True
        else:
            with pytest.raises(RowError) as caught:
                fits(row, cutoff, "error")
            message = str(caught.value)
            assert message.startswith(f"{row['name']}: ") and f" {length} tokens" in message and str(cutoff) in message
        assert row == before  # never truncated


# ---- build_row on an encoder of our own


def encode(messages, system, tools):
    """One id per character; the prompt ends with a mark, the response too, as templates do."""
    everything = "\x01".join([system, tools, *(m["role"] + m["content"] for m in messages[:-1])])
    return [ord(c) for c in everything] + [2], [ord(c) for c in messages[-1]["content"]] + [3]


def message(content: str, role: str = "user") -> dict:
    return {"role": role, "content": content}


def built(short="s", long="l s", chosen="c", rejected="r", history=(), system="", long_system="", tools="", **changes):
    past = [message(t, role) for turn in history for t, role in zip(turn, ("user", "assistant"), strict=True)]
    responses = [message(chosen, "assistant"), message(rejected, "assistant")]
    keys = dict(markers=[]) | changes
    prompts = [*past, message(short)], [*past, message(long)]
    return build_row(
        Aligned("rows[0]", *prompts, responses, system, long_system, tools), keys.pop("encode", encode), **keys
    )


@FUZZ
@given(text, text, text, text, turns, text, text, text)
def test_build_row_keeps_all_and_shares_the_responses(
    short, long, chosen, rejected, history, system, long_system, tools
):
    rejected += "x" * (chosen == rejected)
    row = built(short, long, chosen, rejected, history, system, long_system, tools)
    past = [role + t for turn in history for t, role in zip(turn, ("user", "assistant"), strict=True)]
    assert set(row) == set(COLUMNS)
    assert row["name"] == "rows[0]"
    for side, prompt, its_system in (("short", short, system), ("long", long, long_system)):
        whole = "\x01".join([its_system, tools, *past, "user" + prompt])
        assert row[f"{side}_prompt_ids"] == [ord(c) for c in whole] + [2]
    assert row["chosen_ids"] == [ord(c) for c in chosen] + [3]
    assert row["rejected_ids"] == [ord(c) for c in rejected] + [3]
    assert row["long_is_short"] is (row["short_prompt_ids"] == row["long_prompt_ids"])


@FUZZ
@given(text, text, turns)
def test_equal_prompts_are_the_same(prompt, system, history):
    assert built(prompt, prompt, history=history, system=system, long_system=system)["long_is_short"] is True
    assert built(prompt, prompt + "!", history=history, system=system, long_system=system)["long_is_short"] is False
    assert built(prompt, prompt, history=history, system=system, long_system=system + "!")["long_is_short"] is False


@pytest.mark.parametrize("name", ["chosen", "rejected"])
def test_a_response_that_depends_on_its_prompt_is_refused(name):
    """As with a template that merges prompt and response before it tokenises."""

    def merging(messages, system, tools):
        prompt, response = encode(messages, system, tools)
        return prompt, response + [len(prompt)] * (messages[-1]["content"] == {"chosen": "c", "rejected": "r"}[name])

    with pytest.raises(RowError, match=rf"^rows\[0\]: `{name}` tokenises differently"):
        built(encode=merging)


def test_equal_response_tokens_are_refused():
    with pytest.raises(RowError, match=r"^rows\[0\]: `chosen` and `rejected` are the same tokens"):
        built(encode=lambda messages, system, tools: (encode(messages, system, tools)[0], [5]))


@pytest.mark.parametrize("where", ["short", "long", "chosen", "rejected", "history"])
def test_a_template_inside_the_text_is_refused(where):
    dirty = "hello<|end|>"
    with pytest.raises(RowError, match=r"^rows\[0\]: the text contains '<\|end\|>'"):
        built(**{where: [(dirty, "a")] if where == "history" else dirty}, markers=["<|stop|>", "<|end|>"])


@pytest.mark.parametrize("value", [None, 3, ["text"], b"text", "", " \n\t"])
def test_check_text_refuses(value):
    with pytest.raises(RowError, match=r"^rows\[4\]: column `chosen` "):
        check_text("rows[4]", "chosen", value)


@FUZZ
@given(text)
def test_check_text_accepts_any_text(value):
    check_text("rows[4]", "chosen", value)


# ---- with a real tokenizer, the host's converters and templates

BOS = "<|begin_of_text|>"
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


@cache
def host(template: str, bos: str | None = None, **arguments) -> SimpleNamespace:
    """A tokenizer trained on the sample and the host's template for it, a copy: it keeps the arguments given here."""
    from llamafactory.data.template import TEMPLATES, get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments
    from make_tiny_model import train_tokenizer

    tokenizer = train_tokenizer([str(row) for row in demo_rows()], bos=bos)
    data_args = DataArguments(template=template, cutoff_len=10**9, **arguments)
    with pytest.MonkeyPatch.context() as restored:
        restored.setitem(TEMPLATES, template, copy.copy(TEMPLATES[template]))
        template = get_template_and_fix_tokenizer(tokenizer, data_args)
    return SimpleNamespace(tokenizer=tokenizer, data_args=data_args, template=template)


MODELS = {"qwen": None, "llama3": BOS}  # template: BOS token

ALPACA = {name: name for name in ("prompt", "long_prompt", "chosen", "rejected", "system", "history")}
SHAREGPT = dict(messages="messages", long_messages="long_messages", chosen="chosen", rejected="rejected")
OPENAI_TAGS = dict(role_tag="role", content_tag="content", user_tag="user", assistant_tag="assistant",
                   observation_tag="tool", function_tag="function", system_tag="system")  # fmt: skip


def attributes(formatting: str = "alpaca", columns: dict | None = None, **more):
    from llamafactory.data.parser import DatasetAttr

    attr = DatasetAttr("file", dataset_name="file")
    columns = columns or (ALPACA if formatting == "alpaca" else SHAREGPT)
    attr.join(dict(formatting=formatting, ranking=True, columns=columns, **more))
    attr.entry = "rows"
    return attr


def converted(rows: list[dict], attr, data_args) -> dict[str, list]:
    from llamafactory.data.converter import get_dataset_converter

    from solopo_plugin.host.data import LongConverter

    converter = LongConverter(attr, data_args, get_dataset_converter)
    aligned = [converter(copy.deepcopy(row), index) for index, row in enumerate(rows)]
    return {name: [row[name] for row in aligned] for name in aligned[0]}


def processed(rows: list[dict], model, attr=None, cutoff_len: int | None = None, overlength="error") -> list[dict]:
    """Rows of the file -> tokenised rows, through converter and processor."""
    from solopo_plugin.host.data import SoloDatasetProcessor

    data_args = copy.copy(model.data_args)
    data_args.cutoff_len, data_args.solopo_overlength = cutoff_len or data_args.cutoff_len, overlength
    processor = SoloDatasetProcessor(model.template, model.tokenizer, None, data_args)
    batch = processor.preprocess_dataset(converted(rows, attr or attributes(), data_args))
    assert tuple(batch) == COLUMNS
    return [dict(zip(COLUMNS, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def test_the_example_row_is_shown_as_the_model_sees_it(monkeypatch, capsys):
    """Show blanks, too, that the tokenizer, as Llama 3's, would take out of what it decodes."""
    from solopo_plugin.host.data import SoloDatasetProcessor

    model = host("qwen")
    monkeypatch.setattr(model.tokenizer, "clean_up_tokenization_spaces", True)
    (row,) = processed([demo_rows(1)[0] | {"chosen": "It is n't x != y .", "history": [], "system": ""}], model)
    data_args = SimpleNamespace(cutoff_len=10**9, solopo_overlength="error")
    SoloDatasetProcessor(model.template, model.tokenizer, None, data_args).print_data_example(row)
    assert """tokens): "It is n't x != y .<|im_end|>\\n\"""" in capsys.readouterr().out


some_system = st.sampled_from(["", None]) | text


@st.composite
def rows_of_text(draw, system=some_system):
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        short, chosen, rejected = draw(text), draw(text), draw(text)
        long = draw(st.just(short) | text | text.map(lambda distraction, short=short: f"{distraction}\n{short}"))
        rejected += "x" * (chosen == rejected)
        rows.append(dict(prompt=short, long_prompt=long, chosen=chosen, rejected=rejected, system=draw(system),
                         history=[list(turn) for turn in draw(turns)]))  # fmt: skip
    return rows


def templated(template: str, row: dict, prompt: str) -> str:
    """The prompt as the model's authors define it, by string concatenation."""
    if template == "qwen":
        said = [("system", row["system"] or QWEN_SYSTEM)]
        form, start, opening = "<|im_start|>{}\n{}<|im_end|>\n", "", "<|im_start|>assistant\n"
    else:
        said = [("system", row["system"])] if row["system"] else []
        form, start = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>", BOS
        opening = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    for user, assistant in row["history"]:
        said += [("user", user), ("assistant", assistant)]
    return start + "".join(form.format(*turn) for turn in [*said, ("user", prompt)]) + opening


@pytest.mark.parametrize("template", MODELS)
@FUZZ
@given(rows=rows_of_text())
def test_tokens_are_the_whole_text_templated_once(template, rows):
    """Decoding gives back every character of system prompt, history, prompts and responses, in both sequences."""
    model = host(template, MODELS[template])
    end = {"qwen": "<|im_end|>\n", "llama3": "<|eot_id|>"}[template]

    def decoded(ids):
        return model.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    tokenised = processed(rows, model)
    assert len(tokenised) == len(rows)
    for index, (row, result) in enumerate(zip(rows, tokenised, strict=True)):
        assert result["name"] == f"rows[{index}]"
        assert decoded(result["short_prompt_ids"]) == templated(template, row, row["prompt"])
        assert decoded(result["long_prompt_ids"]) == templated(template, row, row["long_prompt"])
        assert decoded(result["chosen_ids"]) == row["chosen"] + end
        assert decoded(result["rejected_ids"]) == row["rejected"] + end
        assert result["long_is_short"] is (row["prompt"] == row["long_prompt"])
        for side in ("short", "long"):
            for response in ("chosen", "rejected"):
                whole = result[f"{side}_prompt_ids"] + result[f"{response}_ids"]
                bos = model.tokenizer.bos_token_id
                assert whole.count(bos) == (template == "llama3") and (template == "qwen" or whole[0] == bos)
    alone = [processed([row], model)[0] | {"name": f"rows[{index}]"} for index, row in enumerate(rows)]
    assert alone == tokenised  # one by one or together


@pytest.mark.parametrize("template", MODELS)
@FUZZ
@given(rows=rows_of_text())
def test_overlength_is_exact_through_the_processor(template, rows):
    """At cutoff_len = the longest row nothing happens; one less drops that row, whole, or names it."""
    model = host(template, MODELS[template])
    everything = processed(rows, model)
    longest = max(row_length(row) for row in everything)
    assert processed(rows, model, cutoff_len=longest) == everything
    kept = [row for row in everything if row_length(row) < longest]
    assert processed(rows, model, cutoff_len=longest - 1, overlength="drop") == kept
    first = next(row["name"] for row in everything if row_length(row) == longest)
    with pytest.raises(RowError) as caught:
        processed(rows, model, cutoff_len=longest - 1)
    assert str(caught.value).startswith(f"{first}: prompt + response have {longest} tokens")


def of_the_host(rows: list[dict], model, attr) -> dict[str, torch.Tensor]:
    """A batch by the host's own converter, pairwise processor and collator, as its DPO workflow builds them."""
    from llamafactory.data import PairwiseDataCollatorWithPadding
    from llamafactory.data.converter import get_dataset_converter
    from llamafactory.data.processor import PairwiseDatasetProcessor

    converter = get_dataset_converter(attr.formatting, attr, model.data_args)
    aligned = [converter(copy.deepcopy(row)) for row in rows]
    processor = PairwiseDatasetProcessor(model.template, model.tokenizer, None, model.data_args)
    examples = processor.preprocess_dataset({name: [row[name] for row in aligned] for name in aligned[0]})
    features = [dict(zip(examples, values, strict=True)) for values in zip(*examples.values(), strict=True)]
    collator = PairwiseDataCollatorWithPadding(template=model.template, tokenizer=model.tokenizer, pad_to_multiple_of=8,
                                               label_pad_token_id=IGNORE)  # fmt: skip
    return collator(features)


def assert_pairs_are_the_hosts(rows: list[dict], model, attr) -> None:
    """The short pair, also in padding; the long pair up to padding, which for ours is no more than needed."""
    ours = SoloCollator(model.tokenizer.pad_token_id, long_pair=True)(processed(rows, model, attr))
    on_long = copy.copy(attr)
    on_long.prompt, on_long.messages = attr.long_prompt, attr.long_messages
    short, long = of_the_host(rows, model, attr), of_the_host(rows, model, on_long)
    assert set(short) == set(long) == {"input_ids", "attention_mask", "labels"}
    for name, tensor in short.items():
        assert torch.equal(ours[name], tensor), name
    width = ours["long_input_ids"].shape[1]
    assert not long["attention_mask"][:, width:].any()
    for name, tensor in long.items():
        assert torch.equal(ours[f"long_{name}"], tensor[:, :width]), name


@pytest.mark.parametrize("template", MODELS)
@FUZZ
@given(rows=rows_of_text())
def test_pairs_are_the_hosts_tensor_for_tensor(template, rows):
    assert_pairs_are_the_hosts(rows, host(template, MODELS[template]), attributes())


def as_messages(row: dict, prompt: str, role: str, content: str, user: str, assistant: str) -> list[dict]:
    said = [("system", row["system"])] if row["system"] else []
    for turn in row["history"]:
        said += zip((user, assistant), turn, strict=True)
    return [{role: who, content: what} for who, what in [*said, (user, prompt)]]


OPENAI_NAMES = ("role", "content", "user", "assistant")


def reformatted(row: dict, role: str, content: str, user: str, assistant: str) -> dict:
    names = (role, content, user, assistant)
    return {
        "messages": as_messages(row, row["prompt"], *names),
        "long_messages": as_messages(row, row["long_prompt"], *names),
        "chosen": {role: assistant, content: row["chosen"]},
        "rejected": {role: assistant, content: row["rejected"]},
    }


@pytest.mark.parametrize("template", MODELS)
@FUZZ
@given(rows=rows_of_text())
def test_sharegpt_rows_are_the_alpaca_rows(template, rows):
    model = host(template, MODELS[template])
    talks = [reformatted(row, "from", "value", "human", "gpt") for row in rows]
    assert processed(talks, model, attributes("sharegpt")) == processed(rows, model)


@pytest.mark.parametrize("template", MODELS)
@FUZZ
@given(rows=rows_of_text(system=text.map(lambda words: f"{words} detailed thinking off")))
def test_openai_rows_are_the_alpaca_rows(template, rows):
    """The host's openai converter adds `detailed thinking off` to every system prompt that lacks it; these have it."""
    model = host(template, MODELS[template])
    talks = [reformatted(row, *OPENAI_NAMES) for row in rows]
    assert processed(talks, model, attributes("openai", tags=OPENAI_TAGS)) == processed(rows, model)


def test_the_tags_of_the_docs_read_role_and_content():
    tags = json.loads(
        re.search(r'^"tags": (\{.+?\})', (ROOT / "docs/data.md").read_text(), re.MULTILINE | re.DOTALL)[1]
    )
    assert tags == OPENAI_TAGS
    talk = reformatted(GOOD, *OPENAI_NAMES)
    assert processed([talk], host("qwen"), attributes("sharegpt", tags=tags)) == processed([GOOD], host("qwen"))


@pytest.mark.parametrize("formatting", ["alpaca", "sharegpt", "openai"])
def test_a_list_of_rejected_responses_is_the_rows_it_stands_for(formatting):
    """Token for token, also of a list of one and with a history and a system prompt that ends as openai's."""
    model = host("qwen")
    tags = {"openai": dict(tags=OPENAI_TAGS)}.get(formatting, {})
    names = {"sharegpt": ("from", "value", "human", "gpt"), "openai": OPENAI_NAMES}.get(formatting)
    attr, answers = attributes(formatting, **tags), ["There.", "Nowhere at all.", "No."]
    alone = [
        GOOD | dict(rejected=answer, history=[["Who?", "She."]], system="detailed thinking off") for answer in answers
    ]
    alone = [reformatted(row, *names) if names else row for row in alone]
    lists = [alone[0] | {"rejected": [row["rejected"] for row in alone[:n]]} for n in (3, 1, 2)]
    singles = processed(alone, model, attr)
    for row, n in zip(processed(lists, model, attr), (3, 1, 2), strict=True):
        assert rejected_of(row) == [single["rejected_ids"] for single in singles[:n]]
        assert row | {"rejected_ids": 0, "name": 0} == singles[0] | {"rejected_ids": 0, "name": 0}
        assert [pair["rejected_ids"] for pair in pairs_of(row)] == rejected_of(row)
    assert processed(lists[1:2], model, attr) == processed(alone[:1], model, attr)


def test_rejected_responses_equal_as_tokens_are_named():
    aligned = Aligned("rows[0]", [message("q")], [message("q")], [message(c, "assistant") for c in "abb"], "", "", "")
    with pytest.raises(
        RowError, match=r"^rows\[0\]: `rejected\[0\]` and `rejected\[1\]` are the same tokens; remove one\."
    ):
        build_row(aligned, encode, [])


def test_openai_system_is_the_hosts_on_both_sides():
    """What the host adds to the system prompt stands in the short and in the long sequence alike."""
    row = dict(prompt="Where?", long_prompt="Where?", chosen="Here.", rejected="There.", system=None, history=[])
    talk = reformatted(row, *OPENAI_NAMES)
    (result,) = processed([talk], host("qwen"), attributes("openai", tags=OPENAI_TAGS))
    assert result["long_is_short"] is True
    assert "system\ndetailed thinking off<|im_end|>" in host("qwen").tokenizer.decode(result["long_prompt_ids"])


# ---- BOS and bad turns

GOOD = dict(prompt="Where?", long_prompt="Much text. Where?", chosen="Here.", rejected="There.", system="", history=[])


@pytest.mark.parametrize("column", ["prompt", "long_prompt", "history"])
def test_a_second_bos_is_refused(column):
    dirty = f"{BOS}hello"
    row = GOOD | {column: [[dirty, "hello"]] if column == "history" else dirty}
    with pytest.raises(RowError, match=r"^rows\[0\]: .*BOS"):
        processed([row], host("llama3", BOS))


@pytest.mark.parametrize("column", ["chosen", "rejected"])
def test_a_second_bos_in_a_response_is_refused(column):
    with pytest.raises(RowError, match=r"^rows\[0\]: .*BOS"):
        processed([GOOD | {column: f"{BOS}hello"}], host("llama3", BOS))


@pytest.mark.parametrize("column", ["prompt", "long_prompt", "history", "chosen", "rejected"])
@pytest.mark.parametrize("template", ["default", "mistral"])
def test_an_eos_in_a_text_is_refused(template, column):
    """Refuse it where the template has no stop words, too: then EOS ends its turns."""
    model = host(template)
    dirty = f"Rosvik{model.tokenizer.eos_token} and more"
    with pytest.raises(RowError, match=r"^rows\[0\]: the text contains .*stop token"):
        processed([GOOD | {column: [["Who?", dirty]] if column == "history" else dirty}], model)


def test_an_eos_that_the_tokenizer_splits_is_text(monkeypatch):
    """Write it in pieces, as the host's `split_special_tokens: true` does; the one behind the response ends the turn."""
    model = host("default")
    monkeypatch.setattr(model.tokenizer, "split_special_tokens", True)
    (result,) = processed([GOOD | {"chosen": f"Rosvik{model.tokenizer.eos_token} and more"}], model)
    assert result["chosen_ids"].count(model.tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("template, bos", [("smollm2", "<|im_start|>"), ("default", "<|endoftext|>")])
def test_a_bos_that_the_template_itself_repeats_is_accepted(template, bos):
    """SmolLM2 declares <|im_start|>, which opens every turn, as BOS; GPT-2's kin have BOS = EOS, which ends turns."""
    (result,) = processed([GOOD | {"history": [["Who?", "Me."], ["Why?", "So."]]}], host(template, bos))
    assert result["long_is_short"] is False


TALK = reformatted(GOOD, "from", "value", "human", "gpt")


@pytest.mark.parametrize("response", [{"from": "human", "value": "a"}, {"from": "alien", "value": "a"}, {"value": "a"}])
@pytest.mark.parametrize("column", ["chosen", "rejected"])
def test_a_response_that_is_not_the_assistants_is_refused(column, response):
    with pytest.raises(RowError, match=rf"^rows\[0\]: .*`{column}`"):
        processed([TALK | {column: response}], host("qwen"), attributes("sharegpt"))


@pytest.mark.parametrize("history", [[["a"]], [["a", None]], [["a", "b", "c"]], [["a", 3]]])
def test_a_malformed_history_is_refused(history):
    with pytest.raises(RowError, match=r"^rows\[0\]: .*`history`"):
        processed([GOOD | {"history": history}], host("qwen"))


# ---- what the host's converters and templates make of a row is what is checked

TOOL = {"name": "where", "description": "Tell.", "parameters": {"type": "object", "properties": {"who": {"type": "string"}}}}  # fmt: skip
CALL = {"name": "where", "arguments": {"who": "Ilmar Holm"}}
TOOLS = ALPACA | {"tools": "tools"}
TALK_TOOLS = SHAREGPT | {"tools": "tools"}


def calling(content="", calls=(CALL,), question: str = "And she?") -> list[dict]:
    """A conversation of the openai formatting in which a tool was called."""
    tool_calls = [{"id": "1", "type": "function", "function": call} for call in calls]
    said = {"role": "assistant", "content": content, "tool_calls": tool_calls}
    found = [{"role": "tool", "content": "Rosvik", "tool_calls": None} for _ in calls]
    user = {"role": "user", "content": "Where is he?", "tool_calls": None}
    answer = {"role": "assistant", "content": "In Rosvik.", "tool_calls": None}
    return [user, said, *found, answer, user | {"content": question}]


def openai_row(messages: list[dict], long: list[dict] | None = None, **more) -> dict:
    chosen, rejected = ({"role": "assistant", "content": text, "tool_calls": None} for text in ("Here.", "There."))
    return dict(messages=messages, long_messages=long or messages, chosen=chosen, rejected=rejected) | more


@pytest.mark.parametrize("tools", [None, [TOOL], json.dumps([TOOL])])
@pytest.mark.parametrize("n_calls", [1, 2])
@pytest.mark.parametrize("content", [None, "", " \n"])
def test_a_call_of_a_tool_trains_as_the_hosts(content, n_calls, tools):
    """Make the turn's text from `tool_calls`, as the converter does, where `content` holds none that it would drop."""
    row = openai_row(calling(content, [CALL] * n_calls), calling(content, [CALL] * n_calls, "Much text. And she?"))
    attr = attributes("openai", TALK_TOOLS, tags=OPENAI_TAGS)
    assert_pairs_are_the_hosts([row | {"tools": tools}], host("qwen"), attr)


@pytest.mark.parametrize("formatting", ["sharegpt", "openai"])
@pytest.mark.parametrize("template", ["qwen", "qwen3", "llama3"])
def test_words_and_calls_of_one_turn_stand_in_a_message_of_function_tag(template, formatting):
    """Read the form that the refusal of words beside `tool_calls` names; the words are put before the calls."""
    model = host(template, MODELS.get(template))

    def history(content: str) -> str:
        said, found = {"role": "function", "content": content}, {"role": "tool", "content": "Rosvik"}
        messages = [USER, said, found, SAID, USER]
        attr = attributes(formatting, tags=OPENAI_TAGS)
        (row,) = processed([openai_row(messages, [USER, *messages[1:]])], model, attr)
        return model.tokenizer.decode(row["short_prompt_ids"])

    both = history(f"I look both up.\n<tool_call>{json.dumps([CALL, CALL | {'name': 'who'}])}</tool_call>")
    before, words, after = both.partition("I look both up.\n")
    assert words and before + after == history(json.dumps([CALL, CALL | {"name": "who"}])) and "who" in after


@pytest.mark.parametrize("template", ["qwen", "default"])
@pytest.mark.parametrize("tools", [None, "", "[]", json.dumps([TOOL]), json.dumps([{"type": "function", "function": TOOL}])])  # fmt: skip
def test_tools_and_calls_of_sharegpt_train_as_the_hosts(template, tools):
    called = [
        {"from": "human", "value": "Where is he?"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": ""},
    ]
    row = TALK | {"messages": called, "long_messages": [{"from": "system", "value": None}, *called], "tools": tools}
    assert_pairs_are_the_hosts([row], host(template), attributes("sharegpt", TALK_TOOLS))
    row["chosen"] = {"from": "function_call", "value": json.dumps(CALL)}
    assert_pairs_are_the_hosts([row], host(template), attributes("sharegpt", TALK_TOOLS))


def histories() -> list[dict]:
    lines = (ROOT / "data" / "demo_history.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_shipped_histories_are_as_generated_and_end_alike():
    """The short trace is the long one without some calls and their results; who is asked about is looked up in both."""
    from make_demo_data import make_history

    rows = histories()
    assert rows == [make_history(i) for i in range(24)]
    for row in rows:
        short, long = row["messages"], row["long_messages"]
        left = iter(long)
        assert all(turn in left for turn in short) and short[-1] == long[-1] and len(long) == len(short) + 12
        said = "".join(turn["value"] for turn in short if turn["from"] == "observation")
        town = row["chosen"]["value"].rpartition(": ")[2]
        assert town in said and row["rejected"]["value"].rpartition(": ")[2] not in said
    assert {row["messages"][-1]["from"] for row in rows} == {"human", "observation"}


@pytest.mark.parametrize("template", ["qwen", "llama3", "glm4"])
def test_a_short_and_a_long_history_train_as_the_hosts(template):
    """Calls, results and tools in the template's own words, both sides token for token."""
    model, attr = host(template, MODELS.get(template)), attributes("sharegpt", TALK_TOOLS)
    assert_pairs_are_the_hosts(histories()[:6], model, attr)
    short, long = (
        model.tokenizer.decode(processed(histories()[:1], model, attr)[0][f"{side}_prompt_ids"])
        for side in ("short", "long")
    )
    for text in (short, long):
        assert "First name and surname." in text and "Fenna Drozd shares a workshop with" in text
    assert "Fenna Holm" in long and "Fenna Holm" not in short


def test_a_history_in_the_openai_formatting_is_the_same_history():
    """Calls in `tool_calls`; such a trace must not end with a result, which the host's converter drops."""
    row = histories()[1]

    def turn(message: dict) -> dict:
        role = {"human": "user", "gpt": "assistant", "observation": "tool", "system": "system"}
        if message["from"] == "function_call":
            calls = [{"id": "1", "type": "function", "function": json.loads(message["value"])}]
            return {"role": "assistant", "content": "", "tool_calls": calls}
        return {"role": role[message["from"]], "content": message["value"]}

    sides = {column: [turn(message) for message in row[column]] for column in ("messages", "long_messages")}
    other = sides | {"tools": row["tools"]} | {name: turn(row[name]) for name in ("chosen", "rejected")}
    for column in sides:
        row[column][0]["value"] += (
            "\n"  # which the host's openai converter adds to a system prompt where there are tools
        )
    attr = attributes("openai", TALK_TOOLS, tags=OPENAI_TAGS)
    assert processed([other], host("qwen"), attr) == processed([row], host("qwen"), attributes("sharegpt", TALK_TOOLS))


@pytest.mark.parametrize("formatting, row, columns", [("alpaca", GOOD, TOOLS), ("sharegpt", TALK, TALK_TOOLS)])
def test_tools_as_a_list_are_tools_as_json(formatting, row, columns):
    """As the host's openai converter writes them; its other converters hand a list to a parser of text."""
    attr = attributes(formatting, columns)
    as_list, as_text = ([row | {"tools": tools}] for tools in ([TOOL], json.dumps([TOOL])))
    assert processed(as_list, host("qwen"), attr) == processed(as_text, host("qwen"), attr)


FILLED = TOOL | {"parameters": {"properties": {"who": {"type": "string"}, "city": None}}}
BAD_TOOLS = {
    "not JSON": ("where(who)", "RuntimeError Invalid JSON"),
    "no list": ('{"name": "where"}', "the template cannot write `tools`"),
    "a list of words": ('["where"]', "the template cannot write `tools`"),
    "no name": ('[{"parameters": {"properties": {}}}]', "the template cannot write `tools`: KeyError 'name'"),
    "a number": (3, "column `tools` must be JSON text, got int '3'"),
    "keys of other rows": ([FILLED], "column `tools` holds null, which loading fills in for keys of other rows"),
    "a date": ([TOOL | {"default": datetime(2024, 1, 1)}], "holds a date, which loading takes for a time; give"),
}


@pytest.mark.parametrize("name", BAD_TOOLS)
@pytest.mark.parametrize("formatting", ["alpaca", "sharegpt", "openai"])
def test_bad_tools_name_the_row(formatting, name):
    tools, sentence = BAD_TOOLS[name]
    row = {"alpaca": GOOD, "sharegpt": TALK, "openai": openai_row([{"role": "user", "content": "Where?"}])}[formatting]
    more = {"tags": OPENAI_TAGS} if formatting == "openai" else {}
    attr = attributes(formatting, TOOLS if formatting == "alpaca" else TALK_TOOLS, **more)
    with pytest.raises(RowError, match=rf"^rows\[0\]: .*{re.escape(sentence)}") as caught:
        processed([row | {"tools": tools}], host("default"), attr)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call", ["where(Ilmar)", '{"name": "where"}', '["where"]', "3"])
@pytest.mark.parametrize("column, where", [("messages", "turn 2 (function) of the short prompt"),
                                           ("long_messages", "turn 2 (function) of the long prompt"),
                                           ("chosen", "`chosen`"), ("rejected", "`rejected`")])  # fmt: skip
def test_a_malformed_call_names_row_and_turn(column, where, call):
    said = {"from": "function_call", "value": call}
    user, seen = {"from": "human", "value": "Where?"}, {"from": "observation", "value": "Rosvik"}
    row = TALK | {column: said if column in ("chosen", "rejected") else [user, said, seen]}
    with pytest.raises(RowError, match=rf"^rows\[0\]: the template cannot write {re.escape(where)}: ") as caught:
        processed([row], host("qwen"), attributes("sharegpt"))
    assert "\n" not in str(caught.value)


USER, SAID = {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}
BARE_TAGS = {name: tag for name, tag in OPENAI_TAGS.items() if name not in ("observation_tag", "function_tag")}
FEW_TAGS = {name: tag for name, tag in OPENAI_TAGS.items() if name not in ("system_tag", "function_tag")}
SEEN = {"role": "tool", "content": "Rosvik"}
CALLING = {"role": "assistant", "content": None, "tool_calls": [{"function": CALL}]}
CONVERSATIONS = {  # name: (messages of the openai formatting, tags, the sentence)
    "no content": ([USER, {"role": "assistant", "content": None}, USER], OPENAI_TAGS, "turn 2 (`assistant`) of column `messages` must be a string, got NoneType"),
    "empty": ([USER, {"role": "assistant", "content": ""}, USER], OPENAI_TAGS, "turn 2 (`assistant`) of column `messages` is empty"),
    "empty behind tools": ([*calling(calls=[CALL] * 3)[:-1], USER | {"content": " "}], OPENAI_TAGS, "turn 7 (`user`) of column `messages` is empty"),
    "parts": ([USER | {"content": [{"type": "text", "text": "Where?"}]}], OPENAI_TAGS, "turn 1 (`user`) of column `messages` must be a string, got list"),
    "a result of parts": ([USER, CALLING, SEEN | {"content": [{"text": "Rosvik"}]}, SAID, USER], OPENAI_TAGS, "turn 3 (`tool`) of column `messages` must be a string, got list"),
    "a system prompt of parts": ([{"role": "system", "content": ["a"]}, USER], OPENAI_TAGS, "turn 1 (`system`) of column `messages` must be a string or null, got list"),
    "ends with a result": ([USER, CALLING, SEEN], OPENAI_TAGS, "turn 3 (`tool`) of column `messages` is the last, and the host's openai converter drops a result without an answer"),
    "ends with a result, dropped in silence": ([USER, SAID, USER, SEEN], OPENAI_TAGS, "turn 4 (`tool`) of column `messages` is the last, and"),
    "a result without a call": ([USER, SEEN, USER], OPENAI_TAGS, "turn 2 of 3 is `tool`"),
    "two of one side": ([USER, SAID, SAID, USER], OPENAI_TAGS, "turn 3 of 4 is `assistant`"),
    "two of one side behind a system prompt": ([{"role": "system", "content": "Be brief."}, USER, SAID, SAID, USER], OPENAI_TAGS, "turn 4 of 5 is `assistant`"),
    "a system prompt within": ([USER, {"role": "system", "content": "Be brief."}, USER], OPENAI_TAGS, "turn 2 of 3 is `system`"),
    "nothing but a system prompt": ([{"role": "system", "content": "Be brief."}], OPENAI_TAGS, "turn 1 of 1 is `system`"),
    "no role": ([{"role": None, "content": "Where?"}], BARE_TAGS, "turn 1 of column `messages` has `role` None; known are user, assistant, system"),
    "unknown role": ([USER, SAID, SEEN, SAID, USER], BARE_TAGS, "turn 3 of column `messages` has `role` 'tool'; known are user, assistant, system"),
    "names without tags": ([USER], {}, "turn 1 of column `messages` must be a message with `from` and `value` (for other names set `tags` in dataset_info.json, docs/data.md), got dict"),
    "roles without tags": ([{"from": "user", "value": "Where?"}], {}, "turn 1 of column `messages` has `from` 'user'; known are human, gpt, observation, function_call, system (for other names set `tags` in dataset_info.json, docs/data.md)."),
    "no message": ([USER, "Here.", USER], OPENAI_TAGS, "turn 2 of column `messages` must be a message with `role` and `content`, got str 'Here.'"),
    "no content key": ([USER, {"role": "assistant"}, USER], OPENAI_TAGS, "turn 2 of column `messages` must be a message with `role` and `content`, got dict"),
    "one message": (USER, OPENAI_TAGS, "column `messages` must be a list of messages, got"),
    "a call without name": ([USER, CALLING | {"tool_calls": [{"function": {"arguments": {}}}]}, SEEN, SAID, USER], OPENAI_TAGS, "turn 2 (`assistant`) of column `messages`: `tool_calls` must be a list of `function` with `name` and `arguments`, got"),
    "a call without function": ([USER, CALLING | {"tool_calls": [CALL]}, SEEN, SAID, USER], OPENAI_TAGS, "turn 2 (`assistant`) of column `messages`: `tool_calls` must be a list of `function` with `name` and `arguments`, got"),
    "a number of calls": ([USER, CALLING | {"tool_calls": 3}, SEEN, SAID, USER], OPENAI_TAGS, "turn 2 (`assistant`) of column `messages`: `tool_calls` must be a list of `function` with `name` and `arguments`, got int"),
    "calls as text": ([USER, CALLING | {"tool_calls": json.dumps([CALL])}, SEEN, SAID, USER], OPENAI_TAGS, "turn 2 (`assistant`) of column `messages`: `tool_calls` must be a list of `function` with `name` and `arguments`, got"),
    "arguments of other rows": ([USER, CALLING | {"tool_calls": [{"function": CALL | {"arguments": {"who": "a", "city": None}}}]}, SEEN, SAID, USER], OPENAI_TAGS, "turn 2 (`assistant`) of column `messages` holds null, which loading fills in for keys of other rows"),
    "an argument that is a date": ([USER, CALLING | {"tool_calls": [{"function": CALL | {"arguments": {"days": [datetime(2024, 1, 1)]}}}]}, SEEN, SAID, USER], OPENAI_TAGS, "turn 2 (`assistant`) of column `messages` holds a date, which loading takes for a time; give the call as the JSON text of a message of `function_tag`."),
    "words beside a call": ([USER, CALLING | {"content": "I look it up."}, SEEN, SAID, USER], OPENAI_TAGS, "turn 2 (`assistant`) of column `messages` has text beside `tool_calls`, which the host's openai converter drops, 'I look it up.'; give both as a message of `function_tag`: the text, <tool_call>, the calls as JSON list, </tool_call>."),
    "parts beside a call": ([USER, CALLING | {"content": [{"type": "text", "text": "I look it up."}]}, SEEN, SAID, USER], OPENAI_TAGS, "turn 2 (`assistant`) of column `messages` has text beside `tool_calls`, which the host's openai converter drops, [{'type': 'text', "),
    "arguments as text": ([USER, CALLING | {"tool_calls": [{"function": CALL | {"arguments": '{"who": "a"}'}}]}, SEEN, SAID, USER], OPENAI_TAGS, "turn 2 (`assistant`) of column `messages`: `arguments` must be an object (the host would quote JSON text), got str '{\"who\": \"a\"}'."),
    "a call of the user's": ([USER | {"tool_calls": [{"function": CALL}]}], OPENAI_TAGS, "turn 1 (`user`) of column `messages` has `tool_calls`, which the host's converter ignores there"),
    "a call without a tag": ([CALLING, SAID, USER], BARE_TAGS, "turn 1 (`assistant`) of column `messages` has `tool_calls`, for which `tags` in dataset_info.json need a `function_tag`."),
    "a call without a tag, nor one of the system": ([USER, CALLING, SEEN, SAID, USER], FEW_TAGS, "turn 2 (`assistant`) of column `messages` has `tool_calls`, for which `tags` in dataset_info.json need a `function_tag`."),
}  # fmt: skip


@pytest.mark.parametrize("column", ["messages", "long_messages"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_that_the_converter_would_not_keep_names_row_turn_and_role(name, column):
    messages, tags, sentence = CONVERSATIONS[name]
    asked = [USER] if tags else [{"from": "human", "value": "Where?"}]  # the host's own names
    row = openai_row(asked) | {column: messages}
    with pytest.raises(RowError, match=rf"^rows\[0\]: .*{re.escape(sentence.replace('`messages`', f'`{column}`'))}"):
        processed([row], host("qwen"), attributes("openai", **({"tags": tags} if tags else {})))


@pytest.mark.parametrize("column", ["chosen", "rejected"])
@pytest.mark.parametrize("response, sentence", [
    ({"role": "assistant", "content": "a", "tool_calls": [{"function": CALL}]}, "has `tool_calls`, which the host's converter ignores"),
    ({"role": "assistant", "content": None, "tool_calls": None}, "must be a string, got NoneType"),
    ({"role": None, "content": "a"}, "must be one message with `role` 'assistant'"),
    ({"role": "assistant"}, "must be one message with `role` 'assistant' and `content`"),
    ([[{"role": "assistant", "content": "a"}]], "must be one message with `role` 'assistant'"),
])  # fmt: skip
@pytest.mark.parametrize("tags", [OPENAI_TAGS, BARE_TAGS])
def test_a_response_that_the_converter_would_change_is_refused(tags, response, sentence, column):
    called = rf"{column}\[0\]" if column == "rejected" and isinstance(response, list) else column
    with pytest.raises(RowError, match=rf"^rows\[0\]: column `{called}` {re.escape(sentence)}"):
        processed([openai_row([USER]) | {column: response}], host("qwen"), attributes("openai", tags=tags))


@pytest.mark.parametrize("formatting", ["sharegpt", "openai"])
@pytest.mark.parametrize("column", ["messages", "long_messages"])
def test_a_system_prompt_on_one_side_is_refused(column, formatting):
    """The openai converter writes a system prompt of its own where there is none."""
    role, content, user = ("from", "value", "human") if formatting == "sharegpt" else ("role", "content", "user")
    row = reformatted(GOOD, role, content, user, "gpt" if formatting == "sharegpt" else "assistant")
    row[column] = [{role: "system", content: "Be brief."}, *row[column]]
    tags = {"tags": OPENAI_TAGS} if formatting == "openai" else {}
    with pytest.raises(RowError, match=r"^rows\[0\]: only one of `messages` and `long_messages` has a system prompt"):
        processed([row], host("qwen"), attributes(formatting, **tags))


@pytest.mark.parametrize("formatting", ["sharegpt", "openai"])
@pytest.mark.parametrize("column", ["messages", "long_messages"])
def test_a_system_turn_beside_a_system_column_is_refused(column, formatting):
    """The host would take the turn, on one side only where the other has none; an empty column changes nothing."""
    user, assistant, system = (dict(zip(("role", "content"), x, strict=True)) for x in (
        ("user", "Where?"), ("assistant", "Here."), ("system", "Be brief.")))  # fmt: skip
    row = openai_row([user]) | {"chosen": assistant, column: [system, user], "system": "Be long."}
    attr = attributes(formatting, SHAREGPT | {"system": "system"}, tags=OPENAI_TAGS)
    with pytest.raises(RowError, match=rf"^rows\[0\]: column `{column}` begins with a system prompt, for which the host "
                                       r"ignores column `system`, 'Be long\.'; empty one of the two\.$"):  # fmt: skip
        processed([row], host("qwen"), attr)
    both = openai_row([system, user])
    without = processed([both], host("qwen"), attributes(formatting, tags=OPENAI_TAGS))
    assert processed([both | {"system": ""}], host("qwen"), attr) == without


def test_calls_in_sharegpt_are_not_ignored():
    said = {"from": "gpt", "value": "Let me look.", "tool_calls": [{"function": CALL}]}
    row = TALK | {"messages": [TALK["messages"][0], said, TALK["messages"][0]]}
    with pytest.raises(RowError, match=r"^rows\[0\]: turn 2 \(`gpt`\) of column `messages` has `tool_calls`, which"):
        processed([row], host("qwen"), attributes("sharegpt"))


@pytest.mark.parametrize("tag", [True, False])
@pytest.mark.parametrize("formatting", ["alpaca", "sharegpt"])
def test_a_kto_tag_does_not_replace_the_pair(formatting, tag):
    """The host's converters take `response` and an empty text for the pair where `kto_tag` names a boolean."""
    row, columns = (GOOD, ALPACA) if formatting == "alpaca" else (TALK, SHAREGPT)
    attr = attributes(formatting, columns | {"kto_tag": "good", "response": "answer"})
    with pytest.raises(RowError, match=rf"^rows\[0\]: column `good`, mapped as `kto_tag`, is {tag}"):
        processed([row | {"good": tag, "answer": "Elsewhere."}], host("qwen"), attr)
    (ours,) = processed([row | {"good": None, "answer": "Elsewhere."}], host("qwen"), attr)
    assert [ours] == processed([row], host("qwen"), attributes(formatting))


@pytest.mark.parametrize("history", ["Hello.", {"a": "b"}, 3])
def test_a_history_that_the_converter_would_ignore_is_refused(history):
    with pytest.raises(RowError, match=r"^rows\[0\]: .*`history` must be a list of \[question, answer\], got"):
        processed([GOOD | {"history": history}], host("qwen"))


def test_a_prompt_that_the_converter_would_leave_out_is_refused():
    attr = attributes(columns=ALPACA | {"query": "query"})
    with pytest.raises(RowError, match=r"^rows\[0\]: column `long_prompt` must be a string, got NoneType"):
        processed([GOOD | {"long_prompt": None, "query": "Where?"}], host("qwen"), attr)


ODD = [None, "", " ", 0, 3, True, [], {}, "where()", '{"name": "where"}', ["a"], {"a": None}, *OPENAI_TAGS.values(),
       "human", "gpt", "observation", "function_call"]  # fmt: skip
WHOLE = {  # formatting: (a row that has everything, columns, tags)
    "alpaca": (GOOD | {"history": [["Who?", "He."]], "query": "Where?", "system": "Be brief.", "tools": json.dumps([TOOL]),
                       "answer": "Elsewhere.", "good": None},
               TOOLS | {"query": "query", "response": "answer", "kto_tag": "good"}, {}),
    "sharegpt": (TALK | {"messages": [{"from": "system", "value": "Be brief."}, TALK["messages"][0],
                                      {"from": "function_call", "value": json.dumps(CALL)},
                                      {"from": "observation", "value": "Rosvik"}],
                         "system": None, "tools": json.dumps([TOOL]), "good": None},
                 TALK_TOOLS | {"system": "system", "kto_tag": "good"}, {}),
    "sharegpt with a system column": (TALK | {"system": "Be long."}, SHAREGPT | {"system": "system"}, {}),
    "openai": (openai_row([{"role": "system", "content": "Be brief."}, *calling(calls=[CALL] * 2)], tools=[TOOL], good=None),
               TALK_TOOLS | {"kto_tag": "good"}, {"tags": OPENAI_TAGS}),
    "openai without tools": (openai_row(reformatted(GOOD | {"history": [["Who?", "He."]]}, *OPENAI_NAMES)["messages"]),
                             SHAREGPT, {"tags": BARE_TAGS}),
}  # fmt: skip


def places(value, path=()):
    """Paths to all that a row holds."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(item, (*path, key))


@st.composite
def broken(draw, row: dict) -> dict:
    """A row with one or two things in it replaced, left out or doubled."""
    row = copy.deepcopy(row)
    for _ in range(draw(st.integers(1, 2))):
        *path, key = draw(st.sampled_from(list(places(row))))
        owner = row
        for step in path:
            owner = owner[step]
        how = draw(st.sampled_from(["replace", "leave out", "double"]))
        if how == "double" and isinstance(owner, list):
            owner.insert(key, copy.deepcopy(owner[key]))
        elif how == "leave out":
            del owner[key]
        else:
            owner[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
    return row


@pytest.mark.parametrize("formatting", WHOLE)
@settings(FUZZ, max_examples=300)
@given(data=st.data())
def test_a_broken_row_trains_as_the_hosts_or_is_refused_by_name(formatting, data):
    """Never another error, never other tokens, whatever is odd about a row."""
    row, columns, more = WHOLE[formatting]
    row = data.draw(broken(row))
    attr = attributes(formatting.split()[0], columns, **more)
    try:
        processed([row], host("qwen"), attr)
    except ValueError as error:
        assert re.match(r"rows\[0\]: |Dataset `rows` has no column ", str(error)) and "\n" not in str(error)
        return
    if isinstance(row.get("tools"), list | dict):  # which only one of the host's converters takes
        row["tools"] = json.dumps(row["tools"], ensure_ascii=False)
    rejected = row["rejected"] if isinstance(row["rejected"], list) else [row["rejected"]]
    assert_pairs_are_the_hosts([row | {"rejected": response} for response in rejected], host("qwen"), attr)


# ---- thoughts

THOUGHT = "<think>\nIt says so.\n</think>\n\n"
OPEN = "<think>\nIt says so."
RESPONSES = {"plain": ("Here.", "There."), "chosen thinks": (f"{THOUGHT}Here.", "There."),
             "rejected thinks": ("Here.", f"{THOUGHT}There."), "both think": (f"{THOUGHT}Here.", f"{THOUGHT}There."),
             "rejected never ends": ("Here.", OPEN), "one never ends": (f"{THOUGHT}Here.", OPEN)}  # fmt: skip


@pytest.mark.parametrize("enable_thinking", [True, None, False])
@pytest.mark.parametrize("name", RESPONSES)
def test_both_responses_stand_behind_the_prompt_that_their_template_writes(enable_thinking, name):
    """Refused exactly where the host's template writes two prompts; otherwise the host's tokens."""
    chosen, rejected = RESPONSES[name]
    model = host("qwen3", enable_thinking=enable_thinking)
    messages = [{"role": "user", "content": "Where?"}]
    prompts = [model.template.encode_oneturn(model.tokenizer, [*messages, message(text, "assistant")])[0]
               for text in (chosen, rejected)]  # fmt: skip
    row = GOOD | {"chosen": chosen, "rejected": rejected}
    if prompts[0] == prompts[1]:
        assert_pairs_are_the_hosts([row], model, attributes())
    else:
        with pytest.raises(RowError, match=r"^rows\[0\]: .*`enable_thinking: true`"):
            processed([row], model)
    assert (prompts[0] == prompts[1]) == (enable_thinking is True or name in ("plain", "both think")
                                          or (enable_thinking, name) in {(None, "one never ends"), (False, "chosen thinks"),
                                                                         (False, "rejected thinks")})  # fmt: skip


@pytest.mark.parametrize("side", ["short", "long"])
def test_prompts_that_differ_by_response_are_refused(side):
    def thinking(messages, system, tools):
        prompt, response = encode(messages, system, tools)
        on_side = messages[-2]["content"] == {"short": "s", "long": "l s"}[side] if len(messages) > 1 else False
        return prompt + [7] * (on_side and messages[-1]["content"] == "r"), response

    with pytest.raises(RowError, match=rf"^rows\[0\]: .* {side} prompt .*`enable_thinking: true`"):
        built(encode=thinking)


@pytest.mark.parametrize("column", ["chosen", "rejected"])
def test_a_response_of_which_nothing_is_left_is_refused(column):
    """`enable_thinking: false` takes thoughts away; what is then empty is no response."""
    model = host("qwen3", enable_thinking=False)
    with pytest.raises(RowError, match=rf"^rows\[0\]: nothing is left of `{column}`"):
        processed([GOOD | {column: THOUGHT}], model)
    assert processed([GOOD | {column: THOUGHT + "Elsewhere."}], model) == processed([GOOD | {column: "Elsewhere."}], model)  # fmt: skip


@pytest.mark.parametrize("template, enable_thinking, n", [("qwen3", True, 3), ("qwen3", False, 0), ("qwen", True, 0)])
def test_empty_thoughts_that_are_trained_are_counted(template, enable_thinking, n):
    """Of four responses one has a thought; where thinking is off the empty one is the prompt's."""
    from datasets import Dataset

    from solopo_plugin.host.data import warn_of_empty_thoughts

    model, said = host(template, enable_thinking=enable_thinking), []
    rows = [GOOD, GOOD | {"rejected": f"{THOUGHT}{GOOD['rejected']}"} if n else GOOD]
    tokenised, logger = Dataset.from_list(processed(rows, model)), SimpleNamespace(warning_rank0=said.append)
    warn_of_empty_thoughts(tokenised, model.template, model.tokenizer, False, logger)
    assert len(said) == bool(n) and all(f"{n} of the 4 responses of the training rows have no" in line for line in said)


def test_a_template_of_another_tokenizer_is_refused():
    """Its tokens have no number, which the host's tokenizer says in silence."""
    with pytest.raises(RowError, match=r"^rows\[0\]: the template writes a token that the tokenizer lacks"):
        processed([GOOD], host("chatglm3"))


def test_tools_with_a_template_inside_are_refused():
    with pytest.raises(RowError, match=r"^rows\[0\]: the text contains '<\|end\|>'"):
        built(tools='[{"name": "<|end|>"}]', markers=["<|end|>"])


# ---- data sets beside each other, columns, warnings


def aligned(rows: list[dict], attr, streaming: bool = False):
    """Through the host's loader, as it aligns a data set before it merges it with others."""
    from datasets import Dataset
    from llamafactory.data import loader
    from llamafactory.hparams import DataArguments

    data_args = DataArguments(template="qwen", streaming=streaming, overwrite_cache=True)
    dataset = Dataset.from_list(rows)
    training_args = SimpleNamespace(local_process_index=0)
    return loader.align_dataset(dataset.to_iterable_dataset() if streaming else dataset, attr, data_args, training_args)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("mix", ["concat", "interleave_under"])
def test_data_sets_of_any_form_stand_beside_each_other(streaming, mix):
    """What one has and another lacks (tools, system prompts, history) makes no other features."""
    from llamafactory.data.data_utils import merge_dataset
    from llamafactory.hparams import DataArguments

    openai = openai_row([{"role": "user", "content": "Where?"}])
    sets = [
        ([GOOD], attributes()),
        ([{name: GOOD[name] for name in ("prompt", "long_prompt", "chosen", "rejected")}], attributes(columns={name: name for name in ("prompt", "long_prompt", "chosen", "rejected")})),
        ([GOOD | {"tools": [TOOL]}], attributes(columns=TOOLS)),
        ([GOOD | {"tools": None, "system": None}], attributes(columns=TOOLS)),
        ([TALK | {"tools": json.dumps([TOOL])}], attributes("sharegpt", TALK_TOOLS)),
        ([openai | {"tools": [TOOL]}], attributes("openai", TALK_TOOLS, tags=OPENAI_TAGS)),
        ([GOOD | {"rejected": ["There.", "Nowhere."]}], attributes()),
    ]  # fmt: skip
    alone = [list(aligned(rows, attr, streaming)) for rows, attr in sets]
    arguments = DataArguments(template="qwen", streaming=streaming, mix_strategy=mix)
    merged = merge_dataset([aligned(rows, attr, streaming) for rows, attr in sets], arguments, seed=0)
    merged, everything = list(merged), [row for rows in alone for row in rows]
    assert merged == everything[: len(merged)] and (len(merged) == len(sets) or mix != "concat")  # or one has ended
    for n, (rows, attr) in enumerate(sets):
        assert [converted(rows, attr, arguments)[name] == [alone[n][0][name]] for name in alone[n][0]]


KEYS = ["query", "response", "history", "system", "tools", "kto_tag", "chosen", "rejected", "prompt", "long_prompt", "messages"]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_column_is_named_whatever_key_maps_it(key, streaming):
    attr = attributes(columns=ALPACA | {key: "nowhere"})
    with pytest.raises(ValueError, match=r"^Dataset `rows` has no column `nowhere`; it has: prompt, "):
        list(aligned([GOOD], attr, streaming))


def test_all_long_prompts_equal_is_noticed():
    from datasets import Dataset

    from solopo_plugin.host.data import log_rows

    def said(rows):
        lines = []
        logger = SimpleNamespace(info_rank0=lambda text: None, warning_rank0=lines.append)
        tokenised = Dataset.from_list(processed(rows, host("qwen")))
        data_args = SimpleNamespace(cutoff_len=9, solopo_overlength="error")
        log_rows(tokenised, len(rows), data_args, False, logger)
        return lines

    same = GOOD | {"long_prompt": GOOD["prompt"]}
    (line,) = said([same, same])
    assert line.startswith("All long prompts of the training rows equal their short ones")
    assert said([same, GOOD]) == []


@pytest.mark.parametrize("longpo, both", [(False, False), (False, True), (True, True)])
def test_step_lengths_are_those_of_packed_rows(longpo, both):
    """Also of a data set that is a shuffled share of its table, and of rows whose prompts are equal."""
    from datasets import Dataset

    from solopo_plugin.data import step_lengths
    from solopo_plugin.packing import PackedCollator

    n = dict(
        short_prompt=[3, 4, 5, 6, 7], long_prompt=[11, 4, 13, 14, 15], chosen=[2, 3, 1, 5, 4], rejected=[1, 2, 6, 1, 3]
    )
    columns = {f"{part}_ids": [[1] * length for length in lengths] for part, lengths in n.items()}
    columns["rejected_ids"][1:3] = [[1, BETWEEN, 1, 1], [1, BETWEEN, 1, BETWEEN, 1, 1]]
    rows = Dataset.from_dict(columns | {"name": list("abcde"), "long_is_short": [False, True, False, False, False]})
    collator = PackedCollator(longpo=longpo, long_pair=both)
    for dataset in (rows, rows.select([4, 1, 2]), rows.train_test_split(test_size=2, seed=1)["train"]):
        lengths = [collator([row])["policy"]["input_ids"].shape[1] for row in dataset]
        assert step_lengths(dataset, longpo, both) == lengths
