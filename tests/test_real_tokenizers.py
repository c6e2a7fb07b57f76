"""Real tokenizers and chat templates: the trainer's prompt = the pipeline's = the model's own chat template.

Where the host's template writes another prompt than the model's own, docs/templates.md has it in its tables, which are
held here against what both write. The package of Llama 3.1 brings that model's vocabulary with the names and the
template of Llama 3; its own template, which adds `DATES`, comes from where those of Qwen3.5 and Gemma 4 do, of which no
package brings the tokenizer: Qwen3's and Gemma 3's stand in for it, so that texts are compared and not tokens.
"""

import copy
import json
import re
from functools import cache
from types import SimpleNamespace

import pytest
from conftest import ROOT
from real_tokenizers import real_template, real_tokenizer
from test_data import OPENAI_TAGS, SHAREGPT, attributes, processed

from solopo_plugin.data import RowError

pytestmark = pytest.mark.slow  # a network, 50 MB

PAGE = ROOT / "docs/templates.md"
# column of the page's tables -> package, the host's template, `enable_thinking`, what the model's own template is given
COLUMNS = {
    "`qwen3`": ("qwen3", "qwen3", True, {}),
    "`qwen3`, `enable_thinking: false`": ("qwen3", "qwen3", False, {"enable_thinking": False}),
    "`qwen3_nothink`": ("qwen3", "qwen3_nothink", True, {}),
    "`llama3`": ("llama3_1", "llama3", True, {}),
    "`gemma3`": ("gemma3", "gemma3", True, {}),
}
ALONE = {  # whose template comes by itself
    "Qwen3 2507, `qwen3_nothink`": ("qwen3", "qwen3_nothink", True, {"chat_template": "qwen3_instruct_2507"}),
    "Llama 3.1, `llama3`": ("llama3_1", "llama3", True, {"chat_template": "llama3_1"}),
    "Qwen3.5, `qwen3_5`": ("qwen3", "qwen3_5", True, {"chat_template": "qwen3_5_think"}),
    "Qwen3.5, `enable_thinking: false`": (
        "qwen3", "qwen3_5", False, {"chat_template": "qwen3_5_think", "enable_thinking": False}),
    "Gemma 4, `gemma4`": ("gemma3", "gemma4", True, {"chat_template": "gemma4_v5", "enable_thinking": True}),
}  # fmt: skip
OPENED = {"Qwen3.5, `qwen3_5`": "<think>\n"}  # how the model's own prompt ends; the response's first tokens in a row
THOUGHT = "<think>\nIt says so.\n</think>\n\n"
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"  # of Llama 3.1's own template, always
TOOL = {
    "name": "look_up",
    "description": "Tell what is known of a town.",
    "parameters": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
}
CALL = {"name": "look_up", "arguments": {"name": "Rømø"}}


def said(*turns: str) -> list[dict]:
    """Turns of user and assistant in turn; one with "system: ", "call: " or "result: " before it is that."""
    messages = []
    for n, text in enumerate(turns):
        role, _, rest = text.partition(": ")
        known = role in ("system", "call", "result")
        usual = "user" if (n - (turns[0][:8] == "system: ")) % 2 == 0 else "assistant"
        messages.append({"role": role if known else usual, "content": rest if known else text})
    return messages


CASES = {
    "one question": said("Where?"),
    "system prompt": said("system: Answer briefly.", "Where?"),
    "several turns": said("system: Answer briefly.", "Hello", "Hi.", "Where?"),
    "blanks around a text": said(" Where?\n"),
    "an empty system prompt": said("system: ", "Where?"),
    "`[]` as tools": said("Where?"),
    "a thought in an earlier answer": said("Hello", f"{THOUGHT}Hi.", "Where?"),
    "an earlier thought without its line breaks": said("Hello", "<think>Well.</think>Hi.", "Where?"),
    "tools": said("Where?"),
    "tools, system prompt": said("system: Answer briefly.", "Where?"),
    "tools, call, result": said("system: Answer briefly.", "Where?", "call: ", "result: An island."),
    "tools, call, result, question": said(
        "system: Answer briefly.", "Where?", "call: ", "result: An island.", "There.", "And?"
    ),
    "tools, thought, call, result": said("system: Answer briefly.", "Where?", f"call: {THOUGHT}", "result: An island."),
}


