"""The presets: one frozen record each, and `load`, which turns a preset, a folder or a Hugging Face id into a codec."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxsem.backbones.clip_config import VIT_L14_336, ClipConfig, TextConfig, VisionConfig
from jaxsem.backbones.gpt2 import Gpt2Config
from jaxsem.calibration import calibrate, with_grids
from jaxsem.codec import Codec
from jaxsem.codecs import (
    ElicConfig,
    FactorizedConfig,
    HyperpriorConfig,
    ScaleHyperpriorConfig,
    build_module,
    param_shapes,
)
from jaxsem.data.images import list_images, read_image
from jaxsem.data.words import WordTokenizer
from jaxsem.entropy.factorised import factorised_tables, quantiles_by_bisection
from jaxsem.entropy.tables import Tables, gaussian_tables, quantise_counts
from jaxsem.errors import InputError, WeightsError
from jaxsem.nn.exact import COLLECTION
from jaxsem.systems.clipcap import ClipCapConfig
from jaxsem.systems.feature_config import FeatureConfig
from jaxsem.systems.pqvae import RELEASED, PqvaeConfig
from jaxsem.weights.native import check_shapes, half_kernels, identity, is_foreign, read_weights, write_weights

if TYPE_CHECKING:
    from jaxsem.systems.feature_codec import FeatureCodec

ASSETS = Path(__file__).parent / "assets"
BUNDLED_PHOTOS = ASSETS / "photos"
WEIGHTS_NAME = "model.safetensors"
FEATURES = "pqvae"  # the system of codecs of CLIP features; all others are codecs of images
_IMAGE_COLUMNS = ("quality", "bpp", "psnr", "ms_ssim")


@dataclass(frozen=True)
class Preset:
    """What a preset is and where it comes from.

    Attributes:
      name: Its name.
      system: The codec family.
      config: The family's config.
      summary: One line for people.
      weights: File in `assets/`, or None: the weights are not shipped and come from a file or folder.
      sha256: Of that file, in hexadecimal.
      licence: Of the weights.
      trained_on: Data and date.
      recipe: The file in `experiments/` that trains it.
      results: Measured rows, written by `jaxsem eval`.
      columns: What the numbers of a row are.
      results_on: The data, hardware and date of `results`.
    """

    name: str
    system: str
    config: Any
    summary: str
    weights: str | None = None
    sha256: str | None = None
    licence: str = "-"
    trained_on: str = "-"
    recipe: str | None = None
    results: tuple[tuple[float, ...], ...] = field(default=())
    results_on: str = "-"
    columns: tuple[str, ...] = _IMAGE_COLUMNS


_MINI_RATE = PqvaeConfig(width=192, channels=32, hidden=(96, 48), residual=32, residual_layers=2)
PQVAE_MINI = FeatureConfig(
    ClipConfig(
        VisionConfig(
            width=128, layers=4, heads=4, hidden=512, patch=16, image_size=128, activation="gelu", stem=(24, 48, 64)
        ),
        TextConfig(
            width=128, layers=2, heads=4, hidden=512, vocabulary=len(WordTokenizer()), context=40, activation="gelu"
        ),
        projection=192,
    ),
    tuple(replace(_MINI_RATE, codeword=width, codebook=size) for width, size in ((16, 4), (16, 16), (8, 32))),
    ClipCapConfig(
        feature_width=192,
        prefix=4,
        gpt2=Gpt2Config(width=128, layers=3, heads=4, hidden=512, vocabulary=len(WordTokenizer()), context=48),
        normalise=True,
    ),
)

_PRESETS = (
    Preset(
        name="elic-mini",
        system="elic",
        config=ElicConfig(
            widths=(32, 64, 96),
            latent=128,
            hyper=64,
            groups=(8, 8, 16, 32, 64),
            context=(96, 64),
            lambdas=(0.0003, 0.001, 0.0035, 0.012),
        ),
        summary="ELIC's layout, small: four rates from one set of weights",
        weights="elic-mini.safetensors",
        sha256="bfb2b48413ceff972e7f8d3bdf166abe4a4064aff7af45270ceda7dfc831a082",
        licence="non-commercial research",
        trained_on="1,294 photos of BSDS500 and imagenet-sample-images, 2026-11-20",
        recipe="experiments/elic_mini.py",
        results=(
            (0, 0.0686, 23.70, 0.8627),
            (1, 0.1403, 25.75, 0.9166),
            (2, 0.2524, 27.34, 0.9474),
            (3, 0.3971, 28.19, 0.9623),
        ),
        results_on="50 photos of COCO train2017, 2-core x86, 2026-11-20",
    ),
    Preset(
        name="pqvae-mini",
        system=FEATURES,
        config=PQVAE_MINI,
        summary="PQVAE-shared with a small CLIP and captioner for scenes: classify, caption, refer",
        weights="pqvae-mini.safetensors",
        sha256="dc8fa26c21e875d5bf47c25a4f4689882343bf6fec3f7f443abd9956713c0dd0",
        licence="Apache-2.0",
        trained_on="scenes of the 48 seen classes, 2026-11-21",
        recipe="experiments/pqvae_mini.py",
        columns=("quality", "bytes", "bpd", "cosine", "accuracy_before", "accuracy"),
        results=(
            (0, 18.14, 0.298, 0.9855, 0.983, 0.979),
            (1, 22.47, 0.478, 0.9897, 0.983, 0.982),
            (2, 35.47, 1.019, 0.9937, 0.983, 0.984),
        ),
        results_on="1,600 scenes of one object of the 16 unseen classes, 2-core x86, 2026-11-21",
    ),
    Preset(
        "pqvae",
        FEATURES,
        FeatureConfig(VIT_L14_336, (RELEASED,)),
        "PQVAE-shared as released (400 bits); your `dim_16 size_4.pt` and CLIP ViT-L/14@336",
    ),
    Preset("elic", "elic", ElicConfig(), "ELIC at its published size; weights from a file of yours"),
    Preset("elic-official", "elic", ElicConfig(variant="official"), "ELIC as CompressAI's Elic2022Official"),
    Preset("hyperprior", "hyperprior", HyperpriorConfig(), "Mean-scale hyperprior (mbt2018-mean), N=128, M=192"),
    Preset(
        "hyperprior-wide",
        "hyperprior",
        HyperpriorConfig(192, 320),
        "Mean-scale hyperprior, qualities 5 to 8, N=192, M=320",
    ),
    Preset(
        "bmshj2018-factorized",
        "factorized",
        FactorizedConfig(),
        "Factorised prior, qualities 1 to 5, N=128, M=192",
    ),
    Preset(
        "bmshj2018-factorized-wide",
        "factorized",
        FactorizedConfig(192, 320),
        "Factorised prior, qualities 6 to 8, N=192, M=320",
    ),
    Preset(
        "bmshj2018-hyperprior",
        "scale-hyperprior",
        ScaleHyperpriorConfig(),
        "Scale hyperprior, qualities 1 to 5, N=128, M=192",
    ),
    Preset(
        "bmshj2018-hyperprior-wide",
        "scale-hyperprior",
        ScaleHyperpriorConfig(192, 320),
        "Scale hyperprior, qualities 6 to 8, N=192, M=320",
    ),
)
PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in _PRESETS})


def load(
    name: str,
    quality: float | None = None,
    weights: str | Path | None = None,
    arithmetic: str | None = None,
    clip: str | Path | None = None,
) -> "Codec | FeatureCodec":
    """Loads a codec, of images or of CLIP features.

    Args:
      name: A preset (see `jaxsem presets`), a folder or file of weights written by `jaxsem train`, or the Hugging Face id of
        such a folder.
      quality: What `compress` uses, in [0, qualities - 1]; by default the middle one, rounded up, and for features the lowest.
      weights: For a preset whose weights are not shipped: a file or folder of ours, or a CompressAI state dict, which is
        calibrated for exact arithmetic on the bundled photos unless "float" is asked for.
      arithmetic: What `compress` decides tables in: "exact", whose files decode on every device, or "float". By default
        exact where the weights file was calibrated for it.
      clip: For a codec of features whose CLIP is not shipped: a folder or Hugging Face id of CLIP.

    Returns:
      The codec, with its parameters on the default device.

    Raises:
      InputError: Neither a preset nor a folder, a quality that the weights do not serve, or no such arithmetic.
      WeightsError: The weights are missing, damaged or do not fit, or were not calibrated.
    """
    preset = PRESETS.get(name)
    if preset is None:
        codec = _from_file(Path(name).name, _find(name))
    elif weights is not None:
        codec = _from_any(preset, Path(weights), arithmetic, clip)
    elif preset.weights is None:
        raise WeightsError(
            f"the preset {name} comes without weights: name a file, as in load({name!r}, weights='elic.pth.tar')"
        )
    else:
        codec = _from_file(name, ASSETS / preset.weights, preset.sha256)
    codec = codec.at_quality(codec.default_quality if quality is None else quality)
    return codec if arithmetic is None else codec.in_arithmetic(arithmetic)


def freeze(name: str, module: Any, params: Any, half: bool = True) -> Codec:
    """Builds a codec once from trained parameters: the prior's tails by bisection, and the integer tables.

    Its arithmetic is float; `jaxsem.calibration.calibrate` adds the exact one.

    Args:
      name: What errors call it.
      module: The Flax module.
      params: Trained parameters.
      half: Whether to round the kernels to float16 values, which halves the weights file.

    Returns:
      The codec; saving and loading it changes nothing.
    """
    params = jax.tree.map(np.asarray, jax.device_get(params))
    params = half_kernels(params) if half else unflatten_dict(flatten_dict(params))
    prior = params["entropy_bottleneck"]
    parts = [[prior[f"{kind}_{i}"] for i in range(n)] for kind, n in (("matrix", 5), ("bias", 5), ("factor", 4))]
    quantiles = quantiles_by_bisection(*parts).astype(np.float32)
    # The hyper-decoder knows z on the grid about the trained medians: those stay, only the tails are found anew.
    quantiles[:, 1] = np.clip(prior["quantiles"][:, 0, 1], quantiles[:, 0], quantiles[:, 2])
    prior["quantiles"] = quantiles.reshape(-1, 1, 3)
    # Fewest bits for these probabilities; CompressAI's own rounding costs up to 0.66 % more on wide tables.
    tables = Tables.concat(
        gaussian_tables(quantise=quantise_counts), factorised_tables(*parts, quantiles, quantise=quantise_counts)
    )
    return Codec(name, module, jax.device_put(params), tables, identity(asdict(module.config), params, tables.digest()))


def save(codec: Codec, path: str | Path, system: str, card: Mapping[str, Any], force: bool = False) -> str:
    """Writes a codec as a weights file that `load` reads, and returns the file's SHA-256.

    Args:
      codec: From `freeze` or `load`.
      path: The file, or a folder that gets `model.safetensors`.
      system: The codec family.
      card: Data, date, recipe, licence: plain JSON.
      force: Whether to replace an existing file.

    Raises:
      OutputError: The file exists, or it cannot be written.
    """
    params = jax.device_get(codec.params)
    grids = None if codec.exact is None else jax.device_get(codec.exact[COLLECTION])
    return write_weights(
        weights_path(path), system, asdict(codec.module.config), card, params, codec.tables, grids, force=force
    )


def weights_path(path: str | Path) -> Path:
    """The weights file that a path means: the file itself, or a folder's `model.safetensors`."""
    path = Path(path)
    return path / WEIGHTS_NAME if path.is_dir() else path


