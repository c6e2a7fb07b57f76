"""scripts/benchmark_step.py at tiny shapes: every configuration through the real trainers, and what is written down."""

import json
import sys
from types import SimpleNamespace

import benchmark_run
import benchmark_step as benchmark
import pytest
import torch
from conftest import LOSS_BOUND

TINY = ["--layers", "1", "--width", "32", "--vocabulary", "600", "--short", "24", "--response", "8", "--steps", "2"]
CPU = ["V0 orpo full", "S1 orpo full", "S2 orpo full", "S3 orpo full", "V0 sigmoid online full",
       "S1 sigmoid online full", "S2 sigmoid cached full", "S2 sigmoid online full", "S3 sigmoid cached full",
       "S3 sigmoid online full"]  # fmt: skip


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Run the script's main with these arguments; returns the JSON that it leaves."""

    def run(*argv: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["benchmark_step.py", "--out", str(tmp_path / "out"), *TINY, *argv])
        try:
            benchmark.main()
        finally:
            files = sorted((tmp_path / "out").glob("*.json"), key=lambda file: file.stat().st_mtime)
            run.document = json.loads(files[-1].read_text()) if files else None
        return run.document

    return run


@pytest.fixture
def in_this_process(monkeypatch, tmp_path):
    """Let configurations run here and not in processes of their own, each of which imports the host for seconds."""

    def measure(settings, run, folder):
        if not (folder / f"{run['length']}-dpo").exists():
            benchmark_run.write_rows(folder, settings, run["length"])
        with benchmark_run.put_back():
            seen = benchmark_run.run_here(settings, run, folder)
        return seen | {"median_s": seen["step_s"][0]}

    monkeypatch.setenv("SOLOPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(benchmark, "measure", measure)


@pytest.mark.slow
def test_every_configuration_runs_on_the_same_rows_and_model(command, in_this_process, tmp_path):
    document = command("--lengths", "64")
    runs = document["runs"]
    assert list(runs) == [f"{name} L64" for name in CPU]
    for run in runs.values():
        assert run["status"] == "ok" and len(run["step_s"]) == len(run["cpu_s"]) == 2 and len(run["warm_up_s"]) == 1
        assert run["peak"] >= run["idle"] > 0 and len(run["losses"]) == 3
    for loss in ("orpo", "sigmoid"):  # one model, one set of rows: SoLoPO's losses agree however the step is run
        ours = [run["losses"] for run in runs.values() if run["loss"] == loss and run["variant"] != "V0"]
        assert len(ours) == (3 if loss == "orpo" else 5)
        assert all(other == pytest.approx(ours[0], **LOSS_BOUND) for other in ours)  # Adam's steps are 1e-6 here
    host = runs["V0 sigmoid online full L64"]["losses"]
    assert host[0] == pytest.approx(0.6931, abs=1e-4)  # log 2: the reference starts as the policy
    assert runs["V0 orpo full L64"]["losses"] != runs["S3 orpo full L64"]["losses"]

    rows = {row["name"]: row for row in document["summary"]}
    best, base = rows["S3 sigmoid cached full L64"], rows["V0 sigmoid online full L64"]
    assert best["tokens"] == 24 + 3 * 8 + 64 and base["tokens"] == 2 * 72
    assert best["speed_V0"] == pytest.approx(base["median_s"] / best["median_s"]) and base["speed_V0"] == 1
    assert best["predicted_speed_V0"] > best["predicted_speed_S1"] > 1
    page = (tmp_path / "out/cpu.md").read_text()
    assert page.count("\n| V") == 2 and page.count("\n| S") == 8 and "python scripts/benchmark_step.py" in page
    assert (tmp_path / "out/cpu.png").read_bytes().startswith(b"\x89PNG")
    assert {"settings", "hardware", "versions", "date", "command"} <= document.keys()


@pytest.mark.slow
def test_gpu_presets_run_at_a_small_shape(command, in_this_process):
    """The code path of the 7B presets, but for the device and 16 bits: LoRA and full, checkpointing, no states."""
    gpu = ["--preset", "qwen2.5-7b", "--device", "cpu", "--dtype", "float32", "--lengths", "64"]
    document = command(*gpu, "--variants", "V0", "S3", "--losses", "sigmoid")
    assert len(document["runs"]) == 2 * 3 and all(run["status"] == "ok" for run in document["runs"].values())
    assert document["settings"]["checkpointing"] and document["settings"]["model"]["num_hidden_layers"] == 1
    tunings = [run["tuning"] for run in document["runs"].values()]
    assert tunings.count("lora") == tunings.count("full") == 3


def test_bf16_recipes_are_the_hosts():
    settings = benchmark.PRESETS["llama3.1-8b"] | {"attention": "fa2", "memory": None}
    run = dict(variant="S3", loss="orpo", reference=None, length=8192, steps=5)
    recipes = {t: benchmark_run.recipe_of(settings, run | {"tuning": t}, benchmark.Path("x")) for t in ("lora", "full")}
    assert (recipes["lora"]["bf16"], recipes["lora"]["pure_bf16"]) == (True, False)
    assert (recipes["full"]["bf16"], recipes["full"]["pure_bf16"]) == (False, True)
    for recipe in recipes.values():
        assert recipe["solopo_forward"] == "packed" and recipe["flash_attn"] == "fa2" and not recipe["use_cpu"]
        assert not recipe["disable_gradient_checkpointing"] and recipe["cutoff_len"] == 8192 + 256
    host = benchmark_run.recipe_of(settings, run | {"variant": "V0", "tuning": "lora"}, benchmark.Path("x"))
    assert host["stage"] == "dpo" and not any(key.startswith("solopo") for key in host)


# ---- what happened before is kept


def canned(status="ok", **more):
    seen = {
        "status": status,
        "warm_up_s": [1.0],
        "step_s": [3.0, 1.0, 2.0],
        "cpu_s": [1.0],
        "losses": [],
        "median_s": 2.0,
    }
    return seen | {"idle": 10, "peak": 30} | more if status == "ok" else {"status": status, **more}


def test_a_killed_benchmark_continues(command, monkeypatch):
    seen = []

    def measure(settings, run, folder):
        seen.append(benchmark.name_of(run))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return canned()

    monkeypatch.setattr(benchmark, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        command()
    assert list(command.document["runs"]) == [f"{name} L4096" for name in CPU[:2]]
    assert len(command()["runs"]) == 10
    assert seen == [*CPU[:3], *CPU[2:]]  # the third twice, the first two once
    command()
    assert len(seen) == 11
    command("--again", "--losses", "orpo")
    assert seen[11:] == CPU[:4] and len(command.document["runs"]) == 10


def test_other_settings_do_not_mix(command, monkeypatch):
    monkeypatch.setattr(benchmark, "measure", lambda *args: canned())
    command("--variants", "S3")
    with pytest.raises(
        SystemExit, match="was measured with other settings; choose another `--name`, or remove the file"
    ):
        command("--variants", "S3", "--short", "32")


def test_oom_and_failure_are_told_apart(command, monkeypatch, tmp_path, capsys):
    results = {"V0": canned("oom"), "S3": canned("failed", log="exit status 1\nTraceback\nKeyError: 'x'\n")}
    monkeypatch.setattr(benchmark, "measure", lambda settings, run, folder: results.get(run["variant"], canned()))
    with pytest.raises(SystemExit, match="Some configurations failed"):
        command("--losses", "orpo")
    rows = {row["name"]: row for row in command.document["summary"]}
    assert rows["V0 orpo full L4096"]["status"] == "oom" and "speed_V0" not in rows["S1 orpo full L4096"]
    assert rows["S1 orpo full L4096"]["predicted_speed_V0"] > 1
    assert "out of memory" in (tmp_path / "out/cpu.md").read_text()
    assert "failed (in 0 s): KeyError: 'x'" in capsys.readouterr().out
    results.clear()
    document = command("--losses", "orpo")  # what failed is run again, what ran out of memory is not
    assert [run["status"] for run in document["runs"].values()] == ["oom", "ok", "ok", "ok"]


@pytest.mark.parametrize("code, status", [(-9, "oom"), (1, "failed")])
def test_a_process_without_result(monkeypatch, tmp_path, code, status):
    monkeypatch.setattr(benchmark.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=code))
    (tmp_path / "64-dpo").mkdir()
    settings = {"threads": 1, "device": "cpu"}
    assert benchmark.measure(settings, {"variant": "S3", "length": 64}, tmp_path)["status"] == status


def test_trl_is_measured_by_its_own_python(command, monkeypatch, tmp_path):
    """DPO alone, in the process of another interpreter; plan.py has no formula for it."""
    with pytest.raises(SystemExit):
        command("--variants", "T")
    monkeypatch.setenv("TRL_PYTHON", "another python")
    started = []

    def start(argv, **keys):
        started.append(argv[0])
        job = benchmark.Path(argv[-1])
        job.with_name("result.json").write_text(json.dumps(canned(trl="1.16.0")))
        return SimpleNamespace(returncode=0)

    with monkeypatch.context() as patched:
        patched.setattr(benchmark.subprocess, "run", start)
        document = command("--variants", "S3", "T", "--lengths", "64")
    assert started == [sys.executable] * 3 + ["another python"]
    assert list(document["runs"])[-1] == "T sigmoid cached full L64"
    row = document["summary"][-1]
    assert row["tokens"] == 2 * 72 and not any(key.startswith("predicted") for key in row)
    page = (tmp_path / "out/cpu.md").read_text()
    assert "| T sigmoid cached full L64 | 144 |" in page and "T: trl 1.16.0." in page


# ---- the search


@pytest.mark.parametrize("limit", [0, 511, 512, 700, 8191, 8192, 100_000])
def test_search_for_the_longest(limit):
    tried = []
    benchmark.find_longest(4096, 512, lambda length: tried.append(length) or length <= limit)
    fitting, too_long = [n for n in tried if n <= limit], [n for n in tried if n > limit]
    assert min(too_long) - max(fitting, default=0) == 512 and all(n % 512 == 0 for n in tried)
    assert len(tried) == len(set(tried)) < 20


def test_search_is_written_down_and_continues(command, monkeypatch, tmp_path):
    tried = []

    def measure(settings, run, folder):
        tried.append(run["length"])
        return canned() if run["length"] <= 2500 else canned("oom")

    monkeypatch.setattr(benchmark, "measure", measure)
    search = ["--longest", "--memory", "1", "--variants", "S3", "--losses", "orpo", "--lengths", "1024"]
    document = command(*search, "--grain", "512")
    assert document["longest"] == {"S3 orpo full": {"fits": 2048, "too_long": 2560}} and document["summary"] == []
    assert tried == [1024, 2048, 4096, 3072, 2560]
    assert "| S3 orpo full | 2048 | 2560 |" in (tmp_path / "out/cpu.md").read_text()
    command(*search, "--grain", "256")  # finer: only what is new
    assert tried[5:] == [2304] and command.document["longest"]["S3 orpo full"]["fits"] == 2304


# ---- memory and processes


def test_what_cannot_run_is_refused(command, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="`--preset llama3.1-8b` needs a GPU and torch sees none"):
        command("--preset", "llama3.1-8b")
    with pytest.raises(SystemExit, match="`--longest` on a CPU needs `--memory`"):
        command("--longest")


def test_gpu_memory_is_what_torch_counts(monkeypatch):
    """The meter's GPU side, against stand-ins: there may be no GPU here."""
    calls = []
    for name, value in dict(synchronize=0, empty_cache=0, reset_peak_memory_stats=0, memory_allocated=5,
                            max_memory_allocated=11, max_memory_reserved=13).items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda name=name, value=value: calls.append(name) or value)
    meter = benchmark_run.meter(cuda=True, limit_gb=None)
    meter.on_train_begin(None, None, None)
    meter.on_step_begin(None, None, None)
    meter.on_step_end(None, None, None)
    assert meter.memory == {"idle": 5, "logits": 0, "peak": 11, "reserved": 13} and len(meter.step_s) == 1
    assert calls.index("reset_peak_memory_stats") < calls.index("memory_allocated") < calls.index("synchronize")
    assert calls.count("synchronize") == 2


@pytest.mark.slow
def test_processes_of_their_own_and_a_real_lack_of_memory(command):
    """One step that fits, and one whose logits alone (3,216 positions x 32,000 x 4 bytes) exceed what it may take."""
    document = command("--variants", "S3", "--losses", "orpo", "--lengths", "64")
    run = document["runs"]["S3 orpo full L64"]
    assert run["status"] == "ok" and run["median_s"] > 0 and run["peak"] > run["idle"]
    large = ["--vocabulary", "32000", "--lengths", "1600", "--name", "large", "--memory", "0.2"]
    document = command("--variants", "V0", "--losses", "orpo", *large)
    assert document["runs"]["V0 orpo full L1600"]["status"] == "oom"
