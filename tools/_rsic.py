"""What `rsic_table` measures: scenes with one referred object, how near they come back, and where GEM finds what phrases name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxsem
from jaxsem.backbones.unet_2d_condition import UnetCondition
from jaxsem.container import Item, pack
from jaxsem.data.scenes import CLASSES, Description, SceneConfig, refer, sample_scene, scene_record
from jaxsem.diffusion import NoiseSchedule, classifier_free, sample
from jaxsem.entropy.texts import pack_text
from jaxsem.errors import InputError
from jaxsem.metrics.clip_score import pair_scores
from jaxsem.metrics.fid import fit_gaussian, frechet_distance
from jaxsem.metrics.masked import f_lpips, f_psnr, f_ssim
from jaxsem.metrics.ms_ssim import WINDOW
from jaxsem.metrics.psnr import psnr
from jaxsem.systems.clip_model import ClipModel, filled
from jaxsem.systems.gem import similarity_maps
from jaxsem.systems.rsic import Demand, Rsic, weight_levels
from jaxsem.systems.rsic_coding import CAPTION, padded_shape
from jaxsem.systems.rsic_decoding import run_decoder
from jaxsem.systems.weight_map import Box, Mask

SEEN = SceneConfig("seen")
_COMPLETE = 3  # the caption of a scene that names everything in one clause
_MARGIN = WINDOW // 2  # pixels along the border where f-SSIM does not look

Row = dict[str, Any]


# -- scenes ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Referred:
    """A scene and the object in it that matters.

    Attributes:
        split: Of the scene.
        index: Its number there.
        image: uint8 [side, side, 3].
        caption: All that is in it.
        place: The object's among the scene's.
        mask: Its visible part, bool [side, side].
        box: Around that.
        label: Its class, "red star".
        phrase: What tells it from the others in as few attributes as suffice, "the star".
    """

    split: str
    index: int
    image: np.ndarray
    caption: str
    place: int
    mask: np.ndarray
    box: Box
    label: str
    phrase: str


def choose_object(labels: np.ndarray, stride: int) -> int | None:
    """The first object that fills at least one cell of the weight map, so that M is 1 there, and that f-SSIM can see.

    Args:
        labels: uint8 [h, w], 0 for the background and k + 1 for object k; sides are multiples of the stride.
        stride: Pixels along the side of a cell.

    Returns:
        Its number from 0, or None where there is none.
    """
    height, width = labels.shape
    cells = labels.reshape(height // stride, stride, width // stride, stride)
    inside = labels[_MARGIN : height - _MARGIN, _MARGIN : width - _MARGIN]
    for k in range(int(labels.max())):
        if (cells == k + 1).all(axis=(1, 3)).any() and (inside == k + 1).any():
            return k
    return None


def referred_scenes(split: str, count: int, side: int, stride: int) -> list[Referred]:
    """The first scenes of a split that have an object to refer to.

    Raises:
        InputError: The split has fewer, or a side of which a cell is no divisor.
    """
    if side % stride:
        raise InputError(f"scenes of {side}x{side} pixels are not divided by cells of {stride}")
    found: list[Referred] = []
    index = 0
    while len(found) < count:
        fields = ("image", "masks", "boxes", "classes", "captions", "phrases")
        record = scene_record(split, index, SEEN, side, fields)
        place = choose_object(record["masks"], stride)
        if place is not None:
            left, top, right, bottom = record["boxes"][place].tolist()
            box, caption = Box(left, top, right - left, bottom - top), str(record["captions"][_COMPLETE])
            words = CLASSES[record["classes"][place]], str(record["phrases"][place, 0])
            mask = record["masks"] == place + 1
            found.append(Referred(split, index, record["image"], caption, place, mask, box, *words))
        index += 1
    return found


# -- ways to ask for a scene ----------------------------------------------------------------------------------------------

Ask = Callable[[Rsic, Referred], Demand | None]


def whole(_: Rsic, scene: Referred) -> Demand:
    """Global mode, at the codec's quality."""
    return Demand(scene.caption)


def by_mask(_: Rsic, scene: Referred) -> Demand:
    """The object by its mask."""
    return Demand(scene.caption, regions=(Mask(scene.mask),))


def by_box(_: Rsic, scene: Referred) -> Demand:
    """The object by the box around it."""
    return Demand(scene.caption, regions=(scene.box,))


def by_label(codec: Rsic, scene: Referred) -> Demand | None:
    """The object by its class; None where that finds nothing."""
    return _by_words(codec, scene, scene.label)


def by_phrase(codec: Rsic, scene: Referred) -> Demand | None:
    """The object by its phrase; None where that finds nothing."""
    return _by_words(codec, scene, scene.phrase)


def _by_words(codec: Rsic, scene: Referred, words: str) -> Demand | None:
    levels = levels_of(codec, scene.image, words)
    return None if levels is None else Demand(scene.caption, levels=levels)


