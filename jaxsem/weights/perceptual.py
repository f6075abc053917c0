"""The networks of perceptual metrics from their published files.

* torchvision's VGG16 and AlexNet: `features.0.weight`; their classifiers are passed over, by name.
* LPIPS 0.1: `lin0.model.1.weight`, one row of weights for each tap, beside torchvision's network.
* DISTS: `alpha` and `beta`, beside torchvision's VGG16.
* FID's Inception, as pytorch-fid and torch-fidelity publish it (pt_inception-2015-12-05-6726825d.pth):
  `Mixed_5b.branch1x1.conv.weight`. torchvision's own InceptionV3 has the same names and is refused.

Torch files and safetensors are read alike. A metric of two files names all that does not fit in either in one error.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsem.backbones import alexnet, inception, vgg
from jaxsem.backbones.alexnet import AlexNet, AlexNetConfig
from jaxsem.backbones.inception import Inception, InceptionConfig
from jaxsem.backbones.vgg import Vgg, VggConfig
from jaxsem.errors import InputError, WeightsError
from jaxsem.metrics.dists import CONFIG as DISTS_CONFIG
from jaxsem.metrics.dists import Dists
from jaxsem.metrics.dists import param_shapes as dists_shapes
from jaxsem.metrics.lpips import CONFIGS as LPIPS_CONFIGS
from jaxsem.metrics.lpips import Lpips
from jaxsem.metrics.lpips import param_shapes as lpips_shapes
from jaxsem.weights.convert import CONV, Entry, Ignored, Table, convert, reshape, strip_prefixes
from jaxsem.weights.huggingface import open_state

Source = str | os.PathLike | Mapping[str, Any]

_CHANNELS = reshape((1, -1, 1, 1), (-1,))
_CLASSIFIER = Ignored("classifier.{key:.+}", "the classifier, which no metric uses")
_ALEXNET_LAYERS = (0, 3, 6, 8, 10)  # among torchvision's features, where ReLUs and pools are counted too
_TORCHVISION_CLASSES = 1000  # those of FID's Inception are 1008


def load_vgg(
    source: Source, config: VggConfig | None = None, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
) -> tuple[Vgg, dict[str, Any]]:
    """Loads the features of torchvision's VGG16.

    Args:
      source: A file or folder of weights, or a state dict.
      config: Sizes; None is VGG16 with max pools. The pools have no weights.
      dtype: Of the computation.
      param_dtype: Of the parameters.

    Returns:
      The Flax module and its parameters, nested NumPy arrays.

    Raises:
      InputError: Nothing is there.
      WeightsError: The file is damaged or does not fit; lists every key that does not.
    """
    module = Vgg(config or VggConfig(), dtype, param_dtype)
    state, name = _opened(source)
    return module, convert(vgg_table(module.config), state, vgg.param_shapes(module), name)


def load_alexnet(
    source: Source, config: AlexNetConfig | None = None, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
) -> tuple[AlexNet, dict[str, Any]]:
    """Loads the features of torchvision's AlexNet; arguments and errors as for `load_vgg`."""
    module = AlexNet(config or AlexNetConfig(), dtype, param_dtype)
    state, name = _opened(source)
    return module, convert(alexnet_table(), state, alexnet.param_shapes(module), name)


def load_lpips(
    network: Source,
    weights: Source,
    config: AlexNetConfig | VggConfig | str = "alex",
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
) -> tuple[Lpips, dict[str, Any]]:
    """Loads LPIPS.

    Args:
      network: torchvision's AlexNet or VGG16: a file or folder of weights, or a state dict.
      weights: The LPIPS file of the same network, `lpips/weights/v0.1/alex.pth` or `vgg.pth` in its repository.
      config: "alex", "vgg", or other sizes.
      dtype: Of the network's computation.
      param_dtype: Of the parameters.

    Returns:
      The Flax module and its parameters, nested NumPy arrays.

    Raises:
      InputError: Nothing is there, or no network has this name.
      WeightsError: A file is damaged or they do not fit; lists every key that does not.
    """
    if isinstance(config, str):
        if config not in LPIPS_CONFIGS:
            raise InputError(f"there is no LPIPS {config!r}; there are {', '.join(LPIPS_CONFIGS)}")
        config = LPIPS_CONFIGS[config]
    module = Lpips(config, dtype, param_dtype)
    state, name = _opened(network, weights)
    return module, convert(lpips_table(config), state, lpips_shapes(module), name)


def load_dists(
    network: Source,
    weights: Source,
    config: VggConfig | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
) -> tuple[Dists, dict[str, Any]]:
    """Loads DISTS.

    Args:
      network: torchvision's VGG16: a file or folder of weights, or a state dict.
      weights: The authors' `weights.pt` with alpha and beta.
      config: Sizes; None is VGG16 with L2 pools.
      dtype: Of the network's computation.
      param_dtype: Of the parameters.

    Returns:
      The Flax module and its parameters, nested NumPy arrays.

    Raises:
      InputError: Nothing is there.
      WeightsError: A file is damaged or they do not fit; lists every key that does not.
    """
    module = Dists(config or DISTS_CONFIG, dtype, param_dtype)
    state, name = _opened(network, weights)
    return module, convert(dists_table(module.config), state, dists_shapes(module), name)


