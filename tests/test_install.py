"""Installation: every way pip offers puts the interpreter-start hook in place and takes it away again, and the hook
costs nothing, loads nothing and breaks nothing.

Each installation goes into a bare virtual environment of its own, without LLaMA-Factory and torch. Where a host is
needed, a fake one of a few stub functions stands in, so that versions and broken environments that are not installed
here can be shown; the real host is started in `test_launch.py`.
"""

import ast
import base64
import csv
import hashlib
import io
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

from solopo_plugin import __version__
from solopo_plugin.host.versions import INSTALL, TESTED, WORKING_SET
from solopo_plugin.startup import PATCHES

pytestmark = pytest.mark.slow
HOOK = "solopo_plugin.pth"
WAYS = ("wheel", "sdist", "directory", "editable")
START_UP_MS = 5.0  # what an unrelated program may pay at most


def start(*command, **env) -> subprocess.CompletedProcess:
    """Run a command with none of this process' Python and plugin settings."""
    ours = ("SOLOPO_PLUGIN", "PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONDONTWRITEBYTECODE")
    environment = {name: value for name, value in os.environ.items() if name not in ours} | env
    return subprocess.run([str(c) for c in command], env=environment, text=True, capture_output=True, timeout=600)


def succeed(*command, **env) -> str:
    """Run a command that must end with 0; returns its standard output."""
    done = start(*command, **env)
    assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


