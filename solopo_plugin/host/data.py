"""Seam 2: data. `llamafactory.data` learns the `long_prompt` / `long_messages` column and the rows of `stage: solopo`.

What: `DatasetAttr.join` keeps two more columns; five functions of the loader are wrapped, each only where the stage is
`solopo` or the data set has a long column. Why: the host copies only the columns it knows, picks converter and
processor by stage, and its pairwise path drops every other column and truncates prompts at the end. Host: 0.9.5.
"""

from copy import copy
from functools import wraps
from typing import Any

from pyarrow.compute import list_value_length, mean

from .. import __version__
from ..data import COLUMNS, RowError, build_row, check_text, fits
from .template import encode_turn
from .versions import expect_signature

LONG_COLUMN = {"alpaca": "long_prompt", "sharegpt": "long_messages", "openai": "long_messages"}


def apply(module) -> None:
    """Patch `llamafactory.data.parser` or `llamafactory.data.loader` right after its import."""
    if module.__name__.endswith(".parser"):
        expect_signature(module.DatasetAttr, "join", ("self", "attr"))
        module.DatasetAttr.long_prompt = module.DatasetAttr.long_messages = None
        module.DatasetAttr.join = _joining_long(module.DatasetAttr.join)
        return
    expect_signature(module, "get_dataset_list", ("dataset_names", "dataset_dir"))
    expect_signature(module, "align_dataset", ("dataset", "dataset_attr", "data_args", "training_args"))
    merged = ("dataset_names", "model_args", "data_args", "training_args", "stage", "return_dict")
    expect_signature(module, "_get_merged_dataset", merged)
    expect_signature(
        module, "_get_dataset_processor", ("data_args", "stage", "template", "tokenizer", "processor", "do_generate")
    )
    preprocessed = ("dataset", "data_args", "training_args", "stage", "template", "tokenizer", "processor", "is_eval")
    expect_signature(module, "_get_preprocessed_dataset", preprocessed)
    for name, wrap in {
        "get_dataset_list": _naming,
        "align_dataset": _aligning,
        "_get_merged_dataset": _merging,
        "_get_dataset_processor": _processing,
        "_get_preprocessed_dataset": _counting,
    }.items():
        setattr(module, name, wraps(getattr(module, name))(wrap(getattr(module, name), module)))


def _joining_long(join):
    @wraps(join)
    def wrapper(self, attr):
        join(self, attr)
        for column in ("long_prompt", "long_messages"):
            if column in attr.get("columns", {}):  # else nothing: other data sets keep the fingerprint of their cache
                setattr(self, column, attr["columns"][column])

    return wrapper


def _naming(get_dataset_list, loader):
    def wrapper(dataset_names, dataset_dir):
        attrs = get_dataset_list(dataset_names, dataset_dir)
        for name, attr in zip(dataset_names or [], attrs, strict=True):
            if attr.long_prompt or attr.long_messages:
                attr.entry = name
        return attrs

    return wrapper


def check_stage(name: str, attr: Any, stage: str) -> None:
    """Refuse a data set that is not made for the stage, and say how to register it."""
    long = attr.long_prompt or attr.long_messages
    if stage != "solopo":
        if long:
            raise ValueError(
                f"Dataset `{name}` is registered for `stage: solopo` (it has a long column, `{long}`). "
                "For another stage, register the same file under a second name without that column in "
                "dataset_info.json."
            )
        return
    column = LONG_COLUMN.get(attr.formatting, "long_prompt")  # an unknown formatting is the host's to refuse
    if not long or not getattr(attr, column):
        raise ValueError(
            f"Dataset `{name}` has no long context for `stage: solopo`: under `columns` in dataset_info.json map "
            f"`{column}` (formatting `{attr.formatting}`) to the column that holds the long prompt."
        )
    if attr.ranking is not True:
        raise ValueError(f'Dataset `{name}` needs `"ranking": true` in dataset_info.json for `stage: solopo`.')
    prompt = "prompt" if column == "long_prompt" else "messages"
    for needed in (prompt, "chosen", "rejected"):
        if not getattr(attr, needed):
            raise ValueError(f"Dataset `{name}` must map `{needed}` under `columns` in dataset_info.json.")
    if attr.images or attr.videos or attr.audios:
        raise ValueError(f"Dataset `{name}` maps images, videos or audios; `stage: solopo` is for text only.")


def _merging(get_merged_dataset, loader):
    def wrapper(dataset_names, model_args, data_args, training_args, stage, return_dict=False):
        attrs = loader.get_dataset_list(dataset_names, data_args.dataset_dir)
        for name, attr in zip(dataset_names or [], attrs, strict=True):
            check_stage(name, attr, stage)
        stage = "rm" if stage == "solopo" else stage  # to the host our rows are ranking rows
        return get_merged_dataset(dataset_names, model_args, data_args, training_args, stage, return_dict)

    return wrapper


