import html
import re

import numpy as np
import pytest
from toy_features import toy_codec
from toy_neck import language, with_toy_neck

import jaxsem
from jaxsem import demo, feature_demo, neck_demo, pipeline
from jaxsem.errors import OutputError
from jaxsem.systems.neck_codec import Reader


def arguments_for(codec, noise_photo):
    return {
        "quiet": True,
        "codec": codec,
        "photos": {"noise": noise_photo(64, 100)},
        "features": toy_codec(),
        "reader": Reader(with_toy_neck(codec), language()),
    }


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


def test_the_answers_of_the_page_are_those_about_the_files(page, tiny_codec):
    reader = Reader(with_toy_neck(tiny_codec), language())
    files = [page.parent / f"question-{number}.jsem" for number in neck_demo.SCENES]
    text = html.unescape(page.read_text())
    for file, said in zip(
        files, reader.answer([f.read_bytes() for f in files], ["Describe the image."] * 3, max_new_tokens=48)
    ):
        assert f"<b>{file.stat().st_size} bytes</b>" in text
        assert f"<br><b>{said}</b>" in text


def test_a_box_is_outlined_in_shares_of_the_picture():
    found = neck_demo.outlined(np.zeros((20, 40, 3), np.uint8), (0.25, 0.0, 0.75, 1.0)).any(axis=2)
    assert (np.flatnonzero(found.any(axis=0)).tolist(), found[10, 20]) == (list(range(10, 31)), False)


def test_a_second_demo_replaces_the_first_but_no_strange_page(page, tiny_codec, noise_photo):
    arguments = arguments_for(tiny_codec, noise_photo)
    assert demo.run_demo(page.parent, **arguments) == page
    strange = page.parent / "other"
    strange.mkdir()
    (strange / "index.html").write_text("my diary")
    with pytest.raises(OutputError):
        demo.run_demo(strange, **arguments)
    assert (strange / "index.html").read_text() == "my diary"
