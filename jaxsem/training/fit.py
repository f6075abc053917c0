"""Trainings of minutes, whole on the device: the data lies in its memory, and the steps run in one compiled loop.

`jaxsem.training.train` is for trainings of hours: it reads files, logs, evaluates, saves, and resumes. A network of a few hundred
thousand parameters on features that were extracted once needs none of that, and its steps are short beside the host's part in them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsem.errors import InputError
from jaxsem.training.loop import RenewFn
from jaxsem.training.metrics import DivergedError
from jaxsem.training.optimizer import OptimizerConfig, make_optimizer
from jaxsem.training.state import create_state
from jaxsem.training.step import LossFn, step_fn

_CHUNK = 100  # steps until the host looks whether all is finite, and can be interrupted


def fit(
    loss_fn: LossFn,
    params: Any,
    arrays: Mapping[str, ArrayLike],
    optimizer: OptimizerConfig,
    steps: int,
    batch: int,
    *,
    seed: int = 0,
    ema_decay: float | None = None,
    renew_fn: RenewFn | None = None,
    renew_every: int = 100,
    frozen: Any = None,
) -> Any:
    """Trains on arrays that fit into the memory of one device; writes no files.

    Rows are drawn with repetition, so a batch may be larger than the data; a draw without would sort all rows at every step.

    Args:
        loss_fn: loss_fn(params, batch, rng) -> (loss, metrics), pure; see `jaxsem.training.step`.
        params: The parameters to start from; they are copied.
        arrays: By name, with one row for each example; a batch has the same names.
        optimizer: The optimiser's config.
        steps: At least 1.
        batch: Rows of a batch, at least 1.
        seed: Of the batches and of what the loss draws.
        ema_decay: Decay of the moving average of the parameters, in (0, 1), which is then what is returned; None for none.
        renew_fn: renew_fn(params, batch, rng) -> params, as for `jaxsem.training.train`.
        renew_every: Steps between its calls, at least 1.
        frozen: Parameters that are not trained; `loss_fn` sees them merged with the others, `renew_fn` does not.

    Returns:
        The trained parameters, on the device.

    Raises:
        InputError: Arrays of unequal lengths or without rows, or a number out of range.
        DivergedError: At the first step with an infinite or undefined loss, gradient or update.
    """
    rows = _check_rows(arrays)
    for name, value in {"steps": steps, "batch": batch, "renew_every": renew_every}.items():
        if value < 1:
            raise InputError(f"{name}={value} must be at least 1")
    if ema_decay is not None and not 0 < ema_decay < 1:
        raise InputError(f"ema_decay={ema_decay} must lie between 0 and 1, or be None")
    transform = make_optimizer(optimizer, steps)
    step = step_fn(loss_fn, transform, ema_decay=ema_decay)

    def draw(state, data):
        rng = jax.random.fold_in(jax.random.fold_in(state.rng, state.step), 1)
        drawn = jax.random.randint(rng, (batch,), 0, rows)
        return {name: array[drawn] for name, array in data.items()}

    def one(carry, data, frozen):
        state, diverged = carry  # the number of the first step that was not finite, or 0
        state, metrics = step(state, draw(state, data), frozen)
        return state, jnp.where(metrics["finite"] | (diverged > 0), diverged, state.step)

    def several(carry, data, frozen, count):
        return jax.lax.fori_loop(0, count, lambda _, carry: one(carry, data, frozen), carry)

    @jax.jit
    def renew(state, data):
        return state.replace(
            params=renew_fn(state.params, draw(state, data), jax.random.fold_in(state.rng, state.step))
        )

    state = create_state(params, transform, jax.random.key(seed), ema=ema_decay is not None)
    carry, (data, frozen) = (state, jnp.zeros_like(state.step)), jax.device_put((dict(arrays), frozen))
    advance = _one_by_one(one) if jax.default_backend() == "cpu" else jax.jit(several, donate_argnums=0)
    chunk = _CHUNK if renew_fn is None else renew_every
    for begin in range(0, steps, chunk):
        state, diverged = carry = advance(carry, data, frozen, min(chunk, steps - begin))
        if diverged:
            raise DivergedError(f"training diverged at step {int(diverged)} of {steps}: try a lower learning rate")
        if renew_fn is not None and begin + chunk <= steps:
            carry = renew(state, data), diverged
    return carry[0].eval_params


def _one_by_one(one: Callable) -> Callable:
    """Takes the steps of a chunk with a program for one of them.

    Inside a loop XLA's CPU backend computes convolutions 15 times slower (jax 0.10: PQVAE at width 512 took 1 s a step instead of
    0.06 s); on an accelerator it is the host's part between the steps that costs.
    """
    compiled = jax.jit(one, donate_argnums=0)

    def advance(carry, data, frozen, count):
        for _ in range(count):
            carry = compiled(carry, data, frozen)
        return carry

    return advance


def _check_rows(arrays: Mapping[str, ArrayLike]) -> int:
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or not min(lengths.values()):
        raise InputError(f"training needs arrays with one row for each example, not of these lengths: {lengths}")
    return min(lengths.values())
