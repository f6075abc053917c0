"""Losses of latent diffusion and of the codec of its latents."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsem.codecs.hsvlc import Hsvlc, HsvlcConfig
from jaxsem.diffusion import STABLE_DIFFUSION, predict_clean
from jaxsem.systems.weight_map import WeightMapConfig
from jaxsem.training import diffusion

KEY = jax.random.key(0)
Z = jax.random.normal(jax.random.key(1), (6, 4, 4, 3))


def test_the_divergence_is_that_of_a_gaussian():
    loss, metrics = diffusion.autoencoder_loss(Z, Z + 0.5, Z, jnp.zeros_like(Z), weight=0.1)
    np.testing.assert_allclose(metrics["mse"], 0.25, rtol=1e-5)
    np.testing.assert_allclose(metrics["divergence"], 0.5 * jnp.square(Z).mean(), rtol=1e-5)
    np.testing.assert_allclose(loss, 0.25 + 0.1 * metrics["divergence"], rtol=1e-5)
    np.testing.assert_allclose(metrics["psnr"], 10 * np.log10(16), rtol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_a_network_that_hits_the_target_knows_the_clean_latent(kind):
    schedule = dataclasses.replace(STABLE_DIFFUSION, prediction_type=kind)
    t, noise = diffusion.denoising_draws(schedule, Z, KEY)
    given = diffusion.noisy(schedule, Z, t, noise)
    found = predict_clean(schedule, diffusion.target_of(schedule, Z, t, noise), given, t)
    np.testing.assert_allclose(found, Z, atol=1e-3)


def test_timesteps_are_spread_over_the_batch():
    for seed in range(20):
        t, noise = diffusion.denoising_draws(STABLE_DIFFUSION, Z, jax.random.key(seed))
        assert (np.asarray(t) // (1000 / 6)).astype(int).tolist() == [0, 1, 2, 3, 4, 5]
        assert noise.shape == Z.shape


def test_errors_count_by_the_weight_of_their_place():
    weight = jnp.zeros((6, 2, 2)).at[:, 0, 0].set(1.0)
    bits = jnp.full((6, 4), 16.0)
    off = {}
    for name, place in (("marked", (slice(None), 0, 0)), ("other", (slice(None), 3, 3))):
        _, off[name] = diffusion.spatial_rate_distortion(Z, Z.at[place].add(1.0), bits, weight, 64)
    np.testing.assert_allclose(off["marked"]["mse"], off["other"]["mse"], rtol=1e-5)
    np.testing.assert_allclose(off["marked"]["weighted"] / off["other"]["weighted"], np.exp(7), rtol=1e-4)
    np.testing.assert_allclose(off["marked"]["bpp"], 4 * 16 / (16 * 64), rtol=1e-6)
    np.testing.assert_allclose(off["other"]["weighted"], 0.01 / 16, rtol=1e-4)


@pytest.mark.parametrize(("levels", "rounded"), [(3, [0.0, 0.5, 0.5, 1.0]), (1, [1.0] * 4)])
def test_calibration_sees_maps_as_files_hold_them(levels, rounded):
    config = HsvlcConfig(3, 4, (2,), (), condition=2, hidden=2, prior=2, map_stride=2, pixels=1)
    module, weight = Hsvlc(config), jnp.array([0.2, 0.3, 0.7, 0.8]).reshape(1, 2, 2)
    params = module.init(KEY, Z[:1], weight)["params"]
    [(latents, found)] = diffusion.calibration_samples(
        module, params, [(Z[:1], np.asarray(weight))], WeightMapConfig(2, levels).values
    )
    np.testing.assert_array_equal(found.ravel(), np.float32(rounded))
    want = module.apply({"params": params}, Z[:1], found, method="analyze")
    np.testing.assert_allclose(latents["f_0"], want["f_0"], atol=1e-5)
