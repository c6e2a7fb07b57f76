"""Launching: the stage starts every way the host starts its own, and the host's own stages do not notice the plugin.

What is tried by `launch` starts the real command line in a new interpreter, where only the interpreter-start hook can
bring the plugin in. Each start costs about ten seconds of imports, so each shows several things.
"""

import json
import logging
import re
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import outcome, write_recipe

from solopo_plugin import __version__
from solopo_plugin.args import FIELDS
from solopo_plugin.host.versions import INSTALL, TESTED

ACTIVE = f"solopo_plugin {__version__} is active in LLaMA-Factory {version('llamafactory')}."


@pytest.fixture
def launch(cli):
    """`cli` in a new interpreter."""
    return partial(cli, fresh=True)


@pytest.fixture
def small(recipe):
    """Four rows, two steps, and a loss without a reference model, which would be loaded too."""
    base = dict(pref_loss="orpo", max_samples=4, gradient_accumulation_steps=1, num_train_epochs=1.0)
    return lambda **changes: recipe(**(base | changes))


def assert_trained(out: str, output_dir: Path, alpha: float, steps: int) -> None:
    """One line said that the plugin is active, the run ended after `steps`, and its loss has the given alpha.

    loss = L_PO + alpha * alignment; each of the three is logged as the fp32 mean of two examples, so the sum holds to
    a few units in the last place of a loss near 6. The alignment is some 1e-3, so that another alpha would show.
    """
    assert out.count(ACTIVE) == 1, out[-3000:]
    assert out.count(" is active in LLaMA-Factory") == 1
    log = [entry for entry in outcome(output_dir).log if "loss" in entry]
    assert [entry["step"] for entry in log] == list(range(1, steps + 1))
    for entry in log:
        assert entry["solopo/align_loss"] > 1e-4
        expected = entry["solopo/po_loss"] + alpha * entry["solopo/align_loss"]
        assert entry["loss"] == pytest.approx(expected, rel=1e-6)


# ---- the ways in


@pytest.mark.slow
def test_yaml_with_overrides(launch, small, tmp_path):
    """The file says alpha 1 for two steps; the command line says 2 and one step, and wins."""
    recipe = write_recipe(tmp_path / "recipe.yaml", small(solopo_alpha=1.0, max_steps=2))
    out = launch("train", recipe, "solopo_alpha=2", "max_steps=1").out
    assert_trained(out, tmp_path / "out", alpha=2, steps=1)


@pytest.mark.slow
def test_lmf_and_json_with_overrides(cli, small, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(small(solopo_alpha=1.0)))
    out = cli("train", str(recipe), "solopo_alpha=0.5", program="lmf").out
    assert_trained(out, tmp_path / "out", alpha=0.5, steps=2)


@pytest.mark.slow
def test_arguments_without_a_file(cli, small, tmp_path):
    arguments = [text for key, value in small(solopo_alpha=3).items() for text in (f"--{key}", str(value))]
    assert arguments[arguments.index("--stage") + 1] == "solopo"
    out = cli("train", *arguments).out
    assert_trained(out, tmp_path / "out", alpha=3, steps=2)


@pytest.mark.slow
def test_torchrun_workers(launch, small, tmp_path):
    """Two ranks, each a new interpreter that torchrun starts; only the first says that the plugin is active."""
    recipe = small(ddp_backend="gloo", per_device_train_batch_size=1, solopo_alpha=2)
    out = launch(
        "train", write_recipe(tmp_path / "recipe.yaml", recipe), FORCE_TORCHRUN="1", NPROC_PER_NODE="2"
    ).out  # fmt: skip
    assert out.count("Initializing 2 distributed tasks") == 1
    assert set(re.findall(r"Process rank: (\d), world size: 2", out)) == {"0", "1"}
    assert_trained(out, tmp_path / "out", alpha=2, steps=2)


@pytest.mark.slow
def test_help_shows_our_arguments(cli):
    out = cli("train", "-h").out
    options = dict(re.findall(r"^  --(\w+)(.*?)(?=^  -|^\w|\Z)", out, re.M | re.S))
    assert set(FIELDS) <= set(options)
    for name, field in FIELDS.items():
        text = " ".join(options[name].split())
        assert " ".join(field.metadata["help"].split())[:40] in text, name
        assert f"(default: {field.default})" in text, name
    assert "solopo" in re.search(r"\{pt,sft,.*?\}", options["stage"]).group()


