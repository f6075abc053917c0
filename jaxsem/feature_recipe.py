"""A recipe for a codec of CLIP features on scenes: CLIP, PQVAE-shared at several rates, the priors of its indices, the captioner.

    scenes ─▶ CLIP ─▶ features, extracted once ─┬─▶ PQVAE for each rate ─▶ its indices ─▶ their prior
                                                └─▶ the captioner, on features original and decoded

Every stage has a folder of its own in the run's, and is left out where its result is there: an interrupted run goes on. All of
it sees the 48 seen classes only.
"""

import dataclasses
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsem.backbones.clip import Clip
from jaxsem.backbones.clip_inputs import tokenize
from jaxsem.configs import plain
from jaxsem.data.batching import ArrayBatches
from jaxsem.data.scenes import SPLITS, SceneConfig, batch
from jaxsem.data.words import WordTokenizer
from jaxsem.entropy.indices import PriorRans
from jaxsem.errors import InputError
from jaxsem.progress import Progress
from jaxsem.systems.clip_model import ClipModel
from jaxsem.systems.clipcap import ClipCap, clipcap_loss
from jaxsem.systems.feature_codec import Captioner, FeatureCodec, Level, run_indices
from jaxsem.systems.feature_config import FeatureConfig
from jaxsem.systems.feature_files import assemble, save_feature_codec
from jaxsem.systems.index_prior import fit_prior, freeze_prior
from jaxsem.systems.pqvae import Pqvae, PqvaeConfig
from jaxsem.training import pqvae as pqvae_training
from jaxsem.training.clip import TEMPLATES, ClipTrainee, ScenePairs, clip_loss, scene_accuracy
from jaxsem.training.stages import Stage, remember, train_stage

_CAPTION = 3  # of a scene's five: all objects with their sizes, and the background
_VALID = 1024  # scenes that choose the best parameters of a stage


