"""Integer probability tables: what the entropy coders of this package share.

A table gives every symbol an integer frequency; the frequencies of a table add up to ``2**precision``. Tables are built
once, from a trained model, and from then on they are frozen integers that travel with the weights: nothing at decode
time depends on ``erf`` or on any other floating-point function, so two machines always read the same stream.

References:
    Ballé et al., "Variational image compression with a scale hyperprior", ICLR 2018 (Gaussian latents).
    The quantisation to frequencies follows CompressAI, so that its tables can be compared entry by entry.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from jaxsem.errors import FormatError, InputError

MAX_TABLES = 1 << 14
MAX_ENTRIES = 1 << 22
MAX_OFFSET = 1 << 24
LOOKUP_BITS = 7
ESCAPED = -(1 << 31)


class CodingArrays(NamedTuple):
    """What the coders look up. A *position* numbers an entry over all tables: ``bases[table] + symbol number``.

    Two service tables follow the user's: number ``digit_table`` has sixteen equal symbols (the digits of escaped
    values), number ``idle_table`` a single symbol of full frequency, which leaves any coder state as it is.

    Attributes:
        bases: int32 [tables + 2], position of the first entry of each table.
        offsets: int32 [tables + 2], value of that first entry.
        shifts: int32 [tables + 2], value minus position of every entry of a table.
        limits: uint32 [tables + 2], how many ordinary symbols a table has (its escape symbol not counted).
        escapes: int32 [tables + 2], position of the escape symbol, -1 for a table without one.
        starts: int32 [positions], cumulative frequency below each entry; every row ends with one more,
            ``2**precision``.
        entries: uint32 [positions], ``start << 16 | frequency - 1``.
        values: int32 [positions], the value of each entry, ``ESCAPED`` for escape symbols.
        lookup: int32 [(tables + 2) << bits], position of the entry that holds slot ``i << precision - bits``.
        lookup_bits: the ``bits`` above.
        digit_table: number of the table of digits.
        idle_table: number of the table that does nothing.
    """

    bases: np.ndarray
    offsets: np.ndarray
    shifts: np.ndarray
    limits: np.ndarray
    escapes: np.ndarray
    starts: np.ndarray
    entries: np.ndarray
    values: np.ndarray
    lookup: np.ndarray
    lookup_bits: int
    digit_table: int
    idle_table: int


@dataclass(frozen=True, eq=False)
class Tables:
    """An ordered list of frequency tables of one precision.

    Attributes:
        frequencies: int32 [entries], the tables one after another; each table's frequencies add up to ``2**precision``.
        sizes: int32 [tables], entries of each table, its escape symbol included.
        offsets: int32 [tables], value of the first symbol of each table.
        escapes: bool [tables], whether the last entry stands for "a value outside this table". A table without it is
            closed: only its own values can be coded.
        precision: bits of the frequencies, 4 to 16; 16 for long streams, 8 for tiny ones.

    Raises:
        InputError: if the arrays do not describe such tables.
    """

    frequencies: np.ndarray
    sizes: np.ndarray
    offsets: np.ndarray
    escapes: np.ndarray
    precision: int = 16

    def __post_init__(self):
        for name, dtype in (
            ("frequencies", np.int32),
            ("sizes", np.int32),
            ("offsets", np.int32),
            ("escapes", np.bool_),
        ):
            value = np.asarray(getattr(self, name))
            if value.ndim != 1 or value.dtype.kind not in "iub":
                raise InputError(f"Tables need a flat integer array for {name!r}, not {value.dtype} {value.shape}.")
            info = np.iinfo(np.int32)
            if value.size and not info.min <= int(value.min()) <= int(value.max()) <= info.max:
                raise InputError(f"Tables need 32-bit values for {name!r}, not {value.min()} to {value.max()}.")
            value = value.astype(dtype)
            value.setflags(write=False)
            object.__setattr__(self, name, value)
        object.__setattr__(self, "precision", int(self.precision))
        problem = _problem(self)
        if problem:
            raise InputError(f"These are no frequency tables: {problem}.")

    def __len__(self) -> int:
        return len(self.sizes)

    @staticmethod
    def from_rows(rows: Sequence[np.ndarray], offsets=0, escapes=True, precision: int = 16) -> "Tables":
        """Tables from one frequency array per table; ``offsets`` and ``escapes`` are one value for all, or one each."""
        return Tables(
            np.concatenate([np.asarray(row, np.int64) for row in rows]) if len(rows) else np.zeros(0, np.int32),
            np.array([len(row) for row in rows], np.int64),
            np.broadcast_to(offsets, len(rows)),
            np.broadcast_to(escapes, len(rows)),
            precision,
        )

    @staticmethod
    def concat(*parts: "Tables") -> "Tables":
        """The tables of all parts in order; those of the second part are numbered from ``len(parts[0])`` on."""
        precisions = {part.precision for part in parts}
        if len(precisions) != 1:
            raise InputError(f"Only tables of one precision can be joined, not {sorted(precisions)} bits.")
        names = ("frequencies", "sizes", "offsets", "escapes")
        return Tables(*(np.concatenate([getattr(part, name) for part in parts]) for name in names), precisions.pop())

    def row(self, table: int) -> np.ndarray:
        """The frequencies of one table, int32 [size], its escape symbol last where it has one."""
        end = int(self.sizes[: table + 1].sum())
        return self.frequencies[end - int(self.sizes[table]) : end]

    def arrays(self) -> dict[str, np.ndarray]:
        """Small integer arrays that hold everything, for a safetensors file; see `from_arrays`."""
        return {
            "frequencies": (self.frequencies - 1).astype(np.uint16),
            "sizes": self.sizes.copy(),
            "offsets": self.offsets.copy(),
            "escapes": self.escapes.astype(np.uint8),
            "precision": np.array([self.precision], np.uint8),
        }

    @staticmethod
    def from_arrays(arrays: Mapping[str, np.ndarray]) -> "Tables":
        """The inverse of `arrays`, for files that nobody vouches for.

        Raises:
            FormatError: if an array is missing, surplus, misshapen or out of range, or a table does not add up.
        """
        types = {
            "frequencies": "uint16",
            "sizes": "int32",
            "offsets": "int32",
            "escapes": "uint8",
            "precision": "uint8",
        }
        if set(arrays) != set(types):
            raise FormatError(f"Stored tables need the arrays {sorted(types)}, but the file has {sorted(arrays)}.")
        arrays = {name: np.asarray(value) for name, value in arrays.items()}
        for name, value in arrays.items():
            if value.dtype != types[name] or value.ndim != 1 or (name == "precision" and len(value) != 1):
                raise FormatError(
                    f"Stored tables need {name!r} as flat {types[name]}, not {value.dtype} {value.shape}."
                )
        if arrays["escapes"].size and arrays["escapes"].max() > 1:
            raise FormatError(f"Stored tables need 'escapes' of 0 and 1, not {arrays['escapes'].max()}.")
        frequencies = arrays["frequencies"].astype(np.int32) + 1
        rest = (arrays[name] for name in ("sizes", "offsets", "escapes"))
        try:
            return Tables(frequencies, *rest, int(arrays["precision"][0]))
        except InputError as error:
            raise FormatError(f"The stored tables are damaged. {error}") from None

    def digest(self) -> bytes:
        """SHA-256 (32 bytes) of the tables: equal digests mean equal streams, whatever the machine."""
        parts = [np.array([self.precision, len(self)]), self.sizes, self.offsets, self.escapes, self.frequencies]
        content = b"".join(part.astype("<i4").tobytes() for part in parts)
        return hashlib.sha256(b"jaxsem tables 1\0" + content).digest()

    @cached_property
    def coding(self) -> CodingArrays:
        """The look-up arrays of the coders, built on first use."""
        scale = 1 << self.precision
        rows = [*np.split(self.frequencies, np.cumsum(self.sizes)[:-1]), np.full(16, scale // 16), np.array([scale])]
        sizes = np.array([len(row) for row in rows])
        bases = np.cumsum(sizes + 1) - sizes - 1
        starts = np.concatenate([np.append(0, np.cumsum(row)) for row in rows]).astype(np.int32)
        frequencies = np.concatenate([np.append(row, 1) for row in rows])
        escapes = np.concatenate([self.escapes, [False, False]])
        limits = sizes - escapes
        offsets = np.concatenate([self.offsets, [0, 0]])
        values = np.concatenate([np.arange(n + 1) + first for n, first in zip(sizes, offsets)])
        values[(bases + limits)[escapes]] = ESCAPED
        bits = min(LOOKUP_BITS, self.precision)
        slots = np.arange(1 << bits) << (self.precision - bits)
        firsts = [np.searchsorted(starts[b : b + n], slots, side="right") - 1 + b for b, n in zip(bases, sizes)]
        return CodingArrays(
            bases=bases.astype(np.int32),
            offsets=offsets.astype(np.int32),
            shifts=(offsets - bases).astype(np.int32),
            limits=limits.astype(np.uint32),
            escapes=np.where(escapes, bases + limits, -1).astype(np.int32),
            starts=starts,
            entries=(starts.astype(np.uint32) << 16) | (frequencies - 1).astype(np.uint32),
            values=values.astype(np.int32),
            lookup=np.concatenate(firsts).astype(np.int32),
            lookup_bits=bits,
            digit_table=len(self),
            idle_table=len(self) + 1,
        )


def _problem(tables: Tables) -> str | None:
    """What is wrong with the contents of `tables`, in words, or None."""
    sizes, frequencies, scale = tables.sizes, tables.frequencies, 1 << min(max(tables.precision, 0), 16)
    if not 4 <= tables.precision <= 16:
        return f"a precision of {tables.precision} bits is outside 4 to 16"
    if not 1 <= len(sizes) <= MAX_TABLES:
        return f"{len(sizes)} tables are outside 1 to {MAX_TABLES}"
    if not len(sizes) == len(tables.offsets) == len(tables.escapes):
        return (
            f"{len(sizes)} sizes, {len(tables.offsets)} offsets and {len(tables.escapes)} escape marks differ in number"
        )
    if sizes.min() < 1 or sizes.max() > scale or (tables.escapes & (sizes < 2)).any():
        return (
            f"table sizes of {sizes.min()} to {sizes.max()} entries do not fit {tables.precision} bits and the escapes"
        )
    if sizes.sum(dtype=np.int64) != len(frequencies) or len(frequencies) > MAX_ENTRIES:
        return f"{sizes.sum(dtype=np.int64)} entries announced, {len(frequencies)} found, at most {MAX_ENTRIES} allowed"
    if abs(tables.offsets.astype(np.int64)).max() > MAX_OFFSET:
        return f"offsets of {tables.offsets.min()} to {tables.offsets.max()} lie outside ±{MAX_OFFSET}"
    if frequencies.min() < 1 or frequencies.max() > scale:
        return f"frequencies of {frequencies.min()} to {frequencies.max()} are outside 1 to {scale}"
    sums = np.add.reduceat(frequencies, np.cumsum(sizes) - sizes, dtype=np.int64)
    wrong = np.flatnonzero(sums != scale)
    if len(wrong):
        return f"the frequencies of table {wrong[0]} add up to {sums[wrong[0]]}, not {scale}"
    return None


def quantise_pmf(pmf: np.ndarray, precision: int = 16) -> np.ndarray:
    """Integer frequencies for probabilities, by CompressAI's rule, which its published streams fix.

    Round to multiples of ``2**-precision``, rescale downwards to the exact total, give the remainder to the last
    symbol; then each symbol that came out empty takes one count from the rarest symbol that has two or more.

    Args:
        pmf: [n] non-negative; they need not add up to one exactly.
        precision: bits.

    Returns:
        int32 [n], each at least 1, together ``2**precision``.

    Raises:
        InputError: if the probabilities are not finite, negative, all zero, or more than there are counts.
    """
    pmf, scale = np.asarray(pmf, np.float64), 1 << precision
    if pmf.ndim != 1 or not 1 <= len(pmf) <= scale or not np.isfinite(pmf).all() or pmf.min() < 0:
        raise InputError(
            f"A table of {precision} bits needs 1 to {scale} finite probabilities in a row; got {pmf.shape}."
        )
    counts = np.floor(pmf * scale + 0.5).astype(np.int64)
    if not 0 < counts.sum() < 1 << 40:
        raise InputError(f"Probabilities must add up to about 1, not {pmf.sum():g}.")
    counts = counts * scale // counts.sum()
    counts[-1] += scale - counts.sum()
    for empty in np.flatnonzero(counts == 0):
        donor = np.argmin(np.where(counts > 1, counts, scale + 1))
        counts[donor] -= 1
        counts[empty] = 1
    return counts.astype(np.int32)


def quantise_counts(counts: np.ndarray, precision: int = 8) -> np.ndarray:
    """Integer frequencies that code these counts in the fewest bits: each at least 1, together ``2**precision``.

    Args:
        counts: [n] non-negative numbers of occurrences (or probabilities); all zero means "nothing known", an even
            split.
        precision: bits.

    Returns:
        int32 [n]. Among the frequencies allowed, they minimise ``-sum(counts * log2(frequencies))``: moving single
        counts to where they save most is optimal, since the logarithm is concave. Ties go to the first symbol.
    """
    counts, scale = np.asarray(counts, np.float64), 1 << precision
    if counts.ndim != 1 or not 1 <= len(counts) <= scale or not np.isfinite(counts).all() or counts.min() < 0:
        raise InputError(
            f"A table of {precision} bits needs 1 to {scale} non-negative counts in a row; got {counts.shape}."
        )
    shares = counts / counts.sum() if counts.any() else np.full(len(counts), 1 / len(counts))
    rare = np.zeros(len(counts), bool)  # those that deserve less than the one count they must have
    while True:
        free = scale - rare.sum()
        ideal = np.where(rare, 1, shares * free / max(shares[~rare].sum(), 1e-300))
        if not (more := (ideal < 1) & ~rare).any():
            break
        rare |= more
    result = np.maximum(np.floor(ideal), 1)
    # What remains is a few single counts: place them, then exchange while that saves bits.
    while True:
        gain = shares * np.log1p(1 / result)
        loss = np.where(result > 1, -shares * np.log1p(-1 / np.maximum(result, 1.5)), np.inf)
        missing, best, worst = scale - result.sum(), np.argmax(gain), np.argmin(loss)
        if missing == 0 and not gain[best] > loss[worst] * (1 + 1e-9):
            return result.astype(np.int32)
        if missing >= 0:
            result[best] += 1
        if missing <= 0:
            result[worst] -= 1


def tables_from_counts(counts: Sequence[np.ndarray], precision: int = 8, offsets=0, escape: bool = False) -> Tables:
    """Static tables from how often each symbol was seen.

    Args:
        counts: one array of counts per table (or a matrix [tables, n]); a symbol never seen still gets frequency 1.
        precision: bits, 8 for tiny streams.
        offsets: value of the first symbol, one for all tables or one each.
        escape: whether a further last symbol of frequency about 1 lets other values through. Closed tables (the
            default) are a little cheaper.
    """
    rows = [quantise_counts(np.append(row, 0) if escape else np.asarray(row), precision) for row in counts]
    return Tables.from_rows(rows, offsets, escape, precision)


def scale_table(low: float = 0.11, high: float = 256.0, levels: int = 64) -> np.ndarray:
    """The standard deviations of the Gaussian tables: float32 [levels], evenly spaced in the logarithm."""
    if not (0 < low < high < 1e5 and levels >= 2):
        raise InputError(f"A scale table needs 0 < low < high and two levels or more; got {low}, {high}, {levels}.")
    return np.exp(np.linspace(math.log(low), math.log(high), levels)).astype(np.float32)


def scale_thresholds(scales: np.ndarray | None = None, rule: str = "nearest") -> np.ndarray:
    """The scales at which the table index rises: index of a scale = how many thresholds lie strictly below it.

    Args:
        scales: increasing standard deviations, `scale_table` by default.
        rule: "nearest" in the log domain (thresholds are the geometric midpoints, +0.06 % rate with 64 tables), or
            "above", the smallest table not below the scale (CompressAI's rule, +2.47 %).

    Returns:
        float32 [len(scales) - 1], for the host and for device functions alike.
    """
    scales = np.asarray(scale_table() if scales is None else scales, np.float64)
    if rule == "nearest":
        return np.sqrt(scales[:-1] * scales[1:]).astype(np.float32)
    if rule == "above":
        return scales[:-1].astype(np.float32)
    raise InputError(f"The rule for scales is 'nearest' or 'above', not {rule!r}.")


def scale_index(scale: np.ndarray, rule: str = "nearest", scales: np.ndarray | None = None) -> np.ndarray:
    """Table index of each standard deviation: int32, same shape; see `scale_thresholds`. NaN takes the last."""
    thresholds = scale_thresholds(scales, rule)
    return np.searchsorted(thresholds, np.asarray(scale, np.float32), side="left").astype(np.int32)


def gaussian_tables(
    scales: np.ndarray | None = None,
    tail_mass: float = 1e-9,
    precision: int = 16,
    quantise: Callable[[np.ndarray, int], np.ndarray] = quantise_pmf,
) -> Tables:
    """One table per standard deviation, for integers whose mean was subtracted before rounding.

    The table of σ covers -c to c with c = ⌈-Φ⁻¹(tail_mass / 2) σ⌉, each value with the mass of the unit interval
    around it; the escape symbol takes the mass of both tails.

    Args:
        scales: standard deviations, `scale_table` by default.
        tail_mass: how much probability may lie outside a table.
        precision: bits; 16 fits all scales up to 256 (3132 entries).
        quantise: `quantise_pmf` for CompressAI's own tables, or `quantise_counts`, which wastes less than half as much
            on the wide ones (at σ = 52, 0.06 % of the rate instead of 0.15 %).
    """
    scales = scale_table() if scales is None else scales
    if not 0 < tail_mass < 1:
        raise InputError(f"A tail mass is a probability between 0 and 1, not {tail_mass}.")
    width = -NormalDist().inv_cdf(tail_mass / 2)
    rows, offsets = [], []
    for scale in np.asarray(scales, np.float64).tolist():
        half = math.ceil(scale * width)
        # Φ at the bin edges -½, -1½, ... on the left flank; erfc keeps its relative accuracy down there.
        edges = [0.5 * math.erfc((k + 0.5) / (scale * math.sqrt(2))) for k in range(half + 1)]
        flank = [edges[k - 1] - edges[k] for k in range(1, half + 1)]
        pmf = [*reversed(flank), 1 - 2 * edges[0], *flank, 2 * edges[half]]
        rows.append(quantise(np.array(pmf), precision))
        offsets.append(-half)
    return Tables.from_rows(rows, offsets, True, precision)
