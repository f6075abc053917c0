"""METEOR: the words of a caption aligned with those of a reference, scored by how many match, and in how many pieces.

Source: Denkowski and Lavie, Meteor Universal: Language Specific Translation Evaluation for Any Target Language (WMT
2014), and the parameters of Meteor 1.5 for English, tuned to rankings.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence

from jaxsem.metrics.captions.corpus import Corpus, Words
from jaxsem.metrics.captions.porter import stem

ALPHA = 0.85  # how much more recall counts than precision
BETA = 0.2  # shape of the penalty for pieces
GAMMA = 0.6  # size of the penalty for pieces
DELTA = 0.75  # weight of a content word; a function word has the rest
EXACT, STEM = 1.0, 0.6  # weights of matches

_FREQUENT = (
    "the to of and a in that for is on 's it with was as said at he by be from have has are his but an this not i will "
    "they -rrb- -lrb- who their had we which were been more or s its would about new one after you also up when there "
    "than $ all out her people she year two can if last first over other into some what so no time years could 't ' , "
    ". : - ?"
)
FUNCTION_WORDS = frozenset(_FREQUENT.split())
"""The words that make up more than a thousandth of English text, as Meteor 1.5 counted them."""

_BEAM = 40
_STEM_RANK = 0.5


@dataclasses.dataclass(frozen=True)
class _Counts:
    """What a score is computed from; those of a corpus are sums.

    Attributes:
      candidate: Weighted number of words of the caption.
      reference: Weighted number of words of the reference.
      matched_candidate: Weighted number of matched words of the caption.
      matched_reference: Weighted number of matched words of the reference.
      matches: Number of matches.
      chunks: Number of runs of matches that are adjacent in both; 0 where one holds all words.
    """

    candidate: float = 0.0
    reference: float = 0.0
    matched_candidate: float = 0.0
    matched_reference: float = 0.0
    matches: int = 0
    chunks: int = 0

    def __add__(self, other: "_Counts") -> "_Counts":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other))
        return _Counts(*(first + second for first, second in pairs))

    @property
    def score(self) -> float:
        if not self.matches:
            return 0.0
        precision, recall = self.matched_candidate / self.candidate, self.matched_reference / self.reference
        mean = precision * recall / (ALPHA * precision + (1 - ALPHA) * recall)
        return mean * (1 - GAMMA * (self.chunks / self.matches) ** BETA)


def meteor(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """A METEOR of exact and stem matches, of a corpus.

    Words are aligned one to one, where they are equal or have the same Porter2 stem, so that as many as possible are
    covered, by as few chunks as possible: runs that are adjacent in both texts. With P and R the weighted shares of
    matched words,

        `METEOR = P R / (0.85 P + 0.15 R) (1 - 0.6 (chunks / matches)^0.2)`

    Matches weigh 1 if exact and 0.6 if by stem; content words weigh 0.75, function words 0.25; there is no penalty
    where all words of both match in one chunk. Of several references the one that scores best counts, the first of
    equally good ones. As in Meteor, the counts of all captions are added up before the formula is applied: it is a
    measure of the corpus, not the mean over its captions.

    **Left out of Meteor 1.5:** matches of synonyms (WordNet) and of paraphrases (a table of some 60 MB), so values are
    lower than those of papers and must not be set beside them; and what its normaliser does to punctuation, which
    `tokenize` has removed. With these two modules off, Meteor 1.5 gives the same values for sentences. For paragraphs,
    where many words are equal, either keeps 40 alignments at a time and may miss the best: at 80 words values differ by
    up to 0.01.

    Args:
        candidates: One caption for each item.
        references: For each item one or more texts.

    Returns:
        A number in [0, 1].

    Raises:
        InputError: If the two do not fit together (see `score_captions`).

    Example:
        >>> round(meteor(["a red star and a ring"], [["a red star and a blue ring"]]), 4)
        0.4275
    """
    return corpus_meteor(Corpus.of(candidates, references))


def corpus_meteor(corpus: Corpus) -> float:
    """`meteor` of words."""
    total = _Counts()
    for words, texts in corpus:
        words = _parts(words)
        total += max((_count(words, _parts(text)) for text in texts), key=lambda counts: counts.score)
    return total.score


def _parts(words: Words) -> Words:
    """Meteor's own normalisation: compounds apart, no dots in "u.s.", "'s" as "'" and "s", "n't" as "n" and "'t"."""
    text = re.sub(r"[^\w\s.'`,-]", r" \g<0> ", " ".join(words))
    text = re.sub(r"(?<=[\w.])-(?=\w)", " ", text)
    text = re.sub(r"(?<![^\W_])'(?=[^\W\d_])", "' ", text)
    text = re.sub(r"(?<=[^\W\d_])'(?=[^\W\d_])", " '", text)
    return tuple(
        word.replace(".", "") if re.fullmatch(r"\w*[^\W\d_]\w*\..*\.", word) else word for word in text.split()
    )


