#!/usr/bin/env bash
# A small Motif-3 on two CPU processes: prepare data, train, export, sample. Run it again and it picks up where it was.
# It works in the current folder.
set -euo pipefail

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export HF_HUB_DISABLE_PROGRESS_BARS="${HF_HUB_DISABLE_PROGRESS_BARS:-1}"

motifarch data prepare --source stdlib --output data/stdlib --seq-len 128
torchrun --standalone --nproc-per-node 2 -m motifarch.train "$(dirname "$0")/tiny_cpu.yaml" "$@"
motifarch export runs/motif_3_tiny_cpu
echo
echo "--- sampled from runs/motif_3_tiny_cpu/export ---"
motifarch generate runs/motif_3_tiny_cpu/export --prompt $'import os\n\n\ndef' --temperature 0.9 --top-p 0.95 \
  --max-new-tokens 100
echo
echo "Made: data/stdlib, runs/motif_3_tiny_cpu with checkpoints, export, metrics.jsonl, run.json, loss.png and router.png"
