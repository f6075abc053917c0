"""Linear layers whose weights are 8-bit integers: a quarter of the memory of float32, half of that of bfloat16.

    kernel ≈ values · scale        values int8 [in, out], scale float32 [out]

Every output channel has its own scale, its largest weight over 127, so that no weight moves by more than half a scale. The
input stays as it is: an int8 is exact in bfloat16, the product is accumulated in float32, and the scale comes after the
matrix product, so nothing else is rounded. Weights alone are quantised, for inference; gradients flow through to the input.

Source: Dettmers et al., LLM.int8() (2022), the vector-wise quantisation of weights.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxsem.errors import InputError

WEIGHTS = ("float", "int8")


def check_weights(weights: str) -> None:
    """Refuses a kind of weights that is not in `WEIGHTS`.

    Raises:
      InputError: It is not.
    """
    if weights not in WEIGHTS:
        raise InputError(f"there are no {weights!r} weights; there are {', '.join(WEIGHTS)}")


class Dense(nn.Module):
    """A linear layer over the last axis, with float or int8 weights.

    Its parameters are `kernel` [in, features], with int8 also `scale` float32 [features], and perhaps `bias` [features].

    Attributes:
      features: Channels that come out.
      use_bias: Whether there is a bias.
      dtype: Of the computation.
      param_dtype: Of the parameters that are floats.
      kernel_init: Draws the kernel; int8 ones are drawn so, then quantised.
      weights: "float" or "int8".
    """

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    weights: str = "float"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., in] to [..., features].

        Raises:
          InputError: No such kind of weights.
        """
        check_weights(self.weights)
        x, shape = x.astype(self.dtype), (x.shape[-1], self.features)
        if self.weights == "float":
            kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
            y = x @ jnp.asarray(kernel, self.dtype)
        else:
            kernel, scale = self._quantised(shape)
            y = jnp.matmul(x, jnp.asarray(kernel, self.dtype), preferred_element_type=jnp.float32)
            y = (y * scale).astype(self.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
            y = y + jnp.asarray(bias, self.dtype)
        return y

    def _quantised(self, shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        drawn = None
        if self.is_initializing():
            # Both are of one draw, which a key for each could not give.
            drawn = quantise(self.kernel_init(self.make_rng("params"), shape, jnp.float32))
        # Those that are given are checked against the shapes of these, which nobody computes.
        kernel = self.param("kernel", lambda _: jnp.zeros(shape, jnp.int8) if drawn is None else drawn[0])
        scale = self.param("scale", lambda _: jnp.ones(shape[1:], jnp.float32) if drawn is None else drawn[1])
        return kernel, scale


def quantise(kernel: Any) -> tuple[Any, Any]:
    """Rounds kernels to int8.

    Args:
      kernel: Floats [..., in, out]; leading axes, if any, count kernels.

    Returns:
      int8 of the same shape, in [-127, 127], and scales float32 [..., out] above 0; on the host what came from there. A kernel is
      their product to within half a scale.

    Raises:
      InputError: Fewer than two axes, no floats, or (on the host, where it can be seen) inf or NaN among them.
    """
    if isinstance(kernel, jax.Array) or kernel.ndim <= 2:
        scales = channel_scales(kernel)
        return (kernel.astype(np.float32) / scales[..., None, :]).round().astype(np.int8), scales
    # On the host one by one: as float32, a stack may need more memory than there is.
    values = np.empty(kernel.shape, np.int8)
    scales = np.empty((*kernel.shape[:-2], *kernel.shape[-1:]), np.float32)
    for place in np.ndindex(kernel.shape[:-2]):
        values[place], scales[place] = quantise(kernel[place])
    return values, scales


def channel_scales(kernel: Any) -> Any:
    """The scales that `quantise` gives, and its errors."""
    if kernel.ndim < 2 or not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise InputError(f"int8 weights are made of float kernels [..., in, out], not {kernel.dtype} {kernel.shape}")
    kernel = kernel.astype(np.float32)
    peaks = abs(kernel).max(axis=-2)
    if not isinstance(peaks, jax.Array) and not np.isfinite(peaks).all():
        raise InputError(f"a kernel of {kernel.shape} holds inf or NaN, which int8 weights cannot be made of")
    # A channel of zeros stays one.
    return (peaks / 127).clip(np.finfo(np.float32).tiny)


def quantise_kernels(params: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the parameters of int8 layers of those of float ones.

    Args:
      params: Nested parameters in which every `kernel` is one of `Dense`, or a stack of them on leading axes.

    Returns:
      The same tree with every `kernel` int8 and its `scale` beside it; all else is as it was.

    Raises:
      InputError: A kernel is int8 already or cannot be quantised.
    """
    tree = {key: quantise_kernels(leaf) if isinstance(leaf, Mapping) else leaf for key, leaf in params.items()}
    if "kernel" in tree:
        if "scale" in tree:
            raise InputError("a kernel has a scale beside it: these weights are int8 already")
        tree["kernel"], tree["scale"] = quantise(tree["kernel"])
    return tree