def _count(words: Words, text: Words) -> _Counts:
    matches = _align(words, text)
    weights = [EXACT if words[first] == text[second] else STEM for first, second in matches]
    # A first match begins a chunk, as does every one that does not follow its predecessor in both texts.
    follows = [(a[0] + 1, a[1] + 1) == b for a, b in itertools.pairwise(matches)]
    chunks = len(matches) - sum(follows)
    complete = len(matches) == len(words) == len(text) and chunks == 1
    return _Counts(
        candidate=sum(map(_weight, words)),
        reference=sum(map(_weight, text)),
        matched_candidate=sum(weight * _weight(words[first]) for weight, (first, _) in zip(weights, matches)),
        matched_reference=sum(weight * _weight(text[second]) for weight, (_, second) in zip(weights, matches)),
        matches=len(matches),
        chunks=0 if complete else chunks,
    )


def _weight(word: str) -> float:
    return 1 - DELTA if word in FUNCTION_WORDS else DELTA


@dataclasses.dataclass(frozen=True)
class _Path:
    """An alignment of the first words of a reference.

    Attributes:
      used: The caption's words that are taken, as bits.
      last: The caption's word that the reference's last one is aligned with, or None.
      covered: Number of matches, those by stem for half.
      chunks: Number of chunks.
      previous: The path before its last match.
      match: Its last match: positions in the caption and in the reference.
    """

    used: int = 0
    last: int | None = None
    covered: float = 0.0
    chunks: int = 0
    previous: "_Path | None" = None
    match: tuple[int, int] | None = None

    @property
    def rank(self) -> tuple[float, int]:
        return -self.covered, self.chunks

    def skip(self) -> "_Path":
        if self.last is None:
            return self
        return _Path(self.used, None, self.covered, self.chunks, self.previous, self.match)

    def take(self, first: int, second: int, covers: float) -> "_Path":
        begins = self.last is None or first != self.last + 1
        return _Path(self.used | 1 << first, first, self.covered + covers, self.chunks + begins, self, (first, second))


def _align(words: Words, text: Words) -> list[tuple[int, int]]:
    """The matches of the best alignment: positions in the caption and in the reference, in the order of the latter."""
    partners = [[first for first, word in enumerate(words) if _alike(word, other)] for other in text]
    rivals = [sum(first in group for group in partners) for first in range(len(words))]
    paths = [_Path()]
    for second, group in enumerate(partners):
        certain = len(group) == 1 and rivals[group[0]] == 1
        found: dict[tuple[int, int | None], _Path] = {}
        for path in paths:
            ways = [] if certain else [path.skip()]
            for first in group:
                if not path.used >> first & 1:
                    ways.append(path.take(first, second, 1.0 if words[first] == text[second] else _STEM_RANK))
            for way in ways:
                # Paths that may go on in the same ways: only the better one can be part of the best alignment.
                state = way.used, way.last
                if state not in found or way.rank < found[state].rank:
                    found[state] = way
        paths = sorted(found.values(), key=lambda path: path.rank)[:_BEAM]
    return _matches(paths[0])


def _matches(path: _Path) -> list[tuple[int, int]]:
    matches = []
    while path is not None and path.match is not None:
        matches.append(path.match)
        path = path.previous
    return matches[::-1]


def _alike(word: str, other: str) -> bool:
    return word == other or _stem(word) == _stem(other)


_stem = functools.lru_cache(maxsize=4096)(stem)
