import numpy as np
import pytest
from toy_clip import SIZE, WIDTH
from toy_features import toy_codec

import jaxsem
from jaxsem.errors import InputError


@pytest.fixture(scope="module")
def codec():
    return toy_codec()


@pytest.fixture(scope="module")
def features():
    return np.random.default_rng(6).standard_normal((3, WIDTH)).astype(np.float32)


LABELS = ["red star", "blue ring", "orange heart"]


def test_the_likeliest_label_is_the_nearest_in_direction(codec, features):
    found = jaxsem.classify(codec, features, LABELS)
    classes = codec.clip.class_features(LABELS)
    for row, feature in zip(found, features, strict=True):
        assert row[0][0] == LABELS[int((classes @ feature).argmax())]
        assert [share for _, share in row] == sorted((share for _, share in row), reverse=True)
        assert sum(share for _, share in row) == pytest.approx(1.0, abs=1e-5)


def test_the_length_of_a_feature_does_not_matter(codec, features):
    first, second = (jaxsem.classify(codec, scale * features, LABELS) for scale in (1, 50))
    assert [[label for label, _ in row] for row in first] == [[label for label, _ in row] for row in second]
    np.testing.assert_allclose(first[0][0][1], second[0][0][1], atol=1e-3)


def test_the_order_of_labels_does_not_matter(codec, features):
    first, second = (dict(jaxsem.classify(codec, features, labels)[0]) for labels in (LABELS, LABELS[::-1]))
    assert first == pytest.approx(second, abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "seen"),
    [
        ([], "no class"),
        (["red star", " "], "none of them empty"),
        (["red star"] * 2, "given twice"),
        (["dog"], "'dog'"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_refused(codec, features, labels, seen):
    with pytest.raises(InputError, match=seen):
        jaxsem.classify(codec, features, labels)


def test_greedy_captions_do_not_depend_on_the_batch(codec, features):
    whole = jaxsem.caption(codec, features)
    assert whole == [jaxsem.caption(codec, features[k : k + 1])[0] for k in range(3)]


def test_captions_are_words_of_the_language(codec, features):
    pieces = set(codec.captioner.tokenizer.pieces)
    for text in (*jaxsem.caption(codec, features), *jaxsem.caption(codec, features, beams=3)):
        assert set(text.replace(",", " ,").replace(";", " ;").split()) <= pieces


def test_no_beam_is_refused(codec, features):
    with pytest.raises(InputError, match="at least 1 beam"):
        jaxsem.caption(codec, features, beams=0)


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(3).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


@pytest.fixture(scope="module")
def masks():
    masks = np.zeros((3, SIZE, SIZE), bool)
    masks[0, 2:5, 1:9] = masks[1, 9:14, 3:6] = masks[2, 1:15, 10:15] = True
    return masks


def test_the_region_is_the_one_most_like_the_phrase(codec, picture, masks):
    found = jaxsem.refer(codec, picture, "a red star", masks, compress=False)
    crops = [picture[2:5, 1:9], picture[9:14, 3:6], picture[1:15, 10:15]]
    scores = codec.clip.encode_images(crops) @ codec.clip.encode_texts(["a red star"])[0]
    np.testing.assert_allclose(found.scores, scores, atol=1e-5)
    assert found.region == int(scores.argmax())
    assert found.bits == 0
    assert np.array_equal(found.mask, masks[found.region])
    assert found.box == [(1, 2, 9, 5), (3, 9, 6, 14), (10, 1, 15, 15)][found.region]


def test_compressed_regions_are_scored_by_what_is_decoded(codec, picture, masks):
    found = jaxsem.refer(codec, picture, "a red star", masks)
    crops = [picture[2:5, 1:9], picture[9:14, 3:6], picture[1:15, 10:15]]
    packets = codec.encode(codec.clip.encode_images(crops))
    assert found.bits == 8 * sum(map(len, packets))
    np.testing.assert_allclose(
        found.scores, codec.decode(packets) @ codec.clip.encode_texts(["a red star"])[0], atol=1e-5
    )


def test_an_empty_phrase_is_refused(codec, picture, masks):
    with pytest.raises(InputError, match="empty"):
        jaxsem.refer(codec, picture, "  ", masks)