class Bare:
    """A fresh virtual environment with one other module in it."""

    def __init__(self, folder: Path, index: dict[str, str]):
        succeed(sys.executable, "-m", "venv", "--without-pip", folder)
        self.folder, self.index, self.python = folder, index, folder / "bin" / "python"
        self.site = Path(succeed(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        (self.site / "neighbour.py").touch()  # pip removes a folder that it empties, site-packages too

    def run(self, code: str, *path: Path, **env) -> subprocess.CompletedProcess:
        """Run Python code in a new process, with folders before site-packages."""
        return start(self.python, "-c", code, PYTHONPATH=os.pathsep.join(map(str, path)), **env)

    def pip(self, *args) -> str:
        return succeed(sys.executable, "-m", "pip", "--python", self.python, *args, **self.index)

    def files(self) -> list[str]:
        return sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*"))


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> dict[str, str]:
    """Settings under which pip finds the build backend on disk and nothing else; fetching it is the only download."""
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    folder = tmp_path_factory.mktemp("backend")
    done = start(sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, *requires)
    if done.returncode:
        pytest.skip(f"no package index to fetch {requires} from: {done.stderr.strip().splitlines()[-1]}")
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def git_files(*args: str) -> list[str]:
    names = subprocess.run(["git", "ls-files", "-z", *args], cwd=ROOT, text=True, capture_output=True).stdout
    return sorted(n for n in names.split("\0") if n and (ROOT / n).exists())


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The working tree as a fresh clone has it: nothing that git ignores, no build folder, no `.egg-info`."""
    folder = tmp_path_factory.mktemp("source")
    names = git_files("-co", "--exclude-standard")
    if not names:
        pytest.skip("the working tree is not a git checkout, so what belongs to it is not known")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory, source, index) -> SimpleNamespace:
    """An sdist, and a wheel built from that sdist."""
    folder, copy = tmp_path_factory.mktemp("built"), tmp_path_factory.mktemp("copy") / "solopo"
    shutil.copytree(source, copy)
    succeed(sys.executable, "-m", "build", "--outdir", folder, copy, **index)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return SimpleNamespace(sdist=sdist, wheel=wheel)


@pytest.fixture(scope="module")
def metadata(built):
    with zipfile.ZipFile(built.wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def bare(tmp_path_factory, built, index) -> Bare:
    """A bare environment with the wheel installed."""
    environment = Bare(tmp_path_factory.mktemp("bare") / "env", index)
    environment.pip("install", "--no-deps", built.wheel)
    return environment


# ---- what is in the archives


def assert_wheel_with_hook(wheel: Path) -> set[str]:
    """The hook lies beside the package, and RECORD has hash and size of every file; returns the top-level names."""
    with zipfile.ZipFile(wheel) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    (record,) = [n for n in content if n.endswith(".dist-info/RECORD")]
    rows = {row[0]: row[1:] for row in csv.reader(io.StringIO(content[record].decode()))}
    assert rows.keys() == content.keys()
    for name in content.keys() - {record}:
        digest = base64.urlsafe_b64encode(hashlib.sha256(content[name]).digest()).rstrip(b"=").decode()
        assert rows[name] == [f"sha256={digest}", str(len(content[name]))], name
    assert content[HOOK] == (ROOT / HOOK).read_bytes()
    assert content[HOOK].count(b"\n") == 1, "Python executes the lines of a .pth file one by one"
    return {name.split("/")[0] for name in content}


def test_wheel_puts_the_hook_beside_the_package(built):
    assert assert_wheel_with_hook(built.wheel) == {HOOK, "solopo_plugin", f"solopo-{__version__}.dist-info"}


@pytest.mark.filterwarnings("ignore:Editable installation")  # setuptools' advice on folder names, given every time
def test_editable_wheel_has_the_hook_in_its_record(source, index, tmp_path, monkeypatch):
    """pip would forgive a file that RECORD does not name; other installers need not."""
    import build.env

    for name, value in index.items():
        monkeypatch.setenv(name, value)
    copy = shutil.copytree(source, tmp_path / "solopo")
    with build.env.DefaultIsolatedEnv() as environment:
        builder = build.ProjectBuilder.from_isolated_env(environment, copy)
        environment.install(builder.build_system_requires)
        environment.install(builder.get_requires_for_build("editable"))
        wheel = builder.build("editable", tmp_path / "built")
    names = assert_wheel_with_hook(Path(wheel))
    assert "solopo_plugin" not in names, "not an editable wheel: it holds the package itself"


def test_wheel_holds_every_file_of_the_package(built, source):
    """Modules, and the templates, style sheets and scripts of the pages."""
    files = {str(p.relative_to(source)) for p in (source / "solopo_plugin").rglob("*") if p.is_file()}
    with zipfile.ZipFile(built.wheel) as archive:
        packed = {n for n in archive.namelist() if n.startswith("solopo_plugin/")}
    assert files - packed == set() and {Path(name).suffix for name in files} >= {".py", ".j2", ".css", ".js"}
    assert "solopo_plugin/startup/__init__.py" in packed


def test_sdist_holds_every_tracked_file(built):
    """From the sdist alone a user can run `make demo` and `make test`; only git's and CI's own files are left out."""
    with tarfile.open(built.sdist) as archive:
        packed = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    missing = set(git_files()) - packed
    assert {m for m in missing if m != ".gitignore" and not m.startswith((".ci/", ".github/"))} == set()


def test_requirements_are_the_tested_set(metadata):
    """One truth: the package's requirements, `constraints.txt` and what the messages tell users are the same set."""
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    needed = {r.name: r.specifier for r in requirements if not r.marker}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {name.lower(): pin for name, pin in pinned.items()}
    assert needed["llamafactory"].contains(TESTED[-1]) and pins["llamafactory"] == TESTED[-1]
    for name, series in WORKING_SET.items():
        assert str(needed[name]) == f"=={series}.*" and f'"{name}=={series}.*"' in INSTALL
    for name, specifier in needed.items():
        assert specifier.contains(pins[name]), f"{name}: constraints.txt pins {pins[name]}, setup.py wants {specifier}"
    extras = {"data", "deepspeed", "documents", "eval", "flash-attn", "qlora", "quality", "vllm", "test", "test-web"}
    assert set(metadata.get_all("Provides-Extra")) == extras
    assert metadata["Requires-Python"] == ">=3.11" and metadata["Version"] == __version__


def test_every_package_that_is_imported_is_a_requirement(metadata):
    """A package that only another one brings along is missing on the day on which that one drops it."""
    other_names = {"yaml": "pyyaml", "bs4": "beautifulsoup4", "pdfminer": "pdfminer-six"}
    declared = {re.sub("[-_.]+", "-", Requirement(text).name.lower()) for text in metadata.get_all("Requires-Dist")}
    for path in (ROOT / "solopo_plugin").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"solopo_plugin"}:
                assert other_names.get(name, name.replace("_", "-")) in declared, f"{path}: {name}"


def test_this_environment_is_the_pinned_one():
    """The runs of this suite prove that the pins work only if they run under the pins."""
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    decisive = ("llamafactory", *WORKING_SET, "transformers", "trl", "accelerate", "peft", "datasets")
    assert {n: version(n).partition("+")[0] for n in decisive} == {n: pins[n] for n in decisive}


# ---- the four ways in, and out

PROBE = """
import sys
finders = [getattr(f, "__module__", "") + "." + getattr(f, "__name__", "") for f in sys.meta_path]
print(finders, sorted(sys.modules), sep="#")
"""
OURS = "solopo_plugin.startup.HostFinder"


def probe(environment: Bare, **env) -> tuple[str, set[str]]:
    """What a new process of the environment has on its import path and in its modules; it must say nothing."""
    done = environment.run(PROBE, **env)
    assert done.returncode == 0 and done.stderr == ""
    finders, modules = done.stdout.split("#")
    return finders, set(re.findall(r"'([^']+)'", modules))


def hook_cost_ms(environment: Bare, processes: int = 21) -> float:
    """Median time that the hook's line takes in a fresh interpreter, milliseconds.

    `-S` keeps Python from running the line before it can be timed; `os` is loaded first, as it is in an ordinary start.
    The line that setuptools adds for editable installations is executed before the clock starts.
    """
    code = f"""
import os, sys
from time import perf_counter
sys.path.append({str(environment.site)!r})
for name in sorted(os.listdir({str(environment.site)!r})):
    if name.endswith(".pth") and name != {HOOK!r}:
        exec(open(os.path.join({str(environment.site)!r}, name)).read())
line = open({str(environment.site / HOOK)!r}).read()
start = perf_counter()
exec(line)
cost = perf_counter() - start
assert any(f.__name__ == "HostFinder" for f in sys.meta_path)
print(cost * 1e3)
"""
    return statistics.median(float(succeed(environment.python, "-S", "-c", code)) for _ in range(processes))


@pytest.mark.parametrize("way", WAYS)
def test_install_use_uninstall(way, built, source, index, tmp_path):
    environment = Bare(tmp_path / "env", index)
    before = environment.files()
    finders, modules = probe(environment)
    assert OURS not in finders
    copy = tmp_path / "solopo"
    if way in ("directory", "editable"):
        shutil.copytree(source, copy)
    target = {"wheel": [built.wheel], "sdist": [built.sdist], "directory": [copy], "editable": ["-e", copy]}[way]
    environment.pip("install", "--no-deps", *target)

    finders, with_hook = probe(environment)
    assert finders.count(OURS) == 1
    own = {"__editable___solopo_" + __version__.replace(".", "_") + "_finder"} if way == "editable" else set()
    loaded = {m for m in with_hook - modules if not own or "solopo" in m}  # setuptools' finder imports some of Python's
    assert loaded == {"solopo_plugin", "solopo_plugin.startup"} | own
    assert not {"torch", "llamafactory", "transformers"} & with_hook
    for off in ("off", "OFF", "0", "false", "no"):
        assert OURS not in probe(environment, SOLOPO_PLUGIN=off)[0], off
    for on in ("", "on", "1"):
        assert OURS in probe(environment, SOLOPO_PLUGIN=on)[0], on
    cost = hook_cost_ms(environment)
    print(f"{way}: the hook takes {cost:.2f} ms")
    assert cost < START_UP_MS

    environment.pip("uninstall", "-y", "solopo")
    assert environment.files() == before
    assert probe(environment)[1] == modules


LEFTOVERS = {  # of `solopo_plugin/startup/__init__.py`
    "nothing": None,
    "an error": "raise RuntimeError",
    "a syntax error": "def",
    "no dependency": "import missing",
    "another module": "",
}


@pytest.mark.parametrize("left", LEFTOVERS)
def test_hook_without_a_working_package_is_silent(bare, index, tmp_path, left):
    """What a half-removed or half-copied installation does to every Python process: nothing."""
    environment = Bare(tmp_path / "env", index)
    shutil.copy(bare.site / HOOK, environment.site)
    if LEFTOVERS[left] is not None:
        package = environment.site / "solopo_plugin" / "startup"
        package.mkdir(parents=True)
        (package.parent / "__init__.py").touch()
        (package / "__init__.py").write_text(LEFTOVERS[left])
    done = environment.run("print('ran')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran\n", "")


DAMAGED = {  # a file of the package -> its text, None: it is missing
    "qa/provenance.py": None,
    "host/versions.py": "def",
    "host/preflight.py": "raise RuntimeError('no')",
}


@pytest.mark.parametrize("file", DAMAGED)
def test_a_damaged_package_leaves_the_host_alone(file, tmp_path):
    """Each module of the host is loaded as without the plugin, also one that fails by itself; one line says why."""
    package = shutil.copytree(ROOT / "solopo_plugin", tmp_path / "solopo_plugin")
    (package / "host/data.py").write_text("def apply(module): ...")  # it needs pyarrow, which this process has not
    (package / file).unlink()
    if DAMAGED[file] is not None:
        (package / file).write_text(DAMAGED[file])
    fake_host(tmp_path, interface="raise ImportError('its own')")
    code = """
from solopo_plugin.startup import activate
activate()
import llamafactory.launcher, llamafactory.train.tuner, llamafactory.data.loader
print(llamafactory.launcher.launch())
try: import llamafactory.webui.interface
except ImportError as error: print(error)
"""
    done = start(sys.executable, "-SP", "-c", code, PYTHONPATH=str(tmp_path), SOLOPO_PLUGIN="on")
    assert (done.returncode, done.stdout) == (0, "None\nits own\n"), done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("[WARNING] solopo_plugin is inactive: ")]
    assert len(said) == 1 and "Traceback" not in done.stderr
    assert sum(word in done.stderr for word in ("solopo_plugin.qa.provenance", "versions.py", ": no\n")) == 1


