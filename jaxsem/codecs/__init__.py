"""Learned image codecs, by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxsem.codecs.elic import Elic, ElicConfig
from jaxsem.codecs.hyperprior import HyperpriorCodec, HyperpriorConfig, MeanScaleHyperprior
from jaxsem.errors import InputError

__all__ = [
    "SYSTEMS",
    "Elic",
    "ElicConfig",
    "HyperpriorCodec",
    "HyperpriorConfig",
    "MeanScaleHyperprior",
    "build_module",
    "init_params",
    "param_shapes",
]

SYSTEMS = {"elic": (Elic, ElicConfig), "hyperprior": (MeanScaleHyperprior, HyperpriorConfig)}


def build_module(system: str, config: Mapping[str, Any], dtype: Any = jnp.float32) -> HyperpriorCodec:
    """The module of a codec family from the plain fields of its config, as JSON gives them.

    Raises:
      InputError: An unknown system, an unknown field, or a value that the config refuses.
    """
    if system not in SYSTEMS:
        raise InputError(f"there is no codec {system!r}; there are {', '.join(sorted(SYSTEMS))}")
    module, record = SYSTEMS[system]
    known = {field.name for field in dataclasses.fields(record)}
    if surplus := sorted(set(config) - known):
        raise InputError(f"the config of {system} has no field {', '.join(surplus)}; it has {', '.join(sorted(known))}")
    try:
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
        return module(record(**fields), dtype)
    except TypeError as error:
        raise InputError(f"the config of {system} does not fit: {error}") from error


def init_params(module: HyperpriorCodec, rng: jax.Array) -> dict[str, Any]:
    """Fresh parameters of a codec."""
    sample = jnp.zeros((1, 64, 64, 3)), jnp.zeros(1), rng
    return jax.jit(module.init)(rng, *sample)["params"]


def param_shapes(module: HyperpriorCodec) -> dict[str, Any]:
    """Shapes and types of the parameters, without memory or arithmetic."""
    rng = jax.random.key(0)
    return jax.eval_shape(module.init, rng, jnp.zeros((1, 64, 64, 3)), jnp.zeros(1), rng)["params"]
