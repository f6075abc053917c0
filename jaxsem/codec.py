"""The contract that every image codec keeps, and how its packets are made.

    uint8 image --analyze--> latents --encode--> packet          (device: floats; host: integers only)
    packet      --decode--> latents --synthesize--> uint8 image

A latent is coded as a sequence of slices by `jaxsem.slices`, on which encoder and decoder agree call by call. A function that is
compiled for another batch may differ in its last bit as well, so a float network runs on one image at a time here, whatever the
batch around it.

A packet is one byte, the quality in steps of 1/16 and in the highest bit whether the arithmetic was exact, and one long rANS
stream, sealed with a checksum of that byte and the symbols that costs nothing: the low 16 bits of their CRC-32, symbols as
little-endian int32 (see `jaxsem.entropy.rans`).
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from jaxsem import losses, slices
from jaxsem.codecs import serial
from jaxsem.codecs.hyperprior import QUALITY_STEPS
from jaxsem.entropy import rans, traced
from jaxsem.entropy.tables import Tables
from jaxsem.errors import FormatError, InputError, WeightsError

_EXACT = 0x80
ARITHMETICS = ("exact", "float")

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
      exact: Variables of the networks that decide tables and means in exact arithmetic (`jaxsem.calibration`), or None.
      arithmetic: What `compress` uses, "exact" or "float"; a packet says which it needs.
    """

    name: str
    module: Any
    params: Any
    tables: Tables
    digest: bytes
    quality: float = 0.0
    exact: Any = None
    arithmetic: str = "float"

    @property
    def lambdas(self) -> tuple[float, ...]:
        """Distortion weights of the qualities; empty for a model of one rate."""
        return self.module.config.lambdas

    @property
    def qualities(self) -> int:
        """How many whole qualities there are."""
        return max(len(self.lambdas), 1)

    @property
    def default_quality(self) -> float:
        """The middle one, rounded up."""
        return len(self.lambdas) // 2

    def at_quality(self, quality: float) -> "Codec":
        """The same codec at another quality, a real number; rounded to the 1/16 that a packet holds.

        Raises:
          InputError: The quality is outside what the weights serve.
        """
        top = max(len(self.lambdas) - 1, 0)
        if not 0 <= quality <= top:
            raise InputError(f"{self.name} has qualities 0 to {top}, not {quality:g}")
        return replace(self, quality=round(quality * QUALITY_STEPS) / QUALITY_STEPS)

    def in_arithmetic(self, arithmetic: str) -> "Codec":
        """The same codec, compressing in "exact" or "float" arithmetic; it decompresses both.

        Raises:
          InputError: Neither of the two.
          WeightsError: The weights were not calibrated for exact arithmetic.
        """
        if arithmetic not in ARITHMETICS:
            raise InputError(f"the arithmetic is 'exact' or 'float', not {arithmetic!r}")
        if arithmetic == "exact" and self.exact is None:
            raise WeightsError(f"{self.name} has no exact arithmetic: make it with jaxsem.calibrate(codec, photos)")
        return replace(self, arithmetic=arithmetic)

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


# -- compiled pieces: static in the module, so that a changed number compiles nothing --------------------------------------


@partial(jax.jit, static_argnames="module")
def run_analysis(module: Any, params: Any, image: jax.Array, quality: jax.Array) -> jax.Array:
    """Y of uint8 images [b, h, w, 3]."""
    return module.apply({"params": params}, _unit(image), quality, method="analysis")


@partial(jax.jit, static_argnames="module")
def run_hyper_analysis(module: Any, params: Any, y: jax.Array, quality: jax.Array) -> jax.Array:
    """Z, what the factorised prior codes, of y."""
    return module.apply({"params": params}, y, quality, method="hyper_analysis")


@partial(jax.jit, static_argnames="module")
def run_synthesis(module: Any, params: Any, y_hat: jax.Array, quality: jax.Array) -> jax.Array:
    """uint8 images from y_hat."""
    x = module.apply({"params": params}, y_hat, quality, method="synthesize")
    return jnp.round(jnp.clip(x, 0.0, 1.0) * 255.0).astype(jnp.uint8)


@partial(jax.jit, static_argnames="module")
def run_without_gains(module: Any, params: Any, y_hat: jax.Array, quality: jax.Array) -> jax.Array:
    """y_hat in the units of g_a."""
    return module.apply({"params": params}, y_hat, quality, method="without_gains")


# -- coding ---------------------------------------------------------------------------------------------------------------

Size = tuple[int, int]  # true height and width of an image in pixels; (0, 0) fills up a batch


@dataclass(frozen=True)
class Coded:
    """What the device leaves for the host: per slice the symbols, tables and mask of a batch, and the estimates in bits [b]."""

    slices: tuple[tuple[jax.Array, jax.Array, np.ndarray], ...]
    bits: jax.Array


