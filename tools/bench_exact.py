"""What exact arithmetic costs: real bytes and time beside float arithmetic, and beside CompressAI's rule for scales.

    python tools/bench_exact.py [PRESET|FOLDER] --data FOLDER [--photos N] [--size 768x512] [--json FILE]

Rates: every photo of the folder, none of which should have served as calibration, at every whole quality; whole packets. As
CompressAI codes: in floats, with Gaussian tables and for each scale the smallest not below it. In floats, with the codec's fitted
tables and the nearest one. And in exact arithmetic, with the same tables.

Times: the slices of one photo of the given size at the middle quality, as the encoder and the decoder run them, entropy coding left
out; the arithmetics alternate, and the ratio is that of each pair of runs.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import _timing
import jax
import numpy as np
from _timing import Spread
from bench_codec import fit

import jaxsem
from jaxsem import codec as driver
from jaxsem import pipeline, shapes
from jaxsem.cli import DEFAULT_PRESET
from jaxsem.codec import Codec
from jaxsem.codecs.hyperprior import GAUSSIAN_TABLES
from jaxsem.data.sources import first_images, open_source
from jaxsem.entropy.tables import Tables, gaussian_tables, quantise_counts
from jaxsem.presets import bundled_photos

REPEATS = 15


def as_compressai(codec: Codec) -> Codec:
    """The codec as CompressAI codes: in floats, each scale by the smallest Gaussian table not below it."""
    config = replace(codec.module.config, scale_rule="above")
    rest = range(GAUSSIAN_TABLES, len(codec.tables))
    rest = Tables.from_rows(
        [codec.tables.row(k) for k in rest],
        codec.tables.offsets[rest],
        codec.tables.escapes[rest],
        codec.tables.precision,
    )
    tables = Tables.concat(gaussian_tables(quantise=quantise_counts), rest)
    return replace(codec, module=codec.module.clone(config=config), tables=tables, arithmetic="float")


def packet_bytes(codec: Codec, photos: Sequence[np.ndarray]) -> int:
    """Bytes of all photos' packets."""
    return sum(len(done.item.sections[pipeline.PACKET]) for done in pipeline.compress_items(codec, photos))


def measure_rates(codec: Codec, photos: Sequence[np.ndarray]) -> list[dict[str, float]]:
    """Bits per pixel by quality and in all, and what the ways of coding change, in per cent."""
    ways = {"compressai": as_compressai(codec), "float": codec.in_arithmetic("float"), "exact": codec}
    pixels = sum(photo.shape[0] * photo.shape[1] for photo in photos)
    rows: list[dict[str, float]] = []
    for level in range(max(len(codec.lambdas), 1)):
        sizes = {name: packet_bytes(way.at_quality(level), photos) for name, way in ways.items()}
        rows.append({"quality": level, **{name: 8 * size / pixels for name, size in sizes.items()}})
    if len(rows) > 1:
        rows.append({"quality": -1, **{name: sum(row[name] for row in rows) for name in ways}})
    for row in rows:
        row["exact_over_float"] = 100 * (row["exact"] / row["float"] - 1)
        row["exact_over_compressai"] = 100 * (row["exact"] / row["compressai"] - 1)
    return rows


def measure_times(codec: Codec, photo: np.ndarray, repeats: int) -> dict[str, dict[str, Spread]]:
    """Milliseconds of the slices of one photo in each arithmetic, and their ratio, as an encoder and as a decoder runs them."""
    codec = codec.at_quality(max(len(codec.lambdas) - 1, 0) / 2)
    quality, size = np.full(1, codec.quality, np.float32), photo.shape[:2]
    y = driver.run_analysis(codec.module, codec.params, photo[None], quality)
    latents = {"y": y, "z": driver.run_hyper_analysis(codec.module, codec.params, y, quality)}
    ways = {name: codec.in_arithmetic(name) for name in driver.ARITHMETICS}
    symbols = {
        name: [np.asarray(part[0]).ravel() for part in driver.code_latents(way, latents, [size], codec.quality).slices]
        for name, way in ways.items()
    }

    def encode(name: str) -> Any:
        coded = driver.code_latents(ways[name], latents, [size], codec.quality)
        return coded.slices, coded.bits

    def decode(name: str) -> Any:
        parts = iter(symbols[name])
        grid = shapes.latent_grid(*size)
        return driver.decode_slices(ways[name], lambda *_: next(parts), [codec.quality], [size], grid, name == "exact")

    found = {}
    for direction, call in (("encoder", encode), ("decoder", decode)):
        for name in ways:
            jax.block_until_ready(call(name))
        runs = [
            [1e3 * _timing.seconds(lambda name=name, call=call: call(name)) for name in ways] for _ in range(repeats)
        ]
        mine, floats = np.array(runs).T
        found[direction] = {"exact": Spread.of(mine), "float": Spread.of(floats), "ratio": Spread.of(mine / floats)}
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Prints and returns rates and times."""
    codec = jaxsem.load(options.preset, arithmetic="exact")
    photos = first_images(open_source(options.data), 1 if options.quick else options.photos) if options.data else []
    figures: dict[str, Any] = {}
    if photos:
        figures["rates"] = measure_rates(codec, photos)
        print(f"\n{codec.name}, {len(photos)} photos, bits per pixel")
        rows = [
            (
                "all" if row["quality"] < 0 else f"{row['quality']:g}",
                *(f"{row[name]:.4f}" for name in ("compressai", "float", "exact")),
                *(f"{row[name]:+.2f} %" for name in ("exact_over_float", "exact_over_compressai")),
            )
            for row in figures["rates"]
        ]
        head = ("quality", "as CompressAI", "float", "exact", "exact to float", "exact to CompressAI's way")
        _timing.print_table(head, rows)
    height, width = _timing.parse_size(options.size)
    times = measure_times(codec, fit(bundled_photos()[0], height, width), 2 if options.quick else REPEATS)
    figures["times"] = {
        direction: {name: vars(spread) for name, spread in row.items()} for direction, row in times.items()
    }
    print(f"\nslices of one photo of {width}x{height}, ms, median and quartiles")
    rows = [
        (direction, row["float"].show(), row["exact"].show(), row["ratio"].show(2)) for direction, row in times.items()
    ]
    _timing.print_table(("", "float", "exact", "exact / float"), rows)
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = _timing.parser(__doc__, "one photo, two repetitions")
    add = parser.add_argument
    add("preset", nargs="?", default=DEFAULT_PRESET, help="a preset or a folder of weights (default: %(default)s)")
    add("--data", metavar="FOLDER", help="photos for the rates; without, times only")
    add("--photos", type=_timing.positive, default=50, metavar="N", help="the first N photos (default: %(default)s)")
    add("--size", default="768x512", metavar="WxH", help="of the photo for the times (default: %(default)s)")
    options = parser.parse_args(argv)
    return _timing.run("bench_exact", options, lambda: measure(options))


if __name__ == "__main__":
    sys.exit(main())
