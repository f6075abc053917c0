"""Compare evaluated presets with JPEG, WebP and AVIF on the same images: BD-rate tables and a rate-distortion plot.

    jaxsem eval elic-mini --data PHOTOS --json elic-mini.json
    python tools/rd_curves.py elic-mini.json --data PHOTOS --out rd.png --cache anchors.json

Without a result file it shows the classic codecs alone. `--limit N` takes the first N images, from the results as well.
Each metric meets the AVIF tuning that is best at it: `tune=psnr` for PSNR, libaom's default for MS-SSIM. MS-SSIM is
compared in decibels, -10 log10(1 - MS-SSIM) of the mean. Needs nothing beyond jaxsem itself.
"""

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import PIL
import rd_plot
from PIL import Image, ImageOps, UnidentifiedImageError, features

from jaxsem import results
from jaxsem.errors import InputError, JaxsemError
from jaxsem.files import check_output
from jaxsem.metrics import anchors, bd_rate, distortion_interval
from jaxsem.metrics.bd_rate import pchip

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".avif")
BPP_RANGE = (0.1, 0.5)
RATES = (0.1, 0.2, 0.3, 0.5)
METRICS = {"psnr": "PSNR (dB)", "ms_ssim": "MS-SSIM (dB)"}
CLASSICS = {"psnr": ("jpeg", "webp", "avif-psnr"), "ms_ssim": ("jpeg", "webp", "avif")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; a mistake gives one sentence and the exit status 2."""
    options = _parser().parse_args(arguments)
    try:
        if options.out:
            rd_plot.check_suffix(options.out)
        for path in (options.out, options.json):
            if path:
                check_output(path, options.force)
        _run(options)
    except JaxsemError as error:
        print(f"rd_curves: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="*", metavar="RESULT.json", help="what `jaxsem eval --json` wrote")
    parser.add_argument("--data", required=True, metavar="FOLDER", help="the images that were evaluated")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    parser.add_argument("--out", metavar="PLOT", help="draw the curves (.png, .svg or .pdf)")
    parser.add_argument(
        "--anchors",
        nargs="+",
        choices=tuple(anchors.ANCHORS),
        default=tuple(anchors.ANCHORS),
        help="which classic codecs; all by default, and AVIF takes ten times as long as the others together",
    )
    parser.add_argument("--title", help="the line above the plot")
    parser.add_argument("--json", metavar="FILE", help="write the curves and tables")
    parser.add_argument("--cache", metavar="FILE", help="keep the measured curves of the classic codecs here")
    parser.add_argument("--method", choices=("pchip", "cubic"), default="cubic", help="curve model of the BD-rate")
    parser.add_argument("--force", action="store_true", help="replace existing output files")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def _run(options: argparse.Namespace) -> None:
    presets = [results.read_json(path) for path in options.records]
    images = find_images(options.data, options.limit)
    presets = [restrict(record, list(images), path) for record, path in zip(presets, options.records)]
    classics = measure_classics(images, options.data, options.cache, options.quiet, options.anchors)
    differences = compare_rates(presets, classics, options.method)
    qualities = qualities_at_rates([*presets, *classics.values()])
    print(f"{len(images)} images of {options.data}; {results.hardware()}; Pillow {PIL.__version__}.\n")
    print(bd_rate_table(differences, options.method) + "\n\n" + quality_table(qualities))
    if options.json:
        curves = [{key: value for key, value in r.items() if key != "images"} for r in [*presets, *classics.values()]]
        settings = {"method": options.method, "bpp_range": BPP_RANGE, "images": list(images)}
        results.write_json(
            options.json,
            {**settings, "bd_rate": differences, "quality_at_rate": qualities, "curves": curves},
            options.force,
        )
    if options.out:
        title = options.title or f"{len(images)} photos of {Path(options.data).resolve().name}"
        rd_plot.save(
            rd_plot.draw(panels(presets, classics), title=title, bpp_range=BPP_RANGE), options.out, options.force
        )


def find_images(folder: str, limit: int | None = None) -> dict[str, Path]:
    """The image files of a folder and its subfolders, by their path relative to it, in order of that path.

    Raises:
        InputError: if the folder has no images, or the limit is not positive.
    """
    if limit is not None and limit < 1:
        raise InputError(f"--limit takes a number of at least 1, not {limit}.")
    files = (path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    names = sorted((path.relative_to(folder).as_posix(), path) for path in files)
    if not names:
        raise InputError(f"{folder} is not a folder with images ({', '.join(SUFFIXES)}): check --data.")
    return dict(names[:limit])


def restrict(record: results.Record, names: Sequence[str], source: str) -> results.Record:
    """The record as if only these images had been evaluated, so that every curve is of the same images.

    Raises:
        InputError: if the record has not measured one of them.
    """
    missing = sorted(set(names) - {row["image"] for row in record["images"]})
    if missing:
        raise InputError(
            f"{source} has no row for {len(missing)} of the {len(names)} images, such as {missing[0]}: "
            f"evaluate on this folder ({record['data']} was evaluated), or take fewer with --limit."
        )
    rows = [row for row in record["images"] if row["image"] in set(names)]
    return {**record, "images": rows, "results": results.summarise(rows)}


def measure_classics(
    images: dict[str, Path],
    data: str,
    cache_path: str | None,
    quiet: bool = False,
    names: Sequence[str] = tuple(anchors.ANCHORS),
) -> dict[str, results.Record]:
    """Measure the named classic codecs, as far as this Pillow can write them, or take them from the cache."""
    cache = _read_cache(cache_path)
    records = {}
    for name in names:
        try:
            anchor = anchors.find_anchor(name)
        except InputError as error:
            print(f"rd_curves: {error}", file=sys.stderr)
            continue
        key = _cache_key(anchor, images)
        if key not in cache:
            progress = Progress(anchor.label, len(images) * len(anchor.qualities), quiet)
            cache[key] = anchors.measure(anchor, _read_images(images), data, on_row=progress.step)
            if cache_path:
                results.write_json(cache_path, cache, force=True)
        records[name] = cache[key]
    return records


def _read_cache(path: str | None) -> dict[str, results.Record]:
    if not path or not Path(path).exists():
        return {}
    try:
        cache = json.loads(Path(path).read_bytes())
        return {key: results.validate(record, path) for key, record in cache.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is not a cache of this command ({error}): delete it or name another.") from error


def _cache_key(anchor: anchors.Anchor, images: dict[str, Path]) -> str:
    """Everything that decides the curve: the settings, the codec's version, and the bytes of the images."""
    settings = {**asdict(anchor), "pillow": PIL.__version__, "version": features.version(anchor.feature)}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, path in images.items():
        digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
    return f"{anchor.name} {digest.hexdigest()}"


def _read_images(images: dict[str, Path]) -> Iterator[tuple[str, np.ndarray]]:
    for name, path in images.items():
        try:
            with Image.open(path) as image:
                yield name, np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise InputError(f"{path} cannot be read as an image ({error}): mend it or move it away.") from error


class Progress:
    """A line on stderr with the rate and the time left: once a second on a terminal, every 20 s elsewhere."""

    def __init__(self, label: str, total: int, quiet: bool):
        self.label, self.total, self.done = label, total, 0
        self.start = self.shown = time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.interval = math.inf if quiet else 1.0 if self.terminal else 20.0

    def step(self, _row: results.Row | None = None) -> None:
        """Count one more measurement."""
        self.done += 1
        now = time.monotonic()
        finished = self.done == self.total and self.interval < math.inf
        if now - self.shown >= self.interval or finished:
            self.shown = now
            rate = self.done / max(now - self.start, 1e-9)
            line = f"{self.label}: {self.done}/{self.total}, {rate:.1f}/s, {(self.total - self.done) / rate:.0f} s left"
            end = "\n" if finished or not self.terminal else "\r"
            print(f"{line:<70}" if self.terminal else line, end=end, file=sys.stderr, flush=True)


def curve(record: results.Record, metric: str) -> np.ndarray:
    """The points (bpp, metric in dB) of a record; MS-SSIM as -10 log10(1 - MS-SSIM)."""
    points = results.rate_points(record, metric)
    if metric == "ms_ssim":
        points = points[points[:, 1] < 1]
        points[:, 1] = -10 * np.log10(1 - points[:, 1])
    return points


def panels(presets: Sequence[results.Record], classics: dict[str, results.Record]) -> dict:
    """The curves of each panel of the figure."""

    def classic_curves(metric):
        shown = [(_short(n), curve(classics[n], metric)) for n in CLASSICS[metric] if n in classics]
        return [item for item in shown if len(item[1])]

    def preset_curves(metric):
        return [(record["preset"], points) for record in presets if len(points := curve(record, metric))]

    return {label: (preset_curves(metric), classic_curves(metric)) for metric, label in METRICS.items()}


def compare_rates(presets: Sequence[results.Record], classics: dict[str, results.Record], method: str) -> list[dict]:
    """The BD-rate of every preset and classic codec against every classic codec, in both metrics, over `BPP_RANGE`.

    Returns:
        Rows with `codec`, `metric`, `anchor`, `percent`, and the qualities `low` and `high` that were compared; these
        three are None, with a `reason`, where the curves cannot be compared.
    """
    rows = []
    for metric, names in CLASSICS.items():
        names = [name for name in names if name in classics]
        for record in [*presets, *(classics[name] for name in names)]:
            for name in names:
                if record is classics[name]:
                    continue
                anchor, test = curve(classics[name], metric), curve(record, metric)
                row = {"codec": record["preset"], "metric": metric, "anchor": name, "percent": None}
                try:
                    low, high = distortion_interval(anchor, test, bpp_range=BPP_RANGE)
                    row |= {
                        "percent": bd_rate(anchor, test, method=method, bpp_range=BPP_RANGE),
                        "low": low,
                        "high": high,
                    }
                except InputError as error:
                    row |= {"low": None, "high": None, "reason": str(error)}
                rows.append(row)
    return rows


def qualities_at_rates(records: Sequence[results.Record]) -> list[dict]:
    """What each codec reaches at `RATES` by interpolation, None outside its measured rates."""
    rows = []
    for metric in METRICS:
        for record in records:
            points = curve(record, metric)
            if len(points) < 2 or (record["preset"] in anchors.ANCHORS and record["preset"] not in CLASSICS[metric]):
                continue
            points = points[np.argsort(points[:, 0])]
            value, _ = pchip(np.log(points[:, 0]), points[:, 1])
            inside = [points[0, 0] <= rate <= points[-1, 0] for rate in RATES]
            values = [float(value(np.log(rate))) if known else None for rate, known in zip(RATES, inside)]
            lowest = {"lowest_bpp": float(points[0, 0]), "lowest_value": float(points[0, 1])}
            rows.append({"codec": record["preset"], "metric": metric, "bpp": RATES, "values": values, **lowest})
    return rows


def _short(name: str) -> str:
    """The name without its tuning, which differs between the metrics: "AVIF" for both."""
    return anchors.ANCHORS[name].label.split()[0]


def bd_rate_table(rows: Sequence[dict], method: str) -> str:
    """A markdown table of `compare_rates`."""
    columns = [name for name in ("JPEG", "WebP", "AVIF") if name in {_short(row["anchor"]) for row in rows}]
    lines = [f"BD-rate ({method}) at the qualities the anchor has at {BPP_RANGE[0]} to {BPP_RANGE[1]} bpp:", ""]
    lines += ["| codec | metric | " + " | ".join(f"against {name}" for name in columns) + " |"]
    lines += ["|---|---|" + "---|" * len(columns)]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        value = "not comparable"
        if row["percent"] is not None:
            value = f"{row['percent']:+.1f} % ({row['low']:.1f} to {row['high']:.1f} dB)"
        cells.setdefault((row["codec"], row["metric"]), {})[_short(row["anchor"])] = value
    for (codec, metric), values in cells.items():
        lines.append(f"| {codec} | {METRICS[metric]} | " + " | ".join(values.get(name, "") for name in columns) + " |")
    reasons = dict.fromkeys(row["reason"] for row in rows if "reason" in row)
    return "\n".join([*lines, *(f"\n{reason}" for reason in reasons)])


def quality_table(rows: Sequence[dict]) -> str:
    """A markdown table of `qualities_at_rates`."""
    lines = [
        "Quality at equal rate:",
        "",
        "| codec | metric | " + " | ".join(f"{rate} bpp" for rate in RATES) + " | lowest point |",
    ]
    lines += ["|---|---|" + "---|" * (len(RATES) + 1)]
    for row in rows:
        values = " | ".join("" if value is None else f"{value:.2f}" for value in row["values"])
        lowest = f"{row['lowest_value']:.2f} at {row['lowest_bpp']:.3f} bpp"
        lines.append(f"| {row['codec']} | {METRICS[row['metric']]} | {values} | {lowest} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
