"""Codecs of CLIP features from files: our own weights file with everything in it, or published checkpoints put together."""

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsem.backbones.clip import Clip, ClipConfig, TextConfig, VisionConfig
from jaxsem.backbones.gpt2 import Gpt2Config
from jaxsem.configs import plain, record_of
from jaxsem.data.words import WordTokenizer
from jaxsem.entropy.index_coder import IndexCoder
from jaxsem.entropy.indices import CODERS, FixedLength
from jaxsem.errors import FormatError, InputError, WeightsError
from jaxsem.systems import clipcap
from jaxsem.systems.clip_model import ClipModel, load_clip_model
from jaxsem.systems.clipcap import ClipCap, ClipCapConfig
from jaxsem.systems.feature_codec import Captioner, FeatureCodec, Level
from jaxsem.systems.feature_config import FeatureConfig, param_shapes
from jaxsem.systems.pqvae import RELEASED, Pqvae, PqvaeConfig
from jaxsem.weights.native import WeightsFile, check_shapes, identity, write_weights

SYSTEM = "pqvae"
"""What a weights file calls the family."""

_KINDS = {kind.name: kind for kind in CODERS}


def assemble(
    name: str, clip_model: ClipModel, levels: Sequence[Level], captioner: Captioner | None = None, half: bool = True
) -> FeatureCodec:
    """Puts trained parts together.

    Args:
      name: What errors call it.
      clip_model: CLIP.
      levels: The qualities, lowest rate first.
      captioner: Writes captions, if there is one.
      half: Whether to round matrices to float16 values, which halves the weights file.

    Raises:
      InputError: No level, or parts of different widths of features.
    """
    rates = tuple(level.module.config for level in levels)
    FeatureConfig(clip_model.module.config, rates, captioner and captioner.module.config)  # refuses what does not fit
    if half:
        clip_model = dataclasses.replace(clip_model, params=_halved(clip_model.params))
        levels = [dataclasses.replace(level, params=_halved(level.params)) for level in levels]
        captioner = captioner and dataclasses.replace(captioner, params=_halved(captioner.params))
    # As JSON holds a config, so that a file's digest needs no config to be built.
    configs = [plain(level.module.config) for level in levels]
    digest = _identity([(c, level.params, level.coder.digest()) for c, level in zip(configs, levels, strict=True)])
    return FeatureCodec(name, clip_model, tuple(levels), digest, captioner)


def load_published(
    clip_source: str | os.PathLike,
    pqvae_source: str | os.PathLike,
    config: PqvaeConfig = RELEASED,
    coder: IndexCoder | None = None,
    captioner: Captioner | None = None,
    clip_config: Any = None,
    tokenizer: str | os.PathLike | None = None,
) -> FeatureCodec:
    """A codec from a published CLIP and a checkpoint of PQVAE-shared's authors.

    Args:
      clip_source: Folder or Hugging Face id of CLIP; the authors' is "openai/clip-vit-large-patch14-336".
      pqvae_source: `dim_16 size_4.pt`, or another of their files with its config.
      config: Sizes of the latter.
      coder: Codes the indices; fixed length by default, which for 4 codewords is what their Huffman code does.
      captioner: See `load_captioner`.
      clip_config: Sizes of CLIP, or their name, where its source has no config.json.
      tokenizer: Where CLIP's tokenizer lies; with CLIP by default.

    Raises:
      InputError: A file is missing, or the widths of features differ.
      WeightsError: A file is damaged or does not fit.
    """
    from jaxsem.weights.pqvae import load_pqvae

    module, params = load_pqvae(pqvae_source, config)
    coder = coder or FixedLength((config.codebook,) * config.codewords)
    model = load_clip_model(clip_source, clip_config, tokenizer)
    level = Level(module, jax.device_put(params), coder)
    return assemble(Path(pqvae_source).stem, model, [level], captioner, half=False)


def load_captioner(source: str | os.PathLike, tokenizer: Any, config: ClipCapConfig = clipcap.MLP_COCO) -> Captioner:
    """A published ClipCap; the tokenizer is GPT-2's of transformers.

    Raises:
      InputError: The file is missing.
      WeightsError: It is damaged or does not fit.
    """
    from jaxsem.weights.clipcap import load_clipcap

    module, params = load_clipcap(source, config)
    return Captioner(module, jax.device_put(params), tokenizer, clipcap.FULL_STOP)


