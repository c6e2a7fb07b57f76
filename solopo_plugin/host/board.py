"""Seam 4: LlamaBoard. The Train tab offers SoLoPO, with a section of its keys and its data sets, rows and chart.

What: functions of `llamafactory.webui` are wrapped once `llamafactory.webui.interface` has loaded all of it, and the
stage is added to the host's two tables of stages. Why: the board has no registry; its tab is one function, and its
runner knows each stage by name. If the board is not the known one it starts without the section, and says so.
In the training process, stage.py adds two numbers to the log that the board plots. Host: 0.9.5.
"""

import sys
from functools import wraps
from typing import Any, get_args

from ..args import FIELDS, SoloArguments, SoloDataArguments, check_keys, check_values
from . import board_texts
from .arguments import check_recipe
from .data import LONG_COLUMN, check_stage
from .stage import IN_LOG
from .versions import expect_signature

STAGE = "SoLoPO"  # as the stage list shows it
FROM_HOST = ("pref_beta", "pref_ftx", "pref_loss")  # widgets of the RLHF section, which the host reads for DPO only
# ours, in the order of their texts; simpo_gamma is a key of the host that has no widget there
WIDGETS = tuple(sorted((*FIELDS, "simpo_gamma"), key=[*board_texts.TEXTS].index))
PER_ROW = 5
LARGEST = 131072  # of a slider, tokens: that of the host's `cutoff_len`
MACHINE = 16  # of a slider, GPUs of one machine; ours
SHOWN = 2000  # characters of a text in the preview of rows


