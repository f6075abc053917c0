"""What LLaVA takes of images, against transformers' processors and packing."""

import dataclasses

import numpy as np
import pytest

from jaxsem.backbones.clip_config import VisionConfig
from jaxsem.backbones.clip_inputs import normalize
from jaxsem.backbones.llama import LlamaConfig
from jaxsem.backbones.llava_config import LLAVA_16_MISTRAL_7B, LlavaConfig
from jaxsem.backbones.llava_inputs import NEWLINE, best_pinpoint, square, tile_order, tiles
from jaxsem.errors import InputError

SIDE = 28
POINTS = ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))
VISION = VisionConfig(16, 2, 2, 24, 14, SIDE)
CONFIG = LlavaConfig(VISION, LlamaConfig(32, 2, 4, 4, 48, 64, 96), grid_pinpoints=POINTS)
# Wide, high, square, odd, smaller than a tile, narrow.
SIZES = [(40, 90), (101, 37), (64, 64), (57, 55), (9, 13), (5, 200), (300, 11)]


def photo(height, width):
    return np.random.RandomState(height * 1000 + width).randint(0, 256, (height, width, 3)).astype(np.uint8)


def processor(module, name, **options):
    pytest.importorskip("transformers")
    import importlib

    made = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    return made(**size, **options)


@pytest.mark.parametrize("fit", ["pad", "crop"])
@pytest.mark.parametrize("size", SIZES[:5], ids=str)
def test_squares_are_those_of_transformers(fit, size):
    theirs = processor("llava.image_processing_pil_llava", "LlavaImageProcessorPil", do_pad=fit == "pad")
    want = theirs(photo(*size), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    found = normalize(square(photo(*size), SIDE, fit).astype(np.float32) / 255)
    np.testing.assert_allclose(found, want, atol=1e-5)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tiles_are_those_of_transformers(size):
    points = [list(point) for point in POINTS]
    theirs = processor(
        "llava_next.image_processing_pil_llava_next", "LlavaNextImageProcessorPil", image_grid_pinpoints=points
    )
    want = theirs(photo(*size), return_tensors="np")["pixel_values"][0].transpose(0, 2, 3, 1)
    found = normalize(tiles(photo(*size), CONFIG).astype(np.float32) / 255)
    np.testing.assert_allclose(found, want, atol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, LLAVA_16_MISTRAL_7B], ids=["small", "published"])
def test_the_choice_of_a_size_is_that_of_transformers(config):
    pytest.importorskip("transformers")
    from transformers.image_processing_utils import select_best_resolution

    points = [list(point) for point in config.grid_pinpoints]
    for size in np.random.RandomState(0).randint(60, 1500, (300, 2)).tolist():
        assert best_pinpoint(size, config.grid_pinpoints) == select_best_resolution(size, points)


def test_the_number_of_tokens_is_that_of_transformers():
    pytest.importorskip("transformers")
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    count = LlavaNextProcessor._get_unpadded_features
    for size in np.random.RandomState(1).randint(50, 1500, (60, 2)).tolist():
        height, width = best_pinpoint(size, LLAVA_16_MISTRAL_7B.grid_pinpoints)
        want = 576 + sum(count(None, *size, 24, 24, height // 336, width // 336))
        assert len(tile_order(size, LLAVA_16_MISTRAL_7B)) == want


def test_the_rows_of_tiles_are_joined_and_end_in_newlines():
    order = tile_order((56, 56), CONFIG)
    assert order[:4].tolist() == [0, 1, 2, 3]
    # Two squares beside each other, of 2x2 tokens each, and two below.
    assert order[4:9].tolist() == [4, 5, 8, 9, NEWLINE]
    assert order[9:14].tolist() == [6, 7, 10, 11, NEWLINE]
    assert order.shape == (4 + 4 * 5,)


def test_bars_are_left_out():
    assert best_pinpoint((28, 20), POINTS) == (28, 56)
    assert len(tile_order((28, 20), CONFIG)) == 4 + 2 * (2 + 1)  # 20 of 56 columns show
    assert len(tile_order((14, 84), CONFIG)) == 4 + 2 * (6 + 1)  # half a token above and half a token below
    assert len(tile_order((7, 84), CONFIG)) == 4  # a line thinner than a token: the whole image alone


@pytest.mark.parametrize("shape", [(3, 1000), (1000, 3)])
def test_a_line_of_pixels_is_padded_without_gigabytes(shape):
    pixels = np.full((*shape, 3), 255, np.uint8)
    found = square(pixels, SIDE)
    middle = found[13] if shape[0] < shape[1] else found[:, 13]
    assert (middle > 200).all()
    assert found[0, 0].tolist() == [122, 116, 104]


def test_an_image_of_which_nothing_is_left_is_refused():
    with pytest.raises(InputError, match="1000x1 pixels is too narrow"):
        tiles(np.zeros((1, 1000, 3), np.uint8), CONFIG)


def test_another_fit_is_refused():
    with pytest.raises(InputError, match="'stretch'; there are pad, crop"):
        square(photo(4, 4), SIDE, "stretch")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision": None}, "made of a VisionConfig and a LlamaConfig"),
        ({"image_token": -200}, "image_token=-200; it takes an id of at least 0"),
        ({"feature_layer": 3}, "feature_layer=3, and a tower of 2 layers has those from -3 to 2"),
        ({"feature_layer": [-2, -1]}, r"feature_layer=\[-2, -1\]"),
        ({"keep_class": 1}, "keep_class=1"),
        ({"keep_class": True}, "grid_pinpoints with images of 28x28 and keep_class=True"),
        ({"activation": "tanh"}, "no activation 'tanh'"),
        ({"grid_pinpoints": ((28, 57),)}, r"squares of 28 do not fill \(28, 57\)"),
        ({"grid_pinpoints": ([28, 56],)}, r"do not fill \[28, 56\]"),
    ],
)
def test_configs_that_cannot_be_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **change)
