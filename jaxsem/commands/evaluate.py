"""`jaxsem eval`: real bytes, estimated bits and metrics of a codec on a data set."""

from argparse import Namespace

from jaxsem.cache import enable_compilation_cache
from jaxsem.commands import console, paths
from jaxsem.commands.weights import open_codec
from jaxsem.data.sources import open_source
from jaxsem.evaluation import at_qualities, evaluate, image_count
from jaxsem.feature_evaluation import count_features
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
    "bytes": "bytes",
    "bits": "stream bits",
    "bpd": "bits/dimension",
    "cosine": "cosine",
    "accuracy_before": "accuracy before",
    "accuracy": "accuracy",
    "recall_1": "recall@1",
    "recall_5": "recall@5",
}
_FORMS = {"quality": "g", "psnr": ".2f", "bytes": ".1f", "bits": ".1f"}


def run(args: Namespace) -> int:
    """Evaluates the preset of `args`; returns the exit status."""
    streams = args.json == paths.STANDARD
    if args.json is not None and not streams:
        check_output(args.json, args.force)
    extracted = args.data.endswith(".npy")
    source = args.data if extracted else open_source(args.data)
    count = count_features(args.data, args.limit) if extracted else image_count(source, args.limit)
    enable_compilation_cache()
    codec = open_codec(args.preset, args.weights, args.preset, arithmetic=args.arithmetic, clip=args.clip)
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
    heads = {name: head for name, head in _HEADS.items() if any(name in row for row in record["results"])}
    rows = [[_cell(name, row.get(name)) for name in heads] for row in record["results"]]
    title = f"{record['preset']} on {record['data']}, means over {count} images ({record['hardware']})"
    return f"{title}\n{console.table([list(heads.values()), *rows], left=0)}"


def _cell(name: str, value: float | None) -> str:
    return "-" if value is None else format(value, _FORMS.get(name, ".4f"))
