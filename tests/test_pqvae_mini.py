"""What the shipped codec of CLIP features can do, on scenes that it never saw."""

import numpy as np
import pytest

import jaxsem
from jaxsem.data.scenes import CLASS_SETS, CLASSES, UNSEEN_CLASSES, SceneConfig, batch, refer, sample_scene
from jaxsem.metrics import score_attributes

COUNT = 96


@pytest.fixture(scope="module")
def codec():
    return jaxsem.load("pqvae-mini")


@pytest.fixture(scope="module")
def unseen(codec):
    """Scenes of one object of a class held out, their features and labels."""
    records = batch("test", range(COUNT), SceneConfig("unseen", objects=(1, 1)), 128, ("image", "classes"))
    labels = [CLASSES[number] for number in records["classes"][:, 0]]
    return records["image"], codec.clip.encode_images(records["image"]), labels


def accuracy(codec, features, labels, names=UNSEEN_CLASSES):
    found = jaxsem.classify(codec, features, names)
    return np.mean([row[0][0] == label for row, label in zip(found, labels, strict=True)])


def test_a_picture_takes_some_tens_of_bytes(codec, unseen):
    files = jaxsem.compress(codec, list(unseen[0][:8]))
    assert max(map(len, files)) <= 11 + 13


@pytest.mark.parametrize(("quality", "points"), [(0, 5), (2, 1)])
def test_classes_held_out_are_still_told_apart(codec, unseen, quality, points):
    _, features, labels = unseen
    at = codec.at_quality(quality)
    before, after = accuracy(codec, features, labels), accuracy(codec, at.decode(at.encode(features)), labels)
    assert before > 0.9
    assert 100 * (before - after) <= points + 100 / COUNT


def test_the_prior_takes_fewer_bits_than_fixed_length(codec, unseen):
    for quality in range(codec.qualities):
        at = codec.at_quality(quality)
        streams = at.encode(unseen[1])
        assert 8 * np.mean([len(stream) - 1 for stream in streams]) < 0.95 * at.level.bits


def test_captions_from_files_name_the_objects(codec):
    config = SceneConfig("seen", objects=(1, 2))
    scenes = [sample_scene("test", index, config) for index in range(24)]
    images = batch("test", range(24), config, 128, ("image",))["image"]
    texts = jaxsem.caption(codec, jaxsem.read_features(codec, jaxsem.compress(codec, list(images))))
    assert score_attributes(texts, scenes, strict=False)["pair_f1"] > 0.6


def test_phrases_are_found_among_given_regions(codec):
    config, right = SceneConfig("seen", objects=(3, 3)), 0
    records = batch("test", range(12), config, 128, ("image", "masks"))
    for index, (image, labels) in enumerate(zip(records["image"], records["masks"], strict=True)):
        masks = np.stack([labels == number for number in range(1, 4) if (labels == number).any()])
        name = sample_scene("test", index, config).objects[len(masks) - 1].name
        right += jaxsem.refer(codec, image, f"the {name}", masks).region == len(masks) - 1
    assert right >= 8


def test_all_64_classes_are_known_by_name(codec):
    assert len(CLASS_SETS["all"]) == 64
    assert codec.clip.class_features(CLASSES).shape == (64, codec.clip.width)


def test_every_phrase_of_a_scene_can_be_encoded(codec):
    texts = [phrase.text for phrases in refer(sample_scene("test", 5)) for phrase in phrases]
    assert np.isfinite(codec.clip.encode_texts(texts)).all()
