"""Quantisers of feature vectors without a network: what PQVAE-shared has to beat (papers/1, section 4).

Each is fitted to features once, on the host, and then maps features to a few small integers and back:

    features [b, w] ──indices──▶ int32 [b, n] ──entropy coder──▶ bytes ──▶ int32 [b, n] ──features──▶ float32 [b, w]

`ProductQuantizer` (PQ) cuts a feature into sub-vectors with a k-means codebook each, `RotatedProductQuantizer` (OPQ)
rotates it first, so that the cut loses less, and `ScalarQuantizer` (SQ) rounds every dimension by itself. A decoded
feature is the mean of what shares its indices, hence shorter than 1; whoever needs unit length divides by the norm.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from jaxsem.errors import InputError
from jaxsem.systems.features import check_features

# Rows of which distances to all codewords are held at once: encoding any number of features takes the same memory.
ROWS = 8192


class FeatureQuantizer(Protocol):
    """What every quantiser of features offers, with or without a network."""

    @property
    def table_sizes(self) -> tuple[int, ...]:
        """The alphabet of each of the n indices: index i is in `range(table_sizes[i])`."""

    @property
    def bits(self) -> int:
        """Bits a feature takes when each index has a fixed length."""
        return fixed_bits(self.table_sizes)

    def indices(self, features: ArrayLike) -> np.ndarray:
        """The indices int32 [b, n] of features [b, w]."""

    def features(self, indices: ArrayLike) -> np.ndarray:
        """The features float32 [b, w] that indices [b, n] stand for."""


def fixed_bits(table_sizes: Sequence[int]) -> int:
    """Bits of one index per table at fixed length, each rounded up to whole bits."""
    return sum((size - 1).bit_length() for size in table_sizes)


def check_indices(indices: ArrayLike, table_sizes: Sequence[int]) -> np.ndarray:
    """Indices as int32 [b, n].

    Raises:
        InputError: Not a matrix of integers with a column per table, or an index outside its table.
    """
    array, sizes = np.asarray(indices), np.asarray(table_sizes)
    if array.ndim != 2 or array.shape[1] != len(sizes) or array.dtype.kind not in "iu":
        raise InputError(f"indices are integers of shape [count, {len(sizes)}], not {array.dtype} of {array.shape}")
    outside = np.argwhere((array < 0) | (array >= sizes))
    if outside.size:
        row, column = outside[0]
        raise InputError(
            f"index {array[row, column]} at {(int(row), int(column))} is not below {sizes[column]}, its table's size"
        )
    return array.astype(np.int32)


def _enough(count: int, codewords: int) -> None:
    if codewords < 2:
        raise InputError(f"a codebook needs at least 2 codewords, not {codewords}")
    if count < codewords:
        raise InputError(
            f"{count} training features cannot give {codewords} codewords: use more features or fewer codewords"
        )


def nearest(points: np.ndarray, codebook: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The codeword of least squared distance for each point, the lowest on a tie.

    Args:
        points: float32 [b, d].
        codebook: float32 [k, d].

    Returns:
        Its index int32 [b], and the squared distance float32 [b].
    """
    found, errors = np.empty(len(points), np.int32), np.empty(len(points), np.float32)
    lengths = (codebook**2).sum(axis=1)
    for begin in range(0, len(points), ROWS):
        rows = slice(begin, begin + ROWS)
        # |x - c|^2 without |x|^2, which is the same for every codeword.
        scores = lengths - 2 * points[rows] @ codebook.T
        found[rows] = scores.argmin(axis=1)
        errors[rows] = scores.min(axis=1) + (points[rows] ** 2).sum(axis=1)
    return found, np.maximum(errors, 0)


def kmeans(points: np.ndarray, codewords: int, rng: np.random.Generator, iterations: int = 25) -> np.ndarray:
    """A codebook by k-means: k-means++ (Arthur and Vassilvitskii, SODA 2007), then Lloyd's iterations.

    Args:
        points: float32 [b, d], b at least `codewords`.
        codewords: k, at least 2.
        rng: Draws the start.
        iterations: At most so many; it stops when nothing moves any more.

    Returns:
        float32 [k, d].

    Raises:
        InputError: Fewer points than codewords, or fewer than 2 codewords.
    """
    _enough(len(points), codewords)
    codebook = _plus_plus(points, codewords, rng)
    for _ in range(iterations):
        moved = _lloyd(points, codebook)
        if np.array_equal(moved, codebook):
            break
        codebook = moved
    return codebook


