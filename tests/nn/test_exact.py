"""Exact arithmetic, layer by layer, against the same sums in NumPy's int64: equal, never close."""

from fractions import Fraction
from functools import cache, partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsem.errors import WeightsError
from jaxsem.nn import exact, ops
from jaxsem.nn.conv import CheckerboardConv, Conv, Deconv, Dense, SubpelConv

FEATURES, CHANNELS = 8, 24


def correlate(x: np.ndarray, kernel: np.ndarray, stride: int = 1) -> np.ndarray:
    """The sum that defines a convolution layer, in the integers it is given."""
    size, half = kernel.shape[0], kernel.shape[0] // 2
    height, width = (-(-n // stride) for n in x.shape[1:3])
    x = np.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    ends = (height - 1) * stride + 1, (width - 1) * stride + 1
    taps = np.ndindex(size, size)
    return sum(x[:, i : i + ends[0] : stride, j : j + ends[1] : stride] @ kernel[i, j] for i, j in taps)


def scatter(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """The sum that defines a transposed convolution of stride 2 with output padding 1."""
    (b, h, w, _), size, half = x.shape, kernel.shape[0], kernel.shape[0] // 2
    y = np.zeros((b, 2 * h + size, 2 * w + size, kernel.shape[3]), x.dtype)
    for i, j in np.ndindex(size, size):
        y[:, i : i + 2 * h : 2, j : j + 2 * w : 2] += x @ kernel[i, j]
    return y[:, half : half + 2 * h, half : half + 2 * w]


def masked(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    row, column = np.indices(kernel.shape[:2])
    return correlate(x, kernel * ((row + column) % 2)[..., None, None])


def shuffled(y: np.ndarray) -> np.ndarray:
    b, h, w, c = y.shape
    return y.reshape(b, h, w, c // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(b, 2 * h, 2 * w, c // 4)


CONVS = [(size, stride) for size in (1, 3, 5) for stride in (1, 2)]
CASES = {
    **{f"conv {k} stride {s}": (Conv(FEATURES, k, s), partial(correlate, stride=s)) for k, s in CONVS},
    **{f"deconv {k}": (Deconv(FEATURES, k), scatter) for k in (3, 5)},
    "checkerboard": (CheckerboardConv(FEATURES), masked),
    "subpel": (SubpelConv(FEATURES // 4), correlate),
    "dense": (Dense(FEATURES), correlate),
}
every_layer = pytest.mark.parametrize("name", CASES)


class Case(NamedTuple):
    """A layer with its float parameters, its grid and an input."""

    name: str
    x: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray
    grid: exact.Grid

    def _run(self, params: dict, batch: slice, **collections: dict) -> np.ndarray:
        layer = CASES[self.name][0]
        variables = {"params": params, **collections}
        if isinstance(layer, SubpelConv | Dense):
            variables = {name: {"conv": tree} for name, tree in variables.items()}
        return np.asarray(jax.jit(layer.apply)(variables, self.x[batch]))

    def run(self, operands=jnp.float32, batch=slice(None)) -> np.ndarray:
        kernel = exact.quantise_kernel(self.kernel, self.grid.inputs.reshape(-1), self.grid.sums)
        bias = exact.quantise_bias(self.bias, self.grid.sums, self.grid.shift)
        params = {"kernel": jnp.asarray(kernel).astype(operands), "bias": bias}
        return self._run(params, batch, exact=self.grid._asdict())

    def run_floats(self) -> np.ndarray:
        return self._run({"kernel": self.kernel, "bias": self.bias}, slice(None))

    def permuted(self) -> "Case":
        """Input channels in another order within their chunks."""
        chunks, each = self.grid.inputs.shape
        rng = np.random.default_rng(5)
        order = np.concatenate([k * each + rng.permutation(each) for k in range(chunks)])
        inputs = self.grid.inputs.reshape(-1)[order].reshape(chunks, each)
        return self._replace(
            x=self.x[..., order], kernel=self.kernel[:, :, order], grid=self.grid._replace(inputs=inputs)
        )

    def in_integers(self) -> np.ndarray:
        """What the layer must give: the definition in int64, the units put on at the end."""
        layer, definition = CASES[self.name]
        inputs, sums, shift = self.grid.inputs.reshape(-1).astype(int), self.grid.sums.astype(int), int(self.grid.shift)
        x = whole(self.x, inputs).clip(-255, 255)
        total = definition(x, whole(self.kernel, sums - inputs[:, None]).clip(-127, 127))
        total = (total + 2 ** (shift - 1)) // 2**shift if shift else total
        y = np.ldexp((total + whole(self.bias, sums + shift)).astype(np.float64), sums + shift)
        return shuffled(y) if isinstance(layer, SubpelConv) else y


def whole(x: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    return np.rint(np.ldexp(np.float64(x), -exponents)).astype(np.int64)


@cache
def example(name: str) -> Case:
    """Random floats of uneven channels, some of them beyond 255 units."""
    rng = np.random.default_rng(len(name))
    layer = CASES[name][0]
    size = getattr(layer, "size", 1)
    spread = 2.0 ** rng.uniform(-7, 3, CHANNELS)
    x = (rng.normal(0, 1, (32, 6, 7, CHANNELS)) * spread).astype(np.float32)
    kernel = rng.normal(0, 0.1, (size, size, CHANNELS, FEATURES)).astype(np.float32)
    kernel *= np.float32(2.0) ** rng.integers(-3, 3, FEATURES)
    bias = rng.normal(0, 1, FEATURES).astype(np.float32)
    inputs = exact.finest_exponent(0.8 * np.abs(x).max(axis=(0, 1, 2)), exact.ACTIVATION_LIMIT)
    return Case(name, x, kernel, bias, exact.choose_grid(kernel, bias, inputs, getattr(layer, "taps", Conv.taps), name))


@cache
def output(name: str) -> np.ndarray:
    return example(name).run()


@every_layer
def test_a_layer_is_its_definition_in_integers(name):
    case = example(name)
    np.testing.assert_array_equal(output(name), case.in_integers())
    # ... which is near what the float layer computes, where no input is clipped.
    limits = 255 * np.float32(2) ** case.grid.inputs.reshape(-1)
    floats = case._replace(x=np.clip(case.x, -limits, limits)).run_floats()
    assert np.abs(output(name) - floats).max() < 0.03 * np.abs(floats).max()


@every_layer
def test_the_type_of_the_operands_changes_nothing(name):
    y = example(name).run(jnp.bfloat16)
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, output(name))


@every_layer
def test_the_order_of_the_channels_changes_nothing_but_does_in_floats(name):
    case = example(name)
    other = case.permuted()
    np.testing.assert_array_equal(other.run(), output(name))
    assert (other.run_floats() != case.run_floats()).mean() > 0.25, "the test must see another order of summation"


@every_layer
def test_the_batch_changes_nothing(name):
    np.testing.assert_array_equal(example(name).run(batch=np.s_[31:]), output(name)[31:])


@every_layer
def test_compilation_changes_nothing(name):
    with jax.disable_jit():
        y = example(name).run()
    np.testing.assert_array_equal(y, output(name))


@pytest.mark.parametrize(("size", "stride", "padding"), [(1, 2, 0), (3, 1, (0, 1)), (3, 2, 1), (5, 1, 2), (5, 2, 2)])
def test_matrix_products_are_the_convolution(size, stride, padding):
    rng = np.random.default_rng(size)
    x = jnp.asarray(rng.integers(-255, 256, (2, 9, 8, 16)), jnp.bfloat16)
    kernel = jnp.asarray(rng.integers(-127, 128, (size, size, 16, 8)), jnp.bfloat16)
    products, expected = jax.jit(
        lambda: (exact.matrix_products(x, kernel, stride, padding), ops.conv2d(x, kernel, stride, padding, jnp.float32))
    )()
    np.testing.assert_array_equal(products, expected)


# -- sums near and beyond 2^24 -------------------------------------------------------------------------------------------

FULL = 255 * 127 * 25  # of one input channel of a 5x5 kernel whose weights are all 127 units
UNITS = np.ldexp(1.0, np.arange(-10, FEATURES - 10))  # of each feature


def heavy(channels: int, bias: float = 0.0, name: str = "conv 5 stride 1") -> Case:
    """A kernel of +-127 units, the same signs for every feature, and inputs of nearly 255 units with these signs."""
    rng = np.random.default_rng(0)
    signs = rng.choice([-1.0, 1.0], (5, 5, channels))
    kernel = np.float32(signs[..., None] * 127 * UNITS)
    x = (signs * rng.integers(250, 256, (16, 5, 5, channels))).astype(np.float32)
    bias = np.float32(bias * UNITS)
    grid = exact.choose_grid(kernel, bias, np.zeros(channels, int), CASES[name][0].taps, "h_s")
    return Case(name, x, kernel, bias, grid)


@pytest.mark.parametrize(("extra", "chunks"), [(0, 1), (1, 2)])
def test_a_layer_is_split_from_the_bound_on_and_no_earlier(extra, chunks):
    case = heavy(20, exact.SUM_LIMIT - 2 - 20 * FULL + extra)
    assert case.grid.inputs.shape == (chunks, 20 // chunks)
    assert (case.grid.shift > 0) == (chunks > 1)
    # The worst input reaches the bound, which is therefore not loose, and is exact in float32 all the same.
    worst = case._replace(x=255 * np.sign(case.x[:1]))
    np.testing.assert_array_equal(worst.run(), worst.in_integers())
    if chunks == 1:
        assert (worst.run()[0, 2, 2] == (exact.SUM_LIMIT - 2) * UNITS).all()


@pytest.mark.parametrize(
    ("name", "channels", "chunks", "shift"),
    [("conv 5 stride 1", *row) for row in ((21, 3, 1), (24, 2, 1), (96, 6, 3), (25, 5, 1))] + [("deconv 5", 64, 2, 1)],
)
def test_a_split_layer_is_integer_arithmetic_with_its_rounding(name, channels, chunks, shift):
    case = heavy(channels, 77777.7, name)
    assert (case.grid.inputs.shape[0], case.grid.shift) == (chunks, shift)
    expected = case.in_integers()
    if name != "deconv 5":  # whose phases see these signs at other places
        assert (np.abs(expected).max(axis=(0, 1, 2)) > exact.SUM_LIMIT * UNITS).all(), "more than float32 holds"
    np.testing.assert_array_equal(case.run(), expected)
    np.testing.assert_array_equal(case.run(jnp.bfloat16), expected)
    np.testing.assert_array_equal(case.permuted().run(), expected)


def test_without_the_split_such_sums_are_inexact():
    case = heavy(24)
    case = case._replace(grid=exact.Grid(case.grid.inputs.reshape(1, -1), case.grid.sums, np.int8(0)))
    assert (case.run() != case.in_integers()).any()


@pytest.mark.parametrize("place", ["kernel", "bias"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused_by_name(place, value):
    parts = {"kernel": np.ones((1, 1, 2, 2)), "bias": np.zeros(2)}
    parts[place].flat[0] = value
    with pytest.raises(WeightsError, match=r"h_s/layers_2 cannot be computed exactly: its parameters are not finite$"):
        exact.choose_grid(**parts, inputs=np.zeros(2, int), taps=Conv.taps, name="h_s/layers_2")


def test_a_dead_feature_takes_the_unit_of_its_bias():
    kernel = np.ones((3, 3, 2, 2))
    kernel[..., 1] = 0
    grid = exact.choose_grid(kernel, np.array([0.0, 0.1]), np.zeros(2, int), Conv.taps, "layer")
    assert 2**21 <= 0.1 / 2.0 ** int(grid.sums[1]) <= 2**22
    assert exact.quantise_bias(np.array([0.0, 0.1]), grid.sums, grid.shift)[1] == pytest.approx(0.1, rel=1e-6)


def test_sums_that_no_split_makes_exact_are_refused_by_name():
    parts = np.full((23, 23, 2, 2), 127.0), np.zeros(2), np.zeros(2, int)
    with pytest.raises(WeightsError, match=r"h_s/layers_2 cannot be computed exactly: its sums reach .* units"):
        exact.choose_grid(*parts, Conv.taps, "h_s/layers_2")


# -- the pieces ----------------------------------------------------------------------------------------------------------


@given(
    st.floats(2.0**-15, 2.0**40, width=32),
    st.sampled_from([exact.ACTIVATION_LIMIT, exact.KERNEL_LIMIT, exact.SUM_LIMIT]),
)
@settings(max_examples=300, deadline=None)
def test_the_exponent_of_a_peak_is_the_smallest(peak, limit):
    exponent = int(exact.finest_exponent(np.float32(peak), limit))
    assert limit * Fraction(2) ** exponent >= Fraction(peak) > limit * Fraction(2) ** (exponent - 1)


def test_the_exponent_of_nothing_is_the_least_there_is():
    assert exact.finest_exponent(np.zeros(2), 255).tolist() == [-exact.EXPONENT_LIMIT] * 2


def test_pow2_is_exact_over_its_whole_range():
    exponents = np.arange(-126, 128)
    np.testing.assert_array_equal(exact.pow2(exponents), np.ldexp(np.float32(1), exponents))


@pytest.mark.parametrize("exponent", [-12, 0, 5])
def test_snap_rounds_half_to_even_and_clips(exponent):
    units = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 0.49, 254.5, 255.4, 256, -1e6, np.inf], np.float32)
    expected = np.array([0, 2, 2, 0, -2, 0, 254, 255, 255, -255, 255], np.float32)
    np.testing.assert_array_equal(exact.snap(np.ldexp(units, exponent), exponent), np.ldexp(expected, exponent))


def test_snap_is_idempotent():
    rng = np.random.default_rng(0)
    exponents = rng.integers(-20, 20, 16)
    once = exact.snap(np.ldexp(rng.normal(0, 200, (64, 16)).astype(np.float32), exponents), exponents)
    np.testing.assert_array_equal(exact.snap(once, exponents), once)


def test_the_gradient_of_snap_is_one_inside_and_zero_outside():
    units = np.array([0, 0.3, -7.5, 255, -255.4, 255.6, -300], np.float32)
    gradient = jax.grad(lambda x: exact.snap(x, -3).sum())(units / 8)
    assert gradient.tolist() == [1, 1, 1, 1, 1, 0, 0]


def test_leaky_relu_takes_its_slope_from_the_collection():
    x = np.random.default_rng(0).normal(0, 9, 1000).astype(np.float32)
    y = exact.LeakyRelu().apply({"exact": {"slope": np.int8(-7)}}, x)
    np.testing.assert_array_equal(y, np.where(x >= 0, x, x / 128))
    np.testing.assert_array_equal(exact.LeakyRelu().apply({}, x), nn.leaky_relu(x))


@pytest.mark.parametrize("name", ["conv 1 stride 1", "deconv 5"])
def test_a_quantised_kernel_is_within_half_a_unit(name):
    kernel, grid = example(name).kernel, example(name).grid
    inputs = grid.inputs.reshape(-1)
    units = grid.sums.astype(int) - inputs.astype(int)[:, None]
    whole = np.ldexp(exact.quantise_kernel(kernel, inputs, grid.sums), -units)
    assert np.array_equal(whole, np.rint(whole))
    assert 64 <= np.abs(whole).max() <= 127
    assert np.abs(np.ldexp(kernel, -units) - whole).max() <= 0.5


@pytest.mark.parametrize("name", ["conv 1 stride 1", "deconv 5"])
def test_training_sees_the_quantised_kernel_and_the_gradient_of_the_identity(name):
    kernel, grid = example(name).kernel.copy(), example(name).grid
    kernel.flat[0] *= 1e4  # clipped, as training may carry a weight away from its grid
    fields = {key: jnp.asarray(value) for key, value in grid._asdict().items()}
    rounded = np.asarray(jax.jit(exact.straight_through)(kernel, fields))
    expected = exact.quantise_kernel(kernel, grid.inputs.reshape(-1), grid.sums)
    np.testing.assert_array_equal(rounded.view(np.uint32), expected.view(np.uint32))
    gradient = np.asarray(jax.grad(lambda k: (3 * exact.straight_through(k, fields)).sum())(kernel))
    assert gradient.flat[0] == 0
    assert (gradient.flat[1:] == 3).all()
