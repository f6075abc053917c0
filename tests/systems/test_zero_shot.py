"""Zero-shot classes, retrieval and comparisons of features: against plain definitions, on real CLIP features, bad input."""

import hashlib
import tracemalloc

import numpy as np
import pytest

from jaxsem.errors import InputError
from jaxsem.systems import zero_shot
from jaxsem.systems.feature_arrays import read_array
from jaxsem.systems.feature_quantizers import ProductQuantizer
from jaxsem.systems.imagenet_templates import IMAGENET_TEMPLATES, IMAGENET_TEMPLATES_7
from jaxsem.systems.zero_shot import (
    accuracy,
    class_split,
    classify,
    cosine,
    neighbour_agreement,
    of_classes,
    retrieval_recall,
)
from jaxsem.weights.torch_files import read_torch

BLOCKS = (1, 100, 1 << 24)


def some(count, width=16, seed=0):
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture(params=BLOCKS)
def blocks(request, monkeypatch):
    """The same with blocks of one row, of a few, and with everything in one."""
    monkeypatch.setattr(zero_shot, "_SCORES", request.param)


# -- classes ----------------------------------------------------------------------------------------------------------


def test_classes_and_probabilities_by_definition(blocks):
    features, classes = some(9), some(5, seed=1)
    found, chances = classify(features, classes, scale=7.0)
    scores = unit(features) @ unit(classes).T
    powers = np.exp(7.0 * scores.astype(np.float64))
    np.testing.assert_array_equal(found, scores.argmax(axis=1))
    np.testing.assert_allclose(chances, powers / powers.sum(axis=1, keepdims=True), rtol=1e-5)
    assert (found.dtype, chances.dtype, chances.shape) == (np.int32, np.float32, (9, 5))


def test_a_large_scale_overflows_nothing():
    _, chances = classify(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32), scale=1e6)
    np.testing.assert_array_equal(chances, np.eye(3))


def test_lengths_do_not_matter():
    features, classes, labels = some(50), some(5, seed=1), np.arange(50) % 5
    longer = features * np.linspace(0.1, 30, 50, dtype=np.float32)[:, None]
    assert accuracy(features, classes, labels) == accuracy(longer, 2 * classes, labels)
    np.testing.assert_allclose(classify(features, classes)[1], classify(longer, 2 * classes)[1], atol=1e-5)


@pytest.mark.parametrize("top", [1, 2, 5])
def test_accuracy_by_definition(blocks, top):
    features, classes, labels = some(40), some(5, seed=1), np.arange(40) % 5
    order = np.argsort(-(unit(features) @ unit(classes).T), axis=1)
    wanted = np.mean([label in row[:top] for label, row in zip(labels, order)])
    assert accuracy(features, classes, labels, top) == pytest.approx(wanted)


def test_accuracy_agrees_with_classify():
    features, classes = some(60), some(7, seed=1)
    assert accuracy(features, classes, classify(features, classes)[0]) == 1


def test_of_equal_classes_the_first_wins():
    classes = np.repeat(np.eye(2, dtype=np.float32), 2, axis=0)
    assert classify(classes, classes)[0].tolist() == [0, 0, 2, 2]
    assert accuracy(classes, classes, [0, 1, 2, 3]) == 0.5
    assert accuracy(classes, classes, [0, 1, 2, 3], top=2) == 1


def test_float16_and_memory_maps(tmp_path):
    features, classes, labels = some(30), some(4, seed=1), np.arange(30) % 4
    np.save(tmp_path / "f.npy", features.astype(np.float16))
    mapped = read_array(tmp_path / "f.npy")
    np.testing.assert_allclose(classify(mapped, classes)[1], classify(features, classes)[1], atol=0.2)
    assert accuracy(mapped, classes, labels) == accuracy(features, classes, labels)


def test_memory_is_bounded(monkeypatch):
    """The similarities of 8,000 features and 500 classes take 16 MB."""
    features, classes, labels = some(8_000), some(500, seed=1), np.zeros(8_000, int)
    monkeypatch.setattr(zero_shot, "_SCORES", 1 << 16)
    tracemalloc.start()
    accuracy(features, classes, labels)
    neighbour_agreement(features, features, classes)
    retrieval_recall(classes, features, labels)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 4e6, most


# -- retrieval --------------------------------------------------------------------------------------------------------


def test_recall_by_definition(blocks):
    rng = np.random.default_rng(3)
    images, owners = some(12), rng.integers(0, 9, 30)  # images 9 to 11 have no text
    texts = images[owners] + 1.5 * some(30, seed=1)
    found = retrieval_recall(images, texts, owners, ks=(1, 3, 30))
    scores = unit(texts) @ unit(images).T
    for k in (1, 3, 30):
        to_image = [owners[t] in np.argsort(-scores[t])[:k] for t in range(30)]
        to_text = [
            bool(set(np.flatnonzero(owners == i)) & set(np.argsort(-scores[:, i])[:k]))
            for i in range(12)
            if i in owners
        ]
        assert found[f"text_to_image@{k}"] == pytest.approx(np.mean(to_image))
        assert found[f"image_to_text@{k}"] == pytest.approx(np.mean(to_text))
    assert 0 < found["text_to_image@1"] < found["text_to_image@3"] < found["text_to_image@30"] == 1


