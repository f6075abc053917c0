"""How many images a second become CLIP features, and packets: stage by stage, the arithmetic, and all stages overlapped.

    python tools/bench_clip.py [CLIP] [--preset NAME | --pqvae] [--batch N ...] [--dtype float32] [--peak TFLOPS] [--json FILE]

CLIP is the name of a published model, with random weights, for speed does not depend on them; "mini"; or weights as in
`jaxsem features --clip`. `--preset` brings its CLIP and what follows it; `--pqvae` lets a PQVAE-shared of the released sizes
and random weights follow, with rANS. The stages of one batch, one after the other, each until its result is there:

    decode            JPEG bytes to pixels                                  threads, as many as the pipeline has
    crop              the centre square, resized to the model's size        the same threads
    transfer          of all crops as one array to the device
    CLIP              pixels to unit features                               device
    quantise          features to indices                                   device
    entropy coding    fetched from the device, indices to packets           this thread
    write             packets to a file                                     this thread

Where nothing follows CLIP, "fetch" brings the features from the device; a preset that quantises and codes in one has "quantise
and code" in this thread.

The pipeline is `ClipModel.encode_stream` and what follows it, which overlaps the stages. Its rate is taken between batches in the
middle of a run, when all stages are busy, and compared with its slowest part alone (threads, transfer, device or this thread;
the stages of a part add up), which should never have to wait. On a CPU all parts share the cores: there, the rate of the
stages in turn is what to expect.

TFLOP/s are those of the stage CLIP; a multiplication and an addition are two. They are counted by formula, matrix products alone,
and beside it by XLA, in a program with the layers written one after another, as XLA counts the body of a loop once. What the
device can do is the rate of one large matrix product, of the same type in the same run; `--peak` adds the data sheet's.
"""

import argparse
import dataclasses
import itertools
import math
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, BinaryIO

import _timing
import jax
import jax.numpy as jnp
import numpy as np
from _timing import Spread

from jaxsem.backbones.clip import Clip, param_shapes
from jaxsem.backbones.clip_config import CONFIGS, ClipConfig, VisionConfig
from jaxsem.backbones.clip_inputs import normalize, square_crop
from jaxsem.cache import enable_compilation_cache
from jaxsem.data.images import list_images, read_image
from jaxsem.entropy import encode_lanes, tables_from_counts
from jaxsem.errors import InputError
from jaxsem.files import read_bytes
from jaxsem.nn.ops import unit
from jaxsem.presets import BUNDLED_PHOTOS, load
from jaxsem.systems.clip_model import READERS, ClipModel, encode_crops, load_clip_model
from jaxsem.systems.pqvae import Pqvae, PqvaeConfig
from jaxsem.systems.pqvae import param_shapes as pqvae_shapes

MINI = ClipConfig(VisionConfig(width=64, layers=4, heads=4, hidden=256, patch=8, image_size=64), None, 64)
SMALL_PQVAE = {"channels": 16, "hidden": (32, 16), "residual": 8, "residual_layers": 1}
DTYPES = ("float32", "bfloat16")
DEVICE = "device"
THREAD = "this thread"
PLACES = {"decode": "threads", "crop": "threads", "transfer": "transfer", "CLIP": DEVICE, "quantise": DEVICE}
_EDGE = 3  # batches at either end of a run in which not all stages are busy


def as_bytes(rows: np.ndarray) -> list[bytes]:
    """Each row as it lies in memory."""
    return [row.tobytes() for row in rows]


@dataclass(frozen=True)
class Coder:
    """What follows CLIP.

    Attributes:
        name: For people.
        quantise: What the device makes of features [b, width]; None leaves them as they are.
        pack: The packets of what the device gave.
        stage: What `pack` is called.
    """

    name: str = "nothing"
    quantise: Callable[[jax.Array], jax.Array] | None = None
    pack: Callable[[np.ndarray], list[bytes]] = as_bytes
    stage: str = "fetch"


