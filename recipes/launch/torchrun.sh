#!/usr/bin/env bash
# Starts a run on several machines by hand: the same command on each of them.
#
#   NODES=2 HEAD=node-a GPUS=8 recipes/launch/torchrun.sh recipes/motif_2.6b/b200_64.yaml [--section.field VALUE ...]
#
# NODES     machines (default 1)
# HEAD      the machine where the ranks meet, HOST or HOST:PORT; needed with more than one (default port 29500)
# GPUS      processes on each machine (default: its GPUs, or 1)
# RUN_ID    names the meeting, for several runs with one HEAD (default: motifarch)
# RESTARTS  how often a failed run starts again from its newest checkpoint (default 3)
# STOP_S    seconds that a stopped run has for its last checkpoint (default 600)
# DRY_RUN   1 prints the command and runs nothing
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
  exit 2
fi

nodes="${NODES:-1}"
head="${HEAD:-}"
if [[ -z $head && $nodes -gt 1 ]]; then
  echo "error: NODES is $nodes, so HEAD must name the machine where they meet, such as HEAD=node-a" >&2
  exit 2
fi
[[ -z $head || $head == *:* ]] || head="$head:29500"

if [[ -z ${GPUS:-} ]]; then
  GPUS="$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)"
  [[ $GPUS -gt 0 ]] || GPUS=1
fi

command=(
  torchrun
  --nnodes "$nodes"
  --nproc-per-node "$GPUS"
  --max-restarts "${RESTARTS:-3}"
  --rdzv-id "${RUN_ID:-motifarch}"
  --rdzv-backend c10d
  --rdzv-endpoint "${head:-localhost:0}"
  -m motifarch.train "$@"
)

# What is stopped gets SIGTERM, saves, and must not be killed before it is done (torch 2.13; older ones may give it 30
# seconds whatever this says).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${STOP_S:-600}"
# torchrun by itself passes on none of the last three, but dies of them.
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2,SIGXCPU}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# When a collective on GPUs times out, NCCL's record of the last ones says which rank was missing from which.
export TORCH_NCCL_TRACE_BUFFER_SIZE="${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"

if [[ ${DRY_RUN:-0} == 1 ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
exec "${command[@]}"
