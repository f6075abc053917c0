import dataclasses
import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from photos import pixels, write_photo
from PIL import Image

import jaxsem
from jaxsem import presets
from jaxsem.codecs import ElicConfig
from jaxsem.commands import weights
from jaxsem.data.images import read_image
from jaxsem.presets import Preset

COMMANDS = (
    *("demo", "calibrate", "compress", "decompress", "info", "eval", "train", "presets", "weights"),
    *("features", "classify", "caption", "refer"),
)


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.strip()


@pytest.fixture
def stdin(monkeypatch):
    def give(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return give


@pytest.fixture
def shipped_tiny(tiny_preset, monkeypatch):
    """Makes the tiny codec a shipped preset."""
    known = {"tiny": Preset("tiny", "elic", ElicConfig(), "a test", weights="model.safetensors", licence="CC0")}
    for module in (presets, weights):
        monkeypatch.setattr(module, "PRESETS", known)
        monkeypatch.setattr(module, "ASSETS", Path(tiny_preset))
    weights.shipped_digests.cache_clear()
    yield
    weights.shipped_digests.cache_clear()


# -- the command itself -----------------------------------------------------------------------------------------------


def test_version_and_help_load_no_jax():
    code = (
        "import sys; from jaxsem.cli import build_parser; build_parser().format_help(); "
        "print([m for m in ('jax', 'numpy', 'PIL') if m in sys.modules])"
    )
    assert python(code) == "[]"


def test_version(command):
    assert command("--version") == (0, f"jaxsem {jaxsem.__version__}\n".encode(), "")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(command, name):
    status, out, _ = command(name, "--help")
    assert status == 0
    assert f"usage: jaxsem {name}".encode() in out


def test_misuse_is_a_status_of_2(command):
    status, out, err = command("compress")
    assert (status, out) == (2, b"")
    assert "PHOTO" in err


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 2, "memory"),
        (jaxsem.InputError("one\n  sentence"), 2, "jaxsem: one sentence\n"),
    ],
)
def test_what_stops_a_command_is_one_sentence(command, monkeypatch, error, status, sentence):
    def run(args):
        raise error

    monkeypatch.setitem(sys.modules, "jaxsem.commands.info", types.SimpleNamespace(run=run))
    seen, out, err = command("info", "x")
    assert (seen, out) == (status, b"")
    assert sentence in err
    assert err.count("\n") == 1


def test_a_reader_that_goes_away_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "jaxsem", "presets"], stdout=write, stderr=subprocess.PIPE, timeout=120
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


# -- compress and decompress ------------------------------------------------------------------------------------------


def test_a_photo_comes_back_as_the_library_gives_it(command, tmp_path, tiny_preset, tiny_codec):
    photo = write_photo(tmp_path / "a.png")
    status, out, err = command("compress", photo, "--preset", tiny_preset)
    size = (tmp_path / "a.jsem").stat().st_size
    assert (status, err) == (0, "")
    assert f"50x40, {size:,} bytes, {8 * size / 2000:.3f} bits per pixel" in out.decode()
    [file] = jaxsem.compress(tiny_codec.at_quality(1), [pixels(40, 50)])
    assert (tmp_path / "a.jsem").read_bytes() == file

    status, _, err = command("decompress", tmp_path / "a.jsem", "-o", tmp_path / "b.png", "--preset", tiny_preset)
    assert (status, err) == (0, "")
    [image] = jaxsem.decompress(tiny_codec, [file])
    np.testing.assert_array_equal(read_image(tmp_path / "b.png"), image)


def test_a_packet_says_its_arithmetic_and_either_is_read(command, tmp_path, tiny_preset):
    photo = write_photo(tmp_path / "a.png")
    for arithmetic in ("exact", "float"):
        file = tmp_path / f"{arithmetic}.jsem"
        options = ("--preset", tiny_preset, "--arithmetic", arithmetic)
        assert command("compress", photo, "-o", file, *options)[0] == 0
        _, out, _ = command("info", file, "--json")
        assert json.loads(out)["files"][0]["images"][0]["arithmetic"] == arithmetic
        assert command("decompress", file, "--preset", tiny_preset)[0] == 0


