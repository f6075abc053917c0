"""Convolution layers against their definitions, and against torch and CompressAI where installed."""

import compressai_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsem.nn import ops
from jaxsem.nn.conv import CheckerboardConv, Conv, Deconv, SubpelConv
from jaxsem.weights.convert import CONV, DECONV, STRIDE1_DECONV

RANDOM = np.random.RandomState(1)
X = RANDOM.standard_normal((2, 5, 6, 3)).astype(np.float32)
BIAS = RANDOM.standard_normal(4).astype(np.float32)


def kernel(size: int, out: int = 4) -> np.ndarray:
    return np.random.RandomState(size).standard_normal((size, size, 3, out)).astype(np.float32) / size


def apply(layer, weights, x=X):
    params = {"kernel": weights, "bias": BIAS}
    if isinstance(layer, SubpelConv):
        params = {"conv": {"kernel": weights, "bias": np.repeat(BIAS, 4)}}
    return np.asarray(jax.jit(layer.apply)({"params": params}, x))


def correlate(x: np.ndarray, weights: np.ndarray, stride: int) -> np.ndarray:
    """The sum that defines a convolution layer, in float64."""
    size = weights.shape[0]
    x = np.pad(x.astype(np.float64), ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))
    rows, columns = (range(0, n - size + 1, stride) for n in x.shape[1:3])
    windows = [[np.einsum("bklc,klco->bo", x[:, i : i + size, j : j + size], weights) for j in columns] for i in rows]
    return np.moveaxis(np.array(windows), 2, 0)


def scatter(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The sum that defines a transposed convolution of stride 2 with output padding 1, in float64."""
    size, (b, h, w, _) = weights.shape[0], x.shape
    y = np.zeros((b, 2 * h + size, 2 * w + size, weights.shape[3]))
    for i in range(h):
        for j in range(w):
            y[:, 2 * i : 2 * i + size, 2 * j : 2 * j + size] += np.einsum("bc,klco->bklo", x[:, i, j], weights)
    half = size // 2
    return y[:, half : half + 2 * h, half : half + 2 * w]


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (1, 2), (3, 1), (5, 1), (3, 2), (5, 2)])
def test_conv_is_its_definition(size, stride):
    weights = kernel(size)
    np.testing.assert_allclose(apply(Conv(4, size, stride), weights), correlate(X, weights, stride) + BIAS, atol=1e-5)


@pytest.mark.parametrize("size", [3, 5, 7])
def test_deconv_is_its_definition(size):
    weights = kernel(size)
    np.testing.assert_allclose(apply(Deconv(4, size), weights), scatter(X, weights) + BIAS, atol=1e-5)


def test_pixel_shuffle_takes_channels_in_the_order_out_row_column():
    x = np.arange(2 * 3 * 8.0).reshape(1, 2, 3, 8)
    y = np.asarray(ops.pixel_shuffle(jnp.asarray(x)))
    assert y.shape == (1, 4, 6, 2)
    for row, column, channel in np.ndindex(4, 6, 2):
        assert y[0, row, column, channel] == x[0, row // 2, column // 2, 4 * channel + 2 * (row % 2) + column % 2]


def test_checkerboard_conv_sees_the_other_colour_only():
    row, column = np.indices((6, 6))
    odd = ((row + column) % 2)[None, :, :, None]
    x = np.random.RandomState(2).standard_normal((1, 6, 6, 3)).astype(np.float32)
    y = apply(CheckerboardConv(4), kernel(5), x * odd)
    # With even positions emptied, an odd position sees none of the others: its value is the bias.
    np.testing.assert_allclose(y[odd[..., 0] == 1], np.broadcast_to(BIAS, (18, 4)), atol=1e-6)
    assert np.abs(y[odd[..., 0] == 0] - BIAS).min() > 1e-3
    # At even positions the emptied taps would be masked anyway.
    np.testing.assert_allclose(
        y[odd[..., 0] == 0], apply(CheckerboardConv(4), kernel(5), x)[odd[..., 0] == 0], atol=1e-6
    )


class TestAgainstTorch:
    """The same layers of torch 2.13 and CompressAI, with the same weights."""

    def check(self, layer, torch_layer, transform, weights, tolerance=1e-5):
        torch, _ = reference.import_compressai()
        inner = torch_layer[0] if isinstance(torch_layer, torch.nn.Sequential) else torch_layer
        with torch.no_grad():
            inner.weight.copy_(torch.from_numpy(np.ascontiguousarray(transform.inverse(weights))))
            inner.bias.copy_(
                torch.from_numpy(np.resize(np.repeat(BIAS, 4 // (4 * 4 // len(inner.bias))), len(inner.bias)))
            )
            expected = torch_layer(torch.from_numpy(np.moveaxis(X, -1, 1).copy())).numpy()
        np.testing.assert_allclose(apply(layer, weights), np.moveaxis(expected, 1, -1), atol=tolerance)

    @pytest.mark.parametrize("size", [3, 5])
    def test_deconv(self, size):
        reference.import_compressai()
        from compressai.models.utils import deconv

        self.check(Deconv(4, size), deconv(3, 4, size), DECONV, kernel(size))

    @pytest.mark.parametrize(("size", "stride"), [(3, 1), (5, 2)])
    def test_conv(self, size, stride):
        reference.import_compressai()
        from compressai.models.utils import conv

        self.check(Conv(4, size, stride), conv(3, 4, size, stride), CONV, kernel(size))

    def test_a_stride_1_deconv_is_a_conv_with_the_turned_kernel(self):
        reference.import_compressai()
        from compressai.models.utils import deconv

        self.check(Conv(4, 3), deconv(3, 4, 3, stride=1), STRIDE1_DECONV, kernel(3))

    def test_subpel_conv(self):
        reference.import_compressai()
        from compressai.layers import subpel_conv3x3

        self.check(SubpelConv(4), subpel_conv3x3(3, 4, 2), CONV, kernel(3, 16))

    def test_checkerboard_conv(self):
        reference.import_compressai()
        from compressai.layers import CheckerboardMaskedConv2d

        self.check(CheckerboardConv(4), CheckerboardMaskedConv2d(3, 4, 5, padding=2), CONV, kernel(5))
