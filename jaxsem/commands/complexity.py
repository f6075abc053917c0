"""`jaxsem complexity`: what reading latents costs and what decoding and reading images costs, from the modules themselves."""

import dataclasses
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jaxsem.backbones.clip import VisionTower
from jaxsem.backbones.clip_config import VIT_L14
from jaxsem.codecs import Elic, ElicConfig, Tic, TicConfig
from jaxsem.commands import console
from jaxsem.complexity import Complexity, kmac_per_pixel, module_complexity
from jaxsem.nn.unet import Unet, UnetConfig
from jaxsem.systems.transform_neck import NeckConfig, TransformNeck

_SIDE = 256  # pixels of the codec's images
_GRID = _SIDE // 16


@dataclass(frozen=True)
class Part:
    """One component.

    Attributes:
      name: What it is.
      group: "latents" or "images": which of the two ways it belongs to; "other" for none.
      found: What it costs.
      published: Millions of parameters and kMAC a pixel in Table 3 of papers/2, None where it is not there.
      note: Why a published figure differs.
    """

    name: str
    group: str
    found: Complexity
    published: tuple[float, float] | None = None
    note: str = ""


def parts() -> Iterator[Part]:
    """The components of papers/2, Table 3, at 256 x 256 pixels, and those of the other codec of section 4.6."""
    array = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    latent = array((1, _GRID, _GRID, 320))
    yield Part(
        "transform-neck (ELIC to ViT-L/14)",
        "latents",
        module_complexity(TransformNeck(NeckConfig(320, VIT_L14.vision, (_GRID, _GRID))), latent),
        (13.19, 52.795),
        "the published count has softmax, normalisation and biases besides the matrix products.",
    )
    yield Part(
        "ELIC decoder",
        "images",
        module_complexity(Elic(ElicConfig()), latent, array((1,)), method="synthesize"),
        (7.34, 112.00),
        "112.00 kMAC a pixel are 7.34 GMAC: the number of parameters, read as that of operations.",
    )
    yield Part(
        "post-processing U-Net",
        "images",
        module_complexity(Unet(UnetConfig()), array((1, _SIDE, _SIDE, 3))),
        (31.04, 835.72),
        "the published count has transposed convolutions on their output's grid, and normalisation, ReLU and pooling besides.",
    )
    yield Part(
        "CLIP's patches and first two layers",
        "images",
        _first_layers(2),
        (25.78, 70.24),
        "the published count misses the projections of attention and one of its two products; its parameters are without "
        "positions, class token and the norm before the layers.",
    )
    tic = TicConfig()
    yield Part(
        "TIC decoder (M=192)",
        "other",
        module_complexity(Tic(tic), array((1, _GRID, _GRID, tic.latent)), array((1,)), method="synthesize"),
    )
    yield Part(
        "transform-neck (TIC to ViT-L/14)",
        "other",
        module_complexity(
            TransformNeck(NeckConfig(tic.latent, VIT_L14.vision, (_GRID, _GRID))), array((1, _GRID, _GRID, tic.latent))
        ),
    )


def _first_layers(layers: int) -> Complexity:
    """Of ViT-L/14 at 224 pixels, to which the images of 256 are reduced."""
    tower = VisionTower(dataclasses.replace(VIT_L14.vision, layers=layers))
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    return module_complexity(tower, images, method=lambda t, x: t.run_layers(t.embed(x)))


def run(args: Namespace) -> int:
    """Prints the table; returns the exit status."""
    found = list(parts())
    rows = [_row(part) for part in found]
    sums = {group: _sum(rows, group) for group in ("latents", "images")}
    ratio = sums["images"]["kmac"] / sums["latents"]["kmac"]
    if args.json:
        console.say_json({"pixels": [_SIDE, _SIDE], "parts": rows, "sums": sums, "ratio": ratio})
        return 0
    head = ("component", "parameters", "kMAC/pixel", "as done", "XLA kFLOP/pixel", "published")
    lines = [head, *(_line(row) for row in rows)]
    lines += [
        (f"all that {group} take", f"{row['parameters']:,}", f"{row['kmac']:.1f}", f"{row['kmac_done']:.1f}", "", "")
        for group, row in sums.items()
    ]
    console.say(console.table(lines, left=1))
    console.say("")
    console.say(
        f"{_SIDE} x {_SIDE} pixels. Decoding and reading images takes {ratio:.1f} times the neck's operations (published: 19.3)."
    )
    console.say(
        "kMAC/pixel are multiply-accumulates of the layers as written down; as done, those of our transposed convolutions too."
    )
    for row in rows:
        if row["note"]:
            console.say(f"{row['name']}: {row['note']}")
    return 0


def _row(part: Part) -> dict:
    flops = part.found.flops_xla
    return {
        "name": part.name,
        "group": part.group,
        "parameters": part.found.parameters,
        "kmac": kmac_per_pixel(part.found.textbook_macs, _SIDE, _SIDE),
        "kmac_done": kmac_per_pixel(part.found.macs, _SIDE, _SIDE),
        "xla_kflop": None if flops is None else flops / (1000 * _SIDE**2),
        "published": part.published,
        "note": part.note,
    }


def _sum(rows: list[dict], group: str) -> dict:
    return {key: sum(row[key] for row in rows if row["group"] == group) for key in ("parameters", "kmac", "kmac_done")}


def _line(row: dict) -> tuple[str, ...]:
    published = "" if row["published"] is None else "{:.2f} M, {:.2f}".format(*row["published"])
    xla = "-" if row["xla_kflop"] is None else f"{row['xla_kflop']:.1f}"
    return (row["name"], f"{row['parameters']:,}", f"{row['kmac']:.1f}", f"{row['kmac_done']:.1f}", xla, published)
