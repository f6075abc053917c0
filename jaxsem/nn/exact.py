"""Exact arithmetic: networks that give the same bits on every device, in any order of summation.

A float network that decides which table codes a symbol must not depend on rounding, and the order in which a device sums
products does. So the layers that decide tables and means compute on grids. Activations are integers of 8 bits and sign times
a power of two, kernels integers of 7 bits and sign times a power of two, and the sum of all their magnitudes stays below
2^24 of its own unit. Such sums are exact in float32 whatever the order of summation, and their operands are exact in
bfloat16, so that tensor cores compute them at full speed. Every unit is a power of two, kept as its exponent: to change units
is exact as well, and nothing rounds but `snap`, by one correctly rounded operation.

A layer finds its grid in the variable collection "exact" under its own path (`Grid`, as a dictionary); without one it is
an ordinary float layer. Sums that could exceed 2^24 are split over input channels and added as int32.

Reference: Balle, Johnston and Minnen, Integer networks for data compression with latent-variable models (ICLR 2019), which
keeps integers of other widths throughout; powers of two as units make float hardware do here.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsem.errors import WeightsError
from jaxsem.nn import ops

COLLECTION = "exact"
ACTIVATION_LIMIT = 255  # with its sign still exact in bfloat16, whose integers reach to 256
KERNEL_LIMIT = 127
BIAS_LIMIT = 1 << 22  # in units of the sums
SUM_LIMIT = 1 << 24  # the integers that float32 holds exactly
EXPONENT_LIMIT = 40  # of units; far from the ends of float32
# So many powers of two finer than the coarsest input of a layer another may be: finer ones coarsen the kernel.
EXPONENT_SPREAD = 4


class Grid(NamedTuple):
    """The grid of one layer, int8.

    Attributes:
      inputs: [chunks, channels / chunks], exponents of the units of the input channels; the sum over each chunk of them is
        exact.
      sums: [features], exponents of the units of the sums.
      shift: [], bits that are rounded off a sum over several chunks; 0 for one.
    """

    inputs: np.ndarray
    sums: np.ndarray
    shift: np.ndarray


def pow2(exponent: jax.Array) -> jax.Array:
    """2^exponent as float32 for integers in [-126, 127], put together from bits: no device's `exp2` is trusted."""
    return lax.bitcast_convert_type((jnp.asarray(exponent, jnp.int32) + 127) << 23, jnp.float32)


@jax.custom_vjp
def snap(x: jax.Array, exponent: jax.Array, limit: jax.Array | int = ACTIVATION_LIMIT) -> jax.Array:
    """Rounds to whole multiples of 2^exponent, half to even, at most `limit` of them in magnitude.

    The gradient is that of the identity inside the limit and zero outside.

    Args:
      x: float32, any shape.
      exponent: Integers, broadcasting against x.
      limit: Largest magnitude, in units.
    """
    return jnp.clip(jnp.round(x * pow2(-exponent)), -limit, limit) * pow2(exponent)


def _snap_forward(x, exponent, limit=ACTIVATION_LIMIT):
    return snap(x, exponent, limit), jnp.abs(x) <= (limit + 0.5) * pow2(exponent)


def _snap_backward(inside, gradient):
    return jnp.where(inside, gradient, 0.0), None, None


snap.defvjp(_snap_forward, _snap_backward)


def grid_of(layer: nn.Module) -> dict[str, jax.Array] | None:
    """The fields of a layer's `Grid`, or None where the layer computes in floats."""
    return layer.variables[COLLECTION] if layer.has_variable(COLLECTION, "sums") else None


