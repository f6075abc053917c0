"""What the benchmarks share: the machine in words, medians with their spread, and tables."""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from jaxsem import results
from jaxsem.errors import InputError, JaxsemError
from jaxsem.files import check_output


@dataclass(frozen=True)
class Spread:
    """The median and the quartiles of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: ArrayLike) -> "Spread":
        """The spread of values, at least one."""
        return cls(*(float(q) for q in np.quantile(values, [0.5, 0.25, 0.75])))

    def show(self, digits: int = 1) -> str:
        """As text: `12.3 [12.1, 12.9]`."""
        return f"{self.median:,.{digits}f} [{self.low:,.{digits}f}, {self.high:,.{digits}f}]"


def seconds(call: Callable[[], Any]) -> float:
    """Seconds of a call, until the array or tree of arrays that it returns is there; a list must be of host data."""
    begin = time.perf_counter()
    result = call()
    # A coder may return a list of a million integers, which JAX would look through one by one: that is not its time.
    if not isinstance(result, list):
        jax.block_until_ready(result)
    return time.perf_counter() - begin


def machine() -> dict[str, Any]:
    """The hardware, how busy it is, and the versions; for `print_machine` and the JSON file."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"hardware": results.hardware(), "cpu": _cpu_name(), "load_average": load, "versions": results.versions()}


def print_machine(record: dict[str, Any]) -> None:
    """Print what `machine` found."""
    load = record["load_average"]
    busy = "" if load is None else f"; load average {load:.1f} before the start"
    print(f"device: {record['hardware']} ({record['cpu']}){busy}")
    print("versions: " + ", ".join(f"{name} {version}" for name, version in record["versions"].items()), flush=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under a header: the first column to the left, the others to the right, each as wide as it needs."""
    lines = [header, *rows]
    widths = [max(len(line[k]) for line in lines) for k in range(len(header))]
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells]), flush=True)


def parser(description: str, quick: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has.

    Args:
        description: The tool's docstring.
        quick: What `--quick` does.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help=quick)
    made.add_argument("--json", metavar="FILE", type=Path, help="write the same figures to FILE")
    made.add_argument("--force", action="store_true", help="replace FILE if it exists")
    return made


def run(tool: str, options: argparse.Namespace, measure: Callable[[], dict[str, Any]]) -> int:
    """Measure and write the JSON file if one is asked for; a mistake gives one sentence and the exit status 2.

    Args:
        tool: Its name, for errors.
        options: With `json` and `force`.
        measure: Prints its figures and returns them.
    """
    try:
        if options.json:
            check_output(options.json, options.force)
        about = machine()
        print_machine(about)
        figures = measure()
        if options.json:
            results.write_json(options.json, {"benchmark": tool, **about, **figures}, options.force)
    except JaxsemError as error:
        print(f"{tool}: {error}", file=sys.stderr)
        return 2
    return 0


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def parse_size(text: str) -> tuple[int, int]:
    """Height and width of `WIDTHxHEIGHT`.

    Raises:
        InputError: The text is something else.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise InputError(f"a size is WIDTHxHEIGHT, such as 768x512, not {text!r}")
    return int(parts[1]), int(parts[0])


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
