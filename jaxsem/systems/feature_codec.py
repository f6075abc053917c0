"""PQVAE-shared as a codec: an image's CLIP feature as a packet of some tens of bytes, and back.

    images ── CLIP ──▶ features [b, width] ── PQVAE encoder ──▶ indices [b, n] ── index coder ──▶ packets
                                                                                                    │
    features [b, width], unit ◀── PQVAE decoder ── indices ◀────────────── index coder ─────────────┘

A packet is one byte, the quality as in packets of images, and the index coder's stream. Indices are integers and their coders
compute in integers, so a packet decodes on every device. The container's item has no image size: what comes back is a feature.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxsem.codecs.hyperprior import QUALITY_STEPS
from jaxsem.container import Item
from jaxsem.entropy.index_coder import IndexCoder
from jaxsem.errors import FormatError, InputError
from jaxsem.systems.clip_model import ClipModel, filled
from jaxsem.systems.clipcap import ClipCap
from jaxsem.systems.features import check_features
from jaxsem.systems.pqvae import Pqvae

PACKET = 0  # the container's tag
_EXACT = 0x80
_ROWS = 256  # features that are decoded at a time


@dataclass(frozen=True, eq=False)
class Level:
    """One quality of a feature codec.

    Attributes:
      module: PQVAE-shared.
      params: Its parameters.
      coder: Codes its indices.
    """

    module: Pqvae
    params: Any
    coder: IndexCoder

    @property
    def bits(self) -> float:
        """Bits of a feature before entropy coding, n log2 k."""
        return self.module.config.codewords * float(np.log2(self.module.config.codebook))


@dataclass(frozen=True, eq=False)
class Captioner:
    """Writes captions from features.

    Attributes:
      module: ClipCap.
      params: Its parameters.
      tokenizer: Has `decode(ids)`.
      stop: The token that ends a caption.
      longest: Tokens of a caption at most.
    """

    module: ClipCap
    params: Any
    tokenizer: Any
    stop: int
    longest: int = 67


@dataclass(frozen=True, eq=False)
class FeatureCodec:
    """A codec of CLIP features: what is needed to compress and to use them, and nothing that changes.

    Attributes:
      name: Name of the preset, or of the file it came from.
      clip: CLIP, which makes the features and knows the words for them.
      levels: The qualities, lowest rate first.
      digest: Identity of the levels (`jaxsem.weights.native.identity`); files carry its first bytes.
      captioner: Writes captions; None if there is none.
      quality: The quality that compression uses, an index of `levels`.
    """

    name: str
    clip: ClipModel
    levels: tuple[Level, ...]
    digest: bytes
    captioner: Captioner | None = None
    quality: int = 0

    @property
    def level(self) -> Level:
        """The level at the present quality."""
        return self.levels[self.quality]

    @property
    def qualities(self) -> int:
        """How many qualities there are."""
        return len(self.levels)

    @property
    def default_quality(self) -> int:
        """The lowest."""
        return 0

    def at_quality(self, quality: float) -> "FeatureCodec":
        """The same codec at another quality.

        Raises:
          InputError: The quality is no whole number of those there are.
        """
        if quality not in range(len(self.levels)):
            raise InputError(f"{self.name} has the whole qualities 0 to {len(self.levels) - 1}, not {quality:g}")
        return replace(self, quality=int(quality))

    def in_arithmetic(self, arithmetic: str) -> "FeatureCodec":
        """The same codec, if "exact" is asked for: indices are coded in integers, and in no other way.

        Raises:
          InputError: Another arithmetic.
        """
        if arithmetic != "exact":
            raise InputError(f"{self.name} codes indices in exact arithmetic only, not in {arithmetic!r}")
        return self

    def encode(self, features: np.ndarray) -> list[bytes]:
        """Packets of features [b, width] of any length, at the present quality.

        Raises:
          InputError: Features of another width or not finite.
        """
        return self.pack(self.indices(features))

    def indices(self, features: np.ndarray) -> np.ndarray:
        """What is coded: int32 [b, n] of features [b, width]; raises as `encode`."""
        features = check_features(features, self.level.module.config.width)
        parts = [
            np.asarray(run_indices(self.level.module, self.level.params, rows))[:n] for rows, n in _blocks(features)
        ]
        return np.concatenate(parts) if parts else np.zeros((0, self.level.module.config.codewords), np.int32)

    def features(self, indices: np.ndarray) -> np.ndarray:
        """Unit features float32 [b, width] of indices [b, n] at the present quality."""
        parts = [
            np.asarray(run_features(self.level.module, self.level.params, part))[:n] for part, n in _blocks(indices)
        ]
        return np.concatenate(parts) if parts else np.zeros((0, self.clip.width), np.float32)

    def pack(self, indices: np.ndarray) -> list[bytes]:
        """Packets of indices [b, n]."""
        head = bytes([self.quality * QUALITY_STEPS | _EXACT])
        return [head + stream for stream in self.level.coder.encode(indices)]

    def decode(self, packets: Sequence[bytes]) -> np.ndarray:
        """Unit features float32 [b, width] of packets of any qualities.

        Raises:
          FormatError: A packet is damaged, or of a quality that the codec has not.
        """
        features = np.zeros((len(packets), self.clip.width), np.float32)
        heads = [self.read_head(packet) for packet in packets]
        for quality in set(heads):
            rows = [row for row, head in enumerate(heads) if head == quality]
            indices = self.levels[quality].coder.decode([packets[row][1:] for row in rows])
            features[rows] = self.at_quality(quality).features(indices)
        return features

    def read_head(self, packet: bytes) -> int:
        """The quality of a packet.

        Raises:
          FormatError: There is no such quality here.
        """
        quality, rest = divmod(packet[0] & ~_EXACT, QUALITY_STEPS) if packet else (0, 1)
        if rest or quality >= len(self.levels) or not packet[0] & _EXACT:
            seen = f"begins with {packet[0]:#04x}" if packet else "is empty"
            raise FormatError(
                f"the feature packet {seen}, but {self.name} has qualities 0 to {len(self.levels) - 1}: "
                "the file is damaged or holds no feature"
            )
        return quality


# -- images to items ------------------------------------------------------------------------------------------------------


def compress_features(
    codec: FeatureCodec, images: Iterable[Any], batch: int | None = None
) -> Iterator[tuple[Item, float]]:
    """Container items of images, in order, and the bits that the index coder's tables promise for each.

    Args:
      codec: The codec, at its quality.
      images: Whatever `jaxsem.data.images.pixels_from` takes.
      batch: Images a device batch; None decides by the device.

    Raises:
      InputError: Something is no image.
    """
    to_indices = partial(run_indices, codec.level.module, codec.level.params)
    for indices in codec.clip.encode_stream(images, batch, to_indices):
        bits = codec.level.coder.ideal_bits(indices)
        for packet, estimate in zip(codec.pack(indices), bits, strict=True):
            yield Item(0, 0, {PACKET: packet}), float(estimate)


def features_of(codec: FeatureCodec, items: Sequence[Item]) -> np.ndarray:
    """Unit features float32 [b, width] of container items.

    Raises:
      FormatError: An item holds no packet of a feature, or a damaged one.
    """
    for item in items:
        if PACKET not in item.sections or item.height:
            raise FormatError(f"the file has an image of {item.height}x{item.width} where a feature is wanted")
    return codec.decode([item.sections[PACKET] for item in items])


# -- compiled pieces ------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="module")
def run_indices(module: Pqvae, params: Any, features: jax.Array) -> jax.Array:
    """Indices int32 [b, n] of features [b, width]."""
    return module.apply({"params": params}, features, method="indices_of")


@partial(jax.jit, static_argnames="module")
def run_features(module: Pqvae, params: Any, indices: jax.Array) -> jax.Array:
    """Unit features [b, width] of indices [b, n]."""
    return module.apply({"params": params}, indices, method="features_of")


def _blocks(rows: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """Rows in blocks of few sizes, filled up by repeating the last, and how many of each block are true."""
    for start in range(0, len(rows), _ROWS):
        part = rows[start : start + _ROWS]
        yield filled(part, min(_ROWS, 1 << (len(part) - 1).bit_length())), len(part)
