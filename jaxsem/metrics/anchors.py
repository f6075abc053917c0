"""The curves of classic codecs, through Pillow at the settings that give its smallest files for the quality.

Measured like a preset and recorded in the same schema (`jaxsem.results`), so that a learned codec is compared with them
on the same images by the same metrics. The bytes are those of the whole file, headers included.
"""

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL
from jaxtyping import UInt8
from PIL import Image, features

from jaxsem.errors import InputError
from jaxsem.results import Record, Row, image_row, make_record


@dataclass(frozen=True)
class Anchor:
    """A classic codec with its settings.

    Attributes:
        name: the name in records.
        label: the name in tables and plots.
        format: Pillow's name of the format.
        feature: the name by which Pillow tells whether it was built with the format, and its version.
        options: arguments of `Image.save` besides the quality.
        qualities: a ladder that covers 0.05 to 0.6 bits per pixel on photographs, as far as the codec reaches.
    """

    name: str
    label: str
    format: str
    feature: str
    options: tuple[tuple[str, Any], ...]
    qualities: tuple[float, ...]


ANCHORS = {
    anchor.name: anchor
    for anchor in (
        Anchor(
            name="jpeg",
            label="JPEG",
            format="JPEG",
            feature="jpg",
            options=(("optimize", True), ("subsampling", "4:2:0")),
            qualities=(1, 3, 4, 5, 6, 7, 8, 10, 12, 15, 20, 25, 30, 40),
        ),
        Anchor(
            name="webp",
            label="WebP",
            format="WEBP",
            feature="webp",
            options=(("method", 6),),
            # Below 1 the steps are wide, and libwebp takes fractions.
            qualities=(0, 0.05, 0.1, 0.3, 0.6, 1, 2, 4, 7, 11, 16, 22, 30, 40),
        ),
        # libaom's default tuning for still images is for perceived quality: stronger in MS-SSIM, weaker in PSNR. Each
        # metric therefore meets the tuning that is best at it. Speed 4 is practical for whole data sets; speed 0 would
        # save another 3 to 4 % of the bytes for ten times the time (six photos, Pillow 13.0, libavif 1.4.2).
        Anchor(
            name="avif",
            label="AVIF",
            format="AVIF",
            feature="avif",
            options=(("speed", 4),),
            qualities=(0, 5, 7, 10, 13, 16, 20, 25, 30, 36, 42),
        ),
        Anchor(
            name="avif-psnr",
            label="AVIF tuned for PSNR",
            format="AVIF",
            feature="avif",
            options=(("speed", 4), ("advanced", (("tune", "psnr"),))),
            qualities=(0, 2, 3, 5, 7, 10, 13, 16, 20, 25, 30, 36),
        ),
    )
}
"""The classic codecs by name."""


def find_anchor(name: str) -> Anchor:
    """Look up a classic codec that this Pillow can write.

    Args:
        name: a key of `ANCHORS`.

    Returns:
        The codec.

    Raises:
        InputError: if there is no such codec, or Pillow was built without it.
    """
    if name not in ANCHORS:
        raise InputError(f"There is no classic codec {name!r}; there are {', '.join(ANCHORS)}.")
    anchor = ANCHORS[name]
    if not features.check(anchor.feature):
        raise InputError(
            f"This Pillow ({PIL.__version__}) was built without {anchor.format}: "
            f"install the wheel from PyPI (pip install --upgrade pillow), or leave {name} out."
        )
    return anchor


def encode(anchor: Anchor, image: UInt8[np.ndarray, "h w c"], quality: float) -> bytes:
    """Compress one image with a classic codec.

    Args:
        anchor: the codec.
        image: uint8 `[height, width, 3]`.
        quality: its quality, 0 to 100; whole numbers except for WebP.

    Returns:
        The whole file, without any metadata.
    """
    options = {key: dict(value) if isinstance(value, tuple) else value for key, value in anchor.options}
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, anchor.format, quality=quality, **options)
    return buffer.getvalue()


def decode(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """Decode what `encode` wrote to uint8 RGB."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def measure(
    anchor: Anchor,
    images: Iterable[tuple[str, UInt8[np.ndarray, "h w 3"]]],
    data: str,
    *,
    qualities: Sequence[float] | None = None,
    on_row: Callable[[Row], None] | None = None,
) -> Record:
    """Measure the rate-distortion curve of a classic codec.

    Args:
        anchor: the codec (`find_anchor`).
        images: pairs of name and uint8 RGB image; each is needed only while it is measured, so a generator serves.
        data: the name of the data for the record.
        qualities: the qualities to measure; the codec's own ladder by default.
        on_row: called with each row as it is done, to show progress.

    Returns:
        A record whose preset is the codec's name and whose `estimated_bpp` is None.

    Raises:
        InputError: if there are no images or no qualities.
    """
    rows = []
    for name, image in images:
        for quality in anchor.qualities if qualities is None else qualities:
            file = encode(anchor, image, quality)
            rows.append(image_row(name, quality, len(file), image, decode(file)))
            if on_row:
                on_row(rows[-1])
    codec_version = features.version(anchor.feature) or "unknown"
    return make_record(anchor.name, data, rows, {"pillow": PIL.__version__, anchor.feature: codec_version})
