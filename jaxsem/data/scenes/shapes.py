"""The eight shapes as signed distances, from which smooth edges, rims, halos and masks all follow.

A signed distance is negative inside, positive outside, and its slope at the edge is 1, so that `0.5 - distance` in
pixels, cut to 0..1, is the share of a pixel that the shape covers. All shapes lie within the unit circle and fill
about the same part of it. Only + - * / sqrt, minimum and maximum are used, which IEEE arithmetic defines to the last
bit: pictures are the same bytes on every machine.
"""

import math

import numpy as np
from jaxtyping import Float32

Plane = Float32[np.ndarray, "h w"]


def direction(degrees: float) -> tuple[np.float32, np.float32]:
    """Cosine and sine, rounded to 20 bits: the last bits of `math.cos` differ between C libraries."""
    angle = math.radians(degrees)
    return np.float32(round(math.cos(angle) * 2**20) / 2**20), np.float32(round(math.sin(angle) * 2**20) / 2**20)


def signed_distance(shape: str, x: Plane, y: Plane) -> Plane:
    """Signed distance to the edge of a shape in units of its radius.

    Args:
        shape: One of `world.SHAPES`.
        x: To the right, in radii from the centre.
        y: Downwards, in radii from the centre.

    Returns:
        float32 [h, w]: exact near the edge, a lower bound of the size elsewhere; negative inside.
    """
    return _DISTANCES[shape](x, y)


def _length(x: Plane, y: Plane) -> Plane:
    return np.sqrt(x * x + y * y)


def _circle(x: Plane, y: Plane) -> Plane:
    return _length(x, y) - _f(0.88)


def _square(x: Plane, y: Plane) -> Plane:
    return np.maximum(np.abs(x), np.abs(y)) - _f(0.70)


def _triangle(x: Plane, y: Plane) -> Plane:
    edges = np.maximum(y, np.abs(x) * _f(0.8660254) - y * _f(0.5)) - _f(0.5)
    return np.maximum(edges, _length(x, y) - _f(1))


def _star(x: Plane, y: Plane) -> Plane:
    # Mirrored at 36 and 72 degrees, the ten edges fall onto one; the tips are at 1, the notches at 0.45.
    circle = _length(x, y) - _f(1)  # keeps the halo from running on beyond the tips
    x, y = np.abs(x), -y
    for mirror_x, mirror_y in _STAR_MIRRORS:
        beyond = _f(2) * np.maximum(x * mirror_x + y * mirror_y, _f(0))
        x = x - beyond * mirror_x
        y = y - beyond * mirror_y
    return np.maximum(np.abs(x) * _STAR_NORMAL[0] + y * _STAR_NORMAL[1] - _STAR_NORMAL[1], circle)


def _ring(x: Plane, y: Plane) -> Plane:
    return np.abs(_length(x, y) - _f(0.72)) - _f(0.22)


def _cross(x: Plane, y: Plane) -> Plane:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - _f(0.93), np.minimum(x, y) - _f(0.29))


def _heart(x: Plane, y: Plane) -> Plane:
    # A square on its tip and a disc on each of its upper sides.
    x = np.abs(x)
    y = _f(0.10) - y
    half = _f(0.53)
    middle = half * _f(0.70710678)
    square = (x + np.abs(y)) * _f(0.70710678) - half
    return np.minimum(square, _length(x - middle, y - middle) - half)


def _crescent(x: Plane, y: Plane) -> Plane:
    # A disc without a smaller one that lies to the right. Beyond the tips, (0.61, +-0.767), these are what is nearest.
    arcs = np.maximum(_length(x - _f(0.05), y) - _f(0.95), _f(0.78) - _length(x - _f(0.47), y))
    return np.where(x > _f(0.61), _length(x - _f(0.61), np.abs(y) - _f(0.767)), arcs)


def _f(value: float) -> np.float32:
    return np.float32(value)


_STAR_MIRRORS = ((_f(0.80901699), _f(-0.58778525)), (_f(-0.80901699), _f(-0.58778525)))
# The edge from the tip (0, 1) to the notch 0.45 (sin 36, cos 36), as the unit normal of its line.
_NOTCH = (0.45 * 0.58778525, 0.45 * 0.80901699)
_EDGE = ((1 - _NOTCH[1]) ** 2 + _NOTCH[0] ** 2) ** 0.5
_STAR_NORMAL = (_f((1 - _NOTCH[1]) / _EDGE), _f(_NOTCH[0] / _EDGE))

_DISTANCES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "heart": _heart,
    "crescent": _crescent,
}
