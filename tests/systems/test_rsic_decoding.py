"""Guided generative decoding with small random networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsem.backbones.autoencoder_kl import AutoencoderKl, AutoencoderKlConfig
from jaxsem.backbones.unet_2d_condition import UnetCondition, UnetConditionConfig
from jaxsem.codecs.hsvlc import Hsvlc, HsvlcConfig
from jaxsem.diffusion import STABLE_DIFFUSION
from jaxsem.systems.rsic_config import GuidanceConfig
from jaxsem.systems.rsic_decoding import guided_latents, keys_of, run_decoder, run_encoder

UNET = UnetCondition(
    UnetConditionConfig(
        widths=(8, 16),
        layers=1,
        down_attention=(False, True),
        up_attention=(True, False),
        heads=(2, 2),
        depths=(1, 1),
        context_width=8,
        groups=4,
    )
)
CODEC = Hsvlc(HsvlcConfig(width=8, channels=(4, 4), boundaries=(0.5,), condition=4, hidden=8, prior=8, map_stride=2))


@pytest.fixture(scope="module")
def params():
    z, context = jnp.zeros((1, 8, 8, 4)), jnp.zeros((1, 3, 8))
    first, second = jax.random.split(jax.random.key(0))
    unet = jax.jit(UNET.init)(first, z, jnp.zeros(1, jnp.int32), context)["params"]
    codec = jax.jit(CODEC.init)(second, z, jnp.zeros((1, 4, 4)))["params"]
    return {"unet": unet, "codec": codec}


Z = jax.random.normal(jax.random.key(1), (2, 8, 8, 4))
WEIGHT = jnp.zeros((2, 4, 4)).at[:, :2].set(1.0)
CONTEXT = jax.random.normal(jax.random.key(2), (2, 3, 8))


def run(params, z=Z, weight=WEIGHT, context=CONTEXT, seed=0, **changes):
    numbers = {"steps": 3, "recurrences": 2, "pull": 0.1, "scale": 3.0, "relax": 0.7, **changes}
    null = jnp.zeros((1, 3, 8))
    keys = keys_of(seed, len(z))
    return guided_latents(UNET, CODEC, STABLE_DIFFUSION, 6, params, z, weight, context, null, numbers, keys)


def test_what_a_file_decodes_to_depends_on_nothing_beside_it(params):
    whole = run(params)
    assert whole.shape == Z.shape
    assert np.isfinite(whole).all()
    np.testing.assert_array_equal(whole, run(params))
    np.testing.assert_allclose(run(params, Z[1:], WEIGHT[1:], CONTEXT[1:]), whole[1:], atol=1e-4)


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"pull": 0.3}, {"scale": 5.0}, {"relax": 0.0}, {"recurrences": 3}, {"steps": 5}]
)
def test_every_number_matters_and_compiles_nothing(params, changes):
    before = run(params)
    count = guided_latents._cache_size()
    assert np.abs(run(params, **changes) - before).max() > 1e-4
    assert guided_latents._cache_size() == count


def test_where_the_weight_is_high_the_text_counts_less(params):
    other = -CONTEXT
    moved = np.abs(run(params, pull=0.0, recurrences=1) - run(params, context=other, pull=0.0, recurrences=1))
    assert moved[:, :2].mean() < moved[:, 6:].mean()


def test_the_pull_brings_the_codecs_view_nearer(params):
    def view(z):
        return CODEC.apply({"params": params["codec"]}, z, WEIGHT)["z_hat"]

    far = [float(jnp.square(view(run(params, pull=pull, recurrences=6)) - Z).mean()) for pull in (0.0, 2.0)]
    assert far[1] < far[0]


def test_images_come_back_from_latents_within_their_range():
    module = AutoencoderKl(AutoencoderKlConfig(widths=(4, 8), layers=1, groups=2, scaling_factor=0.5, shift_factor=0.1))
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 8, 3)).astype(np.uint8)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    z = run_encoder(module, params, images)
    assert z.shape == (2, 8, 4, 4)
    mean, _ = module.apply({"params": params}, jnp.asarray(images / 127.5 - 1.0, jnp.float32), method="encode")
    np.testing.assert_allclose(z, (mean - 0.1) * 0.5, atol=1e-5)
    again = run_decoder(module, params, z)
    assert (again.shape, again.dtype) == (images.shape, np.uint8)


def test_the_papers_gamma_is_a_pull_for_any_size():
    assert GuidanceConfig().pull == pytest.approx(2000 / 16384)
