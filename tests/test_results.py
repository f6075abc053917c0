import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsem import results
from jaxsem.errors import InputError, OutputError
from jaxsem.metrics import ms_ssim, psnr


def row(image, quality, bpp, **metrics):
    return {"image": image, "quality": quality, "bpp": bpp, "estimated_bpp": None, **metrics}


ROWS = [
    row("a.png", 2, 0.4, psnr=32.0, ms_ssim=0.97),
    row("b.png", 2, 0.2, psnr=36.0, ms_ssim=None),
    row("a.png", 1, 0.2, psnr=28.0, ms_ssim=0.90),
    row("b.png", 1, 0.1, psnr=30.0, ms_ssim=None),
]


@pytest.fixture
def record():
    return results.make_record("elic-mini", "photos", ROWS, {"pillow": "13.0"})


def test_means_over_the_images_lowest_quality_first():
    low, high = results.summarise(ROWS)
    assert low == pytest.approx({"quality": 1, "bpp": 0.15, "estimated_bpp": None, "psnr": 29.0, "ms_ssim": 0.9})
    assert high == pytest.approx({"quality": 2, "bpp": 0.3, "estimated_bpp": None, "psnr": 34.0, "ms_ssim": 0.97})


def test_sizes_are_not_averaged():
    assert "width" not in results.summarise([row("a", 1, 0.1, width=5, height=4)])[0]


def test_an_infinite_psnr_makes_the_mean_infinite():
    rows = [row("a", 1, 0.1, psnr=math.inf), row("b", 1, 0.1, psnr=30.0)]
    assert results.summarise(rows)[0]["psnr"] == math.inf


def test_qualities_of_different_images_are_refused():
    with pytest.raises(InputError, match="Quality 2 covers 2 images, not the same as the 1 of quality 1"):
        results.summarise(ROWS[:3])


def test_nothing_measured_is_refused():
    with pytest.raises(InputError, match="no image was measured"):
        results.summarise([])


def test_the_row_of_an_image_has_bits_per_pixel_of_its_bytes_and_the_metrics():
    rng = np.random.default_rng(0)
    original, reconstruction = rng.integers(0, 256, (2, 162, 161, 3), np.uint8)
    values = results.image_row("a/b.png", 3, 1000, original, reconstruction, estimated_bits=7900.0)
    assert values["bpp"] == pytest.approx(8000 / (162 * 161))
    assert values["estimated_bpp"] == pytest.approx(7900 / (162 * 161))
    assert (values["image"], values["quality"], values["width"], values["height"]) == ("a/b.png", 3, 161, 162)
    assert values["psnr"] == pytest.approx(float(psnr(original, reconstruction)))
    assert values["ms_ssim"] == pytest.approx(float(ms_ssim(original, reconstruction)), abs=1e-6)


def test_a_small_image_has_no_ms_ssim_and_a_perfect_one_infinite_psnr():
    image = np.zeros((8, 200, 3), np.uint8)
    assert results.compare(image, image) == {"psnr": math.inf, "ms_ssim": None}


def test_rate_points_leave_out_what_has_no_value(record):
    record["results"].append({"quality": 3, "bpp": 0.9, "psnr": math.inf, "ms_ssim": None})
    np.testing.assert_allclose(results.rate_points(record, "psnr"), [[0.15, 29], [0.3, 34]])
    assert results.rate_points(record, "lpips").shape == (0, 2)


def test_a_record_comes_back_from_its_file(record, tmp_path):
    results.write_json(tmp_path / "r.json", record)
    assert results.read_json(tmp_path / "r.json") == record
    assert record["versions"].keys() == {"jaxsem", "jax", "flax", "numpy", "python", "pillow"}
    assert "-core" in record["hardware"]


def test_the_file_is_strict_json_whatever_numbers_it_gets(tmp_path):
    values = {"a": [math.inf, math.nan, np.float32(0.5)], "b": jnp.arange(2), "c": (np.int64(3), np.array([-math.inf]))}
    results.write_json(tmp_path / "r.json", values)

    def refuse(name):
        raise AssertionError(name)

    read = json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse)
    assert read == {"a": [None, None, 0.5], "b": [0, 1], "c": [3, [None]]}


def test_an_existing_file_is_kept_unless_forced(record, tmp_path):
    path = tmp_path / "r.json"
    path.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        results.write_json(path, record)
    assert path.read_text() == "mine"
    results.write_json(path, record, force=True)
    assert results.read_json(path) == record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("results"), "has no 'results'"),
        (lambda r: r.update(preset=3), "has a number as 'preset'"),
        (lambda r: r.update(images={}), "has an object as 'images'"),
        (lambda r: r["results"].append([]), r"results\[2\], is a list instead of an object"),
        (lambda r: r["results"][1].pop("bpp"), r"results\[1\], has no 'bpp'"),
        (lambda r: r["results"][1].update(bpp=None), r"results\[1\], has no 'bpp'"),
        (lambda r: r["results"][0].update(psnr="29"), r"results\[0\], has text as 'psnr'"),
        (lambda r: r["results"][0].update(quality=True), r"results\[0\], has true or false as 'quality'"),
        (lambda r: r["images"][3].pop("image"), r"images\[3\], has no 'image'"),
    ],
)
def test_a_file_that_breaks_the_schema_names_the_place(record, tmp_path, change, message):
    change(record)
    (tmp_path / "r.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=message):
        results.read_json(tmp_path / "r.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[NaN]", b"\xff\xfe\x00", b"[" * 100_000])
def test_what_is_not_json_is_refused(tmp_path, content):
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(InputError, match="is not a JSON file"):
        results.read_json(tmp_path / "r.json")


def test_a_missing_file_and_another_json_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        results.read_json(tmp_path / "none.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(InputError, match="holds a list instead of an object"):
        results.read_json(tmp_path / "list.json")
