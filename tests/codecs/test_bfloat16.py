import jax
import jax.numpy as jnp
import numpy as np

from jaxsem.codecs import Elic


def test_bfloat16_arithmetic_follows_float32(tiny_codec, noise_photo):
    x = jnp.asarray(noise_photo(64, 64)[None], jnp.float32) / 255
    config, params = tiny_codec.module.config, {"params": tiny_codec.params}
    full = jax.jit(Elic(config).apply)(params, x, jnp.zeros(1))
    half = jax.jit(Elic(config, jnp.bfloat16).apply)(params, x, jnp.zeros(1))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(half))
    np.testing.assert_allclose(half["bits_y"] + half["bits_z"], full["bits_y"] + full["bits_z"], rtol=0.05)
    assert float(jnp.abs(half["x_hat"] - full["x_hat"]).max()) < 0.05
    assert float(jnp.abs(half["x_hat"] - full["x_hat"]).max()) > 0
