import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from toy import assert_trees_equal, init_params, loss_fn, make_batch, noisy_loss_fn

from jaxsem.errors import InputError
from jaxsem.training import (
    OptimizerConfig,
    batch_sharding,
    compile_step,
    create_state,
    make_mesh,
    make_optimizer,
    merge_params,
    pmap_step,
    replicate,
    split_params,
    step_fn,
    tree_shardings,
    unreplicate,
)

RULES = ((r"encoder/kernel$", P(None, "model")), (r"decoder/kernel$", P("model")))


def optimizer():
    return make_optimizer(OptimizerConfig(learning_rate=1e-2, schedule="cosine", clip_norm=0.5), steps=20)


def run(step, state, steps=5):
    for index in range(steps):
        state, metrics = step(state, make_batch(index))
    return state, metrics


@pytest.fixture(scope="module")
def single():
    """Five steps on one device: what every other way of running must give."""
    state = create_state(init_params(), optimizer(), jax.random.key(0), ema=True)
    return run(compile_step(loss_fn, optimizer(), ema_decay=0.99), state)


@pytest.mark.parametrize(("data", "model", "rules"), [(8, 1, ()), (4, 2, RULES), (2, 4, RULES)])
def test_mesh_gives_the_update_of_one_device(single, data, model, rules):
    mesh = make_mesh(data, model)
    state = create_state(init_params(), optimizer(), jax.random.key(0), ema=True, mesh=mesh, rules=rules)
    state, metrics = run(compile_step(loss_fn, optimizer(), mesh, ema_decay=0.99, rules=rules), state)
    assert_trees_equal(state.params, single[0].params, atol=1e-6)
    assert_trees_equal(state.ema_params, single[0].ema_params, atol=1e-6)
    assert_trees_equal(metrics, single[1], atol=1e-6)


def test_pmap_gives_the_update_of_one_device(single):
    state = create_state(init_params(), optimizer(), jax.random.key(0), ema=True)
    state, metrics = run(pmap_step(loss_fn, optimizer(), ema_decay=0.99), replicate(state))
    assert_trees_equal(unreplicate(state).params, single[0].params, atol=1e-6)
    assert_trees_equal(metrics, single[1], atol=1e-6)


def test_pmap_devices_draw_different_noise():
    def loss(params, batch, rng):
        return jnp.sum(params["x"] ** 2), {"noise": jax.random.uniform(rng)}

    def mean_of_draws(key):
        key = jax.random.fold_in(key, 0)
        return np.mean([jax.random.uniform(jax.random.fold_in(key, i)) for i in range(jax.local_device_count())])

    state = create_state({"x": jnp.ones(3)}, optimizer(), jax.random.key(3))
    _, metrics = pmap_step(loss, optimizer())(replicate(state), make_batch())
    np.testing.assert_allclose(metrics["noise"], mean_of_draws(jax.random.key(3)), atol=1e-6)


def test_pmap_keeps_frozen_parameters_out_of_the_state():
    trainable, frozen = split_params(init_params(), ["encoder"])
    state = replicate(create_state(trainable, optimizer(), jax.random.key(0)))
    state, metrics = pmap_step(loss_fn, optimizer(), frozen=frozen)(state, make_batch())
    assert metrics["loss"] > 0
    assert set(state.params) == {"decoder"}


def test_state_stays_where_the_rules_put_it():
    mesh = make_mesh(4, 2)
    state = create_state(init_params(), optimizer(), jax.random.key(0), mesh=mesh, rules=RULES)
    state, _ = run(compile_step(loss_fn, optimizer(), mesh, rules=RULES), state)
    moments = optax.tree_utils.tree_get(state.opt_state, "mu")
    for tree in (state.params, moments):
        assert tree["encoder"]["kernel"].sharding.shard_shape((12, 16)) == (12, 8)
        assert tree["decoder"]["kernel"].sharding.shard_shape((16, 12)) == (8, 12)
        assert tree["encoder"]["bias"].sharding.is_fully_replicated


def test_step_compiles_once():
    traces = []

    def counted(params, batch, rng):
        traces.append(1)
        return loss_fn(params, batch, rng)

    mesh = make_mesh()
    state = create_state(init_params(), optimizer(), jax.random.key(0), mesh=mesh)
    step = compile_step(counted, optimizer(), mesh)
    for index in range(3):
        state, _ = step(state, jax.device_put(make_batch(index), batch_sharding(mesh)))
    assert len(traces) == 1


