"""How long a latent of a serial context model takes to code, position after position in one compiled program.

    python tools/bench_serial.py [--size 768x512] [--latent 192] [--batch 1] [--arithmetic exact] [--json FILE]

The model is mbt2018 at its published widths with random weights, whose scales are set channel by channel, log-uniformly in
[0.05, 5], with latents drawn to match: some two thirds of all symbols are zero, as in photos at a middle rate. Timed are the
loop of `jaxsem.codecs.serial` with the entropy decoder's steps in it, warm, for both directions, and the encoder's host part. The
decoded symbols are compared with the encoder's, or the run stops. With `--compressai`, where it is installed, its own
decoder of the same network and size decodes as many symbols of the same kind, its synthesis not counted.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _timing
import jax
import jax.numpy as jnp
import numpy as np
from _timing import Spread

import jaxsem
from jaxsem import codec as driver
from jaxsem.codec import Codec
from jaxsem.codecs import JointConfig, JointHyperprior, init_params
from jaxsem.errors import InputError
from jaxsem.presets import bundled_photos, freeze

REPETITIONS, QUICK_REPETITIONS = 7, 2
LOW, HIGH = 0.05, 5.0  # standard deviations of the latent's channels


def make_codec(channels: int, latent: int, arithmetic: str) -> tuple[Codec, np.ndarray]:
    """The codec, and the standard deviation of each channel of its latents."""
    module = JointHyperprior(JointConfig(channels=channels, latent=latent))
    params = jax.device_get(init_params(module, 0))
    scales = np.geomspace(LOW, HIGH, latent).astype(np.float32)
    last = params["entropy_parameters"]["layers_4"]["conv"]
    last["bias"] = np.concatenate([scales, np.zeros(latent, np.float32)])
    last["kernel"] = last["kernel"] * 0.1
    codec = freeze("mbt2018", module, params)
    return (jaxsem.calibrate(codec, bundled_photos()) if arithmetic == "exact" else codec), scales


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times everything and prints a table."""
    width, height = options.size
    if width % 64 or height % 64:
        raise InputError(f"--size {width}x{height}: sides are multiples of 64 here, so that no position is padding")
    channels, latent, repetitions = options.channels, options.latent, REPETITIONS
    if options.quick:
        channels, latent, repetitions = 16, 24, QUICK_REPETITIONS
    codec, scales = make_codec(channels, latent, options.arithmetic)
    batch, grid = options.batch, (height // 64, width // 64)
    rng = np.random.default_rng(0)
    shape = batch, 4 * grid[0], 4 * grid[1], latent
    latents = {
        "y": jnp.asarray(rng.normal(size=shape) * scales, jnp.float32),
        "z": jnp.asarray(rng.normal(size=(batch, *grid, channels)), jnp.float32),
    }
    sizes = [(height, width)] * batch
    packets = encode(codec, latents, sizes)
    y_hat = np.asarray(driver.decode(codec, packets, sizes, grid))
    far = np.abs(y_hat - latents["y"]).max()
    if not far <= 0.5 + 1e-3:
        raise InputError(f"the decoder's latents are {far} from the encoder's: this is a bug")
    symbols, bits = int(np.prod(shape[1:])), 8 * statistics.mean(map(len, packets))
    print(
        f"{shape[1]}x{shape[2]} positions of {latent} channels, batch {batch}: {symbols:,} symbols an image in {bits:,.0f} bits "
        f"({bits / (height * width):.3f} bpp)"
    )
    calls = {
        "encode": lambda: encode(codec, latents, sizes),
        "decode": lambda: driver.decode(codec, packets, sizes, grid),
    }
    found = {name: Spread.of([_timing.seconds(call) for _ in range(repetitions)]) for name, call in calls.items()}
    rows = [
        [name, spread.show(3), f"{batch / spread.median:,.2f}", f"{batch * symbols / spread.median / 1e6:,.2f}"]
        for name, spread in found.items()
    ]
    record: dict[str, Any] = {name: asdict(spread) for name, spread in found.items()}
    if options.compressai:
        spread = compressai(channels, latent, scales, grid, repetitions)
        record["compressai"] = asdict(spread)
        rows.append(
            [
                "CompressAI, decode",
                spread.show(3),
                f"{1 / spread.median:,.2f}",
                f"{symbols / spread.median / 1e6:,.2f}",
            ]
        )
        record["ratio"] = batch * spread.median / found["decode"].median
        print(f"CompressAI takes {record['ratio']:.1f} times as long an image")
    _timing.print_table(["", "seconds", "images/s", "M symbols/s"], rows)
    return {"positions": shape[1:3], "latent": latent, "batch": batch, "bits": bits, **record}


def encode(codec: Codec, latents: dict[str, jax.Array], sizes: list[tuple[int, int]]) -> list[bytes]:
    """Packets of a batch of latents; in float arithmetic image by image, as the pipeline does."""
    if codec.arithmetic == "exact":
        return driver.encode(codec, driver.code_latents(codec, latents, sizes, codec.quality), len(sizes))
    packets = []
    for k, size in enumerate(sizes):
        one = {name: value[k : k + 1] for name, value in latents.items()}
        packets += driver.encode(codec, driver.code_latents(codec, one, [size], codec.quality), 1)
    return packets


def compressai(channels: int, latent: int, scales: np.ndarray, grid: tuple[int, int], repetitions: int) -> Spread:
    """Seconds of CompressAI's decoder for one image: z, hyper-decoder and the loop over positions.

    Raises:
      InputError: It is not installed.
    """
    if not all(map(importlib.util.find_spec, ("torch", "compressai", "pytest"))):
        raise InputError("CompressAI is not installed here: leave out --compressai")
    # The tests know how to import it without what it needs for other things.
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from compressai_reference import import_compressai

    torch, package = import_compressai()
    torch.manual_seed(0)
    model = package.models.JointAutoregressiveHierarchicalPriors(channels, latent).eval()
    with torch.no_grad():
        last = model.entropy_parameters[4]
        last.weight *= 0.1
        last.bias[:] = torch.cat([torch.from_numpy(scales), torch.zeros(latent)])
        y = torch.randn(1, latent, 4 * grid[0], 4 * grid[1]) * torch.from_numpy(scales)[:, None, None]
        # The model's own compress, with these latents in the place of an image's.
        model.g_a, model.g_s = torch.nn.Identity(), torch.nn.Identity()
        model.update()
        coded = model.compress(y)
        spent = []
        for _ in range(repetitions):
            begin = time.perf_counter()
            model.decompress(coded["strings"], coded["shape"])
            spent.append(time.perf_counter() - begin)
    return Spread.of(spent)


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = _timing.parser(__doc__, "a tiny model, repeated twice")
    parser.add_argument(
        "--size", type=_timing.parse_size, default=(512, 768), help="WIDTHxHEIGHT of the image (768x512)"
    )
    parser.add_argument("--channels", type=_timing.positive, default=192, help="N (192)")
    parser.add_argument("--latent", type=_timing.positive, default=192, help="M (192)")
    parser.add_argument("--batch", type=_timing.positive, default=1, help="images at once (1)")
    parser.add_argument("--arithmetic", choices=driver.ARITHMETICS, default="float", help="float or exact (float)")
    parser.add_argument("--compressai", action="store_true", help="time CompressAI as well")
    options = parser.parse_args(arguments)
    options.size = options.size[::-1]  # parse_size gives height and width
    return _timing.run("bench_serial", options, lambda: measure(options))


if __name__ == "__main__":
    sys.exit(main())
