"""Scenes as arrays: one record, a batch of them, or a source that draws them as they are read."""

import dataclasses
import functools
import re
from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np

from jaxsem.data.scenes.captions import captions
from jaxsem.data.scenes.layout import sample_scene
from jaxsem.data.scenes.phrases import View, refer
from jaxsem.data.scenes.render import boxes_of, draw
from jaxsem.data.scenes.world import CLASS_SETS, CLASSES, DEFAULT, MAX_OBJECTS, SPLITS, SceneConfig, check_size
from jaxsem.errors import InputError

_CHUNK = 16  # scenes that a worker draws at a time

FIELDS = ("image", "masks", "boxes", "classes", "depth", "captions", "phrases")
"""What a record holds; see `scene_record`."""


def scene_record(
    split: str,
    index: int,
    config: SceneConfig = DEFAULT,
    size: int | tuple[int, int] = 128,
    fields: Sequence[str] = FIELDS,
) -> dict[str, np.ndarray]:
    """One scene as arrays, whose shapes do not depend on the scene: m = `config.objects[1]` places for objects.

    Args:
        split: "train", "valid" or "test".
        index: Number of the scene in its split.
        config: Which scenes are drawn.
        size: Side of the picture, or (height, width).
        fields: What to make; "image" alone takes two thirds of the time of everything.

    Returns:
        Those of the following that `fields` names, objects from back to front:

        * "image": uint8 [h, w, 3], sRGB.
        * "masks": uint8 [h, w], the visible parts as a label map: 0 for background, k + 1 for object k.
        * "boxes": int32 [m, 4], around the visible parts: left, top, right, bottom in pixels, the last two just
          outside. Zeros where there is no object, or none of its pixels can be seen.
        * "classes": int32 [m], index in `CLASSES`, -1 where there is no object.
        * "depth": int32 [m], 0 for the nearest object, 1 for the one behind it and so on, -1 where there is none.
        * "captions": str [5], from short to detailed.
        * "phrases": str [m, 3], each true of its object alone, the first by as few attributes as suffice; "" where
          there is no object.

    Raises:
        InputError: For an unknown split or field, an index outside the split, or a size out of range.
    """
    for field in fields:
        if field not in FIELDS:
            raise InputError(f"records of scenes have no {field!r}: they have {', '.join(FIELDS)}.")
    places = config.objects[1]
    scene = sample_scene(split, index, config)
    count = len(scene.objects)
    record = {}
    if not {"image", "masks", "boxes"}.isdisjoint(fields):
        record["image"], record["masks"] = draw(scene, size)
        record["boxes"] = boxes_of(record["masks"], places) if "boxes" in fields else None
    if "classes" in fields:
        numbers = [CLASSES.index(thing.name) for thing in scene.objects]
        record["classes"] = np.array(numbers + [-1] * (places - count), np.int32)
    if "depth" in fields:
        record["depth"] = np.maximum(np.arange(count - 1, count - 1 - places, -1), -1).astype(np.int32)
    if not {"captions", "phrases"}.isdisjoint(fields):
        view = View.of(scene)
        if "captions" in fields:
            record["captions"] = np.array(captions(scene, view))
        if "phrases" in fields:
            texts = [[phrase.text for phrase in phrases] for phrases in refer(scene, view)]
            record["phrases"] = np.array(texts + [[""] * len(texts[0])] * (places - count))
    return {field: record[field] for field in fields}


