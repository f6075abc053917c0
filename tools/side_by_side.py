"""A picture for people: photos, what `.jsem` files of them give back, and JPEG and WebP files of no fewer bytes.

    python tools/side_by_side.py PHOTO... [--preset elic-mini] [--quality 1] [--crop 256] --out side_by_side.jpg

Every row is a photo; under each picture stand the real bytes of the file and its PSNR on the whole photo.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

import jaxsem
from jaxsem.data.images import read_image
from jaxsem.files import check_output
from jaxsem.metrics import anchors, psnr

NAMES = {"jpeg": "JPEG", "webp": "WebP"}


def smallest_not_below(name: str, photo: np.ndarray, size: int) -> bytes:
    """The smallest file of a classic codec with at least `size` bytes, or its smallest of all: it is never at a disadvantage."""
    anchor = anchors.find_anchor(name)
    files = sorted((anchors.encode(anchor, photo, quality) for quality in range(0, 60)), key=len)
    return next((data for data in files if len(data) >= size), files[-1])


def panels(codec: jaxsem.Codec, photo: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Title and picture of every column."""
    [data] = jaxsem.compress(codec, [photo])
    [again] = jaxsem.decompress(codec, [data])
    columns = [("original", photo), (label(f"jaxsem {codec.name}", data, photo, again), again)]
    for name, title in NAMES.items():
        other = smallest_not_below(name, photo, len(data))
        picture = anchors.decode(other)
        columns.append((label(title, other, photo, picture), picture))
    return columns


def label(title: str, data: bytes, photo: np.ndarray, picture: np.ndarray) -> str:
    """Name, bytes, bits per pixel and PSNR."""
    bpp = 8 * len(data) / (photo.shape[0] * photo.shape[1])
    return f"{title}: {len(data):,} bytes\n{bpp:.3f} bpp, {float(psnr(photo, picture)):.2f} dB"


def centre(picture: np.ndarray, crop: int) -> np.ndarray:
    """The centre square of side `crop`; 0 is the whole picture."""
    top, left = (max(side - crop, 0) // 2 if crop else 0 for side in picture.shape[:2])
    return picture[top : top + crop, left : left + crop] if crop else picture


def draw(rows: list[list[tuple[str, np.ndarray]]], crop: int, path: Path) -> None:
    """Writes the figure."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [[(title, centre(picture, crop)) for title, picture in row] for row in rows]
    heights = [3.1 * row[0][1].shape[0] / row[0][1].shape[1] + 0.45 for row in rows]
    figure, axes = plt.subplots(
        len(rows), len(rows[0]), figsize=(3.1 * len(rows[0]), sum(heights)), height_ratios=heights, squeeze=False
    )
    for row, line in zip(rows, axes, strict=True):
        for (title, picture), axis in zip(row, line, strict=True):
            axis.imshow(picture, interpolation="lanczos")
            axis.set_title(title, fontsize=9, loc="left")
            axis.axis("off")
    figure.tight_layout()
    options = {"quality": 92} if path.suffix in (".jpg", ".jpeg", ".webp") else {}
    figure.savefig(path, dpi=110, pil_kwargs=options)


def main(argv: list[str] | None = None) -> int:
    """Runs the tool; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", metavar="PHOTO", type=Path)
    parser.add_argument("--preset", default="elic-mini")
    parser.add_argument("--quality", type=float, default=1)
    parser.add_argument("--crop", type=int, default=0, help="show only the centre square of this side")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--force", action="store_true", help="replace an existing picture")
    options = parser.parse_args(argv)
    jaxsem.enable_compilation_cache()
    try:
        check_output(options.out, options.force)
        codec = jaxsem.load(options.preset, quality=options.quality)
        draw([panels(codec, read_image(photo)) for photo in options.photos], options.crop, options.out)
    except jaxsem.JaxsemError as error:
        print(f"side_by_side: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
