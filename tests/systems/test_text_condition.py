"""Texts as conditions: parity with what diffusers asks of transformers, padding, cut texts, the empty prompt, the mini CLIP."""

import clip_reference as reference
import jax
import numpy as np
import pytest
from toy_clip import toy_clip

from jaxsem.backbones.clip import TextConfig, TextTower
from jaxsem.backbones.clip_inputs import load_tokenizer
from jaxsem.data.words import WordTokenizer
from jaxsem.errors import InputError, WeightsError
from jaxsem.systems import text_condition
from jaxsem.systems.clip_model import ClipModel
from jaxsem.systems.text_condition import TextCondition, load_text_condition

VOCABULARY = reference.VOCABULARY
START, END = VOCABULARY - 2, VOCABULARY - 1
SHORT, LONG = "a red star", " ".join(["cat star red"] * 30)


@pytest.fixture(scope="module", params=["<|endoftext|>", "!"], ids=["as 1.x", "as 2.x"])
def pipeline(request, tmp_path_factory):
    """A pipeline's folder, and its text encoder and tokenizer of transformers."""
    _, transformers = reference.import_reference()
    folder, first = tmp_path_factory.mktemp("pipeline"), request.param != "!"
    net = reference.text_encoder("quick_gelu" if first else "gelu")
    net.save_pretrained(folder / "text_encoder")
    reference.write_tokenizer(folder / "tokenizer", request.param)
    return folder, net, transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")


@pytest.fixture(scope="module")
def condition(pipeline):
    return load_text_condition(pipeline[0])


@pytest.fixture(scope="module")
def mini():
    return TextCondition.of_clip(toy_clip())


def diffusers_ids(tokenizer, texts):
    """As the pipelines of Stable Diffusion call the tokenizer."""
    return np.asarray(tokenizer(texts, padding="max_length", max_length=77, truncation=True)["input_ids"])


def diffusers_states(net, ids):
    torch, _ = reference.import_reference()
    with torch.no_grad():
        return net(torch.from_numpy(ids))[0].numpy()


# -- as diffusers does ------------------------------------------------------------------------------------------------


def test_conditions_are_those_of_diffusers(pipeline, condition):
    _, net, tokenizer = pipeline
    texts = [SHORT, "Cat! star, 10", "", LONG]
    want = diffusers_states(net, diffusers_ids(tokenizer, texts))
    found = condition(texts)
    assert (found.shape, found.dtype) == ((4, 77, 24), np.float32)
    assert condition.width == 24
    assert 0.5 < want.std() < 2  # lively
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)
    assert np.abs(want[0] - want[1]).max() > 0.1


def test_the_empty_prompt_is_start_end_and_padding(pipeline, condition):
    _, net, tokenizer = pipeline
    ids = diffusers_ids(tokenizer, [""])
    np.testing.assert_array_equal(condition.cut("").ids, ids[0])
    null = condition.null()
    assert null.shape == (1, 77, 24)
    np.testing.assert_allclose(null, diffusers_states(net, ids), rtol=0, atol=1e-5)
    np.testing.assert_allclose(condition([" \n"]), null, rtol=0, atol=1e-6)


def test_a_short_text_is_filled_with_the_padding_of_its_checkpoint(pipeline, condition):
    _, _, tokenizer = pipeline
    ids, kept, was_cut = condition.cut(SHORT)
    assert (ids.dtype, ids.shape, kept, was_cut) == (np.int32, (77,), SHORT, False)
    np.testing.assert_array_equal(ids, diffusers_ids(tokenizer, [SHORT])[0])
    pad = {"<|endoftext|>": END, "!": 0}[tokenizer.pad_token]
    assert ids[0] == START
    assert ids[4] == END
    assert set(ids[5:].tolist()) == {pad}


def test_a_long_text_keeps_its_beginning_and_the_end(pipeline, condition, caplog):
    _, _, tokenizer = pipeline
    ids, kept, was_cut = condition.cut(LONG)
    np.testing.assert_array_equal(ids, diffusers_ids(tokenizer, [LONG])[0])
    assert (ids[-1], was_cut) == (END, True)
    assert kept == " ".join(["cat star red"] * 25)
    assert not caplog.records  # transformers says nothing of its own
    fits = condition.cut(kept)
    assert (fits.was_cut, fits.kept) == (False, kept)
    np.testing.assert_array_equal(fits.ids, ids)


def test_both_paddings_give_different_conditions(tmp_path):
    """The padding is seen: one tower, two tokenizers."""
    reference.import_reference()
    module, params = small_tower()
    found = []
    for name, pad in (("first", "<|endoftext|>"), ("second", "!")):
        reference.write_tokenizer(tmp_path / name, pad)
        found.append(TextCondition(module, params, load_tokenizer(tmp_path / name))([SHORT]))
    np.testing.assert_allclose(found[0][:, :5], found[1][:, :5], rtol=0, atol=1e-6)  # causal: the words see none of it
    assert np.abs(found[0][:, 5:] - found[1][:, 5:]).max() > 0.01


def small_tower(vocabulary=VOCABULARY):
    """A tower of 77 tokens with random weights, which needs no torch."""
    module = TextTower(TextConfig(16, 1, 2, 32, vocabulary=vocabulary, context=77))
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 77), np.int32))["params"]
    random = np.random.RandomState(6)
    return module, jax.tree.map(lambda leaf: np.float32(0.3 * random.standard_normal(leaf.shape)), shapes)


