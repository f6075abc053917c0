"""The slice driver: a latent coded slice by slice, each with tables and means from what is already decoded.

For slice i one compiled function gives each symbol's integer table and mean from what is already decoded; the host codes the
slice; the result feeds slice i + 1. Encoder and decoder call the same compiled functions in the same order (`_start`, `_advance`):
a function that is compiled differently on the two sides may differ in its last bit, pick another table and ruin the rest of the
stream.

A module that is coded so has `slices`, and as methods of pure functions:

    begin(batch, grid, condition) -> state          before anything is decoded
    predict(i, state) -> table, mean, scale         of every symbol of slice i
    place(i, state, values) -> state                after slice i, with its decoded values
    values_of(i, latents) -> values                 what is to be coded
    likelihood_of(i, values, mean, scale)           the model's own probabilities
    inside(i, grid, frame) -> bool [1, h, w, 1]     host: which positions of one image are coded

A condition is whatever both sides know before, one row for each image: a quality, a weight map. A frame is what `inside` takes of
an image: its true size, and what else opens positions. Symbols of positions that are not coded are 0: their values are the means.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsem.codecs.serial import SYMBOL_LIMIT

Slices = list[tuple[jax.Array, jax.Array, np.ndarray]]
"""Of each slice the symbols, their tables and the mask of a batch."""

# -- compiled pieces: static in the module and the slice, so that a changed number compiles nothing ----------------------


@partial(jax.jit, static_argnames=("module", "grid", "batch"))
def _start(module, grid, batch, variables, condition):
    """The first state and the prediction of slice 0."""
    state = module.apply(variables, batch, grid, condition, method="begin")
    return state, module.apply(variables, 0, state, method="predict")


@partial(jax.jit, static_argnames=("module", "i", "on"))
def _advance(module, i, on, variables, state, symbols, mean):
    """The state after slice i and, where it goes on, the prediction of slice i + 1."""
    state = module.apply(variables, i, state, symbols.astype(jnp.float32) + mean, method="place")
    return state, module.apply(variables, i + 1, state, method="predict") if on else None


@partial(jax.jit, static_argnames=("module", "i"))
def _quantise(module, i, variables, latents, mean, scale, inside):
    """Symbols of slice i, zero where nothing is coded, and the model's estimate of their bits, for each image."""
    values = module.apply(variables, i, latents, method="values_of")
    symbols = jnp.where(inside, jnp.clip(jnp.round(values - mean), -SYMBOL_LIMIT, SYMBOL_LIMIT), 0.0)
    probability = module.apply(variables, i, symbols + mean, mean, scale, method="likelihood_of")
    return symbols.astype(jnp.int32), -jnp.where(inside, jnp.log2(probability), 0.0).sum(axis=(1, 2, 3))


# -- the driver -----------------------------------------------------------------------------------------------------------


def code(
    module: Any,
    variables: Any,
    latents: dict[str, jax.Array],
    grid: tuple[int, int],
    condition: Any,
    frames: Sequence[Any],
    count: int,
) -> tuple[Slices, jax.Array, Any]:
    """Runs the first `count` slices of a batch on the device; returns at once, with the work under way.

    Returns:
      What is to be coded, the estimated bits of each image [b], and the state after these slices.
    """
    state, (table, mean, scale) = _start(module, grid, len(frames), variables, condition)
    slices: Slices = []
    total: Any = 0.0
    for i in range(count):
        mask = inside(module, i, grid, frames)
        symbols, bits = _quantise(module, i, variables, latents, mean, scale, mask)
        slices.append((symbols, table, mask))
        total = total + bits
        on = i + 1 < count
        # After the very last slice nobody asks for the state.
        if i + 1 < module.slices:
            state, prediction = _advance(module, i, on, variables, state, symbols, mean)
            table, mean, scale = prediction or (None, None, None)
    return slices, total, state


def decode(
    module: Any,
    variables: Any,
    grid: tuple[int, int],
    condition: Any,
    frames: Sequence[Any],
    pull: Callable[[int, np.ndarray], np.ndarray],
    pulled: int,
    count: int,
) -> Any:
    """Runs the first `count` slices of a batch with symbols from anywhere, and waits for the device before each slice.

    Args:
      module: See above.
      variables: Of the networks that decide tables and means.
      grid: Of the batch.
      condition: Of the batch.
      frames: One for each image; those from the `pulled`-th on fill up the batch.
      pull: Called as pull(k, table), gives the next symbols of image k, int32, for their tables, both [symbols].
      pulled: Images that are pulled.
      count: Slices.

    Returns:
      The state, with the last slice under way.
    """
    state, prediction = _start(module, grid, len(frames), variables, condition)
    for i in range(count):
        table, mean, _ = prediction
        table = np.asarray(table)
        mask = np.broadcast_to(inside(module, i, grid, frames), table.shape)
        symbols = np.zeros(table.shape, np.int32)
        for k in range(pulled):
            symbols[k][mask[k]] = pull(k, table[k][mask[k]])
        state, prediction = _advance(module, i, i + 1 < count, variables, state, symbols, mean)
    return state


def inside(module: Any, i: int, grid: tuple[int, int], frames: Sequence[Any]) -> np.ndarray:
    """Which positions of slice i are coded, bool [b, h, w, 1]."""
    return np.concatenate([module.inside(i, grid, frame) for frame in frames])


def flattened(symbols: np.ndarray, table: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The coded symbols of one image's slice [h, w, c] and their tables, in the order of the stream."""
    mask = np.broadcast_to(mask, symbols.shape)
    return symbols[mask], table[mask]
