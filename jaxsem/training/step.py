"""One training step, written once: pure in `step_fn`, compiled over a mesh in `compile_step`, or under `jax.pmap`.

    loss_fn(params, batch, rng) -> (loss, metrics)

`loss` is the mean over the batch's leading axis and `metrics` a dictionary of scalars, means as well; then one device,
a mesh and pmap all compute the same update.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxsem.errors import InputError
from jaxsem.training.sharding import Rules, batch_sharding, tree_shardings
from jaxsem.training.state import TrainState, merge_params

LossFn = Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
StepFn = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]


def step_fn(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float | None = None,
    axis_name: str | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Makes the pure step(state, batch, frozen=None) -> (state, metrics), for the caller to compile.

    To the metrics of the loss it adds `loss`, `grad_norm` (before clipping) and `finite`: whether the loss, the
    gradient and the update are finite. It does not react to them; the loop does, without waiting at each step.

    Args:
        loss_fn: See the module's docstring. With frozen parameters it sees both trees merged.
        optimizer: An optax optimiser.
        ema_decay: The decay d of the moving average, warmed up as min(d, (1 + step) / (10 + step)); None keeps none.
        axis_name: The mapped axis when run under `jax.pmap`: gradients and metrics are averaged over it, and each
            device draws other random numbers.
    """

    def step(state, batch, frozen=None):
        rng = jax.random.fold_in(state.rng, state.step)
        if axis_name is not None:
            rng = jax.random.fold_in(rng, jax.lax.axis_index(axis_name))

        def loss_of(params):
            return loss_fn(merge_params(params, frozen), batch, rng)

        (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        _check_names(metrics)
        if axis_name is not None:
            loss, metrics, grads = jax.lax.pmean((loss, metrics, grads), axis_name)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(updates))
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            ema_params=_average(state, params, ema_decay),
            opt_state=opt_state,
            rng=state.rng,
        )
        return new_state, {**metrics, "loss": loss, "grad_norm": grad_norm, "finite": finite}

    return step


def compile_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
    *,
    ema_decay: float | None = None,
    rules: Rules = (),
    frozen: Any = None,
    donate: bool = True,
) -> StepFn:
    """Compiles the training step with `jax.jit`: the same function on one CPU, one GPU, or a pod.

    Args:
        loss_fn: See the module's docstring.
        optimizer: An optax optimiser.
        mesh: A mesh of `make_mesh`; the batch is split over `data`, the state placed by `rules`. None: one device.
        ema_decay: Decay of the moving average of the parameters; the state must have been created with `ema=True`.
        rules: The partition rules of `jaxsem.training.sharding`, the same as for `create_state`.
        frozen: Parameters without gradient or optimiser state; place them with `jaxsem.training.state.place`.
        donate: Whether the step may overwrite the state it is given, which halves the memory the state needs.

    Returns:
        step(state, batch) -> (state, metrics); the metrics are scalars on the device, not waited for.

    Raises:
        InputError: When called with a batch that the data axis does not divide, or metrics with a reserved name.
    """
    step = step_fn(loss_fn, optimizer, ema_decay=ema_decay)

    def sharded(state, batch, frozen):
        if mesh is None:
            return step(state, batch, frozen)
        _check_divides(batch, mesh.shape["data"])
        # The constraints are read while tracing, so the step needs no example state to know its placement.
        shardings = tree_shardings(state, mesh, rules)
        state = jax.lax.with_sharding_constraint(state, shardings)
        batch = jax.lax.with_sharding_constraint(batch, batch_sharding(mesh))
        state, metrics = step(state, batch, frozen)
        whole = tree_shardings(metrics, mesh)
        return jax.lax.with_sharding_constraint((state, metrics), (shardings, whole))

    compiled = jax.jit(sharded, donate_argnums=(0,) if donate else ())
    # Frozen parameters are an argument, not a closure: closed over, they would be constants inside the program.
    return lambda state, batch: compiled(state, batch, frozen)


def pmap_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float | None = None,
    frozen: Any = None,
    donate: bool = True,
) -> StepFn:
    """Runs the same step under `jax.pmap` on the local devices, for code that is built on it.

    Args:
        loss_fn: See the module's docstring.
        optimizer: An optax optimiser.
        ema_decay: As for `compile_step`.
        frozen: As for `compile_step`, not replicated.
        donate: As for `compile_step`.

    Returns:
        step(state, batch) -> (state, metrics) for a state from `replicate` and an ordinary batch [b, ...].

    Raises:
        InputError: When called with a batch that the number of local devices does not divide.
    """
    step = step_fn(loss_fn, optimizer, ema_decay=ema_decay, axis_name="data")
    mapped = jax.pmap(step, axis_name="data", donate_argnums=(0,) if donate else ())
    held = None if frozen is None else replicate(frozen)

    def run(state, batch):
        count = jax.local_device_count()
        _check_divides(batch, count)
        split = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
        state, metrics = mapped(state, split, held)
        return state, unreplicate(metrics)

    return run


def replicate(tree: Any) -> Any:
    """Gives every array a leading axis with one copy for each local device, as `pmap_step` wants its state."""
    count = jax.local_device_count()
    return jax.pmap(lambda _: tree)(jnp.arange(count))


def unreplicate(tree: Any) -> Any:
    """Takes the first of the copies that `replicate` made."""
    return jax.tree.map(lambda x: x[0], tree)


def _average(state: TrainState, params: Any, decay: float | None) -> Any:
    if decay is None:
        return state.ema_params
    if state.ema_params is None:
        raise InputError(f"ema_decay={decay} needs a state with a moving average: create_state(..., ema=True)")
    warm = (1 + state.step) / (10 + state.step)
    return optax.incremental_update(params, state.ema_params, 1 - jnp.minimum(decay, warm))


def _check_names(metrics: dict) -> None:
    taken = sorted(metrics.keys() & {"grad_norm", "finite"})
    if taken:
        raise InputError(
            f"the loss gives metrics named {', '.join(taken)}, which the training step adds itself: rename them"
        )


def _check_divides(batch: Any, count: int) -> None:
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or min(sizes) % count:
        raise InputError(f"a batch of {sorted(sizes)} examples cannot be split evenly over {count} devices")
