"""The commands that use features: classify, caption, refer, and what compress, decompress, info and eval make of features."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from toy_clip import SIZE
from toy_features import toy_codec

import jaxsem
from jaxsem.container import Item, pack, pack_archive
from jaxsem.systems import feature_files

MISUSE = 2


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A weights file, a picture, its feature's file, and an archive of two features."""
    folder = tmp_path_factory.mktemp("features")
    codec, weights = toy_codec(), folder / "toy.safetensors"
    feature_files.save_feature_codec(codec, weights, {})
    random = np.random.default_rng(5)
    images = [random.integers(0, 256, (SIZE, SIZE, 3), np.uint8) for _ in range(2)]
    Image.fromarray(images[0]).save(folder / "a.png")
    files = jaxsem.compress(codec, images)
    (folder / "a.jsem").write_bytes(files[0])
    items = [
        Item(0, 0, item.sections, name=name)
        for item, name in zip((result.item for result in jaxsem.compress_items(codec, images)), ("one", "two"))
    ]
    (folder / "both.jsem").write_bytes(pack_archive(items, codec.digest))
    return SimpleNamespace(folder=folder, weights=str(weights), codec=codec, images=images)


def test_compress_writes_features(command, world, tmp_path):
    out = tmp_path / "a.jsem"
    status, text, err = command("compress", world.folder / "a.png", "-o", out, "--weights", world.weights)
    assert (status, err) == (0, "")
    assert out.read_bytes() == (world.folder / "a.jsem").read_bytes()
    assert f"16x16, {out.stat().st_size} bytes".encode() in text


def test_classify_ranks_the_labels(command, world):
    arguments = ("--weights", world.weights, "--labels", "red star, blue ring", "--json")
    status, out, _ = command("classify", world.folder / "a.jsem", *arguments)
    assert status == 0
    features = jaxsem.read_features(world.codec, [(world.folder / "a.jsem").read_bytes()])
    [[(label, share), _]] = jaxsem.classify(world.codec, features, ["red star", "blue ring"])
    [row] = json.loads(out)["files"]
    assert row["labels"][0] == {"label": label, "probability": pytest.approx(share, rel=1e-4)}


def test_classify_names_the_items_of_an_archive(command, world):
    arguments = ("--weights", world.weights, "--labels", "red star", "--top", "1")
    status, out, _ = command("classify", world.folder / "both.jsem", *arguments)
    assert status == 0
    lines = out.decode().splitlines()
    assert [line.split("(")[1].split(")")[0] for line in lines] == ["one", "two"]
    assert all(line.endswith("red star 100.0 %") for line in lines)


def test_labels_come_from_a_file_too(command, world, tmp_path):
    (tmp_path / "labels.txt").write_text("red star\n\nblue ring\n")
    arguments = ("--weights", world.weights, "--json")
    from_file = command("classify", world.folder / "a.jsem", *arguments, "--labels-file", tmp_path / "labels.txt")
    assert from_file == command("classify", world.folder / "a.jsem", *arguments, "--labels", "red star,blue ring")


@pytest.mark.parametrize(
    ("labels", "seen"),
    [
        ((), "name the classes"),
        (("--labels", " , "), "no label"),
        (("--labels", "a", "--labels-file", "b"), "name the classes"),
        (("--labels-file", "missing.txt"), "missing.txt"),
        (("--labels", "red dog"), "'dog'"),
    ],
)
def test_classes_that_are_none_are_refused(command, world, labels, seen):
    status, out, err = command("classify", world.folder / "a.jsem", "--weights", world.weights, *labels)
    assert (status, out) == (MISUSE, b"")
    assert seen in err


def test_a_label_file_that_is_no_text_is_refused(command, world, tmp_path):
    (tmp_path / "labels.txt").write_bytes(b"\xff\xfe\x00")
    arguments = ("--weights", world.weights, "--labels-file", tmp_path / "labels.txt")
    status, _, err = command("classify", world.folder / "a.jsem", *arguments)
    assert status == MISUSE
    assert "no text in UTF-8" in err


