"""Seam 2 (docs/seams.md): `llamafactory.data` learns the long column and the rows of `stage: solopo`."""

import errno
import json
import os
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

from pyarrow.compute import list_value_length, mean

from .. import __version__
from ..data import COLUMNS, RESPONSES, Aligned, RowError, build_row, check_text, expect, fits, refuse_equal, rejected_of
from ..qa import entries
from .template import encode_turn
from .versions import wrap

LONG_COLUMN = {"alpaca": "long_prompt", "sharegpt": "long_messages", "openai": "long_messages"}
IGNORED = "which the host's converter ignores there; give a call as the JSON text of a message of `function_tag`."
OTHER_NAMES = "for other names set `tags` in dataset_info.json, docs/data.md"
ALIGNED = tuple(f"_{field}" for field in Aligned._fields)  # columns, named as the host names them
TURNS = ("_prompt", "_long_prompt", "_response")
SHOWN = 400  # characters of a text of the example row
TYPED = ("Couldn't cast array", "Failed to parse string", "new columns")  # what `datasets` says behind its first 10 MB
WRITTEN = "detailed thinking off"  # by the host's openai converter


def apply(module) -> None:
    """Patch `llamafactory.data.parser` or `llamafactory.data.loader` right after its import."""
    if module.__name__.endswith(".parser"):
        wrap((module.DatasetAttr, "join", ("self", "attr"), _joining_long))
        module.DatasetAttr.long_prompt = module.DatasetAttr.long_messages = None
        return
    chosen_by = ("data_args", "stage", "template", "tokenizer", "processor", "do_generate")
    arguments = ("dataset", "data_args", "training_args", "stage", "template", "tokenizer", "processor", "is_eval")
    aligned = ("dataset", "dataset_attr", "data_args", "training_args")
    merged = ("dataset_names", "model_args", "data_args", "training_args", "stage", "return_dict")
    wrap(
        (module, "get_dataset_list", ("dataset_names", "dataset_dir"), _naming),
        (module, "_get_merged_dataset", merged, partial(_merging, module)),
        (module, "_load_single_dataset", ("dataset_attr", *merged[1:4]), _loading),
        (module, "align_dataset", aligned, partial(_aligning, module.logger)),
        (module, "_get_dataset_processor", chosen_by, _processing),
        (module, "_get_preprocessed_dataset", arguments, partial(_counting, module.logger)),
    )


def _joining_long(join, self, attr):
    join(self, attr)
    for column in ("long_prompt", "long_messages"):
        if column in attr.get("columns", {}):  # else nothing: other data sets keep the fingerprint of their cache
            setattr(self, column, attr["columns"][column])


def _naming(get_dataset_list, dataset_names, dataset_dir):
    attrs = get_dataset_list(dataset_names, dataset_dir)
    for name, attr in zip(dataset_names or [], attrs, strict=True):
        if attr.long_prompt or attr.long_messages:
            attr.entry = name
    return attrs


def check_stage(name: str, attr: Any, stage: str) -> None:
    """Refuse a data set that is not made for the stage, and say how to register it."""
    if fault := _misfit(attr, stage):
        raise ValueError(f"Dataset `{name}`{fault}")


def _misfit(attr: Any, stage: str) -> str | None:
    long = attr.long_prompt or attr.long_messages
    if stage != "solopo":
        return long and (
            f" is registered for `stage: solopo` (it has a long column, `{long}`). For another stage, register the "
            "same file under a second name without that column in dataset_info.json."
        )
    if attr.formatting not in [*LONG_COLUMN]:
        return f": `formatting` must be one of {', '.join(LONG_COLUMN)}; got {attr.formatting!r}."
    column = LONG_COLUMN[attr.formatting]
    if not long or not getattr(attr, column):
        return (
            " has no long context for `stage: solopo`: under `columns` in dataset_info.json map "
            f"`{column}` (formatting `{attr.formatting}`) to the column that holds the long prompt, and "
            f"`{column.removeprefix('long_')}` to one with its evidence and question alone."
        )
    if attr.ranking is not True:
        return ' needs `"ranking": true` in dataset_info.json for `stage: solopo`.'
    columns = ("messages" if column == "long_messages" else "prompt", "chosen", "rejected")
    tags = ("role_tag", "content_tag", "user_tag", "assistant_tag") if column == "long_messages" else ()
    for needed in (*columns, *tags):
        if not getattr(attr, needed):
            return f" must map `{needed}` under `{'columns' if needed in columns else 'tags'}` in dataset_info.json."
    if attr.chosen == attr.rejected:
        return f" maps `chosen` and `rejected` to one column, `{attr.chosen}`; correct `columns` in dataset_info.json."
    unseen = attr.images or attr.videos or attr.audios
    return " maps images, videos or audios; `stage: solopo` is for text only." if unseen else None


