"""The recipes under examples/yaml/: as generated, complete, marked with origins, and accepted by the host's own parser.

Parsing a recipe starts a process group, a DeepSpeed config and seeds: it happens in one fresh interpreter (this file
run as a script), which also is what a user's shell starts. All recipes take a few seconds there, most of it imports.
"""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from enum import Enum
from pathlib import Path

import pytest
import yaml

from solopo_plugin.synthesis.export import ENTRIES

ROOT = Path(__file__).resolve().parent.parent
YAML = ROOT / "examples/yaml"
DEMO = YAML / "demo_solo_orpo.yaml"
FOLDERS = ("qwen2.5-7b", "llama3.1-8b", "lora")
RECIPES = sorted(p.relative_to(YAML).as_posix() for f in FOLDERS for p in (YAML / f).rglob("*.yaml"))
ABLATIONS = [name for name in RECIPES if "/ablations/" in name]
LAB = sorted(p.relative_to(YAML).as_posix() for p in (YAML / "lab").rglob("*.yaml"))  # also tests/lab
PARSED = RECIPES + [DEMO.name] * DEMO.exists() + LAB
ORIGIN = re.compile(r"  # (paper|host default|ours|LongPO README)(; .+)?$")


def lines(name: str) -> list[str]:
    return (YAML / name).read_text(encoding="utf-8").splitlines()


def keys(name: str) -> dict:
    return yaml.safe_load((YAML / name).read_text(encoding="utf-8"))


# What is there


def test_count():
    # Qwen: 3 SoLo + (SFT + 3 losses) x 3 data sets + LongPO = 16, ablations 3 x (both, kl, 4 alphas) = 18.
    # Llama: 1 SoLo + (SFT + 1 loss) x 3 data sets + LongPO = 8, ablations 1 x 6. LoRA: 1.
    assert len(RECIPES) == 16 + 18 + 8 + 6 + 1 == 49
    assert len(ABLATIONS) == 24
    stray = {p.relative_to(YAML).as_posix() for p in YAML.rglob("*.y*ml")} - set(RECIPES) - {DEMO.name} - set(LAB)
    stray -= {p.relative_to(YAML).as_posix() for p in (YAML / "data").glob("*.yaml")}  # tests/qa/test_questions.py
    stray -= {p.relative_to(YAML).as_posix() for p in (YAML / "eval").glob("*.yaml")}  # tests/evaluation
    assert not stray, f"recipes that no test looks at: {stray}"


