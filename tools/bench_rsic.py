"""How fast RSIC decodes: denoising steps a second, what the guidance gradients cost, and seconds an image.

    python tools/bench_rsic.py [PRESET | --size sd15] [--batch 1 4] [--steps 50] [--recurrences 8] [--json FILE]

The networks of a preset or of a run's folder, or with random weights, for speed does not depend on them: by default rsic-mini's for
scenes of 128x128, with `--size sd15` those of Stable Diffusion 1.5 and HSVLC at full size for images of 512x512, in bfloat16.

A recurrence is one denoising step, taken once: the U-Net with the text and without (one batch of twice the size), the gradient of
the codec's distance, and the noise that is added again. Its time is that of the shipped program with more recurrences less that
with one, so that inversion and start are left out. Without the gradient it is the same program with a codec that gives back what
it takes. All of them run in turn, again and again, so that a busy machine slows them alike.

FLOP are those of the U-Net's pair and of the gradient, as XLA counts the programs as written; a multiplication and an addition are
two. Their rate stands beside that of one large matrix product of the same type in the same run.

Seconds an image are from decoded latents to pixels: inversion, guided steps and the autoencoder. The text tower and entropy coding
are not in them (`tools/bench_codec.py` has that). All steps, recurrences and seeds must run the program that was compiled first.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import _timing
import jax
import jax.numpy as jnp
import numpy as np
from _timing import Spread
from bench_clip import DTYPES, matmul_rate, random_params

import jaxsem
from jaxsem.backbones import autoencoder_kl, unet_2d_condition
from jaxsem.backbones.autoencoder_kl import SD_VAE, AutoencoderKl
from jaxsem.backbones.unet_2d_condition import SD15, UnetCondition
from jaxsem.codecs.hsvlc import Hsvlc, HsvlcConfig
from jaxsem.diffusion import STABLE_DIFFUSION
from jaxsem.errors import InputError
from jaxsem.preset_records import PQVAE_MINI, RSIC_MINI
from jaxsem.systems.rsic_config import FAST, RsicConfig
from jaxsem.systems.rsic_decoding import guided_latents, keys_of, run_decoder
from jaxsem.systems.weight_map import WeightMapConfig

SIZES = {
    "mini": (RSIC_MINI, 128, PQVAE_MINI.clip.text.context),
    "sd15": (RsicConfig(SD_VAE, SD15, HsvlcConfig(), WeightMapConfig(), STABLE_DIFFUSION), 512, 77),
}
TINY = replace(
    RSIC_MINI,
    autoencoder=replace(RSIC_MINI.autoencoder, widths=(8, 8, 8, 8)),
    unet=replace(
        RSIC_MINI.unet,
        widths=(8, 16),
        heads=(2, 2),
        depths=(1, 1),
        down_attention=(False, True),
        up_attention=(True, False),
    ),
    codec=replace(RSIC_MINI.codec, width=8, channels=(4, 4), boundaries=(0.5,), condition=4, hidden=8, prior=8),
)
REPETITIONS = 5
_LOOP = 2, 9  # steps and recurrences of the loop of which a recurrence's time is taken


@dataclass(frozen=True, eq=False)
class Parts:
    """What decodes.

    Attributes:
        name: For people.
        config: Sizes.
        unet: The denoiser.
        codec: C.
        autoencoder: Latents to images.
        params: Of these three, by their names.
        side: Of images in pixels.
        tokens: Of a text.
    """

    name: str
    config: RsicConfig
    unet: UnetCondition
    codec: Hsvlc
    autoencoder: AutoencoderKl
    params: dict[str, Any]
    side: int
    tokens: int


@dataclass(frozen=True)
class Nothing:
    """Stands where C is and gives back what it takes, so that there is no gradient to compute."""

    config: HsvlcConfig

    def apply(self, variables: Any, z: jax.Array, weight: jax.Array) -> dict[str, jax.Array]:
        """As the codec's."""
        return {"z_hat": jax.lax.stop_gradient(z)}


