"""What features are still good for: zero-shot classes, retrieval, and how a decoded feature compares with its original.

    found, chances = classify(features, model.class_features(names))
    accuracy(decoded, class_features, labels)                        # the share of features with the right class
    retrieval_recall(images, texts, image_of_text)                   # {"image_to_text@1": 0.83, ...}

Functions of NumPy arrays, float16 or float32, also memory-mapped ones. Similarities are made block by block, so that memory does
not grow with their number. Only directions count, features may have any length; zeros resemble nothing. Of what is equally near,
the first wins, as with `argmax`.

Source: the measures of Shen et al., Compression beyond pixels (papers/1, section 4), and of Radford et al., Learning Transferable
Visual Models From Natural Language Supervision, for prompts and retrieval.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

from jaxsem.errors import InputError
from jaxsem.systems.features import check_features

_SCORES = 1 << 24  # similarities that are held at once


def classify(features: ArrayLike, class_features: ArrayLike, scale: float = 100.0) -> tuple[np.ndarray, np.ndarray]:
    """The class whose feature is nearest, and the probability of each.

    Args:
      features: [b, w].
      class_features: [c, w], such as `ClipModel.class_features` gives.
      scale: What cosines are multiplied with before the softmax; OpenAI's models learnt 100.

    Returns:
      Indices int32 [b], and probabilities float32 [b, c].

    Raises:
      InputError: Arrays that are no features of one width.
    """
    classes = _all(class_features, "class")
    found = np.empty(len(features), np.int32)
    chances = np.empty((len(features), len(classes)), np.float32)
    for rows, block in _blocks(features, classes):
        scores = block @ classes.T
        found[rows] = scores.argmax(axis=1)
        powers = np.exp(scale * (scores - scores.max(axis=1, keepdims=True)))
        chances[rows] = powers / powers.sum(axis=1, keepdims=True)
    return found, chances


def accuracy(features: ArrayLike, class_features: ArrayLike, labels: ArrayLike, top: int = 1) -> float:
    """The share of features [b, w] whose label [b] is among the `top` classes [c, w] nearest to them.

    Raises:
      InputError: Arrays that are no features of one width, no feature, a label that is no class, or `top` below 1.
    """
    classes, labels = _all(class_features, "class"), np.asarray(labels)
    _check_places(labels, len(features), len(classes), "feature", "class")
    if top < 1:
        raise InputError(f"the label is looked for among at least 1 class, not {top}")
    right = 0
    for rows, block in _blocks(features, classes):
        right += int((_ranks(block @ classes.T, labels[rows]) < top).sum())
    return right / len(labels)


def retrieval_recall(
    images: ArrayLike, texts: ArrayLike, image_of_text: ArrayLike, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """How often the right one is among the k nearest, from image to text and from text to image.

    Args:
      images: [b, w].
      texts: [t, w]; an image may have several, of which one has to be found, or none: then others must pass it by.
      image_of_text: The image of each text [t].
      ks: Each at least 1.

    Returns:
      For every k, "image_to_text@k" over the images that have texts, and "text_to_image@k" over the texts.

    Raises:
      InputError: Arrays that are no features of one width, no text, a text whose image is not there, or a k below 1.
    """
    owners = np.asarray(image_of_text)
    pictures, words = _all(images, "image"), _all(texts, "text")
    _check_places(owners, len(words), len(pictures), "text", "image")
    if min(ks, default=0) < 1:
        raise InputError(f"recall is taken at one k or several, each at least 1, not at {list(ks)}")
    text_ranks = [_ranks(block @ pictures.T, owners[rows]) for rows, block in _blocks(words, pictures)]
    image_ranks = []
    for rows, block in _blocks(pictures, words):
        scores = block @ words.T
        own = np.arange(rows.start, rows.start + len(block))[:, None] == owners
        nearest = np.where(own, scores, -np.inf).argmax(axis=1)
        image_ranks.append(_ranks(scores, nearest)[own.any(axis=1)])
    ranks = {"image_to_text": np.concatenate(image_ranks), "text_to_image": np.concatenate(text_ranks)}
    return {f"{way}@{k}": float((found < k).mean()) for way, found in ranks.items() for k in ks}


def cosine(features: ArrayLike, decoded: ArrayLike, quantiles: Sequence[float] = (0.05, 0.5, 0.95)) -> dict[str, float]:
    """Cosine similarity of features [b, w] and what was decoded of them [b, w].

    Returns:
      "mean", and "q05" and so on for each quantile, in hundredths.

    Raises:
      InputError: Arrays that are no features of one shape, no feature, or a quantile outside 0 to 1.
    """
    _check_pairs(features, decoded)
    if not all(0 <= q <= 1 for q in quantiles):
        raise InputError(f"quantiles lie between 0 and 1, not at {list(quantiles)}")
    found = [(x * _unit(decoded, rows)).sum(axis=1) for rows, x in _blocks(features)]
    values = np.concatenate(found)
    return {
        "mean": float(values.mean(dtype=np.float64)),
        **{f"q{round(100 * q):02d}": float(np.quantile(values, q)) for q in quantiles},
    }


def neighbour_agreement(decoded: ArrayLike, originals: ArrayLike, reference: ArrayLike, k: int = 10) -> float:
    """The share of the k nearest of `reference` [r, w] to an original that are among the k nearest to its decoded feature too.

    Args:
      decoded: [b, w].
      originals: [b, w].
      reference: [r, w], r at least k.
      k: At least 1.

    Raises:
      InputError: Arrays that are no features of these shapes, no feature, or another k.
    """
    _check_pairs(originals, decoded)
    others = _all(reference, "reference")
    if not 1 <= k <= len(others):
        raise InputError(f"the nearest of {len(others)} reference features are 1 to {len(others)}, not {k}")
    kept = 0
    for rows, block in _blocks(originals, others):
        near, still = (_nearest(x @ others.T, k) for x in (block, _unit(decoded, rows)))
        kept += int((near & still).sum())
    return kept / (k * len(originals))


# -- classes --------------------------------------------------------------------------------------------------------------


def class_split(names: Sequence[str], train: int = 800, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Divides classes into those to train on and those held out, as papers/1 divides ImageNet's 1000 into 800 and 200.

    The division is that of SHA-256, the same with every version of every library; it depends on names and not on their order.

    Args:
      names: Of the classes; two that are called the same count as two.
      train: How many to train on, at least 1 and not all.
      seed: Another one divides otherwise.

    Returns:
      Numbers of classes int64 [train] and [c - train], each ascending.

    Raises:
      InputError: None would be left on one side.
    """
    if isinstance(names, str) or not 1 <= train < len(names):
        raise InputError(f"of {len(names)} classes, 1 to {len(names) - 1} are trained on, not {train}")
    order = sorted(range(len(names)), key=lambda i: (hashlib.sha256(f"{seed}:{names[i]}".encode()).digest(), i))
    return np.sort(order[:train]), np.sort(order[train:])


