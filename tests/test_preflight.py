"""A user's first day: what a recipe lacks on this machine is told in one message, before anything is loaded."""

# ruff: noqa: E501  (tables: one case a line, with its whole sentence)
import errno
import json
import re
import shlex
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, SOLO_COLUMNS, demo_rows, write_dataset, write_recipe

from solopo_plugin.host import preflight
from solopo_plugin.host.preflight import Refused, check
from solopo_plugin.qa.files import DataError
from solopo_plugin.qa.ready import check_ready

SEVEN_B = "examples/yaml/qwen2.5-7b/solo_orpo.yaml"
READY = dict(stage="solopo", model_name_or_path=str(ROOT / "data/lab/base"), template="empty", dataset="demo_solopo",
             dataset_dir=str(ROOT / "data"), use_cpu=True)  # fmt: skip
HUB = "someone/some-model"


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine without GPU and without packages; returns a function that changes it."""
    import llamafactory.extras.misc as misc
    import transformers.utils

    def have(gpus: int = 0, bf16: bool = True, packages: bool = False) -> None:
        monkeypatch.setattr(misc, "get_device_count", lambda: gpus)
        monkeypatch.setattr(transformers.utils, "is_torch_bf16_gpu_available", lambda: gpus > 0 and bf16)
        monkeypatch.setattr(preflight, "find_spec", lambda name: packages or None)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["llamafactory-cli", "recipe.yaml"])
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "FORCE_TORCHRUN", "NPROC_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    have()
    return have


def told(**changes) -> list[str]:
    """What is missing, one sentence each."""
    try:
        check(READY | changes)
    except Refused as error:
        return re.sub(r"\A\d+ things.*|^  \d+\. ", "", str(error), flags=re.MULTILINE).strip().splitlines()
    return []


MISSING = {  # name: (changes to a recipe that is ready, the one sentence)
    "misspelt key": ({"solopo_alfa": 1}, "Unknown key `solopo_alfa` in the recipe. Did you mean `solopo_alpha`? Allowed: "),
    "value of a key": ({"solopo_align": "kl"}, "`solopo_align` must be one of reward, logp, distill; got 'kl'."),
    "bf16": ({"bf16": True, "use_cpu": False}, "`bf16: true` needs a GPU, and PyTorch finds none: look at `nvidia-smi`, or start on another machine; a model that is small enough runs on the CPU: llamafactory-cli train recipe.yaml use_cpu=true"),
    "fp16": ({"fp16": True, "use_cpu": False}, "`fp16: true` needs a GPU, and PyTorch finds none: look at `nvidia-smi`, or start on another machine; a model that is small enough runs on the CPU: llamafactory-cli train recipe.yaml fp16=false use_cpu=true"),
    "pure bf16": ({"pure_bf16": True, "use_cpu": False}, "`pure_bf16: true` needs a GPU, and PyTorch finds none: look at `nvidia-smi`, or start on another machine; a model that is small enough runs on the CPU: llamafactory-cli train recipe.yaml pure_bf16=false use_cpu=true"),
    "bitsandbytes": ({"quantization_bit": 4}, '`quantization_bit: 4` needs the package bitsandbytes: pip install ".[qlora]"'),
    "liger": ({"enable_liger_kernel": True}, "`enable_liger_kernel: True` needs the package liger-kernel: pip install liger-kernel"),
    "liger of transformers": ({"use_liger_kernel": True}, "`use_liger_kernel: True` does not work with `stage: solopo`: it undoes `solopo_mlp_chunk` and comes after the reference, as `enable_liger_kernel` does not; remove it."),
    "galore": ({"use_galore": True}, "`use_galore: True` needs the package galore-torch: pip install galore-torch"),
    "apollo": ({"use_apollo": True}, "`use_apollo: True` needs the package apollo-torch: pip install apollo-torch"),
    "badam": ({"use_badam": True}, "`use_badam: True` needs the package badam: pip install badam"),
    "adam-mini": ({"use_adam_mini": True}, "`use_adam_mini: True` needs the package adam-mini: pip install adam-mini"),
    "swanlab": ({"use_swanlab": True}, "`use_swanlab: True` needs the package swanlab: pip install swanlab"),
    "8 bits": ({"optim": "adamw_8bit"}, '`optim: adamw_8bit` needs the package bitsandbytes: pip install ".[qlora]"'),
    "pages": ({"optim": "paged_adamw_32bit"}, '`optim: paged_adamw_32bit` needs the package bitsandbytes: pip install ".[qlora]"'),
    "lomo": ({"optim": "adalomo"}, "`optim: adalomo` needs the package lomo-optim: pip install lomo-optim"),
    "no schedule": ({"optim": "schedule_free_adamw"}, "`optim: schedule_free_adamw` needs the package schedulefree: pip install schedulefree"),
    "tracker": ({"report_to": "wandb"}, "`report_to: wandb` needs the package wandb: pip install wandb"),
    "trackers": ({"report_to": ["none", "tensorboard"]}, "`report_to: tensorboard` needs the package tensorboard: pip install tensorboard"),
    "unsloth": ({"use_unsloth": True}, "`use_unsloth: True` does not work with `stage: solopo`: it replaces the model's forward; remove it."),
    "kt": ({"use_kt": True}, "`use_kt: True` does not work with `stage: solopo`: it replaces the model's forward; remove it."),
    "depths": ({"mixture_of_depths": "convert"}, "`mixture_of_depths: convert` does not work with `stage: solopo`: tokens of the response could skip layers; remove it."),
    "no such folder": ({"model_name_or_path": "saves/no/such"}, "`model_name_or_path: saves/no/such` is a folder that is not there: check the path."),
    "folder without a model": ({"model_name_or_path": "data"}, "`model_name_or_path: data` is a folder without config.json: give the folder of a finished model."),
    "no adapter": ({"adapter_name_or_path": "data/lab/base"}, "`adapter_name_or_path: data/lab/base` is a folder without adapter_config.json: give the folder of a finished model adapter."),
    "no reference": ({"ref_model": "./no"}, "`ref_model: ./no` is a folder that is not there: check the path."),
    "offline": ({"model_name_or_path": HUB}, f"`model_name_or_path: {HUB}` is not on this machine, and HF_HUB_OFFLINE keeps it from the hub: HF_HUB_OFFLINE=0 hf download {HUB}"),
    "no name of the hub": ({"model_name_or_path": "my model"}, "`model_name_or_path: my model` is neither a folder nor a name of the hub, which is `owner/model`: check the spelling."),
    "template": ({"template": "qwenn"}, "`template: qwenn` is no template of the host; did you mean `qwen`?"),
    "no data sets": ({"dataset_dir": "docs"}, "`dataset_dir: docs` has no dataset_info.json: make the rows first, as the head of the recipe says, or register your own (docs/data.md)."),
    "misspelt data set": ({"dataset": "demo_solpo"}, "is not registered in {data}: did you mean `demo_solopo`?"),
    "data set of a data recipe": ({"dataset": "musique_qwen2.5_7b_solopo"}, "`dataset: musique_qwen2.5_7b_solopo` is not registered in {data}: python scripts/build_data.py examples/yaml/data/qwen2.5-7b.yaml"),
    "data set of a longer data recipe": ({"dataset": "musique_qwen2.5_7b_64k_solopo"}, "`dataset: musique_qwen2.5_7b_64k_solopo` is not registered in {data}: python scripts/build_data.py examples/yaml/data/qwen2.5-7b.yaml with the overrides of examples/yaml/README.md"),
    "data set by overrides": ({"dataset": "musique_qwen2.5_7b_16k_solopo"}, "is not registered in {data}: python scripts/build_data.py examples/yaml/data/qwen2.5-7b.yaml with the overrides of examples/yaml/README.md"),
    "data set of today's models": ({"dataset": "musique_qwen3_4b_solopo"}, "is not registered in {data}: python scripts/build_data.py examples/yaml/models/data.yaml"),
    "data set of the story": ({"dataset": "story_solopo"}, "is not registered in {data}: python scripts/build_data.py examples/yaml/story/data.yaml"),
    "data set like another": ({"dataset": "demo_solo"}, "did you mean `demo_solopo`? If not, make rows (scripts/build_data.py), or register yours (docs/data.md)."),
    "unknown data set": ({"eval_dataset": "xyz"}, "`eval_dataset: xyz` is not registered in {data}: make rows (scripts/build_data.py), or register yours (docs/data.md)."),
}  # fmt: skip


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing(name):
    import llamafactory.data.template  # noqa: F401  (in a run it is imported by now)

    changes, sentence = MISSING[name]
    (said,) = told(**changes)
    assert sentence.format(data=ROOT / "data/dataset_info.json") in said


@pytest.mark.parametrize("key", ["model_name_or_path", "ref_model"])
def test_weights_in_two_forms(key, tmp_path):
    """The host would load the one file, which may be the older one; the other format beside it is not looked at."""
    (tmp_path / "config.json").write_text("{}")
    for name in ("model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json", "model-1.safetensors"):
        (tmp_path / name).write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    index = tmp_path / "model.safetensors.index.json"
    for text in ("no index", json.dumps({"weight_map": {"a": "gone"}})):
        index.write_text(text)
        assert told(**{key: str(tmp_path)}) == []
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert told(**{key: str(tmp_path)}) == [
        f"`{key}: {tmp_path}` holds weights twice, in model.safetensors and in the shards that {index.name} names, and which are loaded depends on the program: remove those that are older, shards with their index."
    ]
    with pytest.raises(DataError, match=f"^`x: {tmp_path}` holds weights twice, "):  # of data and evaluations
        check_ready("transformers", None, {"x": str(tmp_path)})


AGAIN = {  # words of the command -> those that are advised where `bf16: true` finds no GPU
    "train recipe.json": "recipe.json use_cpu=true",
    "train r.yaml model_name_or_path=m 'output_dir=my out'": "r.yaml model_name_or_path=m 'output_dir=my out' use_cpu=true",
    "r.yaml use_cpu=false cutoff_len=64": "r.yaml cutoff_len=64 use_cpu=true",
    "r.yaml hf_hub_token=s3cret seed=1": "r.yaml seed=1 use_cpu=true",
    "train --stage solopo --use-cpu false --bf16 --report_to a b": "--stage solopo --bf16 --report_to a b --use_cpu=true",
    "--use_cpu=false --hf_hub_token s3cret --seed -3 --stage=solopo": "--seed -3 --stage=solopo --use_cpu=true",
    "r.yaml swanlab_lark_secret=s3cret swanlab_lark_webhook_url=https://h/s3cret ms_hub_token=s3cret swanlab_api_key=s3cret": "r.yaml use_cpu=true",
    "--node-ip-address=10.0.0.1 --redis-password=s3cret": "RECIPE use_cpu=true",
    "": "RECIPE use_cpu=true",
    "-q tests": "RECIPE use_cpu=true",
}  # fmt: skip


@pytest.mark.parametrize("words", AGAIN)
def test_advice_repeats_the_command(words, monkeypatch):
    """With what it changes last and once; without secrets."""
    monkeypatch.setattr(sys, "argv", ["llamafactory-cli", *shlex.split(words)])
    (said,) = told(bf16=True, use_cpu=False)
    assert said.rpartition(": llamafactory-cli train ")[2] == AGAIN[words]


def test_rows_shared_by_more_gpus_than_there_are(machine, monkeypatch):
    """Advice that another check refuses would go in a circle."""
    machine(gpus=1)
    needs = "`solopo_sequence_parallel: 2` needs 2"
    few = f"{needs} GPUs, and PyTorch finds 1; set it to 1, or start where there are more."
    again = "FORCE_TORCHRUN=1 NPROC_PER_NODE=2 llamafactory-cli train recipe.yaml"
    assert told(solopo_sequence_parallel=2, use_cpu=False) == [few]
    assert told(solopo_sequence_parallel=2) == [f"{needs} processes, there would be 1: {again}"]
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    assert told(solopo_sequence_parallel=2, use_cpu=False)[1:] == [few]


ENTRIES = {  # name: (the entry, the sentence)
    "a text": ("rows.jsonl", "Dataset `rows` must be an object with a `file_name` in dataset_info.json, got \"rows.jsonl\"."),
    "misspelt file_name": ({"filename": "rows.jsonl"}, "Dataset `rows` must be an object with a `file_name` in dataset_info.json, got {\"filename\": \"rows.jsonl\"}."),
    "several files": ({"file_name": ["rows.jsonl"]}, "Dataset `rows`: `file_name` in dataset_info.json cannot be [\"rows.jsonl\"]; see docs/data.md."),
    "columns are null": ({"columns": None}, "Dataset `rows`: `columns` in dataset_info.json cannot be null; see docs/data.md."),
    "columns are a list": ({"columns": ["prompt"]}, "Dataset `rows`: `columns` in dataset_info.json cannot be [\"prompt\"];"),
    "a column is a list": ({"columns": {"rejected": ["a", "b"]}}, "Dataset `rows`: `rejected` under `columns` in dataset_info.json must be the name of a column, got [\"a\", \"b\"]."),
    "tags are null": ({"tags": None}, "Dataset `rows`: `tags` in dataset_info.json cannot be null;"),
    "samples as text": ({"num_samples": "5"}, "Dataset `rows`: `num_samples` in dataset_info.json cannot be \"5\";"),
    "samples below 0": ({"num_samples": -1}, "Dataset `rows`: `num_samples` in dataset_info.json cannot be -1;"),
    "samples as a boolean": ({"num_samples": True}, "Dataset `rows`: `num_samples` in dataset_info.json cannot be true;"),
    "a script": ({"script_url": "s.py"}, "Dataset `rows`: `script_url` in dataset_info.json is no longer run by `datasets`; save its rows as a file."),
    "misspelt column": ({"columns": SOLO_COLUMNS | {"systems": "note"}}, "Dataset `rows`: `systems` under `columns` in dataset_info.json is nothing that is read. Did you mean `system`?"),
    "unknown column": ({"columns": SOLO_COLUMNS | {"x": None}}, "Dataset `rows`: `x` under `columns` in dataset_info.json is nothing that is read. Known are prompt, query, response, history, messages, system, tools, chosen, rejected, kto_tag, long_prompt, long_messages, images, videos, audios."),
    "a tag under columns": ({"columns": SOLO_COLUMNS | {"user_tag": "user"}}, "Dataset `rows`: `user_tag` under `columns` in dataset_info.json is nothing that is read."),
    "misspelt tag": ({"tags": {"rol_tag": "role"}}, "Dataset `rows`: `rol_tag` under `tags` in dataset_info.json is nothing that is read. Did you mean `role_tag`?"),
    "misspelt key": ({"format": "sharegpt"}, "Dataset `rows`: `format` in dataset_info.json is none of the host's keys. Did you mean `formatting`? If not, rename it."),
    "misspelt samples": ({"num_sample": 5}, "Dataset `rows`: `num_sample` in dataset_info.json is none of the host's keys. Did you mean `num_samples`?"),
    "an empty folder": ({"file_name": "folder"}, "`dataset: rows` is read from {path}/folder, which is empty: check the path."),
    "an empty file": ({"file_name": "empty.jsonl"}, "`dataset: rows` is read from {path}/empty.jsonl, which is empty: check the path."),
}  # fmt: skip


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_that_the_host_cannot_read(name, tmp_path):
    entry, sentence = ENTRIES[name]
    folder = write_dataset(tmp_path, demo_rows(2))
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.jsonl").touch()
    info = tmp_path / "dataset_info.json"
    good = json.loads(info.read_text())["rows"]
    changed = good | entry if isinstance(entry, dict) and "filename" not in entry else entry
    info.write_text(json.dumps({"rows": changed, "others": None}))
    (said,) = told(dataset="rows", dataset_dir=folder)
    assert said.startswith(sentence.replace("{path}", str(tmp_path)))
    more = {"num_samples": 2, "tags": {"system_tag": None}, "made_of": {"rows": 2}, "file_sha1": "0", "subset": "x"}
    entries = {"rows": good | more, "hub": {"hf_hub_url": "someone/rows", "script_url": "s.py", "file_name": None}}
    info.write_text(json.dumps(entries))
    assert told(dataset="hub", dataset_dir=folder) == []  # the host does not read its `file_name`, or run its script
    assert told(dataset="rows", dataset_dir=folder) == []


def test_a_reason_is_one_sentence_and_a_full_disk_no_fault_of_the_data(monkeypatch):
    """The reason may end in a full stop, or be none."""
    from datasets.exceptions import DatasetGenerationError

    from solopo_plugin.host import data

    def read_with(error, cause=None):
        def reads(*_):
            raise error from cause

        data._loading(reads, SimpleNamespace(entry="rows"), None, None, None)

    for error, reason in ((OSError("No access."), "No access."), (OSError("gone"), "gone."), (OSError(), "OSError.")):
        with pytest.raises(ValueError) as caught:
            read_with(error)
        assert str(caught.value) == f"Dataset `rows` cannot be read: {reason}"
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    for cache, file in (
        ("/no/home/hf/datasets", "/no/home"),
        ("/no/datasets", "/no/datasets/json"),
        (".hf", ".hf/json"),
    ):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
        with pytest.raises(ValueError, match=f"^{file} cannot be written .*; set HF_HOME to a folder that can be"):
            read_with(PermissionError(errno.EACCES, "Permission denied", file))
        with pytest.raises(ValueError, match="^Dataset `rows` cannot be read: gone"):
            read_with(OSError("gone"))
    monkeypatch.setenv("HF_DATASETS_CACHE", ".hf")  # wins over HF_HOME
    with pytest.raises(ValueError, match="; set HF_DATASETS_CACHE to a folder"):
        read_with(PermissionError(errno.EACCES, "Permission denied", ".hf"))
    full = OSError(errno.ENOSPC, "No space left on device")
    for error, cause in ((full, None), (DatasetGenerationError("generating"), full)):
        with pytest.raises(type(error)) as caught:
            read_with(error, cause)
        assert caught.value is error


def test_a_refusal_is_not_its_own_cause():
    """Printers of tracebacks follow causes."""
    with pytest.raises(Refused) as caught, preflight.refusing():
        raise Refused("no")
    assert caught.value.__cause__ is None
    with pytest.raises(Refused) as caught, preflight.refusing():
        raise ValueError("no")
    assert type(caught.value.__cause__) is ValueError


def test_nothing_is_missing(machine):
    assert told() == []
    assert told(tokenized_path=str(ROOT / "data"), dataset="xyz") == []
    assert told(pref_loss="orpo", ref_model="./no") == []  # another check refuses it
    assert told(report_to="none", optim="adamw_torch_fused", use_galore=False) == []
    assert told(report_to=["none"], optim="adamw_torch_8bit") == []  # not bitsandbytes
    machine(gpus=1, packages=True)
    assert told(bf16=True, use_cpu=False, quantization_bit=4) == []


def test_gpus(machine, monkeypatch):
    machine(gpus=1, bf16=False, packages=True)
    assert told(bf16=True, use_cpu=False) == [
        "`bf16: true` needs a GPU with bf16 (Ampere or later): llamafactory-cli train recipe.yaml bf16=false fp16=true"
    ]
    machine(gpus=2, packages=True)
    monkeypatch.setenv("NPROC_PER_NODE", "4")
    assert told(use_cpu=False) == [
        "NPROC_PER_NODE=4, and there are 2 GPUs: FORCE_TORCHRUN=1 NPROC_PER_NODE=2 llamafactory-cli train recipe.yaml"
    ]
    assert told() == []  # processes on the CPU


def test_blanks_that_torchrun_would_part(machine, monkeypatch):
    """Refuse them: the host joins the words of the command, and parts them again at every blank."""
    machine(gpus=2, packages=True)
    words = ["llamafactory-cli", "train", "my recipe.yaml", "output_dir=saves/my out", "seed=1"]
    monkeypatch.setattr(sys, "argv", words)
    said = [f"torchrun cannot be given {word!r}, which has a blank: rename the folder, file or value that has it."
            for word in words[2:4]]  # fmt: skip
    assert told() == said
    monkeypatch.setattr("llamafactory.launcher.__file__", "/home/me/My Projects/launcher.py")
    assert len(told()) == 3 and "My Projects" in told()[0]
    monkeypatch.setenv("LOCAL_RANK", "0")  # torchrun has started it already
    assert told() == []
    monkeypatch.delenv("LOCAL_RANK")
    machine(gpus=1, packages=True)
    assert told() == []  # one process, without torchrun


def test_one_package_of_several_is_enough(monkeypatch):
    monkeypatch.setattr(preflight, "find_spec", lambda name: name == "tensorboardX" or None)
    assert told(report_to="tensorboard") == [] != told(report_to="wandb")


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory."), KeyError("x"), OSError("x")])
def test_what_is_no_refusal_stays_what_it_is(error):
    """With its traceback on the command line."""
    with pytest.raises(type(error)) as caught, preflight.refusing():
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    "changes, built, compiler, refused",
    [
        ({}, "", "c++", True),
        ({}, "", "no-such-compiler -O1", True),
        ({}, "", f"{sys.executable} -O1", False),
        ({}, "package/ops/adam/cpu_adam_op.cpython-311.so", "c++", False),
        ({}, "extensions/py311_cpu/cpu_adam/cpu_adam.so", "c++", False),
        ({}, "extensions/cpu_adam/cpu_adam.so", "c++", False),
        ({}, "extensions/of_others/cpu_adam/cpu_adam.so", " ", True),
        ({"do_train": False}, "", "c++", False),
        ({"deepspeed": "examples/yaml/deepspeed/ds_z3.json"}, "", "c++", False),
        ({"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}}, "", "c++", True),
        ({"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "none"}}}}, "", "c++", False),
        ({"deepspeed": {"zero_optimization": {"offload_optimizer": None}}}, "", "c++", False),
        (
            {"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "optimizer": {}}},
            "",
            "c++",
            False,
        ),
    ],
)
def test_offload_needs_a_compiler_unless_adam_is_built(
    machine, monkeypatch, tmp_path, changes, built, compiler, refused
):
    machine(packages=SimpleNamespace(origin=str(tmp_path / "package/__init__.py")))
    for name, value in {
        "PATH": "",
        "CXX": compiler,
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "FORCE_TORCHRUN": "1",
    }.items():
        monkeypatch.setenv(name, value)
    if built:
        (tmp_path / built).parent.mkdir(parents=True)
        (tmp_path / built).touch()
        of = tmp_path / ("others" if "of_others" in built else "package")
        (tmp_path / built).with_name(".ninja_deps").write_bytes(b"# ninjadeps\n\x04" + bytes(of / "ops/csrc/a.cpp"))
    sentence = (
        "`deepspeed` offloads the optimizer to the CPU, for which DeepSpeed compiles its Adam at the first start; "
        f"the C++ compiler `{(compiler.split() or ['c++'])[0]}` is not there: apt-get install g++, or set CXX to another."
    )
    recipe = {"do_train": True, "deepspeed": "examples/yaml/deepspeed/ds_z3_offload.json"} | changes
    assert told(**recipe) == [sentence] * refused


def test_deepspeed(machine, monkeypatch):
    zero = "examples/yaml/deepspeed/ds_z3.json"
    package, launch = told(deepspeed=zero)
    assert package == (
        f"`deepspeed: {zero}` needs the package deepspeed: "
        'DS_BUILD_OPS=0 pip install --no-build-isolation ".[deepspeed]"'
    )
    assert launch == "`deepspeed` is started by torchrun: FORCE_TORCHRUN=1 llamafactory-cli train recipe.yaml"
    machine(packages=True)
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    assert told(deepspeed=zero) == []
    monkeypatch.chdir(ROOT / "docs")
    assert told(deepspeed=zero) == [
        f"`deepspeed: {zero}`: there is no such file below {ROOT / 'docs'}; start in the repository's folder."
    ]


def test_a_file_of_rows_that_is_not_there(tmp_path):
    folder = write_dataset(tmp_path, demo_rows(2))
    (tmp_path / "rows.jsonl").unlink()
    assert told(dataset="rows", dataset_dir=folder) == [
        f"`dataset: rows` is read from {tmp_path / 'rows.jsonl'}, which is not there: check the path."
    ]


HUB_SAYS = {  # what the hub's client raises -> what is told
    "GatedRepoError": f"is gated: accept its terms on https://huggingface.co/{HUB}, then: hf auth login",
    "RepositoryNotFoundError": "is neither a folder nor on the hub, or private: check the spelling; for a private one: hf auth login",
    "ConnectError": f"is not on this machine, and the hub cannot be reached: where there is a network, hf download {HUB}",
    "HfHubHTTPError": None,
    "nothing": None,
}  # fmt: skip


@pytest.mark.parametrize("name", HUB_SAYS)
def test_the_hub(name, monkeypatch):
    import httpx
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: False)
    asked = []

    def auth_check(self, repo):
        asked.append((repo, self.token))
        if name == "ConnectError":
            raise httpx.ConnectError("no route")
        if name != "nothing":
            answer = httpx.Response(403, request=httpx.Request("GET", "https://hub"))
            raise getattr(huggingface_hub.errors, name)("no", response=answer)

    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", auth_check)
    said = told(model_name_or_path=HUB, hf_hub_token="secret")
    assert said == ([f"`model_name_or_path: {HUB}` {HUB_SAYS[name]}"] if HUB_SAYS[name] else [])
    assert asked == [(HUB, "secret")] and "secret" not in str(said)


def test_a_model_in_the_cache(tmp_path):
    folder = tmp_path / f"models--{HUB.replace('/', '--')}"
    (folder / "snapshots/abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc")
    (folder / "snapshots/abc/config.json").write_text("{}")
    assert told(model_name_or_path=HUB, cache_dir=str(tmp_path)) == []
    assert len(told(model_name_or_path=HUB, cache_dir=str(tmp_path), model_revision="v2")) == 1


@pytest.mark.parametrize(
    "words",
    [
        [SEVEN_B, "solopo_alpha=2"],
        "--stage solopo --model_name_or_path Qwen/Qwen2.5-7B-Instruct --bf16 --solopo-alpha=2".split(),
    ],
)
def test_recipes_are_read_as_the_host_does(words):
    recipe = preflight.read_recipe(words)
    assert recipe["stage"] == "solopo" and recipe["bf16"] is True and recipe["solopo_alpha"] == 2
    assert recipe["model_name_or_path"] == "Qwen/Qwen2.5-7B-Instruct"


def test_a_word_of_a_command_line_is_one_value():
    words = ["--stage", "solopo", "--default-system", "Say --solopo_x", "--bf16", "--seed", "-3", "--a=b=c"]
    said = {"stage": "solopo", "default_system": "Say --solopo_x", "bf16": "true", "seed": "-3", "a": "b=c"}
    assert preflight.solo.flags(words) == said


@pytest.mark.parametrize("words", [[], ["no.yaml"], ["README.md"], ["-h"]])
def test_what_is_no_recipe_is_left_to_the_host(words):
    assert preflight.read_recipe(words).get("stage") != "solopo"


@pytest.mark.parametrize("stage", ["solopo", "dpo"])
@pytest.mark.parametrize("torchrun", [True, False])
def test_a_recipe_is_read_once_before_the_host_reads_it(torchrun, stage, monkeypatch, tmp_path):
    """By the launcher where it starts torchrun, whose ranks are other processes; else by the stage, in this one."""
    from solopo_plugin.host.stage import _disguising

    path = write_recipe(tmp_path / "recipe.yaml", READY | {"stage": stage, "dataset": "xyz"})
    monkeypatch.setattr(sys, "argv", ["llamafactory-cli", "train", path])
    if torchrun:
        monkeypatch.setenv("FORCE_TORCHRUN", "1")
    read, read_recipe, started = [], preflight.read_recipe, []
    monkeypatch.setattr(preflight, "read_recipe", lambda words: read.append(words) or read_recipe(words))

    def host():
        sys.argv.pop(1)  # as the host's `launch` does before it parses
        parsed = [None, None, None, SimpleNamespace(stage=stage)]
        started.append(torchrun or _disguising(lambda args: parsed))

    if stage == "solopo":
        with pytest.raises(SystemExit, match="`dataset: xyz` is not registered"):
            preflight._speaking(host)
    else:
        preflight._speaking(host)
    assert read == [[path]] and len(started) == (stage == "dpo")


# ---- through the command line


@pytest.mark.slow
def test_seven_b_on_a_laptop(cli):
    """Everything at once, no traceback, one exit status; deepspeed may be installed here."""
    done = cli("train", SEVEN_B, check=False, HF_HOME="/nowhere")
    *_, head = (line for line in done.out.splitlines() if line.startswith("Error: "))
    listed = re.findall(r"^  \d\. (.*)", done.out, re.MULTILINE)
    assert done.returncode == 1 and "Traceback" not in done.out and len(done.out.splitlines()) < 10
    assert head == f"Error: {len(listed)} things keep this recipe from starting here:"
    for part in ("`bf16: true` needs a GPU", "FORCE_TORCHRUN=1 llamafactory-cli", "hf download Qwen/", "build_data.py"):
        assert sum(part in sentence for sentence in listed) == 1, part


@pytest.mark.slow
def test_under_torchrun_it_is_said_once(cli):
    """Nothing is started where the recipe cannot; what the host's parser finds is said by one rank, without its own."""
    done = cli("train", SEVEN_B, check=False, FORCE_TORCHRUN="1", NPROC_PER_NODE="2")
    assert done.returncode == 1 and "Traceback" not in done.out and "distributed tasks" not in done.out
    assert done.out.count("`bf16: true` needs a GPU") == 1


