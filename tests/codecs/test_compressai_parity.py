"""Our codecs against CompressAI 1.2.8 with the same seeded weights: images, rates, symbols and table indices."""

import json

import compressai_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsem.codec import Codec, code_latents
from jaxsem.codecs.hyperprior import GAUSSIAN_TABLES
from jaxsem.weights.compressai import load_compressai, to_compressai

NAMES = sorted(reference.CONFIGS)
CHECKS = json.loads(reference.CHECKS.read_text())


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def ours(name):
    """Our forward pass, and what the slice driver hands to the coder."""
    family = reference.system_of(name)
    module, params = load_compressai(reference.random_state_dict(name), family, reference.CONFIGS[name])
    image, quality = reference.image(), jnp.zeros(1)

    @jax.jit
    def forward(params, image):
        outputs = module.apply({"params": params}, image / 255.0, quality)
        return outputs, module.apply({"params": params}, image / 255.0, quality, method="analyze")

    outputs, latents = forward(params, image.astype(np.float32))
    codec = Codec(name, module, params, tables=None, digest=b"")
    coded = code_latents(codec, latents, [reference.SIZE], 0.0)
    slices = [(np.asarray(symbols), np.asarray(table)) for symbols, table, _ in coded.slices]
    slices[0] = (slices[0][0], slices[0][1] - GAUSSIAN_TABLES)  # z's tables follow the Gaussian ones
    return {
        "x_hat": np.asarray(outputs["x_hat"]),
        "bits_y": float(outputs["bits_y"][0]),
        "bits_z": float(outputs["bits_z"][0]),
        "coded_bits": float(coded.bits[0]),
        "slices": slices,
    }


def test_the_check_values_come_out(name, ours):
    expected, actual = CHECKS[name], reference.checks(ours)
    np.testing.assert_allclose(actual["x_hat"], expected["x_hat"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours["bits_y"], expected["bits_y"], rtol=1e-4)
    np.testing.assert_allclose(ours["bits_z"], expected["bits_z"], rtol=1e-4)
    assert actual["symbols_crc32"] == expected["symbols_crc32"]
    assert actual["tables_crc32"] == expected["tables_crc32"]


def test_the_slice_driver_estimates_what_the_forward_pass_does(ours):
    np.testing.assert_allclose(ours["coded_bits"], ours["bits_y"] + ours["bits_z"], rtol=1e-5)


def test_everything_equals_compressai(name, ours):
    theirs = reference.reference_outputs(name)
    np.testing.assert_allclose(ours["x_hat"], theirs["x_hat"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours["bits_y"], theirs["bits_y"], rtol=1e-4)
    np.testing.assert_allclose(ours["bits_z"], theirs["bits_z"], rtol=1e-4)
    assert len(ours["slices"]) == len(theirs["slices"])
    for (symbols, table), (their_symbols, their_table) in zip(ours["slices"], theirs["slices"]):
        np.testing.assert_array_equal(symbols, their_symbols)
        np.testing.assert_array_equal(table, their_table)
        assert np.abs(symbols).max() > 0


def test_compressai_loads_what_we_write_strictly_and_gets_it_back(name):
    torch, _ = reference.import_compressai()
    state = reference.random_state_dict(name)
    net = reference.reference_model(name)  # loaded strictly
    family = reference.system_of(name)
    written = to_compressai(*load_compressai(net.state_dict(), family, reference.CONFIGS[name]))
    net_state = {key: value.numpy() for key, value in net.state_dict().items()}
    assert written.keys() == net_state.keys() == state.keys()
    for key, value in net_state.items():
        np.testing.assert_array_equal(written[key], value, err_msg=key)
        assert written[key].dtype == value.dtype, key
    net.load_state_dict({key: torch.from_numpy(value) for key, value in written.items()})
