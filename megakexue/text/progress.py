"""How far a program has come with reading text: a bar on a terminal, a line every ten seconds in a log."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

EVERY_S = 10.0


class Progress(NamedTuple):
    bytes_done: int
    bytes_total: int
    """Of input, as it lies on disk."""
    documents: int
    tokens: int | None
    """None: nothing is tokenised."""


class ProgressDisplay:
    """Shows progress on stderr; a context that ends the bar."""

    def __init__(self) -> None:
        self.start = self._told_at = time.perf_counter()
        self._bar = None
        if sys.stderr.isatty():
            # imported here, because every worker imports this file
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("")

    def __enter__(self) -> "ProgressDisplay":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, progress: Progress) -> None:
        now = time.perf_counter()
        seconds = now - self.start
        text = f"{progress.documents / seconds:,.0f} documents/s"
        if progress.tokens is not None:
            text += f", {progress.tokens / seconds:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, completed=progress.bytes_done, total=progress.bytes_total, description=text)
        elif now - self._told_at >= EVERY_S:
            self._told_at = now
            share = progress.bytes_done / max(progress.bytes_total, 1)
            print(f"{share:.1%} of {progress.bytes_total / 1e6:,.0f} MB, {text}", file=sys.stderr, flush=True)


@contextmanager
def heartbeat(what: str) -> Iterator[None]:
    """Say on stderr how long `what` has taken so far, every ten seconds: for work whose end is not known."""
    began, done = time.perf_counter(), threading.Event()

    def beat() -> None:
        while not done.wait(EVERY_S):
            print(f"{what}, {time.perf_counter() - began:.0f} s so far", file=sys.stderr, flush=True)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
