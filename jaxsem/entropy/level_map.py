"""Maps of a few levels, such as RSIC's weight map, in a handful of bytes: an adaptive integer model of neighbouring cells.

>>> import numpy as np
>>> from jaxsem.entropy.level_map import decode_levels, encode_levels
>>> data = encode_levels(np.array([[0, 0, 0, 0], [0, 7, 7, 0], [0, 7, 7, 0]]), 8)
>>> len(data), decode_levels(data, 3, 4, 8).tolist()
(3, [[0, 0, 0, 0], [0, 7, 7, 0], [0, 7, 7, 0]])

Specification, version 1
------------------------
Rows, columns and the number of levels L, 1 to 8, are known. For L = 1 there is no byte. Else the bytes are a stream of
the adaptive format, version 1 (`jaxsem.entropy.adaptive`), and a check.

* *Stream.* First the mode, then levels; frequencies not given are 0. The modes 0 constant, 1 raw and 2 context have the
  frequencies 8192, 4096 and 53248.
* *Constant.* One level, for all cells. *Raw.* All levels, row by row. Both with even frequencies: 65536 div L, and 1
  more for the first 65536 mod L levels.
* *Context.* All levels, row by row. Let a be the level to the left and b the level above; where one is missing it is
  the other, where both are, both are 0; p = min(a, b) and q = max(a, b). Let n(s) count the cells so far with the same
  (p, q) and level s. Level s has

      the weight         w(s) = 1 + 16 [s = a] + 16 [s = b] + 4 [p - 1 <= s <= q + 1 and s is neither] + 16 n(s)
      and the frequency  f(s) = 1 + w(s) (65536 - L) div (sum of all w);

  what is missing to 65536 goes to the level of the largest weight, the lowest of several.
* *Check.* CRC-8/I-432-1 (polynomial 0x07, initial value 0, not reflected, result XOR 0x55) of three bytes, the rows
  mod 256, the columns mod 256 and L, and of the stream. It finds every flipped bit, and other damage, or another size,
  in all but one of 256 cases; half of those do not end as a stream should.

A writer takes constant where it can, and else the shorter of raw and context, raw if both are as long. Raw costs at
most 3 bits a cell and two bytes. In context, maps of boxes, clicks and objects take a tenth to a fifth of that, and
heat maps a third (420 maps of 16 to 704 cells with 2, 4 and 8 levels, the check included).
"""

from collections.abc import Sequence

import numpy as np

from jaxsem.entropy.adaptive import TOTAL, AdaptiveDecoder, encode_adaptive
from jaxsem.errors import FormatError, InputError

MAX_LEVELS = 8
MAX_CELLS = 1 << 20

CONSTANT, RAW, CONTEXT = range(3)
_MODES = (8192, 4096, 53248)
_SAME, _NEAR, _SEEN = 16, 4, 16


def encode_levels(levels: np.ndarray, count: int) -> bytes:
    """Code a map.

    Args:
        levels: integers [rows, columns], each in ``range(count)``.
        count: how many levels there are, 1 to 8.

    Raises:
        InputError: if that is not what they are.
    """
    levels = np.asarray(levels)
    _check_count(count)
    if levels.ndim != 2 or not 1 <= levels.size <= MAX_CELLS or levels.dtype.kind not in "iu":
        raise InputError(
            f"A map of levels is 1 to {MAX_CELLS} integers [rows, columns], not {levels.dtype} {list(levels.shape)}."
        )
    if not 0 <= levels.min() <= levels.max() < count:
        raise InputError(f"Levels from {levels.min()} to {levels.max()} are not within 0 to {count - 1}.")
    if count == 1:
        return b""
    cells = levels.ravel().tolist()
    if min(cells) == max(cells):
        stream = _encode(CONSTANT, cells[:1], [_even(count)])
    else:
        model = _ContextModel(levels.shape[1], count)
        raw, context = [_even(count)] * len(cells), [model.step(level) for level in cells]
        stream = min(_encode(RAW, cells, raw), _encode(CONTEXT, cells, context), key=len)
    return stream + _check(stream, *levels.shape, count)


