#!/usr/bin/env bash
# A run under SLURM, which saves and queues itself again when its time is up or it is preempted.
#
#   sbatch --nodes 8 recipes/launch/slurm.sh recipes/motif_2.6b/b200_64.yaml [--section.field VALUE ...]
#
# Submit it from the folder that the recipe's paths start from. Partition, account and the like go before the script:
# sbatch --partition NAME ... Logs: logs/JOB.out of this script, logs/JOB-RESTART-NODE.out of each node.
#
# GPUS      processes on each node (default: SLURM_GPUS_ON_NODE, or 8)
# PORT      where the ranks meet on the first node (default: from the job's number)
# RESTARTS  how often a failed run starts again within the job (default 3)
# STOP_S    seconds that a stopped run has for its last checkpoint (default 240; --signal below gives 300)
#SBATCH --job-name=motifarch
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%j.out
# This script, and nothing else, hears of the end five minutes before it.
#SBATCH --signal=B:USR1@300
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
  echo "usage: sbatch --nodes N recipes/launch/slurm.sh RECIPE.yaml [--section.field VALUE ...]" >&2
  exit 2
fi
: "${SLURM_JOB_ID:?is not set: submit this script with sbatch}"

gpus="${GPUS:-${SLURM_GPUS_ON_NODE:-8}}"
# sed reads all that is written; `head` would leave scontrol with a broken pipe, and so end this script.
head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"
port="${PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
mkdir -p logs

# torchrun by itself passes on none of the last three, but dies of them.
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2,SIGXCPU}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
# What is stopped gets SIGTERM, saves, and must not be killed before it is done (torch 2.13; older ones may give it 30
# seconds whatever this says).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${STOP_S:-240}"
# A failed collective ends the process instead of hanging it, and says which rank was missing.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export TORCH_NCCL_TRACE_BUFFER_SIZE="${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# Set NCCL_SOCKET_IFNAME and NCCL_IB_HCA in the environment where a node has several networks: srun passes them on.
restart="${SLURM_RESTART_COUNT:-0}"
srun --kill-on-bad-exit=1 --output="logs/%j-$restart-%N.out" --error="logs/%j-$restart-%N.out" \
  torchrun \
  --nnodes "${SLURM_JOB_NUM_NODES:-1}" \
  --nproc-per-node "$gpus" \
  --max-restarts "${RESTARTS:-3}" \
  --rdzv-id "$SLURM_JOB_ID-$restart" \
  --rdzv-backend c10d \
  --rdzv-endpoint "$head:$port" \
  -m motifarch.train "$@" &
step=$!

stopped=0
# shellcheck disable=SC2329  # the trap calls it
stop() {
  stopped=1
  echo "stopping: the run saves and is queued again"
  # srun passes it on to torchrun, and torchrun to the ranks, which save after the step that they are in.
  kill -TERM "$step" 2>/dev/null || true
}
# USR1: the time is nearly up; TERM: preempted.
trap stop USR1 TERM

# A trapped signal ends `wait` early, so wait until the step has really ended.
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do
  status=0
  wait "$step" || status=$?
done

# What finished at the same moment needs no other turn.
if [[ $stopped == 1 && $status != 0 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
