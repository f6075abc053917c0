"""Our own weights file: one safetensors file with parameters, integer tables and the config that built the model.

Names: `params/<path>`, as float16 where that loses nothing and as float32 elsewhere; for image codecs `tables/<name>` and, for
exact arithmetic, `exact/<path>`, the grids of `jaxsem.calibration` in int8 and float32; for codecs of features
`coders/<quality>/<name>`, the arrays of `jaxsem.entropy.indices`. The metadata's
`jaxsem` entry is JSON: `system`, `config` and `card` (what it was trained on and how). Compressed files carry the first bytes
of `identity`: other config, weights or tables, other identity; another card does not matter.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxsem.entropy.tables import Tables
from jaxsem.errors import FormatError, WeightsError
from jaxsem.files import read_bytes, write_file


@dataclass(frozen=True, eq=False)
class WeightsFile:
    """What a weights file holds.

    Attributes:
      system: Name of the codec family, see `jaxsem.codecs`.
      config: Fields of its config.
      card: Where the weights come from, as plain JSON.
      params: Parameters, nested, NumPy float32.
      tables: The integer tables of an image codec; None for what codes no images.
      grids: Those of exact arithmetic, nested; None for a codec that has only float arithmetic.
      coders: Arrays of the index coders of a codec of features, by quality and name; empty for an image codec.
      sha256: Of the whole file, in hexadecimal.
    """

    system: str
    config: Mapping[str, Any]
    card: Mapping[str, Any]
    params: Mapping[str, Any]
    tables: Tables | None
    grids: Mapping[str, Any] | None
    coders: Mapping[str, Mapping[str, np.ndarray]]
    sha256: str


def identity(
    config: Mapping[str, Any], params: Mapping[str, Any], tables: bytes, grids: Mapping[str, Any] | None = None
) -> bytes:
    """SHA-256 over everything that a decoder's output depends on, as a file stores it.

    Args:
      config: Fields of the model's config, plain JSON.
      params: Parameters, nested.
      tables: Digest of the integer tables.
      grids: Those of exact arithmetic, nested, or None.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode() + tables)
    for name, leaf in sorted(flatten_dict(dict(params), sep="/").items()):
        digest.update(name.encode() + b"\0" + _store(leaf).tobytes())
    for name, leaf in sorted(flatten_dict(dict(grids or {}), sep="/").items()):
        digest.update(b"exact/" + name.encode() + b"\0" + np.ascontiguousarray(leaf).tobytes())
    return digest.digest()


