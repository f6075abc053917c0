"""How fast and how tight the entropy stage is, beside constriction and CompressAI's C++ coder where they are installed.

    python tools/bench_entropy.py [--quick] [--json FILE]

Two cases: one long stream (81,920 symbols, the latent of a 256x256 image with 320 channels, 64 Gaussian tables) and
many tiny ones (1024 streams of 200 symbols from an alphabet of 8). All coders of a case run in turn, again and again,
so that a busy machine slows them alike; each timed call follows an untimed one of the same coder, and the figures are
medians and quartiles. The results of every call are bytes or NumPy arrays on the host, so nothing is still under way
when the clock stops. The other coders get their inputs in the form they want (lists for CompressAI) outside the timing.
constriction codes with one exact model at a time and so gets its symbols sorted by table.
"""

import argparse
import importlib.util
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import _timing
import numpy as np
from _timing import Spread

from jaxsem.entropy import (
    LONG,
    Decoder,
    Encoder,
    HuffmanCode,
    Tables,
    decode_lanes,
    encode_lanes,
    gaussian_tables,
    scale_index,
    scale_table,
    tables_from_counts,
)

LONG_SYMBOLS, LANES, LANE_LENGTH = 81_920, 1024, 200
COMPRESSAI = "CompressAI C++ rANS"


@dataclass(frozen=True)
class Coder:
    """A contestant: `encode()` gives its streams, `decode(streams)` the symbols, in the order of `expected`."""

    name: str
    encode: Callable[[], list[bytes]]
    decode: Callable[[list[bytes]], np.ndarray]
    expected: np.ndarray


@dataclass(frozen=True)
class Row:
    """One line of the result: speeds in million symbols a second, bytes a stream, overhead in %."""

    name: str
    encode: Spread
    decode: Spread
    bytes_per_stream: float
    overhead_percent: float


