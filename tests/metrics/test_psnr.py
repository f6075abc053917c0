import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsem.errors import InputError
from jaxsem.metrics import psnr


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (2, 3, 17, 9, 3), np.uint8), rng.integers(0, 256, (2, 3, 17, 9, 3), np.uint8)


def test_one_level_of_error_everywhere_is_48_13_db():
    x = np.full((5, 7, 3), 100, np.uint8)
    assert float(psnr(x, x + 1)) == pytest.approx(20 * np.log10(255), abs=1e-5)


def test_error_in_both_directions_counts_alike():
    x = np.full((2, 2, 1), 100, np.uint8)
    y = np.array([[[99], [101]], [[99], [101]]], np.uint8)
    assert float(psnr(x, y)) == pytest.approx(20 * np.log10(255), abs=1e-5)


def test_each_image_of_a_batch_gets_its_own_value(pair):
    x, y = pair
    mse = np.mean((x.astype(np.float64) - y) ** 2, axis=(-3, -2, -1))
    np.testing.assert_allclose(psnr(x, y), 10 * np.log10(255**2 / mse), rtol=1e-6)


def test_floats_in_0_to_1_give_the_same_as_uint8(pair):
    x, y = pair
    np.testing.assert_allclose(psnr(x / np.float32(255), y / np.float32(255)), psnr(x, y), rtol=1e-6)


def test_identical_images_are_infinitely_good(pair):
    assert np.isposinf(psnr(pair[0], pair[0])).all()


def test_jit_and_vmap_agree_with_the_plain_call(pair):
    x, y = pair
    np.testing.assert_allclose(jax.jit(jax.vmap(psnr))(x, y), psnr(x, y), rtol=1e-6)


def test_a_gradient_points_to_the_original():
    x = jnp.full((4, 4, 3), 0.5)
    gradient = jax.grad(lambda y: psnr(x, y))(x + 0.1)
    assert (gradient < 0).all()


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8), r"\(4, 4, 3\) and \(4, 5, 3\)"),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 3), np.float32), "uint8 and float32"),
        (np.zeros((4, 4, 3), np.int32), np.zeros((4, 4, 3), np.int32), "int32 and int32"),
        (np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8), r"\(4, 4\)"),
        (np.zeros((0, 4, 3), np.uint8), np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\)"),
    ],
)
def test_what_cannot_be_compared_is_refused(x, y, message):
    with pytest.raises(InputError, match=message):
        psnr(x, y)
