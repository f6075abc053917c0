"""An image codec with a transform-neck, and the language model that reads its files without decoding an image.

    codec = jaxsem.load("transform-neck-mini")
    files = jaxsem.compress(codec, photos)                    # .jsem files like any other; decompress gives images
    reader = Reader(codec, jaxsem.load_mllm("llava-mini"))
    reader.answer(files, ["What is on the left?"])            # latents ─▶ neck ─▶ tower from its layer k on ─▶ language model

Source: Kao et al., Bridging Compressed Image Latents and Multimodal Large Language Models (papers/2).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsem.backbones.clip_config import VisionConfig
from jaxsem.codec import Codec
from jaxsem.configs import record_of
from jaxsem.container import unpack
from jaxsem.errors import FormatError, InputError, WeightsError
from jaxsem.nn.exact import COLLECTION
from jaxsem.pipeline import check_weights, decode_latents
from jaxsem.systems.clip_model import filled
from jaxsem.systems.mllm import Mllm
from jaxsem.systems.mllm_steps import tokens_after
from jaxsem.systems.transform_neck import NeckConfig, TransformNeck, check_latent, check_tower, param_shapes
from jaxsem.weights.native import WeightsFile, check_shapes, half_kernels, write_weights

SYSTEM = "transform-neck"
"""What a weights file calls the family."""

SCENARIOS = ("d1", "d2", "d3")
"""The codec as it was; trained with the neck for people and machines; for machines alone."""


@dataclass(frozen=True, eq=False)
class NeckCodec(Codec):
    """An image codec, and the neck that was trained for its latents.

    Attributes:
      neck: The neck's module.
      neck_params: Its parameters.
      scenario: One of SCENARIOS.
    """

    neck: TransformNeck | None = None
    neck_params: Any = None
    scenario: str = "d1"


@dataclass(frozen=True, eq=False)
class Reader:
    """A multimodal language model that sees what is in the files of a codec with a neck; an `Answerer` of `jaxsem.tasks`.

    Attributes:
      codec: The codec with its neck.
      mllm: The language model, unchanged.
      batch: Files whose latents go through the neck together.

    Raises:
      InputError: The codec has no neck, or one for another image tower than the model's.
    """

    codec: NeckCodec
    mllm: Mllm
    batch: int = 32

    def __post_init__(self) -> None:
        config, model = self._neck_config, self.mllm.module.config
        check_tower(config, model.vision)
        if config.bypassed > model.depth:
            raise InputError(
                f"the neck of {self.codec.name} enters the tower after {config.bypassed} layers, and {self.mllm.name} takes its "
                f"tokens after {model.depth}: bypass fewer"
            )

    @property
    def name(self) -> str:
        """Both names."""
        return f"{self.codec.name} + {self.mllm.name}"

    @property
    def _neck_config(self) -> NeckConfig:
        if getattr(self.codec, "neck", None) is None:
            raise InputError(
                f"{self.codec.name} has no transform-neck: decompress its files and give the images to the language model"
            )
        return self.codec.neck.config

    def visual_tokens(self, files: Sequence[bytes]) -> list[np.ndarray]:
        """The visual tokens [n, width] of files, as `Mllm` takes them.

        Raises:
          FormatError: A file is damaged, or an archive of several images.
          WeightsError: A file was made with other weights.
          InputError: An image whose size is far from what the neck was trained for.
        """
        items = []
        for data in files:
            file = unpack(data)
            check_weights(self.codec, file)
            if len(file.items) != 1:
                raise FormatError(f"the file holds {len(file.items)} images: give one file for each")
            items.append(file.items[0])
            grid = -(-items[-1].height // 16), -(-items[-1].width // 16)
            check_latent(self._neck_config, (*grid, self.codec.module.config.latent))
        tokens: list[np.ndarray | None] = [None] * len(files)
        latents = decode_latents(self.codec, items)
        for shape in sorted({latent.shape for latent in latents}):
            places = [k for k, latent in enumerate(latents) if latent.shape == shape]
            for start in range(0, len(places), self.batch):
                some = places[start : start + self.batch]
                size = min(self.batch, 1 << (len(places) - 1).bit_length())
                found = np.asarray(self._tokens(filled(np.stack([latents[k] for k in some]), size)))
                for k, row in zip(some, found, strict=False):
                    tokens[k] = row
        return tokens

    def _tokens(self, y_hat: np.ndarray) -> jax.Array:
        before = _run_neck(self.codec.neck, self._params, y_hat)
        return tokens_after(self.mllm.module, self.mllm.params, before, self._neck_config.bypassed)

    @cached_property
    def _params(self) -> Any:
        return jax.device_put(self.codec.neck_params)

    def answer(self, files: Sequence[Any], questions: Sequence[str], **options: Any) -> list[str]:
        """Answers questions about the images in files; arguments and errors as of `Mllm.answer`, with `.jsem` bytes as inputs."""
        return self.mllm.answer(self._seen(files), questions, **options)

    def score(
        self, files: Sequence[Any], questions: Sequence[str], options: Sequence[Sequence[str]], **others: Any
    ) -> np.ndarray:
        """The log-probability of each option; arguments and errors as of `Mllm.score`, with `.jsem` bytes as inputs."""
        return self.mllm.score(self._seen(files), questions, options, **others)

    def _seen(self, files: Sequence[Any]) -> list[Any]:
        """Each file's tokens; a file that is asked about several times is decoded once."""
        groups = [tuple(each) if isinstance(each, tuple | list) else (each,) for each in files]
        distinct = list(dict.fromkeys(data for group in groups for data in group))
        tokens = dict(zip(distinct, self.visual_tokens(distinct), strict=True))
        return [tuple(tokens[data] for data in group) for group in groups]


