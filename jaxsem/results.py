"""The one record of an evaluation, whatever was measured: one of the five systems or a classic codec.

A record is a dictionary that is its own JSON:

    {"preset":   "elic-mini",                      what was measured: a preset, or a classic codec such as "jpeg"
     "data":     "photos/valid",                   on which images
     "hardware": "16-core x86_64, 1 x NVIDIA H200",
     "versions": {"jaxsem": "0.1.0", ...},
     "results":  [{"quality": 1, "bpp": 0.062, "estimated_bpp": 0.061, "psnr": 26.9, "ms_ssim": 0.91}, ...],
     "images":   [{"image": "a.jpg", "quality": 1, "bpp": ..., "estimated_bpp": ..., "psnr": ..., "ms_ssim": ...}, ...]}

`images` has one row per image and quality, named by its path relative to the data folder; `results` has their means,
one row per quality (`summarise`). `bpp` is real bytes, `estimated_bpp` the model's own estimate. Further metrics are
further keys. What has no finite value (the estimate of a classic codec, the MS-SSIM of a small image, the PSNR of a
lossless one) is null.
"""

import importlib.metadata
import json
import math
import numbers
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxsem.errors import InputError
from jaxsem.files import read_bytes, write_file
from jaxsem.metrics.ms_ssim import SMALLEST_MS_SSIM_SIDE, ms_ssim
from jaxsem.metrics.psnr import psnr
from jaxsem.version import __version__

Row = dict[str, Any]
Record = dict[str, Any]

NOT_AVERAGED = ("image", "quality", "width", "height")
_FIELDS = {"preset": str, "data": str, "hardware": str, "versions": dict, "results": list, "images": list}


def compare(original: np.ndarray, reconstruction: np.ndarray) -> dict[str, float | None]:
    """Measure one reconstruction; the dictionary goes into the image's row.

    Args:
        original: `[height, width, channels]`, uint8 (or floating point in 0..1, and then both).
        reconstruction: the same shape and kind.

    Returns:
        `psnr` in dB (`inf` for identical images) and `ms_ssim`, None where a side is below 161 pixels.

    Raises:
        InputError: if the two cannot be compared.
    """
    values: dict[str, float | None] = {"psnr": float(psnr(original, reconstruction)), "ms_ssim": None}
    if min(original.shape[:2]) >= SMALLEST_MS_SSIM_SIDE:
        # A channel at a time: the same mean in a third of the memory, half a gigabyte for 12 megapixels.
        planes = [(original[..., c : c + 1], reconstruction[..., c : c + 1]) for c in range(original.shape[2])]
        values["ms_ssim"] = float(np.mean([float(ms_ssim(x, y)) for x, y in planes]))
    return values


def image_row(
    image: str,
    quality: float,
    size: int,
    original: np.ndarray,
    reconstruction: np.ndarray,
    estimated_bits: float | None = None,
) -> Row:
    """The row of one image at one quality.

    Args:
        image: the name, its path relative to the data folder with forward slashes.
        quality: the quality it was compressed at.
        size: bytes of the whole compressed file.
        original: uint8 `[height, width, channels]`.
        reconstruction: what the file decodes to, the same shape.
        estimated_bits: the model's estimate for the image, None if it has none.

    Returns:
        The row with bits per pixel and metrics.

    Raises:
        InputError: if the two images cannot be compared.
    """
    height, width = original.shape[:2]
    pixels = height * width
    estimated = None if estimated_bits is None else float(estimated_bits) / pixels
    return {
        "image": image,
        "width": width,
        "height": height,
        "quality": quality,
        "bpp": 8 * size / pixels,
        "estimated_bpp": estimated,
        **compare(original, reconstruction),
    }


