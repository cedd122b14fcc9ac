#!/usr/bin/env bash
# The main job end to end, as its user would type it: text -> tokenizer -> shards -> training on two ranks that stops
# and resumes -> growth, and training on -> bundle -> text. Everything is written under runs/demo. Arguments: files,
# folders or globs of text; none: the sources and documentation that come with Python.
set -euo pipefail
cd "$(dirname "$0")/.."
demo=runs/demo
began=$(date +%s)

step() {
    printf '\n\033[1m== %s\033[0m\n' "$1"
}

run() {
    printf '$ %s\n' "$*"
    "$@"
}

if [ $# -eq 0 ]; then
    stdlib=$(python -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')
    # modules and packages without their tests; pydoc_data holds the language reference
    set -- "$stdlib/*.py" "$stdlib"/{asyncio,collections,concurrent,email,html,http,importlib,json,logging,multiprocessing,pydoc_data,unittest,urllib,xml}
fi
rm -rf "$demo"
mkdir -p "$demo"

step "1. a tokenizer from the text"
run tools/train_tokenizer.py "$@" --vocab-size 4096 --sample-bytes 3000000 --out $demo/tokenizer.model

step "2. shards of tokens"
run tools/prepare_data.py "$@" --tokenizer $demo/tokenizer.model --seq-len 256 --valid-fraction 0.05 --out $demo/data

train() {
    DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} run deepspeed --num_accelerators 2 launch/train.py "$@" \
        metrics.every_steps=10 evaluate.n_rows=1000 2>&1 | grep --line-buffered -v '\[INFO\]\|\[WARNING\]'
}
small=(configs/tiny_gqa.yaml train.run=$demo/run train.steps=240 evaluate.every_steps=80)

step "3. training on two ranks under ZeRO-1, which stops itself halfway"
train "${small[@]}" train.stop_at_step=120

step "4. the same command again: it goes on where it stopped"
train "${small[@]}"

step "5. growth: 2.3 times the parameters, the same function; training goes on with the rows that follow"
run tools/grow_model.py $demo/run --config configs/tiny_grown.yaml --out $demo/grown
train configs/tiny_grown.yaml train.run=$demo/grown_run train.steps=80 evaluate.every_steps=80

step "6. a bundle of the weights"
run tools/export_model.py $demo/grown_run --out $demo/bundle

step "7. text from the bundle"
run tools/generate.py $demo/bundle --prompt 'def ' --n-tokens 80 --seed 1
run tools/generate.py $demo/bundle --prompt 'The ' --n-tokens 60 --temperature 0.6 --seed 2

step "8. report"
launch/check_demo.py $demo
printf 'everything is in %s; the loss curve is %s/loss.png; %d s in all\n' $demo $demo $(($(date +%s) - began))
