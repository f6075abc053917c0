import numpy as np
import pytest
from photos import write_photo
from toy_features import toy_codec

import jaxsem
from jaxsem import results
from jaxsem.data.scenes import CLASSES
from jaxsem.data.sources import open_source
from jaxsem.errors import InputError
from jaxsem.systems.extraction import extract

DATA = "scenes/16/unseen/objects=1:test[:6]"


@pytest.fixture(scope="module")
def record():
    return jaxsem.evaluate(toy_codec(), DATA)


def test_it_is_a_record_of_all_qualities(record):
    results.validate(record)
    assert [row["quality"] for row in record["results"]] == [0, 1]
    assert len(record["images"]) == 12
    assert record["data"] == DATA


def test_every_number_is_of_the_real_bytes(record):
    codec = toy_codec().at_quality(1)
    images = [open_source(DATA)[k]["image"] for k in range(6)]
    files = jaxsem.compress(codec, images)
    features = codec.clip.encode_images(images)
    decoded = jaxsem.read_features(codec, files)
    rows = record["images"][6:]
    assert [row["bytes"] for row in rows] == [len(file) for file in files]
    assert [row["bits"] for row in rows] == [8 * (len(file) - 11) for file in files]
    np.testing.assert_allclose([row["cosine"] for row in rows], (features * decoded).sum(axis=1), atol=1e-5)
    assert rows[0]["bpp"] == 8 * len(files[0]) / 16**2


def test_answers_are_chosen_among_the_classes_that_occur(record):
    codec = toy_codec()
    source = open_source(DATA)
    labels = [int(source[k]["classes"][0]) for k in range(6)]
    occurring = sorted(set(labels))
    features = codec.clip.encode_images([source[k]["image"] for k in range(6)])
    found = jaxsem.classify(codec, features, [CLASSES[number] for number in occurring])
    right = [row[0][0] == CLASSES[label] for row, label in zip(found, labels, strict=True)]
    assert [bool(row["accuracy_before"]) for row in record["images"][:6]] == right


def test_a_caption_is_found_if_few_are_nearer(record):
    codec, source = toy_codec().at_quality(1), open_source(DATA)
    texts = codec.clip.encode_texts([str(source[k]["captions"][-1]) for k in range(6)])
    files = jaxsem.compress(codec, [source[k]["image"] for k in range(6)])
    scores = jaxsem.read_features(codec, files) @ texts.T
    ranks = (scores > np.diag(scores)[:, None]).sum(axis=1)
    assert [row["recall_1"] for row in record["images"][6:]] == [float(rank < 1) for rank in ranks]
    assert [row["recall_5"] for row in record["images"][6:]] == [float(rank < 5) for rank in ranks]


def test_extracted_features_give_the_same(record, tmp_path):
    path = extract(toy_codec().clip, open_source(DATA), tmp_path / "features.npy", data=DATA)
    again = jaxsem.evaluate(toy_codec(), str(path), [0], name=DATA)
    first = {name: value for name, value in record["results"][0].items() if not name.startswith("recall")}
    assert again["results"][0] == pytest.approx(first)


def test_data_without_classes_has_no_accuracy(tmp_path):
    write_photo(tmp_path / "a.png", seed=1)
    [row] = jaxsem.evaluate(toy_codec(), str(tmp_path), [0])["results"]
    assert "accuracy" not in row
    assert -1 <= row["cosine"] <= 1


def test_a_quality_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="whole qualities 0 to 1"):
        jaxsem.evaluate(toy_codec(), DATA, [2])
