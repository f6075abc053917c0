import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from toy import assert_trees_equal, init_params, loss_fn, make_batch

from jaxsem.errors import FormatError, InputError, WeightsError
from jaxsem.training import (
    Checkpoints,
    OptimizerConfig,
    compile_step,
    create_state,
    load_best,
    make_mesh,
    make_optimizer,
)
from jaxsem.training.checkpoint import save_best

RULES = ((r"encoder/kernel$", P(None, "model")),)
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2), steps=20)


def new_state(seed=0, **options):
    return create_state(init_params(seed), OPTIMIZER, jax.random.key(seed), ema=True, **options)


def without_key(state):
    return state.replace(rng=jax.random.key_data(state.rng))


def test_state_comes_back_bit_for_bit(tmp_path):
    state, _ = compile_step(loss_fn, OPTIMIZER, ema_decay=0.9)(new_state(), make_batch())
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {"batches": 1}, {"width": 16})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
        assert checkpoints.config(1) == {"width": 16}
        again, position = checkpoints.restore(new_state(seed=1), 1)
    assert position == {"batches": 1}
    assert_trees_equal(without_key(again), without_key(state))


def test_restores_into_another_sharding(tmp_path):
    state = new_state()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, None, {})
    like = new_state(seed=1, mesh=make_mesh(2, 4), rules=RULES)
    with Checkpoints(tmp_path) as checkpoints:
        again, _ = checkpoints.restore(like, 0)
    assert again.params["encoder"]["kernel"].sharding.shard_shape((12, 16)) == (12, 4)
    assert_trees_equal(without_key(again), without_key(state))


def test_saved_state_is_not_touched_by_the_steps_that_follow(tmp_path):
    # The step overwrites the buffers of its state while the checkpoint is written in the background.
    def grow(params, batch, rng):
        return -sum(jnp.sum(x) for x in jax.tree.leaves(params)), {}

    optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0), steps=20)
    state = create_state({"x": jnp.zeros((500, 500))}, optimizer, jax.random.key(0))
    step = compile_step(grow, optimizer)
    state, _ = step(state, make_batch())
    saved = np.array(jnp.copy(state.params["x"]))  # of a copy: a NumPy view of the buffer would keep it from donation
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, None, {})
        for _ in range(10):
            state, _ = step(state, make_batch())
    with Checkpoints(tmp_path) as checkpoints:
        again, _ = checkpoints.restore(state, 1)
    assert saved.max() > 0
    np.testing.assert_array_equal(again.params["x"], saved)


def test_only_the_newest_are_kept(tmp_path):
    state = new_state()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(state.replace(step=jnp.int32(step)), None, {})
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == ["2", "3"]


def test_another_model_is_told_what_differs(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(new_state(), None, {})
    params = init_params()
    params["encoder"] = {"kernel": jnp.zeros((12, 8)), "scale": jnp.zeros(8)}
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(InputError) as error:
        checkpoints.restore(create_state(params, OPTIMIZER, jax.random.key(0), ema=True), 0)
    message = str(error.value)
    assert "missing " in message
    assert "params/encoder/scale" in message
    assert "surplus " in message
    assert "params/encoder/bias" in message
    assert "params/encoder/kernel is float32 (12, 16), the model has float32 (12, 8)" in message


def test_damaged_checkpoint_is_named(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(new_state(), None, {})
    for path in (tmp_path / "0" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"\0" * 16)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(FormatError, match="delete that folder"):
        checkpoints.restore(new_state(), 0)


def test_best_parameters_keep_bfloat16_and_info(tmp_path):
    params = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "b": jnp.ones(3, jnp.bfloat16)}
    save_best(tmp_path / "best.safetensors", params, {"step": 3})
    again, info = load_best(tmp_path)
    assert info == {"step": 3}
    assert again["b"].dtype == jnp.bfloat16
    assert_trees_equal(again, params)


def test_missing_or_damaged_best_is_an_error(tmp_path):
    with pytest.raises(WeightsError, match="does not exist"):
        load_best(tmp_path)
    (tmp_path / "best.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_best(tmp_path)
