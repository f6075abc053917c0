"""What commands print: results on standard output, complaints on standard error, and the account of a batch."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from jaxsem.errors import InputError, JaxsemError, OutputError
from jaxsem.files import describe


def say(text: str) -> None:
    """Prints a line on standard output.

    Raises:
      OutputError: It cannot be written, because the disk is full, for example.
    """
    with _output() as stream:
        # A file name need not be valid in the encoding of the screen.
        encoding = stream.encoding or "utf-8"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def say_json(value: Any) -> None:
    """Prints a value as JSON; errors as from `say`."""
    say(json.dumps(value, indent=1))


def write_bytes(data: bytes) -> None:
    """Writes a file to standard output; errors as from `say`."""
    with _output() as stream:
        stream.buffer.write(data)
        stream.buffer.flush()


def read_bytes() -> bytes:
    """Reads standard input to its end.

    Raises:
      InputError: It cannot be read.
    """
    if sys.stdin is None:
        raise InputError("standard input is closed: name a file instead of -")
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        raise InputError(f"standard input cannot be read ({describe(error)}): name a file instead of -") from error


def refuse_terminal() -> None:
    """Refuses to write a file to the screen.

    Raises:
      InputError: Standard output is a terminal.
    """
    if sys.stdout is not None and sys.stdout.isatty():
        raise InputError("standard output is a terminal, which cannot show this: redirect it, or name a file with -o")


def flush() -> None:
    """Makes sure that everything was written; errors as from `say`."""
    with _output() as stream:
        stream.flush()


def forget_output() -> None:
    """Lets what could not be written go, so that Python does not try, and complain, once more at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a stream that is no real file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(sentence: str) -> None:
    """Prints an error on standard error, on one line."""
    with contextlib.suppress(OSError, AttributeError):  # nowhere is left to complain to
        print(f"jaxsem: {' '.join(sentence.split())}", file=sys.stderr, flush=True)


def table(rows: Sequence[Sequence[Any]], left: int = 1) -> str:
    """Lines up rows of cells, the first `left` columns to the left and the others to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    lines = [[c.ljust(w) if k < left else c.rjust(w) for k, (c, w) in enumerate(zip(row, widths))] for row in cells]
    return "\n".join("  ".join(line).rstrip() for line in lines)


class Failures:
    """The files of a batch that failed, each with its sentence; the others go on."""

    def __init__(self) -> None:
        self._sentences: dict[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self._sentences)

    def add(self, name: object, error: JaxsemError) -> None:
        """Remembers a file's error; the sentence will name the file."""
        sentence = str(error)
        self._sentences[str(name)] = sentence if str(name) in sentence else f"{name}: {sentence}"

    def as_json(self) -> list[dict[str, str]]:
        """For a command's JSON."""
        return [{"file": name, "error": sentence} for name, sentence in self._sentences.items()]

    def report(self, done: int) -> int:
        """Complains about each failure.

        Args:
          done: How many others succeeded.

        Returns:
          The exit status: 0 without failures, 1 if some succeeded, else 2.
        """
        for sentence in self._sentences.values():
            complain(sentence)
        if self and done + len(self._sentences) > 1:
            complain(f"{len(self._sentences)} failed, as said above; {done or 'none'} succeeded")
        return 0 if not self else 1 if done else 2


@contextlib.contextmanager
def _output() -> Iterator[Any]:
    if sys.stdout is None:
        raise OutputError("standard output is closed: name a file with -o, or open it")
    try:
        yield sys.stdout
    except BrokenPipeError:
        raise
    except OSError as error:
        forget_output()
        raise OutputError(f"standard output could not be written ({describe(error)}): free some space") from error
