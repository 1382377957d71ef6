#!/bin/sh
# Regenerates the stubs next to their protos, or into the directory given (the freshness test compares the two).
set -eu
cd "$(dirname "$0")"
out="${1:-.}"
"${PYTHON:-python}" -m grpc_tools.protoc -I . --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" atelier/v1/*.proto