def _plus_plus(points: np.ndarray, codewords: int, rng: np.random.Generator) -> np.ndarray:
    """Points drawn one after the other, each with a chance that grows with its squared distance to those before."""
    chosen = [int(rng.integers(len(points)))]
    errors = np.full(len(points), np.inf)
    for _ in range(codewords - 1):
        # By difference, so that a point equal to a chosen one is at 0 exactly and is not drawn again.
        errors = np.minimum(errors, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
        sums = errors.cumsum()
        # When all points are taken, any will do: the search then gives one past the end.
        found = int(np.searchsorted(sums, rng.random() * sums[-1], side="right"))
        chosen.append(min(found, len(points) - 1))
    return points[chosen]


def _lloyd(points: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """One of Lloyd's iterations: codewords move to the means of their points, those without any to the worst served."""
    size, width = codebook.shape
    labels, errors = nearest(points, codebook)
    counts = np.bincount(labels, minlength=size)
    places = labels[:, None] * width + np.arange(width)
    sums = np.bincount(places.ravel(), weights=points.ravel(), minlength=size * width).reshape(size, width)
    moved = (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
    empty = np.flatnonzero(counts == 0)
    moved[empty] = points[np.argsort(-errors, kind="stable")[: len(empty)]]
    return moved


@dataclass(frozen=True, eq=False)
class ProductQuantizer(FeatureQuantizer):
    """Product quantisation (Jégou, Douze and Schmid, TPAMI 2011): n sub-vectors, each with a codebook of its own.

    Attributes:
        codebooks: float32 [n, k, w/n].
    """

    codebooks: np.ndarray

    @classmethod
    def fit(
        cls, features: ArrayLike, *, subspaces: int, codewords: int, seed: int = 0, iterations: int = 25
    ) -> "ProductQuantizer":
        """Fit the codebooks by k-means.

        Args:
            features: [b, w], b at least `codewords`.
            subspaces: n, a divisor of w.
            codewords: k of each codebook.
            seed: Draws the starts; the same seed gives the same codebooks.
            iterations: Of Lloyd's, at most.

        Raises:
            InputError: Features that are no finite matrix, a width that n does not divide, or too few features.
        """
        points = check_features(features)
        width = points.shape[1]
        if subspaces < 1 or width % subspaces:
            raise InputError(
                f"a width of {width} cannot be cut into {subspaces} equal sub-spaces: choose a divisor of it"
            )
        _enough(len(points), codewords)
        rng = np.random.default_rng(seed)
        parts = np.split(points, subspaces, axis=1)
        return cls(np.stack([kmeans(part, codewords, rng, iterations) for part in parts]))

    @property
    def width(self) -> int:
        """The width w of the features."""
        return self.codebooks.shape[0] * self.codebooks.shape[2]

    @property
    def table_sizes(self) -> tuple[int, ...]:
        """The alphabet of each of the n indices."""
        return (self.codebooks.shape[1],) * self.codebooks.shape[0]

    def indices(self, features: ArrayLike) -> np.ndarray:
        """The nearest codeword of each sub-vector: int32 [b, n] of features [b, w].

        Raises:
            InputError: Features of another width or not finite.
        """
        points = check_features(features, self.width)
        parts = np.split(points, len(self.codebooks), axis=1)
        return np.stack([nearest(part, book)[0] for part, book in zip(parts, self.codebooks)], axis=1)

    def features(self, indices: ArrayLike) -> np.ndarray:
        """The codewords of indices [b, n] side by side: float32 [b, w].

        Raises:
            InputError: Indices that do not fit `table_sizes`.
        """
        found = check_indices(indices, self.table_sizes)
        return self.codebooks[np.arange(len(self.codebooks)), found].reshape(len(found), self.width)

    def refined(self, features: ArrayLike) -> "ProductQuantizer":
        """This quantiser after one more of Lloyd's iterations on features [b, w]."""
        parts = np.split(check_features(features, self.width), len(self.codebooks), axis=1)
        return replace(self, codebooks=np.stack([_lloyd(part, book) for part, book in zip(parts, self.codebooks)]))


@dataclass(frozen=True, eq=False)
class RotatedProductQuantizer(FeatureQuantizer):
    """Optimised product quantisation (Ge, He, Ke and Sun, CVPR 2013), the non-parametric solution.

    Attributes:
        rotation: R, orthogonal float32 [w, w]; features x are quantised as x R.
        product: The quantiser of rotated features.
    """

    rotation: np.ndarray
    product: ProductQuantizer

    @classmethod
    def fit(
        cls, features: ArrayLike, *, subspaces: int, codewords: int, seed: int = 0, iterations: int = 20
    ) -> "RotatedProductQuantizer":
        """Fit rotation and codebooks in turn, from plain PQ with the same seed: the error on `features` only falls.

        Every round takes the rotation that brings the features closest to their codewords (orthogonal Procrustes,
        by an SVD) and then moves the codebooks by one of Lloyd's iterations.

        Args:
            features: [b, w], b at least `codewords`; with fewer than a few times w, the rotation fits their noise.
            subspaces: n, a divisor of w.
            codewords: k of each codebook.
            seed: Draws the starts of the codebooks.
            iterations: Rounds; 0 is plain PQ.

        Raises:
            InputError: As for `ProductQuantizer.fit`.
        """
        points = check_features(features)
        product = ProductQuantizer.fit(points, subspaces=subspaces, codewords=codewords, seed=seed)
        rotation = np.eye(points.shape[1], dtype=np.float32)
        for _ in range(iterations):
            decoded = product.features(product.indices(points @ rotation))
            left, _, right = np.linalg.svd(points.T.astype(np.float64) @ decoded)
            rotation = (left @ right).astype(np.float32)
            product = product.refined(points @ rotation)
        return cls(rotation, product)

    @property
    def table_sizes(self) -> tuple[int, ...]:
        """The alphabet of each of the n indices."""
        return self.product.table_sizes

    @property
    def bits(self) -> int:
        """Bits a feature takes at fixed length."""
        return self.product.bits

    def indices(self, features: ArrayLike) -> np.ndarray:
        """The indices int32 [b, n] of features [b, w]; raises InputError as `ProductQuantizer.indices`."""
        return self.product.indices(check_features(features, self.product.width) @ self.rotation)

    def features(self, indices: ArrayLike) -> np.ndarray:
        """The features float32 [b, w] of indices [b, n]; raises InputError as `ProductQuantizer.features`."""
        return self.product.features(indices) @ self.rotation.T


@dataclass(frozen=True, eq=False)
class ScalarQuantizer(FeatureQuantizer):
    """Learned scalar quantisation: each dimension goes to the nearest of a few levels (papers/1, footnote 1).

    Attributes:
        levels: float32, ascending: [1, k] for all dimensions alike, or [w, k].
        width: w.
    """

    levels: np.ndarray
    width: int

    @classmethod
    def fit(
        cls,
        features: ArrayLike,
        *,
        bits: int,
        per_dimension: bool = False,
        limit: float = 0.5,
        seed: int = 0,
        iterations: int = 200,
    ) -> "ScalarQuantizer":
        """Fit the levels of least squared error by Lloyd (1982) and Max (1960).

        Args:
            features: [b, w]; b at least 2^bits when each dimension has its own levels.
            bits: Per dimension, 1 to 8: k = 2^bits.
            per_dimension: Levels for each dimension; else one set for all, which the paper's footnote describes.
            limit: Levels stay within [-limit, limit].
            seed: Not used, as nothing is drawn; here so that all quantisers are fitted alike.
            iterations: At most.

        Raises:
            InputError: Features that are no finite matrix, too few of them, or bits or limit out of range.
        """
        del seed
        points = check_features(features)
        if not 1 <= bits <= 8:
            raise InputError(f"a scalar quantiser takes 1 to 8 bits a dimension, not {bits}")
        if not limit > 0:
            raise InputError(f"the levels' limit must be above 0, not {limit}")
        _enough(len(points) if per_dimension else points.size, 2**bits)
        columns = points.T if per_dimension else points.reshape(1, -1)
        levels = [_lloyd_max(column, 2**bits, limit, iterations) for column in columns]
        return cls(np.array(levels, np.float32), points.shape[1])

    @property
    def table_sizes(self) -> tuple[int, ...]:
        """The alphabet of each of the w indices."""
        return (self.levels.shape[1],) * self.width

    def indices(self, features: ArrayLike) -> np.ndarray:
        """The nearest level of each dimension, int32 [b, w].

        Raises:
            InputError: Features of another width or not finite.
        """
        points = check_features(features, self.width)
        found = np.zeros(points.shape, np.int32)
        for bound in ((self.levels[:, 1:] + self.levels[:, :-1]) / 2).T:
            found += points > bound
        return found

    def features(self, indices: ArrayLike) -> np.ndarray:
        """The levels of indices [b, w]: float32 [b, w].

        Raises:
            InputError: Indices that do not fit `table_sizes`.
        """
        found = check_indices(indices, self.table_sizes)
        return self.levels[np.arange(self.width) if len(self.levels) > 1 else 0, found]


def _lloyd_max(values: np.ndarray, count: int, limit: float, iterations: int) -> np.ndarray:
    """Levels float64 [count] for values [m]: the better of two starts, spread by rank and spread by value."""
    ordered = np.sort(values.astype(np.float64))
    # A cell's sum is a difference of these, so that an iteration costs a few searches and not a pass over the values.
    sums = np.concatenate([[0.0], ordered.cumsum()])
    distinct = np.unique(ordered)
    ranks = np.quantile(distinct, (np.arange(count) + 0.5) / count, method="nearest")
    best, least = ranks, np.inf
    for levels in (ranks, np.linspace(ordered[0], ordered[-1], count)):
        for _ in range(iterations):
            totals, counts = _cells(ordered, sums, levels)
            # Within the limits the best level of a cell is the mean moved into them, as the error is a parabola.
            moved = np.clip(np.where(counts, totals / np.maximum(counts, 1), levels), -limit, limit)
            if np.array_equal(moved, levels):
                break
            levels = moved
        totals, counts = _cells(ordered, sums, levels)
        error = (counts * levels**2 - 2 * levels * totals).sum()  # plus the sum of squares, the same for both
        if error < least:
            best, least = levels, error
    return best


def _cells(ordered: np.ndarray, sums: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each level, the sum and the number of the values nearest to it: two arrays [count]."""
    inner = np.searchsorted(ordered, (levels[1:] + levels[:-1]) / 2, side="right")
    cuts = np.concatenate([[0], inner, [len(ordered)]])
    return np.diff(sums[cuts]), np.diff(cuts)
