"""Items of the container from images and demands, and images from items, in batches of one padded shape.

Section 0 is one byte, the levels of the map less one and in the highest bit whether the priors were computed exactly, and a long
rANS stream, sealed with the low 16 bits of the CRC-32 of that byte, the map's section and the symbols: a map of another file is
found out. Section 1, the description, is as `jaxsem.entropy.texts` has it, and absent where it is empty. Section 2 is as
`jaxsem.entropy.level_map` has it, and absent for a map of one level.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsem import slices
from jaxsem.codecs.hsvlc import Frame, Hsvlc
from jaxsem.container import Item
from jaxsem.entropy import rans
from jaxsem.entropy.texts import pack_text, unpack_text
from jaxsem.errors import FormatError, InputError
from jaxsem.systems.rsic import Demand, Rsic, weight_levels
from jaxsem.systems.rsic_decoding import keys_of, run_decoder, run_encoder
from jaxsem.systems.weight_map import WeightMapConfig, pack_map, unpack_map

LATENTS, CAPTION, MAP = 0, 1, 2
_EXACT = 0x80
_LEVELS = 0x07


@dataclass(frozen=True, eq=False)
class Coded:
    """One image after compression.

    Attributes:
      item: What the container holds.
      estimated_bits: The models' own estimate: of the latents by their densities; texts and maps count as they are.
      notes: What the user should know, a sentence each.
    """

    item: Item
    estimated_bits: float
    notes: tuple[str, ...] = ()


def padded_shape(codec: Rsic, height: int, width: int) -> tuple[int, int]:
    """The sides of an image after padding."""
    unit = codec.config.stride
    return -(-height // unit) * unit, -(-width // unit) * unit


# -- images to items ----------------------------------------------------------------------------------------------------------


def compress_batch(codec: Rsic, images: Sequence[np.ndarray], demands: Sequence[Demand], size: int) -> list[Coded]:
    """Compresses images of one padded shape.

    Args:
      codec: The codec.
      images: uint8 [h, w, 3], at most `size`.
      demands: One for each.
      size: Images that are computed at a time: the batch is filled up.

    Raises:
      InputError: A demand that does not fit its image, or no captioner where a description is missing.
    """
    shape = padded_shape(codec, *images[0].shape[:2])
    levels = [weight_levels(codec, image, demand) for image, demand in zip(images, demands, strict=True)]
    texts = _descriptions(codec, images, demands)
    pixels = np.stack([_padded(image, shape) for image in images])
    weight = np.stack([_weights(codec.config.weight_map, each, shape) for each in levels])
    frames = [_frame(codec, image.shape[:2], each) for image, each in zip(images, weight, strict=True)]
    exact = codec.arithmetic == "exact"
    z = run_encoder(codec.autoencoder, codec.params["autoencoder"], _filled(pixels, size))
    latents = _analyse(codec.codec, codec.params["codec"], z, _filled(weight, size))
    # Floats are run one image at a time: another batch may differ in its last bit.
    groups = [range(len(images))] if exact else [[k] for k in range(len(images))]
    results: list[Coded] = []
    for group in groups:
        found, bits = _code(codec, latents, weight, frames, group, size if exact else 1)
        for place, k in enumerate(group):
            head = bytes([(codec.config.weight_map.levels - 1) | (_EXACT if exact else 0)])
            sections = {CAPTION: pack_text(texts[k]), MAP: pack_map(levels[k], codec.config.weight_map)}
            sections[LATENTS] = head + _encode(
                codec, [[part[place] for part in each] for each in found], head + sections[MAP]
            )
            sections = {tag: data for tag, data in sections.items() if data}
            more = 8 * (sum(len(data) for tag, data in sections.items() if tag != LATENTS) + len(head))
            item = Item(*images[k].shape[:2], dict(sorted(sections.items())))
            results.append(Coded(item, float(bits[place]) + more, _notes(codec, texts[k])))
    return results


def _descriptions(codec: Rsic, images: Sequence[np.ndarray], demands: Sequence[Demand]) -> list[str]:
    missing = [k for k, demand in enumerate(demands) if demand.text is None]
    texts = [demand.text or "" for demand in demands]
    if missing and codec.describe is None:
        raise InputError(f"{codec.name} has nothing to describe images with: give a text, or an empty one for none")
    if missing:
        for k, text in zip(missing, codec.describe([images[k] for k in missing]), strict=True):
            texts[k] = text
    for text in texts:
        codec.text.cut(text)  # refuses words that the model does not know, before any work
    return texts


def _notes(codec: Rsic, text: str) -> tuple[str, ...]:
    cut = codec.text.cut(text)
    if not cut.was_cut:
        return ()
    return (f"the description is kept whole, but the diffusion model sees only its first {codec.text.length} tokens",)


def _code(
    codec: Rsic, latents: dict[str, jax.Array], weight: np.ndarray, frames: list[Frame], group: Sequence[int], size: int
) -> tuple[list, np.ndarray]:
    rows = [*group, *[group[-1]] * (size - len(group))]
    some = {name: value[np.array(rows)] for name, value in latents.items()}
    variables = codec.exact if codec.arithmetic == "exact" else {"params": codec.params["codec"]}
    given = codec.codec, variables, some, codec.codec.grid_of(some), weight[rows], [frames[k] for k in rows]
    found, bits, _ = slices.code(*given, codec.codec.slices)
    return jax.device_get(found), np.asarray(bits)


def _encode(codec: Rsic, found: list, head: bytes) -> bytes:
    encoder, check = rans.Encoder(codec.tables), zlib.crc32(head)
    for each in found:
        flat, tables = slices.flattened(*each)
        check = zlib.crc32(flat.astype("<i4").tobytes(), check)
        encoder.push(flat, tables)
    return encoder.finish(check & 0xFFFF)


# -- items to images ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Parsed:
    """What an item says, before anything is decoded.

    Attributes:
      size: Height and width of the image.
      exact: Whether the priors were computed exactly.
      levels: Of M, uint8 [rows, columns].
      text: The description.
      stream: The coded latents.
      head: What its seal covers besides.
    """

    size: tuple[int, int]
    exact: bool
    levels: np.ndarray
    text: str
    stream: bytes
    head: bytes


def read_head(packet: bytes) -> tuple[int, bool]:
    """The levels of M, and whether the priors were computed exactly.

    Raises:
      FormatError: A first byte that no encoder writes.
    """
    if packet[0] & ~(_EXACT | _LEVELS):
        raise FormatError(f"the packet begins with {packet[0]:#04x}, which no encoder writes: the file is damaged")
    return (packet[0] & _LEVELS) + 1, bool(packet[0] & _EXACT)


def parse(codec: Rsic, item: Item) -> Parsed:
    """Reads the sections of an item.

    Raises:
      FormatError: Something is missing, surplus or damaged, or the codec has no exact arithmetic and the item needs it.
    """
    known = {LATENTS, CAPTION, MAP}
    packet = item.sections.get(LATENTS, b"")
    if not item.height or not packet or not set(item.sections) <= known:
        raise FormatError(
            f"the file has sections {sorted(item.sections)} and an image of {item.height}x{item.width}: it is none of {codec.name}"
        )
    config, (levels, exact) = codec.config.weight_map, read_head(packet)
    data = item.sections.get(MAP, b"")
    if exact and codec.exact is None:
        raise FormatError(f"the file was made in exact arithmetic, which {codec.name} does not have")
    found = unpack_map(data, item.height, item.width, replace(config, levels=levels))
    text = unpack_text(item.sections.get(CAPTION, b""))
    return Parsed((item.height, item.width), exact, found, text, packet[1:], packet[:1] + data)


def decode_latents(codec: Rsic, parsed: Sequence[Parsed], size: int) -> tuple[jax.Array, np.ndarray]:
    """ẑ_0 and M of items of one padded shape and one arithmetic, filled up to `size`.

    Raises:
      FormatError: A stream is damaged.
    """
    shape = padded_shape(codec, *parsed[0].size)
    maps = [replace(codec.config.weight_map, levels=(each.head[0] & _LEVELS) + 1) for each in parsed]
    weight = np.stack([_weights(config, each.levels, shape) for config, each in zip(maps, parsed, strict=True)])
    frames = [_frame(codec, each.size, own) for each, own in zip(parsed, weight, strict=True)]
    variables = codec.exact if parsed[0].exact else {"params": codec.params["codec"]}
    grid = tuple(n // codec.config.stride for n in shape)
    groups = [list(range(len(parsed)))] if parsed[0].exact else [[k] for k in range(len(parsed))]
    parts = []
    for group in groups:
        decoders = [rans.Decoder(parsed[k].stream, codec.tables) for k in group]
        checks = [zlib.crc32(parsed[k].head) for k in group]

        def pull(k: int, table: np.ndarray, decoders=decoders, checks=checks) -> np.ndarray:
            flat = decoders[k].pull(table)
            checks[k] = zlib.crc32(flat.astype("<i4").tobytes(), checks[k])
            return flat

        rows = group if not parsed[0].exact else [*group, *[group[-1]] * (size - len(group))]
        given = codec.codec, variables, grid, weight[rows], [frames[k] for k in rows]
        state = slices.decode(*given, pull, len(group), codec.codec.slices)
        for decoder, check in zip(decoders, checks, strict=True):
            decoder.finish(check & 0xFFFF)
        parts.append({f"f_{i}": state[f"f_{i}"] for i in range(codec.codec.slices)})
    values = jax.tree.map(lambda *each: _filled(jnp.concatenate(each), size), *parts)
    weight = _filled(weight, size)
    return _synthesise(codec.codec, codec.params["codec"], values, weight), weight


def decompress_batch(codec: Rsic, parsed: Sequence[Parsed], size: int) -> list[np.ndarray]:
    """Images of items of one padded shape and one arithmetic.

    Raises:
      FormatError: A stream is damaged.
      InputError: A description that the text tower cannot read.
    """
    z_hat, weight = decode_latents(codec, parsed, size)
    texts = [each.text for each in parsed]
    context = codec.text([*texts, *[texts[-1]] * (size - len(texts))])
    latents = {"z_hat": z_hat, "weight": weight, "context": context}
    z = codec.guide(codec.params, latents, keys_of(codec.seed, size))
    if not np.isfinite(np.asarray(z)).all():
        raise InputError(
            f"decoding with gamma={codec.config.guidance.gamma:g} gave numbers that are not finite: take a lower gamma"
        )
    images = np.asarray(run_decoder(codec.autoencoder, codec.params["autoencoder"], z))
    return [
        np.ascontiguousarray(image[: each.size[0], : each.size[1]]) for image, each in zip(images, parsed, strict=False)
    ]


# -- pieces -------------------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="module")
def _analyse(module: Hsvlc, params: Any, z: jax.Array, weight: jax.Array) -> dict[str, jax.Array]:
    return module.apply({"params": params}, z, weight, method="analyze")


@partial(jax.jit, static_argnames="module")
def _synthesise(module: Hsvlc, params: Any, values: dict[str, jax.Array], weight: jax.Array) -> jax.Array:
    return module.apply({"params": params}, values, weight, method="synthesize")


def _weights(config: WeightMapConfig, levels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """M, float32, over a padded image of this shape: the last row and column go on."""
    values = config.values[levels]
    missing = [n // config.stride - have for n, have in zip(shape, values.shape)]
    return np.pad(values, [(0, each) for each in missing], mode="edge")


def _frame(codec: Rsic, size: tuple[int, int], weight: np.ndarray) -> Frame:
    stride = codec.config.autoencoder.stride
    return Frame(-(-size[0] // stride), -(-size[1] // stride), weight)


def _padded(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return np.pad(image, [(0, shape[0] - image.shape[0]), (0, shape[1] - image.shape[1]), (0, 0)], mode="edge")


def _filled(rows: Any, size: int) -> Any:
    """Rows filled up to `size` by repeating the last."""
    return rows if len(rows) == size else rows[np.minimum(np.arange(size), len(rows) - 1)]
