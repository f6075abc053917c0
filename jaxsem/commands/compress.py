"""`jaxsem compress`: photos to `.jsem` files, one each, or to one archive.

    reader thread: photo i + 1 | pipeline: photo i | this thread: write photo i - 1

At most a few photos are in memory at a time, however many there are.
"""

from argparse import Namespace
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from jaxsem.cache import enable_compilation_cache
from jaxsem.cli import DEFAULT_PRESET
from jaxsem.codec import Codec
from jaxsem.commands import console, demands, paths
from jaxsem.commands.console import Failures
from jaxsem.commands.paths import Source
from jaxsem.commands.weights import open_codec
from jaxsem.container import Item, pack, pack_archive, write_file
from jaxsem.data.images import list_images, read_image
from jaxsem.errors import InputError
from jaxsem.pipeline import Compressed, compress_stream
from jaxsem.progress import Progress
from jaxsem.systems.rsic import Demand, weight_levels
from jaxsem.wire import name_complaint

SUFFIX = ".jsem"
_AHEAD = 2  # photos that are read before they are needed


def run(args: Namespace) -> int:
    """Compresses the photos of `args`; returns the exit status."""
    sources = paths.find_sources(args.photos, list_images)
    sink = _open_sink(args, sources)
    enable_compilation_cache()
    quality = None if args.levels is not None else args.quality  # with other levels there are other qualities
    given = args.arithmetic, args.clip, args.diffusion
    codec = open_codec(args.preset, args.weights, DEFAULT_PRESET, quality, *given)
    codec, demand = demands.settle(codec, args)
    talks = not (args.quiet or args.json or sink.to_standard_output)
    failures, rows = Failures(), []
    with Progress(len(sources), "photos", args.quiet) as progress:
        for source, result in compress_sources(codec, sources, failures, demand):
            target, size = sink.put(source, result.item, codec.digest)
            rows.append(_row(source, target, size, result, codec.quality))
            if talks:
                progress.clear()
                console.say("\n  ".join([_line(rows[-1]), *result.notes]))
            progress.step()
    total = sink.close(codec.digest)
    if args.json:
        identity = {"preset": codec.name, "weights": codec.digest.hex(), "quality": codec.quality}
        console.say_json({**identity, "bytes": total, "files": rows, "failed": failures.as_json()})
    elif talks and len(rows) > 1:
        pixels = sum(row["width"] * row["height"] for row in rows)
        console.say(f"{len(rows)} photos, {total:,} bytes, {8 * total / pixels:.3f} bits per pixel")
    return failures.report(len(rows))


def compress_sources(
    codec: Codec, sources: Sequence[Source], failures: Failures, demand: Demand | None = None
) -> Iterator[tuple[Source, Compressed]]:
    """Compresses photos as they are read; those that cannot be read, or do not have what is demanded, go to `failures`."""
    begun: list[Source] = []
    settled: deque[Demand] = deque()

    def images() -> Iterator[np.ndarray]:
        for source, image in _read_ahead(sources, failures):
            if demand is not None:
                try:
                    settled.append(replace(demand, levels=weight_levels(codec, image, demand)))
                except InputError as error:
                    failures.add(source, error)
                    continue
            begun.append(source)
            yield image

    asked = None if demand is None else iter(settled.popleft, None)
    for position, result in compress_stream(codec, images(), demands=asked):
        yield begun[position], result


def _read_ahead(sources: Sequence[Source], failures: Failures) -> Iterator[tuple[Source, np.ndarray]]:
    remaining = iter(sources)
    waiting: deque[tuple[Source, Future]] = deque()
    with ThreadPoolExecutor(1) as pool:
        while True:
            for source in islice(remaining, _AHEAD - len(waiting)):
                waiting.append((source, pool.submit(_read, source)))
            if not waiting:
                return
            source, future = waiting.popleft()
            try:
                image = future.result()
            except InputError as error:
                failures.add(source, error)
                continue
            yield source, image


def _read(source: Source) -> np.ndarray:
    return read_image(console.read_bytes() if source.path is None else source.path)