def test_recall_of_perfect_pairs():
    found = retrieval_recall(some(20), some(20), np.arange(20))
    assert set(found.values()) == {1.0}
    assert set(found) == {f"{way}@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}


# -- comparisons ------------------------------------------------------------------------------------------------------


def test_cosines_by_definition(blocks):
    features, decoded = some(200), some(200) + some(200, seed=1)
    values = (unit(features) * unit(decoded)).sum(axis=1)
    found = cosine(features, decoded, quantiles=(0.05, 0.5))
    assert list(found) == ["mean", "q05", "q50"]
    np.testing.assert_allclose(list(found.values()), [values.mean(), *np.quantile(values, [0.05, 0.5])], atol=1e-6)


def test_neighbours_by_definition(blocks):
    originals, reference = some(25), some(60, seed=1)
    decoded = originals + 0.7 * some(25, seed=2)
    near, still = (np.argsort(-(unit(x) @ unit(reference).T), axis=1)[:, :5] for x in (originals, decoded))
    wanted = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(near, still)])
    assert neighbour_agreement(decoded, originals, reference, 5) == pytest.approx(wanted)
    assert 0.2 < wanted < 0.9


def test_neighbours_of_what_did_not_change():
    assert neighbour_agreement(some(9), some(9), some(30, seed=1)) == 1
    assert neighbour_agreement(some(9), -some(9), some(30, seed=1), 30) == 1


def test_among_equal_neighbours_the_first_are_taken():
    reference = np.repeat(np.eye(2, dtype=np.float32), 10, axis=0)
    one, between = np.float32([[1, 0]]), np.float32([[1, 1]])
    assert neighbour_agreement(between, one, reference, 5) == 1
    assert neighbour_agreement(between, one[:, ::-1], reference, 5) == 0


def test_features_decoded_as_zeros_resemble_nothing():
    zeros = np.zeros((3, 16), np.float32)
    assert cosine(some(3), zeros)["mean"] == 0
    found, chances = classify(zeros, some(4))
    np.testing.assert_allclose(chances, 0.25)
    assert found.tolist() == [0, 0, 0]


# -- splits -----------------------------------------------------------------------------------------------------------


def test_a_split_is_disjoint_complete_and_the_same_again():
    names = [f"class {i}" for i in range(1000)]
    train, held = class_split(names)
    assert (len(train), len(held)) == (800, 200)
    assert sorted([*train, *held]) == list(range(1000))
    assert (np.diff(train) > 0).all()
    for one, other in zip(class_split(names), (train, held)):
        np.testing.assert_array_equal(one, other)
    assert set(class_split(names, seed=1)[0]) != set(train)


def test_a_split_is_pinned():
    """A changed split would let a model be tested on what it was trained on; the order is that of SHA-256 by hand."""
    names = ["tench", "goldfish", "great white shark", "tiger shark", "hammerhead shark"]
    order = sorted(range(5), key=lambda i: hashlib.sha256(b"0:" + names[i].encode()).hexdigest())
    assert sorted(order[:3]) == class_split(names, 3)[0].tolist()
    assert [part.tolist() for part in class_split(names, 3)] == [[0, 3, 4], [1, 2]]


def test_a_split_follows_names_not_places():
    names = [f"class {i}" for i in range(50)]
    chosen = {names[i] for i in class_split(names, 40)[0]}
    turned = names[::-1]
    assert {turned[i] for i in class_split(turned, 40)[0]} == chosen


def test_features_of_some_classes():
    rows, labels = of_classes([5, 2, 9, 2, 7], [7, 2])
    assert rows.tolist() == [1, 3, 4]
    assert labels.tolist() == [1, 1, 0]
    rows, labels = of_classes([5, 5], [7, 2])
    assert len(rows) == len(labels) == 0


# -- OpenAI's prompts -------------------------------------------------------------------------------------------------


def test_the_prompts_are_openai_s():
    assert len(IMAGENET_TEMPLATES) == len(set(IMAGENET_TEMPLATES)) == 80
    assert all(template.count("{}") == 1 and template.endswith(".") for template in IMAGENET_TEMPLATES)
    assert set(IMAGENET_TEMPLATES_7) < set(IMAGENET_TEMPLATES)
    assert len(IMAGENET_TEMPLATES_7) == 7
    # Computed from OPENAI_IMAGENET_TEMPLATES of open_clip_torch 3.3.0.
    lines = "\n".join(IMAGENET_TEMPLATES)
    wanted = "4f976686fb651bb5803d4689dcd849f75efe0ef19a3c801355bc9a6f03c8a5af"
    assert hashlib.sha256(lines.encode()).hexdigest() == wanted


# -- real features ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagenet(shared_data):
    """Real text features of the 1000 classes, ViT-L/14, float32 [1000, 768]."""
    path = shared_data / "clip-vit-l14" / "imagenet-text-embeddings.pt"
    if not path.exists():
        pytest.skip(f"needs {path}")
    return np.asarray(read_torch(path)).T.astype(np.float32)