@pytest.mark.slow
def test_what_the_ranks_refuse_is_said_once(cli, recipe, tmp_path):
    """Only the host's parser knows that `pref_beta` is out of range: torchrun has been started."""
    path = write_recipe(tmp_path / "recipe.yaml", recipe(pref_beta=0))
    done = cli("train", path, check=False, FORCE_TORCHRUN="1", NPROC_PER_NODE="2")
    assert done.returncode == 1 and done.out.count("Error: `pref_beta` must be > 0, got 0.") == 1
    assert "CalledProcessError" not in done.out and "run_exp" not in done.out


@pytest.mark.slow
def test_a_bad_row_is_one_sentence(cli, recipe, tmp_path):
    rows = demo_rows(3)
    rows[1]["long_prompt"] = ""
    folder = write_dataset(tmp_path / "data", rows)
    path = write_recipe(tmp_path / "recipe.yaml", recipe(dataset="rows", dataset_dir=folder, max_samples=None))
    done = cli("train", path, check=False)
    assert done.returncode == 1 and "Traceback" not in done.out
    assert "Error: rows[1]: column `long_prompt` is empty; give it a text or remove the row." in done.out
    done = cli("train", path, check=False, LLAMAFACTORY_VERBOSITY="DEBUG")
    assert done.returncode == 1 and "Traceback" in done.out and "rows[1]: column `long_prompt` is empty" in done.out


