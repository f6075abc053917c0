"""Where images come from, named by one string.

    path/to/folder          the images below a folder
    tfds:name/split         a data set prepared by TFDS, read without TensorFlow; the name may hold a config
                            ("name/config"), and the split may be sliced as in TFDS ("train[:90%]")
    scenes:split            our own drawn scenes, train, valid or test, or a range of them ("scenes:test[:100]"). Options
                            stand before the colon: "scenes/256:test" or "scenes/192x256:test" (height x width) for
                            another size than 128, "scenes/seen:train" or "scenes/unseen:test" for the classes of
                            objects, "scenes/objects=1:test" or "scenes/objects=2-3:test" for their number

A source is anything with a length and `source[i] -> {"image": uint8 [h, w, 3]}` that several threads may read at once.
"""

import difflib
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from jaxsem.data.photos import PhotoFolder
from jaxsem.data.scenes import open_scenes
from jaxsem.errors import InputError

_SCHEMES = ("tfds", "scenes")
_GIVE = "give a folder, tfds:name/split or scenes:split"


@runtime_checkable
class Source(Protocol):
    """Random access to images: a length, and `source[i]` with a uint8 [h, w, 3] array under "image"."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


def open_source(spec: str, data_dir: str | Path | None = None, cache_bytes: int = 0) -> Source:
    """Opens the source that a string names (see the module's docstring).

    Args:
        spec: A folder, "tfds:name/split" or "scenes:split".
        data_dir: Where TFDS keeps its data sets; by default TFDS' own choice.
        cache_bytes: For folders, how many bytes of decoded images to keep in memory.

    Raises:
        InputError: If the string names nothing that can be read; it says what is there instead.
    """
    if Path(spec).is_dir():
        return PhotoFolder(spec, cache_bytes)
    scheme, colon, rest = spec.partition(":")
    if colon and scheme == "tfds":
        return TfdsSource(rest, data_dir)
    if colon and scheme.partition("/")[0] == "scenes":
        return open_scenes(scheme.split("/")[1:], rest)
    if Path(spec).exists():
        raise InputError(f"{spec} is a file: give the folder it lies in, tfds:name/split or scenes:split")
    if colon and "/" not in scheme:
        raise InputError(f"there is no data source {scheme!r}{_did_you_mean(scheme, _SCHEMES)}: {_GIVE}")
    parent = Path(spec).parent
    names = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    raise InputError(f"the folder {spec} does not exist{_did_you_mean(Path(spec).name, names)}: {_GIVE}")


def first_images(source: Source, count: int) -> list[np.ndarray]:
    """The first images of a source, at most `count`, uint8 [h, w, 3]."""
    return [source[i]["image"] for i in range(min(count, len(source)))]


class TfdsSource:
    """A split of a prepared TFDS data set, without TensorFlow.

    A record is `{"image": uint8 [h, w, 3]}`, with "label", a whole number, where the data set has one class for each image; their
    names are `class_names`.

    Args:
        name: "name/split" or "name/config/split".
        data_dir: Where TFDS keeps its data sets.

    Raises:
        InputError: If TFDS is not installed, the data set not prepared as ArrayRecord, or without that split or images.
    """

    def __init__(self, name: str, data_dir: str | Path | None = None):
        dataset, slash, split = name.rpartition("/")
        if not (dataset and slash and split):
            raise InputError(
                f"tfds:{name} names no split: write tfds:name/split, like tfds:{dataset or split or 'name'}/train"
            )
        if importlib.util.find_spec("tensorflow_datasets") is None:
            raise InputError(
                f"tfds:{name} needs tensorflow-datasets, which is not installed: pip install 'jaxsem[tfds]'"
            )
        builder = _prepared_builder(dataset, data_dir)
        splits = sorted(builder.info.splits)
        if split.partition("[")[0].partition("+")[0] not in splits:
            raise InputError(
                f"{dataset} has no split {split!r}{_did_you_mean(split, splits)}; there are {', '.join(splits)}"
            )
        features = sorted(builder.info.features)
        if "image" not in features:
            raise InputError(f"the records of {dataset} have no 'image'; they have {', '.join(features)}")
        label = builder.info.features["label"] if "label" in features else None
        self.class_names = tuple(getattr(label, "names", None) or ())
        try:
            self._records = builder.as_data_source(split)
        except (ValueError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"tfds:{name} cannot be read ({reason}): prepare it with file_format='array_record'"
            ) from error

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        record = self._records[index]
        image = np.asarray(record["image"])
        # TFDS has decoded it to the channels its feature declares: grey becomes RGB, alpha is dropped.
        found = {"image": np.repeat(image[:, :, :1], 3, axis=2) if image.shape[2] < 3 else image[:, :, :3]}
        return {**found, "label": int(record["label"])} if self.class_names else found


def _prepared_builder(dataset: str, data_dir: str | Path | None):
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(dataset, data_dir=data_dir, try_gcs=False)
    except tfds.core.registered.DatasetNotFoundError:
        places = [Path(data_dir)] if data_dir is not None else []
        names = {p.name for place in places if place.is_dir() for p in place.iterdir() if p.is_dir()}
        hint = _did_you_mean(dataset, names | set(tfds.list_builders(with_community_datasets=False)))
        raise InputError(f"TFDS knows no data set {dataset!r} in {data_dir or 'its default folder'}{hint}") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"TFDS cannot open {dataset!r}: {str(error).splitlines()[0]}") from error
    if not builder.info.splits:
        raise InputError(
            f"{dataset} is not prepared in {builder.data_dir}: name another data_dir, or first run "
            f"tfds.builder({dataset!r}, file_format='array_record').download_and_prepare()"
        )
    return builder


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
