"""The benchmark commands run, check what they time, and write their figures."""

import importlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxsem import cli, pipeline
from jaxsem.data.images import write_image
from jaxsem.errors import InputError, JaxsemError

pytestmark = pytest.mark.slow  # runs whole commands

TOOLS = Path(__file__).resolve().parents[2] / "tools"

RECIPE = """
from jaxsem.codecs import HyperpriorConfig
from jaxsem.recipes import Recipe

RECIPE = Recipe("tiny", "hyperprior", HyperpriorConfig(channels=8, latent=8), batch=8, crop=64)
QUICK = {"ema_decay": 0.9}
"""


@pytest.fixture(scope="module", autouse=True)
def tools_on_path():
    sys.path.insert(0, str(TOOLS))
    yield
    sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def timing():
    return importlib.import_module("_timing")


@pytest.fixture(scope="module")
def bench_entropy():
    return importlib.import_module("bench_entropy")


@pytest.fixture(scope="module")
def bench_codec():
    return importlib.import_module("bench_codec")


@pytest.fixture(scope="module")
def bench_training():
    return importlib.import_module("bench_training")


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(RECIPE)
    return str(path)


# -- what they share -----------------------------------------------------------------------------------------------------


def test_a_spread_is_median_and_quartiles(timing):
    spread = timing.Spread.of([5, 1, 2, 4, 3])
    assert (spread.median, spread.low, spread.high) == (3, 2, 4)
    assert spread.show() == "3.0 [2.0, 4.0]"


def test_a_size_is_width_by_height(timing):
    assert timing.parse_size("768x512") == (512, 768)


@pytest.mark.parametrize("text", ["768", "0x5", "7x8x9", "ax5", "-4x4"])
def test_another_size_is_refused(timing, text):
    with pytest.raises(InputError, match=text):
        timing.parse_size(text)


# -- entropy ---------------------------------------------------------------------------------------------------------------


def test_entropy_quick_run_writes_both_cases(bench_entropy, tmp_path, capsys):
    assert bench_entropy.main(["--quick", "--json", str(tmp_path / "figures.json")]) == 0
    cases = json.loads((tmp_path / "figures.json").read_text())["cases"]
    assert cases["long"]["rows"][0]["name"] == "jaxsem compiled"
    assert 0 < cases["tiny"]["rows"][0]["overhead_percent"] < 1
    assert "device:" in capsys.readouterr().out


def test_a_coder_that_loses_symbols_stops_the_run(bench_entropy):
    broken = bench_entropy.Coder("broken", lambda: [b"x"], lambda streams: np.zeros(2), np.ones(2))
    with pytest.raises(SystemExit, match="broken does not decode"):
        bench_entropy.run([broken], 1, 1.0)


def test_overhead_on_a_long_stream_is_below_a_thousandth(bench_entropy):
    coders, ideal = bench_entropy.long_case(bench_entropy.LONG_SYMBOLS)
    assert 1 < len(coders[0].encode()[0]) / ideal < 1.001


# -- codec -----------------------------------------------------------------------------------------------------------------


def test_codec_quick_run_times_every_stage_of_every_batch(bench_codec, tiny_preset, tmp_path, capsys):
    file = tmp_path / "figures.json"
    options = ["--quick", "--size", "64x48", "--batch", "1", "2", "--json", str(file)]
    assert bench_codec.main([tiny_preset, *options]) == 0
    figures = json.loads(file.read_text())
    assert [row["batch"] for row in figures["warm"]] == [1, 2]
    for row in figures["warm"]:
        assert list(row["compress"]) == [bench_codec.WHOLE, *bench_codec.COMPRESS]
        assert set(row["decompress"]) == {bench_codec.WHOLE, *bench_codec.DECOMPRESS}
        assert min(spread["low"] for stages in (row["compress"], row["decompress"]) for spread in stages.values()) > 0
    assert "synthesis network" in capsys.readouterr().out


