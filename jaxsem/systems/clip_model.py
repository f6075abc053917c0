"""CLIP ready for use: images and texts in, unit features out, in batches of one compiled size.

model = load_clip_model("openai/clip-vit-large-patch14-336")
images = model.encode_images(photos)                   # float32 [b, 768], unit
texts = model.class_features(["dog", "cat"])           # float32 [2, 768], unit, averaged over prompts
(images @ texts.T).argmax(axis=1)                      # zero-shot classification
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsem.backbones.clip import Clip
from jaxsem.backbones.clip_inputs import load_tokenizer, normalize, square_crop, tokenize
from jaxsem.data.images import pixels_from
from jaxsem.errors import InputError
from jaxsem.nn.ops import unit

SIMPLE_TEMPLATES = ("a photo of a {}.",)
READERS = max(2, min(16, os.cpu_count() or 1))  # threads; decoding and resizing run outside of Python's lock
_TEXTS = 256  # in a device batch

T, R = TypeVar("T"), TypeVar("R")


@dataclass(frozen=True, eq=False)
class ClipModel:
    """A CLIP with its tokenizer.

    Attributes:
      name: What errors call it.
      module: The Flax module, with an image tower and a text tower.
      params: Its parameters.
      tokenizer: As `jaxsem.backbones.clip_inputs.tokenize` wants it; None in a model for images alone.
      templates: Prompts for a class name, with `{}` in its place; their features are averaged.
      article: Whether "a {}" in a template becomes "an {}" before a vowel.
    """

    name: str
    module: Clip
    params: Any
    tokenizer: Any
    templates: tuple[str, ...] = SIMPLE_TEMPLATES
    article: bool = False

    @property
    def width(self) -> int:
        """Numbers in a feature."""
        return self.module.config.projection or self.module.config.vision.width

    @property
    def image_size(self) -> int:
        """Side of the images that the model takes."""
        height, width = self.module.config.vision.height_width
        if height != width:
            raise InputError(f"{self.name} takes images of {height}x{width}; features are extracted from square ones")
        return height

    def encode_images(self, images: Iterable[Any], batch: int | None = None) -> np.ndarray:
        """Unit features float32 [b, width] of images, whatever `jaxsem.data.images.pixels_from` takes.

        Raises:
          InputError: No image, or something that is none.
        """
        parts = list(self.encode_stream(images, batch))
        if not parts:
            raise InputError("there is no image to encode: give at least one")
        return np.concatenate(parts)

    def encode_stream(
        self,
        images: Iterable[Any],
        batch: int | None = None,
        then: Callable[[jax.Array], jax.Array] | None = None,
        mesh: Mesh | None = None,
    ) -> Iterator[np.ndarray]:
        """Unit features of images, a batch at a time; the device works while the host prepares the next batches.

        Args:
          images: As for `encode_images`; they are taken as needed, a few batches ahead.
          batch: Images a device batch; None is `default_batch(mesh)`.
          then: What the device goes on to make of the features [b, width] of a batch, instead of giving them.
          mesh: Devices that share each batch; None is the default device.

        Raises:
          InputError: A batch that the devices cannot share; while iterating, something that is no image.
        """
        size, side = batch or default_batch(mesh), self.image_size
        rows = prepare_ahead(lambda image: square_crop(pixels_from(image), side), images, size)
        return self.encode_batches(map(np.stack, rows), size, then, mesh)

    def encode_batches(
        self,
        batches: Iterable[np.ndarray],
        size: int,
        then: Callable[[jax.Array], jax.Array] | None = None,
        mesh: Mesh | None = None,
    ) -> Iterator[np.ndarray]:
        """Unit features of batches of crops, uint8 [1 to `size`, side, side, 3]; see `encode_stream`.

        A batch is on its way to the device before the features of the one before it are waited for.

        Raises:
          InputError: A size that the devices cannot share.
        """
        if mesh is not None and size % mesh.shape["data"]:
            raise InputError(
                f"a batch of {size} cannot be split evenly over {mesh.shape['data']} devices: give a multiple of that"
            )
        return self._run(batches, size, then, mesh)

    def _run(self, batches: Iterable[np.ndarray], size: int, then: Any, mesh: Mesh | None) -> Iterator[np.ndarray]:
        params, place = self.params, None
        if mesh is not None:
            params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
            place = NamedSharding(mesh, PartitionSpec("data"))
        waiting: jax.Array | None = None
        known = 0
        for crops in batches:
            found = encode_crops(self.module, params, jax.device_put(filled(crops, size), place))
            found = found if then is None else then(found)
            if waiting is not None:
                yield np.asarray(waiting)[:known]
            waiting, known = found, len(crops)
        if waiting is not None:
            yield np.asarray(waiting)[:known]

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit features float32 [t, width] of texts.

        Raises:
          InputError: No text, an empty one, or one that is longer than the model's context.
        """
        if self.tokenizer is None:
            raise InputError(f"{self.name} was loaded for images alone: load it with its texts")
        ids = tokenize(self.tokenizer, texts, self.module.config.text.context)
        size = min(_TEXTS, 1 << (len(ids) - 1).bit_length())  # few sizes to compile
        starts = range(0, len(ids), size)
        parts = [encode_ids(self.module, self.params, filled(ids[i : i + size], size)) for i in starts]
        return np.concatenate([np.asarray(part) for part in parts])[: len(ids)]

    def class_features(self, names: Sequence[str], templates: Sequence[str] | None = None) -> np.ndarray:
        """One unit feature for each class: the mean over prompts of unit features, made unit (prompt ensembling).

        Args:
          names: Class names.
          templates: Prompts with `{}` for the name; by default the model's own.

        Raises:
          InputError: No name, an empty one, or a template without a place for it.
        """
        if isinstance(names, str) or isinstance(templates, str):
            raise InputError(f"{names if isinstance(names, str) else templates!r} is one text: give a list of them")
        templates = tuple(templates or self.templates)
        if bad := [template for template in templates if "{}" not in template]:
            raise InputError(f"the prompt {bad[0]!r} has no place for the class: write {{}} there")
        names = [str(name).strip() for name in names]
        if not names or not all(names):
            raise InputError("there is no class to tell from others: give names, none of them empty")
        features = self.encode_texts([self._prompt(template, name) for name in names for template in templates])
        mean = features.reshape(len(names), len(templates), -1).mean(axis=1)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    def _prompt(self, template: str, name: str) -> str:
        if self.article and name[0].lower() in "aeiou":
            template = re.sub(r"\b([aA]) \{\}", r"\1n {}", template)
        return template.replace("{}", name)


