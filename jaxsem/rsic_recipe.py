"""A recipe for referring semantic compression on scenes: the autoencoder, a diffusion model of its latents, and their codec.

    scenes ─▶ autoencoder ─▶ latents, once ─┬─▶ U-Net, told captions by a frozen text tower
                                            └─▶ HSVLC, under drawn weight maps ─▶ exact priors, tables

Every stage has a folder of its own in the run's, and is left out where its result is there: an interrupted run goes on.
"""

import dataclasses
from collections.abc import Callable
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsem.backbones.autoencoder_kl import AutoencoderKl
from jaxsem.backbones.unet_2d_condition import UnetCondition
from jaxsem.calibration import calibrate_module
from jaxsem.codecs.hsvlc import Hsvlc
from jaxsem.configs import plain
from jaxsem.data.batching import ArrayBatches
from jaxsem.data.scenes import SceneConfig, batch
from jaxsem.data.weight_maps import training_map
from jaxsem.entropy.tables import gaussian_tables, quantise_counts
from jaxsem.progress import Progress
from jaxsem.systems.rsic_config import RsicConfig
from jaxsem.systems.rsic_decoding import run_encoder
from jaxsem.systems.rsic_files import Companions, assemble, save_rsic
from jaxsem.systems.text_condition import TextCondition
from jaxsem.training.diffusion import (
    autoencoder_loss,
    calibration_samples,
    codec_loss,
    denoising_draws,
    noisy,
    target_of,
)
from jaxsem.training.stages import Stage, remember, train_stage
from jaxsem.weights.native import half_kernels

_SCENES = SceneConfig()
_BATCH = 64  # scenes at a time where latents are computed once
_EACH = 4  # captions, and weight maps, that are kept of a scene
_CALIBRATION = 24  # latents under drawn maps

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class RsicRecipe:
    """Everything that decides the training of a codec of referring semantic compression on scenes.

    Attributes:
      name: Of the run; also the default of its folder, `runs/NAME`.
      config: Sizes. The autoencoder's scale and shift are found in training.
      companions: The CLIP whose text tower conditions the diffusion model, and who describes images.
      autoencoder_stage: The training of the autoencoder.
      unet_stage: That of the U-Net.
      codec_stage: That of HSVLC.
      divergence: Weight of the latents' divergence from N(0, 1), a number each.
      unconditional: Share of images whose caption is left out, for classifier-free guidance.
      scenes: Training scenes.
      valid: Scenes that choose the best parameters.
      seed: Of parameters and data.
    """

    name: str
    config: RsicConfig
    companions: Companions
    autoencoder_stage: Stage
    unet_stage: Stage
    codec_stage: Stage
    divergence: float = 1e-5
    unconditional: float = 0.1
    scenes: int = 16_384
    valid: int = 256
    seed: int = 0

    def run(self, folder: Path, quiet: bool = False) -> Path:
        """Trains what is not there yet and writes the weights file; see `jaxsem.recipes.run_recipe`."""
        remember(self, folder)
        work = _Work(self, folder, quiet)
        autoencoder = work.autoencoder()
        unet, codec = work.unet(), work.codec()
        params = {
            name: half_kernels(jax.device_get(part)) for name, part in work.parts(autoencoder, unet, codec).items()
        }
        tables = gaussian_tables(quantise=quantise_counts)
        module, samples = Hsvlc(self.config.codec), work.samples(params["codec"])
        grids, tables = calibrate_module(self.name, module, params["codec"], tables, samples)
        whole = assemble(self.name, work.config, params, tables, self.companions, grids, half=False, clip=work.clip)
        path = folder / "model.safetensors"
        card = {"recipe": plain(self), "date": date.today().isoformat()}
        save_rsic(whole, path, self.companions, grids, card, force=True)
        return path


