"""SAM's automatic masks: everything that a regular grid of points finds in an image, each thing once.

```
image ─▶ embedding ─┐
                    ├─ predict ─▶ masks of a quarter size, ─ IoU high enough? ─ measure ─▶ stability, box, bits ─ stable enough? ─┐
batch of points ────┘             predicted IoU                                                                                  │
masks, best first ◀─ restore ── suppress those whose boxes overlap better ones' ◀── bits within the box, of all batches ─────────┘
```

    generator = MaskGenerator.load("facebook/sam-vit-huge")
    found = generator.generate(image)                        # masks, boxes, predicted IoUs, ...

Two programs run on the device for every batch of points. `_predict` does not depend on the size of the image, so it is
compiled once. `_measure` enlarges masks, a few at a time and only those whose predicted IoU is high enough, and gives bits;
its sizes are rounded up, so that images of many sizes share a program. Every threshold is a number that nothing is compiled
for. Between batches a mask is kept as the bits within its box, so that memory grows with what is found and not with points
times pixels.

Suppression runs on the host: it takes four numbers a mask, how many there are differs from image to image, and each
decision waits for the one before it.

Other than Meta's generator this one has no crops (papers/1 and Meta's defaults use none), leaves out masks without any pixel even
where nothing is filtered, and gives masks in the order of their predicted IoU also after small areas were removed.

Source: Kirillov et al., Segment Anything (2023), appendix B, and Meta's `SamAutomaticMaskGenerator`.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from jaxsem.backbones.sam import Sam
from jaxsem.backbones.sam_config import CONFIGS, SamConfig
from jaxsem.backbones.sam_inputs import mask_matrix, preprocess, resample, resized_size, scale_prompts
from jaxsem.data.images import pixels_from
from jaxsem.errors import InputError
from jaxsem.systems.clip_model import filled
from jaxsem.weights.sam import load_sam

_STEP = 128  # sizes of images are rounded up to a multiple of this: fewer programs; also of 8, for whole bytes of bits
_MASKS = 16  # that are measured at once, and fewer of a large image:
_PIXELS = 1 << 25  # of them together


@dataclass(frozen=True)
class MaskGeneratorConfig:
    """How masks are looked for and which are kept; the defaults are Meta's, which papers/1 uses.

    Attributes:
      points_per_side: Rows, and columns, of points.
      points_per_batch: Points whose masks the device predicts at once.
      iou_threshold: Masks with a predicted IoU above this are kept; 0 keeps all.
      stability_threshold: Masks at least this stable are kept; 0 keeps all. The stability of a mask is the IoU of two others
        from the same logits: those above the offset, and those above minus the offset.
      stability_offset: That offset.
      nms_threshold: Of two masks whose boxes have a larger IoU than this, the one of the higher predicted IoU is kept.
      min_area: Holes, and areas apart from the rest, of fewer pixels than this are removed from each mask; 0 leaves them.

    Raises:
      InputError: A count below 1, or a threshold that is none.
    """

    points_per_side: int = 32
    points_per_batch: int = 64
    iou_threshold: float = 0.88
    stability_threshold: float = 0.95
    stability_offset: float = 1.0
    nms_threshold: float = 0.7
    min_area: int = 0

    def __post_init__(self) -> None:
        for entry in fields(self):
            value, least = getattr(self, entry.name), 0 if entry.name == "min_area" else 1
            if entry.type is int and not (isinstance(value, int) and value >= least):
                raise InputError(f"{entry.name} is a whole number of at least {least}, not {value!r}")
            if entry.name.endswith("_threshold") and not 0 <= value <= 1:
                raise InputError(f"{entry.name} is a number from 0 to 1, not {value!r}")
        if not (math.isfinite(self.stability_offset) and self.stability_offset >= 0):
            raise InputError(f"stability_offset is a finite number of at least 0, not {self.stability_offset!r}")


@dataclass(frozen=True, eq=False)
class Masks:
    """What was found in an image, r masks, that of the highest predicted IoU first.

    Attributes:
      masks: One plane for each; they may overlap.
      boxes: (left, top, right, bottom) of each mask's pixels, the last two the last column and row inside, as Meta has them; the
        boxes of `jaxsem.systems.regions` end one further.
      predicted_iou: The IoU that SAM expects of each.
      stability: See `MaskGeneratorConfig`; of the mask as SAM gave it, before small areas were removed.
      points: (x, y), in pixels of the image, of the point that asked for each.
    """

    masks: Bool[np.ndarray, "r h w"]
    boxes: Int[np.ndarray, "r 4"]
    predicted_iou: Float[np.ndarray, " r"]
    stability: Float[np.ndarray, " r"]
    points: Float[np.ndarray, "r 2"]

    def __len__(self) -> int:
        return len(self.masks)


@dataclass(frozen=True, eq=False)
class MaskGenerator:
    """A SAM that finds masks by itself.

    Attributes:
      module: The Flax module.
      params: Its parameters.
      config: How to look, and what to keep.
    """

    module: Sam
    params: Any
    config: MaskGeneratorConfig = field(default_factory=MaskGeneratorConfig)

    @classmethod
    def load(
        cls,
        source: str | os.PathLike,
        config: MaskGeneratorConfig | None = None,
        sam: SamConfig | str | None = None,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ) -> "MaskGenerator":
        """Loads a SAM.

        Args:
          source: As `jaxsem.weights.sam.load_sam` takes it: a folder, a Hugging Face id, or a file of weights.
          config: How to look, and what to keep.
          sam: Sizes or their name, where the source has no config.json; the files that Meta published have it in theirs, as in
            sam_vit_h_4b8939.pth.
          dtype: Of the computation.
          param_dtype: Of the parameters.

        Raises:
          InputError: Nothing is there, or no sizes can be told.
          WeightsError: The files are damaged or do not fit.
        """
        if sam is None and os.path.isfile(source):
            sam = next((name for name in CONFIGS if os.path.basename(source).startswith(f"sam_{name}_")), None)
        module, params = load_sam(source, sam, dtype, param_dtype)
        return cls(module, jax.device_put(params), config or MaskGeneratorConfig())

    def masks(self, image: UInt8[np.ndarray, "h w 3"]) -> Bool[np.ndarray, "r h w"]:
        """The masks of `generate` alone."""
        return self.generate(image).masks

    def generate(self, image: UInt8[np.ndarray, "h w 3"]) -> Masks:
        """Finds masks in an image.

        Args:
          image: uint8, or whatever else `jaxsem.data.images.pixels_from` takes.

        Raises:
          InputError: It is no image, or nothing in it passes the thresholds.
        """
        image, c = pixels_from(image), self.config
        frame = _Frame(image.shape[:2], self.module.config)
        found, ious, stabilities = [], [], []
        for points, logits, iou in self._predictions(image):
            ious.append(iou)
            chosen = np.flatnonzero((iou > np.float32(c.iou_threshold)) | (c.iou_threshold == 0))
            for index, stability, area, box, bits in frame.measure(logits, chosen, c.stability_offset):
                stabilities.append(stability)
                if area and (stability >= np.float32(c.stability_threshold) or c.stability_threshold == 0):
                    point, mask = divmod(index, iou.shape[1])
                    found.append(_Found(iou[point, mask], stability, points[point], box, _cut(bits, box)))
        if not found:
            raise InputError(self._nothing(frame.shape, np.concatenate(ious), stabilities))
        return self._distinct(found, frame.shape)

    def _predictions(self, image: np.ndarray) -> Iterator[tuple[np.ndarray, jax.Array, np.ndarray]]:
        """Points [p, 2] of each batch, all masks that a full batch has, and the predicted IoUs [p, k] of those points.

        A batch is on its way to the device before the one before it is given.
        """
        size, c = self.module.config.encoder.image_size, self.config
        params, inputs = jax.device_put(self.params), preprocess([image], size)
        embeddings = _embed(self.module, params, inputs.pixels)
        points = point_grid(c.points_per_side) * image.shape[1::-1]
        batch, waiting = min(c.points_per_batch, len(points)), None
        for i in range(0, len(points), batch):
            some = points[i : i + batch]
            places = scale_prompts(filled(some, batch), inputs.original[0], size)
            begun = some, *_predict(self.module, params, embeddings, places)
            if waiting is not None:
                yield _ready(*waiting)
            waiting = begun
        yield _ready(*waiting)

    def _distinct(self, found: list["_Found"], shape: tuple[int, int]) -> Masks:
        """The masks of what remains after suppression, cleaned if the config asks for it."""
        c = self.config
        iou, stability, points, boxes = (np.array(column) for column in list(zip(*found))[:4])
        kept = suppress(boxes, iou, c.nms_threshold)
        masks, boxes = np.zeros((len(kept), *shape), bool), boxes[kept]
        for mask, index in zip(masks, kept):
            found[index].draw(mask)
        if c.min_area:
            changed = np.array([_clean(mask, c.min_area) for mask in masks])
            for index in np.flatnonzero(changed):
                boxes[index] = _box(masks[index])
            # Masks that nothing was done to are preferred, as in the reference.
            still = np.sort(suppress(boxes, ~changed, c.nms_threshold))
            kept, masks, boxes = kept[still], masks[still], boxes[still]
        return Masks(masks, boxes, iou[kept], stability[kept], points[kept].astype(np.float32))

    def _nothing(self, shape: tuple[int, int], ious: np.ndarray, stabilities: list) -> str:
        c, option = self.config, "iou_threshold"
        text = f"of {ious.size} masks {len(stabilities)} have a predicted IoU above {c.iou_threshold} (best {ious.max():.3f})"
        if stabilities:
            text += f", and none of these is stable to {c.stability_threshold} (best {max(stabilities):.3f})"
            option = "stability_threshold"
        return (
            f"SAM finds nothing in this image of {shape[1]}x{shape[0]}: {text}: lower the {option} of MaskGeneratorConfig, or give "
            "boxes or masks instead"
        )


def point_grid(side: int) -> Float[np.ndarray, "side*side 2"]:
    """Points (x, y), row by row, in the middle of `side` x `side` equal parts of an image whose sides are 1."""
    line = (np.arange(side) + 0.5) / side
    return np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)


def suppress(boxes: Int[np.ndarray, "n 4"], scores: Float[np.ndarray, " n"], threshold: float) -> Int[np.ndarray, " k"]:
    """Greedy suppression of boxes that overlap a better one; torchvision's `nms`.

    From the best on, each box that is still there removes all after it with which its IoU is above the threshold. Boxes have
    the area (right - left) * (bottom - top), also where they end with the last pixel, as in the reference; one without area
    removes none and is not removed.

    Args:
      boxes: (left, top, right, bottom).
      scores: Of boxes with the same score the first one comes first.
      threshold: From 0 to 1.

    Returns:
      Indices of the boxes that remain, best first.
    """
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)[order]
    areas, alive = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1), np.ones(len(boxes), bool)
    for i in range(len(boxes)):
        if alive[i]:
            after = boxes[i + 1 :]
            sides = np.minimum(boxes[i, 2:], after[:, 2:]) - np.maximum(boxes[i, :2], after[:, :2])
            common = np.maximum(sides, 0).prod(axis=1)
            union = areas[i] + areas[i + 1 :] - common
            alive[i + 1 :] &= common / np.where(union > 0, union, 1) <= threshold
    return order[alive]


# -- on the device ----------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="module")
def _embed(module: Sam, params: Any, pixels: Float[Array, "1 s s 3"]) -> Float[Array, "1 g g c"]:
    return module.apply({"params": params}, pixels, method="encode_image")


@partial(jax.jit, static_argnames="module")
def _predict(
    module: Sam, params: Any, embeddings: Float[Array, "1 g g c"], points: Float[Array, "p 2"]
) -> tuple[Float[Array, "p*k h w"], Float[Array, "p k"]]:
    """Masks of a quarter size for each point alone, and what SAM expects of them."""
    logits, iou = module.apply({"params": params}, embeddings, points[None, :, None], method="predict_masks")
    return logits.reshape(-1, *logits.shape[-2:]), iou[0]


@jax.jit
def _measure(
    logits: Float[Array, "n h w"],
    chosen: Int[Array, " m"],
    rows: Float[Array, "height h"],
    columns: Float[Array, "width w"],
    shape: Int[Array, "2"],
    offset: Float[Array, ""],
) -> tuple[Float[Array, " m"], Int[Array, " m"], Int[Array, "m 4"], UInt8[Array, "m height width//8"]]:
    """Stability, area, box and bits of some masks at the size of the image, `shape`, which rows and columns exceed."""
    enlarged = resample(logits[chosen], rows, columns)
    inside = [jnp.arange(length) < known for length, known in zip(enlarged.shape[1:], shape)]
    enlarged = jnp.where(inside[0][:, None] & inside[1], enlarged, -jnp.inf)
    narrow, masks, wide = (enlarged > level for level in (offset, 0.0, -offset))
    stability = narrow.sum((1, 2)) / jnp.maximum(wide.sum((1, 2)), 1)
    edges = [_ends(masks.any(axis)) for axis in (1, 2)]  # of columns, of rows
    boxes = jnp.stack([edge[end] for end in (0, 1) for edge in edges], axis=-1)
    return stability, masks.sum((1, 2)), boxes, jnp.packbits(masks, axis=-1)


def _ends(line: Bool[Array, "m n"]) -> tuple[Int[Array, " m"], Int[Array, " m"]]:
    """Where each line is true first and last; lines without any have no meaning."""
    return jnp.argmax(line, axis=1), line.shape[1] - 1 - jnp.argmax(line[:, ::-1], axis=1)


# -- on the host ------------------------------------------------------------------------------------------------------


class _Frame:
    """An image's size as `_measure` takes it.

    Attributes:
      shape: Height and width.
    """

    def __init__(self, shape: tuple[int, int], sam: SamConfig) -> None:
        size = sam.encoder.image_size
        lines = zip(resized_size(shape, size), shape)
        matrices = [mask_matrix(sam.mask_size, size, resized, full) for resized, full in lines]
        self.shape = shape
        self._matrices = [jnp.asarray(np.pad(m, ((0, -len(m) % _STEP), (0, 0)))) for m in matrices]
        self._group = max(1, min(_MASKS, _PIXELS // math.prod(len(m) for m in self._matrices)))

    def measure(self, logits: jax.Array, chosen: np.ndarray, offset: float) -> Iterator[tuple[Any, ...]]:
        """Index, stability, area, box and bits of each chosen mask; all are begun before the first is waited for."""
        groups = [chosen[i : i + self._group] for i in range(0, len(chosen), self._group)]
        traced = *self._matrices, np.int32(self.shape), np.float32(offset)
        begun = [_measure(logits, filled(group, self._group), *traced) for group in groups]
        for group, found in zip(groups, begun):
            yield from zip(group, *map(np.asarray, found))


class _Found(NamedTuple):
    """A mask between its batch and the end: its bits are those within its box, from a whole byte on."""

    iou: np.float32
    stability: np.float32
    point: np.ndarray
    box: np.ndarray
    bits: np.ndarray

    def draw(self, plane: np.ndarray) -> None:
        """Sets the mask's pixels in a plane of the image's size."""
        left, top, _, bottom = self.box
        part = plane[top : bottom + 1, left // 8 * 8 :][:, : 8 * self.bits.shape[1]]
        part[:] = np.unpackbits(self.bits, axis=1, count=part.shape[1])


def _cut(bits: np.ndarray, box: np.ndarray) -> np.ndarray:
    """A copy of the bits within a box, so that the others are not kept."""
    left, top, right, bottom = box
    return bits[top : bottom + 1, left // 8 : right // 8 + 1].copy()


def _ready(points: np.ndarray, logits: jax.Array, iou: jax.Array) -> tuple[np.ndarray, jax.Array, np.ndarray]:
    return points, logits, np.asarray(iou)[: len(points)]  # waits for the device


def _box(mask: np.ndarray) -> list[int]:
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return [columns[0], rows[0], columns[-1], rows[-1]]


def _clean(mask: np.ndarray, least: int) -> bool:
    """Fills holes of fewer pixels than `least` and then removes areas that small, in place; tells whether there was any.

    Pixels that touch at a corner belong together. Of areas that are all too small the largest stays.
    """
    labels, sizes = _areas(~mask)
    holes = sizes < least
    mask |= np.append(False, holes)[labels]
    labels, sizes = _areas(mask)
    islands = sizes < least
    kept = ~islands if not islands.all() else np.arange(len(sizes)) == sizes.argmax()
    mask &= np.append(False, kept)[labels]
    return bool(holes.any() or islands.any())


def _areas(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The connected areas of a mask: a plane of their numbers from 1 on, and the pixels of each."""
    from scipy import ndimage

    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    return labels, np.bincount(labels.ravel())[1:]
