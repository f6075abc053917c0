"""What the user's words and marks mean for a codec that can be told what matters: options of `jaxsem compress`."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxsem.data.images import read_image
from jaxsem.errors import InputError
from jaxsem.files import read_bytes
from jaxsem.systems.rsic import Demand, Phrase
from jaxsem.systems.weight_map import Box, Click, Mask, Region

OPTIONS = {
    "refer": "--refer",
    "refer_box": "--refer-box",
    "refer_mask": "--refer-mask",
    "refer_click": "--refer-click",
    "background": "--background",
    "levels": "--levels",
    "text": "--text",
}


def settle(codec: Any, args: Namespace) -> tuple[Any, Demand | None]:
    """The codec with the levels that `args` ask for, and what they demand of every image; None of a codec that cannot be asked.

    Raises:
      InputError: A demand that is none, or one of a codec that cannot be asked.
    """
    given = [option for name, option in OPTIONS.items() if getattr(args, name) not in (None, [])]
    if not getattr(codec, "referring", False):
        if given:
            raise InputError(
                f"{codec.name} compresses whole images alike, so that {', '.join(given)} cannot be met: name a preset of RSIC"
            )
        return codec, None
    if args.levels is not None:
        codec = codec.with_levels(args.levels)
        codec = codec if args.quality is None else codec.at_quality(args.quality)
    demand = Demand(
        args.text,
        tuple(Phrase(*_weighted(text)) for text in args.refer),
        tuple(_region(kind, text) for kind in ("box", "mask", "click") for text in getattr(args, f"refer_{kind}")),
        background=0.0 if args.background is None else args.background,
    )
    if demand.text is not None:
        codec.text.cut(demand.text)  # refuses words that the model does not know, before any work
    return codec, demand


def _weighted(text: str) -> tuple[str, float]:
    """What is marked, and its weight: 1, or what stands behind the last @."""
    what, at, weight = text.rpartition("@")
    try:
        return (what, float(weight)) if at else (text, 1.0)
    except ValueError:
        return text, 1.0


def _region(kind: str, text: str) -> Region:
    what, weight = _weighted(text)
    if kind == "mask":
        return Mask(_read_mask(what), weight=weight)
    make, names = _SHAPES[kind]
    try:
        numbers = [int(part) for part in what.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != len(names):
        raise InputError(f"--refer-{kind} takes whole numbers {','.join(names)} with no spaces, not {text!r}")
    return make(*numbers, weight=weight)


_SHAPES: dict[str, tuple[Callable[..., Region], tuple[str, ...]]] = {
    "box": (Box, ("x", "y", "width", "height")),
    "click": (Click, ("x", "y")),
}


def _read_mask(path: str) -> np.ndarray:
    """The mask, bool [height, width]: where a picture is brighter than half, or the array in a .npy file."""
    if Path(path).suffix != ".npy":
        return read_image(path).mean(axis=2) > 127.5
    import io

    try:
        mask = np.load(io.BytesIO(read_bytes(Path(path))), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"{path} is no array of NumPy: {error}") from error
    if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.ndim != 2:
        raise InputError(f"{path} holds no mask: that is an array bool [height, width], or a picture")
    return mask
