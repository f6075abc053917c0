"""What CLIP is given: images as transformers prepares them, and token ids of the real vocabulary."""

import gzip

import numpy as np
import pytest

from jaxsem.backbones.clip_inputs import MEAN, STD, load_tokenizer, normalize, preprocess, tokenize
from jaxsem.errors import InputError

SIZES = [(224, 224), (300, 451), (451, 300), (97, 131), (225, 640), (31, 30), (1, 1), (500, 225)]


@pytest.mark.parametrize("size", [224, 336])
def test_images_are_prepared_as_by_transformers(noise_photo, size):
    transformers = pytest.importorskip("transformers")
    photos = [noise_photo(*shape, seed) for seed, shape in enumerate(SIZES)]
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    want = [
        np.moveaxis(processor(photo, return_tensors="np", input_data_format="channels_last").pixel_values[0], 0, -1)
        for photo in photos
    ]
    found = preprocess(photos, size)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.stack(want), rtol=0, atol=1e-6)


def test_a_line_of_pixels_is_prepared_without_growing_to_gigabytes():
    line = np.linspace(0, 255, 60_000).astype(np.uint8)[None, :, None].repeat(3, 2)
    found = preprocess([line, line.swapaxes(0, 1)], 64)
    middle = normalize(np.full(3, 0.5, np.float32))
    assert found.shape == (2, 64, 64, 3)
    np.testing.assert_allclose(found[0], np.broadcast_to(middle, (64, 64, 3)), atol=0.02)
    np.testing.assert_array_equal(found[1], found[0].swapaxes(0, 1))


def test_what_the_crop_keeps_of_a_wide_image_hardly_depends_on_the_way(monkeypatch, noise_photo):
    photo = noise_photo(20, 500)
    whole = preprocess([photo], 32)
    monkeypatch.setattr("jaxsem.backbones.clip_inputs._WIDEST", 2)
    part = preprocess([photo], 32)
    assert np.abs(part - whole).max() <= 1.01 / 255 / STD.min()


def test_normalised_values_have_the_published_mean_and_deviation():
    np.testing.assert_allclose(normalize(MEAN), 0)
    np.testing.assert_allclose(normalize(MEAN + STD), 1, rtol=1e-5)


def test_no_image_is_an_error():
    with pytest.raises(InputError, match="no image to preprocess"):
        preprocess([])


# -- texts ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(shared_data):
    pytest.importorskip("transformers")
    return load_tokenizer(shared_data / "clip-vit-l14" / "bpe_simple_vocab_16e6.txt.gz")


def test_ids_are_those_of_openai(tokenizer):
    """The ids that OpenAI's `clip.tokenize` gives, as printed in its and in transformers' documentation."""
    ids = tokenize(tokenizer, ["a photo of a cat", "a photo of a dog", "a diagram", "HELLO   world!"])
    assert ids.shape == (4, 77)
    assert ids.dtype == np.int32
    for row, words in zip(
        ids, ([320, 1125, 539, 320, 2368], [320, 1125, 539, 320, 1929], [320, 22697], [3306, 1002, 256])
    ):
        assert row[: len(words) + 2].tolist() == [49406, *words, 49407]
        assert set(row[len(words) + 2 :].tolist()) == {49407}
    assert len(tokenizer) == 49408


def test_the_end_of_text_is_the_largest_id_and_comes_first_where_it_is_padding_too(tokenizer):
    ids = tokenize(tokenizer, "a cat", 9)
    assert ids.argmax(1).tolist() == [3]


def test_a_saved_tokenizer_loads_from_its_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    texts = ["naïve café, 10 km", "the SMALL green cross 🙂"]
    np.testing.assert_array_equal(tokenize(again, texts), tokenize(tokenizer, texts))


def test_a_text_of_exactly_the_length_fits_and_a_longer_one_is_counted(tokenizer):
    assert tokenize(tokenizer, "cat " * 75, 77)[0, -1] == 49407
    with pytest.raises(InputError, match=r'the text "cat cat .*" has 78 tokens, start and end included, and 77 fit'):
        tokenize(tokenizer, ["a cat", "cat " * 76], 77)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a cat", " \n"], "text 2 of 2 is empty"),
        ("", "text 1 of 1 is empty"),
        (["a cat", 3], "text 2 of 2 is a int"),
        ([], "no text to tokenize"),
    ],
)
def test_what_is_no_text_is_an_error(tokenizer, texts, message):
    with pytest.raises(InputError, match=message):
        tokenize(tokenizer, texts)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x1f\x8b garbage", gzip.compress(b"version\na b c\n"), b"version\n\xff\xfe", gzip.compress(b"x")[:-5]],
    ids=("empty", "no gzip", "no merges", "no text", "cut short"),  # gzip writes the time into its bytes
)
def test_a_file_that_holds_no_merges_is_an_error(tmp_path, data):
    pytest.importorskip("transformers")
    path = tmp_path / "merges.txt.gz"
    path.write_bytes(data)
    with pytest.raises(InputError, match="is no list of BPE merges"):
        load_tokenizer(path)


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match="holds no tokenizer of CLIP"):
        load_tokenizer(tmp_path)
