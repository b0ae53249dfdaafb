#!/usr/bin/env bash
# Runs the fused solver's tests under a sanitizer: tests/sanitize.sh [address|quick|thread] [pytest arguments]
#
# address (default): AddressSanitizer and UndefinedBehaviorSanitizer. quick: the first alone, of the portable kernels,
# which takes a quarter of the time. thread: ThreadSanitizer; torch's own thread pool is
# not instrumented, so reports that name only its frames are suppressed.
# The sanitized library is built into a copy of the package, which the tests then import. Without arguments they are the
# quick tests, in which each instruction set, shape, method, gradient mode and type meets each of the others once; `-m ""`
# runs every combination. NODESHAPE_RANDOM_PROGRAMS says how many random programs they look at.
set -euo pipefail
cd "$(dirname "$0")/.."
mode=${1:-address}
shift || true
python=${PYTHON:-python}
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z | xargs -0 cp --parents -t "$copy"
cd "$copy"

case $mode in
address | quick)
  flags="-fsanitize=address"
  preload="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" # which must know how to throw
  if [ "$mode" = quick ]; then
    export NODESHAPE_PORTABLE=1
  else
    flags+=",undefined -fno-sanitize-recover=undefined"
    preload+=" $(g++ -print-file-name=libubsan.so)"
  fi
  # Python and torch leak on purpose; what is looked for is a bad access.
  export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1
  ;;
thread)
  flags="-fsanitize=thread"
  preload="$(g++ -print-file-name=libtsan.so)"
  printf 'called_from_lib:libgomp.so\ncalled_from_lib:libtorch_cpu.so\nrace:libgomp\nrace:libtorch\nrace:python\nmutex:libtorch\n' > suppressions
  export TSAN_OPTIONS="suppressions=$copy/suppressions:ignore_noninstrumented_modules=1:halt_on_error=1"
  ;;
*)
  echo "unknown sanitizer $mode: choose address, quick or thread" >&2
  exit 2
  ;;
esac

CXX=${CXX:-g++} NODESHAPE_CXXFLAGS="$flags -O1 -g1 -fno-omit-frame-pointer" "$python" setup.py -q build_ext --inplace
# Compilers and forks are torch's business, and slow here. torch.compile's own tools do not run under a preload.
LD_PRELOAD="$preload" PYTHONPATH="$copy" "$python" -m pytest -q -n "$(nproc)" -p no:cacheprovider \
  tests/test_fused_solver.py tests/test_fused_ops.py tests/test_random_programs.py \
  -k "not compiled and not exported and not scripted and not opcheck and not forked" "$@"
