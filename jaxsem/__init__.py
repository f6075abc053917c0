"""jaxsem: semantic image compression in JAX/Flax. The public API, by name; everything else may change.

Names are loaded when they are first used, so that `import jaxsem` costs nothing and the command line starts at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxsem.errors import FormatError, InputError, JaxsemError, OutputError, WeightsError
from jaxsem.version import __version__

if TYPE_CHECKING:
    from jaxsem import codecs, container, data, entropy, errors, metrics, tasks, training
    from jaxsem.cache import enable_compilation_cache
    from jaxsem.calibration import calibrate
    from jaxsem.codec import Codec
    from jaxsem.evaluation import evaluate
    from jaxsem.pipeline import (
        Compressed,
        compress,
        compress_items,
        compress_stream,
        decompress,
        decompress_items,
    )
    from jaxsem.presets import PRESETS, Preset, freeze, load, load_mllm, save
    from jaxsem.systems.feature_codec import FeatureCodec
    from jaxsem.systems.feature_tasks import caption, classify, read_features, refer
    from jaxsem.systems.neck_codec import Reader
    from jaxsem.systems.rsic import Demand

__all__ = [
    "PRESETS",
    "Codec",
    "Compressed",
    "Demand",
    "FeatureCodec",
    "FormatError",
    "InputError",
    "JaxsemError",
    "OutputError",
    "Preset",
    "Reader",
    "WeightsError",
    "__version__",
    "calibrate",
    "caption",
    "classify",
    "codecs",
    "compress",
    "compress_items",
    "compress_stream",
    "container",
    "data",
    "decompress",
    "decompress_items",
    "enable_compilation_cache",
    "entropy",
    "errors",
    "evaluate",
    "freeze",
    "load",
    "load_mllm",
    "metrics",
    "read_features",
    "refer",
    "save",
    "tasks",
    "training",
]

_MODULES = ("codecs", "container", "data", "entropy", "errors", "metrics", "tasks", "training")
_HOMES = {
    "Codec": "codec",
    "Compressed": "pipeline",
    "Demand": "systems.rsic",
    "FeatureCodec": "systems.feature_codec",
    "PRESETS": "presets",
    "Preset": "presets",
    "Reader": "systems.neck_codec",
    "calibrate": "calibration",
    "caption": "systems.feature_tasks",
    "classify": "systems.feature_tasks",
    "compress": "pipeline",
    "compress_items": "pipeline",
    "compress_stream": "pipeline",
    "decompress": "pipeline",
    "decompress_items": "pipeline",
    "enable_compilation_cache": "cache",
    "evaluate": "evaluation",
    "freeze": "presets",
    "load": "presets",
    "load_mllm": "presets",
    "read_features": "systems.feature_tasks",
    "refer": "systems.feature_tasks",
    "save": "presets",
}


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first used (PEP 562)."""
    if name in _MODULES:
        return importlib.import_module(f"jaxsem.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxsem' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"jaxsem.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
