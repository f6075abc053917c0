"""BLEU: the share of a corpus' n-grams that occur in a reference, with a penalty for captions that are too short.

Source: Papineni et al., BLEU: a Method for Automatic Evaluation of Machine Translation (ACL 2002), as pycocoevalcap
computes it.
"""

import math
from collections import Counter
from collections.abc import Sequence

from jaxsem.metrics.captions.corpus import Corpus, ngrams

ORDERS = (1, 2, 3, 4)

# pycocoevalcap's guards against 0 / 0; they also decide what a corpus without any common n-gram scores.
_TINY, _SMALL = 1e-15, 1e-9


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, float, float, float]:
    """BLEU-1 to BLEU-4 of a corpus.

    `BLEU-N = min(1, exp(1 - r / c)) (p_1 ... p_N)^(1/N)`, with p_n the share of all n-grams of all captions that are
    found in a reference of their item, each at most as often as in the reference where it is most frequent; c the
    number of words of all captions and r that of the references closest in length, the shorter of two equally close
    ones.

    It is a measure of the corpus, not the mean over its captions. There is no smoothing beyond pycocoevalcap's guards
    of 1e-15 and 1e-9 against division by zero, by which a corpus without any common 4-gram has a BLEU-4 of some 1e-4
    instead of 0.

    Args:
        candidates: One caption for each item.
        references: For each item one or more texts.

    Returns:
        BLEU-1, BLEU-2, BLEU-3 and BLEU-4, in [0, 1].

    Raises:
        InputError: If the two do not fit together (see `score_captions`).

    Example:
        >>> [round(value, 4) for value in bleu(["a red star and a ring"], [["a red star and a blue ring"]])]
        [0.8465, 0.7571, 0.714, 0.6732]
    """
    return corpus_bleu(Corpus.of(candidates, references))


def corpus_bleu(corpus: Corpus) -> tuple[float, float, float, float]:
    """`bleu` of words."""
    length = sum(map(len, corpus.candidates))
    closest = sum(_closest(len(words), [len(text) for text in texts]) for words, texts in corpus)
    ratio = (length + _TINY) / (closest + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for order in ORDERS:
        product *= _precision(corpus, order)
        scores.append(brevity * product ** (1 / order))
    return tuple(scores)


def _closest(length: int, lengths: list[int]) -> int:
    return min(lengths, key=lambda other: (abs(other - length), other))


def _precision(corpus: Corpus, order: int) -> float:
    matches = total = 0
    for words, texts in corpus:
        found, most = ngrams(words, order), Counter()
        for text in texts:
            most |= ngrams(text, order)
        matches += (found & most).total()
        total += found.total()
    return (matches + _TINY) / (total + _SMALL)
