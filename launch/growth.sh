#!/usr/bin/env bash
# What growth saves: a small model, grown before its learning rate falls and trained on, against the large one from
# scratch. Tiger and AdamW, wide and wide + deep, three seeds. docs/growth.md says what came out. Everything is written
# under runs/growth; two idle cores, an optimizer each, take about an hour and a quarter. Started again, it goes on where
# it was stopped. Arguments: seeds (default: 0 1 2), or `table` for what there is, or `picture` for docs/growth_axes.png.
# SIZE=20m is a hundred times larger, for a GPU: 5M parameters to 20M and 29M, under runs/growth_20m. OPTIMIZERS, SHAPES,
# PARTS and STEPS choose among the runs, to do some beside others.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
optimizers=${OPTIMIZERS:-tiger adamw} shapes=${SHAPES:-wide deep} parts=${PARTS:-small scratch bundle grown}
# rates: of the small model, from scratch wide and deep, and after growth
case ${SIZE:-small} in
small)
    out=runs/growth vocab=384 seq_len=128 rows=8 dtype=fp32 bucket=1000000
    small_steps=1000 scratch_steps=(1000 2000) grown_steps=(250 400 800 1200) warmup=50 grown_warmup=20
    small=(model.d_model=32 model.n_layers=4 model.n_heads=2 model.n_kv_heads=1 model.d_ff=96)
    wide=(model.d_model=64 model.n_layers=4 model.n_heads=4 model.n_kv_heads=2 model.d_ff=192)
    deep=(model.d_model=64 model.n_layers=6 model.n_heads=4 model.n_kv_heads=2 model.d_ff=192)
    declare -A small_lr=([tiger]=8e-3 [adamw]=5e-3) lr=([tiger]=5.6e-3 [adamw]=5e-3)
    declare -A deep_lr=([tiger]=5.6e-3 [adamw]=3.5e-3) grown_lr=([tiger]=4e-3 [adamw]=8e-3)
    ;;
20m)
    out=runs/growth_20m vocab=4096 seq_len=512 rows=64 dtype=bf16 bucket=50000000
    small_steps=600 scratch_steps=(600 1200) grown_steps=(240 480 720) warmup=100 grown_warmup=50
    small=(model.d_model=256 model.n_layers=6 model.n_heads=4 model.n_kv_heads=2 model.d_ff=704)
    wide=(model.d_model=512 model.n_layers=6 model.n_heads=8 model.n_kv_heads=4 model.d_ff=1408)
    deep=(model.d_model=512 model.n_layers=9 model.n_heads=8 model.n_kv_heads=4 model.d_ff=1408)
    declare -A small_lr=([tiger]=2.5e-3 [adamw]=1e-3) lr=([tiger]=4e-3 [adamw]=1e-3)
    declare -A deep_lr=([tiger]=4e-3 [adamw]=7e-4) grown_lr=([tiger]=2e-3 [adamw]=1e-3)
    ;;
*)
    echo "SIZE=$SIZE is neither small nor 20m" >&2
    exit 2
    ;;
esac

