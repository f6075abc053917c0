"""The contract of the coders of index rows, and the checks they share; `jaxsem.entropy.indices` has the coders."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self, TypeVar

import numpy as np

from jaxsem.entropy.index_network import MAX_POSITIONS, MAX_SIZE
from jaxsem.errors import FormatError, InputError


class IndexCoder(ABC):
    """What every coder of index rows offers.

    Attributes:
        name: of the kind of coder, for files and tables.
        sizes: int64 [n], the codewords of each position.
    """

    name: ClassVar[str]
    sizes: np.ndarray

    @abstractmethod
    def encode(self, indices: np.ndarray) -> list[bytes]:
        """One stream for each row of integers [b, n].

        Raises:
            InputError: if the rows have another length, or an index is not in its range or has no code.
        """

    @abstractmethod
    def decode(self, data: Sequence[bytes]) -> np.ndarray:
        """The inverse of `encode`: int32 [b, n], always within the sizes.

        Raises:
            FormatError: if a stream is damaged; the message names the first such one.
        """

    @abstractmethod
    def ideal_bits(self, indices: np.ndarray) -> np.ndarray:
        """Bits that the coder's own probabilities ask for: float64 [b] of integers [b, n]."""

    @abstractmethod
    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything the coder needs, for a safetensors file; nothing else decides its bytes."""

    @classmethod
    @abstractmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """The inverse of `to_arrays`, for files that nobody vouches for.

        Raises:
            FormatError: if an array is missing, surplus, misshapen or out of range.
        """

    def digest(self) -> bytes:
        """SHA-256 (32 bytes) of the coder: equal digests mean equal streams, whatever the machine."""
        made = hashlib.sha256(f"jaxsem indices 1 {self.name}\0".encode())
        for name, value in sorted(self.to_arrays().items()):
            little = value.astype(value.dtype.newbyteorder("<"))
            made.update(f"{name} {value.dtype.name} {value.shape}\0".encode() + little.tobytes())
        return made.digest()


Coder = TypeVar("Coder", bound=IndexCoder)


def check_rows(indices: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Index rows as int32 [b, n].

    Raises:
        InputError: if they are no integers [b, n], or one is not in ``range(sizes[i])``.
    """
    indices = np.asarray(indices)
    if indices.ndim != 2 or indices.shape[1] != len(sizes) or indices.dtype.kind not in "iu":
        raise InputError(f"Indices are integers of shape [rows, {len(sizes)}], not {indices.dtype} {indices.shape}.")
    outside = np.argwhere((indices < 0) | (indices >= sizes))
    if outside.size:
        row, column = outside[0]
        raise InputError(
            f"The index {indices[row, column]} at {(int(row), int(column))} is not below {sizes[column]}, the size of "
            "its codebook."
        )
    return indices.astype(np.int32)


def count_indices(indices: np.ndarray, sizes: Sequence[int], per_position: bool) -> tuple[list[np.ndarray], np.ndarray]:
    """How often each index occurs.

    Args:
        indices: integers [m, n].
        sizes: [n].
        per_position: whether each position has counts of its own, or all positions of the same size have them together.

    Returns:
        The counts, int64 [size] each, and the number of the counts of each position, uint16 [n].
    """
    checked = check_sizes(sizes)
    indices = check_rows(indices, checked)
    table = np.arange(len(checked)) if per_position else np.unique(checked, return_inverse=True)[1]
    members = [np.flatnonzero(table == number) for number in range(int(table.max()) + 1)]
    counts = [np.bincount(indices[:, group].ravel(), minlength=checked[group[0]]) for group in members]
    return counts, table.astype(np.uint16)


def check_sizes(sizes: Sequence[int]) -> np.ndarray:
    """Codebook sizes as int64 [n], frozen.

    Raises:
        InputError: if they are no integers in a row, too many, or out of range.
    """
    array = np.asarray(sizes)
    if array.ndim != 1 or array.dtype.kind not in "iu" or not 1 <= len(array) <= MAX_POSITIONS:
        raise InputError(f"Sizes are 1 to {MAX_POSITIONS} integers in a row, not {array.dtype} {array.shape}.")
    if not 1 <= array.min() <= array.max() <= MAX_SIZE:
        raise InputError(f"Codebook sizes of {array.min()} to {array.max()} are outside 1 to {MAX_SIZE}.")
    array = array.astype(np.int64)
    array.setflags(write=False)
    return array


def check_table(table: np.ndarray, count: int) -> np.ndarray:
    """The number of each position's table as uint16 [n], frozen.

    Raises:
        InputError: if they are no integers in a row, too many, or not in ``range(count)``.
    """
    array = np.asarray(table)
    if array.ndim != 1 or array.dtype.kind not in "iu" or not 1 <= len(array) <= MAX_POSITIONS:
        raise InputError(f"Positions are 1 to {MAX_POSITIONS}, not {array.dtype} {array.shape}.")
    if not 0 <= array.min() <= array.max() < count:
        raise InputError(f"Positions name tables {array.min()} to {array.max()}, but there are {count}.")
    array = array.astype(np.uint16)
    array.setflags(write=False)
    return array


def take(arrays: Mapping[str, np.ndarray], kind: type[IndexCoder], **types: str) -> list[np.ndarray]:
    """The flat arrays of a stored coder, which has these and no others."""
    if set(arrays) != set(types):
        raise FormatError(f"A coder {kind.name!r} has the arrays {sorted(types)}, but the file has {sorted(arrays)}.")
    for name, dtype in types.items():
        value = np.asarray(arrays[name])
        if value.dtype != dtype or value.ndim != 1:
            raise FormatError(f"A coder {kind.name!r} needs {name!r} as flat {dtype}, not {value.dtype} {value.shape}.")
    return [np.asarray(arrays[name]) for name in types]


def build(kind: type[Coder], *fields) -> Coder:
    """A coder from stored fields: what is wrong with them is the file's fault."""
    try:
        return kind(*fields)
    except InputError as error:
        raise FormatError(f"The stored coder {kind.name!r} is damaged. {error}") from None
