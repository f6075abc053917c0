"""LLaVA ready for use: texts of transformers from images and questions, batches that change nothing, options, bad input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llava_reference import IMAGE, POINTS, SIDE, STOP, reference

from jaxsem import generation
from jaxsem.backbones.clip_config import VisionConfig
from jaxsem.backbones.clip_inputs import normalize
from jaxsem.backbones.llama import LlamaConfig
from jaxsem.backbones.llava import Llava, LlavaConfig, param_shapes
from jaxsem.backbones.llava_inputs import square
from jaxsem.data.words import WordTokenizer
from jaxsem.errors import InputError
from jaxsem.systems import mllm_steps
from jaxsem.systems.mllm import Mllm, load_mllm, tokens_after
from jaxsem.systems.mllm_prompts import Words, plain, vicuna, vicuna_bare
from jaxsem.tasks import PLAIN, Example, Picture, evaluate

WORDS = WordTokenizer(["what", "is", "it", "where", *(f"{letter}{letter}" for letter in "abcdefghijklmnopqrst")])
QUESTIONS = ["what is it", "where is it", "what", "aa bb cc is it where dd"]


@functools.cache
def toy(tiled=False, **options) -> Mllm:
    """A model of a few thousand random parameters that speaks of nothing."""
    pinpoints = tuple(map(tuple, POINTS)) if tiled else ()
    text = LlamaConfig(32, 2, 4, 2, 48, len(WORDS), 64)
    module = Llava(LlavaConfig(VisionConfig(16, 3, 2, 24, 14, SIDE), text, 99, grid_pinpoints=pinpoints))
    random = np.random.RandomState(3)

    def draw(path, leaf):
        large = 1.0 if path[-1].key in ("head", "token_embedding", "patch_kernel") else 0.3
        return jnp.asarray(large * random.standard_normal(leaf.shape) + (path[-1].key == "scale"), leaf.dtype)

    params = jax.tree_util.tree_map_with_path(draw, param_shapes(module))
    return Mllm("toy", module, params, Words(WORDS, 99), plain, **options)


def photos(count, height=40, width=50):
    return list(np.random.RandomState(7).randint(0, 256, (count, height, width, 3)).astype(np.uint8))


def tokens_of(model, photo):
    """What the tower gives of a photo, as a neck's tokens would come."""

    def embed(module, images):
        return module.vision.embed(images)

    image = normalize(square(photo, SIDE)[None] / np.float32(255))
    inside = model.module.apply({"params": model.params}, image, method=embed)
    return np.asarray(tokens_after(model.module, model.params, inside, 0))[0]


# -- parity -----------------------------------------------------------------------------------------------------------


