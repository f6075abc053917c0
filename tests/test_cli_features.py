"""`jaxsem features`: what it writes and says, for folders and scenes, presets, bad photos, and what it refuses."""

import types

import numpy as np
import pytest
from toy_clip import pictures, save_clip, toy_clip

from jaxsem import presets
from jaxsem.data.images import write_image
from jaxsem.systems.extraction import read_features


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of weights in transformers' layout, without a tokenizer."""
    return save_clip(tmp_path_factory.mktemp("weights") / "clip")


@pytest.fixture
def photos(tmp_path):
    """Three photos of two classes."""
    for place, picture in zip(("cat/a.png", "cat/b.png", "dog/c.png"), pictures(3)):
        path = tmp_path / "photos" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, picture)
    return tmp_path / "photos"


def test_a_folder(command, weights, photos, tmp_path):
    path = tmp_path / "f.npy"
    status, out, err = command("features", photos, "-o", path, "--clip", weights)
    assert (status, err) == (0, "")
    features, record = read_features(path)
    np.testing.assert_allclose(features, toy_clip().encode_images(pictures(3)), atol=1e-5)
    assert record["labels"] == [0, 0, 1]
    assert (record["data"], record["model"]) == (str(photos), weights)
    assert out.decode() == (
        f"{path}: 3 features of 2 classes, width 12, float32, by {weights} on {photos}; 0.0 MB, and what they are in "
        f"{tmp_path / 'f.json'}\n"
    )


def test_scenes_at_half_precision_in_silence(command, weights, tmp_path):
    path = tmp_path / "f.npy"
    options = ["--clip", weights, "--limit", 5, "--batch", 8, "--half", "-q"]
    assert command("features", "scenes/32:test", "-o", path, *options) == (0, b"", "")
    features, record = read_features(path)
    assert features.dtype == np.float16
    assert (record["count"], len(record["classes"])) == (5, 5)


def test_a_file_of_weights_needs_its_sizes(command, weights, photos, tmp_path):
    status, _, err = command("features", photos, "-o", tmp_path / "f.npy", "--clip", f"{weights}/model.safetensors")
    assert status == 2
    assert "give a config, or one of ViT-B/32" in err
    options = ["--clip", f"{weights}/model.safetensors", "--clip-config", "ViT-B/32"]
    status, _, err = command("features", photos, "-o", tmp_path / "f.npy", *options)
    assert status == 2
    assert "does not fit the model" in err


def test_the_clip_of_a_preset(command, photos, tmp_path, monkeypatch):
    asked = []

    def load(name):
        asked.append(name)
        return types.SimpleNamespace(clip=toy_clip())

    monkeypatch.setattr(presets, "load", load)
    assert command("features", photos, "-o", tmp_path / "f.npy")[0] == 0
    assert command("features", photos, "-o", tmp_path / "g.npy", "--preset", "other", "-q")[0] == 0
    assert asked == ["pqvae-mini", "other"]
    assert read_features(tmp_path / "f.npy")[1]["model"] == "toy"


def test_a_preset_without_clip(command, photos, tmp_path):
    status, _, err = command("features", photos, "-o", tmp_path / "f.npy", "--preset", "elic-mini")
    assert status == 2
    assert "elic-mini has no CLIP: name a preset that has" in err


def test_a_bad_photo_is_left_out_and_told(command, weights, photos, tmp_path):
    (photos / "cat" / "b.png").write_bytes(b"hello")
    status, _, err = command("features", photos, "-o", tmp_path / "f.npy", "--clip", weights)
    assert status == 1
    assert "b.png is no image that Pillow can read" in err
    assert "1 failed, as said above; 2 succeeded" in err
    assert read_features(tmp_path / "f.npy")[1]["names"] == ["cat/a.png", "dog/c.png"]


def test_nothing_but_bad_photos(command, weights, photos, tmp_path):
    for path in photos.glob("*/*.png"):
        path.write_bytes(b"hello")
    status, _, err = command("features", photos, "-o", tmp_path / "f.npy", "--clip", weights)
    assert status == 2
    assert err.count("is no image that Pillow can read") == 3
    assert "none of the 3 images could be read" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


def test_an_existing_file_is_only_replaced_by_force(command, weights, photos, tmp_path):
    path = tmp_path / "f.npy"
    path.write_text("mine")
    status, _, err = command("features", photos, "-o", path, "--clip", "no/such/weights")
    assert status == 2
    assert "exists already" in err  # before anything is loaded
    assert path.read_text() == "mine"
    assert command("features", photos, "-o", path, "--clip", weights, "--force")[0] == 0
    assert len(read_features(path)[0]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "f.txt"], "features go to a .npy file"),
        ([], "required: -o/--output"),
        (["-o", "f.npy", "--clip", "a", "--preset", "b"], "not allowed with argument"),
        (
            ["-o", "f.npy", "--clip-config", "ViT-B/32"],
            "--clip-config tells the sizes of the weights that --clip names",
        ),
        (["-o", "f.npy", "--limit", "0"], "'0' is not a whole number of at least 1"),
        (["-o", "f.npy", "--batch", "9"], "a batch of 9 cannot be split evenly over 8 devices"),
    ],
)
def test_what_is_refused(command, weights, photos, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    if "--batch" in options:
        options = [*options, "--clip", weights]
    status, _, err = command("features", photos, *options)
    assert status == 2
    assert message in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


def test_data_that_is_not_there(command, weights, tmp_path):
    status, _, err = command("features", tmp_path / "none", "-o", tmp_path / "f.npy", "--clip", weights)
    assert status == 2
    assert "does not exist" in err