@cache
def tokenizer_of(package: str):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(real_tokenizer(package))


@cache
def loaded(package: str, template: str) -> tuple:
    from solopo_plugin.host.template import load_template

    return load_template(real_tokenizer(package), template)  # a few seconds, of Gemma's more


def host_of(package: str, template: str, thinking: bool, system: str | None = None):
    """The host's tokenizer and template; `default_system` and `enable_thinking` are all that the host would change."""
    from llamafactory.hparams import DataArguments

    tokenizer, found = loaded(package, template)
    found = copy.copy(found)
    found.enable_thinking, found.default_system = thinking, system or found.default_system
    arguments = DataArguments(template=template, enable_thinking=thinking, cutoff_len=10**9)
    return SimpleNamespace(tokenizer=tokenizer, template=found, data_args=arguments)


def trained(model, messages: list[dict], tools: bool, response: str = "There.", none: str = "") -> dict:
    """The tokens that a row of the messages gets, through the host's converter and our processor."""
    for message in (messages := copy.deepcopy(messages)):
        if message["role"] == "call":
            message |= {"role": "function", "content": message["content"] + json.dumps(CALL, ensure_ascii=False)}
        message["role"] = {"result": "tool"}.get(message["role"], message["role"])
    row = dict(messages=messages, long_messages=messages, tools=json.dumps([TOOL]) if tools else none,
               chosen={"role": "assistant", "content": response},
               rejected={"role": "assistant", "content": "Nowhere."})  # fmt: skip
    columns = SHAREGPT | {"tools": "tools"}
    (ids,) = processed([row], model, attributes("sharegpt", columns, tags=OPENAI_TAGS))
    assert ids["short_prompt_ids"] == ids["long_prompt_ids"]
    return ids


def own(package: str, messages: list[dict], tools: bool, **keys) -> str:
    """The text of the model's own chat template, up to where the answer begins."""
    for message in (messages := copy.deepcopy(messages)):
        if message["role"] == "call":
            message |= {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]}
        message["role"] = {"result": "tool"}.get(message["role"], message["role"])
    tools = [{"type": "function", "function": TOOL}] if tools else None
    keys = {"add_generation_prompt": True, **keys}
    if "chat_template" in keys:
        keys["chat_template"] = real_template(keys["chat_template"])
    return tokenizer_of(package).apply_chat_template(messages, tools=tools, tokenize=False, **keys)


# how the model's own prompt follows from the host's, by the words of the table
HEADER = "<|start_header_id|>system<|end_header_id|>\n\n<|eot_id|>"
CALLED = '<tool_call>\n{"name": "look'
SYSTEM = HEADER.removesuffix("<|eot_id|>")  # of Llama
DIFFERENCES = {
    "equal": lambda host: host,
    "no system turn": lambda host: (
        host.replace("<|begin_of_text|>", f"<|begin_of_text|>{HEADER}")
        if HEADER[:9] in host
        else f"<|im_start|>system\n<|im_end|>\n{host}"
    ),
    "an empty system turn": lambda host: host.replace(HEADER, "").replace("<|im_start|>system\n<|im_end|>\n", ""),
    "no two line breaks": lambda host: host.replace("user\nWhere", "user\n\n\nWhere"),
    "two line breaks": lambda host: host.replace("user\n\n\nWhere", "user\nWhere"),
    "two line breaks more": lambda host: host.replace("system\n\n\n# Tools", "system\n# Tools"),
    "blanks stay": lambda host: host.replace(" Where?\n", "Where?"),
    "the thought stays": lambda host: host.replace("<think>Well.</think>", "").replace(THOUGHT, ""),
    "the thought goes": lambda host: host.replace(CALLED, THOUGHT + CALLED),
    "a line break less": lambda host: host.replace(CALLED, "\n" + CALLED).replace("<|think|>", "<|think|>\n"),
    "no dates": lambda host: (
        host.replace(SYSTEM, SYSTEM + DATES)
        if SYSTEM in host
        else host.replace("<|begin_of_text|>", f"<|begin_of_text|>{SYSTEM}{DATES}<|eot_id|>")
    ),
    "the host's system prompt": lambda host: host.replace("<|think|>You are a helpful assistant.", "<|think|>\n"),
}
OWN_WORDS = "the host's words"  # of tools that the model's own template does not know, or tells of in other words


