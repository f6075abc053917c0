"""The codec of autoencoder latents whose scales a weight map opens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsem import slices
from jaxsem.calibration import calibrate_module, exact_variables
from jaxsem.codecs.hsvlc import Frame, Hsvlc, HsvlcConfig, lambda_of
from jaxsem.entropy import rans
from jaxsem.entropy.tables import gaussian_tables
from jaxsem.errors import InputError

CONFIG = HsvlcConfig(width=8, channels=(3, 4, 5, 6), condition=4, hidden=8, prior=8)
MODULE = Hsvlc(CONFIG)


@pytest.fixture(scope="module")
def params():
    z, weight = jnp.zeros((1, 16, 16, 4)), jnp.zeros((1, 2, 2))
    return jax.jit(MODULE.init)(jax.random.key(0), z, weight)["params"]


def apply(params, *args, **kwargs):
    return MODULE.apply({"params": params}, *args, **kwargs)


def latents(batch=1, rows=32, columns=16):
    return jax.random.normal(jax.random.key(1), (batch, rows, columns, 4))


def test_every_scale_halves_the_grid(params):
    outputs = apply(params, latents(2), jnp.ones((2, 4, 2)))
    shapes = [outputs[f"f_{i}"].shape for i in range(4)]
    assert shapes == [(2, 16, 8, 3), (2, 8, 4, 4), (2, 4, 2, 5), (2, 2, 1, 6)]
    assert outputs["z_hat"].shape == (2, 32, 16, 4)
    assert outputs["bits"].shape == (2, 4)


@pytest.mark.parametrize(("level", "scales"), [(0.0, 1), (0.5, 1), (0.6, 2), (0.75, 2), (0.8, 3), (0.875, 3), (1.0, 4)])
def test_the_map_opens_finer_scales_above_their_boundaries(params, level, scales):
    bits = apply(params, latents(), jnp.full((1, 4, 2), level))["bits"][0]
    assert (np.flatnonzero(bits) == np.arange(4 - scales, 4)).all()


def test_only_the_marked_region_gets_the_finest_scale(params):
    weight = np.zeros((1, 4, 2), np.float32)
    weight[0, 1, 0] = 1.0
    opened = [np.asarray(MODULE.is_open(scale, weight)) for scale in range(4)]
    assert opened[0][0, 4:8, 0:4].all()
    assert [each.sum() for each in opened] == [16, 4, 1, 2]
    values = apply(params, latents(), weight)["f_0"]
    # Outside there is the prior's mean, whatever the latent is.
    other = apply(params, latents().at[:, :8].mul(3.0), weight)["f_0"]
    assert np.isfinite(values).all()
    assert values.shape == other.shape


def test_the_largest_weight_decides_for_a_coarse_position():
    weight = np.zeros((1, 4, 2), np.float32)
    weight[0, 3, 1] = 0.6
    module = Hsvlc(HsvlcConfig(map_stride=2))
    opened = module.is_open(2, np.pad(weight, ((0, 0), (0, 0), (0, 2))))  # a position covers 4 x 4 cells
    assert opened.shape == (1, 1, 1, 1)
    assert opened.all()


def test_the_slices_decode_what_the_forward_pass_gives(params):
    weight = np.random.default_rng(0).integers(0, 8, (1, 4, 2)).astype(np.float32) / 7
    z, grid, frames = latents(), (2, 1), [Frame(32, 16, weight[0])]
    outputs = apply(params, z, weight)
    found = apply(params, z, weight, method="analyze")
    coded, bits, _ = slices.code(MODULE, {"params": params}, found, grid, weight, frames, MODULE.slices)
    np.testing.assert_allclose(bits, outputs["bits"].sum(axis=1), rtol=1e-4)
    parts = iter([slices.flattened(*(np.asarray(part)[0] for part in each)) for each in coded])

    def pull(k, table):
        symbols, tables = next(parts)
        np.testing.assert_array_equal(tables, table)
        return symbols

    state = slices.decode(MODULE, {"params": params}, grid, weight, frames, pull, 1, MODULE.slices)
    for i in range(4):
        np.testing.assert_allclose(state[f"f_{i}"], outputs[f"f_{i}"], atol=1e-5)
    decoded = apply(params, {f"f_{i}": state[f"f_{i}"] for i in range(4)}, weight, method="synthesize")
    np.testing.assert_allclose(decoded, outputs["z_hat"], atol=1e-5)


@pytest.fixture(scope="module")
def exact(params):
    """Variables of the priors in exact arithmetic, and the tables that fit."""
    rng = np.random.default_rng(0)
    maps = [rng.integers(0, 8, (1, 4, 2)).astype(np.float32) / 7 for _ in range(3)]
    samples = [(apply(params, 9.0 * latents(), weight, method="analyze"), weight) for weight in maps]
    grids, tables = calibrate_module("toy", MODULE, params, gaussian_tables(), samples)
    return exact_variables(jax.device_get(params), grids), tables, samples


def test_exact_priors_do_not_depend_on_the_batch(exact):
    variables, _, samples = exact
    weight = np.concatenate([weight for _, weight in samples])
    together = jax.tree.map(lambda *each: jnp.concatenate(each), *[found for found, _ in samples])
    frames = [Frame(32, 16, each) for each in weight]
    coded, _, _ = slices.code(MODULE, variables, together, (2, 1), weight, frames, 4)
    for k, (found, one) in enumerate(samples):
        alone, _, _ = slices.code(MODULE, variables, found, (2, 1), one, frames[k : k + 1], 4)
        for whole, part in zip(coded, alone, strict=True):
            for several, single in zip(whole, part, strict=True):
                np.testing.assert_array_equal(np.asarray(several)[k], np.asarray(single)[0])


def test_calibrated_tables_code_what_is_open_and_nothing_else(exact):
    variables, tables, samples = exact
    found, weight = samples[0]
    coded, bits, _ = slices.code(MODULE, variables, found, (2, 1), weight, [Frame(32, 16, weight[0])], 4)
    encoder = rans.Encoder(tables)
    for each in coded:
        encoder.push(*slices.flattened(*(np.asarray(part)[0] for part in each)))
    assert 8 * len(encoder.finish()) < 1.05 * float(bits[0]) + 64


def test_padding_is_not_coded():
    frame = Frame(17, 8, np.ones((4, 2), np.float32))
    sizes = [MODULE.inside(i, (2, 1), frame)[0, :, :, 0].sum() for i in range(4)]
    assert sizes == [2 * 1, 3 * 1, 5 * 2, 9 * 4]


def test_finer_scales_are_predicted_from_coarser_ones(params):
    weight = jnp.ones((1, 4, 2))
    state = apply(params, 1, (2, 1), weight, method="begin")
    means = []
    for value in (0.0, 5.0):
        after = apply(params, 0, state, jnp.full((1, 2, 1, 6), value), method="place")
        means.append(apply(params, 1, after, method="predict")[1])
    assert np.abs(means[0] - means[1]).max() > 1e-3


def test_all_parts_get_gradients(params):
    def loss(params):
        outputs = apply(params, latents(), jnp.ones((1, 4, 2)), jax.random.key(2))
        return jnp.square(outputs["z_hat"] - latents()).mean() + outputs["bits"].mean()

    gradients = jax.tree.map(lambda g: float(np.abs(g).max()), jax.jit(jax.grad(loss))(params))
    assert all(value > 0 for value in jax.tree.leaves(gradients))


def test_one_scale_is_coded_everywhere():
    module = Hsvlc(HsvlcConfig(width=8, channels=(3,), boundaries=(), condition=4, hidden=8, prior=8))
    z, weight = latents(), jnp.zeros((1, 4, 2))
    params = jax.jit(module.init)(jax.random.key(0), z, weight)["params"]
    outputs = module.apply({"params": params}, z, weight)
    assert (outputs["f_0"].shape, outputs["bits"].shape) == ((1, 16, 8, 3), (1, 1))
    assert outputs["bits"] > 0


def test_the_weight_of_the_distortion_is_the_papers():
    np.testing.assert_allclose(
        lambda_of(jnp.array([0, 0.25, 0.5, 0.75, 1])), [0.01, 0.0575, 0.331, 1.906, 10.97], rtol=2e-3
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": ()}, "without scales"),
        ({"width": 0}, "size below 1"),
        ({"boundaries": (0.5, 0.75, 0.875)}, "falling between 1 and 0"),
        ({"boundaries": (0.5,)}, "one less than scales"),
        ({"map_stride": 3}, "power of two"),
        ({"scale_rule": "far"}, "rule for scales"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        HsvlcConfig(**changes)
