#!/usr/bin/env bash
# Depth (8978): a hundred layers with DeepNorm and without it, same data, seed and learning rate; and without it at a
# tenth of the rate. docs/experiments.md says what came out. Everything is written under runs/depth; on one idle core
# a run takes about seven minutes. Started again, it goes on where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
out=runs/depth

step "1. text, tokenizer, shards: all the Python sources that come with Python, its tests included"
if [ ! -d $out/data ]; then
    stdlib_text $out
    run tools/prepare_data.py $out/text --tokenizer $out/tokenizer.model --seq-len 128 --valid-fraction 0.1 --out $out/data
fi

train() {
    local name=$1
    shift
    step "$name"
    DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} run launch/train.py configs/deep100.yaml \
        train.run=$out/"$name" "$@" 2>&1 | grep --line-buffered -v '\[INFO\]\|\[WARNING\]'
}

plain=(model.residual_alpha=1 model.branch_gain=1) # x <- norm(x + F(x)), every matrix at gain 1
train deepnorm
train postnorm "${plain[@]}"
train postnorm_small_lr "${plain[@]}" optim.lr=1e-4

step "losses: means of 20 steps"
entropy=$(python -c "import json; print(json.load(open('$out/data/manifest.json'))['splits']['train']['unigram_entropy_nats'])")
runs=($out/{deepnorm,postnorm,postnorm_small_lr})
rm -f $out/loss.png
run tools/plot_run.py "${runs[@]}" --baseline "unigram entropy=$entropy" --out $out/loss.png
python - "${runs[@]}" <<'PYTHON'
import sys
from pathlib import Path

from megakexue.metrics import StepRecord, read_metrics

runs = {Path(name).name: [r for r in read_metrics(Path(name)) if isinstance(r, StepRecord)] for name in sys.argv[1:]}
print("| steps | " + " | ".join(runs) + " |\n|" + "---|" * (1 + len(runs)))
for first in range(0, max(map(len, runs.values())), 20):
    means = [sum(r.loss for r in records[first : first + 20]) / 20 for records in runs.values()]
    print(f"| {first + 1}-{first + 20} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
largest = [max(r.grad_norm for r in records) for records in runs.values()]
print("| largest gradient norm | " + " | ".join(f"{norm:.3g}" for norm in largest) + " |")
PYTHON