def table() -> dict[tuple[str, str], str]:
    """The page's tables: (case, column) -> its cell."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if re.match(r"\| (case|" + "|".join(map(re.escape, CASES)) + r") \|", line)
    ]
    both, cells = (rows[: len(rows) // 2], rows[len(rows) // 2 :]), {}
    for columns, (head, *cases) in zip((COLUMNS, ALONE), both, strict=True):
        assert head == ["case", *columns] and [row[0] for row in cases] == list(CASES)
        cells |= {(row[0], column): cell for row in cases for column, cell in zip(columns, row[1:], strict=True)}
    return cells


@pytest.mark.parametrize("column", COLUMNS | ALONE)
@pytest.mark.parametrize("case", CASES)
def test_prompts_are_the_models_own_but_for_what_the_page_says(case, column):
    package, template, thinking, keys = (COLUMNS | ALONE)[column]
    messages, tools, told = CASES[case], case.startswith("tools"), table()[case, column]
    model = host_of(package, template, thinking)
    if told == "refused":
        with pytest.raises(RowError, match="the template cannot write turn 2"):
            trained(model, messages, tools)
        return
    ids = trained(model, messages, tools, none="[]" if "`[]`" in case else "")["short_prompt_ids"]
    host = model.tokenizer.decode(ids, skip_special_tokens=False)
    if told == OWN_WORDS:
        assert tools and TOOL["description"] in host
        if column in ALONE:
            assert TOOL["description"] in own(package, messages, tools, **keys) != host
        else:
            assert "tools" not in tokenizer_of(package).chat_template
        return
    expected = own(package, messages, tools, **keys)
    assert expected.endswith(opened := OPENED.get(column, ""))
    expected, changed = expected.removesuffix(opened), host
    for difference in told.split(", "):
        changed = DIFFERENCES[difference](changed)
    assert changed == expected
    assert (host == expected) == (told == "equal")
    if told == "equal":  # token by token, not only as a text
        assert ids == tokenizer_of(package).encode(expected, add_special_tokens=False)


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("system", [None, "Answer briefly."])
def test_the_pipelines_prompt_is_the_trainers(column, system):
    """As the pipeline asks for answers and the evaluation its questions: `encode_prompt`, with `default_system`."""
    from solopo_plugin.host.template import encode_prompt

    package, template, thinking, keys = COLUMNS[column]
    model = host_of(package, template, thinking, system)
    messages = [{"role": "system", "content": system}] * bool(system) + said("Where does Ida work?")
    ids = encode_prompt(model.tokenizer, model.template, "Where does Ida work?")
    assert ids == trained(host_of(package, template, thinking), messages, False)["short_prompt_ids"]
    assert ids == tokenizer_of(package).encode(own(package, messages, False, **keys), add_special_tokens=False)


@pytest.mark.parametrize("response", ["There.", f"{THOUGHT}There."])
@pytest.mark.parametrize("column", [name for name in COLUMNS if name != "`gemma3`"])
def test_a_whole_row_is_the_models_own_conversation(column, response):
    """Prompt and response behind each other; thinking off takes a thought away, and `qwen3_nothink` adds none."""
    package, template, thinking, _ = COLUMNS[column]
    model = host_of(package, template, thinking)
    row = trained(model, CASES["one question"], False, response)
    whole = model.tokenizer.decode(row["short_prompt_ids"] + row["chosen_ids"], skip_special_tokens=False)
    if template == "qwen3" and not thinking:
        response = "There."  # which the model's own template shows behind an empty thought, as the prompt ends
    turns = [*CASES["one question"], {"role": "assistant", "content": response}]
    expected = own(package, turns, False, add_generation_prompt=False)
    if (template, response) == ("qwen3_nothink", "There."):
        assert "<think>" not in whole  # as Qwen3's Instruct-2507 has it, which is another template
        expected = expected.replace("<think>\n\n</think>\n\n", "")
    assert whole == expected
    empty = "<think>\n\n</think>\n\n"
    chosen = model.tokenizer.decode(row["chosen_ids"], skip_special_tokens=False)
    assert chosen.startswith(empty) == (template == "qwen3" and thinking and response == "There.")


@pytest.mark.parametrize("system", ["", "Answer briefly."])
def test_llama_3_1s_own_prompt_is_had_by_a_system_prompt(system):
    """The page gives the key; Llama 3.1's template writes the dates into a system turn, whatever is asked."""
    assert f'default_system: {json.dumps(DATES)}' in PAGE.read_text(encoding="utf-8")  # fmt: skip
    from solopo_plugin.host.template import encode_prompt

    model = host_of("llama3_1", "llama3", True, DATES + system)
    ids = encode_prompt(model.tokenizer, model.template, "Where?")
    messages = [{"role": "system", "content": system}] * bool(system) + CASES["one question"]
    expected = own("llama3_1", messages, False, chat_template="llama3_1")
    assert ids == tokenizer_of("llama3_1").encode(expected, add_special_tokens=False) and DATES in expected


