"""Examples: a picture, a question about it and the right answer, whatever form the picture has."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsem.data.boxes import Box, check_box
from jaxsem.data.questions import KINDS, questions_of
from jaxsem.data.scenes import SceneConfig, render, sample_scene
from jaxsem.data.scenes.world import DEFAULT, check_size
from jaxsem.errors import InputError
from jaxsem.files import why_unreadable
from jaxsem.metrics.captions import tokenize

FORMS = (*KINDS, "few_shot")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """A picture in any form.

    Attributes:
        name: What records call it; the pictures of one evaluation differ in their names.
        value: What the answerer gets: an image array, the bytes of a `.jsem` file, a path, or anything else.
        size: Height and width of the image in pixels, over which rates are reported.
        bits: What was sent of it, where that is not the value itself, as for a reconstruction.
    """

    name: str
    value: Any
    size: tuple[int, int]
    bits: int | None = None

    @property
    def sent_bits(self) -> int:
        """Its real size: `bits`, or that of the value's bytes, of the file it names or of its array.

        Raises:
            InputError: None of these is known, or the file is not there.
        """
        if self.bits is not None:
            return self.bits
        if isinstance(self.value, bytes | bytearray | memoryview):
            return 8 * memoryview(self.value).nbytes
        if isinstance(self.value, str | os.PathLike):
            try:
                return 8 * Path(self.value).stat().st_size
            except (OSError, ValueError) as error:
                raise InputError(why_unreadable(self.value, error)) from error
        if hasattr(self.value, "nbytes"):
            return 8 * int(self.value.nbytes)
        kind = type(self.value).__name__
        raise InputError(f"{self.name} is a {kind}, whose bytes are not known: give its bits, or `evaluate` a rate.")


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A question with its right answer.

    Attributes:
        form: One of FORMS.
        picture: What is asked about.
        text: The question; for a box the phrase alone; empty for few-shot.
        answer: The true option; "yes" or "no"; for few-shot the label. Not used for captions and boxes.
        options: For options, 2 to 26 different ones.
        references: For a caption the texts it is compared with.
        box: For a box, left, top, right and bottom as shares of the picture.
        category: Any name, for scores of its own; or empty.
        support: For few-shot the labelled pictures that are shown first.

    Raises:
        InputError: The parts do not make an example of this form.
    """

    form: str
    picture: Picture
    text: str = ""
    answer: str = ""
    options: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    box: Box | None = None
    category: str = ""
    support: tuple[tuple[Picture, str], ...] = ()

    def __post_init__(self):
        if self.form not in FORMS:
            raise InputError(f"there is no form {self.form!r}: use {', '.join(FORMS)}.")
        _CHECKS[self.form](self)

    @property
    def choices(self) -> tuple[str, ...]:
        """What the answer is one of: the options, or the labels of the support in their order."""
        return self.options or tuple(dict.fromkeys(label for _, label in self.support))

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All pictures in the order in which they are shown, the one asked about last."""
        return *(picture for picture, _ in self.support), self.picture


def _check_caption(example: Example) -> None:
    if not example.references or not all(tokenize(text) for text in example.references):
        raise InputError(f"a caption needs references, each with words, not {list(example.references)!r}.")


def _check_options(example: Example) -> None:
    _check_text(example)
    options = example.options
    if not 2 <= len(options) <= len(LETTERS) or len(set(options)) < len(options) or not all(map(str.strip, options)):
        raise InputError(f"options are 2 to {len(LETTERS)} different texts, not {list(options)!r}.")
    if example.answer not in options:
        raise InputError(f"the answer {example.answer!r} is none of the options {list(options)!r}.")


def _check_yes_no(example: Example) -> None:
    _check_text(example)
    if example.answer not in ("yes", "no"):
        raise InputError(f"the answer must be 'yes' or 'no', not {example.answer!r}.")


def _check_box(example: Example) -> None:
    _check_text(example)
    check_box(() if example.box is None else example.box)


def _check_few_shot(example: Example) -> None:
    labels = example.choices
    if len(labels) < 2 or not all(map(str.strip, labels)):
        raise InputError(f"few-shot examples need a support of at least two labels, not {list(labels)!r}.")
    if example.answer not in labels:
        raise InputError(f"the answer {example.answer!r} is none of the labels {list(labels)!r}.")


def _check_text(example: Example) -> None:
    if not example.text.strip():
        raise InputError(f"an example of the form {example.form!r} needs a text.")


_CHECKS: dict[str, Callable[[Example], None]] = {
    "caption": _check_caption,
    "options": _check_options,
    "yes_no": _check_yes_no,
    "box": _check_box,
    "few_shot": _check_few_shot,
}


def scene_examples(
    split: str,
    indices: Sequence[int],
    config: SceneConfig = DEFAULT,
    size: int | tuple[int, int] = 128,
    kinds: Sequence[str] = KINDS,
    seed: int = 0,
) -> list[Example]:
    """The questions of `jaxsem.data.questions` about scenes, with their pictures.

    Args:
        split: "train", "valid" or "test".
        indices: Numbers of the scenes.
        config: Which scenes are drawn; only its classes are named as absent.
        size: Side of the pictures, or (height, width).
        kinds: Which of `questions.KINDS`.
        seed: Of the questions.

    Raises:
        InputError: As from `sample_scene`, `render` and `questions_of`.
    """
    height_width = check_size(size)
    examples = []
    for index in indices:
        scene = sample_scene(split, int(index), config)
        picture = Picture(scene_name(split, int(index), config), render(scene, height_width), height_width)
        for asked in questions_of(scene, seed, kinds, classes=config.class_names, size=height_width):
            examples.append(
                Example(
                    form=asked.kind,
                    picture=picture,
                    text=asked.text,
                    answer=asked.answer,
                    options=asked.options,
                    references=asked.references,
                    box=asked.box,
                    category=asked.category,
                )
            )
    return examples


def scene_name(split: str, index: int, config: SceneConfig) -> str:
    """The name of a scene's picture, "scenes/unseen/objects=1-1/test/000012"; what is as by default is left out."""
    parts = ["scenes"]
    if config.classes != DEFAULT.classes:
        parts.append(config.classes if isinstance(config.classes, str) else "+".join(config.classes))
    if config.objects != DEFAULT.objects:
        parts.append("objects={}-{}".format(*config.objects))
    if config.sizes != DEFAULT.sizes:
        parts.append("+".join(config.sizes))
    if config.seed != DEFAULT.seed:
        parts.append(f"seed={config.seed}")
    return "/".join([*parts, split, f"{index:06d}"])