def test_a_hugging_face_id_loads_as_its_folder_does(pipeline, condition, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def download(repository, name, revision):
        assert (repository, revision) == ("owner/diffusion", "main")
        if not (pipeline[0] / name).is_file():
            raise huggingface_hub.errors.EntryNotFoundError(name)
        return str(pipeline[0] / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found = load_text_condition("owner/diffusion@main")
    np.testing.assert_array_equal(found([SHORT]), condition([SHORT]))


# -- the mini CLIP ----------------------------------------------------------------------------------------------------


def test_of_a_clip_it_takes_tower_tokenizer_and_context(mini):
    clip = toy_clip()
    texts = ["a small red star", "a circle"]
    found = mini(texts)
    assert (found.shape, found.dtype, mini.length) == ((2, 40, 16), np.float32, 40)
    # The state at the end is what the CLIP's own feature is made of.
    ends = np.asarray([found[0, 5], found[1, 3]])
    feature = ends @ np.asarray(clip.params["text_projection"]["kernel"])
    feature /= np.linalg.norm(feature, axis=1, keepdims=True)
    np.testing.assert_allclose(feature, clip.encode_texts(texts), rtol=0, atol=1e-5)


def test_words_are_padded_with_the_words_padding(mini):
    words = WordTokenizer()
    ids = mini.cut("a star").ids
    assert ids[:4].tolist() == words(["a star"])["input_ids"][0]
    assert set(ids[4:].tolist()) == {words.pad_token_id}
    assert mini.null().shape == (1, 40, 16)
    assert mini.cut("").ids[:3].tolist() == [words.start, words.end, words.pad_token_id]


def test_a_long_text_of_words_is_cut_between_words(mini):
    ids, kept, was_cut = mini.cut("a small red star " * 20)
    assert was_cut
    assert (len(ids), ids[-1]) == (40, WordTokenizer().end)
    assert kept == " ".join((["a", "small", "red", "star"] * 10)[:38])


def test_an_unknown_word_is_named(mini):
    with pytest.raises(InputError, match="the mini models do not know the word 'stra'; did you mean 'star'"):
        mini(["a star", "a red stra"])


def test_a_condition_does_not_depend_on_its_batch(mini, monkeypatch):
    texts = [f"a {size} {colour} star" for size in ("small", "large") for colour in ("red", "green", "blue")]
    whole = mini(texts)
    assert len(whole) == 6
    assert np.abs(whole[0] - whole[1]).max() > 0.01
    np.testing.assert_allclose(mini(texts[4]), whole[4:5], rtol=0, atol=1e-5)
    monkeypatch.setattr(text_condition, "_TEXTS", 4)
    np.testing.assert_allclose(mini(texts), whole, rtol=0, atol=1e-5)


def test_gradients_flow_to_the_parameters(mini):
    ids = mini.cut("a star").ids[None]
    gradient = jax.grad(lambda params: text_condition.encode_states(mini.module, params, ids).std())(mini.params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient["blocks"]["mlp"]))


def test_conditions_are_float32_whatever_they_are_computed_in():
    clip = toy_clip()
    half = ClipModel("half", clip.module.clone(dtype="bfloat16"), clip.params, clip.tokenizer)
    found, want = (TextCondition.of_clip(model)(["a red star"]) for model in (half, clip))
    assert found.dtype == np.float32
    error = np.abs(found - want).max()
    assert 0 < error < 0.1


# -- errors -----------------------------------------------------------------------------------------------------------


def test_what_is_no_text_is_an_error(mini):
    with pytest.raises(InputError, match="no text to condition on"):
        mini([])
    with pytest.raises(InputError, match="a text to condition on is a int: give strings"):
        mini(["a star", 3])


@pytest.mark.parametrize("length", [1, 41])
def test_a_length_outside_the_context_is_an_error(mini, length):
    with pytest.raises(InputError, match=f"conditions of {length} tokens: start and end take 2, and 40 fit"):
        TextCondition(mini.module, mini.params, mini.tokenizer, length)


def test_the_tokenizer_of_another_model_is_an_error():
    tokenizer = WordTokenizer()
    found = TextCondition(*small_tower(tokenizer.end), tokenizer)
    with pytest.raises(InputError, match=f"gave the id {tokenizer.end}, and the text tower knows {tokenizer.end}"):
        found.cut("a star")


def test_a_tokenizer_without_padding_is_an_error():
    tokenizer = WordTokenizer()
    tokenizer.pad_token_id = None
    with pytest.raises(InputError, match="the tokenizer names no padding token"):
        TextCondition(*small_tower(len(tokenizer)), tokenizer)


def test_a_clip_for_images_alone_is_an_error():
    clip = toy_clip()
    with pytest.raises(InputError, match="toy was loaded for images alone"):
        TextCondition.of_clip(ClipModel("toy", clip.module, clip.params, None))


def test_a_pipeline_without_a_tokenizer_is_an_error(pipeline):
    with pytest.raises(InputError, match="holds no tokenizer/ beside its text encoder: give the pipeline's folder"):
        load_text_condition(pipeline[0] / "text_encoder")


def test_a_pipeline_with_another_text_encoder_is_an_error(tmp_path):
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder/config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(WeightsError, match="is one of 't5', not of"):
        load_text_condition(tmp_path)
