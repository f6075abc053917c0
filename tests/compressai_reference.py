"""CompressAI as a reference: how to import it without its heavy dependencies, and small seeded models of both sides.

`python tests/compressai_reference.py` writes `tests/codecs/compressai_1_2_8.json`, the check values for machines that
have neither torch nor CompressAI. With these seeds no value lies within 2e-4 of a rounding edge and no scale within
2e-5 of a table's (relative), well above the float noise: symbols and tables can be compared exactly.
"""

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import json
import sys
import types
import zlib
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from jaxsem.codecs import SYSTEMS, ElicConfig, FactorizedConfig, HyperpriorConfig, ScaleHyperpriorConfig, param_shapes
from jaxsem.weights.compressai import class_of, table_of, to_compressai
from jaxsem.weights.convert import invert

CHECKS = Path(__file__).parent / "codecs" / "compressai_1_2_8.json"
_ELIC = {
    "widths": (8, 8, 8),
    "latent": 12,
    "hyper": 8,
    "groups": (2, 2, 4, 4),
    "context": (10, 6),
    "scale_rule": "above",
}
CONFIGS = {
    "official": ElicConfig(variant="official", **_ELIC),
    "chandelier": ElicConfig(variant="chandelier", **_ELIC),
    "hyperprior": HyperpriorConfig(channels=8, latent=12, scale_rule="above"),
    "factorized": FactorizedConfig(channels=8, latent=12),
    "scale-hyperprior": ScaleHyperpriorConfig(channels=8, latent=12, scale_rule="above"),
}
SIZE = (64, 128)
# Of the last analysis and synthesis layers (ELIC, the others): symbols of a few units, images of about one.
_GAINS = {"g_a.13.weight": 2.5, "g_s.14.weight": 0.05, "g_a.6.weight": 4.0, "g_s.6.weight": 0.02}


def import_compressai():
    """The packages torch and compressai; skips the test where they are absent.

    CompressAI imports torchvision and torch_geometric for parts that no test here uses. Where they are absent, empty
    stand-ins take their place during the import only, so that nothing else in the process takes them for real.
    """
    torch = pytest.importorskip("torch")
    if importlib.util.find_spec("compressai") is None:
        pytest.skip("needs compressai")
    stand_ins = _StandIns(
        [name for name in ("torchvision", "torch_geometric") if importlib.util.find_spec(name) is None]
    )
    sys.meta_path.append(stand_ins)
    try:
        import compressai.models
    finally:
        sys.meta_path.remove(stand_ins)
        for name in [name for name in sys.modules if name.partition(".")[0] in stand_ins.absent]:
            del sys.modules[name]
    torch.set_num_threads(2)
    return torch, compressai


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, absent):
        self.absent = absent

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.absent:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = _anything
        return module

    def exec_module(self, module):
        pass


def _anything(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {"__init__": lambda self, *a, **k: None, "__call__": lambda self, thing: thing})


# -- the same small models on both sides ---------------------------------------------------------------------------


def image() -> np.ndarray:
    """A photo-like uint8 image [1, *SIZE, 3]: smooth, with an edge and a little noise."""
    rows, columns = np.indices(SIZE) / 64.0
    waves = np.stack([np.sin(3 * rows + k) + np.cos(5 * columns - k) + (columns > rows) for k in range(3)], -1)
    noise = np.random.RandomState(0).randint(-9, 10, waves.shape)
    return np.clip(127 + 40 * waves + noise, 0, 255).astype(np.uint8)[None]


def module_of(name: str):
    return SYSTEMS[system_of(name)][0](CONFIGS[name])


def system_of(name: str) -> str:
    """The codec family of one of the `CONFIGS`."""
    return next(system for system, (_, record) in SYSTEMS.items() if type(CONFIGS[name]) is record)


@functools.cache
def random_state_dict(name: str) -> dict[str, np.ndarray]:
    """Seeded weights in CompressAI's layout that give latents of several bits; no torch needed.

    NumPy's `RandomState` is frozen: the numbers are the same on every machine and in every version.
    """
    module = module_of(name)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), param_shapes(module))
    random = np.random.RandomState(7)
    state = {
        key: _random(random, key, value.shape)
        for key, value in invert(table_of(CONFIGS[name], "compressai"), zeros).items()
    }
    return {**to_compressai(module, zeros), **state}


