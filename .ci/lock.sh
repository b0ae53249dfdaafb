#!/usr/bin/env bash
# Writes .ci/locked/ anew: the newest versions of what CI installs, with their hashes, for every Python and system. torch
# and what comes with its CUDA build are left out: each machine has the build that suits it. Needs uv.
set -euo pipefail
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
torch=(torch triton cuda-bindings cuda-pathfinder cuda-toolkit)
torch+=(nvidia-{cublas,cuda-cccl,cuda-cupti,cuda-nvrtc,cuda-runtime,cudnn-cu13,cufft,cufile,curand,cusolver,cusparse})
torch+=(nvidia-{cusparselt-cu13,nccl-cu13,nvjitlink,nvshmem-cu13,nvtx})
mkdir -p locked
lock() {
  local name=$1 extra
  shift
  for extra in "$@"; do python3 requirements.py $extra; done >"$work/$name.in"
  uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-annotate \
    --custom-compile-command .ci/lock.sh "${torch[@]/#/--no-emit-package=}" --output-file "$work/$name.txt" "$work/$name.in"
  mv "$work/$name.txt" "locked/$name.txt"
}
lock test "" tensorboard test
lock tools dev docs