# ---- with a host in reach

STUBS = {
    "llamafactory.hparams.parser": "def _parse_train_args(args): pass\ndef read_args(args): pass\n",
    "llamafactory.data.parser": "class DatasetAttr:\n    def join(self, attr): pass\n",
    "llamafactory.data.loader": "def get_dataset_list(dataset_names, dataset_dir): pass\n",
    "llamafactory.train.tuner": "def get_train_args(args): pass\n"
    "def run_dpo(model_args, data_args, training_args, finetuning_args, callbacks): pass\n",
    "llamafactory.webui.interface": "def create_ui(demo_mode): pass\n",
    "llamafactory.launcher": "def launch(): pass\n",
    "llamafactory.train.unrelated": "def run_sft(): pass\n",
}

# Every function of the modules, with the file that its code comes from: differs as soon as one is replaced.
# Of what `wrap` in `solopo_plugin/host/versions.py` makes it is the file of our function.
DESCRIBE = """
import sys, types
from importlib import import_module

def file_of(function):
    ours = vars(function).get("ours", function)
    return getattr(ours, "func", ours).__code__.co_filename

def where(owner):
    for name, value in sorted(vars(owner).items()):
        if isinstance(value, types.FunctionType):
            chain = [value]
            while hasattr(chain[-1], "__wrapped__"):
                chain.append(chain[-1].__wrapped__)
            print(name, [file_of(f).rpartition("llamafactory")[2] for f in chain])
        elif isinstance(value, type):
            where(value)

def describe(*names):
    for name in names:
        print(name)
        where(import_module(name))
"""


