"""LlamaBoard without a browser: texts, commands, refusals, data sets, chart; and that the other stages see nothing.

What a user sees and does is in `web/test_web.py`.
"""

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import yaml
from conftest import ROOT, SOLO_COLUMNS, demo_rows, write_dataset

from solopo_plugin.args import FIELDS
from solopo_plugin.host import board, board_texts

NOT_ON_BOARD: tuple[str, ...] = ()  # keys without a widget, each with its reason; today every key has one
MODEL = "Custom"


@pytest.fixture(scope="module")
def host():
    """The host's modules of the board, patched by the import of the last."""
    from llamafactory.webui import common, control, interface, locales, runner
    from llamafactory.webui.components import data, train

    return SimpleNamespace(
        common=common, control=control, interface=interface, locales=locales, runner=runner, data=data, train=train
    )


@pytest.fixture
def page(host, tmp_path, monkeypatch):
    """A built page: its `runner`, and `fill(**values)`, the values of all inputs of the Train tab by name."""
    monkeypatch.chdir(tmp_path)  # the board writes into the current folder
    engines = []
    monkeypatch.setattr(
        host.interface, "Engine", lambda make=host.interface.Engine, **k: engines.append(make(**k)) or engines[0]
    )
    demo = host.interface.create_ui()
    manager = engines[0].manager
    start = next(f for f in demo.fns.values() if f.fn == engines[0].runner.run_train)

    def fill(**values) -> dict:
        filled = {
            "top.lang": "en", "top.model_name": MODEL, "top.model_path": "model", "train.dataset": ["demo_solopo"],
            "train.dataset_dir": str(ROOT / "data"), "train.output_dir": "out", "train.config_path": "saved.yaml",
            "train.training_stage": board.STAGE, "top.checkpoint_path": [], "train.reward_model": [],
        } | {(n if "." in n else f"train.{n}"): v for n, v in values.items()}  # fmt: skip
        data = {elem: elem.value for elem in start.inputs}
        return data | {manager.get_elem_by_id(name): value for name, value in filled.items()}

    return SimpleNamespace(runner=engines[0].runner, manager=manager, fill=fill, demo=demo)


def preview(page, **values) -> str:
    """What the board answers to "Preview command"."""
    (answer,) = page.runner.preview_train(page.fill(**values))
    return answer[page.manager.get_elem_by_id("train.output_box")]


def arguments(command: str) -> list[str]:
    """The command of a preview as a shell splits it."""
    return shlex.split(command.removeprefix("```bash").removesuffix("```").replace("\\\n", " "))


# ---- texts


def test_every_key_has_a_widget_or_a_reason():
    assert set(board.WIDGETS) == (set(FIELDS) - set(NOT_ON_BOARD)) | {"simpo_gamma"}


def test_every_widget_is_named_and_explained_in_every_language(host):
    languages = set(host.locales.LOCALES["pref_beta"])
    assert languages == {"en", "ru", "zh", "ko", "ja"} == set(board_texts.TAB)
    assert set(board_texts.TEXTS) == set(board.WIDGETS)
    for name, by_lang in board_texts.TEXTS.items():
        assert set(by_lang) == languages, name
        for lang, (label, info) in by_lang.items():
            assert label and info and len(info) <= 120, (name, lang)
            assert host.locales.LOCALES[name][lang] == {"label": label, "info": info}
    for lang in languages:
        labels = [by_lang[lang][0] for by_lang in board_texts.TEXTS.values()]
        assert len(set(labels)) == len(labels), lang


def test_widgets_start_at_the_defaults_and_offer_what_is_allowed(page):
    for name, field in FIELDS.items():
        elem = page.manager.get_elem_by_id(f"train.{name}")
        assert (board.number(elem.value) if field.type is float else elem.value) == field.default, name
        if get_args(field.type):
            assert tuple(value for _, value in elem.choices) == get_args(field.type), name
        if field.type is int:  # tokens, or GPUs of one machine: a slider that can be set by hand
            most = board.MACHINE if name == "solopo_sequence_parallel" else board.LARGEST
            assert (elem.minimum, elem.maximum, elem.step) == (min(1, field.default), most, 1), name


