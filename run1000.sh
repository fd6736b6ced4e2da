#!/usr/bin/env bash
# The $1000 tier: depth 32 on 8×H100.
exec bash "$(dirname "${BASH_SOURCE[0]}")/speedrun.sh" run1000 "$@"