def batch(
    split: str,
    indices: Sequence[int],
    config: SceneConfig = DEFAULT,
    size: int | tuple[int, int] = 128,
    fields: Sequence[str] = FIELDS,
    pool: Executor | None = None,
) -> dict[str, np.ndarray]:
    """Several scenes as one batch.

    One core draws some 2,000 images of 128x128 a second. Threads add nothing, as scenes are many small NumPy calls that
    hold Python's lock; processes do where there are idle cores:

        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            records = batch("train", range(256), pool=pool)

    Args:
        split: "train", "valid" or "test".
        indices: Numbers of the scenes in their split.
        config: Which scenes are drawn.
        size: Side of the pictures, or (height, width).
        fields: What to make, as for `scene_record`.
        pool: Who draws, some scenes each; None draws here. The result does not depend on it.

    Returns:
        The arrays of `scene_record` with a leading axis [b].

    Raises:
        InputError: As `scene_record`; for no indices.
    """
    indices = [int(index) for index in indices]
    if not indices:
        raise InputError("a batch of no scenes cannot be drawn: give at least one index.")
    if pool is None:
        return _draw_batch(indices, split, config, size, fields)
    chunks = [indices[start : start + _CHUNK] for start in range(0, len(indices), _CHUNK)]
    drawn = pool.map(functools.partial(_draw_batch, split=split, config=config, size=size, fields=fields), chunks)
    parts = list(drawn)
    return {field: np.concatenate([part[field] for part in parts]) for field in fields}


def _draw_batch(indices: list[int], split: str, config: SceneConfig, size, fields: Sequence[str]):
    records = [scene_record(split, index, config, size, fields) for index in indices]
    return {field: np.stack([record[field] for record in records]) for field in fields}


class ScenesSource:
    """Scenes drawn when they are asked for: `source[i]` is the `scene_record` number i of a range.

    Args:
        split: "train", "valid" or "test".
        config: Which scenes are drawn.
        size: Side of the pictures, or (height, width).
        start: The first scene.
        stop: The one after the last; None for the whole split.
        fields: What the records hold.

    Raises:
        InputError: If there is no such split, range, size or field.
    """

    def __init__(
        self,
        split: str,
        config: SceneConfig = DEFAULT,
        size: int | tuple[int, int] = 128,
        start: int = 0,
        stop: int | None = None,
        fields: Sequence[str] = FIELDS,
    ):
        sample_scene(split, 0)  # complains about unknown splits
        length = SPLITS[split]
        stop = length if stop is None else stop
        if not 0 <= start < stop <= length:
            raise InputError(f"scenes:{split}[{start}:{stop}] is no range of its {length} scenes.")
        self.split = split
        self.config = config
        self.size = check_size(size)
        self.fields = tuple(fields)
        self._indices = range(start, stop)
        self[0]  # complains about unknown fields

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"scene {index} of {len(self)}")  # what ends a loop over a sequence
        return scene_record(self.split, self._indices[index], self.config, self.size, self.fields)


def open_scenes(options: Sequence[str], split: str) -> ScenesSource:
    """Opens what a data source string like "scenes/192x256/seen/objects=1:test[:100]" names.

    Args:
        options: The words between "scenes" and the colon, in any order: a size (`256`, or height x width as
            `192x256`), a class set (`all`, `seen`, `unseen`), a number of objects (`objects=2`, `objects=1-3`).
        split: What follows the colon: a split, possibly with a range like `[100:200]`, `[:100]` or `[100:]`.

    Returns:
        The source; where the picture is not square, objects spread over all of it.

    Raises:
        InputError: For words that are none of these.
    """
    size, config = (128, 128), DEFAULT
    for option in options:
        if match := re.fullmatch(r"(\d+)(?:x(\d+))?", option):
            size = check_size((int(match[1]), int(match[2] or match[1])))
        elif option in CLASS_SETS:
            config = dataclasses.replace(config, classes=option)
        elif match := re.fullmatch(r"objects=(\d+)(?:-(\d+))?", option):
            config = dataclasses.replace(config, objects=(int(match[1]), int(match[2] or match[1])))
        else:
            raise InputError(
                f"scenes have no option {option!r}: give a size like 256 or 192x256, one of {', '.join(CLASS_SETS)}, "
                f"or objects=1 to objects=1-{MAX_OBJECTS}."
            )
    config = dataclasses.replace(config, aspect=size[1] / size[0])
    match = re.fullmatch(r"(\w+)(?:\[(\d*):(\d*)\])?", split)
    if match is None:
        raise InputError(f"scenes:{split} names no scenes: write scenes:test, or a range like scenes:test[:100].")
    name, start, stop = match.groups()
    return ScenesSource(name, config, size, int(start or 0), int(stop) if stop else None)
