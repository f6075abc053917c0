"""Checkerboard packing against its definition and against CompressAI."""

import compressai_reference as reference
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsem.nn import checkerboard

X = np.arange(1, 2 * 4 * 6 * 3 + 1, dtype=np.float32).reshape(2, 4, 6, 3)


@pytest.mark.parametrize("anchor", [True, False])
def test_pack_takes_one_colour_row_by_row(anchor):
    packed = np.asarray(checkerboard.pack(jnp.asarray(X), anchor))
    assert packed.shape == (2, 4, 3, 3)
    for row in range(4):
        first = (row + (not anchor)) % 2
        np.testing.assert_array_equal(packed[:, row], X[:, row, first::2])


def test_unpacked_halves_add_up_to_the_whole():
    halves = [checkerboard.unpack(checkerboard.pack(jnp.asarray(X), anchor), anchor) for anchor in (True, False)]
    np.testing.assert_array_equal(halves[0] + halves[1], X)
    assert not np.any(np.asarray(halves[0]) * np.asarray(halves[1]))


def test_equals_compressai():
    torch, compressai = reference.import_compressai()
    codec = compressai.latent_codecs.CheckerboardLatentCodec(
        {"y": None}, torch.nn.Identity(), compressai.layers.CheckerboardMaskedConv2d(3, 6, 5, padding=2)
    )
    halves = codec.unembed(torch.from_numpy(np.moveaxis(X, -1, 1).copy()))
    for half, anchor in zip(halves, (True, False)):
        np.testing.assert_array_equal(np.moveaxis(half.numpy(), 1, -1), checkerboard.pack(jnp.asarray(X), anchor))
