#!/usr/bin/env bash
# The one command for a GPU machine without network: build, GPU tests, memcheck, benchmarks.
#
#   benchmarks/run_gpu.sh OUT [--no-device]
#
# Ends in under 9 minutes. OUT then holds <date>.json (rows of all groups, environment, steps), .md
# and .log, rewritten whole after every step. A failed step does not stop the others; the exit status is 1 if
# any failed. --no-device skips the device's steps by name and tries the rest on the CPU.
#
# PYTHON (python3) must have torch; scc_fast is installed into it, editable, from this checkout.
# Wheels that it lacks (open_clip_torch, ftfy, …) are taken from WHEELS (./wheels of the checkout).
# COMMIT names the commit where the checkout has no .git.
set -uo pipefail

usage() { echo "usage: $0 OUT [--no-device]" >&2; exit 2; }
out='' device=yes
for argument in "$@"; do
  case $argument in
    --no-device) device=no ;;
    -*) usage ;;
    *) [ -z "$out" ] || usage; out=$argument ;;
  esac
done
[ -n "$out" ] || usage
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd) || exit 2
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
python=${PYTHON:-python3}
command -v "$python" > /dev/null || { echo "no $python" >&2; exit 2; }
case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac
wheels=${WHEELS:-$root/wheels}
[ -d "$wheels" ] && wheels=$(cd "$wheels" && pwd)

scratch=$(mktemp -d)
log=$scratch/log steps=$scratch/steps rows=$scratch/rows.json
: > "$log"; : > "$steps"
failed=0 child=''
deadline=$((SECONDS + 520)) # seconds for the steps; the rest of the 9 minutes is for their ends
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INDEX=1 PIP_BREAK_SYSTEM_PACKAGES=1
unset TRITON_INTERPRET TORCH_ALLOW_TF32_CUBLAS_OVERRIDE

say() { echo "=== $* (${SECONDS} s)" | tee -a "$log"; }

# Rewrites the three files of OUT from what there is; "finished" is false but at the end.
report() {
  "$python" "$root/benchmarks/gpu_report.py" "$out" "$scratch" "$device" "$1" 2>&1 | tee -a "$log" \
    || { failed=1; echo "no report could be written" >&2; }
}

finish() {
  trap - EXIT
  if [ -n "$child" ]; then
    kill -TERM -- "-$child" 2> /dev/null
    wait "$child"
  fi
  report "$1"
  rm -rf "$scratch" "$out"/.partial-*
  exit "$2"
}
trap 'say interrupted; finish false 1' EXIT INT TERM HUP

note() { # name status seconds reason
  printf '%s\t%s\t%s\t%s\n' "$@" >> "$steps"
  say "$1: $2${4:+, $4}"
}

# step NAME LIMIT COMMAND…: run it in a process group of its own, note how it ended.
step() {
  local name=$1 limit=$2 began=$SECONDS status left=$((deadline - SECONDS))
  shift 2
  [ "$limit" -le "$left" ] || limit=$left
  if [ "$limit" -lt 5 ]; then
    failed=1
    note "$name" failed 0 "no time left"
    return 1
  fi
  say "$name: started, at most $limit s"
  : > "$scratch/step.log" # or tail may find none yet
  set -m # a process group, so that an interruption reaches all of it
  (cd "$root" && exec timeout -k 5 "$limit" "$@") > "$scratch/step.log" 2>&1 &
  child=$!
  set +m
  tail -n +1 -f --pid="$child" "$scratch/step.log" 2> /dev/null | tee -a "$log" &
  local shown=$!
  wait "$child"; status=$?
  child=''
  wait "$shown" 2> /dev/null
  case $status in
    0) note "$name" passed $((SECONDS - began)) "" ;;
    124 | 137) failed=1; note "$name" failed $((SECONDS - began)) "out of time after $limit s" ;;
    *) failed=1; note "$name" failed $((SECONDS - began)) "exit status $status" ;;
  esac
  report false
  return "$status"
}

skip() { note "$1" skipped 0 "$2"; }

bench() { # name limit device options…
  local name=$1 limit=$2 kind=$3
  shift 3
  step "$name" "$limit" "$python" -m pytest benchmarks --benchmark-only -q -p no:cacheprovider \
    --benchmark-columns=median,iqr,rounds --device="$kind" --rows="$rows" "$@"
}

say "run_gpu: $root to $out, $("$python" -V 2>&1)"

