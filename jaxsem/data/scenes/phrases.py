"""Referring phrases: for every object, words that are true of that object and of no other in the scene.

A phrase is a description ("red star"), alone or with one of

    a superlative    "the leftmost red star"                    among the objects that fit the description
    a relation       "the star to the right of the blue ring"   to an object that its own description singles out

Relations have a strict and a loose reading, as in speech: what lies clearly to the left, and what someone might still
call left. A phrase counts as referring to an object if it is true of it in the strict reading and of no other object
even in the loose one.
"""

import dataclasses
from collections.abc import Callable, Iterator

from jaxsem.data.scenes.draws import Draws
from jaxsem.data.scenes.render import occlusion
from jaxsem.data.scenes.world import SIZES, Scene, SceneObject

# All lengths in units of the picture's shorter side, between centres.
CLEARLY = 0.1  # objects this far apart are clearly left and right of each other, or above and below
HARDLY = 0.02  # and closer than this, nobody would say so
MARGIN = 0.05  # by which the leftmost object must lie left of the next one
COVERED = 0.06  # the share of an object that must be hidden for the other to be called in front of it

RELATIONS = {
    "left": "to the left of",
    "right": "to the right of",
    "above": "above",
    "below": "below",
    "front": "in front of",
    "behind": "behind",
}
PHRASES = 3
"""How many phrases `refer` gives for each object."""

_PHRASE_STREAM = 2**63 + 1


@dataclasses.dataclass(frozen=True)
class Description:
    """Attributes of an object; None leaves one open.

    Attributes:
        size: One of SIZES.
        colour: One of COLOURS.
        shape: One of SHAPES.
    """

    size: str | None = None
    colour: str | None = None
    shape: str | None = None

    def fits(self, thing: SceneObject) -> bool:
        """Whether an object has these attributes."""
        return (
            self.size in (None, thing.size)
            and self.colour in (None, thing.colour)
            and self.shape in (None, thing.shape)
        )

    @property
    def text(self) -> str:
        """The words, "small red star", or "red object" where the shape is open."""
        return " ".join(word for word in (self.size, self.colour, self.shape or "object") if word)


@dataclasses.dataclass(frozen=True)
class Phrase:
    """A referring phrase.

    Attributes:
        description: What the object is.
        superlative: A key of SUPERLATIVES, or None.
        relation: A key of RELATIONS, or None.
        anchor: The description of the object that the relation is to.
    """

    description: Description
    superlative: str | None = None
    relation: str | None = None
    anchor: Description | None = None

    @property
    def text(self) -> str:
        """The words, "the small red star to the left of the ring"."""
        start = (
            f"the {self.superlative} {self.description.text}" if self.superlative else f"the {self.description.text}"
        )
        return f"{start} {RELATIONS[self.relation]} the {self.anchor.text}" if self.relation else start


@dataclasses.dataclass(frozen=True)
class View:
    """A scene with what its relations need.

    Attributes:
        scene: The scene.
        hidden: hidden[i][j] is the share of object i that object j hides.
        plain: For each object the shortest description that fits no other, or None where attributes do not suffice.
    """

    scene: Scene
    hidden: list[list[float]]
    plain: list[Description | None]

    @classmethod
    def of(cls, scene: Scene) -> "View":
        """Measures who hides whom in a scene, and finds what to call each object."""
        return cls(scene, occlusion(scene).hidden.tolist(), [_plain(scene, thing) for thing in scene.objects])

    def related(self, relation: str, first: int, second: int, strict: bool = True) -> bool:
        """Whether object `first` is left of, above, in front of ... object `second`.

        Args:
            relation: A key of RELATIONS.
            first: Index of the object the statement is about.
            second: Index of the object it is compared with.
            strict: Whether it has to be clearly so; else, whether one might say so.
        """
        a, b = self.scene.objects[first], self.scene.objects[second]
        if relation == "front":
            if strict:
                return self.hidden[second][first] >= COVERED
            return first > second and (a.x - b.x) ** 2 + (a.y - b.y) ** 2 < (a.radius + b.radius) ** 2
        if relation == "behind":
            return self.related("front", second, first, strict)
        along, across = (b.x - a.x, b.y - a.y) if relation in ("left", "right") else (b.y - a.y, b.x - a.x)
        if relation in ("right", "below"):
            along = -along
        return along >= max(CLEARLY, abs(across)) if strict else along > HARDLY