def test_the_section_is_below_the_rlhf_section(page):
    rlhf, ours = (page.manager.get_elem_by_id(f"train.{name}") for name in ("rlhf_tab", "solopo_tab"))
    siblings = rlhf.parent.children
    assert siblings.index(ours) == siblings.index(rlhf) + 1


# ---- commands


FILLED = {
    "solopo_alpha": ("2.5", 2.5), "solopo_align": ("logp", "logp"), "solopo_align_on": ("both", "both"),
    "solopo_penalty": ("drop", "drop"), "solopo_detach_short": (True, True), "solopo_overlength": ("drop", "drop"),
    "solopo_anchor": ("0.1", 0.1),
    "solopo_forward": ("two_stage", "two_stage"), "solopo_reference": ("online", "online"),
    "solopo_logp_chunk": (256, 256), "solopo_mlp_chunk": (64, 64), "solopo_sequence_parallel": (1, 1),
    "simpo_gamma": (0.7, 0.7),
    "pref_loss": ("simpo", "simpo"), "pref_beta": (0.3, 0.3), "pref_ftx": (0.5, 0.5),
}  # fmt: skip


@pytest.mark.parametrize(
    "values",
    [FILLED, {}, {"solopo_objective": ("longpo", "longpo"), "solopo_longpo_lambda": ("0.1", 0.1)},
     {"solopo_alpha": ("0", 0.0)},
     {"solopo_align": ("distill", "distill"), "solopo_distill_kl": ("reverse", "reverse"),
      "solopo_distill_temperature": ("2", 2.0), "solopo_distill_topk": (50, 50)},
     {"solopo_sequence_parallel": (2, 2)}],
    ids=["all", "defaults", "longpo", "zero", "distill", "shared"],
)  # fmt: skip
def test_preview_and_start_hand_over_what_was_filled_in(page, values):
    """The previewed command and the file that "Start" writes, parsed by the host's own parser."""
    from llamafactory.hparams.parser import _parse_train_args

    filled = {name: typed for name, (typed, _) in values.items()} | {
        "compute_type": "fp32", "extra_args": '{"use_cpu": true}',
    }  # fmt: skip
    command = arguments(preview(page, **filled))
    assert command[:2] == ["llamafactory-cli", "train"]
    started = save_for_start(page, filled)
    previewed, written = _parse_train_args(command[2:]), _parse_train_args(started)
    assert [previewed[i] for i in (0, 1, 3)] == [written[i] for i in (0, 1, 3)], "model, data and finetuning arguments"
    defaults = {name: field.default for name, field in FIELDS.items()} | {"stage": "solopo"}
    expected = defaults | {"pref_loss": "sigmoid", "pref_beta": 0.1, "pref_ftx": 0.0, "simpo_gamma": 0.5}
    expected |= {name: value for name, (_, value) in values.items()}
    given = vars(previewed[1]) | vars(previewed[3])
    assert {name: given[name] for name in expected} == expected


def save_for_start(page, filled) -> dict:
    """The recipe that "Start" would write and train from."""
    from llamafactory.webui.common import save_cmd

    return yaml.safe_load(Path(save_cmd(page.runner._parse_train_args(page.fill(**filled)))).read_text())


def test_extra_arguments_win(page):
    command = arguments(preview(page, extra_args='{"solopo_alpha": 4, "dpo_label_smoothing": 0.1}'))
    assert command[command.index("--solopo_alpha") + 1] == "4" and command.count("--solopo_alpha") == 1


