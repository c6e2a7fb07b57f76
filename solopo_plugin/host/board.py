"""Seam 4 (docs/seams.md): LlamaBoard offers SoLoPO, with a section of its keys and its data sets, rows and chart.

If the board is not the known one it starts without the section, and says so.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

from ..args import FIELDS, SoloArguments, check_keys
from ..qa.entries import misshapen
from . import board_texts
from .arguments import check_best_direction, check_kinds, check_recipe
from .data import LONG_COLUMN, check_stage
from .preflight import faults_of_data, names_of
from .stage import IN_LOG
from .versions import expect_signature, wrap

absent: ImportError | None = None
try:
    import gradio as gr
    from llamafactory.data.parser import DatasetAttr
    from llamafactory.extras import constants
    from llamafactory.extras.misc import is_env_enabled
    from llamafactory.hparams import DataArguments, parser
    from llamafactory.webui import control
    from llamafactory.webui.common import DEFAULT_DATA_DIR, load_dataset_info
    from llamafactory.webui.components import data as data_tab
    from llamafactory.webui.components import eval as eval_tab
    from llamafactory.webui.components import train as train_tab
    from llamafactory.webui.locales import LOCALES
    from llamafactory.webui.manager import Manager
    from llamafactory.webui.runner import Runner
    from transformers import HfArgumentParser
except ImportError as error:  # a board of another host: `check` refuses it
    absent = error

STAGE = "SoLoPO"  # as the stage list shows it
FROM_HOST = ("pref_beta", "pref_ftx", "pref_loss")  # widgets of the RLHF section, which the host reads for DPO only
# ours, in the order of their texts; simpo_gamma is a key of the host that has no widget there
WIDGETS = tuple(sorted((*FIELDS, "simpo_gamma"), key=[*board_texts.TEXTS].index))
PER_ROW = 5
LARGEST = 131072  # of a slider, tokens: that of the host's `cutoff_len`
MACHINE = 16  # of a slider, GPUs of one machine; ours
TYPED = {"learning_rate": float, "num_train_epochs": float, "max_grad_norm": float, "max_samples": int}  # as text
OF_SFT = (("predict_with_generate",), ("neat_packing",), ("train_on_prompt", "mask_history"))  # refused by the host
SHOWN = 2000  # characters of a text in the preview of rows


def apply(interface) -> None:
    """Patch the board right after the import of `llamafactory.webui.interface`, all of it or nothing."""
    try:
        check(interface)
    except Exception as error:
        without_section(error)
        return

    seams, texts = seams_of(interface), board_texts.locales(LOCALES["rlhf_tab"])
    originals = [(owner, name, getattr(owner, name)) for owner, name, *_ in seams]

    def undo() -> None:
        for owner, name, original in originals:
            setattr(owner, name, original)
        constants.TRAINING_STAGES.pop(STAGE, None)
        constants.STAGES_USE_PAIR_DATA.discard("solopo")
        for name in texts:
            LOCALES.pop(name, None)

    wrap(*seams, (interface, "create_ui", ("demo_mode",), partial(_falling_back, undo)))
    constants.TRAINING_STAGES[STAGE] = "solopo"
    constants.STAGES_USE_PAIR_DATA.add("solopo")
    LOCALES.update(texts)


def seams_of(interface) -> list[tuple[Any, str, tuple[str, ...], Callable]]:
    """Return what `wrap` takes: owner, name and parameters of each function, and ours."""
    return [
        (interface, "create_train_tab", ("engine",), _adding_section),
        (Runner, "_initialize", ("self", "data", "do_train", "from_preview"), _refusing),
        (Runner, "_parse_train_args", ("self", "data"), _parsing),
        (Runner, "_build_config_dict", ("self", "data"), _saving),
        (control, "gen_loss_plot", ("trainer_log",), _plotting),
        (train_tab, "list_datasets", ("dataset_dir", "training_stage"), _filtering),
        (train_tab, "change_stage", ("training_stage",), _keeping_choice),
        (eval_tab, "list_datasets", ("dataset_dir", "training_stage"), _filtering),
        (data_tab, "get_preview", ("dataset_dir", "dataset", "page_index"), _previewing),
        (gr.JSON, "postprocess", ("self", "value"), _showing_rows),
    ]


def check(interface) -> None:
    """Refuse a board that is not the known one, before anything is changed.

    Raises:
        ImportError: A module or a name of the host that this file imports is missing.
        RuntimeError: A function or a name that the section builds on is missing or different.
    """
    if absent:
        raise absent
    expect_signature(interface, "create_ui", ("demo_mode",))
    expect_signature(control, "list_datasets", ("dataset_dir", "training_stage"))
    expect_signature(Manager, "get_base_elems", ("self",))
    for owner, name, parameters, _ in seams_of(interface):
        expect_signature(owner, name, parameters)
    expected = {
        "widgets of the Train tab": (
            {"input_elems", "rlhf_tab", *FROM_HOST},
            interface.create_train_tab.__code__.co_varnames,
        ),
        "stages": ({"dpo"}, constants.STAGES_USE_PAIR_DATA),
        "texts": ({"rlhf_tab", "pref_beta"}, LOCALES),
        "recipe keys": (set(FIELDS), {name for a in parser._TRAIN_ARGS for name in a.__dataclass_fields__}),
    }
    for what, (names, found) in expected.items():
        if missing := sorted(names - set(found)):
            raise RuntimeError(f"its {what} lack {', '.join(missing)}")
    ours = {STAGE, "solopo", "solopo_tab", *WIDGETS}  # the names of our elements are also those of their texts
    if taken := sorted(ours & {*constants.TRAINING_STAGES, *constants.TRAINING_STAGES.values(), *LOCALES}):
        raise RuntimeError(f"it has {', '.join(taken)} already")


def without_section(error: Exception) -> None:
    """Say on stderr that the board starts as the host ships it, and why."""
    print(f"[WARNING] solopo_plugin: LlamaBoard starts without the SoLoPO section: {error}", file=sys.stderr)


def _falling_back(undo, create_ui, demo_mode=False):
    """Build a page that cannot be built with the section again without it."""
    try:
        return create_ui(demo_mode)
    except Exception as error:
        without_section(error)
        undo()
        return create_ui(demo_mode)


# ---- the section


def widget(name: str):
    """Return the host's kind of widget for a key, at its default; numbers without an upper limit are typed as text."""
    if name == "simpo_gamma":
        return gr.Slider(minimum=0, maximum=10, value=0.5, step=0.01)  # the host's default; range of `pref_ftx`
    kind, default = FIELDS[name].type, FIELDS[name].default
    if kind is bool:
        return gr.Checkbox(value=default)
    if kind is int:
        most = MACHINE if name == "solopo_sequence_parallel" else LARGEST
        return gr.Slider(minimum=min(1, default), maximum=most, value=default, step=1)
    if kind is float:
        return gr.Textbox(value=str(default))
    return gr.Dropdown(choices=list(get_args(kind)), value=default)


