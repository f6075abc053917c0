"""`jaxsem decompress`: images from `.jsem` files and archives."""

from argparse import Namespace
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxsem.cache import enable_compilation_cache
from jaxsem.codec import Codec
from jaxsem.commands import console, paths
from jaxsem.commands.console import Failures
from jaxsem.commands.paths import Source
from jaxsem.commands.weights import Finder
from jaxsem.container import Archive, File, Item, is_archive, open_archive, unpack
from jaxsem.data.images import check_suffix, encode_image, write_image
from jaxsem.errors import FormatError, InputError, WeightsError
from jaxsem.files import read_bytes, why_unreadable
from jaxsem.pipeline import decompress_items
from jaxsem.progress import Progress
from jaxsem.systems.rsic_config import FAST

_GROUP_ITEMS, _GROUP_PIXELS = 16, 1 << 24  # what is decoded at a time, to bound the memory
_WRITERS = 2
_HEAD = 16


@dataclass(frozen=True)
class Job:
    """One image to bring back.

    Attributes:
      source: The file that holds it.
      target: The image file to write; None is standard output.
      archive: The file if it is an archive, opened.
      index: The image's place in the archive.
      data: Bytes of a single file from standard input; others are read when their turn comes.
    """

    source: Source
    target: Path | None
    archive: Archive | None = None
    index: int = 0
    data: bytes | None = None

    def __str__(self) -> str:
        if self.archive is None:
            return str(self.source)
        return f"{self.source} ({self.archive.names[self.index] or f'image {self.index + 1}'})"

    def read(self) -> tuple[File | Archive, Item]:
        """The file, which tells the weights, and the item; FormatError or InputError if it is damaged or unreadable."""
        if self.archive is not None:
            return self.archive, self.archive[self.index]
        file = unpack(self.data if self.data is not None else read_bytes(self.source.path))
        return file, file.items[0]


@dataclass(frozen=True)
class Decoding:
    """How codecs that decode by a diffusion model are asked to do so.

    Attributes:
      changes: Arguments of `Rsic.decoding`.
    """

    changes: Mapping[str, Any]

    @staticmethod
    def of(args: Namespace) -> "Decoding":
        """What the options say."""
        names = ("steps", "recurrences", "gamma", "scale", "seed")
        given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        return Decoding({**(FAST if args.fast else {}), **given})

    def apply(self, codec: Any) -> Any:
        """The codec, decoding like that.

        Raises:
          InputError: A number out of range, or a codec whose files have one image only.
        """
        if not self.changes:
            return codec
        if not getattr(codec, "referring", False):
            raise InputError(
                f"a file of {codec.name} decodes to one image, whatever the {', '.join(self.changes)}: leave such options out"
            )
        return codec.decoding(**self.changes)


def run(args: Namespace) -> int:
    """Decompresses the files of `args`; returns the exit status."""
    sources = paths.find_sources(args.files, paths.list_jsem)
    streams = paths.to_standard_output(sources, args.output)
    if streams and args.json:
        raise InputError("--json and the image cannot both go to standard output: name a file with -o")
    failures = Failures()
    jobs = _plan(args, sources, streams, failures)
    enable_compilation_cache()
    finder = Finder(args.preset, args.weights, args.clip, args.diffusion)
    decoding = Decoding.of(args)
    talks = not (args.quiet or args.json or streams)
    rows = []
    with Progress(len(jobs), "images", args.quiet) as progress:
        decoded = _decode(_grouped(jobs, finder, failures), failures, decoding)
        for job, image in _written(decoded, f".{args.format}", args.force, failures):
            rows.append(_row(job, image))
            if talks:
                progress.clear()
                console.say(f"{job} -> {job.target}: {image.shape[1]}x{image.shape[0]}")
            progress.step()
    if args.json:
        console.say_json({"files": rows, "failed": failures.as_json()})
    return failures.report(len(rows))


# -- what is to be done, settled before the work -----------------------------------------------------------------------


def _plan(args: Namespace, sources: Sequence[Source], streams: bool, failures: Failures) -> list[Job]:
    """Opens the files as far as it takes to know all outputs, and refuses outputs that cannot be."""
    one_file = args.output is not None and not streams and not paths.is_folder(args.output, sources)
    if one_file:
        check_suffix(args.output)
    jobs, archives = [], False
    for source in sources:
        try:
            opened = _open(source)
        except (FormatError, InputError) as error:
            failures.add(source, error)
            continue
        if isinstance(opened, Archive):
            archives = True
            jobs += _archive_jobs(args, source, opened, streams, len(sources) > 1, failures)
        elif streams or one_file:
            jobs.append(Job(source, None if streams else Path(args.output), data=opened))
        else:
            base = paths.base_of(source, args.output)
            jobs.append(Job(source, base.with_name(f"{base.name}.{args.format}"), data=opened))
    if not streams:
        targets = [(job, job.target) for job in jobs]
        paths.prepare_targets(targets, sources, args.force, make_folders=archives or not one_file)
    return jobs