def _merging(loader, get_merged_dataset, dataset_names, model_args, data_args, training_args, stage, return_dict=False):
    attrs = loader.get_dataset_list(dataset_names, data_args.dataset_dir)
    for name, attr in zip(dataset_names or [], attrs, strict=True):
        check_stage(name, attr, stage)
        if stage == "solopo" and dataset_names.count(name) > 1:  # the host keeps them by name
            raise ValueError(f"Dataset `{name}` is named twice and counts once; register it under a second name, too.")
    # to the host our rows are ranking rows
    asked = "rm" if stage == "solopo" else stage
    return get_merged_dataset(dataset_names, model_args, data_args, training_args, asked, return_dict)


def _loading(load_single_dataset, dataset_attr, model_args, data_args, training_args):
    from datasets import config, exceptions

    try:
        return load_single_dataset(dataset_attr, model_args, data_args, training_args)
    except (exceptions.DatasetsError, OSError, ValueError) as error:
        entry, said = getattr(dataset_attr, "entry", None), error.__cause__ or error
        if entry is None or str(error).startswith((f"{entry}[", f"Dataset `{entry}`")):
            raise  # another stage's, or a sentence of ours
        if errno.ENOSPC in (getattr(error, "errno", None), getattr(said, "errno", None)):
            raise  # a full disk is no fault of the data set
        told = str(said).partition("\n\nThe above exception")[0]
        reason = told.splitlines()[-1] if "Traceback" in told else " ".join(told.split())  # the first, of a worker
        cache, name = Path(config.HF_DATASETS_CACHE).absolute(), getattr(said, "filename", None)
        if name and ((file := Path(name).absolute()) in cache.parents or file.is_relative_to(cache)):
            key = "HF_DATASETS_CACHE" if "HF_DATASETS_CACHE" in os.environ else "HF_HOME"  # the former wins
            raise ValueError(f"{name} cannot be written ({reason}); set {key} to a folder that can be.") from error
        if any(isinstance(e, UnicodeDecodeError) for e in (said, said.__context__)):
            reason = "the file is no text in UTF-8; save it so, or give it the ending of its format (.parquet, ...)"
        reason = reason.rstrip(".") or type(said).__name__
        if any(words in reason for words in TYPED):
            reason += "; the first 10 MB of JSON lines name columns and types: save it as parquet or one .json array"
        raise ValueError(f"Dataset `{entry}` cannot be read: {reason}.") from error


