"""Questions with four options about a scene, one of each category that the scene allows; see `jaxsem.data.questions`.

    colour      What colour is the leftmost star?                  red, blue, ...
    shape       What shape is the small red object?                star, ring, ...
    count       How many objects are there in the image?           one, two, ...
    count_of    How many red objects are there in the image?       zero, one, ...
    size        What is the largest object in the image?           a red star, a blue ring, ...
    extreme     What is the leftmost object in the image?          a red star, ...
    place       In which part of the image is the red star?        at the top left, ...
    relation    What is to the left of the blue ring?              a red star, ...
    overlap     What is in front of the blue ring?                 a red star, ...
    background  What colour is the background?, What pattern ...?  grey, ..., striped, ...

The true option is clearly true, and the others are false even in a loose reading (see `jaxsem.data.scenes.phrases`): what
someone might still call left of the ring is no wrong answer. The wrong options are taken from what the picture shows
before anything else, so that seeing the objects is not enough.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from jaxsem.data.scenes import BACKGROUND_COLOURS, COLOURS, PATTERNS, SHAPES, Description, Phrase, SceneObject
from jaxsem.data.scenes.captions import _PLACES, _PLURALS, article, place
from jaxsem.data.scenes.draws import Draws
from jaxsem.data.scenes.phrases import RELATIONS, SUPERLATIVES, View

OPTIONS = 4
NUMBERS = ("zero", "one", "two", "three", "four")
_CLEAR = 0.03  # how far from the lines between the ninths of the picture a centre must be for its place to be asked

T = TypeVar("T")


class Found(NamedTuple):
    """A question with more wrong options than are needed.

    Attributes:
        text: The question.
        answer: What is true.
        near: Wrong options that the picture suggests; as many of them are taken as there are.
        far: Further ones.
        say: Makes options of answers.
    """

    text: str
    answer: str
    near: Sequence[str]
    far: Sequence[str]
    say: Callable[[str], str] = str


@dataclasses.dataclass(frozen=True)
class Asker:
    """What questions are made from.

    Attributes:
        view: The scene, and who hides whom.
        draws: Where all choices come from.
        classes: What wrong options may name though it is not there.
    """

    view: View
    draws: Draws
    classes: tuple[str, ...]

    @property
    def things(self) -> tuple[SceneObject, ...]:
        """The objects."""
        return self.view.scene.objects

    @property
    def words(self) -> frozenset[str]:
        """The colours and shapes of `classes`."""
        return words_of(self.classes)

    def some(self, items: Sequence[T], count: int) -> list[T]:
        """At most `count` of the items, in random order."""
        rest = list(items)
        return [rest.pop(self.draws.integer(0, len(rest) - 1)) for _ in range(min(count, len(rest)))]


@functools.lru_cache(maxsize=16)
def words_of(classes: tuple[str, ...]) -> frozenset[str]:
    """The colours and shapes that occur in classes."""
    return frozenset(word for name in classes for word in name.split())


def options_questions(asker: Asker) -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    """Text, answer, options and category of a question of each category for which the scene has enough to ask."""
    for category, make in _MAKERS.items():
        found = make(asker)
        if found is None:
            continue
        wrong = asker.some(found.near, OPTIONS - 1)
        wrong += asker.some(found.far, OPTIONS - 1 - len(wrong))
        if len(wrong) == OPTIONS - 1:
            options = asker.some(wrong, len(wrong))
            options.insert(asker.draws.integer(0, OPTIONS - 1), found.answer)
            yield found.text, found.say(found.answer), tuple(map(found.say, options)), category


def _colour(asker: Asker) -> Found | None:
    def ways(thing: SceneObject) -> tuple[Description, ...]:
        return Description(), Description(shape=thing.shape), Description(thing.size, None, thing.shape)

    return _attribute(asker, "colour", COLOURS, ways)


def _shape(asker: Asker) -> Found | None:
    def ways(thing: SceneObject) -> tuple[Description, ...]:
        return Description(), Description(colour=thing.colour), Description(thing.size, thing.colour)

    return _attribute(asker, "shape", SHAPES, ways)


def _attribute(
    asker: Asker, attribute: str, words: tuple[str, ...], ways: Callable[[SceneObject], tuple[Description, ...]]
) -> Found | None:
    for thing in asker.some(asker.things, len(asker.things)):
        if phrases := _phrases(asker, thing, ways(thing)):
            answer = getattr(thing, attribute)
            shown = {getattr(other, attribute) for other in asker.things}
            near, far = _parted(_others(words, answer), shown)
            return Found(f"What {attribute} is {asker.draws.pick(phrases).text}?", answer, near, far)
    return None


def _phrases(asker: Asker, thing: SceneObject, ways: tuple[Description, ...]) -> list[Phrase]:
    """Phrases that are true of one object alone, built on descriptions of it."""
    found = []
    for description in ways:
        rivals = [other for other in asker.things if other is not thing and description.fits(other)]
        if rivals:
            found += [Phrase(description, name) for name in SUPERLATIVES if _leads(name, thing, rivals)]
        else:
            found.append(Phrase(description))
    return found


def _leads(superlative: str, thing: SceneObject, rivals: Sequence[SceneObject]) -> bool:
    leads = SUPERLATIVES[superlative]
    return all([leads(thing, rival) for rival in rivals])  # twice as fast as with a generator


def _count(asker: Asker) -> Found:
    answer = NUMBERS[len(asker.things)]
    return Found("How many objects are there in the image?", answer, (), _others(NUMBERS[1:], answer))


def _count_of(asker: Asker) -> Found:
    """Of a colour or a shape; the counts that the scene allows, zero among them, are equally likely."""
    words = asker.draws.pick((COLOURS, SHAPES))
    shown = [word for thing in asker.things for word in (thing.colour, thing.shape) if word in words]
    counts = {word: shown.count(word) for word in words if word in asker.words or word in shown}
    count = asker.draws.pick(sorted(set(counts.values())))
    asked = asker.draws.pick([word for word in counts if counts[word] == count])
    what = f"{asked} objects" if words is COLOURS else _PLURALS[asked]
    near, far = _parted(_others(NUMBERS, NUMBERS[count]), NUMBERS[max(count - 1, 0) : count + 2])
    return Found(f"How many {what} are there in the image?", NUMBERS[count], near, far)


def _extreme(asker: Asker) -> Found | None:
    return _superlative(asker, [name for name in SUPERLATIVES if name.endswith("most")])


def _size(asker: Asker) -> Found | None:
    return _superlative(asker, [name for name in SUPERLATIVES if not name.endswith("most")])


def _superlative(asker: Asker, names: list[str]) -> Found | None:
    things = asker.things
    found = [
        (name, thing)
        for name in names
        for thing in things
        if len(things) > 1 and _leads(name, thing, [other for other in things if other is not thing])
    ]
    if not found:
        return None
    name, thing = asker.draws.pick(found)
    near, far = _wrong_names(asker, {thing.name}, thing)
    return Found(f"What is {Phrase(Description(), name).text} in the image?", thing.name, near, far, article)


def _place(asker: Asker) -> Found | None:
    scene = asker.view.scene
    indices = [index for index, way in enumerate(asker.view.plain) if way and _clearly_placed(asker, index)]
    if not indices:
        return None
    index = asker.draws.pick(indices)
    answer = place(scene, index)
    row, column = next((r, c) for r, words in enumerate(_PLACES) for c, word in enumerate(words) if word == answer)
    # What is at the top left is also at the top: no two options are neighbours.
    wrong = [_PLACES[r][c] for r in range(3) for c in range(3) if (r + c - row - column) % 2 == 0]
    near, far = _parted(_others(wrong, answer), {place(scene, other) for other in range(len(asker.things))})
    return Found(f"In which part of the image is {Phrase(asker.view.plain[index]).text}?", answer, near, far)


def _clearly_placed(asker: Asker, index: int) -> bool:
    thing, (height, width) = asker.things[index], asker.view.scene.extent
    lines = [(thing.x, width / 3), (thing.x, 2 * width / 3), (thing.y, height / 3), (thing.y, 2 * height / 3)]
    return all(abs(centre - line) >= _CLEAR for centre, line in lines)


def _relation(asker: Asker) -> Found | None:
    return _related(asker, ("left", "right", "above", "below"))


def _overlap(asker: Asker) -> Found | None:
    return _related(asker, ("front", "behind"))


def _related(asker: Asker, relations: tuple[str, ...]) -> Found | None:
    view, indices = asker.view, range(len(asker.things))
    found = [
        (relation, first, second)
        for second in indices
        if view.plain[second]
        for first in indices
        if first != second
        for relation in relations
        if view.related(relation, first, second)
    ]
    if not found:
        return None
    relation, first, second = asker.draws.pick(found)
    might = {asker.things[i].name for i in indices if i != second and view.related(relation, i, second, strict=False)}
    anchor, thing = asker.things[second], asker.things[first]
    near, far = _wrong_names(asker, {thing.name, anchor.name, *might}, thing)
    text = f"What is {RELATIONS[relation]} {Phrase(view.plain[second]).text}?"
    return Found(text, thing.name, near, far, article)


def _wrong_names(asker: Asker, right: set[str], thing: SceneObject) -> tuple[list[str], list[str]]:
    """Classes that are not `right`: three that share colours and shapes so that none of four options stands out.

    With another colour and another shape these are red ring, blue star and blue ring for a red star, if possible with
    objects of the picture among them. Where the classes have no such three: those in the picture, and any.
    """
    shown = {other.name for other in asker.things} - right
    allowed = (shown | set(asker.classes)) - right
    squares: dict[int, list[frozenset[str]]] = {}
    for names in _squares(thing.colour, thing.shape):
        if names <= allowed:
            squares.setdefault(len(names & shown), []).append(names)
    if squares:
        return sorted(asker.draws.pick(squares[max(squares)])), []
    return sorted(shown), sorted(allowed - shown)


@functools.cache
def _squares(colour: str, shape: str) -> list[frozenset[str]]:
    """The threes that make a square with a class: two colours by two shapes."""
    return [
        frozenset((f"{colour} {other_shape}", f"{other_colour} {shape}", f"{other_colour} {other_shape}"))
        for other_colour in _others(COLOURS, colour)
        for other_shape in _others(SHAPES, shape)
    ]


def _background(asker: Asker) -> Found:
    background = asker.view.scene.background
    if asker.draws.uniform() < 0.5:
        others = _others(BACKGROUND_COLOURS, background.colour)
        return Found("What colour is the background?", background.colour, (), others)
    return Found("What pattern is the background?", background.pattern, (), _others(PATTERNS, background.pattern))


def _others(words: Sequence[str], answer: str) -> list[str]:
    return [word for word in words if word != answer]


def _parted(words: Sequence[str], near: Sequence[str] | set[str]) -> tuple[list[str], list[str]]:
    return [word for word in words if word in near], [word for word in words if word not in near]


_MAKERS: dict[str, Callable[[Asker], Found | None]] = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "count_of": _count_of,
    "size": _size,
    "extreme": _extreme,
    "place": _place,
    "relation": _relation,
    "overlap": _overlap,
    "background": _background,
}
CATEGORIES = tuple(_MAKERS)

OPTION_WORDS = (
    "what colour shape pattern is the object background in which part of the image",
    "how many objects are there",
    " ".join(NUMBERS),
)
"""Words of these questions that captions and phrases do not have, among others."""
