"""Does a file decode to the same symbols however it is decoded? Exact arithmetic must, float arithmetic does not.

    python tools/check_exact.py [PRESET|FOLDER] [--data FOLDER] [--photos N] [--size 192x128] [--json FILE]
    python tools/check_exact.py elic --random [--photos N]         a preset's full size with random weights
    python tools/check_exact.py [PRESET] --write DIR               files, and what they must decode to ...
    python tools/check_exact.py --read DIR                         ... checked in another process, on another device

The symbols of every photo at every quality are decoded once alone by the slice driver, and then in each other way: in batches of 32
with photos of other qualities, in another order, compiled as one program, with matrix products in place of convolutions, with
operands in bfloat16, with hidden channels permuted, divided among devices, and without compilation. A photo differs if any table
index or any bit of the decoded latent does. The same is tried in float arithmetic, to show that the check can see. The exit
status is 1 if exact arithmetic differs anywhere.

`--read` decodes `.jsem` files written elsewhere. Try it with other XLA flags, threads, versions of JAX and devices.
"""

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":  # eight devices to divide a batch among, also where there is one CPU
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import _timing
import jax
import jax.numpy as jnp
import numpy as np
from bench_codec import fit
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxsem
from jaxsem import codec as driver
from jaxsem import pipeline, presets, shapes
from jaxsem.cli import DEFAULT_PRESET
from jaxsem.codec import Codec
from jaxsem.codecs import build_module, init_params, system_of
from jaxsem.container import unpack
from jaxsem.data.sources import first_images, open_source
from jaxsem.errors import InputError
from jaxsem.files import make_folder, read_bytes, write_file
from jaxsem.nn import exact

BATCH = 32
UNCOMPILED = 2  # photos that are decoded without compilation, which is slow
EXPECTED, WEIGHTS = "expected.json", presets.WEIGHTS_NAME


@dataclass(frozen=True)
class Sample:
    """The symbols of one photo at one quality, each [1, h, w, c], and how the driver decoded them alone."""

    quality: float
    symbols: tuple[np.ndarray, ...]
    tables: tuple[np.ndarray, ...] = ()
    y_hat: np.ndarray | None = None


@dataclass
class Count:
    """How many photos and table indices differ from those decoded alone."""

    photos: int = 0
    photos_differing: int = 0
    tables: int = 0
    tables_differing: int = 0
    latent_difference: float = field(default=0.0)


Decoded = tuple[list[np.ndarray], np.ndarray]  # tables of each slice and y_hat, of a batch
Way = Callable[[Codec, Sequence[Sample]], Decoded]


# -- ways to decode ------------------------------------------------------------------------------------------------------


def by_driver(codec: Codec, samples: Sequence[Sample]) -> Decoded:
    """The slice driver on a batch, as `jaxsem.decompress` runs it."""
    tables: list[list[np.ndarray]] = [[] for _ in samples]

    def pull(k: int, table: np.ndarray) -> np.ndarray:
        symbols = samples[k].symbols[len(tables[k])]
        tables[k].append(table.reshape(symbols.shape))
        return symbols.reshape(-1)

    grid = samples[0].symbols[0].shape[1:3]
    sizes = [(grid[0] * shapes.STRIDE, grid[1] * shapes.STRIDE)] * len(samples)
    qualities = [sample.quality for sample in samples]
    y_hat = driver.decode_slices(codec, pull, qualities, sizes, grid, codec.arithmetic == "exact")
    return [np.concatenate(parts) for parts in zip(*tables, strict=True)], np.asarray(y_hat)


def _program(module: Any, variables: Any, symbols: Sequence[jax.Array], quality: jax.Array) -> tuple:
    state, tables = module.begin(quality.shape[0], symbols[0].shape[1:3], quality), []
    for i in range(module.slices):
        table, mean, _ = module.predict(i, state)
        tables.append(table)
        state = module.place(i, state, symbols[i].astype(jnp.float32) + mean)
    return tables, state["y_hat"]


