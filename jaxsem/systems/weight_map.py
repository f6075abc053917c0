"""RSIC's spatial weight map M: where an image deserves more bits, and how little it costs to say so.

    config = WeightMapConfig(stride=64, levels=8)
    levels = build_map(512, 768, [Box(64, 0, 320, 200), Click(700, 400, radius=1.5, weight=0.6)], config)   # uint8 [8, 12]
    data = pack_map(levels, config)                                                                        # some ten bytes
    levels = unpack_map(data, 512, 768, config)
    weights = upsample(config.values[levels], 64, 96)                                                      # M, 0 to 1

A map has one level for each cell of stride x stride pixels, the last row and column perhaps smaller. Level k stands for
M = k / (levels - 1); with one level M is 1 everywhere. What the user cares for are regions: a `Heat` map (GEM's, for a phrase), a
`Mask`, a `Box` or a `Click`, each with a weight. A cell takes the largest weight times share over all regions, where the share is
the mean over the cell's pixels, rounded to the nearest level, halves up. Global mode is a `constant_map`.

Heats and weights are rounded to 16 bits first, and all that follows is in integers: equal inputs give equal maps on any machine.

The bytes of a map are specified in `jaxsem.entropy.level_map`.

Source: Wu et al., Your Demands Deserve More Bits (RSIC), section II-B: 1/64 of the image's size, 1 to 8 levels, at most 3 bits a
cell. How the map is pooled, rounded and coded is left open there.
"""

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Context, Decimal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from jaxsem.entropy.level_map import MAX_CELLS, MAX_LEVELS, decode_levels, encode_levels
from jaxsem.errors import FormatError, InputError

MAX_STRIDE = 1024
ONE = 1 << 16  # what a share and a weight of 1 are as integers


