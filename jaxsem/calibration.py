"""Calibration of a trained codec on a few images: exact arithmetic for what decides tables and means, and tables that fit.

`calibrate` runs the slice networks in floats, notes how large each channel gets, and chooses the units of `jaxsem.nn.exact`; which
layers these are, it learns by watching the slices run. A weights file holds the grids, small integers; the quantised kernels
follow from them and the float kernels by arithmetic that is exact on every host (`exact_variables`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxsem import codec as driver
from jaxsem import shapes
from jaxsem.codec import QUALITY_STEPS, Codec
from jaxsem.codecs.hyperprior import GAUSSIAN_TABLES, SCALE_THRESHOLDS
from jaxsem.entropy.tables import Tables, gaussian_tables, quantise_counts
from jaxsem.errors import InputError, WeightsError
from jaxsem.nn import exact
from jaxsem.nn.conv import LAYERS
from jaxsem.pipeline import check_image
from jaxsem.weights.native import identity

MEAN_EXPONENT = -8  # means are multiples of 1/256: a grid of 1/16 costs the lowest rates 0.35 %
GAIN_BITS = 8  # of an exact gain's magnitude: times a z of up to 2^8 on the grid of means it is exact in float32
SIDE = 512  # pixels that are used of an image's sides
MIN_IMAGES = 2
MIN_CONTRAST = 2.0  # standard deviation of the calibration images, in grey levels
MAX_LOSS = 0.02
_FIT_PRIOR = 1000.0
_FINER = 3  # units that are tried: one that reaches to the peak, a half and a quarter of it

Grids = dict[str, Any]


def calibrate(codec: Codec, images: Sequence[np.ndarray]) -> Codec:
    """Gives a codec exact arithmetic, or makes it anew, and fits its Gaussian tables to the symbols that it sees.

    Args:
      codec: A codec with its parameters, see `jaxsem.presets.freeze`.
      images: uint8 [h, w, 3], two or more, of the kind that will be compressed; the middle of each is used, 512x512 at most.

    Returns:
      The codec with `exact` variables and fitted tables, "exact" as its arithmetic and the digest that goes with them.

    Raises:
      InputError: Too few images, or images without content.
      WeightsError: Some layer cannot be computed exactly, or the rate of these images would rise by more than 2 %.
    """
    if not codec.module.exactable:
        raise WeightsError(
            f"{codec.name} decides its tables by layers that have no exact arithmetic, such as attention: use "
            "arithmetic='float', whose files decode on the same kind of device"
        )
    levels = range(max(len(codec.lambdas), 1))
    samples = [_latents(codec, pixels, level) for pixels in _prepared(images) for level in levels]
    grids, tables = calibrate_module(codec.name, codec.module, codec.params, codec.tables, samples)
    return with_grids(replace(codec, tables=tables), grids)


def calibrate_module(
    name: str, module: Any, params: Any, tables: Tables, samples: Sequence["Sample"]
) -> tuple[Grids, Tables]:
    """Chooses the exact arithmetic of a module for `jaxsem.slices`, and fits its Gaussian tables.

    Args:
      name: What errors call it.
      module: The module; of its config's `lambdas` and its `float_networks`, both may be empty.
      params: Its parameters.
      tables: The integer tables, the Gaussian ones first.
      samples: What to try: latents of one image each, and the condition [1, ...] of `begin`.

    Returns:
      The grids, as a weights file holds them, and the tables.

    Raises:
      WeightsError: Some layer cannot be computed exactly, or the rate of these images would rise by more than 2 %.
    """
    grids, before = _choose_grids(module, params, samples)
    host = jax.device_get(params)
    check_grids(module, host, grids)
    bits, coded = _code(module, jax.device_put(exact_variables(host, grids)), samples)
    loss = bits / before - 1
    if not loss <= MAX_LOSS:
        raise WeightsError(
            f"exact arithmetic would cost {name} {100 * loss:.2f} % of rate on these {len(samples)} samples, more than "
            f"{100 * MAX_LOSS:g} %: calibrate with more images, train it with exact=True, or use arithmetic='float'"
        )
    # A factorised codec has no Gaussian table in use: its own are those of the trained densities.
    first = module.gaussian_from
    return grids, _fit_tables(tables, coded, first) if first < module.slices else tables


def with_grids(codec: Codec, grids: Grids) -> Codec:
    """The codec with the exact arithmetic of these grids, as a weights file holds them.

    Raises:
      WeightsError: The grids do not fit the model, or some are missing.
    """
    params = jax.device_get(codec.params)
    check_grids(codec.module, params, grids)
    digest = identity(asdict(codec.module.config), params, codec.tables.digest(), grids)
    return replace(codec, exact=jax.device_put(exact_variables(params, grids)), arithmetic="exact", digest=digest)


def check_grids(module: Any, params: Mapping[str, Any], grids: Grids) -> None:
    """Refuses grids that are not exactly those of the model's layers.

    Raises:
      WeightsError: Names every one that is missing, surplus or misshapen.
    """
    flat = flatten_dict(dict(grids), sep="/")
    lambdas = getattr(module.config, "lambdas", ())
    wanted: dict[str, tuple[Any, tuple[int, ...] | None]] = {"mean": (np.int8, ())}
    if module.gaussian_from < module.slices:
        wanted["thresholds"] = np.float32, (GAUSSIAN_TABLES - 1,)
    if lambdas:
        wanted["gain_z/inverse"] = (np.float32, ((len(lambdas) - 1) * QUALITY_STEPS + 1, module.config.hyper))
    networks = {name: part for name, part in params.items() if not name.startswith(module.float_networks)}
    for path, kernel in flatten_dict(networks, sep="/").items():
        if path.endswith("kernel"):
            inputs = flat.get(path.replace("kernel", "inputs"), np.zeros((1, 0)))
            shape = (inputs.shape[0], kernel.shape[2] // max(inputs.shape[0], 1))
            wanted[path.replace("kernel", "inputs")] = np.int8, shape
            wanted[path.replace("kernel", "sums")] = np.int8, (kernel.shape[3],)
            wanted[path.replace("kernel", "shift")] = np.int8, ()
    wanted |= {path: (np.int8, ()) for path in flat if path.endswith("/slope")}
    complaints = [f"{path} is missing" for path in sorted(wanted.keys() - flat.keys())]
    complaints += [f"{path} is surplus" for path in sorted(flat.keys() - wanted.keys())]
    for path in sorted(wanted.keys() & flat.keys()):
        dtype, shape = wanted[path]
        if flat[path].dtype != dtype or flat[path].shape != shape:
            complaints.append(f"{path} is {flat[path].dtype} {flat[path].shape}, not {np.dtype(dtype)} {shape}")
        elif not np.isfinite(flat[path]).all() or (dtype == np.int8 and np.abs(np.int32(flat[path])).max() > 60):
            complaints.append(f"{path} is out of range")
    if complaints:
        raise WeightsError("the grids of exact arithmetic do not fit the model: " + "; ".join(complaints))


def exact_variables(params: Mapping[str, Any], grids: Grids) -> dict[str, Any]:
    """Variables of the slice networks in exact arithmetic: parameters quantised by the grids, and the grids.

    Kernels are bfloat16 where there is an accelerator and float32 on a CPU: what is computed is the same.
    """
    operands = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    flat = flatten_dict(dict(params))
    for path, grid in _layers(grids).items():
        inputs, sums, shift = (grid[name] for name in exact.Grid._fields)
        kernel, bias = flat[*path, "kernel"], flat[*path, "bias"]
        flat[*path, "kernel"] = exact.quantise_kernel(kernel, inputs.reshape(-1), sums).astype(operands)
        flat[*path, "bias"] = exact.quantise_bias(bias, sums, shift)
    return {"params": unflatten_dict(flat), exact.COLLECTION: grids}


def training_variables(params: Mapping[str, Any], grids: Grids) -> dict[str, Any]:
    """Like `exact_variables`, traced and differentiable: for training with the quantisation in the loop.

    Biases stay as they are, and the gains of z stand still, for they are part of the grids.
    """
    flat = flatten_dict(dict(params))
    for path, grid in _layers(grids).items():
        flat[*path, "kernel"] = exact.straight_through(flat[*path, "kernel"], grid)
    return {"params": unflatten_dict(flat), exact.COLLECTION: grids}


# -- pieces --------------------------------------------------------------------------------------------------------------


def _prepared(images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The middle of each image, all of one size, uint8 [1, h, w, 3]."""
    if len(images) < MIN_IMAGES:
        raise InputError(f"calibration needs {MIN_IMAGES} images or more, not {len(images)}")
    images = [check_image(image) for image in images]
    sides = [min(SIDE, *(image.shape[axis] for image in images)) // shapes.STRIDE * shapes.STRIDE for axis in (0, 1)]
    if not min(sides):
        smallest = min(min(image.shape[:2]) for image in images)
        raise InputError(f"calibration needs images of {shapes.STRIDE} pixels a side or more, not {smallest}")
    crops = [_middle(image, *sides)[None] for image in images]
    contrast = float(np.mean([crop.std() for crop in crops]))
    if contrast < MIN_CONTRAST:
        raise InputError(
            f"calibration needs photos, but these {len(images)} images are almost constant: their standard deviation is "
            f"{contrast:.2g} grey levels, at least {MIN_CONTRAST:g} is needed"
        )
    return crops


def _middle(image: np.ndarray, height: int, width: int) -> np.ndarray:
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


Sample = tuple[
    dict[str, jax.Array], np.ndarray
]  # latents of one image, and the condition that both sides know [1, ...]


def _latents(codec: Codec, pixels: np.ndarray, level: int) -> Sample:
    quality = np.full(1, level, np.float32)
    y = driver.run_analysis(codec.module, codec.params, pixels, quality)
    latents = {"y": y, "z": driver.run_hyper_analysis(codec.module, codec.params, y, quality)}
    if codec.module.serial:
        latents["y_hat"] = driver.decoded_serially(codec, latents, level)
    return latents, quality


Coded = list[tuple[np.ndarray, np.ndarray]]  # of each slice, the tables, -1 where nothing is coded, and the symbols


def _walk(module: Any, latents: dict[str, jax.Array], condition: jax.Array) -> tuple[jax.Array, Coded]:
    """Estimated bits of one image's latents, and what is coded: all slices, as a decoder computes them.

    Where y is coded position by position, the context is that of the y_hat found in floats before.
    """
    state, bits, coded = module.begin(1, module.grid_of(latents), condition), jnp.zeros(()), []
    for i in range(module.slices):
        if module.serial and i:
            state = {**state, "y_hat": latents["y_hat"]}
        table, mean, scale = module.predict(i, state)
        opened = module.opened(i, condition)
        symbols = jnp.where(opened, jnp.round(module.values_of(i, latents) - mean), 0.0)
        values = symbols + mean
        bits -= jnp.where(opened, jnp.log2(module.likelihood_of(i, values, mean, scale)), 0.0).sum()
        state = module.place(i, state, values)
        coded.append((jnp.where(opened, table, -1), symbols.astype(jnp.int32)))
    return bits, coded


def _code(module: Any, variables: Mapping[str, Any], samples: Sequence[Sample]) -> tuple[float, list[Coded]]:
    """The bits of all samples together, and what each codes."""
    run = jax.jit(partial(module.apply, method=_walk))
    results = [jax.device_get(run(variables, *sample)) for sample in samples]
    return sum(float(bits) for bits, _ in results), [coded for _, coded in results]


def _fit_tables(tables: Tables, coded: Sequence[Coded], first: int) -> Tables:
    """The tables, with Gaussian ones made anew and moved towards the symbols that they coded, in the slices from `first` on.

    Real symbols have heavier tails than the Gaussians that training assumes. Counts of both signs are taken together, and
    `_FIT_PRIOR` symbols of the Gaussian kind are added to them, so that a table that coded few stays what it was.
    """
    table, symbols = (np.concatenate([part[k].ravel() for each in coded for part in each[first:]]) for k in (0, 1))
    order = np.argsort(table, kind="stable")
    ends = np.searchsorted(table[order], np.arange(GAUSSIAN_TABLES + 1))
    fresh = gaussian_tables(quantise=quantise_counts)
    rows = [(fresh if index < GAUSSIAN_TABLES else tables).row(index) for index in range(len(tables))]
    for index in range(GAUSSIAN_TABLES):
        row, own = rows[index], symbols[order[ends[index] : ends[index + 1]]]
        last = len(row) - 1  # the escape symbol
        places = np.int64(own) - tables.offsets[index]
        counts = np.bincount(np.where((places < 0) | (places >= last), last, places), minlength=len(row)).astype(float)
        counts[:last] = (counts[:last] + counts[:last][::-1]) / 2
        if len(own):
            rows[index] = quantise_counts(counts + _FIT_PRIOR * row / row.sum(), tables.precision)
    return Tables.from_rows(rows, tables.offsets, tables.escapes, tables.precision)


Path = tuple[str, ...]


def _observe(
    module: Any, params: Any, samples: Sequence[Sample], measure: Callable[[Path, jax.Array], jax.Array]
) -> tuple[list[dict[Path, list[np.ndarray]]], dict[Path, nn.Module], float]:
    """Watches the slices of each sample run in floats.

    Args:
      module: The codec's module.
      params: Its parameters.
      samples: What to run.
      measure: measure(path, input) of every input [b, h, w, i] of every layer.

    Returns:
      For each sample, by the path of a layer, what was measured at its calls; the layers that ran; the bits of all samples.
    """
    layers: dict[Path, nn.Module] = {}

    @jax.jit
    def run(params, latents, quality):
        found: dict[Path, list[jax.Array]] = {}

        def watch(call, args, kwargs, context):
            layer = context.module
            if context.method_name == "__call__" and isinstance(layer, (*LAYERS, exact.LeakyRelu)):
                layers[layer.path] = layer
                if isinstance(layer, LAYERS):
                    found.setdefault(layer.path, []).append(measure(layer.path, args[0]))
            return call(*args, **kwargs)

        with nn.intercept_methods(watch):
            bits, _ = module.apply({"params": params}, latents, quality, method=_walk)
        return found, bits

    results = [jax.device_get(run(params, *sample)) for sample in samples]
    return [found for found, _ in results], layers, sum(float(bits) for _, bits in results)


def _choose_grids(module: Any, params: Any, samples: Sequence[Sample]) -> tuple[Grids, float]:
    """A grid for every layer that runs, and the bits of the samples in floats."""
    found, layers, bits = _observe(module, params, samples, lambda _, x: jnp.abs(x).max(axis=(0, 1, 2)))
    peaks = {path: np.max([call for each in found for call in each[path]], axis=0) for path in found[0]}
    exponents = _input_exponents(module, params, samples, peaks)
    params = jax.device_get(params)
    flat: dict[Path, np.ndarray] = {("mean",): np.int8(MEAN_EXPONENT)}
    if module.gaussian_from < module.slices:
        flat["thresholds",] = np.asarray(SCALE_THRESHOLDS[module.config.scale_rule], np.float32)
    if getattr(module.config, "lambdas", ()):
        flat["gain_z", "inverse"] = _gains(module, params)
    for path, layer in layers.items():
        if isinstance(layer, exact.LeakyRelu):
            flat[*path, "slope"] = np.int8(round(np.log2(layer.slope)))
            continue
        weights = _at(params, path)
        grid = exact.choose_grid(weights["kernel"], weights["bias"], exponents[path], layer.taps, "/".join(path))
        flat |= {(*path, name): value for name, value in grid._asdict().items()}
    return unflatten_dict(flat), bits


def _input_exponents(
    module: Any, params: Any, samples: Sequence[Sample], peaks: Mapping[Path, np.ndarray]
) -> dict[Path, np.ndarray]:
    """Exponents of every input channel's unit: those of least squared error, relative to the energy of each sample.

    A unit that reaches to the very peak is often too coarse for the many small values of the lowest rates: it is worth
    clipping a few large ones. Relative errors let all rates count alike.
    """
    for path, peak in peaks.items():
        if not np.isfinite(peak).all():
            raise WeightsError(f"{'/'.join(path)} cannot be computed exactly: its inputs are not finite")
    widest = {path: exact.finest_exponent(peak, exact.ACTIVATION_LIMIT) for path, peak in peaks.items()}

    def errors(path: Path, x: jax.Array) -> jax.Array:
        tried = [exact.snap(x, widest[path] - finer) - x for finer in range(_FINER)]
        return jnp.stack([jnp.square(error).mean(axis=(0, 1, 2)) for error in tried]) / (jnp.square(x).mean() + 1e-9)

    found, _, _ = _observe(module, params, samples, errors)
    total = {path: np.sum([call for each in found for call in each[path]], axis=0) for path in peaks}
    return {path: widest[path] - np.where(peaks[path] > 0, total[path].argmin(axis=0), 0) for path in peaks}


def _gains(module: Any, params: Mapping[str, Any]) -> np.ndarray:
    """Gains of z at every quality that a packet can hold, rounded to 8 significant bits, [steps, channels]."""
    top = len(module.config.lambdas) - 1
    quality = np.arange(top * QUALITY_STEPS + 1, dtype=np.float32) / QUALITY_STEPS
    gains = module.apply({"params": params}, quality, method=lambda m, q: m.gain_z.at(q, inverse=True))
    fraction, exponent = np.frexp(np.asarray(gains, np.float64))
    return np.ldexp(np.rint(fraction * 2**GAIN_BITS), exponent - GAIN_BITS).astype(np.float32)


def _layers(grids: Grids) -> dict[tuple[str, ...], Grids]:
    """The grids of layers, by path."""
    paths = [path[:-1] for path in flatten_dict(dict(grids)) if path[-1] == "sums"]
    return {path: _at(grids, path) for path in paths}


def _at(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree
