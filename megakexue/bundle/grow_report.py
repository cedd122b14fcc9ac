"""The plan of a growth in words: one line for each axis and each scale."""

from operator import attrgetter

from megakexue.bundle.axis_maps import AXIS_NAMES
from megakexue.bundle.grow import Growth
from megakexue.core.axes import axis_sizes


def plan(growth: Growth) -> list[str]:
    """One line for each axis and scale: what it is, from what to what, and how."""
    old, new, depth = growth.old, growth.new, growth.choices.depth
    sizes, new_sizes = axis_sizes(old), axis_sizes(new)
    lines = []
    for letter, what in AXIS_NAMES.items():
        if letter in sizes and not (letter == "g" and old.mla):
            a, b = sizes[letter], new_sizes[letter]
            how = "as it is" if a == b else _how_it_grows(growth, letter, b - a)
            lines.append(f"{what:<16} {a:>8} -> {b:<8} {how}")
    new_blocks = [str(i) for i, layer in enumerate(growth.layers) if layer.old is None]
    how = f"{depth}: blocks {', '.join(new_blocks)} are new" if new_blocks else "as it is"
    if not growth.is_lossless:
        how = "stack: blocks repeated in order; THIS CHANGES THE FUNCTION"
    lines.append(f"{'layers':<16} {old.n_layers:>8} -> {new.n_layers:<8} {how}")
    for key in ("embed_scale", "logit_scale", "attention.softmax_scale", "residual_alpha", "rope.base"):
        before, after = (attrgetter(key)(config) for config in (old, new))
        if before != after:
            how = "where the frequencies are" if key == "rope.base" else "made up for in the weights"
            lines.append(f"{key.removeprefix('attention.'):<16} {before:>8.4g} -> {after:<8.4g} {how}")
    return lines


def _how_it_grows(growth: Growth, letter: str, n_new: int) -> str:
    if letter in "mcq":
        weights = sorted({round(float(x), 4) for x in growth.maps[letter].write})
        listed = ", ".join(f"{x:g}" for x in weights)
        return f"{growth.choices.width}, weights {listed}, null-space noise {growth.choices.noise:g}"
    if letter in "np":
        side = "key" if growth.old.attention.similarity == "key_norm" else "query"
        return f"{n_new} new dimensions, silent in the {side}"
    if letter == "v":
        return f"{n_new} new rows at the mean"
    n_fresh = int(growth.maps[letter].fresh.sum())
    return f"{n_fresh} fresh, {n_new - n_fresh} copies"
