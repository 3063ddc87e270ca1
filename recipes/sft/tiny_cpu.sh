#!/usr/bin/env bash
# Fine-tunes what recipes/tiny_cpu.sh made, on two CPU processes, and asks it something. With `lora` as the first
# argument only adapters are trained. Run it again and it picks up where it was.
set -euo pipefail
cd "$(dirname "$0")/../.."

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
recipe=tiny_cpu
if [[ "${1:-}" == lora ]]; then
  recipe=tiny_cpu_lora
  shift
fi

python recipes/sft/docstrings.py > data/docstrings.jsonl
motifarch data prepare --messages --source files:data/docstrings.jsonl --tokenizer runs/tiny_cpu/export \
  --chat-template recipes/sft/chat.jinja --seq-len 512 --output data/docstrings
torchrun --standalone --nproc-per-node 2 -m motifarch.train "recipes/sft/$recipe.yaml" "$@"
motifarch export "runs/sft_$recipe"
motifarch generate "runs/sft_$recipe/export" --chat --prompt "What is textwrap.dedent?" --max-new-tokens 40
