"""Patterns behind the objects: each a field of values 0 to 1 that mixes two tones."""

import numpy as np
from jaxtyping import Float32, UInt8

from jaxsem.data.scenes.draws import Draws
from jaxsem.data.scenes.shapes import Plane, direction
from jaxsem.data.scenes.world import Background, Scene

Row = Float32[np.ndarray, "1 w"]
Column = Float32[np.ndarray, "h 1"]
_TEXTURE_STREAM = 2**63  # a key that `layout` never uses


def background_field(scene: Scene, x: Row, y: Column, pixel: float) -> Plane:
    """Where the pattern shows which tone: 0 the first, 1 the second.

    Args:
        scene: Its background is drawn, and its seed decides the grain and where the spots lie.
        x: Places of the columns, in scene units.
        y: Places of the rows.
        pixel: Side of a pixel in scene units, for smooth edges.

    Returns:
        float32 [h, w] from 0 to 1.
    """
    background, pattern = scene.background, scene.background.pattern
    if pattern == "plain":
        return np.zeros((y.shape[0], x.shape[1]), np.float32)
    if pattern == "shaded":
        return _gradient(background, x, y)
    if pattern == "striped":
        return _stripes(background, x, y, pixel, 0) * _f(0.5) + _f(0.5)
    if pattern == "checked":
        both = _stripes(background, x, y, pixel, 0) * _stripes(background, x, y, pixel, 90)
        return both * _f(0.5) + _f(0.5)
    if pattern == "grainy":
        draws = Draws(_TEXTURE_STREAM, scene.seed)
        field = _noise(draws, 11, x, y) * _f(0.5)
        field += _noise(draws, 53, x, y) * _f(0.5)
        return np.minimum(np.maximum(field * _f(1.5) - _f(0.25), _f(0)), _f(1))
    return _spots(Draws(_TEXTURE_STREAM, scene.seed), scene.extent, x, y)


def _gradient(background: Background, x: Row, y: Column) -> Plane:
    cos, sin = direction(background.angle)
    along = (x * cos - cos * _f(0.5)) + (y * sin - sin * _f(0.5))
    return np.minimum(np.maximum(along * _f(0.75) + _f(0.5), _f(0)), _f(1))


def _stripes(background: Background, x: Row, y: Column, pixel: float, turn: float) -> Plane:
    """Bands of -1 and 1 across a direction, with edges one pixel wide."""
    cos, sin = direction(background.angle + turn)
    scale = _f(1 / background.period)
    along = (x * (cos * scale) + _f(background.phase)) + y * (sin * scale)
    wave = np.abs(along - np.floor(along) - _f(0.5)) - _f(0.25)  # in periods, zero at the edges
    return np.minimum(np.maximum(wave * _f(2 * background.period / pixel), _f(-1)), _f(1))


def _noise(draws: Draws, cells: int, x: Row, y: Column) -> Plane:
    """Random values on a grid of `cells` to the unit, joined smoothly and repeated beyond it."""
    values: UInt8[np.ndarray, "n n"] = draws.raw_bytes(cells * cells).reshape(cells, cells)
    grid = values.astype(np.float32) * _f(1 / 255)
    row, row_part = _cell(y[:, 0], cells)
    column, column_part = _cell(x[0], cells)
    lines = grid[row % cells]
    lines += (grid[(row + 1) % cells] - lines) * row_part[:, None]
    field = lines[:, column % cells]
    field += (lines[:, (column + 1) % cells] - field) * column_part
    return field


def _cell(place: np.ndarray, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """The cell of each place and the smoothed share of the next one (the cubic 3t^2 - 2t^3)."""
    scaled = place * _f(cells)
    cell = np.floor(scaled)
    part = scaled - cell
    return cell.astype(np.int64), part * part * (_f(3) - _f(2) * part)


def _spots(draws: Draws, extent: tuple[float, float], x: Row, y: Column) -> Plane:
    """Seven soft blobs; where two meet, the stronger shows."""
    field = np.zeros((y.shape[0], x.shape[1]), np.float32)
    for _ in range(7):
        centre_x, centre_y = draws.uniform(0, extent[1]), draws.uniform(0, extent[0])
        radius = draws.uniform(0.12, 0.28)
        left, right = np.searchsorted(x[0], (centre_x - radius, centre_x + radius))
        top, bottom = np.searchsorted(y[:, 0], (centre_y - radius, centre_y + radius))
        across = (x[:, left:right] - _f(centre_x)) * _f(1 / radius)
        down = (y[top:bottom] - _f(centre_y)) * _f(1 / radius)
        near = np.maximum((_f(1) - across * across) - down * down, _f(0))
        spot = field[top:bottom, left:right]
        np.maximum(spot, near * near, out=spot)
    return field


def _f(value: float) -> np.float32:
    return np.float32(value)