@pytest.mark.parametrize(
    "values, recipe",
    [
        ({"solopo_alpha": "-1"}, {"solopo_alpha": -1}),
        ({"solopo_alpha": "two"}, {"solopo_alpha": "two"}),
        ({"solopo_alpha": ""}, {"solopo_alpha": ""}),
        ({"solopo_alpha": "nan"}, {"solopo_alpha": float("nan")}),
        ({"pref_loss": "kto_pair"}, {"pref_loss": "kto_pair"}),
        ({"pref_beta": 0}, {"pref_beta": 0}),
        ({"solopo_objective": "longpo", "pref_loss": "orpo"}, {"solopo_objective": "longpo", "pref_loss": "orpo"}),
        ({"solopo_longpo_lambda": "0.5"}, {"solopo_longpo_lambda": 0.5}),
        ({"packing": True}, {"packing": True}),
        (
            {"solopo_sequence_parallel": 2, "solopo_forward": "two_stage"},
            {"solopo_sequence_parallel": 2, "solopo_forward": "two_stage"},
        ),
        ({"extra_args": '{"solopo_alfa": 1}'}, {"solopo_alfa": 1}),
        ({"extra_args": '{"solopo_alpha": null}', "solopo_alpha": "3"}, {"solopo_alpha": None}),
        ({"extra_args": '{"pref_beta": null}'}, {"pref_beta": None}),
        ({"solopo_align": None}, {"solopo_align": None}),
        ({"extra_args": '{"learning_rat": 1}'}, {"learning_rat": 1}),
        ({"extra_args": '{"streaming": true}'}, {"streaming": True, "max_samples": 9}),
        (
            {"extra_args": '{"val_size": 0.1, "eval_dataset": "demo_solopo"}'},
            {"val_size": 0.1, "eval_dataset": "demo_solopo"},
        ),
        ({"extra_args": '{"ld_alpha": 0.5}'}, {"ld_alpha": 0.5}),
        ({"neftune_alpha": 5.0}, {"neftune_noise_alpha": 5.0}),
        ({"extra_args": '{"label_smoothing_factor": 0.1}'}, {"label_smoothing_factor": 0.1}),
        ({"simpo_gamma": 0.7}, {"simpo_gamma": 0.7}),
        ({"train_on_prompt": True}, {"train_on_prompt": True}),
        ({"mask_history": True}, {"mask_history": True}),
        ({"neat_packing": True}, {"neat_packing": True}),
        ({"extra_args": '{"predict_with_generate": true}'}, {"predict_with_generate": True}),
        (
            {"extra_args": '{"metric_for_best_model": "eval_solopo/nll"}'},
            {"metric_for_best_model": "eval_solopo/nll"},
        ),
        ({"extra_args": '{"learning_rate": "1e-5"}'}, {"learning_rate": "1e-5"}),
        ({"extra_args": '{"learning_rate": null, "pure_bf16": true}'}, {"learning_rate": None}),
        (
            {"top.quantization_bit": "4", "top.quantization_method": "bnb", "top.finetuning_type": "lora"},
            {"quantization_bit": 4, "finetuning_type": "lora"},
        ),
    ],
)
def test_a_wrong_value_gets_the_command_lines_sentence(page, monkeypatch, values, recipe):
    """In preview, start and save alike; afterwards the page works."""
    import gradio
    from llamafactory.hparams.parser import get_train_args

    base = {"model_name_or_path": "model", "output_dir": "out", "stage": "solopo", "do_train": True, "use_cpu": True,
            "template": "default", "dataset": "demo_solopo", "dataset_dir": str(ROOT / "data")}  # fmt: skip
    with pytest.raises(ValueError) as refused:
        get_train_args(base | recipe)
    warnings = []
    monkeypatch.setattr(gradio, "Warning", warnings.append)
    box = page.manager.get_elem_by_id("train.output_box")
    assert preview(page, **values) == str(refused.value)
    assert [answer[box] for answer in page.runner.run_train(page.fill(**values))] == [str(refused.value)]
    assert page.runner.save_args(page.fill(**values)) == {box: str(refused.value)}
    assert warnings.count(str(refused.value)) == 3 and not page.runner.running
    assert preview(page).startswith("```bash\nllamafactory-cli train")


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"learning_rate": ""}, "`learning_rate` must be a number, got ''."),
        ({"max_samples": "1e3"}, "`max_samples` must be a whole number, got '1e3'."),
        ({"extra_args": "1"}, 'Extra arguments must be keys with values, such as {"use_cpu": true}, got 1.'),
        ({"val_size": None}, "A field of the Train tab is empty or no number: "),
    ],
)
def test_a_text_that_the_host_cannot_read_gets_a_sentence(page, values, sentence):
    """Say it in preview, start and save, where the host raises, or saves it."""
    box = page.manager.get_elem_by_id("train.output_box")
    (started,) = page.runner.run_train(page.fill(**values))
    saved = page.runner.save_args(page.fill(**values))
    assert preview(page, **values) == started[box] == saved[box]
    assert saved[box].startswith(sentence)