def variables_of(codec: Codec, exact: bool) -> dict[str, Any]:
    """Variables of the networks that decide tables and means, in the arithmetic that a packet names.

    Raises:
      FormatError: The codec has no exact arithmetic.
    """
    if not exact:
        return {"params": codec.params}
    if codec.exact is None:
        raise FormatError(f"the image packet was made in exact arithmetic, which {codec.name} does not have")
    return codec.exact


def code_latents(codec: Codec, latents: dict[str, jax.Array], sizes: Sequence[Size], quality: float) -> Coded:
    """Runs the slices of a batch on the device; returns at once, with the work under way.

    Args:
      codec: The codec; in float arithmetic a batch is one image.
      latents: y [b, h, w, m] and z, as `analyze` gives them.
      sizes: Of each image; symbols of its padding are not coded.
      quality: As a packet holds it.
    """
    module, variables = codec.module, variables_of(codec, codec.arithmetic == "exact")
    grid, qualities = module.grid_of(latents), np.full(len(sizes), quality, np.float32)
    found, total, state = slices.code(module, variables, latents, grid, qualities, sizes, _driven(module))
    if module.serial:
        coded = _run_serial(codec, variables, state["psi"], latents["y"], sizes, None)
        found.append((coded.symbols, coded.tables, slices.inside(module, 1, grid, sizes)))
        total = total + coded.bits
    return Coded(tuple(found), total)


def _driven(module: Any) -> int:
    """How many slices the driver codes: all, or z only, where y is coded position by position."""
    return 1 if module.serial else module.slices


def decoded_serially(codec: Codec, latents: dict[str, jax.Array], quality: float) -> jax.Array:
    """y_hat [1, h, w, m] that a decoder gets from one whole image of a codec that codes y position by position, in floats."""
    variables, sizes = variables_of(codec, False), [tuple(16 * side for side in latents["y"].shape[1:3])]
    # Its z alone: the state after it.
    _, _, state = slices.code(
        codec.module, variables, latents, latents["z"].shape[1:3], np.full(1, quality, np.float32), sizes, 1
    )
    return _run_serial(codec, variables, state["psi"], latents["y"], sizes, None).y_hat


