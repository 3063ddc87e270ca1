#!/usr/bin/env bash
# The whole path on two CPU processes: prepare data, train, export, sample. Run it again and it picks up where it was.
# It works in the current folder.
set -euo pipefail

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# The progress bars of the libraries underneath would only come between our own lines.
export HF_HUB_DISABLE_PROGRESS_BARS="${HF_HUB_DISABLE_PROGRESS_BARS:-1}"

motifarch data prepare --source stdlib --output data/stdlib --seq-len 128
torchrun --standalone --nproc-per-node 2 -m motifarch.train "$(dirname "$0")/tiny_cpu.yaml" "$@"
motifarch export runs/tiny_cpu
echo
echo "--- sampled from runs/tiny_cpu/export ---"
motifarch generate runs/tiny_cpu/export --prompt $'import os\n\n\ndef' --temperature 0.9 --top-p 0.95 \
  --max-new-tokens 150
echo
echo "Made: data/stdlib (tokenizer, packed blocks), runs/tiny_cpu/checkpoints, runs/tiny_cpu/export (Hugging Face folder),"
echo "      runs/tiny_cpu/metrics.jsonl, runs/tiny_cpu/run.json, and the loss curve runs/tiny_cpu/loss.png"
