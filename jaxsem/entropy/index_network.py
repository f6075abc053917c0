"""A small autoregressive network in integers: the table of each index from the indices before it.

    a_0 = hidden_bias                                    a_{i+1} = a_i + hidden_weights[i, x_i]
    h_i = clip(a_i in units of 1/128, -127 ... 127)      logits_i = output_bias[i] + output_weights[i] h_i
    table_i: 2^logits_i by a stored table of powers, scaled to frequencies that add up to 2^16

A coder and its decoder must find the same tables on every machine, so nothing here rounds: all numbers are integers, and
the checks on construction bound every one of them.

* a: int32. At most 2^12 terms below 2^15 and a bias below 2^30 stay below 2^31, at every step.
* products: float32, for the speed of its matrix products; they are exact, because 2^10 products below 2^14 add up to less
  than 2^24, the integers that float32 holds, in any order of summation.
* logits: int32. A sum below 2^24 and a bias of at most 2^24 stay below 2^25, differences of two below 2^26.
* frequencies: int64. A power is below 2^16, one of a row is above 0; a scale (below 2^46) times it is below 2^62.

`jaxsem.systems.index_prior` trains and freezes such networks.

References:
    Larochelle and Murray, "The neural autoregressive distribution estimator", AISTATS 2011; with a clipped linear unit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jaxsem.entropy.adaptive import PRECISION
from jaxsem.errors import FormatError, InputError

MAX_POSITIONS = 1 << 12
MAX_SIZE = 1 << 12
MAX_HIDDEN = 1 << 10
MAX_PADDED = 1 << 26  # numbers in the output weights with every position padded to the largest size
HIDDEN_BITS = 7
HIDDEN_LIMIT = (1 << HIDDEN_BITS) - 1
HIDDEN_BIAS_LIMIT = (1 << 30) - 1
OUTPUT_BIAS_LIMIT = 1 << 24
MAX_SHIFT = 24
STEPS = 64  # of the powers, to a factor of 2
MAX_POWERS = 1 << 14
_SCALE_BITS = 30

TYPES = {
    "sizes": "uint16",
    "hidden_weights": "int16",
    "hidden_bias": "int32",
    "output_weights": "int8",
    "output_bias": "int32",
    "powers": "uint16",
    "shifts": "uint8",
}


def powers_of_two() -> np.ndarray:
    """The table of 2^(-i / 64) for new networks, down to the smallest that is not 0: uint16 [1024]."""
    return np.round(65535 * 2.0 ** (-np.arange(16 * STEPS) / STEPS)).astype(np.uint16)


@dataclass(frozen=True, eq=False)
class IndexNetwork:
    """A frozen network for rows of n indices, index i in ``range(sizes[i])``; the module's docstring says what it does.

    Attributes:
        sizes: uint16 [n].
        hidden_weights: int16 [sum(sizes), hidden], one row for each value of each position.
        hidden_bias: int32 [hidden].
        output_weights: int8 [sum(sizes), hidden].
        output_bias: int32 [sum(sizes)].
        powers: uint16 [p], falling: p[i] stands for 2^(-i / 64), and the last one for all smaller powers.
        shifts: uint8 [2], bits that are rounded off a to give 1/128, and off logits to give 1/64.

    Raises:
        InputError: if the arrays are not such a network, or its numbers could overflow.
    """

    sizes: np.ndarray
    hidden_weights: np.ndarray
    hidden_bias: np.ndarray
    output_weights: np.ndarray
    output_bias: np.ndarray
    powers: np.ndarray
    shifts: np.ndarray

    def __post_init__(self):
        for name, dtype in TYPES.items():
            value = np.ascontiguousarray(getattr(self, name))
            if value.dtype != dtype:
                raise InputError(f"A network of indices needs {name!r} as {dtype}, not {value.dtype}.")
            value = value.view()
            value.setflags(write=False)
            object.__setattr__(self, name, value)
        problem = _problem(self)
        if problem:
            raise InputError(f"This is no network of indices: {problem}.")

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The integers, for a safetensors file; see `from_arrays`."""
        return {name: getattr(self, name).copy() for name in TYPES}

    @staticmethod
    def from_arrays(arrays: Mapping[str, np.ndarray]) -> "IndexNetwork":
        """The inverse of `to_arrays`, for files that nobody vouches for.

        Raises:
            FormatError: if an array is missing, surplus, misshapen or out of range.
        """
        if set(arrays) != set(TYPES):
            raise FormatError(
                f"A network of indices has the arrays {sorted(TYPES)}, but the file has {sorted(arrays)}."
            )
        try:
            return IndexNetwork(**arrays)
        except InputError as error:
            raise FormatError(f"The stored network of indices is damaged. {error}") from None

    def frequencies(self, indices: np.ndarray) -> np.ndarray:
        """The tables of all positions at once, as an encoder needs them.

        Args:
            indices: integers [lanes, n], each within its size.

        Returns:
            int32 [n, lanes, max(sizes)]; entries beyond a position's size are 0.
        """
        indices = np.asarray(indices)
        states = np.empty((len(self.sizes), len(indices), len(self.hidden_bias)), np.int32)
        states[0] = self.hidden_bias
        rows = self._bases[:-1, None] + indices.T[:-1]
        np.cumsum(self.hidden_weights[rows], 0, np.int32, out=states[1:])
        states[1:] += self.hidden_bias
        return self._tables(states, slice(None))

    def start(self, lanes: int) -> np.ndarray:
        """The state before the first index: int32 [lanes, hidden]."""
        return np.tile(self.hidden_bias, (lanes, 1))

    def step_frequencies(self, state: np.ndarray, position: int) -> np.ndarray:
        """The tables of one position, as a decoder needs them: int32 [lanes, max(sizes)] of state [lanes, hidden]."""
        return self._tables(state, position)

    def advance(self, state: np.ndarray, position: int, symbols: np.ndarray) -> np.ndarray:
        """The state behind the index `symbols` [lanes] of a position."""
        return state + self.hidden_weights[self._bases[position] + symbols]

    def _tables(self, states: np.ndarray, position: int | slice) -> np.ndarray:
        """Tables [..., k] of states [..., hidden] at one position, or [n, lanes, hidden] at all."""
        matrices, biases, spare = self._outputs
        shift, logit_shift = self._shifts
        hidden = np.minimum(np.maximum(_shifted(states, shift), -HIDDEN_LIMIT), HIDDEN_LIMIT).astype(np.float32)
        logits = np.matmul(hidden, matrices[position]).astype(np.int32)
        logits += biases[position]
        depth = _shifted(logits.max(-1, keepdims=True) - logits, logit_shift)
        powers = self._powers.take(np.minimum(depth, len(self.powers) - 1))
        if self._mask is not None:
            powers *= self._mask[position]
        # Every symbol has one count, and a share of the others by its power. All that rounding down leaves goes to the
        # likeliest, the first one on a tie.
        scale = spare[position] // powers.sum(-1, keepdims=True)
        result = ((powers * scale) >> _SCALE_BITS).astype(np.int32)
        result += 1 if self._mask is None else self._mask[position]
        rows, likeliest = result.reshape(-1, result.shape[-1]), powers.argmax(-1).ravel()
        rows[np.arange(len(rows)), likeliest] += (1 << PRECISION) - rows.sum(-1, dtype=np.int32)
        return result

    @cached_property
    def _bases(self) -> np.ndarray:
        sizes = self.sizes.astype(np.int64)
        return sizes.cumsum() - sizes

    @cached_property
    def _shifts(self) -> tuple[int, int]:
        return int(self.shifts[0]), int(self.shifts[1])

    @cached_property
    def _powers(self) -> np.ndarray:
        return self.powers.astype(np.int64)

    @cached_property
    def _present(self) -> np.ndarray:
        """Which entries of the padded tables there are: bool [n, 1, k]."""
        return np.arange(self.sizes.max()) < self.sizes[:, None, None]

    @cached_property
    def _mask(self) -> np.ndarray | None:
        """`_present` as int32, or None if that is all of them."""
        return None if self._present.all() else self._present.astype(np.int32)

    @cached_property
    def _outputs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What turns hidden units into tables, padded to k = max(sizes).

        Matrices float32 [n, hidden, k], biases int32 [n, 1, k], and the counts of a table that are left when every
        symbol has one, scaled, int64 [n, 1, 1].
        """
        n, k = len(self.sizes), int(self.sizes.max())
        present = self._present[:, 0]
        matrices = np.zeros((n, k, len(self.hidden_bias)), np.float32)
        matrices[present] = self.output_weights
        # Entries that are not there must not be the largest logit.
        biases = np.full((n, 1, k), -(1 << 30), np.int32)
        biases[:, 0][present] = self.output_bias
        spare = ((1 << PRECISION) - self.sizes.astype(np.int64)) << _SCALE_BITS
        return matrices.transpose(0, 2, 1).copy(), biases, spare[:, None, None]


def _shifted(x: np.ndarray, bits: int) -> np.ndarray:
    """X / 2^bits for integers, rounded to nearest, half up."""
    return (x + (1 << bits >> 1)) >> bits if bits else x


def _problem(network: IndexNetwork) -> str | None:
    """What is wrong with the contents of `network`, in words, or None."""
    shapes = {name: getattr(network, name).shape for name in TYPES}
    sizes = network.sizes
    if len(shapes["sizes"]) != 1 or not 1 <= len(sizes) <= MAX_POSITIONS:
        return f"sizes of shape {sizes.shape} are not 1 to {MAX_POSITIONS} in a row"
    if not 1 <= sizes.min() <= sizes.max() <= MAX_SIZE:
        return f"codebook sizes of {sizes.min()} to {sizes.max()} are outside 1 to {MAX_SIZE}, what its tables can hold"
    rows, hidden = int(sizes.sum(dtype=np.int64)), network.hidden_bias.size
    if not 1 <= hidden <= MAX_HIDDEN:
        return f"{hidden} hidden units are outside 1 to {MAX_HIDDEN}"
    if len(sizes) * int(sizes.max()) * hidden > MAX_PADDED:
        return f"{len(sizes)} positions of up to {sizes.max()} codewords and {hidden} hidden units exceed {MAX_PADDED}"
    wanted = {
        "hidden_weights": (rows, hidden),
        "hidden_bias": (hidden,),
        "output_weights": (rows, hidden),
        "output_bias": (rows,),
        "shifts": (2,),
    }
    for name, shape in wanted.items():
        if shapes[name] != shape:
            return f"{name} has shape {shapes[name]}, not {shape}"
    powers = network.powers.astype(np.int32)
    if powers.ndim != 1 or not 1 <= len(powers) <= MAX_POWERS or powers[0] < 1 or (np.diff(powers) > 0).any():
        return f"powers of shape {powers.shape} are not 1 to {MAX_POWERS} falling numbers from above 0 on"
    for name, limit in (("hidden_bias", HIDDEN_BIAS_LIMIT), ("output_bias", OUTPUT_BIAS_LIMIT)):
        # As int64: the magnitude of the smallest int32 does not fit one.
        if (largest := int(np.abs(getattr(network, name).astype(np.int64)).max())) > limit:
            return f"{name} reaches {largest}, so that sums could overflow; at most {limit} is allowed"
    if (smallest := network.hidden_weights.min()) == -(1 << 15):
        return f"hidden_weights reach {smallest}; at least {1 - (1 << 15)} is allowed"
    if network.output_weights.min() == -128:
        return "output_weights reach -128; at least -127 is allowed"
    if network.shifts.max() > MAX_SHIFT:
        return f"shifts of {network.shifts.tolist()} bits exceed {MAX_SHIFT}"
    return None
