"""The autoencoder against diffusers' with the same small random weights, and what needs no reference."""

import dataclasses
import functools

import diffusion_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_reference import close, first, some
from flax.traverse_util import flatten_dict

from jaxsem.backbones.autoencoder_kl import (
    CONFIGS,
    FLUX_VAE,
    SD_VAE,
    AutoencoderKl,
    AutoencoderKlConfig,
    SpatialAttention,
    param_shapes,
)
from jaxsem.errors import InputError
from jaxsem.weights.diffusion import load_autoencoder_kl

CONFIG = AutoencoderKlConfig(widths=(16, 32), layers=1, groups=8)


@pytest.fixture(scope="module")
def params():
    """Seeded parameters of `CONFIG` that need no torch."""
    random = np.random.RandomState(3)

    def draw(path, leaf):
        normal = random.standard_normal(leaf.shape)
        spread = np.prod(leaf.shape[:-1]) ** -0.5 if path[-1].key == "kernel" else 0.2
        return np.asarray(spread * normal + (path[-1].key == "scale"), np.float32)

    return jax.tree_util.tree_map_with_path(draw, param_shapes(AutoencoderKl(CONFIG)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(method, module, params, x):
    return module.apply({"params": params}, x, method=method)


def images(height=8, width=12):
    return np.random.RandomState(1).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)


# -- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vae", "flux"])
def test_it_computes_what_diffusers_does(name):
    net = reference.model(name)
    config = AutoencoderKlConfig.from_json(reference.config(name))
    module, params = load_autoencoder_kl(reference.state_of(net), config)
    mean, logvar = run("encode", module, params, images())
    want = net.encode(first(images())).latent_dist
    close(mean, want.mean, atol=1e-4)
    close(logvar, want.logvar, atol=1e-4)
    assert mean.shape == (2, 2, 3, config.latent_channels)
    latents = some(2, 3, 2, config.latent_channels)
    close(run("decode", module, params, latents), net.decode(first(latents)).sample, atol=1e-4)


def test_attention_in_the_middle_is_that_of_diffusers():
    net, x = reference.model("vae"), some(2, 3, 4, 32)
    config = AutoencoderKlConfig.from_json(reference.config("vae"))
    params = load_autoencoder_kl(reference.state_of(net), config)[1]["decoder"]["middle"]["attention"]
    close(run("__call__", SpatialAttention(8), params, x), net.decoder.mid_block.attentions[0](first(x)))


def test_attention_in_the_middle_may_be_absent():
    torch, diffusers = reference.import_reference()
    torch.manual_seed(2)
    net = diffusers.AutoencoderKL(**reference.VAE, mid_block_add_attention=False).eval().requires_grad_(False)
    config = AutoencoderKlConfig.from_json(dict(net.config) | {"_class_name": "AutoencoderKL"})
    module, params = load_autoencoder_kl(reference.state_of(net), config)
    assert not any("attention" in name for name in flatten_dict(params, sep="/"))
    close(run("encode", module, params, images())[0], net.encode(first(images())).latent_dist.mean, atol=1e-4)


def test_latents_are_scaled_as_in_diffusers_pipelines():
    latents = some(2, 3, 4, 16)
    found = FLUX_VAE.scale(latents)
    np.testing.assert_allclose(found, (latents - 0.1159) * 0.3611, rtol=1e-6)
    np.testing.assert_allclose(FLUX_VAE.unscale(found), latents, atol=1e-6)
    np.testing.assert_allclose(SD_VAE.scale(latents), 0.18215 * latents, rtol=1e-6)


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "parameters"), [("sd", 83_653_863), ("flux", 83_819_683)])
def test_published_ones_have_as_many_parameters_as_in_diffusers(name, parameters):
    shapes = param_shapes(AutoencoderKl(CONFIGS[name]))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


@pytest.mark.parametrize("name", CONFIGS)
def test_a_latent_is_an_eighth_of_the_image(name):
    module = AutoencoderKl(CONFIGS[name], jnp.bfloat16, jnp.bfloat16)
    variables = {"params": param_shapes(module)}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.bfloat16)}
    pixels = jax.ShapeDtypeStruct((1, 512, 768, 3), jnp.float32)
    mean, logvar = jax.eval_shape(lambda v, x: module.apply(v, x, method="encode"), variables, pixels)
    assert mean.shape == logvar.shape == (1, 64, 96, CONFIGS[name].latent_channels)
    again = jax.eval_shape(lambda v, z: module.apply(v, z, method="decode"), variables, mean)
    assert (again.shape, again.dtype) == (pixels.shape, jnp.float32)


# -- without a reference ----------------------------------------------------------------------------------------------


def test_the_logarithm_of_the_variance_is_bounded(params):
    huge = {**params, "quant": {**params["quant"], "bias": np.repeat(np.float32([0, 50, -50]), [4, 2, 2])}}
    mean, logvar = run("encode", AutoencoderKl(CONFIG), huge, images())
    assert float(logvar.max()) == 20
    assert float(logvar.min()) == -30
    assert float(jnp.abs(mean).max()) < 20


