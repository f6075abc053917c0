"""Learned image codecs, by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxsem.codecs.bmshj2018 import Factorized, FactorizedConfig, ScaleHyperprior, ScaleHyperpriorConfig
from jaxsem.codecs.elic import Elic, ElicConfig
from jaxsem.codecs.hyperprior import HyperpriorCodec, HyperpriorConfig, MeanScaleHyperprior
from jaxsem.codecs.mbt2018 import JointConfig, JointHyperprior
from jaxsem.codecs.tic import Tic, TicConfig
from jaxsem.errors import InputError
from jaxsem.nn.conv import draw_kernel

__all__ = [
    "SYSTEMS",
    "Elic",
    "ElicConfig",
    "Factorized",
    "FactorizedConfig",
    "HyperpriorCodec",
    "HyperpriorConfig",
    "JointConfig",
    "JointHyperprior",
    "MeanScaleHyperprior",
    "ScaleHyperprior",
    "ScaleHyperpriorConfig",
    "Tic",
    "TicConfig",
    "build_module",
    "init_params",
    "param_shapes",
    "system_of",
]

SYSTEMS = {
    "elic": (Elic, ElicConfig),
    "hyperprior": (MeanScaleHyperprior, HyperpriorConfig),
    "factorized": (Factorized, FactorizedConfig),
    "scale-hyperprior": (ScaleHyperprior, ScaleHyperpriorConfig),
    "joint": (JointHyperprior, JointConfig),
    "tic": (Tic, TicConfig),
}


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


def system_of(module: HyperpriorCodec) -> str:
    """The name of a module's codec family in `SYSTEMS`."""
    return next(name for name, (kind, _) in SYSTEMS.items() if type(module) is kind)


def init_params(module: HyperpriorCodec, seed: int) -> dict[str, Any]:
    """Fresh parameters of a codec, the same for the same seed on every machine.

    Kernels are drawn on the host: to compile their hundred or so random draws takes longer than many a short training.
    """
    shapes = flatten_dict(param_shapes(module))

    @jax.jit
    def others(key):
        params = flatten_dict(module.init(key, jnp.zeros((1, 64, 64, 3)), jnp.zeros(1))["params"])
        return {path: leaf for path, leaf in params.items() if path[-1] != "kernel"}

    params = others(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    for path in sorted(shapes.keys() - params.keys()):
        params[path] = jnp.asarray(draw_kernel(shapes[path].shape, rng))
    return unflatten_dict(params)


def param_shapes(module: HyperpriorCodec) -> dict[str, Any]:
    """Shapes and types of the parameters, without memory or arithmetic."""
    sample = jnp.zeros((1, 64, 64, 3)), jnp.zeros(1)
    return jax.eval_shape(module.init, jax.random.key(0), *sample)["params"]
