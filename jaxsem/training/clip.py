"""Training of a small CLIP on scenes: batches, loss and evaluation.

A batch holds scenes of one object, scenes of several, and single objects as a segmenter would cut them out: cropped with black
around the mask, as referring object identification encodes regions, or left in place on black, where size and position remain.
Contrastive loss alone learns shapes slowly, so during training a linear layer also reads shape and colour off each patch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxsem import losses
from jaxsem.backbones.clip import Clip, ClipConfig
from jaxsem.backbones.clip_inputs import normalize, square_crop, tokenize
from jaxsem.data.scenes import CLASSES, COLOURS, SEEN_CLASSES, SHAPES, SPLITS, Scene, SceneConfig, batch, sample_scene
from jaxsem.data.scenes.captions import article, place
from jaxsem.data.words import WordTokenizer
from jaxsem.nn.ops import unit

KINDS = ("single", "several", "crop", "in place")
TEMPLATES = ("a {}", "a picture of a {}", "an image of a {}", "there is a {}")
"""Prompts whose features are averaged for a class."""
_FIELDS = ("image", "masks", "boxes", "classes", "captions")
_COVERED = 0.12  # of a patch, for it to count as part of an object
_VISIBLE = 100  # pixels of 128 x 128 below which the nearest object is taken instead
_BACKGROUND_WEIGHT = 0.1  # most patches are background
_LARGEST_SCALE = 100.0  # of the similarities, as in OpenAI's code
# How often each of a scene's five captions is drawn.
_CAPTION_SHARES = {"single": (0.4, 0.3, 0.3, 0, 0), "several": (0.1, 0.3, 0.15, 0.3, 0.15)}


class ScenePairs:
    """Endless batches of pictures and one text of each; batch i is a function of (seed, i) alone.

    Gives `image` uint8 [b, size, size, 3], `tokens` int32 [b, context], `names` int32 [b], equal for equal texts, and for
    every patch `shapes` and `colours` int32 [b, rows, columns], 0 for background.

    Args:
      config: Sizes of the model.
      batch_size: A multiple of 8; 3/8 each are scenes of one and of several objects, 1/8 each crops and objects in place.
      seed: Decides which scenes and captions.
    """

    def __init__(self, config: ClipConfig, batch_size: int, seed: int = 0):
        self.config, self.batch_size, self.seed = config, batch_size, seed
        self.tokenizer = WordTokenizer()
        self._position = 0

    def __iter__(self) -> "ScenePairs":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([self.seed, self._position])
        self._position += 1
        parts = [
            self._part(kind, count, rng)
            for kind, count in zip(KINDS, (3 * self.batch_size // 8,) * 2 + (self.batch_size // 8,) * 2)
        ]
        texts = [text for part in parts for text in part["texts"]]
        labels = np.concatenate([part["labels"] for part in parts])
        return {
            "image": np.concatenate([part["image"] for part in parts]),
            "tokens": tokenize(self.tokenizer, texts, self.config.text.context),
            "names": np.unique(texts, return_inverse=True)[1].astype(np.int32),
            "shapes": np.where(labels < 0, 0, 1 + labels % len(SHAPES)).astype(np.int32),
            "colours": np.where(labels < 0, 0, 1 + labels // len(SHAPES)).astype(np.int32),
        }

    def get_state(self) -> dict[str, int]:
        """The position: how many batches were given."""
        return {"batches": self._position}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to a position of `get_state`."""
        self._position = state["batches"]

    def _part(self, kind: str, count: int, rng: np.random.Generator) -> dict[str, Any]:
        scenes = SceneConfig("seen", objects=(1, 1) if kind == "single" else (1, 4))
        indices = rng.integers(0, SPLITS["train"], count)
        size, grid = self.config.vision.image_size, self.config.vision.grid[0]
        if kind in _CAPTION_SHARES:
            drawn = batch("train", indices, scenes, size, _FIELDS)
            choice = rng.choice(5, count, p=_CAPTION_SHARES[kind])
            texts = [str(captions[i]) for captions, i in zip(drawn["captions"], choice)]
            images, masks = drawn["image"], drawn["masks"]
        else:
            drawn = batch("train", indices, scenes, size, _FIELDS[:4])
            numbers = [visible_object(mask, rng) for mask in drawn["masks"]]
            cut = map(cut_object, drawn["image"], drawn["masks"], numbers, [kind == "crop"] * count)
            images, masks = map(np.stack, zip(*cut))
            things = (sample_scene("train", int(i), scenes) for i in indices)
            texts = [object_text(scene, number, kind, rng) for scene, number in zip(things, numbers)]
        return {"image": images, "texts": texts, "labels": patch_classes(masks, drawn["classes"], grid)}


def visible_object(mask: np.ndarray, rng: np.random.Generator) -> int:
    """Draws an object of a label map; the nearest, wholly visible one instead of one that is mostly hidden."""
    count = int(mask.max())
    number = int(rng.integers(count))
    least = _VISIBLE * mask.size / 128**2
    return number if (mask == number + 1).sum() >= least else count - 1