def one_program(codec: Codec, samples: Sequence[Sample], devices: int = 1) -> Decoded:
    """All slices compiled as one program, the batch divided among devices."""
    symbols = [np.concatenate(parts) for parts in zip(*(sample.symbols for sample in samples), strict=True)]
    quality = np.array([sample.quality for sample in samples], np.float32)
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    divided = NamedSharding(mesh, PartitionSpec("data"))
    symbols, quality = jax.device_put((symbols, quality), divided)
    variables = jax.device_put(
        driver.variables_of(codec, codec.arithmetic == "exact"), NamedSharding(mesh, PartitionSpec())
    )

    def apply(variables, symbols, quality):  # made anew, so that nothing compiled before serves
        return codec.module.apply(variables, variables, symbols, quality, method=_program)

    return jax.device_get(jax.jit(apply)(variables, symbols, quality))


def in_other_order(codec: Codec, samples: Sequence[Sample]) -> Decoded:
    """The slice driver on the batch backwards."""
    tables, y_hat = by_driver(codec, samples[::-1])
    return [table[::-1] for table in tables], y_hat[::-1]


def divided(codec: Codec, samples: Sequence[Sample]) -> Decoded:
    """One program on as many devices as there are and the batch allows."""
    return one_program(
        codec, samples, next(n for n in (8, 4, 2, 1) if n <= jax.device_count() and len(samples) % n == 0)
    )


def with_products(codec: Codec, samples: Sequence[Sample]) -> Decoded:
    """Matrix products in place of convolutions, as GPUs compute them."""
    with mock.patch.object(exact, "_sum_of_products", exact.matrix_products):
        return one_program(codec, samples)


def with_bfloat16(codec: Codec, samples: Sequence[Sample]) -> Decoded:
    """Operands in bfloat16."""
    flat = flatten_dict(dict(_variables(codec)))
    cast = {path: leaf.astype(jnp.bfloat16) if path[-1] == "kernel" else leaf for path, leaf in flat.items()}
    return one_program(_with_variables(codec, unflatten_dict(cast)), samples)


def with_permuted_channels(codec: Codec, samples: Sequence[Sample]) -> Decoded:
    """Hidden channels of every network in another order, which only changes the order of summation."""
    return one_program(_with_variables(codec, permute_hidden(_variables(codec))), samples)


def uncompiled(codec: Codec, samples: Sequence[Sample]) -> Decoded:
    """Operation by operation."""
    with jax.disable_jit():
        return by_driver(codec, samples)


WAYS: Mapping[str, Way] = {
    "in batches of 32": by_driver,
    "in batches, backwards": in_other_order,
    "as one program": one_program,
    "as matrix products": with_products,
    "channels permuted": with_permuted_channels,
    "divided among devices": divided,
    "operands in bfloat16": with_bfloat16,
    "without compilation": uncompiled,
}


def _variables(codec: Codec) -> Mapping[str, Any]:
    return driver.variables_of(codec, codec.arithmetic == "exact")


def _with_variables(codec: Codec, variables: Mapping[str, Any]) -> Codec:
    return (
        replace(codec, exact=variables) if codec.arithmetic == "exact" else replace(codec, params=variables["params"])
    )


