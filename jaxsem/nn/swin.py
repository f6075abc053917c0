"""Swin transformer blocks: attention inside windows, which every other block shifts by half a window.

    x + attention(norm1(x)), then x + mlp(norm2(x)), on maps [b, h, w, c] of any height and width

A block's windows tile the map from its upper left corner, or begin `shift` rows and columns further down and right; then those at
the border are cut. To compute whole windows only, the map is filled up with zeros at its lower and right end and rolled, and a
mask keeps apart what shares a window but not a place. Three decisions:

* Filling is not attended to: a border token sees fewer tokens, all of them real. Swin's detectors attend to it; the codec TIC and
  the restoration model SwinIR are only defined on maps that their windows divide, and are met exactly there.
* Along an axis that is shorter than a window there is no shift: one window already holds all of it, and a shift would cut it.
  An axis of exactly one window is shifted and so cut in halves, as in the published models.
* The mask excludes; published codes add -100 to a logit, which is the same in float32 for all but absurd logits.

Source: Liu et al., Swin Transformer (ICCV 2021); the residual groups are those of Liang et al., SwinIR (2021), and of Lu et al.,
Transformer-based Image Compression (DCC 2022).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxsem.errors import InputError
from jaxsem.nn.attention import check_heads
from jaxsem.nn.transformer import LayerNorm, Mlp

DROP_PATH = "drop_path"  # the stream of random numbers that turns stochastic depth on

_init = nn.initializers.truncated_normal(0.02)


class WindowAttention(nn.Module):
    """Self-attention over the tokens of square windows; to a logit adds a learned bias for how far the key lies from the query.

    The softmax is computed in float32.

    Attributes:
      heads: Number of heads; divides the width of the tokens.
      window: Side of a window.
      project: Whether a linear layer follows, as it usually does.
      dtype: Of the computation.
      param_dtype: Of the parameters.
    """

    heads: int
    window: int
    project: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Maps the tokens of n windows, row by row, to tokens of the same shape.

        Args:
          x: [n, window², width].
          mask: bool [m, window², window²], where False the token of the second axis does not see that of the last; window k
            has the mask k modulo m.

        Raises:
          InputError: The heads do not divide the width.
        """
        windows, tokens, width = x.shape
        check_heads(width, self.heads)
        qkv = self._dense("qkv", 3 * width)(x).reshape(windows, tokens, 3, self.heads, -1)
        query, key, value = (qkv[:, :, part] for part in range(3))
        size = (2 * self.window - 1) ** 2
        table = self.param("bias_table", _init, (size, self.heads), self.param_dtype)
        bias = table[relative_positions(self.window)].transpose(2, 0, 1)[None]
        if mask is not None:
            mask = jnp.broadcast_to(mask, (windows // len(mask), *mask.shape)).reshape(windows, 1, tokens, tokens)
        y = jax.nn.dot_product_attention(query, key, value, bias=bias, mask=mask).reshape(x.shape)
        return self._dense("proj", width)(y) if self.project else y

    def _dense(self, name: str, features: int) -> nn.Dense:
        return nn.Dense(features, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=_init, name=name)


class SwinBlock(nn.Module):
    """One block; whether it is a shifted one is said by the call, so that a scan can run both kinds.

    Attributes:
      heads: Attention heads.
      window: Side of a window.
      ratio: Width inside the MLP over the width of the tokens.
      dtype: Of the computation.
      param_dtype: Of the parameters.
    """

    heads: int
    window: int
    ratio: float = 4.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, shift: jax.Array | int = 0, drop: jax.Array | float = 0.0) -> jax.Array:
        """Maps [b, h, w, c] to the same shape.

        Args:
          x: The map.
          shift: Rows and columns by which the windows are shifted, in [0, window).
          drop: How often, below 1, stochastic depth leaves out what a half of the block adds for an image, where the call has
            random numbers for it (`rngs={"drop_path": key}`); without them nothing is left out.
        """
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attention = WindowAttention(self.heads, self.window, name="attention", **types)
        y = LayerNorm(name="norm1", **types)(x)
        windows, mask = gather_windows(y, self.window, shift)
        x = x + self._thin(place_windows(attention(windows, mask), x.shape, self.window, shift), drop)
        y = LayerNorm(name="norm2", **types)(x)
        return x + self._thin(Mlp(int(self.ratio * x.shape[-1]), name="mlp", **types)(y), drop)

    def _thin(self, x: jax.Array, drop: jax.Array | float) -> jax.Array:
        if not self.has_rng(DROP_PATH):
            return x
        keep = 1.0 - jnp.asarray(drop, jnp.float32)
        kept = jax.random.bernoulli(self.make_rng(DROP_PATH), keep, (x.shape[0], 1, 1, 1))
        return x * (kept / keep).astype(x.dtype)


class SwinBlocks(nn.Module):
    """A stack of blocks, every second one shifted by half a window, as one scan: parameters have the blocks on the leading axis.

    Attributes:
      depth: Blocks.
      heads: Attention heads.
      window: Side of a window.
      ratio: Width inside the MLP over the width of the tokens.
      drop: Rate of stochastic depth of each block, see `SwinBlock`; empty for none.
      dtype: Of the computation.
      param_dtype: Of the parameters.
      remat: Whether to recompute each block in the backward pass instead of keeping what is inside it.
    """

    depth: int
    heads: int
    window: int
    ratio: float = 4.0
    drop: tuple[float, ...] = ()
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, h, w, c] to the same shape, in the type of the computation.

        Raises:
          InputError: Not one rate for each block, or heads that do not divide the width.
        """
        drop = self.drop or (0.0,) * self.depth
        if len(drop) != self.depth or not all(0 <= rate < 1 for rate in drop):
            raise InputError(
                f"a stack of {self.depth} blocks needs as many rates of stochastic depth below 1, not {drop}"
            )

        def step(block: SwinBlock, x: jax.Array, shift: jax.Array, rate: jax.Array) -> tuple[jax.Array, None]:
            return block(x, shift, rate), None

        run = nn.scan(
            nn.remat(step, prevent_cse=False) if self.remat else step,
            variable_axes={"params": 0},
            split_rngs={"params": True, DROP_PATH: True},
            length=self.depth,
        )
        block = SwinBlock(self.heads, self.window, self.ratio, self.dtype, self.param_dtype, name="blocks")
        shifts = jnp.arange(self.depth) % 2 * (self.window // 2)
        return run(block, x.astype(self.dtype), shifts, jnp.asarray(drop, jnp.float32))[0]


class ResidualSwinBlocks(SwinBlocks):
    """x + blocks(x): the residual Swin transformer block (RSTB) of TIC, which has no convolution inside."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, h, w, c] to the same shape; see `SwinBlocks`."""
        return x.astype(self.dtype) + super().__call__(x)


