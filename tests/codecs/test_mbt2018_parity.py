"""mbt2018 against CompressAI: rates of the forward pass, and what both decode from their own files."""

import compressai_reference as reference
import jax
import numpy as np
import pytest

from jaxsem import codec as driver
from jaxsem.codecs import JointConfig, param_shapes
from jaxsem.codecs.mbt2018 import JointHyperprior
from jaxsem.presets import freeze
from jaxsem.weights.compressai import load_compressai, to_compressai

CONFIG = JointConfig(channels=8, latent=12, scale_rule="above")
SIZE = (64, 128)


@pytest.fixture(scope="module")
def theirs():
    """CompressAI's model with seeded weights that give symbols of several units."""
    torch, compressai = reference.import_compressai()
    torch.manual_seed(0)
    model = compressai.models.JointAutoregressiveHierarchicalPriors(CONFIG.channels, CONFIG.latent).eval()
    with torch.no_grad():
        model.g_a[6].weight *= 400
        model.g_s[6].weight *= 0.2 / model(_tensor(torch))["x_hat"].std()
        model.g_s[6].bias[:] = 0.5
        for layer in (model.context_prediction, model.entropy_parameters[4]):
            layer.weight *= 3
    model.update()
    return torch, model


@pytest.fixture(scope="module")
def ours(theirs):
    _, model = theirs
    return load_compressai({k: v.numpy() for k, v in model.state_dict().items()}, "joint", CONFIG)


@pytest.fixture(scope="module")
def image(theirs):
    return _tensor(theirs[0])


def _tensor(torch):
    return torch.from_numpy(reference.image().astype(np.float32) / 255.0).permute(0, 3, 1, 2)


def test_the_forward_pass_has_their_rates(theirs, ours, image):
    torch, model = theirs
    module, params = ours
    with torch.no_grad():
        likelihoods = model(image)["likelihoods"]
    pixels = np.moveaxis(image.numpy(), 1, -1)
    out = jax.jit(lambda p, x: module.apply({"params": p}, x, np.zeros(1, np.float32)))(params, pixels)
    for name in "yz":
        np.testing.assert_allclose(out[f"bits_{name}"][0], -likelihoods[name].log2().sum().item(), rtol=1e-4)
    assert out["bits_y"][0] > 1000


def test_files_of_both_decode_to_the_same_image(theirs, ours, image):
    torch, model = theirs
    module, params = ours
    with torch.no_grad():
        coded = model.compress(image)
        expected = model.decompress(coded["strings"], coded["shape"])["x_hat"][0].permute(1, 2, 0).numpy()
    codec = freeze("joint", module, params, half=False)
    y = driver.run_analysis(module, codec.params, reference.image(), np.zeros(1, np.float32))
    z = driver.run_hyper_analysis(module, codec.params, y, np.zeros(1, np.float32))
    parts = driver.code_latents(codec, {"y": y, "z": z}, [SIZE], 0.0)
    [packet] = driver.encode(codec, parts, 1)
    y_hat = driver.decode(codec, [packet], [SIZE], (1, 2))
    x_hat = codec.synthesize(codec.params, {"y_hat": y_hat})[0]
    np.testing.assert_allclose(np.clip(x_hat, 0, 1), expected, atol=1e-4)
    assert expected.std() > 0.05
    assert np.abs(np.asarray(parts.slices[1][0])).max() > 5
    # The same integers but for our order and start: their streams have 8 bytes and a checksum-free head of their own.
    their_bits = 8 * sum(len(string) for part in coded["strings"] for string in part)
    assert abs(8 * len(packet) - their_bits) < 0.02 * their_bits + 160


def test_what_we_write_loads_strictly_and_comes_back(theirs, ours):
    torch, model = theirs
    module, params = ours
    written = to_compressai(module, params)
    fresh = type(model)(CONFIG.channels, CONFIG.latent)
    fresh.load_state_dict({name: torch.from_numpy(value) for name, value in written.items()}, strict=True)
    _, again = load_compressai(written, "joint", CONFIG)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("widths", "count"), [((192, 192), 14_130_467), ((192, 320), 25_504_596)])
def test_published_sizes(widths, count):
    shapes = param_shapes(JointHyperprior(JointConfig(*widths)))
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)) == count
