"""A pickle interpreter for torch checkpoints that runs nothing.

Unpickling can run any program, so it is not used: a small stack machine walks the opcodes, knows the few names that
tensors need, and refuses every other. Nothing is imported and nothing is called; tensors stay descriptions (`Tensor`)
until the storages are read. Work and memory are bounded by a number of steps, and nothing of the file is ever printed
or hashed but text and numbers: lists that hold each other many times over would take exponential time.

Source: the opcodes of Python's `pickletools`, and the calls that `torch.save` of PyTorch 2.13 writes.
"""

import io
import operator
import pickletools
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

MAX_OPCODES = 4_000_000
MAX_DIMENSIONS = 32

_DTYPES = {
    "float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16,
    "int64": np.int64, "int32": np.int32, "int16": np.int16, "int8": np.int8, "uint8": np.uint8, "bool": np.bool_,
    "uint16": np.uint16, "uint32": np.uint32, "uint64": np.uint64,
    "complex64": np.complex64, "complex128": np.complex128,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2,
}  # fmt: skip
_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128", "UntypedStorage": "uint8",
}  # fmt: skip
_CONTAINERS = {"OrderedDict", "Counter", "defaultdict"}
# Names that checkpoints of trainers hold beside their tensors; they become `Opaque` and stay what they are: names.
_HARMLESS = ("_codecs.encode", "argparse.Namespace", "datetime.", "lightning.", "numpy.", "omegaconf.", "pathlib.",
             "pytorch_lightning.", "torch.Size", "torch.device", "torch.torch_version.", "typing.")  # fmt: skip
_HARMLESS_BUILTINS = {"set", "frozenset", "dict", "list", "tuple", "int", "float", "complex", "str", "bytes", "slice",
                      "range", "object", "bytearray"}  # fmt: skip


@dataclass(frozen=True)
class Opaque:
    """Something in a file that is neither number, text, container nor tensor: only its name is kept."""

    name: str


class Refused(Exception):
    """A file that asks for what this reader does not do; the text follows the file's name."""


@dataclass(frozen=True)
class Name:
    """A global that a pickle names."""

    path: str


@dataclass(frozen=True)
class Storage:
    """Raw memory of a file.

    Attributes:
      key: Its name in the file.
      dtype: Of its elements.
      start: First element; later than 0 in a view, which only old files have.
      length: Elements of a view; `None` is all that there are.
    """

    key: str
    dtype: np.dtype
    start: int = 0
    length: int | None = None


