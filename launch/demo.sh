#!/usr/bin/env bash
# The main job end to end, as its user would type it: text -> tokenizer -> shards -> training that stops and resumes ->
# growth, and training on -> bundle -> text. Everything is written under runs/demo. Arguments: files, folders or globs
# of text, or one in the variable TEXT; none: the sources and documentation that come with Python.
set -euo pipefail
shopt -s globstar
began=$(date +%s)
from=$PWD
cd "$(dirname "$0")/.."
if [ -d .venv/bin ]; then PATH="$PWD/.venv/bin:$PATH"; fi
demo=runs/demo

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

step() {
    printf '\n\033[1m== %s\033[0m\n' "$1"
}

# Show a command so that it can be pasted into a shell, and run it.
run() {
    local word line='$'
    for word in "$@"; do
        if [[ ! $word =~ ^[A-Za-z0-9_./:=,+@%-]+$ ]]; then word="'${word//\'/\'\\\'\'}'"; fi
        line+=" $word"
    done
    printf '%s\n' "$line"
    env "$@"
}

# Everything is checked before the last demo is removed.
for program in python deepspeed; do
    command -v $program >/dev/null || fail "no program '$program': make setup, then source .venv/bin/activate"
done
if [ $# -eq 0 ] && [ -n "${TEXT:-}" ]; then set -- "$TEXT"; fi
if [ $# -eq 0 ]; then
    stdlib=$(python -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')
    # modules and packages without their tests; pydoc_data holds the language reference
    set -- "$stdlib/*.py" "$stdlib"/{asyncio,collections,concurrent,email,html,http,importlib,json,logging,multiprocessing,pydoc_data,unittest,urllib,xml}"/**/*.py"
fi
texts=()
for text in "$@"; do
    if [[ $text != /* && ! $from -ef $PWD ]]; then text="$from/$text"; fi
    [ -e "$text" ] || compgen -G "$text" >/dev/null ||
        fail "no text '$text': TEXT is one file, folder or glob; launch/demo.sh takes several"
    texts+=("$text")
done
devices=$(python -c 'import torch; n = torch.cuda.device_count(); print(n, torch.cuda.get_device_name(0) if n else "")')
read -r n_gpus gpu <<<"$devices"
if [ "$n_gpus" -eq 0 ]; then
    ranks=2 where="two ranks on the CPU" launcher=(DS_ACCELERATOR=cpu deepspeed)
else
    ranks=$((n_gpus > 1 ? 2 : 1)) launcher=(deepspeed)
    where="$ranks rank(s), each on a GPU of its own: $gpu"
fi
for lock in $demo/{run,grown_run}/lock; do
    if [ -e "$lock" ] && command -v flock >/dev/null && ! flock -n "$lock" true; then
        fail "$lock is held by $(<"$lock"): another demo is training; end it first"
    fi
done
mkdir -p $demo
# what a demo makes; anything else in the folder is somebody's
rm -rf $demo/{tokenizer.{model,json,skipped.tsv},data,run,grown,grown_run,bundle,loss.png}
printf 'Every command can be pasted, after: cd %q && source .venv/bin/activate\n' "$PWD"

step "1. a tokenizer from the text"
run tools/train_tokenizer.py "${texts[@]}" --vocab-size 4096 --sample-bytes 3000000 --out $demo/tokenizer.model

step "2. shards of tokens"
run tools/prepare_data.py "${texts[@]}" --tokenizer $demo/tokenizer.model --seq-len 256 --valid-fraction 0.05 \
    --out $demo/data

train() {
    run "${launcher[@]}" --log_level error --num_accelerators $ranks launch/train.py "$@" \
        metrics.every_steps=10 evaluate.n_rows=1000
}
small=(configs/tiny_gqa.yaml "train.run=$demo/run" train.steps=240 evaluate.every_steps=80)

step "3. training under ZeRO-1 with $where, which stops itself halfway"
train "${small[@]}" train.stop_at_step=120

step "4. the same command again: it goes on where it stopped"
train "${small[@]}"

step "5. growth: 2.3 times the parameters, the same function; training goes on with the rows that follow"
run tools/grow_model.py $demo/run --config configs/tiny_grown.yaml --out $demo/grown
train configs/tiny_grown.yaml train.run=$demo/grown_run train.steps=80 evaluate.every_steps=80

step "6. a bundle of the weights"
run tools/export_model.py $demo/grown_run --out $demo/bundle

step "7. text from the bundle, which goes on from the first words of documents that it was not trained on"
lines=$(launch/check_demo.py $demo --prompts)
mapfile -t prompts <<<"$lines"
run tools/generate.py $demo/bundle "--prompt=${prompts[0]}" --n-tokens 80 --seed 1
run tools/generate.py $demo/bundle "--prompt=${prompts[-1]}" --n-tokens 60 --temperature 0.6 --seed 2

step "8. report"
run launch/check_demo.py $demo
printf 'everything is in %s; the loss curve is %s/loss.png; %d s in all\n' $demo $demo $(($(date +%s) - began))
