"""Weights files of referring semantic compression."""

import dataclasses

import numpy as np
import pytest
from toy_clip import toy_clip
from toy_rsic import toy_grids, toy_rsic

from jaxsem.errors import InputError, WeightsError
from jaxsem.systems import rsic_files
from jaxsem.systems.gem import GemConfig
from jaxsem.systems.rsic import Demand
from jaxsem.systems.rsic_coding import compress_batch, decompress_batch, parse
from jaxsem.systems.rsic_files import Companions, assemble, digest_of_file, from_file, save_rsic
from jaxsem.systems.weight_map import Box
from jaxsem.weights.native import half_kernels, read_weights

COMPANIONS = Companions("toy", gem=GemConfig(depth=2, template=None, image_size=None), least_contrast=0.0)


@pytest.fixture(autouse=True)
def toy_for_clip(monkeypatch):
    monkeypatch.setattr(rsic_files, "_clip_of", lambda source: toy_clip())


@pytest.fixture(scope="module")
def parts():
    codec = toy_rsic(exact=False)
    codec = dataclasses.replace(codec, params={name: half_kernels(value) for name, value in codec.params.items()})
    return codec, *toy_grids(codec)


@pytest.fixture
def saved(parts, tmp_path):
    codec, grids, tables = parts
    whole = assemble("toy", codec.config, codec.params, tables, COMPANIONS, grids)
    save_rsic(whole, tmp_path / "rsic.safetensors", COMPANIONS, grids, {"date": "today"})
    return whole, tmp_path / "rsic.safetensors"


def test_a_saved_codec_reads_the_files_of_the_first(saved, noise_photo):
    codec, path = saved
    file = read_weights(path)
    again = from_file("again", file)
    assert again.digest == codec.digest == digest_of_file(file)
    assert (again.config, again.gem, again.least_contrast) == (codec.config, codec.gem, 0.0)
    photo, demand = noise_photo(16, 16), Demand("a red star", regions=(Box(0, 0, 8, 8),))
    [one], [other] = (compress_batch(each, [photo], [demand], 1) for each in (codec, again))
    assert one.item == other.item
    images = [decompress_batch(each, [parse(each, one.item)], 1)[0] for each in (codec, again)]
    np.testing.assert_array_equal(*images)


def test_how_files_are_decoded_is_no_part_of_the_digest(saved):
    codec, _ = saved
    other = codec.decoding(steps=3, seed=2)
    digest = rsic_files.digest_of(rsic_files.plain(other.config), codec.params, codec.tables, None)
    assert digest == rsic_files.digest_of(rsic_files.plain(codec.config), codec.params, codec.tables, None)


def test_parts_that_do_not_fit_are_refused(parts, saved):
    codec, grids, tables = parts
    unet = dataclasses.replace(codec.config.unet, context_width=8)
    with pytest.raises(InputError, match="gives 16 numbers a token"):
        assemble("toy", dataclasses.replace(codec.config, unet=unet), codec.params, tables, COMPANIONS, grids)
    unet = dataclasses.replace(codec.config.unet, widths=(16, 16))
    with pytest.raises(WeightsError, match="the unet of toy"):
        assemble("toy", dataclasses.replace(codec.config, unet=unet), codec.params, tables, COMPANIONS, grids)
    file = read_weights(saved[1])
    for change in ({"unet": {"depth": 3}}, {"companions": {"clip": "toy"}}, {"schedule": {"beta_start": -1}}):
        with pytest.raises(WeightsError, match="do not fit together"):
            from_file("damaged", dataclasses.replace(file, config={**file.config, **change}))