def test_unsloth_is_refused_in_the_page(page):
    """On the command line the host first asks for the package."""
    assert "`use_unsloth: True` does not work with `stage: solopo`" in preview(page, **{"top.booster": "unsloth"})


def test_a_data_set_of_another_stage_is_refused_in_the_page(page):
    assert "Dataset `demo_short_po` has no long context" in preview(page, dataset=["demo_solopo", "demo_short_po"])
    assert "--dataset elsewhere" in preview(page, dataset=["elsewhere"], dataset_dir="ONLINE")
    assert "--dataset demo_solopo" in preview(page, extra_args='{"dataset": ["demo_solopo"]}')
    for key in ("dataset", "eval_dataset"):
        assert "Dataset `demo_short_po` has no" in preview(page, extra_args=f'{{"{key}": ["demo_short_po"]}}')


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"dataset": ["elsewhere"]}, "`dataset: elsewhere` is not registered in {data}/dataset_info.json: "),
        ({"extra_args": '{"eval_dataset": "x"}'}, "`eval_dataset: x` is not registered in {data}/dataset_info.json: "),
        ({"dataset_dir": "/nope"}, "`dataset_dir: /nope` has no dataset_info.json: "),
        ({"extra_args": '{"dataset": 5}'}, "`dataset` must be a name, or a list of names, got 5."),
        ({"extra_args": '{"val_size": "x"}'}, "`val_size` must be a number, got 'x'; write it without quotes"),
    ],
)
def test_data_that_is_not_there_is_refused_in_the_page(page, values, sentence):
    """As the command line refuses it: a folder's names are not looked up on a hub."""
    assert preview(page, **values).startswith(sentence.format(data=ROOT / "data"))


def test_a_stream_is_previewed(page):
    """Preview it with the key that takes back the widget's number of samples, which the host refuses there."""
    command = preview(page, extra_args='{"streaming": true, "max_samples": null, "val_size": null, "max_steps": 5}')
    assert "--streaming True" in command and "--max_samples" not in command


def test_loading_does_not_lose_the_chosen_data_sets(host):
    """The host empties them at every change of the stage; for its own stages it still does."""
    assert host.train.change_stage(board.STAGE) == ({"__type__": "update"}, False)
    assert host.train.change_stage("DPO") == ([], False) and host.train.change_stage("Pre-Training") == ([], True)


def test_saved_and_loaded_again(page):
    filled = {name: typed for name, (typed, _) in FILLED.items()}
    page.runner.save_args(page.fill(**filled))
    loaded = page.runner.load_args("en", "saved.yaml")
    for name, value in (filled | {"training_stage": board.STAGE}).items():
        assert loaded[page.manager.get_elem_by_id(f"train.{name}")] == value


# ---- the other stages

