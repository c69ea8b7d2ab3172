#!/bin/bash
# Train peer-small, whose whole batch fits one GPU:
#
#     sbatch [sbatch options] slurm/small.sh --data-path wiki.jsonl --save runs/small [trainer flags]
#
# As with base.sh, sbatch's options win over the lines below (-N 1 --gpus-per-node 8 takes a whole node), trainer flags
# over the script's own, and the tasks of a job array are seeds.

#SBATCH --job-name=peer-small
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

require_flags "--data-path --save" "$@"
train --model peer-small --save-interval 5000 "$@"