def tokenizer_of(folder):
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    pieces = ["<pad>", "<s>", "</s>", "USER:", "ASSISTANT:", "what", "is", "it", "there"]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *(f"w{i}" for i in range(len(pieces), IMAGE))])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({**vocabulary, "<image>": IMAGE}, "w9"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    options = {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<image>"]}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **options)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("kind", ["Llava", "LlavaNext"])
def test_answers_are_those_of_transformers(tmp_path, kind):
    torch = pytest.importorskip("torch")
    net, _ = reference(kind)
    net.save_pretrained(tmp_path)
    tokenizer = tokenizer_of(tmp_path)
    model = load_mllm(tmp_path, template="vicuna_bare", fit="crop", batch=2)
    questions = ["what is it", "is it there there what", "what"]
    images = [*photos(2), photos(1, 30, 90)[0]]
    found = model.answer(images, questions, max_new_tokens=6)
    if kind == "Llava":
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil as Processor
        from transformers.models.llava.processing_llava import LlavaProcessor as Both
    else:
        from transformers.models.llava_next.image_processing_pil_llava_next import (
            LlavaNextImageProcessorPil as Processor,
        )
        from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor as Both
    options = {"image_grid_pinpoints": POINTS} if kind == "LlavaNext" else {}
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    both = Both(
        Processor(**size, **options),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    for image, question, text in zip(images, questions, found):
        given = both(images=image, text="<s> " + vicuna_bare(question), return_tensors="pt")
        given.pop("token_type_ids", None)
        with torch.no_grad():
            want = net.generate(**given, max_new_tokens=6, do_sample=False, eos_token_id=STOP)
        assert text == tokenizer.decode(want[0, given["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert len(set(found)) > 1


def test_a_folder_gives_template_and_types(tmp_path):
    net, _ = reference("LlavaNext")
    net.save_pretrained(tmp_path)
    tokenizer_of(tmp_path)
    model = load_mllm(tmp_path, "int8", jnp.bfloat16)
    assert (model.template, model.module.weights, model.name) == (vicuna, "int8", str(tmp_path))
    language = model.params["language"]
    assert language["blocks"]["mlp"]["up"]["kernel"].dtype == jnp.int8
    assert language["head"].dtype == jnp.bfloat16
    with pytest.raises(InputError, match="no template 'chatml'; there are vicuna"):
        load_mllm(tmp_path, template="chatml")


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiled", [False, True], ids=["1.5", "1.6"])
def test_answers_do_not_depend_on_the_batch(tiled):
    images = photos(2) + photos(2, 60, 30)
    whole = toy(tiled).answer(images, QUESTIONS, max_new_tokens=5)
    assert len(set(whole)) > 1
    # Other neighbours, and a batch that is not full.
    parts = toy(tiled, batch=2)
    assert parts.answer(images[::-1], QUESTIONS[::-1], max_new_tokens=5) == whole[::-1]
    assert parts.answer(images[:3], QUESTIONS[:3], max_new_tokens=5) == whole[:3]


def test_longer_questions_and_more_of_them_compile_nothing():
    model = toy(batch=2)
    model.answer(photos(2), QUESTIONS[:2], max_new_tokens=5)
    compiled = [generation._greedy, mllm_steps.encode_squares, mllm_steps.merge]
    before = [each._cache_size() for each in compiled]
    model.answer(photos(3), ["what", "what is it where", "aa bb cc dd ee"], max_new_tokens=5)
    assert [each._cache_size() for each in compiled] == before


def test_visual_tokens_take_the_place_of_an_image():
    model, images = toy(), photos(3)
    want = model.answer(images, QUESTIONS[:3], max_new_tokens=5)
    inputs = [images[0], tokens_of(model, images[1]), jnp.asarray(tokens_of(model, images[2]))]
    assert model.answer(inputs, QUESTIONS[:3], max_new_tokens=5) == want
    assert model.answer(inputs[::-1], QUESTIONS[:3][::-1], max_new_tokens=5) == want[::-1]


def test_a_latent_without_tiles_ends_in_a_newline():
    model = toy(tiled=True)
    found = model._visual(tokens_of(model, photos(1)[0]))
    assert found.order.tolist() == [0, 1, 2, 3, -1]


def test_a_question_may_be_about_several_images():
    model, (first, second) = toy(), photos(2)
    given = [(first, second), (second, first), (first, tokens_of(model, second)), (first, first)]
    found = model.score(given, ["<image> is aa <image> is"] * 4, [["aa", "bb cc"]] * 4)
    np.testing.assert_allclose(found[2], found[0], atol=1e-4)
    for other in (1, 3):
        assert np.abs(found[other] - found[0]).max() > 1e-3


def test_drawn_answers_depend_on_the_key_and_the_place_alone():
    draw = functools.partial(toy(batch=2).answer, max_new_tokens=5, temperature=1.0, top_p=0.9)
    images = photos(4)
    first = draw(images, QUESTIONS, rng=jax.random.key(0))
    assert draw(images[:3], QUESTIONS[:3], rng=jax.random.key(0)) == first[:3]
    assert draw(images, QUESTIONS, rng=jax.random.key(1)) != first
    assert draw([images[0]] * 4, [QUESTIONS[0]] * 4, rng=jax.random.key(0))[0] == first[0]


# -- options ----------------------------------------------------------------------------------------------------------


def by_hand(model, photo, question, option):
    """The log-probabilities of the tokens of an option, from the whole text at once."""
    ids = [1, 99, *[WORDS._id(word) for word in f"{question} {option}".split()]]
    ids = ids[:1] + [99] * 4 + ids[2:]
    logits = _logits(model.module, model.params, tokens_of(model, photo), np.array([ids]))
    n = len(option.split())
    found = jax.nn.log_softmax(logits)[0, -n - 1 : -1]
    return [float(row[number]) for row, number in zip(found, ids[-n:])]


@functools.partial(jax.jit, static_argnums=0)
def _logits(module, params, tokens, ids):
    def all_of_it(model):
        return model(ids, model.project(tokens[None]))

    return module.apply({"params": params}, method=all_of_it)


def test_scores_are_log_probabilities_after_the_prompt():
    model, images, questions = toy(batch=2), photos(3), ["what is it", "what", "where is"]
    options = [["aa bb", "cc"], ["dd", "aa ee ff"], ["bb", "cc dd"]]
    sums = model.score(images, questions, options, mean=False)
    means = model.score(images, questions, options)
    assert (sums.shape, sums.dtype) == ((3, 2), np.float32)
    parts = [[by_hand(model, *pair, one) for one in each] for *pair, each in zip(images, questions, options)]
    np.testing.assert_allclose(sums, [[sum(part) for part in row] for row in parts], atol=1e-4)
    np.testing.assert_allclose(means, [[np.mean(part) for part in row] for row in parts], atol=1e-4)


def test_fewer_options_are_followed_by_nothing():
    model, images = toy(batch=2), photos(2)
    found = model.score(images, QUESTIONS[:2], [["aa"], ["bb", "cc dd", "ee"]])
    assert np.isneginf(found).tolist() == [[False, True, True], [False] * 3]
    alone = model.score(images[:1] * 2, QUESTIONS[:1] * 2, [["aa"]] * 2)
    np.testing.assert_allclose(found[0, 0], alone[0, 0], atol=1e-4)


def test_an_option_may_fill_the_context():
    model = toy()
    question = " ".join(["what"] * (64 - 1 - 4 - 1))  # start, image, and room for a token of which nothing follows
    found = model.score(photos(1), [question], [["aa bb", "aa"]], mean=False)
    assert np.isfinite(found).all()
    assert found[0, 0] < found[0, 1]
    with pytest.raises(InputError, match=r"has 63 tokens, 4 of them for images, and with an option of 3 tokens"):
        model.score(photos(1), [question], [["aa bb cc"]])


def test_the_harness_asks_it():
    question = {"form": "options", "text": "what is it", "options": ("aa", "bb cc"), "answer": "aa"}
    examples = [
        Example(picture=Picture(f"p{i}", photo, photo.shape[:2]), **question) for i, photo in enumerate(photos(3))
    ]
    record = evaluate(toy(batch=2), examples, rate=lambda picture: 8.0, prompts=PLAIN)
    assert record["results"][0]["options_count"] == 3
    assert record["results"][0]["options_unread"] == 0


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "toy has 0 inputs for 0 questions"),
        ((photos(2), ["what"]), "toy has 2 inputs for 1 questions"),
        ((photos(1), "what"), "'what' is one question: give a list"),
        (([tuple(photos(2))], ["what"]), r"question 1 has 1 places for images \(<image>\) and 2 images"),
        (([np.zeros((4, 15), np.float32)], ["what"]), r"for toy \[n, 16\], not \[4, 15\]: give those of tokens_after"),
        (([np.zeros((4, 5, 3), np.float32)], ["what"]), "or an image as uint8"),
        (([None], ["what"]), "NoneType is no image"),
        ((photos(1), ["purple"]), "do not know the word 'purple'"),
        (
            (photos(2), ["what", "what " * 56]),
            r"question 2, 'what what .* has 61 tokens, 4 of them for images, and with max_new_tokens=5 the context of 64 holds 60",
        ),
    ],
)
def test_bad_questions_are_refused_before_any_work(arguments, message):
    model = dataclasses.replace(toy(), params=None)
    with pytest.raises(InputError, match=message):
        model.answer(*arguments, max_new_tokens=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([["aa"]], "options for 1 of 2 questions"),
        ([["aa"], []], "a question without"),
        ([["aa"], "aa"], "give each a list"),
        ([["aa"], ["aa", " "]], "the option ' ' cannot be told from the prompt"),
    ],
)
def test_bad_options_are_refused_before_any_work(options, message):
    model = dataclasses.replace(toy(), params=None)
    with pytest.raises(InputError, match=message):
        model.score(photos(2), ["what", "what"], options)


def test_bad_settings_are_refused_before_any_work():
    model = dataclasses.replace(toy(), params=None)
    with pytest.raises(InputError, match=r"temperature=0\.5 draws tokens: give a key"):
        model.answer(photos(1), ["what"], temperature=0.5)
    with pytest.raises(InputError, match="max_new_tokens=0 leaves no text"):
        model.answer(photos(1), ["what"], max_new_tokens=0)
    with pytest.raises(InputError, match="cannot answer 0 questions at a time"):
        toy(batch=0)
    with pytest.raises(InputError, match="'stretch'; there are pad, crop"):
        toy(fit="stretch")
