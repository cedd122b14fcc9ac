#!/usr/bin/env bash
# The guard on real text: 300 steps of the tiny model on two ranks, clean, with 50 non-finite numbers in random
# micro-batches under two policies, and in fp16 from a loss scale of 2^24. docs/experiments.md says what came out.
# Everything is written under runs/guard; `make demo` makes the data. Started again, it makes the runs that are missing.
set -euo pipefail
cd "$(dirname "$0")/.."
out=runs/guard

run() {
    printf '\n\033[1m== %s\033[0m\n' "$name"
    printf '$ %s\n' "$*"
    "$@" 2>&1 | grep --line-buffered -v '\[INFO\]\|\[WARNING\]'
}

[ -d runs/demo/data ] || { echo "error: no runs/demo/data: run \`make demo\` first" >&2; exit 2; }
mkdir -p $out
options=(train.steps=300 metrics.every_steps=10 metrics.statistics_every_steps=null metrics.tensorboard=false
    checkpoint.every_steps=50 evaluate.every_steps=300 evaluate.n_rows=1000)
export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
for name in clean clean250 shrink skip fp16; do
    [ -f $out/$name/done ] && continue
    program=(launch/train.py configs/tiny_gqa.yaml)
    case $name in
    shrink | skip)
        rm -rf ${out:?}/$name # faults are counted from the first step
        program=(tools/inject_faults.py configs/tiny_gqa.yaml --n-faults 50 guard.on_nonfinite=$name)
        ;;
    clean250) program+=(train.steps=250 evaluate.every_steps=250) ;; # as many updates as the runs with faults make
    fp16) program+=(engine.dtype=fp16 guard.initial_loss_scale=16777216) ;;
    esac
    run deepspeed --num_accelerators 2 "${program[0]}" "${program[1]}" train.run=$out/$name "${options[@]}" "${program[@]:2}"
    touch $out/$name/done
done

printf '\n\033[1m== validation loss in nats per token\033[0m\n'
python - $out <<'PYTHON'
import json, sys
from collections import Counter
from pathlib import Path

print("| run | validation loss | steps | weights that are not finite |\n|---|---|---|---|")
for name in ("clean", "clean250", "shrink", "skip", "fp16"):
    records = [json.loads(line) for line in (Path(sys.argv[1]) / name / "metrics.jsonl").read_text().splitlines()]
    n = max(r["step"] for r in records)
    bad = [r for r in records if r["kind"] == "train" and r["status"] != "applied"]
    counts = Counter(r["status"] for r in bad)
    steps = ", ".join([f"{n - len(bad)} applied", *(f"{n} {status}" for status, n in counts.items())])
    from safetensors import safe_open

    folder = Path(sys.argv[1]) / name / "checkpoints" / f"step_{n:08d}"
    n_bad = 0
    for path in folder.glob("rank_*.safetensors"):
        with safe_open(path, "pt") as file:
            n_bad += sum(int((~file.get_tensor(key).isfinite()).sum()) for key in file.keys() if key[:4] != "rng/")
    print(f"| {name} | {records[-1]['loss']:.4f} | {steps} | {n_bad} |")
PYTHON
