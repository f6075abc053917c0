"""One rate taken out of a codec of several: the same analysis, hyper-synthesis and synthesis, for every family with gains."""

import dataclasses

import compressai_reference as reference
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsem.codecs import HyperpriorConfig, MeanScaleHyperprior
from jaxsem.codecs.hyperprior import gdn_transforms
from jaxsem.codecs.single_rate import at_one_rate
from jaxsem.errors import InputError
from jaxsem.nn.conv import Conv
from jaxsem.weights.compressai import load_compressai


def with_gains(name):
    """The seeded model of a name, made one of two rates whose gains differ by channel."""
    module, params = load_compressai(
        reference.random_state_dict(name), reference.system_of(name), reference.CONFIGS[name]
    )
    rng = np.random.default_rng(3)
    config = dataclasses.replace(module.config, lambdas=(0.001, 0.01))
    widths = {"gain_y": config.latent, "gain_z": config.hyper}
    gains = {
        gain: {side: rng.normal(0, 0.5, (2, width)).astype(np.float32) for side in ("forward", "inverse")}
        for gain, width in widths.items()
    }
    return type(module)(config), {**params, **gains}


@pytest.mark.parametrize("name", ["hyperprior", "scale-hyperprior", "chandelier"])
def test_the_codec_of_one_rate_does_the_same(name):
    module, params = with_gains(name)
    single, folded = at_one_rate(module, params, 0.25)
    assert single.config == reference.CONFIGS[name]
    x = reference.image().astype(np.float32) / 255
    rng = np.random.default_rng(0)

    def run(module, params, y_hat, z_hat, quality):
        return jax.tree.map(np.asarray, {
            **call(module, params, "analyze", x, quality),
            "psi": call(module, params, "hyper_synthesis", z_hat, quality),
            "x_hat": call(module, params, "synthesize", y_hat, quality),
        })  # fmt: skip

    def call(module, params, method, *inputs):
        return jax.jit(lambda p, *a: module.apply({"params": p}, *a, method=method))(params, *inputs)

    y_hat = rng.normal(0, 3, (1, 4, 8, module.config.latent)).astype(np.float32)
    z_hat = rng.normal(0, 3, (1, 1, 2, module.config.hyper)).astype(np.float32)
    expected = run(module, params, y_hat, z_hat, np.float32([0.25]))
    actual = run(single, folded, y_hat, z_hat, np.zeros(1, np.float32))
    plain = run(single, {k: v for k, v in params.items() if not k.startswith("gain")}, y_hat, z_hat, np.float32([0]))
    for part, value in expected.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(actual[part], value, rtol=0, atol=1e-5 * scale, err_msg=part)
        assert np.abs(plain[part] - value).max() > 1e-2 * scale, part


def test_what_cannot_be_taken_out_is_refused():
    module, params = with_gains("hyperprior")
    with pytest.raises(InputError, match=r"qualities 0 to 1, not 1\.5"):
        at_one_rate(module, params, 1.5)
    with pytest.raises(InputError, match="one rate"):
        at_one_rate(MeanScaleHyperprior(HyperpriorConfig(8, 12)), params, 0)

    class Squashed(MeanScaleHyperprior):
        def transforms(self):
            self.g_a, self.g_s = gdn_transforms(8, 12, jnp.float32)
            self.h_a = nn.Sequential([Conv(8), jnp.tanh])

    with pytest.raises(InputError, match="at the end of h_a stands tanh, no convolution"):
        at_one_rate(Squashed(module.config), params, 0)
