"""Examples from a JSONL file and a folder of images: one JSON object a line.

    {"form": "caption", "image": "a.jpg", "references": ["A dog runs.", "a brown dog on grass"]}
    {"form": "options", "image": "a.jpg", "text": "What runs?", "options": ["a dog", "a cat"], "answer": "a dog"}
    {"form": "yes_no",  "image": "a.jpg", "text": "Is there a cat in the image?", "answer": "no"}
    {"form": "box",     "image": "a.jpg", "text": "the brown dog", "box": [41, 30.5, 120, 96]}
    {"form": "few_shot", "image": "a.jpg", "answer": "dog", "support": [["b.jpg", "dog"], ["c.jpg", "cat"]]}

`image` is a path below the folder. A box is left, top, right and bottom in pixels. Every line may have a `category`, which
gets scores of its own, and captions a `text`. Blank lines are skipped.

How the benchmarks become such lines:

    COCO captions   the captions of one image are the `references`
    SEED-Bench      `question` is the text, `choice_a` to `choice_d` are the options, `answer` names one by its letter: write
                    that option itself; `data_id` is the image, the type of question its category
    POPE            its lines have `image`, `text` and `label`: rename the label to `answer`; the setting is the category
    RefCOCO         the expression is the text; its boxes are x, y, width, height: add x and y to the last two
"""

import json
import os
import reprlib
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, UnidentifiedImageError

from jaxsem.data.boxes import Box
from jaxsem.data.questions import DESCRIBE
from jaxsem.errors import InputError
from jaxsem.files import describe, read_bytes
from jaxsem.tasks.examples import FORMS, Example, Picture

_NEEDED = {
    "caption": ("references",),
    "options": ("text", "options", "answer"),
    "yes_no": ("text", "answer"),
    "box": ("text", "box"),
    "few_shot": ("answer", "support"),
}
_ALLOWED = {"caption": ("text",)}
_COMMON = ("form", "image", "category")
_ORIENTATION = 0x0112
_BEYOND = 1.0  # pixels by which the boxes of real data sets pass the edge


def read_examples(path: str | os.PathLike, folder: str | os.PathLike) -> list[Example]:
    """Reads examples; images are looked at for their sizes only, and `Picture.value` is their path.

    Args:
        path: The JSONL file, in UTF-8.
        folder: Where the images lie.

    Returns:
        The examples in the order of the lines.

    Raises:
        InputError: The file cannot be read or has no example; or a line is no example of the schema or names an image
            that is missing or damaged; it names the line.
    """
    pictures = _Pictures(Path(folder))
    examples = []
    for number, line in enumerate(read_bytes(path).split(b"\n"), 1):
        if line.strip():
            try:
                examples.append(_example(line, pictures))
            except InputError as error:
                raise InputError(f"{path}, line {number}: {error}") from error
    if not examples:
        raise InputError(f"{path} has no examples: write one JSON object a line.")
    return examples


class _Pictures:
    """The images of a folder by the path below it, each looked at once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._known: dict[str, Picture] = {}

    def __getitem__(self, name: str) -> Picture:
        if name not in self._known:
            parts = PurePosixPath(name)
            if not parts.parts or parts.is_absolute() or ".." in parts.parts or not name.isprintable():
                raise InputError(f"the image {name!r} is no path below the folder.")
            path = self.folder / parts
            self._known[name] = Picture(str(parts), path, _size_of(path))
        return self._known[name]


def _size_of(path: Path) -> tuple[int, int]:
    """Height and width as a person sees the image, from its header."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    except FileNotFoundError as error:
        raise InputError(f"the image {path} does not exist: check the name and the folder.") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is no image that can be read.") from error
    except Exception as error:  # Pillow's readers meet damage with errors of a dozen types
        raise InputError(f"the image {path} cannot be read ({describe(error)}).") from error
    return (width, height) if turned else (height, width)


def _example(line: bytes, pictures: _Pictures) -> Example:
    fields = _parse(line)
    form = fields.get("form")
    if not isinstance(form, str) or form not in FORMS:
        raise InputError(f"'form' must be one of {', '.join(FORMS)}, not {reprlib.repr(form)}.")
    needed = (*_COMMON[:2], *_NEEDED[form])
    for name in needed:
        if name not in fields:
            raise InputError(f"an example of the form {form!r} needs {name!r}; it has {', '.join(fields)}.")
    known = (*needed, *_COMMON, *_ALLOWED.get(form, ()))
    for name in fields:
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"it may have {', '.join(dict.fromkeys(known))}."
            raise InputError(f"an example of the form {form!r} has no {name!r}: {hint}")
    values = {name: _READERS[name](name, value) for name, value in fields.items() if name in _READERS}
    picture = pictures[values.pop("image")]
    if "box" in values:
        values["box"] = _within(values["box"], picture.size)
    if "support" in values:
        values["support"] = tuple((pictures[image], label) for image, label in values["support"])
    if form == "caption":
        values.setdefault("text", DESCRIBE)
    return Example(form, picture, **values)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InputError(f"it is not UTF-8 (byte {error.start}).") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"it is not JSON ({describe(error)}).") from error
    if not isinstance(fields, dict):
        raise InputError(f"it is {reprlib.repr(fields)} instead of an object.")
    return fields


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name!r} must be a text, not {reprlib.repr(value)}.")
    return value


def _list_of_texts(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InputError(f"{name!r} must be a list of texts, not {reprlib.repr(value)}.")
    return tuple(value)


def _pairs(name: str, value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list) or not all(isinstance(item, list) and len(item) == 2 for item in value):
        raise InputError(f"{name!r} must be a list of pairs of image and label, not {reprlib.repr(value)}.")
    return tuple(_list_of_texts(name, item) for item in value)


def _numbers(name: str, value: Any) -> tuple[float, ...]:
    numbers = value if isinstance(value, list) else []
    if len(numbers) != 4 or not all(type(item) in (int, float) and abs(item) < 1e9 for item in numbers):
        raise InputError(
            f"{name!r} must be four numbers of pixels, left, top, right and bottom, not {reprlib.repr(value)}."
        )
    return tuple(map(float, numbers))


_READERS: dict[str, Callable[[str, Any], Any]] = {
    "image": _text,
    "text": _text,
    "answer": _text,
    "category": _text,
    "options": _list_of_texts,
    "references": _list_of_texts,
    "support": _pairs,
    "box": _numbers,
}


def _within(box: tuple[float, ...], size: tuple[int, int]) -> Box:
    """Pixels as shares, cut to the picture."""
    (left, top, right, bottom), (height, width) = box, size
    inside = -_BEYOND <= left < right <= width + _BEYOND and -_BEYOND <= top < bottom <= height + _BEYOND
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    if not (inside and left < right and top < bottom):
        raise InputError(f"the box {list(box)} is no left, top, right, bottom within {width}x{height} pixels.")
    return left / width, top / height, right / width, bottom / height
