#!/usr/bin/env bash
# What growth saves: a small model, grown and trained on, against the large one from scratch. Tiger and AdamW, wide and
# wide + deep, three seeds. docs/growth.md says what came out. Everything is written under runs/growth; one idle core
# takes about forty minutes. Started again, it goes on where it was stopped. Arguments: seeds (default: 0 1 2), or
# `rates` for the learning rates that were tried, `table` for what there is, or `picture` for docs/growth_axes.png.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
out=runs/growth
optimizers=${OPTIMIZERS:-tiger adamw}
declare -A rates=([tiger]="4e-3 8e-3 1.6e-2" [adamw]="2.5e-3 5e-3 1e-2")
declare -A lr=([tiger]=8e-3 [adamw]=5e-3)       # for the small model, and from scratch
deep_adamw_lr=2.5e-3                            # at 5e-3 six layers stay at the unigram entropy
declare -A grown_lr=([tiger]=3e-3 [adamw]=2e-3) # trained weights take less
small=(model.vocab_size=384 model.tie_embeddings=true model.d_model=32 model.n_layers=4 model.n_heads=2 model.n_kv_heads=1 model.d_ff=96)
wide=(model.vocab_size=384 model.tie_embeddings=true model.d_model=64 model.n_layers=4 model.n_heads=4 model.n_kv_heads=2 model.d_ff=192)
deep=(model.vocab_size=384 model.tie_embeddings=true model.d_model=64 model.n_layers=6 model.n_heads=4 model.n_kv_heads=2 model.d_ff=192)
scratch_steps=2000 small_steps=2500 grown_steps=(600 1000)

if [ ! -d $out/data ]; then
    step "text, tokenizer, shards: all the Python sources that come with Python, its tests included"
    VOCAB=384 stdlib_text $out
    run tools/prepare_data.py $out/text --tokenizer $out/tokenizer.model --seq-len 128 --valid-fraction 0.03 --out $out/data
fi
data=("data.sources=[{path: $out/data}]" data.tokenizer=$out/tokenizer.model data.seq_len=128)

# NAME STEPS OPTIMIZER LR SEED, then model and more
train() {
    local name=$1 steps=$2 optimizer=$3 rate=$4 seed=$5
    shift 5
    if [ -f $out/"$name"/done ]; then return; fi
    step "$name"
    DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} run launch/train.py configs/tiny_gqa.yaml "${data[@]}" train.run=$out/"$name" \
        train.steps="$steps" train.global_batch_size=8 train.micro_batch_size=8 optim.name="$optimizer" optim.lr="$rate" \
        optim.warmup_steps=50 train.seed="$seed" data.shuffle_seed="$seed" checkpoint.every_steps=5000 \
        checkpoint.keep_last=1 evaluate.every_steps=500 evaluate.n_rows=512 metrics.statistics_every_steps=null \
        metrics.tensorboard=false "$@" 2>&1 | grep --line-buffered -v '\[INFO\]\|\[WARNING\]\|^step' || true
    if ! grep -q "\"kind\": \"valid\", \"step\": $steps," $out/"$name"/metrics.jsonl; then
        echo "$name has not come to its end: see $out/$name/logs" >&2
        exit 1
    fi
    touch $out/"$name"/done
}

table() {
    python - $out <<'PYTHON'
import json, math, sys
from pathlib import Path

import matplotlib.pyplot as plt

from megakexue.config import load_config
from megakexue.describe import flops_per_token

out = Path(sys.argv[1])


def read(name):
    """Validation loss at the end, FLOPs, and the training loss as (FLOPs, loss)."""
    config = load_config(out / name / "config.yaml")
    flops = flops_per_token(config.model, (config.data.seq_len + 1) / 2) * config.batch_tokens
    records = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in records if r["kind"] == "train"]
    smooth = [sum(losses[max(0, i - 24) : i + 1]) / len(losses[max(0, i - 24) : i + 1]) for i in range(len(losses))]
    end = [r["loss"] for r in records if r["kind"] == "valid"][-1]
    return end, flops * config.train.steps, [(flops * (i + 1), loss) for i, loss in enumerate(smooth)]


figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
print("| optimizer | to | seed | small | scratch | grown, by steps | FLOPs saved | if the small one is there |")
print("|---|---|---|---|---|---|---|---|")
for optimizer, panel in zip(("tiger", "adamw"), panels):
    panel.set(title=optimizer, xlabel="FLOPs in all", xscale="log", ylabel="loss, nats per token")
    for shape in ("wide", "deep"):
        for seed in range(10):
            names = sorted(out.glob(f"grown_{shape}@*-{optimizer}-{seed}/done"),
                           key=lambda path: int(path.parent.name.split("@")[1].split("-")[0]))
            if not names or not (out / f"scratch_{shape}-{optimizer}-{seed}/done").exists():
                continue
            small, scratch = read(f"small-{optimizer}-{seed}"), read(f"scratch_{shape}-{optimizer}-{seed}")
            grown = [read(path.parent.name) for path in names]
            # where the curve through the ends of the grown runs meets the loss of the one from scratch
            needed = "never"
            points = [(math.log(flops), loss) for loss, flops, _ in grown]
            for (x0, y0), (x1, y1) in zip(points, points[1:]):
                if y1 <= scratch[0]:
                    needed = math.exp(x0 + (x1 - x0) * max(0.0, (y0 - scratch[0]) / (y0 - y1)))
                    break
            sign = ">= " if points[0][1] <= scratch[0] else ""
            if needed == "never":
                total = free = f"< {1 - (small[1] + grown[-1][1]) / scratch[1]:.0%}"
                free = f"< {1 - grown[-1][1] / scratch[1]:.0%}"
            else:
                total, free = (f"{sign}{1 - x / scratch[1]:.0%}" for x in (small[1] + needed, needed))
            ends = ", ".join(f"{path.parent.name.split('@')[1].split('-')[0]}: {run[0]:.3f}" for path, run in zip(names, grown))
            print(f"| {optimizer} | {shape} | {seed} | {small[0]:.3f} | {scratch[0]:.3f} | {ends} | {total} | {free} |")
            if seed == 0:
                color = {"wide": "C0", "deep": "C1"}[shape]
                panel.plot(*zip(*scratch[2]), color=color, lw=1, ls=":", label=f"{shape}, from scratch")
                panel.plot(*zip(*((small[1] + x, y) for x, y in grown[-1][2])), color=color, lw=1.2, label=f"{shape}, grown")
                if shape == "wide":
                    panel.plot(*zip(*small[2]), color="0.5", lw=1, label="small")
    panel.legend(fontsize=8)