def _adding_section(create_train_tab, engine):
    """Add the section to the Train tab, below the RLHF section.

    The host's tab takes its inputs from `get_base_elems`; ours are made first, then moved.
    """
    ours: dict[str, Any] = {}
    with gr.Accordion(open=False) as section:
        for start in range(0, len(WIDGETS), PER_ROW):
            with gr.Row():
                ours |= {name: widget(name) for name in WIDGETS[start : start + PER_ROW]}
    base_elems = engine.manager.get_base_elems
    engine.manager.get_base_elems = lambda: base_elems() | set(ours.values())
    try:
        elems = create_train_tab(engine)
    finally:
        del engine.manager.get_base_elems
    tab = section.parent.children
    tab.remove(section)
    tab.insert(tab.index(elems["rlhf_tab"]) + 1, section)
    return {**elems, "solopo_tab": section, **ours}


# ---- its data sets


def check_dataset(name: str, entry: dict, stage: str) -> None:
    """Refuse an entry of `dataset_info.json` that the stage cannot use, in the loader's sentence."""
    if stage == "solopo" and (sentence := misshapen(name, entry)):
        raise ValueError(sentence)
    attr = DatasetAttr("file", dataset_name=name)
    attr.join(entry)
    check_stage(name, attr, stage)


def _filtering(list_datasets, dataset_dir=None, training_stage=None):
    """List those of the host's data sets that the stage does not refuse."""
    training_stage = training_stage or next(iter(constants.TRAINING_STAGES))
    info = load_dataset_info(DEFAULT_DATA_DIR if dataset_dir is None else dataset_dir)

    def usable(name: str) -> bool:
        try:
            check_dataset(name, info[name], constants.TRAINING_STAGES[training_stage])
        except Exception as error:
            return not isinstance(error, ValueError)  # else an entry without the form, which the host lists
        return True

    return gr.Dropdown(choices=[n for _, n in list_datasets(dataset_dir, training_stage).choices if usable(n)])


