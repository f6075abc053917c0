"""From a scene to pixels: the picture, the label map of what is visible, boxes, and who hides whom."""

import dataclasses
import functools

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from jaxsem.data.scenes.backgrounds import background_field
from jaxsem.data.scenes.shapes import Plane, direction, signed_distance
from jaxsem.data.scenes.world import Scene, SceneObject, check_size

Window = tuple[slice, slice]

_HALO = 0.04  # width of the darkening around an object, which shows what is in front
_HALO_DEPTH = 0.30
_SHADING = 0.15  # an object is this much darker at its middle than towards the light, and twice at the far side
_RIM = 0.42  # how much darker its outline is
_COARSE = 64  # pixels to the unit where visibility is measured


def render(scene: Scene, size: int | tuple[int, int] = 128) -> UInt8[np.ndarray, "h w 3"]:
    """Draws a scene.

    The scene fills the picture as far as the shorter way allows and is never stretched; a picture of another aspect
    shows more background on two sides. Edges are smoothed over one pixel.

    Args:
        scene: What to draw.
        size: Side of the picture, or (height, width), 16 to 4096.

    Returns:
        uint8 [h, w, 3], sRGB; the same bytes on every machine.

    Raises:
        InputError: For a size that is out of range.
    """
    return draw(scene, size)[0]


def label_map(scene: Scene, size: int | tuple[int, int] = 128) -> UInt8[np.ndarray, "h w"]:
    """Says which object every pixel shows.

    Args:
        scene: What to look at.
        size: As for `render`.

    Returns:
        uint8 [h, w]: 0 for background, k + 1 for `scene.objects[k]`, decided at the pixel's centre. In very small
        pictures an object can be thinner than the pixels and have none.

    Raises:
        InputError: For a size that is out of range.
    """
    grid = _Grid.of(scene.extent, *check_size(size))
    labels = np.zeros((grid.y.shape[0], grid.x.shape[1]), np.uint8)
    for number, thing in enumerate(scene.objects, 1):
        window, distance = grid.distance(thing, 0.0)
        labels[window][distance < 0] = number
    return labels


def draw(scene: Scene, size: int | tuple[int, int]) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"]]:
    """`render` and `label_map` together, at hardly more than the cost of the first."""
    height, width = check_size(size)
    grid = _Grid.of(scene.extent, height, width)
    field = background_field(scene, grid.x, grid.y, 1 / grid.scale)
    canvas = np.empty((3, height, width), np.float32)  # planes: long rows are what NumPy is fast at
    for plane, first, second in zip(canvas, *scene.background.tones):
        np.multiply(field, np.float32(second - first), out=plane)
        plane += np.float32(first)
    labels = np.zeros((height, width), np.uint8)
    light = direction(scene.light)
    for number, thing in enumerate(scene.objects, 1):
        window, distance = grid.distance(thing, _HALO)
        bright = grid.brightness(thing, window, light)
        _paint(canvas[:, *window], thing, distance, bright, np.float32(grid.scale))
        labels[window][distance < 0] = number
    image = np.empty((height, width, 3), np.uint8)
    for channel, plane in enumerate(canvas):
        plane += np.float32(0.5)
        image[..., channel] = np.minimum(plane, np.float32(255), out=plane)
    return image, labels


def boxes_of(labels: UInt8[np.ndarray, "h w"], count: int) -> Int32[np.ndarray, "count 4"]:
    """The boxes around the visible parts.

    Args:
        labels: A label map.
        count: How many objects it may hold.

    Returns:
        int32 [count, 4]: left, top, right, bottom in pixels, the last two just outside; zeros for what is not visible.
    """
    boxes = np.zeros((count, 4), np.int32)
    for index in range(count):
        mask = labels == index + 1
        rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
        if rows.size:
            boxes[index] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


@dataclasses.dataclass(frozen=True)
class Occlusion:
    """Who hides whom, measured on a grid of 64 points to the unit.

    Attributes:
        hidden: float32 [n, n]: the share of object i that object j, being in front of it, covers.
        visible: float32 [n]: the share of each object that can be seen.
    """

    hidden: Float32[np.ndarray, "n n"]
    visible: Float32[np.ndarray, " n"]


def occlusion(scene: Scene) -> Occlusion:
    """Measures who hides whom."""
    masks = coarse_masks(scene.objects, scene)
    return occlusion_of(masks)


