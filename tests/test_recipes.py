"""The recipes under examples/yaml/ and the runs of its README: complete, marked with origins, accepted by the host.

Parsing a recipe starts a process group, a DeepSpeed config and seeds: it happens in one process of its own (this file
run as a script). All recipes take a few seconds there.
"""

import json
import os
import re
import socket
import sys
from enum import Enum
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from override_table import YAML, Run, runs

from solopo_plugin.evaluation.published import PUBLISHED
from solopo_plugin.synthesis.export import ENTRIES

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts" / "lab"))
from arms import arms  # noqa: E402
from arms import recipe as lab_recipe  # noqa: E402

DEMO = YAML / "demo_solo_orpo.yaml"
FOLDERS = ("qwen2.5-7b", "llama3.1-8b", "long")
FILES = sorted(p.relative_to(YAML).as_posix() for f in FOLDERS for p in (YAML / f).rglob("*.yaml"))
RUNS: dict[str, Run] = {  # output_dir below saves/ -> the row of the README's table
    re.fullmatch(r"output_dir=saves/(.+)", run.overrides[-1])[1]: run
    for run in runs()
    if not run.recipe.startswith("data/")
}
RECIPES = [*FILES, *RUNS]
ABLATIONS = [name for name in RUNS if "/solo_" in name]
LAB = {f"lab/{task}/{name}": lab_recipe(task, name) for task in ("recall", "two_hop") for name in arms(task)}
PARSED = [*RECIPES, DEMO.name, *LAB]
ORIGIN = re.compile(r"  # (paper|host default|ours|LongPO README)(; .+)?$")


def lines(name: str) -> list[str]:
    return (YAML / name).read_text(encoding="utf-8").splitlines()


def keys(name: str) -> dict:
    """A file's keys, or those of a run: its recipe's with the overrides in their place, merged as the host does."""
    if name in LAB:
        return LAB[name]
    run = RUNS.get(name, Run(name, [], "", ""))
    return OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(YAML / run.recipe), OmegaConf.from_cli(run.overrides)))


# What is there


def test_count():
    # Table 3: 12 runs of Qwen, 5 of Llama, of which 4 are in the table. Long: 2. Also in the table: expand-long 4 + 2,
    # aligning both 3 + 1, KL 3 + 1, four alphas of each SoLo, LongPO on Llama, self-distillation.
    assert len(FILES) == 12 + 1 + 2 == 15
    assert len(RUNS) == 4 + 6 + 4 + 4 + 16 + 1 + 1 == 36
    assert len(ABLATIONS) == 25
    stray = {p.relative_to(YAML).as_posix() for p in YAML.rglob("*.y*ml")} - set(FILES) - {DEMO.name}
    stray -= {p.relative_to(YAML).as_posix() for p in (YAML / "data").glob("*.yaml")}  # tests/qa/test_questions.py
    stray -= {p.relative_to(YAML).as_posix() for p in (YAML / "eval").glob("*.yaml")}  # tests/evaluation
    stray -= {p.relative_to(YAML).as_posix() for p in (YAML / "lab").rglob("*.yaml")}  # tests/lab
    stray -= {p.relative_to(YAML).as_posix() for p in (YAML / "handbook").glob("*.yaml")}  # tests/synthesis
    stray -= {p.relative_to(YAML).as_posix() for p in (YAML / "story").glob("*.yaml")}  # tests/e2e/test_story.py
    stray -= {p.relative_to(YAML).as_posix() for p in (YAML / "models").glob("*.yaml")}  # tests/test_model_recipes.py
    assert not stray, f"recipes that no test looks at: {stray}"


def test_every_run_of_the_table_is_a_file_with_other_keys():
    for name, run in RUNS.items():
        assert run.recipe in FILES, name
        before, after = OmegaConf.to_container(OmegaConf.load(YAML / run.recipe)), keys(name)
        assert before.keys() == after.keys(), "an override of a key that the recipe has not"
        changed = {key: value for key, value in after.items() if value != before[key]}
        assert changed == OmegaConf.to_container(OmegaConf.from_cli(run.overrides)), "an override that changes nothing"


