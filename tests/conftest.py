"""Shared tools: tiny models, recipes as dicts, runs in this process and through the command line.

Importing the host takes ten seconds or more, so most runs share this process (`run`), and most command lines (`cli`)
are forks of one that has it imported. Everything is offline: models and tokenizers are built here.
"""

import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from fnmatch import fnmatchcase
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from zygote import Zygote

pytest.register_assert_rewrite("by_hand")
ROOT = Path(__file__).parent.parent
SHARED_DATA = Path(os.environ.get("SOLOPO_SHARED_DATA", ROOT.parent / "shared" / "data"))
BIN = Path(sys.executable).parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests" / "qa")]  # the latter for its servers and material
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["DISABLE_VERSION_CHECK"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
# Now and then an interpreter that has loaded the host aborts on its way out: a thread of a library is still running.
# Seen in `chat` and in one torchrun rank among some hundred starts. It says nothing of the run, which is repeated.
TORN_DOWN = "terminate called without an active exception"
os.environ["SOLOPO_CACHE"] = tempfile.mkdtemp(prefix="solopo_cache_")  # reference scores, not the user's
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"


# Bounds of runs that do the same fp32 sums in another order (packed, other batches, more ranks), on any processor.
# They go by SGD: Adam makes a step of full size of the sign of a gradient that is 0 but for rounding. A response's
# log-prob is within 1e-4 (test_logps.py), a loss within pref_beta * (2 + 2 alpha) of that, 6e-5 at 0.1 and alpha 2, or
# within 1e-5 of a large one, and gradients within 1e-5 (test_packing.py). Gradients are clipped to norm 1, so a step of
# 0.1 times one is off by at most 1e-6; its sum may round by as much again.
SGD = dict(optim="sgd", learning_rate=0.1)
LOSS_BOUND = dict(rel=1e-5, abs=6e-5)


def weight_bound(steps: int) -> dict:
    return dict(rtol=0, atol=2e-6 * steps)


# ---- what `make test` leaves to `make test-all`: the tests marked `slow`

LONG = 15  # seconds; a test of `make test` that takes longer is named at the end
left_out, seconds = 0, {}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Take the mark off the cases that a sweep keeps, and tell the reports which tests have it."""
    wanted, found = set(), set()
    for item in items:
        for mark in [m for m in item.own_markers if m.name == "slow" and m.kwargs]:
            kept = [pattern for pattern in mark.kwargs["keep"] if fnmatchcase(item.callspec.id, pattern)]
            if kept:
                item.own_markers.remove(mark)
            name = item.nodeid.partition("[")[0]
            wanted.update((name, pattern) for pattern in mark.kwargs["keep"])
            found.update((name, pattern) for pattern in kept)
        item.user_properties.append(("slow", item.get_closest_marker("slow") is not None))
    if wanted - found and not any("::" in word for word in config.invocation_params.args):
        raise pytest.UsageError(f"no case is what `slow` keeps: {sorted(wanted - found)}")


def pytest_deselected(items):
    global left_out
    left_out += sum(item.get_closest_marker("slow") is not None for item in items)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = left_out


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    global left_out
    left_out = getattr(node, "workeroutput", {}).get("left_out", left_out)


def pytest_runtest_logreport(report):
    if not dict(report.user_properties).get("slow"):
        seconds[report.nodeid] = seconds.get(report.nodeid, 0) + report.duration


def pytest_terminal_summary(terminalreporter):
    for test, took in seconds.items():
        if took > LONG:
            terminalreporter.write_line(f"{test} took {took:.0f} s; should it be marked `slow`?", yellow=True)
    if left_out:
        terminalreporter.write_line(f"{left_out} tests were left out; `make test-all` runs them too.")


@pytest.fixture(scope="session")
def golden() -> dict:
    """Scores that the benchmarks' own code gave."""
    path = SHARED_DATA / "golden_metrics.json"
    if not path.exists():
        pytest.skip(f"no golden scores at {path}; set SOLOPO_SHARED_DATA")
    return json.loads(path.read_text(encoding="utf-8"))


def demo_rows(n: int | None = None) -> list[dict]:
    """The shipped sample's rows."""
    lines = (ROOT / "data" / "demo_solopo.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:n]]


SOLO_COLUMNS = {"prompt": "prompt", "long_prompt": "long_prompt", "chosen": "chosen", "rejected": "rejected"}


def write_dataset(folder: Path, rows: list[dict], name: str = "rows", **entry) -> str:
    """Register rows as a data set in `folder`; returns the folder for `dataset_dir`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    info_path = folder / "dataset_info.json"
    info = json.loads(info_path.read_text()) if info_path.exists() else {}
    info[name] = {"file_name": f"{name}.jsonl", "ranking": True, "columns": SOLO_COLUMNS} | entry
    info_path.write_text(json.dumps(info))
    return str(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Factory of tiny models on disk, built once per shape: `tiny_model("llama", bos="<|begin_of_text|>")`."""
    from make_tiny_model import build

    built = {}

    def factory(architecture: str = "qwen2", **kwargs) -> str:
        key = json.dumps([architecture, kwargs], sort_keys=True)
        if key not in built:
            path = str(tmp_path_factory.mktemp(architecture))
            build(path, [json.dumps(r) for r in demo_rows()], architecture, **kwargs)
            built[key] = path
        return built[key]

    return factory


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> str:
    """A folder that can be `model_name_or_path` of a data recipe: a tokenizer without a model, not to be written to."""
    from material import save_tokenizer

    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def recipe(tiny_model, tmp_path):
    """A small valid SoLoPO recipe as a dict; keyword arguments change or add keys, None removes one."""

    def make(**changes) -> dict:
        base = dict(
            model_name_or_path=changes.pop("model_name_or_path", None) or tiny_model(),
            stage="solopo", do_train=True, finetuning_type="full", pref_loss="sigmoid", dataset="demo_solopo",
            dataset_dir=str(ROOT / "data"), max_samples=12, template="qwen", cutoff_len=1024,
            output_dir=str(tmp_path / "out"), overwrite_output_dir=True, logging_steps=1, save_strategy="no",
            report_to="none", per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-3,
            num_train_epochs=2.0, lr_scheduler_type="cosine", use_cpu=True, seed=7, disable_tqdm=True,
        )  # fmt: skip
        return {k: v for k, v in (base | changes).items() if v is not None}

    return make


def outcome(output_dir: str | Path) -> SimpleNamespace:
    """What a run left behind: `log` (one dict per logged step), `losses`, `weights` (name -> tensor)."""
    from safetensors.torch import load_file

    output_dir = Path(output_dir)
    state = json.loads((output_dir / "trainer_state.json").read_text())
    log = state["log_history"]
    weights = {}
    for file in output_dir.glob("*.safetensors"):
        weights |= load_file(file)
    return SimpleNamespace(dir=output_dir, log=log, losses=[e["loss"] for e in log if "loss" in e], weights=weights)


@pytest.fixture(scope="module")
def tuner():
    """Import the host. A run collects garbage several times, and need not look at what was there before the module."""
    import llamafactory.train.tuner

    gc.collect()
    gc.freeze()
    return llamafactory.train.tuner


@pytest.fixture
def run(tuner):
    """Train from a recipe dict in this process, as `run_exp()` called from Python."""

    def train(args: dict) -> SimpleNamespace:
        tuner.run_exp(dict(args))
        return outcome(args["output_dir"])

    return train


@pytest.fixture
def host_log():
    """Messages of the host's logger, whose handler keeps the stdout of the first test."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("llamafactory").addHandler(handler)
    yield messages
    logging.getLogger("llamafactory").removeHandler(handler)


@pytest.fixture(scope="session")
def zygote():
    """A process with the host imported, which forks for every command line; see zygote.py."""
    running = Zygote()
    yield running
    running.end()


@pytest.fixture(scope="session")
def build_data(zygote):
    """Starts runs of build_data.py with a folder's recipe.yaml; see zygote.py."""
    return partial(zygote.run, "scripts/build_data.py")


def shell_environment(**env: str) -> dict[str, str]:
    """This environment's programs first, and no GPU."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **env}


@pytest.fixture
def cli(request, tmp_path):
    """Run `llamafactory-cli` in a fork of the zygote; returns the ended process with its combined output as `.out`.

    `fresh`: in a new interpreter, which takes ten seconds more and shows the start itself.
    """

    def call(*args: str, program: str = "llamafactory-cli", check: bool = True, fresh: bool = False, **env: str):
        environment = shell_environment(**env)
        if fresh:
            process = start_anew([str(BIN / program), *args], environment)
        else:
            path = tmp_path / f"log_{time.monotonic_ns()}.txt"
            program = program if program == "torchrun" else BIN / program
            process = request.getfixturevalue("zygote").start(program, *args, log=path, env=environment)
            process.wait()
            process.out = path.read_text()
        if check and process.returncode:
            raise AssertionError(f"{program} {' '.join(args)} ended with {process.returncode}:\n{process.out[-6000:]}")
        return process

    return call


def start_anew(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    for _ in range(3):
        process = subprocess.run(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=800
        )
        if process.returncode == 0 or TORN_DOWN not in process.stdout:
            break
        print(f"{' '.join(command)} aborted while its interpreter ended; run again")
    process.out = process.stdout
    return process


def write_recipe(path: Path, args: dict) -> str:
    """A recipe dict as a YAML file."""
    import yaml

    path.write_text(yaml.safe_dump(args, sort_keys=False))
    return str(path)


class Page(HTMLParser):
    """An HTML file: tags with their attributes, the texts of scripts, and all text outside of them."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.scripts, self.text, self.inside = [], [], "", None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append(data)
        else:
            self.text += data