@dataclass(frozen=True)
class Row:
    """One batch size: seconds of a batch by stage, and what follows from them."""

    batch: int
    first_seconds: float  # of the repetition that compiles, or reads compiled programs
    bytes_per_image: float
    seconds: dict[str, Spread]
    images_per_second: dict[str, Spread]
    pipeline: Spread  # images a second
    slowest: str
    slowest_rate: float
    rate_in_turn: float
    teraflops: Spread
    share_of_measured: float
    share_of_peak: float | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; a mistake gives one sentence and the exit status 2."""
    parser = _timing.parser(__doc__, "the mini CLIP, one small batch and two repetitions, to see that it works")
    add = parser.add_argument
    add("clip", nargs="?", metavar="CLIP", help=f"mini, {', '.join(CONFIGS)}, or weights (default: ViT-B/32)")
    after = parser.add_mutually_exclusive_group()
    after.add_argument("--preset", metavar="NAME", help="take CLIP, quantiser and coder of this preset")
    after.add_argument("--pqvae", action="store_true", help="quantise and code the features")
    add(
        "--batch", type=_timing.positive, nargs="+", metavar="N", help="images a batch (default: 8 32; else 64 256 512)"
    )
    add("--dtype", choices=DTYPES, help="of the arithmetic (default: float32 on a CPU, else bfloat16)")
    add("--data", metavar="FOLDER", default=str(BUNDLED_PHOTOS), help="photos to take instead of the bundled ones")
    add("--peak", type=float, metavar="TFLOPS", help="what the device's data sheet states for this type of numbers")
    add("--repeats", type=_timing.positive, metavar="K", help="repetitions that count (default: 7; 2 with --quick)")
    options = parser.parse_args(arguments)
    return _timing.run("bench_clip", options, lambda: _measure(options))


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.peak is not None and not (math.isfinite(options.peak) and options.peak > 0):
        raise InputError(f"--peak is a rate in TFLOP/s above 0, not {options.peak:g}")
    on_cpu = jax.default_backend() == "cpu"
    repeats = options.repeats or (2 if options.quick else 7)
    batches = options.batch or ([4] if options.quick else [8, 32] if on_cpu else [64, 256, 512])
    dtype = jnp.dtype(options.dtype or ("float32" if on_cpu else "bfloat16"))
    enable_compilation_cache()
    photos = [read_bytes(path) for path in list_images(options.data)]
    model, coder = open_model(options, dtype)
    dtype, config = jnp.dtype(model.module.dtype), model.module.config
    print(
        f"CLIP: {model.name}, {model.image_size}x{model.image_size}, {dtype.name}; then {coder.name}; {READERS} threads"
    )
    flops = {"formula": formula_flops(config), "xla": xla_flops(model)}
    peak = matmul_rate(dtype, 256 if options.quick else 2048 if on_cpu else 8192, repeats)
    print(
        f"an image takes {flops['formula'] / 1e9:.2f} GFLOP by formula, {flops['xla'] / 1e9:.2f} as XLA counts; one large matrix "
        f"product in {dtype.name} runs at {peak.show(3)} TFLOP/s"
    )
    rows = []
    for batch in batches:
        jpegs = list(itertools.islice(itertools.cycle(photos), batch))
        rows.append(measure(model, coder, jpegs, repeats, flops["formula"], peak.median, options.peak))
        print_row(rows[-1], options.peak)
    return {
        "clip": model.name,
        "coder": coder.name,
        "image_size": model.image_size,
        "dtype": dtype.name,
        "threads": READERS,
        "photos": len(photos),
        "repeats": repeats,
        "gflop_per_image": {name: count / 1e9 for name, count in flops.items()},
        "matmul_teraflops": asdict(peak),
        "peak_teraflops": options.peak,
        "batches": [asdict(row) for row in rows],
    }


# -- what is measured ------------------------------------------------------------------------------------------------------


def open_model(options: argparse.Namespace, dtype: Any) -> tuple[ClipModel, Coder]:
    """CLIP and what follows it, as the options say."""
    if options.preset is not None:
        if options.clip is not None:
            raise InputError(f"--preset brings its own CLIP: leave out {options.clip}")
        return preset_parts(load(options.preset), options.preset)
    name = options.clip or ("mini" if options.quick else "ViT-B/32")
    config = MINI if name == "mini" else CONFIGS.get(name)
    if config is None:
        model = load_clip_model(name, dtype=dtype, texts=False)
    else:
        module = Clip(dataclasses.replace(config, text=None), dtype, dtype)
        model = ClipModel(f"{name}, random weights", module, random_params(param_shapes(module)), None)
    small = SMALL_PQVAE if options.quick else {}
    return model, random_pqvae(PqvaeConfig(width=model.width, **small)) if options.pqvae else Coder()


def preset_parts(codec: Any, name: str) -> tuple[ClipModel, Coder]:
    """CLIP and coder of a preset that has `clip`, and `encode(features) -> packets` or levels with both halves of it."""
    model = getattr(codec, "clip", None)
    if not isinstance(model, ClipModel):
        raise InputError(f"{name} has no CLIP: name a preset that has, such as pqvae-mini")
    if hasattr(codec, "level"):
        from jaxsem.systems.feature_codec import run_indices

        quantise = partial(run_indices, codec.level.module, codec.level.params)
        return model, Coder(f"the coder of {name}", quantise, codec.pack, "entropy coding")
    return model, Coder(f"the coder of {name}", None, codec.encode, "quantise and code")


def random_params(shapes: Any) -> Any:
    """Parameters on the device that keep every number finite."""
    rng = np.random.default_rng(0)
    make = lambda leaf: (0.02 * rng.standard_normal(leaf.shape, np.float32)).astype(leaf.dtype)  # noqa: E731
    return jax.device_put(jax.tree.map(make, shapes))


def random_pqvae(config: PqvaeConfig) -> Coder:
    """A PQVAE-shared of random weights, and rANS with tables of equal chances."""
    module = Pqvae(config)
    params = random_params(pqvae_shapes(module))
    run = jax.jit(lambda features: module.apply({"params": params}, features, method="indices_of"))
    tables, places = tables_from_counts([np.ones(config.codebook)]), np.zeros(config.codewords, np.int32)
    name = f"PQVAE, {config.codewords} indices of {config.codebook}, random weights"
    return Coder(name, run, lambda indices: encode_lanes(indices, places, tables), "entropy coding")


def measure(
    model: ClipModel,
    coder: Coder,
    jpegs: list[bytes],
    repeats: int,
    flops: float,
    measured: float,
    peak: float | None = None,
) -> Row:
    """Times the stages of one batch in turn, and the pipeline.

    Args:
        model: CLIP.
        coder: What follows it.
        jpegs: The photos of a batch.
        repeats: Repetitions that count, after one that compiles.
        flops: Of an image.
        measured: TFLOP/s of a large matrix product.
        peak: TFLOP/s of the data sheet.

    Raises:
        SystemExit: The pipeline gives other bytes than the stages.
    """
    batch, on_cpu = len(jpegs), jax.default_backend() == "cpu"
    steps = 1 if on_cpu else 10
    rounds = 2 * _EDGE + (3 if on_cpu else 17)
    times: dict[str, list[float]] = defaultdict(list)
    rates = []
    with tempfile.TemporaryFile() as file, ThreadPoolExecutor(READERS) as pool:
        first = _timing.seconds(lambda: _check(model, coder, jpegs, file, pool))
        for _ in range(repeats):
            packets, stages = run_stages(model, coder, jpegs, file, pool, steps)
            for name, seconds in stages.items():
                times[name].append(seconds)
            stream = itertools.chain.from_iterable(itertools.repeat(jpegs, rounds))
            middle = [end for end, _ in run_pipeline(model, coder, stream, batch, file)][_EDGE:-_EDGE]
            rates.append(batch * (len(middle) - 1) / (middle[-1] - middle[0]))
    seconds = {name: Spread.of(found) for name, found in times.items()}
    parts: dict[str, float] = defaultdict(float)
    for name, spread in seconds.items():
        parts[PLACES.get(name, THREAD)] += spread.median
    slowest = max(parts, key=parts.__getitem__)
    teraflops = Spread.of(flops * batch / 1e12 / np.array(times["CLIP"]))
    return Row(
        batch=batch,
        first_seconds=first,
        bytes_per_image=sum(map(len, packets)) / batch,
        seconds=seconds,
        images_per_second={name: Spread.of(batch / np.array(found)) for name, found in times.items()},
        pipeline=Spread.of(rates),
        slowest=slowest,
        slowest_rate=batch / parts[slowest],
        rate_in_turn=batch / sum(parts.values()),
        teraflops=teraflops,
        share_of_measured=teraflops.median / measured,
        share_of_peak=None if peak is None else teraflops.median / peak,
    )


def run_stages(
    model: ClipModel, coder: Coder, jpegs: list[bytes], file: BinaryIO, pool: ThreadPoolExecutor, steps: int
) -> tuple[list[bytes], dict[str, float]]:
    """One batch through all stages, one after the other; `steps` times through those of the device, without waiting.

    Returns:
        The packets, and the seconds of each stage.
    """
    times: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any], steps: int = 1) -> Any:
        begin = time.perf_counter()
        for _ in range(steps):
            result = call()
        jax.block_until_ready(result)
        times[name] = (time.perf_counter() - begin) / steps
        return result

    side = model.image_size
    pixels = timed("decode", lambda: list(pool.map(read_image, jpegs)))
    crops = timed("crop", lambda: list(pool.map(lambda image: square_crop(image, side), pixels)))
    placed = timed("transfer", lambda: jax.device_put(np.stack(crops)))
    found = timed("CLIP", lambda: encode_crops(model.module, model.params, placed), steps)
    if coder.quantise is not None:
        features = found
        found = timed("quantise", lambda: coder.quantise(features), steps)
    given = found
    packets = timed(coder.stage, lambda: coder.pack(np.asarray(given)))
    timed("write", lambda: _write(file, packets))
    return packets, times


def run_pipeline(
    model: ClipModel, coder: Coder, jpegs: Iterator[bytes], batch: int, file: BinaryIO
) -> Iterator[tuple[float, list[bytes]]]:
    """All stages overlapped: the time at which each batch was written, and its packets."""
    for found in model.encode_stream(jpegs, batch, coder.quantise):
        packets = coder.pack(found)
        _write(file, packets)
        yield time.perf_counter(), packets


def _write(file: BinaryIO, packets: list[bytes]) -> None:
    file.seek(0)
    file.write(b"".join(packets))
    file.flush()


def _check(model: ClipModel, coder: Coder, jpegs: list[bytes], file: BinaryIO, pool: ThreadPoolExecutor) -> None:
    [(_, packets)] = run_pipeline(model, coder, iter(jpegs), len(jpegs), file)
    if run_stages(model, coder, jpegs, file, pool, 1)[0] != packets:
        raise SystemExit("The stages do not give the packets that the pipeline gives.")


# -- arithmetic ------------------------------------------------------------------------------------------------------------


def formula_flops(config: ClipConfig) -> float:
    """Operations of the matrix products and convolutions that one image takes."""
    c = config.vision
    height, width = c.height_width
    products, channels = 0, 3
    for filters in c.stem:
        height, width = height // 2, width // 2
        products += height * width * 9 * channels * filters
        channels = filters
    products += height * width * channels * c.width  # patches: every pixel goes once into each channel
    layer = 4 * c.tokens * c.width**2 + 2 * c.tokens**2 * c.width + 2 * c.tokens * c.width * c.hidden
    products += c.layers * layer + c.width * (config.projection or 0)
    return 2.0 * products


def xla_flops(model: ClipModel) -> float:
    """Operations that one image takes, as XLA counts them in the program with its layers written one after another."""

    def in_turn(clip: Clip, crops: jax.Array) -> jax.Array:
        tokens = clip.vision.embed(normalize(crops.astype(jnp.float32) / 255.0))
        for layer in range(clip.config.vision.layers):
            tokens = clip.vision.run_layers(tokens, layer, layer + 1)
        return unit(clip.image_feature(tokens))

    run = jax.jit(lambda params, crops: model.module.apply({"params": params}, crops, method=in_turn))
    shape = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.uint8)
    return float(run.lower(model.params, shape).cost_analysis()["flops"])


def matmul_rate(dtype: Any, size: int, repeats: int) -> Spread:
    """TFLOP/s of the product of two square matrices in one type of numbers."""
    a, b = (jax.random.normal(jax.random.key(seed), (size, size), dtype) for seed in (0, 1))
    multiply, steps = jax.jit(jnp.matmul), 1 if jax.default_backend() == "cpu" else 20

    def some() -> jax.Array:
        for _ in range(steps):
            product = multiply(a, b)
        return product

    some().block_until_ready()
    times = np.array([_timing.seconds(some) for _ in range(repeats)])
    return Spread.of(2.0 * size**3 * steps / 1e12 / times)


# -- the report ------------------------------------------------------------------------------------------------------------


def print_row(row: Row, peak: float | None) -> None:
    """Print what was found for one batch size."""
    print(
        f"\nbatch {row.batch}, {row.bytes_per_image:.1f} bytes an image; after {row.first_seconds:.1f} s for the first: median "
        "[quartiles]"
    )
    lines = [
        (
            name,
            Spread(*(1e3 * x for x in dataclasses.astuple(spread))).show(2),
            row.images_per_second[name].show(1),
            PLACES.get(name, THREAD),
        )
        for name, spread in row.seconds.items()
    ]
    _timing.print_table(("stage", "ms a batch", "images/s", "where"), lines)
    share = row.pipeline.median / row.slowest_rate
    print(
        f"pipeline {row.pipeline.show(1)} images/s: {share:.0%} of its slowest part, {row.slowest} ({row.slowest_rate:,.1f}); "
        f"stages in turn {row.rate_in_turn:,.1f}"
    )
    stated = "" if peak is None else f", {row.share_of_peak:.1%} of the data sheet's {peak:g}"
    print(
        f"CLIP {row.teraflops.show(3)} TFLOP/s: {row.share_of_measured:.1%} of a large matrix product's{stated}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