class _Work:
    """One run: what its stages share, made when it is first needed."""

    def __init__(self, recipe: RsicRecipe, folder: Path, quiet: bool):
        from jaxsem.presets import load

        self.recipe, self.folder, self.quiet = recipe, folder, quiet
        self.clip = load(recipe.companions.clip).clip
        self.text = TextCondition.of_clip(self.clip)
        self.images = cache(self._images)
        self.latents = cache(self._latents)
        self.autoencoder = cache(self._autoencoder)
        self.config = recipe.config

    @staticmethod
    def parts(autoencoder: Any, unet: Any, codec: Any) -> dict[str, Any]:
        """Parameters by the names of the parts."""
        return {"autoencoder": autoencoder, "unet": unet, "codec": codec}

    # -- data ----------------------------------------------------------------------------------------------------------

    def _count(self, split: str) -> int:
        return self.recipe.scenes if split == "train" else self.recipe.valid

    def _images(self, split: str) -> Arrays:
        """Of each scene: `image`, `ids` of captions [4, tokens], and drawn weight maps `weight` [4, rows, columns]."""
        count, side = self._count(split), self.clip.image_size
        cells = side // self.recipe.config.weight_map.stride
        parts: dict[str, list[np.ndarray]] = {"image": [], "ids": [], "weight": []}
        with Progress(count, "scenes", self.quiet) as progress:
            for start in range(0, count, _BATCH):
                rows = range(start, min(start + _BATCH, count))
                drawn = batch(split, rows, _SCENES, side, ("image", "masks", "captions"))
                parts["image"].append(drawn["image"])
                for k, labels, texts in zip(rows, drawn["masks"], drawn["captions"], strict=True):
                    rng = np.random.default_rng([self.recipe.seed, split == "train", k])
                    chosen = rng.permutation(texts)[:_EACH]
                    parts["ids"].append(np.stack([self.text.cut(str(text)).ids for text in chosen])[None])
                    parts["weight"].append(
                        np.stack([training_map(rng, cells, cells, labels) for _ in range(_EACH)])[None]
                    )
                    progress.step()
        return {name: np.concatenate(values) for name, values in parts.items()}

    def _latents(self, split: str) -> Arrays:
        """What `_images` gives, and the scaled latents `z`; needs the autoencoder."""
        data = self.images(split)
        module, params = AutoencoderKl(self.config.autoencoder), self.autoencoder()
        starts = range(0, len(data["image"]), _BATCH)
        parts = [np.asarray(run_encoder(module, params, data["image"][k : k + _BATCH])) for k in starts]
        return {"z": np.concatenate(parts).astype(np.float16), "ids": data["ids"], "weight": data["weight"]}

    def _batches(self, data: Arrays, names: tuple[str, ...], stage: Stage) -> ArrayBatches:
        return ArrayBatches({name: data[name] for name in names}, stage.batch, self.recipe.seed)

    def _evaluation(self, loss_fn: Callable, data: Callable[[], Arrays], extra: Any, size: int) -> Callable:
        """The mean metrics over the valid scenes, with the same draws at every evaluation."""
        measure = jax.jit(lambda params, rows, key: loss_fn({**params, **extra}, rows, key)[1])

        def eval_fn(params: Any) -> dict[str, float]:
            valid, found = data(), {}
            for k, start in enumerate(range(0, len(next(iter(valid.values()))) // size * size, size)):
                rows = {name: value[start : start + size] for name, value in valid.items()}
                for name, value in measure(params, rows, jax.random.key(k)).items():
                    found.setdefault(name, []).append(float(value))
            return {name: float(np.mean(values)) for name, values in found.items()}

        return eval_fn

    # -- stages --------------------------------------------------------------------------------------------------------

    def _autoencoder(self) -> Any:
        """Its parameters; sets the scale and shift in `config` by the latents of the valid scenes."""
        recipe, stage = self.recipe, self.recipe.autoencoder_stage
        module, side = AutoencoderKl(recipe.config.autoencoder), self.clip.image_size

        def loss_fn(params: Any, rows: Arrays, rng: jax.Array) -> Any:
            images = rows["image"].astype(jnp.float32) / 127.5 - 1.0

            def through(net: AutoencoderKl) -> Any:
                mean, logvar = net.encode(images)
                z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(rng, mean.shape)
                return net.decode(z), mean, logvar

            decoded, mean, logvar = module.apply({"params": params["net"]}, method=through)
            return autoencoder_loss(images, decoded, mean, logvar, recipe.divergence)

        params = train_stage(
            stage,
            self.folder / "autoencoder",
            loss_fn,
            lambda: {"net": jax.jit(module.init)(jax.random.key(recipe.seed), jnp.zeros((1, side, side, 3)))["params"]},
            lambda: self._batches(self.images("train"), ("image",), stage),
            self._evaluation(loss_fn, lambda: {"image": self.images("valid")["image"]}, {}, 32),
            "mse",
            self.quiet,
            recipe.seed,
        )["net"]
        # Rounded as they are shipped: all that follows sees these.
        params = half_kernels(jax.device_get(params))
        plain_scale = dataclasses.replace(recipe.config.autoencoder, scaling_factor=1.0, shift_factor=0.0)
        z = np.asarray(run_encoder(AutoencoderKl(plain_scale), params, self.images("valid")["image"][:128]))
        # Six decimals, so that the same run writes the same config wherever it is resumed.
        scale, shift = round(1.0 / float(z.std()), 6), round(float(z.mean()), 6)
        found = dataclasses.replace(recipe.config.autoencoder, scaling_factor=scale, shift_factor=shift)
        self.config = dataclasses.replace(recipe.config, autoencoder=found)
        return jax.device_put(params)

    def unet(self) -> Any:
        """The U-Net's parameters."""
        recipe, stage, schedule = self.recipe, self.recipe.unet_stage, self.recipe.config.schedule
        self.autoencoder()
        module, tower = UnetCondition(recipe.config.unet), self.text.module
        null = jnp.asarray(self.text.cut("").ids)

        def loss_fn(params: Any, rows: Arrays, rng: jax.Array) -> Any:
            z, ids = rows["z"].astype(jnp.float32), rows["ids"]
            pick, drop, draw = jax.random.split(rng, 3)
            ids = ids[jnp.arange(len(ids)), jax.random.randint(pick, (len(ids),), 0, ids.shape[1])]
            left = jax.random.uniform(drop, (len(ids), 1)) < recipe.unconditional
            context = tower.apply({"params": params["text"]}, jnp.where(left, null, ids), method="token_states")
            t, noise = denoising_draws(schedule, z, draw)
            found = module.apply({"params": params["net"]}, noisy(schedule, z, t, noise), t, context)
            error = jnp.square(found - target_of(schedule, z, t, noise)).mean()
            return error, {"error": error}

        def init() -> Any:
            c = recipe.config
            side = self.clip.image_size // c.autoencoder.stride
            z, context = (
                jnp.zeros((1, side, side, c.unet.in_channels)),
                jnp.zeros((1, self.text.length, self.text.width)),
            )
            return {
                "net": jax.jit(module.init)(jax.random.key(recipe.seed), z, jnp.zeros(1, jnp.int32), context)["params"]
            }

        text = {"text": self.text.params}
        return train_stage(
            stage,
            self.folder / "unet",
            loss_fn,
            init,
            lambda: self._batches(self.latents("train"), ("z", "ids"), stage),
            self._evaluation(loss_fn, lambda: self._some("valid", "z", "ids"), text, 64),
            "error",
            self.quiet,
            recipe.seed + 1,
            frozen=text,
        )["net"]

    def codec(self) -> Any:
        """HSVLC's parameters."""
        recipe, stage = self.recipe, self.recipe.codec_stage
        self.autoencoder()
        module, c = Hsvlc(recipe.config.codec), recipe.config
        loss_of = codec_loss(module)

        def loss_fn(params: Any, rows: Arrays, rng: jax.Array, noise: bool = True) -> Any:
            z, weight = rows["z"].astype(jnp.float32), rows["weight"]
            pick, draw = jax.random.split(rng)
            weight = weight[jnp.arange(len(weight)), jax.random.randint(pick, (len(weight),), 0, weight.shape[1])]
            return loss_of(params["net"], z, weight, draw if noise else None)

        def init() -> Any:
            side = self.clip.image_size // c.autoencoder.stride
            z, cells = jnp.zeros((1, side, side, c.codec.latent)), side // c.codec.map_stride
            return {"net": jax.jit(module.init)(jax.random.key(recipe.seed), z, jnp.zeros((1, cells, cells)))["params"]}

        return train_stage(
            stage,
            self.folder / "codec",
            loss_fn,
            init,
            lambda: self._batches(self.latents("train"), ("z", "weight"), stage),
            self._evaluation(partial(loss_fn, noise=False), lambda: self._some("valid", "z", "weight"), {}, 64),
            "objective",
            self.quiet,
            recipe.seed + 2,
        )["net"]

    def _some(self, split: str, *names: str) -> Arrays:
        data = self.latents(split)
        return {name: data[name] for name in names}

    def samples(self, params: Any) -> list[tuple[dict[str, jax.Array], np.ndarray]]:
        """Latents of valid scenes under drawn maps, for calibration."""
        data, config = self.latents("valid"), self.recipe.config
        count = min(_CALIBRATION, len(data["z"]))
        pairs = ((data["z"][k : k + 1], data["weight"][k, :1]) for k in range(count))
        return calibration_samples(Hsvlc(config.codec), params, pairs, config.weight_map.values)