# Lines that every run of the paper has, whatever its model, method and data: the files are kept by hand.
SHARED = """\
flash_attn: fa2  # paper
do_train: true
finetuning_type: full  # paper
dataset_dir: data
logging_steps: 1  # ours
save_strategy: steps  # ours
save_steps: 20  # ours; of 79. The paper picks the checkpoint by LongBenchV1 QA, a test set
save_total_limit: 2  # ours; of over 100 GB each: a killed run resumes. All four: save_only_model
plot_loss: true
report_to: none
per_device_train_batch_size: 1  # ours
gradient_accumulation_steps: 16  # ours; x 4 GPUs = 64 rows a step, which is the paper's
num_train_epochs: 1.0  # paper
bf16: true  # paper
ddp_timeout: 180000000  # ours; seconds, the other ranks wait while one tokenises""".splitlines()
NOT_LONGPO = """\
deepspeed: examples/yaml/deepspeed/ds_z3_offload.json  # paper
optim: adamw_torch  # paper
lr_scheduler_type: cosine  # paper
warmup_steps: 0.1  # paper; warmup_ratio, which transformers 5 spells as a warmup_steps below 1""".splitlines()
OF_MODEL = {
    "qwen2.5-7b": ["model_name_or_path: Qwen/Qwen2.5-7B-Instruct  # paper", "template: qwen"],
    "llama3.1-8b": ["model_name_or_path: meta-llama/Llama-3.1-8B-Instruct  # paper", "template: llama3"],
}
LONG = {  # recipe -> lines that it alone has; tests/test_plan.py looks at the figures of its header
    "long/qwen2.5-7b_64k.yaml": (
        "gradient_accumulation_steps: 32  # ours; x 2 rows at a time = 64 rows a step, which is the paper's",
        "solopo_sequence_parallel: 2  # ours",
        "cutoff_len: 65536  # ours; the model's window, with YaRN",
    ),
    "long/llama3.1-8b_128k.yaml": (
        "gradient_accumulation_steps: 64  # ours; x 1 row at a time = 64 rows a step, which is the paper's",
        "solopo_sequence_parallel: 4  # ours",
        "cutoff_len: 131072  # ours; the model's window",
    ),
}
RATES = {"sft": 1e-5, "dpo": 5e-7, "simpo": 1e-6, "orpo": 5e-6, "longpo": 5e-7}


@pytest.mark.parametrize("name", LONG)
def test_long_recipes_are_the_papers_run_but_for_what_they_say(name):
    """Of the model's SoLo-ORPO; the batch is the paper's, whose rows are shared by groups of the 4 GPUs."""
    assert {path for path in FILES if path.startswith("long/")} == set(LONG) and set(LONG[name]) <= set(lines(name))
    model, size = re.fullmatch(r"long/(.+)_(\d+k)\.yaml", name).groups()
    own, short = keys(name), keys(f"{model}/solo_orpo.yaml")
    changed = {key for key in {**own, **short} if own.get(key) != short.get(key)}
    other = {"deepspeed", "solopo_detach_short", "solopo_sequence_parallel", "dataset", "cutoff_len", "output_dir"}
    other |= {"gradient_accumulation_steps"} | ({"model_name_or_path"} if model == "qwen2.5-7b" else set())
    assert changed == other and own["solopo_detach_short"] is True
    assert own["deepspeed"] == "examples/yaml/deepspeed/ds_z3.json"
    assert own["gradient_accumulation_steps"] * 4 // own["solopo_sequence_parallel"] == 64
    assert own["cutoff_len"] == 1024 * int(size[:-1]) and own["output_dir"] == f"saves/long/{model}_{size}"
    assert own["dataset"] == short["dataset"].replace("_solopo", f"_{size}_solopo")


@pytest.mark.parametrize("name", [name for name in FILES if name not in LONG])
def test_files_share_what_the_papers_runs_share(name):
    held, folder = lines(name), Path(name).parent.name
    wanted = [*SHARED, *OF_MODEL[folder]]
    wanted += [] if name.endswith("/longpo.yaml") else NOT_LONGPO
    assert set(wanted) <= set(held)
    recipe, stem = keys(name), Path(name).stem
    assert recipe["learning_rate"] == next(rate for word, rate in reversed(RATES.items()) if word in stem)
    assert recipe["cutoff_len"] == (4096 if stem.endswith("_short") else 10240)
    assert recipe["output_dir"] == f"saves/{folder}/{stem}"
    assert recipe.get("pref_beta") == {"sft": None, "longpo": 0.01}.get(stem.split("_")[0], 0.1)
    assert recipe.get("simpo_gamma") == (0.5 if "simpo" in stem else None)