class LongConverter:
    """Run the host's converter of the data set's formatting twice: for the short prompt and for the long one."""

    def __init__(self, attr, data_args, get_dataset_converter):
        self.attr, self.version = attr, __version__  # in the fingerprint: a new release does not reuse an old map cache
        self.short = get_dataset_converter(attr.formatting, attr, data_args)
        long_attr = copy(attr)
        long_attr.prompt, long_attr.messages = attr.long_prompt, attr.long_messages
        self.long = get_dataset_converter(attr.formatting, long_attr, data_args)
        self.prompt_column = attr.prompt if attr.formatting == "alpaca" else attr.messages
        self.long_column = getattr(attr, LONG_COLUMN[attr.formatting])

    def __call__(self, example: dict[str, Any], index: int) -> dict[str, Any]:
        """Return a row of the file as the processor takes it; what the converters have made of it is checked too."""
        attr, name = self.attr, f"{self.attr.entry}[{index}]"
        for column in filter(None, (getattr(attr, key) for key in entries.COLUMNS)):
            if column not in example:
                raise ValueError(
                    f"Dataset `{attr.entry}` has no column `{column}`; it has: {', '.join(example)}. "
                    "Correct `columns` in dataset_info.json."
                )
        responses = self.responses(name, example)
        self.check_read(name, example, responses)
        first, *others = (example | {attr.rejected: response} for response in [*responses.values()][1:])
        short, long = self.short(first), self.long(first)
        for other in others:
            short["_response"] += self.short(other)["_response"][1:]
        if attr.formatting != "alpaca":
            for column, side in ((attr.messages, short), (self.long_column, long)):
                self.check_turns(name, column, example[column], side["_prompt"])
        turns = dict(zip(responses, short["_response"], strict=True))
        for column, response in turns.items():
            check_text(name, column, response["content"])
        refuse_equal(name, turns, "columns `{}` and `{}` hold the same text")
        # where there is no system prompt the host's openai converter writes one
        none = ("", None, WRITTEN) if attr.formatting == "openai" else ("", None)
        if (short["_system"] in none) != (long["_system"] in none):
            raise RowError(f"{name}: only one of `{self.prompt_column}` and `{self.long_column}` has a system prompt.")
        tools = short["_tools"]
        if isinstance(tools, list | dict):
            tools = json.dumps(tools, ensure_ascii=False)  # as the host's openai converter does
        expect(isinstance(tools, str | None), f"{name}: column `{attr.tools}`", "JSON text", tools)
        short |= {"_tools": tools, "_long_prompt": long["_prompt"], "_long_system": long["_system"], "_name": name}
        return {k: v for k, v in short.items() if k not in ("_images", "_videos", "_audios")}

    def responses(self, name: str, example: dict[str, Any]) -> dict[str, Any]:
        """Return the chosen and the rejected response, or each of a list of them, by what messages call its column."""
        attr, rejected = self.attr, example[self.attr.rejected]
        if not isinstance(rejected, list):
            return {attr.chosen: example[attr.chosen], attr.rejected: rejected}
        expect(len(rejected) > 0, f"{name}: column `{attr.rejected}`", "a response or a list of at least one", rejected)
        return {attr.chosen: example[attr.chosen]} | {f"{attr.rejected}[{m}]": one for m, one in enumerate(rejected)}

    def check_read(self, name: str, example: dict[str, Any], responses: dict[str, Any]) -> None:
        """Refuse what the host's converters would leave out in silence, or crash on."""
        attr = self.attr
        if attr.kto_tag and isinstance(example[attr.kto_tag], bool):
            raise RowError(
                f"{name}: column `{attr.kto_tag}`, mapped as `kto_tag`, is {example[attr.kto_tag]}, for which the host "
                "leaves out `chosen` and `rejected`; remove `kto_tag` from `columns` in dataset_info.json."
            )
        for column in filter(None, (attr.query, attr.system)):
            text = example[column]
            expect(isinstance(text, str | None), f"{name}: column `{column}`", "a string or null", text)
        if attr.tools and (changed := changed_by_loading(example[attr.tools])):
            raise RowError(f"{name}: column `{attr.tools}` {changed}; give the tools as JSON text.")
        if attr.formatting != "alpaca":
            for column in (attr.messages, self.long_column):
                self.check_messages(name, column, example[column])
                begins = bool(attr.system_tag) and example[column][0][attr.role_tag] == attr.system_tag
                if begins and attr.system and example[attr.system]:
                    raise RowError(
                        f"{name}: column `{column}` begins with a system prompt, for which the host ignores column "
                        f"`{attr.system}`, {example[attr.system]!r:.60}; empty one of the two."
                    )
            for column, response in responses.items():
                self.check_response(name, column, response)
            return
        for column, text in ({c: example[c] for c in (attr.prompt, self.long_column)} | responses).items():
            check_text(name, column, text)
        history = (example[attr.history] if attr.history else None) or []
        for turn in history if isinstance(history, list) else [history]:
            good = isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
            expect(good, f"{name}: column `{attr.history}`", "a list of [question, answer]", turn)

    def check_messages(self, name: str, column: str, messages: Any) -> None:
        """Refuse a conversation that a converter would crash on, or would read only in part."""
        attr, openai = self.attr, self.attr.formatting == "openai"
        tags = (attr.user_tag, attr.assistant_tag, attr.observation_tag, attr.function_tag, attr.system_tag)
        known = [tag for tag in tags if tag]
        good = isinstance(messages, list) and len(messages) > 0
        expect(good, f"{name}: column `{column}`", "a list of messages", messages)
        for n, message in enumerate(messages, 1):
            turn = f"{name}: turn {n} of column `{column}`"
            good = isinstance(message, dict) and {attr.role_tag, attr.content_tag} <= message.keys()
            hint = f" ({OTHER_NAMES})" if isinstance(message, dict) and len(message) > 1 else ""
            expect(good, turn, f"a message with `{attr.role_tag}` and `{attr.content_tag}`{hint}", message)
            role, content = message[attr.role_tag], message[attr.content_tag]
            if role not in known:
                raise RowError(f"{turn} has `{attr.role_tag}` {role!r}; known are {', '.join(known)} ({OTHER_NAMES}).")
            turn = f"{name}: turn {n} (`{role}`) of column `{column}`"
            if role == attr.system_tag:
                expect(isinstance(content, str | None), turn, "a string or null", content)
            elif openai and role == attr.observation_tag:
                expect(isinstance(content, str), turn, "a string", content)
            if message.get("tool_calls"):
                self.check_calls(turn, role, message)
        if openai and role == attr.observation_tag:
            raise RowError(
                f"{turn} is the last, and the host's openai converter drops a result without an answer; register the "
                "rows with `formatting: sharegpt`."
            )

    def check_calls(self, turn: str, role: str, message: dict) -> None:
        """Refuse calls of tools that a converter would skip, crash on or quote, or that loading has changed."""
        attr, calls, content = self.attr, message["tool_calls"], message[self.attr.content_tag]
        if attr.formatting != "openai" or role not in (attr.assistant_tag, attr.function_tag):
            raise RowError(f"{turn} has `tool_calls`, {IGNORED}")
        # which makes the call a result, or a system prompt
        if attr.function_tag in (attr.observation_tag, attr.system_tag):
            raise RowError(f"{turn} has `tool_calls`, for which `tags` in dataset_info.json need a `function_tag`.")
        entries = calls if isinstance(calls, list) else [None]
        functions: list[Any] = [entry.get("function") if isinstance(entry, dict) else None for entry in entries]
        good = all(isinstance(f, dict) and f.get("name") and "arguments" in f for f in functions)
        expect(good, f"{turn}: `tool_calls`", "a list of `function` with `name` and `arguments`", calls)
        for given in (f["arguments"] for f in functions):
            expect(isinstance(given, dict), f"{turn}: `arguments`", "an object (the host would quote JSON text)", given)
        if content and str(content).strip():
            raise RowError(
                f"{turn} has text beside `tool_calls`, which the host's openai converter drops, {content!r:.60}; "
                "give both as a message of `function_tag`: the text, <tool_call>, the calls as JSON list, </tool_call>."
            )
        if changed := changed_by_loading([function["arguments"] for function in functions]):
            raise RowError(f"{turn} {changed}; give the call as the JSON text of a message of `function_tag`.")

    def check_response(self, name: str, column: str, response: Any) -> None:
        """Refuse a response that a converter would crash on, or would read only in part."""
        attr, what = self.attr, f"{name}: column `{column}`"
        good = isinstance(response, dict) and attr.content_tag in response
        good = good and response.get(attr.role_tag) in filter(None, (attr.assistant_tag, attr.function_tag))
        needed = f"one message with `{attr.role_tag}` {attr.assistant_tag!r} and `{attr.content_tag}`"
        expect(good, what, needed, response)
        if response.get("tool_calls"):
            raise RowError(f"{what} has `tool_calls`, {IGNORED}")

    def check_turns(self, name: str, column: str, messages: list[dict], prompt: list[dict]) -> None:
        """Refuse a converted conversation that is not one, and name the message of the file."""
        attr = self.attr
        turns = [(n, message[attr.role_tag]) for n, message in enumerate(messages, 1)]
        if attr.system_tag and turns[0][1] == attr.system_tag:
            turns = turns[1:]
        if attr.formatting == "openai":  # results in a row are one turn
            after = [*turns, (0, None)][1:]
            turns = [t for t, u in zip(turns, after, strict=True) if not t[1] == u[1] == attr.observation_tag]
        if len(prompt) % 2 != 1:
            sides = {attr.user_tag: 0, attr.observation_tag: 0, attr.assistant_tag: 1, attr.function_tag: 1}
            last = (len(messages), messages[-1][attr.role_tag])
            n, role = next((turn for i, turn in enumerate(turns) if sides.get(turn[1]) != i % 2), last)
            raise RowError(
                f"{name}: column `{column}` must be turns that begin and end with the user's, in turn with the "
                f"assistant's; turn {n} of {len(messages)} is `{role}`."
            )
        for (n, role), turn in zip(turns, prompt, strict=True):
            blank = turn["role"] == "observation"  # a tool may have found nothing
            check_text(name, column, turn["content"], f"turn {n} (`{role}`) of ", blank)


