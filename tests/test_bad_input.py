"""Whatever is wrong with a file: one clear sentence and a status, never a traceback, a wrong image or half a file."""

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from photos import pixels, write_photo
from PIL import Image

import jaxsem
from jaxsem import files, pipeline
from jaxsem.container import open_archive, pack, pack_archive, unpack
from jaxsem.data.images import read_image
from jaxsem.errors import FormatError, WeightsError


@pytest.fixture(scope="module")
def item(tiny_codec):
    [result] = jaxsem.compress_items(tiny_codec.at_quality(1), [pixels(40, 50)])
    return result.item


@pytest.fixture(scope="module")
def jsem(item, tiny_codec):
    return pack(item, tiny_codec.digest)


@pytest.fixture
def refused(command, tmp_path):
    """Runs a command that must fail: one sentence with the given words, status 2, and no new file."""

    def run(words: str, *arguments) -> None:
        before = sorted(tmp_path.rglob("*"))
        status, out, err = command(*arguments)
        assert (status, out) == (2, b"")
        assert err.startswith("jaxsem: ")
        assert err.count("\n") == 1
        assert words in err
        assert sorted(tmp_path.rglob("*")) == before

    return run


# -- .jsem files ------------------------------------------------------------------------------------------------------

DAMAGE = {
    "empty": (lambda data: b"", "is empty"),
    "truncated": (lambda data: data[:-7], "damaged, cut short"),
    "only its start": (lambda data: data[:9], "cut short"),
    "two bytes": (lambda data: data[:2], "cut short"),
    "a flipped bit": (lambda data: data[:40] + bytes([data[40] ^ 4]) + data[41:], "damaged"),
    "something appended": (lambda data: data + b"\0", "damaged"),
    "foreign": (lambda data: b"\x89PNG\r\n\x1a\n" + data, "looks like a PNG image"),
    "text": (lambda data: b"hello, world", "no .jsem file"),
    "of a future version": (lambda data: data[:2] + b"\x20" + data[3:], "format version 2"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", ["decompress", "info"])
def test_a_damaged_file(refused, tmp_path, jsem, tiny_preset, name, kind):
    damage, words = DAMAGE[kind]
    (tmp_path / "bad.jsem").write_bytes(damage(jsem))
    refused(words, name, tmp_path / "bad.jsem", *(("--preset", tiny_preset) if name == "decompress" else ()))


def test_other_weights(refused, tmp_path, item, tiny_preset):
    (tmp_path / "a.jsem").write_bytes(pack(item, b"\1\2\3"))
    refused("made with weights 010203", "decompress", tmp_path / "a.jsem", "--preset", tiny_preset)


def test_weights_that_no_preset_has(refused, tmp_path, item):
    (tmp_path / "a.jsem").write_bytes(pack(item, b"\1\2\3"))
    refused("which no shipped preset has", "decompress", tmp_path / "a.jsem")


def test_a_missing_file(refused, tmp_path, tiny_preset):
    refused("does not exist", "decompress", tmp_path / "a.jsem", "--preset", tiny_preset)
    refused("does not exist", "compress", tmp_path / "a.png", "--preset", tiny_preset)
    refused("does not exist", "info", tmp_path / "nowhere" / "a.jsem")


def test_a_feature_is_no_image(refused, tmp_path, tiny_codec, tiny_preset):
    (tmp_path / "a.jsem").write_bytes(pack(jaxsem.container.Item(0, 0, {1: b"a cat"}), tiny_codec.digest))
    refused("no image packet", "decompress", tmp_path / "a.jsem", "--preset", tiny_preset)


# -- presets, weights, options ----------------------------------------------------------------------------------------


def test_an_unknown_preset(refused, tmp_path):
    refused("neither a preset", "compress", write_photo(tmp_path / "a.png"), "--preset", "nope")


@pytest.mark.parametrize("cut", [0, 7, 100, 5000])
def test_damaged_weights(refused, tmp_path, tiny_preset, cut):
    data = Path(tiny_preset, "model.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(data[:cut])
    photo = write_photo(tmp_path / "a.png")
    refused("w.safetensors", "compress", photo, "--weights", tmp_path / "w.safetensors")


@pytest.mark.parametrize("quality", ["7", "-1", "nan", "inf"])
def test_a_quality_that_is_not_there(refused, tmp_path, tiny_preset, quality):
    photo = write_photo(tmp_path / "a.png")
    refused("qualities 0 to 1", "compress", photo, "--preset", tiny_preset, f"--quality={quality}")


def test_two_outputs_at_once(refused, tmp_path):
    photo = write_photo(tmp_path / "a.png")
    refused("two outputs", "compress", photo, "-o", tmp_path / "x", "--archive", tmp_path / "y")


# -- photos -----------------------------------------------------------------------------------------------------------


def test_what_is_no_photo(refused, tmp_path, tiny_preset):
    whole = write_photo(tmp_path / "whole.png").read_bytes()
    for name, data, words in [
        ("empty.png", b"", "is empty"),
        ("text.png", b"hello", "no image that Pillow can read"),
        ("cut.png", whole[: len(whole) // 2], "damaged or incomplete"),
    ]:
        (tmp_path / name).write_bytes(data)
        refused(words, "compress", tmp_path / name, "--preset", tiny_preset)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind the superuser")
def test_an_unreadable_photo(refused, tmp_path, tiny_preset):
    photo = write_photo(tmp_path / "a.png")
    photo.chmod(0)
    refused("cannot be read", "compress", photo, "--preset", tiny_preset)


def test_a_folder_without_photos(refused, tmp_path):
    refused("holds no photo", "compress", tmp_path)
    refused("holds no .jsem file", "decompress", tmp_path)


def _kinds(folder):
    """Photos of every kind that must simply work, and the size (width, height) in which a person sees them."""
    rgb = Image.fromarray(pixels(40, 50))
    deep = Image.fromarray(pixels(40, 50)[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, image, options in [
        ("16-bit.png", deep, {}),
        ("grey.png", rgb.convert("L"), {}),
        ("bits.png", rgb.convert("1"), {}),
        ("palette.png", rgb.quantize(16), {}),
        ("alpha.png", rgb.convert("RGBA"), {}),
        ("cmyk.jpg", rgb.convert("CMYK"), {}),
        ("rotated.jpg", rgb, {"exif": exif}),
        ("animated.gif", rgb, {"save_all": True, "append_images": [rgb.rotate(90)]}),
        ("one.png", rgb.crop((0, 0, 1, 1)), {}),
    ]:
        image.save(folder / name, **options)
    sizes = dict.fromkeys([path.stem for path in folder.iterdir()], (50, 40))
    return {**sizes, "rotated": (40, 50), "one": (1, 1)}


def test_photos_of_every_kind_are_handled(command, tmp_path, tiny_codec, tiny_preset):
    (tmp_path / "in").mkdir()
    sizes = _kinds(tmp_path / "in")
    status, _, err = command("compress", tmp_path / "in", "-o", tmp_path / "mid", "--preset", tiny_preset)
    assert (status, err) == (0, "")
    status, _, err = command("decompress", tmp_path / "mid", "-o", tmp_path / "out", "--preset", tiny_preset)
    assert (status, err) == (0, "")
    assert {path.stem: Image.open(path).size for path in (tmp_path / "out").iterdir()} == sizes
    [expected] = jaxsem.decompress(
        tiny_codec, jaxsem.compress(tiny_codec.at_quality(1), [read_image(tmp_path / "in" / "rotated.jpg")])
    )
    np.testing.assert_array_equal(read_image(tmp_path / "out" / "rotated.png"), expected)


# -- outputs ----------------------------------------------------------------------------------------------------------


def test_an_existing_output_is_kept_and_said_before_the_work(refused, tmp_path, jsem, monkeypatch):
    for module in ("compress", "weights"):  # the long work begins with the codec
        monkeypatch.setattr(f"jaxsem.commands.{module}.open_codec", None)
    photo = write_photo(tmp_path / "a.png")
    (tmp_path / "a.jsem").write_bytes(jsem)
    refused("a.jsem exists already", "compress", photo)
    refused("a.jsem exists already", "compress", photo, "--archive", tmp_path / "a.jsem")
    refused("a.png exists already", "decompress", tmp_path / "a.jsem")
    assert (tmp_path / "a.jsem").read_bytes() == jsem


def test_existing_outputs_of_many(refused, tmp_path):
    for name in ("a", "b", "c"):
        write_photo(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.jsem").write_bytes(b"mine")
    (tmp_path / "c.jsem").unlink()
    refused("2 of 3 outputs exist already", "compress", tmp_path)


def test_force_replaces(command, tmp_path, jsem, tiny_preset):
    photo = write_photo(tmp_path / "a.png")
    (tmp_path / "a.jsem").write_bytes(b"old")
    assert command("compress", photo, "--preset", tiny_preset, "--force")[0] == 0
    assert (tmp_path / "a.jsem").read_bytes() == jsem


def test_the_photo_itself_is_never_replaced(refused, tmp_path, jsem):
    photo = write_photo(tmp_path / "a.png")
    refused("would replace it", "compress", photo, "-o", photo, "--force")
    (tmp_path / "a.jsem").write_bytes(jsem)
    link = tmp_path / "link.png"
    link.symlink_to(tmp_path / "a.jsem")
    refused("would replace it", "decompress", tmp_path / "a.jsem", "-o", link, "--force")


def test_two_photos_of_one_output(refused, tmp_path):
    write_photo(tmp_path / "a" / "x.png")
    write_photo(tmp_path / "b" / "x.png")
    write_photo(tmp_path / "b" / "x.jpg")
    both = (tmp_path / "a" / "x.png", tmp_path / "b" / "x.png")
    refused("would both be written to", "compress", *both, "-o", tmp_path / "out")
    refused("would both be written to", "compress", tmp_path / "b")
    refused("would both be 'x' in the archive", "compress", *both, "--archive", tmp_path / "y.jsem")


def test_outputs_that_cannot_be(refused, tmp_path, jsem):
    photo = write_photo(tmp_path / "a.png")
    (tmp_path / "a.jsem").write_bytes(jsem)
    refused("is not a folder", "compress", photo, "-o", tmp_path / "nowhere" / "a.jsem")
    refused("cannot be made", "compress", photo, tmp_path / "b.png", "-o", photo)
    refused("suffix .xyz", "decompress", tmp_path / "a.jsem", "-o", tmp_path / "a.xyz")


@pytest.mark.parametrize("name", ["compress", "decompress"])
def test_a_full_disk_leaves_nothing_half_written(refused, tmp_path, jsem, tiny_preset, monkeypatch, name):
    write_photo(tmp_path / "a.png")
    (tmp_path / "b.jsem").write_bytes(jsem)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "replace", full)  # the last step: by now the temporary file is there
    source = tmp_path / ("a.png" if name == "compress" else "b.jsem")
    refused("No space left on device", name, source, "--preset", tiny_preset)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_standard_output():
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "jaxsem", "presets"], stdout=full, stderr=subprocess.PIPE, timeout=120
        )
    assert done.returncode == 2
    assert done.stderr.startswith(b"jaxsem: standard output could not be written (No space left on device)")
    assert done.stderr.count(b"\n") == 1


# -- one bad file among many ------------------------------------------------------------------------------------------


def test_a_bad_photo_among_many(command, tmp_path, tiny_preset):
    for name in ("a", "c"):
        write_photo(tmp_path / f"{name}.png")
    (tmp_path / "b.jpg").write_bytes(b"no image")
    status, out, err = command("compress", tmp_path, tmp_path / "gone" / "d.png", "--preset", tiny_preset)
    assert status == 1
    assert sorted(path.name for path in tmp_path.glob("*.jsem")) == ["a.jsem", "c.jsem"]
    first, second, last = err.splitlines()
    assert "b.jpg is no image" in first
    assert "d.png does not exist" in second
    assert last == "jaxsem: 2 failed, as said above; 2 succeeded"
    assert b"2 photos" in out


def test_bad_files_among_many(command, tmp_path, jsem, item, tiny_codec, tiny_preset):
    """One damaged on the outside, one whose packet is damaged inside a sound container, one of other weights."""
    packet = bytearray(item.sections[0])
    packet[len(packet) // 2] ^= 1
    for name, data in [
        ("a", jsem),
        ("b", jsem[:-1]),
        ("c", pack(replace(item, sections={0: bytes(packet)}), tiny_codec.digest)),
        ("d", pack(item, b"\1\2\3")),
        ("e", jsem),
    ]:
        (tmp_path / f"{name}.jsem").write_bytes(data)
    status, _, err = command("decompress", tmp_path, "--preset", tiny_preset)
    assert status == 1
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["a.png", "e.png"]
    lines = err.splitlines()
    assert [line.split(".jsem")[0][-1] for line in lines[:3]] == ["b", "d", "c"]
    assert lines[3] == "jaxsem: 3 failed, as said above; 2 succeeded"


def test_the_sound_images_of_a_damaged_archive_are_saved(command, tmp_path, item, tiny_codec, tiny_preset):
    items = [replace(item, name=name) for name in ("a", "b", "c")]
    data = pack_archive(items, tiny_codec.digest)
    start = len(data) - sum(len(item.sections[0]) for _ in items)
    spoilt = bytearray(data[:-3])  # c is cut short
    spoilt[start + 5] ^= 1  # a is flipped
    (tmp_path / "x.jsem").write_bytes(spoilt)
    assert open_archive(bytes(spoilt)).damaged() == [0, 2]
    status, _, err = command("decompress", tmp_path / "x.jsem", "--preset", tiny_preset)
    assert status == 1
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["b.png"]
    assert "2 of its 3 images are damaged or cut off" in err


# -- thousands of flips and cuts --------------------------------------------------------------------------------------


def test_no_flip_and_no_cut_of_a_file_passes(jsem, item, tiny_codec):
    data = np.frombuffer(jsem, np.uint8)
    spoilt = [data[:length].tobytes() for length in range(len(data))]
    for bit in range(8):
        for place in range(len(data)):
            flipped = data.copy()
            flipped[place] ^= 1 << bit
            spoilt.append(flipped.tobytes())
    rng = np.random.default_rng(0)
    for _ in range(2000):
        wild = data.copy()
        where = rng.integers(0, len(data), rng.integers(2, 9))
        wild[where] = rng.integers(0, 256, len(where))
        if not np.array_equal(wild, data):
            spoilt.append(wild.tobytes())
    assert len(spoilt) > 2000 + 8 * len(data)
    passed = []
    for candidate in spoilt:
        try:
            passed.append(unpack(candidate))
        except FormatError:
            continue
    # A checksum of 16 bits lets one random change in 65,536 through; the packet's own seal has to catch those.
    assert len(passed) <= 2
    for file in passed:
        with pytest.raises((FormatError, WeightsError)):
            _decode(tiny_codec, file)


def _decode(codec, file):
    pipeline.check_weights(codec, file)
    return jaxsem.decompress_items(codec, file.items)


def test_a_spoilt_packet_in_a_sound_container_is_an_error_or_an_image_of_the_true_size(item, tiny_codec):
    packet = np.frombuffer(item.sections[0], np.uint8)
    rng = np.random.default_rng(1)
    errors = 0
    for trial in range(300):
        wild = packet[: rng.integers(0, len(packet))] if trial % 4 == 0 else packet.copy()
        if trial % 4:
            wild[rng.integers(0, len(wild))] ^= 1 << rng.integers(8)
        if trial % 4 == 3:
            wild = np.concatenate([wild, rng.integers(0, 256, 5, np.uint8)])
        try:
            [image] = jaxsem.decompress_items(tiny_codec, [replace(item, sections={0: wild.tobytes()})])
        except FormatError:
            errors += 1
        else:
            assert image.shape == (40, 50, 3)
    assert errors >= 295


@pytest.mark.parametrize("size", [(40, 66), (24, 50), (1, 1), (64, 64)])
def test_a_packet_of_another_size_is_refused(item, tiny_codec, size):
    with pytest.raises(FormatError):
        jaxsem.decompress_items(tiny_codec, [replace(item, height=size[0], width=size[1])])


def test_noise_is_no_packet(item, tiny_codec):
    rng = np.random.default_rng(2)
    for length in (0, 1, 4, 5, 100, 5000):
        noise = bytes([32]) * (length > 0) + rng.bytes(max(length - 1, 0))
        with pytest.raises(FormatError):
            jaxsem.decompress_items(tiny_codec, [replace(item, sections={0: noise})])
