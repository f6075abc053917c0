"""What training carries from step to step, and the split of parameters into trainable and frozen."""

import re
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from jaxsem.errors import InputError
from jaxsem.training.sharding import Rules, tree_shardings


@flax.struct.dataclass
class TrainState:
    """Everything a training step reads and replaces; with the data position it is all that a resume needs.

    The fields are typed `Any` because trees of shapes and of placements take the same form.

    Attributes:
        step: int32 scalar, the number of steps taken.
        params: The trainable parameters.
        ema_params: Their exponential moving average, or None.
        opt_state: The state of the optimiser.
        rng: A typed PRNG key, never replaced: step *i* draws from `fold_in(rng, i)`.
    """

    step: Any
    params: Any
    ema_params: Any
    opt_state: Any
    rng: Any

    @property
    def eval_params(self) -> Any:
        """The parameters to evaluate and ship: the moving average where there is one."""
        return self.params if self.ema_params is None else self.ema_params


def create_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    rng: jax.Array,
    *,
    ema: bool = False,
    mesh: Mesh | None = None,
    rules: Rules = (),
) -> TrainState:
    """Builds the state of step 0, placed on the mesh by the rules.

    The parameters are copied, since the step donates (overwrites) its state: the caller's arrays stay usable.

    Args:
        params: The trainable parameters, equal in every process.
        optimizer: An optax optimiser, such as `make_optimizer` gives.
        rng: A typed key from `jax.random.key`.
        ema: Whether to keep a moving average of the parameters.
        mesh: Where to place the state; None is the default device.
        rules: The partition rules of `jaxsem.training.sharding`.
    """
    impl = str(jax.random.key_impl(rng))

    def build(params, key_data):
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=jax.tree.map(jnp.copy, params),
            ema_params=jax.tree.map(jnp.copy, params) if ema else None,
            opt_state=optimizer.init(params),
            rng=jax.random.wrap_key_data(key_data, impl=impl),
        )

    key_data = np.asarray(jax.random.key_data(rng))
    if mesh is None:
        return jax.jit(build)(params, key_data)
    params = place(params, mesh, rules)
    shardings = tree_shardings(jax.eval_shape(build, params, key_data), mesh, rules)
    return jax.jit(build, out_shardings=shardings)(params, key_data)


def place(tree: Any, mesh: Mesh, rules: Rules = ()) -> Any:
    """Puts a tree that is equal in every process on the mesh by the partition rules; frozen parameters, for example."""
    if jax.process_count() > 1:
        tree = jax.tree.map(np.asarray, tree)
    return jax.device_put(tree, tree_shardings(tree, mesh, rules))


def split_params(params: dict, frozen: Sequence[str]) -> tuple[dict, dict]:
    """Splits nested parameters into a trainable and a frozen tree, so that what is frozen costs no gradient.

    Args:
        params: Nested dictionaries of arrays.
        frozen: Patterns; a parameter whose path ("backbone/layers/kernel") contains one (`re.search`) is frozen.

    Returns:
        (trainable, frozen): two nested dictionaries that `merge_params` joins again.

    Raises:
        InputError: If a pattern matches no parameter.
    """
    flat = flatten_dict(params, sep="/")
    for pattern in frozen:
        if not any(re.search(pattern, name) for name in flat):
            raise InputError(
                f"the pattern {pattern!r} freezes nothing; parameters are named like {', '.join(list(flat)[:3])}"
            )
    held = {name for name in flat if any(re.search(pattern, name) for pattern in frozen)}
    trainable = {name: leaf for name, leaf in flat.items() if name not in held}
    return unflatten_dict(trainable, sep="/"), unflatten_dict({name: flat[name] for name in held}, sep="/")


def merge_params(trainable: dict, frozen: dict | None) -> dict:
    """Joins the two trees of `split_params`; None or an empty tree for `frozen` gives `trainable` itself.

    Raises:
        InputError: If a parameter is in both.
    """
    if not frozen:
        return trainable
    flat, held = flatten_dict(trainable, sep="/"), flatten_dict(frozen, sep="/")
    both = sorted(flat.keys() & held.keys())
    if both:
        raise InputError(f"these parameters are both trainable and frozen: {', '.join(both)}")
    return unflatten_dict({**flat, **held}, sep="/")
