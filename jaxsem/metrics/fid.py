"""FID and KID: how different two sets of images are, by the distributions of their Inception features.

    module, params = load_inception("pt_inception-2015-12-05-6726825d.pth")
    real, fake = (inception_features(module, params, images) for images in (originals, reconstructions))
    fid(real, fake).value, kid(real, fake).mean

Both figures depend on how many images there are, FID strongly: results on sets that are too small have a `warning`.

Sources: Heusel et al., GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium (NeurIPS
2017); Binkowski et al., Demystifying MMD GANs (ICLR 2018). Where they leave a choice (resizing, unbiased covariances,
seeds) this module chooses as torch-fidelity does.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from jaxsem.backbones.inception import Inception
from jaxsem.data.images import pixels_from
from jaxsem.errors import InputError

SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020
"""KID's, as torch-fidelity has them by default."""

Features = Float[np.ndarray, "n width"]

# -- features ---------------------------------------------------------------------------------------------------------


def inception_features(
    module: Inception, params: Any, images: Iterable[Any], batch: int | None = None
) -> Float[np.ndarray, "n width"]:
    """The features of images, computed in batches of one compiled size.

    Args:
        module: the network, as `jaxsem.weights.perceptual.load_inception` gives it.
        params: its parameters.
        images: whatever `jaxsem.data.images.pixels_from` takes, uint8 arrays `[height, width, 3]` above all, of any
            sizes; they are taken as needed, so a generator serves.
        batch: images a device batch; 8 on a CPU, 64 elsewhere by default.

    Returns:
        float32, one row for each image, in their order.

    Raises:
        InputError: no image, something that is none, or a batch below 1.
    """
    size = (8 if jax.default_backend() == "cpu" else 64) if batch is None else batch
    if size < 1:
        raise InputError(f"A batch of {size} images has no features: give at least 1.")
    params, images = jax.device_put(params), iter(images)
    rows: list[np.ndarray] = []
    waiting, known = None, 0
    while group := [inception_input(pixels_from(image), module.config.image_size) for image in islice(images, size)]:
        filled = np.stack(group + group[-1:] * (size - len(group)))  # a short batch compiles nothing new
        found = _features(module, params, filled)
        # Waited for when the next batch is on its way: the device works while the host resizes.
        if waiting is not None:
            rows.append(np.asarray(waiting)[:known])
        waiting, known = found, len(group)
    if waiting is None:
        raise InputError("There is no image to take features of: give at least one.")
    return np.concatenate([*rows, np.asarray(waiting)[:known]])


@partial(jax.jit, static_argnames="module")
def _features(module: Inception, params: Any, images: jax.Array) -> jax.Array:
    return module.apply({"params": params}, images)


def inception_input(pixels: UInt8[np.ndarray, "h w 3"], size: int = 299) -> Float[np.ndarray, "size size 3"]:
    """An image as FID's Inception takes it: resized as TensorFlow 1 does, values from -1 to 1.

    On the host, so that images of many sizes compile nothing.

    Args:
        pixels: uint8 RGB image of any size.
        size: side of the result; both sides are stretched to it.

    Returns:
        float32, `(value - 128) / 128`.
    """
    return (resize_tf1(pixels, size) - np.float32(128)) / np.float32(128)


def resize_tf1(image: np.ndarray, size: int) -> Float[np.ndarray, "size size c"]:
    """Bilinear resizing of TensorFlow 1: position `i` of the result lies at `i * side / size`, without antialiasing.

    Args:
        image: `[height, width, channels]`.
        size: height and width of the result.

    Returns:
        float32 with values in the range of the image's.
    """
    (top, bottom, down), (left, right, across) = (_between(side, size) for side in image.shape[:2])
    rows = np.stack([image[top], image[bottom]]).astype(np.float32)
    first = rows[:, :, left]
    rows = first + (rows[:, :, right] - first) * across[:, None]
    return rows[0] + (rows[1] - rows[0]) * down[:, None, None]