def _keeping_choice(change_stage, training_stage):
    """Keep the chosen data sets when the stage becomes ours; one that is wrong is refused with its sentence.

    The host empties them when the stage changes, also when saved arguments or a running job did it, so that a loaded
    configuration would lose them.
    """
    dataset, packing = change_stage(training_stage)
    return (gr.skip() if training_stage == STAGE else dataset), packing


class Rows(list):
    """Hold rows of the preview, to be sent as JSON: gradio 5.50 sends text, `root=[...]` (its pull request 12343)."""


def _showing_rows(postprocess, self, value):
    shown = postprocess(self, value)
    return getattr(shown, "root", shown) if isinstance(value, Rows) else shown


def _previewing(get_preview, dataset_dir, dataset, page_index):
    """Preview rows of a data set with a long column: short and long prompt, chosen, rejected, and no endless text."""
    count, rows, box = get_preview(dataset_dir, dataset, page_index)
    columns = load_dataset_info(dataset_dir).get(dataset[0], {}).get("columns", {})
    if isinstance(columns, dict) and not set(LONG_COLUMN.values()).isdisjoint(columns):
        rows = Rows(row_shown(row, columns) if isinstance(row, dict) else row for row in rows)
    return count, rows, box


def row_shown(row: dict, columns: dict[str, str]) -> dict:
    """Return a row by what its columns mean: short prompt, long prompt, the responses, then what else is mapped."""
    first = ("prompt", "messages", "query", *dict.fromkeys(LONG_COLUMN.values()), "chosen", "rejected")
    roles = [*(r for r in first if r in columns), *(r for r in columns if r not in first)]
    return {role: clipped(row.get(columns[role])) for role in roles}


def clipped(value):
    """Return a text, or the texts of messages, without the middle of what is longer than `SHOWN` characters."""
    if isinstance(value, list):
        return [clipped(item) for item in value]
    if isinstance(value, dict):
        return {name: clipped(item) for name, item in value.items()}
    if not isinstance(value, str) or len(value) <= SHOWN:
        return value
    return f"{value[: SHOWN // 2]} [... {len(value) - SHOWN:,} characters ...] {value[-SHOWN // 2 :]}"


# ---- its arguments


def number(text):
    """Return what was typed as a recipe would hold it: a whole number, another number, or the text, refused later."""
    for kind in (int, float):
        try:
            return kind(text)
        except (TypeError, ValueError):
            continue
    return text


def _parsing(parse_train_args, self, data):
    """Return the command's arguments with ours; the host adds the RLHF section's only for the stages that it knows."""
    args = parse_train_args(self, data)
    if args["stage"] == "solopo":
        typed = {n: data[self.manager.get_elem_by_id(f"train.{n}")] for n in (*FROM_HOST, *WIDGETS)}
        typed |= {n: number(typed[n]) for n, spec in FIELDS.items() if spec.type is float}
        args |= {n: v for n, v in typed.items() if n not in args}  # extra arguments win, as over most host widgets
    return args