def save_feature_codec(codec: FeatureCodec, path: str | Path, card: Mapping[str, Any], force: bool = False) -> str:
    """Writes a codec with a tokenizer of words as one weights file, and returns the file's SHA-256.

    Raises:
      InputError: The codec's tokenizer is not the one of scenes: keep published CLIPs in their own folders.
      OutputError: The file exists, or it cannot be written.
    """
    if not isinstance(codec.clip.tokenizer, WordTokenizer):
        raise InputError(
            f"{codec.name} has a published CLIP, whose folder is its own file: save its parts as they came"
        )
    params = {
        "clip": codec.clip.params,
        "rates": {str(k): level.params for k, level in enumerate(codec.levels)},
        **({"captioner": codec.captioner.params} if codec.captioner else {}),
    }
    coders = {str(k): level.coder.to_arrays() for k, level in enumerate(codec.levels)}
    return write_weights(path, SYSTEM, _config_of(codec), card, jax.device_get(params), coders=coders, force=force)


def from_file(name: str, file: WeightsFile) -> FeatureCodec:
    """The codec of a weights file, with its parameters on the default device.

    Raises:
      WeightsError: Its parts do not fit together.
    """
    try:
        config, templates = parse_config(file.config), tuple(map(str, file.config["templates"]))
        coders = _coders(file)
        longest = int(file.config["longest"] or 0)
    except (KeyError, TypeError, ValueError, InputError, FormatError) as error:
        raise WeightsError(f"the weights of {name} do not fit together: {error}") from error
    check_shapes(param_shapes(config), file.params, f"the weights of {name}")
    words, params = WordTokenizer(), file.params
    model = ClipModel(name, Clip(config.clip), params["clip"], words, templates, article=True)
    levels = [
        Level(Pqvae(rate), params["rates"][str(k)], coder)
        for k, (rate, coder) in enumerate(zip(config.rates, coders, strict=True))
    ]
    writer = None
    if config.captioner is not None:
        writer = Captioner(ClipCap(config.captioner), params["captioner"], words, words.end, longest)
    for level in levels:
        sizes = (level.module.config.codebook,) * level.module.config.codewords
        if not np.array_equal(level.coder.sizes, sizes):
            raise WeightsError(f"the weights of {name} have a coder for other indices than those of their PQVAE")
    codec = assemble(name, model, levels, writer, half=False)
    return _on_device(codec)


def digest_of(file: WeightsFile) -> bytes:
    """The digest of a weights file's codec; nothing is put on a device for it."""
    coders, rates = _coders(file), file.config["rates"]
    parts = [(rate, file.params["rates"][str(k)], coders[k].digest()) for k, rate in enumerate(rates)]
    return _identity(parts)


# -- pieces ---------------------------------------------------------------------------------------------------------------


def _identity(levels: Sequence[tuple[Mapping[str, Any], Any, bytes]]) -> bytes:
    """Of what a file's bytes depend on: PQVAE and coder of every quality; not CLIP, nor the captioner, which only read features."""
    digests = [identity(config, jax.device_get(params), coder) for config, params, coder in levels]
    return hashlib.sha256(b"".join(digests)).digest()


def _halved(params: Any) -> Any:
    """Arrays of two or more axes with float16 values."""

    def rounded(leaf: Any) -> Any:
        return jnp.asarray(leaf, jnp.float16).astype(jnp.float32) if jnp.ndim(leaf) >= 2 else leaf

    return jax.tree.map(rounded, params)


def _on_device(codec: FeatureCodec) -> FeatureCodec:
    put = lambda part: part and dataclasses.replace(part, params=jax.device_put(part.params))  # noqa: E731
    levels = tuple(put(level) for level in codec.levels)
    return dataclasses.replace(codec, clip=put(codec.clip), levels=levels, captioner=put(codec.captioner))


def _config_of(codec: FeatureCodec) -> dict[str, Any]:
    writer = codec.captioner
    rates = tuple(level.module.config for level in codec.levels)
    config = FeatureConfig(codec.clip.module.config, rates, writer and writer.module.config)
    others = {
        "coders": [level.coder.name for level in codec.levels],
        "templates": list(codec.clip.templates),
        "longest": writer and writer.longest,
    }
    return {**dataclasses.asdict(config), **others}


def parse_config(fields: Mapping[str, Any]) -> FeatureConfig:
    """The config in a weights file, from JSON; KeyError, TypeError or InputError where it is none."""
    sizes, writer = fields["clip"], fields["captioner"]
    towers = record_of(VisionConfig, sizes["vision"]), record_of(TextConfig, sizes["text"])
    return FeatureConfig(
        ClipConfig(*towers, sizes["projection"]),
        tuple(record_of(PqvaeConfig, rate) for rate in fields["rates"]),
        writer and record_of(ClipCapConfig, {**writer, "gpt2": record_of(Gpt2Config, writer["gpt2"])}),
    )


def _coders(file: WeightsFile) -> list[IndexCoder]:
    return [_KINDS[name].from_arrays(file.coders[str(k)]) for k, name in enumerate(file.config["coders"])]