def load_inception(
    source: Source, config: InceptionConfig | None = None, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
) -> tuple[Inception, dict[str, Any]]:
    """Loads the Inception of FID and KID.

    Args:
      source: pt_inception-2015-12-05-6726825d.pth (pytorch-fid) or weights-inception-2015-12-05-6726825d.pth
        (torch-fidelity), which hold the same, or a state dict.
      config: Sizes; None is the published network.
      dtype: Of the computation.
      param_dtype: Of the parameters.

    Returns:
      The Flax module and its parameters, nested NumPy arrays.

    Raises:
      InputError: Nothing is there.
      WeightsError: The file is damaged, of torchvision's InceptionV3, or does not fit; lists every key that does not.
    """
    module = Inception(config or InceptionConfig(), dtype, param_dtype)
    state, name = _opened(source)
    if any(key.startswith("AuxLogits.") for key in state) or len(state.get("fc.bias", ())) == _TORCHVISION_CLASSES:
        raise WeightsError(
            f"{name} is torchvision's InceptionV3, whose features give another FID than the published one: take "
            f"pt_inception-2015-12-05-6726825d.pth of pytorch-fid"
        )
    return module, convert(inception_table(), state, inception.param_shapes(module), name)


def _opened(*sources: Source) -> tuple[dict[str, np.ndarray], str]:
    """What the sources hold together, and what errors call them."""
    parts = [open_state(source) for source in sources]
    merged: dict[str, np.ndarray] = {}
    name = " with ".join(dict.fromkeys(name for _, name in parts))
    for state, _ in parts:
        state = strip_prefixes(state, ("module.",))
        if twice := sorted(merged.keys() & state.keys()):
            raise WeightsError(
                f"{name}: both hold {twice[0]}: give the network and the metric's own weights, one file each"
            )
        merged |= state
    return merged, name


# -- tables -----------------------------------------------------------------------------------------------------------


def vgg_table(config: VggConfig, under: str = "") -> Table:
    """The table of torchvision's VGG without batch normalisation, in a tree `under` a path such as "network/"."""
    return (*_vgg_rules(config, under), _CLASSIFIER)


def alexnet_table(under: str = "") -> Table:
    """The table of torchvision's AlexNet, in a tree `under` a path such as "network/"."""
    layers = enumerate(_ALEXNET_LAYERS, 1)
    return (*(rule for i, at in layers for rule in _conv(f"features.{at}", f"{under}conv{i}")), _CLASSIFIER)


def lpips_table(config: AlexNetConfig | VggConfig) -> Table:
    """The table of LPIPS, both files together."""
    network = vgg_table(config, "network/") if isinstance(config, VggConfig) else alexnet_table("network/")
    return (*network, Entry("lin{i}.model.1.weight", "channel_weights_{i}", _CHANNELS))


def dists_table(config: VggConfig) -> Table:
    """The table of DISTS, both files together."""
    return (*vgg_table(config, "network/"), *(Entry(name, name, _CHANNELS) for name in ("alpha", "beta")))


def inception_table() -> Table:
    """The table of FID's Inception."""
    return (
        *_conv_norm(r"Conv2d_{at:\d[ab]_\dx\d}", "stem_{at}"),
        *_conv_norm(r"Mixed_{at:\d[a-e]}.{branch:\w+}", "mixed_{at}/{branch}"),
        Ignored("{layer:.+}.bn.num_batches_tracked", "a counter of training"),
        Ignored("fc.{key:weight|bias}", "the classifier, which FID and KID do not use"),
    )


def _vgg_rules(config: VggConfig, under: str) -> Iterator[Entry]:
    at = 0  # among torchvision's features, where ReLUs and pools are counted too
    for block, depth in enumerate(config.depths, 1):
        for i in range(1, depth + 1):
            yield from _conv(f"features.{at}", f"{under}conv{block}_{i}")
            at += 2
        at += 1


def _conv(source: str, target: str) -> Iterator[Entry]:
    yield Entry(f"{source}.weight", f"{target}/kernel", CONV)
    yield Entry(f"{source}.bias", f"{target}/bias")


def _conv_norm(source: str, target: str) -> Iterator[Entry]:
    yield Entry(f"{source}.conv.weight", f"{target}/conv/kernel", CONV)
    for theirs, ours in (("weight", "scale"), ("bias", "bias"), ("running_mean", "mean"), ("running_var", "variance")):
        yield Entry(f"{source}.bn.{theirs}", f"{target}/norm/{ours}")
