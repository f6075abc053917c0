"""The transform-neck in the layout of its authors' `adapter`: keys like those of one residual block of OpenAI's CLIP."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxsem.errors import WeightsError
from jaxsem.systems.transform_neck import NeckConfig, TransformNeck, param_shapes
from jaxsem.weights.clip import openai_block, split_fused
from jaxsem.weights.compressai import split_neck_checkpoint
from jaxsem.weights.convert import LINEAR, Entry, convert


def load_neck(
    source: str | os.PathLike | Mapping[str, np.ndarray], config: NeckConfig
) -> tuple[TransformNeck, dict[str, Any]]:
    """Loads a neck.

    Args:
      source: A file of the authors, `d1_1` to `d3_4`, with the codec in it too (`jaxsem.weights.compressai` reads that); or the
        adapter's state dict as NumPy arrays.
      config: Its sizes; the authors' are `NeckConfig(320, VIT_L14.vision)`.

    Returns:
      The Flax module and its parameters, NumPy float32.

    Raises:
      InputError: The file is missing or not readable.
      WeightsError: It is damaged, holds no adapter, or does not fit; lists every key that does not.
    """
    if isinstance(source, Mapping):
        name, state = "the state dict", source
    else:
        name = f"the adapter of {os.fspath(source)}"
        _, state = split_neck_checkpoint(source)
        if state is None:
            raise WeightsError(f"{os.fspath(source)} holds a codec and no adapter: give a file with a transform-neck")
    module = TransformNeck(config)
    return module, convert((*_rules(),), split_fused(state, name), param_shapes(module), name)


def _rules() -> Iterator[Entry]:
    yield Entry("trans_latent_dim.weight", "projection/kernel", LINEAR)
    yield Entry("trans_latent_dim.bias", "projection/bias")
    yield Entry("class_embedding", "class_embedding")
    yield Entry("positional_embedding", "positions")
    yield Entry("ln_pre.weight", "pre_norm/scale")
    yield Entry("ln_pre.bias", "pre_norm/bias")
    yield from openai_block("transformer.resblocks.0", "block")
