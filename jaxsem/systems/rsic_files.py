"""Codecs of referring semantic compression as weights files: the networks, the exact priors, and whose help they need.

The file names what else is needed. A small codec reads texts and finds phrases by the CLIP of another preset; one at full size
has its diffusion model in a folder of diffusers, and only HSVLC in the file. All of this is loaded at once, but the language model,
which describes images, at the first image without a description.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsem.backbones import autoencoder_kl, unet_2d_condition
from jaxsem.backbones.autoencoder_kl import AutoencoderKlConfig
from jaxsem.backbones.unet_2d_condition import UnetConditionConfig
from jaxsem.calibration import check_grids, exact_variables
from jaxsem.codecs.hsvlc import HsvlcConfig
from jaxsem.configs import plain, record_of
from jaxsem.diffusion import NoiseSchedule
from jaxsem.entropy.tables import Tables
from jaxsem.errors import InputError, WeightsError
from jaxsem.systems.clip_model import ClipModel, load_clip_model
from jaxsem.systems.gem import GemConfig
from jaxsem.systems.latent_diffusion import LatentDiffusion, load_latent_diffusion
from jaxsem.systems.rsic import SYSTEM, Rsic
from jaxsem.systems.rsic_config import GuidanceConfig, RsicConfig
from jaxsem.systems.text_condition import TextCondition
from jaxsem.systems.weight_map import WeightMapConfig
from jaxsem.weights.native import WeightsFile, check_shapes, half_kernels, identity, write_weights

DESCRIBE = "Describe the image."

_NETWORKS = ("autoencoder", "unet", "codec")
_PARTS = {
    "autoencoder": AutoencoderKlConfig,
    "unet": UnetConditionConfig,
    "codec": HsvlcConfig,
    "weight_map": WeightMapConfig,
    "schedule": NoiseSchedule,
    "guidance": GuidanceConfig,
}


@dataclasses.dataclass(frozen=True)
class Companions:
    """What a codec takes from other presets.

    Attributes:
      clip: Finds phrases, and conditions a diffusion model that brings no text tower: a preset of CLIP features, a weights file
        of one, or a folder or Hugging Face id of CLIP; "" for none.
      language: Describes images: a preset, weights file, folder or Hugging Face id of a language model; "" for none.
      diffusion: The autoencoder, the U-Net and its text tower: a folder or Hugging Face id of diffusers; "" where the file has
        them.
      gem: How phrases are looked for.
      least_contrast: See `Rsic`.
      least_peak: Likewise.
    """

    clip: str
    language: str = ""
    diffusion: str = ""
    gem: GemConfig = dataclasses.field(default_factory=GemConfig)
    least_contrast: float = 0.02
    least_peak: float = 0.0


def assemble(
    name: str,
    config: RsicConfig,
    params: Mapping[str, Any],
    tables: Tables,
    companions: Companions,
    grids: Mapping[str, Any] | None = None,
    half: bool = True,
    clip: ClipModel | None = None,
    pipeline: LatentDiffusion | None = None,
) -> Rsic:
    """Puts trained parts together.

    Args:
      name: What errors call it.
      config: Sizes.
      params: Of `codec`, and unless there is a pipeline of `autoencoder` and `unet`.
      tables: The integer tables.
      companions: Whose help it needs.
      grids: Of the codec's priors in exact arithmetic, by `jaxsem.calibration.calibrate_module`; None leaves it in floats.
      half: Whether to round matrices to float16 values, which halves the weights file. Grids must have seen them rounded.
      clip: The CLIP, if it is at hand already.
      pipeline: The diffusion model, likewise.

    Raises:
      InputError: The text tower is of another width than the U-Net's context, or a preset that is none of CLIP features.
      WeightsError: Parameters or grids that do not fit, or a pipeline of another architecture.
    """
    params = {part: half_kernels(value) if half else value for part, value in jax.device_get(dict(params)).items()}
    digest = digest_of(plain(config), params, tables, grids)
    clip = clip or (_clip_of(companions.clip) if companions.clip else None)
    if pipeline is None and companions.diffusion:
        pipeline = load_latent_diffusion(companions.diffusion)
    if pipeline is not None:
        _check_pipeline(name, config, pipeline)
        params, text = {**pipeline.params, **params}, pipeline.text
    elif clip is None:
        raise InputError(f"{name} has no text tower: name a CLIP or a pipeline of diffusers")
    else:
        text = TextCondition.of_clip(clip)
    if text.width != config.unet.context_width:
        raise InputError(
            f"the text tower of {companions.clip} gives {text.width} numbers a token, and the U-Net of {name} takes "
            f"{config.unet.context_width}: name another CLIP"
        )
    codec = Rsic(
        name,
        config,
        params,
        text,
        tables,
        digest,
        clip=clip,
        gem=companions.gem,
        least_contrast=companions.least_contrast,
        least_peak=companions.least_peak,
        describe=_describer(companions.language) if companions.language else None,
    )
    for part, shapes in _shapes(codec).items():
        check_shapes(shapes, params[part], f"the {part} of {name}")
    exact, arithmetic = None, "float"
    if grids is not None:
        check_grids(codec.codec, params["codec"], grids)
        exact, arithmetic = jax.device_put(exact_variables(params["codec"], grids)), "exact"
    codec = dataclasses.replace(codec, params=jax.device_put(params), exact=exact, arithmetic=arithmetic)
    return codec.at_quality(codec.default_quality)


def _check_pipeline(name: str, config: RsicConfig, pipeline: LatentDiffusion) -> None:
    found = {
        "autoencoder": (pipeline.autoencoder.config, config.autoencoder),
        "U-Net": (pipeline.unet.config, config.unet),
        "noise": (pipeline.schedule, config.schedule),
    }
    for part, (have, wanted) in found.items():
        for field in dataclasses.fields(wanted):
            seen, asked = getattr(have, field.name), getattr(wanted, field.name)
            if seen != asked:
                raise WeightsError(
                    f"the {part} of {pipeline.name} has {field.name}={seen}, and {name} was trained for {asked}: give the pipeline "
                    "that it was trained with"
                )


def save_rsic(
    codec: Rsic,
    path: str | Path,
    companions: Companions,
    grids: Mapping[str, Any] | None,
    card: Mapping[str, Any],
    force: bool = False,
) -> str:
    """Writes a codec as one weights file, without what its companions bring, and returns the file's SHA-256.

    Raises:
      OutputError: The file exists, or it cannot be written.
    """
    config = {**plain(codec.config), "companions": plain(companions)}
    params = {part: codec.params[part] for part in (("codec",) if companions.diffusion else _NETWORKS)}
    return write_weights(path, SYSTEM, config, card, jax.device_get(params), codec.tables, grids, force=force)


def from_file(
    name: str, file: WeightsFile, clip: str | Path | None = None, diffusion: str | Path | None = None
) -> Rsic:
    """The codec of a weights file, with its parameters on the default device.

    Args:
      name: What errors call it.
      file: The file.
      clip: In place of the companion of this name.
      diffusion: Likewise, of a codec that does not bring its own.

    Raises:
      InputError: A companion that is not there, or a pipeline for a codec that has its own.
      WeightsError: Its parts do not fit together.
    """
    try:
        parts = {part: record_of(kind, file.config[part]) for part, kind in _PARTS.items()}
        fields = dict(file.config["companions"])
        companions = Companions(gem=record_of(GemConfig, fields.pop("gem")), **fields)
        config = RsicConfig(**parts)
        params = {part: file.params[part] for part in (("codec",) if companions.diffusion else _NETWORKS)}
    except (KeyError, TypeError, ValueError, InputError) as error:
        raise WeightsError(f"the weights of {name} do not fit together: {error}") from error
    if file.tables is None:
        raise WeightsError(f"the weights of {name} have no integer tables")
    if diffusion is not None and not companions.diffusion:
        raise InputError(f"{name} has a diffusion model of its own, and takes no other: leave {diffusion} out")
    given = {"clip": clip, "diffusion": diffusion}
    companions = dataclasses.replace(
        companions, **{key: str(value) for key, value in given.items() if value is not None}
    )
    return assemble(name, config, params, file.tables, companions, file.grids, half=False)


def digest_of_file(file: WeightsFile) -> bytes:
    """The digest of the codec in a weights file; nothing is put on a device for it."""
    config = {part: file.config[part] for part in _PARTS}
    return digest_of(config, file.params, file.tables, file.grids)


def digest_of(
    config: Mapping[str, Any], params: Mapping[str, Any], tables: Tables, grids: Mapping[str, Any] | None
) -> bytes:
    """The identity of a codec; how files are decoded by default is no part of it."""
    kept = {part: value for part, value in config.items() if part != "guidance"}
    return identity(kept, params, tables.digest(), grids)


# -- pieces -------------------------------------------------------------------------------------------------------------------


def _clip_of(source: str) -> ClipModel:
    from jaxsem.presets import PRESETS, load, weights_path

    if source not in PRESETS and not weights_path(source).is_file():
        return load_clip_model(source)
    clip = getattr(load(source), "clip", None)
    if clip is None:
        raise InputError(f"clip={source} must be a codec of CLIP features, such as pqvae-mini, or a CLIP")
    return clip


def _describer(source: str) -> Callable[[Sequence[np.ndarray]], list[str]]:
    @lru_cache(maxsize=1)
    def model() -> Any:
        from jaxsem.presets import load_mllm

        return load_mllm(source)

    return lambda images: model().answer(list(images), [DESCRIBE] * len(images))


def _shapes(codec: Rsic) -> dict[str, Any]:
    cell = codec.config.codec
    z = jax.ShapeDtypeStruct((1, cell.stride, cell.stride, cell.latent), np.float32)
    weight = jax.ShapeDtypeStruct((1, *[cell.stride // cell.map_stride] * 2), np.float32)
    return {
        "autoencoder": autoencoder_kl.param_shapes(codec.autoencoder),
        "unet": unet_2d_condition.param_shapes(codec.unet),
        "codec": jax.eval_shape(codec.codec.init, jax.random.key(0), z, weight)["params"],
    }
