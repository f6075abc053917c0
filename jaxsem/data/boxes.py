"""Boxes as text: how a language model says where something is.

A box is (left, top, right, bottom) in shares of the picture's width and height, 0 to 1. As text it is "[12, 30, 55, 80]":
whole percents, which a small vocabulary can hold. Large models write decimals instead, and `read_box` takes both:

    LLaVA-1.5    "[0.12, 0.3, 0.55, 0.8]"          shares of the square to which the picture is padded (`from_square`)
    Shikra       "[0.120,0.300,0.550,0.800]"       the same with three digits (Chen et al., Shikra, 2023, section 4)

Both pad the shorter side with equal bars, so only for square pictures are these the shares of the picture itself.
"""

import math
import re
from collections.abc import Sequence

from jaxsem.errors import InputError

Box = tuple[float, float, float, float]

_NUMBER = r"-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_LIST = rf"{_NUMBER}(?:\s*,\s*{_NUMBER})*"
_FORMS = (re.compile(rf"[\[(]\s*({_LIST})\s*[\])]"), re.compile(rf"({_LIST})"))  # what stands in brackets comes first


def format_box(box: Sequence[float]) -> str:
    """Writes a box as whole percents.

    Args:
        box: Left, top, right, bottom, as shares of the picture.

    Returns:
        "[12, 30, 55, 80]". A side thinner than half a percent is widened to one, so that no box vanishes.

    Raises:
        InputError: It is no box within the picture.

    Example:
        >>> format_box((0.117, 0.3, 0.55, 0.804))
        '[12, 30, 55, 80]'
    """
    left, top, right, bottom = check_box(box)
    (left, right), (top, bottom) = _percents(left, right), _percents(top, bottom)
    return f"[{left}, {top}, {right}, {bottom}]"


def read_box(text: str) -> Box | None:
    """Finds the box in an answer; never fails, whatever the text is.

    The first list of exactly four numbers counts, one in brackets before one without. Numbers up to 1 of which any has a
    decimal point are shares; all others are percents, so that "[0, 0, 1, 1]" is the hundredth part of each side.

    Args:
        text: What a model said.

    Returns:
        Shares of the picture, or None: no such list, or one that is no box within the picture.

    Example:
        >>> read_box("It is at [12, 30, 55, 80].")
        (0.12, 0.3, 0.55, 0.8)
        >>> read_box("Answer: [0.120,0.300,0.550,0.800] .")
        (0.12, 0.3, 0.55, 0.8)
    """
    for form in _FORMS:
        for match in form.finditer(text):
            numbers = match[1].split(",")
            if len(numbers) == 4:
                return _box_of(numbers, [float(number) for number in numbers])
    return None


def check_box(box: Sequence[float]) -> Box:
    """The box as four plain numbers.

    Raises:
        InputError: It is not left, top, right, bottom within the picture, all from 0 to 1.
    """
    values = tuple(box)
    if len(values) != 4 or not all(isinstance(value, int | float) or hasattr(value, "dtype") for value in values):
        raise InputError(f"a box is left, top, right and bottom, four numbers, not {box!r}.")
    left, top, right, bottom = map(float, values)
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise InputError(f"{values} is no left, top, right, bottom within the picture: give shares from 0 to 1.")
    return left, top, right, bottom


def iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two boxes, 0 to 1; 0 if both are empty.

    Example:
        >>> iou((0.0, 0.0, 0.5, 0.5), (0.25, 0.0, 0.75, 0.5))
        0.3333333333333333
    """
    across = min(first[2], second[2]) - max(first[0], second[0])
    down = min(first[3], second[3]) - max(first[1], second[1])
    both = max(across, 0.0) * max(down, 0.0)
    either = _area(first) + _area(second) - both
    return both / either if either > 0 else 0.0


def to_square(box: Sequence[float], size: tuple[int, int]) -> Box:
    """A box in shares of the square to which a picture of `size` (height, width) is padded, with equal bars."""
    (left, top, right, bottom), (across, down), (wide, high) = box, *_bars(size)
    return across + left * wide, down + top * high, across + right * wide, down + bottom * high


def from_square(box: Sequence[float], size: tuple[int, int]) -> Box:
    """The inverse of `to_square`, cut to the picture: a box within a bar becomes empty."""
    (left, top, right, bottom), (across, down), (wide, high) = box, *_bars(size)
    shares = (left - across) / wide, (top - down) / high, (right - across) / wide, (bottom - down) / high
    return tuple(min(max(share, 0.0), 1.0) for share in shares)


def _bars(size: tuple[int, int]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Width of the left and height of the upper bar, and width and height of the picture, in shares of the square."""
    height, width = size
    side = max(height, width)
    return ((side - width) / 2 / side, (side - height) / 2 / side), (width / side, height / side)


def _percents(low: float, high: float) -> tuple[int, int]:
    first, last = int(100 * low + 0.5), int(100 * high + 0.5)
    if first == last:
        first = math.floor(100 * low)
        last = max(math.ceil(100 * high), first + 1)
        first -= last > 100
    return first, min(last, 100)


def _box_of(texts: Sequence[str], values: Sequence[float]) -> Box | None:
    shares = max(values) <= 1 and any("." in text for text in texts)
    left, top, right, bottom = values if shares else (value / 100 for value in values)
    fits = 0 <= left < right <= 1 and 0 <= top < bottom <= 1
    return (left, top, right, bottom) if fits else None


def _area(box: Sequence[float]) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)
