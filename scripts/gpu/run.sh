#!/usr/bin/env bash
# Check and measure the packed step on one GPU, in one command of at most TOTAL seconds: correctness first, then whole
# optimizer steps of Qwen2.5-7B's shape with random weights beside the host's DPO, the paper's two stages and TRL's DPO,
# then the longest prompt. Nothing is downloaded.
#
#     bash scripts/gpu/run.sh                 one GPU of 80 GB, and an environment with solopo on PATH
#     WHEELS=.whl bash scripts/gpu/run.sh     the same without one: from the wheels that wheels.sh fetched
#     DRY=1 bash scripts/gpu/run.sh           all of it on a CPU at tiny shapes, in about two minutes
#
#   OUT         folder of the results (saves/gpu): gpu.json, written after every measurement; gpu.md, the page made of
#               it; log.txt. A second run with the same OUT measures only what gpu.json lacks.
#   TOTAL       seconds (540). What does not fit is left out, the most telling comes first, and the page says so.
#   WHEELS      folder of wheels; unset: the python3 on PATH has what is needed
#   TRL_PYTHON  a python that has trl >= 1.15; unset: made of WHEELS/trl, and without that TRL is not measured
#   MEMORY      GB of the card that a step may use: 85 lets a larger card stand for one of "80 GB"
#   PARTS       which of: cli check steps longest trl more options page. Default: all, in this order
cd "$(dirname "$0")/../.." || exit 1
began=$(date +%s)
OUT=${OUT:-saves/gpu} TOTAL=${TOTAL:-540} DRY=${DRY:-} WHEELS=${WHEELS:-} TRL_PYTHON=${TRL_PYTHON:-}
until=$((began + TOTAL - 25)) # then the page, which takes seconds; `page.py` can make it from gpu.json later too
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
if [ -n "$WHEELS" ]; then
    bash scripts/gpu/install.sh "$work/solopo" "$WHEELS" plugin || exit 1
    [ -n "$TRL_PYTHON" ] || [ ! -d "$WHEELS/trl" ] ||
        { bash scripts/gpu/install.sh "$work/trl" "$WHEELS/trl" && TRL_PYTHON=$work/trl/bin/python3; }
    export PATH="$work/solopo/bin:$PATH"
fi
export HF_HUB_OFFLINE=1 HF_HOME=$work/hf SOLOPO_CACHE=$work/cache TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
card=${CUDA_VISIBLE_DEVICES:-0} # one: a trainer would spread a step over several
export CUDA_VISIBLE_DEVICES=${card%%,*}
[ -z "$DRY" ] || export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
[ -n "$DRY" ] || python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "No torch here that sees a GPU: DRY=1 runs the same on a CPU, WHEELS=.whl brings what is missing."; exit 1; }
echo "ready, $((until - $(date +%s))) s left"

failed=
memory=${MEMORY:+--memory $MEMORY} # two words, or none
part() { # NAME SECONDS SCRIPT...: at most so many seconds and never beyond the end; shows lines that begin with >
    local name=$1 now most=$2 python=$3 code
    shift 3
    now=$(date +%s)
    [ -z "$DRY" ] || most=$((4 * most)) # on processors that are slow, or busy with something else
    [ "$most" -lt $((until - now)) ] || most=$((until - now))
    case " ${PARTS:-cli check steps longest trl more options page} " in *" $name "*) ;; *) return ;; esac
    if [ "$most" -ge 10 ]; then
        timeout -k 5 "$most" "$python" "$@" --out "$OUT" --until $((now + most - 5)) ${DRY:+--dry} 2>&1 |
            tee -a "$OUT/log.txt" | grep --line-buffered '^> ' | cut -c3-400
        code=${PIPESTATUS[0]}
    else
        code="none, no time left"
    fi
    [ "$code" = 0 ] || failed="$failed $name"
    echo "$name: exit status $code, $((until - $(date +%s))) s left"
}

part cli 90 python3 scripts/gpu/check.py --cli
part check 120 python3 scripts/gpu/check.py
part steps 240 python3 scripts/gpu/steps.py --folder "$work/steps" --jobs first $memory
part longest 180 python3 scripts/gpu/steps.py --folder "$work/steps" --jobs longest $memory
if [ -n "$TRL_PYTHON" ]; then
    part trl 160 "$TRL_PYTHON" scripts/gpu/steps.py --folder "$work/steps" --jobs trl $memory
else
    echo "trl: not measured, there is neither TRL_PYTHON nor WHEELS/trl"
fi
part more 300 python3 scripts/gpu/steps.py --folder "$work/steps" --jobs more $memory
part options 90 python3 scripts/gpu/check.py --parts options
until=$((began + TOTAL))
part page 30 python3 scripts/gpu/page.py
echo "written: $OUT/gpu.json, gpu.md, log.txt${failed:+; not all done or right:$failed}"
[ -z "$failed" ]