prepare() {
    if [ -d $out/data ]; then return; fi
    step "text, tokenizer, shards: all the Python sources that come with Python, its tests included"
    VOCAB=$vocab stdlib_text $out
    if [ $vocab = 4096 ]; then # and those of the packages that come with megakexue
        site=$(python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
        (cd "$site" && find . -name '*.py' -size -300k -print0 | tar c --null -T -) | tar x -C $out/text
    fi
    run tools/prepare_data.py $out/text --tokenizer $out/tokenizer.model --seq-len $seq_len --valid-fraction 0.03 --out $out/data
}
common=("data.sources=[{path: $out/data}]" data.tokenizer=$out/tokenizer.model data.seq_len=$seq_len
    model.vocab_size=$vocab model.tie_embeddings=true engine.dtype=$dtype engine.bucket_elements=$bucket)

# NAME STEPS OPTIMIZER LR SEED, then model, schedule and more
train() {
    local name=$1 steps=$2 optimizer=$3 rate=$4 seed=$5
    shift 5
    if [ -f $out/"$name"/done ]; then return; fi
    step "$name"
    DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} run launch/train.py configs/tiny_gqa.yaml "${common[@]}" train.run=$out/"$name" \
        train.steps="$steps" train.global_batch_size=$rows train.micro_batch_size=$rows optim.name="$optimizer" \
        optim.lr="$rate" train.seed="$seed" data.shuffle_seed="$seed" checkpoint.every_steps=5000 checkpoint.keep_last=1 \
        evaluate.every_steps=500 evaluate.n_rows=512 metrics.statistics_every_steps=null metrics.tensorboard=false "$@" 2>&1 |
        grep --line-buffered -v '\[INFO\]\|\[WARNING\]\|^step' || true
    if ! grep -q "\"kind\": \"valid\", \"step\": $steps," $out/"$name"/metrics.jsonl; then
        echo "$name has not come to its end: see $out/$name/logs" >&2
        exit 1
    fi
    touch $out/"$name"/done
}
constant=(optim.schedule=piecewise optim.warmup_steps=0 "optim.points={$warmup: 1}") # warm up, and stay
# STEPS WARMUP: warm up, stay, and fall over the second half
falling() {
    schedule=(optim.schedule=wsd optim.warmup_steps="$2" optim.decay_steps=$(($1 / 2)))
}

table() {
    python - $out <<'PYTHON'
import math, sys
from pathlib import Path

import matplotlib.pyplot as plt

from megakexue.config import load_config
from megakexue.describe import flops_per_token
from megakexue.metrics import StepRecord, ValidationRecord, read_metrics

out = Path(sys.argv[1])


def read(name):
    """Validation loss at the end, FLOPs, and the training loss as (FLOPs, loss)."""
    config = load_config(out / name / "config.yaml")
    flops = flops_per_token(config.model, (config.data.seq_len + 1) / 2) * config.batch_tokens
    records = read_metrics(out / name)
    losses = [r.loss for r in records if isinstance(r, StepRecord)]  # one a step
    smooth = [sum(losses[max(0, i - 49) : i + 1]) / len(losses[max(0, i - 49) : i + 1]) for i in range(len(losses))]
    end = [r.loss for r in records if isinstance(r, ValidationRecord)][-1]
    return end, flops * config.train.steps, [(flops * (i + 1), loss) for i, loss in enumerate(smooth)]


def steps_of(name):
    return int(name.split("@")[1].split("-")[0])


early = []
figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
print("| optimizer | to | seed | small | grown, by steps | from scratch, by steps | FLOPs saved | if the small one is there |")
print("|---|---|---|---|---|---|---|---|")
for optimizer, panel in zip(("tiger", "adamw"), panels):
    panel.set(title=optimizer, xlabel="FLOPs in all", xscale="log", ylabel="loss, nats per token")
    for shape in ("wide", "deep"):
        for seed in range(10):
            grown, scratch = (
                {steps_of(path.parent.name): read(path.parent.name) for path in out.glob(f"{kind}_{shape}@*-{optimizer}-{seed}/done")}
                for kind in ("grown", "scratch")
            )
            if not grown or not scratch:
                continue
            small, saved = read(f"small-{optimizer}-{seed}"), {True: [], False: []}
            grown, scratch = dict(sorted(grown.items())), dict(sorted(scratch.items()))
            for loss, flops, _ in scratch.values():
                # where the line through the ends of the grown runs (log FLOPs, loss) meets that loss
                points = [(math.log(f), end) for end, f, _ in grown.values()]
                needed, sign = grown[max(grown)][1], "< "
                for (x0, y0), (x1, y1) in zip(points, points[1:]):
                    if y1 <= loss:
                        needed = math.exp(x0 + (x1 - x0) * max(0.0, (y0 - loss) / (y0 - y1)))
                        sign = "> " if y0 <= loss else ""
                        break
                for with_small in saved:
                    saved[with_small].append(f"{sign}{1 - (needed + with_small * small[1]) / flops:.0%}")
            grown_ends, scratch_ends = (", ".join(f"{k}: {run[0]:.3f}" for k, run in runs.items()) for runs in (grown, scratch))
            print(f"| {optimizer} | {shape} | {seed} | {small[0]:.3f} | {grown_ends} | {scratch_ends} | {', '.join(saved[True])} "
                  f"| {', '.join(saved[False])} |")
            shares = []
            for at in (50, 100, 200, 400, 600):
                if at > max(grown):
                    shares.append("")
                    continue
                flops, loss = grown[max(grown)][2][at - 1]
                needed = next((f for f, x in scratch[max(scratch)][2][49:] if x <= loss), math.nan)
                shares.append(f"{loss:.2f}: {1 - (small[1] + flops) / needed:.0%}")
            early.append(f"| {optimizer} | {shape} | {seed} | {' | '.join(shares)} |")
            if seed == 0:
                color = {"wide": "C0", "deep": "C1"}[shape]
                panel.plot(*zip(*scratch[max(scratch)][2]), color=color, lw=1, ls=":", label=f"{shape}, from scratch")
                panel.plot(*zip(*((small[1] + x, y) for x, y in grown[max(grown)][2])), color=color, lw=1.2, label=f"{shape}, grown")
                if shape == "wide":
                    panel.plot(*zip(*small[2]), color="0.5", lw=1, label="small")
    panel.legend(fontsize=8)
print("\nTraining loss (mean of 50 steps) some steps after growth, and the FLOPs saved where the longest run has it from scratch:\n")
print("| optimizer | to | seed | 50 | 100 | 200 | 400 | 600 |\n|---|---|---|---|---|---|---|---|")
print("\n".join(early))
lowest = min(read(path.parent.name)[0] for path in out.glob("*/done"))
panels[0].set_ylim(lowest - 0.1, lowest + 2)
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
table) ;;
picture)
    picture
    exit
    ;;
