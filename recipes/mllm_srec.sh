#!/usr/bin/env bash
# MLLM-SRec (Scientific Reports 2025, doi 10.1038/s41598-025-14251-1), then HaNoRec on top of it.
#
# Aims at the metrics of the article's tables: Recall and NDCG at 5, 10 and 20. The article's sizes of window and step,
# its prompts and its backbone are not known here (docs/mllm_srec.md), so the numbers need not agree.
# Expected commands only: this recipe was not run here on the pretrained backbones.
#
# Raw data: MicroLens, github.com/westlake-repl/MicroLens. Expected layout:
#   raw/microlens-original/<Name>_pairs.tsv or <Name>_pairs.csv
#   raw/microlens-original/<Name>_titles.csv
#   raw/microlens-original/<Name>_covers/<item>.jpg
# A list has 100 candidates. Only the run `direct` has their images in its prompts. --max-pixels 50176 keeps an image at
# 64 tokens (Qwen).
set -euo pipefail

DATA=${DATA:-microlens}
BACKBONE=${BACKBONE:-Qwen/Qwen2.5-VL-3B-Instruct}
SIGMA=${SIGMA:-0.05}
NAME=$DATA-srec-${BACKBONE##*/}

python prepare_data.py --dataset microlens --source "raw/$DATA-original" --negatives 99 --max-pixels 50176 --model "$BACKBONE" --out "data/$NAME"
accelerate launch -m mllm_srec.summarize --data "data/$NAME"
accelerate launch sft.py --data "data/$NAME" --prompt cot --out "runs/$NAME/cot" --overwrite
accelerate launch sft.py --data "data/$NAME" --tasks yesno --candidate-images --out "runs/$NAME/direct" --overwrite
accelerate launch dpo_hano.py --sft "runs/$NAME/cot" --out "runs/$NAME/cot_hanorec" --sigma "$SIGMA" --lora-dropout 0.05 --overwrite
python evaluate.py --run "runs/$NAME/cot" "runs/$NAME/cot_hanorec" "runs/$NAME/direct" --compare "runs/$NAME/direct" --batch-size 1