def _run_serial(
    codec: Codec,
    variables: Any,
    psi: jax.Array,
    y: jax.Array,
    sizes: Sequence[Size],
    streams: Sequence[traced.Stream] | None,
) -> serial.Coded:
    """Codes y, or decodes it from streams, position by position: a batch at once on an accelerator, image by image on a CPU."""
    extents = np.array([[-(-side // 16) for side in size] for size in sizes], np.int32)
    if streams is None:
        streams = [traced.start(rans.START, np.zeros(0, np.uint8), serial.room(*y.shape[1:]))] * len(sizes)
        decoding = np.bool_(False)
    else:
        decoding = np.bool_(True)
    run = partial(serial.run, codec.module, variables, traced.look_ups(codec.tables))
    if len(sizes) > 1 and jax.default_backend() != "cpu":
        return run(psi, y, extents, jax.tree.map(lambda *each: np.stack(each), *streams), decoding, batched=True)
    parts = [run(psi[k], y[k], extents[k], streams[k], decoding) for k in range(len(sizes))]
    return jax.tree.map(lambda *each: jnp.stack(each), *parts)


def encode(codec: Codec, coded: Coded, count: int) -> list[bytes]:
    """The host's part: packs the integers of the first `count` images of a batch into a packet each."""
    head = bytes([round(codec.quality * QUALITY_STEPS) | (_EXACT if codec.arithmetic == "exact" else 0)])
    found = jax.device_get(coded.slices)
    return [head + _encode_one(codec, [[part[k] for part in each] for each in found], head) for k in range(count)]


def _encode_one(codec: Codec, found: list, head: bytes) -> bytes:
    encoder, check = rans.Encoder(codec.tables), zlib.crc32(head)
    for i, (symbols, table, inside) in enumerate(found):
        inline = i > 0 and codec.module.serial
        if inline:
            rows, columns = serial.order(int(inside[:, 0, 0].sum()), int(inside[0, :, 0].sum()))
            flat, indices = symbols[rows, columns].ravel(), table[rows, columns].ravel()
        else:
            flat, indices = slices.flattened(symbols, table, inside)
        check = zlib.crc32(flat.astype("<i4").tobytes(), check)
        encoder.push(flat, indices, inline)
    return encoder.finish(check & 0xFFFF)


def parse_head(packet: bytes) -> tuple[float, bool]:
    """The quality that a packet of at least one byte was made with, and whether in exact arithmetic."""
    return (packet[0] & ~_EXACT) / QUALITY_STEPS, bool(packet[0] & _EXACT)


def read_head(codec: Codec, packet: bytes) -> tuple[float, bool]:
    """`parse_head`, checked against the codec that is to decode the packet.

    Raises:
      FormatError: The packet is empty or names a quality that the weights do not serve.
    """
    top = max(len(codec.lambdas) - 1, 0)
    if not packet or parse_head(packet)[0] > top:
        seen = f"asks for quality {parse_head(packet)[0]:g}" if packet else "is empty"
        raise FormatError(f"the image packet {seen}, but {codec.name} has 0 to {top}: the file is damaged")
    return parse_head(packet)


def decode(codec: Codec, packets: Sequence[bytes], sizes: Sequence[Size], grid: tuple[int, int]) -> jax.Array:
    """Decodes the latents of a batch of images of one shape bucket.

    Args:
      codec: The codec whose digest the files name.
      packets: Of each image, all in one arithmetic; float arithmetic takes one image at a time.
      sizes: Of each image; those beyond the packets fill up the batch.
      grid: Height and width in cells of 64 pixels, from the images' shape bucket.

    Returns:
      y_hat [b, 4 grid_h, 4 grid_w, m].

    Raises:
      FormatError: A packet is damaged, or in float arithmetic this machine computed other tables than the encoder.
    """
    heads = [read_head(codec, packet) for packet in packets]
    decoders = [rans.Decoder(packet[1:], codec.tables) for packet in packets]
    checks = [zlib.crc32(packet[:1]) for packet in packets]

    def pull(k: int, table: np.ndarray) -> np.ndarray:
        flat = decoders[k].pull(table)
        checks[k] = zlib.crc32(flat.astype("<i4").tobytes(), checks[k])
        return flat

    qualities, exact = [quality for quality, _ in heads], heads[0][1]
    state = _decode_slices(codec, pull, qualities, sizes, grid, exact)
    y_hat = state["y_hat"]
    if codec.module.serial:
        y_hat, flats = _decode_serially(codec, decoders, state, sizes, exact)
        checks = [zlib.crc32(flat.astype("<i4").tobytes(), check) for flat, check in zip(flats, checks, strict=True)]
    for decoder, check in zip(decoders, checks, strict=True):
        decoder.finish(check & 0xFFFF)
    return y_hat


def _decode_serially(
    codec: Codec, decoders: Sequence[rans.Decoder], state: Any, sizes: Sequence[Size], exact: bool
) -> tuple[jax.Array, list[np.ndarray]]:
    """y_hat [b, h, w, m] of a batch from what its streams hold after z, and the symbols of each stream in their order."""
    variables, shape = variables_of(codec, exact), state["y_hat"].shape
    streams = [traced.start(*decoder.rest(), serial.room(*shape[1:])) for decoder in decoders]
    # Images that fill up the batch have no positions, and nothing is read for them.
    streams += [streams[-1]] * (len(sizes) - len(decoders))
    coded = _run_serial(codec, variables, state["psi"], jnp.zeros(shape), sizes, streams)
    symbols, ends = jax.device_get((coded.symbols, coded.stream._replace(data=None)))
    flats = []
    for k, decoder in enumerate(decoders):
        decoder.advance(int(ends.state[k]), int(ends.cursor[k]))
        if not ends.sound[k]:
            raise FormatError("the image packet is damaged: it holds an escaped value that no encoder writes")
        rows, columns = serial.order(*(-(-side // 16) for side in sizes[k]))
        flats.append(symbols[k][rows, columns].ravel())
    return coded.y_hat, flats


def decode_slices(
    codec: Codec,
    pull: Callable[[int, np.ndarray], np.ndarray],
    qualities: Sequence[float],
    sizes: Sequence[Size],
    grid: tuple[int, int],
    exact: bool,
) -> jax.Array:
    """Runs the slices of a batch with symbols from anywhere, and waits for the device before each slice.

    Args:
      codec: The codec.
      pull: Called as pull(k, table), gives the next symbols of image k, int32, for their tables, both [symbols].
      qualities: As the packets hold them; one for each image that is pulled.
      sizes: Of each image; those beyond the qualities fill up the batch.
      grid: Height and width in cells of 64 pixels.
      exact: In which arithmetic.

    Returns:
      y_hat [b, 4 grid_h, 4 grid_w, m], with its last slice under way.

    Raises:
      InputError: The codec has no slices of y: it codes them position by position.
    """
    if codec.module.serial:
        raise InputError(f"{codec.name} codes y position by position, not in slices: see jaxsem.codecs.serial")
    return _decode_slices(codec, pull, qualities, sizes, grid, exact)["y_hat"]


def _decode_slices(codec: Codec, pull: Callable, qualities: Sequence[float], sizes, grid: tuple[int, int], exact: bool):
    """The state after the slices that the driver decodes: all of them, or z only."""
    filled = np.array([*qualities, *[qualities[-1]] * (len(sizes) - len(qualities))], np.float32)
    given = codec.module, variables_of(codec, exact), grid, filled, sizes
    return slices.decode(*given, pull, len(qualities), _driven(codec.module))
