# Sourced by train.sh and evaluate.sh: launch <processes> <main.py arguments...>.
# One process runs directly; more run under torchrun on a free port of this machine, after the arguments were checked once.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null || python=python3

usage() {
    echo "$1" >&2
    exit 2
}

# answer_help <usage> <arguments...>: if --help or -h is among the arguments, print the usage and the flags, and exit.
answer_help() {
    local usage=$1 word
    shift
    for word; do
        [[ $word == --help || $word == -h ]] || continue
        echo "$usage"
        exec "$python" "$root/main.py" --help
    done
}

launch() {
    local processes=$1
    shift
    [[ $processes =~ ^[1-9][0-9]*$ ]] || usage "the number of GPUs must be a positive whole number, not '$processes'"
    if ((processes == 1)); then
        exec "$python" "$root/main.py" "$@"
    fi
    if [[ " $* " == *" --check "* ]]; then # check only
        LOCAL_WORLD_SIZE=$processes exec "$python" "$root/main.py" "$@"
    fi
    LOCAL_WORLD_SIZE=$processes "$python" "$root/main.py" "$@" --check >/dev/null # the run itself prints the warnings
    # Divide the cores among the processes, so that processes on CPU do not slow each other down.
    local cores
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) # nproc respects the CPU affinity
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / processes > 0 ? cores / processes : 1))}
    exec "$python" "$root/tools/launch.py" "$processes" "$@"
}