def test_each_step_draws_new_noise():
    state = create_state(init_params(), optax.sgd(0.0), jax.random.key(0))
    step = compile_step(noisy_loss_fn, optax.sgd(0.0))
    losses = []
    for _ in range(3):
        state, metrics = step(state, make_batch())
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3


def test_callers_parameters_survive_donation():
    params = init_params()
    state = create_state(params, optimizer(), jax.random.key(0))
    run(compile_step(loss_fn, optimizer()), state, steps=1)
    assert state.params["encoder"]["kernel"].is_deleted()
    assert_trees_equal(params, init_params())


def test_frozen_parameters_have_no_gradient_and_no_moments():
    trainable, frozen = split_params(init_params(), ["encoder"])
    state = create_state(trainable, optimizer(), jax.random.key(0))
    state, metrics = run(compile_step(loss_fn, optimizer(), frozen=frozen), state)
    assert set(state.params) == {"decoder"}
    assert set(optax.tree_utils.tree_get(state.opt_state, "mu")) == {"decoder"}
    assert_trees_equal(frozen["encoder"], init_params()["encoder"])
    assert metrics["grad_norm"] > 0


def test_split_and_merge_are_inverse():
    params = init_params()
    trainable, frozen = split_params(params, [r"kernel$"])
    assert trainable.keys() == {"encoder"}
    assert frozen.keys() == {"encoder", "decoder"}
    assert_trees_equal(merge_params(trainable, frozen), params)


def test_finite_flag_falls_with_a_bad_gradient():
    def loss(params, batch, rng):
        return jnp.sum(jnp.sqrt(params["x"])), {}  # at 0 the value is 0 and the gradient infinite

    state = create_state({"x": jnp.zeros(2)}, optax.sgd(0.1), jax.random.key(0))
    _, metrics = jax.jit(step_fn(loss, optax.sgd(0.1)))(state, make_batch())
    assert metrics["loss"] == 0
    assert not metrics["finite"]


def test_moving_average_warms_up_then_follows_the_decay():
    state = create_state({"x": jnp.ones(())}, optax.sgd(1.0), jax.random.key(0), ema=True)
    step = jax.jit(step_fn(lambda params, batch, rng: (params["x"], {}), optax.sgd(1.0), ema_decay=0.15))
    state, _ = step(state, make_batch())  # decay min(0.15, 1/10): 0.1 * 1 + 0.9 * 0
    np.testing.assert_allclose(state.ema_params["x"], 0.1, atol=1e-7)
    state, _ = step(state, make_batch())  # decay min(0.15, 2/11): 0.15 * 0.1 + 0.85 * -1
    np.testing.assert_allclose(state.ema_params["x"], -0.835, atol=1e-7)


def test_average_without_a_place_for_it_is_an_error():
    state = create_state(init_params(), optimizer(), jax.random.key(0))
    with pytest.raises(InputError, match="ema=True"):
        compile_step(loss_fn, optimizer(), ema_decay=0.9)(state, make_batch())


def test_indivisible_batch_names_both_numbers():
    mesh = make_mesh()
    state = create_state(init_params(), optimizer(), jax.random.key(0), mesh=mesh)
    with pytest.raises(InputError, match=r"\[12\].* 8 devices"):
        compile_step(loss_fn, optimizer(), mesh)(state, make_batch(size=12))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (((r"encodr", P("model")),), "decide no array: encodr"),
        (((r"bias$", P(None, "model")),), r"names 2 axes, but encoder/bias has shape \(16,\)"),
        (((r"encoder/kernel$", P("data")),), "splits an axis of 12 in encoder/kernel over 8 devices"),
        (((r"bias$", P("modell")),), "names mesh axis 'modell'; there are data, model"),
    ],
)
def test_rules_that_do_not_fit_are_errors(rules, message):
    with pytest.raises(InputError, match=message):
        tree_shardings(init_params(), make_mesh(), rules)


def test_mesh_must_use_all_devices():
    with pytest.raises(InputError, match=r"data=3 by model=2 .* 8 devices"):
        make_mesh(3, 2)


def test_metrics_may_not_take_the_names_of_the_step():
    state = create_state({"x": jnp.ones(())}, optax.sgd(1.0), jax.random.key(0))
    with pytest.raises(InputError, match="grad_norm"):
        step_fn(lambda params, batch, rng: (params["x"], {"grad_norm": 0.0}), optax.sgd(1.0))(state, make_batch())


def test_pattern_that_freezes_nothing_is_an_error():
    with pytest.raises(InputError, match="'vision' freezes nothing"):
        split_params(init_params(), ["vision"])