def of_classes(labels: ArrayLike, classes: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The features that belong to some classes, and their labels among these alone.

    Args:
      labels: The class of every feature [b].
      classes: Numbers of the classes wanted, such as one side of `class_split`; `class_features[classes]` goes with the result.

    Returns:
      Rows int64 [n], ascending, and labels int64 [n] in `range(len(classes))`.
    """
    labels, classes = np.asarray(labels), np.asarray(classes)
    rows = np.flatnonzero(np.isin(labels, classes))
    order = np.argsort(classes)
    return rows, order[np.searchsorted(classes, labels[rows], sorter=order)]


# -- pieces ---------------------------------------------------------------------------------------------------------------


def _blocks(features: ArrayLike, others: np.ndarray | None = None) -> Iterator[tuple[slice, np.ndarray]]:
    """Unit features, so many at a time that their similarities to `others` [n, w] fit into memory, and which they are.

    Raises:
      InputError: No features, or of another width than the others.
    """
    array = np.asarray(features)
    if array.ndim != 2 or (others is not None and array.shape[1] != others.shape[1]):
        width = "width" if others is None else others.shape[1]
        raise InputError(f"features to be compared with these are [count, {width}], not of shape {array.shape}")
    size = max(1, _SCORES // max(array.shape[1], 1 if others is None else len(others)))
    for start in range(0, len(array), size):
        rows = slice(start, start + size)
        yield rows, _unit(array, rows)


def _unit(features: ArrayLike, rows: slice) -> np.ndarray:
    """Some rows, float32 and of length 1; zeros stay zeros."""
    try:
        block = check_features(np.asarray(features)[rows])
    except InputError as error:
        raise InputError(f"from feature {rows.start} on: {error}") from error
    return block / np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-12)


def _all(features: ArrayLike, what: str) -> np.ndarray:
    """All of what is compared with, as unit features."""
    array = np.asarray(features)
    if not len(array):
        raise InputError(f"there is no {what} to compare with: give at least one")
    return _unit(array, slice(0, len(array)))


def _ranks(scores: np.ndarray, places: np.ndarray) -> np.ndarray:
    """How many columns of each row [b, n] come before the one in its place [b], by falling score and then by number."""
    own = np.take_along_axis(scores, places[:, None], axis=1)
    before = np.arange(scores.shape[1]) < places[:, None]
    return ((scores > own) | ((scores == own) & before)).sum(axis=1)


def _nearest(scores: np.ndarray, k: int) -> np.ndarray:
    """Which columns of each row are its k highest, the first of equal ones: bool [b, n]."""
    least = np.partition(scores, -k, axis=1)[:, -k, None]
    above, equal = scores > least, scores == least
    return above | (equal & (equal.cumsum(axis=1) <= k - above.sum(axis=1, keepdims=True)))


def _check_places(places: np.ndarray, count: int, most: int, what: str, target: str) -> None:
    if places.shape != (count,) or not count or places.dtype.kind not in "iu":
        raise InputError(
            f"{count} {what}s go with as many {target} numbers, at least one, not with {places.dtype} of shape {places.shape}"
        )
    if wrong := np.flatnonzero((places < 0) | (places >= most)).tolist():
        raise InputError(
            f"{what} {wrong[0]} belongs to {target} {places[wrong[0]]}, and there are 0 to {most - 1}: leave it out"
        )


def _check_pairs(originals: ArrayLike, decoded: ArrayLike) -> None:
    shapes = np.shape(originals), np.shape(decoded)
    if shapes[0] != shapes[1] or not len(originals):
        raise InputError(f"originals and decoded features come in pairs, not of shapes {shapes[0]} and {shapes[1]}")
