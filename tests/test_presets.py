import hashlib

import jax
import numpy as np
import pytest

from jaxsem import pipeline, presets
from jaxsem.codecs import param_shapes
from jaxsem.container import pack
from jaxsem.data.images import list_images, read_image
from jaxsem.errors import InputError, WeightsError
from jaxsem.metrics import anchors, psnr
from jaxsem.systems import feature_files, mllm_files, neck_codec
from jaxsem.systems.transform_neck import NeckCodecConfig
from jaxsem.weights.native import check_shapes

SHIPPED = [preset for preset in presets.PRESETS.values() if preset.weights]
PHOTOS = list_images(presets.BUNDLED_PHOTOS)


@pytest.fixture(scope="module")
def mini():
    return presets.load("elic-mini")


def test_all_shipped_weights_are_small():
    sizes = {preset.name: (presets.ASSETS / preset.weights).stat().st_size for preset in SHIPPED}
    limits = {"elic-mini": 12e6, "pqvae-mini": 8e6, "llava-mini": 4e6}
    limits |= {f"transform-neck-mini{suffix}": 4.5e6 for suffix in ("", "-d2", "-d3")}
    assert sizes.keys() == limits.keys()
    assert all(size <= limits[name] for name, size in sizes.items())


@pytest.mark.parametrize("preset", SHIPPED, ids=lambda preset: preset.name)
def test_a_record_describes_its_weights_file(preset):
    file = presets.read_weights(presets.ASSETS / preset.weights)
    assert hashlib.sha256((presets.ASSETS / preset.weights).read_bytes()).hexdigest() == preset.sha256
    assert _config_of(file) == preset.config
    assert {"trained_on", "licence", "date"} <= set(file.card)
    if preset.system != presets.LANGUAGE:
        assert len(preset.results) >= presets.load(preset.name).qualities
    assert preset.results
    assert all(len(row) == len(preset.columns) for row in preset.results)


def _config_of(file):
    if file.system == presets.FEATURES:
        return feature_files.parse_config(file.config)
    if file.system == presets.LANGUAGE:
        fields = {name: value for name, value in file.config.items() if name not in ("words", "marks", "template")}
        return mllm_files.parse_config(fields)
    if file.system == presets.NECK:
        inside, neck, _, scenario = neck_codec.split_file("a test", file)
        return NeckCodecConfig(inside.system, presets.build_module(inside.system, inside.config).config, neck, scenario)
    return presets.build_module(file.system, file.config).config


def test_real_bytes_are_within_one_percent_and_twelve_bytes_of_the_estimate(mini):
    for path in PHOTOS[:2]:
        photo = read_image(path)
        for quality in (0, 3):
            [result] = pipeline.compress_items(mini.at_quality(quality), [photo])
            size = len(pack(result.item, mini.digest))
            estimate = result.estimated_bits / 8
            assert 0.99 * estimate < size <= 1.01 * estimate + 12, (path.name, quality, size, estimate)


def test_photos_come_back_better_than_from_a_jpeg_of_more_bytes(mini):
    jpeg = anchors.find_anchor("jpeg")
    for path in PHOTOS:
        photo = read_image(path)[:256, :256]
        [data] = pipeline.compress(mini.at_quality(1), [photo])
        [again] = pipeline.decompress(mini, [data])
        files = (anchors.encode(jpeg, photo, quality) for quality in range(1, 60))
        larger = next(file for file in files if len(file) >= len(data))
        assert float(psnr(photo, again)) > float(psnr(photo, anchors.decode(larger))) + 0.5, path.name


def test_saving_and_loading_changes_nothing(tiny_codec, tmp_path):
    presets.save(tiny_codec, tmp_path, "elic", {"note": "test"})
    again = presets.load(str(tmp_path), quality=0)
    assert again.digest == tiny_codec.digest
    assert again.tables.digest() == tiny_codec.tables.digest()
    assert all(map(np.array_equal, jax.tree.leaves(again.params), jax.tree.leaves(tiny_codec.params)))


def test_full_precision_survives_where_it_is_asked_for(tiny_codec, tmp_path):
    params = jax.device_get(tiny_codec.params)
    params["g_a"]["layers_0"]["kernel"] = params["g_a"]["layers_0"]["kernel"] + np.float32(1e-7)
    codec = presets.freeze("tiny", tiny_codec.module, params, half=False)
    presets.save(codec, tmp_path, "elic", {})
    again = presets.load(str(tmp_path))
    assert np.array_equal(again.params["g_a"]["layers_0"]["kernel"], params["g_a"]["layers_0"]["kernel"])


@pytest.mark.parametrize("name", ["elic", "elic-official", "hyperprior", "bmshj2018-factorized-wide"])
def test_a_preset_without_weights_says_how_to_give_them(name):
    with pytest.raises(WeightsError, match=r"weights='elic\.pth\.tar'"):
        presets.load(name)


def test_an_unknown_name_lists_the_presets(tmp_path):
    with pytest.raises(InputError, match="elic-mini"):
        presets.load(str(tmp_path / "nothing"))


def test_misshapen_parameters_are_all_named(tiny_codec):
    params = jax.device_get(tiny_codec.params)
    params = {**params, "extra": {"bias": np.zeros(2)}}
    params["g_a"] = {**params["g_a"], "layers_0": {"kernel": np.zeros((5, 5, 3, 9))}}
    with pytest.raises(WeightsError) as caught:
        check_shapes(param_shapes(tiny_codec.module), params, "file")
    message = str(caught.value)
    assert "missing g_a/layers_0/bias (8,)" in message
    assert "surplus extra/bias (2,)" in message
    assert "g_a/layers_0/kernel is (5, 5, 3, 9), not (5, 5, 3, 8)" in message
