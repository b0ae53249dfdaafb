#!/usr/bin/env bash
# Lines of csrc/ that the quick tests run, per file and in all: tests/coverage.sh [pytest arguments]
#
# The library is built with gcov's counters into a copy of the package, which the tests then import; so are the CUDA
# kernels that they compile for the CPU and, where NODESHAPE_ONNXRUNTIME names its headers, the library for onnxruntime.
# A line counts as run if any unit that has it (an instruction set, a type, a device) runs it.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z | xargs -0 cp --parents -t "$copy"
cd "$copy"

# Threads count together, and processes that tests stop are not asked.
export NODESHAPE_CXXFLAGS="--coverage -O1 -fprofile-update=atomic"
CXX=${CXX:-g++} "$python" setup.py -q build_ext --inplace
status=0
PYTHONPATH="$copy" "$python" -m pytest -q -n "$(nproc)" -p no:cacheprovider --basetemp="$copy/tests/objects" \
  tests/test_fused_solver.py tests/test_fused_ops.py tests/test_fuse.py tests/test_fuse_adaptive.py \
  tests/test_lowering.py tests/test_random_programs.py tests/test_interruption.py tests/test_memory.py \
  tests/test_stage.py tests/test_op_arguments.py tests/test_fuse_corners.py tests/test_onnxruntime_ops.py \
  tests/test_cuda_kernels.py "$@" || status=$?
"$python" - <<'END'
import json, os, subprocess
from collections import defaultdict
from pathlib import Path

counts = defaultdict(lambda: defaultdict(int))
for data in [*Path("build").rglob("*.gcda"), *Path("tests/objects").rglob("*.gcda")]:
    for text in subprocess.check_output(["gcov", "--json-format", "--stdout", data]).splitlines():
        report = json.loads(text)
        for file in report["files"]:
            name = os.path.relpath(os.path.join(report["current_working_directory"], file["file"]))
            for line in file["lines"] if name.startswith("csrc/") else ():
                counts[name][line["line_number"]] += line["count"]
run = total = 0
for name, lines in sorted(counts.items()):
    missing = [number for number, count in sorted(lines.items()) if not count]
    run, total = run + len(lines) - len(missing), total + len(lines)
    print(f"{name:32} {len(lines) - len(missing):5} of {len(lines):5}  ", *missing)
print(f"{run} of {total} lines, {100 * run / total:.1f}%")
END
exit $status