def generator(arguments: list[str], monkeypatch, root: Path) -> int:
    spec = importlib.util.spec_from_file_location("make_recipes", ROOT / "scripts/make_recipes.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "make_recipes", module)  # its dataclass looks its module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(sys, "argv", ["make_recipes.py", *arguments])
    return module.main()


def test_files_are_what_the_generator_gives(monkeypatch, capsys):
    assert generator(["--check"], monkeypatch, ROOT) == 0, capsys.readouterr().out


def test_check_names_what_is_wrong(monkeypatch, capsys, tmp_path):
    shutil.copytree(YAML, tmp_path / "examples/yaml")
    folder = tmp_path / "examples/yaml/lora"
    recipe, stale = folder / "qwen2.5-7b_solo_orpo_lora.yaml", folder / "old.yaml"

    recipe.write_text(recipe.read_text(encoding="utf-8").replace("lora_rank: 16", "lora_rank: 8"), encoding="utf-8")
    stale.write_text("stage: dpo\n", encoding="utf-8")
    assert generator(["--check"], monkeypatch, tmp_path) == 1
    out = capsys.readouterr().out
    assert out == f"should not exist: examples/yaml/lora/old.yaml\ndiffers: examples/yaml/lora/{recipe.name}\n"

    recipe.unlink(), stale.unlink()
    assert generator(["--check"], monkeypatch, tmp_path) == 1
    assert capsys.readouterr().out == f"missing: examples/yaml/lora/{recipe.name}\n"

    assert generator([], monkeypatch, tmp_path) == 0  # writes it again
    assert recipe.read_bytes() == (YAML / "lora" / recipe.name).read_bytes()


# What a recipe says


@pytest.mark.parametrize("name", RECIPES)
def test_every_number_has_an_origin(name):
    text = "\n".join(lines(name))
    values = keys(name)
    unmarked = [
        line
        for line in lines(name)
        if (m := re.match(r"(\w+): ", line)) and type(values[m[1]]) in (int, float) and not ORIGIN.search(line)
    ]
    assert not unmarked
    assert sum(type(v) in (int, float) for v in values.values()) >= 8  # none hides as text, as PyYAML reads 1e-6
    assert "published, not reproduced here" in text or "LongBenchV1 QA avg" not in text


@pytest.mark.parametrize("name", RECIPES)
def test_header(name):
    header = "\n".join(line for line in lines(name) if line.startswith("# "))
    gpus = 1 if name.startswith("lora/") else 4
    launch = "CUDA_VISIBLE_DEVICES=0" if gpus == 1 else f"FORCE_TORCHRUN=1 NPROC_PER_NODE={gpus}"
    assert f"# {launch} llamafactory-cli train examples/yaml/{name}\n" in header
    assert "# Not run at 7B by this project.\n" in header
    assert "# Not shipped: " in header
    assert f"# Data: {keys(name)['dataset']}: " in header
    assert all(len(line) <= 120 for line in lines(name))
    batch = keys(name)["per_device_train_batch_size"] * keys(name)["gradient_accumulation_steps"] * gpus
    assert batch == 64


def test_alphas_of_the_paper():
    main = {n: keys(n)["solopo_alpha"] for n in RECIPES if re.search(r"/solo_\w+\.yaml$", n) and n not in ABLATIONS}
    assert main == {
        "qwen2.5-7b/solo_dpo.yaml": 3,
        "qwen2.5-7b/solo_simpo.yaml": 1,
        "qwen2.5-7b/solo_orpo.yaml": 1,
        "llama3.1-8b/solo_orpo.yaml": 4,
    }


ROW = re.compile(r"^# Reproduces: SoLoPO \(arXiv:2505\.11166\), Table 3, row (.+)\.$", re.M)
NUMBERS = re.compile(r"^# LongBenchV1 QA avg ([\d.]+), RULER QA avg ([\d.]+): published, not reproduced here\.$", re.M)
TABLE_3 = {  # of the paper: model -> row -> averages of LongBench v1 QA and RULER QA
    "qwen2.5-7b": {
        "SFT, short": "38.6 48.7", "SFT, long": "45.3 59.5", "LongPO": "43.7 52.2",
        "DPO, short": "43.2 56.6", "DPO, long": "46.9 62.2", "SoLo-DPO": "47.8 62.8",
        "SimPO, short": "44.1 56.0", "SimPO, long": "44.6 57.5", "SoLo-SimPO": "48.4 63.9",
        "ORPO, short": "38.6 57.1", "ORPO, long": "45.3 55.1", "SoLo-ORPO": "49.5 65.1",
    },
    "llama3.1-8b": {
        "SFT, short": "44.6 59.2", "SFT, long": "46.1 58.4",
        "ORPO, short": "44.1 58.4", "ORPO, long": "45.4 58.9", "SoLo-ORPO": "46.3 61.3",
    },
}  # fmt: skip


def test_a_header_cites_the_papers_row_with_its_numbers_or_none():
    """Who reproduces a row is named like it; all else says whose idea it is, and cites no table."""
    cited = {model: {} for model in TABLE_3}
    for name in RECIPES:
        text = "\n".join(lines(name))
        row, numbers = ROW.findall(text), NUMBERS.findall(text)
        assert len(row) == len(numbers) <= 1 and text.count("Table") == len(row)
        if row:
            model, recipe = name.removesuffix(".yaml").split("/")
            assert row[0].lower().replace(", ", "_").replace("-", "_") == recipe
            cited[model][row[0]] = " ".join(numbers[0])
        elif not name.startswith("lora/") and "_alpha_" not in name:
            follows = re.findall(r"^# (Follows|Not in) SoLoPO \(arXiv:2505\.11166\)", text, re.M)
            assert follows == ["Not in" if name == "llama3.1-8b/longpo.yaml" else "Follows"], name
    assert cited == TABLE_3


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation_changes_its_own_key(name):
    """And SoLo-KL the weight, where rewards are beta times log-probs: to alpha x beta, which pulls as hard as alpha."""
    model, recipe = name.split("/")[0], Path(name).stem
    main, study = re.fullmatch(r"(solo_[a-z]+)_(both|kl|alpha_[\d.]+)", recipe).groups()
    before, after = keys(f"{model}/{main}.yaml"), keys(name)
    assert before.keys() == after.keys()
    changed = {k: v for k, v in after.items() if v != before[k]}
    assert changed.pop("output_dir") == f"saves/{model}/{recipe}"
    assert f"# Differs from ../{main}.yaml in {', '.join(changed)} and output_dir only." in lines(name)
    expected = {"both": {"solopo_align_on": "both"}, "kl": {"solopo_align": "logp"}}
    if study == "kl" and main != "solo_orpo":
        assert changed.pop("solopo_alpha") == pytest.approx(before["solopo_alpha"] * before["pref_beta"], rel=1e-12)
    assert changed == expected.get(study) or changed == {"solopo_alpha": float(study.removeprefix("alpha_"))}


def test_only_the_papers_alpha_is_tagged_as_the_papers():
    """It is known for SoLo-RA on the chosen response; what an ablation ran with is not."""
    tagged = re.compile(r"^solopo_alpha: .*  # (paper|ours)(.*)$", re.M)
    tags = {name: found[0] for name in RECIPES if (found := tagged.findall((YAML / name).read_text(encoding="utf-8")))}
    assert len(tags) == 4 + 24 + 1
    for name, (tag, more) in tags.items():
        known = name not in ABLATIONS or name.endswith("_both.yaml")
        assert tag == ("paper" if known else "ours"), name
        assert ("is not known to us" in more) == bool(re.search(r"_(both|orpo_kl)\.yaml$", name)), name


@pytest.mark.parametrize("name", [n for n in RECIPES if re.search(r"^[^/]+/(solo|dpo|simpo|orpo)_", n)])
def test_loss_and_data_belong_to_the_name(name):
    """A baseline differs from the SoLo recipe of its loss in stage and data, never in rate, beta or optimizer."""
    model, recipe = name.split("/")[0], Path(name).stem
    head, tail = recipe.split("_", 1)
    method, data = (tail, "solopo") if head == "solo" else (head, f"{tail}_po")
    own = keys(name)
    assert own["pref_loss"] == {"dpo": "sigmoid", "simpo": "simpo", "orpo": "orpo"}[method]
    assert own["dataset"] == f"musique_{model.replace('-', '_')}_{data}"
    twin = keys(f"{model}/solo_{method}.yaml")
    free = {"stage", "dataset", "cutoff_len", "output_dir", "solopo_alpha", "solopo_align", "solopo_align_on"}
    assert {k: v for k, v in own.items() if k not in free} == {k: v for k, v in twin.items() if k not in free}


def test_recipes_ask_for_all_that_the_pipeline_registers_and_no_more():
    named = {re.fullmatch(r"musique_(?:qwen2\.5_7b|llama3\.1_8b)_(\w+)", keys(name)["dataset"])[1] for name in RECIPES}
    assert named == set(ENTRIES)


def test_no_two_recipes_write_to_one_folder():
    assert len({keys(name)["output_dir"] for name in RECIPES}) == len(RECIPES)


@pytest.mark.parametrize("file", sorted(p.name for p in (YAML / "deepspeed").iterdir()))
def test_deepspeed_file(file):
    config = json.loads((YAML / "deepspeed" / file).read_text(encoding="utf-8"))
    stage, offload = re.fullmatch(r"ds_z([23])(_offload)?\.json", file).groups()
    zero = config["zero_optimization"]
    assert zero["stage"] == int(stage)
    assert ("offload_optimizer" in zero) == bool(offload)
    assert zero.get("stage3_gather_16bit_weights_on_model_save", False) == (stage == "3")  # else checkpoints are empty
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert config[key] == "auto"


def test_deepspeed_of_recipes():
    assert len(list((YAML / "deepspeed").iterdir())) == 4
    for name in RECIPES:
        own = keys(name)
        if name.startswith("lora/"):
            assert "deepspeed" not in own
            continue
        zero = json.loads((ROOT / own["deepspeed"]).read_text(encoding="utf-8"))["zero_optimization"]
        # accelerate puts DeepSpeed's CPU Adam in the place of any other optimizer once optimizer states are offloaded
        assert own["optim"] == "adamw_torch" or "offload_optimizer" not in zero


# What the host makes of it


def plain(value):
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list):  # the host splits "a,b" at commas; ours name one each, and report_to none becomes []
        return ",".join(map(str, value)) or "none"
    return value


