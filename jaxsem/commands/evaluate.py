"""`jaxsem eval`: real bytes, estimated bits and metrics of a codec on a data set."""

from argparse import Namespace

from jaxsem.cache import enable_compilation_cache
from jaxsem.commands import console, paths
from jaxsem.commands.weights import open_codec
from jaxsem.data.sources import open_source
from jaxsem.evaluation import at_qualities, evaluate, image_count
from jaxsem.files import check_output
from jaxsem.progress import Progress
from jaxsem.results import Record, to_json, write_json

_HEADS = {
    "quality": "quality",
    "bpp": "bpp",
    "payload_bpp": "payload bpp",
    "estimated_bpp": "estimated bpp",
    "psnr": "PSNR dB",
    "ms_ssim": "MS-SSIM",
}
_FORMS = {"quality": "g", "psnr": ".2f"}


def run(args: Namespace) -> int:
    """Evaluates the preset of `args`; returns the exit status."""
    streams = args.json == paths.STANDARD
    if args.json is not None and not streams:
        check_output(args.json, args.force)
    source = open_source(args.data)
    count = image_count(source, args.limit)
    enable_compilation_cache()
    codec = open_codec(args.preset, args.weights, args.preset, arithmetic=args.arithmetic)
    steps = count * len(at_qualities(codec, args.quality))
    with Progress(steps, "measurements", args.quiet) as progress:
        record = evaluate(codec, source, args.quality, args.limit, args.data, progress.step)
    if streams:
        console.say(to_json(record))
        return 0
    if args.json is not None:
        write_json(args.json, record, args.force)
    if not args.quiet:
        console.say(as_text(record, count))
    return 0


def as_text(record: Record, count: int) -> str:
    """The means of a record as a table."""
    rows = [[_cell(name, row.get(name)) for name in _HEADS] for row in record["results"]]
    title = f"{record['preset']} on {record['data']}, means over {count} images ({record['hardware']})"
    return f"{title}\n{console.table([list(_HEADS.values()), *rows], left=0)}"


def _cell(name: str, value: float | None) -> str:
    return "-" if value is None else format(value, _FORMS.get(name, ".4f"))