class LongConverter:
    """The host's converter of the data set's formatting, run twice: for the short prompt and for the long one."""

    def __init__(self, attr, data_args, get_dataset_converter):
        self.attr, self.version = attr, __version__  # version: a new release does not reuse the old one's map cache
        self.short = get_dataset_converter(attr.formatting, attr, data_args)
        long_attr = copy(attr)
        long_attr.prompt, long_attr.messages = attr.long_prompt, attr.long_messages
        self.long = get_dataset_converter(attr.formatting, long_attr, data_args)

    def __call__(self, example: dict[str, Any], index: int) -> dict[str, Any]:
        row = f"{self.attr.entry}[{index}]"
        self.check(row, example)
        short, long = self.short(example), self.long(example)
        for column, side in ((self.prompt_column, short), (self.long_column, long)):
            if len(side["_prompt"]) % 2 != 1 or len(side["_response"]) != 2:
                raise RowError(
                    f"{row}: column `{column}` must be turns that begin and end with the user's, "
                    "and the responses one assistant turn each."
                )
        if short["_response"][0]["content"] == short["_response"][1]["content"]:
            raise RowError(
                f"{row}: columns `{self.attr.chosen}` and `{self.attr.rejected}` hold the same text; remove the row."
            )
        if bool(short["_system"]) != bool(long["_system"]):
            raise RowError(f"{row}: only one of `{self.prompt_column}` and `{self.long_column}` has a system prompt.")
        short |= {"_long_prompt": long["_prompt"], "_long_system": long["_system"], "_row": row}
        return {name: value for name, value in short.items() if name not in ("_images", "_videos", "_audios")}

    @property
    def roles(self) -> list[str]:
        tags = ("user", "assistant", "observation", "function", "system")
        return [getattr(self.attr, f"{tag}_tag") for tag in tags]

    @property
    def prompt_column(self) -> str:
        return self.attr.prompt if self.attr.formatting == "alpaca" else self.attr.messages

    @property
    def long_column(self) -> str:
        return getattr(self.attr, LONG_COLUMN[self.attr.formatting])

    def check(self, row: str, example: dict[str, Any]) -> None:
        """Refuse what the host's converters would turn into an empty example, or crash on."""
        for column in (self.prompt_column, self.long_column):
            turns = [example[column]] if self.attr.formatting == "alpaca" else example[column]
            if not isinstance(turns, list) or not turns:
                raise RowError(f"{row}: column `{column}` must be a list of messages, got {str(turns)[:60]!r}.")
            for turn in turns:
                if isinstance(turn, dict) and turn.get(self.attr.role_tag) not in self.roles:
                    raise RowError(
                        f"{row}: column `{column}` has a message whose `{self.attr.role_tag}` is "
                        f"{turn.get(self.attr.role_tag)!r}; known are {', '.join(self.roles)}."
                    )
                check_text(row, column, turn.get(self.attr.content_tag) if isinstance(turn, dict) else turn)
        for column in (self.attr.chosen, self.attr.rejected):
            response = example[column]
            if self.attr.formatting != "alpaca":
                roles = (self.attr.assistant_tag, self.attr.function_tag)
                if not isinstance(response, dict) or response.get(self.attr.role_tag) not in roles:
                    raise RowError(
                        f"{row}: column `{column}` must be one message with `{self.attr.role_tag}` "
                        f"{roles[0]!r}, got {str(response)[:60]!r}."
                    )
                response = response.get(self.attr.content_tag)
            check_text(row, column, response)
        for column in filter(None, (self.attr.query, self.attr.system)):
            if not isinstance(example[column], str | None):
                raise RowError(f"{row}: column `{column}` must be a string or null, got {str(example[column])[:60]!r}.")
        history = example[self.attr.history] if self.attr.formatting == "alpaca" and self.attr.history else None
        for turn in history or []:
            if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
                raise RowError(
                    f"{row}: column `{self.attr.history}` must be a list of [question, answer], got {str(turn)[:60]!r}."
                )


