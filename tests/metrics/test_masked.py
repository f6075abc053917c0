import jax
import jax.numpy as jnp
import numpy as np
import perceptual_reference as reference
import pytest

from jaxsem.backbones.vgg import VggConfig
from jaxsem.errors import InputError
from jaxsem.metrics import psnr, ssim
from jaxsem.metrics.lpips import Lpips, lpips_map, param_shapes
from jaxsem.metrics.masked import f_lpips, f_psnr, f_ssim

MODULE = Lpips(VggConfig((3, 4), (1, 1)))


@pytest.fixture(scope="module")
def params():
    random = np.random.RandomState(2)
    return jax.tree.map(
        lambda leaf: np.asarray(np.abs(0.4 * random.standard_normal(leaf.shape)), np.float32), param_shapes(MODULE)
    )


@pytest.fixture(scope="module")
def pair():
    return reference.photos(2, 30, 26), reference.photos(2, 30, 26, seed=1)


@pytest.fixture(scope="module")
def mask():
    mask = np.zeros((2, 30, 26), bool)
    mask[0, 8:20, 6:15] = True
    mask[1, :, 3:18] = True
    return mask


# -- what is computed -------------------------------------------------------------------------------------------------


def test_f_psnr_is_the_published_formula(pair, mask):
    """DoveNet's way: the error of masked images over all pixels, scaled up by the share of the mask."""
    x, y = (images.astype(np.float64) for images in pair)
    m = mask[..., None]
    masked = np.square(m * x - m * y).mean((1, 2, 3)) * mask[0].size / mask.sum((1, 2))
    np.testing.assert_allclose(f_psnr(*pair, mask), 10 * np.log10(255**2 / masked), rtol=1e-6)


def test_soft_masks_weigh_pixels():
    x, y = np.zeros((1, 2, 3), np.float32), np.float32([[[0.1] * 3, [0.5] * 3]])
    error = (0.25 * 0.1**2 + 0.75 * 0.5**2) / (0.25 + 0.75)
    found = f_psnr(x, y, np.float32([[0.25, 0.75]]))
    np.testing.assert_allclose(found, 10 * np.log10(1 / error), rtol=1e-6)


def test_f_ssim_is_the_mean_of_ssim_at_the_windows_in_the_mask(pair, mask):
    """Each window by itself, as an image of 11x11 pixels."""
    x, y = (images[0] for images in pair)
    rows, columns = np.nonzero(mask[0][5:-5, 5:-5])
    windows = [
        np.stack([images[row : row + 11, column : column + 11] for row, column in zip(rows, columns)])
        for images in (x, y)
    ]
    assert len(rows) == 12 * 9
    np.testing.assert_allclose(f_ssim(x, y, mask[0]), np.mean(ssim(*windows)), atol=1e-5)


def test_f_lpips_is_the_mean_of_the_map_in_the_mask(params, pair, mask):
    distances = np.asarray(lpips_map(MODULE, params, *pair))
    wanted = [distances[i][mask[i]].mean() for i in range(2)]
    np.testing.assert_allclose(f_lpips(MODULE, params, *pair, mask), wanted, rtol=1e-5)


def test_a_mask_of_ones_changes_nothing(params, pair):
    ones = np.ones((2, 30, 26), np.float32)
    np.testing.assert_allclose(f_psnr(*pair, ones), psnr(*pair), rtol=1e-6)
    np.testing.assert_allclose(f_ssim(*pair, ones), ssim(*pair), atol=1e-6)
    mean = lpips_map(MODULE, params, *pair).mean((1, 2))
    np.testing.assert_allclose(f_lpips(MODULE, params, *pair, ones), mean, rtol=1e-5)