@dataclasses.dataclass(frozen=True)
class FeatureRecipe:
    """Everything that decides the training of a codec of CLIP features on scenes.

    Attributes:
      name: Of the run; also the default of its folder, `runs/NAME`.
      config: Sizes of all parts; CLIP's are for the words of scenes.
      clip_stage: CLIP's training.
      patch_weight: Weight of the loss that names shape and colour of each patch.
      rate_stage: The training of PQVAE at each rate.
      mixing: See `jaxsem.training.pqvae.training_loss`.
      features: Training features to extract, a multiple of the batches of CLIP's stage.
      prior_steps: Steps of each prior of indices.
      prior_hidden: Hidden units of each.
      captioner_stage: The captioner's training.
      seed: Of parameters and data.
    """

    name: str
    config: FeatureConfig
    clip_stage: Stage
    rate_stage: Stage
    captioner_stage: Stage
    patch_weight: float = 0.5
    mixing: float = 0.0
    features: int = 24_576
    prior_steps: int = 2500
    prior_hidden: int = 48
    seed: int = 0

    def run(self, folder: Path, quiet: bool = False) -> Path:
        """Trains what is not there yet and writes the weights file; see `jaxsem.recipes.run_recipe`."""
        remember(self, folder)
        clip = self._clip(folder / "clip", quiet)
        train_features, valid_features = self._features(folder / "features.npz", clip, quiet)
        levels = [
            self._level(folder / f"rate_{k}", config, train_features, valid_features, quiet)
            for k, config in enumerate(self.config.rates)
        ]
        captioner = self._captioner(folder / "captioner", clip, levels, quiet)
        codec = assemble(self.name, clip, levels, captioner)
        card = {"recipe": plain(self), "date": date.today().isoformat()}
        save_feature_codec(codec, folder / "model.safetensors", card, force=True)
        return folder / "model.safetensors"

    # -- stages -----------------------------------------------------------------------------------------------------------

    def _clip(self, folder: Path, quiet: bool) -> ClipModel:
        trainee, vision = ClipTrainee(self.config.clip), self.config.clip.vision
        tokenizer = WordTokenizer()
        if self.config.clip.text is None or self.config.clip.text.vocabulary != len(tokenizer):
            raise InputError(
                f"the text tower needs the vocabulary of scenes, {len(tokenizer)} words: {self.config.clip.text}"
            )

        def init() -> Any:
            images, texts = (
                jnp.zeros((1, *vision.height_width, 3)),
                jnp.zeros((1, self.config.clip.text.context), jnp.int32),
            )
            return jax.jit(trainee.init)(jax.random.key(self.seed), images, texts)["params"]

        params = train_stage(
            self.clip_stage,
            folder,
            clip_loss(self.config.clip, self.patch_weight),
            init,
            lambda: ScenePairs(self.config.clip, self.clip_stage.batch, self.seed),
            scene_accuracy(self.config.clip),
            "error",
            quiet,
            self.seed,
        )
        return ClipModel("clip", Clip(self.config.clip), params["clip"], tokenizer, TEMPLATES, article=True)

    def _features(self, path: Path, clip: ClipModel, quiet: bool) -> tuple[np.ndarray, np.ndarray]:
        """CLIP's features of pictures as in its own training, and those of valid scenes."""
        if not path.exists():
            size = self.clip_stage.batch
            pairs = ScenePairs(self.config.clip, size, self.seed + 1)
            with Progress(self.features, "features", quiet) as progress:
                parts = []
                for _ in range(0, self.features, size):
                    parts.append(clip.encode_images(next(pairs)["image"], size))
                    for _ in range(size):
                        progress.step()
            valid = batch("valid", range(_VALID), SceneConfig("seen"), clip.image_size, ("image",))["image"]
            np.savez(path, train=np.concatenate(parts), valid=clip.encode_images(valid, size))
        with np.load(path) as file:
            return file["train"], file["valid"]

    def _level(self, folder: Path, config: PqvaeConfig, features: np.ndarray, valid: np.ndarray, quiet: bool) -> Level:
        module = Pqvae(config)
        params = train_stage(
            self.rate_stage,
            folder,
            pqvae_training.training_loss(config, self.mixing),
            lambda: pqvae_training.first_params(module, features, self.seed),
            lambda: ArrayBatches({"features": features}, self.rate_stage.batch, self.seed),
            pqvae_training.make_evaluation(config, valid),
            "cosine",
            quiet,
            self.seed,
            pqvae_training.revival(config),
        )
        indices = np.concatenate(
            [np.asarray(run_indices(module, params, part)) for part in np.split(features, max(1, len(features) // 512))]
        )
        sizes = (config.codebook,) * config.codewords
        prior = fit_prior(indices, sizes, hidden=self.prior_hidden, steps=self.prior_steps, seed=self.seed)
        return Level(module, params, PriorRans(freeze_prior(prior)))

    def _captioner(self, folder: Path, clip: ClipModel, levels: list[Level], quiet: bool) -> Captioner:
        tokenizer, config = WordTokenizer(), self.config.captioner
        module = ClipCap(config)
        last = SPLITS["train"]

        @cache  # made only if there is something to train
        def arrays(split: str) -> dict[str, np.ndarray]:
            rows = range(last - self.features // 2, last) if split == "train" else range(_VALID // 4)
            return caption_arrays(clip, levels, split, rows)

        def init() -> Any:
            features, tokens = jnp.zeros((1, config.feature_width)), jnp.zeros((1, 2), jnp.int32)
            return jax.jit(module.init)(jax.random.key(self.seed), features, tokens)["params"]

        def loss_fn(params, rows, rng):
            del rng
            mask = rows["tokens"] != tokenizer.pad_token_id
            logits = module.apply({"params": params}, rows["features"], rows["tokens"], mask)
            return clipcap_loss(logits, rows["tokens"], mask)

        @jax.jit
        def measure(params, rows):
            loss, metrics = loss_fn(params, rows, None)
            return {"loss": loss, **metrics}

        params = train_stage(
            self.captioner_stage,
            folder,
            loss_fn,
            init,
            lambda: ArrayBatches(arrays("train"), self.captioner_stage.batch, self.seed),
            lambda params: {name: float(value) for name, value in measure(params, arrays("valid")).items()},
            "loss",
            quiet,
            self.seed,
        )
        return Captioner(module, params, tokenizer, tokenizer.end, longest=self.config.clip.text.context - 1)


def caption_arrays(clip: ClipModel, levels: list[Level], split: str, indices: range) -> dict[str, np.ndarray]:
    """Features of scenes and what to say of them: a third each as CLIP gives them, and as each level decodes them.

    Returns:
      `features` float32 [n, width] and `tokens` int32 [n, length]: words and end, no start.
    """
    tokenizer = WordTokenizer()
    features, texts = [], []
    for start in range(indices.start, indices.stop, 256):
        rows = range(start, min(start + 256, indices.stop))
        part = batch(split, rows, SceneConfig("seen"), clip.image_size, ("image", "captions"))
        features.append(clip.encode_images(part["image"], 256))
        texts += [str(row[_CAPTION]) for row in part["captions"]]
    found = np.concatenate(features)
    codec = FeatureCodec("captions", clip, tuple(levels), b"")
    for k in range(len(levels)):
        mine = np.arange(k, len(found), len(levels) + 1)
        at = codec.at_quality(k)
        found[mine] = at.features(at.indices(found[mine]))
    length = clip.module.config.text.context
    return {"features": found, "tokens": tokenize(tokenizer, texts, length)[:, 1:]}
