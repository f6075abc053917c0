"""What goes into SAM and what becomes of its masks, against transformers' processor."""

import jax
import numpy as np
import pytest

from jaxsem.backbones.sam_inputs import (
    MEAN,
    STD,
    mask_matrix,
    postprocess_masks,
    preprocess,
    resample,
    resized_size,
    scale_prompts,
)
from jaxsem.errors import InputError

SIZES = [(48, 64), (70, 31), (90, 90), (13, 40)]


def processor(size=64):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    sides = {"height": size, "width": size}
    return transformers.SamProcessor(transformers.SamImageProcessorPil(size={"longest_edge": size}, pad_size=sides))


# -- images -----------------------------------------------------------------------------------------------------------


def test_images_are_those_of_transformers(noise_photo):
    images = [noise_photo(*size, seed) for seed, size in enumerate(SIZES)]
    found = preprocess(images, 64)
    want = processor()(images, return_tensors="np")
    assert found.pixels.dtype == np.float32
    np.testing.assert_allclose(found.pixels, np.stack(want["pixel_values"]).transpose(0, 2, 3, 1), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found.original, want["original_sizes"])
    np.testing.assert_array_equal(found.resized, want["reshaped_input_sizes"])


def test_the_rest_of_the_input_is_zero(noise_photo):
    found = preprocess([noise_photo(20, 64), noise_photo(64, 20)], 32)
    assert found.resized == ((10, 32), (32, 10))
    assert found.pixels.shape == (2, 32, 32, 3)
    assert not found.pixels[0, 10:].any()
    assert not found.pixels[1, :, 10:].any()
    assert np.abs(found.pixels[0, :10]).min(axis=-1).all()


def test_white_and_black_are_normalised_by_the_moments_of_imagenet():
    images = [np.full((8, 8, 3), level, np.uint8) for level in (0, 255)]
    found = preprocess(images, 4).pixels[:, 0, 0]
    np.testing.assert_allclose(found, [-MEAN / STD, (1 - MEAN) / STD], rtol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (3000, 1)])
def test_images_of_any_shape_keep_a_pixel(size):
    found = preprocess([np.full((*size, 3), 200, np.uint8)], 64)
    assert min(found.resized[0]) >= 1
    assert max(found.resized[0]) == 64
    height, width = found.resized[0]
    assert found.pixels[0, :height, :width].all()


def test_what_is_no_image_is_refused():
    with pytest.raises(InputError, match="no image to preprocess"):
        preprocess([])
    with pytest.raises(InputError, match="must be uint8"):
        preprocess([np.zeros((8, 8, 3), np.float32)])


# -- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_prompts_are_scaled_as_in_transformers(noise_photo, size):
    random = np.random.RandomState(0)
    points, boxes = random.uniform(0, 40, (1, 3, 2, 2)), random.uniform(0, 40, (1, 3, 4))
    given = {"input_points": points.tolist(), "input_boxes": boxes.tolist()}
    want = processor()(noise_photo(*size), **given, return_tensors="np")
    np.testing.assert_allclose(scale_prompts(points, size, 64), want["input_points"], rtol=1e-6)
    np.testing.assert_allclose(scale_prompts(boxes, size, 64), want["input_boxes"], rtol=1e-6)


def test_places_that_are_neither_points_nor_boxes_are_refused():
    with pytest.raises(InputError, match=r"\[..., 2\] points or \[..., 4\] boxes, not of shape \[2, 3\]"):
        scale_prompts(np.zeros((2, 3)), (10, 10))


# -- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [*SIZES, (300, 400)])
def test_masks_are_those_of_transformers(size):
    torch = pytest.importorskip("torch")
    logits = (5 * np.random.RandomState(1).standard_normal((3, 2, 16, 16))).astype(np.float32)
    resized = resized_size(size, 64)
    (want,) = processor().post_process_masks([torch.from_numpy(logits)], [size], [resized], binarize=False)
    found = postprocess_masks(logits, size, 64)
    assert found.shape == (3, 2, *size)
    np.testing.assert_allclose(found, want.numpy(), rtol=0, atol=2e-5)  # logits are up to 18


def test_a_mask_ends_where_the_image_does():
    """What lies in the padding is cut away, not shown at the border."""
    logits = np.full((16, 16), -3.0, np.float32)
    logits[:8] = 2.0
    assert (postprocess_masks(logits, (30, 64), 64) > 0).all()
    assert not (postprocess_masks(logits, (60, 64), 64) > 0).all()


def test_matrices_with_zeros_below_serve_several_sizes_with_one_program():
    logits = np.random.RandomState(2).standard_normal((2, 16, 16)).astype(np.float32)
    run = jax.jit(resample)
    for height, width in SIZES[:2]:
        rows, columns = np.zeros((80, 16), np.float32), np.zeros((80, 16), np.float32)
        new_height, new_width = resized_size((height, width), 64)
        rows[:height] = mask_matrix(16, 64, new_height, height)
        columns[:width] = mask_matrix(16, 64, new_width, width)
        found = run(logits, rows, columns)
        np.testing.assert_allclose(found[:, :height, :width], postprocess_masks(logits, (height, width), 64), atol=1e-6)
        assert not np.asarray(found)[:, height:].any()
    assert run._cache_size() == 1


def test_logits_that_are_no_masks_are_refused():
    with pytest.raises(InputError, match=r"logits of shape \[16\] for an image of 20x30"):
        postprocess_masks(np.zeros(16, np.float32), (20, 30))
    with pytest.raises(InputError, match="for an image of 0x30"):
        postprocess_masks(np.zeros((16, 16), np.float32), (0, 30))
