"""What a compressed feature is good for: classes, captions, and finding what a phrase refers to.

    codec = jaxsem.load("pqvae-mini")
    files = jaxsem.compress(codec, images)                          # a .jsem of some tens of bytes each
    features = jaxsem.read_features(codec, files)                   # unit, as CLIP's own
    jaxsem.classify(codec, features, ["red star", "blue ring"])     # [(label, probability), ...] for each
    jaxsem.caption(codec, features)                                 # one sentence each
    jaxsem.refer(codec, image, "the small green cross")             # mask, box and score of the best region

Source: Shen et al., Compression beyond pixels, sections 4.2 and 4.6.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsem.container import unpack
from jaxsem.data.images import pixels_from
from jaxsem.errors import InputError
from jaxsem.pipeline import check_weights
from jaxsem.systems import clipcap, zero_shot
from jaxsem.systems.feature_codec import FeatureCodec, features_of
from jaxsem.systems.features import check_features
from jaxsem.systems.regions import region_pictures


def read_features(codec: FeatureCodec, files: Sequence[bytes]) -> np.ndarray:
    """Unit features float32 [n, width] of `.jsem` files; an archive gives all its features, in order.

    Raises:
      FormatError: A file is damaged, foreign, or holds images.
      WeightsError: A file was made with other weights.
    """
    items = []
    for data in files:
        file = unpack(data)
        check_weights(codec, file)
        items.extend(file.items)
    return features_of(codec, items)


def classify(
    codec: FeatureCodec, features: np.ndarray, labels: Sequence[str], templates: Sequence[str] | None = None
) -> list[list[tuple[str, float]]]:
    """The labels of each feature with their probabilities, likeliest first (zero-shot classification).

    Args:
      codec: The codec, for its CLIP.
      features: [b, width], decoded or CLIP's own.
      labels: Class names, at least one.
      templates: Prompts with `{}` for the name; by default those of the codec's CLIP.

    Raises:
      InputError: Features that are none, no label, an empty one or one twice, or a word that CLIP does not know.
    """
    features = check_features(features, codec.clip.width)
    labels = list(labels)
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise InputError(f"the label {twice[0]!r} is given twice: give each once")
    _, shares = zero_shot.classify(features, codec.clip.class_features(labels, templates))
    orders = np.argsort(-shares, axis=1, kind="stable")
    return [[(labels[i], float(row[i])) for i in order] for row, order in zip(shares, orders, strict=True)]


def caption(codec: FeatureCodec, features: np.ndarray, beams: int = 1) -> list[str]:
    """A sentence for each feature.

    Args:
      codec: The codec, for its captioner.
      features: [b, width], decoded or CLIP's own.
      beams: 1 takes the likeliest word at every place, more search so many captions in parallel.

    Raises:
      InputError: Features that are none, no beam, or the codec has no captioner.
    """
    writer = codec.captioner
    if writer is None:
        raise InputError(f"{codec.name} has no captioner: load one with jaxsem.systems.feature_files.load_captioner")
    if beams < 1:
        raise InputError(f"captions are searched with at least 1 beam, not {beams}")
    features = check_features(features, codec.clip.width)
    found = clipcap.caption(
        writer.module,
        writer.params,
        jnp.asarray(features),
        "greedy" if beams == 1 else "beam",
        max_new_tokens=writer.longest,
        stop=writer.stop,
        beams=beams,
    )
    return [writer.tokenizer.decode(row[:n]) for row, n in zip(np.asarray(found.tokens), np.asarray(found.lengths))]


@dataclass(frozen=True, eq=False)
class Referred:
    """The region that a phrase refers to.

    Attributes:
      mask: bool [h, w].
      box: Left, top, right and bottom in pixels, the last two just outside.
      score: Cosine similarity of phrase and region.
      scores: That of all regions, float32 [r].
      region: Which one it is.
      bits: Of the compressed features of all regions; 0 where they were not compressed.
    """

    mask: np.ndarray
    box: tuple[int, int, int, int]
    score: float
    scores: np.ndarray
    region: int
    bits: int


def refer(
    codec: FeatureCodec, image: Any, phrase: str, masks: np.ndarray, *, compress: bool = True, in_place: bool = False
) -> Referred:
    """Finds the region that a phrase refers to, from the regions' compressed features alone.

    Args:
      codec: The codec, at its quality.
      image: What `jaxsem.data.images.pixels_from` takes.
      phrase: "the small green cross".
      masks: Candidate regions, bool [r, h, w], of a segmenter, `regions.propose` or `regions.from_boxes`.
      compress: Whether features pass through the codec; else CLIP's own decide, for comparison.
      in_place: Whether regions are encoded where they are, on black, so that size and place count, and not as crops, as
        the paper does.

    Raises:
      InputError: An empty phrase or one that does not fit CLIP's context, no region, or masks that do not fit the image.
    """
    pixels = pixels_from(image)
    text = codec.clip.encode_texts([phrase])[0]
    features = codec.clip.encode_images(region_pictures(pixels, masks, in_place))
    packets = codec.encode(features) if compress else []
    if compress:
        features = codec.decode(packets)
    scores = features @ text
    best = int(scores.argmax())
    rows, columns = (np.flatnonzero(masks[best].any(axis=axis)) for axis in (1, 0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return Referred(masks[best], box, float(scores[best]), scores, best, 8 * sum(map(len, packets)))
