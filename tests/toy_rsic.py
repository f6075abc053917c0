"""A codec of referring semantic compression with small random networks: everything works, nothing looks good."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from toy_clip import toy_clip

from jaxsem.backbones.autoencoder_kl import AutoencoderKlConfig
from jaxsem.backbones.unet_2d_condition import UnetConditionConfig
from jaxsem.calibration import calibrate_module, exact_variables
from jaxsem.codecs.hsvlc import HsvlcConfig
from jaxsem.diffusion import STABLE_DIFFUSION
from jaxsem.entropy.tables import gaussian_tables
from jaxsem.systems.gem import GemConfig
from jaxsem.systems.rsic import Rsic
from jaxsem.systems.rsic_config import GuidanceConfig, RsicConfig
from jaxsem.systems.text_condition import TextCondition
from jaxsem.systems.weight_map import WeightMapConfig


def toy_config(context_width: int) -> RsicConfig:
    """Images to latents of 1/2 of the side, four cells of M to 8 pixels, two scales."""
    return RsicConfig(
        AutoencoderKlConfig(widths=(4, 8), layers=1, groups=2, scaling_factor=1.0, middle_attention=False),
        UnetConditionConfig(
            widths=(8, 16),
            layers=1,
            down_attention=(False, True),
            up_attention=(True, False),
            heads=(2, 2),
            depths=(1, 1),
            context_width=context_width,
            groups=4,
        ),
        HsvlcConfig(
            width=8, channels=(4, 4), boundaries=(0.5,), condition=4, hidden=8, prior=8, map_stride=2, pixels=4
        ),
        WeightMapConfig(stride=4, levels=8),
        STABLE_DIFFUSION,
        GuidanceConfig(steps=2, recurrences=1, max_steps=4),
    )


def toy_rsic(exact: bool = True, **changes) -> Rsic:
    """The codec; `describe` says how large an image is."""
    clip = toy_clip()
    text = TextCondition.of_clip(clip)
    config = toy_config(text.width)
    codec = Rsic("toy-rsic", config, {}, text, gaussian_tables(), b"toy rsic, 32 bytes of a digest..")
    keys = jax.random.split(jax.random.key(0), 3)
    z, weight = jnp.zeros((1, 4, 4, 4)), jnp.zeros((1, 2, 2))
    context = jnp.zeros((1, text.length, text.width))
    params = {
        "autoencoder": jax.jit(codec.autoencoder.init)(keys[0], jnp.zeros((1, 8, 8, 3)))["params"],
        "unet": jax.jit(codec.unet.init)(keys[1], z, jnp.zeros(1, jnp.int32), context)["params"],
        "codec": jax.jit(codec.codec.init)(keys[2], z, weight)["params"],
    }
    codec = dataclasses.replace(
        codec,
        params=params,
        clip=clip,
        gem=GemConfig(depth=2, template=None, image_size=None),
        least_contrast=0.0,
        **changes,
    )
    if not exact:
        return codec
    grids, tables = toy_grids(codec)
    params = jax.device_get(codec.params["codec"])
    return dataclasses.replace(codec, exact=exact_variables(params, grids), arithmetic="exact", tables=tables)


def toy_grids(codec: Rsic):
    """The grids of the codec's exact priors, and the tables that fit."""
    rng = np.random.default_rng(0)
    samples = []
    for k in range(3):
        weight = rng.integers(0, 8, (1, 8, 8)).astype(np.float32) / 7
        z = 4.0 * jax.random.normal(jax.random.key(k), (1, 16, 16, 4))
        samples.append((codec.codec.apply({"params": codec.params["codec"]}, z, weight, method="analyze"), weight))
    return calibrate_module(codec.name, codec.codec, codec.params["codec"], codec.tables, samples)
