#!/usr/bin/env bash
# MicroLens: the HaNoRec paper's setting (arXiv 2511.18740, SIGIR 2026), for one of its four backbones.
#
# Aims at the rows of the paper's tables for MicroLens.
# Published NDCG@3 [%] by backbone: Qwen2-VL-2B 56.64, Qwen2.5-VL-3B 56.73, Qwen2.5-VL-7B 57.56,
# LLaVA-NeXT-7B 58.05. With Qwen2.5-VL-3B: AUC 78.52, HR@3 73.60, NDCG@3 56.73; SFT and plain DPO: 74.03, 65.87, 49.82.
# Expected commands only: this recipe was not run here on the pretrained backbones.
#
# Raw data: the files of HaNoRec's authors, github.com/wangyu0627/HaNoRec. Expected layout:
#   raw/microlens/train.tsv, val.tsv, test.tsv    user<TAB>item item ..., oldest first; the file is the user's split
#   raw/microlens/<Name>_titles.csv               item,title
#   raw/microlens/images/<item>.jpg
# MicroLens as its own authors publish it (github.com/westlake-repl/MicroLens) is read with --dataset microlens --split
# user: the users of the three splits are then drawn here.
#
#   bash recipes/microlens.sh
#   BACKBONE=Qwen/Qwen2-VL-2B-Instruct bash recipes/microlens.sh
#
# The paper's backbones: Qwen/Qwen2-VL-2B-Instruct, Qwen/Qwen2.5-VL-3B-Instruct, Qwen/Qwen2.5-VL-7B-Instruct, and
# LLaVA-NeXT-7B, which is llava-hf/llava-v1.6-vicuna-7b-hf or llava-hf/llava-v1.6-mistral-7b-hf.
set -euo pipefail

DATA=${DATA:-microlens}
BACKBONE=${BACKBONE:-Qwen/Qwen2.5-VL-3B-Instruct}
SIGMA=${SIGMA:-0.05}
NAME=$DATA-${BACKBONE##*/}

python prepare_data.py --dataset hanorec --source "raw/$DATA" --model "$BACKBONE" --out "data/$NAME"
accelerate launch sft.py --data "data/$NAME" --out "runs/$NAME/sft" --overwrite
accelerate launch dpo_hano.py --sft "runs/$NAME/sft" --out "runs/$NAME/plain_dpo" --hardness none --responsiveness none --sigma 0 --lora-dropout 0.05 --overwrite
accelerate launch dpo_hano.py --sft "runs/$NAME/sft" --out "runs/$NAME/hanorec" --sigma "$SIGMA" --lora-dropout 0.05 --overwrite
python evaluate.py --run "runs/$NAME/sft" "runs/$NAME/plain_dpo" "runs/$NAME/hanorec" --compare "runs/$NAME/plain_dpo"
