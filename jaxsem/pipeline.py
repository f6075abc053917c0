"""The batch pipeline: lists or streams of images to `.jsem` bytes and back, with device and host overlapped.

    device: analyse batch i + 1 | host threads: pack the integers of batch i | caller: write batch i - 1

Images of one shape bucket share a batch, so a folder of mixed sizes compiles each bucket once.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from jaxsem import codec as driver
from jaxsem import shapes
from jaxsem.codec import Codec
from jaxsem.codecs.hyperprior import Y_STRIDE
from jaxsem.container import File, Item, pack, unpack
from jaxsem.errors import FormatError, InputError, WeightsError

Image = UInt8[np.ndarray, "h w 3"]
PACKET = 0  # the container's tag of the coded image
_WORKERS = 2
_PIXELS_LIMIT = 1 << 28  # what a file may ask a decoder to allocate: 16k x 16k


@dataclass(frozen=True)
class Compressed:
    """One image after compression.

    Attributes:
      item: What the container holds.
      estimated_bits: The model's own estimate of the packet's size.
      height: Rows of the image.
      width: Its columns.
      notes: What the user should know, a sentence each.
    """

    item: Item
    estimated_bits: float
    height: int
    width: int
    notes: tuple[str, ...] = ()


def default_batch() -> int:
    """Images a device batch: 1 on a CPU, where a batch only costs memory, 8 on an accelerator."""
    return 1 if jax.default_backend() == "cpu" else 8


def compress_stream(
    codec: Codec, images: Iterable[Image], batch: int | None = None, demands: Iterable[Any] | None = None
) -> Iterator[tuple[int, Compressed]]:
    """Compresses images as they come.

    Args:
      codec: The codec, at its quality.
      images: uint8 [h, w, 3], of any sizes from 1x1.
      batch: Images a device batch; `None` is `default_batch()`.
      demands: What is asked of each image, of a codec that can be asked (`jaxsem.systems.rsic.Demand`).

    Yields:
      Position and result of each image, roughly in order: images wait until their bucket's batch is full.

    Raises:
      InputError: An array is no uint8 image, or demands that the codec cannot meet.
    """
    if getattr(codec, "referring", False):
        yield from _compress_referring(codec, images, batch, demands)
        return
    if demands is not None:
        raise InputError(
            f"{codec.name} compresses whole images alike, and cannot be told what matters: use a preset of RSIC"
        )
    if not isinstance(codec, Codec):
        yield from _compress_features(codec, images, batch)
        return
    size = batch or default_batch()
    running: deque[Future] = deque()
    with ThreadPoolExecutor(_WORKERS) as pool:
        for group in _batches(images, size):
            for part, latents in analyse_batch(codec, group, size):
                sizes = _sizes([image.shape[:2] for _, image in part], latents["y"].shape[0])
                coded = driver.code_latents(codec, latents, sizes, codec.quality)
                running.append(pool.submit(_finish, codec, part, coded))
            while len(running) > 2 * _WORKERS:
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()


def compress_items(
    codec: Codec, images: Sequence[Image], batch: int | None = None, demands: Sequence[Any] | None = None
) -> list[Compressed]:
    """Compresses images and returns results in their order; see `compress_stream`."""
    results: list[Compressed | None] = [None] * len(images)
    for position, result in compress_stream(codec, images, batch, demands):
        results[position] = result
    return results


def compress(
    codec: Codec, images: Sequence[Image], batch: int | None = None, demands: Sequence[Any] | None = None
) -> list[bytes]:
    """Compresses images to `.jsem` files.

    Args:
      codec: From `jaxsem.load`, at its quality.
      images: uint8 arrays [h, w, 3] of any sizes from 1x1.
      batch: Images a device batch; `None` decides by the device.
      demands: What is asked of each image, of a codec that can be asked (`jaxsem.Demand`).

    Returns:
      The bytes of one file for each image.

    Raises:
      InputError: An array is no uint8 image, or demands that the codec cannot meet.

    Example:
      >>> import jaxsem, numpy as np
      >>> codec = jaxsem.load("elic-mini", quality=1)
      >>> [file] = jaxsem.compress(codec, [np.zeros((40, 60, 3), np.uint8)])
      >>> jaxsem.decompress(codec, [file])[0].shape
      (40, 60, 3)
    """
    return [pack(result.item, codec.digest) for result in compress_items(codec, images, batch, demands)]


def decompress(codec: Codec, files: Sequence[bytes], batch: int | None = None) -> list[Image]:
    """Decompresses `.jsem` files; an archive gives all its images, in order.

    Args:
      codec: The codec that they were made with, at any quality.
      files: Bytes of the files.
      batch: Images a device batch; `None` decides by the device.

    Returns:
      uint8 arrays [h, w, 3].

    Raises:
      FormatError: A file is damaged, foreign or from a newer version.
      WeightsError: A file was made with other weights.
    """
    items = []
    for data in files:
        file = unpack(data)
        check_weights(codec, file)
        items.extend(file.items)
    return decompress_items(codec, items, batch)


def check_weights(codec: Codec, file: File) -> None:
    """Refuses a file of other weights.

    Raises:
      WeightsError: The digests differ.
    """
    if not codec.digest.startswith(file.digest):
        seen, have = file.digest.hex(), codec.digest[: len(file.digest)].hex()
        raise WeightsError(
            f"the file was made with weights {seen}, but {codec.name} has {have}: load the preset it was made with"
        )


def decompress_items(codec: Codec, items: Sequence[Item], batch: int | None = None) -> list[Image]:
    """Decodes container items to images; host threads decode while the device synthesises.

    Raises:
      FormatError: A packet is damaged or missing, or the codec is one of features.
    """
    if getattr(codec, "referring", False):
        return _decompress_referring(codec, items, batch or default_batch())
    if not isinstance(codec, Codec):
        raise FormatError(
            f"the file of {codec.name} holds a CLIP feature, no image: use it with jaxsem classify or jaxsem caption, or "
            "with jaxsem.read_features"
        )
    images: list[Image | None] = [None] * len(items)
    for group, y_hat in _decoded(codec, items, batch or default_batch()):
        for position, image in synthesise_batch(codec, group, y_hat):
            images[position] = image
    return images


def decode_latents(codec: Codec, items: Sequence[Item], batch: int | None = None) -> list[np.ndarray]:
    """Decodes container items to latents y_hat, for those who read them without an image: no synthesis runs.

    Args:
      codec: The codec that they were made with, at any quality.
      items: Of `.jsem` files.
      batch: Images a device batch; `None` decides by the device.

    Returns:
      float32 [rows, columns, channels] of each, in the units that g_a gives, alike at all qualities; one row and column for every
      16 pixels begun.

    Raises:
      FormatError: A packet is damaged or missing.
    """
    latents: list[np.ndarray | None] = [None] * len(items)
    for group, y_hat in _decoded(codec, items, batch or default_batch()):
        qualities = [driver.read_head(codec, _packet(item))[0] for _, item in group]
        quality = np.array([*qualities, *[qualities[-1]] * (len(y_hat) - len(group))], np.float32)
        whole = np.asarray(driver.run_without_gains(codec.module, codec.params, y_hat, quality))
        for (position, item), latent in zip(group, whole, strict=False):
            latents[position] = latent[: -(-item.height // Y_STRIDE), : -(-item.width // Y_STRIDE)]
    return latents


# -- pieces ---------------------------------------------------------------------------------------------------------------


def _compress_features(codec: Any, images: Iterable[Image], batch: int | None) -> Iterator[tuple[int, Compressed]]:
    from jaxsem.systems.feature_codec import compress_features

    sizes: deque[tuple[int, int]] = deque()

    def noted() -> Iterator[Image]:
        for image in images:
            sizes.append(check_image(image).shape[:2])
            yield image

    for position, (item, estimate) in enumerate(compress_features(codec, noted(), batch)):
        yield position, Compressed(item, estimate, *sizes.popleft())


def _compress_referring(
    codec: Any, images: Iterable[Image], batch: int | None, demands: Iterable[Any] | None
) -> Iterator[tuple[int, Compressed]]:
    from jaxsem.systems import rsic_coding
    from jaxsem.systems.rsic import Demand

    size, given = batch or default_batch(), repeat(Demand()) if demands is None else iter(demands)

    def pairs() -> Iterator[tuple[Image, Any]]:
        for image in images:
            if (demand := next(given, None)) is None:
                raise InputError("there are fewer demands than images: give one for each")
            yield check_image(image), demand

    shape_of = lambda pair: rsic_coding.padded_shape(codec, *pair[0].shape[:2])  # noqa: E731
    for group in _grouped(pairs(), size, shape_of):
        coded = rsic_coding.compress_batch(codec, *map(list, zip(*[pair for _, pair in group])), size)
        for (position, (image, _)), one in zip(group, coded, strict=True):
            yield position, Compressed(one.item, one.estimated_bits, *image.shape[:2], one.notes)


def _decompress_referring(codec: Any, items: Sequence[Item], size: int) -> list[Image]:
    from jaxsem.systems import rsic_coding

    for item in items:
        if item.height * item.width > _PIXELS_LIMIT:
            raise FormatError(f"the file claims {item.height}x{item.width} pixels, above the limit of {_PIXELS_LIMIT}")
    parsed = [rsic_coding.parse(codec, item) for item in items]
    images: list[Image | None] = [None] * len(items)
    for group in _grouped(parsed, size, lambda each: (rsic_coding.padded_shape(codec, *each.size), each.exact)):
        found = rsic_coding.decompress_batch(codec, [each for _, each in group], size)
        for (position, _), image in zip(group, found, strict=True):
            images[position] = image
    return images


def _batches(images: Iterable[Image], size: int) -> Iterator[list[tuple[int, Image]]]:
    return _grouped((check_image(image) for image in images), size, lambda image: shapes.bucket(*image.shape[:2]))


def _grouped(things: Iterable, size: int, key) -> Iterator[list[tuple[int, object]]]:
    """Groups of up to `size` (position, thing) of one key; a group that waits while 8 batches pass goes out unfilled."""
    waiting: dict[tuple, list] = {}
    for position, thing in enumerate(things):
        group = waiting.setdefault(key(thing), [])
        group.append((position, thing))
        if len(group) == size:
            yield waiting.pop(key(thing))
        elif waiting and position - next(iter(waiting.values()))[0][0] >= 8 * size:
            yield waiting.pop(next(iter(waiting)))
    yield from waiting.values()


def check_image(image: Image) -> Image:
    """The image, if it is one.

    Raises:
      InputError: It is no uint8 array [h, w, 3], or it has no pixels.
    """
    if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3):
        seen = f"{image.dtype} {image.shape}" if hasattr(image, "dtype") else type(image).__name__
        raise InputError(f"an image must be a uint8 array [height, width, 3], not {seen}: see jaxsem.data.images")
    if not image.size:
        raise InputError(f"an image must have at least one pixel, not {image.shape[0]}x{image.shape[1]}")
    return image


def _fill(arrays: list, size: int) -> np.ndarray:
    """A batch of a fixed size: the last one repeated, so that an unfilled batch compiles nothing new."""
    return np.concatenate([*arrays, *[arrays[-1]] * (size - len(arrays))])


def _sizes(sizes: list[driver.Size], batch: int) -> list[driver.Size]:
    """Filled up with images of no pixels."""
    return [*sizes, *[(0, 0)] * (batch - len(sizes))]


def analyse_batch(codec: Codec, group: list, size: int) -> Iterator[tuple[list, dict[str, jax.Array]]]:
    """Starts the analysis of one batch: up to `size` (position, image) pairs of one shape bucket.

    Yields:
      Parts of the group that the slice driver may take together, and their latents `y` and `z`, not waited for: in exact
      arithmetic the whole batch, filled up to `size`, in float arithmetic one image.
    """
    padded = [shapes.pad(image)[None] for _, image in group]
    height, width = padded[0].shape[1:3]
    if max(height, width) > shapes.WINDOW:
        for pair, pixels in zip(group, padded, strict=True):
            yield [pair], _analyse_tiles(codec, pixels)
        return
    quality = np.full(size, codec.quality, np.float32)
    y = driver.run_analysis(codec.module, codec.params, _fill(padded, size), quality)
    z = driver.run_hyper_analysis(codec.module, codec.params, y, quality)
    if codec.arithmetic == "exact":
        yield group, {"y": y, "z": z}
    else:
        for k, pair in enumerate(group):
            yield [pair], {"y": y[k : k + 1], "z": z[k : k + 1]}


def _tiles(height: int, width: int, unit: int) -> Iterator[tuple[shapes.Span, shapes.Span]]:
    window, margin = shapes.WINDOW // unit, shapes.MARGIN // unit
    for rows in shapes.spans(height, window, margin):
        for columns in shapes.spans(width, window, margin):
            yield rows, columns


def _analyse_tiles(codec: Codec, pixels: np.ndarray) -> dict[str, jax.Array]:
    """Latents of one large image, window by window."""
    quality = np.full(1, codec.quality, np.float32)
    cell = shapes.STRIDE // 4
    y = np.empty((1, pixels.shape[1] // cell, pixels.shape[2] // cell, codec.module.config.latent), np.float32)
    for r, c in _tiles(y.shape[1], y.shape[2], cell):
        window = pixels[:, r.start * cell : r.stop * cell, c.start * cell : c.stop * cell]
        part = np.asarray(driver.run_analysis(codec.module, codec.params, window, quality))
        y[:, r.low : r.high, c.low : c.high] = part[
            :, r.low - r.start : r.high - r.start, c.low - c.start : c.high - c.start
        ]
    y = jnp.asarray(y)
    return {"y": y, "z": driver.run_hyper_analysis(codec.module, codec.params, y, quality)}


def _finish(codec: Codec, part: list, coded: driver.Coded) -> list[tuple[int, Compressed]]:
    packets, bits = driver.encode(codec, coded, len(part)), np.asarray(coded.bits)
    return [
        (position, Compressed(Item(*image.shape[:2], {PACKET: packet}), float(estimate), *image.shape[:2]))
        for (position, image), packet, estimate in zip(part, packets, bits, strict=False)
    ]


def _decoded(codec: Codec, items: Sequence[Item], size: int) -> Iterator[tuple[list[tuple[int, Item]], jax.Array]]:
    """Groups of (position, item) pairs of one shape bucket and their y_hat, filled up to `size`; host threads decode ahead."""

    def kind(item: Item) -> tuple:
        return shapes.bucket(item.height, item.width), driver.read_head(codec, _packet(item))[1]

    with ThreadPoolExecutor(_WORKERS) as pool:
        groups = [*_grouped(items, size, kind)]
        latents = pool.map(lambda group: _decode(codec, [item for _, item in group], size), groups)
        yield from zip(groups, latents, strict=True)


def _packet(item: Item) -> bytes:
    if PACKET not in item.sections or item.height == 0:
        raise FormatError(f"the file has no image packet, only sections {sorted(item.sections)}: it is not an image")
    if item.height * item.width > _PIXELS_LIMIT:
        raise FormatError(f"the file claims {item.height}x{item.width} pixels, above the limit of {_PIXELS_LIMIT}")
    return item.sections[PACKET]


def _decode(codec: Codec, items: list[Item], size: int) -> jax.Array:
    """y_hat of items of one shape bucket and one arithmetic, filled up to `size`; a large image stays alone."""
    packets, sizes = [_packet(item) for item in items], [(item.height, item.width) for item in items]
    grid = shapes.latent_grid(*sizes[0])
    if driver.read_head(codec, packets[0])[1] and max(shapes.bucket(*sizes[0])) <= shapes.WINDOW:
        return driver.decode(codec, packets, _sizes(sizes, size), grid)
    alone = [driver.decode(codec, [packet], [one], grid) for packet, one in zip(packets, sizes, strict=True)]
    return alone[0] if size == 1 else jnp.concatenate([*alone, *[alone[-1]] * (size - len(alone))])


def synthesise_batch(codec: Codec, group: list[tuple[int, Item]], y_hat: jax.Array) -> Iterator[tuple[int, Image]]:
    """Images of one batch: (position, item) pairs of one shape bucket, and their latents, filled up to the batch's size.

    Yields:
      Position and image, cropped to its true size.
    """
    qualities = [driver.read_head(codec, _packet(item))[0] for _, item in group]
    if max(y_hat.shape[1:3]) > shapes.WINDOW // (shapes.STRIDE // 4):
        whole = (_synthesise_tiles(codec, y_hat[k : k + 1], q) for k, q in enumerate(qualities))
    else:
        quality = np.array([*qualities, *[qualities[-1]] * (len(y_hat) - len(group))], np.float32)
        whole = iter(np.asarray(driver.run_synthesis(codec.module, codec.params, y_hat, quality)))
    for (position, item), image in zip(group, whole, strict=False):
        yield position, np.ascontiguousarray(image[: item.height, : item.width])


def _synthesise_tiles(codec: Codec, y_hat: jax.Array, quality: float) -> Image:
    """One large image, window by window."""
    cell = shapes.STRIDE // 4
    y_hat = np.asarray(y_hat)
    image = np.empty((y_hat.shape[1] * cell, y_hat.shape[2] * cell, 3), np.uint8)
    for r, c in _tiles(y_hat.shape[1], y_hat.shape[2], cell):
        window = y_hat[:, r.start : r.stop, c.start : c.stop]
        part = driver.run_synthesis(codec.module, codec.params, window, np.full(1, quality, np.float32))[0]
        keep = np.asarray(part)[
            (r.low - r.start) * cell : (r.high - r.start) * cell, (c.low - c.start) * cell : (c.high - c.start) * cell
        ]
        image[r.low * cell : r.high * cell, c.low * cell : c.high * cell] = keep
    return image
