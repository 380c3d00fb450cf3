#!/usr/bin/env bash
# The ablation of the HaNoRec paper (arXiv 2511.18740, SIGIR 2026): five second stages after one SFT run.
#
# Aims at the paper's ablation table on MicroLens. Published AUC / HR@3 / NDCG@3 [%]:
#   full       78.52 / 73.60 / 56.73
#   w/o HaRS   75.18 / 67.93 / 51.26    lambda = eta = 1
#   w/o NoDO   77.24 / 71.45 / 54.38    sigma = 0
#   w/o SAM    76.89 / 70.12 / 53.91    hardness from the pair's own similarity, without Top-K clusters
#   w/o ALL    74.03 / 65.87 / 49.82    SFT and plain DPO
# Expected commands only: this recipe was not run here on the pretrained backbones.
#
# Needs the SFT run of recipes/microlens.sh (its raw data and folder layout are described there):
#   runs/$DATA-<backbone>/sft
# "full" and "without_all" have the options of "hanorec" and "plain_dpo" of that recipe. They are trained again here.
# Netflix and MovieLens-1M: DATA=netflix SIGMA=0.1 bash recipes/ablation.sh, DATA=ml-1m SIGMA=0.1 bash recipes/ablation.sh
set -euo pipefail

DATA=${DATA:-microlens}
BACKBONE=${BACKBONE:-Qwen/Qwen2.5-VL-3B-Instruct}
SIGMA=${SIGMA:-0.05}
NAME=$DATA-${BACKBONE##*/}
RUNS=runs/$NAME

accelerate launch dpo_hano.py --sft "$RUNS/sft" --out "$RUNS/full" --sigma "$SIGMA" --lora-dropout 0.05 --overwrite
accelerate launch dpo_hano.py --sft "$RUNS/sft" --out "$RUNS/without_hars" --sigma "$SIGMA" --hardness none --responsiveness none --lora-dropout 0.05 --overwrite
accelerate launch dpo_hano.py --sft "$RUNS/sft" --out "$RUNS/without_nodo" --sigma 0 --lora-dropout 0.05 --overwrite
accelerate launch dpo_hano.py --sft "$RUNS/sft" --out "$RUNS/without_sam" --sigma "$SIGMA" --hardness cosine --lora-dropout 0.05 --overwrite
accelerate launch dpo_hano.py --sft "$RUNS/sft" --out "$RUNS/without_all" --sigma 0 --hardness none --responsiveness none --lora-dropout 0.05 --overwrite
python evaluate.py --run "$RUNS/sft" "$RUNS/full" "$RUNS/without_hars" "$RUNS/without_nodo" "$RUNS/without_sam" "$RUNS/without_all" --compare "$RUNS/full"
