"""Captions: five true sentences about a scene, from short to detailed.

1. the largest object                       a picture of two red stars
2. all objects                              two red stars and a blue ring
3. a relation, or where the object is       a red star to the left of a blue ring
4. all with sizes, and the background       two small red stars and a large blue ring on a grey striped background
5. as 4, and one thing more                 ...; the ring is behind the leftmost star
"""

from collections import Counter

from jaxsem.data.scenes.draws import Draws
from jaxsem.data.scenes.phrases import RELATIONS, SUPERLATIVES, View
from jaxsem.data.scenes.world import BACKGROUND_COLOURS, COLOURS, PATTERNS, SHAPES, SIZES, Scene

CAPTIONS = 5
"""How many captions `captions` gives."""

_CAPTION_STREAM = 2**63 + 2
_OPENINGS = ("", "", "a picture of ", "an image of ", "there is ")
_THIRDS = (("at the top left", "at the top", "at the top right"), ("on the left", "in the centre", "on the right"))
_PLACES = (*_THIRDS, ("at the bottom left", "at the bottom", "at the bottom right"))
_PLURALS = {shape: f"{shape}es" if shape.endswith("s") else f"{shape}s" for shape in SHAPES}

WORDS = tuple(
    sorted(
        {
            *("a", "an", "and", "another", "are", "background", "is", "it", "object", "on", "the", "two"),
            *(word for opening in _OPENINGS for word in opening.split()),
            *(word for row in _PLACES for place in row for word in place.split()),
            *(word for relation in RELATIONS.values() for word in relation.split()),
            *(*SUPERLATIVES, *SIZES, *COLOURS, *SHAPES, *_PLURALS.values(), *PATTERNS, *BACKGROUND_COLOURS),
        }
    )
)
"""Every word of captions and phrases, for tokenizers; the only punctuation is "," and ";"."""


def captions(scene: Scene, view: View | None = None) -> tuple[str, ...]:
    """Describes a scene.

    Args:
        scene: What to describe.
        view: `View.of(scene)`, if it is at hand.

    Returns:
        CAPTIONS sentences in lower case, as the module's docstring lists them, all true of the scene. The wording
        varies from scene to scene and is fixed by the scene's seed.
    """
    view = view or View.of(scene)
    draws = Draws(_CAPTION_STREAM, scene.seed)
    order = sorted(range(len(scene.objects)), key=lambda index: -scene.objects[index].radius)
    largest, names = order[0], [scene.objects[index].name for index in order]
    sized = [f"{scene.objects[index].size} {scene.objects[index].name}" for index in order]
    background = article(f"{scene.background.colour} {scene.background.pattern} background")
    everything = f"{_list(sized)} on {background}"
    relations = _relations(view)
    return (
        _open(draws, _list([name for name in names if name == names[0]])),
        _open(draws, _list(names)),
        _relation(view, relations, draws) or _open(draws, f"{article(names[0])} {place(scene, largest)}"),
        _open(draws, everything),
        f"{everything}; {_statement(view, relations, draws) or f'it is {place(scene, largest)}'}",
    )


def _open(draws: Draws, text: str) -> str:
    opening = draws.pick(_OPENINGS)
    return f"there are {text}" if opening == "there is " and text.startswith("two ") else opening + text


def article(words: str) -> str:
    """The words with "a" or "an" before them."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _list(names: list[str]) -> str:
    """A listing in words, equal names counted: "two red stars, a blue ring and a green cross"."""
    parts = [article(name) if count == 1 else _plural(name) for name, count in Counter(names).items()]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _plural(name: str) -> str:
    # Two are the most of a class that a scene holds.
    words, _, shape = name.rpartition(" ")
    return f"two {words} {_PLURALS[shape]}"


def place(scene: Scene, index: int) -> str:
    """Which ninth of the picture an object's centre is in."""
    thing, (height, width) = scene.objects[index], scene.extent
    return _PLACES[int(3 * thing.y / height)][int(3 * thing.x / width)]


def _relations(view: View) -> dict[str, list[tuple[int, int]]]:
    """All pairs that stand in a relation, by its name."""
    indices = range(len(view.scene.objects))
    pairs = [(first, second) for first in indices for second in indices if first != second]
    found = {name: [pair for pair in pairs if view.related(name, *pair)] for name in RELATIONS}
    return {name: members for name, members in found.items() if members}


def _relation(view: View, relations: dict[str, list[tuple[int, int]]], draws: Draws) -> str | None:
    """A relation that holds between some two objects: "a red star behind a blue ring"."""
    if not relations:
        return None
    name = draws.pick(tuple(relations))
    first, second = (view.scene.objects[index].name for index in draws.pick(relations[name]))
    return f"{article(first)} {RELATIONS[name]} {f'another {second}' if first == second else article(second)}"


def _statement(view: View, relations: dict[str, list[tuple[int, int]]], draws: Draws) -> str | None:
    """A relation between two objects that can be named: "the star is behind the blue ring"."""
    names = view.plain
    usable = {
        relation: [pair for pair in pairs if names[pair[0]] and names[pair[1]]] for relation, pairs in relations.items()
    }
    usable = {relation: pairs for relation, pairs in usable.items() if pairs}
    if not usable:
        return None
    relation = draws.pick(tuple(usable))
    first, second = draws.pick(usable[relation])
    return f"the {names[first].text} is {RELATIONS[relation]} the {names[second].text}"
