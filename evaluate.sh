#!/usr/bin/env bash
# Evaluate a checkpoint on this machine. Without CUDA, <gpus> is the number of CPU processes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/tools/launch.sh"
usage="usage: bash evaluate.sh <gpus> <config> <checkpoint> [main.py flags...]"
answer_help "$usage" "$@"
(($# >= 3)) && [[ $2 != -* && $3 != -* ]] || usage "$usage"
gpus=$1 config=$2 checkpoint=$3
shift 3
launch "$gpus" --cfg "$config" --eval --resume "$checkpoint" "$@"
