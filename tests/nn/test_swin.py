"""Swin blocks: attention in windows against its formula, on maps of any size, and stochastic depth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsem.errors import InputError
from jaxsem.nn.swin import (
    ResidualSwinBlocks,
    SwinBlock,
    SwinBlocks,
    WindowAttention,
    gather_windows,
    place_windows,
    relative_positions,
)

WIDTH, HEADS, WINDOW = 6, 2, 4


def lively(tree, seed=0):
    """Parameters of these shapes that change whatever passes."""
    leaves, treedef = jax.tree.flatten(tree)
    random = np.random.RandomState(seed)
    return treedef.unflatten([random.standard_normal(leaf.shape).astype(np.float32) * 0.5 for leaf in leaves])


def normal(*shape, seed=1):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


@functools.cache
def block_params():
    return lively(
        jax.eval_shape(SwinBlock(HEADS, WINDOW).init, jax.random.key(0), jnp.zeros((1, 4, 4, WIDTH)))["params"]
    )


def attention_by_hand(params, x, groups, window):
    """What each token of a map [h, w, c] takes from those of its own group; groups[r, c] are the corners of its window."""
    height, width, channels = x.shape
    query, key, value = np.split(x @ params["qkv"]["kernel"] + params["qkv"]["bias"], 3, axis=-1)
    table = params["bias_table"].reshape(2 * window - 1, 2 * window - 1, -1)
    heads, depth = table.shape[2], channels // table.shape[2]
    places = [(r, c) for r in range(height) for c in range(width)]
    y = np.zeros_like(x)
    for r, c in places:
        seen = [(a, b) for a, b in places if groups[a, b] == groups[r, c]]
        for head in range(heads):
            part = slice(head * depth, (head + 1) * depth)
            logits = [
                query[r, c, part] @ key[a, b, part] / np.sqrt(depth)
                + table[r - a + window - 1, c - b + window - 1, head]
                for a, b in seen
            ]
            weights = np.exp(logits - np.max(logits))
            y[r, c, part] = weights / weights.sum() @ np.stack([value[a, b, part] for a, b in seen])
    return y @ params["proj"]["kernel"] + params["proj"]["bias"]


def groups_by_hand(height, width, window, shift):
    """The number of each place's window, when windows begin `shift` further down and right."""
    by_row, by_column = (
        (np.arange(n) + (window - shift if shift and n >= window else 0)) // window for n in (height, width)
    )
    return 100 * by_row[:, None] + by_column


def test_window_attention_is_the_formula():
    x = normal(3, 5, 5, WIDTH)
    layer = WindowAttention(HEADS, 5)
    params = lively(jax.eval_shape(layer.init, jax.random.key(0), x.reshape(3, 25, WIDTH))["params"])
    want = [attention_by_hand(params, one, np.zeros((5, 5)), 5) for one in x]
    found = layer.apply({"params": params}, x.reshape(3, 25, WIDTH))
    np.testing.assert_allclose(found.reshape(x.shape), want, atol=1e-5)


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", [(8, 12), (4, 4), (9, 7), (3, 10), (1, 1)])
def test_a_block_sees_its_windows_whatever_the_size(size, shift):
    """Windows divide the map, are cut at its border, or are larger than it; filling is never seen."""
    x, params = normal(2, *size, WIDTH), block_params()
    groups = groups_by_hand(*size, WINDOW, shift)

    def norm(x, part):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * params[part]["scale"] + params[part]["bias"]

    want = x + np.stack([attention_by_hand(params["attention"], norm(one, "norm1"), groups, WINDOW) for one in x])
    mlp = params["mlp"]
    hidden = jax.nn.gelu(norm(want, "norm2") @ mlp["fc1"]["kernel"] + mlp["fc1"]["bias"], approximate=False)
    want = want + hidden @ mlp["fc2"]["kernel"] + mlp["fc2"]["bias"]
    found = jax.jit(SwinBlock(HEADS, WINDOW).apply)({"params": params}, x, jnp.int32(shift))
    assert found.shape == x.shape
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=2e-5)


def test_a_known_shift_and_a_traced_one_are_the_same():
    x = normal(1, 8, 4, WIDTH)
    for shift in (0, 2):
        known, seen = gather_windows(x, WINDOW, shift)
        traced, also = jax.jit(gather_windows, static_argnums=1)(x, WINDOW, shift)
        np.testing.assert_array_equal(known, traced)
        assert (seen is None) == (shift == 0)
        np.testing.assert_array_equal(np.broadcast_to(True if seen is None else seen, also.shape), also)


