"""What a scene is made of: the words of our small world, its classes, and the records that describe one picture.

Lengths are relative: the shorter side of the picture is 1, x grows to the right and y downwards. A scene says nothing
about pixels, so it looks the same at every size.
"""

import dataclasses

from jaxsem.errors import InputError

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "crescent")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("small", "medium", "large")
PATTERNS = ("plain", "shaded", "striped", "checked", "grainy", "spotted")
BACKGROUND_COLOURS = ("white", "grey", "black", "beige", "brown", "navy")

CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
"""The 64 object classes; class c has colour c // 8 and shape c % 8."""

UNSEEN_CLASSES = (
    *("red square", "red heart"),
    *("orange triangle", "orange crescent"),
    *("yellow circle", "yellow star"),
    *("green square", "green ring"),
    *("cyan triangle", "cyan cross"),
    *("blue star", "blue heart"),
    *("purple ring", "purple crescent"),
    *("pink circle", "pink cross"),
)
"""The 16 classes held out for zero-shot tests, frozen: two of every colour and two of every shape, as in a Latin square.

Every colour and every shape thus occurs in six of the 48 seen classes; only the combination is new.
"""

SEEN_CLASSES = tuple(name for name in CLASSES if name not in UNSEEN_CLASSES)
CLASS_SETS = {"all": CLASSES, "seen": SEEN_CLASSES, "unseen": UNSEEN_CLASSES}

SPLITS = {"train": 10_000_000, "valid": 10_000, "test": 10_000}
"""The splits and their lengths. Nothing is stored: a scene is drawn when it is asked for."""

MAX_OBJECTS = 4


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """One object.

    Attributes:
        shape: One of SHAPES.
        colour: One of COLOURS.
        size: One of SIZES. Small objects have radii of 0.09 to 0.11, medium ones 0.135 to 0.16, large ones 0.19 to 0.225.
        x: Centre, from the left.
        y: Centre, from the top.
        radius: Of the circle around the object.
        rotation: Clockwise, in degrees.
        rgb: The exact colour, a shade of `colour`, 0 to 255 each.
        outline: Width of the dark rim as a share of the radius; 0 for none.
    """

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    rotation: float
    rgb: tuple[float, float, float]
    outline: float

    @property
    def name(self) -> str:
        """The object's class, "red star"."""
        return f"{self.colour} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Background:
    """What lies behind all objects: a pattern between two tones.

    Attributes:
        pattern: One of PATTERNS.
        colour: One of BACKGROUND_COLOURS.
        tones: The two colours between which the pattern runs, 0 to 255.
        angle: Direction of stripes, checks and gradients in degrees.
        period: Distance after which stripes and checks repeat.
        phase: Shift of the pattern in periods, 0 to 1.
    """

    pattern: str
    colour: str
    tones: tuple[tuple[float, float, float], tuple[float, float, float]]
    angle: float
    period: float
    phase: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """All that is needed to draw and describe one picture.

    Attributes:
        background: What lies behind.
        objects: From back to front: each may hide parts of those before it.
        light: Direction the light comes from in degrees; objects are brighter on that side.
        aspect: Width / height of the picture.
        seed: Decides the grain of the background and the wording of the captions.
    """

    background: Background
    objects: tuple[SceneObject, ...]
    light: float
    aspect: float
    seed: int

    @property
    def extent(self) -> tuple[float, float]:
        """Height and width; the shorter is 1."""
        return (1.0, self.aspect) if self.aspect >= 1 else (1.0 / self.aspect, 1.0)


@dataclasses.dataclass(frozen=True)
class SceneConfig:
    """Which scenes are drawn.

    Attributes:
        classes: "all", "seen" (48) or "unseen" (16), or the names of the classes that may occur.
        objects: The least and the largest number of objects, 1 to 4.
        sizes: Which of SIZES may occur.
        aspect: Width / height of the picture, 1/4 to 4.
        seed: Another seed gives another world of the same kind, with its own train, valid and test scenes.

    Raises:
        InputError: For values that make no scene.
    """

    classes: str | tuple[str, ...] = "all"
    objects: tuple[int, int] = (1, MAX_OBJECTS)
    sizes: tuple[str, ...] = SIZES
    aspect: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if isinstance(self.classes, str) and self.classes not in CLASS_SETS:
            raise InputError(
                f"there is no class set {self.classes!r}: use {', '.join(CLASS_SETS)}, or a tuple of class names."
            )
        _check_names("class", self.class_names, CLASSES)
        _check_names("size", self.sizes, SIZES)
        low, high = self.objects
        if not 1 <= low <= high <= MAX_OBJECTS:
            raise InputError(f"objects={self.objects} is no range of 1 to {MAX_OBJECTS} objects.")
        if high > 2 * len(set(self.class_names)):
            raise InputError(
                f"{len(set(self.class_names))} class(es) make no scene of {high} objects, as two of a kind is the most: "
                "give more classes or fewer objects."
            )
        if not 0.25 <= self.aspect <= 4:
            raise InputError(f"aspect={self.aspect} is not between 1/4 and 4.")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed={self.seed} is not between 0 and {2**32 - 1}.")

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes that may occur, by name."""
        return CLASS_SETS[self.classes] if isinstance(self.classes, str) else tuple(self.classes)


def _check_names(kind: str, names: tuple[str, ...], known: tuple[str, ...]) -> None:
    if not names:
        raise InputError(f"no {kind} is given: name at least one, like {known[0]!r}.")
    for name in names:
        if name not in known:
            raise InputError(f"there is no {kind} {name!r}: known are {', '.join(known)}.")


def check_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of a picture whose size is given as one side or both.

    Raises:
        InputError: Below 16 or above 4096 pixels.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if not (16 <= height <= 4096 and 16 <= width <= 4096):
        raise InputError(f"scenes of {height}x{width} pixels cannot be drawn: each side must be 16 to 4096.")
    return height, width


DEFAULT = SceneConfig()
"""One to four objects of all classes and sizes in a square."""
