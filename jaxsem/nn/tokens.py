"""What language models share around their layers: looking up tokens, and picking the last ones."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsem.errors import InputError


def look_up(table: Float[Array, "v w"], ids: Int[Array, "b n"], dtype: Any) -> Float[Array, "b n w"]:
    """The rows of a table of embeddings; ids outside of it give NaN.

    Raises:
      InputError: Other than [batch, n] integers.
    """
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise InputError(f"texts are [batch, n] token ids, not {ids.dtype} of shape {list(ids.shape)}")
    # A negative id would count from the end of the table.
    ids = jnp.where(ids < 0, len(table), ids)
    return jnp.take(table, ids, axis=0, mode="fill", fill_value=jnp.nan).astype(dtype)


def check_embeddings(name: str, embeddings: jax.Array, width: int, context: int) -> None:
    """Refuses what a language model cannot take in the place of tokens.

    Raises:
      InputError: Other than [batch, n, width] floats, or more tokens than the context.
    """
    shape = embeddings.shape
    if embeddings.ndim != 3 or shape[-1] != width or not jnp.issubdtype(embeddings.dtype, jnp.floating):
        raise InputError(
            f"{name} takes embeddings [batch, n, {width}], floats, not {embeddings.dtype} of shape {list(shape)}: see embed_tokens"
        )
    if shape[1] > context:
        raise InputError(f"a text of {shape[1]} tokens does not fit the context of {context}: cut it")


def last_tokens(x: Float[Array, "b n w"], mask: Bool[Array, "b n"] | None) -> Float[Array, "b 1 w"]:
    """Each row's last token that is no padding (`mask` False)."""
    batch, n, _ = x.shape
    last = n - 1 if mask is None else n - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(x, jnp.broadcast_to(last, batch)[:, None, None], axis=1)
