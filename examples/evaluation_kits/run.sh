#!/bin/bash
# Compare a model at the full rate with itself routed, on tasks of lmms-eval:
#
#   examples/evaluation_kits/run.sh MODEL OUT docvqa_val,chartqa,ocrbench
#
# It starts `vico serve` twice, and runs lmms-eval against each; both must be on the path. Further options of
# lmms-eval (--limit 100, --include_path FOLDER) go into LMMS_OPTIONS, those of the server into SERVE_OPTIONS.
set -euo pipefail
model=$1 out=$2 tasks=$3
here=$(dirname "$(realpath "$0")")
mkdir -p "$out"
first="" number=0
for rule in ${RULES:-full absolute}; do
  number=$((number + 1))
  run="$out/$number-$rule"
  mkfifo "$out/started"
  # shellcheck disable=SC2086
  vico serve "$model" --port 0 --rule "$rule" --max-requests 128 ${SERVE_OPTIONS:-} > "$out/started" &
  server=$!
  trap 'kill $server 2> /dev/null || true; rm -f "$out/started"' EXIT
  exec 3< "$out/started"
  read -r _ name _ url <&3
  # shellcheck disable=SC2086
  OPENAI_API_KEY=none ${LMMS_EVAL:-lmms-eval} eval --model openai --tasks "$tasks" --log_samples \
    --model_args "model=$name,base_url=$url,timeout=600,num_concurrent=${CONCURRENT:-16}" \
    --output_path "$run" ${LMMS_OPTIONS:-}
  # lmms-eval also ends with 0 after an error
  if [ -z "$(find "$run" -name '*_samples_*.jsonl' 2> /dev/null)" ]; then
    echo "error: lmms-eval wrote no samples of $tasks to $run; its reason is above" >&2
    exit 1
  fi
  kill $server
  wait $server
  rm "$out/started"
  if [ -n "$first" ]; then ${PYTHON:-python3} "$here/compare.py" "$first" "$run"; fi
  first=${first:-$run}
done
