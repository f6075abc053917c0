"""Features in files: FILE.npy, an ordinary NumPy array [count, width], and FILE.json beside it, which says what they are.

The record of an array holds

    {"kind": "jaxsem-features", "version": 1, "jaxsem": "0.1.0",
     "model": "openai/clip-vit-large-patch14-336", "image_size": 336, "width": 768,
     "data": "photos/valid", "count": 5000, "dtype": "float32",
     "crc32": "1c291ca3",                        of the rows' bytes: tells damage, and an array of another run
     "names": ["n01440764/1.jpg", ...],          for folders: where each image lies below the folder
     "labels": [0, ...],                         the class of each image, -1 where it has none
     "classes": [[3, 17], ...],                  for scenes: the classes of the objects of each, from back to front
     "class_names": ["n01440764", ...]}          of labels and classes

of which the last four are there as far as the data has them.
"""

import json
import os
import secrets
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxsem.errors import FormatError, InputError, OutputError
from jaxsem.files import check_output, describe, read_bytes, why_unreadable
from jaxsem.version import __version__

KIND, VERSION = "jaxsem-features", 1
_BLOCK = 1 << 24  # bytes that a check looks at together
_DTYPES = ("float32", "float16")

Record = dict[str, Any]


def record_path(path: str | os.PathLike) -> Path:
    """The record beside an array."""
    return Path(path).with_suffix(".json")


def check_features_output(path: str | os.PathLike, force: bool = False) -> Path:
    """Refuses an output that could not be written, so that long work can fail before it starts.

    Raises:
      InputError: The name does not end in .npy.
      OutputError: As `jaxsem.files.check_output`, for the array or its record.
    """
    path = Path(path)
    if path.suffix != ".npy":
        raise InputError(f"features go to a .npy file, and a .json file beside it: write {path}.npy, for example")
    check_output(path, force)
    check_output(record_path(path), force)
    return path