def _between(side: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each position of the result the pixel before, the one after, and the way between them."""
    place = np.arange(size, dtype=np.float32) * np.float32(side / size)
    before = place.astype(np.int64)
    return before, np.minimum(before + 1, side - 1), place - before.astype(np.float32)


# -- FID --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A normal distribution of features.

    Attributes:
      mean: float64 `[width]`.
      root: float64 `[rank, width]`; `root.T @ root` is the covariance.
    """

    mean: np.ndarray
    root: np.ndarray

    @property
    def covariance(self) -> Float[np.ndarray, "width width"]:
        """The covariance matrix."""
        return self.root.T @ self.root

    @classmethod
    def of(cls, mean: np.ndarray, covariance: np.ndarray) -> "Gaussian":
        """The one with this mean and covariance, such as the published statistics of a data set.

        Raises:
            InputError: shapes that do not fit, numbers that are not finite, or no covariance: not symmetric, or with an
                eigenvalue clearly below 0.
        """
        mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
        if mean.ndim != 1 or not mean.size or covariance.shape != (mean.size, mean.size):
            raise InputError(
                f"A Gaussian needs a mean [width] and a covariance [width, width], but these have {list(mean.shape)} "
                f"and {list(covariance.shape)}."
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise InputError("The mean or the covariance of this Gaussian holds numbers that are not finite.")
        largest = np.abs(covariance).max()
        if np.abs(covariance - covariance.T).max() > 1e-6 * largest:
            raise InputError("This covariance is not symmetric, so it is none: check where it comes from.")
        values, vectors = np.linalg.eigh(covariance)
        if values[0] < -1e-6 * largest:
            raise InputError(f"This covariance has the eigenvalue {values[0]:.3g}, so it is none: none is below 0.")
        return cls(mean, np.sqrt(np.maximum(values, 0))[:, None] * vectors.T)


@dataclass(frozen=True)
class Fid:
    """A Fréchet inception distance.

    Attributes:
      value: The distance.
      counts: Images in either set.
      warning: What keeps it from being compared with others, in a sentence; None if nothing does.
    """

    value: float
    counts: tuple[int, int]
    warning: str | None


def fid(features: Features, others: Features) -> Fid:
    """FID between two sets of features: the Fréchet distance of the Gaussians fitted to them.

    Args:
        features: `[n, width]`, of `inception_features`.
        others: `[m, width]`, by the same network; the order of the two does not matter.

    Returns:
        The distance, and a warning if a set has too few images for a covariance of full rank.

    Raises:
        InputError: fewer than two rows, another shape, different widths, or features that are not finite.
    """
    features, others = _checked(features, others)
    counts, width = (len(features), len(others)), features.shape[1]
    warning = None
    if min(counts) <= width:
        warning = (
            f"The covariance of {min(counts)} images in {width} dimensions is singular, which makes FID too large: "
            f"compare it only with figures of as many images, or take more than {width}."
        )
    return Fid(frechet_distance(fit_gaussian(features), fit_gaussian(others)), counts, warning)


def fit_gaussian(features: Features) -> Gaussian:
    """The Gaussian of the mean and the unbiased covariance of features `[n, width]`, n at least 2."""
    count, width = features.shape
    mean, root = features.mean(axis=0, dtype=np.float64), np.zeros((0, width))
    # The root of a sum of squares from that of its first part: neither all rows in float64 nor squares are needed.
    for start in range(0, count, 4 * width):
        root = np.concatenate([root, features[start : start + 4 * width] - mean])
        if len(root) > width:
            root = np.linalg.qr(root, mode="r")
    return Gaussian(mean, root / np.sqrt(count - 1))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """The squared Fréchet distance |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr(sqrt(C1 C2)) of two Gaussians.

    The last trace is the sum of the roots of the eigenvalues of C1 C2. With C = R' R those are the squares of the
    singular values of R1 R2', which are real, never negative, and exact to the last digits where C1 C2 is singular.

    Raises:
        InputError: Gaussians of different widths.

    Example:
        >>> round(frechet_distance(Gaussian.of([0.0], [[1.0]]), Gaussian.of([3.0], [[4.0]])), 9)
        10.0
    """
    if first.mean.shape != second.mean.shape:
        raise InputError(
            f"Gaussians in {first.mean.size} and {second.mean.size} dimensions have no distance: take features of one "
            f"network."
        )
    trace = np.linalg.svd(first.root @ second.root.T, compute_uv=False).sum()
    squares = np.square(first.mean - second.mean).sum() + np.square(first.root).sum() + np.square(second.root).sum()
    return max(float(squares - 2 * trace), 0.0)  # below 0 by rounding only


# -- KID --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kid:
    """A kernel inception distance.

    Attributes:
      mean: Over the subsets; an unbiased estimate, so it may be below 0. Papers often report it times 1000.
      std: Over the subsets.
      subsets: How many there were.
      size: Images of either set in each.
      warning: What keeps it from being compared with others, in a sentence; None if nothing does.
    """

    mean: float
    std: float
    subsets: int
    size: int
    warning: str | None


def kid(
    features: Features, others: Features, *, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = SEED
) -> Kid:
    """KID between two sets of features: the unbiased squared MMD under a cubic kernel, over subsets.

    The kernel of two features is `(x . y / width + 1)^3`.

    Args:
        features: `[n, width]`, of `inception_features`.
        others: `[m, width]`, by the same network.
        subsets: how many are drawn, each without replacement.
        size: images of either set in a subset; of a smaller set all are taken, and the warning says so.
        seed: decides the subsets, which are those of torch-fidelity.

    Returns:
        Mean and standard deviation over the subsets, and a warning if a set is smaller than `size`.

    Raises:
        InputError: fewer than two rows, another shape, different widths, features that are not finite, no subset, or
            subsets of fewer than two.
    """
    features, others = _checked(features, others)
    if subsets < 1 or size < 2:
        raise InputError(f"KID over {subsets} subsets of {size} images: give at least 1 subset of at least 2.")
    count, warning = min(len(features), len(others)), None
    if count < size:
        warning = (
            f"The smaller set has {count} images, so subsets are of {count} and not {size}: compare it only with "
            f"figures of that size, and do not read the deviation as an error, for the subsets share their images."
        )
    size, random = min(size, count), np.random.RandomState(seed)
    values = np.empty(subsets)
    for i in range(subsets):
        chosen = [rows[random.choice(len(rows), size, replace=False)] for rows in (features, others)]
        values[i] = squared_mmd(*chosen)
    return Kid(float(values.mean()), float(values.std()), subsets, size, warning)


def squared_mmd(features: Features, others: Features) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy under KID's kernel; two rows a set at least."""
    x, y = features.astype(np.float64), others.astype(np.float64)
    return _mean_of_pairs(x) + _mean_of_pairs(y) - 2 * float(_kernel(x, y).mean())


def _mean_of_pairs(x: np.ndarray) -> float:
    """The mean of the kernel over pairs of different rows."""
    kernel, count = _kernel(x, x), len(x)
    return float((kernel.sum() - np.trace(kernel)) / (count * (count - 1)))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _checked(features: Features, others: Features) -> tuple[np.ndarray, np.ndarray]:
    """Both sets as arrays that can be compared."""
    pair = np.asarray(features), np.asarray(others)
    for name, rows in zip(("first", "second"), pair):
        if rows.ndim != 2 or not rows.shape[1] or not np.issubdtype(rows.dtype, np.floating):
            raise InputError(
                f"Features are floats [images, width], but those of the {name} set are {rows.dtype} of shape "
                f"{list(rows.shape)}."
            )
        if len(rows) < 2:
            raise InputError(f"The {name} set has {len(rows)} images, and a distance of sets needs at least 2 in each.")
        if bad := np.flatnonzero(~np.isfinite(rows).all(axis=1)).tolist():
            raise InputError(
                f"The features of {len(bad)} of {len(rows)} images of the {name} set are not finite, the first of "
                f"them number {bad[0] + 1}: look at that image and at the weights."
            )
    if pair[0].shape[1] != pair[1].shape[1]:
        raise InputError(
            f"The two sets have features of {pair[0].shape[1]} and {pair[1].shape[1]} dimensions: take both from one "
            f"network."
        )
    return pair
