"""Where arrays live: a mesh with axes `data` and `model`, and a rule table from parameter names to partitions.

    rules = ((r"attention/.*/kernel$", P(None, "model")), (r"embedding$", P("model")))

The first rule whose pattern is found (`re.search`) in an array's name decides; what no rule names is replicated. Names
are tree paths joined by "/". The moments of an optimiser carry the name of their parameter at the end, so one rule
places a parameter, its moving average and its moments alike.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxsem.errors import InputError

Rules = Sequence[tuple[str, PartitionSpec]]


def make_mesh(data: int | None = None, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges the devices of all processes as a mesh with axes `data` and `model`.

    Args:
        data: Devices that share the batch; by default all devices divided by `model`.
        model: Devices that share one copy of the sharded parameters.
        devices: The devices to use; by default all of them.

    Raises:
        InputError: If data × model is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    rows = len(devices) // max(model, 1) if data is None else data
    if model < 1 or rows < 1 or rows * model != len(devices):
        raise InputError(
            f"a mesh of data={rows} by model={model} does not use exactly the {len(devices)} devices there are"
        )
    return jax.make_mesh((rows, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The placement of a batch: its leading axis split over `data`, everything else whole."""
    return NamedSharding(mesh, PartitionSpec("data"))


def tree_shardings(tree: Any, mesh: Mesh, rules: Rules = ()) -> Any:
    """Gives the placement of every array in a tree by the rule table (see the module's docstring).

    Args:
        tree: Arrays or anything with a `shape`: parameters, or a whole training state.
        mesh: The mesh of `make_mesh`.
        rules: (pattern, partition) pairs, the first match decides.

    Returns:
        A tree of the same structure with a `NamedSharding` for each array.

    Raises:
        InputError: If a rule matches nothing, names more axes than an array has, or does not divide an axis evenly.
    """
    used = set()

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, spec in rules:
            if re.search(pattern, name):
                used.add(pattern)
                _check_fit(name, leaf.shape, pattern, spec, mesh)
                return NamedSharding(mesh, spec)
        return NamedSharding(mesh, PartitionSpec())

    shardings = jax.tree_util.tree_map_with_path(place, tree)
    unused = [pattern for pattern, _ in rules if pattern not in used]
    if unused:
        raise InputError(f"these sharding rules decide no array: {', '.join(unused)}")
    return shardings


def _check_fit(name: str, shape: tuple[int, ...], pattern: str, spec: PartitionSpec, mesh: Mesh) -> None:
    if len(spec) > len(shape):
        raise InputError(f"sharding rule {pattern!r} names {len(spec)} axes, but {name} has shape {shape}")
    for size, axes in zip(shape, spec):
        parts = 1
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            if axis not in mesh.shape:
                raise InputError(
                    f"sharding rule {pattern!r} names mesh axis {axis!r}; there are {', '.join(mesh.shape)}"
                )
            parts *= mesh.shape[axis]
        if size % parts:
            raise InputError(f"sharding rule {pattern!r} splits an axis of {size} in {name} over {parts} devices")