@pytest.fixture(scope="module")
def flickr(shared_data):
    """Real image features, ViT-B/32, float16 [1000, 512]."""
    path = shared_data / "clip-flickr8k" / "vit-b32-image-embeddings.npy"
    if not path.exists():
        pytest.skip(f"needs {path}")
    return read_array(path)


def test_real_classes_find_themselves_but_for_the_two_that_are_named_twice(imagenet):
    """ "missile" and "sunglasses" each name two classes of OpenAI's list: the second of a pair is taken for the first."""
    assert accuracy(imagenet, imagenet, np.arange(1000), top=2) == 1
    wrong = np.flatnonzero(classify(imagenet, imagenet)[0] != np.arange(1000))
    assert set(wrong) <= {657, 744, 836, 837}
    assert len(wrong) == 2


def test_noise_costs_real_classes_top_1_before_top_5(imagenet):
    noisy = imagenet + 0.15 * some(1000, 768)
    top1, top5 = (accuracy(noisy, imagenet, np.arange(1000), top) for top in (1, 5))
    assert 0.5 < top1 < top5 < 1
    train, held = class_split([str(i) for i in range(1000)])
    rows, labels = of_classes(np.arange(1000), held)
    among_held = accuracy(noisy[rows], imagenet[held], labels)
    among_all = accuracy(noisy[rows], imagenet, held)
    assert among_held > among_all  # fewer classes to be taken for
    assert len(train) == 800


def test_a_finer_quantiser_keeps_more_of_real_features(flickr):
    train, test = flickr[:800], flickr[800:]
    coarse, fine = (
        quantizer.features(quantizer.indices(test))
        for quantizer in (ProductQuantizer.fit(train, subspaces=n, codewords=16, iterations=5) for n in (16, 128))
    )
    measures = (
        lambda decoded: cosine(test, decoded)["mean"],
        lambda decoded: neighbour_agreement(decoded, test, train),
        lambda decoded: retrieval_recall(test, decoded, np.arange(200))["text_to_image@1"],
    )
    for measure in measures:
        assert 0 < measure(coarse) < measure(fine) <= 1
    assert cosine(test, fine)["mean"] > 0.9
    assert retrieval_recall(test, fine, np.arange(200))["text_to_image@1"] > 0.9


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: classify(some(3, 8), some(3, 9)), r"are \[count, 9\], not of shape \(3, 8\)"),
        (lambda: classify(some(3)[0], some(3)), r"are \[count, 16\], not of shape \(16,\)"),
        (lambda: classify(some(3), some(0)), "there is no class to compare with"),
        (lambda: classify(some(3) * np.nan, some(3)), "from feature 0 on: 3 of 3 features hold NaN"),
        (lambda: classify(np.ones((3, 16), int), some(3)), "real numbers, not int64"),
        (
            lambda: accuracy(some(3), some(3), [0, 1]),
            r"3 features go with as many class numbers.* int64 of shape \(2,\)",
        ),
        (lambda: accuracy(some(3), some(3), [0.0, 1.0, 2.0]), "float64 of shape"),
        (lambda: accuracy(some(3), some(3), [0, 1, 3]), "feature 2 belongs to class 3, and there are 0 to 2"),
        (lambda: accuracy(some(3), some(3), [0, -1, 2]), "feature 1 belongs to class -1"),
        (lambda: accuracy(some(0), some(3), np.zeros(0, int)), "at least one"),
        (lambda: accuracy(some(3), some(3), [0, 1, 2], 0), "among at least 1 class, not 0"),
        (lambda: retrieval_recall(some(3), some(4), [0, 1, 2]), "4 texts go with as many image numbers"),
        (lambda: retrieval_recall(some(3), some(3), [0, 1, 3]), "text 2 belongs to image 3"),
        (lambda: retrieval_recall(some(3), some(3), [0, 1, 2], ()), "each at least 1"),
        (lambda: retrieval_recall(some(3), some(3), [0, 1, 2], (5, 0)), "each at least 1"),
        (lambda: cosine(some(3), some(4)), r"not of shapes \(3, 16\) and \(4, 16\)"),
        (lambda: cosine(some(3), some(3), (1.5,)), "quantiles lie between 0 and 1"),
        (
            lambda: neighbour_agreement(some(3), some(3), some(9)),
            "the nearest of 9 reference features are 1 to 9, not 10",
        ),
        (lambda: neighbour_agreement(some(3), some(3), some(9), 0), "not 0"),
        (lambda: class_split(["a", "b"], 2), "of 2 classes, 1 to 1 are trained on, not 2"),
        (lambda: class_split(["a", "b"], 0), "not 0"),
        (lambda: class_split("ab", 1), "of 2 classes"),
    ],
)
def test_bad_input_is_one_sentence(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_nan_is_found_in_any_block(monkeypatch):
    features = some(100)
    features[70, 3] = np.nan
    monkeypatch.setattr(zero_shot, "_SCORES", 160)
    with pytest.raises(
        InputError, match="from feature 70 on: 1 of 10 features hold NaN or infinity, the first is number 0"
    ):
        classify(features, some(3))