@pytest.mark.slow
def test_version(cli):
    assert f"version {version('llamafactory')}" in cli("version").out


# ---- the ways not in


def fake_metadata(folder: Path, package: str, number: str) -> None:
    info = folder / f"{package}-{number}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {number}\n")


@pytest.mark.slow
def test_another_version_of_the_host(launch, small, tmp_path):
    """One line says what to install; then the host speaks for itself, as it would without us."""
    fake_metadata(tmp_path / "path", "llamafactory", "0.9.6")
    recipe = write_recipe(tmp_path / "recipe.yaml", small(solopo_alpha=2.0))
    done = launch("train", recipe, check=False, PYTHONPATH=str(tmp_path / "path"))
    assert done.returncode == 1
    (warning,) = re.findall(r"^.*solopo_plugin is inactive.*$", done.out, re.M)
    assert "0.9.6" in warning and f'pip install "llamafactory=={TESTED[-1]}"' in warning
    assert done.out.strip().endswith("not used by the HfArgumentParser: ['solopo_alpha']")


@pytest.mark.slow
def test_torchaudio_of_another_torch(launch, small, tmp_path):
    """What a plain `pip install llamafactory` leads to: torchaudio does not load, and the host cannot start."""
    (tmp_path / "path" / "torchaudio").mkdir(parents=True)
    (tmp_path / "path" / "torchaudio" / "__init__.py").write_text(
        "raise RuntimeError('Detected that PyTorch and TorchAudio were compiled with different CUDA versions.')\n"
    )
    fake_metadata(tmp_path / "path", "torch", "2.15.0")
    recipe = write_recipe(tmp_path / "recipe.yaml", small())
    done = launch("train", recipe, check=False, PYTHONPATH=str(tmp_path / "path"))
    assert done.returncode == 1
    *_, error, note = done.out.strip().splitlines()
    assert error.startswith("RuntimeError: Detected that PyTorch and TorchAudio"), done.out[-3000:]
    assert note.endswith(f"this environment has torch 2.15.0. Run: {INSTALL}")


# ---- the host's own stages

DURATION = r"(?:train|eval)_(?:runtime|samples_per_second|steps_per_second)"