def test_what_lies_outside_does_not_matter(params, pair, mask):
    """Beyond the reach of a window (5 pixels) and of this network's 8."""
    x, y = pair
    far = np.zeros((2, 30, 26), bool)
    far[:, :2, :2] = True
    other = np.where(far[..., None], 255 - y, y)
    mask = mask & (np.arange(30) > 16)[:, None]
    np.testing.assert_array_equal(f_psnr(x, other, mask), f_psnr(x, y, mask))
    np.testing.assert_allclose(f_ssim(x, other, mask), f_ssim(x, y, mask), atol=1e-6)
    np.testing.assert_allclose(f_lpips(MODULE, params, x, other, mask), f_lpips(MODULE, params, x, y, mask), atol=1e-6)


def test_floats_in_0_to_1_give_the_same_as_uint8(params, pair, mask):
    unit = [images / np.float32(255) for images in pair]
    np.testing.assert_allclose(f_psnr(*unit, mask), f_psnr(*pair, mask), rtol=1e-5)
    np.testing.assert_allclose(f_ssim(*unit, mask), f_ssim(*pair, mask), atol=1e-5)


def test_images_that_agree_inside_are_perfect(params, pair, mask):
    x, _ = pair
    assert np.isposinf(f_psnr(x, np.where(mask[..., None], x, 0), mask)).all()
    np.testing.assert_allclose(f_ssim(x, x, mask), 1, atol=1e-6)
    np.testing.assert_array_equal(f_lpips(MODULE, params, x, x, mask), 0)


def test_one_image_alone_gives_one_number(params, pair, mask):
    x, y, m = (array[0] for array in (*pair, mask))
    for found in (f_psnr(x, y, m), f_ssim(x, y, m), f_lpips(MODULE, params, x, y, m)):
        assert found.shape == ()
        assert found.dtype == jnp.float32


def test_jit_and_gradients_apply(params, pair, mask):
    x, y = (images / np.float32(255) for images in pair)

    def loss(y, mask):
        terms = f_psnr(x, y, mask) / 100 + f_ssim(x, y, mask) - f_lpips(MODULE, params, x, y, mask)
        return terms.sum()

    gradient = jax.jit(jax.grad(loss))(y, mask)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(jax.jit(loss)(y, mask), loss(y, mask), rtol=1e-5)


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [f_psnr, f_ssim, lambda x, y, m: f_lpips(MODULE, {}, x, y, m)])
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((26, 30), bool), r"need a mask of shape \[2, 30, 26\], but this is \[26, 30\]"),
        (np.ones((2, 30, 26, 1), bool), r"but this is \[2, 30, 26, 1\]"),
        (np.ones((2, 30, 26), np.uint8), "boolean or floating point in 0..1, but this is uint8"),
        (np.full((2, 30, 26), 255.0), "values in 0..1, but this one has others"),
        (np.full((2, 30, 26), np.nan), "values in 0..1, but this one has others"),
        (np.zeros((2, 30, 26), bool), "nothing to measure: mask 1 of 2 has no pixel"),
        (np.arange(2)[::-1, None, None] * np.ones((2, 30, 26)), "mask 2 of 2 has no pixel"),
    ],
)
def test_masks_that_do_not_fit_are_refused(pair, metric, mask, message):
    with pytest.raises(InputError, match=message):
        metric(*pair, mask)


def test_a_mask_at_the_border_has_no_f_ssim(pair):
    mask = np.zeros((2, 30, 26), bool)
    mask[:, :5] = True
    assert np.isfinite(f_psnr(*pair, mask)).all()
    with pytest.raises(InputError, match="mask 1 of 2 has no pixel farther than 5 pixels from the border"):
        f_ssim(*pair, mask)


def test_images_that_cannot_be_compared_are_refused(params):
    small = np.zeros((10, 40, 3), np.uint8)
    with pytest.raises(InputError, match="at least 11 pixels a side, but this one is 40x10"):
        f_ssim(small, small, np.ones((10, 40), bool))
    for metric in (f_psnr, f_ssim, lambda x, y, m: f_lpips(MODULE, params, x, y, m)):
        with pytest.raises(InputError, match=r"\(10, 40, 3\) and \(40, 10, 3\)"):
            metric(small, small.swapaxes(0, 1), np.ones((10, 40), bool))
