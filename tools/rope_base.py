#!/usr/bin/env python
"""Find the RoPE bases that serve a context by the bound rule, check a base, draw the rule, write the shipped table."""

import argparse
import io
from pathlib import Path

import numpy as np

from megakexue.config import (
    MAX_CONTEXT,
    MAX_HEAD_WIDTH,
    UserError,
    as_integer,
    as_number,
    load_config,
    require,
    run_program,
)
from megakexue.core.bases import (
    Bases,
    find_bases,
    first_violation,
    infimum_base,
    last_invalid_base,
    rotary_sum,
    safe_base,
    smallest_base,
)
from megakexue.core.resolve import resolve
from megakexue.core.rope import base_notes
from megakexue.files import require_new_file, write_whole

EPILOG = """\
A base b serves a context of L tokens when f_b(m) = sum_i cos(m b^(-2i/d)) >= 0 for all m < L (10122): a similar key is
then preferred over a random one at every distance. The valid bases are no interval: above the smallest one, the
infimum, there are invalid ones again, and published values rounded from it are often invalid. Above the last invalid
base all are valid; the next one of three digits is what model.rope.base=auto takes.

examples:
  tools/rope_base.py --d-rotary 128 --context 4096
  tools/rope_base.py --d-rotary 128 --context 4096 --base 10000 --plot rule.png
  tools/rope_base.py --config configs/125m.yaml data.seq_len=8192 model.rope.base=500000
  tools/rope_base.py --d-rotary 96 --unrotated 16 --context 4096
  tools/rope_base.py --write-table megakexue/core/rope_bases.tsv --overwrite

--unrotated counts the pairs of a partly rotated head that RoPE leaves alone; auto and --config look at the rotated part
alone, which implies the rule of the whole head.

The widths and contexts of the shipped table (powers of 2 up to 128k tokens) are answered at once. Others are searched:
half a minute for 64k tokens, four times that for twice as many. The whole table takes a quarter of an hour.
"""

WIDTHS = (32, 48, 64, 80, 96, 128, 192, 256)
CONTEXTS = tuple(2**i for i in range(8, 18))
N_LOWEST = 200
"""Parts of the context, of each of which the plot shows the lowest value."""
LONGEST = 2**22
"""Tokens up to which a violation by a valid base is searched."""


def report(d_rotary: int, context: int, n_unrotated: int, base: float | None) -> None:
    """Print the bases of a width and context, and whether a given base is valid."""
    rest = f" + {n_unrotated}" if n_unrotated else ""
    found = find_bases(d_rotary, context, n_unrotated)
    smallest, safe = smallest_base(d_rotary, context, n_unrotated), safe_base(d_rotary, context, n_unrotated)
    print(
        f"{d_rotary // 2} rotated pairs, {context} tokens: f_b(m) = sum cos(m b^(-2i/{d_rotary})){rest} >= 0 "
        f"for m < {context}\n"
        f"infimum       {smallest:<14.15g} the smallest valid base; a little above it there may be invalid ones\n"
        f"last invalid  {found.last_invalid:<14.10g} all bases above it are valid\n"
        f"safe          {safe:<14.15g} the next one of three digits"
    )
    if base is None:
        return
    f = rotary_sum(base, d_rotary, context) + n_unrotated
    violation = first_violation(base, d_rotary, context, n_unrotated)
    lowest = f"lowest f({f.argmin()}) = {f.min():.6g}"
    label = f"base          {base:<14.15g}"
    if violation is not None:
        print(f"{label} INVALID: serves {violation} tokens, f({violation}) = {f[violation]:.6g}; {lowest}")
        return
    longer = context
    while violation is None and longer < LONGEST:
        longer = min(4 * longer, LONGEST)
        violation = first_violation(base, d_rotary, longer, n_unrotated)
    print(f"{label} valid: serves {violation or f'at least {longer}'} tokens; {lowest}")


