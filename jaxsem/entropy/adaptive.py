"""The adaptive format: short streams in which every symbol has a table of its own, 16 bits wide.

The tables come from a model that sees the symbols before, so nothing about them can be prepared. What the short format
of `jaxsem.entropy.lanes` does to begin cheaply does not fit them: a state seeded with a few symbols is too small for
tables of 16 bits, and a seed cannot tell likely symbols from unlikely ones once it is larger than the first of them.
Here the state begins at 0 and takes the first symbols at their cost: while it is small, the numbers it can become next
are dealt to the symbols in turns, by frequency, instead of one run of numbers for each symbol. That leaves about 0.25
bytes over the ideal, whatever the tables; no seed is needed.

Specification of the adaptive format, version 1
-----------------------------------------------
A stream codes a known number of symbols; symbol s of a table has the frequency f[s], at least 1 if it can occur at
all, all f of a table add up to 2^16, and start[s] is the sum of those before s. The state x has the lower bound
L = 2^23.

* *Step.* Symbol s turns x into x'. If x < f[s], then x' is how many pairs (t, y) with 0 <= y < f[t] come before
  (s, x), in the order of (2 y + 1) / f[t], equal ones in the order of t: as seats go to parties in the method of
  Webster and Sainte-Laguë. Else x' = (x div f[s]) * 2^16 + (x mod f[s]) + start[s]. The pairs fill [0, 2^16), the
  others what is above, so a step can be undone.
* *Writing.* Begin with x = 0. From the last symbol to the first: while x >= f[s] * 2^15, move out the low byte of x;
  then the step. The stream is the final x in as few bytes as hold it (none if x = 0), most significant first, then
  the bytes moved out, the last one first.
* *Reading.* Begin with x = 0; whenever x < L and bytes are left, x = 256 x + the next byte: at the beginning and after
  every symbol, which is a step undone. In the end x is 0 and no byte is left, and the first byte was not 0; anything
  else is an error.

References:
    Duda, "Asymmetric numeral systems", arXiv:1311.2540, 2013: the even spread of states over symbols, which its tabled
    variant uses for all states.
"""

from collections.abc import Sequence

import numpy as np

from jaxsem.entropy.lanes import LaneReader, StreamFormat, encode_entries
from jaxsem.errors import InputError

PRECISION = 16
TOTAL = 1 << PRECISION
ADAPTIVE = StreamFormat(bound_bits=23, seeded=True)
_IDLE = TOTAL - 1  # the entry of start 0 and frequency 2^16, which leaves a state as it is


def encode_adaptive(symbols: np.ndarray, frequencies: np.ndarray) -> list[bytes]:
    """Code equally long symbol sequences into one stream each.

    Args:
        symbols: integers [lanes, length].
        frequencies: int32 [length, lanes, k], the table of each symbol, position by position as the decoder meets
            them; each adds up to 2^16, entries that cannot occur are 0.

    Raises:
        InputError: if the shapes do not fit, a table does not add up, or a symbol has frequency 0 or none.
    """
    symbols, frequencies = np.asarray(symbols), np.asarray(frequencies)
    if symbols.ndim != 2 or frequencies.ndim != 3 or frequencies.shape[:2] != symbols.shape[::-1]:
        raise InputError(
            f"Symbols [lanes, length] need tables [length, lanes, k], not {symbols.shape} and {frequencies.shape}."
        )
    length, lanes, k = frequencies.shape
    if not (frequencies.sum(2, dtype=np.int64) == TOTAL).all() or frequencies.min(initial=0) < 0:
        raise InputError(f"The frequencies of a table are at least 0 and add up to {TOTAL}.")
    if symbols.size and not 0 <= symbols.min() <= symbols.max() < k:
        raise InputError(f"Symbols run from {symbols.min()} to {symbols.max()}; their tables have {k} entries.")
    places = symbols.T[..., None].astype(np.int64)
    own = np.take_along_axis(frequencies, places, 2)[..., 0].astype(np.int64)
    if own.size and own.min() < 1:
        raise InputError("A symbol has frequency 0 in its table and cannot be coded.")
    starts = np.take_along_axis(frequencies.cumsum(2, dtype=np.int32), places, 2)[..., 0] - own
    entries = (starts << 16 | (own - 1)).astype(np.uint32)
    state = np.zeros(lanes, np.uint32)
    # Lanes leave this loop with the first symbol that finds x >= f: x is 2^16 or more behind it, and stays so.
    active, i = np.arange(lanes), length
    while active.size and i:
        i -= 1
        active = active[state[active] < own[i, active]]
        state[active] = _spread(state[active].astype(np.int64), symbols[active, i], frequencies[i, active])
        entries[i, active] = _IDLE
    return encode_entries(state, length, entries.__getitem__, PRECISION, ADAPTIVE)


