#!/bin/bash
# Everything that this project wants to know of one GPU, in at most 9 minutes; results as JSON in $OUT.
#
#   OUT=results benchmarks/device.sh                 on a machine with a CUDA device
#   OUT=results benchmarks/device.sh --dry-run       the same parts at tiny sizes on a CPU
#   OUT=results benchmarks/device.sh --parts compiled,deepspeed
#   OUT=results benchmarks/device.sh --parts whole_quickstart
#
# PYTHON  an interpreter that has at least torch, transformers and DeepSpeed. Default: .venv/bin/python or
#         python3 if it has all dependencies, otherwise a new environment from constraints.txt.
# WHEELS  a folder of wheels, for a machine without a registry. If PYTHON (or python3) has torch, all of them
#         are installed beside its packages, without looking for others; otherwise the new environment is
#         made of them. What has to be in it: docs/measurements/device.md
# VENV    where the new environment or the wheels go. Default: a temporary folder.
# LIMIT_S seconds for everything, the environment included; default 540.
#
# $OUT gets device.json, which is written again after every part, and log.txt with the output of all parts.
# A part that fails or runs out of time is recorded and does not stop the others. The last output is a summary.
# The exit status is 0 if all parts ended well, otherwise 1.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
limit=${LIMIT_S:-540}
out=${OUT:?set OUT to a folder for the results}
# Folders are relative to where the script was called.
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
[ -z "${WHEELS:-}" ] || WHEELS=$(cd "$WHEELS" && pwd) || exit 1
case ${PYTHON:-} in */*) PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON") || exit 1 ;; esac
cd "$root" || exit 1
packages=  # folder of packages beside those of the interpreter
steps="deepspeed numpy pydantic torch transformers"
all="$steps mlflow ray typer webdataset"

has_modules() {  # has_modules PYTHON MODULE...: whether it is new enough and has them
  local interpreter=$1; shift
  command -v "$interpreter" > /dev/null || return 1
  "$interpreter" -c '
import sys
from importlib.util import find_spec
sys.exit(sys.version_info < (3, 11) or not all(map(find_spec, sys.argv[1:])))' "$@" > /dev/null 2>&1
}

limited() { timeout --kill-after 10 "$((limit / 2))" "$@" >> "$out/log.txt" 2>&1; }

install_beside() {  # puts the wheels into a folder that PYTHONPATH names
  packages=$1
  limited "$python" -m pip --disable-pip-version-check install --quiet --no-index --no-deps --no-compile \
    --target "$packages" "$WHEELS"/*.whl || return 1
  export PYTHONPATH=$packages${PYTHONPATH:+:$PYTHONPATH} PATH=$packages/bin:$PATH
}

new_environment() {
  local -a pip=("$1/bin/python" -m pip --disable-pip-version-check --no-input install --quiet --constraint constraints.txt)
  [ -n "${WHEELS:-}" ] && pip+=(--no-index --find-links "$WHEELS")
  # torch first: DeepSpeed has only a source distribution, whose build imports it
  limited bash -euc '
    python3 -m venv "$1"; shift
    "$@" setuptools wheel ninja torch
    DS_BUILD_OPS=0 "$@" --no-build-isolation --editable . pytest nvidia-ml-py
  ' _ "$1" "${pip[@]}" || return 1
  python=$1/bin/python
}

choose() {  # sets python
  if [ -n "${PYTHON:-}" ]; then
    python=$PYTHON
  else
    for python in .venv/bin/python python3; do has_modules "$python" $all && break; done
  fi
  if [ -n "${WHEELS:-}" ] && has_modules "$python" torch; then
    install_beside "${VENV:-$(mktemp -d)/packages}" || return 1
  fi
  [ -n "${PYTHON:-}" ] || [ -n "$packages" ] || has_modules "$python" $all ||
    new_environment "${VENV:-$(mktemp -d)/venv}" || return 1
  has_modules "$python" $steps
}

if ! choose; then
  cat > "$out/device.json" << 'END'
{"name": "device", "ok": false, "parts": {}, "error": "no interpreter with torch, transformers and DeepSpeed: PYTHON lacks them, or pip could not install them (log.txt); set PYTHON or WHEELS"}
END
  cat "$out/device.json"
  exit 1
fi
python=$(command -v "$python")
case $python in /*) ;; *) python=$root/$python ;; esac
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1
PATH=$(dirname "$python"):$PATH  # DeepSpeed calls ninja by name
exec "$python" -m benchmarks.device --out "$out" --limit-s "$((limit - SECONDS))" "$@"