def _aligning(align_dataset, loader):
    def wrapper(dataset, dataset_attr, data_args, training_args):
        if not (dataset_attr.long_prompt or dataset_attr.long_messages):
            return align_dataset(dataset, dataset_attr, data_args, training_args)
        from llamafactory.data.converter import get_dataset_converter

        converter = LongConverter(dataset_attr, data_args, get_dataset_converter)
        first = next(iter(dataset), None)
        if first is None:
            raise ValueError(
                f"Dataset `{dataset_attr.entry}` has no rows; with `streaming: true` a local file also needs "
                "`dataloader_num_workers: 1` or more."
            )
        columns = list(first)
        mapped = (dataset_attr.chosen, dataset_attr.rejected, dataset_attr.system, dataset_attr.tools)
        if dataset_attr.formatting == "alpaca":
            mapped += (dataset_attr.query, dataset_attr.history)
        for column in (converter.prompt_column, converter.long_column, *filter(None, mapped)):
            if column not in columns:
                raise ValueError(
                    f"Dataset `{dataset_attr.entry}` has no column `{column}`; it has: {', '.join(columns)}. "
                    "Correct `columns` in dataset_info.json."
                )
        kwargs = {}
        if not data_args.streaming:
            kwargs = dict(
                num_proc=data_args.preprocessing_num_workers,
                load_from_cache_file=(not data_args.overwrite_cache) or (training_args.local_process_index != 0),
                desc="Converting format of dataset",
            )
        return dataset.map(converter, with_indices=True, remove_columns=columns, **kwargs)

    return wrapper


def overlength(data_args) -> str:
    """`solopo_overlength`, which `run_solopo` leaves on the only arguments that the host hands its processors."""
    return getattr(data_args, "solopo_overlength", "error")


class SoloDatasetProcessor:
    """Aligned examples -> tokenised rows (see `solopo_plugin.data`); the host calls it as one of its processors."""

    def __init__(self, template, tokenizer, processor, data_args):
        self.template, self.tokenizer, self.version = template, tokenizer, __version__
        self.cutoff_len, self.overlength = data_args.cutoff_len, overlength(data_args)

    def _encode(self, messages, system, tools) -> tuple[list[int], list[int]]:
        return encode_turn(self.tokenizer, self.template, messages, system, tools)

    def preprocess_dataset(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """A batch of aligned examples -> a batch of tokenised rows; over-long rows raise or are left out."""
        batch = {name: [] for name in COLUMNS}
        names = ("_row", "_prompt", "_long_prompt", "_response", "_system", "_long_system", "_tools")
        for row, short, long, responses, system, long_system, tools in zip(*(examples[n] for n in names), strict=True):
            tokenised = build_row(
                row, self._encode, short, long, responses, system, long_system, tools,
                markers=[*filter(None, [self.tokenizer.bos_token]), *self.template.stop_words],
            )  # fmt: skip
            if fits(tokenised, self.cutoff_len, self.overlength):
                for name, value in tokenised.items():
                    batch[name].append(value)
        return batch

    def print_data_example(self, example: dict[str, Any]) -> None:
        """Show the first row as the model sees it, as the host's processors do."""
        print(f"row:\n{example['row']}")
        for name in ("short_prompt", "long_prompt", "chosen", "rejected"):
            ids = example[f"{name}_ids"]
            text = self.tokenizer.decode(ids, skip_special_tokens=False)
            print(f"{name}_ids ({len(ids)} tokens):\n{ids}\n{name}:\n{text}")


def _processing(get_dataset_processor, loader):
    def wrapper(data_args, stage, template, tokenizer, processor, do_generate=False):
        if stage == "solopo":
            return SoloDatasetProcessor(template, tokenizer, processor, data_args)
        return get_dataset_processor(data_args, stage, template, tokenizer, processor, do_generate)

    return wrapper


def _counting(get_preprocessed_dataset, loader):
    def wrapper(dataset, data_args, training_args, stage, template, tokenizer, processor=None, is_eval=False):
        args = (dataset, data_args, training_args, stage, template, tokenizer, processor, is_eval)
        if stage != "solopo" or dataset is None or data_args.streaming:
            return get_preprocessed_dataset(*args)
        try:
            rows = get_preprocessed_dataset(*args)
        except RuntimeError as error:
            if "Cannot find valid samples" not in str(error):
                raise
            rows = []  # the host's word for "nothing is left", on the rank that shows an example
        if len(rows) == 0:
            raise ValueError(
                f"All {len(dataset)} rows are longer than `cutoff_len: {data_args.cutoff_len}` and were dropped; "
                "raise `cutoff_len`."
            )
        report(rows, len(dataset), data_args, is_eval, loader.logger)
        return rows

    return wrapper


def report(rows, n_before: int, data_args, is_eval: bool, logger) -> None:
    """Say how many rows there are, how many were dropped, and how long short and long prompts are."""
    lengths = (list_value_length(rows.data.column(f"{side}_prompt_ids")) for side in ("short", "long"))
    short, long = (mean(column).as_py() for column in lengths)
    split = "evaluation" if is_eval else "training"
    logger.info_rank0(
        f"SoLoPO {split} rows: {len(rows)}; dropped by `solopo_overlength: {overlength(data_args)}` at "
        f"`cutoff_len: {data_args.cutoff_len}`: {n_before - len(rows)}; mean prompt tokens: short {short:.0f}, "
        f"long {long:.0f} (compression rate {short / long:.2f})."
    )
    if long < short:
        logger.warning_rank0(f"The long prompts of the {split} rows are the shorter ones: are the columns swapped?")