def cut_object(image: np.ndarray, mask: np.ndarray, number: int, crop: bool) -> tuple[np.ndarray, np.ndarray]:
    """One object on black, cropped to its box and enlarged to the picture's size, or left in place; and its label map."""
    mine = mask == number + 1
    alone, labels = np.where(mine[..., None], image, 0).astype(np.uint8), np.where(mine, mask, 0).astype(np.uint8)
    if not crop:
        return alone, labels
    rows, columns = np.flatnonzero(mine.any(axis=1)), np.flatnonzero(mine.any(axis=0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return square_crop(alone[box], len(image)), square_crop(labels[box], len(image), Image.Resampling.NEAREST)


def object_text(scene: Scene, number: int, kind: str, rng: np.random.Generator) -> str:
    """What can be said of an object cut out of a scene: its size and place only where it was left in place."""
    thing = scene.objects[number]
    if kind == "crop":
        return str(rng.choice(TEMPLATES)).replace("a {}", article(thing.name))
    name = article(f"{thing.size} {thing.name}")
    return f"{name} {place(scene, number)}" if rng.random() < 0.5 else name


def patch_classes(masks: np.ndarray, classes: np.ndarray, grid: int) -> np.ndarray:
    """The class of the object that covers most of each patch, -1 for background.

    Args:
      masks: Label maps [b, size, size], 0 for background and k + 1 for object k.
      classes: [b, m], the class of each object.
      grid: Patches along a side.

    Returns:
      int32 [b, grid, grid].
    """
    b, side = len(masks), masks.shape[1] // grid
    patches = masks.reshape(b, grid, side, grid, side)
    shares = np.stack([(patches == k + 1).mean(axis=(2, 4)) for k in range(classes.shape[1])], axis=-1)
    best = shares.argmax(-1)
    found = np.take_along_axis(classes, best.reshape(b, -1), axis=1).reshape(best.shape)
    return np.where(shares.max(-1) >= _COVERED, found, -1).astype(np.int32)


# -- loss and evaluation --------------------------------------------------------------------------------------------------


class ClipTrainee(nn.Module):
    """A CLIP with a linear layer that names the shape and the colour of every patch; the layer is left behind after training.

    Attributes:
      config: Sizes.
      dtype: Of the computation.
    """

    config: ClipConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declares CLIP and the layer."""
        self.clip = Clip(self.config, self.dtype)
        self.patch_names = nn.Dense(len(SHAPES) + len(COLOURS) + 2)

    def __call__(self, images: jax.Array, tokens: jax.Array) -> dict[str, jax.Array]:
        """Unit features `image` and `text` [b, projection], `scale`, and logits `shapes` and `colours` [b, rows, columns, 9]."""
        states = self.clip.image_tokens(normalize(images.astype(jnp.float32) / 255.0))
        logits = self.patch_names(states[:, 1:]).reshape(len(images), *self.config.vision.grid, -1)
        features = {"image": unit(self.clip.image_feature(states)), "text": unit(self.clip.encode_text(tokens))}
        scale = jnp.minimum(jnp.exp(self.clip.logit_scale), _LARGEST_SCALE)
        shapes, colours = jnp.split(logits, [len(SHAPES) + 1], axis=-1)
        return {**features, "scale": scale, "shapes": shapes, "colours": colours}


def clip_loss(config: ClipConfig, patch_weight: float = 0.5, dtype: Any = jnp.float32) -> Callable:
    """The loss for `jaxsem.training`: contrastive, and the cross-entropy of the patches' shapes and colours.

    Args:
      config: Sizes.
      patch_weight: Weight of the latter.
      dtype: Of the computation.

    Returns:
      loss_fn(params, batch, rng) -> (loss, metrics), for parameters of `ClipTrainee` and batches of `ScenePairs`.
    """
    module = ClipTrainee(config, dtype)

    def loss_fn(params, batch, rng):
        del rng
        out = module.apply({"params": params}, batch["image"], batch["tokens"])
        contrast = losses.contrastive(out["image"], out["text"], out["scale"], batch["names"])
        patches = {name: _patch_loss(out[name], batch[name]) for name in ("shapes", "colours")}
        metrics = {"contrast": contrast, "scale": out["scale"], **patches}
        return contrast + patch_weight * (patches["shapes"] + patches["colours"]), metrics

    return loss_fn


def _patch_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    weights = jnp.where(labels > 0, 1.0, _BACKGROUND_WEIGHT)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    return -(weights * picked).sum() / weights.sum()


def class_prompts(names: Sequence[str]) -> list[list[str]]:
    """Every class in every template, with the right article."""
    return [[template.replace("a {}", article(name)) for template in TEMPLATES] for name in names]


def scene_accuracy(config: ClipConfig, count: int = 480, split: str = "valid") -> Callable:
    """An evaluation for `jaxsem.training`: zero-shot classification of scenes of one object.

    Args:
      config: Sizes of the model.
      count: Scenes of seen classes.
      split: The scenes' split.

    Returns:
      eval_fn(params) -> `error`, the share of wrong answers among the 48 seen classes, for parameters of `ClipTrainee`.
    """
    drawn = batch(
        split, range(count), SceneConfig("seen", objects=(1, 1)), config.vision.image_size, ("image", "classes")
    )
    prompts = class_prompts(SEEN_CLASSES)
    tokens = tokenize(WordTokenizer(), [text for row in prompts for text in row], config.text.context)
    right = [SEEN_CLASSES.index(CLASSES[number]) for number in drawn["classes"][:, 0]]
    module = Clip(config)

    @jax.jit
    def guesses(params, images, tokens):
        images = normalize(images.astype(jnp.float32) / 255.0)
        image = unit(module.apply({"params": params}, images, method="encode_image"))
        text = unit(module.apply({"params": params}, tokens, method="encode_text"))
        return (image @ text.reshape(len(prompts), -1, text.shape[-1]).mean(1).T).argmax(-1)

    def eval_fn(params):
        found = guesses(params["clip"], drawn["image"], tokens)
        return {"error": float((np.asarray(found) != right).mean())}

    return eval_fn
