"""Recipes: a Python file in `experiments/` names what to train, on what and how; `run_recipe` does it.

A recipe file defines `RECIPE`, a frozen dataclass with a `name` and `run(folder, quiet)`, and `QUICK`, overrides that make it a
test of a few steps. `Recipe` here is that of an image codec; `jaxsem.feature_recipe` has that of a codec of CLIP features.
"""

import ast
import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jaxsem import presets
from jaxsem.calibration import calibrate, training_variables
from jaxsem.codec import Codec
from jaxsem.codecs import build_module, init_params
from jaxsem.configs import plain
from jaxsem.data.sources import first_images
from jaxsem.errors import InputError
from jaxsem.losses import lambda_at, rate_distortion
from jaxsem.nn.exact import COLLECTION
from jaxsem.training.optimizer import OptimizerConfig

# What every recipe's QUICK shares: two steps on the bundled photos.
QUICK_RUN = MappingProxyType(
    {"data": str(presets.BUNDLED_PHOTOS), "steps": 2, "batch": 8, "crop": 64, "log_every": 1, "eval_every": 2}
)
# Keeps the tails' pull well below the rate's, with which it shares the gradient's norm.
QUANTILE_WEIGHT = 1e-3
_CALIBRATION = 12  # images


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run of an image codec.

    Attributes:
      name: Of the run; also the default of its folder, `runs/NAME`.
      system: Codec family, see `jaxsem.codecs`.
      config: Its config.
      data: Training images: a folder or `tfds:name/split`.
      valid: Images for choosing the best parameters; the training images' first 12 serve where it is empty.
      steps: Optimiser steps.
      batch: Images a step.
      crop: Side of the random crops, a multiple of 64.
      min_scale: Smallest random reduction before the crop.
      weight: lambda of a model of one rate; ignored by a variable-rate model, whose config lists its own.
      optimizer: Of the parameters.
      ema_decay: Of the moving average that is evaluated and kept; None for none.
      dtype: Of the arithmetic, "float32" or "bfloat16"; parameters are float32 in any case.
      init: A weights file or folder to start from instead of random parameters: of the same config, or of other `lambdas`.
      exact: Whether to train with the quantisation of exact arithmetic in the loop; it is that of `init`, which must be
        calibrated.
      log_every: Steps between rows of metrics.
      eval_every: Steps between evaluations and checkpoints.
      seed: Of parameters, data order and noise.
    """

    name: str
    system: str
    config: Any
    data: str = ""
    valid: str = ""
    steps: int = 100_000
    batch: int = 8
    crop: int = 256
    min_scale: float = 1.0
    weight: float = 0.01
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    ema_decay: float | None = None
    dtype: str = "float32"
    init: str = ""
    exact: bool = False
    log_every: int = 50
    eval_every: int = 1000
    seed: int = 0

    def run(self, folder: Path, quiet: bool = False) -> Path:
        """Trains and writes the weights file, calibrated for exact arithmetic on the first images of `valid`.

        Raises:
          InputError: No photos, a crop that does not fit, or images that cannot serve as calibration.
          WeightsError: Exact arithmetic would cost too much rate; the weights are written without it.
        """
        return _train_codec(self, folder, quiet)


@runtime_checkable
class Runnable(Protocol):
    """What a recipe file may define as `RECIPE`."""

    name: str

    def run(self, folder: Path, quiet: bool = False) -> Path:
        """Trains, going on from what is in the folder, and returns the weights file."""


def run_recipe(
    recipe: str | Path | Runnable,
    workdir: str | Path | None = None,
    overrides: Sequence[str] = (),
    quick: bool = False,
    quiet: bool = False,
) -> Path:
    """Trains a recipe, going on from the newest checkpoint in `workdir`, and writes the best parameters as a weights file.

    Args:
      recipe: A recipe file, or what it defines as `RECIPE`.
      workdir: Folder of the run; `runs/NAME` by default.
      overrides: `key=value` strings; `optimizer.KEY` and `config.KEY` reach inside.
      quick: Whether to apply the file's `QUICK` overrides first.
      quiet: Whether to print nothing.

    Returns:
      The weights file, which `jaxsem.load` reads.

    Raises:
      InputError: An unreadable recipe, an unknown key, a value of another kind, or what the recipe itself refuses.
      WeightsError: What the recipe itself refuses.
    """
    known, shortcuts = read_recipe(recipe) if isinstance(recipe, str | Path) else (recipe, {})
    settings = override(override(known, shortcuts if quick else {}), parse_overrides(overrides))
    return settings.run(Path(workdir or f"runs/{settings.name}"), quiet)


def _train_codec(settings: Recipe, folder: Path, quiet: bool) -> Path:
    from jaxsem.data.batching import training_batches
    from jaxsem.data.sources import open_source
    from jaxsem.training.loop import LoopConfig, train
    from jaxsem.training.sharding import make_mesh

    if not settings.data:
        raise InputError(f"the recipe {settings.name} needs photos: name a folder with --set data=FOLDER")
    if settings.crop % 64:
        raise InputError(f"crop={settings.crop} must be a multiple of 64")
    module = build_module(settings.system, dataclasses.asdict(settings.config), jnp.dtype(settings.dtype))
    source = open_source(settings.data, cache_bytes=1 << 30)
    valid = open_source(settings.valid, cache_bytes=1 << 28) if settings.valid else source
    loop = LoopConfig(
        steps=settings.steps,
        log_every=settings.log_every,
        eval_every=settings.eval_every,
        checkpoint_every=settings.eval_every,
        ema_decay=settings.ema_decay,
        quiet=quiet,
    )
    start = _first_codec(module, settings)
    state = train(
        training_loss(module, settings.weight, _grids(start, settings)),
        _first_params(module, settings) if start is None else start.params,
        lambda: training_batches(
            source, settings.batch, settings.crop, seed=settings.seed, min_scale=settings.min_scale
        ),
        settings.optimizer,
        loop,
        folder,
        eval_fn=make_evaluation(module, valid, settings.weight),
        mesh=make_mesh(),
        seed=settings.seed,
        config=plain(settings),
    )
    return _write_best(module, settings, folder, int(state.step), valid)


def training_loss(module: Any, weight: float, grids: Mapping[str, Any] | None = None) -> Callable:
    """The loss of a codec for `jaxsem.training`: rate-distortion, and the pull on the factorised prior's quantiles.

    Args:
      module: The codec's module.
      weight: lambda of a model of one rate.
      grids: Of exact arithmetic, for its quantisation in the loop; None for float arithmetic.

    Returns:
      loss_fn(params, batch, rng) -> (loss, metrics), pure.
    """
    lambdas = module.config.lambdas

    def loss_fn(params, batch, rng):
        x = batch["image"].astype(jnp.float32) / 255.0
        dealer, noise = jax.random.split(rng)
        # Every quality as often, in a new order each step.
        quality = (jax.random.permutation(dealer, x.shape[0]) % max(len(lambdas), 1)).astype(jnp.float32)
        variables = {"params": params} if grids is None else training_variables(params, grids)
        outputs = module.apply(variables, x, quality, noise)
        loss, metrics = rate_distortion(x, outputs, lambda_at(lambdas, quality) if lambdas else weight)
        tails = module.apply({"params": params}, method="quantile_loss")
        return loss + QUANTILE_WEIGHT * tails, {"rd": loss, "tails": tails, **metrics}

    return loss_fn


def make_evaluation(module: Any, source: Any, weight: float, images: int = 12, side: int = 256) -> Callable:
    """An evaluation with rounding instead of noise, on centre crops of the first images, at every quality.

    Returns:
      eval_fn(params) -> `loss` (the mean over qualities), and `bpp_Q`, `psnr_Q`.
    """
    crops = [_centre(source[i]["image"], side) for i in range(min(images, len(source)))]
    batch = np.stack(crops)
    lambdas = module.config.lambdas

    @jax.jit
    def measure(params, pixels, level):
        x = pixels.astype(jnp.float32) / 255.0
        quality = jnp.full(x.shape[0], level)
        outputs = module.apply({"params": params}, x, quality)
        return rate_distortion(x, outputs, lambda_at(lambdas, quality) if lambdas else weight)

    def eval_fn(params):
        rows = {}
        for level in range(max(len(lambdas), 1)):
            loss, metrics = measure(params, batch, float(level))
            rows |= {f"loss_{level}": loss, f"bpp_{level}": metrics["bpp"], f"psnr_{level}": metrics["psnr"]}
        losses = [rows.pop(f"loss_{level}") for level in range(max(len(lambdas), 1))]
        return {"loss": float(np.mean(losses)), **{name: float(value) for name, value in rows.items()}}

    return eval_fn


# -- reading and overriding ----------------------------------------------------------------------------------------------


def read_recipe(path: str | Path) -> tuple[Runnable, dict[str, Any]]:
    """The `RECIPE` and `QUICK` of a recipe file, or of NAME in `experiments/NAME.py`; the file is Python and runs.

    Raises:
      InputError: No such file, or it does not define them.
    """
    path = Path(path)
    if not path.is_file() and not path.suffix:
        path = Path("experiments") / f"{str(path).replace('-', '_')}.py"
    if not path.is_file():
        near = sorted(p.as_posix() for p in Path("experiments").glob("*.py") if not p.name.startswith("_"))
        hint = f"; there are {', '.join(near)}" if near else ""
        raise InputError(f"{path} is no recipe file{hint}")
    spec = importlib.util.spec_from_file_location(f"jaxsem_recipe_{path.stem}", path)
    if spec is None:
        raise InputError(f"{path} is no Python file: a recipe ends in .py")
    file = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(file)
    except Exception as error:
        raise InputError(f"the recipe {path} does not run: {type(error).__name__}: {error}") from error
    recipe, quick = getattr(file, "RECIPE", None), getattr(file, "QUICK", None)
    if not (dataclasses.is_dataclass(recipe) and isinstance(recipe, Runnable) and isinstance(quick, Mapping)):
        raise InputError(
            f"{path} must define RECIPE, such as a jaxsem.recipes.Recipe, and QUICK, a dictionary of overrides"
        )
    return recipe, dict(quick)


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`key=value` strings as a dictionary; values are Python literals, or else strings.

    Raises:
      InputError: No `=` in a string.
    """
    parsed = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"--set takes key=value, not {text!r}")
        try:
            parsed[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed[key] = value
    return parsed


def override(record: Any, values: Mapping[str, Any]) -> Any:
    """A frozen record with some fields replaced; dotted keys reach into records within.

    Raises:
      InputError: An unknown key, or a value of another kind than the field's.
    """
    fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    changed: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        first, _, rest = key.partition(".")
        if first not in fields:
            near = get_close_matches(first, fields, 1)
            meant = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(fields))}"
            raise InputError(f"no setting {first!r}; {meant}")
        if rest:
            inner.setdefault(first, {})[rest] = value
        else:
            changed[first] = _fitting(key, fields[first], value)
    for name, values_within in inner.items():
        if not dataclasses.is_dataclass(fields[name]):
            raise InputError(f"the setting {name!r} has nothing inside")
        changed[name] = override(fields[name], values_within)
    return dataclasses.replace(record, **changed)