def permute_hidden(variables: Mapping[str, Any], seed: int = 0) -> Mapping[str, Any]:
    """The same networks with the hidden channels of every stack of layers in another order.

    Channels stay in their group where a layer's sums are split into groups: another grouping would round differently.
    """
    rng, flat = np.random.default_rng(seed), jax.device_get(flatten_dict(dict(variables)))
    layers = sorted(path[1:-1] for path in flat if path[0] == "params" and path[-1] == "kernel")
    for before, after in pairwise(layers):
        stacked = before[:-1] == after[:-1] and all(re.fullmatch(r"layers_\d+", path[-1]) for path in (before, after))
        width = flat["params", *before, "kernel"].shape[3]
        if not stacked or flat["params", *after, "kernel"].shape[2] != width:
            continue
        groups = flat.get((exact.COLLECTION, *after, "inputs"), np.zeros((1, width))).shape[0]
        order = np.concatenate([k * width // groups + rng.permutation(width // groups) for k in range(groups)])
        flat["params", *before, "kernel"] = flat["params", *before, "kernel"][..., order]
        flat["params", *before, "bias"] = flat["params", *before, "bias"][order]
        flat["params", *after, "kernel"] = flat["params", *after, "kernel"][:, :, order]
        if (exact.COLLECTION, *before, "sums") in flat:
            flat[exact.COLLECTION, *before, "sums"] = flat[exact.COLLECTION, *before, "sums"][order]
            inputs = flat[exact.COLLECTION, *after, "inputs"]
            flat[exact.COLLECTION, *after, "inputs"] = inputs.reshape(-1)[order].reshape(inputs.shape)
    return unflatten_dict(flat)


# -- the check -----------------------------------------------------------------------------------------------------------


def take_samples(codec: Codec, photos: Sequence[np.ndarray]) -> list[Sample]:
    """Every photo at every whole quality, decoded alone."""
    samples = []
    for photo in photos:
        for level in range(max(len(codec.lambdas), 1)):
            quality = np.full(1, level, np.float32)
            y = driver.run_analysis(codec.module, codec.params, photo[None], quality)
            latents = {"y": y, "z": driver.run_hyper_analysis(codec.module, codec.params, y, quality)}
            coded = driver.code_latents(codec, latents, [photo.shape[:2]], float(level))
            sample = Sample(float(level), tuple(np.asarray(symbols) for symbols, _, _ in coded.slices))
            tables, y_hat = by_driver(codec, [sample])
            samples.append(replace(sample, tables=tuple(tables), y_hat=y_hat))
    return samples


def compare(codec: Codec, samples: Sequence[Sample], way: Way) -> Count:
    """Decodes the samples in another way and counts what differs from the first."""
    count, few = Count(), way is uncompiled
    for group in _groups(samples[: UNCOMPILED if few else None], 1 if few else BATCH):
        tables, y_hat = way(codec, group)
        for k, sample in enumerate(group):
            wrong = sum(int((mine[k] != other[0]).sum()) for mine, other in zip(tables, sample.tables, strict=True))
            same = y_hat[k].tobytes() == sample.y_hat[0].tobytes()
            count.photos += 1
            count.photos_differing += bool(wrong) or not same
            count.tables += sum(table.size for table in sample.tables)
            count.tables_differing += wrong
            count.latent_difference = max(count.latent_difference, float(np.abs(y_hat[k] - sample.y_hat[0]).max()))
    return count


def _groups(samples: Sequence[Sample], size: int) -> Iterator[list[Sample]]:
    for start in range(0, len(samples), size):
        yield list(samples[start : start + size])


def random_codec(name: str, photos: Sequence[np.ndarray], seed: int = 0) -> Codec:
    """A preset's model with random weights of a scale that gives lively latents, calibrated."""
    if name not in presets.PRESETS:
        raise InputError(f"--random needs a preset ({', '.join(presets.PRESETS)}), not {name!r}")
    preset = presets.PRESETS[name]
    module = build_module(preset.system, presets.asdict(preset.config))
    params = lively(module, init_params(module, seed), photos[0])
    return jaxsem.calibrate(presets.freeze(f"{name}-random", module, params), photos)


def lively(module: Any, params: Any, photo: np.ndarray) -> Any:
    """Fresh random parameters at a scale at which symbols and tables take many values."""
    # The variance of inputs is kept through ReLUs (He et al., 2015); then y and z are made some units large.
    flat = {
        path: leaf * np.float32(6**0.5) if path[-1] == "kernel" else leaf
        for path, leaf in flatten_dict(jax.device_get(params)).items()
    }
    quality = np.zeros(1, np.float32)
    y = driver.run_analysis(module, unflatten_dict(flat), fit(photo, 128, 128)[None], quality)
    z = driver.run_hyper_analysis(module, unflatten_dict(flat), 6 * y / y.std(), quality)
    for network, gain in (("g_a", 6 / y.std()), ("h_a", 3 / z.std())):
        last = max((path for path in flat if path[0] == network), key=lambda path: int(path[1].split("_")[1]))[:2]
        for path in flat:
            if path[:2] == last:
                flat[path] = flat[path] * np.float32(gain)
    return unflatten_dict(flat)


def check(codec: Codec, photos: Sequence[np.ndarray]) -> dict[str, Any]:
    """Prints and returns what differs, by arithmetic and way."""
    found: dict[str, Any] = {}
    for arithmetic in driver.ARITHMETICS:
        samples = take_samples(codec.in_arithmetic(arithmetic), photos)
        ways = {
            name: way
            for name, way in WAYS.items()
            if arithmetic == "exact" or way not in (with_products, with_bfloat16)
        }
        found[arithmetic] = {
            name: vars(compare(codec.in_arithmetic(arithmetic), samples, way)) for name, way in ways.items()
        }
        print(f"\n{arithmetic} arithmetic, {len(photos)} photos at {max(len(codec.lambdas), 1)} qualities")
        rows = [
            (
                name,
                f"{row['photos_differing']} of {row['photos']}",
                f"{row['tables_differing']} of {row['tables']:,}",
                f"{row['latent_difference']:.3g}",
            )
            for name, row in found[arithmetic].items()
        ]
        _timing.print_table(("decoded", "files that differ", "tables that differ", "largest difference"), rows)
    return found


# -- between processes ---------------------------------------------------------------------------------------------------


def write_files(codec: Codec, photos: Sequence[np.ndarray], folder: Path, force: bool, preset: str | None) -> None:
    """Files of all photos at every quality, the digests of what they decode to, and weights that are not a preset's."""
    make_folder(folder)
    if preset is None:
        presets.save(codec, folder, system_of(codec.module), {}, force)
    expected = {}
    for level in range(max(len(codec.lambdas), 1)):
        for k, data in enumerate(jaxsem.compress(codec.at_quality(level), list(photos))):
            name = f"{k:03d}-q{level}.jsem"
            write_file(folder / name, data, force)
            expected[name] = decoded_digest(codec, data)
    record = {"preset": preset, "latents": expected}
    write_file(folder / EXPECTED, json.dumps(record, indent=1).encode(), force)
    print(f"{len(expected)} files in {folder}")


def decoded_digest(codec: Codec, data: bytes) -> str:
    """SHA-256 of the latent that a file decodes to, in hexadecimal."""
    file = unpack(data)
    pipeline.check_weights(codec, file)
    [item] = file.items
    size = (item.height, item.width)
    y_hat = driver.decode(codec, [item.sections[pipeline.PACKET]], [size], shapes.latent_grid(*size))
    return hashlib.sha256(np.asarray(y_hat, "<f4").tobytes()).hexdigest()


def read_files(folder: Path) -> dict[str, Any]:
    """Decodes the files of a folder and compares."""
    record = json.loads(read_bytes(folder / EXPECTED))
    codec = jaxsem.load(record["preset"] or str(folder))
    wrong = [name for name, sha in record["latents"].items() if decoded_digest(codec, read_bytes(folder / name)) != sha]
    print(f"{len(wrong)} of {len(record['latents'])} files differ" + (f": {', '.join(wrong)}" if wrong else ""))
    return {"files": len(record["latents"]), "files_differing": len(wrong)}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Does what the options say."""
    if options.read:
        return read_files(options.read)
    height, width = _timing.parse_size(options.size)
    if height % shapes.STRIDE or width % shapes.STRIDE:
        raise InputError(f"the size must be of multiples of {shapes.STRIDE}, not {options.size}")
    source = open_source(options.data or str(presets.BUNDLED_PHOTOS))
    photos = [fit(image, height, width) for image in first_images(source, 2 if options.quick else options.photos)]
    codec = random_codec(options.preset, presets.bundled_photos()) if options.random else jaxsem.load(options.preset)
    if options.write:
        shipped = options.preset if options.preset in presets.PRESETS and not options.random else None
        write_files(codec.in_arithmetic("exact"), photos, options.write, options.force, shipped)
        return {}
    return check(codec, photos)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the check; the exit status is 1 if exact arithmetic differs anywhere."""
    parser = _timing.parser(__doc__, "two photos")
    add = parser.add_argument
    add("preset", nargs="?", default=DEFAULT_PRESET, help="a preset or a folder of weights (default: %(default)s)")
    add("--data", metavar="FOLDER", help="photos (default: the bundled ones)")
    add("--photos", type=_timing.positive, default=200, metavar="N", help="the first N photos (default: %(default)s)")
    add(
        "--size",
        default="192x128",
        metavar="WxH",
        help="what is cut out of each, multiples of 64 (default: %(default)s)",
    )
    add("--random", action="store_true", help="random weights at the preset's size")
    add("--write", type=Path, metavar="DIR", help="write files and what they decode to")
    add("--read", type=Path, metavar="DIR", help="decode the files of DIR and compare")
    options = parser.parse_args(argv)
    figures: dict[str, Any] = {}
    status = _timing.run("check_exact", options, lambda: figures.update(measure(options)) or figures)
    differing = figures.get("files_differing", 0)
    differing += sum(row["photos_differing"] for row in figures.get("exact", {}).values())
    return status or int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
