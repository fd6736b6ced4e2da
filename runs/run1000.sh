#!/usr/bin/env bash
# Tier run1000: depth 32, about $1000 of 8×H100. The same stages as the speedrun, three settings apart.
DEPTH=32 SHARDS=800 BATCH=8 exec bash "$(dirname "${BASH_SOURCE[0]}")/speedrun.sh"
