"""A picture of what small files know: scenes, and what comes out of their bytes.

    python tools/scene_sheet.py features --out docs/features.png
    python tools/scene_sheet.py answers --out docs/neck.png

The first shows classes, a caption and a phrase found by `pqvae-mini`, the second answers of `llava-mini` through
`transform-neck-mini-d2`.
"""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import rd_plot
from matplotlib.figure import Figure

import jaxsem
from jaxsem import demo, feature_demo, neck_demo
from jaxsem.errors import JaxsemError
from jaxsem.files import check_output
from jaxsem.systems.neck_codec import Reader

_WRAP = 40


@dataclass(frozen=True)
class Panel:
    """A picture with words.

    Attributes:
        image: uint8 [h, w, 3].
        title: Above it.
        lines: Below it.
    """

    image: np.ndarray
    title: str
    lines: tuple[str, ...]


def draw(columns: Sequence[tuple[Panel, Panel]]) -> Figure:
    """One column for each scene, two pictures in it."""
    with matplotlib.rc_context(rd_plot.STYLE):
        figure = Figure(figsize=(3.3 * len(columns), 8.8), layout="constrained", facecolor="white")
        for axes, panels in zip(figure.subplots(2, len(columns), squeeze=False).T, columns, strict=True):
            for axis, panel in zip(axes, panels, strict=True):
                axis.imshow(panel.image)
                axis.set_title(panel.title, fontsize=10, fontweight="bold", color=rd_plot.INK)
                wrapped = ["\n".join(textwrap.wrap(line, _WRAP, subsequent_indent="  ")) for line in panel.lines]
                axis.set_xlabel("\n".join(wrapped), fontsize=9, color=rd_plot.INK)
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
    return figure


def features(numbers: Sequence[int]) -> list[tuple[Panel, Panel]]:
    """What `pqvae-mini` knows of scenes of the test split."""
    codec, columns = jaxsem.load(demo.FEATURES_PRESET), []
    for number in numbers:
        shown, data, image, marked = feature_demo.look_at(codec, number)
        name, share = shown.classes[0]
        above = Panel(image, f"{len(data)} bytes: {name} {100 * share:.0f} %", (f"“{shown.caption}”",))
        columns.append((above, Panel(marked, "", (f"found: “{shown.phrase}”",))))
    return columns


def answers(numbers: Sequence[int]) -> list[tuple[Panel, Panel]]:
    """What `llava-mini` answers about files of `transform-neck-mini-d2` at its lowest rate."""
    reader = Reader(jaxsem.load(demo.NECK_PRESET, quality=0), jaxsem.load_mllm(demo.LANGUAGE_PRESET))
    columns = []
    for look in neck_demo.look_at(reader, numbers):
        shown = look.shown
        place = "no box" if shown.box is None else "the red box"
        said = [f"{question} — {answer}" for question, answer in shown.answers[1:]]
        above = Panel(look.image, f"{shown.size} bytes", (*said, f"Where is {shown.phrase}? — {place}"))
        columns.append((above, Panel(look.again, "decoded, for people", (f"“{shown.answers[0][1]}”",))))
    return columns


_KINDS = {"features": (features, feature_demo.SCENES), "answers": (answers, (0, 1, 2, 3, 4))}


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws the picture; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(_KINDS), help="what is shown")
    parser.add_argument("--scenes", metavar="N", type=int, nargs="+", help="of the test split (five)")
    parser.add_argument("--out", metavar="FILE.png", type=Path, required=True, help="the picture")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    options = parser.parse_args(arguments)
    look, numbers = _KINDS[options.kind]
    try:
        rd_plot.check_suffix(options.out)
        check_output(options.out, options.force)
        rd_plot.save(draw(look(options.scenes or numbers)), options.out, options.force)
    except JaxsemError as error:
        print(f"scene_sheet: {error}", file=sys.stderr)
        return 2
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
