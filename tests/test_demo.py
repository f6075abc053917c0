import html
import re

import pytest
from toy_features import toy_codec

import jaxsem
from jaxsem import demo, feature_demo, pipeline
from jaxsem.errors import OutputError


def arguments_for(codec, noise_photo):
    return {"quiet": True, "codec": codec, "photos": {"noise": noise_photo(64, 100)}, "features": toy_codec()}


@pytest.fixture(scope="module")
def page(tiny_codec, noise_photo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return demo.run_demo(folder / "new", **arguments_for(tiny_codec, noise_photo))


def test_every_picture_of_the_page_exists(page):
    text = page.read_text()
    pictures = re.findall(r'src="([^"]+)"', text)
    assert {"noise.png", "noise-q0.png", "noise-q1.png"} <= set(pictures)
    assert all((page.parent / picture).is_file() for picture in pictures)


def test_the_files_of_the_page_decode_to_its_pictures(page, tiny_codec):
    from jaxsem.data.images import read_image

    [again] = pipeline.decompress(tiny_codec, [(page.parent / "noise-q1.jsem").read_bytes()])
    assert (again == read_image(page.parent / "noise-q1.png")).all()


def test_the_table_counts_every_byte(page):
    size = (page.parent / "noise-q0.jsem").stat().st_size
    assert f"<td>{size:,}</td>" in page.read_text()


def test_the_files_of_scenes_hold_what_the_page_says(page):
    codec = toy_codec()
    files = sorted(page.parent.glob("scene-*.jsem"))
    assert len(files) == len(feature_demo.SCENES)
    features = jaxsem.read_features(codec, [file.read_bytes() for file in files])
    text = html.unescape(page.read_text())
    for file, caption in zip(files, jaxsem.caption(codec, features), strict=True):
        assert f"<b>{file.stat().st_size} bytes</b>" in text
        assert f"“{caption}”" in text


def test_a_second_demo_replaces_the_first_but_no_strange_page(page, tiny_codec, noise_photo):
    arguments = arguments_for(tiny_codec, noise_photo)
    assert demo.run_demo(page.parent, **arguments) == page
    strange = page.parent / "other"
    strange.mkdir()
    (strange / "index.html").write_text("my diary")
    with pytest.raises(OutputError):
        demo.run_demo(strange, **arguments)
    assert (strange / "index.html").read_text() == "my diary"