# What a recipe says


@pytest.mark.parametrize("name", FILES)
def test_every_number_has_an_origin(name):
    text = "\n".join(lines(name))
    values = yaml.safe_load(text)
    unmarked = [
        line
        for line in lines(name)
        if (m := re.match(r"(\w+): ", line)) and type(values[m[1]]) in (int, float) and not ORIGIN.search(line)
    ]
    assert not unmarked
    assert sum(type(v) in (int, float) for v in values.values()) >= 8  # none hides as text, as PyYAML reads 1e-6
    assert "published, not reproduced here" in text or "LongBenchV1 QA avg" not in text


def test_every_number_of_the_table_has_an_origin():
    for name, run in RUNS.items():
        numbers = [v for v in OmegaConf.to_container(OmegaConf.from_cli(run.overrides)).values() if type(v) is not str]
        assert len(numbers) <= 1, name
        if numbers:  # of an alpha also where it is the file's, which another run was known for
            assert run.numbers.startswith(f"alpha {numbers[0]:g}: "), name
        assert not run.numbers or run.numbers.startswith(f"alpha {keys(name)['solopo_alpha']:g}: "), name
        assert not run.numbers or ORIGIN.fullmatch("  # " + run.numbers.split(": ", 1)[1]), name


@pytest.mark.parametrize("name", FILES)
def test_header(name):
    header = "\n".join(line for line in lines(name) if line.startswith("# "))
    assert f"# FORCE_TORCHRUN=1 NPROC_PER_NODE=4 llamafactory-cli train examples/yaml/{name}\n" in header
    assert "# Not run at 7B by this project.\n" in header
    model = "llama3.1-8b" if "llama3.1-8b" in name else "qwen2.5-7b"
    assert "# Not shipped: " in header and f"build_data.py examples/yaml/data/{model}.yaml\n" in header
    assert f"# Data: {keys(name)['dataset']}: " in header
    assert all(len(line) <= 120 for line in lines(name))
    batch = keys(name)["per_device_train_batch_size"] * keys(name)["gradient_accumulation_steps"] * 4
    assert batch // keys(name).get("solopo_sequence_parallel", 1) == 64
    assert '".[deepspeed]"' in header
    assert ('pip install --no-build-isolation ".[flash-attn]"' in header) == (keys(name)["stage"] != "solopo")
    if name in LONG:
        size = name.removesuffix(".yaml").split("_")[1].upper()
        assert f"\n# with the overrides of its row of {size} in examples/yaml/README.md, " in header
        assert "Has not been run." in header and "# One GPU" not in header
    else:
        assert "# One GPU of 80 GB: NPROC_PER_NODE=1, and " in header and "gradient_accumulation_steps=64" in header
    assert f"plan.py --recipe examples/yaml/{name} " in header
    assert ("ds_z3_offload.json" in header) == name.endswith("/longpo.yaml")


EXTRAS = {"backend: vllm": "vllm", "quantization_bit:": "qlora", "harness_tasks:": "eval", "deepspeed:": "deepspeed"}


@pytest.mark.parametrize("path", sorted(YAML.rglob("*.yaml")), ids=lambda path: path.relative_to(YAML).as_posix())
def test_a_header_names_the_extras_that_its_keys_need(path):
    """As in the brackets of `pip install ".[vllm]"`."""
    text = path.read_text(encoding="utf-8")
    header = text[: text.index("\n\n")]
    for key, extra in EXTRAS.items():
        assert not re.search(f"^{key}", text, re.M) or f'".[{extra}]"' in header, extra


def test_alphas_of_the_paper():
    main = {n: keys(n)["solopo_alpha"] for n in FILES if re.search(r"/solo_[a-z]+\.yaml$", n)}
    assert main == {
        "qwen2.5-7b/solo_dpo.yaml": 3,
        "qwen2.5-7b/solo_simpo.yaml": 1,
        "qwen2.5-7b/solo_orpo.yaml": 1,
        "llama3.1-8b/solo_orpo.yaml": 4,
    }


