"""Tables of the factorised prior: one learned density per channel, without side information.

Each channel's cumulative distribution is ``sigmoid(u(z))`` with a small monotone network ``u`` of widths 1, 3, 3, 3,
3, 1: layer i does ``u <- softplus(H_i) u + b_i`` and all but the last add ``tanh(a_i) tanh(u)``. This module
evaluates it in float64 NumPy, once, to make integer tables; training happens elsewhere.

References:
    Ballé et al., "Variational image compression with a scale hyperprior", ICLR 2018, appendix 6.1.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from jaxsem.entropy.tables import Tables, quantise_pmf
from jaxsem.errors import InputError

MAX_WIDTH = 1 << 14


def cumulative_logits(matrices: Sequence, biases: Sequence, factors: Sequence, z: np.ndarray) -> np.ndarray:
    """The network u of every channel at its own points.

    Args:
        matrices: H_i, [channels, out, in] each, before the softplus.
        biases: b_i, [channels, out, 1] each.
        factors: a_i, [channels, out, 1] each, one fewer than there are layers, before the tanh.
        z: float [channels, points].

    Returns:
        float64 [channels, points]; ``sigmoid`` of it is the probability of values below z.

    Raises:
        InputError: if the numbers of layers or the shapes do not fit together.
    """
    z = np.asarray(z, np.float64)
    if not len(matrices) == len(biases) == len(factors) + 1:
        raise InputError(
            f"{len(matrices)} matrices need as many biases and one factor fewer, not {len(biases)} and {len(factors)}."
        )
    u = z[:, None, :]
    for i, (matrix, bias) in enumerate(zip(matrices, biases)):
        matrix = np.asarray(matrix, np.float64)
        if matrix.ndim != 3 or matrix.shape[0] != len(z) or matrix.shape[2] != u.shape[1]:
            raise InputError(f"Layer {i} of the prior needs [{len(z)}, out, {u.shape[1]}], not {list(matrix.shape)}.")
        column = (len(z), matrix.shape[1], 1)
        u = np.logaddexp(0, matrix) @ u + np.asarray(bias, np.float64).reshape(column)
        if i < len(factors):
            u = u + np.tanh(np.asarray(factors[i], np.float64).reshape(column)) * np.tanh(u)
    return u[:, 0, :]


def quantiles_by_bisection(
    matrices: Sequence, biases: Sequence, factors: Sequence, tail_mass: float = 1e-9
) -> np.ndarray:
    """Where each channel's distribution reaches ``tail_mass / 2``, one half and ``1 - tail_mass / 2``.

    Takes the place of the auxiliary loss that learns these three numbers: u is increasing, so they can be found
    exactly.

    Returns:
        float64 [channels, 3]: lower quantile, median, upper quantile.

    Raises:
        InputError: if a channel does not reach them within ±2^20 (the density was not trained, or has diverged).
    """
    target = np.array([-1.0, 0.0, 1.0]) * math.log(2 / tail_mass - 1)
    channels = len(np.asarray(matrices[0]))
    low, high = np.full((channels, 3), -1.0), np.full((channels, 3), 1.0)
    for _ in range(20):
        low = np.where(cumulative_logits(matrices, biases, factors, low) > target, 2 * low, low)
        high = np.where(cumulative_logits(matrices, biases, factors, high) < target, 2 * high, high)
    inside = cumulative_logits(matrices, biases, factors, low) <= target
    inside &= cumulative_logits(matrices, biases, factors, high) >= target
    if not inside.all():
        raise InputError(
            f"Channel {np.argmin(inside.all(1))} of the prior has no quantiles within ±2^20; train it first."
        )
    for _ in range(80):
        middle = (low + high) / 2
        above = cumulative_logits(matrices, biases, factors, middle) > target
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return (low + high) / 2


def factorised_tables(
    matrices: Sequence,
    biases: Sequence,
    factors: Sequence,
    quantiles: np.ndarray | None = None,
    precision: int = 16,
    tail_mass: float = 1e-9,
    quantise: Callable[[np.ndarray, int], np.ndarray] = quantise_pmf,
) -> Tables:
    """One table per channel for the integers ``round(z - median)``.

    Args:
        matrices: H_i, see `cumulative_logits`.
        biases: b_i.
        factors: a_i.
        quantiles: [channels, 3] (or [channels, 1, 3], as CompressAI stores them) lower quantile, median, upper
            quantile; None computes them by bisection. The caller must use the same medians.
        precision: bits.
        tail_mass: for the bisection.
        quantise: `quantise_pmf` as in CompressAI, or `quantise_counts`, which comes closer to the density: a wide
            channel loses 0.05 % of the rate with it, 0.1 to 0.3 % without.


    Returns:
        Tables whose table c starts at ``-lo`` with ``lo = max(0, ⌈median - lower⌉)`` and ends at ``hi``, likewise, and
        whose escape symbol takes the tails. As in CompressAI, whose tables these equal, the upper tail is measured at
        the end of the widest channel.

    Raises:
        InputError: if shapes do not fit, or a channel would need more than 2^14 values.
    """
    if quantiles is None:
        quantiles = quantiles_by_bisection(matrices, biases, factors, tail_mass)
    quantiles = np.asarray(quantiles, np.float64).reshape(-1, 3)
    lower, median, upper = quantiles.T
    if not np.isfinite(quantiles).all() or max((upper - median).max(), (median - lower).max()) > MAX_WIDTH / 2:
        raise InputError(f"The quantiles of the prior span over {MAX_WIDTH} values or are not finite; train it first.")
    lo = np.maximum(0, np.ceil(median - lower)).astype(np.int64)
    hi = np.maximum(0, np.ceil(upper - median)).astype(np.int64)
    grid = np.arange((lo + hi).max() + 1)
    samples = median[:, None] - lo[:, None] + grid
    below = cumulative_logits(matrices, biases, factors, samples - 0.5)
    above = cumulative_logits(matrices, biases, factors, samples + 0.5)
    # The difference of two sigmoids is exact only on the side where both are small: mirror the other side.
    sign = -np.sign(below + above)
    mass = np.abs(_sigmoid(sign * above) - _sigmoid(sign * below))
    tails = _sigmoid(below[:, 0]) + _sigmoid(-above[:, -1])
    rows = [quantise(np.append(mass[c, : lo[c] + hi[c] + 1], tails[c]), precision) for c in range(len(median))]
    return Tables.from_rows(rows, -lo, True, precision)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))