def apply(interface) -> None:
    """Patch the board right after the import of `llamafactory.webui.interface`, all of it or nothing."""
    try:
        check(interface)
    except Exception as error:
        without_section(error)
        return
    from llamafactory.extras.constants import STAGES_USE_PAIR_DATA, TRAINING_STAGES
    from llamafactory.webui import control, locales
    from llamafactory.webui.components import data, eval, train
    from llamafactory.webui.runner import Runner

    list_datasets = _filtering(control.list_datasets)
    changes = [
        (train, "list_datasets", list_datasets),
        (train, "change_stage", _keeping_choice(train.change_stage)),
        (eval, "list_datasets", list_datasets),
        (data, "get_preview", _previewing(data.get_preview)),
        (data.gr.JSON, "postprocess", _showing_rows(data.gr.JSON.postprocess)),
        (control, "gen_loss_plot", _plotting(control.gen_loss_plot)),
        (Runner, "_initialize", _refusing(Runner._initialize)),
        (Runner, "_parse_train_args", _parsing(Runner._parse_train_args)),
        (Runner, "_build_config_dict", _saving(Runner._build_config_dict)),
        (interface, "create_train_tab", _adding_section(interface.create_train_tab)),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    texts = board_texts.locales(locales.LOCALES["rlhf_tab"])

    def patch() -> None:
        for owner, name, ours in changes:
            setattr(owner, name, ours)
        TRAINING_STAGES[STAGE] = "solopo"
        STAGES_USE_PAIR_DATA.add("solopo")
        locales.LOCALES.update(texts)

    def undo() -> None:
        for owner, name, original in originals:
            setattr(owner, name, original)
        TRAINING_STAGES.pop(STAGE, None)
        STAGES_USE_PAIR_DATA.discard("solopo")
        for name in texts:
            locales.LOCALES.pop(name, None)

    patch()
    interface.create_ui = _falling_back(interface.create_ui, undo)


def check(interface) -> None:
    """Refuse a board that is not the known one, before anything is changed.

    Raises:
        RuntimeError: A function or a name that the section builds on is missing or different.
    """
    from llamafactory.extras.constants import STAGES_USE_PAIR_DATA, TRAINING_STAGES
    from llamafactory.hparams import parser
    from llamafactory.webui import control, locales
    from llamafactory.webui.components import data, eval, train
    from llamafactory.webui.manager import Manager
    from llamafactory.webui.runner import Runner

    for owner, name, parameters in (
        (interface, "create_ui", ("demo_mode",)),
        (interface, "create_train_tab", ("engine",)),
        (Manager, "get_base_elems", ("self",)),
        (Runner, "_initialize", ("self", "data", "do_train", "from_preview")),
        (Runner, "_parse_train_args", ("self", "data")),
        (Runner, "_build_config_dict", ("self", "data")),
        (control, "list_datasets", ("dataset_dir", "training_stage")),
        (control, "gen_loss_plot", ("trainer_log",)),
        (train, "list_datasets", ("dataset_dir", "training_stage")),
        (train, "change_stage", ("training_stage",)),
        (eval, "list_datasets", ("dataset_dir", "training_stage")),
        (data, "get_preview", ("dataset_dir", "dataset", "page_index")),
        (data.gr.JSON, "postprocess", ("self", "value")),
    ):
        expect_signature(owner, name, parameters)
    known = interface.create_train_tab.__code__.co_varnames
    expected = {
        "widgets of the Train tab": ({"input_elems", "rlhf_tab", *FROM_HOST}, known),
        "stages": ({"dpo"}, STAGES_USE_PAIR_DATA),
        "texts": ({"rlhf_tab", "pref_beta"}, locales.LOCALES),
        "recipe keys": (set(FIELDS), {name for a in parser._TRAIN_ARGS for name in a.__dataclass_fields__}),
    }
    for what, (names, found) in expected.items():
        if missing := sorted(names - set(found)):
            raise RuntimeError(f"its {what} lack {', '.join(missing)}")
    if taken := sorted(
        {STAGE, "solopo", *texts_names()} & {*TRAINING_STAGES, *TRAINING_STAGES.values(), *locales.LOCALES}
    ):
        raise RuntimeError(f"it has {', '.join(taken)} already")


def texts_names() -> set[str]:
    """Return the names of our elements, which are also those of their texts."""
    return {"solopo_tab", *WIDGETS}


def without_section(error: Exception) -> None:
    """Say on stderr that the board starts as the host ships it, and why."""
    print(f"[WARNING] solopo_plugin: LlamaBoard starts without the SoLoPO section: {error}", file=sys.stderr)


def _falling_back(create_ui, undo):
    """Build a page that cannot be built with the section again without it."""

    @wraps(create_ui)
    def wrapper(demo_mode=False):
        try:
            return create_ui(demo_mode)
        except Exception as error:
            without_section(error)
            undo()
            return create_ui(demo_mode)

    return wrapper


# ---- the section


def widget(name: str):
    """Return the host's kind of widget for a key, at its default; numbers without an upper limit are typed as text."""
    import gradio as gr

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


def _adding_section(create_train_tab):
    """Add the section to the Train tab, below the RLHF section.

    The host's tab takes its inputs from `get_base_elems`; ours are made first, then moved.
    """

    @wraps(create_train_tab)
    def wrapper(engine):
        import gradio as gr

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

    return wrapper


# ---- its data sets


def check_dataset(name: str, entry: dict, stage: str) -> None:
    """Refuse an entry of `dataset_info.json` that the stage cannot use, in the loader's sentence."""
    from llamafactory.data.parser import DatasetAttr

    attr = DatasetAttr("file", dataset_name=name)
    attr.join(entry)
    check_stage(name, attr, stage)


def _filtering(list_datasets):
    """List those of the host's data sets that the stage does not refuse."""

    @wraps(list_datasets)
    def wrapper(dataset_dir=None, training_stage=None):
        import gradio as gr
        from llamafactory.extras.constants import TRAINING_STAGES
        from llamafactory.webui.common import DEFAULT_DATA_DIR, load_dataset_info

        training_stage = training_stage or next(iter(TRAINING_STAGES))
        info = load_dataset_info(DEFAULT_DATA_DIR if dataset_dir is None else dataset_dir)

        def usable(name: str) -> bool:
            try:
                check_dataset(name, info[name], TRAINING_STAGES[training_stage])
            except ValueError:
                return False
            return True

        return gr.Dropdown(choices=[n for _, n in list_datasets(dataset_dir, training_stage).choices if usable(n)])

    return wrapper


def _keeping_choice(change_stage):
    """Keep the chosen data sets when the stage becomes ours; one that is wrong is refused with its sentence.

    The host empties them when the stage changes, also when saved arguments or a running job did it, so that a loaded
    configuration would lose them.
    """

    @wraps(change_stage)
    def wrapper(training_stage):
        import gradio as gr

        dataset, packing = change_stage(training_stage)
        return (gr.skip() if training_stage == STAGE else dataset), packing

    return wrapper


class Rows(list):
    """Hold rows of the preview, to be sent as JSON: gradio 5.50 sends text, `root=[...]` (its pull request 12343)."""


def _showing_rows(postprocess):
    @wraps(postprocess)
    def wrapper(self, value):
        shown = postprocess(self, value)
        return getattr(shown, "root", shown) if isinstance(value, Rows) else shown

    return wrapper


def _previewing(get_preview):
    """Preview rows of a data set with a long column: short and long prompt, chosen, rejected, and no endless text."""

    @wraps(get_preview)
    def wrapper(dataset_dir, dataset, page_index):
        from llamafactory.webui.common import load_dataset_info

        count, rows, box = get_preview(dataset_dir, dataset, page_index)
        columns = load_dataset_info(dataset_dir).get(dataset[0], {}).get("columns", {})
        if not set(LONG_COLUMN.values()).isdisjoint(columns):
            rows = Rows(row_shown(row, columns) if isinstance(row, dict) else row for row in rows)
        return count, rows, box

    return wrapper


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


def _parsing(parse_train_args):
    """Return the command's arguments with ours; the host adds the RLHF section's only for the stages that it knows."""

    @wraps(parse_train_args)
    def wrapper(self, data):
        args = parse_train_args(self, data)
        if args["stage"] == "solopo":
            typed = {n: data[self.manager.get_elem_by_id(f"train.{n}")] for n in (*FROM_HOST, *WIDGETS)}
            typed |= {n: number(typed[n]) for n, spec in FIELDS.items() if spec.type is float}
            args |= {n: v for n, v in typed.items() if n not in args}  # extra arguments win, as over most host widgets
        return args

    return wrapper


def _refusing(initialize):
    """Refuse before the preview what the command line would refuse, in the same sentence, shown as a warning."""

    @wraps(initialize)
    def wrapper(self, data, do_train, from_preview):
        error = initialize(self, data, do_train, from_preview)
        if error or not do_train or data[self.manager.get_elem_by_id("train.training_stage")] != STAGE:
            return error
        return refusal(self._parse_train_args(data))

    return wrapper


class Given:
    """Hold arguments as attributes; one that is not given is None."""

    def __init__(self, args: dict):
        self.__dict__.update(args)

    def __getattr__(self, name):
        return None


def refusal(args: dict) -> str:
    """Return the sentence with which the command line refuses these arguments, or an empty one."""
    from llamafactory.hparams import parser
    from llamafactory.webui.common import load_dataset_info

    finetuning_args = next(a for a in parser._TRAIN_ARGS if issubclass(a, SoloArguments))
    fields = finetuning_args.__dataclass_fields__
    known = {n: v for n, v in args.items() if n in fields and fields[n].init and v is not None}
    try:
        check_keys(args)
        check_values(SoloDataArguments(args.get("solopo_overlength") or SoloDataArguments.solopo_overlength))
        given = Given(args)
        check_recipe(given, given, given, finetuning_args(**known), given)
        info = load_dataset_info(args["dataset_dir"])
        for name in args["dataset"].split(","):
            if name in info:  # else it is a name on a hub, or the host's to refuse
                check_dataset(name, info[name], "solopo")
    except Exception as error:  # of the host's own rules, too
        return str(error) or repr(error)
    return ""


def _saving(build_config_dict):
    """Save our keys for our stage alone."""

    @wraps(build_config_dict)
    def wrapper(self, data):
        config = build_config_dict(self, data)
        if config.get("train.training_stage") == STAGE:
            return config
        return {name: value for name, value in config.items() if name not in {f"train.{n}" for n in WIDGETS}}

    return wrapper


# ---- its chart


def _plotting(gen_loss_plot):
    """Draw alignment loss and reward gap below the host's loss curve, where the log has them."""

    @wraps(gen_loss_plot)
    def wrapper(trainer_log):
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

    return wrapper
