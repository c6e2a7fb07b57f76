#!/usr/bin/env bash
# Fetch what a GPU machine without a network lacks: 17 wheels, 19 MB, into a folder that git ignores.
#
#     bash scripts/gpu/wheels.sh [FOLDER]          default: .whl in the repository's root
#
# Needs python3 with pip and a package index. Leaves FOLDER/*.whl, for this project, and FOLDER/trl/*.whl, for the rival:
# one environment cannot hold both versions of TRL. The versions are those of constraints.txt.
# The other machine is to have Python 3.12, torch 2.11, numpy, pandas, pyarrow >= 21, huggingface_hub 1.x, safetensors,
# for real.sh matplotlib and jinja2 (its tables: scipy), and for the rival transformers 5 and accelerate and peft of its
# own; `run.sh` lays the wheels over them.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-.whl}
platforms=()
for name in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${name}_x86_64")
done
fetch() { # FOLDER, then packages
    mkdir -p "$1"
    python3 -m pip --disable-pip-version-check download -q --no-deps --only-binary=:all: \
        --python-version 3.12 --implementation cp "${platforms[@]}" -d "$@"
}
rm -rf "$folder"
fetch "$folder" llamafactory==0.9.5 transformers==5.6.0 tokenizers==0.22.2 accelerate==1.11.0 peft==0.18.1 trl==0.24.0 \
    datasets==4.0.0 fsspec==2025.3.0 dill==0.3.8 multiprocess==0.70.16 omegaconf==2.4.0 liger-kernel==0.8.5
fetch "$folder/trl" trl==1.16.0 datasets==4.8.0 dill==0.4.1 multiprocess==0.70.19 fsspec==2026.2.0
find "$folder" -name '*.whl' -printf '%P %s\n' | sort | awk '{print; n += $2} END {print n / 1e6, "MB"}'