def test_the_stages_of_decoding_count_no_time_twice(bench_codec, tiny_codec, noise_photo):
    files = pipeline.compress(tiny_codec, [noise_photo(48, 64)])
    bench_codec.decompress_stages(tiny_codec, files)
    begin = time.perf_counter()
    _, clock = bench_codec.decompress_stages(tiny_codec, files)
    whole = time.perf_counter() - begin
    assert 0.5 * whole < sum(clock.stages.values()) <= whole


def test_stages_that_give_other_images_stop_the_run(bench_codec, tiny_codec, noise_photo, monkeypatch):
    photo = noise_photo(48, 64)
    monkeypatch.setattr(bench_codec, "decompress_stages", lambda codec, files: ([photo], None))
    with pytest.raises(SystemExit, match="do not give the images"):
        bench_codec.measure_warm(tiny_codec, [photo], 1)


def test_a_photo_is_mirrored_outwards_and_cut(bench_codec):
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    wide = bench_codec.fit(image, 1, 5)
    assert wide[..., 0].tolist() == [[0, 3, 6, 6, 3]]


def test_the_commands_of_the_fresh_processes_work(bench_codec, tiny_preset, noise_photo, tmp_path):
    options = ["--preset", tiny_preset, "--quiet", "--force"]
    commands = bench_codec._commands(tmp_path, noise_photo(48, 64), options, ["--quality", "1"])
    for arguments in commands.values():
        assert arguments[:2] == ["-m", "jaxsem"]
        assert cli.main(arguments[2:]) == 0
    assert (tmp_path / "back.png").exists()


def test_a_fresh_process_tells_its_own_time_and_memory(bench_codec):
    code = "import time; held = b'x' * 150_000_000; time.sleep(0.2)"
    seconds, megabytes = bench_codec.run_fresh(["-c", code], {})
    assert seconds > 0.2
    assert 150 < megabytes < 200  # this process, with JAX in it, holds more


def test_a_fresh_process_that_fails_tells_why(bench_codec):
    with pytest.raises(JaxsemError, match="no such luck"):
        bench_codec.run_fresh(["-c", "raise SystemExit('no such luck')"], {})


def test_an_unknown_preset_is_one_sentence(bench_codec, capsys):
    assert bench_codec.main(["nothing", "--quick"]) == 2
    assert "bench_codec: 'nothing' is neither a preset" in capsys.readouterr().err


# -- training --------------------------------------------------------------------------------------------------------------


def test_training_quick_run_gives_rates_and_arithmetic(bench_training, recipe, tmp_path, capsys):
    file = tmp_path / "figures.json"
    options = ["--quick", "--dtype", "float32", "--repeats", "1", "--json", str(file)]
    assert bench_training.main([recipe, *options]) == 0
    [row] = json.loads(file.read_text())["rows"]
    seconds = row["seconds"]["median"]
    assert row["images_per_second"]["median"] == pytest.approx(8 / seconds)
    assert row["gflop_per_second"]["median"] == pytest.approx(row["gflop"] / seconds)
    assert "float32" in capsys.readouterr().out


def test_a_batch_that_the_devices_cannot_share_is_refused(bench_training, recipe, capsys):
    assert bench_training.main([recipe, "--batch", "3"]) == 2
    assert "batch of 3" in capsys.readouterr().err


def test_bench_exact_gives_rates_times_and_their_ratio(tiny_preset, tmp_path, capsys):
    bench_exact = importlib.import_module("bench_exact")
    write_image(tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    options = [
        tiny_preset,
        "--data",
        str(tmp_path),
        "--size",
        "64x64",
        "--quick",
        "--json",
        str(tmp_path / "figures.json"),
    ]
    assert bench_exact.main(options) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [row["quality"] for row in figures["rates"]] == [0, 1, -1]
    assert all(row["exact"] > 0 and row["float"] > 0 and row["compressai"] > 0 for row in figures["rates"])
    assert figures["times"]["decoder"]["ratio"]["median"] > 0
    assert "exact / float" in capsys.readouterr().out
