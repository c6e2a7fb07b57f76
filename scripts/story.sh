#!/usr/bin/env bash
# The whole project, read top to bottom: rows -> training -> the same questions before and after -> report.
#
#     make story        (installs first)        or: bash scripts/story.sh
#
# Each step is the command that you would type, with a recipe of examples/yaml/story; for a model of yours change the
# recipes, not the commands. The model here has 0.6 million parameters and ships with the project: nothing is downloaded,
# no GPU is needed, and it takes under three minutes on two CPU cores. It answers questions over two hops:
#
#     Document 1: Gabda works for Rudco . ...  Document 7: Rudco sits in Tarville . ...
#     Question: In what town is the employer of Gabda ?
#     Answer: Gabda works for Rudco . Rudco sits in Tarville . The answer is: Tarville
#
# among nine documents well, among forty hardly ever. A killed story continues where it was, but for the training.

set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=   # one thread: so small a model gains nothing from more
step() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

# 1. Rows. Each question gets a short and a long context around the same evidence. The model that is to be trained answers
#    the short one several times; a right and a wrong answer are the pair. One file serves SoLoPO and its baselines.
step "1/5 rows: scripts/build_data.py"
python scripts/build_data.py examples/yaml/story/data.yaml

# 2. Look at them before you train: lengths, where the evidence lies, leaks, and a reader for single rows, as a page.
step "2/5 look: scripts/inspect_data.py"
python scripts/inspect_data.py saves/story/data/work

# 3. Train. `stage: solopo` is what this project adds to LLaMA-Factory: prefer the right answer on the short context, and
#    keep its reward when that context is buried in the long one. On GPUs the same command is given FORCE_TORCHRUN=1.
step "3/5 train: llamafactory-cli train"
llamafactory-cli train examples/yaml/story/train.yaml
python scripts/show_run.py saves/story/model

# 4. Ask the model before and after training the same questions, of people and firms that no training row has.
step "4/5 evaluate: scripts/evaluate.py"
python scripts/evaluate.py examples/yaml/story/eval.yaml

# 5. Read. The pages are files of their own: open them in a browser, send them to a colleague.
step "5/5 read"
cat <<PAGES
rows      saves/story/data/work_inspection/index.html
training  saves/story/model/training_loss.png and the other curves beside it
report    saves/story/eval/report/index.html
What comes next (a larger model, merging, chat, serving): docs/after_training.md
PAGES
