import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax import contrib

from jaxsem.errors import InputError
from jaxsem.training import OptimizerConfig, make_optimizer, make_schedule


def rates(config, steps, at):
    schedule = make_schedule(config, steps)
    return [float(schedule(step)) for step in at]


def test_cosine_warms_up_and_ends_at_its_final_scale():
    config = OptimizerConfig(learning_rate=2.0, schedule="cosine", warmup_steps=10, final_scale=0.1)
    np.testing.assert_allclose(rates(config, 110, [0, 5, 10, 60, 110]), [0.0, 1.0, 2.0, 1.1, 0.2], atol=1e-6)


@pytest.mark.parametrize("warmup", [0, 10])
def test_steps_drop_at_fractions_of_the_whole_run(warmup):
    config = OptimizerConfig(learning_rate=1.0, schedule="steps", warmup_steps=warmup, drops=(0.5, 0.9))
    np.testing.assert_allclose(rates(config, 100, [20, 49, 51, 89, 91]), [1, 1, 0.1, 0.1, 0.01], rtol=1e-6)


def updates(config, params, grads):
    optimizer = make_optimizer(config, 10)
    return jax.tree.map(np.asarray, optimizer.update(grads, optimizer.init(params), params)[0])


def test_multiplier_scales_only_what_it_names():
    params = {"prior": {"quantiles": jnp.ones(2)}, "conv": {"kernel": jnp.ones(2)}}
    config = OptimizerConfig(learning_rate=0.1, multipliers=(("quantiles$", 10.0),))
    result = updates(config, params, params)
    # Adam's first update is the sign of the gradient.
    np.testing.assert_allclose(result["conv"]["kernel"], -0.1, rtol=1e-5)
    np.testing.assert_allclose(result["prior"]["quantiles"], -1.0, rtol=1e-5)


def test_weight_decay_spares_biases():
    params = {"kernel": jnp.ones(2), "bias": jnp.ones(2)}
    config = OptimizerConfig(name="adamw", learning_rate=0.1, weight_decay=0.5)
    result = updates(config, params, jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_allclose(result["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(result["bias"], 0.0)


def test_clipping_bounds_the_norm_over_all_parameters():
    # With b1 = b2 = 0 and a large eps Adam divides by eps, so the update keeps the length of the clipped gradient.
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    config = OptimizerConfig(learning_rate=1.0, b1=0.0, b2=0.0, eps=1e6, clip_norm=1.0)
    result = updates(config, params, {"a": jnp.array([30.0]), "b": jnp.array([40.0])})
    np.testing.assert_allclose([result["a"][0] * 1e6, result["b"][0] * 1e6], [-0.6, -0.8], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adm"}, "name is 'adm'; it must be adam, adamw or muon"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"schedule": "cosin"}, "schedule is 'cosin'"),
        ({"schedule": "steps"}, "drops is"),
        ({"schedule": "steps", "drops": (0.9, 0.5)}, "increasing"),
        ({"weight_decay": 0.1}, "0 unless name is adamw"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
    ],
)
def test_config_refuses_what_means_nothing(options, message):
    with pytest.raises(InputError, match=message):
        OptimizerConfig(**options)


def test_warmup_must_end_before_the_training():
    with pytest.raises(InputError, match=r"warmup_steps=10 .* 10 training steps"):
        make_schedule(OptimizerConfig(warmup_steps=10), 10)


def test_multiplier_that_matches_nothing_is_an_error():
    optimizer = make_optimizer(OptimizerConfig(multipliers=(("quantile_s", 2.0),)), 10)
    with pytest.raises(InputError, match="'quantile_s' matches no parameter"):
        optimizer.init({"kernel": jnp.ones(2)})


def test_the_trapezoid_stays_up_and_then_falls():
    config = OptimizerConfig(learning_rate=2.0, schedule="trapezoid", warmup_steps=10, decay_start=0.5, final_scale=0.1)
    expected = [1.0, 2.0, 2.0, 2 * (0.1 + 0.9 * 0.5), 0.2]
    np.testing.assert_allclose(rates(config, 100, [5, 10, 50, 62.5, 100]), expected, atol=1e-6)


def test_muon_makes_the_update_of_a_kernel_nearly_orthogonal():
    gradient = jax.random.normal(jax.random.key(0), (3, 3, 8, 16)) * jnp.geomspace(1e-3, 1.0, 16)
    result = updates(OptimizerConfig(name="muon", learning_rate=0.1), {"kernel": gradient}, {"kernel": gradient})
    values = np.linalg.svd(result["kernel"].reshape(72, 16), compute_uv=False)
    before = np.linalg.svd(np.asarray(gradient).reshape(72, 16), compute_uv=False)
    assert before.max() / before.min() > 500
    assert values.max() / values.min() < 5
    # Of the size of Adam's updates: 0.2 on average, times the learning rate.
    assert 0.1 < np.sqrt(np.mean(np.square(result["kernel"]))) / 0.02 < 1.5


def test_muon_on_stacked_kernels_is_muon_on_each():
    config = OptimizerConfig(name="muon", learning_rate=0.1, clip_norm=None)
    # Two that go together, one that is their transpose, a square and a tall matrix, and one without any gradient at first.
    shapes = {"a": (3, 3, 4, 8), "b": (36, 8), "c": (8, 36), "d": (8, 8), "e": (5, 5, 3, 2), "f": (36, 8)}
    params = {name: {"kernel": jnp.zeros(shape)} for name, shape in shapes.items()}

    def alone(leaf):
        dimensions = contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), (leaf.ndim - 1,))
        return contrib.muon(
            0.1, ns_steps=3, preconditioning="aol", consistent_rms=0.2, muon_weight_dimension_numbers=dimensions
        )

    together = make_optimizer(config, 10)
    state = together.init(params)
    each = {name: alone(params[name]["kernel"]) for name in shapes}
    states = {name: each[name].init(params[name]["kernel"]) for name in shapes}
    rng = np.random.default_rng(0)
    for step in range(3):
        grads = {
            name: {"kernel": jnp.asarray(rng.normal(size=shape) * (step > 0 or name != "f"), jnp.float32)}
            for name, shape in shapes.items()
        }
        result, state = together.update(grads, state, params)
        for name in shapes:
            gradient = grads[name]["kernel"]
            expected, states[name] = each[name].update(gradient, states[name], params[name]["kernel"])
            assert jnp.abs(expected).max() > 1e-3 or (step == 0 and name == "f")
            np.testing.assert_allclose(result[name]["kernel"], expected, rtol=1e-5, atol=1e-7)


def test_muon_leaves_biases_and_gains_to_adam():
    params = {"bias": jnp.ones(4), "gain": {"forward": jnp.ones((2, 3))}, "kernel": jnp.ones((2, 2))}
    result = updates(OptimizerConfig(name="muon", learning_rate=0.1), params, params)
    # Adam divides by each entry's own size; Muon would share one norm among the entries of a matrix.
    params = {"bias": jnp.ones(4), "gain": {"forward": jnp.diag(jnp.array([1e-3, 10.0]))}, "kernel": jnp.ones((2, 2))}
    small = updates(OptimizerConfig(name="muon", learning_rate=0.1), params, params)["gain"]["forward"]
    np.testing.assert_allclose(np.diag(small), result["bias"][:2], rtol=1e-3)  # eps, after clipping
    assert (result["bias"] < -0.05).all()