def fake_host(folder: Path, host: str | None = TESTED[-1], packages: dict | None = None, **modules: str) -> Path:
    """Write a package `llamafactory` of stubs, and the metadata of packages that are only said to be installed.

    Args:
        folder: Where to write; goes before site-packages on the path.
        host: The version that the host says it has, None for a host without metadata.
        packages: Further packages and their versions.
        modules: Source of a module by the last part of its name, in place of the one in `STUBS`.
    """
    for name, code in STUBS.items():
        file = folder.joinpath(*name.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(modules.get(file.stem, code))
    (folder / "llamafactory" / "__init__.py").touch()
    for package, number in ({"llamafactory": host} | (packages or {})).items():
        if number is not None:
            info = folder / f"{package}-{number}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {number}\n")
    return folder


def test_stubs_stand_for_every_patched_module(bare, tmp_path):
    """Control for the tests below: a host that looks as it should is patched, and `DESCRIBE` shows it."""
    assert set(PATCHES) < set(STUBS)
    code = DESCRIBE + "describe('llamafactory.train.tuner', 'llamafactory.train.unrelated')"
    on = bare.run(code, fake_host(tmp_path))
    assert on.returncode == 0 and on.stderr == "", on.stderr
    assert on.stdout.count("solopo_plugin/host/stage.py") == 2
    off = bare.run(code, tmp_path, SOLOPO_PLUGIN="off")
    assert off.returncode == 0 and off.stderr == "" and "solopo_plugin" not in off.stdout
    assert "run_sft ['/train/unrelated.py']" in on.stdout and "run_sft ['/train/unrelated.py']" in off.stdout


