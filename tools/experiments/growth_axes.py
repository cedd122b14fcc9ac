#!/usr/bin/env python
"""Draw what growth does to weights: a small random model before it, and after it by each choice.

d_model 4 -> 6, units 4 -> 6, heads 2 -> 3 of width 4 -> 8, vocabulary 5 -> 7. It is the picture in docs/growth.md.
"""

import argparse
import io
from pathlib import Path
from typing import Any

from megakexue.config import ModelConfig, ResolvedModel, RopeConfig, require, run_program
from megakexue.files import require_new_file, write_whole

EPILOG = """\
example:
  tools/experiments/growth_axes.py --out docs/growth_axes.png --overwrite
"""
SHOWN = {
    "embedding.weight": "embedding\nwrites d_model",
    "blocks.0.feed_forward.w_up": "w_up\nreads d_model, writes units",
    "blocks.0.feed_forward.w_down": "w_down\nreads units, writes d_model",
    "blocks.0.attention.wq": "wq\n2 -> 3 heads, 4 -> 8 wide",
    "blocks.0.attention.wk": "wk\n1 head, 4 -> 8 wide",
    "blocks.0.attention.wo": "wo\nreads heads, writes d_model",
}
"""Parameter: title of its column."""
CHOICES: dict[str, dict[str, Any] | None] = {
    "before": None,
    "--width pad\n--units fresh": {},
    "--width copy\n--units copy": {"width": "copy", "units": "copy"},
    "--width copy\n--units copy\n--noise 0": {"width": "copy", "units": "copy", "noise": 0},
}
"""Label of a row: what is chosen."""


def resolved(**sizes: int) -> ResolvedModel:
    from megakexue.core.resolve import resolve

    return resolve(ModelConfig(n_layers=1, rope=RopeConfig(base=10000), **sizes), "tiger", 32)  # type: ignore[arg-type]


def draw(path: Path) -> None:
    import matplotlib.pyplot as plt
    import torch

    from megakexue.bundle.axis_maps import Choices
    from megakexue.bundle.grow import Growth
    from megakexue.core.axes import parameter_names, shape

    old = resolved(vocab_size=5, d_model=4, n_heads=2, n_kv_heads=1, d_head=4, d_ff=4)
    new = resolved(vocab_size=7, d_model=6, n_heads=3, n_kv_heads=1, d_head=8, d_ff=6)
    torch.manual_seed(3)
    weights = {name: torch.randn(shape(name, old)) for name in parameter_names(old)}
    figure, panels = plt.subplots(
        len(CHOICES), len(SHOWN), figsize=(13, 12), gridspec_kw={"height_ratios": [4, 6, 6, 6]}
    )
    for (label, choices), line in zip(CHOICES.items(), panels):
        for (name, title), panel in zip(SHOWN.items(), line):
            w = weights[name]
            if choices is None:
                panel.set_title(title, fontsize=9)
            else:
                w = Growth(old, new, Choices(**choices)).weight(name, weights.__getitem__)
            picture = w.masked_fill(w == 0, float("nan")).numpy()
            panel.imshow(picture, cmap="RdBu", vmin=-2.5, vmax=2.5, extent=(0, w.shape[1], w.shape[0], 0))
            panel.set(xticks=[], yticks=[], facecolor="0.85", xlim=(0, w.shape[1]), ylim=(w.shape[0], 0))
        line[0].set_ylabel(label, fontsize=9)
    figure.text(0.01, 0.01, "Rows are outputs, columns inputs. Grey is zero.", fontsize=9)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    png = io.BytesIO()
    figure.savefig(png, dpi=70)
    write_whole(path, png.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace PNG")
    arguments = parser.parse_intermixed_args()
    require(arguments.out.suffix == ".png", f"--out {arguments.out} must end in .png")
    require_new_file("--out", arguments.out, arguments.overwrite)
    draw(arguments.out)


if __name__ == "__main__":
    run_program(main)