class _Files:
    """Writes each item to a file of its own; a target None is standard output."""

    def __init__(self, targets: dict[Source, Path | None], force: bool):
        self._targets, self._force, self._total = targets, force, 0
        self.to_standard_output = None in targets.values()

    def put(self, source: Source, item: Item, digest: bytes) -> tuple[Path | None, int]:
        """Writes an item; gives the file and its bytes."""
        data, target = pack(item, digest), self._targets[source]
        if target is None:
            console.write_bytes(data)
        else:
            write_file(target, data, self._force)
        self._total += len(data)
        return target, len(data)

    def close(self, digest: bytes) -> int:
        """All bytes."""
        return self._total


class _Archive:
    """Collects all items and writes one archive at the end; a target None is standard output."""

    def __init__(self, target: Path | None, names: dict[Source, str], force: bool):
        self._target, self._names, self._force = target, names, force
        self._items: dict[Source, Item] = {}
        self.to_standard_output = target is None

    def put(self, source: Source, item: Item, digest: bytes) -> tuple[Path | None, int]:
        """Keeps an item; gives the archive and the bytes of the item's sections."""
        self._items[source] = replace(item, name=self._names[source])
        return self._target, sum(map(len, item.sections.values()))

    def close(self, digest: bytes) -> int:
        """Writes the archive, if anything is in it, in the order of the photos; gives its bytes."""
        items = [self._items[source] for source in self._names if source in self._items]
        if not items:
            return 0
        data = pack_archive(items, digest)
        if self._target is None:
            console.write_bytes(data)
        else:
            write_file(self._target, data, self._force)
        return len(data)


def _open_sink(args: Namespace, sources: Sequence[Source]) -> _Files | _Archive:
    """Where the results go, checked."""
    if args.archive is not None and args.output is not None:
        raise InputError(f"--archive {args.archive} and -o {args.output} name two outputs: give one of them")
    if args.archive is not None:
        names = _archive_names(sources)
        if args.archive == paths.STANDARD:
            console.refuse_terminal()
        else:
            paths.prepare_targets([("the archive", Path(args.archive))], sources, args.force, make_folders=False)
        sink = _Archive(None if args.archive == paths.STANDARD else Path(args.archive), names, args.force)
    elif paths.to_standard_output(sources, args.output):
        sink = _Files({sources[0]: None}, args.force)
    else:
        targets = _targets(sources, args.output)
        if args.output is None:  # a photo in a folder that does not exist fails when it is read, alone
            checked = [(source, target) for source, target in targets.items() if target.parent.is_dir()]
            paths.prepare_targets(checked, sources, args.force, make_folders=False)
        else:
            paths.prepare_targets(targets.items(), sources, args.force, paths.is_folder(args.output, sources))
        sink = _Files(targets, args.force)
    if args.json and sink.to_standard_output:
        raise InputError("--json and the compressed file cannot both go to standard output: name a file with -o")
    return sink


def _targets(sources: Sequence[Source], output: str | None) -> dict[Source, Path | None]:
    if output is not None and not paths.is_folder(output, sources):
        return {sources[0]: Path(output)}
    bases = {source: paths.base_of(source, output) for source in sources}
    return {source: base.with_name(base.name + SUFFIX) for source, base in bases.items()}


def _archive_names(sources: Sequence[Source]) -> dict[Source, str]:
    """Names in an archive: each photo's place without its suffix, so that no two give one file when they come back."""
    names, owners = {}, {}
    for source in sources:
        name = source.relative.with_suffix("").as_posix()
        if complaint := name_complaint(name):
            raise InputError(f"{source} cannot be kept in an archive, for {complaint}: rename it")
        if name in owners:
            raise InputError(f"{owners[name]} and {source} would both be {name!r} in the archive: rename one")
        names[source], owners[name] = name, source
    return names


def _row(source: Source, target: Path | None, size: int, result: Compressed, quality: float) -> dict:
    height, width = result.height, result.width
    return {
        "photo": str(source),
        "file": None if target is None else str(target),
        "width": width,
        "height": height,
        "quality": quality,
        "bytes": size,
        "bpp": 8 * size / (height * width),
        "estimated_bpp": result.estimated_bits / (height * width),
        "notes": list(result.notes),
    }


def _line(row: dict) -> str:
    size = f"{row['width']}x{row['height']}, {row['bytes']:,} bytes, {row['bpp']:.3f} bits per pixel"
    return f"{row['photo']} -> {row['file']}: {size}"
