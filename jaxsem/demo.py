"""`jaxsem demo`: compresses photos and scenes, decodes the files again, and writes one page with pictures and a table."""

import html
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from jaxsem import feature_demo, neck_demo, pipeline, presets
from jaxsem.codec import Codec
from jaxsem.container import pack
from jaxsem.data.images import list_images, read_image, write_image
from jaxsem.demo_page import STYLE
from jaxsem.files import check_output, make_folder, write_file
from jaxsem.metrics import anchors
from jaxsem.progress import Progress
from jaxsem.results import Row, hardware, image_row
from jaxsem.systems.feature_codec import FeatureCodec
from jaxsem.systems.neck_codec import Reader

PRESET = "elic-mini"
FEATURES_PRESET = "pqvae-mini"
NECK_PRESET = "transform-neck-mini-d2"
LANGUAGE_PRESET = "llava-mini"
_SIZE = (448, 298)  # width and height of the bundled photos on the page
_MARK = "<title>jaxsem demo</title>"
CREDITS = {
    "astronaut": "Eileen Collins, NASA, public domain",
    "chelsea": "Chelsea the cat by Stefan van der Walt, CC0",
    "coffee": "Coffee by Rachel Michetti, CC0",
    "rocket": "Falcon 9 by SpaceX, CC0",
}


def run_demo(
    out: str | Path,
    quiet: bool = False,
    force: bool = False,
    codec: Codec | None = None,
    photos: Mapping[str, np.ndarray] | None = None,
    features: FeatureCodec | None = None,
    reader: Reader | None = None,
) -> Path:
    """Runs the demo.

    Args:
      out: Folder for the page, its pictures and the `.jsem` files; made if need be. An earlier demo there is replaced.
      quiet: Whether to print nothing.
      force: Whether to replace files that no demo wrote.
      codec: What to show; the shipped preset by default.
      photos: Name and picture of what to compress; the bundled photos by default.
      features: The codec of features to show on scenes; the shipped preset by default.
      reader: What answers questions about files of scenes; the shipped presets, at their lowest rate, by default.

    Returns:
      The page, `index.html` in the folder.

    Raises:
      OutputError: The folder cannot be written, or it holds a page that no demo wrote and `force` is not given.
    """
    page = make_folder(out) / "index.html"
    force = force or (page.is_file() and _MARK.encode() in page.read_bytes())
    check_output(page, force)
    codec = codec or presets.load(PRESET)
    if photos is None:
        photos = {path.stem: _fitted(read_image(path)) for path in list_images(presets.BUNDLED_PHOTOS)}
    qualities = range(max(len(codec.lambdas), 1))
    rows: list[Row] = []
    with Progress(len(photos) * len(qualities), "files", quiet) as progress:
        for name, photo in photos.items():
            write_image(page.parent / f"{name}.png", photo, force)
            for quality in qualities:
                rows += _measure(codec.at_quality(quality), name, photo, page.parent, force)
                progress.step()
    features = features or presets.load(FEATURES_PRESET)
    shown = feature_demo.show_scenes(features, page.parent, force, quiet)
    reader = reader or Reader(presets.load(NECK_PRESET, quality=0), presets.load_mllm(LANGUAGE_PRESET))
    answered = neck_demo.show_answers(reader, page.parent, force, quiet)
    scenes = feature_demo.section(features, shown) + neck_demo.section(reader, answered)
    write_file(page, _page(codec, photos, rows, scenes).encode(), force)
    if not quiet:
        print(_summary(codec, rows))
        print(feature_demo.summary(shown))
        print(neck_demo.summary(answered))
        print(f"The page with the pictures: {page}")
    return page


def _fitted(photo: np.ndarray) -> np.ndarray:
    """The photo at the size that all on the page have, so that its programs are compiled once."""
    return np.asarray(ImageOps.fit(Image.fromarray(photo), _SIZE, Image.Resampling.LANCZOS, centering=(0.5, 0.1)))


def _summary(codec: Codec, rows: list[Row]) -> str:
    lines = [f"{'photo':<12}{'quality':>8}{'bytes':>9}{'bpp':>8}{'PSNR, dB':>10}{'MS-SSIM':>9}"]
    for row in rows:
        if row["codec"] == codec.name:
            similarity = "" if row["ms_ssim"] is None else f"{row['ms_ssim']:.4f}"
            numbers = f"{row['quality']:>8g}{row['bytes']:>9,}{row['bpp']:>8.3f}{row['psnr']:>10.2f}{similarity:>9}"
            lines.append(f"{row['image']:<12}{numbers}")
    return "\n".join(lines)


