#!/bin/bash
# Train on a Slurm cluster:
#
#     sbatch [sbatch options] slurm/base.sh [trainer flags]
#
# for example, two nodes with eight GPUs each:
#
#     sbatch -N 2 --gpus-per-node 8 --cpus-per-gpu 8 slurm/base.sh --model peer-base --save runs/base --load runs/base
#
# Options on sbatch's command line win over the #SBATCH lines below, and trainer flags after the script's name win over
# the script's own. GPUs are left to the command line: a cluster without any would refuse a script that asks for them.
#
# Read from the environment in which sbatch is called:
#   PEER_VENV                 virtual environment to run in; otherwise the environment is the one sbatch was called in
#   PEER_HOME                 checkout to run; otherwise the one this script lies in
#   PEER_MAX_RESTARTS         how often the job requeues itself (50); 0: never
#   MASTER_ADDR, MASTER_PORT  where the ranks meet; otherwise the job's first node and a port made from the job's number

#SBATCH --job-name=peer
#SBATCH --nodes=1
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
# (append: a job that is put back into the queue goes on in the same file)
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
# (five minutes before the time limit this script is warned, has the run save and stop, and requeues the job)

set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

# sbatch runs a copy of this script, so its own path says where the checkout is only under salloc. Slurm remembers the
# path that was given to sbatch, with the trainer flags behind it.
find_checkout() {
    if [[ -n ${PEER_HOME:-} ]]; then
        [[ -f $PEER_HOME/peer_scale/pretrain.py ]] || fail "PEER_HOME is '$PEER_HOME'; it has no peer_scale/pretrain.py"
        echo "$PEER_HOME"
        return
    fi
    local submitted folder
    submitted=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p')
    submitted=${submitted%%$'\n'*}
    if (($#)); then submitted=${submitted%" $*"}; fi
    for folder in "$(dirname "$submitted")/.." "$(dirname "${BASH_SOURCE[0]}")/.." "${SLURM_SUBMIT_DIR:-.}"; do
        if [[ -f $folder/peer_scale/pretrain.py ]]; then
            (cd "$folder" && pwd)
            return
        fi
    done
    fail "found no checkout around '$submitted' nor in '${SLURM_SUBMIT_DIR:-}'; set PEER_HOME to one"
}

# The first node by name, as all nodes know it; where names mean nothing, the address Slurm itself uses for it.
rendezvous_address() {
    local nodes node
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    node=${nodes%%$'\n'*}
    if getent ahosts "$node" >/dev/null; then
        echo "$node"
    else
        scontrol show node "$node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'
    fi
}

[[ -n ${SLURM_JOB_ID:-} ]] || fail "this script runs inside a Slurm job: sbatch [options] slurm/base.sh [trainer flags]"

if [[ -n ${PEER_VENV:-} ]]; then
    [[ -f $PEER_VENV/bin/activate ]] || fail "PEER_VENV is '$PEER_VENV', which has no bin/activate"
    set +u # not every version of activate minds unset variables
    # shellcheck disable=SC1091
    source "$PEER_VENV/bin/activate"
    set -u
fi

checkout=$(find_checkout "$@")
MASTER_ADDR=${MASTER_ADDR:-$(rendezvous_address)}
[[ -n $MASTER_ADDR ]] || fail "found no address of the job's first node; set MASTER_ADDR to one that all nodes reach"
export MASTER_ADDR

# One rank a GPU, or one a node without GPUs, unless sbatch was told the tasks (--ntasks-per-node, --ntasks).
tasks=()
if [[ -z ${SLURM_NTASKS:-} ]]; then
    per_node=${SLURM_GPUS_ON_NODE:-1}
    tasks=("--ntasks-per-node=$per_node" "--ntasks=$((per_node * SLURM_JOB_NUM_NODES))")
    if ((${SLURM_CPUS_ON_NODE:-1} < per_node)); then
        echo "note: $per_node ranks share ${SLURM_CPUS_ON_NODE:-1} CPU a node; ask for more, e.g. --cpus-per-gpu 8" >&2
        tasks+=(--overcommit)
    fi
fi
# srun does not take --cpus-per-task over from sbatch (Slurm 22.05 and newer).
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

# A copy of stderr, for the first failure's exit code.
messages=$(mktemp)
trap 'rm -f "$messages"' EXIT
exec {copied_stderr}> >(exec tee "$messages" >&2)
tee_pid=$!

# --kill-on-bad-exit: a rank that fails ends the others, which would wait for it for ever.
# --export: the ranks get this environment, also where sbatch was told --export=NONE.
srun "${tasks[@]}" --kill-on-bad-exit=1 --export=ALL \
    python "$checkout/peer_scale/pretrain.py" --deepspeed_config "$checkout/ds_configs/zero2.json" "$@" \
    2>&"$copied_stderr" {copied_stderr}>&- &
step=$!

# The warning comes to this script alone; SIGTERM (scancel, preemption) to the ranks as well.
is_cancelled=no
trap 'kill -USR1 "$step" 2>/dev/null || true' USR1
trap 'is_cancelled=yes' TERM

# A trap ends `wait`, so it is asked again until srun is gone.
status=0
while true; do
    wait "$step" && status=0 || status=$?
    kill -0 "$step" 2>/dev/null || break
done
exec {copied_stderr}>&-
wait "$tee_pid"

# srun answers with the largest code of all ranks, mostly that of ranks it ended itself; the first to fail has the
# reason.
if ((status)); then
    first=$(grep -m 1 -oE 'srun: error: [^ ]+: tasks? [0-9,-]+: .*' "$messages" || true)
    if [[ $first =~ Exited\ with\ exit\ code\ ([0-9]+) ]]; then status=${BASH_REMATCH[1]}; fi
fi

# 75: the run was told to stop and has saved; the same command goes on.
restarts=${SLURM_RESTART_COUNT:-0}
if ((status == 75)) && [[ $is_cancelled == no ]]; then
    if ((restarts >= ${PEER_MAX_RESTARTS:-50})); then
        echo "note: stopped and saved; not requeued after $restarts restarts (PEER_MAX_RESTARTS)" >&2
    elif scontrol requeue "$SLURM_JOB_ID"; then
        echo "note: stopped and saved; requeued, restart $((restarts + 1))" >&2
    fi
fi
exit "$status"
