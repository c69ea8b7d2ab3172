# shellcheck shell=bash
# The shared part of the job scripts in this folder, which source it inside a Slurm job. They have set $checkout, and say
# with train or run_ranks what each rank runs; finish ends the job.
#
# Read from the environment in which sbatch is called:
#   PEER_VENV                 virtual environment to run in; otherwise the environment is the one sbatch was called in
#   PEER_HOME                 checkout to run; otherwise the one the script lies in
#   PEER_MAX_RESTARTS         how often the job requeues itself (50); 0: never
#   PEER_SRUN_OPTIONS         more options for srun, such as --container-image; words between spaces
#   PEER_GPU                  kind of GPU, as peer-scale plan names it, for the layout that large.sh asks for
#   MASTER_ADDR, MASTER_PORT  where the ranks meet; otherwise the job's first node and a port made from the job's number

: "${checkout:?is set by the script that sources this}"

fail() {
    echo "error: $*" >&2
    exit 2
}

[[ -n ${SLURM_JOB_ID:-} ]] || fail "this script runs inside a Slurm job: sbatch [options] slurm/${0##*/} [flags]"
# of an array's task; its SLURM_JOB_ID may be the number of the whole array
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# The warning (USR1) comes to the script alone; SIGTERM (scancel, preemption, the time limit) to the ranks as well.
is_warned=no is_terminated=no is_requeued=no step=
trap 'is_warned=yes; [[ -z $step ]] || kill -USR1 "$step" 2>/dev/null || true' USR1
trap on_term TERM

# scancel, or preemption, after which Slurm requeues by itself; but the time limit is left to the script. At once: it may
# be killed before the ranks have saved, and the job starts again when this one is over.
on_term() {
    is_terminated=yes
    if [[ $is_requeued == no && $(scontrol show job "$job") == *Reason=TimeLimit* ]]; then requeue "time limit"; fi
}

# Puts the job back into the queue, for the reason that it is told.
requeue() {
    local restarts=${SLURM_RESTART_COUNT:-0}
    if ((restarts >= ${PEER_MAX_RESTARTS:-50})); then
        echo "note: $1; not requeued after $restarts restarts (PEER_MAX_RESTARTS)" >&2
    elif scontrol requeue "$job"; then
        is_requeued=yes
        echo "note: $1; requeued, restart $((restarts + 1))" >&2
    fi
}

