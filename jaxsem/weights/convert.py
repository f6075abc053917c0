"""Checkpoints of other libraries as tables: which of their keys is which of our parameters, and in what layout.

A table is a sequence of `Entry` and `Ignored` rules. Both sides of an entry are templates: literal text with named
fields, `{i}` for digits or `{net:g_a|g_s}` for any regular expression. The fields of a matching key fill the target's
template, and those of a target the key's, so one table serves both directions:

    Entry("layers.{i}.attn.q.weight", "layers[{i}]/q/kernel", LINEAR)

A field in square brackets is an index along the target's leading axis: keys of equal layers are stacked for `nn.scan`.
Several entries may give the same target (older names of the same parameter); writing uses the first.

Nothing is skipped in silence: every key is used by exactly one rule, every target is given exactly once, and all that
does not fit is listed in one error.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxsem.errors import WeightsError

StateDict = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Transform:
    """A change of layout and its inverse; both may return views.

    Attributes:
      name: What errors call it.
      forward: From the checkpoint's array to ours.
      inverse: From ours to the checkpoint's.
    """

    name: str
    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]


def permute(name: str, *axes: int) -> Transform:
    """Transposes to `axes` of the checkpoint's array."""
    back = tuple(int(axis) for axis in np.argsort(axes))
    return Transform(name, lambda a: a.transpose(axes), lambda a: a.transpose(back))


def reshape(source: tuple[int, ...], target: tuple[int, ...]) -> Transform:
    """Reshapes; -1 stands for what is left, as in NumPy."""
    return Transform(f"reshape to {target}", lambda a: a.reshape(target), lambda a: a.reshape(source))


IDENTITY = Transform("as it is", lambda a: a, lambda a: a)
LINEAR = permute("linear: (out, in) to (in, out)", 1, 0)
CONV = permute("convolution: (out, in, row, column) to (row, column, in, out)", 2, 3, 1, 0)
DECONV = permute("transposed convolution: (in, out, row, column) to (row, column, in, out)", 2, 3, 0, 1)
# A transposed convolution of stride 1 is an ordinary one with the kernel turned by 180 degrees.
STRIDE1_DECONV = Transform(
    "transposed convolution of stride 1 to convolution",
    lambda a: DECONV.forward(a)[::-1, ::-1],
    lambda a: DECONV.inverse(a[::-1, ::-1]),
)


@dataclass(frozen=True)
class Entry:
    """One rule: keys like `source` are the parameters like `target` after `transform`."""

    source: str
    target: str
    transform: Transform = IDENTITY

    def __post_init__(self) -> None:
        if set(_fields(self.source)) != set(_fields(self.target)):
            raise ValueError(f"the fields of {self.source!r} and {self.target!r} differ")

    @property
    def path(self) -> str:
        """The target without its index."""
        return re.sub(r"\[.*?\]", "", self.target)

    @property
    def index(self) -> str | None:
        """The field that counts along the leading axis, if any."""
        found = re.search(r"\[\{(\w+)\}\]", self.target)
        return found and found[1]

    def keys_of(self, path: str, shape: tuple[int, ...]) -> Iterator[tuple[int | None, str]]:
        """The keys that give the target `path` of this shape, each with its place on the leading axis."""
        match = _pattern(self.path, self.source).fullmatch(path)
        if match and self.index is None:
            yield None, _fill(self.source, match.groupdict())
        elif match:
            for i in range(shape[0]):
                yield i, _fill(self.source, {**match.groupdict(), self.index: str(i)})


@dataclass(frozen=True)
class Ignored:
    """Keys that hold nothing we need, and why."""

    source: str
    reason: str


Table = Sequence[Entry | Ignored]
# Where a parameter goes: its path, and its place on the leading axis if it is one of a stack.
Slot = tuple[str, int | None]


