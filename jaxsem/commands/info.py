"""`jaxsem info`: what `.jsem` files hold. It reads bytes only; no codec is loaded."""

from argparse import Namespace

from jaxsem.codec import parse_head
from jaxsem.commands import console, paths
from jaxsem.commands.console import Failures
from jaxsem.commands.weights import preset_of
from jaxsem.container import File, Item, byte_counts, unpack
from jaxsem.entropy.texts import unpack_text
from jaxsem.errors import FormatError, InputError
from jaxsem.files import read_bytes
from jaxsem.pipeline import PACKET
from jaxsem.systems.rsic_coding import CAPTION, MAP, read_head


def run(args: Namespace) -> int:
    """Describes the files of `args`; returns the exit status."""
    failures, records = Failures(), []
    for source in paths.find_sources(args.files, paths.list_jsem):
        try:
            data = console.read_bytes() if source.path is None else read_bytes(source.path)
            records.append(describe_file(str(source), data))
        except (FormatError, InputError) as error:
            failures.add(source, error)
            continue
        if not args.json:
            console.say(("\n" if len(records) > 1 else "") + as_text(records[-1]))
    if args.json:
        console.say_json({"files": records, "failed": failures.as_json()})
    return failures.report(len(records))


def describe_file(name: str, data: bytes) -> dict:
    """A file as plain JSON.

    Args:
      name: What to call it.
      data: Its bytes.

    Returns:
      `file`, `kind`, `version`, `weights` (the stored bytes of the digest, hexadecimal), `preset` (None if it is not
      shipped), `bytes`, `sections` (bytes by part), `pixels`, `bpp` (of the whole file; None without pixels) and
      `images`: `name`, `width`, `height` (0 for a feature), `quality` (None where a weight map says it), `arithmetic`, `levels` of
      the weight map, `caption`, `bytes` and `bpp` of each one's own sections.

    Raises:
      FormatError: The file is damaged, foreign or from a newer version.
    """
    file = unpack(data)
    pixels = sum(item.height * item.width for item in file.items)
    return {
        "file": name,
        "kind": file.kind,
        "version": file.version,
        "weights": file.digest.hex(),
        "preset": preset_of(file.digest),
        "bytes": len(data),
        "sections": byte_counts(data),
        "pixels": pixels,
        "bpp": _per_pixel(len(data), pixels),
        "images": _images(file),
    }


def as_text(record: dict) -> str:
    """The record of `describe_file` as tables for people."""
    preset = record["preset"] or "not among the shipped presets"
    images = record["images"]
    lines = [record["file"], f"  preset   {preset} (weights {record['weights']})"]
    if record["kind"] == "single":
        lines.append(f"  holds    {_kind(images[0])}, {_finer(images[0])}")
        if images[0]["caption"] is not None:
            lines.append(f"  caption  {images[0]['caption']!r}")
    else:
        lines.append(f"  archive  {len(images)} items")
    rate = f"{_number(record['bpp'], '.4f')} bits per pixel"
    lines.append(f"  size     {record['bytes']:,} bytes, {rate}; format version {record['version']}")
    parts = [(part, f"{size:,}", f"{100 * size / record['bytes']:.1f} %") for part, size in record["sections"].items()]
    lines += _indented(console.table([("section", "bytes", "share"), *parts]))
    if record["kind"] == "archive":
        head = ("item", "holds", "quality", "bytes", "bits per pixel")
        rows = [
            (
                image["name"] or f"item {place}",
                _kind(image),
                _number(image["quality"]),
                f"{image['bytes']:,}",
                _number(image["bpp"], ".4f"),
            )
            for place, image in enumerate(images, 1)
        ]
        lines += ["", *_indented(console.table([head, *rows]))]
    return "\n".join(lines)


def _kind(image: dict) -> str:
    return f"an image of {image['width']}x{image['height']}" if image["height"] else "a feature"


def _finer(image: dict) -> str:
    if image["levels"] is not None:
        return f"quality by a weight map of {image['levels']} levels"
    return f"quality {_number(image['quality'])}"


def _images(file: File) -> list[dict]:
    return [
        {
            "name": item.name,
            "width": item.width,
            "height": item.height,
            **_head(item),
            "bytes": sum(map(len, item.sections.values())),
            "bpp": _per_pixel(sum(map(len, item.sections.values())), item.height * item.width),
        }
        for item in file.items
    ]


def _head(item: Item) -> dict:
    packet = item.sections.get(PACKET)
    if MAP in item.sections and packet:  # of a codec that was told what matters
        quality, (levels, exact) = None, read_head(packet)
    else:
        (quality, exact), levels = parse_head(packet) if packet else (None, None), None
    caption = unpack_text(item.sections[CAPTION]) if CAPTION in item.sections else None
    arithmetic = None if exact is None else "exact" if exact else "float"
    return {"quality": quality, "arithmetic": arithmetic, "levels": levels, "caption": caption}


def _per_pixel(size: int, pixels: int) -> float | None:
    return 8 * size / pixels if pixels else None


def _number(value: float | None, form: str = "g") -> str:
    return "-" if value is None else format(value, form)


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()]
