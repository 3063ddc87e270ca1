#!/usr/bin/env bash
# Tests and benchmarks on a machine with a GPU: one command, nothing to install, no network.
#
#     benchmarks/gpu.sh OUT              # tests and benchmarks, in ten minutes at most
#     benchmarks/gpu.sh OUT attention    # only that part; several may be named
#
# These run only when they are named; the first two fit in ten minutes together:
#
#     benchmarks/gpu.sh OUT train_300m   # its twenty layers compile for longer than they are timed
#     benchmarks/gpu.sh OUT memcheck     # every kernel once under compute-sanitizer
#     benchmarks/gpu.sh OUT study        # a head-ratio study: the same command again goes on with it
#     benchmarks/gpu.sh OUT tune         # a launch table for this GPU, OUT/tune.json
#
# For each part, OUT gets a log with the tables and, for a benchmark, a JSON file and a picture, as they come. After
# each part, and when this script is stopped, all of it is packed into OUT/results.tar.gz. A part that fails does not
# keep the next from running: the exit status is 1 then, and the last line names it.
#
# Without a GPU the same parts run at tiny sizes, to prove the script. PYTHON names the interpreter; the packages need
# not be installed as such. Besides torch, triton and transformers all parts need pydantic, which checks models'
# configs. Only the study needs more: datasets, matplotlib, statsmodels, jinja2 and markdown-it-py. Its runs stay in
# runs/study_gpu, its text (the Python sources on the machine) in data/study_gpu.

set -uo pipefail

# Name, limit in seconds, arguments of python; most important first. The limits add up to less than ten minutes.
# A benchmark is also told where its JSON file goes and, without a GPU, --quick. A new part is one more line.
parts=(
  "tests      140 -m pytest -m gpu -q tests/kernels"
  "attention  125 -m benchmarks.ops.attention --limit 105"
  "poly_norm   60 -m benchmarks.ops.poly_norm --limit 45 --seconds 0.15"
  "combine     60 -m benchmarks.ops.combine --limit 45 --seconds 0.15"
  "decode      60 -m benchmarks.ops.decode --limit 45"
  "train_2.6b 125 -m benchmarks.models.train_step --shape 2.6b --precisions bf16 --compile --limit 95"
)
# The same for parts that run only when they are named, each in less than ten minutes.
on_request=(
  "train_300m 300 -m benchmarks.models.train_step --shape 300m --precisions bf16 --compile --limit 265"
  "memcheck   590 -m pytest -m gpu -q tests/kernels/test_on_gpu.py --deselect tests/kernels/test_on_gpu.py::test_a_compiled_model_is_as_near_to_float64_as_an_eager_one"
  "study      450 -m motifarch.cli benchmark head-ratio recipes/study/gpu_short.yaml --output runs/study_gpu"
  "tune       590 -m benchmarks.tuning.tune --limit 500"
)

usage() {
  names() { printf '%s\n' "$@" | cut -d ' ' -f 1 | xargs; }
  echo "usage: benchmarks/gpu.sh OUT [PART...]; parts: $(names "${parts[@]}"); on request: $(names "${on_request[@]}")" >&2
  exit 2
}

[[ $# -ge 1 && $1 != -* ]] || usage
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
shift
for name in "$@"; do
  printf '%s\n' "${parts[@]}" "${on_request[@]}" | grep -q "^$name " || { echo "error: there is no part $name" >&2; usage; }
done
chosen=" $* "
[[ $chosen == "  " ]] || parts+=("${on_request[@]}")

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export COLUMNS=${COLUMNS:-110}
"$python" -c 'import pydantic' || {
  echo "$python has no pydantic, which all parts need: install it, or put it on PYTHONPATH" >&2
  exit 2
}

pack() {
  # By name: the folder itself changes while the archive grows in it. A status of 1 is a log that grew meanwhile.
  (cd "$out" && tar --exclude='results.tar.gz*' -czf results.tar.gz.tmp -- *)
  [[ $? -le 1 ]] && mv "$out/results.tar.gz.tmp" "$out/results.tar.gz"
}

child=
stop() {
  trap - INT TERM HUP
  echo "stopped in ${name:-the beginning}" | tee -a "$out/gpu.log"
  # timeout hands the signal on to what it started.
  [[ -n $child ]] && kill "$child" 2>/dev/null && wait "$child"
  pack
  exit 143
}
trap stop INT TERM HUP

{
  date -u
  git log -1 --format='commit %H' 2>/dev/null
  "$python" -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__)'
  "$python" -c 'import triton; print("triton", triton.__version__)' 2>/dev/null
  nvidia-smi 2>/dev/null
} >"$out/gpu.log" 2>&1
cat "$out/gpu.log"

quick=()
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  quick=(--quick)
  echo "torch sees no GPU: tiny sizes, which prove the script and measure nothing" | tee -a "$out/gpu.log"
fi

# The tests' time is mostly that of compiling kernels, which takes cores.
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n "$(( $(nproc) < 14 ? $(nproc) : 14 ))")

