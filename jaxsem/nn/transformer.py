"""Pre-norm transformer blocks, and stacks of equal blocks as one scan.

In a stack the layers lie on the leading axis of every parameter. Compiling costs one block however many there are, and
part of the stack is a slice: `scan_layers` runs any span of its layers, and `params["blocks"][...][:m]` are its first m.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsem.errors import InputError
from jaxsem.nn.attention import KVCache, MultiHeadAttention


def quick_gelu(x: jax.Array) -> jax.Array:
    """Gives x * sigmoid(1.702 x), the approximation of GELU that OpenAI's CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """Gives x * Phi(x), exactly: Hendrycks and Gimpel, Gaussian Error Linear Units (2016)."""
    return jax.nn.gelu(x, approximate=False)


def gelu_new(x: jax.Array) -> jax.Array:
    """Gives the tanh approximation of x * Phi(x), the GELU that GPT-2 was trained with."""
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "quick_gelu": quick_gelu,
    "gelu_new": gelu_new,
    "relu": nn.relu,
}


def check_activation(name: str) -> None:
    """Refuses an activation that is not in `ACTIVATIONS`.

    Raises:
      InputError: It is not.
    """
    if name not in ACTIVATIONS:
        raise InputError(f"there is no activation {name!r}; there are {', '.join(ACTIVATIONS)}")


class LayerNorm(nn.LayerNorm):
    """Layer normalisation whose variance is that of the centred values, as PyTorch computes it.

    Flax by default takes the mean of the squares less the square of the mean, which loses digits where a few channels are
    large, as they are in trained CLIP models.
    """

    epsilon: float = 1e-5
    use_fast_variance: bool = False


class Mlp(nn.Module):
    """Two linear layers, `fc1` and `fc2`, with an activation between.

    Attributes:
      hidden: Width between the layers.
      activation: A name in `ACTIVATIONS`.
      out_std: Standard deviation of `fc2` at initialisation; None is 1 / sqrt(hidden).
      dtype: Of the computation.
      param_dtype: Of the parameters.
    """

    hidden: int
    activation: str = "gelu"
    out_std: float | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., width] to the same shape."""
        check_activation(self.activation)
        width = x.shape[-1]
        out_std = self.hidden**-0.5 if self.out_std is None else self.out_std
        y = ACTIVATIONS[self.activation](self._dense("fc1", self.hidden, (2 * width) ** -0.5)(x))
        return self._dense("fc2", width, out_std)(y)

    def _dense(self, name: str, features: int, std: float) -> nn.Dense:
        init = nn.initializers.normal(std)
        return nn.Dense(features, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=init, name=name)


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)).

    Initialised as the text tower of OpenAI's CLIP: what adds to the residual sum is smaller by sqrt(2 depth).

    Attributes:
      heads: Attention heads.
      hidden: Width inside the MLP.
      activation: A name in `ACTIVATIONS`.
      causal: Whether a token sees only itself and those before it.
      epsilon: Of the two layer normalisations.
      depth: Layers of the stack that the block belongs to; matters for the initialisation only.
      dtype: Of the computation.
      param_dtype: Of the parameters.
      qkv_bias: Whether queries, keys and values have biases.
    """

    heads: int
    hidden: int
    activation: str = "gelu"
    causal: bool = False
    epsilon: float = 1e-5
    depth: int = 1
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    qkv_bias: bool = True

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        cache: KVCache | None = None,
        layer: jax.Array | int | None = None,
    ) -> Any:
        """Maps [b, n, width] to the same shape; for the other arguments and what a cache adds see `MultiHeadAttention`."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        std = (2 * self.depth * x.shape[-1]) ** -0.5
        x = x.astype(self.dtype)
        y = LayerNorm(self.epsilon, name="norm1", **types)(x)
        attention = MultiHeadAttention(self.heads, self.causal, std, qkv_bias=self.qkv_bias, name="attention", **types)
        y = attention(y, mask, cache, layer)
        if cache is not None:
            y, cache = y
        x = x + y
        y = LayerNorm(self.epsilon, name="norm2", **types)(x)
        x = x + Mlp(self.hidden, self.activation, std, name="mlp", **types)(y)
        return x if cache is None else (x, cache)


def scan_layers(
    block: nn.Module,
    x: jax.Array,
    *args: Any,
    layers: int,
    first: int = 0,
    last: int | None = None,
    remat: bool = False,
    collect: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Runs a span of a stack of equal blocks; call it inside the module that owns `block`.

    The block's own parameters are those of all layers, with a leading axis of length `layers`.

    Args:
      block: Any module that maps (x, *args) to the shape and type of x.
      x: What the first layer of the span takes.
      *args: Given to every layer, the same.
      layers: Layers of the whole stack.
      first: The first layer to run, counted as in a Python slice.
      last: One past the last layer to run, counted as in a Python slice.
      remat: Whether to recompute each layer in the backward pass instead of keeping what is inside it.
      collect: Whether to keep what every layer gives.

    Returns:
      What the last layer of the span gives; and what each one gives, stacked on a leading axis, or None.
    """

    def step(block: nn.Module, x: jax.Array, *args: Any) -> tuple[jax.Array, jax.Array | None]:
        y = block(x, *args)
        return y, (y if collect else None)

    # Parameters are made for all layers, whichever are asked for.
    span = range(layers) if block.is_initializing() else range(layers)[first:last]
    if not span:
        return x, (jnp.zeros((0, *x.shape), x.dtype) if collect else None)
    run = nn.scan(
        nn.remat(step, prevent_cse=False) if remat else step,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=len(span),
    )
    if len(span) < layers:
        run = nn.map_variables(
            run, "params", trans_in_fn=lambda tree: jax.tree.map(lambda p: p[span.start : span.stop], tree)
        )
    return run(block, x, *args)


def extend_layers(block: nn.Module, x: jax.Array, cache: KVCache, *args: Any, layers: int) -> tuple[jax.Array, KVCache]:
    """Runs a stack of equal blocks on tokens that follow those of a cache; the parameters are those of `scan_layers`.

    Args:
      block: Any module that maps (x, *args, cache=..., layer=...) to x of the same shape and type, and the cache with the
        layer's keys and values written.
      x: [b, n, width].
      cache: With slots admitted for these tokens (`KVCache.admit`).
      *args: Given to every layer, the same.
      layers: Layers of the stack.

    Returns:
      What the last layer gives, and the cache.
    """

    def step(block: nn.Module, carry: tuple, layer: jax.Array, *args: Any) -> tuple[tuple, None]:
        x, cache = carry
        return block(x, *args, cache=cache, layer=layer), None

    run = nn.scan(
        step,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, *(nn.broadcast for _ in args)),
        length=layers,
    )
    # The cache is carried, not scanned over: scanning would write a second one.
    return run(block, (x, cache), jnp.arange(layers), *args)[0]