def transmit(
    examples: Sequence[Example],
    compress: Callable[[list[Any]], Sequence[bytes]],
    decompress: Callable[[Sequence[bytes]], Sequence[Any]] | None = None,
) -> list[Example]:
    """The examples as a receiver sees them: each picture is compressed once, and its real bytes are its rate.

    Args:
        examples: What to send.
        compress: Makes a file of each value, as `lambda images: jaxsem.compress(codec, images)`.
        decompress: Makes values of files, as `lambda files: jaxsem.decompress(codec, files)`, for answerers of images.
            None leaves the files, for answerers that read latents.

    Returns:
        The same examples in their order with new pictures of the same names and sizes.

    Raises:
        InputError: A function gives another number of things than it got, or two pictures have the same name.
    """
    pictures = distinct_pictures(examples)
    files = _as_many(compress([picture.value for picture in pictures.values()]), pictures, "compress")
    values = files if decompress is None else _as_many(decompress(files), pictures, "decompress")
    sent = {
        name: Picture(name, value, picture.size, 8 * len(file))
        for (name, picture), file, value in zip(pictures.items(), files, values, strict=True)
    }
    return [
        dataclasses.replace(
            example,
            picture=sent[example.picture.name],
            support=tuple((sent[picture.name], label) for picture, label in example.support),
        )
        for example in examples
    ]


def distinct_pictures(examples: Sequence[Example]) -> dict[str, Picture]:
    """The pictures of examples by name, in order of first appearance.

    Raises:
        InputError: Two different ones have the same name.
    """
    found: dict[str, Picture] = {}
    for picture in _all_pictures(examples):
        known = found.setdefault(picture.name, picture)
        if known is not picture and not _same(known, picture):
            raise InputError(f"two different pictures are called {picture.name!r}: give each its own name.")
    return found


def _same(first: Picture, second: Picture) -> bool:
    if (first.size, first.bits) != (second.size, second.bits):
        return False
    if hasattr(first.value, "shape"):
        return np.array_equal(first.value, second.value)
    return first.value is second.value or bool(first.value == second.value)


def _all_pictures(examples: Sequence[Example]) -> Iterator[Picture]:
    for example in examples:
        yield from example.pictures


def _as_many(things: Sequence[Any], pictures: dict[str, Picture], name: str) -> list[Any]:
    things = list(things)
    if len(things) != len(pictures):
        raise InputError(f"`{name}` made {len(things)} things of {len(pictures)}: it must give one for each, in order.")
    return things
