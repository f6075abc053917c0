"""Shared transformer blocks: attention against its formula, masks, and stacks against a loop over their layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsem.errors import InputError
from jaxsem.nn.attention import MultiHeadAttention
from jaxsem.nn.transformer import Block, LayerNorm, Mlp, gelu, quick_gelu, scan_layers

X = np.random.RandomState(0).standard_normal((2, 5, 12)).astype(np.float32)


def test_attention_is_the_formula():
    layer = MultiHeadAttention(heads=3)
    params = layer.init(jax.random.key(0), X)["params"]
    q, k, v = (X @ params[name]["kernel"] + params[name]["bias"] for name in ("query", "key", "value"))
    heads = []
    for h in range(3):
        part = slice(4 * h, 4 * h + 4)
        weights = jax.nn.softmax(q[..., part] @ k[..., part].swapaxes(1, 2) / 2, axis=-1)
        heads.append(weights @ v[..., part])
    want = jnp.concatenate(heads, -1) @ params["out"]["kernel"] + params["out"]["bias"]
    np.testing.assert_allclose(layer.apply({"params": params}, X), want, rtol=1e-5, atol=1e-6)


def test_a_causal_layer_is_one_with_a_triangular_mask():
    params = MultiHeadAttention(heads=3).init(jax.random.key(0), X)
    causal = MultiHeadAttention(heads=3, causal=True).apply(params, X)
    masked = MultiHeadAttention(heads=3).apply(params, X, np.tri(5, dtype=bool)[None, None])
    np.testing.assert_allclose(causal, masked, atol=1e-6)
    np.testing.assert_allclose(
        causal[:, :3], MultiHeadAttention(heads=3, causal=True).apply(params, X[:, :3]), atol=1e-6
    )


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(InputError, match="width of 12 cannot be split into 5 attention heads"):
        MultiHeadAttention(heads=5).init(jax.random.key(0), X)


def test_an_unknown_activation_is_refused():
    with pytest.raises(InputError, match="no activation 'silu'"):
        Mlp(8, "silu").init(jax.random.key(0), X)


def test_activations_have_their_known_values():
    """At 1: Phi(1) and 1 / (1 + exp(-1.702)), from a table of both."""
    np.testing.assert_allclose([gelu(1.0), quick_gelu(1.0)], [0.8413447, 0.8457958], atol=1e-6)


def test_layer_norm_keeps_its_digits_far_from_zero():
    x = np.float32([[3000, 3001, 3002, 3003]])
    found = LayerNorm().apply({"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}, x)
    np.testing.assert_allclose(found, np.float32([[-1.5, -0.5, 0.5, 1.5]]) / np.sqrt(1.25), rtol=1e-4)


class Stack(nn.Module):
    layers: int = 4

    def setup(self):
        self.blocks = Block(heads=3, hidden=20, depth=self.layers)

    def __call__(self, x, mask=None, **options):
        return scan_layers(self.blocks, x, mask, layers=self.layers, **options)


@pytest.fixture(scope="module")
def params():
    return jax.jit(Stack().init)(jax.random.key(1), X)["params"]


def test_a_stack_is_a_loop_over_its_layers(params):
    mask = np.tri(5, dtype=bool)[None, None]
    x, states = X, []
    for i in range(4):
        layer = jax.tree.map(lambda p, i=i: p[i], params["blocks"])
        x = Block(heads=3, hidden=20).apply({"params": layer}, x, mask)
        states.append(x)
    found, collected = Stack().apply({"params": params}, X, mask, collect=True)
    np.testing.assert_allclose(found, x, atol=1e-5)
    np.testing.assert_allclose(collected, np.stack(states), atol=1e-5)


@pytest.mark.parametrize(("first", "last"), [(0, 2), (2, None), (1, -1), (-1, None), (3, 1)])
def test_a_span_of_a_stack_is_a_slice_of_its_layers(params, first, last):
    found, states = Stack().apply({"params": params}, X, first=first, last=last, collect=True)
    layers = range(4)[first:last]
    assert len(states) == len(layers)
    part = {"blocks": jax.tree.map(lambda p: p[first:last], params["blocks"])}
    want = Stack(len(layers)).apply({"params": part}, X)[0] if layers else X
    np.testing.assert_allclose(found, want, atol=1e-6)


def test_layers_are_initialised_apart_and_for_the_whole_stack(params):
    kernels = np.asarray(params["blocks"]["mlp"]["fc2"]["kernel"])
    assert kernels.shape == (4, 20, 12)
    assert np.abs(kernels[0] - kernels[1]).min() > 0
    np.testing.assert_allclose(kernels.std(), (2 * 4 * 12) ** -0.5, rtol=0.1)
    partly = jax.eval_shape(lambda: Stack().init(jax.random.key(1), X, first=1, last=2))["params"]
    assert jax.tree.map(jnp.shape, partly) == jax.tree.map(jnp.shape, params)