def _measure(codec: Codec, name: str, photo: np.ndarray, out: Path, force: bool) -> list[Row]:
    """Compresses one photo to a real file, reads it back, and does the same with the JPEG of nearest size."""
    stem = f"{name}-q{codec.quality:g}"
    [result] = pipeline.compress_items(codec, [photo])
    data = pack(result.item, codec.digest)
    write_file(out / f"{stem}.jsem", data, force)
    [again] = pipeline.decompress(codec, [data])
    write_image(out / f"{stem}.png", again, force)
    row = image_row(name, codec.quality, len(data), photo, again, result.estimated_bits)
    mine = {**row, "bytes": len(data), "codec": codec.name, "file": f"{stem}.png"}
    return [mine, *_jpeg(name, stem, photo, len(data), out, force)]


def _jpeg(name: str, stem: str, photo: np.ndarray, size: int, out: Path, force: bool) -> list[Row]:
    """The largest JPEG not above `size` bytes; none if even quality 1 is larger."""
    jpeg = anchors.find_anchor("jpeg")
    low, high = 0, 100  # invariant: quality `low` fits (or is 0), `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(anchors.encode(jpeg, photo, middle)) <= size else (low, middle)
    if low == 0:
        return []
    data = anchors.encode(jpeg, photo, low)
    file = f"{stem}-jpeg.jpg"
    write_file(out / file, data, force)
    row = image_row(name, low, len(data), photo, anchors.decode(data))
    return [{**row, "bytes": len(data), "codec": "JPEG", "file": file}]


# -- the page --------------------------------------------------------------------------------------------------------------


def _page(codec: Codec, photos: Mapping[str, np.ndarray], rows: list[Row], scenes: str) -> str:
    sections = "".join(_section(codec.name, name, photo, rows) for name, photo in photos.items())
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
{_MARK}<style>{STYLE}</style>
<h1>jaxsem: photos in a few kilobytes</h1>
<p>Each photo was compressed with <b>{html.escape(codec.name)}</b> to a real file at
{max(len(codec.lambdas), 1)} qualities and decoded from it again ({hardware()}). Below each reconstruction stands the best
JPEG that is no larger: optimised, 4:2:0. Rates count every byte of the file.</p>
{sections}
{scenes}
<h2>All numbers</h2>
{_table(rows)}
</html>
"""


def _section(codec: str, name: str, photo: np.ndarray, rows: list[Row]) -> str:
    height, width = photo.shape[:2]
    mine = [row for row in rows if row["image"] == name and row["codec"] == codec]
    original = _figure(f"{name}.png", width, height, f"<b>Original</b><br>{width} × {height}, 24 bpp")
    top = "".join(_figure(r["file"], width, height, _caption("Quality " + f"{r['quality']:g}", r)) for r in mine)
    bottom = ""
    for row in mine:
        jpeg = next((r for r in rows if r["codec"] == "JPEG" and r["file"].startswith(row["file"][:-4] + "-")), None)
        bottom += (
            _figure(jpeg["file"], width, height, _caption(f"JPEG {jpeg['quality']:g}", jpeg))
            if jpeg
            else f'<div class="none" style="aspect-ratio: {width}/{height}">No JPEG is this small:<br>quality 1 is larger</div>'
        )
    credit = html.escape(CREDITS.get(name, ""))
    return (
        f"<h2>{html.escape(name)}</h2><p>{credit}</p><div class='strip'>{original}{top}</div>"
        f"<div class='strip' style='margin-top: 1rem'><div></div>{bottom}</div>"
    )


def _figure(file: str, width: int, height: int, caption: str) -> str:
    alt = html.escape(caption.split("</b>")[0].replace("<b>", ""))
    return (
        f'<figure><img src="{html.escape(file)}" width="{width}" height="{height}" alt="{alt}" loading="lazy">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _caption(title: str, row: Row) -> str:
    quality = f"{row['psnr']:.2f} dB" + (f", MS-SSIM {row['ms_ssim']:.3f}" if row["ms_ssim"] is not None else "")
    return f"<b>{title}</b>: {row['bytes']:,} bytes<br>{row['bpp']:.3f} bpp, {quality}"


def _table(rows: list[Row]) -> str:
    names = ("Photo", "Codec", "Quality", "Bytes", "bpp", "Estimated bpp", "PSNR, dB", "MS-SSIM")
    head = "<tr>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"
    body = ""
    for row in rows:
        estimated = "" if row["estimated_bpp"] is None else f"{row['estimated_bpp']:.4f}"
        similarity = "" if row["ms_ssim"] is None else f"{row['ms_ssim']:.4f}"
        body += (
            f"<tr><td>{html.escape(row['image'])}</td><td>{row['codec']}</td><td>{row['quality']:g}</td><td>{row['bytes']:,}</td>"
            f"<td>{row['bpp']:.4f}</td><td>{estimated}</td><td>{row['psnr']:.2f}</td><td>{similarity}</td></tr>"
        )
    return f"<table>{head}{body}</table>"
