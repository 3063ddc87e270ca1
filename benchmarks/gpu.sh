#!/usr/bin/env bash
# Tests and benchmarks on a machine with a GPU: one command, nothing to install, no network.
#
#     benchmarks/gpu.sh OUT              # compiling, sanitizers, tests, tuning and attention, in ten minutes at most
#     benchmarks/gpu.sh OUT attention    # only that part; several may be named
#
# The first ten minutes on a GPU leave launch tables that were measured: OUT/tune.json, which is put in force in this
# checkout, so that attention is timed with it. Compiling takes most of such time. So the first part compiles on all
# cores what the next ones launch, into build/triton_cache; it can be done before, where there is no GPU: python -m
# benchmarks.precompile fills the same cache, and what came along of it is used.
#
# These run only when they are named; each line fits in ten minutes:
#
#     benchmarks/gpu.sh OUT poly_norm grouped_poly_norm hyper_connections combine decode train_2.6b # the other benchmarks
#     benchmarks/gpu.sh OUT consan train_300m                      # Triton's own sanitizer; a longer compilation
#     benchmarks/gpu.sh OUT all_memcheck                           # every kernel once under compute-sanitizer
#     benchmarks/gpu.sh OUT tune_200                               # a launch table in 200 seconds
#     benchmarks/gpu.sh OUT attention_all                          # attention at more layouts and lengths
#     benchmarks/gpu.sh OUT tune_all                               # all of a launch table, going on from what there is
#     benchmarks/gpu.sh OUT study                                  # a head-ratio study: again goes on with it
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
main_layouts="v1_64 gda4_128 v1_64_w512 gda4_128_w512 gda4_64"
every_kernel="-m pytest -m gpu -q tests/kernels/test_on_gpu.py"
# A stray access or a race is looked for before anything is believed: each kernel on some rows.
parts=(
  "compile     60 -m benchmarks.precompile --parts tests racecheck attention --limit 50"
  "memcheck    45 $every_kernel -k the_same_bits"
  "racecheck   80 $every_kernel -k the_same_bits"
  "tests      125 -m pytest -m gpu -q tests/kernels/test_on_gpu.py tests/kernels"
  "tune       170 -m benchmarks.tuning.tune --limit 155"
  "attention   80 -m benchmarks.ops.attention --layouts $main_layouts --lengths 4096 16384 --limit 60"
)
# The same for parts that run only when they are named, each in less than ten minutes.
on_request=(
  "poly_norm   60 -m benchmarks.ops.poly_norm --limit 45 --seconds 0.15"
  "grouped_poly_norm 60 -m benchmarks.ops.grouped_poly_norm --limit 45 --seconds 0.15"
  "hyper_connections 60 -m benchmarks.ops.hyper_connections --limit 45 --seconds 0.15"
  "combine     60 -m benchmarks.ops.combine --limit 45 --seconds 0.15"
  "routing     60 -m benchmarks.ops.routing --limit 45 --seconds 0.15"
  "decode      60 -m benchmarks.ops.decode --limit 45"
  "train_2.6b 125 -m benchmarks.models.train_step --shape 2.6b --precisions bf16 --compile --limit 95"
  "train_300m 300 -m benchmarks.models.train_step --shape 300m --precisions bf16 --compile --limit 265"
  "consan     250 $every_kernel -k the_same_bits"
  "all_memcheck 590 $every_kernel --deselect tests/kernels/test_on_gpu.py::test_a_compiled_model_is_as_near_to_float64_as_an_eager_one"
  "study      450 -m motifarch.cli benchmark head-ratio recipes/study/gpu_short.yaml --output runs/study_gpu"
  "tune_200   215 -m benchmarks.tuning.tune --limit 200"
  "attention_all 500 -m benchmarks.ops.attention --limit 480"
  "tune_all   590 -m benchmarks.tuning.tune --limit 560"
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

# What is compiled here stands beside what was compiled beforehand.
cache=$PWD/build/triton_cache
[[ -d $cache ]] && moved=$("$python" -m benchmarks.precompile --moved)
export TRITON_CACHE_DIR=$cache

# Which files these are. Their tree says so also where the history that came along is older than they are.
files() {
  local scratch tree commit own=()
  git rev-parse --git-dir >/dev/null 2>&1 || { echo "commit unknown: there is no git repository here"; return; }
  [[ $out == "$PWD"/* ]] && own=(":(exclude)${out#"$PWD"/}")
  scratch=$(mktemp -d)
  cp "$(git rev-parse --git-path index)" "$scratch/index"
  tree=$(
    objects=$(cd "$(git rev-parse --git-path objects)" && pwd)
    export GIT_INDEX_FILE=$scratch/index GIT_OBJECT_DIRECTORY=$scratch GIT_ALTERNATE_OBJECT_DIRECTORIES=$objects
    git add -A -- . ${own[@]+"${own[@]}"} && git write-tree
  )
  rm -rf "$scratch"
  commit=$(git log --all --format='%T %H' | sed -n "s/^${tree:-none} //p" | head -n 1)
  if [[ -n $commit ]]; then
    echo "commit $commit"
  else # git log --all --format='%T %H' finds it where the whole history is
    echo "tree ${tree:-unknown}, of no commit here; near $(git describe --always --dirty --abbrev=40)"
    git diff HEAD --shortstat
  fi
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
  files
  "$python" -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__)'
  "$python" -c 'import triton; print("triton", triton.__version__)' 2>/dev/null
  echo "${moved:-nothing was compiled beforehand}"
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
  run=("$python") grace=20 signal=()
  if [[ $name == tests ]]; then
    command+=(${workers[@]+"${workers[@]}"})
    # Pytest alone is interrupted: it then says what failed before.
    signal=(--foreground --signal=INT) run=(env --default-signal=INT "$python")
  fi
  if [[ $name == compile && ${#quick[@]} -gt 0 ]]; then
    skip compile "there is no GPU to compile for"
    continue
  fi
  if [[ $name == *memcheck || $name == racecheck ]]; then
    sanitizer=$(command -v compute-sanitizer || command -v "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
    [[ -n $sanitizer ]] || { skip "$name" "compute-sanitizer is not installed"; continue; }
    # Without torch's cache each tensor is an allocation, whose ends the sanitizer knows.
    tool=(--tool memcheck --padding 4096)
    # Racecheck does not follow how Triton hands work to warps that run apart: kernels/README.md.
    gluon=1
    [[ $name == racecheck ]] && tool=(--tool racecheck) gluon=0
    run=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 MOTIF_GPU_RUNS=1 MOTIF_GPU_GLUON=$gluon "$sanitizer" "${tool[@]}"
      --target-processes application-only --report-api-errors no --error-exitcode 1 "$python")
  fi
  # Kernels are compiled with checks for asynchronous copies and barriers: triton 3.7 or newer.
  [[ $name == consan ]] && run=(env TRITON_INSTRUMENTATION_MODE=consan MOTIF_GPU_RUNS=1 "$python")
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
  [[ ${command[1]} == benchmarks.* && $name != compile ]] && command+=(--output "$out/$name.json" ${quick[@]+"${quick[@]}"})
  log="$out/$name.log"
  echo "== $name, at most $limit s: python ${command[*]}" | tee -a "$out/gpu.log"
  began=$SECONDS
  : >"$log"
  timeout ${signal[@]+"${signal[@]}"} --kill-after="$grace" "$limit" "${run[@]}" "${command[@]}" >"$log" 2>&1 &
  child=$!
  tail -n +1 -s 0.2 -f --pid="$child" "$log" &
  viewer=$!
  wait "$child"
  status=$?
  child=
  wait "$viewer"
  verdict="done"
  # In force from here on; what is committed is the user's decision.
  [[ $name == tune* && -s $out/$name.json && ${#quick[@]} -eq 0 ]] &&
    cp "$out/$name.json" "kernels/motif_kernels/tuning/$("$python" -c 'import torch; from benchmarks.lib import cli; print(cli.device_slug(torch.device("cuda")))').json"
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
