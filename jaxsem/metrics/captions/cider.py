"""CIDEr: how alike a caption and its references are in the n-grams that few other items have.

Source: Vedantam et al., CIDEr: Consensus-based Image Description Evaluation (CVPR 2015), as its authors' code and
pycocoevalcap compute it.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float64

from jaxsem.errors import InputError
from jaxsem.metrics.captions.corpus import Corpus, Words, ngrams, reference_words

ORDERS = (1, 2, 3, 4)
SIGMA = 6.0
_SCALE = 10.0


@dataclasses.dataclass(frozen=True)
class DocumentFrequency:
    """In how many items of a corpus each n-gram occurs.

    Attributes:
        counts: For each n-gram of 1 to 4 words the number of items with a reference that has it.
        items: How many items there are.

    Raises:
        InputError: For no items, or an n-gram that occurs in more items than there are.
    """

    counts: Mapping[Words, int]
    items: int

    def __post_init__(self):
        most = max(self.counts.values(), default=0)
        if self.items < 1 or most > self.items:
            raise InputError(f"n-grams cannot occur in {most} of {self.items} items.")

    @classmethod
    def of(cls, references: Sequence[Sequence[str]]) -> "DocumentFrequency":
        """Counts the n-grams of references: a list of texts for each item.

        Raises:
            InputError: For no items, an item without references, or a reference without words.
        """
        if isinstance(references, str) or len(references) == 0:
            raise InputError(
                f"document frequencies need a list of references for each item, but this is {references!r}."
            )
        return cls.of_words(reference_words(references))

    @classmethod
    def of_words(cls, references: Sequence[Sequence[Words]]) -> "DocumentFrequency":
        """`of` for references that are words already."""
        counts = Counter()
        for texts in references:
            counts.update({gram for text in texts for order in ORDERS for gram in ngrams(text, order)})
        return cls(counts, len(references))

    def weight(self, gram: Words) -> float:
        """The inverse document frequency, ln(items / count); for an n-gram that no reference has, count is 1."""
        return math.log(self.items / max(1, self.counts.get(gram, 0)))


def cider(
    candidates: Sequence[str], references: Sequence[Sequence[str]], *, frequency: DocumentFrequency | None = None
) -> Float64[np.ndarray, " n"]:
    """CIDEr of each caption: 10 times the mean cosine of its tf-idf vectors and those of its references.

    One vector holds the counts of all n-grams of one order times their inverse document frequency; the mean is over the
    orders 1 to 4 and the references. The CIDEr of a corpus is the mean over its captions. Words are not stemmed, in
    agreement with the authors' code and other than in their paper. **What papers call CIDEr since the COCO evaluation
    server is `cider_d`.**

    Args:
        candidates: One caption for each item.
        references: For each item one or more texts.
        frequency: Document frequencies of another, larger corpus; None counts those of `references`. In a corpus of a
            single item no n-gram is rarer than others, so that without given frequencies it scores 0.

    Returns:
        float64 [n], from 0 to 10. A caption of fewer than four words has no 4-grams and stays below 10.

    Raises:
        InputError: If the captions and references do not fit together (see `score_captions`).

    Example:
        >>> texts = [["two red stars and a ring"], ["a blue cross on a grey background"]]
        >>> cider(["two red stars and a ring", "a blue heart"], texts).round(3).tolist()
        [10.0, 1.512]
    """
    corpus = Corpus.of(candidates, references)
    return corpus_cider(corpus, frequency or DocumentFrequency.of_words(corpus.references))


def cider_d(
    candidates: Sequence[str], references: Sequence[Sequence[str]], *, frequency: DocumentFrequency | None = None
) -> Float64[np.ndarray, " n"]:
    """CIDEr-D of each caption: `cider` made hard to game, and what pycocoevalcap and the COCO server report as CIDEr.

    An n-gram of the caption counts at most as often as in the reference, and each cosine is multiplied by
    `exp(-(difference in words)^2 / (2 * 6^2))`.

    Args:
        candidates: As for `cider`.
        references: As for `cider`.
        frequency: As for `cider`.

    Returns:
        float64 [n], from 0 to 10; the value of a corpus is the mean.

    Raises:
        InputError: As for `cider`.
    """
    corpus = Corpus.of(candidates, references)
    return corpus_cider(corpus, frequency or DocumentFrequency.of_words(corpus.references), clipped=True)


def corpus_cider(corpus: Corpus, frequency: DocumentFrequency, *, clipped: bool = False) -> Float64[np.ndarray, " n"]:
    """`cider` of words, or `cider_d` where clipped."""
    similarity = _clipped_similarity if clipped else _similarity
    scores = []
    for words, texts in corpus:
        vectors = _vectors(words, frequency)
        per_text = []
        for text in texts:
            alike = [similarity(*pair) for pair in zip(vectors, _vectors(text, frequency))]
            near = math.exp(-((len(words) - len(text)) ** 2) / (2 * SIGMA**2)) if clipped else 1.0
            per_text.append(near * sum(alike) / len(ORDERS))
        scores.append(_SCALE * sum(per_text) / len(texts))
    return np.array(scores)


Vector = dict[Words, float]


def _vectors(words: Words, frequency: DocumentFrequency) -> list[Vector]:
    return [{gram: count * frequency.weight(gram) for gram, count in ngrams(words, order).items()} for order in ORDERS]


def _similarity(found: Vector, wanted: Vector) -> float:
    return _cosine(sum(value * wanted.get(gram, 0.0) for gram, value in found.items()), found, wanted)


def _clipped_similarity(found: Vector, wanted: Vector) -> float:
    both = found.keys() & wanted.keys()
    return _cosine(sum(min(found[gram], wanted[gram]) * wanted[gram] for gram in sorted(both)), found, wanted)


def _cosine(product: float, found: Vector, wanted: Vector) -> float:
    norms = math.hypot(*found.values()) * math.hypot(*wanted.values())
    return product / norms if norms else 0.0
