"""Reading and writing whole files with errors a user can act on; an output appears complete or not at all.

`write_file` writes beside the target and renames, so a full disk, a crash or Ctrl-C leaves the old file (or none) and
never half of a new one. Every output of jaxsem goes through it.
"""

import contextlib
import os
import secrets
import stat
from pathlib import Path

from jaxsem.errors import InputError, OutputError


def describe(error: Exception) -> str:
    """Says an exception in a few words, without the path and number that `str(OSError)` repeats.

    Args:
        error: any exception.

    Returns:
        For example `No space left on device`; the type's name for an exception without a text.
    """
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split()).rstrip(".")  # on one line


def read_bytes(path: str | os.PathLike) -> bytes:
    """Reads a whole file.

    Args:
        path: the file.

    Returns:
        Its bytes, possibly none.

    Raises:
        InputError: the path is missing, a folder or not readable.
    """
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL character inside the path
        raise InputError(why_unreadable(path, error)) from error


def why_unreadable(path: str | os.PathLike, error: Exception) -> str:
    """Gives the sentence for a path that could not be opened.

    Args:
        path: what was opened.
        error: what opening it raised.

    Returns:
        One sentence that names the path and the way out.
    """
    if isinstance(error, FileNotFoundError):
        return f"{path} does not exist: check the path."
    if isinstance(error, IsADirectoryError) or os.path.isdir(path):
        return f"{path} is a folder where a file is needed: name a file in it."
    return f"{path} cannot be read ({describe(error)}): check the path and its permissions."


def make_folder(path: str | os.PathLike) -> Path:
    """Makes a folder and its parents; one that exists is fine.

    Args:
        path: the folder.

    Returns:
        The same path.

    Raises:
        OutputError: it cannot be made, or is a file.
    """
    try:
        os.makedirs(path, exist_ok=True)
    except (OSError, ValueError) as error:
        raise OutputError(f"The folder {path} cannot be made ({describe(error)}): choose another output.") from error
    return Path(path)


def check_output(path: str | os.PathLike, force: bool = False) -> None:
    """Refuses an output path that `write_file` would refuse, so that long work can fail before it starts.

    Args:
        path: the file to be written.
        force: whether an existing file may be replaced.

    Raises:
        OutputError: the path is a folder, lies in no existing folder, or exists and `force` is false.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode if path.exists() else None
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be written ({describe(error)}): choose another output.") from error
    if mode is None:
        if not path.parent.is_dir():
            raise OutputError(f"{path} cannot be written, for {path.parent} is not a folder: make it first.")
    elif stat.S_ISDIR(mode):
        raise OutputError(f"{path} is a folder where an output file is needed: name a file in it.")
    elif stat.S_ISREG(mode) and not force:
        raise OutputError(f"{path} exists already: name another output, or pass --force (force=True) to replace it.")


def write_file(path: str | os.PathLike, data: bytes, force: bool = False) -> None:
    """Writes a file completely or not at all.

    The bytes go to a temporary file in the same folder, which then takes the target's place in one step. A symbolic
    link is followed; a device or pipe (`/dev/null`, `/dev/stdout`) is written to directly: it must not be replaced.

    Args:
        path: the file to write; its folder must exist.
        data: the contents, bytes-like.
        force: replace an existing file.

    Raises:
        OutputError: the file exists and `force` is false, the disk is full, or the path cannot be written.
    """
    check_output(path, force)
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            with open(path, "wb") as device:
                device.write(data)
            return
        target = os.path.realpath(path)
        # A short random name: the target's own name may already be as long as the file system allows.
        beside = os.path.join(os.path.dirname(target), f".jsem-{secrets.token_hex(8)}.tmp")
        try:
            # Not tempfile: it makes files private (0600), where an output should follow the umask like any other.
            with open(beside, "xb") as file:
                file.write(data)
            check_output(path, force)  # again, for another process may have written it meanwhile
            os.replace(beside, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(beside)
            raise
    except OutputError:
        raise
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{path} could not be written ({describe(error)}): free some space or choose another output; "
            "nothing was left behind."
        ) from error
