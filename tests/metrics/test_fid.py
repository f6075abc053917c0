"""FID and KID against their formulas in float64, torch-fidelity's choices, and what small or broken sets do."""

import itertools

import jax
import numpy as np
import perceptual_reference as reference
import pytest

from jaxsem.backbones.inception import Inception, InceptionConfig, param_shapes
from jaxsem.errors import InputError
from jaxsem.metrics.fid import (
    Gaussian,
    fid,
    fit_gaussian,
    frechet_distance,
    inception_features,
    inception_input,
    kid,
    resize_tf1,
    squared_mmd,
)

MODULE = Inception(InceptionConfig(narrow=16, image_size=75))


@pytest.fixture(scope="module")
def params():
    random = np.random.RandomState(2)

    def draw(path, leaf):
        normal = random.standard_normal(leaf.shape)
        if path[-1].key == "kernel":
            return np.asarray(normal * np.sqrt(2 / np.prod(leaf.shape[:-1])), np.float32)
        ones = path[-1].key in ("scale", "variance")
        return np.asarray(np.abs(0.1 * normal + ones) if ones else 0.1 * normal, np.float32)

    return jax.tree_util.tree_map_with_path(draw, param_shapes(MODULE))


def drawn(count, width, seed=0, shift=0.0):
    random = np.random.RandomState(seed)
    mixing = np.random.RandomState(9).standard_normal((width, width)) / np.sqrt(width)
    return (random.standard_normal((count, width)) @ mixing + shift).astype(np.float32)


def published_formula(x, y):
    """torch-fidelity's: eigenvalues of the product of unbiased covariances, the real parts of their roots."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    c1, c2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(c1 @ c2).astype(complex)).real
    return np.square(x.mean(0) - y.mean(0)).sum() + np.trace(c1) + np.trace(c2) - 2 * roots.sum()


# -- FID --------------------------------------------------------------------------------------------------------------


def test_fid_of_commuting_gaussians_is_known():
    """Diagonal covariances: |m1 - m2|^2 + the squared differences of the deviations; turned alike, it stays."""
    random = np.random.RandomState(0)
    means, deviations = random.standard_normal((2, 6)), random.uniform(0.1, 2, (2, 6))
    turn = np.linalg.qr(random.standard_normal((6, 6)))[0]
    wanted = np.square(means[0] - means[1]).sum() + np.square(deviations[0] - deviations[1]).sum()
    for basis in (np.eye(6), turn):
        pair = [Gaussian.of(basis @ mean, basis @ np.diag(std**2) @ basis.T) for mean, std in zip(means, deviations)]
        assert frechet_distance(*pair) == pytest.approx(wanted, rel=1e-12)


def test_fid_of_gaussians_that_do_not_commute_is_known():
    """In two dimensions tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)) for any M of positive eigenvalues."""
    c1, c2 = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])
    product = c1 @ c2
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    wanted = 1 + np.trace(c1) + np.trace(c2) - 2 * root
    found = frechet_distance(Gaussian.of([1, 0], c1), Gaussian.of([1, 1], c2))
    assert found == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("counts", [(200, 150), (7, 9), (200, 7), (2, 2)])
def test_fid_of_sets_is_the_published_formula(counts):
    """Also with fewer images than dimensions, where half of the formula's eigenvalues are zero up to rounding."""
    x, y = drawn(counts[0], 12), drawn(counts[1], 12, 1, 0.3)
    assert fid(x, y).value == pytest.approx(published_formula(x, y), abs=1e-5)
    assert fid(y, x).value == pytest.approx(fid(x, y).value, rel=1e-9)
    assert fid(x, y).counts == counts