def test_weights_are_calibrated_and_keep_their_card(command, tmp_path, tiny_codec):
    before, after = tmp_path / "float.safetensors", tmp_path / "exact.safetensors"
    presets.save(dataclasses.replace(tiny_codec, exact=None, arithmetic="float"), before, "elic", {"note": "kept"})
    assert presets.load(str(before)).arithmetic == "float"
    photos = tmp_path / "photos"
    for seed in range(3):
        write_photo(photos / f"{seed}.png", 70, 80, seed)
    status, out, err = command("calibrate", before, "--data", photos, "--limit", "2", "-o", after)
    assert (status, err) == (0, "")
    codec = presets.load(str(after))
    assert codec.arithmetic == "exact"
    assert codec.digest.hex()[:12] in out.decode()
    card = presets.card_of(str(after))
    assert (card["note"], card["calibration"]["photos"]) == ("kept", 2)
    assert command("calibrate", before, "-o", after)[0] == 2


def test_a_folder_is_mirrored(command, tmp_path, tiny_preset):
    write_photo(tmp_path / "in" / "a.png")
    write_photo(tmp_path / "in" / "deep" / "er" / "a.jpg", seed=1)
    assert command("compress", tmp_path / "in", "-o", tmp_path / "out", "--preset", tiny_preset)[0] == 0
    assert {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.jsem")} == {
        "a.jsem",
        "deep/er/a.jsem",
    }
    options = ("-o", tmp_path / "back", "--format", "webp", "--preset", tiny_preset)
    assert command("decompress", tmp_path / "out", *options)[0] == 0
    assert {p.relative_to(tmp_path / "back").as_posix() for p in (tmp_path / "back").rglob("*.*")} == {
        "a.webp",
        "deep/er/a.webp",
    }


def test_standard_input_and_output(command, stdin, tmp_path, tiny_preset):
    stdin(write_photo(tmp_path / "a.png").read_bytes())
    status, file, err = command("compress", "-", "--preset", tiny_preset)
    assert (status, err) == (0, "")
    stdin(file)
    status, out, err = command("decompress", "-", "--preset", tiny_preset)
    assert (status, err) == (0, "")
    assert Image.open(io.BytesIO(out)).size == (50, 40)
    assert Image.open(io.BytesIO(out)).format == "PNG"


def test_many_files_do_not_go_to_standard_output(command, tmp_path, tiny_preset):
    photos = [write_photo(tmp_path / f"{k}.png") for k in range(2)]
    status, out, err = command("compress", *photos, "-o", "-", "--preset", tiny_preset)
    assert (status, out) == (2, b"")
    assert "2 results cannot go to standard output" in err


def test_bytes_are_not_written_to_a_terminal(command, tmp_path, monkeypatch):
    photo = write_photo(tmp_path / "a.png")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    status, _, err = command("compress", photo, "-o", "-")
    assert status == 2
    assert "terminal" in err


def test_an_archive_keeps_names_and_order(command, tmp_path, tiny_preset):
    write_photo(tmp_path / "in" / "b.jpg")
    write_photo(tmp_path / "in" / "deep" / "a.png", 33, 20)
    archive = tmp_path / "all.jsem"
    status, out, _ = command("compress", tmp_path / "in", "--archive", archive, "--preset", tiny_preset, "--json")
    assert status == 0
    assert json.loads(out)["bytes"] == archive.stat().st_size
    assert [file["photo"].rpartition("in/")[2] for file in json.loads(out)["files"]] == ["b.jpg", "deep/a.png"]
    assert command("decompress", archive, "--preset", tiny_preset)[0] == 0
    assert read_image(tmp_path / "all" / "b.png").shape == (40, 50, 3)
    assert read_image(tmp_path / "all" / "deep" / "a.png").shape == (33, 20, 3)


def test_quality_is_obeyed_and_told(command, tmp_path, tiny_preset):
    photo = write_photo(tmp_path / "a.png")
    status, out, _ = command("compress", photo, "--preset", tiny_preset, "--quality", "0.5", "--json")
    assert status == 0
    [row] = json.loads(out)["files"]
    assert row["quality"] == 0.5
    _, out, _ = command("info", tmp_path / "a.jsem", "--json")
    assert json.loads(out)["files"][0]["images"][0]["quality"] == 0.5