class AdaptiveDecoder:
    """The inverse of `encode_adaptive`: as many `pull`s as there are symbols, then `finish`.

    Args:
        data: one stream per lane.

    Raises:
        FormatError: if a stream cannot be one; the message names the first such lane.
    """

    def __init__(self, data: Sequence[bytes]):
        self._reader = LaneReader(data, ADAPTIVE)
        self._lanes = np.arange(len(data))

    def pull(self, frequencies: np.ndarray) -> np.ndarray:
        """The next symbol of each lane: int64 [lanes], always one of frequency above 0.

        Args:
            frequencies: int32 [lanes, k], the tables that the symbols were written with, each adding up to 2^16.
        """
        state = self._reader.state
        ends = frequencies.cumsum(1, dtype=np.int32)
        slots = state & (TOTAL - 1)
        symbols = (ends <= slots[:, None]).sum(1)
        own = frequencies[self._lanes, symbols].astype(np.int64)
        self._reader.state = own * (state >> PRECISION) + slots - ends[self._lanes, symbols] + own
        small = np.flatnonzero(state < TOTAL)
        if small.size:
            symbols[small], self._reader.state[small] = _gather(state[small], frequencies[small])
        self._reader.refill(PRECISION // 8)
        return symbols

    def finish(self) -> None:
        """See that nothing is left.

        Raises:
            FormatError: if a stream does not end with its last symbol; the message names the first such lane.
        """
        self._reader.finish(self._reader.state)


def _spread(x: np.ndarray, symbols: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """How many pairs come before (symbol, x), for x < f[symbol]: int64 [lanes] of x [lanes], frequencies [lanes, k]."""
    own = np.take_along_axis(frequencies, symbols[:, None], 1).astype(np.int64)
    products = (2 * x[:, None] + 1) * frequencies  # below 2^33
    # (t, y) comes before if (2 y + 1) f[s] is below the product, or for t < s at most the product.
    later = np.arange(frequencies.shape[1]) >= symbols[:, None]
    return (((products - later) // own + 1) >> 1).sum(1)


def _gather(rank: np.ndarray, frequencies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pair (symbol, x) that has so many pairs before it: two int64 [lanes], the inverse of `_spread`."""
    frequencies = frequencies.astype(np.int64)
    target = rank.copy()
    while True:
        # All pairs with (2 y + 1) / f below target / 2^15 come first: there are about `target` of them, k / 2 more at
        # the very most.
        taken = np.maximum((((target[:, None] * frequencies - 1) >> (PRECISION - 1)) + 1) >> 1, 0)
        excess = taken.sum(1) - rank
        if (excess <= 0).all():
            break
        target -= np.maximum(excess, 0)
    lanes, found, x = np.arange(len(rank)), np.empty_like(rank), np.empty_like(rank)
    possible = np.maximum(frequencies, 1)
    for missing in range(int(-excess.min(initial=0)), -1, -1):
        # Unequal fractions differ by 2^-32 or more, so that these integers, below 2^58, order them exactly.
        keys = np.where(frequencies > 0, ((2 * taken + 1) << 40) // possible, 1 << 60)
        following = keys.argmin(1)
        due = -excess >= missing
        found, x = np.where(due, following, found), np.where(due, taken[lanes, following], x)
        taken[lanes, following] += due
    return found, x
