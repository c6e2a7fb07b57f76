"""The host's own server of a model, for tests that compare it with ours."""

import os
import subprocess
from contextlib import contextmanager
from pathlib import Path

from conftest import BIN, ROOT, write_recipe
from scripted_server import free_port, wait_for


@contextmanager
def host_api(model: Path, log: Path):
    """`llamafactory-cli api` in a process of its own, on loopback."""
    port = free_port()
    args = write_recipe(log.with_suffix(".yaml"), dict(model_name_or_path=str(model), template="qwen"))
    environment = os.environ | {"API_PORT": str(port), "API_HOST": "127.0.0.1", "API_VERBOSE": "0"}
    environment |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    command = [str(BIN / "llamafactory-cli"), "api", args]
    with open(log, "w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
    try:
        yield f"http://127.0.0.1:{port}/v1", lambda: wait_for(port, 120)
    finally:
        process.kill()
        process.wait()
