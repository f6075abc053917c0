"""Evaluation of a codec on a data set: real bytes that were really decompressed, beside the model's estimate."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxsem.codec import Codec
from jaxsem.container import pack
from jaxsem.data.photos import PhotoFolder
from jaxsem.data.sources import Source, open_source
from jaxsem.errors import InputError
from jaxsem.pipeline import compress_items, decompress
from jaxsem.results import Record, Row, image_row, make_record

_GROUP_ITEMS, _GROUP_PIXELS = 16, 1 << 24  # originals in memory at a time


def evaluate(
    codec: Codec,
    data: str | Source,
    qualities: Sequence[float] | None = None,
    limit: int | None = None,
    name: str | None = None,
    on_image: Callable[[], None] = lambda: None,
) -> Record:
    """Measures a codec at several qualities.

    Every image becomes the bytes of a `.jsem` file, and the metrics are of what `decompress` makes of these bytes. For a codec
    of features see `jaxsem.feature_evaluation.evaluate_features`, which this calls.

    Args:
      codec: The codec; its own quality does not matter.
      data: A folder, "tfds:name/split" or "scenes:split" (`jaxsem.data.sources`), or an opened source.
      qualities: What to measure; all whole qualities by default.
      limit: Use the first so many images only.
      name: What the record calls the data; by default `data` if that is a string.
      on_image: Called after each image at each quality, to show progress.

    Returns:
      The record of `jaxsem.results`, with `payload_bpp` (the file without header and checksum) beside `bpp`.

    Raises:
      InputError: A quality that the codec does not have, or data that is missing, empty or damaged.

    Example:
      >>> import jaxsem
      >>> record = jaxsem.evaluate(jaxsem.load("elic-mini"), "photos")   # doctest: +SKIP
      >>> record["results"][0]["bpp"]                                    # doctest: +SKIP
    """
    if not isinstance(codec, Codec):
        from jaxsem.feature_evaluation import evaluate_features

        return evaluate_features(codec, data, qualities, limit, name, on_image)
    codecs = at_qualities(codec, qualities)
    source = open_source(data) if isinstance(data, str) else data
    count = image_count(source, limit)
    rows: list[Row] = []
    for names, originals in _groups(source, count):
        for at_quality in codecs:
            for row in _measure(at_quality, names, originals):
                rows.append(row)
                on_image()
    return make_record(codec.name, name or (data if isinstance(data, str) else type(data).__name__), rows)


def at_qualities(codec: Codec, qualities: Sequence[float] | None) -> list[Codec]:
    """The codec at each quality, lowest first; at all whole ones for None.

    Raises:
      InputError: As from `Codec.at_quality`, or no quality is given.
    """
    wanted = range(codec.qualities) if qualities is None else sorted(set(qualities))
    if not wanted:
        raise InputError("there is no quality to measure: give at least one, or None for all")
    return list({at.quality: at for at in map(codec.at_quality, wanted)}.values())


def image_count(source: Source, limit: int | None) -> int:
    """How many images of a source are measured.

    Raises:
      InputError: There is none, or the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise InputError(f"the limit must be at least 1 image, not {limit}")
    if len(source) == 0:
        raise InputError("the data set is empty: there is nothing to measure")
    return len(source) if limit is None else min(limit, len(source))


def _groups(source: Source, count: int) -> Iterator[tuple[list[str], list[np.ndarray]]]:
    names, originals, pixels = [], [], 0
    for index in range(count):
        image = source[index]["image"]
        size = image.shape[0] * image.shape[1]
        if originals and (len(originals) == _GROUP_ITEMS or pixels + size > _GROUP_PIXELS):
            yield names, originals
            names, originals, pixels = [], [], 0
        names.append(_name(source, index))
        originals.append(image)
        pixels += size
    yield names, originals


def _name(source: Source, index: int) -> str:
    if isinstance(source, PhotoFolder):
        return source.paths[index].relative_to(source.folder).as_posix()
    return f"{index:06d}"


def _measure(codec: Codec, names: list[str], originals: list[np.ndarray]) -> Iterator[Row]:
    results = compress_items(codec, originals)
    files = [pack(result.item, codec.digest) for result in results]
    again = decompress(codec, files)
    for name, original, result, file, image in zip(names, originals, results, files, again, strict=True):
        row = image_row(name, codec.quality, len(file), original, image, result.estimated_bits)
        payload = sum(map(len, result.item.sections.values()))
        row["payload_bpp"] = 8 * payload / (original.shape[0] * original.shape[1])
        yield row