class FeatureWriter:
    """Writes features as they come; array and record appear under their names together, when all is there, or not at all.

    Use it as a context manager; what is not finished when it ends is removed. The rows go through an ordinary file and not a
    memory map, which would end the process where a disk is full.

    Args:
      path: FILE.npy; its folder exists.
      width: Numbers in a feature.
      dtype: "float32" or "float16".
      force: Replace existing files.

    Raises:
      InputError: The name does not end in .npy.
      OutputError: Here and later: a file exists and `force` is false, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike, width: int, dtype: str = "float32", force: bool = False):
        self.count = 0
        self._path, self._force = check_features_output(path, force), force
        self._width, self._dtype, self._crc = width, np.dtype(dtype).newbyteorder("<"), 0
        self._target = os.path.realpath(path)
        # Short random names, beside the target: see `jaxsem.files.write_file`.
        self._beside = [os.path.join(os.path.dirname(self._target), f".jsem-{secrets.token_hex(8)}.tmp") for _ in "ar"]

    def __enter__(self) -> "FeatureWriter":
        with self._writing():
            self._file: BinaryIO = open(self._beside[0], "xb")
            self._write_header()
            self._begin = self._file.tell()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._file.close()
        for name in self._beside:
            with suppress(OSError):
                os.unlink(name)

    def write(self, rows: np.ndarray) -> None:
        """Adds features [b, width]."""
        data = np.ascontiguousarray(rows, self._dtype).data
        with self._writing():
            self._file.write(data)
        self._crc = zlib.crc32(data, self._crc)
        self.count += len(rows)

    def finish(self, fields: Record) -> None:
        """Completes the record of `fields` by what is known here, and gives both files their names."""
        record = {"kind": KIND, "version": VERSION, "jaxsem": __version__, **fields}
        record |= {"width": self._width, "count": self.count, "dtype": self._dtype.name, "crc32": f"{self._crc:08x}"}
        with self._writing():
            self._file.seek(0)
            self._write_header()  # once more, with the count: NumPy leaves room for one of any length
            if self._file.tell() != self._begin:
                raise OutputError(
                    f"NumPy {np.__version__} changes the length of a header with the count: use another one"
                )
            self._file.close()
            with open(self._beside[1], "xb") as file:
                file.write(json.dumps(record).encode() + b"\n")
            check_features_output(self._path, self._force)  # again, for another process may have written it meanwhile
            os.replace(self._beside[0], self._target)
            os.replace(self._beside[1], os.path.realpath(record_path(self._path)))

    def _write_header(self) -> None:
        shape = self.count, self._width
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OutputError:
            raise
        except (OSError, ValueError) as error:
            raise OutputError(
                f"{self._path} could not be written ({describe(error)}): free some space or choose another output; "
                "nothing was left behind."
            ) from error


# -- reading --------------------------------------------------------------------------------------------------------------


def read_features(path: str | os.PathLike) -> tuple[np.ndarray, Record]:
    """Reads what `FeatureWriter` wrote.

    Args:
      path: FILE.npy; FILE.json lies beside it.

    Returns:
      The features, float16 or float32 [count, width], read-only and in memory only as far as they are used; and the record.

    Raises:
      InputError: A file is missing or cannot be read.
      FormatError: A file is damaged or foreign, or the two do not belong together.
    """
    array = read_array(path)
    record = _read_record(record_path(path))
    count, width = array.shape
    stated = record["count"], record["width"], record["dtype"]
    if stated != (count, width, array.dtype.name):
        raise FormatError(
            f"{path} holds {count} features of width {width} in {array.dtype}, and its record {stated[0]} of width {stated[1]} "
            f"in {stated[2]}: they do not belong together, extract the features again"
        )
    crc, rows = 0, max(1, _BLOCK // (width * array.itemsize))
    for start in range(0, count, rows):
        block = np.ascontiguousarray(array[start : start + rows])
        crc = zlib.crc32(block.data, crc)
        if not np.isfinite(block).all():
            raise FormatError(
                f"{path} holds NaN or infinity among its rows from {start} on: extract the features again"
            )
    if f"{crc:08x}" != record["crc32"]:
        raise FormatError(
            f"{path} has the checksum {crc:08x}, and its record {record['crc32']}: one of the two files is damaged or of another "
            "run, extract the features again"
        )
    return array, record


def read_array(path: str | os.PathLike) -> np.ndarray:
    """Reads a .npy file of features, from wherever it comes, without running anything in it.

    Returns:
      float16, float32 or float64 [count, width], both at least 1; read-only, in memory only as far as it is used.

    Raises:
      InputError: The file is missing or cannot be read.
      FormatError: It is no such array, or damaged.
    """
    try:
        with open(path, "rb") as file:
            shape, fortran, dtype, offset = _read_header(file)
            size = file.seek(0, os.SEEK_END)
    except (OSError, ValueError) as error:  # ValueError: a NUL character inside the path
        raise InputError(why_unreadable(path, error)) from error
    except _NotAnArray as error:
        raise FormatError(f"{path} is not a .npy file of features: {describe(error)}") from error
    if dtype.kind != "f" or dtype.itemsize > 8 or len(shape) != 2 or min(shape) < 1:
        raise FormatError(
            f"{path} is not a .npy file of features: it holds {dtype} of shape {shape}, not real [count, width]"
        )
    wanted = offset + shape[0] * shape[1] * dtype.itemsize
    if size != wanted:
        raise FormatError(
            f"{path} is damaged: it has {size} bytes, and an array of {shape[0]} x {shape[1]} has {wanted}"
        )
    stored = np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")
    return np.asarray(stored)


class _NotAnArray(Exception):
    """The header of a .npy file makes no sense."""


def _read_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, whether columns come first, type, and where the numbers begin."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(file)
        if version not in readers:
            raise ValueError(f"version {version} of the format has no features")
        shape, fortran, dtype = readers[version](file)
    except OSError:
        raise
    except Exception as error:  # a header is Python's syntax, which damage breaks in a dozen ways
        raise _NotAnArray(str(error)) from error
    return shape, fortran, dtype, file.tell()


def _read_record(path: Path) -> Record:
    try:
        record = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise FormatError(f"{path} is not the record of features: {describe(error)}") from error
    if not isinstance(record, dict) or record.get("kind") != KIND:
        raise FormatError(f"{path} is not the record of features: it is no {KIND}")
    if record.get("version") != VERSION:
        raise FormatError(f"{path} has version {record.get('version')!r}, and {VERSION} is known: update jaxsem")
    if problem := _problem(record):
        raise FormatError(f"{path} is damaged: {problem}; extract the features again")
    return record


def _problem(record: Record) -> str | None:
    """What is wrong with the fields of a record."""
    for name, kind in {"model": str, "data": str, "crc32": str, "image_size": int, "width": int, "count": int}.items():
        if type(record.get(name)) is not kind:
            return f"its {name} is {record.get(name)!r}"
    if record.get("dtype") not in _DTYPES:
        return f"its dtype is {record.get('dtype')!r}, not {' or '.join(_DTYPES)}"
    lists = {name: record.get(name, []) for name in ("names", "labels", "classes", "class_names")}
    for name, values in lists.items():
        if not isinstance(values, list):
            return f"its {name} are no list"
        if name in record and name != "class_names" and len(values) != record["count"]:
            return f"it has {len(values)} {name} for {record['count']} features"
    if not all(type(name) is str for name in (*lists["names"], *lists["class_names"])):
        return "a name is no text"
    if not all(type(numbers) is list for numbers in lists["classes"]):
        return "the classes of an image are no list"
    numbers = [*lists["labels"], *(number for numbers in lists["classes"] for number in numbers)]
    most = len(lists["class_names"]) if "class_names" in record else None
    if not all(type(number) is int and number >= -1 and (most is None or number < most) for number in numbers):
        return f"a label is not a whole number of its {'' if most is None else f'{most} '}classes"
    return None
