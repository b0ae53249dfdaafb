#!/usr/bin/env bash
# Leaves the headers of onnxruntime's C API in a folder, from the package of npm that ships them (150 MB):
#
#   bash csrc/onnxruntime/headers.sh FOLDER
set -euo pipefail
[ $# = 1 ] || { echo "usage: headers.sh FOLDER" >&2; exit 2; }
mkdir -p "$1"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
npm pack --silent --pack-destination "$work" com.github.asus4.onnxruntime@0.4.9 >/dev/null
tar -xzf "$work"/*.tgz -C "$work" --wildcards '*/ios-arm64/*/Headers/*.h'
find "$work" -name '*.h' -exec cp -t "$1" {} +
[ -f "$1/onnxruntime_c_api.h" ]