@pytest.mark.parametrize("count", [2, 30, 33, 500])
def test_a_set_has_the_mean_and_the_unbiased_covariance_of_numpy(count):
    x = drawn(count, 8, shift=5.0)
    gaussian = fit_gaussian(x)
    np.testing.assert_allclose(gaussian.mean, x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(gaussian.covariance, np.cov(x.astype(np.float64), rowvar=False), atol=1e-12)
    again = Gaussian.of(gaussian.mean, gaussian.covariance)
    np.testing.assert_allclose(again.covariance, gaussian.covariance, atol=1e-12)


@pytest.mark.parametrize("count", [5, 300])
def test_a_set_has_no_distance_from_itself_or_from_itself_in_another_order(count):
    x = drawn(count, 20)
    assert fid(x, x).value < 1e-9
    assert fid(x, x[::-1]).value < 1e-9


def test_small_sets_say_so():
    large, small = drawn(21, 20), drawn(20, 20)
    assert fid(large, large).warning is None
    for pair in ((large, small), (small, large)):
        warning = fid(*pair).warning
        assert "covariance of 20 images in 20 dimensions is singular" in warning
        assert "take more than 20" in warning


# -- KID --------------------------------------------------------------------------------------------------------------


def test_the_squared_mmd_is_unbiased():
    """Over all pairs of samples with repetition from small populations its mean is the exact squared MMD."""

    def exact(p, q):
        def kernel(a, b):
            return ((a.astype(np.float64) @ b.T / a.shape[1] + 1) ** 3).mean()

        return kernel(p, p) + kernel(q, q) - 2 * kernel(p, q)

    p, q = drawn(3, 4), drawn(3, 4, 1)
    for other, wanted in ((p, 0.0), (q, exact(p, q))):
        draws = list(itertools.product(range(3), repeat=2))
        values = [squared_mmd(p[list(i)], other[list(j)]) for i in draws for j in draws]
        assert np.mean(values) == pytest.approx(wanted, abs=1e-12)
    assert exact(p, q) > 0.1
    assert min(values) < 0 < max(values)


def test_kid_of_equal_distributions_is_zero_within_its_error():
    x, y = drawn(600, 8), drawn(600, 8, 1)
    values = [squared_mmd(x[i : i + 20], y[i : i + 20]) for i in range(0, 600, 20)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))
    assert min(values) < 0 < max(values)
    shifted = kid(x, y + np.float32(0.5), subsets=10, size=100)
    assert shifted.mean > 10 * abs(kid(x, y, subsets=10, size=100).mean)


def test_kid_draws_the_subsets_of_torch_fidelity():
    """Its loop: RandomState(seed), for each subset a choice of the first set and one of the second."""
    x, y = drawn(40, 6), drawn(50, 6, 1, 0.2)
    random, values = np.random.RandomState(2020), []
    for _ in range(7):
        a, b = x[random.choice(40, 12, replace=False)], y[random.choice(50, 12, replace=False)]
        a, b = a.astype(np.float64), b.astype(np.float64)
        xx, yy, xy = ((one @ two.T / 6 + 1) ** 3 for one, two in ((a, a), (b, b), (a, b)))
        off = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
        values.append(off / (12 * 11) - 2 * xy.sum() / 12**2)
    found = kid(x, y, subsets=7, size=12)
    assert found.mean == pytest.approx(np.mean(values), rel=1e-9)
    assert found.std == pytest.approx(np.std(values), rel=1e-9)
    assert (found.subsets, found.size, found.warning) == (7, 12, None)


def test_kid_is_the_same_again_and_another_for_another_seed():
    x, y = drawn(30, 4), drawn(30, 4, 1)
    first, again, other = (kid(x, y, subsets=5, size=10, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.mean != other.mean


def test_a_set_smaller_than_a_subset_says_so():
    """P004's 226 images, with the usual subsets of 1000."""
    x, y = drawn(226, 4), drawn(300, 4, 1)
    found = kid(x, y, subsets=3)
    assert found.size == 226
    assert "smaller set has 226 images, so subsets are of 226 and not 1000" in found.warning
    assert kid(x, y, subsets=3, size=226).warning is None


# -- mistakes ---------------------------------------------------------------------------------------------------------


def broken():
    features = drawn(5, 4)
    features[3, 1] = np.nan
    return features


@pytest.mark.parametrize("distance", [fid, kid])
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((0, 4), np.float32), drawn(5, 4), "first set has 0 images, and a distance of sets needs at least 2"),
        (drawn(5, 4), drawn(1, 4), "second set has 1 images"),
        (
            broken(),
            drawn(5, 4),
            "features of 1 of 5 images of the first set are not finite, the first of them number 4",
        ),
        (drawn(5, 4), np.full((5, 4), np.inf), "features of 5 of 5 images of the second set are not finite"),
        (drawn(5, 4), drawn(5, 3), "features of 4 and 3 dimensions: take both from one network"),
        (drawn(5, 4)[0], drawn(5, 4), r"first set are float32 of shape \[4\]"),
        (np.zeros((5, 4), np.uint8), drawn(5, 4), r"first set are uint8 of shape \[5, 4\]"),
        (np.zeros((5, 0)), np.zeros((5, 0)), r"float64 of shape \[5, 0\]"),
    ],
)
def test_sets_that_have_no_distance_are_refused(distance, x, y, message):
    with pytest.raises(InputError, match=message):
        distance(x, y)


