#!/usr/bin/env bash
# Train on this machine. Without CUDA, <gpus> is the number of CPU processes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/tools/launch.sh"
usage="usage: bash train.sh <gpus> <config> [tag] [main.py flags...]"
answer_help "$usage" "$@"
(($# >= 2)) && [[ $2 != -* ]] || usage "$usage"
gpus=$1 config=$2
shift 2
tag=()
if (($#)) && [[ $1 != -* ]]; then
    tag=(--tag "$1")
    shift
fi
launch "$gpus" --cfg "$config" ${tag[@]+"${tag[@]}"} "$@"