def _open(source: Source) -> Archive | bytes | None:
    """An archive, the bytes of a single file from standard input, or None for a single file with a sound start."""
    if source.path is None:
        data = console.read_bytes()
        return open_archive(data) if is_archive(data) else data
    try:
        with open(source.path, "rb") as file:
            head = file.read(_HEAD)
    except (OSError, ValueError) as error:
        raise InputError(why_unreadable(source.path, error)) from error
    return open_archive(read_bytes(source.path)) if is_archive(head) else None


def _archive_jobs(
    args: Namespace, source: Source, archive: Archive, streams: bool, several: bool, failures: Failures
) -> list[Job]:
    """A job for each sound item of an archive."""
    damaged = archive.damaged()
    try:
        archive.refuse_damage()
    except FormatError:
        if damaged:
            error = FormatError(
                f"{len(damaged)} of its {len(archive)} images are damaged or cut off: get a fresh copy of it for them"
            )
        failures.add(source, error)
    if streams and len(archive) > 1:
        raise InputError(f"the {len(archive)} images of {source} cannot go to standard output: name a folder with -o")
    folder = paths.base_of(source, args.output) if several or args.output is None else Path(args.output)
    jobs = []
    for index in sorted(set(range(len(archive))) - set(damaged)):
        name = archive.names[index] or f"{index + 1:04d}"
        suffix = "" if name.lower().endswith(f".{args.format}") else f".{args.format}"
        jobs.append(Job(source, None if streams else folder / f"{name}{suffix}", archive, index))
    return jobs


# -- the work ----------------------------------------------------------------------------------------------------------


def _grouped(jobs: Sequence[Job], finder: Finder, failures: Failures) -> Iterator[tuple[Codec, list[tuple[Job, Item]]]]:
    """Reads the items, in groups that one codec decodes at a time."""
    current, group, pixels = None, [], 0
    for job in jobs:
        try:
            file, item = job.read()
            codec = finder.codec_for(file)
        except (FormatError, InputError, WeightsError) as error:
            failures.add(job, error)
            continue
        size = item.height * item.width
        if group and (codec is not current or len(group) == _GROUP_ITEMS or pixels + size > _GROUP_PIXELS):
            yield current, group
            group, pixels = [], 0
        current = codec
        group.append((job, item))
        pixels += size
    if group:
        yield current, group


def _decode(
    groups: Iterator[tuple[Codec, list[tuple[Job, Item]]]], failures: Failures, decoding: "Decoding"
) -> Iterator[tuple[Job, np.ndarray]]:
    """Decodes the groups; where one fails, its items one by one, so that the sound ones are saved."""
    for codec, group in groups:
        try:
            images = decompress_items(decoding.apply(codec), [item for _, item in group])
        except FormatError as error:
            if len(group) > 1:
                yield from _decode(((codec, [pair]) for pair in group), failures, decoding)
            else:
                failures.add(group[0][0], error)
            continue
        yield from ((job, image) for (job, _), image in zip(group, images, strict=True))


def _written(
    decoded: Iterator[tuple[Job, np.ndarray]], suffix: str, force: bool, failures: Failures
) -> Iterator[tuple[Job, np.ndarray]]:
    """Writes images in threads, while the next ones are decoded; gives those that are written."""
    running: deque[tuple[Job, np.ndarray, Future]] = deque()

    def finished(allowed: int) -> Iterator[tuple[Job, np.ndarray]]:
        while len(running) > allowed:
            job, image, future = running.popleft()
            try:
                future.result()
            except InputError as error:  # an image too large for its format
                failures.add(job, error)
                continue
            yield job, image

    with ThreadPoolExecutor(_WRITERS) as pool:
        for job, image in decoded:
            running.append((job, image, pool.submit(_write, job, image, suffix, force)))
            yield from finished(_WRITERS)
        yield from finished(0)


def _write(job: Job, image: np.ndarray, suffix: str, force: bool) -> None:
    if job.target is None:
        console.write_bytes(encode_image(image, suffix))
    else:
        write_image(job.target, image, force)


def _row(job: Job, image: np.ndarray) -> dict:
    return {
        "file": str(job.source),
        "item": None if job.archive is None else job.archive.names[job.index],
        "image": None if job.target is None else str(job.target),
        "width": image.shape[1],
        "height": image.shape[0],
    }
