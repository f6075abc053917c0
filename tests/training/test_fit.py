"""Training on arrays in memory: what it computes, on both ways through the steps, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import assert_trees_equal

from jaxsem.errors import InputError
from jaxsem.training import DivergedError, OptimizerConfig
from jaxsem.training import fit as fit_module
from jaxsem.training.fit import fit

RATE = 0.125
CONSTANT = OptimizerConfig(learning_rate=RATE, clip_norm=None)
ROWS = {"x": np.random.RandomState(0).standard_normal((40, 3)).astype(np.float32)}


def falling(params, batch, rng):
    """A gradient of 1 everywhere: every step of Adam takes `RATE` away."""
    del batch, rng
    return params["a"].sum(), {}


def regression(params, batch, rng):
    del rng
    error = jnp.square(batch["x"] @ params["w"] - batch["x"].sum(1)).mean()
    return error, {"error": error}


@pytest.fixture(params=["cpu", "accelerator"])
def backend(request, monkeypatch):
    """Steps as programs of their own, or as one loop."""
    monkeypatch.setattr(fit_module.jax, "default_backend", lambda: request.param)


@pytest.mark.parametrize("steps", [1, 7, 100, 205])
def test_it_takes_as_many_steps_as_asked_for(backend, steps):
    found = fit(falling, {"a": jnp.zeros(2)}, ROWS, CONSTANT, steps, 4)
    np.testing.assert_allclose(found["a"], -RATE * steps, rtol=1e-4)


def test_it_finds_the_solution_of_a_regression(backend):
    optimizer = OptimizerConfig(learning_rate=0.1, schedule="cosine")
    found = fit(regression, {"w": jnp.zeros(3)}, ROWS, optimizer, 300, 16)
    np.testing.assert_allclose(found["w"], 1, atol=1e-3)


def test_both_ways_through_the_steps_give_the_same(monkeypatch):
    found = []
    for name in ("cpu", "accelerator"):
        monkeypatch.setattr(fit_module.jax, "default_backend", lambda name=name: name)
        found.append(
            fit(regression, {"w": jnp.zeros(3)}, ROWS, CONSTANT, 30, 8, ema_decay=0.9, renew_fn=shaken, renew_every=7)
        )
    assert_trees_equal(*found, atol=1e-6)


def shaken(params, batch, rng):
    """Depends on all that `renew_fn` is given."""
    return {"w": params["w"] + 0.1 * jax.random.normal(rng, (3,)) * batch["x"].mean(0)}


def test_the_seed_decides_everything():
    def run(seed):
        return fit(regression, {"w": jnp.zeros(3)}, ROWS, CONSTANT, 5, 8, seed=seed, renew_fn=shaken, renew_every=2)

    assert_trees_equal(run(3), run(3))
    assert not np.array_equal(run(3)["w"], run(4)["w"])


def test_a_batch_holds_the_same_rows_of_all_arrays():
    arrays = {"row": np.arange(40), "again": np.arange(40)}

    def loss_fn(params, batch, rng):
        del rng
        # Adam moves what has a gradient: the rows of the batch, or those where the two arrays are not the same.
        here = jnp.where(
            batch["row"] == batch["again"], params["together"][batch["row"]], params["apart"][batch["row"]]
        )
        return here.sum(), {}

    start = {"together": jnp.zeros(40), "apart": jnp.zeros(40)}
    one, many = (fit(loss_fn, start, arrays, CONSTANT, steps, 8) for steps in (1, 60))
    assert 2 <= (one["together"] < 0).sum() <= 8
    assert (many["together"] < 0).all()
    assert (many["apart"] == 0).all()


def test_a_batch_may_be_larger_than_the_data():
    found = fit(regression, {"w": jnp.zeros(3)}, {"x": ROWS["x"][:2]}, CONSTANT, 2, 64)
    assert np.isfinite(found["w"]).all()


def test_the_moving_average_is_returned():
    found = fit(falling, {"a": jnp.zeros(1)}, ROWS, CONSTANT, 4, 4, ema_decay=0.15)
    expected = 0.0
    for step in range(4):
        decay = min(0.15, (1 + step) / (10 + step))
        expected = decay * expected - (1 - decay) * RATE * (step + 1)
    np.testing.assert_allclose(found["a"], expected, rtol=1e-4)


@pytest.mark.parametrize(("steps", "times"), [(2, 0), (3, 1), (11, 3)])
def test_renewal_comes_after_every_so_many_steps(backend, steps, times):
    def renew_fn(params, batch, rng):
        return {"a": params["a"] + 100}

    found = fit(falling, {"a": jnp.zeros(1)}, ROWS, CONSTANT, steps, 4, renew_fn=renew_fn, renew_every=3)
    np.testing.assert_allclose(found["a"], 100 * times - RATE * steps, rtol=1e-4)


def test_frozen_parameters_are_seen_and_stay():
    def loss_fn(params, batch, rng):
        return jnp.square(params["part"]["a"] - params["part"]["goal"]).sum(), {}

    start, frozen = {"part": {"a": jnp.zeros(2)}}, {"part": {"goal": np.full(2, 3.0, np.float32)}}
    found = fit(loss_fn, start, ROWS, OptimizerConfig(learning_rate=0.3, schedule="cosine"), 200, 4, frozen=frozen)
    assert list(found["part"]) == ["a"]
    np.testing.assert_allclose(found["part"]["a"], 3, atol=1e-2)


def test_the_parameters_given_stay_usable():
    start = {"a": jnp.zeros(2)}
    fit(falling, start, ROWS, CONSTANT, 3, 4)
    np.testing.assert_array_equal(start["a"], 0)


def test_a_loss_that_is_not_finite_names_its_step(backend):
    def loss_fn(params, batch, rng):
        # 1, then 1 - RATE, ...: after eight steps it is not above 1e-3 any more.
        return params["a"].sum() * jnp.where(params["a"][0] > 1e-3, 1, jnp.nan), {}

    with pytest.raises(DivergedError, match="at step 9 of 150: try a lower learning rate"):
        fit(loss_fn, {"a": jnp.ones(1)}, ROWS, CONSTANT, 150, 4)


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"x": np.zeros((3, 1)), "y": np.zeros((2, 1))}, {}, "{'x': 3, 'y': 2}"),
        ({"x": np.zeros((0, 1))}, {}, "{'x': 0}"),
        ({}, {}, "one row for each example"),
        (ROWS, {"steps": 0}, "steps=0 must be at least 1"),
        (ROWS, {"batch": 0}, "batch=0"),
        (ROWS, {"renew_every": 0}, "renew_every=0"),
        (ROWS, {"ema_decay": 1.0}, "ema_decay=1.0 must lie between 0 and 1"),
    ],
)
def test_what_cannot_be_is_refused(arrays, options, message):
    with pytest.raises(InputError, match=message):
        fit(
            **{
                "loss_fn": falling,
                "params": {},
                "arrays": arrays,
                "optimizer": CONSTANT,
                "steps": 1,
                "batch": 1,
                **options,
            }
        )