def changed_by_loading(value: Any) -> str | None:
    """Say what anywhere in a value is not the file's but loading's; None if nothing can be told."""
    if isinstance(value, dict):
        filled = "holds null, which loading fills in for keys of other rows"
        return filled if None in value.values() else changed_by_loading([*value.values()])
    if isinstance(value, list):
        return next(filter(None, map(changed_by_loading, value)), None)
    return "holds a date, which loading takes for a time" if hasattr(value, "isoformat") else None


def _aligning(logger, align_dataset, dataset, dataset_attr, data_args, training_args):
    if not (dataset_attr.long_prompt or dataset_attr.long_messages):
        refuse_lists(dataset, dataset_attr)
        return align_dataset(dataset, dataset_attr, data_args, training_args)
    from datasets import Features, Value
    from llamafactory.data.converter import get_dataset_converter

    if dataset_attr.formatting == "openai":
        logger.warning_rank0(
            f"Dataset `{dataset_attr.entry}`: in rows without tools the host's openai converter appends "
            f"`{WRITTEN}` to the system prompt, and where there is none writes it as one; without it register "
            "the rows with `formatting: sharegpt`."
        )
    converter = LongConverter(dataset_attr, data_args, get_dataset_converter)
    if (first := next(iter(dataset), None)) is None:
        stream = "with `streaming: true` a local file also needs `dataloader_num_workers: 1` or more"
        given = f"`num_samples: {dataset_attr.num_samples}`, `max_samples: {data_args.max_samples}` leave none"
        raise ValueError(f"Dataset `{dataset_attr.entry}` has no rows; {stream if data_args.streaming else given}.")
    if data_args.streaming and (n := dataset_attr.num_samples) is not None:
        raise ValueError(f"Dataset `{dataset_attr.entry}`: `num_samples: {n}` does nothing in a stream; remove it.")
    turns = [{"role": Value("string"), "content": Value("string")}]
    # given, not guessed from the rows, so that they are those of any other data set
    features = Features({name: turns if name in TURNS else Value("string") for name in ALIGNED})
    kwargs = dict(with_indices=True, remove_columns=list(first), features=features)
    if not data_args.streaming:
        kwargs |= dict(num_proc=data_args.preprocessing_num_workers, desc="Converting format of dataset")
        kwargs["load_from_cache_file"] = not data_args.overwrite_cache or training_args.local_process_index != 0
    return dataset.map(converter, **kwargs)


