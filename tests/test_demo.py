import re

import pytest

from jaxsem import demo, pipeline
from jaxsem.errors import OutputError


@pytest.fixture(scope="module")
def page(tiny_codec, noise_photo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return demo.run_demo(folder / "new", quiet=True, codec=tiny_codec, photos={"noise": noise_photo(64, 100)})


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


def test_a_second_demo_replaces_the_first_but_no_strange_page(page, tiny_codec, noise_photo):
    arguments = {"quiet": True, "codec": tiny_codec, "photos": {"noise": noise_photo(64, 100)}}
    assert demo.run_demo(page.parent, **arguments) == page
    strange = page.parent / "other"
    strange.mkdir()
    (strange / "index.html").write_text("my diary")
    with pytest.raises(OutputError):
        demo.run_demo(strange, **arguments)
    assert (strange / "index.html").read_text() == "my diary"
