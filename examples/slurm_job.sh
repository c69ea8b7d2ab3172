#!/usr/bin/env bash
# Submit a run to Slurm as a chain of jobs, each of which goes on where the one before it ended:
#
#     NODES=4 JOBS=5 bash examples/slurm_job.sh runs/base [trainer flags]
#
# Slurm sends SIGTERM five minutes before a job's time is up; the trainer saves and stops after the step it is in. Jobs
# of one name run one after the other (singleton). A job that is preempted goes back into the queue and goes on, too.
set -euo pipefail

folder=$1
shift
mkdir -p "$folder"

for ((job = 0; job < ${JOBS:-3}; job++)); do
    sbatch --job-name "$folder" --dependency singleton --requeue --signal TERM@300 --time "${TIME:-24:00:00}" \
        --nodes "${NODES:-2}" --gpus-per-node "${GPUS:-8}" --cpus-per-gpu "${CPUS:-8}" --output "$folder/%j.out" \
        "$(dirname "$0")/../slurm/base.sh" --model peer-base --log-dir "$folder/logs" --exit-signal-handler \
        --save "$folder/checkpoints" --save-interval 1000 "$@"
done
