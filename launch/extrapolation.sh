#!/usr/bin/env bash
# Length extrapolation (8823, 9706, 9708): models trained on rows of 256 tokens, with and without the log n scale, and
# their losses by position on documents of 2048 tokens. docs/experiments.md says what came out. Everything is written
# under runs/extrapolation; on one idle core it takes about an hour. Started again, it goes on where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
out=runs/extrapolation
seeds=(0 1 2)

mkdir -p $out/bundles $out/losses
step "1. text, tokenizer, shards: all the Python sources that come with Python, its tests included"
# the same --valid-fraction twice: the documents of the long rows are those that no model was trained on
if [ ! -d $out/long ]; then
    stdlib_text $out
    rm -rf $out/data
    prepare=(tools/prepare_data.py $out/text --tokenizer $out/tokenizer.model --valid-fraction 0.03)
    run "${prepare[@]}" --seq-len 256 --out $out/data
    run "${prepare[@]}" --seq-len 2048 --packing best_fit --out $out/long
fi

for seed in "${seeds[@]}"; do
    for scale in constant log_n; do
        step "2. training with the scale $scale, seed $seed"
        DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} run launch/train.py configs/tiny_gqa.yaml \
            "data.sources=[{path: $out/data}]" data.tokenizer=$out/tokenizer.model train.run=$out/${scale}_$seed \
            model.attention.scale=$scale train.seed=$seed data.shuffle_seed=$seed train.steps=600 \
            train.micro_batch_size=16 optim.name=adamw optim.lr=3e-3 optim.warmup_steps=50 checkpoint.every_steps=200 evaluate.every_steps=null \
            metrics.every_steps=10 2>&1 | grep --line-buffered -v '\[INFO\]\|\[WARNING\]'
        [ -d $out/bundles/${scale}_$seed ] || run tools/export_model.py $out/${scale}_$seed --out $out/bundles/${scale}_$seed
    done
done

evaluate() {
    local name=$1 scale=$2
    shift 2
    for seed in "${seeds[@]}"; do
        [ -f $out/losses/${name}_$seed.json ] || run tools/evaluate.py $out/bundles/${scale}_$seed $out/long \
            --by-position --one-document --json $out/losses/${name}_$seed.json "$@"
    done
}

step "3. losses by position, as trained and with what is added after training"
clipped=(--set attention.scale=log_n_clipped)
ntk=(--set rope.extension=ntk_exact --set rope.context=2048)
evaluate constant constant
evaluate log_n log_n
evaluate constant+clipped constant "${clipped[@]}"
evaluate constant+ntk constant "${ntk[@]}"
evaluate log_n+ntk log_n "${ntk[@]}"
evaluate constant+clipped+ntk constant "${clipped[@]}" "${ntk[@]}"

step "4. nats per token by position: mean over the seeds (lowest .. highest)"
python - $out/losses <<'PYTHON'
import json, sys
from pathlib import Path

EDGES = [0, 256, 512, 1024, 2048]
spans = [range(*pair) for pair in zip(EDGES, EDGES[1:])]
found: dict[str, list[list[float]]] = {}
for path in sorted(Path(sys.argv[1]).glob("*.json")):
    parts = json.loads(path.read_text())["by_position"]
    inside = [[part for part in parts if part["start"] in span] for span in spans]
    losses = [sum(p["loss_sum"] for p in ps) / sum(p["n_tokens"] for p in ps) for ps in inside]
    found.setdefault(path.stem.rpartition("_")[0], []).append(losses)
print("| model | " + " | ".join(f"{span.start}-{span.stop - 1}" for span in spans) + " |\n|" + "---|" * len(EDGES))
for name, seeds in sorted(found.items()):
    cells = [f"{sum(x) / len(x):.3f} ({min(x):.3f} .. {max(x):.3f})" for x in zip(*seeds)]
    print(f"| {name} | " + " | ".join(cells) + " |")
PYTHON
