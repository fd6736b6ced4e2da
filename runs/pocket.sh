#!/usr/bin/env bash
# Tier pocket: every stage on two CPU cores, with the built-in world. Called by speedrun.sh.
set -euo pipefail
stage() { printf '\n── %s ──\n' "$1"; }

stage "The built-in world: text, conversations, tasks"
python -m nanochat_nb.dataset --source pocket
stage "Tokenizer"
python -m nanochat_nb.tokenizer --vocab_size 4096

stage "Pretraining: depth 4"
python -m nanochat_nb.pretraining --depth 4 --max_seq_len 256 --device_batch_size 16 --total_batch_size 8192 \
    --num_iterations 260 --eval_every 50 --eval_tokens 80000 --save_every 50 --resume
python -m nanochat_nb.evaluation --source base --split_tokens 80000 --resume

stage "Mid-training"
python -m nanochat_nb.finetuning --stage mid --device_batch_size 16 --total_batch_size 8192 --num_iterations 130 \
    --eval_every 50 --save_every 50 --resume
python -m nanochat_nb.chat_eval --source mid --max_problems 300 --resume

stage "Supervised finetuning"
python -m nanochat_nb.finetuning --stage sft --device_batch_size 16 --total_batch_size 8192 --num_iterations 100 \
    --eval_every 50 --save_every 50 --resume
python -m nanochat_nb.chat_eval --source sft --max_problems 300 --resume

stage "Reinforcement learning on sums"
python -m nanochat_nb.reinforcement --num_iterations 40 --examples_per_step 16 --num_samples 8 --max_new_tokens 96 \
    --init_lr_frac 0.05 --eval_every 20 --eval_examples 300 --save_every 20 --resume
python -m nanochat_nb.chat_eval --source rl --max_problems 300 --resume

stage "Report card"
python -m nanochat_nb.report --output report.md