skip() {
  skipped+=("$1")
  echo "== $1: skipped: $2" | tee -a "$out/gpu.log"
}

failed=() skipped=()
for part in "${parts[@]}"; do
  read -r name limit arguments <<<"$part"
  [[ $chosen == "  " || $chosen == *" $name "* ]] || continue
  read -ra command <<<"$arguments"
  [[ $name == tests ]] && command+=(${workers[@]+"${workers[@]}"})
  run=("$python") grace=20
  if [[ $name == memcheck ]]; then
    sanitizer=$(command -v compute-sanitizer || command -v "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
    # Without torch's cache each tensor is an allocation, whose ends the sanitizer knows.
    [[ -n $sanitizer ]] && run=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 MOTIF_GPU_RUNS=1 "$sanitizer" --tool memcheck
      --padding 4096 --target-processes application-only --report-api-errors no --error-exitcode 1 "$python")
    [[ -n $sanitizer ]] || skip memcheck "compute-sanitizer is not installed: its tests run without it"
  fi
  if [[ $name == study ]]; then
    "$python" -c 'import datasets, matplotlib, statsmodels, jinja2, markdown_it' || {
      skip study "it needs datasets, matplotlib, statsmodels, jinja2 and markdown-it-py on PYTHONPATH"
      continue
    }
    packages=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    command+=(--data.path data/study_gpu --data.source "[stdlib, 'files:$packages/**/*.py']" --data.max_documents 30000)
    [[ ${#quick[@]} -gt 0 ]] && command+=(--dry-run)
    grace=130 # its runs save first
  fi
  [[ ${command[1]} == benchmarks.* ]] && command+=(--output "$out/$name.json" ${quick[@]+"${quick[@]}"})
  log="$out/$name.log"
  echo "== $name, at most $limit s: python ${command[*]}" | tee -a "$out/gpu.log"
  began=$SECONDS
  : >"$log"
  timeout --kill-after="$grace" "$limit" "${run[@]}" "${command[@]}" >"$log" 2>&1 &
  child=$!
  tail -n +1 -s 0.2 -f --pid="$child" "$log" &
  viewer=$!
  wait "$child"
  status=$?
  child=
  wait "$viewer"
  verdict="done"
  if [[ $name == study ]]; then
    for file in results.json report.html report.md; do
      [[ -f runs/study_gpu/$file ]] && cp "runs/study_gpu/$file" "$out/study_$file"
    done
  fi
  if [[ $name == study && $status -eq 124 ]]; then
    verdict="stopped after $limit s; the same command goes on"
  elif [[ $status -ne 0 ]]; then
    failed+=("$name")
    verdict="FAILED with exit status $status"
    [[ $status -eq 124 || $status -eq 137 ]] && verdict="FAILED: stopped after $limit s"
  fi
  echo "== $name: $verdict, $((SECONDS - began)) s" | tee -a "$out/gpu.log"
  pack
done

trap - INT TERM HUP
[[ ${#skipped[@]} -eq 0 ]] || echo "skipped: ${skipped[*]}" | tee -a "$out/gpu.log"
[[ ${#failed[@]} -eq 0 ]] || echo "failed: ${failed[*]}" | tee -a "$out/gpu.log"
pack || exit 1
echo "packed: $out/results.tar.gz"
[[ ${#failed[@]} -eq 0 ]]
