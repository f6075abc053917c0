"""Bjontegaard's rate difference: how much smaller or larger the files of one codec are at the quality of another.

Source: G. Bjontegaard, "Calculation of average PSNR differences between RD-curves", ITU-T SG16/Q6 VCEG-M33, 2001.
The piecewise variant interpolates with the monotone cubics of Fritsch and Butland (SIAM J. Sci. Stat. Comput., 1984),
as the common test conditions of the video groups do since VCEG-M33's single cubic was found to swing between points.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from jaxsem.errors import InputError

Method = Literal["cubic", "pchip"]
FEWEST_POINTS = {"cubic": 4, "pchip": 2}

Antiderivative = Callable[[float], float]


def bd_rate(
    anchor_points: ArrayLike,
    test_points: ArrayLike,
    *,
    method: Method = "cubic",
    bpp_range: tuple[float, float] | None = None,
) -> float:
    """Mean difference in rate at equal distortion, in percent; -30 means files that are 30 % smaller than the anchor's.

    Each curve gives the log rate as a function of the distortion, ln R = p(D). The result is
    `100 (exp(mean over D of p_test - p_anchor) - 1)`, the mean taken over the interval of `distortion_interval`.

    Args:
        anchor_points: `[n, 2]` pairs (rate > 0, distortion) of the codec compared against, in any order.
        test_points: `[m, 2]` pairs of the codec under test. The distortion may be any measure, the same for both:
            higher is better (PSNR) or lower is better (LPIPS), since only ln R as a function of it is integrated.
        method: "cubic" fits one cubic to all points of a curve by least squares (Bjontegaard's original, exact through
            four points). "pchip" interpolates piecewise through every point; prefer it where a curve has many points
            or spans a wide range, which one cubic cannot follow.
        bpp_range: the rates (low, high) of the **anchor** to which the comparison is restricted; None for all.

    Returns:
        The rate difference in percent.

    Raises:
        InputError: if a curve has too few points (4 for "cubic", 2 for "pchip"; a point given twice counts once), has a
            rate or a distortion twice with different values beside it, holds values that are not finite or rates that
            are not positive, or if the curves have no distortion in common.

    Example:
        >>> anchor = [(0.1, 26.0), (0.2, 29.0), (0.4, 32.0), (0.8, 35.0)]
        >>> test = [(0.7 * rate, quality) for rate, quality in anchor]
        >>> round(bd_rate(anchor, test), 6)
        -30.0
    """
    low, high = distortion_interval(anchor_points, test_points, bpp_range=bpp_range)
    areas = []
    for points, name in ((anchor_points, "anchor"), (test_points, "test")):
        curve = _checked(points, name, method)
        antiderivative = _INTEGRALS[method](curve[:, 1], np.log(curve[:, 0]))
        areas.append(antiderivative(high) - antiderivative(low))
    return float(100.0 * np.expm1((areas[1] - areas[0]) / (high - low)))


def distortion_interval(
    anchor_points: ArrayLike, test_points: ArrayLike, *, bpp_range: tuple[float, float] | None = None
) -> tuple[float, float]:
    """The distortions (low, high) over which `bd_rate` takes its mean.

    They are those that both curves reach. With `bpp_range`, the anchor's part is cut to the distortions it has at
    these two rates, read off its piecewise interpolation D(ln R) whatever the method, so that every method has the same
    interval. A limit outside the anchor's rates changes nothing: curves are never extrapolated.

    Args:
        anchor_points: `[n, 2]` pairs (rate, distortion).
        test_points: `[m, 2]` pairs (rate, distortion).
        bpp_range: rates (low, high) of the anchor, or None.

    Returns:
        The two ends, low < high.

    Raises:
        InputError: for points as in `bd_rate`, for an empty range, or if nothing is left.
    """
    anchor, test = _checked(anchor_points, "anchor", "pchip"), _checked(test_points, "test", "pchip")
    ends = anchor[[0, -1], 1]
    if bpp_range is not None:
        ends = _distortion_at(anchor, bpp_range)
    low, high = max(ends.min(), test[:, 1].min()), min(ends.max(), test[:, 1].max())
    if low >= high:
        within = "" if bpp_range is None else f" at {bpp_range[0]:g} to {bpp_range[1]:g} bpp"
        raise InputError(
            f"The curves share no quality: the anchor{within} spans {ends.min():.6g} to {ends.max():.6g}, "
            f"the other {test[:, 1].min():.6g} to {test[:, 1].max():.6g}; measure more qualities."
        )
    return float(low), float(high)


def pchip(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> tuple[Callable, Antiderivative]:
    """Piecewise cubic Hermite interpolation that never overshoots, and its integral.

    Slopes are the weighted harmonic means of Fritsch and Butland inside, and one-sided three-point estimates, limited
    to keep the shape, at the two ends: the rules of MATLAB's and SciPy's `pchip`.

    Args:
        x: strictly increasing positions, at least two.
        y: values there.

    Returns:
        `(value, antiderivative)`, both functions of arrays within `[x[0], x[-1]]`; the antiderivative is 0 at `x[0]`.
    """
    step = np.diff(x)
    secant = np.diff(y) / step
    slope = _pchip_slopes(step, secant)
    # On piece i, with t = position - x[i]: y[i] + slope[i] t + quadratic[i] t^2 + cubic[i] t^3.
    quadratic = (3 * secant - 2 * slope[:-1] - slope[1:]) / step
    cubic = (slope[:-1] + slope[1:] - 2 * secant) / step**2
    area = step * (y[:-1] + step * (slope[:-1] / 2 + step * (quadratic / 3 + step * cubic / 4)))
    area_before = np.concatenate([[0.0], np.cumsum(area)])

    def piece(position):
        i = np.clip(np.searchsorted(x, position, side="right") - 1, 0, len(step) - 1)
        return i, position - x[i]

    def value(position):
        i, t = piece(position)
        return y[i] + t * (slope[i] + t * (quadratic[i] + t * cubic[i]))

    def antiderivative(position):
        i, t = piece(position)
        return area_before[i] + t * (y[i] + t * (slope[i] / 2 + t * (quadratic[i] / 3 + t * cubic[i] / 4)))

    return value, antiderivative


def _pchip_slopes(step, secant):
    if len(step) == 1:
        return np.repeat(secant, 2)
    left, right = 2 * step[1:] + step[:-1], step[1:] + 2 * step[:-1]
    same_sign = secant[:-1] * secant[1:] > 0
    before, after = np.where(same_sign, secant[:-1], 1.0), np.where(same_sign, secant[1:], 1.0)
    inside = np.where(same_sign, (left + right) / (left / before + right / after), 0.0)
    first = _end_slope(step[0], step[1], secant[0], secant[1])
    last = _end_slope(step[-1], step[-2], secant[-1], secant[-2])
    return np.concatenate([[first], inside, [last]])


def _end_slope(step, next_step, secant, next_secant):
    slope = ((2 * step + next_step) * secant - step * next_secant) / (step + next_step)
    if slope * secant <= 0:
        return 0.0
    if secant * next_secant < 0 and abs(slope) > 3 * abs(secant):
        return 3 * secant
    return slope


def _cubic_integral(distortion, log_rate) -> Antiderivative:
    # Centred, because a fit in powers of 30 dB loses digits that a fit in powers of a few dB keeps.
    centre = distortion.mean()
    polynomial = np.polyint(np.polyfit(distortion - centre, log_rate, 3))
    return lambda position: np.polyval(polynomial, position - centre)


def _pchip_integral(distortion, log_rate) -> Antiderivative:
    return pchip(distortion, log_rate)[1]


_INTEGRALS = {"cubic": _cubic_integral, "pchip": _pchip_integral}


def _distortion_at(anchor, bpp_range):
    """The anchor's distortions at two rates, clipped to the rates it has."""
    low, high = bpp_range
    if not 0 < low < high:
        raise InputError(f"A rate range is (low, high) with 0 < low < high, but this is ({low:g}, {high:g}).")
    by_rate = anchor[np.argsort(anchor[:, 0])]
    log_rate = np.log(by_rate[:, 0])
    value, _ = pchip(log_rate, by_rate[:, 1])
    return value(np.clip(np.log([low, high]), log_rate[0], log_rate[-1]))


def _checked(points: ArrayLike, name: str, method: Method) -> Float[np.ndarray, "n 2"]:
    """The points as float64, sorted by distortion."""
    if method not in FEWEST_POINTS:
        raise InputError(f"The method is 'cubic' or 'pchip', not {method!r}.")
    points = np.asarray(points, np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise InputError(
            f"The {name} curve must be a list of (rate, distortion) pairs, but its shape is {points.shape}."
        )
    if not np.isfinite(points).all() or (points[:, 0] <= 0).any():
        raise InputError(f"The {name} curve needs positive rates and finite distortions, but holds {points.tolist()}.")
    points = np.unique(points, axis=0)  # neighbouring qualities of some codecs give the same file
    if len(points) < FEWEST_POINTS[method]:
        raise InputError(
            f"The {name} curve has {len(points)} points, but method {method!r} needs at least {FEWEST_POINTS[method]}; "
            f"measure more qualities{' or take pchip' if method == 'cubic' else ''}."
        )
    for column, what in ((0, "rate"), (1, "distortion")):
        if len(np.unique(points[:, column])) < len(points):
            raise InputError(
                f"The {name} curve has one {what} twice, with different values beside it: {points.tolist()}."
            )
    return points[np.argsort(points[:, 1])]
