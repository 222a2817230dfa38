#!/bin/bash
# Everything that this project wants to know of one GPU, in at most 9 minutes; results as JSON in $OUT.
#
#   OUT=results benchmarks/device.sh                 on a machine with a CUDA device
#   OUT=results benchmarks/device.sh --dry-run       the same parts at tiny sizes on a CPU
#   OUT=results benchmarks/device.sh --parts compiled,deepspeed
#
# PYTHON  an interpreter that has the dependencies. Default: .venv/bin/python or python3 if it has them,
#         otherwise a new environment in $VENV (default: a temporary folder) from constraints.txt.
# WHEELS  a folder of wheels for that environment, for a machine without a registry.
# LIMIT_S seconds for everything, the environment included; default 540.
#
# $OUT gets device.json, which is written again after every part, and log.txt with the output of all parts.
# A part that fails or runs out of time is recorded and does not stop the others. The exit status is 0 if all
# parts ended well, otherwise 1.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
limit=${LIMIT_S:-540}
out=${OUT:?set OUT to a folder for the results}
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)

has_dependencies() {
  "$1" -c '
import sys
from importlib.util import find_spec
names = ("deepspeed", "mlflow", "pydantic", "ray", "torch", "transformers", "typer", "webdataset")
sys.exit(sys.version_info < (3, 11) or not all(map(find_spec, names)))' > /dev/null 2>&1
}

interpreter() {  # prints the path of an interpreter with the dependencies
  local candidate
  if [ -n "${PYTHON:-}" ]; then has_dependencies "$PYTHON" && echo "$PYTHON"; return; fi
  for candidate in .venv/bin/python python3; do
    if command -v "$candidate" > /dev/null && has_dependencies "$candidate"; then command -v "$candidate"; return; fi
  done
  local venv=${VENV:-$(mktemp -d)/venv}
  local -a pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input install --quiet --constraint constraints.txt)
  [ -n "${WHEELS:-}" ] && pip+=(--no-index --find-links "$WHEELS")
  # torch first: DeepSpeed has only a source distribution, whose build imports it
  timeout "$((limit / 2))" bash -euc '
    python3 -m venv "$1"; shift
    "$@" setuptools wheel ninja torch
    DS_BUILD_OPS=0 "$@" --no-build-isolation --editable . pytest nvidia-ml-py
  ' _ "$venv" "${pip[@]}" >> "$out/log.txt" 2>&1 || return 1
  echo "$venv/bin/python"
}

if ! python=$(interpreter); then
  echo '{"name": "device", "ok": false, "parts": {}, "error": "no interpreter with the dependencies: PYTHON lacks them, or pip could not install them (log.txt); set PYTHON or WHEELS"}' \
    | tee "$out/device.json"
  exit 1
fi
export PYTHONPATH=$root OMP_NUM_THREADS=1
PATH=$(dirname "$python"):$PATH  # DeepSpeed calls ninja by name
"$python" -m benchmarks.device --out "$out" --limit-s "$((limit - SECONDS))" "$@"
