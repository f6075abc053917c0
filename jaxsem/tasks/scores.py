"""From what a model said to scores: reading answers, and counting."""

import math
import re
from collections.abc import Mapping, Sequence

from jaxsem.metrics.captions.bleu import corpus_bleu
from jaxsem.metrics.captions.cider import DocumentFrequency, corpus_cider
from jaxsem.metrics.captions.corpus import Corpus
from jaxsem.tasks.examples import LETTERS

Scores = dict[str, float | None]

_Z95 = 1.959963984540054  # the normal quantile of 0.975
_ALONE = re.compile(r"[(\[]?([A-Za-z])[)\].:,;]*")
_FIRST = re.compile(r"(?:[(\[]([A-Za-z])[)\]]|([A-Za-z])[.):])(?=\s|$)")
_NAMED = re.compile(r"\b(?i:answer|option|choice)(?i: is)?\s*:?\s*[(\[]?([A-Z])(?=[)\].,:;]|\s*$)")


def read_option(text: str, options: Sequence[str]) -> int | None:
    """Which option an answer means: "B", "(b)", "B. blue", "The answer is B.", or the option's own words.

    An article is no letter: "a red star" names no option but the one of these words.

    Returns:
        Its index, or None where the answer says none.

    Example:
        >>> [read_option(text, ("red", "blue")) for text in ("B", "(a) red", "the answer is B.", "Blue.", "C", "hm")]
        [1, 0, 1, 1, None, None]
    """
    text = text.strip()
    if match := _ALONE.fullmatch(text) or _FIRST.match(text) or _NAMED.search(text):
        place = LETTERS.index(next(filter(None, match.groups())).upper())
        return place if place < len(options) else None
    said = _words(text)
    return next((place for place, option in enumerate(options) if said == _words(option) != ""), None)


def read_label(text: str, labels: Sequence[str]) -> int | None:
    """Which label an answer names, in whole words: None for none, or several that are not part of each other.

    Example:
        >>> read_label("This is a hot dog.", ("dog", "hot dog", "cat"))
        1
    """
    said, names = f" {_words(text)} ", [f" {_words(label)} " for label in labels]
    hits = [place for place, name in enumerate(names) if name.strip() and name in said]
    hits = [place for place in hits if not any(names[place] != names[o] and names[place] in names[o] for o in hits)]
    return hits[0] if len(hits) == 1 else None


def read_yes_no(text: str) -> str:
    """POPE's rule, as LLaVA's `eval_pope.py` applies it: "no" if "no" or "not" stands in the first sentence, else "yes".

    Example:
        >>> read_yes_no("No, there is none."), read_yes_no("There is not. Yes."), read_yes_no("Yes. Or no.")
        ('no', 'no', 'yes')
    """
    first = text.partition(".")[0].lower()
    return "no" if {"no", "not"} & set(re.findall(r"[^\W_]+", first)) else "yes"


def says_yes_or_no(text: str) -> bool:
    """Whether one of the words "yes", "no" and "not" stands in an answer at all."""
    return not {"yes", "no", "not"}.isdisjoint(_words(text).split())


def caption_scores(said: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """CIDEr-D (0 to 10, what the COCO evaluation calls CIDEr) and BLEU-4 of captions."""
    corpus = Corpus.of(said, references)
    frequency = DocumentFrequency.of_words(corpus.references)
    return {"cider_d": float(corpus_cider(corpus, frequency, clipped=True).mean()), "bleu_4": corpus_bleu(corpus)[3]}


def yes_no_scores(said: Sequence[bool], true: Sequence[bool]) -> Scores:
    """Accuracy, precision, recall, F1 and the share of yes; "yes" is what is found.

    Returns:
        Shares in [0, 1]; None where there is nothing to divide by, as the precision of who never says yes.
    """
    both = sum(one and other for one, other in zip(said, true, strict=True))
    return {
        "accuracy": mean([one == other for one, other in zip(said, true)]),
        "precision": _ratio(both, sum(said)),
        "recall": _ratio(both, sum(true)),
        "f1": _ratio(2 * both, sum(said) + sum(true)),
        "yes_share": mean(said),
    }


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share by Wilson's score, which stays within [0, 1] and is sound for few trials.

    Args:
        right: How many of the trials succeeded.
        count: How many there were, at least 1.

    Source: Wilson, Probable inference, the law of succession, and statistical inference (1927).

    Example:
        >>> [round(bound, 3) for bound in wilson(8, 10)]
        [0.49, 0.943]
    """
    share, z2 = right / count, _Z95**2 / count
    middle = (share + z2 / 2) / (1 + z2)
    reach = math.sqrt(share * (1 - share) * z2 + z2**2 / 4) / (1 + z2)
    return (middle - reach if right else 0.0), (middle + reach if right < count else 1.0)


def mean(values: Sequence[float]) -> float:
    """The mean of one or more values."""
    return math.fsum(values) / len(values)


def by_category(categories: Sequence[str]) -> Mapping[str, list[int]]:
    """The places of each category that has a name, in order of first appearance."""
    found: dict[str, list[int]] = {}
    for place, category in enumerate(categories):
        if category:
            found.setdefault(category, []).append(place)
    return found


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _words(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", text.lower()))