def _fitting(key: str, old: Any, new: Any) -> Any:
    if isinstance(old, float) and isinstance(new, int) and not isinstance(new, bool):
        return float(new)
    if isinstance(old, tuple) and isinstance(new, list):
        return tuple(new)
    if old is None or new is None or isinstance(new, type(old)):
        return new
    raise InputError(f"{key} is {old!r}, {type(old).__name__}; it cannot become {new!r}, {type(new).__name__}")


# -- pieces --------------------------------------------------------------------------------------------------------------


def _first_codec(module: Any, settings: Recipe) -> Codec | None:
    """The codec that `init` names, None without."""
    if not settings.init:
        return None
    codec = presets.load(settings.init)
    mine, theirs = (getattr(each.config, "lambdas", ()) for each in (module, codec.module))
    config = dataclasses.replace(codec.module.config, **({"lambdas": mine} if len(mine) == len(theirs) > 0 else {}))
    if config != module.config:
        raise InputError(f"init={settings.init} holds a model of another config: {codec.module.config}")
    return codec


def _grids(start: Codec | None, settings: Recipe) -> Mapping[str, Any] | None:
    if not settings.exact:
        return None
    if start is None or start.exact is None:
        raise InputError("exact=True needs init=WEIGHTS, calibrated weights to start from: see `jaxsem calibrate`")
    return start.exact[COLLECTION]


