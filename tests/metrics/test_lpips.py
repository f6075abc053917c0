"""LPIPS against a torch restatement in float64 with the same small weights, and what needs no reference."""

import jax
import jax.numpy as jnp
import numpy as np
import perceptual_reference as reference
import pytest

from jaxsem.backbones.alexnet import AlexNetConfig
from jaxsem.backbones.vgg import VggConfig
from jaxsem.errors import InputError
from jaxsem.metrics.lpips import CONFIGS, Lpips, lpips, lpips_map, param_shapes
from jaxsem.weights.perceptual import load_lpips

ALEX, VGG = AlexNetConfig(reference.ALEX_WIDTHS), VggConfig(reference.VGG_WIDTHS, reference.VGG_DEPTHS)
TINY = Lpips(VggConfig((3, 4, 5), (1, 1, 1)))


def drawn(module, seed=2):
    """Seeded parameters that need no torch; the weights of channels are not negative."""
    random = np.random.RandomState(seed)

    def draw(path, leaf):
        normal = 0.4 * random.standard_normal(leaf.shape)
        return np.asarray(np.abs(normal) if "channel" in path[0].key else normal, np.float32)

    return jax.tree_util.tree_map_with_path(draw, param_shapes(module))


@pytest.fixture(scope="module")
def params():
    return drawn(TINY)


@pytest.fixture(scope="module")
def pair():
    return reference.photos(2, 24, 20), reference.photos(2, 24, 20, seed=1)


@pytest.mark.parametrize("config", [ALEX, VGG], ids=["alex", "vgg"])
def test_distances_their_map_and_their_gradient_are_those_of_the_reference(config):
    """Odd sizes, so that the taps do not divide the image."""
    net, at = (reference.vgg(), reference.VGG_TAPS) if config is VGG else (reference.alexnet(), reference.ALEX_TAPS)
    lins = reference.draw_lins(config.widths)
    module, params = load_lpips(reference.state_of(net), lins, config)
    x, y = reference.photos(2, 41, 51), reference.photos(2, 41, 51, seed=1)
    wanted, wanted_map, wanted_gradient = reference.lpips(net, at, lins, x, y)
    assert wanted.min() > 0.05
    np.testing.assert_allclose(lpips(module, params, x, y), wanted, rtol=0, atol=1e-5)
    np.testing.assert_allclose(lpips_map(module, params, x, y), wanted_map, rtol=0, atol=1e-5)
    gradient = jax.grad(lambda y: lpips(module, params, x / np.float32(255), y).sum())(y / np.float32(255))
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=0, atol=1e-4 * np.abs(wanted_gradient).max())


def test_the_published_networks_have_their_number_of_parameters():
    counts = {
        name: sum(leaf.size for leaf in jax.tree.leaves(param_shapes(Lpips(config))))
        for name, config in CONFIGS.items()
    }
    assert counts == {"alex": 2_469_696 + 1152, "vgg": 14_714_688 + 1472}


def test_equal_images_have_no_distance(params, pair):
    np.testing.assert_array_equal(lpips(TINY, params, pair[0], pair[0]), [0, 0])


def test_the_order_of_the_two_does_not_matter(params, pair):
    x, y = pair
    np.testing.assert_allclose(lpips(TINY, params, x, y), lpips(TINY, params, y, x), rtol=1e-6)


def test_floats_in_0_to_1_give_the_same_as_uint8(params, pair):
    x, y = pair
    unit = [images / np.float32(255) for images in pair]
    np.testing.assert_allclose(lpips(TINY, params, *unit), lpips(TINY, params, x, y), rtol=1e-4)


def test_leading_axes_are_those_of_the_images(params, pair):
    x, y = pair
    many = lpips(TINY, params, x, y)
    np.testing.assert_allclose(lpips(TINY, params, x[None], y[None]), many[None], rtol=1e-5)
    np.testing.assert_allclose(lpips(TINY, params, x[0], y[0]), many[0], rtol=1e-5)
    assert lpips_map(TINY, params, x[0], y[0]).shape == (24, 20)


def test_a_network_of_one_tap_has_the_map_whose_mean_is_the_distance():
    """The first tap of a VGG has the image's size, so nothing is interpolated."""
    module = Lpips(VggConfig((4,), (1,)))
    params = drawn(module)
    x, y = reference.photos(2, 9, 8), reference.photos(2, 9, 8, seed=1)
    np.testing.assert_allclose(lpips_map(module, params, x, y).mean((1, 2)), lpips(module, params, x, y), rtol=1e-5)


def test_equal_images_have_no_gradient(params, pair):
    x = jnp.asarray(pair[0], jnp.float32) / 255
    np.testing.assert_array_equal(jax.grad(lambda y: lpips(TINY, params, x, y).sum())(x), np.zeros_like(x))


def test_where_no_channel_answers_the_gradient_is_zero(params, pair):
    """Biases far below zero silence every ReLU: zero vectors have no direction."""
    silent = jax.tree_util.tree_map_with_path(lambda path, p: p - 1e3 if path[-1].key == "bias" else p, params)
    x, y = (jnp.asarray(images, jnp.float32) / 255 for images in pair)
    value, gradient = jax.value_and_grad(lambda y: lpips(TINY, silent, x, y).sum())(y)
    assert float(value) == 0
    np.testing.assert_array_equal(gradient, np.zeros_like(y))


def test_what_is_not_a_number_has_no_distance(params, pair):
    x, y = (np.float32(images) / 255 for images in pair)
    x[0, 3, 4, 1] = np.nan
    distance = lpips(TINY, params, x, y)
    assert np.isnan(distance[0])
    assert np.isfinite(distance[1])


def test_bfloat16_computes_nearly_the_same(params, pair):
    rough = lpips(TINY.clone(dtype=jnp.bfloat16), params, *pair)
    assert rough.dtype == jnp.float32
    np.testing.assert_allclose(rough, lpips(TINY, params, *pair), rtol=0.05)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8), r"\(8, 8, 3\) and \(8, 9, 3\)"),
        (np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.float32), "uint8 and float32"),
        (np.zeros((8, 8, 1), np.uint8), np.zeros((8, 8, 1), np.uint8), "these have 1: repeat a grey one"),
        (np.zeros((3, 8, 3), np.uint8), np.zeros((3, 8, 3), np.uint8), "an image of 8x3 is too small for this VGG"),
        (np.zeros((0, 8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8), r"\(0, 8, 8, 3\)"),
    ],
)
def test_what_cannot_be_compared_is_refused(params, x, y, message):
    with pytest.raises(InputError, match=message):
        lpips(TINY, params, x, y)


def test_a_network_of_dists_is_refused(pair):
    module = Lpips(VggConfig((3,), (1,), "l2"))
    with pytest.raises(InputError, match="LPIPS takes a VGG with max pools, not 'l2': that one is of DISTS"):
        lpips(module, {}, *pair)
