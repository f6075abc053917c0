"""Candidate regions of an image, and the pictures that CLIP sees of them.

Regions come from SAM (`jaxsem.systems.mask_generator`), from boxes or masks of the user's, or, with nothing to download, from
`propose`, which takes connected areas of like colour and serves pictures as plain as scenes.
"""

import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt8

from jaxsem.errors import InputError

_COLOURS = 6
_LEAST = 0.004  # of the picture's area; the smallest objects of scenes cover 0.01
_MOST = 0.5
_ROUNDS = 10
_SIDE = 256  # pictures are reduced to this before colours are grouped
_SAMPLES = 8192
_DARK = 30  # of 765: the hue of what is darker counts less


def propose(image: UInt8[np.ndarray, "h w 3"], most: int = 32) -> Bool[np.ndarray, "r h w"]:
    """Connected areas of like colour, largest first.

    Colours are grouped by k-means of their chromaticity, where shading counts little, and each group falls into connected
    areas; holes stay holes, so that a ring is a ring. Areas below 0.4 % or above half of the picture are left out.

    Args:
      image: uint8.
      most: Regions at most.

    Raises:
      InputError: There is none: the picture has one colour, or grain only.
    """
    from scipy import ndimage

    smooth = ndimage.median_filter(image, size=(3, 3, 1)).astype(np.float32)
    groups = _group_colours(_chromaticity(smooth))
    found = []
    for group in range(_COLOURS):
        areas, _ = ndimage.label(groups == group)
        sizes = np.bincount(areas.ravel())[1:]
        for number in np.flatnonzero((sizes >= _LEAST * groups.size) & (sizes <= _MOST * groups.size)):
            found.append((int(sizes[number]), areas == number + 1))
    if not found:
        raise InputError("no region stands out in the picture: give masks or boxes, or a SAM with --sam")
    found.sort(key=lambda pair: -pair[0])
    return np.stack([mask for _, mask in found[:most]])


def from_boxes(boxes: Sequence[Sequence[int]], shape: tuple[int, int]) -> Bool[np.ndarray, "r h w"]:
    """Boxes (left, top, right, bottom; pixels, the last two just outside) as masks of a picture of shape (height, width).

    Raises:
      InputError: A box that is empty or not within the picture.
    """
    height, width = shape
    masks = np.zeros((len(boxes), height, width), bool)
    for mask, box in zip(masks, boxes, strict=True):
        left, top, right, bottom = box
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise InputError(f"the box {tuple(box)} is no left, top, right, bottom within {width}x{height} pixels")
        mask[top:bottom, left:right] = True
    return masks


def parse_box(text: str) -> tuple[int, int, int, int]:
    """A box from "left,top,right,bottom".

    Raises:
      InputError: It is not four whole numbers.
    """
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdecimal() for part in parts):
        raise InputError(f"a box is four whole numbers, left,top,right,bottom, not {text!r}")
    left, top, right, bottom = map(int, parts)
    return left, top, right, bottom


def read_masks(path: str | os.PathLike, shape: tuple[int, int]) -> Bool[np.ndarray, "r h w"]:
    """Masks from a .npy file: bool or uint8 [r, height, width], or a label map [height, width] with 0 for background.

    Raises:
      InputError: No such file, another format, or another size than the picture's.
    """
    try:
        stored = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} is no .npy file of masks: {error}") from error
    if not isinstance(stored, np.ndarray) or stored.dtype.kind not in "bu" or stored.shape[-2:] != shape:
        seen = f"{stored.dtype} {stored.shape}" if isinstance(stored, np.ndarray) else "several arrays"
        raise InputError(f"{path} holds {seen}, where masks are bool or unsigned [r, {shape[0]}, {shape[1]}]")
    if stored.ndim == 2:
        return np.stack([stored == number for number in np.unique(stored[stored > 0])] or [stored > 0])
    return stored.astype(bool)


def region_pictures(image: np.ndarray, masks: np.ndarray, in_place: bool = False) -> list[np.ndarray]:
    """Each region on black: cut to the tight box of its mask, as papers/1 does, or left where it is.

    The released code of the paper loses the last row and column of the box; they are kept here.

    Raises:
      InputError: No region, one without pixels, or masks of another size than the image.
    """
    masks = np.asarray(masks, bool)
    if masks.ndim != 3 or not len(masks) or masks.shape[1:] != image.shape[:2]:
        raise InputError(f"regions are masks [r, {image.shape[0]}, {image.shape[1]}], at least one, not {masks.shape}")
    if not masks.any(axis=(1, 2)).all():
        raise InputError(f"region {int((~masks.any(axis=(1, 2))).argmax())} of {len(masks)} has no pixel: leave it out")
    pictures = []
    for mask in masks:
        alone = np.where(mask[..., None], image, 0).astype(np.uint8)
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = np.s_[:, :] if in_place else np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        pictures.append(alone[box])
    return pictures


def _group_colours(points: np.ndarray) -> np.ndarray:
    """k-means of colours [h, w, 3], from starts that lie far apart, always the same: the group of each pixel."""
    flat = points.reshape(-1, 3)
    sample = flat[:: max(1, len(flat) // _SAMPLES)]
    centres = sample[:1]
    for _ in range(_COLOURS - 1):  # the colour that is farthest from all centres so far
        centres = np.concatenate([centres, sample[_distances(sample, centres).min(axis=1).argmax()][None]])
    for _ in range(_ROUNDS):
        nearest = _distances(sample, centres).argmin(axis=1)
        centres = np.stack(
            [sample[nearest == k].mean(axis=0) if (nearest == k).any() else centres[k] for k in range(len(centres))]
        )
    return _distances(flat, centres).argmin(axis=1).reshape(points.shape[:2])


def _distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return np.square(points[:, None] - centres).sum(axis=2)


def _chromaticity(image: np.ndarray) -> np.ndarray:
    """Red-green and yellow-blue as shares of the lightness, and a tenth of the lightness: shading divides less than hue does."""
    red, green, blue = np.moveaxis(image, -1, 0)
    total = red + green + blue
    return np.stack([red - green, (red + green) / 2 - blue, total * (total + _DARK) / 7650], axis=-1) / (
        total[..., None] + _DARK
    )
