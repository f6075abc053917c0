"""A lower bound whose gradient still lets a value climb back above it."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def lower_bound(x: jax.Array, bound: jax.Array | float) -> jax.Array:
    """Returns max(x, bound); the gradient passes where x >= bound, and below it where a step would raise x.

    Source: Balle et al., Variational image compression with a scale hyperprior (ICLR 2018), implementation note.
    """
    return jnp.maximum(x, bound)


def _forward(x, bound):
    return jnp.maximum(x, bound), (x, bound)


def _backward(residual, gradient):
    x, bound = residual
    passes = (x >= bound) | (gradient < 0)
    return jnp.where(passes, gradient, 0.0), jnp.zeros_like(jnp.asarray(bound, gradient.dtype))


lower_bound.defvjp(_forward, _backward)
