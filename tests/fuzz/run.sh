#!/usr/bin/env bash
# Fuzzes everything that takes what others wrote: tests/fuzz/run.sh [seconds per target] [targets, default all]
#
# solve            the checks and kernels of the ops, by libFuzzer (clang++), AddressSanitizer and UndefinedBehaviorSanitizer
# the others       readers of files and ops from Python, by atheris (pip install atheris): see readers.py
# What a target finds is left in the folder FUZZ (default build/fuzz), as is what it has learned, for the next time.
set -euo pipefail
cd "$(dirname "$0")/../.."
seconds=${1:-60}
shift || true
python=${PYTHON:-python}
work=${FUZZ:-build/fuzz}
targets=("$@")
if [ ${#targets[@]} = 0 ]; then
  readers=$(PYTHONPATH="$PWD" "$python" tests/fuzz/readers.py --list 2>/dev/null)
  mapfile -t targets <<<"solve"$'\n'"$readers"
fi

build_solve() {
  local clang
  clang=$(command -v clang++ || compgen -c | grep -E '^clang\+\+-[0-9]+$' | sort -V | tail -1) || true
  if [ -z "$clang" ]; then
    echo "tests/fuzz/run.sh: solve needs clang++: apt-get install clang" >&2
    exit 2
  fi
  local flags=(-std=c++20 -O1 -g1 -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=undefined -DNODESHAPE_ONNXRUNTIME
    -DNODESHAPE_PORTABLE -ffp-contract=off -Wno-unknown-attributes -Wno-pass-failed)
  local objects=()
  for unit in conv program adaptive; do
    for scalar in float double; do
      objects+=("$work/objects/${unit}_$scalar.o")
      "$clang" "${flags[@]}" -DNODESHAPE_TARGET=portable -DNODESHAPE_SCALAR=$scalar -c "csrc/cpu/$unit.cpp" -o "${objects[-1]}"
    done
  done
  "$clang" "${flags[@]}" -fsanitize=fuzzer,address,undefined csrc/cpu/isa.cpp tests/fuzz/solve.cpp "${objects[@]}" -o "$work/solve"
}

export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1
mkdir -p "$work/objects"
for target in "${targets[@]}"; do
  found="$work/$target.found/" learned="$work/$target.learned"
  mkdir -p "$found" "$learned"
  options=(-max_total_time="$seconds" -artifact_prefix="$found" -max_len=16384 -timeout=60 -rss_limit_mb=4096 -print_final_stats=1 -verbosity=0)
  if [ "$target" = solve ]; then
    build_solve
    PYTHONPATH="$PWD" "$python" tests/fuzz/seeds.py "$work/solve.seeds"
    command=("$work/solve" "${options[@]}" "$learned" "$work/solve.seeds")
  else
    command=("$python" tests/fuzz/readers.py "$target" "${options[@]}" "$learned")
  fi
  if ! PYTHONPATH="$PWD" "${command[@]}" >"$work/$target.log" 2>&1; then
    tail -40 "$work/$target.log"
    echo "$target: FAILED, the input is in $found" >&2
    exit 1
  fi
  runs=$(awk '/number_of_executed_units|^Done [0-9]+ runs/ { for (i = 1; i <= NF; ++i) if ($i ~ /^[0-9]+$/) { print $i; exit } }' "$work/$target.log")
  echo "$target: ${runs:-?} inputs in $seconds s, $(find "$learned" -type f | wc -l) kept for the paths they take; nothing found"
done
