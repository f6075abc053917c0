"""CLIP ready for use: parity with transformers, batches that change nothing, prompts, loading without texts, bad input."""

import time

import jax
import numpy as np
import pytest
from clip_reference import TEXT, VISION, import_reference
from clip_reference import model as reference_model
from toy_clip import WIDTH, pictures, save_clip, toy_clip

from jaxsem.backbones.clip_inputs import preprocess
from jaxsem.errors import InputError
from jaxsem.systems.clip_model import ClipModel, default_batch, load_clip_model, prepare_ahead
from jaxsem.training.sharding import make_mesh
from jaxsem.weights.clip import config_from_transformers, load_clip


@pytest.fixture
def clip():
    return toy_clip()


def close(found, wanted, atol=1e-5):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=atol)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# -- what it computes -------------------------------------------------------------------------------------------------


class Ids:
    """A tokenizer of texts that are numbers between the start 97 and the end 98 of the reference's vocabulary."""

    pad_token_id = 98

    def __call__(self, texts):
        return {"input_ids": [[97, *map(int, text.split()), 98] for text in texts]}


@pytest.fixture(scope="module")
def pair():
    """A CLIPModel of transformers, and this one with its weights."""
    net = reference_model()
    state = {key: value.numpy() for key, value in net.state_dict().items()}
    module, params = load_clip(state, config_from_transformers(net.config.to_dict()))
    return net, ClipModel("reference", module, params, Ids())


def test_features_are_those_of_transformers_made_unit(pair):
    torch, _ = import_reference()
    net, clip = pair
    photos = pictures(3, 40, 50)
    pixels = preprocess(photos, VISION["image_size"])
    with torch.no_grad():
        found = net.get_image_features(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    close(clip.encode_images(photos), unit(_array(found)))


def test_texts_are_those_of_transformers_made_unit(pair):
    torch, _ = import_reference()
    net, clip = pair
    texts = ["1 2 3", "44", "9 8 7 6 5 4 3 2 1"]
    ids = np.full((3, TEXT["max_position_embeddings"]), 98)
    for row, text in zip(ids, texts):
        row[: 2 + len(text.split())] = Ids()([text])["input_ids"][0]
    with torch.no_grad():
        found = net.get_text_features(torch.from_numpy(ids))
    close(clip.encode_texts(texts), unit(_array(found)))


def _array(found):
    """transformers gives the features, or, since 5, an object that holds them."""
    return np.asarray(getattr(found, "pooler_output", found))


def test_features_do_not_depend_on_the_batch(clip):
    photos = pictures(7)
    whole = clip.encode_images(photos, 7)
    assert whole.shape == (7, WIDTH)
    assert whole.dtype == np.float32
    close(np.linalg.norm(whole, axis=1), 1)
    for batch in (1, 3, 16):
        close(clip.encode_images(photos, batch), whole)


def test_images_may_be_paths_bytes_and_arrays(clip, tmp_path):
    from jaxsem.data.images import write_image

    [photo] = pictures(1)
    write_image(tmp_path / "a.png", photo)
    forms = [photo, tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()]
    found = clip.encode_images(forms, 4)
    close(found, found[:1].repeat(4, 0))


def test_eight_devices_share_a_batch(clip):
    photos = pictures(21)
    with_mesh = list(clip.encode_stream(photos, 16, mesh=make_mesh()))
    assert [len(part) for part in with_mesh] == [16, 5]
    close(np.concatenate(with_mesh), clip.encode_images(photos, 16))


def test_a_batch_lies_on_all_devices(clip):
    seen = []

    def then(features):
        seen.append(len(features.sharding.device_set))
        return features

    list(clip.encode_stream(pictures(8), 8, then, make_mesh()))
    assert seen == [jax.device_count()] == [8]


def test_a_batch_that_the_devices_cannot_share(clip):
    with pytest.raises(InputError, match="a batch of 12 cannot be split evenly over 8 devices"):
        clip.encode_stream(pictures(1), 12, mesh=make_mesh())


def test_the_default_batch_grows_with_the_devices():
    assert (default_batch(), default_batch(make_mesh())) == (8, 64)


def test_what_the_device_does_next_takes_the_place_of_the_features(clip):
    photos = pictures(5)
    found = np.concatenate(list(clip.encode_stream(photos, 4, lambda features: features.argmax(axis=1))))
    np.testing.assert_array_equal(found, clip.encode_images(photos, 4).argmax(axis=1))


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_a_class_is_the_mean_of_its_prompts(clip):
    found = clip.class_features(["red star", "orange ring"])
    prompts = [
        "a picture of a red star",
        "an image of a red star",
        "a picture of an orange ring",
        "an image of an orange ring",
    ]
    close(found, unit(clip.encode_texts(prompts).reshape(2, 2, -1).mean(axis=1)))


def test_other_templates_can_be_given(clip):
    close(clip.class_features(["red star"], ["the {}"]), clip.encode_texts(["the red star"]))


def test_texts_do_not_depend_on_how_many_there_are(clip):
    texts = ["a red star", "a blue ring", "a large green cross"]
    whole = clip.encode_texts(texts)
    close(np.concatenate([clip.encode_texts([text]) for text in texts]), whole)
    close(clip.encode_texts(texts * 100), np.concatenate([whole] * 100))


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        (["star"], ["no place"], "'no place' has no place for the class"),
        ([], None, "no class to tell from others"),
        (["star", " "], None, "none of them empty"),
        ("star", None, "'star' is one text"),
        (["star"], "a {}", "'a {}' is one text"),
    ],
)
def test_prompts_that_are_none(clip, names, templates, message):
    with pytest.raises(InputError, match=message):
        clip.class_features(names, templates)


