"""How well captions agree with what people wrote: BLEU, METEOR, ROUGE-L, CIDEr and CIDEr-D, without Java.

    score_captions(["a red star and a ring"], [["a red star and a blue ring", "two shapes"]])
    # {"bleu_1": ..., "bleu_4": ..., "meteor": ..., "rouge_l": ..., "cider": ..., "cider_d": ...}

Values are those of pycocoevalcap 1.2, the code of the COCO caption evaluation, but for METEOR, which here knows no
synonyms and paraphrases, and for texts that `tokenize` splits otherwise. What that evaluation prints as CIDEr is
`cider_d`.
"""

from collections.abc import Sequence

from jaxsem.metrics.captions.bleu import bleu, corpus_bleu
from jaxsem.metrics.captions.cider import DocumentFrequency, cider, cider_d, corpus_cider
from jaxsem.metrics.captions.corpus import Corpus
from jaxsem.metrics.captions.meteor import corpus_meteor, meteor
from jaxsem.metrics.captions.porter import stem
from jaxsem.metrics.captions.rouge import corpus_rouge_l, rouge_l
from jaxsem.metrics.captions.tokenizer import tokenize

__all__ = [
    "DocumentFrequency",
    "bleu",
    "cider",
    "cider_d",
    "meteor",
    "rouge_l",
    "score_captions",
    "stem",
    "tokenize",
]


def score_captions(
    candidates: Sequence[str], references: Sequence[Sequence[str]], *, frequency: DocumentFrequency | None = None
) -> dict[str, float]:
    """All measures of a corpus of captions; the functions named say what each is.

    Args:
        candidates: One caption for each item; one without words scores 0.
        references: For each item one or more texts.
        frequency: Document frequencies for CIDEr; None counts those of `references`.

    Returns:
        "bleu_1" to "bleu_4", "meteor" and "rouge_l" in [0, 1], "cider" and "cider_d" from 0 to 10.

    Raises:
        InputError: For no items, unequal numbers of captions and references, an item without references, a reference
            without words, or a text where a list of texts is expected.

    Example:
        >>> scores = score_captions(["a red star", "two blue rings"], [["a star"], ["two rings", "two blue rings"]])
        >>> {name: round(value, 3) for name, value in scores.items() if name in ("bleu_1", "rouge_l", "cider_d")}
        {'bleu_1': 0.833, 'rouge_l': 0.915, 'cider_d': 3.385}
    """
    corpus = Corpus.of(candidates, references)
    frequency = frequency or DocumentFrequency.of_words(corpus.references)
    return {
        **{f"bleu_{order}": score for order, score in enumerate(corpus_bleu(corpus), 1)},
        "meteor": corpus_meteor(corpus),
        "rouge_l": float(corpus_rouge_l(corpus).mean()),
        "cider": float(corpus_cider(corpus, frequency).mean()),
        "cider_d": float(corpus_cider(corpus, frequency, clipped=True).mean()),
    }