def test_a_template_of_another_model(run, recipe):
    """Its stop token is none of the model's: without the check training ends in an IndexError."""
    args = recipe(model_name_or_path=str(ROOT / "data/lab/base"), template="qwen")
    with pytest.raises(ValueError, match=r"writes the token '<\|im_end\|>', which .*base does not know \(its vocab"):
        run(args)


# ---- what a run logs

PROGRESS = re.compile(r"\d+%\||\?(it|examples)/s|^\s*$|examples/s\]")


def logged(out: str) -> list[str]:
    """Lines that are not of a progress bar."""
    return [line for line in out.replace("\r", "\n").splitlines() if not PROGRESS.search(line)]


def test_fifteen_steps_are_under_sixty_lines(cli, recipe, tmp_path):
    """Each step is logged, the curves are drawn; with INFO asked for the host is as talkative as ever."""
    args = recipe(
        max_samples=30, num_train_epochs=1.0, gradient_accumulation_steps=1, disable_tqdm=None, plot_loss=True,
        save_strategy="steps", save_steps=5, pref_loss="orpo",
    )  # fmt: skip
    path = write_recipe(tmp_path / "recipe.yaml", args)
    quiet = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "0"}
    lines = logged(cli("train", path, **quiet).out)
    assert sum(line.startswith("{'loss'") for line in lines) == 15
    assert len(lines) < 60, "\n".join(lines)
    assert not any("Model config" in line for line in lines) and any("Fine-tuning method" in line for line in lines)
    assert max(len(line) for line in lines) < 1200
    asked = logged(cli("train", path, "max_steps=1", **quiet, LLAMAFACTORY_VERBOSITY="INFO").out)
    assert any("Model config" in line for line in asked)


@pytest.mark.slow
def test_other_stages_fail_as_before(cli):
    """The host's own words, with its traceback, also where the same recipe of ours would be told in one message."""
    done = cli("train", SEVEN_B, "stage=dpo", "pref_loss=orpo", check=False)
    assert done.returncode == 1 and "Traceback" in done.out
    words = ["model_name_or_path=/no", "use_cpu=true", "deepspeed=null", "stage=sft"]
    done = cli("train", "examples/yaml/demo_solo_orpo.yaml", *words, check=False)
    assert done.returncode == 1 and "Traceback" in done.out and "keep this recipe" not in done.out


def test_other_stages_log_as_before(run, recipe):
    """The verbosity is the host's again after a run, and in a run of its own."""
    from transformers.utils import logging

    run(recipe(max_steps=1))
    assert logging.get_verbosity() == logging.INFO
