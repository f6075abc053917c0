import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxsem import results
from jaxsem.errors import InputError
from jaxsem.metrics import anchors

TOOLS = Path(__file__).resolve().parents[2] / "tools"
CURVE = np.array([(0.1, 25.0), (0.3, 28.0), (0.5, 30.0), (5.0, 60.0)])


@pytest.fixture(scope="module", autouse=True)
def tools_on_path():
    sys.path.insert(0, str(TOOLS))
    yield
    sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def rd_plot():
    return importlib.import_module("rd_plot")


@pytest.fixture(scope="module")
def rd_curves():
    return importlib.import_module("rd_curves")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    row, column = np.mgrid[:176, :192]
    for i in (1, 2):
        shapes = np.stack([row + i * column, 2 * row, 255 - column], -1) % 200
        noisy = shapes + np.random.default_rng(i).integers(-5, 6, shapes.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def webp(rd_curves, photos):
    images = rd_curves._read_images(rd_curves.find_images(photos))
    return anchors.measure(anchors.find_anchor("webp"), images, "photos")


@pytest.fixture
def mini(webp, tmp_path):
    """The result of a preset whose files are 70 % of WebP's."""
    rows = [{**row, "bpp": 0.7 * row["bpp"]} for row in webp["images"]]
    results.write_json(tmp_path / "mini.json", results.make_record("mini", "photos", rows))
    return str(tmp_path / "mini.json")


@pytest.fixture
def only_webp(monkeypatch, rd_curves):
    monkeypatch.setattr(rd_curves.anchors, "ANCHORS", {"webp": anchors.ANCHORS["webp"]})


def test_the_figure_has_a_panel_per_metric_with_every_curve_named_best_first(rd_plot):
    better = np.column_stack([CURVE[:, 0], CURVE[:, 1] + 2])
    figure = rd_plot.draw(
        {"PSNR": ([("mini", better)], [("JPEG", CURVE)]), "MS-SSIM": ([], [("JPEG", CURVE)])}, title="t"
    )
    names = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]
    assert names == [["mini", "JPEG"], ["JPEG"]]
    np.testing.assert_array_equal(figure.axes[0].lines[1].get_xydata(), better)


def test_the_height_fits_what_is_seen_not_what_lies_beyond_the_limit(rd_plot):
    figure = rd_plot.draw({"PSNR": ([], [("JPEG", CURVE)])}, title="t", bpp_limit=0.6)
    low, high = figure.axes[0].get_ylim()
    assert low < 25
    assert 30 < high < 33


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_saving_writes_a_readable_file(rd_plot, tmp_path, suffix):
    figure = rd_plot.draw({"PSNR": ([("mini", CURVE)], [])}, title="t", bpp_range=(0.1, 0.5))
    rd_plot.save(figure, tmp_path / f"rd{suffix}")
    start = (tmp_path / f"rd{suffix}").read_bytes()[:8]
    assert start.startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix])


def test_another_ending_is_refused(rd_plot, tmp_path):
    with pytest.raises(InputError, match=r"ends in \.png, \.svg, \.pdf"):
        rd_plot.save(rd_plot.draw({"PSNR": ([], [])}, title="t"), tmp_path / "rd.doc")


@pytest.mark.usefixtures("only_webp")
def test_the_command_compares_on_the_same_images_and_draws(rd_curves, photos, mini, tmp_path, capsys):
    out, file = tmp_path / "rd.png", tmp_path / "rd.json"
    assert rd_curves.main([mini, "--data", str(photos), "--out", str(out), "--json", str(file), "--quiet"]) == 0
    assert "| mini | PSNR (dB) | -30.0 %" in capsys.readouterr().out
    written = json.loads(file.read_text())
    percents = {(r["codec"], r["metric"]): r["percent"] for r in written["bd_rate"]}
    assert percents == pytest.approx({("mini", "psnr"): -30, ("mini", "ms_ssim"): -30}, abs=1e-6)
    assert [curve["preset"] for curve in written["curves"]] == ["mini", "webp"]
    with Image.open(out) as image:
        assert image.size == (1680, 740)


@pytest.mark.usefixtures("only_webp")
def test_the_cache_spares_measuring_until_an_image_changes(rd_curves, photos, webp, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(rd_curves.anchors, "measure", lambda *a, **k: calls.append(1) or webp)
    images, cache = rd_curves.find_images(photos), str(tmp_path / "cache.json")
    first = rd_curves.measure_classics(images, "photos", cache, quiet=True)
    assert rd_curves.measure_classics(images, "photos", cache, quiet=True) == first == {"webp": webp}
    assert len(calls) == 1
    rd_curves.measure_classics(rd_curves.find_images(photos, 1), "photos", cache, quiet=True)
    assert len(calls) == 2


def test_a_limit_takes_the_same_images_from_the_result(rd_curves, photos, mini):
    record = results.read_json(mini)
    restricted = rd_curves.restrict(record, list(rd_curves.find_images(photos, 1)), mini)
    assert {row["image"] for row in restricted["images"]} == {"1.png"}
    assert restricted["results"] == results.summarise(restricted["images"])
    assert restricted["results"] != record["results"]


def test_a_pillow_without_a_codec_leaves_it_out_with_a_sentence(rd_curves, photos, monkeypatch, capsys):
    monkeypatch.setattr(rd_curves.anchors.features, "check", lambda feature: False)
    assert rd_curves.measure_classics(rd_curves.find_images(photos), "photos", None) == {}
    assert "built without AVIF" in capsys.readouterr().err


def test_curves_that_share_no_quality_are_reported_not_fatal(rd_curves, webp):
    far = {**webp, "preset": "far", "results": [{**row, "psnr": row["psnr"] + 50} for row in webp["results"]]}
    rows = rd_curves.compare_rates([far], {"webp": webp}, "cubic")
    assert [row["percent"] for row in rows if row["metric"] == "psnr"] == [None]
    assert "share no quality" in rd_curves.bd_rate_table(rows, "cubic")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "{photos}/none"], "is not a folder with images"),
        (["--data", "{photos}", "--limit", "0"], "at least 1, not 0"),
        (["--data", "{photos}", "--out", "plot.xyz"], "ends in .png"),
        (["--data", "{photos}", "--json", "{photos}/1.png"], "exists already"),
        (["--data", "{photos}", "--cache", "{photos}/1.png"], "is not a cache of this command"),
        (["none.json", "--data", "{photos}"], "none.json does not exist"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(rd_curves, photos, capsys, arguments, message):
    assert rd_curves.main([argument.format(photos=photos) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_result_of_other_images_and_an_unreadable_image_are_refused(rd_curves, photos, mini, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "3.png").write_bytes(b"not an image")
    assert rd_curves.main([mini, "--data", str(other)]) == 2
    assert "has no row for 1 of the 1 images, such as 3.png" in capsys.readouterr().err
    assert rd_curves.main(["--data", str(other), "--quiet"]) == 2
    assert "3.png cannot be read as an image" in capsys.readouterr().err