*)
    prepare
    for seed in ${*:-0 1 2}; do
        for optimizer in $optimizers; do
            if [[ $parts = *small* ]]; then
                train "small-$optimizer-$seed" $small_steps $optimizer "${small_lr[$optimizer]}" "$seed" "${small[@]}" "${constant[@]}"
            fi
            for shape in $shapes; do
                declare -n model=$shape
                if [[ $parts = *scratch* ]]; then
                    rate=${lr[$optimizer]}
                    if [ $shape = deep ]; then rate=${deep_lr[$optimizer]}; fi
                    for steps in ${STEPS:-"${scratch_steps[@]}"}; do
                        falling "$steps" $warmup
                        train "scratch_$shape@$steps-$optimizer-$seed" "$steps" $optimizer "$rate" "$seed" "${model[@]}" "${schedule[@]}"
                    done
                fi
                bundle=$out/bundles/$shape-$optimizer-$seed
                if [[ $parts = *bundle* && ! -d $bundle ]]; then
                    mkdir -p $out/bundles
                    run tools/grow_model.py "$out/small-$optimizer-$seed" --config configs/tiny_grown.yaml --out "$bundle" \
                        --seed "$seed" "${common[@]}" data.shuffle_seed="$seed" optim.name=$optimizer "${model[@]}"
                fi
                if [[ $parts != *grown* ]]; then continue; fi
                for steps in ${STEPS:-"${grown_steps[@]}"}; do
                    falling "$steps" $grown_warmup
                    train "grown_$shape@$steps-$optimizer-$seed" "$steps" $optimizer "${grown_lr[$optimizer]}" "$seed" "${model[@]}" \
                        "${schedule[@]}" "train.init_from=$bundle" train.init_optimizer=keep train.init_data=continue
                done
            done
        done
    done
    ;;
esac
if [ -z "${PARTS:-}" ]; then table; fi