def refer(scene: Scene, view: View | None = None) -> tuple[tuple[Phrase, ...], ...]:
    """Finds phrases for every object of a scene.

    Args:
        scene: Where the objects are.
        view: `View.of(scene)`, if it is at hand.

    Returns:
        For each object PHRASES phrases that are true of it alone: first the fewest attributes, where attributes
        suffice, else a comparison; then one that compares it with others, where that is possible; then a detailed one.
        They may coincide.
    """
    view = view or View.of(scene)
    draws = Draws(_PHRASE_STREAM, scene.seed)
    return tuple(_phrases(view, index, draws) for index in range(len(scene.objects)))


def _phrases(view: View, index: int, draws: Draws) -> tuple[Phrase, ...]:
    thing = view.scene.objects[index]
    kind, full = Description(None, thing.colour, thing.shape), Description(thing.size, thing.colour, thing.shape)
    kinds = (Description(), Description(shape=thing.shape), kind)
    found = (_one_of(make(view, index, kinds), draws) for make in (_superlatives, _relations))
    compared = [phrase for phrase in found if phrase]
    comparison = draws.pick(compared) if compared else Phrase(kind)
    plain = view.plain[index]
    if plain is None:
        # Its twin of equal class and size is at least MARGIN away along one axis, so a superlative always exists.
        return compared[0], comparison, _one_of(_superlatives(view, index, (full,)), draws)
    return Phrase(plain), comparison, Phrase(full)


def _plain(scene: Scene, thing: SceneObject) -> Description | None:
    return next((found for found in _descriptions(thing) if _singles_out(scene, found)), None)


def _descriptions(thing: SceneObject) -> Iterator[Description]:
    """From short to long."""
    yield Description(shape=thing.shape)
    yield Description(colour=thing.colour, shape=thing.shape)
    yield Description(size=thing.size, shape=thing.shape)
    yield Description(size=thing.size, colour=thing.colour, shape=thing.shape)


def _singles_out(scene: Scene, description: Description) -> bool:
    return sum(description.fits(thing) for thing in scene.objects) == 1


def _one_of(phrases: Iterator[Phrase], draws: Draws) -> Phrase | None:
    """One of the shortest phrases."""
    found = list(phrases)
    if not found:
        return None
    words = [phrase.text.count(" ") for phrase in found]
    return draws.pick([phrase for phrase, count in zip(found, words) if count == min(words)])


def _superlatives(view: View, index: int, kinds: tuple[Description, ...]) -> Iterator[Phrase]:
    """Phrases by which the object stands out among all that fit a description."""
    things = view.scene.objects
    thing = things[index]
    for description in kinds:
        rivals = [things[other] for other in _rivals(view.scene, index, description)]
        for superlative, lead in SUPERLATIVES.items():
            if rivals and all(lead(thing, rival) for rival in rivals):
                yield Phrase(description, superlative)


def _relations(view: View, index: int, kinds: tuple[Description, ...]) -> Iterator[Phrase]:
    """Phrases that place the object relative to one which attributes single out."""
    for anchor in range(len(view.scene.objects)):
        relations = [name for name in RELATIONS if anchor != index and view.related(name, index, anchor)]
        words = view.plain[anchor]
        if words is None:
            continue
        for description in kinds:
            rivals = [other for other in _rivals(view.scene, index, description) if other != anchor]
            for name in relations:
                if not any(view.related(name, rival, anchor, strict=False) for rival in rivals):
                    yield Phrase(description, None, name, words)


def _rivals(scene: Scene, index: int, description: Description) -> list[int]:
    return [other for other, thing in enumerate(scene.objects) if other != index and description.fits(thing)]


SUPERLATIVES: dict[str, Callable[[SceneObject, SceneObject], bool]] = {
    "leftmost": lambda thing, rival: rival.x - thing.x >= MARGIN,
    "rightmost": lambda thing, rival: thing.x - rival.x >= MARGIN,
    "topmost": lambda thing, rival: rival.y - thing.y >= MARGIN,
    "bottommost": lambda thing, rival: thing.y - rival.y >= MARGIN,
    "largest": lambda thing, rival: SIZES.index(thing.size) > SIZES.index(rival.size),
    "smallest": lambda thing, rival: SIZES.index(thing.size) < SIZES.index(rival.size),
}
