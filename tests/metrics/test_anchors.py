import io

import numpy as np
import pytest
from PIL import Image, features

from jaxsem.errors import InputError
from jaxsem.metrics import anchors


@pytest.fixture(scope="module")
def image():
    """Shapes of 64x96 with some texture."""
    row, column = np.mgrid[:64, :96]
    shapes = (
        np.stack([row * 3, column * 2, 255 - row - column], -1) + 40 * (row // 16 % 2 == column // 16 % 2)[..., None]
    )
    return (shapes + np.random.default_rng(0).integers(-8, 9, shapes.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", anchors.ANCHORS)
def test_a_higher_quality_is_a_larger_file_and_a_better_picture(name, image):
    if not features.check(anchors.ANCHORS[name].feature):
        pytest.skip(f"this Pillow writes no {name}")
    record = anchors.measure(anchors.find_anchor(name), [("a.png", image)], "test", qualities=(10, 60))
    low, high = record["results"]
    assert 0 < low["bpp"] < high["bpp"]
    assert 15 < low["psnr"] < high["psnr"]
    assert low["estimated_bpp"] is None
    assert record["preset"] == name


def test_jpeg_is_optimised_420_and_counts_every_byte(image):
    file = anchors.encode(anchors.find_anchor("jpeg"), image, 30)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=30, optimize=True, subsampling="4:2:0")
    assert file == buffer.getvalue()
    record = anchors.measure(anchors.find_anchor("jpeg"), [("a", image)], "test", qualities=(30,))
    assert record["results"][0]["bpp"] == pytest.approx(8 * len(file) / (64 * 96))


def test_avif_gets_the_tuning_that_is_asked_for(image):
    if not features.check("avif"):
        pytest.skip("this Pillow writes no AVIF")
    files = {name: anchors.encode(anchors.find_anchor(name), image, 30) for name in ("avif", "avif-psnr")}
    assert files["avif"] != files["avif-psnr"]


@pytest.mark.parametrize("name", anchors.ANCHORS)
def test_ladders_ascend(name):
    assert list(anchors.ANCHORS[name].qualities) == sorted(set(anchors.ANCHORS[name].qualities))


def test_rows_by_image_and_progress(image):
    seen = []
    images = ((name, image) for name in ("a", "b"))
    record = anchors.measure(anchors.find_anchor("webp"), images, "test", qualities=(5, 50), on_row=seen.append)
    assert [(r["image"], r["quality"]) for r in record["images"]] == [("a", 5), ("a", 50), ("b", 5), ("b", 50)]
    assert len(seen) == 4


def test_an_unknown_codec_and_one_that_pillow_lacks_are_refused(monkeypatch):
    with pytest.raises(InputError, match="no classic codec 'jxl'"):
        anchors.find_anchor("jxl")
    monkeypatch.setattr(anchors.features, "check", lambda feature: False)
    with pytest.raises(InputError, match="built without AVIF"):
        anchors.find_anchor("avif")
