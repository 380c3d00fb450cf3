#!/usr/bin/env bash
# MovieLens-1M: the HaNoRec paper's setting (arXiv 2511.18740, SIGIR 2026), for one of its four backbones.
#
# Aims at the rows of the paper's tables for MovieLens-1M.
# Published NDCG@3 [%] by backbone: Qwen2-VL-2B 54.10, Qwen2.5-VL-3B 54.03, Qwen2.5-VL-7B 54.08,
# LLaVA-NeXT-7B 54.22.
# Expected commands only: this recipe was not run here on the pretrained backbones.
#
# Raw data: the files of HaNoRec's authors, github.com/wangyu0627/HaNoRec. Expected layout:
#   raw/ml-1m/train.tsv, val.tsv, test.tsv    user<TAB>item item ..., oldest first; the file is the user's split
#   raw/ml-1m/<Name>_titles.csv               item,title
#   raw/ml-1m/images/<item>.jpg
# MovieLens-1M as GroupLens ships it (grouplens.org/datasets/movielens) is read with --dataset movielens --split user: the
# users of the three splits are then drawn here. GroupLens ships no posters; they go to raw/ml-1m/posters/<movieId>.jpg.
#
#   bash recipes/movielens_1m.sh
#   BACKBONE=Qwen/Qwen2-VL-2B-Instruct bash recipes/movielens_1m.sh
#
# The paper's backbones: Qwen/Qwen2-VL-2B-Instruct, Qwen/Qwen2.5-VL-3B-Instruct, Qwen/Qwen2.5-VL-7B-Instruct, and
# LLaVA-NeXT-7B, which is llava-hf/llava-v1.6-vicuna-7b-hf or llava-hf/llava-v1.6-mistral-7b-hf.
set -euo pipefail

DATA=${DATA:-ml-1m}
BACKBONE=${BACKBONE:-Qwen/Qwen2.5-VL-3B-Instruct}
SIGMA=${SIGMA:-0.1}
NAME=$DATA-${BACKBONE##*/}

python prepare_data.py --dataset hanorec --source "raw/$DATA" --model "$BACKBONE" --out "data/$NAME"
accelerate launch sft.py --data "data/$NAME" --out "runs/$NAME/sft" --overwrite
accelerate launch dpo_hano.py --sft "runs/$NAME/sft" --out "runs/$NAME/plain_dpo" --hardness none --responsiveness none --sigma 0 --lora-dropout 0.05 --overwrite
accelerate launch dpo_hano.py --sft "runs/$NAME/sft" --out "runs/$NAME/hanorec" --sigma "$SIGMA" --lora-dropout 0.05 --overwrite
python evaluate.py --run "runs/$NAME/sft" "runs/$NAME/plain_dpo" "runs/$NAME/hanorec" --compare "runs/$NAME/plain_dpo"
