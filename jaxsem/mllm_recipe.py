"""A recipe for a small LLaVA on scenes: a frozen CLIP tower, a projector and a language model that answers questions.

scenes ─▶ CLIP's tower ─▶ tokens, computed once ─▶ projector ─▶ language model ─▶ answers
"""

import dataclasses
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsem.backbones.clip_inputs import normalize
from jaxsem.backbones.llava import Llava, LlavaConfig
from jaxsem.configs import plain
from jaxsem.data.batching import ArrayBatches
from jaxsem.data.questions import MARKS, question_words
from jaxsem.data.scenes import SceneConfig, batch
from jaxsem.data.words import WordTokenizer
from jaxsem.errors import InputError
from jaxsem.progress import Progress
from jaxsem.systems.mllm_files import make_mllm, save_mllm
from jaxsem.systems.mllm_prompts import Words
from jaxsem.training.mllm import conversations, talk_evaluation, talk_loss
from jaxsem.training.stages import Stage, remember, train_stage

_SCENES = SceneConfig("seen")
_BATCH = 128  # pictures at a time through the tower


@dataclasses.dataclass(frozen=True)
class MllmRecipe:
    """Everything that decides the training of a small LLaVA on scenes.

    Attributes:
      name: Of the run; also the default of its folder, `runs/NAME`.
      config: Sizes; the tower is that of `tower`.
      stage: The training.
      tower: The preset of CLIP features whose image tower it gets, or a weights file of one.
      scenes: Training scenes.
      valid: Scenes that choose the best parameters.
      each: Conversations about a scene.
      length: Tokens of a conversation, those of the picture included.
      seed: Of parameters and data.
    """

    name: str
    config: LlavaConfig
    stage: Stage
    tower: str = "pqvae-mini"
    scenes: int = 16_384
    valid: int = 512
    each: int = 3
    length: int = 192
    seed: int = 0

    def run(self, folder: Path, quiet: bool = False) -> Path:
        """Trains what is not there yet and writes the weights file; see `jaxsem.recipes.run_recipe`."""
        remember(self, folder)
        words = WordTokenizer(question_words(), MARKS)
        tokenizer = Words(words, self.config.image_token)
        if self.config.text.vocabulary != len(words):
            raise InputError(f"the language model needs the vocabulary of questions, {len(words)} words: {self.config}")
        module, vision = Llava(self.config), self._tower()

        @cache  # made only if there is something to train
        def rows(split: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
            scenes, each = (range(self.scenes), self.each) if split == "train" else (range(self.valid), 1)
            talk = conversations(
                tokenizer, self.config.square_tokens, split, scenes, _SCENES, self.length, each, self.seed
            )
            return talk, scene_tokens(module, vision, split, scenes, quiet)

        done = (folder / "language" / "done").exists()
        params = train_stage(
            self.stage,
            folder / "language",
            talk_loss(module),
            lambda: self._init(module),
            lambda: ArrayBatches(rows("train")[0], self.stage.batch, self.seed),
            (lambda params: {}) if done else talk_evaluation(module, *rows("valid")),
            "loss",
            quiet,
            self.seed,
            frozen=None if done else {"tokens": jnp.asarray(rows("train")[1])},
        )
        model = make_mllm(self.name, self.config, {"vision": vision, **params}, words.words, words.marks)
        card = {"recipe": plain(self), "date": date.today().isoformat()}
        save_mllm(model, folder / "model.safetensors", card, force=True)
        return folder / "model.safetensors"

    def _tower(self) -> Any:
        from jaxsem.presets import load

        clip = getattr(load(self.tower), "clip", None)
        if clip is None or clip.module.config.vision != self.config.vision:
            raise InputError(f"tower={self.tower} has no image tower of the sizes {self.config.vision}")
        return clip.params["vision"]

    def _init(self, module: Llava) -> Any:
        ids, visual = jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 1, self.config.text.width))
        params = jax.jit(module.init)(jax.random.key(self.seed), ids, visual)["params"]
        return {name: params[name] for name in ("projector", "language")}


def scene_tokens(module: Llava, vision: Any, split: str, scenes: range, quiet: bool = True) -> np.ndarray:
    """The tower's tokens of scenes of the seen classes, float16 [scenes, n, width], as `Llava.project` takes them."""
    side = module.config.side

    @jax.jit
    def tokens(vision: Any, images: jax.Array) -> jax.Array:
        images = normalize(images.astype(jnp.float32) / 255.0)
        return module.apply({"params": {"vision": vision}}, images, method="visual_tokens").astype(jnp.float16)

    parts = []
    with Progress(len(scenes), "scenes", quiet) as progress:
        for start in range(scenes.start, scenes.stop, _BATCH):
            some = range(start, min(start + _BATCH, scenes.stop))
            images = batch(split, some, _SCENES, side, ("image",))["image"]
            missing = _BATCH - len(images)  # one size is compiled
            found = np.asarray(tokens(vision, np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)])))
            parts.append(found[: len(images)])
            for _ in some:
                progress.step()
    return np.concatenate(parts)
