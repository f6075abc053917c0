"""The CLIP benchmark runs, counts operations as published, checks what it times, and writes its figures."""

import importlib
import json
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from toy_clip import pictures, save_clip, toy_clip

from jaxsem.backbones.clip_config import CONFIGS
from jaxsem.data.images import encode_image

pytestmark = pytest.mark.slow  # runs whole commands

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(TOOLS))
    yield importlib.import_module("bench_clip")
    sys.path.remove(str(TOOLS))


@pytest.fixture
def jpegs():
    return [encode_image(picture, ".jpg") for picture in pictures(3)]


@pytest.fixture
def clip():
    return toy_clip()


def test_a_quick_run_writes_every_stage_of_every_batch(bench, tmp_path, capsys):
    file, options = tmp_path / "figures.json", ["--batch", "2", "3", "--peak", "2", "--repeats", "1"]
    assert bench.main(["--quick", "--pqvae", *options, "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert [row["batch"] for row in figures["batches"]] == [2, 3]
    for row in figures["batches"]:
        assert list(row["seconds"]) == [*bench.PLACES, "entropy coding", "write"]
        for name, spread in row["seconds"].items():
            assert row["images_per_second"][name]["median"] == pytest.approx(row["batch"] / spread["median"])
        assert row["pipeline"]["median"] > 0
        assert row["rate_in_turn"] < row["slowest_rate"]
        wanted = figures["gflop_per_image"]["formula"] / 1e3 * row["images_per_second"]["CLIP"]["median"]
        assert row["teraflops"]["median"] == pytest.approx(wanted)
        assert row["share_of_peak"] == pytest.approx(wanted / 2)
        assert row["share_of_measured"] == pytest.approx(wanted / figures["matmul_teraflops"]["median"])
    out = capsys.readouterr().out
    assert "of its slowest part" in out
    assert "of the data sheet's 2" in out


def test_features_alone_are_fetched_and_written_whole(bench, tmp_path):
    file = tmp_path / "figures.json"
    assert bench.main(["--quick", "--batch", "2", "--repeats", "1", "--json", str(file)]) == 0
    [row] = json.loads(file.read_text())["batches"]
    assert list(row["seconds"]) == ["decode", "crop", "transfer", "CLIP", "fetch", "write"]
    assert row["bytes_per_image"] == 4 * 64
    assert row["share_of_peak"] is None


@pytest.mark.parametrize(
    ("name", "gmacs"), [("ViT-B/32", 4.4), ("ViT-B/16", 17.6), ("ViT-L/14", 81.1), ("ViT-L/14@336px", 191.1)]
)
def test_operations_by_formula_are_those_published(bench, name, gmacs):
    """GMACs as timm's table of model sizes prints them for the image towers."""
    assert bench.formula_flops(CONFIGS[name]) / 2e9 == pytest.approx(gmacs, rel=0.012)


def test_xla_counts_little_more_than_the_formula(bench):
    options = types.SimpleNamespace(preset=None, clip="mini", pqvae=False, quick=True)
    model, _ = bench.open_model(options, jnp.dtype("float32"))
    ratio = bench.xla_flops(model) / bench.formula_flops(model.module.config)
    assert 1 < ratio < 1.15  # normalisations, softmax, activations


def test_convolutions_before_the_patches_count(bench):
    import dataclasses

    plain = bench.MINI
    stem = dataclasses.replace(plain, vision=dataclasses.replace(plain.vision, stem=(16, 32)))
    more = 32 * 32 * 9 * 3 * 16 + 16 * 16 * 9 * 16 * 32 + 16 * 16 * 32 * 64 - 64 * 64 * 3 * 64
    assert bench.formula_flops(stem) - bench.formula_flops(plain) == 2 * more


def test_the_pipeline_gives_the_packets_of_the_stages(bench, clip, jpegs, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    coder = bench.Coder(
        "signs", lambda features: features > 0, lambda signs: [np.packbits(row).tobytes() for row in signs]
    )
    with open(tmp_path / "out", "w+b") as file, ThreadPoolExecutor(2) as pool:
        packets, times = bench.run_stages(clip, coder, jpegs, file, pool, 2)
        assert (tmp_path / "out").read_bytes() == b"".join(packets)
        [(_, again)] = bench.run_pipeline(clip, coder, iter(jpegs), 3, file)
    assert packets == again
    assert packets == [np.packbits(row > 0).tobytes() for row in clip.encode_images(jpegs, 3)]
    assert list(times) == ["decode", "crop", "transfer", "CLIP", "quantise", "fetch", "write"]


def test_a_pipeline_that_gives_other_packets_stops_the_run(bench, clip, jpegs, monkeypatch):
    monkeypatch.setattr(bench, "run_pipeline", lambda *_: iter([(0.0, [b"x"])]))
    with pytest.raises(SystemExit, match="do not give the packets"):
        bench.measure(clip, bench.Coder(), jpegs, 1, 1e9, 1.0)


def test_a_preset_brings_clip_and_coder(bench, clip, jpegs, monkeypatch, tmp_path):
    calls = []

    def encode(features):
        calls.append(features.shape)
        return [b"ab"] * len(features)

    monkeypatch.setattr(bench, "load", lambda name: types.SimpleNamespace(clip=clip, encode=encode))
    file = tmp_path / "figures.json"
    assert bench.main(["--quick", "--preset", "some", "--batch", "3", "--json", str(file)]) == 0
    [row] = json.loads(file.read_text())["batches"]
    assert "quantise and code" in row["seconds"]
    assert row["bytes_per_image"] == 2
    assert set(calls) == {(3, clip.width)}


def test_weights_of_a_folder(bench, tmp_path, capsys):
    assert bench.main([save_clip(tmp_path / "clip"), "--quick", "--batch", "1", "--repeats", "1"]) == 0
    assert "16x16, float32; then nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--peak", "0"], "--peak is a rate in TFLOP/s above 0"),
        (["no/such-weights/at/all"], "no/such-weights/at/all"),
        (["ViT-B/32", "--preset", "x"], "--preset brings its own CLIP: leave out ViT-B/32"),
        (["--preset", "elic-mini"], "elic-mini has no CLIP"),
        (["--data", "/no/such/folder"], "does not exist"),
    ],
)
def test_mistakes_are_one_sentence(bench, capsys, options, message):
    assert bench.main([*options, "--quick"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
