"""CLIP against transformers' torch model of the same small random weights, and what needs no reference."""

import dataclasses

import clip_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxsem.backbones.clip import (
    Clip,
    ClipConfig,
    TextConfig,
    TextTower,
    VisionConfig,
    VisionTower,
    param_shapes,
    resize_clip,
    resize_positions,
    unit,
)
from jaxsem.backbones.clip_config import CONFIGS
from jaxsem.errors import InputError
from jaxsem.weights.clip import load_clip

CONFIG = ClipConfig(
    VisionConfig(width=32, layers=3, heads=4, hidden=80, patch=8, image_size=32),
    TextConfig(width=24, layers=2, heads=3, hidden=56, vocabulary=99, context=12),
    projection=20,
)


def towers(module, params):
    """Each tower alone, with its own part of the parameters."""
    vision = VisionTower(module.config.vision).bind({"params": params["vision"]})
    return vision, TextTower(module.config.text).bind({"params": params["text"]})


@pytest.fixture(scope="module")
def params():
    """Seeded parameters of `CONFIG` that need no torch: fresh ones, with everything that starts at 0 or 1 moved."""
    random = np.random.RandomState(3)
    fresh = jax.jit(Clip(CONFIG).init)(jax.random.key(0), reference.images(1), jnp.zeros((1, 12), int))["params"]
    return jax.tree.map(lambda p: np.asarray(p + 0.1 * random.standard_normal(p.shape), np.float32), fresh)


# -- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_features_hidden_states_and_logits_are_those_of_transformers(activation):
    net = reference.model(activation)
    images, texts = reference.images(), reference.texts()
    want = reference.outputs(net, images, texts)
    module, params = load_clip(reference.state_of(net), config_of(activation))
    vision, text = towers(module, params)
    bound = module.bind({"params": params})
    assert 0.5 < want.image.std() < 2  # lively
    np.testing.assert_allclose(bound.encode_image(images), want.image, rtol=0, atol=1e-5)
    np.testing.assert_allclose(bound.encode_text(texts), want.text, rtol=0, atol=1e-5)
    np.testing.assert_allclose(vision.hidden_states(images), want.image_states, rtol=0, atol=1e-5)
    np.testing.assert_allclose(text.hidden_states(texts), want.text_states, rtol=0, atol=1e-5)
    found = bound(images, texts)
    np.testing.assert_allclose(found["scale"] * found["image"] @ found["text"].T, want.logits, rtol=0, atol=1e-5)


def config_of(activation, **text):
    vision = dataclasses.replace(CONFIG.vision, activation=activation)
    return ClipConfig(vision, dataclasses.replace(CONFIG.text, activation=activation, **text), CONFIG.projection)


@pytest.mark.parametrize(
    ("eos_token_id", "end_of_text"), [(2, None), (40, 40)], ids=["largest id, as OpenAI", "first place of the end"]
)
def test_the_end_of_text_is_found_as_in_transformers(eos_token_id, end_of_text):
    net = reference.model(eos_token_id=eos_token_id)
    texts = reference.texts()
    texts[:3, 3] = 40  # before the largest id, 98; the last row has none and takes its first token
    assert (texts == 40).any(1).tolist() == [True, True, True, False]
    module, params = load_clip(reference.state_of(net), config_of("quick_gelu", end_of_text=end_of_text))
    found = module.apply({"params": params}, texts, method="encode_text")
    want = reference.outputs(net, reference.images(1), texts).text
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(40, 64), (16, 24)])
def test_other_image_sizes_agree_with_transformers(size):
    net = reference.model()
    images = reference.images(2, *size)
    module, params = load_clip(reference.state_of(net), CONFIG)
    config, resized = resize_clip(module.config, params, size)
    found = Clip(config).apply({"params": resized}, images, method="encode_image")
    want = reference.outputs(net, images, reference.texts(), interpolate_pos_encoding=True).image
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("ViT-B/32", 151_277_313),
        ("ViT-B/16", 149_620_737),
        ("ViT-L/14", 427_616_513),
        ("ViT-L/14@336px", 427_944_193),
        ("ViT-H/14", 986_109_441),
    ],
)
def test_published_models_have_their_number_of_parameters(name, count):
    """As transformers 5.23.0 counts them on the meta device."""
    assert sum(leaf.size for leaf in jax.tree.leaves(param_shapes(Clip(CONFIGS[name])))) == count