def _refusing(initialize, self, data, do_train, from_preview):
    """Refuse before the preview what the command line would refuse, in the same sentence, shown as a warning."""
    error = initialize(self, data, do_train, from_preview)
    if error or not do_train or data[self.manager.get_elem_by_id("train.training_stage")] != STAGE:
        return error
    try:
        args = self._parse_train_args(data)
    except (TypeError, ValueError) as fault:
        typed = {name: data[self.manager.get_elem_by_id(f"train.{name}")] for name in (*TYPED, "extra_args")}
        return unreadable(typed) or f"A field of the Train tab is empty or no number: {fault}; fill it in."
    return refusal(args)


def unreadable(typed: dict[str, str]) -> str:
    """Return a sentence on the first text that the host would end with when it reads it; empty if there is none."""
    for name, kind in TYPED.items():
        try:
            kind(typed[name])
        except (TypeError, ValueError):
            return f"`{name}` must be {'a whole number' if kind is int else 'a number'}, got {typed[name]!r}."
    if not isinstance(json.loads(typed["extra_args"]), dict):
        return f'Extra arguments must be keys with values, such as {{"use_cpu": true}}, got {typed["extra_args"]}.'
    return ""


def refusal(args: dict) -> str:
    """Return the sentence with which the command line refuses these arguments, or an empty one.

    The host's rules for the model and for the Trainer, whose arguments look for devices, are left to the run.
    """
    finetuning_args = next(a for a in parser._TRAIN_ARGS if issubclass(a, SoloArguments))
    keys = {name for part in parser._TRAIN_ARGS for name, spec in part.__dataclass_fields__.items() if spec.init}
    try:
        check_keys(args)
        check_best_direction(args)
        # the host drops nulls of its own
        args = {n: v for n, v in args.items() if v is not None or n in (*FROM_HOST, *WIDGETS)}
        check_kinds(args)
        parts = HfArgumentParser([DataArguments, finetuning_args])
        _, tuning = parts.parse_dict(args, allow_extra_keys=True)
        if (unknown := sorted(args.keys() - keys)) and not is_env_enabled("ALLOW_EXTRA_ARGS"):
            raise ValueError(f"Some keys are not used by the HfArgumentParser: {unknown}")
        for of_sft in OF_SFT:
            if any(map(args.get, of_sft)):
                raise ValueError(f"`{'` or `'.join(of_sft)}` cannot be set as True except SFT.")
        check_recipe(args.get, tuning)
        for key in ("dataset", "eval_dataset"):
            if not isinstance(value := args.get(key), str | list | None):
                raise ValueError(f"`{key}` must be a name, or a list of names, got {value!r}.")
        if sentence := next(faults_of_data(args), None):
            raise ValueError(sentence)
        info = load_dataset_info(args["dataset_dir"])
        for name in (*names_of(args["dataset"]), *names_of(args.get("eval_dataset"))):
            if name in info:  # else `dataset_dir` is a hub's
                check_dataset(name, info[name], "solopo")
    except Exception as error:  # of the host's own rules, too
        return str(error) or repr(error)
    return ""


def _saving(build_config_dict, self, data):
    """Save our keys for our stage alone."""
    config = build_config_dict(self, data)
    if config.get("train.training_stage") == STAGE:
        return config
    return {name: value for name, value in config.items() if name not in {f"train.{n}" for n in WIDGETS}}


# ---- its chart


def _plotting(gen_loss_plot, trainer_log):
    """Draw alignment loss and reward gap below the host's loss curve, where the log has them."""
    figure = gen_loss_plot(trainer_log)
    logs = [log for log in trainer_log if all(name in log for name in IN_LOG.values())]
    if logs:
        figure.set_figheight(2 * figure.get_figheight())
        grid = figure.add_gridspec(2, 1)
        figure.axes[0].set_subplotspec(grid[0])
        ax = figure.add_subplot(grid[1])
        steps = [log["current_steps"] for log in logs]
        ax.plot(steps, [log["align_loss"] for log in logs], color="#1f77b4", label="alignment loss")
        # dashed: with |t| and aligned rewards the two are one curve
        ax.plot(steps, [log["reward_gap"] for log in logs], "--", color="#ff7f0e", label="reward gap")
        ax.legend()
        ax.set_xlabel("step")
        ax.set_ylabel("nats")
    return figure