OTHERS = """
import json, sys
import yaml
from llamafactory.webui import control, interface
from llamafactory.webui.common import gen_cmd
from llamafactory.webui.locales import LOCALES

engines = []
make = interface.Engine
interface.Engine = lambda **k: engines.append(make(**k)) or engines[-1]
demo = interface.create_ui()
engine, found = engines[0], {}
run = {f.fn: f for f in demo.fns.values()}
start, evaluate = run[engine.runner.run_train], run[engine.runner.run_eval]
get = engine.manager.get_elem_by_id
filled = {"top.lang": "en", "top.model_name": "Custom", "top.model_path": "model", "train.output_dir": "out",
          "train.config_path": "c.yaml", "train.dataset": ["a", "b"], "train.pref_loss": "orpo",
          "train.pref_beta": 0.3, "eval.dataset": ["a"], "eval.output_dir": "out"}
for stage in ("Supervised Fine-Tuning", "Reward Modeling", "PPO", "DPO", "KTO", "Pre-Training"):
    for kind in ("full", "freeze", "lora"):
        lists = [] if kind == "lora" else None
        changes = filled | {"train.training_stage": stage, "top.finetuning_type": kind, "top.checkpoint_path": lists,
                            "train.reward_model": ["r"] if kind == "lora" else "r", "train.val_size": 0.1}
        data = {elem: elem.value for elem in start.inputs} | {get(n): v for n, v in changes.items()}
        data = {elem: value for elem, value in data.items() if elem in start.inputs}
        assert engine.runner._initialize(data, do_train=True, from_preview=True) == ""
        found[f"{stage} {kind}"] = [gen_cmd(engine.runner._parse_train_args(data)),
                                    yaml.safe_dump(engine.runner._build_config_dict(data))]
    found[f"{stage} data"] = control.list_datasets(sys.argv[1], stage).choices
    import llamafactory.webui.components.train as train
    found[f"{stage} offered"] = train.list_datasets(sys.argv[1], stage).choices
data = {elem: elem.value for elem in evaluate.inputs} | {get(n): v for n, v in filled.items()}
data = {elem: value for elem, value in data.items() if elem in evaluate.inputs} | {get("top.checkpoint_path"): []}
found["eval"] = [gen_cmd(engine.runner._parse_eval_args(data)), yaml.safe_dump(engine.runner._build_config_dict(data))]
found["texts"] = {name: LOCALES[name] for name in LOCALES if "solopo" not in name and name != "simpo_gamma"}
ours = {elem._id for name, elem in engine.manager.get_elem_iter() if "solopo" in name or name == "simpo_gamma"}
stages = get("train.training_stage")
stages.choices = [c for c in stages.choices if c[0] != "SoLoPO"]
parts = [c for c in demo.get_config_file()["components"] if c["id"] not in ours and c["type"] not in ("row", "form")]
found["page"] = [[c["type"], {k: v for k, v in c["props"].items() if k != "name"}] for c in parts]
found["ours"] = sorted(ours) != []
print("FOUND" + json.dumps(found, default=lambda value: type(value).__name__))
"""


def in_new_process(code: str, folder, *args: str, **env: str) -> subprocess.CompletedProcess:
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-c", code, *args], cwd=folder, env={**os.environ, "PYTHONPATH": path, **env}, text=True,
        capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def in_fork(zygote, code: str, folder: Path, *args: str) -> str:
    """Run the code with the plugin, as `zygote.py` does; returns what it said."""
    script, log = folder / "code.py", folder / "log.txt"
    script.write_text(code)
    status = zygote.start(script, *args, log=log, cwd=folder).wait()
    assert status == 0, log.read_text()[-4000:]
    return log.read_text()


@pytest.mark.slow
def test_the_other_stages_are_as_without_the_plugin(zygote, tmp_path):
    """Commands, saved configurations, data sets, texts and the page itself, with the plugin and with it off."""
    folder = write_dataset(tmp_path / "data", [], "pairs", columns={"prompt": "prompt", "chosen": "chosen"})
    write_dataset(tmp_path / "data", [], "plain", ranking=False, columns={"prompt": "prompt"})
    said = (
        in_fork(zygote, OTHERS, tmp_path, folder),
        in_new_process(OTHERS, tmp_path, folder, SOLOPO_PLUGIN="off").stdout,
    )
    on, off = (json.loads(re.search("FOUND(.*)", text)[1]) for text in said)
    assert on.pop("ours") and not off.pop("ours")
    assert len(on) == 6 * 5 + 3 and "--pref_loss orpo" in on["DPO full"][0]
    for name in off:
        assert on[name] == off[name], name