ROW = re.compile(r"^# Reproduces: SoLoPO \(arXiv:2505\.11166\), Table 3, row (.+)\.$", re.M)
NUMBERS = re.compile(r"^# LongBenchV1 QA avg ([\d.]+), RULER QA avg ([\d.]+): published, not reproduced here\.$", re.M)
IN_TABLE = re.compile(  # what a row of the README says of a run of Table 3
    r"Table 3, row (.+): LongBenchV1 QA avg ([\d.]+), RULER QA avg ([\d.]+), published, not reproduced here"
)
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
    """Who reproduces a row is named like it; a run of the table says whose idea it follows, without a number."""
    cited = {model: {} for model in TABLE_3}
    for name in FILES:
        text = "\n".join(lines(name))
        row, numbers = ROW.findall(text), NUMBERS.findall(text)
        assert len(row) == len(numbers) <= 1 and text.count("Table") == len(row)
        assert bool(row) != name.startswith("long/")
        if row:
            model, recipe = name.removesuffix(".yaml").split("/")
            assert row[0].lower().replace(", ", "_").replace("-", "_") == recipe
            cited[model][row[0]] = " ".join(numbers[0])
    for name, run in RUNS.items():
        if found := IN_TABLE.fullmatch(run.what):
            model, recipe = name.split("/")
            assert found[1].lower().replace(", ", "_") == recipe and run.recipe == f"qwen2.5-7b/{recipe}.yaml"
            cited[model][found[1]] = f"{found[2]} {found[3]}"
    assert cited == TABLE_3
    doubtful = [name for name in FILES if "doubtful" in (YAML / name).read_text(encoding="utf-8")]
    assert doubtful == ["qwen2.5-7b/orpo_long.yaml", "qwen2.5-7b/orpo_short.yaml"]
    page = (YAML / "README.md").read_text(encoding="utf-8")
    assert "What the paper's runs of these scored is not known to us, but for\nthose of its Table 3." in page
    others = [line for line in page.splitlines() if not re.search(rf"\| {IN_TABLE.pattern} \|", line)]
    assert not re.search(r"\b\d\d\.\d\b", "\n".join(others))
    kinds = {
        "expand_long": {"Expand-Long-SFT, section 2.2", 'the non-decoupled comparison "expand-long PO"'},
        "both": {"the ablation that aligns the rejected response as well"},
        "kl": {"the ablation SoLo-KL (eq. 10): log-probs, not rewards, are aligned"},
        "alpha": {"a sweep of our choosing: the paper's grid is not known to us"},
        "longpo": {"not in the paper, whose LongPO is on Qwen2.5-7B"},
    }
    for kind, said in kinds.items():
        assert {run.what for name, run in RUNS.items() if kind in name} == said


@pytest.mark.parametrize(
    "name", [name for name, run in RUNS.items() if name.startswith("llama") and "qwen" in run.recipe]
)
def test_a_run_of_llama_is_qwens_with_model_data_and_folder(name):
    model, template = (line.split("  # ")[0].replace(": ", "=") for line in OF_MODEL["llama3.1-8b"])
    data = keys(RUNS[name].recipe)["dataset"].replace("qwen2.5_7b", "llama3.1_8b")
    data = data.replace("_long", "_expand_long") if "expand" in name else data
    assert RUNS[name].overrides == [model, template, f"dataset={data}", f"output_dir=saves/{name}"]


def test_published_numbers_stand_once_more_in_the_evaluation():
    """A header's numbers are those that the evaluation puts beside measured ones."""
    known = {row.name: row.averages for row in PUBLISHED}
    for model, prefix in (("qwen2.5-7b", "Qwen2.5-7B"), ("llama3.1-8b", "Llama3.1-8B")):
        for row, numbers in TABLE_3[model].items():
            name = "LongPO, trained again by the paper" if row == "LongPO" else row.replace(",", "")
            averages = known[f"{prefix}, {name}"]
            assert numbers == f"{averages['longbench_qa']} {averages['ruler_qa']}", row


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation_changes_its_own_key(name):
    """And SoLo-KL the weight, where rewards are beta times log-probs: to alpha x beta, which pulls as hard as alpha."""
    model, recipe = name.split("/")
    main, study = re.fullmatch(r"(solo_[a-z]+)_(both|kl|distill|alpha_[\d.]+)", recipe).groups()
    before, after = keys(f"{model}/{main}.yaml"), keys(name)
    assert before.keys() == after.keys() and RUNS[name].recipe == f"{model}/{main}.yaml"
    changed = {k: v for k, v in after.items() if v != before[k]}
    assert changed.pop("output_dir") == f"saves/{model}/{recipe}"
    expected = {
        "both": {"solopo_align_on": "both"},
        "kl": {"solopo_align": "logp"},
        "distill": {"solopo_align": "distill"},
    }
    if study == "kl" and main != "solo_orpo":
        assert changed.pop("solopo_alpha") == pytest.approx(before["solopo_alpha"] * before["pref_beta"], rel=1e-12)
    assert changed == expected.get(study) or changed == {"solopo_alpha": float(study.removeprefix("alpha_"))}


