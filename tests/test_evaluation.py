import json

import jax
import numpy as np
import pytest
from photos import write_photo

import jaxsem
from jaxsem import results
from jaxsem.data.images import read_image
from jaxsem.errors import InputError
from jaxsem.metrics import psnr


@pytest.fixture
def folder(tmp_path):
    write_photo(tmp_path / "data" / "a.png", seed=1)
    write_photo(tmp_path / "data" / "deep" / "b.png", 33, 20, seed=2)
    return tmp_path / "data"


def test_every_number_is_of_the_real_bytes(folder, tiny_codec):
    record = jaxsem.evaluate(tiny_codec, str(folder), [1])
    results.validate(record)
    assert [row["image"] for row in record["images"]] == ["a.png", "deep/b.png"]
    image = read_image(folder / "deep" / "b.png")
    [file] = jaxsem.compress(tiny_codec.at_quality(1), [image])
    [again] = jaxsem.decompress(tiny_codec, [file])
    row = record["images"][1]
    assert row["bpp"] == 8 * len(file) / (33 * 20)
    assert row["bpp"] - row["payload_bpp"] == pytest.approx(8 * 10 / (33 * 20))
    assert row["psnr"] == pytest.approx(float(psnr(image, again)))
    [compressed] = jaxsem.compress_items(tiny_codec.at_quality(1), [image])
    assert row["estimated_bpp"] == pytest.approx(compressed.estimated_bits / (33 * 20))


def test_all_whole_qualities_by_default_lowest_first(folder, tiny_codec):
    record = jaxsem.evaluate(tiny_codec, str(folder), limit=1)
    assert [row["quality"] for row in record["results"]] == [0, 1]
    assert len(record["images"]) == 2


def test_equal_qualities_are_measured_once(folder, tiny_codec):
    record = jaxsem.evaluate(tiny_codec, str(folder), [0.5, 0.501, 0.5], limit=1)
    assert [row["quality"] for row in record["results"]] == [0.5]


def test_progress_is_told_of_each_measurement(folder, tiny_codec):
    steps = []
    jaxsem.evaluate(tiny_codec, str(folder), [0, 1], on_image=lambda: steps.append(1))
    assert len(steps) == 4


def test_any_source_will_do(tiny_codec):
    class Source:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return {"image": np.full((9, 7, 3), 100, np.uint8)}

    record = jaxsem.evaluate(tiny_codec, Source(), [0], name="grey")
    assert (record["data"], record["images"][0]["image"]) == ("grey", "000000")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"qualities": []}, "no quality"),
        ({"qualities": [2]}, "has qualities 0 to 1, not 2"),
        ({"limit": 0}, "at least 1 image"),
    ],
)
def test_what_cannot_be_measured_is_refused(folder, tiny_codec, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        jaxsem.evaluate(tiny_codec, str(folder), **arguments)


def test_an_empty_source_is_refused(tiny_codec):
    class Empty:
        def __len__(self):
            return 0

        def __getitem__(self, index):
            raise IndexError

    with pytest.raises(InputError, match="empty"):
        jaxsem.evaluate(tiny_codec, Empty())


def test_the_command_writes_the_record_and_a_table(command, folder, tmp_path, tiny_preset):
    status, out, err = command("eval", tiny_preset, "--data", folder, "--quality", "1", "--json", tmp_path / "r.json")
    assert (status, err) == (0, "")
    record = results.read_json(tmp_path / "r.json")
    assert (record["preset"], record["data"]) == ("tiny", str(folder))
    [row] = record["results"]
    assert f"{row['bpp']:.4f}" in out.decode()
    assert f"{row['psnr']:.2f}" in out.decode()


def test_the_command_prints_json_alone_on_request(command, folder, tiny_preset):
    options = ("--limit", "1", "--quality", "0", "--json", "-")
    status, out, _ = command("eval", tiny_preset, "--data", folder, *options)
    assert status == 0
    assert len(json.loads(out)["images"]) == 1


def test_an_existing_record_is_refused_before_the_work(command, folder, tmp_path, monkeypatch):
    (tmp_path / "r.json").write_text("mine")
    monkeypatch.setattr(jax, "jit", None)
    status, _, err = command("eval", "tiny", "--data", folder, "--json", tmp_path / "r.json")
    assert status == 2
    assert "exists already" in err
    assert (tmp_path / "r.json").read_text() == "mine"


def test_a_bad_photo_stops_an_evaluation_by_name(command, folder, tiny_preset):
    (folder / "bad.jpg").write_bytes(b"no image")
    status, out, err = command("eval", tiny_preset, "--data", folder)
    assert (status, out) == (2, b"")
    assert "bad.jpg is no image" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("limit", ["0", "-1", "many"])
def test_a_limit_is_a_positive_number(command, folder, limit):
    status, _, err = command("eval", "tiny", "--data", folder, f"--limit={limit}")
    assert status == 2
    assert "whole number" in err
