"""The features of a whole data set, cached as one array: FILE.npy, and FILE.json beside it (`jaxsem.systems.feature_arrays`).

    threads: decode batch i + 2 | device: CLIP on batch i + 1 | this thread: write batch i

However many images there are, a few batches of crops are in memory. Rows have length 1 and the order of the source. The classes
of a folder are its sub-folders, those of scenes are known; other labels are the whole numbers under "label" in a source's
records, and the names of those the source's `class_names`, if it has such.
"""

import copy
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxsem.backbones.clip_inputs import square_crop
from jaxsem.data.images import pixels_from
from jaxsem.data.photos import PhotoFolder
from jaxsem.data.scenes import CLASSES, ScenesSource
from jaxsem.data.sources import Source
from jaxsem.errors import InputError, WeightsError
from jaxsem.systems.clip_model import ClipModel, default_batch, prepare_ahead
from jaxsem.systems.feature_arrays import FeatureWriter, Record, check_features_output, read_array, read_features

__all__ = ["check_features_output", "extract", "image_count", "read_array", "read_features"]

_ROUNDING = 0.01  # how far the length of a unit feature may be from 1


def extract(
    model: ClipModel,
    source: Source,
    path: str | os.PathLike,
    batch: int | None = None,
    mesh: Mesh | None = None,
    limit: int | None = None,
    force: bool = False,
    on_batch: Callable[[int], Any] | None = None,
    *,
    half: bool = False,
    data: str = "",
    on_failure: Callable[[str, InputError], Any] | None = None,
) -> Path:
    """Writes the unit features of every image of a source; nothing appears under the name before all of it is there.

    Args:
      model: CLIP.
      source: Images, read by several threads at once.
      path: The array, FILE.npy; the record goes to FILE.json.
      batch: Images a device batch over all devices; None is `default_batch(mesh)`.
      mesh: Devices of this process that share each batch along `data` (`jaxsem.training.make_mesh`); None is the default one.
      limit: Take the first so many images only.
      force: Replace existing files.
      on_batch: Told after each batch how many features it added.
      half: Store float16 instead of float32.
      data: What the record calls the source.
      on_failure: Told the name and the error of each image that cannot be read, which is then left out; None stops there.

    Returns:
      The array's path.

    Raises:
      InputError: An empty source, a limit below 1, a name that is not FILE.npy, a mesh or batch that does not fit, an image
        that cannot be read, or none that can.
      WeightsError: A feature has no direction.
      OutputError: A file exists and `force` is false, or cannot be written.
    """
    _check_local(mesh)
    count, size = image_count(source, limit), batch or default_batch(mesh)
    notes = _Notes(source)
    rows = prepare_ahead(partial(_read, _lean(source), model.image_size), range(count), size)
    batches = model.encode_batches(_crops(rows, notes, on_failure), size, mesh=mesh)
    with FeatureWriter(path, model.width, "float16" if half else "float32", force) as writer:
        for features in batches:
            _check_unit(features, notes.names(writer.count), model.name)
            writer.write(features)
            if on_batch is not None:
                on_batch(len(features))
        if not writer.count:
            raise InputError(f"none of the {count} images could be read: there is no feature to write")
        writer.finish({"model": model.name, "image_size": model.image_size, "data": data, **notes.fields()})
    return Path(path)


def image_count(source: Source, limit: int | None = None) -> int:
    """How many images of a source are taken.

    Raises:
      InputError: There is none, or the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise InputError(f"the limit is at least 1 image, not {limit}")
    if not len(source):
        raise InputError("the data set is empty: it has no image to take a feature of")
    return len(source) if limit is None else min(limit, len(source))


# -- from source to crops -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """What was read of one image: its crop, or the error."""

    index: int
    crop: np.ndarray | None = None
    label: int | None = None
    classes: list[int] | None = None
    error: InputError | None = None


def _lean(source: Source) -> Source:
    """The source with less in its records, where that makes them faster."""
    if isinstance(source, ScenesSource):
        source = copy.copy(source)
        source.fields = ("image", "classes")
    return source


def _read(source: Source, side: int, index: int) -> _Row:
    try:
        record = source[index]
        crop = square_crop(pixels_from(record["image"]), side)
    except InputError as error:
        return _Row(index, error=error)
    label, classes = np.asarray(record.get("label")), record.get("classes")
    return _Row(
        index,
        crop,
        int(label) if label.ndim == 0 and label.dtype.kind in "iu" else None,
        [int(number) for number in classes if number >= 0] if isinstance(source, ScenesSource) else None,
    )


def _crops(rows: Iterable[list[_Row]], notes: "_Notes", on_failure: Callable | None) -> Iterator[np.ndarray]:
    """Batches of crops uint8 [1 or more, side, side, 3], after they were noted."""
    for part in rows:
        for row in part:
            if row.error is None:
                notes.add(row)
            elif on_failure is None:
                raise row.error
            else:
                on_failure(notes.name_of(row.index), row.error)
        if crops := [row.crop for row in part if row.crop is not None]:
            yield np.stack(crops)


class _Notes:
    """What the record says of each image, in the order of the features."""

    def __init__(self, source: Source):
        self._paths: list[str] | None = None
        self._kept: list[int] = []
        self._labels: list[int | None] = []
        self._classes: list[list[int] | None] = []
        self._class_names = list(getattr(source, "class_names", ()))
        if isinstance(source, PhotoFolder):
            places = [path.relative_to(source.folder) for path in source.paths]
            self._paths = [place.as_posix() for place in places]
            self._folders = [place.parts[0] if len(place.parts) > 1 else None for place in places]
            self._class_names = sorted({folder for folder in self._folders if folder is not None})
            self._numbers = {name: number for number, name in enumerate(self._class_names)}
        elif isinstance(source, ScenesSource):
            self._class_names = list(CLASSES)

    def add(self, row: _Row) -> None:
        """Notes an image; its feature comes next."""
        label = row.label
        if self._paths is not None and self._class_names:
            label = self._numbers.get(self._folders[row.index], -1)
        elif row.classes is not None and len(row.classes) == 1:
            [label] = row.classes
        self._kept.append(row.index)
        self._labels.append(label)
        self._classes.append(row.classes)

    def name_of(self, index: int) -> str:
        """What people call the image of the source with this number."""
        return f"image {index}" if self._paths is None else self._paths[index]

    def names(self, start: int) -> Iterator[str]:
        """What people call the images of the features from one on."""
        return map(self.name_of, self._kept[start:])

    def fields(self) -> Record:
        """The fields of the record; labels and classes only if all images have them."""
        fields: Record = {}
        if self._paths is not None:
            fields["names"] = [self._paths[index] for index in self._kept]
        if None not in self._labels:
            fields["labels"] = self._labels
        if None not in self._classes:
            fields["classes"] = self._classes
        if self._class_names and ("labels" in fields or "classes" in fields):
            fields["class_names"] = self._class_names
        return fields


def _check_local(mesh: Mesh | None) -> None:
    if mesh is not None and any(device.process_index != jax.process_index() for device in mesh.devices.flat):
        raise InputError(
            "features are extracted by one process: give make_mesh(devices=jax.local_devices()) and each process its own data"
        )


def _check_unit(features: np.ndarray, names: Iterator[str], model: str) -> None:
    # What is NaN or infinite before it is made unit comes out as zeros.
    good = np.abs(np.linalg.norm(features, axis=1) - 1) < _ROUNDING
    for known, name in zip(good, names):
        if not known:
            raise WeightsError(
                f"{model} gives no direction for {name}, but NaN, infinity or zeros: its weights are damaged, or its type of "
                "numbers is too small for them"
            )
