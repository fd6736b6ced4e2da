#!/usr/bin/env bash
# From a fresh clone to a chat with your own model: install, run every stage, write the report card.
#
#   bash speedrun.sh                 the tier that fits this machine: speedrun with GPUs, else pocket
#   bash speedrun.sh pocket          the built-in world on a CPU, minutes, no network once installed
#   bash speedrun.sh laptop FOLDER   your own shards and tasks on a CPU or one small GPU
#   bash speedrun.sh speedrun        the $100 tier on one to eight CUDA GPUs
#   bash speedrun.sh run1000         the $1000 tier
#
# Killed? Run it again: stages that are done are reused, the interrupted one goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

gpus=0
if command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1; then
    gpus=$(nvidia-smi -L | grep -c '^GPU')
fi
tier="${1:-$([ "$gpus" -gt 0 ] && echo speedrun || echo pocket)}"
tiers=$(for file in runs/*.sh; do basename "$file" .sh; done | tr '\n' ' ')
if [[ ! " $tiers" == *" $tier "* ]]; then
    echo "error: unknown tier '$tier'; the tiers are: $tiers" >&2
    exit 2
fi
[ $# -gt 0 ] && shift

source tools/setup.sh
setup_venv serve
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat_nb}"
export GPUS="$gpus"

started=$SECONDS
bash "runs/$tier.sh" "$@"

echo
echo "Done in $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s. The report card is report.md."
echo "Chat with your model:"
echo
echo "    source .venv/bin/activate && python -m nanochat_nb.terminal"
echo
echo "or in the browser: python -m nanochat_nb.serving, then open http://127.0.0.1:8000"