# -- the stream -------------------------------------------------------------------------------------------------------


def test_images_are_taken_a_few_batches_ahead(clip):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield from pictures(1)

    stream = clip.encode_stream(endless(), 4)
    next(stream)
    assert taken <= 4 * 4
    stream.close()


def test_an_image_that_is_none_stops_the_stream(clip):
    with pytest.raises(InputError, match="no image that Pillow can read"):
        clip.encode_images([*pictures(9), b"hello"], 4)
    with pytest.raises(InputError, match="no image to encode"):
        clip.encode_images([])


def test_prepared_items_come_in_order_though_threads_race():
    def slow_if_even(i):
        time.sleep(0.01 * (i % 2 == 0))
        return i

    assert list(prepare_ahead(slow_if_even, range(11), 4)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert list(prepare_ahead(slow_if_even, [], 4)) == []


def test_items_that_wait_are_dropped_when_nobody_wants_them():
    begun = []

    def slow(i):
        begun.append(i)
        time.sleep(0.01)
        return i

    stream = prepare_ahead(slow, range(1000), 200)
    next(stream)
    stream.close()
    assert len(begun) < 600


# -- loading ----------------------------------------------------------------------------------------------------------


def test_without_texts_no_tokenizer_is_needed(clip, tmp_path):
    images = load_clip_model(save_clip(tmp_path / "clip"), texts=False)
    close(images.encode_images(pictures(3)), clip.encode_images(pictures(3)))
    assert set(images.params) == {"vision", "image_projection"}
    assert images.module.config.text is None
    with pytest.raises(InputError, match="loaded for images alone"):
        images.encode_texts(["a red star"])


def test_with_texts_the_tokenizer_comes_from_elsewhere(tmp_path, shared_data):
    pytest.importorskip("transformers")
    merges = shared_data / "clip-vit-l14" / "bpe_simple_vocab_16e6.txt.gz"
    model = load_clip_model(save_clip(tmp_path / "clip"), tokenizer=merges)
    assert len(model.tokenizer) == 49408


def test_a_folder_without_a_tokenizer(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match="holds no tokenizer of CLIP"):
        load_clip_model(save_clip(tmp_path / "clip"))
