"""`jaxsem features`: the CLIP features of a data set as one array."""

from argparse import Namespace

import jax

from jaxsem.cache import enable_compilation_cache
from jaxsem.commands import console
from jaxsem.commands.console import Failures
from jaxsem.data.sources import open_source
from jaxsem.errors import InputError
from jaxsem.progress import Progress
from jaxsem.systems.clip_model import ClipModel, load_clip_model
from jaxsem.systems.extraction import check_features_output, extract, image_count, read_features
from jaxsem.systems.feature_arrays import Record, record_path
from jaxsem.training.sharding import make_mesh


def run(args: Namespace) -> int:
    """Extracts the features of `args`; returns the exit status."""
    path = check_features_output(args.output, args.force)
    source = open_source(args.data)
    count = image_count(source, args.limit)
    enable_compilation_cache()
    model, failures = open_clip(args.clip, args.clip_config, args.preset), Failures()
    with Progress(count, "images", args.quiet) as progress:

        def done(images: int) -> None:
            for _ in range(images):
                progress.step()

        def failed(name: str, error: InputError) -> None:
            failures.add(name, error)
            done(1)

        options = {"half": args.half, "data": args.data, "on_batch": done, "on_failure": failed}
        mesh = make_mesh(devices=jax.local_devices())
        try:
            extract(model, source, path, args.batch, mesh, args.limit, args.force, **options)
        except InputError:
            failures.report(0)
            raise
    array, record = read_features(path)
    if not args.quiet:
        console.say(
            f"{path}: {as_text(record)}; {array.nbytes / 1e6:,.1f} MB, and what they are in {record_path(path)}"
        )
    return failures.report(len(array))


def open_clip(clip: str | None, config: str | None, preset: str) -> ClipModel:
    """The CLIP that `--clip` and `--clip-config` name, or that of a preset.

    Raises:
      InputError: There is none.
    """
    if clip is not None:
        return load_clip_model(clip, config, texts=False)
    if config is not None:
        raise InputError("--clip-config tells the sizes of the weights that --clip names: give both")
    from jaxsem.presets import load

    model = getattr(load(preset), "clip", None)
    if not isinstance(model, ClipModel):
        raise InputError(f"{preset} has no CLIP: name a preset that has, such as pqvae-mini, or weights with --clip")
    return model


def as_text(record: Record) -> str:
    """A record in a few words."""
    classes = f" of {len(record['class_names'])} classes" if "class_names" in record else ""
    shape = f"{record['count']:,} features{classes}, width {record['width']}, {record['dtype']}"
    return f"{shape}, by {record['model']} on {record['data']}"
