"""Captions and their references as words, checked once for all measures."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

from jaxsem.errors import InputError
from jaxsem.metrics.captions.tokenizer import tokenize

Words = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What is scored.

    Attributes:
      candidates: The words of each caption; a caption may have none.
      references: For each caption the words of one or more texts that people wrote.
    """

    candidates: tuple[Words, ...]
    references: tuple[tuple[Words, ...], ...]

    @classmethod
    def of(cls, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> "Corpus":
        """Splits texts into words.

        Args:
          candidates: One caption for each item.
          references: The item's references, in the same order.

        Raises:
          InputError: No items, unequal numbers, an item without references, a reference without words, or a text in
            place of a list of texts.
        """
        check_texts(candidates, "candidates")
        if isinstance(references, str):
            raise InputError(f"references are one list of texts for each caption, but this is the text {references!r}.")
        if len(candidates) != len(references):
            raise InputError(f"there are {len(candidates)} captions, but references for {len(references)}.")
        return cls(tuple(map(words, candidates)), reference_words(references))

    def __iter__(self):
        return zip(self.candidates, self.references)


def words(text: str) -> Words:
    """`tokenize` as a tuple, so that n-grams can be counted."""
    return tuple(tokenize(text))


def reference_words(references: Sequence[Sequence[str]]) -> tuple[tuple[Words, ...], ...]:
    """The words of all references.

    Raises:
      InputError: As for `Corpus.of`.
    """
    found = []
    for number, texts in enumerate(references):
        check_texts(texts, f"references of item {number}")
        found.append(tuple(map(words, texts)))
        if not all(found[-1]):
            raise InputError(f"a reference of item {number} has no words: {list(texts)!r}; leave it out.")
    return tuple(found)


def check_texts(texts: Sequence[str], what: str) -> None:
    """Raises InputError unless there are texts, in a list."""
    if isinstance(texts, str):
        raise InputError(f"the {what} must be a list of texts, but are the one text {texts!r}.")
    if len(texts) == 0:
        raise InputError(f"there are no {what}: give at least one text.")
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"the {what} must be texts, but one is {text!r}.")


def ngrams(sentence: Words, order: int) -> Counter[Words]:
    """How often each run of `order` words occurs."""
    return Counter(sentence[start : start + order] for start in range(len(sentence) - order + 1))