def test_a_tower_alone_has_the_parameters_of_that_tower():
    whole = param_shapes(Clip(CONFIG))
    image = param_shapes(Clip(ClipConfig(CONFIG.vision, None, 20)))
    text = param_shapes(Clip(ClipConfig(None, CONFIG.text, None)))
    assert image == {key: whole[key] for key in ("vision", "image_projection")}
    assert text == {"text": whole["text"]}


def test_layers_lie_on_the_leading_axis():
    shapes = flatten_dict(param_shapes(Clip(CONFIG))["vision"]["blocks"], sep="/")
    assert len(shapes) == 16
    assert {leaf.shape[0] for leaf in shapes.values()} == {3}


# -- parts of the stack -----------------------------------------------------------------------------------------------


def test_running_the_layers_in_two_spans_is_running_them_all(params):
    vision, _ = towers(Clip(CONFIG), params)
    tokens = vision.embed(reference.images())
    states = vision.hidden_states(reference.images())
    np.testing.assert_array_equal(tokens, states[0])
    halfway = vision.run_layers(tokens, 0, 2)
    np.testing.assert_allclose(halfway, states[2], atol=1e-6)
    np.testing.assert_allclose(vision.run_layers(halfway, 2), states[3], atol=1e-6)
    np.testing.assert_array_equal(vision.run_layers(tokens, 1, 1), tokens)
    assert np.abs(states[3] - states[2]).mean() > 0.01


def test_the_penultimate_layer_is_that_of_the_hidden_states(params):
    bound = Clip(CONFIG).bind({"params": params})
    vision, _ = towers(Clip(CONFIG), params)
    states = vision.hidden_states(reference.images())
    np.testing.assert_allclose(bound.image_tokens(reference.images(), -1), states[-2], atol=1e-6)


def test_a_span_needs_only_its_slice_of_the_parameters(params):
    vision, _ = towers(Clip(CONFIG), params)
    tokens = vision.embed(reference.images())
    part = {**params["vision"], "blocks": jax.tree.map(lambda p: p[1:], params["vision"]["blocks"])}
    short = VisionTower(dataclasses.replace(CONFIG.vision, layers=2)).bind({"params": part})
    np.testing.assert_allclose(short.run_layers(tokens), vision.run_layers(tokens, 1), atol=1e-6)


def test_tokens_from_elsewhere_become_a_feature_as_those_of_an_image_do(params):
    bound = Clip(CONFIG).bind({"params": params})
    tokens = bound.image_tokens(reference.images())
    np.testing.assert_array_equal(bound.image_feature(tokens), bound.encode_image(reference.images()))


# -- training and types -----------------------------------------------------------------------------------------------


def test_every_parameter_has_a_gradient_and_remat_changes_none_of_them(params):
    images, texts = reference.images(), reference.texts()[:3]

    def loss(params, remat):
        found = Clip(CONFIG, remat=remat).apply({"params": params}, images, texts)
        logits = found["scale"] * found["image"] @ found["text"].T
        return -jnp.diag(jax.nn.log_softmax(logits)).mean()

    plain, again = (jax.jit(jax.grad(loss), static_argnums=1)(params, remat) for remat in (False, True))
    for name, gradient in flatten_dict(plain, sep="/").items():
        if not name.endswith("key/bias"):  # softmax does not see what all keys share
            assert float(jnp.abs(gradient).max()) > 1e-7, name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, again)


def test_bfloat16_computes_the_same_directions(params):
    images, texts = reference.images(), reference.texts()
    exact = jax.jit(Clip(CONFIG).apply)({"params": params}, images, texts)
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    module = Clip(CONFIG, jnp.bfloat16, jnp.bfloat16)
    tokens = jax.eval_shape(lambda: module.apply({"params": half}, images, method="image_tokens"))
    rough = jax.jit(module.apply)({"params": half}, images, texts)
    assert tokens.dtype == jnp.bfloat16
    assert rough["image"].dtype == rough["text"].dtype == jnp.float32
    for tower in ("image", "text"):
        assert float((exact[tower] * rough[tower]).sum(-1).min()) > 0.999
    assert not np.array_equal(exact["image"], rough["image"])


