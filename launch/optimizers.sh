#!/usr/bin/env bash
# Tiger (9512), Lion (9473) and AdamW on the same text: learning rates tried on one seed, then the best of each on three.
# docs/experiments.md says what came out. Everything is written under runs/optimizers; on one idle core a run takes about
# three minutes, all of them an hour. Started again, it goes on where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
out=runs/optimizers
seeds=(0 1 2)
declare -A rates=([tiger]="5e-3 1e-2 2e-2 4e-2" [lion]="3e-4 1e-3 3e-3" [adamw]="1e-3 3e-3 1e-2 3e-2")

step "1. text, tokenizer, shards: all the Python sources that come with Python, its tests included"
if [ ! -d $out/data ]; then
    stdlib_text $out
    run tools/prepare_data.py $out/text --tokenizer $out/tokenizer.model --seq-len 256 --valid-fraction 0.03 --out $out/data
fi

train() {
    local name=$1
    shift
    step "$name"
    DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} run launch/train.py configs/tiny_gqa.yaml \
        "data.sources=[{path: $out/data}]" data.tokenizer=$out/tokenizer.model train.run=$out/"$name" \
        train.steps=200 train.micro_batch_size=16 checkpoint.every_steps=100 evaluate.every_steps=200 \
        evaluate.n_rows=512 metrics.every_steps=10 metrics.statistics_every_steps=null metrics.tensorboard=false \
        "$@" 2>&1 | grep --line-buffered -v '\[INFO\]\|\[WARNING\]'
}

valid() {
    python - "$@" <<'PYTHON'
import json, sys
print(json.loads(open(f"{sys.argv[1]}/metrics.jsonl").read().splitlines()[-1])["loss"])
PYTHON
}

declare -A best
for optimizer in tiger lion adamw; do
    lowest=inf
    for lr in ${rates[$optimizer]}; do
        train ${optimizer}_${lr}_0 optim.name=$optimizer optim.lr=$lr
        loss=$(valid $out/${optimizer}_${lr}_0)
        if python -c "import sys; sys.exit(not $loss < float('$lowest'))"; then lowest=$loss best[$optimizer]=$lr; fi
    done
    for seed in "${seeds[@]:1}"; do
        lr=${best[$optimizer]}
        train ${optimizer}_${lr}_$seed optim.name=$optimizer optim.lr=$lr train.seed=$seed data.shuffle_seed=$seed
    done
done

# Tiger's choices, one seed each: DeepNorm's row for Adam, a bf16 momentum, AdamW for the embedding
lr=${best[tiger]}
train tiger-adamrow_${lr}_0 optim.name=tiger optim.lr=$lr model.deepnorm_recipe=adam
train tiger-bf16momentum_${lr}_0 optim.name=tiger optim.lr=$lr optim.momentum_dtype=bf16
train tiger-adamwembedding_${lr}_0 optim.name=tiger optim.lr=$lr optim.embedding=adamw optim.embedding_lr=${best[adamw]}

step "validation loss in nats per token"
python - $out <<'PYTHON'
import json, sys
from pathlib import Path

found: dict[tuple[str, str], list[float]] = {}
for path in sorted(Path(sys.argv[1]).glob("*_*_[0-9]/metrics.jsonl")):
    name, lr, _ = path.parent.name.split("_")
    found.setdefault((name, lr), []).append(json.loads(path.read_text().splitlines()[-1])["loss"])
print("| optimizer | lr | seeds | validation loss, mean | lowest .. highest |\n|---|---|---|---|---|")
for (name, lr), losses in sorted(found.items(), key=lambda item: (item[0][0], float(item[0][1]))):
    mean = sum(losses) / len(losses)
    print(f"| {name} | {lr} | {len(losses)} | {mean:.4f} | {min(losses):.4f} .. {max(losses):.4f} |")
PYTHON
curves=()
for optimizer in tiger lion adamw; do curves+=($out/${optimizer}_${best[$optimizer]}_0); done
rm -f $out/loss.png
run tools/plot_run.py "${curves[@]}" --out $out/loss.png
