#!/bin/bash
# Train on a Slurm cluster:
#
#     sbatch [sbatch options] slurm/base.sh [trainer flags]
#
# for example, two nodes with eight GPUs each:
#
#     sbatch -N 2 --gpus-per-node 8 --cpus-per-gpu 8 slurm/base.sh --model peer-base --save runs/base
#
# and three seeds of it, each with folders of its own (runs/base/seed_1 ...):
#
#     sbatch --array 1-3 -N 2 --gpus-per-node 8 --cpus-per-gpu 8 slurm/base.sh --model peer-base --save runs/base
#
# Options on sbatch's command line win over the #SBATCH lines below, and trainer flags after the script's name win over
# the script's own. GPUs are left to the command line: a cluster without any would refuse a script that asks for them.
# What is read from the environment stands at the top of common.sh.

#SBATCH --job-name=peer
#SBATCH --nodes=1
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

train "$@"
