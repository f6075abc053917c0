"""`load`, which turns a preset, a folder or a Hugging Face id into a codec, and what makes and writes one."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxsem.calibration import calibrate, with_grids
from jaxsem.codec import Codec
from jaxsem.codecs import build_module, param_shapes
from jaxsem.data.images import list_images, read_image
from jaxsem.entropy.factorised import factorised_tables, quantiles_by_bisection
from jaxsem.entropy.tables import Tables, gaussian_tables, quantise_counts
from jaxsem.errors import InputError, WeightsError
from jaxsem.nn.exact import COLLECTION
from jaxsem.preset_records import FEATURES, LANGUAGE, NECK, PRESETS, REFERRING, Preset
from jaxsem.weights.native import (
    WeightsFile,
    check_shapes,
    half_kernels,
    identity,
    is_foreign,
    read_weights,
    write_weights,
)

if TYPE_CHECKING:
    from jaxsem.systems.feature_codec import FeatureCodec
    from jaxsem.systems.mllm import Mllm
    from jaxsem.systems.rsic import Rsic

ASSETS = Path(__file__).parent / "assets"
BUNDLED_PHOTOS = ASSETS / "photos"
WEIGHTS_NAME = "model.safetensors"


def load(
    name: str,
    quality: float | None = None,
    weights: str | Path | None = None,
    arithmetic: str | None = None,
    clip: str | Path | None = None,
    diffusion: str | Path | None = None,
) -> "Codec | FeatureCodec | Rsic":
    """Loads a codec, of images or of CLIP features.

    Args:
      name: A preset (see `jaxsem presets`), a folder or file of weights written by `jaxsem train`, or the Hugging Face id of
        such a folder.
      quality: What `compress` uses, in [0, qualities - 1]; by default the middle one, rounded up, and for features the lowest.
      weights: For a preset whose weights are not shipped: a file or folder of ours, or a CompressAI state dict, which is
        calibrated for exact arithmetic on the bundled photos unless "float" is asked for.
      arithmetic: What `compress` decides tables in: "exact", whose files decode on every device, or "float". By default
        exact where the weights file was calibrated for it.
      clip: For a codec of features whose CLIP is not shipped, or one of RSIC, which finds phrases by it: a folder or Hugging Face
        id of CLIP.
      diffusion: For a codec of RSIC whose diffusion model is not in its file: a folder or Hugging Face id of diffusers.

    Returns:
      The codec, with its parameters on the default device.

    Raises:
      InputError: Neither a preset nor a folder, a quality that the weights do not serve, or no such arithmetic.
      WeightsError: The weights are missing, damaged or do not fit, or were not calibrated.
    """
    preset = PRESETS.get(name)
    if preset is not None and preset.system == LANGUAGE:
        raise InputError(f"{name} is a language model, no codec: load it with jaxsem.load_mllm")
    if preset is None:
        codec = _from_file(Path(name).name, _find(name), clip=clip, diffusion=diffusion)
    elif weights is not None:
        codec = _from_any(preset, Path(weights), arithmetic, clip, diffusion)
    elif preset.weights is None:
        raise WeightsError(
            f"the preset {name} comes without weights: name a file, as in load({name!r}, weights='elic.pth.tar')"
        )
    else:
        codec = _from_file(name, ASSETS / preset.weights, preset.sha256, clip, diffusion)
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


def load_mllm(source: str | Path, **options: Any) -> "Mllm":
    """Loads a multimodal language model.

    Args:
      source: A preset such as "llava-mini", a weights file or folder of ours, or a Hugging Face folder or id of LLaVA 1.5 or 1.6.
      **options: For the latter, see `jaxsem.systems.mllm.load_mllm`.

    Raises:
      InputError: Nothing is there, options for a model of ours, which has none, or what `jaxsem.systems.mllm.load_mllm` refuses.
      WeightsError: The weights are damaged, do not fit, or are those of a codec.
    """
    from jaxsem.systems import mllm, mllm_files

    preset, path = PRESETS.get(str(source)), weights_path(source)
    if preset is None and not path.is_file():
        return mllm.load_mllm(source, **options)
    if options:
        raise InputError(f"{source} is a model of ours and takes no {', '.join(options)}: those are for published ones")
    if preset is not None and preset.system != LANGUAGE:
        raise InputError(f"{source} is no language model: name one that is, or a folder of LLaVA")
    if preset is not None and preset.weights is None:
        raise InputError(
            f"the weights of {source} are not shipped: train them with jaxsem train {preset.recipe} and name their folder, or name "
            "a folder of LLaVA"
        )
    file = _read(path, None) if preset is None else _read(ASSETS / preset.weights, preset.sha256)
    if file.system != LANGUAGE:
        raise WeightsError(f"{source} holds weights of {file.system}, no language model: load it with jaxsem.load")
    return mllm_files.from_file(str(source), file)


def _read(path: Path, sha256: str | None) -> WeightsFile:
    file = read_weights(path)
    if sha256 is not None and file.sha256 != sha256:
        raise WeightsError(f"{path.name} has the SHA-256 {file.sha256[:12]}..., not {sha256[:12]}...: reinstall jaxsem")
    return file


def _from_file(
    name: str,
    path: Path,
    sha256: str | None = None,
    clip: str | Path | None = None,
    diffusion: str | Path | None = None,
) -> "Codec | FeatureCodec | Rsic":
    file = _read(path, sha256)
    if diffusion is not None and file.system != REFERRING:
        raise InputError(f"{name} does not decode by a diffusion model: leave {diffusion} out")
    if file.system == FEATURES:
        from jaxsem.systems import feature_files

        return feature_files.from_file(name, file)
    if file.system == LANGUAGE:
        raise WeightsError(f"{path} holds a language model, no codec: load it with jaxsem.load_mllm")
    if file.system == REFERRING:
        from jaxsem.systems import rsic_files

        return rsic_files.from_file(name, file, clip, diffusion)
    if file.system == NECK:
        from jaxsem.systems import neck_codec

        inside, *neck = neck_codec.split_file(name, file)
        return neck_codec.with_neck(_image_codec(name, path, inside), *neck)
    return _image_codec(name, path, file)


def _image_codec(name: str, path: Path, file: WeightsFile) -> Codec:
    if file.tables is None:
        raise WeightsError(f"{path} has no integer tables, which a codec of images needs")
    module = build_module(file.system, file.config)
    check_shapes(param_shapes(module), file.params, str(path))
    digest = identity(asdict(module.config), file.params, file.tables.digest())
    codec = Codec(name, module, jax.device_put(file.params), file.tables, digest)
    return codec if file.grids is None else with_grids(codec, file.grids)


def _from_any(
    preset: Preset, path: Path, arithmetic: str | None, clip: str | Path | None, diffusion: str | Path | None
) -> "Codec | FeatureCodec | Rsic":
    path = weights_path(path)
    if path.suffix == ".safetensors" and not is_foreign(path):
        return _from_file(preset.name, path, None, clip, diffusion)
    if preset.system == REFERRING:
        raise WeightsError(
            f"nobody has published weights of RSIC, so that {path} must be a file of ours: train it by {preset.recipe}"
        )
    if preset.system == FEATURES:
        from jaxsem.systems import feature_files

        if clip is None:
            raise InputError(
                f"{preset.name} compresses features of a CLIP that is not shipped: name it, as in "
                f"load({preset.name!r}, weights='dim_16 size_4.pt', clip='openai/clip-vit-large-patch14-336')"
            )
        return feature_files.load_published(clip, path, preset.config.rates[0])
    if preset.system == NECK:
        from jaxsem.systems.neck_codec import with_neck
        from jaxsem.weights.transform_neck import load_neck

        _, params = load_neck(path, preset.config.neck)  # first: it is small, and may not be there
        codec = _from_published(preset.name, path, preset.config.system, preset.config.codec, arithmetic)
        return with_neck(codec, preset.config.neck, jax.device_put(params), preset.config.scenario)
    return _from_published(preset.name, path, preset.system, preset.config, arithmetic)


def _from_published(name: str, path: Path, system: str, config: Any, arithmetic: str | None) -> Codec:
    from jaxsem.weights.compressai import load_compressai

    module, params = load_compressai(path, system, config)
    # Float32 as published: rounding could move a symbol away from the one that CompressAI codes.
    codec = freeze(name, module, params, half=False)
    wanted = arithmetic or ("exact" if module.exactable else "float")
    return codec if wanted == "float" else calibrate(codec, bundled_photos())


def bundled_photos() -> list[np.ndarray]:
    """The photos that come with jaxsem, uint8 [h, w, 3]."""
    return [read_image(path) for path in list_images(BUNDLED_PHOTOS)]