def test_only_the_papers_alpha_is_tagged_as_the_papers():
    """It is known for SoLo-RA on the chosen response; what an ablation ran with is not."""
    tagged = re.compile(r"^solopo_alpha: .*  # (paper|ours)(.*)$", re.M)
    tags = {name: found[0] for name in FILES if (found := tagged.findall((YAML / name).read_text(encoding="utf-8")))}
    tags |= {name: re.match(r"alpha [\d.]+: (paper|ours)(.*)", RUNS[name].numbers).groups() for name in ABLATIONS}
    assert len(tags) == 4 + 25 + 2
    for name, (tag, more) in tags.items():
        known = name not in ABLATIONS or name.endswith("_both")
        assert tag == ("paper" if known else "ours"), name
        assert ("is not known to us" in more) == bool(re.search(r"_(both|orpo_kl)$", name)), name


@pytest.mark.parametrize(
    "name", [n for n in RECIPES if re.search(r"/(solo|dpo|simpo|orpo)_", n) and n not in ABLATIONS]
)
def test_loss_and_data_belong_to_the_name(name):
    """A baseline differs from the SoLo recipe of its loss in stage and data, never in rate, beta or optimizer."""
    model, recipe = name.removesuffix(".yaml").split("/")
    head, tail = recipe.split("_", 1)
    method, data = (tail, "solopo") if head == "solo" else (head, f"{tail}_po")
    own = keys(name)
    assert own["pref_loss"] == {"dpo": "sigmoid", "simpo": "simpo", "orpo": "orpo"}[method]
    assert own["dataset"] == f"musique_{model.replace('-', '_')}_{data}"
    twin = keys(f"{model}/solo_{method}.yaml")
    free = {"stage", "dataset", "cutoff_len", "output_dir", "solopo_alpha", "solopo_align", "solopo_align_on"}
    assert {k: v for k, v in own.items() if k not in free} == {k: v for k, v in twin.items() if k not in free}


def test_recipes_ask_for_all_that_the_pipeline_registers_and_no_more():
    pattern = r"musique_(?:qwen2\.5_7b|llama3\.1_8b)(?:_64k|_128k)?_(\w+)"
    named = {re.fullmatch(pattern, keys(name)["dataset"])[1] for name in RECIPES}
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
    """Every recipe through `get_train_args`. For each, its keys as the host's dataclasses hold them.

    Files and overrides are given as on a command line. One more override: `use_cpu`, without which a machine without
    GPU refuses `bf16`. A process group of one stands for torchrun, without which the host refuses `deepspeed`.
    """
    from llamafactory.hparams.parser import get_train_args

    results = {}
    for name in PARSED:
        recipe, run = keys(name), RUNS.get(name, Run(name, [], "", ""))
        sys.argv = ["llamafactory-cli", str(YAML / run.recipe), *run.overrides, "use_cpu=true"]
        groups = get_train_args(recipe | {"use_cpu": True} if name in LAB else None)
        held = {k: plain(getattr(next(g for g in groups if hasattr(g, k)), k)) for k in recipe if k != "use_cpu"}
        train = groups[2]
        held |= {"warmup of 79": train.get_warmup_steps(79), "bf16": train.bf16}
        if train.deepspeed:
            held["zero3"] = train.hf_deepspeed_config.is_zero3()
        results[name] = held
    return results


@pytest.fixture(scope="module")
def parsed(zygote, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("recipes")
    out, log = folder / "parsed.json", folder / "log.txt"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    env = dict(os.environ, **one, MASTER_PORT=str(port), TOKENIZERS_PARALLELISM="false")
    code = zygote.start(__file__, out, log=log, env=env).wait()
    assert code == 0, log.read_text()[-3000:]
    assert "deprecated" not in log.read_text()
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
