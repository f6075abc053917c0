"""Sampling of scenes: which objects, where, before what.

Train, valid and test can never share a scene. Each split draws from random streams of its own (the split is part of the
key), and that alone makes a common scene as likely as equal 53-bit numbers, many at once. Besides, the splits are
disjoint by construction: every object's x lies on a grid of 1/1024, and the remainder of its number modulo 8 belongs to
one split: 0 to test, 1 to valid, 2 to 7 to train. So no object of one split stands where one of another split does.
"""

from jaxsem.data.scenes.draws import Draws
from jaxsem.data.scenes.render import coarse_masks, occlusion_of
from jaxsem.data.scenes.world import (
    BACKGROUND_COLOURS,
    COLOURS,
    DEFAULT,
    PATTERNS,
    SHAPES,
    SPLITS,
    Background,
    Scene,
    SceneConfig,
    SceneObject,
)
from jaxsem.errors import InputError

MIN_VISIBLE = 0.42  # on the coarse grid, so that at least 40 % can be seen in pictures of usual sizes
MIN_DISTANCE = 0.13  # between centres: two of a kind are told apart as the left and right, or upper and lower one

_RGB = {
    "red": (212, 34, 38),
    "orange": (246, 128, 22),
    "yellow": (246, 214, 30),
    "green": (48, 160, 58),
    "cyan": (54, 204, 214),
    "blue": (46, 90, 232),
    "purple": (146, 58, 196),
    "pink": (246, 128, 190),
}
_TONES = {
    "white": (238, 238, 234),
    "grey": (142, 143, 146),
    "black": (26, 26, 30),
    "beige": (214, 197, 168),
    "brown": (98, 72, 54),
    "navy": (34, 42, 74),
}
_RADII = {"small": (0.09, 0.11), "medium": (0.135, 0.16), "large": (0.19, 0.225)}
_STREAMS = {"train": 0, "valid": 1, "test": 2}
_REMAINDERS = {"train": (2, 3, 4, 5, 6, 7), "valid": (1,), "test": (0,)}
_GRID = 1024


def sample_scene(split: str, index: int, config: SceneConfig = DEFAULT) -> Scene:
    """Draws scene number `index` of a split: a pure function, so every scene is reached directly.

    Args:
        split: "train", "valid" or "test".
        index: From 0 up to the split's length in `SPLITS`.
        config: Which objects may occur.

    Returns:
        A scene with its objects from back to front: at most two of a class, each at least 40 % visible.

    Raises:
        InputError: For an unknown split or an index outside it.
    """
    if split not in SPLITS:
        raise InputError(f"scenes have no split {split!r}: use {', '.join(SPLITS)}.")
    if not 0 <= index < SPLITS[split]:
        raise InputError(f"scenes/{split} has no scene {index}: its scenes are 0 to {SPLITS[split] - 1}.")
    draws = Draws(config.seed * len(SPLITS) + _STREAMS[split], index)
    scene = Scene(
        background=_background(draws),
        objects=(),
        light=draws.uniform(0, 360),
        aspect=config.aspect,
        seed=draws.integer(0, 2**48),
    )
    count = draws.integer(*config.objects)
    while True:
        objects = _objects(draws, scene, count, config, _REMAINDERS[split])
        if objects is not None:
            return Scene(scene.background, objects, scene.light, scene.aspect, scene.seed)


def _background(draws: Draws) -> Background:
    colour = draws.pick(BACKGROUND_COLOURS)
    shift = draws.uniform(-8, 8)
    first = tuple(value + shift for value in _TONES[colour])
    # The second tone is darker for light colours and lighter for dark ones, but keeps the colour's name.
    strength = draws.uniform(0.14, 0.22) if colour == "white" else draws.uniform(0.22, 0.36)
    if sum(first) > 330:
        second = tuple(value * (1 - strength) for value in first)
    else:
        second = tuple(value + (150 - value) * strength for value in first)
    pattern = draws.pick(PATTERNS)
    swapped = draws.uniform() < 0.5 and pattern != "plain"
    return Background(
        pattern=pattern,
        colour=colour,
        tones=(second, first) if swapped else (first, second),
        angle=draws.uniform(0, 360),
        period=draws.uniform(0.12, 0.28),
        phase=draws.uniform(),
    )


def _objects(
    draws: Draws, scene: Scene, count: int, config: SceneConfig, remainders: tuple[int, ...]
) -> tuple[SceneObject, ...] | None:
    """Places objects from back to front, or gives up with None where they hide too much of each other."""
    objects: list[SceneObject] = []
    masks = []
    for _ in range(count):
        name = _class(draws, [thing.name for thing in objects], config.class_names)
        for _ in range(12):
            thing = _place(draws, name, draws.pick(config.sizes), scene.extent, remainders)
            if not _apart(thing, objects):
                continue
            (mask,) = coarse_masks((thing,), scene)
            if not objects or occlusion_of([*masks, mask]).visible.min() >= MIN_VISIBLE:
                objects.append(thing)
                masks.append(mask)
                break
        else:
            return None
    return tuple(objects)


def _class(draws: Draws, taken: list[str], allowed: tuple[str, ...]) -> str:
    """A class at random; or, more often than chance would, one that shares colour or shape with an object already there.

    Without such relatives, a colour alone would single out nearly every object, and relations would not matter.
    """
    name = draws.pick(allowed)
    if taken and draws.uniform() < 0.6:
        relative = draws.pick(taken)
        colour, shape = relative.split()
        kind = draws.uniform()
        if kind < 0.3:
            name = relative
        elif kind < 0.65:
            name = f"{colour} {draws.pick(SHAPES)}"
        else:
            name = f"{draws.pick(COLOURS)} {shape}"
    while name not in allowed or taken.count(name) >= 2:
        name = draws.pick(allowed)
    return name


def _place(draws: Draws, name: str, size: str, extent: tuple[float, float], remainders: tuple[int, ...]) -> SceneObject:
    colour, shape = name.split()
    radius = draws.uniform(*_RADII[size])
    room = radius + 0.02
    first, last = (int(place * _GRID / 8) + 1 for place in (room, extent[1] - room))
    x = (8 * draws.integer(first, last - 1) + draws.pick(remainders)) / _GRID
    brightness = draws.uniform(0.9, 1.0)
    rgb = tuple(value * brightness + draws.uniform(-8, 8) for value in _RGB[colour])
    return SceneObject(
        shape=shape,
        colour=colour,
        size=size,
        x=x,
        y=draws.uniform(room, extent[0] - room),
        radius=radius,
        rotation=draws.uniform(-25, 25),
        rgb=rgb,
        outline=draws.uniform(0.07, 0.12) if draws.uniform() < 0.5 else 0.0,
    )


def _apart(thing: SceneObject, others: list[SceneObject]) -> bool:
    """Whether the centres keep their distance, a quick test before masks are drawn."""
    return all((thing.x - other.x) ** 2 + (thing.y - other.y) ** 2 >= MIN_DISTANCE**2 for other in others)