def without_text(_: Rsic, scene: Referred) -> Demand:
    """The object by its mask, and no description."""
    return Demand("", regions=(Mask(scene.mask),))


def levels_of(codec: Rsic, image: np.ndarray, phrase: str) -> np.ndarray | None:
    """The levels of M for a phrase, or None where it finds nothing; `check_gem` has looked that GEM works at all."""
    try:
        return weight_levels(codec, image, Demand(phrases=(phrase,)))
    except InputError:
        return None


def check_gem(codec: Rsic) -> ClipModel:
    """The codec's CLIP.

    Raises:
        InputError: It has none, or none that GEM runs in.
    """
    if codec.clip is None:
        raise InputError(f"{codec.name} has no CLIP, which finds phrases and scores images: give it one")
    side = codec.clip.image_size
    similarity_maps(codec.clip, [np.zeros((side, side, 3), np.uint8)], ["object"], codec.gem)
    return codec.clip


# -- images at their sizes ------------------------------------------------------------------------------------------------


def through_files(
    codec: Rsic, scenes: Sequence[Referred], demands: Sequence[Demand], batch: int
) -> tuple[list[int], list[np.ndarray]]:
    """Bytes of whole files, and what they decode to."""
    files = jaxsem.compress(codec, [scene.image for scene in scenes], batch, demands)
    return [len(file) for file in files], jaxsem.decompress(codec, files, batch)


def through_text(codec: Rsic, scenes: Sequence[Referred], batch: int) -> tuple[list[int], list[np.ndarray]]:
    """Bytes of files that hold the description alone, and what the diffusion model draws from it.

    The noise that an image begins with is drawn by the codec's seed and the scene's number, whatever the batch.
    """
    height, width = scenes[0].image.shape[:2]
    guidance, stride = codec.config.guidance, codec.config.autoencoder.stride
    shape = (*(n // stride for n in padded_shape(codec, height, width)), codec.config.unet.in_channels)
    files = [pack(Item(height, width, {CAPTION: pack_text(scene.caption)}), codec.digest) for scene in scenes]
    images: list[np.ndarray] = []
    for start in range(0, len(scenes), batch):
        part = scenes[start : start + batch]
        numbers = filled(np.array([scene.index for scene in part]), batch)
        texts = [scene.caption for scene in part]
        context = codec.text([*texts, *texts[-1:] * (batch - len(texts))])
        given = codec.params["unet"], _noise(codec.seed, numbers, shape), context, codec.null
        z = _text_latents(codec.unet, codec.config.schedule, *given, guidance.scale, guidance.steps)
        decoded = np.asarray(run_decoder(codec.autoencoder, codec.params["autoencoder"], z))
        images += [np.ascontiguousarray(image[:height, :width]) for image in decoded[: len(part)]]
    return [len(file) for file in files], images


def _noise(seed: int, numbers: np.ndarray, shape: tuple[int, ...]) -> jax.Array:
    key = jax.random.key(seed)
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(key, k), shape))(jnp.asarray(numbers))


@partial(jax.jit, static_argnames=("unet", "schedule"))
def _text_latents(
    unet: UnetCondition,
    schedule: NoiseSchedule,
    params: Any,
    z_T: jax.Array,
    context: jax.Array,
    null: jax.Array,
    scale: float,
    steps: int,
) -> jax.Array:
    def denoise(z: jax.Array, t: jax.Array, context: jax.Array) -> jax.Array:
        return unet.apply({"params": params}, z, t, context)

    return sample(classifier_free(denoise, context, null, scale), schedule, z_T, steps)


# -- scores ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Meter:
    """What decoded images are measured by.

    Attributes:
        clip: For the CLIP score and the Fréchet distance.
        batch: Images at a time.
        lpips: Module and parameters, or None to leave f-LPIPS out.
    """

    clip: ClipModel
    batch: int
    lpips: tuple[Any, Any] | None = None

    def row(self, scenes: Sequence[Referred], sizes: Sequence[int], images: Sequence[np.ndarray]) -> Row:
        """Means over scenes, and under `each` the values of every one of them."""
        each: dict[str, list[float]] = {"bytes": list(sizes)}
        for scene, image in zip(scenes, images, strict=True):
            found = {
                "f_psnr": f_psnr(scene.image, image, scene.mask),
                "f_ssim": f_ssim(scene.image, image, scene.mask),
                "psnr": psnr(scene.image, image),
            }
            if self.lpips is not None:
                found["f_lpips"] = f_lpips(*self.lpips, scene.image, image, scene.mask)
            for name, value in found.items():
                each.setdefault(name, []).append(float(value))
        originals = self.clip.encode_images([scene.image for scene in scenes], self.batch)
        features = self.clip.encode_images(images, self.batch)
        texts = self.clip.encode_texts([scene.caption for scene in scenes])
        each["clip_score"] = np.asarray(pair_scores(features, texts)).tolist()
        means = {name: float(np.mean(values)) for name, values in each.items()}
        means["bpp"] = 8 * means["bytes"] / scenes[0].mask.size
        # Of one image there is no covariance.
        distance = frechet_distance(fit_gaussian(originals), fit_gaussian(features)) if len(scenes) > 1 else None
        return {**means, "clip_frechet": distance, "scenes": [scene.index for scene in scenes], "each": each}


