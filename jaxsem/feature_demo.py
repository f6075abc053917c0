"""The demo's second part: scenes as features of some tens of bytes, which still know what was in the picture."""

import html
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxsem import pipeline
from jaxsem.commands.refer import highlighted
from jaxsem.container import pack
from jaxsem.data.images import write_image
from jaxsem.data.scenes import CLASSES, SceneConfig, captions, refer, render, sample_scene
from jaxsem.demo_page import SIDE, picture
from jaxsem.errors import InputError
from jaxsem.files import write_file
from jaxsem.progress import Progress
from jaxsem.systems import feature_tasks, regions
from jaxsem.systems.feature_codec import FeatureCodec

SCENES = (0, 1, 2, 3, 4)
"""Scenes of the test split that the page shows."""

_TOP = 3


@dataclass(frozen=True)
class Shown:
    """One scene on the page.

    Attributes:
      name: Of its files.
      truth: A caption that is true of it.
      phrase: What is looked for.
      size: Bytes of its `.jsem` file.
      classes: The likeliest classes and their probabilities, from the file.
      caption: The sentence that is written from the file.
      score: Similarity of the phrase and the region that was found, or None where no region stands out.
      bits: Of the compressed features of all regions.
    """

    name: str
    truth: str
    phrase: str
    size: int
    classes: tuple[tuple[str, float], ...]
    caption: str
    score: float | None
    bits: int


def show_scenes(codec: FeatureCodec, out: Path, force: bool, quiet: bool) -> list[Shown]:
    """Writes pictures and `.jsem` files of some scenes into a folder, and says what the files know.

    Raises:
      OutputError: A file exists and `force` is false, or cannot be written.
    """
    shown = []
    with Progress(len(SCENES), "scenes", quiet) as progress:
        for number in SCENES:
            one, data, image, marked = look_at(codec, number)
            write_image(out / f"{one.name}.png", image, force)
            write_image(out / f"{one.name}-refer.png", marked, force)
            write_file(out / f"{one.name}.jsem", data, force)
            shown.append(one)
            progress.step()
    return shown


def look_at(codec: FeatureCodec, number: int) -> tuple[Shown, bytes, np.ndarray, np.ndarray]:
    """Compresses a scene of the test split and uses what comes back.

    Returns:
      What is known from the file, the file, the picture, and the picture with all but the region that was found darkened.
    """
    scene, name = sample_scene("test", number, SceneConfig("all", objects=(1, 3))), f"scene-{number}"
    image = render(scene, SIDE)
    [result] = pipeline.compress_items(codec, [image])
    data = pack(result.item, codec.digest)
    features = feature_tasks.read_features(codec, [data])
    [classes] = feature_tasks.classify(codec, features, CLASSES)
    [caption] = feature_tasks.caption(codec, features)
    phrase = refer(scene)[-1][0].text
    try:
        found = feature_tasks.refer(codec, image, phrase, regions.propose(image), in_place=True)
    except InputError:  # a picture without a region that stands out is shown as it is
        score, bits, marked = None, 0, image
    else:
        score, bits, marked = found.score, found.bits, highlighted(image, found.mask)
    truth = captions(scene)[3]
    shown = Shown(name, truth, phrase, len(data), tuple(classes[:_TOP]), caption, score, bits)
    return shown, data, image, marked


def summary(shown: list[Shown]) -> str:
    """What the terminal says of the scenes."""
    return "\n".join(f"{one.name:<12}{one.size:>4} bytes: {one.caption}" for one in shown)


def section(codec: FeatureCodec, shown: list[Shown]) -> str:
    """The page's part on the scenes."""
    bits = np.mean([one.size for one in shown])
    return (
        f"<h2>Meaning in {bits:.0f} bytes</h2>"
        f"<p>Drawn scenes as files of <b>{html.escape(codec.name)}</b>: a feature of CLIP, quantised and coded, no picture. The "
        "classes, of 64 that it knows by their names, and the sentence come from the file alone. Last, a phrase is looked for "
        "among the compressed features of regions.</p>" + "".join(_rows(one) for one in shown)
    )


def _rows(one: Shown) -> str:
    classes = "<br>".join(f"{html.escape(name)} {100 * share:.0f} %" for name, share in one.classes)
    where = "no region stands out" if one.score is None else f"score {one.score:.2f}, regions in {one.bits} bits"
    return (
        "<div class='strip' style='margin-top: 1rem'>"
        + picture(f"{one.name}.png", f"<b>The scene</b>: {html.escape(one.truth)}")
        + f"<div><p><b>{one.size} bytes</b></p><p>{classes}</p><p>“{html.escape(one.caption)}”</p></div>"
        + picture(f"{one.name}-refer.png", f"<b>“{html.escape(one.phrase)}”</b>: {where}")
        + "</div>"
    )
