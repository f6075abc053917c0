"""Which files a command reads and writes, settled before the work begins.

A file named on the command line gives an output of its name; a folder's files keep their place below it.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from jaxsem.commands import console
from jaxsem.errors import InputError, OutputError
from jaxsem.files import check_output, describe, make_folder

STANDARD = "-"  # standard input or output
_SHOWN = 3


@dataclass(frozen=True)
class Source:
    """A file to read.

    Attributes:
      path: Where it is; None is standard input.
      relative: Its place below the folder that was named, or its bare name.
      in_folder: Whether a folder was named, and not the file.
    """

    path: Path | None
    relative: PurePath
    in_folder: bool = False

    def __str__(self) -> str:
        return "standard input" if self.path is None else str(self.path)


def find_sources(arguments: Sequence[str], list_folder: Callable[[Path], Iterable[Path]]) -> list[Source]:
    """Files as they are named, and what `list_folder` finds in folders; no file twice.

    Raises:
      InputError: As from `list_folder`.
    """
    found: dict[Path | None, Source] = {}
    for argument in arguments:
        path = Path(argument)
        if argument == STANDARD:
            found.setdefault(None, Source(None, PurePath("image")))
        elif path.is_dir():
            for file in list_folder(path):
                found.setdefault(file, Source(file, file.relative_to(path), True))
        else:
            found.setdefault(path, Source(path, PurePath(path.name)))
    return list(found.values())


def list_jsem(folder: Path) -> list[Path]:
    """All .jsem files below a folder, in the order of their names.

    Raises:
      InputError: There is none, or a folder cannot be read.
    """

    def refuse(error: OSError):
        raise InputError(f"the folder {error.filename} cannot be read ({describe(error)}): check its permissions")

    found = [
        Path(here, name)
        for here, _, names in os.walk(folder, onerror=refuse)
        for name in names
        if name.lower().endswith(".jsem") and not name.startswith(".")
    ]
    if not found:
        raise InputError(f"{folder} holds no .jsem file: name the folder that does, or a file")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def is_folder(output: str, sources: Sequence[Source]) -> bool:
    """Whether OUT means a folder: it is one, is written like one, or has to hold several files."""
    return len(sources) > 1 or sources[0].in_folder or output.endswith(("/", os.sep)) or Path(output).is_dir()


def base_of(source: Source, output: str | None) -> Path:
    """A source's output but for the suffix: below the folder OUT, or beside the source."""
    name = source.relative.with_name(source.relative.stem)
    if output is not None:
        return Path(output, name)
    return Path(name) if source.path is None else source.path.with_name(name.name)


def to_standard_output(sources: Sequence[Source], output: str | None) -> bool:
    """Whether the result goes to standard output: asked for by -, or the way of a single standard input.

    Raises:
      InputError: Several results would go there, or a file would go to a terminal.
    """
    if output != STANDARD and not (output is None and any(source.path is None for source in sources)):
        return False
    if len(sources) > 1:
        way = "name a folder with -o" if output is None else "name a folder instead of -"
        raise InputError(f"{len(sources)} results cannot go to standard output: {way}")
    console.refuse_terminal()
    return True


def prepare_targets(
    targets: Iterable[tuple[object, Path]], sources: Sequence[Source], force: bool, make_folders: bool
) -> None:
    """Refuses outputs that cannot be written, before the work; then makes the folders for them.

    Args:
      targets: What is read, for errors, and the file that it gives.
      sources: All files that are read.
      force: Whether existing files may be replaced.
      make_folders: Whether missing folders are made.

    Raises:
      OutputError: Two results have one file, or a file exists and `force` is false, would replace what is read, or
        has no folder.
    """
    owners: dict[Path, object] = {}
    for owner, target in targets:
        if target in owners:
            raise OutputError(
                f"{owners[target]} and {owner} would both be written to {target}: write them to different folders, or "
                "rename one"
            )
        owners[target] = owner
    read = {source.path.resolve() for source in sources if source.path is not None}
    for target in owners:
        if target.resolve() in read:
            raise OutputError(f"{target} is to be read, and the result would replace it: name another output with -o")
    existing = [] if force else [target for target in owners if target.is_file()]
    if len(existing) > 1:
        shown = ", ".join(map(str, existing[:_SHOWN])) + (", ..." if len(existing) > _SHOWN else "")
        raise OutputError(
            f"{len(existing)} of {len(owners)} outputs exist already ({shown}): name another output with -o, or pass "
            "--force to replace them"
        )
    if make_folders:
        for folder in dict.fromkeys(target.parent for target in owners):
            make_folder(folder)
    for target in owners:
        check_output(target, force)
