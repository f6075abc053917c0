"""The compiled steps of `jaxsem.systems.mllm`: other weights, texts or images run the same program, other shapes another."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxsem.backbones.clip_inputs import normalize
from jaxsem.backbones.llava import Llava
from jaxsem.generation import FlaxModel


@partial(jax.jit, static_argnames="module")
def encode_squares(module: Llava, params: Any, squares: jax.Array) -> jax.Array:
    """Embeddings [b n, width] of uint8 images [b, side, side, 3] of the tower's size, one after the other."""

    def encode(model: Llava, images: jax.Array) -> jax.Array:
        return model.project(model.visual_tokens(images))

    images = normalize(squares.astype(jnp.float32) / 255.0)
    return module.apply({"params": params}, images, method=encode).reshape(-1, module.config.text.width)


@partial(jax.jit, static_argnames=("module", "first"))
def tokens_after(module: Llava, params: Any, tokens: jax.Array, first: int) -> jax.Array:
    """Visual tokens [b, n, width] for `Mllm` from those that layer `first` of the tower takes, the class token first."""
    return module.apply({"params": params}, tokens, first, method="tokens_after")


@partial(jax.jit, static_argnames="module")
def project(module: Llava, params: Any, tokens: jax.Array) -> jax.Array:
    """Embeddings of visual tokens [n, width]."""
    return module.apply({"params": params}, tokens, method="project")


@partial(jax.jit, static_argnames="module")
def merge(module: Llava, params: Any, table: jax.Array, order: jax.Array, ids: jax.Array) -> jax.Array:
    """Embeddings [b, n, width] of ids, with those of a table [k, width] in the order [b, m] at the image tokens."""

    def embed(model: Llava) -> jax.Array:
        return model.embed(ids, model.pick(table, order))

    return module.apply({"params": params}, method=embed)


@partial(jax.jit, static_argnames="model")
def log_probabilities(
    model: FlaxModel, params: Any, prompt: jax.Array, mask: jax.Array, options: jax.Array, lengths: jax.Array
) -> jax.Array:
    """The summed log-probabilities [b, k] of options [b, k, n] of these lengths [b, k] after prompts [b, m, width].

    The prompt is read once; one option at a time, so that its keys and values are not there k times.
    """
    batch, _, n = options.shape
    first, cache = model.step(params, prompt, model.init_cache(batch, prompt.shape[1] + n - 1), mask)

    def total(option: tuple[jax.Array, jax.Array]) -> jax.Array:
        ids, length = option
        real = jnp.arange(n) < length[:, None]
        logits = first[:, None]
        if n > 1:
            given = model.embed(params, ids[:, :-1]), cache, real[:, :-1]
            more, _ = model.module.apply({"params": params}, *given, method="extend")
            logits = jnp.concatenate([logits, more], axis=1)
        logits = jax.nn.log_softmax(logits)
        found = jnp.take_along_axis(logits, ids[..., None], axis=2)[..., 0]
        return jnp.where(real, found, 0.0).sum(axis=1)

    return jax.lax.map(total, (options.swapaxes(0, 1), lengths.T)).T