def load_clip_model(
    source: str | os.PathLike,
    config: Any = None,
    tokenizer: str | os.PathLike | None = None,
    templates: Sequence[str] = SIMPLE_TEMPLATES,
    dtype: Any = jnp.float32,
    texts: bool = True,
) -> ClipModel:
    """Loads a published CLIP.

    Args:
      source: As `jaxsem.weights.clip.load_clip` takes it: a folder, a Hugging Face id, or a file of weights.
      config: Sizes or their name, where the source has no config.json.
      tokenizer: Folder, id or merges file of the tokenizer; the source by default.
      templates: Prompts for class names.
      dtype: Of the computation; parameters take the same type.
      texts: Whether texts will be encoded; without them, neither text tower nor tokenizer are needed or kept.

    Raises:
      InputError: Nothing is there, it has no image tower, or transformers, which has the tokenizer, is not installed.
      WeightsError: The files are damaged or do not fit.
    """
    from jaxsem.weights.clip import load_clip

    module, params = load_clip(source, config, dtype, dtype)
    name = os.fspath(source)
    if module.config.vision is None:
        raise InputError(f"{name} has no image tower: give a CLIP that has one")
    texts = texts and module.config.text is not None
    if not texts:
        module = module.clone(config=replace(module.config, text=None))
        params = {part: params[part] for part in ("vision", "image_projection") if part in params}
    words = load_tokenizer(tokenizer or source) if texts else None
    return ClipModel(name, module, jax.device_put(params), words, tuple(templates))


def default_batch(mesh: Mesh | None = None) -> int:
    """Images a device batch: 8 a CPU device, 256 another, times the devices that share it."""
    return (8 if jax.default_backend() == "cpu" else 256) * (1 if mesh is None else mesh.shape["data"])


def prepare_ahead(prepare: Callable[[T], R], items: Iterable[T], size: int) -> Iterator[list[R]]:
    """Prepares items by threads ahead of their use and gives them in order, `size` at a time, the last list perhaps shorter.

    Items are taken as needed: two lists are under way while the caller has one. An exception of `prepare` comes when
    its list is due.
    """
    items, pool = iter(items), ThreadPoolExecutor(READERS, thread_name_prefix="prepare-ahead")

    def begin() -> list:
        return [pool.submit(prepare, item) for item in islice(items, size)]

    try:
        ahead = [begin(), begin()]
        while ahead[0]:
            due = ahead.pop(0)
            ahead.append(begin())
            yield [future.result() for future in due]
    finally:
        pool.shutdown(cancel_futures=True)


@partial(jax.jit, static_argnames="module")
def encode_crops(module: Clip, params: Any, crops: jax.Array) -> jax.Array:
    """Unit features of uint8 images [b, size, size, 3] of the model's size."""
    images = normalize(crops.astype(jnp.float32) / 255.0)
    return unit(module.apply({"params": params}, images, method="encode_image"))


@partial(jax.jit, static_argnames="module")
def encode_ids(module: Clip, params: Any, ids: jax.Array) -> jax.Array:
    """Unit features of token ids [t, n]."""
    return unit(module.apply({"params": params}, ids, method="encode_text"))


def filled(rows: np.ndarray, size: int) -> np.ndarray:
    """Rows up to a size, the last one repeated, so that a short batch compiles nothing new."""
    return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)]) if len(rows) < size else rows