def refuse_lists(dataset, attr) -> None:
    """Refuse several rejected responses in another stage, which would drop every such row."""
    if attr.ranking and isinstance(next(iter(dataset), {}).get(attr.rejected), list):
        raise ValueError(
            f"{attr.dataset_name}: column `{attr.rejected}`, mapped as `rejected`, holds lists, of which only "
            "`stage: solopo` trains on all; for another stage map a column with one response."
        )


class SoloDatasetProcessor:
    """Tokenise aligned rows (see `solopo_plugin.data`); the host calls it as one of its processors."""

    def __init__(self, template, tokenizer, processor, data_args):
        self.template, self.tokenizer, self.version = template, tokenizer, (__version__, COLUMNS)
        self.cutoff_len, self.overlength = data_args.cutoff_len, data_args.solopo_overlength
        ends = () if tokenizer.split_special_tokens else (tokenizer.bos_token, tokenizer.eos_token)
        self.markers = [*filter(None, ends), *template.stop_words]  # hashed by `datasets`, as all here

    def preprocess_dataset(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Return a batch of aligned rows as a batch of tokenised rows; over-long rows raise or are left out."""
        encode = partial(encode_turn, self.tokenizer, self.template)
        aligned = zip(*(examples[column] for column in ALIGNED), strict=True)
        rows = (build_row(Aligned(*values), encode, self.markers) for values in aligned)
        kept = [row for row in rows if fits(row, self.cutoff_len, self.overlength)]
        return {column: [row[column] for row in kept] for column in COLUMNS}

    def print_data_example(self, example: dict[str, Any]) -> None:
        """Show the first row as the model sees it, a line for each part, long ones without their middle."""
        print(f"row: {example['name']}")
        parts = [(name, example[f"{name}_ids"]) for name in ("short_prompt", "long_prompt", "chosen")]
        for name, ids in parts + [("rejected", ids) for ids in rejected_of(example)]:
            text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            text = text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} [...] {text[-SHOWN // 2 :]}"
            print(f"{name} ({len(ids)} tokens): {text!r}")


def _processing(get_dataset_processor, data_args, stage, template, tokenizer, processor, do_generate=False):
    if stage == "solopo":
        return SoloDatasetProcessor(template, tokenizer, processor, data_args)
    return get_dataset_processor(data_args, stage, template, tokenizer, processor, do_generate)


def _counting(
    logger, preprocess, dataset, data_args, training_args, stage, template, tokenizer, processor=None, is_eval=False
):
    args = (dataset, data_args, training_args, stage, template, tokenizer, processor, is_eval)
    if stage != "solopo" or dataset is None or data_args.streaming:
        return preprocess(*args)
    try:
        rows = preprocess(*args)
    except RuntimeError as error:
        if "Cannot find valid samples" not in str(error):
            raise
        rows = []  # the host's word for "nothing is left", on the rank that shows an example
    if len(rows) == 0:
        raise ValueError(
            f"All {len(dataset)} rows are longer than `cutoff_len: {data_args.cutoff_len}` and were dropped; "
            "raise `cutoff_len`."
        )
    log_rows(rows, len(dataset), data_args, is_eval, logger)
    warn_of_empty_thoughts(rows, template, tokenizer, is_eval, logger)
    return rows


def log_rows(rows, n_before: int, data_args, is_eval: bool, logger) -> None:
    """Log how many rows there are, how many were dropped, and how long short and long prompts are."""
    lengths = (list_value_length(rows.data.column(f"{side}_prompt_ids")) for side in ("short", "long"))
    short, long = (mean(column).as_py() for column in lengths)
    split = "evaluation" if is_eval else "training"
    logger.info_rank0(
        f"SoLoPO {split} rows: {len(rows)}; dropped by `solopo_overlength: {data_args.solopo_overlength}` at "
        f"`cutoff_len: {data_args.cutoff_len}`: {n_before - len(rows)}; mean prompt tokens: short {short:.0f}, "
        f"long {long:.0f} (compression rate {short / long:.2f})."
    )
    if all(rows["long_is_short"]):
        logger.warning_rank0(
            f"All long prompts of the {split} rows equal their short ones: is the long column the right one?"
        )
    elif long < short:
        logger.warning_rank0(f"The long prompts of the {split} rows are the shorter ones: are the columns swapped?")


def warn_of_empty_thoughts(rows, template, tokenizer, is_eval: bool, logger) -> None:
    """Warn of responses without a thought before which a thinking template trains an empty one."""
    from llamafactory.data.template import ReasoningTemplate

    if not (isinstance(template, ReasoningTemplate) and template.enable_thinking):
        return
    empty = template.get_thought_word_ids(tokenizer)
    pairs = rows.select_columns([f"{name}_ids" for name in RESPONSES])
    responses = [ids for row in pairs for ids in (row["chosen_ids"], *rejected_of(row))]
    if n := sum(ids[: len(empty)] == empty for ids in responses):
        logger.warning_rank0(
            f"{n} of the {len(responses)} responses of the {'evaluation' if is_eval else 'training'} rows have no "
            "thought, and `enable_thinking: true` trains them with an empty one in front: set `enable_thinking: "
            "false`, which ends the prompt with it, unless the model shall choose not to think (docs/templates.md)."
        )
