"""Orbax checkpoints that resume exactly, and the best parameters so far as one safetensors file.

A checkpoint holds the whole training state, the position in the data and the recipe's config. The state is stored as
flat names ("params/conv/kernel"), so that one that does not fit can say which arrays are missing, surplus or misshapen.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  registers bfloat16, without which safetensors cannot give it to NumPy
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxsem.errors import FormatError, InputError, WeightsError
from jaxsem.training.state import TrainState


class Checkpoints:
    """The numbered checkpoints of one run, the newest `keep` of them; use it as a context manager.

    Writing goes on in the background while training continues; leaving the context waits for it. A checkpoint appears
    under its number only once it is complete. All processes of a run call the same methods in the same order.

    Args:
        folder: Where the checkpoints lie; it is made if need be.
        keep: How many to keep.
    """

    def __init__(self, folder: str | Path, keep: int = 3):
        import orbax.checkpoint as ocp  # takes about a second, and only training needs it

        # Orbax reports every step of its work through absl's logger; what matters to a user arrives as exceptions.
        logging.getLogger("absl").setLevel(logging.ERROR)
        if keep < 1:
            raise InputError(f"keep={keep} checkpoints would leave nothing to resume from; it must be at least 1")
        self.folder = Path(folder).absolute()
        self._args = ocp.args
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
                "config": ocp.JsonCheckpointHandler(),
            },
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data_state: Any, config: dict) -> None:
        """Saves the state under its step, with data position and config (both JSON); a step saved already stays."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        args = self._args
        composite = args.Composite(
            state=args.StandardSave(_flatten(state)),
            data=args.JsonSave({"position": data_state}),
            config=args.JsonSave(config),
        )
        self._manager.save(step, args=composite)

    def config(self, step: int) -> dict:
        """The config that was saved at a step."""
        args = self._args
        return self._manager.restore(step, args=args.Composite(config=args.JsonRestore()))["config"]

    def restore(self, like: TrainState, step: int) -> tuple[TrainState, Any]:
        """Reads a checkpoint back, on whatever devices the new state uses.

        Args:
            like: A state of the same shapes; its placement is that of the result, also where it differs from the saved.
            step: The step to read.

        Returns:
            (state, data_state), equal bit for bit to what was saved.

        Raises:
            InputError: If the checkpoint's arrays are not those of `like`: all differences are listed.
            FormatError: If the checkpoint is damaged.
        """
        args = self._args
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in _flatten(like).items()
        }
        try:
            stored = self._manager.item_metadata(step)["state"].tree
        except Exception as error:
            raise self._damaged(step) from error
        problems = _differences({k: (tuple(v.shape), v.dtype) for k, v in stored.items()}, wanted)
        if problems:
            raise InputError(f"checkpoint {step} in {self.folder} belongs to another model: {problems}")
        composite = args.Composite(state=args.StandardRestore(wanted), data=args.JsonRestore())
        try:
            found = self._manager.restore(step, args=composite)
        except Exception as error:
            raise self._damaged(step) from error
        return _unflatten(like, found["state"]), found["data"]["position"]

    def _damaged(self, step: int) -> FormatError:
        return FormatError(
            f"checkpoint {self.folder / str(step)} cannot be read: delete that folder to resume from an older one"
        )


def save_best(path: Path, params: dict, info: dict) -> None:
    """Writes parameters as one safetensors file, complete or not at all, with `info` (JSON) in its metadata.

    All processes call it, so that sharded parameters can be gathered; the first one writes.
    """
    from safetensors.numpy import save_file

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        params = multihost_utils.process_allgather(params, tiled=True)
    if jax.process_index() == 0:
        flat = {name: np.asarray(leaf, order="C") for name, leaf in flatten_dict(params, sep="/").items()}
        beside = path.with_name(path.name + ".part")
        save_file(flat, beside, metadata={"info": json.dumps(info)})
        os.replace(beside, path)


def load_best(workdir: str | Path) -> tuple[dict, dict]:
    """Reads the parameters with the best evaluation of a run.

    Args:
        workdir: The folder that was given to `train`.

    Returns:
        (params, info): nested dictionaries of NumPy arrays, and `step`, `metric` and `value`.

    Raises:
        WeightsError: If there is no such file, or it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(workdir) / "best.safetensors"
    if not path.exists():
        raise WeightsError(f"{path} does not exist: the run there was not evaluated yet")
    try:
        with safe_open(path, framework="numpy") as file:
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dictionary
            info = json.loads(file.metadata()["info"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as the best parameters of a run: {error}") from error
    return unflatten_dict(flat, sep="/"), info


def _flatten(state: TrainState) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {_name(path): jax.random.key_data(x) if _is_key(x) else x for path, x in leaves}


def _unflatten(like: TrainState, flat: dict[str, jax.Array]) -> TrainState:
    def pick(path, leaf):
        value = flat[_name(path)]
        return jax.random.wrap_key_data(value, impl=str(jax.random.key_impl(leaf))) if _is_key(leaf) else value

    return jax.tree_util.tree_map_with_path(pick, like)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_key(leaf: jax.Array) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _differences(stored: dict[str, tuple], wanted: dict[str, jax.ShapeDtypeStruct]) -> str:
    parts = []
    for label, names in (("missing", wanted.keys() - stored.keys()), ("surplus", stored.keys() - wanted.keys())):
        if names:
            parts.append(f"{label} {', '.join(sorted(names))}")
    for name in sorted(wanted.keys() & stored.keys()):
        (shape, dtype), want = stored[name], wanted[name]
        if shape != want.shape or dtype != want.dtype:
            parts.append(f"{name} is {dtype} {shape}, the model has {want.dtype} {want.shape}")
    return "; ".join(parts)