@dataclass(frozen=True)
class Tensor:
    """A strided window on a storage; offset and strides count elements and are not checked yet."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype


_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Interpreter:
    """A stack machine for the opcodes of a checkpoint's pickle."""

    def __init__(self):
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # the stacks below each open mark
        self.steps = 0
        self.memo: dict[int, Any] = {}
        self.item_sizes: dict[str, int] = {}  # of the storages seen, by key: old files need them to find the next

    def run(self, stream: io.BytesIO) -> Any:
        """Interprets one pickle and leaves the stream behind it."""
        for opcode, argument, _ in pickletools.genops(stream):
            self.spend(1)
            if opcode.name == "STOP":
                (result,) = self.stack
                return result
            self.step(opcode.name, argument)
        raise EOFError("the pickle has no end")

    def spend(self, steps: int) -> None:
        """Counts work, and refuses what no checkpoint needs."""
        self.steps += steps
        if self.steps > MAX_OPCODES:
            raise Refused(f"has a pickle of more than {MAX_OPCODES} steps, far beyond any checkpoint")

    def step(self, name: str, argument: Any) -> None:
        """Does one opcode: here those on plain values."""
        stack, memo = self.stack, self.memo
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[int(argument)])
        elif name == "MARK":
            self.outer.append(stack)
            self.stack = []
        elif name.startswith("EMPTY_"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": list}[name]())
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
        elif name not in ("PROTO", "FRAME"):
            self.step_with_objects(name, argument)

    def step_with_objects(self, name: str, argument: Any) -> None:
        """Does one opcode on containers, names and storages."""
        stack = self.stack
        if name in _TO_MARK:
            self.stack = self.outer.pop()
            _TO_MARK[name](self, stack)
        elif name == "SETITEM":
            self.set_items([stack.pop(-2), stack.pop()])
        elif name == "APPEND":
            self.extend([stack.pop()])
        elif name == "GLOBAL":
            stack.append(_check_name(argument.replace(" ", ".", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_check_name(".".join((module, attribute))))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            stack.append(self.apply(function, arguments))
        elif name == "BUILD":
            stack.pop()  # attributes of an object, such as a state dict's `_metadata`: not needed
        elif name == "BINPERSID":
            stack.append(self.storage(stack.pop()))
        else:
            raise Refused(f"uses the pickle opcode {name}, which no checkpoint needs")

    def push_dict(self, items: list[Any]) -> None:
        """Pushes a new dict of alternating keys and values."""
        self.stack.append({})
        self.set_items(items)

    def set_items(self, items: list[Any]) -> None:
        """Sets alternating keys and values in the dict on top."""
        target = self.stack[-1]
        if isinstance(target, Opaque):
            return
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int | float | bytes | None):
                raise TypeError(f"a {type(key).__name__} as key")
            target[key] = value

    def extend(self, items: list[Any]) -> None:
        """Appends to the list on top."""
        if not isinstance(self.stack[-1], Opaque):
            self.stack[-1].extend(items)

    def apply(self, function: Any, arguments: tuple) -> Any:
        """The result of a call that a pickle asks for, for the calls that only describe data."""
        if not isinstance(function, Name):
            raise TypeError(f"a call of {type(function).__name__}")
        if function.path in _REBUILDERS:
            return _REBUILDERS[function.path](*arguments)
        if function.path.startswith("collections."):
            pairs = arguments[-1] if arguments and isinstance(arguments[-1], dict | list) else []
            self.spend(len(pairs))  # the only copy made here: it must not be had for free again and again
            pairs = pairs.items() if isinstance(pairs, dict) else pairs
            return {key: value for key, value in pairs if isinstance(key, str | int)}
        if function.path == "torch.Size":
            return _integers(arguments[0])
        return Opaque(function.path)

    def storage(self, identity: Any) -> Storage:
        """The storage that a persistent id ("storage", type, key, device, length, view) names."""
        kind, storage_type, key, _, _, *view = identity
        dtype = _STORAGES.get(storage_type.path.removeprefix("torch.").removeprefix("storage."))
        if kind != "storage" or dtype is None or not isinstance(key, str):
            raise Refused(f"holds a storage of the unknown kind {storage_type.path}")
        dtype = np.dtype(_DTYPES[dtype])
        if view and view[0] is not None:
            # Old files name a view of a root storage; the root is the one that lies in the file.
            _, start, length = view[0]
            result = Storage(key, dtype, *_integers((start, length)))
        else:
            result = Storage(key, dtype)
        self.item_sizes[key] = dtype.itemsize
        return result


_TO_MARK = {
    "TUPLE": lambda self, items: self.stack.append(tuple(items)),
    "FROZENSET": lambda self, items: self.stack.append(tuple(items)),
    "LIST": lambda self, items: self.stack.append(items),
    "DICT": Interpreter.push_dict,
    "SETITEMS": lambda self, items: self.set_items(items),
    "APPENDS": lambda self, items: self.extend(items),
    "ADDITEMS": lambda self, items: self.extend(items),
}


def _check_name(path: str) -> Name:
    """A global is only a name here; one that no checkpoint needs is refused, so that a hostile file is noticed."""
    module, _, attribute = path.rpartition(".")
    known = (
        path in _REBUILDERS
        or (module in ("torch", "torch.storage") and (attribute in _STORAGES or attribute in _DTYPES))
        or (module == "collections" and attribute in _CONTAINERS)
        or (module in ("builtins", "__builtin__") and attribute in _HARMLESS_BUILTINS)
        or path.startswith(_HARMLESS)
    )
    if not known:
        raise Refused(
            f"names {path[:80]}, which is code, not data: nothing was run; if you trust the file, load it with torch "
            "and save only its state_dict()"
        )
    return Name(path)


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or len(values) > MAX_DIMENSIONS:
        raise TypeError("a shape that is none")
    return tuple(operator.index(value) for value in values)


def _tensor(storage, offset, shape, strides, *_) -> Tensor:
    return Tensor(storage, operator.index(offset), _integers(shape), _integers(strides), storage.dtype)


def _tensor_of_type(storage, offset, shape, strides, requires_grad, hooks, dtype, *_) -> Tensor:
    dtype = np.dtype(_DTYPES[dtype.path.removeprefix("torch.")])
    return Tensor(storage, operator.index(offset), _integers(shape), _integers(strides), dtype)


def _first(tensor, *_) -> Tensor:
    return tensor


_REBUILDERS = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_type,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.nn.parameter.Parameter": _first,
}