BROKEN = """
import sys
from importlib import import_module
from llamafactory.extras import constants
from llamafactory.webui import components, control, locales, runner
from solopo_plugin.host import board

for owner, name, value in (
    (control, "list_datasets", lambda folder: None),
    (control, "gen_loss_plot", None),
    (runner.Runner, "_parse_train_args", lambda self: None),
    (constants, "STAGES_USE_PAIR_DATA", {"rm"}),
    (locales.LOCALES, "solopo_alpha", {}),
    (board, "widget", None),  # here all checks pass, and the page cannot be built
):
    mapping = isinstance(owner, dict)
    original = owner.get(name) if mapping else getattr(owner, name)
    owner.update({name: value}) if mapping else setattr(owner, name, value)
    before, parse = dict(locales.LOCALES), runner.Runner._parse_train_args
    print("changed", name, file=sys.stderr)
    page = import_module("llamafactory.webui.interface").create_ui().get_config_file()
    assert "SoLoPO" not in constants.TRAINING_STAGES and locales.LOCALES == before
    assert runner.Runner._parse_train_args is parse
    assert "Supervised Fine-Tuning" in [c["props"].get("value") for c in page["components"]]
    owner.pop(name) if mapping else setattr(owner, name, original)
    del sys.modules["llamafactory.webui.interface"]
page = import_module("llamafactory.webui.interface").create_ui()
assert "SoLoPO" in constants.TRAINING_STAGES
"""


@pytest.mark.slow
def test_a_board_of_another_structure_starts_without_the_section(zygote, tmp_path):
    """For each change one line in the log, and the host's own page; when all is as it was, the section is back."""
    lines = in_fork(zygote, BROKEN, tmp_path).splitlines()
    said = [line for line in lines if line.startswith(("changed", "[WARNING] solopo_plugin"))]
    assert len(said) == 12 and not any(line.startswith("changed") for line in said[1::2])
    for line, what in zip(
        said[1::2],
        (
            "control.list_datasets",
            "control.gen_loss_plot",
            "Runner._parse_train_args",
            "dpo",
            "solopo_alpha",
            "NoneType",
        ),
        strict=True,
    ):
        assert "LlamaBoard starts without the SoLoPO section: " in line and what in line, line