panels[0].set_ylim(2.0, 4)
figure.tight_layout()
figure.savefig(out / "growth.png", dpi=80)
PYTHON
}

picture() {
    python - docs/growth_axes.png <<'PYTHON'
import sys

import matplotlib.pyplot as plt
import torch

from megakexue.config import ModelConfig, RopeConfig
from megakexue.grow import Choices, Growth
from megakexue.model import parameter_names, resolve, shape


def model(**sizes):
    values = dict(vocab_size=5, n_layers=1, rope=RopeConfig(base=10000)) | sizes
    return resolve(ModelConfig(**values), "tiger", 32)


old = model(d_model=4, n_heads=2, n_kv_heads=1, d_head=4, d_ff=4)
new = model(d_model=6, n_heads=3, n_kv_heads=1, d_head=8, d_ff=6, vocab_size=7)
torch.manual_seed(3)
weights = {name: torch.randn(shape(name, old)) for name in parameter_names(old)}
shown = {"embedding.weight": "embedding\nwrites d_model", "blocks.0.feed_forward.w_up": "w_up\nreads d_model, writes units",
         "blocks.0.feed_forward.w_down": "w_down\nreads units, writes d_model", "blocks.0.attention.wq": "wq\n2 -> 3 heads, 4 -> 8 wide",
         "blocks.0.attention.wk": "wk\n1 head, 4 -> 8 wide", "blocks.0.attention.wo": "wo\nreads heads, writes d_model"}  # fmt: skip
rows = [("before", None), ("--width pad\n--units fresh", Choices()), ("--width copy\n--units copy", Choices(width="copy", units="copy")),
        ("--width copy\n--units copy\n--noise 0", Choices(width="copy", units="copy", noise=0))]  # fmt: skip
figure, panels = plt.subplots(len(rows), len(shown), figsize=(13, 12), gridspec_kw=dict(height_ratios=[4, 6, 6, 6]))
for (label, choices), line in zip(rows, panels):
    for (name, title), panel in zip(shown.items(), line):
        w = weights[name] if choices is None else Growth(old, new, choices).weight(name, weights.__getitem__)
        picture = w.clone()
        picture[picture == 0] = float("nan")
        panel.imshow(picture, cmap="RdBu", vmin=-2.5, vmax=2.5, extent=(0, w.shape[1], w.shape[0], 0))
        panel.set(xticks=[], yticks=[], facecolor="0.85", xlim=(0, w.shape[1]), ylim=(w.shape[0], 0))
        if choices is None:
            panel.set_title(title, fontsize=9)
    line[0].set_ylabel(label, fontsize=9)
figure.text(0.01, 0.01, "Rows are outputs, columns inputs. Grey is zero.", fontsize=9)
figure.tight_layout(rect=(0, 0.02, 1, 1))
figure.savefig(sys.argv[1], dpi=70)
PYTHON
}

case ${1:-} in
rates)
    for optimizer in $optimizers; do
        for rate in ${rates[$optimizer]}; do
            train "rate-$optimizer-$rate" $scratch_steps $optimizer "$rate" 0 "${wide[@]}"
        done
    done
    ;;
table) ;;
picture)
    picture
    exit
    ;;
*)
    for seed in ${*:-0 1 2}; do
        for optimizer in $optimizers; do
            rate=${lr[$optimizer]}
            train "small-$optimizer-$seed" $small_steps $optimizer "$rate" "$seed" "${small[@]}"
            for shape in wide deep; do
                declare -n model=$shape
                own=$rate
                if [ $shape$optimizer = deepadamw ]; then own=$deep_adamw_lr; fi
                train "scratch_$shape-$optimizer-$seed" $scratch_steps $optimizer "$own" "$seed" "${model[@]}"
                bundle=$out/bundles/$shape-$optimizer-$seed
                mkdir -p $out/bundles
                if [ ! -d "$bundle" ]; then
                    run tools/grow_model.py "$out/small-$optimizer-$seed" --config configs/tiny_grown.yaml --out "$bundle" \
                        --seed "$seed" "${data[@]}" data.shuffle_seed="$seed" optim.name=$optimizer "${model[@]}"
                fi
                for steps in "${grown_steps[@]}"; do
                    train "grown_$shape@$steps-$optimizer-$seed" "$steps" $optimizer "${grown_lr[$optimizer]}" "$seed" "${model[@]}" \
                        "train.init_from=$bundle" train.init_optimizer=keep train.init_data=continue
                done
            done
        done
    done
    ;;
esac
table
