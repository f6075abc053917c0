"""Evaluation of a codec of CLIP features: real bytes that were really decoded, and what the features are still good for."""

import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsem.container import pack, unpack
from jaxsem.data.scenes import ScenesSource
from jaxsem.data.sources import Source, open_source
from jaxsem.evaluation import at_qualities
from jaxsem.results import Record, Row, make_record
from jaxsem.systems.extraction import extract, read_features
from jaxsem.systems.feature_codec import PACKET, FeatureCodec, features_of
from jaxsem.wire import Item

_BLOCK = 512  # features that are coded at a time


def evaluate_features(
    codec: FeatureCodec,
    data: str | Source,
    qualities: Sequence[float] | None = None,
    limit: int | None = None,
    name: str | None = None,
    on_image: Callable[[], None] = lambda: None,
    templates: Sequence[str] | None = None,
) -> Record:
    """Measures a codec of features at several qualities.

    Every feature becomes the bytes of a `.jsem` file, and what is measured is decoded from these bytes.

    Args:
      codec: The codec; its own quality does not matter.
      data: As for `jaxsem.evaluate`, or a file of `jaxsem features` (FILE.npy).
      qualities: What to measure; all by default.
      limit: Use the first so many images only.
      name: What the record calls the data.
      on_image: Called after each image at each quality, to show progress.
      templates: Prompts for class names; CLIP's own by default.

    Returns:
      The record of `jaxsem.results`. Its rows have `bpp` (of the whole file, over the pixels that CLIP sees), `bytes` (the whole
      file), `bits` (the stream alone), `bpd` (those a dimension), `estimated_bits` and `cosine`; where the data has classes,
      `accuracy` and `accuracy_before` compression: zero-shot among the classes that occur in the data, right if the answer is in
      the picture; and for scenes `recall_1` and `recall_5`: whether a picture's own caption is among the 1 or 5 nearest of the
      captions of all pictures.

    Raises:
      InputError: A quality that the codec does not have, or data that is missing, empty or damaged.
    """
    codecs = at_qualities(codec, qualities)
    label = name or (data if isinstance(data, str) else type(data).__name__)
    features, notes = _features(codec, data, limit)
    right, classes = _classes(codec, notes, len(features), templates)
    before = None if right is None else right[np.arange(len(features)), (features @ classes.T).argmax(axis=1)]
    texts = _captions(codec, data, len(features))
    names = notes.get("names") or [f"{k:06d}" for k in range(len(features))]
    rows: list[Row] = []
    for at in codecs:
        for start in range(0, len(features), _BLOCK):
            part = np.asarray(features[start : start + _BLOCK], np.float32)
            indices = at.indices(part)
            estimates = at.level.coder.ideal_bits(indices)
            files = [pack(Item(0, 0, {PACKET: packet}), at.digest) for packet in at.pack(indices)]
            items = [unpack(file).items[0] for file in files]
            decoded = features_of(at, items)
            cosines = (decoded * part).sum(axis=1) / np.linalg.norm(part, axis=1)
            ranks = None if texts is None else _ranks(decoded, texts, start)
            answers = None if right is None else (decoded @ classes.T).argmax(axis=1)
            for k, (file, item) in enumerate(zip(files, items, strict=True)):
                bits = 8 * (len(item.sections[PACKET]) - 1)
                row = {
                    "image": names[start + k],
                    "quality": at.quality,
                    "bpp": 8 * len(file) / codec.clip.image_size**2,
                    "bytes": len(file),
                    "bits": bits,
                    "bpd": bits / codec.clip.width,
                    "estimated_bits": float(estimates[k]),
                    "cosine": float(cosines[k]),
                }
                if right is not None:
                    row["accuracy"] = float(right[start + k, answers[k]])
                    row["accuracy_before"] = float(before[start + k])
                if ranks is not None:
                    row |= {f"recall_{k_nearest}": float(ranks[k] < k_nearest) for k_nearest in (1, 5)}
                rows.append(row)
                on_image()
    return make_record(codec.name, label, rows)


def count_features(path: str, limit: int | None) -> int:
    """How many features of a file are measured; errors as from `read_features`."""
    return len(read_features(path)[0][:limit])


def _features(codec: FeatureCodec, data: str | Source, limit: int | None) -> tuple[np.ndarray, dict[str, Any]]:
    """The features and their record, from a file or freshly extracted."""
    if isinstance(data, str) and data.endswith(".npy"):
        features, notes = read_features(data)
        return features[:limit], notes
    source = open_source(data) if isinstance(data, str) else data
    with tempfile.TemporaryDirectory() as folder:
        path = extract(codec.clip, source, Path(folder, "features.npy"), limit=limit)
        features, notes = read_features(path)
        return np.array(features), notes


def _captions(codec: FeatureCodec, data: str | Source, count: int) -> np.ndarray | None:
    """The features of a caption of each scene, the one with everything; None for other data."""
    if isinstance(data, str):
        if data.endswith(".npy"):
            return None
        data = open_source(data)
    if not isinstance(data, ScenesSource):
        return None
    source = copy.copy(data)
    source.fields = ("captions",)
    return codec.clip.encode_texts([str(source[k]["captions"][-1]) for k in range(count)])


def _ranks(features: np.ndarray, texts: np.ndarray, start: int) -> np.ndarray:
    """How many captions are nearer to each feature than its own, which begin at `start`."""
    scores = features @ texts.T
    own = scores[np.arange(len(features)), start + np.arange(len(features))]
    return (scores > own[:, None]).sum(axis=1)


def _classes(
    codec: FeatureCodec, notes: dict[str, Any], count: int, templates: Sequence[str] | None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Which classes are right for each image, bool [count, c], and the classes' features; None without classes."""
    names = notes.get("class_names")
    present = notes.get("classes") or [[label] for label in notes.get("labels", ())]
    if not names or not present:
        return None, None
    present = [[number for number in numbers if number >= 0] for numbers in present[:count]]
    occurring = sorted({number for numbers in present for number in numbers})
    if not occurring:
        return None, None
    right = np.array([[number in numbers for number in occurring] for numbers in present])
    return right, codec.clip.class_features([names[number] for number in occurring], templates)