def spoken(out: str) -> list[str]:
    """A run's output without what differs between two runs of the same program: clock, durations, progress bars."""
    out = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(,\d{3})?", "CLOCK", out.replace("\x1b[A", ""))
    out = re.sub(r"[^\r\n]*?\d+%\|[^\]\r\n]*\]", "\n", out)
    out = re.sub(rf"({DURATION}\W+)[\d:.]+", r"\1DURATION", out)
    lines = (" ".join(line.split()) for line in re.split(r"[\r\n]+", out))  # the widest duration sets a column's width
    return [line for line in lines if line]


def written(folder: Path) -> dict[str, bytes]:
    """Every file of a run; JSON without its durations."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            content = re.sub(rf'("{DURATION}": )[\d.e-]+'.encode(), rb"\1DURATION", content)
            content = re.sub(rb'("(?:elapsed|remaining)_time": )"[^"]*"', rb"\1DURATION", content)
        files[str(path.relative_to(folder))] = content
    return files


STAGES = {"dpo": ("demo_short_po", "rewards/margins"), "sft": ("demo_sft_expand_long", "loss")}
TRAIN = """import json, sys
from llamafactory.cli import main
folder, *refused = sys.argv[1:]
for stage in ("dpo", "sft"):
    sys.argv = ["llamafactory-cli", "train", f"{folder}/{stage}.yaml"]
    main()
print("TRAINED", flush=True)
from llamafactory.train.tuner import run_exp
for recipe in map(json.loads, refused):
    try: run_exp(recipe)
    except ValueError as error: print("REFUSED", error)
print("LOADED", [m for m in sys.modules if m.startswith("solopo_plugin.") and "startup" not in m])
"""


@pytest.mark.slow
def test_other_stages_are_as_without_the_plugin(launch, recipe, small, tmp_path):
    """Byte for byte: weights, optimiser, curves, model card and every other file, and all that is printed.

    Switched off, the host is alone: it knows neither our keys nor the stage, in its own words.
    """
    for stage, (dataset, _) in STAGES.items():
        keys = dict(num_train_epochs=1.0, val_size=4, eval_strategy="epoch", do_eval=True, save_strategy="epoch")
        keys |= dict(stage=stage, dataset=dataset, plot_loss=True, output_dir=str(tmp_path / "out" / stage))
        write_recipe(tmp_path / f"{stage}.yaml", recipe(**keys))
    refused = [json.dumps(small(output_dir=str(tmp_path / "refused"), **more)) for more in ({"solopo_alpha": 2.0}, {})]
    runs, rest = {}, {}
    for plugin in ("on", "off"):
        out = launch(
            "-c", TRAIN, str(tmp_path), *(refused if plugin == "off" else ()), program="python", SOLOPO_PLUGIN=plugin,
            PYTHONUNBUFFERED="1", PYTHONHASHSEED="0", HF_DATASETS_CACHE=str(tmp_path / f"cache_{plugin}"),
        ).out  # fmt: skip
        (tmp_path / "out").rename(tmp_path / plugin)  # both wrote to the same path, which they print
        trained, rest[plugin] = out.split("TRAINED")
        runs[plugin] = spoken(trained), written(tmp_path / plugin)
    (said_on, files_on), (said_off, files_off) = runs["on"], runs["off"]
    assert files_on.keys() == files_off.keys()
    assert [name for name in files_on if files_on[name] != files_off[name]] == []
    assert said_on == said_off
    assert not any("solopo_plugin" in line for line in said_on)
    for stage, (_, log) in STAGES.items():
        assert {f"{stage}/{n}" for n in ("model.safetensors", "trainer_state.json", "README.md")} < files_on.keys()
        training = [entry for entry in outcome(tmp_path / "on" / stage).log if "loss" in entry]
        assert len(training) == 2 and all(log in entry for entry in training)

    assert re.findall(r"^REFUSED (.*)$", rest["off"], re.M) == [
        "Some keys are not used by the HfArgumentParser: ['solopo_alpha']",
        "Unknown task: solopo.",
    ]
    assert "LOADED []" in rest["off"] and "LOADED ['solopo_plugin." in rest["on"]


# ---- in this process


def test_run_exp_from_python(run, small, caplog):
    """`run_exp(dict)`, twice in one process: each run says once that the plugin is active."""
    logger = logging.getLogger("llamafactory")  # has its own handler and does not propagate to the root
    logger.addHandler(caplog.handler)
    try:
        for alpha in (2.0, 0.5):
            caplog.clear()
            args = small(solopo_alpha=alpha)
            run(args)
            assert_trained(caplog.text, Path(args["output_dir"]), alpha=alpha, steps=2)
    finally:
        logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("form", ["--solopo_alpha 2", "--solopo-alpha 2", "--solopo_alpha=2", "--solopo-alpha=2"])
@pytest.mark.parametrize("stage", ["--stage solopo", "--stage=solopo"])
def test_every_spelling_of_an_argument(tmp_path, stage, form):
    """What `-h` lists can be given: the host's parser has a spelling with dashes, and takes `=` or a space."""
    from llamafactory.hparams import get_train_args

    common = f"--model_name_or_path unused --do_train --dataset demo_solopo --output_dir {tmp_path / 'out'} --use_cpu"
    arguments = [*common.split(), "--template", "qwen", "--pref_loss", "orpo", *stage.split(), *form.split()]
    finetuning_args = get_train_args(arguments)[3]
    assert finetuning_args.stage == "solopo" and finetuning_args.solopo_alpha == 2.0


@pytest.mark.parametrize(
    "form, sentence",
    [("--solopo_alfa 2", "Did you mean `solopo_alpha`"), ("--solopo-alfa=2", "Did you mean `solopo_alpha`"),
     ("--solopo_alpha -1", r"`solopo_alpha` must be a number >= 0, got -1.0")],
)  # fmt: skip
def test_bad_arguments_are_refused(tmp_path, form, sentence):
    from llamafactory.hparams import get_train_args

    arguments = f"--model_name_or_path unused --stage solopo --output_dir {tmp_path / 'out'} --use_cpu {form}"
    with pytest.raises(ValueError, match=sentence):
        get_train_args(arguments.split())
