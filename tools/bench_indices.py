"""How few bytes the indices of a feature quantiser take, and how fast, for every coder of indices.

    python tools/bench_indices.py --indices FILE.npy [--codewords 4] [--train 20000] [--json FILE]
    python tools/bench_indices.py --features FILE.npy [--subspaces 64] [--codewords 16] [--train 800] [--json FILE]

FILE holds indices, integers [count, n], or features [count, width] to be product-quantised first. The first `--train`
rows fit the quantiser, the tables and the learned prior; the others are coded. Every coder gives back what it was
given, or the run stops. The columns:

    bits        per image, from the real bytes of the streams, one for each image
    ideal       bits per image that the coder's own probabilities ask for
    overhead    of the bits over the ideal
    saving      bits saved over one Huffman code for all positions, the paper's coder
    encode, decode    images a second in batches of 1 and of 1024 (the median; the JSON file has the quartiles)
    tables      bytes that both sides must have beforehand
    fit         seconds to fit

All coders run in turn, again and again, so that a busy machine slows them alike.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import _timing
import bench_features
import numpy as np
from _timing import Spread

from jaxsem.entropy.index_coder import IndexCoder, check_rows
from jaxsem.entropy.indices import FixedLength, HuffmanIndices, PriorRans, StaticRans
from jaxsem.errors import InputError
from jaxsem.systems.feature_quantizers import ProductQuantizer, RotatedProductQuantizer
from jaxsem.systems.index_prior import fit_prior, freeze_prior

BATCHES, REPETITIONS = (1, 1024), 11
QUICK_BATCHES, QUICK_REPETITIONS, QUICK_STEPS = (1, 64), 3, 60
PAPER = "Huffman, one code"
QUANTIZERS = {"pq": ProductQuantizer, "opq": RotatedProductQuantizer}


@dataclass(frozen=True)
class Row:
    """One line of the result; its columns are in the tool's docstring, overhead and saving in %."""

    name: str
    bits: float
    ideal: float
    overhead: float
    saving: float
    encode: dict[int, Spread]
    decode: dict[int, Spread]
    tables: int
    fit_seconds: float


def fits(
    train: np.ndarray, sizes: tuple[int, ...], hidden: int, steps: int, seed: int
) -> dict[str, Callable[[], IndexCoder]]:
    """The contestants by name; each call fits one to the train indices [m, n]."""
    return {
        "fixed length": lambda: FixedLength(np.array(sizes)),
        PAPER: lambda: HuffmanIndices.from_indices(train, sizes),
        "Huffman, one per position": lambda: HuffmanIndices.from_indices(train, sizes, per_position=True),
        "rANS, one table": lambda: StaticRans.from_indices(train, sizes, per_position=False),
        "rANS, one per position": lambda: StaticRans.from_indices(train, sizes),
        "rANS, learned prior": lambda: PriorRans(
            freeze_prior(fit_prior(train, sizes, hidden=hidden, steps=steps, seed=seed))
        ),
    }


def measure(
    makers: dict[str, Callable[[], IndexCoder]], test: np.ndarray, batches: tuple[int, ...], repetitions: int
) -> list[Row]:
    """Fit all coders, code the test indices [b, n], and time batches of them, repeated where they are too few."""
    coders: dict[str, IndexCoder] = {}
    seconds = {name: _timing.seconds(lambda: [coders.update({name: make()})]) for name, make in makers.items()}  # noqa: B023
    real, ideal = {}, {}
    for name, coder in coders.items():
        streams = coder.encode(test)
        if not np.array_equal(coder.decode(streams), test):
            raise SystemExit(f"{name} does not decode what it encoded.")
        real[name] = 8 * sum(map(len, streams)) / len(streams)
        ideal[name] = float(coder.ideal_bits(test).mean())
    speeds = {
        size: _speeds(list(coders.values()), np.resize(test, (size, test.shape[1])), repetitions) for size in batches
    }
    return [
        Row(
            name=name,
            bits=real[name],
            ideal=ideal[name],
            overhead=100 * (real[name] / ideal[name] - 1),
            saving=100 * (1 - real[name] / real[PAPER]),
            encode={size: speeds[size][0][i] for size in batches},
            decode={size: speeds[size][1][i] for size in batches},
            tables=sum(array.nbytes for array in coder.to_arrays().values()),
            fit_seconds=seconds[name],
        )
        for i, (name, coder) in enumerate(coders.items())
    ]


def _speeds(coders: list[IndexCoder], rows: np.ndarray, repetitions: int) -> tuple[list[Spread], list[Spread]]:
    """Images a second of encoding and of decoding the rows, for each coder; the first round is not counted."""
    streams = [coder.encode(rows) for coder in coders]
    times = np.zeros((2, len(coders), repetitions + 1))
    for i in range(repetitions + 1):
        for j, coder in enumerate(coders):
            times[0, j, i] = _timing.seconds(lambda: coder.encode(rows))  # noqa: B023
            times[1, j, i] = _timing.seconds(lambda: coder.decode(streams[j]))  # noqa: B023
    encode, decode = ([Spread.of(len(rows) / own) for own in kind[:, 1:]] for kind in times)
    return encode, decode