def at_bytes(curve: Sequence[tuple[float, float]], size: float) -> float | None:
    """What a curve reaches at a size: linear between its points, and never less than what fewer bytes reach.

    Args:
        curve: Bytes and score of each point, in any order.
        size: Bytes.

    Returns:
        None where the size lies outside of the curve's.
    """
    points: dict[float, float] = {}
    for x, y in sorted(curve):
        points[x] = max(y, *points.values()) if points else y
    sizes = list(points)
    if not sizes or not sizes[0] <= size <= sizes[-1]:
        return None
    return float(np.interp(size, sizes, list(points.values())))


def compare(row: Row, globals_: Sequence[Row], keys: Sequence[str]) -> Row:
    """A row of referring mode against global mode at as many bytes, over the scenes that the row has.

    Returns:
        `range`, bytes of the global curve over these scenes; `global`, its scores at the row's bytes, and `difference`, the row's
        less these: both are empty where the bytes lie outside of the range.
    """
    wanted = set(row["scenes"])

    def mean(other: Row, key: str) -> float:
        pairs = zip(other["scenes"], other["each"][key], strict=True)
        return float(np.mean([value for scene, value in pairs if scene in wanted]))

    sizes = [mean(other, "bytes") for other in globals_]
    reached = {key: at_bytes([*zip(sizes, (mean(other, key) for other in globals_))], row["bytes"]) for key in keys}
    reached = {key: value for key, value in reached.items() if value is not None}
    difference = {key: row[key] - value for key, value in reached.items()}
    return {"row": row["row"], "range": [min(sizes), max(sizes)], "global": reached, "difference": difference}


# -- GEM ------------------------------------------------------------------------------------------------------------------


def measure_gem(codec: Rsic, count: int, side: int) -> Row:
    """Where GEM's weight goes, for one object each of valid and test scenes in turn, named by its label and by its phrase.

    A scene's absent object is the next one of another scene whose words are true of none of its own.

    Returns:
        `count`; and for `label` and `phrase` each `inside` and `outside`, the mean of M in and beside the objects' masks over words
        that find something (null where none do); `nothing`, the share that does not; `absent`, the number of words for absent
        objects, and `refused`, the share of these that finds nothing.
    """
    stride, split = codec.config.weight_map.stride, {"valid": (count + 1) // 2, "test": count // 2}
    halves = [referred_scenes(name, n, side, stride) for name, n in split.items()]
    scenes = [halves[k % 2][k // 2] for k in range(count)]
    worlds = [sample_scene(scene.split, scene.index, SEEN) for scene in scenes]
    things = [world.objects[scene.place] for world, scene in zip(worlds, scenes, strict=True)]
    meanings = {
        "label": [Description(None, thing.colour, thing.shape) for thing in things],
        "phrase": [refer(world)[scene.place][0].description for world, scene in zip(worlds, scenes, strict=True)],
    }
    found: Row = {"count": count}
    for kind, means in meanings.items():
        words = [getattr(scene, kind) for scene in scenes]
        absent = [
            next((j for k in range(1, count) if not any(map(means[j := (i + k) % count].fits, world.objects))), None)
            for i, world in enumerate(worlds)
        ]
        found[kind] = _weights_of(codec, scenes, words, [None if j is None else words[j] for j in absent])
    return found


def _weights_of(codec: Rsic, scenes: Sequence[Referred], words: Sequence[str], absent: Sequence[str | None]) -> Row:
    stride, values = codec.config.weight_map.stride, codec.config.weight_map.values
    inside, outside, refused = [], [], []
    for scene, present, other in zip(scenes, words, absent, strict=True):
        levels = levels_of(codec, scene.image, present)
        if levels is not None:
            weight = np.kron(values[levels], np.ones((stride, stride), np.float32))
            inside.append(float(weight[scene.mask].mean()))
            outside.append(float(weight[~scene.mask].mean()))
        if other is not None:
            refused.append(levels_of(codec, scene.image, other) is None)
    return {
        "inside": float(np.mean(inside)) if inside else None,
        "outside": float(np.mean(outside)) if outside else None,
        "nothing": 1 - len(inside) / len(scenes),
        "absent": len(refused),
        "refused": float(np.mean(refused)) if refused else None,
    }
