"""Referring semantic compression: from images and demands to items, and back."""

import dataclasses

import jax
import numpy as np
import pytest
from toy_rsic import toy_rsic

import jaxsem
from jaxsem.container import Item, pack, unpack
from jaxsem.errors import FormatError, InputError, WeightsError
from jaxsem.systems.rsic import Demand, weight_levels
from jaxsem.systems.rsic_coding import CAPTION, LATENTS, MAP, compress_batch, decode_latents, decompress_batch, parse
from jaxsem.systems.rsic_config import GuidanceConfig
from jaxsem.systems.weight_map import Box, Click, Mask

TEXT = "a red star"


@pytest.fixture(scope="module")
def codec():
    return toy_rsic()


@pytest.fixture(scope="module")
def photos(noise_photo):
    return [noise_photo(24, 16, seed) for seed in range(3)]


def marked(*regions, **options):
    return Demand(TEXT, regions=regions, **options)


@pytest.fixture(scope="module")
def items(codec, photos):
    demands = [marked(Box(4, 4, 8, 8)), marked(Click(2, 20)), Demand("", level=1.0)]
    return compress_batch(codec, photos, demands, 4)


def test_images_come_back_with_their_size(codec, photos, items):
    parsed = [parse(codec, unpack(pack(one.item, codec.digest)).items[0]) for one in items]
    assert [each.text for each in parsed] == [TEXT, TEXT, ""]
    images = decompress_batch(codec, parsed, 4)
    assert [image.shape for image in images] == [photo.shape for photo in photos]
    assert all(image.dtype == np.uint8 for image in images)


def test_a_file_does_not_depend_on_its_batch(codec, photos, items):
    [alone] = compress_batch(codec, photos[1:2], [marked(Click(2, 20))], 1)
    assert alone.item.sections == items[1].item.sections
    together, _ = decode_latents(codec, [parse(codec, one.item) for one in items], 4)
    single, _ = decode_latents(codec, [parse(codec, items[1].item)], 1)
    np.testing.assert_allclose(together[1], single[0], atol=1e-5)


def test_marked_regions_take_bits_where_they_are(codec, photos):
    sizes = []
    for demand in (Demand("", level=0.0), marked(Box(0, 0, 8, 8)), marked(Box(0, 0, 16, 24)), Demand("", level=1.0)):
        [one] = compress_batch(codec, photos[:1], [demand], 1)
        sizes.append(len(one.item.sections[LATENTS]))
    assert sizes[0] < sizes[1] < sizes[2]
    assert sizes[2] == sizes[3]


def test_the_estimate_is_near_the_bytes(items):
    for one in items:
        real = 8 * sum(map(len, one.item.sections.values()))
        assert abs(real - one.estimated_bits) <= 0.05 * real + 96


def test_sections_are_left_out_where_they_say_nothing(codec, photos):
    one_level = dataclasses.replace(
        codec,
        config=dataclasses.replace(codec.config, weight_map=dataclasses.replace(codec.config.weight_map, levels=1)),
    )
    [one] = compress_batch(one_level, photos[:1], [Demand("")], 1)
    assert set(one.item.sections) == {LATENTS}
    assert parse(codec, one.item).levels.max() == 0


def test_floats_are_coded_too_and_the_packet_says_so(codec, photos):
    floats = codec.in_arithmetic("float")
    [one] = compress_batch(floats, photos[:1], [marked(Box(4, 4, 8, 8))], 2)
    assert not parse(codec, one.item).exact
    images = decompress_batch(codec, [parse(codec, one.item)], 1)
    assert images[0].shape == photos[0].shape
    assert floats.in_arithmetic("exact").arithmetic == "exact"
    with pytest.raises(WeightsError, match="calibrate it"):
        dataclasses.replace(floats, exact=None).in_arithmetic("exact")


def test_a_codec_decodes_files_of_both_arithmetics(codec, items):
    floats = codec.in_arithmetic("float")
    first, second = (decompress_batch(each, [parse(each, items[0].item)], 1)[0] for each in (codec, floats))
    np.testing.assert_array_equal(first, second)


@pytest.mark.slow  # compiles everything for a second size
def test_the_pipeline_takes_demands_and_images_of_several_sizes(codec, noise_photo):
    photos = [noise_photo(24, 16), noise_photo(8, 30, 1), noise_photo(24, 16, 2)]
    demands = [marked(Box(0, 0, 4, 4)), Demand(""), Demand(TEXT, level=1.0)]
    files = jaxsem.compress(codec, photos, demands=demands, batch=2)
    images = jaxsem.decompress(codec, files, batch=2)
    assert [image.shape for image in images] == [photo.shape for photo in photos]
    [alone] = jaxsem.compress(codec, photos[2:], demands=demands[2:], batch=1)
    assert alone == files[2]
    with pytest.raises(InputError, match="fewer demands than images"):
        jaxsem.compress(codec, photos, demands=demands[:2])


def test_other_codecs_cannot_be_asked(tiny_codec, photos):
    with pytest.raises(InputError, match="cannot be told what matters"):
        jaxsem.compress(tiny_codec, photos[:1], demands=[Demand("")])


# -- maps -----------------------------------------------------------------------------------------------------------------


def test_without_a_demand_the_quality_is_the_level(codec, photos):
    for quality in (0, 3, 7):
        assert (weight_levels(codec.at_quality(quality), photos[0], Demand()) == quality).all()
    with pytest.raises(InputError, match="whole qualities 0 to 7, not 8"):
        codec.at_quality(8)


def test_regions_lie_over_a_background(codec, photos):
    pixels = np.zeros((24, 16), bool)
    pixels[:8, 8:] = True
    found = weight_levels(codec, photos[0], marked(Mask(pixels), background=0.3))
    assert found.shape == (6, 4)
    assert (found[:2, 2:] == 7).all()
    assert (found[2:] == 2).all()