def test_caption_writes_what_python_does(command, world):
    status, out, _ = command("caption", world.folder / "both.jsem", "--weights", world.weights, "--json")
    assert status == 0
    features = jaxsem.read_features(world.codec, [(world.folder / "both.jsem").read_bytes()])
    assert [row["caption"] for row in json.loads(out)["files"]] == jaxsem.caption(world.codec, features)


def test_a_bad_file_among_good_ones_is_reported(command, world, tmp_path):
    (tmp_path / "bad.jsem").write_bytes(b"nothing")
    arguments = (tmp_path / "bad.jsem", world.folder / "a.jsem", "--weights", world.weights)
    status, out, err = command("caption", *arguments)
    assert status == 1
    assert len(out.splitlines()) == 1
    assert "bad.jsem" in err


def test_an_image_is_no_feature(command, world, tmp_path, tiny_codec):
    photo = np.zeros((20, 30, 3), np.uint8)
    (tmp_path / "image.jsem").write_bytes(pack(jaxsem.compress_items(tiny_codec, [photo])[0].item, world.codec.digest))
    status, _, err = command("caption", tmp_path / "image.jsem", "--weights", world.weights)
    assert status == MISUSE
    assert "an image of 20x30 where a feature is wanted" in err


def test_decompress_says_what_a_feature_is_for(command, world, tmp_path):
    status, _, err = command(
        "decompress", world.folder / "a.jsem", "-o", tmp_path / "a.png", "--weights", world.weights
    )
    assert status == MISUSE
    assert "jaxsem classify or jaxsem caption" in err
    assert not (tmp_path / "a.png").exists()


def test_info_tells_a_feature_from_an_image(command, world):
    status, out, _ = command("info", world.folder / "a.jsem", world.folder / "both.jsem")
    assert status == 0
    assert b"a feature, quality 0" in out
    assert b"2 items" in out


def test_refer_finds_one_of_the_boxes(command, world, tmp_path):
    boxes = ("--box", "0,0,8,8", "--box", "8,8,16,16")
    arguments = (world.folder / "a.png", "a red star", "--weights", world.weights, *boxes)
    status, out, _ = command("refer", *arguments, "--json", "-o", tmp_path / "found.png")
    assert status == 0
    record = json.loads(out)
    assert record["box"] in ([0, 0, 8, 8], [8, 8, 16, 16])
    assert (record["regions"], record["bits"]) == (2, 2 * 8 * 3)
    left, top, right, bottom = record["box"]
    found, image = np.array(Image.open(tmp_path / "found.png")), world.images[0]
    assert np.array_equal(found[top:bottom, left:right], image[top:bottom, left:right])
    assert not np.array_equal(found, image)


@pytest.mark.parametrize(
    ("phrase", "options", "seen"),
    [
        ("", (), "the phrase is empty"),
        ("a red star", ("--box", "0,0,99,4"), "within 16x16"),
        ("a red star", ("--box", "0,0,4,4", "--masks", "x.npy"), "name one"),
        ("a red star", ("--masks", "x.npy"), "x.npy"),
        ("a " * 50 + "star", ("--box", "0,0,4,4"), "shorten it"),
    ],
)
def test_what_cannot_be_found_is_refused(command, world, phrase, options, seen):
    status, out, err = command("refer", world.folder / "a.png", phrase, "--weights", world.weights, *options)
    assert (status, out) == (MISUSE, b"")
    assert seen in err


def test_eval_prints_accuracy_before_and_after(command, world, tmp_path):
    data = "scenes/16/unseen/objects=1:test[:4]"
    status, out, _ = command("eval", world.weights, "--data", data, "--json", tmp_path / "f.json")
    assert status == 0
    assert b"accuracy before" in out
    record = json.loads((tmp_path / "f.json").read_text())
    assert {"bits", "cosine", "accuracy", "accuracy_before"} <= record["results"][0].keys()
