"""Progress of long work on standard error: how much is done, at what rate, and the time left."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

_EVERY = 10.0  # seconds between lines where no terminal could redraw one
_REDRAW = 0.1


class Progress:
    """A line that tells how far the work is: redrawn on a terminal, else a new one every ten seconds.

    Args:
      total: Steps in all.
      unit: What a step is, in the plural: "photos".
      quiet: Show nothing.
      stream: Where to; standard error by default.
      clock: Seconds, for tests.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._unit, self._quiet, self._clock = total, unit, quiet, clock
        self._stream = stream or sys.stderr
        self._redraws = self._stream.isatty()
        self._done, self._first, self._shown = 0, None, clock()
        self._width = 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.clear()

    def step(self) -> None:
        """One more step is done."""
        now = self._clock()
        self._done += 1
        if self._first is None:
            self._first = now
        due = now - self._shown >= (_REDRAW if self._redraws else _EVERY)
        if due and not self._quiet and self._done < self._total:
            self._shown = now
            self._show(self.line(now))

    def clear(self) -> None:
        """Takes the line away, so that something else can be written."""
        if self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()
            self._width = 0

    def line(self, now: float) -> str:
        """The text: `12 of 240 photos, 3.1 photos/s, 1 min 14 s left`; the first step, which compiles, is left out."""
        text = f"{self._done} of {self._total} {self._unit}"
        elapsed = now - self._first
        if self._done < 2 or elapsed <= 0:
            return text
        rate = (self._done - 1) / elapsed
        left = duration((self._total - self._done) / rate)
        speed = f"{rate:.1f} {self._unit}/s" if rate >= 0.5 else f"{1 / rate:.1f} s each"
        return f"{text}, {speed}, {left} left"

    def _show(self, line: str) -> None:
        if self._redraws:
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()


def duration(seconds: float) -> str:
    """A duration for people: `4 s`, `1 min 14 s`, `2 h 5 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