def convolve(
    x: jax.Array, kernel: jax.Array, grid: dict[str, jax.Array], stride: int, padding: ops.Padding
) -> jax.Array:
    """Convolves exactly; the input is snapped to its grid first.

    Args:
      x: float32 [b, h, w, i].
      kernel: [k, k, i, o] on its grid, in float32 or bfloat16: the type of the operands.
      grid: Fields of the layer's `Grid`; sub-pixel layers have several output channels a feature.
      stride: Step in both directions.
      padding: Zeros on each side, as `ops.conv2d` takes them.

    Returns:
      float32 [b, p, q, o], the same on every device.
    """
    inputs = grid["inputs"]
    sums = jnp.tile(grid["sums"].astype(jnp.int32), kernel.shape[-1] // grid["sums"].shape[0])
    x = snap(x, inputs.reshape(-1)).astype(kernel.dtype)
    chunks = inputs.shape[0]
    parts = zip(jnp.split(x, chunks, axis=-1), jnp.split(kernel, chunks, axis=2), strict=True)
    results = [_sum_of_products(part, taps, stride, padding) for part, taps in parts]
    if chunks == 1:
        return results[0]
    total = sum((part * pow2(-sums)).astype(jnp.int32) for part in results)
    shift = grid["shift"].astype(jnp.int32)
    return ((total + ((1 << shift) >> 1)) >> shift).astype(jnp.float32) * pow2(sums + shift)


def _sum_of_products(x: jax.Array, kernel: jax.Array, stride: int, padding: ops.Padding) -> jax.Array:
    """A convolution by an algorithm that only adds products, float32."""

    def direct(x, kernel):
        return ops.conv2d(x, kernel, stride, padding, jnp.float32)

    def products(x, kernel):
        return matrix_products(x, kernel, stride, padding)

    if kernel.shape[0] == 1 and stride == 1:
        return direct(x, kernel)
    # GPU libraries may choose a Winograd or FFT convolution, which is not exact: there it is spelt as matrix products.
    return lax.platform_dependent(x, kernel, cuda=products, rocm=products, default=direct)


def matrix_products(x: jax.Array, kernel: jax.Array, stride: int, padding: ops.Padding) -> jax.Array:
    """The convolution [b, h, w, i] with [k, k, i, o] as one matrix product for each kernel row, float32."""
    size, _, _, features = kernel.shape
    low, high = ops.both_sides(padding, size)
    padded = jnp.pad(x, ((0, 0), (low, high), (low, high), (0, 0)))
    height, width = ((n - size) // stride + 1 for n in padded.shape[1:3])
    columns = [padded[:, :, j : j + (width - 1) * stride + 1 : stride] for j in range(size)]
    columns = jnp.concatenate(columns, axis=-1)
    rows = kernel.reshape(size, -1, features)
    return sum(
        jnp.einsum(
            "bhwi,io->bhwo",
            columns[:, j : j + (height - 1) * stride + 1 : stride],
            rows[j],
            preferred_element_type=jnp.float32,
        )
        for j in range(size)
    )


class LeakyRelu(nn.Module):
    """max(x, slope x) for 0 < slope < 1; on a grid the slope is a power of two."""

    slope: float = 0.01

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps any shape to the same shape."""
        exact = self.has_variable(COLLECTION, "slope")
        slope = pow2(self.get_variable(COLLECTION, "slope")) if exact else self.slope
        return jnp.where(x >= 0, x, slope * x)


# -- building a grid: NumPy on the host, exact there too ------------------------------------------------------------------


def choose_grid(
    kernel: np.ndarray, bias: np.ndarray, inputs: np.ndarray, taps: Callable[[jax.Array], jax.Array], name: str
) -> Grid:
    """The finest grid of a layer, with a proof that no sum of the layer can exceed what is exact.

    A layer whose sums could reach 2^24 is split into the smallest number of equal groups of input channels that cannot.

    Args:
      kernel: [k, k, i, o].
      bias: [o].
      inputs: Wanted exponents of the units of the input channels, int32 [i]; those far below the coarsest are raised.
      taps: Gives the kernel as it is convolved, [d, d, i, o'] with o' a multiple of o.
      name: What the error calls the layer.

    Raises:
      WeightsError: Not even groups of one channel are exact, the whole reaches 2^30, or something is not finite.
    """
    if not all(np.isfinite(array).all() for array in (kernel, bias)):
        raise WeightsError(f"{name} cannot be computed exactly: its parameters are not finite")
    inputs = np.maximum(inputs, inputs.max() - EXPONENT_SPREAD)
    sums = finest_exponent(np.abs(np.ldexp(np.float64(kernel), inputs[:, None])).max(axis=(0, 1, 2)), KERNEL_LIMIT)
    # A dead feature has no kernel to set its unit: then its bias does.
    sums = np.maximum(sums, finest_exponent(np.abs(bias), BIAS_LIMIT))
    whole = np.asarray(taps(jnp.asarray(quantise_kernel(kernel, inputs, sums))), np.float64)
    whole = np.ldexp(whole, inputs[:, None] - np.tile(sums, whole.shape[3] // len(sums)))
    reach = ACTIVATION_LIMIT * np.abs(whole).sum(axis=(0, 1))  # of each input channel in each output, [i, o']
    offset = float(np.abs(np.ldexp(np.float64(bias), -sums)).max(initial=0))
    total = float(reach.sum(axis=0).max())
    chunks, shift = _split(reach, offset)
    if not chunks or total + offset >= 1 << 30:
        raise WeightsError(
            f"{name} cannot be computed exactly: its sums reach {total:.3g} and its bias {offset:.3g} units"
        )
    return Grid(inputs.reshape(chunks, -1).astype(np.int8), sums.astype(np.int8), np.int8(shift))


def finest_exponent(peak: np.ndarray, limit: int) -> np.ndarray:
    """The smallest e with peak <= limit 2^e, int32; for a peak of zero the smallest exponent there is."""
    fraction, exponent = np.frexp(np.asarray(peak, np.float64) / limit)
    exponent = np.where(fraction == 0.5, exponent - 1, exponent)
    return np.where(fraction == 0, -EXPONENT_LIMIT, np.clip(exponent, -EXPONENT_LIMIT, EXPONENT_LIMIT)).astype(np.int32)


def _split(reach: np.ndarray, offset: float) -> tuple[int, int]:
    """Into how many groups of input channels the sums must be split, 0 if none will do, and how many bits they then lose."""
    total = float(reach.sum(axis=0).max())
    if total + offset + 1 < SUM_LIMIT:
        return 1, 0
    shift = int(finest_exponent(np.float64(total + offset) * 1.001, SUM_LIMIT))
    for chunks in range(2, len(reach) + 1):
        if len(reach) % chunks == 0 and reach.reshape(chunks, -1, reach.shape[1]).sum(axis=1).max() < SUM_LIMIT:
            return chunks, shift
    return 0, shift


def quantise_kernel(kernel: np.ndarray, inputs: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Rounds a kernel [k, k, i, o] to at most 127 times 2^(sums[o] - inputs[i]), float32 [k, k, i, o]."""
    units = np.int32(sums)[None, :] - np.int32(inputs)[:, None]
    whole = np.clip(np.rint(np.ldexp(np.float64(kernel), -units)), -KERNEL_LIMIT, KERNEL_LIMIT)
    return np.ldexp(whole, units).astype(np.float32)


def quantise_bias(bias: np.ndarray, sums: np.ndarray, shift: int) -> np.ndarray:
    """Rounds a bias [o] to whole multiples of the units of the sums, float32 [o]."""
    units = np.int32(sums) + np.int32(shift)
    return np.ldexp(np.rint(np.ldexp(np.float64(bias), -units)), units).astype(np.float32)


def straight_through(kernel: jax.Array, grid: Mapping[str, jax.Array]) -> jax.Array:
    """A kernel [k, k, i, o] as `quantise_kernel` rounds it, traced, with the gradient of the identity: for training."""
    units = grid["sums"][None, :].astype(jnp.int32) - grid["inputs"].reshape(-1)[:, None]
    return snap(kernel, units, KERNEL_LIMIT)