def summarise(images: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Average the rows of single images to one row per quality, lowest quality first.

    Every image counts the same, whatever its size, and metrics are averaged as they are (dB for PSNR): the custom of
    published rate-distortion curves. An image without a value (null) is left out of that one mean, and a mean of no
    values is null; if PSNR is infinite for an image, so is the mean.

    Args:
        images: rows with `image`, `quality`, `bpp`, and any metrics as numbers or None.

    Returns:
        Rows with `quality` and the mean of every other measured key.

    Raises:
        InputError: if there are no rows, or the qualities do not cover the same images, for then their means could not
            be compared.
    """
    groups: dict[float, list[Mapping[str, Any]]] = {}
    for row in images:
        groups.setdefault(row["quality"], []).append(row)
    if not groups:
        raise InputError("There are no rows to summarise: no image was measured.")
    first = min(groups)
    covered = sorted(row["image"] for row in groups[first])
    for quality, rows in groups.items():
        if sorted(row["image"] for row in rows) != covered:
            raise InputError(
                f"Quality {quality} covers {len(rows)} images, not the same as the {len(covered)} of quality {first}: "
                f"measure every quality on the same images."
            )
    return [{"quality": quality, **_means(groups[quality])} for quality in sorted(groups)]


def _means(rows: Sequence[Mapping[str, Any]]) -> Row:
    names = dict.fromkeys(name for row in rows for name in row if name not in NOT_AVERAGED)
    means = {}
    for name in names:
        values = [row[name] for row in rows if row.get(name) is not None]
        means[name] = float(np.mean(values)) if values else None
    return means


def make_record(
    preset: str, data: str, images: Iterable[Mapping[str, Any]], extra_versions: Mapping[str, str] | None = None
) -> Record:
    """Build the record of an evaluation that ran in this process.

    Args:
        preset: what was measured.
        data: on which images, as the user named them.
        images: one row per image and quality (`image_row`).
        extra_versions: versions of further programs that shaped the result.

    Returns:
        The record, with `results` summarised.

    Raises:
        InputError: as `summarise`.
    """
    images = [dict(row) for row in images]
    return {
        "preset": preset,
        "data": data,
        "hardware": hardware(),
        "versions": {**versions(), **(extra_versions or {})},
        "results": summarise(images),
        "images": images,
    }


def rate_points(record: Record, metric: str) -> Float[np.ndarray, "n 2"]:
    """The rate-distortion curve of a record, as `bd_rate` takes it.

    Args:
        record: a record.
        metric: a key of its results, such as "psnr".

    Returns:
        `[n, 2]` pairs (bpp, metric) in the order of `results`, without the rows whose metric is null or not finite.
    """
    rows = [(row["bpp"], row.get(metric)) for row in record["results"]]
    return np.array([row for row in rows if row[1] is not None and math.isfinite(row[1])], np.float64).reshape(-1, 2)


def hardware() -> str:
    """Where this process runs, for example "2-core x86_64" or "16-core x86_64, 1 x NVIDIA H200"."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [f"{cores}-core {platform.machine()}"]
    kinds = [device.device_kind for device in jax.devices() if device.platform != "cpu"]
    parts += [f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)]
    return ", ".join(parts)


def versions() -> dict[str, str]:
    """The versions that decide a result: jaxsem, jax, flax, numpy and python."""
    return {
        "jaxsem": __version__,
        "jax": jax.__version__,
        "flax": importlib.metadata.version("flax"),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def write_json(path: str | os.PathLike, record: Any, force: bool = False) -> None:
    """Write a record, or anything made of dictionaries, lists, strings and numbers, as strict JSON.

    NumPy and JAX scalars become numbers; NaN and infinities, which JSON does not know, become null.

    Args:
        path: the file.
        record: what to write.
        force: replace an existing file.

    Raises:
        OutputError: if the file exists already and `force` is false, or cannot be written.
    """
    write_file(path, (to_json(record) + "\n").encode(), force)


def to_json(record: Any) -> str:
    """A record, or anything made of dictionaries, lists, strings and numbers, as strict JSON; see `write_json`."""
    return json.dumps(_plain(record), indent=1, allow_nan=False)


def read_json(path: str | os.PathLike) -> Record:
    """Read a record and check that it is one.

    Args:
        path: a file that `write_json` or `jaxsem eval --json` wrote.

    Returns:
        The record.

    Raises:
        InputError: if the file cannot be read, is not JSON, or does not follow the schema; it names the place.
    """
    text = read_bytes(path)
    try:
        record = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not a JSON file ({error}): give a file that `jaxsem eval --json` wrote."
        ) from error
    return validate(record, str(path))


def validate(record: Any, source: str = "the record") -> Record:
    """Check that a value follows the schema of this module.

    Args:
        record: what was read.
        source: its name in the error.

    Returns:
        The same value.

    Raises:
        InputError: names the first place that does not fit.
    """
    if not isinstance(record, dict):
        raise InputError(f"{source} is not a result of `jaxsem eval`: it holds {_kind(record)} instead of an object.")
    for field, kind in _FIELDS.items():
        if not isinstance(record.get(field), kind):
            found = f"has {_kind(record[field])} as '{field}'" if field in record else f"has no '{field}'"
            raise InputError(f"{source} is not a result of `jaxsem eval`: it {found}; evaluate again.")
    for part, needed in (("results", ("quality", "bpp")), ("images", ("image", "quality", "bpp"))):
        for i, row in enumerate(record[part]):
            _validate_row(row, needed, f"{source}, {part}[{i}],")
    return record


def _validate_row(row: Any, needed: Sequence[str], where: str) -> None:
    if not isinstance(row, dict):
        raise InputError(f"{where} is {_kind(row)} instead of an object; evaluate again.")
    for name in needed:
        if row.get(name) is None:
            raise InputError(f"{where} has no '{name}'; evaluate again.")
    for name, value in row.items():
        fits = isinstance(value, str) if name == "image" else value is None or _is_number(value)
        if not fits:
            raise InputError(f"{where} has {_kind(value)} as '{name}'; evaluate again.")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
