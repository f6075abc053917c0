"""Whether captions of `jaxsem.data.scenes` are true: what they name is looked up in the scene, word by word.

Captions are read with the vocabulary of the scenes. A mention is a noun (one of SHAPES, or "object") with the words
before it that say how many, which (leftmost, largest, ...), how large and what colour; a claim is two mentions with a
relation between them:

    two small red stars and a blue ring; the ring is behind the small star
    mentions  (2, small red star) (blue ring) (ring) (small star)        claims  ring behind small star

Background, places ("at the top left") and words outside this vocabulary are not judged.
"""

import dataclasses
import re
from collections.abc import Sequence

from jaxsem.data.scenes import COLOURS, SHAPES, SIZES, Description, Scene
from jaxsem.data.scenes.phrases import RELATIONS, SUPERLATIVES, View
from jaxsem.errors import InputError

Pair = tuple[str, str]

_NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}
_COUNT = f"(?:(?P<count>{'|'.join(_NUMBERS)}|[0-9]{{1,9}}) )?"
_SUPERLATIVE = f"(?:(?P<superlative>{'|'.join(SUPERLATIVES)}) )?"
_MENTION = re.compile(
    rf"\b{_COUNT}{_SUPERLATIVE}(?P<attributes>(?:(?:{'|'.join((*SIZES, *COLOURS))}) )*)"
    rf"(?P<shape>{'|'.join(SHAPES)}|object)(?:es|s)?\b"
)
_CLAIM = re.compile(rf" (?:(?:is|are) )?(?P<relation>{'|'.join(RELATIONS.values())}) (?:(?:a|an|another|the) )?")
_RELATION_OF = {words: name for name, words in RELATIONS.items()}