def plot(d_rotary: int, context: int, n_unrotated: int, base: float | None, out: Path) -> None:
    """Write a PNG of f_b(m) and its lowest values, which the rule judges, for the smallest, safe and given base."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("--plot needs matplotlib, which is not installed: pip install 'matplotlib>=3.9'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curves = {
        "smallest": smallest_base(d_rotary, context, n_unrotated),
        "safe": safe_base(d_rotary, context, n_unrotated),
    }
    if base is not None:
        curves["given"] = base
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for index, (name, value) in enumerate(curves.items()):
        f = rotary_sum(value, d_rotary, context) + n_unrotated
        violation = first_violation(value, d_rotary, context, n_unrotated)
        label = f"{name} {value:.10g}" + (f": below 0 at {violation}" if violation is not None else "")
        width = -(-context // N_LOWEST)
        starts = np.arange(0, context, width)
        axes.plot(f, color=f"C{index}", linewidth=0.5, alpha=0.25)
        axes.plot(starts, np.minimum.reduceat(f, starts), color=f"C{index}", linewidth=1.4, label=label)
        if violation is not None:
            axes.plot(violation, f[violation], "o", color=f"C{index}", markersize=5, markeredgecolor="white")
    axes.axhline(0, color="0.2", linewidth=1)
    axes.set_xlabel("distance m (tokens)")
    axes.set_ylabel(r"$f_b(m) = \sum_i \cos(m\,b^{-2i/d})$" + (f" + {n_unrotated}" if n_unrotated else ""))
    axes.margins(x=0.01)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, ncols=3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    plt.close(figure)
    write_whole(out, picture.getvalue())
    print(f"wrote {out}")


def write_table(d_rotary: int | None, context: int | None, out: Path) -> None:
    """Search all widths and contexts, or the given width and the contexts up to the given one."""
    lines = [
        "# RoPE bases by the bound rule (10122); rebuild with tools/rope_base.py --write-table "
        "megakexue/core/rope_bases.tsv --overwrite",
        "\t".join(["d_rotary", "context", *Bases._fields]),
    ]
    for width in WIDTHS if d_rotary is None else (d_rotary,):
        for length in CONTEXTS:
            if context is None or length <= context:
                infimum, last = infimum_base(width, length), last_invalid_base(width, length)
                lines.append(f"{width}\t{length}\t{infimum:.10g}\t{last:.10g}")
                print(lines[-1], flush=True)
    write_whole(out, "\n".join(lines) + "\n")
    print(f"wrote {out}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Find the RoPE bases that serve a context, check a base, draw the rule.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--d-rotary", metavar="N", type=as_integer, help="dimensions of a head that RoPE rotates")
    parser.add_argument("--context", metavar="N", type=as_integer, help="tokens that the base must serve")
    parser.add_argument(
        "--unrotated", metavar="N", type=as_integer, help="pairs of the head not rotated, which add 1 each"
    )
    parser.add_argument("--base", metavar="B", type=as_number, help="a base to check")
    parser.add_argument("--config", metavar="YAML", type=Path, help="take width, context and base from a config")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="changes of the config")
    parser.add_argument("--plot", metavar="PNG", type=Path, help="draw f_b(m)")
    parser.add_argument("--write-table", metavar="TSV", type=Path, help="write the table that the package ships")
    parser.add_argument("--overwrite", action="store_true", help="replace PNG or TSV")
    args = parser.parse_intermixed_args()
    for option in ("d_rotary", "context", "unrotated", "base"):
        value, name = getattr(args, option), "--" + option.replace("_", "-")
        require(value is None or (value >= 0 and (value > 0 or option == "unrotated")), f"{name} {value} is too small")
        require(value is None or args.config is None, f"{name} and --config: give one; the config has its own")
    for name, value, limit in (("--d-rotary", args.d_rotary, MAX_HEAD_WIDTH), ("--context", args.context, MAX_CONTEXT)):
        require(value is None or value <= limit, f"{name} {value} must be at most {limit}")
    require(args.d_rotary is None or args.d_rotary % 2 == 0, f"--d-rotary {args.d_rotary} must be even")
    require(args.base is None or args.base > 1, f"--base {args.base} must be above 1")
    require(args.config is not None or not args.overrides, f"{args.overrides} change a config: give --config")
    for option, out, suffix in (("--plot", args.plot, ".png"), ("--write-table", args.write_table, ".tsv")):
        if out is not None:
            require(out.suffix == suffix, f"{option} {out} must end in {suffix}")
            require_new_file(option, out, args.overwrite)
    return args


def main() -> None:
    args = parse_arguments()
    if args.write_table is not None:
        for option in ("config", "unrotated", "base", "plot"):
            require(getattr(args, option) is None, f"--write-table does not go with --{option}")
        write_table(args.d_rotary, args.context, args.write_table)
        return
    notes: list[str] = []
    if args.config is not None:
        config = load_config(args.config, args.overrides)
        model = resolve(config.model, config.optim.name, config.data.seq_len)
        rope, n_tokens, chosen = model.rope, model.rope.context, model.rope.base
        notes = base_notes(model)
        if rope.trained_context is not None and rope.extension != "base":
            n_tokens = rope.trained_context
        d_rotary, n_unrotated, base = config.model.rotary_width, 0, chosen
    else:
        require(args.d_rotary is not None and args.context is not None, "give --d-rotary and --context, or --config")
        d_rotary, n_tokens, n_unrotated, base = args.d_rotary, args.context, args.unrotated or 0, args.base
    report(d_rotary, n_tokens, n_unrotated, base)
    for note in notes:
        print(note)
    if args.plot is not None:
        plot(d_rotary, n_tokens, n_unrotated, base, args.plot)


if __name__ == "__main__":
    run_program(main)