if [ "$device" = no ]; then
  why=--no-device
  for name in device wheels build "build without extension" "gpu tests of the engine" benchmarks \
    "gpu tests of the ops" memcheck; do
    skip "$name" "$why"
  done
  bench "smoke of the benchmarks on the CPU" 50 cpu --quick \
    --threads=1 -k "b1 and (make_views or mean_logits) or bench_batches"
  finish true "$failed"
fi

# Else every GPU test would be skipped, and pass.
step device 60 "$python" -c 'import setuptools, torch
assert int(setuptools.__version__.split(".")[0]) >= 77, f"setuptools {setuptools.__version__} < 77"
print(torch.__version__, torch.cuda.get_device_name(), torch.cuda.get_device_capability())'

if compgen -G "$wheels/*.whl" > /dev/null; then
  # One by one: a wheel for another machine does not keep the others out.
  step wheels 40 bash -c 'bad=0
for wheel in "$1"/*.whl; do "$0" -m pip install -q --no-deps "$wheel" || bad=1; done
exit "$bad"' "$python" "$wheels"
else
  skip wheels "no $wheels/*.whl"
fi

# Not nvcc's parent: nvcc may be a wrapper outside the toolkit (as in .ci/run).
if [ -z "${CUDA_HOME:-}" ]; then
  for folder in /usr/local/cuda /usr/local/cuda-*; do
    if [ -e "$folder/include/cuda_runtime.h" ]; then export CUDA_HOME=$folder; break; fi
  done
fi
if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | head -n 1 | tr -d ' ')
  [ -n "$arch" ] || arch=$("$python" -c 'import torch
print(".".join(map(str, torch.cuda.get_device_capability())))' 2>> "$log")
  export TORCH_CUDA_ARCH_LIST=$arch
fi
say "CUDA_HOME=${CUDA_HOME:-not found}, TORCH_CUDA_ARCH_LIST=$TORCH_CUDA_ARCH_LIST"
install=("$python" -m pip install -q --no-build-isolation --no-deps -e .)
if step build 130 env SCC_FAST_BUILD=cuda "${install[@]}"; then
  skip "build without extension" "the build passed"
else # Triton can still be tested and measured
  step "build without extension" 40 env SCC_FAST_BUILD=none "${install[@]}"
fi

# Triton compiles a kernel for every shape of the tests: side by side where pytest-xdist is there.
workers=()
"$python" -c 'import xdist' 2> /dev/null && workers=(-n 8)
gpu_tests() { # name limit arguments of pytest…
  step "$1" "$2" env SCC_FAST_TEST_BACKENDS=cpp,triton OMP_NUM_THREADS=2 \
    "$python" -m pytest -m gpu -q -p no:cacheprovider --continue-on-collection-errors \
    --durations=5 "${workers[@]}" "${@:3}"
}
whole=(tests/test_graph.py tests/test_engine.py tests/test_vit.py tests/test_towers.py)
gpu_tests "gpu tests of the engine" 90 "${whole[@]}"

# Cases get fewer rounds as the time passes; what torch.compile makes comes last.
bench benchmarks 200 cuda --budget=0.3 --max-seconds=170

# The ops one by one: as many as there is time for.
spent=$((deadline - SECONDS))
gpu_tests "gpu tests of the ops" $((spent > 60 ? spent - 40 : spent)) tests \
  "${whole[@]/#/--ignore=}"

sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-}/bin/compute-sanitizer")
if [ ! -x "$sanitizer" ]; then
  skip memcheck "no compute-sanitizer"
else # slow: as many of the op tests as there is time for. Triton's kernels are tested above.
  began=$SECONDS failed_before=$failed
  # Without torch's pool every tensor is an allocation of its own, whose ends are seen.
  step memcheck 70 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool memcheck --report-api-errors no --target-processes all --error-exitcode 9 \
    "$python" -m pytest tests -m gpu -q -x -p no:cacheprovider -k "cuda-cpp"
  verdict=$(cat "$scratch/step.log")
  if [[ $verdict == *"Device not supported"* ]]; then
    failed=$failed_before
    sed -i '$d' "$steps"
    skip memcheck "compute-sanitizer does not support this device or its virtual machine"
  elif [[ $(tail -n 1 "$steps") == *"out of time"* && $verdict != *"========= Invalid"* ]]; then
    failed=$failed_before
    sed -i '$d' "$steps"
    note memcheck incomplete $((SECONDS - began)) "no error until its time was over"
  fi
  report false
fi

finish true "$failed"
