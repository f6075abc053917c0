"""TIC against an independent implementation in torch with the same weights, its sizes, and its causality."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tic_reference as reference
from tic_reference import CONFIG, SIZE

from jaxsem.codecs import param_shapes
from jaxsem.codecs.tic import Tic, TicConfig
from jaxsem.errors import InputError
from jaxsem.weights.compressai_layouts import buffers_of, table_of
from jaxsem.weights.convert import convert, invert

MODULE = Tic(CONFIG)


@functools.cache
def params():
    return convert(table_of(CONFIG, "compressai"), reference.random_state_dict(), param_shapes(MODULE))


@functools.cache
def theirs():
    return reference.Reference()


@functools.cache
def jitted(method):
    return jax.jit(functools.partial(MODULE.apply, method=method))


def run(method, *inputs):
    return jitted(method)({"params": params()}, *inputs)


def normal(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


# -- sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("widths", "parts", "total"), [
    ((128, 192), (2_936_136, 2_935_947, 1_312_704, 1_534_144, 483_216, 1_017_344), 10_227_299),
    ((192, 320), (6_600_776, 6_600_459, 2_999_680, 3_553_088, 1_336_976, 2_822_257), 23_924_948),
])  # fmt: skip
def test_the_published_counts(widths, parts, total):
    """The first row's parts and both totals were counted on the authors' layer list; the second's are ours, and add up to it."""
    shapes = param_shapes(Tic(TicConfig(*widths)))
    names = "g_a", "g_s", "h_a", "h_s", "context_prediction", "entropy_parameters"
    assert tuple(count(shapes[name]) for name in names) == parts
    assert count(shapes["entropy_bottleneck"]) == 61 * widths[0]
    assert count(shapes) == total


def test_rates_of_stochastic_depth_grow_over_the_encoder_and_again_over_the_decoder():
    def rates(module):
        nets = (module.g_a, module.h_a), (module.h_s, module.g_s)
        return [[rate for net in pair for layer in net.layers for rate in getattr(layer, "drop", ())] for pair in nets]

    encoder, decoder = Tic(TicConfig()).apply({}, method=rates)
    np.testing.assert_allclose(encoder, np.linspace(0, 0.2, 16))
    assert encoder == decoder


@pytest.mark.parametrize(("fields", "message"), [
    ({"depths": (2, 4)}, r"depths are five numbers from 1 on, not \(2, 4\)"),
    ({"windows": (8, 8, 8, 4, 0)}, "windows are five numbers"),
    ({"channels": 100}, "width of 100 cannot be split into 8"),
    ({"latent": 200}, "width of 200 cannot be split into 16"),
    ({"drop_path": 1.0}, r"rate in \[0, 1\), not 1.0"),
    ({"scale_rule": "below"}, "'nearest' or 'above', not 'below'"),
])  # fmt: skip
def test_impossible_sizes_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        TicConfig(**fields)


# -- weights --------------------------------------------------------------------------------------------------------------


def test_every_published_key_is_read_and_written():
    written = invert(table_of(CONFIG, "compressai"), params())
    written |= buffers_of(written, CONFIG, "compressai")
    assert {key: value.shape for key, value in written.items()} == {
        **reference.parameter_shapes(),
        **reference.buffer_shapes(),
    }
    for key in reference.parameter_shapes():
        np.testing.assert_array_equal(written[key], reference.random_state_dict()[key], err_msg=key)


def test_written_masks_cut_the_last_windows():
    """At 8 x 8 with windows of 2 shifted by 1: the first window is whole, the corner's four tokens are alone."""
    written = buffers_of(reference.random_state_dict(), CONFIG, "compressai")
    mask = written["h_a3.residual_group.blocks.1.attn_mask"]
    np.testing.assert_array_equal(mask[0], np.zeros((4, 4)))
    np.testing.assert_array_equal(mask[-1], 100.0 * np.eye(4) - 100.0)


# -- parity -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "cells", "channels"), [("g_a", 1, 3), ("h_a", 16, 12), ("h_s", 64, 8), ("g_s", 16, 12)]
)
def test_a_transform_equals_the_reference(net, cells, channels):
    x = normal(2, SIZE[0] // cells, SIZE[1] // cells, channels)
    want = theirs().run(net, x)
    assert np.std(want) > 0.1
    np.testing.assert_allclose(run(lambda m, x: getattr(m, net)(x), x), want, rtol=1e-4, atol=1e-4)


def test_the_context_equals_the_reference():
    window = normal(7, 5, 5, CONFIG.latent)
    want = theirs().context(window)
    assert want.shape == (7, 2 * CONFIG.latent)
    assert np.std(want) > 0.1
    np.testing.assert_allclose(run("context", window), want, rtol=1e-5, atol=2e-5)


def test_scale_and_mean_equal_the_reference():
    psi, context = normal(7, 2 * CONFIG.latent), normal(7, 2 * CONFIG.latent, seed=1)
    for found, want in zip(run("parameters", psi, context), theirs().parameters(psi, context), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


# -- behaviour --------------------------------------------------------------------------------------------------------------


def test_the_context_does_not_depend_on_the_middle_or_what_follows():
    window = normal(2, 25, CONFIG.latent)
    known = run("context", window.reshape(2, 5, 5, -1))
    changed = np.where(np.arange(25)[:, None] < 12, window, np.nan)  # a new array: the first may still be read
    np.testing.assert_array_equal(run("context", changed.reshape(2, 5, 5, -1)), known)


@pytest.mark.parametrize("place", [0, 4, 5, 10, 11])
def test_the_context_depends_on_every_decoded_neighbour(place):
    window = normal(1, 25, CONFIG.latent)
    known = run("context", window.reshape(1, 5, 5, -1))
    changed = window + (np.arange(25) == place)[:, None]  # a new array: the first may still be read
    assert np.abs(run("context", changed.reshape(1, 5, 5, -1)) - known).max() > 1e-3


def test_the_forward_pass_works_where_windows_do_not_divide_the_maps():
    """At 64 x 192 pixels the maps have 8 x 24, 4 x 12 and 2 x 6 cells, windows 3, 8 and 4."""
    module = Tic(TicConfig(4, 6, (1,) * 5, (1,) * 5, (8, 8, 3, 8, 4), context_heads=2))
    x = np.random.RandomState(0).uniform(size=(1, 64, 192, 3)).astype(np.float32)
    params = jax.tree.map(lambda leaf: 0.2 * normal(*leaf.shape), param_shapes(module))
    found = jax.jit(module.apply)({"params": params}, x, jnp.zeros(1), jax.random.key(0))
    shapes = {name: value.shape for name, value in found.items()}
    assert shapes["x_hat"] == (1, 64, 192, 3)
    assert (shapes["y_hat"], shapes["z_hat"]) == ((1, 4, 12, 6), (1, 1, 3, 4))
    assert all(np.isfinite(value).all() for value in found.values())
