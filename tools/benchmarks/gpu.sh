#!/usr/bin/env bash
# Everything that wants a GPU, in order of worth: see --help.
set -uo pipefail
from=$PWD
cd "$(dirname "$0")/../.." || exit 2
if [ -d .venv/bin ]; then PATH="$PWD/.venv/bin:$PATH"; fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# An item and the seconds after which it is stopped: 470 in all, of at most 480.
items=(rates:30 attention:75 loss:50 block:45 step:150 eager:70 tests:50)

usage() {
    cat <<'END'
usage: tools/benchmarks/gpu.sh [--small] [--out FOLDER] [--only ITEM ...] [--limit SECONDS]

Measures on one GPU what megakexue is fast or slow at, in under 8 minutes. Every figure is written as soon as it is
known, as a line of JSON in FOLDER/results.jsonl; FOLDER/ITEM.log has what the item printed besides. An item that takes
too long is stopped, and the next one begins.

  rates      30 s   matrix products and copies: what the device can do
  attention  75 s   every kernel that runs here, both passes, and its error against float32
  loss       50 s   cross-entropy in chunks, eager and compiled
  block      45 s   one block, eager and compiled: time, kernels, what is kept for the backward pass
  step      150 s   the whole step of configs/1b.yaml, compiled, beside transformers' compiled Llama; where its time goes
  eager      70 s   the same step without a compiler
  tests      50 s   the tests that need a GPU

  --out FOLDER      a new folder (default: runs/gpu_ and the time)
  --only ITEM ...   these items and no other
  --limit SECONDS   stop each item after so many seconds instead, such as 300 where compilers are slow
  --small           tiny sizes; without a GPU it is always so. The figures then only show that the program runs

examples:
  tools/benchmarks/gpu.sh
  tools/benchmarks/gpu.sh --only rates attention --out runs/attention
  grep '"attention"' runs/attention/results.jsonl
END
}

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

small=() only=() limit="" out=""
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) usage && exit ;;
    --small) small=(--small) ;;
    --out | --limit)
        [ $# -gt 1 ] || fail "$1 needs a value"
        if [ "$1" = --out ]; then out=$2; else limit=$2; fi
        shift
        ;;
    --only)
        while [ $# -gt 1 ] && [[ $2 != -* ]]; do
            [[ " ${items[*]} " == *" $2:"* ]] || fail "--only $2: there is no such item; see --help"
            only+=("$2")
            shift
        done
        [ ${#only[@]} -gt 0 ] || fail "--only needs an item; see --help"
        ;;
    *) fail "there is no option $1; see --help" ;;
    esac
    shift
done
[[ -z $limit || $limit =~ ^[1-9][0-9]*$ ]] || fail "--limit $limit must be a number of seconds above 0"
command -v python >/dev/null || fail "no program 'python': make setup, then source .venv/bin/activate"
if [ -z "$out" ]; then
    out="runs/gpu_$(date +%Y%m%d_%H%M%S)"
elif [[ $out != /* ]]; then
    out="$from/$out"
fi
[ ! -e "$out" ] || fail "--out $out exists: give another folder"
mkdir -p "$out" || fail "--out $out cannot be made"
results="$out/results.jsonl"
: >"$results" || exit 2

pid=""
# timeout passes the signal on to all that it started
trap '[ -z "$pid" ] || kill "$pid"; exit 130' INT TERM
status=0
for entry in "${items[@]}"; do
    item=${entry%:*} seconds=${entry#*:}
    if [ ${#only[@]} -gt 0 ] && [[ " ${only[*]} " != *" $item "* ]]; then continue; fi
    if [ -n "$limit" ]; then seconds=$limit; fi
    printf '== %s (at most %s s)\n' "$item" "$seconds" >&2
    n_before=$(wc -l <"$results")
    # in the background, so that a signal need not wait for its end
    timeout -k 5 "$seconds" python tools/benchmarks/gpu.py "$item" "${small[@]}" >>"$results" 2>"$out/$item.log" &
    pid=$!
    wait $pid
    code=$? pid=""
    case $code in
    0) ;;
    124 | 137) printf '{"item": "%s", "error": "stopped after %s s"}\n' "$item" "$seconds" >>"$results" ;;
    *)
        printf '{"item": "%s", "error": "exit code %s: see %s.log"}\n' "$item" "$code" "$item" >>"$results"
        tail -n 5 "$out/$item.log" >&2
        ;;
    esac
    tail -n +$((n_before + 1)) "$results"
    [ "$code" -eq 0 ] || status=1
done
printf 'written: %s\n' "$results" >&2
exit $status
