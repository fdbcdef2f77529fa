#!/bin/bash
# Train on several nodes under SLURM: one `accelerate launch` a node, and accelerate starts a process a GPU.
#
#   sbatch --nodes=2 examples/slurm.sh examples/accelerate_configs/two_node_zero2.yaml examples/train_sd35_full.py ARGUMENTS
#
# The configuration's numbers of machines and processes, and its address, are replaced by what SLURM has given. The
# output directory, and the model cache if it is not filled beforehand, must lie on a file system that all nodes share.
#SBATCH --job-name=trl-apex
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
# Warn 10 minutes before the time is over. Training resumes from the last valid checkpoint, see below.
#SBATCH --signal=B:USR1@600
#SBATCH --requeue

set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: sbatch $0 CONFIG.yaml SCRIPT.py [ARGUMENTS]" >&2
  exit 2
fi
config=$1
shift

gpus=${SLURM_GPUS_ON_NODE:-8}
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes%%$'\n'*}  # not by `| head -n 1`, which ends before scontrol has written all, and the job with it (SIGPIPE)
# A port of this job's own: two jobs may share a node.
port=$((20000 + SLURM_JOB_ID % 20000))

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((${SLURM_CPUS_PER_TASK:-8} / gpus > 0 ? ${SLURM_CPUS_PER_TASK:-8} / gpus : 1))}
# A rank that waits for one that is gone gives up after this, and says where; without it the job may stand until its end.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1

# Put the job back into the queue when its time is nearly over. The next start adds `--resume_from_checkpoint true` and goes
# on from the last valid checkpoint; a save that was cut off is not mistaken for one.
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
  set -- "$@" --resume_from_checkpoint true
fi
requeue() {
  echo "time is nearly over: putting job $SLURM_JOB_ID back into the queue" >&2
  scontrol requeue "$SLURM_JOB_ID"
}
trap requeue USR1

# $SLURM_NODEID is expanded on each node, hence the inner shell. --kill-on-bad-exit ends all nodes with the first that fails.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 --ntasks-per-node=1 bash -c '
  config=$1 head=$2 port=$3 gpus=$4
  shift 4
  exec accelerate launch \
    --config_file "$config" \
    --num_machines "$SLURM_NNODES" \
    --num_processes "$((SLURM_NNODES * gpus))" \
    --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$head" \
    --main_process_port "$port" \
    "$@"
' launch "$config" "$head" "$port" "$gpus" "$@" &
wait $!