@pytest.mark.parametrize("host", ["0.9.4", "0.9.6.dev0", "1.0.0", None])
def test_another_version_of_the_host_is_left_alone(bare, tmp_path, host):
    code = DESCRIBE + f"describe(*{list(STUBS)})\nprint([m for m in sys.modules if m.startswith('solopo_plugin.')])"
    fake_host(tmp_path, host)
    on, off = bare.run(code, tmp_path), bare.run(code, tmp_path, SOLOPO_PLUGIN="off")
    assert on.returncode == off.returncode == 0, on.stderr
    assert on.stdout.splitlines()[:-1] == off.stdout.splitlines()[:-1]
    assert "solopo_plugin.host.stage" not in on.stdout.splitlines()[-1]
    assert off.stderr == ""
    (warning,) = on.stderr.splitlines()
    assert warning.startswith("[WARNING] solopo_plugin is inactive") and (host or "not installed") in warning
    assert f'pip install "llamafactory=={TESTED[-1]}"' in warning


@pytest.mark.parametrize("function", ["get_train_args", "run_dpo"])
@pytest.mark.parametrize("change", ["other parameters", "gone", "not a function"])
def test_a_host_that_only_claims_the_tested_version(bare, tmp_path, function, change):
    """A fork or a development checkout: the module works as without the plugin, and one line says what is missing."""
    stub = re.sub(rf"def {function}\(.*\)", f"def {function}(config)", STUBS["llamafactory.train.tuner"])
    if change != "other parameters":
        stub += f"del {function}\n" if change == "gone" else f"{function} = None\n"
    code = DESCRIBE + "describe('llamafactory.train.tuner')"
    fake_host(tmp_path, tuner=stub)
    on, off = bare.run(code, tmp_path), bare.run(code, tmp_path, SOLOPO_PLUGIN="off")
    assert off.returncode == 0 and off.stderr == ""
    assert on.returncode == 0, on.stderr
    assert on.stdout == off.stdout, "all of a module's functions are checked before the first is replaced"
    (warning,) = on.stderr.splitlines()
    assert warning.startswith("[WARNING] solopo_plugin") and f"llamafactory.train.tuner.{function}" in warning
    assert f'pip install "llamafactory=={TESTED[-1]}"' in warning


NEWER_TORCH = {"torch": "2.15.0", "torchvision": "0.26.0", "torchaudio": "2.11.0"}


@pytest.mark.parametrize("error", ["ImportError", "OSError", "RuntimeError"])
@pytest.mark.parametrize("host", [TESTED[-1], "0.9.6"])
def test_broken_environment_says_what_to_install(bare, tmp_path, error, host):
    """The host dies while it is imported, as it does when torch and torchaudio do not belong together."""
    fake_host(tmp_path, host, NEWER_TORCH, tuner=f"raise {error}('undefined symbol')\n")
    done = bare.run("import llamafactory.train.tuner", tmp_path)
    assert done.returncode == 1 and f"{error}: undefined symbol" in done.stderr
    (note,) = [line for line in done.stderr.splitlines() if line.startswith("solopo_plugin:")]
    assert note.endswith(f"this environment has torch 2.15.0. Run: {INSTALL}")


def test_broken_environment_is_explained_once(bare, tmp_path):
    """The failure passes through two patched modules on its way out."""
    fake_host(tmp_path, packages=NEWER_TORCH, loader="raise OSError('undefined symbol')\n",
              tuner="import llamafactory.data.loader\n")  # fmt: skip
    done = bare.run("import llamafactory.train.tuner", tmp_path)
    assert done.returncode == 1
    assert len(re.findall(r"^solopo_plugin:", done.stderr, re.M)) == 1, done.stderr


def test_a_missing_package_is_part_of_the_explanation(bare, tmp_path):
    fake_host(tmp_path, packages={"torch": "2.11.0+cu130", "torchvision": "0.26.0"}, tuner="import torchaudio\n")
    done = bare.run("import llamafactory.train.tuner", tmp_path)
    assert "No module named 'torchaudio'" in done.stderr and "has torchaudio not installed. Run: pip" in done.stderr


def test_damaged_metadata_does_not_hide_the_error(bare, tmp_path):
    """A half-removed torch leaves a metadata folder without a version: part of the finding, not a second failure."""
    rest = {"torchvision": "0.26.0", "torchaudio": "2.11.0"}
    fake_host(tmp_path, packages=rest, tuner="raise OSError('no symbol')\n")
    (tmp_path / "torch-2.11.0.dist-info").mkdir()
    done = bare.run("import llamafactory.train.tuner", tmp_path)
    assert "OSError: no symbol" in done.stderr.splitlines()[-2], done.stderr
    assert done.stderr.splitlines()[-1].startswith("solopo_plugin:") and INSTALL in done.stderr


