"""A recipe for HSVLC on the latents of a published model of latent diffusion, which stays as it is.

    photos ─ crops ─▶ autoencoder, frozen ─▶ latents ─┬─▶ HSVLC ─▶ exact priors, tables
                              drawn weight maps ──────┘

Of the pipeline's weights only the encoder is read for it. The weights file holds HSVLC alone, and says whose latents it codes.
"""

import dataclasses
from collections.abc import Callable
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsem.backbones.autoencoder_kl import AutoencoderKl
from jaxsem.calibration import calibrate_module
from jaxsem.codecs.hsvlc import Hsvlc, HsvlcConfig
from jaxsem.configs import plain
from jaxsem.data.batching import Batches, training_batches
from jaxsem.data.photos import random_crop
from jaxsem.data.sources import open_source
from jaxsem.data.weight_maps import training_map
from jaxsem.entropy.tables import gaussian_tables, quantise_counts
from jaxsem.errors import InputError
from jaxsem.systems.latent_diffusion import read_pipeline_config
from jaxsem.systems.rsic_config import RsicConfig
from jaxsem.systems.rsic_decoding import run_encoder
from jaxsem.systems.rsic_files import Companions, assemble, save_rsic
from jaxsem.systems.weight_map import WeightMapConfig
from jaxsem.training.diffusion import calibration_samples, codec_loss
from jaxsem.training.stages import Stage, remember, train_stage
from jaxsem.weights.diffusion import load_autoencoder_kl
from jaxsem.weights.native import half_kernels

_CALIBRATION = 24  # valid crops under drawn maps
_ENCODER = ("encoder", "quant")  # what of an autoencoder makes latents


@dataclasses.dataclass(frozen=True)
class HsvlcRecipe:
    """Everything that decides the training of HSVLC on photos' latents.

    Attributes:
      name: Of the run; also the default of its folder, `runs/NAME`.
      stage: The training.
      codec: Sizes of HSVLC.
      weight_map: M's cells and levels.
      diffusion: The model whose latents are coded: a folder or Hugging Face id of diffusers. The weights file names it.
      clip: The CLIP that finds phrases, which only the trained codec needs: see `jaxsem.systems.rsic_files.Companions`.
      language: Who describes images, likewise.
      data: Training images: a folder or `tfds:name/split`.
      valid: Images for choosing the best parameters; the training images serve where it is empty.
      valid_crops: How many of them are used, the first ones; a crop of each.
      crop: Side of the crops, a multiple of `stride`.
      min_scale: Smallest random reduction before the crop.
      dtype: Of the autoencoder, "float32" or "bfloat16"; HSVLC is float32 in any case.
      seed: Of parameters, data and maps.

    Raises:
      InputError: Sizes that do not fit together, or another dtype.
    """

    name: str
    stage: Stage
    codec: HsvlcConfig = dataclasses.field(default_factory=HsvlcConfig)
    weight_map: WeightMapConfig = dataclasses.field(default_factory=WeightMapConfig)
    diffusion: str = ""
    clip: str = "openai/clip-vit-large-patch14"
    language: str = ""
    data: str = ""
    valid: str = ""
    valid_crops: int = 64
    crop: int = 512
    min_scale: float = 1.0
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        cell, positions, pixels = self.weight_map.stride, self.codec.map_stride, self.codec.pixels
        if cell % positions or pixels != (cell // positions) ** 2:
            raise InputError(
                f"a cell of M is {cell} pixels high and codec.map_stride={positions} positions, of codec.pixels={pixels} each: "
                "codec.pixels is the square of weight_map.stride / codec.map_stride, a whole number"
            )
        if self.crop < 1 or self.crop % self.stride:
            raise InputError(
                f"crop={self.crop} must be a multiple of {self.stride}, of the coarsest scale's positions and M's cells"
            )
        if self.valid_crops < 1:
            raise InputError(f"valid_crops={self.valid_crops} must be at least 1")
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f"dtype={self.dtype!r} must be 'float32' or 'bfloat16'")

    @property
    def stride(self) -> int:
        """Pixels of which a crop's side must be a multiple."""
        return self.weight_map.stride // self.codec.map_stride * self.codec.stride

    def run(self, folder: Path, quiet: bool = False) -> Path:
        """Trains what is not there yet and writes the weights file; see `jaxsem.recipes.run_recipe`.

        Raises:
          InputError: No diffusion model, no photos, or a training that was interrupted.
          WeightsError: Another kind of diffusion model than `codec` is for, or exact arithmetic would cost too much rate.
        """
        if not self.diffusion:
            raise InputError(
                f"the recipe {self.name} needs a diffusion model: name a pipeline of Stable Diffusion with --set diffusion=FOLDER"
            )
        if not self.data:
            raise InputError(f"the recipe {self.name} needs photos: name a folder with --set data=FOLDER")
        pipeline = read_pipeline_config(self.diffusion)
        config = RsicConfig(pipeline.autoencoder, pipeline.unet, self.codec, self.weight_map, pipeline.schedule)
        work = _Work(self)
        remember(self, folder)
        # Rounded as they are shipped: the calibration sees these.
        params = half_kernels(jax.device_get(work.train(folder / "codec", quiet)))
        samples = calibration_samples(work.codec, params, work.valid()[:_CALIBRATION], self.weight_map.values)
        tables = gaussian_tables(quantise=quantise_counts)
        grids, tables = calibrate_module(self.name, work.codec, params, tables, samples)
        companions = Companions(self.clip, self.language, diffusion=self.diffusion)
        # Neither CLIP nor language model is needed to write the file.
        alone = dataclasses.replace(companions, clip="", language="")
        whole = assemble(self.name, config, {"codec": params}, tables, alone, grids, half=False)
        card = {"recipe": plain(self), "date": date.today().isoformat()}
        save_rsic(whole, folder / "model.safetensors", companions, grids, card, force=True)
        return folder / "model.safetensors"