def report(rows: list[Row]) -> None:
    """Print the rows as a table."""
    sizes = list(rows[0].encode)
    header = ["coder", "bits", "ideal", "overhead", "saving"]
    header += [f"{what} x{size}" for what in ("encode", "decode") for size in sizes] + ["tables", "fit"]
    lines = []
    for row in rows:
        cells = [row.name, f"{row.bits:.2f}", f"{row.ideal:.2f}", f"{row.overhead:.2f}%", f"{row.saving:.2f}%"]
        cells += [f"{kind[size].median:,.0f}/s" for kind in (row.encode, row.decode) for size in sizes]
        lines.append([*cells, f"{row.tables:,} B", f"{row.fit_seconds:.1f} s"])
    print()
    _timing.print_table(header, lines)


def load_indices(path: Path, codewords: int | None) -> tuple[np.ndarray, tuple[int, ...]]:
    """Indices int32 [b, n] of a .npy file and the size of the codebook of each position, the same for all.

    Raises:
        InputError: No such file, another format, no integers [b, n], or an index outside the codebook.
    """
    try:
        stored = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} is not a .npy file of indices: {error}") from error
    if not isinstance(stored, np.ndarray) or stored.ndim != 2 or stored.dtype.kind not in "iu" or not stored.size:
        raise InputError(f"{path} does not hold one array of integers [count, n]")
    sizes = (codewords or max(2, int(stored.max()) + 1),) * stored.shape[1]
    return check_rows(stored, np.array(sizes)), sizes


def main(arguments: list[str] | None = None) -> int:
    """Measure every coder; with ``--json`` also write the figures to a file."""
    parser = _timing.parser(__doc__, f"small batches and {QUICK_STEPS} steps of training, to see that it works")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--indices", metavar="FILE", type=Path, help=".npy file of integers [count, n]")
    source.add_argument("--features", metavar="FILE", type=Path, help=".npy file [count, width]")
    parser.add_argument("--train", metavar="N", type=_timing.positive, help="rows to fit on (four in five)")
    parser.add_argument(
        "--codewords", metavar="K", type=_timing.positive, help="of each position (the largest index + 1; features: 16)"
    )
    parser.add_argument("--quantizer", choices=QUANTIZERS, default="pq", help="of features (pq)")
    parser.add_argument("--subspaces", metavar="N", type=_timing.positive, default=64, help="of features (64)")
    parser.add_argument("--hidden", metavar="H", type=_timing.positive, default=64, help="units of the prior (64)")
    parser.add_argument("--steps", metavar="N", type=_timing.positive, default=2500, help="of its training (2500)")
    parser.add_argument("--seed", type=int, default=0, help="of the quantiser and of the prior (0)")
    options = parser.parse_args(arguments)
    return _timing.run("bench_indices", options, lambda: _measure(options))


def _measure(options: argparse.Namespace) -> dict:
    if options.seed < 0:
        raise InputError(f"--seed must be at least 0, not {options.seed}")
    if options.indices:
        indices, sizes = load_indices(options.indices, options.codewords)
        cut = _cut(options.train, len(indices))
        source = f"{options.indices.name}"
    else:
        features, codewords = bench_features.load(options.features), options.codewords or 16
        cut = _cut(options.train, len(features))
        kind = QUANTIZERS[options.quantizer]
        quantizer = kind.fit(features[:cut], subspaces=options.subspaces, codewords=codewords, seed=options.seed)
        indices, sizes = quantizer.indices(features), quantizer.table_sizes
        source = f"{options.features.name}, {options.quantizer}"
    train, test = indices[:cut], indices[cut:]
    steps = min(options.steps, QUICK_STEPS) if options.quick else options.steps
    batches, repetitions = (QUICK_BATCHES, QUICK_REPETITIONS) if options.quick else (BATCHES, REPETITIONS)
    print(f"{source}: {len(train)} rows to fit on, {len(test)} to code, {len(sizes)} indices below {max(sizes)}")
    print(f"{repetitions} repetitions after a warm-up; prior: {options.hidden} hidden units, {steps} steps")
    rows = measure(fits(train, sizes, options.hidden, steps, options.seed), test, batches, repetitions)
    report(rows)
    about = {"source": source, "train": len(train), "test": len(test), "positions": len(sizes), "codewords": max(sizes)}
    settings = {"hidden": options.hidden, "steps": steps, "seed": options.seed, "repetitions": repetitions}
    return {**about, **settings, "rows": [asdict(row) for row in rows]}


def _cut(train: int | None, count: int) -> int:
    """How many rows are for fitting."""
    cut = 4 * count // 5 if train is None else train
    if not 2 <= cut < count:
        raise InputError(f"--train must be 2 to {count - 1} of {count} rows, not {cut}")
    return cut


if __name__ == "__main__":
    sys.exit(main())
