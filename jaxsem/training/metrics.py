"""What a run writes about itself: metrics as JSON lines, a progress line, and a plot of the loss."""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax

from jaxsem.errors import FormatError, JaxsemError


class DivergedError(JaxsemError, ArithmeticError):
    """The loss, the gradient or the update became infinite or not a number; the message names step and metric."""


class MetricLog:
    """Collects the metrics of steps on the device and writes their means to `metrics.jsonl`.

    Nothing is waited for until `flush`. The clock starts at `start_clock` and leaves out what happens between a flush
    and the next `start_clock`, so rates hold neither compilation, nor evaluation, nor the writing of checkpoints.

    Args:
        path: The JSON-lines file; rows after `step` are dropped, since a resumed run writes them again.
        step: The step the run starts from.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        self.first_step = step
        self._writes = jax.process_index() == 0
        rows = [row for row in read_rows(path) if row["step"] <= step]
        self._time = rows[-1]["time"] if rows else 0.0
        if self._writes:
            beside = path.with_name(path.name + ".part")
            beside.write_text("".join(json.dumps(row) + "\n" for row in rows))
            os.replace(beside, path)
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._mark = self._begun = time.monotonic()
        self._timed = [0, 0.0]  # steps and seconds since the last flush
        self._total = [0, 0.0]  # the same since the run started

    def start_clock(self) -> None:
        """Begins to count time again, after compilation, evaluation or a checkpoint."""
        self._mark = time.monotonic()
        self._timed = [0, 0.0]

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of the step that leads to `step`, without waiting for them."""
        self._pending.append((step, metrics))
        self._timed[0] += 1

    def flush(self, batch_size: int, learning_rate: float) -> dict[str, Any] | None:
        """Waits for the steps so far and writes the means of their metrics as one row.

        Args:
            batch_size: Images in a batch over all processes, for the rate.
            learning_rate: What to write as `lr`.

        Returns:
            The row, or None when there was no step since the last flush.

        Raises:
            DivergedError: If a step was not finite, naming the first such step and its metrics.
        """
        if not self._pending:
            return None
        steps = [step for step, _ in self._pending]
        values = jax.device_get([metrics for _, metrics in self._pending])
        self._pending = []
        for step, metrics in zip(steps, values):
            if not metrics["finite"]:
                raise DivergedError(_describe_divergence(step, metrics))
        now = time.monotonic()
        self._timed[1] = now - self._mark
        self._mark = now
        self._total = [self._total[0] + self._timed[0], self._total[1] + self._timed[1]]
        count, seconds = self._timed
        self._timed = [0, 0.0]
        means = {name: sum(float(m[name]) for m in values) / len(values) for name in values[0] if name != "finite"}
        rate = batch_size * count / seconds if count else None
        return self.write({"step": steps[-1], "images_per_second": rate, "lr": learning_rate, **means})

    def write(self, row: dict[str, Any]) -> dict[str, Any]:
        """Appends a row with the run's time in seconds; numbers that JSON does not have are written as null."""
        now = time.monotonic()
        self._time, self._begun = self._time + now - self._begun, now
        row = {"step": row["step"], "time": round(self._time, 3), **row}
        row = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in row.items()}
        if self._writes:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        return row

    def seconds_left(self, steps: int) -> float | None:
        """The time that `steps` more steps should take, or None before anything was measured."""
        count, seconds = self._total
        return steps * seconds / count if count else None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads `metrics.jsonl`; a missing file has no rows, and a last line that was cut short is left out.

    Raises:
        FormatError: If another line is not JSON.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise FormatError(f"line {number} of {path} is not JSON: move the file away to go on without it") from error
    return rows


def show_progress(row: dict[str, Any], steps: int, seconds_left: float | None) -> None:
    """Prints one line to stderr: step, loss, rate, time left; on a terminal it replaces the line before."""
    rate = row["images_per_second"]
    parts = [f"step {row['step']}/{steps}", f"loss {row['loss']:.5g}"]
    if rate is not None:
        parts.append(f"{rate:.4g} images/s")
    if seconds_left is not None:
        minutes, seconds = divmod(round(seconds_left), 60)
        parts.append(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")
    line = "  ".join(parts)
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{line}" + ("\n" if row["step"] >= steps else ""))
    else:
        sys.stderr.write(line + "\n")
    sys.stderr.flush()


def plot_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws the training metrics, and the evaluations of the same name over them, as one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    skipped = {"step", "time", "images_per_second"}
    names = list(dict.fromkeys(name.removeprefix("eval/") for row in rows for name in row if name not in skipped))
    if not names:
        return
    names.sort(key=lambda name: name != "loss")
    columns = min(3, len(names))
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(5 * columns, 3 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, name in zip(figure.subplots(lines, columns, squeeze=False).flat, names):
        for key, style in ((name, "-"), (f"eval/{name}", "o-")):
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                axis.plot(*zip(*points), style, label=key, markersize=3)
        axis.set(title=name, xlabel="step")
        axis.legend()
    beside = path.with_name(path.name + ".part")
    figure.savefig(beside, format="png", dpi=100)
    os.replace(beside, path)


def _describe_divergence(step: int, metrics: dict[str, Any]) -> str:
    bad = [f"{name} is {float(x)}" for name, x in metrics.items() if name != "finite" and not math.isfinite(x)]
    return f"training diverged at step {step}: {', '.join(bad) or 'the update of the parameters is not finite'}"