def test_windows_go_back_to_where_they_came_from():
    x = normal(2, 5, 11, 3)
    windows, _ = gather_windows(x, WINDOW, 2)
    assert windows.shape == (2 * 2 * 3, 16, 3)
    np.testing.assert_array_equal(place_windows(windows, x.shape, WINDOW, 2), x)


def test_relative_positions_of_a_two_by_two_window():
    """Query minus key, rows first, in a table of 3 x 3."""
    np.testing.assert_array_equal(relative_positions(2), [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]])


def test_a_stack_is_its_blocks_one_after_the_other():
    x = normal(1, 8, 8, WIDTH)
    stack = SwinBlocks(3, HEADS, WINDOW, ratio=2.0)
    params = lively(jax.eval_shape(stack.init, jax.random.key(0), x)["params"])
    want, block = x, jax.jit(SwinBlock(HEADS, WINDOW, ratio=2.0).apply)
    for i, shift in enumerate((0, 2, 0)):
        want = block({"params": jax.tree.map(lambda p, i=i: p[i], params["blocks"])}, want, shift)
    np.testing.assert_allclose(jax.jit(stack.apply)({"params": params}, x), want, rtol=1e-5, atol=1e-5)
    residual = ResidualSwinBlocks(3, HEADS, WINDOW, ratio=2.0)
    np.testing.assert_allclose(jax.jit(residual.apply)({"params": params}, x), x + want, rtol=1e-5, atol=1e-5)


def test_recomputing_changes_no_gradient():
    x = normal(1, 4, 4, WIDTH)
    params = lively(jax.eval_shape(SwinBlocks(2, HEADS, WINDOW).init, jax.random.key(0), x)["params"])

    def gradient(remat):
        stack = SwinBlocks(2, HEADS, WINDOW, remat=remat)
        return jax.jit(jax.grad(lambda p: jnp.square(stack.apply({"params": p}, x)).mean()))(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient(False), gradient(True))


def test_stochastic_depth_leaves_out_halves_of_blocks_only_where_it_has_random_numbers():
    x = jnp.asarray(normal(64, 2, 2, WIDTH))
    params, block, rate = {"params": block_params()}, SwinBlock(HEADS, WINDOW), 0.5
    run = jax.jit(lambda x, drop, **rngs: block.apply(params, x, 0, drop, rngs=rngs))
    plain = run(x, rate)
    np.testing.assert_array_equal(plain, run(x, 0.0))
    thin = run(x, rate, drop_path=jax.random.key(3))
    np.testing.assert_array_equal(thin, run(x, rate, drop_path=jax.random.key(3)))
    gone = np.isclose(thin, x, atol=1e-6).all(axis=(1, 2, 3))
    assert 5 <= gone.sum() <= 30  # a quarter of 64 lose both halves; 11 times the standard deviation wide
    assert not np.isclose(thin, plain, atol=1e-3).all(axis=(1, 2, 3)).any()  # what stays counts double


def test_the_rates_of_a_stack_reach_their_blocks():
    """The last of three blocks is nearly always left out, the others never: mostly what two blocks give remains."""
    x = jnp.asarray(normal(8, 2, 2, WIDTH))
    stack = SwinBlocks(3, HEADS, 2, drop=(0.0, 0.0, 1 - 1e-7))
    params = lively(jax.eval_shape(stack.init, jax.random.key(0), x)["params"])
    found = jax.jit(stack.apply)({"params": params}, x, rngs={"drop_path": jax.random.key(0)})
    first = {"params": jax.tree.map(lambda p: p[:2], params)}
    np.testing.assert_allclose(found, jax.jit(SwinBlocks(2, HEADS, 2).apply)(first, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("drop", [(0.1,), (0.1, 1.0)])
def test_rates_that_do_not_fit_the_stack_are_refused(drop):
    with pytest.raises(InputError, match="2 blocks needs as many rates"):
        SwinBlocks(2, HEADS, 2, drop=drop).init(jax.random.key(0), jnp.zeros((1, 2, 2, WIDTH)))


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(InputError, match="width of 6 cannot be split into 4 attention heads"):
        SwinBlocks(1, 4, 2).init(jax.random.key(0), jnp.zeros((1, 2, 2, WIDTH)))


def test_bfloat16_stays_bfloat16():
    x = normal(1, 5, 8, WIDTH)
    full, half = (SwinBlocks(2, HEADS, WINDOW, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    params = {"params": lively(jax.eval_shape(full.init, jax.random.key(0), x)["params"])}
    want, found = (jax.jit(stack.apply)(params, x) for stack in (full, half))
    assert found.dtype == jnp.bfloat16
    assert 0 < np.abs(found.astype(jnp.float32) - want).max() < 0.03 * np.abs(want).max()
