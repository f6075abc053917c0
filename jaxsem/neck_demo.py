"""The demo's third part: files whose images are never decoded, and what a language model answers about them."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from jaxsem import pipeline
from jaxsem.container import pack
from jaxsem.data.boxes import Box, read_box
from jaxsem.data.images import write_image
from jaxsem.data.scenes import SceneConfig, render, sample_scene
from jaxsem.demo_page import SIDE, picture
from jaxsem.files import write_file
from jaxsem.progress import Progress
from jaxsem.systems.neck_codec import Reader
from jaxsem.tasks.examples import Example, scene_examples
from jaxsem.tasks.prompts import PLAIN, prompt_of

SCENES = (0, 1, 2)
"""Scenes of the test split that the page shows."""

_CONFIG = SceneConfig("seen", objects=(1, 3))
_ASKED = ("caption", "options", "yes_no", "box")
_TOKENS = 48  # of an answer at most; the longest captions of `scenes` have some 40
_RED = (230, 30, 60)


@dataclass(frozen=True)
class Shown:
    """One scene on the page.

    Attributes:
      name: Of its files.
      size: Bytes of its `.jsem` file.
      answers: Questions, each with what the model said.
      phrase: What was asked for its place.
      box: What the model said, or None where that is no box.
    """

    name: str
    size: int
    answers: tuple[tuple[str, str], ...]
    phrase: str
    box: Box | None


@dataclass(frozen=True)
class Look:
    """A scene's pictures and file beside what is shown of it.

    Attributes:
      shown: What is shown.
      data: The file.
      image: The scene, with the box that the model named.
      again: What the file decodes to, which the model did not see.
    """

    shown: Shown
    data: bytes
    image: np.ndarray
    again: np.ndarray


def show_answers(reader: Reader, out: Path, force: bool, quiet: bool) -> list[Shown]:
    """Writes pictures and `.jsem` files of some scenes into a folder, and asks about the files.

    Raises:
      OutputError: A file exists and `force` is false, or cannot be written.
    """
    with Progress(len(SCENES), "scenes", quiet) as progress:
        looks = look_at(reader, SCENES)
        for look in looks:
            stem = out / look.shown.name
            write_image(stem.with_suffix(".png"), look.image, force)
            write_image(out / f"{look.shown.name}-decoded.png", look.again, force)
            write_file(stem.with_suffix(".jsem"), look.data, force)
            progress.step()
    return [look.shown for look in looks]


def look_at(reader: Reader, numbers: Sequence[int]) -> list[Look]:
    """Compresses scenes of the test split, and asks the language model about the files: one question of each kind."""
    asked = [_one_of_each_kind(number, reader.mllm.module.config.side) for number in numbers]
    images = [examples[0].picture.value for examples in asked]
    files = [pack(result.item, reader.codec.digest) for result in pipeline.compress_items(reader.codec, images)]
    prompts = [prompt_of(PLAIN, example, ranked=True) for examples in asked for example in examples]
    seen = [data for data, examples in zip(files, asked, strict=True) for _ in examples]
    said = iter(reader.answer(seen, prompts, max_new_tokens=_TOKENS))
    looks = []
    for number, data, examples, again in zip(
        numbers, files, asked, pipeline.decompress(reader.codec, files), strict=True
    ):
        answers = [(example.text, next(said)) for example in examples]
        phrase, place = answers.pop()
        box = read_box(place)
        shown = Shown(f"question-{number}", len(data), tuple(answers), phrase, box)
        image = render(sample_scene("test", number, _CONFIG), SIDE)
        looks.append(Look(shown, data, image if box is None else outlined(image, box), again))
    return looks


def _one_of_each_kind(number: int, side: int) -> list[Example]:
    """A caption, a question with options, one of yes or no, and a box, in this order."""
    found = scene_examples("test", [number], _CONFIG, side, _ASKED)
    kinds = {kind: [example for example in found if example.form == kind] for kind in _ASKED}
    return [kinds[kind][number % 2 if kind == "yes_no" else 0] for kind in _ASKED]


def outlined(image: np.ndarray, box: Box) -> np.ndarray:
    """The image, uint8 [h, w, 3], with the outline of a box."""
    height, width = image.shape[:2]
    picture = Image.fromarray(image)
    left, top, right, bottom = (share * side for share, side in zip(box, (width, height) * 2))
    ImageDraw.Draw(picture).rectangle((left, top, max(left, right), max(top, bottom)), outline=_RED, width=3)
    return np.asarray(picture)


def summary(shown: Sequence[Shown]) -> str:
    """What the terminal says of the scenes."""
    lines = [(one.name, one.size, *answer) for one in shown for answer in one.answers[1:]]
    return "\n".join(f"{name:<12}{size:>4} bytes: {question} {said}" for name, size, question, said in lines)


def section(reader: Reader, shown: Sequence[Shown]) -> str:
    """The page's part on the scenes."""
    size = np.mean([one.size for one in shown])
    return (
        f"<h2>Answers from {size:.0f} bytes, no image decoded</h2>"
        f"<p>Drawn scenes as files of <b>{html.escape(reader.codec.name)}</b>. Their latents go through the transform-neck into "
        f"the image tower of <b>{html.escape(reader.mllm.name)}</b>, which answers. The decoded picture is shown for people; the "
        "model never saw it.</p>" + "".join(_rows(one) for one in shown)
    )


def _rows(one: Shown) -> str:
    answers = "".join(f"<p>{html.escape(question)}<br><b>{html.escape(said)}</b></p>" for question, said in one.answers)
    place = f"where is “{html.escape(one.phrase)}”? " + ("no box was named" if one.box is None else "in the red box")
    return (
        "<div class='strip' style='margin-top: 1rem'>"
        + picture(f"{one.name}.png", f"<b>The scene</b>: {place}")
        + f"<div><p><b>{one.size} bytes</b></p>{answers}</div>"
        + picture(f"{one.name}-decoded.png", "What people see of the same file")
        + "</div>"
    )
