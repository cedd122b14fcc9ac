"""A trace of some steps by torch's profiler, for chrome://tracing or Perfetto: what each kernel took, and who waited.

It begins before the first step of `metrics.profile_steps` and is written after the last one, or at the end of a run
that stops within them, by a signal too; an error leaves none. It makes these steps slower and changes no bit of them.
"""

from pathlib import Path
from typing import Any


class Profiler:
    """Traces the steps `first` to `last` of this process into `folder`."""

    def __init__(self, first: int, last: int, folder: Path) -> None:
        self._first, self._last, self._folder = first, last, folder
        self._profile: Any = None
        self._began = 0

    def before(self, step: int) -> None:
        if self._profile is None and self._first <= step <= self._last:
            from torch.profiler import profile  # takes a moment, which no other run has to wait for

            self._profile, self._began = profile(), step  # of CPU and GPU, whatever there is
            self._profile.start()

    def after(self, step: int, *, is_end: bool = False) -> str | None:
        """Write the trace if this was the last step that it is of; return what to say."""
        if self._profile is None or not (step == self._last or is_end):
            return None
        profile, self._profile = self._profile, None
        profile.stop()
        path = self._folder / f"steps_{self._began}_{step}.json.gz"
        try:
            self._folder.mkdir(exist_ok=True)
            profile.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:  # training is worth more
            return f"WARNING: the trace of steps {self._began} to {step} could not be written to {path}: {error}"
        return f"trace of steps {self._began} to {step}: {path}, for chrome://tracing or ui.perfetto.dev"