def loss(params, remat=False):
    found = AutoencoderKl(CONFIG, remat=remat).apply({"params": params}, images())
    return jnp.square(found).mean()


def test_every_parameter_has_a_gradient(params):
    for name, gradient in flatten_dict(jax.jit(jax.grad(loss))(params), sep="/").items():
        # A bias of the keys changes no softmax.
        assert name.endswith("key/bias") or float(jnp.abs(gradient).max()) > 1e-7, name


def test_remat_keeps_less_for_the_backward_pass(params):
    def kept(remat):
        _, pull = jax.eval_shape(lambda params: jax.vjp(lambda p: loss(p, remat), params), params)
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    assert kept(True) < 0.6 * kept(False)


def test_bfloat16_computes_about_the_same(params):
    exact = run("__call__", AutoencoderKl(CONFIG), params, images())
    rough = run("__call__", AutoencoderKl(CONFIG, jnp.bfloat16), params, images())
    assert rough.dtype == jnp.float32
    assert 0 < np.abs(rough - exact).mean() < 0.05 * np.abs(exact).mean()


@pytest.mark.parametrize(
    ("method", "x", "message"),
    [
        (
            "encode",
            np.zeros((1, 8, 7, 3), np.float32),
            r"multiples of 2, not float32 of shape \[1, 8, 7, 3\]: pad them",
        ),
        ("encode", np.zeros((1, 8, 8, 3), np.uint8), r"floats in \[-1, 1\] with .*, not uint8"),
        ("encode", np.zeros((8, 8, 3), np.float32), r"not float32 of shape \[8, 8, 3\]"),
        ("encode", np.zeros((1, 0, 8, 3), np.float32), r"not float32 of shape \[1, 0, 8, 3\]"),
        (
            "decode",
            np.zeros((1, 8, 8, 3), np.float32),
            r"takes latents \[batch, h, w, 4\], floats, not float32 of shape",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(params, method, x, message):
    with pytest.raises(InputError, match=message):
        AutoencoderKl(CONFIG).apply({"params": params}, x, method=method)


# -- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"widths": ()}, "no level or a size below 1 in .*: every size is at least 1"),
        ({"layers": 0}, "a size below 1"),
        ({"widths": (128, 250)}, r"widths of \[128, 250\] cannot be split into 32 groups"),
        ({"scaling_factor": 0.0}, "a scaling_factor of 0.0: it takes a number above 0"),
        ({"scaling_factor": float("nan")}, "a scaling_factor of nan"),
    ],
)
def test_sizes_that_cannot_be_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(SD_VAE, **fields)


def test_the_config_of_stable_diffusion_is_read():
    """That of stable-diffusion-v1-5 says no scaling factor."""
    fields = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0", "act_fn": "silu", "in_channels": 3,
              "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
              "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "sample_size": 512,
              "up_block_types": ["UpDecoderBlock2D"] * 4}  # fmt: skip
    assert AutoencoderKlConfig.from_json(fields) == SD_VAE
    flux = {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False,
            "use_post_quant_conv": False, "latents_mean": None, "latents_std": None, "force_upcast": True}  # fmt: skip
    assert AutoencoderKlConfig.from_json(fields | flux) == FLUX_VAE


def test_absent_fields_have_the_defaults_of_diffusers():
    _, diffusers = reference.import_reference()
    full = dict(diffusers.AutoencoderKL().config) | {"_class_name": "AutoencoderKL"}
    assert AutoencoderKlConfig.from_json({"_class_name": "AutoencoderKL"}) == AutoencoderKlConfig.from_json(full)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "one of 'AutoencoderTiny', not of 'AutoencoderKL'"),
        ({"block_out_channels": "64"}, "block_out_channels='64'; a list of 1 to 8 numbers is wanted"),
        ({"block_out_channels": [64] * 99}, "a list of 1 to 8 numbers"),
        ({"block_out_channels": [64, None]}, "block_out_channels=None; a number from 1 to"),
        ({"block_out_channels": [64, 64]}, "it has 1 down_block_types and 2 block_out_channels"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "a list of DownEncoderBlock2D is wanted"),
        ({"layers_per_block": 10**9}, "layers_per_block=1000000000; a number from 1 to 64"),
        ({"layers_per_block": True}, "layers_per_block=True; a number"),
        ({"out_channels": 1}, "in_channels=3 and out_channels=1, and only equal ones are known"),
        ({"latents_mean": [0.1] * 4}, "latents_mean=.*, and only None is known: this is the autoencoder of"),
        ({"scaling_factor": "0.2"}, "scaling_factor='0.2'; a number is wanted"),
        ({"scaling_factor": -1}, "a scaling_factor of -1.0"),
        ({"shift_factor": float("nan")}, "shift_factor=nan; a number is wanted"),
        ({"use_quant_conv": 1}, "use_quant_conv=1; true or false is wanted"),
    ],
)
def test_configs_of_other_autoencoders_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        AutoencoderKlConfig.from_json({"_class_name": "AutoencoderKL", **change})
