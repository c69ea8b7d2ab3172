#!/bin/bash
# Train peer-large, or with --model or --config another model that has to be shared out, in the layout (tensor and
# pipeline parallel sizes, ZeRO stage, micro-batch) that peer-scale plan finds best for the nodes and GPUs of the job:
#
#     sbatch -N 4 [sbatch options] slurm/large.sh --data-path wiki.jsonl --save runs/large [trainer flags]
#
# The planner needs half a minute, is asked once per number of nodes, and its answer kept in --save (layout_4x8): a job
# that goes on does so in the layout that it has had. It is not asked where the flags say the micro-batch themselves.
# As with base.sh, sbatch's options and trainer flags win over the script's own, and the tasks of a job array are seeds.

#SBATCH --job-name=peer-large
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-gpu=8
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
# (append: a job that is put back into the queue goes on in the same file)
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
# (five minutes before the time limit this script is warned, has the run save and stop, and requeues the job)

set -euo pipefail

# sbatch runs a copy of this script. Slurm remembers the path that it was given, with the flags behind it.
submitted=$([[ -z ${SLURM_JOB_ID:-} ]] || scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p')
submitted=${submitted%%$'\n'*}
if (($#)); then submitted=${submitted%" $*"}; fi
for checkout in "${PEER_HOME:-}" "$(dirname "$submitted")/.." "$(dirname "$0")/.." "${SLURM_SUBMIT_DIR:-.}" ''; do
    [[ -z $checkout || ! -f $checkout/slurm/common.sh ]] || break
done
if [[ -z $checkout ]]; then
    echo "error: found no checkout around '$submitted' nor in '${SLURM_SUBMIT_DIR:-}'; set PEER_HOME to one" >&2
    exit 2
fi
checkout=$(cd "$checkout" && pwd)
# shellcheck source=slurm/common.sh
source "$checkout/slurm/common.sh"

require_flags "--data-path --save" "$@"
[[ -n ${SLURM_GPUS_ON_NODE:-} ]] || fail "large.sh trains on GPUs: sbatch -N 4 --gpus-per-node 8 slurm/large.sh [flags]"
set -- --model peer-large --save-interval 1000 "$@"
layout=()
if [[ -z $(value_of --micro-batch-size "$@")$(value_of --micro-batch-tokens "$@") ]]; then
    kept=$(folder_of save "$@")/layout_${SLURM_JOB_NUM_NODES}x$SLURM_GPUS_ON_NODE
    if [[ ! -s $kept ]]; then
        found=$(python "$checkout/slurm/job.py" layout "$SLURM_JOB_NUM_NODES" "$SLURM_GPUS_ON_NODE" "$@") || exit $?
        mkdir -p "${kept%/*}"
        echo "$found" >"$kept"
    fi
    read -ra layout <"$kept"
    echo "layout for $SLURM_JOB_NUM_NODES x $SLURM_GPUS_ON_NODE GPUs: ${layout[*]}"
fi
train "${layout[@]}" "$@"