def decode_levels(data: bytes, rows: int, columns: int, count: int) -> np.ndarray:
    """The inverse of `encode_levels`: uint8 [rows, columns].

    Raises:
        FormatError: if the data is damaged, cut, too long, or of another size.
        InputError: if the numbers describe no map.
    """
    _check_count(count)
    if min(rows, columns) < 1 or rows * columns > MAX_CELLS:
        raise InputError(f"A map of levels has 1 to {MAX_CELLS} cells, not {rows}x{columns}.")
    stream, check = bytes(data[:-1]), bytes(data[-1:])
    levels = np.zeros((rows, columns), np.uint8)
    damaged = f"These {len(data)} bytes are no map of {rows}x{columns} cells and {count} levels, or damaged"
    if check != (_check(stream, rows, columns, count) if count > 1 else b""):
        raise FormatError(f"{damaged}: their check fails.")
    if count > 1:
        try:
            levels.flat[:] = _decode(stream, rows, columns, count)
        except FormatError as error:
            raise FormatError(f"{damaged}. {error}") from None
    return levels


class _ContextModel:
    """The frequencies of each cell in turn, from the cells before it."""

    def __init__(self, columns: int, count: int):
        self._columns, self._count = columns, count
        self._cells: list[int] = []
        self._seen = [[[0] * count for _ in range(count)] for _ in range(count)]

    def frequencies(self) -> list[int]:
        """Of the levels of the next cell."""
        (low, high), count = self._context(), self._count
        weights = [1 + _SEEN * n for n in self._seen[low][high]]
        for s in range(max(low - 1, 0), min(high + 2, count)):
            weights[s] += _SAME * ((s == low) + (s == high)) or _NEAR
        total = sum(weights)
        found = [1 + weight * (TOTAL - count) // total for weight in weights]
        found[weights.index(max(weights))] += TOTAL - sum(found)
        return found

    def update(self, level: int) -> None:
        """Takes the level of that cell."""
        low, high = self._context()
        self._seen[low][high][level] += 1
        self._cells.append(level)

    def step(self, level: int) -> list[int]:
        """Both: the frequencies with which a known level is coded."""
        found = self.frequencies()
        self.update(level)
        return found

    def _context(self) -> tuple[int, int]:
        place, columns = len(self._cells), self._columns
        known = [self._cells[-1]] if place % columns else []
        known += [self._cells[-columns]] if place >= columns else []
        return (min(known), max(known)) if known else (0, 0)


def _even(count: int) -> list[int]:
    return [TOTAL // count + (s < TOTAL % count) for s in range(count)]


def _encode(mode: int, levels: list[int], frequencies: Sequence[Sequence[int]]) -> bytes:
    return encode_adaptive(np.array([[mode, *levels]]), np.concatenate([_tables([_MODES]), _tables(frequencies)]))[0]


def _decode(stream: bytes, rows: int, columns: int, count: int) -> list[int]:
    decoder, cells, even = AdaptiveDecoder([stream]), rows * columns, _even(count)

    def pull(frequencies: Sequence[int]) -> int:
        return int(decoder.pull(_tables([frequencies])[0])[0])

    def by_context() -> list[int]:
        model, found = _ContextModel(columns, count), []
        for _ in range(cells):
            found.append(pull(model.frequencies()))
            model.update(found[-1])
        return found

    mode = pull(_MODES)
    if mode == CONTEXT:
        found = by_context()
    else:
        found = [pull(even)] * cells if mode == CONSTANT else [pull(even) for _ in range(cells)]
    decoder.finish()
    return found


def _tables(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Frequencies as the coder takes them: int32 [length, 1, k], of one width, zeros behind those that are shorter."""
    found = np.zeros((len(rows), 1, MAX_LEVELS), np.int32)
    found[:, 0, : len(rows[0])] = rows
    return found


def _check(stream: bytes, rows: int, columns: int, count: int) -> bytes:
    register = 0
    for byte in (rows & 255, columns & 255, count, *stream):
        register ^= byte
        for _ in range(8):
            register = register << 1 ^ (0x107 if register & 0x80 else 0)
    return bytes([register ^ 0x55])


def _check_count(count: int) -> None:
    if not 1 <= count <= MAX_LEVELS:
        raise InputError(f"A map has 1 to {MAX_LEVELS} levels, not {count}.")