def test_quiet_says_nothing(command, tmp_path, tiny_preset):
    photo = write_photo(tmp_path / "a.png")
    assert command("compress", photo, "--preset", tiny_preset, "--quiet") == (0, b"", "")
    arguments = (tmp_path / "a.jsem", "-o", tmp_path / "b.png", "--preset", tiny_preset, "-q")
    assert command("decompress", *arguments) == (0, b"", "")


def test_weights_alone_are_a_codec(command, tmp_path, tiny_preset):
    photo = write_photo(tmp_path / "a.png")
    assert command("compress", photo, "--weights", f"{tiny_preset}/model.safetensors")[0] == 0


def test_a_shipped_codec_is_found_by_the_digest(command, tmp_path, tiny_preset, shipped_tiny):
    photo = write_photo(tmp_path / "a.png")
    assert command("compress", photo, "--preset", "tiny")[0] == 0
    assert command("decompress", tmp_path / "a.jsem", "-o", tmp_path / "b.png")[0] == 0
    _, out, _ = command("info", tmp_path / "a.jsem")
    assert b"preset   tiny" in out


# -- info, presets ----------------------------------------------------------------------------------------------------


def test_info_accounts_for_every_byte(command, tmp_path, tiny_codec):
    file = tmp_path / "a.jsem"
    file.write_bytes(jaxsem.compress(tiny_codec.at_quality(1), [pixels(40, 50)])[0])
    status, out, err = command("info", file, "--json")
    assert (status, err) == (0, "")
    [record] = json.loads(out)["files"]
    assert sum(record["sections"].values()) == record["bytes"] == file.stat().st_size
    assert record["bpp"] == pytest.approx(8 * record["bytes"] / 2000)
    assert tiny_codec.digest.hex().startswith(record["weights"])
    status, out, _ = command("info", file)
    assert status == 0
    for part in ("packet", "header", "checksums", "50x40", "quality 1", record["weights"]):
        assert part in out.decode()


def test_info_compiles_nothing(command, tmp_path, tiny_codec, monkeypatch):
    import jax

    file = tmp_path / "a.jsem"
    file.write_bytes(jaxsem.compress(tiny_codec, [pixels(40, 50)])[0])
    monkeypatch.setattr(jax, "jit", None)
    monkeypatch.setattr(jax, "device_put", None)
    assert command("info", file)[0] == 0


def test_presets_lists_them_all(command):
    status, out, _ = command("presets")
    assert status == 0
    assert all(name in out.decode() for name in jaxsem.PRESETS)
    _, out, _ = command("presets", "--json")
    counts = {record["name"]: record["parameters"] for record in json.loads(out)["presets"]}
    assert counts["elic"] == 33_792_771
    assert counts["elic-official"] == 32_074_200


# -- demo, train: only what is handed on ------------------------------------------------------------------------------


def test_demo_is_handed_its_options(command, monkeypatch, tmp_path):
    seen = []
    fake = types.SimpleNamespace(run_demo=lambda out, quiet, force: seen.append((out, quiet, force)))
    monkeypatch.setitem(sys.modules, "jaxsem.demo", fake)
    monkeypatch.delitem(sys.modules, "jaxsem.commands.demo", raising=False)
    assert command("demo", "--out", tmp_path, "--quiet", "--force")[0] == 0
    assert seen == [(tmp_path, True, True)]


def test_train_is_handed_its_options(command, monkeypatch):
    seen = []
    fake = types.SimpleNamespace(run_recipe=lambda *args: seen.append(args) or "runs/x/model.safetensors")
    monkeypatch.setitem(sys.modules, "jaxsem.recipes", fake)
    status, out, _ = command("train", "x", "--set", "steps=3", "--set", "batch=2", "--quick")
    assert status == 0
    assert b"runs/x/model.safetensors" in out
    assert seen == [("x", None, ["steps=3", "batch=2"], True, False)]
