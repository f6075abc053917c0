"""How long a codec takes to compress and decompress, stage by stage; from a cold start; and how much memory.

    python tools/bench_codec.py [PRESET|FOLDER] [--size 768x512] [--batch N ...] [--cold] [--memory] [--json FILE]

Warm: the whole is `jaxsem.compress` and `jaxsem.decompress` on one batch in memory, which overlap device and host. The
stages are the same pieces run one after the other, each until its arrays are there, so they may add up to more than the
whole. Decoding alternates between slice networks and entropy coder; the coder's clock runs in its calls alone. Every
repetition runs all of it in turn, after one that compiles and is not counted, in which the stages must give the bytes
and pixels of the whole. `--cold` and `--memory` measure the `jaxsem` command in fresh processes, with a compilation cache
for each command that is empty at first; memory is the most that such a process held at a time, the compiler included.

The photos are those that come with jaxsem, or those of `--data`, cut to the size and mirrored outwards where too small.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import _timing
import jax
import numpy as np
from _timing import Spread

import jaxsem
from jaxsem import codec as driver
from jaxsem import pipeline, shapes
from jaxsem.cli import DEFAULT_PRESET
from jaxsem.codec import Codec
from jaxsem.container import Item, pack, unpack
from jaxsem.data.images import write_image
from jaxsem.data.sources import open_source
from jaxsem.entropy import Decoder
from jaxsem.errors import JaxsemError
from jaxsem.presets import BUNDLED_PHOTOS

WHOLE = "whole"
COMPRESS = ("analysis networks", "slice networks", "entropy coding", "container")
DECOMPRESS = ("container", "entropy coding", "slice networks", "synthesis network")
MEMORY_SIZE = (3000, 4000)  # 12 megapixels
# A process inherits the peak of the one that starts it. This one, which stays small, stands in between.
_LAUNCHER = """
import resource, subprocess, sys, time
begin = time.perf_counter()
status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""
_IMPORTS = {
    "import jaxsem": "import jaxsem",
    "import jaxsem; jaxsem.load": "import jaxsem; jaxsem.load",  # names load their modules, and JAX, when first used
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; a mistake gives one sentence and the exit status 2."""
    parser = _timing.parser(__doc__, "a small photo and two repetitions, to see that it works")
    add = parser.add_argument
    add("preset", nargs="?", default=DEFAULT_PRESET, help="a preset, or a folder or file of weights (%(default)s)")
    add("--weights", metavar="FILE", help="weights for a preset that comes without")
    add("--quality", type=float, metavar="Q", help="the middle of the preset's range by default")
    add("--size", metavar="WxH", help="of the photos (default: 768x512; 128x96 with --quick)")
    add(
        "--batch",
        type=_timing.positive,
        nargs="+",
        metavar="N",
        help="images a device batch (default: as the pipeline)",
    )
    add("--repeats", type=_timing.positive, metavar="K", help="repetitions that count (default: 11; 2 with --quick)")
    add("--data", metavar="FOLDER", default=str(BUNDLED_PHOTOS), help="photos to take instead of the bundled ones")
    add("--cold", action="store_true", help="also time fresh processes, and the import")
    add("--memory", action="store_true", help="also measure the peak memory for a photo of 12 megapixels")
    options = parser.parse_args(arguments)
    return _timing.run("bench_codec", options, lambda: _measure(options))


def _measure(options: argparse.Namespace) -> dict:
    size = _timing.parse_size(options.size or ("128x96" if options.quick else "768x512"))
    repeats = options.repeats or (2 if options.quick else 11)
    codec = jaxsem.load(options.preset, options.quality, options.weights)
    weights = "" if options.weights is None else f" with {options.weights}"
    print(f"codec: {options.preset}{weights}, {codec.digest[:4].hex()}, quality {codec.quality:g}")
    photos = Photos(options.data)
    figures = {"preset": options.preset, "quality": codec.quality, "size": size, "repeats": repeats, "warm": []}
    jaxsem.enable_compilation_cache()
    for batch in options.batch or [pipeline.default_batch()]:
        result = measure_warm(codec, photos.take(batch, *size), repeats)
        print_warm(result, size)
        figures["warm"].append(asdict(result))
    command = ["--preset", options.preset, "--quiet", "--force"]
    command += ["--weights", options.weights] if options.weights else []
    quality = ["--quality", str(codec.quality)]
    if options.cold:
        [photo] = photos.take(1, *size)
        figures["cold"] = measure_cold(photo, command, quality, 1 if options.quick else 3)
    if options.memory:
        height, width = size if options.quick else MEMORY_SIZE
        [photo] = photos.take(1, height, width)
        figures["memory"] = measure_memory(photo, command, quality)
    return figures


class Photos:
    """Photos of any size, made from those of a folder."""

    def __init__(self, folder: str):
        self._source = open_source(folder)

    def take(self, count: int, height: int, width: int) -> list[np.ndarray]:
        """The first `count` photos, from the start again if there are fewer, uint8 [height, width, 3]."""
        return [fit(self._source[i % len(self._source)]["image"], height, width) for i in range(count)]


def fit(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The upper left part of an image, mirrored outwards where it is too small: its texture stays that of a photo."""
    missing = [(0, max(want - have, 0)) for want, have in zip((height, width), image.shape)]
    return np.pad(image, [*missing, (0, 0)], mode="symmetric")[:height, :width]


# -- warm ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Warm:
    """Seconds of the stages of one batch, by direction and stage, and what the files weigh."""

    batch: int
    first_seconds: float  # of the repetition that compiles, or reads compiled programs
    bits_per_pixel: float
    compress: dict[str, Spread]
    decompress: dict[str, Spread]


@dataclass
class Clock:
    """Adds up the seconds of each stage within one repetition."""

    stages: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts what happens inside towards a stage; the caller waits for the device there."""
        begin = time.perf_counter()
        yield
        self.stages[name] += time.perf_counter() - begin


def measure_warm(codec: Codec, images: list[np.ndarray], repeats: int) -> Warm:
    """Times the whole and its stages in turn, on one batch of images of one size."""
    first = _timing.seconds(lambda: _check_stages(codec, images))
    rows: dict[str, list[dict[str, float]]] = {"compress": [], "decompress": []}
    batch = len(images)
    for _ in range(repeats):
        files: list[bytes] = []
        whole = _timing.seconds(lambda: files.extend(pipeline.compress(codec, images, batch)))  # noqa: B023
        _, clock = compress_stages(codec, images)
        rows["compress"].append({WHOLE: whole, **clock.stages})
        whole = _timing.seconds(lambda: pipeline.decompress(codec, files, batch))  # noqa: B023
        _, clock = decompress_stages(codec, files)
        rows["decompress"].append({WHOLE: whole, **clock.stages})
    spreads = {
        direction: {stage: Spread.of([row[stage] for row in found]) for stage in found[0]}
        for direction, found in rows.items()
    }
    pixels = sum(image.shape[0] * image.shape[1] for image in images)
    return Warm(batch, first, 8 * sum(map(len, files)) / pixels, **spreads)


def _check_stages(codec: Codec, images: list[np.ndarray]) -> None:
    files, again = compress_stages(codec, images)[0], None
    if files != pipeline.compress(codec, images, len(images)):
        raise SystemExit("The stages of compression do not give the bytes that jaxsem.compress gives.")
    again = decompress_stages(codec, files)[0]
    for one, other in zip(again, pipeline.decompress(codec, files, len(images)), strict=True):
        if not np.array_equal(one, other):
            raise SystemExit("The stages of decompression do not give the images that jaxsem.decompress gives.")


def compress_stages(codec: Codec, images: list[np.ndarray]) -> tuple[list[bytes], Clock]:
    """What `jaxsem.compress` does with one batch, one stage after the other."""
    clock = Clock()
    with clock.stage("analysis networks"):
        analysed = list(pipeline.analyse_batch(codec, list(enumerate(images)), len(images)))
        jax.block_until_ready([latents for _, latents in analysed])
    with clock.stage("slice networks"):
        sizes = [[image.shape[:2] for _, image in part] for part, _ in analysed]
        coded = [driver.code_latents(codec, y, sides, codec.quality) for sides, (_, y) in zip(sizes, analysed)]
        jax.block_until_ready([(each.slices, each.bits) for each in coded])
    with clock.stage("entropy coding"):
        packets = [packet for each, sides in zip(coded, sizes) for packet in driver.encode(codec, each, len(sides))]
    with clock.stage("container"):
        items = [Item(*image.shape[:2], {pipeline.PACKET: packet}) for image, packet in zip(images, packets)]
        files = [pack(item, codec.digest) for item in items]
    return files, clock


def decompress_stages(codec: Codec, files: list[bytes]) -> tuple[list[np.ndarray], Clock]:
    """What `jaxsem.decompress` does with one batch, one stage after the other."""
    clock = Clock()
    with clock.stage("container"):
        found = [unpack(data) for data in files]
        for file in found:
            pipeline.check_weights(codec, file)
        items = [item for file in found for item in file.items]
    parts = [items] if codec.arithmetic == "exact" else [[item] for item in items]
    latents = jax.numpy.concatenate([_decode(codec, part, clock) for part in parts])
    with clock.stage("synthesis network"):
        images = [image for _, image in pipeline.synthesise_batch(codec, list(enumerate(items)), latents)]
    return images, clock


def _decode(codec: Codec, items: list[Item], clock: Clock) -> jax.Array:
    """`jaxsem.codec.decode`, with the entropy decoder's time told from that of the networks between its calls."""
    packets, sizes = [item.sections[pipeline.PACKET] for item in items], [(item.height, item.width) for item in items]
    coder = Clock()

    def pull(k: int, tables: np.ndarray) -> np.ndarray:
        with coder.stage("calls"):
            return decoders[k].pull(tables)

    begin = time.perf_counter()
    with coder.stage("calls"):
        decoders = [Decoder(packet[1:], codec.tables) for packet in packets]
    heads, grid = [driver.read_head(codec, packet) for packet in packets], shapes.latent_grid(*sizes[0])
    y_hat = driver.decode_slices(codec, pull, [quality for quality, _ in heads], sizes, grid, heads[0][1])
    jax.block_until_ready(y_hat)
    clock.stages["entropy coding"] += coder.stages["calls"]
    clock.stages["slice networks"] += time.perf_counter() - begin - coder.stages["calls"]
    return y_hat


def print_warm(result: Warm, size: tuple[int, int]) -> None:
    """Print the table of one batch size."""
    height, width = size
    print(
        f"\nbatch {result.batch} of {width}x{height}, {result.bits_per_pixel:.3f} bits per pixel; warm, after "
        f"{result.first_seconds:.1f} s for the first repetition: ms a batch, median [quartiles]"
    )
    rows = []
    for direction, stages in (("compress", COMPRESS), ("decompress", DECOMPRESS)):
        found = getattr(result, direction)
        total = sum(found[stage].median for stage in stages)
        rate = result.batch / found[WHOLE].median
        rows.append((direction, _ms(found[WHOLE]), "", f"{rate:.2f}", f"{rate * height * width / 1e6:.2f}"))
        rows += [(f"  {stage}", _ms(found[stage]), f"{found[stage].median / total:.1%}", "", "") for stage in stages]
    _timing.print_table(("", "ms", "of the stages", "images/s", "megapixels/s"), rows)


def _ms(spread: Spread) -> str:
    return Spread(1e3 * spread.median, 1e3 * spread.low, 1e3 * spread.high).show(2)


# -- fresh processes -------------------------------------------------------------------------------------------------------


def measure_cold(photo: np.ndarray, command: list[str], quality: list[str], repeats: int) -> dict:
    """Times `jaxsem compress` and `decompress` of one photo, and the import, in fresh processes.

    Args:
        photo: uint8 [height, width, 3].
        command: Options of both commands.
        quality: Options of `compress` alone.
        repeats: Processes of each kind, after one that fills the compilation cache.

    Returns:
        Seconds by what was timed.
    """
    figures = {}
    for name, code in _IMPORTS.items():
        figures[name] = Spread.of([run_fresh(["-c", code], {})[0] for _ in range(repeats)])
    with tempfile.TemporaryDirectory() as folder:
        commands = _commands(Path(folder), photo, command, quality)
        for name, arguments in commands.items():
            cache = _cache(Path(folder, name))
            first = run_fresh(arguments, cache)[0]
            figures[f"{name}, empty compilation cache"] = Spread(first, first, first)
            figures[f"{name}, filled cache"] = Spread.of([run_fresh(arguments, cache)[0] for _ in range(repeats)])
    height, width = photo.shape[:2]
    print(f"\nfresh processes, one photo of {width}x{height}, {repeats} of each: seconds, median [quartiles]")
    _timing.print_table(("", "s"), [(name, spread.show(2)) for name, spread in figures.items()])
    return {name: asdict(spread) for name, spread in figures.items()}


def measure_memory(photo: np.ndarray, command: list[str], quality: list[str]) -> dict:
    """Peak memory in MB (10^6 bytes) of `jaxsem compress` and `decompress` of one photo; arguments as `measure_cold`."""
    with tempfile.TemporaryDirectory() as folder:
        commands = _commands(Path(folder), photo, command, quality)
        found = {name: run_fresh(arguments, _cache(Path(folder, name))) for name, arguments in commands.items()}
    height, width = photo.shape[:2]
    print(f"\npeak memory, one photo of {width}x{height}, {height * width / 1e6:.1f} megapixels")
    _timing.print_table(("", "MB", "s"), [(name, f"{mb:,.0f}", f"{s:.1f}") for name, (s, mb) in found.items()])
    return {name: {"megabytes": mb, "seconds": s} for name, (s, mb) in found.items()}


def _commands(folder: Path, photo: np.ndarray, options: list[str], quality: list[str]) -> dict[str, list[str]]:
    """Python's arguments for the commands by name, for a photo that is written as JPEG."""
    source, file, back = (str(folder / name) for name in ("photo.jpg", "photo.jsem", "back.png"))
    write_image(source, photo)
    return {
        "jaxsem compress": ["-m", "jaxsem", "compress", source, "-o", file, *options, *quality],
        "jaxsem decompress": ["-m", "jaxsem", "decompress", file, "-o", back, *options],
    }


def _cache(folder: Path) -> dict[str, str]:
    """The environment of a process that keeps its compiled programs in a folder of its own."""
    return {"JAX_COMPILATION_CACHE_DIR": str(folder)}


def run_fresh(arguments: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Runs Python in a fresh process.

    Returns:
        Its seconds, and the most megabytes (10^6 bytes) that it held in memory.

    Raises:
        JaxsemError: It failed; the message is its last line.
    """
    command = [sys.executable, "-c", _LAUNCHER, sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise JaxsemError(f"`python {' '.join(arguments)}` failed: {last}")
    seconds, peak = done.stdout.split()
    unit = 1 if sys.platform == "darwin" else 1024
    return float(seconds), float(peak) * unit / 1e6


if __name__ == "__main__":
    sys.exit(main())
