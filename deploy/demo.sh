#!/usr/bin/env bash
# The main job as a user runs it: server, submit over REST, live progress, report, download, generate in a new process.
# Called by `make demo`, with KBOP (folder of the programs), MODEL, DATA and TOKENS set.
set -euo pipefail

home=$PWD/.kbop/demo
log=$home/server.log
out=$home/checkpoint
mkdir -p "$home"
rm -rf "$out"

# Two ranks: on the GPUs when there are some, else on two CPU slots.
gpus=$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU' || true)
ranks=$(( gpus == 1 ? 1 : 2 ))

# A folder given as MODEL or DATA may be read, nothing else may; a hub id needs its owner allowed.
root_of() { case $1 in builtin:*) ;; /*|./*|../*|~*) dirname "$(realpath -- "$1")" ;; esac; }
absolute() { case $1 in ./*|../*) realpath -- "$1" ;; *) printf '%s' "$1" ;; esac; }
MODEL=$(absolute "$MODEL") DATA=$(absolute "$DATA")
export KBOP_DATA_DIR=$home/data KBOP_CPU_SLOTS=2
export KBOP_MODEL_ROOTS KBOP_DATA_ROOTS KBOP_HUB_OWNERS=${KBOP_HUB_OWNERS-*}
KBOP_MODEL_ROOTS=$(root_of "$MODEL")
KBOP_DATA_ROOTS=$(root_of "$DATA")

"$KBOP/kbop" serve --port 0 >"$log" 2>&1 &
server=$!
trap 'kill $server 2>/dev/null; wait $server 2>/dev/null || true' EXIT
for _ in $(seq 150); do
  export KBOP_ENDPOINT; KBOP_ENDPOINT=$(grep -om1 'http://[0-9.:]*' "$log" || true)
  # The address is logged a moment before connections are taken.
  [ -n "$KBOP_ENDPOINT" ] && (exec 3<>"/dev/tcp/127.0.0.1/${KBOP_ENDPOINT##*:}") 2>/dev/null && up=1 && break
  kill -0 $server 2>/dev/null || { cat "$log"; exit 1; }
  sleep 0.2
done
[ -n "${up-}" ] || { echo "the server did not start in 30 s; its log is $log"; exit 1; }

echo "== server on $KBOP_ENDPOINT; submitting $MODEL with $DATA, $TOKENS training tokens, $ranks rank(s)"
job=$("$KBOP/kbop" submit --model "$MODEL" --data "$DATA" --tokens "$TOKENS" --gpus "$ranks" --name demo --json |
  "$KBOP/python" -c 'import json, sys; print(json.load(sys.stdin)["id"])')
echo "== job $job"
"$KBOP/kbop" watch "$job"
echo "== report"
"$KBOP/kbop" report "$job"
echo "== download through the API"
"$KBOP/kbop" download "$job" "$out"
echo "== the checkpoint in a new process, with transformers"
"$KBOP/python" -m jobs.demo.generate "$out"
echo "== done: checkpoint in $out, report page in $out/report/report.html"