class MappedBatches:
    """Batches of images with a weight map for each, `weight`, drawn from the seed and the image's place in the data alone.

    Args:
      batches: This process' share of the images.
      cells: Rows and columns of a map.
      seed: Decides the maps.
    """

    def __init__(self, batches: Batches, cells: int, seed: int = 0):
        self._batches, self._cells, self._seed = batches, cells, seed

    def __iter__(self) -> "MappedBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        position = self.get_state()["batches"]
        batch = next(self._batches)
        rows = len(batch["image"])
        # Every process has each `count`-th image.
        count, index = jax.process_count(), jax.process_index()
        places = [(position * rows + k) * count + index for k in range(rows)]
        rngs = [np.random.default_rng([self._seed, place]) for place in places]
        return {**batch, "weight": np.stack([training_map(rng, self._cells, self._cells) for rng in rngs])}

    def get_state(self) -> dict[str, int]:
        """The position of the images, which is that of the maps."""
        return self._batches.get_state()

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to a position of `get_state`."""
        self._batches.set_state(state)

    def close(self) -> None:
        """Stops reading ahead."""
        self._batches.close()


def photo_loss(autoencoder: AutoencoderKl, codec: Hsvlc) -> Callable:
    """The codec's loss of photos under maps, for `jaxsem.training`: `net` is trained, `autoencoder` frozen.

    Nothing that is trained lies before the latents, so the autoencoder has no backward pass.
    """
    loss_of = codec_loss(codec)

    def loss_fn(params: Any, rows: dict[str, jax.Array], rng: jax.Array) -> Any:
        z = run_encoder(autoencoder, params["autoencoder"], rows["image"])
        return loss_of(params["net"], z, rows["weight"], rng)

    return loss_fn


class _Work:
    """One run: what training and calibration share, made when it is first needed."""

    def __init__(self, recipe: HsvlcRecipe):
        self.recipe, self.codec = recipe, Hsvlc(recipe.codec)
        self.source = open_source(recipe.data, cache_bytes=1 << 30)
        dtype = jnp.dtype(recipe.dtype)
        self.autoencoder, params = load_autoencoder_kl(recipe.diffusion, dtype=dtype, param_dtype=dtype)
        self.encoder = jax.device_put({name: params[name] for name in _ENCODER if name in params})
        self.cells = recipe.crop // recipe.weight_map.stride
        self.valid = cache(self._valid)

    def train(self, folder: Path, quiet: bool) -> Any:
        """HSVLC's parameters."""
        recipe = self.recipe
        return train_stage(
            recipe.stage,
            folder,
            photo_loss(self.autoencoder, self.codec),
            self._init,
            self._batches,
            self._evaluation(),
            "objective",
            quiet,
            recipe.seed,
            frozen={"autoencoder": self.encoder},
        )["net"]

    def _init(self) -> Any:
        c = self.recipe.codec
        z, cells = jnp.zeros((1, c.stride, c.stride, c.latent)), c.stride // c.map_stride
        key = jax.random.key(self.recipe.seed)
        return {"net": jax.jit(self.codec.init)(key, z, jnp.zeros((1, cells, cells)))["params"]}

    def _batches(self) -> MappedBatches:
        r = self.recipe
        photos = training_batches(self.source, r.stage.batch, r.crop, seed=r.seed, min_scale=r.min_scale)
        return MappedBatches(photos, self.cells, r.seed)

    def _valid(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Latents [1, h, w, l] of valid crops and a drawn map [1, rows, columns] for each, the same in every process."""
        r, found = self.recipe, []
        source = open_source(r.valid) if r.valid else self.source
        for k in range(min(r.valid_crops, len(source))):
            rng = np.random.default_rng([r.seed, 1, k])
            image = random_crop(source[k]["image"], r.crop, rng, flip=False, min_scale=r.min_scale)
            weight = training_map(rng, self.cells, self.cells)
            z = run_encoder(self.autoencoder, self.encoder, image[None])
            found.append((np.asarray(z), weight[None]))
        return found

    def _evaluation(self) -> Callable[[Any], dict[str, float]]:
        """The mean metrics of the valid crops, rounded instead of with noise."""
        loss_of = codec_loss(self.codec)
        measure = jax.jit(lambda params, z, weight: loss_of(params, z, weight, None)[1])

        def eval_fn(params: Any) -> dict[str, float]:
            rows = [measure(params["net"], z, weight) for z, weight in self.valid()]
            return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}

        return eval_fn
