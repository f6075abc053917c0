"""Checkpoints as the Hugging Face Hub keeps them: a folder, its id on the Hub, or one file.

    owner/name, owner/name@revision      on the Hub, downloaded into its cache (`pip install huggingface_hub`)
    folder/                              config.json beside the weights
    file.safetensors, file.bin, .pt, ... the weights alone

Weights are looked for as model.safetensors, its parts (model.safetensors.index.json), pytorch_model.bin, its parts; the first
that is there is taken. Safetensors are mapped, not read: an array costs memory only while something reads it. Torch files go
through `jaxsem.weights.torch_files`, which runs nothing.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxsem.errors import InputError, WeightsError
from jaxsem.files import describe, read_bytes, why_unreadable
from jaxsem.weights.torch_files import read_torch, state_dict_of

Source = str | os.PathLike

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_DTYPES = {
    "BOOL": np.bool_,
    **{f"U{8 * size}": f"<u{size}" for size in (1, 2, 4, 8)},
    **{f"I{8 * size}": f"<i{size}" for size in (1, 2, 4, 8)},
    **{f"F{8 * size}": f"<f{size}" for size in (2, 4, 8)},
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}


def read_config(source: Source, name: str = "config.json") -> dict[str, Any]:
    """Reads a JSON file of a folder or of a repository on the Hub.

    Args:
      source: A folder or an id.
      name: The file's name.

    Raises:
      InputError: There is no such folder, repository or file.
      WeightsError: The file is no JSON object.
    """
    path = find(source, name)
    if path is None:
        raise InputError(f"{os.fspath(source)} holds no {name}: give the config, or a folder that holds it")
    return _read_json(path)


def read_state_dict(source: Source) -> dict[str, np.ndarray]:
    """Reads the weights of a folder, of a repository on the Hub, or of one file.

    Args:
      source: A folder, an id, or a file; a file ending in .safetensors is one, any other a torch file.

    Returns:
      Arrays by key, as stored (bfloat16 and float8 with the types of `ml_dtypes`), perhaps not writable.

    Raises:
      InputError: There is no such folder, repository or file, or it holds no weights.
      WeightsError: The weights are damaged, or their parts do not fit together.
    """
    if os.path.isfile(source):
        return _read_file(Path(source))
    for name in _WEIGHTS:
        if path := find(source, name):
            return _read_file(path)
        if index := find(source, f"{name}.index.json"):
            return _read_parts(source, index)
    names = " or ".join(_WEIGHTS)
    raise InputError(f"{os.fspath(source)} holds neither {names} nor their parts: name the weights file itself")


def find(source: Source, name: str) -> Path | None:
    """The local path of a file of a folder or of a repository on the Hub, downloaded if need be; None if it holds none.

    Raises:
      InputError: The folder does not exist, or the repository cannot be reached.
    """
    if os.path.isdir(source):
        path = Path(source, name)
        return path if path.is_file() else None
    match = _HUB_ID.fullmatch(os.fspath(source))
    if os.path.exists(source) or not match:
        raise InputError(
            f"{os.fspath(source)} is neither a folder nor an id of the Hugging Face Hub (owner/name): check the path"
        )
    return _download(match["id"], match["revision"], name)


def _download(repository: str, revision: str | None, name: str) -> Path | None:
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError as error:
        raise InputError(
            f"{repository} is no local folder, and the Hugging Face Hub needs: pip install huggingface_hub"
        ) from error
    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except errors.EntryNotFoundError as error:
        # This one is of the same family, and says that the Hub could not be asked.
        if not isinstance(error, errors.LocalEntryNotFoundError):
            return None
        reason = "it is not in the cache and the Hub cannot be reached"
    except Exception as error:  # those of the Hub, of its HTTP client and of the file system have no common kind
        reason = describe(error).partition(". ")[0]
    raise InputError(
        f"{repository} is no local folder and {name} cannot be fetched from the Hugging Face Hub ({reason}): check the name and "
        f"the connection, or download it and give its folder"
    )


# -- files ------------------------------------------------------------------------------------------------------------


def _read_file(path: Path) -> dict[str, np.ndarray]:
    return read_safetensors(path) if path.suffix == ".safetensors" else state_dict_of(read_torch(path), str(path))


def _read_parts(source: Source, index: Path) -> dict[str, np.ndarray]:
    """The files that an index names, which must hold exactly the keys that it says."""
    places = _read_json(index).get("weight_map")
    if not (isinstance(places, dict) and places and all(isinstance(name, str) for name in places.values())):
        raise WeightsError(f"{index} has no weight_map from keys to files: it is damaged, download it again")
    state: dict[str, np.ndarray] = {}
    for name in sorted(set(places.values())):
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise WeightsError(
                f"{index} names the part {name!r}, which is not a file beside it: do not use this checkpoint"
            )
        path = find(source, name)
        if path is None:
            raise WeightsError(f"{os.fspath(source)} lacks {name}, which {index.name} names: download it")
        part = _read_file(path)
        expected = {key for key, place in places.items() if place == name}
        if faults := sorted(expected ^ part.keys()):
            shown = ", ".join(faults[:10]) + ("" if len(faults) <= 10 else f" and {len(faults) - 10} more")
            raise WeightsError(f"{path} does not hold what {index.name} says: they differ in {shown}")
        state |= part
    return state


def open_state(source: Source | Mapping[str, Any]) -> tuple[dict[str, np.ndarray], str]:
    """The state dict of a folder, Hugging Face id, file of weights or state dict, and what errors call it.

    Raises:
      InputError: Nothing is there.
      WeightsError: The files are damaged.
    """
    if isinstance(source, Mapping):
        return state_dict_of(source, "the state dict"), "the state dict"
    return read_state_dict(source), os.fspath(source)


def choose_config(
    source: Source | Mapping[str, Any],
    config: Any,
    kind: str,
    known: Mapping[str, Any],
    parse: Callable[[Mapping[str, Any], str], Any],
) -> Any:
    """The config of a model to load: given, named, or read from the folder.

    Args:
      source: What is loaded; only a folder or id says its sizes.
      config: A config, the name of a published one, or None to read the source's config.json.
      kind: What errors call the model.
      known: The published configs by name.
      parse: Makes a config of a config.json's fields and the name of its source.

    Raises:
      InputError: No such name, or a source without a config.
      WeightsError: The config.json is none.
    """
    if config is None:
        if isinstance(source, Mapping) or os.path.isfile(source):
            raise InputError(f"a file of weights does not say its sizes: give a config, or one of {', '.join(known)}")
        return parse(read_config(source), os.fspath(source))
    if not isinstance(config, str):
        return config
    if config not in known:
        raise InputError(f"there is no published {kind} {config!r}; there are {', '.join(known)}")
    return known[config]


def read_safetensors(path: Source) -> dict[str, np.ndarray]:
    """Maps a safetensors file: arrays that are read from disk when they are used, and cannot be written.

    Raises:
      InputError: The file is missing or not readable.
      WeightsError: It is no such file, damaged, or holds numbers of a type that NumPy cannot take.
    """
    from safetensors import SafetensorError, safe_open

    try:
        # The library checks the header in full: sizes, types, gaps and overlaps. What it lets pass can be trusted.
        with safe_open(path, framework="numpy"):
            data = np.memmap(path, np.uint8, mode="r")
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:start].tobytes())
        return {key: _view(data[start:], key, entry) for key, entry in header.items() if key != "__metadata__"}
    except OSError as error:
        raise InputError(why_unreadable(path, error)) from error
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise WeightsError(
            f"{os.fspath(path)} is no safetensors file, or is damaged or cut short ({describe(error)})"
        ) from error


def _view(data: np.ndarray, key: str, entry: Mapping[str, Any]) -> np.ndarray:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{key} has the type {entry['dtype']}, not one of {', '.join(_DTYPES)}")
    first, last = entry["data_offsets"]
    return data[first:last].view(np.dtype(_DTYPES[entry["dtype"]])).reshape(entry["shape"])


def _read_json(path: Path) -> dict[str, Any]:
    data = read_bytes(path)
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is no JSON file ({describe(error)}): download it again") from error
    if not isinstance(tree, dict):
        raise WeightsError(f"{path} holds a {type(tree).__name__}, not a JSON object: download it again")
    return tree
