#!/usr/bin/env bash
# A SLURM of two nodes on this machine, on loopback, with daemons, key and state of its own in one folder.
#   cluster.sh check                print what is missing and exit with status 1, or print nothing
#   cluster.sh install              install SLURM on Debian or Ubuntu
#   cluster.sh start|stop <folder>  SLURM_CONF=<folder>/slurm.conf is then what sbatch and the others need
set -euo pipefail
usage="usage: bash tests/slurm/cluster.sh check | install | start <folder> | stop <folder>"

check() {
    local program
    for program in munged mungekey slurmctld slurmd sbatch srun scontrol; do
        if ! command -v "$program" >/dev/null; then
            echo "$program is not installed (bash tests/slurm/cluster.sh install)"
            return 1
        fi
    done
    if ((EUID != 0)); then
        echo "the daemons of SLURM need root"
        return 1
    fi
}

configure() {
    local folder=$1 host
    host=$(hostname -s)
    cat >"$folder/slurm.conf" <<END
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$2
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
JobRequeue=1
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$(($2 + 1))-$(($2 + 2))] CPUs=1 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
END
}

start() {
    local folder=$1 node
    mkdir -p "$folder/state" "$folder/spool/n1" "$folder/spool/n2"
    configure "$folder" $((20000 + RANDOM % 10000))
    export SLURM_CONF=$folder/slurm.conf
    [[ -f $folder/munge.key ]] || mungekey --create --keyfile "$folder/munge.key"
    # Forced, as only root need come to the socket.
    munged --force --key-file "$folder/munge.key" --socket "$folder/munge.socket" --pid-file "$folder/munged.pid" \
        --log-file "$folder/munged.log" --seed-file "$folder/munged.seed"
    munge --socket "$folder/munge.socket" --no-input | unmunge --socket "$folder/munge.socket" >/dev/null
    slurmctld
    for node in n1 n2; do
        slurmd -N "$node"
    done
    for _ in {1..60}; do
        sleep 0.5
        [[ $(sinfo --noheader --Format statecompact:10,nodes:5 2>/dev/null) != *idle*2* ]] || return 0
    done
    tail -n 20 "$folder"/*.log
    echo "the nodes did not become idle within 30 s"
    return 1
}

stop() {
    local name state status=0
    export SLURM_CONF=$1/slurm.conf
    if [[ -f $1/slurmctld.pid ]]; then
        for state in PENDING RUNNING SUSPENDED; do # scancel accepts one state at a time
            scancel --state "$state" || status=1
        done
        for _ in {1..80}; do # a job that does not exit on its own is killed after KillWait
            [[ -n $(squeue --noheader) ]] || break
            sleep 0.5
        done
    fi
    for name in slurmd-n1 slurmd-n2 slurmctld munged; do
        [[ ! -f $1/$name.pid ]] || kill "$(<"$1/$name.pid")" || true
    done
    return $status
}

case ${1:-}:$# in
check:1) check ;;
install:1) apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y slurm-wlm munge ;;
start:2) start "$(realpath -m "$2")" ;;
stop:2) stop "$(realpath -m "$2")" ;;
*)
    echo "$usage" >&2
    exit 2
    ;;
esac