@partial(jax.jit, static_argnames="neck")
def _run_neck(neck: TransformNeck, params: Any, y_hat: jax.Array) -> jax.Array:
    return neck.apply({"params": params}, y_hat)


# -- files ----------------------------------------------------------------------------------------------------------------


def save_neck_codec(
    codec: NeckCodec, path: str | Path, system: str, card: Mapping[str, Any], force: bool = False, half: bool = True
) -> str:
    """Writes codec and neck as one weights file, and returns the file's SHA-256.

    Args:
      codec: With its neck.
      path: The file.
      system: Family of the codec, see `jaxsem.codecs`.
      card: Data, date, recipe, licence: plain JSON.
      force: Whether to replace an existing file.
      half: Whether to round the neck's matrices to float16 values; a published neck stays as it is.

    Raises:
      OutputError: The file exists, or it cannot be written.
    """
    neck = jax.device_get(codec.neck_params)
    config = {
        "codec": {"system": system, "config": dataclasses.asdict(codec.module.config)},
        "neck": dataclasses.asdict(codec.neck.config),
        "scenario": codec.scenario,
    }
    params = {"codec": jax.device_get(codec.params), "neck": half_kernels(neck) if half else neck}
    grids = None if codec.exact is None else jax.device_get(codec.exact[COLLECTION])
    return write_weights(path, SYSTEM, config, card, params, codec.tables, grids, force=force)


def split_file(name: str, file: WeightsFile) -> tuple[WeightsFile, NeckConfig, Any, str]:
    """The parts of a weights file: that of the codec alone, the neck's config and parameters, and the scenario.

    Raises:
      WeightsError: They do not fit together.
    """
    try:
        inside, fields, scenario = file.config["codec"], dict(file.config["neck"]), str(file.config["scenario"])
        vision = record_of(VisionConfig, fields.pop("vision"))
        config = record_of(NeckConfig, {**fields, "vision": vision})
        codec = dataclasses.replace(
            file, system=str(inside["system"]), config=inside["config"], params=file.params["codec"]
        )
        params = file.params["neck"]
    except (KeyError, TypeError, ValueError, InputError) as error:
        raise WeightsError(f"the weights of {name} do not fit together: {error}") from error
    if scenario not in SCENARIOS:
        raise WeightsError(f"the weights of {name} are of a scenario {scenario!r}; there are {', '.join(SCENARIOS)}")
    check_shapes(param_shapes(TransformNeck(config)), params, f"the neck of {name}")
    return codec, config, params, scenario


def with_neck(codec: Codec, config: NeckConfig, params: Any, scenario: str) -> NeckCodec:
    """The codec with a neck.

    Raises:
      InputError: The neck is for latents of another width.
    """
    check_latent(config, (*config.grid, codec.module.config.latent))
    fields = {field.name: getattr(codec, field.name) for field in dataclasses.fields(Codec)}
    return NeckCodec(**fields, neck=TransformNeck(config), neck_params=params, scenario=scenario)