# -- windows ----------------------------------------------------------------------------------------------------------


def split_windows(x: jax.Array, window: int) -> jax.Array:
    """[b, h, w, c] to [b * windows, window², c], row by row; the window divides h and w."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // window, window, width // window, window, channels)
    return x.swapaxes(2, 3).reshape(-1, window**2, channels)


def join_windows(x: jax.Array, height: int, width: int, window: int) -> jax.Array:
    """The inverse of `split_windows`: [b * windows, window², c] to [b, height, width, c]."""
    x = x.reshape(-1, height // window, width // window, window, window, x.shape[-1])
    return x.swapaxes(2, 3).reshape(-1, height, width, x.shape[-1])


def gather_windows(x: jax.Array, window: int, shift: jax.Array | int = 0) -> tuple[jax.Array, jax.Array | None]:
    """The windows of a map, filled up where they stick out.

    Args:
      x: [b, h, w, c].
      window: Side of a window.
      shift: Rows and columns by which the windows are shifted, in [0, window).

    Returns:
      [b * windows, window², c], and bool [windows, window², window²], which token belongs with which; None where all do.
    """
    sides = x.shape[1:3]
    filling = [-side % window for side in sides]
    shifts = _shifts(sides, window, shift)
    regions = [_regions(side, fill, by) for side, fill, by in zip(sides, filling, shifts, strict=True)]
    x = jnp.pad(x, ((0, 0), (0, filling[0]), (0, filling[1]), (0, 0)))
    windows = split_windows(_roll(x, [-by for by in shifts]), window)
    if not any(filling) and all(_is_zero(by) for by in shifts):
        return windows, None
    region = split_windows((3 * regions[0][:, None] + regions[1])[None, :, :, None], window)[..., 0]
    return windows, region[:, :, None] == region[:, None, :]


def place_windows(x: jax.Array, shape: tuple[int, ...], window: int, shift: jax.Array | int = 0) -> jax.Array:
    """The inverse of `gather_windows`: [b * windows, window², c] to a map of `shape` (b, h, w, c)."""
    height, width = shape[1:3]
    x = join_windows(x, height + -height % window, width + -width % window, window)
    return _roll(x, _shifts((height, width), window, shift))[:, :height, :width]


def relative_positions(window: int) -> np.ndarray:
    """The row of the bias table for each pair of query and key, int [window², window²]; rows count up with query - key."""
    row, column = np.indices((window, window)).reshape(2, -1)
    down, right = (axis[:, None] - axis + window - 1 for axis in (row, column))
    return down * (2 * window - 1) + right


def _shifts(sides: tuple[int, ...], window: int, shift: jax.Array | int) -> list[jax.Array | int]:
    """The shift along each axis: none where one window holds more than all of it."""
    return [shift if side >= window else 0 for side in sides]


def _regions(side: int, filling: int, shift: jax.Array | int) -> jax.Array:
    """Along an axis after rolling: 0 for a place of the map, 1 for one that came round from its front, 2 for filling."""
    place = jnp.arange(side + filling) + shift
    round_again = place >= side + filling
    return jnp.where(~round_again & (place >= side), 2, round_again)


def _roll(x: jax.Array, by: list[jax.Array | int]) -> jax.Array:
    return x if all(_is_zero(step) for step in by) else jnp.roll(x, tuple(by), (1, 2))


def _is_zero(number: jax.Array | int) -> bool:
    """Whether a number is 0 and known to be so while tracing."""
    return isinstance(number, int) and number == 0
