"""Reads what `torch.save` wrote, without torch, and without running anything.

A torch file is a pickle whose tensors point to raw storages beside it; `jaxsem.weights.torch_pickle` reads the pickle.
Both containers are known: the zip archive (since PyTorch 1.6) and the older sequence of pickles. Tensors may share
storages and have any strides; they come back as NumPy arrays (bfloat16 and float8 with the types of `ml_dtypes`) that
may share memory and may not be writable.

What a file can make this reader hold in memory is bounded by its own size: storages must lie inside the file, no array
is larger than the file, and lengths are never trusted before the bytes are seen.

Source: the formats as written by `torch.serialization` of PyTorch 2.13.
"""

import io
import math
import os
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np

from jaxsem.errors import InputError, WeightsError
from jaxsem.files import why_unreadable
from jaxsem.weights.torch_pickle import Interpreter, Name, Opaque, Refused, Storage, Tensor

__all__ = ["Opaque", "read_torch", "state_dict_of"]

MAX_DEPTH = 64
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_BIG_ENDIAN = "was written on a big-endian machine: load and save it again with torch on a little-endian one"


def read_torch(path: str | os.PathLike) -> Any:
    """Reads a `.pt`, `.pth` or `.pth.tar` file.

    Args:
      path: The file.

    Returns:
      What was saved: nested dicts, lists and tuples of numbers, text and NumPy arrays.

    Raises:
      InputError: The file is missing or not readable.
      WeightsError: It is no torch file, damaged, or asks for anything but data.
    """
    name = os.fspath(path)
    try:
        stream = open(path, "rb")  # noqa: SIM115 - closed by the with below
    except (OSError, ValueError) as error:
        raise InputError(why_unreadable(path, error)) from error
    with stream:
        try:
            is_zip = stream.read(2) == b"PK"
            stream.seek(0)
            return _read_zip(stream) if is_zip else _read_legacy(stream.read())
        except Refused as error:
            raise WeightsError(f"{name} {error}") from None
        except Exception as error:  # whatever a damaged or hostile file trips, it is the file's fault
            raise WeightsError(f"{name} is no torch file, or is damaged or cut short ({error})") from error


def state_dict_of(tree: Any, name: str = "the file") -> dict[str, np.ndarray]:
    """The state dict in what `read_torch` returned: the dict itself, or its item `state_dict`.

    Raises:
      WeightsError: There is none, or it holds other things than arrays.
    """
    inner = tree.get("state_dict", tree) if isinstance(tree, Mapping) else None
    if not isinstance(inner, Mapping) or not inner:
        raise WeightsError(f"{name} holds no state dict: save model.state_dict(), or a dict with it as 'state_dict'")
    strange = [str(key) for key, value in inner.items() if not (isinstance(key, str) and hasattr(value, "shape"))]
    if strange:
        raise WeightsError(f"{name}: the state dict holds other things than tensors: {', '.join(strange[:10])}")
    return {key: np.asarray(value) for key, value in inner.items()}


# -- containers -------------------------------------------------------------------------------------------------------


def _read_zip(stream: BinaryIO) -> Any:
    size = os.fstat(stream.fileno()).st_size
    with zipfile.ZipFile(stream) as archive:
        entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if "constants.pkl" in entries:
            raise Refused("is a TorchScript program, not a state dict: save model.state_dict() instead")
        if "data.pkl" not in entries:
            raise Refused("is a zip archive without data.pkl, so no torch file")
        infos = entries.values()
        # Overlapping or compressed entries could make a small file huge; torch writes neither.
        compressed = any(info.compress_type != zipfile.ZIP_STORED for info in infos)
        if compressed or sum(info.file_size for info in infos) > size:
            raise Refused("holds compressed or overlapping parts, which torch never writes: save it again with torch")
        if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
            raise Refused(_BIG_ENDIAN)
        tree = Interpreter().run(io.BytesIO(archive.read(entries["data.pkl"])))
        return _Builder(lambda key: archive.read(entries[f"data/{key}"]), size).build(tree)


def _read_legacy(data: bytes) -> Any:
    stream = io.BytesIO(data)
    heads = [Interpreter().run(stream) for _ in range(2)] if data[:1] == b"\x80" else []
    if heads != [_LEGACY_MAGIC, _LEGACY_PROTOCOL]:
        raise ValueError("its first bytes are not those of a torch file")
    if Interpreter().run(stream).get("little_endian") is not True:
        raise Refused(_BIG_ENDIAN)
    interpreter = Interpreter()
    tree, keys = interpreter.run(stream), Interpreter().run(stream)
    raw, position = {}, stream.tell()
    for key in keys:
        size = interpreter.item_sizes[key] * int.from_bytes(data[position : position + 8], "little")
        position += 8 + size
        if position > len(data):
            raise ValueError(f"storage {key} of {size} bytes goes beyond the end")
        raw[key] = memoryview(data)[position - size : position]
    return _Builder(raw.__getitem__, len(data)).build(tree)


class _Builder:
    """Turns what the interpreter left into arrays and plain containers."""

    def __init__(self, read_storage: Callable[[str], bytes], limit: int):
        self.read_storage, self.limit = read_storage, limit
        self.storages: dict[str, np.ndarray] = {}
        self.done: dict[int, Any] = {}

    def build(self, node: Any, depth: int = 0) -> Any:
        if isinstance(node, Tensor):
            return self.array(node)
        if isinstance(node, Name | Storage):
            return Opaque(node.path if isinstance(node, Name) else "torch storage")
        if not isinstance(node, dict | list | tuple):
            return node
        if depth > MAX_DEPTH:
            raise Refused(f"nests its data more than {MAX_DEPTH} levels deep, or in itself")
        # What is referred to many times is built once: otherwise a few shared lists could unfold without end.
        if id(node) not in self.done:
            if isinstance(node, dict):
                result = {key: self.build(value, depth + 1) for key, value in node.items()}
            else:
                result = type(node)([self.build(value, depth + 1) for value in node])
            self.done[id(node)] = result
        return self.done[id(node)]

    def array(self, tensor: Tensor) -> np.ndarray:
        storage, item = tensor.storage, tensor.dtype.itemsize
        shape, strides = tensor.shape, tensor.strides
        if len(shape) != len(strides) or min((0, tensor.offset, *shape, *strides)) < 0:
            raise ValueError(f"a tensor of shape {shape}, strides {strides} and offset {tensor.offset}")
        count = math.prod(shape)
        if count == 0:
            return np.zeros(shape, tensor.dtype)
        if storage.key not in self.storages:
            self.storages[storage.key] = np.frombuffer(self.read_storage(storage.key), np.uint8)
        size = storage.dtype.itemsize
        end = None if storage.length is None else (storage.start + storage.length) * size
        raw = self.storages[storage.key][storage.start * size : end]
        last = tensor.offset + sum((n - 1) * stride for n, stride in zip(shape, strides))
        if (last + 1) * item > len(raw) or count * item > self.limit:
            raise ValueError(f"a tensor of shape {shape} in a storage of {len(raw)} bytes")
        flat = raw[tensor.offset * item : (last + 1) * item].view(tensor.dtype)
        return np.lib.stride_tricks.as_strided(flat, shape, [s * item for s in strides], writeable=False)