def random_parts(name: str, config: RsicConfig, side: int, tokens: int, dtype: Any) -> Parts:
    """Networks with random weights, those of the diffusion model of the given type."""
    unet, codec = UnetCondition(config.unet, dtype, dtype), Hsvlc(config.codec, dtype)
    autoencoder, c = AutoencoderKl(config.autoencoder, dtype, dtype), config.codec
    z = jax.ShapeDtypeStruct((1, c.stride, c.stride, c.latent), jnp.float32)
    weight = jax.ShapeDtypeStruct((1, *[c.stride // c.map_stride] * 2), jnp.float32)
    shapes = {
        "unet": unet_2d_condition.param_shapes(unet),
        "codec": jax.eval_shape(codec.init, jax.random.key(0), z, weight)["params"],
        "autoencoder": autoencoder_kl.param_shapes(autoencoder),
    }
    return Parts(f"{name}, random weights", config, unet, codec, autoencoder, random_params(shapes), side, tokens)


def preset_parts(source: str, dtype: Any) -> Parts:
    """The networks of a codec.

    Raises:
        InputError: It is none of RSIC.
    """
    codec = jaxsem.load(source)
    if not getattr(codec, "referring", False):
        raise InputError(f"{source} does not decode by guided denoising: name a codec of RSIC, or choose a --size")
    codec, side = replace(codec, dtype=dtype), 512 if codec.clip is None else codec.clip.image_size
    modules = codec.unet, codec.codec, codec.autoencoder
    return Parts(codec.name, codec.config, *modules, codec.params, side, codec.text.length)


class Decoder:
    """Decodes a batch of random latents; all numbers are free.

    Args:
        parts: What decodes.
        batch: Images.
    """

    def __init__(self, parts: Parts, batch: int):
        self.parts, rng = parts, np.random.default_rng(0)
        unit = parts.config.stride
        side = -(-parts.side // unit) * unit // parts.config.autoencoder.stride
        cells, width = side // parts.codec.config.map_stride, parts.config.unet.context_width
        self.z_hat = jnp.asarray(rng.normal(0, 1, (batch, side, side, parts.codec.config.latent)), jnp.float32)
        self.weight = np.zeros((batch, cells, cells), np.float32)
        self.weight[:, : cells // 2, : cells // 2] = 1.0  # a referred object
        self.context = jnp.asarray(rng.normal(0, 1, (batch, parts.tokens, width)), jnp.float32)
        self.null = jnp.zeros((1, parts.tokens, width))

    def latents(self, steps: int, recurrences: int, seed: int = 0, gradient: bool = True) -> jax.Array:
        """z_0, by the shipped program."""
        parts, guidance = self.parts, self.parts.config.guidance
        codec = parts.codec if gradient else Nothing(parts.codec.config)
        numbers = {name: getattr(guidance, name) for name in ("pull", "scale", "relax")}
        numbers |= {"steps": steps, "recurrences": recurrences}
        given = self.z_hat, self.weight, self.context, self.null, numbers, keys_of(seed, len(self.z_hat))
        params = {"unet": parts.params["unet"], "codec": parts.params["codec"]}
        return guided_latents(parts.unet, codec, parts.config.schedule, guidance.max_steps, params, *given)

    def images(self, steps: int, recurrences: int, seed: int = 0) -> jax.Array:
        """Pixels."""
        z = self.latents(steps, recurrences, seed)
        return run_decoder(self.parts.autoencoder, self.parts.params["autoencoder"], z)

    def flops(self) -> dict[str, float]:
        """Operations of a recurrence of the batch: of the U-Net's pair, and of the gradient."""
        unet, codec, params = self.parts.unet, self.parts.codec, self.parts.params

        def distance(params: Any, z: jax.Array, reference: jax.Array, weight: jax.Array) -> jax.Array:
            return 0.5 * jnp.square(codec.apply({"params": params}, z, weight)["z_hat"] - reference).sum()

        z, t = jnp.concatenate([self.z_hat] * 2), np.zeros(2 * len(self.z_hat), np.int32)
        context = jnp.concatenate([self.context] * 2)
        pair = jax.jit(lambda params, *given: unet.apply({"params": params}, *given))
        gradient = jax.jit(jax.grad(distance, argnums=1))
        return {
            "pair": _flops(pair, params["unet"], z, t, context),
            "gradient": _flops(gradient, params["codec"], self.z_hat, self.z_hat, self.weight),
        }


def _flops(program: Callable, *given: Any) -> float:
    return float(program.lower(*given).cost_analysis()["flops"])


@dataclass(frozen=True)
class Row:
    """One batch size."""

    batch: int
    recurrence_seconds: Spread  # of the batch
    recurrences_per_second: float  # times the images of the batch
    gradient_ratio: Spread  # time with the gradients over that without
    gradient_share: float
    gflop: dict[str, float]
    teraflops: float
    share_of_matmul: float
    image_seconds: dict[str, Spread]
    compiled: int


def measure_batch(
    parts: Parts, batch: int, modes: dict[str, tuple[int, int]], peak: float, loop: tuple[int, int], repeats: int
) -> Row:
    """Times one batch size.

    Args:
        parts: What decodes.
        batch: Images.
        modes: Steps and recurrences of whole decodes, by name.
        peak: TFLOP/s of a large matrix product.
        loop: Steps and recurrences of the loop.
        repeats: Repetitions that count.
    """
    decoder, (steps, recurrences) = Decoder(parts, batch), loop

    def recurrence(gradient: bool) -> float:
        many, one = (
            _timing.seconds(lambda count=count: decoder.latents(steps, count, gradient=gradient))
            for count in (recurrences, 1)
        )
        return (many - one) / (steps * (recurrences - 1))

    jax.block_until_ready((decoder.images(1, 1), decoder.latents(1, 1, gradient=False)))  # compiles
    before = guided_latents._cache_size() + run_decoder._cache_size()
    rounds = [(recurrence(True), recurrence(False)) for _ in range(repeats)]
    seconds = {
        name: [_timing.seconds(lambda mode=mode, k=k: decoder.images(*mode, seed=k)) for k in range(min(repeats, 3))]
        for name, mode in modes.items()
    }
    fresh = guided_latents._cache_size() + run_decoder._cache_size() - before
    spread, ratio = Spread.of([both for both, _ in rounds]), Spread.of([both / alone for both, alone in rounds])
    flops = decoder.flops()
    rate = sum(flops.values()) / spread.median / 1e12
    return Row(
        batch,
        spread,
        batch / spread.median,
        ratio,
        1 - 1 / ratio.median,
        {name: count / 1e9 for name, count in flops.items()},
        rate,
        rate / peak,
        {name: Spread.of(np.array(values) / batch) for name, values in seconds.items()},
        fresh,
    )


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.preset is not None and options.size is not None:
        raise InputError(f"{options.preset} brings its own sizes: leave out --size {options.size}")
    size = options.size or "mini"
    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.dtype(options.dtype or ("bfloat16" if size == "sd15" else "float32"))
    if options.preset is not None:
        parts = preset_parts(options.preset, dtype)
    elif options.quick:
        parts = random_parts("tiny", TINY, *SIZES["mini"][1:], dtype)
    else:
        parts = random_parts(size, *SIZES[size], dtype)
    given = {"steps": options.steps, "recurrences": options.recurrences}
    shorter = {"steps": 2, "recurrences": 2} if options.quick else {}
    guidance = replace(parts.config.guidance, **shorter | {name: value for name, value in given.items() if value})
    fast = {"steps": 1, "recurrences": 1} if options.quick else FAST
    modes = {"default": (guidance.steps, guidance.recurrences), "fast": (fast["steps"], fast["recurrences"])}
    loop, repeats = ((1, 3), 2) if options.quick else (_LOOP, REPETITIONS)
    peak = matmul_rate(dtype, 256 if options.quick else 2048 if on_cpu else 8192, repeats)
    print(f"{parts.name}, images of {parts.side}x{parts.side}, {dtype.name}")
    print(f"one large matrix product in {dtype.name} runs at {peak.show(3)} TFLOP/s")
    rows = [measure_batch(parts, batch, modes, peak.median, loop, repeats) for batch in options.batch]
    print_rows(rows, modes)
    figures = {"networks": parts.name, "side": parts.side, "dtype": dtype.name, "modes": modes}
    return {**figures, "matmul_teraflops": asdict(peak), "batches": [asdict(row) for row in rows]}


def print_rows(rows: list[Row], modes: dict[str, tuple[int, int]]) -> None:
    """Print the tables."""
    header = (
        "batch",
        "ms a recurrence",
        "images x recurrences/s",
        "GFLOP",
        "TFLOP/s",
        "of the product's",
        "compiled anew",
    )
    cells = [
        (
            str(row.batch),
            Spread(*(1e3 * x for x in asdict(row.recurrence_seconds).values())).show(2),
            f"{row.recurrences_per_second:,.1f}",
            f"{sum(row.gflop.values()):,.2f}",
            f"{row.teraflops:.3f}",
            f"{row.share_of_matmul:.1%}",
            str(row.compiled),
        )
        for row in rows
    ]
    _timing.print_table(header, cells)
    header = (
        "batch",
        "with / without gradients",
        "their share",
        *(f"s an image, {t} x {r}" for t, r in modes.values()),
    )
    cells = [
        (
            str(row.batch),
            row.gradient_ratio.show(2),
            f"{row.gradient_share:.0%}",
            *(row.image_seconds[name].show(2) for name in modes),
        )
        for row in rows
    ]
    _timing.print_table(header, cells)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; a mistake gives one sentence and the exit status 2."""
    parser = _timing.parser(__doc__, "tiny networks unless a preset is named, few steps, repeated twice")
    add = parser.add_argument
    add("preset", nargs="?", metavar="PRESET", help="a preset of RSIC, or the folder of a run")
    add("--size", choices=tuple(SIZES), help="of networks with random weights (mini)")
    add("--batch", type=_timing.positive, nargs="+", default=[1, 4], metavar="N", help="images at once (1 4)")
    add("--steps", type=_timing.positive, metavar="T", help="of a whole decode (the codec's, 50)")
    add("--recurrences", type=_timing.positive, metavar="R", help="of a whole decode (the codec's, 8)")
    add("--dtype", choices=DTYPES, help="of the arithmetic (bfloat16 for sd15, else float32)")
    options = parser.parse_args(arguments)
    return _timing.run("bench_rsic", options, lambda: _measure(options))


if __name__ == "__main__":
    sys.exit(main())