def compressai_coder() -> ModuleType | None:
    """CompressAI's coder alone: importing the package would load torch and need torchvision."""
    path = Path(sysconfig.get_path("platlib"), "compressai", "ans" + sysconfig.get_config_var("EXT_SUFFIX"))
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location("compressai.ans", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(coders: list[Coder], repetitions: int, ideal_bytes: float) -> list[Row]:
    """Time all coders in turn; a coder that does not give the symbols back stops the run."""
    streams = [coder.encode() for coder in coders]
    for coder, data in zip(coders, streams):
        if not np.array_equal(coder.decode(data), coder.expected):
            raise SystemExit(f"{coder.name} does not decode what it encoded.")
    times = np.zeros((2, len(coders), repetitions))
    for i in range(repetitions):
        for j, coder in enumerate(coders):
            times[:, j, i] = _warm_time(coder.encode), _warm_time(lambda: coder.decode(streams[j]))  # noqa: B023
    rows = []
    for j, coder in enumerate(coders):
        size = sum(map(len, streams[j])) / len(streams[j])
        rates = coder.expected.size / times[:, j] / 1e6
        overhead = 100 * (size / ideal_bytes - 1)
        rows.append(Row(coder.name, Spread.of(rates[0]), Spread.of(rates[1]), size, overhead))
    return rows


def _warm_time(call: Callable[[], object]) -> float:
    """Seconds of a call that follows another one of the same kind, with what that left in the processor's caches."""
    call()
    return _timing.seconds(call)


def long_source(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Symbols and table indices like those of a latent: most scales small, a few large; about 1.6 bits a symbol."""
    rng = np.random.default_rng(0)
    indices = scale_index(rng.lognormal(-0.3, 1.0, count))
    return np.round(rng.normal(size=count) * scale_table()[indices]).astype(np.int32), indices


def long_case(count: int) -> tuple[list[Coder], float]:
    """The contestants for one long stream, and the bytes that the tables themselves ask for."""
    symbols, indices = long_source(count)
    tables = gaussian_tables()
    coders = [
        _ours("jaxsem compiled", symbols, indices, tables, 1),
        _ours("jaxsem compiled, 10 slices", symbols, indices, tables, 10),
    ]
    ans = compressai_coder()
    if ans:
        coders.append(_compressai(ans, symbols, indices, tables))
    if importlib.util.find_spec("constriction"):
        coders += _constriction(symbols, indices, tables)
    entries = tables.coding.entries[symbols - tables.coding.shifts[indices]]
    return coders, float((16 - np.log2((entries & 0xFFFF) + 1.0)).sum() / 8)


def _ours(name: str, symbols: np.ndarray, indices: np.ndarray, tables: Tables, slices: int) -> Coder:
    parts = list(zip(np.array_split(symbols, slices), np.array_split(indices, slices)))

    def encode():
        encoder = Encoder(tables)
        for part in parts:
            encoder.push(*part)
        return [encoder.finish()]

    def decode(streams):
        decoder = Decoder(streams[0], tables)
        found = np.concatenate([decoder.pull(part) for _, part in parts])
        decoder.finish()
        return found

    return Coder(name, encode, decode, symbols)


def _compressai(ans: ModuleType, symbols: np.ndarray, indices: np.ndarray, tables: Tables) -> Coder:
    cdfs = [[0, *np.cumsum(tables.row(t)).tolist()] for t in range(len(tables))]
    model = indices.tolist(), cdfs, [len(cdf) for cdf in cdfs], tables.offsets.tolist()
    encoder, decoder, values = ans.RansEncoder(), ans.RansDecoder(), symbols.tolist()
    return Coder(
        COMPRESSAI,
        lambda: [encoder.encode_with_indexes(values, *model)],
        lambda streams: decoder.decode_with_indexes(streams[0], *model),
        symbols,
    )


def _constriction(symbols: np.ndarray, indices: np.ndarray, tables: Tables) -> list[Coder]:
    import constriction

    model, stack = constriction.stream.model, constriction.stream.stack
    order = np.argsort(indices, kind="stable")
    used, begins = np.unique(indices[order], return_index=True)
    groups = np.split((symbols - tables.offsets[indices])[order].astype(np.int32), begins[1:])
    exact = [model.Categorical(tables.row(t).astype(np.float64) / 65536, perfect=False) for t in used]
    family, means = model.QuantizedGaussian(-2000, 2000), np.zeros(len(symbols))
    scales = scale_table()[indices].astype(np.float64)

    def encode_exact():
        coder = stack.AnsCoder()
        for group, table in zip(reversed(groups), reversed(exact)):
            coder.encode_reverse(group, table)
        return [coder.get_compressed().tobytes()]

    def decode_exact(streams):
        coder = stack.AnsCoder(np.frombuffer(streams[0], np.uint32))
        return np.concatenate([coder.decode(table, len(group)) for group, table in zip(groups, exact)])

    def encode_gaussian():
        coder = stack.AnsCoder()
        coder.encode_reverse(symbols, family, means, scales)
        return [coder.get_compressed().tobytes()]

    def decode_gaussian(streams):
        return stack.AnsCoder(np.frombuffer(streams[0], np.uint32)).decode(family, means, scales)

    return [
        Coder("constriction, exact tables, sorted", encode_exact, decode_exact, np.concatenate(groups)),
        Coder("constriction, Gaussian family", encode_gaussian, decode_gaussian, symbols),
    ]


def tiny_case(lanes: int) -> tuple[list[Coder], float]:
    """The contestants for many tiny streams, and the bytes a stream would take at the entropy of the source."""
    probabilities = np.exp(1.1 * np.random.default_rng(0).normal(size=8))
    probabilities /= probabilities.sum()
    symbols = np.random.default_rng(1).choice(8, (lanes, LANE_LENGTH), p=probabilities).astype(np.int32)
    indices = np.zeros(LANE_LENGTH, np.int32)
    tables, wide = (tables_from_counts([probabilities * 1e6], precision) for precision in (8, 16))
    code = HuffmanCode.from_counts((probabilities * 1e6).astype(np.int64))
    coders = [
        Coder(
            "jaxsem lanes, short format",
            lambda: encode_lanes(symbols, indices, tables),
            lambda streams: decode_lanes(streams, indices, tables),
            symbols,
        ),
        Coder(
            "jaxsem lanes, long format",
            lambda: encode_lanes(symbols, indices, wide, LONG),
            lambda streams: decode_lanes(streams, indices, wide, stream=LONG),
            symbols,
        ),
        Coder(
            "jaxsem Huffman",
            lambda: [code.encode(lane) for lane in symbols],
            lambda streams: np.array([code.decode(data, LANE_LENGTH) for data in streams]),
            symbols,
        ),
    ]
    ans = compressai_coder()
    if ans:
        escaped = tables_from_counts([probabilities * 1e6], 16, escape=True)
        single = [_compressai(ans, lane, indices, escaped) for lane in symbols]
        coders.append(
            Coder(
                COMPRESSAI,
                lambda: [coder.encode()[0] for coder in single],
                lambda streams: np.array([coder.decode([data]) for coder, data in zip(single, streams)]),
                symbols,
            )
        )
    return coders, float(-np.log2(probabilities)[symbols].sum() / 8 / lanes)


def report(title: str, ideal: float, rows: list[Row]) -> None:
    """Print one case as a table."""
    print(f"\n{title}; ideal {ideal:.2f} bytes a stream; million symbols a second: median [quartiles]")
    _timing.print_table(
        ("coder", "encode", "decode", "bytes", "overhead"),
        [
            (
                row.name,
                row.encode.show(),
                row.decode.show(),
                f"{row.bytes_per_stream:.2f}",
                f"{row.overhead_percent:.3f}%",
            )
            for row in rows
        ],
    )
    other = next((row for row in rows if row.name == COMPRESSAI), None)
    if other:
        ratios = [rows[0].encode.median / other.encode.median, rows[0].decode.median / other.decode.median]
        print(f"{rows[0].name} over {COMPRESSAI}: {ratios[0]:.2f}x encode, {ratios[1]:.2f}x decode")


def main(arguments: list[str] | None = None) -> int:
    """Run both cases and print them; with ``--json`` also write them to a file."""
    parser = _timing.parser(__doc__, "small inputs and three repetitions, to see that it works")
    options = parser.parse_args(arguments)
    return _timing.run("bench_entropy", options, lambda: _measure(options))


def _measure(options: argparse.Namespace) -> dict:
    count, lanes, repetitions = (4096, 32, 3) if options.quick else (LONG_SYMBOLS, LANES, 41)
    print(f"{repetitions} repetitions after a warm-up")
    cases = {
        "long": (f"one stream of {count} symbols, 64 Gaussian tables", long_case(count)),
        "tiny": (f"batch of {lanes} streams of {LANE_LENGTH} symbols of 8", tiny_case(lanes)),
    }
    result = {"repetitions": repetitions, "cases": {}}
    for name, (title, (coders, ideal)) in cases.items():
        rows = run(coders, repetitions, ideal)
        report(title, ideal, rows)
        result["cases"][name] = {"title": title, "ideal_bytes": ideal, "rows": [asdict(row) for row in rows]}
    return result


if __name__ == "__main__":
    sys.exit(main())
