#!/usr/bin/env bash
# Every check of the project: `bash test.sh`.  Arguments go to pytest: `bash test.sh -k tokenizer`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source tools/setup.sh
setup_venv dev
exec python -m pytest --durations=10 "$@"