@dataclasses.dataclass(frozen=True)
class Mention:
    """What a caption calls something.

    Attributes:
      description: Its size, colour and shape, as far as they are said.
      count: How many there are, or None where no number is said; "a star" says none, as there may be others.
      superlative: A key of SUPERLATIVES, or None.
    """

    description: Description
    count: int | None = None
    superlative: str | None = None

    @property
    def pair(self) -> Pair | None:
        """The colour and shape, or None where one of them is not said."""
        pair = self.description.colour, self.description.shape
        return None if None in pair else pair

    def fits(self, scene: Scene) -> list[int]:
        """The indices of the objects that it may mean."""
        fits = [index for index, thing in enumerate(scene.objects) if self.description.fits(thing)]
        if self.superlative is None:
            return fits
        leads, things = SUPERLATIVES[self.superlative], scene.objects
        return [one for one in fits if all(leads(things[one], things[other]) for other in fits if other != one)]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a caption says.

    Attributes:
      mentions: All that it names, in order.
      claims: The relations: a mention, a key of RELATIONS, and the mention it is related to.
    """

    mentions: tuple[Mention, ...]
    claims: tuple[tuple[Mention, str, Mention], ...]


def read_caption(caption: str) -> Reading:
    """Finds what a caption names and claims.

    Args:
        caption: One or more sentences, in any case.

    Returns:
        What could be read, possibly nothing; any text can be given. Where two colours or two sizes stand before a noun,
        the nearer one counts.

    Example:
        >>> reading = read_caption("Two small red stars; the ring is behind the small star.")
        >>> [(mention.count, mention.description.text) for mention in reading.mentions]
        [(2, 'small red star'), (None, 'ring'), (None, 'small star')]
        >>> [(first.description.text, relation, second.description.text) for first, relation, second in reading.claims]
        [('ring', 'behind', 'small star')]
    """
    # Sentences stay apart, commas do not matter: "a large, red star, above a ring".
    text = " ".join(re.findall(r"[a-z]+|[0-9]+|[.;:!?]", caption.lower()))
    matches = list(_MENTION.finditer(text))
    mentions = tuple(map(_mention, matches))
    claims = []
    for number in range(1, len(matches)):
        between = _CLAIM.fullmatch(text, matches[number - 1].end(), matches[number].start())
        if between:
            claims.append((mentions[number - 1], _RELATION_OF[between["relation"]], mentions[number]))
    return Reading(mentions, tuple(claims))


def _mention(match: re.Match) -> Mention:
    said = match["attributes"].split()
    count = match["count"]
    return Mention(
        Description(
            size=next((word for word in reversed(said) if word in SIZES), None),
            colour=next((word for word in reversed(said) if word in COLOURS), None),
            shape=None if match["shape"] == "object" else match["shape"],
        ),
        None if count is None else _NUMBERS.get(count) or int(count),
        match["superlative"],
    )


def score_attributes(captions: Sequence[str], scenes: Sequence[Scene], *, strict: bool = True) -> dict[str, float]:
    """Compares captions with the scenes that they describe.

    Args:
        captions: One caption for each scene, of one or more sentences.
        scenes: The scenes, in the same order.
        strict: Whether a relation must clearly hold, as it does in true captions; else one that might be said counts.

    Returns:
        Shares in [0, 1] over all captions together; those marked * are missing where no caption says anything of the
        kind.

        * "pair_precision" *: of the (colour, shape) pairs that a caption names, each once, those in its scene.
        * "pair_recall": of the pairs in a scene, those that its caption names. A caption that speaks of one object,
          like the first and third of `scenes.captions`, cannot have them all.
        * "pair_f1": the harmonic mean of both, counted over all pairs.
        * "no_false_object" *: of the captions that name a pair, those whose pairs are all in the scene.
        * "size_accuracy" *: of the mentions with a size, those that fit some object.
        * "count_accuracy" *: of the mentions with a number, those that fit as many objects.
        * "relation_accuracy" *: of the relations claimed, those that hold between two objects that fit.

    Raises:
        InputError: No captions, not as many as scenes, or one text in place of a list.

    Example:
        >>> from jaxsem.data.scenes import captions, sample_scene
        >>> scene = sample_scene("train", 7)
        >>> score_attributes([captions(scene)[1]], [scene])["pair_f1"]
        1.0
    """
    if isinstance(captions, str):
        raise InputError(f"captions are a list of texts, one for each scene, but this is the one text {captions!r}.")
    if len(captions) == 0 or len(captions) != len(scenes):
        raise InputError(f"{len(captions)} captions cannot be compared with {len(scenes)} scenes: give one for each.")
    checks = [_check(read_caption(caption), scene, strict) for caption, scene in zip(captions, scenes)]
    named, true = ([pair for check in checks for pair in getattr(check, name)] for name in ("named", "true"))
    verdicts = {
        "pair_precision": named,
        "pair_recall": true,
        "pair_f1": named + true,  # both hold the pairs in common, so this share is the harmonic mean
        "no_false_object": [all(check.named) for check in checks if check.named],
        **{
            f"{name}_accuracy": [verdict for check in checks for verdict in getattr(check, name)]
            for name in ("size", "count", "relation")
        },
    }
    return {name: sum(values) / len(values) for name, values in verdicts.items() if values}


@dataclasses.dataclass(frozen=True)
class _Check:
    """The verdicts on one caption, true or false each.

    Attributes:
      named: For each pair that is named, whether it is in the scene.
      true: For each pair that is in the scene, whether it is named.
      size: For each mention with a size, whether it fits some object.
      count: For each mention with a number, whether it fits as many objects.
      relation: For each claim, whether it holds.
    """

    named: list[bool]
    true: list[bool]
    size: list[bool]
    count: list[bool]
    relation: list[bool]


def _check(reading: Reading, scene: Scene, strict: bool) -> _Check:
    named = {mention.pair for mention in reading.mentions} - {None}
    true = {(thing.colour, thing.shape) for thing in scene.objects}
    view = View.of(scene) if reading.claims else None  # measures who hides whom, which takes a while
    return _Check(
        named=[pair in true for pair in named],
        true=[pair in named for pair in true],
        size=[bool(mention.fits(scene)) for mention in reading.mentions if mention.description.size],
        count=[len(mention.fits(scene)) == mention.count for mention in reading.mentions if mention.count is not None],
        relation=[_holds(view, claim, strict) for claim in reading.claims],
    )


def _holds(view: View, claim: tuple[Mention, str, Mention], strict: bool) -> bool:
    first, relation, second = claim
    return any(
        one != other and view.related(relation, one, other, strict)
        for one in first.fits(view.scene)
        for other in second.fits(view.scene)
    )