def half_kernels(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters in float32 with the values of convolution kernels rounded to float16: half the file, at no cost seen."""

    def rounded(name: str, leaf: Any) -> np.ndarray:
        return np.asarray(leaf, np.float16 if name.endswith("kernel") else np.float32).astype(np.float32)

    flat = flatten_dict(dict(params), sep="/")
    return unflatten_dict({name: rounded(name, leaf) for name, leaf in flat.items()}, sep="/")


def write_weights(
    path: str | os.PathLike,
    system: str,
    config: Mapping[str, Any],
    card: Mapping[str, Any],
    params: Mapping[str, Any],
    tables: Tables | None = None,
    grids: Mapping[str, Any] | None = None,
    coders: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    force: bool = False,
) -> str:
    """Writes a weights file and returns its SHA-256 in hexadecimal.

    Raises:
      OutputError: The file exists and `force` is not given, or it cannot be written.
    """
    from safetensors.numpy import save

    arrays = {f"params/{name}": _store(leaf) for name, leaf in flatten_dict(params, sep="/").items()}
    others = {"tables": tables.arrays() if tables else {}, "exact": grids or {}, "coders": coders or {}}
    for section, tree in others.items():
        flat = flatten_dict(dict(tree), sep="/")
        arrays |= {f"{section}/{name}": np.asarray(leaf, order="C") for name, leaf in flat.items()}
    record = json.dumps({"system": system, "config": config, "card": card}, sort_keys=True)
    data = save(arrays, metadata={"jaxsem": record})
    write_file(path, data, force)
    return hashlib.sha256(data).hexdigest()


def is_foreign(path: str | os.PathLike) -> bool:
    """Whether a file is sound safetensors that we did not write, such as a state dict of another library."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return "jaxsem" not in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def read_weights(path: str | os.PathLike) -> WeightsFile:
    """Reads a weights file that nobody vouches for.

    Raises:
      WeightsError: It is no such file, or it is damaged.
    """
    from safetensors import SafetensorError, deserialize, safe_open

    path = Path(path)
    data = read_bytes(path)
    try:
        with safe_open(path, framework="numpy") as file:
            record = json.loads((file.metadata() or {})["jaxsem"])
        entries = deserialize(data)
        arrays = {name: _array(name, entry) for name, entry in entries}
        kinds = ("params/", "tables/", "exact/", "coders/")
        parts = {kind: {k.removeprefix(kind): v for k, v in arrays.items() if k.startswith(kind)} for kind in kinds}
        system, config, card = record["system"], record["config"], record["card"]
        if not (isinstance(system, str) and isinstance(config, dict) and isinstance(card, dict)):
            raise TypeError("system, config and card have other types")
        tables = Tables.from_arrays(parts["tables/"]) if parts["tables/"] else None
        coders = _nested(parts["coders/"])
    except (SafetensorError, KeyError, TypeError, ValueError, FormatError) as error:
        raise WeightsError(f"{path} is not a readable jaxsem weights file: {error}") from error
    params = {name: value.astype(np.float32) for name, value in parts["params/"].items()}
    grids = unflatten_dict(parts["exact/"], sep="/") or None
    sha256 = hashlib.sha256(data).hexdigest()
    return WeightsFile(system, config, card, unflatten_dict(params, sep="/"), tables, grids, coders, sha256)


def _nested(coders: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    nested: dict[str, dict[str, np.ndarray]] = {}
    for path, array in coders.items():
        quality, _, name = path.partition("/")
        nested.setdefault(quality, {})[name] = array
    return nested


def _store(leaf: Any) -> np.ndarray:
    leaf = np.asarray(leaf, np.float32, order="C")  # `ascontiguousarray` would give a number an axis
    with np.errstate(over="ignore"):
        half = leaf.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), leaf) else leaf


def _array(name: str, entry: Mapping[str, Any]) -> np.ndarray:
    dtypes = {
        "F16": "<f2",
        "F32": "<f4",
        "U8": "u1",
        "U16": "<u2",
        "I8": "i1",
        "I16": "<i2",
        "I32": "<i4",
        "I64": "<i8",
    }
    if entry["dtype"] not in dtypes:
        raise ValueError(f"{name} has the type {entry['dtype']}, not one of {sorted(dtypes)}")
    return np.frombuffer(entry["data"], dtypes[entry["dtype"]]).reshape(entry["shape"])


def check_shapes(shapes: Mapping[str, Any], params: Mapping[str, Any], where: str) -> None:
    """Refuses parameters that are not exactly those wanted.

    Args:
      shapes: What is wanted, nested, anything with a shape.
      params: What there is, nested.
      where: What errors call it.

    Raises:
      WeightsError: Lists every missing, surplus and misshapen one.
    """
    wanted = {k: v.shape for k, v in flatten_dict(dict(shapes), sep="/").items()}
    seen = {k: np.shape(v) for k, v in flatten_dict(dict(params), sep="/").items()}
    complaints = [f"missing {k} {wanted[k]}" for k in sorted(wanted.keys() - seen.keys())]
    complaints += [f"surplus {k} {seen[k]}" for k in sorted(seen.keys() - wanted.keys())]
    both = sorted(wanted.keys() & seen.keys())
    complaints += [f"{k} is {seen[k]}, not {wanted[k]}" for k in both if wanted[k] != seen[k]]
    if complaints:
        raise WeightsError(f"{where} does not fit the model: " + "; ".join(complaints))
