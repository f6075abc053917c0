"""Calibration: what it refuses, what it keeps, and that nothing which decides a table is left in floats."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxsem import calibration, pipeline, presets, shapes
from jaxsem import codec as driver
from jaxsem.codecs import HyperpriorConfig, MeanScaleHyperprior, init_params
from jaxsem.entropy.tables import gaussian_tables, quantise_counts
from jaxsem.errors import FormatError, InputError, WeightsError
from jaxsem.nn import exact
from jaxsem.nn.conv import LAYERS

LAYER = ("h_s", "layers_2")


@pytest.fixture(scope="module")
def photos():
    return presets.bundled_photos()


@pytest.fixture(scope="module")
def float_codec(tiny_codec):
    """The same weights, never calibrated."""
    return dataclasses.replace(tiny_codec, exact=None, arithmetic="float")


@pytest.fixture(scope="module")
def grids(tiny_codec):
    return jax.device_get(tiny_codec.exact[exact.COLLECTION])


@pytest.fixture(scope="module")
def tiny_hyperprior(photos):
    """A hyperprior of one rate, whose hyper-decoder has leaky ReLUs."""
    module = MeanScaleHyperprior(HyperpriorConfig(8, 12))
    params = init_params(module, 0)
    # Random transforms give latents near zero and no biases; these make the means of y differ from zero.
    params["h_a"]["layers_4"]["kernel"] = params["h_a"]["layers_4"]["kernel"] * 1000
    params["h_s"]["layers_0"]["bias"] = np.linspace(-1, 1, 12).astype(np.float32)
    return calibration.calibrate(presets.freeze("flat", module, params), [photo[:64, :64] for photo in photos])


def changed(grids, *path, value=None):
    """The grids with one leaf replaced, or taken out."""
    flat = flatten_dict(grids)
    assert path in flat
    flat = {key: value if key == path else leaf for key, leaf in flat.items() if key != path or value is not None}
    return unflatten_dict(flat)


# -- bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_are_refused(float_codec, photos, count):
    with pytest.raises(InputError, match=f"^calibration needs 2 images or more, not {count}$"):
        calibration.calibrate(float_codec, photos[:count])


def test_constant_images_are_refused(float_codec):
    images = [np.full((64, 80, 3), level, np.uint8) for level in (0, 128, 255)]
    with pytest.raises(
        InputError, match=r"^calibration needs photos, but these 3 images are almost constant: .* is 0 grey levels"
    ):
        calibration.calibrate(float_codec, images)


@pytest.mark.parametrize("size", [(63, 100), (100, 5)])
def test_small_images_are_refused(float_codec, noise_photo, size):
    images = [noise_photo(100, 100), noise_photo(*size)]
    with pytest.raises(InputError, match=f"^calibration needs images of 64 pixels a side or more, not {min(size)}$"):
        calibration.calibrate(float_codec, images)


def test_a_loss_of_rate_is_refused_with_the_ways_out(float_codec, photos, monkeypatch):
    monkeypatch.setattr(calibration, "MAX_LOSS", -1)
    with pytest.raises(WeightsError) as caught:
        calibration.calibrate(float_codec, [photo[:64, :64] for photo in photos[:2]])
    message = str(caught.value)
    assert "would cost tiny" in message
    assert "% of rate on these 4 samples, more than -100 %" in message
    assert "calibrate with more images, train it with exact=True, or use arithmetic='float'" in message


def test_a_codec_whose_networks_overflow_is_refused(float_codec, photos):
    params = jax.device_get(float_codec.params)
    params["h_s"] = {**params["h_s"], "layers_0": {**params["h_s"]["layers_0"], "bias": np.full(8, np.inf, np.float32)}}
    with pytest.raises(WeightsError, match=r"^\w+/layers_\d cannot be computed exactly: its \w+ are not finite$"):
        calibration.calibrate(
            dataclasses.replace(float_codec, params=params), [photo[:64, :64] for photo in photos[:2]]
        )


@pytest.mark.parametrize("part", ["inputs", "sums"])
def test_grids_of_another_shape_are_refused(float_codec, grids, part):
    other = changed(grids, *LAYER, part, value=np.zeros((1, 3), np.int8))
    with pytest.raises(WeightsError, match=rf"do not fit the model: h_s/layers_2/{part} is int8 \(1, 3\), not int8 \("):
        calibration.with_grids(float_codec, other)


@pytest.mark.parametrize(
    "path", [(*LAYER, "inputs"), (*LAYER, "shift"), (*LAYER, "sums"), ("mean",), ("thresholds",), ("gain_z", "inverse")]
)
def test_grids_without_a_part_are_refused(float_codec, grids, path):
    with pytest.raises(WeightsError, match=rf"do not fit the model: .*{'/'.join(path)} is missing"):
        calibration.with_grids(float_codec, changed(grids, *path))


def test_a_grid_of_a_layer_that_there_is_not_is_refused(float_codec, grids):
    with pytest.raises(WeightsError, match=r"do not fit the model: .*h_s/layers_9/sums is surplus"):
        calibration.with_grids(float_codec, {**grids, "h_s": {**grids["h_s"], "layers_9": grids["h_s"]["layers_2"]}})


def test_grids_without_a_network_are_refused(float_codec, grids):
    without = {name: part for name, part in grids.items() if name != "aggregation_1"}
    with pytest.raises(WeightsError, match=r"aggregation_1/layers_0/inputs is missing"):
        calibration.with_grids(float_codec, without)


@pytest.mark.parametrize("value", [np.float32(np.nan), np.float32(np.inf)])
def test_grids_out_of_range_are_refused(float_codec, grids, value):
    with pytest.raises(WeightsError, match="thresholds is out of range"):
        calibration.with_grids(float_codec, changed(grids, "thresholds", value=np.full(63, value)))
    with pytest.raises(WeightsError, match="mean is out of range"):
        calibration.with_grids(float_codec, changed(grids, "mean", value=np.int8(-128)))


def test_what_is_no_image_is_refused(float_codec, photos):
    with pytest.raises(InputError, match="an image must be a uint8 array"):
        calibration.calibrate(float_codec, [photo[..., 0] for photo in photos])


def test_exact_arithmetic_without_calibration_is_refused(float_codec):
    with pytest.raises(
        WeightsError, match=r"^tiny has no exact arithmetic: make it with jaxsem\.calibrate\(codec, photos\)$"
    ):
        float_codec.in_arithmetic("exact")


def test_unknown_arithmetic_is_refused(tiny_codec):
    with pytest.raises(InputError, match=r"^the arithmetic is 'exact' or 'float', not 'decimal'$"):
        tiny_codec.in_arithmetic("decimal")


def test_a_file_of_another_calibration_is_refused(tiny_codec, noise_photo, photos):
    other = calibration.calibrate(tiny_codec, [photo[:64, :64] for photo in photos[:2]])
    [file] = pipeline.compress(other, [noise_photo(64, 64)])
    with pytest.raises(WeightsError, match=r"the file was made with weights .* load the preset it was made with"):
        pipeline.decompress(tiny_codec, [file])


def test_an_exact_packet_needs_an_exact_codec(tiny_codec, float_codec, noise_photo):
    [result] = pipeline.compress_items(tiny_codec, [noise_photo(64, 64)])
    packet = result.item.sections[pipeline.PACKET]
    message = "^the image packet was made in exact arithmetic, which tiny does not have$"
    with pytest.raises(FormatError, match=message):
        driver.decode(float_codec, [packet], [(64, 64)], shapes.latent_grid(64, 64))
    with pytest.raises(FormatError, match=message):
        driver.variables_of(float_codec, True)


# -- what is kept --------------------------------------------------------------------------------------------------------


def test_saving_and_loading_keeps_exact_arithmetic_bit_for_bit(tiny_codec, tmp_path):
    presets.save(tiny_codec, tmp_path, "elic", {})
    again = presets.load(str(tmp_path))
    assert (again.digest, again.arithmetic) == (tiny_codec.digest, "exact")
    before, after = (flatten_dict(jax.device_get(codec.exact), sep="/") for codec in (tiny_codec, again))
    assert before.keys() == after.keys()
    for name, leaf in before.items():
        assert after[name].dtype == leaf.dtype, name
        assert after[name].tobytes() == leaf.tobytes(), name
    assert presets.load(str(tmp_path), arithmetic="float").arithmetic == "float"


def test_calibration_is_part_of_the_digest_but_the_choice_of_arithmetic_is_not(tiny_codec, float_codec, grids):
    assert tiny_codec.in_arithmetic("float").digest == tiny_codec.digest
    assert calibration.with_grids(float_codec, grids).digest == tiny_codec.digest
    finer = changed(grids, *LAYER, "inputs", value=grids["h_s"]["layers_2"]["inputs"] - np.int8(1))
    assert calibration.with_grids(float_codec, finer).digest != tiny_codec.digest


def test_a_codec_decodes_files_of_both_arithmetics(tiny_codec, noise_photo):
    photo = noise_photo(64, 80)
    for arithmetic in driver.ARITHMETICS:
        codec = tiny_codec.in_arithmetic(arithmetic)
        [result] = pipeline.compress_items(codec, [photo])
        assert driver.parse_head(result.item.sections[pipeline.PACKET]) == (0, arithmetic == "exact")
        [file] = pipeline.compress(codec, [photo])
        [other] = pipeline.decompress(tiny_codec.in_arithmetic("exact"), [file])
        [own] = pipeline.decompress(tiny_codec.in_arithmetic("float"), [file])
        np.testing.assert_array_equal(own, other)


# -- nothing is left in floats -------------------------------------------------------------------------------------------


def slices_of(codec, photo):
    """Latents and quality of one photo, as `_walk` takes them."""
    return calibration._latents(codec, photo[None], 0)


@pytest.mark.parametrize("name", ["tiny_codec", "tiny_hyperprior"])
def test_every_layer_that_decides_has_a_grid(name, request, photos):
    codec = request.getfixturevalue(name)
    floats, seen, slopes = [], set(), 0

    def watch(call, args, kwargs, context):
        nonlocal slopes
        layer = context.module
        if context.method_name == "__call__" and isinstance(layer, LAYERS):
            seen.add(layer.path)
            if exact.grid_of(layer) is None:
                floats.append(layer.path)
        if context.method_name == "__call__" and isinstance(layer, exact.LeakyRelu):
            slopes += layer.has_variable(exact.COLLECTION, "slope")
        return call(*args, **kwargs)

    sample = slices_of(codec, photos[0][:64, :64])  # before: it may trace networks that decide nothing
    with nn.intercept_methods(watch):
        jax.eval_shape(
            lambda variables, *sample: codec.module.apply(variables, *sample, method=calibration._walk),
            codec.exact,
            *sample,
        )
    assert not floats
    assert seen == calibration._layers(codec.exact[exact.COLLECTION]).keys()
    # The hyper-decoder's three; for each of two groups a spatial context and three of aggregation, and three of context.
    assert (len(seen), slopes) == ((3, 2) if name == "tiny_hyperprior" else (3 + 2 * 4 + 3, 0))


def test_parameters_are_rounded_to_their_grids(tiny_hyperprior):
    params, exactly = (jax.device_get(tree) for tree in (tiny_hyperprior.params, tiny_hyperprior.exact))
    for path, grid in calibration._layers(exactly[exact.COLLECTION]).items():
        floats, layer = calibration._at(params, path), calibration._at(exactly["params"], path)
        sums = grid["sums"].astype(int)
        kernel = np.ldexp(layer["kernel"], grid["inputs"].reshape(-1).astype(int)[:, None] - sums)
        bias = np.ldexp(layer["bias"], -sums - int(grid["shift"]))
        assert np.array_equal(kernel, np.rint(kernel))
        assert np.array_equal(bias, np.rint(bias))
        assert not np.array_equal(layer["kernel"], floats["kernel"])
    assert not np.array_equal(exactly["params"]["h_s"]["layers_0"]["bias"], params["h_s"]["layers_0"]["bias"])


@pytest.mark.parametrize("name", ["tiny_codec", "tiny_hyperprior"])
def test_all_means_of_a_photo_are_on_their_grid(name, request, photos):
    codec = request.getfixturevalue(name)
    latents, quality = slices_of(codec, photos[1][:128, :128])

    def means(module, latents, quality):
        state, result = module.begin(1, latents["z"].shape[1:3], quality), []
        for i in range(module.slices):
            _, mean, _ = module.predict(i, state)
            result.append(mean)
            state = module.place(i, state, jnp.round(module.values_of(i, latents) - mean) + mean)
        return result

    run = jax.jit(lambda variables: codec.module.apply(variables, latents, quality, method=means))
    for mean in run(codec.exact)[1:]:
        units = np.asarray(mean, np.float64) * 256
        assert np.array_equal(units, np.rint(units))
        assert 0 < np.abs(mean).max() <= 1 << 12
    floats = [np.asarray(mean) * 256 for mean in run({"params": codec.params})[1:]]
    assert all((mean != np.rint(mean)).any() for mean in floats), "in floats they must not lie there by themselves"


# -- training with the quantisation in the loop --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch(photos):
    return np.stack([photo[:64, :64] for photo in photos[:2]]).astype(np.float32) / 255, np.array([0, 1], np.float32)


def test_training_reaches_every_kernel_of_the_slice_networks(tiny_codec, grids, batch):
    params = flatten_dict(tiny_codec.params)
    kernels = {(*path, "kernel"): params[*path, "kernel"] for path in calibration._layers(grids)}
    assert len(kernels) == 14  # three of h_s, three of a channel context, and four of each of two groups

    @jax.jit
    @jax.grad
    def gradient(kernels):
        variables = calibration.training_variables(unflatten_dict({**params, **kernels}), grids)
        return tiny_codec.module.apply(variables, *batch, jax.random.key(0))["bits_y"].sum()

    gradients = jax.device_get(gradient(kernels))
    assert [path for path, leaf in gradients.items() if not np.isfinite(leaf).all()] == []
    assert [path for path, leaf in gradients.items() if not leaf.any()] == []


def test_the_forward_pass_of_training_is_that_of_the_exact_codec(tiny_codec, grids, batch):
    training = calibration.training_variables(tiny_codec.params, grids)
    first = training["params"]["h_s"]["layers_0"]["kernel"]
    assert not np.array_equal(first, tiny_codec.params["h_s"]["layers_0"]["kernel"])

    @jax.jit
    def run(variables):
        outputs = tiny_codec.module.apply(variables, *batch)
        return {name: outputs[name] for name in ("bits_y", "y_hat", "z_hat")}

    jax.tree.map(np.testing.assert_array_equal, run(training), run(tiny_codec.exact))


# -- fitted tables -------------------------------------------------------------------------------------------------------


def bits(tables, table, symbols):
    """What a table spends on symbols within it."""
    return -np.log2(tables.row(table)[symbols - tables.offsets[table]] / 2**16).sum()


def test_tables_are_fitted_to_heavier_tails_and_only_where_symbols_were_seen():
    rng, before = np.random.default_rng(0), gaussian_tables(quantise=quantise_counts)
    seen, unseen = (np.round(rng.laplace(scale=0.7, size=4000)).astype(np.int32) for _ in range(2))
    table = 17  # sigma = 0.89
    inside = np.abs(unseen) < -before.offsets[table]
    z = (np.full(3, len(before)), np.zeros(3, np.int32))
    after = calibration._fit_tables(before, [[z, (np.full(seen.shape, table), seen)]], 1)
    assert bits(after, table, unseen[inside]) < 0.99 * bits(before, table, unseen[inside])
    assert np.abs(after.row(table)[:-1] - after.row(table)[:-1][::-1]).max() <= 1
    for other in {*range(len(before))} - {table}:
        assert np.array_equal(after.row(other), before.row(other))


def test_calibrating_again_changes_nothing(tiny_codec, photos):
    crops = [photo[:64, :64] for photo in photos[:2]]
    once = calibration.calibrate(tiny_codec, crops)
    assert calibration.calibrate(once, crops).digest == once.digest


def test_an_escape_counts_as_one():
    before = gaussian_tables(quantise=quantise_counts)
    symbols = np.full(5000, 1000, np.int32)
    z = (np.zeros(0, np.int32), np.zeros(0, np.int32))
    after = calibration._fit_tables(before, [[z, (np.full(5000, 3), symbols)]], 1)
    assert after.row(3)[-1] > 0.8 * 2**16
