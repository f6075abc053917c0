"""A recipe for transform-necks on scenes: the neck alone (d1), then codec and neck (d2, d3), and the baseline Post-processing.

    scenes ─▶ codec ─▶ latents, once ─▶ neck ─▶ tower from layer k on ─▶ tokens ─┐
    scenes ─▶ tower ─▶ tokens, once ─────────────────────────────────────────────┴─▶ distillation, cross-entropy with texts

Every stage has a folder of its own in the run's, and is left out where its result is there: an interrupted run goes on.
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

from jaxsem.backbones.clip_inputs import normalize
from jaxsem.codec import Codec
from jaxsem.codecs import system_of
from jaxsem.codecs.hyperprior import Y_STRIDE
from jaxsem.configs import plain
from jaxsem.data.batching import ArrayBatches
from jaxsem.data.scenes import CLASSES, SceneConfig, batch
from jaxsem.errors import InputError
from jaxsem.losses import lambda_at
from jaxsem.nn.unet import UnetConfig
from jaxsem.progress import Progress
from jaxsem.recipes import QUANTILE_WEIGHT
from jaxsem.systems.clip_model import ClipModel
from jaxsem.systems.neck_codec import SCENARIOS, save_neck_codec, with_neck
from jaxsem.systems.transform_neck import NeckConfig, TransformNeck
from jaxsem.training.stages import Stage, remember, train_stage
from jaxsem.training.transform_neck import Student, Surrogate, distance_of, joint_loss, surrogate_loss
from jaxsem.weights.native import read_weights, write_weights

_SCENES = SceneConfig("seen")
_BATCH = 64  # scenes at a time where latents and tokens are computed once
_STATISTICS = 32  # batches whose statistics the U-Net keeps

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class NeckRecipe:
    """Everything that decides the training of transform-necks on scenes.

    Attributes:
      name: Of the run; also the default of its folder, `runs/NAME`.
      codec: A preset or weights file of an image codec, which d1 keeps and d2 and d3 start from.
      neck_stage: The training of the neck alone.
      joint_stage: That of codec and neck.
      scenarios: Which of SCENARIOS; d1 is trained in any case.
      bypassed: Layers of the tower that are not run.
      blocks: Of the neck.
      surrogate: The loss of the neck alone.
      init: A weights file whose neck d1 starts from; "" for random parameters.
      clip: The preset of CLIP features whose towers teach.
      unet: Sizes of the baseline Post-processing; None leaves it out.
      unet_stage: Its training, by the same loss.
      ratio: gamma / delta of d2.
      scenes: Training scenes.
      valid: Scenes that choose the best parameters.
      seed: Of parameters and data.

    Raises:
      InputError: No such scenario.
    """

    name: str
    codec: str
    neck_stage: Stage
    joint_stage: Stage
    scenarios: tuple[str, ...] = SCENARIOS
    bypassed: int = 2
    blocks: int = 1
    surrogate: Surrogate = dataclasses.field(default_factory=Surrogate)
    init: str = ""
    clip: str = "pqvae-mini"
    unet: UnetConfig | None = None
    unet_stage: Stage | None = None
    ratio: float = 60.0
    scenes: int = 16_384
    valid: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if surplus := sorted(set(self.scenarios) - set(SCENARIOS)):
            raise InputError(f"there is no scenario {', '.join(surplus)}; there are {', '.join(SCENARIOS)}")
        if (self.unet is None) != (self.unet_stage is None):
            raise InputError("a U-Net needs its stage, and a stage its U-Net: give both or none")

    def run(self, folder: Path, quiet: bool = False) -> Path:
        """Trains what is not there yet and writes a weights file for each scenario; see `jaxsem.recipes.run_recipe`.

        Returns:
          The weights file of d1.
        """
        remember(self, folder)
        work = _Work(self, folder, quiet)
        first = work.neck("d1")
        self._save(work, folder, "d1", work.codec, first)
        for scenario in self.scenarios:
            if scenario != "d1":
                self._save(work, folder, scenario, *work.joint(scenario, first))
        if self.unet is not None:
            work.post_processing()
        return folder / "d1.safetensors"

    def _save(self, work: "_Work", folder: Path, scenario: str, codec: Codec, params: Any) -> None:
        card = {"recipe": plain(self), "date": date.today().isoformat()}
        whole = with_neck(codec, work.config, params, scenario)
        save_neck_codec(whole, folder / f"{scenario}.safetensors", system_of(codec.module), card, force=True)


class _Work:
    """One run: what all stages share, made when it is first needed."""

    def __init__(self, recipe: NeckRecipe, folder: Path, quiet: bool):
        from jaxsem.presets import load

        self.recipe, self.folder, self.quiet = recipe, folder, quiet
        self.codec: Codec = load(recipe.codec)
        clip: ClipModel | None = getattr(load(recipe.clip), "clip", None)
        if not isinstance(self.codec, Codec) or clip is None:
            raise InputError(f"codec={recipe.codec} must be an image codec and clip={recipe.clip} one of CLIP features")
        self.clip = clip
        tower = clip.module.config
        grid = tuple(-(-side // Y_STRIDE) for side in tower.vision.height_width)
        self.config = NeckConfig(self.codec.module.config.latent, tower.vision, grid, recipe.bypassed, recipe.blocks)
        self.texts = clip.class_features([CLASSES[number] for number in _numbers()])
        self.scale = float(np.exp(clip.params["logit_scale"]))
        self.data = cache(self._data)

    # -- data ----------------------------------------------------------------------------------------------------------

    def _data(self, split: str) -> Arrays:
        """Of each scene: `image`, its latent `y` at a `quality` of its own, the teacher's `tokens`, and the classes' `shares`."""
        count = self.recipe.scenes if split == "train" else self.recipe.valid
        rng = np.random.default_rng([self.recipe.seed, split == "train"])
        qualities = rng.integers(0, self.codec.qualities, count).astype(np.float32)
        parts: dict[str, list[np.ndarray]] = {name: [] for name in ("image", "y", "tokens", "shares")}
        with Progress(count, "scenes", self.quiet) as progress:
            for start in range(0, count, _BATCH):
                rows = np.arange(start, start + _BATCH) % count  # one size is compiled
                drawn = batch(split, rows, _SCENES, self.clip.image_size, ("image", "classes"))
                y = _latents(self.codec.module, self.codec.params, drawn["image"], qualities[rows])
                tokens = _teacher_tokens(self.clip.module, self.clip.params, drawn["image"])
                for name, value in (
                    ("image", drawn["image"]),
                    ("y", y),
                    ("tokens", tokens),
                    ("shares", _shares(drawn["classes"])),
                ):
                    parts[name].append(np.asarray(value)[: count - start])
                for _ in rows[: count - start]:
                    progress.step()
        return {**{name: np.concatenate(values) for name, values in parts.items()}, "quality": qualities}

    # -- stages --------------------------------------------------------------------------------------------------------

    def _student_loss(self, student: Student, key: str, stage: Stage) -> Callable:
        """The surrogate loss of batches whose `key` goes in."""
        surrogate, texts = self.recipe.surrogate, jnp.asarray(self.texts)

        def loss_fn(params, rows, rng):
            del rng
            front = {"params": {"front": params["front"]}}
            inputs = rows[key].astype(jnp.float32) / (255.0 if rows[key].dtype == jnp.uint8 else 1.0)
            if student.neck is None:
                found, _ = student.apply(
                    {**front, "batch_stats": params["statistics"]},
                    inputs,
                    params["clip"],
                    True,
                    mutable=["batch_stats"],
                )
            else:
                found = student.apply(front, inputs, params["clip"])
            teacher = self._teacher(params["clip"], rows["tokens"])
            progress = rows["position"][0] / stage.steps
            loss, metrics = surrogate_loss(found, teacher, rows["shares"], texts, self.scale, surrogate, progress)
            return loss, {**metrics, "distance": distance_of(found, teacher, surrogate.distill)}

        return loss_fn

    def _teacher(self, clip_params: Any, tokens: jax.Array) -> dict[str, jax.Array]:
        tokens = tokens.astype(jnp.float32)
        feature = self.clip.module.apply({"params": clip_params}, tokens, method="image_feature")
        return {"tokens": tokens, "feature": feature}

    def _evaluation(self, loss_fn: Callable, size: int = 64) -> Callable:
        measure = jax.jit(lambda params, rows: loss_fn(params, rows, jax.random.key(0))[1])

        def eval_fn(params):
            valid = self.data("valid")
            found: dict[str, list[float]] = {}
            for start in range(0, len(valid["image"]) // size * size, size):
                rows = {name: value[start : start + size] for name, value in valid.items()}
                metrics = measure(params, {**rows, "position": np.zeros(size, np.float32)})
                for name, value in metrics.items():
                    found.setdefault(name, []).append(float(value))
            return {name: float(np.mean(values)) for name, values in found.items()}

        return eval_fn

    def _batches(self, stage: Stage, names: tuple[str, ...]) -> "Positioned":
        data = self.data("train")
        return Positioned({name: data[name] for name in names}, stage.batch, self.recipe.seed)

    def neck(self, scenario: str) -> Any:
        """The neck's parameters, trained alone."""
        from jaxsem.presets import load

        stage, student = self.recipe.neck_stage, Student(self.clip.module.config, self.config)
        neck, start = TransformNeck(self.config), load(self.recipe.init) if self.recipe.init else None
        if start is not None and getattr(getattr(start, "neck", None), "config", None) != self.config:
            raise InputError(f"init={self.recipe.init} has no neck of these sizes: {self.config}")

        def init() -> Any:
            if start is not None:
                return {"front": start.neck_params}
            y = jnp.zeros((1, *self.config.grid, self.config.latent))
            return {"front": jax.jit(neck.init)(jax.random.key(self.recipe.seed), y)["params"]}

        loss_fn = self._student_loss(student, "y", stage)
        return train_stage(
            stage,
            self.folder / scenario,
            loss_fn,
            init,
            lambda: self._batches(stage, ("y", "tokens", "shares")),
            self._evaluation(loss_fn),
            "distance",
            self.quiet,
            self.recipe.seed,
            frozen={"clip": self.clip.params},
        )["front"]

    def joint(self, scenario: str, neck: Any) -> tuple[Codec, Any]:
        """Codec and neck, trained together from those of d1."""
        stage, module = self.recipe.joint_stage, self.codec.module
        student = Student(self.clip.module.config, self.config)
        lambdas, qualities = module.config.lambdas, self.codec.qualities

        def forward(params, rows, noise, quality):
            x = rows["image"].astype(jnp.float32) / 255.0
            outputs = module.apply({"params": params["codec"]}, x, quality, noise)
            y = module.apply({"params": params["codec"]}, outputs["y_hat"], quality, method="without_gains")
            found = student.apply({"params": {"front": params["front"]}}, y, params["clip"])
            teacher = self._teacher(params["clip"], rows["tokens"])
            distance = jnp.square(found["tokens"] - jax.lax.stop_gradient(teacher["tokens"])).mean(axis=(1, 2))
            return joint_loss(x, outputs, distance, lambda_at(lambdas, quality), scenario, self.recipe.ratio)

        def loss_fn(params, rows, rng):
            dealer, noise = jax.random.split(rng)
            quality = (jax.random.permutation(dealer, len(rows["image"])) % qualities).astype(jnp.float32)
            loss, metrics = forward(params, rows, noise, quality)
            tails = module.apply({"params": params["codec"]}, method="quantile_loss")
            return loss + QUANTILE_WEIGHT * tails, {"objective": loss, **metrics}

        def eval_loss(params, rows, rng):
            del rng
            loss, metrics = forward(params, rows, None, rows["quality"])
            return loss, {"objective": loss, **metrics}

        params = train_stage(
            stage,
            self.folder / scenario,
            loss_fn,
            lambda: {"codec": jax.tree.map(jnp.asarray, self.codec.params), "front": jax.tree.map(jnp.asarray, neck)},
            lambda: self._batches(stage, ("image", "tokens")),
            self._evaluation(eval_loss),
            "objective",
            self.quiet,
            self.recipe.seed + 1,
            frozen={"clip": self.clip.params},
        )
        return self._frozen_codec(f"{self.recipe.name}-{scenario}", params["codec"]), params["front"]

    def _frozen_codec(self, name: str, params: Any) -> Codec:
        """The codec with new parameters, calibrated on valid scenes where it can be."""
        from jaxsem.calibration import calibrate
        from jaxsem.presets import freeze

        codec = freeze(name, self.codec.module, params)
        return calibrate(codec, list(self.data("valid")["image"][:48])) if codec.module.exactable else codec

    def post_processing(self) -> None:
        """The baseline: a U-Net between the codec's decoder and the whole tower; see `load_post_processing`."""
        stage, student = self.recipe.unet_stage, Student(self.clip.module.config, unet=self.recipe.unet)
        side = self.clip.image_size
        variables = jax.eval_shape(lambda: self._unet_variables(student, side))
        loss_fn = self._student_loss(student, "x_hat", stage)
        statistics = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), variables["batch_stats"])

        def decoded(split: str) -> Arrays:
            data = self.data(split)
            if "x_hat" not in data:
                size = _BATCH
                parts = [
                    _reconstruct(self.codec.module, self.codec.params, data["y"][i : i + size])
                    for i in range(0, len(data["y"]), size)
                ]
                data["x_hat"] = np.concatenate([np.asarray(part) for part in parts])
            return data

        def batches() -> "Positioned":
            decoded("train")
            return self._batches(stage, ("x_hat", "tokens", "shares"))

        if not (self.folder / "post_processing" / "done").exists():
            decoded("valid")
        params = train_stage(
            stage,
            self.folder / "post_processing",
            loss_fn,
            lambda: {"front": self._unet_variables(student, side)["params"]["front"]},
            batches,
            self._evaluation(loss_fn),
            "distance",
            self.quiet,
            self.recipe.seed,
            frozen={"clip": self.clip.params, "statistics": statistics},
        )
        path = self.folder / "post_processing.safetensors"
        if not path.exists():
            found = self._with_statistics(student, params, statistics, decoded("train")["x_hat"])
            card = {"recipe": plain(self.recipe), "date": date.today().isoformat()}
            config = dataclasses.asdict(self.recipe.unet)
            write_weights(path, "unet", config, card, jax.device_get(found), force=True)

    def _unet_variables(self, student: Student, side: int) -> Any:
        images = jnp.zeros((1, side, side, 3))
        return student.init(jax.random.key(self.recipe.seed), images, self.clip.params)

    def _with_statistics(self, student: Student, params: Any, first: Any, x_hat: np.ndarray) -> Any:
        """The U-Net's variables with the mean statistics of some batches of training images."""

        @jax.jit
        def run(images):
            images = images.astype(jnp.float32) / 255.0
            variables = {"params": params, "batch_stats": first}
            # Momentum 0.9 from zero: a tenth of the batch's own.
            _, changed = student.apply(variables, images, self.clip.params, True, mutable=["batch_stats"])
            return jax.tree.map(lambda leaf: 10.0 * leaf, changed["batch_stats"])

        count = min(_STATISTICS, len(x_hat) // _BATCH) or 1
        found = [run(x_hat[k * _BATCH : (k + 1) * _BATCH]) for k in range(count)]
        return {"params": params, "batch_stats": jax.tree.map(lambda *leaves: sum(leaves) / count, *found)}


def load_post_processing(folder: Path, clip: str = "pqvae-mini") -> tuple[Student, Any]:
    """The baseline Post-processing of a finished run: the module, which takes decoded images in [0, 1], and its variables.

    Raises:
      InputError: The run has none.
      WeightsError: The file is damaged.
    """
    from jaxsem.presets import load

    path = Path(folder) / "post_processing.safetensors"
    if not path.exists():
        raise InputError(f"{folder} has no post_processing.safetensors: its recipe has no U-Net, or is not finished")
    file = read_weights(path)
    unet = UnetConfig(tuple(file.config["widths"]), file.config["outputs"], file.config["residual"])
    return Student(load(clip).clip.module.config, unet=unet), jax.device_put(dict(file.params))


class Positioned(ArrayBatches):
    """Random rows with the `position` of the batch, for losses that change on the way."""

    def __next__(self) -> Arrays:
        position = np.full(self.batch_size, self._position, np.float32)
        return {**super().__next__(), "position": position}


# -- pieces ---------------------------------------------------------------------------------------------------------------


@cache
def _numbers() -> np.ndarray:
    return np.array([CLASSES.index(name) for name in _SCENES.class_names])


def _shares(classes: np.ndarray) -> np.ndarray:
    """Of classes [b, objects] with -1 for none: float32 [b, seen classes], alike for all that a scene has."""
    found = (classes[:, :, None] == _numbers()).any(axis=1).astype(np.float32)
    return found / found.sum(axis=1, keepdims=True)


def _compiled(function: Callable) -> Callable:
    return jax.jit(function, static_argnames="module")


@_compiled
def _teacher_tokens(module, params, images):
    images = normalize(images.astype(jnp.float32) / 255.0)
    return module.apply({"params": params}, images, method="image_tokens").astype(jnp.float16)


@_compiled
def _latents(module, params, images, quality):
    """Rounded latents in the units of g_a, as a file gives them."""
    outputs = module.apply({"params": params}, images.astype(jnp.float32) / 255.0, quality)
    y = module.apply({"params": params}, outputs["y_hat"], quality, method="without_gains")
    return y.astype(jnp.float16)


@_compiled
def _reconstruct(module, params, y):
    x = module.apply({"params": params}, y.astype(jnp.float32), method=lambda m, y: m.g_s(y))
    return jnp.round(jnp.clip(x, 0.0, 1.0) * 255.0).astype(jnp.uint8)
