#!/usr/bin/env bash
# Tier speedrun: depth 20 on 8×H100, the $100 run; fewer GPUs take longer and end at the same place.
# Called by speedrun.sh, or by run1000.sh with DEPTH=32 SHARDS=800 BATCH=8.
set -euo pipefail
stage() { printf '\n── %s ──\n' "$1"; }
if [ "${GPUS:-0}" -lt 1 ]; then
    echo "error: this tier needs a CUDA GPU, and nvidia-smi shows none; try: bash speedrun.sh pocket" >&2
    exit 2
fi
train() { OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node="$GPUS" -m "$@"; }
depth="${DEPTH:-20}"
batch="${BATCH:-16}"       # sequences per GPU and micro-batch, as nanochat_nb.scaling plans them for 80 GB
data=climbmix

stage "Text for the tokenizer, then the rest in the background; conversations and tasks"
python -m nanochat_nb.dataset --source "$data" --num_shards 9     # 2 billion characters and some more
python -m nanochat_nb.dataset --source "$data" --num_shards "${SHARDS:-240}" &
download=$!
python -m nanochat_nb.tasks --data_dir "$data"
stage "Tokenizer"
python -m nanochat_nb.tokenizer --data_dir "$data" --vocab_size 65536
wait "$download"

stage "Pretraining: depth $depth"
train nanochat_nb.pretraining --data_dir "$data" --depth="$depth" --device_batch_size="$batch" --save_every 1000 --resume
train nanochat_nb.evaluation --data_dir "$data" --source base --resume

stage "Mid-training"
train nanochat_nb.finetuning --data_dir "$data" --stage mid --device_batch_size="$batch" --total_batch_size 524288 --resume
train nanochat_nb.chat_eval --data_dir "$data" --source mid --resume

stage "Supervised finetuning"
train nanochat_nb.finetuning --data_dir "$data" --stage sft --device_batch_size="$batch" --resume
train nanochat_nb.chat_eval --data_dir "$data" --source sft --resume

stage "Reinforcement learning on GSM8K"
train nanochat_nb.reinforcement --data_dir "$data" --resume
train nanochat_nb.chat_eval --data_dir "$data" --source rl --tasks GSM8K --resume

stage "Report card"
python -m nanochat_nb.report --output report.md
