#!/usr/bin/env bash
# Submit a training run to SLURM, one task per GPU. Preempted or out of time, it saves, is requeued and continues.
# From the environment, with defaults: PARTITION (the cluster's), GPUS_PER_NODE (8, or <gpus> if fewer), CPUS_PER_TASK (10),
# TIME_LIMIT (2-00:00:00), GRACE (seconds before the time limit at which the run saves: 180), MAX_RESTARTS (of a run whose
# process died: 3), MASTER_ADDR (the first node), DATA_PATH, SBATCH_FLAGS, CHECK_FIRST (1; 0 queues the job unchecked,
# for machines without access to the data).
set -euo pipefail
usage="usage: bash train_slurm.sh <gpus> <config> <job-name> [main.py flags...]"

# Run by each task: the command, whose exit status is then written to a file of this restart and rank. A signal reaches
# every process of a task: the command, which handles it, and this shell, which must outlive it.
# shellcheck disable=SC2016  # expanded in the task
task='folder=$1; shift; trap : HUP INT TERM USR1; "$@"; status=$?
echo "$status" 2>/dev/null >"$folder/$DAT_RESTART_COUNT.$SLURM_PROCID"; exit "$status"'

# Whether a process died, or exited because another one did. 129, 130, 138 and 143: the run was asked to stop.
died() { (($1 == 75 || ($1 > 128 && $1 != 129 && $1 != 130 && $1 != 138 && $1 != 143))); }

# Whether SLURM preempts this job. Where that leaves a GraceTime, SLURM asks only the tasks to stop, and requeues the job
# only if it still runs when that time is over.
preempted() { [[ $(scontrol show job "$SLURM_JOB_ID") == *PreemptTime=[0-9]* ]]; }

if [[ ${1:-} == --inside-job ]]; then
    folder=$(mktemp -d "$2/$SLURM_JOB_ID.XXXXXX") # shared by all nodes
    trap 'rm -rf "$folder"' EXIT
    shift 2
    [[ ${SLURM_RESTART_COUNT:-0} != 0 ]] || DAT_LAUNCHED=$(date +%s) # a requeued job keeps the time of its submission
    export DAT_LAUNCHED
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not inherit it from sbatch
    for ((restart = 0; ; restart++)); do
        highest=0
        # After one task exits, the others have a minute to exit on their own: their exit status gives the reason.
        DAT_RESTART_COUNT=$restart DAT_RESTARTS_LEFT=$((${MAX_RESTARTS:-3} - restart)) \
            srun --kill-on-bad-exit=0 --wait=60 bash -c "$task" task "$folder" "$@" || highest=$?
        # srun reports only the highest status. A task that failed by itself takes precedence over the status of the others.
        decided=0
        for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
            read -r status 2>/dev/null <"$folder/$restart.$rank" || continue # killed before it could leave one
            died "$status" || ((status <= decided)) || decided=$status
        done
        ((decided)) || decided=$highest
        # 128 + SIGUSR1: the time limit is near. In both cases everything is saved.
        if ((decided == 138)) || { ((decided == 143)) && preempted; }; then
            scontrol requeue "$SLURM_JOB_ID"
            exit
        fi
        died "$decided" || exit "$decided"
        ((restart < ${MAX_RESTARTS:-3})) || exit "$decided"
        echo "a process died; restart $((restart + 1)) of ${MAX_RESTARTS:-3}"
    done
fi

source "$(dirname "${BASH_SOURCE[0]}")/tools/launch.sh"
answer_help "$usage" "$@"
(($# >= 3)) && [[ $2 != -* && $3 != -* ]] || usage "$usage"
gpus=$1 config=$2 name=$3
shift 3
[[ $gpus =~ ^[1-9][0-9]*$ ]] || usage "the number of GPUs must be a positive whole number, not '$gpus'"
per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
[[ $per_node =~ ^[1-9][0-9]*$ ]] || usage "GPUS_PER_NODE must be a positive whole number, not '$per_node'"
[[ ${MAX_RESTARTS:-3} =~ ^[0-9]+$ ]] || usage "MAX_RESTARTS must be a whole number, not '$MAX_RESTARTS'"
((gpus % per_node == 0)) || usage "$gpus GPUs do not fill nodes of $per_node; set GPUS_PER_NODE"
command -v sbatch >/dev/null || usage "train_slurm.sh: there is no sbatch here; run it where SLURM is, or use train.sh"
# Report a wrong flag now, not after the job has waited in the queue. This machine need not have the job's GPUs and cores.
if [[ ${CHECK_FIRST:-1} != 0 ]]; then
    LOCAL_WORLD_SIZE=$gpus "$python" "$root/main.py" --cfg "$config" --tag "$name" "$@" \
        --opts DATA.NUM_WORKERS 0 --device cpu --check
    [[ " $* " != *" --check "* ]] || exit 0
fi
cpu_only=false
[[ ! " $* " =~ \ (--device[ =]|DEVICE\ )cpu\  ]] || cpu_only=true
device=(--device cuda) # a node whose driver is broken must not train on its CPU
[[ ! " $* " =~ \ (--device[ =]|DEVICE\ ) ]] || device=()

flags=(--job-name "$name" --ntasks "$gpus" --ntasks-per-node "$per_node" --nodes $((gpus / per_node)))
flags+=(--cpus-per-task "${CPUS_PER_TASK:-10}" --time "${TIME_LIMIT:-2-00:00:00}" --requeue --open-mode append)
flags+=(--signal "USR1@${GRACE:-180}" --output "$root/output/slurm/%x-%j.log" --export ALL)
[[ -z ${PARTITION:-} ]] || flags+=(--partition "$PARTITION")
$cpu_only || flags+=(--gres "gpu:$per_node")
mkdir -p "$root/output/slurm"
DAT_LAUNCHED=$(date +%s)
export DAT_LAUNCHED # sbatch passes it to the job
# shellcheck disable=SC2086  # SBATCH_FLAGS holds several words on purpose
exec sbatch "${flags[@]}" ${SBATCH_FLAGS:-} "$root/train_slurm.sh" --inside-job "$root/output/slurm" \
    "$python" "$root/main.py" --cfg "$config" --tag "$name" "$@" ${device[@]+"${device[@]}"}