def test_a_board_without_a_name_that_is_imported_starts_without_the_section(host, monkeypatch, capsys):
    monkeypatch.delattr(host.locales, "LOCALES")
    spec = importlib.util.spec_from_file_location("solopo_plugin.host.board_again", board.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    page = host.interface.create_ui
    again.apply(host.interface)
    assert host.interface.create_ui is page
    said = capsys.readouterr().err
    assert "LlamaBoard starts without the SoLoPO section: cannot import name 'LOCALES'" in said


# ---- data sets


@pytest.fixture
def folder(tmp_path):
    """`rows`, `lists` and `chat` are for SoLoPO; `pairs` for DPO; `plain` for SFT; `broken` for nobody."""
    rows = [row | {"note": "unused"} for row in demo_rows(3)]
    rows[0]["long_prompt"] = "a" * 5000 + "b" * 5000
    lists = [row | {"rejected": [row["rejected"], "c" * 3000]} for row in rows]
    write_dataset(tmp_path / "data", rows)
    write_dataset(tmp_path / "data", lists, "lists")
    long = {"messages": "m", "long_messages": "l", "chosen": "chosen", "rejected": "rejected"}
    chat = [{"m": [{"from": "human", "value": "q"}], "l": [{"from": "human", "value": "x" * 9000}], "chosen": {},
             "rejected": {}}]  # fmt: skip
    write_dataset(tmp_path / "data", chat, "chat", formatting="sharegpt", columns=long)
    short = {name: column for name, column in SOLO_COLUMNS.items() if name != "long_prompt"}
    write_dataset(tmp_path / "data", rows, "pairs", columns=short)
    write_dataset(tmp_path / "data", rows, "plain", ranking=False, columns={"prompt": "prompt", "response": "chosen"})
    return write_dataset(tmp_path / "data", rows, "broken", ranking=False)


@pytest.mark.parametrize(
    "stage, offered",
    [(board.STAGE, ["rows", "lists", "chat"]), ("DPO", ["pairs"]), ("Reward Modeling", ["pairs"]),
     ("Supervised Fine-Tuning", ["plain"]), ("KTO", ["plain"]), ("Pre-Training", ["plain"]), ("PPO", ["plain"])],
)  # fmt: skip
def test_each_stage_is_offered_the_data_sets_that_it_can_use(host, folder, stage, offered):
    assert [name for _, name in host.train.list_datasets(folder, stage).choices] == offered


@pytest.mark.parametrize("part", [{"columns": None}, {"columns": ["x"]}, {"columns": "prompt"}, {"tags": None},
                                  {"formatting": ["x"]}])  # fmt: skip
def test_an_entry_without_the_form_hides_no_other(host, folder, part):
    """List it as the host does, in its stages; do not offer it to SoLoPO."""
    info = Path(folder, "dataset_info.json")
    entries = json.loads(info.read_text()) | {"odd": {"file_name": "rows.jsonl"} | part}
    info.write_text(json.dumps(entries))
    assert offered(host, folder, "Supervised Fine-Tuning") == ["plain", "odd"]
    assert host.data.get_preview(folder, ["odd"], 0)[:2] == host.data.get_preview.__wrapped__(folder, ["odd"], 0)[:2]
    entries["odd"]["ranking"] = True
    info.write_text(json.dumps(entries))
    assert offered(host, folder, "DPO") == ["pairs", "odd"]
    assert offered(host, folder, board.STAGE) == ["rows", "lists", "chat"]


def offered(host, folder: str, stage: str) -> list[str]:
    return [name for _, name in host.train.list_datasets(folder, stage).choices]


def test_no_data_sets_in_a_folder_without_any(host, tmp_path):
    assert host.train.list_datasets(str(tmp_path), board.STAGE).choices == []


def test_preview_of_rows_shows_the_pair_and_both_prompts(host, folder):
    count, rows, _ = host.data.get_preview(folder, ["rows"], 0)
    assert count == 3 and len(rows) == 2
    assert list(rows[0]) == ["prompt", "long_prompt", "chosen", "rejected"]
    assert rows[1] == {name: demo_rows(2)[1][name] for name in rows[1]}, "texts that fit are shown whole"
    assert rows[0]["long_prompt"] == "a" * 1000 + " [... 8,000 characters ...] " + "b" * 1000
    _, (row, _), _ = host.data.get_preview(folder, ["lists"], 0)
    assert row["rejected"] == [rows[0]["rejected"], "c" * 1000 + " [... 1,000 characters ...] " + "c" * 1000]
    _, (row,), _ = host.data.get_preview(folder, ["chat"], 0)
    assert list(row) == ["messages", "long_messages", "chosen", "rejected"]
    assert "[... 7,000 characters ...]" in row["long_messages"][0]["value"]


def test_preview_of_other_data_sets_is_the_hosts(host, folder):
    shown = host.data.get_preview(folder, ["pairs"], 0)[:2]
    assert shown == host.data.get_preview.__wrapped__(folder, ["pairs"], 0)[:2] and "note" in shown[1][0]
    assert type(shown[1]) is list, "and gradio treats it as ever"


# ---- chart


def test_a_run_logs_what_the_chart_shows(host, recipe, run, tmp_path):
    """`trainer_log.jsonl` has the metrics of the same step; the chart has a second axis with both."""
    done = run(recipe(max_samples=8))
    path = done.dir / "trainer_log.jsonl"
    log = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [entry for entry in log if "loss" in entry]
    assert len(steps) == len(done.losses) == 4
    logged = [entry for entry in done.log if "loss" in entry]
    for entry, expected in zip(steps, logged, strict=True):
        assert entry["align_loss"] == expected["solopo/align_loss"] > 0
        assert entry["reward_gap"] == expected["solopo/reward_gap"] > 0
    figure = host.control.gen_loss_plot(log)
    above, below = figure.axes
    assert [list(line.get_ydata()) for line in below.lines] == [
        [entry[name] for entry in steps] for name in ("align_loss", "reward_gap")
    ]
    assert above.get_position().y0 > below.get_position().y1, "one above the other"
    others = [{k: v for k, v in entry.items() if k not in ("align_loss", "reward_gap")} for entry in log]
    assert len(host.control.gen_loss_plot(others).axes) == 1


# ---- abort


def test_abort_while_the_reference_is_scored(recipe, run, host_log, monkeypatch, tmp_path):
    """The board's signal ends the process at once; the next run finds what was scored. The log says how far it is."""
    from solopo_plugin import reference
    from solopo_plugin.trainer import SoloTrainer

    monkeypatch.setenv("SOLOPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reference, "is_env_enabled", lambda name: name == "LLAMABOARD_ENABLED")
    scored, score_pair = [], SoloTrainer.score_pair

    def aborting(self, model, features):
        scored.append(len(features))
        if len(scored) == 2:
            signal.raise_signal(signal.SIGABRT)
        return score_pair(self, model, features)

    monkeypatch.setattr(SoloTrainer, "score_pair", aborting)
    flags = []
    before = signal.signal(signal.SIGABRT, lambda *_: flags.append(True))  # as the host's LogCallback in the board
    try:
        with pytest.raises(SystemExit) as ended:
            run(recipe(max_samples=8, per_device_eval_batch_size=2))
        assert ended.value.code == 0 and not flags and scored == [2, 2]
        signal.raise_signal(signal.SIGABRT)
        assert flags, "the host's handler is back"
        run(recipe(max_samples=8, per_device_eval_batch_size=2))
    finally:
        signal.signal(signal.SIGABRT, before)
    assert scored[2:] == [2, 2, 2, 2], "two of the eight rows had been scored: they are checked, six are left"
    told = [re.match(r"Scoring the reference: (\d) of (\d) rows\.$", message) for message in host_log]
    assert [m.groups() for m in told if m] == [("2", "8"), ("2", "6"), ("4", "6"), ("6", "6")]


@pytest.mark.parametrize("pref_loss", ["sigmoid", "orpo"])
def test_abort_before_the_first_step(recipe, tuner, tmp_path, monkeypatch, pref_loss):
    """Obey what was pressed while rows were read or the model was loaded, which the host's handler only notes."""
    from llamafactory.train.callbacks import LogCallback

    from solopo_plugin import workflow
    from solopo_plugin.trainer import SoloTrainer

    host, load_model, scored = LogCallback(), workflow.load_model, []
    monkeypatch.setattr(workflow, "load_model", lambda *a: signal.raise_signal(signal.SIGABRT) or load_model(*a))
    monkeypatch.setattr(SoloTrainer, "score_pair", lambda *a: scored.append(a))
    before = signal.signal(signal.SIGABRT, host._set_abort)
    try:
        with pytest.raises(SystemExit) as ended:
            args = recipe(max_samples=4, pref_loss=pref_loss, output_dir=str(tmp_path / "out"))
            tuner.run_exp(args, callbacks=[host])
        assert signal.getsignal(signal.SIGABRT) == host._set_abort
    finally:
        signal.signal(signal.SIGABRT, before)
    assert ended.value.code == 0 and host.aborted and not scored
    assert not [*tmp_path.glob("out/*.safetensors")]