def convert(
    table: Table, state_dict: StateDict, target_shapes: Mapping[str, Any], name: str = "the checkpoint"
) -> dict:
    """Converts a state dict into a parameter tree.

    Args:
      table: The rules.
      state_dict: Arrays by key.
      target_shapes: The tree that the model wants, of arrays or `jax.ShapeDtypeStruct` (from `jax.eval_shape`).
      name: What errors call the checkpoint.

    Returns:
      A nested dict of NumPy arrays of the shapes and types asked for.

    Raises:
      WeightsError: Lists every key that is missing, surplus, doubly matched, misshapen or of another kind of number.
    """
    wanted = flatten_dict(dict(target_shapes), sep="/")
    given, faults = _assign(table, state_dict, wanted)
    missing = []
    for path, target in wanted.items():
        for slot, key in _expected(table, path, target.shape):
            if slot not in given:
                missing.append((key, _source_shape(table, slot, target.shape)))
    for slot, (key, transform) in given.items():
        shape = wanted[slot[0]].shape
        needs, seen = _shape_before(transform, shape if slot[1] is None else shape[1:]), np.shape(state_dict[key])
        if needs != seen:
            faults["misshapen"].append(f"{key} is {seen}, not {needs}")
        elif _kind(state_dict[key]) != _kind(wanted[slot[0]]):
            faults["of another kind"].append(f"{key} is {state_dict[key].dtype}, not {wanted[slot[0]].dtype}")
    surplus = faults["surplus"]
    faults["surplus"] = [_with_hint(key, np.shape(state_dict[key]), [k for k, _ in missing]) for key in surplus]
    faults["missing"] = [f"{key} {shape}" for key, shape in missing]
    _raise_if_any(name, faults)
    return unflatten_dict({path: _build(path, target, given, state_dict) for path, target in wanted.items()}, sep="/")


