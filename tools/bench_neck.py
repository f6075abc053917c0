"""Seconds from a codec's latents to the third layer of CLIP ViT-L/14: through the transform-neck, and through an image.

    python tools/bench_neck.py [--batch 1 8] [--bfloat16] [--json FILE]

The published sizes with random weights, at 256x256: ELIC's latent 320 x 16 x 16. Stage by stage, warm, all stages in turn, again
and again, so that a busy machine slows them alike:

    neck        latents to the tokens that the third layer takes
    decode      latents to an image
    U-Net       post-processing of the image
    two layers  patches and the first two layers of CLIP, from the image reduced to 224x224

What follows is the same for both ways. The ratio is that of the last three together to the first (papers/2, Table 3, has their
operations: `jaxsem complexity`).
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import _timing
import jax
import jax.numpy as jnp
import numpy as np
from _timing import Spread

from jaxsem.backbones.clip import VisionTower
from jaxsem.backbones.clip_config import VIT_L14
from jaxsem.backbones.clip_inputs import normalize
from jaxsem.codecs import Elic, ElicConfig
from jaxsem.nn.unet import Unet, UnetConfig
from jaxsem.systems.transform_neck import NeckConfig, TransformNeck

SIDE, GRID, REPETITIONS = 256, 16, 7
STAGES = ("neck", "decode", "U-Net", "two layers")


def make_stages(batch: int, dtype: Any, quick: bool) -> dict[str, Callable[[], jax.Array]]:
    """A call of each stage on its own random input and parameters."""
    vision = dataclasses.replace(VIT_L14.vision, layers=2)
    unet, elic = UnetConfig(), ElicConfig()
    if quick:
        vision = dataclasses.replace(vision, width=32, heads=2, hidden=64)
        unet, elic = UnetConfig((4, 8)), ElicConfig((8, 8, 8), 16, 8, (4, 12), (8, 8))
    neck = TransformNeck(NeckConfig(elic.latent, vision, (GRID, GRID)), dtype)
    latent, image = (batch, GRID, GRID, elic.latent), (batch, SIDE, SIDE, 3)

    def reduced(tower: VisionTower, x: jax.Array) -> jax.Array:
        small = jax.image.resize(x, (len(x), *vision.height_width, 3), "cubic")
        return tower.run_layers(tower.embed(normalize(small)))

    quality = np.zeros(batch, np.float32)
    modules = {
        "neck": (neck, latent, None, ()),
        "decode": (Elic(elic, dtype), latent, "synthesize", (quality,)),
        "U-Net": (Unet(unet, dtype), image, None, ()),
        "two layers": (VisionTower(vision, dtype), image, reduced, ()),
    }
    return {name: _call(*parts) for name, parts in modules.items()}


def _call(module: Any, shape: tuple[int, ...], method: Any, others: tuple) -> Callable[[], jax.Array]:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(0, 1, shape), jnp.float32)
    shapes = jax.eval_shape(lambda key: module.init(key, x, *others, method=method), jax.random.key(0))
    variables = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.02, s.shape), s.dtype), shapes)
    # Variances, which are positive.
    variables = {
        name: jax.tree.map(jnp.abs, tree) if name == "batch_stats" else tree for name, tree in variables.items()
    }
    run = jax.jit(lambda variables, x: module.apply(variables, x, *others, method=method))
    return lambda: run(variables, x)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times everything and prints a table for each batch size."""
    dtype = jnp.bfloat16 if options.bfloat16 else jnp.float32
    found: dict[str, Any] = {}
    for batch in options.batch:
        stages = make_stages(batch, dtype, options.quick)
        for call in stages.values():
            _timing.seconds(call)  # compiles
        seconds: dict[str, list[float]] = {name: [] for name in STAGES}
        for _ in range(2 if options.quick else REPETITIONS):
            for name, call in stages.items():
                seconds[name].append(_timing.seconds(call))
        spreads = {name: Spread.of(values) for name, values in seconds.items()}
        ratios = [sum(each[1:]) / each[0] for each in zip(*seconds.values())]
        ratio = Spread.of(ratios)
        print(f"batch {batch}: decode, U-Net and two layers take {ratio.show(1)} times as long as the neck")
        rows = [
            [name, Spread.of(1e3 * np.array(seconds[name])).show(), f"{batch / spread.median:,.1f}"]
            for name, spread in spreads.items()
        ]
        _timing.print_table(["", "ms", "images/s"], rows)
        found[str(batch)] = {"ratio": asdict(ratio), **{name: asdict(spread) for name, spread in spreads.items()}}
    return {"pixels": [SIDE, SIDE], "type": str(jnp.dtype(dtype)), "batches": found}


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = _timing.parser(__doc__, "tiny networks, repeated twice")
    parser.add_argument("--batch", type=_timing.positive, nargs="+", default=[1, 8], help="images at once (1 8)")
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16")
    options = parser.parse_args(arguments)
    return _timing.run("bench_neck", options, lambda: measure(options))


if __name__ == "__main__":
    sys.exit(main())
