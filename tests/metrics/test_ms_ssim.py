import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsem.errors import InputError
from jaxsem.metrics import ms_ssim, ssim


def photo_like_pair(height, width, noise, seed=0):
    """Smooth shapes with an edge, and the same with noise: uint8, from integers only, so equal on every machine."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[:height, :width]
    image = (
        np.stack([row + column, 2 * row, 255 - column], -1) % 200 + 40 * (row // 32 % 2 == column // 32 % 2)[..., None]
    )
    noisy = image + rng.integers(-noise, noise + 1, image.shape)
    return image.clip(0, 255).astype(np.uint8), noisy.clip(0, 255).astype(np.uint8)


# pytorch-msssim 1.0.0 with torch 2.13.0, data_range=255, of photo_like_pair(height, width, noise).
EXPECTED = {
    (177, 200, 10): (0.767683, 0.975684),
    (162, 161, 40): (0.260124, 0.821933),
    (177, 200, 150): (0.053134, 0.481565),
}


@pytest.mark.parametrize(("height", "width", "noise"), EXPECTED)
def test_equals_the_values_of_pytorch_msssim(height, width, noise):
    x, y = photo_like_pair(height, width, noise)
    expected_ssim, expected_ms_ssim = EXPECTED[height, width, noise]
    assert float(ssim(x, y)) == pytest.approx(expected_ssim, abs=1e-5)
    assert float(ms_ssim(x, y)) == pytest.approx(expected_ms_ssim, abs=1e-5)


@pytest.mark.parametrize(("height", "width"), [(161, 162), (167, 188)])
@pytest.mark.parametrize("noise", [3, 40, 200])
def test_equals_pytorch_msssim_itself(height, width, noise):
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("pytorch_msssim")
    pairs = [photo_like_pair(height, width, noise, seed) for seed in (1, 2)]
    x, y = (np.stack(images) for images in zip(*pairs))
    tensors = [torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2) for images in (x, y)]
    for ours, theirs in ((ssim, reference.ssim), (ms_ssim, reference.ms_ssim)):
        np.testing.assert_allclose(ours(x, y), theirs(*tensors, size_average=False).numpy(), atol=1e-5)


def test_floats_in_0_to_1_give_the_same_as_uint8():
    x, y = photo_like_pair(162, 161, 30)
    unit = (images / np.float32(255) for images in (x, y))
    assert float(ms_ssim(*unit)) == pytest.approx(float(ms_ssim(x, y)), abs=1e-5)


def test_identical_images_score_one():
    x, _ = photo_like_pair(162, 161, 30)
    assert float(ms_ssim(x, x)) == pytest.approx(1, abs=1e-6)


def test_a_batch_is_the_images_one_by_one():
    pairs = [photo_like_pair(162, 161, noise) for noise in (5, 50)]
    x, y = (np.stack(images) for images in zip(*pairs))
    one_by_one = [float(ms_ssim(*pair)) for pair in pairs]
    np.testing.assert_allclose(ms_ssim(x[None], y[None]), [one_by_one], atol=1e-6)
    np.testing.assert_allclose(jax.vmap(ms_ssim)(x, y), one_by_one, atol=1e-6)


def test_the_gradient_is_finite_where_a_scale_has_no_similarity():
    x = jnp.asarray(photo_like_pair(162, 161, 0)[0]) / 255
    value, gradient = jax.value_and_grad(lambda y: ms_ssim(x, y))(1 - x)
    assert float(value) == 0
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(("metric", "smallest"), [(ssim, 11), (ms_ssim, 161)])
def test_the_smallest_side_is_measured_and_one_below_is_refused(metric, smallest):
    enough, short = np.zeros((smallest, 200, 3), np.uint8), np.zeros((smallest - 1, 200, 3), np.uint8)
    assert float(metric(enough, enough)) == 1
    with pytest.raises(InputError, match=f"at least {smallest} pixels a side, but this one is 200x{smallest - 1}"):
        metric(short, short)
