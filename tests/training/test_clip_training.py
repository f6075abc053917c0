import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsem import losses
from jaxsem.backbones.clip_config import ClipConfig, TextConfig, VisionConfig
from jaxsem.data.scenes import CLASSES, SEEN_CLASSES, SHAPES, SceneConfig, batch, sample_scene
from jaxsem.data.words import WordTokenizer
from jaxsem.training import OptimizerConfig, create_state, make_optimizer, step_fn
from jaxsem.training.clip import (
    ClipTrainee,
    ScenePairs,
    class_prompts,
    clip_loss,
    cut_object,
    object_text,
    patch_classes,
    scene_accuracy,
)

WORDS = len(WordTokenizer())
CONFIG = ClipConfig(
    VisionConfig(16, 1, 2, 32, patch=8, image_size=32, activation="gelu", stem=(4, 8)),
    TextConfig(16, 1, 2, 32, vocabulary=WORDS, context=40, activation="gelu"),
    12,
)


@pytest.fixture(scope="module")
def pairs():
    return next(ScenePairs(CONFIG, 16))


@pytest.fixture(scope="module")
def params(pairs):
    return jax.jit(ClipTrainee(CONFIG).init)(jax.random.key(0), pairs["image"], pairs["tokens"])["params"]


def test_a_batch_depends_on_seed_and_position_alone(pairs):
    again = ScenePairs(CONFIG, 16)
    again.set_state({"batches": 1})
    second = next(again)
    assert again.get_state() == {"batches": 2}
    again.set_state({"batches": 0})
    first = next(again)
    assert all(np.array_equal(first[name], pairs[name]) for name in pairs)
    assert not np.array_equal(second["image"], first["image"])
    assert not np.array_equal(next(ScenePairs(CONFIG, 16, seed=1))["image"], first["image"])


def test_equal_names_mean_equal_texts(pairs):
    for i in range(16):
        for j in range(16):
            assert (pairs["names"][i] == pairs["names"][j]) == np.array_equal(pairs["tokens"][i], pairs["tokens"][j])


def test_only_seen_classes_are_trained_on():
    pairs = next(ScenePairs(CONFIG, 64, seed=3))
    found = {(c - 1) * len(SHAPES) + s - 1 for c, s in zip(pairs["colours"].ravel(), pairs["shapes"].ravel()) if s}
    assert found
    assert {CLASSES[number] for number in found} <= set(SEEN_CLASSES)


def test_patches_are_named_after_what_covers_them():
    mask = np.zeros((1, 8, 8), np.uint8)
    mask[0, :4, :4] = 1  # the whole of one patch of four
    mask[0, 0, 4] = 2  # a sixteenth of another: too little
    assert patch_classes(mask, np.array([[5, 7]]), 2).tolist() == [[[5, -1], [-1, -1]]]


def test_the_larger_object_names_a_patch():
    mask = np.zeros((1, 4, 4), np.uint8)
    mask[0, :1], mask[0, 1:3] = 1, 2
    assert patch_classes(mask, np.array([[5, 7]]), 1).tolist() == [[[7]]]


def test_an_object_in_place_is_all_that_is_left():
    record = batch("train", [7], SceneConfig("all"), 64)
    image, mask = record["image"][0], record["masks"][0]
    alone, labels = cut_object(image, mask, 0, crop=False)
    assert np.array_equal(alone[mask == 1], image[mask == 1])
    assert not alone[mask != 1].any()
    assert set(np.unique(labels)) == {0, 1}


def test_a_crop_is_filled_by_its_object():
    record = batch("train", [7], SceneConfig("all", objects=(1, 1)), 64)
    image, mask = record["image"][0], record["masks"][0]
    alone, labels = cut_object(image, mask, 0, crop=True)
    assert alone.shape == image.shape
    assert (labels == 1).mean() > 2 * (mask == 1).mean()
    assert abs(float(alone[labels == 1].mean()) - float(image[mask == 1].mean())) < 8


def test_only_an_object_in_place_is_said_to_have_a_size():
    scene, rng = sample_scene("train", 7), np.random.default_rng(0)
    assert scene.objects[0].size not in object_text(scene, 0, "crop", rng).split()
    assert scene.objects[0].size in object_text(scene, 0, "in place", rng).split()


def test_prompts_have_the_right_article():
    assert class_prompts(["orange star", "red star"])[0][0] == "an orange star"
    assert class_prompts(["orange star", "red star"])[1][1] == "a picture of a red star"


def test_the_contrastive_loss_by_hand():
    image = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    # The logits are [[2, 0], [0, 2]]: each direction costs log(1 + e^-2).
    loss = losses.contrastive(image, image, 2.0, jnp.array([0, 1]))
    np.testing.assert_allclose(loss, np.log1p(np.exp(-2.0)), rtol=1e-6)


def test_equal_texts_are_right_for_each_other():
    image = jnp.eye(3)
    text = jnp.array([[1.0, 0, 0], [1.0, 0, 0], [0, 0, 1.0]])
    names = jnp.array([0, 0, 1])
    swapped = losses.contrastive(image[jnp.array([1, 0, 2])], text, 5.0, names)
    np.testing.assert_allclose(losses.contrastive(image, text, 5.0, names), swapped, rtol=1e-6)


def test_training_lowers_the_loss(pairs, params):
    optimizer = make_optimizer(OptimizerConfig(name="adamw", learning_rate=3e-3), 30)
    step = jax.jit(step_fn(clip_loss(CONFIG), optimizer))
    state = create_state(params, optimizer, jax.random.key(0))
    found = []
    for _ in range(30):
        state, metrics = step(state, pairs)
        found.append(float(metrics["loss"]))
    assert found[-1] < 0.8 * found[0]
    assert {"contrast", "scale", "shapes", "colours"} <= metrics.keys()


def test_the_accuracy_of_fresh_weights_is_that_of_a_guess(params):
    error = scene_accuracy(CONFIG, 64)(params)["error"]
    assert 0.8 < error <= 1.0


def test_a_stem_needs_patches_that_it_divides():
    from jaxsem.errors import InputError

    with pytest.raises(InputError, match="halves the image 2 times"):
        VisionConfig(16, 1, 2, 32, patch=2, image_size=32, stem=(4, 8))
