"""Runs as one HTML file: pictures, and what their folders say of them. It needs no network and runs no script.

What must stay true: all text that comes from a run is escaped, for a sample or the name of a source may hold anything.
"""

import base64
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

from megakexue.run.metrics import human_count
from megakexue.run.records import (
    ExportRecord,
    Record,
    SamplesRecord,
    SourceLoss,
    StatisticsRecord,
    StepRecord,
    ValidationRecord,
)

MAX_EVENTS = 50
"""Steps that were not applied, of which each has a line."""
COLORS = ("#e69f00", "#56b4e9", "#0072b2", "#cc79a7", "#009e73", "#d55e00", "#bbbbbb")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
img { max-width: 100%; } table { border-collapse: collapse; }
td, th { padding: .15rem .9rem .15rem 0; text-align: left; vertical-align: top; overflow-wrap: break-word; }
td:first-child { white-space: nowrap; }
th { font-weight: 600; white-space: nowrap; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
tr + tr td { border-top: 1px solid #eee; }
pre { background: #f6f6f6; padding: .6rem; margin: .3rem 0; font-size: 13px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.bar { display: flex; height: 1.1rem; } .bar i { display: block; }
.key { display: inline-block; width: .8rem; height: .8rem; margin-right: .3rem; }
.quiet { color: #666; }
"""


def page(title: str, pictures: Iterable[tuple[str, bytes]], runs: Iterable[tuple[str, Path, Sequence[Record]]]) -> str:
    """Return the file.

    Args:
        pictures: what each shows, and a PNG.
        runs: of each its name, its folder and its records.
    """
    images = [
        f'<img alt="{escape(what)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for what, png in pictures
    ]
    sections = [_run(name, folder, records) for name, folder, records in runs]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    body = "\n".join([f"<h1>{escape(title)}</h1>", *images, *sections])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _run(name: str, folder: Path, records: Sequence[Record]) -> str:
    steps = [record for record in records if isinstance(record, StepRecord)]
    samples = [record for record in records if isinstance(record, SamplesRecord)]
    statistics = [record for record in records if isinstance(record, StatisticsRecord) and record.attention]
    starts = _starts(folder)
    parts = [
        ("", _facts(folder, steps, records, starts)),
        ("Where the time goes", _times(steps)),
        ("Losses by source", _sources(records)),
        ("Steps that were not applied", _events(steps)),
        ("Starts", _table(
            ["time", "from step", "ranks", "command"],
            [[start.get("time"), start.get("step"), start.get("ranks"), start.get("command")] for start in starts],
        )),
        ("Attention", _attention(statistics[-1]) if statistics else ""),
        (f"Samples of step {samples[-1].step}" if samples else "", _samples(samples[-1]) if samples else ""),
        ("Config", _config(folder)),
    ]  # fmt: skip
    shown = [f"<h3>{escape(heading)}</h3>\n{html}" if heading else html for heading, html in parts if html]
    return "\n".join([f"<h2>{escape(name)}</h2>", *shown])


def _table(heads: list[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table; "" without rows. Numbers are right-aligned."""
    lines = []
    for row in rows:
        cells = [(_number(x), ' class="n"') if isinstance(x, (int, float)) else (str(x), "") for x in row]
        lines.append("".join(f"<td{align}>{escape(text)}</td>" for text, align in cells))
        aligns = [align for _, align in cells]
    if not lines:
        return ""
    head = "".join(f"<th{align}>{escape(text)}</th>" for text, align in zip(heads, aligns)) if heads else ""
    return f"<table>{f'<tr>{head}</tr>' if head else ''}{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _number(x: float) -> str:
    return f"{x:,}" if isinstance(x, int) else f"{x:.4f}" if 0.01 <= abs(x) < 1e4 else f"{x:.3g}"


def _starts(folder: Path) -> list[dict[str, Any]]:
    """Each start of the run, as far as they were written (megakexue/run/folder.py)."""
    found = []
    with suppress(OSError):
        for line in (folder / "starts.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
    return [start for start in found if isinstance(start, dict)]


def _facts(folder: Path, steps: list[StepRecord], records: Sequence[Record], starts: list[dict[str, Any]]) -> str:
    last, newest = steps[-1], starts[-1] if starts else {}
    valid = [record for record in records if isinstance(record, ValidationRecord)]
    exports = Counter(record.error is None for record in records if isinstance(record, ExportRecord))
    facts = {
        "folder": str(folder),
        "parameters": f"{newest['parameters']:,}" if "parameters" in newest else None,
        "steps": f"{last.step:,}",
        "tokens": f"{last.tokens:,}, epoch {last.epoch:.3g}",
        "last loss": f"{last.loss:.4f} nats a token",
        "last validation": f"{valid[-1].loss:.4f} at step {valid[-1].step:,}" if valid else None,
        "bits per byte": f"{valid[-1].bits_per_byte:.4f}"
        if valid and not math.isnan(valid[-1].bits_per_byte)
        else None,
        "speed": f"{human_count(_median([record.tokens_per_s for record in steps]))} tokens/s, median",
        "memory": f"{max(record.memory_gib for record in steps):.1f} GiB, at most",
        "exports": f"{exports[True]} written, {exports[False]} failed" if exports else None,
        "ranks": newest.get("ranks"),
        "device": newest.get("device"),
        "versions": ", ".join(f"{name} {version}" for name, version in newest.get("versions", {}).items()) or None,
        "code": newest.get("source"),
        "began with": starts[0].get("origin") if starts else None,
    }
    return _table([], ([name, str(value)] for name, value in facts.items() if value is not None))


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _times(steps: list[StepRecord]) -> str:
    """A bar of shares, and a table."""
    times: Counter[str] = Counter()
    known = [record for record in steps if record.times]
    for record in known:
        times.update(record.times)
    whole = sum(times.values())
    if not whole:
        return ""
    colors = dict(zip(times, COLORS, strict=False))
    bar = "".join(f'<i style="width:{s / whole:.2%};background:{colors.get(p, "#888")}"></i>' for p, s in times.items())
    rows = "".join(
        f'<tr><td><span class="key" style="background:{colors.get(part, "#888")}"></span>{escape(part)}</td>'
        f'<td class="n">{seconds / whole:.1%}</td><td class="n">{seconds / len(known):.4g} s</td></tr>'
        for part, seconds in times.items()
    )
    head = '<tr><th>part</th><th class="n">share</th><th class="n">a step</th></tr>'
    return f'<div class="bar">{bar}</div><table>{head}{rows}</table>'


def _sources(records: Sequence[Record]) -> str:
    """Of the last record with sources of either kind."""
    rows: list[list[Any]] = []
    kinds: tuple[tuple[str, type[StepRecord | ValidationRecord]], ...] = (
        ("training", StepRecord), ("validation", ValidationRecord),
    )  # fmt: skip
    for what, kind in kinds:
        found: list[dict[str, SourceLoss]] = [r.sources for r in records if isinstance(r, kind) and r.sources]
        for name, source in (found[-1] if found else {}).items():
            rows.append([what, name, source.loss, source.bits_per_byte, source.n_tokens])
    return _table(["", "source", "loss", "bits per byte", "tokens"], rows)


def _events(steps: list[StepRecord]) -> str:
    bad = [record for record in steps if record.status != "applied"]
    rows = [[record.step, record.status, record.loss, record.grad_norm] for record in bad[:MAX_EVENTS]]
    more = f'<p class="quiet">and {len(bad) - MAX_EVENTS:,} more</p>' if len(bad) > MAX_EVENTS else ""
    return _table(["step", "status", "loss", "gradient norm"], rows) + more or '<p class="quiet">none</p>'


def _attention(record: StatisticsRecord) -> str:
    rows = [[i, layer.entropy, layer.relative_entropy, layer.largest_logit] for i, layer in enumerate(record.attention)]
    note = f"of step {record.step:,}; the largest logit of the output is {record.largest_logit:.4g}"
    return f'<p class="quiet">{note}</p>' + _table(["layer", "entropy, nats", "entropy / ln n", "largest logit"], rows)


def _samples(record: SamplesRecord) -> str:
    return "".join(
        f"<pre><b>{escape(prompt)}</b>{escape(text)}</pre>" for prompt, text in zip(record.prompts, record.texts)
    )


def _config(folder: Path) -> str:
    path = folder / "config.yaml"
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    return f"<details><summary>config.yaml</summary><pre>{escape(text)}</pre></details>"
