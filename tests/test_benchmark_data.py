"""How the benchmarks of the data pipeline measure; what they print is in tests/qa and tests/synthesis."""

import subprocess
import sys
from pathlib import Path

import benchmark_data
import pytest
from conftest import ROOT

CHILD = "import benchmark_data; print(benchmark_data.peak_kib())"
PARENT = f"""
import subprocess, sys
held = bytearray(b"x") * 2**29  # 512 MiB
sys.exit(subprocess.run([sys.executable, "-c", {CHILD!r}]).returncode)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux tells a process from its parent")
def test_the_peak_is_this_processs_own():
    """A small child of a large process, as where another program starts the benchmark."""
    done = subprocess.run(
        [sys.executable, "-c", PARENT], cwd=ROOT / "scripts", capture_output=True, text=True, check=True
    )
    assert 0 < int(done.stdout) < 2**18  # 256 MiB; getrusage says 512 and more
    assert benchmark_data.peak_kib() > int(done.stdout)
