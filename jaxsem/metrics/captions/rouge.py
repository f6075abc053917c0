"""ROUGE-L: the longest common subsequence of a caption and its references.

Source: Lin, ROUGE: A Package for Automatic Evaluation of Summaries (2004), as pycocoevalcap computes it.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from jaxsem.metrics.captions.corpus import Corpus, Words

BETA = 1.2  # how much more recall counts than precision


def rouge_l(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Float64[np.ndarray, " n"]:
    """ROUGE-L of each caption, `(1 + b^2) P R / (R + b^2 P)` with b = 1.2.

    P and R are the length of the longest common subsequence as a share of the caption's and of the reference's words,
    each the largest over the references, which need not be the same one for both.

    Args:
        candidates: One caption for each item.
        references: For each item one or more texts.

    Returns:
        float64 [n], in [0, 1]; the ROUGE-L of a corpus is the mean. A caption without words has 0.

    Raises:
        InputError: If the two do not fit together (see `score_captions`).

    Example:
        >>> rouge_l(["a red star and a ring"], [["a red star and a blue ring"]]).round(4).tolist()
        [0.9104]
    """
    return corpus_rouge_l(Corpus.of(candidates, references))


def corpus_rouge_l(corpus: Corpus) -> Float64[np.ndarray, " n"]:
    """`rouge_l` of words."""
    scores = []
    for words, texts in corpus:
        common = [_common(words, text) for text in texts]
        precision = max(common) / max(len(words), 1)
        recall = max(length / len(text) for length, text in zip(common, texts))
        weighted = recall + BETA**2 * precision
        scores.append((1 + BETA**2) * precision * recall / weighted if weighted else 0.0)
    return np.array(scores)


def _common(first: Words, second: Words) -> int:
    """The length of the longest common subsequence, one row of the table at a time."""
    row = [0] * (len(second) + 1)
    for word in first:
        above_left = 0
        for place, other in enumerate(second, 1):
            above = row[place]
            row[place] = above_left + 1 if word == other else max(above, row[place - 1])
            above_left = above
    return row[-1]
