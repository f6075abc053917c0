"""A picture of what files of some tens of bytes know: scenes, their classes, captions and a phrase found.

python tools/feature_sheet.py [PRESET] [--scenes N ...] --out docs/features.png
"""

import argparse
import sys
import textwrap
from pathlib import Path

import jaxsem
from jaxsem import feature_demo
from jaxsem.errors import JaxsemError
from jaxsem.files import check_output

_WRAP = 30


def draw(codec: jaxsem.FeatureCodec, numbers: list[int], out: Path, force: bool = False) -> None:
    """Draws one column for each scene into a PNG file.

    Raises:
      OutputError: The file exists and `force` is false, or cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    check_output(out, force)
    seen = [feature_demo.look_at(codec, number) for number in numbers]
    figure, axes = plt.subplots(2, len(seen), figsize=(3.1 * len(seen), 7.4), squeeze=False)
    for (above, below), (shown, data, image, marked) in zip(axes.T, seen, strict=True):
        above.imshow(image)
        below.imshow(marked)
        name, share = shown.classes[0]
        wrapped = "\n".join(textwrap.wrap(f"“{shown.caption}”", _WRAP))
        above.set_title(f"{len(data)} bytes: {name} {100 * share:.0f} %", fontsize=10, fontweight="bold")
        above.set_xlabel(wrapped, fontsize=9)
        below.set_xlabel("\n".join(textwrap.wrap(f"found: “{shown.phrase}”", _WRAP)), fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        for side in axis.spines.values():
            side.set_visible(False)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Draws the picture; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "preset", metavar="PRESET", nargs="?", default="pqvae-mini", help="a codec of features (%(default)s)"
    )
    scenes = list(feature_demo.SCENES)
    parser.add_argument(
        "--scenes", metavar="N", type=int, nargs="+", default=scenes, help=f"of the test split ({scenes})"
    )
    parser.add_argument("--out", metavar="FILE.png", type=Path, required=True, help="the picture")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    options = parser.parse_args(arguments)
    try:
        draw(jaxsem.load(options.preset), options.scenes, options.out, options.force)
    except JaxsemError as error:
        print(f"feature_sheet: {error}", file=sys.stderr)
        return 2
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
