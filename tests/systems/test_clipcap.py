"""ClipCap: sizes, what a caption may and may not see, the loss, captions against plain loops, and bad input."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsem import generation
from jaxsem.backbones.gpt2 import Gpt2Config
from jaxsem.errors import InputError
from jaxsem.nn.ops import unit
from jaxsem.systems.clipcap import (
    MLP_COCO,
    PAPER,
    TRANSFORMER_COCO,
    ClipCap,
    ClipCapConfig,
    caption,
    clipcap_loss,
    param_shapes,
    partition,
)
from jaxsem.training import merge_params

GPT2 = Gpt2Config(width=16, layers=2, heads=2, hidden=32, vocabulary=23, context=24)
MLP = ClipCapConfig(feature_width=6, prefix=3, gpt2=GPT2)
TRANSFORMER = dataclasses.replace(MLP, mapper="transformer", prefix=2, clip_length=4, layers=2, heads=4)
BOTH = pytest.mark.parametrize("config", [MLP, TRANSFORMER], ids=["mlp", "transformer"])

FEATURES = np.random.RandomState(0).standard_normal((3, 6)).astype(np.float32)
MASK = np.arange(5) < np.array([[5], [3], [1]])
TOKENS = np.random.RandomState(1).randint(0, 23, MASK.shape).astype(np.int32)


@cache
def params_of(config, seed=0):
    """Random parameters, lively enough that features and places change the words."""
    random = np.random.RandomState(seed)

    def draw(path, leaf):
        normal = random.standard_normal(leaf.shape).astype(np.float32)
        return {"scale": 1 + 0.2 * normal, "positions": 2 * normal, "bias": 0.2 * normal}.get(
            path[-1].key, 0.5 * normal
        )

    return jax.tree.map_with_path(draw, param_shapes(ClipCap(config)))


@partial(jax.jit, static_argnames=("config", "method"))
def run(config, params, *inputs, method=None):
    return ClipCap(config).apply({"params": params}, *inputs, method=method)


def all_logits(module, features, tokens):
    return module.gpt2(jnp.concatenate([module.prefix(features), module.gpt2.embed_tokens(tokens)], axis=1))


@partial(jax.jit, static_argnames=("config", "train"))
def gradient_of(config, params, tokens, train="both"):
    trainable, frozen = partition(params, train)

    def loss_of(trainable):
        logits = ClipCap(config).apply({"params": merge_params(trainable, frozen)}, FEATURES, tokens, MASK)
        return clipcap_loss(logits, tokens, MASK)[0]

    return jax.value_and_grad(loss_of)(trainable)


def log_softmax(logits):
    shifted = logits - np.max(logits, axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def counted(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "mapper"), [(MLP_COCO, 31_468_800), (PAPER, 32_451_840), (TRANSFORMER_COCO, 57_520_128)]
)
def test_the_published_sizes(config, mapper):
    shapes = param_shapes(ClipCap(config))
    assert {name: counted(part) for name, part in shapes.items()} == {"mapper": mapper, "gpt2": 124_439_808}


@BOTH
def test_a_new_mapper_gives_vectors_that_differ_between_features(config):
    params = jax.jit(ClipCap(config).init)(jax.random.key(0), FEATURES, TOKENS)["params"]
    prefix = run(config, params, FEATURES, method="prefix")
    assert prefix.shape == (3, config.prefix, 16)
    assert np.abs(prefix[0] - prefix[1]).max() > 0.01
    assert np.isfinite(prefix).all()


def test_bfloat16_computes_in_its_own_type_and_gives_float32_logits():
    module = ClipCap(TRANSFORMER, jnp.bfloat16, jnp.bfloat16)
    shapes = param_shapes(module)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.bfloat16)}
    prefix, logits = (
        jax.eval_shape(partial(module.apply, method=method), {"params": shapes}, FEATURES, *rest)
        for method, rest in (("prefix", ()), (None, (TOKENS, MASK)))
    )
    assert (prefix.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)


# -- the pass of training ---------------------------------------------------------------------------------------------


@BOTH
def test_logits_are_those_of_gpt2_on_the_prefix_and_the_words_before(config):
    params = params_of(config)
    logits = run(config, params, FEATURES, TOKENS)
    assert (logits.shape, logits.dtype) == ((3, 5, 23), jnp.float32)

    expected = run(config, params, FEATURES, TOKENS, method=all_logits)
    np.testing.assert_allclose(logits, expected[:, config.prefix - 1 : -1], atol=1e-5)


@BOTH
def test_a_word_is_told_from_the_feature_and_the_words_before_it(config):
    params = params_of(config)
    logits = run(config, params, FEATURES, TOKENS)
    changed = TOKENS.copy()
    changed[:, 2] = (changed[:, 2] + 1) % 23
    other = run(config, params, FEATURES, changed)
    np.testing.assert_allclose(other[:, :3], logits[:, :3], atol=1e-6)
    assert np.abs(other[:, 3] - logits[:, 3]).min(axis=0).max() > 1e-3
    assert np.abs(run(config, params, FEATURES[::-1], TOKENS)[0] - logits[0]).max() > 1e-3


def test_the_loss_does_not_see_what_stands_in_the_padding():
    params = params_of(MLP)
    loss, gradient = gradient_of(MLP, params, TOKENS)
    again, same = gradient_of(MLP, params, np.where(MASK, TOKENS, -1))
    assert float(loss) == float(again)
    assert np.isfinite(loss)
    jax.tree.map(np.testing.assert_array_equal, gradient, same)


def test_the_mask_changes_no_word_that_counts():
    """As the padding is at the end, the loss without a mask for GPT-2 (the released code of papers/1) is the same."""
    params = params_of(TRANSFORMER)
    unmasked = run(TRANSFORMER, params, FEATURES, TOKENS)
    loss, _ = gradient_of(TRANSFORMER, params, TOKENS)
    np.testing.assert_allclose(loss, clipcap_loss(unmasked, TOKENS, MASK)[0], rtol=1e-5)
    nats = -np.take_along_axis(log_softmax(unmasked), TOKENS[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(loss, nats[MASK].mean(), rtol=1e-5)


def test_the_loss_in_numbers():
    """Two tokens of probability 1/2 and 1/8, the first of them the likeliest; the third is padding."""
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.125, 0.375, 0.5], [0.1, 0.1, 0.8]]]))
    loss, metrics = clipcap_loss(logits, jnp.array([[0, 0, 0]]), jnp.array([[True, True, False]]))
    assert float(loss) == pytest.approx(2 * np.log(2))
    assert float(metrics["perplexity"]) == pytest.approx(4)
    assert float(metrics["accuracy"]) == pytest.approx(0.5)


def test_a_batch_of_nothing_but_padding_costs_nothing():
    loss, metrics = clipcap_loss(jnp.zeros((2, 3, 4)), jnp.zeros((2, 3), int), jnp.zeros((2, 3), bool))
    assert (float(loss), float(metrics["accuracy"])) == (0, 0)


def test_normalising_takes_the_length_of_features_away():
    params, unit_config = params_of(MLP), dataclasses.replace(MLP, normalise=True)
    once, thrice = (run(unit_config, params, scale * FEATURES, method="prefix") for scale in (1, 3))
    np.testing.assert_allclose(once, thrice, atol=1e-6)
    np.testing.assert_allclose(once, run(MLP, params, unit(FEATURES), method="prefix"), atol=1e-6)


@BOTH
def test_with_gpt2_frozen_the_mapper_gets_the_same_gradient_and_gpt2_none(config):
    params = params_of(config)
    _, whole = gradient_of(config, params, TOKENS)
    _, part = gradient_of(config, params, TOKENS, train="mapper")
    assert part.keys() == {"mapper"}
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), part["mapper"], whole["mapper"])
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(part))
    with pytest.raises(InputError, match="'mapper' or 'both', not 'gpt2'"):
        partition(params, "gpt2")


# -- captions ---------------------------------------------------------------------------------------------------------


def log_probabilities(config, params, feature, words, limit):
    """Of the next word, after the feature and the words, all computed at once."""
    tokens = np.zeros((1, limit), np.int32)
    tokens[0, : len(words)] = words
    return log_softmax(np.asarray(run(config, params, feature[None], tokens))[0, len(words)])


def search(config, params, feature, beams, limit, stop):
    """The best text by its mean log-probability, among `beams` kept after every word; one beam is greedy."""
    texts = [((), 0.0)]
    for _ in range(limit):
        found = []
        for words, total in texts:
            if words and words[-1] == stop:
                found.append((words, total))
            else:
                gains = log_probabilities(config, params, feature, words, limit)
                found += [((*words, word), total + float(gain)) for word, gain in enumerate(gains)]
        texts = sorted(found, key=lambda text: -text[1] / len(text[0]))[:beams]
    words, total = texts[0]
    return words, total / len(words)


@pytest.mark.parametrize(("method", "beams"), [("greedy", 1), ("beam", 3)])
@pytest.mark.parametrize(("config", "stop"), [(MLP, 4), (TRANSFORMER, 1)], ids=["mlp", "transformer"])
def test_captions_are_those_of_a_plain_loop(config, stop, method, beams):
    params = params_of(config)
    found = caption(ClipCap(config), params, FEATURES, method, max_new_tokens=6, stop=stop, pad=22, beams=beams)
    assert found.tokens.shape == (3, 6)
    assert found.lengths.min() < found.lengths.max() == 6
    for feature, tokens, length, score in zip(FEATURES, found.tokens, found.lengths, found.scores):
        words, expected = search(config, params, feature, beams, 6, stop)
        assert tuple(tokens[:length].tolist()) == words
        np.testing.assert_array_equal(tokens[length:], 22)
        np.testing.assert_allclose(score, expected, rtol=1e-4)


def test_words_are_drawn_from_the_nucleus():
    params = params_of(MLP)
    limits = {"max_new_tokens": 6, "stop": ()}
    found = caption(
        ClipCap(MLP), params, FEATURES, "top_p", rng=jax.random.key(0), temperature=1.5, top_p=0.7, **limits
    )
    chances = np.exp(log_softmax(np.asarray(run(MLP, params, FEATURES, found.tokens)) / 1.5))
    drawn = np.take_along_axis(chances, np.asarray(found.tokens)[..., None], axis=-1)
    assert np.where(chances > drawn, chances, 0).sum(-1).max() < 0.7 + 1e-5
    greedy = caption(ClipCap(MLP), params, FEATURES, **limits)
    assert (found.tokens != greedy.tokens).any()
    narrow = caption(ClipCap(MLP), params, FEATURES, "top_p", rng=jax.random.key(0), top_p=1e-6, **limits)
    np.testing.assert_array_equal(narrow.tokens, greedy.tokens)


def test_nothing_is_compiled_again_for_a_changed_number():
    params = params_of(MLP)

    def draw(seed, temperature, top_p, stop):
        options = {"temperature": temperature, "top_p": top_p, "stop": stop, "max_new_tokens": 6}
        return caption(ClipCap(MLP), params, FEATURES, "top_p", rng=jax.random.key(seed), **options)

    first = draw(0, 1.0, 0.9, 3)
    compiled = generation._sample._cache_size()
    second = draw(1, 3.0, 1.0, 5)
    assert generation._sample._cache_size() == compiled
    assert (first.tokens != second.tokens).any()


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mapper": "linear"}, "no mapper 'linear'; there are mlp, transformer"),
        ({"feature_width": 0}, "feature_width is at least 1, not 0"),
        ({"prefix": 0}, "prefix is at least 1, not 0"),
        ({"prefix": 24}, "a prefix of 24 leaves no room for words in a context of 24"),
        ({"mapper": "transformer", "heads": 5}, "width of 16 cannot be split into 5 attention heads"),
    ],
)
def test_sizes_that_cannot_be(fields, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(MLP, **fields)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((FEATURES[:, :5], TOKENS), r"features are \[images, 6\] for this model, not of shape \(3, 5\)"),
        ((FEATURES, TOKENS.astype(np.float32)), r"captions are \[batch, n\] token ids, n at least 1, not float32"),
        ((FEATURES, TOKENS[:, :0]), r"n at least 1, not int32 of shape \(3, 0\)"),
        ((FEATURES, TOKENS, MASK[:, :4]), r"the mask of captions of shape \(3, 5\) has that shape, not \(3, 4\)"),
        (
            (FEATURES, np.zeros((3, 23), np.int32)),
            "caption of 23 tokens after a prefix of 3 does not fit the context of 24",
        ),
    ],
)
def test_inputs_that_cannot_be_used(inputs, message):
    with pytest.raises(InputError, match=message):
        jax.eval_shape(ClipCap(MLP).apply, {"params": param_shapes(ClipCap(MLP))}, *inputs)


def test_the_longest_caption_fits():
    logits = run(MLP, params_of(MLP), FEATURES, np.ones((3, 22), np.int32))
    assert logits.shape == (3, 22, 23)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "nucleus"}, "no method 'nucleus'; there are greedy, top_p, beam"),
        ({"method": "top_p"}, r"give it a key, such as rng=jax.random.key\(0\)"),
        ({"method": "top_p", "rng": jax.random.key(0), "top_p": 0.0}, "top_p=0.0 cannot be"),
        ({"max_new_tokens": 23}, "longer than the context of 24"),
    ],
)
def test_captions_that_cannot_be(options, message):
    with pytest.raises(InputError, match=message):
        caption(ClipCap(MLP), params_of(MLP), FEATURES, **{"max_new_tokens": 6, **options})