def test_phrases_are_looked_for(codec, photos):
    found = weight_levels(codec, photos[0], Demand(TEXT, phrases=("red star",)))
    assert found.min() < found.max()
    with pytest.raises(InputError, match="finds nothing"):
        weight_levels(dataclasses.replace(codec, least_peak=1.0), photos[0], Demand(phrases=("red star",)))
    with pytest.raises(InputError, match="has no CLIP"):
        weight_levels(dataclasses.replace(codec, clip=None), photos[0], Demand(phrases=("red star",)))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"level": 1.5}, "level=1.5"), ({"background": -1}, "background=-1"), ({"phrases": (" ",)}, "phrase is empty")],
)
def test_impossible_demands_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Demand(**options)


# -- descriptions ---------------------------------------------------------------------------------------------------------


def test_a_captioner_writes_what_is_missing(codec, photos):
    writer = dataclasses.replace(codec, describe=lambda images: ["a blue ring"] * len(images))
    results = compress_batch(writer, photos[:2], [Demand(), Demand(TEXT)], 2)
    assert [parse(codec, one.item).text for one in results] == ["a blue ring", TEXT]
    with pytest.raises(InputError, match="nothing to describe images with"):
        compress_batch(codec, photos[:1], [Demand()], 1)


def test_a_long_description_is_kept_whole_and_noted(codec, photos):
    text = " and ".join(["a red star"] * 30)
    [one] = compress_batch(codec, photos[:1], [Demand(text)], 1)
    assert parse(codec, one.item).text == text
    assert "sees only its first" in one.notes[0]
    assert len(one.item.sections[CAPTION]) < len(text) / 3


def test_words_that_the_model_does_not_know_are_refused(codec, photos):
    with pytest.raises(InputError, match="unicorn"):
        compress_batch(codec, photos[:1], [Demand("a unicorn")], 1)


# -- decoding -------------------------------------------------------------------------------------------------------------


def test_decoding_repeats_for_a_seed_and_changes_with_its_numbers(codec, items):
    parsed = [parse(codec, items[0].item)]
    first = decompress_batch(codec, parsed, 1)[0]
    np.testing.assert_array_equal(first, decompress_batch(codec, parsed, 1)[0])
    other = decompress_batch(codec.decoding(seed=5, recurrences=3), parsed, 1)[0]
    assert (first != other).any()
    with pytest.raises(InputError, match="take 1 to 4 steps"):
        codec.decoding(steps=5)


def test_a_pull_too_strong_is_said(codec, items):
    with pytest.raises(InputError, match="take a lower gamma"):
        decompress_batch(codec.decoding(gamma=1e30, recurrences=4), [parse(codec, items[0].item)], 1)


# -- damage ---------------------------------------------------------------------------------------------------------------


def test_a_map_of_another_file_is_found_out(codec, items):
    swapped = {**items[0].item.sections, MAP: items[1].item.sections[MAP]}
    with pytest.raises(FormatError):
        decode_latents(codec, [parse(codec, Item(24, 16, swapped))], 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({LATENTS: b""}, "none of toy-rsic"),
        ({LATENTS: b"\x47abc"}, "begins with 0x47"),
        ({CAPTION: b"\x07hello"}, "no kind 7"),
        ({CAPTION: b"\x01\xff\xff"}, "description is damaged"),
        ({CAPTION: b"\x00\xff"}, "description is damaged"),
        ({MAP: b"\x00\x01\x02\x03\x04"}, "map"),
        ({3: b"x"}, "none of toy-rsic"),
    ],
)
def test_damaged_sections_are_refused(codec, items, change, message):
    item = Item(24, 16, {**items[0].item.sections, **change})
    with pytest.raises(FormatError, match=message):
        parse(codec, item)


def test_exact_files_need_exact_arithmetic(codec, items):
    with pytest.raises(FormatError, match="made in exact arithmetic"):
        parse(dataclasses.replace(codec, exact=None), items[0].item)


def test_the_papers_numbers_are_the_defaults():
    guidance = GuidanceConfig()
    assert (guidance.steps, guidance.recurrences, guidance.gamma, guidance.scale, guidance.relax) == (
        50,
        8,
        1000,
        3,
        0.7,
    )


# -- pure functions -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch(photos):
    weight = np.zeros((3, 6, 4), np.float32)
    weight[:, :2] = 1.0
    return {"image": np.stack(photos), "weight": weight}


def test_the_pure_functions_are_those_of_files(codec, photos, batch):
    [one] = compress_batch(codec, photos[:1], [marked(Box(0, 0, 16, 8))], 1)
    parsed = parse(codec, one.item)
    z_hat, weight = decode_latents(codec, [parsed], 1)
    np.testing.assert_array_equal(weight, batch["weight"][:1])
    latents = {"z_hat": z_hat, "weight": weight, "context": codec.text([TEXT])}
    [image] = np.asarray(codec.synthesize(codec.params, latents))
    np.testing.assert_array_equal(image, decompress_batch(codec, [parsed], 1)[0])
    found = codec.analyze(codec.params, {name: value[:1] for name, value in batch.items()})
    assert set(found) == {"z", "f_0", "f_1"}
    assert np.square(found["z"] - z_hat).mean() < np.square(found["z"]).mean()


def test_the_loss_trains_the_codec_alone(codec, batch):
    gradients, metrics = jax.jit(jax.grad(codec.loss, has_aux=True))(codec.params, batch, jax.random.key(0))
    sizes = {part: sum(float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(gradients[part])) for part in gradients}
    assert sizes["codec"] > 0
    assert sizes["autoencoder"] == sizes["unet"] == 0
    assert metrics.keys() >= {"bpp", "mse", "weighted"}
