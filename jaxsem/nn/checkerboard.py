"""Checkerboard packing: the anchors (row + column even) or the others of [b, h, w, c] as [b, h, w / 2, c].

Even rows give their even (anchor) or odd columns, odd rows the other ones.
Source: He et al., Checkerboard Context Model for Efficient Learned Image Compression (CVPR 2021).
"""

import jax
import jax.numpy as jnp


def pack(x: jax.Array, anchor: bool) -> jax.Array:
    """The anchors or the others of [b, h, w, c], h and w even, as [b, h, w / 2, c]; NumPy arrays stay NumPy arrays."""
    b, h, w, c = x.shape
    first = 0 if anchor else 1
    cells = x.reshape(b, h // 2, 2, w // 2, 2, c)
    even, odd = cells[:, :, :1, :, first], cells[:, :, 1:, :, 1 - first]
    return x.__array_namespace__().concat([even, odd], axis=2).reshape(b, h, w // 2, c)


def unpack(x: jax.Array, anchor: bool) -> jax.Array:
    """The inverse of `pack`, with zeros at the other colour: [b, h, w / 2, c] to [b, h, w, c]."""
    b, h, half, c = x.shape
    cells = x.reshape(b, h // 2, 2, half, c)
    zero = jnp.zeros_like(cells[:, :, 0])
    even, odd = cells[:, :, 0], cells[:, :, 1]
    rows = ((even, zero), (zero, odd)) if anchor else ((zero, even), (odd, zero))
    return jnp.stack([jnp.stack(row, axis=3) for row in rows], axis=2).reshape(b, h, 2 * half, c)
