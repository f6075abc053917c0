"""The command, for codecs that are told what matters and draw what they decode."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from toy_rsic import toy_rsic

from jaxsem.cli import main
from jaxsem.commands import weights
from jaxsem.container import unpack
from jaxsem.data.images import read_image, write_image
from jaxsem.systems.rsic_coding import parse


@pytest.fixture(scope="module")
def codec():
    return toy_rsic()


@pytest.fixture
def photo(codec, noise_photo, tmp_path, monkeypatch):
    """A photo in a folder of its own; the toy is the preset of any name."""

    def load(name, quality=None, *_, **__):
        return codec if quality is None else codec.at_quality(quality)

    monkeypatch.setattr(weights, "load", load)
    write_image(tmp_path / "a.png", noise_photo(24, 16))
    return tmp_path / "a.png"


def compress(photo, *options) -> int:
    return main(["compress", str(photo), "--preset", "toy", "--quiet", "--force", *options])


def levels_in(codec, photo, *options) -> np.ndarray:
    assert compress(photo, "--text", "a red star", *options) == 0
    return parse(codec, unpack((photo.parent / "a.jsem").read_bytes()).items[0]).levels


def test_boxes_and_clicks_have_weights(codec, photo):
    found = levels_in(codec, photo, "--refer-box", "0,0,8,8", "--refer-box", "8,16,8,8@0.5", "--background", "0.2")
    assert (found[:2, :2] == 7).all()
    assert (found[4:, 2:] == 4).all()
    assert (found[2:4] == 1).all()
    assert levels_in(codec, photo, "--refer-click", "2,2@0.4").max() == 3


def test_a_mask_is_a_picture_or_an_array(codec, photo):
    mask = np.zeros((24, 16), bool)
    mask[:8] = True
    Image.fromarray(np.uint8(mask) * 255).save(photo.parent / "mask.bmp")
    np.save(photo.parent / "mask.npy", mask)
    pictured = levels_in(codec, photo, "--refer-mask", str(photo.parent / "mask.bmp"))
    assert (pictured[:2] == 7).all()
    assert not pictured[2:].any()
    assert (pictured == levels_in(codec, photo, "--refer-mask", str(photo.parent / "mask.npy"))).all()


def test_words_are_looked_for_and_weighted(codec, photo):
    whole = levels_in(codec, photo, "--refer", "red star")
    assert whole.max() > whole.min()
    assert levels_in(codec, photo, "--refer", "red star@0.5").max() < whole.max()


def test_fewer_levels_are_sent_in_fewer_bytes(codec, photo):
    few = levels_in(codec, photo, "--refer-box", "0,0,8,8", "--levels", "2")
    assert set(np.unique(few)) == {0, 1}
    assert (levels_in(codec, photo, "--levels", "4", "--quality", "1") == 1).all()


def test_what_one_photo_lacks_does_not_stop_the_others(codec, photo, noise_photo, capsys):
    write_image(photo.parent / "b.png", noise_photo(8, 8))
    arguments = ["compress", str(photo), str(photo.parent / "b.png"), "--preset", "toy", "--text", ""]
    assert main([*arguments, "--refer-box", "0,8,8,8"]) == 1
    assert "not within the image of 8x8" in capsys.readouterr().err
    assert (photo.parent / "a.jsem").exists()
    assert not (photo.parent / "b.jsem").exists()


def test_a_long_description_is_noted(photo, capsys):
    arguments = ["compress", str(photo), "--preset", "toy", "--text", " and ".join(["a red star"] * 30)]
    assert main([*arguments, "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)["files"]
    assert "sees only its first" in row["notes"][0]
    assert main([*arguments, "--force"]) == 0
    assert "sees only its first" in capsys.readouterr().out


def test_info_tells_the_sections_apart(photo, capsys):
    compress(photo, "--text", "a red star", "--refer-box", "0,0,8,8")
    assert main(["info", str(photo.parent / "a.jsem")]) == 0
    text = capsys.readouterr().out
    assert "quality by a weight map of 8 levels" in text
    assert "caption  'a red star'" in text
    assert all(name in text for name in ("packet", "caption", "weight map"))


def test_decoding_takes_its_numbers(codec, photo):
    compress(photo, "--text", "a red star")
    images = []
    for options in ([], ["--seed", "0"], ["--seed", "1"], ["--fast", "--steps", "1"]):
        arguments = ["decompress", str(photo.parent / "a.jsem"), "--preset", "toy", "-o", str(photo.parent / "o.png")]
        assert main([*arguments, "--force", "--quiet", "--recurrences", "2", *options]) == 0
        images.append(read_image(photo.parent / "o.png"))
    assert (images[0] == images[1]).all()
    assert (images[0] != images[2]).any()
    assert (images[0] != images[3]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--refer-box", "0,0,8"], "takes whole numbers x,y,width,height"),
        (["--refer-click", "1,1@7"], "weight lies between 0 and 1"),
        (["--refer", " "], "a phrase is empty"),
        (["--refer-mask", "mask.npy"], "holds no mask"),
        (["--levels", "9"], "levels=9"),
        (["--levels", "4", "--quality", "5"], "whole qualities 0 to 3"),
        (["--background", "2"], "background=2"),
        (["--text", "a unicorn"], "unicorn"),
    ],
)
def test_demands_that_are_none_are_refused(photo, options, message, monkeypatch, capsys):
    monkeypatch.chdir(photo.parent)
    np.save("mask.npy", np.zeros(3))
    assert compress("a.png", *options) == 2
    assert message in capsys.readouterr().err
    assert not (photo.parent / "a.jsem").exists()


def test_numbers_of_guidance_are_checked(photo, capsys):
    compress(photo, "--text", "")
    for options, message in (
        (["--gamma", "nan"], "gamma=nan"),
        (["--steps", "0"], "0 steps"),
        (["--steps", "101"], "101 steps"),
        (["--scale", "-1"], "scale=-1"),
    ):
        assert main(["decompress", str(photo.parent / "a.jsem"), "--preset", "toy", "--force", *options]) == 2
        assert message in capsys.readouterr().err


def test_other_codecs_cannot_be_asked(photo, tiny_preset, tiny_codec, monkeypatch, capsys):
    monkeypatch.setattr(weights, "load", lambda *_, **__: tiny_codec)
    assert compress(photo, "--refer", "a star", "--levels", "4") == 2
    assert "--refer, --levels cannot be met" in capsys.readouterr().err
    assert compress(photo) == 0
    assert main(["decompress", str(photo.parent / "a.jsem"), "--preset", "tiny", "--force", "--steps", "5"]) == 2
    assert "decodes to one image, whatever the steps" in capsys.readouterr().err


def test_a_phrase_that_finds_nothing_is_said(codec, photo, monkeypatch, capsys):
    monkeypatch.setattr(weights, "load", lambda *_, **__: dataclasses.replace(codec, least_peak=1.0))
    assert compress(photo, "--refer", "red star", "--text", "") == 2
    assert "choose global mode" in capsys.readouterr().err