def parse_all() -> dict:
    """Every recipe through `get_train_args`. For each, the keys of the file as the host's dataclasses hold them.

    One override: `use_cpu`, without which a machine without GPU refuses `bf16`. A process group of one stands for
    torchrun, without which the host refuses `deepspeed`.
    """
    from llamafactory.hparams.parser import get_train_args
    from omegaconf import OmegaConf

    results = {}
    for name in PARSED:
        recipe = OmegaConf.to_container(OmegaConf.load(YAML / name))  # as the host reads the file of a command line
        groups = get_train_args(dict(recipe, use_cpu=True))
        held = {k: plain(getattr(next(g for g in groups if hasattr(g, k)), k)) for k in recipe if k != "use_cpu"}
        train = groups[2]
        held |= {"warmup of 79": train.get_warmup_steps(79), "bf16": train.bf16}
        if train.deepspeed:
            held["zero3"] = train.hf_deepspeed_config.is_zero3()
        results[name] = held
    return results


@pytest.fixture(scope="module")
def parsed(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("recipes") / "parsed.json"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    env = dict(os.environ, **one, MASTER_PORT=str(port), TOKENIZERS_PARALLELISM="false")
    done = subprocess.run(
        [sys.executable, __file__, out], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "deprecated" not in done.stderr
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PARSED)
def test_the_host_takes_every_key(parsed, name):
    held = parsed[name]
    for key, value in keys(name).items():
        if key != "use_cpu":
            assert held[key] == value, key


@pytest.mark.parametrize("name", RECIPES)
def test_warmup_and_zero_mean_what_they_should(parsed, name):
    assert parsed[name]["warmup of 79"] == 8  # a share of the steps, rounded up, not 0.1 steps
    assert parsed[name].get("zero3", True)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(parse_all()), encoding="utf-8")
