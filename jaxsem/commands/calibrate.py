"""`jaxsem calibrate`: gives a codec exact arithmetic and writes its weights."""

from argparse import Namespace
from datetime import date

from jaxsem import presets
from jaxsem.calibration import calibrate
from jaxsem.codecs import system_of
from jaxsem.commands import console
from jaxsem.data.sources import first_images, open_source
from jaxsem.files import check_output


def run(args: Namespace) -> int:
    """Calibrates the codec of `args`; returns the exit status."""
    path = presets.weights_path(args.output)
    check_output(path, args.force)
    codec = presets.load(args.preset, weights=args.weights, arithmetic="float")
    if args.data is None:
        photos = presets.bundled_photos()
    else:
        source = open_source(args.data)
        photos = first_images(source, args.limit)
    codec = calibrate(codec, photos)
    photos_of = {"photos": len(photos), "of": args.data or "the bundled ones", "date": date.today().isoformat()}
    card = {**presets.card_of(args.preset, args.weights), "calibration": photos_of}
    presets.save(codec, path, system_of(codec.module), card, args.force)
    if not args.quiet:
        console.say(f"{path}: exact arithmetic, digest {codec.digest.hex()[:12]}; use it with --preset {path}")
    return 0
