r"""Codecs whose context goes through the latent position by position, and the loop that codes them.

Scale and mean of a position depend on the values at the positions before it, in raster order, within two rows and columns:

    . x x x x x .        Positions on one front, row and column with column + 3 row = f, do not see each other, and all
    . x x x x x .        that they see lies on fronts before theirs. So the loop goes over fronts, not positions: a latent
    . x x o                of 32 x 48 takes 141 steps of up to 16 positions instead of 1,536.

This changes nothing but the order of the symbols in the stream, which is ours to choose: front by front, each from the top
down. `run` is one compiled program: context, parameter network, table, mean and the entropy decoder's steps. Encoder and
decoder run the same one, so that both compute the same floats on one machine; in exact arithmetic they do so on any.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsem import quantize
from jaxsem.codecs.hyperprior import HyperpriorCodec, State
from jaxsem.entropy import traced

REACH = 2  # rows and columns that a context sees
WINDOW = 2 * REACH + 1
_SKEW = REACH + 1
# Far outside every table, yet safe in int32 with any mean: a broken model cannot overflow the escape code.
SYMBOL_LIMIT = 2.0**20
_ROOM = 6  # bytes a symbol that a stream may take: escapes of `SYMBOL_LIMIT` take no more


class SerialCodec(HyperpriorCodec):
    """A hyperprior codec whose only slice of y is coded position by position.

    A subclass gives `context` and `parameters`, and `context_map` where the whole map has a shorter way.
    """

    serial = True

    # -- to be given by a subclass --------------------------------------------------------------------------------

    def context(self, window: jax.Array) -> jax.Array:
        """The context [n, c] of positions in the middle of windows [n, 5, 5, m], whose values from the middle on are 0."""
        raise TypeError(f"{type(self).__name__} does not say what its context is")

    def parameters(self, psi: jax.Array, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Scale and mean, [..., m] each, from psi [..., p] and context [..., c]."""
        raise TypeError(f"{type(self).__name__} does not say what its parameters are")

    def context_map(self, y_hat: jax.Array) -> jax.Array:
        """The context [b, h, w, c] of all positions of y_hat [b, h, w, m] at once."""
        batch, height, width, m = y_hat.shape
        padded = jnp.pad(y_hat, ((0, 0), (REACH, REACH), (REACH, REACH), (0, 0)))
        windows = [padded[:, i : i + height, j : j + width] for i in range(WINDOW) for j in range(WINDOW)]
        seen = [w if k < len(windows) // 2 else jnp.zeros_like(w) for k, w in enumerate(windows)]
        stacked = jnp.stack(seen, axis=3).reshape(-1, WINDOW, WINDOW, m)
        return self.context(stacked).reshape(batch, height, width, -1)

    # -- the frame ------------------------------------------------------------------------------------------------

    def known(self, y: jax.Array, rng: jax.Array | None) -> jax.Array:
        """What the context sees in the forward pass: noisy values when training, else round(y), as in CompressAI.

        In a file it is round(y - mean) + mean, which the forward pass cannot know before the mean.
        """
        return jnp.round(y) if rng is None else quantize.add_uniform_noise(y, rng)

    def predict_y(self, i: int, state: State) -> tuple[jax.Array, jax.Array]:
        """Scale and mean of all positions from `psi` and a `y_hat` that is known already."""
        context = self.context_map(state["y_hat"]).astype(jnp.float32)
        return self.parameters(state["psi"], context)

    def position(self, psi: jax.Array, window: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Table, mean and scale, [n, m] each, of positions with psi [n, p] and windows [n, 5, 5, m]."""
        scale, mean = self.parameters(psi, self.context(window).astype(jnp.float32))
        mean = self._on_grid(mean)
        return self.table_of(scale), mean, scale


# -- the order of positions ---------------------------------------------------------------------------------------------


def order(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each position of a latent, in the order in which they are coded."""
    row, column = np.indices((rows, columns)).reshape(2, -1)
    places = np.lexsort((row, column + _SKEW * row))
    return row[places], column[places]


def _front(f: jax.Array, extent: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows and columns [most] of front f, and which of them there are: those in front, without gaps."""
    rows, columns = extent[0], extent[1]
    first = jnp.maximum(0, -((columns - 1 - f) // _SKEW))
    row = first + jnp.arange(most)
    column = f - _SKEW * row
    return row, column, (column >= 0) & (row < rows)


# -- the loop -------------------------------------------------------------------------------------------------------------


class Coded(NamedTuple):
    """What the loop leaves of one latent.

    Attributes:
      y_hat: float32 [h, w, m]; outside the image's extent the means.
      symbols: int32 [h, w, m], 0 outside.
      tables: int32 [h, w, m], 0 outside.
      bits: (), the model's estimate.
      stream: Behind what was read.
    """

    y_hat: jax.Array
    symbols: jax.Array
    tables: jax.Array
    bits: jax.Array
    stream: traced.Stream


def room(height: int, width: int, channels: int) -> int:
    """Bytes that the program of a grid keeps for a stream."""
    return _ROOM * height * width * channels + 2


@partial(jax.jit, static_argnames=("module", "batched"))
def run(
    module: SerialCodec,
    variables: Any,
    look_ups: traced.LookUps,
    psi: jax.Array,
    y: jax.Array,
    extent: jax.Array,
    stream: traced.Stream,
    decoding: jax.Array,
    batched: bool = False,
) -> Coded:
    """Codes or decodes the latent of one image.

    Args:
      module: The codec.
      variables: Its variables, in float or exact arithmetic.
      look_ups: Of the codec's tables.
      psi: float32 [h, w, p].
      y: float32 [h, w, m]; not looked at when decoding.
      extent: int32 [2], rows and columns that belong to the image.
      stream: Where to read; not looked at when encoding.
      decoding: bool (), whether symbols come from the stream or from y.
      batched: Whether all arrays but `look_ups` and `decoding` have an axis of images in front: for accelerators, which have as
        much time for many scalars as for one. On a CPU one image at a time is faster.
    """
    code = partial(_code, module, variables, look_ups, decoding)
    return (jax.vmap(code) if batched else code)(psi, y, extent, stream)


def _code(module, variables, look_ups, decoding, psi, y, extent, stream) -> Coded:
    height, width, m = y.shape
    most = min(height, -(-width // _SKEW))
    before = np.indices((WINDOW, WINDOW)).reshape(2, -1)[:, : WINDOW**2 // 2]
    outside = height + WINDOW  # a row that scattering drops

    def front(f, state):
        y_hat, symbols, tables, bits, stream = state
        row, column, there = _front(f, extent, most)
        row, column = jnp.where(there, row, 0), jnp.where(there, column, 0)
        seen = y_hat[row[:, None] + before[0], column[:, None] + before[1]]
        window = jnp.pad(seen, ((0, 0), (0, WINDOW**2 - seen.shape[1]), (0, 0))).reshape(most, WINDOW, WINDOW, m)
        table, mean, scale = module.apply(variables, psi[row, column], window, method="position")

        def pull(stream):
            stream, values = traced.read(stream, look_ups, table.reshape(-1), there.sum() * m)
            return stream, values.reshape(most, m)

        def quantise(stream):
            whole = jnp.clip(jnp.round(y[row, column] - mean), -SYMBOL_LIMIT, SYMBOL_LIMIT)
            return stream, whole.astype(jnp.int32)

        stream, found = lax.cond(decoding, pull, quantise, stream)
        values = found.astype(jnp.float32) + mean
        likelihood = module.apply(variables, 1, values, mean, scale, method="likelihood_of")
        bits -= jnp.where(there[:, None], jnp.log2(likelihood), 0.0).sum()
        target = jnp.where(there, row, outside)
        y_hat = y_hat.at[target + REACH, column + REACH].set(values, mode="drop")
        symbols = symbols.at[target, column].set(found, mode="drop")
        tables = tables.at[target, column].set(table, mode="drop")
        return y_hat, symbols, tables, bits, stream

    blank = jnp.zeros((height, width, m), jnp.int32)
    state = jnp.zeros((height + REACH, width + 2 * REACH, m)), blank, blank, jnp.zeros(()), stream
    fronts = extent[1] + _SKEW * (extent[0] - 1)
    y_hat, symbols, tables, bits, stream = lax.fori_loop(0, fronts, front, state)
    y_hat = y_hat[REACH:, REACH : REACH + width]

    def fill(y_hat):
        # The padding is not coded: there the synthesis sees what the model expects.
        _, mean = module.apply(variables, 0, {"psi": psi[None], "y_hat": y_hat[None]}, method="prediction")
        rows, columns = jnp.arange(height)[:, None] < extent[0], jnp.arange(width) < extent[1]
        return jnp.where((rows & columns)[..., None], y_hat, mean[0])

    padded = (extent[0] < height) | (extent[1] < width)
    y_hat = lax.cond(padded, fill, lambda y_hat: y_hat, y_hat)
    return Coded(y_hat, symbols, tables, bits, stream)
