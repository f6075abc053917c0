"""The factorised codec and the scale hyperprior: files, calibration, training."""

import compressai_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxsem import calibration, pipeline, presets
from jaxsem.codecs import Factorized, FactorizedConfig, build_module
from jaxsem.codecs.hyperprior import GAUSSIAN_TABLES
from jaxsem.errors import InputError
from jaxsem.nn import exact
from jaxsem.weights.compressai import load_compressai


@pytest.fixture(scope="module", params=["factorized", "scale-hyperprior"])
def floats(request):
    """A tiny codec with latents of several bits, in float arithmetic."""
    name = request.param
    module, params = load_compressai(reference.random_state_dict(name), name, reference.CONFIGS[name])
    # Images that are neither black nor white, and not flat.
    params["g_s"]["layers_6"] = {
        "kernel": params["g_s"]["layers_6"]["kernel"] * 10,
        "bias": np.full(3, 0.5, np.float32),
    }
    if name == "scale-hyperprior":  # scales of a few units, as latents have them
        last = params["h_s"]["layers_4"]
        last["kernel"], last["bias"] = last["kernel"] * 4, last["bias"] + 4
    return presets.freeze(name, module, params)


@pytest.fixture(scope="module")
def exactly(floats):
    """The same, calibrated."""
    return calibration.calibrate(floats, [photo[:64, :64] for photo in presets.bundled_photos()])


@pytest.fixture(scope="module")
def photos(noise_photo):
    """Of one shape bucket."""
    return [noise_photo(50, 61), noise_photo(64, 64, 1)]


@pytest.mark.parametrize("arithmetic", ["exact", "float"])
def test_a_batch_decodes_as_each_alone(exactly, photos, arithmetic):
    codec = exactly.in_arithmetic(arithmetic)
    results = pipeline.compress_items(codec, photos, batch=2)
    items = [result.item for result in results]
    together = pipeline.decompress_items(codec, items, batch=2)
    assert [image.shape for image in together] == [photo.shape for photo in photos]
    for item, image in zip(items, together):
        assert np.array_equal(pipeline.decompress_items(codec, [item], batch=1)[0], image)


def test_a_file_gives_the_image_of_the_forward_pass(exactly, photos):
    codec = exactly.in_arithmetic("float")
    [image] = pipeline.decompress(codec, pipeline.compress(codec, photos[1:], batch=1), batch=1)
    x = jnp.asarray(photos[1][None], jnp.float32) / 255
    outputs = jax.jit(codec.module.apply)({"params": codec.params}, x, jnp.zeros(1))
    expected = np.clip(np.asarray(outputs["x_hat"][0]), 0, 1) * 255
    assert np.abs(image - expected).max() < 0.51
    assert 4 < image.std() < 100


def test_bytes_are_near_the_estimate(exactly, photos):
    [result] = pipeline.compress_items(exactly, photos[1:])
    assert len(result.item.sections[pipeline.PACKET]) == pytest.approx(result.estimated_bits / 8, rel=0.02, abs=8)


def test_only_symbols_inside_the_image_are_coded(floats):
    for i, stride in enumerate((16,) if floats.name == "factorized" else (64, 16)):
        mask = floats.module.inside(i, (1, 2), (17, 65))
        assert mask.shape == (1, 64 // stride, 128 // stride, 1)
        assert mask.sum() == -(-17 // stride) * -(-65 // stride)


def test_weights_survive_a_file(exactly, tmp_path, photos):
    presets.save(exactly, tmp_path, exactly.name, {})
    again = presets.load(str(tmp_path))
    assert (again.digest, again.arithmetic) == (exactly.digest, "exact")
    assert pipeline.compress(again, photos, batch=2) == pipeline.compress(exactly, photos, batch=2)


def test_what_decides_a_table_is_on_a_grid(floats, exactly):
    grids = flatten_dict(jax.device_get(exactly.exact[exact.COLLECTION]), sep="/")
    median = np.asarray(exactly.module.apply(exactly.exact, method="median")) * 256
    assert np.array_equal(median, np.rint(median))
    assert np.abs(median).max() > 1
    if floats.name == "factorized":
        assert grids.keys() == {"mean"}
        assert exactly.tables.digest() == floats.tables.digest()
    else:
        layers = {path for path in grids if path.endswith("/sums")}
        assert layers == {f"h_s/layers_{i}/sums" for i in (0, 2, 4)}
        assert exactly.tables.digest() != floats.tables.digest()
        for k in range(GAUSSIAN_TABLES, len(floats.tables)):  # the factorised prior's stay
            assert np.array_equal(exactly.tables.row(k), floats.tables.row(k))


def test_training_reaches_every_parameter(floats, photos):
    batch = {"image": photos[1][None], "lambda": np.full(1, 0.01)}
    step = jax.jit(jax.value_and_grad(floats.loss, has_aux=True))
    (loss, metrics), gradients = step(floats.params, batch, jax.random.key(0))
    tails = jax.grad(lambda params: floats.module.apply({"params": params}, method="quantile_loss"))(floats.params)
    gradients["entropy_bottleneck"]["quantiles"] = tails["entropy_bottleneck"]["quantiles"]
    flat = flatten_dict(jax.device_get(gradients), sep="/")
    assert [path for path, leaf in flat.items() if not (np.isfinite(leaf).all() and leaf.any())] == []
    assert float(loss) == pytest.approx(float(metrics["bpp"] + 0.01 * metrics["mse"]), rel=1e-5)
    assert (metrics["bpp_z"] == 0) == (floats.name == "factorized")


def test_one_density_a_channel_serves_one_rate():
    assert Factorized(FactorizedConfig()).config.lambdas == ()
    with pytest.raises(InputError, match=r"factorized has no field lambdas; it has channels, latent"):
        build_module("factorized", {"lambdas": [0.1, 0.2]})