def _first_params(module: Any, settings: Recipe) -> Any:
    params = init_params(module, settings.seed)
    lambdas = np.asarray(module.config.lambdas)
    if len(lambdas):
        # Start where high-rate theory ends: the step size of a quality goes with lambda^(-1/2).
        log_gain = 0.5 * np.log(lambdas / lambdas[len(lambdas) // 2])[:, None]
        gains = params["gain_y"]
        params["gain_y"] = {"forward": gains["forward"] + log_gain, "inverse": gains["inverse"] - log_gain}
    return params


def _centre(image: np.ndarray, side: int) -> np.ndarray:
    """The centre of an image, reflected outwards where it is too small."""
    missing = [max(side - n, 0) for n in image.shape[:2]]
    image = np.pad(image, [(m // 2, m - m // 2) for m in missing] + [(0, 0)], mode="symmetric")
    top, left = ((n - side) // 2 for n in image.shape[:2])
    return image[top : top + side, left : left + side]


def _write_best(module: Any, settings: Recipe, folder: Path, step: int, valid: Any) -> Path:
    from jaxsem.training.checkpoint import load_best

    params, info = load_best(folder)
    codec = presets.freeze(settings.name, build_module(settings.system, dataclasses.asdict(settings.config)), params)
    card = {"recipe": plain(settings), "date": date.today().isoformat(), "steps": step, "best": info}
    path = folder / presets.WEIGHTS_NAME
    presets.save(codec, path, settings.system, card, force=True)  # first without calibration: it may refuse
    if module.exactable:
        presets.save(calibrate(codec, first_images(valid, _CALIBRATION)), path, settings.system, card, force=True)
    return path