@pytest.mark.parametrize(("subsets", "size"), [(0, 10), (3, 1)])
def test_subsets_that_cannot_be_are_refused(subsets, size):
    with pytest.raises(InputError, match=f"KID over {subsets} subsets of {size} images"):
        kid(drawn(20, 3), drawn(20, 3), subsets=subsets, size=size)


@pytest.mark.parametrize(
    ("mean", "covariance", "message"),
    [
        ([0, 0], np.eye(3), r"these have \[2\] and \[3, 3\]"),
        ([], np.zeros((0, 0)), r"these have \[0\] and \[0, 0\]"),
        ([0, np.nan], np.eye(2), "not finite"),
        ([0, 0], [[1, 0.5], [0, 1]], "not symmetric"),
        ([0, 0], [[1, 2], [2, 1]], "has the eigenvalue -1, so it is none"),
    ],
)
def test_what_is_no_gaussian_is_refused(mean, covariance, message):
    with pytest.raises(InputError, match=message):
        Gaussian.of(mean, covariance)


def test_gaussians_of_different_widths_are_refused():
    with pytest.raises(InputError, match="Gaussians in 2 and 3 dimensions have no distance"):
        frechet_distance(Gaussian.of([0, 0], np.eye(2)), Gaussian.of([0, 0, 0], np.eye(3)))


# -- features ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 9), (13, 13), (40, 29)])
def test_resizing_is_tensorflows(height, width):
    """Pixel by pixel: position i lies at i * side / size, between a pixel and the next, if there is one."""
    image = reference.photos(1, height, width)[0]
    found = resize_tf1(image, 13)
    wanted = np.empty((13, 13, 3))
    for i, j in np.ndindex(13, 13):
        (top, down), (left, across) = (divmod(k * side / 13, 1) for k, side in ((i, height), (j, width)))
        top, left = int(top), int(left)
        below, right = min(top + 1, height - 1), min(left + 1, width - 1)
        above = image[top, left] * (1 - across) + image[top, right] * across
        under = image[below, left] * (1 - across) + image[below, right] * across
        wanted[i, j] = above * (1 - down) + under * down
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    assert found.dtype == np.float32


def test_resizing_to_its_own_size_changes_nothing():
    image = reference.photos(1, 13, 13)[0]
    np.testing.assert_array_equal(resize_tf1(image, 13), image)


def test_values_go_from_minus_one_to_almost_one():
    found = inception_input(np.uint8([[[0, 128, 255]]]), 75)
    np.testing.assert_array_equal(found[7, 20], [-1, 0, 127 / 128])


def test_features_are_those_of_the_network_whatever_the_batch(params):
    """Images of several sizes, one of them grey, in batches that they do not fill."""
    images = [*reference.photos(2, 40, 31), reference.photos(1, 90, 75)[0], reference.photos(1, 20, 20)[0, :, :, 0]]
    inputs = np.stack(
        [inception_input(np.broadcast_to(i[..., None], (*i.shape, 3)) if i.ndim == 2 else i, 75) for i in images]
    )
    wanted = jax.jit(MODULE.apply)({"params": params}, inputs)
    found = inception_features(MODULE, params, iter(images), batch=3)
    assert found.shape == (4, 128)
    assert np.asarray(wanted).std() > 0.05
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(inception_features(MODULE, params, images[:3], batch=3), found[:3])


def test_images_that_have_no_features_are_refused(params):
    with pytest.raises(InputError, match="There is no image to take features of"):
        inception_features(MODULE, params, [])
    with pytest.raises(InputError, match="A batch of 0 images"):
        inception_features(MODULE, params, reference.photos(1), batch=0)
    with pytest.raises(InputError, match="must be uint8"):
        inception_features(MODULE, params, [np.zeros((8, 8, 3))])
