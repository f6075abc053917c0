"""Checkpoints of PQVAE-shared as its authors publish them (`dim_16 size_4.pt`), in both directions.

The authors load theirs with keys that may be missing or surplus; here every key must fit. None is ignored: their class
has no buffers.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxsem.systems.pqvae import Pqvae, PqvaeConfig, param_shapes
from jaxsem.weights.convert import CONV, STRIDE1_DECONV, Entry, Transform, convert, invert, strip_prefixes
from jaxsem.weights.torch_files import read_torch, state_dict_of

# The encoder's strides of 2 are zeros between the samples of its input, so its kernels turn as those of stride 1 do.
_TURNED = STRIDE1_DECONV


def load_pqvae(
    source: str | os.PathLike | Mapping[str, np.ndarray], config: PqvaeConfig
) -> tuple[Pqvae, dict[str, Any]]:
    """Loads a checkpoint.

    Args:
      source: A torch file, or its state dict as NumPy arrays.
      config: Its sizes; nothing is guessed from the file's name or from shapes.

    Returns:
      The Flax module and its parameters, nested, NumPy float32.

    Raises:
      InputError: The file is missing or not readable.
      WeightsError: The file is damaged or does not fit; lists every key that does not.
    """
    if isinstance(source, Mapping):
        name, tree = "the state dict", source
    else:
        name, tree = os.fspath(source), read_torch(source)
    module = Pqvae(config)
    state = strip_prefixes(state_dict_of(tree, name), ("module.",))
    return module, convert(TABLE, state, param_shapes(module), name)


def to_torch(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Writes parameters as a state dict that the authors' class loads strictly.

    Raises:
      WeightsError: Parameters that no key can hold.
    """
    return invert(TABLE, params)


def _conv(name: str, transform: Transform = CONV) -> tuple[Entry, Entry]:
    path = name.replace(".", "/")
    return Entry(f"{name}.weight", f"{path}/kernel", transform), Entry(f"{name}.bias", f"{path}/bias")


def _residual(network: str, transform: Transform) -> tuple[Entry, Entry]:
    source, target = f"{network}.residual_stack.stack.{{i}}.res_block", f"{network}/residual_stack"
    return (
        Entry(f"{source}.1.weight", f"{target}/conv3_{{i}}/kernel", transform),
        Entry(f"{source}.3.weight", f"{target}/conv1_{{i}}/kernel", transform),
    )


TABLE = (
    *_conv("encoder.initial_conv1", _TURNED),
    *_conv("encoder.initial_conv2", _TURNED),
    *_residual("encoder", _TURNED),
    *_conv("encoder.pre_quant_conv"),
    Entry("quantize.embedding.weight", "codebook"),
    *_conv("decoder.post_quant_conv"),
    *_residual("decoder", CONV),
    *_conv("decoder.final_conv1"),
    *_conv("decoder.final_conv2"),
)
