#!/usr/bin/env bash
# Tier laptop: a folder of your own (text/, chat/, tasks/, core/) on a CPU or one small GPU. Called by
# speedrun.sh: `bash speedrun.sh laptop FOLDER [DEPTH] [STEPS]`; one to three hours with the defaults.
set -euo pipefail
stage() { printf '\n── %s ──\n' "$1"; }
data="${1:-}"
depth="${2:-4}"
steps="${3:-2000}"
if [ -z "$data" ]; then
    echo "error: name the folder with your data: bash speedrun.sh laptop FOLDER" >&2
    exit 2
fi

stage "The folder"
python -m nanochat_nb.dataset --source "$data"
stage "Tokenizer"
python -m nanochat_nb.tokenizer --data_dir "$data" --vocab_size 8192 --max_chars 50000000

stage "Pretraining: depth $depth"
python -m nanochat_nb.pretraining --data_dir "$data" --depth "$depth" --max_seq_len 512 --device_batch_size 16 \
    --total_batch_size 16384 --num_iterations "$steps" --eval_every 100 --eval_tokens 200000 --save_every 200 --resume
python -m nanochat_nb.evaluation --data_dir "$data" --source base --max_per_task 100 --resume

stage "Mid-training"
python -m nanochat_nb.finetuning --data_dir "$data" --stage mid --device_batch_size 16 --total_batch_size 16384 \
    --num_iterations "$((steps / 4))" --save_every 200 --resume
python -m nanochat_nb.chat_eval --data_dir "$data" --source mid --max_problems 100 --resume

stage "Supervised finetuning"
python -m nanochat_nb.finetuning --data_dir "$data" --stage sft --device_batch_size 16 --total_batch_size 16384 \
    --num_iterations "$((steps / 8))" --save_every 200 --resume
python -m nanochat_nb.chat_eval --data_dir "$data" --source sft --max_problems 100 --resume

stage "Report card"
python -m nanochat_nb.report --output report.md