@pytest.mark.parametrize("error", ["ImportError", "KeyError"])
def test_other_failures_are_not_explained(bare, tmp_path, error):
    """In a working set, a failing import has another reason; a wrong hint would cost the user an afternoon."""
    working = {name: f"{series}.0" for name, series in WORKING_SET.items()}
    fake_host(tmp_path, packages=working, tuner=f"raise {error}('something else')\n")
    on = bare.run("import llamafactory.train.tuner", tmp_path)
    assert on.returncode == 1 and f"{error}: " in on.stderr and "solopo_plugin:" not in on.stderr


# ---- beside other people's import machinery

FINDERS = {
    "a finder of Python 2": """
class Old:
    def find_module(self, name, path=None): return None
sys.meta_path.insert(0, Old())""",
    "a broken last resort": """
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("llamafactory"): raise RuntimeError(name)
sys.meta_path.append(Broken())""",
    "a finder that asks the others": """
class Asking:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("llamafactory.train."):
            for finder in sys.meta_path:
                spec = finder.find_spec(name, path, target) if finder is not self else None
                if spec is not None:
                    return spec
sys.meta_path.insert(0, Asking())""",
    "a loader that cannot be written to": """
from importlib.machinery import PathFinder
class Closed:
    __slots__ = ("loader",)
    def __init__(self, loader): self.loader = loader
    def create_module(self, spec): return None
    def exec_module(self, module): self.loader.exec_module(module)
class Closing:
    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and name.startswith("llamafactory.train."):
            spec.loader = Closed(spec.loader)
        return spec
sys.meta_path.insert(0, Closing())
sys.meta_path.insert(0, sys.meta_path.pop(1))  # ours first, as at interpreter start""",
}  # fmt: skip


@pytest.mark.parametrize("finder", FINDERS)
def test_beside_a_foreign_finder(bare, tmp_path, finder):
    code = f"import sys\n{FINDERS[finder]}\n{DESCRIBE}describe('llamafactory.train.tuner')"
    fake_host(tmp_path)
    off = bare.run(code, tmp_path, SOLOPO_PLUGIN="off")
    assert off.returncode == 0 and off.stderr == "", off.stderr
    on = bare.run(code, tmp_path)
    assert on.returncode == 0 and on.stderr == "", on.stderr
    assert on.stdout.count("solopo_plugin/host/stage.py") == 2


def test_a_finder_that_always_raises_does_so_with_and_without(bare, tmp_path):
    code = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("llamafactory"): raise RuntimeError(name)
sys.meta_path.insert(0, Broken())
sys.meta_path.insert(0, sys.meta_path.pop(1))
try: import llamafactory.train.tuner
except RuntimeError as error: print(error)
try: import missing_module
except ModuleNotFoundError as error: print(error)
"""
    fake_host(tmp_path)
    on, off = bare.run(code, tmp_path), bare.run(code, tmp_path, SOLOPO_PLUGIN="off")
    assert on.stdout == off.stdout == "llamafactory\nNo module named 'missing_module'\n"
    assert on.stderr == off.stderr == ""


def test_a_loader_that_serves_several_modules(bare, tmp_path):
    """Modules in a zip file share one loader object: patching one must not reach its neighbours."""
    packed = shutil.make_archive(str(tmp_path / "host"), "zip", fake_host(tmp_path / "host"))
    code = DESCRIBE + "describe('llamafactory.train.tuner', 'llamafactory.train.unrelated')"
    on = bare.run(code, packed)
    assert on.returncode == 0 and on.stderr == "", on.stderr
    assert on.stdout.count("solopo_plugin/host/stage.py") == 2


def test_patched_once_however_often_it_is_looked_up_or_reloaded(bare, tmp_path):
    code = """
from importlib import reload, util
for _ in range(3):
    assert util.find_spec("llamafactory.train.tuner").name == "llamafactory.train.tuner"
assert "llamafactory.train.tuner" not in sys.modules
import llamafactory.train.tuner as tuner
describe("llamafactory.train.tuner")
reload(tuner)
describe("llamafactory.train.tuner")
from solopo_plugin.startup import HostFinder, activate
activate()
print(sys.meta_path.count(HostFinder), "finder")
"""
    on = bare.run(DESCRIBE + code, fake_host(tmp_path))
    assert on.returncode == 0 and on.stderr == "", on.stderr
    *twice, finders = on.stdout.splitlines()
    assert finders == "1 finder" and len(twice) % 2 == 0 and twice[: len(twice) // 2] == twice[len(twice) // 2 :]
    assert on.stdout.count("solopo_plugin/host/stage.py") == 4  # two functions, each wrapped once, before and after