@dataclass(frozen=True)
class WeightMapConfig:
    """Sizes of a map.

    Attributes:
      stride: Side of a cell in pixels, 1 to 1024.
      levels: Levels that are told apart, 1 to 8; 1 asks for everything everywhere.

    Raises:
      InputError: A number out of range.
    """

    stride: int = 64
    levels: int = MAX_LEVELS

    def __post_init__(self) -> None:
        for name, most in (("stride", MAX_STRIDE), ("levels", MAX_LEVELS)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise InputError(f"a weight map has {name}={value!r}; it takes an integer from 1 to {most}")

    @property
    def values(self) -> np.ndarray:
        """M of each level: float32 [levels]."""
        if self.levels == 1:
            return np.ones(1, np.float32)
        return np.arange(self.levels, dtype=np.float32) / np.float32(self.levels - 1)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the map of an image.

        Raises:
          InputError: An image without pixels, or more than 2^20 cells.
        """
        height, width = _whole(height, "an image"), _whole(width, "an image")
        if min(height, width) < 1:
            raise InputError(f"an image of {height}x{width} pixels has no weight map: each side is at least 1")
        rows, columns = -(-height // self.stride), -(-width // self.stride)
        if rows * columns > MAX_CELLS:
            raise InputError(
                f"a map of {rows}x{columns} cells exceeds the limit of {MAX_CELLS}: take a stride above {self.stride}"
            )
        return rows, columns


DEFAULT = WeightMapConfig()


# -- regions ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Region(ABC):
    """A part of an image that deserves bits.

    Attributes:
      weight: How much it deserves them, 0 to 1; by keyword.

    Raises:
      InputError: Another weight.
    """

    weight: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        if not 0 <= _number(self.weight, "a weight") <= 1:
            raise InputError(f"a region's weight lies between 0 and 1, not at {self.weight}")

    @abstractmethod
    def sums(self, height: int, width: int, stride: int) -> np.ndarray:
        """The share of each pixel of a cell, in parts of 2^16, added up: int64 [rows, columns].

        Raises:
          InputError: The region does not fit the image.
        """


@dataclass(frozen=True, eq=False)
class Box(Region):
    """The pixels x to x + width - 1 of the rows y to y + height - 1."""

    x: int
    y: int
    width: int
    height: int

    def sums(self, height: int, width: int, stride: int) -> np.ndarray:
        """See `Region`."""
        x, y, w, h = (_whole(getattr(self, name), "a box") for name in ("x", "y", "width", "height"))
        if not (0 <= x < x + w <= width and 0 <= y < y + h <= height):
            raise InputError(
                f"the box x={x}, y={y}, width={w}, height={h} is empty or not within the image of {width}x{height} pixels"
            )
        return ONE * np.outer(_covered(y, y + h, height, stride), _covered(x, x + w, width, stride))


@dataclass(frozen=True, eq=False)
class Click(Region):
    """A Gaussian around the cell of a pixel, in which it is 1; `radius` is its standard deviation in cells."""

    x: int
    y: int
    radius: float = 1.0

    def sums(self, height: int, width: int, stride: int) -> np.ndarray:
        """See `Region`."""
        x, y = (_whole(getattr(self, name), "a click") for name in ("x", "y"))
        if not (0 <= x < width and 0 <= y < height):
            raise InputError(f"the click x={x}, y={y} is not within the image of {width}x{height} pixels")
        if not 0 < _number(self.radius, "a click's radius") < math.inf:
            raise InputError(f"a click's radius is a number of cells above 0, not {self.radius}")
        down, across = (_gaussian(p // stride, -(-n // stride), self.radius) for p, n in ((y, height), (x, width)))
        return (np.outer(down, across) + ONE // 2) // ONE * _counts(height, width, stride)


@dataclass(frozen=True, eq=False)
class Mask(Region):
    """The pixels where a mask, bool [height, width], is True."""

    pixels: Bool[np.ndarray, "height width"]

    def sums(self, height: int, width: int, stride: int) -> np.ndarray:
        """See `Region`."""
        pixels = np.asarray(self.pixels)
        if pixels.dtype != bool or pixels.shape != (height, width):
            raise InputError(
                f"a mask of this image is bool [{height}, {width}], not {pixels.dtype} {list(pixels.shape)}"
            )
        if not pixels.any():
            raise InputError("the mask is empty: mark at least one pixel, or choose global mode (constant_map)")
        return ONE * _pool(pixels, stride)


@dataclass(frozen=True, eq=False)
class Heat(Region):
    """A map of shares [height, width], 0 to 1, such as `jaxsem.systems.gem.heat_maps` gives for the image's size.

    Such a map always reaches 1, whether its phrase is in the image or not: ask `find_region` first.
    """

    values: Float[np.ndarray, "height width"]

    def sums(self, height: int, width: int, stride: int) -> np.ndarray:
        """See `Region`."""
        values = np.asarray(self.values)
        if values.dtype.kind != "f" or values.shape != (height, width):
            raise InputError(
                f"a heat map of this image is real [{height}, {width}], not {values.dtype} {list(values.shape)}: ask for "
                "heat maps of the image's size"
            )
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):  # NaN is neither
            raise InputError(f"a heat map has values from 0 to 1, not {low:g} to {high:g}: see gem.min_max")
        if high == 0:
            raise InputError("the heat map is 0 everywhere: it finds nothing; choose global mode (constant_map)")
        return _pool(np.floor(values.astype(np.float64) * ONE + 0.5), stride)


def find_region(
    similarity: Float[np.ndarray, "h w"],
    phrase: str = "",
    threshold: float = 0.5,
    least_contrast: float = 0.02,
    least_peak: float = 0.0,
) -> Bool[np.ndarray, "h w"]:
    """Where a phrase is, if it is there at all.

    The region is where the similarity exceeds `threshold` of its range. It counts as found if its mean lies `least_contrast` above
    the mean of the rest, and its peak reaches `least_peak`. At the scale of 100 that the published CLIPs learnt, a contrast of
    0.02 is odds of 7 to 1; whether that suits their maps could not be measured here.

    Small CLIPs have wider cosines. On scenes with `gem.MINI`, similarities peak at 0.45 or more for 98 % of the objects that are
    there and for 6 % of those that are not: give `least_peak=0.45`.

    Args:
      similarity: Cosines, of `jaxsem.systems.gem.similarity_maps`; not a heat map, whose range says nothing.
      phrase: For the message.
      threshold: Share of the range, above 0 and below 1.
      least_contrast: 0 to 2.
      least_peak: -1 to 1.

    Raises:
      InputError: Nothing is found, or an array or number that is none of these.
    """
    values = np.asarray(similarity, np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise InputError(f"a similarity map is finite numbers [h, w], not of shape {list(values.shape)} or with NaN")
    if not 0 < threshold < 1:
        raise InputError(f"the threshold is a share of the range, above 0 and below 1, not {threshold}")
    low, peak = values.min(), values.max()
    region = values - low >= threshold * (peak - low)
    contrast = 0.0 if low == peak else values[region].mean() - values[~region].mean()
    if low == peak or contrast < least_contrast or peak < least_peak:
        raise InputError(
            f"the phrase {phrase!r} finds nothing in this image: its similarity peaks at {peak:.3f}, {contrast:.3f} above the "
            f"rest, where {least_peak:g} and {least_contrast:g} are asked for; try other words, give a box or a mask, or choose "
            "global mode (constant_map)"
        )
    return region


# -- maps -------------------------------------------------------------------------------------------------------------


def build_map(
    height: int, width: int, regions: Sequence[Region], config: WeightMapConfig = DEFAULT, background: int = 0
) -> UInt8[np.ndarray, "rows columns"]:
    """The levels of an image with regions.

    Args:
      height: Of the image in pixels.
      width: Of the image in pixels.
      regions: One or more; where they overlap, the larger weight times share counts.
      config: Sizes.
      background: The lowest level that a cell gets.

    Raises:
      InputError: No region, one that does not fit the image, or one that leaves no trace in the map because it is too small or
        its weight too low; one of weight 0 is just left out.
    """
    _check_level(background, config)
    levels, regions = np.full(config.grid(height, width), background, np.uint8), list(regions)
    if not regions:
        raise InputError("there is no region to weight: give at least one, or choose global mode (constant_map)")
    for number, region in enumerate(regions, 1):
        if not isinstance(region, Region):
            raise InputError(f"region {number} is a {type(region).__name__}: give a Heat, Mask, Box or Click")
        shares = math.floor(float(region.weight) * ONE + 0.5) * region.sums(height, width, config.stride)
        # At most 2^52, both. Rounding keeps the order: the largest level is the level of the largest share.
        whole = ONE * ONE * _counts(height, width, config.stride)
        found = (2 * shares * (config.levels - 1) + whole) // (2 * whole)
        if region.weight > 0 and config.levels > 1 and not found.any():
            raise InputError(
                f"region {number}, a {type(region).__name__} of weight {region.weight:g}, comes to {(shares / whole).max():.1%} of "
                f"a cell of {config.stride} pixels at most, which rounds to nothing at {config.levels} levels: make it larger or "
                "heavier, or take a smaller stride"
            )
        levels = np.maximum(levels, found.astype(np.uint8))
    return levels


def constant_map(
    height: int, width: int, level: int, config: WeightMapConfig = DEFAULT
) -> UInt8[np.ndarray, "rows columns"]:
    """The map of global mode: one level for the whole image.

    Raises:
      InputError: No such level, or an image that has no map.
    """
    return np.full(config.grid(height, width), _check_level(level, config), np.uint8)


def upsample(
    weights: Float[Array, "*b rows columns"], height: int, width: int, side: float | None = None
) -> Float[Array, "*b height width"]:
    """The map on a latent grid: each position takes the cell that its centre lies in. For the device.

    Args:
      weights: `config.values[levels]`, or any array on the map's grid.
      height: Rows of the latent grid.
      width: Columns of the latent grid.
      side: Positions along the side of a cell: stride / 8 for a latent of 1/8 of the image, 0.5 for a grid of half the map's.
        None stretches the map over the grid, which is the same where the image is a multiple of the stride.

    Raises:
      InputError: An empty grid, or a side that is not above 0.
    """
    if min(height, width) < 1 or (side is not None and not 0 < side < math.inf):
        raise InputError(
            f"a map cannot be laid over a grid of {height}x{width} with cells of {side}: sizes are above 0"
        )
    down, across = (_nearest(n, cells, side) for n, cells in zip((height, width), weights.shape[-2:]))
    return jnp.asarray(weights)[..., down[:, None], across]


def _nearest(length: int, cells: int, side: float | None) -> np.ndarray:
    """The cell of each position along a side."""
    places = 2 * np.arange(length) + 1
    found = places * cells // (2 * length) if side is None else (places / (2 * side)).astype(int)
    return np.minimum(found, cells - 1)


# -- bytes ------------------------------------------------------------------------------------------------------------


def pack_map(levels: UInt8[np.ndarray, "rows columns"], config: WeightMapConfig = DEFAULT) -> bytes:
    """A map as bytes: at most 3 bits a cell and two bytes, and none at all for a map of one level.

    Raises:
      InputError: It is no map of these levels.
    """
    return encode_levels(levels, config.levels)


def unpack_map(
    data: bytes, height: int, width: int, config: WeightMapConfig = DEFAULT
) -> UInt8[np.ndarray, "rows columns"]:
    """The inverse of `pack_map`.

    Args:
      data: The bytes, no more and no less.
      height: Of the image in pixels.
      width: Of the image in pixels.
      config: As it was packed with.

    Raises:
      FormatError: Damaged bytes, too few or too many, or those of another size.
      InputError: An image that has no map.
    """
    try:
        return decode_levels(data, *config.grid(height, width), config.levels)
    except FormatError as error:
        raise FormatError(f"the weight map of this image of {height}x{width} pixels cannot be read: {error}") from None


# -- integers ---------------------------------------------------------------------------------------------------------


def _counts(height: int, width: int, stride: int) -> np.ndarray:
    """Pixels of each cell: int64 [rows, columns]."""
    return np.outer(_covered(0, height, height, stride), _covered(0, width, width, stride))


def _covered(begin: int, end: int, side: int, stride: int) -> np.ndarray:
    """How many of the pixels begin to end - 1 fall into each cell along a side: int64."""
    starts = np.arange(0, side, stride, dtype=np.int64)
    return np.maximum(np.minimum(starts + stride, end) - np.maximum(starts, begin), 0)


def _pool(pixels: np.ndarray, stride: int) -> np.ndarray:
    """Sums of whole numbers [height, width] over cells: int64 [rows, columns]."""
    rows, columns = (np.arange(0, side, stride) for side in pixels.shape)
    return np.add.reduceat(np.add.reduceat(pixels.astype(np.int64), rows, axis=0), columns, axis=1)


def _gaussian(centre: int, cells: int, radius: float) -> np.ndarray:
    """exp(-d^2 / 2 radius^2) of the cells along a side, in parts of 2^16: int64."""
    # The exponential of `decimal` is correctly rounded, that of the C library differs between machines.
    context = Context(prec=20)
    distances = [(cell - centre) / radius for cell in range(cells)]
    shares = [context.exp(Decimal(-distance * distance / 2)) for distance in distances]
    return np.array([math.floor(context.fma(share, ONE, Decimal("0.5"))) for share in shares], np.int64)


def _check_level(level: int, config: WeightMapConfig) -> int:
    level = _whole(level, "a level")
    if not 0 <= level < config.levels:
        raise InputError(
            f"there is no level {level} in a weight map of {config.levels}: choose 0 to {config.levels - 1}"
        )
    return level


def _whole(value: int, what: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise InputError(f"{what} takes whole numbers, not {value!r}: round it") from None


def _number(value: float, what: str) -> float:
    if not isinstance(value, int | float | np.number):
        raise InputError(f"{what} is a number, not {value!r}")
    return float(value)
