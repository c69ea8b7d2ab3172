#!/bin/bash
# Fine-tune an encoder, data parallel over the job's GPUs:
#
#     sbatch [sbatch options] slurm/finetune.sh --model runs/base --task mnli --output-dir glue/mnli [flags]
#
# takes the flags of peer-scale finetune. What is done is kept in --output-dir: a job that is preempted or comes to its
# time limit is requeued and goes on there.

#SBATCH --job-name=peer-finetune
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
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

require_flags "--model --output-dir" "$@"
[[ -n $(value_of --task "$@")$(value_of --train-file "$@")$(value_of --config "$@") ]] ||
    fail "give --task NAME, or --train-file FILE, after the script's name: sbatch [options] SCRIPT [flags]"
export MASTER_PORT=${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))} PYTHONPATH=$checkout${PYTHONPATH:+:$PYTHONPATH}
run_ranks yes python -m peer_scale.cli finetune "$@"
finish