@pytest.mark.parametrize("case", CASES)
def test_llama_3_2s_template_is_3_1s_with_todays_date(case):
    messages, tools = CASES[case], case.startswith("tools")
    today, fixed = (own("llama3_2", messages, tools, **k) for k in ({}, {"date_string": "26 Jul 2024"}))
    assert today != fixed == own("llama3_1", messages, tools, chat_template="llama3_1")


def test_gemma_4s_own_prompt_is_had_by_a_line_break():
    """Where it thinks; where it does not the host's has the sign all the same, and an empty thought at the end."""
    assert 'default_system: "\\n"' in PAGE.read_text(encoding="utf-8")
    from solopo_plugin.host.template import encode_prompt

    for thinking in (True, False):
        model = host_of("gemma3", "gemma4", thinking, "\n")
        host = model.tokenizer.decode(encode_prompt(model.tokenizer, model.template, "Where?"))
        expected = own("gemma3", CASES["one question"], False, chat_template="gemma4_v5", enable_thinking=thinking)
        if not thinking:
            host = host.replace("<|turn>system\n<|think|>\n<turn|>\n", "").removesuffix("<|channel>thought\n<channel|>")
            assert "<|think|>" not in expected
        assert host == expected


@pytest.mark.parametrize("package, name", [("llama3_1", "llama3"), ("llama3_2", "llama3_2"), ("gemma3", "gemma3")])
def test_two_packages_bring_the_same_template(package, name):
    assert tokenizer_of(package).chat_template == real_template(name)


def test_the_hosts_tools_for_llama_hold_todays_date(monkeypatch):
    """So a prompt with tools is another one tomorrow."""
    import datetime

    from llamafactory.data import tool_utils

    model, prompts = host_of("llama3_1", "llama3", True), []
    for day in (1, 2):

        class Day(datetime.datetime):
            @classmethod
            def now(cls, day=day):
                return cls(2026, 1, day)

        monkeypatch.setattr(tool_utils, "datetime", Day)
        ids = trained(model, CASES["tools"], True)["short_prompt_ids"]
        prompts.append(model.tokenizer.decode(ids, skip_special_tokens=False))
    assert prompts[0].replace("01 Jan 2026", "02 Jan 2026") == prompts[1] != prompts[0]


@pytest.mark.parametrize("package", ["qwen3", "llama3_1", "gemma3"])
def test_tokenizers_are_the_ones_that_the_page_names(package):
    size = {"qwen3": 151669, "llama3_1": 128256, "gemma3": 262145}[package]
    assert len(tokenizer_of(package)) == size
    assert f"{size:,}" in PAGE.read_text(encoding="utf-8")


def test_qwen3_5s_tools_are_told_in_other_words_than_qwen3s():
    from llamafactory.data.template import TEMPLATES

    new, old = TEMPLATES["qwen3_5"], TEMPLATES["qwen3"]
    for part in ("format_user", "format_assistant", "format_system", "format_observation", "thought_words"):
        assert getattr(new, part) == getattr(old, part), part
    assert new.format_tools != old.format_tools
    model, messages = host_of("qwen3", "qwen3_5", True), CASES["tools, system prompt"]
    host = model.tokenizer.decode(trained(model, messages, True)["short_prompt_ids"])
    theirs = own("qwen3", messages, True, chat_template="qwen3_5_think")
    assert ['"type": "function"' in text for text in (host, theirs)] == [False, True]
    assert [text.index("briefly") < text.index("# Tools") for text in (host, theirs)] == [True, False]
    assert TEMPLATES["gemma4"].thought_words == ("<|channel>thought\n", "<channel|>")
