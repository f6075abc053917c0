"""The contract that every image codec keeps, and the slice driver.

    uint8 image --analyze--> latents --encode--> packet          (device: floats; host: integers only)
    packet      --decode--> latents --synthesize--> uint8 image

A latent is coded as a sequence of slices. For slice i one compiled function gives each symbol's integer table and mean from
what is already decoded; the host codes the slice; the result feeds slice i + 1. Encoder and decoder call the same compiled
functions in the same order (`_start`, `_advance`): a function that is compiled differently on the two sides may differ in
its last bit, pick another table and ruin the rest of the stream. For the same reason a float network runs on one image at
a time here, whatever the batch around it.

A packet is one byte of quality (in steps of 1/32) and one long rANS stream, sealed with a checksum of that byte and the symbols
that costs nothing: the low 16 bits of their CRC-32, symbols as little-endian int32 (see `jaxsem.entropy.rans`).
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from jaxsem import losses
from jaxsem.entropy import rans
from jaxsem.entropy.tables import Tables
from jaxsem.errors import FormatError, InputError

QUALITY_STEPS = 32
# Far outside every table, yet safe in int32 with any mean: a broken model cannot overflow the escape code.
_SYMBOL_LIMIT = 2.0**20

Batch = dict[str, jax.Array]


@dataclass(frozen=True, eq=False)
class Codec:
    """A trained image codec: what is needed to compress, and nothing that changes.

    Attributes:
      name: Name of the preset, or of the folder it came from.
      module: The Flax module, without parameters.
      params: Its parameters.
      tables: The integer tables, frozen when the codec was built.
      digest: Identity of config, weights and tables (`jaxsem.weights.native.identity`); files carry its first bytes.
      quality: The quality that `compress` uses, in [0, qualities - 1].
    """

    name: str
    module: Any
    params: Any
    tables: Tables
    digest: bytes
    quality: float = 0.0

    @property
    def lambdas(self) -> tuple[float, ...]:
        """Distortion weights of the qualities; empty for a model of one rate."""
        return self.module.config.lambdas

    def at_quality(self, quality: float) -> "Codec":
        """The same codec at another quality, a real number; rounded to the 1/32 that a packet holds.

        Raises:
          InputError: The quality is outside what the weights serve.
        """
        top = max(len(self.lambdas) - 1, 0)
        if not 0 <= quality <= top:
            raise InputError(f"{self.name} has qualities 0 to {top}, not {quality:g}")
        return Codec(
            self.name, self.module, self.params, self.tables, self.digest,
            round(quality * QUALITY_STEPS) / QUALITY_STEPS,
        )  # fmt: skip

    def analyze(self, params: Any, batch: Batch, rng: PRNGKeyArray | None = None) -> dict[str, jax.Array]:
        """Latents of images, pure; not rounded yet.

        Args:
          params: Parameters.
          batch: `image` uint8 [b, h, w, 3], sides multiples of 64; optionally `quality` [b], else the codec's own.
          rng: Unused by these codecs: analysis is deterministic.

        Returns:
          Latents by name, float32.
        """
        quality = self._quality(batch)
        return self.module.apply({"params": params}, _unit(batch["image"]), quality, method="analyze")

    def synthesize(self, params: Any, latents: dict[str, jax.Array], rng: PRNGKeyArray | None = None) -> jax.Array:
        """Images [b, h, w, 3] about [0, 1], pure, from decoded latents `y_hat` (and `quality`, else the codec's own)."""
        quality = latents.get("quality", jnp.full(latents["y_hat"].shape[0], self.quality))
        return self.module.apply({"params": params}, latents["y_hat"], quality, method="synthesize")

    def loss(self, params: Any, batch: Batch, rng: PRNGKeyArray | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Rate plus weighted distortion, pure; `rng` None evaluates with rounding.

        For a variable-rate model each image takes its `quality` of the batch; without, qualities are dealt out evenly at
        random. For a model of one rate the batch may give `lambda` [b].

        Returns:
          The loss and its metrics; see `jaxsem.losses.rate_distortion`.
        """
        x = _unit(batch["image"])
        quality, noise = self._quality(batch), rng
        if self.lambdas and "quality" not in batch and rng is not None:
            dealer, noise = jax.random.split(rng)
            quality = (jax.random.permutation(dealer, x.shape[0]) % len(self.lambdas)).astype(jnp.float32)
        outputs = self.module.apply({"params": params}, x, quality, noise)
        weight = losses.lambda_at(self.lambdas, quality) if self.lambdas else batch["lambda"]
        return losses.rate_distortion(x, outputs, weight)

    def _quality(self, batch: Batch) -> jax.Array:
        return batch.get("quality", jnp.full(batch["image"].shape[0], self.quality))


def _unit(image: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    return image.astype(jnp.float32) / 255.0


# -- compiled pieces: static in the module and the slice, so that a changed number compiles nothing ----------------------


@partial(jax.jit, static_argnames="module")
def run_analysis(module: Any, params: Any, image: jax.Array, quality: jax.Array) -> jax.Array:
    """Y of uint8 images [b, h, w, 3]."""
    return module.apply({"params": params}, _unit(image), quality, method="analysis")


@partial(jax.jit, static_argnames="module")
def run_hyper_analysis(module: Any, params: Any, y: jax.Array, quality: jax.Array) -> jax.Array:
    """Z of y."""
    return module.apply({"params": params}, y, quality, method="hyper_analysis")


@partial(jax.jit, static_argnames="module")
def run_synthesis(module: Any, params: Any, y_hat: jax.Array, quality: jax.Array) -> jax.Array:
    """uint8 images from y_hat."""
    x = module.apply({"params": params}, y_hat, quality, method="synthesize")
    return jnp.round(jnp.clip(x, 0.0, 1.0) * 255.0).astype(jnp.uint8)


@partial(jax.jit, static_argnames=("module", "grid"))
def _start(module, grid, params, quality):
    """The first state and the prediction of slice 0."""
    variables = {"params": params}
    state = module.apply(variables, 1, grid, quality, method="begin")
    return state, module.apply(variables, 0, state, method="predict")


@partial(jax.jit, static_argnames=("module", "i"))
def _advance(module, i, params, state, symbols, mean):
    """The state after slice i and the prediction of slice i + 1, None after the last."""
    variables = {"params": params}
    state = module.apply(variables, i, state, symbols.astype(jnp.float32) + mean, method="place")
    last = i + 1 == module.slices
    return state, None if last else module.apply(variables, i + 1, state, method="predict")


@partial(jax.jit, static_argnames=("module", "i"))
def _quantise(module, i, params, latents, mean, scale, inside):
    """Symbols of slice i, zero in the padding, and the model's estimate of their bits."""
    variables = {"params": params}
    values = module.apply(variables, i, latents, method="values_of")
    symbols = jnp.where(inside, jnp.clip(jnp.round(values - mean), -_SYMBOL_LIMIT, _SYMBOL_LIMIT), 0.0)
    probability = module.apply(variables, i, symbols + mean, mean, scale, method="likelihood_of")
    return symbols.astype(jnp.int32), -jnp.where(inside, jnp.log2(probability), 0.0).sum()


# -- the slice driver -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coded:
    """What the device leaves for the host: per slice its symbols, tables and mask, and the estimate in bits."""

    slices: tuple[tuple[jax.Array, jax.Array, jax.Array], ...]
    bits: jax.Array


def code_latents(codec: Codec, latents: dict[str, jax.Array], size: tuple[int, int], quality: float) -> Coded:
    """Runs the slices of one image on the device; returns at once, with the work under way.

    Args:
      codec: The codec.
      latents: y [1, h, w, m] and z [1, h/4, w/4, n].
      size: True height and width of the image in pixels; symbols of its padding are not coded.
      quality: As a packet holds it.
    """
    module, params = codec.module, codec.params
    grid = latents["z"].shape[1:3]
    state, (table, mean, scale) = _start(module, grid, params, np.full(1, quality, np.float32))
    slices, total = [], 0.0
    for i in range(module.slices):
        inside = module.inside(i, grid, size)
        symbols, bits = _quantise(module, i, params, latents, mean, scale, inside)
        slices.append((symbols, table, inside))
        total = total + bits
        if i + 1 < module.slices:
            state, (table, mean, scale) = _advance(module, i, params, state, symbols, mean)
    return Coded(tuple(slices), total)


def encode(codec: Codec, coded: Coded, quality: float) -> bytes:
    """The host's part: packs the integers of one image into a packet."""
    head = _head(quality)
    encoder, check = rans.Encoder(codec.tables), zlib.crc32(head)
    for symbols, table, inside in jax.device_get(coded.slices):
        mask = np.broadcast_to(inside, symbols.shape)
        flat = symbols[mask]
        check = zlib.crc32(flat.astype("<i4").tobytes(), check)
        encoder.push(flat, table[mask])
    return head + encoder.finish(check & 0xFFFF)


def _head(quality: float) -> bytes:
    return bytes([round(quality * QUALITY_STEPS)])


def packet_quality(codec: Codec, packet: bytes) -> float:
    """The quality that a packet was made with.

    Raises:
      FormatError: The packet is empty or names a quality that the weights do not serve.
    """
    top = max(len(codec.lambdas) - 1, 0)
    if not packet or packet[0] > top * QUALITY_STEPS:
        seen = "is empty" if not packet else f"asks for quality {packet[0] / QUALITY_STEPS:g}"
        raise FormatError(f"the image packet {seen}, but {codec.name} has 0 to {top}: the file is damaged")
    return packet[0] / QUALITY_STEPS


def decode(codec: Codec, packet: bytes, size: tuple[int, int], grid: tuple[int, int]) -> jax.Array:
    """Decodes the latent of one image.

    Args:
      codec: The codec whose digest the file names.
      packet: The packet.
      size: True height and width in pixels.
      grid: Height and width of z, from the image's shape bucket.

    Returns:
      y_hat [1, 4 grid_h, 4 grid_w, m].

    Raises:
      FormatError: The packet is damaged, or this machine computed other tables than the encoder.
    """
    quality = packet_quality(codec, packet)
    decoder = rans.Decoder(packet[1:], codec.tables)
    y_hat, check = decode_slices(codec, decoder.pull, quality, size, grid)
    decoder.finish(check)
    return y_hat


def decode_slices(
    codec: Codec,
    pull: Callable[[np.ndarray], np.ndarray],
    quality: float,
    size: tuple[int, int],
    grid: tuple[int, int],
) -> tuple[jax.Array, int]:
    """Runs the slices of one image with symbols from anywhere, and waits for the device before each slice.

    Args:
      codec: The codec.
      pull: Gives the symbols of the next slice, int32, for their tables, both [symbols of the slice].
      quality: As the packet holds it.
      size: True height and width in pixels.
      grid: Height and width of z.

    Returns:
      y_hat [1, 4 grid_h, 4 grid_w, m], with its last slice under way, and the packet's 16-bit checksum.
    """
    module, params = codec.module, codec.params
    state, prediction = _start(module, grid, params, np.full(1, quality, np.float32))
    check = zlib.crc32(_head(quality))
    for i in range(module.slices):
        table, mean, _ = prediction
        table = np.asarray(table)
        mask = np.broadcast_to(module.inside(i, grid, size), table.shape)
        flat = pull(table[mask])
        check = zlib.crc32(flat.astype("<i4").tobytes(), check)
        symbols = np.zeros(table.shape, np.int32)
        symbols[mask] = flat
        state, prediction = _advance(module, i, params, state, symbols, mean)
    return state["y_hat"], check & 0xFFFF