def test_param_dtype_reaches_every_large_parameter():
    shapes = flatten_dict(param_shapes(Clip(CONFIG, param_dtype=jnp.bfloat16)), sep="/")
    assert [name for name, leaf in shapes.items() if leaf.dtype != jnp.bfloat16] == ["logit_scale"]


def test_a_text_does_not_depend_on_what_follows_its_end(params):
    texts = reference.texts()
    padded = np.where(np.arange(12) > texts.argmax(1)[:, None], 0, texts)  # as OpenAI pads
    assert not np.array_equal(padded, texts)
    encode = Clip(CONFIG).bind({"params": params}).encode_text
    np.testing.assert_allclose(encode(padded), encode(texts), atol=1e-6)


def test_unit_features_have_length_one():
    features = np.random.RandomState(0).standard_normal((3, 7)).astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(unit(features), axis=-1), 1, rtol=1e-6)


# -- positions --------------------------------------------------------------------------------------------------------


def test_positions_of_the_same_grid_are_left_alone(params):
    positions = params["vision"]["positions"]
    assert resize_positions(positions, (4, 4), (4, 4)) is positions


def test_the_class_token_and_constants_survive_a_resize():
    positions = np.concatenate([np.full((1, 3), 7.0), np.full((16, 3), 2.5)]).astype(np.float32)
    resized = resize_positions(positions, (4, 4), (7, 5))
    np.testing.assert_array_equal(resized[0], positions[0])
    np.testing.assert_allclose(resized[1:], np.full((35, 3), 2.5), rtol=1e-6)


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 30}, "a width of 30 cannot be split into 4 attention heads"),
        ({"layers": 0}, "the image tower has layers=0; it takes an integer of at least 1"),
        ({"patch": 7}, "patches of 7 do not fill an image of 32x32"),
        ({"image_size": (32, 20)}, "patches of 8 do not fill an image of 32x20"),
        ({"activation": "swish"}, "no activation 'swish'; there are gelu, quick_gelu"),
    ],
)
def test_sizes_that_cannot_be_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG.vision, **change)


def test_configs_that_make_no_clip_are_refused():
    with pytest.raises(InputError, match="without an image tower and without a text tower"):
        ClipConfig(None, None, 20)
    with pytest.raises(InputError, match="needs a projection"):
        ClipConfig(CONFIG.vision, CONFIG.text, None)
    with pytest.raises(InputError, match="99, lies outside the vocabulary of 99"):
        dataclasses.replace(CONFIG.text, end_of_text=99)


def test_inputs_that_do_not_fit_are_refused(params):
    bound = Clip(CONFIG).bind({"params": params})
    with pytest.raises(InputError, match=r"\[batch, 32, 32, 3\], floats, not float32 of shape \[2, 40, 32, 3\]"):
        bound.encode_image(reference.images(2, 40, 32))
    with pytest.raises(InputError, match="not uint8 of shape"):
        bound.encode_image(np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(InputError, match="a text of 13 tokens does not fit the context of 12"):
        bound.encode_text(np.zeros((1, 13), np.int32))
    with pytest.raises(InputError, match="not float32 of shape"):
        bound.encode_text(np.zeros((1, 12), np.float32))
    with pytest.raises(InputError, match=r"tokens are \[batch, n, 32\], not \[1, 17, 24\]"):
        towers(Clip(CONFIG), params)[0].run_layers(jnp.zeros((1, 17, 24)))


@pytest.mark.parametrize("bad", [-1, 99])
def test_an_id_outside_the_vocabulary_is_not_taken_for_another(params, bad):
    texts = reference.texts()
    texts[1, 2] = bad
    features = Clip(CONFIG).apply({"params": params}, texts, method="encode_text")
    assert np.isnan(features[1]).all()
    assert np.isfinite(np.delete(features, 1, 0)).all()


def test_a_tower_that_is_not_there_is_named(params):
    image = Clip(ClipConfig(CONFIG.vision, None, 20)).bind(
        {"params": {k: params[k] for k in ("vision", "image_projection")}}
    )
    with pytest.raises(InputError, match="this CLIP has no text tower"):
        image.encode_text(reference.texts())
    text = ClipConfig(None, CONFIG.text, None)
    with pytest.raises(InputError, match="no image tower: load"):
        Clip(text).bind({"params": {"text": params["text"]}}).encode_image(reference.images())
    with pytest.raises(InputError, match="no image tower whose image size"):
        resize_clip(text, {}, 64)