def coarse_masks(objects: tuple[SceneObject, ...], scene: Scene) -> list[np.ndarray]:
    """The full shape of each object, as bool [h, w] with 64 points to the unit."""
    grid = _Grid.of(scene.extent, *(round(side * _COARSE) for side in scene.extent))
    masks = []
    for thing in objects:
        mask = np.zeros((grid.y.shape[0], grid.x.shape[1]), bool)
        window, distance = grid.distance(thing, 0.0)
        mask[window] = distance < 0
        masks.append(mask)
    return masks


def occlusion_of(masks: list[np.ndarray]) -> Occlusion:
    """As `occlusion`, from masks of full shapes, back to front."""
    count = len(masks)
    hidden = np.zeros((count, count), np.float32)
    visible = np.zeros(count, np.float32)
    for back, mask in enumerate(masks):
        area = np.count_nonzero(mask)
        seen = mask
        for front in range(back + 1, count):
            hidden[back, front] = np.count_nonzero(mask & masks[front]) / area
            if hidden[back, front]:
                seen = seen & ~masks[front]
        visible[back] = np.count_nonzero(seen) / area
    return Occlusion(hidden, visible)


def _paint(canvas: Float32[np.ndarray, "3 h w"], thing: SceneObject, distance: Plane, bright: Plane, scale: np.float32):
    """Draws one object into its window of the canvas: first the halo, then the object over it."""
    one, zero = np.float32(1), np.float32(0)
    near = np.maximum(one - np.abs(distance) * np.float32(1 / _HALO), zero)
    canvas *= one - near * near * np.float32(_HALO_DEPTH)
    pixels = distance * scale
    cover = np.minimum(np.maximum(np.float32(0.5) - pixels, zero), one)
    shade = bright
    if thing.outline:
        inner = pixels + np.float32(thing.outline * thing.radius) * scale + np.float32(0.5)
        shade = bright * (one - np.minimum(np.maximum(inner, zero), one) * np.float32(_RIM))
    shade = shade * cover
    rest = one - cover
    for plane, value in zip(canvas, thing.rgb):
        plane *= rest
        plane += shade * np.float32(value)


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Where the pixel centres lie in the scene."""

    x: Float32[np.ndarray, "1 w"]
    y: Float32[np.ndarray, "h 1"]
    scale: float  # pixels to the unit

    @classmethod
    @functools.lru_cache(maxsize=16)
    def of(cls, extent: tuple[float, float], height: int, width: int) -> "_Grid":
        """The grid of a picture that shows all of an extent, centred."""
        high, wide = extent
        scale = min(height / high, width / wide)
        x = (np.arange(width) + (0.5 - width / 2)) / scale + wide / 2
        y = (np.arange(height) + (0.5 - height / 2)) / scale + high / 2
        grid = cls(x.astype(np.float32)[None, :], y.astype(np.float32)[:, None], scale)
        grid.x.flags.writeable = grid.y.flags.writeable = False  # shared by all who ask
        return grid

    def distance(self, thing: SceneObject, margin: float) -> tuple[Window, Plane]:
        """The window of pixels within an object's circle and a margin, and there the signed distance in scene units."""
        reach = thing.radius + margin + 1 / self.scale
        rows = self._span(thing.y, reach, self.y[0, 0])
        columns = self._span(thing.x, reach, self.x[0, 0])
        cos, sin = (part * np.float32(1 / thing.radius) for part in direction(thing.rotation))
        x = self.x[:, columns] - np.float32(thing.x)
        y = self.y[rows] - np.float32(thing.y)
        across = x * cos + y * sin
        down = y * cos - x * sin
        return (rows, columns), signed_distance(thing.shape, across, down) * np.float32(thing.radius)

    def _span(self, middle: float, reach: float, first: np.float32) -> slice:
        """The pixels along one axis that are at most `reach` from a place."""
        start = (middle - reach - float(first)) * self.scale
        return slice(max(0, int(start)), max(0, int(start + 2 * reach * self.scale) + 2))

    def brightness(self, thing: SceneObject, window: Window, light: tuple[np.float32, np.float32]) -> Plane:
        """How bright an object is within a window: 1 towards the light, less away from it."""
        slope = np.float32(_SHADING / thing.radius)
        x = (self.x[:, window[1]] - np.float32(thing.x)) * (light[0] * slope)
        y = (self.y[window[0]] - np.float32(thing.y)) * (light[1] * slope)
        return (x + np.float32(1 - _SHADING)) + y