def card_of(name: str, weights: str | Path | None = None) -> Mapping[str, Any]:
    """What a weights file of ours says of its origin; empty for a published checkpoint. Arguments as `load` takes them.

    Raises:
      InputError: Neither a preset nor a folder.
      WeightsError: The file is damaged.
    """
    if weights is not None:
        path = weights_path(weights)
    elif name in PRESETS:
        path = ASSETS / str(PRESETS[name].weights)
    else:
        path = _find(name)
    return read_weights(path).card if path.suffix == ".safetensors" and not is_foreign(path) else {}


def _find(name: str) -> Path:
    """The weights file that a path or a Hugging Face id means."""
    path = weights_path(name)
    if path.exists() or Path(name).is_dir():
        return path
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _from_hub(name)
    raise InputError(f"{name!r} is neither a preset ({', '.join(PRESETS)}) nor a folder of weights")


def _from_hub(repository: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise InputError(
            f"to load {repository!r} from Hugging Face, install huggingface_hub, or give a folder"
        ) from error
    try:
        return Path(hf_hub_download(repository, WEIGHTS_NAME))
    except Exception as error:  # the hub's own errors are many; each means that the file is not to be had
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{repository!r} is no folder here, and Hugging Face did not give its weights: {reason}"
        ) from error


def _from_file(name: str, path: Path, sha256: str | None = None) -> "Codec | FeatureCodec":
    file = read_weights(path)
    if sha256 is not None and file.sha256 != sha256:
        raise WeightsError(f"{path.name} has the SHA-256 {file.sha256[:12]}..., not {sha256[:12]}...: reinstall jaxsem")
    if file.system == FEATURES:
        from jaxsem.systems import feature_files

        return feature_files.from_file(name, file)
    if file.tables is None:
        raise WeightsError(f"{path} has no integer tables, which a codec of images needs")
    module = build_module(file.system, file.config)
    check_shapes(param_shapes(module), file.params, str(path))
    digest = identity(asdict(module.config), file.params, file.tables.digest())
    codec = Codec(name, module, jax.device_put(file.params), file.tables, digest)
    return codec if file.grids is None else with_grids(codec, file.grids)


def _from_any(preset: Preset, path: Path, arithmetic: str | None, clip: str | Path | None) -> "Codec | FeatureCodec":
    path = weights_path(path)
    if path.suffix == ".safetensors" and not is_foreign(path):
        return _from_file(preset.name, path)
    if preset.system == FEATURES:
        from jaxsem.systems import feature_files

        if clip is None:
            raise InputError(
                f"{preset.name} compresses features of a CLIP that is not shipped: name it, as in "
                f"load({preset.name!r}, weights='dim_16 size_4.pt', clip='openai/clip-vit-large-patch14-336')"
            )
        return feature_files.load_published(clip, path, preset.config.rates[0])
    from jaxsem.weights.compressai import load_compressai

    module, params = load_compressai(path, preset.system, preset.config)
    # Float32 as published: rounding could move a symbol away from the one that CompressAI codes.
    codec = freeze(preset.name, module, params, half=False)
    wanted = arithmetic or ("exact" if module.exactable else "float")
    return codec if wanted == "float" else calibrate(codec, bundled_photos())


def bundled_photos() -> list[np.ndarray]:
    """The photos that come with jaxsem, uint8 [h, w, 3]."""
    return [read_image(path) for path in list_images(BUNDLED_PHOTOS)]
