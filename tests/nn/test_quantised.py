"""Layers with int8 weights: how far they are from the float ones, and what their parameters look like."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxsem.errors import InputError
from jaxsem.nn.quantised import Dense, channel_scales, quantise, quantise_kernels

RANDOM = np.random.RandomState(0)
# Channels of very unequal size, which one scale for all could not serve.
KERNEL = (RANDOM.standard_normal((24, 7)) * 10.0 ** np.arange(-3, 4)).astype(np.float32)
INPUTS = RANDOM.standard_normal((3, 5, 24)).astype(np.float32)


@pytest.mark.parametrize(
    "kernel", [KERNEL, jnp.asarray(KERNEL), KERNEL.astype(ml_dtypes.bfloat16)], ids=["np", "jnp", "bf16"]
)
def test_no_weight_moves_by_more_than_half_a_scale(kernel):
    values, scale = quantise(kernel)
    assert (values.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, (7,))
    assert np.abs(values.astype(int)).max(axis=0).tolist() == [127] * 7
    moved = np.abs(np.asarray(values, np.float64) * np.float64(scale) - np.asarray(kernel, np.float64))
    assert (moved <= 0.5001 * np.asarray(scale)).all()
    np.testing.assert_allclose(scale, np.abs(np.asarray(kernel, np.float32)).max(axis=0) / 127, rtol=1e-6)


def test_a_stack_is_its_kernels_one_by_one():
    stack = np.stack([KERNEL, 3 * KERNEL[::-1]])[None]
    values, scales = quantise(stack)
    assert (values.shape, scales.shape) == ((1, 2, 24, 7), (1, 2, 7))
    for i in range(2):
        one = quantise(stack[0, i])
        np.testing.assert_array_equal(values[0, i], one[0])
        np.testing.assert_array_equal(scales[0, i], one[1])
    device = quantise(jnp.asarray(stack))
    np.testing.assert_allclose(device[1], scales, rtol=1e-6)
    assert isinstance(device[0], jax.Array)
    assert np.abs(np.asarray(device[0], int) - values).max() <= 1  # halves may round either way


def test_a_channel_of_zeros_stays_one():
    values, scale = quantise(np.zeros((4, 2), np.float32))
    assert not values.any()
    assert (scale > 0).all()


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (np.zeros(3, np.float32), r"float kernels \[\.\.\., in, out\], not float32 \(3,\)"),
        (np.zeros((2, 3), np.int8), r"not int8 \(2, 3\)"),
        (np.array([[1, np.nan]], np.float32), "holds inf or NaN"),
        (np.array([[[1, -np.inf]]], np.float32), "holds inf or NaN"),
    ],
)
def test_kernels_that_cannot_be_quantised_are_refused(kernel, message):
    with pytest.raises(InputError, match=message):
        quantise(kernel)
    with pytest.raises(InputError, match=message):
        channel_scales(kernel)


@pytest.mark.parametrize("bias", [False, True])
def test_float_weights_are_those_of_flax(bias):
    ours, theirs = Dense(7, bias), nn.Dense(7, bias)
    params = ours.init(jax.random.key(1), INPUTS)
    jax.tree.map(np.testing.assert_array_equal, params, theirs.init(jax.random.key(1), INPUTS))
    np.testing.assert_array_equal(ours.apply(params, INPUTS), theirs.apply(params, INPUTS))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_weights_give_the_product_with_what_they_stand_for(dtype):
    params = {"kernel": KERNEL, "bias": np.arange(7, dtype=np.float32)}
    quantised = quantise_kernels(params)
    found = Dense(7, dtype=dtype, weights="int8").apply({"params": quantised}, INPUTS)
    assert found.dtype == dtype
    scale = quantised["scale"].astype(np.float64)
    inputs = INPUTS.astype(dtype).astype(np.float64)
    want = inputs @ (quantised["kernel"] * scale) + params["bias"]
    size = np.abs(inputs) @ np.abs(KERNEL) + params["bias"]
    # Rounding, of the result alone: once after the scale, once after the bias.
    error = np.abs(np.asarray(found, np.float64) - want)
    assert (error <= size * (2**-7 if dtype == "bfloat16" else 1e-6)).all()
    # And never further from the float layer than half a scale for each input.
    bound = np.abs(inputs).sum(axis=-1, keepdims=True) * scale / 2
    exact = inputs @ KERNEL.astype(np.float64) + params["bias"]
    assert (np.abs(want - exact) <= 1.001 * bound).all()
    assert (np.abs(want - exact) > 0.01 * bound).any()  # it is quantised


def test_fresh_int8_parameters_are_quantised_fresh_ones():
    layer = Dense(64, weights="int8", kernel_init=nn.initializers.normal(0.5))
    params = layer.init(jax.random.key(0), jnp.zeros((1, 256)))["params"]
    assert {name: (leaf.dtype, leaf.shape) for name, leaf in params.items()} == {
        "kernel": (jnp.int8, (256, 64)),
        "scale": (jnp.float32, (64,)),
        "bias": (jnp.float32, (64,)),
    }
    assert abs(float(jnp.std(params["kernel"] * params["scale"])) - 0.5) < 0.02
    assert np.abs(params["kernel"]).max(axis=0).tolist() == [127] * 64


def test_gradients_reach_the_input():
    layer, params = Dense(7, weights="int8", use_bias=False), quantise_kernels({"kernel": KERNEL})
    found = jax.grad(lambda x: layer.apply({"params": params}, x).sum())(INPUTS)
    want = (params["kernel"] * params["scale"]).sum(axis=1)
    np.testing.assert_allclose(found, np.broadcast_to(want, found.shape), rtol=1e-5)


def test_only_kernels_change():
    tree = {"norm": {"scale": np.ones(3)}, "mlp": {"up": {"kernel": KERNEL}}}
    found = quantise_kernels(tree)
    assert found["norm"]["scale"] is tree["norm"]["scale"]
    assert found["mlp"]["up"]["kernel"].dtype == np.int8
    assert tree["mlp"]["up"].keys() == {"kernel"}  # the given tree is as it was
    with pytest.raises(InputError, match="int8 already"):
        quantise_kernels(found)


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="no 'int4' weights; there are float, int8"):
        Dense(7, weights="int4").init(jax.random.key(0), INPUTS)
    short = quantise_kernels({"kernel": KERNEL}) | {"scale": np.ones((), np.float32)}
    with pytest.raises(Exception, match="scale"):
        Dense(7, False, weights="int8").apply({"params": short}, INPUTS)