def _random(random: np.random.RandomState, key: str, shape: tuple[int, ...]) -> np.ndarray:
    normal = random.standard_normal(shape)
    if key.endswith("quantiles"):
        value = np.array([-9.0, 0.0, 9.0]) + normal * [1, 0.4, 1]
    elif "entropy_bottleneck" in key:
        value = 0.3 * normal - ("matrices" in key)
    elif key.endswith("beta"):
        value = 0.8 + 0.2 * normal
    elif key.endswith("gamma"):
        value = 0.3 * np.eye(shape[0]) + 0.1 * normal  # some below the bound
    elif key.endswith("bias"):
        value = 0.2 * normal
    else:
        gain = _GAINS.get(key, 1.6 if "h_s" in key or "entropy_parameters" in key else 0.7)
        value = gain * normal / np.sqrt(np.prod(shape[1:]))
    return value.astype(np.float32)


def reference_model(name: str):
    """CompressAI's model of the same widths, with the seeded weights, in evaluation mode."""
    torch, compressai = import_compressai()
    config, models = CONFIGS[name], compressai.models
    if isinstance(config, ElicConfig):
        net = {"official": models.Elic2022Official, "chandelier": models.Elic2022Chandelier}[name](
            config.hyper, config.latent, list(config.groups)
        )
        _narrow(torch, net, config)
    else:
        net = eval(class_of(config), vars(models))
    net.load_state_dict({key: torch.from_numpy(value) for key, value in random_state_dict(name).items()})
    return net.eval()


def _narrow(torch, net, config) -> None:
    """Replaces the context networks whose hidden widths CompressAI fixes at 224, 128 and 512."""

    def stack(widths, size):
        convs = [torch.nn.Conv2d(i, o, size, padding=size // 2) for i, o in itertools.pairwise(widths)]
        return torch.nn.Sequential(convs[0], torch.nn.ReLU(), convs[1], torch.nn.ReLU(), convs[2])

    y = net.latent_codec["y"]
    for k, group in enumerate(config.groups):
        if k:
            y.channel_context[f"y{k}"] = stack(
                (y.channel_context[f"y{k}"][0].in_channels, *config.context, 2 * group), 5
            )
        if not config.official:
            first = y.latent_codec[f"y{k}"].entropy_parameters[0].in_channels
            y.latent_codec[f"y{k}"].entropy_parameters = stack((first, *config.aggregation(k)), 1)


def reference_outputs(name: str) -> dict[str, np.ndarray]:
    """What CompressAI's evaluation gives for `image()`: channels last, symbols and table indices by slice, z first."""
    torch, _ = import_compressai()
    from compressai.entropy_models import EntropyModel

    net, slices = reference_model(name), []
    x = torch.from_numpy(image()).permute(0, 3, 1, 2).float() / 255
    original = EntropyModel.compress

    def spy(self, inputs, indexes, means=None):
        slices.append((_last(self.quantize(inputs, "symbols", means)), _last(indexes)))
        return original(self, inputs, indexes, means)

    with torch.no_grad():
        forward = net(x)
        net.update()
        with mock.patch.object(EntropyModel, "compress", spy):
            net.compress(x)
    bits = {f"bits_{k}": float(-v.double().log2().sum()) for k, v in forward["likelihoods"].items()}
    return {"x_hat": _last(forward["x_hat"]), "slices": slices, "bits_z": 0.0, **bits}


def _last(tensor) -> np.ndarray:
    """Channels last, as NumPy."""
    return np.moveaxis(tensor.numpy(), 1, -1)


def checks(outputs) -> dict:
    """The few numbers that stand for all outputs."""
    symbols, tables = (b"".join(np.ascontiguousarray(s[i], "<i4").tobytes() for s in outputs["slices"]) for i in (0, 1))
    return {
        "x_hat": [float(f"{v:.7g}") for v in np.asarray(outputs["x_hat"])[0, ::21, ::43].ravel()],
        "bits_y": round(float(outputs["bits_y"]), 3),
        "bits_z": round(float(outputs["bits_z"]), 4),
        "symbols_crc32": zlib.crc32(symbols),
        "tables_crc32": zlib.crc32(tables),
    }


if __name__ == "__main__":
    values = {name: checks(reference_outputs(name)) for name in CONFIGS}
    CHECKS.write_text(json.dumps({"computed by": "CompressAI 1.2.8, torch 2.13.0 on CPU", **values}, indent=1) + "\n")
