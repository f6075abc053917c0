"""DISTS against a NumPy and torch restatement in float64 with the same small weights, and what needs no reference."""

import jax
import jax.numpy as jnp
import numpy as np
import perceptual_reference as reference
import pytest

from jaxsem.backbones.vgg import VggConfig
from jaxsem.errors import InputError
from jaxsem.metrics.dists import Dists, dists, param_shapes
from jaxsem.weights.perceptual import load_dists

CONFIG = VggConfig(reference.VGG_WIDTHS, reference.VGG_DEPTHS, "l2")
TINY = Dists(VggConfig((3, 4), (1, 1), "l2"))


@pytest.fixture(scope="module")
def params():
    random = np.random.RandomState(2)
    return jax.tree.map(
        lambda leaf: np.asarray(np.abs(0.4 * random.standard_normal(leaf.shape)), np.float32), param_shapes(TINY)
    )


@pytest.fixture(scope="module")
def pair():
    return reference.photos(2, 21, 30), reference.photos(2, 21, 30, seed=1)


def test_distances_are_those_of_the_reference():
    random = np.random.RandomState(4)
    channels = 3 + sum(CONFIG.widths)
    weights = {name: random.uniform(0, 0.3, (1, channels, 1, 1)).astype(np.float32) for name in ("alpha", "beta")}
    module, params = load_dists(reference.state_of(reference.vgg()), weights, CONFIG)
    x, y = reference.photos(3, 37, 51), reference.photos(3, 37, 51, seed=1)
    y[2] = x[2] // 2 + 40  # less contrast of the same
    wanted = reference.dists(reference.vgg(), weights, x, y)
    assert wanted.min() > 0.02
    np.testing.assert_allclose(dists(module, params, x, y), wanted, rtol=0, atol=1e-5)


def test_the_published_network_has_its_number_of_parameters():
    shapes = param_shapes(Dists())
    assert shapes["alpha"].shape == shapes["beta"].shape == (1475,)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 14_714_688 + 2 * 1475


def test_equal_images_have_no_distance(params, pair):
    np.testing.assert_allclose(dists(TINY, params, pair[0], pair[0]), [0, 0], atol=1e-6)


def test_the_order_of_the_two_does_not_matter(params, pair):
    x, y = pair
    np.testing.assert_allclose(dists(TINY, params, x, y), dists(TINY, params, y, x), rtol=1e-5)


def test_floats_and_leading_axes_give_the_same(params, pair):
    x, y = pair
    many = dists(TINY, params, x, y)
    unit = [images[None] / np.float32(255) for images in pair]
    np.testing.assert_allclose(dists(TINY, params, *unit), many[None], rtol=1e-4)
    np.testing.assert_allclose(dists(TINY, params, x[0], y[0]), many[0], rtol=1e-5)


def test_a_shifted_texture_is_closer_than_a_blurred_one(params):
    """What DISTS is for: pixels differ throughout, statistics do not."""
    random = np.random.RandomState(0)
    x = random.uniform(0, 1, (32, 32, 3)).astype(np.float32)
    shifted = np.roll(x, 1, axis=1)
    blurred = (x + shifted) / 2
    structureless = dict(params, beta=np.zeros_like(params["beta"]))
    assert np.square(x - shifted).mean() > np.square(x - blurred).mean()
    assert float(dists(TINY, structureless, x, shifted)) < 0.5 * float(dists(TINY, structureless, x, blurred))


def test_what_is_not_a_number_has_no_distance(params, pair):
    x, y = (np.float32(images) / 255 for images in pair)
    x[0, 3, 4, 1] = np.nan
    np.testing.assert_array_equal(np.isnan(dists(TINY, params, x, y)), [True, False])


def test_a_gradient_descends(params, pair):
    x, y = (jnp.asarray(images, jnp.float32) / 255 for images in pair)

    def loss(y):
        return dists(TINY, params, x, y).sum()

    gradient = jax.jit(jax.grad(loss))(y)
    assert np.isfinite(gradient).all()
    assert float(loss(y - 0.05 * gradient / jnp.abs(gradient).max())) < float(loss(y))


def test_flat_images_have_a_finite_gradient(params):
    x = jnp.full((16, 16, 3), 0.5)
    gradient = jax.grad(lambda y: dists(TINY, params, x, y))(jnp.zeros((16, 16, 3)))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8), r"\(8, 8, 3\) and \(8, 9, 3\)"),
        (np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 4), np.uint8), "these have 4"),
        (np.zeros((0, 8, 3), np.uint8), np.zeros((0, 8, 3), np.uint8), r"\(0, 8, 3\)"),
    ],
)
def test_what_cannot_be_compared_is_refused(params, x, y, message):
    with pytest.raises(InputError, match=message):
        dists(TINY, params, x, y)


def test_a_network_of_lpips_is_refused(params, pair):
    with pytest.raises(InputError, match="DISTS takes a VGG with L2 pools, not 'max': that one is of LPIPS"):
        dists(Dists(VggConfig((3,), (1,))), params, *pair)