def invert(table: Table, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Writes a parameter tree as a state dict, under the first name that the table gives each parameter.

    Args:
      table: The rules.
      params: Nested dict of arrays.

    Returns:
      Contiguous arrays by key, in sorted order; ignored keys are not written.

    Raises:
      WeightsError: Lists the parameters that no rule names.
    """
    state, surplus = {}, []
    for path, value in flatten_dict(dict(params), sep="/").items():
        value = np.asarray(value)
        entry = _entry_of(table, path)
        if entry is None:
            surplus.append(f"{path} {value.shape}")
            continue
        for i, key in entry.keys_of(path, value.shape):
            state[key] = np.asarray(entry.transform.inverse(value if i is None else value[i]), order="C")
    _raise_if_any("the parameter tree", {"surplus": surplus})
    return dict(sorted(state.items()))


def strip_prefixes(state_dict: StateDict, prefixes: Sequence[str]) -> dict[str, np.ndarray]:
    """Removes wrappers' names such as `module.` from the front of the keys, as often as they occur.

    Raises:
      WeightsError: Two keys become one.
    """
    pattern = re.compile(f"(?:{'|'.join(map(re.escape, prefixes))})*")
    stripped: dict[str, np.ndarray] = {}
    for key, value in state_dict.items():
        short = key[pattern.match(key).end() :]
        if short in stripped:
            raise WeightsError(f"the checkpoint holds {short} twice, with and without the prefix of {key}")
        stripped[short] = value
    return stripped


# -- matching ---------------------------------------------------------------------------------------------------------


def _assign(table: Table, state_dict: StateDict, wanted: Mapping[str, Any]) -> tuple[dict[Slot, Any], dict[str, list]]:
    """Which key fills which slot; keys that fill none or the same one again are faults."""
    given: dict[Slot, tuple[str, Transform]] = {}
    kinds = "missing", "surplus", "doubly matched", "misshapen", "of another kind"
    faults: dict[str, list] = {kind: [] for kind in kinds}
    for key in sorted(state_dict):
        hits = [(rule, match) for rule in table if (match := _pattern(rule.source, rule.source).fullmatch(key))]
        if len(hits) > 1:
            faults["doubly matched"].append(f"{key} by {' and '.join(rule.source for rule, _ in hits)}")
        if not hits:
            faults["surplus"].append(key)
        if len(hits) != 1 or isinstance(hits[0][0], Ignored):
            continue
        rule, match = hits[0]
        fields = match.groupdict()
        path = _fill(rule.path, fields)
        slot = path, None if rule.index is None else int(fields[rule.index])
        inside = path in wanted and (slot[1] is None or slot[1] < wanted[path].shape[0])
        if not inside:
            faults["surplus"].append(key)
        elif slot in given:
            faults["doubly matched"].append(f"{path} by {given[slot][0]} and {key}")
        else:
            given[slot] = key, rule.transform
    return given, faults


def _expected(table: Table, path: str, shape: tuple[int, ...]) -> Iterator[tuple[Slot, str]]:
    entry = _entry_of(table, path)
    if entry is None:
        yield (path, None), f"(no rule gives it) {path}"
    else:
        for i, key in entry.keys_of(path, shape):
            yield (path, i), key


def _entry_of(table: Table, path: str) -> Entry | None:
    """The first entry that gives a target path."""
    entries = (rule for rule in table if isinstance(rule, Entry))
    return next((entry for entry in entries if _pattern(entry.path, entry.source).fullmatch(path)), None)


def _build(path: str, target: Any, given: Mapping[Slot, Any], state_dict: StateDict) -> np.ndarray:
    if (path, None) in given:
        key, transform = given[path, None]
        return np.array(transform.forward(state_dict[key]), target.dtype, order="C")
    stacked = np.empty(target.shape, target.dtype)
    for i in range(len(stacked)):
        key, transform = given[path, i]
        stacked[i] = transform.forward(state_dict[key])
    return stacked


# -- shapes and words -------------------------------------------------------------------------------------------------


def _shape_before(transform: Transform, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a transform needs to give `shape`; found by inverting an array of bits, not of parameters."""
    zeros = np.broadcast_to(np.zeros((), np.uint8), shape) if math.prod(shape) else np.zeros(shape, np.uint8)
    return transform.inverse(zeros).shape


def _source_shape(table: Table, slot: Slot, shape: tuple[int, ...]) -> tuple[int, ...]:
    entry = _entry_of(table, slot[0])
    return shape if entry is None else _shape_before(entry.transform, shape if slot[1] is None else shape[1:])


def _kind(array: Any) -> str:
    """Real numbers are told from all others; their width does not matter (bfloat16 is not NumPy's own)."""
    return "real" if jnp.issubdtype(array.dtype, jnp.floating) else np.dtype(array.dtype).kind


def _with_hint(key: str, shape: tuple[int, ...], missing: list[str]) -> str:
    close = difflib.get_close_matches(key, missing[:200], 1, 0.85)
    return f"{key} {shape}" + (f" (did you mean {close[0]}?)" if close else "")


def _raise_if_any(name: str, faults: Mapping[str, list[str]]) -> None:
    faults = {kind: sorted(lines) for kind, lines in faults.items() if lines}
    if faults:
        counts = ", ".join(f"{len(lines)} {kind}" for kind, lines in faults.items())
        lines = [f"\n  {kind}: {line}" for kind, group in faults.items() for line in group]
        raise WeightsError(f"{name} does not fit the model: {counts}" + "".join(lines))


# -- templates --------------------------------------------------------------------------------------------------------

_FIELD = re.compile(r"\{(\w+)(?::([^{}]+))?\}")


def _fields(template: str) -> dict[str, str]:
    """The fields of a template and their regular expressions, digits by default."""
    return {name: pattern or r"\d+" for name, pattern in _FIELD.findall(template)}


@cache
def _pattern(template: str, source: str) -> re.Pattern:
    """The regular expression of a template; what its fields may hold is said in the source."""
    kinds, parts, end, seen = _fields(source), [], 0, set()
    for field in _FIELD.finditer(template):
        name = field[1]
        parts += [re.escape(template[end : field.start()])]
        parts += [f"(?P={name})" if name in seen else f"(?P<{name}>{kinds[name]})"]
        end = field.end()
        seen.add(name)
    return re.compile("".join(parts) + re.escape(template[end:]))


def _fill(template: str, fields: Mapping[str, str]) -> str:
    return _FIELD.sub(lambda field: fields[field[1]], template)