# Gives the value of a flag, the last one if it stands there more than once: value_of --save "$@"
value_of() {
    local name=$1 value=
    shift
    while (($#)); do
        case $1 in
            "$name") value=${2:-} ;;
            "$name"=*) value=${1#*=} ;;
        esac
        shift
    done
    echo "$value"
}

# Gives --save or --log-dir, from the flags or else from the section "output" of the file that --config names.
folder_of() {
    local name=$1 value file
    shift
    value=$(value_of "--$name" "$@")
    file=$(value_of --config "$@")
    if [[ -z $value && -f $file ]]; then
        value=$(python "$checkout/slurm/job.py" setting "$file" "${name//-/_}" || true)
    fi
    echo "$value"
}

# Ends the job where a flag is missing: require_flags "--data-path --save" "$@"
require_flags() {
    local names=$1 name missing=()
    shift
    [[ -z $(value_of --config "$@") ]] || return 0 # it may be in there
    for name in $names; do
        [[ -n $(value_of "$name" "$@") ]] || missing+=("$name")
    done
    ((${#missing[@]} == 0)) || fail "give ${missing[*]} after the script's name: sbatch [options] SCRIPT [flags]"
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

check_python() {
    command -v python >/dev/null ||
        fail "there is no python here; call sbatch in an environment that has one, or set PEER_VENV to such a one"
    python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' ||
        fail "$(command -v python) has no torch; call sbatch in peer-scale's environment, or set PEER_VENV to it"
}

prepare_environment() {
    if [[ -n ${PEER_VENV:-} ]]; then
        [[ -f $PEER_VENV/bin/activate ]] || fail "PEER_VENV is '$PEER_VENV', which has no bin/activate"
        set +u # not every version of activate minds unset variables
        # shellcheck disable=SC1091
        source "$PEER_VENV/bin/activate"
        set -u
    fi
    if [[ ${PEER_SRUN_OPTIONS:-} != *--container* ]]; then check_python; fi # in a container the ranks have another one
    MASTER_ADDR=${MASTER_ADDR:-$(rendezvous_address)}
    [[ -n $MASTER_ADDR ]] || fail "found no address of the job's first node; set MASTER_ADDR to one that all nodes reach"
    export MASTER_ADDR
    # srun does not take --cpus-per-task over from sbatch (Slurm 22.05 and newer).
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
}

# Sets tasks: one rank a GPU, or one a node without GPUs, unless sbatch was told (--ntasks-per-node, --ntasks).
choose_tasks() {
    tasks=() num_tasks=${SLURM_NTASKS:-}
    [[ -z $num_tasks ]] || return 0
    local per_node=${SLURM_GPUS_ON_NODE:-1}
    num_tasks=$((per_node * SLURM_JOB_NUM_NODES))
    tasks=("--ntasks-per-node=$per_node" "--ntasks=$num_tasks")
    if ((${SLURM_CPUS_ON_NODE:-1} < per_node)); then
        echo "note: $per_node ranks share ${SLURM_CPUS_ON_NODE:-1} CPU a node; ask for more, e.g. --cpus-per-gpu 8" >&2
        tasks+=(--overcommit)
    fi
}

# What the other ranks print goes to files of their own beside the job's: peer-123.out, peer-123.ranks/rank_1.NODE.log
choose_rank_logs() {
    local output
    output=$(readlink "/proc/$$/fd/1" || true)
    [[ -f $output ]] || output=${SLURM_SUBMIT_DIR:-.}/$SLURM_JOB_NAME-$SLURM_JOB_ID.out
    rank_logs=${output%.out}.ranks
    if ((num_tasks > 1)); then
        mkdir -p "$rank_logs" || fail "cannot make $rank_logs for what the ranks print"
    fi
}

# Runs in each rank. RANK and its like are for commands that know torch's variables and not Slurm's.
# shellcheck disable=SC2016
as_rank='
file=$1/rank_$SLURM_PROCID.$SLURMD_NODENAME.log sets_rank=$2
shift 2
if [[ $sets_rank == yes ]]; then
    counts=${SLURM_STEP_TASKS_PER_NODE:-1}
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_STEP_NUM_TASKS LOCAL_WORLD_SIZE=${counts%%[(,]*}
fi
if ((SLURM_PROCID)) && { : >>"$file"; } 2>/dev/null; then exec >>"$file" 2>&1; fi
exec "$@"'

# Runs a command in every rank until all have ended; sets status, and failure to srun's line about the first that failed.
# srun answers with the largest code of all ranks, mostly that of ranks it ended itself; the first to fail has the reason.
run_ranks() {
    local sets_rank=$1 messages copied_stderr tee_pid
    shift
    status=0 failure=
    local more=()
    read -ra more <<<"${PEER_SRUN_OPTIONS:-}"
    if [[ $is_warned == yes ]]; then status=75; return; fi
    messages=$(mktemp)
    exec {copied_stderr}> >(exec tee "$messages" >&2)
    tee_pid=$!
    # --kill-on-bad-exit: a rank that fails ends the others, which would wait for it for ever.
    # --export: the ranks get this environment, also where sbatch was told --export=NONE.
    srun "${tasks[@]}" "${more[@]}" --kill-on-bad-exit=1 --export=ALL \
        bash -c "$as_rank" rank "$rank_logs" "$sets_rank" "$@" 2>&"$copied_stderr" {copied_stderr}>&- &
    step=$!
    while true; do # a trap ends `wait`, so it is asked again until srun is gone
        wait "$step" && status=0 || status=$?
        kill -0 "$step" 2>/dev/null || break
    done
    step=
    exec {copied_stderr}>&-
    wait "$tee_pid" || true
    if ((status)); then
        failure=$(grep -m 1 -oE 'srun: error: [^ ]+: tasks? [0-9,-]+: .*' "$messages" || true)
        if [[ $failure =~ Exited\ with\ exit\ code\ ([0-9]+) ]]; then status=${BASH_REMATCH[1]}; fi
    fi
    rm -f "$messages"
}

# The name of the newest checkpoint; empty where there is none.
newest_checkpoint() {
    if [[ -n $save ]]; then cat "$save/latest" 2>/dev/null || true; fi
}

# Sets why the job is to be put back into the queue; fails where it is not.
is_to_go_on() {
    [[ $is_terminated == no ]] || return 1
    if ((status == 75)); then
        why="stopped and saved"
    elif [[ $failure =~ (Terminated|User defined signal 1) ]]; then
        why="stopped before it could save" # the signal came while the ranks started, or their command does not save
    elif ((status > 128)) && [[ $(newest_checkpoint) != "$checkpoint_before" ]]; then
        why="a rank was killed (${failure#srun: error: }), and a checkpoint has been saved since the start"
    else
        return 1
    fi
}

# Shows the last lines of the first rank that failed, where they are not in the job's output already.
show_failure() {
    local file
    [[ $failure =~ tasks?\ ([0-9]+) ]] && ((BASH_REMATCH[1])) || return 0
    for file in "$rank_logs/rank_${BASH_REMATCH[1]}".*.log; do
        if [[ -s $file ]]; then
            echo "note: rank ${BASH_REMATCH[1]} failed first; the end of $file:" >&2
            tail -n 20 "$file" >&2
        fi
    done
}

# Requeues the job where it is to go on, or sums it up; ends the script with the run's exit code.
finish() {
    local why=
    if ((status)) && [[ $status != 75 ]]; then show_failure; fi
    if is_to_go_on; then requeue "$why"; fi
    if [[ $is_requeued == no && -n $log_dir && -f $log_dir/summary.json ]]; then
        python "$checkout/slurm/job.py" summary "$log_dir/summary.json" || true
    fi
    exit "$status"
}

# Trains with these flags, and ends the script. In a job array each task is a run of its own, whose seed is its number.
train() {
    save=$(folder_of save "$@")
    log_dir=$(folder_of log-dir "$@")
    local of_seed=()
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
        [[ -z $(value_of --seed "$@") ]] ||
            fail "--seed $(value_of --seed "$@"): the tasks of a job array take their numbers as seeds; drop it"
        of_seed=(--seed "$SLURM_ARRAY_TASK_ID")
        if [[ -n $save ]]; then save=$save/seed_$SLURM_ARRAY_TASK_ID && of_seed+=(--save "$save"); fi
        if [[ -n $log_dir ]]; then log_dir=$log_dir/seed_$SLURM_ARRAY_TASK_ID && of_seed+=(--log-dir "$log_dir"); fi
    fi
    checkpoint_before=$(newest_checkpoint)
    run_ranks no python "$checkout/peer_scale/pretrain.py" \
        --deepspeed_config "$checkout/ds_configs/zero2.json" "$@" "${of_seed[@]}"
    finish
}

if [[ -n ${PEER_HOME:-} && ! -f $PEER_HOME/peer_scale/pretrain.py ]]; then
    fail "PEER_HOME is '$PEER_HOME'; it has no peer_scale/pretrain.py"
fi
save='' log_dir='' checkpoint_before=''
prepare_environment
choose_tasks
choose_rank_logs
